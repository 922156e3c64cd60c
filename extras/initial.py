"""A run that begins with a trained model: python train.py --init-from runs/1m/best.safetensors --data other.txt"""

from dataclasses import asdict

import numpy as np

import bpe
import sample
import tinygpt
from extras import data

DROPOUTS = ("embed_dropout", "attention_dropout", "out_dropout", "mlp_dropout")


def load_initial_model(args):
    """--init-from -> (Config, Tokenizer, float32 parameters) of the model that a run begins with.

    ValueError for a flag that contradicts it. Dropout is the run's own.
    """
    path = args.init_from
    checkpoint, tokenizer = sample.load_model(path, args.tokenizer)
    cfg, wanted = checkpoint.cfg, tinygpt.overrides(args.set or [])
    said = [(f"--set {name}={value}", name, value) for name, value in wanted.items()]
    if args.size:
        size = tinygpt.find_size(args.size).changed(vocab_size=cfg.vocab_size, seq_len=cfg.seq_len, init=cfg.init)
        said += [(f"--size {args.size}", name, value) for name, value in asdict(size).items()]
    for flag, name, value in said:
        if name not in DROPOUTS and value != getattr(cfg, name):
            has = f"whose model has {name}={getattr(cfg, name)}"
            raise ValueError(f"{flag} contradicts {path}, {has}; leave it out, or train without --init-from")
    if args.vocab_size not in (None, tokenizer.vocab_size):
        has = f"whose tokenizer has {tokenizer.vocab_size} tokens"
        raise ValueError(f"--vocab-size {args.vocab_size} contradicts {path}, {has}; leave it out")
    for paths in (args.data, args.val_data):
        check_vocabulary(paths or [], tokenizer, path)
    cfg = cfg.changed(**{name: wanted.get(name, 0.0) for name in DROPOUTS})
    return with_seq_len(cfg, args.seq_len or cfg.seq_len), tokenizer, checkpoint.parameters.astype(np.float32)


def with_seq_len(cfg, seq_len):
    """cfg with windows of this length. ValueError if a learned table of positions is shorter."""
    if cfg.positions == "learned" and seq_len > cfg.position_rows:
        raise ValueError(f"--seq-len {seq_len} is above the {cfg.position_rows} positions that the model has learned")
    return cfg.changed(seq_len=seq_len, position_rows=cfg.position_rows if cfg.positions == "learned" else 0)


def check_vocabulary(paths, tokenizer, model):
    """ValueError for token files that are not of this model's tokenizer."""
    for path in paths if data.are_token_files(paths) else ():
        if bpe.read_tokens(path)[1].get("tokenizer_hash") != tokenizer.hash:
            other = f"{path} was written with another vocabulary than that of {model}"
            raise ValueError(f"{other}; name the text itself, which is then encoded with the model's")
