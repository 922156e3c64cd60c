"""What test files share: a tiny model and its runs, text to train on, commands that must succeed or be refused."""

import asyncio
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import shlex
import struct
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tiers import WITHOUT_FAST, fast

import bpe
import tinygpt
import train
from extras import convert, plan, serve, stories
from extras.engine import Engine
from extras.tensors import TABLES, tensors_from

ROOT = Path(train.__file__).resolve().parent
SMALL = "--vocab-size 300 --seq-len 16 --set layers=1 width=16 heads=2 hidden=64 --batch-size 2 --threads 1".split()
NUMPY = [*SMALL, "--kernels", "numpy"]  # starts without a compiler
TINY = tinygpt.Config(vocab_size=300, seq_len=32, width=24, layers=2, heads=3)
RECIPE = (1.2e-2, 4)  # learning rate of TINY where no flag gives it, and sequences per update
SETTINGS = train.Settings(lr=1e-2, min_lr=1e-3, warmup_steps=2, steps=8, batch_size=4, micro_batch_size=4, beta2=0.95)
PLAIN = ("--steps", 12, "--eval-every", 5, "--micro-batch-size", 2)
LONG = (*PLAIN, "--seed", 3, "--prompt", "Lily", "--prompt", "Zo\u00eb")


@dataclasses.dataclass(frozen=True)
class SmallSettings(train.Settings):
    """Fewer sequences in an update where no flag gives them."""

    batch_size: int = train.flag(RECIPE[1], "sequences per update", train.SEQUENCES)


def write_stories(path, seed=0, count=60):
    """A text file of generated stories -> its path."""
    text = "".join(f"{story}\n{bpe.END}\n" for story in islice(stories.generate(seed), count))
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


@contextlib.contextmanager
def workshop(folder):
    """Work in `folder`, offline, with a tiny size, one thread, no matplotlib, a peak that nobody measures, no tiles."""
    threads = tinygpt.THREADS.count
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setitem(tinygpt.SIZES, "tiny", TINY)
        patch.setattr(train, "Settings", SmallSettings)
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setattr(plan, "measure_peak", lambda: 1e11)
        if not WITHOUT_FAST:
            patch.setattr(fast, "find_bf16", lambda: (None, "there are no tiles in this workshop"))
        tinygpt.set_threads(1)
        try:
            yield folder
        finally:
            tinygpt.set_threads(threads)


def invoke(main, *words):
    """main(words) -> status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as leave:
            status = leave.code
    return status, out.getvalue(), err.getvalue()


def trained(*words):
    """A run that must succeed -> stdout, stderr."""
    status, out, err = invoke(train.main, "--size", "tiny", *words)
    assert status == 0, err
    return out, err


def refusal(main, program, *words):
    """The message of a run that must end with status 2 and exactly one line that says why."""
    status, _, err = invoke(main, *words)
    assert status == 2, err
    lines = err.splitlines()
    assert [line.startswith(f"{program}: error: ") for line in lines].count(True) == 1, err
    assert lines[-1].startswith(f"{program}: error: ") and "Traceback" not in err, err
    return lines[-1].removeprefix(f"{program}: error: ")


def read_log(folder="runs/tiny"):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text("utf-8").splitlines()]


def losses(folder="runs/tiny"):
    return {e["step"]: e["loss"] for e in read_log(folder) if "loss" in e}


def model_bytes(folder="runs/tiny"):
    """All that training has changed: parameters and both moments of the last checkpoint, and the best one whole."""
    last = tinygpt.load_checkpoint(Path(folder, "last.safetensors"))
    moments = [last.extra[name].tobytes() for name in ("moment1", "moment2")]
    return last.parameters.tobytes(), *moments, Path(folder, "best.safetensors").read_bytes()


def interrupt_at(monkeypatch, step, interrupt):
    """Call interrupt() in the middle of the update after `step`: when one of its micro-batches is done."""
    real, here = tinygpt.loss_and_gradients, []

    def wrapped(p, tokens, targets, weights, g, *rest):
        result = real(p, tokens, targets, weights, g, *rest)
        if g is not None:
            here.append(1)
            if len(here) == 2 * step + 1:  # runs that are interrupted have two micro-batches
                interrupt()
        return result

    monkeypatch.setattr(tinygpt, "loss_and_gradients", wrapped)


def fresh(dtype=np.float32, seed=0):
    return train.State(TINY, tinygpt.init_parameters(TINY, seed, dtype))


def random_batch(count=4, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, TINY.vocab_size, (count, TINY.seq_len + 1))
    weights = (rng.random((count, TINY.seq_len)) > 0.3).astype(np.float32)
    return tokens[:, :-1], tokens[:, 1:], weights


def shown(err, what):
    """The words after `what` in stderr: a command to type."""
    line = next(line for line in err.splitlines() if line.startswith(what))
    return shlex.split(line.removeprefix(what))


class Clock:
    """A clock that stands still but for what `passes` adds: in place of train.py's `time`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic


def own_helps(parser):
    """The help texts of a parser's flags; each must be there and unlike the others."""
    helps = {action.option_strings[0]: (action.help or "").strip() for action in parser._actions}
    assert all(len(text) > 3 for text in helps.values()), helps
    assert len(set(helps.values())) == len(helps), helps
    return parser.format_help()  # and each can be printed


WORDS = " ".join(islice(stories.generate(1), 60)).split(" ")


def write_llama2c(folder):
    """A tiny model and tokenizer in the formats of llama2.c: its bytes, and two words."""
    C, F, L, H, V, T = 8, 16, 1, 2, 262, 16
    shapes = [(V, C), (L, C), *4 * [(L, C, C)], (L, C), *3 * [(L, C, F)], (C,), *2 * [(T, C // H // 2)]]
    values = 0.1 * np.random.default_rng(0).standard_normal(sum(map(math.prod, shapes)))
    header = struct.pack("<7i", C, F, L, H, H, V, T)
    (folder / "model.bin").write_bytes(header + values.astype("<f4").tobytes())
    tokens = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % b for b in range(256)), b"a", b" ", b" a"]
    data = b"".join(struct.pack("<fi", -float(i), len(token)) + token for i, token in enumerate(tokens))
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 8) + data)


def llama2c_file(path, cfg, flat):
    """Our parameters as llama2.c's version 0 writes them: seven int32, then tensors (out, in), rotations among them."""
    p = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers)
    C, F, L, H, G, D = cfg.width, cfg.hidden, cfg.layers, cfg.heads, cfg.kv_heads, cfg.head_width
    names = ("norm1_w", "qkv_w", "out_w", "norm2_w", "up_w", "down_w")
    stacked = {name: np.stack([layer[name] for layer in p["layers"]]) for name in names}
    q, k, v = np.split(stacked["qkv_w"], [H * D, (H + G) * D], 2)
    gate, value = np.split(stacked["up_w"], 2, 2)
    matrices = [q, k, v, stacked["out_w"]], [gate, stacked["down_w"], value]
    angles = np.zeros((cfg.seq_len, D // 2))
    parts = [p["embed_w"], stacked["norm1_w"], *(x.swapaxes(1, 2) for x in matrices[0]), stacked["norm2_w"]]
    parts += [*(x.swapaxes(1, 2) for x in matrices[1]), p["norm_w"], angles, angles]
    parts += [] if cfg.tied else [p["head_w"]]
    vocabulary = cfg.vocab_size if cfg.tied else -cfg.vocab_size
    data = struct.pack("<7i", C, F, L, H, G, vocabulary, cfg.seq_len)
    path.write_bytes(data + b"".join(np.ascontiguousarray(x, "<f4").tobytes() for x in parts))


# -- text that is hard to split, tokenizers

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
    batch = fast.words.Batch(segments)
    ids = tokenizer.compiled(bpe.LONG).encode(batch).tolist()
    found, start = [], 0
    for _ in texts:  # the specials are text here, so that END only ends
        stop = ids.index(tokenizer.end, start)
        found.append(ids[start:stop])
        start = stop + 1
    assert start == len(ids)
    return found


def by_python(tokenizer, text, allowed=()):
    """The ids of a text of any length without compiled code."""
    segments = tokenizer.segments(bpe.bytes_of(text), tokenizer.special_names("allowed", allowed))
    return np.concatenate([ids for ids, _, _ in tokenizer._encode(segments, 0)]).tolist()


def train_compiled(texts, num_merges, **more):
    """bpe.train by fast/merges.py, however short the texts are."""
    return fast.merges.train(bpe.as_pieces(texts), num_merges, **more)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def run_main(args):
    """bpe.py's status with these arguments, in this process."""
    try:
        return bpe.main(list(args))
    except SystemExit as done:
        return done.code


def replace_in_place(path, data):
    """Give a file another content; its size and mtime stay the same."""
    before = os.stat(path)
    assert len(data) == before.st_size and data != Path(path).read_bytes()
    Path(path).write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# -- small models in the format of `transformers`

OF_ALL = {"vocab_size": 11, "hidden_size": 6, "num_attention_heads": 3, "layer_norm_epsilon": 1e-5}
CONFIGS = {
    "gpt2": {"n_positions": 5, "n_layer": 2, "activation_function": "gelu_new", "scale_attn_weights": True},
    "gpt_neo": {
        "max_position_embeddings": 5, "num_layers": 2, "activation_function": "gelu_new", "window_size": 3,
        "attention_types": [[["global", "local"], 1]], "intermediate_size": 7,
    },
    "llama": {
        "max_position_embeddings": 5, "num_hidden_layers": 2, "intermediate_size": 7, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "tie_word_embeddings": True,
    },
    "qwen3": {
        "max_position_embeddings": 5, "num_hidden_layers": 2, "intermediate_size": 7, "rms_norm_eps": 1e-5,
        "rope_theta": 100.0, "head_dim": 4, "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
    "bloom": {"n_layer": 2, "seq_length": 5},
}  # fmt: skip


def transformers_files(family):
    """{name: content}: config.json and model.safetensors of a small model of this family."""
    config = {"model_type": family, **OF_ALL, **CONFIGS[family]}
    cfg = tinygpt.Config(vocab_size=11, tied=True, **convert.FAMILIES[family](config)[0])
    return folder_files(config, cfg, TABLES[family])


def own_files():
    """The same of a model that brings a class of ours."""
    shape = dict(vocab_size=11, seq_len=5, width=6, layers=2, heads=3, hidden=7)
    cfg = tinygpt.Config(**shape, positions="rope", qk_norm=True, embedding_norm=True)
    return folder_files(convert.own_config(cfg), cfg, convert.own_table(cfg))


def folder_files(config, cfg, table):
    flat = np.random.default_rng(0).standard_normal(tinygpt.count_parameters(cfg)[0], np.float32)
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors_from(cfg, flat, table).items():
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    text = json.dumps(header).encode()
    files = {"config.json": json.dumps(config).encode()}
    return files | {"model.safetensors": struct.pack("<Q", len(text)) + text + data}


def sentencepiece_file(tokenizer):
    """A .model of SentencePiece with the tokens of a `SpacedTokenizer`."""

    def field(number, value):  # of a message: bytes, or a small number
        if isinstance(value, int):
            return bytes([number << 3, value])
        size = bytes([len(value)]) if len(value) < 128 else bytes([len(value) & 127 | 128, len(value) >> 7])
        return bytes([number << 3 | 2]) + size + value

    kinds = {i: 6 for i in tokenizer._byte_ids} | {i: 3 for i in tokenizer.specials.values()} | {0: 2}
    ranks, data = {new: rank for rank, new in tokenizer._ranks.values()}, b""
    for i, string in enumerate(tokenizer.strings()):
        score = b"\x15" + struct.pack("<f", -ranks.get(i, 0))
        data += field(1, field(1, string.encode()) + score + field(3, kinds.get(i, 1)))
    trainer = field(3, 2) + bytes([35 << 3 & 127 | 128, 35 << 3 >> 7, 1])
    return data + field(2, trainer) + field(3, field(1, b"identity") + field(4, 0))


@contextlib.contextmanager
def serving(model, **options):
    """A server on a free port of this machine, with the engine that it computes on; `options` of `Engine`, `Server`."""
    engine_options = {name: options.pop(name) for name in ("streams", "queue") if name in options}
    engine = Engine(model, tinygpt.find_ops(), **engine_options)
    server = serve.Server(engine, "tiny", port=0, **options)
    thread = threading.Thread(target=lambda: asyncio.run(server.run()))
    engine.start()
    thread.start()
    try:
        assert server.ready.wait(30)
        yield server
    finally:
        server.loop.call_soon_threadsafe(server.stop.set)
        thread.join(30)
        engine.close()
        engine.join(30)
        assert not thread.is_alive() and not engine.is_alive()
