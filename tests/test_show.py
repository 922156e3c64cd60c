"""extras/show.py: stories as JSON, shaded, side by side, each against the story that sample.py prints."""

import json
import math
import re

import numpy as np
import pytest
from helpers import invoke, refusal, trained, workshop, write_stories

import sample
import tinygpt
from extras import show

WORDS = ("--prompt", "Lily", "--max-new-tokens", 25)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with workshop(tmp_path_factory.mktemp("model")) as folder:
        trained("--data", write_stories(folder / "s.txt"), "--steps", 40, "--eval-every", 40, "--batch-size", 8)
    return folder / "runs" / "tiny" / "last.safetensors"


def told(path, *words):
    status, out, err = invoke(sample.main, "--checkpoint", path, *WORDS, *words)
    assert status == 0, err
    return out


def test_json_has_the_story_that_is_printed_and_the_models_own_log_probabilities(path):
    p, cfg, tokenizer = sample.open_model(path, None, "")
    stories = [json.loads(line) for line in told(path, "--json", "--num-samples", 2, "--seed", 4).splitlines()]
    for seed, story in zip((4, 5), stories, strict=True):
        assert story["prompt"] + story["text"] + "\n" == told(path, "--seed", seed)
        assert story["seed"] == seed and story["finish"] == "length" and len(story["tokens"]) == 25
        assert story["text"] == tokenizer.decode(story["tokens"])
        ids = [tokenizer.end, *tokenizer.encode("Lily"), *story["tokens"]]
        inputs, targets = np.array([ids[:-1]]), np.array([ids[1:]])
        weights = np.ones(targets.shape, np.float32)
        _, nats = tinygpt.loss_and_gradients(p, inputs, targets, weights, None, cfg, tinygpt.OPS["numpy"])
        assert np.exp(story["logprobs"]) == pytest.approx(np.exp(-nats[0, -25:]), rel=1e-4)


def test_json_says_what_ended_a_story(path):
    whole = json.loads(told(path, "--json"))["text"]
    stopped = json.loads(told(path, "--json", "--stop", whole[-3:]))  # found with the last token, or before
    assert stopped["finish"] == "stop" and stopped["text"] == whole[: whole.index(whole[-3:])]
    p, cfg, tokenizer = sample.open_model(path, None, "")
    p["norm_b"][:], p["norm_w"][:] = p["embed_w"][tokenizer.end], 0
    options = dict(seed=0, ops=tinygpt.OPS["numpy"], max_new_tokens=3, temperature=0)
    status, out, _ = invoke(lambda _: show.print_json((p, cfg, tokenizer), "Lily", **options))
    assert json.loads(out)["tokens"] == [tokenizer.end] and json.loads(out)["finish"] == "stop"
    status, out, _ = invoke(lambda _: show.print_json((p, cfg, tokenizer), "Lily", **options | dict(max_new_tokens=0)))
    assert json.loads(out)["tokens"] == [] and json.loads(out)["finish"] == "length"


def test_a_shaded_story_is_the_story_and_each_token_has_the_shade_of_its_probability(path):
    shaded, story = told(path, "--show-probs"), json.loads(told(path, "--json"))
    assert re.sub("\x1b\\[[0-9;]*m", "", shaded) == told(path)
    colours = [colour for least, colour in show.SHADES]
    expected = [next(c for least, c in show.SHADES if math.exp(logprob) >= least) for logprob in story["logprobs"]]
    found = re.findall("\x1b\\[48;5;([0-9]+)m", shaded)
    assert found == [str(colour) for colour in expected if colour is not None]
    assert len(set(found)) >= 3 and None in colours


def test_several_checkpoints_tell_the_same_prompt_side_by_side(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "83")
    out = told(path, "--checkpoint", path, "--stop", "\n")
    rows = out.splitlines()
    assert all(row[:40].rstrip() == row[43:] and len(row) <= 83 for row in rows)
    assert "".join(row[:40] for row in rows).split() == told(path, "--stop", "\n").split()
    assert len(told(path, "--checkpoint", path, "--json").splitlines()) == 2


def test_what_excludes_each_other_is_refused(path):
    words = ("--checkpoint", path, "--show-probs")
    assert "leave out --show-probs" in refusal(sample.main, "sample.py", *words, "--json")
    assert "name one --checkpoint" in refusal(sample.main, "sample.py", *words, "--checkpoint", path)
