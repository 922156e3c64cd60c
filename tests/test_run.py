"""extras/run.py: a run is watched and stopped in good order."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import LONG, interrupt_at, invoke, losses, model_bytes, read_log, refusal, shown, trained

import tinygpt
import train
from extras import plan, run


def test_the_recent_pace_forgets_the_compilation_and_follows_a_machine_that_slows_down():
    pace = run.recent_pace(0.0, 50.0, 1)
    assert pace == 50 and run.recent_pace(pace, 0.1, 2) == 0.1
    pace = 0.1
    for count in range(3, 103):
        pace = run.recent_pace(pace, 0.3, count)
    assert 0.29 < pace < 0.3
    assert plan.seconds_left(0, pace) == 0
    assert plan.seconds_left(97, 0.5) == pytest.approx(50)  # 3% for what stands between updates


HANGUP = [("SIGHUP", 3), ("SIGHUP", 6)] if hasattr(signal, "SIGHUP") else []


@pytest.mark.parametrize("name, step", [("SIGINT", 0), ("SIGINT", 5), ("SIGTERM", 7), ("SIGTERM", 11), *HANGUP])
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(place, text, finished, name, step):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, step, lambda: signal.raise_signal(getattr(signal, name)))
        status, first, err = invoke(train.main, "--size", "tiny", "--data", text, *LONG)
    assert status == 130
    assert f"stopped at update {step} of 12" in err
    assert shown(err, "to go on:") == ["python", "train.py", "--resume", "--out", str(Path("runs", "tiny"))]
    last = str(Path("runs", "tiny", "last.safetensors"))
    assert shown(err, "a story:")[:4] == ["python", "sample.py", "--checkpoint", last]
    assert tinygpt.load_checkpoint(last).metadata["step"] == str(step)
    status, then, err = invoke(train.main, *shown(err, "to go on:")[2:])
    assert status == 0, err
    assert model_bytes() == model_bytes(finished.folder)
    assert losses() == losses(finished.folder)
    assert [e["step"] for e in read_log() if "loss" in e] == list(range(1, 13))
    assert [e for e in read_log() if "val_nats" in e] == [e for e in read_log(finished.folder) if "val_nats" in e]
    assert first + then == finished.out


@pytest.mark.skipif(not HANGUP, reason="this system has no SIGHUP")
def test_a_hangup_that_nohup_ignores_does_not_stop_a_run(place, text, finished, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt_at(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGHUP))
        trained("--data", text, *LONG)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert model_bytes() == model_bytes(finished.folder)


def test_a_run_is_stopped_twice_and_still_the_same(place, text, finished):
    words = ["--size", "tiny", "--data", text, *LONG]
    for step in (3, 4):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step, lambda: signal.raise_signal(signal.SIGINT))
            assert invoke(train.main, *words)[0] == 130
        words = ["--resume"]
    assert invoke(train.main, "--resume")[0] == 0
    assert model_bytes() == model_bytes(finished.folder)


def test_signals_are_as_before_when_a_run_is_over(place, text):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    trained("--data", text, "--steps", 1)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    "damage", [b"", b"\0" * 7, b"\xff" * 99, b"\x02" + bytes(7) + b"[]", b"\x04" + bytes(7) + b"null"]
)
def test_the_line_that_ends_a_run_bears_a_damaged_checkpoint(place, text, damage):
    path = Path("runs", "tiny", "last.safetensors")
    trained("--data", text, "--steps", 1)
    path.write_bytes(damage)
    watched = SimpleNamespace(folder=path.parent)
    assert run.Run.last_good(watched) == f"no checkpoint is in {path.parent} yet"


def test_a_run_that_began_and_ended_meanwhile_is_not_written_over(place, text, monkeypatch):
    """Two are started at once with one --out: one has trained while the other still read its text."""
    real = train.prepare_data

    def prepare_slowly(*args):
        monkeypatch.setattr(train, "prepare_data", real)
        trained("--data", text, "--steps", 1, "--out", "mine")
        return real(*args)

    monkeypatch.setattr(train, "prepare_data", prepare_slowly)
    message = refusal(train.main, "train.py", "--size", "tiny", "--data", text, "--steps", 2, "--out", "mine")
    assert "mine holds a run; go on with --resume" in message
    assert losses("mine").keys() == {1}
