"""How the kernels of this package are compiled: Numba's options, inlined functions, the stamp of cached functions.

It computes nothing of the specification. Tier 2 compiles with `kernel` of tinygpt.py, section 5; here:

- Functions that kernels share are inlined, always. Else the linker takes the copy that comes first, another one when
  kernels come from the cache, and sums of the copies may differ: with inlining, bytes do not depend on the cache.
- Numba's cache notices a change only in the file of the cached function, and a kernel here calls functions of several
  files. So the name of every cached function ends in `STAMP`, a checksum of all sources of the package: whatever is
  edited, kernels are compiled anew. It takes 0.3 ms at import.

Read from the top.
"""

import contextlib
import functools
import hashlib
import re
from pathlib import Path

import numba
from llvmlite import binding
from numba.core import sigutils
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.extending import register_jitable

# and its import sets the processor to compile for
from tinygpt import CACHE_LINE, CHOICES, GELU_CUBE, GELU_SCALE, open_cache

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, and fast/ is nothing without compiled code")

FASTMATH = {"contract", "reassoc", "nsz", "arcp"}  # neither nnan nor ninf: a NaN must be seen
# Numba's own error model checks divisions: no vectors. Kernels allocate nothing, so arrays need no reference counts.
COMPILE = {"error_model": "numpy", "_nrt": False, "fastmath": FASTMATH}
# For functions that kernels call; called from Python they run as Python.
inlined = register_jitable(**COMPILE, forceinline=True)
# the same, with sums and products in the order in which they are written, whatever is compiled around them
inlined_in_order = register_jitable(**COMPILE | {"fastmath": {"contract", "nsz"}}, forceinline=True)
# for the bf16 driver: with FASTMATH, the sums of its stand-in would be reordered
jitted = register_jitable(error_model="numpy")

# Constants of tinygpt.py that compiled code contains. Kernels take them from here, so that the stamp covers them.
MLPS = CHOICES["mlp"]
SPECIFICATION = CACHE_LINE, GELU_CUBE, GELU_SCALE, MLPS


def stamp():
    """Ten hexadecimal digits that change with the sources of this package and with SPECIFICATION."""
    digest = hashlib.sha256(repr(SPECIFICATION).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:10]


STAMP = stamp()


class LateCache(NullCache):
    """Numba's cache of a function, opened when it is compiled, so that importing touches no file; then the files of
    other stamps are removed."""

    def __init__(self, function):
        self.function, self.opened = function, NullCache()

    cache_path = property(lambda self: self.opened.cache_path)

    def load_overload(self, *key):
        self.opened = open_cache(self.function)
        if self.cache_path:
            remove_once(self.cache_path)
        return self.opened.load_overload(*key)

    def save_overload(self, *key):
        self.opened.save_overload(*key)


def cached(compiler, function):
    """compiler(function), kept in Numba's cache under a name that ends in STAMP, after which files are called."""
    function.__qualname__ += f"-{STAMP}"
    compiled = compiler(function)
    compiled._cache = LateCache(function)
    return compiled


def callback(signature, **options):
    """numba.cfunc, cached."""

    def compile(function):
        compiled = cached(lambda f: CFunc(f, sigutils.normalize_signature(signature), {}, options), function)
        compiled.compile()
        return compiled

    return compile


def remove_old_kernels(folder):
    """Delete the cache files of other stamps. Other processes may delete them too, or the folder be read-only."""
    for path in Path(folder).glob("*.nb[ci]"):
        found = re.search(r"-([0-9a-f]{10})-\d+\.py", path.name)
        if found and found[1] != STAMP:
            with contextlib.suppress(OSError):
                path.unlink()


remove_once = functools.cache(remove_old_kernels)


def compiles_for(feature):
    """True if the processor that Numba compiles for has a feature, by LLVM's name."""
    if numba.config.CPU_NAME:
        return f"+{feature}" in (numba.config.CPU_FEATURES or "").split(",")
    return binding.get_host_cpu_features().get(feature, False)
