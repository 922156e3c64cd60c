"""Thousands of damaged and hostile files: each loads or is refused in one line; nothing is allocated that it claims.

The mutations are drawn from a seed; a failure names the number of its own. `-m slow` draws ten times as many.
"""

import collections
import contextlib
import dataclasses
import json
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
from conftest import random_parameters, tiny_config
from test_checkpoints import llama2c_file

import bpe
import sample
import tinygpt
import train
from extras import recipes

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
        run = train.read_run(folder, log)
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
    for number in range(800 * many):
        path.write_bytes(data := rewritten(good, rng))
        try:
            for what, load in (("resume", lambda: go_on(tmp_path)), ("sample", lambda: sample.load_model(path))):
                counts[what, "refused" if outcome(load, len(data)) is None else "loaded"] += 1
        except Exception as error:
            shutil.copy(path, tmp_path / "failed.safetensors")
            raise AssertionError(f"mutation {number}, in {tmp_path}: {error!r}") from error
    assert min(counts.values()) > 10, counts
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
    assert min(counts.values()) > 10, counts
    print(dict(counts))


@pytest.mark.parametrize("many", MANY)
def test_a_damaged_model_of_llama2c_is_refused_in_one_line_or_loads(tmp_path, many):
    cfg = tinygpt.Config(**recipes.LLAMA, vocab_size=11, seq_len=5, width=12, layers=2, heads=6, kv_heads=3, hidden=7)
    path = tmp_path / "model.bin"
    llama2c_file(path, cfg, tinygpt.init_parameters(cfg, 0))
    good, rng, counts = path.read_bytes(), np.random.default_rng(4), collections.Counter()
    for _ in range(700 * many):
        path.write_bytes(data := damaged(good[:28], rng)[:28] + good[28:] if rng.random() < 0.5 else damaged(good, rng))
        found = outcome(lambda: tinygpt.load_checkpoint(path), len(data))
        counts["refused" if found is None else "loaded"] += 1
    assert min(counts.values()) > 10, counts
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
