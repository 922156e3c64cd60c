"""`train.py --resume`: a run as it was at its last checkpoint, and what is refused.

A resumed run ends in the bytes of an uninterrupted one. Refused is what could not: a model without the state of a run,
changed flags, changed data, another precision.
"""

import json
import os
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

import bpe
import sample
import tinygpt
import train
from extras import data, locks, run


def resume_run(args, ranks):
    """The run of --resume as it was at its last checkpoint; None if there is none. ValueError or OSError if it cannot
    continue."""
    newest, flags = sample.newest_checkpoint(), train.flags_given(args)
    folder = args.out or (newest[0].parent if newest and newest[0] != sample.BOX else None)
    if not folder or not (folder / "last.safetensors").exists():
        if args.out and not flags:
            raise ValueError(f"{folder} has no checkpoint to go on with; name another, or flags to begin a run there")
        bpe.note(f"no checkpoint in {folder or 'runs'}{os.sep}: beginning at step 0")
        return None
    log = locks.lock_log(folder)
    try:
        resumed = read_run(folder, log, flags, ranks.count)
        ranks.rows(resumed.settings.batch_size)
        return resumed
    except BaseException:
        log.close()
        raise


def read_run(folder, log, flags=(), processes=1):
    """The run in `folder` at its last checkpoint; cuts the log there. ValueError or OSError if it cannot go on, under
    these flags or at all."""
    checkpoint, tokenizer = sample.load_model(folder / "last.safetensors")
    s, place = check(folder, checkpoint, flags), checkpoint.metadata
    known = data.read_data(tokenizer, s.files, s.data, s.checksums)
    check_tokens(folder, s, known)
    state = train.State(checkpoint.cfg, checkpoint.parameters)
    state.step, state.m[:], state.v[:] = int(place["step"]), checkpoint.extra["moment1"], checkpoint.extra["moment2"]
    resumed = run.Run(folder, replace(s, checksums=known.checksums), state, known, processes)
    resumed.log, resumed.best, resumed.evaluated = log, float(place["best"]), int(place["evaluated"])
    resumed.saved, resumed.saved_at = (state.step, resumed.evaluated), time.monotonic()
    log.truncate(min(int(place["log_bytes"]), os.path.getsize(log.name)))  # behind it: updates that are made again
    log.seek(0, os.SEEK_END)
    if Path(log.name).read_bytes()[-1:] not in (b"", b"\n"):  # the disk lost the end of a line
        log.write("\n")
    return resumed


def check(folder, checkpoint, flags):
    """`Settings` of a `Checkpoint`, the last of the run in `folder`. ValueError if it cannot go on with these flags."""
    path, place, parameters = folder / "last.safetensors", checkpoint.metadata, checkpoint.parameters
    try:
        s = read_settings(place["settings"])
        step, position, evaluated = (int(place[name]) for name in ("step", "log_bytes", "evaluated"))
        _, moments = float(place["best"]), [checkpoint.extra[name] for name in ("moment1", "moment2")]
        if any(x.dtype != np.float32 or x.shape != parameters.shape for x in (parameters, *moments)):
            raise TypeError("its tensors are not float32 or not all of one length")
        if not 0 <= step <= s.steps or not 0 <= position < 2**48:
            raise ValueError(f"step {step} of {s.steps}")
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} holds a model but no run to go on with ({error!s:.80})") from None
    other = f"begin another run with this one's model: --init-from {path}"
    lines = (folder / "log.jsonl").read_text("utf-8", "replace")[position:].splitlines(keepends=True)
    if step == s.steps and any("final_val_nats" in line and line.endswith("\n") for line in lines):
        raise ValueError(f"the run in {folder} is finished: {step} of {s.steps} updates; to train on, {other}")
    for name in flags:
        if name not in s.flags or flags[name] != s.flags[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--resume goes on under the run's own settings; leave out --{flag}, or {other}")
    if gone := [path for paths in s.files for path in paths if not Path(path).exists()]:
        made = (
            f"it was made of {s.data}; put it back, or {other} and the same text"
            if s.data
            else f"put it back, or {other}"
        )
        raise ValueError(f"{gone[0]}, which the run in {folder} reads, is gone; {made}")
    check_precision(s, folder)
    return s


def read_settings(text):
    """JSON -> `train.Settings`. ValueError if a field is unknown, of another type or out of range."""
    try:
        return check_settings(train.Settings(**json.loads(text)))
    except (AttributeError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"they are not the settings of a run: {error!s:.80}") from None


def check_settings(s):
    """The settings; ValueError, or another error of the language, if one is of another type or out of range."""
    for f in fields(train.Settings):
        x = getattr(s, f.name)
        of_type = type(x) is f.type or (f.type, type(x)) == (float, int)
        if not of_type or (f.type in (int, float) and not 0 <= x < 2**63):
            raise ValueError(f"{f.name} is {x!r:.20}")
    known = s.kernels in train.KERNELS and s.dtype in train.DTYPES and s.schedule in train.SCHEDULES
    fits = 0 < s.batch_size <= 2**16 and s.micro_batch_size > 0 and s.batch_size % s.micro_batch_size == 0
    counted = min(s.steps, s.eval_every, s.eval_tokens, s.train_tokens) > 0 and max(s.beta1, s.beta2) < 1
    texts = [*s.prompts, *s.files[0], *s.files[-1], *(crc32 or "" for crc32, *_ in s.checksums.values())]
    if not (known and fits and counted and len(s.files) == 2 and all(type(text) is str for text in texts)):
        raise ValueError("a setting is out of range")
    return s


def check_precision(s, folder):
    """ValueError if this machine multiplies by another instruction than a run began with: its bytes would differ."""
    if s.dtype != "bfloat16":
        return
    tinygpt.find_ops(s.kernels)  # which says so if fast/ is missing
    from fast import find_bf16

    instruction, reason = find_bf16()
    if instruction != s.instruction:
        reason = reason or f"this machine does by {instruction}"
        other = f"resume it where it began, or begin another run: --init-from {folder / 'last.safetensors'}"
        raise ValueError(f"the run in {folder} multiplies in bfloat16 by {s.instruction}, but {reason}; {other}")


def check_tokens(folder, s, data):
    """ValueError if the data of a run are not as long as they were."""
    if len(data.train) != s.train_tokens:
        found = f"its files now give {len(data.train):,} training tokens, expected {s.train_tokens:,}"
        raise ValueError(f"the data of {folder} have changed since it began: {found}; start another run")
