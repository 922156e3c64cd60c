"""Long texts to ids, some 100 MB a second and thread: bpe.py's SPLIT and Tokenizer.encode in Numba.

The same pre-tokens and ids, from UTF-8 bytes. The idea: eight bytes at a time are one integer, so the end of a run of
letters is found by a few operations on it, and a word that was seen before is one look-up in a table. Read from the
top: how kernels are compiled, the scanner, the table of words, merging, batches and threads.
"""

import functools
from collections import deque
from concurrent.futures import Future
from itertools import chain, islice

import numba
import numpy as np
import regex
from numba.extending import register_jitable

from bpe import CUT_BYTES, END, UNKNOWN_BYTE, any_of
from fast.jit import cached
from tinygpt import Threads, count_cores

# == 1  how kernels are compiled =======================================================================================

# Kernels allocate nothing: so Numba need not count who holds an array, which would take longer than the work itself.
COMPILE = {"error_model": "numpy", "_nrt": False}  # and Numba's own error model checks every division
called = register_jitable(**COMPILE)  # of kernels: compiled into those that call it; called from Python it is Python


def kernel(function):
    """`function`, compiled when it is first called; the name in Numba's cache changes with the sources of fast/."""
    return cached(numba.njit(**COMPILE, no_cfunc_wrapper=True, nogil=True), function)


# == 2  the scanner ====================================================================================================

U = np.uint64  # of Numba's integers, an unsigned and a signed one make a float: all constants are unsigned
U0, U1, U7, U31, U32, U56, U62, U63 = map(U, (0, 1, 7, 31, 32, 56, 62, 63))
EACH, HIGH, LOW = U(0x0101010101010101), U(0x8080808080808080), U(0x7F7F7F7F7F7F7F7F)  # of eight bytes
CASE, FROM_A, PAST_Z = EACH * U(0x20), EACH * U(0x80 - ord("a")), EACH * U(0x7F - ord("z"))
FIRST_BYTE, BLANK = U(0xFF), U(ord(" "))
ID, NONE = U((1 << 31) - 1), U((1 << 64) - 1)
GOLDEN, MURMUR = U(0x9E3779B97F4A7C15), U(0xFF51AFD7ED558CCD)  # odd multipliers: 2^64 / golden ratio; MurmurHash3's
LETTER, NUMBER, SPACE, OTHER = range(4)


@functools.cache
def character_classes():
    """Code point -> LETTER, NUMBER, SPACE or OTHER, (0x110000,): what `regex` says that they are."""
    every = np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    table = np.full(len(every), OTHER, np.uint8)
    for kind, pattern in ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (SPACE, r"\s+")):
        for match in regex.finditer(pattern, every):
            table[match.start() : match.end()] = kind
    return table


@called
def read_eight(words, i):
    """Bytes i to i + 7 of the text as one integer, byte i lowest; words is the text as uint64, (bytes / 8,)."""
    shift = U((i & 7) << 3)
    return words[i >> 3] >> shift | words[(i >> 3) + 1] << U1 << (U63 - shift)


@called
def mark_non_letters(x):
    """Set the high bit of each byte of x that is no ASCII letter; all other bits are 0."""
    y = (x | CASE) & LOW
    return ~((y + FROM_A) & ~(y + PAST_Z) & ~x) & HIGH


@called
def mask_below(marks):
    """Ones in all bytes below the lowest marked one, zeros from there on."""
    return ((marks & (~marks + U1)) >> U7) - U1


@called
def mask_first(n):
    """Ones in the first n of eight bytes, zeros in the others; n may be below 0 or above 8."""
    return NONE if n >= 8 else (U1 << U(8 * n)) - U1 if n > 0 else U0


@called
def classify_character(text, i, stop, classes):
    """(class, bytes) of the character at byte i. A byte that begins no valid UTF-8 is a character of class OTHER."""
    lead = np.int64(text[i])
    if lead < 0x80:
        return np.int64(classes[lead]), 1
    size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    if lead < 0xC2 or lead > 0xF4 or i + size > stop:
        return OTHER, 1
    code = lead & (0x7F >> size)
    for k in range(i + 1, i + size):
        if text[k] & 0xC0 != 0x80:
            return OTHER, 1
        code = code << 6 | np.int64(text[k] & 0x3F)
    overlong = code < (0x80 if size == 2 else 0x800 if size == 3 else 0x10000)
    if overlong or 0xD800 <= code < 0xE000 or code >= 0x110000:
        return OTHER, 1
    return np.int64(classes[code]), size


@called
def find_pretoken_end(text, i, stop, classes):
    """Return where the pre-token that begins at byte i ends: the alternatives of bpe.PATTERN, in their order."""
    lead, second = text[i], text[i + 1] if i + 1 < stop else 0
    if lead == ord("'"):
        if second == ord("s") or second == ord("d") or second == ord("m") or second == ord("t"):
            return i + 2
        third = text[i + 2] if i + 2 < stop else 0
        if (second == ord("l") and third == ord("l")) or (
            (second == ord("v") or second == ord("r")) and third == ord("e")
        ):
            return i + 3
    kind, size = classify_character(text, i, stop, classes)
    end = i + size
    if lead == ord(" ") and end < stop:
        kind, size = classify_character(text, end, stop, classes)
        end += size if kind != SPACE else 0
    last = i  # where the last character of a run of white space begins, if it has several
    while end < stop:
        next_kind, size = classify_character(text, end, stop, classes)
        if next_kind != kind:
            return last if kind == SPACE and last > i else end
        last = end
        end += size
    return end


@called
def read_word(text, words, i, stop, classes):
    """(bytes of the pre-token that begins at byte i, its first eight bytes as an integer, its next eight).

    Up to 15 ASCII letters are read by integer operations; find_pretoken_end reads everything else.
    """
    x = read_eight(words, i)
    blank = x & FIRST_BYTE == BLANK
    marks = mark_non_letters(x) & ~(FIRST_BYTE if blank else U0)
    inside = mask_below(marks)
    size = np.int64((inside & EACH) * EACH >> U56)  # sums the bytes of inside & EACH
    if size > blank and size < 8 and x & marks & (~marks + U1) == U0:  # letters, then something else of ASCII
        return size, x & inside, U0
    if size == 8:
        y = read_eight(words, i + 8)
        marks = mark_non_letters(y)
        inside = mask_below(marks)
        size += np.int64((inside & EACH) * EACH >> U56)
        if size < 16 and y & marks & (~marks + U1) == U0:
            return size, x, y & inside
    size = find_pretoken_end(text, i, stop, classes) - i
    return size, x & mask_first(size), read_eight(words, i + 8) & mask_first(size - 8)


# == 3  the table of words =============================================================================================
#
# Rows of four integers, a power of two of rows, at most two thirds used. A row is the first eight bytes of a word, the
# next eight, its length, and a value. For a word longer than 16 bytes the first two are its hash and its place in
# the arena, which holds it whole. Length 0 is a free row.

ROWS, ARENA = range(2)  # of used, int64 (2,): rows of the table, integers of the arena


@called
def hash_slot(key, slots):
    """The slot, of a power of two of them, where the search for a key begins."""
    key = (key ^ key >> U32) * GOLDEN
    return np.int64((key ^ key >> U32) & U(slots - 1))


@called
def find_row(table, arena, words, i, size, first, second):
    """(start of the row of the word at byte i, or of the free row where it belongs; the first integer of that row)."""
    if size > 16:
        for k in range(8, size, 8):
            first = (first ^ first >> U32) * GOLDEN + (read_eight(words, i + k) & mask_first(size - k))
        second = U0
    last = len(table) - 4
    row = hash_slot(first ^ second * MURMUR, len(table) >> 2) << 2
    while table[row + 2] != U0:
        if table[row] == first and table[row + 2] == U(size):
            if size <= 16:
                if table[row + 1] == second:
                    break
            else:
                at, k = np.int64(table[row + 1]), 0
                while k < size and arena[at + (k >> 3)] == read_eight(words, i + k) & mask_first(size - k):
                    k += 8
                if k >= size:
                    break
        row = (row + 4) & last
    return row, first


@called
def insert_word(table, arena, used, row, words, i, size, first, second):
    """Write the word at byte i into its free row, and into the arena where it is long."""
    table[row], table[row + 1], table[row + 2] = first, second, U(size)
    used[ROWS] += 1
    if size > 16:
        table[row + 1] = U(used[ARENA])
        for k in range(0, size, 8):
            arena[used[ARENA]] = read_eight(words, i + k) & mask_first(size - k)
            used[ARENA] += 1


@kernel
def count_words(batch, classes, cache):
    """Count the pre-tokens of a batch: the value of a row is the number of times that its word occurred. False where
    the table is two thirds full: continue with a larger one, from `starts`, which moves along."""
    text, words, starts, stops, _ = batch
    table, arena, used = cache
    for k in range(len(starts)):
        i, stop = starts[k], stops[k]
        while i < stop:
            if 6 * used[ROWS] > len(table):
                starts[k] = i
                return False
            size, first, second = read_word(text, words, i, stop, classes)
            row, first = find_row(table, arena, words, i, size, first, second)
            if table[row + 2] == U0:
                insert_word(table, arena, used, row, words, i, size, first, second)
            table[row + 3] += U1
            i += size
        starts[k] = stop
    return True


@kernel
def copy_rows(table, wider):
    """Copy the rows of a table to a larger one that is empty."""
    for old in range(0, len(table), 4):
        if table[old + 2] != U0:
            second = table[old + 1] if table[old + 2] <= U(16) else U0
            row = hash_slot(table[old] ^ second * MURMUR, len(wider) >> 2) << 2
            while wider[row + 2] != U0:
                row = (row + 4) & (len(wider) - 4)
            for k in range(4):
                wider[row + k] = table[old + k]


@kernel
def spell_words(table, stored, rows, words, raw):
    """Write the bytes of the words in these rows of a table to their places in raw; stored: the arena as bytes."""
    for w in range(len(rows)):
        first, second = table[4 * rows[w]], table[4 * rows[w] + 1]
        for k in range(words[w, 1] - words[w, 0]):
            if table[4 * rows[w] + 2] > U(16):
                raw[words[w, 0] + k] = stored[np.int64(second << U(3)) + k]
            else:
                raw[words[w, 0] + k] = (first if k < 8 else second) >> U(8 * (k & 7)) & FIRST_BYTE


# == 4  merging: Tokenizer.word_ids of the words that the table does not hold ==========================================

SHORT = 64  # longest word, in bytes, whose pairs are searched one by one rather than kept in a heap
KEPT = 256  # longest word, in bytes, whose ids are kept


@called
def find_pair(pairs, left, right):
    """rank << 32 | new id of a pair of ids, NONE where no merge joins it."""
    key = U(left) << U32 | U(right)
    at = hash_slot(key, len(pairs))
    while pairs[at, 0] != key and pairs[at, 0] != NONE:
        at = (at + 1) & (len(pairs) - 1)
    return pairs[at, 1]


@called
def merge_short(ids, n, pairs, ranks):
    """bpe.merge_ids of ids[:n], in place, searching for the lowest rank each time; return how many are left."""
    for k in range(n - 1):
        ranks[k] = find_pair(pairs, ids[k], ids[k + 1])
    while n > 1:
        at = 0
        for k in range(1, n - 1):
            if ranks[k] < ranks[at]:
                at = k
        if ranks[at] == NONE:
            break
        ids[at] = ranks[at] & ID
        n -= 1
        for k in range(at + 1, n):
            ids[k], ranks[k - 1] = ids[k + 1], ranks[k]
        if at:
            ranks[at - 1] = find_pair(pairs, ids[at - 1], ids[at])
        if at + 1 < n:
            ranks[at] = find_pair(pairs, ids[at], ids[at + 1])
    return n


@called
def push_rank(heap, n, value):
    """Insert a value into the n values of a heap."""
    heap[n] = value
    while n and heap[n] < heap[(n - 1) >> 1]:
        heap[n], heap[(n - 1) >> 1] = heap[(n - 1) >> 1], heap[n]
        n = (n - 1) >> 1


@called
def pop_rank(heap, n):
    """Remove and return the lowest of n values; the others are then heap[: n - 1]."""
    lowest, heap[0], i = heap[0], heap[n - 1], 0
    while 2 * i + 1 < n - 1:
        child = 2 * i + 1
        if child + 1 < n - 1 and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= heap[i]:
            break
        heap[i], heap[child] = heap[child], heap[i]
        i = child
    return lowest


@called
def merge_long(ids, n, pairs, heap, before, after):
    """bpe.merge_ids of ids[:n], in place, as it is there: a heap, of rank << 32 | place, and a linked list."""
    waiting = 0
    for k in range(n):
        before[k], after[k] = k - 1, k + 1
    for k in range(n - 1):
        found = find_pair(pairs, ids[k], ids[k + 1])
        if found != NONE:
            push_rank(heap, waiting, (found >> U32) << U32 | U(k))
            waiting += 1
    while waiting:
        lowest = pop_rank(heap, waiting)
        waiting -= 1
        i = np.int64(lowest & U(0xFFFFFFFF))
        j = after[i]
        found = find_pair(pairs, ids[i], ids[j]) if ids[i] >= 0 and j < n else NONE
        if found == NONE or found >> U32 != lowest >> U32:
            continue
        ids[i], ids[j], after[i] = found & ID, -1, after[j]
        if after[j] < n:
            before[after[j]] = i
        for k in (np.int64(before[i]), i):
            found = find_pair(pairs, ids[k], ids[after[k]]) if k >= 0 and after[k] < n else NONE
            if found != NONE:
                push_rank(heap, waiting, (found >> U32) << U32 | U(k))
                waiting += 1
    left = 0
    for k in range(n):
        if ids[k] >= 0:
            ids[left] = ids[k]
            left += 1
    return left


@kernel
def encode_words(batch, vocabulary, cache, space):
    """Write the ids of each segment of a batch, then its end where that is not -1; return how many, or -1 - b where
    byte b has no id, which is -1.

    The value of a row is the number of ids, 1 or 2, in two bits, and these in 31 bits each, the second one higher; or
    3, and where in the arena their number stands, with the ids behind it.
    """
    text, words, starts, stops, ends = batch
    classes, byte_ids, pairs = vocabulary
    table, arena, used = cache
    ids, heap, before, after = space
    n = 0
    for s in range(len(starts)):
        i, stop = starts[s], stops[s]
        while i < stop:
            size, first, second = read_word(text, words, i, stop, classes)
            row = -1
            if size <= KEPT:
                row, first = find_row(table, arena, words, i, size, first, second)
                if table[row + 2] != U0:
                    value = table[row + 3]
                    ids[n], ids[n + 1] = value & ID, value >> U31 & ID
                    if value >> U62 != U(3):
                        n += np.int64(value >> U62)
                    else:
                        at = np.int64(value & ID)
                        for k in range(np.int64(arena[at])):
                            ids[n + k] = arena[at + 1 + k]
                        n += np.int64(arena[at])
                    i += size
                    continue
            for k in range(size):
                ids[n + k] = byte_ids[text[i + k]]
                if ids[n + k] < 0:
                    return -1 - np.int64(text[i + k])
            if size <= SHORT:
                made = merge_short(ids[n:], size, pairs, heap)
            else:
                made = merge_long(ids[n:], size, pairs, heap, before, after)
            if row >= 0:
                if 3 * used[ROWS] > len(table) >> 1 or used[ARENA] + size // 8 + 2 + made > len(arena):
                    table[:], used[:] = 0, 0  # full: begin again
                    row, first = find_row(table, arena, words, i, size, first, second)
                insert_word(table, arena, used, row, words, i, size, first, second)
                if made <= 2:
                    table[row + 3] = U(made) << U62 | U(ids[n]) | (U(ids[n + 1]) << U31 if made == 2 else U0)
                else:
                    table[row + 3] = U(3) << U62 | U(used[ARENA])
                    arena[used[ARENA]] = made
                    for k in range(made):
                        arena[used[ARENA] + 1 + k] = ids[n + k]
                    used[ARENA] += 1 + made
            n += made
            i += size
        if ends[s] >= 0:
            ids[n] = ends[s]
            n += 1
    return n


def pair_table(ranks):
    """{(left, right): (rank, new id)} -> the table that find_pair reads, uint64 (slots, 2), at most half full."""
    table = np.full((2 << len(ranks).bit_length(), 2), NONE)
    ids = np.array(list(ranks), np.uint64).reshape(-1, 2)
    found = np.array(list(ranks.values()), np.uint64).reshape(-1, 2)
    rows = np.stack([ids[:, 0] << U32 | ids[:, 1], found[:, 0] << U32 | found[:, 1]], 1)
    at = hash_slot(rows[:, 0], len(table))
    while len(rows):
        free = table[at, 0] == NONE
        table[at[free]] = rows[free]  # of several that want a slot the last gets it
        lost = table[at, 0] != rows[:, 0]
        rows, at = rows[lost], (at[lost] + 1) & (len(table) - 1)
    return table


# == 5  batches of text, and threads ===================================================================================

BATCH = 1 << 18  # bytes of text in a call of a kernel: what it reads and writes stays in a core's cache
PADDING = 24  # bytes that a kernel may read after the last
ENCODED = (1 << 31) - 1  # bytes of a batch: `merge_long` numbers them in 31 bits


class Batch:
    """Segments of text, each (bytes, the id that follows it or -1), as the arrays that kernels read."""

    def __init__(self, segments):
        self.segments = segments
        texts = [text for text, _ in segments]
        lengths = np.array([len(text) for text in texts], np.int64)
        stops = np.cumsum(lengths + 1) - 1
        # NUL between two segments: letters that the kernels read eight at a time end there.
        joined = b"\0".join([*texts, bytes(PADDING + -int(stops[-1] + 1) % 8)])
        text, words = np.frombuffer(joined, np.uint8), np.frombuffer(joined, np.uint64)
        ends = np.array([end for _, end in segments], np.int64)
        self.arrays = text, words, stops - lengths, stops, ends
        self.room = len(text)
        self.size, self.stories = int(lengths.sum()), int((ends >= 0).sum())


def batches(segments, size=BATCH):
    """Batches of at least `size` bytes, the last excepted; longer segments are cut where that changes no pre-token."""
    batch, held = [], 0
    for text, end in segments:
        start = 0
        while len(text) - start > size and (place := CUT_BYTES.search(text, start + size)):
            yield Batch([*batch, (memoryview(text)[start : place.start()], -1)])
            batch, held, start = [], 0, place.start()
        batch.append((memoryview(text)[start:], end))
        held += len(text) - start
        if held >= size:
            yield Batch(batch)
            batch, held = [], 0
    if batch:
        yield Batch(batch)


def map_in_order(function, items, threads):
    """Yield function(item) for each item, in order, on so many threads; reads no more items ahead than they need."""
    pool, waiting = encoding_threads(threads), deque()
    if threads == 1 or pool.start(threads) == 0:
        yield from map(function, items)
        return

    def work(job, item):
        if job.set_running_or_notify_cancel():
            try:
                job.set_result(function(item))
            except BaseException as error:
                job.set_exception(error)

    def first_result():
        job, item = waiting.popleft()
        return function(item) if job.cancel() else job.result()  # here, if no thread has taken it

    for item in items:
        waiting.append((Future(), item))
        pool.jobs.put(functools.partial(work, *waiting[-1]))
        if len(waiting) > 2 * threads:
            yield first_result()
    while waiting:
        yield first_result()


encoding_threads = functools.cache(lambda count: Threads())  # for so many at once: started once, not for each text


class Encoder:
    """A tokenizer as the kernels read it, and a table of words for each thread that encodes."""

    def __init__(self, byte_ids, ranks, dtype):
        self.vocabulary = character_classes(), np.array(byte_ids, np.int32), pair_table(ranks)
        self.dtype, self.idle = dtype, []
        self.encode(Batch([(b"", -1)]))  # compiles, once for all threads

    def encode(self, batch):
        """The ids of a batch, (n,). ValueError for a text too long to encode whole and without a place to cut it."""
        if batch.room > ENCODED:
            raise ValueError(f"{batch.size} bytes without white space; expected at most {ENCODED}: insert line breaks")
        try:
            cache = self.idle.pop()  # of a thread that no longer encodes
        except IndexError:
            cache = np.zeros(4 << 16, np.uint64), np.empty(1 << 17, np.uint64), np.zeros(2, np.int64)
        ids, (before, after) = np.empty(batch.room + len(batch.segments), np.int32), np.empty((2, batch.room), np.int32)
        heap = np.empty(2 * batch.room + SHORT, np.uint64)  # a merge takes one pair and adds two at most
        n = encode_words(batch.arrays, self.vocabulary, cache, (ids, heap, before, after))
        self.idle.append(cache)
        if n < 0:
            raise ValueError(UNKNOWN_BYTE.format(-1 - n))
        return ids[:n].astype(self.dtype)

    def run(self, segments, threads=None):
        """Yield (ids, Batch) for all segments, in order; a text of few batches is encoded by one thread."""
        todo = batches(segments)
        first = list(islice(todo, 4))
        threads = threads or count_cores() if len(first) == 4 else 1
        return map_in_order(lambda batch: (self.encode(batch), batch), chain(first, todo), threads)


# == 6  counting, for the trainer ======================================================================================


def distinct_words(pieces, specials=(END,)):
    """The (bytes, ends) of bpe.as_pieces, split at special tokens -> (the 256 bytes, then their distinct pre-tokens,
    uint8; start, stop and number of each pre-token, int64 (words, 3))."""
    table, arena, used = np.zeros(1 << 16, np.uint64), np.empty(0, np.uint64), np.zeros(2, np.int64)
    special = regex.compile(any_of(specials).encode())
    for batch in batches((plain, -1) for text, _ in pieces for plain in special.split(text)):
        stored = used[ARENA] + batch.room // 8 + batch.room // 17  # at most: an integer for 8 bytes, and one a word
        if stored > len(arena):
            arena = np.concatenate([arena, np.empty(stored, np.uint64)])
        while not count_words(batch.arrays, character_classes(), (table, arena, used)):
            wider = np.zeros(2 * len(table), np.uint64)
            copy_rows(table, wider)
            table = wider
    rows = np.flatnonzero(table[2::4])
    lengths = table[2::4][rows].astype(np.int64)
    stops = 256 + np.cumsum(lengths)
    words = np.stack([stops - lengths, stops, table[3::4][rows].astype(np.int64)], 1)
    raw = np.empty(256 + int(lengths.sum()), np.uint8)
    raw[:256] = np.arange(256)
    spell_words(table, arena.view(np.uint8), rows, words, raw)
    return raw, words
