"""The embedding sublayer: `embed_forward` and `embed_backward` of section 3.

It replaces `embedding_backward_numba` of tinygpt.py, section 8. Forward, a task is a sequence. Backward, a task owns
some columns of the table and adds all rows in order: repeated tokens need neither atomics nor an order that depends on
threads. What that gains was not measured. Order: kernels, then the two sublayers.
"""

import numpy as np

from fast.rows import drop_row, norm_rows, norm_rows_backward
from fast.threads import POOL, kernel
from fast.workspace import ROW_BLOCK, add_sums, block_rows, blocks, mask_of, norm_of, space_of
from tinygpt import EMBED_SITE


@kernel
def embed_kernel(task, slot, tokens, w, positions, x):
    """x (B, T, C) = w[tokens] + positions (T, C), which has no rows if there are none."""
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
def drop_kernel(task, slot, x, T, mask, y):
    """y (N, C) = x times its mask."""
    (start, stop), (keys, threshold, keep) = block_rows(task, T, ROW_BLOCK), mask
    for i in range(start, stop):
        row = y[i]
        for c in range(row.size):
            row[c] = x[i, c]
        drop_row(row, 0, keys[i // T], i % T, threshold, row.dtype.type(keep))


@kernel
def norm_kernel(task, slot, x, norm, T, stats, y):
    """y (N, C) = norm(x), stats (2, N) = mean, rstd."""
    (start, stop), (kind, w, b, eps) = block_rows(task, T, ROW_BLOCK), norm
    norm_rows(kind, x[start:stop], w, b, eps, stats[0, start:stop], stats[1, start:stop], y[start:stop])


@kernel
def norm_backward_kernel(task, slot, dy, x, norm, T, stats, dx, n, sums):
    """dx (N, C) = norm_backward(dy), n = norm(x) again, sums (tasks, 2, C) of the gradients of gain and bias."""
    (start, stop), (kind, w, b, _) = block_rows(task, T, ROW_BLOCK), norm
    for i in range(start, stop):
        for c in range(x.shape[1]):
            dx[i, c] = 0
    mean, rstd = stats[0, start:stop], stats[1, start:stop]
    rows = (dx[start:stop], n[start:stop], sums[task])
    norm_rows_backward(kind, dy[start:stop], x[start:stop], w, b, mean, rstd, *rows)


def embed_forward_fast(tokens, p, cfg, ops, start=0, dropout=None):
    (B, T), C, dtype = tokens.shape, cfg.width, p["embed_w"].dtype
    s, count = space_of(ops, cfg, B, T, dtype), B * blocks(T, ROW_BLOCK)
    positions = np.empty((0, C), dtype) if p["position_w"] is None else p["position_w"][start : start + T]
    x = s["looked_up" if cfg.embedding_norm else "embedded"]
    tokens = np.ascontiguousarray(tokens, np.int64)
    POOL.run(embed_kernel, B, tokens, p["embed_w"], positions, x)
    if cfg.embedding_norm:
        rows, y = (a.reshape(-1, C) for a in (x, s["embedded"]))
        POOL.run(norm_kernel, count, rows, norm_of(p, "embed_norm", cfg), T, s["embedded_norm"].reshape(2, -1), y)
    mask = mask_of(dropout, EMBED_SITE, cfg.embed_dropout, B)
    if mask[1]:
        rows = s["embedded"].reshape(-1, C)
        POOL.run(drop_kernel, count, rows, T, mask, rows)
    return s["embedded"], (tokens, mask, p, s)


def embed_backward_fast(dx, cache, g, cfg, ops):
    tokens, mask, p, s = cache
    (T, C), count = dx.shape[1:], len(tokens) * blocks(tokens.shape[1], ROW_BLOCK)
    dx_NC = np.ascontiguousarray(dx).reshape(-1, C)
    if mask[1]:
        kept = s["kept"].reshape(-1, C)
        POOL.run(drop_kernel, count, dx_NC, T, mask, kept)
        dx_NC = kept
    if cfg.embedding_norm:
        x, y, n = (a.reshape(-1, C) for a in (s["looked_up"], s["dx"][0], s["n"]))
        tail = (T, s["embedded_norm"].reshape(2, -1), y, n, s["sums"])
        POOL.run(norm_backward_kernel, count, dx_NC, x, norm_of(p, "embed_norm", cfg), *tail)
        add_sums(s["sums"], g["embed_norm_w"], g["embed_norm_b"])
        dx_NC = y
    positions = np.empty((0, C), dx.dtype) if g["position_w"] is None else g["position_w"][:T]
    POOL.run(embed_backward_kernel, blocks(C, 32), tokens, dx_NC.reshape(dx.shape), g["lookup_w"], positions)
