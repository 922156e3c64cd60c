"""extras/resume.py: what --resume goes on with, and what it refuses."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import LONG, SETTINGS, interrupt_at, invoke, losses, model_bytes, refusal, trained, write_stories

import tinygpt
import train
from extras import resume


def test_settings_are_frozen_and_the_same_after_json():
    s = dataclasses.replace(
        SETTINGS, prompts=["Zo\u00eb"], files=[["t.bin"], []], checksums={"t.bin": [None, [1, 2, 3]]}
    )
    text = json.dumps(dataclasses.asdict(s))
    assert resume.read_settings(text) == s
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.lr = 1.0
    for change in ({"colour": 1}, {"steps": True}, {"lr": "fast"}, {"steps": 0}, {"micro_batch_size": 3}, {"beta2": 1}):
        with pytest.raises(ValueError):
            resume.read_settings(json.dumps(json.loads(text) | change))


def test_resume_of_a_named_run_that_is_not_there_begins_none(place, text):
    message = refusal(train.main, "train.py", "--resume", "--out", "runs/moved")
    assert f"{Path('runs', 'moved')} has no checkpoint to go on with" in message
    assert not Path("runs").exists()
    trained("--data", text, "--steps", 1, "--resume", "--out", "runs/moved")
    assert Path("runs", "moved", "last.safetensors").exists()


@pytest.fixture
def stopped(place, text):
    """A run in runs/tiny that was stopped after two updates; its text is place / s.txt."""
    shutil.copy2(text, "s.txt")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(train.main, "--size", "tiny", "--data", "s.txt", *LONG)[0] == 130
    return Path("runs", "tiny")


def test_resume_of_a_finished_run_says_that_it_is(place, finished):
    for more in ((), ("--steps", 24)):
        message = refusal(train.main, "train.py", "--resume", "--out", finished.folder, *more)
        assert "finished" in message and "12 of 12" in message
        assert f"--init-from {finished.folder / 'last.safetensors'}" in message


def test_resume_takes_the_newest_run(stopped, text):
    trained("--data", text, "--steps", 1)
    os.utime(stopped / "last.safetensors", (time.time() + 10,) * 2)
    assert invoke(train.main, "--resume")[0] == 0
    assert max(losses(stopped)) == 12


def test_resume_reads_the_tokens_of_its_run_though_the_text_has_changed(stopped, finished):
    write_stories(Path("s.txt"), seed=9, count=50)
    assert invoke(train.main, "--resume")[0] == 0
    assert model_bytes() == model_bytes(finished.folder)


def test_resume_says_which_tokens_are_gone_and_what_they_were_made_of(stopped):
    (gone,) = Path("data", "tokens").glob("*/train.bin")
    gone.unlink()
    message = refusal(train.main, "train.py", "--resume")
    assert f"{gone}, which the run in {stopped} reads, is gone; it was made of s.txt; put it back" in message


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "foreign", "model alone"])
def test_resume_refuses_what_is_no_checkpoint_of_a_run(stopped, damage):
    path = stopped / "last.safetensors"
    whole, log = path.read_bytes(), (stopped / "log.jsonl").read_bytes()
    if damage == "foreign":
        tinygpt.write_safetensors(path, {"w": np.zeros(3, np.float32)}, {"format": "pt"})
    elif damage == "model alone":
        c = tinygpt.load_checkpoint(path)
        tinygpt.save_checkpoint(path, c.parameters, c.cfg, c.tokenizer)
    else:
        path.write_bytes({"garbage": b"no checkpoint at all" * 99, "empty": b"", "cut": whole[:-100]}[damage])
    assert str(path) in refusal(train.main, "train.py", "--resume")
    assert (stopped / "log.jsonl").read_bytes() == log
