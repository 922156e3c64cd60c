"""extras/curve.py: the loss curve in the terminal and as a picture."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import invoke

from extras import curve


@pytest.mark.parametrize("count", [2, 3, 64, 65, 1000])
def test_the_terminal_curve_has_one_star_in_each_column(count):
    falling = np.linspace(5, 1, count)
    *rows, axis, caption = curve.terminal_curve(list(range(1, count + 1)), falling.tolist()).splitlines()
    columns = list(zip(*[row.split("|")[1] for row in rows]))
    assert len(columns) == min(64, count) and all(column.count("*") == 1 for column in columns)
    places = [column.index("*") for column in columns]
    assert places == sorted(places) and places[0] == 0 and places[-1] == len(rows) - 1
    assert f"update 1 to {count}" in caption and all(len(row) <= 79 for row in (*rows, axis, caption))


def test_the_terminal_curve_of_a_constant_is_a_line():
    rows = curve.terminal_curve([1, 2, 3], [2.0, 2.0, 2.0]).splitlines()
    assert sum(row.count("*") for row in rows) == 3


def test_the_curve_is_a_picture_where_matplotlib_is(place, finished, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib")
    pytest.importorskip("matplotlib")
    (place / "run").mkdir()
    shutil.copy(finished.folder / "log.jsonl", place / "run")
    _, _, err = invoke(lambda _: curve.draw_curve(Path("run")))
    assert (place / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(Path("run", "loss.png")) in err


def test_without_matplotlib_one_line_says_how_to_get_it(finished):
    assert sum("pip install matplotlib" in line for line in finished.err.splitlines()) == 1
    assert not (finished.folder / "loss.png").exists()
    assert "*" in finished.err
