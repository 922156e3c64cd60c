"""The four files alone, without fast/ and extras/: what they do in an empty folder, and what importing them must not
do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_stories

FILES = ("bpe.py", "tinygpt.py", "train.py", "sample.py")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with these files and nothing else but kernels that are compiled already, which only save time."""
    folder = tmp_path_factory.mktemp("alone")
    for name in FILES:
        shutil.copy2(ROOT / name, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    (folder / "__pycache__").mkdir()
    for path in (ROOT / "__pycache__").glob("*.nb[ci]"):
        shutil.copy2(path, folder / "__pycache__")
    return folder


def python(folder, *words):
    """Status, stdout and stderr of a fresh interpreter in `folder` that finds modules there alone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_the_four_files_alone_train_on_a_text_and_tell_a_story(alone, tmp_path):
    text = write_stories(tmp_path / "stories.txt")
    shape = ["--size", "700k", "--seq-len", 32, "--vocab-size", 300, "--batch-size", 2]
    status, _, err = python(alone, "train.py", *shape, "--data", text, "--steps", 3, "--threads", 1)
    assert status == 0, err
    assert "step 3 | loss " in err
    assert "precision " in err
    status, out, err = python(alone, "sample.py", "--prompt", "Lily found", "--max-new-tokens", 10)
    assert status == 0, err
    assert out.startswith("Lily found") and len(out) > len("Lily found\n")


def test_without_extras_a_line_says_what_is_lost_and_training_goes_on(alone, tmp_path):
    text = write_stories(tmp_path / "stories.txt", count=12)
    words = ["train.py", "--size", "700k", "--seq-len", 32, "--vocab-size", 270, "--data", text, "--kernels", "numpy"]
    status, _, err = python(alone, *words, "--set", "layers=1", "width=16", "heads=2", "--out", tmp_path / "run")
    assert status == 0, err
    missing = [line for line in err.splitlines() if "is not here" in line and not line.startswith("precision")]
    assert missing == ["extras/ is not here: no lock on the run, no plan by the clock, no --resume, no loss curve"]
    refused = ["--minutes 1", "--max-memory 2G", "--recompute", "--recipe published", "--list-sizes", "--resume"]
    refused += ["--keep 2", "--size 15m"]
    for flags in map(str.split, refused):
        status, _, err = python(alone, *words, *flags)
        assert status == 2 and len(err.splitlines()) == 1 and err.startswith("train.py: error: "), err
    assert "expected one of 700k, 1m, 8m, 28m; more sizes need extras/recipes.py" in err


def test_a_start_that_fails_alone_leaves_no_folder(alone, tmp_path):
    (tmp_path / "short.txt").write_text("One day, a cat.", encoding="utf-8")
    words = ["--data", tmp_path / "short.txt", "--kernels", "numpy", "--vocab-size", 270, "--steps", 1]
    status, _, err = python(alone, "train.py", *words, "--out", tmp_path / "run")
    assert status == 2 and "window of T=256" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["stories.jsonl", "stories.json", "stories.txt"])
def test_without_extras_json_is_refused_in_a_line_that_says_what_reads_it(alone, tmp_path, name):
    (tmp_path / name).write_text('[{"text": "A story."}]', encoding="utf-8")
    words = ["bpe.py", "train", tmp_path / name, "--vocab-size", 265, "--out", tmp_path / "t.json"]
    status, out, err = python(alone, *words)
    assert status == 2 and not out and len(err.splitlines()) == 1
    assert err.startswith(f"bpe.py: error: {tmp_path / name} needs extras/documents.py, which is not here")
    status, _, err = python(alone, "train.py", "--data", tmp_path / name, "--out", tmp_path / "run")
    assert status == 2 and f"train.py: error: {tmp_path / name} needs extras/documents.py" in err
    assert not (tmp_path / "run").exists() and not (tmp_path / "t.json").exists()


def test_without_extras_a_folder_of_texts_is_read(alone, tmp_path):
    write_stories(tmp_path / "stories.txt")
    status, _, err = python(alone, "bpe.py", "train", tmp_path, "--vocab-size", 270, "--out", tmp_path / "t.json")
    assert status == 0, err
    (tmp_path / "more.jsonl").write_text('{"text": "A story."}', encoding="utf-8")  # not passed over in silence
    status, _, err = python(alone, "bpe.py", "train", tmp_path, "--vocab-size", 270, "--out", tmp_path / "t.json")
    assert status == 2 and err.startswith(f"bpe.py: error: {tmp_path} needs extras/documents.py")


def test_without_data_one_line_says_that_stories_are_missing(alone):
    runs = sorted(alone.glob("runs/*"))
    status, out, err = python(alone, "train.py", "--steps", 1)
    assert status == 2 and not out
    needed = "name a text with --data FILE, and no --val-data or --tokenizer"
    assert err == f"train.py: error: extras/data.py is not here: {needed}\n"
    assert sorted(alone.glob("runs/*")) == runs


# Numba itself tries with a temporary file, without a name or text, whether its cache can be written.
IMPORT = """
import os, sys, threading
import numba, numpy, regex
from numba.core import event
written = []
def watch(name, args):
    if name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not (isinstance(args[0], str) and "__pycache__" in args[0]):
            written.append(args[0])
    if name in ("socket.connect", "subprocess.Popen"):
        written.append(name)
sys.addaudithook(watch)
random_state = numpy.random.get_state()[1].tobytes()
with event.install_recorder("numba:compile") as compiled:
    import MODULE
assert not compiled.buffer, compiled.buffer
assert not written, written
assert threading.active_count() == 1, threading.enumerate()
loaded = {"torch", "matplotlib", "tokenizers", "extras"} & set(sys.modules)
assert not loaded, loaded
assert numpy.random.get_state()[1].tobytes() == random_state
"""


@pytest.mark.parametrize("name", FILES)
def test_importing_does_no_work(alone, name):
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*") if path.is_file()}
    status, out, err = python(alone, "-c", IMPORT.replace("MODULE", name.removesuffix(".py")))
    assert status == 0, err
    assert not out and not err
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "ModuleNotFoundError('numpy is missing')"])
@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_what_ends_a_program_while_it_imports_is_one_line(alone, tmp_path, name, raised):
    """A Ctrl-C, or a package that is not installed."""
    (tmp_path / "numpy.py").write_text(f"raise {raised}", encoding="utf-8")
    code = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
    status, out, err = python(alone, "-c", code, tmp_path, name)
    assert status and not out and len(err.splitlines()) == 1 and err.startswith(raised[:17]), err


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_a_fault_of_the_program_itself_has_its_traceback(alone, name):
    code = "import bpe, runpy; bpe.Parser.parse_args = lambda *_: 1 / 0; runpy.run_path('NAME', run_name='__main__')"
    status, _, err = python(alone, "-c", code.replace("NAME", name))
    assert status == 1 and "Traceback" in err and "in main" in err and err.endswith("division by zero\n")
