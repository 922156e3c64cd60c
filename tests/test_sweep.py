"""extras/sweep.py: its combinations, real trials, what is kept when it is stopped, what it refuses."""

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import invoke, read_log, refusal, write_stories

import tinygpt
import train
from extras import locks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "extras"))

import sweep

SHAPE = ["--size", "700k", "--seq-len", "16", "--vocab-size", "300", "--batch-size", "2", "--threads", "1"]
SHAPE += ["--kernels", "numpy", "--set", "width=24", "heads=3", "layers=1"]

SHORT = ["--data", "stories.txt", *SHAPE, "--steps", "2"]
STEPS = list(range(1, 401))
LONG = ["--data", "stories.txt", *SHAPE, "--steps", "400", "--eval-every", "400"]


# == tools =============================================================================================================


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with a text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_stories(tmp_path / "stories.txt", count=20)
    return tmp_path


def only_folder():
    (folder,) = Path("runs").iterdir()
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]


def losses(folder):
    return [(e["step"], e["loss"]) for e in read_log(folder) if "loss" in e]


# == 1  the trials =====================================================================================================


def test_every_combination_is_a_trial_once_in_order():
    trials = sweep.make_trials(["lr=1e-3,2e-3", "norm=layernorm,rmsnorm", "batch-size=2,4"], ["--size", "1m"])
    expected = list(itertools.product(("1e-3", "2e-3"), ("layernorm", "rmsnorm"), ("2", "4")))
    assert [t.name for t in trials] == [f"lr={a},norm={b},batch_size={c}" for a, b, c in expected]
    for trial, (lr, norm, batch_size) in zip(trials, expected):
        args = train.make_parser().parse_args(trial.words)
        assert (args.lr, args.batch_size, args.size) == (float(lr), int(batch_size), "1m")
        assert tinygpt.overrides(args.set) == {"norm": norm}


def test_fields_that_are_swept_stand_beside_those_that_are_set():
    (trial,) = sweep.make_trials(["layers=3"], ["--set", "norm=rmsnorm", "--steps", "2"])
    args = train.make_parser().parse_args(trial.words)
    assert tinygpt.overrides(args.set) == {"norm": "rmsnorm", "layers": 3} and args.steps == 2


def test_the_thirty_shapes_of_graphcore_are_one_word():
    trials = sweep.make_trials(["size=graphcore-*"], [])
    shapes = [size for size in tinygpt.find_sizes() if size.startswith("graphcore-")]
    assert [t.name.removeprefix("size=") for t in trials] == shapes
    assert len(trials) == 30


def test_folders_are_names_that_any_system_takes_and_differ(place):
    trials = sweep.make_trials(["data=a/b.txt,a_b.txt,a:b.txt"], [])
    names = [t.name for t in trials]
    assert len(set(names)) == 3 and not any(set(name) & set('/\\:*?"<>| ') for name in names)


def test_folders_differ_where_the_file_system_ignores_case():
    names = [t.name for t in sweep.make_trials(["data=a.txt,A.txt,b.txt,a:txt,A:TXT"], [])]
    assert len({name.lower() for name in names}) == 5


def test_the_same_words_have_the_same_folder_and_others_another():
    def folder(swept, *rest):
        return sweep.folder_of(swept, sweep.make_trials(swept, list(rest)))

    one = folder(["lr=1,2"], "--steps", "3")
    assert one == folder(["lr=1,2"], "--steps", "3") and one.parent == Path("runs") and "lr" in one.name
    assert len({one, folder(["lr=1,2"], "--steps", "4"), folder(["lr=1,3"], "--steps", "3"), folder(["seed=1,2"])}) == 4


@pytest.mark.parametrize("words, said", [
    ("--size 1m", "name the settings to vary before the flags"),
    ("lrr=1,2", "'lrr' is neither a flag of train.py with a value nor a field of --set; did you mean lr?"),
    ("resume=1", "'resume' is neither a flag"),
    ("out=a,b", "'out' is neither a flag"),
    ("lr", "expected values, as in lr=A,B,C"),
    ("lr=1e-3,,2e-3", "expected values"),
    ("lr=1e-3,2e-3,1e-3", "1e-3 is given twice"),
    ("lr=1e-3,fast", "lr=fast: argument --lr: invalid float value"),
    ("lr=1e-3,-1", "lr=-1: argument --lr: -1 is out of range"),
    ("lr=1e-3 --wrong 3", "unrecognized arguments: --wrong 3"),
    ("lr=1e-3 --lr 2e-3", "lr is given more than once"),
    ("lr=1e-3 lr=2e-3", "lr is given more than once"),
    ("layers=1,2 --set layers=3", "layers is given more than once"),
    ("norm=rmsnorm,rms", "norm=rms: norm is 'rms'"),
    ("norm=layer*,x*", "x* matches none of the 2 values"),
    ("layers=1,two", "expected layers=int"),
    ("heads=4,7 --size 1m", "heads=7: width 128 does not divide"),
    ("batch-size=8,6 --micro-batch-size 4", "batch_size=6: --micro-batch-size 4 does not divide"),
    ("steps=3,4 --minutes 2", "not allowed with argument"),
    ("lr=1e-3 --resume", "leave out --resume"),
    ("lr=1e-3 --list-sizes", "leave out --list-sizes"),
    ("min-lr=1e-4,1 --lr 1e-3", "min_lr=1: --min-lr 1.0 is above --lr 0.001"),
])  # fmt: skip
def test_a_mistake_ends_in_one_line_before_anything_runs(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "run_trial", None)
    assert said in refusal(sweep.main, "sweep.py", *words.split())
    assert not list(tmp_path.iterdir())


def test_list_prints_each_command_and_runs_nothing(place):
    status, out, err = invoke(sweep.main, "lr=1e-3,2e-3", "layers=1,2", "--list", "--size", "1m")
    lines = out.splitlines()
    assert status == 0 and not err and len(lines) == 4 and not Path("runs").exists()
    assert all(line.startswith("to run ") and " python train.py --size 1m " in line for line in lines)
    assert "--lr=2e-3 --set layers=1 --out " in lines[2]


# == 2  running them ===================================================================================================


def test_trials_run_fail_and_are_kept(place):
    words = [
        "data=stories.txt,missing.txt",
        "seed=1,2",
        *SHAPE,
        "--steps",
        "4",
        "--eval-every",
        "2",
        "--prompt",
        "Lily",
    ]
    status, out, err = invoke(sweep.main, *words)
    folder = only_folder()
    assert status == 1 and "4 trials in" in err
    good, bad = ([f"data={name}.txt,seed={seed}" for seed in (1, 2)] for name in ("stories", "missing"))
    rows = rows_of(folder)
    assert sorted(row["trial"] for row in rows[:2]) == good and [row["trial"] for row in rows[2:]] == bad
    for row in rows[:2]:
        entries = read_log(folder / row["trial"])
        assert row["bits_per_byte"] == entries[-1]["final_val_bits_per_byte"] and row["state"] == "finished"
        assert row["nats_per_token"] == entries[-1]["final_val_nats"]
        assert row["tokens"] == 4 * 2 * 16
        assert row["parameters"] == tinygpt.count_parameters(tinygpt.Config(**entries[0]["config"]))[0]
        assert entries[0]["settings"]["seed"] == int(row["trial"][-1]) and len(losses(folder / row["trial"])) == 4
        assert entries[0]["config"]["width"] == 24 and row["tokens_per_second"] > 0
        assert "Lily" in (folder / row["trial"] / "output.txt").read_text("utf-8")
    assert rows[0]["bits_per_byte"] < rows[1]["bits_per_byte"]
    for row in rows[2:]:
        assert row["state"] == "failed" and "missing.txt" in row["error"] and f"{row['trial']}: failed: " in err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["trial", *(row["trial"] for row in rows)]
    for line, row in zip(lines[1:3], rows):
        shown = [f"{row['bits_per_byte']:.4f}", *(f"{row[x]:,}" for x in ("tokens", "tokens_per_second", "parameters"))]
        assert line.split()[1:] == shown
    page = (folder / "report.html").read_text("utf-8")
    assert all(f"{row['bits_per_byte']:.4f}" in page for row in rows[:2])

    before = {name: (folder / name / "log.jsonl").stat().st_mtime_ns for name in good}
    write_stories(place / "missing.txt", seed=5, count=20)  # the same words run what failed, and nothing else
    status, out, err = invoke(sweep.main, *words)
    assert status == 0 and err.count("already finished") == 2, err
    assert {name: (folder / name / "log.jsonl").stat().st_mtime_ns for name in good} == before
    assert [row["state"] for row in rows_of(folder)] == ["finished"] * 4


def sweep_process(*words):
    command = [sys.executable, sweep.__file__, *words]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen(command, **pipes)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_sweep_that_is_stopped_shows_what_is_done_and_goes_on_with_the_rest(place, name):
    words = ["seed=1,2,3", "--data", "stories.txt", *SHAPE, "--steps", "400", "--eval-every", "400"]
    process = sweep_process(*words)
    try:
        deadline = time.monotonic() + 120
        second = None
        while second is None or not second.exists() or second.read_bytes().count(b"\n") < 20:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
            second = next(Path("runs").glob("sweep-*/seed=2/log.jsonl"), None)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    folder = only_folder()
    stopped = len(losses(folder / "seed=2"))
    assert [line.split()[0] for line in out.splitlines()] == ["trial", "seed=1", "seed=2"]
    assert f"at update {stopped} of 400" in out and "to resume:  python extras/sweep.py seed=1,2,3" in err
    assert 20 <= stopped < 400 and not (folder / "seed=3").exists()
    assert [sweep.state_of(folder / f"seed={seed}") for seed in (1, 2, 3)] == ["finished", "resumes", "to run"]

    first = (folder / "seed=1" / "log.jsonl").stat().st_mtime_ns
    kept = losses(folder / "seed=2")
    status, out, err = invoke(sweep.main, *words)
    assert status == 0 and err.count("already finished") == 1, err
    assert (folder / "seed=1" / "log.jsonl").stat().st_mtime_ns == first
    assert "--resume" in (folder / "seed=2" / "output.txt").read_text("utf-8")
    found = losses(folder / "seed=2")
    assert found[:stopped] == kept and [step for step, _ in found] == list(range(1, 401))
    assert [row["state"] for row in rows_of(folder)] == ["finished"] * 3


def test_a_trial_that_was_killed_before_its_first_checkpoint_begins_again(place):
    words = ["seed=1", *SHORT]
    folder = claimed(words)
    (folder / "seed=1").mkdir()
    (folder / "seed=1" / "log.jsonl").write_bytes(b'{"settings": {')
    (folder / "seed=1" / "best.safetensors").write_bytes(b"of a validation before that checkpoint")
    status, _, err = invoke(sweep.main, *words)
    assert status == 0, err
    assert len(losses(folder / "seed=1")) == 2


def test_a_trial_that_was_killed_while_it_was_scored_is_not_trained_again(place):
    words = ["seed=1", *SHORT]
    folder = claimed(words)
    assert invoke(sweep.main, *words)[0] == 0
    log, results = folder / "seed=1" / "log.jsonl", (folder / "results.jsonl").read_bytes()
    *trained, final = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(trained) + final[:20])
    (folder / "results.jsonl").write_bytes(results[:30])
    status, _, err = invoke(sweep.main, *words)
    assert status == 0, err
    assert log.read_bytes() == b"".join([*trained, final])  # with the seconds that its updates took
    assert (folder / "results.jsonl").read_bytes() == results


# -- other processes in its folders


def claimed(words):
    """The folder of a sweep, made and not locked."""
    trials = sweep.make_trials(words[:1], words[1:])
    folder = sweep.folder_of(words[:1], trials)
    sweep.claim(folder, trials).close()
    return folder


def train_process(words, folder):
    """train.py as the sweep starts it."""
    command = [sys.executable, train.__file__, *words, "--resume", "--out", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def has_updates(log, count):
    return log.exists() and log.read_bytes().count(b"\n") > count


def test_a_sweep_that_is_running_refuses_another_and_its_killed_ones_training_is_waited_for(place):
    words = ["seed=1,2", *LONG]
    folder = claimed(words)
    log = folder / "seed=1" / "log.jsonl"
    process = sweep_process(*words)
    try:
        wait_until(lambda: has_updates(log, 20), process)
        begun = log.read_bytes()[:200]
        assert "another process is running the sweep in" in refusal(sweep.main, "sweep.py", *words)
        assert process.poll() is None and not (folder / "results.jsonl").exists()
    finally:
        process.kill()
        process.communicate()
    assert not sweep.is_finished(folder / "seed=1")
    status, _, err = invoke(sweep.main, *words)
    assert status == 0 and "failed" not in err, err
    assert err.count("another process writes the run in") == 1 and "1/2 seed=1: already finished" in err
    assert log.read_bytes().startswith(begun) and [step for step, _ in losses(folder / "seed=1")] == STEPS
    assert (folder / "seed=1" / "output.txt").read_text("utf-8").count("--resume") == 1  # it was started once
    assert [row["state"] for row in rows_of(folder)] == ["finished"] * 2


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_trial_that_is_trained_by_hand_is_waited_for_and_goes_on_after_its_process_was_killed(place):
    words = ["seed=1", *LONG, "--save-every", "0", "--keep", "200"]  # a checkpoint after every second update
    run = claimed(words) / "seed=1"
    by_hand = train_process(["--seed", "1", *words[1:]], run)
    process = None
    try:
        wait_until(lambda: (run / "last.safetensors").exists(), by_hand)
        by_hand.send_signal(signal.SIGSTOP)  # it stays alive, with its lock, for as long as the sweep looks
        begun = read_log(run)[0]
        process = sweep_process(*words)
        assert "1 trials" in process.stderr.readline() and "another process writes" in process.stderr.readline()
        by_hand.kill()
        _, err = process.communicate(timeout=120)
    finally:
        for started in (by_hand, process):
            if started:
                started.kill()
                started.wait()
    assert process.returncode == 0 and "failed" not in err, err
    assert read_log(run)[0] == begun and [step for step, _ in losses(run)] == STEPS
    assert rows_of(run.parent)[0]["state"] == "finished"


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_a_running_sweep_refuses_one_whose_folder_has_another_name(place, monkeypatch):
    monkeypatch.setattr(sweep, "run_trial", None)
    words = ["seed=1,2", *LONG]
    folder = claimed(words)
    Path("linked").symlink_to(folder, target_is_directory=True)
    with sweep.claim(folder, sweep.make_trials(words[:1], words[1:])):
        refused = refusal(sweep.main, "sweep.py", *words, "--out", "linked")
        assert "another process is running the sweep in linked" in refused


def test_a_sweep_whose_folder_is_a_trial_of_another_is_refused(place, monkeypatch):
    monkeypatch.setattr(sweep, "run_trial", None)
    folder = claimed(["seed=1,2", *SHORT])
    (folder / "seed=1").mkdir()
    (folder / "seed=1" / "log.jsonl").touch()
    assert "holds no sweep" in refusal(sweep.main, "sweep.py", "lr=1e-3", *SHORT, "--out", folder / "seed=1")
    assert [path.name for path in (folder / "seed=1").iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_with_other_flags_in_a_trials_folder_is_neither_taken_nor_touched(place, finished):
    words = ["seed=1", *SHORT]
    run = claimed(words) / "seed=1"
    by_hand = ["--seed", "1", *SHORT, "--lr", "0.5"]
    assert train_process(by_hand, run).wait() == 0
    if not finished:  # as if it had been killed before its first checkpoint
        run.joinpath("log.jsonl").write_bytes(run.joinpath("log.jsonl").read_bytes().splitlines(keepends=True)[0])
        run.joinpath("last.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    status, out, err = invoke(sweep.main, *words)
    assert status == 1 and "holds a run with other flags" in err and "failed: " in out, err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    (row,) = rows_of(run.parent)
    assert row["state"] == "failed" and "bits_per_byte" not in row


@pytest.mark.parametrize("ends", ["finished", "killed"])
def test_a_trial_that_another_process_locks_first_is_no_failure(place, monkeypatch, ends):
    words = ["seed=1", *SHORT]
    folder, real, calls = claimed(words), sweep.run_process, []

    def slower(trial, folder, stop, show):
        calls.append(trial.name)
        if len(calls) > 1:
            return real(trial, folder, stop, show)
        if ends == "finished":
            real(trial, folder, stop, show)
        with locks.lock_log(folder):
            with pytest.raises(ValueError) as error:
                locks.lock_log(folder)
        return 2, f"train.py: error: {error.value}"

    monkeypatch.setattr(sweep, "run_process", slower)
    status, _, err = invoke(sweep.main, *words)
    assert status == 0 and "failed" not in err, err
    assert len(calls) == (1 if ends == "finished" else 2) and rows_of(folder)[0]["state"] == "finished"


def test_a_sweep_that_waits_for_another_process_is_stopped_at_once(place, monkeypatch):
    monkeypatch.setattr(sweep, "run_process", None)
    run, stop = claimed(["seed=1", *SHORT]) / "seed=1", sweep.Stop()
    run.mkdir()
    monkeypatch.setattr(time, "sleep", lambda seconds: stop())
    with locks.lock_log(run):
        assert sweep.run_trial(sweep.Trial("seed=1", []), run, stop, "1/1") is None


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(place, monkeypatch):
    monkeypatch.setattr(sweep, "run_trial", None)
    for path in (place / "mine" / "thesis.txt", place / "other" / "sweep.json"):
        path.parent.mkdir()
        path.write_text("[]\n", encoding="utf-8")
    said = refusal(sweep.main, "sweep.py", "lr=1e-3", "--out", "mine")
    assert "mine is not empty and holds no sweep" in said
    assert "other holds another sweep" in refusal(sweep.main, "sweep.py", "lr=1e-3", "--out", "other")
    assert [path.name for path in (place / "mine").iterdir()] == ["thesis.txt"]


def test_a_terminal_shows_the_trials_last_line_and_is_left_clean(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "60")
    with contextlib.redirect_stderr(Terminal()) as err:
        show = sweep.Status("2/9 lr=1e-3")
        show("step 7 | loss 3.2104 | lr 1.20e-03 | norm 0.83 | 52,310 tok/s | 41% of peak")
        show("model     700k: many parameters")
        show.clear()
    shown = err.getvalue().split("\r")
    assert shown[1].startswith("2/9 lr=1e-3 | step 7 | loss 3.2104") and all(len(part) < 60 for part in shown)
    assert "model" not in err.getvalue() and shown[-2].isspace() and not shown[-1]


def test_a_second_signal_ends_a_trial_at_once():
    sent = []
    stop = sweep.Stop()
    stop.process = SimpleNamespace(terminate=lambda: sent.append("terminate"), kill=lambda: sent.append("kill"))
    stop()
    stop()
    assert sent == (["terminate", "kill"] if os.name == "posix" else ["kill"])


def test_every_flag_has_a_help(capsys):
    with pytest.raises(SystemExit) as left:
        sweep.main(["--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and "FIELD=A,B,C" in said and "without running them" in said and "--out FOLDER" in said
