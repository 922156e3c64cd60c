"""extras/explain.py: its commands and their mistakes; tests of what they do are those of extras/inside/."""

from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config

import bpe
import tinygpt
from extras import explain


def test_the_command_prints_the_ops_and_refuses_what_is_no_size(capsys):
    assert explain.main(["trace", "Lily", "--size", "1m", "--set", "layers=1"]) == 0
    out = capsys.readouterr().out
    assert out.count("linear") == 5 and "(1, 4, 5, 32)" in out and "793" not in out.splitlines()[1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["trace", "Lily", "--size", "huge"], "there is no size huge; expected one of 700k, "),
        (["golden", "--size", "huge", "--out", "x.safetensors"], "there is no size huge; expected one of 700k, "),
        (["picture", "--size", "huge", "--out", "x.svg"], "there is no size huge; expected one of 700k, "),
        (["picture", "--set", "color=red", "--out", "x.svg"], "--set color=red: a model has no 'color'"),
        (["golden", "--scaled-down", "--seq-len", 6, "--out", "x.safetensors"], "--seq-len 6 is above the model's"),
        (["golden", "--scaled-down", "--batch-size", 0, "--out", "x.safetensors"], "0 is out of range"),
        (["golden", "--scaled-down", "--out", "nowhere/x.safetensors"], "No such file"),
        (["golden", "--checkpoint", "gone.safetensors", "--out", "x.safetensors"], "gone.safetensors: No such file"),
        (["golden", "--scaled-down"], "required: --out"),
        (["trace", "Lily", "--tokenizer", "gone.json"], "--tokenizer needs --checkpoint"),
        (["trace", "Lily", "--checkpoint", "gone.safetensors"], "gone.safetensors: No such file"),
        (["picture", "--out", "nowhere/x.svg"], "nowhere/x.svg: No such file"),
        (["draw"], "invalid choice"),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        explain.main([str(word) for word in words])
    err = capsys.readouterr().err
    assert left.value.code == 2 and message in err and err.count("\n") == 1 and err.startswith("explain.py")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["trace", "Lily"], ["golden", "--out", "x.safetensors"]])
def test_a_checkpoint_that_is_not_finite_is_refused_in_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(vocab_size=265)
    flat = tinygpt.init_parameters(cfg, 0)
    flat[5] = np.nan
    tinygpt.save_checkpoint("bad", flat, cfg, bpe.Tokenizer.from_merges([]).to_json())
    with pytest.raises(SystemExit) as left:
        explain.main([*words, "--checkpoint", "bad"])
    err = capsys.readouterr().err
    assert left.value.code == 2 and err == "explain.py: error: " + err.split("error: ")[1] and err.count("\n") == 1
    assert "bad: tensor embed_w holds NaN or infinity" in err and not Path("x.safetensors").exists()


def test_a_checkpoint_without_a_tokenizer_is_traced_with_the_one_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg, tokenizer = tiny_config(vocab_size=265), bpe.Tokenizer.from_merges([])
    tinygpt.save_checkpoint("bare", tinygpt.init_parameters(cfg, 0), cfg, "")
    tokenizer.save("bytes.json")
    with pytest.raises(SystemExit):
        explain.main(["trace", "Lil", "--checkpoint", "bare"])
    assert "bare holds no tokenizer; name its file with --tokenizer" in capsys.readouterr().err
    assert explain.main(["trace", "Lil", "--checkpoint", "bare", "--tokenizer", "bytes.json"]) == 0
    assert capsys.readouterr().out.startswith("4 tokens [256, 76, 105, 108]")
