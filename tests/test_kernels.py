"""fast/: kernels against the specification at every border of their blocks, bytes that do not depend on
threads or micro-batches, and the parts that kernels are made of."""

import ast
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numba
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    TABLES,
    as_bytes,
    assert_float32_errs_at_most_four_times_as_much_as_the_spec,
    ops_of,
    random_batch,
    random_parameters,
    relative,
    run_model,
    tiny_config,
)
from llvmlite import binding

import fast
import tinygpt
from fast import POOL, panels, products, workspace
from fast.jit import COMPILE, STAMP, remove_old_kernels
from fast.rows import erf_of, exp, maximum
from fast.threads import Pool
from tinygpt import OPS

LANES = {np.float32: 16, np.float64: 8}  # elements of a vector
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def around(*borders):
    """One below, at and one above each."""
    return sorted({n + d for n in borders for d in (-1, 0, 1) if n + d > 0})


# -- kernels against the specification


def assert_kernels_agree(cfg, B, T, space=False):
    """In float64 to rounding; in float32, whose vectors end elsewhere, to what shows a wrong or missing term."""
    exact = run_model(cfg, "numpy", B, T, np.float64)
    for dtype, limit in ((np.float64, 1e-12), (np.float32, 2e-5)):
        kernels = run_model(cfg, "fast", B, T, dtype, space)
        for name in exact:
            assert relative(kernels[name], exact[name]) < limit, (name, dtype)


@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(width=97, heads=1, layers=1),
        dict(width=64, heads=4, hidden=256, vocab_size=300, seq_len=60, position_rows=60, layers=1),
        dict(width=48, hidden=192, vocab_size=211, seq_len=97, position_rows=97),
    ],
    ids=lambda shape: f"width {shape.get('width', 12)}",
)
def test_kernels_in_float32_err_at_most_four_times_as_much_as_the_spec(shape):
    cfg = tiny_config(**shape)
    assert_float32_errs_at_most_four_times_as_much_as_the_spec(cfg, 2, cfg.seq_len, seeds=6)


def run_sublayer(cfg, table, dtype, name, flat, x, dy):
    """What the first `name` layer adds to x, what its backward adds to dy, and the gradients of its matrices."""
    p, (_, g) = tinygpt.views(tinygpt.layout(cfg), flat.astype(dtype), cfg.layers), tinygpt.zero_gradients(cfg, dtype)
    ops = tinygpt.with_buffers(ops_of(table), cfg, *x.shape[:2], np.dtype(dtype))
    layer = getattr(ops, f"{name}_layer")
    p, g, x, dy = p["layers"][0], g["layers"][0], x.astype(dtype), dy.astype(dtype)
    y, cache = layer.forward(x, p, cfg, ops)
    added = {"y": y - x, "dx": layer.backward(dy, cache, p, g, cfg, ops) - dy}
    return added | {key: g[key].copy() for key in g if g[key] is not None and g[key].any()}


@pytest.mark.parametrize("scale", [1, 4])  # of the initial matrices: those of trained models have grown
@pytest.mark.parametrize("name, mlp", [("attention", "gelu-tanh"), *(("mlp", mlp) for mlp in tinygpt.CHOICES["mlp"])])
def test_sublayers_in_float32_err_at_most_twice_as_much_as_the_spec(name, mlp, scale):
    """Root mean squares, at the width of size 1m, where x is larger than what is added to it."""
    cfg = tinygpt.SIZES["1m"].changed(mlp=mlp, vocab_size=11, seq_len=128, layers=1)
    flat, rng = scale * tinygpt.init_parameters(cfg, 0, np.float32), np.random.default_rng(0)
    x, dy = (rng.normal(0, size, (2, cfg.seq_len, cfg.width)).astype(np.float32) for size in (2, 1))
    exact, spec, found = (
        run_sublayer(cfg, table, dtype, name, flat, x, dy)
        for table, dtype in (("numpy", np.float64), ("numpy", np.float32), ("fast", np.float32))
    )
    for key in exact:
        ratio = np.linalg.norm(found[key] - exact[key]) / np.linalg.norm(spec[key] - exact[key])
        assert ratio <= 2, (key, ratio)


TILE_COLUMNS = tuple(products.TILE_VECTORS * lanes for lanes in LANES.values())
C_BORDERS = around(32, *(size for shape in panels.GRADIENT_BLOCKS for size in shape if size < 200), products.DEPTH)
F_BORDERS = around(products.DEPTH, workspace.HIDDEN_BLOCK)
T_BORDERS = around(
    *(products.TILE_ROWS, products.PACK_ROWS, workspace.SCORE_BLOCK, workspace.ROW_BLOCK, products.DEPTH),
    *(*TILE_COLUMNS, 2 * workspace.ROW_BLOCK),
)
V_BORDERS = around(
    *LANES.values(),
    *(2 * n for n in LANES.values()),
    *TILE_COLUMNS,
    workspace.VOCABULARY_BLOCK,
    2 * workspace.VOCABULARY_BLOCK,
)
HEAD_BORDERS = around(workspace.HEAD_BLOCK, workspace.HEAD_BLOCKS * workspace.HEAD_BLOCK)


@pytest.mark.parametrize("T", T_BORDERS)
def test_kernels_agree_with_the_spec_at_the_borders_of_blocks_of_positions(T):
    assert_kernels_agree(tiny_config(seq_len=T, position_rows=T), 2, T)


WINDOWED = dict(window=50, positions="alibi", embedding_norm=True, heads=6, kv_heads=2, head_width=4, layers=2)


@pytest.mark.parametrize("T", around(16, workspace.SCORE_BLOCK, 64, workspace.ROW_BLOCK, 2 * workspace.ROW_BLOCK))
@pytest.mark.parametrize("changes", [FAMILIES["llama"], WINDOWED], ids=["llama", "windowed alibi"])
def test_kernels_of_other_models_agree_with_the_spec_at_the_borders_of_blocks_of_positions(changes, T):
    assert_kernels_agree(tiny_config(**changes | dict(seq_len=T, position_rows=T)), 2, T, space=True)


@pytest.mark.parametrize("window", [1, 2, *around(16, workspace.SCORE_BLOCK, workspace.ROW_BLOCK), 110, 111, 500])
def test_kernels_agree_with_the_spec_at_the_borders_of_windows(window):
    assert_kernels_agree(tiny_config(window=window, seq_len=110, position_rows=110), 2, 110)


@pytest.mark.parametrize("F", around(workspace.HIDDEN_BLOCK, 2 * workspace.HIDDEN_BLOCK))
def test_kernels_agree_with_the_spec_at_the_borders_of_blocks_of_gated_columns(F):
    assert_kernels_agree(tiny_config(hidden=F, mlp="swiglu"), 2, 5)


@pytest.mark.parametrize("V", around(256, 512))
def test_kernels_agree_with_the_spec_at_the_borders_of_blocks_of_the_heads_bias(V):
    assert_kernels_agree(tiny_config(vocab_size=V, tied=False, head_bias=True, final_norm=False), 2, 5)


@pytest.mark.parametrize("C", C_BORDERS)
def test_kernels_agree_with_the_spec_at_the_borders_of_blocks_of_columns(C):
    assert_kernels_agree(tiny_config(width=C, heads=1, layers=1), 2, 5)


@pytest.mark.parametrize("F", F_BORDERS)
def test_kernels_agree_with_the_spec_at_the_borders_of_blocks_of_hidden_columns(F):
    assert_kernels_agree(tiny_config(hidden=F), 2, 5)


@pytest.mark.parametrize("V", V_BORDERS)
def test_kernels_agree_with_the_spec_at_the_borders_of_vectors_of_logits(V):
    assert_kernels_agree(tiny_config(vocab_size=V), 2, 5)


@pytest.mark.parametrize("T", HEAD_BORDERS)
def test_kernels_agree_with_the_spec_at_the_borders_of_blocks_of_logits(T):
    assert_kernels_agree(tiny_config(seq_len=T, position_rows=T, layers=1), 1, T, space=True)


@pytest.mark.parametrize("B, T", [(1, 1), (3, 43), (5, 101), (7, 2), (2, 257)])
def test_kernels_agree_with_the_spec_in_a_workspace(B, T):
    assert_kernels_agree(tiny_config(seq_len=T + 2, position_rows=T + 3, width=36, hidden=70), B, T, space=True)


@both_dtypes
@pytest.mark.parametrize("V", around(960, 1920))
def test_kernels_give_the_logits_of_the_spec(V, dtype):
    cfg = tiny_config(vocab_size=V)
    _, p = random_parameters(cfg, dtype=dtype)
    for rows in (1, 3, 17):
        x = np.random.default_rng(rows).standard_normal((rows, cfg.width)).astype(dtype)
        found, expected = (ops_of(table).head_logits(x, p, cfg, ops_of(table)) for table in ("fast", "numpy"))
        assert found.dtype == dtype and relative(found, expected) < (1e-12 if dtype == np.float64 else 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start, T", [(0, 1), (0, 50), (1, 1), (47, 1), (48, 50), (97, 4), (5, 96)])
def test_kernels_attend_to_a_past_as_the_spec_does(start, T, family):
    cfg = tiny_config(**FAMILIES[family] | dict(seq_len=101, position_rows=101))
    _, p = random_parameters(cfg)
    rng = np.random.default_rng(0)
    kept = rng.standard_normal((cfg.layers, 2, 101, 2, cfg.kv_heads, cfg.head_width))
    tokens = rng.integers(0, cfg.vocab_size, (2, T))
    results = []
    for table in TABLES:
        kv = kept.copy()
        results.append((tinygpt.forward(p, tokens, cfg, ops_of(table), (kv, start))[0], kv))
    for (x, kv), (y, other) in zip(results[1:], results[:-1]):
        assert relative(x, y) < 1e-12 and relative(kv, other) < 1e-12
        assert np.array_equal(kv[:, :, :start], kept[:, :, :start])
        assert np.array_equal(kv[:, :, start + T :], kept[:, :, start + T :])


# -- bytes

BYTES = tiny_config(vocab_size=53, seq_len=101, width=24, hidden=40, position_rows=103)  # no multiple of ROW_BLOCK


def bytes_of_any_threads(pool, cfg, table, T, counts):
    """The bytes of a model's results, which are the same with each number of threads."""
    results = []
    for threads in counts:
        pool.resize(threads)
        results.append(as_bytes(run_model(cfg, table, 4, T, np.float32, True)))
    assert all(result == results[0] for result in results)
    return results[0]


def test_any_number_of_threads_gives_the_same_bytes(pool):
    bytes_of_any_threads(pool, BYTES, "fast", 101, (1, 2, 3))


def test_a_workspace_changes_no_byte():
    with_space, without = (run_model(BYTES, "fast", 4, 101, np.float32, space) for space in (True, False))
    assert as_bytes(with_space) == as_bytes(without)


@pytest.mark.parametrize("T", [101, 96, 5])
def test_micro_batches_of_any_size_give_the_same_bytes(T):
    _, p = random_parameters(BYTES, dtype=np.float32)
    batch = random_batch(BYTES, 4, T, dtype=np.float32)
    results = set()
    for size in (1, 2, 4):
        gradient, g = tinygpt.zero_gradients(BYTES)
        ops = tinygpt.with_buffers(ops_of("fast"), BYTES, size, T)
        nats = []
        for b in range(0, 4, size):
            part = (a[b : b + size] for a in batch)
            nats.append(tinygpt.loss_and_gradients(p, *part, g, BYTES, ops)[1].tobytes())
        tinygpt.add_lookup_gradient(g)
        results.add((gradient.tobytes(), b"".join(nats)))
    assert len(results) == 1


def test_micro_batches_of_the_spec_agree_to_rounding():
    _, p = random_parameters(BYTES)
    batch = random_batch(BYTES, 4, 5)
    results = []
    for size in (4, 1, 2):
        gradient, g = tinygpt.zero_gradients(BYTES, np.float64)
        for b in range(0, 4, size):
            tinygpt.loss_and_gradients(p, *(a[b : b + size] for a in batch), g, BYTES, OPS["numpy"])
        tinygpt.add_lookup_gradient(g)
        results.append(gradient)
    assert relative(results[1], results[0]) < 1e-12 and relative(results[2], results[0]) < 1e-12


def test_a_sequence_has_the_same_bytes_alone_in_a_batch_and_as_the_beginning_of_a_longer_one():
    _, p = random_parameters(BYTES, dtype=np.float32)
    tokens = random_batch(BYTES, 4, 101)[0]
    together = tinygpt.forward(p, tokens, BYTES, ops_of("fast"))[0].copy()
    for b in range(4):
        assert tinygpt.forward(p, tokens[b : b + 1], BYTES, ops_of("fast"))[0].tobytes() == together[b].tobytes()
    for T in (1, 5, 47, 48, 60, 96, 97):
        shorter = tinygpt.forward(p, tokens[:, :T], BYTES, ops_of("fast"))[0]
        assert shorter.tobytes() == together[:, :T].tobytes()


def test_a_second_run_in_the_same_buffers_gives_the_same_bytes():
    _, p = random_parameters(BYTES, dtype=np.float32)
    ops = tinygpt.with_buffers(ops_of("fast"), BYTES, 2, 101)
    results = []
    for seed in (0, 1, 0):
        gradient, g = tinygpt.zero_gradients(BYTES)
        batch = random_batch(BYTES, 2, 101, seed, np.float32)
        loss, _ = tinygpt.loss_and_gradients(p, *batch, g, BYTES, ops)
        results.append((loss, gradient.tobytes()))
    assert results[0] == results[2] != results[1]


# -- threads


@pytest.fixture(params=[1, 2, 3])
def own_pool(request):
    pool = Pool()
    pool.resize(request.param)
    yield pool
    pool.resize(1)


@fast.kernel
def mark(task, slot, times, slots):
    for _ in range(1000):  # some microseconds, so that helpers come in time for a share
        slots[task] = slot
    times[task] += 1


@fast.kernel
def fail(task, slot, first):
    if task >= first:
        raise ValueError("a task that fails")


def assert_runs(pool, count=40):
    """Each task ran once, on a slot of the pool; the slots that took part."""
    times, slots = np.zeros(count, np.int64), np.full(count, -1)
    pool.run(mark, count, times, slots)
    assert (times == 1).all()
    assert ((0 <= slots) & (slots < pool.threads)).all()
    return set(slots.tolist())


def test_each_task_runs_once_on_a_slot_of_the_pool(own_pool):
    for count in (0, 1, 2, 7, 100):
        assert_runs(own_pool, count)


def test_every_thread_takes_part(own_pool):
    own_pool.cores = own_pool.threads  # those beyond the cores may sleep
    slots, end = set(), time.monotonic() + 60  # more threads than real cores: it may take a while
    while len(slots) < own_pool.threads:
        slots |= assert_runs(own_pool)
        assert time.monotonic() < end, f"only slots {slots} ever worked"


@pytest.mark.parametrize("first", [0, 5])
def test_an_error_in_a_task_reaches_the_caller_and_the_pool_goes_on(own_pool, first):
    for _ in range(3):
        with pytest.raises(SystemError, match="fail"):
            own_pool.run(fail, 9, first)
        assert_runs(own_pool)


def test_launches_of_any_size_and_distance_lose_no_task(own_pool, monkeypatch):
    monkeypatch.setattr("fast.threads.SPINS", 200)  # helpers fall asleep all the time, and while they are being woken
    rng = np.random.default_rng(0)
    for count in rng.integers(0, 9, 4000).tolist():
        assert_runs(own_pool, count)
        if count == 8:
            time.sleep(1e-4)


def test_helpers_that_went_to_sleep_wake_up(own_pool):
    assert_runs(own_pool)
    for _ in range(3):
        time.sleep(0.15)  # SPINS looks take about a millisecond
        assert_runs(own_pool)


def test_a_pool_can_be_resized_while_idle(own_pool):
    for threads in (2, 1, 3, 3, 1):
        own_pool.resize(threads)
        assert_runs(own_pool)
        assert_runs(own_pool)
    assert own_pool.serving == 0  # helpers of the old sizes have ended


def test_two_callers_at_once_both_get_right_results():
    expected = [run_model(BYTES, "fast", 2, 101, np.float32, seed=seed) for seed in range(2)]
    found, errors = [[], []], []

    def call(seed):
        try:
            for _ in range(4):
                found[seed].append(run_model(BYTES, "fast", 2, 101, np.float32, seed=seed))
        except BaseException as error:
            errors.append(error)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not errors
    for seed in range(2):
        for results in found[seed]:
            assert all(results[name].tobytes() == x.tobytes() for name, x in expected[seed].items())


# -- scratch


def test_a_kernel_that_would_run_past_the_end_of_its_scratch_fails():
    cfg = tiny_config(width=48, hidden=64, seq_len=50, position_rows=50)
    _, p = random_parameters(cfg, dtype=np.float32)
    layer, x = p["layers"][0], np.zeros((2, 50, 48), np.float32)
    ops = tinygpt.with_buffers(ops_of("fast"), cfg, 2, 50)
    short = ops.space["scratch"][
        :, : products.BUFFER_SIZE + 50 * 48 - 1
    ].copy()  # one less than `norm_scratch` of 50 rows
    for space in ops.space["layers"]:
        space["scratch"] = short
    for sublayer in (ops.attention_layer.forward, ops.mlp_layer.forward):
        with pytest.raises(SystemError, match="failed in one of its 2 tasks"):
            sublayer(x, layer, cfg, ops)


# -- matrix products


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_of_kernels_stay_theirs_whatever_they_leave_in_their_buffers(dtype):
    cfg = tiny_config(width=48, hidden=64, seq_len=50, position_rows=50)
    _, p = random_parameters(cfg, dtype=dtype)
    ops = tinygpt.with_buffers(ops_of("fast"), cfg, 2, 50, dtype)
    for _ in range(2):
        batch, (_, g) = random_batch(cfg, 2, 50, dtype=dtype), tinygpt.zero_gradients(cfg, dtype)
        tinygpt.loss_and_gradients(p, *batch, g, cfg, ops)
        assert not workspace.uses_bf16(workspace.work_of(ops.space))


def guarded(rng, rows, columns, dtype, guard):
    """A (rows, columns) view, its rows apart and neither aligned nor at an end of its array; `guard` all around it."""
    whole = np.full((rows + 2, columns + 37), guard, dtype)
    whole[1:-1, 3 : 3 + columns] = rng.standard_normal((rows, columns))
    return whole, whole[1:-1, 3 : 3 + columns]


def call_product(a, b, c, add):
    """products.product, compiled once by itself."""
    buffer = np.full(products.BUFFER_SIZE, np.nan, c.dtype)
    strides = (a.ctypes.data, *a.strides, b.ctypes.data, b.strides[0], c.ctypes.data, c.strides[0])
    compiled = products.provide_product(c.dtype.name)["product"]
    compiled.ctypes(*strides, *c.shape, a.shape[1], int(add), buffer.ctypes.data)


def check_product(M, K, N, dtype, seed, transposed, add, product=call_product):
    rng = np.random.default_rng(seed)
    # NaN around a and b: what is read from there shows. In c a number, which must still be there.
    a = guarded(rng, K, M, dtype, np.nan)[1].T if transposed else guarded(rng, M, K, dtype, np.nan)[1]
    b = guarded(rng, K, N, dtype, np.nan)[1]
    whole, c = guarded(rng, M, N, dtype, 1234.5)
    before, old = whole.copy(), c.astype(np.float64)
    if not add:
        c[:] = np.nan  # must not be read
    product(a, b, c, add)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    expected = wide_a @ wide_b + (old if add else 0)
    bound = (K + 2) * np.finfo(dtype).eps * (np.abs(wide_a) @ np.abs(wide_b) + (np.abs(old) if add else 0))
    assert (np.abs(c - expected) <= bound).all(), (M, K, N, dtype, transposed, add)
    c[:] = before[1:-1, 3 : 3 + N]
    assert np.array_equal(whole, before), f"{(M, K, N, dtype)}: written beside c"


def check_products():
    """Shapes at the borders of tiles, vectors, panels and packing, then any."""
    seed = 0
    for dtype, lanes in LANES.items():
        rows = around(1, products.TILE_ROWS, 2 * products.TILE_ROWS, products.PACK_ROWS)
        depths = around(1, products.DEPTH, 2 * products.DEPTH)
        columns = around(1, lanes, 2 * lanes, products.TILE_VECTORS * lanes, (products.TILE_VECTORS + 2) * lanes)
        rng = np.random.default_rng(0)
        shapes = [(m, k, n) for m in rows for n in columns for k in (1, 5, 130)]
        shapes += [(m, k, 2 * lanes + 3) for m in (1, 7, 40) for k in depths]
        shapes += [(m, k, 70) for m in around(lanes, *TILE_COLUMNS) for k in (1, 5, 9, 130)]
        shapes += [tuple(int(x) for x in rng.integers(1, 300, 3)) for _ in range(30)]
        for shape in shapes:
            for transposed in (False, True):
                seed += 1
                check_product(*shape, dtype, seed, transposed, add=seed // 2 % 2 == 0)


def test_product_is_that_of_numpy_and_touches_nothing_beside_it():
    check_products()


@both_dtypes
def test_product_takes_any_strides_of_a(dtype):
    rng = np.random.default_rng(0)
    x, b = rng.standard_normal((90, 40)).astype(dtype), rng.standard_normal((20, 19)).astype(dtype)
    views = [x[::2, ::2], x[::-1, ::-2][:45], x.T[:, ::4][:, :20], np.broadcast_to(x[:1, :20], (33, 20))]
    views += [np.broadcast_to(x[:33, :1], (33, 20))]
    for a in views:
        a = a[:, :20]
        c = np.zeros((len(a), 19), dtype)
        call_product(a, b[: a.shape[1]], c, False)
        assert relative(c, a @ b[: a.shape[1]]) < 100 * np.finfo(dtype).eps


@both_dtypes
def test_product_as_kernels_call_it_is_the_same(dtype):
    products.provide_product(np.dtype(dtype).name)
    matrix = numba.from_dtype(np.dtype(dtype))[:, :]

    @numba.njit([(matrix, matrix, matrix, numba.boolean, matrix)])
    def jitted(a, b, c, add, buffers):
        products.product(a, b, c, add, (buffers[0], 0))

    def product(a, b, c, add):
        jitted(a, b, c, add, np.full((1, products.BUFFER_SIZE), np.nan, dtype))

    for seed in range(4):
        check_product(13, 130, 75, dtype, seed, seed > 1, seed % 2 == 1, product)


@both_dtypes
@pytest.mark.parametrize("K, M, N", [(1, 1, 1), (95, 63, 7), (96, 64, 128), (97, 65, 129), (200, 130, 300)])
def test_a_weight_gradient_continues_the_sums_that_it_finds(K, M, N, dtype):
    products.provide_product(np.dtype(dtype).name)
    rng = np.random.default_rng(0)
    x, dy, dw = (rng.standard_normal(shape).astype(dtype) for shape in ((N, K), (N, M), (K, M)))
    db, size = rng.standard_normal(M).astype(dtype), products.BUFFER_SIZE + math.prod(workspace.gradient_scratch())
    space = {"scratch": np.empty((POOL.threads, size), dtype), "drivers": workspace.NO_DRIVERS}
    space["panels"] = np.empty(0, dtype)
    expected_dw, expected_db = dw + x.T.astype(np.float64) @ dy, db + dy.sum(0, dtype=np.float64)
    in_two_dw, in_two_db, half = dw.copy(), db.copy(), N // 2

    def side_by_side(x, size):  # sequences of T rows
        T = math.gcd(half, N - half) or 1
        spans = [(first, min(first + size, n + T)) for n in range(0, len(x), T) for first in range(n, n + T, size)]
        x_T = np.full((len(spans), K, size), np.nan, dtype)
        for block, (first, last) in zip(x_T, spans):
            block[:, : last - first] = x[first:last].T
        return x_T, T

    panels.weight_gradient(*side_by_side(x, 16), dy, dw, db, space)
    limit = 100 * np.finfo(dtype).eps
    assert relative(dw, expected_dw) < limit and relative(db, expected_db) < limit
    for rows in (slice(0, half), slice(half, N)):
        if x[rows].size:
            panels.weight_gradient(*side_by_side(x[rows], 16), dy[rows], in_two_dw, in_two_db, space)
    assert in_two_dw.tobytes() == dw.tobytes() and in_two_db.tobytes() == db.tobytes()


AVX2 = "+64bit,+aes,+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+f16c,+fma,+fsgsbase,+fxsr,+lzcnt,+mmx,+movbe,+pclmul,+popcnt,"
AVX2 += "+rdrnd,+sahf,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3,+xsave,+xsaveopt"
FEATURES = binding.get_host_cpu_features() if platform.machine().lower() in ("x86_64", "amd64") else {}
needs_avx2 = pytest.mark.skipif(not (FEATURES.get("avx2") and FEATURES.get("fma")), reason="no AVX2 on this machine")


def run_for_avx2(statements, tmp_path):
    """In a Python of its own whose Numba compiles for a machine with 16 registers of 256 bits."""
    here = Path(__file__).resolve().parent
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2}
    environment |= {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}
    code = "import tinygpt, test_kernels\nfrom extras import check\n"
    code += f"assert test_kernels.products.TILE_VECTORS == 1\n{statements}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@needs_avx2
def test_product_is_that_of_numpy_with_the_tiles_of_avx2(tmp_path):
    run_for_avx2("test_kernels.check_products()", tmp_path)


@pytest.mark.slow
@needs_avx2
def test_kernels_agree_with_the_spec_with_the_tiles_of_avx2(tmp_path):
    run_for_avx2(
        "from conftest import tiny_config\n"
        "for T in test_kernels.T_BORDERS:\n"
        "    test_kernels.assert_kernels_agree(tiny_config(seq_len=T, position_rows=T), 2, T, True)\n"
        "for V in test_kernels.V_BORDERS:\n"
        "    test_kernels.assert_kernels_agree(tiny_config(vocab_size=V, width=36, hidden=259), 2, 5)\n"
        "assert check.main(['check']) == 0\n",
        tmp_path,
    )


# -- rows


compiled = numba.njit(**COMPILE)


@compiled
def exp_of_each(x, y):
    for i in range(x.size):
        y[i] = exp(x[i])


@compiled
def erf_of_each(x, y):
    for i in range(x.size):
        y[i] = erf_of(x[i])


@compiled
def maximum_of(x):
    return maximum(x)


def jitted_exp(x):
    y = np.empty_like(x)
    exp_of_each(x, y)
    return y


def test_exp_is_within_two_parts_in_ten_million_over_its_whole_range():
    x = np.linspace(-87, 88, 1_000_003).astype(np.float32)
    x[:3] = -87, 0, 88
    y, expected = jitted_exp(x), np.exp(x.astype(np.float64))
    assert y.dtype == np.float32 and y[1] == 1
    assert (np.abs(y - expected) / expected).max() < 2e-7
    x = np.linspace(-700, 700, 1001)
    assert (np.abs(jitted_exp(x) / np.exp(x) - 1)).max() < 1e-15


def test_erf_is_within_six_parts_in_ten_million_and_nan_stays_nan():
    x = np.linspace(-10, 10, 200_001).astype(np.float32)
    y, expected = np.empty_like(x), tinygpt.erf(x.astype(np.float64))
    erf_of_each(x, y)
    assert y.dtype == np.float32 and np.abs(y - expected).max() < 6e-7
    x = np.linspace(-10, 10, 1001)
    y = np.empty_like(x)
    erf_of_each(x, y)
    assert np.abs(y - tinygpt.erf(x)).max() < 1e-15
    for dtype in LANES:
        for value, limit in ((math.nan, math.nan), (math.inf, 1), (-math.inf, -1)):
            x = np.full(40, value, dtype)
            y = np.empty_like(x)
            erf_of_each(x, y)
            assert np.array_equal(y, np.full(40, limit, dtype), equal_nan=True)


def test_exp_is_held_at_its_ends_and_nan_stays_nan():
    for repeat in (1, 3, 40):  # alone, in the rest of a loop, in its vectors
        low, high = (
            np.repeat(np.float32([-87.5, -1e4, -math.inf]), repeat),
            np.repeat(np.float32([89, 1e30, math.inf]), repeat),
        )
        assert (jitted_exp(low) == jitted_exp(np.float32([-87]))[0]).all()
        assert (jitted_exp(high) == jitted_exp(np.float32([88]))[0]).all()
        for dtype in LANES:
            nan = np.array([math.nan, -math.nan], dtype).repeat(repeat)
            assert np.isnan(jitted_exp(nan)).all()


@both_dtypes
def test_maximum_finds_the_largest_of_any_count_anywhere(dtype):
    rng = np.random.default_rng(0)
    largest = np.finfo(dtype).max
    for count in (*range(1, 40), 63, 64, 65, 200):
        for at in {0, count // 2, count - 1}:
            for low, top in (
                (-3, 2),
                (-9, -4),
                (-largest, -1e-38),
                (-math.inf, -largest),
                (0.0, 1e-44),
                (-1, math.inf),
            ):
                x = np.full(count + 5, math.inf, dtype)  # beyond count: not looked at
                x[:count] = low * rng.uniform(0.9, 1, count) if math.isfinite(low) else low
                x[at] = top
                assert maximum_of(x[:count]) == dtype(top)


def head_of_scores(scores, targets, dtype):
    """Nats of the targets and gradient of the scores, each target weighing 1/2, of a head whose bias is all it has."""
    cfg = tiny_config(vocab_size=len(scores), tied=False, head_bias=True, final_norm=False)
    p = tinygpt.views(tinygpt.layout(cfg), tinygpt.zero_gradients(cfg, dtype)[0], cfg.layers)
    _, g = tinygpt.zero_gradients(cfg, dtype)
    p["head_b"][:] = scores
    x, weights = np.ones((1, len(targets), cfg.width), dtype), np.full((1, len(targets)), 0.5, dtype)
    _, nats, _ = ops_of("fast").head_loss(x, np.array([targets]), weights, p, g, cfg, ops_of("fast"))
    return nats[0], g["head_b"]


@both_dtypes
@pytest.mark.parametrize("V", (2, 7, 16, 33, *around(workspace.VOCABULARY_BLOCK), 300))
def test_the_softmax_of_the_head_is_that_of_numpy(V, dtype):
    scores, targets = (4 * np.random.default_rng(V).standard_normal(V)).astype(dtype), [0, V // 2, V - 1]
    odds = np.exp(scores.astype(np.float64))
    nats, gradient = head_of_scores(scores, targets, dtype)
    limit = 20 * np.finfo(dtype).eps
    assert relative(nats, np.log(odds.sum()) - scores[targets]) < limit
    assert relative(gradient, 0.5 * (3 * odds / odds.sum() - np.bincount(targets, minlength=V))) < limit


@both_dtypes
def test_the_softmax_of_the_head_bears_huge_and_equal_scores(dtype):
    large = float(np.finfo(dtype).max) / 4
    for value in (0.0, large, -large, 1e-30):
        nats, gradient = head_of_scores(np.full(20, value, dtype), [3], dtype)
        assert nats == pytest.approx(math.log(20), rel=1e-6)
        assert gradient == pytest.approx([0.025 - 0.5 * (v == 3) for v in range(20)], rel=1e-5)
    nats, gradient = head_of_scores(np.array([-large, large, 0, large, -math.inf], dtype), [1], dtype)
    assert nats == pytest.approx(math.log(2), rel=1e-6)
    assert gradient == pytest.approx([0, -0.25, 0, 0.25, 0], abs=1e-30, rel=1e-6)


@both_dtypes
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_the_softmax_of_the_head_shows_what_is_no_number(bad, dtype):
    for V in (2, 16, 130):
        for at in {0, V // 2, V - 1}:
            scores = np.linspace(-2, 2, V).astype(dtype)
            scores[at] = bad
            nats, gradient = head_of_scores(scores, [1], dtype)
            assert np.isnan(nats).all() and np.isnan(gradient).any()


# -- compiling


def test_functions_of_fast_have_at_most_twelve_parameters_and_files_at_most_600_lines():
    for path in Path(fast.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 600 and "# fmt: skip" not in text, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert len(node.args.args) <= 12, (path.name, node.name)


@pytest.mark.slow
def test_two_halves_compile_all_that_training_runs(tmp_path):
    """In processes of their own: what they leave in the cache is all that an update of the model needs."""
    root = str(Path(tinygpt.__file__).parent)
    config = "tinygpt.SIZES['1m'].changed(vocab_size=300)"
    halves = [f"fast.compile_half({config}, {half})" for half in (0, 1)]
    update = f"""
cfg = {config}
p, (_, g) = tinygpt.views(tinygpt.layout(cfg), tinygpt.init_parameters(cfg, 0), cfg.layers), tinygpt.zero_gradients(cfg)
tokens, ops = np.zeros((2, cfg.seq_len), np.int64), tinygpt.with_buffers(fast.FLOAT32, cfg, 2, cfg.seq_len)
weights = np.ones(tokens.shape, np.float32)
tinygpt.loss_and_gradients(p, tokens, tokens, weights, g, cfg, ops)
modules = [m for name, m in sys.modules.items() if name.startswith('fast.')]
kernels = {{id(k): k for m in modules for k in vars(m).values() if hasattr(k, 'stats')}}.values()
print(sum(sum(k.stats.cache_hits.values()) for k in kernels), sum(sum(k.stats.cache_misses.values()) for k in kernels))
"""
    found = []
    for code in (*halves, "print(fast.is_compiled())", update):
        words = [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {root!r}); import numpy as np, fast, tinygpt; {code}",
        ]
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        found.append(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip())
    hits, misses = map(int, found[-1].split())
    assert found[:3] == ["", "", "True"]
    assert hits >= 15 and misses == 0


COMPILED_ANEW = """
import hashlib, sys
import numpy as np
import fast, tinygpt
cfg = tinygpt.Config(vocab_size=300, seq_len=40, width=48, layers=1, heads=2, hidden=96)
p, (flat, g) = tinygpt.views(tinygpt.layout(cfg), tinygpt.init_parameters(cfg, 0), 1), tinygpt.zero_gradients(cfg)
rng = np.random.default_rng(0)
x, targets = rng.standard_normal((2, 40, 48)).astype(np.float32), rng.integers(0, 300, (2, 40))
ops = fast.FLOAT32
y, cache = ops.mlp_layer.forward(x, p["layers"][0], cfg, ops)
_, nats, dy = ops.head_loss(y, targets, np.ones((2, 40), np.float32), p, g, cfg, ops)
dx = ops.mlp_layer.backward(dy, cache, p["layers"][0], g["layers"][0], cfg, ops)
print(*(hashlib.sha256(a.tobytes()).hexdigest()[:12] for a in (y, nats, dy, dx, flat)))
"""


def test_kernels_from_the_cache_give_the_bytes_of_kernels_compiled_anew(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(tinygpt.__file__).parent)}
    command = [sys.executable, "-c", COMPILED_ANEW]
    anew, cached = (subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2))
    assert anew.returncode == 0, anew.stderr
    assert cached.stdout == anew.stdout


NORM_ROWS = """
import numpy as np
from fast.embed import norm_kernel
from fast.jit import STAMP
from fast.rows import RMSNORM
from fast.threads import POOL
x, ones, stats = np.full((3, 16), 2.0, np.float32), np.ones(16, np.float32), np.empty((2, 3), np.float32)
POOL.run(norm_kernel, 1, x, (RMSNORM, ones, ones, 0.0), 3, stats, x)
print(x[0, 0], sum(norm_kernel.stats.cache_hits.values()), STAMP)
"""


def replace_in(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} no longer says {old!r} once"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_an_edited_part_is_seen_by_kernels_of_other_files_though_the_cache_is_warm(tmp_path):
    root, package, cache = Path(tinygpt.__file__).parent, tmp_path / "fast", tmp_path / "cache"
    shutil.copy2(root / "tinygpt.py", tmp_path)
    shutil.copytree(root / "fast", package, ignore=shutil.ignore_patterns("__pycache__"))

    def run():
        """What NORM_ROWS prints: a number, whether its kernel came from the cache, the stamp."""
        words, environment = [sys.executable, "-c", NORM_ROWS], os.environ | {"NUMBA_CACHE_DIR": str(cache)}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=True)
        number, hits, stamp = done.stdout.split()
        return float(number), int(hits), stamp

    def stamps():
        """Of the files in the cache."""
        return {re.search(r"-([0-9a-f]{10})-\d+\.py", path.name)[1] for path in cache.rglob("*.nb[ci]")}

    (number, hits, first), again = run(), run()
    assert (number, hits) == (2, 0) and again == (2, 1, first) and stamps() == {first}
    replace_in(package / "rows.py", "y[i, c] = (x[i, c] - m) * r * w[c] + b[c]", "y[i, c] = (x[i, c] - m) * r * w[c]")
    number, hits, second = run()
    assert (number, hits) == (1, 0) and second != first and stamps() == {second}
    # what compiled code takes from tinygpt.py counts as well
    replace_in(tmp_path / "tinygpt.py", "0.044715  # the tanh form", "0.044716  # the tanh form")
    assert run()[1:] != (1, second)
    # negative control: with one stamp for all sources, the machine code would be the old one
    replace_in(package / "jit.py", "STAMP = stamp()", "STAMP = 'f' * 10")
    assert run()[:2] == (1, 0)
    replace_in(package / "rows.py", "y[i, c] = (x[i, c] - m) * r * w[c]\n", "y[i, c] = 7\n")
    assert run()[:2] == (1, 1)


def test_old_kernels_are_removed_as_far_as_others_allow(tmp_path, monkeypatch):
    names = [f"rows.f-{stamp}-12.py311.{end}" for stamp in (STAMP, "0123456789") for end in ("nbi", "1.nbc")]
    others = ["rows.py", "rows.f-12.py311.nbi", "notes-0123456789-1.py"]
    for name in names + others:
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path: (_ for _ in ()).throw(PermissionError(13, "read-only")))
        remove_old_kernels(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, *others}
    remove_old_kernels(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names[:2], *others}
