"""Weights copied for `product`, and gradients of weights: section 2.1 as the sublayers use it.

The idea: a weight meets many blocks of rows, so it is copied once per use into panels, which a register tile reads from
one end to the other; a weight's gradient is summed in blocks that one thread owns and that stay in its cache. Read in
order: panels of a weight, products with them, the gradient.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fast.jit import part
from fast.memory import word_at
from fast.products import (
    HEADER_BYTES,
    PANEL_SIZE,
    TILE_VECTORS,
    VECTOR_BYTES,
    ask,
    copy_rows,
    parts_of,
    product,
    transpose_rows,
)
from fast.threads import POOL, kernel
from fast.workspace import HIDDEN_BLOCK, LAID, block_rows, blocks, constant, laid_size, scratch_of


@intrinsic
def laid_elsewhere(typing_context, w, turned, left, out, first, panel):
    """Ask who makes products to lay w (K, M), or w^T of w (M, K) if `turned`, into `out` in a way of his own: as what
    stands on the left of a product if `left`, else on its right, in columns `first` on. Whether he did."""

    def build(context, builder, signature, args):
        w_value, is_turned, is_left, out_value, first_column, panel_value = args
        at, down, right, (shape, _) = parts_of(context, builder, (w, out), (w_value, out_value))
        pairs = (right[0], down[0]), (down[0], right[0]), shape[::-1], shape
        w_k, w_m, K, M = (builder.select(is_turned, *pair) for pair in pairs)
        header = builder.ptrtoint(context.make_array(panel)(context, builder, panel_value).data, ir.IntType(64))
        side = builder.zext(is_left, ir.IntType(64))
        operands = (at[0], w_k, w_m, at[1], down[1], first_column, K, M, side, header)
        return ask(builder, word_at(builder, header, 1), operands)

    return types.boolean(w, types.boolean, types.boolean, out, types.intp, panel), build


@kernel
def panels_kernel(task, slot, w, turned, per_part, width, piece, panels, scratch):
    """A piece of some columns of a panel of `panels_of`, of part task // per_part of w's columns, of `width` each."""
    columns, at = panels.shape[2], task % per_part * piece
    first = task // per_part * width + at
    last = min(first + piece, (task // per_part + 1) * width)
    whole, at = panels[task // per_part * blocks(width, columns) + at // columns], at % columns
    w_piece = w[first:last] if turned else w[:, first:last]
    if laid_elsewhere(w_piece, turned, False, whole, at, scratch[slot, :PANEL_SIZE]):
        return
    if turned:
        transpose_rows(w_piece, whole[:, at : at + piece])
    else:
        copy_rows(w_piece, whole[:, at : at + piece])


def uses_bf16(scratch):
    """True if products with this scratch go through the driver of bf16.py."""
    return scratch[0, : HEADER_BYTES // scratch.itemsize].any()


def panels_of(w, space, turned=False, parts=1, first=0):
    """w (K, M), or w^T of w (M, K) if `turned`, by panels as wide as a register tile: (blocks, K, columns), in the
    space from element `first` on; a part of the columns begins with a panel of its own."""
    columns = piece = TILE_VECTORS * VECTOR_BYTES // w.itemsize
    K, M = w.shape[::-1] if turned else w.shape
    if uses_bf16(space["scratch"]):
        columns, piece, K = min(HIDDEN_BLOCK, laid_size(M // parts)), LAID, laid_size(K)
    width = M // parts
    panels = space["panels"][first : first + parts * blocks(width, columns) * columns * K].reshape(-1, K, columns)
    pieces = blocks(width, piece)
    POOL.run(panels_kernel, parts * pieces, w, turned, pieces, width, piece, panels, scratch_of(space))
    return panels


@part
def product_of_panels(a, panels, c, add, panel):
    """c (M, N) = a (M, K) b, or c += a b if `add`; b (K, N) by panels (blocks, K, columns)."""
    columns = panels.shape[2]
    for j in range(len(panels)):
        c_columns = c[:, j * columns : (j + 1) * columns]
        product(a, panels[j, :, : c_columns.shape[1]], c_columns, add, panel)


@part
def lay_turned(x, x_T, panel):
    """x_T (K, size) = x (rows, K)^T, as it stands on the left of a product."""
    if not laid_elsewhere(x, True, True, x_T, 0, panel):
        transpose_rows(x, x_T)


GRADIENT_BLOCKS = ((132, 256), (132, 128), (66, 128), (66, 64))  # of a weight gradient: rows, columns
TILED_GRADIENT_BLOCKS = ((256, 512), (128, 256), (64, 128), (64, 64))  # where packing takes the time
GRADIENT_CHUNK = 1 << 17  # elements of x and dy that stay in a core's cache while a task's blocks take their share


@kernel
def weight_gradient_kernel(task, slot, shape, per_task, x_T, T, dy, dw, db, ones, scratch):
    """dw (K, M) += x (N, K)^T dy (N, M), where x_T (blocks, K', size) has the rows of a block side by side; db (1, M)
    += sum_n dy. A task owns `per_task` blocks of dw of a shape, column after column, and the part of db above the first
    of each column."""
    (count, _, size), (K, M) = x_T.shape, dw.shape
    at_once, per_column = max(1, GRADIENT_CHUNK // ((K + M) * size)), (K + shape[0] - 1) // shape[0]
    last_block = min((task + 1) * per_task, per_column * ((M + shape[1] - 1) // shape[1]))
    for first in range(0, count, at_once):
        for block in range(task * per_task, last_block):
            k, m = block % per_column * shape[0], block // per_column * shape[1]
            k_end, m_end = min(k + shape[0], K), min(m + shape[1], M)
            for rows in range(first, min(first + at_once, count)):
                start, stop = block_rows(rows, T, size)
                dy_rows = dy[start:stop, m:m_end]
                product(x_T[rows, k:k_end, : stop - start], dy_rows, dw[k:k_end, m:m_end], True, scratch[slot])
                if k == 0 and db.size > 0:
                    product(ones[: stop - start].reshape(1, stop - start), dy_rows, db[:, m:m_end], True, scratch[slot])


def weight_gradient(x_T, T, dy, dw, db, scratch):
    shapes = TILED_GRADIENT_BLOCKS if uses_bf16(scratch) else GRADIENT_BLOCKS
    for shape in shapes:  # the larger, the less is copied again; but every thread wants some
        count = math.prod(map(blocks, dw.shape, shape))
        if count >= 2 * POOL.threads:
            break
    per_task, db = blocks(count, 4 * POOL.threads), np.empty((1, 0), dw.dtype) if db is None else db.reshape(1, -1)
    ones = constant(1, x_T.shape[2], dw.dtype.name)
    POOL.run(weight_gradient_kernel, blocks(count, per_task), shape, per_task, x_T, T, dy, dw, db, ones, scratch)
