"""From logits to a token: `probabilities` and the draw in `generate`, of sample.py; decode.py calls it for each token.

The idea: no sort. Top-k and top-p of float32 logits take 35 and 140 us at V=32,000, NumPy's stable argsort, which the
specification calls, 2,040 (AMD Zen 4, shared machine, in turns, k=40, p=0.9). Greedy decoding does not even compute all
logits: section 2. Read from the top.
"""

import math

import numpy as np

from fast.jit import inlined, inlined_in_order
from fast.rows import exp, maximum
from fast.workspace import blocks

SCREEN_MARGIN = 0.51  # rounding error of an 8-bit weight in units: a half, and the rounding of the division

# == 1  drawing ========================================================================================================


@inlined
def add_offsets(logits, offsets):
    """`logits[list(banned)] = -math.inf`, and the head's bias; True if a logit, banned ones apart, is NaN."""
    one, zero, banned = logits.dtype.type(1), logits.dtype.type(0), logits.dtype.type(-math.inf)
    nans = zero  # of the logits' type: the loop vectorises
    for v in range(logits.size):
        logit = logits[v] + offsets[v] if offsets[v] > banned else banned
        nans += one if logit != logit else zero
        logits[v] = logit
    return nans > zero


@inlined
def penalise_seen(logits, seen, penalty):
    """The repetition penalty of `probabilities`, for the logits whose token was `seen`."""
    for v in range(logits.size):
        if seen[v] > 0:
            logits[v] = logits[v] / penalty if logits[v] > 0 else logits[v] * penalty


@inlined_in_order
def exponentiate_logits(logits, top, temperature, exp_logits):
    """`logits = (logits - logits.max()) / temperature; p = np.exp(logits)`; divided by their sum in `draw_token`.
    In order, to divide as written: 1 / temperature may be infinite."""
    for v in range(logits.size):
        e = exp(exp_logits.dtype.type((float(logits[v]) - float(top)) / temperature))
        exp_logits[v] = e if logits[v] > -math.inf else exp_logits.dtype.type(0)


@inlined
def sum_at_least(exp_logits, least, counted):
    """Sum of the elements that are at least `least`, in float64; if `counted`, their number."""
    total = 0.0
    for v in range(exp_logits.size):
        e = 1.0 if counted else float(exp_logits[v])
        total += e if exp_logits[v] >= least else 0.0
    return total


@inlined
def keep_likeliest(exp_logits, counted, enough):
    """top-k (`counted`) or top-p of `probabilities`: zero all but the fewest largest, whose number or sum is `enough`.

    The specification sorts. Here bisection finds the least element that is kept, to the last bit: `sum_at_least` falls
    as its threshold rises, and a pass is a vector loop. Of equal elements the first ones are kept."""
    low = middle = exp_logits.dtype.type(0)
    high = exp_logits.dtype.type(2)  # always: sum_at_least(low) >= enough > sum_at_least(high)
    while True:
        middle = (low + high) / exp_logits.dtype.type(2)
        if middle == low or middle == high:
            break
        if sum_at_least(exp_logits, middle, counted) >= enough:
            low = middle
        else:
            high = middle
    missing = enough - sum_at_least(exp_logits, high, counted)  # to be filled by elements that equal low
    for v in range(exp_logits.size):
        if exp_logits[v] < low or (exp_logits[v] < high and missing <= 0):
            exp_logits[v] = 0
        elif exp_logits[v] < high:
            missing -= 1.0 if counted else float(exp_logits[v])


@inlined
def draw_token(logits, uniform, filters, exp_logits):
    """The token that `uniform`, from 0 to 1, draws from `probabilities(logits)`; -1 if the largest is not finite.
    `filters`: those of `probabilities` from temperature to min-p; exp_logits (V,) is scratch memory."""
    temperature, top_k, top_p, min_p = filters
    top, token, cumulative, zero = maximum(logits), 0, 0.0, logits.dtype.type(0)
    if not math.isfinite(top):
        return -1
    while logits[token] != top:  # `logits.argmax()`
        token += 1
    if temperature > 0:
        exponentiate_logits(logits, top, temperature, exp_logits)
        if 0 < top_k < logits.size:
            keep_likeliest(exp_logits, True, float(top_k))
        if top_p < 1:
            keep_likeliest(exp_logits, False, top_p * sum_at_least(exp_logits, zero, False))
        if min_p > 0:
            for v in range(logits.size):  # the largest is exp(0) = 1
                exp_logits[v] = exp_logits[v] if float(exp_logits[v]) >= min_p else zero
        total = uniform * sum_at_least(exp_logits, zero, False)
        for v in range(logits.size):  # `np.searchsorted(cumulative, total, side="right")`
            if exp_logits[v] > 0:
                cumulative, token = cumulative + float(exp_logits[v]), v
                if cumulative > total:
                    break
    return token


# == 2  the 8-bit screen of a large head ===============================================================================
#
# Greedy decoding needs the largest logit alone. A quarter of the bytes gives each logit to within a known error; only
# the few that can be the largest are computed from the weights themselves. The token found is the same.


def quantise_head(head_w, panel):
    """(screen (panels, C, panel) int8, units (V',)): row v of head_w (V, C) is units[v] * its column of the screen,
    within SCREEN_MARGIN units; V' is V in whole panels."""
    (V, C), count = head_w.shape, blocks(len(head_w), panel)
    units = np.zeros(count * panel, head_w.dtype)
    units[:V] = np.abs(head_w).max(1) / 127
    screen = np.zeros((count * panel, C), np.int8)
    q = head_w / np.where(units > 0, units, 1)[:V, None]
    screen[:V] = np.rint(q, out=q)
    return np.ascontiguousarray(screen.reshape(count, panel, C).swapaxes(1, 2)), units


@inlined
def screen_error(n):
    """Bound on |logit - screened logit| in units of the row: the rounding of its weights, SCREEN_MARGIN * sum |n_c|,
    and that of two sums of C products."""
    total = n.dtype.type(0)
    for c in range(n.size):
        total += abs(n[c])
    return total * n.dtype.type(SCREEN_MARGIN + n.size * 127 * 2.0**-22)
