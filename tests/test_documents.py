"""extras/documents.py: stories in JSON lines and arrays; compressed files, which are refused."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import subprocess
import tarfile
import zipfile

import pytest
from helpers import run_main, write

import bpe
from extras.documents import documents

END = bpe.END

# -- JSON

ARRAY = [{"story": " One.", "source": "GPT-4"}, {"text": "Two \u00e9."}, "Three.", {"story": f"Four.{END}Five."}]
STORIES_OF_ARRAY = ["One.", "Two \u00e9.", "Three.", "Four.", "Five."]
OBJECTS = [value for value in ARRAY if isinstance(value, dict)]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_as_its_stories(bom, indent, tmp_path):
    path = write(tmp_path / "data00.json", bom + json.dumps(ARRAY, indent=indent))
    assert list(documents(path)) == STORIES_OF_ARRAY
    assert list(documents(write(tmp_path / "s.JSON", bom + json.dumps(ARRAY[::-1], ensure_ascii=False))))[0] == "Four."


@pytest.mark.parametrize("name", ["stories.txt", "stories", "stories.jsonl"])
def test_an_array_of_objects_is_known_by_its_content(name, tmp_path):
    want = ["One.", "Two \u00e9.", "Four.", "Five."]
    for bom, indent in (("", None), ("\ufeff", 4)):
        path = write(tmp_path / name, f"{bom}\n {json.dumps(OBJECTS, indent=indent)}")
        assert list(documents(path)) == want


@pytest.mark.parametrize("name", ["stories.txt", "stories.json", "stories.jsonl"])
def test_json_lines_are_known_by_their_content_and_take_text_or_story(name, tmp_path):
    lines = "".join(json.dumps(value) + "\n" for value in OBJECTS)
    for bom in ("", "\ufeff"):
        assert list(documents(write(tmp_path / name, bom + lines))) == [
            "One.",
            "Two \u00e9.",
            "Four.",
            "Five.",
        ]
    both = write(tmp_path / "both.jsonl", '{"story": "no", "text": "yes"}\n"a string"\n')
    assert list(documents(both)) == ["yes", "a string"]


@pytest.mark.parametrize(
    "text", ['[Lily] {smiled} and said: "Hi."', '["No," he said]', '{Once} "upon": a time', "[1]", "{}"]
)
def test_text_with_brackets_is_text(text, tmp_path):
    assert list(documents(write(tmp_path / "s.txt", text))) == [text]


BAD_JSON = [
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "a.jsonl, line 2: expected"),
    ("a.jsonl", b'{"title": "a"}', "line 1"),
    ("a.jsonl", b'\n["text"]', "line 2"),
    ("a.jsonl", b'{"text": 5}', "line 1"),
    ("a.jsonl", b'{"text": "\\ud800"}', "line 1"),
    ("a.jsonl", b'{"text": "\xff"}', "not text"),
    ("a.jsonl", b"\n\n", "is empty"),
    ("a.json", '[{"story": "a"}, {"title": "b"}]', r"item 2: expected .*\"story\".*, got .*title"),
    ("a.json", '[{"story": "a"}, 5]', "item 2: expected"),
    ("a.json", '[["a"]]', "item 1: expected"),
    ("a.json", '[{"story": "\\ud800"}]', "item 1: expected"),
    ("a.json", '[{"story": "a"}, {"story": "b"', "begins like a JSON array but is none"),
    ("a.json", '[{"story": "a"}]\n[{"story": "b"}]', "begins like a JSON array but is none: Extra data"),
    ("a.json", "[" * 100_000, "begins like a JSON array but is none"),
    ("a.json", "[]", "is empty"),
    ("a.json", "", "is empty"),
    ("a.json", '{"model": {\n "type": "BPE"}}', "line 1: expected"),
    ("a.json", "Once upon a time", "line 1: expected"),
    ("a.json", b'[{"story": "caf\xe9"}]', "is not text: byte 0xe9"),
    ("a.jsonl", '{"text": "a"}\n["b"]\n', r"line 2: expected .*, got '\[\"b\"\]'"),
    ("a.jsonl", '["a", "b"]', "line 1: expected"),
    ("a.txt", '[{"title": "a"}]', "item 1: expected"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_JSON)
def test_json_that_holds_no_stories_is_refused_in_one_line(name, data, message, tmp_path, capsys):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=message) as error:
        list(documents(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert run_main(["train", str(path), "--vocab-size", "265", "--out", str(tmp_path / "t.json")]) == 2
    assert capsys.readouterr().err == f"bpe.py: error: {error.value}\n"


def test_an_array_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", json.dumps(ARRAY))
    monkeypatch.setattr("extras.documents.JSON_MOST", path.stat().st_size - 1)
    with pytest.raises(ValueError, match="above .*; write it as .jsonl"):
        list(documents(path))


def test_a_folder_stands_for_its_texts_and_its_arrays_of_stories(tmp_path):
    write(tmp_path / "data01.json", json.dumps(OBJECTS))
    write(tmp_path / "data00.json", "\ufeff\n" + json.dumps(["Zero."]))
    write(tmp_path / "tokenizer.json", '{"model": {}}')
    write(tmp_path / "x.bin.json", "")
    write(tmp_path / "stories.tar.gz", gzip.compress(b"Once upon a time."))
    assert [path.name for path in bpe.text_files(tmp_path)] == ["data00.json", "data01.json"]
    write(tmp_path / "more.txt", "More.")
    assert list(documents(tmp_path)) == ["Zero.", "One.", "Two \u00e9.", "Four.", "Five.", "More."]


# -- compressed files

PLAIN = "Once upon a time.\n"


def packed(suffix):
    """A text as a file of this kind; a few bytes of it where no module writes them."""
    if suffix in (".tar", ".zip"):
        file = io.BytesIO()
        if suffix == ".zip":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("s.txt", PLAIN)
        else:
            with tarfile.open(fileobj=file, mode="w") as archive:
                archive.addfile(tarfile.TarInfo("s.txt"))
        return file.getvalue()
    write = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix)
    head = {".zst": b"\x28\xb5\x2f\xfd\x20\x12", ".parquet": b"PAR1\x15\x04\x15"}
    return write(PLAIN.encode()) if write else head[suffix] + PLAIN.encode()


COMMANDS = {
    ".gz": "gunzip -c {path} > {out}",
    ".bz2": "bunzip2 -c {path} > {out}",
    ".xz": "xz -dc {path} > {out}",
    ".zst": "zstd -dc {path} > {out}",
    ".zip": "unzip {path}",
    ".tar": "tar -xf {path}",
    ".parquet": "read_parquet(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)\" {path} {out}.jsonl",
}


@pytest.mark.parametrize("suffix", COMMANDS)
def test_a_compressed_file_is_refused_with_the_command_that_unpacks_it(suffix, tmp_path, capsys):
    by_name = write(tmp_path / f"stories.txt{suffix.upper()}", PLAIN)
    by_content = write(tmp_path / "stories.txt", packed(suffix))
    for path, out in [(by_name, str(by_content)), (by_content, f"{by_content}" + ".txt" * (suffix != ".parquet"))]:
        assert run_main(["train", str(path), "--vocab-size", "265", "--out", str(tmp_path / "t.json")]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"bpe.py: error: {path} is not text but {suffix} data; unpack it first: ")
        assert err.endswith(COMMANDS[suffix].format(path=path, out=out) + "\n") and err.count("\n") == 1


@pytest.mark.skipif(not shutil.which("gunzip"), reason="needs gunzip")
@pytest.mark.parametrize("name", ["my stories.txt.gz", "stories"])
def test_the_command_for_a_gz_file_does_what_it_says(name, tmp_path):
    path = write(tmp_path / name, packed(".gz"))
    with pytest.raises(ValueError) as error:
        list(documents(path))
    subprocess.run(str(error.value).split("unpack it first: ")[1], shell=True, check=True)
    (made,) = set(tmp_path.iterdir()) - {path}
    assert made.suffix == ".txt" and list(documents(made)) == [PLAIN.strip()]


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar.bz2"])
def test_a_compressed_archive_is_unpacked_by_one_command(name, tmp_path):
    path = write(tmp_path / name, packed(".gz"))
    with pytest.raises(ValueError, match=f"tar -xf {path}$"):
        list(documents(path))


@pytest.mark.parametrize("suffix", [".gz", ".parquet"])
def test_a_folder_of_compressed_files_is_refused_with_the_command_for_the_first(suffix, tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}{suffix}", packed(suffix))
    write(tmp_path / "tokenizer.json", "{}")
    with pytest.raises(ValueError, match=f"a{suffix} is not text but {suffix} data; unpack it first"):
        list(bpe.text_files(tmp_path))
