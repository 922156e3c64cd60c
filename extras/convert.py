"""Convert models of Hugging Face `transformers` to our checkpoints and back.

    python extras/convert.py --from hf FOLDER model.safetensors     # config.json, *.safetensors, tokenizer.json
    python extras/convert.py --from hf:OWNER/REPO model.safetensors # fetched: extras/hub.py
    python extras/convert.py --to hf runs/1m OUT                    # AutoModelForCausalLM.from_pretrained("OUT")
    python extras/convert.py --to llama2c runs/1m OUT               # its run: extras/llama2c.py
    python extras/convert.py --to checkpoint runs/1m OUT.safetensors --dtype bfloat16    # half the bytes
    python extras/convert.py --to gguf runs/1m OUT.gguf             # llama.cpp: extras/llamacpp.py

GPT-2, GPT-Neo, Llama and Qwen3 both ways, Bloom from them. What no class of theirs computes goes with one of ours,
modeling_tinygpt.py, both ways. The converted model computes the same logits; otherwise the conversion fails. Every
field of config.json that affects logits is either converted or rejected; those not named here affect only training
(dropout), memory or other heads. Every tensor is either read or known to be derived from the configuration (a mask, the
frequencies of rotations).
Read in order: tensors.py, which names tensors; here 1 fields of config.json, 2 families, 3 from and 4 to transformers.
"""

import argparse
import codecs
import contextlib
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import tinygpt
from extras import hub, llama2c, llamacpp
from extras.tensors import (
    SAVED,
    TABLES,
    Row,
    files_of_tensors,
    find_equal,
    fold_embedding_norm,
    narrowed,
    parameters_from,
    read_tensors,
    read_weight,
    tensors_from,
    with_halves,
    write_safetensors,
)
from extras.tune import jinja_template, read_template
from sample import load_model, never_drawn

# == 1  fields of config.json ==========================================================================================

ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "silu": "silu", "swish": "silu", "relu2": "relu2"}
TANH = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")
ACTIVATIONS |= dict.fromkeys(TANH, "gelu-tanh")
PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}


def read_config(path):
    """The JSON in a file; ValueError that names it where there is none."""
    try:
        return json.loads(bpe.utf8(codecs.decode, path.read_bytes(), path.name, "utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None


def field(c, *names, kind=int, default=...):
    """The value of a field that has one of these names, or `default` if it is absent or null.

    ValueError if a field without default is missing, or the value has the wrong type, is a number that is not positive,
    or differs between two of the names.
    """
    found = {name: c[name] for name in names if c.get(name) is not None or (kind is bool and name in c)}
    if not found and default is ...:
        raise ValueError(f"config.json has no field {' or '.join(names)}")
    first = next(iter(found), None)
    for name, value in found.items():
        number = kind in (int, float)
        with contextlib.suppress(ValueError):  # a number in quotes
            found[name] = value = kind(value) if number and type(value) is str else value
        if type(value) not in ({int, kind} if number else {kind}) or (number and not 0 < value < 2**31):
            raise ValueError(f"config.json: {name} is {value!r:.80}; expected a{' positive' * number} {kind.__name__}")
        if value != found[first]:
            raise ValueError(f"config.json: {first} is {found[first]!r:.80} but {name} is {value!r:.80}")
    return kind(found[first]) if found else default


def expect(c, name, *known):
    """For fields without counterpart in our Config: ValueError unless it is absent, null or one of `known`."""
    if c.get(name) not in (None, *known):
        raise ValueError(f"config.json: {name} is {c[name]!r:.80}; expected {known[0] if known else 'none'}")


def activation(c, name, known=tuple(ACTIVATIONS), default=...):
    """Our name of the activation that a field names."""
    value = field(c, name, kind=str, default=default)
    if value not in known:
        raise ValueError(f"config.json: {name} is {value!r:.80}; expected one of {', '.join(known)}")
    return ACTIVATIONS[value]


# == 2  families =======================================================================================================
#
# Each function returns the fields of our Config and the names of derived tensors, {} is the layer. The names of the
# others are in tensors.py.


def gpt2(c):
    expect(c, "scale_attn_by_inverse_layer_idx", False)
    expect(c, "add_cross_attention", False)
    cfg = dict(seq_len=field(c, "n_positions", "max_position_embeddings"), width=field(c, "n_embd", "hidden_size"))
    cfg |= dict(layers=field(c, "n_layer", "num_hidden_layers"), heads=field(c, "n_head", "num_attention_heads"))
    cfg |= dict(hidden=field(c, "n_inner", default=0), norm_eps=field(c, "layer_norm_epsilon", kind=float))
    cfg |= dict(mlp=activation(c, "activation_function"))
    cfg |= dict(attention_scale=field(c, "scale_attn_weights", kind=bool, default=True))
    return cfg, ("h.{}.attn.bias", "h.{}.attn.masked_bias")


def gpt_neo(c):
    L, local = field(c, "num_layers", "num_hidden_layers"), has_local_layers(c)
    cfg = dict(seq_len=field(c, "max_position_embeddings"), width=field(c, "hidden_size"), layers=L)
    cfg |= dict(heads=field(c, "num_heads", "num_attention_heads"), hidden=field(c, "intermediate_size", default=0))
    cfg |= dict(norm_eps=field(c, "layer_norm_epsilon", kind=float), mlp=activation(c, "activation_function"))
    cfg |= dict(window=field(c, "window_size") if local else 0, attention_scale=False, qkv_bias=False)
    return cfg, ("h.{}.attn.attention.bias", "h.{}.attn.attention.masked_bias")


def has_local_layers(c):
    """True if layers 1, 3, 5, ... have local attention, False if none has; ValueError for other patterns.

    The kinds of the layers are in attention_layers, or in attention_types as [[kinds, count], ...].
    """
    L, layers = field(c, "num_layers", "num_hidden_layers"), field(c, "attention_layers", kind=list, default=None)
    types = field(c, "attention_types", kind=list, default=... if layers is None else None)
    try:
        if any(len(kinds) * times > 2**16 for kinds, times in types or ()):
            raise ValueError("more layers than a model has")
        repeated = [kind for kinds, times in types or () for kind in kinds * times]
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f"config.json: attention_types is {types!r:.80}; expected [[kinds, count], ...]") from None
    given = [kinds for kinds in (layers, types and repeated) if kinds is not None]
    first = given[0]
    patterns = ["global"] * len(first), [("global", "local")[i % 2] for i in range(len(first))]
    if len(first) != L or first not in patterns or given[-1] != first:
        found = f"attention_layers is {layers!r:.80}, attention_types {types!r:.80}"
        raise ValueError(f"config.json: {found}; expected {L} layers, all global, or global and local alternating")
    return "local" in first


def llama(c):
    attention_bias, mlp_bias = (field(c, name, kind=bool, default=False) for name in ("attention_bias", "mlp_bias"))
    activation(c, "hidden_act", ("silu", "swish"), default="silu")  # of the gate
    cfg = dict(seq_len=field(c, "max_position_embeddings"), width=field(c, "hidden_size"))
    cfg |= dict(layers=field(c, "num_hidden_layers"), heads=field(c, "num_attention_heads"))
    cfg |= dict(kv_heads=field(c, "num_key_value_heads", default=0), head_width=field(c, "head_dim", default=0))
    cfg |= dict(hidden=field(c, "intermediate_size"), norm="rmsnorm", norm_eps=field(c, "rms_norm_eps", kind=float))
    cfg |= dict(positions="rope-half", rope_theta=read_theta(c), mlp="swiglu")
    cfg |= dict(qkv_bias=attention_bias, out_bias=attention_bias, up_bias=mlp_bias, down_bias=mlp_bias)
    return cfg, ("layers.{}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")


def qwen3(c):
    """Llama with norms of queries and keys."""
    expect(c, "use_sliding_window", False)
    if {*field(c, "layer_types", kind=list, default=[])} - {"full_attention"}:
        raise ValueError(f"config.json: layer_types is {c['layer_types']!r:.80}; expected full_attention alone")
    cfg, derived = llama(c)
    return cfg | dict(qk_norm=True, head_width=field(c, "head_dim", default=128)), derived


def read_theta(c):
    """The base of RoPE's angles, a field of config.json or of an object in it. ValueError if the angles are scaled."""
    thetas = {"rope_theta": c.get("rope_theta")}
    expect(c, "partial_rotary_factor", 1)
    for name in ("rope_parameters", "rope_scaling"):
        rope = field(c, name, kind=dict, default={})
        thetas[f"{name}.rope_theta"] = rope.pop("rope_theta", None)
        if any(value not in (None, PLAIN_ROPE.get(key)) for key, value in rope.items()):
            raise ValueError(f"config.json: {name} is {c[name]!r:.200}; expected rope_type default")
    return field(thetas, *thetas, kind=float, default=10000.0)


def bloom(c):
    expect(c, "apply_residual_connection_post_layernorm", False)
    H, C = field(c, "n_head", "num_attention_heads"), field(c, "hidden_size", "n_embed")
    cfg = dict(seq_len=field(c, "seq_length", default=2048), width=C, heads=H)
    cfg |= dict(layers=field(c, "n_layer", "num_hidden_layers"), norm_eps=field(c, "layer_norm_epsilon", kind=float))
    cfg |= dict(positions="alibi", embedding_norm=True)

    return cfg, ()


FAMILIES = {"gpt2": gpt2, "gpt_neo": gpt_neo, "llama": llama, "qwen3": qwen3, "bloom": bloom}
UNTIED = ("llama", "qwen3")  # where config.json does not say

OWN = "tinygpt"  # model_type of a folder that has modeling_tinygpt.py

# == 3  from transformers ==============================================================================================


def from_transformers(config, tensors):
    """config.json (a dict) and tensors (name -> array) -> flat parameters (count,) and our Config.

    ValueError for a family, field, tensor or shape that cannot be converted.
    """
    if not isinstance(config, dict):
        raise ValueError(f"config.json is a {type(config).__name__}; expected an object")
    family = field(config, "model_type", kind=str)
    if family not in (*FAMILIES, OWN):
        raise ValueError(f"model_type is {family!r:.80}; expected one of {', '.join(FAMILIES)}")
    for name, known in (("is_causal", True), ("is_encoder_decoder", False), ("pruned_heads", {})):
        expect(config, name, known)
    expect(config, "quantization_config")
    if family == OWN:
        return from_own(config, tensors)
    expect(config, "auto_map", {})
    fields, derived = FAMILIES[family](config)
    named = short_names(tensors)
    tied = field(config, "tie_word_embeddings", kind=bool, default=family not in UNTIED)
    head, embed = (TABLES[family][name].names[0] for name in ("head_w", "embed_w"))
    if tied and head in named and embed in named:  # as in transformers: not tied if both are stored and differ
        tied = np.array_equal(*(read_weight(name, tensors[named[name]]) for name in (head, embed)))
    cfg = tinygpt.Config(vocab_size=field(config, "vocab_size"), tied=tied, **fields)
    short = {name: tensors[full] for name, full in named.items()}
    parameters, left = parameters_from(cfg, short, TABLES[family])
    known = {name.format(layer) for name in derived for layer in range(cfg.layers)} | ({head} if tied else set())
    if unread := sorted({named[name] for name in left if name not in known}):
        more = f" and {len(unread) - 1} more" if unread[1:] else ""
        raise ValueError(f"tensor {unread[0]!r:.80}{more}: not part of the {family} model that config.json describes")
    return parameters, cfg


def from_own(config, tensors):
    """`from_transformers` of a model with modeling_tinygpt.py, whose config.json has the fields of ours."""
    wanted = dataclasses.fields(tinygpt.Config)
    if missing := [f.name for f in wanted if f.name not in config]:
        raise ValueError(f"config.json has no field {missing[0]}, which a model of {OWN} has")
    values = {f.name: config[f.name] for f in wanted}
    try:
        values |= {f.name: float(values[f.name]) for f in wanted if f.type is float and type(values[f.name]) is int}
        cfg = tinygpt.Config(**values)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"config.json: {error!s:.200}") from None
    parameters, left = parameters_from(cfg, tensors, own_table(cfg))
    if left:
        raise ValueError(f"tensor {left[0]!r:.80}: not part of the model that config.json describes")
    return parameters, cfg


def own_table(cfg):
    """The tensors of modeling_tinygpt.py: ours, one by one."""
    return {t.name: Row((f"layers.{{}}.{t.name}" if t.layered else t.name,)) for t in tinygpt.layout(cfg)}


def short_names(tensors):
    """{name without the prefix of models with a head: name in the file}. ValueError if a tensor is there twice."""
    named = {}
    for full in sorted(tensors):
        short = full.removeprefix("transformer.").removeprefix("model.")
        if named.setdefault(short, full) != full:
            raise ValueError(f"tensor {full!r:.80} is there as {named[short]!r:.80} as well")
    return named


# == 4  to transformers ================================================================================================
#
# A family fits a model if its config.json, read again by `FAMILIES`, gives the model's Config.

FOLDED = "the norm after the embedding becomes part of an input table of its own"
THEIR_ACTIVATION = {"gelu-tanh": "gelu_new", "gelu": "gelu", "silu": "silu", "relu2": "relu2"}


def gpt2_config(cfg):
    config = {"n_positions": cfg.position_rows, "n_embd": cfg.width, "n_layer": cfg.layers, "n_head": cfg.heads}
    config |= {"n_inner": cfg.hidden, "activation_function": THEIR_ACTIVATION.get(cfg.mlp, "gelu")}
    return config | {"layer_norm_epsilon": cfg.norm_eps, "scale_attn_weights": cfg.attention_scale}


def gpt_neo_config(cfg):
    kinds, count = (["global", "local"] if cfg.window else ["global"]), cfg.layers
    types = [[kinds, count // len(kinds)]] + [[["global"], 1]] * (count % len(kinds))
    config = {"max_position_embeddings": cfg.position_rows, "hidden_size": cfg.width, "num_layers": count}
    config |= {"num_heads": cfg.heads, "intermediate_size": cfg.hidden, "attention_types": types}
    config |= {"activation_function": THEIR_ACTIVATION.get(cfg.mlp, "gelu"), "window_size": cfg.window or 256}
    return config | {"layer_norm_epsilon": cfg.norm_eps}


def llama_config(cfg):
    config = {"max_position_embeddings": cfg.seq_len, "hidden_size": cfg.width, "num_hidden_layers": cfg.layers}
    config |= {"num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_width}
    config |= {"intermediate_size": cfg.hidden, "rms_norm_eps": cfg.norm_eps, "hidden_act": "silu"}
    config |= {"rope_theta": cfg.rope_theta, "attention_bias": cfg.qkv_bias, "mlp_bias": cfg.up_bias}
    return config | {"rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta}}


WRITERS = {"gpt2": gpt2_config, "gpt_neo": gpt_neo_config, "llama": llama_config, "qwen3": llama_config}
CLASSES = {"gpt2": "GPT2LMHeadModel", "gpt_neo": "GPTNeoForCausalLM"}
CLASSES |= {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def fitting_family(cfg):
    """(family, config.json) of the class of transformers that computes what a model with this `Config` computes.

    ValueError if there is none: the fields in which the closest differs.
    """
    configs = {family: write(cfg) for family, write in WRITERS.items()}

    def fields_of(family):
        shared = {"vocab_size": cfg.vocab_size, "tied": cfg.tied}
        return lambda: FAMILIES[family](configs[family])[0] | shared

    candidates = {CLASSES[family]: fields_of(family) for family in WRITERS}
    found = find_equal(cfg, candidates, "transformers has no class for this model")
    family = next(family for family, name in CLASSES.items() if name == found)
    shared = {"model_type": family, "architectures": [found], "vocab_size": cfg.vocab_size}
    return family, configs[family] | shared | {"tie_word_embeddings": cfg.tied}


def to_transformers(cfg, parameters):
    """A model -> config.json (a dict), {name: array} as transformers has them. A norm after the embedding becomes part
    of an input table apart from the head's. If transformers has no class for the model, those of modeling_tinygpt.py,
    and a line on stderr says so."""
    given = cfg, parameters
    try:
        if cfg.embedding_norm:
            cfg, parameters = fold_embedding_norm(cfg, parameters)
        family, config = fitting_family(cfg)
    except ValueError as error:
        bpe.note(f"{error}; the folder has a class of its own: load it with trust_remote_code=True")
        return own_config(given[0]), tensors_from(*given, own_table(given[0]))
    if given[0].embedding_norm:
        bpe.note(FOLDED)
    table = with_halves(TABLES[family]) if cfg.positions == "rope" else TABLES[family]
    prefix = "transformer." if family.startswith("gpt") else "model."
    tensors = tensors_from(cfg, parameters, table)
    return config, {name if name.startswith("lm_head") else prefix + name: x for name, x in tensors.items()}


def own_config(cfg):
    """config.json of a folder that has modeling_tinygpt.py."""
    config = {"model_type": OWN, "architectures": ["TinyGPTForCausalLM"], "tie_word_embeddings": False}
    config["auto_map"] = {"AutoConfig": "modeling_tinygpt.TinyGPTConfig"}
    config["auto_map"]["AutoModelForCausalLM"] = "modeling_tinygpt.TinyGPTForCausalLM"
    return config | dataclasses.asdict(cfg)


def write_own_class(folder):
    """Put modeling_tinygpt.py into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("modeling_tinygpt.py"), folder / "modeling_tinygpt.py")


def save_transformers(folder, cfg, parameters, tokenizer, dtype="float32", chat_template=None):
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load. Ids that are never sampled are suppressed."""
    config, tensors = to_transformers(cfg, parameters)
    config |= {"dtype": dtype, "torch_dtype": dtype}
    arrays = {name: narrowed(x, dtype) for name, x in tensors.items()}
    ends = {"bos_token_id": tokenizer.end, "eos_token_id": tokenizer.end}
    words = {f"{kind}_token": tokenizer.ending for kind in ("bos", "eos", "pad")} | {"model_max_length": cfg.seq_len}
    files = {"config.json": config | ends, "generation_config.json": ends | {"pad_token_id": tokenizer.end}}
    if banned := never_drawn(cfg, tokenizer):
        files["generation_config.json"]["suppress_tokens"] = banned
    words |= {"chat_template": chat_template} if chat_template else {}
    files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"} | words
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if config["model_type"] == OWN:
        write_own_class(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", arrays, {"format": "pt"})


# == 5  command line ===================================================================================================


TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")  # the first that is there


def read_folder(folder, out):
    """Convert a model of transformers to the checkpoint `out` -> its number of parameters."""
    config_path = folder / "config.json"
    tokenizer_path = next((path for path in map(folder.joinpath, TOKENIZERS) if path.exists()), folder / TOKENIZERS[0])
    config = read_config(config_path)
    tokenizer = bpe.Tokenizer.load(tokenizer_path)
    files = files_of_tensors(folder)
    if out.exists() and any(out.samefile(path) for path in (config_path, tokenizer_path, *files)):
        raise ValueError(f"--out {out} is a file of the model to convert; name another")
    parameters, cfg = from_transformers(config, read_tensors(files))
    if tokenizer.vocab_size > cfg.vocab_size:
        found = f"{tokenizer_path.name} has {tokenizer.vocab_size} tokens"
        raise ValueError(f"{found}; expected at most V={cfg.vocab_size}")
    tinygpt.save_checkpoint(out, parameters.astype(np.float32), cfg, tokenizer.to_json())
    return len(parameters)


def read_hub(repo, out):
    """Fetch a model of transformers into the folder OWNER--REPO beside `out`, and convert it -> its parameters."""
    folder = out.parent / repo.replace("/", "--")
    hub.fetch_model(repo, folder)
    return read_folder(folder, out)


def system(text):
    """The argument of --from: hf or hf:OWNER/REPO -> None or OWNER/REPO."""
    name, _, repo = text.partition(":")
    if name != "hf" or not (text == "hf" or hub.NAME.fullmatch(repo)):
        raise argparse.ArgumentTypeError(f"{text!r:.80}; expected hf, or hf:OWNER/REPO")
    return repo


def save_checkpoint(path, cfg, parameters, tokenizer, dtype="float32", about=""):
    """Write a checkpoint of the model alone, bfloat16 in half the bytes: read back, its weights are float32 again."""
    own = {"format": tinygpt.FORMAT, "version": tinygpt.FORMAT_VERSION, "config": json.dumps(dataclasses.asdict(cfg))}
    table = tinygpt.layout(cfg)
    ends = [t.offset for t in table[1:]] + [len(parameters)]
    arrays = {t.name: narrowed(parameters[t.offset : end].reshape(t.shape), dtype) for t, end in zip(table, ends)}
    write_safetensors(path, arrays, own | {"tokenizer": tokenizer.to_json()} | ({"about": about} if about else {}))


WRITE = {"hf": save_transformers, "llama2c": llama2c.save, "gguf": llamacpp.save, "checkpoint": save_checkpoint}


def write_model(source, out, system, tokenizer_path, **options):
    """Convert a checkpoint, or the best of a run's folder, to what a system loads, a folder or a .gguf file -> its
    number of parameters."""
    if source.is_dir():
        source = source / ("best.safetensors" if (source / "best.safetensors").exists() else "last.safetensors")
    if out.exists() and (system in ("gguf", "checkpoint") or not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists{' and is not an empty folder' * (system in ('hf', 'llama2c'))}; name another")
    checkpoint, tokenizer = load_model(source, tokenizer_path)
    if checkpoint.cfg.embedding_norm and system in ("llama2c", "gguf"):
        bpe.note(FOLDED)
    if checkpoint.metadata.get("chat_template") and system == "llama2c":
        bpe.note("llama2.c reads no chat template: it is left out")
    elif checkpoint.metadata.get("chat_template"):
        options["chat_template"] = jinja_template(read_template(source, checkpoint, tokenizer))
    WRITE[system](out, checkpoint.cfg, checkpoint.parameters, tokenizer, **options)
    return len(checkpoint.parameters)


def main(argv=None):
    parser = bpe.Parser(prog="convert.py", description="Convert models of transformers to checkpoints, and back.")
    parser.add_argument("source", type=Path, nargs="?", metavar="SOURCE", help="a checkpoint, a run or a folder")
    parser.add_argument("target", type=Path, nargs="?", metavar="OUT", help="the folder or file to write")
    parser.add_argument("--out", type=Path, metavar="FILE", help="OUT, named by a flag")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument(
        "--to", choices=WRITE, help="what transformers, llama2.c or llama.cpp loads, or a smaller checkpoint"
    )
    origin = "hf: a folder of transformers (the default); hf:OWNER/REPO fetches one, and there is no SOURCE"
    direction.add_argument("--from", dest="repo", type=system, metavar="hf[:OWNER/REPO]", help=origin)
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="of a checkpoint that holds none")
    parser.add_argument("--about", metavar="TEXT", help="kept with --to checkpoint: data, authors, licence")
    dtypes = {"hf": SAVED, "gguf": llamacpp.DTYPES, "checkpoint": {"float32": 4, "bfloat16": 2}}
    parser.add_argument("--dtype", choices={**SAVED, **llamacpp.DTYPES}, help="of what is written (default float32)")
    args = parser.parse_intermixed_args(argv)
    paths = [path for path in (args.source, args.target, args.out) if path is not None]
    if len(paths) != (1 if args.repo else 2):
        parser.error(f"expected {'' if args.repo else 'SOURCE and '}one file or folder to write: OUT or --out")
    source, out = [None, *paths][-2:]
    if args.dtype and args.dtype not in (known := dtypes.get(args.to, ())):
        parser.error(f"--dtype {args.dtype}: expected {', '.join(known) or 'none with this direction'}")
    if args.about and args.to != "checkpoint":
        parser.error("--about is kept in a checkpoint alone: --to checkpoint")
    options = {name: text for name in ("dtype", "about") if (text := getattr(args, name))}
    try:
        if args.to:
            count = write_model(source, out, args.to, args.tokenizer, **options)
        else:
            count = read_hub(args.repo, out) if args.repo else read_folder(source, out)
    except OSError as error:
        parser.error(error)
    except (ValueError, RecursionError) as error:
        parser.error(error if args.repo else f"{source}: {error}")
    own = ", trust_remote_code=True" * (out / "modeling_tinygpt.py").exists()
    use = {
        "hf": f'AutoModelForCausalLM.from_pretrained("{out}"{own})',
        "llama2c": f"run {out}/model.bin -z {out}/tokenizer.bin",
        "gguf": f"llama-cli -m {out} --temp 0",
    }
    print(f"{out}: {count:,} parameters; {use.get(args.to, f'python sample.py --checkpoint {out}')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
