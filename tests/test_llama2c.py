"""extras/llama2c.py: models of llama2.c are read as the same models; ours are written with the same logits."""

import numpy as np
import pytest
from conftest import relative
from helpers import STORIES, llama2c_file

import bpe
import sample
import tinygpt
from extras import convert, formats, llama2c, recipes

# -- read


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_llama2c_is_read_as_the_same_model(tmp_path, tied):
    shape = dict(vocab_size=11, seq_len=5, width=12, layers=2, heads=6, kv_heads=3, hidden=7, tied=tied)
    cfg = tinygpt.Config(**recipes.LLAMA, **shape)
    flat = tinygpt.init_parameters(cfg, 0)
    llama2c_file(tmp_path / "model.bin", cfg, flat)
    found = llama2c.load(tmp_path / "model.bin")
    assert found.cfg == cfg and found.tokenizer == ""
    assert np.array_equal(found.parameters, flat)


def test_a_model_of_llama2c_that_is_cut_short_is_refused(tmp_path):
    cfg = tinygpt.Config(**recipes.LLAMA, vocab_size=11, seq_len=5, width=12, layers=2, heads=6, hidden=7)
    llama2c_file(tmp_path / "model.bin", cfg, tinygpt.init_parameters(cfg, 0))
    data = (tmp_path / "model.bin").read_bytes()
    for size in (0, 20, 28, len(data) - 1):
        (tmp_path / "model.bin").write_bytes(data[:size])
        with pytest.raises(ValueError, match="is not a model of llama2.c: "):
            llama2c.load(tmp_path / "model.bin")


# -- written

TOKENIZER = bpe.Tokenizer.from_merges(bpe.train(STORIES * 3, 60))
LLAMA = recipes.LLAMA | dict(seq_len=48, width=24, layers=2, heads=6, kv_heads=2, hidden=20)
WRITTEN = {
    "tied": {}, "untied": dict(tied=False), "pairs D/2 apart": dict(positions="rope-half"),
    "a norm after the embedding": dict(embedding_norm=True), "more rows than tokens": dict(vocab_size=350),
}  # fmt: skip


def model_of(**fields):
    cfg = tinygpt.Config(**LLAMA | dict(vocab_size=TOKENIZER.vocab_size) | fields)
    noise = np.random.default_rng(0).standard_normal(tinygpt.count_parameters(cfg)[0])
    return cfg, (tinygpt.init_parameters(cfg, 0) + 0.2 * noise).astype(np.float32)


def logits(cfg, flat, ids):
    p, ops = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), tinygpt.OPS["numpy"]
    return ops.head_logits(tinygpt.forward(p, np.array([ids]), cfg, ops)[0][0], p, cfg, ops)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_and_read_again_has_our_logits(name, tmp_path):
    (cfg, flat), rows = model_of(**WRITTEN[name]), llama2c.vocabulary(TOKENIZER)
    llama2c.save(tmp_path / "out", cfg, flat, TOKENIZER)
    found, tokenizer = sample.load_model(tmp_path / "out" / "model.bin", tmp_path / "out" / "tokenizer.bin")
    ours = [i for _, _, i in rows]  # of each of their ids
    theirs = np.random.default_rng(1).integers(0, len(rows), 40)
    expected = logits(cfg, flat, np.array(ours)[theirs])[:, ours]
    assert relative(logits(found.cfg, found.parameters, theirs), expected) < 3e-6
    assert tokenizer.vocab_size == found.cfg.vocab_size == len(rows)


@pytest.fixture
def theirs(tmp_path):
    llama2c.save(tmp_path, *model_of(), TOKENIZER)
    return formats.read(path := tmp_path / "tokenizer.bin", path.read_bytes())


@pytest.mark.parametrize("text", [*filter(str.isascii, STORIES), "Lily", "a  b\n\n c", "\x7f\x01 ~"])
def test_ascii_texts_are_encoded_alike(theirs, text):
    """llama2.c puts a space before each text."""
    rows = llama2c.vocabulary(TOKENIZER)
    assert [rows[i][2] for i in theirs.encode(text)] == TOKENIZER.encode(" " + text)


@pytest.mark.parametrize("text", [*STORIES, "\u00e9\u65e5 \u2014"])
def test_every_text_is_encoded_to_ids_that_decode_to_it(theirs, text):
    """It joins no bytes to a part of a character, as ours may: then ids differ, and the text does not."""
    rows = llama2c.vocabulary(TOKENIZER)
    assert TOKENIZER.decode([rows[i][2] for i in theirs.encode(text)]) == " " + text


def test_each_ascii_character_is_a_string_with_the_row_of_its_byte():
    rows = llama2c.vocabulary(TOKENIZER)
    assert [string for string, _, _ in rows[:4]] == [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x00>"]
    assert rows[1][2] == TOKENIZER.end and not {TOKENIZER.end} & {i for _, _, i in rows[3:]}
    first = {string: i for string, _, i in rows}
    assert all(first[bytes([b])] == rows[3 + b][2] for b in range(1, 128))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(norm="layernorm", norm_bias=True), "no model with norm=layernorm \\(expected rmsnorm\\)"),
        (dict(qk_norm=True, norm_eps=1e-6), "norm_eps=1e-06 \\(expected 1e-05\\), qk_norm=True"),
        (dict(head_width=8), "head_width=8 \\(expected 4\\)"),
        (dict(qkv_bias=True), "qkv_bias=True"),
        (dict(positions="alibi"), "positions=alibi"),
    ],
)
def test_a_model_that_llama2c_does_not_compute_is_refused_by_what_differs(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        llama2c.save(tmp_path, *model_of(**fields), TOKENIZER)


def test_a_tokenizer_that_llama2c_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="zero byte"):
        llama2c.vocabulary(bpe.Tokenizer.from_merges([(b"\0", b"a")]))
    with pytest.raises(ValueError, match="no token for byte 0x00"):
        llama2c.vocabulary(bpe.Tokenizer([b"a", b"b", b"<|endoftext|>"], [], {"<|endoftext|>": 2}))


def test_the_command_writes_both_files(tmp_path, capsys):
    cfg, flat = model_of()
    tinygpt.save_checkpoint(tmp_path / "m.safetensors", flat, cfg, TOKENIZER.to_json())
    assert convert.main(["--to", "llama2c", str(tmp_path / "m.safetensors"), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.bin", "tokenizer.bin"]
    assert "run " in capsys.readouterr().err
