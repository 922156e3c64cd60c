"""fast/words.py and fast/merges.py: what Numba makes of long texts against SPLIT, count_pretokens, Tokenizer.encode."""

import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from helpers import GOLDEN, PIECES, STORIES, by_kernels, by_python, random_texts, train_compiled, with_specials

import bpe
from extras.documents import documents
from fast import words

END = bpe.END
WHITE = [c for c in map(chr, range(0x110000)) if bpe.regex.match(r"\s", c)]
# White space, letters, digits and signs of one to four bytes, among them the first and last of each length.
SCRIPTS = [*WHITE, *"a\u00e9\u0436\u65e5\uac00\U00010400\u01c5\u02b0\u05d0", *"7\u00bd\u0663\u2163\U0001d7d8"]
SCRIPTS += [*"!'_\u0301\u200b\u200d\u2028\ufeff\ufffd\U0001f600", "\x7f", "\x80", "\u07ff", "\u0800", "\uffff"]
SCRIPTS += ["\U00010000", "\U0010ffff", "\ud7ff", "\ue000"]
# Bytes that are no UTF-8: lone continuations, overlong forms, surrogates, beyond U+10FFFF, cut short.
BROKEN = [
    b"\x80",
    b"\xbf",
    b"\xc0\xa0",
    b"\xc1\x81",
    b"\xe0\x80\xa0",
    b"\xf0\x80\x80\xa0",
    b"\xed\xa0\x80",
    b"\xed\xb2\x80",
]
BROKEN += [b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xff", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc3", b"\xe6\x97"]


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.Tokenizer.from_merges(bpe.train(STORIES, 120))


def counted(text):
    """{pre-token: how often} of the kernels."""
    raw, rows = words.distinct_words(bpe.as_pieces(text))
    raw = raw.tobytes()
    return {raw[start:stop]: n for start, stop, n in rows.tolist()}


def same(tokenizer, texts):
    for text, ids in zip(texts, by_kernels(tokenizer, texts)):
        assert ids == by_python(tokenizer, text), text
        assert counted(text) == bpe.count_pretokens([text]), text


# -- the scanner


def test_ascii_of_every_kind_in_every_order_is_split_as_the_pattern_does(tokenizer):
    same(tokenizer, list(map("".join, product(" \na7!'s\x1f", repeat=4))))
    ascii_text = [chr(c) for c in range(128)]
    rng = random.Random(1)
    texts = ["".join(rng.choices(ascii_text, k=rng.randint(0, 40))) for _ in range(2000)]
    same(tokenizer, texts)


def test_contractions_are_those_of_the_pattern():
    for word in map("".join, product("'", "sdmtlvrexS'", "lecS ", "el'a ")):
        for text in (word, "a" + word, " " + word, word + "s", "'" + word, "\u00e9" + word):
            assert counted(text) == bpe.count_pretokens([text]), text


def test_every_script_meets_every_other_at_every_boundary(tokenizer):
    texts = ["".join(pair) for pair in product(SCRIPTS, repeat=2)]
    texts += [f"{a}{b}x {c}" for a, b, c in zip(texts[::3], texts[1::3], texts[2::3])]
    found = by_kernels(tokenizer, texts)
    assert found == [by_python(tokenizer, text) for text in texts]
    joined = [text + "\n" * (i % 3) for i, text in enumerate(texts)]
    assert counted("".join(joined)) == bpe.count_pretokens(["".join(joined)])
    for shift in range(9):  # the boundary between two reads of eight bytes
        text = "".join("a" * shift + text for text in random.Random(shift).sample(texts, 300))
        assert counted(text) == bpe.count_pretokens([text])


def test_every_code_point_has_the_class_that_regex_gives_it():
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    kinds = {words.LETTER: r"\p{L}", words.NUMBER: r"\p{N}", words.SPACE: r"\s", words.OTHER: r"[^\s\p{L}\p{N}]"}
    for kind, pattern in kinds.items():
        found = np.array([ord(c) for c in bpe.regex.findall(pattern, "".join(characters))])
        classes = words.character_classes()
        assert (classes[found] == kind).all() and len(found) <= (classes == kind).sum()
    for before, after in (("", "a"), ("a", "a"), ("7", "7"), ("!", "!"), (" ", " ")):
        text = "".join(f"{before}{character}{after}\n" for character in [*characters[:0x3000], *characters[::37]])
        assert counted(text) == bpe.count_pretokens([text])


def test_a_byte_that_is_no_utf8_is_one_sign(tokenizer):
    valid = [b"a", b" ", b"'s", b"7", b"!", "\u00e9".encode(), "\u3000".encode()]
    texts = [b"".join(parts) for parts in product(valid, BROKEN, valid)]
    texts += [a + b + b"a" for a, b in product(BROKEN, repeat=2)]
    rng = random.Random(2)
    texts += [b"".join(rng.choices(valid + BROKEN, k=rng.randint(0, 9))) for _ in range(2000)]
    texts += [rng.randbytes(rng.randint(0, 30)) for _ in range(2000)]
    texts += [bytes(rng.choices(range(0x80, 0x100), k=12)) for _ in range(2000)]
    assert by_kernels(tokenizer, texts) == [by_python(tokenizer, text) for text in texts]
    assert counted(b"\n".join(texts)) == bpe.count_pretokens([b"\n".join(texts)])


def test_random_pieces_give_the_ids_of_the_specification(tokenizer, gpt2):
    same(tokenizer, [*STORIES, *random_texts(11, 1500)])
    for texts in ([row["text"] for row in GOLDEN["texts"]], random_texts(12, 1500)):
        assert by_kernels(gpt2, texts) == [by_python(gpt2, text) for text in texts]


def test_golden_texts_have_the_ids_of_gpt2_by_kernels_too(gpt2):
    ids = list(GOLDEN["vocab"].values())
    found = by_kernels(gpt2, [row["text"] for row in GOLDEN["texts"]])
    assert [[ids[i] for i in each] for each in found] == [row["plain"] for row in GOLDEN["texts"]]
    assert np.dtype(gpt2.dtype) == np.uint16


def test_any_text_that_hypothesis_can_think_of(tokenizer, tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path)
    st = hypothesis.strategies
    text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n'sdtlve"))) | st.binary()

    @hypothesis.given(st.lists(text, min_size=1, max_size=5))
    @hypothesis.settings(max_examples=200, deadline=None, database=None)
    def check(texts):
        same(tokenizer, texts)
        for text in texts:
            assert tokenizer.decode_bytes(tokenizer.encode(text)) == bpe.bytes_of(text)

    check()


# -- the table of words, and merging


def test_words_that_end_in_nul_bytes_are_not_their_beginnings(tokenizer):
    texts = ["!", "!\0", "!\0\0", "!" * 7 + "\0", "!" * 8, "!" * 8 + "\0", "!" * 16, "!" * 16 + "\0", "!" * 17 + "\0"]
    same(tokenizer, texts * 2)
    text = " ".join(texts * 3)
    assert counted(text) == bpe.count_pretokens([text])


def test_words_of_every_length_are_found_again(tokenizer):
    rng = random.Random(3)
    texts = ["".join(rng.choices("abLily ' the", k=n)).replace(" ", "x") for n in [*range(1, 80), 255, 256, 257, 300]]
    same(tokenizer, [" ".join(texts * 2), " ".join(word[:-1] + "!" for word in texts * 2)])


@pytest.mark.parametrize("n", [words.SHORT - 1, words.SHORT, words.SHORT + 1, 3000])
def test_both_ways_to_merge_give_the_ids_of_the_specification(tokenizer, n):
    rng = random.Random(n)
    texts = ["".join(rng.choices(letters, k=n)) for letters in ("a", "al", "litle", "the bal".replace(" ", ""))]
    texts += [(word * n)[:n] for word in ("little", "littlelily", "l")]
    assert by_kernels(tokenizer, texts) == [by_python(tokenizer, word) for word in texts]
    pairs = [(b"a", b"a"), (b"aa", b"aa"), (b"b", b"a"), (b"aaaa", b"b"), (b"a", b"b"), (b"aa", b"a")]
    other = bpe.Tokenizer.from_merges(pairs)
    texts = ["".join(rng.choices("aaab", k=n)) for _ in range(20)]
    assert by_kernels(other, texts) == [by_python(other, word) for word in texts]


def test_a_table_that_is_full_begins_again_and_changes_nothing(tokenizer):
    rng = random.Random(4)
    text = " ".join("".join(rng.choices("abcdefghij", k=rng.randint(4, 30))) for _ in range(60_000))
    encoder = words.Encoder(tokenizer._byte_ids, tokenizer._ranks, tokenizer.dtype)
    ids = np.concatenate([encoder.encode(batch) for batch in words.batches([(text.encode(), -1)])])
    assert ids.tolist() == by_python(tokenizer, text)
    assert len(encoder.idle) == 1 and encoder.idle[0][2][words.ROWS] < 44_000
    assert counted(text) == bpe.count_pretokens([text])  # here the table grows


def test_megabytes_without_a_space_are_one_word(tokenizer):
    for size in (1 << 19, 1 << 21):
        word = ("littlelily" * (size // 10 + 1))[:size]
        ids = tokenizer.encode_array(word * (1 + (size < bpe.LONG)))
        assert tokenizer.decode_bytes(ids).startswith(word.encode())
    found = train_compiled("x" * 3_000_000, 50)
    assert found[:2] == [(b"x", b"x"), (b"xx", b"xx")] and 20 < len(found) < 50


def test_the_pairs_are_found_at_their_places():
    rng = random.Random(5)
    pairs = [(rng.randrange(1 << 31), rng.randrange(1 << 31)) for _ in range(5000)]
    ranks = {pair: (rank, rng.randrange(1 << 31)) for rank, pair in enumerate(pairs)}
    table = words.pair_table(ranks)
    with np.errstate(over="ignore"):
        for pair in rng.sample(pairs, 300):
            assert int(words.find_pair(table, *pair)) == ranks[pair][0] << 32 | ranks[pair][1]
            assert words.find_pair(table, pair[1], pair[0]) == words.NONE
    assert (words.pair_table({}) == words.NONE).all()


# -- long texts


@pytest.fixture(scope="module")
def long_text():
    rng = random.Random(6)
    return "".join(rng.choices([*STORIES, *PIECES, END, "\n", " "], k=125_000))


def test_a_long_text_is_encoded_the_same_by_any_number_of_threads(tokenizer, long_text):
    more = with_specials(tokenizer, "<a>", "<a><b>", " lead", "\u00e9\u65e5")
    assert len(long_text) > bpe.LONG
    for allowed in ((), {END}, "all"):
        want = by_python(more, long_text, allowed)
        assert more.encode(long_text, allowed) == want
        for threads in (1, 2, 3):
            ids = more.encode_array(long_text.encode(), allowed, threads=threads)
            assert ids.dtype == np.uint16 and ids.tolist() == want
    assert more.encode_array("").tolist() == [] and more.encode_array(b"a").tolist() == [ord("a")]


def test_where_a_text_is_cut_changes_nothing(tokenizer, long_text):
    text = long_text[:40_000].encode()
    want = by_python(tokenizer, text)
    encode = tokenizer.compiled(bpe.LONG).encode
    for size in (1, 2, 3, 7, 50, 1000):
        cut = list(words.batches([(text, -1)], size))
        assert b"".join(part for batch in cut for part, _ in batch.segments) == text
        assert np.concatenate([encode(batch) for batch in cut]).tolist() == want


def test_a_cut_inside_a_run_of_white_space_would_change_the_pretokens():
    """Negative control: not every place is one to cut at."""
    assert bpe.count_pretokens(["a   b"]) != bpe.count_pretokens(["a ", "  b"])
    assert bpe.count_pretokens(["a   b"]) == bpe.count_pretokens(["a", "   b"])
    places = bpe.regex.finditer(bpe.CUT, "a  b\n\nc d\u00e9 e\u3000\tf\xa0")
    assert [place.start() for place in places] == [1, 4, 7, 10, 12, 15]


@pytest.mark.parametrize("around", ["\u65e5", "b!7\u00e9"])
def test_a_text_is_cut_before_any_white_space_that_follows_something_else_and_nowhere_else(around):
    """In UTF-8 at the places where the str is cut; the pre-tokens of the parts are those of the whole."""
    text = "".join(f"{a}{w}{a}{w}{v}" for a in around for w in WHITE for v in WHITE)
    places = [place.start() for place in bpe.regex.finditer(bpe.CUT, text)]
    assert len(places) > 500 * len(around)
    cut = [place.start() for place in bpe.CUT_BYTES.finditer(text.encode())]
    assert cut == [len(text[:place].encode()) for place in places]
    parts = [text[i:j] for i, j in zip([0, *places], [*places, None])]
    assert [word for part in parts for word in bpe.SPLIT.findall(part)] == bpe.SPLIT.findall(text)


def chinese(size, blank, seed=8):
    """Some bytes of random words of 2 to 30 characters, with this and full stops between them."""
    rng = random.Random(seed)
    words = ("".join(map(chr, rng.choices(range(0x4E00, 0xA000), k=rng.randint(2, 30)))) for _ in range(size // 49))
    return "".join(word + rng.choice([blank, blank, "\u3002" + blank]) for word in words)


@pytest.mark.parametrize("blank", [" ", "\u3002"])  # with white space and without any
def test_training_takes_at_most_25_bytes_of_memory_for_a_byte_of_distinct_words(blank):
    text = chinese(6_000_000, blank).encode()
    train_compiled(text, 3)  # compiles
    tracemalloc.start()
    try:
        train_compiled(text, 300)
        assert tracemalloc.get_traced_memory()[1] < 25 * len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [chinese(30_000, " "), "the little cat and the aaaa aaab aaa " * 50])
def test_more_bytes_of_words_than_int32_counts_give_the_same_merges(text, monkeypatch):
    narrow = train_compiled(text, 150)
    monkeypatch.setattr("fast.merges.NARROW", 20)
    assert train_compiled(text, 150) == narrow == bpe.train_spec([text], 150)


@pytest.mark.parametrize("text", ["x" * 1000, "\u65e5\u3002" * 300])
def test_a_text_too_long_for_the_encoder_and_without_a_place_to_cut_it_is_refused(tokenizer, text, monkeypatch):
    assert by_kernels(tokenizer, [text + " " + text])
    monkeypatch.setattr(words, "ENCODED", 900)
    with pytest.raises(ValueError, match=f"{len(text.encode())} bytes without white space; expected at most 900"):
        by_kernels(tokenizer, [text])


def test_specials_in_a_long_text_are_refused_with_their_place(tokenizer, long_text):
    text = "\u65e5" + STORIES[3] * 30_000 + END
    for data in (text, text.encode()):
        with pytest.raises(
            ValueError, match=rf"special token <\|endoftext\|> at position {len(text) - len(END)}; name"
        ):
            tokenizer.encode_array(data, disallowed_special="all")
    with pytest.raises(ValueError, match=r"U\+D800 at position 2000000"):
        tokenizer.encode_array("a" * 2_000_000 + "\ud800")


def test_documents_of_a_large_file_become_the_same_token_file(tokenizer, long_text, tmp_path):
    path = tmp_path / "s.txt"
    path.write_text(long_text.replace("\0", ""), encoding="utf-8", newline="")
    info = [
        bpe.write_tokens(texts, tokenizer, tmp_path / f"{i}.bin", threads=threads)
        for i, (texts, threads) in enumerate(
            [(documents(path), 1), (documents(path), 2), (bpe.pieces(path), 2), (bpe.pieces(path), None)]
        )
    ]
    assert info[0] == info[1] == info[2] == info[3]
    want = [i for story in documents(path) for i in [*by_python(tokenizer, story), tokenizer.end]]
    for i in range(4):
        assert np.fromfile(tmp_path / f"{i}.bin", "<u2").tolist() == want
    assert bpe.train(bpe.pieces(path), 100) == bpe.train(documents(path), 100)


# -- files larger than memory, interruptions, the first call

PEAK = """
import sys, bpe
tokenizer = bpe.Tokenizer.load("tokenizer.json")
for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")
    assert len(bpe.train(bpe.pieces(path), 500)) == 500
    bpe.write_tokens(bpe.pieces(path), tokenizer, "out.bin")
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)
"""


def python(folder, *args, **env):
    """A new interpreter that finds bpe."""
    env = {**os.environ, "PYTHONPATH": str(Path(bpe.__file__).parent), **env}
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("end", ["", END])
def test_memory_does_not_grow_with_the_file(tokenizer, tmp_path, end):
    tokenizer.save(tmp_path / "tokenizer.json")
    texts = ["".join(random.Random(i).choices("etaoinshrdlu", k=2 + i % 7)) for i in range(3000)]
    block = " ".join(random.Random(7).choices(texts, k=150_000)) + "\n" + end
    for name, copies in (("small.txt", 12), ("large.txt", 60)):
        with open(tmp_path / name, "w", encoding="utf-8") as file:
            file.writelines([block] * copies)
    grown = ((tmp_path / "large.txt").stat().st_size - (tmp_path / "small.txt").stat().st_size) / 2**20
    process = python(tmp_path, "-c", PEAK, "small.txt", "small.txt", "large.txt")
    out, err = process.communicate(timeout=120)
    assert not err, err
    _, small, large = map(float, out.split())
    assert grown > 30 and large - small < 0.6 * grown, (small, large)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_encoding_leaves_no_token_file_that_looks_whole(tokenizer, tmp_path, number):
    tokenizer.save(tmp_path / "tokenizer.json")
    with open(tmp_path / "s.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{i} {STORIES[i % 4]}{END}" for i in range(400_000))
    process = python(tmp_path, bpe.__file__, "encode", "s.txt", "--tokenizer", "tokenizer.json", "--out", "t.bin")
    until = time.monotonic() + 60
    while not list(tmp_path.glob("t.bin.*.tmp")):  # the file under way
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert not (tmp_path / "t.bin").exists() and not (tmp_path / "t.bin.json").exists()
    if number == signal.SIGINT:
        assert (process.returncode, err) == (130, "bpe.py: interrupted\n")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s.txt", "tokenizer.json"]
    with pytest.raises(FileNotFoundError):
        bpe.read_tokens(tmp_path / "t.bin", tokenizer)


def test_a_short_text_is_encoded_without_numba(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    code = "import sys, bpe; bpe.Tokenizer.load('tokenizer.json').encode('Once upon a time ' * 1000)"
    process = python(
        tmp_path, "-c", code + "; assert 'numba' not in sys.modules", NUMBA_CACHE_DIR=str(tmp_path / "none")
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err and not (tmp_path / "none").exists()


def test_many_texts_that_are_not_short_load_the_kernels_too(tokenizer):
    other = bpe.Tokenizer.from_json(tokenizer.to_json())
    text = STORIES[0] * 1000
    want = other.encode("ball " * 100) + other.encode(text)
    for _ in range(bpe.LONG // len(text)):
        assert other._encoder is None
        other.encode(text)
    assert other.encode("ball " * 100) + other.encode(text) == want and other._encoder is not None
