"""The architecture of a model as an SVG: a panel for each sublayer, a line for each op of its trace."""

import itertools
from xml.sax.saxutils import escape

import tinygpt
from extras.inside.trace import equation

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
