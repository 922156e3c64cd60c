"""The head: `head_loss` and `head_logits` of section 3, that is norm, logits and cross-entropy with their gradients.

It replaces `cross_entropy_kernel` of tinygpt.py, section 8, and the products around it.

- The logits of a block of rows are never written to a buffer of all rows: softmax, loss and the way back to dx follow
  while they are in the cache.
- Rows stand side by side, so that the softmax runs in whole vectors and no operand is copied.
- dlogits is never formed: its two factors go into the gradient of the matrix.

What each gained was not recorded. Order: `head_kernel`, `head_gradient_kernel`, then `head_loss_fast`.
"""

import math

import numpy as np

from fast.panels import pack_operand, panels_of, product_of_panels
from fast.products import BUFFER_SIZE, TILE_ROWS, product, provide_product, transpose_rows
from fast.rows import NO_NORM, exp, norm_rows, norm_rows_backward
from fast.threads import POOL, kernel
from fast.workspace import (
    BF16_VOCABULARY_BLOCK,
    HEAD_BLOCK,
    NO_DRIVERS,
    VOCABULARY_BLOCK,
    add_sums,
    block_rows,
    blocks,
    carve,
    head_scratch,
    norm_of,
    packed_length,
    space_of,
    thread_scratch,
    uses_bf16,
    whole_vectors,
    work_of,
)
from tinygpt import NORMS

PACK_ROWS_OF_HEAD = 256  # rows of head_w that a task packs
LOGITS_BLOCK = 960  # rows of head_w that a task of `head_logits_fast` multiplies


@kernel
def pack_head_kernel(task, slot, w, left, work):
    """left (blocks, V, TILE_ROWS): the columns of w (V, C) in strips that a register tile reads from one end to the
    other; or (1, V', C'): w packed by the driver as a left operand."""
    first, last, C = PACK_ROWS_OF_HEAD * task, min(PACK_ROWS_OF_HEAD * (task + 1), len(w)), w.shape[1]
    (_, driver), _ = thread_scratch(work, slot)
    if pack_operand(w[first:last], False, True, left[0, first:last], 0, driver):
        return
    for v in range(first, last):
        row = w[v]
        for i in range(len(left)):
            for r in range(TILE_ROWS):
                c = i * TILE_ROWS + r
                left[i, v, r] = row[c] if c < C else w.dtype.type(0)


@kernel
def head_kernel(task, slot, earlier, x, norm, head, batch, T, backward, outputs, work):
    """Block earlier + task of HEAD_BLOCK rows: norm, logits, cross-entropy, and backward to dx (N, C) if `backward`.

    head = (w (V, C), b, left, right): `left` of `pack_head_kernel`; `right` is w by panels, empty in float32, where
    w itself is read. batch = (targets, weights) (N,). outputs = (exp_logits, row_scale, nats, dx, n, sums).

    Rows are the columns of exp_logits (blocks, V, HEAD_BLOCK): e = exp(logits - top), p = e / total.
    With row_scale = weight / total, dlogits = row_scale (e - total onehot): exp_logits, where total is subtracted, and
    n (N, C), which is scaled, keep the two factors for the gradient of w. Fills row_scale and nats (N,), dx (N, C),
    sums (blocks, 2, C).
    """
    (kind, norm_w, norm_b, eps), (w, b, left, right), (targets, weights) = norm, head, batch
    exp_logits, row_scale, nats, dx, n, sums = outputs
    start, stop = block_rows(earlier + task, T, HEAD_BLOCK)
    (rows, C), V, width, block = (stop - start, x.shape[1]), len(w), whole_vectors(stop - start), exp_logits[task]
    panel, room = thread_scratch(work, slot)
    shapes, packed = head_scratch(rows, C, width), len(right) > 0
    stats, after_stats = carve(room, shapes[0])
    n_T, after_n = carve(after_stats, shapes[1])
    dn_T, _ = carve(after_n, shapes[2])
    dn, _ = carve(after_stats, (rows, C))  # in the memory of n_T, which is last read for the last logits
    mean, rstd, top, total = stats[0], stats[1], stats[2], stats[3]
    at_once = BF16_VOCABULARY_BLOCK if packed else VOCABULARY_BLOCK
    norm_rows(kind, x[start:stop], norm_w, norm_b, eps, mean, rstd, n[start:stop])
    transpose_rows(n[start:stop], n_T)
    for t in range(width):
        top[t], total[t] = -np.inf, 0
    for first in range(0, V, at_once):
        last = min(first + at_once, V)
        if packed:
            product(left[0, first:last, :C], n_T, block[first:last, :width], False, panel)
        else:
            product(w[first:last], n_T, block[first:last, :width], False, panel)
        for v in range(first, last):
            row = exp_logits[task, v, :width]
            if b.size > 0:
                for t in range(width):
                    row[t] += b[v]
            for t in range(width):
                top[t] = row[t] if row[t] > top[t] else top[t]
    for t in range(rows):
        nats[start + t] = top[t] - block[targets[start + t], t]
    for first in range(0, V, at_once):
        last = min(first + at_once, V)
        for v in range(first, last):
            row = exp_logits[task, v, :width]
            for t in range(width):
                e = exp(row[t] - top[t])
                row[t] = e
                total[t] += e
        if backward and packed:  # dn = exp_logits^T w
            product_of_panels(block[first:last, :rows].T, right[:, first:last], dn, first > 0, panel)
        elif backward:  # dn^T = w^T exp_logits, of what is still in the first-level cache
            for i in range(len(left)):
                strip = dn_T[i * TILE_ROWS : (i + 1) * TILE_ROWS]
                product(left[i, first:last].T, block[first:last, :width], strip, first > 0, panel)
    for t in range(rows):
        nats[start + t] += math.log(total[t])
    if backward:
        if not packed:
            transpose_rows(dn_T[:C, :rows], dn)
        for t in range(rows):
            weight, target, row, w_row = weights[start + t], targets[start + t], dn[t], w[targets[start + t]]
            scale = weight / total[t]
            for c in range(C):
                row[c] = scale * row[c] - weight * w_row[c]
                dx[start + t, c] = 0
            block[target, t] -= total[t]
            row_scale[start + t] = scale
        dx_rows, dw_db = dx[start:stop], sums[earlier + task]
        norm_rows_backward(kind, dn, x[start:stop], norm_w, norm_b, mean, rstd, dx_rows, n[start:stop], dw_db)
        for t in range(rows):
            row = n[start + t]
            for c in range(C):
                row[c] *= row_scale[start + t]


@kernel
def head_gradient_kernel(task, slot, at_once, earlier, count, T, exp_logits, row_scale, n, dw, db, work):
    """dw (V, C) += dlogits^T n of `count` blocks, `at_once` rows a task; db (V,) += sum_n dlogits."""
    first, last, (panel, _) = at_once * task, min(at_once * (task + 1), len(dw)), thread_scratch(work, slot)
    for block in range(count):
        start, stop = block_rows(earlier + block, T, HEAD_BLOCK)
        product(exp_logits[block, first:last, : stop - start], n[start:stop], dw[first:last], True, panel)
        if db.size > 0:
            scale = row_scale[start:stop]
            for v in range(first, last):
                row, total = exp_logits[block, v], db.dtype.type(0)
                for t in range(scale.size):
                    total += row[t] * scale[t]
                db[v] += total


@kernel
def head_logits_kernel(task, slot, n_T, w, logits_T, work):
    """logits_T (V, N) = w (V, C) n_T (C, N), LOGITS_BLOCK rows a task."""
    first, last, (panel, _) = LOGITS_BLOCK * task, LOGITS_BLOCK * (task + 1), thread_scratch(work, slot)
    product(w[first:last], n_T, logits_T[first:last], False, panel)


def head_logits_fast(x, p, cfg, ops):
    n = NORMS[cfg.norm][0](x, p["norm_w"], p["norm_b"], cfg.norm_eps)[0] if cfg.final_norm else x  # a row or a few
    logits_T = np.empty((cfg.vocab_size, len(x)), x.dtype)
    provide_product(x.dtype.name)
    work = np.empty((POOL.threads, BUFFER_SIZE), x.dtype), NO_DRIVERS  # float32, whatever the dtype of products
    tasks, w = blocks(cfg.vocab_size, LOGITS_BLOCK), p["embed_w" if cfg.tied else "head_w"]
    POOL.run(head_logits_kernel, tasks, np.ascontiguousarray(n.T), w, logits_T, work)
    return logits_T.T if p["head_b"] is None else logits_T.T + p["head_b"]


def head_loss_fast(x, targets, weights, p, g, cfg, ops):
    (B, T, C), V, name = x.shape, cfg.vocab_size, "embed_w" if cfg.tied else "head_w"
    s = space_of(ops, cfg, B, T, x.dtype)
    x_NC, dx, n, nats = np.ascontiguousarray(x).reshape(-1, C), s["dx"][1], s["n"].reshape(-1, C), s["nats"]
    w, sums, work, nothing = p[name], s["head_sums"], work_of(s), np.empty(0, x.dtype)
    packed = uses_bf16(work)
    shape = (1, packed_length(V), packed_length(C)) if packed else (blocks(C, TILE_ROWS), V, TILE_ROWS)
    left = s["panels"][: math.prod(shape)].reshape(shape)
    right = panels_of(w, s, first=left.size) if packed else np.empty((0, 0, 0), x.dtype)
    POOL.run(pack_head_kernel, blocks(V, PACK_ROWS_OF_HEAD), w, left, work)
    flat_targets = np.ascontiguousarray(targets, np.int64).reshape(-1)
    batch = (flat_targets, np.ascontiguousarray(weights, x.dtype).reshape(-1))
    head = (w, nothing if p["head_b"] is None else p["head_b"], left, right)
    norm = norm_of(p, "norm", cfg, None if cfg.final_norm else NO_NORM)
    exp_logits, row_scale = s["exp_logits"], s["row_scale"].reshape(-1)
    outputs = (exp_logits, row_scale, nats.reshape(-1), dx.reshape(-1, C), n, sums)
    for first in range(0, len(sums), len(exp_logits)):
        count = min(len(exp_logits), len(sums) - first)
        POOL.run(head_kernel, count, first, x_NC, norm, head, batch, T, g is not None, outputs, work)
        if g is not None:
            gradients = (g[name], nothing if g["head_b"] is None else g["head_b"])
            at_once = BF16_VOCABULARY_BLOCK if packed else 2 * VOCABULARY_BLOCK
            inputs = (at_once, first, count, T, exp_logits, row_scale, n)
            POOL.run(head_gradient_kernel, blocks(V, at_once), *inputs, *gradients, work)
    if g is not None:
        add_sums(sums, g["norm_w"], g["norm_b"])
    return float((weights * nats).sum()), nats, None if g is None else dx
