"""extras/explain.py: the trace is that of the real forward."""

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import random_parameters, tiny_config

import tinygpt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "extras"))

import explain


@pytest.mark.parametrize(
    "changes", [{}, dict(mlp="swiglu", norm="rmsnorm", positions="rope", tied=False, qk_norm=True)]
)
def test_a_trace_names_every_parameter_and_leaves_the_model_as_it_was(changes):
    cfg = tiny_config(**changes)
    before = tinygpt.linear_forward, dict(tinygpt.NORMS), dict(tinygpt.ACTIVATIONS)
    _, p = random_parameters(cfg)
    rows = explain.trace(p, cfg, np.array([[3, 1, 4]]))
    assert (tinygpt.linear_forward, tinygpt.NORMS, tinygpt.ACTIVATIONS) == before
    size = sum(row[5] for row in rows) - (p["embed_w"].size if cfg.tied else 0)
    rows_of_positions = 0 if p["position_w"] is None else p["position_w"][3:].size  # only those that were read count
    assert size + rows_of_positions == tinygpt.count_parameters(cfg)[0]
    assert [row[1] for row in rows].count("attention") == cfg.layers
    assert next(row for row in rows if row[1] == "attention")[3] == (1, cfg.heads, 3, cfg.head_width)


def test_every_primitive_that_a_forward_calls_has_an_equation():
    whole = {"embed", "attention_layer", "mlp_layer", "head", "cross_entropy"}  # sublayers, and what a loss calls
    named = {name[:-8] for name, x in vars(tinygpt).items() if name.endswith("_forward") and inspect.isfunction(x)}
    assert named - whole == set(explain.EQUATIONS)


def test_the_command_prints_the_ops_and_refuses_what_is_no_size(capsys):
    assert explain.main(["trace", "Lily", "--size", "1m", "--set", "layers=1"]) == 0
    out = capsys.readouterr().out
    assert out.count("linear") == 4 and "(1, 4, 5, 32)" in out and "793" not in out.splitlines()[1]
    with pytest.raises(SystemExit) as left:
        explain.main(["trace", "Lily", "--size", "huge"])
    assert left.value.code == 2
