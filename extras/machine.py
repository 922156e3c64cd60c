"""What depends on the machine: the CPU quota of a container, and a kernel cache that is damaged or read-only.
tinygpt.py uses this file if it is there."""

import contextlib
import os
from pathlib import Path

from numba.core.caching import FunctionCache, NullCache

import tinygpt


def within_quotas(cores, groups="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Of so many cores, those that the quotas of Linux's control groups, versions 1 and 2, let this process use."""
    lines = Path(groups).read_text(encoding="utf-8").splitlines() if os.path.exists(groups) else ()
    for _, kinds, path in (line.split(":", 2) for line in lines):  # `kinds` is "" in version 2
        version_1 = "cpu" in kinds.split(",")
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version_1 else ("cpu.max",)
        group = Path(root, "cpu" * version_1, path.strip("/"))
        for folder in (group, *group.parents):  # a container may see the folders from its own on alone
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" and -1: no quota
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                cores = min(cores, -(-quota // period)) if quota > 0 else cores
    return max(1, cores)


class Cache(FunctionCache):
    @contextlib.contextmanager
    def _guard_against_spurious_io_errors(self):  # around Numba's loads and saves
        with contextlib.suppress(OSError):  # a full disk
            try:
                yield
            except Exception:  # what unpickling a file that a power loss cut short may raise: compile again
                self.flush()


def open_cache(function):
    """Numba's cache of a function, which recompiles damaged files; a cache that keeps nothing if no folder is
    writable."""
    try:
        return Cache(function)
    except RuntimeError:
        tinygpt.note_once("no folder can be written to keep compiled kernels in; NUMBA_CACHE_DIR names another")
        return NullCache()
