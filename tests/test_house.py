"""The house: how long files are, who imports whom, what lies at the top level."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = {"README.md": 200, "bpe.py": 750, "tinygpt.py": 1600, "train.py": 800, "sample.py": 300}
PARTS = {  # of a file, from the line that begins with these words to the next part: at most so many lines
    "tinygpt.py": {"# Part I: ": 750, "# Part II: ": 400},
    "train.py": {"# Part I: ": 350},
}
OURS = ("bpe", "tinygpt", "train", "sample", "fast", "extras", "benchmarks", "tests")
AT_IMPORT = {  # what a file, or each file of a folder, may import of ours when it is imported itself
    "bpe.py": (),
    "tinygpt.py": (),
    "sample.py": ("bpe", "tinygpt"),
    "train.py": ("bpe", "tinygpt", "sample"),
    "fast": ("bpe", "tinygpt", "fast"),
    "extras": ("bpe", "tinygpt", "sample", "train", "fast", "extras"),
}
WHEN_USED = {  # and what more inside its functions
    "bpe.py": ("bpe", "tinygpt", "fast", "extras"),  # itself: `python bpe.py` is the module that others import
    "tinygpt.py": ("tinygpt", "fast", "extras"),
    "sample.py": ("fast", "extras"),
    "train.py": ("train", "fast", "extras"),
    "fast": (),
    "extras": (),
}
TOP = {"README.md", "LICENSE", "requirements.txt", "requirements-dev.txt", "pyproject.toml", "stories.safetensors"}
TOP |= {"bpe.py", "tinygpt.py", "train.py", "sample.py", "fast", "extras", "benchmarks", "docs", "tests"}
NOT_OURS = {"data", "runs", "build", "dist"}  # what running or installing leaves
FILES = [
    path for name in AT_IMPORT for path in sorted((ROOT / name).rglob("*.py") if "." not in name else [ROOT / name])
]


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", LINES)
def test_a_file_can_be_read_in_one_sitting(name):
    assert len(lines_of(ROOT / name)) <= LINES[name]


@pytest.mark.parametrize("path", sorted((ROOT / "fast").glob("*.py")), ids=lambda path: path.name)
def test_a_file_of_fast_has_at_most_600_lines(path):
    assert len(lines_of(path)) <= 600


@pytest.mark.parametrize("name, part", [(name, part) for name in PARTS for part in PARTS[name]])
def test_a_part_keeps_its_length(name, part):
    lines = lines_of(ROOT / name)
    starts = [i for i, line in enumerate(lines) if line.startswith("# Part ")] + [len(lines)]
    (first,) = [i for i in starts[:-1] if lines[i].startswith(part)]
    text = "\n".join(lines[first : starts[starts.index(first) + 1]]).rstrip("# \n")  # without the next part's heading
    assert len(text.splitlines()) <= PARTS[name][part]


def imports_of(path):
    """[(first name of a module of ours, whether it is imported with the file)]"""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(f)}
    guarded = [node for node in tree.body if isinstance(node, ast.If)]  # if __name__ == "__main__"
    inside |= {id(node) for branch in guarded for node in ast.walk(branch)}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [(name.split(".")[0], id(node) not in inside) for name in names]
    return [(name, at_import) for name, at_import in found if name in OURS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path):
    place = path.relative_to(ROOT).parts[0]
    for name, at_import in imports_of(path):
        assert name in AT_IMPORT[place] + (() if at_import else WHEN_USED[place]), (name, at_import)


def test_the_check_of_imports_tells_a_wrong_one(tmp_path):
    """A file that imports train at its top, and tests inside a function."""
    (tmp_path / "a.py").write_text("import os, train.x\ndef f():\n    from tests import helpers\n", encoding="utf-8")
    assert imports_of(tmp_path / "a.py") == [("train", True), ("tests", False)]


def test_nothing_else_lies_at_the_top_level():
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "_"))}
    assert found - NOT_OURS <= TOP
