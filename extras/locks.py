"""A file that one process at a time writes: the log of a run, the table of a sweep."""

import bpe
import tinygpt

BUSY = "another process writes the run"  # extras/sweep.py looks for it


def lock_log(folder):
    """The log of a run, open for appending; locked until it is closed. ValueError if another process has it."""
    return open_locked(folder / "log.jsonl", f"{BUSY} in {folder}")


def open_locked(path, busy):
    """`path`, open for appending and locked until it is closed or its process ends. ValueError, with the words of
    `busy`, if another process has locked it."""
    file = open(path, "a", encoding="utf-8", newline="\n")
    try:
        if not tinygpt.lock_file(file):
            file.close()
            raise ValueError(f"{busy}; wait for its end or name another --out")
    except OSError as error:  # some network file systems have no locks
        bpe.note(f"{path.parent} cannot be locked ({error.strerror}): see to it that no second run writes there")
    return file
