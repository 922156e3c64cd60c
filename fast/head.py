"""The head: `head_loss` and `head_logits` of section 3, that is norm, logits and cross-entropy with their gradients.

The idea: the logits of a block of rows are never written to a buffer of all rows: softmax, loss and the way back to dx
follow while they are in the cache. Order: `head_kernel`, `head_gradient_kernel`, then `head_loss_kernels`.
"""

import math

import numpy as np

from fast.panels import pack_operand, panels_of, product_of_panels
from fast.products import BUFFER_SIZE, TILE_ROWS, product, provide_product, transpose_rows
from fast.rows import NO_NORM, exp, norm_rows, norm_rows_backward
from fast.threads import POOL, kernel
from fast.workspace import (
    BF16_HEAD_WORDS,
    HEAD_BLOCK,
    HEAD_WORDS,
    NO_DRIVERS,
    add_sums,
    block_rows,
    blocks,
    norm_of,
    packed_length,
    space_of,
    thread_scratch,
    uses_bf16,
    whole_vectors,
    work_of,
)
from tinygpt import NORMS


@kernel
def head_tiles_kernel(task, slot, head_w, tiles, work):
    """tiles (blocks, V, TILE_ROWS) = the columns of head_w (V, C), as a register tile reads them; or (1, V', C') =
    head_w, where others make products, as it stands on the left of theirs. 256 rows a task."""
    first, last, C = 256 * task, min(256 * task + 256, len(head_w)), head_w.shape[1]
    (_, driver), _ = thread_scratch(work, slot)
    if pack_operand(head_w[first:last], False, True, tiles[0, first:last], 0, driver):
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
    odds, shares, nats, dx, n, sums, work,
):  # fmt: skip
    """Block earlier + task of HEAD_BLOCK rows: norm, logits, cross-entropy, and backward to dx (N, C) if `backward`.
    tiles and panels are head_w (V, C) packed for the left and the right of a product; or no panels, and tiles of it.

    Rows stand side by side, in columns of odds (blocks, V, HEAD_BLOCK): o = e^(logits - top) = p total. With share =
    weight / total, dlogits = share (o - total onehot): odds and n (N, C) keep the two factors for the gradient of
    head_w. Fills shares and nats (N,), dx (N, C), sums (blocks, 2, C).
    """
    start, stop = block_rows(earlier + task, T, HEAD_BLOCK)
    (rows, C), V, width, block = (stop - start, x.shape[1]), len(head_w), whole_vectors(stop - start), odds[task]
    panel, rest = thread_scratch(work, slot)
    stats, rest = rest[: 4 * width].reshape(4, width), rest[4 * width :]
    mean, rstd, top, total = stats[0], stats[1], stats[2], stats[3]
    n_T, dn = rest[: C * width].reshape(C, width), rest[: rows * C].reshape(rows, C)  # first the one, then the other
    packed, padded = len(panels) > 0, blocks(C, TILE_ROWS) * TILE_ROWS
    words = BF16_HEAD_WORDS if packed else HEAD_WORDS
    dn_T = rest[C * width : (C + padded) * width].reshape(padded, width)
    norm_rows(kind, x[start:stop], norm_w, norm_b, eps, mean, rstd, n[start:stop])
    transpose_rows(n[start:stop], n_T)
    for t in range(width):
        top[t], total[t] = -np.inf, 0
    for first in range(0, V, words):
        last = min(first + words, V)
        if packed:
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
        if backward and packed:  # dn = odds^T head_w
            product_of_panels(block[first:last, :rows].T, panels[:, first:last], dn, first > 0, panel)
        elif backward:  # dn^T = head_w^T odds, of what still lies in the first cache
            for i in range(len(tiles)):
                sums_of = dn_T[i * TILE_ROWS : (i + 1) * TILE_ROWS]
                product(tiles[i, first:last].T, block[first:last, :width], sums_of, first > 0, panel)
    for t in range(rows):
        nats[start + t] += math.log(total[t])
    if backward:
        if not packed:
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
def head_gradient_kernel(task, slot, words, earlier, count, T, odds, shares, n, dw, db, work):
    """dw (V, C) += dlogits^T n of `count` blocks, `words` rows a task; db (V,) += sum_n dlogits."""
    first, last, (panel, _) = words * task, min(words * (task + 1), len(dw)), thread_scratch(work, slot)
    for block in range(count):
        start, stop = block_rows(earlier + block, T, HEAD_BLOCK)
        product(odds[block, first:last, : stop - start], n[start:stop], dw[first:last], True, panel)
        if db.size > 0:
            share = shares[start:stop]
            for v in range(first, last):
                row, total = odds[block, v], db.dtype.type(0)
                for t in range(share.size):
                    total += row[t] * share[t]
                db[v] += total


@kernel
def head_logits_kernel(task, slot, n_T, head_w, logits_T, work):
    """logits_T (V, N) = head_w (V, C) n_T (C, N), 960 rows of the vocabulary a task."""
    first = task * 960
    product(head_w[first : first + 960], n_T, logits_T[first : first + 960], False, thread_scratch(work, slot)[0])


def head_logits_kernels(x, p, cfg, ops):
    n = NORMS[cfg.norm][0](x, p["norm_w"], p["norm_b"], cfg.norm_eps)[0] if cfg.final_norm else x  # a row or a few
    logits_T = np.empty((cfg.vocab_size, len(x)), x.dtype)
    provide_product(x.dtype.name)
    work = np.empty((POOL.threads, BUFFER_SIZE), x.dtype), NO_DRIVERS  # float32, whatever the dtype of products
    tasks, head_w = blocks(cfg.vocab_size, 960), p["embed_w" if cfg.tied else "head_w"]
    POOL.run(head_logits_kernel, tasks, np.ascontiguousarray(n.T), head_w, logits_T, work)
    return logits_T.T if p["head_b"] is None else logits_T.T + p["head_b"]


def head_loss_kernels(x, targets, weights, p, g, cfg, ops):
    (B, T, C), V, name = x.shape, cfg.vocab_size, "embed_w" if cfg.tied else "head_w"
    s = space_of(ops, cfg, B, T, x.dtype)
    x_NC, dx, n, nats = np.ascontiguousarray(x).reshape(-1, C), s["dx"][1], s["n"].reshape(-1, C), s["nats"]
    head_w, sums, work, nothing = p[name], s["head_sums"], work_of(s), np.empty(0, x.dtype)
    packed = uses_bf16(work)
    shape = (1, packed_length(V), packed_length(C)) if packed else (blocks(C, TILE_ROWS), V, TILE_ROWS)
    tiles = s["panels"][: math.prod(shape)].reshape(shape)
    panels = panels_of(head_w, s, first=tiles.size) if packed else np.empty((0, 0, 0), x.dtype)
    POOL.run(head_tiles_kernel, blocks(V, 256), head_w, tiles, work)
    flat_targets = np.ascontiguousarray(targets, np.int64).reshape(-1)
    flat_weights = np.ascontiguousarray(weights, x.dtype).reshape(-1)
    head = (head_w, nothing if p["head_b"] is None else p["head_b"], tiles, panels)
    norm = norm_of(p, "norm", cfg, None if cfg.final_norm else NO_NORM)
    odds, shares = s["odds"], s["shares"].reshape(-1)
    outputs = (odds, shares, nats.reshape(-1), dx.reshape(-1, C), n, sums, work)
    for first in range(0, len(sums), len(odds)):
        count = min(len(odds), len(sums) - first)
        inputs = (first, x_NC, *norm, *head, flat_targets, flat_weights, T, g is not None)
        POOL.run(head_kernel, count, *inputs, *outputs)
        if g is not None:
            gradients = (g[name], nothing if g["head_b"] is None else g["head_b"])
            words = BF16_HEAD_WORDS if packed else 2 * HEAD_WORDS
            inputs = (words, first, count, T, odds, shares, n)
            POOL.run(head_gradient_kernel, blocks(V, words), *inputs, *gradients, work)
    if g is not None:
        add_sums(sums, g["norm_w"], g["norm_b"])
    return float((weights * nats).sum()), nats, None if g is None else dx
