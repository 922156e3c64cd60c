"""Checkpoint files: what is written is read back byte for byte, and what is no checkpoint is refused by name."""

import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import random_parameters, tiny_config

import tinygpt
from tinygpt import load_checkpoint, read_safetensors, save_checkpoint, write_aside, write_safetensors

CFG = tiny_config()
TOKENIZER = json.dumps({"model": "caf\u00e9 \U0001f600", "merges": [["a", "b"]]}, ensure_ascii=False)


def save(path, dtype=np.float32, **more):
    flat, _ = random_parameters(CFG, dtype=dtype)
    save_checkpoint(path, flat, CFG, TOKENIZER, **more)
    return flat


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_checkpoint_comes_back_byte_for_byte(dtype, path):
    moments = np.arange(7, dtype=dtype)
    flat = save(path, dtype, extra={"moments": moments, "one": np.ones((1, 2), dtype)}, metadata={"step": "400"})
    found = load_checkpoint(path)
    assert found.parameters.dtype == dtype and found.parameters.tobytes() == flat.tobytes()
    assert found.cfg == CFG and found.tokenizer == TOKENIZER and found.metadata["step"] == "400"
    assert set(found.extra) == {"moments", "one"}
    assert found.extra["moments"].tobytes() == moments.tobytes() and found.extra["one"].shape == (1, 2)


def test_a_file_keeps_infinities_nans_and_signs_of_zeros(path):
    flat, _ = random_parameters(CFG, dtype=np.float32)
    flat[:4] = np.inf, -np.inf, np.nan, -0.0
    save_checkpoint(path, flat, CFG, TOKENIZER)
    assert b"".join(x.tobytes() for x in read_safetensors(path)[0].values()) == flat.tobytes()


def test_saving_what_was_loaded_writes_the_same_file(path, tmp_path):
    save(path, extra={"moments": np.ones(3)}, metadata={"step": "1"})
    found = load_checkpoint(path)
    again = tmp_path / "again.safetensors"
    save_checkpoint(again, found.parameters, found.cfg, found.tokenizer, found.extra, {"step": "1"})
    assert again.read_bytes() == path.read_bytes()


def test_loaded_parameters_can_be_trained_on(path):
    save(path)
    parameters = load_checkpoint(path).parameters
    parameters += 1  # their own memory, not the file's


def test_the_safetensors_library_reads_a_checkpoint(path):
    safetensors = pytest.importorskip("safetensors")
    flat = save(path, metadata={"step": "400"})
    with safetensors.safe_open(path, "numpy") as f:
        assert f.metadata()["step"] == "400" and f.metadata()["tokenizer"] == TOKENIZER
        assert set(f.keys()) == {t.name for t in tinygpt.layout(CFG)}
        for t in tinygpt.layout(CFG):
            x = f.get_tensor(t.name)
            assert x.shape == t.shape
            assert x.tobytes() == flat[t.offset : t.offset + x.size].tobytes()


def test_a_file_of_the_safetensors_library_is_read(path):
    library = pytest.importorskip("safetensors.numpy")
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(5), "c": np.float32([[[4]]])}
    library.save_file(tensors, path, {"format": "np"})
    found, metadata = read_safetensors(path)
    assert metadata == {"format": "np"} and set(found) == set(tensors)
    assert all(np.array_equal(found[name], x) and found[name].dtype == x.dtype for name, x in tensors.items())


def test_the_header_ends_where_tensors_can_be_mapped(path):
    save(path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0


# -- files that are no checkpoints


def refused(path, read=load_checkpoint):
    """The message of the ValueError, which names the file; nothing larger than the file was allocated on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * path.stat().st_size + 1_000_000
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_file_cut_short_anywhere_is_refused(path):
    save(path)
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    lengths = {0, 1, 7, 8, 9, start - 1, start, start + 1, start + 4, len(whole) - 4, len(whole) - 1}
    lengths |= {int(n) for n in np.linspace(0, len(whole) - 1, 40)}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole + b"\0")
    assert f"its tensors end at byte {len(whole)}, the file at {len(whole) + 1}" in refused(path)


def test_a_damaged_header_is_refused_or_changes_only_what_is_free_text(path):
    save(path)
    whole = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in {*range(8), *range(8, start, 7)}:
        for flip in (0xFF, 0x80, 0x01):
            damaged = whole.copy()
            damaged[at] ^= flip
            path.write_bytes(damaged)
            try:
                found = load_checkpoint(path)
            except ValueError as error:
                assert str(path) in str(error), (at, flip)
            else:  # a letter of the tokenizer, of a name in the metadata, or a number of the configuration
                assert found.parameters.size == tinygpt.count_parameters(found.cfg)[0]


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_of_the_tensors_that_is_damaged_is_named(path, stride):
    save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    with open(path, "r+b", buffering=0) as f:
        for at in range(start, len(whole), stride):
            f.seek(at)
            f.write(bytes([whole[at] ^ 1 << int(rng.integers(8))]))
            with pytest.raises(ValueError, match="it is damaged: its checksum is"):
                read_safetensors(path)
            f.seek(at)
            f.write(whole[at : at + 1])
    read_safetensors(path)


def test_a_file_without_a_checksum_is_read_as_those_of_other_writers_are(path):
    flat = save(path)
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:start])
    assert len(header["__metadata__"].pop("crc32")) == 8
    write_header(path, header, whole[start:])
    assert load_checkpoint(path).parameters.tobytes() == flat.tobytes()


@pytest.mark.parametrize("claim", [2**63, 2**64 - 1, 2**40, 5])
def test_a_header_that_claims_another_length_is_refused(claim, path):
    save(path)
    path.write_bytes(struct.pack("<Q", claim) + path.read_bytes()[8:])
    refused(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"Once upon a time there was a little fox.\n" * 40,
        b"PK\x03\x04" + bytes(200),
        bytes(200),
        b"\xff" * 200,
    ],
    ids=["empty", "two bytes", "a text", "a zip", "zeros", "ones"],
)
def test_a_file_of_another_kind_is_refused(content, path):
    path.write_bytes(content)
    refused(path)


def write_header(path, header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def row(begin=0, end=16, dtype="F32", shape=(4,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS = {
    "not JSON": b"{'a': 1}",
    "not text": b"\xff\xfe\xfd\xfc",
    "a list": [],
    "a number": 5,
    "nested too deeply": b"[" * 100_000,
    "a row that is a number": {"a": 5},
    "a row without shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "another dtype": {"a": row(dtype="F16", shape=(8,))},
    "an unknown dtype": {"a": row(dtype="F33")},
    "a dtype that is a list": {"a": row(dtype=["F32"])},
    "a shape of another size": {"a": row(shape=(5,))},
    "a negative shape": {"a": row(shape=(-2, -2))},
    "a shape of fractions": {"a": row(shape=(4.0,))},
    "a shape that is a number": {"a": row(shape=4)},
    "a shape of terabytes": {"a": row(0, 4 * 2**44, shape=(2**22, 2**22))},
    "terabytes of which there are 16 bytes": {"a": row(shape=(2**22, 2**22))},
    "a huge shape of nothing": {"a": row(), "b": row(16, 16, shape=(10**30, 0))},
    "a shape of too many axes": {"a": row(shape=(4, *[1] * 100))},
    "a further field": {"a": row() | {"more": [[]]}},
    "overlapping": {"a": row(0, 16), "b": row(8, 16, shape=(2,))},
    "the same bytes twice": {"a": row(), "b": row()},
    "a gap": {"a": row(0, 4, shape=(1,)), "b": row(8, 16, shape=(2,))},
    "a gap before the first": {"a": row(4, 16, shape=(3,))},
    "a negative offset": {"a": row(-16, 0)},
    "ends before it begins": {"a": row(16, 0)},
    "past the end": {"a": row(0, 32, shape=(8,))},
    "bytes left over": {"a": row(0, 8, shape=(2,))},
    "no tensors but bytes": {},
    "one offset": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 32]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [4], "data_offsets": []}},
    "offsets that are text": {"a": row("0", "16")},
    "offsets that are null": {"a": row(None, None)},
    "offsets that are fractions": {"a": row(0.0, 16.0)},
    "offsets of two kinds": {"a": row("0", "16"), "b": row()},
    "offsets that are not numbers": b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [NaN, NaN]}}',
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_header_that_does_not_fit_is_refused(header, path):
    write_header(path, header)
    refused(path, read_safetensors)
    refused(path)


def with_metadata(**changes):
    def change(header):
        header["__metadata__"].update(changes)

    return change


BAD_MODELS = {
    "no metadata": lambda header: header.pop("__metadata__"),
    "metadata that is a list": lambda header: header.update(__metadata__=["format"]),
    "metadata that is a text": lambda header: header.update(__metadata__="tinygpt"),
    "metadata that is null": lambda header: header.update(__metadata__=None),
    "another format": with_metadata(format="pt"),
    "a later version": with_metadata(version="2"),
    "no configuration": lambda header: header["__metadata__"].pop("config"),
    "no tokenizer": lambda header: header["__metadata__"].pop("tokenizer"),
    "a tokenizer that is no text": with_metadata(tokenizer=5),
    "a configuration that is not JSON": with_metadata(config="{"),
    "a configuration that is a list": with_metadata(config="[1]"),
    "a configuration that is a number": with_metadata(config=5),
    "an empty configuration": with_metadata(config="{}"),
    "a configuration with an unknown field": with_metadata(config='{"colour": 1}'),
    "a configuration of the wrong types": with_metadata(
        config='{"vocab_size": "a", "seq_len": 5, "width": null, "layers": 2, "heads": 3}'
    ),
    "a configuration that does not divide": with_metadata(
        config='{"vocab_size": 11, "seq_len": 5, "width": 12, "layers": 2, "heads": 5}'
    ),
    "a configuration of terabytes": with_metadata(
        config='{"vocab_size": 2000000000, "seq_len": 5, "width": 2000000000, "layers": 2, "heads": 2}'
    ),
    "a configuration with endless layers": with_metadata(
        config='{"vocab_size": 11, "seq_len": 5, "width": 12, "layers": 2000000000, "heads": 3}'
    ),
    "a configuration nested too deeply": with_metadata(config="[" * 100_000),
    "a configuration whose divisor takes for ever": with_metadata(
        config='{"vocab_size": 11, "seq_len": 5, "width": 1000000000000037, "layers": 2, "heads": 3}'
    ),
    "tensors of two kinds": lambda header: header["norm_b"].update(dtype="F64", shape=[6]),
    "a tensor under another name": lambda header: header.update(embed=header.pop("embed_w")),
    "a tensor of another shape": lambda header: header["embed_w"].update(shape=[12, 11]),
}


@pytest.mark.parametrize("change", BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_file_that_does_not_describe_a_model_is_refused(change, path):
    save(path)
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:start])
    header["__metadata__"].pop("crc32")  # what is changed is refused for that alone
    change(header)
    write_header(path, header, whole[start:])
    assert "checksum" not in refused(path)


def test_a_tensor_that_is_missing_is_named(path):
    save(path)
    tensors, metadata = read_safetensors(path)
    del tensors["qkv_w"]
    write_safetensors(path, tensors, metadata)
    message = refused(path)
    assert "qkv_w is missing" in message and "(2, 12, 36)" in message


def test_a_version_that_is_not_known_is_told_with_the_one_that_is(path):
    save(path, metadata={"version": "7"})
    message = refused(path)
    assert "version 7" in message and f"version {tinygpt.FORMAT_VERSION}" in message and "update" in message


def test_a_file_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["moment1", "moment2"])
def test_a_moment_that_is_not_finite_is_refused_by_its_name(tmp_path, name, value):
    cfg = tiny_config()
    flat = tinygpt.init_parameters(cfg, 0)
    moments = {"moment1": np.zeros_like(flat), "moment2": np.zeros_like(flat)}
    moments[name][-1] = value
    save_checkpoint(tmp_path / "model", flat, cfg, "", moments)
    with pytest.raises(ValueError, match=f"model: tensor {name} holds NaN or infinity"):
        load_checkpoint(tmp_path / "model")


# -- writing


def test_a_write_that_fails_half_way_leaves_the_old_file(path):
    save(path)
    before = path.read_bytes()

    def chunks():
        yield b"the first half"
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_aside(path, chunks())
    assert path.read_bytes() == before
    write_aside(path, [b"a", b"", memoryview(b"b")])  # what the failure left behind is in nobody's way
    assert path.read_bytes() == b"ab"
    assert os.listdir(path.parent) == [path.name]


def test_a_rename_that_fails_leaves_the_old_file(path, monkeypatch):
    save(path)
    before = path.read_bytes()

    def fail(*_):
        raise PermissionError("in use")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError):
        save(path)
    assert path.read_bytes() == before


def test_saving_to_a_folder_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(OSError):
        save(tmp_path / "none" / "model.safetensors")


# -- files that several processes write


def test_two_writers_of_one_file_at_once_leave_the_whole_file_of_the_later_one(tmp_path):
    path = tmp_path / "x.json"

    def chunks():
        yield b"the first half, "
        write_aside(path, [b"all of another"])  # begins later, ends earlier
        assert path.read_bytes() == b"all of another"
        yield b"the second half"

    write_aside(path, chunks())
    assert path.read_bytes() == b"the first half, the second half" and os.listdir(tmp_path) == ["x.json"]


WRITE = """
import sys, tinygpt
def chunks(part):
    yield part
    print("half", flush=True)
    sys.stdin.read()
    yield part
tinygpt.write_aside(sys.argv[1], chunks(sys.argv[2].encode() * 10000))
"""


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    def half_way(word):
        words = [sys.executable, "-c", WRITE, tmp_path / "x[1].bin", word]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process = subprocess.Popen(words, cwd=Path(tinygpt.__file__).parent, **pipes)
        assert process.stdout.readline() == b"half\n"
        return process

    (tmp_path / "x[1].bin.bak.tmp-not").write_bytes(b"of somebody else")
    with half_way("killed") as killed, half_way("living") as living:
        assert len(list(tmp_path.glob("*.tmp"))) == 2
        killed.kill()
        killed.wait()
        write_aside(tmp_path / "x[1].bin", [b"new"])
        assert len(list(tmp_path.glob("*.tmp"))) == 2  # the killed one might as well be slow
        (left,) = tmp_path.glob(f"*.{killed.pid}-*.tmp")
        os.utime(left, times=(0, time.time() - 3601))
        write_aside(tmp_path / "x[1].bin", [b"new"])
        assert len(list(tmp_path.glob("*.tmp"))) == 1 and not left.exists()
        living.communicate()
        assert living.returncode == 0
    assert (tmp_path / "x[1].bin").read_bytes() == b"living" * 20000
    assert sorted(os.listdir(tmp_path)) == ["x[1].bin", "x[1].bin.bak.tmp-not"]


def test_many_processes_may_write_one_file_again_and_again(tmp_path):
    code = "import tinygpt, sys; [tinygpt.write_aside(sys.argv[1], [b'abc' * 9999, b'd']) for _ in range(150)]"
    words = [sys.executable, "-c", code, tmp_path / "x.bin"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    writers = [subprocess.Popen(words, cwd=Path(tinygpt.__file__).parent, **pipes) for _ in range(4)]
    assert [(writer.communicate()[0], writer.returncode) for writer in writers] == [(b"", 0)] * 4
    assert (tmp_path / "x.bin").read_bytes() == b"abc" * 9999 + b"d" and os.listdir(tmp_path) == ["x.bin"]


def test_an_error_of_writing_names_the_file_and_not_the_one_aside(tmp_path):
    with pytest.raises(OSError) as error:
        write_aside(tmp_path / "none" / "x.bin", [b""])
    assert error.value.filename == str(tmp_path / "none" / "x.bin")


# == what is written to is a link or a device ==========================================================================


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_is_written_through(tmp_path, there):
    target, link = tmp_path / "target", tmp_path / "folder" / "link"
    link.parent.mkdir()
    if there:
        target.write_bytes(b"before")
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("this system makes no symbolic links here")
    tinygpt.write_aside(link, [b"af", b"ter"])
    assert link.is_symlink() and target.read_bytes() == b"after"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "link", "target"]


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes with a name of their own")
def test_a_device_or_a_pipe_is_written_to_and_not_replaced(tmp_path):
    before = os.stat(os.devnull)
    tinygpt.write_aside(os.devnull, [b"nothing"])
    assert os.stat(os.devnull).st_rdev == before.st_rdev
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    tinygpt.write_aside(tmp_path / "pipe", [b"through"])
    assert os.read(reader, 99) == b"through"
    os.close(reader)
