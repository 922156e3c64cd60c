"""extras/plan.py: what fits into a time and into a memory."""

import math
import re
import shlex
import time

import numpy as np
import pytest
from helpers import TINY, Clock, invoke, losses, model_bytes, read_log, refusal, trained
from tiers import needs_fast

import tinygpt
import train
from extras import plan


def test_a_number_that_is_none_while_the_speed_is_measured_ends_in_one_line(place, text, monkeypatch):
    def overflow(p, tokens, *rest):
        return math.nan, np.full(tokens.shape, np.nan)

    monkeypatch.setattr(tinygpt, "loss_and_gradients", overflow)
    message = refusal(train.main, "train.py", "--size", "tiny", "--data", text, "--minutes", 0.01)
    assert "loss is nan" in message
    assert not list(place.glob("runs/*"))


def test_ctrl_c_while_the_speed_is_measured_leaves_no_folder(place, text, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tinygpt, "loss_and_gradients", interrupt)
    assert invoke(train.main, "--size", "tiny", "--data", text, "--minutes", 0.01)[0] == 130
    assert not list(place.glob("runs/*"))


def measured(monkeypatch, seconds, budget):
    """The pace measured where update `number` takes seconds(number), and how many were made."""
    clock, made = Clock(), []
    monkeypatch.setattr(plan, "time", clock)

    def run_update(number):
        made.append(number)
        clock.now += seconds(number)

    return plan.measure_pace(run_update, budget), made


def test_the_pace_is_measured_for_3_percent_of_the_time_and_without_the_update_that_compiles(monkeypatch):
    for budget, count in ((300, 36), (60, 8), (1, 4), (36_000, 120)):  # 9 s, 1.8 s, four updates at least, 30 s at most
        pace, made = measured(monkeypatch, lambda number: 0.25 if number else 50.0, budget)
        assert pace == 0.25 and made == list(range(count + 1)), budget


@pytest.mark.parametrize("early, late, expected", [(0.25, 0.5, 0.5), (0.5, 0.25, 0.5), (0.25, 0.25, 0.25)])
def test_the_pace_is_that_of_the_slower_half_of_the_measurement(monkeypatch, early, late, expected):
    budget = (10 * (early + late) - 0.1) / 0.03
    pace, made = measured(monkeypatch, lambda number: early if number <= 10 else late, budget)
    assert len(made) == 21 and pace == expected
    four, _ = measured(monkeypatch, lambda number: early if number <= 2 else late, 0.1)
    assert four == expected


def by_the_clock(monkeypatch, text, seconds, *words):
    """stderr of a run whose update number n (all that are made, from 0) takes seconds(n) of a clock that else stands
    still, and what the clock shows at its end."""
    clock, real, made = Clock(), train.update, []

    def update(*arguments):
        result = real(*arguments)
        clock.now += seconds(len(made))
        made.append(1)
        return result

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(plan, "time", clock)
    monkeypatch.setattr(train, "update", update)
    _, err = trained("--data", text, *words)
    return err, clock.now - 1000


def lefts(err):
    """{step: seconds left} of the lines that say so."""
    found = re.findall(r"^step (\d+) .* tok/s .*?(?:\| (\d+):(\d\d) left)?$", err, re.MULTILINE)
    return {int(step): int(minutes) * 60 + int(seconds) if minutes else None for step, minutes, seconds in found}


@pytest.mark.parametrize("compiling", [0.5, 30.0])
def test_a_steady_machine_keeps_the_promise_and_the_plan_says_when_it_ends(place, text, monkeypatch, compiling):
    err, end = by_the_clock(monkeypatch, text, lambda n: 0.5 if n else compiling, "--minutes", 1)
    steps = read_log()[0]["settings"]["steps"]
    assert 57.5 < end <= 60 and steps == int((60 - compiling - 2) * 0.97 / 0.5)
    valid = re.search(r"(\d+) for validation", err)[1]
    plan = re.search(
        r"planned: (\d+) updates, training ends (\d):(\d\d) after the start; then all (\S+) val.*0:(\d\d)", err
    )
    assert int(plan[1]) == steps and 59 <= 60 * int(plan[2]) + int(plan[3]) <= 60 and plan[4] == valid
    assert int(plan[5]) == int(int(valid) * 0.5 / (4 * TINY.seq_len) / 2.5)
    assert f"scoring all {valid} validation tokens, about 0:{plan[5]} ..." in err


def test_minutes_shorter_than_their_preparation_are_said(place, text, monkeypatch):
    err, _ = by_the_clock(monkeypatch, text, lambda n: 1.0 if n else 30.0, "--minutes", 0.5)
    assert "--minutes 0.5 went into preparing, 0:34: one update is made; take more minutes" in err
    assert read_log()[0]["settings"]["steps"] == 1


def test_the_time_left_is_that_of_the_last_updates_without_compilation(place, text, monkeypatch):
    err, _ = by_the_clock(monkeypatch, text, lambda n: 0.5 if n else 100.0, "--steps", 101)
    found = lefts(err)
    assert found.pop(1) is None and found[101] == 0
    assert all(left == int((101 - step) * 0.5 / 0.97) for step, left in found.items()) and len(found) > 10
    slow, _ = by_the_clock(monkeypatch, text, lambda n: 0.5 if n < 100 else 1.0, "--steps", 300)
    assert lefts(slow)[200] == pytest.approx(100 / 0.97, abs=2)  # the average since the start promises 75


def test_a_run_by_the_clock_plans_its_updates_and_repeats_by_their_number(place, text):
    start = time.monotonic()
    trained("--data", text, "--minutes", 0.04)
    seconds = time.monotonic() - start  # of 2.4, and the last validation; loose, this is no timing gate
    s, command = read_log()[0]["settings"], shlex.split(read_log()[0]["command"])
    assert max(losses()) == s["steps"] and 0.5 < seconds < 20
    assert command[command.index("--steps") + 1] == str(s["steps"]) and "--minutes" not in command
    trained(*command[4:])
    assert model_bytes() == model_bytes("runs/tiny-2")


def chosen(words, cfg):
    """(sequences at a time, whether layers are recomputed) for a command line."""
    args = train.make_parser().parse_args(words)
    s = train.choose_settings(args, cfg)
    s = plan.fit_memory(plan.size_in_bytes(args.max_memory), s, cfg) if args.max_memory else s
    return s.micro_batch_size, s.recompute


@needs_fast
def test_max_memory_takes_fewer_sequences_before_it_recomputes():
    cfg = tinygpt.SIZES["8m"]
    needed = {(again, n): plan.memory_needed(cfg, n, again) for again in (False, True) for n in (1, 2, 4)}
    assert chosen([], cfg) == (4, False)
    for limit in (needed[False, 4], needed[False, 2] + 1, needed[False, 1], needed[False, 1] - 1, needed[True, 1]):
        micro, again = chosen([f"--max-memory={limit / 1024}K"], cfg)
        assert needed[again, micro] <= limit
        fits = [choice for choice in needed if needed[choice] <= limit]
        assert again == all(choice[0] for choice in fits)
        assert micro == max(n for a, n in fits if a == again)
    assert chosen(["--recompute"], cfg) == (4, True)
    with pytest.raises(ValueError, match=r"--max-memory 100 MiB is too little: 1m needs \d+ MiB with one sequence"):
        chosen(["--max-memory=100M"], cfg)


@pytest.mark.parametrize("kernels", ["numpy", pytest.param("fast", marks=needs_fast)])
def test_a_model_larger_than_the_machine_ends_in_one_line(place, text, monkeypatch, kernels):
    words = ["--data", text, "--steps", 1, "--kernels", kernels]
    message = refusal(train.main, "train.py", *words, "--set", "width=500000000", "heads=2")
    assert "MiB of memory, this machine has" in message and "a smaller --size" in message
    monkeypatch.setattr(plan, "machine_memory", lambda: 2**20)
    assert "1m needs" in refusal(train.main, "train.py", "--size", "1m", *words)
    assert not list(place.glob("runs/*"))


def test_a_machine_that_gives_no_memory_ends_in_one_line(place, text, monkeypatch):
    def refuse(*_):
        raise MemoryError("Unable to allocate 5 TiB")

    monkeypatch.setattr(tinygpt, "init_parameters", refuse)
    assert "Unable to allocate 5 TiB" in refusal(train.main, "train.py", "--size", "tiny", "--data", text, "--steps", 1)


@pytest.mark.parametrize("words", [["--max-memory", "much"], ["--micro-batch-size", "some"], ["--max-memory", "2"]])
def test_a_size_of_memory_that_is_none_is_refused_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text, size", [("2G", 2 << 30), ("500M", 500 << 20), ("1.5GiB", 3 << 29), ("800K", 800 << 10)])
def test_sizes_of_memory_are_read(text, size):
    assert plan.size_in_bytes(text) == size
