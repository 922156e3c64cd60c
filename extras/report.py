"""A report of runs from their logs: one HTML page that needs no network, or an export to a dashboard.

    python extras/report.py runs/1m                              # writes report.html; compares several runs
    python extras/report.py runs/sweep-lr-* --out sweep.html     # a folder stands for all runs in it
    python extras/report.py --tensorboard runs/1m --follow       # live, until the run ends; also --wandb

Only log.jsonl is read, so a run that is still training, or was killed, is shown up to its last update. Read in order:
1 the log, 2 results, 3 plots, 4 the page, 5 export to dashboards, 6 command line.
"""

import html
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import tinygpt

# == 1  the log ========================================================================================================

COLUMNS = ("step", "loss", "lr", "norm", "tokens", "seconds")  # fields of an update
KINDS = {"settings": "settings", "loss": "update", "val_nats": "validation", "final_val_nats": "final"}  # by a field


class Log(NamedTuple):
    name: str
    settings: dict  # the trainer's settings and the fields of the model's Config
    config: dict
    command: str
    updates: list  # dicts of COLUMNS and `elapsed`: seconds of training, summed over restarts
    validations: list  # dicts of step, nats, bits, stories
    final: dict  # nats, bits, tokens of the whole validation text; empty if the run did not finish
    problems: list  # strings: what could not be read


def number(x):
    """x as a float; None if it is not a number, or is NaN, infinite or too large or small to plot."""
    return float(x) if type(x) in (int, float) and (x == 0 or 1e-100 < abs(x) < 1e100) else None


def parse(line):
    """A line of a log, bytes -> (kind, entry); (None, None) if it is not an entry of a known kind."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))  # an editor may have put a mark before the first
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(entry, dict):
        return None, None
    kind = next((kind for field, kind in KINDS.items() if field in entry), None)
    readable = isinstance(entry.get("settings"), dict) if kind == "settings" else number(entry.get("step")) is not None
    return (kind, entry) if readable else (None, None)


def read_log(path, name):
    """Read a file -> `Log`. Lines that cannot be read are listed in its `problems`."""
    settings, config, command, updates, validations, final, problems = {}, {}, "", [], [], {}, []
    *lines, rest = Path(path).read_bytes().split(b"\n")
    if rest and parse(rest)[0] is None:
        problems.append("The last line is incomplete: the run was killed while writing it, or is writing now.")
    for place, line in enumerate([*lines, rest], 1):
        kind, entry = parse(line)
        if kind == "settings":
            settings = entry["settings"]
            config = entry["config"] if isinstance(entry.get("config"), dict) else {}
            command = str(entry.get("command", ""))
        elif kind == "update":
            row = {column: number(entry.get(column)) for column in COLUMNS}
            if None in row.values() or (updates and row["step"] <= updates[-1]["step"]):
                problems.append(f"Line {place} is left out: it is not the next update.")
            else:
                updates.append(row | {"elapsed": elapsed(updates, row["seconds"])})
        elif kind == "validation":
            stories = entry.get("stories") if isinstance(entry.get("stories"), list) else []
            row = {"step": number(entry["step"]), "stories": [str(story) for story in stories]}
            row |= {"nats": number(entry["val_nats"]), "bits": number(entry.get("val_bits_per_byte"))}
            validations.append(row)
        elif kind == "final":
            final = {"nats": number(entry["final_val_nats"]), "bits": number(entry.get("final_val_bits_per_byte"))}
            final["tokens"] = number(entry.get("tokens"))
        elif line and place <= len(lines):
            problems.append(f"Line {place} is left out: it is not an entry of a log.")
    if len(problems) > 5:
        problems[5:] = [f"{len(problems) - 5} more lines are left out."]
    return Log(name, settings | config, config, command, updates, validations, final, problems)


def elapsed(updates, seconds):
    """Seconds of training at the update after `updates`. A resumed run counts `seconds` from 0 again."""
    if not updates:
        return seconds
    before = updates[-1]
    return before["elapsed"] + (seconds - before["seconds"] if seconds >= before["seconds"] else seconds)


def find_logs(paths):
    """Folders of runs, folders of such folders, or log files -> [log file]. ValueError if a path has none."""
    found = []
    for path in paths:
        inside = [path / "log.jsonl"] if (path / "log.jsonl").is_file() else sorted(path.glob("*/log.jsonl"))
        if path.is_file():
            inside = [path]
        if not inside:
            raise ValueError(f"{path} holds no run; expected a folder with the log.jsonl of a run of train.py")
        found += [log for log in inside if log not in found]
    return found


def read_logs(paths):
    """[Log] of the files that `find_logs` finds, best validation first. ValueError if one has no entries."""
    files = find_logs(paths)
    folders = [path.resolve().parent if path.name == "log.jsonl" else path for path in files]
    names = [folder.name for folder in folders]
    logs = []
    for path, folder, name in zip(files, folders, names):
        log = read_log(path, name if names.count(name) == 1 else str(folder))
        if not (log.settings or log.updates or log.validations):
            raise ValueError(f"{path} has no entry yet; expected the settings that train.py writes first")
        logs.append(log)
    return best_first(logs)


def best_first(logs):
    return sorted(logs, key=lambda log: (score(log) is None, score(log) or 0.0))


# == 2  results ========================================================================================================


class Published(NamedTuple):
    name: str
    source: str
    parameters: int
    tokens: float  # read in training; None if unknown
    nats: float  # per token of its own tokenizer
    bits: float  # per byte of TinyStories' validation text
    drawn: str  # its name in the plot; "" leaves it out


CS336, LLAMA2C = "Stanford CS336, assignment 1", "llama2.c"
PUBLISHED = (
    Published("CS336, the target", CS336, 22_696_448, 327.68e6, 1.45, 0.508, "CS336 target"),
    Published("CS336, the best run published by others", CS336, 22_696_448, 327.68e6, 1.358, 0.476, ""),
    Published("CS336, the target for a CPU", CS336, 22_696_448, 40.96e6, 2.00, 0.701, "CS336 target for a CPU"),
    Published("CS336, the course's laptop, 82 minutes", CS336, 22_696_448, 40.96e6, 1.80, 0.631, ""),
    Published("CS336, 40.96M tokens, rate tuned to 2e-3", CS336, 22_696_448, 40.96e6, 1.639, 0.574, ""),
    Published("TinyStories-1M", "Eldan & Li 2023, arXiv:2305.07759", 3_745_984, None, None, 0.707, ""),
    Published("stories260K", LLAMA2C, 260_032, 6.6e9, 1.386, 0.97, "stories260K"),
    Published("stories15M", LLAMA2C, 15_191_712, 9.8e9, 1.072, 0.41, "stories15M"),
    Published("stories42M", LLAMA2C, 41_689_600, None, 0.847, 0.32, ""),
    Published("stories110M", LLAMA2C, 109_529_856, 2.6e10, 0.760, 0.29, "stories110M"),
)


def score(log):
    """Bits per byte of the whole validation text, else of the last validation, else None."""
    found = [log.final.get("bits"), *(row["bits"] for row in reversed(log.validations))]
    return next((bits for bits in found if bits is not None), None)


def count_parameters(config):
    """The number of parameters of a logged configuration; None if `Config` rejects it."""
    if any(type(x) is int and x > 10**7 for x in config.values()):  # Config would search long for its divisors
        return None
    try:
        return tinygpt.count_parameters(tinygpt.Config(**config))[0]
    except (TypeError, ValueError):
        return None


def speeds(log):
    """[(update, tokens per second since the previous update)]. The time of an evaluation counts for the next update."""
    return [
        (b, (b["tokens"] - a["tokens"]) / (b["elapsed"] - a["elapsed"]))
        for a, b in zip(log.updates, log.updates[1:])
        if b["elapsed"] > a["elapsed"]
    ]


def result(log):
    """The row of a run in the table of runs, as a dict; None where a value is unknown."""
    last, planned = log.updates[-1] if log.updates else {}, number(log.settings.get("steps"))
    steps = int(last.get("step", 0))
    if log.final:
        state = "finished"
    elif planned and steps >= planned:
        state = "not scored"
    else:
        state = f"at update {steps:,}" + (f" of {int(planned):,}" if planned else "")
    found = [log.final.get("nats"), *(row["nats"] for row in reversed(log.validations))]
    return {
        "bits_per_byte": score(log),
        "nats_per_token": next((nats for nats in found if nats is not None), None),
        "updates": steps,
        "tokens": int(last.get("tokens", 0)),
        "tokens_per_second": round(median(speed for _, speed in speeds(log))) if speeds(log) else None,
        "parameters": count_parameters(log.config),
        "seconds": round(last.get("elapsed", 0.0), 1),
        "state": state,
    }


def differing(logs):
    """Names of the settings whose values differ between runs."""
    names = list(dict.fromkeys(name for log in logs for name in log.settings))
    return [name for name in names if len({json.dumps(log.settings.get(name)) for log in logs}) > 1]


# == 3  plots ==========================================================================================================
#
# An SVG holds only lines, in a square of 1000 x 1000 that is stretched to the available size. Line widths do not
# stretch, and labels are HTML around the SVG, so a plot fits a phone, a wide screen and paper.

POINTS = 240  # of a curve, about; a screen does not show more
LAYERS = ("faint", "line", "dots", "ring")  # kinds of curve, back to front


class Curve(NamedTuple):
    run: int  # index of the run, which decides the colour
    kind: str  # one of LAYERS
    name: str
    points: list  # (x, y)


def smooth(points):
    """Moving average of y over a fiftieth of the points, then every n-th point so that about `POINTS` remain."""
    n = len(points)
    reach, sums = n // 100, [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = []
    for i in range(n):
        low, high = max(0, i - reach), min(n, i + reach + 1)
        means.append((points[i][0], (sums[high] - sums[low]) / (high - low)))
    return means[:: -(-n // POINTS)] + means[-1:] if means else []


def extremes(points):
    """The lowest and highest point of each of `POINTS` / 2 groups, in order, so that no spike is lost."""
    size, kept = max(1, -(-2 * len(points) // POINTS)), []
    for i in range(0, len(points), size):
        group = points[i : i + size]
        kept += sorted({min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])})
    return kept


def bounds(values, log, zero=False):
    """(low, high) of an axis: the range of the values and a margin, starting at 0 if `zero` is set."""
    low, high = min(values), max(values)
    if log:
        return (low / 1.05, high * 1.05) if low < high else (low / 2, high * 2)
    margin = 0.04 * (high - low) or abs(high) / 2 or 1.0
    return (0.0 if low >= 0 and (zero or low <= margin) else low - margin), high + margin


def ticks(low, high, log, count=5):
    """About `count` round numbers from low to high."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
            if len(found) >= 3:
                return found[:: -(-len(found) // 8)]
    rough = (high - low) / (3 if log else count)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(x):
    """Format a number for a tick: 40k, 2.5M, 0.003."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size and (size > 1e3 or abs(x) >= 1e4):
            return f"{x / size:.4g}{letter}"
    return f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def plot(title, unit, x_name, curves, log_x=False, log_y=False, rules=(), marks=(), css="plot", zero="", top=None):
    """The HTML of a figure. rules: (y, label) of horizontal lines. marks: ticks of x, numbers or names of 0, 1, ...

    zero: the axes that begin at 0: "x", "y" or "xy". top: the upper end of y; curves may leave the plot there.
    """
    kept = []
    for curve in curves:
        points = [(x, y) for x, y in curve.points if (x > 0 or not log_x) and (y > 0 or not log_y)]
        kept += [curve._replace(points=points)] if points else []
    caption = f"<figcaption>{escape(title)} <small>{escape(unit)}</small></figcaption>"
    if not kept:
        return f'<figure class="{css}">{caption}<p class="none">The log has no such values.</p></figure>'
    x_low, x_high = bounds([x for curve in kept for x, _ in curve.points], log_x, "x" in zero)
    names = marks if any(isinstance(mark, str) for mark in marks) else ()
    if names:
        x_low, x_high = -0.5, len(names) - 0.5
    top = top or math.inf
    y_low, y_high = bounds(
        [min(y, top) for curve in kept for _, y in curve.points] + [y for y, _ in rules], log_y, "y" in zero
    )

    def place(value, low, high, log):
        value, low, high = (math.log(x) if log else x for x in (value, low, high))
        return 1000 * (value - low) / (high - low)

    def across(x):
        return place(x, x_low, x_high, log_x)

    def down(y):
        return 1000 - place(y, y_low, y_high, log_y)

    levels, columns = ticks(y_low, y_high, log_y), range(len(names)) if names else marks
    columns = columns or ticks(x_low, x_high, log_x)
    grid = "".join(f"M0 {down(y):.1f}H1000" for y in levels) + "".join(f"M{across(x):.1f} 0V1000" for x in columns)
    shapes = [f'<path class="grid" d="{grid}"/>']
    shapes += [f'<path class="rule" d="M0 {down(y):.1f}H1000"/>' for y, _ in rules]
    for curve in sorted(kept, key=lambda curve: (LAYERS.index(curve.kind), -curve.run)):  # the best run on top
        at = [(f"{across(x):.2f}", f"{down(y):.2f}") for x, y in curve.points]
        classes = f'class="r{curve.run} {curve.kind}" data-name="{escape(curve.name)}"'
        if curve.kind in ("dots", "ring"):  # a line of length 0 with round ends is a dot
            dots = "".join(f"M{x} {y}h0" for x, y in at)
            shapes.append(f'<path {classes} d="{dots}"/>')
            shapes += [f'<path class="hole" d="{dots}"/>'] if curve.kind == "ring" else []
        else:
            shapes.append(f'<polyline {classes} points="{" ".join(f"{x},{y}" for x, y in at)}"/>')
    written = [f'<b class="y" style="top:{down(y) / 10:.1f}%">{short(y)}</b>' for y in levels]
    for x in columns:
        label = escape(names[x]) if names else short(x)
        written.append(f'<b class="x" style="left:{across(x) / 10:.1f}%">{label}</b>')
    written += [f'<i class="rule" style="top:{down(y) / 10:.1f}%">{escape(what)} {y:g}</i>' for y, what in rules]
    axes = f'data-x="{x_low} {x_high} {int(log_x)}" data-y="{y_low} {y_high} {int(log_y)}"'
    return (
        f'<figure class="{css}">{caption}<div class="area" {axes} data-across="{escape(x_name)}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f"{''.join(shapes)}</svg>{''.join(written)}</div><p class='across'>{escape(x_name)}</p></figure>"
    )


def curve_of(log, run, x, y, title, raw=False):
    """Curves of a column of the updates: smoothed and, if `raw`, also unsmoothed behind it."""
    points = [(row[x] / (60 if x == "elapsed" else 1), row[y]) for row in log.updates]
    curves = [Curve(run, "faint", f"{title}, each update", extremes(points))] if raw else []
    return [*curves, Curve(run, "line", title, smooth(points))]


def validation_points(log, x, y):
    """[(x, y)] of the validations whose update is in the log."""
    places = {row["step"]: row[x] / (60 if x == "elapsed" else 1) for row in log.updates}
    return [(places[v["step"]], v[y]) for v in log.validations if v["step"] in places and v[y] is not None]


def loss_plots(logs):
    """The views of the loss. The page shows one at a time."""
    raw, figures = len(logs) <= 3, []
    top = 1.2 * max([log.updates[0]["loss"] for log in logs if log.updates] + [1.0])  # a diverging run leaves the plot
    views = (("tokens", "tokens read", False), ("step", "updates", False), ("elapsed", "minutes of training", False))
    views += (("tokens", "tokens read", True),)
    for index, (x, x_name, log_scale) in enumerate(views):
        curves = []
        for run, log in enumerate(logs):
            curves += curve_of(log, run, x, "loss", f"{log.name} training", raw)
            points = validation_points(log, x, "nats")
            curves += [Curve(run, "dots", f"{log.name} validation", points)]
        title = "Loss, both axes logarithmic" if log_scale else "Loss"
        unit = "nats per token; line: training, dots: validation"
        css = f"plot tall view{index}"
        figures.append(plot(title, unit, x_name, curves, log_scale, log_scale, css=css, top=top))
    bits = plot("Validation", BITS_UNIT, "tokens read", bits_curves(logs), css="plot tall view4", zero="x")
    labels = ("by tokens", "by updates", "by minutes", "logarithmic", "bits per byte")
    inputs = "".join(
        f'<input type="radio" name="view" id="view{i}"{" checked" * (i == 0)}><label for="view{i}">{label}</label>'
        for i, label in enumerate(labels)
    )
    return f'<div class="views">{inputs}{"".join(figures)}{bits}</div>'


BITS_UNIT = "bits per byte; circle: every token of the validation text"


def bits_curves(logs):
    curves = []
    for run, log in enumerate(logs):
        points = validation_points(log, "tokens", "bits")
        curves += [Curve(run, kind, log.name, points) for kind in ("line", "dots")]
        if log.final.get("bits") is not None and log.updates:
            end = (log.updates[-1]["tokens"], log.final["bits"])
            curves.append(Curve(run, "ring", f"{log.name}, every token", [end]))
    return curves


def other_plots(logs):
    """Validation in bits per byte beside published results; learning rate, gradient norm, speed."""
    raw, rates, norms, speed = len(logs) <= 3, [], [], []
    for run, log in enumerate(logs):
        rates += [Curve(run, "line", log.name, extremes([(row["step"], row["lr"]) for row in log.updates]))]
        norms += curve_of(log, run, "step", "norm", log.name, raw)
        points = [(row["step"], x) for row, x in speeds(log)]
        speed += [Curve(run, "line", log.name, medians(points))]
    clips = {clip for log in logs if (clip := number(log.settings.get("grad_clip")))}
    seen = [y for curve in norms for _, y in curve.points]
    clips = [(clip, "clipped above") for clip in clips if seen and clip <= max(seen)] if len(clips) == 1 else []
    peaks = [max(y for _, y in curve.points) for curve in rates if curve.points]
    targets = [(p.bits, p.drawn) for p in PUBLISHED if p.drawn]
    curves = bits_curves(logs)
    return (
        plot(
            "Validation beside others",
            BITS_UNIT,
            "tokens read",
            curves,
            False,
            True,
            targets,
            css="plot tall",
            zero="x",
        )
        + '<div class="three">'
        + plot("Learning rate", "of each update", "updates", rates, log_y=spread(peaks), zero="xy")
        + plot("Gradient norm", "before clipping", "updates", norms, log_y=spread(seen), rules=clips, zero="xy")
        + plot("Speed", "tokens per second, evaluations included", "updates", speed, zero="xy")
        + "</div>"
    )


def spread(values):
    """True if the values spread so widely that a linear axis would squeeze most of them together."""
    return bool(values) and max(values) > 20 * max(min(values), 1e-12)


def medians(points):
    """The median of y in each of at most 60 groups, because the time of a single update is noisy."""
    size = max(1, -(-len(points) // 60))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[len(group) // 2][0], median(y for _, y in group)) for group in groups]


NOT_LISTED = ("files", "checksums", "prompts", "flags")  # left out of tables: too long, or shown elsewhere
FOLLOWS = ("min_lr", "steps", "warmup_steps", "eval_every", "eval_tokens", "train_tokens", "micro_batch_size")
FOLLOWS += ("kv_heads", "head_width", "hidden", "position_rows", *NOT_LISTED)  # mostly derived from other settings


def effect_plots(logs):
    """For each setting that differs, a plot of bits per byte against its values."""
    columns = {name: [log.settings.get(name) for log in logs] for name in differing(logs) if name not in FOLLOWS}
    columns["parameters"] = [count_parameters(log.config) for log in logs]
    figures = []
    for name, values in columns.items():
        shown = [None if value is None else setting(value) for value in values]
        distinct = list(dict.fromkeys(x for x in shown if x is not None))
        numbers = [number(value) for value in values]
        log_x = name not in ("layers", "seed") and None not in numbers and min(numbers) > 0
        if len(distinct) < 2 or (None in numbers and len(distinct) > 8):
            continue
        names, curves = None in numbers, []
        for run, log in enumerate(logs):
            if score(log) is not None and shown[run] is not None:
                x = distinct.index(shown[run]) if names else numbers[run]
                curves.append(Curve(run, "dots", log.name, [(x, score(log))]))
        values = sorted({x for curve in curves for x, _ in curve.points})
        marks = distinct if names else values if len(values) < 7 else ()
        figures.append(plot(name, "bits per byte", name, curves, log_x and not names, marks=marks))
    return f'<div class="three">{"".join(figures[:9])}</div>' if figures else ""


# == 4  the page =======================================================================================================

COLOURS = ("#2f6fde #d9620f #12875a #9b4bd0 #cf3352 #0d8ba0 #957200 #6b7280").split()
COLOURS_IN_THE_DARK = ("#7fb0ff #ff9c5a #4fd39b #cf9bff #ff7d97 #4fd0e4 #e5c04b #a9b1bd").split()

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#5d6877;--line:#dfe3e9;--mark:#fff3cf;
--bar:#c9d0da}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--card:#1a2028;--ink:#e6eaf0;--soft:#98a3b3;--line:#2e3743;
--mark:#443a17;--bar:#465162}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:1.5rem 1rem 4rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .7rem}
h3{font-size:1rem;margin:1rem 0 .4rem;overflow-wrap:anywhere}
p{margin:.3rem 0}
small,.note,.across{color:var(--soft);font-weight:400}
small{font-size:.85em}.note{font-size:.9rem;max-width:75ch}
.warning{border-left:4px solid #d9620f;padding:.4rem .8rem;background:var(--card);border-radius:0 6px 6px 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(135px,1fr));gap:.7rem;margin:1.2rem 0 0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.6rem .8rem}
.cards strong{display:block;font-size:1.35rem;line-height:1.3;font-variant-numeric:tabular-nums}
.cards span{color:var(--soft);font-size:.85rem}
.legend{position:sticky;top:0;z-index:2;background:var(--page);padding:.5rem 0;margin:1.5rem 0 .3rem;display:flex;
flex-wrap:wrap;gap:.3rem .9rem;max-height:30vh;overflow:auto;border-bottom:1px solid var(--line)}
.legend label{cursor:pointer;display:flex;align-items:center;gap:.35rem;overflow-wrap:anywhere;font-size:.9rem}
.swatch{display:inline-block;width:.9em;height:.9em;border-radius:3px;background:currentColor;flex:none;
margin-right:.35em;vertical-align:-.08em}
.plot{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.7rem .9rem .5rem;
break-inside:avoid;min-width:0}
.plot+.plot,.views+.plot,.plot+.three{margin-top:.9rem}
figcaption{font-weight:600;margin-bottom:.5rem}
.area{position:relative;height:210px;margin:0 6px 21px 46px}
.tall .area{height:min(400px,62vw)}
.area svg{position:absolute;inset:0;width:100%;height:100%}
svg *{fill:none;vector-effect:non-scaling-stroke;stroke:currentColor;stroke-linecap:round;stroke-linejoin:round}
.grid{color:var(--line);stroke-width:1}
svg .rule{color:var(--soft);stroke-width:1;stroke-dasharray:1 5}
.line{stroke-width:2}.faint{stroke-width:1;opacity:.28}.dots{stroke-width:8}.ring{stroke-width:13}.hole{stroke-width:8;stroke:var(--card)}
.area b,.area i{position:absolute;font:12px/1 system-ui,sans-serif;color:var(--soft);white-space:nowrap}
.area .x{top:100%;transform:translate(-50%,8px)}
.area .y{right:100%;transform:translate(-8px,-50%)}
.area i.rule{right:0;transform:translateY(-115%);font-size:11px;background:var(--card);padding:0 3px;opacity:.9}
.across{text-align:right;font-size:.8rem;margin:.2rem 0 0}
.none{color:var(--soft)}
.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:.9rem}
.three .plot{margin-top:0}
.views>input{position:absolute;opacity:0}
.views>label{display:inline-block;padding:.15rem .7rem;border:1px solid var(--line);border-radius:99px;cursor:pointer;
margin:0 .3rem .6rem 0;font-size:.88rem;background:var(--card)}
.views>input:checked+label{background:var(--ink);color:var(--page)}
.views>input:focus-visible+label{outline:2px solid var(--soft);outline-offset:2px}
.views>.plot{display:none;margin:0}
#view0:checked~.view0,#view1:checked~.view1,#view2:checked~.view2,#view3:checked~.view3,
#view4:checked~.view4{display:block}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
tr:last-child>*{border-bottom:0}
th{font-weight:600;color:var(--soft)}
th:first-child,td:first-child,.left{text-align:left}
td.text{white-space:normal;overflow-wrap:anywhere;text-align:left}
.differs{background:var(--mark)}
.ours td{font-weight:600;background:var(--mark)}
.bar{min-width:70px;width:24%;padding-right:1rem}
.bar span{display:block;height:.75em;border-radius:3px;background:var(--bar)}
.ours .bar span{background:currentColor}
.settings{columns:3 260px;column-gap:2rem;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:.7rem .9rem;margin:0}
.settings div{display:flex;justify-content:space-between;gap:1rem;break-inside:avoid;padding:.1rem 0;
border-bottom:1px dotted var(--line)}
.settings dt{color:var(--soft)}.settings dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.5rem .9rem;margin:.6rem 0}
summary{cursor:pointer;font-weight:600;overflow-wrap:anywhere}
.story{display:grid;grid-template-columns:9rem 1fr;gap:.2rem 1rem;padding:.55rem 0;border-top:1px solid var(--line);
break-inside:avoid}
.story p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font-family:Georgia,"Times New Roman",serif;
max-width:75ch}
.story span{color:var(--soft);font-size:.85rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:.6rem .9rem;font-size:.82rem;margin:.3rem 0}
#tip{position:absolute;z-index:3;pointer-events:none;background:var(--card);border:1px solid var(--soft);
border-radius:8px;padding:.35rem .6rem;font-size:.82rem;box-shadow:0 3px 12px #0003;max-width:27rem;
font-variant-numeric:tabular-nums}
#tip div{display:flex;gap:.6rem;justify-content:space-between}
@media(max-width:620px){body{padding:1rem .7rem 3rem;font-size:14px}.story{grid-template-columns:1fr}
.area i.rule{font-size:10px}.more{display:none}th,td{padding:.3rem .5rem}
.legend{max-height:22vh}.plot{padding:.6rem .5rem .4rem}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--mark:#f3ecd2;--bar:#bbb;font-size:11px}
body{max-width:none;padding:0;font-size:11px;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.legend{position:static;max-height:none}.views>label,#tip,.legend input{display:none}h2{break-after:avoid}
.area{height:150px}.tall .area{height:290px}.three{grid-template-columns:repeat(3,1fr)}
.wide{overflow:visible}th,td{padding:.2rem .35rem;white-space:normal}tr{break-inside:avoid}}
"""

# A tooltip with the values at the pointer, computed from the coordinates of the drawn points.
SCRIPT = """
const make = kind => document.createElement(kind), tip = make("div");
const near = (points, x) => points.reduce((p, q) => Math.abs(q[0] - x) < Math.abs(p[0] - x) ? q : p);
tip.id = "tip"; tip.hidden = true; document.body.append(tip);
const value = (t, axis) => { const [low, high, log] = axis.split(" ").map(Number);
  return log ? low * (high / low) ** t : low + t * (high - low); };
const shown = x => Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : +x.toPrecision(4);
for (const area of document.querySelectorAll(".area")) {
  const lines = [...area.querySelectorAll("[data-name]:not(.faint)")].map(line => [line,
    (line.getAttribute("points") || line.getAttribute("d").replace(/M/g, " ").replace(/h0/g, "")).trim()
      .split(line.tagName === "path" ? /(?<=\\S \\S+) / : " ").map(p => p.split(/[ ,]/).map(Number))]);
  area.onpointermove = event => {
    const box = area.getBoundingClientRect(), x = 1000 * (event.clientX - box.left) / box.width;
    const y = 1000 * (event.clientY - box.top) / box.height;
    const rows = lines.filter(([line]) => getComputedStyle(line).display !== "none")
      .map(([line, points]) => [line, near(points, x)]).filter(([line, p]) => Math.abs(p[0] - x) < 40)
      .sort((a, b) => Math.abs(a[1][1] - y) - Math.abs(b[1][1] - y)).slice(0, 8).sort((a, b) => a[1][1] - b[1][1]);
    tip.replaceChildren(...rows.map(([line, p]) => {
      const row = make("div"), name = make("span"), swatch = make("i");
      swatch.className = "swatch"; swatch.style.color = getComputedStyle(line).color;
      name.append(swatch, line.dataset.name + " at " + shown(value(p[0] / 1000, area.dataset.x)));
      row.append(name, shown(value(1 - p[1] / 1000, area.dataset.y))); return row; }));
    tip.hidden = !rows.length;
    tip.style.top = event.pageY + 14 + "px";
    tip.style.left = Math.max(4, Math.min(event.pageX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
  };
  area.onpointerleave = () => { tip.hidden = true; };
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => { d.open = true; }));
"""


def escape(x):
    return html.escape(str(x), quote=True)


def setting(value):
    """Format a logged value."""
    if isinstance(value, str):
        return value
    if number(value) is None:
        return json.dumps(value)
    return f"{value:,}" if type(value) is int else f"{value:g}"


def colours(count):
    """CSS that gives class ri the colour of run i; more than eight runs get a scale from the best to the last."""
    light, dark = COLOURS, COLOURS_IN_THE_DARK
    if count > len(light):
        hues = [265 - 225 * i / (count - 1) for i in range(count)]
        light, dark = ([f"hsl({hue:.0f} 65% {shade}%)" for hue in hues] for shade in (42, 66))

    def rules(palette):
        return "".join(f".r{i}{{color:{palette[i]}}}" for i in range(count))

    css = f"{rules(light)}@media(prefers-color-scheme:dark){{{rules(dark)}}}@media print{{{rules(light)}}}"
    if count > 1:  # hide unchecked runs; while the pointer is on a label, fade the other runs
        for i in range(count):
            css += f"body:has(#run{i}:not(:checked)) svg .r{i}{{display:none}}"
            css += f"body:has(label[for=run{i}]:hover) svg [data-name]:not(.r{i}){{opacity:.12}}"
    return css


def shown(x, form):
    return "" if x is None else form.format(x)


def duration(seconds):
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cards(log):
    r = result(log)
    facts = (
        (shown(r["bits_per_byte"], "{:.4f}"), "bits per byte" + ("" if log.final else ", so far")),
        (shown(r["nats_per_token"], "{:.4f}"), "nats per token"),
        (f"{r['updates']:,}", "updates" if log.final else f"updates; {r['state']}"),
        (short(r["tokens"]), "tokens read"),
        (shown(r["parameters"], "{:,}"), "parameters"),
        (shown(r["tokens_per_second"], "{:,}"), "tokens per second"),
        (duration(r["seconds"]), "training"),
    )
    return (
        f'<div class="cards">{"".join(f"<div><strong>{a}</strong><span>{b}</span></div>" for a, b in facts if a)}</div>'
    )


def runs_table(logs):
    """The table of runs, best first, with every setting whose values differ."""
    names = [name for name in differing(logs) if name not in NOT_LISTED]
    chosen, follow = ([name for name in names if (name in FOLLOWS) == late] for late in (False, True))

    def headed(names):
        return "".join(f'<th class="differs">{escape(name)}</th>' for name in names)

    def valued(log, names):
        return "".join(f'<td class="differs">{escape(setting(log.settings.get(name, "")))}</td>' for name in names)

    titles = ("nats/token", "updates", "tokens read", "tok/s", "parameters", "training", "state")
    head = f"<th>run</th><th>bits/byte</th>{headed(chosen)}{''.join(f'<th>{t}</th>' for t in titles)}{headed(follow)}"
    rows = []
    for run, log in enumerate(logs):
        r = result(log)
        bits = shown(r["bits_per_byte"], "{:.4f}") + ("" if log.final or score(log) is None else " *")
        cells = [shown(r["nats_per_token"], "{:.4f}"), f"{r['updates']:,}", f"{r['tokens']:,}"]
        cells += [shown(r["tokens_per_second"], "{:,}"), shown(r["parameters"], "{:,}")]
        cells += [duration(r["seconds"]), r["state"]]
        row = f'<td class="left"><span class="swatch r{run}"></span>{escape(log.name)}</td><td>{bits}</td>'
        row += valued(log, chosen) + "".join(f"<td>{cell}</td>" for cell in cells) + valued(log, follow)
        rows.append(f"<tr>{row}</tr>")
    note = "Best first. Shaded columns are settings in which the runs differ."
    if any(not log.final and score(log) is not None for log in logs):
        note += " * Measured on the beginning of the validation text: this run has not scored all of it."
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h2 id="runs">Runs</h2><div class="wide">{table}</div><p class="note">{note}</p>'


def published_table(logs):
    """Table of bits per byte, lowest first: published results and at most ten of these runs."""
    rows = [(p.bits, p.name, p.source, p.parameters, p.tokens, p.nats, None) for p in PUBLISHED]
    for run, log in enumerate(logs[:10]):
        r = result(log)
        if score(log) is not None:
            rows.append((score(log), log.name, "", r["parameters"], r["tokens"], r["nats_per_token"], run))
    longest, body = max(row[0] for row in rows), []
    for bits, name, source, parameters, tokens, nats, run in sorted(rows, key=lambda row: row[0]):
        ours = "" if run is None else ' class="ours"'
        colour = "" if run is None else f' class="r{run}"'
        bar = f'<span{colour} style="width:{100 * bits / longest:.1f}%"></span>'
        body.append(
            f'<tr{ours}><td class="text">{escape(name)} <small>{escape(source)}</small></td>'
            f'<td class="more">{shown(parameters, "{:,}")}</td><td>{"" if tokens is None else short(tokens)}</td>'
            f'<td class="more">{shown(nats, "{:.4g}")}</td><td>{bits:.3f}</td><td class="bar">{bar}</td></tr>'
        )
    titles = '<th>model <small>source</small></th><th class="more">parameters</th><th>tokens read</th>'
    titles += '<th class="more">nats/token</th><th>bits/byte</th><th></th>'
    return (
        f'<h2 id="published">Beside published results</h2><div class="wide"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="note">Bits per byte are nats / ln 2 / bytes per token: comparable across tokenizers, but not across '
        "texts. Published results are for TinyStories' validation text; do not compare them with a run that was "
        "validated on other text.</p>"
    )


def settings_list(logs):
    """The settings with the same value in all runs."""
    apart = differing(logs)
    rows = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(setting(value))}</dd></div>"
        for name, value in logs[0].settings.items()
        if name not in apart and name not in NOT_LISTED and value != ""
    ]
    title = "Settings" if len(logs) == 1 else "Settings shared by all runs"
    return f'<h2 id="settings">{title}</h2><dl class="settings">{"".join(rows)}</dl>' if rows else ""


def stories_list(logs):
    """The stories of every validation, grouped by prompt. The details of the best run are open."""
    parts = []
    for run, log in enumerate(logs):
        told = [row for row in log.validations if row["stories"]]
        prompts = log.settings.get("prompts") if isinstance(log.settings.get("prompts"), list) else []
        if not told:
            continue
        body = []
        for index in range(max(len(row["stories"]) for row in told)):
            prompt = str(prompts[index]) if index < len(prompts) else ""
            body.append(f"<h3>&ldquo;{escape(prompt)}&rdquo;</h3>" if prompt else "")
            for row in (row for row in told if index < len(row["stories"])):
                story, bits = row["stories"][index], shown(row["bits"], "<br>{:.3f} bits/byte")
                begun = prompt if story.startswith(prompt) else ""
                text = f"<strong>{escape(begun)}</strong>{escape(story[len(begun) :])}"
                body.append(f'<div class="story"><span>update {row["step"]:,.0f}{bits}</span><p>{text}</p></div>')
        title = f'<span class="swatch r{run}"></span>{escape(log.name)}'
        parts.append(f"<details{' open' * (not parts)}><summary>{title}</summary>{''.join(body)}</details>")
    return f'<h2 id="stories">Stories during training</h2>{"".join(parts)}' if parts else ""


def page(logs):
    """The whole HTML document; logs as `read_logs` returns them."""
    several = len(logs) > 1
    title = f"{len(logs)} runs" if several else logs[0].name
    parts = [f"<h1>{escape(title)}</h1>"]
    data = sorted({str(log.settings["data"]) for log in logs if "data" in log.settings})
    parts.append(f'<p class="note">{escape(", ".join(data))}</p>' if data else "")
    for log in logs:
        for problem in log.problems:
            parts.append(f'<p class="warning">{escape(log.name + ": ") * several}{escape(problem)}</p>')
    if several:
        parts.append(runs_table(logs))
        parts.append('<div class="legend">')
        for run, log in enumerate(logs):
            box = f'<input type="checkbox" id="run{run}" checked>'
            parts.append(f'<label for="run{run}">{box}<span class="swatch r{run}"></span>{escape(log.name)}</label>')
        parts.append("</div>")
    else:
        parts.append(cards(logs[0]))
    parts.append(f'<h2 id="curves">Curves</h2>{loss_plots(logs)}{other_plots(logs)}')
    if several and (effects := effect_plots(logs)):
        parts.append(f'<h2 id="effects">Effect of each setting</h2>{effects}')
    parts += [published_table(logs), settings_list(logs), stories_list(logs)]
    commands = "".join(f"<pre>{escape(log.command)}</pre>" for log in logs if log.command)
    parts.append(f'<h2 id="repeat">Command{"s" if several else ""}</h2>{commands}' if commands else "")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}{colours(len(logs))}</style></head>"
        f"<body>{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


def write_page(logs, path):
    """Write `page` to a file. A lone surrogate, which JSON allows and UTF-8 does not, becomes a question mark."""
    with open(path, "w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(page(logs))


# == 5  export to dashboards ===========================================================================================

PAUSE = 1.0  # seconds between two reads of a growing log
HANDED = {  # kind of entry -> {field: name in the dashboard}
    "update": {"loss": "train/loss", "lr": "train/lr", "norm": "train/norm", "tokens": "train/tokens"},
    "validation": {"val_nats": "validation/nats_per_token", "val_bits_per_byte": "validation/bits_per_byte"},
    "final": {"final_val_nats": "final/nats_per_token", "final_val_bits_per_byte": "final/bits_per_byte"},
}


def entries(path, live):
    """Yield (kind, entry) of a log, each once; if `live`, wait for new entries until the final one.

    A killed run resumes from its last checkpoint and writes the entries after it again; these duplicates are skipped.
    """
    seen, position, rest = set(), 0, b""
    while True:
        if os.path.getsize(path) < position:
            position, rest = 0, b""
        with open(path, "rb") as file:
            file.seek(position)
            read = file.read()
        position += len(read)
        *lines, rest = (rest + read).split(b"\n")
        for line in lines if live else [*lines, rest]:
            kind, entry = parse(line)
            if kind and (kind, entry.get("step")) not in seen:
                seen.add((kind, entry.get("step")))
                yield kind, entry
                if kind == "final":
                    return
        if not live:
            return
        time.sleep(PAUSE)


def hand_on(path, receivers, live):
    """Send every entry of a log to `receivers`: objects such as `TensorBoard` and `Wandb`."""
    for kind, entry in entries(path, live):
        if kind == "settings":
            for receiver in receivers:
                receiver.settings(entry)
            continue
        step = int(entry["step"])
        values = {name: x for field, name in HANDED[kind].items() if (x := number(entry.get(field))) is not None}
        stories = entry.get("stories") if isinstance(entry.get("stories"), list) else []
        texts = [str(story).encode("utf-8", "replace").decode("utf-8") for story in stories]
        for receiver in receivers:
            receiver.scalars(values, step)
            if texts:
                receiver.stories(texts, step)


class TensorBoard:
    """Writes event files to RUN/tensorboard through tensorboardX, which needs NumPy and protobuf but not torch."""

    def __init__(self, folder):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs tensorboardX; pip install tensorboardX tensorboard") from None
        path = folder / "tensorboard"
        self.writer = SummaryWriter(str(path), purge_step=0, flush_secs=5)  # purge_step=0 replaces an earlier export
        bpe.note(f"to view it:  {shlex.join(['tensorboard', '--logdir', str(path)])}")

    def settings(self, entry):
        self.writer.add_text("settings", "    " + json.dumps(entry, indent=2).replace("\n", "\n    "), 0)

    def scalars(self, values, step):
        for name, x in values.items():
            self.writer.add_scalar(name, x, step)

    def stories(self, texts, step):
        for index, text in enumerate(texts):
            self.writer.add_text(f"story/{index}", text, step)

    def close(self):
        self.writer.close()


class Wandb:
    """Logs to a run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and its other variables apply."""

    def __init__(self, folder):
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb needs wandb; pip install wandb") from None
        self.wandb = wandb
        try:
            project = os.environ.get("WANDB_PROJECT", "tinygpt")
            self.run = wandb.init(project=project, name=folder.name, dir=str(folder))
        except Exception as error:  # wandb's own exceptions: no account, no network
            raise ValueError(
                f"wandb did not start: {str(error).rstrip('.')}; WANDB_MODE=offline needs no account"
            ) from None

    def settings(self, entry):
        config = entry["config"] if isinstance(entry.get("config"), dict) else {}
        self.run.config.update({**config, **entry["settings"], "command": entry.get("command")})

    def scalars(self, values, step):
        self.run.log(values, step=step)

    def stories(self, texts, step):
        self.run.log({"stories": self.wandb.Table(columns=["story"], data=[[text] for text in texts])}, step=step)

    def close(self):
        self.run.finish()


def hand_on_runs(args):
    """Run --wandb and --tensorboard -> exit status: 130 if Ctrl-C ended --follow, else 0."""
    paths = find_logs(args.runs)
    if args.follow and len(paths) > 1:
        raise ValueError(f"--follow follows a single run; got {len(paths)}")
    for path in paths:
        receivers, folder = [], path.resolve().parent
        try:
            receivers += [TensorBoard(folder)] if args.tensorboard else []
            receivers += [Wandb(folder)] if args.wandb else []
            hand_on(path, receivers, args.follow)
        except KeyboardInterrupt:
            return 130
        finally:
            for receiver in receivers:
                receiver.close()
    return 0


# == 6  command line ===================================================================================================


def main(argv=None):
    parser = bpe.Parser(prog="report.py", description="Write a page about runs from their logs, or export the logs.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, a folder of runs, or a log.jsonl")
    add("--out", type=Path, metavar="FILE", help="the page to write (default report.html)")
    add("--tensorboard", action="store_true", help="write event files for TensorBoard to RUN/tensorboard, no page")
    add("--wandb", action="store_true", help="log each RUN to Weights & Biases, no page")
    add("--follow", action="store_true", help="export entries as the run writes them, until it ends")
    args = parser.parse_args(argv)
    if args.follow and not (args.tensorboard or args.wandb):
        parser.error("--follow exports a growing log; add --tensorboard or --wandb")
    if args.out and (args.tensorboard or args.wandb):
        parser.error("--tensorboard and --wandb write no page; leave out --out")
    try:
        if args.tensorboard or args.wandb:
            return hand_on_runs(args)
        path = args.out or Path("report.html")
        write_page(read_logs(args.runs), path)
    except (OSError, ValueError) as error:
        parser.error(error)
    bpe.note(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
