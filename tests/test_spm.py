"""extras/spm.py: a .model of SentencePiece gives its ids; what would not is refused by its name."""

import io
import random

import pytest
from helpers import STORIES, TOK512, random_texts, sentencepiece_file

import bpe
from extras import formats, spm

TEXTS = [
    *STORIES,
    "",
    " ",
    "  a",
    "a\n\nb",
    "Lily",
    "\u00e9t\u00e9 \U0001f600",
    "<s> <unk> <0x41>",
    *random_texts(3, 200),
]
TEXTS = [text for text in TEXTS if "\x00" not in text]


def trained(**options):
    """The bytes of a .model that SentencePiece trains on a few stories."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    usual = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    usual |= dict(remove_extra_whitespaces=False, vocab_size=380, character_coverage=0.98)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(STORIES * 3), model_writer=model, **usual | options)
    return model.getvalue()


@pytest.fixture(scope="module")
def model():
    return trained()


def load(folder, data):
    (folder / "tokenizer.model").write_bytes(data)
    return bpe.Tokenizer.load(folder / "tokenizer.model")


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(split_by_whitespace=False),
        dict(split_digits=True, bos_id=3, pad_id=1),
        dict(character_coverage=1.0, vocab_size=400),
    ],
)
def test_ids_and_texts_are_those_of_sentencepiece(options, tmp_path):
    data = trained(**options)
    theirs, ours = __import__("sentencepiece").SentencePieceProcessor(model_proto=data), load(tmp_path, data)
    assert ours.vocab_size == theirs.vocab_size() and ours.specials["<s>"] == theirs.bos_id()
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids) == text


def test_it_is_saved_as_a_tokenizer_json_with_the_same_ids(model, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = load(tmp_path, model)
    theirs, again = tokenizers.Tokenizer.from_str(ours.to_json()), bpe.Tokenizer.from_json(ours.to_json())
    for text in TEXTS[1:]:
        assert theirs.encode(text).ids == again.encode(text, "all") == ours.encode(text, "all")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(model_type="unigram", vocab_size=328), "model_type is unigram; expected bpe"),
        (dict(byte_fallback=False, vocab_size=120), "byte_fallback is false; expected true"),
        (dict(normalization_rule_name="nmt_nfkc"), "the normalizer is 'nmt_nfkc', which has rules; expected identity"),
        (dict(add_dummy_prefix=False), "add_dummy_prefix is false; expected true"),
        (dict(remove_extra_whitespaces=True), "remove_extra_whitespaces is true; expected false"),
        (dict(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix is true; expected false"),
        (dict(user_defined_symbols=["<x>"]), "piece '<x>' is user-defined; expected normal, control and byte pieces"),
    ],
)
def test_what_would_give_other_ids_is_refused_by_its_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, trained(**options))
    assert "tokenizer.model" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_cut_or_changed_is_refused_in_one_line(model, tmp_path):
    rng = random.Random(0)
    for _ in range(500):
        data = bytearray(model[: rng.randrange(len(model))] if rng.random() < 0.5 else model)
        for _ in range(rng.randrange(3)):
            data[rng.randrange(len(data))] = rng.randrange(256) if data else 0
        try:
            load(tmp_path, bytes(data))
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 300


def test_numbers_of_a_message_are_read_and_a_cut_one_is_refused():
    assert spm.fields_of(b"\x08\x96\x01\x12\x02ab\x1d\x00\x00\x80\x3f") == [(1, 150), (2, b"ab"), (3, b"\x00\x00\x80?")]
    for data in (b"\x08", b"\x08\x96", b"\x12\x05ab", b"\x1d\x00", b"\x0b", b"\x08" + b"\xff" * 11):
        with pytest.raises(ValueError, match="a damaged .model file"):
            spm.fields_of(data)


def test_a_file_made_by_hand_holds_the_tokenizer_that_it_was_made_from(tmp_path):
    llama = bpe.Tokenizer.load(TOK512)
    found = load(tmp_path, sentencepiece_file(llama))
    for text in TEXTS:
        assert found.encode(text) == llama.encode(text)


@pytest.mark.parametrize("data", [b"\n \n{}", b"\n\n\n\n\n", b"\n", b"\n{\n\n\n\x15", b"{}"])
def test_other_files_are_not_taken_for_one(data):
    assert not spm.is_model(data)


def test_the_longest_piece_is_bounded():
    text = "a" * (formats.LONGEST + 1)
    with pytest.raises(ValueError, match="has 513 bytes; expected at most 512"):
        spm.read_piece(b"\n" + bytes([0x81, 0x04]) + text.encode())
