"""fast/bf16.py: the driver with each innermost block that this machine has, the kernels through it, bf16 training
against float32, what happens without tiles, and the machine code where nobody can run it."""

import functools
import math
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import vector_unit
from conftest import as_bytes, ops_of, random_batch, random_parameters, relative, run_model, tiny_config
from helpers import interrupt_at, invoke, losses, model_bytes, read_log, refusal, trained
from llvmlite import binding
from test_kernels import around, bytes_of_any_threads, guarded

import fast
import tinygpt
import train
from extras import check
from fast import bf16, workspace

INSTRUCTIONS = [kind for kind in bf16.INSTRUCTIONS if bf16.hindrance(kind) is None]  # that this processor has
HAS_UNIT = "amx" in INSTRUCTIONS
KINDS = ["float64", *bf16.STAND_INS, *INSTRUCTIONS]
every_kind = pytest.mark.parametrize("kind", KINDS)
in_bf16 = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float64"])


# -- the driver


def multiply_packed(a, b, c, add, kind, blocks, turned, both):
    """c = a b, or c += a b if add, through the driver: b (if turned from its columns), or both, packed in pieces,
    and asked for in two products: cut between blocks of depth, or between rows of a packed a."""
    (M, K), N, b = a.shape, b.shape[1], np.asfortranarray(b) if turned else b
    (driver, layer), words = bf16.compile_driver(bf16.DTYPES[kind]), bf16.driver_words(1, kind, blocks).copy()
    high, deep, wide = (-(-n // 32) * 32 for n in (M, K, N))
    room = tinygpt.aligned(deep * (high + wide), a.dtype)
    room[:] = np.nan
    packed_b, packed_a = room[: deep * wide].reshape(deep, wide), room[deep * wide :].reshape(high, deep)
    words[0, bf16.FIRST], words[0, bf16.END] = room.ctypes.data, room.ctypes.data + room.nbytes
    driver_at, b_row, piece = words.ctypes.data, packed_b.strides[0], 2 * bf16.SQUARE
    for first in range(0, N, piece):
        x = b[:, first : first + piece]
        assert layer.ctypes(x.ctypes.data, *x.strides, packed_b.ctypes.data, b_row, first, *x.shape, 0, driver_at)
    for first in range(0, M if both else 0, piece):
        x, to = a[first : first + piece], packed_a[first:]
        assert layer.ctypes(x.ctypes.data, *x.strides, to.ctypes.data, to.strides[0], 0, *x.shape, 1, driver_at)
    cut = bf16.SQUARE if both else bf16.STEP * blocks[1]
    for part in (slice(0, cut), slice(cut, None)):
        left, k, rows = (packed_a[part], 0, part) if both else (a[:, part], part.start, slice(None))
        M, K = c[rows].shape[0], a.shape[1] if both else left.shape[1]
        if M and K:
            addresses = (left.ctypes.data, *left.strides, packed_b.ctypes.data + k * b_row, b_row)
            assert driver.ctypes(*addresses, c[rows].ctypes.data, c.strides[0], M, N, K, add or k > 0, driver_at)
    return c


def check_product(M, K, N, kind, seed, transposed, add, blocks):
    """Against float64 of the rounded operands; nothing beside a, b and c is read or written."""
    rng, dtype = np.random.default_rng(seed), bf16.dtype_of(kind)
    a = guarded(rng, K, M, dtype, np.nan)[1].T if transposed else guarded(rng, M, K, dtype, np.nan)[1]
    b = guarded(rng, K, N, dtype, np.nan)[1]
    whole, c = guarded(rng, M, N, dtype, 1234.5)
    before, old = whole.copy(), c.astype(np.float64)
    if not add:
        c[:] = np.nan  # must not be read
    if seed % 2:
        bf16.multiply(a, b, c, add, kind, blocks)
    else:
        multiply_packed(a, b, c, add, kind, blocks, turned=seed % 4 == 0, both=seed % 8 < 4)
    wide_a, wide_b = ((x if kind == "float64" else bf16.rounded(x)).astype(np.float64) for x in (a, b))
    expected = wide_a @ wide_b + (old if add else 0)
    bound = (K + 2) * np.finfo(dtype).eps * (np.abs(wide_a) @ np.abs(wide_b) + (np.abs(old) if add else 0))
    assert (np.abs(c - expected) <= bound).all(), (M, K, N, kind, transposed, add, blocks)
    c[:] = before[1:-1, 3 : 3 + N]
    assert np.array_equal(whole, before), f"{(M, K, N, kind, blocks)}: written beside c"


def borders(size):
    return around(1, bf16.TILE, bf16.SQUARE, size)


@every_kind
@pytest.mark.parametrize("blocks", [(1, 1), (1, 2), (2, 1), (3, 4)])
def test_products_are_right_at_the_borders_of_tiles_and_of_small_blocks(kind, blocks):
    rows, depth = (bf16.SQUARE * n for n in blocks)
    shapes = [(m, k, n) for m in (*borders(rows), rows + 33) for n in (1, 16, 31, 33, 64) for k in (32, 47)]
    shapes += [(m, k, 37) for m in (2, 40, 70) for k in (*borders(depth), 2 * depth + 5)]
    for seed, shape in enumerate(shapes):
        for transposed in (False, True):
            if min(shape[:2]) > 1:
                check_product(*shape, kind, seed, transposed, seed % 3 == 0, blocks)


@every_kind
def test_products_are_right_at_the_borders_of_the_blocks_that_train(kind):
    rows, depth = (bf16.SQUARE * n for n in bf16.BLOCKS)
    shapes = [(m, 40, 50) for m in around(rows)] + [(40, k, 50) for k in around(depth)] + [(rows + 7, depth + 9, 70)]
    for seed, shape in enumerate(shapes):
        for transposed in (False, True):
            check_product(*shape, kind, seed, transposed, seed % 2 == 0, bf16.BLOCKS)


@every_kind
def test_a_may_have_any_strides(kind):
    rng, dtype = np.random.default_rng(0), bf16.dtype_of(kind)
    x, b = rng.standard_normal((90, 80)).astype(dtype), rng.standard_normal((40, 19)).astype(dtype)
    views = [x[::2, ::2], x[::-1, ::-2][:45], x.T[:, ::2][:, :40], np.broadcast_to(x[:1, :40], (33, 40))]
    views += [np.broadcast_to(x[:33, :1], (33, 40)), x[:33].T[:40].T, x[5:50, 3:43], x.T[5:50, 3:43]]
    for a in views:
        c = bf16.multiply(a[:, :40], b, np.zeros((len(a), 19), dtype), False, kind)
        wide_a, wide_b = (np.ascontiguousarray(x) for x in (a[:, :40], b))
        exact = wide_a @ wide_b if kind == "float64" else bf16.rounded(wide_a).astype(np.float64) @ bf16.rounded(b)
        assert relative(c, exact) < 100 * np.finfo(dtype).eps


@in_bf16
def test_neither_blocks_nor_neighbours_change_a_byte(kind):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((70, 150)).astype(np.float32), rng.standard_normal((150, 90)).astype(np.float32)
    whole = bf16.multiply(a, b, np.zeros((70, 90), np.float32), False, kind)
    for blocks in ((1, 1), (2, 3), (1, 7)):
        assert bf16.multiply(a, b, np.zeros_like(whole), False, kind, blocks).tobytes() == whole.tobytes()
    part = bf16.multiply(a[13:60], b[:, 7:80].copy(), np.zeros((47, 73), np.float32), False, kind)
    assert np.array_equal(part, whole[13:60, 7:80])
    turned = bf16.multiply(a.T.copy().T, b, np.zeros_like(whole), False, kind)
    assert turned.tobytes() == whole.tobytes()


@in_bf16
def test_sums_that_go_on_are_those_of_one_product(kind):
    """Rows of tokens in two goes, cut where a step of 32 ends: what makes micro-batches of such windows the same."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((40, 160)).astype(np.float32), rng.standard_normal((160, 50)).astype(np.float32)
    once = bf16.multiply(a, b, np.ones((40, 50), np.float32), True, kind)
    twice = np.ones((40, 50), np.float32)
    for part in (slice(0, 64), slice(64, 160)):
        bf16.multiply(a[:, part], b[part], twice, True, kind)
    assert twice.tobytes() == once.tobytes()


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_an_instruction_gives_the_bytes_of_its_stand_in(kind):
    rng = np.random.default_rng(2)
    for shape in SHAPES:
        a, b = operands(rng, *shape, False)
        found, expected = (
            bf16.multiply(a, b, np.ones(shape[::2], np.float32), True, name) for name in (kind, f"{kind} stand-in")
        )
        assert found.tobytes() == expected.tobytes(), shape


def test_each_kind_sums_in_the_order_that_innermost_states():
    """In float64 the fused sums of a chain, each rounded to float32: but for one in 2^29, as the processor does."""
    rng = np.random.default_rng(3)
    a, b = (bf16.rounded(x * np.exp(rng.uniform(-4, 4, x.shape))) for x in operands(rng, 2, 64, 8, False))
    start = rng.standard_normal((2, 8)).astype(np.float32)

    def chain(total, columns):
        for k in columns:
            total = (a[:, k, None].astype(np.float64) * b[k] + total).astype(np.float32)
        return total

    amx = start
    for first in (0, 32):
        even, odd = (chain(np.zeros((2, 8), np.float32), range(first + side, first + 32, 2)) for side in (0, 1))
        amx = amx + (even + odd)
    avx512 = chain(start, [k ^ 1 for k in range(64)])
    for kind, expected in zip(bf16.STAND_INS, (amx, avx512)):
        found = bf16.multiply(a, b, start.copy(), True, kind)
        assert found.tobytes() == expected.tobytes(), kind
    assert amx.tobytes() != avx512.tobytes() != chain(start, range(64)).tobytes()


def test_small_products_are_left_to_others_and_c_as_it_was():
    least = bf16.driver_words(1, "amx stand-in", bf16.BLOCKS)[0, bf16.LEAST]
    assert least == bf16.LEAST_EXTENT == 32
    for shape in ((31, 80, 40), (40, 31, 80), (80, 40, 31), (1, 80, 40)):
        (M, K, N), c = shape, np.full(shape[::2], 7.0, np.float32)
        a, b = np.ones((M, K), np.float32), np.ones((K, N), np.float32)
        with pytest.raises(ValueError, match="is small; expected no extent below 32"):
            bf16.multiply(a, b, c, False, "amx stand-in", least=least)
        assert (c == 7).all()
    bf16.multiply(
        np.ones((32, 32), np.float32),
        np.ones((32, 32), np.float32),
        c := np.zeros((32, 32), np.float32),
        False,
        "amx stand-in",
        least=least,
    )
    assert (c == 32).all()


# -- rounding

SPECIAL = [0, 1, -1, 3.389e38, -3.3961776e38, 3.4028235e38, math.inf, -math.inf, math.nan, -math.nan, 1e-37, -1.5e-30]


def nearest(x):
    """float32 -> bf16 by its definition: of the two around it the nearest, of two as near the one with an even bit."""
    bits, x = x.view(np.uint32), x.astype(np.float64)
    below = bits & np.uint32(0xFFFF0000)
    above = (below + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    below = below.view(np.float32).astype(np.float64)
    above = np.where(np.isinf(above), np.copysign(2.0**128, x), above)  # as if there were one more
    down, up = np.abs(x - below), np.abs(x - above)
    found = np.where((up < down) | ((up == down) & (bits >> 16 & 1 == 1)), above, below)
    found = np.where(np.abs(found) == 2.0**128, np.copysign(math.inf, x), found)
    return np.where(np.isfinite(x), found, x)


@in_bf16
def test_operands_are_rounded_to_the_nearest_of_two_the_even_one(kind):
    rng = np.random.default_rng(0)
    random = (rng.standard_normal(1000) * np.exp(rng.uniform(-60, 60, 1000))).astype(np.float32)
    halves = ((rng.integers(0x3000, 0x5000, 500).astype(np.uint32) << 16) + 0x8000).view(np.float32)
    x = np.concatenate([random, halves, np.array(SPECIAL, np.float32)])
    x = np.concatenate([x, np.zeros(-len(x) % 64, np.float32)])
    with np.errstate(invalid="ignore", over="ignore"):
        expected = nearest(x)
        assert np.array_equal(bf16.rounded(x), expected.astype(np.float32), equal_nan=True)
    one = np.zeros((32, 32), np.float32)
    one[0] = 1
    rows = np.zeros((len(x), 32), np.float32)
    rows[:, 0] = x
    turned, odd = np.ascontiguousarray(rows.T).T, np.zeros((len(x), 64), np.float32)[:, ::2]
    odd[:] = rows
    for a in (rows, turned, odd):  # three ways into a tile
        c = bf16.multiply(a, one, np.zeros((len(x), 32), np.float32), False, kind)
        assert all(np.array_equal(column, expected, equal_nan=True) for column in c.T)
    b = np.zeros((32, len(x)), np.float32)
    b[0] = x
    c = bf16.multiply(one.T, b, np.zeros((32, len(x)), np.float32), False, kind)
    assert all(np.array_equal(row, expected, equal_nan=True) for row in c)


def operands(rng, M, K, N, positive):
    draw = (lambda shape: rng.uniform(0.5, 1.5, shape)) if positive else rng.standard_normal
    return draw((M, K)).astype(np.float32), draw((K, N)).astype(np.float32)


def error_beside_rounding(a, b, c):
    """Error of c = a b, and of the exact product of operands in bf16, against float64: the largest, of one scale."""
    exact = a.astype(np.float64) @ b
    rounded = bf16.rounded(a).astype(np.float64) @ bf16.rounded(b)
    return np.abs(c - exact).max() / np.abs(rounded - exact).max()


SHAPES = [(96, 128, 384), (96, 512, 128), (96, 2048, 64), (132, 128, 256), (256, 32, 64), (48, 64, 64), (5, 17, 3)]


@in_bf16
@pytest.mark.parametrize("positive", [False, True], ids=["of both signs", "positive"])
def test_products_err_at_most_twice_as_much_as_rounding_the_operands(kind, positive):
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        a, b = operands(rng, *shape, positive)
        c = bf16.multiply(a, b, np.zeros((len(a), b.shape[1]), np.float32), False, kind)
        assert 0 < error_beside_rounding(a, b, c) <= 2, shape


def test_cutting_operands_off_instead_of_rounding_is_noticed():
    a, b = operands(np.random.default_rng(0), 96, 128, 384, True)
    cut_a, cut_b = ((x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64) for x in (a, b))
    assert error_beside_rounding(a, b, cut_a @ cut_b) > 2


# -- the kernels through it


@pytest.fixture(params=[(1, 1), bf16.BLOCKS], ids=["blocks of a tile", "blocks that train"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(bf16, "make_drivers", lambda *of: bf16.driver_words(*of, request.param).copy())
    return request.param


@pytest.mark.parametrize("T", [*around(32, 64), *around(workspace.ROW_BLOCK, 2 * workspace.ROW_BLOCK)])
def test_kernels_agree_with_the_spec_at_the_borders_of_tiles(T, blocks):
    for shape in (dict(width=36, hidden=70, vocab_size=67), dict(width=33, heads=1, mlp="swiglu", hidden=31)):
        cfg = tiny_config(**shape | dict(seq_len=T, position_rows=T))
        exact, found = (
            run_model(cfg, table, 2, T, np.float64, table == "fast-bf16") for table in ("numpy", "fast-bf16")
        )
        for name in exact:
            assert relative(found[name], exact[name]) < 1e-12, name


@pytest.mark.parametrize("mlp", ["gelu-tanh", "swiglu"])
def test_kernels_agree_with_the_spec_beyond_what_they_work_on_at_a_time(mlp, blocks):
    more = dict(vocab_size=workspace.BF16_VOCABULARY_BLOCK + 33, hidden=workspace.HIDDEN_BLOCK + 38)
    cfg = tiny_config(**more, mlp=mlp, width=24, heads=1, seq_len=41, position_rows=41, layers=1)
    exact, found = (run_model(cfg, table, 2, 41, np.float64, table == "fast-bf16") for table in ("numpy", "fast-bf16"))
    for name in exact:
        assert relative(found[name], exact[name]) < 1e-12, name


@pytest.mark.parametrize("shape", [dict(), dict(width=36, hidden=70, seq_len=33, position_rows=33, layers=1)])
def test_gradients_through_the_driver_are_derivatives(shape, blocks):
    errors = check.check_model(tiny_config(**shape), ops_of("fast-bf16"), seed=2)
    assert max(error for _, error in errors) < 1e-6, errors


@pytest.mark.parametrize("word, count", [(bf16.MULTIPLY, 12), (bf16.PACK, 10)])
def test_a_driver_that_does_nothing_is_noticed_and_one_that_packs_nothing(monkeypatch, word, count):
    """In float64 no product is so small that it is left to others."""
    names = ", ".join(f"x{i}" for i in range(count))
    says_that_it_did = numba.cfunc(numba.types.intp(*[numba.types.intp] * count))(eval(f"lambda {names}: 1"))
    words = bf16.driver_words(fast.POOL.threads, "float64", bf16.BLOCKS).copy()
    words[:, word] = says_that_it_did.address
    monkeypatch.setattr(bf16, "make_drivers", lambda threads, kind: words)
    exact, found = (run_model(tiny_config(), table, 2, 5, np.float64) for table in ("numpy", "fast-bf16"))
    for name in ("qkv_w", "out_w", "up_w", "down_w", "embed_w"):
        assert not relative(found[name], exact[name]) < 0.1, name


def test_buffers_say_who_multiplies_before_and_after_any_op(blocks):
    cfg = tiny_config(width=48, hidden=64, seq_len=50, position_rows=50)
    _, p = random_parameters(cfg, dtype=np.float32)
    batch, results, drivers = random_batch(cfg, 2, 50, dtype=np.float32), [], []
    tables = {name: tinygpt.with_buffers(ops_of(name), cfg, 2, 50) for name in ("fast", "fast-bf16")}
    for name in ("fast", "fast-bf16", "fast", "fast-bf16"):
        ops = tables[name]
        gradient, g = tinygpt.zero_gradients(cfg)
        tinygpt.loss_and_gradients(p, *batch, g, cfg, ops)
        results.append(gradient.tobytes())
        with pytest.raises(AttributeError):
            ops.mlp_layer.forward(None, p["layers"][0], cfg, ops)
        drivers.append(ops.space["drivers"].tobytes())
    assert results[0] == results[2] != results[1] == results[3]
    assert drivers[0] == drivers[2] == b"" != drivers[1] == drivers[3]


def test_the_head_that_samples_and_decoding_stay_in_float32():
    tables, cfg = [ops_of(name) for name in ("fast", "fast-bf16")], tiny_config(width=48, heads=2, vocab_size=97)
    names = "embed head_logits steps".split()
    assert all(getattr(tables[0], name) is getattr(tables[1], name) for name in names)
    _, p = random_parameters(cfg, dtype=np.float32)
    x, found = np.random.default_rng(0).standard_normal((40, 48)).astype(np.float32), set()
    for ops in (*tables, *(tinygpt.with_buffers(ops, cfg, 2, 5) for ops in tables)):
        found.add(ops.head_logits(x, p, cfg, ops).tobytes())
    assert len(found) == 1


WIDE = tiny_config(vocab_size=301, seq_len=70, position_rows=70, width=72, hidden=141, layers=1)


@pytest.fixture(params=[kind for kind in KINDS if kind != "float64"])
def order(request, monkeypatch):
    """Products of float32 by this kind."""
    monkeypatch.setitem(bf16.KINDS, "float32", request.param)
    return request.param


def test_any_number_of_threads_gives_the_same_bytes(pool, order):
    """Threads change the blocks of a weight gradient: 141 rows are 132 and 9, or 66, 66 and 9."""
    found = bytes_of_any_threads(pool, WIDE, "fast-bf16", 70, (1, 2, 4))
    assert found != as_bytes(run_model(WIDE, "fast", 4, 70, np.float32, True))


@pytest.mark.parametrize("T", [32, 64, 96])
def test_micro_batches_of_windows_of_whole_steps_change_no_byte(T, order):
    cfg = WIDE.changed(seq_len=T, position_rows=T)
    _, p = random_parameters(cfg, dtype=np.float32)
    batch, results = random_batch(cfg, 4, T, dtype=np.float32), set()
    for size in (1, 2, 4):
        gradient, g = tinygpt.zero_gradients(cfg)
        ops = tinygpt.with_buffers(ops_of("fast-bf16"), cfg, size, T)
        for b in range(0, 4, size):
            tinygpt.loss_and_gradients(p, *(x[b : b + size] for x in batch), g, cfg, ops)
        results.add(gradient.tobytes())
    assert len(results) == 1


# -- without tiles

REASONS = {
    "another processor": ("platform.machine", lambda: "aarch64", "are used on Linux x86_64 only, this is .* aarch64"),
    "another system": ("platform.system", lambda: "Darwin", "are used on Linux x86_64 only, this is Darwin "),
    "no flag": ("compiles_for", lambda feature: False, "this processor has no bf16 tiles"),
    "refused": ("ask_linux", lambda: 1, "Linux refuses the tile registers of this processor .Operation not permitted"),
    "wrong": ("product_error", lambda kind: 0.5, r"Intel AMX fails its test here .relative error 5.0e-01"),
    "not a number": ("product_error", lambda kind: math.nan, "fails its test here"),
}


@pytest.fixture(params=REASONS)
def hindrance(request, monkeypatch):
    """A machine that has all that AMX takes but one thing, and no AVX512-BF16; what is said of it."""
    monkeypatch.setattr("fast.bf16.platform.system", lambda: "Linux")
    monkeypatch.setattr("fast.bf16.platform.machine", lambda: "x86_64")
    usual = (("compiles_for", True), ("ask_linux", 0), ("product_error", 1e-7), ("converts", False))
    for name, value in usual:
        monkeypatch.setattr(bf16, name, lambda *_, value=value: value)
    assert bf16.find_bf16() == ("amx", None)
    name, pretended, reason = REASONS[request.param]
    monkeypatch.setattr(f"fast.bf16.{name}", pretended)
    return f"{reason}.*; this processor has no AVX512-BF16"


def test_a_processor_without_tiles_multiplies_by_avx512_bf16(hindrance, monkeypatch):
    assert bf16.find_bf16()[0] is None
    monkeypatch.setattr(bf16, "converts", lambda: True)
    monkeypatch.setattr(bf16, "product_error", lambda kind: 1e-7 if kind == "avx512" else 1)
    assert bf16.find_bf16() == ("avx512", None)
    monkeypatch.setattr(bf16, "product_error", lambda kind: 1)
    assert "AVX512-BF16 fails its test here" in bf16.find_bf16()[1]


STEPS = ["--steps", 3, "--eval-every", 3]


@pytest.mark.parametrize("asked", [[], ["--dtype", "auto"], ["--dtype", "bfloat16"]])
def test_what_hinders_tiles_is_said_in_one_line_and_float32_trains(place, text, monkeypatch, hindrance, asked):
    monkeypatch.setattr(fast, "find_bf16", bf16.find_bf16)
    _, err = trained("--data", text, *STEPS, *asked)
    assert [line for line in err.splitlines() if "float32" in line] == [
        line for line in err.splitlines() if line.startswith("precision float32: ")
    ]
    line = next(line for line in err.splitlines() if line.startswith("precision "))
    assert re.search(hindrance, line), line
    assert read_log()[0]["settings"]["dtype"] == "float32" and "--dtype float32" in read_log()[0]["command"]
    with_reason = model_bytes()
    trained("--data", text, *STEPS, "--dtype", "float32")
    assert model_bytes("runs/tiny-2") == with_reason


@pytest.mark.skipif(HAS_UNIT or sys.platform != "linux" or platform.machine() != "x86_64", reason="nobody to refuse it")
def test_linux_itself_refuses_what_the_processor_does_not_have(monkeypatch):
    monkeypatch.setattr(bf16, "compiles_for", lambda feature: True)
    assert bf16.hindrance("amx").startswith("Linux refuses the tile registers of this processor (")


@pytest.mark.parametrize("kind", sorted({*bf16.INSTRUCTIONS} - {*INSTRUCTIONS}))
def test_the_table_says_why_it_cannot_multiply(monkeypatch, kind):
    monkeypatch.setitem(bf16.KINDS, "float32", kind)
    with pytest.raises(ValueError, match="bf16 tiles|Linux refuses|no AVX512-BF16"):
        run_model(tiny_config(), "fast-bf16", 2, 5, np.float32)


def test_the_table_of_bfloat16_is_there_where_an_instruction_is(monkeypatch):
    monkeypatch.setattr(fast, "find_bf16", lambda: (None, "this processor has none"))
    with pytest.raises(ValueError, match="^no products in bfloat16: this processor has none$"):
        tinygpt.find_ops("fast", "bfloat16")
    monkeypatch.setattr(fast, "find_bf16", lambda: ("amx", None))
    assert tinygpt.find_ops("fast", "bfloat16") is fast.BFLOAT16


def test_bfloat16_is_refused_with_the_specification_and_where_nothing_trains(place, text):
    message = refusal(train.main, "train.py", "--data", text, "--kernels", "numpy", "--dtype", "bfloat16")
    assert message.startswith("--dtype bfloat16 is about the products of --kernels fast")
    _, err = trained("--data", text, *STEPS, "--kernels", "numpy")
    assert "precision float32\n" in err


# -- training


@pytest.fixture
def with_tiles(place, monkeypatch):
    monkeypatch.setattr(fast, "find_bf16", lambda: ([*INSTRUCTIONS, "amx"][0], None))


MODEL = ["--set", "width=48", "heads=2", "hidden=96"]  # so wide that products go through tiles


def test_bfloat16_is_said_and_kept_in_the_settings(with_tiles, text):
    _, err = trained("--data", text, *STEPS, "--prompt", "Lily")
    name = bf16.INSTRUCTIONS[[*INSTRUCTIONS, "amx"][0]]
    assert f"\nprecision bfloat16 products by {name}, which this processor has; float32 for all else\n" in err
    first = read_log()[0]
    assert first["settings"]["dtype"] == "bfloat16" and "--dtype bfloat16" in first["command"]
    checkpoint = tinygpt.load_checkpoint("runs/tiny/last.safetensors")
    assert {checkpoint.parameters.dtype, *(x.dtype for x in checkpoint.extra.values())} == {np.dtype(np.float32)}


def test_a_bfloat16_run_that_is_interrupted_gives_the_same_bytes(with_tiles, text, monkeypatch, pool):
    words = ["--data", text, "--steps", 8, "--eval-every", 4, "--micro-batch-size", 2, *MODEL]
    pool.resize(2)
    trained(*words)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(train.main, "--size", "tiny", *words)[0] == 130
    status, _, err = invoke(train.main, "--resume", "--threads", 1)
    assert status == 0 and "precision bfloat16" in err
    assert model_bytes("runs/tiny-2") == model_bytes()
    trained(*words, "--dtype", "float32")
    assert model_bytes("runs/tiny-3") != model_bytes()


def test_a_bfloat16_run_does_not_go_on_without_tiles(with_tiles, text, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        words = ["--data", text, "--steps", 6, "--micro-batch-size", 2]
        assert invoke(train.main, "--size", "tiny", *words)[0] == 130
    monkeypatch.setattr(fast, "find_bf16", lambda: (None, "this processor has no bf16 tiles (Intel AMX)"))
    message = refusal(train.main, "train.py", "--resume")
    assert "multiplies in bfloat16 by a" in message and ", but this processor has no bf16 tiles" in message
    monkeypatch.setattr(fast, "find_bf16", lambda: ("another", None))
    assert ", but this machine does by another; " in refusal(train.main, "train.py", "--resume")
    monkeypatch.setattr(fast, "find_bf16", lambda: (None, "this processor has no bf16 tiles (Intel AMX)"))
    assert "--init-from" in message and "last.safetensors" in message
    status, _, err = invoke(train.main, "--init-from", "runs/tiny/last.safetensors", "--data", text, "--steps", 2)
    assert status == 0, err
    assert "precision float32: this processor" in err


@pytest.mark.parametrize("kind", bf16.STAND_INS)
def test_bfloat16_runs_learn_as_float32_runs_do(with_tiles, text, monkeypatch, kind):
    """Three seeds: means of 20 losses, and bits per byte, whose spread over seeds is some 3% here."""
    monkeypatch.setitem(bf16.KINDS, "float32", kind)
    bits = []
    for seed in range(3):
        words = ["--data", text, "--steps", 100, "--batch-size", 8, "--seed", seed, *MODEL]
        folders = f"runs/bf16-{seed}", f"runs/float32-{seed}"
        for folder, dtype in zip(folders, ("bfloat16", "float32")):
            trained(*words, "--dtype", dtype, "--out", folder)
        found, expected = (np.array(list(losses(folder).values())) for folder in folders)
        assert (found != expected).any()
        means, others = (x.reshape(-1, 20).mean(-1) for x in (found, expected))
        assert relative(means / others, np.ones(5)) < 0.01
        bits.append([read_log(folder)[-1]["final_val_bits_per_byte"] for folder in folders])
    found, expected = np.array(bits).T
    assert found.mean() == pytest.approx(expected.mean(), rel=0.005)
    assert abs(found - expected).max() < np.ptp(expected)


# -- machine code that this machine may not run

FEATURES = "64bit avx avx2 avx512f avx512bw avx512dq avx512vl avx512bf16 amx-tile amx-bf16 fma cmov cx8 sse sse2 sse4.2"
PRINT = """
from fast import bf16
blocks = *bf16.innermost("amx"), bf16.compile_driver("float32")[0], bf16.innermost("avx512")[1]
for compiled in blocks:
    print(compiled._library.get_asm_str(), "#####", sep="\\n")
"""


@pytest.fixture(scope="module")
def listings(tmp_path_factory):
    """Assembly of what enters, of the block of AMX, of what leaves, of the driver, of the block of VDPBF16PS, compiled
    for a processor with both instructions."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("LLVM is not that of x86")
    environment = os.environ | {"NUMBA_CPU_NAME": "sapphirerapids", "PYTHONPATH": str(Path(tinygpt.__file__).parent)}
    environment |= {"NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in FEATURES.split())}
    environment |= {"NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run([sys.executable, "-c", PRINT], env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout.split("#####\n")[:5]


@pytest.fixture(scope="module")
def machine_code(listings):
    return [[line.split("#")[0].split() for line in part.splitlines() if line.startswith("\t")] for part in listings]


def of(lines, name):
    return [" ".join(words[1:]) for words in lines if words and words[0] == name]


def test_a_thread_tells_the_unit_its_tiles_and_takes_them_back(machine_code):
    enter, _, leave, driver, _ = machine_code
    assert len(of(enter, "ldtilecfg")) == 1 and len(of(leave, "tilerelease")) == 1
    assert not any(words[0].startswith("t") and "tile" in words[0] for words in driver if words)
    shapes = bf16.shapes_of_tiles()
    assert shapes[0] == 1 and shapes[1:16].sum() == 0 and shapes[32:48].sum() == 0 and shapes[56:].sum() == 0
    assert shapes[16:32].view(np.uint16).tolist() == [64] * 8 and shapes[48:56].tolist() == [16] * 8


def test_four_tiles_of_c_stay_in_registers_while_a_and_b_pass(machine_code):
    block = machine_code[1]
    products = of(block, "tdpbf16ps")
    wanted = ["%tmm6, %tmm4, %tmm0", "%tmm7, %tmm4, %tmm1", "%tmm6, %tmm5, %tmm2", "%tmm7, %tmm5, %tmm3"]
    assert products and products == wanted * (len(products) // 4)
    loads, stores = of(block, "tileloadd"), of(block, "tilestored")
    assert [x[-5:] for x in of(block, "tilezero")] == ["%tmm0", "%tmm1", "%tmm2", "%tmm3"]
    assert [x.split(", ")[0] for x in stores] == ["%tmm0", "%tmm1", "%tmm2", "%tmm3"]  # once: nothing is spilled
    into = [x[-5:] for x in loads]
    assert sorted(into[:4]) == ["%tmm0", "%tmm1", "%tmm2", "%tmm3"]
    assert into[4:] == ["%tmm4", "%tmm6", "%tmm7", "%tmm5"] * (len(products) // 4)


def packed_words(x):
    """bf16 of float32 (2 n, columns) -> words (n, columns): pairs of rows."""
    bits = bf16.rounded(x).view(np.uint32) >> np.uint32(16)
    return bits[0::2] | bits[1::2] << np.uint32(16)


def block_of_c(carry_out, steps, add, seed=0):
    """c (32, 32), in rows of 40, after carry_out(addresses and numbers) of operands that NumPy has packed."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((32, 32 * steps)) * np.exp(rng.uniform(-4, 4, (32, 32 * steps))) for _ in range(2))
    tiles = tinygpt.aligned(4 * steps * 256, np.float32).view(np.uint32).reshape(4, steps, 16, 16)
    for i, x in enumerate((a, b)):
        words = packed_words(np.ascontiguousarray(x.T, np.float32)).reshape(steps, 16, 2, 16)  # step, pair, half, row
        tiles[2 * i : 2 * i + 2] = words.transpose(2, 0, 3, 1) if i == 0 else words.transpose(2, 0, 1, 3)
    c = rng.standard_normal((32, 40)).astype(np.float32)
    counts = carry_out([*(tile.ctypes.data for tile in tiles), c.ctypes.data, c.strides[0], steps, add])
    return c, counts


@pytest.mark.parametrize("add", [0, 1])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_machine_code_of_avx512_bf16_multiplies_where_python_carries_out_its_instructions(listings, steps, add):
    found, counts = block_of_c(functools.partial(vector_unit.run, listings[4]), steps, add)
    assert counts["vdpbf16ps"] == 4 * 16 * 16 * steps
    for kind in ["avx512 stand-in", *({"avx512"} & {*INSTRUCTIONS})]:
        block = bf16.innermost(kind)[1].ctypes
        expected, _ = block_of_c(lambda arguments, block=block: block(*arguments), steps, add)
        assert found.tobytes() == expected.tobytes(), kind


CHANGES = [("vdpbf16ps", "#"), ("vbroadcastss\t64(", "vbroadcastss\t128(")]


@pytest.mark.parametrize("line, other", CHANGES)
def test_a_wrong_instruction_in_that_code_is_noticed(listings, line, other):
    """One, the last of its kind."""
    right = block_of_c(functools.partial(vector_unit.run, listings[4]), 2, 1)[0]
    before, _, after = listings[4].rpartition(line)
    wrong = block_of_c(functools.partial(vector_unit.run, f"{before}{other}{after}"), 2, 1)[0]
    assert before and not np.array_equal(wrong, right)


def test_sums_of_avx512_bf16_stay_in_registers_while_a_and_b_pass(machine_code):
    block = machine_code[4]
    assert len(of(block, "vdpbf16ps")) >= 2 * 16
    assert not [words for words in block if "rsp" in " ".join(words) and "zmm" in " ".join(words)]  # nothing is spilled


needs_a_processor_to_pretend = pytest.mark.skipif(
    HAS_UNIT or "matrix_unit" in sys.modules or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="a matrix unit, or another system",
)
AS_PLUGIN = "-m", "pytest", "-q", "-p", "matrix_unit", "-p", "no:faulthandler", "-p", "no:cacheprovider", __file__


def pretended(*words, status=0):
    """What Python prints with these words where it compiles for this processor with a matrix unit added."""
    features = binding.get_host_cpu_features()
    features.update({"amx-tile": True, "amx-bf16": True})
    environment = os.environ | {"NUMBA_CPU_NAME": binding.get_host_cpu_name(), "NUMBA_CPU_FEATURES": features.flatten()}
    environment |= {"PYTHONPATH": os.pathsep.join(str(Path(file).parent) for file in (__file__, tinygpt.__file__))}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == status, done.stdout[-4000:] + done.stderr
    return done.stdout + done.stderr


def count_products(printed):
    return int(re.search(r"(\d+) products", printed).group(1))


@needs_a_processor_to_pretend
def test_the_machine_code_of_amx_multiplies_where_numpy_carries_out_its_instructions():
    assert count_products(pretended(*AS_PLUGIN, "-k", "amx and not stand")) > 10_000


@pytest.mark.slow
@needs_a_processor_to_pretend
def test_the_machine_code_of_amx_trains_where_numpy_carries_out_its_instructions():
    assert count_products(pretended(*AS_PLUGIN, "-k", "not learn_as")) > 100_000


@needs_a_processor_to_pretend
def test_a_thread_that_does_not_tell_the_unit_its_tiles_is_stopped():
    code = "words = bf16.driver_words(1, 'amx', bf16.BLOCKS); words[:, bf16.ENTER] = 0; bf16.product_error('amx')"
    printed = pretended("-c", f"import matrix_unit; bf16 = matrix_unit.pretend(); {code}", status=128 + signal.SIGILL)
    assert "a tile in a thread that has not told the unit their shapes" in printed


@pytest.mark.skipif(binding.llvm_version_info[0] < 16, reason="this LLVM has no type for bf16")
def test_operands_are_rounded_by_the_processor_that_can(machine_code):
    assert len(of(machine_code[3], "vcvtne2ps2bf16")) >= 3
