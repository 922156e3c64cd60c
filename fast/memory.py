"""Elements, vectors and arrays at addresses: what the intrinsics of this package are built of.

It computes nothing of the specification, and tier 2 has nothing like it. A function of many arrays takes Numba long to
compile and to call; an address is one number. How much that gains was not measured by itself. Order: LLVM code for
vectors, then what jitted code calls: elements, arrays.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

I8, I32, I64 = (ir.IntType(bits) for bits in (8, 32, 64))


def word_at(builder, words, index=0):
    """Pointer to a word, in the code that an intrinsic builds."""
    return builder.inttoptr(builder.add(words, I64(8 * index)), I64.as_pointer())


def load(builder, address, kind, align):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def store(builder, value, address, align):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def splat(kind, value):
    """Constant vector of a type: one value in all lanes."""
    return ir.Constant(kind, [value] * kind.count)


def broadcast(builder, value, vector):
    """Vector of a type with one value in all lanes."""
    undefined = ir.Constant(vector, ir.Undefined)
    first_lane = splat(ir.VectorType(I32, vector.count), 0)
    return builder.shuffle_vector(builder.insert_element(undefined, value, I32(0)), undefined, first_lane)


def multiply_add(builder, a, b, c):
    """Vector a b + c, rounded once."""
    size = {"float": 32, "double": 64}[str(c.type.element)]
    name, kind = f"llvm.fma.v{c.type.count}f{size}", ir.FunctionType(c.type, [c.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def transpose(builder, rows):
    """n vectors of n lanes -> n vectors: lane j of vector i becomes lane i of vector j."""
    n = len(rows)
    zipped = [lane for i in range(n) for lane in (i, n + i)]  # of two rows, element by element
    masks = [ir.Constant(ir.VectorType(I32, n), half) for half in (zipped[:n], zipped[n:])]
    for _ in range(n.bit_length() - 1):  # a round moves the first bit of (row, column) to its end: after log2 n rounds
        pairs = zip(rows[: n // 2], rows[n // 2 :])  # row and column have changed places
        rows = [builder.shuffle_vector(*pair, mask) for pair in pairs for mask in masks]
    return rows


@intrinsic
def peek(typing_context, address, index, zero):
    """Element `index` of those at an address, of the type of zero."""

    def build(context, builder, signature, args):
        scalar = context.get_value_type(zero)
        pointer = builder.gep(builder.inttoptr(args[0], scalar.as_pointer()), [args[1]])
        return builder.load(pointer, align=context.get_abi_sizeof(scalar))

    return zero(types.intp, types.intp, zero), build


@intrinsic
def poke(typing_context, address, index, value):
    """Store a value as element `index` of those at an address."""

    def build(context, builder, signature, args):
        scalar = args[2].type
        pointer = builder.gep(builder.inttoptr(args[0], scalar.as_pointer()), [args[1]])
        builder.store(args[2], pointer, align=context.get_abi_sizeof(scalar))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, value), build


@intrinsic
def size_of(typing_context, zero):
    """Bytes of an element of the type of zero."""

    def build(context, builder, signature, args):
        return I64(context.get_abi_sizeof(context.get_value_type(zero)))

    return types.intp(zero), build


def array_of(like, axes):
    """(numba type, its build) of an array at an address, with lengths; elements are of the type of `like`, or of those
    of the array `like`."""
    kind = types.Array(getattr(like, "dtype", like), axes, "C")

    def build(context, builder, signature, args):
        array, lengths = context.make_array(kind)(context, builder), args[1 : 1 + axes]
        size = I64(context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        strides = [builder.mul(size, lengths[-1]), size][-axes:]
        data = builder.inttoptr(args[0], array.data.type)
        populate_array(array, data=data, shape=lengths, strides=strides, itemsize=size, meminfo=None)
        return array._getvalue()

    return kind, build


@intrinsic
def vector(typing_context, address, count, like):
    kind, build = array_of(like, 1)
    return kind(types.intp, types.intp, like), build


@intrinsic
def matrix(typing_context, address, rows, columns, like):
    kind, build = array_of(like, 2)
    return kind(types.intp, types.intp, types.intp, like), build
