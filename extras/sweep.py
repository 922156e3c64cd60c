"""Short runs of train.py, one for each combination of settings, and what they reached.

    python extras/sweep.py lr=1e-3,2e-3,4e-3 --size 1m --minutes 2
    python extras/sweep.py 'size=graphcore-*' --steps 200 --list       # what would run; without --list it runs

Words before the first flag name a flag of train.py or a field of --set and its values; the flags go to every trial. A
trial is a run in a folder of its own: ended with Ctrl-C, the sweep goes on when it is started with the same words.
One process runs a sweep at a time; where another process trains in the folder of a trial, the sweep waits for its end.
Read in order: 1 the trials, 2 running them, 3 the table, 4 command line.
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

import locks
import report

import bpe
import tinygpt
import train

# == 1  the trials =====================================================================================================

OURS = ("out", "resume", "list_sizes", "help", "set")  # flags of train.py that a sweep sets by itself, or cannot


class Trial(NamedTuple):
    name: str  # "lr=1e-3,layers=2", also that of its folder
    words: list  # for train.py, without --out


def read_axis(word, parser):
    """FIELD=A,B,C -> the name, and [(value, words for train.py)]. ValueError if there is no such field or value."""
    name, equals, text = word.partition("=")
    actions = {action.dest: action for action in parser._actions if action.nargs != 0 and action.dest not in OURS}
    field, action = name.replace("-", "_"), actions.get(name.replace("-", "_"))
    known_fields = [f.name for f in fields(tinygpt.Config)]
    if action is None and field not in known_fields:
        near = get_close_matches(field, [*actions, *known_fields], 1)
        hint = f"; {near[0]} is" if near else ""
        raise ValueError(f"{word}: {name!r} is no flag of train.py with a value and no field of --set{hint}")
    known = list(action.choices or ()) if action else tinygpt.CHOICES.get(field, ())
    values = [value for pattern in text.split(",") for value in expand(pattern, known)]
    if not equals or not all(values):
        raise ValueError(f"{word}: expected values, as in {name}=A,B,C")
    if twice := next((value for value in values if values.count(value) > 1), None):
        raise ValueError(f"{word}: {twice} is there twice")
    if action is None:
        return field, [(value, ["--set", f"{field}={value}"]) for value in values]
    return field, [(value, [f"{action.option_strings[-1]}={value}"]) for value in values]


def expand(pattern, known):
    """The known values that a pattern such as graphcore-* fits, in their order; itself if it is no pattern."""
    if not known or not re.search(r"[*?[]", pattern):
        return [pattern]
    found = [value for value in known if fnmatchcase(value, pattern)]
    if not found:
        raise ValueError(f"{pattern} fits none of the {len(known)} values; the first is {known[0]}")
    return found


def make_trials(swept, rest):
    """The words of a sweep -> [Trial], each combination once. ValueError if train.py would refuse the words of one."""
    parser = train.make_parser()
    parser.error = lambda message: refuse(message)
    given = parser.parse_args(rest)
    for flag in ("out", "resume", "list-sizes"):
        if getattr(given, flag.replace("-", "_")):
            raise ValueError(f"a sweep names the folders of its trials and goes on by itself; leave out --{flag}")
    axes = [read_axis(word, parser) for word in swept]
    names = [name for name, _ in axes]
    for name in names:
        set_before = name in tinygpt.overrides(given.set or [])
        if names.count(name) > 1 or set_before or getattr(given, name, None) != parser.get_default(name):
            raise ValueError(f"{name} is swept and given once more; name it once")
    trials, used = [], set()
    for chosen in itertools.product(*(values for _, values in axes)):
        name = ",".join(f"{name}={value}" for name, (value, _) in zip(names, chosen))
        words = [*rest, *(word for _, words in chosen for word in words)]
        try:
            check(parser.parse_args(words))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        folder = re.sub(r"[^\w.,=+-]", "_", name)[:150]
        if folder.casefold() in used:  # some file systems do not tell a from A
            folder += f"-{len(trials) + 1}"
        used.add(folder.casefold())
        trials.append(Trial(folder, words))
    return trials


def refuse(message):
    raise ValueError(message)


def check(args):
    """ValueError if train.py would refuse these settings whatever the text."""
    args.size = args.size or "1m"
    cfg = tinygpt.SIZES[args.size].changed(**tinygpt.overrides(args.set or []))
    train.choose_settings(args, cfg.changed(seq_len=args.seq_len or cfg.seq_len))


def folder_of(swept, trials):
    """A folder for these trials and no others: the same words find it again."""
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
    """Whether train.py --resume goes on from a checkpoint; without one it begins the run."""
    return (folder / "last.safetensors").exists()


def state_of(folder):
    return "finished" if is_finished(folder) else "goes on" if has_checkpoint(folder) else "to run"


def read_trial(trial, folder):
    """The Log of a trial, None if it has not begun. ValueError if its folder holds a run with other flags."""
    try:
        log = report.read_log(folder / "log.jsonl", trial.name)
    except FileNotFoundError:
        return None
    flags = train.flags_given(train.make_parser().parse_args(trial.words))
    if log.settings.get("flags", flags) != flags:
        raise ValueError(f"{folder} holds a run with other flags than this trial's; move it elsewhere")
    return log if log.settings else None


class Stop:
    """Ctrl-C and SIGTERM while trials run: the first asks the trial to save and end, a second ends it at once."""

    def __init__(self):
        self.asked, self.process = 0, None

    def __call__(self, number=None, frame=None):
        self.asked += 1
        self.pass_on()

    def pass_on(self):
        if self.process and self.asked > 1:
            self.process.kill()
        elif self.process and self.asked and os.name == "posix":  # elsewhere Ctrl-C reaches the trial by itself
            self.process.terminate()


def run_process(trial, folder, stop, show):
    """One train.py process -> its exit status and last line. What it prints goes to output.txt in its folder."""
    program = [sys.executable, str(Path(train.__file__).resolve())]
    command = [*program, *trial.words, "--resume", "--out", str(folder)]
    last, how = "", dict(stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    how |= dict(env=os.environ | {"PYTHONIOENCODING": "utf-8"}, start_new_session=True)  # Ctrl-C comes through `stop`
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        output.write(shlex.join(command) + "\n")
        output.flush()
        with subprocess.Popen(command, stdout=output, **how) as process:
            stop.process = process
            stop.pass_on()  # a signal that came while it was started
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
    """The last line of a trial, on one line of a terminal; nothing where stderr is a file."""

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
    """The locked log of a trial; None if the sweep was asked to stop. While another process has it (a trial that
    outlived its sweep, a run that was started by hand), wait for its end."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = False
    while not stop.asked:
        try:
            return train.lock_log(folder)
        except ValueError as error:
            if not waiting:
                bpe.note(f"{head}: {str(error).partition(';')[0]}; waiting for its end ...")
            waiting = True
            time.sleep(0.5)


def run_trial(trial, folder, stop, head):
    """A trial to its end -> why it failed, "" if it did not; None if it was finished before or the sweep is to stop."""
    show = Status(head)
    while lock := lock_trial(folder, stop, head):
        with lock:
            try:
                read_trial(trial, folder)
            except ValueError as error:
                return str(error)
            if is_finished(folder):
                bpe.note(f"{head}: finished before")
                return None
            if not has_checkpoint(folder):  # killed early: it begins again; its best model would be in the way
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
        if train.BUSY not in last:  # else another process was faster to lock the log
            killed = status < 0 or not last
            return f"train.py ended with status {status}" if killed else last.removeprefix("train.py: error: ")
    return None


def run_all(trials, folder):
    """Every trial that is not finished -> {name of a trial that failed: why}, whether it was asked to stop."""
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
    """name -> Log of the trials that have written their settings at least."""
    logs = {}
    for trial in trials:
        with contextlib.suppress(OSError, ValueError):
            log = read_trial(trial, folder / trial.name)
            logs |= {trial.name: log} if log else {}
    return logs


def results(trials, folder, failed):
    """A dict for each trial that has begun or failed: the best first, then those that did not get to the end."""
    logs, rows = read_begun(trials, folder), []
    for trial in trials:
        row = report.result(logs[trial.name]) if trial.name in logs else {}
        if trial.name in failed:
            row |= {"state": "failed", "error": failed[trial.name]}
        rows += [{"trial": trial.name, **row, "words": trial.words}] if row else []
    return sorted(rows, key=lambda row: (row["state"] != "finished", row.get("bits_per_byte") or 0))


def write_results(trials, folder, failed):
    """results.jsonl, whole at any moment."""
    aside = folder / "results.jsonl.new"
    lines = [json.dumps(row) + "\n" for row in results(trials, folder, failed)]
    aside.write_text("".join(lines), encoding="utf-8", newline="\n")
    aside.replace(folder / "results.jsonl")


def table(rows):
    """The lines of the table of `results`."""
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
    """The table on stdout, results.jsonl and the page of the runs that have begun."""
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
    """Make the folder, for these trials alone -> its sweep.json, locked until it is closed. ValueError if the folder
    holds something else or another process runs the sweep."""
    path, text = folder / "sweep.json", json.dumps([list(trial) for trial in trials]) + "\n"
    if not path.exists() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no sweep; name another --out, or none")
    folder.mkdir(parents=True, exist_ok=True)
    lock = locks.open_locked(path, f"another process runs the sweep in {folder}")
    found = path.read_text(encoding="utf-8", errors="replace")
    if found not in ("", text):
        lock.close()
        raise ValueError(f"{folder} holds another sweep; name another --out, or none")
    if not found:
        lock.write(text)
        lock.flush()
    return lock


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = bpe.Parser(
        prog="sweep.py",
        usage="sweep.py FIELD=A,B,C [FIELD=...] [--out FOLDER] [--list] [flags of train.py]",
        description="Runs of train.py over every combination of values; size='graphcore-*' stands for all that fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the trials (default runs/sweep-FIELD-...)")
    parser.add_argument("--list", action="store_true", help="print the trials and their commands, run nothing")
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    swept = argv[:first]
    args, rest = parser.parse_known_args(argv[first:])
    try:
        if not swept:
            raise ValueError("name what to vary before the flags: lr=1e-3,2e-3,4e-3 --size 1m --minutes 2")
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
        bpe.note(f"stopped; to go on:  {train.command('extras/sweep.py', *argv)}")
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
