"""Elements and arrays at addresses, for code that gets its operands as integers.

It computes nothing of the specification. A function of many arrays takes Numba long to compile and to call; an address
is one number. Order: words (64 bits), elements, arrays.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array


def word_at(builder, words, index=0):
    """Pointer to a word, in the code that an intrinsic builds."""
    return builder.inttoptr(builder.add(words, ir.IntType(64)(8 * index)), ir.IntType(64).as_pointer())


@intrinsic
def peek(typing_context, address, zero):
    """The element at an address, of the type of zero."""

    def build(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(signature.return_type).as_pointer())
        return builder.load(pointer)

    return zero(types.intp, zero), build


@intrinsic
def poke(typing_context, address, value):
    """Store value at an address."""

    def build(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, value), build


def array_of(like, axes):
    """(numba type, its build) of an array at an address, with lengths; elements are of the type of `like`, or of those
    of the array `like`."""
    kind = types.Array(getattr(like, "dtype", like), axes, "C")

    def build(context, builder, signature, args):
        array, lengths = context.make_array(kind)(context, builder), args[1 : 1 + axes]
        size = ir.IntType(64)(context.get_abi_sizeof(context.get_data_type(kind.dtype)))
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
