"""Tier 3: the sublayers of tinygpt.py, section 3, at the limit of the machine.

    import tinygpt
    ops = tinygpt.find_ops("fast")              # or ("fast", "bfloat16"), where the processor multiplies bf16 faster

`FLOAT32` and `BFLOAT16` are the tables; each sublayer, `..._fast`, keeps the contract of the function of section 3 that
it replaces.

Blocks of rows travel through a sublayer while they are in a core's cache. A kernel is sequential and does one task of
many: `kernel(task, slot, ..., work)` for task 0 .. count - 1, driven by a pool of threads without the interpreter's
lock; work = (scratch, drivers) is what its threads work in, and who multiplies for them if it is not `product`.
Every task owns what it writes, and sums run in an order that neither threads nor micro-batches change:
  - an element of a product is one chain of fused multiply-adds in the order of k;
  - a weight gradient continues, row after row, the chain that the rows before it left;
  - gains and biases of a norm are summed within blocks of a sequence's rows, the blocks in the order of rows.

Read in this order:

    jit        how kernels are compiled             rows       exp, norms, activations, dropout
    threads    how kernels are run                  embed      \
    memory     elements and arrays at addresses     attention   | the sublayers, forward and backward
    products   matrix products                      mlp         |
    workspace  the buffers of the sublayers         head       /
    panels     products with weights, gradients     decode     one token after another; draw, which chooses it; int8
    bf16       products in bf16: pack, what they read, and innermost, the instructions (AMX, VDPBF16PS)
    words      long texts to ids, and merges, which trains a tokenizer: for bpe.py
"""

import dataclasses
from pathlib import Path

import numpy as np
from numba.core.caching import FunctionCache

import tinygpt
from fast import attention, bf16, panels
from fast.attention import attention_layer_backward_fast, attention_layer_forward_fast
from fast.bf16 import find_bf16
from fast.embed import embed_backward_fast, embed_forward_fast
from fast.head import head_kernel, head_logits_fast, head_loss_fast
from fast.jit import STAMP
from fast.mlp import mlp_layer_backward_fast, mlp_layer_forward_fast
from fast.steps import Int8Steps, Steps
from fast.threads import POOL, kernel, serve
from fast.workspace import make_workspace, workspace_layout
from tinygpt import Ops, Pair, init_parameters, layout, loss_and_gradients, views, zero_gradients

__all__ = [
    "BFLOAT16",
    "FLOAT32",
    "INT8",
    "POOL",
    "compile_half",
    "find_bf16",
    "is_compiled",
    "kernel",
    "table",
    "workspace_layout",
]

FLOAT32 = Ops(
    "fast",
    embed=Pair(embed_forward_fast, embed_backward_fast),
    attention_layer=Pair(attention_layer_forward_fast, attention_layer_backward_fast),
    mlp_layer=Pair(mlp_layer_forward_fast, mlp_layer_backward_fast),
    head_logits=head_logits_fast,
    head_loss=head_loss_fast,
    steps=Steps,
    make_space=make_workspace,
)
# what reads or writes no large matrix stays in float32: the embedding, `head_logits`, decoding
INT8 = dataclasses.replace(FLOAT32, steps=Int8Steps)  # decoding alone: give it parameters of `round_weights`
BFLOAT16 = dataclasses.replace(FLOAT32, make_space=bf16.make_bf16_workspace)


def table(dtype="float32"):
    """The table whose products are in this dtype; ValueError with the reason if this machine has none."""
    if dtype == "bfloat16" and (reason := find_bf16()[1]):
        raise ValueError(f"no products in bfloat16: {reason}")
    return {"float32": FLOAT32, "bfloat16": BFLOAT16}[dtype]


def is_compiled():
    """True if Numba's cache has kernels of this package as it is, or can keep none."""
    try:
        return any(Path(FunctionCache(head_kernel.py_func).cache_path).glob(f"*.head_kernel-{STAMP}-*.nbc"))
    except RuntimeError:  # no folder can be written
        return True


FIRST_HALF = {  # of the time to compile all kernels that train
    function.__name__
    for function in (
        *(attention.qkv_kernel, attention.attention_kernel, attention.attention_backward_kernel),
        *(attention.linear_residual_kernel, attention.linear_backward_kernel, attention.linear_norm_backward_kernel),
        *(panels.weight_gradient_kernel, panels.panels_kernel),
    )
}


def compile_half(cfg, half):
    """Compile kernels that train a model, a small one, in float32 into Numba's cache: those of FIRST_HALF (half 0) or
    all others (half 1). Two processes take half of the time of one; nothing runs in them: 24 s of one core's time, 45
    before."""
    POOL.compiles = lambda name: (name in FIRST_HALF) == (half == 0)
    p, (_, g) = views(layout(cfg), init_parameters(cfg, 0), cfg.layers), zero_gradients(cfg)
    tokens, ops = np.zeros((2, cfg.seq_len), np.int64), tinygpt.with_buffers(FLOAT32, cfg, 2, cfg.seq_len)
    loss_and_gradients(p, tokens, tokens, np.ones(tokens.shape, np.float32), g, cfg, ops)
    if half == 1:
        serve(POOL.words.ctypes.data, 1, 0, 0, False)  # which compiles it; without looks, it returns at once
