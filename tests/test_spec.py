"""Part I of tinygpt.py: every op against its definition and against calculus, the whole model against PyTorch's
numbers, and the checks against functions broken on purpose. What is said of a table of ops is said of each table.
Combinations of what a Config can switch are in test_switches.py."""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import (
    DROPOUTS,
    FAMILIES,
    NO_BIAS,
    TABLES,
    mutant,
    numerical_gradient,
    ops_of,
    random_batch,
    random_parameters,
    relative,
    tiny_config,
    with_mutant,
)
from tiers import WITHOUT_FAST, fast, needs_fast

import tinygpt
from extras import check, plan
from tinygpt import OPS, Config, find_size, find_sizes

GOLDENS = {
    name: json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("tiny_model", "tiny_llama")
}
LIMIT = 1e-6  # of gradient_error, for central differences at h = 1e-5
every_table = pytest.mark.parametrize("table", TABLES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def test_part_one_can_be_read_in_one_go():
    source = Path(tinygpt.__file__).read_text(encoding="utf-8")
    part = source[source.index("# Part I: the specification") : source.index("# Part II: ")]
    assert len(part.rstrip("# \n").splitlines()) <= 750


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


def qkv(n, G=3, S=5):
    """H=3, or 6 where they share G=2 heads of keys and values."""
    return n((2, 6 if G == 2 else 3, 5, 4)), n((2, G, S, 4)), n((2, G, S, 4))


def angles(n):
    turns = n((5, 2))
    return np.cos(turns), np.sin(turns)


SLOPES = np.array([0.5, 0.25, 1.5])
DROPPED = tinygpt.Dropout(seed=3, step=5, sequence=0), 1 / 3  # and the rate

CASES = {
    "linear": Case("linear", lambda n: (n((2, 5, 4)), n((4, 7)), n(7)), (0,), (1, 2)),
    "square linear": Case("linear", lambda n: (n((2, 5, 4)), n((4, 4)), n(4)), (0,), (1, 2)),
    "linear without bias": Case("linear", lambda n: (n((2, 5, 4)), n((4, 7)), None), (0,), (1, 2)),
    "layernorm": Case("layernorm", lambda n: (n((2, 5, 12)), n(12), n(12), 1e-5), (0,), (1, 2)),
    "layernorm of small inputs": Case("layernorm", lambda n: (n((2, 5, 12)) / 10, n(12), n(12), 1e-5), (0,), (1, 2)),
    "layernorm without gain": Case("layernorm", lambda n: (n((2, 5, 12)), None, n(12), 1e-5), (0,), (1, 2)),
    "layernorm without bias": Case("layernorm", lambda n: (n((2, 5, 12)), n(12), None, 1e-5), (0,), (1, 2)),
    "rmsnorm": Case("rmsnorm", lambda n: (n((2, 5, 12)), n(12), None, 1e-5), (0,), (1, 2)),
    "rmsnorm of small inputs": Case("rmsnorm", lambda n: (n((2, 5, 12)) / 10, n(12), None, 1e-5), (0,), (1, 2)),
    "rmsnorm of heads": Case("rmsnorm", lambda n: (n((2, 3, 5, 4)), n(4), None, 1e-5), (0,), (1, 2)),
    "rmsnorm without gain": Case("rmsnorm", lambda n: (n((2, 5, 12)), None, None, 1e-5), (0,), (1, 2)),
    "gelu-tanh": Case("gelu_tanh", lambda n: (2 * n((2, 5, 7)),), (0,), ()),
    "gelu": Case("gelu", lambda n: (2 * n((2, 5, 7)),), (0,), ()),
    "silu": Case("silu", lambda n: (2 * n((2, 5, 7)),), (0,), ()),
    "relu2": Case("relu2", lambda n: (2 * n((2, 5, 7)),), (0,), ()),  # none within h of 0, where it bends
    "swiglu": Case("swiglu", lambda n: (2 * n((2, 5, 14)),), (0,), ()),
    "rotate": Case("rotate", lambda n: (n((2, 3, 5, 4)), *angles(n), False), (0,), ()),
    "rotate halves": Case("rotate", lambda n: (n((2, 3, 5, 4)), *angles(n), True), (0,), ()),
    "attention": Case("attention", lambda n: (*qkv(n), 0.7), (0, 1, 2), ()),
    "attention of scale 1": Case("attention", lambda n: (*qkv(n), 1.0), (0, 1, 2), ()),
    "attention with a past": Case("attention", lambda n: (*qkv(n, S=9), 0.5), (0, 1, 2), ()),
    "attention with slopes": Case("attention", lambda n: (*qkv(n, S=9), 0.5, SLOPES), (0, 1, 2), ()),
    "attention with a window": Case("attention", lambda n: (*qkv(n, S=9), 0.5, None, 3), (0, 1, 2), ()),
    "attention of grouped heads": Case("attention", lambda n: (*qkv(n, G=2), 0.5), (0, 1, 2), ()),
    "attention with dropout": Case("attention", lambda n: (*qkv(n), 0.5, None, 0, *DROPPED), (0, 1, 2), ()),
    "attention with everything": Case(
        "attention",
        lambda n: (*qkv(n, G=2, S=9), 1.0, np.tile(SLOPES, 2), 4, *DROPPED),
        (0, 1, 2),
        (),
    ),
    "embedding": Case("embedding", lambda n: (TOKENS, n((11, 12)), n((5, 12))), (), (1, 2)),
    "embedding without positions": Case("embedding", lambda n: (TOKENS, n((11, 12)), None), (), (1, 2)),
    "cross_entropy": Case("cross_entropy", lambda n: (3 * n((10, 11)), TARGETS, WEIGHTS.astype(n.dtype)), (0,), ()),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def slow_linear(x, w, b):
    y = np.empty((*x.shape[:-1], w.shape[1]))
    for at in np.ndindex(y.shape):
        y[at] = math.fsum(x[at[:-1]][k] * w[k, at[-1]] for k in range(len(w))) + (0 if b is None else b[at[-1]])
    return y


def slow_norm(x, w, b, eps, centred):
    y, C = np.empty_like(x), x.shape[-1]
    for at in np.ndindex(x.shape[:-1]):
        mean = math.fsum(x[at]) / C if centred else 0.0
        square = math.fsum((value - mean) ** 2 for value in x[at]) / C
        for c in range(C):
            gain, bias = 1.0 if w is None else w[c], 0.0 if b is None else b[c]
            y[(*at, c)] = (x[at][c] - mean) / math.sqrt(square + eps) * gain + bias
    return y


def slow_layernorm(x, w, b, eps):
    return slow_norm(x, w, b, eps, True)


def slow_rmsnorm(x, w, b, eps):
    return slow_norm(x, w, b, eps, False)


def of_each(function):
    return lambda h: np.vectorize(function)(h)


slow_gelu_tanh = of_each(lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))))
slow_gelu = of_each(lambda v: v * math.erfc(-v / math.sqrt(2)) / 2)
slow_silu = of_each(lambda v: v / (1 + math.exp(-v)))
slow_relu2 = of_each(lambda v: v**2 if v > 0 else 0.0)


def slow_swiglu(h):
    F = h.shape[-1] // 2
    return slow_silu(h[..., :F]) * h[..., F:]


def slow_rotate(x, cos, sin, half):
    """Each pair a complex number, times e^(i angle)."""
    y, D = np.empty_like(x), x.shape[-1]
    for at in np.ndindex(*x.shape[:-1], D // 2):
        *row, i = at
        real, imaginary = (i, i + D // 2) if half else (2 * i, 2 * i + 1)
        turned = complex(x[(*row, real)], x[(*row, imaginary)]) * complex(cos[row[-1], i], sin[row[-1], i])
        y[(*row, real)], y[(*row, imaginary)] = turned.real, turned.imag
    return y


def slow_attention(q, k, v, scale, slopes=None, window=0, dropout=None, rate=0.0):
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    o = np.zeros((B, H, T, D))
    keep = dropout and dropout.keep(tinygpt.ATTENTION_SITE, rate, (B, H, T, S), np.float64)
    for b, h, t in np.ndindex(B, H, T):
        now, g, slope = S - T + t, h // (H // G), 0.0 if slopes is None else slopes[h]
        seen = range(max(0, now - window + 1) if window else 0, now + 1)
        odds = {s: math.exp(math.fsum(q[b, h, t] * k[b, g, s]) * scale - slope * (now - s)) for s in seen}
        for s in seen:
            kept = 1.0 if keep is None else keep[b, h, t, s]
            o[b, h, t] += kept * odds[s] / math.fsum(odds.values()) * v[b, g, s]
    return o


def slow_embedding(tokens, w, positions):
    zeros = np.zeros((tokens.shape[1], w.shape[1]))
    positions = zeros if positions is None else positions
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
    o, cache = tinygpt.attention_forward(q, q, q / 1e15, 0.5)
    assert o == pytest.approx(np.ones((1, 1, 2, 4)))
    assert np.isfinite(tinygpt.attention_backward(o, cache)).all()


def test_activations_bear_huge_inputs():
    h = np.array([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4])
    for name in ("gelu_tanh", "gelu", "silu"):
        a, cache = getattr(tinygpt, f"{name}_forward")(h)
        assert a == pytest.approx(np.maximum(h, 0), abs=1e-40), name
        assert getattr(tinygpt, f"{name}_backward")(np.ones(6), cache) == pytest.approx([0, 0, 0, 0.5, 1, 1]), name


def test_erf_is_that_of_each_element_in_the_dtype_of_the_array():
    x = np.linspace(-4, 4, 24).reshape(2, 3, 4)
    assert np.array_equal(tinygpt.erf(x), np.vectorize(math.erf)(x))
    assert tinygpt.erf(x.astype(np.float32)).dtype == np.float32


# -- primitives: their derivatives


def arrays_in(things):
    """Every array in nested tuples and lists."""
    nested = (arrays_in(thing) if isinstance(thing, (tuple, list)) else [thing] for thing in things)
    return [thing for part in nested for thing in part if isinstance(thing, np.ndarray)]


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
    gradients = [None if arguments[i] is None else np.zeros_like(arguments[i]) for i in case.added]
    for _ in range(times):
        returned = call_backward(case, backward, dout, cache, gradients)
    return arguments, forward, out, cache, dout, returned, gradients


def derivative_error(case, forward=None, backward=None):
    """The worst gradient_error over every element of every gradient."""
    arguments, forward, _, _, dout, returned, gradients = run_primitive(case, forward, backward)
    errors = []
    for i, analytic in zip((*case.returned, *case.added), (*returned, *gradients), strict=True):
        if arguments[i] is None:
            continue
        numeric = numerical_gradient(lambda: (forward(*arguments)[0] * dout).sum(), arguments[i])
        assert analytic.shape == numeric.shape
        errors.append(check.gradient_error(analytic, numeric))
    return max(errors)


@every_case
def test_a_primitives_gradients_are_its_derivatives(case):
    assert derivative_error(case) < LIMIT


@every_case
def test_a_primitives_backward_adds_and_leaves_its_inputs_alone(case):
    arguments, _, _, cache, dout, once, single = run_primitive(case)
    inputs = arrays_in((*arguments, dout, cache))
    before = [np.copy(a) for a in inputs]
    gradients = [None if g is None else 2 * g for g in single]
    again = call_backward(case, getattr(tinygpt, f"{case.op}_backward"), dout, cache, gradients)
    assert all(np.array_equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(g is s is None or relative(g, 3 * s) < 1e-14 for g, s in zip(gradients, single, strict=True))


@every_case
def test_a_primitive_of_float32_is_float32_throughout(case):
    arguments, _, out, cache, _, returned, gradients = run_primitive(case, dtype=np.float32)
    arrays = arrays_in((out, cache, returned, gradients))
    assert {a.dtype for a in arrays if a.dtype != np.int64} == {np.dtype(np.float32)}


# -- primitives: would the checks above notice?

WRONG_FORWARDS = [  # with a backward that may agree: only the definition tells
    ("layernorm of small inputs", "+ eps)", "+ 1e-3)"),
    (
        "layernorm of small inputs",
        "(centred * centred).mean(-1, keepdims=True)",
        "centred.var(-1, keepdims=True, ddof=1)",
    ),
    ("rmsnorm of small inputs", "+ eps)", "+ 1e-3)"),
    ("rmsnorm", "(x * x).mean(-1, keepdims=True)", "x.var(-1, keepdims=True)"),
    ("rmsnorm", "(x * x).mean(-1, keepdims=True)", "(x * x).sum(-1, keepdims=True)"),
    ("attention", "(distance >= 0)", "(distance >= -1)"),
    ("attention", "(distance >= 0)", "(distance > 0)"),
    ("attention with a past", "np.arange(S - T, S)[:, None]", "np.arange(T)[:, None]"),
    ("attention", " * scale).reshape", ").reshape"),
    ("attention", " * scale).reshape", " / math.sqrt(D)).reshape"),
    ("attention with a window", "distance < (window or S)", "distance <= (window or S)"),
    ("attention with a window", "distance < (window or S)", "distance < S"),
    ("attention with slopes", "scores = scores - slopes", "scores = scores + slopes"),
    ("attention with slopes", " * distance.astype(q.dtype)", " * distance.astype(q.dtype) * scale"),
    ("attention with slopes", "slopes.astype(q.dtype)[:", "slopes.astype(q.dtype)[::-1][:"),
    (
        "attention of grouped heads",
        "q.reshape(B, G, H // G, T, D)",
        "q.reshape(B, H // G, G, T, D).swapaxes(1, 2)",
    ),
    ("attention with dropout", "kept = p if keep is None else p * keep", "kept = p"),
    (
        "attention with dropout",
        "kept = p if keep is None else p * keep\n    o =",
        "kept = p if keep is None else p * keep; kept /= kept.sum(-1, keepdims=True) + 1e-300\n    o =",
    ),
    ("gelu-tanh", "GELU_CUBE * h * h * h", "GELU_CUBE * h * h"),
    ("gelu", "h / math.sqrt(2)", "h"),
    ("gelu", "(1 + erf(h / math.sqrt(2)))", "(1 + np.tanh(GELU_SCALE * (h + GELU_CUBE * h * h * h)))"),
    ("silu", "h * sigmoid(h)", "h * sigmoid(1.702 * h)"),
    ("relu2", "np.maximum(h, 0) ** 2", "np.maximum(h, 0)"),
    ("relu2", "np.maximum(h, 0)", "h"),
    ("swiglu", "gate, value = np", "value, gate = np"),
    ("swiglu", "silu_forward(gate)", "gelu_forward(gate)"),
    ("rotate", "if half", "if not half"),
    ("rotate halves", "if half", "if not half"),
    ("rotate", "* cos - x[", "* cos + x["),
    ("cross_entropy", "(weights * nats).sum()", "nats.sum()"),
]
WRONG_BACKWARDS = [
    ("linear", "dw += ", "dw[:] = 2 * "),
    ("square linear", "x_NK.T @ dy_NM", "dy_NM.T @ x_NK"),
    ("square linear", "dy @ w.T", "dy @ w"),
    ("linear", "db += dy_NM.sum(0)", "pass"),
    ("layernorm", "dn - dn.mean(-1, keepdims=True) - n", "dn - n"),
    ("layernorm", " - n * (dn * n).mean(-1, keepdims=True)", ""),
    ("layernorm", "dw += (dy * n)", "dw += (dy * w * n)"),
    ("layernorm", "dn = dy if w is None else dy * w", "dn = dy"),
    ("layernorm of small inputs", "return rstd * ", "return (rstd**-2 + 1e-5) ** -0.5 * "),
    ("rmsnorm", " - n * (dn * n).mean(-1, keepdims=True)", ""),
    ("rmsnorm", "dn - n * (", "dn - dn.mean(-1, keepdims=True) - n * ("),
    ("rmsnorm", "dw += (dy * n)", "dw += (dy * w * n)"),
    ("rmsnorm", "dn = dy if w is None else dy * w", "dn = dy"),
    ("rmsnorm of small inputs", "return rstd * ", "return (rstd**-2 + 1e-5) ** -0.5 * "),
    ("rmsnorm of heads", "(dy * n).sum(tuple(range(dy.ndim - 1)))", "(dy * n)[0].sum((0, 1))"),
    ("gelu-tanh", "1 + 3 * GELU_CUBE", "1 + GELU_CUBE"),
    ("gelu-tanh", "(1 - t * t)", "(1 - t)"),
    ("gelu", "np.exp(-h * h / 2)", "np.exp(-h * h)"),
    ("gelu", "(1 / math.sqrt(2 * math.pi))", "GELU_SCALE"),
    ("silu", "* (1 - s))  #", "* s)  #"),
    ("silu", "s + h * s", "h * s"),
    ("relu2", "da * 2 *", "da *"),
    ("swiglu", "da * value, silu", "da, silu"),
    ("swiglu", "da * a]", "da]"),
    ("swiglu", "[silu_backward(da * value, silu), da * a]", "[da * a, silu_backward(da * value, silu)]"),
    ("rotate", "-sin", "sin"),
    ("rotate halves", "-sin, half", "-sin, False"),
    ("attention", "(dp - (dp * p).sum(-1, keepdims=True))", "dp"),
    ("attention", "k[:, :, None] * scale", "k[:, :, None]"),
    ("attention", ".sum(2) * scale", ".sum(2)"),
    ("attention", "(dscores.swapaxes(-1, -2) @ q_BGRTD)", "(dscores @ q_BGRTD)"),
    ("attention of grouped heads", ".sum(2) * scale", ".mean(2) * scale"),
    ("attention of grouped heads", "@ do_BGRTD).sum(2)", "@ do_BGRTD)[:, :, 0]"),
    ("attention with dropout", "dp if keep is None else dp * keep", "dp"),
    ("attention with dropout", "(p if keep is None else p * keep)", "p"),
    ("attention with dropout", "dscores = (p * (dp", "dscores = (p * keep * (dp"),
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
    wrong = with_mutant(OPS["numpy"], "mlp_layer_backward", "return dy + ", "return ")
    errors = check.check_model(tiny_config(), wrong)
    assert max(error for _, error in errors) > 100 * LIMIT


# -- sublayers, of every table

SUBLAYERS = ("embed", "attention_layer", "mlp_layer", "head")
KEPT = ("norm1", "qkv", "qk", "o", "lse", "norm2", "h", "looked_up", "embedded_norm")  # what kernels' backwards read


def run_sublayer(ops, name, x, p, cfg, dout, g=None):
    """(output, dx, cache) of a sublayer, dx for this dout; without g forward only. The head's dout: (targets, weights);
    its output is the loss."""
    layer, grads = p["layers"][0], g and g["layers"][0]
    if name == "head":
        loss, nats, dx = ops.head_loss(x, *dout, p, g, cfg, ops)
        assert loss == pytest.approx(float((dout[1] * nats).sum()), rel=1e-5)
        return loss, dx, (nats,)
    if name == "embed":
        out, cache = ops.embed.forward(x, p, cfg, ops)
        return out, g and ops.embed.backward(dout, cache, g, cfg, ops), cache
    out, cache = getattr(ops, name).forward(x, layer, cfg, ops)
    return out, g and getattr(ops, name).backward(dout, cache, layer, grads, cfg, ops), cache


def sublayer_inputs(name, cfg, dtype=np.float64, seed=0):
    """(flat, p, x, dout)"""
    n = Normal(seed, dtype)
    flat, p = random_parameters(cfg, seed, dtype)
    tokens, targets, weights = random_batch(cfg, 2, cfg.seq_len, seed, dtype)
    shape = (2, cfg.seq_len, cfg.width)
    dout = (targets, weights) if name == "head" else n(shape)
    return flat, p, tokens if name == "embed" else n(shape), dout


def cached_arrays(cache):
    """Every array of floats that a cache holds and a backward reads."""
    if isinstance(cache, dict):
        return [cache[name] for name in KEPT if name in cache]
    if isinstance(cache, (tuple, list)):
        return [array for part in cache for array in cached_arrays(part)]
    return [cache] if isinstance(cache, np.ndarray) and cache.dtype.kind == "f" else []


@every_table
@every_family
@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_sublayers_gradients_are_its_derivatives(name, family, table):
    cfg, ops = tiny_config(**FAMILIES[family] | {"layers": 1}), ops_of(table)
    flat, p, x, dout = sublayer_inputs(name, cfg)
    gradient, g = tinygpt.zero_gradients(cfg, np.float64)
    _, dx, _ = run_sublayer(ops, name, x, p, cfg, dout, g)
    tinygpt.add_lookup_gradient(g)

    def loss():
        out = run_sublayer(ops, name, x, p, cfg, dout)[0]
        return out if name == "head" else (out * dout).sum()

    if name != "embed":
        assert check.gradient_error(dx, numerical_gradient(loss, x)) < LIMIT
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
        assert check.gradient_error(np.array([gradient[here] @ direction]), numeric) < LIMIT, t.name
        touched |= {t.name} if gradient[here].any() else set()
    of_name = {"embed": ("embed_w", "position_w", "embed_norm_w", "embed_norm_b")}
    of_name["head"] = ("embed_w" if cfg.tied else "head_w", "head_b", "norm_w", "norm_b")
    of_name["attention_layer"] = ("qkv_w", "out_w", "norm1_w", "norm1_b", "qkv_b", "q_norm_w", "k_norm_w", "out_b")
    of_name["mlp_layer"] = ("up_w", "down_w", "norm2_w", "norm2_b", "up_b", "down_b")
    assert touched == set(of_name[name]) & {t.name for t in tinygpt.layout(cfg)}


@every_table
@every_family
@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_sublayers_backward_adds_and_leaves_its_inputs_alone(name, family, table):
    cfg, ops = tiny_config(**FAMILIES[family] | {"layers": 1}), ops_of(table)
    flat, p, x, dout = sublayer_inputs(name, cfg)
    gradient, g = tinygpt.zero_gradients(cfg, np.float64)
    _, dx, cache = run_sublayer(ops, name, x, p, cfg, dout, g)
    once, dx = gradient.copy(), None if dx is None else dx.copy()
    lookup = g["lookup_w"].copy()
    inputs = [flat, x, *(dout if name == "head" else (dout, *cached_arrays(cache)))]
    before = [np.copy(a) for a in inputs]
    if name == "head":
        again = ops.head_loss(x, *dout, p, g, cfg, ops)[2]
    elif name == "embed":
        again = ops.embed.backward(dout, cache, g, cfg, ops)
    else:
        again = getattr(ops, name).backward(dout, cache, p["layers"][0], g["layers"][0], cfg, ops)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(inputs, before, strict=True))
    assert dx is None or np.array_equal(again, dx)
    assert relative(gradient, 2 * once) < 1e-13
    assert relative(g["lookup_w"], 2 * lookup) < 1e-13


@every_table
@every_family
@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_sublayer_of_float32_is_float32_throughout(name, family, table):
    cfg = tiny_config(**FAMILIES[family] | {"layers": 1})
    _, p, x, dout = sublayer_inputs(name, cfg, np.float32)
    gradient, g = tinygpt.zero_gradients(cfg)
    out, dx, cache = run_sublayer(ops_of(table), name, x, p, cfg, dout, g)
    arrays = [a for a in (out, dx, gradient, *cached_arrays(cache)) if isinstance(a, np.ndarray)]
    assert {a.dtype for a in arrays if a.dtype != np.int64} == {np.dtype(np.float32)}
    if name == "head":
        assert type(out) is float
        assert ops_of(table).head_logits(x[0], p, cfg, ops_of(table)).dtype == np.float32


@every_table
@pytest.mark.parametrize("changes", [{}, dict(tied=False, head_bias=True)], ids=["tied", "untied"])
def test_a_head_without_gradients_has_the_same_nats_and_no_dx(changes, table):
    cfg, ops = tiny_config(**changes), ops_of(table)
    _, p, x, dout = sublayer_inputs("head", cfg)
    loss, nats, dx = ops.head_loss(x, *dout, p, tinygpt.zero_gradients(cfg, np.float64)[1], cfg, ops)
    assert dx.shape == x.shape
    again, same, dx = ops.head_loss(x, *dout, p, None, cfg, ops)
    assert again == loss and same.tobytes() == nats.tobytes() and dx is None


@every_table
def test_the_head_gives_the_logits_that_its_loss_is_of(table):
    cfg, ops = tiny_config(), ops_of(table)
    _, p, x, (targets, weights) = sublayer_inputs("head", cfg)
    _, nats, _ = ops.head_loss(x, targets, weights, p, None, cfg, ops)
    logits = ops.head_logits(x.reshape(-1, cfg.width), p, cfg, ops)
    assert relative(tinygpt.cross_entropy_forward(logits, targets.reshape(-1), 1.0)[1], nats.reshape(-1)) < 1e-13


# -- the whole model, of every table

LONG_LLAMA = FAMILIES["llama"] | {"position_rows": 101}
MODELS = {
    "tiny": tiny_config(),
    "one head": tiny_config(heads=1, vocab_size=13),
    "one layer, one position": tiny_config(layers=1, seq_len=1),
    "a head for each column": tiny_config(heads=12, vocab_size=31, layers=3),
    "rows and hidden columns that end within a block": tiny_config(seq_len=101, hidden=259, position_rows=120),
    "gated hidden columns that end within a block": tiny_config(seq_len=101, hidden=259, **LONG_LLAMA),
}


@every_table
@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_the_models_gradients_are_its_derivatives(cfg, table):
    errors = check.check_model(cfg, ops_of(table), seed=1)
    assert [name for name, _ in errors] == [t.name for t in tinygpt.layout(cfg)]
    assert max(error for _, error in errors) < LIMIT, errors


def distance_from_golden(golden, ops):
    """The largest relative difference of logits, loss, nats and gradients from those that PyTorch found."""
    cfg = Config(**golden["config"])
    flat = golden["scale"] * np.sin(np.arange(1.0, tinygpt.count_parameters(cfg)[0] + 1))
    p, (gradient, g) = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), tinygpt.zero_gradients(cfg, np.float64)
    tokens, targets, weights = (np.array(golden[name]) for name in ("tokens", "targets", "weights"))
    x, _ = tinygpt.forward(p, tokens, cfg, ops)
    logits = ops.head_logits(x.reshape(-1, cfg.width), p, cfg, ops)
    loss, nats = tinygpt.loss_and_gradients(p, tokens, targets, weights, g, cfg, ops)
    tinygpt.add_lookup_gradient(g)
    found = {"loss": loss, "nats": nats, "logits": logits.reshape(*tokens.shape, -1)}
    distances = [relative(found[name], golden[name]) for name in found]
    assert [t.name for t in tinygpt.layout(cfg)] == list(golden["gradients"])
    for t in tinygpt.layout(cfg):
        here = slice(t.offset, t.offset + math.prod(t.shape))
        distances.append(relative(gradient[here], golden["gradients"][t.name]))
    return max(distances)


@every_table
@pytest.mark.parametrize("golden", GOLDENS.values(), ids=GOLDENS)
def test_the_model_computes_what_pytorch_does(golden, table):
    assert distance_from_golden(golden, ops_of(table)) < 1e-12


WRONG_SUBLAYERS = [
    ("tiny_model", "attention_layer_forward", "1 / math.sqrt(D)", "1 / math.sqrt(T)"),
    ("tiny_model", "attention_layer_forward", "heads[:, :H], heads[:, H :", "heads[:, ::-1][:, :H], heads[:, H :"),
    ("tiny_model", "attention_layer_forward", "return x + ", "return n + "),
    ("tiny_model", "mlp_layer_forward", 'p["norm2_w"], p["norm2_b"]', 'p["norm1_w"], p["norm1_b"]'),
    ("tiny_model", "mlp_layer_forward", "cfg.norm_eps", "1e-4"),
    ("tiny_model", "embed_forward", "positions[start :", "positions[start + 1 : 1 +"),
    ("tiny_llama", "attention_layer_forward", "k, k_turn = ops.rotate.forward(k", "_, k_turn = ops.rotate.forward(k"),
    ("tiny_llama", "attention_layer_forward", "cfg.rope_theta", "10000.0"),
    ("tiny_llama", "attention_layer_forward", "a[start : start + T]", "a[start : start + 1]"),  # of no position
    ("tiny_llama", "attention_layer_forward", "rotate.forward(q, cos, sin", "rotate.forward(q, cos, -sin"),
    ("tiny_llama", "attention_layer_backward", "ops.rotate.backward(dk, k_turn)", "dk"),
    ("tiny_llama", "embed_backward", 'g["lookup_w"]', 'g["head_w"]'),
]  # fmt: skip


@pytest.mark.parametrize("golden, name, old, new", WRONG_SUBLAYERS)
def test_pytorchs_numbers_tell_a_wrong_sublayer(golden, name, old, new):
    assert not distance_from_golden(GOLDENS[golden], with_mutant(OPS["numpy"], name, old, new)) < 1e-4


@every_table
def test_gradients_are_optional_and_the_parameters_are_only_read(table):
    cfg = tiny_config()
    flat, p = random_parameters(cfg)
    before, batch = flat.copy(), random_batch(cfg, 2, 5)
    with_gradients = tinygpt.loss_and_gradients(
        p, *batch, tinygpt.zero_gradients(cfg, np.float64)[1], cfg, ops_of(table)
    )
    without = tinygpt.loss_and_gradients(p, *batch, None, cfg, ops_of(table))
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
            assert math.isnan(tinygpt.loss_and_gradients(p, *batch, None, cfg, ops_of(table))[0]), t.name


@every_table
def test_future_tokens_never_change_past_outputs(table):
    cfg = tiny_config(seq_len=101, position_rows=101)
    _, p = random_parameters(cfg, dtype=np.float32)
    tokens = random_batch(cfg, 2, 101)[0]
    x = tinygpt.forward(p, tokens, cfg, ops_of(table))[0].copy()
    for changed in (1, 47, 48, 95, 96, 100):
        other = tokens.copy()
        other[:, changed:] = (other[:, changed:] + 1) % cfg.vocab_size
        y = tinygpt.forward(p, other, cfg, ops_of(table))[0]
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
            tinygpt.forward(p, wrong, cfg, ops_of(table))
    with pytest.raises(
        ValueError, match=r"T=6 but this model has seq_len=5; shorten the text or train with --seq-len 6"
    ):
        tinygpt.forward(p, np.zeros((2, 6), np.int64), cfg, ops_of(table))


@every_table
def test_targets_that_the_model_does_not_have_are_refused(table):
    cfg = tiny_config()
    _, p = random_parameters(cfg)
    tokens, targets, weights = random_batch(cfg, 2, 5)
    for bad in (-1, 11):
        wrong = targets.copy()
        wrong[1, 2] = bad
        with pytest.raises(ValueError, match=f"{bad} is outside 0"):
            tinygpt.loss_and_gradients(p, tokens, wrong, weights, None, cfg, ops_of(table))


# -- configuration and parameters

REFUSED = [
    (dict(width=0), "width is 0; expected a positive int"),
    (dict(seq_len=-5), "seq_len is -5; expected a positive int"),
    (dict(width=12.0), "width is 12.0; expected a positive int"),
    (dict(layers="2"), "layers is '2'; expected a positive int"),
    (dict(heads=True), "heads is True; expected a positive int"),
    (dict(hidden=-1), "hidden is -1; expected a positive int"),
    (dict(kv_heads=-1), "kv_heads is -1; expected a positive int"),
    (dict(head_width=2.0), "head_width is 2.0; expected a positive int"),
    (dict(window=-3), "window is -3; expected a positive int"),
    (dict(vocab_size=2**31), f"vocab_size is {2**31}; expected a positive int"),
    (dict(norm_eps=0.0), "norm_eps is 0.0; expected a positive float"),
    (dict(norm_eps=math.nan), "norm_eps is nan; expected a positive float"),
    (dict(norm_eps=math.inf), "norm_eps is inf; expected a positive float"),
    (dict(rope_theta=0.0), "rope_theta is 0.0; expected a positive float"),
    (dict(rope_theta=10000), "rope_theta is 10000; expected a positive float"),
    (dict(tied=1), "tied is 1; expected a bool"),
    (dict(qkv_bias=None), "qkv_bias is None; expected a bool"),
    (dict(norm=5), "norm is 5; expected a str"),
    (dict(norm="batchnorm"), "norm is 'batchnorm'; expected one of layernorm, rmsnorm"),
    (dict(positions="sinusoidal"), "expected one of learned, rope, rope-half, alibi, none"),
    (dict(mlp="relu"), "mlp is 'relu'; expected one of gelu-tanh, gelu, silu, relu2, swiglu"),
    (dict(init="xavier"), "init is 'xavier'; expected one of fan-in, gpt2, normal, torch, lillm"),
    *((dict([(name, 1.0)]), f"{name} is 1.0; expected 0 (off) to below 1") for name in DROPOUTS),
    (dict(mlp_dropout=-0.1), "mlp_dropout is -0.1; expected 0 (off) to below 1"),
    (dict(mlp_dropout=math.nan), "mlp_dropout is nan; expected 0 (off) to below 1"),
    (dict(out_dropout=0), "out_dropout is 0; expected 0 (off) to below 1"),
    (dict(heads=5), "width 12 does not divide into heads=5; try heads=4"),
    (dict(heads=100), "width 12 does not divide into heads=100; try heads=12"),
    (dict(heads=6, kv_heads=4), "heads=6 cannot share kv_heads=4; try kv_heads=3"),
    (dict(heads=3, kv_heads=6), "heads=3 cannot share kv_heads=6; try kv_heads=3"),
    (dict(positions="rope", heads=4), "positions=rope turns pairs, but head_width=3 is odd"),
    (dict(positions="rope-half", head_width=7), "positions=rope-half turns pairs, but head_width=7 is odd"),
    (dict(position_rows=4), "position_rows=4 is below seq_len=5; raise it or leave it"),
]


@pytest.mark.parametrize("changes, words", REFUSED)
def test_config_says_in_one_line_what_does_not_fit_and_what_would(changes, words):
    with pytest.raises(ValueError) as error:
        tiny_config(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_config_fills_in_what_is_left_at_0():
    cfg = Config(vocab_size=11, seq_len=5, width=12, layers=2, heads=3)
    assert (cfg.hidden, cfg.position_rows, cfg.head_width, cfg.kv_heads) == (48, 5, 4, 3)
    cfg = Config(vocab_size=11, seq_len=5, width=13, layers=2, heads=4, head_width=6, kv_heads=2, mlp="swiglu")
    assert (cfg.hidden, cfg.qkv_width, cfg.up_width) == (52, 6 * 8, 104)


def test_a_change_takes_along_what_followed_and_keeps_what_was_chosen():
    cfg = Config(vocab_size=11, seq_len=5, width=12, layers=2, heads=3)
    wider = cfg.changed(width=24, seq_len=9, heads=6)
    assert (wider.hidden, wider.position_rows, wider.head_width, wider.kv_heads) == (96, 9, 4, 6)
    assert cfg.changed() == cfg and cfg.changed(mlp="silu").mlp == "silu"
    chosen = tiny_config(kv_heads=1, head_width=2).changed(width=24, layers=3)
    assert (chosen.hidden, chosen.position_rows, chosen.head_width, chosen.kv_heads) == (7, 6, 2, 1)


def gpt_parameters(V, P, C, L):
    return V * C + P * C + L * (12 * C * C + 13 * C) + 2 * C


def llama_parameters(V, C, L, H, G, D, F, tables=1, head=0, ups=0):
    return tables * V * C + L * (2 * C * H * D + 2 * C * G * D + 3 * C * F + 2 * C + ups) + C + head


def graphcore_parameters(V, C, L):
    return 2 * V * C + V + L * (12 * C * C + 13 * C) + 4 * C


LLAMA = dict(norm="rmsnorm", positions="rope", mlp="swiglu", **NO_BIAS)
GRAPHCORE = dict(embedding_norm=True, positions="alibi", mlp="gelu", tied=False, head_bias=True)
COUNTED = {  # totals that the authors' own code gives, and where they come from
    "GPT-2": (
        Config(50257, 1024, 768, 12, 12),
        124_439_808,
        gpt_parameters(50257, 1024, 768, 12),
    ),
    "TinyStories-33M": (
        Config(50257, 512, 768, 4, 16, position_rows=2048, qkv_bias=False, window=256, attention_scale=False),
        68_514_048,
        gpt_parameters(50257, 2048, 768, 4) - 4 * 3 * 768,
    ),
    "llama2.c stories260K": (
        Config(512, 512, 64, 5, 8, kv_heads=4, hidden=172, **LLAMA),
        260_032,
        llama_parameters(512, 64, 5, 8, 4, 8, 172),
    ),
    "llama2.c stories15M": (
        Config(32000, 256, 288, 6, 6, hidden=768, **LLAMA),
        15_191_712,
        llama_parameters(32000, 288, 6, 6, 6, 48, 768),
    ),
    "CS336, untied": (
        Config(10000, 256, 512, 4, 16, hidden=1344, **LLAMA | {"tied": False}),
        22_696_448,
        llama_parameters(10000, 512, 4, 16, 16, 32, 1344, tables=2),
    ),
    "lilLM 39M, grouped heads": (
        Config(8192, 512, 512, 12, 16, kv_heads=8, hidden=1408, **LLAMA),
        39_596_544,
        llama_parameters(8192, 512, 12, 16, 8, 32, 1408),
    ),
    "StoryLlamas 7m, whose heads are 252 wide together": (
        Config(4096, 256, 256, 6, 6, head_width=42, hidden=768, **LLAMA | dict(up_bias=True, down_bias=True)),
        6_149_888,
        llama_parameters(4096, 256, 6, 6, 6, 42, 768, ups=2 * 768 + 256),
    ),
    "Graphcore 64 x 1": (
        Config(8192, 512, 64, 1, 1, **GRAPHCORE),
        1_107_008,
        graphcore_parameters(8192, 64, 1),
    ),
    "Graphcore 768 x 12": (
        Config(8192, 512, 768, 12, 12, **GRAPHCORE),
        97_648_640,
        graphcore_parameters(8192, 768, 12),
    ),
}  # fmt: skip


@pytest.mark.parametrize("cfg, published, formula", COUNTED.values(), ids=COUNTED)
def test_a_model_has_the_parameters_that_its_authors_count(cfg, published, formula):
    total, decayed, without_tables = tinygpt.count_parameters(cfg)
    assert total == published == formula
    assert decayed == sum(math.prod(t.shape) for t in tinygpt.layout(cfg) if len(t.shape) - t.layered == 2)
    rows = cfg.position_rows if cfg.positions == "learned" else 0
    assert without_tables == total - (cfg.vocab_size + rows) * cfg.width


def test_what_a_model_lacks_has_no_parameters():
    cfg, all_biases = Config(11, 5, 12, 2, 3), 13 * 12 * 2
    for changes, fewer in (
        (dict(positions="none"), 5 * 12),
        (dict(positions="alibi"), 5 * 12),
        (dict(norm_bias=False), 5 * 12),
        (dict(norm_gain=False), 5 * 12),
        (dict(norm="rmsnorm"), 5 * 12),
        (dict(final_norm=False), 2 * 12),
        (NO_BIAS, all_biases - 4 * 12 * 2),
        (dict(head_bias=True), -11),
        (dict(tied=False), -11 * 12),
        (dict(embedding_norm=True), -2 * 12),
        (dict(qk_norm=True), -2 * 2 * 4),
        (dict(kv_heads=1), 2 * (2 * 2 * 4) * (12 + 1)),
        (dict(mlp="swiglu"), -2 * 48 * (12 + 1)),
    ):
        found = tinygpt.count_parameters(cfg)[0] - tinygpt.count_parameters(cfg.changed(**changes))[0]
        assert found == fewer, changes


@pytest.mark.parametrize("size", find_sizes())
def test_a_size_has_a_layout_and_defaults_that_fit(size):
    cfg = find_size(size)
    assert cfg.changed() == cfg
    assert cfg.changed(layers=3).head_width == cfg.head_width
    assert sum(math.prod(t.shape) for t in tinygpt.layout(cfg)) == tinygpt.count_parameters(cfg)[0]


def test_floating_point_operations_are_those_of_the_products():
    cfg = Config(11, 1000, 12, 3, 6, kv_heads=3, head_width=4, hidden=7, window=100, mlp="swiglu", **NO_BIAS)
    matrices = 11 * 12 + 3 * (12 * 4 * (6 + 3 + 3) + 24 * 12 + 3 * 12 * 7)  # with the tied head, without the lookup
    seen = [np.mean([min(t + 1, w) for t in range(1000)]) for w in (1000, 100, 1000)]
    # forward 2 a weight, and 2 D for each score and for its share of the value; backward twice that
    expected = 6 * matrices + 12 * sum(seen) * 6 * 4
    assert plan.flops_per_token(cfg) == pytest.approx(expected, rel=0.01)


def test_the_layout_has_matrices_first_and_no_gaps():
    cfg = tiny_config()
    table = tinygpt.layout(cfg)
    offsets = np.cumsum([0, *(math.prod(t.shape) for t in table)])
    assert [t.offset for t in table] == list(offsets[:-1])
    assert offsets[-1] == tinygpt.count_parameters(cfg)[0]
    assert [t.decayed for t in table] == sorted((t.decayed for t in table), reverse=True)
    assert all(t.decayed == (len(t.shape) - t.layered == 2) for t in table)


@every_family
def test_views_share_the_flat_buffer_and_cover_it(family):
    cfg = tiny_config(**FAMILIES[family])
    flat = np.zeros(tinygpt.count_parameters(cfg)[0])
    p = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers)
    for view in (*(v for k, v in p.items() if k != "layers"), *(v for layer in p["layers"] for v in layer.values())):
        if view is not None:
            view += 1
    assert (flat == 1).all()
    qkv = next(t for t in tinygpt.layout(cfg) if t.name == "qkv_w")
    p["layers"][1]["qkv_w"][2, 3] = 7
    assert flat[qkv.offset + (1 * 12 + 2) * cfg.qkv_width + 3] == 7


def test_the_views_of_what_a_model_lacks_are_none():
    everything = {t.name for family in FAMILIES.values() for t in tinygpt.layout(tiny_config(**family))}
    everything |= {t.name for t in tinygpt.layout(tiny_config(qk_norm=True))}
    for changes in FAMILIES.values():
        cfg = tiny_config(**changes)
        p, there = random_parameters(cfg)[1], {t.name for t in tinygpt.layout(cfg)}
        named = {name: view for name, view in p.items() if name != "layers"} | p["layers"][-1]
        assert set(named) == everything
        assert {name for name, view in named.items() if view is not None} == there


INITS = {  # standard deviations at C = 64, H D = 96, F = 80, L = 4: embeddings, qkv and up, out, down, head, biases
    "fan-in": (1 / 8, 1 / 8, 1 / 8 / math.sqrt(8), 1 / 8 / math.sqrt(8), 1 / 8, 0),
    "gpt2": (0.02, 0.02, 0.02 / math.sqrt(8), 0.02 / math.sqrt(8), 0.02, 0),
    "normal": (0.02, 0.02, 0.02, 0.02, 0.02, 0),
    "torch": (1, 1 / math.sqrt(3 * 64), 1 / math.sqrt(3 * 96), 1 / math.sqrt(3 * 80), 1 / math.sqrt(3 * 64), None),
    "lillm": (1 / 8, 1 / 8, 0.02 / math.sqrt(8), 0.02 / math.sqrt(8), 1 / 8, 0),
}


@pytest.mark.parametrize("init", tinygpt.CHOICES["init"])
def test_initial_parameters_have_the_means_and_deviations_of_their_rule(init):
    shape = dict(vocab_size=500, seq_len=70, width=64, layers=4, heads=4, head_width=24, hidden=80)
    cfg = Config(**shape, tied=False, head_bias=True, embedding_norm=True, init=init)
    flat = tinygpt.init_parameters(cfg, 3)
    assert flat.dtype == np.float32
    tables, inner, out, down, head, biases = INITS[init]
    expected = dict(embed_w=tables, position_w=tables, qkv_w=inner, up_w=inner, out_w=out, down_w=down, head_w=head)
    if init == "torch":  # uniform, as wide as the matrix before it; those of norms are 0
        expected |= dict(qkv_b=inner, up_b=inner, out_b=out, down_b=down, head_b=head)
    for t in tinygpt.layout(cfg):
        x = flat[t.offset : t.offset + math.prod(t.shape)].astype(np.float64)
        deviation, mean = expected.get(t.name, 0.0), float("norm" in t.name and t.name.endswith("w"))
        assert abs(x.mean() - mean) <= 4 * deviation / math.sqrt(x.size), t.name
        assert abs(x.std() - deviation) <= 4 * deviation / math.sqrt(2 * x.size), t.name
        uniform = init == "torch" and t.name in expected and t.name not in ("embed_w", "position_w")
        assert not deviation or (np.abs(x).max() <= 1.7321 * deviation) == uniform, t.name


def test_the_same_seed_gives_the_same_parameters():
    cfg = tiny_config()
    assert tinygpt.init_parameters(cfg, 3).tobytes() == tinygpt.init_parameters(cfg, 3).tobytes()
    assert tinygpt.init_parameters(cfg, 3).tobytes() != tinygpt.init_parameters(cfg, 4).tobytes()


@pytest.mark.parametrize("tied", [True, False])
def test_the_lookups_gradient_is_added_once(tied):
    cfg = tiny_config(tied=tied)
    gradient, g = tinygpt.zero_gradients(cfg, np.float64)
    g["embed_w"][:], g["lookup_w"][:] = 1, 2
    for _ in range(2):
        tinygpt.add_lookup_gradient(g)
        assert (gradient[: 11 * 12] == 3).all() and not gradient[11 * 12 :].any() and not g["lookup_w"].any()


@every_table
@pytest.mark.parametrize("tied", [True, False])
def test_embed_w_has_no_gradient_of_the_lookup_before_it_is_added(tied, table):
    cfg = tiny_config(tied=tied)
    _, p = random_parameters(cfg)
    _, g = tinygpt.zero_gradients(cfg, np.float64)
    tinygpt.loss_and_gradients(p, *random_batch(cfg, 2, 5), g, cfg, ops_of(table))
    before, lookup = g["embed_w"].copy(), g["lookup_w"].copy()
    assert before.any() == tied and lookup.any()
    tinygpt.add_lookup_gradient(g)
    assert np.array_equal(g["embed_w"], before + lookup) and not g["lookup_w"].any()


def test_a_config_takes_the_names_of_the_tables_and_no_others():
    assert tinygpt.CHOICES["norm"] == tuple(tinygpt.NORMS) and set(fast.rows.KERNEL_NORMS) <= set(tinygpt.NORMS)
    assert tinygpt.CHOICES["mlp"] == tuple(tinygpt.ACTIVATIONS) == tuple(fast.rows.ACTIVATION)


# -- python tinygpt.py check


@pytest.mark.parametrize("size", ["1m", "39m", "graphcore-768x12", "tinystories-33m"])
def test_the_check_command_passes_and_prints_every_tensor(size, capsys):
    assert check.main(["check", "--size", size]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    here = TABLES[:2] if WITHOUT_FAST else TABLES
    for t in tinygpt.layout(find_size(size)):
        assert len(rows[t.name]) == len(here) and max(map(float, rows[t.name])) < LIMIT
    assert lines[-1].endswith("passed")


@pytest.mark.parametrize("arguments", [["--size", "nonesuch"], ["--set", "mlp=relu"], ["--set", "colour=1"]])
def test_the_check_command_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        check.main(["check", *arguments])
    assert end.value.code == 2 and arguments[1].split("=")[-1] in capsys.readouterr().err


def test_the_check_command_fails_when_a_gradient_is_wrong(capsys, monkeypatch):
    monkeypatch.setitem(OPS, "numpy", with_mutant(OPS["numpy"], "mlp_layer_backward", "return dy + ", "return "))
    assert check.main(["check"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("FAILED")


# -- tables


@needs_fast
def test_a_table_that_is_not_here_is_named_in_one_line(monkeypatch):
    assert tinygpt.find_ops("numpy") is OPS["numpy"] and tinygpt.find_ops() is tinygpt.find_ops("fast")
    with pytest.raises(ValueError, match="--dtype bfloat16 is about the products of --kernels fast"):
        tinygpt.find_ops("numpy", "bfloat16")
    for kernels, dtype in (("numba2", "float32"), ("fast", "float16")):
        with pytest.raises(ValueError, match="expected fast or numba or numpy, float32 or bfloat16"):
            tinygpt.find_ops(kernels, dtype)
    monkeypatch.setitem(sys.modules, "fast", None)
    with pytest.raises(
        ValueError, match="^--kernels fast needs the folder fast/ beside tinygpt.py; use --kernels numba"
    ):
        tinygpt.find_ops("fast")
    assert tinygpt.find_ops() is OPS["numba"]
