"""Every gradient of a model against finite differences, under every table of ops.

    python tinygpt.py check --size 1m --set norm=rmsnorm

Central differences, (f(x + h) - f(x - h)) / 2h, in float64. tinygpt.py finds this file when it is run.
"""

import argparse
import dataclasses
import importlib.util
import math

import numpy as np

import tinygpt


def gradient_error(analytic, numeric):
    """The largest |a - n| / (max(|a|, |n|) + 0.01): below 1e-6 where |a - n| < 1e-8 + 1e-6 max(|a|, |n|)."""
    size = np.maximum(np.abs(analytic), np.abs(numeric))
    return float((np.abs(analytic - numeric) / (size + 0.01)).max())


def check_model(cfg, ops, seed=0, B=2, h=1e-5):
    """[(tensor, relative error)]: for each parameter tensor, the gradient of the whole model in float64 along a random
    direction against the central difference along it."""
    rng = np.random.default_rng(seed)
    flat = tinygpt.init_parameters(cfg, seed, np.float64)
    flat += 0.2 * rng.standard_normal(flat.shape)  # biases and gains away from 0 and 1
    p, (gradient, grads) = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), tinygpt.zero_gradients(cfg, np.float64)
    tokens = rng.integers(0, cfg.vocab_size, (B, cfg.seq_len + 1))
    weights, dropout = rng.uniform(0.5, 1.5, (B, cfg.seq_len)), tinygpt.Dropout(seed, 0, 0)

    def loss(g=None):
        return tinygpt.loss_and_gradients(p, tokens[:, :-1], tokens[:, 1:], weights, g, cfg, ops, dropout=dropout)[0]

    loss(grads)
    tinygpt.add_lookup_gradient(grads)
    errors = []
    for t in tinygpt.layout(cfg):
        place = slice(t.offset, t.offset + math.prod(t.shape))
        kept, slopes = flat[place].copy(), []
        direction = rng.standard_normal(kept.size)
        direction /= np.linalg.norm(direction)
        for step in (h, -h):
            flat[place] = kept + step * direction
            slopes.append(loss() / (2 * step))
        flat[place] = kept
        errors.append((t.name, gradient_error(gradient[place] @ direction, sum(slopes))))
    return errors


def scaled_down(cfg):
    """The same architecture with axes short enough for finite differences, of as many lengths as it allows."""
    G = 1 if cfg.kv_heads == 1 else 2 if cfg.heads & (cfg.heads - 1) == 0 else 3  # 3: ALiBi at no power of two
    H, D = G * (cfg.heads // cfg.kv_heads), 4
    C = H * D + (0 if cfg.heads * cfg.head_width == cfg.width else 4)
    shape = dict(vocab_size=11, seq_len=5, width=C, layers=2, heads=H, kv_heads=G, head_width=D, hidden=7)
    return dataclasses.replace(cfg, **shape, position_rows=6, window=2 if cfg.window else 0)


def main(argv=None):
    here = [name for name in reversed(tinygpt.KERNELS) if name in tinygpt.OPS or importlib.util.find_spec(name)]
    parser = argparse.ArgumentParser(description="Prove the model's gradients.")
    add = parser.add_argument
    add("command", choices=["check"], help="every gradient of the model against finite differences, in float64")
    add("--size", default="1m", metavar="SIZE", help="of which architecture (default %(default)s), scaled down")
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="and these changes")
    add("--kernels", nargs="+", choices=tinygpt.KERNELS, default=here, help="of these (default all)")
    add("--seed", type=int, default=0, help="of the random parameters, tokens and directions")
    args, limit = parser.parse_args(argv), 1e-6
    try:
        cfg = scaled_down(tinygpt.find_size(args.size)).changed(**tinygpt.overrides(args.set))
        tables = {name: tinygpt.find_ops(name) for name in args.kernels}
        if "fast" in tables:
            from fast import BFLOAT16

            tables["fast-bf16"] = BFLOAT16  # its driver takes float64 on every machine
        errors = {name: dict(check_model(cfg, ops, args.seed)) for name, ops in tables.items()}
    except ValueError as error:
        parser.error(str(error))
    print(f"relative error of each gradient in float64, limit {limit:.0e}; {cfg}")
    print(f"{'tensor':12s}" + "".join(f"{name:>12s}" for name in errors))
    for t in tinygpt.layout(cfg):
        print(f"{t.name:12s}" + "".join(f"{table[t.name]:12.1e}" for table in errors.values()))
    worst = max(max(table.values()) for table in errors.values())
    print(f"worst {worst:.1e}: {'passed' if worst < limit else 'FAILED'}")
    return 0 if worst < limit else 1
