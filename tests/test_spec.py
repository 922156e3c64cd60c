"""Part I of tinygpt.py: every op against its definition and against calculus, the whole model against PyTorch's
numbers, and the checks against functions broken on purpose. What is said of a table of ops is said of each table."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import mutant, random_batch, random_parameters, relative, tiny_config

import tinygpt
from tinygpt import OPS, SIZES, Config

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tiny_model.json").read_text(encoding="utf-8"))
LIMIT = 1e-6  # of gradient_error, for central differences at h = 1e-5
every_table = pytest.mark.parametrize("table", OPS)

# -- primitives: what they are


class Normal:
    """Draws in one dtype, so that the same case serves float32 and float64."""

    def __init__(self, seed, dtype=np.float64):
        self.rng, self.dtype = np.random.default_rng(seed), dtype

    def __call__(self, shape=()):
        return self.rng.standard_normal(shape).astype(self.dtype)


class Case(NamedTuple):
    op: str
    arguments: object  # n -> the arguments of the op's forward, drawn by n
    returned: tuple  # indices of the arguments whose gradients backward returns
    added: tuple  # and of those whose gradients it adds into


TOKENS = np.array([[3, 1, 3, 0, 10], [1, 1, 3, 2, 9]])  # some of them repeat, within a sequence and between two
TARGETS = np.array([0, 10, 3, 3, 7, 1, 2, 9, 10, 5])
WEIGHTS = np.array([1.0, 0.25, 0.0, 2.0, 1.0, 0.5, 0.0, 3.0, 0.125, 1.0])

CASES = {
    "linear": Case("linear", lambda n: (n((2, 5, 4)), n((4, 7)), n(7)), (0,), (1, 2)),
    "square linear": Case("linear", lambda n: (n((2, 5, 4)), n((4, 4)), n(4)), (0,), (1, 2)),
    "layernorm": Case("layernorm", lambda n: (n((2, 5, 12)), n(12), n(12), 1e-5), (0,), (1, 2)),
    "layernorm of small inputs": Case("layernorm", lambda n: (n((2, 5, 12)) / 10, n(12), n(12), 1e-5), (0,), (1, 2)),
    "gelu": Case("gelu", lambda n: (2 * n((2, 5, 7)),), (0,), ()),
    "attention": Case("attention", lambda n: tuple(n((2, 3, 5, 4)) for _ in range(3)), (0, 1, 2), ()),
    "attention with a past": Case(
        "attention", lambda n: (n((2, 3, 5, 4)), n((2, 3, 9, 4)), n((2, 3, 9, 4))), (0, 1, 2), ()
    ),
    "embedding": Case("embedding", lambda n: (TOKENS, n((11, 12)), n((5, 12))), (), (1, 2)),
    "cross_entropy": Case("cross_entropy", lambda n: (3 * n((10, 11)), TARGETS, WEIGHTS.astype(n.dtype)), (0,), ()),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def slow_linear(x, w, b):
    y = np.empty((*x.shape[:-1], len(b)))
    for at in np.ndindex(y.shape):
        y[at] = b[at[-1]] + math.fsum(x[at[:-1]][k] * w[k, at[-1]] for k in range(len(w)))
    return y


def slow_layernorm(x, w, b, eps):
    y = np.empty_like(x)
    for at in np.ndindex(x.shape[:-1]):
        mean = math.fsum(x[at]) / len(w)
        variance = math.fsum((value - mean) ** 2 for value in x[at]) / len(w)
        y[at] = [(value - mean) / math.sqrt(variance + eps) * gain + bias for value, gain, bias in zip(x[at], w, b)]
    return y


def slow_gelu(h):
    def one(v):
        return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    return np.vectorize(one)(h)


def slow_attention(q, k, v):
    (B, H, T, D), S = q.shape, k.shape[2]
    o = np.zeros((B, H, T, D))
    for b, h, t in np.ndindex(B, H, T):
        seen = range(S - T + t + 1)
        odds = [math.exp(math.fsum(q[b, h, t] * k[b, h, s]) / math.sqrt(D)) for s in seen]
        for s in seen:
            o[b, h, t] += odds[s] / math.fsum(odds) * v[b, h, s]
    return o


def slow_embedding(tokens, w, positions):
    return np.array([[w[token] + positions[t] for t, token in enumerate(row)] for row in tokens])


def slow_cross_entropy(logits, targets, weights):
    odds = np.exp(logits)
    return math.fsum(-w * math.log(row[target] / row.sum()) for row, target, w in zip(odds, targets, weights))


SLOW = {name[5:]: function for name, function in globals().items() if name.startswith("slow_")}


def distance_from_definition(case, forward=None, seed=0):
    forward = forward or getattr(tinygpt, f"{case.op}_forward")
    arguments = case.arguments(Normal(seed))
    return relative(forward(*arguments)[0], SLOW[case.op](*arguments))


@every_case
def test_a_primitive_is_what_its_definition_says(case):
    assert distance_from_definition(case) < 1e-13


def test_cross_entropy_returns_the_nats_of_every_target_unweighted():
    (logits, targets, weights) = CASES["cross_entropy"].arguments(Normal(0))
    loss, nats, _ = tinygpt.cross_entropy_forward(logits, targets, weights)
    each = [slow_cross_entropy(logits[i : i + 1], targets[i : i + 1], [1.0]) for i in range(len(targets))]
    assert relative(nats, each) < 1e-13
    assert relative(loss, (weights * nats).sum()) < 1e-15


def test_cross_entropy_and_attention_bear_huge_scores():
    logits = np.array([[1e30, 0.0, -1e30], [-1e4, -1e4, -1e4]])
    loss, nats, cache = tinygpt.cross_entropy_forward(logits, np.array([0, 1]), np.ones(2))
    assert nats == pytest.approx([0, math.log(3)])
    assert np.isfinite(tinygpt.cross_entropy_backward(cache)).all()
    q = np.full((1, 1, 2, 4), 1e15)
    o, cache = tinygpt.attention_forward(q, q, q / 1e15)
    assert o == pytest.approx(np.ones((1, 1, 2, 4)))
    assert np.isfinite(tinygpt.attention_backward(o, cache)).all()


# -- primitives: their derivatives


def call_backward(case, backward, dout, cache, gradients):
    """What backward returns, as a tuple."""
    if case.op == "cross_entropy":
        return (backward(cache),)  # of the loss, whose own gradient is 1
    returned = backward(dout, cache, *gradients)
    return returned if type(returned) is tuple else () if returned is None else (returned,)


def run_primitive(case, forward=None, backward=None, dtype=np.float64, times=1, seed=0):
    """(arguments, forward, output, cache, dout, returned, gradients) of a forward and `times` backwards."""
    forward = forward or getattr(tinygpt, f"{case.op}_forward")
    backward = backward or getattr(tinygpt, f"{case.op}_backward")
    n = Normal(seed, dtype)
    arguments = case.arguments(n)
    out, *_, cache = forward(*arguments)
    dout = np.ones((), dtype) if case.op == "cross_entropy" else n(out.shape)
    gradients = [np.zeros_like(arguments[i]) for i in case.added]
    for _ in range(times):
        returned = call_backward(case, backward, dout, cache, gradients)
    return arguments, forward, out, cache, dout, returned, gradients


def derivative_error(case, forward=None, backward=None):
    """The worst gradient_error over every element of every gradient."""
    arguments, forward, _, _, dout, returned, gradients = run_primitive(case, forward, backward)
    errors = []
    for i, analytic in zip((*case.returned, *case.added), (*returned, *gradients), strict=True):
        numeric = tinygpt.numerical_gradient(lambda: (forward(*arguments)[0] * dout).sum(), arguments[i])
        assert analytic.shape == numeric.shape
        errors.append(tinygpt.gradient_error(analytic, numeric))
    return max(errors)


@every_case
def test_a_primitives_gradients_are_its_derivatives(case):
    assert derivative_error(case) < LIMIT


@every_case
def test_a_primitives_backward_adds_and_leaves_its_inputs_alone(case):
    arguments, _, _, cache, dout, once, single = run_primitive(case)
    before = [np.copy(a) for a in (*arguments, dout, *cache)]
    gradients = [2 * g for g in single]
    again = call_backward(case, getattr(tinygpt, f"{case.op}_backward"), dout, cache, gradients)
    assert all(np.array_equal(a, b) for a, b in zip((*arguments, dout, *cache), before, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(relative(g, 3 * s) < 1e-14 for g, s in zip(gradients, single, strict=True))


@every_case
def test_a_primitive_of_float32_is_float32_throughout(case):
    arguments, _, out, cache, _, returned, gradients = run_primitive(case, dtype=np.float32)
    arrays = [out, *(a for a in cache if a is not arguments[0]), *returned, *gradients]
    assert {a.dtype for a in arrays if a.dtype != np.int64} == {np.dtype(np.float32)}


# -- primitives: would the checks above notice?

WRONG_FORWARDS = [  # with a backward that may agree: only the definition tells
    ("layernorm of small inputs", "+ eps)", "+ 1e-3)"),
    (
        "layernorm of small inputs",
        "(centred * centred).mean(-1, keepdims=True)",
        "centred.var(-1, keepdims=True, ddof=1)",
    ),
    ("attention", "np.arange(S - T, S)[:, None]", "np.arange(S - T + 1, S + 1)[:, None]"),
    ("attention", "np.arange(S) <=", "np.arange(S) <"),
    ("attention with a past", "np.arange(S - T, S)[:, None]", "np.arange(T)[:, None]"),
    ("attention", " * (1 / math.sqrt(D))", ""),
    ("attention", "math.sqrt(D)", "math.sqrt(T)"),
    ("gelu", "GELU_CUBE * h * h * h", "GELU_CUBE * h * h"),
    ("cross_entropy", "(weights * nats).sum()", "nats.sum()"),
]
WRONG_BACKWARDS = [
    ("linear", "dw += ", "dw[:] = 2 * "),
    ("square linear", "x_NK.T @ dy_NM", "dy_NM.T @ x_NK"),
    ("square linear", "dy @ w.T", "dy @ w"),
    ("linear", "db += dy_NM.sum(0)", "pass"),
    ("layernorm", "dn - dn.mean(-1, keepdims=True) - n", "dn - n"),
    ("layernorm", " - n * (dn * n).mean(-1, keepdims=True)", ""),
    ("layernorm", "dw += (dy * n)", "dw += (dn * n)"),
    (
        "layernorm of small inputs",
        "w, mean, rstd = cache",
        "w, mean, _ = cache; rstd = (x.var(-1)[..., None] + 1e-3) ** -0.5",
    ),
    ("gelu", "1 + 3 * GELU_CUBE", "1 + GELU_CUBE"),
    ("gelu", "(1 - t * t)", "(1 - t)"),
    ("attention", "scale = 1 / math.sqrt(q.shape[-1])", "scale = 1"),
    ("attention", "(dp - (dp * p).sum(-1, keepdims=True))", "dp"),
    ("attention", "dk = dscores.swapaxes(-1, -2) @ q * scale", "dk = dscores @ q * scale"),
    ("embedding", "np.add.at(dw, tokens, dx)", "dw[tokens] += dx"),
    ("embedding", "dx.sum(0)", "dx.mean(0)"),
    ("cross_entropy", "dlogits * weights[:, None]", "dlogits"),
    ("cross_entropy", " -= 1", " -= 0.999"),
]


@pytest.mark.filterwarnings("ignore:invalid value")  # a query that sees no key
@pytest.mark.parametrize("name, old, new", WRONG_FORWARDS)
def test_the_definitions_tell_a_wrong_forward(name, old, new):
    case = CASES[name]
    wrong = mutant(getattr(tinygpt, f"{case.op}_forward"), old, new)
    assert not distance_from_definition(case, wrong) < 1e-6


@pytest.mark.parametrize("name, old, new", WRONG_BACKWARDS)
def test_finite_differences_tell_a_wrong_backward(name, old, new):
    case = CASES[name]
    wrong = mutant(getattr(tinygpt, f"{case.op}_backward"), old, new)
    assert not derivative_error(case, backward=wrong) < 100 * LIMIT


def test_the_check_of_the_whole_model_tells_a_sublayer_that_forgets_its_residual():
    wrong = mutant(tinygpt.mlp_layer_backward, "return dy + ", "return ")
    errors = tinygpt.check_model(tiny_config(), OPS["numpy"] | {"mlp_layer_backward": wrong})
    assert max(error for _, error in errors) > 100 * LIMIT


# -- sublayers, of every table

SUBLAYERS = ("embed", "attention_layer", "mlp_layer", "head")
KEPT = ("norm1", "qkv", "o", "lse", "norm2", "h")  # what the kernels' backwards read of their workspace


def run_sublayer(ops, name, x, p, cfg, dout, g=None):
    """(output, dx, cache) of a sublayer, dx for this dout; without g forward only. The head's dout: (targets, weights);
    its output is the loss."""
    layer, grads = p["layers"][0], g and g["layers"][0]
    if name == "head":
        loss, nats, dx = ops["head_loss"](x, *dout, p, g, cfg)
        assert loss == pytest.approx(float((dout[1] * nats).sum()), rel=1e-5)
        return loss, dx, (nats,)
    if name == "embed":
        out, cache = ops["embed_forward"](x, p, cfg)
        return out, g and ops["embed_backward"](dout, cache, g, cfg), cache
    out, cache = ops[f"{name}_forward"](x, layer, cfg)
    return out, g and ops[f"{name}_backward"](dout, cache, layer, grads, cfg), cache


def sublayer_inputs(name, cfg, dtype=np.float64, seed=0):
    """(flat, p, x, dout)"""
    n = Normal(seed, dtype)
    flat, p = random_parameters(cfg, seed, dtype)
    tokens, targets, weights = random_batch(cfg, 2, cfg.seq_len, seed, dtype)
    shape = (2, cfg.seq_len, cfg.width)
    dout = (targets, weights) if name == "head" else n(shape)
    return flat, p, tokens if name == "embed" else n(shape), dout


def cached_arrays(cache):
    """Every array that a cache holds and a backward reads."""
    if isinstance(cache, np.ndarray):
        return [cache]
    if isinstance(cache, dict):
        return [cache[name] for name in KEPT]
    return [array for part in cache for array in cached_arrays(part)]


@every_table
@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_sublayers_gradients_are_its_derivatives(name, table):
    cfg, ops = tiny_config(layers=1), OPS[table]
    flat, p, x, dout = sublayer_inputs(name, cfg)
    gradient, g = tinygpt.zero_gradients(cfg, np.float64)
    _, dx, _ = run_sublayer(ops, name, x, p, cfg, dout, g)
    tinygpt.join_tied(g)

    def loss():
        out = run_sublayer(ops, name, x, p, cfg, dout)[0]
        return out if name == "head" else (out * dout).sum()

    if name != "embed":
        assert tinygpt.gradient_error(dx, tinygpt.numerical_gradient(loss, x)) < LIMIT
    rng, touched = np.random.default_rng(1), set()
    for t in tinygpt.layout(cfg):
        here = slice(t.offset, t.offset + math.prod(t.shape))
        kept, direction, slopes = flat[here].copy(), rng.standard_normal(here.stop - here.start), []
        direction /= np.linalg.norm(direction)
        for step in (1e-5, -1e-5):
            flat[here] = kept + step * direction
            slopes.append(loss())
        flat[here] = kept
        numeric = np.array([(slopes[0] - slopes[1]) / 2e-5])
        assert tinygpt.gradient_error(np.array([gradient[here] @ direction]), numeric) < LIMIT, t.name
        touched |= {t.name} if gradient[here].any() else set()
    of_name = {"embed": ("embed_w", "position_w"), "head": ("embed_w", "norm_w", "norm_b")}
    of_name["attention_layer"] = ("qkv_w", "out_w", "norm1_w", "norm1_b", "qkv_b", "out_b")
    of_name["mlp_layer"] = ("up_w", "down_w", "norm2_w", "norm2_b", "up_b", "down_b")
    assert touched == set(of_name[name])


@every_table
@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_sublayers_backward_adds_and_leaves_its_inputs_alone(name, table):
    cfg, ops = tiny_config(layers=1), OPS[table]
    flat, p, x, dout = sublayer_inputs(name, cfg)
    gradient, g = tinygpt.zero_gradients(cfg, np.float64)
    _, dx, cache = run_sublayer(ops, name, x, p, cfg, dout, g)
    once, dx = gradient.copy(), None if dx is None else dx.copy()
    lookup = g["lookup_w"].copy()
    inputs = [flat, x, *(dout if name == "head" else (dout, *cached_arrays(cache)))]
    before = [np.copy(a) for a in inputs]
    if name == "head":
        again = ops["head_loss"](x, *dout, p, g, cfg)[2]
    elif name == "embed":
        again = ops["embed_backward"](dout, cache, g, cfg)
    else:
        again = ops[f"{name}_backward"](dout, cache, p["layers"][0], g["layers"][0], cfg)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(inputs, before, strict=True))
    assert dx is None or np.array_equal(again, dx)
    assert relative(gradient, 2 * once) < 1e-13
    assert relative(g["lookup_w"], 2 * lookup) < 1e-14


@every_table
@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_sublayer_of_float32_is_float32_throughout(name, table):
    cfg = tiny_config(layers=1)
    _, p, x, dout = sublayer_inputs(name, cfg, np.float32)
    gradient, g = tinygpt.zero_gradients(cfg)
    out, dx, cache = run_sublayer(OPS[table], name, x, p, cfg, dout, g)
    arrays = [a for a in (out, dx, gradient, *cached_arrays(cache)) if isinstance(a, np.ndarray)]
    assert {a.dtype for a in arrays if a.dtype != np.int64} == {np.dtype(np.float32)}
    if name == "head":
        assert type(out) is float
        assert OPS[table]["head_logits"](x[0], p, cfg).dtype == np.float32


@every_table
def test_the_head_gives_the_logits_that_its_loss_is_of(table):
    cfg, ops = tiny_config(), OPS[table]
    _, p, x, (targets, weights) = sublayer_inputs("head", cfg)
    _, nats, _ = ops["head_loss"](x, targets, weights, p, None, cfg)
    logits = ops["head_logits"](x.reshape(-1, cfg.width), p, cfg)
    assert relative(tinygpt.cross_entropy_forward(logits, targets.reshape(-1), 1.0)[1], nats.reshape(-1)) < 1e-13


# -- the whole model, of every table

MODELS = {
    "tiny": tiny_config(),
    "one head": tiny_config(heads=1, vocab_size=13),
    "one layer, one position": tiny_config(layers=1, seq_len=1),
    "a head for each column": tiny_config(heads=12, vocab_size=31, layers=3),
    "rows and hidden columns that end within a block": tiny_config(seq_len=101, hidden=259, position_rows=120),
}


@every_table
@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_the_models_gradients_are_its_derivatives(cfg, table):
    errors = tinygpt.check_model(cfg, OPS[table], seed=1)
    assert [name for name, _ in errors] == [t.name for t in tinygpt.layout(cfg)]
    assert max(error for _, error in errors) < LIMIT, errors


@every_table
def test_the_model_computes_what_pytorch_does(table):
    cfg = Config(**GOLDEN["config"])
    flat = GOLDEN["scale"] * np.sin(np.arange(1.0, tinygpt.count_parameters(cfg)[0] + 1))
    p, (gradient, g) = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), tinygpt.zero_gradients(cfg, np.float64)
    tokens, targets, weights = (np.array(GOLDEN[name]) for name in ("tokens", "targets", "weights"))
    x, _ = tinygpt.forward(p, tokens, cfg, OPS[table])
    logits = OPS[table]["head_logits"](x.reshape(-1, cfg.width), p, cfg)
    assert relative(logits, np.array(GOLDEN["logits"]).reshape(logits.shape)) < 1e-12
    loss, nats = tinygpt.loss_and_gradients(p, tokens, targets, weights, g, cfg, OPS[table])
    tinygpt.join_tied(g)
    assert relative(loss, GOLDEN["loss"]) < 1e-12
    assert relative(nats, GOLDEN["nats"]) < 1e-12
    assert [t.name for t in tinygpt.layout(cfg)] == list(GOLDEN["gradients"])
    for t in tinygpt.layout(cfg):
        found = gradient[t.offset : t.offset + math.prod(t.shape)]
        assert relative(found, GOLDEN["gradients"][t.name]) < 1e-12, t.name


@every_table
def test_gradients_are_optional_and_the_parameters_are_only_read(table):
    cfg = tiny_config()
    flat, p = random_parameters(cfg)
    before, batch = flat.copy(), random_batch(cfg, 2, 5)
    with_gradients = tinygpt.loss_and_gradients(p, *batch, tinygpt.zero_gradients(cfg, np.float64)[1], cfg, OPS[table])
    without = tinygpt.loss_and_gradients(p, *batch, None, cfg, OPS[table])
    assert with_gradients[0] == without[0] and np.array_equal(with_gradients[1], without[1])
    assert np.array_equal(flat, before)


@every_table
def test_a_nan_in_one_parameter_shows_in_the_loss(table):
    cfg = tiny_config()
    for dtype in (np.float32, np.float64):
        for t in tinygpt.layout(cfg):
            flat, p = random_parameters(cfg, dtype=dtype)
            batch = random_batch(cfg, 2, 5, dtype=dtype)
            row = batch[0][0, 0] * cfg.width if t.name == "embed_w" else 0  # a row that is looked up
            flat[t.offset + row] = math.nan
            assert math.isnan(tinygpt.loss_and_gradients(p, *batch, None, cfg, OPS[table])[0]), t.name


@every_table
def test_future_tokens_never_change_past_outputs(table):
    cfg = tiny_config(seq_len=101, position_rows=101)
    _, p = random_parameters(cfg, dtype=np.float32)
    tokens = random_batch(cfg, 2, 101)[0]
    x = tinygpt.forward(p, tokens, cfg, OPS[table])[0].copy()
    for changed in (1, 47, 48, 95, 96, 100):
        other = tokens.copy()
        other[:, changed:] = (other[:, changed:] + 1) % cfg.vocab_size
        y = tinygpt.forward(p, other, cfg, OPS[table])[0]
        assert x[:, :changed].tobytes() == y[:, :changed].tobytes()
        assert (x[:, changed] != y[:, changed]).any(-1).all()


@every_table
def test_tokens_that_the_model_does_not_have_are_refused(table):
    cfg = tiny_config()
    _, p = random_parameters(cfg)
    tokens, targets, weights = random_batch(cfg, 2, 5)
    for bad in (-1, 11):
        wrong = tokens.copy()
        wrong[1, 2] = bad
        with pytest.raises(ValueError, match=rf"token id {bad} is outside 0 \.\. 10.*another tokenizer"):
            tinygpt.forward(p, wrong, cfg, OPS[table])
    with pytest.raises(
        ValueError, match=r"T=6 but this model has seq_len=5; shorten the text or train with --seq-len 6"
    ):
        tinygpt.forward(p, np.zeros((2, 6), np.int64), cfg, OPS[table])


@every_table
def test_targets_that_the_model_does_not_have_are_refused(table):
    cfg = tiny_config()
    _, p = random_parameters(cfg)
    tokens, targets, weights = random_batch(cfg, 2, 5)
    for bad in (-1, 11):
        wrong = targets.copy()
        wrong[1, 2] = bad
        with pytest.raises(ValueError, match=f"{bad} is outside 0"):
            tinygpt.loss_and_gradients(p, tokens, wrong, weights, None, cfg, OPS[table])


# -- configuration and parameters


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(vocab_size=0), ["vocab_size", "0", "expected a positive int"]),
        (dict(seq_len=-5), ["seq_len", "-5", "expected a positive int"]),
        (dict(width=12.0), ["width", "12.0", "expected a positive int"]),
        (dict(layers="2"), ["layers", "'2'", "expected a positive int"]),
        (dict(heads=True), ["heads", "True", "expected a positive int"]),
        (dict(hidden=-1), ["hidden", "-1", "expected a positive int"]),
        (dict(vocab_size=2**31), ["vocab_size", str(2**31), "expected a positive int"]),
        (dict(norm_eps=0.0), ["norm_eps", "0.0", "expected a positive float"]),
        (dict(norm_eps=math.nan), ["norm_eps", "nan", "expected a positive float"]),
        (dict(norm_eps=math.inf), ["norm_eps", "inf", "expected a positive float"]),
        (dict(heads=5), ["width 12", "heads=5", "try heads=4"]),
        (dict(heads=100), ["width 12", "heads=100", "try heads=12"]),
        (dict(position_rows=4), ["position_rows=4", "seq_len=5", "raise it or leave it"]),
    ],
)
def test_config_says_what_does_not_fit_and_what_would(changes, words):
    with pytest.raises(ValueError) as error:
        tiny_config(**changes)
    for word in words:
        assert word in str(error.value)


def test_config_fills_in_what_is_left_at_0():
    cfg = Config(vocab_size=11, seq_len=5, width=12, layers=2, heads=3)
    assert (cfg.hidden, cfg.position_rows, cfg.head_width) == (48, 5, 4)


# V C + P C + L (12 C^2 + 13 C) + 2 C, worked out by hand
TOTALS = {"700k": 678_528, "1m": 1_350_400, "8m": 7_498_240, "28m": 27_579_392}


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_the_parameters_that_the_formula_gives(size):
    cfg = SIZES[size]
    V, P, C, L = cfg.vocab_size, cfg.position_rows, cfg.width, cfg.layers
    total, decayed, without_tables = tinygpt.count_parameters(cfg)
    assert total == TOTALS[size] == V * C + P * C + L * (12 * C * C + 13 * C) + 2 * C
    assert decayed == V * C + P * C + L * 12 * C * C
    assert without_tables == L * (12 * C * C + 13 * C) + 2 * C


def test_the_layout_has_matrices_first_and_no_gaps():
    cfg = tiny_config()
    table = tinygpt.layout(cfg)
    offsets = np.cumsum([0, *(math.prod(t.shape) for t in table)])
    assert [t.offset for t in table] == list(offsets[:-1])
    assert offsets[-1] == tinygpt.count_parameters(cfg)[0]
    assert [t.decayed for t in table] == sorted((t.decayed for t in table), reverse=True)
    assert all(t.decayed == (len(t.shape) - t.layered == 2) for t in table)


def test_views_share_the_flat_buffer_and_cover_it():
    cfg = tiny_config()
    flat = np.zeros(tinygpt.count_parameters(cfg)[0])
    p = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers)
    for view in (*(v for k, v in p.items() if k != "layers"), *(v for layer in p["layers"] for v in layer.values())):
        view += 1
    assert (flat == 1).all()
    qkv = next(t for t in tinygpt.layout(cfg) if t.name == "qkv_w")
    p["layers"][1]["qkv_w"][2, 3] = 7
    assert flat[qkv.offset + (1 * 12 + 2) * 36 + 3] == 7


def test_initial_parameters_have_the_means_and_deviations_of_the_table():
    cfg = Config(vocab_size=500, seq_len=64, width=64, layers=4, heads=4)
    flat = tinygpt.init_parameters(cfg, 3)
    assert flat.dtype == np.float32
    for t in tinygpt.layout(cfg):
        x = flat[t.offset : t.offset + math.prod(t.shape)].astype(np.float64)
        deviation = 1 / 8 / math.sqrt(8) if t.name in ("out_w", "down_w") else 1 / 8 if t.decayed else 0.0
        mean = 1.0 if t.name in ("norm1_w", "norm2_w", "norm_w") else 0.0
        assert abs(x.mean() - mean) <= 4 * deviation / math.sqrt(x.size), t.name
        assert abs(x.std() - deviation) <= 4 * deviation / math.sqrt(2 * x.size), t.name


def test_the_same_seed_gives_the_same_parameters():
    cfg = tiny_config()
    assert tinygpt.init_parameters(cfg, 3).tobytes() == tinygpt.init_parameters(cfg, 3).tobytes()
    assert tinygpt.init_parameters(cfg, 3).tobytes() != tinygpt.init_parameters(cfg, 4).tobytes()


def test_join_tied_adds_the_lookups_gradient_once():
    cfg = tiny_config()
    gradient, g = tinygpt.zero_gradients(cfg, np.float64)
    g["embed_w"][:], g["lookup_w"][:] = 1, 2
    for _ in range(2):
        tinygpt.join_tied(g)
        assert (gradient[: 11 * 12] == 3).all() and not gradient[11 * 12 :].any() and not g["lookup_w"].any()


# -- python tinygpt.py check


def test_the_check_command_passes_and_prints_every_tensor(capsys):
    assert tinygpt.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    for t in tinygpt.layout(tiny_config()):
        assert len(rows[t.name]) == len(OPS) and max(map(float, rows[t.name])) < LIMIT
    assert lines[-1].endswith("passed")


def test_the_check_command_fails_when_a_gradient_is_wrong(capsys, monkeypatch):
    wrong = mutant(tinygpt.mlp_layer_backward, "return dy + ", "return ")
    monkeypatch.setitem(OPS["numpy"], "mlp_layer_backward", wrong)
    assert tinygpt.main(["check"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("FAILED")
