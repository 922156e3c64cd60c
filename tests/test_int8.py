"""Matrices in int8: the specification word for word, and decoding against the dequantised weights in float32."""

import math

import numpy as np
import pytest
from conftest import FAMILIES, TABLES, ops_of, random_parameters, relative, tiny_config
from helpers import invoke, refusal, trained, workshop, write_stories
from tiers import fast

import sample
import tinygpt
from extras import evaluate
from fast.int8 import GROUP, dequantize, list_matrices, pack_int8, quantize, round_weights
from sample import Decoding, generate

SHAPES = {
    "tiny": {},
    "wide": dict(width=288, head_width=42, hidden=200, qk_norm=True),  # groups and panels that are not whole
    "grouped": dict(heads=10, kv_heads=5, head_width=6, vocab_size=130),
}
TEXT = np.random.default_rng(7).integers(0, 11, 200).tolist()


def rounded_model(dtype=np.float32, **fields):
    cfg = tiny_config(**fields)
    _, p = random_parameters(cfg, dtype=dtype)
    round_weights(p, cfg)
    return cfg, p


# -- the specification


@pytest.mark.parametrize("K", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quantize_is_its_definition(K, dtype):
    w = np.random.default_rng(K).standard_normal((K, 5)).astype(dtype)
    q, scales = quantize(w)
    assert q.dtype == np.int8 and q.shape == w.shape and scales.dtype == dtype and len(scales) == -(-K // GROUP)
    for k in range(K):
        for m in range(5):
            low = k // GROUP * GROUP
            scale = max(abs(float(x)) for x in w[low : low + GROUP, m]) / 127
            assert scales[k // GROUP, m] == pytest.approx(scale, rel=1e-6)
            assert abs(q[k, m] - w[k, m] / scale) < 0.5001 and abs(q[k, m]) <= 127
    assert dequantize(q, scales).dtype == dtype
    assert np.array_equal(
        dequantize(q, scales), [[q[k, m] * scales[k // GROUP, m] for m in range(5)] for k in range(K)]
    )


def test_quantize_keeps_zeros_and_bears_subnormal_weights():
    w = np.zeros((70, 3), np.float32)
    w[:64, 1], w[3, 2] = 190 * 2.0**-149, 1e-45
    q, scales = quantize(w)
    assert not q[:, 0].any() and q[0, 1] == 127 and np.isfinite(dequantize(q, scales)).all()


def test_weights_that_are_rounded_have_the_same_int8_again():
    w = np.random.default_rng(1).standard_normal((200, 300)).astype(np.float32)
    q, scales = quantize(w)
    again, scales_again = quantize(dequantize(q, scales))
    assert np.array_equal(again, q) and relative(scales_again, scales) < 2e-7


def test_matrices_take_little_more_than_a_quarter():
    w = np.ones((256, 512), np.float32)
    assert pack_int8(w, 64).nbytes == sum(x.nbytes for x in quantize(w)) == w.nbytes / 4 * (1 + 4 / GROUP)


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_are_rounded(tied):
    cfg = tiny_config(**FAMILIES["llama"] | dict(tied=tied))
    flat, p = random_parameters(cfg, dtype=np.float32)
    before = flat.copy()
    round_weights(p, cfg)
    matrices = sum(w.size for w in list_matrices(p, cfg))
    assert 0 < np.count_nonzero(flat != before) <= matrices < flat.size
    assert tied == (not np.array_equal(p["embed_w"], tinygpt.views(tinygpt.layout(cfg), before, cfg.layers)["embed_w"]))


# -- decoding


@pytest.mark.parametrize("dtype, bound", [(np.float32, 2e-5), (np.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_decoding_is_that_of_the_dequantised_weights(family, shape, dtype, bound):
    cfg, p = rounded_model(dtype, **FAMILIES[family] | dict(seq_len=101, position_rows=103) | shape)
    expected, found = Decoding(p, cfg, fast.FLOAT32), Decoding(p, cfg, fast.INT8)
    for ids in (TEXT[:9], *([token] for token in TEXT[9:60])):
        assert relative(found.feed(ids), expected.feed(ids)) < bound


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_every_table_tells_the_story_of_int8(temperature):
    cfg, p = rounded_model(np.float64, seq_len=23, position_rows=24)
    tables = [fast.INT8, *map(ops_of, TABLES)]
    told = [list(generate(Decoding(p, cfg, ops), TEXT[:3], 3, -1, 60, temperature=temperature)) for ops in tables]
    assert all(ids == told[0] for ids in told)


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_threads_change_no_byte_of_a_text_in_int8(temperature, pool, monkeypatch):
    monkeypatch.setattr(fast.steps, "ONE_THREAD_BYTES", 0)
    monkeypatch.setattr(fast.steps, "SCREEN_BYTES", 0)
    shape = dict(vocab_size=700, seq_len=60, position_rows=60, width=96, hidden=200)
    cfg, p = rounded_model(**FAMILIES["llama"] | shape)
    found = set()
    for threads in (1, 2, 3):
        pool.resize(threads)
        decoding = Decoding(p, cfg, fast.INT8)
        ids = list(generate(decoding, [5], 3, -1, 100, temperature=temperature))
        found.add((tuple(ids), decoding.kv[:, :, : len(decoding.window)].tobytes()))
    assert len(found) == 1


def test_the_oracle_tells_a_wrong_scale(monkeypatch):
    cfg, p = rounded_model()
    right = Decoding(p, cfg, fast.FLOAT32).feed([3])
    monkeypatch.setattr(fast.steps, "pack_int8", lambda w, panel: pack_int8(w * w.dtype.type(1.001), panel))
    assert relative(Decoding(p, cfg, fast.INT8).feed([3]), right) > 1e-4


# -- the commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with workshop(tmp_path_factory.mktemp("model")) as folder:
        trained("--data", write_stories(folder / "s.txt"), "--steps", 30, "--eval-every", 30, "--batch-size", 8)
    return folder / "runs" / "tiny" / "last.safetensors"


def test_sample_tells_the_same_story_in_int8_with_every_table(checkpoint):
    words = ["--checkpoint", checkpoint, "--quantize", "int8", "--max-new-tokens", 20, "--temperature", 0]
    told = [invoke(sample.main, *words, "--kernels", kernels) for kernels in tinygpt.KERNELS]
    assert all(status == 0 and "int8: " in err and "MB of matrices a token" in err for status, _, err in told)
    assert len({out for _, out, _ in told}) == 1


def test_another_format_is_refused_in_one_line(checkpoint):
    words = ["--checkpoint", checkpoint, "--quantize", "int4"]
    assert "invalid choice: 'int4'" in refusal(sample.main, "sample.py", *words)


def test_evaluate_scores_the_dequantised_weights(checkpoint):
    words = [checkpoint, "--data", checkpoint.parents[2] / "s.txt"]
    bits = []
    for flags in ([], ["--quantize", "int8"]):
        status, out, err = invoke(evaluate.main, *words, *flags)
        assert status == 0, err
        bits.append(float(out.split("bits/byte")[1].split()[0]))
    assert math.isclose(*bits, rel_tol=0.01)
