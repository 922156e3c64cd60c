"""What a machine may lack: an undamaged cache, a folder to write, threads, memory, cores; and processes that fork."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_stories
from tiers import WITHOUT_FAST, needs_fast

import tinygpt
from extras import machine

ROOT = Path(tinygpt.__file__).parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="about fork")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NUMBA_CACHE_DIR")}

PLAIN = """
import numpy as np, tinygpt
tinygpt.set_threads(THREADS)
x = np.ones((64, 3), np.float32)
for _ in range(3):
    assert tinygpt.product(x, x.T).sum() == 3 * 64 * 64
hits = tinygpt.product_kernel.stats.cache_hits if hasattr(tinygpt.product_kernel, "stats") else {}
"""
FAST = """
import numpy as np, tinygpt
from fast import kernel, POOL
from fast.embed import norm_kernel
from fast.rows import RMSNORM
tinygpt.set_threads(THREADS)
x, ones, stats = np.ones((6, 16), np.float32), np.ones(16, np.float32), np.empty((2, 6), np.float32)
for _ in range(3):
    x[:] = 3
    POOL.run(norm_kernel, 2, x, (RMSNORM, ones, ones, 0.0), 3, stats, x)
    assert (x == 2).all()
hits = norm_kernel.stats.cache_hits
"""
TIERS = [pytest.param(PLAIN, id="plain"), pytest.param(FAST, id="fast", marks=needs_fast)]
both_tiers = pytest.mark.parametrize("code", TIERS)


@pytest.fixture
def project(tmp_path):
    """A copy of the project, without compiled kernels."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "extras", folder / "extras", ignore=shutil.ignore_patterns("__pycache__"))
    if not WITHOUT_FAST:
        shutil.copytree(ROOT / "fast", folder / "fast", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("bpe.py", "tinygpt.py", "train.py", "sample.py"):
        shutil.copy2(ROOT / name, folder)
    return folder


def python(folder, *words, code=None, threads=1, timeout=300, **environment):
    """stdout and stderr of a fresh interpreter in a folder, which must succeed."""
    words = ["-c", code.replace("THREADS)", f"{threads})") if code else None, *words] if code else words
    environment = ENVIRONMENT | {"HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def kept(folder):
    return sorted(folder.rglob("*.nb[ci]"))


# -- Numba's cache


@both_tiers
@pytest.mark.parametrize(
    "ending, size",
    [("nbi", 0), ("nbc", 7), *(pytest.param(*row, marks=pytest.mark.slow) for row in (("nbi", 7), ("nbc", 0)))],
)
def test_a_damaged_file_of_the_cache_is_compiled_again_once(project, code, ending, size):
    show = code + "print(sum(hits.values()))"
    python(project, code=show)
    assert python(project, code=show) == ("1\n", "")
    for path in kept(project):
        if path.suffix == f".{ending}":
            path.write_bytes(path.read_bytes()[:size])
    assert python(project, code=show) == ("0\n", "")
    assert python(project, code=show) == ("1\n", "")


@both_tiers
def test_without_a_folder_to_write_kernels_are_compiled_and_one_line_says_so(project, code):
    for path in [project, *project.rglob("*")]:
        if path.is_dir():
            (path / "__pycache__").write_text("")  # no folder can be made here, not even by root
    (project / "home").write_text("")
    home = {"HOME": str(project / "home"), "XDG_CACHE_HOME": str(project / "home")}
    _, err = python(project, code=code, **home)
    assert err == "no folder can be written to keep compiled kernels in; NUMBA_CACHE_DIR names another\n"
    assert kept(project) == []


@pytest.mark.parametrize("words", [["train.py", "--help"], ["train.py", "--list-sizes"], ["sample.py", "--help"]])
def test_help_does_not_touch_the_cache(project, words, tmp_path):
    python(project, *words, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_the_specification_does_not_touch_the_cache(project, tmp_path):
    text = write_stories(tmp_path / "stories.txt", count=12)
    words = ["train.py", "--size", "700k", "--seq-len", 32, "--vocab-size", 270, "--data", text, "--kernels", "numpy"]
    words += ["--set", "layers=1", "width=16", "heads=2", "--steps", 2, "--out", tmp_path / "run"]
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    python(project, *words, **cache)
    checkpoint = tmp_path / "run" / "last.safetensors"
    words = ["sample.py", "--kernels", "numpy", "--checkpoint", checkpoint, "--max-new-tokens", 5]
    python(project, *words, **cache)
    assert not (tmp_path / "cache").exists()


def test_without_compilation_the_specification_computes_and_one_line_says_so(project, tmp_path):
    text = write_stories(tmp_path / "stories.txt", count=12)
    words = ["train.py", "--size", "700k", "--seq-len", 32, "--vocab-size", 270, "--data", text]
    words += ["--set", "layers=1", "width=16", "heads=2", "--steps", 2, "--out", tmp_path / "run"]
    _, err = python(project, *words, NUMBA_DISABLE_JIT="1")
    assert err.count("NUMBA_DISABLE_JIT is set, so nothing is compiled: --kernels numpy\n") == 1
    assert "step 2 | loss " in err
    code = "import tinygpt, bpe; tinygpt.find_ops('fast')"
    words = [sys.executable, "-c", code]
    environment = ENVIRONMENT | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, encoding="utf-8")
    expected = "ValueError: --kernels fast needs the folder fast/ beside tinygpt.py; use --kernels numba ("
    assert done.stderr.splitlines()[-1].startswith(expected + "NUMBA_DISABLE" * (not WITHOUT_FAST))


TOKENIZER = """
tokenizer = bpe.Tokenizer.from_merges(bpe.train(["the little cat " * 300_000], 5))
tokenizer.encode_array("the little cat " * 100_000)
import sys
kernels = {id(k): k for m in ("fast.words", "fast.merges") for k in vars(sys.modules[m]).values()}
kernels = [k for k in kernels.values() if hasattr(k, "stats")]
print(*(sum(sum(getattr(k.stats, n).values()) for k in kernels) for n in ("cache_hits", "cache_misses")))
"""


@needs_fast
def test_kernels_are_found_in_the_cache_whichever_module_is_imported_first(project):
    orders = ["import bpe", "import tinygpt, bpe", "import fast.words, bpe", "import numba, bpe, tinygpt"]
    found = [python(project, code=order + TOKENIZER)[0].split() for order in orders]
    compiled = found[0][1]
    assert int(compiled) > 4 and found == [["0", compiled], *[[compiled, "0"]] * 3]


# -- threads

NO_THREADS = """
import _thread, threading
def refuse(*_, **__):
    raise RuntimeError("can't start new thread")
_thread.start_new_thread = threading._start_new_thread = refuse
"""
LINE = "can't start new thread: computing with the threads that there are\n"


@both_tiers
def test_where_no_thread_can_be_started_one_computes_and_one_line_says_so(project, code):
    python(project, code=code)
    assert python(project, code=NO_THREADS + code, threads=3, timeout=60)[1] == LINE


@needs_fast
def test_a_text_is_encoded_where_no_thread_can_be_started(project):
    encode = "import bpe\nt = bpe.Tokenizer.from_merges([])\ntext = 'the cat ' * 300_000\n"
    encode += "assert t.encode_array(text, threads=3).tolist() == list(text.encode())"
    assert python(project, code=NO_THREADS + encode, timeout=120)[1] == LINE


FORK = """
import os, threading, time
def busy():
    while True:
        compute()
threading.Thread(target=busy, daemon=True).start()
for _ in range(5):
    time.sleep(0.05)
    child = os.fork()
    if not child:
        compute()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""


@needs_fork
@both_tiers
def test_a_child_that_was_forked_while_a_thread_computed_computes_too(project, code):
    task = code.replace("stats, x)", "stats, x.copy())").replace("    assert (x == 2).all()\n", "")
    first, loop, rest = task.partition("for _ in range(3):\n")
    define = first + "def compute():\n" + rest.partition("hits = ")[0] + "compute()\n"
    python(project, code=define + FORK, threads=2, timeout=120)


# -- cores


@pytest.mark.parametrize(
    "groups, files, cores",
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "10000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/of/the/host", {"cpu.max": "300000 100000"}, 3),  # of which a container sees its own folder alone
        ("3:cpu,cpuacct:/c\n0::/", {"cpu/c/cpu.cfs_quota_us": "250000", "cpu/c/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu:/c", {"cpu/c/cpu.cfs_quota_us": "-1", "cpu/c/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpuset:/c\n0::/", {"cpu.max": "nonsense"}, 8),
        ("0::/", {"cpu.max": "900000 100000"}, 8),
    ],
)
def test_the_quota_of_a_container_limits_the_cores(groups, files, cores, tmp_path):
    (tmp_path / "cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert machine.within_quotas(8, tmp_path / "cgroup", tmp_path / "root") == cores
    assert machine.within_quotas(8, tmp_path / "missing", tmp_path / "root") == 8


def test_the_threads_of_every_table_stay_within_a_quota(monkeypatch):
    monkeypatch.setattr(machine, "within_quotas", lambda cores: 3)
    assert tinygpt.count_cores() == tinygpt.Threads().count == 3
    monkeypatch.setitem(sys.modules, "extras.machine", None)  # without extras/
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert tinygpt.count_cores() == 8
