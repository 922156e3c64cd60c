"""train.py: data, AdamW, updates, whole runs of a tiny model, and every misuse that should end in one line."""

import dataclasses
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TABLES, ops_of, tiny_config
from helpers import (
    LONG,
    NUMPY,
    PLAIN,
    RECIPE,
    SETTINGS,
    TINY,
    fresh,
    interrupt_at,
    invoke,
    losses,
    model_bytes,
    own_helps,
    random_batch,
    read_log,
    refusal,
    trained,
    write_stories,
)
from tiers import fast, needs_fast

import bpe
import tinygpt
import train
from extras import documents, plan

# == 1  what is held out ===============================================================================================


def test_count_bytes_counts_bytes_and_not_characters(tokenizer):
    story = "Zo\u00eb \u65e5\u672c \U0001f600"
    tokens = np.array([*tokenizer.encode(story), tokenizer.end])
    assert train.count_bytes(tokens, tokenizer) == len(story.encode())


def test_bits_per_byte_divides_by_the_bytes_of_the_text(tokenizer):
    story = "Zo\u00eb saw a cat."
    tokens = np.array([*tokenizer.encode(story), tokenizer.end])
    bits = train.bits_per_byte(2.0 * math.log(2), tokens, tokenizer)
    assert bits == pytest.approx(2.0 * len(tokens) / len(story.encode()), rel=1e-12)


# == 2  batches ========================================================================================================

T, END = 7, 10**6
LENGTHS = [T, T + 1, 2 * T - 1, 2 * T, 2 * T + 1, 3 * T - 1, 3 * T, 5 * T + 3]


@pytest.mark.parametrize("M", LENGTHS)
def test_each_token_is_a_target_once_an_epoch_after_the_token_before_it(M):
    tokens = np.arange(M, dtype=np.uint16)  # each its own position
    for seed in range(12):
        batches = train.Batches(tokens, T, END, seed)
        for epoch in range(3):
            inputs, targets, weights = batches.get(epoch * batches.per_epoch, batches.per_epoch)
            assert inputs.shape == targets.shape == weights.shape == (batches.per_epoch, T)
            assert set(np.unique(weights)) <= {0, 1}
            assert sorted(targets[weights == 1]) == list(range(M))
            assert np.array_equal(inputs, np.where(targets == 0, END, targets - 1))


def test_windows_have_the_dtypes_that_the_kernels_take():
    inputs, targets, weights = train.Batches(np.arange(40, dtype=np.uint16), T, END, 0).get(0, 3)
    assert (inputs.dtype, targets.dtype, weights.dtype) == (np.int64, np.int64, np.float32)


def test_a_window_near_the_end_starts_earlier_and_does_not_count_twice():
    inputs, targets, weights = train.window(np.arange(20), 17, 20, T, END)
    assert targets.tolist() == [13, 14, 15, 16, 17, 18, 19]
    assert inputs.tolist() == [12, 13, 14, 15, 16, 17, 18]
    assert weights.tolist() == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("M", [T, 5 * T + 3])
def test_any_window_by_number_is_that_of_a_walk_from_the_start(M):
    tokens, count = np.arange(M), 4 * (M // T + 2)
    walk = train.Batches(tokens, T, END, 5)
    steps = [walk.get(number, 1) for number in range(count)]
    for number in reversed(range(count - 2)):
        found = train.Batches(tokens, T, END, 5).get(number, 3)  # also across the border of an epoch
        for column, parts in zip(found, zip(*steps[number : number + 3])):
            assert np.array_equal(column, np.concatenate(parts))


def test_epochs_and_seeds_differ_in_order_and_in_where_they_cut():
    tokens = np.arange(40 * T)

    def starts(seed, epoch):
        batches = train.Batches(tokens, T, END, seed)
        _, targets, _ = batches.get(epoch * batches.per_epoch, batches.per_epoch)
        return tuple(targets[:, 0])

    seen = [starts(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len(set(seen)) == len(seen)
    assert len({tuple(sorted(s)) for s in seen}) > 4  # not only the order
    assert starts(2, 3) == starts(2, 3)


# == 3  AdamW ==========================================================================================================

SIZE, DECAYED = 2 * train.NORM_BLOCK + 1001, train.NORM_BLOCK + 77  # the border lies inside a block


def adamw_run(dtype, step, drawn=None):
    """p, m, v after five updates by step(p, g, m, v, t), of values that `drawn` can hold; g must be 0 after each."""
    rng = np.random.default_rng(3)
    p = rng.standard_normal(SIZE).astype(drawn or dtype).astype(dtype)
    m, v = np.zeros(SIZE, dtype), np.zeros(SIZE, dtype)
    for t in range(1, 6):
        g = rng.standard_normal(SIZE) * 10.0 ** rng.integers(-6, 2, SIZE)
        g = g.astype(drawn or dtype).astype(dtype)
        step(p, g, m, v, t)
        assert not g.any()
    assert p.dtype == m.dtype == v.dtype == dtype
    return p, m, v


SCALE, LR, DECAY, BETA1, BETA2 = 0.37, 3e-2, 0.2, 0.9, 0.95


def by_kernel(p, g, m, v, t):
    fixes = 1 / (1 - BETA1**t), 1 / (1 - BETA2**t)
    rates = np.array([SCALE, LR, DECAY, BETA1, BETA2, *fixes, train.ADAM_EPS])
    tinygpt.THREADS.run(train.adamw_kernel, SIZE, p, g, m, v, DECAYED, tuple(rates.tolist()))


def by_spec(p, g, m, v, t):
    more = dict(lr=LR, beta1=BETA1, beta2=BETA2, weight_decay=DECAY, decayed=DECAYED, scale=SCALE)
    train.adamw(p, g, m, v, t, **more)


def test_adamw_kernel_is_the_spec_in_float64():
    for found, expected in zip(adamw_run(np.float64, by_kernel), adamw_run(np.float64, by_spec)):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_adamw_kernel_in_float32_is_as_near_as_the_spec():
    exact = adamw_run(np.float64, by_spec, drawn=np.float32)
    for spec, kernel, true in zip(adamw_run(np.float32, by_spec), adamw_run(np.float32, by_kernel), exact):
        error = np.abs(spec - true).max()
        assert error < 1e-4 * np.abs(true).max()
        assert np.abs(kernel - true).max() <= 4 * error


@pytest.mark.parametrize("step", [by_spec, by_kernel])
def test_adamw_is_that_of_torch(step):
    torch = pytest.importorskip("torch")
    parts = []

    def by_torch(p, g, m, v, t):
        if t == 1:
            parts[:] = [torch.tensor(p[:DECAYED]), torch.tensor(p[DECAYED:])]
            groups = [{"params": [parts[0]], "weight_decay": DECAY}, {"params": [parts[1]], "weight_decay": 0.0}]
            parts.append(torch.optim.AdamW(groups, lr=LR, betas=(BETA1, BETA2), eps=train.ADAM_EPS))
        parts[0].grad, parts[1].grad = torch.tensor(SCALE * g[:DECAYED]), torch.tensor(SCALE * g[DECAYED:])
        parts[2].step()
        p[:], g[:] = torch.cat(parts[:2]).numpy(), 0

    found, expected = adamw_run(np.float64, step)[0], adamw_run(np.float64, by_torch)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_only_matrices_decay():
    state = fresh(np.float64)
    state.parameters += 1
    before = state.parameters.copy()
    state.adamw(0.5, 1.0, SETTINGS)
    old = tinygpt.views(tinygpt.layout(TINY), before, TINY.layers)
    matrices = {"embed_w", "position_w", "qkv_w", "out_w", "up_w", "down_w"}
    pairs = [(old, state.p), *zip(old["layers"], state.p["layers"])]
    seen = set()
    for one, other in pairs:
        for name in {name for name, x in one.items() if x is not None} - {"layers"}:
            factor = 1 - 0.5 * SETTINGS.weight_decay if name in matrices else 1
            np.testing.assert_allclose(other[name], factor * one[name], rtol=1e-12)
            seen.add(name)
    assert matrices < seen


@pytest.mark.parametrize("threads", [1, 2])
def test_norm_is_that_of_numpy(pool, threads):
    pool.resize(threads)
    state = fresh()
    state.gradient[:] = np.random.default_rng(0).standard_normal(state.gradient.size)
    before = state.gradient.copy()
    exact = float(np.linalg.norm(before.astype(np.float64)))
    for most in (0, 2 * exact):
        assert train.clip_gradients(state.gradient, most) == pytest.approx(exact, rel=1e-12)
        assert np.array_equal(state.gradient, before)
    assert train.clip_gradients(state.gradient, exact / 3) == pytest.approx(exact, rel=1e-12)
    assert np.array_equal(state.gradient, before * np.float32(1 / 3))
    state.gradient[0] = np.inf
    assert train.clip_gradients(state.gradient, 0) == math.inf


def test_learning_rate_warms_up_then_falls_by_half_a_cosine():
    s = train.Settings(lr=0.4, min_lr=0.1, warmup_steps=4, steps=15)
    rates = [train.learning_rate(step, s) for step in range(15)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-12)
    assert rates[4] == max(rates) == pytest.approx(0.4, rel=1e-12)
    assert rates[9] == pytest.approx(0.25, rel=1e-12)  # half-way between 4 and 14
    assert rates[14] == pytest.approx(0.1, rel=1e-12)
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))


def rates(schedule, steps=102, warmup=1, **more):
    s = train.Settings(lr=1.0, min_lr=0.1, warmup_steps=warmup, steps=steps, schedule=schedule, **more)
    return np.array([train.learning_rate(step, s) for step in range(steps)])


def test_every_schedule_turns_its_corners():
    for schedule in train.SCHEDULES:
        drawn = rates(schedule, warmup=5)
        assert drawn[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert drawn[5] == pytest.approx(1.0)
        assert drawn[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
        assert (0.1 - 1e-12 <= drawn[5:]).all() and (drawn <= 1 + 1e-12).all()
    assert rates("linear")[51] == pytest.approx(0.55)
    assert rates("cosine")[51] == pytest.approx(0.55)
    assert rates("cosine")[26] == pytest.approx(0.55 + 0.45 * math.cos(math.pi / 4))
    assert (rates("constant") == 1).all()
    wsd = rates("wsd", steps=100)
    assert (wsd[:80] == 1).all() and wsd[89] == pytest.approx(0.55)
    restarts = rates("restarts")
    assert np.flatnonzero(np.diff(restarts[1:]) > 0.5).tolist() == [24, 49, 74]  # back to the top three times
    assert restarts[26] == pytest.approx(1.0)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (2, 5), (3, 3), (4, 0)])
def test_learning_rate_stays_in_its_range_in_short_runs(steps, warmup):
    s = train.Settings(lr=0.4, min_lr=0.1, warmup_steps=warmup, steps=steps)
    assert all(0 < train.learning_rate(step, s) <= 0.4 * (1 + 1e-12) for step in range(steps))


# == update ============================================================================================================


def updates(micro, kernels="fast", dtype=np.float32, count=3, **changes):
    s = dataclasses.replace(SETTINGS, micro_batch_size=micro, **changes)
    state = fresh(dtype)
    ops = tinygpt.with_buffers(ops_of(kernels), TINY, micro, TINY.seq_len, dtype)
    results = [train.update(state, random_batch(seed=i), ops, s) for i in range(count)]
    assert state.step == count
    return state, results


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_change_no_byte(micro):
    (whole, results), (cut, same) = updates(4), updates(micro)
    assert same == results
    for name in ("parameters", "m", "v"):
        assert getattr(cut, name).tobytes() == getattr(whole, name).tobytes(), name


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_change_nothing_that_counts_with_numpy(micro):
    (whole, results), (cut, same) = updates(4, "numpy", np.float64), updates(micro, "numpy", np.float64)
    np.testing.assert_allclose(same, results, rtol=1e-12)
    np.testing.assert_allclose(cut.parameters, whole.parameters, rtol=1e-6, atol=1e-9)


def test_numba_updates_as_numpy_does():
    (one, results), (other, same) = updates(2, "numpy", np.float64), updates(2, "fast", np.float64)
    np.testing.assert_allclose(same, results, rtol=1e-10)
    np.testing.assert_allclose(one.parameters, other.parameters, rtol=1e-6, atol=1e-9)


def test_loss_is_the_mean_over_the_targets_that_count():
    inputs, targets, weights = random_batch()
    p, ops = fresh(np.float64).p, tinygpt.OPS["numpy"]
    _, nats = tinygpt.loss_and_gradients(p, inputs, targets, weights, None, TINY, ops)
    _, [(loss, _, lr)] = updates(2, "fast", np.float64, count=1)
    assert loss == pytest.approx(float((nats * weights).sum() / weights.sum()), rel=1e-10)
    assert lr == train.learning_rate(0, SETTINGS)


def test_gradients_are_clipped_by_their_global_norm():
    _, [(_, norm, _)] = updates(4, count=1)
    for clip, expected in ((norm / 3, norm / 3), (norm * 3, norm), (0.0, norm)):
        state, [(_, same, _)] = updates(4, count=1, grad_clip=clip)
        assert same == norm
        used = np.linalg.norm(state.m.astype(np.float64)) / (1 - SETTINGS.beta1)
        assert used == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_no_number_changes_nothing():
    for bad in (math.nan, math.inf):
        state = fresh()
        state.p["norm_b"][3] = bad
        before = [x.tobytes() for x in (state.parameters, state.m, state.v)]
        ops = tinygpt.with_buffers(ops_of("fast"), TINY, 4, TINY.seq_len)
        with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="at step 1 "):
            train.update(state, random_batch(), ops, SETTINGS)
        assert [x.tobytes() for x in (state.parameters, state.m, state.v)] == before and state.step == 0


def test_a_gradient_that_is_infinite_changes_nothing(monkeypatch):
    state, real = fresh(), tinygpt.add_lookup_gradient

    def overflow(grads):
        real(grads)
        grads["norm_b"][0] = np.inf

    monkeypatch.setattr(tinygpt, "add_lookup_gradient", overflow)
    before = state.parameters.tobytes()
    ops = tinygpt.with_buffers(ops_of("fast"), TINY, 4, TINY.seq_len)
    with pytest.raises(FloatingPointError, match="grad norm inf"):
        train.update(state, random_batch(), ops, SETTINGS)
    assert state.parameters.tobytes() == before and state.step == 0


# -- accumulation===========


def test_validation_leaves_training_with_dropout_as_it_is(place, text):
    words = ("--data", text, "--steps", 12, "--dropout", 0.3, "--seed", 2)
    found = []
    for every in (12, 1, 5):
        trained(*words, "--eval-every", every, "--save-every", 0, "--prompt", "Lily")
        found.append((model_bytes()[:3], [(e["loss"], e["norm"]) for e in read_log() if "loss" in e]))
        shutil.rmtree("runs")
    assert found[0] == found[1] == found[2]


class Kept(train.State):
    """A state whose update keeps the gradient that AdamW would use."""

    def adamw(self, lr, scale, s, compiled=True):
        self.kept = self.gradient * self.gradient.dtype.type(scale)


def gradient_of_an_update(table, dtype, micro, cfg):
    inputs, targets, weights = random_batch(8)
    for row, count in enumerate((0, 1, 5, TINY.seq_len, 3, 0, 2, 9)):  # counts that differ from sequence to sequence
        weights[row] = np.arange(TINY.seq_len) < count
    state = Kept(cfg, tinygpt.init_parameters(cfg, 0, dtype))
    ops = tinygpt.with_buffers(ops_of(table), cfg, micro, TINY.seq_len, np.dtype(dtype))
    s = dataclasses.replace(SETTINGS, batch_size=8, micro_batch_size=micro, grad_clip=0.0)
    result = train.update(state, (inputs, targets, weights.astype(dtype)), ops, s)
    return state.kept, result


DROPPED = TINY.changed(attention_dropout=0.2, out_dropout=0.2, mlp_dropout=0.2)


@pytest.mark.parametrize("cfg", [TINY, DROPPED], ids=["plain", "dropout"])
@pytest.mark.parametrize("table", ["numpy", "fast"])
def test_micro_batches_whose_token_counts_differ_give_the_gradient_of_the_whole(table, cfg):
    whole, (loss, norm, _) = gradient_of_an_update(table, np.float64, 8, cfg)
    for micro in (1, 2, 4):
        cut, (same_loss, same_norm, _) = gradient_of_an_update(table, np.float64, micro, cfg)
        assert np.abs(cut - whole).max() <= 1e-12 * np.abs(whole).max()
        assert same_loss == pytest.approx(loss, rel=1e-12) and same_norm == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("cfg", [TINY, DROPPED], ids=["plain", "dropout"])
def test_micro_batches_whose_token_counts_differ_give_the_same_bytes_in_float32(cfg):
    found = {
        (x.tobytes(), *figures)
        for x, figures in (gradient_of_an_update("fast", np.float32, n, cfg) for n in (1, 2, 4, 8))
    }
    assert len(found) == 1


def test_the_gradient_of_an_update_is_that_of_the_mean_over_its_targets():
    """A mean of the micro-batches' means would be another one."""
    state = fresh(np.float64)
    inputs, targets, weights = random_batch(8)
    for row, count in enumerate((0, 1, 5, TINY.seq_len, 3, 0, 2, 9)):
        weights[row] = np.arange(TINY.seq_len) < count
    gradient, g = tinygpt.zero_gradients(TINY, np.float64)
    share = weights.astype(np.float64) / weights.sum()
    tinygpt.loss_and_gradients(state.p, inputs, targets, share, g, TINY, tinygpt.OPS["numpy"])
    tinygpt.add_lookup_gradient(g)
    found, _ = gradient_of_an_update("numpy", np.float64, 2, TINY)
    assert np.abs(found - gradient).max() <= 1e-12 * np.abs(gradient).max()


# == 4  evaluation =====================================================================================================


@pytest.mark.parametrize("M", [2, T - 1, T, T + 1, 3 * T - 1, 3 * T, 2048 + 3 * T + 1])
def test_validation_scores_each_token_once(monkeypatch, M):
    seen = []

    def score(p, inputs, targets, weights, g, cfg, ops):
        assert g is None and np.array_equal(inputs, np.where(targets == 0, END, targets - 1))
        seen.extend(targets[weights == 1])
        return 0.0, targets.astype(np.float64)

    monkeypatch.setattr(tinygpt, "loss_and_gradients", score)
    cfg = SimpleNamespace(seq_len=T)
    mean = train.evaluate({"embed_w": np.empty(0)}, cfg, np.arange(M), END, tinygpt.OPS["numpy"])
    assert sorted(seen) == list(range(M))
    assert mean == pytest.approx((M - 1) / 2, rel=1e-12)


def test_validation_is_the_mean_nats_of_the_spec(tokenizer):
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, 3 * TINY.seq_len + 5)
    flat = tinygpt.init_parameters(TINY, 0, np.float64)
    p = tinygpt.views(tinygpt.layout(TINY), flat, TINY.layers)
    total = 0.0
    for start in range(0, len(tokens), TINY.seq_len):  # windows end to end, the last one shorter
        targets = tokens[start : start + TINY.seq_len][None]
        inputs = np.concatenate([[tokenizer.end if start == 0 else tokens[start - 1]], targets[0, :-1]])[None]
        ones = np.ones(targets.shape)
        if targets.shape[1] == TINY.seq_len:
            total += tinygpt.loss_and_gradients(p, inputs, targets, ones, None, TINY, tinygpt.OPS["numpy"])[0]
    whole = 3 * TINY.seq_len
    for ops in (tinygpt.OPS["numpy"], ops_of("fast")):
        found = train.evaluate(p, TINY, tokens, tokenizer.end, ops, limit=whole)
        assert found == pytest.approx(total / whole, rel=1e-10)


# == 5  runs ===========================================================================================================


def test_the_same_seed_and_settings_give_the_same_bytes_with_any_number_of_threads(place, text, finished):
    trained("--data", text, *LONG, "--threads", 2)
    assert model_bytes() == model_bytes(finished.folder)
    assert losses() == losses(finished.folder)


def test_another_seed_gives_another_model(place, text, finished):
    trained("--data", text, *PLAIN, "--seed", 4)
    assert model_bytes()[0] != model_bytes(finished.folder)[0]


def test_how_often_is_validated_and_saved_changes_no_byte(place, text, finished):
    trained("--data", text, *PLAIN, "--seed", 3, "--eval-every", 1, "--save-every", 0)
    assert model_bytes()[:3] == model_bytes(finished.folder)[:3]


@needs_fast
def test_micro_batches_change_no_byte_of_a_run(place, text, finished):
    trained("--data", text, *LONG, "--micro-batch-size", 1)
    assert model_bytes() == model_bytes(finished.folder)


def test_numpy_trains_the_same_model(place, text, finished):
    trained("--data", text, *LONG, "--kernels", "numpy")
    found, expected = losses(), losses(finished.folder)
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-4


def test_training_learns(place, text):
    trained("--data", text, "--steps", 300, "--batch-size", 8)
    found = losses()
    assert found[1] == pytest.approx(math.log(TINY.vocab_size) + 0.5, abs=0.2)  # logits of variance 1: lse is 1/2 more
    assert np.mean([found[step] for step in range(291, 301)]) < 0.7 * math.log(TINY.vocab_size)
    assert min(e["val_nats"] for e in read_log() if "val_nats" in e) < 0.7 * math.log(TINY.vocab_size)


def test_the_log_has_settings_then_each_update_once_then_the_last_validation(finished):
    first, *entries = read_log(finished.folder)
    assert first["config"]["seq_len"] == TINY.seq_len and first["settings"]["steps"] == 12
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 13))
    assert [e["step"] for e in entries if "val_nats" in e] == [5, 10, 12]
    assert entries[-1]["final_val_bits_per_byte"] > 0
    assert all(0 < e["lr"] <= RECIPE[0] * (1 + 1e-12) and e["norm"] > 0 for e in entries if "loss" in e)


def test_best_is_the_model_alone_at_its_best_validation(place, text, monkeypatch):
    figures = iter([3.0, 2.0, 2.5, 2.2])  # of updates 2, 4, 6, and of all validation tokens
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: next(figures))
    kept, real = {}, train.Run.generate_stories

    def keep(run, stopped):
        kept[run.state.step] = run.state.parameters.tobytes()
        return real(run, stopped)

    monkeypatch.setattr(train.Run, "generate_stories", keep)
    trained("--data", text, "--steps", 6, "--eval-every", 2, "--prompt", "Lily")
    best = tinygpt.load_checkpoint("runs/tiny/best.safetensors")
    assert best.parameters.tobytes() == kept[4] and not best.extra
    assert tinygpt.load_checkpoint("runs/tiny/last.safetensors").parameters.tobytes() == kept[6]


def test_a_run_that_goes_on_remembers_its_best_validation(place, text, monkeypatch):
    figures = iter([2.0, 3.0, 2.5, 2.2])
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: next(figures))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        words = ["--steps", 6, "--eval-every", 2, "--micro-batch-size", 2]
        assert invoke(train.main, "--size", "tiny", "--data", text, *words)[0] == 130
    assert invoke(train.main, "--resume")[0] == 0
    first, *others = [e["step"] for e in read_log() if "val_nats" in e]
    assert (first, others) == (2, [4, 6])
    best, last = (tinygpt.load_checkpoint(f"runs/tiny/{name}.safetensors") for name in ("best", "last"))
    assert float(last.metadata["best"]) == min(e["val_bits_per_byte"] for e in read_log() if "val_nats" in e)
    assert best.parameters.tobytes() != last.parameters.tobytes()


def test_validation_while_training_reads_a_fixed_beginning_and_then_every_token(place, text, monkeypatch):
    seen, real = [], train.evaluate

    def spy(p, cfg, tokens, *rest, **more):
        seen.append(np.array(tokens))
        return real(p, cfg, tokens, *rest, **more)

    monkeypatch.setattr(train, "evaluate", spy)
    trained("--data", text, "--steps", 6, "--eval-every", 2)
    *short, whole = seen
    (path,) = Path("data", "tokens").glob("*/train.bin")
    tokens = bpe.read_tokens(path)[0]
    assert len(short) == 3 and len(short[0]) < len(whole) == len(tokens) - read_log()[0]["settings"]["train_tokens"]
    assert np.array_equal(whole, tokens[-len(whole) :])
    assert all(np.array_equal(tokens, whole[: len(short[0])]) for tokens in short)


def test_stories_stand_on_stdout_at_each_validation(finished):
    told = [story for e in read_log(finished.folder) for story in e.get("stories", ())]
    assert len(told) == 6  # two prompts, three validations
    assert all(story.startswith(("Lily", "Zo\u00eb")[i % 2]) for i, story in enumerate(told))
    assert finished.out.startswith("".join(f"{story}\n" for story in told))


def test_statistics_go_to_stderr_alone(finished):
    told = [story for e in read_log(finished.folder) for story in e.get("stories", ())]
    assert finished.out == "".join(f"{story}\n" for story in told)


def test_stderr_shows_settings_progress_and_what_to_type_next(finished):
    settings = ("ln V = 5.70", "parameters", "12 updates of 4 x 32 tokens", "seed 3")
    for piece in (*settings, "step 12 | loss ", "% of NumPy's BLAS |"):
        assert piece in finished.err, piece
    line = next(line for line in finished.err.splitlines() if line.startswith("a story:"))
    words = shlex.split(line.removeprefix("a story:"))
    assert words[:4] == ["python", "sample.py", "--checkpoint", str(Path("runs", "tiny", "last.safetensors"))]


def test_a_console_without_a_character_gets_a_question_mark(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    bpe.say("Zo\u00eb \u65e5")
    assert raw.getvalue().rstrip() == "Zo\u00eb ?".encode("cp1252")


def test_a_second_run_has_a_folder_of_its_own(place, text):
    before = None
    for name in ("tiny", "tiny-2", "tiny-3"):
        trained("--data", text, "--steps", 1)
        assert Path("runs", name, "last.safetensors").exists()
        before = before or model_bytes()
        assert model_bytes() == before


def test_out_that_holds_a_run_is_refused_and_left_as_it_was(place, text):
    trained("--data", text, "--steps", 1, "--out", "mine")
    files = {path: path.read_bytes() for path in Path("mine").iterdir()}
    message = refusal(train.main, "train.py", "--size", "tiny", "--data", text, "--steps", 1, "--out", "mine")
    assert "mine" in message and "--resume" in message
    assert {path: path.read_bytes() for path in Path("mine").iterdir()} == files


# == interrupted runs ==================================================================================================


@pytest.mark.parametrize("damage", [b"{not JSON}\n", b"\0" * 40 + b"\n", b'{"step": 3, "loss"'])
def test_a_damaged_line_of_the_log_does_not_end_a_run(place, text, finished, monkeypatch, damage):
    """As a power loss leaves it: the run goes on behind it, on a line of its own, and says which one it left out."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(train.main, "--size", "tiny", "--data", text, *LONG)[0] == 130
    log = Path("runs", "tiny", "log.jsonl")
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]) + damage)
    status, _, err = invoke(train.main, "--resume")
    assert status == 0, err
    assert f"log.jsonl: Line {len(lines)} is left out" in err
    assert model_bytes() == model_bytes(finished.folder)
    assert json.loads(log.read_bytes().splitlines()[len(lines)])["step"] > 0


@pytest.mark.parametrize("size", [0, 100])
def test_a_token_file_that_is_cut_short_while_it_is_read_ends_in_one_line(place, text, tokenizer, monkeypatch, size):
    """At the next epoch, here the next update: reading a page that the file no longer has would kill the process."""
    told = list(documents.documents([text]))[:4]
    tokenizer.save("t.json")
    tokens = [bpe.write_tokens(told, tokenizer, name)["tokens"] for name in ("t.bin", "v.bin")][0]
    interrupt_at(monkeypatch, 0, lambda: os.truncate("t.bin", size))
    batch = ["--batch-size", -(-tokens // TINY.seq_len) + 1, "--micro-batch-size", 1, "--steps", 3]
    words = ["--data", "t.bin", "--val-data", "v.bin", "--tokenizer", "t.json", *batch]
    message = refusal(train.main, "train.py", "--size", "tiny", *words)
    assert "t.bin was cut short while it was read: restore it, then --resume" in message


class Crash(Exception):
    pass


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint_to_the_same_bytes(place, text, finished):
    def crash():
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 8, crash)
        with pytest.raises(Crash):
            invoke(train.main, "--size", "tiny", "--data", text, *LONG)
    kept = int(tinygpt.load_checkpoint("runs/tiny/last.safetensors").metadata["step"])
    assert kept < 8 == max(losses())  # the log is ahead of the checkpoint
    status, _, err = invoke(train.main, "--resume")
    assert status == 0, err
    assert model_bytes() == model_bytes(finished.folder)
    assert [e["step"] for e in read_log() if "loss" in e] == list(range(1, 13))


def test_a_number_that_is_none_names_the_step_and_the_last_good_checkpoint(place, text, finished, monkeypatch):
    real, calls = tinygpt.loss_and_gradients, []

    def poisoned(p, tokens, targets, weights, g, *rest):
        loss, nats = real(p, tokens, targets, weights, g, *rest)
        if g is not None:
            calls.append(1)
        return loss, nats * (math.nan if len(calls) == 7 else 1)  # the first half of the fourth update

    with monkeypatch.context() as patch:
        patch.setattr(tinygpt, "loss_and_gradients", poisoned)
        message = refusal(train.main, "train.py", "--size", "tiny", "--data", text, *LONG)
    last = tinygpt.load_checkpoint("runs/tiny/last.safetensors")
    assert "loss is nan at step 4 " in message
    assert f"{Path('runs', 'tiny', 'last.safetensors')}, step {last.metadata['step']}" in message
    assert np.isfinite(last.parameters).all()
    assert invoke(train.main, "--resume")[0] == 0
    assert model_bytes() == model_bytes(finished.folder)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("more", [(), ("--prompt", "Lily", "--eval-every", "1"), ("--save-every", "0")])
def test_a_learning_rate_that_is_far_too_high_ends_in_one_line_that_names_the_checkpoint(place, text, more):
    words = ["--data", text, "--lr", 1000, "--grad-clip", 0, "--warmup-steps", 0, "--steps", 30, *more]
    message = refusal(train.main, "train.py", "--size", "tiny", *words)
    assert "at step " in message and "last good checkpoint" in message
    assert np.isfinite(tinygpt.load_checkpoint("runs/tiny/last.safetensors").parameters).all()


def test_epochs_read_the_text_that_often(place):
    write_stories(place / "s.txt", count=3)
    trained("--data", "s.txt", "--epochs", 2)
    s = read_log()[0]["settings"]
    epoch = -(-s["train_tokens"] // TINY.seq_len) + 1
    assert s["steps"] == math.ceil(2 * epoch / s["batch_size"])


# == the loss curve ====================================================================================================


# == 6  settings and command line ======================================================================================


def bad_data(place):
    """name -> a file that cannot be trained on."""
    (place / "empty.txt").write_bytes(b"")
    (place / "blank.txt").write_bytes(b" \n\n" + bpe.END.encode() + b"\n")
    (place / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (place / "latin.txt").write_bytes("Zo\u00eb ".encode("latin-1") * 400)
    (place / "short.txt").write_text("One day, a cat.", encoding="utf-8")
    (place / "bad.jsonl").write_text('{"text": "one"}\n{"no": 1}\n', encoding="utf-8")
    (place / "folder").mkdir()
    (place / "file").write_text("a file", encoding="utf-8")


BAD = {  # what is wrong -> words of the command line, a piece of what it must say
    "missing": (["--data", "none.txt"], "none.txt does not exist"),
    "empty": (["--data", "empty.txt"], "empty.txt"),
    "blank": (["--data", "blank.txt"], "blank.txt"),
    "binary": (["--data", "binary.txt"], "binary.txt is not text"),
    "not UTF-8": (["--data", "latin.txt"], "latin.txt is not text"),
    "short": (["--data", "short.txt"], "window of T=32"),
    "jsonl": (["--data", "bad.jsonl"], "bad.jsonl, line 2"),
    "no text in folder": (["--data", "folder"], "folder"),
    "missing validation": (["--data", "TEXT", "--val-data", "none.txt"], "none.txt"),
    "empty validation": (["--data", "TEXT", "--val-data", "empty.txt"], "empty.txt"),
    "longer windows than text": (["--data", "TEXT", "--seq-len", "1000000"], "T=1000000"),
    "small vocabulary": (["--data", "TEXT", "--vocab-size", "264"], "265"),
    "large vocabulary": (["--data", "TEXT", "--vocab-size", "60000"], "--vocab-size 60000: the text gives"),
    "no tokenizer": (["--data", "TEXT", "--tokenizer", "file"], "file: not a tokenizer"),
    "missing tokenizer": (["--data", "TEXT", "--tokenizer", "none.json"], "none.json"),
    "tokens without tokenizer": (["--data", "tokens.bin"], "--tokenizer"),
    "missing tokens": (["--data", "none.bin", "--tokenizer", "own.json"], "none.bin"),
    "tokens of another tokenizer": (["--data", "tokens.bin", "--tokenizer", "other.json"], "written with tokenizer"),
    "micro-batch": (["--data", "TEXT", "--micro-batch-size", "3"], "3 does not divide --batch-size 4"),
    "micro-batch above batch": (["--data", "TEXT", "--micro-batch-size", "8"], "does not divide --batch-size 4"),
    "min-lr above lr": (["--data", "TEXT", "--lr", "1e-3", "--min-lr", "1e-2"], "--min-lr 0.01 is above --lr 0.001"),
    "out is a file": (["--data", "TEXT", "--out", "file"], "file"),
    "out under a file": (["--data", "TEXT", "--out", "file/run"], "file"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_line_and_leaves_no_run(place, text, tokenizer, what):
    bad_data(place)
    if "token" in what:
        tokenizer.save("own.json")
        bpe.Tokenizer.from_merges(tokenizer.merges[:20]).save("other.json")
        bpe.write_tokens(documents.documents([text]), tokenizer, "tokens.bin")
    words, piece = BAD[what]
    words = [str(text) if word == "TEXT" else word for word in words]
    message = refusal(train.main, "train.py", "--size", "tiny", "--steps", "1", *words)
    assert piece in message, message
    assert not list(place.glob("runs/*")) and (place / "file").is_file()


def test_a_runs_folder_that_cannot_be_made_ends_in_one_line(place, text):
    Path("runs").write_text("in the way", encoding="utf-8")
    assert "runs" in refusal(train.main, "train.py", "--size", "tiny", "--data", text, "--steps", 1)


def test_a_failed_start_leaves_folders_as_they_were(place):
    words = ["--size", "tiny", "--data", "none.txt", "--steps", 1, "--out"]
    refusal(train.main, "train.py", *words, "new/run")
    assert not Path("new", "run").exists()
    Path("old").mkdir()
    Path("old", "mine.txt").write_text("mine", encoding="utf-8")
    refusal(train.main, "train.py", *words, "old")
    assert [path.name for path in Path("old").iterdir()] == ["mine.txt"]


def test_a_failed_start_leaves_an_empty_folder_of_the_user_alone(place):
    Path("mine").mkdir()
    refusal(train.main, "train.py", "--size", "tiny", "--data", "none.txt", "--steps", 1, "--out", "mine")
    assert Path("mine").is_dir() and not list(Path("mine").iterdir())


OUT_OF_RANGE = {
    "--lr": ["0", "-1", "nan", "inf", "fast"],
    "--min-lr": ["-1", "nan"],
    "--steps": ["0", "-3", "1.5", "many"],
    "--epochs": ["0", "-1", "nan"],
    "--minutes": ["0", "-1", "inf"],
    "--batch-size": ["0", "-4"],
    "--micro-batch-size": ["0"],
    "--seq-len": ["0", "-1"],
    "--vocab-size": ["0", "-1", "x"],
    "--warmup-steps": ["-1"],
    "--weight-decay": ["-0.1", "nan"],
    "--beta1": ["1", "-0.1", "nan"],
    "--beta2": ["1", "2"],
    "--grad-clip": ["-1", "nan"],
    "--seed": ["-1", "0.5"],
    "--threads": ["0", "-1", "1000000"],
    "--eval-every": ["0"],
    "--save-every": ["-1", "nan"],
    "--kernels": ["none", "tiles"],
    "--dtype": ["float16", "float64"],
    "--no-such-flag": ["1"],
}


@pytest.mark.parametrize("flag, value", [(flag, value) for flag, values in OUT_OF_RANGE.items() for value in values])
def test_a_value_out_of_range_is_named(place, monkeypatch, flag, value):
    def begun(*_):
        raise AssertionError("went on to train")

    monkeypatch.setattr(train, "begin_run", begun)
    monkeypatch.setattr(tinygpt, "set_threads", lambda threads: None)
    message = refusal(train.main, "train.py", f"{flag}={value}")
    assert flag in message


def test_every_setting_of_a_flag_is_chosen_by_it(place):
    """The table of `Settings` is that of the flags: a value given on the command line is the one of the run."""
    words = ["--lr", "0.5", "--min-lr", "0.25", "--warmup-steps", "3", "--schedule", "wsd", "--batch-size", "6"]
    words += ["--micro-batch-size", "3", "--recompute", "--weight-decay", "0.3", "--beta1", "0.8", "--beta2", "0.7"]
    words += ["--grad-clip", "2", "--dropout", "0.4", "--seed", "9", "--kernels", "numpy", "--eval-every", "7"]
    words += ["--save-every", "5", "--keep", "2", "--dtype", "float32"]
    args = train.make_parser().parse_args(words)
    s = train.choose_settings(args, TINY, 40)
    for f in dataclasses.fields(train.Settings):
        if f.metadata:
            assert getattr(s, f.name) == getattr(args, f.name) and f"--{f.name.replace('_', '-')}" in words, f.name


def test_two_lengths_of_a_run_are_refused(place):
    assert "--minutes" in refusal(train.main, "train.py", "--steps", 3, "--minutes", 1)


def test_a_prompt_that_is_no_text_is_refused_before_training(place, text):
    message = refusal(train.main, "train.py", "--size", "tiny", "--data", text, "--steps", 4, "--prompt", "a\udcff")
    assert "surrogate" in message or "prompt" in message
    assert not list(place.glob("runs/*"))


def test_every_flag_has_a_help_of_its_own():
    assert "--micro-batch-size" in own_helps(train.make_parser())


# == 7  sizes, fields, recipes =========================================================================================


def test_set_reaches_every_field_of_the_model(place, text):
    trained("--data", text, "--steps", 1, "--set", "layers=1", "norm=rmsnorm", "--set", "positions=rope", "qkv_bias=no")
    cfg = tinygpt.load_checkpoint("runs/tiny/last.safetensors").cfg
    assert (cfg.layers, cfg.norm, cfg.positions, cfg.qkv_bias) == (1, "rmsnorm", "rope", False)
    assert read_log()[0]["command"].count("--set layers=1 norm=rmsnorm positions=rope qkv_bias=no") == 1
    kinds = {int: "3", float: "0.25", bool: "true", str: "x"}
    for field in dataclasses.fields(tinygpt.Config):
        assert tinygpt.overrides([f"{field.name}={kinds[field.type]}"])[field.name] == field.type(kinds[field.type])


def test_fields_that_follow_from_others_follow_a_change():
    assert TINY.changed(width=48).hidden == 4 * 48 and TINY.changed(width=48).head_width == 16
    assert TINY.changed(hidden=50).changed(width=48).hidden == 50
    assert TINY.changed(seq_len=40).position_rows == 40


@pytest.mark.parametrize(
    "words, said",
    [
        (["--set", "colour=3"], "colour"),
        (["--set", "layers=two"], "layers=int"),
        (["--set", "tied=perhaps"], "tied=bool"),
        (["--set", "norm=batch"], "layernorm, rmsnorm"),
        (["--set", "kv_heads=2"], "try kv_heads=1"),
        (["--recipe", "published"], "no recipe"),
    ],
)
def test_a_field_or_recipe_that_cannot_be_is_refused(place, text, words, said):
    assert said in refusal(train.main, "train.py", "--size", "tiny", "--steps", "1", "--data", str(text), *words)
    assert not list(Path("runs").glob("*"))


@pytest.mark.skipif(os.name != "posix", reason="needs head")
def test_a_reader_of_stdout_or_stderr_who_leaves_does_not_end_the_run(tmp_path, text):
    words = f"{shlex.quote(sys.executable)} {shlex.quote(train.__file__)} --data {shlex.quote(str(text))} --steps 3"
    words += " --vocab-size 300 --set layers=1 width=24 heads=3 --seq-len 32 --prompt Lily --eval-every 1"
    for pipe, out in (("| head -n 1", "out"), ("2>&1 >/dev/null | head -n 1", "err")):
        subprocess.run(f"{words} --out {tmp_path / out} {pipe}", shell=True, check=True, capture_output=True)
        checkpoint = tinygpt.load_checkpoint(tmp_path / out / "last.safetensors")
        assert checkpoint.metadata["step"] == "3"


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does, by their numbers")
@pytest.mark.parametrize("closed", [(1,), (1, 2)])
def test_a_run_without_streams_is_a_run(tmp_path, text, closed):
    words = [
        sys.executable,
        train.__file__,
        "--data",
        str(text),
        "--steps",
        "2",
        "--eval-every",
        "1",
        "--prompt",
        "Lily",
    ]
    words += [*NUMPY, "--out", str(tmp_path / "run")]
    code = f"import os; [os.close(n) for n in {closed}]; os.execv({words[0]!r}, {words})"
    assert subprocess.run([words[0], "-c", code], capture_output=True, timeout=120).returncode == 0
    assert "final_val_nats" in read_log(tmp_path / "run")[-1]
    assert tinygpt.load_checkpoint(tmp_path / "run" / "last.safetensors").metadata["step"] == "2"


# -- memory


@pytest.mark.parametrize("table", TABLES)
def test_recomputed_layers_change_no_byte(table):
    cfg = tiny_config(attention_dropout=0.2, mlp_dropout=0.3, positions="rope", qk_norm=True)
    p = tinygpt.views(tinygpt.layout(cfg), tinygpt.init_parameters(cfg, 0), cfg.layers)
    rng, found = np.random.default_rng(0), []
    tokens, weights = rng.integers(0, cfg.vocab_size, (3, cfg.seq_len + 1)), np.ones((3, cfg.seq_len), np.float32)
    for recompute in (False, True):
        flat, grads = tinygpt.zero_gradients(cfg)
        ops = plan.recomputed(ops_of(table)) if recompute else ops_of(table)
        ops = tinygpt.with_buffers(ops, cfg, 3, cfg.seq_len, recompute=recompute)
        inputs = (tokens[:, :-1], tokens[:, 1:], weights, grads, cfg, ops, tinygpt.Dropout(0, 1, 2))
        found.append((tinygpt.loss_and_gradients(p, *inputs)[0], flat.tobytes()))
    assert found[0] == found[1]
    assert any(found[0][1])


def test_a_recomputing_workspace_is_smaller_by_what_layers_share():
    cfg = tiny_config(layers=6)
    whole, less = (fast.workspace_layout(cfg, 2, cfg.seq_len, again) for again in (False, True))
    layered = {t.name: math.prod(t.shape[1:]) for t in whole if t.layered}
    kept = {t.name for t in less if t.layered}
    assert kept == {"attended", "mixed"}
    saved, shared = whole[-1].offset - less[-1].offset, [n for name, n in layered.items() if name not in kept]
    assert abs(saved - 5 * sum(shared)) <= tinygpt.CACHE_LINE * len(shared)
