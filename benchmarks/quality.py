"""Quality after a time: train.py for some minutes, and the row of docs/records.md that it makes.

    python benchmarks/quality.py --data tinystories-train.txt --val-data tinystories-valid.txt --minutes 5
    python benchmarks/quality.py --data ... --val-data ... --minutes 5 --seeds 0 1 2 --size 1m-record

What follows `--` goes to train.py. Bits per byte are of all validation tokens. The texts are named by the first eight
digits of their SHA-256: rows of other texts do not compare. Nothing else may run on the machine: time is what is given.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_speed import processor

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = "date", "commit", "size", "minutes", "seeds", "tokens", "bits per byte", "data", "machine"


def run(args, seed, folder):
    """One run -> (tokens read, bits per byte of all validation tokens, what multiplied)."""
    words = ["--size", args.size, "--data", args.data, "--val-data", args.val_data, "--seed", seed, *args.more]
    words += ["--minutes", args.minutes, "--out", Path(folder, str(seed))]
    done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, words)], stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)
    lines = [json.loads(line) for line in Path(folder, str(seed), "log.jsonl").read_text("utf-8").splitlines()]
    s, final = lines[0]["settings"], lines[-1]
    seq_len = lines[0]["config"]["seq_len"]
    by = s["instruction"] or s["dtype"]
    return s["steps"] * s["batch_size"] * seq_len, final["final_val_bits_per_byte"], by


def commit():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "-"


def digits(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def main():
    parser = argparse.ArgumentParser(description="Bits per byte after some minutes of training, as a row of a table.")
    parser.add_argument("--data", required=True, metavar="FILE", help="the training text")
    parser.add_argument("--val-data", required=True, metavar="FILE", help="the text that is scored")
    parser.add_argument("--minutes", type=float, default=5, help="of each run (default %(default)s)")
    parser.add_argument("--size", default="1m", help="of the model (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run each (default %(default)s)")
    parser.add_argument("more", nargs="*", metavar="-- FLAG", help="more flags of train.py")
    args = parser.parse_args()
    args.data, args.val_data = (os.path.abspath(path) for path in (args.data, args.val_data))
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(args, seed, folder) for seed in args.seeds]
    tokens, bits, by = zip(*runs)
    figure = f"{statistics.mean(bits):.4f}" + (f" ({min(bits):.4f} to {max(bits):.4f})" if len(bits) > 1 else "")
    row = time.strftime("%Y-%m-%d"), commit(), " ".join([args.size, *args.more]), f"{args.minutes:g}"
    row += " ".join(map(str, args.seeds)), f"{statistics.mean(tokens):,.0f}", figure
    row += f"{digits(args.data)}, {digits(args.val_data)}", f"{processor()}, {by[0]}"
    for cells in (COLUMNS, ["---"] * len(COLUMNS), row):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
