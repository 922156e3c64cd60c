"""The trace of a forward: one row for each op that the specification runs.

`watch` records every call of a function of tinygpt.py: its arguments, local variables and result. `trace` reads from
them what each op takes, makes, holds and costs. Read from the top.
"""

import functools
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tinygpt

# == 1  watching the specification =====================================================================================


class Call(NamedTuple):
    """One call of a function of tinygpt.py."""

    code: object  # the code object of the function
    arguments: dict  # name -> value
    names: dict  # name -> value of arguments and local variables, at the return
    result: object
    calls: list  # the calls that it made directly


def watch(function, *arguments):
    """Run function(*arguments) -> the tree of calls of functions of tinygpt.py, in order."""
    given, made = [], [[]]

    def event(frame, kind, result):
        if frame.f_globals is vars(tinygpt) and kind == "call":
            given.append(dict(frame.f_locals))
            made.append([])
        elif frame.f_globals is vars(tinygpt) and kind == "return":
            calls = made.pop()
            made[-1].append(Call(frame.f_code, given.pop(), dict(frame.f_locals), result, calls))

    before = sys.getprofile()
    sys.setprofile(event)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return made[0]


@functools.cache
def section_of(code):
    """The number of the section of tinygpt.py that defines a function."""
    lines = Path(tinygpt.__file__).read_text(encoding="utf-8").splitlines()[: code.co_firstlineno]
    return next(match.group(1) for line in reversed(lines) if (match := re.match(r"# == ([\d.]+) ", line)))


# == 2  the ops ========================================================================================================


EQUATIONS = {  # of every primitive of Part I that a forward calls
    "linear": "y = x w + b",
    "layernorm": "y = (x - mean) / sqrt(var + eps) w + b",
    "rmsnorm": "y = x / sqrt(mean(x^2) + eps) w",
    "gelu_tanh": "a = h/2 (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3)))",
    "gelu": "a = h/2 (1 + erf(h / sqrt 2))",
    "silu": "a = h sigmoid(h)",
    "relu2": "a = max(h, 0)^2",
    "swiglu": "a = silu(gate) value",
    "attention": "o_t = sum_{s <= t} p_ts v_s, p_t = softmax_s(scale q_t . k_s - slope (t - s))",
    "rotate": "each pair of x turned by its angle",
    "embedding": "x_t = w[token_t] + positions[t]",
}


def equation(row):
    """The equation of an op, without the terms that the model does not have."""
    words = EQUATIONS.get(row.op, "logits = n w^T + b")
    words = words if "position_w" in row.names else words.removesuffix(" + positions[t]")
    words = words if len(row.inputs) > 3 else words.replace(" - slope (t - s)", "")  # q, k, v, ALiBi's slopes
    return words if any(name.endswith("_b") for name in row.names) else words.removesuffix(" + b")


BRANCHES = ("self_attention", "mlp")  # what a layer adds to x; its variables and ops are shown as the layer's own


class Row(NamedTuple):
    """One op of the forward."""

    section: str
    op: str
    inputs: list  # shapes
    out: tuple
    names: list  # of its parameter tensors
    size: int  # number of parameters
    flops: int
    sublayer: str


def flops(name, given, out):
    """FLOPs of one call: 2 per weight and row, 4 D per query and visible key, else 1 per element."""
    if name == "linear":
        return 2 * given["x"].size * given["w"].shape[1]
    if name == "attention":
        (B, H, T, D), S = given["q"].shape, given["k"].shape[2]
        return 4 * B * H * D * sum(min(S - T + t + 1, given["window"] or S) for t in range(T))
    return out.size


def primitives(calls, sublayer=""):
    """Yield (sublayer, name, call) of the primitives in a tree of calls, in order."""
    for call in calls:
        name = call.code.co_name.removesuffix("_forward")
        if name in EQUATIONS:
            yield sublayer, name, call
        else:
            yield from primitives(call.calls, sublayer if name in BRANCHES else name)


def trace(p, cfg, tokens):
    """Run the specification -> one `Row` for each op."""
    names = {}
    for layer in [p, *p["layers"]]:
        names |= {x.ctypes.data: name for name, x in layer.items() if isinstance(x, np.ndarray)}  # the same for x.T

    def run():
        x, _ = tinygpt.forward(p, tokens, cfg, tinygpt.OPS["numpy"])
        tinygpt.head_logits(x.reshape(-1, cfg.width), p, cfg, tinygpt.OPS["numpy"])

    rows = []
    for sublayer, name, call in primitives(watch(run)):
        arrays = [x for x in call.arguments.values() if isinstance(x, np.ndarray)]
        used = [x for x in arrays if x.ctypes.data in names]
        shapes = [x.shape for x in arrays if x.ctypes.data not in names]
        used_names, size, out = [names[x.ctypes.data] for x in used], sum(x.size for x in used), call.result[0]
        work = flops(name, call.arguments, out)
        rows.append(Row(section_of(call.code), name, shapes, out.shape, used_names, size, work, sublayer))
    return rows
