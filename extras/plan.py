"""What fits: how many updates into --minutes, how many sequences at a time into --max-memory; and --recompute."""

import math
import os
import re
import time
from dataclasses import replace

import numpy as np

import bpe
import tinygpt
import train

# == 1  memory =========================================================================================================

BASE_MEMORY = 185 << 20  # bytes of a process without tensors: Python, NumPy, Numba, the kernels; measured on Linux


def memory_needed(cfg, micro_batch_size, recompute=False):
    """Bytes of the process at its peak: parameters, gradients, both moments, buffers of training and of evaluation."""
    from fast import workspace_layout

    def buffers(cfg, *shape):
        last = workspace_layout(cfg, *shape)[-1]
        return 4 * (last.offset + math.prod(last.shape))

    count = tinygpt.count_parameters(cfg)[0]
    evaluation = buffers(replace(cfg, layers=1), max(1, train.TOKENS_AT_ONCE // cfg.seq_len), cfg.seq_len)
    tensors = 4 * (4 * count + cfg.vocab_size * cfg.width) + count  # count bytes: the mask of finite numbers
    return BASE_MEMORY + tensors + evaluation + buffers(cfg, micro_batch_size, cfg.seq_len, recompute)


def least_memory(cfg):
    """Bytes of the process without buffers: parameters, gradients, both moments, all float32."""
    return BASE_MEMORY + 4 * 4 * tinygpt.count_parameters(cfg)[0]


def machine_memory():
    """Bytes of this machine's memory; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def size_in_bytes(text):
    """2G, 500M, 800000K -> bytes. ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG])i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size; expected a number with K, M or G, such as 2G")
    return int(float(match[1]) * 1024 ** (1 + "KMG".index(match[2].upper())))


def fit_memory(max_memory, s, cfg):
    """Settings whose process stays below max_memory, in bytes: fewer sequences at a time, then recomputed layers. None:
    the settings as they are, if this machine has the memory. ValueError if one sequence is too much."""
    if not max_memory:
        needed = memory_needed(cfg, s.micro_batch_size, s.recompute) if s.kernels == "fast" else least_memory(cfg)
        if needed > (there := machine_memory()):
            found = f"{s.size} needs {needed / 2**20:,.0f} MiB of memory, this machine has {there / 2**20:,.0f}"
            raise ValueError(f"{found}; take --max-memory {0.8 * there / 2**30:.1f}G or a smaller --size")
        return s
    if s.kernels != "fast":
        raise ValueError(f"--max-memory is about the buffers of --kernels fast; leave it out with {s.kernels}")
    fits = [n for n in train.divisors(s.batch_size) if n <= s.micro_batch_size]
    needed = {(again, n): memory_needed(cfg, n, again) for again in {s.recompute, True} for n in fits}
    within = [choice for choice in needed if needed[choice] <= max_memory]
    if not within:
        least = f"{min(needed.values()) / 2**20:,.0f} MiB"
        found = f"--max-memory {max_memory / 2**20:,.0f} MiB is too little: {s.size} needs {least}"
        raise ValueError(f"{found} with one sequence at a time and --recompute; take a smaller --size or --seq-len")
    recompute = min(within)[0]
    micro_batch_size = max(n for again, n in within if again == recompute)
    return replace(s, micro_batch_size=micro_batch_size, recompute=recompute)


def recomputed(ops):
    """The table whose sublayers keep their inputs alone: backward runs forward again. A third more work, less memory,
    the same bytes.   Chen et al. 2016, arXiv:1604.06174."""

    def again(layer):
        def forward_only(x, *where):
            return layer.forward(x, *where)[0], (x, where)

        def forward_then_backward(dy, cache, *where):
            x, arguments = cache
            return layer.backward(dy, layer.forward(x, *arguments)[1], *where)

        return tinygpt.Pair(forward_only, forward_then_backward)

    return replace(ops, attention_layer=again(ops.attention_layer), mlp_layer=again(ops.mlp_layer))


# == 2  time ===========================================================================================================

OVERHEAD = 0.03  # share of a timed run that evaluations, stories and checkpoints may take
MEASURED, MEASURED_MOST = 0.03, 30.0  # share of --minutes in which updates are timed; seconds of it at most


def plan_steps(minutes, s, cfg, valid_tokens, batches, ranks, started):
    """The number of updates that fit --minutes, counted from `started`; says when training and validation will end.
    Times updates of a model that is thrown away."""
    bpe.note("measuring the speed of this machine; the first time, kernels are compiled ...")
    state, ops = train.State(cfg, tinygpt.init_parameters(cfg, s.seed)), train.make_ops(s, cfg, ranks)

    def run_update(number):
        train.update(state, batches.get(number * s.batch_size, ranks.rows(s.batch_size)), ops, s, ranks)

    pace = measure_pace(run_update, 60 * minutes)
    passed = time.monotonic() - started
    if passed > 60 * minutes:
        bpe.note(
            f"--minutes {minutes:g} went into preparing, {bpe.clock(passed)}: one update is made; take more minutes"
        )
    steps = max(1, int((60 * minutes - passed) * (1 - OVERHEAD) / pace))
    scoring = scoring_seconds(valid_tokens, s.batch_size * cfg.seq_len / pace / ranks.count)
    bpe.note(
        f"planned: {steps:,} updates, training ends {bpe.clock(passed + seconds_left(steps, pace))} after the "
        f"start; then all {valid_tokens:,} validation tokens are scored, about {bpe.clock(scoring)} more"
    )
    return steps


def measure_pace(run_update, seconds):
    """Seconds that an update takes, from run_update(number) in MEASURED of so many `seconds`; number 0, which compiles
    kernels, does not count.

    A processor that has rested may be faster at first than it stays: the mean of the slower half counts.
    """
    run_update(0)
    ends = [time.monotonic()]
    while len(ends) < 5 or ends[-1] - ends[0] < min(MEASURED * seconds, MEASURED_MOST):
        run_update(len(ends))
        ends.append(time.monotonic())
    middle = len(ends) // 2
    halves = ends[: middle + 1], ends[middle:]
    return max((half[-1] - half[0]) / (len(half) - 1) for half in halves)


def seconds_left(updates, pace):
    """Seconds until these updates are made, with what stands between them."""
    return updates * pace / (1 - OVERHEAD)


def scoring_seconds(tokens, speed):
    """Seconds to score so many tokens in a process that trains `speed` tokens a second: there is no backward, which
    takes about 2/3 of an update."""
    return tokens / (2.5 * speed)


def flops_per_token(cfg):
    """Floating-point operations to train on one token: 2 for each weight of a product forward, 4 backward; causal
    attention sees T/2 keys on average, in two products forward and four backward (lookups count nothing)."""
    _, _, weights = tinygpt.count_parameters(cfg)
    tied, T, L = cfg.vocab_size * cfg.width * cfg.tied, cfg.seq_len, cfg.layers
    keys = sum(T / 2 if not (w := tinygpt.layer_window(cfg, i)) or w >= T else w - w * w / (2 * T) for i in range(L))
    return round(6 * (weights + tied) + 12 * keys * cfg.heads * cfg.head_width)


def measure_peak():
    """The machine's float32 product in FLOP/s: NumPy's BLAS, the best of ten products of 1024 x 1024."""
    a, best = np.ones((1024, 1024), np.float32), math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
