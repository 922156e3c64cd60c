"""Matrix products in bf16: AMX, the matrix unit of Intel's processors since 2023, and VDPBF16PS (AVX512-BF16), which
AMD's have since Zen 4 and some of Intel's, driven from Numba.

    python -m fast      # which of them this machine has, how exact its products are, and how fast

`train.py --dtype bfloat16` multiplies through this file. Operands are rounded to bf16, 8 bits of mantissa, as they are
packed; sums are float32.

It replaces `product` of fast/products.py for all but small products; the specification is the float32 product of
operands that `rounded` has rounded. The driver blocks, packs and handles edges, once for all instructions; the
innermost block, of which fast/innermost.py has five kinds, is called by its address. A weight is packed once for all
rows that meet it: fast/panels.py has the times.

Read in order: 1 what this machine has, 2 the driver, 3 how it is called, 4 the buffers of the sublayers. pack.py packs,
innermost.py multiplies.
"""

import ctypes
import functools
import os
import platform
import sys
import time

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fast.innermost import amx_cell, amx_stand_in, avx512_cell, avx512_stand_in, configure_unit, release_unit
from fast.jit import CACHE_LINE, callback, compiles_for, jitted
from fast.memory import I64, load, peek, poke
from fast.pack import SQUARE, STEP, TILE, converts, copy_padded, pack_a, pack_b, packed_size, sizes_of
from fast.products import MULTIPLY, PACK
from fast.threads import POOL
from fast.workspace import make_workspace
from tinygpt import aligned

LEAST_EXTENT = STEP  # of rows, columns or depth: with fewer, packing and padding cost more than bf16 saves
INSTRUCTIONS = {"amx": "Intel AMX", "avx512": "AVX512-BF16"}  # the fastest first
STAND_INS = "amx stand-in", "avx512 stand-in"
DTYPES = dict.fromkeys((*INSTRUCTIONS, *STAND_INS), "float32") | {"float64": "float64"}  # of sums
BLOCKS = 5, 16  # rows of c in SQUAREs, columns of a in STEPs, that are packed at a time: 160 KiB, of a core's 2 MiB


# == 1  what this machine has ==========================================================================================


def ask_linux():
    """Request the tile registers for all threads of this process -> 0, or errno."""
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), Linux 5.16
    return ctypes.get_errno() if ctypes.CDLL(None, use_errno=True).syscall(158, 0x1023, 18) else 0


@functools.cache
def product_error(kind):
    """Largest error of a product with edges on all sides, against float64 of the same rounded operands, relative."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(dtype_of(kind)) for shape in ((77, 91), (91, 69)))
    c = multiply(a, b, np.ones((77, 69), a.dtype), True, kind)
    if kind != "float64":
        a, b = rounded(a), rounded(b)
    expected = 1 + a.astype(np.float64) @ b
    return float(np.abs(c - expected).max() / np.abs(expected).max())


def hindrance(kind):
    """None where this machine multiplies by a kind's instruction, else why not, in a sentence."""
    if kind == "avx512" and not converts():
        return "this processor has no AVX512-BF16"
    if kind == "amx":
        here = platform.system(), platform.machine()
        if here != ("Linux", "x86_64"):
            return f"bf16 tiles (Intel AMX) are used on Linux x86_64 only, this is {' '.join(here)}"
        if not (compiles_for("amx-tile") and compiles_for("amx-bf16")):
            return "this processor has no bf16 tiles (Intel AMX)"
        if refused := ask_linux():
            return f"Linux refuses the tile registers of this processor ({os.strerror(refused)})"
    error = product_error(kind)
    return None if error < 1e-5 else f"{INSTRUCTIONS[kind]} fails its test here (relative error {error:.1e})"


def find_bf16():
    """(the fastest of INSTRUCTIONS that this processor has, None), or (None, why there is none, in a sentence)."""
    reasons = []
    for kind in INSTRUCTIONS:
        reasons.append(hindrance(kind))
        if reasons[-1] is None:
            return kind, None
    return None, "; ".join(reasons)


# == 2  the driver =====================================================================================================
#
# Per block of rows and of depth: a is packed once and stays in the second-level cache, 32 columns of b at a time in the
# first-level one, and 2 x 2 tiles of c are held while all of the depth passes. Of a weight, which meets many such
# blocks, all is packed before. An element of c is the same chain of steps of 32 wherever it stands: neither the blocks
# nor its neighbours change a byte of it.

# A thread's driver is END + 1 words of 64 bits:
#   MULTIPLY, PACK      addresses of `multiply_packed` and `pack_matrix`, compiled for a dtype: what `dispatch` calls
#   MEMORY              address of the memory that the thread packs into
#   ROWS, DEPTH         rows of c in SQUAREs and columns of a in STEPs that are packed at a time
#   ENTER, LEAVE        what is called at the beginning and end of a product, 0: nothing; the matrix unit of each core
#                       has to be told the shapes of tiles
#   BLOCK               the innermost block
#   LEAST               the least extent with which a product is worth packing, else it stays in float32; 0: any
#   FIRST, END          addresses between which operands are packed already
MEMORY, ROWS, DEPTH, ENTER, BLOCK, LEAVE, LEAST, FIRST, END = range(PACK + 1, PACK + 10)


@intrinsic
def word(typing_context, driver, index):
    """Word `index` of a driver."""

    def build(context, builder, signature, args):
        return load(builder, builder.add(args[0], builder.mul(args[1], I64(8))), I64, 1)

    return types.intp(types.intp, types.intp), build


@intrinsic
def call(typing_context, address, args):
    """Call the function at an address with integers."""

    def build(context, builder, signature, values):
        operands = cgutils.unpack_tuple(builder, values[1])
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(operands)).as_pointer()
        builder.call(builder.inttoptr(values[0], kind), operands)
        return context.get_dummy_value()

    return types.void(types.intp, args), build


def memory_size(blocks, size):
    """Bytes that a thread works in: the tiles' shapes, two edges, packed b and a."""
    rows, depth = blocks
    return 64 + 2 * SQUARE * SQUARE * size + (rows + 1) * depth * SQUARE * STEP * packed_size(size)


@jitted
def column_size(depth, zero):
    """Bytes of the tiles of b one above the other, or of a side by side."""
    _, packed = sizes_of(zero)
    return (depth + STEP - 1) // STEP * TILE * TILE * 2 * packed


@jitted
def is_packed(address, driver):
    """True if the operand that begins at an address is packed already."""
    return word(driver, FIRST) <= address < word(driver, END)


@jitted
def pack_matrix(x, x_row, x_column, to, to_row, first, rows, columns, left, driver, zero):
    """Pack x (rows, columns), in any strides, into a matrix at `to` whose rows have to_row bytes, with room for whole
    SQUAREs of rows and columns: if left as an a, else as a b, into columns `first` on there, a multiple of SQUARE.

    Whole SQUAREs of rows of a packed a, and blocks of DEPTH rows of a packed b, are packed matrices too."""
    size, far = sizes_of(zero)[0], STEP * word(driver, DEPTH)
    edge = word(driver, MEMORY) + 64 + SQUARE * SQUARE * size
    if left != 0:
        for r in range(0, rows, SQUARE):
            pack_a(x + r * x_row, x_row, x_column, min(SQUARE, rows - r), columns, to + r * to_row, edge, zero)
        return 1
    for k in range(0, rows, far):
        depth = min(far, rows - k)
        at = to + k * to_row + first // TILE * column_size(depth, zero)
        for j in range(0, columns, SQUARE):
            pack_b(x + k * x_row + j * x_column, x_row, x_column, depth, min(SQUARE, columns - j), at, edge, zero)
            at += 2 * column_size(depth, zero)
    return 1


@jitted
def multiply_packed(a, b, c, shape, add, driver, zero):
    """c (M, N) = a (M, K) b (K, N), or c += a b if add -> 1. Addresses and strides in bytes: a = (address, row, k), b =
    (address, k), c = (address, row), shape = (M, N, K); of packed operands, `row` and `k` are those of their memory.

    0, with nothing done, where packing costs more than it saves (an extent below LEAST), or rounding would hurt: a is
    one row of neighbours, the ones with which the gradient of a bias is summed."""
    (a, a_row, a_k), (b, b_k), (c, c_row), (M, N, K) = a, b, c, shape
    size, packed = sizes_of(zero)
    least, packed_a, packed_b = word(driver, LEAST), is_packed(a, driver), is_packed(b, driver)
    if least > 0 and not packed_a and not packed_b and (min(M, N, K) < least or (M == 1 and a_k == size)):
        return 0
    memory, far = word(driver, MEMORY), STEP * word(driver, DEPTH)
    height = M if packed_a else SQUARE * word(driver, ROWS)
    edge_c, edge = memory + 64, memory + 64 + SQUARE * SQUARE * size
    place = edge + SQUARE * SQUARE * size
    left = place + far * SQUARE * packed
    if word(driver, ENTER) != 0:
        call(word(driver, ENTER), (memory,))
    for i in range(0, M, height):
        rows = min(height, M - i)
        for k in range(0, K, far):
            depth, more = min(far, K - k), 1 if add != 0 or k > 0 else 0
            steps = (depth + STEP - 1) // STEP
            column = column_size(depth, zero)
            if packed_a:
                corner, row, below = a + i * a_row + column_size(k, zero), a_row, column_size(K, zero)
            else:
                corner, row, below = left, column // TILE, column
                pack_a(a + i * a_row + k * a_k, a_row, a_k, rows, depth, left, edge, zero)
            for j in range(0, N, SQUARE):
                wide, right = min(SQUARE, N - j), b + k * b_k + j // TILE * column if packed_b else place
                if not packed_b:
                    pack_b(b + k * b_k + j * size, b_k, size, depth, wide, right, edge, zero)
                for r in range(0, rows, SQUARE):
                    high, top = min(SQUARE, rows - r), corner + r * row
                    at, down = c + (i + r) * c_row + j * size, c_row
                    whole = high == SQUARE and wide == SQUARE
                    if not whole:  # through a block of its own, so that nothing beside c is touched
                        if more != 0:
                            copy_padded(at, c_row, size, high, wide, edge_c, SQUARE, SQUARE, zero)
                        at, down = edge_c, SQUARE * size
                    call(word(driver, BLOCK), (top, top + below, right, right + column, at, down, steps, more))
                    if not whole:
                        for line in range(high):
                            from_edge, to_c = edge_c + line * SQUARE * size, c + (i + r + line) * c_row + j * size
                            for n in range(wide):
                                poke(to_c, n, peek(from_edge, n, zero))
    if word(driver, LEAVE) != 0:
        call(word(driver, LEAVE), (memory,))
    return 1


# == 3  how it is called ===============================================================================================


def dtype_of(kind):
    return np.dtype(DTYPES[kind])


def addressed(function, count, result=types.void):
    kind = result(*[types.intp] * count)
    return callback(kind, error_model="numpy", _nrt=False)(function)


@functools.cache
def compile_driver(dtype):
    """(`multiply_packed`, `pack_matrix`), compiled for float32 or float64."""
    number = numba.from_dtype(np.dtype(dtype))

    def product_of_dtype(a, a_row, a_k, b, b_k, c, c_row, M, N, K, add, driver):
        return multiply_packed((a, a_row, a_k), (b, b_k), (c, c_row), (M, N, K), add, driver, number(0))

    def pack_of_dtype(x, x_row, x_column, to, to_row, first, rows, columns, left, driver):
        return pack_matrix(x, x_row, x_column, to, to_row, first, rows, columns, left, driver, number(0))

    return addressed(product_of_dtype, 12, types.intp), addressed(pack_of_dtype, 10, types.intp)


@functools.cache
def innermost(kind):
    """(ENTER, BLOCK, LEAVE) of a kind, compiled; None where there is nothing to do."""
    number = numba.from_dtype(dtype_of(kind))

    def enter(memory):
        configure_unit(memory)

    def leave(memory):
        release_unit(memory)

    def amx(top, bottom, left, right, c, c_row, steps, add):
        amx_cell(top, bottom, left, right, c, c_row, steps, add, number(0))

    def avx512(top, bottom, left, right, c, c_row, steps, add):
        avx512_cell(top, bottom, left, right, c, c_row, steps, add, number(0))

    def as_amx(top, bottom, left, right, c, c_row, steps, add):
        amx_stand_in(top, bottom, left, right, c, c_row, steps, add, number(0))

    def as_avx512(top, bottom, left, right, c, c_row, steps, add):
        avx512_stand_in(top, bottom, left, right, c, c_row, steps, add, number(0))

    if kind == "amx":
        return addressed(enter, 1), addressed(amx, 8), addressed(leave, 1)
    return None, addressed({"avx512": avx512, "avx512 stand-in": as_avx512}.get(kind, as_amx), 8), None


def shapes_of_tiles():
    """The configuration that ldtilecfg loads: eight tiles of 16 rows of 64 bytes."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1  # the only palette that there is
    shapes[16:32].view(np.uint16)[:] = 64
    shapes[48:56] = TILE
    return shapes


@functools.cache
def workplaces(threads, size):
    """Memory (threads, size), each row aligned to a cache line and beginning with the tiles' configuration."""
    size = -(-size // CACHE_LINE) * CACHE_LINE
    places = aligned(threads * size, np.uint8).reshape(threads, size)
    places[:, :64] = shapes_of_tiles()
    return places


@functools.cache
def driver_words(threads, kind, blocks):
    """(threads, END + 1): a driver for each thread, with nothing packed beforehand."""
    places = workplaces(threads, memory_size(blocks, dtype_of(kind).itemsize))
    table = np.zeros((threads, END + 1), np.int64)
    table[:, ROWS], table[:, DEPTH] = blocks
    table[:, MEMORY] = places.ctypes.data + np.arange(threads) * places.strides[0]
    functions = (*compile_driver(DTYPES[kind]), *innermost(kind))
    for index, function in zip((MULTIPLY, PACK, ENTER, BLOCK, LEAVE), functions):
        table[:, index] = function.address if function else 0
    table[:, LEAST] = 0 if kind == "float64" else LEAST_EXTENT
    return table


def make_drivers(threads, kind, blocks=BLOCKS):
    """A driver for each thread (threads, END + 1); FIRST and END are the caller's to fill. ValueError if this machine
    cannot run this kind."""
    if kind in INSTRUCTIONS and (reason := hindrance(kind)):
        raise ValueError(reason)
    return driver_words(threads, kind, blocks).copy()


def multiply(a, b, c, add, kind, blocks=BLOCKS, least=0):
    """c = a b, or c += a b if add, through the driver -> c. ValueError where it leaves the product to others: below an
    extent of `least`."""
    words = driver_words(1, kind, blocks).copy()
    words[:, LEAST] = least
    addresses = (a.ctypes.data, *a.strides, b.ctypes.data, b.strides[0], c.ctypes.data, c.strides[0])
    if not compile_driver(DTYPES[kind])[0].ctypes(*addresses, *c.shape, a.shape[1], int(add), words.ctypes.data):
        raise ValueError(f"a product of {a.shape} by {b.shape} is small; expected no extent below {least}")
    return c


def rounded(x):
    """float32 -> the nearest bf16, as float32: the specification of what packing does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    near = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, near.view(np.float32)).astype(np.float32)


def report():
    found, reason = find_bf16()
    print(reason or f"this machine multiplies bf16 by {INSTRUCTIONS[found]}")
    kinds = [kind for kind in DTYPES if kind not in INSTRUCTIONS or hindrance(kind) is None]
    for kind in kinds:
        print(f"{kind:15}  relative error against float64 of the same rounded operands {product_error(kind):.1e}")
    rng = np.random.default_rng(0)
    for M, K, N in ((96, 128, 384), (96, 256, 256), (96, 512, 512)):
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((M, K), (K, N)))
        c, rates = np.zeros((M, N), np.float32), []
        for kind in kinds[:-1]:
            best, until = float("inf"), time.perf_counter() + 0.3
            while time.perf_counter() < until:
                start = time.perf_counter()
                multiply(a, b, c, True, kind)
                best = min(best, time.perf_counter() - start)
            rates.append(f"{kind} {2 * M * K * N / best / 1e9:.0f}")
        print(f"{M} x {K} x {N}, one thread, packing counted: GFLOP/s {', '.join(rates)}")


def main():
    try:
        report()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# == 4  buffers whose products are in bf16 =============================================================================
#
# The kernels are those of float32. `product` asks the driver of its thread first, which makes all but a few small
# products; `pack_operand` lets it pack what is read more than once, into the buffers from `n_T` to the end of `panels`.


KINDS = {"float64": "float64"}  # of products by their dtype, if not what the machine has


def make_bf16_workspace(cfg, B, T, dtype, recompute=False):
    """`make_workspace`, with drivers; ValueError where this machine has none."""
    kind, reason = (KINDS[dtype.name], None) if (dtype := np.dtype(dtype)).name in KINDS else find_bf16()
    if reason:
        raise ValueError(reason)
    drivers = make_drivers(POOL.threads, kind)
    space = make_workspace(cfg, B, T, dtype, recompute, drivers)
    drivers[:, FIRST] = space["n_T"].ctypes.data
    drivers[:, END] = space["panels"].ctypes.data + space["panels"].nbytes
    return space
