"""Stories as whole documents; files of them in JSON lines and JSON arrays; compressed files, which are refused.

    python bpe.py train stories.jsonl --vocab-size 4096 --out tokenizer.json

bpe.py asks `reader_of` for each file that it reads. Section 1 reads JSON, 2 refuses compressed files with the command
that unpacks them, 3 joins the pieces in which bpe.py reads stories.
"""

import codecs
import contextlib
import json
import os
import shlex

from bpe import END, JSON_START, find_reader, pieces, utf8

# == 1  JSON: a story is a string, or an object with a field "text" or "story" =========================================

JSON_MOST = 1 << 30  # bytes of an array, which has to fit into memory several times


def files_in(folder):
    """The *.txt, *.jsonl and arrays in *.json of a folder, sorted; ValueError if it has none."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    kinds = {path: path.suffix.lower() for path in files}
    found = [
        p for p in files if kinds[p] in (".txt", ".jsonl") or (kinds[p] == ".json" and find_reader(p) is read_array)
    ]
    if not found:
        for path in files:
            find_reader(path)  # refuses a compressed file
        raise ValueError(f"{folder} is a folder without .txt or .jsonl files, or .json files that hold an array")
    return found


def reader_of(path, head):
    """The function that reads the stories of a file as pieces, by its first bytes, and by its name where they do not
    say it; None for text. ValueError for a compressed file."""
    refuse_packed(path, head)
    suffix, start = path.suffix.lower(), JSON_START.match(head)
    if (start and start[1]) or (suffix == ".json" and head.lstrip().startswith(b"[")):
        return read_array
    return read_lines if start or suffix in (".json", ".jsonl") else None


def read_lines(file, path):
    """The stories of JSON lines, as pieces."""
    for number, line in enumerate(file, 1):
        if line := utf8(codecs.decode, line, path, "utf-8-sig" if number == 1 else "utf-8").strip():
            value = None
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
            yield from stories_of(value, f"{path}, line {number}", line)


def read_array(file, path):
    """The stories of a JSON array, as pieces."""
    if (size := os.path.getsize(path)) > JSON_MOST:
        raise ValueError(f"{path} is a JSON array of {size:,} bytes, above {JSON_MOST:,}; write it as .jsonl")
    try:
        values = json.loads(utf8(codecs.decode, file.read(), path, "utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} begins like a JSON array but is none: {error}") from None
    for number, value in enumerate(values, 1):
        yield from stories_of(value, f"{path}, item {number}")


def stories_of(value, where, shown=None):
    """The stories in a value of JSON, as pieces; ValueError that shows it where it has none."""
    text = value.get("text", value.get("story")) if isinstance(value, dict) else value
    with contextlib.suppress(AttributeError, UnicodeEncodeError):  # no string; an escaped half of a surrogate pair
        text.encode()
        return [(story, True) for story in text.split(END)]
    expected = 'a string, {"text": "a story"} or {"story": "a story"}'
    raise ValueError(f"{where}: expected {expected}, got {(shown or json.dumps(value))[:60]!r}")


# == 2  compressed files ===============================================================================================

TO_JSONL = "import pandas, sys; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)"
PACKED = [  # suffixes; first bytes and their offset; suffix of the unpacked file; the command that unpacks it
    ((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"), b"ustar", 257, "", "tar -xf {file}"),
    ((".gz",), b"\x1f\x8b", 0, "", "gunzip -c {file} > {out}"),
    ((".bz2",), b"BZh", 0, "", "bunzip2 -c {file} > {out}"),
    ((".xz",), b"\xfd7zXZ\0", 0, "", "xz -dc {file} > {out}"),
    ((".zst",), b"\x28\xb5\x2f\xfd", 0, "", "zstd -dc {file} > {out}"),
    ((".zip",), b"PK\3\4", 0, "", "unzip {file}"),
    ((".parquet",), b"PAR1", 0, ".jsonl", f'python -c "{TO_JSONL}" {{file}} {{out}}'),
]


def refuse_packed(path, head=b""):
    """ValueError, with the command that helps, for a file that is compressed by its name or its first bytes."""
    for suffixes, magic, place, ending, command in PACKED:
        suffix = next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)
        if suffix or head[place:].startswith(magic):
            out = str(path)[: -len(suffix)] + ending if suffix else f"{path}{ending or '.txt'}"
            command = command.format(file=shlex.quote(str(path)), out=shlex.quote(out))
            raise ValueError(f"{path} is not text but {suffixes[0]} data; unpack it first: {command}")


# == 3  whole stories ==================================================================================================


def documents(paths, progress=None):
    """The stories that bpe.pieces reads, each of them whole."""
    return (text for text, _ in whole(pieces(paths, progress)))


def whole(parts):
    """What bpe.pieces gives -> (document, True), ..."""
    held = []
    for piece, ends in parts:
        held.append(piece)
        if ends:
            yield type(piece)().join(held), True
            held = []
