"""Golden numbers: every number of a forward, a backward and ten updates in float64, for a port to compare with.

A name is the path of a variable of the specification: `layers.1.attention_layer.qkv` is qkv in layer 1's call of
attention_layer_forward, or of self_attention_forward inside it (gradients: ..._backward),
`layers.1.attention_layer.q_turn.x` is x in the call of rotate_forward that returned the cache q_turn. A result
without a name is called `out`, that of a backward `dx`.
"""

import dataclasses
import json
import math
import re

import numpy as np

import tinygpt
import train
from extras.inside.trace import BRANCHES, section_of, watch

DTYPES = tinygpt.DTYPES | {"I64": np.dtype("<i8")}
STEPS = 10
IDS, WEIGHTS = "(5 * t * t + 3 * i * t + i * i + 1) % V", "(i + t) % 4 / 2"
ABOUT = (
    "Update `step` (from 0) reads sequences i = step B .. step B + B - 1: tokens are ids at t = 0 .. T - 1, targets at "
    "t = 1 .. T, weights at t = 0 .. T - 1. What stands in the file of forward, backward and `gradients` is of update "
    "0 and of the weighted sum of the nats, `loss`. An update divides the gradient by the sum of the weights (at least "
    "1), which gives `steps.norm`, then clips it to grad_clip, then takes a step of AdamW at `steps.lr`, which decays "
    "the first `decayed` parameters in the order of the file; `steps.loss` is before it. `after`, `moment1` and "
    "`moment2` are the parameters and moments at the end. Where nothing turns or normalises keys, the gradient of "
    "their biases (in qkv_b) is 0 but for rounding, and AdamW makes steps of that: compare those in `after` to 1e-8."
)


def golden_batch(step, B, T, V):
    """tokens, targets, weights, each (B, T), of an update, by the formulas above."""
    i, t = np.arange(step * B, (step + 1) * B)[:, None], np.arange(T + 1)
    ids = (5 * t * t + 3 * i * t + i * i + 1) % V  # (B, T + 1)
    return ids[:, :-1], ids[:, 1:], (i + t[:-1]) % 4 / 2


class SpecState(train.State):
    """The state of training, updated by the specification of AdamW."""

    def adamw(self, lr, scale, s, compiled=True):
        self.step += 1
        more = {name: getattr(s, name) for name in ("weight_decay", "beta1", "beta2")} | {"decayed": self.decayed}
        train.adamw(self.parameters, self.gradient, self.m, self.v, self.step, lr=lr, scale=scale, **more)


SETTINGS = ("steps", "lr", "min_lr", "warmup_steps", "schedule", "batch_size", "micro_batch_size", "weight_decay")
SETTINGS += ("beta1", "beta2", "grad_clip", "dropout", "seed")


def golden_settings(cfg, B, seed):
    """Settings of the ten updates: the defaults of train.py, a shorter warm-up, and clipping that affects some."""
    lr = train.own_rate(cfg)
    s = train.Settings(batch_size=B, micro_batch_size=B, lr=lr, min_lr=lr / 10, warmup_steps=3, steps=STEPS, seed=seed)
    return {name: getattr(s, name) for name in SETTINGS} | {"grad_clip": 2.0, "eps": train.ADAM_EPS}


def updates(state, ops, s, T):
    """Run ten updates of `state` -> {name: (10,)} of each update, and the final parameters and moments by name."""
    settings = train.Settings(**{name: s[name] for name in SETTINGS})
    rows = [
        train.update(state, golden_batch(step, s["batch_size"], T, state.cfg.vocab_size), ops, settings)
        for step in range(s["steps"])
    ]
    found = {f"steps.{name}": np.array(column) for name, column in zip(("loss", "norm", "lr"), zip(*rows))}
    for name, flat in (("after", state.parameters), ("moment1", state.m), ("moment2", state.v)):
        found |= by_name(state.cfg, name, flat)
    return found


def by_name(cfg, prefix, flat):
    return {
        f"{prefix}.{t.name}": flat[t.offset : t.offset + math.prod(t.shape)].reshape(t.shape)
        for t in tinygpt.layout(cfg)
    }


class Named:
    """Collects the arrays of a tree of calls under the paths of their variables."""

    def __init__(self, layers, known):
        self.layers, self.known = layers, known  # arrays that are already in the file
        self.arrays, self.legend, self.first = {}, {}, {}

    def put(self, name, x, code):
        if not isinstance(x, np.ndarray) or x.dtype != np.float64 or any(np.may_share_memory(x, a) for a in self.known):
            return
        place = x.ctypes.data, x.size
        if place not in self.first:
            self.first[place] = name, x.strides
            self.arrays.setdefault(name, []).append(x)  # the head computes one sequence after another
            self.legend.setdefault(name, f"{code.co_name}, section {section_of(code)}")
        elif self.first[place][1] == x.strides:
            self.legend.setdefault(name, f"is {self.first[place][0]}")

    def add(self, call, path):
        """Add the variables of a call and, under the name of its cache, those of each call that it made."""
        if path == "head_loss":  # loops over sequences, so its own variables are those of the last one
            for each in call.calls:
                self.add(each, f"{path}.{stem(each)}")
        for name, x in call.names.items():
            self.put(f"{path}.{name}", x, call.code)
        if isinstance(call.result, tuple):
            self.put(f"{path}.out", call.result[0], call.code)
        elif "-> dx" in (vars(tinygpt)[call.code.co_name].__doc__ or ""):
            self.put(f"{path}.dx", call.result, call.code)
        for each in call.calls if path != "head_loss" else ():
            if stem(each) in BRANCHES:
                self.add(each, path)
                continue
            cache = each.result[-1] if isinstance(each.result, tuple) else each.arguments.get("cache")
            for name in [name for name, x in call.names.items() if x is cache and isinstance(x, tuple)][:1]:
                self.add(each, f"{path}.{name}")

    def add_model(self, calls):
        """Add all sublayers in a tree of calls."""
        for call in calls:
            if stem(call) in ("embed", "attention_layer", "mlp_layer", "head_loss"):
                layer = [i for i, p in enumerate(self.layers) if p is call.arguments.get("p")]
                self.add(call, ".".join(["layers", str(layer[0]), stem(call)] if layer else [stem(call)]))
            else:
                self.add_model(call.calls)


def stem(call):
    return re.sub("_(forward|backward)$", "", call.code.co_name)


def golden(cfg, flat, s, T):
    """Flat parameters (count,) in float64 -> {name: array}, {name: where tinygpt.py computes it}."""
    batch = golden_batch(0, s["batch_size"], T, cfg.vocab_size)
    p = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers)
    gradient, g = tinygpt.zero_gradients(cfg, np.float64)
    masks, ops = tinygpt.Dropout(s["seed"], 0, 0), tinygpt.OPS["numpy"]
    calls = watch(tinygpt.loss_and_gradients, p, *batch, g, cfg, ops, masks)
    named = Named(p["layers"], [flat, gradient, g["lookup_w"], *batch])
    named.add_model(calls)
    tinygpt.add_lookup_gradient(g)
    tensors = dict(zip(("tokens", "targets", "weights"), batch)) | by_name(cfg, "parameters", flat)
    for name, parts in named.arrays.items():  # the head has one part for each sequence
        tensors[name] = np.stack(parts) if name.startswith("head_loss.") and name.count(".") > 1 else parts[0]
    tensors |= {"loss": np.array(calls[0].result[0])} | by_name(cfg, "gradients", gradient)
    tensors |= updates(SpecState(cfg, flat.copy()), ops, s, T)
    return tensors, named.legend


def write_golden(path, cfg, flat, s, T):
    tensors, legend = golden(cfg, flat, s, T)
    where = {
        "parameters": "layout, section 1.2",
        "gradients": "loss_and_gradients and add_lookup_gradient, sections 4 and 1.2",
        "steps": "update of train.py",
        **dict.fromkeys(("after", "moment1", "moment2"), "adamw of train.py"),
        "loss": "loss_and_gradients, section 4",
    }
    legend = {name: legend.get(name) or where.get(name.split(".")[0], "the batch") for name in [*tensors, *legend]}
    legend = {name: f"{tensors[name].shape} {text}" if name in tensors else text for name, text in legend.items()}
    about = {"about": ABOUT, "ids": IDS, "weights": WEIGHTS, "decayed": tinygpt.count_parameters(cfg)[1]}
    metadata = {"format": "tinygpt golden", "version": "1", "config": dataclasses.asdict(cfg), "settings": s}
    metadata = metadata | about | {"seed": s["seed"], "legend": legend}
    strings = {name: x if isinstance(x, str) else json.dumps(x) for name, x in metadata.items()}
    tinygpt.write_safetensors(path, tensors, strings, DTYPES)
    return len(tensors)
