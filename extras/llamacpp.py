"""Models for llama.cpp: one .gguf file with the weights and the tokenizer.

    python extras/convert.py --to gguf runs/mine OUT.gguf                  # llama-cli -m OUT.gguf --temp 0
    python extras/convert.py --to gguf runs/mine OUT.gguf --dtype q8_0     # float32 (the default), float16, q8_0

Models of the shapes of Llama, Qwen3 and GPT-2. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
Read in order: 1 architectures, 2 metadata, 3 tensors, 4 the file.
"""

import struct

import numpy as np

import bpe
import tinygpt
from extras.formats import CL100K_JSON, UNKNOWN, SpacedTokenizer
from extras.recipes import LLAMA
from extras.tensors import (
    copied,
    find_equal,
    fold_embedding_norm,
    linear,
    llama_table,
    narrowed,
    norm,
    qk_norms,
    tensors_from,
    with_halves,
    with_neighbours,
)
from sample import never_drawn

# == 1  architectures ==================================================================================================

NAMES = {
    "layer": "blk.{}.",
    "linears": [f"attn_{x}" for x in ("q", "k", "v", "output")] + [f"ffn_{x}" for x in ("gate", "up", "down")],
    "norms": ("attn_norm", "ffn_norm"),
    "embed": "token_embd.weight",
    "norm": "output_norm",
}
OUTPUT = copied("head_w", "output.weight")
GPT2 = copied("embed_w", "token_embd.weight") | copied("position_w", "position_embd.weight") | OUTPUT
GPT2 |= norm("norm", "output_norm") | norm("norm1", "blk.{}.attn_norm") | norm("norm2", "blk.{}.ffn_norm")
for ours, theirs in (("qkv", "attn_qkv"), ("out", "attn_output"), ("up", "ffn_up"), ("down", "ffn_down")):
    GPT2 |= linear(ours, f"blk.{{}}.{theirs}")
LLAMA_TABLE = llama_table(**NAMES) | OUTPUT
TABLES = {"gpt2": GPT2, "llama": LLAMA_TABLE}
TABLES["qwen3"] = LLAMA_TABLE | qk_norms("blk.{}.attn_q_norm.weight", "blk.{}.attn_k_norm.weight")

SHAPE = ("vocab_size", "seq_len", "width", "layers", "heads", "hidden", "norm_eps", "tied")  # fields in the metadata
HEADS = ("kv_heads", "head_width", "rope_theta")
BIASES = ("qkv_bias", "out_bias", "up_bias", "down_bias")  # llama.cpp looks which are there
COMPUTED = {  # architecture -> (further fields in the metadata, those that every model of it has)
    "gpt2": (("position_rows",), {}),
    "llama": (HEADS + BIASES, {name: value for name, value in LLAMA.items() if name not in BIASES}),
    "qwen3": (HEADS, LLAMA | dict(qk_norm=True)),
}


def architecture(cfg):
    """The architecture of llama.cpp that computes what a model with this `Config` computes. ValueError if there is
    none: the fields in which the closest differs."""

    def fields_of(more, fixed):
        return lambda: {name: getattr(cfg, name) for name in SHAPE + more} | fixed

    candidates = {name: fields_of(*computed) for name, computed in COMPUTED.items()}
    return find_equal(cfg, candidates, "llama.cpp has no architecture for this model")


# == 2  metadata =======================================================================================================

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # numbers of types in the file
NORMAL, UNKNOWN_TOKEN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # types of tokens
PRE = {None: "gpt-2", CL100K_JSON: "dbrx"}  # split patterns; None: GPT-2's
PACKED = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}


def model_metadata(cfg, name):
    """{key: (type, value)} of an architecture."""
    D, eps = cfg.head_width, "layer_norm_epsilon" if name == "gpt2" else "layer_norm_rms_epsilon"
    found = {"context_length": cfg.position_rows if name == "gpt2" else cfg.seq_len, "embedding_length": cfg.width}
    found |= {"block_count": cfg.layers, "feed_forward_length": cfg.hidden, "attention.head_count": cfg.heads}
    found |= {"attention.head_count_kv": cfg.kv_heads}
    if name != "gpt2":
        found |= {"attention.key_length": D, "attention.value_length": D, "rope.dimension_count": D}
    values = {key: (UINT32, value) for key, value in found.items()} | {f"attention.{eps}": (FLOAT32, cfg.norm_eps)}
    if name != "gpt2":
        values |= {"rope.freq_base": (FLOAT32, cfg.rope_theta), "vocab_size": (UINT32, cfg.vocab_size)}
    return {f"{name}.{key}": value for key, value in values.items()}


def tokenizer_metadata(tokenizer, cfg):
    """{key: (type, value)}; ARRAY of (type, values). Ids beyond the tokenizer, and reserved ones, are never sampled.
    ValueError for a tokenizer that llama.cpp has no name for."""
    surplus = [f"<|unused_{i}|>" for i in range(tokenizer.vocab_size, cfg.vocab_size)]
    types = [CONTROL if i in tokenizer.specials.values() else NORMAL for i in range(tokenizer.vocab_size)]
    found = {"add_bos_token": (BOOL, True), "tokens": (ARRAY, (STRING, tokenizer.strings() + surplus))}
    if isinstance(tokenizer, SpacedTokenizer):
        for i in tokenizer._byte_ids:
            types[i] = BYTE
        scores = scores_of(tokenizer) + [0.0] * len(surplus)
        found |= {"model": (STRING, "llama"), "scores": (ARRAY, (FLOAT32, scores)), "add_space_prefix": (BOOL, True)}
        if UNKNOWN in tokenizer.specials:
            types[tokenizer.specials[UNKNOWN]] = UNKNOWN_TOKEN
            found["unknown_token_id"] = UINT32, tokenizer.specials[UNKNOWN]
    else:
        pattern = getattr(tokenizer, "pattern", None)
        if pattern not in PRE:
            raise ValueError("llama.cpp has no name for the split pattern of this tokenizer, tiktoken's of GPT-4")
        merges = [f"{tokenizer.string(left)} {tokenizer.string(right)}" for left, right in tokenizer.merges]
        found |= {"model": (STRING, "gpt2"), "pre": (STRING, PRE[pattern]), "merges": (ARRAY, (STRING, merges))}
    found["token_type"] = ARRAY, (INT32, types + [UNUSED] * len(surplus))
    found |= {f"{kind}_token_id": (UINT32, tokenizer.end) for kind in ("bos", "eos", "padding")}
    if banned := never_drawn(cfg, tokenizer):
        found["suppress_tokens"] = ARRAY, (INT32, banned)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def scores_of(tokenizer):
    """Scores (V,) of SentencePiece's kind: llama.cpp joins any two tokens to a third, that of the highest score first.
    ValueError if the tokenizer does not join all of them, or has a token that is part of a character."""
    ids, ranks, scores = tokenizer._ids, tokenizer._ranks, [0.0] * tokenizer.vocab_size
    for token, i in ids.items():
        try:
            token.decode()
        except UnicodeDecodeError:
            raise ValueError(f"token {token!r:.60} is a part of a character, which llama.cpp does not have") from None
        pairs = [
            (ids[token[:k]], ids[token[k:]]) for k in range(1, len(token)) if token[:k] in ids and token[k:] in ids
        ]
        if missing := [pair for pair in pairs if pair not in ranks]:
            left, right = (tokenizer.vocab[j] for j in missing[0])
            raise ValueError(f"tokens {left!r:.40} and {right!r:.40} are not joined here, but by llama.cpp")
        scores[i] = -float(ranks[pairs[0]][0]) if pairs else 0.0
    return scores


def packed(kind, value):
    """A value of this type as bytes."""
    if kind == STRING:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data
    if kind == ARRAY:
        kind, values = value
        return struct.pack("<IQ", kind, len(values)) + b"".join(packed(kind, x) for x in values)
    return struct.pack(PACKED[kind], value)


# == 3  tensors ========================================================================================================

F32, F16, Q8_0 = 0, 1, 8  # numbers of types of tensors
DTYPES = {"float32": (F32, 0), "float16": (F16, 1), "q8_0": (Q8_0, 7)}  # of matrices; of the whole file
BLOCK = 32  # weights of Q8_0 that share a scale


def quantized(x):
    """x (..., K), K a multiple of 32 -> bytes: for 32 weights their scale d in float16, then int8 round(x / d)."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, BLOCK)
    d = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, d, out=np.zeros_like(d), where=d > 0)
    scaled = blocks * inverse
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)  # halves away from zero
    return np.concatenate([narrowed(d, "float16").view(np.int8), q], 1)


def stored(name, x, dtype):
    """A tensor -> (number of its type, array whose bytes are stored). Vectors and positions stay float32, matrices
    whose rows are no multiple of 32 float16 under q8_0."""
    kind = F32 if x.ndim == 1 or name == "position_embd.weight" else DTYPES[dtype][0]
    if kind == Q8_0 and x.shape[-1] % BLOCK == 0:
        return Q8_0, quantized(x)
    return (F32, np.ascontiguousarray(x, "<f4")) if kind == F32 else (F16, narrowed(x, "float16"))


# == 4  the file =======================================================================================================

ALIGNMENT = 32  # bytes, of each tensor
HEAD = struct.Struct("<4sIQQ")  # magic, version, numbers of tensors and of metadata


def file_chunks(metadata, tensors):
    """{key: (type, value)}, {name: (type, shape, array)} -> the bytes of a file in chunks."""
    chunks, offset = [HEAD.pack(b"GGUF", 3, len(tensors), len(metadata))], 0
    for key, (kind, value) in metadata.items():
        chunks += [packed(STRING, key), struct.pack("<I", kind), packed(kind, value)]
    for name, (kind, shape, array) in tensors.items():
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        chunks += [packed(STRING, name), dimensions, struct.pack("<IQ", kind, offset)]
        offset += array.nbytes + -array.nbytes % ALIGNMENT
    chunks.append(bytes(-sum(map(len, chunks)) % ALIGNMENT))
    for _, _, array in tensors.values():
        chunks += [memoryview(array).cast("B"), bytes(-array.nbytes % ALIGNMENT)]
    return chunks


def save(path, cfg, parameters, tokenizer, dtype="float32", chat_template=None):
    """Write a .gguf file. A norm after the embedding becomes part of an input table. ValueError if llama.cpp computes
    no such model."""
    if cfg.embedding_norm:
        cfg, parameters = fold_embedding_norm(cfg, parameters)
    name = architecture(cfg)
    table = TABLES[name]
    if name == "llama" and any(getattr(cfg, bias) for bias in BIASES):
        bpe.note("llama.cpp adds the biases of this model; transformers, if it reads the file, leaves them out")
    if (name, cfg.positions) == ("llama", "rope-half"):
        table = with_neighbours(table)
    if (name, cfg.positions) == ("qwen3", "rope"):
        table = with_halves(table)
    metadata = {"general.architecture": (STRING, name), "general.name": (STRING, path.stem)}
    metadata |= {"general.file_type": (UINT32, DTYPES[dtype][1]), "general.quantization_version": (UINT32, 2)}
    metadata |= model_metadata(cfg, name) | tokenizer_metadata(tokenizer, cfg)
    metadata |= {"tokenizer.chat_template": (STRING, chat_template)} if chat_template else {}
    tensors = {}
    for theirs, x in tensors_from(cfg, parameters, table).items():
        kind, array = stored(theirs, x, dtype)
        tensors[theirs] = kind, x.shape, array
    tinygpt.write_aside(path, file_chunks(metadata, tensors))
