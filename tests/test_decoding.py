"""Decoding: the cache against a forward of everything, the filters against their definition, draws against chance."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import FAMILIES, TABLES, ops_of, random_parameters, relative, tiny_config
from tiers import fast

import sample
import tinygpt
from extras import recipes
from sample import Decoding, generate, probabilities
from tinygpt import OPS

every_table = pytest.mark.parametrize("table", TABLES)
CFG = tiny_config(seq_len=23, position_rows=24)  # its newer half: 11
TEXT = np.random.default_rng(7).integers(0, CFG.vocab_size, 200).tolist()


def fresh_logits(p, ids, table="numpy"):
    """(T, V): what a forward of all ids at once says follows each of them."""
    x, _ = tinygpt.forward(p, np.array([ids]), CFG, ops_of(table))
    return ops_of(table).head_logits(x[0], p, CFG, ops_of(table))


def pieces(ids, *sizes):
    start = 0
    for size in sizes:
        yield ids[start : start + size]
        start += size


# -- the cache


@every_table
@pytest.mark.parametrize("sizes", [[1] * 23, [23], [5, 1, 1, 9, 1, 6], [1, 22], [22, 1]], ids=str)
def test_cached_logits_are_those_of_a_full_forward(sizes, table):
    _, p = random_parameters(CFG)
    expected, decoding, fed = fresh_logits(p, TEXT[:23]), Decoding(p, CFG, ops_of(table)), 0
    for ids in pieces(TEXT, *sizes):
        logits = decoding.feed(ids)
        fed += len(ids)
        assert logits.shape == (CFG.vocab_size,)
        assert relative(logits, expected[fed - 1]) < 1e-12
    assert decoding.window == TEXT[:23]


@every_table
def test_a_text_goes_on_past_the_window_with_its_newer_half(table):
    _, p = random_parameters(CFG)
    decoding, window = Decoding(p, CFG, ops_of(table)), []
    for ids in pieces(TEXT, *[1] * 60, 7, 5, 11, 12, 1, 23, 1, 1, 3):
        logits = decoding.feed(ids)
        window += ids
        if len(window) > 23:
            window = window[-11:]
        assert decoding.window == window
        assert relative(logits, fresh_logits(p, window)[-1]) < 1e-12


@every_table
@pytest.mark.parametrize("length", [24, 46, 150])
def test_a_text_longer_than_the_window_keeps_its_end(length, table):
    _, p = random_parameters(CFG)
    decoding = Decoding(p, CFG, ops_of(table))
    logits = decoding.feed(TEXT[:length])
    assert decoding.window == TEXT[length - 11 : length]
    assert relative(logits, fresh_logits(p, decoding.window)[-1]) < 1e-12


@every_table
def test_a_window_of_one_token_goes_on(table):
    cfg = tiny_config(seq_len=1)
    _, p = random_parameters(cfg)
    decoding = Decoding(p, cfg, ops_of(table))
    once = [decoding.feed([token]).copy() for token in (3, 5, 3)]
    assert np.array_equal(once[0], once[2]) and not np.array_equal(once[0], once[1])


@every_table
def test_logits_have_the_models_dtype_and_are_the_callers_to_keep(table):
    _, p = random_parameters(CFG, dtype=np.float32)
    decoding = Decoding(p, CFG, ops_of(table))
    first = decoding.feed(TEXT[:3])
    kept = first.copy()
    decoding.feed(TEXT[3:4])
    assert first.dtype == np.float32 and np.array_equal(first, kept)


@every_table
def test_a_token_that_is_refused_leaves_the_text_as_it_was(table):
    _, p = random_parameters(CFG)
    decoding = Decoding(p, CFG, ops_of(table))
    decoding.feed(TEXT[:3])
    with pytest.raises(ValueError, match="token id 11"):
        decoding.feed([11])
    assert relative(decoding.feed(TEXT[3:4]), fresh_logits(p, TEXT[:4])[-1]) < 1e-12


# -- the step of the kernels


def text_of(decoding, ids, count, **filters):
    return list(generate(decoding, ids, 3, -1, count, **filters))


SHAPES = {
    "tiny": {},
    "wide": dict(width=288, head_width=42, hidden=200, qk_norm=True),
    "many heads": dict(heads=10, kv_heads=5, head_width=6),  # sums of narrow heads run side by side
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_at_a_time_gives_the_bytes_of_a_block(family, shape, monkeypatch):
    monkeypatch.setattr(fast.steps, "PREFETCH_BYTES", 0 if "width" in shape else 1 << 40)
    cfg = tiny_config(**FAMILIES[family] | {"seq_len": 101, "position_rows": 103} | shape)
    _, p = random_parameters(cfg, dtype=np.float32)
    once, single = (Decoding(p, cfg, ops_of("fast")) for _ in range(2))
    for token in TEXT[:100]:
        logits = single.feed([token])
    assert logits.tobytes() == once.feed(TEXT[:100]).tobytes()
    assert single.kv[:, :, :100].tobytes() == once.kv[:, :, :100].tobytes()


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("screen_bytes", [0, 1 << 40])
def test_threads_change_no_byte_of_a_text(screen_bytes, temperature, pool, monkeypatch):
    monkeypatch.setattr(fast.steps, "ONE_THREAD_BYTES", 0)
    monkeypatch.setattr(fast.steps, "SCREEN_BYTES", screen_bytes)
    cfg = tinygpt.Config(
        **recipes.LLAMA, vocab_size=700, seq_len=60, width=96, layers=2, heads=6, kv_heads=3, hidden=200
    )
    _, p = random_parameters(cfg, dtype=np.float32)
    found = set()
    for threads in (1, 2, 3):
        pool.resize(threads)
        decoding = Decoding(p, cfg, ops_of("fast"))
        ids = text_of(decoding, [5], 100, temperature=temperature)
        found.add((tuple(ids), decoding.kv[:, :, : len(decoding.window)].tobytes()))
    assert len(found) == 1


def test_the_screen_finds_the_largest_logit_even_among_equals(monkeypatch):
    cfg = tinygpt.Config(
        **recipes.LLAMA, vocab_size=700, seq_len=60, width=96, layers=1, heads=6, hidden=200, tied=False
    )
    _, p = random_parameters(cfg, dtype=np.float32)
    p["head_w"][350:] = p["head_w"][:350]  # each logit twice
    texts = []
    for screen_bytes in (0, 1 << 40):
        monkeypatch.setattr(fast.steps, "SCREEN_BYTES", screen_bytes)
        decoding = Decoding(p, cfg, ops_of("fast"))
        texts.append(text_of(decoding, [5], 150, temperature=0, banned=(17, 401)))
        assert ("screen" in decoding.steps.arrays) == (screen_bytes == 0)
    assert texts[0] == texts[1] and max(texts[0]) < 350 + 350 * (17 in texts[0]) and 17 not in texts[0]
    assert len(set(texts[0])) > 5


STEP_FILTERS = [dict(), dict(top_k=3), dict(top_p=0.6), dict(top_k=6, top_p=0.7), dict(top_k=1), dict(min_p=0.4)]
STEP_FILTERS += [dict(repetition_penalty=1.7), dict(repetition_penalty=0.5, top_k=8, top_p=0.9, min_p=0.2)]


@pytest.mark.parametrize("filters", STEP_FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0])
def test_the_step_draws_what_probabilities_say(filters, temperature):
    _, p = random_parameters(CFG)
    decoding, rng = Decoding(p, CFG, ops_of("fast")), np.random.default_rng(1)
    filters = filters | dict(temperature=temperature, seen={1, 5, 8}, banned=(4,))
    p = probabilities(decoding.feed(TEXT[:3]), **filters)
    for uniform in [0.0, *rng.random(200), 1 - 1e-9]:
        x = decoding.steps.arrays["x"].copy()
        drawn = decoding.steps.draw(-1, x, 2, [uniform], -1, **filters)
        assert drawn == [int(np.searchsorted(np.cumsum(p), uniform * p.sum(), side="right"))]


def test_turns_of_any_length_tell_one_text(monkeypatch):
    _, p = random_parameters(CFG, dtype=np.float32)
    texts = []
    for turn in (0.0, 1e9):  # one token at a time; as many as the window takes
        monkeypatch.setattr(sample, "TURN", turn)
        texts.append(text_of(Decoding(p, CFG, ops_of("fast")), TEXT[:3], 80, temperature=0.9))
    assert texts[0] == texts[1]


# -- probabilities


def slow_probabilities(logits, temperature, top_k, top_p, min_p=0.0, repetition_penalty=1.0, seen=(), banned=()):
    """Word for word: penalty, temperature, top-k, the fewest likeliest tokens that have top_p, at least one, min-p."""
    signs = [1 if logit > 0 else -1 for logit in logits]
    logits = [logits[i] / repetition_penalty ** signs[i] if i in seen else logits[i] for i in range(len(logits))]
    allowed = [i for i in range(len(logits)) if i not in banned]
    ranked = sorted(allowed, key=lambda i: (-logits[i], i))
    if temperature == 0:
        return [float(i == ranked[0]) for i in range(len(logits))]
    if top_k > 0:
        ranked = ranked[:top_k]
    exp_logits = {i: math.exp((logits[i] - logits[ranked[0]]) / temperature) for i in ranked}
    total, kept, cumulative = math.fsum(exp_logits.values()), [], 0.0
    for i in ranked:
        if kept and cumulative >= top_p:
            break
        kept.append(i)
        cumulative += exp_logits[i] / total
    kept = [i for i in kept if exp_logits[i] >= min_p * exp_logits[kept[0]]]
    total = math.fsum(exp_logits[i] for i in kept)
    return [exp_logits[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.35, 1e-9])
@pytest.mark.parametrize("min_p, penalty", [(0.0, 1.0), (0.3, 1.0), (0.1, 1.3), (1.0, 0.8)])
def test_probabilities_are_what_their_definition_says(temperature, top_k, top_p, min_p, penalty):
    rng = np.random.default_rng(0)
    for banned in ((), (4,), (0, 10, 5)):
        logits = 3 * rng.standard_normal(11)
        before, filters = logits.copy(), (temperature, top_k, top_p, min_p, penalty, (1, 2, 10), banned)
        p = probabilities(logits, *filters)
        assert p == pytest.approx(slow_probabilities(logits, *filters), rel=1e-12, abs=1e-15)
        assert p.dtype == np.float64 and p.sum() == pytest.approx(1, abs=1e-15)
        assert np.array_equal(logits, before)


def test_filters_apply_in_the_order_penalty_temperature_top_k_top_p_min_p():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    # the penalty before top-k: 0.4 becomes 0.4^3, and is no longer among the two likeliest
    assert probabilities(logits, top_k=2, repetition_penalty=3.0, seen=[0]) == pytest.approx([0, 3 / 5, 2 / 5, 0])
    # temperature before min-p: at 0.5 the ratios are 16 : 9 : 4 : 1
    assert probabilities(logits, temperature=0.5, min_p=0.5) == pytest.approx([16 / 25, 9 / 25, 0, 0])
    # top-p before min-p: the three that have 0.85; without min-p's second token these would be two
    assert probabilities(logits, top_p=0.85, min_p=0.6) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    # temperature before top-p: at 0.5 the ratios are 16 : 9 : 4 : 1, and the first two have 25/30 > 0.8
    assert probabilities(logits, temperature=0.5, top_p=0.8) == pytest.approx([16 / 25, 9 / 25, 0, 0])
    # top-k before top-p: of the three that are left the first two have 7/9 > 0.75; of all four they have 0.7
    assert probabilities(logits, top_k=3, top_p=0.75) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert probabilities(logits, top_p=0.75) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])


@pytest.mark.parametrize("top_p", [0.0, 1e-300, 0.2])
def test_top_p_always_keeps_the_likeliest(top_p):
    assert probabilities(np.array([0.0, 2.0, 1.0]), top_p=top_p).tolist() == [0, 1, 0]


def test_of_equally_likely_tokens_the_first_are_kept():
    assert probabilities(np.zeros(5), top_k=2).tolist() == [0.5, 0.5, 0, 0, 0]
    assert probabilities(np.zeros(4), top_p=0.5).tolist() == [0.5, 0.5, 0, 0]
    assert probabilities(np.zeros(5), temperature=0).tolist() == [1, 0, 0, 0, 0]


def test_banned_tokens_get_nothing_even_when_they_are_likeliest():
    logits = np.array([1.0, 90.0, 2.0, 80.0])
    for filters in (dict(), dict(temperature=0), dict(top_k=1), dict(top_p=0.5), dict(top_k=2, top_p=0.99)):
        p = probabilities(logits, banned=[1, 3], **filters)
        assert p[1] == p[3] == 0 and p.sum() == pytest.approx(1)


def test_probabilities_bear_huge_logits_and_cold_temperatures():
    assert probabilities(np.float32([3e38, -3e38, 3e38])) == pytest.approx([0.5, 0, 0.5])
    assert probabilities(np.array([1.0, 1.001, 0.5]), temperature=1e-6).tolist() == [0, 1, 0]
    assert probabilities(np.array([1.0, 2.0]), temperature=1e9) == pytest.approx([0.5, 0.5])


# -- logits that are not finite


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("filters", [dict(), dict(temperature=0), dict(top_k=2), dict(top_p=0.5)], ids=str)
def test_probabilities_refuse_logits_that_are_not_finite(filters, bad):
    logits = np.array([1.0, bad, 2.0, -math.inf])
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        probabilities(logits, **filters)
    assert probabilities(logits, banned=[1], **filters)[1] == 0  # a banned one is never looked at
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        probabilities(np.full(3, -math.inf), **filters)


@pytest.mark.parametrize("filters", [dict(), dict(temperature=0), dict(top_k=2), dict(top_p=0.5)], ids=str)
@pytest.mark.parametrize("screen_bytes", [0, 1 << 40])
@pytest.mark.parametrize("rows", [slice(None), slice(6, 7)], ids=["all logits", "one logit"])
@every_table
def test_finite_weights_that_overflow_end_in_one_error(table, rows, screen_bytes, filters, monkeypatch):
    monkeypatch.setattr(fast.steps, "SCREEN_BYTES", screen_bytes)
    cfg = tiny_config(**FAMILIES["llama"])
    _, p = random_parameters(cfg, dtype=np.float32)
    p["norm_w"][:] = 1e5
    p["head_w"][rows] = np.float32(3e38) * np.sign(p["head_w"][rows])
    assert all(np.isfinite(p[name]).all() for name in ("norm_w", "head_w"))
    story = generate(Decoding(p, cfg, ops_of(table)), TEXT[:3], 0, -1, 20, banned=(10,), **filters)
    with pytest.raises(ValueError, match="not finite at token 0 after the prompt: the model's weights overflow"):
        list(story)


@every_table
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_text_is_told_up_to_the_token_whose_logits_overflow(temperature, table):
    cfg = tiny_config(seq_len=40, position_rows=40)
    _, p = random_parameters(cfg, dtype=np.float32)
    expected = list(generate(Decoding(p, cfg, ops_of(table)), [5], 3, -1, 20, temperature=temperature))
    p["position_w"][9] = 3e38  # its norm overflows
    found = []
    with pytest.raises(ValueError, match="logits are not finite at token 9 after the prompt"):
        for token in generate(Decoding(p, cfg, ops_of(table)), [5], 3, -1, 20, temperature=temperature):
            found.append(token)
    assert found == expected[:9]


# -- draws


def quantile(df):
    """Chi-square's 0.9999 quantile (Wilson & Hilferty 1931): exceeded by chance once in 10,000 seeds."""
    return df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3


@pytest.mark.parametrize(
    "filters",
    [dict(), dict(temperature=0.7, top_k=6), dict(top_p=0.8, banned=(2,)), dict(top_k=2), dict(min_p=0.4)],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_are_drawn_as_often_as_the_filtered_probabilities_say(seed, filters):
    logits = np.random.default_rng(5).standard_normal(11)
    p, count = probabilities(logits, **filters), 20_000
    drawn = list(generate(SimpleNamespace(feed=lambda ids: logits), [0], seed, -1, count, **filters))
    found, possible = np.bincount(drawn, minlength=11), p > 0
    assert len(drawn) == count and not found[~possible].any()
    chi_square = ((found - count * p)[possible] ** 2 / (count * p[possible])).sum()
    assert chi_square < quantile(possible.sum() - 1)
    # the same test would notice a slightly different distribution
    other = np.where(possible, p + 0.02 / possible.sum(), 0) / 1.02
    assert ((found - count * other)[possible] ** 2 / (count * other[possible])).sum() > chi_square


def test_the_chi_square_above_notices_a_temperature_that_is_slightly_off():
    logits = np.random.default_rng(5).standard_normal(11)
    expected = 20_000 * probabilities(logits)
    drawn = list(generate(SimpleNamespace(feed=lambda ids: logits), [0], 0, -1, 20_000, temperature=0.9))
    assert ((np.bincount(drawn, minlength=11) - expected) ** 2 / expected).sum() > quantile(10)


@every_table
def test_generate_repeats_itself_for_a_seed_and_differs_between_seeds(table):
    _, p = random_parameters(CFG, dtype=np.float32)
    told = [tuple(generate(Decoding(p, CFG, ops_of(table)), TEXT[:3], seed, -1, 50)) for seed in (0, 0, 1, 2)]
    assert told[0] == told[1]
    assert len(set(told)) == 3
    assert all(len(ids) == 50 and set(ids) <= set(range(11)) and type(ids[0]) is int for ids in told)


@pytest.mark.parametrize("filters", [dict(), dict(repetition_penalty=1.5), dict(min_p=0.2, top_p=0.9)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_table_tells_the_same_story(temperature, filters):
    _, p = random_parameters(CFG)
    filters = filters | dict(temperature=temperature)
    told = [list(generate(Decoding(p, CFG, ops), TEXT[:3], 3, -1, 60, **filters)) for ops in map(ops_of, TABLES)]
    assert all(ids == told[0] for ids in told)


def test_the_penalty_is_for_what_was_told_and_not_for_the_end_of_a_story():
    decoding = SimpleNamespace(feed=lambda ids: np.array([1.0, 0.9, 0.8, 0.7, 0.6]))
    assert list(generate(decoding, [3, 0], 0, 3, 9, temperature=0, repetition_penalty=2.0)) == [1, 2]
    assert list(generate(decoding, [3, 0], 0, 4, 5, temperature=0, repetition_penalty=2.0)) == [1, 2]
    assert list(generate(decoding, [3, 0], 0, -1, 5, temperature=0, repetition_penalty=2.0)) == [1, 2, 4, 0, 0]


@every_table
def test_who_watches_sees_each_token_with_its_logits_and_the_story_stays_the_same(table):
    _, p = random_parameters(CFG)
    seen, (ids, *rest) = [], (TEXT[:3], 3, 9, 15)
    decoding = Decoding(p, CFG, ops_of(table))
    new = list(generate(decoding, ids, *rest, watch=lambda token, logits: seen.append((token, logits))))
    assert new == list(generate(Decoding(p, CFG, ops_of(table)), ids, *rest))
    assert [token for token, _ in seen] == new + [9] * (len(new) < 15)
    for number, (_, logits) in enumerate(seen):
        assert relative(logits, fresh_logits(p, ids + new[:number])[-1]) < 1e-12


def test_generate_ends_at_the_stop_token_and_does_not_yield_it():
    script = iter([4, 2, 7, 9, 1])
    fed = []

    def feed(ids):
        fed.append(list(ids))
        return np.where(np.arange(11) == next(script), 0.0, -math.inf)

    assert list(generate(SimpleNamespace(feed=feed), [5, 6], 0, 9, 100)) == [4, 2, 7]
    assert fed == [[5, 6], [4], [2], [7]]


def test_generate_counts_to_its_limit():
    decoding = SimpleNamespace(feed=lambda ids: np.zeros(3))
    assert len(list(generate(decoding, [0], 0, -1, 7))) == 7
    assert list(generate(decoding, [0], 0, -1, 0)) == []


def test_greedy_generation_takes_the_likeliest_each_time():
    _, p = random_parameters(CFG)
    ids = TEXT[:3]
    for token in generate(Decoding(p, CFG, OPS["numpy"]), TEXT[:3], 0, -1, 20, temperature=0):
        assert token == fresh_logits(p, ids)[-1].argmax()
        ids = [*ids, token]
