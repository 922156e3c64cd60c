"""Weights copied for `product`, and gradients of weights: `linear_forward` and `linear_backward` of section 2.1.

It replaces what `product_kernel` of tinygpt.py, section 6, does for each of its blocks: copying b.

- A weight meets many blocks of rows, so it is copied once per use, into panels that a register tile reads from one end
  to the other. With bf16 products, a product of 96 rows with 512 x 512 weights, the innermost block aside, took 61 us
  when each block of rows packed them, now 11. In float32 it was not measured alone.
- A weight's gradient is summed in copies of its blocks, which stay in the cache of one thread while all rows pass: rows
  of dw stand powers of two apart, of which a cache keeps few. x stands by columns (`x_T`) where the kernel before left
  it, so that nothing is transposed here. For bf16, dy is packed once for all blocks. On AMD Zen 4, one thread, 2,016
  rows, 512 x 2,048: 147 -> 192 GFLOP/s in bf16.

Read in order: packing by a driver, panels of a weight, products with them, the gradient.
"""

import math

import numpy as np

from fast.jit import inlined
from fast.products import TILE_VECTORS, VECTOR_BYTES, copy_rows, dispatch, product, transpose_rows
from fast.threads import POOL, kernel
from fast.workspace import (
    GRADIENT_HEIGHT,
    GRADIENT_WIDTH,
    HIDDEN_BLOCK,
    PACK_BLOCK,
    block_rows,
    blocks,
    carve,
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


# Of a weight gradient: rows and columns of the blocks that a thread sums, the largest first.
GRADIENT_BLOCKS = ((GRADIENT_HEIGHT, GRADIENT_WIDTH), (132, 128), (66, 128), (66, 64))
BF16_GRADIENT_BLOCKS = ((128, GRADIENT_WIDTH), (64, 128), (32, 64))


@inlined
def take_block(dw, block, shape, room):
    """Block number `block` of dw, column after column -> its first row and column, a view, a copy in the room."""
    per_column = (dw.shape[0] + shape[0] - 1) // shape[0]
    k, m = block % per_column * shape[0], block // per_column * shape[1]
    view = dw[k : min(k + shape[0], dw.shape[0]), m : min(m + shape[1], dw.shape[1])]
    copy, _ = carve(room, view.shape)
    copy_rows(view, copy)
    return k, m, view, copy


@kernel
def weight_gradient_kernel(task, slot, shape, block_range, x_T, T, dy, dw, db, ones, work):
    """dw (K, M) += x (N, K)^T dy (N, M), where x_T (blocks, K', size) has the rows of a block side by side; db (1, M)
    += sum_n dy. A task owns some blocks of dw, block_range = (all, in a task), and db above the first of a column."""
    panel, room = thread_scratch(work, slot)
    for block in range(task * block_range[1], min((task + 1) * block_range[1], block_range[0])):
        k, m, view, c = take_block(dw, block, shape, room)
        height, width = c.shape
        for rows in range(len(x_T)):
            start, stop = block_rows(rows, T, x_T.shape[2])
            dy_rows = dy[start:stop, m : m + width]
            product(x_T[rows, k : k + height, : stop - start], dy_rows, c, True, panel)
            if k == 0 and db.size > 0:
                product(ones[: stop - start].reshape(1, stop - start), dy_rows, db[:, m : m + width], True, panel)
        copy_rows(c, view)


@kernel
def pack_gradient_kernel(task, slot, per_task, first, T, dy, packed, db, ones, work):
    """`per_task` columns of dy (N, M), from row block `first` on, packed as right operands: packed (count,
    M' / width, size, width); db (1, M) += their sum_n."""
    (count, _, size, width), (panel, _) = packed.shape, thread_scratch(work, slot)
    m_first, m_last = per_task * task, min(per_task * (task + 1), dy.shape[1])
    for rows in range(count):
        start, stop = block_rows(first + rows, T, size)
        for m in range(m_first, m_last, PACK_BLOCK):
            dy_rows = dy[start:stop, m : min(m + PACK_BLOCK, m_last)]
            pack_operand(dy_rows, False, False, packed[rows, m // width], m % width, panel[1])
        if db.size > 0:
            dy_rows, db_columns = dy[start:stop, m_first:m_last], db[:, m_first:m_last]
            product(ones[: stop - start].reshape(1, stop - start), dy_rows, db_columns, True, panel)


@kernel
def packed_gradient_kernel(task, slot, shape, block_range, first, T, x_T, packed, dw, work):
    """dw (K, M) += x^T dy as above, of the row blocks of `pack_gradient_kernel`."""
    panel, room = thread_scratch(work, slot)
    for block in range(task * block_range[1], min((task + 1) * block_range[1], block_range[0])):
        k, m, view, c = take_block(dw, block, shape, room)
        for rows in range(len(packed)):
            start, stop = block_rows(first + rows, T, x_T.shape[2])
            x_rows = x_T[first + rows, k : k + len(c), : stop - start]
            product(x_rows, packed[rows, m // shape[1]], c, True, panel)
        copy_rows(c, view)


def weight_gradient(x_T, T, dy, dw, db, space):
    """dw += x^T dy, in blocks of a shape that gives every thread work; db += sum_n dy, where db is not None."""
    work, (count, _, size), M = work_of(space), x_T.shape, dw.shape[1]
    for shape in BF16_GRADIENT_BLOCKS if uses_bf16(work) else GRADIENT_BLOCKS:  # larger blocks copy less
        number = math.prod(map(blocks, dw.shape, shape))
        if number >= 2 * POOL.threads:
            break
    block_range = number, blocks(number, 4 * POOL.threads)
    tasks, ones = blocks(*block_range), constant(1, size, dw.dtype.name)
    db = np.empty((1, 0), dw.dtype) if db is None else db.reshape(1, -1)
    if not uses_bf16(work):
        POOL.run(weight_gradient_kernel, tasks, shape, block_range, x_T, T, dy, dw, db, ones, work)
        return
    room = space["panels"].view({4: np.uint16, 8: np.float64}[dw.itemsize])  # of packed elements
    columns, width = blocks(M, shape[1]), shape[1]
    per_task = blocks(M, 4 * POOL.threads * PACK_BLOCK) * PACK_BLOCK
    at_once = min(count, room.size // (size * columns * width))
    for first in range(0, count, at_once):
        rows = min(at_once, count - first)
        packed = room[: rows * size * columns * width].reshape(rows, columns, size, width)
        POOL.run(pack_gradient_kernel, blocks(M, per_task), per_task, first, T, dy, packed, db, ones, work)
        POOL.run(packed_gradient_kernel, tasks, shape, block_range, first, T, x_T, packed, dw, work)
