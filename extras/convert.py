"""Models of Hugging Face `transformers` as ours: GPT-2, GPT-Neo, Llama, Bloom.

    python extras/convert.py FOLDER --out model.safetensors      # config.json, model.safetensors, tokenizer.json
    python sample.py --checkpoint model.safetensors --prompt "Lily found"

A family is a function from its configuration to ours and a table from our tensors to its names (section 2).
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import sample
import tinygpt

# == 1  files ==========================================================================================================

DTYPES = tinygpt.DTYPES | {"F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def read_tensors(folder):
    """name -> float32 or float64 array, of every .safetensors file of a folder. ValueError if there is none."""
    files, tensors = sorted(Path(folder).glob("*.safetensors")), {}
    if not files:
        raise ValueError(f"{folder} has no .safetensors file; expected a model of transformers")
    for path in files:
        for name, x in tinygpt.read_safetensors(path, DTYPES)[0].items():
            if x.dtype == DTYPES["BF16"]:  # the upper half of a float32
                x = (x.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = x.astype(np.float32) if x.dtype == np.float16 else x
    return tensors


# == 2  families =======================================================================================================
#
# Each returns the fields of our Config, the prefix of its names, and rows {our tensor: how to make it}, {} the layer.
# A row is a name, taken as it is (in, out); a tuple of names of Linear weights (out, in), transposed and put side by
# side; or a name and a function.

GELUS = {"gelu": "gelu", "gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh", "silu": "silu"}


def with_biases(rows, pairs):
    """rows and, for each (ours, theirs), gain or matrix and bias under the names of both."""
    for ours, theirs in pairs:
        rows |= {f"{ours}_w": f"{theirs}.weight", f"{ours}_b": f"{theirs}.bias"}
    return rows


def gpt2(c):
    cfg = dict(seq_len=c["n_positions"], width=c["n_embd"], layers=c["n_layer"], heads=c["n_head"])
    cfg |= dict(hidden=c.get("n_inner") or 0, norm_eps=c["layer_norm_epsilon"], mlp=GELUS[c["activation_function"]])
    rows = {"embed_w": "wte.weight", "position_w": "wpe.weight"}
    pairs = (("norm1", "h.{}.ln_1"), ("qkv", "h.{}.attn.c_attn"), ("out", "h.{}.attn.c_proj"), ("norm2", "h.{}.ln_2"))
    pairs += (("up", "h.{}.mlp.c_fc"), ("down", "h.{}.mlp.c_proj"), ("norm", "ln_f"))
    return cfg, "transformer.", with_biases(rows, pairs)


def gpt_neo(c):
    local = [kind == "local" for kind in attention_kinds(c)]
    if local not in ([False] * len(local), [i % 2 == 1 for i in range(len(local))]):
        raise ValueError("its layers do not alternate between global and local attention")
    cfg = dict(seq_len=c["max_position_embeddings"], width=c["hidden_size"], layers=c["num_layers"])
    cfg |= dict(heads=c["num_heads"], hidden=c.get("intermediate_size") or 0, norm_eps=c["layer_norm_epsilon"])
    cfg |= dict(window=c["window_size"] if any(local) else 0, attention_scale=False, qkv_bias=False)
    cfg |= dict(mlp=GELUS[c["activation_function"]])
    rows = {"embed_w": "wte.weight", "position_w": "wpe.weight"}
    rows = with_biases(rows, (("norm1", "h.{}.ln_1"), ("norm2", "h.{}.ln_2"), ("norm", "ln_f")))
    attention = "h.{}.attn.attention."
    rows |= {"qkv_w": tuple(f"{attention}{x}_proj.weight" for x in "qkv"), "out_w": (f"{attention}out_proj.weight",)}
    rows |= {"up_w": ("h.{}.mlp.c_fc.weight",), "down_w": ("h.{}.mlp.c_proj.weight",)}
    rows |= {"out_b": f"{attention}out_proj.bias", "up_b": "h.{}.mlp.c_fc.bias", "down_b": "h.{}.mlp.c_proj.bias"}
    return cfg, "transformer.", rows


def attention_kinds(c):
    """One of global and local for each layer: attention_types is [[kinds, how often], ...]."""
    return [kind for kinds, times in c["attention_types"] for _ in range(times) for kind in kinds]


def llama(c):
    if c.get("hidden_act", "silu") != "silu":
        raise ValueError(f"its MLP has a gate with {c['hidden_act']}; expected silu")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"its rotations are scaled ({rope}); expected plain ones")
    theta = c.get("rope_theta") or rope.get("rope_theta") or 10000.0
    cfg = dict(seq_len=c["max_position_embeddings"], width=c["hidden_size"], layers=c["num_hidden_layers"])
    cfg |= dict(
        heads=c["num_attention_heads"], kv_heads=c.get("num_key_value_heads") or 0, hidden=c["intermediate_size"]
    )
    cfg |= dict(head_width=c.get("head_dim") or 0, norm="rmsnorm", norm_eps=c["rms_norm_eps"], positions="rope-half")
    cfg |= dict(rope_theta=float(theta), mlp="swiglu", tied=c.get("tie_word_embeddings", False))
    attention_bias, mlp_bias = c.get("attention_bias", False), c.get("mlp_bias", False)
    cfg |= dict(qkv_bias=attention_bias, out_bias=attention_bias, up_bias=mlp_bias, down_bias=mlp_bias)
    layer = "layers.{}."
    rows = {"embed_w": "embed_tokens.weight", "norm_w": "norm.weight", "head_w": "lm_head.weight"}
    rows |= {"norm1_w": layer + "input_layernorm.weight", "norm2_w": layer + "post_attention_layernorm.weight"}
    for ours, names in (("qkv", ("q", "k", "v")), ("out", ("o",))):
        for end, word in (("w", "weight"), ("b", "bias")):
            rows[f"{ours}_{end}"] = tuple(f"{layer}self_attn.{x}_proj.{word}" for x in names)
    for ours, names in (("up", ("gate", "up")), ("down", ("down",))):
        for end, word in (("w", "weight"), ("b", "bias")):
            rows[f"{ours}_{end}"] = tuple(f"{layer}mlp.{x}_proj.{word}" for x in names)
    return cfg, "model.", rows


def bloom(c):
    H, C = c.get("n_head") or c["num_attention_heads"], c.get("hidden_size") or c["n_embed"]
    cfg = dict(seq_len=c.get("seq_length", 2048), width=C, layers=c.get("n_layer") or c["num_hidden_layers"], heads=H)
    cfg |= dict(positions="alibi", embedding_norm=True, norm_eps=c["layer_norm_epsilon"])

    def by_kind(x):  # rows or elements of q, k and v of each head -> q of every head, then k, then v
        return x.reshape(H, 3, C // H, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    layer = "h.{}."
    pairs = (("embed_norm", "word_embeddings_layernorm"), ("norm1", layer + "input_layernorm"), ("norm", "ln_f"))
    rows = with_biases({"embed_w": "word_embeddings.weight"}, (*pairs, ("norm2", layer + "post_attention_layernorm")))
    qkv = layer + "self_attention.query_key_value."
    rows |= {"qkv_w": (qkv + "weight", lambda x: by_kind(x).T), "qkv_b": (qkv + "bias", by_kind)}
    for ours, theirs in (("out", "self_attention.dense"), ("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h")):
        rows |= {f"{ours}_w": (f"{layer}{theirs}.weight",), f"{ours}_b": f"{layer}{theirs}.bias"}
    return cfg, "transformer.", rows


FAMILIES = {"gpt2": gpt2, "gpt_neo": gpt_neo, "llama": llama, "bloom": bloom}


def from_transformers(config, tensors):
    """Their configuration (a dict) and tensors (name -> array) -> parameters, flat (count,), and our Config.

    ValueError if the family, a tensor or a shape is not one that we know.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"it is a {family} model; expected one of {', '.join(FAMILIES)}")
    fields, prefix, rows = FAMILIES[family](config)
    cfg, parts = tinygpt.Config(vocab_size=config["vocab_size"], **fields), []

    def read(name):
        for known in (prefix + name, name):
            if known in tensors:
                return tensors[known]
        raise ValueError(f"tensor {prefix + name} is missing")

    for t in tinygpt.layout(cfg):
        shape, row = t.shape[1:] if t.layered else t.shape, rows[t.name]
        for layer in range(cfg.layers if t.layered else 1):
            if isinstance(row, str):
                x = read(row.format(layer))
            elif callable(row[-1]):
                x = row[1](read(row[0].format(layer)))
            else:
                x = np.concatenate([read(name.format(layer)) for name in row]).T
            if x.shape != shape:
                raise ValueError(f"{t.name} of layer {layer} is {x.shape}; expected {shape}")
            parts.append(np.ascontiguousarray(x).reshape(-1))
    return np.concatenate(parts), cfg


# == 3  command line ===================================================================================================


def main(argv=None):
    parser = sample.Parser(prog="convert.py", description="A model of transformers as one of ours.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="config.json, *.safetensors and tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the checkpoint to write")
    args = parser.parse_args(argv)
    try:
        config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = bpe.Tokenizer.load(args.folder / "tokenizer.json").to_json()
        parameters, cfg = from_transformers(config, read_tensors(args.folder))
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
            parameters = parameters.astype(np.float32)
        if bad := tinygpt.first_non_finite(parameters, cfg):
            raise ValueError(f"tensor {bad} holds NaN or infinity as float32; download or convert the model again")
        tinygpt.save_checkpoint(args.out, parameters, cfg, tokenizer)
    except OSError as error:
        parser.error(error)
    except (ValueError, KeyError) as error:
        parser.error(f"{args.folder}: {error}")
    print(f"{args.out}: {len(parameters):,} parameters; python sample.py --checkpoint {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
