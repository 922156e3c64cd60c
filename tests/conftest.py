"""What several test files share: tiny models, a way to compare, and functions broken on purpose."""

import dataclasses
import functools
import inspect
import itertools
import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import LONG, gpt2_json, trained, workshop, write_stories
from tiers import WITHOUT_FAST, fast

import bpe
import tinygpt

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a shell: there is Ctrl-C to test
    signal.signal(signal.SIGINT, signal.default_int_handler)


TESTS_OF_FAST = ["test_int8.py", "test_kernels.py", "test_tiles.py", "test_words.py"]
collect_ignore = TESTS_OF_FAST if WITHOUT_FAST else []


def tiny_config(**changes):
    """No two axes that could be mistaken for each other have one length: T=5, H=3, D=4, F=7, V=11, C=12, P=6."""
    shape = dict(vocab_size=11, seq_len=5, width=12, layers=2, heads=3, hidden=7, position_rows=6)
    return tinygpt.Config(**shape | changes)


# -- models that differ in everything but their size

NO_BIAS = dict.fromkeys(("qkv_bias", "out_bias", "up_bias", "down_bias"), False)
GROUPED = dict(heads=6, kv_heads=3, head_width=4)  # H D = 24, which is not C
LLAMA = dict(norm="rmsnorm", mlp="swiglu", tied=False, **GROUPED, **NO_BIAS)
FAMILIES = {
    "gpt-2": {},
    "llama": dict(positions="rope", **LLAMA),
    "llama with halves": dict(positions="rope-half", **LLAMA),
    "bloom": dict(embedding_norm=True, positions="alibi", heads=6),
    "gpt-neo": dict(window=3, attention_scale=False, qkv_bias=False, layers=3),
    "squared relu": dict(mlp="relu2", qk_norm=True, norm="rmsnorm", norm_gain=False, positions="rope-half", **NO_BIAS),
    "graphcore": dict(embedding_norm=True, positions="alibi", mlp="gelu", tied=False, head_bias=True),
}
DROPOUTS = ("embed_dropout", "attention_dropout", "out_dropout", "mlp_dropout")
SWITCHES = {  # of a model of 3 layers, 6 heads and width 12
    "positions": ("learned", "rope", "rope-half", "alibi", "none"),
    "mlp": ("gelu-tanh", "gelu", "silu", "relu2", "swiglu"),
    "kv_heads": (6, 3, 1),
    "window": (0, 3, 50),
    "head_width": (4, 6),
    "norm": ("layernorm", "rmsnorm"),
    "rope_theta": (10000.0, 10.0),
    **dict.fromkeys(("norm_gain", "norm_bias", "embedding_norm", "final_norm", "qk_norm"), (True, False)),
    **dict.fromkeys(("attention_scale", *NO_BIAS, "tied", "head_bias"), (True, False)),
    **dict.fromkeys(DROPOUTS, (0.0, 0.3)),
}


def pairs_of(choices):
    """Every two of some (switch, value), as a set."""
    return set(itertools.combinations(choices, 2))


def covering(table):
    """Rows {switch: value} in which any value of any switch meets any value of any other.

    Greedy: a row begins with the first pair that no row has yet; each further switch takes the value that meets most of
    the row's values for the first time, of equal ones the one that was taken least.
    """
    switches = list(table)

    def gain(choice, row):
        pairs = (sorted((choice, other), key=lambda c: switches.index(c[0])) for other in row.items())
        return sum(tuple(pair) in missing for pair in pairs), -taken[choice]

    everything = [[(name, value) for value in table[name]] for name in switches]
    missing = {pair: None for a, b in itertools.combinations(everything, 2) for pair in itertools.product(a, b)}
    taken, rows = dict.fromkeys(itertools.chain(*everything), 0), []
    while missing:
        row = dict(next(iter(missing)))
        for name, choices in zip(switches, everything):
            if name not in row:
                row |= [max(choices, key=functools.partial(gain, row=row))]
        row = {name: row[name] for name in switches}
        for choice in row.items():
            taken[choice] += 1
        for pair in pairs_of(row.items()):
            missing.pop(pair, None)
        rows.append(row)
    return rows


COMBINATIONS = [tiny_config(layers=3, heads=6, **row) for row in covering(SWITCHES)]
every_combination = pytest.mark.parametrize("cfg", COMBINATIONS, ids=range(len(COMBINATIONS)))


def random_parameters(cfg, seed=0, dtype=np.float64):
    """(flat, views) with gains and biases away from 1 and 0."""
    noise = 0.2 * np.random.default_rng(seed).standard_normal(tinygpt.count_parameters(cfg)[0])
    flat = (tinygpt.init_parameters(cfg, seed, np.float64) + noise).astype(dtype)
    return flat, tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers)


def random_batch(cfg, B, T, seed=0, dtype=np.float64):
    """(tokens, targets, weights), each (B, T); some weights are 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (B, T + 1))
    weights = rng.uniform(0.5, 1.5, (B, T)) * (rng.random((B, T)) > 0.2)
    return tokens[:, :-1], tokens[:, 1:], weights.astype(dtype)


TABLES = ("numpy", "numba", "fast", "fast-bf16")


def ops_of(name):
    """The table of a name in TABLES; what multiplies float32 in "fast-bf16" is said in the fixture `stand_in`."""
    if name in tinygpt.OPS:
        return tinygpt.OPS[name]
    return fast.FLOAT32 if name == "fast" else fast.BFLOAT16


def run_model(cfg, table, B, T, dtype, space=False, seed=0, dropout=None):
    """name -> array: the loss, the nats, what the head reads, and the gradient of every parameter tensor."""
    flat, _ = random_parameters(cfg, seed, np.float32)  # values that float32 has, whatever the dtype
    p = tinygpt.views(tinygpt.layout(cfg), flat.astype(dtype), cfg.layers)
    tokens, targets, weights = random_batch(cfg, B, T, seed, np.float32)
    gradient, g = tinygpt.zero_gradients(cfg, dtype)
    ops = tinygpt.with_buffers(ops_of(table), cfg, B, T, np.dtype(dtype)) if space else ops_of(table)
    batch = (tokens, targets, weights.astype(dtype))
    loss, nats = tinygpt.loss_and_gradients(p, *batch, g, cfg, ops, dropout)
    results = {"loss": np.array(loss), "nats": nats.copy()}
    tinygpt.add_lookup_gradient(g)
    results["x"] = tinygpt.forward(p, tokens, cfg, ops, dropout=dropout)[0].copy()
    for t in tinygpt.layout(cfg):
        results[t.name] = gradient[t.offset : t.offset + math.prod(t.shape)]
    return results


def as_bytes(results):
    return {name: x.tobytes() for name, x in results.items()}


def assert_float32_errs_at_most_four_times_as_much_as_the_spec(cfg, B, T, seeds, dropout=None, table="fast"):
    """Errors of kernels and of the spec, each against the spec in float64: the geometric mean of their ratio over
    several draws, since in one, a sum that nearly vanishes may flatter either."""
    logarithms = {}
    for seed in range(seeds):
        exact = run_model(cfg, "numpy", B, T, np.float64, seed=seed, dropout=dropout)
        errors = {}
        for kernels in ("numpy", table):
            found = run_model(cfg, kernels, B, T, np.float32, seed=seed, dropout=dropout)
            assert all(x.dtype == np.float32 for name, x in found.items() if name != "loss")
            half_units = {name: 2.0**-24 * np.linalg.norm(x) for name, x in exact.items()}  # in the last place
            errors[kernels] = {name: max(np.linalg.norm(found[name] - exact[name]), half_units[name]) for name in exact}
        for name in exact:
            logarithms.setdefault(name, []).append(math.log(errors[table][name] / errors["numpy"][name]))
    del logarithms["loss"]  # a single number, which luck may round well; its nats are compared
    for name, found in logarithms.items():
        assert math.exp(np.mean(found)) <= 4, (name, math.exp(np.mean(found)))


def numerical_gradient(loss, x, h=1e-5):
    """d loss() / dx for every element of x (float64), which loss reads; x is put back."""
    slope = np.empty_like(x)
    for i in np.ndindex(x.shape):
        old = x[i]
        x[i] = old + h
        above = loss()
        x[i] = old - h
        slope[i] = (above - loss()) / (2 * h)
        x[i] = old
    return slope


def relative(found, expected):
    """The largest difference, relative to the largest of what is expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))


def mutant(function, old, new):
    """`function` of tinygpt with `old` in its source, or in that of a branch that it calls, replaced: what a good test
    must tell from the original."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    called = [vars(tinygpt).get(name) for name in names if name.startswith(("self_attention_", "mlp_"))]
    source = "\n\n".join(inspect.getsource(f) for f in (*filter(None, called), function))
    assert source.count(old) == 1, f"{function.__name__} no longer says {old!r} once; choose another mutation"
    namespace = dict(vars(tinygpt))
    exec(source.replace(old, new), namespace)
    return namespace[function.__name__]


def with_mutant(ops, name, old, new):
    """The table whose sublayer `name`, such as mlp_layer_backward, is the specification's with `old` replaced."""
    layer, _, way = name.rpartition("_")
    pair = getattr(ops, layer)._replace(**{way: mutant(getattr(tinygpt, name), old, new)})
    return dataclasses.replace(ops, **{layer: pair})


@pytest.fixture(scope="session", autouse=True)
def stand_in():
    """The table "fast-bf16" multiplies float32 with a stand-in where no instruction does; train.py does not."""
    if not WITHOUT_FAST and fast.bf16.find_bf16()[1]:
        fast.bf16.KINDS["float32"] = "amx stand-in"


@pytest.fixture
def pool():
    """The pool of threads, as many as before when the test is over. Buffers made before a resize are too small."""
    threads = fast.POOL.threads
    yield fast.POOL
    fast.POOL.resize(threads)


# -- runs of a tiny model


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_stories(tmp_path_factory.mktemp("text") / "stories.txt")


@pytest.fixture
def place(tmp_path):
    with workshop(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """An uninterrupted run of 12 updates: its folder, and what it printed."""
    with workshop(tmp_path_factory.mktemp("finished")) as folder:
        out, err = trained("--data", text, *LONG)
    return SimpleNamespace(folder=folder / "runs" / "tiny", out=out, err=err)


@pytest.fixture(scope="session")
def gpt2():
    return bpe.Tokenizer.from_json(json.dumps(gpt2_json()))


@pytest.fixture(scope="module")
def tokenizer(text):
    return bpe.Tokenizer.from_merges(bpe.train(bpe.pieces([text]), 35))
