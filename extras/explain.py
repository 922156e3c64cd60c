"""What happens to a text on its way through a model, op by op, as the specification runs it.

    python extras/explain.py trace "Lily found" --size 1m
    python extras/explain.py trace "Lily found" --checkpoint runs/1m/last.safetensors

One line for each op of the real forward: the section of tinygpt.py that defines it, the shapes that go in and come out,
its parameters by name and number, its floating-point operations, what it computes.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import tinygpt

# == 1  the ops ========================================================================================================


EQUATIONS = {  # of every primitive of Part I that a forward calls
    "linear": "y = x w + b",
    "layernorm": "y = (x - mean) / sqrt(var + eps) w + b",
    "rmsnorm": "y = x / sqrt(mean(x^2) + eps) w",
    "gelu_tanh": "a = h/2 (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3)))",
    "gelu": "a = h/2 (1 + erf(h / sqrt 2))",
    "silu": "a = h sigmoid(h)",
    "relu2": "a = max(h, 0)^2",
    "swiglu": "a = silu(gate) value",
    "attention": "o_t = sum_{s <= t} p_ts v_s, p_t = softmax_s(scale q_t . k_s)",
    "rotate": "each pair of x turned by its angle",
    "embedding": "x_t = w[token_t] + positions[t]",
}


def section_of(function):
    """The number of the section of tinygpt.py that a function stands in."""
    lines = Path(tinygpt.__file__).read_text(encoding="utf-8").splitlines()[: function.__code__.co_firstlineno]
    return next(match.group(1) for line in reversed(lines) if (match := re.match(r"# == ([\d.]+) ", line)))


def flops(name, arrays, out):
    """Of one call: 2 for each weight that a row meets, 4 D for each query and key that it sees, else 1 an element."""
    if name == "linear":
        return 2 * arrays[0].size * arrays[1].shape[1]
    if name == "attention":
        (B, H, T, D), S = arrays[0].shape, arrays[1].shape[2]
        return 4 * B * H * D * sum(S - T + t + 1 for t in range(T))
    return out.size


def trace(p, cfg, tokens):
    """Run the specification -> [(section, op, shapes in, shape out, parameter names, parameters, FLOPs)]."""
    names = {}
    for layer in [p, *p["layers"]]:
        names |= {x.ctypes.data: name for name, x in layer.items() if isinstance(x, np.ndarray)}
    rows, tables = [], (vars(tinygpt), tinygpt.NORMS, tinygpt.ACTIVATIONS)

    def recorded(name, function):
        section = section_of(function)

        def call(*arguments):
            result = function(*arguments)
            arrays = [x for x in arguments if isinstance(x, np.ndarray)]
            used = [x for x in arrays if x.ctypes.data in names]
            shapes = [x.shape for x in arrays if x.ctypes.data not in names]
            out = result[0]
            used_names = [names[x.ctypes.data] for x in used]
            size, work = sum(x.size for x in used), flops(name, arrays, out)
            rows.append((section, name, shapes, out.shape, used_names, size, work))
            return result

        return call

    kept = [dict(table) for table in tables]
    try:
        for name in EQUATIONS:
            function = getattr(tinygpt, name + "_forward")
            wrapped = recorded(name, function)
            setattr(tinygpt, name + "_forward", wrapped)
            for table in tables[1:]:
                for key, (forward, backward) in list(table.items()):
                    if forward is function:
                        table[key] = (wrapped, backward)
        x, _ = tinygpt.forward(p, tokens, cfg, tinygpt.OPS["numpy"])
        tinygpt.head_logits(x.reshape(-1, cfg.width), p, cfg)
    finally:
        for table, before in zip(tables, kept):
            table.update(before)
    head = "embed_w" if cfg.tied else "head_w"
    N, V = tokens.size, cfg.vocab_size
    work = 2 * N * cfg.width * V
    rows.append(("3", "head", [(N, cfg.width)], (N, V), [head], p[head].size, work))
    return rows


# == 2  command line ===================================================================================================


def main(argv=None):
    parser = argparse.ArgumentParser(prog="explain.py", description="What a model does, op by op.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("trace", help="one line for each op of the forward")
    command.add_argument("text", help="what the model reads")
    command.add_argument("--size", default="1m", help="a size with fresh parameters, reading bytes (default 1m)")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="changes to it")
    command.add_argument("--checkpoint", type=Path, metavar="FILE", help="a trained model instead, with its tokenizer")
    args = parser.parse_args(argv)
    try:
        if args.checkpoint:
            checkpoint = tinygpt.load_checkpoint(args.checkpoint)
            cfg, flat = checkpoint.cfg, checkpoint.parameters
            tokenizer = bpe.Tokenizer.from_json(checkpoint.tokenizer)
        elif args.size not in tinygpt.SIZES:
            raise ValueError(f"--size {args.size}: expected one of {', '.join(tinygpt.SIZES)}")
        else:
            cfg = tinygpt.SIZES[args.size].changed(**tinygpt.overrides(args.set))
            flat, tokenizer = tinygpt.init_parameters(cfg, 0), bpe.Tokenizer.from_merges([])
        ids = [tokenizer.end, *tokenizer.encode(args.text)][: cfg.seq_len]
        rows = trace(tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), cfg, np.array([ids]))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(ids)} tokens {ids}; {tinygpt.count_parameters(cfg)[0]:,} parameters in all")
    print(f"{'section':8}{'op':11}{'in':45}{'out':18}{'parameters':18}{'number':>11}{'FLOP':>14}  equation")
    for section, op, shapes, out, names, size, work in rows:
        inputs, used, equation = (
            " ".join(map(str, shapes)),
            " ".join(names),
            EQUATIONS.get(op, "logits = norm(x) w^T + b"),
        )
        print(f"{section:8}{op:11}{inputs:45}{out!s:18}{used:18}{size:11,}{work:14,}  {equation}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
