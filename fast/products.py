"""Matrix products: the two in `linear_forward` and `linear_backward` of section 2.1, and all others of the kernels.

It replaces `multiply` and `product_kernel` of tinygpt.py, section 6: four rows of c by four of b in plain loops.

- A tile of c stays in registers while all of k passes (`register_tile`): 24 sums, each a chain of fused multiply-adds,
  so that bytes do not depend on blocks. 85-140 GFLOP/s on a core of an Intel with AMX where NumPy's BLAS has 135, 100
  on AMD Zen 4 where it has 97-106; the plain loops have 63-107 there.
- DEPTH rows of a panel of b are copied to where they stay in the first-level cache; then the tile passes over all rows
  of a (`sweep`). Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication". Not measured alone.
- Narrow panels take tiles of 12 rows, the last rows go by two: a part of the 1.21 of fast/attention.py.
- Product, transposition and copy are compiled once for each dtype and called by name: without, they would be most of
  the machine code of every kernel.

Order: the register tile, `sweep` over the rows of a, `product_at` over panels of b, then how kernels call it.
"""

import functools

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fast.jit import CACHE_LINE, COMPILE, STAMP, callback, compiles_for, inlined
from fast.memory import (
    I8,
    I32,
    I64,
    broadcast,
    load,
    multiply_add,
    peek,
    poke,
    size_of,
    splat,
    store,
    transpose,
    word_at,
)
from fast.threads import POOL

VECTOR_BYTES = 64  # LLVM splits it where registers are narrower
DEPTH = 128  # rows of b that are copied at a time
PANEL_VECTORS = 4  # vectors of a row's panel: four independent sums hide the latency of a multiply-add, four cycles
PREFETCH_DISTANCE = 4096  # bytes between a weight in use and the one that is prefetched
PACK_ROWS = 32  # with fewer rows of a, copying b costs more than it saves
TILE_ROWS = 6
TILE_VECTORS = 4 if compiles_for("avx512f") else 1  # 24 sums: of 32 registers; 12 of 16 on AVX2; 24 of 32 on NEON
BUFFER_SIZE = (DEPTH * TILE_VECTORS + TILE_ROWS) * VECTOR_BYTES // 4  # elements of float32 that `product` works in


def add_products(builder, count, loop, starts, pairs, multiply=multiply_add):
    """LLVM code of a tile: sums[i] = start[i] + sum_k x_i[k] w_i[k], each a chain of fused multiply-adds; -> the sums.

    starts: (block that branches to `loop`, the sums' values there), one or more; pairs(k) yields (x, w), two vectors,
    for each sum; multiply(builder, x, w, sum) is the instruction. The loop runs for k from 0 up to count - 1, at least
    once; the builder ends up behind it."""
    done = builder.append_basic_block("done")
    builder.position_at_end(loop)
    k, sums = builder.phi(I64), [builder.phi(start.type) for start in starts[0][1]]
    grown = [multiply(builder, x, w, total) for (x, w), total in zip(pairs(k), sums)]
    k_next = builder.add(k, I64(1))
    builder.cbranch(builder.icmp_signed("<", k_next, count), loop, done)
    for block, values, at in (*((block, values, I64(0)) for block, values in starts), (loop, grown, k_next)):
        k.add_incoming(at, block)
        for total, value in zip(sums, values):
            total.add_incoming(value, block)
    builder.position_at_end(done)
    return grown


def add_to_c(builder, vector, c_at, add, count, pairs, multiply=multiply_add):
    """LLVM code of a tile: vectors at the addresses c_at become sums of `add_products`, which begin at c or at 0."""
    align = 8 if vector.element == ir.DoubleType() else 4
    zeros = builder.block, [splat(vector, 0.0)] * len(c_at)
    resume, loop = builder.append_basic_block("resume"), builder.append_basic_block("loop")
    builder.cbranch(builder.icmp_signed("!=", add, I64(0)), resume, loop)
    builder.position_at_end(resume)
    before = resume, [load(builder, address, vector, align) for address in c_at]
    builder.branch(loop)
    for total, address in zip(add_products(builder, count, loop, (zeros, before), pairs, multiply), c_at):
        store(builder, total, address, align)


def register_tile(rows, vectors):
    """Numba function (a, a_row, a_k, b, b_k, c, c_row, k, add, zero): `rows` rows of `vectors` vectors of c from k
    columns of a and k rows of b; addresses and strides in bytes, the element type is that of zero, k >= 1.

    for r in rows: c[r] = (c[r] if add else 0) + sum_k a[r, k] * b[k], one fused multiply-add after the other.
    """

    def build(context, builder, signature, args):
        a, a_row, a_k, b, b_k, c, c_row, k_end, add, _ = args
        scalar = context.get_value_type(signature.args[-1])
        size = context.get_abi_sizeof(scalar)
        vector = ir.VectorType(scalar, VECTOR_BYTES // size)

        def vector_addresses(row):
            return [builder.add(row, I64(v * VECTOR_BYTES)) for v in range(vectors)]

        def pairs(k):
            b_at = vector_addresses(builder.add(b, builder.mul(k, b_k)))
            b_row = [load(builder, address, vector, size) for address in b_at]
            for row in a_at:
                x = broadcast(builder, load(builder, builder.add(row, builder.mul(k, a_k)), scalar, size), vector)
                yield from ((x, w) for w in b_row)

        c_rows = [builder.add(c, builder.mul(c_row, I64(r))) for r in range(rows)]
        c_at = [address for row in c_rows for address in vector_addresses(row)]
        a_at = [builder.add(a, builder.mul(a_row, I64(r))) for r in range(rows)]
        add_to_c(builder, vector, c_at, add, k_end, pairs)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, a, a_row, a_k, b, b_k, c, c_row, k, add, zero):
        return types.void(*[types.intp] * 9, zero), build

    return tile


tall_wide, tall_two, tall_one = (register_tile(TILE_ROWS, vectors) for vectors in (TILE_VECTORS, 2, 1))
pair_wide, pair_two, pair_one = (register_tile(2, vectors) for vectors in (TILE_VECTORS, 2, 1))
high_two, high_one = (register_tile(2 * TILE_ROWS, vectors) for vectors in (2, 1))
flat_wide, flat_two, flat_one = (register_tile(1, vectors) for vectors in (TILE_VECTORS, 2, 1))


@inlined
def sweep(a, a_row, a_k, b, b_k, c, c_row, rows, vectors, k, add, zero):
    """A panel of `vectors` vectors of c, all its rows: tall tiles, then the rows that remain by two, then one."""
    if vectors < TILE_VECTORS:  # a narrow tile keeps busy with more rows
        for _ in range(rows // (2 * TILE_ROWS)):
            if vectors == 2:
                high_two(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
            else:
                high_one(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
            a, c = a + 2 * TILE_ROWS * a_row, c + 2 * TILE_ROWS * c_row
        rows %= 2 * TILE_ROWS
    for _ in range(rows // TILE_ROWS):
        if vectors == TILE_VECTORS:
            tall_wide(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        elif vectors == 2:
            tall_two(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        else:
            tall_one(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        a, c = a + TILE_ROWS * a_row, c + TILE_ROWS * c_row
    rows %= TILE_ROWS
    for _ in range(rows // 2):
        if vectors == TILE_VECTORS:
            pair_wide(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        elif vectors == 2:
            pair_two(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        else:
            pair_one(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        a, c = a + 2 * a_row, c + 2 * c_row
    if rows % 2:
        if vectors == TILE_VECTORS:
            flat_wide(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        elif vectors == 2:
            flat_two(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)
        else:
            flat_one(a, a_row, a_k, b, b_k, c, c_row, k, add, zero)


def row_tile(rows, vectors, ahead=0, narrow=False):
    """Numba function (x, x_next, w, w_next, w_row, start, y, y_next, K, zero): `rows` rows, each with its matrix,
    of `vectors` vectors: y = start + sum_k x[k] w[k], one fused multiply-add after the other as in `register_tile`.
    Addresses and distances in bytes, K >= 1. Prefetches w `ahead` bytes ahead; w has 8 bits if narrow."""

    def build(context, builder, signature, args):
        x, x_next, w, w_next, w_row, start, y, y_next, K, _ = args
        scalar = context.get_value_type(signature.args[-1])
        size = context.get_abi_sizeof(scalar)
        vector = ir.VectorType(scalar, VECTOR_BYTES // size)
        kept, step = (ir.VectorType(I8, vector.count), vector.count) if narrow else (vector, VECTOR_BYTES)
        each = [(r, v) for r in range(rows) for v in range(vectors)]

        def place(address, distance, count, more=0):
            return builder.add(builder.add(address, builder.mul(distance, count)), I64(more))

        def pairs(k):
            x_k = []
            for r in range(rows):
                address = place(builder.add(x, builder.mul(x_next, I64(r))), k, I64(size))
                x_k.append(broadcast(builder, load(builder, address, scalar, size), vector))
            w_k = builder.add(w, builder.mul(w_row, k))
            for low in range(0, vectors * step, CACHE_LINE) if ahead else ():
                prefetch(builder, builder.add(w_k, I64(ahead + low)))
            for r, v in each:
                weights = load(builder, place(w_k, w_next, I64(r), v * step), kept, 1 if narrow else size)
                yield x_k[r], builder.sitofp(weights, vector) if narrow else weights

        before = [load(builder, place(start, I64(v), I64(VECTOR_BYTES)), vector, size) for _, v in each]
        starts, loop = [(builder.block, before)], builder.append_basic_block("loop")
        builder.branch(loop)
        for (r, v), total in zip(each, add_products(builder, K, loop, starts, pairs)):
            store(builder, total, place(y, y_next, I64(r), v * VECTOR_BYTES), size)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, x, x_next, w, w_next, w_row, start, y, y_next, K, zero):
        return types.void(*[types.intp] * 9, zero), build

    return tile


def prefetch(builder, address):
    """Prefetch the cache line at an address, for reading, into all levels."""
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), I32(0), I32(3), I32(1)])


def move_vectors(vectors):
    """Numba function (to, source): copy `vectors` vectors from one address to another."""

    def build(context, builder, signature, args):
        value = load(builder, args[1], ir.VectorType(I8, VECTOR_BYTES * vectors), 1)
        store(builder, value, args[0], 1)
        return context.get_dummy_value()

    @intrinsic
    def move(typing_context, to, source):
        return types.void(types.intp, types.intp), build

    return move


move_wide, move_one = move_vectors(TILE_VECTORS), move_vectors(1)


@inlined
def copy_at(source, step, to, to_step, rows, width, zero):
    """`rows` rows of `width` elements from one address and row stride to another."""
    size = size_of(zero)
    whole = width * size - width * size % VECTOR_BYTES
    for r in range(rows):
        if width * size == TILE_VECTORS * VECTOR_BYTES:
            move_wide(to + r * to_step, source + r * step)
        else:
            for at in range(0, whole, VECTOR_BYTES):
                move_one(to + r * to_step + at, source + r * step + at)
            for at in range(whole, width * size, size):
                poke(to + r * to_step + at, 0, peek(source + r * step + at, 0, zero))


@inlined
def product_at(a, b, c, shape, add, buffer, zero):
    """c (M, N) = a (M, K) b (K, N), or c += a b if add. Addresses and strides in bytes: a = (address, row, k),
    b = (address, k), c = (address, row), shape = (M, N, K); `buffer` has room for BUFFER_SIZE elements."""
    (a, a_row, a_k), (b, b_k), (c, c_row), (M, N, K) = a, b, c, shape
    size = size_of(zero)
    lanes, edge = VECTOR_BYTES // size, buffer + DEPTH * TILE_VECTORS * VECTOR_BYTES
    for k in range(0, K, DEPTH):
        depth, more, a_at, j = min(DEPTH, K - k), 1 if add != 0 or k > 0 else 0, a + k * a_k, 0
        while j < N:
            left = (N - j) // lanes
            vectors = TILE_VECTORS if left >= TILE_VECTORS else 2 if TILE_VECTORS > 2 and left >= 2 else 1
            width = min(vectors * lanes, N - j)
            b_at, b_down, c_at = b + k * b_k + j * size, b_k, c + j * size
            if (M >= PACK_ROWS and b_k != vectors * VECTOR_BYTES) or left == 0:
                b_down = vectors * VECTOR_BYTES
                copy_at(b_at, b_k, buffer, b_down, depth, width, zero)
                b_at = buffer
            at_once = M if left > 0 else TILE_ROWS
            for r in range(0, M, at_once):
                rows, at, down = min(at_once, M - r), c_at + r * c_row, c_row
                if left == 0:  # less than a vector of c: through a tile of its own, so that nothing beyond c is touched
                    at, down = edge, VECTOR_BYTES
                    copy_at(c_at + r * c_row, c_row, at, down, rows, width, zero)
                sweep(a_at + r * a_row, a_row, a_k, b_at, b_down, at, down, rows, vectors, depth, more, zero)
                if left == 0:
                    copy_at(at, down, c_at + r * c_row, c_row, rows, width, zero)
            j += width


@intrinsic
def transpose_square(typing_context, source, step, to, to_step, zero):
    """to (n, n) = source^T, of n rows of one vector each; addresses and row strides in bytes."""

    def build(context, builder, signature, args):
        source, step, to, to_step, _ = args
        scalar = context.get_value_type(signature.args[-1])
        size = context.get_abi_sizeof(scalar)
        n = VECTOR_BYTES // size
        rows = [builder.add(source, builder.mul(step, I64(i))) for i in range(n)]
        rows = [load(builder, row, ir.VectorType(scalar, n), size) for row in rows]
        for i, column in enumerate(transpose(builder, rows)):
            store(builder, column, builder.add(to, builder.mul(to_step, I64(i))), size)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, zero), build


@inlined
def transpose_at(x, x_row, out, out_row, K, M, width, zero):
    """out (M, width) = x (K, M)^T, and zeros in its columns from K on; addresses and row strides in bytes."""
    size = size_of(zero)
    lanes = VECTOR_BYTES // size
    for m in range(0, M, lanes):  # rows of `out` are written from left to right
        for k in range(0, K, lanes):
            if k + lanes <= K and m + lanes <= M:
                transpose_square(x + k * x_row + m * size, x_row, out + m * out_row + k * size, out_row, zero)
            else:
                for i in range(k, min(k + lanes, K)):
                    for j in range(m, min(m + lanes, M)):
                        poke(out + j * out_row + i * size, 0, peek(x + i * x_row + j * size, 0, zero))
    for j in range(M):
        for i in range(K, width):
            poke(out + j * out_row + i * size, 0, zero)


# == calls from kernels ================================================================================================
#
# Numba compiles what a function calls once more for each caller. These three functions would be most of the machine
# code of each kernel; so they are compiled once for each dtype and kernels call them by a symbol that the linker finds.


def symbol(name, dtype):
    return f"tinygpt_{name}_{dtype}_{STAMP}"


@functools.cache
def provide_product(dtype):
    """Compile `product_at` and its like for a dtype; to be called before any kernel that uses them is loaded."""
    number, compiled = numba.from_dtype(np.dtype(dtype)), {}

    def product_of_dtype(a, a_row, a_k, b, b_k, c, c_row, M, N, K, add, buffer):
        product_at((a, a_row, a_k), (b, b_k), (c, c_row), (M, N, K), add, buffer, number(0))

    def transpose_of_dtype(x, x_row, out, out_row, K, M, width):
        transpose_at(x, x_row, out, out_row, K, M, width, number(0))

    def copy_of_dtype(x, x_row, out, out_row, rows, width):
        copy_at(x, x_row, out, out_row, rows, width, number(0))

    functions = {"product": (product_of_dtype, 12), "transpose": (transpose_of_dtype, 7), "copy": (copy_of_dtype, 6)}
    for name, (function, count) in functions.items():
        kind, address = types.void(*[types.intp] * count), 1
        if POOL.compiles is None or POOL.compiles(name):
            compiled[name] = callback(kind, **COMPILE)(function)
            address = compiled[name].address
        binding.add_symbol(symbol(name, number), address)
    return compiled  # and kept: machine code lives as long as the object that it belongs to


def call_symbol(builder, name, dtype, operands):
    """Call `name` of `provide_product` for a dtype with some integers, in the code that an intrinsic builds."""
    name, kind = symbol(name, dtype), ir.FunctionType(ir.VoidType(), [I64] * len(operands))
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), operands)


def view_of(context, builder, kind, value):
    """Address, strides and shape of an array of two axes, in the code that an intrinsic builds."""
    view = context.make_array(kind)(context, builder, value)
    strides, shape = (cgutils.unpack_tuple(builder, pair, 2) for pair in (view.strides, view.shape))
    return builder.ptrtoint(view.data, I64), strides, shape


# A driver takes products over, as that of fast/bf16.py does. It is the address of an array of words; the first are
# addresses of functions that take integers, the driver's address last, and return 1 if they did the work, else 0.
MULTIPLY, PACK = range(2)


def call_driver(builder, driver, function, operands):
    """Call function number `function` of a driver with (*operands, driver) -> 1 bit, whether it did the work."""
    address, values = builder.load(word_at(builder, driver, function)), (*operands, driver)
    kind = ir.FunctionType(I64, [I64] * len(values)).as_pointer()
    return builder.icmp_signed("!=", builder.call(builder.inttoptr(address, kind), values), I64(0))


@intrinsic
def dispatch(typing_context, driver, operands):
    """Let a driver pack: PACK(*operands, driver) -> True if it did."""

    def build(context, builder, signature, args):
        return call_driver(builder, args[0], PACK, cgutils.unpack_tuple(builder, args[1]))

    return types.boolean(types.intp, operands), build


@intrinsic
def product(typing_context, a, b, c, add, panel):
    """c (M, N) = a (M, K) b (K, N), or c += a b if `add`; K >= 1, rows of b and c without gaps. panel = (buffer,
    driver): BUFFER_SIZE elements to copy b to, and the driver to try first, 0 if there is none."""

    def build(context, builder, signature, args):
        (a_at, a_strides, (M, K)), (b_at, b_strides, _), (c_at, c_strides, (_, N)) = (
            view_of(context, builder, kind, value) for kind, value in zip((a, b, c), args)
        )
        buffer, driver = cgutils.unpack_tuple(builder, args[4], 2)
        buffer = builder.ptrtoint(context.make_array(panel[0])(context, builder, buffer).data, I64)
        operands = (a_at, *a_strides, b_at, b_strides[0], c_at, c_strides[0], M, N, K, builder.zext(args[3], I64))
        # if driver == 0 or not dispatch(driver, MULTIPLY, operands): product(*operands, buffer)
        done = cgutils.alloca_once_value(builder, ir.IntType(1)(0))
        with builder.if_then(builder.icmp_signed("!=", driver, I64(0))):
            builder.store(call_driver(builder, driver, MULTIPLY, operands), done)
        with builder.if_then(builder.not_(builder.load(done))):
            call_symbol(builder, "product", c.dtype, (*operands, buffer))
        return context.get_dummy_value()

    return types.void(a, b, c, types.boolean, panel), build


@intrinsic
def transpose_rows(typing_context, x, out):
    """out (M, K') = x (K, M)^T, and zeros in its columns from K on; rows without gaps."""

    def build(context, builder, signature, args):
        (at, strides, shape), (out_at, out_strides, (_, width)) = (
            view_of(context, builder, kind, value) for kind, value in zip((x, out), args)
        )
        call_symbol(builder, "transpose", x.dtype, (at, strides[0], out_at, out_strides[0], *shape, width))
        return context.get_dummy_value()

    return types.void(x, out), build


@intrinsic
def copy_rows(typing_context, x, out):
    """out (K, M) = x (K, M); rows without gaps, which may be short."""

    def build(context, builder, signature, args):
        (at, strides, shape), (out_at, out_strides, _) = (
            view_of(context, builder, kind, value) for kind, value in zip((x, out), args)
        )
        call_symbol(builder, "copy", x.dtype, (at, strides[0], out_at, out_strides[0], *shape))
        return context.get_dummy_value()

    return types.void(x, out), build
