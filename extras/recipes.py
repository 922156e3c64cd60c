"""How the authors of each size trained it, for `train.py --recipe published`; the table of `train.py --list-sizes`."""

from dataclasses import fields

import bpe
import tinygpt
import train
from extras import plan

STORYLLAMAS = dict(tokens=2**16, steps=100_000, lr=1e-3, warmup_steps=0.01, weight_decay=0.01)
LILLM = dict(tokens=2**19, lr=6e-4, warmup_steps=2000, weight_decay=0.01)
LLAMA2C = dict(tokens=2**17, steps=100_000, lr=5e-4, min_lr=0.0, warmup_steps=1000)
NEO = dict(tokens=2**9 * 80 * 16, lr=5e-4, schedule="constant", warmup_steps=0)
GRAPHCORE = dict(tokens=2**16, steps=20_000, lr=3e-4, schedule="linear", min_lr=0.0, warmup_steps=0, weight_decay=0.01)
RECIPES = {  # of sizes whose name begins like this; `tokens` an update; unsaid: those of train.Settings, beta2 0.95
    "2m": STORYLLAMAS,
    "7m": STORYLLAMAS,
    "30m": STORYLLAMAS | dict(tokens=2**17, steps=50_000, lr=8e-4, weight_decay=0.05),
    "88m": dict(tokens=2**19, steps=10_000, lr=6e-4, warmup_steps=700, dropout=0.1),
    "39m": LILLM,
    "300m": LILLM,
    "gpt-tinystories-28m": dict(lr=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.0),
    "gpt-tinystories": dict(lr=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.0),
    "graphcore": GRAPHCORE | dict(beta2=0.999, grad_clip=0.0),
    **dict.fromkeys(("260k", "15m", "42m", "110m"), LLAMA2C),
    "tinystories": NEO,
}


def published_recipe(size, cfg):
    """Size, Config -> its authors' settings, fields of `train.Settings`; some have no `steps`. ValueError if none were
    published."""
    recipe = next((recipe for start, recipe in RECIPES.items() if size.startswith(start)), None)
    if recipe is None:
        raise ValueError(f"no recipe was published for --size {size}; leave out --recipe published")
    found = {"beta2": 0.95} | recipe
    tokens = found.pop("tokens", None)
    return found | ({"batch_size": max(1, tokens // cfg.seq_len)} if tokens else {})


SOURCES = {  # of a size whose name begins like this
    "graphcore": "Graphcore's TinyStories notebook",
    "gpt-tinystories": "gpt-tinystories",
    "tinystories": "Eldan & Li 2023, arXiv:2305.07759 (GPT-Neo)",
    "gpt2": "Radford et al. 2019",
    **dict.fromkeys(("2m", "7m", "30m"), "StoryLlamas"),
    **dict.fromkeys(("39m", "300m"), "lilLM"),
    "88m": "StoryLlama",
    **dict.fromkeys(("260k", "15m", "42m", "110m"), "llama2.c"),
    "17m-cs336": "Stanford CS336, assignment 1",
}


def source_of(size):
    """Who built it."""
    return next((source for start, source in SOURCES.items() if size.startswith(start)), "this project")


def list_sizes():
    """Print every size: parameters, cost, memory of a training process, source; then the fields that --set changes."""
    bpe.say(f"{'size':20} {'parameters':>12} {'no embedding':>13} {'MFLOP/token':>12} {'MiB':>7}  from")
    for size, cfg in tinygpt.SIZES.items():
        total, _, inner = tinygpt.count_parameters(cfg)
        flops, memory = tinygpt.flops_per_token(cfg) / 1e6, "-"
        if tinygpt.find_ops().name == "fast":  # the memory of other tables is not planned
            micro_batch_size = train.usual_micro_batch(train.Settings.batch_size, cfg.seq_len)
            memory = f"{plan.memory_needed(cfg, micro_batch_size) / 2**20:,.0f}"
        bpe.say(f"{size:20} {total:12,} {inner:13,} {flops:12,.1f} {memory:>7}  {source_of(size)}")
    bpe.say("\n--set takes, for any size:")
    for field in fields(tinygpt.Config):
        choices = tinygpt.CHOICES.get(field.name)
        bpe.say(f"  {field.name}={'|'.join(choices) if choices else field.type.__name__}")
