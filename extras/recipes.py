"""The sizes that others built: their architectures, how their authors trained them, and who they are.

    python train.py --size 15m --recipe published
    python train.py --list-sizes

`find_size` of tinygpt.py finds these sizes beside its own.
"""

from dataclasses import fields

import bpe
import tinygpt
from tinygpt import Config

# == 1  architectures ==================================================================================================

LLAMA = dict(norm="rmsnorm", positions="rope", mlp="swiglu")
LLAMA |= dict.fromkeys(("qkv_bias", "out_bias", "up_bias", "down_bias"), False)
STORYLLAMAS = LLAMA | dict(vocab_size=4096, seq_len=256, up_bias=True, down_bias=True, init="gpt2")
LILLM = LLAMA | dict(vocab_size=8192, seq_len=512, heads=16, kv_heads=8, norm_eps=1e-6, init="lillm")
LLAMA2C = LLAMA | dict(vocab_size=32000, init="gpt2")
GPT_TINYSTORIES = dict(vocab_size=50257, seq_len=256, layers=8, heads=16, position_rows=2048, attention_scale=False)
GPT_TINYSTORIES |= dict(mlp="gelu", init="normal")
NEO = dict(vocab_size=50257, seq_len=512, heads=16, position_rows=2048, attention_scale=False, window=256)
NEO |= dict(qkv_bias=False, init="normal")
GRAPHCORE = dict(vocab_size=8192, seq_len=512, head_width=64, embedding_norm=True, positions="alibi", mlp="gelu")
GRAPHCORE |= dict(tied=False, head_bias=True, init="torch")

RECORD = dict(vocab_size=4096, seq_len=256, positions="rope", qk_norm=True, embedding_norm=True)

SIZES = {  # names are what their authors call them, often the rounded total of the parameters, sometimes not
    "1m-record": Config(**RECORD, width=128, layers=4, heads=4),  # ours that learns fastest: docs/records.md
    "2m": Config(**STORYLLAMAS, width=128, layers=4, heads=4, hidden=512),
    "7m": Config(**STORYLLAMAS, width=256, layers=6, heads=6, head_width=42, hidden=768),
    "30m": Config(**STORYLLAMAS, width=512, layers=8, heads=8, hidden=1536),
    "39m": Config(**LILLM, width=512, layers=12, hidden=1408),
    "300m": Config(**LILLM, width=1024, layers=24, hidden=2816),
    # Its attention ends in two products without anything between them: here their product, one matrix, and a final norm
    # that its code leaves out. With both stages it has 63,558,784 parameters; "88m" counts the tied matrix twice.
    "88m": Config(
        **LLAMA, vocab_size=50304, seq_len=512, width=512, layers=8, heads=8, kv_heads=4, head_width=128, hidden=1365,
        head_bias=True,
    ),
    "260k": Config(**LLAMA2C | dict(vocab_size=512), seq_len=512, width=64, layers=5, heads=8, kv_heads=4, hidden=172),
    "15m": Config(**LLAMA2C, seq_len=256, width=288, layers=6, heads=6, hidden=768),
    "42m": Config(**LLAMA2C, seq_len=1024, width=512, layers=8, heads=8, hidden=1376),
    "110m": Config(**LLAMA2C, seq_len=1024, width=768, layers=12, heads=12, hidden=2048),
    "17m-cs336": Config(**LLAMA, vocab_size=10000, seq_len=256, width=512, layers=4, heads=16, hidden=1344, tied=False),
    "gpt-tinystories-1m": Config(**GPT_TINYSTORIES, width=64),
    "gpt-tinystories-8m": Config(**GPT_TINYSTORIES, width=256),
    "gpt-tinystories-28m": Config(**GPT_TINYSTORIES, width=1024),
    "tinystories-1m": Config(**NEO, width=64, layers=8),
    "tinystories-8m": Config(**NEO, width=256, layers=8),
    "tinystories-28m": Config(**NEO, width=512, layers=8),
    "tinystories-33m": Config(**NEO, width=768, layers=4),
    "gpt2": Config(vocab_size=50257, seq_len=1024, width=768, layers=12, heads=12, init="gpt2"),
} | {
    f"graphcore-{width}x{layers}": Config(**GRAPHCORE, width=width, layers=layers, heads=width // 64)
    for width in (64, 128, 256, 512, 768, 1024)
    for layers in (1, 2, 4, 8, 12)
}  # fmt: skip

# == 2  how they were trained ==========================================================================================

STORYLLAMAS_RECIPE = dict(tokens=2**16, steps=100_000, lr=1e-3, warmup_steps=0.01, weight_decay=0.01)
RECIPES = {  # of sizes whose name begins like this; `tokens` an update; unsaid: those of train.Settings, beta2 0.95
    **dict.fromkeys(("2m", "7m"), STORYLLAMAS_RECIPE),
    "30m": STORYLLAMAS_RECIPE | dict(tokens=2**17, steps=50_000, lr=8e-4, weight_decay=0.05),
    "88m": dict(tokens=2**19, steps=10_000, lr=6e-4, warmup_steps=700, dropout=0.1),
    **dict.fromkeys(("39m", "300m"), dict(tokens=2**19, lr=6e-4, warmup_steps=2000, weight_decay=0.01)),
    "gpt-tinystories-28m": dict(lr=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.0),
    "gpt-tinystories": dict(lr=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.0),
    "graphcore": dict(
        tokens=2**16, steps=20_000, lr=3e-4, schedule="linear", min_lr=0.0, warmup_steps=0, weight_decay=0.01,
        beta2=0.999, grad_clip=0.0,
    ),
    **dict.fromkeys(
        ("260k", "15m", "42m", "110m"), dict(tokens=2**17, steps=100_000, lr=5e-4, min_lr=0.0, warmup_steps=1000)
    ),
    "tinystories": dict(tokens=2**9 * 80 * 16, lr=5e-4, schedule="constant", warmup_steps=0),
}  # fmt: skip


def published_recipe(size, cfg):
    """Size, Config -> its authors' settings, fields of `train.Settings`; some have no `steps`. ValueError if none were
    published."""
    recipe = next((recipe for start, recipe in RECIPES.items() if size.startswith(start)), None)
    if recipe is None:
        raise ValueError(f"no recipe was published for --size {size}; leave out --recipe published")
    found = {"beta2": 0.95} | recipe
    tokens = found.pop("tokens", None)
    return found | ({"batch_size": max(1, tokens // cfg.seq_len)} if tokens else {})


# == 3  who built them, and the list of all ============================================================================

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
    import train
    from extras import plan

    bpe.say(f"{'size':20} {'parameters':>12} {'no embedding':>13} {'MFLOP/token':>12} {'MiB':>7}  from")
    for size, cfg in tinygpt.find_sizes().items():
        total, _, inner = tinygpt.count_parameters(cfg)
        flops, memory = plan.flops_per_token(cfg) / 1e6, "-"
        if tinygpt.find_ops().name == "fast":  # the memory of other tables is not planned
            micro_batch_size = train.usual_micro_batch(train.Settings.batch_size, cfg.seq_len)
            memory = f"{plan.memory_needed(cfg, micro_batch_size) / 2**20:,.0f}"
        bpe.say(f"{size:20} {total:12,} {inner:13,} {flops:12,.1f} {memory:>7}  {source_of(size)}")
    bpe.say("\n--set takes, for any size:")
    for field in fields(Config):
        choices = tinygpt.CHOICES.get(field.name)
        bpe.say(f"  {field.name}={'|'.join(choices) if choices else field.type.__name__}")
