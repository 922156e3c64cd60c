"""Models and tokenizers of llama2.c, read and written: its `run` tells our story, we tell its.

    python sample.py --checkpoint stories260K.bin --tokenizer tok512.bin
    python extras/convert.py --to llama2c runs/mine OUT      # run OUT/model.bin -z OUT/tokenizer.bin -t 0

https://github.com/karpathy/llama2.c, version 0 of its files. Read from the top: 1 models, 2 the vocabulary of a model
that is written.
"""

import math
import os
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np

import tinygpt
from extras.recipes import LLAMA
from extras.tensors import fold_embedding_norm

# == 1  models =========================================================================================================


def shapes_of(C, F, L, H, G, V, T, tied):
    """{name: shape} of the tensors in a file, in its order; rotations, cos and sin, are not read."""
    D = C // H
    shapes = {"embed_w": (V, C), "norm1_w": (L, C), "q": (L, C, C), "k": (L, G * D, C), "v": (L, G * D, C)}
    shapes |= {"out_w": (L, C, C), "norm2_w": (L, C), "gate": (L, F, C), "down_w": (L, C, F), "value": (L, F, C)}
    return shapes | {"norm_w": (C,), "cos": (T, D // 2), "sin": (T, D // 2)} | ({} if tied else {"head_w": (V, C)})


def load(path):
    """A `Checkpoint` without a tokenizer from a model file of llama2.c, version 0. ValueError if the file is not one or
    holds NaN or infinity.

    Seven int32, C F L H G V T (V negative: the head has a matrix of its own), then float32 tensors, (out, in).
    """
    with open(path, "rb") as f:
        size, head = os.fstat(f.fileno()).st_size, f.read(28)
    if len(head) < 28:
        raise ValueError(f"{path} is not a model of llama2.c: it has {size} bytes")
    C, F, L, H, G, V, T = struct.unpack("<7i", head)
    if min(C, F, L, H, G, abs(V), T) < 1 or max(C, F, L, H, G, abs(V), T) >= 2**24 or C % H or C // H % 2 or H % G:
        raise ValueError(f"{path} is not a model of llama2.c: its first numbers are no shape")
    tied, V = V > 0, abs(V)
    shapes = shapes_of(C, F, L, H, G, V, T, tied)
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


def write_model(path, cfg, parameters):
    """Write a model in the format of `load`. ValueError if llama2.c computes no such model: the fields that differ."""
    expected = LLAMA | dict(norm_eps=1e-5, rope_theta=10000.0, head_width=cfg.width // cfg.heads, norm_gain=True)
    expected |= dict(embedding_norm=False, final_norm=True, qk_norm=False, attention_scale=True, window=0)
    found, expected = asdict(cfg), expected | dict(head_bias=False)
    if cfg.positions == "rope-half":
        expected["positions"] = "rope-half"
    different = [f"{name}={found[name]} (expected {value})" for name, value in expected.items() if found[name] != value]
    if different:
        raise ValueError(f"llama2.c computes no model with {', '.join(different)}")
    L, H, G, D, F = cfg.layers, cfg.heads, cfg.kv_heads, cfg.head_width, cfg.hidden
    x = {t.name: parameters[t.offset : t.offset + math.prod(t.shape)].reshape(t.shape) for t in tinygpt.layout(cfg)}
    qkv = x["qkv_w"].reshape(L, cfg.width, -1, D)  # (L, C, H + 2 G, D)
    if cfg.positions == "rope-half":  # pairs D/2 apart become neighbours
        turned = qkv[:, :, : H + G].reshape(L, cfg.width, H + G, 2, D // 2).swapaxes(3, 4).reshape(L, cfg.width, -1, D)
        qkv = np.concatenate([turned, qkv[:, :, H + G :]], 2)
    columns = qkv.reshape(L, cfg.width, -1)
    x |= dict(zip("qkv", np.split(columns, [H * D, (H + G) * D], 2)), gate=x["up_w"][..., :F], value=x["up_w"][..., F:])
    shapes = shapes_of(cfg.width, F, L, H, G, cfg.vocab_size, cfg.seq_len, cfg.tied)
    with open(path, "wb") as f:
        V = cfg.vocab_size if cfg.tied else -cfg.vocab_size
        f.write(struct.pack("<7i", cfg.width, F, L, H, G, V, cfg.seq_len))
        for name, shape in shapes.items():
            tensor = x.get(name, np.zeros(shape))
            tensor = tensor.swapaxes(1, 2) if len(shape) == 3 else tensor
            f.write(np.ascontiguousarray(tensor, "<f4").tobytes())


# == 2  the vocabulary of a model that is written ======================================================================
#
# llama2.c has three special tokens, then 256 bytes, then strings. It looks up a character before its bytes, and merges
# two strings if their concatenation is a string. So each ASCII character is a string too, with the row of its byte.


def vocabulary(tokenizer):
    """Our tokenizer -> [(string, score, our id whose row it has)] of llama2.c's. ValueError if it lacks a byte, or a
    token has a zero byte."""
    reserved = [i for i in tokenizer.specials.values() if i != tokenizer.end]
    unlikely = reserved[0] if reserved else tokenizer.end  # a row that no text has taught
    rows = [(b"<unk>", 0.0, unlikely), (b"\n<s>\n", 0.0, tokenizer.end), (b"\n</s>\n", 0.0, unlikely)]
    ids = {token: i for i, token in enumerate(tokenizer.vocab)}
    if missing := [b for b in range(256) if bytes([b]) not in ids]:
        raise ValueError(f"this tokenizer has no token for byte 0x{missing[0]:02x}; llama2.c needs all 256")
    byte_ids = [ids[bytes([b])] for b in range(256)]
    rows += [(b"<0x%02X>" % b, 0.0, byte_ids[b]) for b in range(256)]
    merged = [ids[a + b] for a, b in tokenizer.merges]
    rows += [(tokenizer.vocab[i], -float(rank), i) for rank, i in enumerate(merged)]
    rows += [(bytes([b]), -float(len(merged) + b), byte_ids[b]) for b in range(1, 128)]
    if zero := [string for string, _, _ in rows if b"\0" in string]:
        raise ValueError(f"token {zero[0]!r:.80} has a zero byte, which ends a string of llama2.c")
    return rows


def save(folder, cfg, parameters, tokenizer):
    """Write folder/model.bin and folder/tokenizer.bin. A norm after the embedding becomes part of an input table."""
    if cfg.embedding_norm:
        cfg, parameters = fold_embedding_norm(cfg, parameters)
    rows = vocabulary(tokenizer)
    taken = [i for _, _, i in rows]
    parts = []
    for t in tinygpt.layout(cfg):
        x = parameters[t.offset : t.offset + math.prod(t.shape)].reshape(t.shape)
        parts.append((x[taken] if t.name in ("embed_w", "head_w") else x).reshape(-1))
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model.bin", cfg.changed(vocab_size=len(rows)), np.concatenate(parts))
    data = b"".join(struct.pack("<fi", score, len(string)) + string for string, score, _ in rows)
    longest = max(len(string) for string, _, _ in rows)
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", longest) + data)
