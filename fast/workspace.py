"""The buffers of the sublayers, and what all sublayers need of parameters and buffers.

It computes nothing of the specification. Tier 2 allocates each array when it needs it; here, all that a training step
writes is in one buffer that is laid out once, and what a thread works in is as small as a core's cache. What that gains
was not measured by itself. Order: sizes of blocks, scratch of a thread, `workspace_layout`, helpers.

Each sublayer of this package is named `..._fast` after the function of section 3 whose contract it keeps. It computes
in the buffers of `ops.space`; without them it makes its own.
"""

import dataclasses
import functools
import math

import numpy as np

from fast.jit import inlined
from fast.products import BUFFER_SIZE, DEPTH, TILE_ROWS, provide_product
from fast.rows import KERNEL_NORMS
from fast.threads import POOL, kernel
from tinygpt import CACHE_LINE, Tensor, aligned, views

ROW_BLOCK = 16 * TILE_ROWS  # rows of one sequence that a task carries through a sublayer
SCORE_BLOCK = 64  # queries whose scores are in a thread's cache at a time
HEAD_BLOCK = 64  # rows whose logits a thread computes at a time
HEAD_BLOCKS = 8  # whose logits exist at a time; one a thread, if there are more threads
VOCABULARY_BLOCK = DEPTH // TILE_ROWS * TILE_ROWS  # tokens whose logits are worked on while they are in a cache
BF16_VOCABULARY_BLOCK = 1024  # the same with bf16 products, where packing takes the time
LOOP = 64  # elements that a vectorised loop does at a time: the remainder of a row is slow
GRADIENT_HEIGHT, GRADIENT_WIDTH = 132, 256  # of the largest block of a weight gradient
HIDDEN_BLOCK = 512  # columns of the MLP's hidden layer that exist at a time outside `space`
PACK_BLOCK = 64  # columns that a task packs for bf16.py; rows and columns of packed matrices are multiples of it
NO_DRIVERS = np.zeros((0, 1), np.int64)  # products are in float32


def packed_length(n):
    """Rows or columns of a packed matrix that holds n."""
    return blocks(n, PACK_BLOCK) * PACK_BLOCK


@inlined
def blocks(T, size):
    """Blocks of `size` that hold T."""
    return -(-T // size)


@inlined
def whole_vectors(count):
    """Columns that hold `count`, a multiple of 16."""
    return (count + 15) // 16 * 16


@inlined
def block_rows(task, T, size):
    """First and last + 1 row of a task: blocks of `size` rows that never cross from one sequence into the next."""
    per_sequence = (T + size - 1) // size
    sequence, block = task // per_sequence, task % per_sequence
    start = sequence * T + block * size
    return start, min(start + size, (sequence + 1) * T)


# == scratch: what a thread works in ===================================================================================
#
# Behind the buffer of `product`, a thread's scratch is cut into arrays of two axes, one after another. The
# functions here state their shapes, by name; kernels cut by them, and `scratch_size` takes the largest.


@inlined
def carve(room, shape):
    """Cut an array of this shape off the beginning of room (size,) -> (array, what is left of room). Where room ends
    before the array does, `reshape` fails; a `raise` here made attention's backward 3.4 times as slow."""
    rows, columns = shape
    return room[: rows * columns].reshape(rows, columns), room[rows * columns :]


@inlined
def norm_scratch(rows, C):
    n = (rows, C)
    return n


@inlined
def norm_backward_scratch(rows, C):
    dn = n = (rows, C)
    return dn, n


@inlined
def place_scratch(D, width):
    x, rstd_dot = (D, width), (2, width)
    return x, rstd_dot


@inlined
def attention_scratch(S, D, keys, width):
    v, q, top_total, p = (S, D), (D, width), (2, width), (keys, width)
    return v, q, top_total, p


@inlined
def keys_scratch(T, D):
    """Of `attention_backward_kernel`: what lasts while all queries pass; behind it, `queries_scratch`."""
    k = v = dk = dv = (T, D)
    return k, v, dk, dv


@inlined
def queries_scratch(D, width):
    """What lasts while a block of queries passes; behind it `scores_scratch`, then in its memory `place_scratch`."""
    q = do = (D, width)
    shift_mean = (2, width)
    return q, do, shift_mean


@inlined
def scores_scratch(keys, width):
    p = ds = (keys, width)
    return p, ds


@inlined
def dk_scratch(T, D):
    """After the last block of queries, in their place; behind it `place_scratch`."""
    dk_T = (D, whole_vectors(T))
    return dk_T


@inlined
def mlp_scratch(rows, C, width):
    n, a = (rows, C), (rows, width)
    return n, a


@inlined
def mlp_backward_scratch(rows, width):
    da = a = (rows, width)
    return da, a


@inlined
def gradient_scratch():
    dw = (GRADIENT_HEIGHT, GRADIENT_WIDTH)
    return dw


@inlined
def head_scratch(rows, C, width):
    """n_T is read until the last logits are computed; afterwards dn (rows, C) takes its memory."""
    mean_rstd_top_total, n_T, dn_T = (4, width), (C, width), (blocks(C, TILE_ROWS) * TILE_ROWS, width)
    return mean_rstd_top_total, n_T, dn_T


def scratch_size(cfg):
    """Elements of a thread's scratch: those of the kernel that needs most."""
    C, D, S, F = cfg.width, cfg.head_width, cfg.seq_len, min(cfg.hidden, HIDDEN_BLOCK)
    rows, queries = ROW_BLOCK, SCORE_BLOCK

    def size(*shapes):
        return sum(math.prod(shape) for shape in shapes)

    place = size(*place_scratch(D, queries))
    backward = size(*keys_scratch(S, D)) + max(
        size(*queries_scratch(D, queries)) + max(size(*scores_scratch(S, queries)), place),
        size(dk_scratch(S, D)) + size(*place_scratch(D, whole_vectors(S))),
    )
    largest = max(
        size(norm_scratch(rows, C)),
        size(*place_scratch(D, blocks(rows, LOOP) * LOOP)),
        size(*attention_scratch(S, D, S, queries)),
        backward,
        size(*norm_backward_scratch(rows, C)),
        size(*mlp_scratch(rows, C, F)),
        size(*mlp_backward_scratch(rows, F)),
        size(gradient_scratch()),
        size(*head_scratch(HEAD_BLOCK, C, HEAD_BLOCK)),
    )
    return BUFFER_SIZE + whole_vectors(largest)  # each thread's begins at a cache line


# == buffers of all threads ============================================================================================


def workspace_layout(cfg, B, T, recompute=False):
    """The kernels' buffers, a table like that of the parameters: what backward needs, layer by layer, then scratch.
    With `recompute` layers keep their sublayers' outputs only, and share the rest."""
    C, L, H, V = cfg.width, cfg.layers, cfg.heads, cfg.vocab_size
    D, F, U, Q, HD = cfg.head_width, cfg.hidden, cfg.up_width, cfg.qkv_width, cfg.heads * cfg.head_width
    wide, high = HIDDEN_BLOCK, PACK_BLOCK  # at most: what panels of K rows and M columns add to each
    mlp = max((C + high) * (U + 2 * wide) + (F + high) * (C + wide), (U + high) * (C + wide))
    attention = max((K + high) * (M + wide) for K, M in ((C, Q), (Q, C), (HD, C), (C, HD)))
    gradient = ROW_BLOCK * blocks(max(U, Q, C), GRADIENT_WIDTH) * GRADIENT_WIDTH
    head = packed_length(V) * (packed_length(C) + blocks(C, wide) * min(wide, packed_length(C)))
    panels = max(mlp, attention, gradient, head)
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
        ("exp_logits", (min(max(HEAD_BLOCKS, POOL.threads), head_tasks), V, HEAD_BLOCK), False),
        ("row_scale", (B, T), False),
        ("nats", (B, T), False),
        ("sums", (tasks, 2, C), False),
        ("qk_sums", (B * cfg.kv_heads, 2, D), False),
        ("head_sums", (head_tasks, 2, C), False),
        ("n_T", (tasks, packed_length(C), ROW_BLOCK), False),  # these three may be packed for bf16.py
        ("a_T", (tasks, packed_length(F), ROW_BLOCK), False),
        ("panels", (panels,), False),  # of the weights at work
        ("scratch", (POOL.threads, scratch_size(cfg)), False),
    ]
    table, offset = [], 0
    for name, shape, layered in rows:
        layered = layered and (not recompute or name in ("attended", "mixed"))
        shape = (L, *shape) if layered else shape
        table.append(Tensor(name, shape, offset, layered, False, 0.0, 0.0, False))
        offset += blocks(math.prod(shape), CACHE_LINE) * CACHE_LINE
    return table


def make_workspace(cfg, B, T, dtype, recompute=False, drivers=None):
    """Views of one new buffer for `workspace_layout`; each layer's dictionary also names the shared ones. "drivers"
    (threads, words) int64 holds the arguments of each thread's driver; no rows: products are in float32."""
    provide_product(np.dtype(dtype).name)
    table = workspace_layout(cfg, B, T, recompute)
    flat = aligned(table[-1].offset + math.prod(table[-1].shape), dtype)
    space = views(table, flat, cfg.layers) | {"drivers": NO_DRIVERS if drivers is None else drivers}
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


def work_of(space):
    """(scratch (threads, size), drivers): what kernels work in; ValueError if the pool has grown since it was made."""
    if len(space["scratch"]) < POOL.threads:
        made = len(space["scratch"])
        raise ValueError(f"workspace has scratch for {made} threads, the pool has {POOL.threads}; make another")
    return space["scratch"], space["drivers"]


def uses_bf16(work):
    """True if products go through the driver of bf16.py."""
    return len(work[1]) > 0


@inlined
def thread_scratch(work, slot):
    """(panel, rest) of a thread: panel = (buffer, driver) is what `product` needs, `rest` is for the kernel to use."""
    scratch, drivers = work
    driver = np.int64(drivers[slot].ctypes.data) if len(drivers) > 0 else np.int64(0)
    return (scratch[slot, :BUFFER_SIZE], driver), scratch[slot, BUFFER_SIZE:]


def space_of(ops, cfg, B, T, dtype):
    """The table's buffers; if it has none, new ones, of one layer."""
    return ops.space or ops.make_space(dataclasses.replace(cfg, layers=1), B, T, dtype)


def layer_space(ops, cfg, x, index):
    """Those of layer `index`."""
    return space_of(ops, cfg, *x.shape[:2], x.dtype)["layers"][index if ops.space else 0]


@kernel
def add_in_order_kernel(task, slot, sums, dw, db):
    """dw, db (C,) += sums (blocks, 2, C), one block after the other."""
    for i in range(sums.shape[0]):
        for c in range(dw.size):
            dw[c] += sums[i, 0, c]
            db[c] += sums[i, 1, c]
