"""Thousands of damaged and hostile files: each loads or is refused in one line; nothing is allocated that it claims.

The mutations are drawn from a seed; a failure names the number of its own. `-m slow` draws 10,000 for each reader.
"""

import collections
import contextlib
import dataclasses
import json
import shutil
import signal
import struct
import tracemalloc

import numpy as np
import pytest
from conftest import random_parameters, tiny_config
from helpers import CONFIGS, TOK512, llama2c_file, own_files, sentencepiece_file, transformers_files

import bpe
import sample
import tinygpt
import train
from extras import convert, formats, llama2c, recipes, report, resume

MANY = [1, pytest.param(10, marks=pytest.mark.slow)]
STORIES = ["Lily found a red ball.", "Tom and the cat saw the moon.", "The end came soon."] * 3
HOSTILE = [None, True, False, -1, 0, 1, 2, 0.5, 2**31, 2**48, 2**63, 2**64, 10**30, -(10**30), 1e308, -0.0]
HOSTILE += [float("inf"), float("nan"), "", "0", "-1", "9" * 5000, "\0", "\udc80", "\u20ac\n", "../..", [], {}, [[]]]
HOSTILE += [[0], [-1, 2**63], {"a": {}}, "[" * 100_000, "Infinity"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the token file, the checkpoints and the log of a run."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = bpe.Tokenizer.from_merges(bpe.train(STORIES, 12), 2)
    bpe.write_tokens(STORIES, tokenizer, folder / "t.bin")
    cfg = tiny_config(vocab_size=tokenizer.vocab_size)
    flat, _ = random_parameters(cfg, dtype=np.float32)
    s = train.Settings(steps=9, kernels="numpy", lr=1e-2, min_lr=1e-3, warmup_steps=1, eval_every=3, eval_tokens=20)
    files = [[str(folder / "t.bin")], [str(folder / "t.bin")]]
    s = dataclasses.replace(s, data="t", files=files, train_tokens=len(bpe.read_tokens(folder / "t.bin")[0]))
    settings = json.dumps(dataclasses.asdict(s))
    place = {"step": "4", "settings": settings, "best": "2.5", "log_bytes": "0", "evaluated": "3"}
    extra = {"moment1": flat * 2, "moment2": flat * flat}
    tinygpt.save_checkpoint(folder / "last.safetensors", flat, cfg, tokenizer.to_json(), extra, place)
    with open(folder / "log.jsonl", "w", encoding="utf-8"):
        pass
    return folder


def damaged(data, rng):
    """bytes -> bytes, changed at one place: a bit, a byte, a cut, something put in, left out, doubled or exchanged."""
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 64))
    if rng.random() < 0.5:  # where most is decided
        at = int(rng.integers(min(len(data), 4096)))
    part = data[at : at + size]
    return [
        lambda: data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :],
        lambda: data[:at] + rng.bytes(1) + data[at + 1 :],
        lambda: data[:at],
        lambda: data + rng.bytes(size),
        lambda: data[:at] + rng.bytes(size) + data[at:],
        lambda: data[:at] + data[at + size :],
        lambda: data[:at] + part + data[at:],
        lambda: data[:at] + rng.bytes(len(part)) + data[at + len(part) :],
        lambda: data[:at] + bytes(len(part)) + data[at + len(part) :],
        lambda: struct.pack("<Q", int(rng.integers(2**63)) >> int(rng.integers(63))) + data[8:],
    ][int(rng.integers(10))]()


def twisted(value, rng, depth=0):
    """A JSON value with another one somewhere within, also within the JSON of its strings."""
    nested = value
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.95:
        with contextlib.suppress(ValueError, RecursionError):  # a hostile string of before
            nested = json.loads(value)
    if not isinstance(nested, dict | list) or not nested or rng.random() < 0.1 * (depth > 0):
        return HOSTILE[int(rng.integers(len(HOSTILE)))]
    keys = list(nested) if isinstance(nested, dict) else list(range(len(nested)))
    key, what = keys[int(rng.integers(len(keys)))], rng.random()
    nested = nested.copy()
    if what < 0.1:
        del nested[key]
    elif what < 0.15 and isinstance(nested, dict):
        nested[f"{key}x"] = nested.pop(key)
    elif what < 0.2:
        nested[key] = nested[keys[int(rng.integers(len(keys)))]]
    else:
        nested[key] = twisted(nested[key], rng, depth + 1)
    return json.dumps(nested) if isinstance(value, str) else nested


def rewritten(data, rng):
    """A .safetensors file with another header, of the length that it says, and without a checksum."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header["__metadata__"].pop("crc32", None)
    for _ in range(int(rng.integers(1, 3))):
        if rng.random() < 0.7 and isinstance(header.get("__metadata__"), dict):
            header["__metadata__"] = twisted(header["__metadata__"], rng, 1)
        else:
            header = twisted(header, rng)
        if not isinstance(header, dict):
            break
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[start:]


def outcome(load, size):
    """What load() returns, or None where it is refused in one line, which is counted; nothing large is allocated."""
    tracemalloc.start()
    try:
        return load()
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * size + 2_000_000, (peak, size)


def go_on(folder):
    """What `python train.py --resume` does until it trains."""
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        run = resume.read_run(folder, log)
    assert run.state.m.shape == run.state.parameters.shape == (tinygpt.count_parameters(run.state.cfg)[0],)
    assert 0 <= run.data.train.max() < run.state.cfg.vocab_size
    return run


def contents(path):
    """All that a checkpoint says, as bytes."""
    c = tinygpt.load_checkpoint(path)
    return c.parameters.tobytes(), c.cfg, c.tokenizer, {name: x.tobytes() for name, x in c.extra.items()}, c.metadata


@pytest.mark.parametrize("many", MANY)
def test_a_damaged_checkpoint_is_refused_or_says_what_it_said(files, tmp_path, many):
    path, good = tmp_path / "last.safetensors", (files / "last.safetensors").read_bytes()
    expected, rng, counts = contents(files / "last.safetensors"), np.random.default_rng(1), collections.Counter()
    for number in range(1500 * many):
        path.write_bytes(data := damaged(good, rng))
        found = outcome(lambda: contents(path), len(data))
        if found and found != expected:  # only a name may have changed to one that means nothing: the checksum's
            assert "crc32" not in json.dumps(found[4]) and len(found[4]) == len(expected[4]) + 1, number
        counts["refused" if found is None else "unchanged"] += 1
    assert counts["refused"] > 0.8 * 1500 * many
    print(dict(counts))


@pytest.mark.parametrize("many", MANY)
def test_a_hostile_checkpoint_is_refused_in_one_line_or_can_be_gone_on_from(files, tmp_path, many):
    path, good = tmp_path / "last.safetensors", (files / "last.safetensors").read_bytes()
    (tmp_path / "log.jsonl").touch()
    rng, counts = np.random.default_rng(2), collections.Counter()
    assert outcome(lambda: go_on(files), len(good)) is not None
    for number in range(1000 * many):
        path.write_bytes(data := rewritten(good, rng))
        try:
            for what, load in (("resume", lambda: go_on(tmp_path)), ("sample", lambda: sample.load_model(path))):
                counts[what, "refused" if outcome(load, len(data)) is None else "loaded"] += 1
        except Exception as error:
            shutil.copy(path, tmp_path / "failed.safetensors")
            raise AssertionError(f"mutation {number}, in {tmp_path}: {error!r}") from error
    assert len(counts) > 1 and min(counts.values()) > 10, counts
    print(dict(counts))


@pytest.mark.parametrize("many", MANY)
def test_a_damaged_or_hostile_token_file_is_refused_in_one_line_or_gives_its_ids(files, tmp_path, many):
    tokenizer = bpe.Tokenizer.from_json(tinygpt.load_checkpoint(files / "last.safetensors").tokenizer)
    ids, says = (files / "t.bin").read_bytes(), (files / "t.bin.json").read_bytes()
    path, beside = tmp_path / "t.bin", tmp_path / "t.bin.json"
    rng, counts = np.random.default_rng(3), collections.Counter()
    for number in range(1000 * many):
        data, text = ids, says
        if number % 3 == 0:
            data = damaged(ids, rng)
        elif number % 3 == 1:
            text = damaged(says, rng)
        else:
            text = json.dumps(twisted(json.loads(says), rng)).encode()
        path.write_bytes(data), beside.write_bytes(text)
        found = outcome(lambda: bpe.read_tokens(path, tokenizer), len(data) + len(text))
        if found is not None:
            assert found[0].dtype in (np.uint16, np.uint32) and found[0].max() < tokenizer.vocab_size
            assert found[0].tobytes() == ids, number
        counts["refused" if found is None else "unchanged"] += 1
    assert len(counts) > 1 and min(counts.values()) > 10, counts
    print(dict(counts))


@pytest.mark.parametrize("many", MANY)
def test_a_damaged_model_of_llama2c_is_refused_in_one_line_or_loads(tmp_path, many):
    cfg = tinygpt.Config(**recipes.LLAMA, vocab_size=11, seq_len=5, width=12, layers=2, heads=6, kv_heads=3, hidden=7)
    path = tmp_path / "model.bin"
    llama2c_file(path, cfg, tinygpt.init_parameters(cfg, 0))
    good, rng, counts = path.read_bytes(), np.random.default_rng(4), collections.Counter()
    for _ in range(1000 * many):
        path.write_bytes(data := damaged(good[:28], rng)[:28] + good[28:] if rng.random() < 0.5 else damaged(good, rng))
        found = outcome(lambda: llama2c.load(path), len(data))
        counts["refused" if found is None else "loaded"] += 1
    assert len(counts) > 1 and min(counts.values()) > 10, counts
    print(dict(counts))


def test_a_header_that_claims_terabytes_of_a_file_with_holes_allocates_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    text = json.dumps({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    for claim in (len(text), 2**40 - 8):  # of its tensors, of its header
        with open(path, "wb") as f:
            f.write(struct.pack("<Q", claim) + text)
            try:
                f.truncate(2**40 + (0 if claim > 2**39 else 7))  # a byte of the last tensor is missing
            except OSError:
                pytest.skip("this file system has no files of that size")
        assert outcome(lambda: tinygpt.load_checkpoint(path), 0) is None
    path.unlink()


def test_a_width_without_end_is_refused_at_once(tmp_path, files):
    path = tmp_path / "model.safetensors"
    for name in ("width", "heads"):
        c = tinygpt.load_checkpoint(files / "last.safetensors")
        config = json.loads(c.metadata["config"]) | {"head_width": 0, name: 10**15 + 37}
        tinygpt.save_checkpoint(path, c.parameters, c.cfg, c.tokenizer, None, {"config": json.dumps(config)})
        with pytest.raises(ValueError, match=f"{name} is 1000000000000037; expected a positive int"):
            tinygpt.load_checkpoint(path)


def test_a_header_of_more_values_than_its_tensors_can_need_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "model.safetensors"
    row, quotes = b'{"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}', b'\\"' * 600_000
    for text in (
        b"[" + b"{}," * 2_000_000 + b"0]",
        b'{"a": [' + b'"",' * 2_000_000 + b"0]}",
        b'{"a": "' + quotes + b'", "b": [' + b"[]," * 2_000_000 + b"0]}",
    ):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        tracemalloc.start()
        with pytest.raises(ValueError, match="its header is not that of a .safetensors file"):
            tinygpt.read_safetensors(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(text) + 60_000_000, peak
    rows = b", ".join(b'"%d": ' % i + row % (4 * i, 4 * i + 4) for i in range(10_000))
    text = b'{"__metadata__": {"tokenizer": "' + quotes + b"[{," * 2_000_000 + b'"}, ' + rows + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(40_000))
    assert len(tinygpt.read_safetensors(path)[0]) == 10_000  # many tensors and a long text are no such header


# -- every reader of files


def recoded(data, rng):
    """Text as other programs write it: with a byte order mark, CRLF, in UTF-16."""
    if rng.random() < 0.2:
        return data.decode("utf-8", "replace").encode("utf-16")
    data = b"\xef\xbb\xbf" + data if rng.random() < 0.5 else data
    return data.replace(b"\n", b"\r\n") if rng.random() < 0.7 else data


def mutated(name, data, rng):
    """The content of a file, changed as its format lends itself to."""
    what = rng.random()
    if name.endswith(".safetensors") and what < 0.7:
        return rewritten(data, rng)
    if name.endswith((".json", ".jsonl")) and what < 0.7:
        lines = data.split(b"\n") if name.endswith(".jsonl") else [data]
        at = int(rng.integers(len(lines)))
        with contextlib.suppress(ValueError, RecursionError):
            lines[at] = json.dumps(twisted(json.loads(lines[at]), rng), ensure_ascii=False).encode("utf-8", "replace")
        return b"\n".join(lines)
    binary = name.endswith((".safetensors", ".bin", ".model"))
    return recoded(data, rng) if what > 0.9 and not binary else damaged(data, rng)


def use_tokenizer(path):
    """A tokenizer that loads gives any text that it encodes again."""
    tokenizer = bpe.Tokenizer.load(path)
    for text in (*STORIES[:3], f"a\u00e9 {bpe.END}\n  \u65e5"):
        for allowed in ((), "all"):
            with contextlib.suppress(ValueError):  # a byte that the vocabulary lacks
                ids = tokenizer.encode(text, allowed)
                assert tokenizer.decode(ids) == text and all(type(i) is int for i in ids)
    with contextlib.suppress(ValueError):
        assert bpe.Tokenizer.from_json(tokenizer.to_json()).hash == tokenizer.hash
    return tokenizer


def tokenizer_files():
    """{reader: {name: content}}, of all formats of tokenizers."""
    small = bpe.Tokenizer.from_merges(bpe.train(STORIES, 12), 0)
    vocab, merges = formats.to_vocab_and_merges(small)
    llama = bpe.Tokenizer.load(TOK512)
    return {
        "tokenizer.json": {"tokenizer.json": small.to_json().encode()},
        "tokenizer.json, spaced": {"tokenizer.json": llama.to_json().encode()},
        "vocab.json": {"vocab.json": vocab.encode(), "merges.txt": merges.encode()},
        "merges.txt": {"merges.txt": merges.encode(), "vocab.json": vocab.encode()},
        "rank file": {"x.tiktoken": formats.to_ranks(small)},
        "tokenizer.bin": {"tokenizer.bin": TOK512.read_bytes()},
        "tokenizer.model": {"tokenizer.model": sentencepiece_file(llama)},
    }


def read_transformers(path):
    tensors = convert.read_tensors([path.with_name("model.safetensors")])
    parameters, cfg = convert.from_transformers(convert.read_config(path), tensors)
    assert parameters.shape == (tinygpt.count_parameters(cfg)[0],) and np.isfinite(parameters).all()
    return cfg


def story_files():
    lines = [json.dumps(value) for value in ({"text": STORIES[0]}, "a\u00e9", {"story": STORIES[1], "id": 3})] * 2
    return {
        "stories.txt": {"s.txt": f"{bpe.END}\n".join(STORIES).encode()},
        "stories.jsonl": {"s.jsonl": "\n".join(lines).encode()},
        "stories.json": {"s.json": f"[{', '.join(lines)}]".encode()},
    }


def log_files():
    entries = [
        {"settings": dataclasses.asdict(train.Settings(files=[["t"], []])), "config": {"width": 8}, "command": "x"}
    ]
    for step in (1, 2, 3):
        entries.append(
            {"step": step, "loss": 3.5, "lr": 1e-3, "norm": 0.5, "tokens": 100 * step, "seconds": 0.5 * step}
        )
        entries.append({"step": step, "val_nats": 3.1, "val_bits_per_byte": 1.5, "stories": ["one", "two"]})
    entries.append({"step": 3, "final_val_nats": 3.0, "final_val_bits_per_byte": 1.4, "tokens": 300})
    return {"log.jsonl": {"log.jsonl": "\n".join(map(json.dumps, entries)).encode() + b"\n"}}


def settings_files():
    s = train.Settings(prompts=["a"], files=[["t.bin"], []], checksums={"t.bin": ["0" * 8, [1, 2, 3]]}, train_tokens=9)
    return {"settings": {"settings.json": json.dumps(dataclasses.asdict(s)).encode()}}


def read_settings(path):
    """As a checkpoint's metadata holds them: as text."""
    return resume.read_settings(path.read_text("utf-8"))


READERS = {
    **{name: (use_tokenizer, files) for name, files in tokenizer_files().items()},
    **{family: (read_transformers, transformers_files(family)) for family in CONFIGS},
    "class of ours": (read_transformers, own_files()),
    **{name: (lambda path: list(bpe.pieces(path)), files) for name, files in story_files().items()},
    **{name: (lambda path: report.page(report.read_logs([path])), files) for name, files in log_files().items()},
    **{name: (read_settings, files) for name, files in settings_files().items()},
}


@pytest.fixture
def no_hang():
    """Fail where a single input takes longer than seconds; nothing is watched where there are no such signals."""

    def stop(*_):
        raise AssertionError("an input took longer than 20 s")

    def watch(seconds):
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.signal(signal.SIGALRM, stop) if hasattr(signal, "SIGALRM") else None
    yield watch
    watch(0)
    if before is not None:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("many", [100, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_a_damaged_file_in_one_line_or_reads_it(reader, many, tmp_path, no_hang):
    (load, files), counts, rng = READERS[reader], collections.Counter(), np.random.default_rng(5)
    first = tmp_path / next(iter(files))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert load(first) is not None
    for number in range(many):
        name = list(files)[int(rng.integers(len(files)))]
        data = mutated(name, files[name], rng)
        (tmp_path / name).write_bytes(data)
        no_hang(20)
        try:
            found = outcome(lambda: load(first), len(data) + sum(map(len, files.values())))
        except Exception as error:
            raise AssertionError(f"mutation {number}, {name} in {tmp_path}: {error!r}") from error
        no_hang(0)
        counts["refused" if found is None else "loaded"] += 1
        (tmp_path / name).write_bytes(files[name])
    assert min(counts["refused"], counts["loaded"]) > 0 and counts.total() == many
    print(reader, dict(counts))
