"""What a run needs that takes minutes or days: to be watched, stopped at any moment, and never saved broken.

train.py takes this `Run` for its own where it finds it. Over that of train.py it has: first lines that say what is
trained, share of the machine and time left; a stop inside an evaluation; checkpoints of --keep; saving that takes 5% of
the time at most; nothing written that is not finite; the loss curve. And the signals that end a run in good order.
"""

import contextlib
import signal
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

import bpe
import tinygpt
import train
from extras import curve, locks, summary


def check_out(args):
    """ValueError if --out holds a run or a model, OSError if it cannot be written to."""
    if args.out:
        check_empty(args.out, args.resume)
    path = args.out or Path("runs")
    there = next(path for path in (path, *path.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        error.filename = str(path)
        raise


def check_empty(folder, resume=False):
    """ValueError if a run would write over what is there; one that `resume`s may over the log of a run that made no
    checkpoint."""
    log = folder / "log.jsonl"
    if log.exists() and log.stat().st_size and not resume:
        raise ValueError(f"{folder} holds a run; go on with --resume, or name another --out")
    if found := sorted(folder.glob("*.safetensors")):
        raise ValueError(f"{found[0]} would be overwritten; name another --out")


class Stopped(Exception):
    """The run was asked to stop in the middle of what --resume does again."""


class Run(train.Run):
    def __init__(self, *args):
        super().__init__(*args)
        self.first, self.pace = self.state.step, 0.0  # step; seconds of an update
        self.save_seconds = 0.0

    def begin(self, args):
        """Begin the log: settings, model, and the command that makes the same run again."""
        self.log = locks.lock_log(self.folder)
        check_empty(self.folder, args.resume)  # again: another run may have begun and ended here since
        self.log.truncate(0)
        cfg, words = self.state.cfg, summary.repeat_command(args, self.settings, self.state.cfg, self.processes)
        self.write(settings=asdict(self.settings), config=asdict(cfg), command=words)

    def describe(self):
        summary.describe(self)

    def write(self, **entry):
        """Append a line to the log. OSError names it."""
        try:
            super().write(**entry)
        except OSError as error:
            error.filename = self.log.name
            raise

    def record_update(self, loss, norm, lr, seconds):
        self.pace = recent_pace(self.pace, seconds, self.state.step - self.first)
        super().record_update(loss, norm, lr, seconds)

    def describe_speed(self, tokens, _):
        return super().describe_speed(tokens, self.pace) + summary.share_and_time_left(self)

    def evaluate(self, stopped):
        """`train.Run.evaluate`, which ends as soon as `stopped()`."""

        def look(_):
            if stopped():
                raise Stopped

        try:
            return self.score(self.data.valid[: self.settings.eval_tokens], look)
        except Stopped:
            return None

    def score(self, tokens, progress=None):
        nats, bits = super().score(tokens, progress)
        self.check_finite(nats)
        return nats, bits

    def missing_milestone(self):
        """The checkpoint that --keep leaves at this step, one of `keep` evenly over the run, if it is not there."""
        step, s = self.state.step, self.settings
        path = self.folder / f"step-{step:06d}.safetensors"
        due = step and step * s.keep // s.steps > (step - 1) * s.keep // s.steps
        return path.name if due and not path.exists() else None

    def save_is_due(self):
        """True at a milestone, at the last update, and every `save_every` seconds: sooner in the beginning, so that a
        run that is stopped early has a story; later if more than 5% of the time went into saving."""
        if not self.log or self.missing_milestone():
            return bool(self.log)
        if (self.state.step, self.evaluated) == self.saved:
            return False
        now = time.monotonic()
        pause = max(min(self.settings.save_every, max(5, now - self.started)), 20 * self.save_seconds)
        return self.state.step == self.settings.steps or now - self.saved_at > pause

    def save(self):
        """Write last.safetensors, and a milestone of --keep if one is due."""
        if self.log and (name := self.missing_milestone()):
            super().save(name)
        start = time.monotonic()
        super().save()
        self.save_seconds = time.monotonic() - start

    def write_checkpoint(self, name, tensors=None, metadata=None):
        for x in (self.state.parameters, *(tensors or {}).values()):
            self.check_finite(x)
        super().write_checkpoint(name, tensors, metadata)

    def check_finite(self, x):
        """FloatingPointError if x has NaN or infinity."""
        if not np.isfinite(x).all():
            raise FloatingPointError(f"the model is not finite at step {self.state.step}")

    def last_good(self):
        """Where to resume from, for the line that ends a run; what the file says, wherever the run was stopped."""
        path = self.folder / "last.safetensors"
        try:
            _, metadata = tinygpt.read_safetensors(path)
            return f"last good checkpoint: {path}, step {metadata['step']}"
        except (OSError, ValueError, LookupError):
            return f"no checkpoint is in {self.folder} yet"

    def finish(self):
        """Score all validation tokens, draw the loss curve."""
        bpe.note(f"scoring all {len(self.data.valid):,} validation tokens{summary.scoring_time(self)} ...")
        super().finish()
        curve.draw_curve(self.folder)


def recent_pace(pace, seconds, count):
    """Seconds of an update lately: `pace` after the last one of this process, number `count` from 1, took `seconds`. Of
    some 20 updates; the first, which may compile kernels, counts for itself alone."""
    return seconds if count <= 2 else 0.95 * pace + 0.05 * seconds


@contextlib.contextmanager
def stop_signals():
    """Yield a function: True after Ctrl-C, SIGTERM or SIGHUP, a closed terminal. A second one acts as it always did."""
    received, old = [], {}

    def restore():
        for number, handler in old.items():
            signal.signal(number, handler)

    def receive(number, frame):
        received.append(number)
        restore()

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP; where nohup ignores it, it stays ignored
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            with contextlib.suppress(ValueError):  # not the main thread: no signals come here
                old[number] = signal.signal(number, receive)
    try:
        yield lambda: bool(received)
    finally:
        restore()
