"""extras/summary.py: the first lines of a run, and the command that makes it again."""

import re
import shlex

import pytest
from helpers import WORDS, invoke, model_bytes, read_log, trained, write_stories

import train


@pytest.mark.parametrize("count, piece", [(1, "cut inside a story"), (2, "cut inside a story"), (50, "1 story")])
def test_the_first_lines_say_what_is_held_out(place, count, piece):
    path = write_stories(place / "s.txt", count=count)
    path.write_text(path.read_text("utf-8").replace(".", ". " + " ".join(WORDS[:9])), "utf-8")
    _, err = trained("--data", path, "--steps", 1)
    (line,) = [line for line in err.splitlines() if line.startswith("data ")]
    total, valid, share, what = re.search(
        r": ([\d,]+) tokens, ([\d,]+) for validation \(the last (.*)%, (.*)\);", line
    ).groups()
    assert what == piece
    total, valid = (int(number.replace(",", "")) for number in (total, valid))
    assert float(share) == pytest.approx(100 * valid / (total + valid), abs=0.06)


def test_the_first_lines_of_a_run_with_validation_text_hold_nothing_out(place, text):
    _, err = trained("--data", text, "--val-data", text, "--steps", 1)
    assert " for validation; ln V" in err


def test_the_logged_command_repeats_the_run_to_the_byte(place, finished):
    program, script, *words = shlex.split(read_log(finished.folder)[0]["command"])
    assert (program, script) == ("python", "train.py")
    status, out, err = invoke(train.main, *words)
    assert status == 0, err
    assert model_bytes() == model_bytes(finished.folder)
    assert out == finished.out


def test_the_logged_command_keeps_a_prompt_that_begins_with_a_dash(place, text):
    trained("--data", text, "--steps", 1, "--prompt=-Lily")
    words = shlex.split(read_log()[0]["command"])[2:]
    assert invoke(train.main, *words)[0] == 0
    assert model_bytes() == model_bytes("runs/tiny-2")
