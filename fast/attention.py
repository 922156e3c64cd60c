"""The attention sublayer: `attention_layer_forward` and `attention_layer_backward` of section 3.

The idea: no T x T matrix. Scores of 64 queries at a time stay in a core's cache, keys down and queries across, so that
each step of the softmax works on whole vectors. Order: rotation and norm of queries and keys, attention forward, the
product after it, attention backward, then the two sublayers.
"""

import functools
import math

import numpy as np
from numba.extending import intrinsic

from fast.embed import drop_kernel
from fast.jit import ordered_part, part
from fast.panels import pack_transposed, panels_of, product_of_panels, weight_gradient
from fast.products import copy_rows, product, transpose_rows
from fast.rows import add_bias, drop_row, exp, mixed, norm_rows, norm_rows_backward, set_rows
from fast.threads import POOL, kernel
from fast.workspace import (
    LOOP,
    ROW_BLOCK,
    SCORE_BLOCK,
    add_sums,
    biases,
    block_rows,
    blocks,
    constant,
    layer_space,
    mask_of,
    norm_of,
    thread_scratch,
    whole_vectors,
    work_of,
)
from tinygpt import ATTENTION_SITE, OUT_SITE, alibi_slopes, layer_window, rotation

# Queries, keys and scores are worked on with positions side by side, (D, T) and (S, T): what is done to all positions
# is done to whole vectors, sums over d or s are sums of vectors, and no row is too short.


@intrinsic
def fused(typing_context, a, b, c):
    """a b + c, rounded once."""
    return c(a, b, c), lambda context, builder, signature, args: builder.fma(*args)


@part
def turn_pair(a, b, cos, sin):
    """`rotate_forward` of one pair. Each rounding is written out: a block and a single token have the same bytes."""
    return fused(a, cos, -(b * sin)), fused(a, sin, b * cos)


@part
def turn_pair_back(da, db, cos, sin):
    """`rotate_backward` of one pair."""
    return fused(db, sin, da * cos), fused(db, cos, -(da * sin))


@ordered_part
def turn(x, position, cos, sin, half, back):
    """x (D, T), its first column at `position`: every pair of rows turned by its angles, cos and sin (D/2, S),
    or turned back; section 2.5."""
    pairs = x.shape[0] // 2
    for i in range(pairs):
        even, odd = (x[i], x[i + pairs]) if half else (x[2 * i], x[2 * i + 1])
        c, s = cos[i, position : position + even.size], sin[i, position : position + even.size]
        for t in range(even.size):
            if back:
                even[t], odd[t] = turn_pair_back(even[t], odd[t], c[t], s[t])
            else:
                even[t], odd[t] = turn_pair(even[t], odd[t], c[t], s[t])


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
    T, _, D = qkv.shape
    width = blocks(T, LOOP) * LOOP
    x, rstd = scratch[: D * width].reshape(D, width), scratch[D * width : (D + 1) * width]
    for h in range(heads[0] + heads[1]):
        transpose_rows(qkv[:, h], x)
        if len(qk) > 0:
            copy_rows(x[:, :T], qk[b, h, :, first : first + T])
            norm_columns(x, gains[0] if h < heads[0] else gains[1], eps, rstd)
        if len(cos) > 0:
            turn(x, position, cos, sin, half, False)
        transpose_rows(x[:, :T], qkv[:, h])


@part
def place_backward(dx, qk, b, h, first, gains, eps, cos, sin, half, total, scratch):
    """The same backwards, in place in dx (D, T), head h from position `first` on; adds into total (D,), the gradient of
    the gains."""
    (D, width), zero = dx.shape, dx.dtype.type(0)
    x, rstd = scratch[: D * width].reshape(D, width), scratch[D * width : (D + 1) * width]
    dot = scratch[(D + 1) * width : (D + 2) * width]
    if len(cos) > 0:
        turn(dx, first, cos, sin, half, True)
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
    stats, qkv, work,
):  # fmt: skip
    """x (N, C) -> qkv (N, H + 2 G, D) = norm(x) w + b, q and k placed, heads = H, G of them, the first row at position
    `at`; stats (2, N) = mean, rstd."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    panel, rest = thread_scratch(work, slot)
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
    task, slot, qkv, H, kv, k_at, v_at, S, scale, slopes, window, keys, threshold, keep, o, o_T, lse, work
):  # fmt: skip
    """One head of one sequence: q in qkv (B, T, heads, D), S keys in kv[:, :S, k_at + g], values in v_at + g -> o
    (B, T, H, D), o_T (blocks, H D, SCORE_BLOCK), lse (B, H, T). Section 2.4, SCORE_BLOCK queries at a time, all in
    columns: p (keys, queries), of the keys that one of them sees, o^T = v^T p."""
    (_, T, _, D), zero, one = qkv.shape, qkv.dtype.type(0), qkv.dtype.type(1)
    b, h = task // H, task % H
    g, slope = h // (H // (v_at - k_at)), slopes[h]
    panel, rest = thread_scratch(work, slot)
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
def linear_residual_kernel(task, slot, x, o, panels, b, T, keys, threshold, keep, y, work):
    """y (N, M) = x + mask * (o w + b)."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    if threshold == 0:
        add_bias(x[start:stop], b, y[start:stop])
        product_of_panels(o[start:stop], panels, y[start:stop], True, thread_scratch(work, slot)[0])
    else:
        set_rows(b, y, start, stop, 0, y.shape[1])
        product_of_panels(o[start:stop], panels, y[start:stop], True, thread_scratch(work, slot)[0])
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
def linear_backward_kernel(task, slot, dy, panels, T, dx, work):
    """dx (N, K) = dy (N, M) w^T, by panels of w^T."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    product_of_panels(dy[start:stop], panels, dx[start:stop], False, thread_scratch(work, slot)[0])


@kernel
def attention_backward_kernel(
    task, slot, qkv, H, G, scale, slopes, window, keys, threshold, keep, o_T, lse, do, qk, q_norm, k_norm, eps, cos,
    sin, half, dqkv, sums, work,
):  # fmt: skip
    """The heads of one sequence that share keys: qkv, dqkv (B, T, H + 2 G, D), do (B, T, H, D), o_T and lse as above; p
    and ds (keys, queries). Backward through the places of q and k; sums (B G, 2, D) of the gradients of the gains."""
    (_, T, _, D), zero, kept = qkv.shape, do.dtype.type(0), do.dtype.type(keep)
    b, g, scale = task // G, task % G, do.dtype.type(scale)
    panel, rest = thread_scratch(work, slot)
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
    task, slot, dy, dlinear, panels, x, kind, norm_w, norm_b, stats, T, dx, n_T, sums, work
):  # fmt: skip
    """dx (N, C) = dy + norm_backward(dlinear w^T), n_T (tasks, C', ROW_BLOCK) = norm(x) again, sums (tasks, 2, C) of
    the norm's."""
    start, stop = block_rows(task, T, ROW_BLOCK)
    (panel, rest), (rows, C) = thread_scratch(work, slot), (stop - start, x.shape[1])
    dn, n = rest[: rows * C].reshape(rows, C), rest[rows * C : 2 * rows * C].reshape(rows, C)
    product_of_panels(dlinear[start:stop], panels, dn, False, panel)
    copy_rows(dy[start:stop], dx[start:stop])
    mean, rstd = stats[0, start:stop], stats[1, start:stop]
    norm_rows_backward(kind, dn, x[start:stop], norm_w, norm_b, mean, rstd, dx[start:stop], n, sums[task])
    pack_transposed(n, n_T[task, :C], panel[1])


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
    x_NC, stats, work = np.ascontiguousarray(x).reshape(-1, C), s["norm1"].reshape(2, -1), work_of(s)
    qkv, o, y, start = s["qkv"], s["o"], s["attended"], past[1] if past is not None else 0
    linear = (panels_of(p["qkv_w"], s), biases(p, "qkv_b", cfg.qkv_width))
    heads = (H, G) if cfg.qk_norm or cfg.positions.startswith("rope") else (0, 0)
    inputs = (x_NC, *norm_of(p, "norm1", cfg), *linear, T, heads, start, *place_arguments(p, s, cfg))
    POOL.run(qkv_kernel, tasks, *inputs, stats, qkv.reshape(B * T, -1, D), work)
    kv, k_at, S = qkv, H, T
    if past is not None:
        past[0][:, start : start + T] = qkv[:, :, H:].reshape(B, T, 2, G, D)
        kv, k_at, S = past[0].reshape(B, -1, 2 * G, D), 0, start + T
    mask = mask_of(dropout, ATTENTION_SITE, cfg.attention_dropout, B)
    arguments = attention_arguments(cfg, index, mask, qkv.dtype)
    POOL.run(attention_kernel, B * H, qkv, H, kv, k_at, k_at + G, S, *arguments, o, s["o_T"], s["lse"], work)
    out_mask = mask_of(dropout, OUT_SITE, cfg.out_dropout, B)
    linear = (o.reshape(B * T, -1), panels_of(p["out_w"], s), biases(p, "out_b", C))
    POOL.run(linear_residual_kernel, tasks, x_NC, *linear, T, *out_mask, y.reshape(-1, C), work)
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
    tasks, work, N, HD = B * blocks(T, ROW_BLOCK), work_of(s), B * T, H * D
    dy_NC = np.ascontiguousarray(dy).reshape(-1, C)
    do, dqkv = s["do"], s["dqkv"]

    dout = masked(dy_NC, out_mask, s, T)
    out_w_T = panels_of(p["out_w"], s, transposed=True)
    POOL.run(linear_backward_kernel, tasks, dout, out_w_T, T, do.reshape(N, HD), work)
    weight_gradient(s["o_T"], T, dout, g["out_w"], g["out_b"], work)

    outputs = (dqkv, s["qk_sums"], work)
    inputs = (s["qkv"], H, G, *arguments, s["o_T"], s["lse"], do, *place_arguments(p, s, cfg))
    POOL.run(attention_backward_kernel, B * G, *inputs, *outputs)
    if cfg.qk_norm:
        add_sums(s["qk_sums"], g["q_norm_w"], g["k_norm_w"])

    dqkv_NM = dqkv.reshape(N, -1)
    qkv_w_T = panels_of(p["qkv_w"], s, transposed=True)
    dx = norm_backward_kernels(dy_NC, dqkv_NM, qkv_w_T, x_NC, norm_of(p, "norm1", cfg), s["norm1"], T, s["dx"][1], s)
    weight_gradient(s["n_T"], T, dqkv_NM, g["qkv_w"], g["qkv_b"], work)
    add_sums(s["sums"], g["norm1_w"], g["norm1_b"])
    return dx


def norm_backward_kernels(dy_NC, dlinear, w_T, x_NC, norm, stats, T, dx, s):
    """dx (B, T, C) = dy + norm_backward(dlinear w^T)."""
    tail = (w_T, x_NC, *norm[:3], stats.reshape(2, -1), T, dx.reshape(x_NC.shape), s["n_T"], s["sums"], work_of(s))
    POOL.run(linear_norm_backward_kernel, len(s["sums"]), dy_NC, dlinear, *tail)
    return dx
