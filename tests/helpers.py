"""What several test files share about text: stories, strings that are hard to split, GPT-2's golden ids, tokenizers."""

import json
import random
from pathlib import Path

import bpe
from fast import merges, words

END = bpe.END
TOK512 = Path(__file__).parent / "golden" / "tok512.bin"  # the tokenizer of llama2.c's stories260K, MIT licence
GOLDEN = json.loads((Path(__file__).parent / "golden" / "gpt2_bpe.json").read_text(encoding="utf-8"))
STORIES = [
    "Once upon a time there was a little girl named Lily. She can't find her red ball.",
    "Tom said, \"I'll help you, Lily! We've got 12 balls, and they're all red.\"\n\nThey were happy.",
    "The little dog ran to the big tree.\r\n  It barked   and barked \u2014 \u201cwoof\u201d!",
    "\u65e5\u672c\u8a9e caf\u00e9 \U0001f600\U0001f600 na\u00efve \u00bd \u0663",
]
# What the split pattern, UTF-8 and the search for specials can stumble over, to be strung together at random.
PIECES = [*" \n\t'sdlrevmt1!<|\u00e9\u65e5\u00a0\x00", "  ", "'ll", "'re", " the", "Lily", "\U0001f600", "\u200d\u0301"]
PIECES += [END, "<|endof", "text|>", "<|reserved_0|>", "<|reserved_", "\x85", "\x1c", "ball balls"]


def random_texts(seed, n, most=14):
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(0, most))) for _ in range(n)]


def cut(data, rng, most):
    """data in random pieces of up to `most`, some of them empty."""
    pieces, i = [], 0
    while i < len(data):
        j = i + rng.randint(0, most)
        pieces.append(data[i:j])
        i = j
    return pieces


def with_specials(tokenizer, *names):
    """The tokenizer with further special tokens behind its last id."""
    specials = {**tokenizer.specials, **{name: tokenizer.vocab_size + i for i, name in enumerate(names)}}
    return bpe.Tokenizer([*tokenizer.vocab, *(name.encode() for name in names)], tokenizer.merges, specials)


def shuffled(tokenizer):
    """The same merges under other ids: specials in front, everything else in random order."""
    order = [tokenizer.end, *(i for i in range(tokenizer.vocab_size) if i != tokenizer.end)]
    rest = order[1:]
    random.Random(7).shuffle(rest)
    order[1:] = rest
    specials = {name: order.index(i) for name, i in tokenizer.specials.items()}
    return bpe.Tokenizer([tokenizer.vocab[i] for i in order], tokenizer.merges, specials), order


def gpt2_json(**model):
    """GPT-2's tokenizer.json, as published in style, with the part of its vocabulary that the golden ids need."""
    compact = {string: i for i, string in enumerate(GOLDEN["vocab"])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": compact[END], "content": END, **flags}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": compact,
            "merges": [" ".join(merge) for merge in GOLDEN["merges"]],
            **model,
        },
    }


def by_kernels(tokenizer, texts):
    """The ids of each text, all of them in one call of the kernel."""
    segments = [(bpe.bytes_of(text), tokenizer.end) for text in texts]
    ids = tokenizer.compiled(bpe.LONG).encode(words.Batch(segments)).tolist()
    found, start = [], 0
    for _ in texts:  # the specials are text here, so that END only ends
        stop = ids.index(tokenizer.end, start)
        found.append(ids[start:stop])
        start = stop + 1
    assert start == len(ids)
    return found


def train_compiled(texts, num_merges):
    """bpe.train by fast/merges.py, however short the texts are."""
    return merges.train(bpe.as_pieces(texts), num_merges)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def run_main(args):
    """bpe.py's status with these arguments, in this process."""
    try:
        return bpe.main(list(args))
    except SystemExit as done:
        return done.code
