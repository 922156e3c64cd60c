"""bpe.py: the trainers against each other, ids against other implementations, files and command line against misuse."""

import functools
import io
import json
import os
import random
import shutil
import string
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    GOLDEN,
    PIECES,
    STORIES,
    cut,
    gpt2_json,
    random_texts,
    run_main,
    shuffled,
    train_compiled,
    with_specials,
    write,
)
from tiers import fast, needs_fast

import bpe
from extras import tokens
from extras.documents import documents

END = bpe.END


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.Tokenizer.from_merges(bpe.train(STORIES, 120))


# -- trainers


def random_corpus(seed):
    """A few documents of few letters, so that most pairs tie with another."""
    rng = random.Random(seed)
    letters = rng.choice(["a", "ab", "abc", "ab ", "aAb \n", "a\u00e9\u00e8\u65e5", "ab'1!"])
    return ["".join(rng.choices(letters, k=rng.randint(0, 60))) for _ in range(rng.randint(1, 6))]


def test_all_trainers_find_the_same_merges_on_random_corpora():
    for seed in range(300):
        texts = random_corpus(seed)
        assert bpe.train(texts, 40) == train_compiled(texts, 40) == bpe.train_spec(texts, 40), f"seed {seed}"
    for texts in (STORIES * 3, random_texts(29, 300, 60), [random.Random(0).randbytes(400)]):
        assert bpe.train(texts, 200) == train_compiled(texts, 200) == bpe.train_spec(texts, 200)


def test_a_long_text_is_counted_and_merged_by_compiled_code(monkeypatch):
    want, called, compiled = bpe.train(STORIES, 100), [], fast.merges.train
    monkeypatch.setattr(bpe, "TRAIN_LONG", 100)
    monkeypatch.setattr(fast.merges, "train", lambda *args: called.append(args) or compiled(*args))
    assert bpe.train(iter(STORIES), 100) == want and called
    monkeypatch.setattr(bpe, "find_fast", lambda name: None)  # without fast/
    assert bpe.train(iter(STORIES), 100) == want and len(called) == 1


TIES = ["ab cb ab cb", "ba bc", "a\u00e9 a\u00e8"]


@pytest.mark.parametrize("train", [bpe.train, train_compiled, bpe.train_spec])
def test_ties_go_to_the_lexicographically_greater_pair_of_byte_strings(train):
    assert train(["xz", "zx"], 1) == [(b"z", b"x")]
    assert train(["ab", "ac"], 1) == [(b"a", b"c")]
    # UTF-8 bytes: C3 A9 before C3 A8
    assert train(["\u00e9", "\u00e8"], 1) == [(b"\xc3", b"\xa9")]
    # (ab, c) before (a, z): first parts are compared first, and a string is greater than its beginning;
    # what the pairs join to stands the other way round, az after abc
    assert train(["abc", "az", "ab"], 2) == [(b"a", b"b"), (b"ab", b"c")]
    # (b, c) before (aa, b): that aa is the newest token does not count
    assert train(["aab", "aad", "bc"], 2) == [(b"a", b"a"), (b"b", b"c")]


def test_the_opposite_tie_rule_gives_other_merges():
    """Negative control: the corpus of ties does tell the rules apart."""

    def train_smaller(texts, num_merges):
        words = {tuple(bytes([b]) for b in word): n for word, n in bpe.count_pretokens(texts).items()}
        merges = []
        for _ in range(num_merges):
            counts = {}
            for word, n in words.items():
                for pair in pairwise(word):
                    counts[pair] = counts.get(pair, 0) + n
            merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
            words = {tuple(bpe.join_pair(word, merges[-1])): n for word, n in words.items()}
        return merges

    assert train_smaller(TIES, 6) != bpe.train(TIES, 6) == bpe.train_spec(TIES, 6)


@pytest.mark.parametrize("train", [bpe.train, train_compiled, bpe.train_spec])
def test_overlapping_pairs_count_twice_and_join_from_the_left(train):
    # three times aaa has (a, a) six times, which is more than five (b, c)
    assert train(["aaa1aaa1aaa", "bc1" * 5], 2) == [(b"a", b"a"), (b"b", b"c")]
    assert train(["aaa"], 9) == [(b"a", b"a"), (b"aa", b"a")]
    assert train(["aaaaa"], 9) == [(b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a")]


@pytest.mark.parametrize("train", [bpe.train, train_compiled, bpe.train_spec])
def test_merges_cross_neither_pretokens_nor_the_end_of_a_story(train):
    text = f"ab cd'll 12x{END}ab{END}{END}yz"
    tokens = {left + right for left, right in train([text], 100)}
    assert tokens <= {b"ab", b" cd", b"cd", b" c", b"'ll", b"'l", b"ll", b"12", b" 12", b" 1", b"yz"}
    assert not any(set(token) & set(b"<|>") for token in tokens)


@pytest.mark.parametrize("train", [bpe.train, train_compiled, bpe.train_spec])
def test_merges_cross_no_special_token_that_the_trainer_is_given(train):
    text = f"ab<a>cd<a b>ef{END}\u00e9\u00e9"
    for names, plain in [
        ((END, "<a>", "<a b>"), ["ab", "cd", "ef", "\u00e9\u00e9"]),
        ({"<a>", "<a b>", "<a"}, ["ab", "cd", f"ef{END}\u00e9\u00e9"]),  # without END, as others train
        ("<a b>", ["ab<a>cd", f"ef{END}\u00e9\u00e9"]),  # a name alone
        (["b<", "\u00e9"], ["a", f"a>cd<a b>ef{END}"]),
        ((), [text]),
    ]:
        merges = train([text], 100, specials=names)
        assert merges == bpe.train_spec([text.encode()], 100, names) == train(plain, 100, specials=())
    rng = random.Random(28)
    for _ in range(100):
        names = {"".join(rng.choices("ab<\u00e9", k=rng.randint(1, 3))) for _ in range(rng.randint(1, 3))}
        text = "".join(rng.choices("ab<\u00e9 ", k=40))
        assert train(text, 20, specials=names) == bpe.train_spec(text, 20, names), (names, text)


@pytest.mark.parametrize("train", [bpe.train, train_compiled, bpe.train_spec])
def test_training_stops_when_no_pair_is_left(train):
    assert train([], 5) == train([""], 5) == train(["a b c"], 0) == train(["abc"], 0) == []
    assert train(["a1b"], 5) == []
    assert len(train(["abc"], 50)) == 2
    assert train(["ab ab", "ab"], 10) == train([b"ab ab", b"ab"], 10)
    assert train("abc", 2) == train(["abc"], 2)


# -- encode and decode


def test_any_bytes_and_any_text_come_back(tokenizer):
    rng = random.Random(1)
    characters = [*range(0xD800), *range(0xE000, 0x110000)]
    for _ in range(300):
        data = rng.randbytes(rng.randint(0, 40)) + "".join(rng.choices(PIECES, k=3)).encode()[: rng.randint(0, 9)]
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
        text = "".join(chr(c) for c in rng.choices(characters, k=20))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == tokenizer.encode(text.encode()) == tokenizer.encode(bytearray(text.encode()))
    for text in random_texts(2, 500):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, "all")) == text
    assert tokenizer.encode("") == tokenizer.encode(b"") == [] and tokenizer.decode([]) == ""


def test_encoding_applies_the_earliest_merge_first_wherever_it_stands():
    merges = [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"bc", b"bc")]
    names = bpe.Tokenizer.from_merges(merges).vocab
    encode = bpe.Tokenizer.from_merges(merges).encode
    assert [names[i] for i in encode("abcbcab")] == [b"abc", b"bc", b"ab"]
    assert [names[i] for i in encode("bcbcbc")] == [b"bcbc", b"bc"]


def test_encoding_equals_a_plain_loop_over_the_merges(tokenizer):
    for text in random_texts(3, 300):
        ids = []
        for word in bpe.SPLIT.findall(text):
            parts = [bytes([b]) for b in word.encode()]
            for pair in tokenizer.merges:
                parts = bpe.join_pair(parts, pair)
            ids += [tokenizer.vocab.index(part) for part in parts]
        assert tokenizer.encode(text) == ids


def test_a_word_of_a_megabyte_and_a_full_cache_change_nothing(tokenizer):
    word = "little" * 30_000
    ids = tokenizer.encode(word)
    assert ids == tokenizer.encode("little") * 30_000
    small = bpe.Tokenizer.from_json(tokenizer.to_json())
    small._cached_ids = functools.lru_cache(3)(small.word_ids)
    assert [small.encode(text) for text in STORIES * 2] == [tokenizer.encode(text) for text in STORIES * 2]
    assert small._cached_ids.cache_info().currsize == 3
    assert small.encode("a" * 65) == small.encode("a") * 65 and small._cached_ids.cache_info().currsize == 3


def test_specials_are_text_unless_allowed(tokenizer):
    text = f"a{END}<|reserved_0|>b"
    specials = tokenizer.specials
    assert not set(tokenizer.encode(text)) & set(specials.values())
    some = tokenizer.encode(text, {END})
    assert [i for i in some if i in specials.values()] == [tokenizer.end]
    assert tokenizer.encode(text, "all") == [ord("a"), tokenizer.end, specials["<|reserved_0|>"], ord("b")]
    assert tokenizer.encode(text.encode() + b"\xff", "all") == [*tokenizer.encode(text, "all"), 0xFF]
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(some) == text
    with pytest.raises(ValueError, match=r"allowed_special has '<\|other\|>'; this tokenizer has <\|endoftext\|>"):
        tokenizer.encode(text, {"<|other|>"})
    assert tokenizer.encode(text, END) == some  # a name alone, too
    with pytest.raises(ValueError, match="allowed_special has 'any'"):
        tokenizer.encode(text, "any")


def test_a_tokenizer_that_is_told_its_special_tokens_once_needs_not_be_told_again(tokenizer):
    told, text = with_specials(tokenizer, "<a>"), f"a<a>{END}b"
    assert told.encode(text) == told.encode(text, ()) != told.encode(text, "all")
    for allowed in ("all", {"<a>"}):
        told.allowed_special = allowed
        assert told.encode(text) == list(told.encode_iterable(text)) == told.encode(text, allowed)
        assert told.encode_array(text).tolist() == told.encode(text) != told.encode(text, ())
    with pytest.raises(ValueError, match=r"special token <\|endoftext\|> at position 4"):
        told.encode(text, disallowed_special="all")
    assert list(told.encode_documents([text]))[0][0].tolist() == [
        *told.encode(text, ()),
        told.end,
    ]  # what it holds is text


def test_only_what_needs_the_end_of_a_story_refuses_a_tokenizer_without_one(tokenizer, tmp_path):
    for names in ((), ("<a>", "<b>")):
        bare = bpe.Tokenizer.from_merges(tokenizer.merges, 0, names)
        bare.save(tmp_path / "t.json")
        bare = bpe.Tokenizer.load(tmp_path / "t.json")
        assert list(bare.specials) == list(names) and bare.encode("<b>", "all")[-1:] != bare.encode("<b>") or not names
        for text in STORIES:
            assert bare.encode(text) == tokenizer.encode(text) and bare.decode(bare.encode(text)) == text
        for call in (
            lambda x: bpe.write_tokens(STORIES, x, tmp_path / "t.bin"),
            lambda x: list(x.encode_documents("a")),
        ):
            with pytest.raises(ValueError, match=r"has no special token <\|endoftext\|>, which ends a story$"):
                call(bare)
        with pytest.raises(ValueError, match=r"has no special token <\|endoftext\|>, which ends a story$"):
            bare.end  # noqa: B018
        assert not list(tmp_path.glob("t.bin*"))
    with pytest.raises(ValueError, match="has 'x'; this tokenizer has none"):
        bpe.Tokenizer.from_merges([], 0, ()).encode("", {"x"})


def test_the_longest_special_wins_and_the_leftmost_before_it(tokenizer):
    more = with_specials(tokenizer, "<a>", "<a><b>", "b>+", "\u00e9 \u00e9")
    assert more.encode("<a><b>+", "all") == [more.specials["<a><b>"], ord("+")]
    assert more.encode("<a><a><b>", "all") == [more.specials["<a>"], more.specials["<a><b>"]]
    assert more.encode("b>+", {"b>+"}) == [more.specials["b>+"]]
    assert more.encode("<a><b>", {"<a>"}) == [more.specials["<a>"], *more.encode("<b>")]
    assert more.encode("x\u00e9 \u00e9", "all") == [ord("x"), more.specials["\u00e9 \u00e9"]]


def test_a_stream_gives_the_ids_of_the_whole_whatever_the_chunks(tokenizer):
    more = with_specials(tokenizer, "<a>", "<a><b>", "b>+", "  ", "'l")
    rng = random.Random(4)
    texts = [*STORIES, "", *random_texts(5, 700)]
    texts += [
        "".join(rng.choices(["<a>", "<a><", "<b>", "<", "a", ">", "<b", "b>+", " ", "'", "l", "\n"], k=8))
        for _ in range(700)
    ]
    for text in texts:
        for allowed in ((), {END, "<a><b>"}, "all"):
            whole = more.encode(text, allowed)
            for most in (1, 3, 20):
                chunks = cut(text, rng, most)
                assert list(more.encode_iterable(chunks, allowed)) == whole, (chunks, allowed)
            assert list(more.encode_iterable(cut(text.encode(), rng, 3), allowed)) == whole
    for _ in range(300):
        data = rng.choice([b"", "caf\u00e9 \U0001f600".encode()[rng.randint(0, 3) :]]) + rng.randbytes(
            rng.randint(0, 20)
        )
        assert list(tokenizer.encode_iterable(cut(data, rng, 2))) == tokenizer.encode(data)
    assert list(tokenizer.encode_iterable([b"a\xc3", b"\xa9", "\u00e9"])) == tokenizer.encode("a\u00e9\u00e9")


def test_a_stream_is_encoded_as_it_comes_and_a_long_word_in_no_quadratic_time(tokenizer):
    seen = []
    ids = tokenizer.encode_iterable(seen.append(word) or word for word in ["Once", " upon", " a", " time"] * 50)
    next(ids)
    assert len(seen) < 5
    letters = iter("x" * 200_000)
    assert len(list(tokenizer.encode_iterable(letters))) == len(tokenizer.encode("x" * 200_000))


def test_a_lone_surrogate_is_refused_with_its_position(tokenizer):
    for call in (tokenizer.encode, lambda text: list(tokenizer.encode_iterable([text])), lambda t: bpe.train([t], 1)):
        with pytest.raises(ValueError, match=r"U\+D83D at position 3"):
            call("abc\ud83d")


def test_wrong_types_are_refused_rather_than_read_as_something_else(tokenizer):
    for call in (tokenizer.encode, lambda x: list(tokenizer.encode_iterable(x))):
        with pytest.raises(TypeError):
            call(5)
    with pytest.raises(TypeError):
        list(tokenizer.encode_iterable(b"bytes give integers"))


def test_ids_one_by_one_join_to_decode_and_never_give_half_a_character(tokenizer):
    rng = random.Random(6)
    awkward = [*range(0x80, 0x100), *"\u00e9\u65e5\U0001f600".encode()]
    for _ in range(1000):
        ids = rng.choices(rng.choice([range(tokenizer.vocab_size), range(256), awkward]), k=rng.randint(0, 12))
        assert "".join(tokenizer.decode_iterable(ids)) == tokenizer.decode(ids)
    text = "\u65e5\u672c\u8a9e \U0001f600\U0001f468\u200d\U0001f469 caf\u00e9"
    given = list(tokenizer.decode_iterable(text.encode()))
    assert "".join(given) == text and "\ufffd" not in "".join(given) and given[-1] == ""
    assert list(tokenizer.decode_iterable([0xE6])) == ["", "\ufffd"]
    assert list(tokenizer.decode_iterable(np.array([ord("a")], np.uint16))) == ["a", ""]


@pytest.mark.parametrize("bad", [-1, 385, 10**6])
def test_an_unknown_id_is_refused_with_the_valid_range(tokenizer, bad):
    assert tokenizer.vocab_size == 256 + 120 + 9
    for call in (tokenizer.decode, tokenizer.decode_bytes, lambda ids: list(tokenizer.decode_iterable(ids))):
        with pytest.raises(ValueError, match=f"token id {bad} .* expected 0 to 384"):
            call([65, bad])
    assert tokenizer.decode(np.array([72, 105], np.uint16)) == "Hi"


# -- tokenizer.json


def test_ids_are_bytes_then_merges_then_the_end_then_the_reserved(tokenizer):
    assert tokenizer.vocab[:256] == [bytes([b]) for b in range(256)]
    assert tokenizer.vocab[256:376] == [left + right for left, right in tokenizer.merges]
    assert tokenizer.specials == {END: 376, **{f"<|reserved_{i}|>": 377 + i for i in range(8)}}
    assert tokenizer.end == 376 and tokenizer.vocab[376] == END.encode()
    assert bpe.Tokenizer.from_merges([], reserve=0).vocab_size == 257


def test_saved_and_loaded_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = bpe.Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocab, loaded.merges, loaded.specials) == (tokenizer.vocab, tokenizer.merges, tokenizer.specials)
    assert loaded.hash == tokenizer.hash and len(loaded.hash) == 64
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    others = [tokenizer.merges[:-1], [*tokenizer.merges[:-2], tokenizer.merges[-1], tokenizer.merges[-2]]]
    assert tokenizer.hash not in [bpe.Tokenizer.from_merges(merges).hash for merges in others]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save(path)
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["tokenizer.json"]


def test_ids_are_kept_whatever_they_are(tokenizer):
    other, order = shuffled(tokenizer)
    loaded = bpe.Tokenizer.from_json(other.to_json())
    assert loaded.vocab == other.vocab and loaded.specials == other.specials and loaded.end == 0
    for text in [*STORIES, *random_texts(8, 200)]:
        assert [order[i] for i in loaded.encode(text, "all")] == tokenizer.encode(text, "all")
        assert loaded.decode(loaded.encode(text)) == text


def test_hugging_face_tokenizers_gives_the_same_ids(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    english = "It's a dog's life; we'll've SHOUTED 'TIS, they'd said 3.14 x_y  \n\n \t end \r\n"
    cjk = "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \ud55c\uad6d \u0e44\u0e17\u0e22\u3000 \u00a0"
    emoji = "\U0001f600 \U0001f468\u200d\U0001f469 \u2764\ufe0f\U0001f44d\U0001f3fd!"
    for ours in (
        tokenizer,
        shuffled(tokenizer)[0],
        with_specials(tokenizer, "<a>", "<a><b>", "\u00e9 \u00e9", " lead"),
    ):
        theirs = tokenizers.Tokenizer.from_str(ours.to_json())
        assert theirs.get_vocab_size() == ours.vocab_size
        for name, i in ours.specials.items():
            assert theirs.token_to_id(name) == i
        for text in [*STORIES, english, cjk, emoji, "<a><b><a>\u00e9 \u00e9 lead", *random_texts(9, 1000)]:
            theirs.encode_special_tokens = False
            ids = theirs.encode(text).ids
            assert ours.encode(text, "all") == ids, text
            assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
            theirs.encode_special_tokens = True
            assert ours.encode(text) == theirs.encode(text).ids, text


def test_tiktoken_gives_the_same_ids(tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: i for i, token in enumerate(tokenizer.vocab) if i < tokenizer.end}
    theirs = tiktoken.Encoding("ours", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens=tokenizer.specials)
    for text in [*STORIES, *random_texts(10, 1000)]:
        assert tokenizer.encode(text, "all") == theirs.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == theirs.encode(text, disallowed_special=())


def test_gpt2_ids_are_those_of_gpt2():
    gpt2 = bpe.Tokenizer.from_json(json.dumps(gpt2_json()))
    ids = list(GOLDEN["vocab"].values())
    assert gpt2.vocab[0] == b"!" and ids[gpt2.end] == 50256
    for row in GOLDEN["texts"]:
        assert [ids[i] for i in gpt2.encode(row["text"])] == row["plain"], row["text"]
        assert [ids[i] for i in gpt2.encode(row["text"], "all")] == row["special"], row["text"]
        assert gpt2.decode([ids.index(i) for i in row["special"]]) == row["text"]


def test_gpt2_merges_in_another_order_give_other_ids():
    """Negative control: the golden texts do depend on the order of merges."""
    gpt2 = bpe.Tokenizer.from_json(json.dumps(gpt2_json(merges=[" ".join(m) for m in GOLDEN["merges"][::-1]])))
    ids = list(GOLDEN["vocab"].values())
    assert any([ids[i] for i in gpt2.encode(row["text"])] != row["plain"] for row in GOLDEN["texts"])


def changed(dotted, value):
    data = gpt2_json()
    at = data
    *path, last = dotted.split(".")
    for key in path:
        at = at[int(key) if key.isdigit() else key]
    at[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a tokenizer: expected tokenizer.json, "),
        ("\x00\x01", "not a tokenizer: expected tokenizer.json, "),
        ("[" * 100_000, "not a tokenizer"),
        ("[1, 2]", "no model"),
        ('{"model": 3}', "a vocabulary without merges; expected a vocab.json beside its merges.txt"),
        ('{"config": {}, "model": {"type": "BPE"}}', "no model"),
        (changed("model.type", "WordPiece"), "model.type is 'WordPiece'; expected \"BPE\""),
        (changed("pre_tokenizer", None), "pre_tokenizer.type is None"),
        (changed("pre_tokenizer.type", "Metaspace"), "pre_tokenizer.type is 'Metaspace'"),
        (changed("pre_tokenizer", {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}}), "GPT-2's split pattern"),
        (changed("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}), "GPT-2's split pattern"),
        (changed("pre_tokenizer.add_prefix_space", True), "add_prefix_space is True; expected false"),
        (changed("pre_tokenizer.use_regex", False), "use_regex is False; expected true"),
        (changed("normalizer", {"type": "NFC"}), "normalizer is"),
        (changed("post_processor.type", "TemplateProcessing"), "post_processor.type"),
        (changed("model.end_of_word_suffix", "</w>"), "end_of_word_suffix"),
        (changed("model.ignore_merges", True), "ignore_merges"),
        (changed("added_tokens", [3]), "damaged"),
        (changed("added_tokens.0.lstrip", True), "lstrip"),
        (changed("added_tokens.0.id", 5), "two ids"),
        (changed("model.vocab.a", 5), "same id"),
        (changed("model.vocab.a", 99_999), "no token of id"),
        (changed("model.vocab.a b", len(GOLDEN["vocab"])), "not byte-level"),
        (changed("model.vocab", {"a": 0, END: len(GOLDEN["vocab"]) - 1}), "no token of id 1"),
        (changed("model.vocab", {END: 0, **{c: i for i, c in enumerate("abc", 1)}}), "two ids"),
        (changed("model.merges", [["a"]]), "damaged tokenizer.json: a merge is not a pair"),
        (changed("model.merges", [["q", "q"]]), "merge of b'q' and b'q' needs b'qq'"),
        (changed("model.merges", 5), "damaged"),
    ],
)
def test_a_file_that_is_not_ours_to_read_is_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        bpe.Tokenizer.load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("kernels", ["python", pytest.param("fast", marks=needs_fast)])
def test_a_text_is_refused_only_if_it_has_a_byte_that_the_vocabulary_lacks(tokenizer, kernels, monkeypatch):
    lost = {b"A", b"\xa9"}
    vocab = [token if token not in lost else b"none%d" % i for i, token in enumerate(tokenizer.vocab)]
    merges = [(a, b) for a, b in tokenizer.merges if not lost & {a, b, a + b}]
    part = bpe.Tokenizer(vocab, merges, tokenizer.specials)
    whole = bpe.Tokenizer(tokenizer.vocab, merges, tokenizer.specials)
    if kernels == "fast":
        monkeypatch.setattr(bpe, "LONG_WHEN_LOADED", 0)
        monkeypatch.setattr(bpe, "LONG", 0)
    for text in [*STORIES, *random_texts(31, 200), "a" * 300, "a story " * 99]:
        data = text.encode()
        if missing := [b for b in data if bytes([b]) in lost]:
            with pytest.raises(ValueError, match=f"^the text has byte 0x{missing[0]:02x}, for which .* no token$"):
                part.encode(text)
        else:
            assert part.encode(text) == whole.encode(text) and part.decode(part.encode(text)) == text
    for text in ("aA" * 200, b"\xa9", ["a", "bA"], b"x" * 300 + b"A"):
        with pytest.raises(ValueError, match="^the text has byte 0x(41|a9), for which this vocabulary has no token$"):
            list(part.encode_documents(text))
    assert part.encode("again") == whole.encode("again")  # after what was refused
    assert (part._encoder is not None) == (kernels == "fast")


def test_a_vocabulary_holding_a_token_twice_is_refused():
    with pytest.raises(ValueError, match="token twice"):
        bpe.Tokenizer.from_merges([(b"a", b"a"), (b"a", b"a")])
    with pytest.raises(ValueError, match="token twice"):
        bpe.Tokenizer.from_merges([(b"a", b"b"), (b"ab", b"c"), (b"b", b"c"), (b"a", b"bc")])


# -- documents


def test_documents_are_stripped_stories_in_order(tmp_path):
    a = write(tmp_path / "b.txt", f"\ufeff one \n{END}\n{END}  {END}two\r\nlines\r\n{END}\nthree")
    b = write(tmp_path / "a.jsonl", '\ufeff{"text": " four ", "id": 1}\r\n\n{"text": ""}\n{"text": "fi\\u00e9ve\\n"}')
    assert list(documents([a, b])) == ["one", "two\r\nlines", "three", "four", "fi\u00e9ve"]
    assert list(documents(tmp_path)) == list(documents([str(b), a]))
    assert list(documents(write(tmp_path / "c.text", "no end"))) == ["no end"]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 13, 14, 64])
def test_documents_do_not_depend_on_where_the_file_is_cut(size, tmp_path):
    stories = ["<|endoftext|", "\u65e5\u672c" * 20, "x", "<<|endof|text|>"] * 3
    path = write(tmp_path / "s.txt", f"\n{END}".join(stories))
    with open(path, "rb") as file:
        assert (
            "".join(text + END * ends for text, ends in bpe.read_text(file, path, size))
            == path.read_text("utf-8") + END
        )


def test_reading_reports_its_progress_in_bytes(tmp_path):
    a, b = write(tmp_path / "a.txt", f"one{END}two"), write(tmp_path / "b.jsonl", '{"text": "x"}\n')
    done = []
    list(documents([a, b], done.append))
    assert done == sorted(done) and done[-1] == a.stat().st_size + b.stat().st_size


BAD_DATA = [
    ("a.txt", b"", "is empty"),
    ("a.txt", f" {END}\n".encode(), "is empty"),
    ("a.txt", b"\xef\xbb\xbf", "is empty"),
    ("a.txt", b"abc\0def", "not text: it has NUL"),
    ("a.txt", "utf-16".encode("utf-16"), "not text"),
    ("a.txt", b"caf\xe9 ol\xe9", "not text: byte 0xe9"),
    ("a.txt", b"cut \xe2\x82", "not text: byte 0xe2"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_DATA)
def test_bad_data_is_refused_in_one_line_that_names_the_file(name, data, message, tmp_path, capsys):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=message) as error:
        list(documents([path]))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert run_main(["train", str(path), "--vocab-size", "265", "--out", str(tmp_path / "t.json")]) == 2
    assert capsys.readouterr().err == f"bpe.py: error: {error.value}\n"
    assert not (tmp_path / "t.json").exists()


def test_missing_files_and_folders_without_text_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        list(documents([tmp_path / "none.txt"]))
    with pytest.raises(ValueError, match=r"folder without \.txt or \.jsonl"):
        list(documents([tmp_path]))


# -- token files


def test_a_token_file_holds_each_story_and_its_end(tokenizer, tmp_path):
    path = tmp_path / "train.bin"
    stories = [*STORIES, f"a story that quotes {END}"]
    info = bpe.write_tokens(iter(stories), tokenizer, path)
    ids, read = bpe.read_tokens(path, tokenizer)
    assert info == read == json.loads((tmp_path / "train.bin.json").read_text(encoding="utf-8"))
    assert ids.tolist() == [i for story in stories for i in [*tokenizer.encode(story), tokenizer.end]]
    assert path.read_bytes() == ids.astype("<u2").tobytes() and not ids.flags.writeable
    assert info == {
        "format_version": 1,
        "dtype": "uint16",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "tokens": len(ids),
        "stories": len(stories),
        "bytes": sum(len(story.encode()) for story in stories),
        "crc32": f"{zlib.crc32(path.read_bytes()):08x}",
    }
    assert (ids == tokenizer.end).sum() == len(stories)
    assert sorted(os.listdir(tmp_path)) == ["train.bin", "train.bin.json"]


def test_more_than_65536_entries_take_four_bytes_an_id(tmp_path):
    letters = [a.encode() for a in string.ascii_letters]
    twos = [a + b for a in letters for b in letters]
    merges = [(a, b) for a in letters for b in letters] + [(ab, c) for ab in twos for c in letters]
    for n, reserve, dtype in [(65536 - 257, 0, "uint16"), (65536 - 257, 1, "uint32")]:
        large = bpe.Tokenizer.from_merges(merges[:n], reserve)
        bpe.write_tokens(["abc xyz"], large, tmp_path / "t.bin")
        ids, info = bpe.read_tokens(tmp_path / "t.bin", large)
        assert info["dtype"] == ids.dtype.name == dtype and large.decode(ids) == f"abc xyz{END}"


def test_two_threads_write_the_bytes_of_one(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(fast.words.batches, "__defaults__", (1 << 10,))
    monkeypatch.setattr(bpe, "LONG", 1 << 11)
    stories = [f"{i} {STORIES[i % 4]}" for i in range(200)]
    done = []
    one = bpe.write_tokens(stories, tokenizer, tmp_path / "1.bin", threads=1)
    two = bpe.write_tokens(iter(stories), tokenizer, tmp_path / "2.bin", done.append, threads=2)
    assert one == two and (tmp_path / "1.bin").read_bytes() == (tmp_path / "2.bin").read_bytes()
    assert len(done) > 9 and done == sorted(done) and done[-1] == two["bytes"]


def test_an_error_while_encoding_leaves_the_old_token_file(tokenizer, tmp_path):
    path = tmp_path / "t.bin"
    bpe.write_tokens(["old"], tokenizer, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="lone surrogate"):
        bpe.write_tokens(["new", "\ud800"], tokenizer, path)
    with pytest.raises(ValueError, match="no stories"):
        bpe.write_tokens([], tokenizer, path)
    assert path.read_bytes() == before and bpe.read_tokens(path, tokenizer)
    assert sorted(os.listdir(tmp_path)) == ["t.bin", "t.bin.json"]


def test_a_new_token_file_never_keeps_the_description_of_the_old_one(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "t.bin"
    bpe.write_tokens(["old"], tokenizer, path)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if str(b) == str(path) else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bpe.write_tokens(["new"], tokenizer, path)
    with pytest.raises(ValueError, match=r"t\.bin\.json is missing"):
        bpe.read_tokens(path, tokenizer)


def test_a_token_file_written_again_as_it_was_is_whole_all_the_time(tokenizer, tmp_path, monkeypatch):
    """Two processes may encode the same text at once, and one of them read while the other writes."""
    path, replace, seen = tmp_path / "t.bin", os.replace, []
    bpe.write_tokens(["a story"], tokenizer, path)

    def look_and_replace(aside, to):
        seen.append(len(bpe.read_tokens(path, tokenizer)[0]))
        replace(aside, to)

    monkeypatch.setattr(os, "replace", look_and_replace)
    info = bpe.write_tokens(["a story"], tokenizer, path)
    assert seen == [info["tokens"]] * 2


def test_two_writers_of_one_token_file_at_once_leave_one_that_reads(tokenizer, tmp_path):
    """In two containers that share a folder, both may have the same process id."""
    path = tmp_path / "t.bin"

    def stories():
        yield from STORIES
        bpe.write_tokens(["another text"], tokenizer, path)

    info = bpe.write_tokens(stories(), tokenizer, path)
    assert bpe.read_tokens(path, tokenizer)[1] == info and sorted(os.listdir(tmp_path)) == ["t.bin", "t.bin.json"]


def test_read_tokens_computes_a_checksum_that_the_description_leaves_out(tokenizer, tmp_path):
    path, beside = tmp_path / "t.bin", tmp_path / "t.bin.json"
    info = bpe.write_tokens(STORIES, tokenizer, path)
    beside.write_text(json.dumps({name: value for name, value in info.items() if name != "crc32"}), encoding="utf-8")
    for check in (True, False):
        assert bpe.read_tokens(path, tokenizer, check)[1] == info


def test_read_tokens_without_check_reads_the_description_alone(tokenizer, tmp_path):
    path = tmp_path / "t.bin"
    info = bpe.write_tokens(STORIES, tokenizer, path)
    path.write_bytes(bytes(len(path.read_bytes())))
    ids, read = bpe.read_tokens(path, tokenizer, check=False)
    assert read == info and not ids.any()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        bpe.read_tokens(path, tokenizer, check=False)


def test_a_token_file_that_does_not_fit_is_refused(tokenizer, tmp_path):
    path, beside = tmp_path / "t.bin", tmp_path / "t.bin.json"
    with pytest.raises(FileNotFoundError, match=r"t\.bin does not exist"):
        bpe.read_tokens(path)
    info = bpe.write_tokens(STORIES, tokenizer, path)
    data = path.read_bytes()

    def refused(message, tokenizer=tokenizer):
        with pytest.raises(ValueError, match=message) as error:
            bpe.read_tokens(path, tokenizer)
        assert str(error.value).endswith("encode the text again") and "\n" not in str(error.value)

    other = bpe.Tokenizer.from_merges(tokenizer.merges[:-1])
    refused(f"written with tokenizer {tokenizer.hash[:12]}, this one is {other.hash[:12]}", other)
    for cut_data in (data[:-2], data[:-1], data + b"\0\0", b""):
        path.write_bytes(cut_data)
        refused(rf"has {len(cut_data)} bytes; expected {len(data)} \({info['tokens']} tokens\)")
    path.write_bytes(data[:-2] + (tokenizer.vocab_size).to_bytes(2, "little"))
    refused(f"is damaged: its checksum is .*, expected '{info['crc32']}'")
    beside.write_text(json.dumps({**info, "crc32": None}), encoding="utf-8")  # as another writer's
    refused(f"has id {tokenizer.vocab_size}; expected below {tokenizer.vocab_size}")
    path.write_bytes(data)
    beside.write_text(json.dumps({**info, "format_version": 2}), encoding="utf-8")
    refused("format version 2; expected 1")
    for text in ("", "[]", "{}", "3", json.dumps({**info, "dtype": "int8"}), json.dumps({**info, "tokens": "5"})):
        beside.write_text(text, encoding="utf-8")
        refused("does not describe a token file")
    beside.unlink()
    refused(r"t\.bin\.json is missing")


# -- command line


def run(*args, cwd, **env):
    """bpe.py as a user calls it: (status, stdout as bytes, stderr)."""
    done = subprocess.run(
        [sys.executable, bpe.__file__, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONUTF8": "0", **env},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace")


def test_the_command_line_goes_from_text_to_ids_and_back(tmp_path):
    text = "".join(f"{story}\n{END}\n" for story in STORIES)
    write(tmp_path / "stories.txt", text)
    assert run("train", "stories.txt", "--vocab-size", 300, "--out", "tokenizer.json", cwd=tmp_path)[0] == 0
    status, out, err = run("encode", "stories.txt", "--tokenizer", "tokenizer.json", "--out", "t.bin", cwd=tmp_path)
    assert (status, out) == (0, b"") and "4 stories" in err and "\r" not in err
    status, out, err = run("decode", "t.bin", "--tokenizer", "tokenizer.json", cwd=tmp_path, PYTHONIOENCODING="utf-8")
    assert (status, out.decode(), err) == (0, text, "")
    assert sorted(os.listdir(tmp_path)) == ["stories.txt", "t.bin", "t.bin.json", "tokenizer.json"]

    console = {"PYTHONIOENCODING": "cp1252"}
    status, out, err = run("decode", "t.bin", "--tokenizer", "tokenizer.json", cwd=tmp_path, **console)
    assert (status, out, err) == (0, text.encode("cp1252", "replace"), "") and b"??? caf\xe9" in out
    status, out, err = run("stats", "stories.txt", "--tokenizer", "tokenizer.json", cwd=tmp_path, **console)
    assert status == 0 and b"bytes per token" in out and b"of 300 entries" in out and err == ""


def test_the_vocabulary_size_counts_everything(tmp_path, capsys):
    path, out = write(tmp_path / "s.txt", "ab cd"), tmp_path / "t.json"

    def train(size, *more):
        status = run_main(["train", str(path), "--vocab-size", str(size), "--out", str(out), *more])
        return status, capsys.readouterr().err

    assert train(264) == (
        2,
        f"bpe.py: error: --vocab-size is 264; expected at least 265 (256 bytes, {END}, 8 reserved)\n",
    )
    assert train(269) == (2, "bpe.py: error: --vocab-size is 269, but this text gives 268; lower it or add text\n")
    assert train(260, "--reserve", "-1")[0] == 2 and not out.exists()
    for size, more in [(265, ()), (268, ()), (257, ("--reserve", "0")), (260, ("--reserve", "0"))]:
        assert train(size, *more)[0] == 0
        assert bpe.Tokenizer.load(out).vocab_size == size


def test_a_mistake_is_one_line_on_stderr_and_status_2(tmp_path, capsys, tokenizer):
    story, tok = write(tmp_path / "s.txt", "a story"), tmp_path / "tokenizer.json"
    tokenizer.save(tok)
    write(tmp_path / "other.json", "{}")
    bpe.write_tokens(["x"], bpe.Tokenizer.from_merges([]), tmp_path / "x.bin")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for args, message in [
        ("", "required"),
        ("tell", "invalid choice"),
        ("train s.txt", "required: --vocab-size, --out"),
        ("train s.txt --vocab-size many --out o.json", "invalid int value"),
        ("train none.txt --vocab-size 265 --out o.json", "none.txt does not exist"),
        ("train s.txt --vocab-size 265 --out none/o.json", "none is no folder"),
        ("train s.txt --vocab-size 265 --out .", "is a folder"),
        ("train s.txt --vocab-size 265 --out s.txt", "s.txt would be overwritten"),
        ("encode s.txt --tokenizer none.json --out o.bin", "none.json: No such file"),
        ("encode s.txt --tokenizer other.json --out o.bin", "other.json: not a tokenizer"),
        ("encode s.txt --tokenizer s.txt --out o.bin", "s.txt: not a tokenizer"),
        ("encode s.txt none.txt --tokenizer tokenizer.json --out o.bin", "none.txt does not exist"),
        ("encode s.txt --tokenizer tokenizer.json --out s.txt", "s.txt would be overwritten"),
        ("encode s.txt --tokenizer tokenizer.json --out tokenizer.json", "tokenizer.json would be overwritten"),
        ("encode x.bin --tokenizer tokenizer.json --out o.bin", "x.bin is not text"),
        ("decode none.bin --tokenizer tokenizer.json", "none.bin does not exist"),
        ("decode s.txt --tokenizer tokenizer.json", "s.txt.json is missing"),
        ("decode x.bin --tokenizer tokenizer.json", "was written with tokenizer"),
        ("stats none.txt --tokenizer tokenizer.json", "none.txt does not exist"),
    ]:
        args = [str(tmp_path / word) if "." in word or "/" in word else word for word in args.split()]
        assert run_main(args) == 2, args
        out, err = capsys.readouterr()
        assert err.startswith("bpe.py: error: ") and message in err and err.count("\n") == 1 and out == "", err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before and story in before


def test_a_reader_that_has_enough_is_no_error(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    bpe.write_tokens(STORIES * 2000, tokenizer, tmp_path / "t.bin")
    args = [sys.executable, bpe.__file__, "decode", "t.bin", "--tokenizer", "tokenizer.json"]
    with subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 0


@pytest.mark.parametrize("command", ["train", "encode", *bpe.TOOLS])
def test_every_argument_has_a_help_of_its_own(command, capsys):
    assert run_main([command, "--help"]) == 0 and "FILE" in capsys.readouterr().out
    make_parser = (tokens if command in bpe.TOOLS else bpe).make_parser
    parser = make_parser()._subparsers._group_actions[0].choices[command]
    helps = [action.help for action in parser._actions]
    assert all(helps) and len(set(helps)) == len(helps)


def test_without_fast_and_extras_a_line_says_what_is_missing(tokenizer, tmp_path):
    for name in ("bpe.py", "tinygpt.py"):
        shutil.copy(Path(bpe.__file__).with_name(name), tmp_path)
    story = "Once upon a time there was a ball. " * 40_000
    write(tmp_path / "s.txt", story + END)
    tokenizer.save(tmp_path / "tokenizer.json")
    tokenizer.save(tmp_path / "vocab.json")

    def run(*args):
        words = [sys.executable, "bpe.py", *args]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = run("encode", "s.txt", "--tokenizer", "tokenizer.json", "--out", "t.bin")
    assert done.returncode == 0 and done.stderr.startswith("bpe.py: no fast/words.py (No module named 'fast')")
    assert len(done.stderr.splitlines()) == 2
    want = [*tokenizer.encode(story.strip()), tokenizer.end]
    assert bpe.read_tokens(tmp_path / "t.bin", tokenizer)[0].tolist() == want
    for args, what in [
        (
            ("encode", "s.txt", "--tokenizer", "vocab.json", "--out", "v.bin"),
            "a tokenizer that bpe.py did not write needs extras/formats.py",
        ),
        (("decode", "t.bin", "--tokenizer", "tokenizer.json"), "bpe.py decode needs extras/tokens.py"),
        (("train", "s.txt", "--vocab-size", "265", "--out", "x.tiktoken"), "x.tiktoken needs extras/formats.py"),
        (("stats", "s.txt", "--tokenizer", "tokenizer.json"), "bpe.py stats needs extras/tokens.py"),
    ]:
        done = run(*args)
        assert done.returncode == 2 and what in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does, by their numbers")
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_a_closed_stream_changes_no_file(tmp_path, closed):
    write(tmp_path / "s.txt", STORIES[0])
    code = f"import os; [os.close(n) for n in {closed}]; "
    code += f"os.execv({sys.executable!r}, [{sys.executable!r}, {bpe.__file__!r}, *{{words}}])"
    for words, name in (
        (["train", "s.txt", "--vocab-size", "270", "--out", "t.json"], "t.json"),
        (["encode", "s.txt", "--tokenizer", "t.json", "--out", "s.bin"], "s.bin"),
    ):
        shell = [sys.executable, "-c", code.format(words=words)]
        assert subprocess.run(shell, cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
        assert (tmp_path / name).exists()
    tokenizer = bpe.Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.decode(bpe.read_tokens(tmp_path / "s.bin", tokenizer)[0]) == STORIES[0] + END


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize(
    "command", ["train PIPE --vocab-size 300 --out o.json", "encode PIPE --tokenizer t.json --out o.bin"]
)
def test_a_pipe_as_text_is_refused_by_its_name(tokenizer, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("PIPE")
    tokenizer.save("t.json")
    assert run_main(command.split()) == 2
    assert "PIPE is a pipe or a device" in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*"))


def test_a_message_fits_a_screen():
    line = bpe.error_line(ValueError("a" * 300_000 + "z"))
    assert len(line) < 1000 and line.startswith("aaa") and line.endswith("az")


class CountedBytes(bytes):
    """Bytes that count how many of them are copied."""

    copied = 0

    def __getitem__(self, key):
        part = super().__getitem__(key)
        CountedBytes.copied += len(part) if isinstance(key, slice) else 1
        return part


@pytest.mark.parametrize("unit", [f"a b{END}", "a b c", "<|endoftext|>", "ab"])
def test_looking_for_special_tokens_takes_no_quadratic_work(tokenizer, monkeypatch, unit):
    monkeypatch.setattr(CountedBytes, "copied", 0)
    text = CountedBytes(unit.encode() * 20_000)
    assert tokenizer.encode(text, {END}, "all").count(tokenizer.end) == 20_000 * (END in unit)
    assert CountedBytes.copied <= 4 * len(text)


def test_importing_does_no_work_beyond_definitions(tmp_path):
    code = "import sys, bpe; assert 'numba' not in sys.modules and 'tinygpt' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": str(Path(bpe.__file__).parent)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=60)
    assert os.listdir(tmp_path) == []


def test_progress_shows_the_time_left_and_clears_its_line(monkeypatch):
    terminal, now = io.StringIO(), [100.0]
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(bpe.time, "monotonic", lambda: now[0])
    with bpe.Progress("encoding", 1000) as progress:
        progress(0)
        assert terminal.getvalue() == ""
        now[0] = 130.0
        progress(250)
        assert terminal.getvalue().startswith("\rencoding [#######") and "25%, 1:30 left" in terminal.getvalue()
        progress(260)  # too soon after the last
        assert "26%" not in terminal.getvalue()
    shown, blank, end = terminal.getvalue().split("\r")[1:]
    assert not blank.strip() and len(blank) >= len(shown) and end == ""
    with bpe.Progress("nothing", 0) as progress:
        progress(0)
    terminal.isatty = lambda: False
    with bpe.Progress("a file", 10) as progress:
        now[0] += 10
        progress(5)
    assert terminal.getvalue().count("\r") == 3


def test_a_parser_takes_an_exception_and_names_the_program_alone(capsys):
    for error, line in [
        (OSError(2, "No such file or directory", "x.txt"), "x.txt: No such file or directory"),
        (ValueError("T=300"), "T=300"),
        ("a text", "a text"),
    ]:
        with pytest.raises(SystemExit) as done:
            bpe.Parser(prog="train.py of a model").error(error)
        assert done.value.code == 2 and capsys.readouterr().err == f"train.py: error: {line}\n"
