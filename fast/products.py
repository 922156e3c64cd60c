"""Matrix products, the two in `linear_forward` and `linear_backward` of section 2.1.

The idea: a tile of c stays in registers while all of k passes, and what it reads of b stays in the first-level cache.
Order: the register tile, `sweep` over the rows of a, `product_at` over panels of b, then how jitted code calls it.
"""

import functools

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fast.jit import CACHE_LINE, COMPILE, STAMP, compiles_for, part, stamped
from fast.memory import peek, poke, word_at
from fast.threads import POOL

# == 5  matrix products     c = a b, or c += a b, for any strides of a =================================================
#
# Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication": b is copied, DEPTH rows of a panel at a
# time, to where it stays in the first-level cache; a register tile of c sweeps over the rows of a.

VECTOR_BYTES = 64  # LLVM splits it where registers are narrower
DEPTH = 128
PACK_ROWS = 32  # with fewer rows of a, copying b costs more than it saves


TILE_ROWS = 6
TILE_VECTORS = 4 if compiles_for("avx512f") else 1  # 24 sums: of 32 registers; 12 of 16 on AVX2; 24 of 32 on NEON
HEADER_BYTES = 2 * CACHE_LINE  # of a panel: zeros, or who makes products instead, in the words of bf16.py
HEADER = HEADER_BYTES // 4  # in elements of float32; room enough where they are larger
PANEL_SIZE = HEADER + (DEPTH * TILE_VECTORS + TILE_ROWS) * VECTOR_BYTES // 4  # in elements


def register_tile(rows, vectors):
    """Numba function (a, a_row, a_k, b, b_k, c, c_row, k, add, zero): `rows` rows of `vectors` vectors of c from k
    columns of a and k rows of b; addresses and strides in bytes, the element type is that of zero, k >= 1.

    for r in rows: c[r] = (c[r] if add else 0) + sum_k a[r, k] * b[k], one fused multiply-add after the other.
    """
    i32, i64 = ir.IntType(32), ir.IntType(64)

    def build(context, builder, signature, args):
        a, a_row, a_k, b, b_k, c, c_row, k_end, add, _ = args
        scalar = context.get_value_type(signature.args[-1])
        size = context.get_abi_sizeof(scalar)
        lanes = VECTOR_BYTES // size
        vector = ir.VectorType(scalar, lanes)
        zeros, undefined = ir.Constant(vector, [0.0] * lanes), ir.Constant(vector, ir.Undefined)
        first_lane = ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)
        name = f"llvm.fma.v{lanes}f{8 * size}"
        fma = builder.module.globals.get(name)
        fma = fma or ir.Function(builder.module, ir.FunctionType(vector, [vector] * 3), name)

        def load(address, kind):
            value = builder.load(builder.inttoptr(address, kind.as_pointer()))
            value.align = size
            return value

        def vector_addresses(row):
            return [builder.add(row, i64(v * VECTOR_BYTES)) for v in range(vectors)]

        c_at = [vector_addresses(builder.add(c, builder.mul(c_row, i64(r)))) for r in range(rows)]
        a_at = [builder.add(a, builder.mul(a_row, i64(r))) for r in range(rows)]
        start = builder.block
        resume, loop, store = (builder.append_basic_block(label) for label in ("resume", "loop", "store"))
        builder.cbranch(builder.icmp_signed("!=", add, i64(0)), resume, loop)
        builder.position_at_end(resume)
        before = [[load(address, vector) for address in row] for row in c_at]
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(i64)
        sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
        b_row = [load(address, vector) for address in vector_addresses(builder.add(b, builder.mul(k, b_k)))]
        grown = []
        for r in range(rows):
            one = load(builder.add(a_at[r], builder.mul(k, a_k)), scalar)
            all_lanes = builder.shuffle_vector(builder.insert_element(undefined, one, i32(0)), undefined, first_lane)
            grown.append([builder.call(fma, [all_lanes, b_row[v], sums[r][v]]) for v in range(vectors)])
        k_next = builder.add(k, i64(1))
        builder.cbranch(builder.icmp_signed("<", k_next, k_end), loop, store)
        for block, value in ((start, i64(0)), (resume, i64(0)), (loop, k_next)):
            k.add_incoming(value, block)
        for r in range(rows):
            for v in range(vectors):
                for block, value in ((start, zeros), (resume, before[r][v]), (loop, grown[r][v])):
                    sums[r][v].add_incoming(value, block)

        builder.position_at_end(store)
        for r in range(rows):
            for v in range(vectors):
                builder.store(grown[r][v], builder.inttoptr(c_at[r][v], vector.as_pointer())).align = size
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, a, a_row, a_k, b, b_k, c, c_row, k, add, zero):
        return types.void(*[types.intp] * 9, zero), build

    return tile


tall_wide, tall_two, tall_one = (register_tile(TILE_ROWS, vectors) for vectors in (TILE_VECTORS, 2, 1))
pair_wide, pair_two, pair_one = (register_tile(2, vectors) for vectors in (TILE_VECTORS, 2, 1))
high_two, high_one = (register_tile(2 * TILE_ROWS, vectors) for vectors in (2, 1))
flat_wide, flat_two, flat_one = (register_tile(1, vectors) for vectors in (TILE_VECTORS, 2, 1))


@part
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
    Addresses and distances in bytes, K >= 1. It asks for weights `ahead` bytes ahead; w is of 8 bits if narrow."""
    i32, i64 = ir.IntType(32), ir.IntType(64)

    def build(context, builder, signature, args):
        x, x_next, w, w_next, w_row, start, y, y_next, K, _ = args
        scalar = context.get_value_type(signature.args[-1])
        size = context.get_abi_sizeof(scalar)
        lanes, first = VECTOR_BYTES // size, builder.block
        vector = ir.VectorType(scalar, lanes)
        kept, step = (ir.VectorType(ir.IntType(8), lanes), lanes) if narrow else (vector, VECTOR_BYTES)
        undefined, first_lane = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)
        name = f"llvm.fma.v{lanes}f{8 * size}"
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        pointer = ir.IntType(8).as_pointer()
        prefetch = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, prefetch, "llvm.prefetch.p0")

        def place(address, distance, count, kind, more=0):
            address = builder.add(address, builder.mul(distance, count))
            return builder.inttoptr(builder.add(address, i64(more)), kind.as_pointer())

        each = [(r, v) for r in range(rows) for v in range(vectors)]
        before = [builder.load(place(start, i64(v), i64(VECTOR_BYTES), vector), align=size) for _, v in each]
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, sums = builder.phi(i64), [builder.phi(vector) for _ in each]
        one, grown = [], []
        for r in range(rows):
            x_k = builder.load(place(builder.add(x, builder.mul(x_next, i64(r))), k, i64(size), scalar))
            x_k = builder.insert_element(undefined, x_k, i32(0))
            one.append(builder.shuffle_vector(x_k, undefined, first_lane))
        w_k = builder.add(w, builder.mul(w_row, k))
        for low in range(0, vectors * step, CACHE_LINE) if ahead else ():
            line = place(w_k, i64(0), i64(0), ir.IntType(8), ahead + low)
            builder.call(prefetch, [line, i32(0), i32(3), i32(1)])  # to read, keep near, data
        for (r, v), total in zip(each, sums):
            weights = builder.load(place(w_k, w_next, i64(r), kept, v * step), align=1 if narrow else size)
            weights = builder.sitofp(weights, vector) if narrow else weights
            grown.append(builder.call(fma, [one[r], weights, total]))
        k_next = builder.add(k, i64(1))
        builder.cbranch(builder.icmp_signed("<", k_next, K), loop, done)
        for phi, *values in ((k, i64(0), k_next), *zip(sums, before, grown)):
            phi.add_incoming(values[0], first)
            phi.add_incoming(values[1], loop)
        builder.position_at_end(done)
        for (r, v), total in zip(each, grown):
            builder.store(total, place(y, y_next, i64(r), vector, v * VECTOR_BYTES), align=size)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, x, x_next, w, w_next, w_row, start, y, y_next, K, zero):
        return types.void(*[types.intp] * 9, zero), build

    return tile


def move_vectors(vectors):
    """Numba function (to, source): copy `vectors` vectors from one address to another."""

    def build(context, builder, signature, args):
        pointer = ir.VectorType(ir.IntType(8), VECTOR_BYTES * vectors).as_pointer()
        value = builder.load(builder.inttoptr(args[1], pointer))
        value.align = 1
        builder.store(value, builder.inttoptr(args[0], pointer)).align = 1
        return context.get_dummy_value()

    @intrinsic
    def move(typing_context, to, source):
        return types.void(types.intp, types.intp), build

    return move


move_wide, move_one = move_vectors(TILE_VECTORS), move_vectors(1)


@part
@stamped
def copy_at(source, step, to, to_step, rows, width, size, zero):
    """`rows` rows of `width` elements from one address and row stride to another."""
    whole = width * size - width * size % VECTOR_BYTES
    for r in range(rows):
        if width * size == TILE_VECTORS * VECTOR_BYTES:
            move_wide(to + r * to_step, source + r * step)
        else:
            for at in range(0, whole, VECTOR_BYTES):
                move_one(to + r * to_step + at, source + r * step + at)
            for at in range(whole, width * size, size):
                poke(to + r * to_step + at, peek(source + r * step + at, zero))


@stamped
def product_at(a, a_row, a_k, b, b_k, c, c_row, M, N, K, add, panel, size, zero):
    """c (M, N) = a (M, K) b (K, N), or c += a b if add: addresses, strides and `size` of an element in bytes."""
    if panel != 0 and elsewhere(panel, (a, a_row, a_k, b, b_k, c, c_row, M, N, K, add, panel)):
        return
    panel += HEADER_BYTES
    lanes, edge = VECTOR_BYTES // size, panel + DEPTH * TILE_VECTORS * VECTOR_BYTES
    for k in range(0, K, DEPTH):
        depth, more, a_at, j = min(DEPTH, K - k), 1 if add != 0 or k > 0 else 0, a + k * a_k, 0
        while j < N:
            left = (N - j) // lanes
            vectors = TILE_VECTORS if left >= TILE_VECTORS else 2 if TILE_VECTORS > 2 and left >= 2 else 1
            width = min(vectors * lanes, N - j)
            b_at, b_down, c_at = b + k * b_k + j * size, b_k, c + j * size
            if (M >= PACK_ROWS and b_k != vectors * VECTOR_BYTES) or left == 0:
                b_down = vectors * VECTOR_BYTES
                copy_at(b_at, b_k, panel, b_down, depth, width, size, zero)
                b_at = panel
            at_once = M if left > 0 else TILE_ROWS
            for r in range(0, M, at_once):
                rows, at, down = min(at_once, M - r), c_at + r * c_row, c_row
                if left == 0:  # less than a vector of c: through a tile of its own, so that nothing beyond c is touched
                    at, down = edge, VECTOR_BYTES
                    copy_at(c_at + r * c_row, c_row, at, down, rows, width, size, zero)
                sweep(a_at + r * a_row, a_row, a_k, b_at, b_down, at, down, rows, vectors, depth, more, zero)
                if left == 0:
                    copy_at(at, down, c_at + r * c_row, c_row, rows, width, size, zero)
            j += width


@intrinsic
def transpose_square(typing_context, source, step, to, to_step, zero):
    """to (n, n) = source^T, of n rows of one vector each; addresses and row strides in bytes."""

    def build(context, builder, signature, args):
        source, step, to, to_step, _ = args
        scalar = context.get_value_type(signature.args[-1])
        size = context.get_abi_sizeof(scalar)
        n, i64 = VECTOR_BYTES // size, ir.IntType(64)
        pointer = ir.VectorType(scalar, n).as_pointer()

        def place(address, step, i):
            return builder.inttoptr(builder.add(address, builder.mul(step, i64(i))), pointer)

        rows = [builder.load(place(source, step, i), align=size) for i in range(n)]
        order = [lane for i in range(n) for lane in (i, n + i)]  # of two rows, element by element
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), n), half) for half in (order[:n], order[n:])]
        while n > 1:  # a round moves the first bit of (row, column) to its end: log2 n rounds change places
            pairs = zip(rows[: len(rows) // 2], rows[len(rows) // 2 :])
            rows, n = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks], n // 2
        for i, row in enumerate(rows):
            builder.store(row, place(to, to_step, i), align=size)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, zero), build


@stamped
def transpose_at(x, x_row, out, out_row, K, M, width, size, zero):
    """out (M, width) = x (K, M)^T, and zeros in its columns from K on; addresses, row strides and `size` in bytes."""
    lanes = VECTOR_BYTES // size
    for m in range(0, M, lanes):  # what is written lies side by side
        for k in range(0, K, lanes):
            if k + lanes <= K and m + lanes <= M:
                transpose_square(x + k * x_row + m * size, x_row, out + m * out_row + k * size, out_row, zero)
            else:
                for i in range(k, min(k + lanes, K)):
                    for j in range(m, min(m + lanes, M)):
                        poke(out + j * out_row + i * size, peek(x + i * x_row + j * size, zero))
    for j in range(M):
        for i in range(K, width):
            poke(out + j * out_row + i * size, zero)


def ask(builder, place, operands):
    """Call the function whose address stands at a place: whether there is one and it did what was asked."""
    i64 = ir.IntType(64)
    address = builder.load(place, align=4)
    start, there, done = builder.block, builder.append_basic_block("there"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("!=", address, i64(0)), there, done)
    builder.position_at_end(there)
    kind = ir.FunctionType(i64, [i64] * len(operands)).as_pointer()
    answer = builder.icmp_signed("!=", builder.call(builder.inttoptr(address, kind), operands), i64(0))
    builder.branch(done)
    builder.position_at_end(done)
    found = builder.phi(ir.IntType(1))
    found.add_incoming(ir.IntType(1)(0), start)
    found.add_incoming(answer, there)
    return found


@intrinsic
def elsewhere(typing_context, panel, arguments):
    """Ask the driver that a panel's header names to make a product: whether it did."""

    def build(context, builder, signature, args):
        return ask(builder, word_at(builder, args[0]), cgutils.unpack_tuple(builder, args[1]))

    return types.boolean(types.intp, arguments), build


# Numba compiles what a function calls once more for each caller. These three would be most of the machine code of each
# kernel: they are compiled once for each dtype, given names that the linker finds, and called by name.


def symbol(function, dtype):
    return f"tinygpt_{function.__name__}_{dtype}_{STAMP}"


@functools.cache
def provide_product(dtype):
    """Compile `product_at` and its like for a dtype; before any kernel that calls them is loaded."""
    number, compiled = numba.from_dtype(np.dtype(dtype)), []
    for function, count in ((product_at, 12), (transpose_at, 7), (copy_at, 6)):
        kind, address = types.void(*[types.intp] * (count + 1), number), 1
        if POOL.compiles is None or POOL.compiles(function.__name__):
            compiled.append(numba.cfunc(kind, cache=True, **COMPILE)(function))
            address = compiled[-1].address
        binding.add_symbol(symbol(function, number), address)
    return compiled  # and kept: machine code lives as long as what it belongs to


def call_symbol(context, builder, function, dtype, arguments):
    """function(*arguments, size of an element, zero), in the code that an intrinsic builds."""
    arguments = (*arguments, ir.IntType(64)(dtype.bitwidth // 8), context.get_constant(dtype, 0))
    name = symbol(function, dtype)
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)


def parts_of(context, builder, kinds, arrays):
    """Addresses, row strides, element strides and shapes of arrays of two axes."""
    views = [context.make_array(kind)(context, builder, x) for kind, x in zip(kinds, arrays)]
    down, right = zip(*(cgutils.unpack_tuple(builder, view.strides, 2) for view in views))
    at = [builder.ptrtoint(view.data, ir.IntType(64)) for view in views]
    return at, down, right, [cgutils.unpack_tuple(builder, view.shape, 2) for view in views]


@intrinsic
def product(typing_context, a, b, c, add, panel):
    """c (M, N) = a (M, K) b (K, N), or c += a b if `add`; K >= 1, rows of b and c without gaps, panel (PANEL_SIZE,),
    its HEADER zeros where nobody else is asked first."""

    def build(context, builder, signature, args):
        at, down, right, ((M, K), _, (_, N)) = parts_of(context, builder, (a, b, c), args[:3])
        scratch = builder.ptrtoint(context.make_array(panel)(context, builder, args[4]).data, ir.IntType(64))
        matrices = (at[0], down[0], right[0], at[1], down[1], at[2], down[2])
        more = builder.zext(args[3], ir.IntType(64))
        call_symbol(context, builder, product_at, c.dtype, (*matrices, M, N, K, more, scratch))
        return context.get_dummy_value()

    return types.void(a, b, c, types.boolean, panel), build


@intrinsic
def transpose_rows(typing_context, x, out):
    """out (M, K') = x (K, M)^T, and zeros in its columns from K on; rows without gaps."""

    def build(context, builder, signature, args):
        at, down, _, ((K, M), (_, width)) = parts_of(context, builder, (x, out), args)
        call_symbol(context, builder, transpose_at, x.dtype, (at[0], down[0], at[1], down[1], K, M, width))
        return context.get_dummy_value()

    return types.void(x, out), build


@intrinsic
def copy_rows(typing_context, x, out):
    """out (K, M) = x (K, M); rows without gaps, which may be short."""

    def build(context, builder, signature, args):
        at, down, _, ((K, M), _) = parts_of(context, builder, (x, out), args)
        call_symbol(context, builder, copy_at, x.dtype, (at[0], down[0], at[1], down[1], K, M))
        return context.get_dummy_value()

    return types.void(x, out), build
