"""Packing of matrices into bf16 tiles, for `fast/bf16.py`.

A packed element is float32 rounded to bf16, 8 bits of mantissa: `rounded` of fast/bf16.py is the specification. In
float64, for finite differences, nothing is rounded. Tier 2 has no bf16. Vector instructions round 16 elements at a time
and put them into the order of a tile; what that gains was not measured by itself. Read in order: loads and stores,
rounding, one row of a tile, `pack_a` and `pack_b`.
"""

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from fast.jit import compiles_for, jitted
from fast.memory import I32, I64, load, peek, poke, splat, store, transpose

TILE = 16  # rows of a tile of a and of c, columns of c, pairs in a row of a tile
STEP = 2 * TILE  # columns of a that a tile holds
SQUARE = 2 * TILE  # rows and columns of the block of c that stays in four tiles


# == 2  packing ========================================================================================================
#
# A packed element is bf16, or float64 where nothing is rounded. Pairs of them are words: 32 or 128 bits.


def packed_size(size):
    """Bytes of an element once it is packed, of one that had `size`."""
    return 2 if size == 4 else 8


def instruction(builder, name, result, *values):
    """Call LLVM's intrinsic for an instruction of x86."""
    name, kind = f"llvm.x86.{name}", ir.FunctionType(result, [x.type for x in values])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), values)


class BF16(ir.Type):
    """LLVM's type, which llvmlite has no name for."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BF16)

    def __hash__(self):
        return hash(BF16)


def converts():
    """Whether there is an instruction that rounds two vectors of float32. (It takes float32 below 1.2e-38 for 0, as the
    matrix unit does.)"""
    return binding.llvm_version_info[0] >= 16 and compiles_for("avx512bf16") and compiles_for("avx512bw")


def round_bits(builder, x):
    """Vector of float32 -> its bits; the upper 16 are those of bf16, rounded to the nearest, of two the even one."""
    words = ir.VectorType(I32, x.type.count)
    bits = builder.bitcast(x, words)
    odd = builder.and_(builder.lshr(bits, splat(words, 16)), splat(words, 1))
    near = builder.add(builder.add(bits, splat(words, 0x7FFF)), odd)  # inf stays inf
    quiet = builder.or_(bits, splat(words, 0x400000))  # NaN stays NaN: rounding might carry it to -0
    return builder.select(builder.fcmp_unordered("uno", x, x), quiet, near)


def narrow(builder, low, high, neighbours):
    """Two vectors of n elements -> n words: pairs of neighbours, first those of low, or else low[i] with high[i]."""
    n = low.type.count
    indices = ir.VectorType(I32, 2 * n)
    zipped = ir.Constant(indices, [lane for i in range(n) for lane in (i, n + i)])
    if low.type.element == ir.DoubleType():
        joined = ir.Constant(indices, list(range(2 * n))) if neighbours else zipped
        return builder.bitcast(builder.shuffle_vector(low, high, joined), ir.VectorType(ir.IntType(128), n))
    halves, words = ir.VectorType(ir.IntType(16), 2 * n), ir.VectorType(I32, n)
    if converts():
        kind = ir.VectorType(BF16(), 2 * n)
        both = instruction(builder, "avx512bf16.cvtne2ps2bf16.512", kind, high, low)
        both = builder.bitcast(both, halves)
        both = both if neighbours else builder.shuffle_vector(both, ir.Constant(halves, ir.Undefined), zipped)
        return builder.bitcast(both, words)
    low, high = round_bits(builder, low), round_bits(builder, high)
    if neighbours:
        low, high = builder.bitcast(low, halves), builder.bitcast(high, halves)
        upper = ir.Constant(indices, list(range(1, 4 * n, 2)))
        return builder.bitcast(builder.shuffle_vector(low, high, upper), words)
    return builder.or_(builder.lshr(low, splat(words, 16)), builder.and_(high, splat(words, 0xFFFF0000)))


def element_vector(context, kind):
    """(LLVM type of a vector of TILE elements, bytes of one)."""
    scalar = context.get_value_type(kind)
    return ir.VectorType(scalar, TILE), context.get_abi_sizeof(scalar)


@intrinsic
def sizes_of(typing_context, zero):
    """Bytes of an element of the type of zero, and once it is packed."""

    def build(context, builder, signature, args):
        size = element_vector(context, zero)[1]
        return context.make_tuple(builder, signature.return_type, (I64(size), I64(packed_size(size))))

    return types.UniTuple(types.intp, 2)(zero), build


@intrinsic
def pack_row(typing_context, to, source, zero):
    """STEP elements that follow one another, of the type of zero -> TILE words."""

    def build(context, builder, signature, args):
        vector, size = element_vector(context, zero)
        low, high = (load(builder, builder.add(args[1], I64(i * TILE * size)), vector, size) for i in range(2))
        store(builder, narrow(builder, low, high, True), args[0], 64)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, zero), build


@intrinsic
def pack_pair(typing_context, to, low, high, zero):
    """TILE elements from each of two addresses, of the type of zero -> TILE words."""

    def build(context, builder, signature, args):
        vector, size = element_vector(context, zero)
        rows = (load(builder, address, vector, size) for address in args[1:3])
        store(builder, narrow(builder, *rows, False), args[0], 64)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, zero), build


@intrinsic
def turn_words(typing_context, at, zero):
    """TILE x TILE words, in place: row i becomes column i."""

    def build(context, builder, signature, args):
        size = element_vector(context, zero)[1]
        words = ir.VectorType(ir.IntType(16 * packed_size(size)), TILE)
        places = [builder.add(args[0], I64(i * TILE * 2 * packed_size(size))) for i in range(TILE)]
        rows = [load(builder, place, words, 64) for place in places]
        for row, place in zip(transpose(builder, rows), places):
            store(builder, row, place, 64)
        return context.get_dummy_value()

    return types.void(types.intp, zero), build


@jitted
def copy_padded(source, row, right, rows, columns, to, height, width, zero):
    """to (height, width), rows without gaps = source (rows, columns), zeros beyond it; strides in bytes."""
    size, _ = sizes_of(zero)
    for i in range(height):
        line = to + i * width * size
        given = columns if i < rows else 0
        if right == size:
            for j in range(given):
                poke(line, j, peek(source + i * row, j, zero))
        else:
            for j in range(given):
                poke(line, j, peek(source + i * row + j * right, 0, zero))
        for j in range(given, width):
            poke(line, j, zero)


@jitted
def pack_a(a, a_row, a_k, rows, depth, to, edge, zero):
    """a (rows, depth) -> for every 16 rows, of whole SQUAREs, its tiles from left to right."""
    size, packed = sizes_of(zero)
    line = TILE * 2 * packed  # bytes of a row of a tile
    steps = (depth + STEP - 1) // STEP
    for r in range(0, (rows + SQUARE - 1) // SQUARE * SQUARE, TILE):
        for s in range(steps):
            at, source, deep = (
                to + (r // TILE * steps + s) * TILE * line,
                a + r * a_row + s * STEP * a_k,
                depth - s * STEP,
            )
            if rows - r >= TILE and deep >= STEP and a_row == size:
                for i in range(TILE):
                    pack_pair(at + i * line, source + 2 * i * a_k, source + (2 * i + 1) * a_k, zero)
                turn_words(at, zero)
            else:
                down = a_row
                if rows - r < TILE or deep < STEP or a_k != size:
                    few = max(0, min(TILE, rows - r))
                    copy_padded(source, a_row, a_k, few, min(STEP, deep), edge, TILE, STEP, zero)
                    source, down = edge, STEP * size
                for i in range(TILE):
                    pack_row(at + i * line, source + i * down, zero)


@jitted
def pack_b(b, b_k, b_n, depth, columns, to, edge, zero):
    """b (depth, columns), at most SQUARE columns -> for every 16 columns its tiles from top to bottom."""
    size, packed = sizes_of(zero)
    line = TILE * 2 * packed
    steps = (depth + STEP - 1) // STEP
    for half in range(2):
        for s in range(steps):
            at, source, down = to + (half * steps + s) * TILE * line, b + s * STEP * b_k + half * TILE * b_n, b_k
            wide, deep = max(0, min(TILE, columns - half * TILE)), min(STEP, depth - s * STEP)
            if wide == TILE and deep == STEP and b_k == size:
                for i in range(TILE):
                    pack_row(at + i * line, source + i * b_n, zero)
                turn_words(at, zero)
            else:
                if wide < TILE or deep < STEP or b_n != size:
                    copy_padded(source, b_k, b_n, deep, wide, edge, STEP, TILE, zero)
                    source, down = edge, TILE * size
                for i in range(TILE):
                    pack_pair(at + i * line, source + 2 * i * down, source + (2 * i + 1) * down, zero)
