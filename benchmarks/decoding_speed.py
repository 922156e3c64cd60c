"""Decoding speed of one stream, ours beside llama2.c's and llama.cpp's where they are given: the same weights, greedy.

    python benchmarks/decoding_speed.py                                # ours, random weights
    python benchmarks/decoding_speed.py --llamacpp --size 260k 15m     # pip install xllamacpp
    python benchmarks/decoding_speed.py --llamacpp float32 q8_0 --size 15m gpt2
    python benchmarks/decoding_speed.py --int8 --llamacpp q8_0 --size 8m 28m    # int8 weights beside Q8_0
    python benchmarks/decoding_speed.py --llama2c llama2.c/run --tokenizer llama2.c/tokenizer.bin --size 15m
    python benchmarks/decoding_speed.py --llama2c llama2.c/run --checkpoint stories260K.bin --tokenizer tok512.bin

llama2.c is its `run`, compiled with `gcc -Ofast -march=native -fopenmp run.c -lm -o run`. llama.cpp is the wheel
xllamacpp (its line on stderr names the instructions that it uses), on models that extras/llamacpp.py writes, with keys
and values in float32 as ours; its speed is what it says of itself. All take turns, with each number of threads, so that
a machine whose speed drifts treats all alike; medians. `--int8` adds ours with int8 weights, as `sample.py --quantize
int8` has them: other weights, so another text. MB are the weights that we read for a token (of a large head its 8
bits), GB/s those times tokens a second, their share that of what the same threads read of a long array in the same run.
"""

import argparse
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import fast
import sample
import tinygpt
from extras import llama2c, llamacpp
from fast import decode
from fast.int8 import round_weights

MEMORY = 1 << 28  # bytes of the array that is read: more than caches hold
BLOCKS = 16  # it is read in

# == 1  the machine ====================================================================================================


@fast.kernel
def read_kernel(task, slot, x, per_task, sums):
    """Block number `task` of x, as a product reads its weights."""
    at, zero = x[task * per_task :].ctypes.data, x.dtype.type(0)
    row, one = 64 * x.itemsize, sums[task]
    decode.multiply_panel(one[64:].ctypes.data, per_task // 64, at, row, one.ctypes.data, one.ctypes.data, row, zero)


def bandwidth(x, sums):
    """GB/s of one reading of x."""
    start = time.perf_counter()
    fast.POOL.run(read_kernel, BLOCKS, x, x.size // BLOCKS, sums)
    return x.nbytes / (time.perf_counter() - start) / 1e9


# == 2  ours ===========================================================================================================


def our_model(size, checkpoint):
    """(flat parameters, configuration)."""
    if checkpoint:
        found = llama2c.load(checkpoint)
        return found.parameters, found.cfg
    cfg = tinygpt.find_size(size)
    return tinygpt.init_parameters(cfg, 0), cfg


def our_turn(decoding, first, stop, steps, banned=()):
    """(tokens a second, ids) of a greedy text that begins with the token `first` and ends at `stop`."""
    decoding.window = []
    start = time.perf_counter()
    ids = list(sample.generate(decoding, [first], 0, stop, steps, temperature=0, banned=banned))
    return len(ids) / (time.perf_counter() - start), ids


# == 3  theirs =========================================================================================================


def their_pieces(path, V):
    """The text of each token in llama2.c's tokenizer.bin, as its `run` prints it."""
    data, at, pieces = Path(path).read_bytes(), 4, []
    for _ in range(V):
        (length,) = struct.unpack_from("<i", data, at + 4)
        piece = data[at + 8 : at + 8 + length]
        byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
        pieces.append(bytes([int(byte[1], 16)]) if byte else piece)
        at += 8 + length
    return pieces


def their_turn(run, checkpoint, tokenizer, steps, threads):
    """(tokens a second, text)."""
    words = [run, checkpoint, "-z", tokenizer, "-t", "0", "-n", str(steps)]
    done = subprocess.run(words, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
    return float(re.search(rb"tok/s: ([0-9.]+)", done.stderr)[1]), done.stdout


def same_text(ids, pieces, first, theirs):
    """Whether llama2.c printed these ids; it leaves out bytes that are no text, and so does this."""
    text, before = b"", first
    for i in ids:
        piece = pieces[i][1:] if before == first and pieces[i][:1] == b" " else pieces[i]
        text, before = text + (piece if len(piece) > 1 or piece.isspace() or 32 <= piece[0] < 127 else b""), i
    return text.split() == theirs.split()


# == 4  llama.cpp ======================================================================================================

LETTERS = [bytes([c]) for c in (*range(48, 58), *range(65, 91), *range(97, 123))]


def any_tokenizer(V):
    """A tokenizer of V tokens, ASCII letters and digits, the last one ends a story: a .gguf file has a tokenizer."""
    merges = [(a, b) for a in LETTERS for b in LETTERS]
    merges += [(a + b, c) for a, b in merges for c in LETTERS]
    merges = merges[: V - 1 - len(LETTERS)]
    vocab = [*LETTERS, *(a + b for a, b in merges), bpe.END.encode()]
    return bpe.Tokenizer(vocab, merges, {bpe.END: V - 1})


def llamacpp_turn(path, first, steps, threads):
    """(tokens a second, text) of a greedy text without end."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), steps + 1, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # 15m: 380 tokens a second, with flash attention 183, with its defaults (float16, flash attention) 368.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    request = {"prompt": [first], "n_predict": steps, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    found = server.handle_completions(request)
    found = found if isinstance(found, dict) else json.loads(found)
    return found["timings"]["predicted_per_second"], found["choices"][0]["text"]


# == 5  side by side ===================================================================================================


def write_gguf(size, cfg, flat, dtypes, folder):
    """{dtype: .gguf file} for llama.cpp; none, with a line that says why, of a model that it does not compute."""
    files, tokenizer = {dtype: Path(folder) / f"{size}-{dtype}.gguf" for dtype in dtypes}, any_tokenizer(cfg.vocab_size)
    try:
        for dtype, path in files.items():
            llamacpp.save(path, cfg, flat, tokenizer, dtype)
    except ValueError as error:
        bpe.note(f"{size}: {error}")
        return {}, tokenizer
    return files, tokenizer


def measure(size, args, folder):
    (flat, cfg), first = our_model(size, args.checkpoint), 1  # 1 is llama2.c's beginning of a text
    p = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers)
    steps, speeds, same = min(args.steps, cfg.seq_len), {}, []
    head = 4 * cfg.vocab_size * cfg.width
    bytes_read = 4 * tinygpt.count_parameters(cfg)[2] + (head if cfg.tied else 0)
    bytes_read -= 3 * head // 4 if head > fast.steps.SCREEN_BYTES else 0  # a large head is read in 8 bits
    theirs, pieces = args.llama2c and cfg.positions == "rope" and cfg.mlp == "swiglu" and not cfg.qkv_bias, None
    checkpoint = args.checkpoint or Path(folder) / f"{size}.bin"
    if theirs:
        pieces = their_pieces(args.tokenizer, cfg.vocab_size)
        if not args.checkpoint:
            llama2c.write_model(checkpoint, cfg, flat)
    files, tokenizer = write_gguf(size, cfg, flat, args.llamacpp, folder)
    stop, banned = first if theirs else -1, () if theirs else (tokenizer.end,)  # llama2.c stops, llama.cpp does not
    memory = tinygpt.aligned(MEMORY // 4, np.float32)
    memory[:] = 1
    rounded = tinygpt.views(tinygpt.layout(cfg), flat.copy(), cfg.layers) if args.int8 else None
    if args.int8:
        round_weights(rounded, cfg)
    sums = np.zeros((BLOCKS, 64 + MEMORY // 4 // BLOCKS // 64), np.float32)
    for turn in range(args.rounds + 1):
        for threads in args.threads:
            fast.POOL.resize(threads)
            decoding = sample.Decoding(p, cfg, fast.FLOAT32)
            our_turn(decoding, first, stop, min(steps, 3), banned)  # what is made when it is first needed
            speed, ids = our_turn(decoding, first, stop, steps, banned)
            found = {("ours", threads): speed, ("memory", threads): bandwidth(memory, sums)}
            if args.int8:
                decoding = sample.Decoding(rounded, cfg, fast.INT8)
                our_turn(decoding, first, stop, min(steps, 3), banned)
                found["ours int8", threads] = our_turn(decoding, first, stop, steps, banned)[0]
            if theirs:
                found["llama2.c", threads], text = their_turn(args.llama2c, checkpoint, args.tokenizer, steps, threads)
                same.append(same_text(ids, pieces, first, text))
            for dtype, path in files.items():
                found[f"llama.cpp {dtype}", threads], text = llamacpp_turn(path, first, steps, threads)
                if dtype == "float32":
                    same.append(text == tokenizer.decode(ids))
            for name, value in found.items() if turn else ():
                speeds.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in speeds.items()}, bytes_read, same


def show(size, speeds, bytes_read, same, threads_of, others):
    """Print a line for each number of threads; `others` as in the heading."""
    for threads in threads_of:
        ours, memory = speeds["ours", threads], speeds["memory", threads]
        cells = [f"{size:>16s}", f"{threads:7d}", f"{bytes_read / 1e6:6.1f}", f"{ours:9,.0f}"]
        cells += [f"{ours * bytes_read / 1e9:6.1f}", f"{memory:6.1f}", f"{ours * bytes_read / 1e9 / memory:6.0%}"]
        for other in others:
            best = max((speed for (name, _), speed in speeds.items() if name == other), default=0)
            cells += [f"{speeds[other, threads]:{len(other)},.0f}", f"{ours / best:10.2f}x"] if best else ["-", "-"]
        cells += ["yes" if all(same) else "NO"] if same else []
        print(" | ".join(cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description="Tokens per second of one stream, ours beside others.")
    add = parser.add_argument
    add("--size", nargs="+", metavar="SIZE", default=["700k", "1m", "8m", "28m"], help="random weights of these shapes")
    add("--checkpoint", type=Path, metavar="FILE", help="instead: this model")
    add("--int8", action="store_true", help="ours with int8 weights, too")
    add("--llama2c", metavar="RUN", help="its compiled run; measured beside ours on the shapes that it has")
    dtypes = "llama.cpp beside ours, with matrices in float32, or in these (float32, float16, q8_0)"
    add("--llamacpp", nargs="*", choices=llamacpp.DTYPES, metavar="DTYPE", help=dtypes)
    add("--tokenizer", metavar="FILE", help="llama2.c's tokenizer.bin, for --llama2c")
    add("--steps", type=int, default=200, help="tokens a turn (default %(default)s)")
    add("--rounds", type=int, default=5, help="turns of each side (default %(default)s)")
    add("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default 1 2)")
    args = parser.parse_args()
    sizes = [args.checkpoint.stem] if args.checkpoint else args.size
    if not args.checkpoint and (unknown := [size for size in sizes if size not in tinygpt.find_sizes()]):
        parser.error(f"--size {unknown[0]}: expected one of {', '.join(tinygpt.find_sizes())}")
    if args.llama2c and not args.tokenizer:
        parser.error("--llama2c needs --tokenizer: it does not run without one")
    args.llamacpp = ["float32"] if args.llamacpp == [] else args.llamacpp or []
    if args.llamacpp:
        try:
            import xllamacpp
        except ImportError:
            parser.error("--llamacpp needs llama.cpp: pip install xllamacpp")
        bpe.note(f"llama.cpp: {xllamacpp.get_system_info()}")
    others = ["ours int8"] * args.int8 + ["llama2.c"] * bool(args.llama2c)
    others += [f"llama.cpp {dtype}" for dtype in args.llamacpp]
    heads = "".join(f" | {other} | of its best" for other in others) + " | same text" * bool(others[args.int8 :])
    print(f"            size | threads |     MB |     tok/s |   GB/s | memory |  share{heads}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            show(size, *measure(size, args, folder), args.threads, others)


if __name__ == "__main__":
    main()
