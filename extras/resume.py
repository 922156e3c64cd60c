"""What `train.py --resume` refuses: a model without the state of a run, changed flags, changed data, another precision.

A resumed run ends in the bytes of an uninterrupted one; where it could not, it is refused. train.py imports this file
when it resumes.
"""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np

import train


def check(folder, checkpoint, flags):
    """ValueError if this `Checkpoint`, the last of the run in `folder`, cannot go on under these flags."""
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
    """ValueError if this machine lacks the products that a run began with: its bytes would differ."""
    if s.dtype == "bfloat16" and (reason := train.why_float32(s.kernels)):
        other = f"resume it where it began, or begin another run: --init-from {folder / 'last.safetensors'}"
        raise ValueError(f"the run in {folder} multiplies in bfloat16, but {reason}; {other}")


def check_tokens(folder, s, data):
    """ValueError if the data of a run are not as long as they were."""
    if len(data.train) != s.train_tokens:
        found = f"its files now give {len(data.train):,} training tokens, expected {s.train_tokens:,}"
        raise ValueError(f"the data of {folder} have changed since it began: {found}; start another run")
