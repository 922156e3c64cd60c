"""Matrices in int8 for decoding: `quantize` and `dequantize` are the specification, `multiply_int8_panels` the kernel.

Groups of 64 weights along the input share one scale, as in llama2.c: 8.5 bits a weight instead of 32. Activations and
sums stay float32, so decoding with int8 is decoding with the dequantised weights, to rounding. The order of a sum is
that of its groups: bytes do not depend on threads. decode.py calls the kernel; steps.py packs what it reads.
"""

import numpy as np
from numba import njit

from fast.memory import vector
from fast.products import PANEL_VECTORS, PREFETCH_DISTANCE, VECTOR_BYTES, row_tile
from fast.workspace import blocks

GROUP = 64  # weights along the input with one scale
LARGEST = 127  # of |q|: symmetric, -128 is not used
PANEL_BYTES = PANEL_VECTORS * VECTOR_BYTES  # of a panel's scales for one group
MATRICES = ("qkv_w", "out_w", "up_w", "down_w")  # of a layer; they and the head are quantised, all else is float32

int8_panel = row_tile(1, PANEL_VECTORS, PREFETCH_DISTANCE, narrow=True)

# == 1  specification ==================================================================================================


def quantize(w):
    """w (K, M) -> q (K, M) int8, scales (K/64 rounded up, M): w ~ q * scale, scale = max |w| / 127 of a group."""
    K, M = w.shape
    groups = np.zeros((blocks(K, GROUP), GROUP, M), w.dtype)
    groups.reshape(-1, M)[:K] = w
    scales = np.abs(groups).max(1) / w.dtype.type(LARGEST)  # (K/64, M)
    units = np.divide(groups, scales[:, None], out=np.zeros_like(groups), where=scales[:, None] > 0)
    q = np.rint(units).clip(-LARGEST, LARGEST)  # clip: a subnormal scale has few bits
    return q.reshape(-1, M)[:K].astype(np.int8), scales


def dequantize(q, scales):
    """q (K, M), scales (K/64 rounded up, M) -> w (K, M) in the dtype of the scales."""
    return q * np.repeat(scales, GROUP, 0)[: len(q)]


def list_matrices(p, cfg):
    """Views (K, M) of the matrices that are quantised, in the order in which a token reads them."""
    matrices = [layer[name] for layer in p["layers"] for name in MATRICES]
    return [*matrices, p["embed_w" if cfg.tied else "head_w"].T]


def round_weights(p, cfg):
    """w = dequantize(*quantize(w)) for these matrices, in place. A tied embedding is the head's matrix."""
    for w in list_matrices(p, cfg):
        w[:] = dequantize(*quantize(w))


# == 2  what the kernel reads ==========================================================================================


def pack_int8(w, panel):
    """w (K, M) -> bytes: for each panel of columns and each group of rows its scales, then its q, row after row."""
    K, M = w.shape
    wide = np.zeros((K, blocks(M, panel) * panel), w.dtype)
    wide[:, :M] = w
    q, scales = quantize(wide)
    out = []
    for low in range(0, wide.shape[1], panel):
        for group in range(len(scales)):
            rows = q[group * GROUP : (group + 1) * GROUP, low : low + panel]
            out += [scales[group, low : low + panel].tobytes(), rows.tobytes()]
    return np.frombuffer(b"".join(out), np.uint8)


# == 3  product of one row =============================================================================================


@njit(inline="always")
def multiply_int8_panels(model, stage, source, first, last, scratch, zero):
    """Panels first .. last - 1 of y = source w + b, or y += source w + b, with w packed by `pack_int8`."""
    size, panel, K = model.itemsize, model.panel, stage.K
    row, sums = vector(scratch, panel, zero), vector(scratch + PANEL_BYTES, panel, zero)
    at = stage.weights + first * (blocks(K, GROUP) * PANEL_BYTES + K * panel)
    for low in range(first * panel, min(last * panel, stage.columns), panel):
        width = min(panel, stage.columns - low)
        y, b = vector(stage.y + low * size, width, zero), vector(stage.bias + low * size, width, zero)
        for c in range(panel):
            row[c] = zero
        for k in range(0, K, GROUP):
            rows, scales = min(GROUP, K - k), vector(at, panel, zero)
            x, w, to = source + k * size, at + PANEL_BYTES, scratch + PANEL_BYTES
            int8_panel(x, 0, w, 0, panel, model.zeros, to, 0, rows, zero)
            for c in range(panel):
                row[c] += sums[c] * scales[c]
            at += PANEL_BYTES + rows * panel
        for c in range(width):
            total = row[c] + b[c] if stage.bias != 0 else row[c]
            y[c] = y[c] + total if stage.adds else total
