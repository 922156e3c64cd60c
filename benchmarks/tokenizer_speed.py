"""Tokenizer speed and memory beside what a user would pick instead: tiktoken, riptoken and Hugging Face tokenizers.

    pip install tiktoken riptoken tokenizers && python benchmarks/tokenizer_speed.py          # generated stories
    python benchmarks/tokenizer_speed.py stories.txt --rounds 5 --parts encode train memory scale start

Encoding goes from UTF-8 bytes to a NumPy array of ids, with one vocabulary for all; training goes from the stories in
memory to merges. Each side runs in a process of its own and takes turns with the others, so that a machine whose speed
drifts treats all alike; medians and their ratio. Memory is what a process grows by at its peak, in the first turn on
the whole text; a part of it has been done before, so that libraries and kernels are there.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bpe  # noqa: E402
from extras.documents import documents  # noqa: E402
from fast import words  # noqa: E402

PARTS = ("encode", "train", "memory", "scale", "start")
VOCAB = 4096  # of the tokenizer that all encode with
SIDES = {"encode": ("ours", "tiktoken", "riptoken", "tokenizers"), "train": ("ours", "tokenizers")}


# == 1  one turn of each side ==========================================================================================


def our_encode(stories, threads, path):
    tokenizer = bpe.Tokenizer.load(path)
    tokenizer.compiled(bpe.LONG)  # loaded now, for the others are; what it costs is the part `start`
    data = b"\n".join(stories)
    return lambda: tokenizer.encode_array(data, threads=threads)


def tiktoken_encode(stories, threads, path):
    import tiktoken

    tokenizer = bpe.Tokenizer.load(path)
    ranks = {token: i for i, token in enumerate(tokenizer.vocab) if i not in tokenizer.specials.values()}
    theirs = tiktoken.Encoding("ours", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens=tokenizer.specials)
    if threads == 1:
        data = b"\n".join(stories)
        return lambda: theirs.encode_to_numpy(data.decode(), disallowed_special=())
    blocks = in_blocks(stories)
    return lambda: concatenated(theirs.encode_ordinary_batch([b.decode() for b in blocks], num_threads=threads))


def riptoken_encode(stories, threads, path):
    import riptoken

    tokenizer = bpe.Tokenizer.load(path)
    ranks = {token: i for i, token in enumerate(tokenizer.vocab) if i not in tokenizer.specials.values()}
    theirs = riptoken.CoreBPE(ranks, tokenizer.specials, bpe.PATTERN)
    if threads == 1:
        data = b"\n".join(stories)
        return lambda: np.array(theirs.encode_ordinary(data.decode()), np.uint32)
    blocks = in_blocks(stories)
    return lambda: concatenated(theirs.encode_ordinary_batch([b.decode() for b in blocks]))


def tokenizers_encode(stories, threads, path):
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(path)
    theirs.encode_special_tokens = True
    blocks = in_blocks(stories, 1)  # a long text would take it much longer
    return lambda: concatenated(e.ids for e in theirs.encode_batch_fast([b.decode() for b in blocks]))


def in_blocks(stories, size=1 << 16):
    """The text of "\\n".join(stories) in blocks of some size, cut behind a newline: the ids are the same."""
    blocks, held = [], []
    for story in stories:
        held.append(story + b"\n")
        if sum(map(len, held)) >= size:
            blocks.append(b"".join(held))
            held = []
    blocks.append(b"".join(held))
    blocks = [block for block in blocks if block]
    return [*blocks[:-1], blocks[-1][:-1]]


def concatenated(lists):
    return np.concatenate([np.array(ids, np.uint32) for ids in lists])


def our_train(stories, threads, size):
    texts = [story.decode() for story in stories]
    return lambda: bpe.train(texts, size - 257)


def tokenizers_train(stories, threads, size):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [story.decode() for story in stories]

    def turn():
        theirs = Tokenizer(models.BPE())
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[bpe.END], initial_alphabet=alphabet, show_progress=False
        )
        theirs.train_from_iterator(texts, trainer)
        return [None] * (theirs.get_vocab_size() - 257)

    return turn


TURNS = {"encode": (our_encode, tiktoken_encode, riptoken_encode, tokenizers_encode)}
TURNS["train"] = (our_train, tokenizers_train)


# == 2  a process for each side ========================================================================================


def memory(reset=False):
    """MiB resident, the most since the last reset where the system says it, else since the beginning."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def serve(side, task, threads, detail, path):
    """Take a turn for each line that comes in; print seconds, tokens or merges, a sum of them, MiB grown."""
    stories = Path(path).read_bytes().split(bpe.END.encode())
    make, detail = TURNS[task][SIDES[task].index(side)], int(detail) if task == "train" else detail
    make(stories[: 1 + len(stories) // 5], threads, detail)()
    turn = make(stories, threads, detail)
    before = memory(reset=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        result = turn()
        seconds = time.perf_counter() - start
        grown = memory() - before
        check = int(result.sum(dtype=np.int64)) if task == "encode" else 0
        print(seconds, len(result), check, grown, flush=True)
        del result


class Side:
    def __init__(self, name, task, threads, detail, path):
        self.times, self.grown, self.count, self.check = [], None, None, None
        command = [sys.executable, __file__, "--serve", name, task, str(threads), str(detail), str(path)]
        environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process = subprocess.Popen(command, **pipes)

    def turn(self):
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit("tokenizer_speed.py: a side has failed")
        seconds, count, check, grown = line.split()
        self.times.append(float(seconds))
        self.count, self.check = int(count), int(check)
        self.grown = self.grown if self.grown is not None else float(grown)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(task, threads, detail, path, names, rounds):
    """{side: Side} after a first turn that warms up and so many that count."""
    sides = {name: Side(name, task, threads, detail, path) for name in names}
    for _ in range(rounds + 1):
        for side in sides.values():
            side.turn()
    for side in sides.values():
        side.close()
        side.seconds = statistics.median(side.times[1:])
    if len({(side.count, side.check) for side in sides.values()}) > 1:
        print(f"results differ: { {name: (side.count, side.check) for name, side in sides.items()} }")
    return sides


# == 3  the parts ======================================================================================================


def available(task):
    return [name for name in SIDES[task] if name == "ours" or importlib.util.find_spec(name)]


def table(what, size, sides):
    ours = sides["ours"].seconds
    cells = [
        f"{name} {size / 1e6 / side.seconds:7.1f} MB/s ({side.seconds / ours:5.2f}x)" for name, side in sides.items()
    ]
    print(f"{what:22s} | " + " | ".join(cells), flush=True)


def grown(what, sides):
    print(f"{what:22s} | " + " | ".join(f"{name} {side.grown:6.0f} MiB" for name, side in sides.items()), flush=True)


def scaled(path, folder, size):
    """A file of so many bytes: the text, again and again."""
    data = Path(path).read_bytes() + bpe.END.encode()
    out = Path(folder, f"{size}.txt")
    with open(out, "wb") as file:
        for left in range(size, 0, -len(data)):
            file.write(data[:left] if left >= len(data) else data[: data.rfind(bpe.END.encode(), 0, left) + 13] or data)
    return out


FIRST = """
import sys, time
start = time.perf_counter()
import bpe
tokenizer = bpe.Tokenizer.load(sys.argv[1])
text = open(sys.argv[2], encoding="utf-8").read()[: int(sys.argv[3])]
ids = tokenizer.encode_array(text)
print(time.perf_counter() - start)
"""


def first_encode(path, tokenizer, folder):
    """Seconds of a new process that imports bpe, loads a tokenizer and encodes; nothing compiled before, and again."""
    for size, name in ((200, "200 characters"), (4 << 20, "4 MB")):
        cache = tempfile.mkdtemp(dir=folder)
        seconds = []
        for _ in range(2):
            command = [sys.executable, "-c", FIRST, str(tokenizer), str(path), str(size)]
            environment = os.environ | {"NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            seconds.append(float(done.stdout))
        print(f"first encode, {name:15s}| cold {seconds[0]:.2f} s | warm {seconds[1]:.2f} s", flush=True)


def generated(folder, size=12_500_000):
    try:
        from extras import stories
    except ImportError:
        sys.exit("tokenizer_speed.py: extras/stories.py is missing; name a text file")
    out, left = Path(folder, "stories.txt"), size
    with open(out, "w", encoding="utf-8", newline="\n") as file:
        for story in stories.generate(0):
            left -= file.write(f"{story}\n{bpe.END}\n")
            if left < 0:
                return out


def gathered(files, folder):
    """One file of the stripped stories, END between them."""
    out = Path(folder, "text.txt")
    with open(out, "wb") as file:
        for i, story in enumerate(documents(files)):
            file.write(bpe.END.encode() * (i > 0) + story.encode())
    return out


def main():
    parser = argparse.ArgumentParser(description="Speed and memory of tokenizers, ours beside others.")
    parser.add_argument("files", nargs="*", help="text files; default: stories that extras/stories.py generates")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side that count (default %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        side, task, threads, detail, path = args.serve
        return serve(side, task, int(threads), detail, path)
    for name in ("tiktoken", "riptoken", "tokenizers"):
        if not importlib.util.find_spec(name):
            print(f"{name} is not installed and left out; pip install {name}")
    with tempfile.TemporaryDirectory() as folder:
        path = gathered(args.files or [generated(folder)], folder)
        size = path.stat().st_size
        print(f"{size:,} bytes of {'text' if args.files else 'generated stories'}; (how many times our time)")
        tokenizer = Path(folder, "tokenizer.json")
        merges = bpe.train(bpe.pieces(path), VOCAB - 257)
        bpe.Tokenizer.from_merges(merges, reserve=0).save(tokenizer)
        cores = words.count_cores()
        for threads in sorted({1, cores}) if {"encode", "memory"} & set(args.parts) else ():
            sides = measure("encode", threads, tokenizer, path, available("encode"), args.rounds)
            table(f"encode, {threads} thread{'s' * (threads > 1)}", size, sides)
            grown("  memory grows by", sides)
        for entries in (4096, 10_000) if {"train", "memory"} & set(args.parts) else ():
            sides = measure("train", cores, entries, path, available("train"), args.rounds)
            table(f"train {entries:,} entries", size, sides)
            grown("  memory grows by", sides)
        for million in (1, 10, 100) if "scale" in args.parts else ():
            part = scaled(path, folder, million * 10**6)
            for task, detail in (("encode", tokenizer), ("train", 4096)):
                sides = measure(task, cores, detail, part, ["ours"], 2)
                table(f"{task}, {million} MB", part.stat().st_size, sides)
        if "start" in args.parts:
            first_encode(path, tokenizer, folder)


if __name__ == "__main__":
    main()
