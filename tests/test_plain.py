"""Part II of tinygpt.py: plain kernels against the specification at the borders of their blocks, and bytes that do not
depend on the number of threads."""

import importlib
import inspect
import math
import sys

import numba
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    as_bytes,
    assert_float32_errs_at_most_four_times_as_much_as_the_spec,
    random_batch,
    random_parameters,
    relative,
    run_model,
    tiny_config,
)

import tinygpt
from extras import check
from tinygpt import OPS, THREADS

LIMITS = {np.float64: 1e-12, np.float32: 2e-5}  # relative to the specification in float64
both_dtypes = pytest.mark.parametrize("dtype", LIMITS)


@pytest.fixture
def threads():
    """THREADS, with as many threads as before when the test is over."""
    before = THREADS.count
    yield THREADS
    THREADS.count = before


def around(*borders):
    """One below, at and one above each."""
    return sorted({n + d for n in borders for d in (-1, 0, 1) if n + d > 0})


# -- products


@both_dtypes
@pytest.mark.parametrize("K", [1, 3, 4, 5, *around(tinygpt.BLOCK_ROWS, 2 * tinygpt.BLOCK_ROWS)])
@pytest.mark.parametrize("M, N", [(1, 1), (3, 7), (4, 16), (5, 33), (9, 513), (66, 1025)])
def test_a_product_is_that_of_numpy_for_any_strides_and_writes_nothing_else(M, K, N, dtype):
    rng = np.random.default_rng(M * K * N)
    a, b, bias = (rng.standard_normal(shape).astype(dtype) for shape in ((M, K), (K, N), N))
    limit = 4 * K * np.finfo(dtype).eps
    for left in (a, np.asfortranarray(a), np.repeat(a, 2, 1)[:, ::2]):
        for right in (b, np.asfortranarray(b), np.repeat(b, 2, 0)[::2]):
            found = tinygpt.product(left, right, bias)
            assert found.dtype == dtype and relative(found, a.astype(np.float64) @ b + bias) < limit
            whole = np.full((M + 2, N), 7, dtype)
            assert tinygpt.product(left, right, c=whole[1:-1]) is not None
            assert relative(whole[1:-1], 7 + a.astype(np.float64) @ b) < limit
            assert (whole[0] == 7).all() and (whole[-1] == 7).all()
    turned = np.ones((N, M), dtype)
    tinygpt.product(a, b, c=turned.T)  # into a transposed view
    assert relative(turned.T, 1 + a.astype(np.float64) @ b) < limit


# -- sublayers


def assert_agrees(cfg, B, T):
    exact = run_model(cfg, "numpy", B, T, np.float64)
    for dtype, limit in LIMITS.items():
        found = run_model(cfg, "numba", B, T, dtype)
        for name in exact:
            assert found[name].dtype == dtype or name == "loss"
            assert relative(found[name], exact[name]) < limit, (name, dtype)


@pytest.mark.parametrize("T", [1, 2, *around(tinygpt.QUERIES, 2 * tinygpt.QUERIES)])
@pytest.mark.parametrize("family", ["gpt-2", "llama", "bloom"])
def test_models_agree_with_the_spec_at_the_borders_of_blocks_of_queries(family, T):
    assert_agrees(tiny_config(**FAMILIES[family] | dict(seq_len=T, position_rows=T, layers=1)), 2, T)


@pytest.mark.parametrize("window", [1, 2, *around(tinygpt.QUERIES), 110, 500])
def test_windows_agree_with_the_spec_at_the_borders_of_blocks_of_queries(window):
    assert_agrees(tiny_config(window=window, seq_len=110, position_rows=110), 1, 110)


@pytest.mark.parametrize("start, T", [(0, 1), (1, 1), (70, 1), (3, 70), (64, 64)])
@pytest.mark.parametrize("family", FAMILIES)
def test_queries_attend_to_a_past_as_in_the_spec(family, start, T):
    cfg = tiny_config(**FAMILIES[family] | dict(seq_len=130, position_rows=130))
    _, p = random_parameters(cfg)
    rng = np.random.default_rng(0)
    kept, tokens = rng.standard_normal((cfg.layers, 2, 130, 2, cfg.kv_heads, cfg.head_width)), None
    tokens = rng.integers(0, cfg.vocab_size, (2, T))
    x, y = (tinygpt.forward(p, tokens, cfg, OPS[name], (kept.copy(), start))[0] for name in ("numpy", "numba"))
    assert relative(y, x) < 1e-12


def test_float32_errs_at_most_four_times_as_much_as_the_spec():
    cfg = tiny_config(width=48, hidden=192, vocab_size=211, seq_len=97, position_rows=97)
    assert_float32_errs_at_most_four_times_as_much_as_the_spec(cfg, 2, 97, seeds=4, table="numba")


def test_a_new_norm_and_a_new_activation_run_without_a_kernel(monkeypatch):
    """What has no kernel is the specification's: RMSNorm and SiLU under other names give the results of both."""
    for names, new, old in ((tinygpt.NORMS, "mine", "rmsnorm"), (tinygpt.ACTIVATIONS, "own", "silu")):
        monkeypatch.setitem(names, new, names[old])
    choices = tinygpt.CHOICES | {"norm": ("rmsnorm", "mine"), "mlp": ("silu", "own")}
    monkeypatch.setattr(tinygpt, "CHOICES", choices)
    table = tinygpt.dataclasses.replace(
        OPS["numba"],
        norms=tinygpt.NORMS | OPS["numba"].norms,
        activations=tinygpt.ACTIVATIONS | OPS["numba"].activations,
    )
    cfg = tiny_config(norm="mine", mlp="own", norm_bias=False)
    assert max(error for _, error in check.check_model(cfg, table)) < 1e-6


# -- bytes


@pytest.mark.parametrize("family", ["gpt-2", "llama", "bloom", "gpt-neo"])
def test_any_number_of_threads_gives_the_same_bytes(threads, family):
    changes = dict(vocab_size=53, seq_len=101, width=24, head_width=4, hidden=40, position_rows=103, layers=2)
    cfg, results = tiny_config(**FAMILIES[family] | changes | dict(attention_dropout=0.2)), []
    for count in (1, 2, 3, 5):
        threads.count = count
        results.append(as_bytes(run_model(cfg, "numba", 3, 101, np.float32, dropout=tinygpt.Dropout(0, 1, 2))))
    assert all(result == results[0] for result in results)


def test_an_error_in_a_kernel_reaches_the_caller(threads):
    def fail(first, last):
        if last == 9:
            raise ValueError("of the last share")

    for threads.count in (1, 2, 3):
        with pytest.raises(ValueError, match="last share"):
            threads.run(fail, 9)


def test_shares_are_whole_units_and_cover_all_tasks(threads):
    for threads.count in (1, 2, 3, 7):
        for tasks in (0, 1, 3, 4, 5, 17):
            for unit in (1, 4):
                found = []
                threads.run(lambda first, last, found=found: found.append((first, last)), tasks, unit=unit)
                found.sort()
                assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])] and found[-1][1] == tasks
                assert all(last % unit == 0 for _, last in found[:-1]) and len(found) <= max(1, threads.count)


# -- numbers


@numba.njit
def exp_of_each(x, y):
    for i in range(x.size):
        y[i] = tinygpt.exp(x[i])


def test_exp_is_within_two_parts_in_ten_million_held_at_its_ends_and_nan_stays_nan():
    x = np.linspace(-87, 88, 1_000_003).astype(np.float32)
    y = np.empty_like(x)
    exp_of_each(x, y)
    assert (np.abs(y / np.exp(x.astype(np.float64)) - 1)).max() < 2e-7
    x = np.float32([-1e30, -math.inf, 1e30, math.inf, math.nan])
    y = np.empty_like(x)
    exp_of_each(x, y)
    assert (y[:2] == y[0]).all() and 0 < y[0] < 2e-38 and (y[2:4] == y[2]).all() and y[2] > 1e38 and np.isnan(y[4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["embed_w", "norm_w"])
def test_a_parameter_that_is_not_finite_shows_in_the_loss(name, bad):
    cfg = tiny_config()
    _, p = random_parameters(cfg, dtype=np.float32)
    p[name].reshape(-1)[3] = bad
    with np.errstate(invalid="ignore", over="ignore"):
        loss, _ = tinygpt.loss_and_gradients(p, *random_batch(cfg, 2, 5, dtype=np.float32), None, cfg, OPS["numba"])
    assert not math.isfinite(loss)


# -- the tests themselves


WRONG = [
    ("score_block", "low <= t", "low < t"),
    ("norm_backward_kernel", " - n_row[c] * dot", ""),
    ("score_block", "slope * q.dtype.type(t - low)", "slope * q.dtype.type(low - t)"),
    ("embedding_backward_kernel", "dw[tokens[n], c] += dx[n, c]", "dw[tokens[n], c] = dx[n, c]"),
    ("cross_entropy_backward_kernel", "dlogits[i, targets[i]] -= weights[i]", "pass"),
]
SOME_SLOW = [pytest.param(*row, marks=[pytest.mark.slow] * (i > 1)) for i, row in enumerate(WRONG)]  # each compiles all


@pytest.mark.parametrize("name, old, new", SOME_SLOW)
def test_the_comparison_with_the_spec_tells_a_wrong_kernel(name, old, new, tmp_path, monkeypatch):
    """A copy of tinygpt.py in which one kernel is changed gives other gradients than its specification."""
    source, function = inspect.getsource(tinygpt), inspect.getsource(getattr(tinygpt, name))
    assert function.count(old) == 1
    (tmp_path / "wrong_copy.py").write_text(source.replace(function, function.replace(old, new)), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wrong_copy", raising=False)
    wrong = importlib.import_module("wrong_copy")
    cfg, gradients = wrong.Config(11, 5, 12, 1, 3, hidden=7, positions="alibi"), []
    _, p = random_parameters(cfg)
    for table in ("numpy", "numba"):
        gradient, g = wrong.zero_gradients(cfg, np.float64)
        wrong.loss_and_gradients(p, *random_batch(cfg, 2, 5), g, cfg, wrong.OPS[table])
        gradients.append(gradient + np.pad(g["lookup_w"].reshape(-1), (0, gradient.size - g["lookup_w"].size)))
    assert not relative(*gradients) < 1e-6


def test_no_function_of_the_plain_tier_has_more_than_12_parameters():
    kernels = [x for x in vars(tinygpt).values() if hasattr(x, "py_func")]
    assert len(kernels) >= 10
    for each in kernels:
        assert len(inspect.signature(each.py_func).parameters) <= 12, each.py_func.__name__
