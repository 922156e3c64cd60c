"""Tell stories with a trained model.

    python sample.py --prompt "Lily found"

Reads one checkpoint, which holds the model and its tokenizer, and prints the story token by token. Filters apply in
this order: repetition penalty, temperature, top-k, top-p, min-p. Text goes to stdout, everything else to stderr.
"""

import sys

if __name__ == "__main__":
    sys.tracebacklimit = 0  # a Ctrl-C while modules are imported, or a module that is missing, is one line

import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np

import bpe
import tinygpt
from bpe import in_range, note

# == 1  decoding =======================================================================================================


class Decoding:
    """One text that grows: the keys and values of the window's tokens, so that each is computed once.

    When the window is full, its newer half is run again as one block, and the text goes on without end. Within what is
    kept the logits are those of `tinygpt.forward` on the whole window.
    """

    def __init__(self, p, cfg, ops):
        self.p, self.cfg, self.ops = p, cfg, ops
        self.window = []
        self.kv = np.empty((cfg.layers, 1, cfg.seq_len, 2, cfg.kv_heads, cfg.head_width), p["embed_w"].dtype)
        self.steps = ops.steps and ops.steps(p, cfg, self.kv)

    def append(self, ids):
        """Read token ids (at least one) -> what the head reads of the last (1, C); None where it is left to `steps`."""
        start, new = len(self.window), list(ids)
        if start + len(new) > self.cfg.seq_len:
            start, new = 0, (self.window + new)[-max(1, self.cfg.seq_len // 2) :]
        tokens = np.array([new], np.int64)  # (1, T)
        tinygpt.check_tokens(tokens, start, self.cfg)
        self.window = self.window[:start] + new
        if self.steps and len(new) == 1:
            return None
        ops = tinygpt.with_buffers(self.ops, self.cfg, 1, len(new), self.kv.dtype, backward=False)
        x, _ = tinygpt.forward(self.p, tokens, self.cfg, ops, (self.kv, start))
        if self.steps:
            self.steps.copy_from_cache(start, start + len(new))
        return x[:, -1]

    def feed(self, ids):
        """Append token ids (at least one) -> logits (V,) of what follows them."""
        x = self.append(ids)
        if self.steps:
            return self.steps.logits(self.window[-1], x, len(self.window) - 1)
        return self.ops.head_logits(x, self.p, self.cfg, self.ops)[0]

    def draw(self, ids, uniforms, stop, **filters):
        """Append token ids, draw one with each of `uniforms` and append it, with no Python in between -> ids, at least
        one, at most as many as the window takes, up to `stop`; the last is not yet appended. For a table with steps."""
        x = self.append(ids)
        last = len(self.window) - 1
        drawn = self.steps.draw(self.window[-1], x, last, uniforms[: self.cfg.seq_len - last], stop, **filters)
        self.window += drawn[:-1]
        return drawn


# == 2  from logits to a token =========================================================================================

FILTERS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")  # in the order in which they apply
TURN = 0.01  # seconds of drawing, about, before what is drawn is shown


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seen=(), banned=()):
    """logits (V,) -> what to draw the next token from, (V,) float64. Filters apply in this order: repetition penalty,
    temperature, top-k, top-p, min-p.

    The penalty divides positive logits of the ids `seen`, and multiplies others (Keskar et al. 2019, arXiv:1909.05858).
    temperature 0 is all on the likeliest, the first of equals. top_k 0, top_p 1, min_p 0 and a penalty of 1 are off.
    `banned` ids are never drawn. FloatingPointError if a logit is NaN or the largest infinite.
    """
    logits, seen = logits.copy(), list(seen)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition_penalty, logits[seen] * repetition_penalty)
    logits = logits.astype(np.float64)
    logits[list(banned)] = -math.inf
    if not math.isfinite(logits.max()):
        raise FloatingPointError("logits are not finite")
    if temperature == 0:
        return (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is right
        logits = (logits - logits.max()) / temperature
    if top_k and top_k < len(logits):
        logits[np.argsort(-logits, kind="stable")[top_k:]] = -math.inf
    p = np.exp(logits)
    p /= p.sum()
    if top_p < 1:  # the fewest likeliest tokens that together have top_p: at least one
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[1:][before[1:] >= top_p]] = 0
    p[p < min_p * p.max()] = 0  # Nguyen et al. 2024, arXiv:2407.01082
    return p / p.sum()


def generate(decoding, ids, seed, stop, max_new_tokens, watch=None, **filters):
    """Yield ids that follow `ids` (at least one), until `stop` (not yielded) or max_new_tokens; `filters` as above.
    `watch(token, logits)` is called with each token drawn, `stop` too, and the logits (V,) that it was drawn from.

    Tokens come in turns of about TURN seconds from a `decoding` that has steps: it may be ahead of what was yielded.
    ValueError if the forward overflows: finite weights may still be too large.
    """
    rng, count, uniforms = np.random.Generator(np.random.Philox(key=[seed, 1])), 1, np.empty(0)
    steps, yielded = None if watch else getattr(decoding, "steps", None), 0
    seen = set(ids) - {stop}  # by the repetition penalty; the end of a story, which precedes each prompt, is not
    while yielded < max_new_tokens:
        start, count = time.perf_counter(), min(count, max_new_tokens - yielded) if steps else 1
        uniforms = np.append(uniforms, rng.random(max(0, count - len(uniforms))))
        try:
            if steps:
                drawn = decoding.draw(ids, uniforms[:count], stop, seen=seen, **filters)
            else:
                with np.errstate(over="ignore", invalid="ignore"):  # told below
                    logits = decoding.feed(ids)
                cumulative = np.cumsum(probabilities(logits, seen=seen, **filters))
                drawn = [int(np.searchsorted(cumulative, uniforms[0] * cumulative[-1], side="right"))]
        except FloatingPointError as error:
            advice = "the model's weights overflow; take an earlier checkpoint, or train again"
            raise ValueError(f"{error} at token {yielded} after the prompt: {advice}") from None
        if watch:
            watch(drawn[0], logits)
        seen.update(drawn)
        count = 2 * count if time.perf_counter() - start < TURN / 2 else max(1, count // 2)
        for token in drawn:
            if token == stop:
                return
            yield token
        ids, uniforms, yielded = drawn[-1:], uniforms[len(drawn) :], yielded + len(drawn)


# == 3  the model ======================================================================================================

BOX = Path(__file__).with_name("stories.safetensors")  # the model in the box


def newest_checkpoint(folder=Path("runs")):
    """[the last checkpoint of the newest run], without a run [BOX], empty if that is missing too."""
    return sorted(folder.glob("*/last.safetensors"), key=lambda path: path.stat().st_mtime)[-1:] or [BOX] * BOX.exists()


def load_model(path, tokenizer_path=None):
    """(`Checkpoint`, its tokenizer). ValueError if the two do not fit together, if a weight is NaN or infinite, or if
    the checkpoint has a tokenizer and the file named holds another."""
    llama2c = str(path).endswith(".bin") and bpe.find_extra("llama2c", f"{path}, a model of llama2.c,")
    checkpoint = llama2c.load(path) if llama2c else tinygpt.load_checkpoint(path)
    if not checkpoint.tokenizer and not tokenizer_path:
        raise ValueError(f"{path} holds no tokenizer; name its file with --tokenizer")
    own = bpe.Tokenizer.from_json(checkpoint.tokenizer) if checkpoint.tokenizer else None
    tokenizer = bpe.Tokenizer.load(tokenizer_path) if tokenizer_path else own
    if own and tokenizer.hash != own.hash:
        raise ValueError(f"{path} has a tokenizer of its own, {tokenizer_path} is another; leave out --tokenizer")
    if tokenizer.vocab_size > checkpoint.cfg.vocab_size:
        of = tokenizer_path or "its tokenizer"
        raise ValueError(f"{path}: {of} has {tokenizer.vocab_size} tokens, its model V={checkpoint.cfg.vocab_size}")
    return checkpoint, tokenizer


def open_model(path, tokenizer_path, prompt):
    """(parameters by name, `Config`, tokenizer) to tell stories with; notes say what it is, how it reads the prompt."""
    checkpoint, tokenizer = load_model(path, tokenizer_path)
    cfg = checkpoint.cfg
    note(f"{path}: {tinygpt.count_parameters(cfg)[0]:,} parameters; first use of a kernel compiles it (once)")
    if (length := 1 + len(tokenizer.encode(prompt))) > cfg.seq_len:
        note(f"the prompt has {length} tokens, the context {cfg.seq_len}: only its end is read")
    for name in filter(prompt.__contains__, tokenizer.specials):
        note(f"{name} in the prompt is read as text, not as the token of that name")
    return tinygpt.views(tinygpt.layout(cfg), checkpoint.parameters, cfg.layers), cfg, tokenizer


def never_drawn(cfg, tokenizer):
    """Ids that are never sampled: reserved specials, and rows of the model beyond the tokenizer."""
    return [*({*tokenizer.specials.values()} - {tokenizer.end}), *range(tokenizer.vocab_size, cfg.vocab_size)]


# == 4  the story ======================================================================================================


def cut_at(stops, pieces):
    """Yield text up to the first of the `stops`; what may be the beginning of one is held back."""
    held, longest = "", max(map(len, stops), default=0)
    for piece in pieces:
        held += piece
        if ends := [at for stop in stops if (at := held.find(stop)) >= 0]:
            yield held[: min(ends)]
            return
        tails = (held[len(held) - n :] for n in range(min(longest, len(held)), 0, -1))
        tail = next((tail for tail in tails if any(stop.startswith(tail) for stop in stops)), "")
        yield held[: len(held) - len(tail)]
        held = tail
    yield held


def generate_story(model, ops, prompt, seed, max_new_tokens, stops=(), drawn=None, watch=None, **filters):
    """Yield the text that each new token adds to the prompt, held back until its characters are whole; then the rest.

    `model`: parameters, `Config`, tokenizer. It reads the end of a story and then the prompt; of a prompt longer than
    its window the end. The story ends before the first text of `stops`. `drawn`, a list, gets the ids; `watch` and the
    filters are those of `generate`. ValueError if the prompt is no text.
    """
    p, cfg, tokenizer = model
    ids = [tokenizer.end, *tokenizer.encode(prompt)][-cfg.seq_len :]
    filters["banned"] = never_drawn(cfg, tokenizer)
    new = generate(Decoding(p, cfg, ops), ids, seed, tokenizer.end, max_new_tokens, watch, **filters)
    new = new if drawn is None else (drawn.append(i) or i for i in new)
    yield from cut_at(stops, tokenizer.decode_iterable(new, ids[-1]))


def print_story(model, prompt, **options):
    """Print a story while it is drawn, then a line of statistics to stderr; `options` of `generate_story`."""
    print(prompt, end="", flush=True)
    start, times, drawn = time.monotonic(), [], []
    for text in generate_story(model, prompt=prompt, drawn=drawn, **options):
        print(text, end="", flush=True)
        times.append(time.monotonic())
    print(flush=True)
    wait, speed = times[0] - start, max(0, len(drawn) - 1) / max(times[-1] - times[0], 1e-9)
    note(f"[{len(drawn)} tokens, the first after {wait:.1f} s, then {speed:,.0f} tok/s, seed {options['seed']}]")


# == 5  command line ===================================================================================================


def make_parser():
    parser = bpe.Parser(prog="sample.py", description="Tell stories with a trained model.")

    def add(flag, help, **more):
        parser.add_argument(flag, help=help + " (default %(default)s)" * (more.get("default", "") != ""), **more)

    add("--chat", "a conversation with a model that extras/tune.py has tuned", action="store_true")
    add("--prompt", "how the story begins", default="", metavar="TEXT")
    add("--prompt-file", "read the prompt from this file", type=Path, metavar="FILE")
    add("--checkpoint", "a .safetensors, a .bin of llama2.c (default the newest run's)", type=Path, action="append")
    add("--tokenizer", "of a checkpoint that holds none, as llama2.c's", type=Path, metavar="FILE")
    add("--temperature", "below 1 safer, above 1 wilder, 0 greedy", type=in_range(float, 0, 1e6), default=0.8)
    add("--repetition-penalty", "above 1 repeats less; 1 is off", type=in_range(float, 0, 1e6, True), default=1.0)
    add("--top-k", "only the K likeliest tokens; 0 is off", type=in_range(int, 0, 2**31), default=0, metavar="K")
    add("--top-p", "the likeliest that have P; 1 is off", type=in_range(float, 0, 1, True), default=0.95, metavar="P")
    add("--min-p", "tokens with P times the likeliest's share; 0 is off", type=in_range(float, 0, 1), default=0.0)
    add("--stop", "end before this text; may be repeated", action="append", default=[], metavar="TEXT")
    add("--max-new-tokens", "longest story, in tokens", type=in_range(int, 0, 2**31), default=400, metavar="N")
    add("--num-samples", "number of stories", type=in_range(int, 1, 2**31), default=1, metavar="N")
    add("--json", "a line of JSON for each story: text, tokens, log-probabilities", action="store_true")
    add("--show-probs", "shade each token by its probability", action="store_true")
    add("--seed", "of the first story; each next one has the next", type=in_range(int, 0, 2**63 - 1), default=0)
    add("--quantize", "matrices in 8 bits, 64 weights a scale: faster, a little less exact", choices=["int8"])
    add("--kernels", "table of ops, by default the fastest that is here", choices=tinygpt.KERNELS)
    add("--threads", "to compute with, by default all cores", type=in_range(int, 1, 1024), metavar="N")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        ops = tinygpt.find_ops(args.kernels)  # says at once if they are not here
        if args.threads:
            tinygpt.set_threads(args.threads)
        if not (paths := args.checkpoint or newest_checkpoint()):
            raise ValueError("no checkpoint in runs/; train a model first: python train.py --size 1m")
        if args.chat:
            return bpe.find_extra("chat", "--chat").run(args, paths)
        prompt = args.prompt_file.read_text("utf-8").rstrip("\n") if args.prompt_file else args.prompt
        show = (args.json or args.show_probs or len(paths) > 1) and bpe.find_extra("show", "--json or --show-probs")
        models = [open_model(path, args.tokenizer, prompt) for path in paths]
        if args.quantize:
            ops = bpe.find_extra("quantize", "--quantize").quantize_models(models, ops)
        tell = show.choose(args, models) if show else partial(print_story, models[0])
        options = {name: getattr(args, name) for name in ("max_new_tokens", *FILTERS)}
        for seed in range(args.seed, args.seed + args.num_samples):
            if seed > args.seed and not args.json:
                print("\n---\n")
            tell(prompt, seed=seed, stops=args.stop, ops=ops, **options)
    except BrokenPipeError:  # whoever read stdout has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print()
        return 130
    except (OSError, ValueError, MemoryError) as error:
        parser.error(error)
    return 0


if __name__ == "__main__":
    sys.tracebacklimit = None
    sys.exit(main())
