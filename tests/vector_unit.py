"""AVX512-BF16 for processors that have none: an interpreter of the assembly that LLVM writes for the innermost block.

`run(listing, arguments)` carries out a function, instruction by instruction, on this process's memory: integers in
Python, vectors of 16 float32 in NumPy. So the code that users with the instruction run is run wherever LLVM knows
x86-64. An instruction that the block has not had so far is an error.

Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, VDPBF16PS; System V application binary interface
for x86-64, 3.2.3, for where the arguments are.
"""

import ctypes
import operator
import re

import numpy as np
from matrix_unit import to_float32

LOW = "ax bx cx dx si di bp sp".split()
NAMES = {f"r{name}": (f"r{name}", 64) for name in LOW} | {f"e{name}": (f"r{name}", 32) for name in LOW}
NAMES |= {f"r{i}{suffix}": (f"r{i}", bits) for i in range(8, 16) for suffix, bits in (("", 64), ("d", 32), ("b", 8))}
NAMES |= {name: (f"r{name[0]}x", 8) for name in ("al", "bl", "cl", "dl")}
NAMES |= {f"{name}l": (f"r{name}", 8) for name in LOW[4:]}
BITS = {"q": 64, "l": 32, "b": 8}
ARGUMENTS = "rdi rsi rdx rcx r8 r9".split()
MEMORY = re.compile(r"(-?\d*)\(([^)]*)\)")
SIGNED = {"l": operator.lt, "ge": operator.ge, "g": operator.gt, "le": operator.le}  # after cmp or test


def dot_pairs(total, a, b):
    """total (16,) float32 + the products of pairs of bf16, words (16,) each: the second of a pair, then the first."""
    total = to_float32(total)
    for side in (np.uint32(0xFFFF0000), None):
        x, y = (to_float32((w & side if side else w << np.uint32(16)).view(np.float32)) for w in (a, b))
        total = (x.astype(np.float64) * y + total).astype(np.float32)  # fused: rounded once
    return to_float32(total)


class Processor:
    def __init__(self, listing, arguments):
        lines = (line.split("#")[0].strip() for line in listing.splitlines())
        lines = [line for line in lines if line and (line[0] != "." or line.startswith(".LBB"))]
        self.labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
        self.code = [(*line.split(None, 1), "")[:2] for line in lines]
        self.stack = np.zeros(1 << 12, np.uint8)
        self.r = dict.fromkeys({name for name, _ in NAMES.values()}, 0)
        self.z, self.flags = {}, None  # (result, left, right): what conditions ask of the last one that sets flags
        self.r["rsp"] = self.stack.ctypes.data + 2048
        for value in reversed(arguments[len(ARGUMENTS) :]):
            self.push(value)
        self.r |= dict(zip(ARGUMENTS, arguments))
        self.push(0)  # the address to return to

    def push(self, value):
        self.r["rsp"] -= 8
        ctypes.c_uint64.from_address(self.r["rsp"]).value = value & (1 << 64) - 1

    def pop(self):
        self.r["rsp"] += 8
        return ctypes.c_uint64.from_address(self.r["rsp"] - 8).value

    def address(self, text):
        far, inside = MEMORY.fullmatch(text).groups()
        base, index, scale = (*inside.replace("%", "").split(","), "", "")[:3]
        total = int(far or 0) + (self.r[base] if base else 0) + (self.r[index] * int(scale or 1) if index else 0)
        return total & (1 << 64) - 1

    def get(self, text, bits):
        """Value of an operand of this many bits, not negative."""
        if text[0] == "$":
            return int(text[1:]) & (1 << bits) - 1
        if text[0] == "%":
            name, bits = NAMES[text[1:]]
            return self.r[name] & (1 << bits) - 1
        return int.from_bytes(ctypes.string_at(self.address(text), bits // 8), "little")

    def set(self, text, value, bits):
        value &= (1 << bits) - 1
        if text[0] == "%":
            name, bits = NAMES[text[1:]]
            self.r[name] = value if bits >= 32 else self.r[name] & ~255 | value  # 32 bits clear the upper half
        else:
            ctypes.memmove(self.address(text), value.to_bytes(bits // 8, "little"), bits // 8)
        self.flags = value, None, None

    def move(self, text, value, bits):
        """`set` that leaves the flags as they are."""
        flags = self.flags
        self.set(text, value, bits)
        self.flags = flags

    def holds(self, condition):
        result, left, right = self.flags
        return (result == 0) == (condition == "e") if condition in ("e", "ne") else SIGNED[condition](left, right)

    def vector(self, text):
        """Words (16,) of a vector register, a memory operand, or one word of memory for all lanes."""
        if text[0] == "%":
            return self.z[text[2:].lstrip("m")]
        words = 1 if text.endswith("{1to16}") else 16
        data = ctypes.string_at(self.address(text.removesuffix("{1to16}")), 4 * words)
        return np.broadcast_to(np.frombuffer(data, np.uint32), 16)

    def step(self, name, words):
        operands = re.findall(r"[^,\s(]*\([^)]*\)(?:\{1to16\})?|[^,\s]+", words)
        stem, bits = name[:-1], BITS.get(name[-1], 64)
        if name in ("vmovups", "vmovaps"):
            if name == "vmovaps" and (memory := [text for text in operands if "(" in text]):
                assert self.address(memory[0]) % 64 == 0, "vmovaps of an address that is not aligned"
            value = self.vector(operands[0])
            if operands[1][0] == "%":
                self.z[operands[1][2:].lstrip("m")] = value
            else:
                ctypes.memmove(self.address(operands[1]), value.tobytes(), 64)
        elif name in ("vbroadcastss", "vpbroadcastd"):
            self.z[operands[1][2:].lstrip("m")] = self.vector(f"{operands[0]}{{1to16}}")
        elif name in ("vxorps", "vpxor", "vpxord") and len(set(operands)) == 1:
            self.z[operands[0][2:].lstrip("m")] = np.zeros(16, np.uint32)
        elif name == "vdpbf16ps":
            a, b, total = (self.vector(text) for text in operands)
            self.z[operands[2][2:].lstrip("m")] = dot_pairs(total.view(np.float32), a, b).view(np.uint32)
        elif name == "pushq":
            self.push(self.get(operands[0], 64))
        elif name == "popq":
            self.move(operands[0], self.pop(), 64)
        elif name.startswith("cmov"):
            if self.holds(name[4:-1]):
                self.move(operands[1], self.get(operands[0], bits), bits)
        elif stem in ("mov", "movabs"):
            self.move(operands[1], self.get(operands[0], bits), bits)
        elif stem == "lea":
            self.move(operands[1], self.address(operands[0]), bits)
        elif stem in ("cmp", "test"):
            right, left = (self.get(text, bits) for text in operands)
            result = (left - right if stem == "cmp" else left & right) & (1 << bits) - 1
            self.flags = result, *(x - (x >> bits - 1 << bits) for x in (left, right))
        elif stem in ("inc", "dec", "neg"):
            x = self.get(operands[0], bits)
            self.set(operands[0], {"inc": x + 1, "dec": x - 1, "neg": -x}[stem], bits)
        elif stem in ("add", "sub", "and", "or", "xor", "imul", "shl", "shr"):
            x, y = self.get(operands[-1], bits), self.get(operands[0], bits)
            values = {"add": x + y, "sub": x - y, "and": x & y, "or": x | y, "xor": x ^ y, "imul": x * y}
            values |= {"shl": x << (y & 63), "shr": x >> (y & 63)}
            self.set(operands[-1], values[stem], bits)
        elif name != "vzeroupper":
            raise NotImplementedError(f"{name} {words}")

    def run(self):
        """-> how many times each instruction was carried out."""
        at, counts = 0, {}
        while True:
            name, words = self.code[at]
            at += 1
            counts[name] = counts.get(name, 0) + (not name.endswith(":"))
            if name == "retq":
                return counts
            if name[0] == "j":
                at = self.labels[words] if name == "jmp" or self.holds(name[1:]) else at
            elif not name.endswith(":"):
                self.step(name, words)


def run(listing, arguments):
    """Carry out the first function of a listing, compiled by Numba: two addresses, for what it returns and what it
    raises, come before its arguments -> {instruction: how often}."""
    result = np.zeros(2, np.int64)
    return Processor(listing, [result.ctypes.data, result.ctypes.data + 8, *arguments]).run()
