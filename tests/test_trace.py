"""extras/inside/trace.py: the trace is that of the real forward."""

import inspect

import numpy as np
import pytest
from conftest import random_parameters, tiny_config

import tinygpt
from extras.inside import trace


@pytest.mark.parametrize(
    "changes", [{}, dict(mlp="swiglu", norm="rmsnorm", positions="rope", tied=False, qk_norm=True)]
)
def test_a_trace_names_every_parameter_and_leaves_the_model_as_it_was(changes):
    cfg = tiny_config(**changes)
    before = tinygpt.linear_forward, dict(tinygpt.NORMS), dict(tinygpt.ACTIVATIONS)
    _, p = random_parameters(cfg)
    rows = trace.trace(p, cfg, np.array([[3, 1, 4]]))
    assert (tinygpt.linear_forward, tinygpt.NORMS, tinygpt.ACTIVATIONS) == before
    size = sum(row[5] for row in rows) - (p["embed_w"].size if cfg.tied else 0)
    rows_of_positions = 0 if p["position_w"] is None else p["position_w"][3:].size  # only those that were read count
    assert size + rows_of_positions == tinygpt.count_parameters(cfg)[0]
    assert [row[1] for row in rows].count("attention") == cfg.layers
    assert next(row for row in rows if row[1] == "attention")[3] == (1, cfg.heads, 3, cfg.head_width)


def test_every_primitive_that_a_forward_calls_has_an_equation():
    whole = {"embed", "attention_layer", "mlp_layer", "head", "cross_entropy", *trace.BRANCHES}  # not in a trace
    named = {name[:-8] for name, x in vars(tinygpt).items() if name.endswith("_forward") and inspect.isfunction(x)}
    assert named - whole == set(trace.EQUATIONS)


def test_a_windowed_layer_costs_less():
    cfg = tiny_config(window=2)
    rows = trace.trace(random_parameters(cfg)[1], cfg, np.array([[3, 1, 4, 1, 5]]))
    keys = [row.flops // (4 * cfg.heads * cfg.head_width) for row in rows if row.op == "attention"]
    assert keys == [1 + 2 + 3 + 4 + 5, 1 + 2 + 2 + 2 + 2]
