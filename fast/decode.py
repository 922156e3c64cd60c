"""Decoding: the next tokens of one text, in one launch.

Specification: `forward` with a cache and `head_logits` of tinygpt.py, then `probabilities` and the draw in `generate`
of sample.py. Replaces a Python loop that calls every sublayer for every token. Tokens and bytes stay the same: sums run
in the order of the sublayers' kernels, so a text has the same bytes whether it was read in blocks or token by token.

The idea: a token meets every weight once, so its time is that of reading the weights. What each trick gained, where
it was measured: AMD Zen 4, 2 cores shared with other work, ratios of alternating turns in one process, greedy:

    all of this file            token 30 x (260k) and 10 x (15m) as fast as the loop over this package's sublayers
    no Python between tokens    a launch draws many tokens: 2.0 x (260k), 1.1 x (15m) of a launch for each token
    8-bit screen of the head    1.9 x (15m), 1.5 x (tinystories-1m, V=50,257), 1.1 x (8m); section 4, draw.py
    narrow heads side by side   1.15 x (260k)
    weights in large pages      1.03 to 1.06 x (8m, 28m)
    panels of four vectors      1.1 x of panels of one (8m)
    no number known             packed weights (not measured apart); chunks that stay with their thread, small models on
                                one thread, prefetching, padded rows of keys (lost in this machine's noise)

Read in this order: the constants, the two records, the stages of a token from `normalise_row` to `begin_token`,
`compile_stage` and `step_kernel`, which run them. Then draw.py, which filters and draws; steps.py is what Python calls.
"""

import functools
import math

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fast.attention import first_seen, norm_columns, turn_pair
from fast.draw import add_offsets, draw_token, penalise_seen, screen_error
from fast.int8 import int8_panel, multiply_int8_panels
from fast.jit import COMPILE, callback, inlined
from fast.memory import matrix, peek, poke, vector
from fast.products import PANEL_VECTORS, PREFETCH_DISTANCE, VECTOR_BYTES, provide_product, row_tile
from fast.rows import activation_rows, exp, maximum, norm_rows
from fast.threads import kernel, look, put, replace
from fast.workspace import blocks

HEADS_TOGETHER = 4  # narrow heads whose weighted sums of values run side by side, for the same reason
NORM_ROOM = 64  # elements behind a normalised row, for its mean and rstd
PATIENCE = 1000  # looks, about 2 us, before a thread takes a chunk of another, whose cache holds the weights

# == 1  two records ====================================================================================================
#
# Compiled functions get two records instead of some thirty arrays. Numba passes an array as seven values, and compiles
# and calls functions of many arrays slowly; a record is one pointer. A record holds an array as the address of its
# first element, which `vector` and `matrix` (memory.py) turn into an array again. `Steps` owns the memory.

BEGIN, LINEAR, HIDDEN, ATTENTION, HEAD = range(5)  # kinds of stages


def record_type(integers, floats=""):
    """Record with an int64 or float64 field for each name in two tables, whose lines are `names: meaning`."""
    tables = ((integers, np.int64), (floats, np.float64))
    lines = [(line, kind) for table, kind in tables for line in table.strip().splitlines()]
    return np.dtype([(name, kind) for line, kind in lines for name in line.partition(":")[0].split()])


STAGE = record_type("""
    kind: BEGIN, or y = norm(source) w + b in LINEAR, the same and the activation in HIDDEN; ATTENTION; HEAD
    units: number of units into which its work can be cut: panels of y, groups of heads, or 1
    norm: kind of the norm, for `norm_rows`
    gains: address of the norm's gains (C,) and biases; 0 is no norm. ATTENTION: gains of q (D,) and of k; 0 is none
    source K: address of the input row (K,), its length
    bias weights: addresses of b (columns,), 0 is none, and of w (K, columns), packed by `pack_matrix`
    y columns: address of the output row, its length
    adds: 1 if the product is added to y, the residual stream
    layer window: ATTENTION: the layer's index, the keys that a query sees (0 is all)
""")
MODEL = record_type(
    """
    code: address of the machine code of `run_stage`
    stage_count itemsize panel: stages of a token; bytes of an element; columns of a panel
    C H G D V S: symbols of tinygpt.py; S is the length of the cache
    C_padded F_padded D_padded S_padded: C, F, D + 1 and S in whole vectors
    x qkv o h a logits: addresses of one token's activations, named as in section 3 of tinygpt.py
    offsets: address of what is added to the logits (V,): the head's bias, or -inf for a banned token
    exp_logits: address of exp((logits - max) / temperature) (V,)
    seen: address of one for each token that the repetition penalty is for, else 0 (V,)
    kv: address of the cache of `Decoding` (L, 1, S, 2, G, D)
    keys values: addresses of the same in reading order, (L, G, D, S_padded) and (L, G, S, D_padded)
    embed_w head_w position_w embed_norm: addresses of parameters; 0 if the model lacks them
    cos sin slopes: addresses of the tables of `rotation`, 0 if nothing is rotated, and of ALiBi's slopes (H,)
    screen screen_units: addresses of the 8-bit head and of its rows' units, see `quantise_head`
    tokens uniforms: addresses of the ids, the first one given, and of the numbers that draw the others
    words: address of the words that threads share, see below
    zeros: address of a panel of zeros
    scratch scratch_bytes: address of the threads' scratch memory, bytes of each
    prefetches norm_kind activation gated rope_half: switches of the model
    chunks: number of chunks into which a stage is cut in this launch
    first_stage position: where this launch begins, the position of its first token
    count stop: tokens to draw, 0 for logits alone; the id that ends the text
    screened top_k: 1 if this launch screens the head; filter of `probabilities`, 0 is off
    """,
    """
    eps scale: of the norms; of the scores
    largest_unit: of screen_units
    temperature top_p min_p repetition_penalty: filters of `probabilities`
    """,
)
NO_MODELS, NO_STAGES = np.zeros(0, MODEL), np.zeros(0, STAGE)  # tell `vector` the type of a record

# Words that threads share, 8 bytes each. Stages count on from token to token: number = token * stage_count + stage.
END, DRAWN = 0, 8  # number at which the launch ends; tokens drawn
CHUNKS = 16  # one word for each chunk, 64 bytes apart: 2 number + 1 while a thread computes it, 2 number + 2 when done

# Functions of `run_stage` alone. Numba inlines them before it compiles, so that it compiles one function, not twelve.
inlined_by_numba = njit(inline="always")

# == 2  products of one row ============================================================================================

four_vectors, two_vectors, one_vector = (row_tile(1, vectors) for vectors in (PANEL_VECTORS, 2, 1))
prefetched_panel = row_tile(1, PANEL_VECTORS, PREFETCH_DISTANCE)
rows_together = row_tile(HEADS_TOGETHER, 1)


@inlined
def multiply_panel(x, K, w, w_row, start, y, width, zero):
    """y = start + x (K,) w for at most a panel of columns in whole vectors: addresses, `w_row` and `width` in bytes."""
    if width == PANEL_VECTORS * VECTOR_BYTES:
        four_vectors(x, 0, w, 0, w_row, start, y, 0, K, zero)
    else:
        two = width // (2 * VECTOR_BYTES) * 2 * VECTOR_BYTES
        if two > 0:
            two_vectors(x, 0, w, 0, w_row, start, y, 0, K, zero)
        if width > two:
            one_vector(x, 0, w + two, 0, w_row, start + two, y + two, 0, K, zero)


@inlined_by_numba
def multiply_panels(model, stage, source, first, last, scratch, zero):
    """Panels first .. last - 1 of y = source w + b, or y += source w + b: `linear_forward`, section 2.1."""
    size = model.itemsize
    for low in range(first * model.panel, min(last * model.panel, stage.columns), model.panel):
        width, y = min(model.panel, stage.columns - low), scratch if stage.adds else stage.y + low * size
        start = stage.bias + low * size if stage.bias != 0 else model.zeros
        w = stage.weights + low * stage.K * size
        if model.prefetches and width == model.panel:
            prefetched_panel(source, 0, w, 0, width * size, start, y, 0, stage.K, zero)
        else:
            multiply_panel(source, stage.K, w, width * size, start, y, width * size, zero)
        if stage.adds:
            row, added = vector(stage.y + low * size, width, zero), vector(y, width, zero)
            for c in range(width):
                row[c] += added[c]


@inlined_by_numba
def normalise_row(model, kind, gains, x, n, zero):
    """n (C,) = norm(x), section 2.2, addresses; mean and rstd are written behind n."""
    stats = vector(n + model.C_padded * model.itemsize, 2, zero)
    w, b = vector(gains, model.C, zero), vector(gains + model.C_padded * model.itemsize, model.C, zero)
    x, n = matrix(x, 1, model.C, zero), matrix(n, 1, model.C, zero)
    norm_rows(kind, x, w, b, model.eps, stats[:1], stats[1:], n)


@inlined_by_numba
def activate_panels(model, stage, first, last, zero):
    """Panels first .. last - 1 of a (F,) = f(h), section 2.3; each panel of the gate precedes that of its values."""
    size = model.itemsize
    for low in range(first * model.panel, min(last * model.panel, model.F_padded), model.panel):
        width = min(model.panel, model.F_padded - low)
        h = matrix(stage.y + (1 + model.gated) * low * size, 1, 2 * model.panel, zero)
        a = matrix(model.a + low * size, 1, model.panel, zero)
        activation_rows(model.activation, h, 0, 0, width, a)


# == 3  attention of one query =========================================================================================


@inlined
def rotate_heads(x, cos, sin, half):
    """x (heads D,) at one position, in place: `rotate_forward`, section 2.5; cos and sin (D/2,)."""
    pairs = cos.size
    for low in range(0, x.size, 2 * pairs):
        for i in range(pairs):
            even, odd = (low + i, low + i + pairs) if half else (low + 2 * i, low + 2 * i + 1)
            x[even], x[odd] = turn_pair(x[even], x[odd], cos[i], sin[i])


@inlined_by_numba
def place_heads(model, x, heads, gains, position, rstd, zero):
    """Queries or keys x (heads D,), in place: their norm if gains != 0, their rotation if the model has one."""
    D, size = model.D, model.itemsize
    if gains != 0:
        for h in range(heads):
            column = matrix(x + h * D * size, D, 1, zero)
            norm_columns(column, vector(gains, D, zero), model.eps, vector(rstd, 1, zero))
    if model.cos != 0:
        row, pairs = position * (D // 2) * size, D // 2
        cos, sin = vector(model.cos + row, pairs, zero), vector(model.sin + row, pairs, zero)
        rotate_heads(vector(x, heads * D, zero), cos, sin, model.rope_half)


@inlined_by_numba
def store_keys_values(model, layer, first, last, position, zero):
    """Copy k and v of groups first .. last - 1 into `kv` and, for reading, into `keys` and `values`."""
    D, G, S, size = model.D, model.G, model.S, model.itemsize
    k_new, k_to_v = model.qkv + (model.H + first) * D * size, G * D * size
    k_cache = model.kv + ((layer * S + position) * 2 * G + first) * D * size
    for i in range((last - first) * D):
        k, v, group, d = peek(k_new, i, zero), peek(k_new + k_to_v, i, zero), layer * G + first + i // D, i % D
        poke(k_cache, i, k)
        poke(k_cache + k_to_v, i, v)
        poke(model.keys, (group * D + d) * model.S_padded + position, k)
        poke(model.values, (group * S + position) * model.D_padded + d, v)


@inlined_by_numba
def exp_scores(model, head, keys, seen, scores, zero):
    """scores (seen,) = exp(s - max(s)), s = q . k - slope * distance, for one head; section 2.4. Addresses: of `keys`
    the first that is seen. What fills the last panel becomes exp(-inf) = 0."""
    size, panel = model.itemsize, model.panel * model.itemsize
    width = blocks(seen, model.panel) * panel
    row, slope = vector(scores, width // size, zero), vector(model.slopes, model.H, zero)[head]
    for low in range(0, width, panel):
        q, k = model.qkv + head * model.D * size, keys + low
        multiply_panel(q, model.D, k, model.S_padded * size, model.zeros, scores + low, panel, zero)
    if slope > 0:
        for s in range(seen):
            row[s] -= slope * row.dtype.type(seen - 1 - s)
    for s in range(seen, row.size):
        row[s] = -math.inf
    top = maximum(row)
    for s in range(row.size):
        row[s] = exp(row[s] - top)


@inlined_by_numba
def sum_values(model, count, scores, scores_next, values, seen, sums, zero):
    """sums (count, D_padded) = scores (count, seen) values: a head each, addresses, `values` the first that is seen.
    Each value ends in a one, so that column D of a sum is the sum of its scores."""
    row, panel = model.D_padded * model.itemsize, model.panel * model.itemsize
    values_next = model.S * row
    if count == HEADS_TOGETHER and row == VECTOR_BYTES:
        rows_together(scores, scores_next, values, values_next, row, model.zeros, sums, row, seen, zero)
    else:
        for i in range(count):
            p, v, y = scores + i * scores_next, values + i * values_next, sums + i * row
            for low in range(0, row, panel):
                multiply_panel(p, seen, v + low, row, model.zeros, y + low, min(panel, row - low), zero)


@inlined_by_numba
def attend_groups(model, stage, first, last, position, scratch, zero):
    """Groups first .. last - 1 of the heads: `attention_forward`, section 2.4, for the query at `position`."""
    D, R, size, begin = model.D, model.H // model.G, model.itemsize, first_seen(position, stage.window)
    queries, keys = model.qkv + first * R * D * size, model.qkv + (model.H + first) * D * size
    place_heads(model, queries, (last - first) * R, stage.gains, position, scratch, zero)
    k_gains = stage.gains + D * size if stage.gains != 0 else stage.gains
    place_heads(model, keys, last - first, k_gains, position, scratch, zero)
    store_keys_values(model, stage.layer, first, last, position, zero)
    q = vector(queries, (last - first) * R * D, zero)
    for i in range(q.size):
        q[i] *= q.dtype.type(model.scale)
    seen, k_group, v_group = position + 1 - begin, D * model.S_padded * size, model.S * model.D_padded * size
    k_seen = model.keys + stage.layer * model.G * k_group + begin * size
    v_seen = model.values + stage.layer * model.G * v_group + begin * model.D_padded * size
    sums, scores = scratch, scratch + HEADS_TOGETHER * model.D_padded * size
    scores_next = blocks(seen, model.panel) * model.panel * size
    for low in range(first, last, HEADS_TOGETHER):
        count = min(HEADS_TOGETHER, last - low)
        for r in range(R):
            for i in range(count):
                head, k = (low + i) * R + r, k_seen + (low + i) * k_group
                exp_scores(model, head, k, seen, scores + i * scores_next, zero)
            sum_values(model, count, scores, scores_next, v_seen + low * v_group, seen, sums, zero)
            for i in range(count):
                y = vector(sums + i * model.D_padded * size, model.D_padded, zero)
                out = vector(model.o + ((low + i) * R + r) * D * size, D, zero)
                inverse = y.dtype.type(1) / y[D]
                for d in range(D):
                    out[d] = y[d] * inverse


# == 4  the next token =================================================================================================


@inlined_by_numba
def screen_logits(model, n, first, last, zero):
    """Panels first .. last - 1 of logits (V,) = lower bounds of the logits, from the 8-bit head."""
    error, size = screen_error(vector(n, model.C, zero)), model.itemsize
    for low in range(first * model.panel, min(last * model.panel, model.V), model.panel):
        y, units = model.logits + low * size, vector(model.screen_units + low * size, model.panel, zero)
        int8_panel(n, 0, model.screen + low * model.C, 0, model.panel, model.zeros, y, 0, model.C, zero)
        bounds = vector(y, model.panel, zero)
        for v in range(bounds.size):
            bounds[v] = (bounds[v] - error) * units[v]


@inlined_by_numba
def pick_screened_token(model, n, bounds, offsets, scratch, zero):
    """argmax of the logits, the first of equals: exact logits of the tokens whose upper bound reaches the largest of
    the lower `bounds` (V,). -1 if it is not finite."""
    error, units, lanes = screen_error(n), vector(model.screen_units, model.V, zero), VECTOR_BYTES // model.itemsize
    best, top, least, width = 0, n.dtype.type(-math.inf), maximum(bounds), error + error
    if math.isinf(n.dtype.type(256 * width * model.largest_unit)):  # a partial sum may overflow: compute all logits
        least = top
    logit, n_lanes = vector(scratch, lanes, zero), vector(scratch + VECTOR_BYTES, model.C * lanes, zero)
    for i in range(n_lanes.size):  # n_c in every lane: a product with the roles of row and matrix exchanged
        n_lanes[i] = n[i // lanes]
    for v in range(model.V):
        if not bounds[v] + width * units[v] < least and offsets[v] > -math.inf:
            row, w = model.head_w + v * model.C * model.itemsize, scratch + VECTOR_BYTES
            multiply_panel(row, model.C, w, VECTOR_BYTES, model.zeros, scratch, VECTOR_BYTES, zero)
            exact = logit[0] + offsets[v]
            if not exact <= top:
                best, top = v, exact
            if math.isnan(exact):
                break
    return best if math.isfinite(top) else -1


@inlined_by_numba
def look_up_token(model, token, position, n, zero):
    """x (C,) = `embed_forward`, section 3."""
    x, row = vector(model.x, model.C, zero), vector(model.embed_w + token * model.C * model.itemsize, model.C, zero)
    for c in range(model.C):
        x[c] = row[c]
    if model.position_w != 0:
        row = vector(model.position_w + position * model.C * model.itemsize, model.C, zero)
        for c in range(model.C):
            x[c] += row[c]
    if model.embed_norm != 0:
        normalise_row(model, model.norm_kind, model.embed_norm, model.x, n, zero)
        row = vector(n, model.C, zero)
        for c in range(model.C):
            x[c] = row[c]


@inlined_by_numba
def begin_token(model, head, index, n, scratch, zero):
    """Draw token number `index` (number 0 is given) and look it up. True if the text ends: with this token, or because
    none can be drawn from logits that are not finite. `head`: the last stage."""
    tokens = vector(model.tokens, model.S + 2, np.int64(0))
    if index > 0:
        logits, offsets = vector(model.logits, model.V, zero), vector(model.offsets, model.V, zero)
        has_nan, seen = add_offsets(logits, offsets), vector(model.seen, model.V, zero)
        if model.repetition_penalty != 1:
            penalise_seen(logits, seen, logits.dtype.type(model.repetition_penalty))
        if model.screened:
            normalise_row(model, head.norm, head.gains, model.x, n, zero)
            token = pick_screened_token(model, vector(n, model.C, zero), logits, offsets, scratch, zero)
        elif has_nan:
            token = -1
        else:
            uniform, room = vector(model.uniforms, model.S + 1, 0.0)[index - 1], vector(model.exp_logits, model.V, zero)
            filters = (model.temperature, model.top_k, model.top_p, model.min_p)
            token = draw_token(logits, uniform, filters, room)
        if token < 0:
            return True
        tokens[index], seen[token] = token, 1
        put(model.words + 8 * DRAWN, index)
        if index == model.count or token == model.stop:
            return True
    look_up_token(model, tokens[index], model.position + index, n, zero)
    return False


# == 5  running the stages =============================================================================================


@functools.cache
def compile_stage(dtype, int8=False):
    """`run_stage` for a dtype, with matrices in int8 or in that dtype, as machine code with an address, by which it is
    called: compiled once for each."""
    provide_product(dtype)
    number = numba.from_dtype(np.dtype(dtype))

    def run_stage(record, stages, index, token, first, last, slot):
        """Units first .. last - 1 of stage `index` of token number `token`; 1 if the text ends here."""
        model, zero = vector(record, 1, NO_MODELS)[0], number(0)
        stages = vector(stages, model.stage_count, NO_STAGES)
        stage, n = stages[index], model.scratch + slot * model.scratch_bytes  # n (C,), its mean and rstd, then the rest
        scratch, source, ended = n + (model.C_padded + NORM_ROOM) * model.itemsize, stage.source, 0
        if stage.kind == BEGIN:
            ended = 1 if begin_token(model, stages[-1], token, n, scratch, zero) else 0
        elif stage.kind == ATTENTION:
            attend_groups(model, stage, first, last, model.position + token, scratch, zero)
        else:
            if stage.gains != 0:
                normalise_row(model, stage.norm, stage.gains, stage.source, n, zero)
                source = n
            if stage.kind == HEAD and model.screened:
                screen_logits(model, n, first, last, zero)
            else:
                wide = 1 + model.gated if stage.kind == HIDDEN else 1
                if int8:
                    multiply_int8_panels(model, stage, source, first * wide, last * wide, scratch, zero)
                else:
                    multiply_panels(model, stage, source, first * wide, last * wide, scratch, zero)
            if stage.kind == HIDDEN:
                activate_panels(model, stage, first, last, zero)
        return ended

    return callback(types.int64(*[types.int64] * 7), **COMPILE)(run_stage)


@intrinsic
def call_stage(typing_context, code, record, stages, index, token, first, last, slot):
    """`run_stage` at the address `code`."""

    def build(context, builder, signature, args):
        i64 = ir.IntType(64)
        function = ir.FunctionType(i64, [i64] * 7).as_pointer()
        return builder.call(builder.inttoptr(args[0], function), args[1:])

    return types.int64(*[types.int64] * 8), build


@kernel
def step_kernel(task, slot, record, stages):
    """All stages of model.count tokens, or of one up to its logits. A task is a thread: it computes chunk `task` of
    every stage, then those of the others that are late. It uses scratch memory number `task`, since more threads than
    `chunks` may have slots."""
    model = record[0]
    number, words = model.first_stage, model.words
    while number < look(words + 8 * END):
        token, index = number // len(stages), number % len(stages)
        units = stages[index].units
        for i in range(model.chunks):
            chunk, looks = (task + i) % model.chunks, 0 if i > 0 else PATIENCE
            first, last = blocks(units * chunk, model.chunks), blocks(units * (chunk + 1), model.chunks)
            word = words + 8 * (CHUNKS + 8 * chunk)
            state = look(word) if first < last else 2 * number + 2
            while state < 2 * number + 2:  # not done
                if looks >= PATIENCE and state <= 2 * number and replace(word, state, 2 * number + 1):
                    if call_stage(model.code, record.ctypes.data, stages.ctypes.data, index, token, first, last, task):
                        put(words + 8 * END, 0)
                    put(word, 2 * number + 2)
                looks += 1
                state = look(word)
        number += 1
    put(words + 8 * END, 0)
