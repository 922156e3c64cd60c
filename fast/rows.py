"""Functions of rows: exponential, norms, activations, dropout, maximum; sections 2.2, 2.3 and 2.6.

It replaces the loops of tinygpt.py, section 8, and `exp` of section 7. Every function is arithmetic on elements that
are neighbours in memory, so that LLVM makes vector instructions of the loops. `exp` takes 0.2 ns an element, Numba's
`math.exp` 1.7. The others were not measured by themselves.

Order: exp, the norms, the activations with their backwards, dropout, the maximum.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from fast.jit import COMPILE, GELU_CUBE, GELU_SCALE, MLPS, inlined


@intrinsic
def bits_of(typing_context, x):
    return types.uint32(types.float32), lambda c, builder, s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def float_of(typing_context, x):
    return types.float32(types.uint32), lambda c, builder, s, args: builder.bitcast(args[0], ir.FloatType())


def exp(x):
    """e^x; in float32 within 1.2e-7, by arithmetic that vectorises, held at the ends of -87 .. 88. NaN stays NaN."""
    return math.exp(x)


@overload(exp, jit_options=COMPILE | {"fastmath": {"contract"}})  # reordered, ln 2 would lose its low part
def exp_by_type(x):
    f, u, i = np.float32, np.uint32, np.int32
    ln2_high, ln2_low = f(0.693359375), f(-2.12194440e-4)  # their sum is ln 2; the first times k is exact

    def exp32(x):
        x = f(-87.0) if x < f(-87.0) else f(88.0) if x > f(88.0) else x
        k = np.rint(x * f(1.4426950408889634))
        r = (x - k * ln2_high) - k * ln2_low  # e^x = 2^k e^r, |r| <= ln2 / 2; polynomial of Moshier's Cephes, expf
        p = f(1.9875691500e-4)
        p = p * r + f(1.3981999507e-3)
        p = p * r + f(8.3334519073e-3)
        p = p * r + f(4.1665795894e-2)
        p = p * r + f(1.6666665459e-1)
        p = p * r + f(5.0000001201e-1)
        p = p * r * r + r + f(1.0)
        return float_of(bits_of(p) + u(i(k) << i(23)))

    return exp32 if x == types.float32 else lambda x: math.exp(x)


NO_NORM, RMSNORM, LAYERNORM = range(3)
KERNEL_NORMS = {"rmsnorm": RMSNORM, "layernorm": LAYERNORM}


@inlined
def norm_rows(kind, x, w, b, eps, mean, rstd, y):
    """x (rows, C) -> y (rows, C) and the rows' mean and rstd; section 2.2, where RMSNorm's mean is 0."""
    one, C = x.dtype.type(1), x.dtype.type(x.shape[1])
    for i in range(x.shape[0]):
        m, r, total, square = x.dtype.type(0), one, x.dtype.type(0), x.dtype.type(0)
        if kind == LAYERNORM:
            for c in range(x.shape[1]):
                total += x[i, c]
            m = total / C
        if kind != NO_NORM:
            for c in range(x.shape[1]):
                square += (x[i, c] - m) * (x[i, c] - m)
            r = one / np.sqrt(square / C + x.dtype.type(eps))
        mean[i], rstd[i] = m, r
        for c in range(x.shape[1]):
            y[i, c] = (x[i, c] - m) * r * w[c] + b[c]


@inlined
def norm_rows_backward(kind, dn, x, w, b, mean, rstd, dx, n, sums):
    """dn (rows, C), the gradient of the norm's output -> adds into dx; n = the output again; sums (2, C) = dw, db."""
    zero, C = x.dtype.type(0), x.dtype.type(x.shape[1])
    for c in range(x.shape[1]):
        sums[0, c] = sums[1, c] = 0
    for i in range(x.shape[0]):
        m, r = mean[i], rstd[i]
        total = dot = x.dtype.type(0)
        for c in range(x.shape[1]):
            normal = (x[i, c] - m) * r
            total += dn[i, c] * w[c]
            dot += dn[i, c] * w[c] * normal
            sums[0, c] += dn[i, c] * normal
            sums[1, c] += dn[i, c]
            n[i, c] = normal * w[c] + b[c]
        total, dot = total / C if kind == LAYERNORM else zero, dot / C if kind != NO_NORM else zero
        for c in range(x.shape[1]):  # dx = rstd (dn w - mean(dn w) - n mean(dn w n))
            dx[i, c] += r * (dn[i, c] * w[c] - total - (x[i, c] - m) * r * dot)


# LLVM knows that elements are contiguous in a slice of one row, but not in a block of columns. So functions of columns
# first .. last - 1 take whole arrays and slice them row by row.


@inlined
def set_rows(b, y, start, stop, first, last):
    """Rows start .. stop - 1 of y (N, F), in these columns, = b (F,)."""
    b = b[first:last]
    for i in range(start, stop):
        row = y[i, first:last]
        for c in range(row.size):
            row[c] = b[c]


def erf_of(x):
    """The error function; in float32 within 1.2e-7, by arithmetic that vectorises."""
    return math.erf(x)


@overload(erf_of, jit_options=COMPILE)
def erf_of_by_type(x):
    f = np.float32

    def erf32(x):  # 1 - e^(-x Q(x)) for x of 0 .. 4, where it becomes 1; Q: a minimax fit, within 1.6e-8
        size = f(4) if abs(x) > f(4) else abs(x)
        q = f(3.144018797e-5)
        q = q * size + f(-3.088024124e-4)
        q = q * size + f(1.032402455e-3)
        q = q * size + f(5.369319846e-4)
        q = q * size + f(-1.958395899e-2)
        q = q * size + f(1.029196126e-1)
        q = q * size + f(6.365977336e-1)
        q = q * size + f(1.128380251)
        y = f(1) - exp(-q * size)
        return y if x > f(0) else -y

    return erf32 if x == types.float32 else lambda x: math.erf(x)


ACTIVATION = {name: kind for kind, name in enumerate(MLPS)}
GELU_TANH, GELU, SILU, RELU2, SWIGLU = ACTIVATION.values()


@inlined
def activation_rows(kind, h, start, first, gated, a):
    """a (rows, columns) = f(h), section 2.3, h (N, F) from row `start`, column `first` on; a gate's values are
    `gated` columns after it. gelu-tanh: (1 + tanh u) / 2 = 1 / (1 + e^-2u)."""
    one, half, zero = h.dtype.type(1), h.dtype.type(0.5), h.dtype.type(0)
    scale, cube, root = h.dtype.type(2 * GELU_SCALE), h.dtype.type(GELU_CUBE), h.dtype.type(math.sqrt(0.5))
    for i in range(a.shape[0]):
        h_row, a_row = h[start + i, first : first + a.shape[1]], a[i]
        if kind == GELU_TANH:
            for f in range(h_row.size):
                v = h_row[f]
                a_row[f] = v / (one + exp(-scale * (v + cube * v * v * v)))
        elif kind == GELU:
            for f in range(h_row.size):
                a_row[f] = half * h_row[f] * (one + erf_of(h_row[f] * root))
        elif kind == RELU2:
            for f in range(h_row.size):
                v = max(h_row[f], zero)
                a_row[f] = v * v
        else:
            for f in range(h_row.size):
                a_row[f] = h_row[f] / (one + exp(-h_row[f]))
            if kind == SWIGLU:
                value_row = h[start + i, gated + first : gated + first + a.shape[1]]
                for f in range(h_row.size):
                    a_row[f] *= value_row[f]


@inlined
def activation_rows_backward(kind, h, da, start, first, gated, a, dh):
    """da (rows, columns) -> a (rows, columns) again, and dh (N, F or 2 F) from row `start` and column `first` on."""
    one, half, zero, last = h.dtype.type(1), h.dtype.type(0.5), h.dtype.type(0), first + da.shape[1]
    scale, cube, root = h.dtype.type(2 * GELU_SCALE), h.dtype.type(GELU_CUBE), h.dtype.type(math.sqrt(0.5))
    cube3, peak = h.dtype.type(3 * GELU_CUBE), h.dtype.type(1 / math.sqrt(2 * math.pi))
    for i in range(da.shape[0]):
        h_row, da_row = h[start + i, first:last], da[i]
        a_row, dh_row = a[i], dh[start + i, first:last]
        if kind == GELU_TANH:
            for f in range(h_row.size):
                v = h_row[f]
                s = one / (one + exp(-scale * (v + cube * v * v * v)))  # a = v s, ds/dv = s (1 - s) d(2u)/dv
                a_row[f] = v * s
                dh_row[f] = da_row[f] * (s + v * s * (one - s) * scale * (one + cube3 * v * v))
        elif kind == GELU:
            for f in range(h_row.size):
                v = h_row[f]
                s = half * (one + erf_of(v * root))
                a_row[f] = v * s
                dh_row[f] = da_row[f] * (s + v * peak * exp(-half * v * v))
        elif kind == RELU2:
            for f in range(h_row.size):
                v = max(h_row[f], zero)
                a_row[f] = v * v
                dh_row[f] = da_row[f] * (v + v)
        elif kind == SILU:
            for f in range(h_row.size):
                v = h_row[f]
                s = one / (one + exp(-v))
                a_row[f] = v * s
                dh_row[f] = da_row[f] * (s + v * s * (one - s))
        else:
            value_row = h[start + i, gated + first : gated + last]
            dvalue_row = dh[start + i, gated + first : gated + last]
            for f in range(h_row.size):
                v, value = h_row[f], value_row[f]
                s = one / (one + exp(-v))
                a_row[f] = v * s * value
                dvalue_row[f] = da_row[f] * v * s
                dh_row[f] = da_row[f] * value * (s + v * s * (one - s))


@inlined
def mix(x):
    """`mix` of section 2.6."""
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@inlined
def drop_row(x, first, key, row, threshold, keep):
    """x (M,) times its mask, section 2.6; its first element is column `first` of row `row`."""
    key = mix(np.uint32(key + np.uint32(row)))
    for c in range(x.size):
        drawn = mix(np.uint32(key + np.uint32(first + c)))
        x[c] = x[c] * keep if drawn >= threshold else x.dtype.type(0)


def maximum(x):
    """The largest of x (count,); a NaN may win or be passed over."""
    return x.max()


@overload(maximum, jit_options=COMPILE)
def maximum_by_type(x):
    i = np.int32

    def maximum32(x):  # as integers in the order of the floats: a maximum of floats does not vectorise
        top = i(-(2**31))
        for s in range(x.size):
            bits = i(bits_of(x[s]))
            top = max(top, bits ^ ((bits >> i(31)) & i(0x7FFFFFFF)))
        return float_of(np.uint32(top ^ ((top >> i(31)) & i(0x7FFFFFFF))))

    def maximum64(x):
        top = x[0]
        for s in range(1, x.size):
            top = max(top, x[s])
        return top

    return maximum32 if x.dtype == types.float32 else maximum64
