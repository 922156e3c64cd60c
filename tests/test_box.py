"""stories.safetensors, the model in the box: what it is, that it is small, and that every table tells its stories."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TABLES, ops_of

import sample
import tinygpt

BOX = Path(tinygpt.__file__).with_name("stories.safetensors")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "box.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def model():
    return sample.open_model(BOX, None, "")


@pytest.mark.parametrize("prompt", GOLDEN)
@pytest.mark.parametrize("table", TABLES[:3])
def test_every_table_tells_the_committed_stories(model, table, prompt):
    options = {"seed": 0, "max_new_tokens": 60, "temperature": 0}
    told = "".join(sample.generate_story(model, ops_of(table), prompt, **options))
    assert told == GOLDEN[prompt]


def test_it_is_the_default_size_in_at_most_three_megabytes():
    found = tinygpt.load_checkpoint(BOX)
    assert BOX.stat().st_size <= 3_000_000
    assert found.cfg == tinygpt.SIZES["1m"].changed(vocab_size=found.cfg.vocab_size)
    assert found.parameters.dtype == np.float32 and not (found.parameters.view(np.uint32) & 0xFFFF).any()  # bf16


def test_it_says_what_it_was_trained_on_by_whom_and_under_which_licence():
    about = tinygpt.load_checkpoint(BOX).metadata["about"]
    for word in ("TinyStories", "Eldan & Li 2023", "CDLA-Sharing-1.0", "train.py --size 1m", "bits per byte"):
        assert word in about
