"""What several test files share: a tiny model, a way to compare, and functions broken on purpose."""

import inspect

import numpy as np
import pytest

import tinygpt


def tiny_config(**changes):
    """No two axes that could be mistaken for each other have one length: T=5, H=3, D=4, F=7, V=11, C=12, P=6."""
    shape = dict(vocab_size=11, seq_len=5, width=12, layers=2, heads=3, hidden=7, position_rows=6)
    return tinygpt.Config(**shape | changes)


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


def relative(found, expected):
    """The largest difference, relative to the largest of what is expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))


def mutant(function, old, new):
    """`function` of tinygpt with `old` in its source text replaced: what a good test must tell from the original."""
    source = inspect.getsource(function)
    assert source.count(old) == 1, f"{function.__name__} no longer says {old!r} once; choose another mutation"
    namespace = dict(vars(tinygpt))
    exec(source.replace(old, new), namespace)
    return namespace[function.__name__]


@pytest.fixture
def pool():
    """tinygpt's pool, as many threads as before when the test is over. Buffers made before a resize are too small."""
    threads = tinygpt.POOL.threads
    yield tinygpt.POOL
    tinygpt.POOL.resize(threads)
