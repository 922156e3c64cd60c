"""A file that one process at a time writes: the log of a run, the table of a sweep."""

import contextlib
import os

import bpe

BUSY = "another process writes the run"  # extras/sweep.py looks for it


def lock_file(file):
    """Lock an open file until it is closed or its process ends, however it ends. False if another process has locked
    it; OSError where the file system has no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file.fileno(), 2**30, os.SEEK_SET)  # a byte that nobody reads: Windows locks it for readers, too
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def lock_log(folder):
    """The log of a run, open for appending; locked until it is closed. ValueError if another process has it.

    Whoever has the lock removes what a run that was killed left half written.
    """
    log = open_locked(folder / "log.jsonl", f"{BUSY} in {folder}")
    for left in folder.glob("*.safetensors.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()
    return log


def open_locked(path, busy):
    """`path`, open for appending and locked until it is closed or its process ends. ValueError, with the words of
    `busy`, if another process has locked it."""
    file = open(path, "a", encoding="utf-8", newline="\n")
    try:
        if not lock_file(file):
            file.close()
            raise ValueError(f"{busy}; wait for its end or name another --out")
    except OSError as error:  # some network file systems have no locks
        bpe.note(f"{path.parent} cannot be locked ({error.strerror}): see to it that no second run writes there")
    return file
