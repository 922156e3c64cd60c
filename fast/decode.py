"""One token after another: `forward` with a cache, `head_logits` and `probabilities` of tinygpt.py, in one launch.

The idea: a token meets every weight once, so its time is that of reading the weights; they are copied into the order in
which they are read. Order: the comment below, the records, the stages from `step_norm` to `step_begin`, `step_kernel`,
then `Steps`, which Python sees.
"""

import functools
import math

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fast.attention import attention_arguments, first_seen, norm_columns, turn_pair
from fast.jit import COMPILE, ordered_part, part, stamped
from fast.memory import matrix, peek, poke, vector
from fast.products import VECTOR_BYTES, provide_product, row_tile
from fast.rows import ACTIVATION, NO_NORM, activation_rows, exp, maximum, norm_rows
from fast.threads import POOL, kernel, look, put, replace
from fast.workspace import biases, blocks, norm_of, whole_vectors
from tinygpt import aligned, layer_window, rotation

# A token meets every weight once: its time is that of reading them from memory. So the weights lie in the order in
# which they are read, and from the drawing of one token to that of the next there is neither Python nor a launch. The
# specification is `forward` with a cache, then `head_logits`, then `probabilities`. Sums run in the order of the
# sublayers' kernels: a text has the same bytes, whether it was read in blocks or token by token.
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
def call_step(typing_context, code, record, stages, stage, index, first, last, slot):
    """What `provide_step` compiled to this address."""

    def build(context, builder, signature, args):
        i64 = ir.IntType(64)
        function = ir.FunctionType(i64, [i64] * 7).as_pointer()
        return builder.call(builder.inttoptr(args[0], function), args[1:])

    return types.int64(*[types.int64] * 8), build


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


@part
def turn_heads(x, cos, sin, half):
    """`turn` of x (heads D,) at one position, heads side by side: cos and sin (D/2,)."""
    pairs = cos.size
    for low in range(0, x.size, 2 * pairs):
        for i in range(pairs):
            even, odd = (low + i, low + i + pairs) if half else (low + 2 * i, low + 2 * i + 1)
            x[even], x[odd] = turn_pair(x[even], x[odd], cos[i], sin[i])


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
        k, v, g, d = peek(key + i * size, 0, zero), peek(key + value + i * size, 0, zero), first + i // D, i % D
        kept = m.kv + (((t.layer * m.P + position) * 2 * m.G + first) * D + i) * size
        poke(kept, 0, k)
        poke(kept + value, 0, v)
        poke(keys + g * k_next + (d * m.Ps + position) * size, 0, k)
        poke(values + g * v_next + (position * m.Ds + d) * size, 0, v)
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
    """odds (V,) = e^((logits - top) / temperature), as in `probabilities`, where they are divided by their sum later.
    An ordered part divides as written: 1 / temperature may be infinite."""
    for v in range(logits.size):
        odd = exp(odds.dtype.type((float(logits[v]) - float(top)) / temperature))
        odds[v] = odd if logits[v] > -math.inf else odds.dtype.type(0)


@part
def together(odds, least, counted):
    """The sum of the odds that are at least `least`; their number if counted."""
    total = 0.0
    for v in range(odds.size):
        odd = 1.0 if counted else float(odds[v])
        total += odd if odds[v] >= least else 0.0
    return total


@part
def keep_likeliest(odds, counted, enough):
    """Top-k (counted) and top-p of `probabilities`, in place: all odds become 0 but the fewest and largest whose number
    or sum reaches `enough`, at least one. The specification sorts; bisection for the least of them takes less time."""
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

    return numba.cfunc(types.int64(*[types.int64] * 7), cache=True, **COMPILE)(stamped(step_of_dtype))


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
