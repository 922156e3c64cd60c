"""A transformer that tells stories: the model, its gradients by hand, its kernels.

    python tinygpt.py check        # every gradient against finite differences, with the errors found

Part I is the specification, in NumPy, and is complete: a reader who stops there has read the whole model and its
gradients. Part II computes the same sublayers in Numba, as fast as the machine allows. Part III holds the sizes,
decoding, checkpoints and the checks that Part I and Part II agree with calculus and with each other.

    Part I    1 configuration and parameters    2 primitives    3 sublayers    4 the model
    Part II   5 matrix products                 6 rows          7 sublayers    8 tables of ops
    Part III  9 sizes    10 decoding    11 checkpoints    12 checks

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

import argparse
import contextlib
import dataclasses
import functools
import glob
import json
import math
import os
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils, compiler
from numba.extending import intrinsic, overload, register_jitable
from numba.np.arrayobj import populate_array

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


def divisor_near(wish, n):
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wish))


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
    init: str = "fan-in"  # whose rule: section 9

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
        """Columns of the MLP's first product: F, or 2 F where a gate stands before the values."""
        return 2 * self.hidden if self.mlp == "swiglu" else self.hidden

    def __post_init__(self):
        """Fill in the fields that are left at 0; ValueError if the fields do not fit together."""
        for name in ("vocab_size", "seq_len", "width", "layers", "heads"):  # what the defaults below are made of
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a positive int")
        if not self.head_width and self.width % self.heads:
            near = divisor_near(self.heads, self.width)
            raise ValueError(f"width {self.width} does not divide into heads={self.heads}; try heads={near}")
        for name, default in self.defaults().items():
            object.__setattr__(self, name, getattr(self, name) or default)
        for field in dataclasses.fields(self):
            value, dropout = getattr(self, field.name), field.name.endswith("dropout")
            number = field.type in (int, float)
            low = 0 if dropout or field.name == "window" else math.ulp(0)
            if type(value) is not field.type or (number and not low <= value < (1 if dropout else 2**31)):
                expected = "0 (off) to below 1" if dropout else f"a{' positive' * number} {field.type.__name__}"
                raise ValueError(f"{field.name} is {value!r}; expected {expected}")
            if value not in CHOICES.get(field.name, (value,)):
                raise ValueError(f"{field.name} is {value!r}; expected one of {', '.join(CHOICES[field.name])}")
        if self.heads % self.kv_heads:
            near = divisor_near(self.kv_heads, self.heads)
            raise ValueError(f"heads={self.heads} cannot share kv_heads={self.kv_heads}; try kv_heads={near}")
        if self.positions.startswith("rope") and self.head_width % 2:
            raise ValueError(f"positions={self.positions} turns pairs, but head_width={self.head_width} is odd")
        if self.position_rows < self.seq_len:
            few = f"position_rows={self.position_rows} is below seq_len={self.seq_len}"
            raise ValueError(f"{few}; raise it or leave it")


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
    """Names -> views of `flat`; layered tensors stand, one layer each, in the list under "layers"."""
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


def attention_forward(q, k, v, scale, slopes=None, window=0, dropout=None, rate=0.0):
    """q (B, H, T, D), k and v (B, G, S, D) -> o (B, H, T, D).   Vaswani et al. 2017, arXiv:1706.03762.

    The T queries are the last of the S positions: query t sees keys 0 .. S - T + t, of them the last `window` (0: all).
    Head h reads keys h // (H / G) (Ainslie et al. 2023, arXiv:2305.13245); slopes (H,): ALiBi; rate: of dropout of p.
    """
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    keep = dropout and dropout.keep(ATTENTION_SITE, rate, (B, H, T, S), q.dtype)
    q_BGRTD, k_BG1SD, v_BG1SD = q.reshape(B, G, H // G, T, D), k[:, :, None], v[:, :, None]
    scores = (q_BGRTD @ k_BG1SD.swapaxes(-1, -2) * scale).reshape(B, H, T, S)
    distance = np.arange(S - T, S)[:, None] - np.arange(S)  # (T, S)
    if slopes is not None:
        scores = scores - slopes.astype(q.dtype)[:, None, None] * distance.astype(q.dtype)
    scores = np.where((distance >= 0) & (distance < (window or S)), scores, -math.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)  # (B, H, T, S)
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
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


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
    x, lookup = ops.embedding_forward(tokens, p["embed_w"], positions)
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
    ops.embedding_backward(dx, lookup, g["lookup_w"], g["position_w"])


def attention_layer_forward(x, p, cfg, ops, index=0, past=None, dropout=None):
    """x (B, T, C) -> x + attention(norm1(x)) out_w + out_b, (B, T, C), in layer number `index`.

    past = (kv, start): kv (B, positions, 2, G, D) holds the keys and values of `start` earlier positions and takes the
    new ones; queries see all of them.
    """
    (B, T, _), (H, G, D) = x.shape, (cfg.heads, cfg.kv_heads, cfg.head_width)
    kv, start = past or (None, 0)
    n, norm = ops.norms[cfg.norm].forward(x, p["norm1_w"], p["norm1_b"], cfg.norm_eps)
    qkv, qkv_linear = ops.linear_forward(n, p["qkv_w"], p["qkv_b"])  # (B, T, D (H + 2 G))
    heads = qkv.reshape(B, T, H + 2 * G, D).transpose(0, 2, 1, 3)  # (B, H + 2 G, T, D)
    q, k, v = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
    q_norm = k_norm = q_turn = k_turn = None
    if cfg.qk_norm:
        q, q_norm = ops.norms["rmsnorm"].forward(q, p["q_norm_w"], None, cfg.norm_eps)
        k, k_norm = ops.norms["rmsnorm"].forward(k, p["k_norm_w"], None, cfg.norm_eps)
    if cfg.positions.startswith("rope"):
        cos, sin = (a[start : start + T] for a in rotation(cfg.seq_len, D, cfg.rope_theta, x.dtype.name))
        q, q_turn = ops.rotate_forward(q, cos, sin, cfg.positions == "rope-half")
        k, k_turn = ops.rotate_forward(k, cos, sin, cfg.positions == "rope-half")
    if past is not None:
        kv[:, start : start + T] = np.stack([k, v]).transpose(1, 3, 0, 2, 4)  # (B, T, 2, G, D)
        k, v = kv[:, : start + T].transpose(2, 0, 3, 1, 4)  # 2 of (B, G, S, D)
    slopes = alibi_slopes(H) if cfg.positions == "alibi" else None
    scale = 1 / math.sqrt(D) if cfg.attention_scale else 1.0
    drop = (dropout, cfg.attention_dropout)
    o_BHTD, attention = ops.attention_forward(q, k, v, scale, slopes, layer_window(cfg, index), *drop)
    o = o_BHTD.transpose(0, 2, 1, 3).reshape(B, T, H * D)
    y, out_linear = ops.linear_forward(o, p["out_w"], p["out_b"])
    keep = dropout and dropout.keep(OUT_SITE, cfg.out_dropout, y.shape, y.dtype)
    cache = (norm, qkv_linear, q_norm, k_norm, q_turn, k_turn, attention, out_linear, keep)
    return x + (y if keep is None else y * keep), cache


def attention_layer_backward(dy, cache, p, g, cfg, ops, index=0):
    """dy (B, T, C) -> dx (B, T, C); adds into g."""
    norm, qkv_linear, q_norm, k_norm, q_turn, k_turn, attention, out_linear, keep = cache
    B, T, _ = dy.shape
    do = ops.linear_backward(dy if keep is None else dy * keep, out_linear, g["out_w"], g["out_b"])  # (B, T, H D)
    do_BHTD = do.reshape(B, T, cfg.heads, cfg.head_width).transpose(0, 2, 1, 3)
    dq, dk, dv = ops.attention_backward(do_BHTD, attention)
    if cfg.positions.startswith("rope"):
        dq, dk = ops.rotate_backward(dq, q_turn), ops.rotate_backward(dk, k_turn)
    if cfg.qk_norm:
        dq = ops.norms["rmsnorm"].backward(dq, q_norm, g["q_norm_w"], None)
        dk = ops.norms["rmsnorm"].backward(dk, k_norm, g["k_norm_w"], None)
    dqkv = np.concatenate([dq, dk, dv], 1).transpose(0, 2, 1, 3).reshape(B, T, cfg.qkv_width)
    dn = ops.linear_backward(dqkv, qkv_linear, g["qkv_w"], g["qkv_b"])
    return dy + ops.norms[cfg.norm].backward(dn, norm, g["norm1_w"], g["norm1_b"])


def mlp_layer_forward(x, p, cfg, ops, index=0, dropout=None):
    """x (B, T, C) -> x + f(norm2(x) up_w + up_b) down_w + down_b, (B, T, C)."""
    n, norm = ops.norms[cfg.norm].forward(x, p["norm2_w"], p["norm2_b"], cfg.norm_eps)
    h, up_linear = ops.linear_forward(n, p["up_w"], p["up_b"])  # (B, T, F), gated (B, T, 2 F)
    a, activation = ops.activations[cfg.mlp].forward(h)
    y, down_linear = ops.linear_forward(a, p["down_w"], p["down_b"])
    keep = dropout and dropout.keep(MLP_SITE, cfg.mlp_dropout, y.shape, y.dtype)
    return x + (y if keep is None else y * keep), (norm, up_linear, activation, down_linear, keep)


def mlp_layer_backward(dy, cache, p, g, cfg, ops, index=0):
    """dy (B, T, C) -> dx (B, T, C); adds into g."""
    norm, up_linear, activation, down_linear, keep = cache
    da = ops.linear_backward(dy if keep is None else dy * keep, down_linear, g["down_w"], g["down_b"])  # (B, T, F)
    dh = ops.activations[cfg.mlp].backward(da, activation)
    dn = ops.linear_backward(dh, up_linear, g["up_w"], g["up_b"])
    return dy + ops.norms[cfg.norm].backward(dn, norm, g["norm2_w"], g["norm2_b"])


def head_forward(x, p, cfg, ops):
    """x (N, C) -> logits (N, V) = norm(x) head_w^T + head_b."""
    n, norm = x, None
    if cfg.final_norm:
        n, norm = ops.norms[cfg.norm].forward(x, p["norm_w"], p["norm_b"], cfg.norm_eps)
    logits, linear = ops.linear_forward(n, p["embed_w" if cfg.tied else "head_w"].T, p["head_b"])
    return logits, (norm, linear)


def head_backward(dlogits, cache, g, cfg, ops):
    """dlogits (N, V) -> dx (N, C); adds into g."""
    norm, linear = cache
    dn = ops.linear_backward(dlogits, linear, g["embed_w" if cfg.tied else "head_w"].T, g["head_b"])
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
        loss_b, nats[b], cross_entropy = ops.cross_entropy_forward(logits, targets[b], weights[b])
        loss += float(loss_b)
        if g is not None:
            dx[b] = head_backward(ops.cross_entropy_backward(cross_entropy), head, g, cfg, ops)
    return loss, nats, dx


# == 4  the model ======================================================================================================


def forward(p, tokens, cfg, ops, past=None, dropout=None):
    """tokens (B, T) -> x (B, T, C), what the head reads; caches for `backward`.

    past = (kv, start): kv (L, B, positions, 2, G, D), as in `attention_layer_forward`. ValueError on a bad token or T.
    """
    start = past[1] if past is not None else 0
    check_tokens(tokens, start, cfg)
    x, embed = ops.embed_forward(tokens, p, cfg, ops, start, dropout)
    caches = [embed]
    for index, layer in enumerate(p["layers"]):
        layer_past, masks = past and (past[0][index], start), dropout and dropout._replace(layer=index)
        x, attention = ops.attention_layer_forward(x, layer, cfg, ops, index, layer_past, masks)
        x, mlp = ops.mlp_layer_forward(x, layer, cfg, ops, index, masks)
        caches += [attention, mlp]
    return x, caches


def backward(dx, caches, p, g, cfg, ops):
    """dx (B, T, C), the gradient of what `forward` returned; adds into g."""
    caches = list(caches)
    for index in reversed(range(cfg.layers)):
        layer, grads = p["layers"][index], g["layers"][index]
        dx = ops.mlp_layer_backward(dx, caches.pop(), layer, grads, cfg, ops, index)
        dx = ops.attention_layer_backward(dx, caches.pop(), layer, grads, cfg, ops, index)
    ops.embed_backward(dx, caches.pop(), g, cfg, ops)


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
# Part II: the same sublayers in Numba
# ######################################################################################################################
#
# Blocks of rows travel through a sublayer while they are in a core's cache. A kernel is sequential and does one task of
# many: `kernel(task, slot, ...)` for task 0 .. count - 1, driven by a pool of threads without the interpreter's lock.
# Every task owns what it writes, and sums run in an order that neither threads nor micro-batches change:
#   - an element of a product is one chain of fused multiply-adds in the order of k;
#   - a weight gradient continues, row after row, the chain that the rows before it left;
#   - gains and biases of a norm are summed within blocks of a sequence's rows, the blocks in the order of rows.

if not numba.config.CPU_NAME and binding.get_host_cpu_features().get("avx512f", False):
    # LLVM keeps to half of a register where the clock of early processors fell with whole ones
    numba.config.CPU_NAME = binding.get_host_cpu_name()
    numba.config.CPU_FEATURES = binding.get_host_cpu_features().flatten() + ",-prefer-256-bit"

FASTMATH = {"contract", "reassoc", "nsz", "arcp"}  # neither nnan nor ninf: a NaN must be seen
# Numba's own error model checks divisions: no vectors. Kernels allocate nothing: nobody need count who holds an array.
COMPILE = {"error_model": "numpy", "_nrt": False, "fastmath": FASTMATH}
# Of a kernel, compiled with it; called from Python it is Python. Always inlined: of a function that kernels share, the
# linker takes the copy that comes first, another one when they come from the cache, and the copies' sums may differ.
part = register_jitable(**COMPILE, forceinline=True)
# with sums and products in the order in which they are written, whatever is compiled around them
ordered_part = register_jitable(**COMPILE | {"fastmath": {"contract", "nsz"}}, forceinline=True)

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


def function_of_tasks(context, module, compiled, arguments):
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
    status, _ = context.call_internal_no_propagate(builder, compiled.fndesc, compiled.signature, (task, slot, *rest))
    with builder.if_then(status.is_error):
        builder.store(i64(1), word_at(builder, words, FAILED))
    builder.branch(take)
    builder.position_at_end(done)
    builder.ret_void()
    return function


@intrinsic
def open_gate(typing_context, words, count, body, args):
    """Describe the launch, open the gate to the helpers, work with them, close it, wait for those still inside."""

    def build(context, builder, signature, values):
        i64, (words, count, _, arguments), flags = ir.IntType(64), values, compiler.Flags()
        jitted = body.dispatcher  # compiled here, not linked: as a library of its own it would be optimised twice
        jitted.targetdescr.options.parse_as_flags(flags, jitted.targetoptions)
        flags.no_compile, kinds, library = True, (types.int64, types.int64, *args.types), context.active_code_library
        compiled = compiler.compile_extra(typing_context, context, jitted.py_func, kinds, None, flags, {}, library)
        arguments = cgutils.alloca_once_value(builder, arguments)
        function = function_of_tasks(context, builder.module, compiled, arguments.type)
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
        self.compiles = None  # name -> whether to compile what has it, where nothing is to run

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
        if self.compiles is not None:
            return self.compiles(function.__name__) and function(self.words.ctypes.data, 0, *args)
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
HEADER_BYTES = 2 * CACHE_LINE  # of a panel: zeros, or who makes products instead, in the words of tiles.py
HEADER = HEADER_BYTES // 4  # in elements of float32; room enough where they are larger
PANEL_SIZE = HEADER + (DEPTH * TILE_VECTORS + TILE_ROWS) * VECTOR_BYTES // 4  # in elements


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
pair_wide, pair_two, pair_one = (register_tile(2, vectors) for vectors in (TILE_VECTORS, 2, 1))
high_two, high_one = (register_tile(2 * TILE_ROWS, vectors) for vectors in (2, 1))
flat_wide, flat_two, flat_one = (register_tile(1, vectors) for vectors in (TILE_VECTORS, 2, 1))


@part
def sweep(a, a_row, a_k, b, b_k, c, c_row, rows, vectors, k, add, zero):
    """A panel of `vectors` vectors of c, all its rows: tall tiles, then the rows that remain by two, then one."""
    if vectors < TILE_VECTORS:  # a narrow tile keeps busy with more rows
        for _ in range(rows // (2 * TILE_ROWS)):
            if vectors == 2:
                high_two(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
            else:
                high_one(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
            a, c = a + 2 * TILE_ROWS * a_row, c + 2 * TILE_ROWS * c_row
        rows %= 2 * TILE_ROWS
    for _ in range(rows // TILE_ROWS):
        if vectors == TILE_VECTORS:
            tall_wide(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        elif vectors == 2:
            tall_two(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        else:
            tall_one(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        a, c = a + TILE_ROWS * a_row, c + TILE_ROWS * c_row
    rows %= TILE_ROWS
    for _ in range(rows // 2):
        if vectors == TILE_VECTORS:
            pair_wide(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        elif vectors == 2:
            pair_two(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        else:
            pair_one(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        a, c = a + 2 * a_row, c + 2 * c_row
    if rows % 2:
        if vectors == TILE_VECTORS:
            flat_wide(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        elif vectors == 2:
            flat_two(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        else:
            flat_one(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)


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
def copy_at(source, step, to, to_step, rows, width, size, zero):
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


def product_at(a, a_row, a_k, b, b_k, c, c_row, M, N, K, add, panel, size, zero):
    """c (M, N) = a (M, K) b (K, N), or c += a b if add: addresses, strides and `size` of an element in bytes."""
    if panel != 0 and elsewhere(panel, (a, a_row, a_k, b, b_k, c, c_row, M, N, K, add, panel)):
        return
    panel += HEADER_BYTES
    lanes, edge = VECTOR_BYTES // size, panel + DEPTH * TILE_VECTORS * VECTOR_BYTES
    for k in range(0, K, DEPTH):
        depth, more, a_at, j = min(DEPTH, K - k), 1 if add != 0 or k > 0 else 0, a + k * a_k, 0
        while j < N:
            left = (N - j) // lanes
            vectors = TILE_VECTORS if left >= TILE_VECTORS else 2 if TILE_VECTORS > 2 and left >= 2 else 1
            width = min(vectors * lanes, N - j)
            b_at, b_down, c_at = b + k * b_k + j * size, b_k, c + j * size
            if (M >= PACK_ROWS and b_k != vectors * VECTOR_BYTES) or left == 0:
                b_down = vectors * VECTOR_BYTES
                copy_at(b_at, b_k, panel, b_down, depth, width, size, zero)
                b_at = panel
            at_once = M if left > 0 else TILE_ROWS
            for r in range(0, M, at_once):
                rows, at, down = min(at_once, M - r), c_at + r * c_row, c_row
                if left == 0:  # less than a vector of c: through a tile of its own, so that nothing beyond c is touched
                    at, down = edge, VECTOR_BYTES
                    copy_at(c_at + r * c_row, c_row, at, down, rows, width, size, zero)
                sweep(a_at + r * a_row, a_row, a_k, b_at, b_down, at, down, rows, vectors, depth, more, zero)
                if left == 0:
                    copy_at(at, down, c_at + r * c_row, c_row, rows, width, size, zero)
            j += width


@intrinsic
def transpose_square(typing_context, source, step, to, to_step, zero):
    """to (n, n) = source^T, of n rows of one vector each; addresses and row strides in bytes."""

    def build(context, builder, signature, args):
        source, step, to, to_step, _ = args
        scalar = context.get_value_type(signature.args[-1])
        size = context.get_abi_sizeof(scalar)
        n, i64 = VECTOR_BYTES // size, ir.IntType(64)
        pointer = ir.VectorType(scalar, n).as_pointer()

        def place(address, step, i):
            return builder.inttoptr(builder.add(address, builder.mul(step, i64(i))), pointer)

        rows = [builder.load(place(source, step, i), align=size) for i in range(n)]
        order = [lane for i in range(n) for lane in (i, n + i)]  # of two rows, element by element
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), n), half) for half in (order[:n], order[n:])]
        while n > 1:  # a round moves the first bit of (row, column) to its end: log2 n rounds change places
            pairs = zip(rows[: len(rows) // 2], rows[len(rows) // 2 :])
            rows, n = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks], n // 2
        for i, row in enumerate(rows):
            builder.store(row, place(to, to_step, i), align=size)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, zero), build


def transpose_at(x, x_row, out, out_row, K, M, width, size, zero):
    """out (M, width) = x (K, M)^T, and zeros in its columns from K on; addresses, row strides and `size` in bytes."""
    lanes = VECTOR_BYTES // size
    for m in range(0, M, lanes):  # what is written lies side by side
        for k in range(0, K, lanes):
            if k + lanes <= K and m + lanes <= M:
                transpose_square(x + k * x_row + m * size, x_row, out + m * out_row + k * size, out_row, zero)
            else:
                for i in range(k, min(k + lanes, K)):
                    for j in range(m, min(m + lanes, M)):
                        poke(out + j * out_row + i * size, peek(x + i * x_row + j * size, zero))
    for j in range(M):
        for i in range(K, width):
            poke(out + j * out_row + i * size, zero)


def ask(builder, place, operands):
    """Call the function whose address stands at a place: whether there is one and it did what was asked."""
    i64 = ir.IntType(64)
    address = builder.load(place, align=4)
    start, there, done = builder.block, builder.append_basic_block("there"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("!=", address, i64(0)), there, done)
    builder.position_at_end(there)
    kind = ir.FunctionType(i64, [i64] * len(operands)).as_pointer()
    answer = builder.icmp_signed("!=", builder.call(builder.inttoptr(address, kind), operands), i64(0))
    builder.branch(done)
    builder.position_at_end(done)
    found = builder.phi(ir.IntType(1))
    found.add_incoming(ir.IntType(1)(0), start)
    found.add_incoming(answer, there)
    return found


@intrinsic
def elsewhere(typing_context, panel, arguments):
    """Ask the driver that a panel's header names to make a product: whether it did."""

    def build(context, builder, signature, args):
        return ask(builder, word_at(builder, args[0]), cgutils.unpack_tuple(builder, args[1]))

    return types.boolean(types.intp, arguments), build


# Numba compiles what a function calls once more for each caller. These three would be most of the machine code of each
# kernel: they are compiled once for each dtype, given names that the linker finds, and called by name.


def symbol(function, dtype):
    return f"tinygpt_{function.__name__}_{dtype}"


@functools.cache
def provide_product(dtype):
    """Compile `product_at` and its like for a dtype; before any kernel that calls them is loaded."""
    number, compiled = numba.from_dtype(np.dtype(dtype)), []
    for function, count in ((product_at, 12), (transpose_at, 7), (copy_at, 6)):
        kind, address = types.void(*[types.intp] * (count + 1), number), 1
        if POOL.compiles is None or POOL.compiles(function.__name__):
            compiled.append(numba.cfunc(kind, cache=True, **COMPILE)(function))
            address = compiled[-1].address
        binding.add_symbol(symbol(function, number), address)
    return compiled  # and kept: machine code lives as long as what it belongs to


def call_symbol(context, builder, function, dtype, arguments):
    """function(*arguments, size of an element, zero), in the code that an intrinsic builds."""
    arguments = (*arguments, ir.IntType(64)(dtype.bitwidth // 8), context.get_constant(dtype, 0))
    name = symbol(function, dtype)
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)


def parts_of(context, builder, kinds, arrays):
    """Addresses, row strides, element strides and shapes of arrays of two axes."""
    views = [context.make_array(kind)(context, builder, x) for kind, x in zip(kinds, arrays)]
    down, right = zip(*(cgutils.unpack_tuple(builder, view.strides, 2) for view in views))
    at = [builder.ptrtoint(view.data, ir.IntType(64)) for view in views]
    return at, down, right, [cgutils.unpack_tuple(builder, view.shape, 2) for view in views]


@intrinsic
def product(typing_context, a, b, c, add, panel):
    """c (M, N) = a (M, K) b (K, N), or c += a b if `add`; K >= 1, rows of b and c without gaps, panel (PANEL_SIZE,),
    its HEADER zeros where nobody else is asked first."""

    def build(context, builder, signature, args):
        at, down, right, ((M, K), _, (_, N)) = parts_of(context, builder, (a, b, c), args[:3])
        scratch = builder.ptrtoint(context.make_array(panel)(context, builder, args[4]).data, ir.IntType(64))
        matrices = (at[0], down[0], right[0], at[1], down[1], at[2], down[2])
        more = builder.zext(args[3], ir.IntType(64))
        call_symbol(context, builder, product_at, c.dtype, (*matrices, M, N, K, more, scratch))
        return context.get_dummy_value()

    return types.void(a, b, c, types.boolean, panel), build


@intrinsic
def transpose_rows(typing_context, x, out):
    """out (M, K') = x (K, M)^T, and zeros in its columns from K on; rows without gaps."""

    def build(context, builder, signature, args):
        at, down, _, ((K, M), (_, width)) = parts_of(context, builder, (x, out), args)
        call_symbol(context, builder, transpose_at, x.dtype, (at[0], down[0], at[1], down[1], K, M, width))
        return context.get_dummy_value()

    return types.void(x, out), build


@intrinsic
def copy_rows(typing_context, x, out):
    """out (K, M) = x (K, M); rows without gaps, which may be short."""

    def build(context, builder, signature, args):
        at, down, _, ((K, M), _) = parts_of(context, builder, (x, out), args)
        call_symbol(context, builder, copy_at, x.dtype, (at[0], down[0], at[1], down[1], K, M))
        return context.get_dummy_value()

    return types.void(x, out), build


@intrinsic
def laid_elsewhere(typing_context, w, turned, left, out, first, panel):
    """Ask who makes products to lay w (K, M), or w^T of w (M, K) if `turned`, into `out` in a way of his own: as what
    stands on the left of a product if `left`, else on its right, in columns `first` on. Whether he did."""

    def build(context, builder, signature, args):
        w_value, is_turned, is_left, out_value, first_column, panel_value = args
        at, down, right, (shape, _) = parts_of(context, builder, (w, out), (w_value, out_value))
        pairs = (right[0], down[0]), (down[0], right[0]), shape[::-1], shape
        w_k, w_m, K, M = (builder.select(is_turned, *pair) for pair in pairs)
        header = builder.ptrtoint(context.make_array(panel)(context, builder, panel_value).data, ir.IntType(64))
        side = builder.zext(is_left, ir.IntType(64))
        operands = (at[0], w_k, w_m, at[1], down[1], first_column, K, M, side, header)
        return ask(builder, word_at(builder, header, 1), operands)

    return types.boolean(w, types.boolean, types.boolean, out, types.intp, panel), build


@kernel
def panels_kernel(task, slot, w, turned, per_part, width, piece, panels, scratch):
    """A piece of some columns of a panel of `panels_of`, of part task // per_part of w's columns, of `width` each."""
    columns, at = panels.shape[2], task % per_part * piece
    first = task // per_part * width + at
    last = min(first + piece, (task // per_part + 1) * width)
    whole, at = panels[task // per_part * blocks(width, columns) + at // columns], at % columns
    w_piece = w[first:last] if turned else w[:, first:last]
    if laid_elsewhere(w_piece, turned, False, whole, at, scratch[slot, :PANEL_SIZE]):
        return
    if turned:
        transpose_rows(w_piece, whole[:, at : at + piece])
    else:
        copy_rows(w_piece, whole[:, at : at + piece])


def asks_others(scratch):
    """Whether products with this scratch are those of tiles.py."""
    return scratch[0, : HEADER_BYTES // scratch.itemsize].any()


LAID = 64  # columns of a panel that a task lays as tiles.py has them; rows and columns fill up to a multiple


def laid_size(n):
    """Rows or columns that n take where they are laid ready."""
    return blocks(n, LAID) * LAID


def panels_of(w, space, turned=False, parts=1, first=0):
    """w (K, M), or w^T of w (M, K) if `turned`, by panels as wide as a register tile: (blocks, K, columns), in the
    space from element `first` on; a part of the columns begins with a panel of its own."""
    columns = piece = TILE_VECTORS * VECTOR_BYTES // w.itemsize
    K, M = w.shape[::-1] if turned else w.shape
    if asks_others(space["scratch"]):
        columns, piece, K = min(HIDDEN_BLOCK, laid_size(M // parts)), LAID, laid_size(K)
    width = M // parts
    panels = space["panels"][first : first + parts * blocks(width, columns) * columns * K].reshape(-1, K, columns)
    pieces = blocks(width, piece)
    POOL.run(panels_kernel, parts * pieces, w, turned, pieces, width, piece, panels, scratch_of(space))
    return panels


@part
def product_of_panels(a, panels, c, add, panel):
    """c (M, N) = a (M, K) b, or c += a b if `add`; b (K, N) by panels (blocks, K, columns)."""
    columns = panels.shape[2]
    for j in range(len(panels)):
        c_columns = c[:, j * columns : (j + 1) * columns]
        product(a, panels[j, :, : c_columns.shape[1]], c_columns, add, panel)


@part
def lay_turned(x, x_T, panel):
    """x_T (K, size) = x (rows, K)^T, as it stands on the left of a product."""
    if not laid_elsewhere(x, True, True, x_T, 0, panel):
        transpose_rows(x, x_T)


GRADIENT_BLOCKS = ((132, 256), (132, 128), (66, 128), (66, 64))  # of a weight gradient: rows, columns
TILED_GRADIENT_BLOCKS = ((256, 512), (128, 256), (64, 128), (64, 64))  # where packing takes the time
GRADIENT_CHUNK = 1 << 17  # elements of x and dy that stay in a core's cache while a task's blocks take their share


@part
def block_rows(task, T, size):
    """First and last + 1 row of a task: blocks of `size` rows that never cross from one sequence into the next."""
    per_sequence = (T + size - 1) // size
    sequence, block = task // per_sequence, task % per_sequence
    start = sequence * T + block * size
    return start, min(start + size, (sequence + 1) * T)


@kernel
def weight_gradient_kernel(task, slot, shape, per_task, x_T, T, dy, dw, db, ones, scratch):
    """dw (K, M) += x (N, K)^T dy (N, M), where x_T (blocks, K', size) has the rows of a block side by side; db (1, M)
    += sum_n dy. A task owns `per_task` blocks of dw of a shape, column after column, and the part of db above the first
    of each column."""
    (count, _, size), (K, M) = x_T.shape, dw.shape
    at_once, per_column = max(1, GRADIENT_CHUNK // ((K + M) * size)), (K + shape[0] - 1) // shape[0]
    last_block = min((task + 1) * per_task, per_column * ((M + shape[1] - 1) // shape[1]))
    for first in range(0, count, at_once):
        for block in range(task * per_task, last_block):
            k, m = block % per_column * shape[0], block // per_column * shape[1]
            k_end, m_end = min(k + shape[0], K), min(m + shape[1], M)
            for rows in range(first, min(first + at_once, count)):
                start, stop = block_rows(rows, T, size)
                dy_rows = dy[start:stop, m:m_end]
                product(x_T[rows, k:k_end, : stop - start], dy_rows, dw[k:k_end, m:m_end], True, scratch[slot])
                if k == 0 and db.size > 0:
                    product(ones[: stop - start].reshape(1, stop - start), dy_rows, db[:, m:m_end], True, scratch[slot])


def weight_gradient(x_T, T, dy, dw, db, scratch):
    shapes = TILED_GRADIENT_BLOCKS if asks_others(scratch) else GRADIENT_BLOCKS
    for shape in shapes:  # the larger, the less is copied again; but every thread wants some
        count = math.prod(map(blocks, dw.shape, shape))
        if count >= 2 * POOL.threads:
            break
    per_task, db = blocks(count, 4 * POOL.threads), np.empty((1, 0), dw.dtype) if db is None else db.reshape(1, -1)
    ones = constant(1, x_T.shape[2], dw.dtype.name)
    POOL.run(weight_gradient_kernel, blocks(count, per_task), shape, per_task, x_T, T, dy, dw, db, ones, scratch)


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


@overload(exp, jit_options=COMPILE | {"fastmath": {"contract"}})  # reordered, ln 2 would lose its low part
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


NO_NORM, RMSNORM, LAYERNORM = range(3)
KERNEL_NORMS = {"rmsnorm": RMSNORM, "layernorm": LAYERNORM}


@part
def norm_rows(kind, x, w, b, eps, mean, rstd, y):
    """x (rows, C) -> y (rows, C) and the rows' mean and rstd; section 2.2, where RMSNorm's mean is 0."""
    one, C = x.dtype.type(1), x.dtype.type(x.shape[1])
    for i in range(x.shape[0]):
        m, r, total, square = x.dtype.type(0), one, x.dtype.type(0), x.dtype.type(0)
        if kind == LAYERNORM:
            for c in range(x.shape[1]):
                total += x[i, c]
            m = total / C
        if kind != NO_NORM:
            for c in range(x.shape[1]):
                square += (x[i, c] - m) * (x[i, c] - m)
            r = one / np.sqrt(square / C + x.dtype.type(eps))
        mean[i], rstd[i] = m, r
        for c in range(x.shape[1]):
            y[i, c] = (x[i, c] - m) * r * w[c] + b[c]


@part
def norm_rows_backward(kind, dn, x, w, b, mean, rstd, dx, n, sums):
    """dn (rows, C), the gradient of the norm's output -> adds into dx; n = the output again; sums (2, C) = dw, db."""
    zero, C = x.dtype.type(0), x.dtype.type(x.shape[1])
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
        total, dot = total / C if kind == LAYERNORM else zero, dot / C if kind != NO_NORM else zero
        for c in range(x.shape[1]):  # dx = rstd (dn w - mean(dn w) - n mean(dn w n))
            dx[i, c] += r * (dn[i, c] * w[c] - total - (x[i, c] - m) * r * dot)


@part
def add_bias(x, b, y):
    """y (rows, C) = x + b."""
    for i in range(y.shape[0]):
        for c in range(y.shape[1]):
            y[i, c] = x[i, c] + b[c]


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


def erf_of(x):
    """The error function; in float32 within 6e-7, by arithmetic that vectorises."""
    return math.erf(x)


@overload(erf_of, jit_options=COMPILE)
def erf_of_by_type(x):
    f = np.float32

    def erf32(x):  # Abramowitz & Stegun 1964, 7.1.26
        size = abs(x)
        t = f(1) / (f(1) + f(0.3275911) * size)
        p = f(1.061405429)
        p = p * t + f(-1.453152027)
        p = p * t + f(1.421413741)
        p = p * t + f(-0.284496736)
        p = p * t + f(0.254829592)
        y = f(1) - p * t * exp(-size * size)
        return y if x > f(0) else -y

    return erf32 if x == types.float32 else lambda x: math.erf(x)


ACTIVATION = {name: kind for kind, name in enumerate(CHOICES["mlp"])}
GELU_TANH, GELU, SILU, RELU2, SWIGLU = ACTIVATION.values()


@part
def activation_rows(kind, h, start, first, gated, a):
    """a (rows, columns) = f(h), section 2.3, h (N, F) from row `start`, column `first` on; a gate's values stand
    `gated` columns after it. gelu-tanh: (1 + tanh u) / 2 = 1 / (1 + e^-2u)."""
    one, half, zero = h.dtype.type(1), h.dtype.type(0.5), h.dtype.type(0)
    scale, cube, root = h.dtype.type(2 * GELU_SCALE), h.dtype.type(GELU_CUBE), h.dtype.type(math.sqrt(0.5))
    for i in range(a.shape[0]):
        h_row, a_row = h[start + i, first : first + a.shape[1]], a[i]
        if kind == GELU_TANH:
            for f in range(h_row.size):
                v = h_row[f]
                a_row[f] = v / (one + exp(-scale * (v + cube * v * v * v)))
        elif kind == GELU:
            for f in range(h_row.size):
                a_row[f] = half * h_row[f] * (one + erf_of(h_row[f] * root))
        elif kind == RELU2:
            for f in range(h_row.size):
                v = max(h_row[f], zero)
                a_row[f] = v * v
        else:
            for f in range(h_row.size):
                a_row[f] = h_row[f] / (one + exp(-h_row[f]))
            if kind == SWIGLU:
                value_row = h[start + i, gated + first : gated + first + a.shape[1]]
                for f in range(h_row.size):
                    a_row[f] *= value_row[f]


@part
def activation_rows_backward(kind, h, da, start, first, gated, a, dh):
    """da (rows, columns) -> a (rows, columns) again, and dh (N, F or 2 F) from row `start` and column `first` on."""
    one, half, zero, last = h.dtype.type(1), h.dtype.type(0.5), h.dtype.type(0), first + da.shape[1]
    scale, cube, root = h.dtype.type(2 * GELU_SCALE), h.dtype.type(GELU_CUBE), h.dtype.type(math.sqrt(0.5))
    cube3, peak = h.dtype.type(3 * GELU_CUBE), h.dtype.type(1 / math.sqrt(2 * math.pi))
    for i in range(da.shape[0]):
        h_row, da_row = h[start + i, first:last], da[i]
        a_row, dh_row = a[i], dh[start + i, first:last]
        if kind == GELU_TANH:
            for f in range(h_row.size):
                v = h_row[f]
                s = one / (one + exp(-scale * (v + cube * v * v * v)))  # a = v s, ds/dv = s (1 - s) d(2u)/dv
                a_row[f] = v * s
                dh_row[f] = da_row[f] * (s + v * s * (one - s) * scale * (one + cube3 * v * v))
        elif kind == GELU:
            for f in range(h_row.size):
                v = h_row[f]
                s = half * (one + erf_of(v * root))
                a_row[f] = v * s
                dh_row[f] = da_row[f] * (s + v * peak * exp(-half * v * v))
        elif kind == RELU2:
            for f in range(h_row.size):
                v = max(h_row[f], zero)
                a_row[f] = v * v
                dh_row[f] = da_row[f] * (v + v)
        elif kind == SILU:
            for f in range(h_row.size):
                v = h_row[f]
                s = one / (one + exp(-v))
                a_row[f] = v * s
                dh_row[f] = da_row[f] * (s + v * s * (one - s))
        else:
            value_row = h[start + i, gated + first : gated + last]
            dvalue_row = dh[start + i, gated + first : gated + last]
            for f in range(h_row.size):
                v, value = h_row[f], value_row[f]
                s = one / (one + exp(-v))
                a_row[f] = v * s * value
                dvalue_row[f] = da_row[f] * v * s
                dh_row[f] = da_row[f] * value * (s + v * s * (one - s))


@part
def mixed(x):
    """`mix` of section 2.6."""
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@part
def drop_row(x, first, key, row, threshold, keep):
    """x (M,) times its mask, section 2.6; its first element is column `first` of row `row`."""
    key = mixed(np.uint32(key + np.uint32(row)))
    for c in range(x.size):
        drawn = mixed(np.uint32(key + np.uint32(first + c)))
        x[c] = x[c] * keep if drawn >= threshold else x.dtype.type(0)


def maximum(x):
    """The largest of x (count,); a NaN may win or be passed over."""
    return x.max()


@overload(maximum, jit_options=COMPILE)
def maximum_by_type(x):
    i = np.int32

    def maximum32(x):  # as integers in the order of the floats: a maximum of floats does not vectorise
        top = i(-(2**31))
        for s in range(x.size):
            bits = i(bits_of(x[s]))
            top = max(top, bits ^ ((bits >> i(31)) & i(0x7FFFFFFF)))
        return float_of(np.uint32(top ^ ((top >> i(31)) & i(0x7FFFFFFF))))

    def maximum64(x):
        top = x[0]
        for s in range(1, x.size):
            top = max(top, x[s])
        return top

    return maximum32 if x.dtype == types.float32 else maximum64


# == 7  sublayers ======================================================================================================
#
# Each `..._kernels` function has the contract of the function of section 3 that it is named after. It computes in the
# buffers of `space`, which the table below lays out; without `space` it makes its own.

ROW_BLOCK = 16 * TILE_ROWS  # rows of one sequence that a task carries through a sublayer
SCORE_BLOCK = 64  # queries whose scores stand in a thread's cache
HEAD_BLOCK = 64  # rows whose logits a thread computes at a time
HEAD_BLOCKS = 8  # whose logits exist at a time; one a thread, if there are more threads
HEAD_WORDS = DEPTH // TILE_ROWS * TILE_ROWS  # of the vocabulary, whose logits are worked on while they are in a cache
TILED_HEAD_WORDS = 1024  # as many in a larger cache, where packing takes the time
LOOP = 64  # elements at a time of the loops that LLVM vectorises: what a row has beyond whole ones is slow
HIDDEN_BLOCK = 512  # columns of the MLP's hidden layer that exist at a time outside `space`


def workspace_layout(cfg, B, T, recompute=False):
    """The kernels' buffers, a table like that of the parameters: what backward needs, layer by layer, then scratch.
    With `recompute` layers keep their sublayers' outputs only, and share the rest."""
    C, L, H, V, S = cfg.width, cfg.layers, cfg.heads, cfg.vocab_size, cfg.seq_len
    D, F, U, Q, HD = cfg.head_width, cfg.hidden, cfg.up_width, cfg.qkv_width, cfg.heads * cfg.head_width
    wide, high = HIDDEN_BLOCK, LAID  # at most: what panels of K rows and M columns add to each
    mlp = max((C + high) * (U + 2 * wide) + (F + high) * (C + wide), (U + high) * (C + wide))
    attention = max((K + high) * (M + wide) for K, M in ((C, Q), (Q, C), (HD, C), (C, HD)))
    panels = max(mlp, attention, laid_size(V) * (laid_size(C) + blocks(C, wide) * min(wide, laid_size(C))))
    scores = 4 * S * D + max((2 * D + 2 + max(2 * S, D + 2)) * SCORE_BLOCK, 2 * (D + 1) * whole_vectors(S))
    head = (2 * C + TILE_ROWS + 4) * HEAD_BLOCK
    scratch = PANEL_SIZE + max(ROW_BLOCK * (C + max(2 * HIDDEN_BLOCK, C)), D * (ROW_BLOCK + LOOP), scores, head)
    masks, tasks = cfg.embed_dropout or cfg.out_dropout or cfg.mlp_dropout, B * blocks(T, ROW_BLOCK)
    head_tasks = B * blocks(T, HEAD_BLOCK)
    rows = [  # name, shape, layered
        ("norm1", (2, B, T), True),  # mean, rstd
        ("qkv", (B, T, H + 2 * cfg.kv_heads, D), True),
        ("qk", (B, H + cfg.kv_heads, D, whole_vectors(T)) if cfg.qk_norm else (0, 0, 0, 0), True),  # before their norm
        ("o_T", (B * blocks(T, SCORE_BLOCK), HD, SCORE_BLOCK), True),  # rows of a block side by side, as all `_T`
        ("lse", (B, H, T), True),
        ("attended", (B, T, C), True),
        ("norm2", (2, B, T), True),
        ("h", (B, T, U), True),
        ("mixed", (B, T, C), True),
        ("looked_up", (B, T, C) if cfg.embedding_norm else (0,), False),
        ("embedded", (B, T, C), False),
        ("embedded_norm", (2, B, T), False),
        ("dx", (2, B, T, C), False),
        ("kept", (B, T, C) if masks else (0,), False),  # dy times a mask
        ("n", (B, T, C), False),
        ("o", (B, T, H, D), False),
        ("dqkv", (B, T, H + 2 * cfg.kv_heads, D), False),
        ("do", (B, T, H, D), False),
        ("dh", (B, T, U), False),
        ("odds", (min(max(HEAD_BLOCKS, POOL.threads), head_tasks), V, HEAD_BLOCK), False),
        ("shares", (B, T), False),
        ("nats", (B, T), False),
        ("sums", (tasks, 2, C), False),
        ("qk_sums", (B * cfg.kv_heads, 2, D), False),
        ("head_sums", (head_tasks, 2, C), False),
        ("n_T", (tasks, laid_size(C), ROW_BLOCK), False),  # these three may lie as tiles.py has them
        ("a_T", (tasks, laid_size(F), ROW_BLOCK), False),
        ("panels", (panels,), False),  # of the weights at work
        ("scratch", (POOL.threads, scratch), False),
    ]
    table, offset = [], 0
    for name, shape, layered in rows:
        layered = layered and (not recompute or name in ("attended", "mixed"))
        shape = (L, *shape) if layered else shape
        table.append(Tensor(name, shape, offset, layered, False, 0.0, 0.0, False))
        offset += blocks(math.prod(shape), CACHE_LINE) * CACHE_LINE
    return table


def workspace(cfg, B, T, dtype, recompute=False):
    """Views of one new buffer for `workspace_layout`; each layer's dictionary also names the shared ones."""
    provide_product(np.dtype(dtype).name)
    table = workspace_layout(cfg, B, T, recompute)
    flat = aligned(table[-1].offset + math.prod(table[-1].shape), dtype)
    space = views(table, flat, cfg.layers)
    for layer in space["layers"]:
        layer.update((name, view) for name, view in space.items() if name != "layers")
    return space


@functools.cache
def constant(value, count, dtype):
    """(count,) of one value: what a model without a bias or a gain gives to kernels."""
    return np.full(count, value, dtype)


def biases(p, name, count):
    """p's vector, or zeros if the model has none."""
    return constant(0, count, p["qkv_w" if "qkv_w" in p else "embed_w"].dtype.name) if p[name] is None else p[name]


def norm_of(p, name, cfg, kind=None):
    """(kind, gains (C,), biases (C,), eps) for `norm_rows`."""
    if kind is None:
        if cfg.norm not in KERNEL_NORMS:
            raise ValueError(f"norm={cfg.norm} has no kernel; use --kernels numpy, or add it to norm_rows")
        kind = KERNEL_NORMS[cfg.norm]
    b = biases(p, name + "_b", cfg.width)
    return kind, constant(1, cfg.width, b.dtype.name) if p[name + "_w"] is None else p[name + "_w"], b, cfg.norm_eps


def add_sums(sums, dw, db):
    """The blocks' sums (blocks, 2, M) into the gradients that the model has."""
    scrap = np.empty(sums.shape[2], sums.dtype)
    POOL.run(add_in_order_kernel, 1, sums, scrap if dw is None else dw, scrap if db is None else db)


def mask_of(dropout, site, rate, B):
    """(keys (B,), threshold, what is kept is multiplied by this) for `drop_row`; threshold 0: no dropout."""
    if not dropout or not rate:
        return np.zeros(B, np.uint32), np.uint32(0), 1.0
    return dropout.keys(site, B), np.uint32(rate * 2**32), 1 / (1 - rate)


def scratch_of(space):
    """The threads' scratch (threads, size); ValueError if there are more threads than when it was made."""
    if len(space["scratch"]) < POOL.threads:
        made = len(space["scratch"])
        raise ValueError(f"workspace has scratch for {made} threads, the pool has {POOL.threads}; make another")
    return space["scratch"]


def layer_space(ops, cfg, x, index):
    """The buffers of layer `index`; new ones for a table without."""
    if ops.space:
        return ops.space["layers"][index]
    return workspace(dataclasses.replace(cfg, layers=1), *x.shape[:2], x.dtype)["layers"][0]


@part
def blocks(T, size):
    return -(-T // size)


@part
def whole_vectors(count):
    """Columns that hold `count`, a multiple of 16."""
    return (count + 15) // 16 * 16


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
            x[task, t, c] = w[row, c]
        if len(positions) > 0:
            for c in range(C):
                x[task, t, c] += positions[t, c]


@kernel
def embed_backward_kernel(task, slot, tokens, dx, dw, dpositions):
    """The columns 32 task .. 32 task + 31 of all rows, in order: a token that repeats adds up."""
    B, T, C = dx.shape
    for b in range(B):
        for t in range(T):
            row = tokens[b, t]
            for c in range(32 * task, min(32 * task + 32, C)):
                dw[row, c] += dx[b, t, c]
            if len(dpositions) > 0:
                for c in range(32 * task, min(32 * task + 32, C)):
                    dpositions[t, c] += dx[b, t, c]


@kernel
def drop_kernel(task, slot, x, T, keys, threshold, keep, y):
    """y (N, C) = x times its mask."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    for i in range(start, stop):
        row = y[i]
        for c in range(row.size):
            row[c] = x[i, c]
        drop_row(row, 0, keys[i // T], i % T, threshold, row.dtype.type(keep))


@kernel
def norm_kernel(task, slot, x, kind, w, b, eps, T, stats, y):
    start, stop = block_rows(task, T, ROW_BLOCK)
    norm_rows(kind, x[start:stop], w, b, eps, stats[0, start:stop], stats[1, start:stop], y[start:stop])


@kernel
def norm_backward_kernel(task, slot, dy, x, kind, w, b, T, stats, dx, n, sums):
    start, stop = block_rows(task, T, ROW_BLOCK)
    for i in range(start, stop):
        for c in range(x.shape[1]):
            dx[i, c] = 0
    mean, rstd = stats[0, start:stop], stats[1, start:stop]
    rows = (dx[start:stop], n[start:stop], sums[task])
    norm_rows_backward(kind, dy[start:stop], x[start:stop], w, b, mean, rstd, *rows)


def embed_forward_kernels(tokens, p, cfg, ops, start=0, dropout=None):
    (B, T), C, dtype = tokens.shape, cfg.width, p["embed_w"].dtype
    s, count = ops.space or workspace(dataclasses.replace(cfg, layers=1), B, T, dtype), B * blocks(T, ROW_BLOCK)
    positions = np.empty((0, C), dtype) if p["position_w"] is None else p["position_w"][start : start + T]
    x = s["looked_up" if cfg.embedding_norm else "embedded"]
    tokens = np.ascontiguousarray(tokens, np.int64)
    POOL.run(embed_kernel, B, tokens, p["embed_w"], positions, x)
    if cfg.embedding_norm:
        rows, y = (a.reshape(-1, C) for a in (x, s["embedded"]))
        POOL.run(norm_kernel, count, rows, *norm_of(p, "embed_norm", cfg), T, s["embedded_norm"].reshape(2, -1), y)
    mask = mask_of(dropout, EMBED_SITE, cfg.embed_dropout, B)
    if mask[1]:
        rows = s["embedded"].reshape(-1, C)
        POOL.run(drop_kernel, count, rows, T, *mask, rows)
    return s["embedded"], (tokens, mask, p, s)


def embed_backward_kernels(dx, cache, g, cfg, ops):
    tokens, mask, p, s = cache
    (T, C), count = dx.shape[1:], len(tokens) * blocks(tokens.shape[1], ROW_BLOCK)
    dx_NC = np.ascontiguousarray(dx).reshape(-1, C)
    if mask[1]:
        kept = s["kept"].reshape(-1, C)
        POOL.run(drop_kernel, count, dx_NC, T, *mask, kept)
        dx_NC = kept
    if cfg.embedding_norm:
        x, y, n = (a.reshape(-1, C) for a in (s["looked_up"], s["dx"][0], s["n"]))
        kind, w, b, _ = norm_of(p, "embed_norm", cfg)
        tail = (T, s["embedded_norm"].reshape(2, -1), y, n, s["sums"])
        POOL.run(norm_backward_kernel, count, dx_NC, x, kind, w, b, *tail)
        add_sums(s["sums"], g["embed_norm_w"], g["embed_norm_b"])
        dx_NC = y
    positions = np.empty((0, C), dx.dtype) if g["position_w"] is None else g["position_w"][:T]
    POOL.run(embed_backward_kernel, blocks(C, 32), tokens, dx_NC.reshape(dx.shape), g["lookup_w"], positions)


# == 7.2  attention layer ==============================================================================================


# Queries, keys and scores are worked on with positions side by side, (D, T) and (S, T): what is done to all positions
# is done to whole vectors, sums over d or s are sums of vectors, and no row is too short.


@ordered_part
def turn(x, position, cos, sin, half, sign):
    """x (D, T), its first column at `position`: every pair of rows turned by its angles, cos and sin (D/2, S),
    backwards if sign is -1; section 2.5."""
    pairs = x.shape[0] // 2
    for i in range(pairs):
        even, odd = (x[i], x[i + pairs]) if half else (x[2 * i], x[2 * i + 1])
        c, s = cos[i, position : position + even.size], sin[i, position : position + even.size]
        for t in range(even.size):
            a, b, up = even[t], odd[t], s[t] * sign
            even[t] = a * c[t] - b * up
            odd[t] = a * up + b * c[t]


@ordered_part
def inverse_rms(x, eps, rstd):
    """rstd (T,) of the columns of x (D, T)."""
    D, one = x.dtype.type(x.shape[0]), x.dtype.type(1)
    for t in range(rstd.size):
        rstd[t] = 0
    for d in range(x.shape[0]):
        row = x[d]
        for t in range(rstd.size):
            rstd[t] += row[t] * row[t]
    for t in range(rstd.size):
        rstd[t] = one / np.sqrt(rstd[t] / D + x.dtype.type(eps))


@ordered_part
def norm_columns(x, gains, eps, rstd):
    """The columns of x (D, T) times their rstd (T,) and gains (D,), in place."""
    inverse_rms(x, eps, rstd)
    for d in range(x.shape[0]):
        row = x[d]
        for t in range(rstd.size):
            row[t] *= rstd[t] * gains[d]


@part
def place_rows(qkv, position, heads, qk, b, first, gains, eps, cos, sin, half, scratch):
    """RMSNorm of q and k if qk (B, H + G, D, T') is there to keep them as they were, in its columns from `first` on,
    then their rotation if cos and sin (D/2, S) are there: qkv (T, H + 2 G, D), its first row at `position`."""
    (T, _, D), one = qkv.shape, qkv.dtype.type(1)
    width = blocks(T, LOOP) * LOOP
    x, rstd = scratch[: D * width].reshape(D, width), scratch[D * width : (D + 1) * width]
    for h in range(heads[0] + heads[1]):
        transpose_rows(qkv[:, h], x)
        if len(qk) > 0:
            copy_rows(x[:, :T], qk[b, h, :, first : first + T])
            norm_columns(x, gains[0] if h < heads[0] else gains[1], eps, rstd)
        if len(cos) > 0:
            turn(x, position, cos, sin, half, one)
        transpose_rows(x[:, :T], qkv[:, h])


@part
def place_backward(dx, qk, b, h, first, gains, eps, cos, sin, half, total, scratch):
    """The same backwards, in place in dx (D, T), head h from position `first` on; adds into total (D,), the gradient of
    the gains."""
    (D, width), one, zero = dx.shape, dx.dtype.type(1), dx.dtype.type(0)
    x, rstd = scratch[: D * width].reshape(D, width), scratch[D * width : (D + 1) * width]
    dot = scratch[(D + 1) * width : (D + 2) * width]
    if len(cos) > 0:
        turn(dx, first, cos, sin, half, -one)
    if len(qk) > 0:
        copy_rows(qk[b, h, :, first : first + width], x)
        inverse_rms(x, eps, rstd)
        for t in range(width):
            dot[t] = zero
        for d in range(D):
            x_row, dx_row, gradient = x[d], dx[d], zero
            for t in range(width):
                product_ = dx_row[t] * x_row[t] * rstd[t]
                gradient += product_
                dot[t] += product_ * gains[d]
            total[d] += gradient
        for t in range(width):
            dot[t] *= rstd[t] * rstd[t] / x.dtype.type(D)
        for d in range(D):
            x_row, dx_row = x[d], dx[d]
            for t in range(width):
                dx_row[t] = rstd[t] * dx_row[t] * gains[d] - x_row[t] * dot[t]


@kernel
def qkv_kernel(
    task, slot, x, kind, norm_w, norm_b, eps, panels, b, T, heads, at, qk, q_norm, k_norm, qk_eps, cos, sin, half,
    stats, qkv, scratch,
):  # fmt: skip
    """x (N, C) -> qkv (N, H + 2 G, D) = norm(x) w + b, q and k placed, heads = H, G of them, the first row at position
    `at`; stats (2, N) = mean, rstd."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:]
    n, y = rest[: (stop - start) * x.shape[1]].reshape(stop - start, x.shape[1]), qkv.reshape(len(qkv), b.size)
    norm_rows(kind, x[start:stop], norm_w, norm_b, eps, stats[0, start:stop], stats[1, start:stop], n)
    set_rows(b, y, start, stop, 0, y.shape[1])
    product_of_panels(n, panels, y[start:stop], True, panel)
    first, gains = start % T, (q_norm, k_norm)
    place_rows(qkv[start:stop], at + first, heads, qk, start // T, first, gains, qk_eps, cos, sin, half, rest)


@part
def first_seen(position, window):
    """The first key that the query at this position sees."""
    return max(0, position - window + 1) if window > 0 else 0


@part
def seen_by(key, first, count, window):
    """Of `count` queries from position `first` on, the first and last + 1 that see the key."""
    last = min(count, key - first + window) if window > 0 else count
    return np.int32(max(0, key - first)), np.int32(last)


@part
def drop_columns(p, begin, key, first, threshold, keep):
    """p (S, T) times its mask, section 2.6: row s is column begin + s of the mask, column t row first + t."""
    for s in range(p.shape[0]):
        row = p[s]
        for t in range(row.size):
            drawn = mixed(np.uint32(mixed(np.uint32(key + np.uint32(first + t))) + np.uint32(begin + s)))
            row[t] = row[t] * keep if drawn >= threshold else row.dtype.type(0)


@part
def gathered(kv, b, S, which, scratch):
    """kv[b, :S, which] copied to where its rows (S, D) lie side by side, and what is left of scratch."""
    D = kv.shape[3]
    rows = scratch[: S * D].reshape(S, D)
    copy_rows(kv[b, :S, which], rows)
    return rows, scratch[S * D :]


@part
def scale_columns(x, scale):
    for i in range(x.shape[0]):
        row = x[i]
        for t in range(row.size):
            row[t] *= scale


@kernel
def attention_kernel(
    task, slot, qkv, H, kv, k_at, v_at, S, scale, slopes, window, keys, threshold, keep, o, o_T, lse, scratch
):  # fmt: skip
    """One head of one sequence: q in qkv (B, T, heads, D), S keys in kv[:, :S, k_at + g], values in v_at + g -> o
    (B, T, H, D), o_T (blocks, H D, SCORE_BLOCK), lse (B, H, T). Section 2.4, SCORE_BLOCK queries at a time, all in
    columns: p (keys, queries), of the keys that one of them sees, o^T = v^T p."""
    (_, T, _, D), zero, one = qkv.shape, qkv.dtype.type(0), qkv.dtype.type(1)
    b, h = task // H, task % H
    g, slope = h // (H // (v_at - k_at)), slopes[h]
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:]
    v, rest = gathered(kv, b, S, v_at + g, rest)
    for first in range(0, T, SCORE_BLOCK):
        last = min(first + SCORE_BLOCK, T)
        width, at = whole_vectors(last - first), S - T + first
        begin, end = first_seen(at, window), S - T + last
        q, left = rest[: D * width].reshape(D, width), rest[D * width :]
        top, total, p = left[:width], left[width : 2 * width], left[2 * width : (2 + end - begin) * width]
        p = p.reshape(end - begin, width)
        transpose_rows(qkv[b, first:last, h], q)
        scale_columns(q, q.dtype.type(scale))
        product(kv[b, begin:end, k_at + g], q, p, False, panel)
        for t in range(width):
            top[t], total[t] = -np.inf, zero
        for s in range(end - begin):
            row, (low, high) = p[s], seen_by(begin + s, at, width, window)
            if slope > 0:
                for t in range(width):
                    row[t] -= slope * row.dtype.type(at + t - begin - s)
            for t in range(width):
                column = np.int32(t)  # as wide as its score
                top[t] = row[t] if row[t] > top[t] and column >= low and column < high else top[t]
        for s in range(end - begin):
            row, (low, high) = p[s], seen_by(begin + s, at, width, window)
            for t in range(width):
                e, column = exp(row[t] - top[t]), np.int32(t)
                row[t] = e if column >= low and column < high else zero
                total[t] += row[t]
        for t in range(last - first):
            lse[b, h, first + t] = top[t] + math.log(total[t])
        if threshold > 0:
            drop_columns(p, begin, keys[b], h * 65536 + first, threshold, p.dtype.type(keep))
        block = b * blocks(T, SCORE_BLOCK) + first // SCORE_BLOCK
        columns = o_T[block, h * D : (h + 1) * D, :width]
        product(v[begin:end].T, p, columns, False, panel)
        for t in range(width):
            total[t] = one / total[t]
        for d in range(D):
            row = o_T[block, h * D + d]
            for t in range(width):
                row[t] *= total[t]
        transpose_rows(columns[:, : last - first], o[b, first:last, h])


@kernel
def linear_residual_kernel(task, slot, x, o, panels, b, T, keys, threshold, keep, y, scratch):
    """y (N, M) = x + mask * (o w + b)."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    if threshold == 0:
        add_bias(x[start:stop], b, y[start:stop])
        product_of_panels(o[start:stop], panels, y[start:stop], True, scratch[slot])
    else:
        set_rows(b, y, start, stop, 0, y.shape[1])
        product_of_panels(o[start:stop], panels, y[start:stop], True, scratch[slot])
        drop_and_add(x, y, start, stop, T, keys, threshold, keep)


@part
def drop_and_add(x, y, start, stop, T, keys, threshold, keep):
    """Rows start .. stop - 1 of y = x + mask * y."""
    for i in range(start, stop):
        x_row, row = x[i], y[i]
        drop_row(row, 0, keys[i // T], i % T, threshold, row.dtype.type(keep))
        for c in range(row.size):
            row[c] += x_row[c]


@kernel
def linear_backward_kernel(task, slot, dy, panels, T, dx, scratch):
    """dx (N, K) = dy (N, M) w^T, by panels of w^T."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    product_of_panels(dy[start:stop], panels, dx[start:stop], False, scratch[slot])


@kernel
def attention_backward_kernel(
    task, slot, qkv, H, G, scale, slopes, window, keys, threshold, keep, o_T, lse, do, qk, q_norm, k_norm, eps, cos,
    sin, half, dqkv, sums, scratch,
):  # fmt: skip
    """The heads of one sequence that share keys: qkv, dqkv (B, T, H + 2 G, D), do (B, T, H, D), o_T and lse as above; p
    and ds (keys, queries). Backward through the places of q and k; sums (B G, 2, D) of the gradients of the gains."""
    (_, T, _, D), zero, kept = qkv.shape, do.dtype.type(0), do.dtype.type(keep)
    b, g, scale = task // G, task % G, do.dtype.type(scale)
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:]
    all_k, rest = gathered(qkv, b, T, H + g, rest)
    all_v, rest = gathered(qkv, b, T, H + G + g, rest)
    sums_of_rows, rest = rest[: 2 * T * D], rest[2 * T * D :]
    dk, dv = sums_of_rows[: T * D].reshape(T, D), sums_of_rows[T * D :].reshape(T, D)
    for i in range(sums_of_rows.size):
        sums_of_rows[i] = zero
    for d in range(D):
        sums[task, 0, d] = sums[task, 1, d] = zero
    for h in range(g * (H // G), (g + 1) * (H // G)):
        slope = slopes[h]
        for first in range(0, T, SCORE_BLOCK):
            last = min(first + SCORE_BLOCK, T)
            width, begin = whole_vectors(last - first), first_seen(first, window)
            columns, size = rest[: (2 * D + 2) * width].reshape(2 * D + 2, width), (last - begin) * width
            q, do_columns, shift, mean = columns[:D], columns[D : 2 * D], columns[2 * D], columns[2 * D + 1]
            left = rest[(2 * D + 2) * width :]
            p, ds = left[:size].reshape(last - begin, width), left[size : 2 * size].reshape(last - begin, width)
            q_rows, do_rows = qkv[b, first:last, h], do[b, first:last, h]
            k, v = all_k[begin:last], all_v[begin:last]
            transpose_rows(do_rows, do_columns)
            for t in range(width):
                shift[t] = lse[b, h, first + t] if first + t < T else zero
                mean[t] = zero
            for d in range(D):  # sum_s dp_s p_s = sum_d do_d o_d
                row, drow = o_T[b * blocks(T, SCORE_BLOCK) + first // SCORE_BLOCK, h * D + d], do_columns[d]
                for t in range(width):
                    mean[t] += row[t] * drow[t]
            for t in range(last - first, width):  # no query: sees no key, perhaps, and o is NaN
                mean[t] = zero
            transpose_rows(q_rows, q)
            scale_columns(q, scale)
            product(k, q, p, False, panel)
            product(v, do_columns, ds, False, panel)
            if threshold > 0:
                drop_columns(ds, begin, keys[b], h * 65536 + first, threshold, kept)
            for s in range(last - begin):
                row, drow, (low, high) = p[s], ds[s], seen_by(begin + s, first, width, window)
                if slope > 0:
                    for t in range(width):
                        row[t] -= slope * row.dtype.type(first + t - begin - s)
                for t in range(width):
                    e, column = exp(row[t] - shift[t]), np.int32(t)
                    row[t] = e if column >= low and column < high else zero
                    drow[t] = row[t] * (drow[t] - mean[t]) * scale
            if threshold > 0:
                drop_columns(p, begin, keys[b], h * 65536 + first, threshold, kept)
            product(ds[:, : last - first], q_rows, dk[begin:last], True, panel)
            product(p[:, : last - first], do_rows, dv[begin:last], True, panel)
            product(k.T, ds, q, False, panel)
            place_backward(q, qk, b, h, first, q_norm, eps, cos, sin, half, sums[task, 0], left)
            transpose_rows(q[:, : last - first], dqkv[b, first:last, h])
    dk_T, rest = rest[: D * whole_vectors(T)].reshape(D, whole_vectors(T)), rest[D * whole_vectors(T) :]
    transpose_rows(dk, dk_T)
    place_backward(dk_T, qk, b, H + g, 0, k_norm, eps, cos, sin, half, sums[task, 1], rest)
    transpose_rows(dk_T[:, :T], dqkv[b, :, H + g])
    copy_rows(dv, dqkv[b, :, H + G + g])


@kernel
def linear_norm_backward_kernel(
    task, slot, dy, dlinear, panels, x, kind, norm_w, norm_b, stats, T, dx, n_T, sums, scratch
):  # fmt: skip
    """dx (N, C) = dy + norm_backward(dlinear w^T), n_T (tasks, C', ROW_BLOCK) = norm(x) again, sums (tasks, 2, C) of
    the norm's."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    panel, rest, (rows, C) = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:], (stop - start, x.shape[1])
    dn, n = rest[: rows * C].reshape(rows, C), rest[rows * C : 2 * rows * C].reshape(rows, C)
    product_of_panels(dlinear[start:stop], panels, dn, False, panel)
    copy_rows(dy[start:stop], dx[start:stop])
    mean, rstd = stats[0, start:stop], stats[1, start:stop]
    norm_rows_backward(kind, dn, x[start:stop], norm_w, norm_b, mean, rstd, dx[start:stop], n, sums[task])
    lay_turned(n, n_T[task, :C], panel)


def attention_arguments(cfg, index, mask, dtype):
    """What the kernels of attention are told of the model and of the layer."""
    slopes = (alibi_slopes(cfg.heads) if cfg.positions == "alibi" else np.zeros(cfg.heads)).astype(dtype)
    return 1 / math.sqrt(cfg.head_width) if cfg.attention_scale else 1.0, slopes, layer_window(cfg, index), *mask


@functools.cache
def rotation_columns(S, D, theta, dtype):
    """cos and sin (D/2, S + LOOP) of section 2.5."""
    return tuple(np.ascontiguousarray(a.T) for a in rotation(S + LOOP, D, theta, dtype))


def place_arguments(p, s, cfg):
    """What norm and rotation of queries and keys need; empty arrays for what there is not."""
    D, dtype = cfg.head_width, s["qkv"].dtype.name
    cos = sin = np.empty((0, 0), dtype)
    if cfg.positions.startswith("rope"):
        cos, sin = rotation_columns(cfg.seq_len, D, cfg.rope_theta, dtype)
    q_norm, k_norm = (p["q_norm_w"], p["k_norm_w"]) if cfg.qk_norm else (constant(1, D, dtype),) * 2
    half = cfg.positions == "rope-half"
    return s["qk"], q_norm, k_norm, cfg.norm_eps, cos, sin, half


def attention_layer_forward_kernels(x, p, cfg, ops, index=0, past=None, dropout=None):
    (B, T, C), (H, G, D) = x.shape, (cfg.heads, cfg.kv_heads, cfg.head_width)
    tasks, s = B * blocks(T, ROW_BLOCK), layer_space(ops, cfg, x, index)
    x_NC, stats, scratch = np.ascontiguousarray(x).reshape(-1, C), s["norm1"].reshape(2, -1), scratch_of(s)
    qkv, o, y, start = s["qkv"], s["o"], s["attended"], past[1] if past is not None else 0
    linear = (panels_of(p["qkv_w"], s), biases(p, "qkv_b", cfg.qkv_width))
    heads = (H, G) if cfg.qk_norm or cfg.positions.startswith("rope") else (0, 0)
    inputs = (x_NC, *norm_of(p, "norm1", cfg), *linear, T, heads, start, *place_arguments(p, s, cfg))
    POOL.run(qkv_kernel, tasks, *inputs, stats, qkv.reshape(B * T, -1, D), scratch)
    kv, k_at, S = qkv, H, T
    if past is not None:
        past[0][:, start : start + T] = qkv[:, :, H:].reshape(B, T, 2, G, D)
        kv, k_at, S = past[0].reshape(B, -1, 2 * G, D), 0, start + T
    mask = mask_of(dropout, ATTENTION_SITE, cfg.attention_dropout, B)
    arguments = attention_arguments(cfg, index, mask, qkv.dtype)
    POOL.run(attention_kernel, B * H, qkv, H, kv, k_at, k_at + G, S, *arguments, o, s["o_T"], s["lse"], scratch)
    out_mask = mask_of(dropout, OUT_SITE, cfg.out_dropout, B)
    linear = (o.reshape(B * T, -1), panels_of(p["out_w"], s), biases(p, "out_b", C))
    POOL.run(linear_residual_kernel, tasks, x_NC, *linear, T, *out_mask, y.reshape(-1, C), scratch)
    return y, (x_NC, s, arguments, out_mask)


def masked(dy_NC, mask, s, T):
    """dy times the mask that its sublayer's output was multiplied by."""
    if not mask[1]:
        return dy_NC
    kept = s["kept"].reshape(dy_NC.shape)
    POOL.run(drop_kernel, len(s["sums"]), dy_NC, T, *mask, kept)
    return kept


def attention_layer_backward_kernels(dy, cache, p, g, cfg, ops, index=0):
    x_NC, s, arguments, out_mask = cache
    (B, T, C), (H, G, D) = dy.shape, (cfg.heads, cfg.kv_heads, cfg.head_width)
    tasks, scratch, N, HD = B * blocks(T, ROW_BLOCK), scratch_of(s), B * T, H * D
    dy_NC = np.ascontiguousarray(dy).reshape(-1, C)
    do, dqkv = s["do"], s["dqkv"]

    dout = masked(dy_NC, out_mask, s, T)
    out_w_T = panels_of(p["out_w"], s, turned=True)
    POOL.run(linear_backward_kernel, tasks, dout, out_w_T, T, do.reshape(N, HD), scratch)
    weight_gradient(s["o_T"], T, dout, g["out_w"], g["out_b"], scratch)

    outputs = (dqkv, s["qk_sums"], scratch)
    inputs = (s["qkv"], H, G, *arguments, s["o_T"], s["lse"], do, *place_arguments(p, s, cfg))
    POOL.run(attention_backward_kernel, B * G, *inputs, *outputs)
    if cfg.qk_norm:
        add_sums(s["qk_sums"], g["q_norm_w"], g["k_norm_w"])

    dqkv_NM = dqkv.reshape(N, -1)
    qkv_w_T = panels_of(p["qkv_w"], s, turned=True)
    dx = norm_backward_kernels(dy_NC, dqkv_NM, qkv_w_T, x_NC, norm_of(p, "norm1", cfg), s["norm1"], T, s["dx"][1], s)
    weight_gradient(s["n_T"], T, dqkv_NM, g["qkv_w"], g["qkv_b"], scratch)
    add_sums(s["sums"], g["norm1_w"], g["norm1_b"])
    return dx


def norm_backward_kernels(dy_NC, dlinear, w_T, x_NC, norm, stats, T, dx, s):
    """dx (B, T, C) = dy + norm_backward(dlinear w^T)."""
    tail = (w_T, x_NC, *norm[:3], stats.reshape(2, -1), T, dx.reshape(x_NC.shape), s["n_T"], s["sums"], scratch_of(s))
    POOL.run(linear_norm_backward_kernel, len(s["sums"]), dy_NC, dlinear, *tail)
    return dx


# == 7.3  MLP layer ====================================================================================================


@kernel
def mlp_kernel(
    task, slot, x, kind, norm_w, norm_b, eps, activation, up, up_b, down, down_b, T, keys, threshold, keep,
    stats, h, y, scratch,
):  # fmt: skip
    """y (N, C) = x + mask * (f(norm(x) up_w + up_b) down_w + down_b), the weights by panels; keeps h (N, F) before the
    activation."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    (rows, C), columns = (stop - start, x.shape[1]), up.shape[2]
    F = h.shape[1] // 2 if activation == SWIGLU else h.shape[1]
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:]
    n = rest[: rows * C].reshape(rows, C)
    norm_rows(kind, x[start:stop], norm_w, norm_b, eps, stats[0, start:stop], stats[1, start:stop], n)
    if threshold == 0:
        add_bias(x[start:stop], down_b, y[start:stop])
    else:
        set_rows(down_b, y, start, stop, 0, C)
    for f in range(0, F, HIDDEN_BLOCK):
        width = min(HIDDEN_BLOCK, F - f)
        a = rest[rows * C : rows * (C + width)].reshape(rows, width)
        for first in range(f, h.shape[1], F):  # with a gate: its columns, then those of the values
            set_rows(up_b, h, start, stop, first, first + width)
            at = first // F * blocks(F, columns) + f // columns
            panels = up[at : at + blocks(width, columns)]
            product_of_panels(n, panels, h[start:stop, first : first + width], True, panel)
        activation_rows(activation, h, start, f, F, a)
        product_of_panels(a, down[:, f : f + width], y[start:stop], True, panel)
    if threshold > 0:
        drop_and_add(x, y, start, stop, T, keys, threshold, keep)


@kernel
def mlp_backward_kernel(task, slot, dy, h, activation, down_T, T, a_T, dh, scratch):
    """dh (N, F) = df(h) * (dy down_w^T), and a_T (tasks, F', ROW_BLOCK) = f(h) again; down_w^T by panels."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    rows, columns = stop - start, down_T.shape[2]
    F = h.shape[1] // 2 if activation == SWIGLU else h.shape[1]
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE:]
    for f in range(0, F, HIDDEN_BLOCK):
        width = min(HIDDEN_BLOCK, F - f)
        da, a = rest[: rows * width].reshape(rows, width), rest[rows * width : 2 * rows * width].reshape(rows, width)
        panels = down_T[f // columns : blocks(f + width, columns)]
        product_of_panels(dy[start:stop], panels, da, False, panel)
        activation_rows_backward(activation, h, da, start, f, F, a, dh)
        lay_turned(a, a_T[task, f : f + width], panel)


def mlp_layer_forward_kernels(x, p, cfg, ops, index=0, dropout=None):
    B, T, C = x.shape
    s = layer_space(ops, cfg, x, index)
    x_NC, h, y = np.ascontiguousarray(x).reshape(-1, C), s["h"].reshape(B * T, -1), s["mixed"]
    up = panels_of(p["up_w"], s, parts=cfg.up_width // cfg.hidden)
    down = panels_of(p["down_w"], s, first=up.size)
    weights = (up, biases(p, "up_b", cfg.up_width), down, biases(p, "down_b", C))
    mask = mask_of(dropout, MLP_SITE, cfg.mlp_dropout, B)
    inputs = (x_NC, *norm_of(p, "norm2", cfg), ACTIVATION[cfg.mlp], *weights, T, *mask)
    outputs = (s["norm2"].reshape(2, -1), h, y.reshape(-1, C), scratch_of(s))
    POOL.run(mlp_kernel, B * blocks(T, ROW_BLOCK), *inputs, *outputs)
    return y, (x_NC, s, mask)


def mlp_layer_backward_kernels(dy, cache, p, g, cfg, ops, index=0):
    x_NC, s, mask = cache
    (B, T, C), scratch = dy.shape, scratch_of(s)
    dy_NC = np.ascontiguousarray(dy).reshape(-1, C)
    h, dh, a_T = s["h"].reshape(B * T, -1), s["dh"].reshape(B * T, -1), s["a_T"]
    dout = masked(dy_NC, mask, s, T)
    down_w_T = panels_of(p["down_w"], s, turned=True)
    POOL.run(mlp_backward_kernel, B * blocks(T, ROW_BLOCK), dout, h, ACTIVATION[cfg.mlp], down_w_T, T, a_T, dh, scratch)
    weight_gradient(a_T, T, dout, g["down_w"], g["down_b"], scratch)
    up_w_T = panels_of(p["up_w"], s, turned=True)
    dx = norm_backward_kernels(dy_NC, dh, up_w_T, x_NC, norm_of(p, "norm2", cfg), s["norm2"], T, s["dx"][0], s)
    weight_gradient(s["n_T"], T, dh, g["up_w"], g["up_b"], scratch)
    add_sums(s["sums"], g["norm2_w"], g["norm2_b"])
    return dx


# == 7.4  head =========================================================================================================


@kernel
def head_tiles_kernel(task, slot, head_w, tiles, scratch):
    """tiles (blocks, V, TILE_ROWS) = the columns of head_w (V, C), as a register tile reads them; or (1, V', C') =
    head_w, where others make products, as it stands on the left of theirs. 256 rows a task."""
    first, last, C = 256 * task, min(256 * task + 256, len(head_w)), head_w.shape[1]
    if laid_elsewhere(head_w[first:last], False, True, tiles[0, first:last], 0, scratch[slot, :PANEL_SIZE]):
        return
    for v in range(first, last):
        row = head_w[v]
        for i in range(len(tiles)):
            for r in range(TILE_ROWS):
                c = i * TILE_ROWS + r
                tiles[i, v, r] = row[c] if c < C else head_w.dtype.type(0)


@kernel
def head_kernel(
    task, slot, earlier, x, kind, norm_w, norm_b, eps, head_w, head_b, tiles, panels, targets, weights, T, backward,
    odds, shares, nats, dx, n, sums, scratch,
):  # fmt: skip
    """Block earlier + task of HEAD_BLOCK rows: norm, logits, cross-entropy, and backward to dx (N, C) if `backward`.
    tiles and panels are head_w (V, C) laid for the left and for the right of a product; or no panels, and tiles of it.

    Rows stand side by side, in columns of odds (blocks, V, HEAD_BLOCK): o = e^(logits - top) = p total. With share =
    weight / total, dlogits = share (o - total onehot): odds and n (N, C) keep the two factors for the gradient of
    head_w. Fills shares and nats (N,), dx (N, C), sums (blocks, 2, C).
    """
    start, stop = block_rows(earlier + task, T, HEAD_BLOCK)
    (rows, C), V, width, block = (stop - start, x.shape[1]), len(head_w), whole_vectors(stop - start), odds[task]
    panel, rest = scratch[slot, :PANEL_SIZE], scratch[slot, PANEL_SIZE + 4 * width :]
    stats = scratch[slot, PANEL_SIZE : PANEL_SIZE + 4 * width].reshape(4, width)
    mean, rstd, top, total = stats[0], stats[1], stats[2], stats[3]
    n_T, dn = rest[: C * width].reshape(C, width), rest[: rows * C].reshape(rows, C)  # first the one, then the other
    laid, padded = len(panels) > 0, blocks(C, TILE_ROWS) * TILE_ROWS
    words = TILED_HEAD_WORDS if laid else HEAD_WORDS
    dn_T = rest[C * width : (C + padded) * width].reshape(padded, width)
    norm_rows(kind, x[start:stop], norm_w, norm_b, eps, mean, rstd, n[start:stop])
    transpose_rows(n[start:stop], n_T)
    for t in range(width):
        top[t], total[t] = -np.inf, 0
    for first in range(0, V, words):
        last = min(first + words, V)
        if laid:
            product(tiles[0, first:last, :C], n_T, block[first:last, :width], False, panel)
        else:
            product(head_w[first:last], n_T, block[first:last, :width], False, panel)
        for v in range(first, last):
            row = odds[task, v, :width]
            if head_b.size > 0:
                for t in range(width):
                    row[t] += head_b[v]
            for t in range(width):
                top[t] = row[t] if row[t] > top[t] else top[t]
    for t in range(rows):
        nats[start + t] = top[t] - block[targets[start + t], t]
    for first in range(0, V, words):
        last = min(first + words, V)
        for v in range(first, last):
            row = odds[task, v, :width]
            for t in range(width):
                e = exp(row[t] - top[t])
                row[t] = e
                total[t] += e
        if backward and laid:  # dn = odds^T head_w
            product_of_panels(block[first:last, :rows].T, panels[:, first:last], dn, first > 0, panel)
        elif backward:  # dn^T = head_w^T odds, of what still lies in the first cache
            for i in range(len(tiles)):
                sums_of = dn_T[i * TILE_ROWS : (i + 1) * TILE_ROWS]
                product(tiles[i, first:last].T, block[first:last, :width], sums_of, first > 0, panel)
    for t in range(rows):
        nats[start + t] += math.log(total[t])
    if backward:
        if not laid:
            transpose_rows(dn_T[:C, :rows], dn)
        for t in range(rows):
            weight, target, row, word = weights[start + t], targets[start + t], dn[t], head_w[targets[start + t]]
            share = weight / total[t]
            for c in range(C):
                row[c] = share * row[c] - weight * word[c]
                dx[start + t, c] = 0
            block[target, t] -= total[t]
            shares[start + t] = share
        dx_rows, dw_db = dx[start:stop], sums[earlier + task]
        norm_rows_backward(kind, dn, x[start:stop], norm_w, norm_b, mean, rstd, dx_rows, n[start:stop], dw_db)
        for t in range(rows):
            row = n[start + t]
            for c in range(C):
                row[c] *= shares[start + t]


@kernel
def head_gradient_kernel(task, slot, words, earlier, count, T, odds, shares, n, dw, db, scratch):
    """dw (V, C) += dlogits^T n of `count` blocks, `words` rows a task; db (V,) += sum_n dlogits."""
    first, last = words * task, min(words * (task + 1), len(dw))
    for block in range(count):
        start, stop = block_rows(earlier + block, T, HEAD_BLOCK)
        product(odds[block, first:last, : stop - start], n[start:stop], dw[first:last], True, scratch[slot])
        if db.size > 0:
            share = shares[start:stop]
            for v in range(first, last):
                row, total = odds[block, v], db.dtype.type(0)
                for t in range(share.size):
                    total += row[t] * share[t]
                db[v] += total


@kernel
def head_logits_kernel(task, slot, n_T, head_w, logits_T, scratch):
    """logits_T (V, N) = head_w (V, C) n_T (C, N), 960 rows of the vocabulary a task."""
    first = task * 960
    product(head_w[first : first + 960], n_T, logits_T[first : first + 960], False, scratch[slot])


def head_logits_kernels(x, p, cfg, ops):
    n = NORMS[cfg.norm][0](x, p["norm_w"], p["norm_b"], cfg.norm_eps)[0] if cfg.final_norm else x  # a row or a few
    logits_T = np.empty((cfg.vocab_size, len(x)), x.dtype)
    provide_product(x.dtype.name)
    scratch = scratch_of(ops.space) if ops.space else np.zeros((POOL.threads, PANEL_SIZE), x.dtype)
    tasks, head_w = blocks(cfg.vocab_size, 960), p["embed_w" if cfg.tied else "head_w"]
    POOL.run(head_logits_kernel, tasks, np.ascontiguousarray(n.T), head_w, logits_T, scratch)
    return logits_T.T if p["head_b"] is None else logits_T.T + p["head_b"]


def head_loss_kernels(x, targets, weights, p, g, cfg, ops):
    (B, T, C), V, name = x.shape, cfg.vocab_size, "embed_w" if cfg.tied else "head_w"
    s = ops.space or workspace(dataclasses.replace(cfg, layers=1), B, T, x.dtype)
    x_NC, dx, n, nats = np.ascontiguousarray(x).reshape(-1, C), s["dx"][1], s["n"].reshape(-1, C), s["nats"]
    head_w, sums, scratch, nothing = p[name], s["head_sums"], scratch_of(s), np.empty(0, x.dtype)
    laid = asks_others(scratch)
    shape = (1, laid_size(V), laid_size(C)) if laid else (blocks(C, TILE_ROWS), V, TILE_ROWS)
    tiles = s["panels"][: math.prod(shape)].reshape(shape)
    panels = panels_of(head_w, s, first=tiles.size) if laid else np.empty((0, 0, 0), x.dtype)
    POOL.run(head_tiles_kernel, blocks(V, 256), head_w, tiles, scratch)
    flat_targets = np.ascontiguousarray(targets, np.int64).reshape(-1)
    flat_weights = np.ascontiguousarray(weights, x.dtype).reshape(-1)
    head = (head_w, nothing if p["head_b"] is None else p["head_b"], tiles, panels)
    norm = norm_of(p, "norm", cfg, None if cfg.final_norm else NO_NORM)
    odds, shares = s["odds"], s["shares"].reshape(-1)
    outputs = (odds, shares, nats.reshape(-1), dx.reshape(-1, C), n, sums, scratch)
    for first in range(0, len(sums), len(odds)):
        count = min(len(odds), len(sums) - first)
        inputs = (first, x_NC, *norm, *head, flat_targets, flat_weights, T, g is not None)
        POOL.run(head_kernel, count, *inputs, *outputs)
        if g is not None:
            gradients = (g[name], nothing if g["head_b"] is None else g["head_b"])
            words = TILED_HEAD_WORDS if laid else 2 * HEAD_WORDS
            inputs = (words, first, count, T, odds, shares, n)
            POOL.run(head_gradient_kernel, blocks(V, words), *inputs, *gradients, scratch)
    if g is not None:
        add_sums(sums, g["norm_w"], g["norm_b"])
    return float((weights * nats).sum()), nats, None if g is None else dx


# == 7.5  one token: the whole model in one launch =====================================================================
#
# A token meets every weight once: its time is that of reading them from memory. So the weights lie in the order in
# which they are read, and from the drawing of one token to that of the next there is neither Python nor a launch. The
# specification is `forward` with a cache, then `head_logits`, then `probabilities`. Sums run in the order of the
# kernels above: a text has the same bytes, whether it was read in blocks or token by token.
#
# A token is a list of stages, each cut into a chunk for each thread, whose weights stay in its cache where they fit. A
# chunk is done by its thread or, when that is late, by another: nobody waits for a thread that has not come, and which
# thread does what changes no byte. The stages' code is compiled once for each dtype and called by its address; what it
# works on it finds by addresses in two kinds of records, since Numba is slow to pass many arrays to many functions.

END, DRAWN, CHUNKS = 0, 8, 16  # words: stages until the end; tokens drawn; a line for each chunk: in stage number n it
# becomes 2 n + 1, somebody is at work on it, then 2 n + 2, it is done
PATIENCE = 1000  # looks, some 2 us, before a thread takes what another would find in its cache
STEP_VECTORS = 4  # of a panel: so many sums run side by side, each waiting four cycles for the multiply-add before it
AHEAD = 4096  # bytes: so far ahead of their use are weights asked for that come from far
FAR_BYTES = 1 << 21  # of weights: more are not in a core's own cache when their turn comes again
BESIDE = 4  # heads narrower than a vector whose sums over the values run side by side
ALONE_BYTES = 1 << 19  # of weights: a model this small is faster in the cache of one thread
KEEP_BYTES = 1 << 24  # of memory that is asked for at a time, and is not there before it is used

# Greedy decoding needs the largest logit alone. A large head is kept in 8 bits as well, w = unit q + at most unit / 2:
# a quarter of the bytes says which logits can be the largest, and those are computed from the weights themselves.
SCREEN_BYTES = 1 << 22  # heads above this size have one
SCREEN_MARGIN = 0.51  # of a unit: half, and what dividing by it rounded

BEGIN, LINEAR, HIDDEN, ATTENTION, HEAD = range(5)  # kinds of stages
STAGE = np.dtype(  # y = norm(source) w + b, or +=, in panels; attention has its layer, its window and gains of q and k
    [(name, np.int64) for name in "kind units norm gains source K bias weights y columns adds layer window".split()]
)
STEP = np.dtype(
    [(name, np.int64) for name in "code stages size panel C H G D V P Cs Fs Ds Ps".split()]  # s: whole
    + [(name, np.int64) for name in "x qkv o h a logits offsets odds units keys values scratch kv".split()]  # addresses
    + [(name, np.int64) for name in "embed_w positions embed_gains cos sin slopes head_w screen".split()]
    + [(name, np.int64) for name in "tokens words uniforms zeros scratch_size far kind activation gated half".split()]
    + [(name, np.int64) for name in "ways first position count stop screened top_k".split()]  # of a launch
    + [(name, np.float64) for name in ("eps", "scale", "temperature", "top_p")]
)
NO_STEPS, NO_STAGES = np.zeros(0, STEP), np.zeros(0, STAGE)  # by which kernels know the types of records
step_part = njit(inline="always")  # by Numba, into the one function that calls it: compiled once, without references


@intrinsic
def put(typing_context, address, value):
    """Store a 64-bit word at an address: whoever sees it also sees what was stored before."""

    def build(context, builder, signature, args):
        builder.store_atomic(args[1], word_at(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), build


@intrinsic
def replace(typing_context, address, old, new):
    """Make the 64-bit word at an address `new` if it is `old`, in one step; whether it was."""

    def build(context, builder, signature, args):
        found = builder.cmpxchg(word_at(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(types.intp, types.int64, types.int64), build


@intrinsic
def call_step(typing_context, code, record, stages, stage, index, first, last, slot):
    """What `provide_step` compiled to this address."""

    def build(context, builder, signature, args):
        i64 = ir.IntType(64)
        function = ir.FunctionType(i64, [i64] * 7).as_pointer()
        return builder.call(builder.inttoptr(args[0], function), args[1:])

    return types.int64(*[types.int64] * 8), build


def array_of(like, axes):
    """(numba type, its build) of an array at an address, with lengths; elements are of the type of `like`, or of those
    of the array `like`."""
    kind = types.Array(getattr(like, "dtype", like), axes, "C")

    def build(context, builder, signature, args):
        array, lengths = context.make_array(kind)(context, builder), args[1 : 1 + axes]
        size = ir.IntType(64)(context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        strides = [builder.mul(size, lengths[-1]), size][-axes:]
        data = builder.inttoptr(args[0], array.data.type)
        populate_array(array, data=data, shape=lengths, strides=strides, itemsize=size, meminfo=None)
        return array._getvalue()

    return kind, build


@intrinsic
def vector(typing_context, address, count, like):
    kind, build = array_of(like, 1)
    return kind(types.intp, types.intp, like), build


@intrinsic
def matrix(typing_context, address, rows, columns, like):
    kind, build = array_of(like, 2)
    return kind(types.intp, types.intp, types.intp, like), build


def row_tile(rows, vectors, ahead=0, narrow=False):
    """Numba function (x, x_next, w, w_next, w_row, start, y, y_next, K, zero): `rows` rows, each with its matrix,
    of `vectors` vectors: y = start + sum_k x[k] w[k], one fused multiply-add after the other as in `register_tile`.
    Addresses and distances in bytes, K >= 1. It asks for weights `ahead` bytes ahead; w is of 8 bits if narrow."""
    i32, i64 = ir.IntType(32), ir.IntType(64)

    def build(context, builder, signature, args):
        x, x_next, w, w_next, w_row, start, y, y_next, K, _ = args
        scalar = context.get_value_type(signature.args[-1])
        size = context.get_abi_sizeof(scalar)
        lanes, first = VECTOR_BYTES // size, builder.block
        vector = ir.VectorType(scalar, lanes)
        kept, step = (ir.VectorType(ir.IntType(8), lanes), lanes) if narrow else (vector, VECTOR_BYTES)
        undefined, first_lane = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)
        name = f"llvm.fma.v{lanes}f{8 * size}"
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        pointer = ir.IntType(8).as_pointer()
        prefetch = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, prefetch, "llvm.prefetch.p0")

        def place(address, distance, count, kind, more=0):
            address = builder.add(address, builder.mul(distance, count))
            return builder.inttoptr(builder.add(address, i64(more)), kind.as_pointer())

        each = [(r, v) for r in range(rows) for v in range(vectors)]
        before = [builder.load(place(start, i64(v), i64(VECTOR_BYTES), vector), align=size) for _, v in each]
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, sums = builder.phi(i64), [builder.phi(vector) for _ in each]
        one, grown = [], []
        for r in range(rows):
            x_k = builder.load(place(builder.add(x, builder.mul(x_next, i64(r))), k, i64(size), scalar))
            x_k = builder.insert_element(undefined, x_k, i32(0))
            one.append(builder.shuffle_vector(x_k, undefined, first_lane))
        w_k = builder.add(w, builder.mul(w_row, k))
        for low in range(0, vectors * step, CACHE_LINE) if ahead else ():
            line = place(w_k, i64(0), i64(0), ir.IntType(8), ahead + low)
            builder.call(prefetch, [line, i32(0), i32(3), i32(1)])  # to read, keep near, data
        for (r, v), total in zip(each, sums):
            weights = builder.load(place(w_k, w_next, i64(r), kept, v * step), align=1 if narrow else size)
            weights = builder.sitofp(weights, vector) if narrow else weights
            grown.append(builder.call(fma, [one[r], weights, total]))
        k_next = builder.add(k, i64(1))
        builder.cbranch(builder.icmp_signed("<", k_next, K), loop, done)
        for phi, *values in ((k, i64(0), k_next), *zip(sums, before, grown)):
            phi.add_incoming(values[0], first)
            phi.add_incoming(values[1], loop)
        builder.position_at_end(done)
        for (r, v), total in zip(each, grown):
            builder.store(total, place(y, y_next, i64(r), vector, v * VECTOR_BYTES), align=size)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, x, x_next, w, w_next, w_row, start, y, y_next, K, zero):
        return types.void(*[types.intp] * 9, zero), build

    return tile


one_panel, one_two, one_one = (row_tile(1, vectors) for vectors in (STEP_VECTORS, 2, 1))
far_panel, narrow_panel = (row_tile(1, STEP_VECTORS, AHEAD, narrow) for narrow in (False, True))
beside_one = row_tile(BESIDE, 1)


@part
def times(x, K, w, w_row, start, y, width, zero):
    """y = start + x (K,) w, at most a panel, whole vectors: addresses, and `width` in bytes."""
    if width == STEP_VECTORS * VECTOR_BYTES:
        one_panel(x, 0, w, 0, w_row, start, y, 0, K, zero)
    else:
        two = width // (2 * VECTOR_BYTES) * 2 * VECTOR_BYTES
        if two > 0:
            one_two(x, 0, w, 0, w_row, start, y, 0, K, zero)
        if width > two:
            one_one(x, 0, w + two, 0, w_row, start + two, y + two, 0, K, zero)


@step_part
def step_norm(m, kind, gains, x, n, zero):
    """n (C,) = norm(x), then mean and rstd; gains (C,), then biases: addresses."""
    stats, w, b = vector(n + m.Cs * m.size, 2, zero), vector(gains, m.C, zero), vector(gains + m.Cs * m.size, m.C, zero)
    norm_rows(kind, matrix(x, 1, m.C, zero), w, b, m.eps, stats[:1], stats[1:], matrix(n, 1, m.C, zero))


@step_part
def step_panels(m, t, source, first, last, zero):
    """Panels first .. last - 1 of y (columns,) = source (K,) w + b, or += : a panel is some columns, row after row."""
    for low in range(first * m.panel, min(last * m.panel, t.columns), m.panel):
        width, y = min(m.panel, t.columns - low), t.y + low * m.size
        start = t.bias + low * m.size if t.bias != 0 else m.zeros
        if t.adds:
            row, b = vector(y, width, zero), vector(start, width, zero)
            for c in range(width):
                row[c] += b[c]
            start = y
        w = t.weights + low * t.K * m.size
        if m.far and width == m.panel:
            far_panel(source, 0, w, 0, width * m.size, start, y, 0, t.K, zero)
        else:
            times(source, t.K, w, width * m.size, start, y, width * m.size, zero)


@intrinsic
def fused(typing_context, a, b, c):
    """a b + c, rounded once: as the compiler does it in `turn`, where it has a choice."""
    return c(a, b, c), lambda context, builder, signature, args: builder.fma(*args)


@part
def turn_heads(x, cos, sin, half):
    """`turn` of x (heads D,) at one position: cos and sin (D/2,)."""
    pairs = cos.size
    for low in range(0, x.size, 2 * pairs):
        for i in range(pairs):
            even, odd = (low + i, low + i + pairs) if half else (low + 2 * i, low + 2 * i + 1)
            a, b = x[even], x[odd]
            x[even] = fused(a, cos[i], -(b * sin[i]))
            x[odd] = fused(a, sin[i], b * cos[i])


@step_part
def step_place(m, x, heads, gains, position, rstd, zero):
    """x (heads D,), queries or keys: their norm and their rotation, as in `place_rows`."""
    if gains != 0:
        for h in range(heads):
            column = matrix(x + h * m.D * m.size, m.D, 1, zero)
            norm_columns(column, vector(gains, m.D, zero), m.eps, vector(rstd, 1, zero))
    if m.cos != 0:
        at, pairs = position * (m.D // 2) * m.size, m.D // 2
        cos, sin = vector(m.cos + at, pairs, zero), vector(m.sin + at, pairs, zero)
        turn_heads(vector(x, heads * m.D, zero), cos, sin, m.half)


@step_part
def step_attention(m, t, first, last, position, scratch, zero):
    """Groups first .. last - 1 of the heads: their keys and values join the others, their queries see them; section
    2.4. Values end in a one, so that what the probabilities are divided by is their product with the last column."""
    D, R, size, begin, panel = m.D, m.H // m.G, m.size, first_seen(position, t.window), m.panel * m.size
    seen, v_next, k_next = position + 1 - begin, m.P * m.Ds * m.size, m.D * m.Ps * m.size
    width = (seen + m.panel - 1) // m.panel * panel  # of a head's scores, in bytes
    keys, values = m.keys + t.layer * m.G * k_next, m.values + t.layer * m.G * v_next
    queries, key, value = m.qkv + first * R * D * size, m.qkv + (m.H + first) * D * size, m.G * D * size
    step_place(m, queries, (last - first) * R, t.gains, position, scratch, zero)
    k_gains = t.gains + D * size if t.gains != 0 else t.gains
    step_place(m, key, last - first, k_gains, position, scratch, zero)
    for i in range((last - first) * D):
        k, v, g, d = peek(key + i * size, zero), peek(key + value + i * size, zero), first + i // D, i % D
        kept = m.kv + (((t.layer * m.P + position) * 2 * m.G + first) * D + i) * size
        poke(kept, k)
        poke(kept + value, v)
        poke(keys + g * k_next + (d * m.Ps + position) * size, k)
        poke(values + g * v_next + (position * m.Ds + d) * size, v)
    q = vector(queries, (last - first) * R * D, zero)
    for i in range(q.size):
        q[i] *= q.dtype.type(m.scale)
    o, p = scratch, scratch + BESIDE * m.Ds * size
    for g in range(first, last, BESIDE):
        beside = min(BESIDE, last - g)
        for r in range(R):
            for i in range(beside):
                h, row = (g + i) * R + r, vector(p + i * width, width // size, zero)
                at, slope = keys + (g + i) * k_next + begin * size, vector(m.slopes, m.H, zero)[h]
                for low in range(0, width, panel):
                    times(m.qkv + h * D * size, D, at + low, m.Ps * size, m.zeros, p + i * width + low, panel, zero)
                if slope > 0:
                    for s in range(seen):
                        row[s] -= slope * row.dtype.type(seen - 1 - s)
                for s in range(seen, row.size):
                    row[s] = -math.inf
                top = maximum(row)
                for s in range(row.size):
                    row[s] = exp(row[s] - top)
            if beside == BESIDE and m.Ds * size == VECTOR_BYTES:
                at = values + g * v_next + begin * m.Ds * size
                beside_one(p, width, at, v_next, VECTOR_BYTES, m.zeros, o, VECTOR_BYTES, seen, zero)
            else:
                for i in range(beside):
                    at, y = values + (g + i) * v_next + begin * m.Ds * size, o + i * m.Ds * size
                    for low in range(0, m.Ds * size, panel):
                        part_width = min(panel, m.Ds * size - low)
                        times(p + i * width, seen, at + low, m.Ds * size, m.zeros, y + low, part_width, zero)
            for i in range(beside):
                y, out = vector(o + i * m.Ds * size, m.Ds, zero), vector(m.o + ((g + i) * R + r) * D * size, D, zero)
                share = y.dtype.type(1) / y[D]
                for d in range(D):
                    out[d] = y[d] * share


@part
def screen_slack(n):
    """A logit and its screened value are at most this many of its row's units apart: for the rounding of the weights,
    and of two sums of C products."""
    total = n.dtype.type(0)
    for c in range(n.size):
        total += abs(n[c])
    return total * n.dtype.type(SCREEN_MARGIN + n.size * 127 * 2.0**-22)


@step_part
def screen_logits(m, n, first, last, zero):
    """The least that logits of panels first .. last - 1 can be, before their offsets."""
    slack = screen_slack(vector(n, m.C, zero))
    for low in range(first * m.panel, min(last * m.panel, m.V), m.panel):
        y, units = vector(m.logits + low * m.size, m.panel, zero), vector(m.units + low * m.size, m.panel, zero)
        narrow_panel(n, 0, m.screen + low * m.C, 0, m.panel, m.zeros, m.logits + low * m.size, 0, m.C, zero)
        for v in range(y.size):
            y[v] = (y[v] - slack) * units[v]


@step_part
def screened_best(m, n, logits, offsets, scratch, zero):
    """The token with the largest logit, the first of equals: of those that may have it, by their logits."""
    slack, units, best, top = 2 * screen_slack(n), vector(m.units, m.V, zero), 0, n.dtype.type(-math.inf)
    least, lanes = maximum(logits), VECTOR_BYTES // m.size
    one, wide = vector(scratch, lanes, zero), vector(scratch + VECTOR_BYTES, m.C * lanes, zero)
    for i in range(wide.size):  # n in each lane: the tile turned round
        wide[i] = n[i // lanes]
    for v in range(m.V):
        if logits[v] + slack * units[v] >= least:
            row = m.head_w + v * m.C * m.size
            times(row, m.C, scratch + VECTOR_BYTES, VECTOR_BYTES, m.zeros, scratch, VECTOR_BYTES, zero)
            logit = one[0] + offsets[v]
            if logit > top:
                best, top = v, logit
    return best


@ordered_part
def compare(logits, top, temperature, odds):
    """odds (V,) of each token against the likeliest. An ordered part divides: 1 / temperature may be infinite."""
    for v in range(logits.size):
        odd = exp(odds.dtype.type((float(logits[v]) - float(top)) / temperature))
        odds[v] = odd if logits[v] > -math.inf else odds.dtype.type(0)


@part
def together(odds, least, counted):
    """The sum of the odds that are at least `least`, or their number."""
    total = 0.0
    for v in range(odds.size):
        odd = 1.0 if counted else float(odds[v])
        total += odd if odds[v] >= least else 0.0
    return total


@part
def keep_likeliest(odds, counted, enough):
    """All odds become 0 but the fewest and largest that together have `enough` (are so many, if counted); at least one.
    Their least is found by halving: a sum over all tokens takes less time than sorting them."""
    low = middle = odds.dtype.type(0)
    high = odds.dtype.type(2)  # together(low) >= enough > together(high)
    while True:
        middle = (low + high) / odds.dtype.type(2)
        if middle == low or middle == high:
            break
        if together(odds, middle, counted) >= enough:
            low = middle
        else:
            high = middle
    left = enough - together(odds, high, counted)
    for v in range(odds.size):
        if odds[v] < low or (odds[v] < high and left <= 0):
            odds[v] = 0
        elif odds[v] < high:  # of equals the first
            left -= 1.0 if counted else float(odds[v])


@step_part
def draw(m, logits, uniform, zero):
    """The token that a number from 0 to 1 draws from `probabilities`."""
    odds, top, best, cumulative = vector(m.odds, m.V, zero), maximum(logits), 0, 0.0
    while best < m.V - 1 and logits[best] != top:
        best += 1
    if m.temperature > 0:
        compare(logits, top, m.temperature, odds)
        if 0 < m.top_k < m.V:
            keep_likeliest(odds, True, float(m.top_k))
        if m.top_p < 1:
            keep_likeliest(odds, False, m.top_p * together(odds, odds.dtype.type(0), False))
        total = uniform * together(odds, odds.dtype.type(0), False)
        for v in range(m.V):
            if odds[v] > 0:
                cumulative, best = cumulative + float(odds[v]), v
                if cumulative > total:
                    break
    return best


@step_part
def step_begin(m, stages, index, n, zero):
    """Look up token number `index`, after drawing it (number 0 is given). 1 if the text ends with it, else 0."""
    tokens, over = vector(m.tokens, m.P + 2, np.int64(0)), 0
    if index > 0:
        logits, offsets = vector(m.logits, m.V, zero), vector(m.offsets, m.V, zero)
        for v in range(m.V):
            logits[v] += offsets[v]
        if m.screened:
            step_norm(m, stages[-1].norm, stages[-1].gains, m.x, n, zero)
            scratch = n + (m.Cs + VECTOR_BYTES) * m.size
            tokens[index] = screened_best(m, vector(n, m.C, zero), logits, offsets, scratch, zero)
        else:
            tokens[index] = draw(m, logits, vector(m.uniforms, m.P + 1, 0.0)[index - 1], zero)
        put(m.words + 8 * DRAWN, index)
        over = 1 if index == m.count or tokens[index] == m.stop else 0
    if over == 0:
        x, row = vector(m.x, m.C, zero), vector(m.embed_w + tokens[index] * m.C * m.size, m.C, zero)
        for c in range(m.C):
            x[c] = row[c]
        if m.positions != 0:
            row = vector(m.positions + (m.position + index) * m.C * m.size, m.C, zero)
            for c in range(m.C):
                x[c] += row[c]
        if m.embed_gains != 0:
            step_norm(m, m.kind, m.embed_gains, m.x, n, zero)
            row = vector(n, m.C, zero)
            for c in range(m.C):
                x[c] = row[c]
    return over


@functools.cache
def provide_step(dtype):
    """Compile for a dtype: units first .. last - 1 of a stage, panels, groups of heads, or the one thing that it does.
    It returns what `step_begin` does."""
    provide_product(dtype)
    number = numba.from_dtype(np.dtype(dtype))

    def step_of_dtype(record, stages, stage, index, first, last, slot):
        m, zero = vector(record, 1, NO_STEPS)[0], number(0)
        stages = vector(stages, m.stages, NO_STAGES)
        t, n, over = stages[stage], m.scratch + slot * m.scratch_size, 0
        scratch, source = n + (m.Cs + VECTOR_BYTES) * m.size, t.source
        if t.kind == BEGIN:
            over = step_begin(m, stages, index, n, zero)
        elif t.kind == ATTENTION:
            step_attention(m, t, first, last, m.position + index, scratch, zero)
        else:
            if t.gains != 0:
                step_norm(m, t.norm, t.gains, t.source, n, zero)
                source = n
            if t.kind == HEAD and m.screened:
                screen_logits(m, n, first, last, zero)
            else:
                wide = 1 + m.gated if t.kind == HIDDEN else 1
                step_panels(m, t, source, first * wide, last * wide, zero)
            if t.kind == HIDDEN:  # with a gate, each panel of it lies before that of its values
                for low in range(first * m.panel, min(last * m.panel, m.Fs), m.panel):
                    width = min(m.panel, m.Fs - low)
                    h = matrix(t.y + (1 + m.gated) * low * m.size, 1, 2 * m.panel, zero)
                    activation_rows(m.activation, h, 0, 0, width, matrix(m.a + low * m.size, 1, m.panel, zero))
        return over

    return numba.cfunc(types.int64(*[types.int64] * 7), cache=True, **COMPILE)(step_of_dtype)


@kernel
def step_kernel(task, slot, record, stages):
    """The stages of m.count tokens, or of one up to the logits, from number m.first on: from 0, a token is fed at
    m.position, from the last, x is what the head reads there. A task is a thread that helps; it works in its own part
    of the scratch memory, since `slot` may be that of a thread that came later than this text."""
    m = record[0]
    number, words = m.first, m.words
    while number < look(words + 8 * END):
        index, stage = number // len(stages), number % len(stages)
        units = stages[stage].units
        for i in range(m.ways):
            chunk, waited = (task + i) % m.ways, 0 if i > 0 else PATIENCE
            low, high = (units * chunk + m.ways - 1) // m.ways, (units * chunk + units + m.ways - 1) // m.ways
            at = words + 8 * (CHUNKS + 8 * chunk)
            state = look(at) if low < high else 2 * number + 2
            while state < 2 * number + 2:
                if waited >= PATIENCE and state <= 2 * number and replace(at, state, 2 * number + 1):
                    if call_step(m.code, record.ctypes.data, stages.ctypes.data, stage, index, low, high, task):
                        put(words + 8 * END, 0)
                    put(at, 2 * number + 2)
                waited += 1
                state = look(at)
        number += 1
    put(words + 8 * END, 0)


def screen_of(head_w, panel):
    """(screen (panels, C, panel) int8, units (V',)): head_w (V, C) is units * screen, within half a unit."""
    (V, C), count = head_w.shape, blocks(len(head_w), panel)
    units = np.zeros(count * panel, head_w.dtype)
    units[:V] = np.abs(head_w).max(1) / 127
    screen = np.zeros((count * panel, C), np.int8)
    q = head_w / np.where(units > 0, units, 1)[:V, None]
    screen[:V] = np.rint(q, out=q)
    return np.ascontiguousarray(screen.reshape(count, panel, C).swapaxes(1, 2)), units


def gate_beside_values(w, panel):
    """w (K, 2 F) -> (K, 2 F'): a panel of the gate, that of its values, the next; F' is F in whole vectors."""
    K, F = len(w), w.shape[1] // 2
    wide = np.zeros((K, 2, whole_vectors(F)), w.dtype)
    wide[:, :, :F] = w.reshape(K, 2, F)
    return np.concatenate([wide[:, :, low : low + panel].reshape(K, -1) for low in range(0, wide.shape[2], panel)], 1)


class Steps:
    """The state of `step_kernel` for one text. `kv` is that of `Decoding`; parameters are copied as they are now."""

    def __init__(self, p, cfg, kv):
        dtype, size, (C, D, H, G) = kv.dtype, kv.dtype.itemsize, (cfg.width, cfg.head_width, cfg.heads, cfg.kv_heads)
        L, F, V, P, code = cfg.layers, cfg.hidden, cfg.vocab_size, cfg.seq_len, provide_step(kv.dtype.name)
        self.cfg, self.kv, self.threads, self.record = cfg, kv, POOL.threads, np.zeros(1, STEP)
        self.panel, self.kept = STEP_VECTORS * VECTOR_BYTES // size, [code]  # whose addresses are in records
        self.free, self.bytes_kept = np.empty(0, dtype), 0
        Cs, Fs, Ds = map(whole_vectors, (C, F, D + 1))
        Ps = whole_vectors(P + self.panel) | 16  # rows of 2^n bytes would use few sets of the cache
        scratch = whole_vectors(Cs + VECTOR_BYTES + max(BESIDE * (Ds + Ps), (C + 1) * VECTOR_BYTES // size))
        self.set(code=code.address, size=size, panel=self.panel, scratch_size=scratch * size, eps=cfg.norm_eps)
        self.set(C=C, H=H, G=G, D=D, V=V, P=P, Cs=Cs, Fs=Fs, Ds=Ds, Ps=Ps)
        shapes = dict(x=C, qkv=cfg.qkv_width, o=H * D, h=2 * (Fs + self.panel), a=Fs + self.panel)
        shapes |= dict(logits=V + self.panel, offsets=V, odds=V, zeros=self.panel)
        shapes |= dict(scratch=POOL.threads * scratch, keys=(L, G, D, Ps), values=(L, G, P, Ds))
        self.arrays = {name: self.zeros(shape, dtype) for name, shape in shapes.items()}
        self.arrays["values"][..., D] = 1
        self.arrays |= dict(tokens=np.zeros(P + 2, np.int64), uniforms=np.zeros(P + 1))
        self.arrays["words"] = aligned(CHUNKS + 8 * POOL.threads, np.int64)
        kind, (scale, slopes, _) = norm_of(p["layers"][0], "norm1", cfg)[0], attention_arguments(cfg, 0, (), dtype)
        self.arrays |= dict(kv=kv, embed_w=p["embed_w"], head_w=p["embed_w" if cfg.tied else "head_w"], slopes=slopes)
        self.set(kind=kind, scale=scale, activation=ACTIVATION[cfg.mlp], gated=cfg.mlp == "swiglu")
        if cfg.positions == "learned":
            self.arrays["positions"] = p["position_w"]
        if cfg.positions.startswith("rope"):
            self.arrays["cos"], self.arrays["sin"] = rotation(P, D, cfg.rope_theta, dtype.name)
            self.set(half=cfg.positions == "rope-half")
        self.set(**{name: x.ctypes.data for name, x in self.arrays.items()})
        if cfg.embedding_norm:
            self.set(embed_gains=self.norm(p, "embed_norm"))
        self.stages = self.list_stages(p, kind)
        self.set(stages=len(self.stages))
        self.head_b, self.screened = p["head_b"], self.arrays["head_w"].nbytes > SCREEN_BYTES
        weights = self.arrays["head_w"].nbytes + self.bytes_kept
        self.alone = weights <= ALONE_BYTES
        self.set(far=weights > FAR_BYTES)

    def set(self, **values):
        for name, value in values.items():
            self.record[0][name] = value

    def zeros(self, shape, dtype):
        """Zeros that vectors may be written to beyond the last element."""
        count = math.prod(np.atleast_1d(shape))
        return aligned(whole_vectors(count), dtype)[:count].reshape(shape)

    def keep(self, x, panel=1 << 62):
        """Address of a copy of x (K, M), or of x (M,): `panel` columns row after row, whole vectors, then the next. All
        lie in one stretch of memory, in large pages where NumPy gets them."""
        x = x.reshape(-1, x.shape[-1])
        (K, M), columns = x.shape, whole_vectors(x.shape[1])
        if K * columns > len(self.free):
            self.free = aligned(max(K * columns, KEEP_BYTES // x.itemsize), x.dtype)
            self.kept.append(self.free)
        room, self.free = self.free[: K * columns], self.free[K * columns :]  # 16 n elements: lines stay whole
        for low in range(0, columns, panel):
            block = room[low * K : (low + panel) * K].reshape(K, -1)
            block[:, : M - low] = x[:, low : low + panel]
        self.bytes_kept += room.nbytes
        return room.ctypes.data

    def norm(self, of, name):
        return self.keep(np.stack(norm_of(of, name, self.cfg, NO_NORM)[1:3]))

    def linear(self, layer, name, source, y, **more):
        """Stage that is a product with a layer's matrix."""
        w, at = layer[name + "_w"], self.record[0]
        b = biases(layer, name + "_b", w.shape[1])[None]
        K, units = len(w), blocks(whole_vectors(w.shape[1]), self.panel)
        if more.get("kind") == HIDDEN:
            units = blocks(whole_vectors(self.cfg.hidden), self.panel)
            w, b = (gate_beside_values(x, self.panel) if at["gated"] else x for x in (w, b))
        bias, weights = self.keep(b), self.keep(w, self.panel)
        stage = dict(kind=LINEAR, units=units, source=at[source], K=K, bias=bias, weights=weights, y=at[y])
        return stage | dict(columns=whole_vectors(w.shape[1])) | more

    def list_stages(self, p, kind):
        """The stages of a token, (5 L + 2,)."""
        cfg, rows = self.cfg, [dict(kind=BEGIN, units=1)]
        for index, layer in enumerate(p["layers"]):
            rows.append(self.linear(layer, "qkv", "x", "qkv", norm=kind, gains=self.norm(layer, "norm1")))
            rows.append(dict(kind=ATTENTION, units=cfg.kv_heads, layer=index, window=layer_window(cfg, index)))
            if cfg.qk_norm:
                rows[-1]["gains"] = self.keep(np.concatenate([layer["q_norm_w"], layer["k_norm_w"]]))
            rows.append(self.linear(layer, "out", "o", "x", adds=1))
            rows.append(self.linear(layer, "up", "x", "h", kind=HIDDEN, norm=kind, gains=self.norm(layer, "norm2")))
            rows.append(self.linear(layer, "down", "a", "x", adds=1))
        m, columns = self.record[0], whole_vectors(cfg.vocab_size)
        rows.append(dict(kind=HEAD, units=blocks(columns, self.panel), norm=kind * cfg.final_norm, K=cfg.width))
        rows[-1] |= dict(gains=self.norm(p, "norm"), source=m["x"], y=m["logits"], columns=columns)
        return np.array([tuple(row.get(name, 0) for name in STAGE.names) for row in rows], STAGE)

    def take(self, start, stop):
        """Keys and values of these positions, which a block has left in `kv`."""
        new, D = self.kv[:, 0, start:stop].transpose(2, 0, 3, 1, 4), self.cfg.head_width  # (2, L, G, T, D)
        self.arrays["keys"][..., start:stop] = new[0].swapaxes(-1, -2)
        self.arrays["values"][:, :, start:stop, :D] = new[1]

    def needs_screen(self):
        """Whether the head has a screen; it is made when it is first needed."""
        if self.screened and not self.record[0]["screen"]:
            self.arrays["screen"], self.arrays["units"] = screen_of(self.arrays["head_w"], self.panel)
            self.set(**{name: self.arrays[name].ctypes.data for name in ("screen", "units")})
            self.screened = bool(np.isfinite(self.arrays["units"]).all())
        return self.screened

    def run(self, token, x, position, screened=False, **launch):
        """`step_kernel` from a token at this position, or from x, what the head reads of it, if that is not None."""
        ways, first = 1 if self.alone else min(POOL.threads, self.threads), 0
        if x is not None:
            self.arrays["x"][:], first = x.reshape(-1), len(self.stages) - 1
        if not screened and not self.stages[-1]["weights"]:
            self.stages[-1]["weights"] = self.keep(self.arrays["head_w"].T, self.panel)
        self.arrays["words"][:], self.arrays["tokens"][0], self.record[0]["screened"] = 0, token, screened
        self.arrays["words"][END] = launch["count"] * len(self.stages) + 1 if launch["count"] else len(self.stages)
        self.set(ways=ways, first=first, position=position, **launch)
        POOL.run(step_kernel, ways, self.record, self.stages)

    def logits(self, token, x, position):
        """(V,), what follows the token at this position."""
        self.run(token, x, position, count=0)
        logits = self.arrays["logits"][: self.cfg.vocab_size]
        return logits.copy() if self.head_b is None else logits + self.head_b

    def draw(self, token, x, position, uniforms, stop, temperature=1.0, top_k=0, top_p=1.0, banned=()):
        """The ids that follow, one for each of uniforms (count,), or up to `stop`; all but the last have been fed."""
        count, offsets = len(uniforms), self.arrays["offsets"]
        self.arrays["uniforms"][:count], offsets[:] = uniforms, 0 if self.head_b is None else self.head_b
        offsets[list(banned)] = -math.inf
        launch = dict(count=count, stop=stop, temperature=temperature, top_k=top_k, top_p=top_p)
        self.run(token, x, position, temperature == 0 and self.needs_screen(), **launch)
        return self.arrays["tokens"][1 : 1 + self.arrays["words"][DRAWN]].tolist()


# == 7.6  products through tiles =======================================================================================
#
# The same kernels. A thread finds in the header of its panel whom to ask for each product: the driver of tiles.py,
# which leaves a few to the register tiles; and who lays ready what it reads more than once, between n_T and the end of
# panels in the space. The header is written before an op and erased after it.


NO_TILES = "tiles.py is not here, which multiplies in bfloat16"


def without_tiles():
    """None where OPS["tiles"] multiplies float32 in bf16 tiles, else why it does not, in a sentence."""
    try:
        import tiles
    except ImportError:
        return NO_TILES
    return tiles.why_not()


@contextlib.contextmanager
def tiles_in(space):
    """Meanwhile, products of kernels in this space are those of tiles.py. ValueError where it has none."""
    try:
        import tiles
    except ImportError:
        raise ValueError(NO_TILES) from None
    scratch = scratch_of(space)
    words = tiles.headers(len(scratch), tiles.KINDS[scratch.dtype.name])
    header = scratch[:, :HEADER].view(np.int64)[:, : words.shape[1]]
    header[:] = words
    header[:, tiles.FIRST] = space["n_T"].ctypes.data
    header[:, tiles.END] = space["panels"].ctypes.data + space["panels"].nbytes
    try:
        yield
    finally:
        header[:] = 0


def attention_layer_forward_tiles(x, p, cfg, ops, index=0, past=None, dropout=None):
    ops = with_space(ops, cfg, x, index)
    with tiles_in(ops.space["layers"][index]):
        return attention_layer_forward_kernels(x, p, cfg, ops, index, past, dropout)


def attention_layer_backward_tiles(dy, cache, p, g, cfg, ops, index=0):
    with tiles_in(cache[1]):
        return attention_layer_backward_kernels(dy, cache, p, g, cfg, ops, index)


def mlp_layer_forward_tiles(x, p, cfg, ops, index=0, dropout=None):
    ops = with_space(ops, cfg, x, index)
    with tiles_in(ops.space["layers"][index]):
        return mlp_layer_forward_kernels(x, p, cfg, ops, index, dropout)


def mlp_layer_backward_tiles(dy, cache, p, g, cfg, ops, index=0):
    with tiles_in(cache[1]):
        return mlp_layer_backward_kernels(dy, cache, p, g, cfg, ops, index)


def head_loss_tiles(x, targets, weights, p, g, cfg, ops):
    ops = with_space(ops, cfg, x)
    with tiles_in(ops.space):
        return head_loss_kernels(x, targets, weights, p, g, cfg, ops)


def with_space(ops, cfg, x, index=0):
    """A table that has buffers for x (B, T, C) in layer `index`."""
    if ops.space:
        return ops
    space = workspace(dataclasses.replace(cfg, layers=1), *x.shape[:2], x.dtype)
    return dataclasses.replace(ops, space=space | {"layers": space["layers"] * (index + 1)})


# == 8  tables of ops ==================================================================================================


@dataclass(frozen=True)
class Ops:
    """A table of the functions that a model runs on; each keeps the contract of the one that stands here.

    The defaults are the specification. Tier 2 brings faster primitives under the same sublayers; `fast` faster
    sublayers, which find their buffers in `space`.
    """

    name: str
    embedding_forward: Callable = embedding_forward
    embedding_backward: Callable = embedding_backward
    linear_forward: Callable = linear_forward
    linear_backward: Callable = linear_backward
    norms: dict = dataclasses.field(default_factory=lambda: NORMS)
    activations: dict = dataclasses.field(default_factory=lambda: ACTIVATIONS)
    rotate_forward: Callable = rotate_forward
    rotate_backward: Callable = rotate_backward
    attention_forward: Callable = attention_forward
    attention_backward: Callable = attention_backward
    cross_entropy_forward: Callable = cross_entropy_forward
    cross_entropy_backward: Callable = cross_entropy_backward

    embed_forward: Callable = embed_forward
    embed_backward: Callable = embed_backward
    attention_layer_forward: Callable = attention_layer_forward
    attention_layer_backward: Callable = attention_layer_backward
    mlp_layer_forward: Callable = mlp_layer_forward
    mlp_layer_backward: Callable = mlp_layer_backward
    head_logits: Callable = head_logits
    head_loss: Callable = head_loss

    steps: Callable = None  # decodes token by token without Python in between; None: `forward` with a cache
    make_space: Callable = None  # (cfg, B, T, dtype, recompute) -> buffers for such batches; None: needs none
    space: dict = None


OPS = {"numpy": Ops("numpy")}
OPS["fast"] = Ops(
    "fast",
    embed_forward=embed_forward_kernels,
    embed_backward=embed_backward_kernels,
    attention_layer_forward=attention_layer_forward_kernels,
    attention_layer_backward=attention_layer_backward_kernels,
    mlp_layer_forward=mlp_layer_forward_kernels,
    mlp_layer_backward=mlp_layer_backward_kernels,
    head_logits=head_logits_kernels,
    head_loss=head_loss_kernels,
    steps=Steps,
    make_space=workspace,
)
OPS["tiles"] = dataclasses.replace(  # what reads or writes no large matrix, and decoding, stay as they are
    OPS["fast"],
    name="tiles",
    attention_layer_forward=attention_layer_forward_tiles,
    attention_layer_backward=attention_layer_backward_tiles,
    mlp_layer_forward=mlp_layer_forward_tiles,
    mlp_layer_backward=mlp_layer_backward_tiles,
    head_loss=head_loss_tiles,
)


def with_buffers(ops, cfg, B, T, dtype=np.float32, recompute=False):
    """The table with buffers for micro-batches (B, T), if it works in any. With `recompute`, layers keep their inputs
    alone."""
    ops = recomputed(ops) if recompute else ops
    return dataclasses.replace(ops, space=ops.make_space(cfg, B, T, dtype, recompute)) if ops.make_space else ops


def with_forward_buffers(ops, cfg, B, T, dtype=np.float32):
    """The same for a forward that no backward follows: the layers take turns in the buffers of one."""
    if not ops.make_space:
        return ops
    space = ops.make_space(dataclasses.replace(cfg, layers=1), B, T, dtype)
    return dataclasses.replace(ops, space=space | {"layers": space["layers"] * cfg.layers})


def recomputed(ops):
    """The table whose sublayers keep their inputs alone: backward runs forward again. A third more work, less memory,
    the same bytes.   Chen et al. 2016, arXiv:1604.06174."""

    def pair(name):
        forward, backward = getattr(ops, name + "_forward"), getattr(ops, name + "_backward")

        def forward_only(x, *where):
            return forward(x, *where)[0], (x, where)

        def forward_then_backward(dy, cache, *where):
            x, arguments = cache
            return backward(dy, forward(x, *arguments)[1], *where)

        return {name + "_forward": forward_only, name + "_backward": forward_then_backward}

    return dataclasses.replace(ops, **pair("attention_layer"), **pair("mlp_layer"))


def is_compiled():
    """Whether Numba's cache has kernels of this file as it is."""
    compiled = Path(head_kernel.stats.cache_path).glob("*.head_kernel*.nbc")
    return max((path.stat().st_mtime for path in compiled), default=0) > os.path.getmtime(__file__)


FIRST_HALF = {"qkv", "attention", "attention_backward", "linear_residual", "linear_backward", "linear_norm_backward"}
FIRST_HALF |= {"weight_gradient", "panels"}


def compile_half(cfg, half):
    """Compile kernels that train such a model in float32 into Numba's cache: those of FIRST_HALF (half 0) or all others
    (half 1). Two processes take half of the time of one; nothing runs in them, before or after."""
    cfg = scaled_down(cfg)
    POOL.compiles = lambda name: (name.removesuffix("_kernel") in FIRST_HALF) == (half == 0)
    p, (_, g) = views(layout(cfg), init_parameters(cfg, 0), cfg.layers), zero_gradients(cfg)
    tokens, ops = np.zeros((2, cfg.seq_len), np.int64), with_buffers(OPS["fast"], cfg, 2, cfg.seq_len)
    loss_and_gradients(p, tokens, tokens, np.ones(tokens.shape, np.float32), g, cfg, ops)
    if half == 1:
        serve(POOL.words.ctypes.data, 1, 0, 0)  # for no time


# ######################################################################################################################
# Part III: sizes, decoding, checkpoints, checks
# ######################################################################################################################

# == 9  sizes ==========================================================================================================

LLAMA = dict(norm="rmsnorm", positions="rope", mlp="swiglu")
LLAMA |= dict.fromkeys(("qkv_bias", "out_bias", "up_bias", "down_bias"), False)
# Ours is GPT-2's with rotation and norms of queries and keys. Bits per byte of 1m after 1.2M tokens, rate 8e-3: GPT-2's
# 1.219, ALiBi 1.087, RoPE 1.075, RoPE with RMSNorm, SwiGLU and no biases 1.094, RoPE and QK-norm 1.061.
OWN = dict(vocab_size=4096, positions="rope", qk_norm=True, embedding_norm=True)
STORYLLAMAS = LLAMA | dict(vocab_size=4096, seq_len=256, up_bias=True, down_bias=True, init="gpt2")
LILLM = LLAMA | dict(vocab_size=8192, seq_len=512, heads=16, kv_heads=8, norm_eps=1e-6, init="lillm")
LLAMA2C = LLAMA | dict(vocab_size=32000, init="gpt2")
GPT_TINYSTORIES = dict(vocab_size=50257, seq_len=256, layers=8, heads=16, position_rows=2048, attention_scale=False)
GPT_TINYSTORIES |= dict(mlp="gelu", init="normal")
NEO = dict(vocab_size=50257, seq_len=512, heads=16, position_rows=2048, attention_scale=False, window=256)
NEO |= dict(qkv_bias=False, init="normal")
GRAPHCORE = dict(vocab_size=8192, seq_len=512, head_width=64, embedding_norm=True, positions="alibi", mlp="gelu")
GRAPHCORE |= dict(tied=False, head_bias=True, init="torch")

SIZES = {  # names are what their authors call them, often the rounded total of the parameters, sometimes not
    "700k": Config(**OWN, seq_len=256, width=64, layers=8, heads=4),
    "1m": Config(**OWN, seq_len=256, width=128, layers=4, heads=4),
    "8m": Config(**OWN, seq_len=512, width=256, layers=8, heads=8),
    "28m": Config(**OWN, seq_len=512, width=512, layers=8, heads=8),
    "2m": Config(**STORYLLAMAS, width=128, layers=4, heads=4, hidden=512),
    "7m": Config(**STORYLLAMAS, width=256, layers=6, heads=6, head_width=42, hidden=768),
    "30m": Config(**STORYLLAMAS, width=512, layers=8, heads=8, hidden=1536),
    "39m": Config(**LILLM, width=512, layers=12, hidden=1408),
    "300m": Config(**LILLM, width=1024, layers=24, hidden=2816),
    # Its attention ends in two products without anything between them: here their product, one matrix, and a final norm
    # that its code leaves out. With both stages it has 63,558,784 parameters; "88m" counts the tied matrix twice.
    "88m": Config(
        **LLAMA, vocab_size=50304, seq_len=512, width=512, layers=8, heads=8, kv_heads=4, head_width=128, hidden=1365,
        head_bias=True,
    ),
    "260k": Config(**LLAMA2C | dict(vocab_size=512), seq_len=512, width=64, layers=5, heads=8, kv_heads=4, hidden=172),
    "15m": Config(**LLAMA2C, seq_len=256, width=288, layers=6, heads=6, hidden=768),
    "42m": Config(**LLAMA2C, seq_len=1024, width=512, layers=8, heads=8, hidden=1376),
    "110m": Config(**LLAMA2C, seq_len=1024, width=768, layers=12, heads=12, hidden=2048),
    "17m-cs336": Config(**LLAMA, vocab_size=10000, seq_len=256, width=512, layers=4, heads=16, hidden=1344, tied=False),
    "gpt-tinystories-1m": Config(**GPT_TINYSTORIES, width=64),
    "gpt-tinystories-8m": Config(**GPT_TINYSTORIES, width=256),
    "gpt-tinystories-28m": Config(**GPT_TINYSTORIES, width=1024),
    "tinystories-1m": Config(**NEO, width=64, layers=8),
    "tinystories-8m": Config(**NEO, width=256, layers=8),
    "tinystories-28m": Config(**NEO, width=512, layers=8),
    "tinystories-33m": Config(**NEO, width=768, layers=4),
    "gpt2": Config(vocab_size=50257, seq_len=1024, width=768, layers=12, heads=12, init="gpt2"),
} | {
    f"graphcore-{width}x{layers}": Config(**GRAPHCORE, width=width, layers=layers, heads=width // 64)
    for width in (64, 128, 256, 512, 768, 1024)
    for layers in (1, 2, 4, 8, 12)
}  # fmt: skip
SOURCES = {  # of a size whose name begins like this
    "graphcore": "Graphcore's TinyStories notebook",
    "gpt-tinystories": "gpt-tinystories",
    "tinystories": "Eldan & Li 2023, arXiv:2305.07759 (GPT-Neo)",
    "gpt2": "Radford et al. 2019",
    **dict.fromkeys(("2m", "7m", "30m"), "StoryLlamas"),
    **dict.fromkeys(("39m", "300m"), "lilLM"),
    "88m": "StoryLlama",
    **dict.fromkeys(("260k", "15m", "42m", "110m"), "llama2.c"),
    "17m-cs336": "Stanford CS336, assignment 1",
}


def source_of(size):
    """Who built it."""
    return next((source for start, source in SOURCES.items() if size.startswith(start)), "this project")


def flops_per_token(cfg):
    """Floating-point operations to train on one token: 2 for each weight of a product forward, 4 backward; causal
    attention sees T/2 keys on average, in two products forward and four backward (lookups count nothing)."""
    _, _, weights = count_parameters(cfg)
    tied, T, L = cfg.vocab_size * cfg.width * cfg.tied, cfg.seq_len, cfg.layers
    keys = sum(T / 2 if not (w := layer_window(cfg, i)) or w >= T else w - w * w / (2 * T) for i in range(L))
    return round(6 * (weights + tied) + 12 * keys * cfg.heads * cfg.head_width)


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


# == 10  decoding ======================================================================================================


class Decoding:
    """One text that grows: the keys and values of the window's tokens, so that each is computed once.

    When the window is full, its newer half is run again as one block, and the text goes on without end. Within what is
    kept the logits are those of `forward` on the whole window.
    """

    def __init__(self, p, cfg, ops):
        self.p, self.cfg, self.ops = p, cfg, ops
        self.window = []
        dtype = p["embed_w"].dtype
        self.kv = np.empty((cfg.layers, 1, cfg.seq_len, 2, cfg.kv_heads, cfg.head_width), dtype)
        self.steps = ops.steps and ops.steps(p, cfg, self.kv)

    def append(self, ids):
        """Read token ids (at least one) -> what the head reads of the last (1, C); None where it is left to `steps`."""
        start, new = len(self.window), list(ids)
        if start + len(new) > self.cfg.seq_len:
            start, new = 0, (self.window + new)[-max(1, self.cfg.seq_len // 2) :]
        tokens = np.array([new], np.int64)  # (1, T)
        check_tokens(tokens, start, self.cfg)
        self.window = self.window[:start] + new
        if self.steps and len(new) == 1:
            return None
        ops = with_forward_buffers(self.ops, self.cfg, 1, len(new), self.kv.dtype)
        x, _ = forward(self.p, tokens, self.cfg, ops, (self.kv, start))
        if self.steps:
            self.steps.take(start, start + len(new))
        return x[:, -1]

    def feed(self, ids):
        """Append token ids (at least one) -> logits (V,) of what follows them."""
        x = self.append(ids)
        if self.steps:
            return self.steps.logits(self.window[-1], x, len(self.window) - 1)
        return self.ops.head_logits(x, self.p, self.cfg, self.ops)[0]

    def draw(self, ids, uniforms, stop, **filters):
        """Append token ids, draw one with each of `uniforms` and append it, with no Python in between -> ids, at least
        one, at most as many as the window takes, up to `stop`; the last is not yet appended. For a table with steps."""
        x = self.append(ids)
        last = len(self.window) - 1
        drawn = self.steps.draw(self.window[-1], x, last, uniforms[: self.cfg.seq_len - last], stop, **filters)
        self.window += drawn[:-1]
        return drawn


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


TURN = 0.01  # seconds of drawing, about, before what is drawn is shown


def generate(decoding, ids, seed, stop, max_new_tokens, **filters):
    """Yield ids that follow `ids` (at least one), until `stop` (not yielded) or max_new_tokens; `filters` as above.

    Tokens come in turns of about TURN seconds from a `decoding` that has steps: it may be ahead of what was yielded.
    """
    rng, count, uniforms = np.random.Generator(np.random.Philox(key=[seed, 1])), 1, np.empty(0)
    steps = getattr(decoding, "steps", None)
    while max_new_tokens > 0:
        start, count = time.perf_counter(), min(count, max_new_tokens) if steps else 1
        uniforms = np.append(uniforms, rng.random(max(0, count - len(uniforms))))
        if steps:
            drawn = decoding.draw(ids, uniforms[:count], stop, **filters)
        else:
            cumulative = np.cumsum(probabilities(decoding.feed(ids), **filters))
            drawn = [int(np.searchsorted(cumulative, uniforms[0] * cumulative[-1], side="right"))]
        count = 2 * count if time.perf_counter() - start < TURN / 2 else max(1, count // 2)
        for token in drawn:
            if token == stop:
                return
            yield token
        ids, uniforms, max_new_tokens = drawn[-1:], uniforms[len(drawn) :], max_new_tokens - len(drawn)


# == 11  checkpoints ===================================================================================================
#
# A `.safetensors` file: the length of a JSON header (8 bytes, little-endian), the header, the tensors without gaps.
# https://github.com/huggingface/safetensors#format. Parameters stand under the names of `layout`, in its order; the
# header's metadata (strings) holds the configuration, the whole tokenizer, and a CRC-32 of the header and all tensors:
# it finds any damage of up to four bytes in a row, at 1.9 GB/s where SHA-256 has 1.0. It is no proof against malice.

FORMAT, FORMAT_VERSION = "tinygpt", "1"
DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
HEADER_MOST = 100_000_000  # bytes; the limit of the safetensors library as well


def lock_file(file):
    """Lock an open file until it is closed or its process ends, however it ends. False if another process has locked
    it; OSError where the file system has no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file.fileno(), 2**30, os.SEEK_SET)  # a byte that nobody reads: Windows locks it for readers, too
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def open_aside(path):
    """A new file beside `path`, open for writing: its name is its own, its lock says that its process lives. Removes
    the files of processes that were killed; Windows keeps them."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp") if os.name == "posix" else ():
        with contextlib.suppress(OSError), open(left, "r+b") as file:
            if lock_file(file):
                os.remove(left)
    while True:
        aside = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
        try:
            file = open(aside, "xb")
            try:
                if lock_file(file) and os.path.exists(aside):  # else another process just took it for a leftover
                    return file
            except OSError:  # no locks: nobody removes leftovers
                return file
        except BaseException:  # Ctrl-C between here and there
            with contextlib.suppress(OSError):
                os.remove(aside)
            raise
        file.close()


def write_aside(path, chunks):
    """Write byte chunks to `path` so that it holds all of them or is as it was: written aside, flushed, renamed. Of
    processes that write one path at once, the last one to finish wins. OSError, which names `path`, if it cannot."""
    path, aside = Path(path), None
    try:
        with open_aside(path) as file:
            aside = file.name
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # an open file cannot be renamed there; elsewhere it stays locked until it is
                file.close()
            os.replace(aside, path)
        if os.name == "posix":  # the folder's entry as well
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        if aside:
            with contextlib.suppress(OSError):
                os.remove(aside)  # a full disk is not kept full
        if isinstance(error, OSError) and error.strerror and str(error.filename or path).startswith(str(path)):
            error.filename = str(path)
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
    data = [memoryview(np.ascontiguousarray(x)).cast("B") for x in tensors.values()]
    text = json.dumps(header | {"__metadata__": metadata | {"crc32": checksum(header, data)}}).encode()
    text += b" " * (-len(text) % 8)
    write_aside(path, (struct.pack("<Q", len(text)), text, *data))


def parse_header(text, dtypes):
    """The JSON text of a header -> (header, [(name, dtype, shape, begin, end)]); TypeError if it is not one."""
    try:
        header = json.loads(text)
        metadata = header.get("__metadata__", {})
        tensors = [(name, t) for name, t in header.items() if name != "__metadata__"]
        rows = [(name, dtypes[t["dtype"]], tuple(t["shape"]), *t["data_offsets"]) for name, t in tensors]
        whole = all(type(n) is int and 0 <= n < 2**48 for row in rows for n in (*row[2], *row[3:]))
        fits = whole and all(len(t) == 3 and len(row) == 5 and len(row[2]) <= 8 for row, (_, t) in zip(rows, tensors))
        if not fits or not all(type(text) is str for text in metadata.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise TypeError from None
    return header, sorted(rows, key=lambda row: row[3:])


def read_safetensors(path, dtypes=DTYPES):
    """(tensors, metadata) as given to `write_safetensors`. ValueError for anything else: of a header that does not fit
    the file before a tensor is read, of other bytes than were written where there is a checksum."""

    def refuse(what):
        raise ValueError(f"{path} is not a checkpoint that can be read: {what}")

    with open(path, "rb") as f:
        size, head = os.fstat(f.fileno()).st_size, f.read(8)
        if len(head) < 8:
            refuse(f"it has {size} bytes")
        start = 8 + struct.unpack("<Q", head)[0]
        if start > min(size, HEADER_MOST):
            refuse(f"it is cut short or of another format (its header claims {start} bytes, the file has {size})")
        try:
            header, rows = parse_header(f.read(start - 8), dtypes)
        except TypeError:
            refuse(f"its header is not that of a .safetensors file with tensors of {', '.join(dtypes)}")
        expected = 0
        for name, dtype, shape, begin, end in rows:
            if begin != expected:
                refuse(f"tensor {name!r:.60} starts at byte {begin}; expected {expected}")
            expected = begin + math.prod(shape) * dtype.itemsize
            if end != expected or start + end > size:
                refuse(f"it is cut short (tensor {name!r:.60} ends at byte {start + expected}, the file at {size})")
        if start + expected != size:
            refuse(f"{size - start - expected} bytes follow its last tensor")
        data = f.read(expected)
    metadata = header.get("__metadata__", {})
    written = metadata.pop("crc32", None)  # files of other writers have none
    if written and written != (found := checksum(header, [data])):
        refuse(f"it is damaged: its checksum is {found}, expected {written[:8]!r}; take an earlier one or a copy")
    at = {name: (dtype, math.prod(shape), begin) for name, dtype, shape, begin, _ in rows}
    tensors = {name: np.frombuffer(data, *at[name]).reshape(shape) for name, _, shape, _, _ in rows}
    return tensors, metadata


def read_metadata(path):
    """The metadata of a checkpoint that was written here, without its tensors."""
    with open(path, "rb") as f:
        return json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))["__metadata__"]


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


def read_llama2c(path):
    """A `Checkpoint` without a tokenizer from a model file of llama2.c, version 0; None if the file is not one.

    Seven int32, C F L H G V T (V negative: the head has a matrix of its own), then float32 tensors, (out, in).
    https://github.com/karpathy/llama2.c
    """
    with open(path, "rb") as f:
        size, head = os.fstat(f.fileno()).st_size, f.read(28)
    if len(head) < 28:
        return None
    C, F, L, H, G, V, T = struct.unpack("<7i", head)
    if min(C, F, L, H, G, abs(V), T) < 1 or max(C, F, L, H, G, abs(V), T) >= 2**24 or C % H or C // H % 2 or H % G:
        return None
    D, tied, V = C // H, V > 0, abs(V)
    shapes = {"embed_w": (V, C), "norm1_w": (L, C), "q": (L, C, C), "k": (L, G * D, C), "v": (L, G * D, C)}
    shapes |= {"out_w": (L, C, C), "norm2_w": (L, C), "gate": (L, F, C), "down_w": (L, C, F), "value": (L, F, C)}
    shapes |= {"norm_w": (C,), "cos": (T, D // 2), "sin": (T, D // 2)} | ({} if tied else {"head_w": (V, C)})
    if size != 28 + 4 * sum(map(math.prod, shapes.values())):
        return None
    data, x, offset = Path(path).read_bytes(), {}, 28
    for name, shape in shapes.items():
        x[name] = np.frombuffer(data, "<f4", math.prod(shape), offset).reshape(shape)
        offset += x[name].nbytes
    for name in ("q", "k", "v", "out_w", "gate", "down_w", "value"):
        x[name] = x[name].swapaxes(1, 2)  # (L, in, out)
    x |= {"qkv_w": np.concatenate([x["q"], x["k"], x["v"]], 2), "up_w": np.concatenate([x["gate"], x["value"]], 2)}
    cfg = Config(**LLAMA, vocab_size=V, seq_len=T, width=C, layers=L, heads=H, kv_heads=G, hidden=F, tied=tied)
    parts = [x[t.name].reshape(-1) for t in layout(cfg)]
    return Checkpoint(np.concatenate(parts), cfg, "", {}, {"format": "llama2.c", "version": "0"})


def read_checkpoint(path):
    """A `Checkpoint` from a file that `save_checkpoint` wrote, NaN and infinity included; ValueError for any other."""
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT or metadata.get("version") != FORMAT_VERSION:
        found, version = (" ".join(str(metadata.get(name)).split())[:40] for name in ("format", "version"))
        newer = "; a later version of this program wrote it, so update" if found == FORMAT else ""
        expected = f"expected format {FORMAT}, version {FORMAT_VERSION}{newer}"
        raise ValueError(f"{path} has format {found}, version {version}; {expected}")
    count = sum(x.size for x in tensors.values())
    try:
        shape = json.loads(metadata["config"])
        if max(shape["width"], shape["heads"]) > count:  # Config would long look for a divisor
            raise ValueError(f"width {shape['width']:.3g}, heads {shape['heads']:.3g} of {count} parameters")
        cfg = Config(**shape)
        tokenizer = metadata["tokenizer"]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} does not describe its model: {error!s:.200}") from None
    parts, dtype = [], None
    for t in layout(cfg):
        x = tensors.pop(t.name, None)
        if x is None or x.shape != t.shape or x.dtype != (dtype := dtype or x.dtype):
            found = "missing" if x is None else f"{x.dtype} {x.shape}"
            raise ValueError(f"{path}: tensor {t.name} is {found}; expected {dtype or 'float32'} {t.shape}")
        parts.append(x.reshape(-1))
    return Checkpoint(np.concatenate(parts), cfg, tokenizer, tensors, metadata)


def first_non_finite(parameters, cfg, extra=None):
    """The name of the first tensor, of the model or of `extra`, that holds NaN or infinity; None if all are finite."""
    named = {t.name: parameters[t.offset : t.offset + math.prod(t.shape)] for t in layout(cfg)} | (extra or {})
    return next((name for name, x in named.items() if not np.isfinite(x).all()), None)


def load_checkpoint(path):
    """A `Checkpoint`, ours or of llama2.c. ValueError if the file is not one or holds a number that is not finite,
    OSError if it cannot be read."""
    checkpoint = read_llama2c(path) or read_checkpoint(path)
    if bad := first_non_finite(checkpoint.parameters, checkpoint.cfg, checkpoint.extra):
        raise ValueError(f"{path}: tensor {bad} holds NaN or infinity; take an earlier checkpoint, or train again")
    return checkpoint


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
    weights, dropout = rng.uniform(0.5, 1.5, (B, cfg.seq_len)), Dropout(seed, 0, 0)

    def loss(g=None):
        return loss_and_gradients(p, tokens[:, :-1], tokens[:, 1:], weights, g, cfg, ops, dropout=dropout)[0]

    loss(grads)
    add_lookup_gradient(grads)
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


def scaled_down(cfg):
    """The same architecture with axes short enough for finite differences, of as many lengths as it allows."""
    G = 1 if cfg.kv_heads == 1 else 2 if cfg.heads & (cfg.heads - 1) == 0 else 3  # 3: ALiBi at no power of two
    H, D = G * (cfg.heads // cfg.kv_heads), 4
    C = H * D + (0 if cfg.heads * cfg.head_width == cfg.width else 4)
    shape = dict(vocab_size=11, seq_len=5, width=C, layers=2, heads=H, kv_heads=G, head_width=D, hidden=7)
    return dataclasses.replace(cfg, **shape, position_rows=6, window=2 if cfg.window else 0)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prove the model's gradients.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="every gradient of the model against finite differences, in float64")
    check.add_argument("--size", default="1m", metavar="SIZE", help="of which architecture (default 1m), scaled down")
    check.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="and these changes")
    here = [name for name in OPS if name != "tiles" or Path(__file__).with_name("tiles.py").exists()]
    check.add_argument("--kernels", nargs="+", choices=list(OPS), default=here, help="of these (default all)")
    check.add_argument("--seed", type=int, default=0, help="of the random parameters, tokens and directions")
    args = parser.parse_args(argv)
    try:
        if args.size not in SIZES:
            raise ValueError(f"--size {args.size}: expected one of {', '.join(SIZES)}")
        cfg, limit = scaled_down(SIZES[args.size]).changed(**overrides(args.set)), 1e-6
    except ValueError as error:
        parser.error(str(error))
    try:
        tables = {name: dict(check_model(cfg, OPS[name], args.seed)) for name in args.kernels}
    except ValueError as error:
        parser.error(str(error))
    print(f"relative error of each gradient in float64, limit {limit:.0e}; {cfg}")
    print(f"{'tensor':12s}" + "".join(f"{name:>12s}" for name in tables))
    for t in layout(cfg):
        print(f"{t.name:12s}" + "".join(f"{table[t.name]:12.1e}" for table in tables.values()))
    worst = max(max(table.values()) for table in tables.values())
    print(f"worst {worst:.1e}: {'passed' if worst < limit else 'FAILED'}")
    return 0 if worst < limit else 1


if __name__ == "__main__":
    sys.exit(main())
