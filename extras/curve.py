"""The loss curve of a run, which train.py shows at its end: in the terminal, and as loss.png where matplotlib is."""

import numpy as np

import bpe
from extras import report


def draw_curve(folder):
    """Show the loss curve of the log in `folder`; write loss.png there where matplotlib is installed."""
    log = report.read_log(folder / "log.jsonl", folder.name)
    for problem in log.problems:
        bpe.note(f"{folder / 'log.jsonl'}: {problem}")
    steps, losses = ([int(row["step"]) for row in log.updates], [row["loss"] for row in log.updates])
    if len(steps) < 2:
        return
    bpe.note(terminal_curve(steps, losses))
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return bpe.note("for the curve as a picture: pip install matplotlib")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="training, each update")
    smooth = np.convolve(losses, np.ones(max(1, len(losses) // 50)) / max(1, len(losses) // 50), "valid")
    axes.plot(steps[len(steps) - len(smooth) :], smooth, color="C0", label="training, mean")
    valid = [(row["step"], row["nats"]) for row in log.validations]
    axes.plot(*zip(*valid), "o-", color="C1", label="validation") if valid else None
    axes.set(xlabel="update", ylabel="nats per token")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
    bpe.note(f"loss curve: {folder / 'loss.png'}")


def terminal_curve(steps, losses, width=64, height=10):
    """A curve in characters: each column the mean of its share of the updates."""
    columns = [float(np.mean(part)) for part in np.array_split(np.array(losses), min(width, len(losses)))]
    top, bottom = max(columns), min(columns)
    places = [round((height - 1) * (top - c) / max(top - bottom, 1e-9)) for c in columns]
    lines = []
    for row in range(height):
        label = f"{top - (top - bottom) * row / (height - 1):6.2f} |"
        lines.append(label + "".join("*" if place == row else " " for place in places))
    lines.append(" " * 7 + "+" + "-" * len(columns))
    lines.append(f"{'loss':>6s}  update {steps[0]} to {steps[-1]}")
    return "\n".join(lines)
