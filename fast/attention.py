"""The attention sublayer: `attention_layer_forward` and `attention_layer_backward` of section 3.

It replaces `attention_kernel` and `attention_backward_kernel` of tinygpt.py, section 7, and the functions around them.

- No T x T matrix, as there: the scores of SCORE_BLOCK queries at a time stay in a core's cache. Keys stand down and
  queries across, so that each step of the softmax works on whole vectors; so do rotation and norms, with positions side
  by side, whatever D is. Size 1m: rotation and norms 105 -> 12 ms of 770, attention 135 -> 88; whole steps 1.21 x as
  fast, with wider use of registers; 128x4 on one thread 1.13 x.
- Gradients pass backward through rotation and norm while they are in the cache: a kernel of its own read and wrote all
  of dqkv again, 2 of 100 ms at size 2m.
- Norm, product, bias, rotation: one block of rows passes through them in `qkv_kernel`. Not measured alone.

Order: rotation and norm of queries and keys, attention forward and backward, the linear layers around it, then the two
sublayers.
"""

import functools
import math

import numpy as np
from numba.extending import intrinsic

from fast.embed import drop_kernel
from fast.jit import inlined, inlined_in_order
from fast.panels import pack_transposed, panels_of, product_of_panels, weight_gradient
from fast.products import copy_rows, product, transpose_rows
from fast.rows import drop_row, exp, mix, norm_rows, norm_rows_backward, set_rows
from fast.threads import POOL, kernel
from fast.workspace import (
    LOOP,
    ROW_BLOCK,
    SCORE_BLOCK,
    add_sums,
    attention_scratch,
    biases,
    block_rows,
    blocks,
    carve,
    constant,
    dk_scratch,
    keys_scratch,
    layer_space,
    mask_of,
    norm_backward_scratch,
    norm_of,
    norm_scratch,
    place_scratch,
    queries_scratch,
    scores_scratch,
    thread_scratch,
    whole_vectors,
    work_of,
)
from tinygpt import ATTENTION_SITE, OUT_SITE, alibi_slopes, layer_window, rotation

# Queries, keys and scores are worked on with positions side by side, (D, T) and (S, T): what is done to all positions
# is done to whole vectors, sums over d or s are sums of vectors, and no row is too short.


# == 2.2, 2.5  norm and rotation of queries and keys: their place ======================================================
#
# For each head of q and k (D, T), positions side by side:
#     qk-norm    x_dt = gain_d x_dt rstd_t,   rstd_t = 1 / sqrt(mean_d(x_dt^2) + eps)              `rmsnorm_forward`
#     rotation   (x_i, x_j) = (x_i cos - x_j sin, x_i sin + x_j cos),   angle t theta^(-2 i / D)   `rotate_forward`
# where i, j are neighbours, or D/2 apart if `half`. Backward: the rotation back, then dx = rstd (dn - n mean_d(dn n)).
#
# place = (heads, gains, eps, cos, sin, half): the numbers (H, G) of heads of q and k, (0, 0) if there is nothing to do;
# gains of q and k, each (D,); cos and sin (D/2, S + LOOP), without rows if nothing is rotated. qk (B, H + G, D, T')
# keeps q and k as they were before their norm; it is empty if they have none.


@intrinsic
def fused_multiply_add(typing_context, a, b, c):
    """a b + c, rounded once."""
    return c(a, b, c), lambda context, builder, signature, args: builder.fma(*args)


@inlined
def turn_pair(a, b, cos, sin):
    """`rotate_forward` of one pair. Each rounding is written out: a block and a single token have the same bytes."""
    return fused_multiply_add(a, cos, -(b * sin)), fused_multiply_add(a, sin, b * cos)


@inlined
def turn_pair_back(da, db, cos, sin):
    """`rotate_backward` of one pair."""
    return fused_multiply_add(db, sin, da * cos), fused_multiply_add(db, cos, -(da * sin))


@inlined_in_order
def turn(x, position, cos, sin, half, back):
    """Rotate every pair of rows of x (D, T), whose first column is at `position`, or rotate it back; in place."""
    pairs = x.shape[0] // 2
    for i in range(pairs):
        even, odd = (x[i], x[i + pairs]) if half else (x[2 * i], x[2 * i + 1])
        c, s = cos[i, position : position + even.size], sin[i, position : position + even.size]
        for t in range(even.size):
            if back:
                even[t], odd[t] = turn_pair_back(even[t], odd[t], c[t], s[t])
            else:
                even[t], odd[t] = turn_pair(even[t], odd[t], c[t], s[t])


@inlined_in_order
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


@inlined_in_order
def norm_columns(x, gains, eps, rstd):
    """Multiply the columns of x (D, T) by their rstd (T,) and gains (D,), in place."""
    inverse_rms(x, eps, rstd)
    for d in range(x.shape[0]):
        row = x[d]
        for t in range(rstd.size):
            row[t] *= rstd[t] * gains[d]


@inlined
def place_rows(qkv, position, place, qk, b, first, room):
    """Norm and rotate q and k of qkv (T, H + 2 G, D), whose first row is at `position`: rows `first` on of sequence b.
    Keeps in qk what they were."""
    heads, gains, eps, cos, sin, half = place
    T, _, D = qkv.shape
    shapes = place_scratch(D, blocks(T, LOOP) * LOOP)
    x, left = carve(room, shapes[0])
    rstd = carve(left, shapes[1])[0][0]
    for h in range(heads[0] + heads[1]):
        transpose_rows(qkv[:, h], x)
        if len(qk) > 0:
            copy_rows(x[:, :T], qk[b, h, :, first : first + T])
            norm_columns(x, gains[0] if h < heads[0] else gains[1], eps, rstd)
        if len(cos) > 0:
            turn(x, position, cos, sin, half, False)
        transpose_rows(x[:, :T], qkv[:, h])


@inlined
def place_backward(dx, place, side, qk, b, h, first, total, room):
    """Backward through the place of head h, of q if side is 0, of k if it is 1: overwrites dx (D, T), from position
    `first` on; adds into total (D,), the gradient of the gains."""
    _, both_gains, eps, cos, sin, half = place
    gains = both_gains[side]
    (D, width), zero = dx.shape, dx.dtype.type(0)
    shapes = place_scratch(D, width)
    x, left = carve(room, shapes[0])
    statistics, _ = carve(left, shapes[1])
    rstd, dot = statistics[0], statistics[1]
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
                dx_n = dx_row[t] * x_row[t] * rstd[t]
                gradient += dx_n
                dot[t] += dx_n * gains[d]
            total[d] += gradient
        for t in range(width):
            dot[t] *= rstd[t] * rstd[t] / x.dtype.type(D)
        for d in range(D):
            x_row, dx_row = x[d], dx[d]
            for t in range(width):
                dx_row[t] = rstd[t] * dx_row[t] * gains[d] - x_row[t] * dot[t]


@kernel
def qkv_kernel(task, slot, x, norm, linear, T, start, place, stats, qk, qkv, work):
    """x (N, C) -> qkv (N, H + 2 G, D) = norm(x) w + b, then q and k placed; linear = (w by panels, b); the sequences'
    first row is at position `start`. Keeps stats (2, N) = mean, rstd."""
    (kind, norm_w, norm_b, eps), (panels, b), (first, last) = norm, linear, block_rows(task, T, ROW_BLOCK)
    panel, room = thread_scratch(work, slot)
    (n, _), y = carve(room, norm_scratch(last - first, x.shape[1])), qkv.reshape(len(qkv), b.size)
    norm_rows(kind, x[first:last], norm_w, norm_b, eps, stats[0, first:last], stats[1, first:last], n)
    set_rows(b, y, first, last, 0, y.shape[1])
    product_of_panels(n, panels, y[first:last], True, panel)
    t = first % T
    place_rows(qkv[first:last], start + t, place, qk, first // T, t, room)  # over n, which is not read again


# == 2.4  attention ====================================================================================================
#
# scores = (scale, slopes (H,), window), mask = (keys (B,), threshold, keep): threshold 0 is no dropout.


@inlined
def first_seen(position, window):
    """The first key that the query at this position sees."""
    return max(0, position - window + 1) if window > 0 else 0


@inlined
def seen_by(key, first, count, window):
    """Of `count` queries from position `first` on, the first and last + 1 that see the key."""
    last = min(count, key - first + window) if window > 0 else count
    return np.int32(max(0, key - first)), np.int32(last)


@inlined
def drop_columns(p, begin, key, first, threshold, keep):
    """p (S, T) times its mask, section 2.6: row s is column begin + s of the mask, column t row first + t."""
    for s in range(p.shape[0]):
        row = p[s]
        for t in range(row.size):
            drawn = mix(np.uint32(mix(np.uint32(key + np.uint32(first + t))) + np.uint32(begin + s)))
            row[t] = row[t] * keep if drawn >= threshold else row.dtype.type(0)


@inlined
def scale_columns(x, scale):
    for i in range(x.shape[0]):
        row = x[i]
        for t in range(row.size):
            row[t] *= scale


@inlined_in_order
def score_gradient(p, dp, mean, scale):
    """ds = p (dp - mean) scale, in this order: LLVM chose one or another by what stood around it."""
    return p * ((dp - mean) * scale)


@kernel
def attention_kernel(task, slot, qkv, source, scores, mask, o, o_T, lse, work):
    """One head of one sequence: q in qkv (B, T, heads, D) -> o (B, T, H, D), o_T (blocks, H D, SCORE_BLOCK), lse (B, H,
    T). source = (kv, k_at, v_at, S): keys in kv[:, :S, k_at + g], values in v_at + g.

    SCORE_BLOCK queries at a time: p (keys, queries) of the keys that one of them sees, o^T = v^T p."""
    (_, T, _, D), zero, one = qkv.shape, qkv.dtype.type(0), qkv.dtype.type(1)
    (kv, k_at, v_at, S), (scale, slopes, window), (keys, threshold, keep) = source, scores, mask
    H = o.shape[2]
    b, h = task // H, task % H
    g, slope = h // (H // (v_at - k_at)), slopes[h]
    panel, room = thread_scratch(work, slot)
    for first in range(0, T, SCORE_BLOCK):
        last = min(first + SCORE_BLOCK, T)
        width, at = whole_vectors(last - first), S - T + first
        begin, end = first_seen(at, window), S - T + last
        shapes = attention_scratch(S, D, end - begin, width)
        v, left = carve(room, shapes[0])
        q, left = carve(left, shapes[1])
        statistics, left = carve(left, shapes[2])
        (p, _), top, total = carve(left, shapes[3]), statistics[0], statistics[1]
        if first == 0:
            copy_rows(kv[b, :S, v_at + g], v)  # its rows side by side
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
def attention_backward_kernel(task, slot, qkv, saved, scores, mask, place, do, dqkv, sums, work):
    """The heads of one sequence that share keys: qkv, dqkv (B, T, H + 2 G, D), do (B, T, H, D), saved = (qk, o_T, lse).
    p and ds (keys, queries) are made again; then backward through the place of q and k; sums (B G, 2, D) of the
    gradients of their gains."""
    (qk, o_T, lse), (scale, slopes, window), (keys, threshold, keep) = saved, scores, mask
    (_, T, _, D), zero, kept = qkv.shape, do.dtype.type(0), do.dtype.type(keep)
    H = do.shape[2]
    G = (qkv.shape[2] - H) // 2
    b, g, scale = task // G, task % G, do.dtype.type(scale)
    panel, room = thread_scratch(work, slot)
    shapes = keys_scratch(T, D)
    all_k, left = carve(room, shapes[0])
    all_v, left = carve(left, shapes[1])
    dk, left = carve(left, shapes[2])
    dv, room = carve(left, shapes[3])
    copy_rows(qkv[b, :, H + g], all_k)
    copy_rows(qkv[b, :, H + G + g], all_v)
    for t in range(T):
        for d in range(D):
            dk[t, d] = dv[t, d] = zero
    for d in range(D):
        sums[task, 0, d] = sums[task, 1, d] = zero
    for h in range(g * (H // G), (g + 1) * (H // G)):
        slope = slopes[h]
        for first in range(0, T, SCORE_BLOCK):
            last = min(first + SCORE_BLOCK, T)
            width, begin = whole_vectors(last - first), first_seen(first, window)
            shapes = queries_scratch(D, width)
            q, left = carve(room, shapes[0])
            do_columns, left = carve(left, shapes[1])
            statistics, after_queries = carve(left, shapes[2])
            shift, mean = statistics[0], statistics[1]
            p_shape, ds_shape = scores_scratch(last - begin, width)
            p, left = carve(after_queries, p_shape)
            ds, _ = carve(left, ds_shape)
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
            for t in range(last - first, width):  # no query: it may see no key, and o is NaN
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
                    drow[t] = score_gradient(row[t], drow[t], mean[t], scale)
            if threshold > 0:
                drop_columns(p, begin, keys[b], h * 65536 + first, threshold, kept)
            product(ds[:, : last - first], q_rows, dk[begin:last], True, panel)
            product(p[:, : last - first], do_rows, dv[begin:last], True, panel)
            product(k.T, ds, q, False, panel)
            place_backward(q, place, 0, qk, b, h, first, sums[task, 0], after_queries)  # over p and ds
            transpose_rows(q[:, : last - first], dqkv[b, first:last, h])
    dk_T, left = carve(room, dk_scratch(T, D))
    transpose_rows(dk, dk_T)
    place_backward(dk_T, place, 1, qk, b, H + g, 0, sums[task, 1], left)
    transpose_rows(dk_T[:, :T], dqkv[b, :, H + g])
    copy_rows(dv, dqkv[b, :, H + G + g])


# == 2.1  the linear layers around it ==================================================================================


@kernel
def linear_residual_kernel(task, slot, x, o, linear, T, mask, y, work):
    """y (N, M) = x + mask * (o w + b); linear = (w by panels, b)."""
    (panels, b), (keys, threshold, keep), (panel, _) = linear, mask, thread_scratch(work, slot)
    start, stop = block_rows(task, T, ROW_BLOCK)
    set_rows(b, y, start, stop, 0, y.shape[1])
    product_of_panels(o[start:stop], panels, y[start:stop], True, panel)
    drop_and_add(x, y, start, stop, T, keys, threshold, keep)


@inlined
def drop_and_add(x, y, start, stop, T, keys, threshold, keep):
    """Rows start .. stop - 1 of y = x + mask * y. x comes last: added first, it would round each term of the sums to
    its own last place, and y would err 6 times as much where the MLP adds little."""
    for i in range(start, stop):
        x_row, row = x[i], y[i]
        if threshold > 0:
            drop_row(row, 0, keys[i // T], i % T, threshold, row.dtype.type(keep))
        for c in range(row.size):
            row[c] += x_row[c]


@kernel
def linear_backward_kernel(task, slot, dy, panels, T, dx, work):
    """dx (N, K) = dy (N, M) w^T, by panels of w^T."""
    (start, stop), (panel, _) = block_rows(task, T, ROW_BLOCK), thread_scratch(work, slot)
    product_of_panels(dy[start:stop], panels, dx[start:stop], False, panel)


@kernel
def linear_norm_backward_kernel(task, slot, dy, dlinear, panels, x, norm, stats, T, outputs, work):
    """dx (N, C) = dy + norm_backward(dlinear w^T), by panels of w^T; outputs = (dx, n_T, sums): n_T (tasks, C',
    ROW_BLOCK) = norm(x) again, sums (tasks, 2, C) of the gradients of the norm's gain and bias."""
    (kind, norm_w, norm_b, _), (dx, n_T, sums), (panel, room) = norm, outputs, thread_scratch(work, slot)
    start, stop = block_rows(task, T, ROW_BLOCK)
    shapes = norm_backward_scratch(stop - start, x.shape[1])
    dn, left = carve(room, shapes[0])
    n, _ = carve(left, shapes[1])
    product_of_panels(dlinear[start:stop], panels, dn, False, panel)
    copy_rows(dy[start:stop], dx[start:stop])
    mean, rstd = stats[0, start:stop], stats[1, start:stop]
    norm_rows_backward(kind, dn, x[start:stop], norm_w, norm_b, mean, rstd, dx[start:stop], n, sums[task])
    pack_transposed(n, n_T[task, : x.shape[1]], panel[1])


# == 3  the sublayers ==================================================================================================


def attention_arguments(cfg, index, dtype):
    """(scale, slopes, window) of a layer."""
    slopes = (alibi_slopes(cfg.heads) if cfg.positions == "alibi" else np.zeros(cfg.heads)).astype(dtype)
    return 1 / math.sqrt(cfg.head_width) if cfg.attention_scale else 1.0, slopes, layer_window(cfg, index)


@functools.cache
def rotation_columns(S, D, theta, dtype):
    """cos and sin (D/2, S + LOOP) of section 2.5."""
    return tuple(np.ascontiguousarray(a.T) for a in rotation(S + LOOP, D, theta, dtype))


def place_of(p, cfg, dtype):
    """`place` of a layer's queries and keys; empty arrays for what there is not."""
    D, rotated, half = cfg.head_width, cfg.positions.startswith("rope"), cfg.positions == "rope-half"
    heads = (cfg.heads, cfg.kv_heads) if cfg.qk_norm or rotated else (0, 0)
    gains = (p["q_norm_w"], p["k_norm_w"]) if cfg.qk_norm else (constant(1, D, dtype),) * 2
    angles = rotation_columns(cfg.seq_len, D, cfg.rope_theta, dtype) if rotated else (np.empty((0, 0), dtype),) * 2
    return heads, gains, cfg.norm_eps, *angles, half


def attention_layer_forward_fast(x, p, cfg, ops, index=0, past=None, dropout=None):
    (B, T, C), (H, G, D) = x.shape, (cfg.heads, cfg.kv_heads, cfg.head_width)
    tasks, s = B * blocks(T, ROW_BLOCK), layer_space(ops, cfg, x, index)
    x_NC, stats, work = np.ascontiguousarray(x).reshape(-1, C), s["norm1"].reshape(2, -1), work_of(s)
    qkv, o, y, start = s["qkv"], s["o"], s["attended"], past[1] if past is not None else 0
    norm, linear = norm_of(p, "norm1", cfg), (panels_of(p["qkv_w"], s), biases(p, "qkv_b", cfg.qkv_width))
    place = place_of(p, cfg, qkv.dtype.name)
    outputs = (stats, s["qk"], qkv.reshape(B * T, -1, D))
    POOL.run(qkv_kernel, tasks, x_NC, norm, linear, T, start, place, *outputs, work)
    source = (qkv, H, H + G, T)
    if past is not None:
        past[0][:, start : start + T] = qkv[:, :, H:].reshape(B, T, 2, G, D)
        source = (past[0].reshape(B, -1, 2 * G, D), 0, G, start + T)
    mask = mask_of(dropout, ATTENTION_SITE, cfg.attention_dropout, B)
    scores = attention_arguments(cfg, index, qkv.dtype)
    POOL.run(attention_kernel, B * H, qkv, source, scores, mask, o, s["o_T"], s["lse"], work)
    out_mask = mask_of(dropout, OUT_SITE, cfg.out_dropout, B)
    linear = (panels_of(p["out_w"], s), biases(p, "out_b", C))
    POOL.run(linear_residual_kernel, tasks, x_NC, o.reshape(B * T, -1), linear, T, out_mask, y.reshape(-1, C), work)
    return y, (x_NC, s, scores, mask, out_mask)


def masked(dy_NC, mask, s, T):
    """dy times the mask that its sublayer's output was multiplied by."""
    if not mask[1]:
        return dy_NC
    kept = s["kept"].reshape(dy_NC.shape)
    POOL.run(drop_kernel, len(s["sums"]), dy_NC, T, mask, kept)
    return kept


def attention_layer_backward_fast(dy, cache, p, g, cfg, ops, index=0):
    x_NC, s, scores, mask, out_mask = cache
    (B, T, C), (H, G, D) = dy.shape, (cfg.heads, cfg.kv_heads, cfg.head_width)
    tasks, work, N, HD = B * blocks(T, ROW_BLOCK), work_of(s), B * T, H * D
    dy_NC = np.ascontiguousarray(dy).reshape(-1, C)
    do, dqkv = s["do"], s["dqkv"]

    dout = masked(dy_NC, out_mask, s, T)
    out_w_T = panels_of(p["out_w"], s, transposed=True)
    POOL.run(linear_backward_kernel, tasks, dout, out_w_T, T, do.reshape(N, HD), work)
    weight_gradient(s["o_T"], T, dout, g["out_w"], g["out_b"], s)

    saved, place = (s["qk"], s["o_T"], s["lse"]), place_of(p, cfg, dqkv.dtype.name)
    POOL.run(attention_backward_kernel, B * G, s["qkv"], saved, scores, mask, place, do, dqkv, s["qk_sums"], work)
    if cfg.qk_norm:
        add_sums(s["qk_sums"], g["q_norm_w"], g["k_norm_w"])

    dqkv_NM = dqkv.reshape(N, -1)
    qkv_w_T = panels_of(p["qkv_w"], s, transposed=True)
    dx = linear_norm_backward(dy_NC, dqkv_NM, qkv_w_T, x_NC, norm_of(p, "norm1", cfg), s["norm1"], T, s["dx"][1], s)
    weight_gradient(s["n_T"], T, dqkv_NM, g["qkv_w"], g["qkv_b"], s)
    add_sums(s["sums"], g["norm1_w"], g["norm1_b"])
    return dx


def linear_norm_backward(dy_NC, dlinear, w_T, x_NC, norm, stats, T, dx, s):
    """dx (B, T, C) = dy + norm_backward(dlinear w^T)."""
    tail = (stats.reshape(2, -1), T, (dx.reshape(x_NC.shape), s["n_T"], s["sums"]), work_of(s))
    POOL.run(linear_norm_backward_kernel, len(s["sums"]), dy_NC, dlinear, w_T, x_NC, norm, *tail)
    return dx
