"""A transformer that tells stories: the model, its gradients by hand, its kernels.

    python tinygpt.py check        # every gradient against finite differences, with the errors found

Part I is the specification, in NumPy, and is complete: a reader who stops there has read the whole model and its
gradients. Part II computes the same sublayers in Numba, as fast as the machine allows. Part III holds the sizes,
decoding, checkpoints and the checks that Part I and Part II agree with calculus and with each other.

    Part I    1 configuration and parameters    2 primitives    3 sublayers    4 the model
    Part II   5 matrix products                 6 rows          7 sublayers    8 tables of ops
    Part III  9 sizes    10 decoding    11 checkpoints    12 checks

Symbols, here and everywhere:

    B  sequences in a micro-batch                   H  heads
    T  query positions                              D  width of one head
    S  key positions (T in training, the cache's    F  hidden width of the MLP
       length in decoding)                          V  vocabulary size
    C  model width                                  L  layers
    N  B * T, rows after flattening                 P  rows of the position table

`dx` is the gradient of the loss with respect to `x`: same shape, same dtype. Weights are (in, out): a linear layer is
`x @ w + b`. A forward returns (out, cache); its backward takes (dout, cache, gradients), ADDS into the gradients and
returns only dx: one rule for accumulation over micro-batches, for tied weights and for kernels that work in place.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

# ######################################################################################################################
# Part I: the specification
# ######################################################################################################################

# == 1.1  configuration ================================================================================================


@dataclass(frozen=True)
class Config:
    """The shape of a model. Fields left at 0 take the value that their comment names. ValueError if they do not fit."""

    vocab_size: int  # V
    seq_len: int  # T, the longest window that is trained
    width: int  # C
    layers: int  # L
    heads: int  # H
    hidden: int = 0  # F; 0 is 4 C
    position_rows: int = 0  # P, rows of the learned position table; 0 is seq_len
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name, default in (("hidden", 4 * self.width), ("position_rows", self.seq_len)):
            object.__setattr__(self, name, getattr(self, name) or default)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type or not 0 < value < 2**31:
                raise ValueError(f"{field.name} is {value!r}; expected a positive {field.type.__name__}")
        if self.width % self.heads:
            fits = [h for h in range(1, self.width + 1) if self.width % h == 0]
            near = min(fits, key=lambda h: abs(h - self.heads))
            raise ValueError(f"width {self.width} does not divide into heads={self.heads}; try heads={near}")
        if self.position_rows < self.seq_len:
            raise ValueError(
                f"position_rows={self.position_rows} is below seq_len={self.seq_len}; raise it or leave it"
            )

    @property
    def head_width(self):
        """D."""
        return self.width // self.heads


# == 1.2  parameters: one table, one flat buffer, named views ==========================================================


class Tensor(NamedTuple):
    """A row of the table. Initialised from N(mean, std^2); `layered` tensors carry a leading axis of L."""

    name: str
    shape: tuple
    offset: int  # in elements of the flat buffer
    layered: bool
    decayed: bool
    mean: float
    std: float


def layout(cfg):
    """The parameters of `cfg` in order: matrices, which AdamW decays, then vectors, which it does not.

    Initialised from N(0, 1/C), what ends in the residual stream narrower by sqrt(2L) as in GPT-2 (Radford et al. 2019).
    GPT-2's own 0.02 learns more slowly at C = 128: 1.346 bits per byte after 450 updates, this 1.332.
    """
    V, P, C, L, F = cfg.vocab_size, cfg.position_rows, cfg.width, cfg.layers, cfg.hidden
    std, residual = 1 / math.sqrt(C), 1 / math.sqrt(2 * L * C)
    rows = [  # name, shape, layered, decayed, mean, std
        ("embed_w", (V, C), False, True, 0.0, std),  # the head as well: logits = norm(x) @ embed_w^T
        ("position_w", (P, C), False, True, 0.0, std),
        ("qkv_w", (C, 3 * C), True, True, 0.0, std),  # columns: q of every head, then k, then v
        ("out_w", (C, C), True, True, 0.0, residual),
        ("up_w", (C, F), True, True, 0.0, std),
        ("down_w", (F, C), True, True, 0.0, residual),
        ("norm1_w", (C,), True, False, 1.0, 0.0),
        ("norm1_b", (C,), True, False, 0.0, 0.0),
        ("qkv_b", (3 * C,), True, False, 0.0, 0.0),
        ("out_b", (C,), True, False, 0.0, 0.0),
        ("norm2_w", (C,), True, False, 1.0, 0.0),
        ("norm2_b", (C,), True, False, 0.0, 0.0),
        ("up_b", (F,), True, False, 0.0, 0.0),
        ("down_b", (C,), True, False, 0.0, 0.0),
        ("norm_w", (C,), False, False, 1.0, 0.0),
        ("norm_b", (C,), False, False, 0.0, 0.0),
    ]
    table, offset = [], 0
    for name, shape, layered, decayed, mean, std in rows:
        shape = (L, *shape) if layered else shape
        table.append(Tensor(name, shape, offset, layered, decayed, mean, std))
        offset += math.prod(shape)
    return table


def count_parameters(cfg):
    """(total, decayed, non-embedding) numbers of parameters; the decayed ones come first in the buffer."""
    sizes = {t: math.prod(t.shape) for t in layout(cfg)}
    total, decayed = sum(sizes.values()), sum(n for t, n in sizes.items() if t.decayed)
    return total, decayed, total - sum(n for t, n in sizes.items() if t.name in ("embed_w", "position_w"))


def flops_per_token(cfg):
    """Floating-point operations to train on one token: 2 for each weight of a product forward, 4 backward; causal
    attention sees T/2 keys on average, in two products forward and four backward (lookups count nothing)."""
    _, _, weights = count_parameters(cfg)
    return 6 * (weights + cfg.vocab_size * cfg.width) + 6 * cfg.layers * cfg.seq_len * cfg.width


CACHE_LINE = 64  # bytes


def aligned(count, dtype):
    """Zeros (count,) from the beginning of a cache line on: a vector across two lines takes twice the time to load."""
    size = np.dtype(dtype).itemsize
    flat = np.zeros(count * size + CACHE_LINE, np.uint8)
    first = -flat.ctypes.data % CACHE_LINE
    return flat[first : first + count * size].view(dtype)


def views(table, flat, layers):
    """Names -> views of `flat`; layered tensors stand, one layer each, in the list under "layers"."""
    named = {"layers": [{} for _ in range(layers)]}
    for t in table:
        whole = flat[t.offset : t.offset + math.prod(t.shape)].reshape(t.shape)
        if t.layered:
            for layer, part in zip(named["layers"], whole):
                layer[t.name] = part
        else:
            named[t.name] = whole
    return named


def init_parameters(cfg, seed, dtype=np.float32):
    """Fresh parameters, flat (count,): the same for the same seed, drawn in the table's order."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    return np.concatenate([rng.normal(t.mean, t.std, math.prod(t.shape)).astype(dtype) for t in layout(cfg)])


def zero_gradients(cfg, dtype=np.float32):
    """(flat (count,), views). Two sums reach embed_w, from the head and from the lookup. They are kept apart until
    `join_tied` so that neither depends on how an update is cut into micro-batches; "lookup_w" is the second."""
    count = count_parameters(cfg)[0]
    flat = aligned(count + cfg.vocab_size * cfg.width, dtype)
    grads = views(layout(cfg), flat, cfg.layers)
    grads["lookup_w"] = flat[count:].reshape(cfg.vocab_size, cfg.width)
    return flat[:count], grads


def join_tied(grads):
    """Once at the end of an update: embed_w's gradient becomes the whole, and the lookup's share is zero again."""
    grads["embed_w"] += grads["lookup_w"]
    grads["lookup_w"][:] = 0


# == 2.1  linear     y = x w + b =======================================================================================


def linear_forward(x, w, b):
    """x (..., K), w (K, M), b (M,) -> y (..., M)."""
    return x @ w + b, (x, w)


def linear_backward(dy, cache, dw, db):
    """dy (..., M) -> dx (..., K); adds into dw (K, M), db (M,)."""
    x, w = cache
    x_NK, dy_NM = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # y_nm = sum_k x_nk w_km + b_m, so dw_km = sum_n x_nk dy_nm, db_m = sum_n dy_nm, dx_nk = sum_m dy_nm w_km
    dw += x_NK.T @ dy_NM
    db += dy_NM.sum(0)
    return dy @ w.T


# == 2.2  LayerNorm     y = n w + b,   n = (x - mean) rstd,   rstd = 1 / sqrt(var_c(x) + eps) ==========================


def layernorm_forward(x, w, b, eps):
    """x (..., C), w (C,), b (C,) -> y (..., C).   Ba, Kiros & Hinton 2016, arXiv:1607.06450."""
    mean = x.mean(-1, keepdims=True)  # (..., 1)
    centred = x - mean
    rstd = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)  # (..., 1)
    return centred * rstd * w + b, (x, w, mean, rstd)


def layernorm_backward(dy, cache, dw, db):
    """dy (..., C) -> dx (..., C); adds into dw (C,), db (C,)."""
    x, w, mean, rstd = cache
    n, dn = (x - mean) * rstd, dy * w
    rows = tuple(range(dy.ndim - 1))
    dw += (dy * n).sum(rows)
    db += dy.sum(rows)
    # dn_j/dx_i = rstd (delta_ij - 1/C - n_i n_j / C), so dx = rstd (dn - mean_c(dn) - n mean_c(dn n))
    return rstd * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))


# == 2.3  GELU     a = h/2 (1 + tanh u),   u = sqrt(2/pi) (h + 0.044715 h^3) ===========================================

GELU_SCALE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715  # the tanh form of Hendrycks & Gimpel 2016, arXiv:1606.08415


def gelu_forward(h):
    """h (..., F) -> a (..., F)."""
    return h / 2 * (1 + np.tanh(GELU_SCALE * (h + GELU_CUBE * h * h * h))), (h,)


def gelu_backward(da, cache):
    """da (..., F) -> dh (..., F)."""
    (h,) = cache
    t = np.tanh(GELU_SCALE * (h + GELU_CUBE * h * h * h))
    # a = h/2 (1 + t), dt/du = 1 - t^2, du/dh = scale (1 + 3 cube h^2)
    return da * ((1 + t) / 2 + h / 2 * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBE * h * h))


# == 2.4  causal self-attention     o_t = sum_{s <= t} p_ts v_s,   p_t = softmax_s(q_t . k_s / sqrt(D)) ================


def attention_forward(q, k, v):
    """q (B, H, T, D), k and v (B, H, S, D) -> o (B, H, T, D).   Vaswani et al. 2017, arXiv:1706.03762.

    The T queries are the last of the S positions: query t sees keys 0 .. S - T + t.
    """
    T, D = q.shape[2:]
    S = k.shape[2]
    scores = q @ k.swapaxes(-1, -2) * (1 / math.sqrt(D))  # (B, H, T, S)
    visible = np.arange(S) <= np.arange(S - T, S)[:, None]  # (T, S)
    scores = np.where(visible, scores, -math.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)  # (B, H, T, S)
    return p @ v, (q, k, v, p)


def attention_backward(do, cache):
    """do (B, H, T, D) -> dq (B, H, T, D), dk and dv (B, H, S, D)."""
    q, k, v, p = cache
    scale = 1 / math.sqrt(q.shape[-1])
    dv = p.swapaxes(-1, -2) @ do  # o = p v
    dp = do @ v.swapaxes(-1, -2)  # (B, H, T, S)
    # dp_j/dscores_i = p_j (delta_ij - p_i), so dscores = p (dp - sum_s dp_s p_s)
    dscores = p * (dp - (dp * p).sum(-1, keepdims=True))
    dq = dscores @ k * scale  # scores = scale q k^T
    dk = dscores.swapaxes(-1, -2) @ q * scale
    return dq, dk, dv


# == 2.5  embedding     x_bt = w[tokens_bt] + positions[t] =============================================================


def embedding_forward(tokens, w, positions):
    """tokens (B, T) integers, w (V, C), positions (T, C) -> x (B, T, C)."""
    return w[tokens] + positions, (tokens,)


def embedding_backward(dx, cache, dw, dpositions):
    """dx (B, T, C); adds into dw (V, C), dpositions (T, C)."""
    (tokens,) = cache
    np.add.at(dw, tokens, dx)  # dw[tokens] += dx would count a repeated token once
    dpositions += dx.sum(0)


# == 2.6  cross-entropy     nats_n = lse_n - logits_n[target_n],   lse = log sum_v exp(logits_v) =======================


def cross_entropy_forward(logits, targets, weights):
    """logits (N, V), targets (N,), weights (N,) -> loss = sum_n weights_n nats_n, nats (N,)."""
    top = logits.max(-1, keepdims=True)  # (N, 1)
    lse = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))  # (N, 1)
    nats = lse[:, 0] - logits[np.arange(len(targets)), targets]  # (N,)
    return (weights * nats).sum(), nats, (logits, targets, weights, lse)


def cross_entropy_backward(cache):
    """-> dlogits (N, V) of the weighted sum."""
    logits, targets, weights, lse = cache
    dlogits = np.exp(logits - lse)  # dlse/dlogits = softmax
    dlogits[np.arange(len(targets)), targets] -= 1
    return dlogits * weights[:, None]


# == 3  sublayers: what a table of ops holds ===========================================================================
#
# p and g are the named views of one layer's parameters and gradients (of the whole model's for `embed` and `head`).
# `space` holds buffers for kernels to write into (section 7); the specification allocates and has no use for it.


def embed_forward(tokens, p, cfg, start=0, space=None):
    """tokens (B, T) at positions start .. start + T - 1 -> x (B, T, C)."""
    return embedding_forward(tokens, p["embed_w"], p["position_w"][start : start + tokens.shape[1]])


def embed_backward(dx, cache, g, cfg, space=None):
    """dx (B, T, C); adds into the gradients of the lookup and of the positions."""
    embedding_backward(dx, cache, g["lookup_w"], g["position_w"][: dx.shape[1]])


def attention_layer_forward(x, p, cfg, past=None, space=None):
    """x (B, T, C) -> x + attention(norm1(x)) out_w + out_b, (B, T, C).

    past = (kv, start): kv (B, positions, 2, H, D) holds the keys and values of `start` earlier positions and takes the
    new ones; queries see all of them.
    """
    B, T, C = x.shape
    H, D = cfg.heads, cfg.head_width
    n, norm = layernorm_forward(x, p["norm1_w"], p["norm1_b"], cfg.norm_eps)
    qkv, qkv_linear = linear_forward(n, p["qkv_w"], p["qkv_b"])  # (B, T, 3C)
    q, k, v = qkv.reshape(B, T, 3, H, D).transpose(2, 0, 3, 1, 4)  # 3 of (B, H, T, D)
    if past is not None:
        kv, start = past
        kv[:, start : start + T] = qkv.reshape(B, T, 3, H, D)[:, :, 1:]
        k, v = kv[:, : start + T].transpose(2, 0, 3, 1, 4)  # 2 of (B, H, S, D)
    o_BHTD, attention = attention_forward(q, k, v)
    o = o_BHTD.transpose(0, 2, 1, 3).reshape(B, T, C)
    y, out_linear = linear_forward(o, p["out_w"], p["out_b"])
    return x + y, (norm, qkv_linear, attention, out_linear)


def attention_layer_backward(dy, cache, p, g, cfg, space=None):
    """dy (B, T, C) -> dx (B, T, C); adds into g."""
    norm, qkv_linear, attention, out_linear = cache
    B, T, C = dy.shape
    do = linear_backward(dy, out_linear, g["out_w"], g["out_b"])  # (B, T, C)
    do_BHTD = do.reshape(B, T, cfg.heads, cfg.head_width).transpose(0, 2, 1, 3)
    dq_dk_dv = np.stack(attention_backward(do_BHTD, attention))  # (3, B, H, T, D)
    dqkv = dq_dk_dv.transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * C)
    dn = linear_backward(dqkv, qkv_linear, g["qkv_w"], g["qkv_b"])
    return dy + layernorm_backward(dn, norm, g["norm1_w"], g["norm1_b"])


def mlp_layer_forward(x, p, cfg, space=None):
    """x (B, T, C) -> x + gelu(norm2(x) up_w + up_b) down_w + down_b, (B, T, C)."""
    n, norm = layernorm_forward(x, p["norm2_w"], p["norm2_b"], cfg.norm_eps)
    h, up_linear = linear_forward(n, p["up_w"], p["up_b"])  # (B, T, F)
    a, gelu = gelu_forward(h)
    y, down_linear = linear_forward(a, p["down_w"], p["down_b"])
    return x + y, (norm, up_linear, gelu, down_linear)


def mlp_layer_backward(dy, cache, p, g, cfg, space=None):
    """dy (B, T, C) -> dx (B, T, C); adds into g."""
    norm, up_linear, gelu, down_linear = cache
    da = linear_backward(dy, down_linear, g["down_w"], g["down_b"])  # (B, T, F)
    dn = linear_backward(gelu_backward(da, gelu), up_linear, g["up_w"], g["up_b"])
    return dy + layernorm_backward(dn, norm, g["norm2_w"], g["norm2_b"])


def head_logits(x, p, cfg, space=None):
    """x (N, C) -> norm(x) embed_w^T, logits (N, V)."""
    n, _ = layernorm_forward(x, p["norm_w"], p["norm_b"], cfg.norm_eps)
    return n @ p["embed_w"].T


def head_loss(x, targets, weights, p, g, cfg, space=None):
    """x (B, T, C), targets and weights (B, T) -> loss = sum of weights * nats, nats (B, T), dx (B, T, C); adds into g.

    Forward and backward in one, a sequence at a time, so that logits of (B, T, V) never exist. g=None: no gradients.
    """
    nats, dx, loss = np.empty(targets.shape, x.dtype), np.empty_like(x), 0.0
    for b in range(x.shape[0]):
        n, norm = layernorm_forward(x[b], p["norm_w"], p["norm_b"], cfg.norm_eps)  # (T, C)
        logits = n @ p["embed_w"].T  # (T, V)
        loss_b, nats[b], cross_entropy = cross_entropy_forward(logits, targets[b], weights[b])
        loss += float(loss_b)
        if g is not None:
            dlogits = cross_entropy_backward(cross_entropy)
            g["embed_w"] += dlogits.T @ n  # logits_nv = sum_c n_nc w_vc
            dx[b] = layernorm_backward(dlogits @ p["embed_w"], norm, g["norm_w"], g["norm_b"])
    return loss, nats, dx


# == 4  the model ======================================================================================================


def forward(p, tokens, cfg, ops, past=None, space=None):
    """tokens (B, T) -> x (B, T, C), what the head reads; caches for `backward`.

    past = (kv, start): kv (L, B, positions, 2, H, D), as in `attention_layer_forward`. ValueError on a bad token or T.
    """
    start = past[1] if past is not None else 0
    check_tokens(tokens, start, cfg)
    x, embed = ops["embed_forward"](tokens, p, cfg, start, space)
    caches = [embed]
    for index, layer in enumerate(p["layers"]):
        part = space and space["layers"][index]
        layer_past = past and (past[0][index], start)
        x, attention = ops["attention_layer_forward"](x, layer, cfg, layer_past, part)
        x, mlp = ops["mlp_layer_forward"](x, layer, cfg, part)
        caches += [attention, mlp]
    return x, caches


def backward(dx, caches, p, g, cfg, ops, space=None):
    """dx (B, T, C), the gradient of what `forward` returned; adds into g."""
    caches = list(caches)
    for index in reversed(range(cfg.layers)):
        layer, grads = p["layers"][index], g["layers"][index]
        part = space and space["layers"][index]
        dx = ops["mlp_layer_backward"](dx, caches.pop(), layer, grads, cfg, part)
        dx = ops["attention_layer_backward"](dx, caches.pop(), layer, grads, cfg, part)
    ops["embed_backward"](dx, caches.pop(), g, cfg, space)


def loss_and_gradients(p, tokens, targets, weights, g, cfg, ops, space=None):
    """tokens, targets and weights (B, T) -> weighted sum of the nats, nats (B, T); adds into g (None: no gradients)."""
    check_tokens(targets, 0, cfg)
    x, caches = forward(p, tokens, cfg, ops, space=space)
    loss, nats, dx = ops["head_loss"](x, targets, weights, p, g, cfg, space)
    if g is not None:
        backward(dx, caches, p, g, cfg, ops, space)
    return loss, nats


def check_tokens(tokens, start, cfg):
    """ValueError unless tokens (B, T) are ids of this model at positions that it has."""
    T = tokens.shape[1]
    if start + T > cfg.seq_len:
        raise ValueError(
            f"tokens has T={start + T} but this model has seq_len={cfg.seq_len}; shorten the text or train with "
            f"--seq-len {start + T}"
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < cfg.vocab_size:
        bad = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(f"token id {bad} is outside 0 .. {cfg.vocab_size - 1}; is this text of another tokenizer?")


# ######################################################################################################################
# Part II: the same sublayers in Numba
# ######################################################################################################################
#
# Blocks of rows travel through a sublayer while they are in a core's cache. A kernel is sequential and does one task of
# many: `kernel(task, slot, ...)` for task 0 .. count - 1, driven by a pool of threads without the interpreter's lock.
# Every task owns what it writes, and sums run in an order that neither threads nor micro-batches change:
#   - an element of a product is one chain of fused multiply-adds in the order of k;
#   - a weight gradient continues, row after row, the chain that the rows before it left;
#   - gains and biases of a norm are summed within blocks of a sequence's rows, the blocks in the order of rows.

FASTMATH = {"contract", "reassoc", "nsz", "arcp"}  # neither nnan nor ninf: a NaN must be seen
COMPILE = {"error_model": "numpy", "fastmath": FASTMATH}  # Numba's own error model checks divisions: no vectors
part = register_jitable(**COMPILE)  # of a kernel, compiled with it; called from Python it is Python

# A launch goes through one array of words, from machine code to machine code: waking a thread takes 100 us and the
# interpreter's lock 70, which is what a task takes. Each word that threads contend for has a cache line of its own.

LAUNCH, GATE, NEXT, TASKS = 0, 8, 16, 24  # launches so far; threads at work, + CLOSED; the next task; their number
FUNCTION, ARGUMENTS, FAILED, WORDS = 25, 26, 27, 32  # what to call, with what, whether it failed; words in all
CLOSED = 1 << 32
PROTOCOL = 1  # one more whenever compiled kernels use the words in another way: it is part of their name in the cache
SPINS = 1 << 20  # looks at a word, some 0.5 ms, before a thread goes to sleep


def word_at(builder, words, index=0):
    """Pointer to a word, in the code that an intrinsic builds."""
    return builder.inttoptr(builder.add(words, ir.IntType(64)(8 * index)), ir.IntType(64).as_pointer())


@intrinsic
def look(typing_context, address):
    """The 64-bit word at an address, read anew each time."""

    def build(context, builder, signature, args):
        return builder.load_atomic(word_at(builder, args[0]), "seq_cst", 8)

    return types.int64(types.intp), build


@intrinsic
def fetch_add(typing_context, address, value):
    """Add to the 64-bit word at an address, in one step that no other thread can cut; what it was before."""

    def build(context, builder, signature, args):
        return builder.atomic_rmw("add", word_at(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), build


def function_of_tasks(context, module, compiled, signature, arguments):
    """LLVM function (address of the words, slot): body(task, slot, *arguments) for each task that it gets hold of."""
    i64 = ir.IntType(64)
    name = compiled.fndesc.llvm_func_name + "_tasks"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64, i64]), name)
    function.linkage = "internal"
    words, slot = function.args
    begin, take, do, done = (function.append_basic_block(label) for label in ("begin", "take", "do", "done"))
    builder = ir.IRBuilder(begin)
    pointer = builder.inttoptr(builder.load(word_at(builder, words, ARGUMENTS)), arguments)
    rest = cgutils.unpack_tuple(builder, builder.load(pointer))
    count = builder.load(word_at(builder, words, TASKS))
    builder.branch(take)
    builder.position_at_end(take)
    task = builder.atomic_rmw("add", word_at(builder, words, NEXT), i64(1), "seq_cst")
    builder.cbranch(builder.icmp_signed("<", task, count), do, done)
    builder.position_at_end(do)
    status, _ = context.call_internal_no_propagate(builder, compiled.fndesc, signature, (task, slot, *rest))
    with builder.if_then(status.is_error):
        builder.store(i64(1), word_at(builder, words, FAILED))
    builder.branch(take)
    builder.position_at_end(done)
    builder.ret_void()
    return function


@intrinsic
def open_gate(typing_context, words, count, body, args):
    """Describe the launch, open the gate to the helpers, work with them, close it, wait for those still inside."""
    signature = typing_context.resolve_function_type(body, (types.int64, types.int64, *args.types), {})

    def build(context, builder, _, values):
        i64, (words, count, _, arguments) = ir.IntType(64), values
        compiled = body.dispatcher.overloads[signature.args]
        context.active_code_library.add_linking_library(compiled.library)
        arguments = cgutils.alloca_once_value(builder, arguments)
        function = function_of_tasks(context, builder.module, compiled, signature, arguments.type)
        address_of = {FUNCTION: builder.ptrtoint(function, i64), ARGUMENTS: builder.ptrtoint(arguments, i64)}
        for index, value in {NEXT: i64(0), TASKS: count, FAILED: i64(0), **address_of}.items():
            builder.store(value, word_at(builder, words, index))
        gate = word_at(builder, words, GATE)
        builder.atomic_rmw("sub", gate, i64(CLOSED), "seq_cst")
        builder.atomic_rmw("add", word_at(builder, words, LAUNCH), i64(1), "seq_cst")
        builder.call(function, (words, i64(0)))
        builder.atomic_rmw("add", gate, i64(CLOSED), "seq_cst")
        wait, done = builder.append_basic_block("wait"), builder.append_basic_block("done")
        builder.branch(wait)
        builder.position_at_end(wait)
        builder.cbranch(builder.icmp_signed("==", builder.load_atomic(gate, "seq_cst", 8), i64(CLOSED)), done, wait)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64, body, args), build


@intrinsic
def join(typing_context, words, slot):
    """Help with the launch that the words describe."""

    def build(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 2).as_pointer()
        builder.call(builder.inttoptr(builder.load(word_at(builder, args[0], FUNCTION)), function), args)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), build


def launch(words, count, *args):
    open_gate(words, count, body, args)  # noqa: F821  each kernel is a copy of this function with a `body` of its own


def kernel(function):
    """What POOL.run runs: function(task, slot, *args) for each task, on all threads, without the interpreter's lock."""
    code = launch.__code__.replace(co_name=function.__name__, co_filename=function.__code__.co_filename)
    code = code.replace(co_firstlineno=function.__code__.co_firstlineno)
    body = njit(**COMPILE, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    copy = type(launch)(code, {"open_gate": open_gate, "body": body, "__name__": function.__module__})
    copy.__qualname__ = f"{function.__qualname__}-{PROTOCOL}"
    return njit(**COMPILE, no_cfunc_wrapper=True, nogil=True, cache=True)(copy)


@njit(**COMPILE, nogil=True, cache=True)
def serve(at, slot, seen, spins):
    """Take part in every launch after number `seen`, until none has come for `spins` looks; the last one's number."""
    idle = 0
    while idle < spins:
        idle += 1
        number = look(at + 8 * LAUNCH)
        if number != seen:
            seen, idle = number, 0
            if fetch_add(at + 8 * GATE, 1) < CLOSED:
                join(at, slot)
            fetch_add(at + 8 * GATE, -1)
    return seen


def count_cores():
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """The threads that run tasks. One caller computes at a time; others wait for it."""

    def __init__(self):
        self.lock, self.changed = threading.Lock(), threading.Condition()
        self.threads, self.helpers, self.asleep, self.wakes, self.stopping = count_cores(), [], 0, 0, False
        self.words = aligned(WORDS, np.int64)
        self.words[GATE] = CLOSED

    def resize(self, threads):
        """Use `threads` threads from now on; they start when there is work."""
        with self.lock:
            self.stopping = True
            self.wake()
            for helper in self.helpers:
                helper.join()
            self.threads, self.helpers, self.stopping = threads, [], False

    def wake(self):
        with self.changed:
            self.wakes += 1
            self.changed.notify_all()

    def help(self, slot, seen):
        while not self.stopping:
            seen = serve(self.words.ctypes.data, slot, seen, SPINS)
            with self.changed:
                wakes, self.asleep = self.wakes, self.asleep + 1
                self.changed.wait_for(lambda: self.wakes != wakes or self.stopping)  # noqa: B023
                self.asleep -= 1

    def run(self, function, count, *args):
        """function(task, slot, *args) for each task; slot is the thread's number, for its own scratch memory."""
        with self.lock:
            if count > 1 and self.threads > len(self.helpers) + 1:
                seen = int(self.words[LAUNCH])
                for slot in range(1, self.threads):
                    self.helpers.append(threading.Thread(target=self.help, args=(slot, seen), daemon=True))
                    self.helpers[-1].start()
            if self.asleep:
                self.wake()
            function(self.words.ctypes.data, count, *args)
            if self.words[FAILED]:
                raise SystemError(f"{function.__name__} failed in one of its {count} tasks")


POOL = Pool()

# == 5  matrix products     c = a b, or c += a b, for any strides of a =================================================
#
# Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication": b is copied, DEPTH rows of a panel at a
# time, to where it stays in the first-level cache; a register tile of c sweeps over the rows of a.

VECTOR_BYTES = 64  # LLVM splits it where registers are narrower
DEPTH = 128
PACK_ROWS = 32  # with fewer rows of a, copying b costs more than it saves


def has_avx512():
    """Whether the processor that Numba compiles for has 32 registers of 512 bits."""
    if numba.config.CPU_NAME:
        return "+avx512f" in (numba.config.CPU_FEATURES or "")
    return binding.get_host_cpu_features().get("avx512f", False)


TILE_ROWS, TILE_VECTORS = 6, 4 if has_avx512() else 1  # 24 sums: of 32 registers; 12 of 16 on AVX2; 24 of 32 on NEON
PACKED_A = 22 * TILE_ROWS  # rows of a transposed `a` that are copied at a time
PANEL_SIZE = (DEPTH * TILE_VECTORS + TILE_ROWS) * VECTOR_BYTES // 4 + DEPTH * PACKED_A  # scratch, in elements


def register_tile(rows, vectors):
    """Numba function (a, a_row, a_k, b, b_k, c, c_row, k, add, zero): `rows` rows of `vectors` vectors of c from k
    columns of a and k rows of b; addresses and strides in bytes, the element type is that of zero, k >= 1.

    for r in rows: c[r] = (c[r] if add else 0) + sum_k a[r, k] * b[k], one fused multiply-add after the other.
    """
    i32, i64 = ir.IntType(32), ir.IntType(64)

    def build(context, builder, signature, args):
        a, a_row, a_k, b, b_k, c, c_row, k_end, add, _ = args
        scalar = context.get_value_type(signature.args[-1])
        size = context.get_abi_sizeof(scalar)
        lanes = VECTOR_BYTES // size
        vector = ir.VectorType(scalar, lanes)
        zeros, undefined = ir.Constant(vector, [0.0] * lanes), ir.Constant(vector, ir.Undefined)
        first_lane = ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)
        name = f"llvm.fma.v{lanes}f{8 * size}"
        fma = builder.module.globals.get(name)
        fma = fma or ir.Function(builder.module, ir.FunctionType(vector, [vector] * 3), name)

        def load(address, kind):
            value = builder.load(builder.inttoptr(address, kind.as_pointer()))
            value.align = size
            return value

        def vector_addresses(row):
            return [builder.add(row, i64(v * VECTOR_BYTES)) for v in range(vectors)]

        c_at = [vector_addresses(builder.add(c, builder.mul(c_row, i64(r)))) for r in range(rows)]
        a_at = [builder.add(a, builder.mul(a_row, i64(r))) for r in range(rows)]
        start = builder.block
        resume, loop, store = (builder.append_basic_block(label) for label in ("resume", "loop", "store"))
        builder.cbranch(builder.icmp_signed("!=", add, i64(0)), resume, loop)
        builder.position_at_end(resume)
        before = [[load(address, vector) for address in row] for row in c_at]
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(i64)
        sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
        b_row = [load(address, vector) for address in vector_addresses(builder.add(b, builder.mul(k, b_k)))]
        grown = []
        for r in range(rows):
            one = load(builder.add(a_at[r], builder.mul(k, a_k)), scalar)
            all_lanes = builder.shuffle_vector(builder.insert_element(undefined, one, i32(0)), undefined, first_lane)
            grown.append([builder.call(fma, [all_lanes, b_row[v], sums[r][v]]) for v in range(vectors)])
        k_next = builder.add(k, i64(1))
        builder.cbranch(builder.icmp_signed("<", k_next, k_end), loop, store)
        for block, value in ((start, i64(0)), (resume, i64(0)), (loop, k_next)):
            k.add_incoming(value, block)
        for r in range(rows):
            for v in range(vectors):
                for block, value in ((start, zeros), (resume, before[r][v]), (loop, grown[r][v])):
                    sums[r][v].add_incoming(value, block)

        builder.position_at_end(store)
        for r in range(rows):
            for v in range(vectors):
                builder.store(grown[r][v], builder.inttoptr(c_at[r][v], vector.as_pointer())).align = size
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, a, a_row, a_k, b, b_k, c, c_row, k, add, zero):
        return types.void(*[types.intp] * 9, zero), build

    return tile


tall_wide, tall_two, tall_one = (register_tile(TILE_ROWS, vectors) for vectors in (TILE_VECTORS, 2, 1))
flat_wide, flat_two, flat_one = (register_tile(1, vectors) for vectors in (TILE_VECTORS, 2, 1))


@part
def sweep(a, a_row, a_k, b, b_k, c, c_row, rows, vectors, k, add, zero):
    """A panel of `vectors` vectors of c, all its rows: tall tiles, then the rows that remain one by one."""
    tall = rows // TILE_ROWS
    for _ in range(tall):
        if vectors == TILE_VECTORS:
            tall_wide(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        elif vectors == 2:
            tall_two(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        else:
            tall_one(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        a, c = a + TILE_ROWS * a_row, c + TILE_ROWS * c_row
    for _ in range(rows - tall * TILE_ROWS):
        if vectors == TILE_VECTORS:
            flat_wide(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        elif vectors == 2:
            flat_two(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        else:
            flat_one(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        a, c = a + a_row, c + c_row


@intrinsic
def peek(typing_context, address, zero):
    """The element at an address, of the type of zero."""

    def build(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(signature.return_type).as_pointer())
        return builder.load(pointer)

    return zero(types.intp, zero), build


@intrinsic
def poke(typing_context, address, value):
    """Store value at an address."""

    def build(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, value), build


def move_vectors(vectors):
    """Numba function (to, source): copy `vectors` vectors from one address to another."""

    def build(context, builder, signature, args):
        pointer = ir.VectorType(ir.IntType(8), VECTOR_BYTES * vectors).as_pointer()
        value = builder.load(builder.inttoptr(args[1], pointer))
        value.align = 1
        builder.store(value, builder.inttoptr(args[0], pointer)).align = 1
        return context.get_dummy_value()

    @intrinsic
    def move(typing_context, to, source):
        return types.void(types.intp, types.intp), build

    return move


move_wide, move_one = move_vectors(TILE_VECTORS), move_vectors(1)


@part
def copy_rows(source, step, to, to_step, rows, width, size, zero):
    """`rows` rows of `width` elements from one address and row stride to another."""
    whole = width * size - width * size % VECTOR_BYTES
    for r in range(rows):
        if width * size == TILE_VECTORS * VECTOR_BYTES:
            move_wide(to + r * to_step, source + r * step)
        else:
            for at in range(0, whole, VECTOR_BYTES):
                move_one(to + r * to_step + at, source + r * step + at)
            for at in range(whole, width * size, size):
                poke(to + r * to_step + at, peek(source + r * step + at, zero))


@part
def product_at(a, a_row, a_k, b, b_k, c, c_row, M, N, K, add, panel, size, zero):
    """c (M, N) = a (M, K) b (K, N), or c += a b if add: addresses, strides and `size` of an element in bytes."""
    lanes = VECTOR_BYTES // size
    edge = panel + DEPTH * TILE_VECTORS * VECTOR_BYTES
    panel_a = edge + TILE_ROWS * VECTOR_BYTES
    transposed = a_row == size and M >= PACK_ROWS  # the columns of a, which tiles read, stand in far-off rows: copied
    block = PACKED_A if transposed else M
    for i in range(0, M, block):
        rows = min(block, M - i)
        for k in range(0, K, DEPTH):
            depth, more = min(DEPTH, K - k), 1 if add != 0 or k > 0 else 0
            a_at, a_down, a_right = a + i * a_row + k * a_k, a_row, a_k
            if transposed:
                copy_rows(a_at, a_k, panel_a, rows * size, depth, rows, size, zero)
                a_at, a_right = panel_a, rows * size
            j = 0
            while j < N:
                left = (N - j) // lanes
                vectors = TILE_VECTORS if left >= TILE_VECTORS else 2 if TILE_VECTORS > 2 and left >= 2 else 1
                width = min(vectors * lanes, N - j)
                b_at, b_down, c_at = b + k * b_k + j * size, b_k, c + i * c_row + j * size
                if (M >= PACK_ROWS and b_k != vectors * VECTOR_BYTES) or left == 0:
                    b_down = vectors * VECTOR_BYTES
                    copy_rows(b_at, b_k, panel, b_down, depth, width, size, zero)
                    b_at = panel
                if left > 0:
                    sweep(a_at, a_down, a_right, b_at, b_down, c_at, c_row, rows, vectors, depth, more, zero)
                else:  # less than a vector of c: through a tile of its own, so that nothing beyond c is touched
                    for r in range(0, rows, TILE_ROWS):
                        few = min(TILE_ROWS, rows - r)
                        a_few, c_few = a_at + r * a_down, c_at + r * c_row
                        copy_rows(c_few, c_row, edge, VECTOR_BYTES, few, width, size, zero)
                        sweep(a_few, a_down, a_right, b_at, b_down, edge, VECTOR_BYTES, few, 1, depth, more, zero)
                        copy_rows(edge, VECTOR_BYTES, c_few, c_row, few, width, size, zero)
                j += width


# Numba compiles what a function calls once more for each caller. `product_at` would be most of the machine code of each
# kernel: it is compiled once for each dtype, given a name that the linker finds, and called by that name.


def product_symbol(dtype):
    return f"tinygpt_product_{dtype}"


@functools.cache
def provide_product(dtype):
    """Compile `product_at` for a dtype; before any kernel that calls it is loaded."""
    number, size = numba.from_dtype(np.dtype(dtype)), np.dtype(dtype).itemsize

    def product_of_dtype(a, a_row, a_k, b, b_k, c, c_row, M, N, K, add, panel):
        product_at(a, a_row, a_k, b, b_k, c, c_row, M, N, K, add, panel, size, number(0))

    compiled = numba.cfunc(types.void(*[types.intp] * 12), cache=True)(product_of_dtype)
    binding.add_symbol(product_symbol(number), compiled.address)
    return compiled  # kept: its machine code lives as long as it does


@intrinsic
def product(typing_context, a, b, c, add, panel):
    """c (M, N) = a (M, K) b (K, N), or c += a b if `add`; K >= 1, rows of b and c without gaps, panel (PANEL_SIZE,)."""

    def build(context, builder, signature, args):
        i64 = ir.IntType(64)
        arrays = zip((a, b, c, panel), (*args[:3], args[4]))
        views = [context.make_array(kind)(context, builder, x) for kind, x in arrays]
        at = [builder.ptrtoint(view.data, i64) for view in views]
        down, right = zip(*(cgutils.unpack_tuple(builder, view.strides, 2) for view in views[:3]))
        (M, K), (_, N) = (cgutils.unpack_tuple(builder, views[i].shape, 2) for i in (0, 2))
        matrices = (at[0], down[0], right[0], at[1], down[1], at[2], down[2])
        name, kind = product_symbol(c.dtype), ir.FunctionType(ir.VoidType(), [i64] * 12)
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, (*matrices, M, N, K, builder.zext(args[3], i64), at[3]))
        return context.get_dummy_value()

    return types.void(a, b, c, types.boolean, panel), build


@kernel
def transpose_kernel(task, slot, x, out):
    """out (M, K) = x (K, M)^T, 64 rows of x a task, in squares whose rows and columns both stay in the cache."""
    first, last = task * 64, min(task * 64 + 64, x.shape[0])
    for left in range(0, x.shape[1], 16):
        for k in range(first, last):
            for m in range(left, min(left + 16, x.shape[1])):
                out[m, k] = x[k, m]


def transpose(x, out):
    POOL.run(transpose_kernel, blocks(x.shape[0], 64), x, out)
    return out


GRADIENT_ROWS, GRADIENT_COLUMNS = PACKED_A, 128  # a block of a weight gradient
GRADIENT_CHUNK = 1 << 17  # elements of x and dy that stay in a core's cache while a task's blocks take their share


@kernel
def weight_gradient_kernel(task, slot, per_task, x, dy, dw, db, scratch):
    """dw (K, M) += x (N, K)^T dy (N, M); db (1, M) += sum_n dy. A task owns `per_task` blocks of dw, column after
    column, and the part of db above the first of each column."""
    (N, K), M = x.shape, dw.shape[1]
    rows = max(1, GRADIENT_CHUNK // (K + M) // DEPTH) * DEPTH
    per_column = (K + GRADIENT_ROWS - 1) // GRADIENT_ROWS
    ones = np.ones((1, rows), dw.dtype)
    last_block = min((task + 1) * per_task, per_column * ((M + GRADIENT_COLUMNS - 1) // GRADIENT_COLUMNS))
    for n in range(0, N, rows):
        x_rows, dy_rows = x[n : n + rows], dy[n : n + rows]
        for block in range(task * per_task, last_block):
            k, m = block % per_column * GRADIENT_ROWS, block // per_column * GRADIENT_COLUMNS
            k_end, m_end = min(k + GRADIENT_ROWS, K), min(m + GRADIENT_COLUMNS, M)
            product(x_rows[:, k:k_end].T, dy_rows[:, m:m_end], dw[k:k_end, m:m_end], True, scratch[slot])
            if k == 0 and db.size > 0:
                product(ones[:, : len(dy_rows)], dy_rows[:, m:m_end], db[:, m:m_end], True, scratch[slot])


def weight_gradient(x, dy, dw, db, scratch):
    count = blocks(dw.shape[0], GRADIENT_ROWS) * blocks(dw.shape[1], GRADIENT_COLUMNS)
    per_task = blocks(count, 4 * POOL.threads)
    POOL.run(weight_gradient_kernel, blocks(count, per_task), per_task, x, dy, dw, db.reshape(1, -1), scratch)


# == 6  rows: exponential, norm, activation ============================================================================


@intrinsic
def bits_of(typing_context, x):
    return types.uint32(types.float32), lambda c, builder, s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def float_of(typing_context, x):
    return types.float32(types.uint32), lambda c, builder, s, args: builder.bitcast(args[0], ir.FloatType())


def exp(x):
    """e^x; in float32 within 1.2e-7, by arithmetic that vectorises, held at the ends of -87 .. 88. NaN stays NaN."""
    return math.exp(x)


@overload(
    exp, jit_options={"error_model": "numpy", "fastmath": {"contract"}}
)  # reordered, ln 2 would lose its low part
def exp_by_type(x):
    f, u, i = np.float32, np.uint32, np.int32
    ln2_high, ln2_low = f(0.693359375), f(-2.12194440e-4)  # their sum is ln 2; the first times k is exact

    def exp32(x):
        x = f(-87.0) if x < f(-87.0) else f(88.0) if x > f(88.0) else x
        k = np.rint(x * f(1.4426950408889634))
        r = (x - k * ln2_high) - k * ln2_low  # e^x = 2^k e^r, |r| <= ln2 / 2; polynomial of Moshier's Cephes, expf
        p = f(1.9875691500e-4)
        p = p * r + f(1.3981999507e-3)
        p = p * r + f(8.3334519073e-3)
        p = p * r + f(4.1665795894e-2)
        p = p * r + f(1.6666665459e-1)
        p = p * r + f(5.0000001201e-1)
        p = p * r * r + r + f(1.0)
        return float_of(bits_of(p) + u(i(k) << i(23)))

    return exp32 if x == types.float32 else lambda x: math.exp(x)


@part
def norm_rows(x, w, b, eps, mean, rstd, y):
    """x (rows, C) -> y (rows, C) and the rows' mean and rstd; LayerNorm, section 2.2."""
    one, C = x.dtype.type(1), x.dtype.type(x.shape[1])
    for i in range(x.shape[0]):
        total = square = x.dtype.type(0)
        for c in range(x.shape[1]):
            total += x[i, c]
        m = total / C
        for c in range(x.shape[1]):
            square += (x[i, c] - m) * (x[i, c] - m)
        r = one / np.sqrt(square / C + x.dtype.type(eps))
        mean[i], rstd[i] = m, r
        for c in range(x.shape[1]):
            y[i, c] = (x[i, c] - m) * r * w[c] + b[c]


@part
def norm_rows_backward(dn, x, w, b, mean, rstd, dx, n, sums):
    """dn (rows, C), the gradient of the norm's output -> adds into dx; n = the output again; sums (2, C) = dw, db."""
    C = x.dtype.type(x.shape[1])
    for c in range(x.shape[1]):
        sums[0, c] = sums[1, c] = 0
    for i in range(x.shape[0]):
        m, r = mean[i], rstd[i]
        total = dot = x.dtype.type(0)
        for c in range(x.shape[1]):
            normal = (x[i, c] - m) * r
            total += dn[i, c] * w[c]
            dot += dn[i, c] * w[c] * normal
            sums[0, c] += dn[i, c] * normal
            sums[1, c] += dn[i, c]
            n[i, c] = normal * w[c] + b[c]
        total, dot = total / C, dot / C
        for c in range(x.shape[1]):  # dx = rstd (dn w - mean(dn w) - n mean(dn w n))
            dx[i, c] += r * (dn[i, c] * w[c] - total - (x[i, c] - m) * r * dot)


@part
def add_bias(x, b, y):
    """y (rows, C) = x + b."""
    for i in range(y.shape[0]):
        for c in range(y.shape[1]):
            y[i, c] = x[i, c] + b[c]


@part
def copy(x, y):
    for i in range(y.shape[0]):
        for c in range(y.shape[1]):
            y[i, c] = x[i, c]


# Of a block of columns the compiler does not know that elements are neighbours, of a part of one row it does: so what
# works on columns first .. last - 1 takes whole arrays and cuts them row by row.


@part
def set_rows(b, y, start, stop, first, last):
    """Rows start .. stop - 1 of y (N, F), in these columns, = b (F,)."""
    b = b[first:last]
    for i in range(start, stop):
        row = y[i, first:last]
        for c in range(row.size):
            row[c] = b[c]


@part
def gelu_rows(h, start, first, a):
    """a (rows, columns) = gelu of h (N, F) from row `start`, column `first` on: (1 + tanh u) / 2 = 1 / (1 + e^-2u)."""
    one, scale, cube = h.dtype.type(1), h.dtype.type(2 * GELU_SCALE), h.dtype.type(GELU_CUBE)
    for i in range(a.shape[0]):
        h_row, a_row = h[start + i, first : first + a.shape[1]], a[i]
        for f in range(h_row.size):
            v = h_row[f]
            a_row[f] = v / (one + exp(-scale * (v + cube * v * v * v)))


@part
def gelu_rows_backward(h, da, start, first, a, dh):
    """a and dh (N, F) from row `start` and column `first` on, from h (N, F) and da (rows, columns)."""
    one, scale, cube = h.dtype.type(1), h.dtype.type(2 * GELU_SCALE), h.dtype.type(GELU_CUBE)
    cube3, last = h.dtype.type(3 * GELU_CUBE), first + da.shape[1]
    for i in range(da.shape[0]):
        h_row, da_row = h[start + i, first:last], da[i]
        a_row, dh_row = a[start + i, first:last], dh[start + i, first:last]
        for f in range(h_row.size):
            v = h_row[f]
            s = one / (one + exp(-scale * (v + cube * v * v * v)))  # a = v s, ds/dv = s (1 - s) d(2u)/dv
            a_row[f] = v * s
            dh_row[f] = da_row[f] * (s + v * s * (one - s) * scale * (one + cube3 * v * v))


def maximum(x, count):
    """The largest of x[:count]; a NaN may win or be passed over."""
    return x[:count].max()


@overload(maximum, jit_options={"error_model": "numpy", "fastmath": FASTMATH})
def maximum_by_type(x, count):
    i = np.int32

    def maximum32(x, count):  # as integers in the order of the floats: a maximum of floats does not vectorise
        top = i(-(2**31))
        for s in range(count):
            bits = i(bits_of(x[s]))
            top = max(top, bits ^ ((bits >> i(31)) & i(0x7FFFFFFF)))
        return float_of(np.uint32(top ^ ((top >> i(31)) & i(0x7FFFFFFF))))

    def maximum64(x, count):
        top = x[0]
        for s in range(1, count):
            top = max(top, x[s])
        return top

    return maximum32 if x.dtype == types.float32 else maximum64


@part
def softmax_row(scores, visible, weight):
    """scores (S,) -> weight * softmax of the first `visible`, in place, 0 after them; returns log-sum-exp."""
    top, total = maximum(scores, visible), scores.dtype.type(0)
    for s in range(visible):
        e = exp(scores[s] - top)
        scores[s] = e
        total += e
    scale = weight / total
    for s in range(visible):
        scores[s] *= scale
    for s in range(visible, scores.size):
        scores[s] = 0
    return top + math.log(total)


# == 7  sublayers ======================================================================================================
#
# Each `..._kernels` function has the contract of the function of section 3 that it is named after. It computes in the
# buffers of `space`, which the table below lays out; without `space` it makes its own.

ROW_BLOCK = 16 * TILE_ROWS  # rows of one sequence that a task carries through a sublayer
SCORE_BLOCK = 8 * TILE_ROWS  # query rows whose scores stand in a thread's cache
HEAD_BLOCK = 8 * TILE_ROWS  # rows whose logits a thread computes at a time
HIDDEN_BLOCK = 256  # columns of the MLP's hidden layer that exist at a time outside `space`
HEAD_ROWS = 512  # rows whose logits exist at a time
HEAD_COLUMNS = 64  # of the transposed embedding that stand together: columns of a row of 2^n bytes are far apart


def workspace_layout(cfg, B, T):
    """The kernels' buffers, a table like that of the parameters: what backward needs, layer by layer, then scratch."""
    C, F, L, H, V, S = cfg.width, cfg.hidden, cfg.layers, cfg.heads, cfg.vocab_size, cfg.seq_len
    transposed = max(C * blocks(V, HEAD_COLUMNS) * HEAD_COLUMNS, 3 * C * C, C * F)
    scratch = PANEL_SIZE + max(ROW_BLOCK * (C + HIDDEN_BLOCK), 2 * S * (cfg.head_width + SCORE_BLOCK))
    rows = [  # name, shape, layered
        ("norm1", (2, B, T), True),  # mean, rstd
        ("qkv", (B, T, 3 * C), True),
        ("o", (B, T, C), True),
        ("lse", (B, H, T), True),
        ("attended", (B, T, C), True),
        ("norm2", (2, B, T), True),
        ("h", (B, T, F), True),
        ("mixed", (B, T, C), True),
        ("embedded", (B, T, C), False),
        ("dx", (2, B, T, C), False),
        ("n", (B, T, C), False),
        ("dqkv", (B, T, 3 * C), False),
        ("do", (B, T, C), False),
        ("a", (B, T, F), False),
        ("dh", (B, T, F), False),
        ("logits", (min(HEAD_ROWS, B * T), V + 16), False),  # a row of 2^n bytes would use few sets of the cache
        ("nats", (B, T), False),
        ("sums", (B * blocks(T, ROW_BLOCK), 2, C), False),
        ("head_sums", (B * blocks(T, HEAD_BLOCK), 2, C), False),
        ("transposed", (transposed,), False),
        ("scratch", (POOL.threads, scratch), False),
    ]
    table, offset = [], 0
    for name, shape, layered in rows:
        shape = (L, *shape) if layered else shape
        table.append(Tensor(name, shape, offset, layered, False, 0.0, 0.0))
        offset += blocks(math.prod(shape), CACHE_LINE) * CACHE_LINE
    return table


def workspace(cfg, B, T, dtype):
    """Views of one new buffer for `workspace_layout`; each layer's dictionary also names the shared ones."""
    provide_product(np.dtype(dtype).name)
    table = workspace_layout(cfg, B, T)
    flat = aligned(table[-1].offset + math.prod(table[-1].shape), dtype)
    space = views(table, flat, cfg.layers)
    for layer in space["layers"]:
        layer.update((name, view) for name, view in space.items() if name != "layers")
    return space


def scratch_of(space):
    """The threads' scratch (threads, size); ValueError if there are more threads than when it was made."""
    if len(space["scratch"]) < POOL.threads:
        made = len(space["scratch"])
        raise ValueError(f"workspace has scratch for {made} threads, the pool has {POOL.threads}; make another")
    return space["scratch"]


def layer_space(space, cfg, x):
    return space or workspace(dataclasses.replace(cfg, layers=1), *x.shape[:2], x.dtype)["layers"][0]


def blocks(T, size):
    return -(-T // size)


@part
def block_rows(task, T, size):
    """First and last + 1 row of a task: blocks of `size` rows that never cross from one sequence into the next."""
    per_sequence = (T + size - 1) // size
    sequence, block = task // per_sequence, task % per_sequence
    start = sequence * T + block * size
    return start, min(start + size, (sequence + 1) * T)


@kernel
def add_in_order_kernel(task, slot, sums, dw, db):
    """dw, db (C,) += sums (blocks, 2, C), one block after the other."""
    for i in range(sums.shape[0]):
        for c in range(dw.size):
            dw[c] += sums[i, 0, c]
            db[c] += sums[i, 1, c]


# == 7.1  embed ========================================================================================================


@kernel
def embed_kernel(task, slot, tokens, w, positions, x):
    B, T, C = x.shape
    for t in range(T):
        row = tokens[task, t]
        for c in range(C):
            x[task, t, c] = w[row, c] + positions[t, c]


@kernel
def embed_backward_kernel(task, slot, tokens, dx, dw, dpositions):
    """The columns 32 task .. 32 task + 31 of all rows, in order: a token that repeats adds up."""
    B, T, C = dx.shape
    for b in range(B):
        for t in range(T):
            row = tokens[b, t]
            for c in range(32 * task, min(32 * task + 32, C)):
                dw[row, c] += dx[b, t, c]
                dpositions[t, c] += dx[b, t, c]


def embed_forward_kernels(tokens, p, cfg, start=0, space=None):
    B, T = tokens.shape
    x = space["embedded"] if space else np.empty((B, T, cfg.width), p["embed_w"].dtype)
    tokens = np.ascontiguousarray(tokens, np.int64)
    POOL.run(embed_kernel, B, tokens, p["embed_w"], p["position_w"][start : start + T], x)
    return x, (tokens,)


def embed_backward_kernels(dx, cache, g, cfg, space=None):
    positions = g["position_w"][: dx.shape[1]]
    POOL.run(embed_backward_kernel, blocks(cfg.width, 32), *cache, np.ascontiguousarray(dx), g["lookup_w"], positions)


# == 7.2  attention layer ==============================================================================================


@kernel
def norm_linear_kernel(task, slot, x, norm_w, norm_b, eps, w, b, T, stats, y, scratch):
    """x (N, C) -> y (N, M) = norm(x) w + b; stats (2, N) = mean, rstd."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    panel, n = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE : PANEL_SIZE + (stop - start) * x.shape[1]]
    n = n.reshape(stop - start, x.shape[1])
    norm_rows(x[start:stop], norm_w, norm_b, eps, stats[0, start:stop], stats[1, start:stop], n)
    set_rows(b, y, start, stop, 0, y.shape[1])
    product(n, w, y[start:stop], True, panel)


@part
def transposed(kv, b, which, h, scale, out):
    """out (D, S) = scale * kv[b, :S, which, h]^T."""
    D, S = out.shape
    for first in range(0, S, 16):
        for d in range(D):
            row = out[d]
            for s in range(first, min(first + 16, S)):
                row[s] = kv[b, s, which, h, d] * scale


@kernel
def attention_kernel(task, slot, qkv, kv, which, S, o, lse, scratch):
    """One head of one sequence: q in qkv[:, :, 0] (B, T, 3, H, D), S keys in kv[:, :S, which], values in which + 1
    -> o (B, T, H, D), lse (B, H, T). Section 2.4, SCORE_BLOCK rows of scores at a time, and of those only the columns
    that their last row sees."""
    B, T, _, H, D = qkv.shape
    b, h, one = task // H, task % H, qkv.dtype.type(1)
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:]
    k_T, rest = rest[: D * S].reshape(D, S), rest[D * S :]
    transposed(kv, b, which, h, qkv.dtype.type(1 / math.sqrt(D)), k_T)
    for first in range(0, T, SCORE_BLOCK):
        last = min(first + SCORE_BLOCK, T)
        seen = S - T + last
        p = rest[: (last - first) * seen].reshape(last - first, seen)
        product(qkv[b, first:last, 0, h], k_T[:, :seen], p, False, panel)
        for t in range(first, last):
            lse[b, h, t] = softmax_row(p[t - first], S - T + t + 1, one)
        product(p, kv[b, :seen, which + 1, h], o[b, first:last, h], False, panel)


@kernel
def linear_residual_kernel(task, slot, x, o, w, b, T, y, scratch):
    """y (N, M) = x + o w + b."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    add_bias(x[start:stop], b, y[start:stop])
    product(o[start:stop], w, y[start:stop], True, scratch[slot])


@kernel
def linear_backward_kernel(task, slot, dy, w_T, T, dx, scratch):
    """dx (N, K) = dy (N, M) w^T."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    product(dy[start:stop], w_T, dx[start:stop], False, scratch[slot])


@kernel
def attention_backward_kernel(task, slot, qkv, o, lse, do, dqkv, scratch):
    """One head of one sequence: qkv, dqkv (B, T, 3, H, D), o, do (B, T, H, D), lse (B, H, T); writes dqkv."""
    B, T, _, H, D = qkv.shape
    b, h, zero, one, scale = task // H, task % H, o.dtype.type(0), o.dtype.type(1), o.dtype.type(1 / math.sqrt(D))
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:]
    k_T, v_T, rest = rest[: D * T].reshape(D, T), rest[D * T : 2 * D * T].reshape(D, T), rest[2 * D * T :]
    transposed(qkv, b, 1, h, scale, k_T)
    transposed(qkv, b, 2, h, one, v_T)
    for s in range(T):
        for which in range(1, 3):
            row = dqkv[b, s, which, h]
            for d in range(D):
                row[d] = zero
    for first in range(0, T, SCORE_BLOCK):
        last = min(first + SCORE_BLOCK, T)
        size = (last - first) * last
        p, ds = rest[:size].reshape(last - first, last), rest[size : 2 * size].reshape(last - first, last)
        q, do_rows = qkv[b, first:last, 0, h], do[b, first:last, h]
        product(q, k_T[:, :last], p, False, panel)
        product(do_rows, v_T[:, :last], ds, False, panel)
        for t in range(first, last):
            row, drow, o_row, do_row, shift, mean = (
                p[t - first],
                ds[t - first],
                o[b, t, h],
                do[b, t, h],
                lse[b, h, t],
                zero,
            )
            for d in range(D):
                mean += do_row[d] * o_row[d]  # sum_s dp_s p_s = sum_d do_d o_d
            for s in range(t + 1):
                row[s] = exp(row[s] - shift)
                drow[s] = row[s] * (drow[s] - mean) * scale
            for s in range(t + 1, last):
                row[s] = drow[s] = zero
        product(ds, qkv[b, :last, 1, h], dqkv[b, first:last, 0, h], False, panel)
        product(ds.T, q, dqkv[b, :last, 1, h], True, panel)
        product(p.T, do_rows, dqkv[b, :last, 2, h], True, panel)


@kernel
def linear_norm_backward_kernel(task, slot, dy, dlinear, w_T, x, norm_w, norm_b, stats, T, dx, n, sums, scratch):
    """dx (N, C) = dy + norm_backward(dlinear w^T), n (N, C) = norm(x) again, sums (tasks, 2, C) of the norm's."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    panel, dn = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE : PANEL_SIZE + (stop - start) * x.shape[1]]
    dn = dn.reshape(stop - start, x.shape[1])
    product(dlinear[start:stop], w_T, dn, False, panel)
    copy(dy[start:stop], dx[start:stop])
    mean, rstd = stats[0, start:stop], stats[1, start:stop]
    norm_rows_backward(dn, x[start:stop], norm_w, norm_b, mean, rstd, dx[start:stop], n[start:stop], sums[task])


def attention_layer_forward_kernels(x, p, cfg, past=None, space=None):
    B, T, C = x.shape
    H, D, tasks = cfg.heads, cfg.head_width, B * blocks(T, ROW_BLOCK)
    s = layer_space(space, cfg, x)
    x_NC, stats = np.ascontiguousarray(x).reshape(-1, C), s["norm1"].reshape(2, -1)
    qkv, o, y, scratch = s["qkv"], s["o"], s["attended"], scratch_of(s)
    norm_w, norm_b = p["norm1_w"], p["norm1_b"]
    qkv_NM = qkv.reshape(-1, 3 * C)
    POOL.run(
        norm_linear_kernel, tasks, x_NC, norm_w, norm_b, cfg.norm_eps, p["qkv_w"], p["qkv_b"], T, stats, qkv_NM, scratch
    )
    qkv_BT3HD, kv, which, S = qkv.reshape(B, T, 3, H, D), qkv.reshape(B, T, 3, H, D), 1, T
    if past is not None:
        (kv, start), which = past, 0
        kv[:, start : start + T] = qkv_BT3HD[:, :, 1:]
        S = start + T
    POOL.run(attention_kernel, B * H, qkv_BT3HD, kv, which, S, o.reshape(B, T, H, D), s["lse"], scratch)
    y_NC, o_NC = y.reshape(-1, C), o.reshape(-1, C)
    POOL.run(linear_residual_kernel, tasks, x_NC, o_NC, p["out_w"], p["out_b"], T, y_NC, scratch)
    return y, (x_NC, s)


def attention_layer_backward_kernels(dy, cache, p, g, cfg, space=None):
    x_NC, s = cache
    B, T, C = dy.shape
    H, D, tasks, scratch = cfg.heads, cfg.head_width, B * blocks(T, ROW_BLOCK), scratch_of(s)
    dy_NC = np.ascontiguousarray(dy).reshape(-1, C)
    do, dqkv, o_NC, n = s["do"], s["dqkv"], s["o"].reshape(-1, C), s["n"].reshape(-1, C)

    out_w_T = transpose(p["out_w"], s["transposed"][: C * C].reshape(C, C))
    POOL.run(linear_backward_kernel, tasks, dy_NC, out_w_T, T, do.reshape(-1, C), scratch)
    weight_gradient(o_NC, dy_NC, g["out_w"], g["out_b"], scratch)

    qkv, dqkv_BT3HD, do_BTHD = s["qkv"].reshape(B, T, 3, H, D), dqkv.reshape(B, T, 3, H, D), do.reshape(B, T, H, D)
    o_BTHD = s["o"].reshape(B, T, H, D)
    POOL.run(attention_backward_kernel, B * H, qkv, o_BTHD, s["lse"], do_BTHD, dqkv_BT3HD, scratch)

    dqkv_NM = dqkv.reshape(-1, 3 * C)
    qkv_w_T = transpose(p["qkv_w"], s["transposed"][: 3 * C * C].reshape(3 * C, C))
    dx = norm_backward_kernels(dy_NC, dqkv_NM, qkv_w_T, x_NC, p["norm1_w"], p["norm1_b"], s["norm1"], T, s["dx"][1], s)
    weight_gradient(n, dqkv_NM, g["qkv_w"], g["qkv_b"], scratch)
    POOL.run(add_in_order_kernel, 1, s["sums"], g["norm1_w"], g["norm1_b"])
    return dx


def norm_backward_kernels(dy_NC, dlinear, w_T, x_NC, norm_w, norm_b, stats, T, dx, s):
    """dx (B, T, C) = dy + norm_backward(dlinear w^T)."""
    stats, dx_NC, n = stats.reshape(2, -1), dx.reshape(x_NC.shape), s["n"].reshape(x_NC.shape)
    tail = (w_T, x_NC, norm_w, norm_b, stats, T, dx_NC, n, s["sums"], scratch_of(s))
    POOL.run(linear_norm_backward_kernel, len(s["sums"]), dy_NC, dlinear, *tail)
    return dx


# == 7.3  MLP layer ====================================================================================================


@kernel
def mlp_kernel(task, slot, x, norm_w, norm_b, eps, up_w, up_b, down_w, down_b, T, stats, h, y, scratch):
    """y (N, C) = x + gelu(norm(x) up_w + up_b) down_w + down_b; keeps h (N, F) before the activation."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    (rows, C), F = (stop - start, x.shape[1]), h.shape[1]
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:]
    n = rest[: rows * C].reshape(rows, C)
    norm_rows(x[start:stop], norm_w, norm_b, eps, stats[0, start:stop], stats[1, start:stop], n)
    add_bias(x[start:stop], down_b, y[start:stop])
    for f in range(0, F, HIDDEN_BLOCK):
        width = min(HIDDEN_BLOCK, F - f)
        a, h_block = rest[rows * C : rows * (C + width)].reshape(rows, width), h[start:stop, f : f + width]
        set_rows(up_b, h, start, stop, f, f + width)
        product(n, up_w[:, f : f + width], h_block, True, panel)
        gelu_rows(h, start, f, a)
        product(a, down_w[f : f + width], y[start:stop], True, panel)


@kernel
def mlp_backward_kernel(task, slot, dy, h, down_w_T, T, a, dh, scratch):
    """dh (N, F) = dgelu(h) * (dy down_w^T), and a (N, F) = gelu(h) again."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    rows, F = stop - start, h.shape[1]
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:]
    for f in range(0, F, HIDDEN_BLOCK):
        width = min(HIDDEN_BLOCK, F - f)
        da = rest[: rows * width].reshape(rows, width)
        product(dy[start:stop], down_w_T[:, f : f + width], da, False, panel)
        gelu_rows_backward(h, da, start, f, a, dh)


def mlp_layer_forward_kernels(x, p, cfg, space=None):
    B, T, C = x.shape
    s = layer_space(space, cfg, x)
    x_NC, stats, h, y = np.ascontiguousarray(x).reshape(-1, C), s["norm2"].reshape(2, -1), s["h"], s["mixed"]
    weights = (p["up_w"], p["up_b"], p["down_w"], p["down_b"])
    outputs = (stats, h.reshape(-1, cfg.hidden), y.reshape(-1, C), scratch_of(s))
    tasks = B * blocks(T, ROW_BLOCK)
    POOL.run(mlp_kernel, tasks, x_NC, p["norm2_w"], p["norm2_b"], cfg.norm_eps, *weights, T, *outputs)
    return y, (x_NC, s)


def mlp_layer_backward_kernels(dy, cache, p, g, cfg, space=None):
    x_NC, s = cache
    (B, T, C), F, scratch = dy.shape, cfg.hidden, scratch_of(s)
    dy_NC = np.ascontiguousarray(dy).reshape(-1, C)
    h, a, dh, n = (s[name].reshape(B * T, -1) for name in ("h", "a", "dh", "n"))
    down_w_T = transpose(p["down_w"], s["transposed"][: C * F].reshape(C, F))
    POOL.run(mlp_backward_kernel, B * blocks(T, ROW_BLOCK), dy_NC, h, down_w_T, T, a, dh, scratch)
    weight_gradient(a, dy_NC, g["down_w"], g["down_b"], scratch)
    up_w_T = transpose(p["up_w"], s["transposed"][: C * F].reshape(F, C))
    dx = norm_backward_kernels(dy_NC, dh, up_w_T, x_NC, p["norm2_w"], p["norm2_b"], s["norm2"], T, s["dx"][0], s)
    weight_gradient(n, dh, g["up_w"], g["up_b"], scratch)
    POOL.run(add_in_order_kernel, 1, s["sums"], g["norm2_w"], g["norm2_b"])
    return dx


# == 7.4  head =========================================================================================================


@kernel
def head_panels_kernel(task, slot, embed_w, panels):
    """panels (blocks, C, HEAD_COLUMNS) = embed_w (V, C)^T, HEAD_COLUMNS columns at a time."""
    first = task * HEAD_COLUMNS
    for c in range(embed_w.shape[1]):
        for v in range(min(HEAD_COLUMNS, embed_w.shape[0] - first)):
            panels[task, c, v] = embed_w[first + v, c]


@kernel
def head_kernel(
    task, slot, earlier, x, norm_w, norm_b, eps, embed_w, panels, targets, weights, T, backward,
    logits, nats, dx, n, sums, scratch,
):  # fmt: skip
    """Block earlier + task of HEAD_BLOCK rows: norm, logits, cross-entropy, and backward to dx (N, C) if `backward`.

    Fills logits (HEAD_ROWS, V), nats (N,), dx, n (N, C), sums (blocks, 2, C).
    """
    start, stop = block_rows(earlier + task, T, HEAD_BLOCK)
    top = start - block_rows(earlier, T, HEAD_BLOCK)[0]  # the row of `logits` that is row `start`
    (rows, C), V = (stop - start, x.shape[1]), embed_w.shape[0]
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:]
    dn, stats = rest[: rows * C].reshape(rows, C), rest[rows * C : rows * (C + 2)].reshape(2, rows)
    mean, rstd = stats[0], stats[1]
    norm_rows(x[start:stop], norm_w, norm_b, eps, mean, rstd, n[start:stop])
    block = logits[top : top + rows, :V]
    for v in range(0, V, HEAD_COLUMNS):
        columns = block[:, v : v + HEAD_COLUMNS]
        product(n[start:stop], panels[v // HEAD_COLUMNS, :, : columns.shape[1]], columns, False, panel)
    for i in range(rows):
        target, weight = targets[start + i], weights[start + i]
        score = block[i, target]
        nats[start + i] = softmax_row(logits[top + i], V, weight) - score
        block[i, target] -= weight
    if backward:
        product(block, embed_w, dn, False, panel)
        for i in range(start, stop):
            for c in range(C):
                dx[i, c] = 0
        dx_rows, dw_db = dx[start:stop], sums[earlier + task]
        norm_rows_backward(dn, x[start:stop], norm_w, norm_b, mean, rstd, dx_rows, n[start:stop], dw_db)


@kernel
def head_logits_kernel(task, slot, n_T, embed_w, logits_T, scratch):
    """logits_T (V, N) = embed_w (V, C) n_T (C, N), 960 rows of the vocabulary a task."""
    first = task * 960
    product(embed_w[first : first + 960], n_T, logits_T[first : first + 960], False, scratch[slot])


def head_logits_kernels(x, p, cfg, space=None):
    n, _ = layernorm_forward(x, p["norm_w"], p["norm_b"], cfg.norm_eps)  # a row or a few
    logits_T = np.empty((cfg.vocab_size, len(x)), x.dtype)
    provide_product(x.dtype.name)
    scratch = scratch_of(space) if space else np.empty((POOL.threads, PANEL_SIZE), x.dtype)
    tasks = blocks(cfg.vocab_size, 960)
    POOL.run(head_logits_kernel, tasks, np.ascontiguousarray(n.T), p["embed_w"], logits_T, scratch)
    return logits_T.T


def head_loss_kernels(x, targets, weights, p, g, cfg, space=None):
    (B, T, C), V = x.shape, cfg.vocab_size
    s = space or workspace(dataclasses.replace(cfg, layers=1), B, T, x.dtype)
    x_NC, dx, n, nats = np.ascontiguousarray(x).reshape(-1, C), s["dx"][1], s["n"].reshape(-1, C), s["nats"]
    embed_w, sums, scratch = p["embed_w"], s["head_sums"], scratch_of(s)
    count = blocks(V, HEAD_COLUMNS)
    panels = s["transposed"][: count * C * HEAD_COLUMNS].reshape(count, C, HEAD_COLUMNS)
    POOL.run(head_panels_kernel, count, embed_w, panels)
    flat_targets = np.ascontiguousarray(targets, np.int64).reshape(-1)
    flat_weights = np.ascontiguousarray(weights, x.dtype).reshape(-1)
    inputs = (x_NC, p["norm_w"], p["norm_b"], cfg.norm_eps, embed_w, panels, flat_targets, flat_weights, T)
    outputs = (s["logits"], nats.reshape(-1), dx.reshape(-1, C), n, sums, scratch)
    at_once = max(1, HEAD_ROWS // HEAD_BLOCK)
    for first in range(0, len(sums), at_once):
        last = min(first + at_once, len(sums))
        POOL.run(head_kernel, last - first, first, *inputs, g is not None, *outputs)
        if g is not None:
            start, stop = block_rows(first, T, HEAD_BLOCK)[0], block_rows(last - 1, T, HEAD_BLOCK)[1]
            dlogits = s["logits"][: stop - start, :V]
            weight_gradient(dlogits, n[start:stop], g["embed_w"], np.empty(0, x.dtype), scratch)
    if g is not None:
        POOL.run(add_in_order_kernel, 1, sums, g["norm_w"], g["norm_b"])
    return float((weights * nats).sum()), nats, dx


# == 8  tables of ops ==================================================================================================

OPS = {
    "numpy": {
        "embed_forward": embed_forward,
        "embed_backward": embed_backward,
        "attention_layer_forward": attention_layer_forward,
        "attention_layer_backward": attention_layer_backward,
        "mlp_layer_forward": mlp_layer_forward,
        "mlp_layer_backward": mlp_layer_backward,
        "head_logits": head_logits,
        "head_loss": head_loss,
    },
    "numba": {
        "embed_forward": embed_forward_kernels,
        "embed_backward": embed_backward_kernels,
        "attention_layer_forward": attention_layer_forward_kernels,
        "attention_layer_backward": attention_layer_backward_kernels,
        "mlp_layer_forward": mlp_layer_forward_kernels,
        "mlp_layer_backward": mlp_layer_backward_kernels,
        "head_logits": head_logits_kernels,
        "head_loss": head_loss_kernels,
    },
}


# ######################################################################################################################
# Part III: sizes, decoding, checkpoints, checks
# ######################################################################################################################

# == 9  sizes ==========================================================================================================

SIZES = {  # of our own: the GPT-2 architecture at widths that a laptop trains; their names are rounded totals
    "700k": Config(vocab_size=4096, seq_len=256, width=64, layers=8, heads=4),
    "1m": Config(vocab_size=4096, seq_len=256, width=128, layers=4, heads=4),
    "8m": Config(vocab_size=4096, seq_len=512, width=256, layers=8, heads=8),
    "28m": Config(vocab_size=4096, seq_len=512, width=512, layers=8, heads=8),
}

# == 10  decoding ======================================================================================================


def one_layer_space(cfg, B, T, dtype):
    """A workspace in which the layers take turns in the buffers of one: for a forward that no backward follows."""
    space = workspace(dataclasses.replace(cfg, layers=1), B, T, dtype)
    space["layers"] *= cfg.layers
    return space


class Decoding:
    """One text that grows: the keys and values of the window's tokens, so that each is computed once.

    When the window is full, its newer half is run again as one block, and the text goes on without end. Within what is
    kept the logits are those of `forward` on the whole window.
    """

    def __init__(self, p, cfg, ops):
        self.p, self.cfg, self.ops = p, cfg, ops
        self.window = []
        dtype = p["embed_w"].dtype
        self.kv = np.empty((cfg.layers, 1, cfg.seq_len, 2, cfg.heads, cfg.head_width), dtype)
        self.one_token = one_layer_space(cfg, 1, 1, dtype)

    def feed(self, ids):
        """Append token ids (at least one) -> logits (V,) of what follows them."""
        start, new = len(self.window), list(ids)
        if start + len(new) > self.cfg.seq_len:
            start, new = 0, (self.window + new)[-max(1, self.cfg.seq_len // 2) :]
        tokens = np.array([new], np.int64)  # (1, T)
        check_tokens(tokens, start, self.cfg)
        self.window = self.window[:start] + new
        space = self.one_token if len(new) == 1 else one_layer_space(self.cfg, 1, len(new), self.kv.dtype)
        x, _ = forward(self.p, tokens, self.cfg, self.ops, (self.kv, start), space)
        return self.ops["head_logits"](x[:, -1], self.p, self.cfg, space)[0]


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, banned=()):
    """logits (V,) -> what to draw the next token from, (V,) float64: temperature, then top-k, then top-p.

    temperature 0 is all on the likeliest; top_k 0 and top_p 1 are off. `banned` ids are never drawn.
    """
    logits = logits.astype(np.float64)
    logits[list(banned)] = -math.inf
    if temperature == 0:
        return (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is right
        logits = (logits - logits.max()) / temperature
    if top_k and top_k < len(logits):
        logits[np.argsort(-logits, kind="stable")[top_k:]] = -math.inf
    p = np.exp(logits)
    p /= p.sum()
    if top_p < 1:  # the fewest likeliest tokens that together have top_p: at least one
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[1:][before[1:] >= top_p]] = 0
    return p / p.sum()


def generate(decoding, ids, seed, stop, max_new_tokens, **filters):
    """Yield ids that follow `ids` (at least one), until `stop` (not yielded) or max_new_tokens; `filters` as above."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    for _ in range(max_new_tokens):
        cumulative = np.cumsum(probabilities(decoding.feed(ids), **filters))
        token = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        if token == stop:
            return
        yield token
        ids = [token]


# == 11  checkpoints ===================================================================================================
#
# A `.safetensors` file: the length of a JSON header (8 bytes, little-endian), the header, the tensors without gaps.
# https://github.com/huggingface/safetensors#format. Parameters stand under the names of `layout`, in its order; the
# header's metadata (strings) holds the configuration and the whole tokenizer.

FORMAT, FORMAT_VERSION = "tinygpt", "1"
DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


def write_aside(path, chunks):
    """Write byte chunks to `path` so that it holds all of them or is as it was: written aside, flushed, renamed."""
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        with open(aside, "wb") as f:
            for chunk in chunks:
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # a full disk is not kept full
        raise
    if os.name == "posix":  # the folder's entry as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_safetensors(path, tensors, metadata):
    """tensors: name -> float32 or float64 array; metadata: name -> string."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {"__metadata__": metadata}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = (memoryview(np.ascontiguousarray(x)).cast("B") for x in tensors.values())
    write_aside(path, (struct.pack("<Q", len(text)), text, *data))


def read_safetensors(path):
    """(tensors, metadata) as given to `write_safetensors`, read whole. ValueError for anything else."""
    data = Path(path).read_bytes()

    def refuse(what):
        raise ValueError(f"{path} is not a checkpoint that can be read: {what}")

    if len(data) < 8:
        refuse(f"it has {len(data)} bytes")
    start = 8 + struct.unpack("<Q", data[:8])[0]
    if start > len(data):
        refuse(f"it is cut short or of another format (its header claims {start} bytes, the file has {len(data)})")
    try:
        header = json.loads(data[8:start])
        metadata = header.pop("__metadata__", {})
        rows = [(name, DTYPES[t["dtype"]], tuple(t["shape"]), *t["data_offsets"]) for name, t in header.items()]
        whole = all(type(n) is int and 0 <= n < 2**48 for row in rows for n in (*row[2], *row[3:]))
        fits = whole and all(len(row) == 5 and len(row[2]) <= 8 for row in rows)
        if not fits or not all(type(text) is str for text in metadata.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        refuse("its header is not that of a .safetensors file of float32 or float64 tensors")
    tensors, expected = {}, 0
    for name, dtype, shape, begin, end in sorted(rows, key=lambda row: row[3:]):
        if begin != expected:
            refuse(f"tensor {name} starts at byte {begin}; expected {expected}")
        expected = begin + math.prod(shape) * dtype.itemsize
        if end != expected or start + end > len(data):
            refuse(f"it is cut short (tensor {name} ends at byte {start + expected}, the file at {len(data)})")
        tensors[name] = np.frombuffer(data, dtype, math.prod(shape), start + begin).reshape(shape)
    if start + expected != len(data):
        refuse(f"{len(data) - start - expected} bytes follow its last tensor")
    return tensors, metadata


class Checkpoint(NamedTuple):
    parameters: np.ndarray  # flat (count,)
    cfg: Config
    tokenizer: str  # the text of tokenizer.json
    extra: dict  # further tensors, such as moments
    metadata: dict  # strings


def save_checkpoint(path, parameters, cfg, tokenizer, extra=None, metadata=None):
    """Write a model, flat parameters (count,), to `path`; OSError if it cannot, and then `path` is as it was."""
    named = {t.name: parameters[t.offset : t.offset + math.prod(t.shape)].reshape(t.shape) for t in layout(cfg)}
    own = {"format": FORMAT, "version": FORMAT_VERSION, "config": json.dumps(dataclasses.asdict(cfg))}
    write_safetensors(path, named | (extra or {}), own | {"tokenizer": tokenizer} | (metadata or {}))


def load_checkpoint(path):
    """A `Checkpoint`; ValueError if the file is not one, OSError if it cannot be read."""
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT or metadata.get("version") != FORMAT_VERSION:
        found = f"format {metadata.get('format')}, version {metadata.get('version')}"
        raise ValueError(f"{path} has {found}; expected format {FORMAT}, version {FORMAT_VERSION}")
    try:
        cfg = Config(**json.loads(metadata["config"]))
        tokenizer = metadata["tokenizer"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe its model: {error}") from None
    parts = []
    for t in layout(cfg):
        x = tensors.pop(t.name, None)
        if x is None or x.shape != t.shape:
            raise ValueError(f"{path}: tensor {t.name} is {'missing' if x is None else x.shape}; expected {t.shape}")
        parts.append(x.reshape(-1))
    return Checkpoint(np.concatenate(parts), cfg, tokenizer, tensors, metadata)


# == 12  checks: gradients against central differences, (f(x + h) - f(x - h)) / 2h =====================================


def numerical_gradient(loss, x, h=1e-5):
    """d loss() / dx for every element of x (float64), which loss reads; x is put back."""
    slope = np.empty_like(x)
    for i in np.ndindex(x.shape):
        old = x[i]
        x[i] = old + h
        above = loss()
        x[i] = old - h
        slope[i] = (above - loss()) / (2 * h)
        x[i] = old
    return slope


def gradient_error(analytic, numeric):
    """The largest |a - n| / (max(|a|, |n|) + 0.01): below 1e-6 where |a - n| < 1e-8 + 1e-6 max(|a|, |n|)."""
    size = np.maximum(np.abs(analytic), np.abs(numeric))
    return float((np.abs(analytic - numeric) / (size + 0.01)).max())


def check_model(cfg, ops, seed=0, B=2, h=1e-5):
    """[(tensor, relative error)]: for each parameter tensor, the gradient of the whole model in float64 along a random
    direction against the central difference along it."""
    rng = np.random.default_rng(seed)
    flat = init_parameters(cfg, seed, np.float64)
    flat += 0.2 * rng.standard_normal(flat.shape)  # biases and gains away from 0 and 1
    p, (gradient, grads) = views(layout(cfg), flat, cfg.layers), zero_gradients(cfg, np.float64)
    tokens = rng.integers(0, cfg.vocab_size, (B, cfg.seq_len + 1))
    weights = rng.uniform(0.5, 1.5, (B, cfg.seq_len))

    def loss(g=None):
        return loss_and_gradients(p, tokens[:, :-1], tokens[:, 1:], weights, g, cfg, ops)[0]

    loss(grads)
    join_tied(grads)
    errors = []
    for t in layout(cfg):
        here = slice(t.offset, t.offset + math.prod(t.shape))
        direction = rng.standard_normal(here.stop - here.start)
        direction /= np.linalg.norm(direction)
        kept, slopes = flat[here].copy(), []
        for step in (h, -h):
            flat[here] = kept + step * direction
            slopes.append(loss())
        flat[here] = kept
        analytic = np.array([gradient[here] @ direction])
        errors.append((t.name, gradient_error(analytic, np.array([(slopes[0] - slopes[1]) / (2 * h)]))))
    return errors


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prove the model's gradients.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="every gradient of the model against finite differences, in float64")
    check.add_argument("--seed", type=int, default=0, help="of the random parameters, tokens and directions")
    args = parser.parse_args(argv)
    cfg, limit = Config(vocab_size=11, seq_len=5, width=12, layers=2, heads=3, hidden=7, position_rows=6), 1e-6
    tables = {name: dict(check_model(cfg, ops, args.seed)) for name, ops in OPS.items()}
    print(f"relative error of each gradient in float64, limit {limit:.0e}; {cfg}")
    print(f"{'tensor':12s}" + "".join(f"{name:>12s}" for name in tables))
    for t in layout(cfg):
        print(f"{t.name:12s}" + "".join(f"{table[t.name]:12.1e}" for table in tables.values()))
    worst = max(max(table.values()) for table in tables.values())
    print(f"worst {worst:.1e}: {'passed' if worst < limit else 'FAILED'}")
    return 0 if worst < limit else 1


if __name__ == "__main__":
    sys.exit(main())
