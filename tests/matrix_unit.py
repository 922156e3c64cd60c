"""The matrix unit of Intel's processors (AMX), for processors that have none: a plugin of pytest, Linux on x86-64 only.

    pytest -p matrix_unit -p no:faulthandler tests/test_tiles.py     # with the environment that test_tiles.py gives it

An instruction that a processor lacks ends in a signal, SIGILL. What is called then reads the instruction and the
registers, does in NumPy what the manual says of it, and lets the program go on behind it: the machine code that users
with the unit run, run to its last instruction. What the manual forbids ends the process.

Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TDPBF16PS and so on, and
2.3 for how they are encoded. signal(7), and ucontext.h of glibc for where the registers are.
"""

import ctypes
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np

TILES, ROWS, ROW = 8, 16, 64  # tiles, their rows, bytes of a row
REGISTERS = 40  # bytes of ucontext_t before them
PLACES = 13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7  # of rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15
NEXT = 16  # place of rip
THREAD = threading.local()  # its tiles, rows and bytes of each: from ldtilecfg to tilerelease


class Illegal(Exception):
    """What the processor would not do."""


# -- what the instructions do


def memory(address, rows, stride, size):
    """View (rows, size) of the bytes at an address."""
    flat = np.frombuffer((ctypes.c_uint8 * ((rows - 1) * stride + size)).from_address(address), np.uint8)
    return np.lib.stride_tricks.as_strided(flat, (rows, size), (stride, 1))


def ldtilecfg(address):
    told = memory(address, 1, 0, 64)[0]
    sizes, rows = told[16:32].view(np.uint16), told[48:56]
    unused = told[1:16].any() or told[32:48].any() or told[56:].any()
    if told[0] != 1 or unused or (sizes > ROW).any() or (rows > ROWS).any() or ((sizes == 0) != (rows == 0)).any():
        raise Illegal(f"ldtilecfg of {told.tolist()}")
    THREAD.tiles = np.zeros((TILES, ROWS, ROW), np.uint8)
    THREAD.shapes = [(int(r), int(size)) for r, size in zip(rows, sizes)]


def tilerelease():
    THREAD.tiles = None


def tile(number):
    """View of what a tile holds, in bytes."""
    if getattr(THREAD, "tiles", None) is None:
        raise Illegal("a tile in a thread that has not told the unit their shapes, or has released it")
    rows, size = THREAD.shapes[number]
    return THREAD.tiles[number, :rows, :size]


def tilezero(number):
    tile(number)
    THREAD.tiles[number] = 0


def tileloadd(number, address, stride):
    rows, size = tile(number).shape
    THREAD.tiles[number] = 0
    tile(number)[:] = memory(address, rows, stride, size)


def tilestored(number, address, stride):
    rows, size = tile(number).shape
    memory(address, rows, stride, size)[:] = tile(number)


def to_float32(x):
    """The nearest float32; 0 with the sign of x for those that are no normal numbers."""
    x = np.asarray(x, np.float32)
    return x * (np.abs(x) >= np.finfo(np.float32).tiny)


def widened(pairs):
    """Bytes (rows, 4 n) of pairs of bf16 -> float64 (2, rows, n): the first and the second of each."""
    words = np.ascontiguousarray(pairs).view(np.uint32)
    sides = np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)])
    return to_float32(sides.view(np.float32)).astype(np.float64)


def tdpbf16ps(c, a, b):
    (rows, wide), (deep, size) = tile(a).shape, tile(b).shape
    if tile(c).shape != (rows, size) or wide != 4 * deep:
        raise Illegal(f"tdpbf16ps of tiles {tile(a).shape} and {tile(b).shape} into {tile(c).shape}")
    x, y = widened(tile(a)), widened(tile(b))
    sums = np.zeros((2, rows, size // 4), np.float32)
    for k in range(deep):  # fused multiply-adds: rounded once, but where float64 is too short for the sum, one in 2^29
        sums = to_float32(x[:, :, k, None] * y[:, k, None] + sums)
    old = to_float32(np.ascontiguousarray(tile(c)).view(np.float32))
    tile(c)[:] = to_float32(old + to_float32(sums[0] + sums[1])).view(np.uint8)


# -- how they are encoded

MOVES = {3: tileloadd, 1: tileloadd, 2: tilestored}  # by prefix; 1 has a hint to the cache


def decode(code, registers):
    """Bytes of an instruction, values of the 16 registers -> (function, its arguments, length)."""
    extended, more, opcode, modes = code[1:5]
    if code[0] != 0xC4 or extended & 31 != 2 or more & 0x84:  # three-byte VEX, map 0F38, 128 bits, W0
        raise Illegal(f"instruction {code.hex(' ')}")
    mode, register, place, prefix = modes >> 6, modes >> 3 & 7, modes & 7, more & 3
    third = ~more >> 3 & 15
    if mode == 3:
        if (prefix, opcode, modes) == (0, 0x49, 0xC0):
            return tilerelease, (), 5
        if (prefix, opcode) == (3, 0x49) and place == 0:
            return tilezero, (register,), 5
        if (prefix, opcode) == (2, 0x5C):
            return tdpbf16ps, (register, place, third), 5
        raise Illegal(f"instruction {code.hex(' ')}")
    length, base, index, shift = 5, place + 8 * (~extended >> 5 & 1), None, 0
    if place == 4:
        length, (shift, index, base) = 6, (code[5] >> 6, code[5] >> 3 & 7, code[5] & 7)
        index, base = index + 8 * (~extended >> 6 & 1), base + 8 * (~extended >> 5 & 1)
    if mode == 0 and base & 7 == 5:
        raise Illegal(f"instruction {code.hex(' ')}: an address that LLVM has not used so far")
    far = (0, 1, 4)[mode]
    address = registers[base] + int.from_bytes(code[length : length + far], "little", signed=True)
    step = registers[index] << shift if index not in (None, 4) else 0
    if (prefix, opcode) == (0, 0x49):
        return ldtilecfg, (address + step,), length + far
    if place != 4 or opcode != 0x4B or prefix not in MOVES:
        raise Illegal(f"instruction {code.hex(' ')}")
    return MOVES[prefix], (register, address, step), length + far


# -- the signal

CALLED = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
SA_SIGINFO, SA_NODEFER = 4, 0x40000000


class Action(ctypes.Structure):
    """struct sigaction of glibc."""

    _fields_ = [("handler", CALLED), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int), ("rest", ctypes.c_void_p)]


COUNTS = SimpleNamespace(instructions=0, products=0)


@CALLED
def on_illegal_instruction(number, information, context):
    registers = (ctypes.c_int64 * 23).from_address(context + REGISTERS)
    try:
        code = ctypes.string_at(registers[NEXT], 10)
        function, args, length = decode(code, [registers[place] for place in PLACES])
        with np.errstate(all="ignore"):
            function(*args)
        registers[NEXT] += length
        COUNTS.instructions += 1
        COUNTS.products += function is tdpbf16ps
    except BaseException as error:
        os.write(2, f"matrix_unit.py: {error!r}\n".encode())
        os._exit(128 + signal.SIGILL)


def pretend():
    """From now on this process has the unit, and Linux grants it -> fast.bf16."""
    from fast import bf16

    libc = ctypes.CDLL(None, use_errno=True)
    action = Action(on_illegal_instruction, (ctypes.c_ulong * 16)(), SA_SIGINFO | SA_NODEFER, None)
    if libc.sigaction(signal.SIGILL, ctypes.byref(action), None):
        raise OSError(ctypes.get_errno(), "sigaction")
    bf16.ask_linux = lambda: 0
    return bf16


def pytest_configure(config):
    if reason := pretend().hindrance("amx"):
        raise SystemExit(f"matrix_unit.py: {reason}")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"matrix unit: {COUNTS.instructions} instructions, {COUNTS.products} products")
