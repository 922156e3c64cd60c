"""How the kernels of this package are compiled: Numba's options, and functions that are inlined into kernels.

It computes nothing of the specification. Read from the top.
"""

import numba
from llvmlite import binding
from numba.extending import register_jitable

import tinygpt  # noqa: F401  its import sets the processor that Numba compiles for

FASTMATH = {"contract", "reassoc", "nsz", "arcp"}  # neither nnan nor ninf: a NaN must be seen
# Numba's own error model checks divisions: no vectors. Kernels allocate nothing: nobody need count who holds an array.
COMPILE = {"error_model": "numpy", "_nrt": False, "fastmath": FASTMATH}
# Of a kernel, compiled with it; called from Python it is Python. Always inlined: of a function that kernels share, the
# linker takes the copy that comes first, another one when they come from the cache, and the copies' sums may differ.
part = register_jitable(**COMPILE, forceinline=True)
# with sums and products in the order in which they are written, whatever is compiled around them
ordered_part = register_jitable(**COMPILE | {"fastmath": {"contract", "nsz"}}, forceinline=True)
# of the bf16 driver: with FASTMATH, the sums of its stand-in would be reordered
plain_part = register_jitable(error_model="numpy")


def compiles_for(feature):
    """Whether the processor that Numba compiles for has a feature, by LLVM's name."""
    if numba.config.CPU_NAME:
        return f"+{feature}" in (numba.config.CPU_FEATURES or "").split(",")
    return binding.get_host_cpu_features().get(feature, False)
