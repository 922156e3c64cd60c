"""Train a story-teller: batches of text, summed gradients, AdamW.

    python train.py --size 1m                           # TinyStories, or generated stories when there is no network
    python train.py --size 1m --data stories.txt --minutes 5

Part I is the algorithm: 1 batches, 2 AdamW, 3 learning rate, 4 the update, 5 the training loop, 6 evaluation.
Part II is the run: 7 settings, 8 text to token files, 9 the run folder, 10 begin and resume, 11 command line.
It writes runs/NAME/: log.jsonl, last.safetensors (model, moments, position: `--resume` continues from it),
best.safetensors (the model alone, at its best validation), step-*.safetensors (`--keep`), loss.png.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import shlex
import signal
import sys
import time
import zlib
from bisect import bisect_left
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bpe
import tinygpt
from bpe import Parser, Progress, clock, error_line, in_range, note, say
from sample import generate_story, load_model, newest_run
from tinygpt import KERNELS, SIZES, THREADS, count_cores, kernel

# ######################################################################################################################
# Part I: the algorithm
# ######################################################################################################################


# == 1  batches ========================================================================================================
#
# Each token of the text is a target once an epoch. Its input is the token before it; before the first token stands the
# end of a story. An epoch cuts the text into windows of T targets, at an offset of its own, and reads them in an order
# of its own. Both are drawn from (seed, epoch).


def window(tokens, first, stop, T, end):
    """The targets tokens[first:stop], at most T -> inputs and targets (T,) int64, weights (T,) float32.

    A window has T targets wherever the text has so many. Those outside first .. stop - 1 have weight 0: they count in
    another window. A window that would reach beyond the text starts earlier.
    """
    start = max(0, min(first, len(tokens) - T))
    targets = np.asarray(tokens[start : start + T], np.int64)
    inputs = np.concatenate([[tokens[start - 1] if start else end], targets[:-1]])
    positions = np.arange(start, start + T)
    return inputs, targets, ((first <= positions) & (positions < stop)).astype(np.float32)


class Batches:
    """The windows of all epochs, numbered. For a text and a T, any of them follows from (seed, number): there is no
    random state to save, and a run resumes anywhere."""

    def __init__(self, tokens, T, end, seed):
        self.tokens, self.T, self.end, self.seed = tokens, T, end, seed
        self.per_epoch = -(-len(tokens) // T) + 1  # of the text, the first and last may be shorter, or empty
        self.epoch = None

    def begin_epoch(self, epoch):
        """Draw where the windows of an epoch are cut, and their order."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, (1 << 32) + epoch]))  # 0: weights, 1: sampling
        self.epoch, self.offset = epoch, int(rng.integers(1, self.T + 1))  # the first window ends at the offset
        self.order = rng.permutation(self.per_epoch)

    def get(self, first, count):
        """Windows first .. first + count - 1 -> inputs, targets, weights (count, T)."""
        rows = []
        for number in range(first, first + count):
            epoch, position = divmod(number, self.per_epoch)
            if epoch != self.epoch:
                self.begin_epoch(epoch)
            stop = self.offset + int(self.order[position]) * self.T
            first = max(0, stop - self.T)
            rows.append(window(self.tokens, first, min(stop, len(self.tokens)), self.T, self.end))
        return tuple(np.stack(column) for column in zip(*rows))


# == 2  AdamW ==========================================================================================================
#
# Loshchilov & Hutter 2019, arXiv:1711.05101. Parameters, gradient and both moments are flat buffers of one layout, in
# which the matrices, embeddings among them, come first: p[:decayed]. They decay, by lr * decay as in PyTorch; gains and
# biases do not. `adamw_spec` is what the kernel is tested against.


def adamw_spec(p, g, m, v, decayed, scale, lr, decay, beta1, beta2, t):
    """Update number t (from 1) of p, m, v in place; g, scaled by `scale`, is the gradient. Leaves g = 0."""
    gradient = g * scale
    m[:] = beta1 * m + (1 - beta1) * gradient
    v[:] = beta2 * v + (1 - beta2) * gradient * gradient
    step = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + ADAM_EPS)
    step[:decayed] += decay * p[:decayed]
    p -= lr * step
    g[:] = 0


ADAM_EPS = 1e-8
NORM_BLOCK = 1 << 16  # elements whose squares are added up at a time


@kernel
def adamw_kernel(first, last, p, g, m, v, decayed, rates):
    """`adamw_spec` for the elements first .. last - 1; rates: those of `State.adamw`, in its order."""
    (scale, lr, decay, beta1, beta2, fix1, fix2, eps), number = rates, p.dtype.type
    b1, b2, c1, c2 = number(beta1), number(beta2), number(1 - beta1), number(1 - beta2)
    # of these elements, those that decay and those that do not; either may be none
    for start, stop, keep in ((first, min(last, decayed), 1 - lr * decay), (max(first, decayed), last, 1.0)):
        for i in range(start, stop):
            gradient = g[i] * number(scale)
            m[i] = b1 * m[i] + c1 * gradient
            v[i] = b2 * v[i] + c2 * gradient * gradient
            p[i] = number(keep) * p[i] - number(lr * fix1) * m[i] / (np.sqrt(v[i] * number(fix2)) + number(eps))
            g[i] = 0


@kernel
def norm_kernel(first, last, x, squares):
    """squares[i] = the sum of squares of block i of x, in float64, for the blocks first .. last - 1."""
    for i in range(first, last):
        total = 0.0
        for j in range(i * NORM_BLOCK, min((i + 1) * NORM_BLOCK, x.size)):
            total += np.float64(x[j]) * np.float64(x[j])
        squares[i] = total


class State:
    """What training changes: parameters, gradient, both moments (flat buffers) and the number of updates made."""

    def __init__(self, cfg, parameters):
        self.cfg, self.parameters, self.step = cfg, parameters, 0
        self.p = tinygpt.views(tinygpt.layout(cfg), parameters, cfg.layers)
        self.gradient, self.grads = tinygpt.zero_gradients(cfg, parameters.dtype)
        self.m, self.v = np.zeros_like(parameters), np.zeros_like(parameters)
        self.decayed = tinygpt.count_parameters(cfg)[1]

    def norm(self):
        """Global norm of the gradient, summed in float64, block after block: the same for any number of threads."""
        squares = np.empty(-(-self.gradient.size // NORM_BLOCK))
        THREADS.run(norm_kernel, squares.size, self.gradient, squares)
        return math.sqrt(float(squares.sum()))

    def adamw(self, lr, scale, s):
        """Apply AdamW to gradient * scale; the gradient is zero afterwards."""
        self.step += 1
        fix1, fix2 = 1 / (1 - s.beta1**self.step), 1 / (1 - s.beta2**self.step)  # bias correction
        rates = (float(scale), lr, float(s.weight_decay), s.beta1, s.beta2, fix1, fix2, ADAM_EPS)
        buffers = (self.parameters, self.gradient, self.m, self.v)
        THREADS.run(adamw_kernel, self.parameters.size, *buffers, self.decayed, rates)


# == 3  learning rate ==================================================================================================

SCHEDULES = ("cosine", "linear", "constant", "wsd", "restarts")
WSD_DECAY = 0.2  # share of the updates in which wsd falls: warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395
RESTARTS = 4  # cosines, one after the other; Loshchilov & Hutter 2017, arXiv:1608.03983


def learning_rate(step, s):
    """The rate of update `step`, from 0. Warm-up is a straight line from lr / warmup_steps at step 0 to lr at step
    warmup_steps - 1. Then the schedule goes from lr to min_lr at step s.steps - 1: `wsd` stays at lr until the last
    fifth of all updates, `restarts` begins again at lr three times, `constant` never falls."""
    if step < s.warmup_steps:
        return s.lr * (step + 1) / s.warmup_steps
    share = min(1, (step - s.warmup_steps) / max(1, s.steps - 1 - s.warmup_steps))  # of the updates after warm-up
    if s.schedule == "constant":
        return s.lr
    if s.schedule == "wsd":
        fallen = max(0, (step + 1 - (1 - WSD_DECAY) * s.steps) / (WSD_DECAY * s.steps))  # 0: lr, 1: min_lr
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

    Gradient accumulation: each micro-batch adds the gradient of its loss, a sum over targets, into one buffer. Once an
    update, norm and gradient are divided by the number of targets of all micro-batches and ranks; the gradient inside
    AdamW, by its scale. So how rows are cut into micro-batches changes rounding at most (with fast/ not even that).
    FloatingPointError if loss or norm is not finite, None if `stopped()` before a micro-batch of any rank: parameters,
    moments and step are as before, the gradient buffer is not.
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
        for row in (nats * part[2]).sum(-1, dtype=np.float64):  # row by row: the order of this sum is always the same
            sums[1] += row
    targets, nats, halted = ranks.sum(sums).tolist()
    if halted:
        return None
    tinygpt.add_lookup_gradient(state.grads)  # embed_w's second gradient, kept apart until all micro-batches are in
    ranks.sum(state.gradient)
    targets = max(1, targets)  # all windows may be empty
    loss, norm, lr = nats / targets, state.norm() / targets, learning_rate(state.step, s)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(f"loss is {loss:.4g} at step {state.step + 1} (lr {lr:.1e}, grad norm {norm:.4g})")
    clip = min(1.0, s.grad_clip / norm) if s.grad_clip and norm else 1.0  # one norm for all tensors
    state.adamw(lr, clip / targets, s)
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
        if state.step == s.steps:
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

TOKENS_AT_ONCE = 2048  # in a forward here, and in a usual micro-batch: twice as many are at most 3% faster there


def score(p, cfg, tokens, end, ops, stride=None, at_once=None, progress=None):
    """tokens (M,) -> nats of each, (M,) float64, given those before it in a window of T = cfg.seq_len.

    A window ends `stride` tokens after the one before it and scores the tokens in between. By default windows stand end
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
        # the text cut at `stop`: so the window ends there, and what it has scored already has weight 0
        rows = [window(tokens[:stop], start, stop, T, end) for start, stop in zip(starts, part)]
        inputs, targets, weights = (np.stack(column) for column in zip(*rows))
        if len(rows) not in ops_of_size:
            ops_of_size[len(rows)] = tinygpt.with_forward_buffers(ops, cfg, len(rows), T, p["embed_w"].dtype)
        _, found = tinygpt.loss_and_gradients(p, inputs, targets, weights, None, cfg, ops_of_size[len(rows)])
        nats[first : part[-1]] = found[weights > 0]  # row after row: in the order of the text
        first = part[-1]
        if progress:
            progress(first)
    return nats


def evaluate(p, cfg, tokens, end, ops, limit=None, progress=None):
    """Nats per token over windows that stand end to end, each target once; over the first `limit` tokens if given."""
    tokens = tokens[:limit]
    return float(score(p, cfg, tokens, end, ops, progress=progress).sum()) / len(tokens)


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
COUNT, SEQUENCES = in_range(int, 1, 2**31 - 1), in_range(int, 1, 2**16)


def flag(default, meaning, kind=None, **more):
    """A field of `Settings` that a flag of its name gives; kind is the flag's argparse type."""
    more |= {"type": kind} if kind else {}
    return field(default=default, metadata=more | {"help": meaning})


@dataclass(frozen=True)
class Settings:
    """What a run is. Made once, before the first update; every checkpoint and the log hold it as JSON."""

    batch_size: int = flag(8, "sequences per update", SEQUENCES, metavar="N")
    micro_batch_size: int = flag(8, "sequences at a time: memory only (default 2048 tokens)", SEQUENCES, metavar="N")
    recompute: bool = flag(False, "run layers forward again in backward: less memory, same result", action="store_true")
    lr: float = flag(0.0, "the highest learning rate (default that of the size)", in_range(float, 0, 1e3, True))
    min_lr: float = flag(0.0, "the last learning rate (default a tenth of --lr)", in_range(float, 0, 1e3))
    warmup_steps: int = flag(
        0, "of rising rate; < 1 a share; 0 off (default 100)", in_range(float, 0, 1e9), metavar="N"
    )
    schedule: str = flag("cosine", "of the rate after it", choices=SCHEDULES)
    weight_decay: float = flag(0.1, "of matrices; 0 is off", in_range(float, 0, 10))
    beta1: float = flag(0.9, "decay of AdamW's mean", in_range(float, 0, 0.9999))
    beta2: float = flag(0.99, "decay of its mean square", in_range(float, 0, 0.99999))
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 is off", in_range(float, 0, 1e9))
    dropout: float = flag(0.0, "of attention, its output and the MLP's; 0 is off", in_range(float, 0, 0.99))
    seed: int = flag(0, "of weights, data order and dropout", in_range(int, 0, 2**63 - 1))
    kernels: str = flag("fast", "table of ops (default the fastest that is here)", choices=KERNELS)
    dtype: str = flag("float32", "of products; auto: bfloat16 if the CPU has tiles", choices=("auto", *DTYPES))
    eval_every: int = flag(1, "updates between evaluations (default a tenth of the run)", COUNT, metavar="N")
    save_every: float = flag(20.0, "seconds between checkpoints", in_range(float, 0, 1e6), metavar="S")
    keep: int = flag(0, "checkpoints that stay, evenly over the run", in_range(int, 0, 10**6), metavar="N")
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


def read_settings(text):
    """JSON -> Settings. ValueError or TypeError if a field is unknown, of another type or out of range."""
    s = Settings(**json.loads(text))
    for f in fields(Settings):
        x = getattr(s, f.name)
        of_type = type(x) is f.type or (f.type, type(x)) == (float, int)
        if not of_type or (f.type in (int, float) and not 0 <= x < 2**63):
            raise ValueError(f"{f.name} is {x!r:.20}")
    known = s.kernels in KERNELS and s.dtype in DTYPES and s.schedule in SCHEDULES and len(s.files) == 2
    fits = 0 < s.batch_size <= 2**16 and s.micro_batch_size > 0 and s.batch_size % s.micro_batch_size == 0
    counted = min(s.steps, s.eval_every, s.eval_tokens, s.train_tokens) > 0 and max(s.beta1, s.beta2) < 1
    texts = [*s.prompts, *s.files[0], *s.files[-1], *(crc32 or "" for crc32, *_ in s.checksums.values())]
    if not (known and fits and counted and all(type(text) is str for text in texts)):
        raise ValueError("a setting is out of range")
    return s


def size_of(args):
    return args.size or ("tuned" if args.init_from else "1m")


def own_recipe(args, cfg):
    """The settings of a size that no flag gives: ours, for minutes on a laptop, or those of --recipe published."""
    if args.recipe:
        return import_extra("recipes").published_recipe(size_of(args), cfg)
    return {
        "lr": own_rate(cfg) / 10 if args.init_from else own_rate(cfg)
    }  # a trained model loses less of what it knows


def own_rate(cfg):
    return min(0.012, 1.2 / cfg.width)  # small updates, high rates: best where time is short; the wider, the lower


def divisors(batch_size):
    return [n for n in range(1, batch_size + 1) if batch_size % n == 0]


def usual_micro_batch(batch_size, T):
    return max(n for n in divisors(batch_size) if n == 1 or n * T <= TOKENS_AT_ONCE)


EVALUATED = 0.05  # tokens of an evaluation for each token trained since the one before: 1/3 of the work


def choose_settings(args, cfg, steps=1):
    """`Settings` of a run of so many updates, without those of its data. ValueError if flags contradict each other."""
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if f.metadata}
    chosen = own_recipe(args, cfg) | {name: x for name, x in given.items() if x is not None} | {"steps": steps}
    warmup = chosen.get("warmup_steps", min(100, steps // 10))
    chosen["warmup_steps"] = int(warmup if warmup >= 1 else warmup * steps)
    if chosen.setdefault("min_lr", chosen["lr"] / 10) > chosen["lr"]:
        raise ValueError(f"--min-lr {chosen['min_lr']} is above --lr {chosen['lr']}")
    batch_size = chosen.setdefault("batch_size", Settings.batch_size)
    micro = chosen.setdefault("micro_batch_size", usual_micro_batch(batch_size, cfg.seq_len))
    if micro not in (fitting := divisors(batch_size)):
        near = {max(n for n in fitting if n < micro), min([n for n in fitting if n > micro], default=1)}
        options = " or ".join(map(str, sorted(near)))
        raise ValueError(f"--micro-batch-size {micro} does not divide --batch-size {batch_size}; try {options}")
    kernels = tinygpt.find_ops(args.kernels).name
    if kernels != "fast" and args.max_memory:
        raise ValueError(f"--max-memory is about the buffers of --kernels fast; leave it out with --kernels {kernels}")
    if args.dtype == "bfloat16" and kernels != "fast":
        tinygpt.find_ops(kernels, "bfloat16")  # which says why there is none
    in_bf16 = args.dtype != "float32" and not why_float32(kernels)
    every = chosen.setdefault("eval_every", max(1, steps // 10))
    eval_tokens = max(4 * cfg.seq_len, int(EVALUATED * (every * batch_size * cfg.seq_len)))
    chosen |= {"kernels": kernels, "dtype": "bfloat16" if in_bf16 else "float32", "eval_tokens": eval_tokens}
    chosen["flags"] = flags_given(args)
    return Settings(**chosen, prompts=args.prompt or [], size=size_of(args), init_from=args.init_from or "")


# == 8  text to token files ============================================================================================

RESERVED = 8  # special tokens that a trained tokenizer keeps for templates
TOKENIZER_BYTES = 1 << 26  # of text that a tokenizer is trained on, at most


class Data(NamedTuple):
    tokenizer: bpe.Tokenizer
    train: np.ndarray  # token ids, (M,)
    valid: np.ndarray
    name: str
    files: list  # token files of the two, each a list of paths; none for validation: held out
    checksums: dict  # path of a token file -> [crc32, file_state of it, file_state of its JSON]


def prepare_data(args, cfg, batch_size, steps=None, tokenizer=None):
    """Text or token files -> `Data`, with `tokenizer` if there is one already. Text is encoded once and kept in
    data/tokens, under a key of what it depends on.

    ValueError or OSError if something is missing, is not text, is of another tokenizer, or is too short.
    """
    vocab_size = args.vocab_size or cfg.vocab_size
    key = (args.tokenizer, vocab_size) if tokenizer is None else (None, tokenizer.hash)
    if tokenizer is None and args.tokenizer:
        tokenizer = bpe.Tokenizer.load(args.tokenizer)
    if args.tokenizer and args.vocab_size:
        raise ValueError("--tokenizer brings its own vocabulary; leave out --vocab-size")
    sources, valid_sources, name = args.data, args.val_data or [], " ".join(args.data or ())
    if not sources:
        sources, valid_sources, name = find_stories(args, cfg, batch_size, steps)
    folder = Path("data", "tokens", cache_key(sources, *key))
    if tokenizer is None:
        if are_token_files(sources):
            raise ValueError("--data names a token file; say which tokenizer made it with --tokenizer FILE")
        tokenizer = train_tokenizer(sources, folder, vocab_size, must_fit=args.vocab_size is not None)
    files = [encode(sources, tokenizer, folder / "train.bin"), []]
    if valid_sources:
        key = cache_key(valid_sources, None, tokenizer.hash)
        files[1] = encode(valid_sources, tokenizer, folder / f"valid-{key}.bin")
    return read_data(tokenizer, files, name, cfg.seq_len)


def read_data(tokenizer, files, name, seq_len, checksums=None):
    """`Data` of token files. ValueError or OSError if one is missing, damaged, of another tokenizer, too short, or no
    longer has its checksum."""
    checksums = dict(checksums or {})
    train, valid = (read_token_files(paths, tokenizer, checksums) if paths else None for paths in files)
    if valid is None:
        train, valid = hold_out(train, tokenizer)
    for what, tokens, least in (("training", train, seq_len), ("validation", valid, 2)):
        if len(tokens) < least:
            found = f"the {what} text has {len(tokens)} tokens, less than one window of T={seq_len}"
            shorter = max(1, 1 << (len(tokens) // 2).bit_length())
            raise ValueError(f"{name}: {found}; use more text or --seq-len {shorter}")
    return Data(tokenizer, train, valid, name, files, checksums)


def find_stories(args, cfg, batch_size, steps):
    """Training and validation files, and their name, where the command line names no data."""
    try:
        from extras import stories
    except ImportError:
        raise ValueError("extras/stories.py is missing, so name your text: --data FILE") from None
    if steps:
        tokens = steps * batch_size * cfg.seq_len
    else:  # as many as fit the time at 60% of the machine's peak: fewer are read
        seconds = 60 * (args.minutes or 5) if not args.epochs else 300
        tokens = 0.6 * seconds * measure_peak() / tinygpt.flops_per_token(cfg)
    size = 2**24 * math.ceil(4.2 * tokens / 2**24)  # some 4 bytes a token; in steps, so that it seldom changes
    source = stories.get(Path("data"), size)
    return [str(source.train)], [str(source.valid)], source.name


def train_tokenizer(sources, folder, vocab_size, must_fit):
    """The tokenizer of these texts, kept in `folder`: vocab_size entries, or fewer where the text gives fewer and that
    need not be an error."""
    path, fixed = folder / "tokenizer.json", 256 + 1 + RESERVED
    if vocab_size < fixed:
        parts = f"256 bytes, the end of a story and {RESERVED} reserved tokens"
        raise ValueError(f"--vocab-size {vocab_size} is below {fixed}: {parts}")
    try:
        tokenizer = bpe.Tokenizer.load(path)
    except (OSError, ValueError):
        folder.mkdir(parents=True, exist_ok=True)
        note("learning the tokenizer of this text and encoding it, once; the first time, kernels are compiled ...")
        with Progress("learning the tokenizer", min(total_bytes(sources), TOKENIZER_BYTES)) as progress:
            pieces = first_bytes(bpe.pieces(sources, progress), TOKENIZER_BYTES)
            bpe.Tokenizer.from_merges(bpe.train(pieces, vocab_size - fixed), RESERVED).save(path)
        tokenizer = bpe.Tokenizer.load(path)
    if tokenizer.vocab_size < vocab_size:
        line = f"the text gives {tokenizer.vocab_size} tokens, fewer than {vocab_size}"
        if must_fit:
            raise ValueError(f"--vocab-size {vocab_size}: {line}; try --vocab-size {tokenizer.vocab_size}")
        note(f"{line}: the vocabulary has {tokenizer.vocab_size}")
    return tokenizer


def first_bytes(pieces, limit):
    for text, ends in pieces:
        if limit <= 0:
            return
        limit -= len(text)
        yield text, ends


def total_bytes(sources):
    return sum(path.stat().st_size for path in bpe.text_files(sources))


def are_token_files(paths):
    """True if all are token files. ValueError for a mixture with text."""
    bins = [str(path).endswith(".bin") for path in paths]
    if any(bins) and not all(bins):
        text = paths[bins.index(False)]
        raise ValueError(f"{text} is text beside token files; encode it first: python bpe.py encode")
    return all(bins)


def encode(sources, tokenizer, path):
    """The token files of these sources: themselves, or one made of their text if it is not there or not whole."""
    if are_token_files(sources):
        return [str(source) for source in sources]
    try:
        bpe.read_tokens(path, tokenizer)
    except (OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with Progress("encoding", total_bytes(sources)) as progress:
            bpe.write_tokens(bpe.pieces(sources, progress), tokenizer, path)
    return [str(path)]


def read_token_files(paths, tokenizer, checksums):
    """The ids of all files, (M,). Updates `checksums`, those of `Data`: a content is read only if its file's state has
    changed. ValueError if a file no longer has its checksum."""
    parts = []
    for path in paths:
        expected, *seen = checksums.get(path, [None])
        state = [file_state(name) for name in (path, f"{path}.json") if os.path.exists(name)]
        ids, info = bpe.read_tokens(path, tokenizer, check=state != seen)
        if expected not in (None, info["crc32"]):
            found = f"its checksum is {info['crc32']!r}, expected {expected!r:.20}"
            raise ValueError(f"{path} has changed since the run began: {found}; restore it or start another run")
        checksums[path] = [info["crc32"], *state]
        parts.append(ids)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def cache_key(sources, tokenizer_path, detail):
    """A name for what is made of these files: changes when one of them does."""
    parts = [bpe.PATTERN, bpe.LAYOUTS, RESERVED, detail]
    for path in [*bpe.text_files(sources), *([Path(tokenizer_path)] if tokenizer_path else [])]:
        parts += [str(path.resolve()), *file_state(path)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


CTIME_IS_CREATION = os.name == "nt"


def file_state(path):
    """[size, mtime, ctime]: equal only if the file has not been written or replaced in between.

    cp -p, tar and rsync restore mtime, but nothing can set ctime, the time of the last change to the inode. Windows has
    the time of creation in its place: there it is the CRC-32 of the content.
    """
    status = os.stat(path)
    changed = zlib.crc32(Path(path).read_bytes()) if CTIME_IS_CREATION else status.st_ctime_ns
    return [status.st_size, status.st_mtime_ns, changed]


HELD_OUT = 0.02  # share of the stories, or of their bytes, that is validation text where there is no other
LEAST_HELD_OUT, MOST_HELD_OUT = 0.01, 0.05  # of the bytes: what a cut between two stories may leave for validation


def hold_out(tokens, tokenizer):
    """tokens -> (training, validation): the last 2% of the stories if they are 1% to 5% of the bytes. Otherwise cut
    where the story nearest to 98% of the bytes ends, within these limits; inside a story if none ends there."""
    sizes = tokenizer.byte_lengths().astype(np.int16)[tokens]  # (M,), small: a text may have 10^9 tokens
    stops = np.flatnonzero(tokens == tokenizer.end) + 1  # of each story, the token after it
    starts, total = np.concatenate([[0], stops]), int(sizes.sum(dtype=np.int64))
    inside = sizes[: starts[-1]]  # what stands before the last end
    read = np.cumsum(np.add.reduceat(inside, starts[:-1], dtype=np.int64))  # bytes up to the end of each story
    held, target = total - read, (1 - HELD_OUT) * total
    fair = np.flatnonzero((LEAST_HELD_OUT * total <= held) & (held <= MOST_HELD_OUT * total))
    usual = len(stops) - 1 - max(1, round(HELD_OUT * len(stops)))
    if len(fair):
        nearest = fair[np.abs(held[fair] - HELD_OUT * total).argmin()]
        cut = int(stops[usual if usual in fair else nearest])
    else:
        whole = int(np.searchsorted(read, target))  # stories before the one to cut
        start, before = (int(stops[whole - 1]), int(read[whole - 1])) if whole else (0, 0)
        rest = sizes[start:]
        cut = start + bisect_left(range(len(rest)), target - before, key=lambda i: rest[: i + 1].sum(dtype=np.int64))
    return tokens[:cut], tokens[cut:]


# == 9  the run folder =================================================================================================


class Stopped(Exception):
    """The run was asked to stop in the middle of what --resume does again."""


class Run:
    """The folder of a run: its log, its checkpoints, what the terminal shows. Ranks above 0 have no log and write
    nothing."""

    def __init__(self, folder, settings, state, data, log, processes=1):
        self.folder, self.settings, self.state, self.data, self.log = folder, settings, state, data, log
        self.processes, self.tokenizer_json = processes, data.tokenizer.to_json()
        self.best, self.evaluated = math.inf, 0  # bits per byte; step of the last evaluation
        self.saved, self.saved_at, self.save_seconds = None, -math.inf, 0.0
        self.started = self.shown = time.monotonic()
        self.first, self.pace, self.speed = state.step, 0.0, 0.0  # step; seconds of an update; tokens a second
        self.peak = math.inf  # FLOP/s of NumPy's BLAS, see measure_peak

    def write(self, **entry):
        """Append a line to the log."""
        if self.log:
            try:
                self.log.write(json.dumps(entry) + "\n")
                self.log.flush()
            except OSError as error:
                error.filename = error.filename or self.log.name
                raise

    def record_update(self, loss, norm, lr, seconds):
        """Log an update that took so long; every two seconds, show it."""
        s, cfg, step, now = self.settings, self.state.cfg, self.state.step, time.monotonic()
        per_update = s.batch_size * cfg.seq_len
        self.pace = recent_pace(self.pace, seconds, step - self.first)
        self.speed = per_update / self.pace  # of the first update it says how long compiling took
        seconds = round(now - self.started, 3)
        self.write(step=step, loss=loss, lr=lr, norm=norm, tokens=step * per_update, seconds=seconds)
        if self.log and (now - self.shown > 2 or step in (self.first + 1, s.steps)):
            self.shown, left = now, clock(seconds_left(s.steps - step, self.pace))
            of_blas = self.speed * tinygpt.flops_per_token(cfg) / self.peak
            note(
                f"step {step} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {self.speed:,.0f} tok/s | "
                f"{of_blas:.0%} of NumPy's BLAS" + (f" | {left} left" if step > self.first + 1 else "")
            )

    def evaluation_is_due(self):
        step, s = self.state.step, self.settings
        return step > self.evaluated and (step % s.eval_every == 0 or step == s.steps)

    def evaluate(self, stopped):
        """Score the beginning of the validation text -> (nats per token, bits per byte); None if `stopped()`."""

        def look(_):
            if stopped():
                raise Stopped

        tokens, tokenizer = self.data.valid[: self.settings.eval_tokens], self.data.tokenizer
        ops = table_of(self.settings)
        try:
            nats = evaluate(self.state.p, self.state.cfg, tokens, tokenizer.end, ops, progress=look)
        except Stopped:
            return None
        return self.check_finite(nats), bits_per_byte(nats, tokens, tokenizer)

    def generate_stories(self, stopped):
        """A story for each --prompt; None if `stopped()`."""
        s, stories = self.settings, []
        for prompt in s.prompts:
            if stopped():
                return None
            words = (self.state.p, self.state.cfg, self.data.tokenizer, tinygpt.find_ops(s.kernels), prompt, s.seed)
            stories.append(prompt + "".join(generate_story(*words, max_new_tokens=120, temperature=0.8)))
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

    def missing_milestone(self):
        """The checkpoint that --keep leaves at this step, one of `keep` evenly over the run, if it is not there."""
        step, s = self.state.step, self.settings
        path = self.folder / f"step-{step:06d}.safetensors"
        due = step and step * s.keep // s.steps > (step - 1) * s.keep // s.steps
        return path.name if due and not path.exists() else None

    def save_is_due(self):
        """True at a milestone, at the last update, and every `save_every` seconds: sooner in the beginning, so that a
        run that is stopped early has a story; later if more than 5% of the time went into saving."""
        if not self.log or (self.state.step, self.evaluated) == self.saved:
            return bool(self.log and self.missing_milestone())
        now = time.monotonic()
        pause = max(min(self.settings.save_every, max(5, now - self.started)), 20 * self.save_seconds)
        at_end = self.state.step == self.settings.steps
        return at_end or bool(self.missing_milestone()) or now - self.saved_at > pause

    def save(self):
        """Write last.safetensors, to resume from, and a milestone of --keep if one is due."""
        if not self.log:
            return
        self.log.flush()
        os.fsync(self.log.fileno())  # the checkpoint holds a position in the log: it must get there first
        place = {"step": self.state.step, "log_bytes": os.path.getsize(self.log.name), "evaluated": self.evaluated}
        metadata = {name: str(x) for name, x in place.items()} | {"best": repr(self.best)}
        metadata["settings"] = json.dumps(asdict(self.settings))
        moments = {"moment1": self.state.m, "moment2": self.state.v}
        if name := self.missing_milestone():
            self.write_checkpoint(name, moments, metadata)
        start = time.monotonic()
        self.write_checkpoint("last.safetensors", moments, metadata)
        self.saved, self.saved_at = (self.state.step, self.evaluated), time.monotonic()
        self.save_seconds = self.saved_at - start

    def write_checkpoint(self, name, moments=None, metadata=None):
        for x in (self.state.parameters, *(moments or {}).values()):
            self.check_finite(x)
        model = (self.state.parameters, self.state.cfg, self.tokenizer_json)
        tinygpt.save_checkpoint(self.folder / name, *model, moments, metadata)

    def check_finite(self, x):
        """x. FloatingPointError if it has NaN or infinity."""
        if not np.isfinite(x).all():
            raise FloatingPointError(f"the model is not finite at step {self.state.step}")
        return x

    def last_good(self):
        """Where to resume from, for the line that ends a run."""
        path = self.folder / "last.safetensors"
        try:
            return f"last good checkpoint: {path}, step {tinygpt.read_metadata(path)['step']}"
        except (OSError, ValueError, KeyError):
            return f"no checkpoint is in {self.folder} yet"

    def finish(self):
        """Score all validation tokens, draw the loss curve, say what to type next."""
        valid, tokenizer, state = self.data.valid, self.data.tokenizer, self.state
        speed = self.speed / self.processes
        about = f", about {clock(scoring_seconds(len(valid), speed))}" if speed else ""
        note(f"scoring all {len(valid):,} validation tokens{about} ...")
        ops = table_of(self.settings)
        with Progress("validation", len(valid)) as progress:
            nats = self.check_finite(evaluate(state.p, state.cfg, valid, tokenizer.end, ops, progress=progress))
        bits = bits_per_byte(nats, valid, tokenizer)
        self.write(step=state.step, final_val_nats=nats, final_val_bits_per_byte=bits, tokens=len(valid))
        note(f"validation, every token: {nats:.4f} nats/token, {bits:.4f} bits/byte")
        if curve := import_extra("curve", optional=True):
            curve.draw_curve(self.folder)
        else:
            note("no loss curve: extras/curve.py is not here")
        path = self.folder / "last.safetensors"
        note(f"a story:   {command('sample.py', '--checkpoint', path, '--prompt', 'Lily found')}")


@contextlib.contextmanager
def new_folder(args):
    """Yield the folder of a fresh run and its locked, empty log; if the run cannot begin, remove what was made.
    ValueError if a run or a model is there, OSError if the folder cannot be written."""
    folder, made = args.out, bool(args.out and not args.out.exists())
    if folder is None:
        Path("runs").mkdir(exist_ok=True)
        for number in range(1, 10**6):
            folder = Path("runs", size_of(args) if number == 1 else f"{size_of(args)}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                made = True
                break
    holds_a_run = f"{folder} holds a run; go on with --resume, or name another --out"
    if (folder / "log.jsonl").exists() and not args.resume:
        raise ValueError(holds_a_run)
    folder.mkdir(parents=True, exist_ok=True)
    log, fresh = None, False
    try:
        log = lock_log(folder)
        fresh = os.path.getsize(log.name) == 0
        if not fresh and not args.resume:  # it began while this process looked
            raise ValueError(holds_a_run)
        if found := sorted(folder.glob("*.safetensors")):
            raise ValueError(f"{found[0]} would be overwritten; name another --out")
        log.truncate(0)
        yield folder, log
    except BaseException:
        with contextlib.suppress(OSError):
            if log:
                log.close()
            if fresh:
                (folder / "log.jsonl").unlink()
            if made:
                folder.rmdir()
        raise


BUSY = "another process writes the run"  # extras/sweep.py looks for it


def lock_log(folder):
    """The log of a run, open for appending; locked until it is closed. ValueError if another process has it."""
    return open_locked(folder / "log.jsonl", f"{BUSY} in {folder}")


def open_locked(path, busy):
    """`path`, open for appending and locked until it is closed or its process ends. ValueError, with the words of
    `busy`, if another process has locked it."""
    file = open(path, "a", encoding="utf-8", newline="\n")
    try:
        if not tinygpt.lock_file(file):
            file.close()
            raise ValueError(f"{busy}; wait for its end or name another --out")
    except OSError as error:  # some network file systems have no locks
        note(f"{path.parent} cannot be locked ({error.strerror}): see to it that no second run writes there")
    return file


@contextlib.contextmanager
def stop_signals():
    """Yield a function: True after Ctrl-C or SIGTERM. A second one acts as it always did."""
    received, old = [], {}

    def receive(number, frame):
        received.append(number)
        for name, handler in old.items():
            signal.signal(name, handler)

    for name in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not the main thread: no signals come here
            old[name] = signal.signal(name, receive)
    try:
        yield lambda: bool(received)
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)


# == 10  begin and resume ==============================================================================================


def begin_run(args, ranks, started):
    """A fresh run. ValueError or OSError if it cannot begin; then it leaves no folder."""
    with new_folder(args) as (folder, log):
        tokenizer = parameters = None
        if args.init_from:
            cfg, tokenizer, parameters = import_extra("tune").load_initial_model(args)
        else:
            cfg = SIZES[size_of(args)].changed(**tinygpt.overrides(args.set or []))
            cfg = cfg.changed(seq_len=args.seq_len or cfg.seq_len)
        draft = choose_settings(args, cfg)  # flags that contradict each other are refused before text is read
        ranks.rows(draft.batch_size)
        if draft.dropout:
            cfg = cfg.changed(attention_dropout=draft.dropout, out_dropout=draft.dropout, mlp_dropout=draft.dropout)
        steps = args.steps or (None if args.epochs or args.minutes else own_recipe(args, cfg).get("steps"))
        warmup = import_extra("warmup", optional=True)
        compilers = warmup.compile_ahead(cfg, draft.kernels) if warmup else []
        data = prepare_data(args, cfg, draft.batch_size, steps, tokenizer)
        for prompt in draft.prompts:
            data.tokenizer.encode(prompt)  # refused now, not at the first evaluation
        cfg = cfg if args.init_from else cfg.changed(vocab_size=data.tokenizer.vocab_size)
        for process in compilers:
            process.wait()
        if args.max_memory:
            draft = import_extra("plan").fit_memory(args.max_memory, draft, cfg)
        batches = batches_of(data, cfg, draft.seed)
        steps = steps or count_steps(args, draft, cfg, data, batches, ranks, started)
        known = {"micro_batch_size": draft.micro_batch_size, "recompute": draft.recompute, "data": data.name}
        known |= {"files": data.files, "checksums": data.checksums, "train_tokens": len(data.train)}
        s = replace(choose_settings(args, cfg, steps), **known)
        parameters = tinygpt.init_parameters(cfg, s.seed) if parameters is None else parameters
        run = Run(folder, s, State(cfg, parameters), data, log, ranks.count)
        summary = import_extra("summary", optional=True)
        words = summary.repeat_command(args, s, cfg, ranks.count) if summary else ""
        run.write(settings=asdict(s), config=asdict(cfg), command=words)
        return run


def count_steps(args, s, cfg, data, batches, ranks, started):
    """The number of updates that make --epochs, or fit --minutes, counted from `started`."""
    plan = None if args.epochs else import_extra("plan", optional=not args.minutes)
    if plan:
        return plan.plan_steps(args.minutes or 5, s, cfg, len(data.valid), batches, ranks, started)
    if not args.epochs:
        note("extras/plan.py is not here, which plans by the clock: the text is read once")
    return math.ceil((args.epochs or 1) * batches.per_epoch / s.batch_size)


def resume_run(args, ranks):
    """The run of --resume as it was at its last checkpoint; None if there is none. ValueError or OSError if it cannot
    continue."""
    folder = args.out or newest_run()
    if not folder or not (folder / "last.safetensors").exists():
        note(f"no checkpoint in {folder or 'runs'}{os.sep}: beginning at step 0")
        return None
    log = lock_log(folder)
    try:
        run = read_run(folder, log, flags_given(args), ranks.count)
        ranks.rows(run.settings.batch_size)
        return run
    except BaseException:
        log.close()
        raise


def read_run(folder, log, flags=(), processes=1):
    """The run in `folder` at its last checkpoint; cuts the log there. ValueError for flags other than its own."""
    path = folder / "last.safetensors"
    checkpoint, tokenizer = load_model(path)
    cfg, parameters, place = checkpoint.cfg, checkpoint.parameters, checkpoint.metadata
    try:
        s = read_settings(place["settings"])
        step, position, evaluated = (int(place[name]) for name in ("step", "log_bytes", "evaluated"))
        best, moments = float(place["best"]), [checkpoint.extra[name] for name in ("moment1", "moment2")]
        if any(x.dtype != np.float32 or x.shape != parameters.shape for x in (parameters, *moments)):
            raise TypeError("its tensors are not float32 or not all of one length")
        if not 0 <= step <= s.steps or not 0 <= position < 2**48:
            raise ValueError(f"step {step} of {s.steps}")
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} holds a model but no run to go on with ({error!s:.80})") from None
    lines = (folder / "log.jsonl").read_text("utf-8", "replace")[position:].splitlines(keepends=True)
    if step == s.steps and any("final_val_nats" in line and line.endswith("\n") for line in lines):
        more = f"to train its model further, begin another run with it: --init-from {path}"
        raise ValueError(f"the run in {folder} is finished: {step} of {s.steps} updates; {more}")
    for name in flags:
        if name not in s.flags or flags[name] != s.flags[name]:
            flag, other = name.replace("_", "-"), f"begin another run with this one's model: --init-from {path}"
            raise ValueError(f"--resume goes on under the run's own settings; leave out --{flag}, or {other}")
    data = read_data(tokenizer, s.files, s.data, cfg.seq_len, s.checksums)
    if len(data.train) != s.train_tokens:
        found = f"its files now give {len(data.train):,} training tokens, expected {s.train_tokens:,}"
        raise ValueError(f"the data of {folder} have changed since it began: {found}; start another run")
    check_precision(s, folder)
    state = State(cfg, parameters)
    state.step, state.m[:], state.v[:] = step, *moments
    run = Run(folder, replace(s, checksums=data.checksums), state, data, log, processes)
    run.best, run.evaluated, run.saved, run.saved_at = best, evaluated, (step, evaluated), time.monotonic()
    log.truncate(min(position, os.path.getsize(log.name)))  # behind it are updates that will be made again
    log.seek(0, os.SEEK_END)
    return run


def flags_given(args):
    """{name: value} of the flags that decide what a run is: --resume takes no others than those it began with."""
    default, free = make_parser().get_default, ("out", "resume", "threads")
    return {name: value for name, value in vars(args).items() if name not in free and value != default(name)}


def check_precision(s, folder):
    """ValueError if this machine lacks the products that a run began with: its bytes would differ."""
    if s.dtype == "bfloat16" and (reason := why_float32(s.kernels)):
        other = f"resume it where it began, or begin another run: --init-from {folder / 'last.safetensors'}"
        raise ValueError(f"the run in {folder} multiplies in bfloat16, but {reason}; {other}")


def why_float32(kernels):
    """None where products of this table can be bf16, else why they are float32, in a sentence."""
    if kernels != "fast":
        return f"--kernels {kernels} has no others"
    from fast import why_no_bf16

    return why_no_bf16()


def batches_of(data, cfg, seed):
    return Batches(data.train, cfg.seq_len, data.tokenizer.end, seed)


def table_of(s):
    return tinygpt.find_ops(s.kernels, s.dtype)


def make_ops(s, cfg, ranks):
    """The table of ops that trains, with buffers for a micro-batch."""
    micro = math.gcd(ranks.rows(s.batch_size), s.micro_batch_size)
    return tinygpt.with_buffers(table_of(s), cfg, micro, cfg.seq_len, np.float32, s.recompute)


OVERHEAD = 0.03  # share of a timed run that evaluations, stories and checkpoints may take


def recent_pace(pace, seconds, count):
    """Seconds of an update lately: `pace` after the last one of this process, number `count` from 1, took `seconds`. Of
    some 20 updates; the first, which may compile kernels, counts for itself alone."""
    return seconds if count <= 2 else 0.95 * pace + 0.05 * seconds


def seconds_left(updates, pace):
    """Seconds until these updates are made, with what stands between them."""
    return updates * pace / (1 - OVERHEAD)


def scoring_seconds(tokens, speed):
    """Seconds to score so many tokens in a process that trains `speed` tokens a second: there is no backward, which
    takes about 2/3 of an update."""
    return tokens / (2.5 * speed)


def measure_peak():
    """The machine's float32 product in FLOP/s: NumPy's BLAS, the best of ten products of 1024 x 1024."""
    a, best = np.ones((1024, 1024), np.float32), math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


# == 11  command line ==================================================================================================


def command(*words):
    return shlex.join(["python", *map(str, words)])


def import_extra(name, optional=False):
    """The module extras/NAME.py. If it is missing: ValueError, or None where train.py does without it."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("extras", f"extras.{name}"):
            raise
        if not optional:
            raise ValueError(f"extras/{name}.py is not here") from None


MPIEXEC_SETS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")  # Open MPI's, MPICH's, Intel's


def join_ranks():
    """The processes of this run: those that mpiexec started, or this one alone. ValueError without MPI."""
    count = max(int(os.environ.get(name) or 1) for name in MPIEXEC_SETS)
    return import_extra("mpi").Ranks(count) if count > 1 else ALONE


def size_in_bytes(text):
    """An argparse type: 2G, 500M, 800000K."""
    try:
        return import_extra("plan").size_in_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None


def make_parser():
    parser = Parser(prog="train.py", description="Train a story-teller on text. Without --data: on TinyStories.")
    add, positive = parser.add_argument_group("what").add_argument, in_range(float, 0, 1e6, open_low=True)
    add("--size", choices=list(SIZES), help="shape of the model, by its rounded number of parameters (default 1m)")
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
    add("--max-memory", type=size_in_bytes, metavar="SIZE", help="of the process, as 2G: fewer sequences at a time")
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
            import_extra("recipes").list_sizes()
            return 0
        if args.threads or ranks.threads:
            tinygpt.set_threads(args.threads or ranks.threads)
        run = ranks.open_run(lambda: (args.resume and resume_run(args, ranks)) or begin_run(args, ranks, started))
        s, cfg = run.settings, run.state.cfg
        if run.saved is None:
            run.save()  # a run that is killed before its next checkpoint is resumed from here
        if ranks.rank == 0:
            if summary := import_extra("summary", optional=True):
                summary.describe(cfg, s, run.data, run.folder, ranks.count)
            else:
                note("extras/ is not here: the settings are shown as they are")
                note(f"{cfg}\n{s}\nprecision {s.dtype}")
            note("first update; a kernel that is used for the first time on this machine is compiled ...")
        run.peak = measure_peak() * (ranks.count * THREADS.count / count_cores() if ranks.count > 1 else 1)
        with stop_signals() as stopped:
            done = train(run, batches_of(run.data, cfg, s.seed), make_ops(s, cfg, ranks), ranks, stopped)
        if ranks.rank == 0 and done:
            run.finish()
        elif ranks.rank == 0:
            note(f"stopped at update {run.state.step} of {s.steps}, saved")
            note(f"to go on:  {command('train.py', '--resume', '--out', run.folder)}")
            note(f"a story:   {command('sample.py', '--checkpoint', run.folder / 'last.safetensors')}")
        return 0 if done else 130
    except FloatingPointError as error:
        if ranks.rank:  # all have found it; rank 0 says so and ends the others
            ranks.on_rank_0(None)
        where = run.last_good() if run else "while the speed was measured; try a lower --lr"
        parser.error(f"{error}; {where}")
    except OSError as error:
        again = f"; {run.last_good()}; then {command('train.py', '--resume', '--out', run.folder)}" if run else ""
        parser.error(error_line(error) + again)
    except ValueError as error:
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
    from train import main  # as the module that extras/ import, not a second copy of it

    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is saved: a Ctrl-C from here on ends Python without a traceback
    sys.exit(status)
