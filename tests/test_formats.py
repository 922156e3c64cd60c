"""extras/formats.py: the tokenizers of other systems, read, written and with their ids."""

import base64
import inspect
import json
import random
import struct
from collections import Counter
from functools import cache

import numpy as np
import pytest
import regex
from helpers import STORIES, TOK512, by_kernels, cut, random_texts, run_main, shuffled, with_specials

import bpe
from extras import formats

END = bpe.END


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.Tokenizer.from_merges(bpe.train(STORIES, 120))


@pytest.fixture(scope="module")
def bare():
    return bpe.Tokenizer.from_merges(bpe.train(STORIES, 120), reserve=0)


@pytest.fixture(scope="module")
def llama():
    return bpe.Tokenizer.load(TOK512)


def parts(tokenizer):
    return tokenizer.vocab, tokenizer.merges, tokenizer.specials, tokenizer._byte_ids, type(tokenizer), tokenizer.end


# -- round trips


def test_every_format_gives_the_same_tokenizer_again(tokenizer, bare, gpt2, llama, tmp_path):
    odd = with_specials(tokenizer, " lead", "\u00e9 \u00e9", '"quoted"')
    todo = [(each, "tokenizer.json") for each in (tokenizer, bare, gpt2, llama, odd, shuffled(tokenizer)[0])]
    todo += [(each, "x-vocab.json") for each in (tokenizer, bare, gpt2, odd, shuffled(tokenizer)[0])]
    todo += [(bare, "x.tiktoken")]
    for each, name in todo:
        each.save(tmp_path / name)
        loaded = bpe.Tokenizer.load(tmp_path / name)
        assert parts(loaded) == parts(each) and loaded.hash == each.hash, name
        before = (tmp_path / name).read_bytes()
        loaded.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
        if name == "x-vocab.json":
            assert bpe.Tokenizer.load(tmp_path / "x-merges.txt").hash == each.hash


def test_the_content_says_what_a_file_is_and_not_its_name(bare, tmp_path):
    bare.save(tmp_path / "a.tiktoken")
    (tmp_path / "a.tiktoken").rename(tmp_path / "a.json")
    (tmp_path / "b.txt").write_bytes(TOK512.read_bytes())
    bare.save(tmp_path / "c.bin")
    assert bpe.Tokenizer.load(tmp_path / "a.json").hash == bpe.Tokenizer.load(tmp_path / "c.bin").hash == bare.hash
    assert isinstance(bpe.Tokenizer.load(tmp_path / "b.txt"), formats.SpacedTokenizer)


def test_a_format_that_cannot_hold_a_tokenizer_says_what(tokenizer, bare, llama, tmp_path):
    reordered = [*bare.merges[:-2], bare.merges[-1], bare.merges[-2]]
    other = bpe.Tokenizer(bare.vocab, reordered, bare.specials)
    for each, name, message in [
        (
            tokenizer,
            "t.tiktoken",
            r"t\.tiktoken cannot hold the special tokens <\|reserved_0\|>, <\|res.*tokenizer\.json$",
        ),
        (other, "t.tiktoken", "cannot hold merges in an order that is not that of their ids"),
        (shuffled(bare)[0], "t.tiktoken", "cannot hold"),
        (llama, "t.tiktoken", "cannot hold that characters without an id are bytes"),
        (llama, "vocab.json", "cannot hold that characters without an id are bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            each.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_only_looks_like_a_tokenizer_is_refused_in_one_line(bare, tmp_path):
    llama2c = TOK512.read_bytes()
    bare.save(tmp_path / "vocab.json")
    vocab = (tmp_path / "vocab.json").read_bytes()
    ranks = formats.to_ranks(bare)
    for name, data, message in [
        ("a.bin", llama2c[:-1], "damaged tokenizer.bin"),
        ("a.bin", llama2c[:3000], "tokenizer.bin"),
        ("a.bin", llama2c.replace(b"<0x41>", b"<0x4_>"), "damaged tokenizer.bin"),
        ("a.tiktoken", ranks.replace(b" 7\n", b" 8\n", 1), "same id"),
        ("a.tiktoken", ranks + b"YWJj 999\n", "no token of id 376"),
        ("a.tiktoken", ranks + b"AAECAwQF 376\n", "is not made of two tokens of lower rank"),
        ("a.tiktoken", ranks + b"???? 376\n", "damaged rank file"),
        ("a.tiktoken", ranks + b"YWJj\n", "damaged rank file"),
        ("b.json", vocab, "a vocabulary without merges"),
        ("2-vocab.json", vocab, "2-merges.txt"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            bpe.Tokenizer.load(tmp_path / name)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n", encoding="utf-8")
    with pytest.raises(ValueError, match="merges.txt has a line 'a b c'"):
        bpe.Tokenizer.load(tmp_path / "vocab.json")


def test_merges_without_a_version_line_are_read_too(bare, tmp_path):
    bare.save(tmp_path / "vocab.json")
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n", 1)
    assert lines[0] == "#version: 0.2"
    (tmp_path / "merges.txt").write_text(lines[1], encoding="utf-8")
    assert bpe.Tokenizer.load(tmp_path / "vocab.json").hash == bare.hash


def as_written(data, how):
    """The bytes of a text file as other programs write it."""
    data = data.replace(b"\n", b"\r\n") if "crlf" in how else data
    return b"\xef\xbb\xbf" + data if "mark" in how else data


@pytest.mark.parametrize("how", ["crlf", "mark", "crlf and mark"])
def test_line_ends_and_byte_order_marks_of_other_systems_change_nothing(how, bare, llama, tmp_path):
    bare.save(tmp_path / "vocab.json")
    bare.save(tmp_path / "x.tiktoken")
    bare.save(tmp_path / "tokenizer.json")
    llama.save(tmp_path / "llama.json")
    for path in tmp_path.iterdir():
        path.write_bytes(as_written(path.read_bytes(), how))
    for name in ("vocab.json", "merges.txt", "x.tiktoken", "tokenizer.json", "llama.json"):
        want = llama if name == "llama.json" else bare
        assert bpe.Tokenizer.load(tmp_path / name).hash == want.hash, name
    assert bpe.Tokenizer.from_json((tmp_path / "tokenizer.json").read_text("utf-8")).hash == bare.hash


def test_numbers_in_quotes_are_read_and_what_is_no_number_is_refused(bare, llama, tmp_path):
    bare.save(tmp_path / "vocab.json")
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps({token: str(i) for token, i in vocab.items()}), encoding="utf-8")
    for name in ("vocab.json", "merges.txt"):
        assert bpe.Tokenizer.load(tmp_path / name).hash == bare.hash
    for each in (bare, llama):
        data = json.loads(each.to_json())
        data["model"]["vocab"] = {token: str(i) for token, i in data["model"]["vocab"].items()}
        data["added_tokens"][0]["id"] = str(data["added_tokens"][0]["id"])
        assert bpe.Tokenizer.from_json(json.dumps(data)).hash == each.hash
    for bad in (1.0, True, "1.0", "one", None, [1], -1, 10**30):
        (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"a": bad}), encoding="utf-8")
        data = json.loads(bare.to_json())
        data["added_tokens"][0]["id"] = bad
        (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        for name in ("vocab.json", "tokenizer.json"):
            with pytest.raises(ValueError, match="expected a string and a whole number|of id|two ids") as error:
                bpe.Tokenizer.load(tmp_path / name)
            assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_an_id_that_is_not_the_place_in_the_vocabulary_is_refused_in_a_file_like_ours(bare):
    text = bare.to_json()
    for bad in ("10000", f"{bare.end}.0", "0"):
        with pytest.raises(ValueError, match="has id|of id|two ids"):
            bpe.Tokenizer.from_json(text.replace(f'"id": {bare.end}', f'"id": {bad}'))


def test_the_other_file_of_two_is_named_where_it_is_no_text_or_no_json(bare, tmp_path):
    bare.save(tmp_path / "vocab.json")
    good = {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    for name, other, data, message in [
        ("vocab.json", "merges.txt", b"a b\xff", "merges.txt is not text: byte 0xff is not UTF-8"),
        ("vocab.json", "merges.txt", b"a b c", "merges.txt has a line 'a b c'"),
        ("merges.txt", "vocab.json", b"[1]", "vocab.json is not an object of tokens and ids"),
        ("merges.txt", "vocab.json", b'{"a": 1', "vocab.json is not an object of tokens and ids"),
        ("merges.txt", "vocab.json", b'{"a": ' + b"[" * 100_000, "vocab.json is not an object of tokens and ids"),
    ]:
        (tmp_path / other).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            bpe.Tokenizer.load(tmp_path / name)
        (tmp_path / other).write_bytes(good[other])


def test_reserve_0_leaves_the_reserved_specials_out(tmp_path, capsys):
    (tmp_path / "s.txt").write_text("ab ab", encoding="utf-8")
    args = [
        "train",
        str(tmp_path / "s.txt"),
        "--vocab-size",
        "258",
        "--out",
        str(tmp_path / "t.json"),
        "--reserve",
        "0",
    ]
    assert run_main(args) == 0
    assert bpe.Tokenizer.load(tmp_path / "t.json").specials == {END: 257}


# -- split patterns


def rank_file(*tokens):
    """A rank file of the 256 bytes, then these tokens."""
    ranks = [*(bytes([b]) for b in range(256)), *tokens]
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks))


OTHERS = ["\n\nT", " \n(", "1a", "a1", "  a", "e\u0301", "a b", "'tis"]
GPT4S = ["(t", ".\n", "_t", "'S", "\u2019s"]
GPT2S = [" t", "the", "  ", "\n\n", " \n", "12345", " 1", "!?", " (", "'s", "'ll", "'l", "'v", "'r", "\u65e5\u672c"]


def made(text):
    """The bytes of a token and before them those of every shorter beginning, so that each is made of two."""
    token = text.encode()
    return [token[:n] for n in range(2, len(token) + 1)]


@pytest.mark.parametrize("text", OTHERS)
def test_a_vocabulary_of_another_split_pattern_is_refused_and_says_what_to_do(text, tmp_path):
    tokens, message = made(text), r"is cut by GPT-2's split pattern.*python bpe\.py train$"
    (tmp_path / "x.tiktoken").write_bytes(rank_file(*tokens))
    merges = [(token[:-1], token[-1:]) for token in tokens]
    vocab, lines = formats.to_vocab_and_merges(bpe.Tokenizer.from_merges(merges, reserve=0))
    (tmp_path / "vocab.json").write_text(vocab, encoding="utf-8")
    (tmp_path / "merges.txt").write_text(lines, encoding="utf-8")
    for name in ("x.tiktoken", "vocab.json", "merges.txt"):
        with pytest.raises(ValueError, match=message) as error:
            bpe.Tokenizer.load(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot hold it .*save a tokenizer.json"):
        bpe.Tokenizer.from_merges(merges, reserve=0).save(tmp_path / "y.tiktoken")


GPT4_TEXTS = [
    *STORIES,
    "don't DON'T I'LL",
    "1234567 a.\n\n  b  \n \n",
    "x \n ",
    "'\u017f (t)[u] \u00a0t",
    "  \r\n\ta  ",
]
GPT4_TEXTS += random_texts(5, 200)


def gpt4s(pattern):
    """A tokenizer whose merges are made from words of GPT-4's split pattern."""
    counts = Counter(word.encode() for text in GPT4_TEXTS * 2 for word in regex.findall(pattern, text))
    merges = bpe.merge_pairs(counts, 300)
    plain = bpe.Tokenizer.from_merges(merges, reserve=0)
    return formats.PatternTokenizer(plain.vocab, merges, plain.specials, pattern)


@pytest.mark.parametrize("text", GPT4S)
def test_a_token_that_gpt4s_pattern_alone_leaves_whole_says_that_it_is_gpt4s(text, tmp_path):
    (tmp_path / "x.tiktoken").write_bytes(rank_file(*made(text)))
    assert bpe.Tokenizer.load(tmp_path / "x.tiktoken").pattern == formats.CL100K


def test_ids_of_gpt4s_pattern_are_those_of_tiktoken(tmp_path):
    tiktoken, ours = pytest.importorskip("tiktoken"), gpt4s(formats.CL100K)
    published = pytest.importorskip("tiktoken_ext.openai_public")
    source = inspect.getsource(published.cl100k_base)
    pattern = regex.search(r'"pat_str": r"""(.*?)""",', source)[1]
    ranks = {token: i for i, token in enumerate(ours.vocab) if i != ours.end}
    theirs = tiktoken.Encoding("gpt4", pat_str=pattern, mergeable_ranks=ranks, special_tokens=ours.specials)
    ours.save(tmp_path / "x.tiktoken")
    again = bpe.Tokenizer.load(tmp_path / "x.tiktoken")
    assert type(again) is formats.PatternTokenizer and again.specials == ours.specials
    for text in GPT4_TEXTS:
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == again.encode(text) == [*again.encode_iterable(text)] == ids, text
        assert ours.decode(ids) == text
    stories = [text for text in GPT4_TEXTS if text.strip()]
    joined = np.concatenate([ids for ids, _, _ in ours.encode_documents(stories)]).tolist()
    assert joined == [i for text in stories for i in (*ours.encode(text), ours.end)]


@pytest.mark.parametrize("pattern", [formats.CL100K, formats.CL100K_JSON], ids=["tiktoken", "json"])
def test_ids_of_gpt4s_pattern_are_those_of_tokenizers(pattern, tmp_path):
    tokenizers, ours = pytest.importorskip("tokenizers"), gpt4s(pattern)
    ours.save(tmp_path / "tokenizer.json")
    again, theirs = bpe.Tokenizer.load(tmp_path / "tokenizer.json"), tokenizers.Tokenizer.from_str(ours.to_json())
    assert again.hash == ours.hash and again.pattern == pattern
    for text in GPT4_TEXTS:
        assert ours.encode(text, "all") == again.encode(text, "all") == theirs.encode(text).ids, text


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts[0].update(behavior="MergedWithPrevious"),
        lambda parts: parts[0].update(invert=True),
        lambda parts: parts[0]["pattern"].update(Regex=r"\p{N}|\P{N}+"),
        lambda parts: parts[1].update(use_regex=True),
        lambda parts: parts[1].update(add_prefix_space=True),
        lambda parts: parts.append(parts[1]),
        lambda parts: parts.clear(),
        lambda parts: parts.__setitem__(1, 3),
    ],
)
def test_a_split_that_is_not_gpt4s_is_refused(change):
    data = json.loads(gpt4s(formats.CL100K).to_json())
    change(data["pre_tokenizer"]["pretokenizers"])
    with pytest.raises(ValueError, match="pre_tokenizer.type is 'Sequence'; expected"):
        bpe.Tokenizer.from_json(json.dumps(data))


@pytest.mark.parametrize("text", GPT2S)
def test_every_token_that_gpt2s_pattern_leaves_whole_is_read(text, tmp_path):
    (tmp_path / "x.tiktoken").write_bytes(rank_file(*made(text)))
    tokenizer = bpe.Tokenizer.load(tmp_path / "x.tiktoken")
    assert text.encode() in tokenizer.vocab


def test_whatever_the_trainer_makes_of_any_text_is_read_again(tmp_path):
    for seed in range(5):
        texts = [*random_texts(30 + seed, 60), "they'll we've you're " * 5]
        trained = bpe.Tokenizer.from_merges(bpe.train(texts, 400), reserve=0)
        trained.save(tmp_path / "x.tiktoken")
        assert bpe.Tokenizer.load(tmp_path / "x.tiktoken").hash == trained.hash


# -- the ids of others


def test_tiktoken_reads_our_rank_file_and_gives_the_same_ids(bare, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    bare.save(tmp_path / "ours.tiktoken")
    lines = (tmp_path / "ours.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    theirs = tiktoken.Encoding("x", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens=bare.specials)
    for text in [*STORIES, *random_texts(20, 300)]:
        assert bare.encode(text, "all") == theirs.encode(text, allowed_special="all")


def test_tokenizers_reads_our_vocab_and_merges_and_gives_the_same_ids(tokenizer, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer.save(tmp_path / "vocab.json")
    theirs = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for text in [*STORIES, *random_texts(21, 300)]:
        assert tokenizer.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("names", [[END], ["[UNK]", "<pad>"], []])
def test_a_tokenizer_of_tokenizers_without_all_bytes_gives_its_ids_and_refuses_other_texts(names, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]" if "[UNK]" in names else None))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=names, show_progress=False)
    theirs.train_from_iterator(STORIES, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = bpe.Tokenizer.load(tmp_path / "tokenizer.json")
    known = {token for token in ours.vocab if len(token) == 1}
    assert 40 < len(known) < 80 and list(ours.specials) == names
    texts, refused = [*STORIES, "".join(STORIES) * 9, "the moon" + "".join(names), *random_texts(32, 200)], 0
    for text in texts:
        if missing := [b for b in text.encode() if bytes([b]) not in known]:
            with pytest.raises(ValueError, match=f"^the text has byte 0x{missing[0]:02x}, for which"):
                ours.encode(text)
            refused += 1
        else:
            assert ours.encode(text, "all") == theirs.encode(text).ids and ours.decode(ours.encode(text)) == text
            theirs.encode_special_tokens = True
            assert ours.encode(text) == theirs.encode(text).ids == list(ours.encode_iterable([text]))
            theirs.encode_special_tokens = False
    assert 100 < refused < len(texts) - 5


@cache
def agreed():
    """The characters whose class regex, tiktoken and tokenizers agree on: their Unicode versions differ."""
    tiktoken, tokenizers = pytest.importorskip("tiktoken"), pytest.importorskip("tokenizers")
    assigned = [*range(0xD800), *range(0xE000, 0x33480), *range(0xE0000, 0xE0200)]  # no others are, in any version yet
    every = list(map(chr, assigned))
    text, single = "".join(every), {bytes([b]): b for b in range(256)}
    differ = set()
    for pattern in (r"\p{L}", r"\p{N}", r"\s"):
        ours = set(bpe.regex.findall(pattern, text))
        encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=single, special_tokens={})
        one = set(encoding.decode(encoding.encode_ordinary(text)))  # it drops what the pattern does not match
        replace = tokenizers.normalizers.Replace(tokenizers.Regex(pattern), "")
        other = set(text) - set(replace.normalize_str(text))
        differ |= (ours ^ one) | (ours ^ other)
    assert len(differ) < 20_000
    return [character for character in every if character not in differ]


def test_ids_are_those_of_tiktoken_and_tokenizers_on_any_text_whose_classes_they_agree_on(tokenizer):
    characters = agreed()
    import tiktoken
    import tokenizers

    more = with_specials(tokenizer, "<a>", "<a><b>")
    ranks = {token: i for i, token in enumerate(more.vocab) if i not in more.specials.values()}
    one = tiktoken.Encoding("x", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens=more.specials)
    other = tokenizers.Tokenizer.from_str(more.to_json())
    rng = random.Random(22)
    pool = [*characters[:0x3000:7], *" \n'ste", "  ", "'ll", END, "<a>", "<a><b>", " the", "\u3000", "1"]
    texts = ["".join(rng.choices(rng.choice([pool, characters]), k=rng.randint(0, 30))) for _ in range(1500)]
    for text, kernel in zip(texts, by_kernels(more, texts)):
        plain, special = more.encode(text), more.encode(text, "all")
        assert plain == kernel == one.encode_ordinary(text), text
        other.encode_special_tokens = True
        assert plain == other.encode(text).ids, text
        other.encode_special_tokens = False
        assert special == other.encode(text).ids, text
        if "<a>" not in text:
            assert special == one.encode(text, allowed_special="all"), text


def test_a_special_that_is_disallowed_is_an_error_where_it_stands_for_itself(tokenizer):
    text = f"a story{END}"
    more = with_specials(tokenizer, "<a>", "<a><b>")
    for data in (text, text.encode()):
        with pytest.raises(
            ValueError, match=r"special token <\|endoftext\|> at position 7; name it in allowed_special"
        ):
            tokenizer.encode(data, disallowed_special="all")
    with pytest.raises(ValueError, match="position 7"):
        list(tokenizer.encode_iterable(text, disallowed_special={END}))
    assert tokenizer.encode(text, {END}, "all") == [*tokenizer.encode("a story"), tokenizer.end]
    assert more.encode("<a><b>", {"<a><b>"}, "all") == [more.specials["<a><b>"]]
    with pytest.raises(ValueError, match="special token <a> at position 0"):
        more.encode("<a>", {"<a><b>"}, "all")
    assert more.encode("<a>", (), {"<a><b>"}) == more.encode("<a>")
    with pytest.raises(ValueError, match="disallowed_special has '<x>'"):
        more.encode("", (), {"<x>"})
    with pytest.raises(ValueError, match=r"special token <\|endoftext\|> at position 0"):
        more.encode(END, (), END)


def test_chunks_with_disallowed_specials_give_their_ids_before_the_last_is_read(tokenizer):
    read = []
    chunks = (read.append(word) or word for word in ["Once", " upon", " a", " time", END] * 50)
    ids = tokenizer.encode_iterable(chunks, disallowed_special="all")
    assert next(ids) == tokenizer.encode("Once")[0] and len(read) <= 3
    with pytest.raises(ValueError, match=r"special token <\|endoftext\|> at position 16; name it"):
        list(ids)
    assert len(read) < 10  # of 250


@pytest.mark.parametrize("disallowed", ["all", {END, "<a>"}, {"\u00e9 \u00e9"}, {"b>+"}])
def test_chunks_find_a_disallowed_special_where_the_whole_text_has_it(tokenizer, disallowed):
    more, rng, found = with_specials(tokenizer, "<a>", "<a><b>", "b>+", "\u00e9 \u00e9"), random.Random(33), set()
    parts = [END, "<a>", "<a><b>", "b>+", "\u00e9 \u00e9", "\u00e9", " ", "\n", "ab c", "<a", "!", "\u65e5"]

    def outcome(encode, *args):
        try:
            return list(encode(*args))
        except ValueError as error:
            return str(error)

    for _ in range(500):
        text, allowed = "".join(rng.choices(parts, k=6)), set(rng.choices(["<a>", "b>+", END], k=2))
        whole = outcome(more.encode, text, allowed, disallowed)
        for data in (text, text.encode()):
            assert outcome(more.encode_iterable, cut(data, rng, 4), allowed, disallowed) == whole, text
        found.add(type(whole))
    assert found == {list, str}


# -- llama2.c


def llama2c_encode(text, data=None):
    """What run.c of llama2.c does: the whole text at once, the best score first, the leftmost of equals."""
    data, tokens, scores, at = data or TOK512.read_bytes(), [], [], 4
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + size])
        scores.append(score)
        at += 8 + size
    ids = {token: i for i, token in enumerate(tokens)}
    found = [ids[b" "]] if text else []
    for character in text:
        token = character.encode()
        found += [ids[token]] if token in ids else [b + 3 for b in token]
    while True:
        best, where = -1e10, -1
        for i in range(len(found) - 1):
            joined = ids.get(tokens[found[i]] + tokens[found[i + 1]])
            if joined is not None and scores[joined] > best:
                best, where, new = scores[joined], i, joined
        if where < 0:
            return found
        found[where : where + 2] = [new]


LLAMA_TEXTS = [
    "",
    " ",
    "   ",
    "a",
    " a",
    "Once upon a time",
    "the the  the   the",
    'he said "yes"\n\n\tand',
    "\u65e5\u672c caf\u00e9",
]
LLAMA_TEXTS += ["<0x41> <s> </s>", "aaaaaaaaa", "\u2581x", "zzz \U0001f600 \x00"]


def test_ids_are_those_of_llama2c(llama):
    for text in [*LLAMA_TEXTS, *STORIES, *random_texts(23, 150)]:
        assert llama.encode(text) == llama2c_encode(text), text
        assert llama.encode_array(text).tolist() == list(llama.encode_iterable(text)) == llama.encode(text)


def test_tokens_of_one_score_are_joined_from_the_left(tmp_path):
    """As Llama's own 32,000 have it: runs of spaces of one score, below all others."""
    made = ["  ", "    ", "   ", "ab", "ba", "aba", " a", "bab", "  a"]
    scores = [-1e9, -1e9, -1e9, -2.0, -2.0, -2.0, -1.0, -3.0, -4.0]
    pieces = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *((f"<0x{b:02X}>", 0.0) for b in range(256))]
    pieces += [*zip(made, scores), *((character, -9.0) for character in " ab")]
    data = b"".join(struct.pack("<fi", score, len(piece)) + piece.encode() for piece, score in pieces)
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(struct.pack("<i", 8) + data)
    tokenizer, rng = bpe.Tokenizer.load(path), random.Random(27)
    in_order = formats.SpacedTokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.specials, tokenizer._byte_ids)
    texts = ["".join(rng.choices("  ab", k=rng.randrange(25))) for _ in range(1000)]
    assert all(tokenizer.encode(text) == llama2c_encode(text, path.read_bytes()) for text in texts)
    assert any(tokenizer.encode(text) != in_order.encode(text) for text in texts)  # a rank for each merge
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    with pytest.raises(ValueError, match="merges of one rank"):
        tokenizer.save(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("size", [513, 300_000])
def test_a_token_too_long_for_its_merges_to_be_found_is_refused_at_once(size, tmp_path):
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % b for b in range(256)), b"a"]
    for token in (b"a" * size, b"a" * 512):
        data = b"".join(struct.pack("<fi", -1.0, len(piece)) + piece for piece in [*pieces, token])
        (tmp_path / "t.bin").write_bytes(struct.pack("<i", 8) + data)
        if len(token) > 512:
            with pytest.raises(ValueError, match=f"with a token of {size:,} bytes; expected at most 512"):
                bpe.Tokenizer.load(tmp_path / "t.bin")
        else:
            assert token in bpe.Tokenizer.load(tmp_path / "t.bin").vocab


def test_a_merge_by_another_order_gives_other_ids(llama):
    """Negative control: the texts do depend on the scores."""
    other = formats.SpacedTokenizer(llama.vocab, llama.merges[::-1], llama.specials, llama._byte_ids)
    assert any(other.encode(text) != llama.encode(text) for text in STORIES)


def test_tokenizers_gives_the_ids_of_llama2c_from_our_json(llama):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(llama.to_json())
    for text in [*LLAMA_TEXTS, *STORIES, *random_texts(24, 300), "a<s> b</s>c <unk>"]:
        if "\u2581" not in text:  # which `tokenizers` takes for a space
            assert theirs.encode(text).ids == llama.encode(text, "all"), text
            assert theirs.decode(llama.encode(text)) == llama.decode(llama.encode(text)) == text


def test_text_of_llama2c_comes_back_without_the_space_that_it_was_given(llama):
    rng = random.Random(25)
    for text in [*LLAMA_TEXTS, *STORIES, *random_texts(26, 200), "a<s> b</s><s>  c"]:
        for allowed in ((), "all"):
            ids = llama.encode(text, allowed)
            assert llama.decode(ids) == text
            assert "".join(llama.decode_iterable(ids)) == text
    for _ in range(200):
        data = rng.randbytes(rng.randint(0, 20))
        assert llama.decode_bytes(llama.encode(data)) == data
    ids = llama.encode("Lily was")
    assert llama.decode(ids[1:], ids[0]) == "Lily was"[len(llama.decode(ids[:1])) :]
    assert "".join(llama.decode_iterable(ids[1:], ids[0])) == "Lily was"[len(llama.decode(ids[:1])) :]
    assert llama.decode(ids, llama.end) == "Lily was" and llama.decode(ids, ids[0]) == " Lily was"


def test_a_story_of_llama2c_ends_with_its_bos(llama, tmp_path):
    assert llama.end == 1 and llama.specials == {"<unk>": 0, "<s>": 1, "</s>": 2}
    info = bpe.write_tokens(iter([("one", False), (" two", True), ("three", True)]), llama, tmp_path / "t.bin")
    ids, _ = bpe.read_tokens(tmp_path / "t.bin", llama)
    assert ids.tolist() == [*llama.encode("one two"), 1, *llama.encode("three"), 1]
    assert info["stories"] == 2 and info["bytes"] == 12


def test_merges_that_cross_words_are_made(llama):
    """Of a vocabulary with a token that has a space inside, the text is not cut into words."""
    vocab = [*llama.vocab, b"d the"]
    other = formats.SpacedTokenizer(vocab, [*llama.merges, (b"d", b" the")], llama.specials, llama._byte_ids)
    ids = other.encode("z the zd the")
    assert ids[-1] == len(vocab) - 1 and other.decode(ids) == "z the zd the"
