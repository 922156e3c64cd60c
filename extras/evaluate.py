"""Score every token of a text once: nats per token, perplexity, bits per byte, each with the interval (95%) that other
stories of the kind would give.

    python extras/evaluate.py runs/1m/best.safetensors --data tinystories-valid.txt --stride 128
    python extras/evaluate.py stories260K.bin --tokenizer tok512.bin --data tinystories-valid.txt
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
from extras import data, quantize
from extras.initial import check_vocabulary, with_seq_len

# == 1  intervals ======================================================================================================

RESAMPLES = 1000


def sum_by_story(nats, tokens, tokenizer):
    """nats of tokens (M,) -> sums over each of S stories, its end included: nats, tokens, bytes of text, (3, S)."""
    starts = np.flatnonzero(tokens[:-1] == tokenizer.end) + 1
    each = (nats, np.ones(len(tokens)), tokenizer.byte_lengths()[tokens])
    return np.stack([np.add.reduceat(column, [0, *starts], dtype=np.float64) for column in each])


def bootstrap(stories, seed):
    """Sums over stories (3, S) -> the sums of as many stories drawn with replacement, (3, RESAMPLES): Efron 1979."""
    S, rng = stories.shape[1], np.random.Generator(np.random.Philox(key=[seed, 2]))
    at_once, sums = max(1, 2**22 // S), []
    for first in range(0, RESAMPLES, at_once):
        drawn = rng.integers(0, S, (min(at_once, RESAMPLES - first), S))
        sums.append(np.stack([row[drawn].sum(-1) for row in stories]))
    return np.concatenate(sums, -1)


def figures(sums):
    """Sums (3, ...) of nats, tokens, bytes -> name -> figure (...)."""
    nats, tokens, size = sums
    per_token = nats / tokens
    bits = nats / math.log(2) / np.maximum(1, size)
    with np.errstate(over="ignore"):
        return {"nats/token": per_token, "perplexity": np.exp(per_token), "bits/byte": bits}


# == 2  command line ===================================================================================================


def evaluate_file(args):
    """Print the figures of a text. ValueError or OSError if model and text do not fit together."""
    if not args.data:
        raise ValueError("there is no text to score: --data FILE")
    checkpoint, tokenizer = sample.load_model(args.checkpoint, args.tokenizer)
    T = args.seq_len or checkpoint.cfg.seq_len
    if T > checkpoint.cfg.seq_len:
        trained_on = f"the {checkpoint.cfg.seq_len} tokens that {args.checkpoint} was trained on"
        raise ValueError(f"--seq-len {T} is above {trained_on}")
    cfg, stride = with_seq_len(checkpoint.cfg, T), args.stride or T
    if stride > T:
        raise ValueError(f"--stride {stride} is above the window of T={T}: tokens between would not be scored")
    check_vocabulary(args.data, tokenizer, args.checkpoint)
    folder = Path("data", "tokens", data.cache_key(args.data, None, tokenizer.hash))
    files = data.encode(args.data, tokenizer, folder / "text.bin")
    parts = [bpe.read_tokens(path, tokenizer)[0] for path in files]
    tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
    p = tinygpt.views(tinygpt.layout(cfg), checkpoint.parameters, cfg.layers)
    if args.quantize:
        quantize.round_model(p, cfg)
    with bpe.Progress("scoring", len(tokens)) as progress:
        ops = tinygpt.find_ops(args.kernels)
        nats = train.score(p, cfg, tokens, tokenizer.end, ops, stride, args.batch_size, progress)
    if not np.isfinite(nats).all():
        raise ValueError(f"{args.checkpoint} gives nats that are not finite; it is no model that can be used")
    stories = sum_by_story(nats, tokens, tokenizer)
    S, drawn = stories.shape[1], figures(bootstrap(stories, args.seed))
    bpe.note(f"model     {args.checkpoint}: {checkpoint.parameters.size:,} parameters")
    bpe.note(f"text      {' '.join(args.data)}: {len(tokens):,} tokens, {stories[2].sum():,.0f} bytes, {S:,} stories")
    bpe.note(f"windows   of {T} tokens, stride {stride}; intervals: 95% of {RESAMPLES:,} draws of the stories")
    for name, figure in figures(stories.sum(-1)).items():
        low, high = np.percentile(drawn[name], (2.5, 97.5))
        interval = f"{low:.4f} to {high:.4f}" if S > 1 else "(one story: no interval)"
        bpe.say(f"{name:10}  {figure:.4f}   {interval}")


def make_parser():
    parser = bpe.Parser(prog="evaluate.py", description="Score every token of a text once.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .safetensors file of train.py, or a .bin of llama2.c")
    add("--data", nargs="+", metavar="FILE", help="text, .jsonl, token files or folders; required")
    add("--tokenizer", metavar="FILE", help="of a checkpoint that holds none, as llama2.c's")
    add("--seq-len", type=train.COUNT, metavar="T", help="tokens in a window (default that of the model)")
    add("--stride", type=train.COUNT, metavar="N", help="between windows: each token sees T - N before it (default T)")
    add("--batch-size", type=train.SEQUENCES, metavar="N", help="windows at a time: memory only, same result")
    add("--seed", type=bpe.in_range(int, 0, 2**63 - 1), default=0, help="of the intervals (default %(default)s)")
    add("--quantize", choices=["int8"], help="score with matrices rounded to int8, as sample.py --quantize has them")
    add("--kernels", choices=train.KERNELS, help="table of ops (default the fastest that is here)")
    add("--threads", type=bpe.in_range(int, 1, 1024), metavar="N", help="threads to compute with (default all cores)")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.threads:
            tinygpt.set_threads(args.threads)
        evaluate_file(args)
    except (OSError, ValueError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
