"""Tensors under the names of other systems: our parameters from them, and them from our parameters.

    parameters, left = parameters_from(cfg, tensors, TABLES["llama"])     # {name: array} -> flat (count,)
    tensors = tensors_from(cfg, parameters, TABLES["llama"])              # and back, exactly

A table says for each of our tensors (the names of `layout`, tinygpt.py section 1.2) which tensors of theirs hold it.
Read in order: 1 the tables, 2 both directions, 3 files of tensors and their dtypes.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tinygpt

# == 1  tables =========================================================================================================


class Row(NamedTuple):
    """The tensors that hold one of ours. {} in a name is the layer. Of several names each has some of our columns."""

    names: tuple
    transposed: bool = False  # theirs is (out, in), ours (in, out)
    columns: Callable | None = None  # Config -> (columns,), the number of our column for each of theirs


def copied(ours, name):
    """{our tensor: the one that it equals}."""
    return {ours: Row((name,))}


def linear(ours, *names, transposed=True, columns=None):
    """Weight and bias of one of our linear layers, whose columns are those of one or more of theirs."""
    weight = Row(tuple(f"{name}.weight" for name in names), transposed, columns)
    return {f"{ours}_w": weight, f"{ours}_b": Row(tuple(f"{name}.bias" for name in names), False, columns)}


def norm(ours, name):
    """Gain and bias of a norm."""
    return copied(f"{ours}_w", f"{name}.weight") | copied(f"{ours}_b", f"{name}.bias")


def grouped_by_head(cfg):
    """Bloom's columns are q, k and v of the first head, then those of the next; ours q of all heads, then k, then v."""
    return np.arange(cfg.qkv_width).reshape(3, cfg.heads, cfg.head_width).swapaxes(0, 1).reshape(-1)


def halves(D):
    """(D,): pairs of neighbours as pairs D/2 apart: 0, 2, 4, ..., 1, 3, 5, ..."""
    return np.arange(D).reshape(D // 2, 2).T.reshape(-1)


def neighbours(D):
    """(D,): pairs D/2 apart as pairs of neighbours: 0, D/2, 1, D/2 + 1, ..."""
    return np.arange(D).reshape(2, D // 2).T.reshape(-1)


def reordered_pairs(cfg, order):
    """The columns of qkv with those of each head of q and k in another order, which changes no score."""
    columns = np.arange(cfg.qkv_width).reshape(-1, cfg.head_width)  # (H + 2 G, D)
    turned = cfg.heads + cfg.kv_heads
    return np.concatenate([columns[:turned, order(cfg.head_width)], columns[turned:]]).reshape(-1)


def llama_table(rope=None, **names):
    """The table of a model with Llama's parts; `rope` orders the columns of q and k."""
    q, k, v, out, gate, value, down = (f"{names['layer']}{part}" for part in names["linears"])
    table = linear("qkv", q, k, v, columns=rope) | linear("out", out)
    table |= linear("up", gate, value) | linear("down", down) | copied("head_w", "lm_head.weight")
    for ours, theirs in zip(("norm1", "norm2"), names["norms"]):
        table |= norm(ours, names["layer"] + theirs)
    return table | copied("embed_w", names["embed"]) | norm("norm", names["norm"])


HF = {  # Llama and Qwen3 of transformers
    "layer": "layers.{}.",
    "linears": [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")],
    "norms": ("input_layernorm", "post_attention_layernorm"),
    "embed": "embed_tokens.weight",
    "norm": "norm",
}
CS336 = {  # the reference of assignment 1 of Stanford's course; pairs are neighbours
    "layer": "layers.{}.",
    "linears": [f"attn.{x}_proj" for x in ("q", "k", "v", "output")] + [f"ffn.w{i}" for i in (1, 3, 2)],
    "norms": ("ln1", "ln2"),
    "embed": "token_embeddings.weight",
    "norm": "ln_final",
}
GPT2 = (("norm1", "ln_1"), ("qkv", "attn.c_attn"), ("out", "attn.c_proj"))
GPT2 += (("norm2", "ln_2"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj"))
BLOOM = (("out", "self_attention.dense"), ("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h"))


def qk_norms(q, k):
    return copied("q_norm_w", q) | copied("k_norm_w", k)


def make_tables():
    """{system: {our tensor: Row}}."""
    head, tables = copied("head_w", "lm_head.weight"), {}
    table = head | norm("norm", "ln_f") | copied("embed_w", "wte.weight") | copied("position_w", "wpe.weight")
    tables["gpt2"] = dict(table)
    for ours, theirs in GPT2:  # its matrices are (in, out) too
        tables["gpt2"] |= linear(ours, f"h.{{}}.{theirs}", transposed=False)
    tables["gpt_neo"] = table | norm("norm1", "h.{}.ln_1") | norm("norm2", "h.{}.ln_2")
    tables["gpt_neo"] |= linear("qkv", *(f"h.{{}}.attn.attention.{x}_proj" for x in "qkv"))
    tables["gpt_neo"] |= linear("out", "h.{}.attn.attention.out_proj")
    tables["gpt_neo"] |= linear("up", "h.{}.mlp.c_fc") | linear("down", "h.{}.mlp.c_proj")
    tables["bloom"] = head | norm("norm", "ln_f") | norm("embed_norm", "word_embeddings_layernorm")
    tables["bloom"] |= copied("embed_w", "word_embeddings.weight")
    tables["bloom"] |= norm("norm1", "h.{}.input_layernorm") | norm("norm2", "h.{}.post_attention_layernorm")
    tables["bloom"] |= linear("qkv", "h.{}.self_attention.query_key_value", columns=grouped_by_head)
    for ours, theirs in BLOOM:
        tables["bloom"] |= linear(ours, f"h.{{}}.{theirs}")
    qwen = qk_norms("layers.{}.self_attn.q_norm.weight", "layers.{}.self_attn.k_norm.weight")
    tables["llama"], tables["qwen3"] = llama_table(**HF), llama_table(**HF) | qwen
    return tables | {"cs336": llama_table(**CS336)}


TABLES = make_tables()


def with_order(table, order):
    """The table with the pairs that positions rotate in another order."""
    found = {"qkv": lambda cfg: reordered_pairs(cfg, order)}
    found |= dict.fromkeys(("q_norm", "k_norm"), lambda cfg: order(cfg.head_width))
    kinds = {ours: ours.rpartition("_")[0] for ours in table}
    return {ours: row._replace(columns=found.get(kinds[ours], row.columns)) for ours, row in table.items()}


def with_halves(table):
    """The table of a family whose pairs are D/2 apart, for a model of ours whose pairs are neighbours."""
    return with_order(table, halves)


def with_neighbours(table):
    """The table of a family whose pairs are neighbours, for a model of ours whose pairs are D/2 apart."""
    return with_order(table, neighbours)


# == 2  both directions ================================================================================================


def parameters_from(cfg, tensors, rows):
    """{their name: array} -> flat parameters (count,), the names of the tensors that no row reads.

    ValueError if a tensor is missing, has another shape or dtype, or holds a number that float32 has not.
    """
    parts, used = [], set()
    for t in tinygpt.layout(cfg):
        shape, row = t.shape[1:] if t.layered else t.shape, rows.get(t.name)
        if row is None:
            raise ValueError(f"these tensors have no {t.name}, which this model has")
        for layer in range(cfg.layers if t.layered else 1):
            names = [name.format(layer) for name in row.names]
            if missing := [name for name in names if name not in tensors]:
                raise ValueError(f"tensor {missing[0]} is missing")
            found = [read_weight(name, tensors[name]) for name in names]
            if (x := join(found, row, cfg)) is None or x.shape != shape:
                theirs = ", ".join(f"{name} {y.shape}" for name, y in zip(names, found))
                raise ValueError(f"tensor {theirs} does not give {t.name}; expected {shape}")
            used |= {*names}
            parts.append(np.ascontiguousarray(x).reshape(-1))
    return np.concatenate(parts), sorted(tensors.keys() - used)


def join(found, row, cfg):
    """Our tensor from those of a row; None if their shapes do not match."""
    try:
        x = found[0] if len(found) == 1 else np.concatenate(found, 0 if row.transposed else -1)
        x = x.T if row.transposed else x
        return x if row.columns is None else x[..., np.argsort(row.columns(cfg))]
    except (ValueError, IndexError):
        return None


def tensors_from(cfg, parameters, rows):
    """Flat parameters (count,) -> {their name: array}; views where nothing is reordered. The inverse of
    `parameters_from`. ValueError if the model has a tensor that the table has no row for."""
    widths = {"qkv": np.array([cfg.heads, cfg.kv_heads, cfg.kv_heads]) * cfg.head_width, "up": [cfg.hidden] * 2}
    tensors = {}
    for t in tinygpt.layout(cfg):
        if t.name not in rows:
            raise ValueError(f"the other format has no tensor for {t.name}, which this model has")
        row, (kind, _, _) = rows[t.name], t.name.rpartition("_")
        whole = parameters[t.offset : t.offset + np.prod(t.shape, dtype=int)].reshape(t.shape)
        for layer, x in enumerate(whole if t.layered else whole[None]):
            x = x if row.columns is None else x[..., row.columns(cfg)]
            cuts = np.cumsum(widths[kind][:-1]) if len(row.names) > 1 else []
            for name, part in zip(row.names, np.split(x, cuts, -1)):
                tensors[name.format(layer)] = part.T if row.transposed else part
    return tensors


def fold_embedding_norm(cfg, parameters):
    """A model with a norm after the embedding -> (the same without, parameters), the input table normed and the head's
    matrix apart. Exact: without position rows that norm sees nothing but the rows of the table.

    ValueError for a model with learned positions, whose norm sees sums of two rows.
    """
    if cfg.positions == "learned":
        raise ValueError("a norm after the embedding with positions=learned has no place in the other format")
    p = {t.name: parameters[t.offset : t.offset + np.prod(t.shape, dtype=int)] for t in tinygpt.layout(cfg)}
    table = p["embed_w"].reshape(cfg.vocab_size, cfg.width)
    norm = tinygpt.OPS["numpy"].norms[cfg.norm]
    folded = norm.forward(table, p.get("embed_norm_w"), p.get("embed_norm_b"), cfg.norm_eps)[0]
    without = cfg.changed(embedding_norm=False, tied=False)
    p |= {"head_w": p["embed_w"] if cfg.tied else p["head_w"], "embed_w": folded.reshape(-1)}
    return without, np.concatenate([p[t.name] for t in tinygpt.layout(without)])


IGNORED = ("embed_dropout", "attention_dropout", "out_dropout", "mlp_dropout", "init")  # fields that change no logit


def normal_form(cfg):
    """The fields of a Config that change logits; pairs of neighbours and pairs D/2 apart differ in the order of weights
    alone, learned positions end where their table does."""
    cfg = cfg.changed(positions="rope-half") if cfg.positions == "rope" else cfg
    cfg = cfg.changed(seq_len=cfg.position_rows) if cfg.positions == "learned" else cfg
    return {name: value for name, value in asdict(cfg).items() if name not in IGNORED}


def find_equal(cfg, candidates, none):
    """The name of the first of {name: function that returns the fields of a Config} that computes what `cfg` computes.

    ValueError that begins with `none` if there is none: the fields in which the closest differs, with both values.
    """
    closest = refused = None
    for name, fields in candidates.items():
        try:
            different = differences(cfg, tinygpt.Config(**fields()))
        except (
            ValueError
        ) as error:  # it has no model with such fields, such as a width that is no multiple of its heads
            refused = error
            continue
        if not different:
            return name
        if closest is None or len(different) < len(closest[1]):
            closest = name, different
    differs = f"{closest[0]} differs in {', '.join(closest[1])}" if closest else str(refused)
    raise ValueError(f"{none}; {differs}")


def differences(cfg, other):
    """["field=value (expected value)", ...] where a model and what another system computes differ."""
    wanted, found = normal_form(cfg), normal_form(other)
    names = [name for name in wanted if wanted[name] != found[name]]
    wanted["positions"] = cfg.positions
    return [f"{name}={wanted[name]} (expected {found[name]})" for name in names]


# == 3  files of tensors, dtypes =======================================================================================

ITEM_SIZES = {"BF16": 2, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}  # bytes
ITEM_SIZES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
DTYPES = tinygpt.DTYPES | {"F16": np.dtype("<f2")}
DTYPES |= {name: np.dtype([(name, f"<u{size}")]) for name, size in ITEM_SIZES.items()}  # records, so that U16 != BF16


SAVED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # name in torch -> in a file


def narrowed(x, dtype):
    """Floats as an array of a dtype of SAVED, rounded to nearest even. ValueError for a number beyond its range."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "float32":
        return x
    with np.errstate(over="ignore"):
        bits = x.view(np.uint32)
        upper = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        found = upper.view(DTYPES["BF16"]) if dtype == "bfloat16" else x.astype(np.float16)
    exact = (upper.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else found
    if not np.isfinite(exact).all():
        raise ValueError(f"a number is {np.abs(x).max():.3g}, beyond {dtype}; write --dtype float32")
    return found


def read_safetensors(file):
    """A path or a binary file object -> ({name: array as stored}, metadata)."""
    if not hasattr(file, "read"):
        return tinygpt.read_safetensors(file, DTYPES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.safetensors"
        path.write_bytes(file.read())
        return tinygpt.read_safetensors(path, DTYPES)


def write_safetensors(file, tensors, metadata):
    """Write {name: array of one of DTYPES} to a path or a binary file object."""
    if not hasattr(file, "write"):
        return tinygpt.write_safetensors(file, tensors, metadata, DTYPES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.safetensors"
        tinygpt.write_safetensors(path, tensors, metadata, DTYPES)
        file.write(path.read_bytes())


def files_of_tensors(folder):
    """The .safetensors files in a folder, sorted; where there are none the pickles pytorch_model*.bin."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def read_tensors(files):
    """Read files of tensors -> {name: array as stored}. ValueError if there are none or a tensor is in two files."""
    if not files:
        raise ValueError("there is no .safetensors file and no pytorch_model.bin; expected a model of transformers")
    tensors = {}
    for path in files:
        found = read_pickle(path) if path.suffix == ".bin" else read_safetensors(path)[0]
        if twice := tensors.keys() & found:
            raise ValueError(f"tensor {min(twice)!r:.80} is in {path.name} and in another file")
        tensors |= found
    return tensors


SAFE = (2, 6)  # of torch: before, weights_only could be made to run code (CVE-2025-32434)


def read_pickle(path):
    """A file of torch.save -> {name: array}; nothing in it is executed. ValueError without PyTorch, and for a file that
    holds anything but tensors."""
    try:
        import torch
    except ImportError:
        use = "convert it to .safetensors, or pip install torch: without it no pickle is read"
        raise ValueError(f"{path.name} is a pickle; {use}") from None
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < SAFE:
        raise ValueError(f"{path.name} is a pickle; PyTorch {torch.__version__} may execute it: expected 2.6 or newer")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever its unpickler stumbles over
        kind = type(error).__name__
        raise ValueError(f"{path.name} is not a file of tensors alone: torch.load refuses it ({kind})") from None
    for name, x in found.items() if isinstance(found, dict) else [("the whole", found)]:
        if type(name) is not str or not isinstance(x, torch.Tensor) or x.layout != torch.strided or x.is_meta:
            raise ValueError(f"{path.name}: {name!r:.80} is a {type(x).__name__}; expected {{name: tensor}}")
    return {name: as_array(x.detach()) for name, x in found.items()}


def as_array(x):
    """A tensor of PyTorch as an array of the same numbers."""
    if str(x.dtype) == "torch.bfloat16":
        x = x.float()  # NumPy has none
    return x.numpy()


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
