"""Runs that are killed, stopped, or short of disk: what is left is whole, and --resume ends in the same bytes.

Most of this is done to real processes. `-m slow` injects more of each: a kill and an error at every single write,
flush, fsync, rename and removal, and more kills at random moments. What was injected and survived: `pytest -rP`.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    LONG,
    NUMPY,
    ROOT,
    SMALL,
    interrupt_at,
    invoke,
    losses,
    model_bytes,
    read_log,
    refusal,
    trained,
    write_stories,
)

import bpe
import tinygpt
import train
from extras import run


def start(folder, *words, **more):
    """A process of train.py in `folder`."""
    command = [sys.executable, ROOT / "train.py", *map(str, words)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OPENBLAS_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes | more)


def finish(process, *statuses):
    """stderr of a process that must end with one of these statuses, by default 0."""
    _, err = process.communicate(timeout=600)
    assert process.returncode in (statuses or (0,)) and "Traceback" not in err, err
    return err


def the_error(err):
    """The one line that says why a process ended."""
    (line,) = [line for line in err.splitlines() if line.startswith("train.py: error: ")]
    assert err.splitlines()[-1] == line
    return line.removeprefix("train.py: error: ")


def wait_for(condition, process, seconds=60):
    """Wait until condition() or the process has ended; whether condition() came true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return condition()


def log_size(folder):
    with contextlib.suppress(OSError):
        return (folder / "log.jsonl").stat().st_size
    return 0


def modified(path):
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def count_updates(folder):
    with contextlib.suppress(OSError):
        return (folder / "log.jsonl").read_bytes().count(b'"loss"')
    return 0


def result(folder):
    """All that a run leaves: parameters, moments, step, its best model, its milestones, and its log but for the time
    that it took. Nothing may be left over."""
    files = sorted(path.name for path in Path(folder).iterdir() if path.suffix != ".png")
    assert all(name == "log.jsonl" or name.endswith(".safetensors") for name in files), files
    kept = [tinygpt.load_checkpoint(Path(folder, name)) for name in files if name != "log.jsonl"]
    tensors = [(c.parameters.tobytes(), {name: x.tobytes() for name, x in c.extra.items()}) for c in kept]
    places = [(c.metadata.get("step"), c.metadata.get("evaluated"), c.metadata.get("best")) for c in kept]
    settings, *entries = read_log(folder)
    settings["settings"].pop("flags")  # --minutes here, --steps in the command that repeats it
    checksums = settings["settings"].pop("checksums").items()  # without the times when the token files were written
    settings["checksums"] = {path: crc32 for path, (crc32, *_) in checksums}
    return files, tensors, places, settings, [{k: v for k, v in e.items() if k != "seconds"} for e in entries]


# == kill -9 ===========================================================================================================


MORE_KILLS = [pytest.param(*row, marks=pytest.mark.slow) for row in (("numpy", 20, 1.5), ("fast", 12, 1.5))]


@pytest.mark.parametrize("kernels, kills, minutes", [("numpy", 3, 0.15), *MORE_KILLS])
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(tmp_path, kernels, kills, minutes):
    """By the clock: how many updates fit is measured once, and a setting from then on."""
    write_stories(tmp_path / "s.txt")
    words = ["--data", "s.txt", *SMALL, "--kernels", kernels, "--out", "run", "--resume", "--save-every", 0]
    words += ["--minutes", minutes, "--eval-every", 40, "--prompt", "Lily", "--keep", 3]
    finish(start(tmp_path, "--data", "s.txt", *SMALL, "--kernels", kernels, "--steps", 1))  # all that is made once
    rng, killed, steps, last = np.random.default_rng(kills), 0, [], tmp_path / "run" / "last.safetensors"
    while killed < kills:
        before, saves = log_size(tmp_path / "run"), {modified(last)}
        process = start(tmp_path, *words)
        if killed % 3 == 0:  # some time after its second checkpoint
            assert wait_for(lambda: saves.add(modified(last)) or len(saves) > 2, process)  # noqa: B023
        elif killed % 3 == 1:  # some time after it began to write
            assert wait_for(lambda: log_size(tmp_path / "run") != before, process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.8))  # else at any moment, while it imports, reads or measures
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"over before kill {killed + 1}"
        killed += 1
        steps.append(int(tinygpt.load_checkpoint(last).metadata["step"]))
    finish(start(tmp_path, *words))
    whole = read_log(tmp_path / "run")
    repeat = shlex.split(whole[0]["command"])[2:]
    assert "--minutes" not in repeat
    finish(start(tmp_path, *repeat, "--out", "other", "--threads", 1))
    assert result(tmp_path / "run") == result(tmp_path / "other")
    assert [e["step"] for e in whole if "loss" in e] == list(range(1, whole[0]["settings"]["steps"] + 1))
    assert max(steps) > 0  # negative control: checkpoints were reached in between
    print(f"{killed} kills survived with {kernels}; checkpoints at {steps} of {whole[0]['settings']['steps']} updates")


# Imports train.py once and forks for each run, which dies, or meets an error, in call `number` of those that change a
# file. Arguments: the project's folder, what happens, every how many calls, the words of the run.
INJECT = """
import json, os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
import bpe, tinygpt, train
from extras import curve, locks, plan, resume, run, summary
what, stride, words = sys.argv[2], int(sys.argv[3]), sys.argv[4:]
sys.modules["matplotlib"] = None
plan.measure_peak = lambda: 1e11
run.Run.save_seconds = property(lambda run: 0.0, lambda run, seconds: None)  # after every update: equal calls
tinygpt.set_threads(1)
calls, number = [], None

def call(name, act, half=lambda: None):
    calls.append(name)
    if len(calls) == number:
        half()  # of a write, half of its bytes arrive
        if what == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        import errno
        code = getattr(errno, what)
        raise OSError(code, os.strerror(code))
    return act()

class File:
    def __init__(self, f):
        self.f = f
    def write(self, data):
        return call("write", lambda: self.f.write(data), lambda: (self.f.write(data[: len(data) // 2]), self.f.flush()))
    def writelines(self, chunks):
        for chunk in chunks:
            self.write(chunk)
    def flush(self):
        return call("flush", self.f.flush)
    def truncate(self, size):
        return call("truncate", lambda: self.f.truncate(size))
    def __getattr__(self, name):
        return getattr(self.f, name)
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.f.close()

def patched_open(path, mode="r", **more):
    f = open(path, mode, **more)
    return f if mode in ("r", "rb") else File(f)

for module in (bpe, tinygpt, train, locks):
    module.open = patched_open
for name in ("fsync", "replace", "mkdir", "remove"):
    real = getattr(os, name)
    setattr(os, name, lambda *args, name=name, real=real: call(name, lambda: real(*args)))

def run(folder, at, words):
    global number
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        out = os.open("output", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        number = at
        try:
            status = train.main(words)
        except SystemExit as leave:
            status = leave.code
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 99
        sys.stderr.flush(), sys.stdout.flush()
        with open("calls", "w") as f:
            json.dump(calls, f)
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(os.path.join(folder, "output"), encoding="utf-8") as f:
        return status, f.read()

for folder in ("warm", "0"):  # the first may also write compiled kernels
    os.mkdir(folder)
    calls.clear()
    status, out = run(folder, None, words)
    assert status == 0, out
with open("0/calls") as f:
    names = json.load(f)
for at in [*range(1, len(names), stride), len(names)]:
    folder = str(at)
    os.mkdir(folder)
    calls.clear()
    first, first_out = run(folder, at, words)
    there = os.path.exists(folder + "/run/last.safetensors")
    step = int(tinygpt.load_checkpoint(folder + "/run/last.safetensors").metadata["step"]) if there else None
    then, then_out = run(folder, None, [*words, "--resume"])
    print(json.dumps([at, names[at - 1], first, first_out, step, then, then_out]), flush=True)
"""


def inject(tmp_path, what, stride):
    """[call, its name, status and output of the run that met it, step of its checkpoint, status and output of the run
    that went on], one for each; the reference is in folder 0. The text is short: its tokenizer is trained in each."""
    write_stories(tmp_path / "s.txt", count=8)
    (tmp_path / "inject.py").write_text(INJECT, encoding="utf-8")
    words = ["--data", str(tmp_path / "s.txt"), *NUMPY, "--vocab-size", "270", "--steps", "4", "--eval-every", "2"]
    words += ["--save-every", "0", "--keep", "1", "--out", "run"]
    command = [sys.executable, tmp_path / "inject.py", ROOT, what, stride, *words]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.mark.parametrize("stride", [19, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_kills_itself_in_any_call_that_changes_a_file_ends_in_the_same_bytes(tmp_path, stride):
    expected, counts, steps = result(tmp_path_of(tmp_path, "SIGKILL", stride, found := [])), {}, set()
    for at, name, first, _, step, then, out in found:
        assert first == -signal.SIGKILL, (at, name, first)
        over = then == 2 and "is finished" in out  # killed after its last line
        assert over or then == 0, (at, name, out)
        assert ("beginning at step 0" in out) == (step is None), (at, name, out)
        assert result(tmp_path / str(at) / "run") == expected, (at, name)
        counts[name] = counts.get(name, 0) + 1
        steps.add(step)
    assert steps >= {None, 4} and (stride > 1 or counts.keys() >= {"write", "flush", "fsync", "replace"})
    print(f"{len(found)} kills survived: {counts}, with checkpoints at {steps}")


def tmp_path_of(tmp_path, what, stride, found):
    found += inject(tmp_path, what, stride)
    return tmp_path / "0" / "run"


@pytest.mark.parametrize(
    "what, stride",
    [("ENOSPC", 29), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO"))],
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_meets_an_error_in_any_such_call_says_so_and_goes_on_to_the_same_bytes(tmp_path, what, stride):
    expected, survived = result(tmp_path_of(tmp_path, what, stride, found := [])), 0
    for at, name, first, out, step, then, then_out in found:
        if first:  # it stopped, with one line that says what is there
            assert first == 2, (at, name, out)
            line = the_error(out)
            if step is not None:
                assert f"last good checkpoint: {Path('run', 'last.safetensors')}, step {step}; " in line, (at, name)
            assert os.strerror(getattr(__import__("errno"), what)) in line, (at, name, line)
        else:
            survived += 1
        over = then == 2 and "is finished" in then_out  # its last line came through when the log was closed
        assert over or (first and then == 0), (at, name, then_out)
        assert result(tmp_path / str(at) / "run") == expected, (at, name)
    print(f"{len(found)} times {what}: {len(found) - survived} runs stopped with one line, {survived} went on")


# == --resume ==========================================================================================================


def test_resume_without_a_checkpoint_begins_at_step_0_and_says_so(place, text, finished):
    words = ["--size", "tiny", "--data", text, *LONG]
    for out in ((), ("--out", "new/run")):
        status, _, err = invoke(train.main, "--resume", *words, *out)
        assert status == 0 and "beginning at step 0" in err
        assert model_bytes(out[1] if out else "runs/tiny") == model_bytes(finished.folder)


def test_a_command_with_resume_begins_a_run_and_then_goes_on_with_it(place, text, finished):
    words = ["--size", "tiny", "--data", text, *LONG, "--resume"]
    for step in (3, 8):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step if step == 3 else step - 3, lambda: signal.raise_signal(signal.SIGINT))
            status, _, err = invoke(train.main, *words)
        assert status == 130 and f"stopped at update {step} of 12" in err
        assert ("beginning at step 0" in err) == (step == 3)
    for flag, value in (("--lr", 1), ("--steps", 24), ("--batch-size", 2), ("--seed", 4), ("--minutes", 1)):
        others = [word for word in words if flag != "--minutes" or word not in ("--steps", 12)]
        message = refusal(train.main, "train.py", *others, flag, value)
        assert flag in message and "--init-from" in message
    assert invoke(train.main, *words, "--threads", 1)[0] == 0
    assert model_bytes() == model_bytes(finished.folder) and losses() == losses(finished.folder)


def test_resume_never_writes_over_a_model_that_it_cannot_go_on_from(place, text):
    trained("--data", text, "--steps", 2, "--eval-every", 1)
    Path("runs/tiny/last.safetensors").unlink()
    files = {path: path.read_bytes() for path in Path("runs/tiny").iterdir()}
    words = ["--size", "tiny", "--data", text, "--steps", 2, "--out", "runs/tiny", "--resume"]
    assert "best.safetensors would be overwritten" in refusal(train.main, "train.py", *words)
    assert {path: path.read_bytes() for path in Path("runs/tiny").iterdir()} == files


@pytest.mark.parametrize("at", [1, 2])
def test_a_run_that_is_stopped_while_it_validates_stops_there_and_validates_again(
    place, text, finished, at, monkeypatch
):
    real, calls = train.evaluate, []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        status, _, err = invoke(train.main, "--size", "tiny", "--data", text, *LONG)
    assert status == 130 and f"stopped at update {5 * at} of 12, saved" in err
    assert [e["step"] for e in read_log() if "val_nats" in e] == [5, 10][: at - 1]
    assert invoke(train.main, "--resume")[0] == 0
    assert model_bytes() == model_bytes(finished.folder)
    assert [e for e in read_log() if "val_nats" in e] == [e for e in read_log(finished.folder) if "val_nats" in e]


def test_a_run_that_is_killed_in_its_last_validation_is_finished_by_resume(place, text, finished, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "finish", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            invoke(train.main, "--size", "tiny", "--data", text, *LONG)
    assert "final_val_nats" not in read_log()[-1]
    assert invoke(train.main, "--resume")[0] == 0
    assert read_log()[-1] == read_log(finished.folder)[-1] and model_bytes() == model_bytes(finished.folder)
    assert "is finished" in refusal(train.main, "train.py", "--resume")


def test_a_log_that_was_lost_does_not_end_a_run(place, text, finished):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(train.main, "--size", "tiny", "--data", text, *LONG)[0] == 130
    Path("runs/tiny/log.jsonl").unlink()
    assert invoke(train.main, "--resume")[0] == 0
    assert model_bytes() == model_bytes(finished.folder)
    assert [e["step"] for e in read_log() if "loss" in e] == list(range(5, 13))


# == --keep ============================================================================================================


@pytest.mark.parametrize(
    "keep, steps", [(0, []), (1, [12]), (3, [4, 8, 12]), (5, [3, 5, 8, 10, 12]), (99, list(range(1, 13)))]
)
def test_keep_leaves_that_many_checkpoints_evenly_over_the_run(place, text, finished, keep, steps):
    trained("--data", text, *LONG, "--keep", keep)
    assert sorted(path.name for path in Path("runs/tiny").glob("step-*")) == [
        f"step-{n:06d}.safetensors" for n in steps
    ]
    assert model_bytes() == model_bytes(finished.folder)


def test_a_run_can_go_back_to_a_milestone(place, text, finished):
    trained("--data", text, *LONG, "--keep", 3)
    shutil.copy("runs/tiny/step-000004.safetensors", "runs/tiny/last.safetensors")
    for path in Path("runs/tiny").glob("step-*"):
        path.unlink()
    status, _, err = invoke(train.main, "--resume")
    assert status == 0, err
    assert sorted(path.name for path in Path("runs/tiny").glob("step-*"))[0] == "step-000004.safetensors"
    assert model_bytes() == model_bytes(finished.folder) and losses() == losses(finished.folder)


# == the lock ==========================================================================================================


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_died(tmp_path):
    write_stories(tmp_path / "s.txt")
    words = ["--data", "s.txt", *NUMPY, "--steps", 100_000, "--out", "run"]
    first = start(tmp_path, *words)
    try:
        assert wait_for((tmp_path / "run" / "last.safetensors").exists, first)
        for more in (["--resume", "--out", "run"], [*words, "--resume"]):
            message = the_error(finish(start(tmp_path, *more), 2))
            assert "another process writes the run in run" in message
        assert "holds a run" in the_error(finish(start(tmp_path, *words), 2))
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    second = start(tmp_path, "--resume", "--out", "run")
    updates = count_updates(tmp_path / "run")
    assert wait_for(lambda: count_updates(tmp_path / "run") > updates, second)
    second.terminate()
    assert "to go on:" in finish(second, 130)


def test_two_runs_that_begin_at_once_in_one_folder_are_one(tmp_path):
    write_stories(tmp_path / "s.txt")
    words = ["--data", "s.txt", *NUMPY, "--steps", 300, "--out", "run"]
    processes = [start(tmp_path, *words) for _ in range(4)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2, 2, 2], errors
    assert all(the_error(err) for process, err in zip(processes, errors) if process.returncode)
    assert max(losses(tmp_path / "run")) == 300


# == disks =============================================================================================================


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 KB; skipped where this user may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_is_intact(tmp_path, small_disk):
    write_stories(tmp_path / "s.txt")
    words = ["--data", "s.txt", *NUMPY, "--steps", 60, "--save-every", 0, "--keep", 30, "--out"]
    message = the_error(finish(start(tmp_path, *words, "disk/run"), 2))
    last = tinygpt.load_checkpoint(small_disk / "run" / "last.safetensors")
    assert f"disk/run/last.safetensors, step {last.metadata['step']}; " in message and "No space left" in message
    assert (small_disk / "run" / "step-000002.safetensors").exists() and int(last.metadata["step"]) < 60
    assert not list(small_disk.glob("run/*.tmp"))
    remount(small_disk, "size=20m")
    finish(start(tmp_path, *shlex.split(message.rpartition("; then python train.py ")[2])))
    finish(start(tmp_path, *words, "other"))
    assert result(small_disk / "run") == result(tmp_path / "other")


def test_a_disk_that_becomes_read_only_ends_in_one_line(tmp_path, small_disk):
    write_stories(tmp_path / "s.txt")
    remount(small_disk, "size=20m")
    words = ["--data", "s.txt", *NUMPY, "--steps", 3, "--out"]
    finish(start(tmp_path, *words, "disk/run"))
    before = {path: path.read_bytes() for path in (small_disk / "run").iterdir()}
    remount(small_disk, "ro")
    for out, more in (("disk/run", ["--resume"]), ("disk/new", []), ("disk/new/run", ["--resume"])):
        message = the_error(finish(start(tmp_path, *words, out, *more), 2))
        assert message.startswith("disk/") and "Read-only file system" in message
    assert {path: path.read_bytes() for path in (small_disk / "run").iterdir()} == before


def test_a_limit_on_the_size_of_files_ends_in_one_line(tmp_path):
    write_stories(tmp_path / "s.txt", count=8)  # whose token file is below the limit
    words = ["--data", "s.txt", *NUMPY, "--vocab-size", 270, "--steps", 100_000, "--save-every", 0, "--out", "run"]
    limit = (60_000,) * 2  # less than a checkpoint, which is some 100 KB

    resource = pytest.importorskip("resource")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    message = the_error(finish(start(tmp_path, *words, preexec_fn=limited), 2))
    assert "File too large" in message and "no checkpoint is in run yet" in message
    first = start(tmp_path, *words, "--resume")
    assert wait_for((tmp_path / "run" / "last.safetensors").exists, first)
    first.kill()
    first.communicate()
    before = (tmp_path / "run" / "last.safetensors").read_bytes()
    message = the_error(finish(start(tmp_path, *words, "--resume", preexec_fn=limited), 2))
    assert "File too large" in message and "last good checkpoint: run/last.safetensors, step" in message
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == before


def test_progress_that_cannot_be_shown_does_not_end_a_run(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    write_stories(tmp_path / "s.txt")
    with open("/dev/full", "w", encoding="utf-8") as full:
        words = ["--data", "s.txt", *NUMPY, "--steps", 3, "--prompt", "Lily", "--out", "run"]
        process = start(tmp_path, *words, stdout=full, stderr=full)
        assert process.wait(60) == 0
    assert max(losses(tmp_path / "run")) == 3


# == damage ============================================================================================================


def test_no_damaged_byte_of_a_checkpoint_goes_unnoticed(place, text):
    trained("--data", text, "--steps", 1)
    path, rng = Path("runs/tiny/last.safetensors"), np.random.default_rng(0)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in [start, len(whole) - 1, *rng.integers(start, len(whole), 60)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
        assert f"{path} is not a checkpoint that can be read: it is damaged" in refusal(
            train.main, "train.py", "--resume"
        )
    path.write_bytes(whole)
    assert "is finished" in refusal(train.main, "train.py", "--resume")


@pytest.fixture
def stopped(place, text):
    """The last checkpoint of a run that was stopped after four updates."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(train.main, "--size", "tiny", "--data", text, *LONG)[0] == 130
    return Path("runs/tiny/last.safetensors")


def change(path, settings=None, moments=None, **metadata):
    """The checkpoint with other settings, moments or metadata, and the checksum of that."""
    c = tinygpt.load_checkpoint(path)
    metadata = {"settings": json.dumps(json.loads(c.metadata["settings"]) | (settings or {}))} | metadata
    extra = moments or c.extra
    tinygpt.save_checkpoint(path, c.parameters, c.cfg, c.tokenizer, extra, c.metadata | metadata)


BAD_PLACES = {
    "negative step": dict(step="-1"),
    "step beyond the end": dict(step="13"),
    "step of digits without end": dict(step="9" * 5000),
    "step that is no number": dict(step="many"),
    "log before its beginning": dict(log_bytes="-5"),
    "settings nested too deeply": dict(settings="[" * 100_000),
    "settings that are a list": dict(settings="[]"),
    "a batch of terabytes": dict(settings={"batch_size": 2**40}),
    "micro-batches that do not fit": dict(settings={"micro_batch_size": 3}),
    "no updates between validations": dict(settings={"eval_every": 0}),
    "an endless rate": dict(settings={"lr": math_inf} if (math_inf := float("inf")) else {}),
    "no files": dict(settings={"files": []}),
    "files that are numbers": dict(settings={"files": [[1], []]}),
    "checksums that are a list": dict(settings={"checksums": [[]]}),
    "checksums that are numbers": dict(settings={"checksums": {"t.bin": [5, [], []]}}),
    "a file without a checksum": dict(settings={"checksums": {"t.bin": []}}),
    "kernels of another program": dict(settings={"kernels": "fpga"}),
    "a schedule of another program": dict(settings={"schedule": "moon"}),
    "prompts that are numbers": dict(settings={"prompts": [5]}),
    "moments of one number": dict(moments=dict.fromkeys(("moment1", "moment2"), np.zeros(1, np.float32))),
    "moments in float64": dict(moments=dict.fromkeys(("moment1", "moment2"), np.zeros(21_000))),
    "no moments": dict(moments={"other": np.zeros(1)}),
}


@pytest.mark.parametrize("what", BAD_PLACES)
def test_a_place_that_cannot_be_gone_on_from_is_refused_in_one_line(stopped, what):
    if isinstance(BAD_PLACES[what].get("settings"), str):
        text = BAD_PLACES[what]["settings"]
        c = tinygpt.load_checkpoint(stopped)
        tinygpt.save_checkpoint(stopped, c.parameters, c.cfg, c.tokenizer, c.extra, c.metadata | {"settings": text})
    else:
        change(stopped, **BAD_PLACES[what])
    log = stopped.with_name("log.jsonl").read_bytes()
    message = refusal(train.main, "train.py", "--resume")
    assert str(stopped) in message and "no run to go on with" in message and len(message) < 300
    assert stopped.with_name("log.jsonl").read_bytes() == log


def test_what_is_changed_above_is_refused_for_that_alone(stopped, finished):
    change(stopped)
    assert invoke(train.main, "--resume")[0] == 0
    assert model_bytes() == model_bytes(finished.folder)


def test_a_checkpoint_with_another_tokenizer_does_not_read_the_tokens_of_this_one(stopped):
    c = tinygpt.load_checkpoint(stopped)
    tokenizer = bpe.Tokenizer.from_json(c.tokenizer)
    other = bpe.Tokenizer.from_merges(tokenizer.merges[:-2], train.RESERVED)
    metadata = c.metadata | {"tokenizer": other.to_json()}
    tinygpt.save_checkpoint(stopped, c.parameters, c.cfg, "", c.extra, metadata)
    assert "was written with tokenizer" in refusal(train.main, "train.py", "--resume")


def test_tokens_that_are_damaged_are_named_and_encoded_again_where_there_is_text(stopped, text, finished):
    (path,) = Path("data", "tokens").glob("*/train.bin")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    assert f"{path} is damaged" in refusal(train.main, "train.py", "--resume")
    trained("--data", text, *LONG)
    assert model_bytes("runs/tiny-2") == model_bytes(finished.folder)
    assert invoke(train.main, "--resume", "--out", "runs/tiny")[0] == 0
    assert model_bytes() == model_bytes(finished.folder)


# == numbers that are none =============================================================================================


@pytest.mark.parametrize("where", ["parameters", "m", "v"])
def test_a_number_that_is_none_is_written_nowhere(place, text, monkeypatch, where):
    """Put into what an update leaves, where neither its loss nor its norm shows it."""
    real, before = train.State.adamw, {}

    def poisoned(state, *rest):
        real(state, *rest)
        if state.step == 4:
            before.update({path: path.read_bytes() for path in Path("runs/tiny").glob("*.safetensors")})
            getattr(state, where)[-1] = np.inf

    monkeypatch.setattr(train.State, "adamw", poisoned)
    message = refusal(train.main, "train.py", "--size", "tiny", "--data", text, *LONG, "--keep", 3, "--save-every", 0)
    step = tinygpt.load_checkpoint("runs/tiny/last.safetensors").metadata["step"]
    assert "at step 4" in message and f"{Path('runs', 'tiny', 'last.safetensors')}, step {step}" in message
    assert before and {path: path.read_bytes() for path in Path("runs/tiny").glob("*.safetensors")} == before
    assert max(losses()) == 4 and "NaN" not in Path("runs/tiny/log.jsonl").read_text("utf-8")


# == signals ===========================================================================================================


@pytest.fixture(scope="module")
def trains_1m(tmp_path_factory):
    """A folder with stories, and the words of a run of the 1m size there, whose kernels have been compiled."""
    folder = tmp_path_factory.mktemp("signals")
    write_stories(folder / "s.txt", count=400)
    words = ["--size", "1m", "--data", "s.txt", "--vocab-size", 1000, "--steps", 100_000, "--eval-every", 5]
    return folder, words


def stop_by(process, folder, *signals):
    """Send these when updates are being made -> (stderr, seconds from the last of them to the end)."""
    updates = count_updates(folder)
    assert wait_for(lambda: count_updates(folder) > updates, process, 240)
    for number in signals:
        time.sleep(0.05)
        process.send_signal(number)
    begin = time.monotonic()
    err = finish(process, 130, *[-signal.SIGINT] * (len(signals) > 1))  # the second one may come after everything
    return err, time.monotonic() - begin


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_the_1m_size_saves_every_logged_update_when_a_signal_comes(trains_1m, name):
    folder, words = trains_1m
    for number in range(2):
        process = start(folder, *(["--resume"] if number else words), "--out", name)
        err, took = stop_by(process, folder / name, getattr(signal, name))
        step = tinygpt.load_checkpoint(folder / name / "last.safetensors").metadata["step"]
        assert f"stopped at update {step} of 100000, saved" in err and int(step) == max(losses(folder / name))
        print(f"{name}: saved and left after {took:.2f} s")


@pytest.mark.parametrize("name", ["last.safetensors", "step-000004.safetensors"])
def test_what_a_killed_run_left_half_written_is_removed_when_it_goes_on(place, text, finished, name):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(train.main, "--size", "tiny", "--data", text, *LONG)[0] == 130
    left = Path("runs", "tiny", f"{name}.4711-0123456789abcdef.tmp")
    left.write_bytes(b"half")
    status, _, err = invoke(train.main, "--resume")
    assert status == 0 and not left.exists(), err


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_second_ctrl_c_leaves_at_once_with_the_last_checkpoint_intact(trains_1m):
    folder, words = trains_1m
    process = start(folder, *words, "--micro-batch-size", 8, "--batch-size", 8, "--out", "twice")
    err, took = stop_by(process, folder / "twice", signal.SIGINT, signal.SIGINT)
    step = tinygpt.load_checkpoint(folder / "twice" / "last.safetensors").metadata["step"]
    assert "left at once; last good checkpoint" in err or "saved" in err
    assert f"step {step}" in err or f"update {step} " in err
    assert not list(folder.glob("twice/*.tmp"))
    print(f"second Ctrl-C: left after {took:.2f} s, checkpoint of step {step}")


def test_a_second_ctrl_c_in_the_middle_of_a_save_leaves_the_last_checkpoint(place, text, finished, monkeypatch):
    """Both come when all is written and flushed but the new file has not got its name."""
    real, last = os.fsync, Path("runs/tiny/last.safetensors")

    def interrupted(fd):
        real(fd)
        if last.exists() and list(last.parent.glob("last.safetensors.*.tmp")):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        status, _, err = invoke(train.main, "--size", "tiny", "--data", text, *LONG, "--save-every", 0)
    assert status == 130 and "left at once; last good checkpoint" in err
    step = tinygpt.load_checkpoint("runs/tiny/last.safetensors").metadata["step"]
    assert not list(Path("runs/tiny").glob("*.tmp"))
    assert f"step {step}" in err
    status, _, err = invoke(train.main, "--resume")
    assert status == 0, err
    assert model_bytes() == model_bytes(finished.folder)
