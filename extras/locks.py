"""Files that one process writes at a time: a lock that ends with its process, however that ends."""

import os

import bpe


def open_locked(path, busy):
    """`path`, open for appending and locked until it is closed or its process ends. ValueError, with the words of
    `busy`, if another process has locked it."""
    file = open(path, "a", encoding="utf-8", newline="\n")
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file.fileno(), 2**30, os.SEEK_SET)  # a byte that nobody reads: Windows locks it for readers, too
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"{busy}; wait for its end or name another --out") from None
    except OSError as error:  # some network file systems have no locks
        bpe.note(f"{path.parent} cannot be locked ({error.strerror}): see to it that no second run writes there")
    return file
