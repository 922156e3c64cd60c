"""A transformer that tells stories: the model, its gradients by hand, its kernels.

    python tinygpt.py check        # every gradient against finite differences, with the errors found

Part I is the specification, in NumPy, and is complete: a reader who stops there has read the whole model and its
gradients. Part II compiles the primitives that the sublayers call, in plain Numba. Part III is what surrounds a model.
The folder fast/ computes the same sublayers at the limit of the machine.

    Part I    1 configuration and parameters    2 primitives    3 sublayers    4 the model
    Part II   5 compiling    6 products    7 attention    8 rows
    Part III  9 threads, tables of ops    10 configurations    11 checkpoints

Symbols, here and everywhere:

    B  sequences in a micro-batch                   H  query heads;  G  key/value heads, G divides H
    T  query positions                              D  width of one head
    S  key positions (T in training, the cache's    F  hidden width of the MLP
       length in decoding)                          V  vocabulary size
    C  model width                                  L  layers
    N  B * T, rows after flattening                 P  rows of the position table

`dx` is the gradient of the loss with respect to `x`: same shape, same dtype. Weights are (in, out): a linear layer is
`x @ w + b`. A forward returns (out, cache); its backward takes (dout, cache, gradients), ADDS into the gradients and
returns only dx: one rule for accumulation over micro-batches, for tied weights and for kernels that work in place.
"""

import _thread
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import queue
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import binding
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.extending import overload, register_jitable

# ######################################################################################################################
# Part I: the specification
# ######################################################################################################################

# == 1.1  configuration ================================================================================================

CHOICES = {  # names that fields of Config may have; of norm and mlp, the keys of NORMS (2.2) and ACTIVATIONS (2.3)
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "rope", "rope-half", "alibi", "none"),
    "mlp": ("gelu-tanh", "gelu", "silu", "relu2", "swiglu"),
    "init": ("fan-in", "gpt2", "normal", "torch", "lillm"),
}


@dataclass(frozen=True)
class Config:
    """The shape of a model. Fields left at 0 take the value that their comment names. ValueError if they do not fit."""

    vocab_size: int  # V
    seq_len: int  # T, the longest window that is trained
    width: int  # C
    layers: int  # L
    heads: int  # H
    kv_heads: int = 0  # G, each serves H / G query heads; 0 is H
    head_width: int = 0  # D; 0 is C / H
    hidden: int = 0  # F; 0 is 4 C
    norm: str = "layernorm"  # layernorm, rmsnorm
    norm_gain: bool = True
    norm_bias: bool = True  # of layernorm; rmsnorm has none
    norm_eps: float = 1e-5
    embedding_norm: bool = False  # directly after the embedding
    final_norm: bool = True
    qk_norm: bool = False  # RMSNorm of every head's queries and keys
    positions: str = "learned"  # learned, rope (pairs of neighbours), rope-half (pairs D/2 apart), alibi, none
    position_rows: int = 0  # P, rows of the learned position table; 0 is seq_len
    rope_theta: float = 10000.0
    attention_scale: bool = True  # scores divided by sqrt(D)
    window: int = 0  # keys that layers 1, 3, 5, ... see, the query's own among them; 0 is all
    mlp: str = "gelu-tanh"  # or gelu, silu, relu2, or swiglu, which has a gate
    qkv_bias: bool = True
    out_bias: bool = True
    up_bias: bool = True
    down_bias: bool = True
    tied: bool = True  # the head's matrix is the embedding
    head_bias: bool = False
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0  # of the probabilities
    out_dropout: float = 0.0  # of what attention adds
    mlp_dropout: float = 0.0  # of what the MLP adds
    init: str = "fan-in"  # whose rule: section 1.2

    def __post_init__(self):
        complete(self)  # section 10

    def defaults(self):
        """What the fields that are left at 0 become."""
        inner = {"kv_heads": self.heads, "head_width": self.width // self.heads, "hidden": 4 * self.width}
        return inner | {"position_rows": self.seq_len}

    def changed(self, **changes):
        """With these fields changed; those that followed from others follow again."""
        follow = {name: 0 for name, default in self.defaults().items() if getattr(self, name) == default}
        if self.width % self.heads:
            follow.pop("head_width", None)  # that heads do not divide the width was chosen
        return Config(**dataclasses.asdict(self) | follow | changes)

    @property
    def qkv_width(self):
        """Columns of the product that makes queries, keys and values: D (H + 2 G)."""
        return self.head_width * (self.heads + 2 * self.kv_heads)

    @property
    def up_width(self):
        """Columns of the MLP's first product: F, or 2 F where a gate precedes the values."""
        return 2 * self.hidden if self.mlp == "swiglu" else self.hidden


# == 1.2  parameters: one table, one flat buffer, named views ==========================================================


class Tensor(NamedTuple):
    """A row of the table; `layered`: with a leading axis of L. Drawn from a normal distribution unless `uniform`."""

    name: str
    shape: tuple
    offset: int  # in elements of the flat buffer
    layered: bool
    decayed: bool
    mean: float
    std: float
    uniform: bool


def layout(cfg):
    """The parameters of `cfg` in order: matrices, which AdamW decays, then vectors, which it does not."""
    V, P, C, L, F = cfg.vocab_size, cfg.position_rows, cfg.width, cfg.layers, cfg.hidden
    D, HD = cfg.head_width, cfg.heads * cfg.head_width
    gain, bias = cfg.norm_gain, cfg.norm == "layernorm" and cfg.norm_bias
    rows = [  # there or not, name, shape, layered, role, fan-in
        (True, "embed_w", (V, C), False, "embed", C),
        (cfg.positions == "learned", "position_w", (P, C), False, "embed", C),
        (not cfg.tied, "head_w", (V, C), False, "inner", C),  # logits = norm(x) @ head_w^T; tied: embed_w^T
        (True, "qkv_w", (C, cfg.qkv_width), True, "inner", C),  # columns: q of every head, then k, then v
        (True, "out_w", (HD, C), True, "residual", HD),
        (True, "up_w", (C, cfg.up_width), True, "inner", C),  # swiglu: columns of the gate, then of the values
        (True, "down_w", (F, C), True, "residual", F),
        (gain and cfg.embedding_norm, "embed_norm_w", (C,), False, "gain", C),
        (bias and cfg.embedding_norm, "embed_norm_b", (C,), False, "bias", 0),
        (gain, "norm1_w", (C,), True, "gain", C),
        (bias, "norm1_b", (C,), True, "bias", 0),
        (cfg.qkv_bias, "qkv_b", (cfg.qkv_width,), True, "bias", C),
        (cfg.qk_norm, "q_norm_w", (D,), True, "gain", D),
        (cfg.qk_norm, "k_norm_w", (D,), True, "gain", D),
        (cfg.out_bias, "out_b", (C,), True, "bias", HD),
        (gain, "norm2_w", (C,), True, "gain", C),
        (bias, "norm2_b", (C,), True, "bias", 0),
        (cfg.up_bias, "up_b", (cfg.up_width,), True, "bias", C),
        (cfg.down_bias, "down_b", (C,), True, "bias", F),
        (gain and cfg.final_norm, "norm_w", (C,), False, "gain", C),
        (bias and cfg.final_norm, "norm_b", (C,), False, "bias", 0),
        (cfg.head_bias, "head_b", (V,), False, "bias", C),
    ]
    table, offset = [], 0
    for there, name, shape, layered, role, fan_in in rows:
        if there:
            shape = (L, *shape) if layered else shape
            matrix, uniform = role not in ("gain", "bias"), cfg.init == "torch" and role not in ("gain", "embed")
            std = initial_std(cfg, role, fan_in) if matrix or (uniform and fan_in) else 0.0
            table.append(Tensor(name, shape, offset, layered, matrix, float(role == "gain"), std, uniform))
            offset += math.prod(shape)
    return table


def initial_std(cfg, role, fan_in):
    """Standard deviation of an embedding, of an inner matrix, or of one whose product enters the residual stream.

    fan-in: ours; at C = 128 it learns faster than 0.02: 1.332 against 1.346 bits per byte after 450 updates.
    gpt2: Radford et al. 2019. normal: the same without the residual's rule. torch: the defaults of PyTorch's layers,
    uniform but for embeddings. lillm: of the system of that name.
    """
    C, narrow = cfg.width, 1 / math.sqrt(2 * cfg.layers)
    rules = {
        "fan-in": {"embed": C**-0.5, "inner": C**-0.5, "residual": narrow * C**-0.5},
        "gpt2": {"embed": 0.02, "inner": 0.02, "residual": narrow * 0.02},
        "normal": {"embed": 0.02, "inner": 0.02, "residual": 0.02},
        "torch": {"embed": 1.0} | dict.fromkeys(("inner", "residual", "bias"), (3 * max(fan_in, 1)) ** -0.5),
        "lillm": {"embed": C**-0.5, "inner": fan_in**-0.5, "residual": narrow * 0.02},
    }
    return rules[cfg.init][role]


OPTIONAL = {  # of one layer, of the whole model: None among the views of a model that lacks them
    True: ("norm1_w", "norm1_b", "qkv_b", "q_norm_w", "k_norm_w", "out_b", "norm2_w", "norm2_b", "up_b", "down_b"),
    False: ("position_w", "head_w", "embed_norm_w", "embed_norm_b", "norm_w", "norm_b", "head_b"),
}


def count_parameters(cfg):
    """(total, decayed, non-embedding) numbers of parameters; the decayed ones come first in the buffer."""
    sizes = {t: math.prod(t.shape) for t in layout(cfg)}
    total, decayed = sum(sizes.values()), sum(n for t, n in sizes.items() if t.decayed)
    return total, decayed, total - sum(n for t, n in sizes.items() if t.name in ("embed_w", "position_w"))


def layer_window(cfg, index):
    """Keys that a query of this layer sees, its own among them; 0 is all."""
    return cfg.window if index % 2 else 0


def views(table, flat, layers):
    """Names -> views of `flat`; layered tensors are in the list under "layers", one dictionary for each layer."""
    named = dict.fromkeys(OPTIONAL[False]) | {"layers": [dict.fromkeys(OPTIONAL[True]) for _ in range(layers)]}
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
    rng, parts = np.random.Generator(np.random.Philox(key=[seed, 0])), []
    for t in layout(cfg):
        half, count = math.sqrt(3) * t.std, math.prod(t.shape)  # half the width of a uniform distribution
        drawn = rng.uniform(-half, half, count) if t.uniform and half else rng.normal(t.mean, t.std, count)
        parts.append(drawn.astype(dtype))
    return np.concatenate(parts)


CACHE_LINE = 64  # bytes


def aligned(count, dtype):
    """Zeros (count,) that begin at a cache line: a vector that lies across two lines takes twice as long to load."""
    size = np.dtype(dtype).itemsize
    flat = np.zeros(count * size + CACHE_LINE, np.uint8)
    first = -flat.ctypes.data % CACHE_LINE
    return flat[first : first + count * size].view(dtype)


def zero_gradients(cfg, dtype=np.float32):
    """(flat (count,), views). The lookup of the tokens adds into "lookup_w", tied or not, until `add_lookup_gradient`:
    a tied head adds into "embed_w", and one sum of both would depend on how an update is cut into micro-batches."""
    count = count_parameters(cfg)[0]
    flat = aligned(count + cfg.vocab_size * cfg.width, dtype)
    grads = views(layout(cfg), flat, cfg.layers)
    grads["lookup_w"] = flat[count:].reshape(cfg.vocab_size, cfg.width)
    return flat[:count], grads


def add_lookup_gradient(grads):
    """Add the lookup's gradient into that of embed_w, once at the end of an update, tied or not; zero the former."""
    grads["embed_w"] += grads["lookup_w"]
    grads["lookup_w"][:] = 0


# == 2.1  linear     y = x w + b =======================================================================================
#
# What a model may lack (a bias, a gain) is None, and so is its gradient.


class Pair(NamedTuple):
    forward: Callable
    backward: Callable


def linear_forward(x, w, b):
    """x (..., K), w (K, M), b (M,) -> y (..., M)."""
    y = x @ w
    return y if b is None else y + b, (x, w)


def linear_backward(dy, cache, dw, db):
    """dy (..., M) -> dx (..., K); adds into dw (K, M), db (M,)."""
    x, w = cache
    x_NK, dy_NM = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # y_nm = sum_k x_nk w_km + b_m, so dw_km = sum_n x_nk dy_nm, db_m = sum_n dy_nm, dx_nk = sum_m dy_nm w_km
    dw += x_NK.T @ dy_NM
    if db is not None:
        db += dy_NM.sum(0)
    return dy @ w.T


# == 2.2  norms     LayerNorm   y = n w + b,   n = (x - mean) rstd,   rstd = 1 / sqrt(var_c(x) + eps) ==================
#                   RMSNorm     y = n w,       n = x rstd,            rstd = 1 / sqrt(mean_c(x^2) + eps)


def layernorm_forward(x, w, b, eps):
    """x (..., C), w (C,), b (C,) -> y (..., C).   Ba, Kiros & Hinton 2016, arXiv:1607.06450."""
    mean = x.mean(-1, keepdims=True)  # (..., 1)
    centred = x - mean
    rstd = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)  # (..., 1)
    n = centred * rstd
    y = n if w is None else n * w
    return y if b is None else y + b, (n, w, rstd)


def layernorm_backward(dy, cache, dw, db):
    """dy (..., C) -> dx (..., C); adds into dw (C,), db (C,)."""
    n, w, rstd = cache
    rows = tuple(range(dy.ndim - 1))
    if dw is not None:
        dw += (dy * n).sum(rows)
    if db is not None:
        db += dy.sum(rows)
    dn = dy if w is None else dy * w
    # dn_j/dx_i = rstd (delta_ij - 1/C - n_i n_j / C), so dx = rstd (dn - mean_c(dn) - n mean_c(dn n))
    return rstd * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))


def rmsnorm_forward(x, w, b, eps):
    """x (..., C), w (C,), b None -> y (..., C).   Zhang & Sennrich 2019, arXiv:1910.07467."""
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)  # (..., 1)
    n = x * rstd
    return n if w is None else n * w, (n, w, rstd)


def rmsnorm_backward(dy, cache, dw, db):
    """dy (..., C) -> dx (..., C); adds into dw (C,)."""
    n, w, rstd = cache
    if dw is not None:
        dw += (dy * n).sum(tuple(range(dy.ndim - 1)))
    dn = dy if w is None else dy * w
    # dn_j/dx_i = rstd (delta_ij - n_i n_j / C), so dx = rstd (dn - n mean_c(dn n))
    return rstd * (dn - n * (dn * n).mean(-1, keepdims=True))


NORMS = {
    "layernorm": Pair(layernorm_forward, layernorm_backward),
    "rmsnorm": Pair(rmsnorm_forward, rmsnorm_backward),
}

# == 2.3  activations     a = f(h) =====================================================================================

GELU_SCALE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715  # the tanh form of Hendrycks & Gimpel 2016, arXiv:1606.08415


def gelu_tanh_forward(h):
    """h (..., F) -> a = h/2 (1 + tanh u), u = sqrt(2/pi) (h + 0.044715 h^3), (..., F)."""
    return h / 2 * (1 + np.tanh(GELU_SCALE * (h + GELU_CUBE * h * h * h))), (h,)


def gelu_tanh_backward(da, cache):
    """da (..., F) -> dh (..., F)."""
    (h,) = cache
    t = np.tanh(GELU_SCALE * (h + GELU_CUBE * h * h * h))
    # a = h/2 (1 + t), dt/du = 1 - t^2, du/dh = scale (1 + 3 cube h^2)
    return da * ((1 + t) / 2 + h / 2 * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBE * h * h))


def erf(x):
    """The error function of each element, which NumPy lacks."""
    return np.array([math.erf(value) for value in x.reshape(-1).tolist()], x.dtype).reshape(x.shape)


def gelu_forward(h):
    """h (..., F) -> a = h/2 (1 + erf(h / sqrt 2)), (..., F): h times the normal distribution's integral up to h."""
    return h / 2 * (1 + erf(h / math.sqrt(2))), (h,)


def gelu_backward(da, cache):
    """da (..., F) -> dh (..., F)."""
    (h,) = cache
    # a = h P(h), dP/dh = exp(-h^2 / 2) / sqrt(2 pi)
    return da * ((1 + erf(h / math.sqrt(2))) / 2 + h * np.exp(-h * h / 2) * (1 / math.sqrt(2 * math.pi)))


def sigmoid(h):
    return (1 + np.tanh(h / 2)) / 2  # e^-h would overflow


def silu_forward(h):
    """h (..., F) -> a = h sigmoid(h), (..., F).   Elfwing et al. 2017, arXiv:1702.03118."""
    return h * sigmoid(h), (h,)


def silu_backward(da, cache):
    """da (..., F) -> dh (..., F)."""
    (h,) = cache
    s = sigmoid(h)
    return da * (s + h * s * (1 - s))  # ds/dh = s (1 - s)


def relu2_forward(h):
    """h (..., F) -> a = max(h, 0)^2, (..., F).   So et al. 2021, arXiv:2109.08668."""
    return np.maximum(h, 0) ** 2, (h,)


def relu2_backward(da, cache):
    """da (..., F) -> dh (..., F)."""
    (h,) = cache
    return da * 2 * np.maximum(h, 0)


def swiglu_forward(h):
    """h (..., 2F), gates then values -> a = silu(gate) * value, (..., F).   Shazeer 2020, arXiv:2002.05202."""
    gate, value = np.split(h, 2, -1)
    a, silu = silu_forward(gate)
    return a * value, (a, value, silu)


def swiglu_backward(da, cache):
    """da (..., F) -> dh (..., 2F)."""
    a, value, silu = cache
    return np.concatenate([silu_backward(da * value, silu), da * a], -1)


ACTIVATIONS = {
    "gelu-tanh": Pair(gelu_tanh_forward, gelu_tanh_backward),
    "gelu": Pair(gelu_forward, gelu_backward),
    "silu": Pair(silu_forward, silu_backward),
    "relu2": Pair(relu2_forward, relu2_backward),
    "swiglu": Pair(swiglu_forward, swiglu_backward),
}

# == 2.4  causal self-attention     o_t = sum_{s <= t} p_ts v_s,   p_t = softmax_s(scale q_t . k_s - slope (t - s)) ====


def softmax(x):
    """x (..., S) -> e^x / sum_s e^x, (..., S), without overflow; -inf becomes 0."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention_forward(q, k, v, scale, slopes=None, window=0, dropout=None, rate=0.0, mask=None):
    """q (B, H, T, D), k and v (B, G, S, D) -> o (B, H, T, D).   Vaswani et al. 2017, arXiv:1706.03762.

    The T queries are the last of the S positions: query t sees keys 0 .. S - T + t, of them the last `window` (0: all).
    Head h reads keys h // (H / G) (Ainslie et al. 2023, arXiv:2305.13245); slopes (H,): ALiBi; rate: of dropout of p.
    `mask` (T, S), True where a query sees a key, replaces the causal one; the kernels of other tables do not take it.
    """
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    keep = dropout and dropout.keep(ATTENTION_SITE, rate, (B, H, T, S), q.dtype)
    q_BGRTD, k_BG1SD, v_BG1SD = q.reshape(B, G, H // G, T, D), k[:, :, None], v[:, :, None]
    scores = (q_BGRTD @ k_BG1SD.swapaxes(-1, -2) * scale).reshape(B, H, T, S)
    distance = np.arange(S - T, S)[:, None] - np.arange(S)  # (T, S)
    if slopes is not None:
        scores = scores - slopes.astype(q.dtype)[:, None, None] * distance.astype(q.dtype)
    seen = (distance >= 0) & (distance < (window or S)) if mask is None else mask
    scores = np.where(seen, scores, -math.inf)
    p = softmax(scores)  # (B, H, T, S)
    kept = p if keep is None else p * keep
    o = kept.reshape(B, G, H // G, T, S) @ v_BG1SD
    return o.reshape(B, H, T, D), (q, k, v, p, scale, keep)


def attention_backward(do, cache):
    """do (B, H, T, D) -> dq (B, H, T, D), dk and dv (B, G, S, D)."""
    q, k, v, p, scale, keep = cache
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    q_BGRTD, do_BGRTD = q.reshape(B, G, H // G, T, D), do.reshape(B, G, H // G, T, D)
    kept = (p if keep is None else p * keep).reshape(B, G, H // G, T, S)
    dv = (kept.swapaxes(-1, -2) @ do_BGRTD).sum(2)  # o = p v, for each of the heads that share v
    dp = (do_BGRTD @ v[:, :, None].swapaxes(-1, -2)).reshape(B, H, T, S)
    dp = dp if keep is None else dp * keep
    # dp_j/dscores_i = p_j (delta_ij - p_i), so dscores = p (dp - sum_s dp_s p_s)
    dscores = (p * (dp - (dp * p).sum(-1, keepdims=True))).reshape(B, G, H // G, T, S)
    dq = dscores @ k[:, :, None] * scale  # scores = scale q k^T
    dk = (dscores.swapaxes(-1, -2) @ q_BGRTD).sum(2) * scale
    return dq.reshape(B, H, T, D), dk, dv


# == 2.5  positions: rotation of queries and keys, slopes ==============================================================


@functools.cache
def rotation(S, D, theta, dtype):
    """cos and sin (S, D/2) of the angles s theta^(-2i/D), s = 0 .. S - 1."""
    angles = np.arange(S)[:, None] * theta ** (-2 * np.arange(D // 2) / D)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rotate_forward(x, cos, sin, half):
    """x (..., T, D), cos and sin (T, D/2) -> y (..., T, D): each pair, a point of the plane, turned by its angle. Pairs
    are neighbours, or D/2 apart if `half`.   Su et al. 2021, arXiv:2104.09864."""
    y, D = np.empty_like(x), x.shape[-1]
    even, odd = (slice(0, D // 2), slice(D // 2, D)) if half else (slice(0, D, 2), slice(1, D, 2))
    y[..., even] = x[..., even] * cos - x[..., odd] * sin
    y[..., odd] = x[..., even] * sin + x[..., odd] * cos
    return y, (cos, sin, half)


def rotate_backward(dy, cache):
    """dy (..., T, D) -> dx (..., T, D): turned back."""
    cos, sin, half = cache
    return rotate_forward(dy, cos, -sin, half)[0]


def alibi_slopes(H):
    """(H,): 2^(-8 (i + 1) / n) for n the power of two that is at most H, then every second one of 2n slopes.
    Press et al. 2021, arXiv:2108.12409."""
    n = 1 << (H.bit_length() - 1)
    return np.array([2 ** (-8 * (i + 1) / n) for i in range(n)] + [2 ** (-4 * (2 * i + 1) / n) for i in range(H - n)])


# == 2.6  dropout     y = x keep,   keep is 0 or 1 / (1 - rate) ========================================================

EMBED_SITE, ATTENTION_SITE, OUT_SITE, MLP_SITE = range(4)


class Dropout(NamedTuple):
    """Which masks: a function of seed, update and place, however an update is cut into micro-batches."""

    seed: int
    step: int  # the update
    sequence: int  # of the update, the first of the micro-batch
    layer: int = 0

    def keys(self, site, B):
        """(B,) uint32, one for each sequence."""
        state = np.random.SeedSequence([self.seed, self.step, self.layer, site])
        return mix(np.arange(self.sequence, self.sequence + B, dtype=np.uint32) ^ state.generate_state(1))

    def keep(self, site, rate, shape, dtype):
        """shape (B, ..., R, M) -> masks of that shape, None without dropout. Axes between count 2^16 rows each."""
        if not rate:
            return None
        B, blocks, (R, M) = shape[0], math.prod(shape[1:-2]), shape[-2:]
        rows = (np.arange(blocks)[:, None] * 65536 + np.arange(R)).astype(np.uint32).reshape(1, blocks, R, 1)
        keys = self.keys(site, B).reshape(B, 1, 1, 1)
        drawn = mix(mix(keys + rows) + np.arange(M, dtype=np.uint32))  # (B, blocks, R, M)
        keep = np.where(drawn >= np.uint32(rate * 2**32), 1 / (1 - rate), 0)
        return keep.astype(dtype).reshape(shape)


def mix(x):
    """uint32 -> uint32, each bit of the result a coin toss of all of x: Wellons 2018, "lowbias32"."""
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


# == 2.7  embedding     x_bt = w[tokens_bt] + positions[t] =============================================================


def embedding_forward(tokens, w, positions):
    """tokens (B, T) integers, w (V, C), positions (T, C) -> x (B, T, C)."""
    x = w[tokens]
    return x if positions is None else x + positions, (tokens,)


def embedding_backward(dx, cache, dw, dpositions):
    """dx (B, T, C); adds into dw (V, C), dpositions (T or more, C)."""
    (tokens,) = cache
    np.add.at(dw, tokens, dx)  # dw[tokens] += dx would count a repeated token once
    if dpositions is not None:
        dpositions[: dx.shape[1]] += dx.sum(0)


# == 2.8  cross-entropy     nats_n = lse_n - logits_n[target_n],   lse = log sum_v exp(logits_v) =======================


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
# p and g are the named views of one layer's parameters and gradients (of the whole model's for `embed` and `head`). A
# sublayer takes its primitives from `ops`, so that another table can bring faster ones.


def embed_forward(tokens, p, cfg, ops, start=0, dropout=None):
    """tokens (B, T) at positions start .. start + T - 1 -> x (B, T, C)."""
    positions, norm = p["position_w"], None
    if positions is not None:
        positions = positions[start : start + tokens.shape[1]]
    x, lookup = ops.embedding.forward(tokens, p["embed_w"], positions)
    if cfg.embedding_norm:
        x, norm = ops.norms[cfg.norm].forward(x, p["embed_norm_w"], p["embed_norm_b"], cfg.norm_eps)
    keep = dropout and dropout.keep(EMBED_SITE, cfg.embed_dropout, x.shape, x.dtype)
    return x if keep is None else x * keep, (lookup, norm, keep)


def embed_backward(dx, cache, g, cfg, ops):
    """dx (B, T, C); adds into the gradients of the lookup and of the positions."""
    lookup, norm, keep = cache
    dx = dx if keep is None else dx * keep
    if cfg.embedding_norm:
        dx = ops.norms[cfg.norm].backward(dx, norm, g["embed_norm_w"], g["embed_norm_b"])
    ops.embedding.backward(dx, lookup, g["lookup_w"], g["position_w"])


def self_attention_forward(n, p, cfg, ops, index=0, past=None, dropout=None):
    """n (B, T, C) -> attention(n qkv_w + qkv_b) out_w + out_b, (B, T, C), in layer number `index`.

    past = (kv, start): kv (B, positions, 2, G, D) holds the keys and values of `start` earlier positions and takes the
    new ones; queries see all of them.
    """
    (B, T, _), (H, G, D), (kv, start) = n.shape, (cfg.heads, cfg.kv_heads, cfg.head_width), past or (None, 0)
    qkv, qkv_linear = ops.linear.forward(n, p["qkv_w"], p["qkv_b"])  # (B, T, D (H + 2 G))
    heads = qkv.reshape(B, T, H + 2 * G, D).transpose(0, 2, 1, 3)  # (B, H + 2 G, T, D)
    q, k, v = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
    q_norm = k_norm = q_turn = k_turn = None
    if cfg.qk_norm:
        q, q_norm = ops.norms["rmsnorm"].forward(q, p["q_norm_w"], None, cfg.norm_eps)
        k, k_norm = ops.norms["rmsnorm"].forward(k, p["k_norm_w"], None, cfg.norm_eps)
    if cfg.positions.startswith("rope"):
        cos, sin = (a[start : start + T] for a in rotation(cfg.seq_len, D, cfg.rope_theta, n.dtype.name))
        q, q_turn = ops.rotate.forward(q, cos, sin, cfg.positions == "rope-half")
        k, k_turn = ops.rotate.forward(k, cos, sin, cfg.positions == "rope-half")
    if past is not None:
        kv[:, start : start + T] = np.stack([k, v]).transpose(1, 3, 0, 2, 4)  # (B, T, 2, G, D)
        k, v = kv[:, : start + T].transpose(2, 0, 3, 1, 4)  # 2 of (B, G, S, D)
    slopes = alibi_slopes(H) if cfg.positions == "alibi" else None
    scale = 1 / math.sqrt(D) if cfg.attention_scale else 1.0
    drop = (dropout, cfg.attention_dropout)
    o_BHTD, attention = ops.attention.forward(q, k, v, scale, slopes, layer_window(cfg, index), *drop)
    o = o_BHTD.transpose(0, 2, 1, 3).reshape(B, T, H * D)
    y, out_linear = ops.linear.forward(o, p["out_w"], p["out_b"])
    return y, (qkv_linear, q_norm, k_norm, q_turn, k_turn, attention, out_linear)


def self_attention_backward(dy, cache, g, cfg, ops):
    """dy (B, T, C) -> dn (B, T, C); adds into g."""
    qkv_linear, q_norm, k_norm, q_turn, k_turn, attention, out_linear = cache
    B, T, _ = dy.shape
    do = ops.linear.backward(dy, out_linear, g["out_w"], g["out_b"])  # (B, T, H D)
    do_BHTD = do.reshape(B, T, cfg.heads, cfg.head_width).transpose(0, 2, 1, 3)
    dq, dk, dv = ops.attention.backward(do_BHTD, attention)
    if cfg.positions.startswith("rope"):
        dq, dk = ops.rotate.backward(dq, q_turn), ops.rotate.backward(dk, k_turn)
    if cfg.qk_norm:
        dq = ops.norms["rmsnorm"].backward(dq, q_norm, g["q_norm_w"], None)
        dk = ops.norms["rmsnorm"].backward(dk, k_norm, g["k_norm_w"], None)
    dqkv = np.concatenate([dq, dk, dv], 1).transpose(0, 2, 1, 3).reshape(B, T, cfg.qkv_width)
    return ops.linear.backward(dqkv, qkv_linear, g["qkv_w"], g["qkv_b"])


def attention_layer_forward(x, p, cfg, ops, index=0, past=None, dropout=None):
    """x (B, T, C) -> x + self_attention(norm1(x)), (B, T, C)."""
    n, norm = ops.norms[cfg.norm].forward(x, p["norm1_w"], p["norm1_b"], cfg.norm_eps)
    y, attention = self_attention_forward(n, p, cfg, ops, index, past, dropout)
    keep = dropout and dropout.keep(OUT_SITE, cfg.out_dropout, y.shape, y.dtype)
    return x + (y if keep is None else y * keep), (norm, attention, keep)


def attention_layer_backward(dy, cache, p, g, cfg, ops, index=0):
    """dy (B, T, C) -> dx (B, T, C); adds into g."""
    norm, attention, keep = cache
    dn = self_attention_backward(dy if keep is None else dy * keep, attention, g, cfg, ops)
    return dy + ops.norms[cfg.norm].backward(dn, norm, g["norm1_w"], g["norm1_b"])


def mlp_forward(n, p, cfg, ops):
    """n (B, T, C) -> f(n up_w + up_b) down_w + down_b, (B, T, C)."""
    h, up_linear = ops.linear.forward(n, p["up_w"], p["up_b"])  # (B, T, F), gated (B, T, 2 F)
    a, activation = ops.activations[cfg.mlp].forward(h)
    y, down_linear = ops.linear.forward(a, p["down_w"], p["down_b"])
    return y, (up_linear, activation, down_linear)


def mlp_backward(dy, cache, g, cfg, ops):
    """dy (B, T, C) -> dn (B, T, C); adds into g."""
    up_linear, activation, down_linear = cache
    da = ops.linear.backward(dy, down_linear, g["down_w"], g["down_b"])  # (B, T, F)
    dh = ops.activations[cfg.mlp].backward(da, activation)
    return ops.linear.backward(dh, up_linear, g["up_w"], g["up_b"])


def mlp_layer_forward(x, p, cfg, ops, index=0, dropout=None):
    """x (B, T, C) -> x + mlp(norm2(x)), (B, T, C)."""
    n, norm = ops.norms[cfg.norm].forward(x, p["norm2_w"], p["norm2_b"], cfg.norm_eps)
    y, mlp = mlp_forward(n, p, cfg, ops)
    keep = dropout and dropout.keep(MLP_SITE, cfg.mlp_dropout, y.shape, y.dtype)
    return x + (y if keep is None else y * keep), (norm, mlp, keep)


def mlp_layer_backward(dy, cache, p, g, cfg, ops, index=0):
    """dy (B, T, C) -> dx (B, T, C); adds into g."""
    norm, mlp, keep = cache
    dn = mlp_backward(dy if keep is None else dy * keep, mlp, g, cfg, ops)
    return dy + ops.norms[cfg.norm].backward(dn, norm, g["norm2_w"], g["norm2_b"])


def head_forward(x, p, cfg, ops):
    """x (N, C) -> logits (N, V) = norm(x) head_w^T + head_b."""
    n, norm = x, None
    if cfg.final_norm:
        n, norm = ops.norms[cfg.norm].forward(x, p["norm_w"], p["norm_b"], cfg.norm_eps)
    logits, linear = ops.linear.forward(n, p["embed_w" if cfg.tied else "head_w"].T, p["head_b"])
    return logits, (norm, linear)


def head_backward(dlogits, cache, g, cfg, ops):
    """dlogits (N, V) -> dx (N, C); adds into g."""
    norm, linear = cache
    dn = ops.linear.backward(dlogits, linear, g["embed_w" if cfg.tied else "head_w"].T, g["head_b"])
    return ops.norms[cfg.norm].backward(dn, norm, g["norm_w"], g["norm_b"]) if cfg.final_norm else dn


def head_logits(x, p, cfg, ops):
    """x (N, C) -> logits (N, V)."""
    return head_forward(x, p, cfg, ops)[0]


def head_loss(x, targets, weights, p, g, cfg, ops):
    """x (B, T, C), targets and weights (B, T) -> loss = sum of weights * nats, nats (B, T), dx (B, T, C); adds into g.

    Forward and backward in one, a sequence at a time, so that logits of (B, T, V) never exist. g=None: no gradients,
    dx is None.
    """
    nats, dx, loss = np.empty(targets.shape, x.dtype), None if g is None else np.empty_like(x), 0.0
    for b in range(x.shape[0]):
        logits, head = head_forward(x[b], p, cfg, ops)  # (T, V)
        loss_b, nats[b], cross_entropy = ops.cross_entropy.forward(logits, targets[b], weights[b])
        loss += float(loss_b)
        if g is not None:
            dx[b] = head_backward(ops.cross_entropy.backward(cross_entropy), head, g, cfg, ops)
    return loss, nats, dx


# == 4  the model ======================================================================================================


def forward(p, tokens, cfg, ops, past=None, dropout=None):
    """tokens (B, T) -> x (B, T, C), what the head reads; caches for `backward`.

    past = (kv, start): kv (L, B, positions, 2, G, D), as in `attention_layer_forward`. ValueError on a bad token or T.
    """
    start = past[1] if past is not None else 0
    check_tokens(tokens, start, cfg)
    x, embed = ops.embed.forward(tokens, p, cfg, ops, start, dropout)
    caches = [embed]
    for index, layer in enumerate(p["layers"]):
        layer_past, masks = past and (past[0][index], start), dropout and dropout._replace(layer=index)
        x, attention = ops.attention_layer.forward(x, layer, cfg, ops, index, layer_past, masks)
        x, mlp = ops.mlp_layer.forward(x, layer, cfg, ops, index, masks)
        caches += [attention, mlp]
    return x, caches


def backward(dx, caches, p, g, cfg, ops):
    """dx (B, T, C), the gradient of what `forward` returned; adds into g."""
    caches = list(caches)
    for index in reversed(range(cfg.layers)):
        layer, grads = p["layers"][index], g["layers"][index]
        dx = ops.mlp_layer.backward(dx, caches.pop(), layer, grads, cfg, ops, index)
        dx = ops.attention_layer.backward(dx, caches.pop(), layer, grads, cfg, ops, index)
    ops.embed.backward(dx, caches.pop(), g, cfg, ops)


def loss_and_gradients(p, tokens, targets, weights, g, cfg, ops, dropout=None):
    """tokens, targets and weights (B, T) -> weighted sum of the nats, nats (B, T); adds into g (None: no gradients).

    Loss and gradients are sums over targets, so micro-batches add up. `update` of train.py divides once, by the sum of
    the weights (the number of targets) of the whole update, after `add_lookup_gradient`.
    """
    check_tokens(targets, 0, cfg)
    x, caches = forward(p, tokens, cfg, ops, dropout=dropout)
    loss, nats, dx = ops.head_loss(x, targets, weights, p, g, cfg, ops)
    if g is not None:
        backward(dx, caches, p, g, cfg, ops)
    return loss, nats


def logits(p, tokens, cfg, ops):
    """tokens (B, T) -> logits (B, T, V)."""
    x, _ = forward(p, tokens, cfg, ops)
    return ops.head_logits(x.reshape(-1, cfg.width), p, cfg, ops).reshape(*tokens.shape, -1)


def check_tokens(tokens, start, cfg):
    """ValueError unless tokens (B, T) are ids of this model at positions that it has."""
    T = tokens.shape[1]
    if start + T > cfg.seq_len:
        found = f"tokens has T={start + T} but this model has seq_len={cfg.seq_len}"
        raise ValueError(f"{found}; shorten the text or train with --seq-len {start + T}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < cfg.vocab_size:
        bad = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(f"token id {bad} is outside 0 .. {cfg.vocab_size - 1}; is this text of another tokenizer?")


# ######################################################################################################################
# Part II: the hot loops in plain Numba
# ######################################################################################################################
#
# The sublayers of Part I stay, their primitives are compiled. A kernel is a sequential function over tasks first ..
# last - 1: rows, heads, columns. A task owns what it writes, so the number of threads changes no byte.

# == 5  compiling ======================================================================================================

cpu = binding.get_host_cpu_features()
if not numba.config.CPU_NAME and cpu.get("avx512f", False):  # LLVM would keep to half of a 512-bit register
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = binding.get_host_cpu_name(), cpu.flatten() + ",-prefer-256-bit"

# "reassoc" lets LLVM add terms as a tree. Neither "nnan" nor "ninf": a NaN must stay visible.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
JIT = {"error_model": "numpy", "fastmath": FASTMATH}  # Numba's own error model checks each division: no vectors
jitted, inlined = register_jitable(**JIT), register_jitable(**JIT, forceinline=True)  # for what kernels call
inlined(mix)


def kernel(function):
    """Compile `function` when THREADS first run it. A `Cache` keeps it under a name that holds the options."""
    function.__qualname__ += f"-{zlib.crc32(repr(JIT | {'fastmath': sorted(FASTMATH)}).encode()):08x}"
    return njit(**JIT, nogil=True)(function)


def as_rows(x):
    """x (..., C) -> (N, C), contiguous."""
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


# == 6  products     c = a b + bias,  or c += a b ======================================================================
#
# Four rows of c by four of b at a time: 16 multiply-adds for 8 loads and 4 stores; LLVM makes vectors of the loop over
# n. Blocks of b, which may be a transposed view, are copied to where they stay in a core's cache.

BLOCK_ROWS, BLOCK_COLUMNS = 64, 512  # of b: 128 KiB in float32


@inlined
def multiply(a, b, c, n0):
    """c (M, n0 .. n0 + N) += a (M, K) b (K, N), rows of b and c contiguous."""
    (M, K), n1 = a.shape, n0 + b.shape[1]
    for m in range(0, M - 3, 4):
        c0, c1, c2, c3 = c[m, n0:n1], c[m + 1, n0:n1], c[m + 2, n0:n1], c[m + 3, n0:n1]
        for k in range(0, K - 3, 4):
            b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
            a00, a01, a02, a03 = a[m, k], a[m, k + 1], a[m, k + 2], a[m, k + 3]
            a10, a11, a12, a13 = a[m + 1, k], a[m + 1, k + 1], a[m + 1, k + 2], a[m + 1, k + 3]
            a20, a21, a22, a23 = a[m + 2, k], a[m + 2, k + 1], a[m + 2, k + 2], a[m + 2, k + 3]
            a30, a31, a32, a33 = a[m + 3, k], a[m + 3, k + 1], a[m + 3, k + 2], a[m + 3, k + 3]
            for n in range(b0.size):
                c0[n] += a00 * b0[n] + a01 * b1[n] + a02 * b2[n] + a03 * b3[n]
                c1[n] += a10 * b0[n] + a11 * b1[n] + a12 * b2[n] + a13 * b3[n]
                c2[n] += a20 * b0[n] + a21 * b1[n] + a22 * b2[n] + a23 * b3[n]
                c3[n] += a30 * b0[n] + a31 * b1[n] + a32 * b2[n] + a33 * b3[n]
    for m in range(M):  # what the fours leave over
        for k in range(K // 4 * 4 if m < M // 4 * 4 else 0, K):
            c0, b0, a00 = c[m, n0:n1], b[k], a[m, k]
            for n in range(b0.size):
                c0[n] += a00 * b0[n]


@kernel
def product_kernel(first, last, a, b, c):
    """Rows of c (M, N) += a (M, K) b (K, N)."""
    K, N = b.shape
    for n0 in range(0, N, BLOCK_COLUMNS):
        for k0 in range(0, K, BLOCK_ROWS):
            block = np.ascontiguousarray(b[k0 : k0 + BLOCK_ROWS, n0 : n0 + BLOCK_COLUMNS])
            multiply(a[first:last, k0 : k0 + BLOCK_ROWS], block, c[first:last], n0)


def product(a, b, bias=None, c=None):
    """a (M, K) b (K, N) + bias (N,) -> c (M, N); or adds a b into a given c, which may be a transposed view."""
    if c is not None and not c.flags.c_contiguous:
        return product(b.T, a.T, c=c.T).T
    c = np.zeros((len(a), b.shape[1]), a.dtype) if c is None else c
    if bias is not None:
        c += bias
    THREADS.run(product_kernel, len(a), a, b, c, unit=4)
    return c


def linear_forward_numba(x, w, b):
    x_NK = as_rows(x)
    return product(x_NK, w, b).reshape(*x.shape[:-1], -1), (x_NK, w)


def linear_backward_numba(dy, cache, dw, db):
    (x_NK, w), dy_NM = cache, as_rows(dy)
    product(x_NK.T, dy_NM, c=dw)
    if db is not None:
        db += dy_NM.sum(0)
    return product(dy_NM, w.T).reshape(*dy.shape[:-1], -1)


# == 7  attention without a T x T matrix ===============================================================================
#
# Dao et al. 2022, arXiv:2205.14135: p is not kept, backward makes it again from lse = log sum_s exp(score_s). A block
# of queries meets all of its keys at once. Scores are (keys, queries): queries fill the vectors, whatever D is.

QUERIES = 64  # in a block


def exp(x):
    """e^x of a number, for kernels: in float32 within 1.2e-7, by arithmetic that LLVM makes vectors of."""
    return math.exp(x)


@overload(exp, jit_options=JIT | {"fastmath": {"contract"}})  # reassociated, r would lose the low part of ln 2
def exp_by_type(x):
    def exp32(x):  # held at the ends of -87 .. 88; NaN stays NaN
        f, i = np.float32, np.int32
        x = f(-87) if x < f(-87) else f(88) if x > f(88) else x
        k = np.rint(x * f(1.4426950408889634))  # x = k ln 2 + r, ln 2 in two parts: k times the first is exact
        r = x - k * f(0.693359375) - k * f(-2.12194440e-4)
        p = f(1.9875691500e-4) * r + f(1.3981999507e-3)  # e^r: polynomial of Moshier's Cephes, expf
        p = ((p * r + f(8.3334519073e-3)) * r + f(4.1665795894e-2)) * r + f(1.6666665459e-1)
        p = (p * r + f(5.0000001201e-1)) * r * r + r + f(1)
        return i(f(p).view(i) + (i(k) << i(23))).view(f)  # 2^k e^r

    return exp32 if x == types.float32 else lambda x: math.exp(x)


@inlined
def drop(p, key, row, column, rate):
    """p (S, T) times the mask of section 2.6, if rate > 0; p[s, t] is at row + t, column + s of the mask."""
    for s in range(p.shape[0] if rate > 0 else 0):
        for t in range(p.shape[1]):
            drawn = mix(np.uint32(mix(np.uint32(key + np.uint32(row + t))) + np.uint32(column + s)))
            p[s, t] *= p.dtype.type(1 / (1 - rate) if drawn >= np.uint32(rate * 2**32) else 0)


@inlined
def score_block(q, k, key, query, scale, slope, window):
    """q (T, D), k (S, D) at positions query .., key .. -> (S, T): scale k q^T - slope distance; -inf if not seen."""
    scores = np.zeros((k.shape[0], q.shape[0]), q.dtype)
    multiply(k, np.ascontiguousarray(q.T) * scale, scores, 0)
    for s in range(scores.shape[0]):
        row, low, high = scores[s], key + s - query, key + s - query + window if window > 0 else q.shape[0]
        for t in range(row.size):
            row[t] = row[t] - slope * q.dtype.type(t - low) if low <= t < high else -np.inf
    return scores


@kernel
def attention_kernel(first, last, inputs, o, lse):
    """Heads of o (B, H, T, D) and lse (B, H, T), task b H + h; section 2.4."""
    q, k, v, scale, slopes, window, keys, rate = inputs
    (_, H, T, D), (_, G, S, _) = q.shape, k.shape
    for task in range(first, last):
        b, h, g = task // H, task % H, task % H // (H // G)
        for t0 in range(0, T, QUERIES):
            t1 = min(t0 + QUERIES, T)
            query, end = S - T + t0, S - T + t1  # position of the first query; of the last one + 1
            key = max(0, query - window + 1) if window > 0 else 0
            p = score_block(q[b, h, t0:t1], k[b, g, key:end], key, query, scale, slopes[h], window)
            top, total = np.full(t1 - t0, -np.inf, q.dtype), np.zeros(t1 - t0, q.dtype)
            for s in range(p.shape[0]):
                for t in range(p.shape[1]):
                    top[t] = p[s, t] if p[s, t] > top[t] else top[t]
            for s in range(p.shape[0]):
                for t in range(p.shape[1]):
                    p[s, t] = exp(p[s, t] - top[t]) if p[s, t] > -np.inf else 0
                    total[t] += p[s, t]
            drop(p, keys[b], h * 65536 + t0, key, rate)
            o_DT = np.zeros((D, t1 - t0), q.dtype)
            multiply(v[b, g, key:end].T, p, o_DT, 0)  # o = p v
            for t in range(t1 - t0):  # o[b, h, t0:t1] = x would compile the text of an error too, for seconds
                lse[b, h, t0 + t] = top[t] + math.log(total[t])
                for d in range(D):
                    o[b, h, t0 + t, d] = o_DT[d, t] / total[t]


@kernel
def attention_backward_kernel(first, last, inputs, lse, mean, do, dq, dk, dv):
    """Heads of dk and dv (B, G, S, D), zeros before, and of dq (B, H, D, T) that read them, task b G + g."""
    q, k, v, scale, slopes, window, keys, rate = inputs
    (_, H, T, _), (_, G, S, _) = q.shape, k.shape
    for task in range(first, last):
        b, g = task // G, task % G
        for h in range(g * (H // G), (g + 1) * (H // G)):
            for t0 in range(0, T, QUERIES):
                t1 = min(t0 + QUERIES, T)
                query, end = S - T + t0, S - T + t1
                key = max(0, query - window + 1) if window > 0 else 0
                q_TD, do_TD, k_SD, v_SD = q[b, h, t0:t1], do[b, h, t0:t1], k[b, g, key:end], v[b, g, key:end]
                lse_T, mean_T = lse[b, h, t0:t1].copy(), mean[b, h, t0:t1].copy()  # vectors: they overlap nothing
                p = score_block(q_TD, k_SD, key, query, scale, slopes[h], window)
                ds = np.zeros_like(p)
                multiply(v_SD, np.ascontiguousarray(do_TD.T) * scale, ds, 0)  # scale dp
                drop(ds, keys[b], h * 65536 + t0, key, rate)
                for s in range(p.shape[0]):
                    for t in range(p.shape[1]):
                        p[s, t] = exp(p[s, t] - lse_T[t]) if p[s, t] > -np.inf else 0
                        ds[s, t] = p[s, t] * (ds[s, t] - mean_T[t])  # dscores = p (dp - mean)
                drop(p, keys[b], h * 65536 + t0, key, rate)
                multiply(ds, np.ascontiguousarray(q_TD), dk[b, g, key:end], 0)
                multiply(p, np.ascontiguousarray(do_TD), dv[b, g, key:end], 0)
                multiply(k_SD.T, ds, dq[b, h], t0)


def attention_forward_numba(q, k, v, scale, slopes=None, window=0, dropout=None, rate=0.0):
    (B, H, T, D), number = q.shape, q.dtype.type
    keys, rate = (dropout.keys(ATTENTION_SITE, B), rate) if dropout else (np.zeros(B, np.uint32), 0.0)
    slopes = np.zeros(H, number) if slopes is None else slopes.astype(number)
    inputs = (q, k, v, number(scale), slopes, window, keys, rate)
    o, lse = np.empty((B, T, H, D), number).transpose(0, 2, 1, 3), np.empty((B, H, T), number)
    THREADS.run(attention_kernel, B * H, inputs, o, lse)
    return o, (inputs, o, lse)


def attention_backward_numba(do, cache):
    (q, k, v, scale, *_), o, lse = cache
    mean = np.einsum("bhtd, bhtd -> bht", do, o) * scale  # sum_s dp_s p_s = sum_d do_d o_d
    dq, dk, dv = (np.zeros_like(x, order="C") for x in (q.swapaxes(2, 3), k, v))
    THREADS.run(attention_backward_kernel, k.shape[0] * k.shape[1], cache[0], lse, mean, do, dq, dk, dv)
    return dq.swapaxes(2, 3), dk, dv


# == 8  rows: norms, activations, rotation, embedding, cross-entropy ===================================================


@kernel
def norm_kernel(first, last, centred, x, w, b, eps, n, rstd, y):
    """Rows of y (N, C) = n w + b, with n (N, C) and rstd (N,); section 2.2. `centred`: LayerNorm, else RMSNorm."""
    number = x.dtype.type
    for i in range(first, last):
        x_row, n_row, y_row, mean, square, C = x[i], n[i], y[i], number(0), number(0), number(x.shape[1])
        for c in range(x_row.size):
            mean += x_row[c]
        mean = mean / C if centred else number(0)
        for c in range(x_row.size):
            square += (x_row[c] - mean) * (x_row[c] - mean)
        rstd[i] = number(1) / np.sqrt(square / C + number(eps))
        for c in range(x_row.size):
            n_row[c] = (x_row[c] - mean) * rstd[i]
            y_row[c] = n_row[c] * w[c] + b[c]


@kernel
def norm_backward_kernel(first, last, centred, dy, n, w, rstd, dx):
    """Rows of dx (N, C) = rstd (dn - mean(dn) - n mean(dn n)), dn = dy w; mean(dn) only if `centred`."""
    number = dy.dtype.type
    for i in range(first, last):
        dy_row, n_row, dx_row, mean, dot, C = dy[i], n[i], dx[i], number(0), number(0), number(dy.shape[1])
        for c in range(dy_row.size):
            mean += dy_row[c] * w[c]
            dot += dy_row[c] * w[c] * n_row[c]
        mean, dot = mean / C if centred else number(0), dot / C
        for c in range(dy_row.size):
            dx_row[c] = rstd[i] * (dy_row[c] * w[c] - mean - n_row[c] * dot)


def norm_forward_numba(centred, x, w, b, eps):
    C, x_NC = x.shape[-1], as_rows(x)
    w, b = np.ones(C, x.dtype) if w is None else w, np.zeros(C, x.dtype) if b is None else b
    n, rstd, y = np.empty_like(x_NC), np.empty(len(x_NC), x.dtype), np.empty_like(x_NC)
    THREADS.run(norm_kernel, len(x_NC), centred, x_NC, w, b, eps, n, rstd, y)
    return y.reshape(x.shape), (n, w, rstd)


def norm_backward_numba(centred, dy, cache, dw, db):
    (n, w, rstd), dy_NC = cache, as_rows(dy)
    if dw is not None:
        dw += np.einsum("nc, nc -> c", dy_NC, n)
    if db is not None:
        db += dy_NC.sum(0)
    THREADS.run(norm_backward_kernel, len(n), centred, dy_NC, n, w, rstd, dx := np.empty_like(n))
    return dx.reshape(dy.shape)


SIGMOID, NORMAL, RELU = range(3)


@jitted
def gate_row(kind, v, s):
    """s (F,) of an activation a = v s(v), section 2.3: the sigmoid of c1 v + c3 v^3, which GELU's tanh form is as well;
    the integral of the normal distribution; max(v, 0)."""
    (shape, c1, c3, _), number = kind, v.dtype.type
    for f in range(v.size):
        if shape == SIGMOID:
            s[f] = number(1) / (number(1) + exp(-v[f] * (number(c1) + number(c3) * v[f] * v[f])))
        elif shape == NORMAL:
            s[f] = number(0.5) + number(0.5) * number(math.erf(v[f] * number(math.sqrt(0.5))))
        else:
            s[f] = max(v[f], number(0))


@jitted
def slope_row(kind, v, da, s):
    """s (F,) becomes da (s + v ds/dv)."""
    (shape, c1, c3, _), number = kind, v.dtype.type
    for f in range(v.size):
        if shape == SIGMOID:
            ds = s[f] * (number(1) - s[f]) * (number(c1) + number(3 * c3) * v[f] * v[f])
        elif shape == NORMAL:
            ds = exp(number(-0.5) * v[f] * v[f]) * number(1 / math.sqrt(2 * math.pi))
        else:
            ds = number(v[f] > 0)
        s[f] = da[f] * (s[f] + v[f] * ds)


@kernel
def activation_kernel(first, last, kind, h, a):
    """Rows of a (N, F) = f(h), h (N, F), or (N, 2 F) of gates, then values."""
    F = a.shape[1]
    for i in range(first, last):
        gate_row(kind, h[i, :F], a[i])
        for f in range(F):
            a[i, f] *= h[i, f]
        for f in range(h.shape[1] - F):
            a[i, f] *= h[i, F + f]


@kernel
def activation_backward_kernel(first, last, kind, h, da, dh):
    """Rows of dh, of the shape of h, from da (N, F)."""
    F = da.shape[1]
    for i in range(first, last):
        gate_row(kind, h[i, :F], dh[i, :F])
        for f in range(h.shape[1] - F):  # a = v s value
            dh[i, F + f] = da[i, f] * h[i, f] * dh[i, f]
        slope_row(kind, h[i, :F], da[i], dh[i, :F])
        for f in range(h.shape[1] - F):
            dh[i, f] *= h[i, F + f]


def activation_forward_numba(kind, h):
    h_NF, gated = as_rows(h), kind[-1]
    a = np.empty((len(h_NF), h.shape[-1] // (1 + gated)), h.dtype)
    THREADS.run(activation_kernel, len(a), kind, h_NF, a)
    return a.reshape(*h.shape[:-1], -1), (h_NF,)


def activation_backward_numba(kind, da, cache):
    THREADS.run(activation_backward_kernel, len(cache[0]), kind, cache[0], as_rows(da), dh := np.empty_like(cache[0]))
    return dh.reshape(*da.shape[:-1], -1)


@kernel
def rotate_kernel(first, last, x, cos, sin, half, y):
    """Heads of y (heads, T, D): section 2.5."""
    for i in range(first, last):
        for t in range(x.shape[1]):
            for d in range(cos.shape[1]):
                even, odd = (d, d + cos.shape[1]) if half else (2 * d, 2 * d + 1)
                y[i, t, even] = x[i, t, even] * cos[t, d] - x[i, t, odd] * sin[t, d]
                y[i, t, odd] = x[i, t, even] * sin[t, d] + x[i, t, odd] * cos[t, d]


def rotate_forward_numba(x, cos, sin, half):
    heads = np.ascontiguousarray(x).reshape(-1, *x.shape[-2:])
    THREADS.run(rotate_kernel, len(heads), heads, cos, sin, half, y := np.empty_like(heads))
    return y.reshape(x.shape), (cos, sin, half)


@kernel
def embedding_backward_kernel(first, last, tokens, dx, dw):
    """Columns of dw (V, C) += dx (N, C) at tokens (N,), row after row: a token that repeats adds up."""
    for n in range(tokens.size):
        for c in range(first, last):
            dw[tokens[n], c] += dx[n, c]


def embedding_backward_numba(dx, cache, dw, dpositions):
    THREADS.run(embedding_backward_kernel, dx.shape[-1], cache[0].reshape(-1), as_rows(dx), dw)
    if dpositions is not None:
        dpositions[: dx.shape[1]] += dx.sum(0)


@kernel
def cross_entropy_kernel(first, last, logits, top, lse):
    """Rows of lse (N,) from logits (N, V) and their maxima (N,); section 2.8."""
    for i in range(first, last):
        total = logits.dtype.type(0)
        for v in range(logits.shape[1]):
            total += exp(logits[i, v] - top[i])
        lse[i] = top[i] + math.log(total)


@kernel
def cross_entropy_backward_kernel(first, last, logits, targets, weights, lse, dlogits):
    """Rows of dlogits (N, V) = weights (softmax(logits) - onehot(targets))."""
    for i in range(first, last):
        for v in range(logits.shape[1]):
            dlogits[i, v] = weights[i] * exp(logits[i, v] - lse[i])
        dlogits[i, targets[i]] -= weights[i]


def cross_entropy_forward_numba(logits, targets, weights):
    lse = np.empty(len(logits), logits.dtype)
    THREADS.run(cross_entropy_kernel, len(logits), logits, logits.max(-1), lse)
    nats = lse - logits[np.arange(len(targets)), targets]
    return (weights * nats).sum(), nats, (logits, targets, weights.astype(logits.dtype), lse)


def cross_entropy_backward_numba(cache):
    THREADS.run(cross_entropy_backward_kernel, len(cache[0]), *cache, dlogits := np.empty_like(cache[0]))
    return dlogits


# ######################################################################################################################
# Part III: tables of ops, configurations, checkpoints
# ######################################################################################################################

# == 9  threads, tables of ops =========================================================================================


def find_extra(name):
    """The module extras/NAME.py; None where it is not here."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(f"extras.{name}")


def count_cores():
    """The number of cores that this process may use; extras/machine.py knows the quotas of containers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    machine = find_extra("machine")
    return machine.within_quotas(cores) if machine else cores


def open_cache(function):
    """Numba's cache of a function; that of extras/machine.py survives damaged files and read-only folders."""
    machine = find_extra("machine")
    return machine.open_cache(function) if machine else FunctionCache(function)


note_once = functools.cache(lambda line: print(line, file=sys.stderr, flush=True))


class Threads:
    """The threads that run kernels. `count` may change between two runs."""

    def __init__(self):
        self.begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.begin)

    count = functools.cached_property(lambda self: count_cores())

    def begin(self):
        """Have no threads yet, as in a child process: fork copies none."""
        self.jobs, self.started = queue.SimpleQueue(), 0

    def start(self, helpers):
        """Start threads up to so many, as far as the system allows -> their number."""
        try:
            while self.started < helpers:  # threading.Thread would wait for ever for one that finds no memory
                _thread.start_new_thread(serve, (self.jobs,))
                self.started += 1
        except (RuntimeError, MemoryError) as error:
            note_once(f"{error}: computing with the threads that there are")
        return min(helpers, self.started)

    def run(self, kernel, tasks, *args, unit=1):
        """kernel(first, last, *args) on shares of the tasks 0 .. tasks - 1, in whole `unit`s; a thread that is free,
        this one too, takes the next share."""
        if not getattr(kernel, "signatures", True):  # not compiled yet: importing touches no file
            kernel._cache = open_cache(kernel.py_func)
        shares = max(1, min(self.count, units := -(-tasks // unit)))
        cuts = [min(tasks, i * units // shares * unit) for i in range(shares + 1)]
        left, done = iter([*zip(cuts, cuts[1:])]), queue.SimpleQueue()

        def work():
            for share in left:
                try:
                    done.put(kernel(*share, *args))  # None
                except BaseException as error:
                    done.put(error)

        for _ in range(self.start(shares - 1)):
            self.jobs.put(work)
        work()
        if errors := [error for error in [done.get() for _ in range(shares)] if error]:
            raise errors[0]


def serve(jobs):
    while True:
        jobs.get()()


THREADS = Threads()


def set_threads(count):  # of every table
    THREADS.count = count
    if "fast" in sys.modules:
        sys.modules["fast"].POOL.resize(count)


@dataclass(frozen=True)
class Ops:
    """A table of the functions that a model runs on; each keeps the contract of the specification, the default. Tier 2
    brings faster primitives under the same sublayers; `fast` faster sublayers, which find their buffers in `space`."""

    name: str
    embedding: Pair = Pair(embedding_forward, embedding_backward)
    linear: Pair = Pair(linear_forward, linear_backward)
    norms: dict = dataclasses.field(default_factory=lambda: NORMS)
    activations: dict = dataclasses.field(default_factory=lambda: ACTIVATIONS)
    rotate: Pair = Pair(rotate_forward, rotate_backward)
    attention: Pair = Pair(attention_forward, attention_backward)
    cross_entropy: Pair = Pair(cross_entropy_forward, cross_entropy_backward)
    embed: Pair = Pair(embed_forward, embed_backward)
    attention_layer: Pair = Pair(attention_layer_forward, attention_layer_backward)
    mlp_layer: Pair = Pair(mlp_layer_forward, mlp_layer_backward)
    head_logits: Callable = head_logits
    head_loss: Callable = head_loss
    steps: Callable = None  # decodes token by token without Python in between; None: `forward` with a cache
    make_space: Callable = None  # (cfg, B, T, dtype, recompute) -> buffers for such batches; None: needs none
    space: dict = None


def pairs_of(forward, backward, kinds):
    """{name: kind} -> {name: Pair of both functions for this kind}."""
    return {name: Pair(*(functools.partial(f, kind) for f in (forward, backward))) for name, kind in kinds.items()}


ACTIVATION_KINDS = {  # of `gate_row`: shape of s; c1, c3; whether values follow the gates
    "gelu-tanh": (SIGMOID, 2 * GELU_SCALE, 2 * GELU_SCALE * GELU_CUBE, False),  # (1 + tanh u) / 2
    "gelu": (NORMAL, 0.0, 0.0, False),
    "silu": (SIGMOID, 1.0, 0.0, False),
    "relu2": (RELU, 0.0, 0.0, False),
    "swiglu": (SIGMOID, 1.0, 0.0, True),
}
OPS = {"numpy": Ops("numpy")}
OPS["numba"] = Ops(  # what is not named here, a new norm for example, is the specification's
    "numba",
    embedding=Pair(embedding_forward, embedding_backward_numba),
    linear=Pair(linear_forward_numba, linear_backward_numba),
    norms=NORMS | pairs_of(norm_forward_numba, norm_backward_numba, {"layernorm": True, "rmsnorm": False}),
    activations=ACTIVATIONS | pairs_of(activation_forward_numba, activation_backward_numba, ACTIVATION_KINDS),
    rotate=Pair(rotate_forward_numba, lambda dy, cache: rotate_forward_numba(dy, cache[0], -cache[1], cache[2])[0]),
    attention=Pair(attention_forward_numba, attention_backward_numba),
    cross_entropy=Pair(cross_entropy_forward_numba, cross_entropy_backward_numba),
)
KERNELS = ("fast", "numba", "numpy")  # names of tables, the fastest first


def find_ops(kernels=None, dtype="float32"):
    """The table of a name in KERNELS, by default the fastest that is here. bfloat16 is a property of `fast`: its large
    products round their operands to it. ValueError in one line if there is no such table."""
    if numba.config.DISABLE_JIT and not kernels:
        kernels = note_once("NUMBA_DISABLE_JIT is set, so nothing is compiled: --kernels numpy") or "numpy"
    kernels = kernels or KERNELS[importlib.util.find_spec("fast") is None]
    if kernels not in KERNELS or dtype not in ("float32", "bfloat16"):
        raise ValueError(f"kernels={kernels}, dtype={dtype}: expected {' or '.join(KERNELS)}, float32 or bfloat16")
    if kernels != "fast":
        if dtype != "float32":
            raise ValueError(f"--dtype {dtype} is about the products of --kernels fast; leave it out with {kernels}")
        return OPS[kernels]
    try:
        from fast import table
    except ImportError as error:
        message = "--kernels fast needs the folder fast/ beside tinygpt.py; use --kernels numba"
        raise ValueError(f"{message} ({error})") from None
    return table(dtype)


def with_buffers(ops, cfg, B, T, dtype=np.float32, recompute=False, backward=True):
    """The table with buffers for micro-batches (B, T), if it works in any; `recompute`: of layers that run twice. Where
    no backward follows, the layers take turns in the buffers of one."""
    if not ops.make_space:
        return ops
    space = ops.make_space(cfg if backward else dataclasses.replace(cfg, layers=1), B, T, dtype, recompute)
    return dataclasses.replace(ops, space=space if backward else space | {"layers": space["layers"] * cfg.layers})


# == 10  configurations: their fields, sizes ===========================================================================


def divisor_below(n, most):
    return max(d for d in range(1, min(most, 4096) + 1) if n % d == 0)


def complete(cfg):
    """Fill in the fields of a `Config` that are left at 0; ValueError if they do not fit. V = 0: layers alone."""
    for field in dataclasses.fields(cfg):
        value, kind, choices = getattr(cfg, field.name), field.type, CHOICES.get(field.name)
        number, most = kind in (int, float), 1 if field.name.endswith("dropout") else 2**31
        off = value == 0 and (field.default == 0 or field.name == "vocab_size")
        if type(value) is not kind or (number and not (off or 0 < value < most)):
            expected = "0 (off) to below 1" if most == 1 else f"a{' positive' * number} {kind.__name__}"
            raise ValueError(f"{field.name} is {value!r}; expected {expected}")
        if choices and value not in choices:
            raise ValueError(f"{field.name} is {value!r}; expected one of {', '.join(choices)}")
    if not cfg.head_width and cfg.width % cfg.heads:
        fits = divisor_below(cfg.width, cfg.heads)
        raise ValueError(f"width {cfg.width} does not divide into heads={cfg.heads}; try heads={fits}")
    for name, default in cfg.defaults().items():
        object.__setattr__(cfg, name, getattr(cfg, name) or default)
    if cfg.heads % cfg.kv_heads:
        fits = divisor_below(cfg.heads, cfg.kv_heads)
        raise ValueError(f"heads={cfg.heads} cannot share kv_heads={cfg.kv_heads}; try kv_heads={fits}")
    if cfg.positions.startswith("rope") and cfg.head_width % 2:
        raise ValueError(f"positions={cfg.positions} turns pairs, but head_width={cfg.head_width} is odd")
    if cfg.position_rows < cfg.seq_len:
        raise ValueError(f"position_rows={cfg.position_rows} is below seq_len={cfg.seq_len}; raise it or leave it")


# Ours is Qwen3's shape, which other programs open, and a norm after the embedding, which folds into a table of its own.
OWN = dict(vocab_size=4096, norm="rmsnorm", mlp="swiglu", positions="rope-half", qk_norm=True, embedding_norm=True)
OWN |= dict.fromkeys(("qkv_bias", "out_bias", "up_bias", "down_bias"), False)
SIZES = {
    "700k": Config(**OWN, seq_len=256, width=64, layers=8, heads=4, hidden=176),  # hidden: about 8/3 of the width
    "1m": Config(**OWN, seq_len=256, width=128, layers=4, heads=4, hidden=352),
    "8m": Config(**OWN, seq_len=512, width=256, layers=8, heads=8, hidden=704),
    "28m": Config(**OWN, seq_len=512, width=512, layers=8, heads=8, hidden=1376),
}


def find_sizes():
    """{name: Config}: our sizes, then those that others built if extras/recipes.py is here."""
    return SIZES | getattr(find_extra("recipes"), "SIZES", {})


def find_size(name):
    """The `Config` of a size. ValueError if there is none of this name."""
    if name in (sizes := find_sizes()):
        return sizes[name]
    more = "; more sizes need extras/recipes.py" if sizes == SIZES else ""
    raise ValueError(f"there is no size {name}; expected one of {', '.join(sizes)}{more}")


def overrides(words):
    """FIELD=VALUE words -> {field of Config: value}. ValueError for another field or a value of another kind."""
    kinds, changes = {field.name: field.type for field in dataclasses.fields(Config)}, {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in kinds:
            raise ValueError(f"--set {word}: a model has no {name!r}; it has {', '.join(kinds)}")
        try:
            truth = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            changes[name] = truth[text.lower()] if kinds[name] is bool else kinds[name](text)
        except (ValueError, KeyError):
            raise ValueError(f"--set {word}: expected {name}={kinds[name].__name__}") from None
    return changes


# == 11  checkpoints ===================================================================================================
#
# A `.safetensors` file: the length of a JSON header (8 bytes, little-endian), the header, the tensors without gaps.
# https://github.com/huggingface/safetensors#format. Tensors have the names of `layout`, in its order. The
# metadata holds configuration, tokenizer, and a CRC-32 of it all: 1.9 GB/s where SHA-256, against malice, has 1.0.

FORMAT, FORMAT_VERSION = "tinygpt", "1"
DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BF16": np.dtype([("BF16", "<u2")])}
HEADER_MOST, MARKS_MOST, TEXTS_MOST = 100_000_000, 1 << 22, 1 << 19  # of a header: bytes, those outside texts, texts


def write_aside(path, chunks):
    """Write byte chunks to `path`, or to what it links to, so that it holds all of them or is as it was. Of processes
    that write one path at once, the last one to finish wins. OSError, which names `path`, if it cannot."""
    given, path = str(path), Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a device or a pipe is written to, not replaced
        with open(path, "wb") as file:
            return file.writelines(chunks)
    for left in path.parent.glob("*.tmp"):
        with contextlib.suppress(OSError):  # another process may just have removed or renamed it
            if left.name.startswith(f"{path.name}.") and time.time() - left.stat().st_mtime > 3600:  # of a killed one
                left.unlink()
    aside = f"{path}.{os.getpid()}-{os.urandom(8).hex()}.tmp"
    try:
        with open(aside, "xb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        if os.name == "posix":  # the folder's entry as well
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(aside)  # a full disk is not kept full
        if isinstance(error, OSError) and error.strerror and error.filename in (None, aside):
            error.filename = given
        raise


def checksum(header, chunks):
    """CRC-32, eight digits, of a header as it is parsed, its own checksum left out, and of the bytes behind it."""
    metadata = {name: text for name, text in header.get("__metadata__", {}).items() if name != "crc32"}
    crc = zlib.crc32(json.dumps(header | {"__metadata__": metadata}, sort_keys=True).encode())
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def write_safetensors(path, tensors, metadata, dtypes=DTYPES):
    """tensors: name -> array of one of these dtypes; metadata: name -> string."""
    names = {dtype: name for name, dtype in dtypes.items()}
    header, offset = {"__metadata__": metadata}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    data = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in tensors.values()]
    text = json.dumps(header | {"__metadata__": metadata | {"crc32": checksum(header, data)}}).encode()
    text += b" " * (-len(text) % 8)
    write_aside(path, (len(text).to_bytes(8, "little"), text, *data))


def parse_header(text, dtypes):
    """The JSON text of a header -> (metadata, [(name, dtype, shape, first byte)], number of bytes). ValueError or
    another error of the language unless its rows are those that `write_safetensors` writes for such tensors."""
    outside = text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', 2 * TEXTS_MOST)[::2]
    if sum(map(len, outside)) > MARKS_MOST:  # a value of three bytes, such as [], is an object of 70 in memory
        raise ValueError("more values than tensors can need")
    header, rows, end = json.loads(text), [], 0
    metadata = header.pop("__metadata__", {})
    for name, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = dtypes[row["dtype"]], [int(n) for n in row["shape"]]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        expected = {"dtype": row["dtype"], "shape": shape, "data_offsets": [begin, end]}
        as_expected = json.dumps(row, sort_keys=True) == json.dumps(expected, sort_keys=True)  # 1.0 and true equal 1
        if not as_expected or len(shape) > 8 or not all(0 <= n < 2**48 for n in shape):
            raise ValueError(f"{name} is not a tensor that follows the one before")
        rows.append((name, dtype, shape, begin))
    if not all(type(text) is str for text in metadata.values()):
        raise ValueError("metadata that is not text")
    return metadata, rows, end


def read_safetensors(path, dtypes=DTYPES):
    """(tensors, metadata) as given to `write_safetensors`. ValueError for anything else: of a header that does not fit
    the file before a tensor is read, of other bytes than were written where there is a checksum."""

    def refuse(what):
        raise ValueError(f"{path} is not a checkpoint that can be read: {what}")

    with open(path, "rb") as f:
        size, head = os.fstat(f.fileno()).st_size, f.read(8)
        start = 8 + int.from_bytes(head, "little")
        if len(head) < 8 or start > min(size, HEADER_MOST):
            refuse(f"it is cut short or of another format (its header claims {start} bytes, the file has {size})")
        text = f.read(start - 8)
        try:
            metadata, rows, end = parse_header(text, dtypes)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            refuse(f"its header is not that of a .safetensors file with tensors of {', '.join(dtypes)}")
        if size != start + end:
            refuse(f"its tensors end at byte {start + end}, the file at {size}")
        data = f.read()
    written = metadata.pop("crc32", None)  # files of other writers have none
    if written and written != (found := checksum(json.loads(text), [data])):
        refuse(f"it is damaged: its checksum is {found}, expected {written[:8]!r}; take an earlier one or a copy")
    arrays = [np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape) for _, dtype, shape, begin in rows]
    return {row[0]: x for row, x in zip(rows, arrays)}, metadata


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
    """A `Checkpoint` of finite numbers. ValueError if the file is not one, OSError if it cannot be read."""
    tensors, metadata = read_safetensors(path)
    tensors |= {k: (x["BF16"].astype("<u4") << 16).view("<f4") for k, x in tensors.items() if x.dtype.names}  # exact
    name, number = (" ".join(str(metadata.get(key)).split())[:40] for key in ("format", "version"))
    if (name, number) != (FORMAT, FORMAT_VERSION):
        expected = f"expected format {FORMAT}, version {FORMAT_VERSION}; a newer one needs an update"
        raise ValueError(f"{path} has format {name}, version {number}; {expected}")
    try:
        cfg, tokenizer = Config(**json.loads(metadata["config"])), metadata["tokenizer"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not describe its model: {error!s:.200}") from None
    check_finite(path, tensors)
    parts, table = [], layout(cfg)
    dtype = tensors[table[0].name].dtype if table[0].name in tensors else np.dtype(np.float32)
    for t in table:
        x = tensors.pop(t.name, None)
        if x is None or (x.shape, x.dtype) != (t.shape, dtype):
            found = "missing" if x is None else f"{x.dtype} {x.shape}"
            raise ValueError(f"{path}: tensor {t.name} is {found}; expected {dtype} {t.shape}")
        parts.append(x.reshape(-1))
    return Checkpoint(np.concatenate(parts), cfg, tokenizer, tensors, metadata)


def check_finite(path, tensors):
    """ValueError that names the first of the tensors, name -> array, which holds NaN or infinity."""
    for name, x in tensors.items():
        if not np.isfinite(x).all():
            raise ValueError(f"{path}: tensor {name} holds NaN or infinity; take an earlier checkpoint, or train again")


if __name__ == "__main__":
    check = find_extra("check")  # which imports this file as the module that fast/ imports, too
    sys.exit(check.main() if check else "tinygpt.py: the checks are extras/check.py, which is not here")
