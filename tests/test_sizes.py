"""The registry of sizes: exactly the models that others built, by the counts that they or their code give."""

import sys

import pytest

from extras import recipes
from tinygpt import SIZES, count_parameters, find_size, find_sizes

COUNTS = {
    "2m": 1_578_624,
    "7m": 6_149_888,
    "30m": 29_397_504,
    "88m": 55_170_688,
    "gpt-tinystories-1m": 3_747_520,
    "gpt-tinystories-8m": 19_708_672,
    "gpt-tinystories-28m": 154_332_160,
    "39m": 39_596_544,
    "300m": 291_554_304,
    "260k": 260_032,
    "15m": 15_191_712,
    "42m": 41_689_600,
    "110m": 109_529_856,
    "17m-cs336": 22_696_448,
    "tinystories-1m": 3_745_984,
    "tinystories-8m": 19_702_528,
    "tinystories-28m": 51_987_968,
    "tinystories-33m": 68_514_048,
    "gpt2": 124_439_808,
}
GRAPHCORE = {  # width: counts at 1, 2, 4, 8 and 12 layers
    64: (1_107_008, 1_156_992, 1_256_960, 1_456_896, 1_656_832),
    128: (2_304_128, 2_502_400, 2_898_944, 3_692_032, 4_485_120),
    256: (4_993_280, 5_783_040, 7_362_560, 10_521_600, 13_680_640),
    512: (11_551_232, 14_703_616, 21_008_384, 33_617_920, 46_227_456),
    768: (19_682_048, 26_769_920, 40_945_664, 69_297_152, 97_648_640),
    1024: (29_385_728, 41_981_952, 67_174_400, 117_559_296, 167_944_192),
}
COUNTS |= {
    f"graphcore-{width}x{layers}": count
    for width, counts in GRAPHCORE.items()
    for layers, count in zip((1, 2, 4, 8, 12), counts)
}


@pytest.mark.parametrize("size", COUNTS)
def test_a_published_size_has_its_parameters_to_the_last_one(size):
    assert count_parameters(find_size(size))[0] == COUNTS[size]


def test_every_size_is_either_ours_or_counted():
    assert list(SIZES) == ["700k", "1m", "8m", "28m"] == list(find_sizes())[:4]
    assert set(find_sizes()) - set(COUNTS) == {*SIZES, "1m-record"}


def test_the_28m_of_gpt_tinystories_is_that_of_the_paper_at_its_width():
    assert count_parameters(find_size("gpt-tinystories-28m").changed(width=512))[0] == 52_000_256


def test_a_name_that_no_size_has_is_refused_in_one_line_with_all_names():
    with pytest.raises(ValueError, match="^there is no size 2b; expected one of 700k, 1m, .*, graphcore-1024x12$"):
        find_size("2b")


def test_without_extras_there_are_our_sizes_and_a_line_says_what_the_others_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "extras.recipes", None)
    assert find_sizes() == SIZES and find_size("1m") is SIZES["1m"] and "15m" in recipes.SIZES
    expected = "there is no size 15m; expected one of 700k, 1m, 8m, 28m; more sizes need extras/recipes.py"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        find_size("15m")
