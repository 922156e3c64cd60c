"""Convert models of Hugging Face `transformers` to our checkpoints: GPT-2, GPT-Neo, Llama, Bloom.

    python extras/convert.py FOLDER --out model.safetensors      # config.json, *.safetensors, tokenizer.json
    python sample.py --checkpoint model.safetensors --prompt "Lily found"

The converted model computes the same logits; otherwise the conversion fails. Every field of config.json that affects
logits is either converted or rejected; the fields not named here affect only training (dropout), memory or other heads.
Every tensor is either read or known to be derived from the configuration (a mask, the frequencies of rotations).
Read in order: 1 tensors, 2 fields of config.json, 3 families, 4 the conversion, 5 command line.
"""

import codecs
import contextlib
import json
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import tinygpt
from extras.recipes import LLAMA

# == 1  tensors ========================================================================================================

ITEM_SIZES = {"BF16": 2, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}  # bytes
ITEM_SIZES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
DTYPES = tinygpt.DTYPES | {"F16": np.dtype("<f2")}
DTYPES |= {name: np.dtype([(name, f"<u{size}")]) for name, size in ITEM_SIZES.items()}  # records, so that U16 != BF16


def read_tensors(files):
    """Read .safetensors files -> {name: array as stored}. ValueError if there are none or a tensor is in two files."""
    if not files:
        raise ValueError("there is no .safetensors file; expected a model of transformers")
    tensors = {}
    for path in files:
        found = tinygpt.read_safetensors(path, DTYPES)[0]
        if twice := tensors.keys() & found:
            raise ValueError(f"tensor {min(twice)!r:.80} is in {path.name} and in another file")
        tensors |= found
    return tensors


def read_weight(name, x):
    """A tensor as float32 or float64. ValueError for other dtypes and for values not finite in float32."""
    if x.dtype == DTYPES["BF16"]:  # the upper half of a float32
        x = (x["BF16"].astype(np.uint32) << 16).view(np.float32)
    if x.dtype.kind != "f":
        found = x.dtype.names[0] if x.dtype.names else x.dtype
        raise ValueError(f"tensor {name} has dtype {found}; expected F16, BF16, F32 or F64")
    x = x.astype(np.float32) if x.dtype == np.float16 else x
    if not (np.abs(x) <= np.finfo(np.float32).max).all():
        raise ValueError(f"tensor {name} has a NaN, an infinity or a number beyond float32")
    return x


# == 2  fields of config.json ==========================================================================================

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


# == 3  families =======================================================================================================
#
# Each function returns the fields of our Config, the prefix of the tensor names, rows {our tensor: their tensors}, and
# the names of derived tensors. {} in a name stands for the layer. A row is one of: a name, for a tensor that is copied,
# (in, out); a tuple of names, for Linear weights (out, in) that are concatenated and transposed; (name, function).


def with_biases(rows, pairs):
    """Add to `rows`, for each (ours, theirs), the weight and the bias."""
    for ours, theirs in pairs:
        rows |= {f"{ours}_w": f"{theirs}.weight", f"{ours}_b": f"{theirs}.bias"}
    return rows


def gpt2(c):
    expect(c, "scale_attn_by_inverse_layer_idx", False)
    expect(c, "add_cross_attention", False)
    cfg = dict(seq_len=field(c, "n_positions", "max_position_embeddings"), width=field(c, "n_embd", "hidden_size"))
    cfg |= dict(layers=field(c, "n_layer", "num_hidden_layers"), heads=field(c, "n_head", "num_attention_heads"))
    cfg |= dict(hidden=field(c, "n_inner", default=0), norm_eps=field(c, "layer_norm_epsilon", kind=float))
    cfg |= dict(mlp=activation(c, "activation_function"))
    cfg |= dict(attention_scale=field(c, "scale_attn_weights", kind=bool, default=True))
    rows = {"embed_w": "wte.weight", "position_w": "wpe.weight"}
    pairs = (("norm1", "h.{}.ln_1"), ("qkv", "h.{}.attn.c_attn"), ("out", "h.{}.attn.c_proj"), ("norm2", "h.{}.ln_2"))
    pairs += (("up", "h.{}.mlp.c_fc"), ("down", "h.{}.mlp.c_proj"), ("norm", "ln_f"))
    return cfg, "transformer.", with_biases(rows, pairs), ("h.{}.attn.bias", "h.{}.attn.masked_bias")


def gpt_neo(c):
    L, local = field(c, "num_layers", "num_hidden_layers"), has_local_layers(c)
    cfg = dict(seq_len=field(c, "max_position_embeddings"), width=field(c, "hidden_size"), layers=L)
    cfg |= dict(heads=field(c, "num_heads", "num_attention_heads"), hidden=field(c, "intermediate_size", default=0))
    cfg |= dict(norm_eps=field(c, "layer_norm_epsilon", kind=float), mlp=activation(c, "activation_function"))
    cfg |= dict(window=field(c, "window_size") if local else 0, attention_scale=False, qkv_bias=False)
    rows = {"embed_w": "wte.weight", "position_w": "wpe.weight"}
    rows = with_biases(rows, (("norm1", "h.{}.ln_1"), ("norm2", "h.{}.ln_2"), ("norm", "ln_f")))
    attention = "h.{}.attn.attention."
    rows |= {"qkv_w": tuple(f"{attention}{x}_proj.weight" for x in "qkv"), "out_w": (f"{attention}out_proj.weight",)}
    rows |= {"up_w": ("h.{}.mlp.c_fc.weight",), "down_w": ("h.{}.mlp.c_proj.weight",)}
    rows |= {"out_b": f"{attention}out_proj.bias", "up_b": "h.{}.mlp.c_fc.bias", "down_b": "h.{}.mlp.c_proj.bias"}
    return cfg, "transformer.", rows, (f"{attention}bias", f"{attention}masked_bias")


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
    layer = "layers.{}."
    rows = {"embed_w": "embed_tokens.weight", "norm_w": "norm.weight"}
    rows |= {"norm1_w": layer + "input_layernorm.weight", "norm2_w": layer + "post_attention_layernorm.weight"}
    for ours, names in (("qkv", ("q", "k", "v")), ("out", ("o",))):
        for end, word in (("w", "weight"), ("b", "bias")):
            rows[f"{ours}_{end}"] = tuple(f"{layer}self_attn.{x}_proj.{word}" for x in names)
    for ours, names in (("up", ("gate", "up")), ("down", ("down",))):
        for end, word in (("w", "weight"), ("b", "bias")):
            rows[f"{ours}_{end}"] = tuple(f"{layer}mlp.{x}_proj.{word}" for x in names)
    return cfg, "model.", rows, (f"{layer}self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")


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

    def by_kind(x):  # (H, 3, D) -> (3, H, D) along the first axis: q of all heads, then k, then v
        return x.reshape(H, 3, C // H, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    layer = "h.{}."
    pairs = (("embed_norm", "word_embeddings_layernorm"), ("norm1", layer + "input_layernorm"), ("norm", "ln_f"))
    rows = with_biases({"embed_w": "word_embeddings.weight"}, (*pairs, ("norm2", layer + "post_attention_layernorm")))
    qkv = layer + "self_attention.query_key_value."
    rows |= {"qkv_w": (qkv + "weight", lambda x: by_kind(x).T), "qkv_b": (qkv + "bias", by_kind)}
    for ours, theirs in (("out", "self_attention.dense"), ("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h")):
        rows |= {f"{ours}_w": (f"{layer}{theirs}.weight",), f"{ours}_b": f"{layer}{theirs}.bias"}
    return cfg, "transformer.", rows, ()


FAMILIES = {"gpt2": gpt2, "gpt_neo": gpt_neo, "llama": llama, "bloom": bloom}

# == 4  the conversion =================================================================================================


def from_transformers(config, tensors):
    """config.json (a dict) and tensors (name -> array) -> flat parameters (count,) and our Config.

    ValueError for a family, field, tensor or shape that cannot be converted.
    """
    if not isinstance(config, dict):
        raise ValueError(f"config.json is a {type(config).__name__}; expected an object")
    family = field(config, "model_type", kind=str)
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r:.80}; expected one of {', '.join(FAMILIES)}")
    for name, known in (("is_causal", True), ("is_encoder_decoder", False), ("pruned_heads", {}), ("auto_map", {})):
        expect(config, name, known)
    expect(config, "quantization_config")
    fields, prefix, rows, derived = FAMILIES[family](config)
    used = set()

    def read(name, layer=0):
        for full in both_names(name, prefix, layer):
            if full in tensors:
                used.add(full)
                return read_weight(full, tensors[full])
        raise ValueError(f"tensor {name.format(layer)} is missing")

    rows["head_w"] = "lm_head.weight"
    tied = field(config, "tie_word_embeddings", kind=bool, default=family != "llama")
    if tied and "lm_head.weight" in tensors:  # as in transformers: not tied if both are stored and differ
        tied = np.array_equal(read("lm_head.weight"), read(rows["embed_w"]))
    cfg, parts = tinygpt.Config(vocab_size=field(config, "vocab_size"), tied=tied, **fields), []
    for t in tinygpt.layout(cfg):
        shape, row = t.shape[1:] if t.layered else t.shape, rows[t.name]
        for layer in range(cfg.layers if t.layered else 1):
            names = [row] if isinstance(row, str) else [name for name in row if not callable(name)]
            found, x = [read(name, layer) for name in names], None
            with contextlib.suppress(ValueError):  # shapes that do not match
                x = combine(row, found)
            if x is None or x.shape != shape:
                theirs = ", ".join(f"{name.format(layer)} {y.shape}" for name, y in zip(names, found))
                raise ValueError(f"tensor {theirs} does not give {t.name}; expected {shape}")
            parts.append(np.ascontiguousarray(x).reshape(-1))
    used |= {full for name in derived for layer in range(cfg.layers) for full in both_names(name, prefix, layer)}
    if unread := sorted(tensors.keys() - used):
        more = f" and {len(unread) - 1} more" if unread[1:] else ""
        raise ValueError(f"tensor {unread[0]!r:.80}{more}: not part of the {family} model that config.json describes")
    return np.concatenate(parts), cfg


def combine(row, found):
    """Our tensor from the tensors that a row names."""
    if isinstance(row, str):
        return found[0]
    return row[-1](found[0]) if callable(row[-1]) else np.concatenate(found).T


def both_names(name, prefix, layer):
    """The two possible names of a tensor: in a model with a head and in one without."""
    return (prefix + name).format(layer), name.format(layer)


# == 5  models of llama2.c =============================================================================================
#
# sample.py and others read such a file as it is: a checkpoint of ours made from it in memory.


def load_llama2c(path):
    """A `Checkpoint` without a tokenizer from a model file of llama2.c, version 0. ValueError if the file is not one or
    holds NaN or infinity.

    Seven int32, C F L H G V T (V negative: the head has a matrix of its own), then float32 tensors, (out, in).
    https://github.com/karpathy/llama2.c
    """
    with open(path, "rb") as f:
        size, head = os.fstat(f.fileno()).st_size, f.read(28)
    if len(head) < 28:
        raise ValueError(f"{path} is not a model of llama2.c: it has {size} bytes")
    C, F, L, H, G, V, T = struct.unpack("<7i", head)
    if min(C, F, L, H, G, abs(V), T) < 1 or max(C, F, L, H, G, abs(V), T) >= 2**24 or C % H or C // H % 2 or H % G:
        raise ValueError(f"{path} is not a model of llama2.c: its first numbers are no shape")
    D, tied, V = C // H, V > 0, abs(V)
    shapes = {"embed_w": (V, C), "norm1_w": (L, C), "q": (L, C, C), "k": (L, G * D, C), "v": (L, G * D, C)}
    shapes |= {"out_w": (L, C, C), "norm2_w": (L, C), "gate": (L, F, C), "down_w": (L, C, F), "value": (L, F, C)}
    shapes |= {"norm_w": (C,), "cos": (T, D // 2), "sin": (T, D // 2)} | ({} if tied else {"head_w": (V, C)})
    if size != (expected := 28 + 4 * sum(map(math.prod, shapes.values()))):
        raise ValueError(f"{path} is not a model of llama2.c: it has {size} bytes, its shape asks for {expected}")
    data, x, offset = Path(path).read_bytes(), {}, 28
    for name, shape in shapes.items():
        x[name] = np.frombuffer(data, "<f4", math.prod(shape), offset).reshape(shape)
        offset += x[name].nbytes
    for name in ("q", "k", "v", "out_w", "gate", "down_w", "value"):
        x[name] = x[name].swapaxes(1, 2)  # (L, in, out)
    x |= {"qkv_w": np.concatenate([x["q"], x["k"], x["v"]], 2), "up_w": np.concatenate([x["gate"], x["value"]], 2)}
    shape = dict(vocab_size=V, seq_len=T, width=C, layers=L, heads=H, kv_heads=G, hidden=F, tied=tied)
    cfg = tinygpt.Config(**LLAMA, **shape)
    tensors = {t.name: x[t.name] for t in tinygpt.layout(cfg)}
    tinygpt.check_finite(path, tensors)
    parameters = np.concatenate([tensor.reshape(-1) for tensor in tensors.values()])
    return tinygpt.Checkpoint(parameters, cfg, "", {}, {"format": "llama2.c", "version": "0"})


# == 6  command line ===================================================================================================


def main(argv=None):
    parser = bpe.Parser(prog="convert.py", description="Convert a model of transformers to a checkpoint.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="config.json, *.safetensors and tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the checkpoint to write")
    args = parser.parse_args(argv)
    config_path, tokenizer_path = args.folder / "config.json", args.folder / "tokenizer.json"
    try:
        config = read_config(config_path)
        tokenizer = bpe.Tokenizer.load(tokenizer_path)
        files = sorted(args.folder.glob("*.safetensors"))
        if args.out.exists() and any(args.out.samefile(path) for path in (config_path, tokenizer_path, *files)):
            raise ValueError(f"--out {args.out} is a file of the model to convert; name another")
        parameters, cfg = from_transformers(config, read_tensors(files))
        if tokenizer.vocab_size > cfg.vocab_size:
            raise ValueError(f"tokenizer.json has {tokenizer.vocab_size} tokens; expected at most V={cfg.vocab_size}")
        tinygpt.save_checkpoint(args.out, parameters.astype(np.float32), cfg, tokenizer.to_json())
    except OSError as error:
        parser.error(error)
    except (ValueError, RecursionError) as error:
        parser.error(f"{args.folder}: {error}")
    print(f"{args.out}: {len(parameters):,} parameters; python sample.py --checkpoint {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
