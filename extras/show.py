"""Other ways to show a story than plain text; sample.py finds them.

python sample.py --json --num-samples 3 > stories.jsonl
python sample.py --show-probs --prompt "Lily found"
python sample.py --checkpoint runs/1m/last.safetensors --checkpoint runs/8m/last.safetensors
"""

import json
import math
import shutil
import textwrap

import numpy as np

from bpe import note
from sample import generate_story

# Probabilities from which a shade is used, and its colour of 256: the less likely a token, the darker its background.
SHADES = [(0.5, None), (0.2, 230), (0.1, 223), (0.05, 216), (0.01, 209), (0.0, 202)]
GAP = 3  # columns between two stories


def log_probability(logits, token):
    """log softmax(logits)[token], of logits (V,): the model's own, before any filter."""
    logits = logits.astype(np.float64)
    top = logits.max()
    return float(logits[token] - top - math.log(np.exp(logits - top).sum()))


def choose(args, models):
    """tell(prompt, seed, **options of `generate_story`) as the flags ask. ValueError if they exclude each other."""
    if args.json and args.show_probs:
        raise ValueError("--json already has the probabilities; leave out --show-probs")
    if args.json:
        return lambda prompt, **options: [print_json(model, prompt, **options) for model in models]
    if len(models) > 1 and args.show_probs:
        raise ValueError("--show-probs shades one story; name one --checkpoint")
    if args.show_probs:
        note("shade: " + " ".join(shaded(f" {least:g} or more ", least) for least, _ in SHADES))
        return lambda prompt, **options: print_shaded(models[0], prompt, **options)
    return lambda prompt, **options: print_columns(models, prompt, **options)


def print_json(model, prompt, seed, stops=(), **options):
    """Print a story as one line of JSON: prompt, text, tokens (ids, the end's too), logprobs (nats below 0, of each),
    seed, and finish: "stop" at the end of a story or at a stop text, else "length"."""
    tokens, logprobs, tokenizer = [], [], model[2]

    def watch(token, logits):
        tokens.append(token)
        logprobs.append(log_probability(logits, token))

    text = "".join(generate_story(model, prompt=prompt, seed=seed, stops=stops, watch=watch, **options))
    ended = tokens[-1:] == [tokenizer.end] or any(stop in tokenizer.decode(tokens) for stop in stops)
    story = {"prompt": prompt, "text": text, "tokens": tokens, "logprobs": logprobs, "seed": seed}
    print(json.dumps(story | {"finish": "stop" if ended else "length"}, ensure_ascii=False), flush=True)


def shaded(text, probability):
    colour = next(colour for least, colour in SHADES if probability >= least)
    return text if colour is None else f"\x1b[48;5;{colour}m\x1b[38;5;16m{text}\x1b[0m"


def print_shaded(model, prompt, **options):
    """Print a story while it is drawn: the less likely the model thought a token, the darker its background."""
    print(prompt, end="", flush=True)
    latest = [1.0]

    def watch(token, logits):
        latest[0] = math.exp(log_probability(logits, token))

    for text in generate_story(model, prompt=prompt, watch=watch, **options):
        print(shaded(text, latest[0]) if text else "", end="", flush=True)
    print(flush=True)


def print_columns(models, prompt, **options):
    """Print the story that each model tells, side by side, as wide as the terminal."""
    width = max(20, (shutil.get_terminal_size().columns + GAP) // len(models) - GAP)
    columns = []
    for model in models:
        story = prompt + "".join(generate_story(model, prompt=prompt, **options))
        columns.append([line for part in story.split("\n") for line in textwrap.wrap(part, width) or [""]])
    for number in range(max(map(len, columns))):
        row = [(column[number] if number < len(column) else "").ljust(width) for column in columns]
        print((" " * GAP).join(row).rstrip(), flush=True)
