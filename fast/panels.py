"""Weights copied for `product`, and gradients of weights: `linear_forward` and `linear_backward` of section 2.1.

It replaces what `product_kernel` of tinygpt.py, section 6, does for each of its blocks: copying b.

- A weight meets many blocks of rows, so it is copied once per use, into panels that a register tile reads from one end
  to the other. With bf16 products, a product of 96 rows with 512 x 512 weights, the innermost block aside, took 61 us
  when each block of rows packed them, now 11. In float32 it was not measured alone.
- A weight's gradient is summed in blocks that one thread owns and that stay in its cache; x stands by columns (`x_T`)
  where the kernel before left it, so that nothing is transposed here. Not measured alone.

Read in order: packing by a driver, panels of a weight, products with them, the gradient.
"""

import math

import numpy as np

from fast.jit import inlined
from fast.products import TILE_VECTORS, VECTOR_BYTES, copy_rows, dispatch, product, transpose_rows
from fast.threads import POOL, kernel
from fast.workspace import (
    HIDDEN_BLOCK,
    PACK_BLOCK,
    block_rows,
    blocks,
    constant,
    packed_length,
    thread_scratch,
    uses_bf16,
    work_of,
)


@inlined
def pack_operand(w, transposed, left, out, first, driver):
    """Let the driver pack w (K, M), or w^T of w (M, K) if `transposed`, into `out` in its own order: as a left operand
    if `left`, else as a right one, from column `first` on. False if there is no driver."""
    row, column = (w.strides[1], w.strides[0]) if transposed else (w.strides[0], w.strides[1])
    K, M = (w.shape[1], w.shape[0]) if transposed else (w.shape[0], w.shape[1])
    place = (out.ctypes.data, out.strides[0], first)
    return driver != 0 and dispatch(driver, (w.ctypes.data, row, column, *place, K, M, int(left)))


@kernel
def panels_kernel(task, slot, w, transposed, per_part, width, piece, panels, work):
    """Copy or pack `piece` columns of w into their panel; w has parts of `width` columns, each of `per_part` pieces."""
    columns, at = panels.shape[2], task % per_part * piece
    first = task // per_part * width + at
    last = min(first + piece, (task // per_part + 1) * width)
    whole, at = panels[task // per_part * blocks(width, columns) + at // columns], at % columns
    w_piece, ((_, driver), _) = w[first:last] if transposed else w[:, first:last], thread_scratch(work, slot)
    if pack_operand(w_piece, transposed, False, whole, at, driver):
        return
    if transposed:
        transpose_rows(w_piece, whole[:, at : at + piece])
    else:
        copy_rows(w_piece, whole[:, at : at + piece])


def panels_of(w, space, transposed=False, parts=1, first=0):
    """w (K, M), or w^T of w (M, K) if `transposed`, by panels as wide as a register tile: (blocks, K, columns), in the
    space from element `first` on; each of the `parts` of the columns begins a new panel."""
    columns = piece = TILE_VECTORS * VECTOR_BYTES // w.itemsize
    (K, M), work = w.shape[::-1] if transposed else w.shape, work_of(space)
    if uses_bf16(work):
        columns, piece, K = min(HIDDEN_BLOCK, packed_length(M // parts)), PACK_BLOCK, packed_length(K)
    width = M // parts
    panels = space["panels"][first : first + parts * blocks(width, columns) * columns * K].reshape(-1, K, columns)
    pieces = blocks(width, piece)
    POOL.run(panels_kernel, parts * pieces, w, transposed, pieces, width, piece, panels, work)
    return panels


@inlined
def product_of_panels(a, panels, c, add, panel):
    """c (M, N) = a (M, K) b, or c += a b if `add`; b (K, N) by panels (blocks, K, columns)."""
    columns = panels.shape[2]
    for j in range(len(panels)):
        c_columns = c[:, j * columns : (j + 1) * columns]
        product(a, panels[j, :, : c_columns.shape[1]], c_columns, add, panel)


@inlined
def pack_transposed(x, x_T, driver):
    """x_T (K, size) = x (rows, K)^T, packed as a left operand."""
    if not pack_operand(x, True, True, x_T, 0, driver):
        transpose_rows(x, x_T)


GRADIENT_BLOCKS = ((132, 256), (132, 128), (66, 128), (66, 64))  # of a weight gradient: rows, columns
BF16_GRADIENT_BLOCKS = ((256, 512), (128, 256), (64, 128), (64, 64))  # where packing takes the time
GRADIENT_CHUNK = 1 << 17  # elements of x and dy that stay in a core's cache while all blocks of a task read them


@kernel
def weight_gradient_kernel(task, slot, shape, per_task, x_T, T, dy, dw, db, ones, work):
    """dw (K, M) += x (N, K)^T dy (N, M), where x_T (blocks, K', size) has the rows of a block side by side; db (1, M)
    += sum_n dy. A task owns `per_task` blocks of dw of a shape, column after column, and the part of db above the first
    of each column."""
    (count, _, size), (K, M), (panel, _) = x_T.shape, dw.shape, thread_scratch(work, slot)
    at_once, per_column = max(1, GRADIENT_CHUNK // ((K + M) * size)), (K + shape[0] - 1) // shape[0]
    last_block = min((task + 1) * per_task, per_column * ((M + shape[1] - 1) // shape[1]))
    for first in range(0, count, at_once):
        for block in range(task * per_task, last_block):
            k, m = block % per_column * shape[0], block // per_column * shape[1]
            k_end, m_end = min(k + shape[0], K), min(m + shape[1], M)
            for rows in range(first, min(first + at_once, count)):
                start, stop = block_rows(rows, T, size)
                dy_rows = dy[start:stop, m:m_end]
                product(x_T[rows, k:k_end, : stop - start], dy_rows, dw[k:k_end, m:m_end], True, panel)
                if k == 0 and db.size > 0:
                    product(ones[: stop - start].reshape(1, stop - start), dy_rows, db[:, m:m_end], True, panel)


def weight_gradient(x_T, T, dy, dw, db, work):
    """`weight_gradient_kernel` in blocks of a shape that gives every thread work; db may be None."""
    shapes = BF16_GRADIENT_BLOCKS if uses_bf16(work) else GRADIENT_BLOCKS
    for shape in shapes:  # larger blocks copy less; but there must be enough for all threads
        count = math.prod(map(blocks, dw.shape, shape))
        if count >= 2 * POOL.threads:
            break
    per_task, db = blocks(count, 4 * POOL.threads), np.empty((1, 0), dw.dtype) if db is None else db.reshape(1, -1)
    ones = constant(1, x_T.shape[2], dw.dtype.name)
    POOL.run(weight_gradient_kernel, blocks(count, per_task), shape, per_task, x_T, T, dy, dw, db, ones, work)
