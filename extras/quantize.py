"""Matrices in int8, for `--quantize int8` of sample.py and extras/evaluate.py. fast/int8.py has the specification.

python sample.py --quantize int8 --prompt "Lily found"
python extras/evaluate.py runs/1m/best.safetensors --data tinystories-valid.txt --quantize int8
"""

import dataclasses

from bpe import note


def int8():
    """fast/int8.py; ValueError where fast/ is not here."""
    try:
        from fast import int8
    except ImportError as error:
        raise ValueError(f"--quantize int8 needs the kernels of fast/: {error}") from None
    return int8


def round_model(p, cfg):
    """Round the matrices of p to int8, in place, and print what a token then reads."""
    of = int8()
    before = sum(w.nbytes for w in of.list_matrices(p, cfg))
    after = sum(x.nbytes for w in of.list_matrices(p, cfg) for x in of.quantize(w))
    of.round_weights(p, cfg)
    note(f"int8: {after / 1e6:.2f} MB of matrices a token, {before / 1e6:.2f} in float32")


def quantize_models(models, ops):
    """Round the matrices of models (parameters, `Config`, tokenizer), in place -> the table to decode with: `fast`
    reads int8, others the dequantised weights."""
    for p, cfg, _ in models:
        round_model(p, cfg)
    if not ops.steps:
        return ops
    from fast.steps import Int8Steps

    return dataclasses.replace(ops, steps=Int8Steps)
