"""Hyperparameter sweeps: a run of train.py for each combination of settings, and a table of the results.

    python extras/sweep.py lr=1e-3,2e-3,4e-3 --size 1m --minutes 2
    python extras/sweep.py 'size=graphcore-*' --steps 200 --list       # print the trials; without --list, run them

Each argument before the first flag names a flag of train.py, or a field of --set, and its values. The flags are passed
to every trial. A trial is a run in its own folder, so a sweep that was stopped with Ctrl-C resumes when it is started
with the same arguments. Only one process at a time runs a sweep; if another trains in the folder of a trial, the sweep
waits until it ends. Read in order: 1 the trials, 2 running them, 3 the table, 4 command line.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report

import bpe
import tinygpt
import train
from extras import locks

# == 1  the trials =====================================================================================================

OURS = ("out", "resume", "list_sizes", "help", "set")  # flags of train.py that cannot be swept


class Trial(NamedTuple):
    name: str  # "lr=1e-3,layers=2"; also the name of its folder
    words: list  # arguments of train.py, without --out


def read_axis(word, parser):
    """FIELD=A,B,C -> name, [(value, arguments of train.py)]. ValueError if there is no such field or value."""
    name, equals, text = word.partition("=")
    actions = {action.dest: action for action in parser._actions if action.nargs != 0 and action.dest not in OURS}
    field, action = name.replace("-", "_"), actions.get(name.replace("-", "_"))
    known_fields = [f.name for f in fields(tinygpt.Config)]
    if action is None and field not in known_fields:
        near = get_close_matches(field, [*actions, *known_fields], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{word}: {name!r} is neither a flag of train.py with a value nor a field of --set{hint}")
    choices = {"size": tinygpt.find_sizes()} | tinygpt.CHOICES
    known = list(action and action.choices or choices.get(field, ()))
    values = [value for pattern in text.split(",") for value in expand(pattern, known)]
    if not equals or not all(values):
        raise ValueError(f"{word}: expected values, as in {name}=A,B,C")
    if twice := next((value for value in values if values.count(value) > 1), None):
        raise ValueError(f"{word}: {twice} is given twice")
    if action is None:
        return field, [(value, ["--set", f"{field}={value}"]) for value in values]
    return field, [(value, [f"{action.option_strings[-1]}={value}"]) for value in values]


def expand(pattern, known):
    """The known values that match a pattern such as graphcore-*, in order; the pattern if it has no wildcard."""
    if not known or not re.search(r"[*?[]", pattern):
        return [pattern]
    found = [value for value in known if fnmatchcase(value, pattern)]
    if not found:
        raise ValueError(f"{pattern} matches none of the {len(known)} values, such as {known[0]}")
    return found


def make_trials(swept, rest):
    """The arguments of a sweep -> [Trial], one for each combination. ValueError if train.py would reject one."""
    parser = train.make_parser()
    parser.error = lambda message: refuse(message)
    given = parser.parse_args(rest)
    for flag in ("out", "resume", "list-sizes"):
        if getattr(given, flag.replace("-", "_")):
            raise ValueError(f"a sweep names the folders of its trials and resumes them; leave out --{flag}")
    axes = [read_axis(word, parser) for word in swept]
    names = [name for name, _ in axes]
    for name in names:
        set_before = name in tinygpt.overrides(given.set or [])
        if names.count(name) > 1 or set_before or getattr(given, name, None) != parser.get_default(name):
            raise ValueError(f"{name} is given more than once; name it once")
    trials, used = [], set()
    for chosen in itertools.product(*(values for _, values in axes)):
        name = ",".join(f"{name}={value}" for name, (value, _) in zip(names, chosen))
        words = [*rest, *(word for _, words in chosen for word in words)]
        try:
            check(parser.parse_args(words))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        folder = re.sub(r"[^\w.,=+-]", "_", name)[:150]
        if folder.casefold() in used:  # some file systems ignore case
            folder += f"-{len(trials) + 1}"
        used.add(folder.casefold())
        trials.append(Trial(folder, words))
    return trials


def refuse(message):
    raise ValueError(message)


def check(args):
    """ValueError if train.py would reject these settings for any text."""
    args.size = args.size or "1m"
    cfg = tinygpt.find_size(args.size).changed(**tinygpt.overrides(args.set or []))
    train.choose_settings(args, cfg.changed(seq_len=args.seq_len or cfg.seq_len))


def folder_of(swept, trials):
    """The folder of a sweep. Its name contains a hash of the trials, so the same arguments give the same folder."""
    key = hashlib.sha256(json.dumps(trials).encode()).hexdigest()[:6]
    names = "-".join(re.sub(r"\W", "", word.partition("=")[0]) for word in swept)
    return Path("runs", f"sweep-{names[:60]}-{key}")


# == 2  running them ===================================================================================================


def is_finished(folder):
    try:
        return bool(report.read_log(folder / "log.jsonl", folder.name).final)
    except OSError:
        return False


def has_checkpoint(folder):
    """True if train.py --resume would continue from a checkpoint rather than start the run."""
    return (folder / "last.safetensors").exists()


def state_of(folder):
    return "finished" if is_finished(folder) else "resumes" if has_checkpoint(folder) else "to run"


def read_trial(trial, folder):
    """The Log of a trial; None if it has not started. ValueError if its folder holds a run with other flags."""
    try:
        log = report.read_log(folder / "log.jsonl", trial.name)
    except FileNotFoundError:
        return None
    flags = train.flags_given(train.make_parser().parse_args(trial.words))
    if log.settings.get("flags", flags) != flags:
        raise ValueError(f"{folder} holds a run with other flags than this trial's; move it elsewhere")
    return log if log.settings else None


class Stop:
    """Signal handler while trials run: the first signal makes the trial save and exit, the second kills it."""

    def __init__(self):
        self.asked, self.process = 0, None

    def __call__(self, number=None, frame=None):
        self.asked += 1
        self.pass_on()

    def pass_on(self):
        if self.process and self.asked > 1:
            self.process.kill()
        elif self.process and self.asked and os.name == "posix":  # on Windows, Ctrl-C reaches the trial directly
            self.process.terminate()


def run_process(trial, folder, stop, show):
    """Run train.py -> its exit status and last line. Its output is appended to output.txt in its folder."""
    program = [sys.executable, str(Path(train.__file__).resolve())]
    command = [*program, *trial.words, "--resume", "--out", str(folder)]
    last, how = "", dict(stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    how |= dict(env=os.environ | {"PYTHONIOENCODING": "utf-8"}, start_new_session=True)  # `stop` forwards Ctrl-C
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        output.write(shlex.join(command) + "\n")
        output.flush()
        with subprocess.Popen(command, stdout=output, **how) as process:
            stop.process = process
            stop.pass_on()  # forward a signal that arrived while the process was being started
            try:
                for line in process.stderr:
                    output.write(line)
                    output.flush()
                    last = line.strip() or last
                    show(last)
            except BaseException:
                process.kill()
                raise
            finally:
                stop.process = None
    return process.returncode, last


class Status:
    """Shows the last line of a trial, overwriting one line of the terminal. Does nothing if stderr is a file."""

    def __init__(self, head):
        self.head, self.terminal = head, sys.stderr.isatty()

    def __call__(self, line):
        if self.terminal and line.startswith(("step ", "first ", "scoring ", "measuring ", "learning ")):
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{f'{self.head} | {line}'[:width]:{width}}", end="", file=sys.stderr, flush=True)

    def clear(self):
        if self.terminal:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="", file=sys.stderr, flush=True)


def lock_trial(folder, stop, head):
    """Lock the log of a trial and return it; None if the sweep is stopping. Waits while another process holds the lock
    (a trial that outlived its sweep, or a run that was started by hand)."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = False
    while not stop.asked:
        try:
            return locks.lock_log(folder)
        except ValueError as error:
            if not waiting:
                bpe.note(f"{head}: {str(error).partition(';')[0]}; waiting until it ends ...")
            waiting = True
            time.sleep(0.5)


def run_trial(trial, folder, stop, head):
    """Run a trial -> "" or the reason why it failed; None if it had finished before or the sweep is stopping."""
    show = Status(head)
    while lock := lock_trial(folder, stop, head):
        with lock:
            try:
                read_trial(trial, folder)
            except ValueError as error:
                return str(error)
            if is_finished(folder):
                bpe.note(f"{head}: already finished")
                return None
            if not has_checkpoint(folder):  # killed early: start again, without its best model
                lock.truncate(0)
                for path in folder.glob("*.safetensors"):
                    path.unlink()
        bpe.note(f"{head} ...")
        begun = time.monotonic()
        status, last = run_process(trial, folder, stop, show)
        show.clear()
        if stop.asked:
            return None
        if is_finished(folder):
            bits = report.score(report.read_log(folder / "log.jsonl", trial.name))
            bpe.note(f"{head}: {bits:.4f} bits/byte in {bpe.clock(time.monotonic() - begun)}")
            return ""
        if locks.BUSY not in last:  # otherwise another process locked the log first: wait for it
            killed = status < 0 or not last
            return f"train.py ended with status {status}" if killed else last.removeprefix("train.py: error: ")
    return None


def run_all(trials, folder):
    """Run the unfinished trials -> {name of a failed trial: reason}, True if the sweep was stopped."""
    failed, stop, old = {}, Stop(), {}
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, stop) for number in signals}
    try:
        for place, trial in enumerate(trials, 1):
            head = f"{place}/{len(trials)} {trial.name}"
            why = run_trial(trial, folder / trial.name, stop, head)
            if stop.asked:
                break
            if why is None:
                continue
            if why:
                failed[trial.name] = why
                bpe.note(f"{head}: failed: {why}")
            write_results(trials, folder, failed)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return failed, bool(stop.asked)


# == 3  the table ======================================================================================================


def read_begun(trials, folder):
    """name -> Log of the trials that have written at least their settings."""
    logs = {}
    for trial in trials:
        with contextlib.suppress(OSError, ValueError):
            log = read_trial(trial, folder / trial.name)
            logs |= {trial.name: log} if log else {}
    return logs


def results(trials, folder, failed):
    """A dict for each trial that has started or failed: finished ones first, best first."""
    logs, rows = read_begun(trials, folder), []
    for trial in trials:
        row = report.result(logs[trial.name]) if trial.name in logs else {}
        if trial.name in failed:
            row |= {"state": "failed", "error": failed[trial.name]}
        rows += [{"trial": trial.name, **row, "words": trial.words}] if row else []
    return sorted(rows, key=lambda row: (row["state"] != "finished", row.get("bits_per_byte") or 0))


def write_results(trials, folder, failed):
    """Write results.jsonl atomically."""
    lines = (json.dumps(row).encode() + b"\n" for row in results(trials, folder, failed))
    tinygpt.write_aside(folder / "results.jsonl", lines)


def table(rows):
    """Format `results` as the lines of a table."""
    wide = max([len(row["trial"]) for row in rows] + [5])
    lines = [f"{'trial':{wide}} {'bits/byte':>9} {'tokens read':>13} {'tok/s':>9} {'parameters':>13}"]
    for row in rows:
        if row["state"] == "failed":
            lines.append(f"{row['trial']:{wide}} failed: {row['error']}")
            continue
        bits = row["bits_per_byte"]
        cells = [f"{'' if bits is None else format(bits, '.4f'):>9}"]
        for name, width in (("tokens", 13), ("tokens_per_second", 9), ("parameters", 13)):
            cells.append(f"{'' if row[name] is None else format(row[name], ','):>{width}}")
        state = "" if row["state"] == "finished" else f" {row['state']}"
        lines.append(f"{row['trial']:{wide}} {' '.join(cells)}{state}")
    return lines


def finish(trials, folder, failed):
    """Print the table; write results.jsonl and the page of the runs that have started."""
    write_results(trials, folder, failed)
    rows = results(trials, folder, failed)
    if not rows:
        return
    bpe.say("\n".join(table(rows)))
    bpe.note(f"as JSON lines: {folder / 'results.jsonl'}")
    if logs := report.best_first(read_begun(trials, folder).values()):
        report.write_page(logs, folder / "report.html")
        bpe.note(f"curves:        {folder / 'report.html'}")


# == 4  command line ===================================================================================================


def claim(folder, trials):
    """Make the folder of these trials -> its sweep.json, locked until it is closed. ValueError if the folder holds
    something else or another process is running the sweep."""
    path, text = folder / "sweep.json", json.dumps([list(trial) for trial in trials]) + "\n"
    if not path.exists() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no sweep; name another --out or leave it out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = locks.open_locked(path, f"another process is running the sweep in {folder}")
    found = path.read_text(encoding="utf-8", errors="replace")
    if found not in ("", text):
        lock.close()
        raise ValueError(f"{folder} holds another sweep; name another --out or leave it out")
    if not found:
        lock.write(text)
        lock.flush()
    return lock


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = bpe.Parser(
        prog="sweep.py",
        usage="sweep.py FIELD=A,B,C [FIELD=...] [--out FOLDER] [--list] [flags of train.py]",
        description="Run train.py for every combination of values; size='graphcore-*' stands for all matching sizes.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the sweep (default runs/sweep-FIELD-...)")
    parser.add_argument("--list", action="store_true", help="print the trials and their commands without running them")
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    swept = argv[:first]
    args, rest = parser.parse_known_args(argv[first:])
    try:
        if not swept:
            raise ValueError("name the settings to vary before the flags: lr=1e-3,2e-3,4e-3 --size 1m --minutes 2")
        trials = make_trials(swept, rest)
        folder = args.out or folder_of(swept, trials)
        if args.list:
            for trial in trials:
                words = train.command("train.py", *trial.words, "--out", folder / trial.name)
                bpe.say(f"{state_of(folder / trial.name):8}  {words}")
            return 0
        with claim(folder, trials):
            bpe.note(f"{len(trials)} trials in {folder}")
            failed, stopped = run_all(trials, folder)
            finish(trials, folder, failed)
    except (OSError, ValueError) as error:
        parser.error(error)
    if stopped:
        bpe.note(f"stopped; to resume:  {train.command('extras/sweep.py', *argv)}")
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
