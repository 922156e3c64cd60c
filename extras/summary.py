"""What train.py prints about a run before its first update, and the command that makes the same run again."""

import math
from dataclasses import asdict, fields

import numpy as np

import bpe
import tinygpt
import train
from extras import plan


def describe(run):
    """Print the first lines: what will be trained, on what, how. Measures `run.peak`."""
    cfg, s, data, folder, processes = run.state.cfg, run.settings, run.data, run.folder, run.processes
    total, _, inner = tinygpt.count_parameters(cfg)
    basic = ["vocab_size", "seq_len", "width", "layers", "heads", "hidden"]
    basic += ["head_width"] if cfg.heads * cfg.head_width != cfg.width else []
    shape = (cfg.vocab_size, cfg.seq_len, cfg.width, cfg.layers, cfg.heads)
    plain = asdict(tinygpt.Config(*shape, head_width=cfg.head_width))
    shown = {name: value for name, value in asdict(cfg).items() if name in basic or value != plain[name]}
    begun = f"begun with {s.init_from}: " if s.init_from else ""
    held_out = "" if s.files[1] else f" ({describe_held_out(data)})"
    tokens = s.steps * s.batch_size * cfg.seq_len
    micro_batch_size, memory = math.gcd(s.batch_size // processes, s.micro_batch_size), ""
    if s.kernels == "fast":
        memory = f", about {plan.memory_needed(cfg, micro_batch_size, s.recompute) / 2**20:,.0f} MiB of memory"
    of_ranks = f" of each of {processes} ranks" if processes > 1 else ""
    bpe.note(
        f"model     {s.size}: {total:,} parameters ({inner:,} without embeddings), "
        f"{plan.flops_per_token(cfg) / 1e6:.1f} MFLOP per token trained\n"
        f"          {begun}{', '.join(f'{name} {value}' for name, value in shown.items())}\n"
        f"data      {data.name}: {len(data.train):,} tokens, {len(data.valid):,} for validation{held_out}; "
        f"ln V = {math.log(cfg.vocab_size):.2f}\n"
        f"training  {s.steps:,} updates of {s.batch_size} x {cfg.seq_len} tokens ({tokens:,}: "
        f"{tokens / len(data.train):.2f} epochs), {s.micro_batch_size} sequences at a time"
        f"{', layers recomputed' if s.recompute else ''}\n"
        f"          lr {s.lr:g} to {s.min_lr:g} ({s.schedule}) after {s.warmup_steps} updates of warm-up, "
        f"weight decay {s.weight_decay:g}, betas {s.beta1:g} {s.beta2:g}, clip {s.grad_clip:g}, seed {s.seed}\n"
        f"machine   {s.kernels} kernels, {tinygpt.THREADS.count} threads{memory}{of_ranks}\n"
        f"precision {describe_precision(s)}\n"
        f"run       {folder}"
    )
    cores = processes * tinygpt.THREADS.count / tinygpt.count_cores() if processes > 1 else 1
    run.peak = plan.measure_peak() * cores


def share_and_time_left(run):
    """The end of the line of an update. The first one's time is that of compiling: it has no time left."""
    s, cfg = run.settings, run.state.cfg
    speed = s.batch_size * cfg.seq_len / run.pace
    line = f" | {speed * plan.flops_per_token(cfg) / run.peak:.0%} of NumPy's BLAS"
    left = bpe.clock(plan.seconds_left(s.steps - run.state.step, run.pace))
    return line + (f" | {left} left" if run.state.step - run.first > 1 else "")


def scoring_time(run):
    """How long scoring all validation tokens will take; empty for a process that has made no update."""
    if not run.pace:
        return ""
    speed = run.settings.batch_size * run.state.cfg.seq_len / run.pace / run.processes
    return f", about {bpe.clock(plan.scoring_seconds(len(run.data.valid), speed))}"


def describe_precision(s):
    """What products are made of; where that is float32 although no flag says so, why."""
    if s.dtype == "bfloat16":
        from fast.bf16 import INSTRUCTIONS

        return f"bfloat16 products by {INSTRUCTIONS[s.instruction]}, which this processor has; float32 for all else"
    reason = why_float32("fast") if s.kernels == "fast" and s.flags.get("dtype") != "float32" else None
    return "float32" + (f": {reason}" if reason else "")


def why_float32(kernels):
    """None where products of this table can be bf16, else why they are float32, in a sentence."""
    if kernels != "fast":
        return f"--kernels {kernels} has no others"
    from fast import find_bf16

    return find_bf16()[1]


def describe_held_out(data):
    """What `hold_out` of extras/data.py took from the text, in words."""
    stories = int(np.count_nonzero(data.valid == data.tokenizer.end))
    what = "1 story" if stories == 1 else f"{stories:,} stories"
    if data.masks[1] is not None:
        what = f"in which {int(data.masks[1].sum()):,} count"
    what = what if data.train[-1] == data.tokenizer.end else "cut inside a story"
    return f"the last {len(data.valid) / (len(data.train) + len(data.valid)):.1%}, {what}"


def repeat_command(args, s, cfg, processes=1):
    """The command that makes the run again, to the byte, whatever decided its length and its precision."""
    given = {name: getattr(args, name) for name in ("size", "set", "data", "val_data", "tokenizer", "init_from")}
    given["vocab_size"] = None if args.tokenizer or args.init_from else cfg.vocab_size
    given |= {"seq_len": cfg.seq_len, "steps": s.steps}
    given |= {f.name: getattr(s, f.name) for f in fields(s) if f.metadata and f.name != "recompute"}
    words = []
    for name, value in given.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    words += [*(["--recompute"] if s.recompute else []), *(f"--prompt={prompt}" for prompt in s.prompts)]
    return (f"mpiexec -n {processes} " if processes > 1 else "") + train.command("train.py", *words)
