"""The innermost block of bf16 products: the matrix unit (AMX), VDPBF16PS, and a stand-in for each.

c (32, 32) = a b, or c += a b, of operands that fast/pack.py has packed. All blocks read the same packed operands; the
specification is the float32 product of operands that `rounded` of fast/bf16.py has rounded. They differ in the order in
which an element of c is summed:

  amx       for each step of 32 columns of a, c + (e + o): e = sum_k a_i,2k b_2k,j, o = sum_k a_i,2k+1 b_2k+1,j,
            chains of 16 fused multiply-adds that begin at 0: the order of TDPBF16PS. 300-800 GFLOP/s on a core.
  avx512    one chain of fused multiply-adds from c on, the second element of each pair before the first: the order of
            VDPBF16PS. 16 sums stay in registers: about 200 GFLOP/s on a core of AMD Zen 4, twice its float32 peak.

"amx stand-in" and "avx512 stand-in" make the same sums by float32 instructions: what a processor without bf16 can test.
(The instructions take float32 below 1.2e-38 for 0.) "float64" rounds nothing, so that finite differences run through
the same driver.

Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18, volume 2 under TDPBF16PS, VDPBF16PS.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fast.memory import I8, I32, I64, broadcast, load, multiply_add, splat, store
from fast.pack import BF16, TILE, element_vector, instruction, packed_size
from fast.products import add_to_c


def cell(call):
    """Numba function of (top, bottom, left, right, c, c_row, steps, add, zero) whose code `call` builds: two rows of
    `steps` tiles of a, two columns of as many tiles of b, addresses; strides in bytes."""

    @intrinsic
    def block(typing_context, top, bottom, left, right, c, c_row, steps, add, zero):
        def build(context, builder, signature, args):
            call(context, builder, zero, *args[:8])
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8, zero), build

    return block


# == 1  AMX ============================================================================================================
#
# A tile of a is 16 rows of 16 pairs of bf16, 64 bytes each; of b, 16 rows of 16 pairs, two rows of b interleaved; of c,
# 16 x 16 float32.


def unit(builder, name, *operands):
    """An instruction of the matrix unit: tiles by number."""
    instruction(builder, name, ir.VoidType(), *(I8(x) if isinstance(x, int) else x for x in operands))


def amx_block(context, builder, zero, top, bottom, left, right, c, c_row, steps, add):
    """Tiles 0 to 3 are those of c, 4 and 5 of a, 6 and 7 of b."""

    def move(name, tile, address, stride):
        unit(builder, name, tile, builder.inttoptr(address, I8.as_pointer()), stride)

    low = builder.add(c, builder.mul(c_row, I64(TILE)))
    corners = [builder.add(row, I64(4 * TILE * j)) for row in (c, low) for j in range(2)]
    with builder.if_else(builder.icmp_signed("!=", add, I64(0))) as (resume, begin):
        with resume:
            for tile, corner in enumerate(corners):
                move("tileloadd64", tile, corner, c_row)
        with begin:
            for tile in range(4):
                unit(builder, "tilezero", tile)
    with cgutils.for_range(builder, steps) as loop:
        at = builder.mul(loop.index, I64(TILE * 64))
        for tile, operand in zip((4, 6, 7, 5), (top, left, right, bottom)):
            move("tileloadd64", tile, builder.add(operand, at), I64(64))
        for tile in range(4):
            unit(builder, "tdpbf16ps", tile, 4 + tile // 2, 6 + tile % 2)
    for tile, corner in enumerate(corners):
        move("tilestored64", tile, corner, c_row)


def setting(name):
    """Numba function of one address: an instruction that configures this thread's matrix unit."""

    @intrinsic
    def configure(typing_context, address):
        def build(context, builder, signature, args):
            unit(builder, name, *([builder.inttoptr(args[0], I8.as_pointer())] if name == "ldtilecfg" else []))
            return context.get_dummy_value()

        return types.void(types.intp), build

    return configure


configure_unit, release_unit = setting("ldtilecfg"), setting("tilerelease")


# == 2  VDPBF16PS ======================================================================================================

ROWS_OF_SUMS = 8  # of c at a time, each of two vectors: 16 chains are enough to hide the instruction's latency


def dot(builder, x, w, total):
    """total[i] + x[i]'s pair times w[i]'s pair; words of two bf16."""
    pairs = ir.VectorType(BF16(), 2 * TILE)
    values = total, *(builder.bitcast(side, pairs) for side in (x, w))
    return instruction(builder, "avx512bf16.dpbf16ps.512", total.type, *values)


def avx512_block(context, builder, zero, top, bottom, left, right, c, c_row, steps, add):
    vector, words, line = ir.VectorType(ir.FloatType(), TILE), ir.VectorType(I32, TILE), 4 * TILE

    def at(address, stride, count):
        return builder.add(address, builder.mul(stride, count))

    for i, tiles in enumerate((top, bottom)):
        with cgutils.for_range(builder, I64(TILE // ROWS_OF_SUMS)) as group:
            first = builder.mul(group.index, I64(ROWS_OF_SUMS))
            a, c_first = at(tiles, I64(line), first), at(c, c_row, builder.add(first, I64(i * TILE)))
            rows = [at(c_first, c_row, I64(r)) for r in range(ROWS_OF_SUMS)]

            def pairs(k, a=a):
                tile, column = builder.lshr(k, I64(4)), builder.and_(k, I64(TILE - 1))  # 16 pairs in a row of a tile
                a_k = at(at(a, I64(TILE * line), tile), I64(4), column)
                b_k = [load(builder, at(b, I64(line), k), words, line) for b in (left, right)]
                for r in range(ROWS_OF_SUMS):
                    pair = broadcast(builder, load(builder, builder.add(a_k, I64(r * line)), I32, 4), words)
                    yield from ((pair, b) for b in b_k)

            places = [builder.add(row, I64(side * line)) for row in rows for side in range(2)]
            add_to_c(builder, vector, places, add, builder.mul(steps, I64(TILE)), pairs, dot)


# == 3  stand-ins ======================================================================================================

ROWS_AT_ONCE = 4  # of a tile: 12 sums in registers


def widen(builder, words, scalar):
    """n words -> the first and the second elements of the pairs, as vectors."""
    n = words.type.count
    if scalar == ir.DoubleType():
        pairs = builder.bitcast(words, ir.VectorType(scalar, 2 * n))
        sides = (ir.Constant(ir.VectorType(I32, n), list(range(side, 2 * n, 2))) for side in range(2))
        return [builder.shuffle_vector(pairs, ir.Constant(pairs.type, ir.Undefined), side) for side in sides]
    upper = builder.and_(words, splat(words.type, 0xFFFF0000))
    lower = builder.shl(words, splat(words.type, 16))
    return [builder.bitcast(x, ir.VectorType(scalar, n)) for x in (lower, upper)]


def stand_in(by_steps):
    """Code of the order of TDPBF16PS if by_steps, else of VDPBF16PS, in the arithmetic of the type of zero."""

    def build(context, builder, zero, top, bottom, left, right, c, c_row, steps, add):
        vector, size = element_vector(context, zero)
        line, scalar = TILE * 2 * packed_size(size), vector.element
        word = ir.IntType(16 * packed_size(size))
        resume = builder.icmp_signed("!=", add, I64(0))

        def rows_of_tile(a, b, corner):
            """ROWS_AT_ONCE rows of a tile of c, from those of a."""
            places = [builder.add(corner, builder.mul(c_row, I64(r))) for r in range(ROWS_AT_ONCE)]
            sums = [cgutils.alloca_once(builder, vector) for _ in places]
            for place, at in zip(places, sums):
                with builder.if_else(resume) as (old, new):
                    with old:
                        builder.store(load(builder, place, vector, size), at)
                    with new:
                        builder.store(splat(vector, 0.0), at)
            with cgutils.for_range(builder, steps) as loop:
                tile = builder.mul(loop.index, I64(TILE * line))
                chains = [[splat(vector, 0.0)] * 2 if by_steps else [builder.load(at)] * 2 for at in sums]
                for k in range(TILE):
                    b_k = builder.add(builder.add(b, tile), I64(k * line))
                    b_sides = widen(builder, load(builder, b_k, ir.VectorType(word, TILE), 64), scalar)
                    for r in range(ROWS_AT_ONCE):
                        place = builder.add(builder.add(a, tile), I64(r * line + k * line // TILE))
                        pair = load(builder, place, ir.VectorType(word, 1), line // TILE)
                        a_sides = [broadcast_lane(builder, x) for x in widen(builder, pair, scalar)]
                        for side in (0, 1) if by_steps else (1, 0):
                            total = chains[r][side if by_steps else 0]
                            chain = multiply_add(builder, a_sides[side], b_sides[side], total)
                            chains[r][side if by_steps else 0] = chain
                for at, chain in zip(sums, chains):
                    total = builder.fadd(builder.load(at), builder.fadd(*chain)) if by_steps else chain[0]
                    builder.store(total, at)
            for place, at in zip(places, sums):
                store(builder, builder.load(at), place, size)

        for i, a in enumerate((top, bottom)):
            for j, b in enumerate((left, right)):
                with cgutils.for_range(builder, I64(TILE // ROWS_AT_ONCE)) as group:
                    r = builder.mul(group.index, I64(ROWS_AT_ONCE))
                    corner = builder.add(c, builder.mul(c_row, builder.add(r, I64(i * TILE))))
                    a_rows = builder.add(a, builder.mul(r, I64(line)))
                    rows_of_tile(a_rows, b, builder.add(corner, I64(j * TILE * size)))

    return build


def broadcast_lane(builder, x):
    """Vector of one lane -> of TILE lanes."""
    return builder.shuffle_vector(x, x, splat(ir.VectorType(I32, TILE), 0))


amx_cell, avx512_cell = cell(amx_block), cell(avx512_block)
amx_stand_in, avx512_stand_in = cell(stand_in(by_steps=True)), cell(stand_in(by_steps=False))
