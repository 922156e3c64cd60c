"""Train a story-teller: batches of text, summed gradients, AdamW.

    python train.py --size 1m                           # TinyStories, or generated stories when there is no network
    python train.py --size 1m --data stories.txt --minutes 5

Part I is the algorithm: 1 batches, 2 AdamW, 3 learning rate, 4 the update, 5 the training loop, 6 evaluation.
Part II is the run: 7 settings, 8 data, 9 the run, 10 command line. What extras/ adds is found when it is used: data.py
keeps encoded text, plan.py plans by the clock, run.py and locks.py guard a run, resume.py and mpi.py are its flags.

It writes runs/NAME/: log.jsonl, last.safetensors (model, moments, position: `--resume` continues from it),
best.safetensors (the model alone, at its best validation), step-*.safetensors (`--keep`), loss.png.
"""

import sys

if __name__ == "__main__":
    sys.tracebacklimit = 0  # a Ctrl-C while modules are imported, or a module that is missing, is one line

import contextlib
import itertools
import json
import math
import os
import shlex
import signal
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bpe
import tinygpt
from bpe import Parser, Progress, error_line, find_extra, in_range, note, say
from sample import generate_story
from tinygpt import KERNELS, THREADS, kernel

# ######################################################################################################################
# Part I: the algorithm
# ######################################################################################################################


# == 1  batches ========================================================================================================
#
# Each token of the text is a target once an epoch. Its input is the token before it; the first token's input is the
# end of a story. Each epoch cuts the text into windows of T targets, offset and order drawn from (seed, epoch).


def window(tokens, first, stop, T, end, mask=None):
    """The targets tokens[first:stop], at most T -> inputs and targets (T,) int64, weights (T,) float32.

    Every window has T targets, or all tokens of a shorter text. Targets outside first .. stop - 1 have weight 0: they
    count in another window. So do those whose mask (M,) is False. One that would reach beyond the text starts earlier.
    """
    start = max(0, min(first, len(tokens) - T))
    targets = np.asarray(tokens[start : start + T], np.int64)
    inputs = np.concatenate([[tokens[start - 1] if start else end], targets[:-1]])
    positions = np.arange(start, start + T)
    weights = ((first <= positions) & (positions < stop)).astype(np.float32)
    return inputs, targets, weights if mask is None else weights * mask[start : start + T]


class Batches:
    """The windows of all epochs, numbered. For a text and a T, any of them follows from (seed, number): there is no
    random state to save, and a run resumes anywhere. A text with a mask is cut at multiples of T in every epoch."""

    def __init__(self, tokens, T, end, seed, mask=None):
        self.tokens, self.T, self.end, self.seed, self.mask = tokens, T, end, seed, mask
        self.per_epoch = -(-len(tokens) // T) + (mask is None)  # the first and last may be short, the last empty
        self.epoch = None

    def begin_epoch(self, epoch):
        """Draw where the windows of an epoch are cut, and their order. ValueError if a mapped file has become shorter:
        reading beyond its end would kill the process."""
        tokens = self.tokens
        if isinstance(tokens, np.memmap) and os.path.getsize(tokens.filename) < tokens.nbytes:
            raise ValueError(f"{tokens.filename} was cut short while it was read: restore it, then --resume")
        rng = np.random.Generator(np.random.Philox(key=[self.seed, (1 << 32) + epoch]))  # 0, 1: weights, sampling
        self.epoch, self.offset = epoch, int(rng.integers(1, self.T + 1)) if self.mask is None else self.T  # first stop
        self.order = rng.permutation(self.per_epoch)

    def get(self, first, count):
        """Windows first .. first + count - 1 -> inputs, targets, weights (count, T)."""
        rows = []
        for number in range(first, first + count):
            epoch, position = divmod(number, self.per_epoch)
            if epoch != self.epoch:
                self.begin_epoch(epoch)
            stop = self.offset + int(self.order[position]) * self.T
            start = max(0, stop - self.T)
            rows.append(window(self.tokens, start, min(stop, len(self.tokens)), self.T, self.end, self.mask))
        return tuple(np.stack(column) for column in zip(*rows))


# == 2  AdamW ==========================================================================================================
#
# Loshchilov & Hutter 2019, arXiv:1711.05101. Parameters, gradient and both moments are flat buffers of one layout, in
# which the matrices, embeddings among them, come first: p[:decayed]. They decay, by lr * weight_decay as in PyTorch;
# gains and biases do not. `adamw` is the specification: --kernels numpy runs it, and the kernel is tested against it.

ADAM_EPS = 1e-8


def adamw(p, g, m, v, step, *, lr, beta1=0.9, beta2=0.999, weight_decay=0.01, decayed=None, scale=1.0):
    """Update number `step` (from 1) of p, m, v (count,) in place by the gradient g * scale; then g = 0. p[:decayed]
    decays, all of p if decayed is None."""
    gradient = g * scale
    m[:] = beta1 * m + (1 - beta1) * gradient
    v[:] = beta2 * v + (1 - beta2) * gradient * gradient
    change = m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + ADAM_EPS)
    change[:decayed] += weight_decay * p[:decayed]
    p -= lr * change
    g[:] = 0


NORM_BLOCK = 1 << 16  # elements whose squares are summed at a time


@kernel
def adamw_kernel(first, last, p, g, m, v, decayed, rates):
    """`adamw` for the elements first .. last - 1; rates: those of `State.adamw`, in its order."""
    (scale, lr, decay, beta1, beta2, fix1, fix2, eps), dtype = rates, p.dtype.type
    b1, b2, c1, c2 = dtype(beta1), dtype(beta2), dtype(1 - beta1), dtype(1 - beta2)
    # first the elements that decay, then those that do not; either range may be empty
    for start, stop, keep in ((first, min(last, decayed), 1 - lr * decay), (max(first, decayed), last, 1.0)):
        for i in range(start, stop):
            gradient = g[i] * dtype(scale)
            m[i] = b1 * m[i] + c1 * gradient
            v[i] = b2 * v[i] + c2 * gradient * gradient
            p[i] = dtype(keep) * p[i] - dtype(lr * fix1) * m[i] / (np.sqrt(v[i] * dtype(fix2)) + dtype(eps))
            g[i] = 0


@kernel
def norm_kernel(first, last, x, squares):
    """squares[i] = the sum of squares of block i of x, in float64, for the blocks first .. last - 1."""
    for i in range(first, last):
        total = 0.0
        for j in range(i * NORM_BLOCK, min((i + 1) * NORM_BLOCK, x.size)):
            total += np.float64(x[j]) * np.float64(x[j])
        squares[i] = total


def clip_gradients(gradient, max_norm, compiled=True):
    """Scale a gradient (count,) in place so that its norm is at most max_norm (0 is off) -> its norm before. Summed in
    float64, block after block: the same for any number of threads."""
    squares = np.empty(-(-gradient.size // NORM_BLOCK)) if compiled else np.square(gradient, dtype=np.float64)
    if compiled:
        THREADS.run(norm_kernel, squares.size, gradient, squares)
    norm = math.sqrt(float(squares.sum()))
    if max_norm and max_norm < norm < math.inf:
        gradient *= gradient.dtype.type(max_norm / norm)
    return norm


class State:
    """What training changes: parameters, gradient, both moments (flat buffers) and the number of updates made."""

    def __init__(self, cfg, parameters):
        self.cfg, self.parameters, self.step = cfg, parameters, 0
        self.p = tinygpt.views(tinygpt.layout(cfg), parameters, cfg.layers)
        self.gradient, self.grads = tinygpt.zero_gradients(cfg, parameters.dtype)
        self.m, self.v = np.zeros_like(parameters), np.zeros_like(parameters)
        self.decayed = tinygpt.count_parameters(cfg)[1]

    def adamw(self, lr, scale, s, compiled=True):
        """Apply AdamW to gradient * scale; the gradient is zero afterwards."""
        self.step += 1
        buffers = (self.parameters, self.gradient, self.m, self.v)
        if not compiled:
            rates = {"lr": lr, "beta1": s.beta1, "beta2": s.beta2, "weight_decay": s.weight_decay, "scale": scale}
            return adamw(*buffers, self.step, **rates, decayed=self.decayed)
        fix1, fix2 = 1 / (1 - s.beta1**self.step), 1 / (1 - s.beta2**self.step)  # bias correction
        rates = (float(scale), lr, float(s.weight_decay), s.beta1, s.beta2, fix1, fix2, ADAM_EPS)
        THREADS.run(adamw_kernel, self.parameters.size, *buffers, self.decayed, rates)


# == 3  learning rate ==================================================================================================

SCHEDULES = ("cosine", "linear", "constant", "wsd", "restarts")
WSD_DECAY = 0.2  # share of the updates in which wsd falls: warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395
RESTARTS = 4  # cosines, one after the other; Loshchilov & Hutter 2017, arXiv:1608.03983


def learning_rate(step, s):
    """The rate of update `step`, from 0. Warm-up is a straight line from lr / warmup_steps at step 0 to lr at step
    warmup_steps - 1. Then `cosine` and `linear` fall to min_lr at step s.steps - 1, `wsd` does so in the last fifth of
    all updates, `restarts` falls four times, beginning at lr each time, and `constant` stays at lr."""
    if step < s.warmup_steps:
        return s.lr * (step + 1) / s.warmup_steps
    share = min(1, (step - s.warmup_steps) / max(1, s.steps - 1 - s.warmup_steps))  # of the updates after warm-up
    if s.schedule == "constant":
        return s.lr
    if s.schedule == "wsd":
        fallen = min(1, max(0, (step + 1 - (1 - WSD_DECAY) * s.steps) / (WSD_DECAY * s.steps)))  # 0: lr, 1: min_lr
    elif s.schedule == "linear":
        fallen = share
    else:
        if s.schedule == "restarts" and share < 1:
            share = RESTARTS * share % 1
        fallen = (1 - math.cos(math.pi * share)) / 2
    return s.lr + (s.min_lr - s.lr) * fallen


# == 4  the update =====================================================================================================


class OneProcess:
    """The only process of a run. extras/mpi.py has the same methods for several ("ranks") that share each update."""

    rank, count, threads = 0, 1, None  # threads: of this rank, None is the default

    def rows(self, batch_size):
        """Sequences of an update that each rank computes."""
        return batch_size

    def sum(self, x):
        """Sum an array over the ranks, in place."""
        return x

    def any(self, flag):
        """True if the flag is set on any rank."""
        return bool(flag)

    def on_rank_0(self, function):
        """Call it on rank 0 alone -> its result, on every rank."""
        return function()

    open_run = on_rank_0  # -> the run, on every rank

    def abort(self, error):
        """End all other ranks."""


ALONE = OneProcess()


def update(state, batch, ops, s, ranks=ALONE, stopped=lambda: False):
    """Make one update from inputs, targets, weights (rows, T) -> loss (nats per target), gradient norm, learning rate.

    Gradient accumulation: each micro-batch adds the gradient of its loss, a sum over targets, to one buffer. Once per
    update, norm and gradient are divided by the number of targets of all micro-batches and ranks, the gradient by
    AdamW's `scale`. So the size of micro-batches changes rounding at most (with fast/ not even that).
    FloatingPointError if loss or norm is not finite; None if `stopped()` before a micro-batch of any rank. In both
    cases only the gradient buffer has changed.
    """
    rows = len(batch[0])
    micro = math.gcd(rows, s.micro_batch_size)  # divides rows; one of several ranks may have fewer than asked
    sums = np.array([batch[2].sum(), 0, 0], np.float64)  # targets, their nats, requests to stop
    for first in range(0, rows, micro):
        sums[2] = stopped()
        if sums[2]:
            break
        part = [column[first : first + micro] for column in batch]
        dropout = tinygpt.Dropout(s.seed, state.step, ranks.rank * rows + first)
        _, nats = tinygpt.loss_and_gradients(state.p, *part, state.grads, state.cfg, ops, dropout)
        for row in (nats * part[2]).sum(-1, dtype=np.float64):  # row by row, so that micro-batches change no byte
            sums[1] += row
    targets, nats, halted = ranks.sum(sums).tolist()
    if halted:
        return None
    tinygpt.add_lookup_gradient(state.grads)  # embed_w's second gradient, kept apart until all micro-batches are in
    ranks.sum(state.gradient)
    targets = max(1, targets)  # if all windows are empty, weights only decay
    compiled = ops.name != "numpy"  # the specification compiles nothing
    norm = clip_gradients(state.gradient, s.grad_clip * targets, compiled) / targets  # one norm for all tensors
    loss, lr = nats / targets, learning_rate(state.step, s)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(f"loss is {loss:.4g} at step {state.step + 1} (lr {lr:.1e}, grad norm {norm:.4g})")
    state.adamw(lr, 1 / targets, s, compiled)
    return loss, norm, lr


# == 5  the training loop ==============================================================================================


def train(run, batches, ops, ranks=ALONE, stopped=lambda: False):
    """Update until s.steps. Returns True if it got there, False if it was stopped. Both leave a checkpoint.

    Evaluation and saving that are due after an update happen at the top of the next turn: a run that was stopped or
    killed in between resumes with them.
    """
    s, state = run.settings, run.state
    rows = ranks.rows(s.batch_size)
    while not ranks.any(stopped()):
        if run.evaluation_is_due():
            figures = ranks.on_rank_0(lambda: run.evaluate(stopped))
            stories = ranks.on_rank_0(lambda: run.generate_stories(stopped))
            if figures is None or stories is None:  # stopped in between: --resume does both again
                break
            run.record_evaluation(*figures, stories)
        if run.save_is_due():
            run.save()
        if state.step >= s.steps:
            return True
        start = time.monotonic()
        batch = batches.get(state.step * s.batch_size + ranks.rank * rows, rows)
        result = update(state, batch, ops, s, ranks, stopped)
        if result is None:
            break
        run.record_update(*result, time.monotonic() - start)
    run.save()
    return False


# == 6  evaluation =====================================================================================================

TOKENS_AT_ONCE = 2048  # in a forward here and in a default micro-batch: twice as many are at most 3% faster


def score(p, cfg, tokens, end, ops, stride=None, at_once=None, progress=None):
    """tokens (M,) -> nats of each, (M,) float64, given those before it in a window of T = cfg.seq_len.

    A window ends `stride` tokens after the one before it and scores the tokens in between. By default windows are end
    to end; with a smaller stride each token beyond the first window sees at least T - stride before it, at more cost.
    `at_once` windows are scored together: memory only, same result.
    """
    M, T = len(tokens), min(cfg.seq_len, len(tokens))
    stride, at_once = min(stride or T, T), at_once or max(1, TOKENS_AT_ONCE // T)
    stops = [min(stop, M) for stop in range(T, M + stride, stride)]
    nats, ops_of_size, first = np.empty(M), {}, 0
    for number in range(0, len(stops), at_once):
        part = stops[number : number + at_once]
        starts = [first, *part[:-1]]
        # the text is cut at `stop`, so that the window ends there; tokens before `start` are scored already: weight 0
        rows = [window(tokens[:stop], start, stop, T, end) for start, stop in zip(starts, part)]
        inputs, targets, weights = (np.stack(column) for column in zip(*rows))
        if len(rows) not in ops_of_size:
            ops_of_size[len(rows)] = tinygpt.with_buffers(ops, cfg, len(rows), T, p["embed_w"].dtype, backward=False)
        _, found = tinygpt.loss_and_gradients(p, inputs, targets, weights, None, cfg, ops_of_size[len(rows)])
        nats[first : part[-1]] = found[weights > 0]  # row after row: in the order of the text
        first = part[-1]
        if progress:
            progress(first)
    return nats


def evaluate(p, cfg, tokens, end, ops, limit=None, progress=None, mask=None):
    """Nats per token over windows end to end, each target once; of the first `limit` tokens, of those in the mask."""
    nats = score(p, cfg, tokens[:limit], end, ops, progress=progress)
    nats = nats if mask is None else nats[mask[: len(nats)]]
    return float(nats.sum()) / len(nats)


def count_bytes(tokens, tokenizer):
    return int(np.bincount(tokens, minlength=tokenizer.vocab_size) @ tokenizer.byte_lengths())


def bits_per_byte(nats, tokens, tokenizer):
    """nats per token over `tokens` -> bits per byte of their text: the figure that compares across tokenizers."""
    return nats * len(tokens) / math.log(2) / max(1, count_bytes(tokens, tokenizer))


# ######################################################################################################################
# Part II: the run
# ######################################################################################################################


# == 7  settings =======================================================================================================

DTYPES = ("float32", "bfloat16")
EVALUATED = 0.05  # tokens of an evaluation for each token trained since the one before: 1/3 of the work
COUNT, SEQUENCES = in_range(int, 1, 2**31 - 1), in_range(int, 1, 2**16)


def flag(default, meaning, kind=None, **more):
    """A field of `Settings` that a flag of its name gives; kind is the flag's argparse type."""
    return field(default=default, metadata=more | ({"type": kind} if kind else {}) | {"help": meaning})


@dataclass(frozen=True)
class Settings:
    """What a run is. Made once, before the first update; every checkpoint and the log hold it as JSON."""

    batch_size: int = flag(8, "sequences per update", SEQUENCES, metavar="N")
    micro_batch_size: int = flag(8, "sequences at a time: memory only (default 2048 tokens)", SEQUENCES, metavar="N")
    recompute: bool = flag(False, "run layers forward again in backward: less memory, same result", action="store_true")
    lr: float = flag(0.0, "the highest learning rate (default that of the size)", in_range(float, 0, 1e3, True))
    min_lr: float = flag(0.0, "the last learning rate (default a tenth of --lr)", in_range(float, 0, 1e3))
    warmup_steps: int = flag(0, "of rising rate; < 1: a share (default 100)", in_range(float, 0, 1e9), metavar="N")
    schedule: str = flag("cosine", "of the rate after it", choices=SCHEDULES)
    weight_decay: float = flag(0.1, "of matrices; 0 is off", in_range(float, 0, 10))
    beta1: float = flag(0.9, "decay of AdamW's mean", in_range(float, 0, 0.9999))
    beta2: float = flag(0.99, "decay of its mean square", in_range(float, 0, 0.99999))
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 is off", in_range(float, 0, 1e9))
    dropout: float = flag(0.0, "of attention, its output and the MLP's; 0 is off", in_range(float, 0, 0.99))
    seed: int = flag(0, "of weights, data order and dropout", in_range(int, 0, 2**63 - 1))
    kernels: str = flag("fast", "table of ops (default the fastest that is here)", choices=KERNELS)
    dtype: str = flag("float32", "of products; auto: bfloat16 if the CPU has it", choices=("auto", *DTYPES))
    eval_every: int = flag(1, "updates between evaluations (default a tenth of the run)", COUNT, metavar="N")
    save_every: float = flag(20.0, "seconds between checkpoints", in_range(float, 0, 1e6), metavar="S")
    keep: int = flag(0, "checkpoints that stay, evenly over the run", in_range(int, 0, 10**6), metavar="N")
    instruction: str = ""  # that multiplies bf16
    steps: int = 1  # updates
    eval_tokens: int = 1  # of the validation text, scored at each evaluation
    prompts: list = field(default_factory=list)
    size: str = ""
    init_from: str = ""  # checkpoint that the model began with
    data: str = ""
    files: list = field(default_factory=lambda: [[], []])  # token files: those of training, those of validation
    checksums: dict = field(default_factory=dict)  # of `Data`
    train_tokens: int = 1
    flags: dict = field(default_factory=dict)  # `flags_given`


def choose_settings(args, cfg, steps=1):
    """`Settings` of a run of so many updates, without those of its data. ValueError if flags contradict each other."""
    given = {f.name: x for f in fields(Settings) if f.metadata and (x := getattr(args, f.name)) is not None}
    chosen = {"batch_size": Settings.batch_size} | own_recipe(args, cfg) | given | {"steps": steps}
    warmup = chosen.get("warmup_steps", min(100, steps // 10))
    chosen["warmup_steps"] = int(warmup if warmup >= 1 else warmup * steps)
    if chosen.setdefault("min_lr", chosen["lr"] / 10) > chosen["lr"]:
        raise ValueError(f"--min-lr {chosen['min_lr']} is above --lr {chosen['lr']}")
    batch_size = chosen["batch_size"]
    micro = chosen.setdefault("micro_batch_size", usual_micro_batch(batch_size, cfg.seq_len))
    if batch_size % micro:
        options = " or ".join(str(n) for n in divisors(batch_size) if micro / 3 < n < 3 * micro) or batch_size
        raise ValueError(f"--micro-batch-size {micro} does not divide --batch-size {batch_size}; try {options}")
    kernels, instruction = tinygpt.find_ops(args.kernels).name, ""
    if kernels == "fast" and args.dtype != "float32":
        from fast import find_bf16

        instruction = find_bf16()[0] or ""
    elif args.dtype == "bfloat16":
        tinygpt.find_ops(kernels, args.dtype)  # which says why there is none
    every = chosen.setdefault("eval_every", max(1, steps // 10))
    eval_tokens = max(4 * cfg.seq_len, int(EVALUATED * (every * batch_size * cfg.seq_len)))
    chosen |= {"kernels": kernels, "dtype": "bfloat16" if instruction else "float32", "instruction": instruction}
    chosen |= {"eval_tokens": eval_tokens, "flags": flags_given(args)}
    return Settings(**chosen, prompts=args.prompt or [], size=size_of(args), init_from=args.init_from or "")


def size_of(args):
    return args.size or ("tuned" if args.init_from else "1m")


def own_recipe(args, cfg):
    """The settings of a size that no flag gives: ours, for minutes on a laptop, or those of --recipe published."""
    if args.recipe:
        return find_extra("recipes", "--recipe").published_recipe(size_of(args), cfg)
    return {"lr": own_rate(cfg) / (10 if args.init_from else 1)}  # a trained model loses less of what it knows


def own_rate(cfg):
    return min(0.012, 1.2 / cfg.width)  # small updates, high rates: best where time is short; the wider, the lower


def divisors(batch_size):
    return [n for n in range(1, batch_size + 1) if batch_size % n == 0]


def usual_micro_batch(batch_size, T):
    return max(n for n in divisors(batch_size) if n == 1 or n * T <= TOKENS_AT_ONCE)


def flags_given(args):
    """{name: value} of the flags that decide what a run is: --resume takes no others than those it began with."""
    free = ("out", "resume", "threads")
    return {name: x for name, x in vars(args).items() if name not in free and x is not None and x is not False}


# == 8  data ===========================================================================================================

RESERVED = 8  # special tokens that a trained tokenizer keeps for templates
HELD_OUT = 0.02  # share of the text that validates where no --val-data is named


class Data(NamedTuple):
    tokenizer: bpe.Tokenizer
    train: np.ndarray  # token ids, (M,)
    valid: np.ndarray
    name: str
    files: list = [[], []]  # token files of the two, each a list of paths; none for validation: held out
    checksums: dict = {}  # path of a token file -> what extras/data.py knows it by
    masks: tuple = (None, None)  # of train and valid (M,): which targets count, from NAME.bin.mask; None is all
    metadata: dict = {}  # of every checkpoint


def prepare_data(args, draft, cfg, steps, tokenizer):
    """What the command line names -> `Data`. ValueError or OSError if it is missing or no text.

    extras/data.py does it for any sources, once: it keeps tokenizers and token files. Alone, this file takes text.
    """
    if extra := find_extra("data"):
        return extra.prepare_data(args, draft, cfg, steps, tokenizer)
    if not args.data or args.val_data or args.tokenizer:
        raise ValueError("extras/data.py is not here: name a text with --data FILE, and no --val-data or --tokenizer")
    tokenizer = tokenizer or train_tokenizer(bpe.pieces(args.data), args.vocab_size or cfg.vocab_size)
    tokens = np.concatenate([ids for ids, _, _ in tokenizer.encode_documents(bpe.pieces(args.data))])
    cut = round((1 - HELD_OUT) * len(tokens))
    return Data(tokenizer, tokens[:cut], tokens[cut:], " ".join(args.data))


def train_tokenizer(pieces, vocab_size):
    """A tokenizer of vocab_size entries, or fewer where the text gives fewer. ValueError if they are too few."""
    fixed = 256 + 1 + RESERVED
    if vocab_size < fixed:
        parts = f"256 bytes, the end of a story and {RESERVED} reserved tokens"
        raise ValueError(f"--vocab-size {vocab_size} is below {fixed}: {parts}")
    note("learning the tokenizer of this text and encoding it, once; the first time, kernels are compiled ...")
    return bpe.Tokenizer.from_merges(bpe.train(pieces, vocab_size - fixed), RESERVED)


def check_lengths(data, T):
    """data. ValueError if its text is too short for windows of T tokens."""
    for what, tokens, least in (("training", data.train, T), ("validation", data.valid, 2)):
        if len(tokens) < least:
            found = f"the {what} text has {len(tokens)} tokens, less than one window of T={T}"
            shorter = max(1, 1 << (len(tokens) // 2).bit_length())
            raise ValueError(f"{data.name}: {found}; use more text or --seq-len {shorter}")
    return data


# == 9  the run ========================================================================================================


class Run:
    """A run and its folder: the log, the checkpoints, what the terminal shows. Ranks above 0 have no log and write
    nothing. extras/run.py adds what a long run needs."""

    def __init__(self, folder, settings, state, data, processes=1):
        self.folder, self.settings, self.state, self.data = folder, settings, state, data
        self.processes, self.tokenizer_json, self.log = processes, data.tokenizer.to_json(), None
        self.ops = tinygpt.find_ops(settings.kernels, settings.dtype)  # without the buffers of training
        self.best, self.evaluated = math.inf, 0  # bits per byte; step of the last evaluation
        self.saved, self.saved_at = None, -math.inf  # (step, evaluated) of last.safetensors; its time
        self.started, self.shown = time.monotonic(), -math.inf  # time of the last update that was shown

    def begin(self, args):
        """Begin the log. `args`: the command line that the settings come from."""
        self.log = open(self.folder / "log.jsonl", "w", encoding="utf-8", newline="\n")
        self.write(settings=asdict(self.settings), config=asdict(self.state.cfg))

    def describe(self):
        """Show what will be trained, on what, how."""
        lost = "extras/ is not here: no lock on the run, no plan by the clock, no --resume, no loss curve"
        note(f"{lost}\n{self.state.cfg}\n{self.settings}\nprecision {self.settings.dtype}")

    def write(self, **entry):
        """Append a line to the log."""
        if self.log:
            print(json.dumps(entry), file=self.log, flush=True)

    def record_update(self, loss, norm, lr, seconds):
        """Log an update that took so long; every two seconds, show it."""
        s, step, now = self.settings, self.state.step, time.monotonic()
        tokens = s.batch_size * self.state.cfg.seq_len
        self.write(step=step, loss=loss, lr=lr, norm=norm, tokens=step * tokens, seconds=round(now - self.started, 3))
        if self.log and (now - self.shown > 2 or step == s.steps):
            self.shown, speed = now, self.describe_speed(tokens, seconds)
            note(f"step {step} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {speed}")

    def describe_speed(self, tokens, seconds):
        return f"{tokens / seconds:,.0f} tok/s"

    def evaluation_is_due(self):
        step, s = self.state.step, self.settings
        return step > self.evaluated and (step % s.eval_every == 0 or step == s.steps)

    def evaluate(self, stopped):
        """Score the beginning of the validation text -> (nats per token, bits per byte); None if `stopped()`."""
        return None if stopped() else self.score(self.data.valid[: self.settings.eval_tokens])

    def score(self, tokens, progress=None):
        """The first M validation tokens (M,) -> (nats per token, bits per byte), of those that count."""
        state, tokenizer, ops, mask = self.state, self.data.tokenizer, self.ops, self.data.masks[1]
        nats = evaluate(state.p, state.cfg, tokens, tokenizer.end, ops, progress=progress, mask=mask)
        return nats, bits_per_byte(nats, tokens if mask is None else tokens[mask[: len(tokens)]], tokenizer)

    def generate_stories(self, stopped):
        """A story for each --prompt; None if `stopped()`."""
        s, stories = self.settings, []
        for prompt in s.prompts:
            if stopped():
                return None
            model, ops = (self.state.p, self.state.cfg, self.data.tokenizer), tinygpt.find_ops(s.kernels)
            stories.append(prompt + "".join(generate_story(model, ops, prompt, s.seed, 120, temperature=0.8)))
        return stories

    def record_evaluation(self, nats, bits, stories):
        """Log and show an evaluation; keep the model if it is the best."""
        self.evaluated = self.state.step
        if not self.log:
            return
        self.write(step=self.state.step, val_nats=nats, val_bits_per_byte=bits, stories=stories)
        first = min(self.settings.eval_tokens, len(self.data.valid))
        note(f"step {self.state.step} | validation {nats:.4f} nats/token, {bits:.4f} bits/byte (first {first:,})")
        for story in stories:
            say(story)
        if bits < self.best:
            self.best = bits
            self.write_checkpoint("best.safetensors")

    def save_is_due(self):
        """True after the last update, and every `save_every` seconds."""
        if not self.log or (self.state.step, self.evaluated) == self.saved:
            return False
        return self.state.step == self.settings.steps or time.monotonic() - self.saved_at > self.settings.save_every

    def save(self, name="last.safetensors"):
        """Write what a run is resumed from: the model, both moments, the position."""
        if not self.log:
            return
        self.log.flush()
        os.fsync(self.log.fileno())  # the checkpoint holds a position in the log: it must get there first
        place = {"step": self.state.step, "log_bytes": os.path.getsize(self.log.name), "evaluated": self.evaluated}
        metadata = {name: str(x) for name, x in place.items()} | {"best": repr(self.best)}
        metadata["settings"] = json.dumps(asdict(self.settings))
        self.write_checkpoint(name, {"moment1": self.state.m, "moment2": self.state.v}, metadata)
        self.saved, self.saved_at = (self.state.step, self.evaluated), time.monotonic()

    def write_checkpoint(self, name, tensors=None, metadata=None):
        model = (self.state.parameters, self.state.cfg, self.tokenizer_json)
        tinygpt.save_checkpoint(self.folder / name, *model, tensors, self.data.metadata | (metadata or {}))

    def last_good(self):
        """Where to resume from, for the line that ends a run."""
        return f"last good checkpoint: {self.folder / 'last.safetensors'}, step {self.saved[0]}" if self.saved else ""

    def finish(self):
        """Score all validation tokens."""
        with Progress("validation", len(self.data.valid)) as progress:
            nats, bits = self.score(self.data.valid, progress)
        self.write(step=self.state.step, final_val_nats=nats, final_val_bits_per_byte=bits, tokens=len(self.data.valid))
        note(f"validation, every token: {nats:.4f} nats/token, {bits:.4f} bits/byte")


def begin_run(args, ranks, started):
    """A fresh run. ValueError or OSError if it cannot begin; then it leaves no folder."""
    if extra := find_extra("run", "--keep" if args.keep else None):
        extra.check_out(args)
    tokenizer = parameters = None
    if args.init_from:
        cfg, tokenizer, parameters = find_extra("initial", "--init-from").load_initial_model(args)
    else:
        cfg = tinygpt.find_size(size_of(args)).changed(**tinygpt.overrides(args.set or []))
        cfg = cfg.changed(seq_len=args.seq_len or cfg.seq_len)
    draft = choose_settings(args, cfg)  # flags that contradict each other are refused before text is read
    ranks.rows(draft.batch_size)
    if draft.dropout:
        cfg = cfg.changed(attention_dropout=draft.dropout, out_dropout=draft.dropout, mlp_dropout=draft.dropout)
    steps = args.steps or (None if args.epochs or args.minutes else own_recipe(args, cfg).get("steps"))
    planned = args.minutes or args.recompute or args.max_memory
    plan = find_extra("plan", "--minutes, --recompute or --max-memory" if planned else None)
    memory = plan.size_in_bytes(args.max_memory) if args.max_memory else None  # refused now, not after text is read
    data = check_lengths(prepare_data(args, draft, cfg, steps, tokenizer), cfg.seq_len)
    for prompt in draft.prompts:
        data.tokenizer.encode(prompt)  # refused now, not at the first evaluation
    cfg = cfg if args.init_from else cfg.changed(vocab_size=data.tokenizer.vocab_size)
    draft = plan.fit_memory(memory, draft, cfg) if plan else draft
    batches = Batches(data.train, cfg.seq_len, data.tokenizer.end, draft.seed, data.masks[0])
    if plan and not steps and not args.epochs:
        steps = plan.plan_steps(args.minutes or 5, draft, cfg, len(data.valid), batches, ranks, started)
    steps = steps or math.ceil((args.epochs or 1) * batches.per_epoch / draft.batch_size)
    known = {name: getattr(draft, name) for name in ("micro_batch_size", "recompute")}
    known |= {"data": data.name, "files": data.files, "checksums": data.checksums, "train_tokens": len(data.train)}
    s = replace(choose_settings(args, cfg, steps), **known)
    parameters = tinygpt.init_parameters(cfg, s.seed) if parameters is None else parameters
    run = (extra.Run if extra else Run)(make_folder(args), s, State(cfg, parameters), data, ranks.count)
    run.begin(args)
    return run


def make_folder(args):
    """The folder of a fresh run: --out, or the first of runs/SIZE, runs/SIZE-2, ... that is not there."""
    for number in itertools.count(1):
        folder = args.out or Path("runs", size_of(args) + (f"-{number}" if number > 1 else ""))
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True, exist_ok=folder == args.out)
            return folder


def make_ops(s, cfg, ranks):
    """The table of ops that trains, with buffers for a micro-batch."""
    micro, ops = math.gcd(ranks.rows(s.batch_size), s.micro_batch_size), tinygpt.find_ops(s.kernels, s.dtype)
    ops = find_extra("plan", "--recompute").recomputed(ops) if s.recompute else ops
    return tinygpt.with_buffers(ops, cfg, micro, cfg.seq_len, np.float32, s.recompute)


# == 10  command line ==================================================================================================


def command(*words):
    return shlex.join(["python", *map(str, words)])


MPIEXEC_SETS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")  # Open MPI's, MPICH's, Intel's


def join_ranks():
    """The processes of this run: those that mpiexec started, or this one alone. ValueError without MPI."""
    count = max(int(os.environ.get(name) or 1) for name in MPIEXEC_SETS)
    return find_extra("mpi", "mpiexec").Ranks(count) if count > 1 else ALONE


def make_parser():
    parser = Parser(prog="train.py", description="Train a story-teller on text. Without --data: on TinyStories.")
    add, positive = parser.add_argument_group("what").add_argument, in_range(float, 0, 1e6, open_low=True)
    add("--size", metavar="SIZE", help="shape of the model; --list-sizes prints all (default 1m)")
    add("--data", nargs="+", metavar="FILE", help="text, .jsonl, .json, token files or folders; default TinyStories")
    add("--val-data", nargs="+", metavar="FILE", help="validation text; default the last 2%% of the training text")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json; default one that is trained on the training text")
    add("--vocab-size", type=COUNT, metavar="V", help="tokens of a trained tokenizer, specials included (default 4096)")
    add("--seq-len", type=COUNT, metavar="T", help="tokens in a window (default that of the size)")
    add("--list-sizes", action="store_true", help="print every size, what it takes, and the fields of --set")
    add("--set", nargs="+", action="extend", metavar="FIELD=VALUE", help="other fields of the model's Config")
    add("--init-from", metavar="CHECKPOINT", help="begin with this model and its tokenizer, at a tenth of the rate")
    add = parser.add_argument_group("how long (default --minutes 5)").add_mutually_exclusive_group().add_argument
    add("--steps", type=COUNT, metavar="N", help="updates")
    add("--epochs", type=positive, metavar="E", help="passes over the training text")
    add("--minutes", type=positive, metavar="M", help="to the end of training; then all validation text is scored")
    add = parser.add_argument_group("how").add_argument
    for f in fields(Settings):
        if f.metadata:
            default = "" if "default" in f.metadata["help"] or f.default is False else f" (default {f.default})"
            name = f.name.replace("_", "-")
            add(f"--{name}", **f.metadata | {"help": f.metadata["help"] + default.replace("float32", "auto")})
    add("--max-memory", metavar="SIZE", help="of the process, as 2G: fewer sequences at a time")
    add("--recipe", choices=["published"], help="train as the authors of --size did, not for minutes on a laptop")
    add("--threads", type=in_range(int, 1, 1024), metavar="N", help="same result with any number (default all cores)")
    add = parser.add_argument_group("the run").add_argument
    add("--out", type=Path, metavar="FOLDER", help="of the run (default runs/SIZE, runs/SIZE-2, ...)")
    add("--resume", action="store_true", help="go on with the run in --out (default the newest); without one, begin it")
    add("--prompt", action="append", metavar="TEXT", help="a story told from it at each evaluation (repeatable)")
    return parser


def main(argv=None):
    started, parser = time.monotonic(), make_parser()
    try:
        ranks = join_ranks()
    except ValueError as error:
        parser.error(error)
    try:
        return run_command(parser, ranks.on_rank_0(lambda: parser.parse_args(argv)), ranks, started)
    except BaseException as error:
        ranks.abort(error)
        raise


def run_command(parser, args, ranks, started):
    """Do what the command line says -> exit status."""
    run = None
    try:
        if args.list_sizes:
            find_extra("recipes", "--list-sizes").list_sizes()
            return 0
        if args.threads or ranks.threads:
            tinygpt.set_threads(args.threads or ranks.threads)
        resume = find_extra("resume", "--resume").resume_run if args.resume else lambda *_: None
        run = ranks.open_run(lambda: resume(args, ranks) or begin_run(args, ranks, started))
        s, cfg, data, extra = run.settings, run.state.cfg, run.data, find_extra("run")
        if run.saved is None:
            run.save()  # a run that is killed before its next checkpoint is resumed from here
        if ranks.rank == 0:
            run.describe()
            note("first update; a kernel that is used for the first time on this machine is compiled ...")
        batches = Batches(data.train, cfg.seq_len, data.tokenizer.end, s.seed, data.masks[0])
        with extra.stop_signals() if extra else contextlib.nullcontext(lambda: False) as stopped:
            done = train(run, batches, make_ops(s, cfg, ranks), ranks, stopped)
        if ranks.rank == 0:
            if done:
                run.finish()
            else:
                note(f"stopped at update {run.state.step} of {s.steps}, saved")
                note(f"to go on:  {command('train.py', '--resume', '--out', run.folder)}")
            path = run.folder / "last.safetensors"
            note(f"a story:   {command('sample.py', '--checkpoint', path, '--prompt', 'Lily found')}")
        return 0 if done else 130
    except FloatingPointError as error:
        if ranks.rank:  # all have found it; rank 0 says so and ends the others
            ranks.on_rank_0(None)
        where = run.last_good() if run else "while the speed was measured; try a lower --lr"
        parser.error(f"{error}; {where}")
    except OSError as error:
        again = f"; {run.last_good()}; then {command('train.py', '--resume', '--out', run.folder)}" if run else ""
        parser.error(error_line(error) + again)
    except (ValueError, MemoryError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        note("left at once" + (f"; {run.last_good()}" if run else ""))
        ranks.abort(SystemExit(130))
        return 130
    finally:
        if run and run.log:
            with contextlib.suppress(OSError):
                run.log.close()


if __name__ == "__main__":
    try:
        from train import main  # as the module that extras/ import, not a second copy of it

        sys.tracebacklimit = None
        status = main()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is saved: from here on a Ctrl-C ends Python without a word
    except KeyboardInterrupt:  # the same, or nothing has begun
        status = 130
    sys.exit(status)
