"""What a tokenizer does to a text: how many bytes its tokens hold, the merges that make a word, the text of its ids.

    python bpe.py stats stories.txt --tokenizer tokenizer.json
    python bpe.py explain accomplishment
    python bpe.py decode train.bin --tokenizer tokenizer.json

bpe.py's command line finds this file when it is used.
"""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np

from bpe import END, TEXT, Parser, Progress, Tokenizer, pieces, read_tokens, text_files


def merge_steps(tokenizer, word):
    """A pre-token on the way to its ids: (None, its byte strings), then (a merge's number, the same after it)."""
    ids, number = tokenizer.first_ids(word), None
    while True:
        yield number, [tokenizer.vocab[i] for i in ids]
        found = [(tokenizer._ranks[pair], k) for k, pair in enumerate(pairwise(ids)) if pair in tokenizer._ranks]
        if not found:
            return
        (number, new), k = min(found)
        ids[k : k + 2] = [new]


def explain(args):
    """Show the merges of a text's words, by tokenizer.json in this folder or the newest that train.py made."""
    made = sorted(Path("data", "tokens").glob("*/tokenizer.json"), key=lambda path: -path.stat().st_mtime)
    found = [args.tokenizer] if args.tokenizer else [*Path().glob("tokenizer.json"), *made]
    if not found:
        raise ValueError("there is no tokenizer.json here and none in data/tokens; name one with --tokenizer FILE")
    tokenizer = Tokenizer.load(found[0])
    print(found[0])
    first = "bytes" if type(tokenizer) is Tokenizer else "characters"
    for word in tokenizer.pretokens(args.text):
        for number, tokens in merge_steps(tokenizer, word):
            label = first if number is None else f"merge {number + 1:,}"
            print(f"{label:>14}  {' | '.join(token.decode('utf-8', 'backslashreplace') for token in tokens)}")
        print(f"{'ids':>14}  {' '.join(map(str, tokenizer.word_ids(word)))}")


def stats(args):
    """Show how a text is spread over the entries of a vocabulary."""
    tokenizer = Tokenizer.load(args.tokenizer)
    uses, stories, size = np.zeros(tokenizer.vocab_size, np.int64), 0, 0
    with Progress("encoding", sum(map(os.path.getsize, text_files(args.files)))) as progress:
        for ids, more_stories, more_bytes in tokenizer.encode_documents(pieces(args.files)):
            uses += np.bincount(ids, minlength=len(uses))
            stories, size = stories + more_stories, size + more_bytes
            progress(size)
    print(f"text             {size:,} bytes, {stories:,} stories")
    print(f"tokens           {uses.sum():,} (one {END} for each story included)")
    print(f"bytes per token  {size / uses.sum():.3f}")
    print(f"unused           {(uses == 0).sum():,} of {tokenizer.vocab_size:,} entries")
    print("longest tokens   bytes    id     uses  text")
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.specials.values()]
    for i in sorted(plain, key=lambda i: (-len(tokenizer.vocab[i]), i))[:10]:
        print(f"{len(tokenizer.vocab[i]):22} {i:5} {uses[i]:8,}  {tokenizer.decode([i])!r}")


def decode(args):
    """Print the stories of a token file, each with its end."""
    tokenizer = Tokenizer.load(args.tokenizer)
    ids, start = read_tokens(args.file, tokenizer)[0], 0
    for stop in [*np.flatnonzero(ids == tokenizer.end).tolist(), len(ids)]:
        if start < len(ids):
            print(tokenizer.decode(ids[start:stop]), END, sep="\n")
        start = stop + 1


def make_parser():
    parser = Parser(prog="bpe.py", description="What a tokenizer does to a text.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="decode|explain|stats")

    def command(run, name, help):
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=run)
        return made.add_argument

    add = command(decode, "decode", "a token file back to text, on stdout")
    add("file", metavar="FILE.bin", help="token file to read")
    add("--tokenizer", required=True, metavar="FILE", help="the tokenizer.json that it was encoded with")
    add = command(explain, "explain", "the merges that make the tokens of a word, in their order")
    add("text", metavar="WORD", help="a word, or any text: each of its words in turn")
    add("--tokenizer", metavar="FILE", help="default: tokenizer.json here, else the newest of train.py")
    add = command(stats, "stats", "bytes per token, unused entries and longest tokens on a text")
    add("files", nargs="+", metavar="FILE", help=TEXT)
    add("--tokenizer", required=True, metavar="FILE", help="the tokenizer.json to measure")
    return parser
