"""Explain how a model computes, by running the specification: a trace of its ops, golden numbers, a picture.

    python extras/explain.py trace "Lily found" --size 1m
    python extras/explain.py trace "Lily found" --checkpoint runs/1m/last.safetensors
    python extras/explain.py golden --size gpt2 --scaled-down --out golden.safetensors
    python extras/explain.py picture --size 1m --out architecture.svg

`trace` prints one line for each op of a real forward: the section of tinygpt.py that defines it, the shapes of its
inputs and output, its parameters (names, count), its FLOPs and its equation. `golden` writes every number of a forward,
a backward and ten updates in float64, for a port to compare with. `picture` draws the trace. extras/inside/ has the
parts: trace.py, golden.py, picture.py.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import sample
import tinygpt
import train
from extras import check
from extras.inside.golden import golden_settings, write_golden
from extras.inside.picture import picture
from extras.inside.trace import equation, trace


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
