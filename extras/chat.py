"""A conversation in the terminal with a model that extras/tune.py has taught to answer; sample.py finds it.

python sample.py --chat --checkpoint runs/chat/best.safetensors

/reset forgets what was said, /quit leaves. Ctrl-C stops an answer.
"""

import itertools
import sys

import tinygpt
from bpe import note
from extras.tune import answer, prompt_ids, read_template
from sample import FILTERS, load_model

ROOM = 0.5  # share of the context that is kept for an answer


def fit_history(messages, template, tokenizer, T):
    """The last messages, from a user's, that leave room for an answer in T tokens. ValueError if the last alone does
    not."""
    most = T - int(ROOM * T)
    while (length := len(prompt_ids(messages, template, tokenizer))) > most:
        if len(messages) < 3:
            raise ValueError(f"the message has {length} tokens, the model reads {most}; shorten it")
        messages = messages[2:]
    return messages


def read_message(prompt):
    """The next message of the terminal; None at the end of input."""
    while True:
        try:
            if text := input(prompt).strip():
                return text
        except EOFError:
            return None
        except KeyboardInterrupt:
            note("\n/quit leaves")


def run(args, paths):
    """Converse until /quit or the end of input -> exit status. ValueError if the checkpoint has no template."""
    if len(paths) > 1:
        raise ValueError("--chat talks to one model; name one --checkpoint")
    checkpoint, tokenizer = load_model(paths[0], args.tokenizer)
    template, cfg = read_template(paths[0], checkpoint, tokenizer), checkpoint.cfg
    model = tinygpt.views(tinygpt.layout(cfg), checkpoint.parameters, cfg.layers), cfg, tokenizer
    ops, filters = tinygpt.find_ops(args.kernels), {name: getattr(args, name) for name in FILTERS}
    note(f"{paths[0]}: ask for a story. /reset forgets, /quit leaves, Ctrl-C stops an answer")
    messages, seeds = [], itertools.count(args.seed)
    while (text := read_message("> " if sys.stdin.isatty() else "")) not in (None, "/quit"):
        if text == "/reset":
            messages = []
            continue
        try:
            messages = fit_history([*messages, {"role": "user", "content": text}], template, tokenizer, cfg.seq_len)
        except ValueError as error:
            note(str(error))
            continue
        said = []
        try:
            for piece in answer(model, template, messages, next(seeds), ops, args.max_new_tokens, **filters):
                said.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            note(" [stopped]")
        print(flush=True)
        messages = [*messages, {"role": "assistant", "content": "".join(said)}]
    return 0
