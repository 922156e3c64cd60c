"""bpe.train for long texts, in Numba: the same merges.

The algorithm is that of bpe.merge_pairs. The idea: its dictionaries and lists as arrays, so that a merge is ten times
as fast; 4,096 entries are made of the counted words of 12.5 MB in 0.01 s. A cell is a token of a word, at the place of
the token's first byte. A pair keeps its count and a chain of the cells where it begins; a hash table finds it. Of each
distinct word a byte takes 13 bytes of memory: neighbours are found by the lengths of tokens, words by their block.
"""

import numpy as np

from bpe import END
from fast.words import U, called, distinct_words, hash_slot, kernel

# Columns of cells, int32 (bytes, 3): a token at its first byte and -length at its last, if it has several bytes, or -1
# between them; of the pair that begins here the next cell and the previous one, -1 where there is none.
TOKEN, NEXT, PREVIOUS = range(3)
KEY, COUNT, FIRST, LAST, LINKS = range(5)  # of pairs, int64 (pairs, 5): tokens, count, chain of cells, their number
START, LENGTH = range(2)  # of tokens, int64 (tokens, 2): offset and number of a token's bytes in `raw`
PAIRS, HEAP, TOKENS = range(3)  # of used, int64 (3,): how many there are of each
BLOCK = 4  # blocks of 1 << BLOCK bytes: each knows the word of its first byte
NARROW = (1 << 30) - 1  # bytes of words up to which cells, and rows of at most two pairs a byte, are numbered by int32


def train(pieces, num_merges, progress=None, specials=(END,)):
    """bpe.train of the (bytes, ends) of bpe.as_pieces."""
    raw, words = distinct_words(pieces, specials)  # 256 single bytes, then the words; (start, stop, how often) of each
    size, limit = len(raw), 256 + min(num_merges, len(raw))
    index = np.int32 if size <= NARROW else np.int64
    cells, blocks = np.empty((size, 3), index), np.zeros((size >> BLOCK) + 1, index)
    tokens, merges = np.ones((limit, 2), np.int64), np.empty((limit, 2), np.int32)
    tokens[:256, START] = np.arange(256)
    used = np.array([0, 0, 256])
    pairs, heap = np.empty((min(size, 1 << 16), 5), np.int64), np.empty((min(size, 1 << 16), 2), np.int64)
    slots = np.full(2 << len(pairs).bit_length(), -1, index)
    count_first_pairs(raw, words, blocks, cells, tokens, used, pairs, slots, heap)
    for goal in [*range(256, limit, 256), limit]:
        while need := merge_pairs(raw, words, blocks, cells, tokens, merges, used, pairs, slots, heap, goal):
            pairs, heap = (np.concatenate([old, np.empty((need, old.shape[1]), np.int64)]) for old in (pairs, heap))
            slots = np.full(2 << len(pairs).bit_length(), -1, index)
            fill_slots(pairs, slots, used)
        if progress:
            progress(int(used[TOKENS]) - 256)
    made = int(used[TOKENS])
    vocab = [raw[start : start + length].tobytes() for start, length in tokens[:made].tolist()]
    return [(vocab[left], vocab[right]) for left, right in merges[256:made].tolist()]


@called
def find_slot(pairs, slots, key):
    """The slot of a pair, or the free slot where it belongs: slots hold rows of pairs, -1 is free."""
    at = hash_slot(U(key), len(slots))
    while slots[at] >= 0 and pairs[slots[at], KEY] != key:
        at = (at + 1) & (len(slots) - 1)
    return at


@called
def add_pair(pairs, slots, cells, used, left, right, times, cell):
    """Add `times` to the count of a pair, and this cell to the end of its chain."""
    key = np.int64(left) << 32 | right
    at = find_slot(pairs, slots, key)
    if slots[at] < 0:
        slots[at] = used[PAIRS]
        used[PAIRS] += 1
        pair = pairs[slots[at]]
        pair[KEY], pair[COUNT], pair[FIRST], pair[LAST], pair[LINKS] = key, 0, -1, -1, 0
    pair = pairs[slots[at]]
    cells[cell, NEXT], cells[cell, PREVIOUS] = -1, pair[LAST]
    if pair[LAST] >= 0:
        cells[pair[LAST], NEXT] = cell
    else:
        pair[FIRST] = cell
    pair[LAST] = cell
    pair[COUNT] += times
    pair[LINKS] += 1


@called
def remove_pair(pairs, slots, cells, left, right, times, cell):
    """Take `times` from the count of a pair, and this cell out of its chain."""
    pair = pairs[slots[find_slot(pairs, slots, np.int64(left) << 32 | right)]]
    after, before = cells[cell, NEXT], cells[cell, PREVIOUS]
    if before >= 0:
        cells[before, NEXT] = after
    else:
        pair[FIRST] = after
    if after >= 0:
        cells[after, PREVIOUS] = before
    else:
        pair[LAST] = before
    pair[COUNT] -= times
    pair[LINKS] -= 1


@kernel
def fill_slots(pairs, slots, used):
    """Write all pairs into slots that are free."""
    for k in range(used[PAIRS]):
        slots[find_slot(pairs, slots, pairs[k, KEY])] = k


@called
def compare_tokens(raw, tokens, a, b):
    """Compare the bytes of two tokens: above 0 where a is greater, below 0 where it is less, 0 where they are equal."""
    for k in range(min(tokens[a, LENGTH], tokens[b, LENGTH])):
        difference = np.int64(raw[tokens[a, START] + k]) - np.int64(raw[tokens[b, START] + k])
        if difference:
            return difference
    return tokens[a, LENGTH] - tokens[b, LENGTH]


@called
def precedes(heap, i, j, raw, tokens, pairs):
    """True if entry i of the heap is merged before entry j: the more frequent pair, of equals the greater."""
    if heap[i, 0] != heap[j, 0]:
        return heap[i, 0] > heap[j, 0]
    one, other = pairs[heap[i, 1], KEY], pairs[heap[j, 1], KEY]
    order = compare_tokens(raw, tokens, one >> 32, other >> 32)
    return order > 0 or (order == 0 and compare_tokens(raw, tokens, one & 0xFFFFFFFF, other & 0xFFFFFFFF) > 0)


@called
def swap_entries(heap, i, j):
    """Exchange two entries of the heap."""
    heap[i, 0], heap[i, 1], heap[j, 0], heap[j, 1] = heap[j, 0], heap[j, 1], heap[i, 0], heap[i, 1]


@called
def push_pair(heap, used, pair, raw, tokens, pairs):
    """Insert a pair, with its count, into the heap."""
    i = used[HEAP]
    used[HEAP] += 1
    heap[i, 0], heap[i, 1] = pairs[pair, COUNT], pair
    while i and precedes(heap, i, (i - 1) // 2, raw, tokens, pairs):
        swap_entries(heap, i, (i - 1) // 2)
        i = (i - 1) // 2


@called
def sift_down(heap, used, raw, tokens, pairs):
    """Move the first entry of the heap down to where it belongs."""
    i = 0
    while 2 * i + 1 < used[HEAP]:
        child = 2 * i + 1
        if child + 1 < used[HEAP] and precedes(heap, child + 1, child, raw, tokens, pairs):
            child += 1
        if not precedes(heap, child, i, raw, tokens, pairs):
            break
        swap_entries(heap, i, child)
        i = child


@kernel
def count_first_pairs(raw, words, blocks, cells, tokens, used, pairs, slots, heap):
    """Write the cells of the words as they are before any merge; count their pairs; make the heap."""
    for w in range(len(words)):
        start, stop = words[w, 0], words[w, 1]
        for i in range(start, stop):
            cells[i, TOKEN] = raw[i]
            if i & ((1 << BLOCK) - 1) == 0:
                blocks[i >> BLOCK] = w
            if i + 1 < stop:
                add_pair(pairs, slots, cells, used, raw[i], raw[i + 1], words[w, 2], i)
    for k in range(used[PAIRS]):
        push_pair(heap, used, k, raw, tokens, pairs)


@kernel
def merge_pairs(raw, words, blocks, cells, tokens, merges, used, pairs, slots, heap, limit):
    """Merge until there are `limit` tokens or no pair is left. Return 0, or the room that pairs need to continue."""
    while used[TOKENS] < limit and used[HEAP]:
        pair = heap[0, 1]
        if heap[0, 0] != pairs[pair, COUNT]:
            heap[0, 0] = pairs[pair, COUNT]
            sift_down(heap, used, raw, tokens, pairs)
            continue
        if not pairs[pair, COUNT]:
            break  # so are all that are left
        if used[PAIRS] + 2 * pairs[pair, LINKS] > len(pairs):
            return used[PAIRS] + 2 * pairs[pair, LINKS]
        left, right = pairs[pair, KEY] >> 32, pairs[pair, KEY] & 0xFFFFFFFF
        new, first = used[TOKENS], used[PAIRS]
        used[TOKENS] += 1
        merges[new, 0], merges[new, 1] = left, right
        tokens[new, LENGTH] = tokens[left, LENGTH] + tokens[right, LENGTH]
        while pairs[pair, FIRST] >= 0:  # in the order of cells, for in aaa the left pair is joined
            i = pairs[pair, FIRST]
            j, k, w = i + tokens[left, LENGTH], i + tokens[new, LENGTH], blocks[i >> BLOCK]
            while words[w, 1] <= i:
                w += 1
            start, stop, times = words[w]
            remove_pair(pairs, slots, cells, left, right, times, i)
            if i > start:
                h = i - 1 if cells[i - 1, TOKEN] >= 0 else i + cells[i - 1, TOKEN]
                remove_pair(pairs, slots, cells, cells[h, TOKEN], left, times, h)
                add_pair(pairs, slots, cells, used, cells[h, TOKEN], new, times, h)
            if k < stop:
                remove_pair(pairs, slots, cells, right, cells[k, TOKEN], times, j)
                add_pair(pairs, slots, cells, used, new, cells[k, TOKEN], times, i)
            tokens[new, START] = i
            cells[j, TOKEN], cells[i, TOKEN], cells[k - 1, TOKEN] = -1, new, i - k
        for k in range(first, used[PAIRS]):
            if pairs[k, COUNT]:
                push_pair(heap, used, k, raw, tokens, pairs)
    return 0
