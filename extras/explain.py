"""Explain how a model computes, by running the specification: a trace of its ops, golden numbers, a picture.

    python extras/explain.py trace "Lily found" --size 1m
    python extras/explain.py trace "Lily found" --checkpoint runs/1m/last.safetensors
    python extras/explain.py golden --size gpt2 --scaled-down --out golden.safetensors
    python extras/explain.py picture --size 1m --out architecture.svg

`trace` prints one line for each op of a real forward: the section of tinygpt.py that defines it, the shapes of its
inputs and output, its parameters (names, count), its FLOPs and its equation. `golden` writes every number of a forward,
a backward and ten updates in float64, for a port to compare with. `picture` draws the trace.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import sample
import tinygpt
import train
from extras import check

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


# == 3  golden numbers =================================================================================================
#
# A name is the path of a variable of the specification: `layers.1.attention_layer.qkv` is qkv in layer 1's call of
# attention_layer_forward, or of self_attention_forward inside it (gradients: ..._backward),
# `layers.1.attention_layer.q_turn.x` is x in the call of rotate_forward that returned the cache q_turn. A result
# without a name is called `out`, that of a backward `dx`.

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


# == 4  the picture ====================================================================================================

INK, GREY, LINE, PAPER = "#1f2328", "#59636e", "#57606a", "#ffffff"
COLOURS = {  # of a sublayer: panel, bars
    "embed": ("#fff5e1", "#d4870b"),
    "attention_layer": ("#eaf2ff", "#2f6fd0"),
    "mlp_layer": ("#e9f7ed", "#2d9650"),
    "head": ("#fbedf6", "#b5408d"),
}
SUMS = {  # what a sublayer computes
    "embed": "tokens become x",
    "attention_layer": "x + attention(norm1(x)) out_w + out_b",
    "mlp_layer": "x + f(norm2(x) up_w + up_b) down_w + down_b",
    "head": "norm(x) against every row of the vocabulary",
}
WIDTH, STREAM, LEFT, RIGHT, BAR, ROW, TOP = 800, 68, 112, 776, 708, 44, 34  # pixels; TOP: height of a panel's title
SANS = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'Liberation Mono', monospace"


def text(x, y, words, size=13, colour=INK, **attributes):
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{more}>{words}</text>'


def shape_of(shape):
    """Format a shape without the axis B if B = 1."""
    return str(shape[1:] if shape[0] == 1 and len(shape) > 2 else shape)


def draw_row(y, rows, total, largest, bar):
    """SVG elements at height y of one op, or of the same op on q and on k. FLOPs are summed over all layers."""
    op, section, work = rows[0].op, rows[0].section, sum(row.flops for row in rows)
    shapes = ", ".join(dict.fromkeys(shape_of(row.out) for row in rows))
    names, size = " ".join(name for row in rows for name in row.names), sum(row.size for row in rows)
    names += " (tied)" if rows[0].sublayer == "head" and "embed_w" in names else ""
    what = f"{op} of q, of k" if len(rows) > 1 else op
    title = f'<tspan font-weight="600">{what}</tspan> <tspan fill="{GREY}" font-size="11">{section}</tspan>'
    title += f'<tspan dx="10" font-family="{MONO}" font-size="12" fill="{bar}">{names}</tspan>'
    percent = "&lt; 0.1%" if work < 0.001 * total else f"{work / total:.1%}"
    return [
        text(LEFT + 14, y + 17, title, 14),
        text(LEFT + 14, y + 34, escape(equation(rows[0])), 12, GREY),
        text(598, y + 17, shapes, 12.5, text_anchor="end", font_family=MONO),
        text(690, y + 17, f"{size:,}" if size else "", 12.5, text_anchor="end", font_family=MONO),
        text(RIGHT - 14, y + 17, percent, 12.5, text_anchor="end", font_family=MONO),
        *(
            f'<rect x="{BAR}" y="{y + 25}" width="{(RIGHT - 14 - BAR) * part:.1f}" height="7" rx="2" fill="{colour}"/>'
            for part, colour in ((1, PAPER), (work / largest, bar))
        ),
    ]


def picture(title, cfg, rows):
    """The rows of a trace of one sequence -> the text of an SVG: the residual stream and its sublayers."""
    panels, total = {}, sum(row.flops for row in rows)
    for name in COLOURS:
        mine = [row for row in rows if row.sublayer == name]
        each = len(mine) // (cfg.layers if name.endswith("_layer") else 1)  # number of ops in one layer
        mine = [row._replace(flops=sum(r.flops for r in mine[i::each])) for i, row in enumerate(mine[:each])]
        panels[name] = [list(group) for _, group in itertools.groupby(mine, lambda row: row.op)]
    largest = max(sum(row.flops for row in group) for groups in panels.values() for group in groups)
    letters = f"V={cfg.vocab_size} T={cfg.seq_len} C={cfg.width} L={cfg.layers} H={cfg.heads} G={cfg.kv_heads} "
    letters += f"D={cfg.head_width} F={cfg.hidden}"
    parameters, work = tinygpt.count_parameters(cfg)[0], total / cfg.seq_len / 1e6
    marks = [
        text(20, 36, escape(title), 20, font_weight="700"),
        text(20, 58, f"{parameters:,} parameters, {work:,.1f} MFLOP a token forward", 13, GREY),
        text(RIGHT, 36, letters, 12.5, text_anchor="end", font_family=MONO),
        text(RIGHT, 58, "shapes and FLOPs of one sequence of T tokens", 13, GREY, text_anchor="end"),
        text(LEFT + 14, 88, "op, section of tinygpt.py, parameters by name", 11.5, GREY),
        text(598, 88, "result", 11.5, GREY, text_anchor="end"),
        text(690, 88, "parameters", 11.5, GREY, text_anchor="end"),
        text(RIGHT - 14, 88, "FLOPs", 11.5, GREY, text_anchor="end"),
    ]
    y, tops, under = 100, {}, []
    for name, groups in panels.items():
        fill, bar = COLOURS[name]
        y += 18 if name in ("attention_layer", "head") else 0  # space for the frame of a layer
        height = TOP + ROW * len(groups) + 4
        tops[name] = y, y + height
        under.append(f'<rect x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{height}" rx="8" fill="{fill}"/>')
        heading = f'<tspan font-weight="700" fill="{bar}">{name}</tspan>'
        marks.append(text(LEFT + 14, y + 22, f'{heading}<tspan dx="10" fill="{GREY}">{SUMS[name]}</tspan>', 13.5))
        for i, group in enumerate(groups):
            marks += draw_row(y + TOP + ROW * i, group, total, largest, bar)
        y += height + 18
    return "\n".join([*svg_frame(y), *under, *stream(tops, cfg), *marks, "</svg>", ""])


def svg_frame(height):
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="{SANS}">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="12" fill="{PAPER}" stroke="#d0d7de"/>',
    ]


def stream(tops, cfg):
    """SVG elements of the residual stream and of the arrows to and from it. tops: panel -> (top, bottom)."""
    (_, start), (_, stop) = tops["embed"], tops["head"]
    first, last = tops["attention_layer"][0] - 9, tops["mlp_layer"][1] + 9
    enter, leave = tops["embed"][0] + 17, tops["head"][0] + 17
    thick = f'fill="none" stroke="{LINE}" stroke-width="5" stroke-linecap="round"'
    thin = f'fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#arrow)"'
    marks = [
        f'<rect x="16" y="{first}" width="{RIGHT - 6}" height="{last - first}" rx="12" fill="none" stroke="{LINE}" '
        'stroke-width="1.5" stroke-dasharray="5 4"/>',
        f'<path d="M{LEFT} {start - 17}H{STREAM + 12}Q{STREAM} {start - 17} {STREAM} {start - 5}V{leave}" {thick}/>',
        f'<path d="M{STREAM} {leave}H{LEFT - 2}" {thin}/>',
        f'<path d="M{STREAM + 24} {enter}H{LEFT - 2}" {thin}/>',
        f'<path d="M{LEFT} {stop - 17}H{STREAM + 26}" {thin}/>',
        text(STREAM + 20, enter + 4, "tokens", 12.5, text_anchor="end"),
        text(STREAM + 22, stop - 13, "logits", 12.5, text_anchor="end"),
    ]
    middle = (first + last) / 2
    times = dict(text_anchor="middle", font_weight="700", transform=f"rotate(-90 38 {middle})")
    marks.append(text(38, middle, f"\u00d7 {cfg.layers} layers", 15, **times))
    for name in ("attention_layer", "mlp_layer"):
        top, bottom = tops[name]
        marks += [
            f'<circle cx="{STREAM}" cy="{top + 17}" r="5" fill="{LINE}"/>',
            f'<path d="M{STREAM} {top + 17}H{LEFT - 2}" {thin}/>',
            f'<path d="M{LEFT} {bottom - 17}H{STREAM + 13}" {thin}/>',
            f'<circle cx="{STREAM}" cy="{bottom - 17}" r="10" fill="{PAPER}" stroke="{LINE}" stroke-width="2"/>',
            f'<path d="M{STREAM - 5} {bottom - 17}h10m-5 -5v10" stroke="{LINE}" stroke-width="2"/>',
        ]
    return marks


# == 5  command line ===================================================================================================


def config_of(args):
    cfg = tinygpt.find_size(args.size)
    cfg = check.scaled_down(cfg) if vars(args).get("scaled_down") else cfg
    return cfg.changed(**tinygpt.overrides(args.set))


def command_trace(args):
    if args.tokenizer and not args.checkpoint:
        raise ValueError("--tokenizer needs --checkpoint; name both or leave it out")
    if args.checkpoint:
        checkpoint, tokenizer = sample.load_model(args.checkpoint, args.tokenizer)
        cfg, flat = checkpoint.cfg, checkpoint.parameters
    else:
        cfg = config_of(args)
        flat, tokenizer = tinygpt.init_parameters(cfg, 0), bpe.Tokenizer.from_merges([])
    ids = [tokenizer.end, *tokenizer.encode(args.text)][: cfg.seq_len]
    rows = trace(tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), cfg, np.array([ids]))
    print(f"{len(ids)} tokens {ids}; {tinygpt.count_parameters(cfg)[0]:,} parameters in all")
    print(f"{'section':8}{'op':11}{'in':45}{'out':18}{'parameters':18}{'number':>11}{'FLOP':>14}  equation")
    for row in rows:
        inputs, used = " ".join(map(str, row.inputs)), " ".join(row.names)
        start = f"{row.section:8}{row.op:11}{inputs:45}{row.out!s:18}{used:18}"
        print(f"{start}{row.size:11,}{row.flops:14,}  {equation(row)}")


def command_golden(args):
    if args.checkpoint:
        checkpoint = tinygpt.load_checkpoint(args.checkpoint)
        cfg, flat = checkpoint.cfg, checkpoint.parameters.astype(np.float64)
        if args.scaled_down or args.set:
            raise ValueError("--checkpoint has its own configuration; leave out --scaled-down and --set")
    else:
        cfg = config_of(args)
        noise = np.random.default_rng(args.seed).standard_normal(tinygpt.count_parameters(cfg)[0])
        flat = tinygpt.init_parameters(cfg, args.seed, np.float64) + noise / math.sqrt(cfg.width)  # no gain is 1
    T = args.seq_len or min(8, cfg.seq_len)
    if T > cfg.seq_len:
        raise ValueError(f"--seq-len {T} is above the model's seq_len={cfg.seq_len}; lower it or leave it out")
    count = write_golden(args.out, cfg, flat, golden_settings(cfg, args.batch_size, args.seed), T)
    print(f"{args.out}: {count} tensors, {args.out.stat().st_size:,} bytes")


def command_picture(args):
    cfg = config_of(args)
    flat = np.zeros(tinygpt.count_parameters(cfg)[0], np.float32)
    rows = trace(tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), cfg, np.zeros((1, cfg.seq_len), np.int64))
    args.out.write_text(picture(" ".join([args.size, *args.set]), cfg, rows), encoding="utf-8", newline="\n")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


def main(argv=None):
    parser = bpe.Parser(prog="explain.py", description="Explain a model: trace of its ops, golden numbers, picture.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name, run, what):
        command = commands.add_parser(name, help=what)
        command.set_defaults(run=run)
        command.add_argument("--size", default="1m", help="a size with initial parameters (default %(default)s)")
        command.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="changes")
        return command

    command = add("trace", command_trace, "one line for each op of the forward")
    command.add_argument("text", help="the text, tokenized into bytes or by the checkpoint's tokenizer")
    command.add_argument("--checkpoint", type=Path, metavar="FILE", help="a trained model instead")
    command.add_argument("--tokenizer", metavar="FILE", help="for a checkpoint without one, such as llama2.c's")
    command = add("golden", command_golden, "every number of a forward, a backward and ten updates, for ports")
    command.add_argument("--checkpoint", type=Path, metavar="FILE", help="a trained model instead")
    command.add_argument("--scaled-down", action="store_true", help="the same architecture with short axes")
    command.add_argument(
        "--batch-size", type=train.SEQUENCES, default=2, metavar="B", help="sequences (default %(default)s)"
    )
    command.add_argument(
        "--seq-len", type=train.SEQUENCES, metavar="T", help="tokens of each (default 8, or the window)"
    )
    command.add_argument("--seed", type=bpe.in_range(int, 0, 2**63 - 1), default=0, help="(default %(default)s)")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file to write")
    command = add("picture", command_picture, "the architecture as an SVG")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="an .svg file to write")
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        parser.error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
