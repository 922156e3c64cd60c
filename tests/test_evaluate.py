"""Evaluation: each token of a text once, in windows of any stride, against a loop of the specification; intervals; and
what evaluation and accumulation must not change."""

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import ops_of
from helpers import (
    PLAIN,
    TINY,
    invoke,
    read_log,
    refusal,
    trained,
    write_llama2c,
    write_stories,
)

import bpe
import sample
import tinygpt
import train
from extras import evaluate

END, T = 264, TINY.seq_len


def parameters(cfg=TINY, dtype=np.float64):
    flat = tinygpt.init_parameters(cfg, 0, dtype)
    return tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers)


def random_tokens(M):
    return np.random.default_rng(M).integers(0, TINY.vocab_size, M).astype(np.uint16)


def slow_score(p, tokens, stride, end=END):
    """Nats of each token, one at a time, from the specification's logits: its window is the first that reaches it."""
    nats = []
    for i in range(len(tokens)):
        window = max(0, math.ceil((i + 1 - T) / stride))  # number of the window, which ends before T + window * stride
        stop = min(T + window * stride, len(tokens))
        start = max(0, stop - T)
        before = [tokens[start - 1] if start else end, *tokens[start:i]]
        x, _ = tinygpt.forward(p, np.array([before], np.int64), TINY, tinygpt.OPS["numpy"])
        logits = tinygpt.head_logits(x[:, -1], p, TINY, tinygpt.OPS["numpy"])[0]
        nats.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[i]])
    return np.array(nats)


def evaluated(*words):
    """figures by name, each (value, low, high), of a command that must succeed; and stdout."""
    status, out, err = invoke(evaluate.main, *words)
    assert status == 0, err
    rows = [line.replace(" to ", " ").split() for line in out.splitlines()]
    return {name: tuple(map(float, numbers)) for name, *numbers in rows}, out


# == scores ============================================================================================================


@pytest.mark.parametrize("table", ["numpy", "fast"])
@pytest.mark.parametrize("M, stride", [(2, 1), (T - 1, 5), (T, T), (2 * T + 3, T), (2 * T + 3, 5), (T + 9, 1)])
def test_scores_are_those_of_a_slow_loop(M, stride, table):
    p, tokens = parameters(), random_tokens(M)
    found = train.score(p, TINY, tokens, END, ops_of(table), stride)
    np.testing.assert_allclose(found, slow_score(p, tokens, stride), rtol=1e-11)


@pytest.mark.parametrize("M", [2, T - 1, T, T + 1, 3 * T, 5 * T + 7])
@pytest.mark.parametrize("stride", [1, 7, T - 1, T])
def test_each_token_is_scored_once_and_sees_what_the_stride_promises(monkeypatch, M, stride):
    seen = []

    def look(p, inputs, targets, weights, g, cfg, ops):
        assert g is None
        for row, places, counted in zip(inputs, targets, weights > 0):
            assert row.tolist() == [END if place == 0 else place - 1 for place in places]
            seen.extend((place, np.flatnonzero(places == place)[0]) for place in places[counted])
        return 0.0, targets.astype(np.float64)

    monkeypatch.setattr(tinygpt, "loss_and_gradients", look)
    nats = train.score({"embed_w": np.empty(0)}, TINY, np.arange(M), END, tinygpt.OPS["numpy"], stride)
    assert [place for place, _ in seen] == list(range(M)) and nats.tolist() == list(range(M))
    assert all(before >= min(place, T - stride) for place, before in seen)


@pytest.mark.parametrize("table", ["numpy", "fast"])
def test_how_many_windows_are_scored_at_once_changes_no_byte(table):
    p, tokens = parameters(dtype=np.float32), random_tokens(9 * T + 5)
    found = {train.score(p, TINY, tokens, END, ops_of(table), 20, n).tobytes() for n in (1, 2, 3, 7, 100)}
    assert len(found) == 1


def test_sums_by_story_have_each_token_and_byte_in_its_story():
    tokenizer = bpe.Tokenizer.from_merges([(b"a", b"b"), (b"ab", b"c")])
    texts = ["abc ab", "Zo\u00eb", "x" * 9]
    tokens = np.array([i for one in texts for i in [*tokenizer.encode(one), tokenizer.end]], np.uint16)
    nats = np.arange(len(tokens)) / 8
    sums = evaluate.sum_by_story(nats, tokens, tokenizer)
    assert sums[2].tolist() == [6, 4, 9] and sums[1].tolist() == [len(tokenizer.encode(one)) + 1 for one in texts]
    assert sums[0].sum() == nats.sum() and sums[0][2] == nats[-10:].sum()
    assert evaluate.sum_by_story(nats[:-1], tokens[:-1], tokenizer)[2].tolist() == [
        6,
        4,
        9,
    ]  # the last one lacks its end


# == intervals =========================================================================================================


def draw_stories(S, rng):
    """Sums by story whose nats per token differ from story to story; in the long run they are 2."""
    tokens = rng.integers(20, 200, S).astype(np.float64)
    return np.stack([tokens * rng.gamma(4, 0.5, S), tokens, 4 * tokens])


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for seed in range(200):
        drawn = evaluate.figures(evaluate.bootstrap(draw_stories(150, rng), seed))["nats/token"]
        low, high = np.percentile(drawn, (2.5, 97.5))
        held += low < 2 < high
    assert 0.89 < held / 200 < 0.99


def test_resamples_are_those_of_a_slow_loop_and_of_the_seed():
    stories = draw_stories(30, np.random.default_rng(1))
    found, rng = evaluate.bootstrap(stories, 5), np.random.Generator(np.random.Philox(key=[5, 2]))
    assert found.shape == (3, evaluate.RESAMPLES)
    for column in found.T:
        expected = sum(stories[:, story] for story in rng.integers(0, 30, 30))
        np.testing.assert_allclose(column, expected, rtol=1e-12)
    assert evaluate.bootstrap(stories, 5).tobytes() == found.tobytes() != evaluate.bootstrap(stories, 6).tobytes()


def test_figures_are_nats_perplexity_and_bits():
    found = evaluate.figures(np.array([30.0, 20.0, 60.0]))
    assert found["nats/token"] == 1.5 and found["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["bits/byte"] == pytest.approx(30 / math.log(2) / 60)


# == the command =======================================================================================================


def test_windows_end_to_end_give_the_trainers_last_validation(place, text):
    valid = write_stories(place / "valid.txt", seed=9, count=25)
    trained("--data", text, *PLAIN, "--val-data", valid, "--dropout", 0.4)
    last = read_log()[-1]
    model = tinygpt.load_checkpoint(Path("runs/tiny/last.safetensors"))
    assert model.cfg.mlp_dropout == 0.4
    found, out = evaluated("runs/tiny/last.safetensors", "--data", valid)
    for name, logged in (("nats/token", "final_val_nats"), ("bits/byte", "final_val_bits_per_byte")):
        assert found[name][0] == pytest.approx(last[logged], abs=5.1e-5)
        assert found[name][1] < found[name][0] < found[name][2]
    assert found["perplexity"][0] == pytest.approx(math.exp(last["final_val_nats"]), rel=1e-4)
    for size in (1, 3, 50):
        assert evaluated("runs/tiny/last.safetensors", "--data", valid, "--batch-size", size)[1] == out
    # without dropout, by the specification in float64
    p = tinygpt.views(tinygpt.layout(TINY), model.parameters.astype(np.float64), TINY.layers)
    tokenizer = bpe.Tokenizer.from_json(model.tokenizer)
    tokens = np.concatenate([[*tokenizer.encode(one), tokenizer.end] for one in stories_of(valid)])
    expected = train.evaluate(p, TINY, tokens, tokenizer.end, tinygpt.OPS["numpy"])
    assert last["final_val_nats"] == pytest.approx(expected, rel=1e-5)
    beginning = train.evaluate(p, model.cfg, tokens, tokenizer.end, ops_of("fast"), 3 * T)
    assert slow_score(p, tokens[: 3 * T], T, tokenizer.end).mean() == pytest.approx(beginning, rel=1e-10)


def stories_of(path):
    return [story.strip() for story in path.read_text("utf-8").split(bpe.END) if story.strip()]


def test_context_stride_and_token_files(place, text, finished):
    model = finished.folder / "best.safetensors"
    found, out = evaluated(model, "--data", text)
    (made,) = Path("data/tokens").glob("*/text.bin")
    assert evaluated(model, "--data", made)[1] == out
    shorter, _ = evaluated(model, "--data", text, "--seq-len", 8)
    overlapping, _ = evaluated(model, "--data", text, "--seq-len", 8, "--stride", 2)
    assert len({row["nats/token"][0] for row in (found, shorter, overlapping)}) == 3
    other, _ = evaluated(model, "--data", text, "--seed", 1)
    assert other["nats/token"][0] == found["nats/token"][0] and other["nats/token"][1:] != found["nats/token"][1:]


def test_one_story_has_no_interval(place, finished):
    Path("one.txt").write_text("Lily found a box. " * 30, encoding="utf-8")
    status, out, _ = invoke(evaluate.main, finished.folder / "last.safetensors", "--data", "one.txt")
    assert status == 0 and out.count("(one story: no interval)") == 3


def test_models_of_llama2c_are_scored_by_the_bytes_of_the_text(place):
    write_llama2c(place)
    texts = ["a a bab", "aaa Zo\u00eb"]
    Path("text.txt").write_text(bpe.END.join(texts) + bpe.END, encoding="utf-8")
    found, _ = evaluated("model.bin", "--tokenizer", "tokenizer.bin", "--data", "text.txt")
    checkpoint, tokenizer = sample.load_model("model.bin", "tokenizer.bin")
    ids = np.concatenate([[*tokenizer.encode(one), tokenizer.end] for one in texts])
    p = tinygpt.views(tinygpt.layout(checkpoint.cfg), checkpoint.parameters, 1)
    nats = train.score(p, checkpoint.cfg, ids, tokenizer.end, tinygpt.OPS["numpy"]).sum()
    size = sum(len(one.encode()) for one in texts)
    assert found["bits/byte"][0] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    message = refusal(evaluate.main, "evaluate.py", "model.bin", "--data", "text.txt")
    assert "holds no tokenizer; name its file with --tokenizer" in message


BAD = {  # words -> a piece of what it must say
    "no text": (["MODEL"], "--data FILE"),
    "missing text": (["MODEL", "--data", "none.txt"], "none.txt does not exist"),
    "empty text": (["MODEL", "--data", "empty.txt"], "empty.txt"),
    "missing model": (["none.safetensors", "--data", "TEXT"], "none.safetensors"),
    "no model": (["TEXT", "--data", "TEXT"], "is not"),
    "cut model": (["cut.safetensors", "--data", "TEXT"], "cut.safetensors"),
    "a setting of training": (["MODEL", "--data", "TEXT", "--lr", "1e-3"], "unrecognized arguments: --lr"),
    "a size": (["MODEL", "--data", "TEXT", "--size", "1m"], "unrecognized arguments: --size"),
    "long windows": (["MODEL", "--data", "TEXT", "--seq-len", "33"], "--seq-len 33 is above the 32"),
    "long stride": (["MODEL", "--data", "TEXT", "--stride", "33"], "--stride 33 is above the window of T=32"),
    "another tokenizer": (["MODEL", "--data", "TEXT", "--tokenizer", "other.json"], "leave out --tokenizer"),
    "tokens of another": (["MODEL", "--data", "other.bin"], "another vocabulary"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_line(place, text, finished, what):
    model = finished.folder / "last.safetensors"
    other = bpe.Tokenizer.from_merges([(b"a", b"b")])
    other.save("other.json")
    bpe.write_tokens(bpe.pieces([text]), other, "other.bin")
    Path("empty.txt").write_bytes(b"")
    Path("cut.safetensors").write_bytes(model.read_bytes()[:-9])
    words, piece = BAD[what]
    message = refusal(evaluate.main, "evaluate.py", *({"MODEL": model, "TEXT": text}.get(w, w) for w in words))
    assert piece in message, message
    assert not Path("runs").exists()


def test_a_model_whose_numbers_are_none_is_refused(place, text, finished):
    model = tinygpt.load_checkpoint(finished.folder / "best.safetensors")
    model.parameters[:] = np.nan
    tinygpt.save_checkpoint("nan.safetensors", model.parameters, model.cfg, model.tokenizer)
    message = refusal(evaluate.main, "evaluate.py", "nan.safetensors", "--data", text)
    assert "nan.safetensors: tensor embed_w holds NaN or infinity" in message


def test_a_model_whose_nats_overflow_is_refused(place, text, finished):
    model = tinygpt.load_checkpoint(finished.folder / "best.safetensors")
    tinygpt.views(tinygpt.layout(model.cfg), model.parameters, model.cfg.layers)["norm_w"][:] = 3e38
    tinygpt.save_checkpoint("huge.safetensors", model.parameters, model.cfg, model.tokenizer)
    with np.errstate(all="ignore"):
        message = refusal(evaluate.main, "evaluate.py", "huge.safetensors", "--data", text)
    assert "nats that are not finite" in message
