"""Training speed beside what a user would pick instead: the same model, the same step, in PyTorch.

    pip install torch && python benchmarks/train_speed.py            # every shape, PyTorch eager
    python benchmarks/train_speed.py --size 128x4 --modes eager compile bf16 compile-bf16 --rounds 5
    python benchmarks/train_speed.py --size 128x4 1m                 # any size of ours; beside PyTorch only the shapes
    python benchmarks/train_speed.py --avx2 --cold                   # both sides as on a laptop without AVX-512
    python benchmarks/train_speed.py --profile --size 8m             # kernel by kernel: time, GFLOP/s, GB/s

A step is forward, backward, clipping and AdamW on random tokens of a GPT-2 shape, WIDTHxLAYERS (weights tied, tanh
GELU, no dropout), or of one of our sizes.
Ours and theirs take turns in one run, so that a machine whose speed drifts treats both alike; medians and their ratio.
Our products are in bf16 where the processor multiplies it faster, as train.py's are; --dtype float32 goes without. Each
side runs in a process of its own, whose threads sleep while the other one's turn lasts. "Of peak" is the share of a
float32 product by NumPy's BLAS, "of bf16" that of the instruction on packed operands, both measured in our turns.
First: seconds from the start of the process to its first step.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPES = {  # GPT-2's architecture: V, T, C, L, H; and sequences per update
    "64x8": ((4096, 256, 64, 8, 4), 32),
    "128x4": ((4096, 256, 128, 4, 4), 32),
    "256x8": ((4096, 512, 256, 8, 8), 8),
    "512x8": ((4096, 512, 512, 8, 8), 4),
}
AVX2 = {  # what each side listens to, to take the processor for one without AVX-512
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
MODES = ("eager", "compile", "bf16", "compile-bf16")  # of PyTorch
TABLES = ("fast", "numba", "numpy")  # of ours


def shape_of(size):
    """(Config, sequences per update)."""
    import tinygpt

    if size in SHAPES:
        return tinygpt.Config(*SHAPES[size][0]), SHAPES[size][1]
    cfg = tinygpt.find_size(size)
    return cfg, max(1, 8192 // cfg.seq_len)


# == 1  ours ===========================================================================================================


def our_step(size, threads, dtype, kernels):
    """A function that takes one step on this table, products in `dtype`, and the number of parameters."""
    import tinygpt
    import train

    (cfg, batch), ops = shape_of(size), tinygpt.find_ops(kernels, dtype if kernels == "fast" else "float32")
    if threads:
        tinygpt.set_threads(threads)
    micro = train.usual_micro_batch(batch, cfg.seq_len)
    s = train.Settings(batch_size=batch, micro_batch_size=micro, lr=1e-3, min_lr=1e-4, steps=10**6, beta2=0.95)
    state = train.State(cfg, tinygpt.init_parameters(cfg, 0))
    ops = tinygpt.with_buffers(ops, cfg, micro, cfg.seq_len)
    rng, weights = np.random.default_rng(0), np.ones((batch, cfg.seq_len), np.float32)

    def step():
        tokens = rng.integers(0, cfg.vocab_size, (batch, cfg.seq_len + 1))
        train.update(state, (tokens[:, :-1], tokens[:, 1:], weights), ops, s)

    return step, tinygpt.count_parameters(cfg)[0]


# == 2  theirs =========================================================================================================


def their_step(size, mode, threads):
    """The same in PyTorch: eager or compiled, float32 or bf16 autocast."""
    import torch
    from torch import nn
    from torch.nn import functional

    cfg, batch = shape_of(size)
    C, T, H = cfg.width, cfg.seq_len, cfg.heads
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.up, self.down = nn.Linear(C, cfg.hidden), nn.Linear(cfg.hidden, C)

        def forward(self, x):
            q, k, v = self.qkv(self.norm1(x)).view(-1, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
            o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(o.transpose(1, 2).reshape(x.shape))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.position = nn.Embedding(cfg.vocab_size, C), nn.Embedding(T, C)
            self.layers, self.norm = nn.Sequential(*(Layer() for _ in range(cfg.layers))), nn.LayerNorm(C)

        def forward(self, tokens, targets):
            x = self.norm(self.layers(self.embed(tokens) + self.position.weight))
            logits = x @ self.embed.weight.T
            return functional.cross_entropy(logits.view(-1, cfg.vocab_size).float(), targets.reshape(-1))

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    call = torch.compile(model) if "compile" in mode else model

    def step():
        tokens = torch.randint(0, cfg.vocab_size, (batch, T + 1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled="bf16" in mode):
            loss = call(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in model.parameters())


# == 3  side by side ===================================================================================================


def serve(side, size, threads, dtype, kernels):
    """The worker: a line in, `steps` steps, a line out with the seconds of each, the peak memory in MiB and, from ours,
    the machine's GFLOP/s."""
    if side in MODES:
        step, parameters = their_step(size, side, threads)
    else:
        step, parameters = our_step(size, threads, dtype, kernels if side == "ours" else side)
    step()
    print(json.dumps({"parameters": parameters}), flush=True)
    step()
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        answer = {"times": times, "memory": peak_memory()}
        if side == "ours":
            from extras import plan

            answer["peak"] = plan.measure_peak() / 1e9
            answer["bf16_peak"] = bf16_peak() if dtype == "bfloat16" else math.inf
        print(json.dumps(answer), flush=True)


def bf16_peak():
    """GFLOP/s of the innermost block that multiplies bf16 here, of 32 x 32 sums of depth 2,048 on all threads: the best
    of ten rounds."""
    from concurrent.futures import ThreadPoolExecutor

    from fast import POOL, bf16
    from tinygpt import aligned

    block, steps, best = bf16.innermost(bf16.find_bf16()[0]), 64, math.inf
    enter, multiply, leave = (function and function.ctypes for function in block)
    places = [aligned(4 * steps * 256 + 1024 + 16, np.float32) for _ in range(POOL.threads)]

    def work(place):
        tiles, c = [place.ctypes.data + 64 + 1024 * steps * i for i in range(4)], place.ctypes.data + 64 + 4096 * steps
        place[:16].view(np.uint8)[:] = bf16.shapes_of_tiles()
        if enter:
            enter(place.ctypes.data)
        for _ in range(100):
            multiply(*tiles, c, 128, steps, 0)
        if leave:
            leave(place.ctypes.data)

    with ThreadPoolExecutor(POOL.threads) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(work, places))
            best = min(best, time.perf_counter() - start)
    return POOL.threads * 100 * 2 * 32 * 32 * 32 * steps / best / 1e9


def processor():
    """Its name and cores, as Linux tells it, else what Python knows."""
    try:
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if "model name" in line]
    except OSError:
        names = [platform.processor() or platform.machine()]
    return f"{names[0]}, {os.cpu_count()} cores"


def peak_memory():
    """Of this process, in MiB; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


class Side:
    """One side in a process of its own."""

    def __init__(self, name, size, threads, dtype, kernels, environment):
        words = [sys.executable, __file__, "--serve", name, "--size", size, "--threads", str(threads), "--dtype", dtype]
        words += ["--kernels", kernels]
        pipes, start = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True), time.perf_counter()
        self.process = subprocess.Popen(words, **pipes, env=os.environ | environment)
        self.times, self.peaks, self.bf16_peaks, first = [], [], [], self.process.stdout.readline()
        self.first = time.perf_counter() - start
        if not first:
            raise SystemExit(f"train_speed.py: {name} did not start; PyTorch is needed: pip install torch")
        self.parameters = json.loads(first)["parameters"]

    def turn(self, steps):
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.times += answer["times"]
        self.memory = answer["memory"]
        self.peaks += [answer["peak"]] if "peak" in answer else []
        self.bf16_peaks += [answer["bf16_peak"]] if "bf16_peak" in answer else []

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(size, modes, rounds, threads, dtype, kernels, environment):
    from extras import plan

    (cfg, batch), modes = shape_of(size), [mode for mode in modes if mode in TABLES or size in SHAPES]
    tokens, flops = batch * cfg.seq_len, plan.flops_per_token(cfg)
    sides = {name: Side(name, size, threads, dtype, kernels, environment) for name in ("ours", *modes)}
    for side in sides.values():
        side.turn(1)
        side.times.clear()
    for _ in range(rounds):
        for side in sides.values():
            side.turn(max(1, math.ceil(2e11 / (flops * tokens))))
    speeds = {name: tokens / statistics.median(side.times) for name, side in sides.items()}
    ours, gflops = sides["ours"], speeds["ours"] * flops / 1e9
    shares = [f"{gflops / peak:7.0%}" for peak in (statistics.median(ours.peaks), max(ours.bf16_peaks))]
    cells = [f"{size:>14s}", f"{ours.parameters / 1e6:6.2f}M", f"{speeds['ours']:9,.0f}", f"{gflops:7.0f}", *shares]
    cells += [f"{speeds[mode]:9,.0f} {speeds['ours'] / speeds[mode]:5.2f}x" for mode in modes]
    for what, form in (("memory", "7,.0f"), ("first", "7.1f")):
        cells += [f"{getattr(ours, what):{form}}"]
        cells += [f"{min(getattr(sides[mode], what) for mode in modes):{form}}"] if modes else []
    for side in sides.values():
        side.close()
    return " | ".join(cells)


# == 4  profile ========================================================================================================


def causal(T):
    """Pairs of a query and a key that it sees."""
    return T * (T + 1) // 2


FLOPS = {  # of a kernel's matrix products, 2 a multiply-add, from its number of tasks and its arguments
    "qkv_kernel": lambda tasks, x, norm, linear, *_: 2 * len(x) * linear[0].size,
    "attention_kernel": lambda tasks, qkv, *_: 4 * tasks * qkv.shape[3] * causal(qkv.shape[1]),
    "linear_residual_kernel": lambda tasks, x, o, linear, *_: 2 * len(x) * linear[0].size,
    "mlp_kernel": lambda tasks, x, norm, mlp, *_: 2 * len(x) * (mlp[1].size + mlp[3].size),
    "head_kernel": lambda tasks, earlier, x, norm, head, *_: 4 * rows_of_head(tasks, earlier, x) * head[0].size,
    "head_gradient_kernel": lambda tasks, at_once, earlier, count, T, exp_logits, row_scale, n, dw, *_: (
        2 * min(count * exp_logits.shape[2], len(n) - earlier * exp_logits.shape[2]) * dw.size
    ),
    "weight_gradient_kernel": lambda tasks, shape, block_range, x_T, T, dy, dw, *_: 2 * len(dy) * dw.size,
    "packed_gradient_kernel": lambda tasks, shape, block_range, first, T, x_T, packed, dw, *_: (
        2 * len(packed) * T / math.ceil(T / x_T.shape[2]) * dw.size
    ),
    "linear_backward_kernel": lambda tasks, dy, panels, *_: 2 * len(dy) * panels.size,
    "attention_backward_kernel": lambda tasks, qkv, saved, scores, mask, place, do, *_: (
        10 * do.size // do.shape[1] * causal(do.shape[1])
    ),
    "linear_norm_backward_kernel": lambda tasks, dy, dlinear, panels, *_: 2 * len(dy) * panels.size,
    "mlp_backward_kernel": lambda tasks, dy, h, activation, down_T, *_: 2 * len(dy) * down_T.size,
}


def rows_of_head(tasks, earlier, x, *_):
    from fast.workspace import HEAD_BLOCK

    return min(tasks * HEAD_BLOCK, len(x) - earlier * HEAD_BLOCK)


def arrays_in(args):
    """The arrays among the arguments of a kernel, which may be tuples."""
    for x in args:
        if isinstance(x, tuple):
            yield from arrays_in(x)
        elif isinstance(x, np.ndarray):
            yield x


def bytes_of(name, tasks, args):
    """Of the arrays that a launch gets: what it reads or writes at least once, without the threads' scratch."""
    import fast

    arrays = [x for x in arrays_in(args) if not (x.ndim == 2 and len(x) == fast.POOL.threads)]
    share = rows_of_head(tasks, *args) / len(args[1]) if name == "head_kernel" else 1
    return sum(x.nbytes * (share if name == "head_kernel" and len(x) == len(args[1]) else 1) for x in arrays)


def profile(size, threads, dtype, steps):
    """Print what each kernel of a training step takes: medians of the sums over a step."""
    import fast
    from extras import plan

    step, _ = our_step(size, threads, dtype, "fast")
    run, calls, rows = fast.POOL.run, [], []

    def timed(kernel, tasks, *args):
        start = time.perf_counter()
        run(kernel, tasks, *args)
        calls.append((kernel.__name__, time.perf_counter() - start, tasks, args))

    step()
    fast.POOL.run = timed
    for _ in range(steps):
        calls.clear()
        start = time.perf_counter()
        step()
        sums = {"all": [time.perf_counter() - start, 0, 0, 0]}
        for name, seconds, tasks, args in calls:
            cells = (seconds, 1, FLOPS.get(name, lambda *_: 0)(tasks, *args), bytes_of(name, tasks, args))
            sums[name] = [a + b for a, b in zip(sums.get(name, [0] * 4), cells)]
        rows.append(sums)
    fast.POOL.run, peak = run, plan.measure_peak() / 1e9
    whole = statistics.median(row["all"][0] for row in rows)
    print(f"{size}: {whole * 1e3:.1f} ms a step; peak of a product of {peak:.0f} GFLOP/s, measured now")
    print(f"{'kernel':30s} | calls |      ms | share | GFLOP/s | of peak | GB/s")
    median = {name: statistics.median(row[name][0] for row in rows) for name in rows[0]}
    median["Python and launches between"] = whole - sum(median.values()) + whole
    for name in sorted(median, key=median.get, reverse=True):
        (_, count, flops, size_), seconds = rows[0].get(name, [0] * 4), median[name]
        if name == "all":
            flops = sum(row[2] for row in rows[0].values())
        rate = f"{flops / seconds / 1e9:7.0f} | {flops / seconds / 1e9 / peak:7.0%}" if flops else f"{'':7s} | {'':7s}"
        share, speed = f"{seconds / whole:5.1%}", f"{size_ / seconds / 1e9:4.0f}" if size_ else ""
        print(f"{name:30s} | {count or '':5} | {seconds * 1e3:7.2f} | {share:>5s} | {rate} | {speed}")


# == 5  command line ===================================================================================================


def main():
    import fast
    import tinygpt

    parser = argparse.ArgumentParser(description="Tokens per second of a training step, ours beside PyTorch's.")
    parser.add_argument("--size", nargs="+", metavar="SIZE", default=list(SHAPES), help="to measure")
    parser.add_argument(
        "--modes",
        nargs="*",
        choices=MODES + TABLES,
        default=["eager"],
        help="what ours is compared with: ways to run PyTorch, other tables of ours; none: ours alone",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of each side; 0 is all cores (default)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of our products, as train.py has it"
    )
    parser.add_argument("--kernels", choices=TABLES, default="fast", help="our table (default %(default)s)")
    parser.add_argument("--avx2", action="store_true", help="both sides without AVX-512")
    parser.add_argument(
        "--cold", action="store_true", help="empty compile caches: the first step then says what they save"
    )
    parser.add_argument("--profile", action="store_true", help="ours alone, kernel by kernel")
    parser.add_argument("--serve", metavar="SIDE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [size for size in args.size if size not in {*SHAPES, *tinygpt.find_sizes()}]:
        parser.error(f"--size {unknown[0]}: expected one of {', '.join([*SHAPES, *tinygpt.find_sizes()])}")
    if args.serve:
        return serve(args.serve, args.size[0], args.threads, args.dtype, args.kernels)
    reason = "--avx2" if args.avx2 else fast.find_bf16()[1]
    if args.dtype == "bfloat16" and reason:
        parser.error(f"--dtype bfloat16: {reason}")
    if args.dtype == "auto":
        args.dtype = "float32" if reason else "bfloat16"
    if args.profile and args.avx2 and os.environ.get("NUMBA_CPU_NAME") != AVX2["NUMBA_CPU_NAME"]:
        return subprocess.run([sys.executable, *sys.argv], env=os.environ | AVX2).returncode  # read at the start only
    dtype = args.dtype if args.kernels == "fast" else "float32"
    by = f" by {fast.bf16.INSTRUCTIONS[fast.find_bf16()[0]]}" if dtype == "bfloat16" else ""
    print(f"{args.kernels} kernels, products in {dtype}{by}; {processor()}", flush=True)
    if args.profile:
        for size in args.size:
            profile(size, args.threads, args.dtype, 4 * args.rounds)
        return None
    theirs = [f"{mode:>9s} ratio " for mode in args.modes]
    least = ("MiB ours", " theirs", "  first", " theirs") if args.modes else ("MiB ours", "  first")
    print(
        " | ".join(["          size", " params", "     ours", "GFLOP/s", "of peak", "of bf16", *theirs, *least]),
        flush=True,
    )
    for size in args.size:
        with tempfile.TemporaryDirectory() as empty:
            caches = {"NUMBA_CACHE_DIR": empty, "TORCHINDUCTOR_CACHE_DIR": empty} if args.cold else {}
            environment = (AVX2 if args.avx2 else {}) | caches
            print(
                measure(size, args.modes, args.rounds, args.threads, args.dtype, args.kernels, environment), flush=True
            )
    return None


if __name__ == "__main__":
    sys.exit(main())
