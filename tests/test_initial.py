"""--init-from: a run that begins with another's model and tokenizer, with fresh moments and step 0."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    TINY,
    interrupt_at,
    invoke,
    losses,
    model_bytes,
    read_log,
    refusal,
    trained,
    workshop,
    write_llama2c,
    write_stories,
)
from tiers import needs_fast

import bpe
import sample
import tinygpt
import train
from extras import data, evaluate

TUNED = "runs/tuned"


@pytest.fixture(scope="module")
def learnt(text, tmp_path_factory):
    """The last checkpoint of a run that has learned something."""
    with workshop(tmp_path_factory.mktemp("learnt")) as folder:
        trained("--data", text, "--steps", 120, "--dropout", 0.1)
    return folder / "runs" / "tiny" / "last.safetensors"


@pytest.fixture
def other(place):
    """Other stories."""
    return write_stories(place / "other.txt", seed=5)


def tune(model, *words, status=0):
    found, out, err = invoke(train.main, "--init-from", model, *words)
    assert found == status, err
    return out, err


def test_a_run_begins_with_the_model_and_tokenizer_of_another(place, learnt, other):
    _, err = tune(learnt, "--data", other, "--steps", 10)
    first, model = tinygpt.load_checkpoint(learnt), tinygpt.load_checkpoint(f"{TUNED}/last.safetensors")
    assert model.tokenizer == first.tokenizer
    assert model.cfg == first.cfg.changed(attention_dropout=0.0, out_dropout=0.0, mlp_dropout=0.0)
    settings = read_log(TUNED)[0]["settings"]
    assert settings["init_from"] == str(learnt) and json.loads(model.metadata["settings"]) == settings
    assert f"begun with {learnt}" in err
    assert settings["lr"] == pytest.approx(train.own_rate(TINY) / 10)
    assert [e["step"] for e in read_log(TUNED) if "loss" in e] == list(range(1, 11)) and model.metadata["step"] == "10"


def test_its_first_loss_is_that_of_the_model(place, learnt, other):
    tune(learnt, "--data", other, "--steps", 1)
    settings, update, *_ = read_log(TUNED)
    model = tinygpt.load_checkpoint(learnt)
    known = data.read_data(bpe.Tokenizer.from_json(model.tokenizer), settings["settings"]["files"], "")
    batch = train.Batches(known.train, TINY.seq_len, known.tokenizer.end, 0).get(0, 4)
    p = tinygpt.views(tinygpt.layout(model.cfg), model.parameters, TINY.layers)
    total, _ = tinygpt.loss_and_gradients(p, *batch, None, model.cfg, tinygpt.OPS["numpy"])
    assert update["loss"] == pytest.approx(total / batch[2].sum(), rel=1e-5)
    trained("--data", other, "--steps", 1)
    assert update["loss"] < losses()[1] - 0.5  # a fresh model's


def test_the_moments_are_fresh(place, learnt, other):
    """After one update the first moment is (1 - beta1) of a gradient, the second (1 - beta2) of its square."""
    tune(learnt, "--data", other, "--steps", 1, "--beta1", 0.5, "--beta2", 0.75)
    extra = tinygpt.load_checkpoint(f"{TUNED}/last.safetensors").extra
    np.testing.assert_allclose((extra["moment1"] / 0.5) ** 2, extra["moment2"] / 0.25, rtol=1e-5, atol=1e-12)


def test_the_logged_command_repeats_it_to_the_byte(place, learnt, other):
    tune(learnt, "--data", other, "--steps", 4, "--dropout", 0.2, "--set", "embed_dropout=0.1")
    words = shlex.split(read_log(TUNED)[0]["command"])[2:]
    assert words[words.index("--init-from") + 1] == str(learnt)
    status, _, err = invoke(train.main, *words)
    assert status == 0, err
    assert model_bytes(TUNED) == model_bytes(f"{TUNED}-2")


def test_dropout_is_that_of_the_run(place, learnt, other):
    found = []
    for number, words in enumerate(([], ["--dropout", "0.3"], ["--set", "mlp_dropout=0.3"]), 1):
        tune(learnt, "--data", other, "--steps", 2, *words)
        found.append(tinygpt.load_checkpoint(f"{TUNED}{f'-{number}' * (number > 1)}/last.safetensors"))
    rates = [(model.cfg.attention_dropout, model.cfg.out_dropout, model.cfg.mlp_dropout) for model in found]
    assert rates == [(0, 0, 0), (0.3, 0.3, 0.3), (0, 0, 0.3)]
    assert len({model.parameters.tobytes() for model in found}) == 3


def test_it_is_stopped_and_goes_on_to_the_same_bytes(place, learnt, other, monkeypatch):
    words = ("--data", other, "--steps", 6, "--micro-batch-size", 2)
    tune(learnt, *words, "--out", "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: train.signal.raise_signal(train.signal.SIGINT))
        tune(learnt, *words, "--out", "cut", status=130)
    learnt.rename(place / "away")  # it is not read again
    try:
        status, _, err = invoke(train.main, "--resume", "--out", "cut")
    finally:
        (place / "away").rename(learnt)
    assert status == 0, err
    assert model_bytes("cut") == model_bytes("whole") and losses("cut") == losses("whole")
    assert "--init-from" in refusal(train.main, "train.py", "--resume", "--out", "whole", "--init-from", "another")


def test_windows_may_be_shorter_and_what_was_learned_at_each_position_stays(place, learnt, other):
    tune(learnt, "--data", other, "--steps", 1, "--seq-len", 16)
    cfg = tinygpt.load_checkpoint(f"{TUNED}/last.safetensors").cfg
    assert (cfg.seq_len, cfg.position_rows) == (16, 32)
    message = refusal(train.main, "train.py", "--init-from", learnt, "--data", other, "--steps", 1, "--seq-len", 33)
    assert "--seq-len 33 is above the 32 positions" in message


def test_a_model_of_llama2c_is_tuned_with_its_tokenizer(place, other):
    write_llama2c(place)
    tune("model.bin", "--tokenizer", "tokenizer.bin", "--data", other, "--steps", 2)
    assert tinygpt.load_checkpoint(f"{TUNED}/last.safetensors").cfg.vocab_size == 262
    assert invoke(evaluate.main, f"{TUNED}/best.safetensors", "--data", other)[0] == 0


@pytest.mark.parametrize("kernels", ["numba", pytest.param("fast", marks=needs_fast), "numpy"])
@pytest.mark.parametrize("more", [1, 40])
def test_rows_of_the_model_beyond_its_tokenizer_are_never_told(place, learnt, other, more, kernels):
    """All logits are 0 but those of the surplus rows and of the reserved tokens, which are 9 and would win."""
    _, tokenizer = sample.load_model(learnt)
    cfg = TINY.changed(vocab_size=tokenizer.vocab_size + more)
    flat = np.zeros(tinygpt.count_parameters(cfg)[0], np.float32)
    p = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers)
    p["norm_b"][0], p["embed_w"][sample.never_drawn(cfg, tokenizer), 0] = 1, 9
    tinygpt.save_checkpoint("wide.safetensors", flat, cfg, tokenizer.to_json())
    words = ["--data", other, "--steps", 1, "--lr", 1e-9, "--prompt", "Lily", "--kernels", kernels]
    out, _ = tune("wide.safetensors", *words)
    assert out.startswith("Lily") and len(out) > 100 and "<|" not in out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_is_not_finite_begins_no_run(place, learnt, other, value):
    model = tinygpt.load_checkpoint(learnt)
    model.parameters[-1] = value
    tinygpt.save_checkpoint("bad.safetensors", model.parameters, model.cfg, model.tokenizer)
    message = refusal(train.main, "train.py", "--init-from", "bad.safetensors", "--data", other, "--steps", 1)
    assert "bad.safetensors: tensor norm_b holds NaN or infinity" in message
    assert not list(place.glob("runs/*"))


def test_flags_that_say_what_the_model_says_are_taken(place, learnt, other):
    V = bpe.Tokenizer.from_json(tinygpt.load_checkpoint(learnt).tokenizer).vocab_size
    same = ["--size", "tiny", "--vocab-size", V, "--set", "width=24", "mlp_dropout=0.1", "--seq-len", 32]
    tune(learnt, "--data", other, "--steps", 1, *same)
    assert Path("runs/tiny/last.safetensors").exists()


BAD = {  # words -> a piece of what it must say
    "size": (["--size", "8m"], "--size 8m contradicts"),
    "field": (["--set", "layers=3"], "--set layers=3 contradicts"),
    "field of no model": (["--set", "colour=3"], "colour"),
    "vocabulary": (["--vocab-size", "290"], "--vocab-size 290 contradicts"),
    "tokenizer": (["--tokenizer", "other.json"], "leave out --tokenizer"),
    "tokens": (["--data", "other.bin"], "other.bin was written with another vocabulary"),
    "validation tokens": (["--data", "TEXT", "--val-data", "other.bin"], "name the text itself"),
    "published recipe": (["--recipe", "published"], "leave out --recipe"),
    "missing": (["--init-from", "none.safetensors"], "none.safetensors"),
    "no model": (["--init-from", "TEXT"], "is not"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_contradicts_the_model_is_refused_in_one_line(place, learnt, text, what):
    tokenizer = bpe.Tokenizer.from_merges([(b"a", b"b")])
    tokenizer.save("other.json")
    bpe.write_tokens(bpe.pieces([text]), tokenizer, "other.bin")
    words, piece = BAD[what]
    words = ["--init-from", learnt, "--data", text, "--steps", 1, *(text if word == "TEXT" else word for word in words)]
    message = refusal(train.main, "train.py", *words)
    assert piece in message, message
    assert not list(place.glob("runs/*"))
