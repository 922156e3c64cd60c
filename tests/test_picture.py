"""extras/inside/picture.py: the picture shows the trace of the real forward."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import random_parameters

import tinygpt
from extras import check, explain
from extras.inside import picture, trace

PICTURE = Path(explain.__file__).with_name("architecture.svg")


def test_the_committed_picture_is_what_its_command_writes(tmp_path, capsys):
    assert explain.main(["picture", "--size", "1m", "--out", str(tmp_path / "again.svg")]) == 0
    assert (tmp_path / "again.svg").read_bytes() == PICTURE.read_bytes()
    readme = (PICTURE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert "](extras/architecture.svg)" in readme and "explain.py picture --size 1m" in readme


@pytest.mark.parametrize("size", ["1m", "88m", "graphcore-256x2", "gpt2", "2m", "tinystories-1m"])
def test_a_picture_is_xml_that_shows_every_parameter_and_all_flops(size, tmp_path, capsys):
    cfg = check.scaled_down(tinygpt.find_size(size))
    flat, p = random_parameters(cfg)
    rows = trace.trace(p, cfg, np.zeros((1, cfg.seq_len), np.int64))
    svg = ElementTree.fromstring(picture.picture(size, cfg, rows))
    words = [" ".join(" ".join(text.itertext()).split()) for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    for t in tinygpt.layout(cfg):
        assert any(t.name in line.split() for line in words), t.name
    shares = [float(word[:-1]) for word in words if word.endswith("%") and not word.startswith("<")]
    assert 99 < sum(shares) < 101
    assert f"\u00d7 {cfg.layers} layers" in words
    height = float(svg.get("height"))
    texts = [float(text.get("y")) for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert svg.get("width") == "800" and max(texts) < height - 10
