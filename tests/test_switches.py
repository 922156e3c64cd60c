"""What a Config can switch: any two choices together, in the specification and in kernels, and what each switch is
said to do. The choices of a combination are in conftest.py, SWITCHES; its number is its place in COMBINATIONS."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from conftest import (
    COMBINATIONS,
    DROPOUTS,
    FAMILIES,
    SWITCHES,
    TABLES,
    as_bytes,
    assert_float32_errs_at_most_four_times_as_much_as_the_spec,
    every_combination,
    mutant,
    ops_of,
    pairs_of,
    random_batch,
    random_parameters,
    relative,
    run_model,
    tiny_config,
)
from tiers import fast

import tinygpt
from extras import check
from sample import Decoding
from tinygpt import OPS, Dropout

LIMIT = 1e-6  # of gradient_error, for central differences at h = 1e-5
every_table = pytest.mark.parametrize("table", TABLES)
MASKS = Dropout(seed=3, step=7, sequence=5)


def longer(cfg, T=101):
    """More positions than a block has rows."""
    return cfg.changed(seq_len=T, position_rows=T + 2)


# -- every combination


def test_any_two_choices_meet_in_a_combination():
    met = set().union(*(pairs_of((name, getattr(cfg, name)) for name in SWITCHES) for cfg in COMBINATIONS))
    for a, b in itertools.combinations(SWITCHES, 2):
        for choice in itertools.product(SWITCHES[a], SWITCHES[b]):
            assert tuple(zip((a, b), choice)) in met
    left_out = {field.name for field in dataclasses.fields(tinygpt.Config)} - set(SWITCHES)
    shape = {"vocab_size", "seq_len", "width", "layers", "heads", "hidden", "position_rows"}
    assert left_out == shape | {"norm_eps", "init"}  # tested elsewhere


@every_table
@every_combination
def test_the_models_gradients_are_its_derivatives(cfg, table):
    errors = check.check_model(cfg, ops_of(table), seed=1)
    assert [name for name, _ in errors] == [t.name for t in tinygpt.layout(cfg)]
    assert max(error for _, error in errors) < LIMIT, errors


@pytest.mark.parametrize("T", [5, 101])
@every_combination
def test_kernels_agree_with_the_spec(cfg, T):
    cfg = longer(cfg, T)
    exact = run_model(cfg, "numpy", 2, T, np.float64, dropout=MASKS)
    kernels = run_model(cfg, "fast", 2, T, np.float64, space=T > 5, dropout=MASKS)
    for name in exact:
        assert relative(kernels[name], exact[name]) < 1e-12, name


def test_a_window_shorter_than_a_head_is_wide_has_room_for_its_places():
    cfg = tinygpt.Config(
        vocab_size=11, seq_len=3, width=160, layers=1, heads=1, hidden=7, positions="rope", qk_norm=True
    )
    exact, kernels = (run_model(cfg, table, 2, 3, np.float64, space=table == "fast") for table in ("numpy", "fast"))
    for name in exact:
        assert relative(kernels[name], exact[name]) < 1e-12, name


@every_combination
def test_kernels_in_float32_err_at_most_four_times_as_much_as_the_spec(cfg):
    assert_float32_errs_at_most_four_times_as_much_as_the_spec(longer(cfg, 53), 2, 53, seeds=3, dropout=MASKS)


def run_in_micro_batches(cfg, size, table, dtype):
    """(gradient, nats) of four sequences, `size` at a time."""
    T = cfg.seq_len
    _, p = random_parameters(cfg, dtype=dtype)
    batch = random_batch(cfg, 4, T, dtype=dtype)
    gradient, g = tinygpt.zero_gradients(cfg, dtype)
    ops = tinygpt.with_buffers(ops_of(table), cfg, size, T, np.dtype(dtype))
    nats = []
    for b in range(0, 4, size):
        part = (a[b : b + size] for a in batch)
        masks = MASKS._replace(sequence=MASKS.sequence + b)
        nats.append(tinygpt.loss_and_gradients(p, *part, g, cfg, ops, masks)[1].copy())
    tinygpt.add_lookup_gradient(g)
    return gradient, np.concatenate(nats)


@every_combination
def test_neither_threads_nor_micro_batches_change_a_byte(cfg, pool):
    results = set()
    for threads, size in ((1, 4), (2, 2), (3, 1), (2, 4)):
        pool.resize(threads)
        gradient, nats = run_in_micro_batches(longer(cfg), size, "fast", np.float32)
        results.add((gradient.tobytes(), nats.tobytes()))
    assert len(results) == 1


@every_combination
def test_micro_batches_of_the_spec_agree_to_rounding(cfg):
    once, *others = (run_in_micro_batches(cfg, size, "numpy", np.float64) for size in (4, 1, 2))
    for other in others:
        assert relative(other[0], once[0]) < 1e-12 and relative(other[1], once[1]) < 1e-12


@every_table
@every_combination
def test_future_tokens_change_no_byte_of_past_outputs(cfg, table):
    cfg = longer(cfg)
    _, p = random_parameters(cfg, dtype=np.float32)
    tokens = random_batch(cfg, 2, 101)[0]
    x = tinygpt.forward(p, tokens, cfg, ops_of(table), dropout=MASKS)[0].copy()
    for changed in (1, 48, 96, 100):
        other = tokens.copy()
        other[:, changed:] = (other[:, changed:] + 1) % cfg.vocab_size
        y = tinygpt.forward(p, other, cfg, ops_of(table), dropout=MASKS)[0]
        assert x[:, :changed].tobytes() == y[:, :changed].tobytes()
        assert (x[:, changed] != y[:, changed]).any(-1).all()


@every_table
@every_combination
def test_cached_logits_are_those_of_a_full_forward_also_past_the_end_of_the_context(cfg, table):
    cfg, fed = longer(cfg, 23), 0
    _, p = random_parameters(cfg)
    text, window = np.random.default_rng(7).integers(0, cfg.vocab_size, 60).tolist(), []
    decoding = Decoding(p, cfg, ops_of(table))
    for size in (1, 1, 5, 1, 9, 1, 5, 1, 12, 1, 1, 11, 2):
        ids, fed = text[fed : fed + size], fed + size
        logits, window = decoding.feed(ids), window + ids
        window = window[-11:] if len(window) > 23 else window  # its newer half goes on
        assert decoding.window == window
        x, _ = tinygpt.forward(p, np.array([window]), cfg, OPS["numpy"])
        assert relative(logits, OPS["numpy"].head_logits(x[0, -1:], p, cfg, OPS["numpy"])[0]) < 1e-12


# -- dropout


def slow_keep(dropout, site, rate, shape):
    """Section 2.6 with the integers of Python."""

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    place = np.random.SeedSequence([dropout.seed, dropout.step, dropout.layer, site])
    (state,), keep = place.generate_state(1).tolist(), np.empty(shape)
    for b, *block, row, column in np.ndindex(shape):
        at = (block[0] if block else 0) * 65536 + row
        drawn = mix((mix((mix(dropout.sequence + b ^ state) + at) % 2**32) + column) % 2**32)
        keep[(b, *block, row, column)] = 1 / (1 - rate) if drawn >= int(rate * 2**32) else 0
    return keep


def test_a_mask_is_what_its_definition_says():
    for shape in ((2, 5, 12), (2, 3, 5, 7)):
        for site, rate in ((0, 0.1), (1, 0.5), (3, 0.9)):
            dropout = Dropout(seed=2**40, step=12, sequence=6, layer=3)
            keep = dropout.keep(site, rate, shape, np.float64)
            assert np.array_equal(keep, slow_keep(dropout, site, rate, shape))
            assert dropout.keep(site, rate, shape, np.float32).dtype == np.float32


def wrong_masks(kind):
    """What is said of masks and does not hold for this kind of Dropout."""
    wrong, shape, at = [], (2, 3, 40, 50), kind(seed=0, step=5, sequence=0, layer=1)
    for rate in (0.1, 0.5, 0.9):
        kept = kind(seed=1, step=5, sequence=0).keep(1, rate, (4, 6, 60, 50), np.float64) > 0
        count, share = kept.size, 1 - rate
        near = {"share": kept.mean() - share}
        for axis, name in enumerate(("sequences", "heads", "rows", "columns")):  # of two neighbours both are kept
            both = np.take(kept, range(1, kept.shape[axis]), axis) & np.take(kept, range(kept.shape[axis] - 1), axis)
            near[f"neighbouring {name}"] = both.mean() - share**2
        deviation = math.sqrt(share * rate / count)
        wrong += [f"{name} at {rate}" for name, error in near.items() if not abs(error) < 5 * 2 * deviation]
    changes = [
        dict(seed=1),
        dict(step=6),
        dict(sequence=2),
        dict(layer=2),
        dict(step=6, layer=0),
        dict(step=1, layer=5),
    ]
    found = [at._replace(**change).keep(1, 0.5, shape, np.float64) for change in ({}, *changes)]
    found += [at.keep(site, 0.5, shape, np.float64) for site in (0, 2, 3)]
    if len({mask.tobytes() for mask in found}) < len(found):
        wrong.append("seeds, steps, sequences, layers and sites differ")
    rows = found[0].reshape(-1, 50)
    if len({row.tobytes() for row in rows}) < len(rows):
        wrong.append("rows differ")
    whole = at.keep(1, 0.5, (6, 3, 5, 7), np.float64)
    if not np.array_equal(whole[2:4], at._replace(sequence=2).keep(1, 0.5, (2, 3, 5, 7), np.float64)):
        wrong.append("micro-batches have the masks of the whole")
    if not np.array_equal(whole[:, :, :4, :6], at.keep(1, 0.5, (6, 3, 4, 6), np.float64)):
        wrong.append("a shorter sequence has the masks of a longer one")
    return wrong


def test_masks_keep_their_share_and_differ_wherever_they_should():
    assert wrong_masks(Dropout) == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("rate * 2**32", "rate * 0.97 * 2**32"),
        ("drawn >= ", "drawn < "),
        ("self.seed, self.step", "self.seed + self.step"),
        ("self.step, self.layer", "self.step + self.layer"),
        ("self.layer, site", "self.layer"),
        ("np.arange(self.sequence, self.sequence + B", "np.arange(0, B"),
        (" * 65536", ""),
        ("np.arange(blocks)[:, None]", "np.zeros(blocks, int)[:, None]"),
        ("mix(keys + rows)", "mix(keys + 0 * rows)"),
        ("mix(mix(keys + rows) +", "mix(keys + rows +"),
        ("1 / (1 - rate)", "-1"),
    ],
)
def test_the_checks_of_masks_tell_a_wrong_one(old, new):
    assert wrong_masks(mutant(Dropout, old, new))


def test_dropout_leaves_the_expected_value():
    """Over all masks the mean of x keep is x: of 20,000, within 5 standard deviations."""
    keep = Dropout(0, 0, 0).keep(2, 0.2, (20_000, 1, 6), np.float64)
    assert np.abs(keep.mean(0) - 1).max() < 5 * math.sqrt(0.25 / 20_000)
    assert set(np.unique(keep)) == {0, 1.25}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kernels_draw_the_masks_of_the_spec(dtype):
    B, T, C = 3, 101, 37
    for site, rate in ((0, 0.1), (2, 0.5), (3, 0.9)):
        dropout, ones, found = Dropout(4, 9, 6, 2), np.ones((B * T, C), dtype), np.empty((B * T, C), dtype)
        tasks = B * fast.workspace.blocks(T, fast.workspace.ROW_BLOCK)
        fast.POOL.run(fast.embed.drop_kernel, tasks, ones, T, fast.workspace.mask_of(dropout, site, rate, B), found)
        assert np.array_equal(found.reshape(B, T, C), dropout.keep(site, rate, (B, T, C), dtype))


@every_table
@pytest.mark.parametrize("name", DROPOUTS)
def test_each_dropout_acts_in_training_and_none_in_evaluation(name, table):
    without, cfg = tiny_config(), tiny_config(**{name: 0.5})
    plain = as_bytes(run_model(without, table, 2, 5, np.float32))
    assert as_bytes(run_model(cfg, table, 2, 5, np.float32, dropout=None)) == plain
    assert as_bytes(run_model(without, table, 2, 5, np.float32, dropout=MASKS)) == plain
    first, again, other = (
        as_bytes(run_model(cfg, table, 2, 5, np.float32, dropout=MASKS._replace(step=step))) for step in (1, 1, 2)
    )
    assert first == again
    assert len({run["x"] for run in (plain, first, other)}) == 3


# -- positions


@pytest.mark.parametrize("half", [False, True])
def test_scores_of_turned_queries_and_keys_depend_on_the_difference_of_positions_only(half):
    rng, (cos, sin) = np.random.default_rng(0), tinygpt.rotation(300, 8, 10000.0, "float64")
    q, k = (np.repeat(rng.standard_normal((1, 8)), 300, 0) for _ in range(2))  # the same at each position
    scores = tinygpt.rotate_forward(q, cos, sin, half)[0] @ tinygpt.rotate_forward(k, cos, sin, half)[0].T
    for difference in (0, 1, 2, 17, 250):
        diagonal = np.diagonal(scores, -difference)
        assert np.ptp(diagonal) < 1e-12
    assert np.std([scores[i, 0] for i in range(300)]) > 0.1
    assert relative(scores[0, 0], (q[0] * k[0]).sum()) < 1e-14


def test_rotations_are_those_of_the_angles_that_the_paper_gives():
    cos, sin = tinygpt.rotation(7, 6, 100.0, "float64")
    angles = [[s * 100.0 ** (-2 * i / 6) for i in range(3)] for s in range(7)]
    assert relative(cos, np.cos(angles)) < 1e-15 and relative(sin, np.sin(angles)) < 1e-15
    assert tinygpt.rotation(7, 6, 100.0, "float32")[0].dtype == np.float32


def test_pairs_of_neighbours_and_pairs_of_halves_differ_by_the_order_of_columns_only():
    x, (cos, sin) = np.random.default_rng(0).standard_normal((2, 3, 5, 8)), tinygpt.rotation(5, 8, 50.0, "float64")
    halves = [0, 2, 4, 6, 1, 3, 5, 7]
    neighbours = tinygpt.rotate_forward(x, cos, sin, False)[0][..., halves]
    assert np.array_equal(tinygpt.rotate_forward(x[..., halves], cos, sin, True)[0], neighbours)


def published_slopes(H):
    """The code of Press et al.: powers of 2^(-8 / H), and for other numbers of heads every second one of twice n."""
    if H & (H - 1) == 0:
        return [2.0 ** (-8 / H * (i + 1)) for i in range(H)]
    n = 2 ** math.floor(math.log2(H))
    return published_slopes(n) + published_slopes(2 * n)[::2][: H - n]


def test_alibi_slopes_are_those_of_the_formula_also_where_heads_are_no_power_of_two():
    assert tinygpt.alibi_slopes(1).tolist() == [2**-8]
    assert tinygpt.alibi_slopes(8).tolist() == [2**-i for i in range(1, 9)]
    assert tinygpt.alibi_slopes(12) == pytest.approx(
        [2**-i for i in range(1, 9)] + [2**-i for i in (0.5, 1.5, 2.5, 3.5)]
    )
    for H in range(1, 40):
        assert tinygpt.alibi_slopes(H) == pytest.approx(published_slopes(H), rel=1e-14), H


@every_table
def test_alibi_alone_gives_weights_that_fall_with_the_distance(table):
    """Queries of 0 leave the slopes: keys at distance d weigh exp(-slope d)."""
    cfg = tiny_config(**FAMILIES["bloom"] | dict(layers=1, seq_len=70, position_rows=70))
    H, D = cfg.heads, cfg.head_width
    _, p = random_parameters(cfg)
    layer = p["layers"][0]
    layer["qkv_w"][:, : H * D], layer["qkv_b"][: H * D] = 0, 0
    x = np.random.default_rng(0).standard_normal((1, 70, cfg.width))
    found = ops_of(table).attention_layer.forward(x, layer, cfg, ops_of(table))[0]
    n = tinygpt.layernorm_forward(x[0], layer["norm1_w"], layer["norm1_b"], cfg.norm_eps)[0]
    v = (n @ layer["qkv_w"] + layer["qkv_b"])[:, 2 * H * D :].reshape(70, H, D)
    distance = np.arange(70)[:, None] - np.arange(70)
    weights = np.where(distance >= 0, np.exp(-tinygpt.alibi_slopes(H)[:, None, None] * distance), 0)
    weights /= weights.sum(-1, keepdims=True)  # (H, T, S)
    o = np.einsum("hts,shd->thd", weights, v).reshape(70, H * D)
    assert relative(found[0], x[0] + o @ layer["out_w"] + layer["out_b"]) < 1e-12


# -- windows and groups


@every_table
@pytest.mark.parametrize("window", [1, 3, 50])
def test_a_window_sees_the_newest_keys_in_odd_layers_and_all_in_even_ones(window, table):
    T, forward = 101, ops_of(table).attention_layer.forward
    cfg = tiny_config(window=window, seq_len=T, position_rows=T)
    _, p = random_parameters(cfg, dtype=np.float32)
    x = np.random.default_rng(0).standard_normal((1, T, cfg.width)).astype(np.float32)
    for index in range(4):
        before = forward(x, p["layers"][0], cfg, ops_of(table), index)[0].copy()
        for s in (0, 1, 47, 48, 60, 100):
            other = x.copy()
            other[0, s] = -other[0, s]
            changed = (forward(other, p["layers"][0], cfg, ops_of(table), index)[0] != before)[0].any(-1)
            sees = np.arange(T) >= s if index % 2 == 0 else (np.arange(T) >= s) & (np.arange(T) < s + window)
            assert np.array_equal(changed, sees), (index, s)


@every_table
@pytest.mark.parametrize("G", [1, 2, 3])
def test_grouped_heads_are_heads_with_repeated_keys_and_values(G, table):
    grouped = tiny_config(heads=6, kv_heads=G, head_width=4)
    single, R, forward = grouped.changed(kv_heads=6), 6 // G, ops_of(table).attention_layer.forward
    layer = random_parameters(grouped)[1]["layers"][0]
    heads = [*range(6), *(6 + h // R for h in range(6)), *(6 + G + h // R for h in range(6))]
    columns = [4 * head + d for head in heads for d in range(4)]
    repeated = layer | {"qkv_w": layer["qkv_w"][:, columns].copy(), "qkv_b": layer["qkv_b"][columns].copy()}
    x = np.random.default_rng(0).standard_normal((2, 5, 12))
    assert (
        relative(forward(x, layer, grouped, ops_of(table))[0], forward(x, repeated, single, ops_of(table))[0].copy())
        < 1e-13
    )


@every_table
def test_as_many_groups_as_heads_are_no_groups(table):
    default, all_heads = tiny_config(), tiny_config(kv_heads=3)
    assert default == all_heads
    results = [as_bytes(run_model(cfg, table, 2, 5, np.float64)) for cfg in (default, all_heads)]
    assert results[0] == results[1]


# -- MLPs, norms, head


@every_table
def test_swiglu_whose_values_are_1_is_silu(table):
    gated, plain = tiny_config(mlp="swiglu"), tiny_config(mlp="silu")
    layer = random_parameters(gated)[1]["layers"][0]
    layer["up_w"][:, 7:], layer["up_b"][7:] = 0, 1
    gate = layer | {"up_w": layer["up_w"][:, :7].copy(), "up_b": layer["up_b"][:7].copy()}
    x, forward = np.random.default_rng(0).standard_normal((2, 5, 12)), ops_of(table).mlp_layer.forward
    assert (
        relative(forward(x, layer, gated, ops_of(table))[0].copy(), forward(x, gate, plain, ops_of(table))[0]) < 1e-14
    )
    layer["up_b"][7:] = -3
    thrice = forward(x, layer, gated, ops_of(table))[0] - x - layer["down_b"]
    assert relative(thrice, -3 * (forward(x, gate, plain, ops_of(table))[0] - x - layer["down_b"])) < 1e-13


@every_table
def test_rmsnorm_has_no_mean_to_take_away_and_layernorm_has(table):
    """A constant added to each column of the residual stream: LayerNorm does not see it, RMSNorm does."""
    for norm, sees in (("layernorm", False), ("rmsnorm", True)):
        cfg = tiny_config(norm=norm)
        _, p = random_parameters(cfg)
        x = np.random.default_rng(0).standard_normal((10, 12))
        logits = [ops_of(table).head_logits(y, p, cfg, ops_of(table)).copy() for y in (x, x + 1)]
        assert (relative(*logits) > 1e-3) == sees
        scaled = ops_of(table).head_logits(100 * x, p, cfg, ops_of(table))
        assert relative(scaled, logits[0]) < 1e-4  # but for eps


@every_table
def test_a_head_of_its_own_is_the_tied_one_if_its_matrix_is(table):
    tied, own = tiny_config(), tiny_config(tied=False, head_bias=True)
    flat, p = random_parameters(own)
    p["head_w"][:], p["head_b"][:] = p["embed_w"], 0
    shared = np.concatenate(
        [flat[t.offset :][: math.prod(t.shape)] for t in tinygpt.layout(own) if "head" not in t.name]
    )
    q = tinygpt.views(tinygpt.layout(tied), shared, tied.layers)
    results = []
    for cfg, parameters in ((own, p), (tied, q)):
        gradient, g = tinygpt.zero_gradients(cfg, np.float64)
        loss, _ = tinygpt.loss_and_gradients(parameters, *random_batch(cfg, 2, 5), g, cfg, ops_of(table))
        tinygpt.add_lookup_gradient(g)
        results.append((loss, g["embed_w"] + (0 if cfg.tied else g["head_w"]), g["layers"][1]["qkv_w"]))
    for found, expected in zip(*results):
        assert relative(found, expected) < 1e-13
