"""bpe.train for long texts, in Numba: the same merges.

The idea: whatever a merge changes is found by following links. The distinct words stand one behind the other. A cell is
a token of a word, at the place of the token's first byte. A pair keeps its count and a chain of the cells where it
begins. A merge visits the cells of its pair, counts the pairs of the new token and decrements the counts of the
neighbouring ones: a pair is made by one merge, and afterwards its count only falls. So a heap may hold counts that are
out of date: a pair whose count has fallen goes back when its turn comes.
"""

import numpy as np

from fast.words import U, distinct_words, home, kernel, part

TOKEN, BEFORE, AFTER, WORD = range(4)  # columns of cells, int32 (bytes, 4): its token, its neighbours, its word
KEY, COUNT, FIRST, LAST, LINKS = range(5)  # of pairs, int64 (pairs, 5): tokens, count, chain of links, their number
CELL, NEXT = range(2)  # of links, int32 (links, 2)
START, LENGTH = range(2)  # of tokens, int64 (tokens, 2): where the bytes of a token stand in `raw`
PAIRS, CHAINED, HEAP, TOKENS = range(4)  # of used, int64 (4,): how many there are of each


def train(pieces, num_merges, progress=None):
    """bpe.train of the (bytes, ends) of bpe.as_pieces."""
    raw, words = distinct_words(pieces)  # 256 single bytes, then the words; (start, stop, how often) of each
    size, limit = len(raw), 256 + min(num_merges, len(raw))
    cells, links = np.empty((size, 4), np.int32), np.empty((3 * size, 2), np.int32)  # of links a join makes two at most
    tokens, merges = np.ones((limit, 2), np.int64), np.empty((limit, 2), np.int32)
    tokens[:256, START] = np.arange(256)
    used = np.array([0, 0, 0, 256])
    pairs, heap = np.empty((min(size, 1 << 16), 5), np.int64), np.empty((min(size, 1 << 16), 2), np.int64)
    slots = np.full(2 << len(pairs).bit_length(), -1, np.int32)
    first_pairs(raw, words, cells, links, tokens, used, pairs, slots, heap)
    for goal in [*range(256, limit, 256), limit]:
        while need := join_pairs(raw, words, cells, links, tokens, merges, used, pairs, slots, heap, goal):
            pairs, heap = (np.concatenate([old, np.empty((need, old.shape[1]), np.int64)]) for old in (pairs, heap))
            slots = np.full(2 << len(pairs).bit_length(), -1, np.int32)
            place_pairs(pairs, slots, used)
        if progress:
            progress(int(used[TOKENS]) - 256)
    made, raw = int(used[TOKENS]), raw.tobytes()
    vocab = [raw[start : start + length] for start, length in tokens[:made].tolist()]
    return [(vocab[left], vocab[right]) for left, right in merges[256:made].tolist()]


@part
def pair_at(pairs, slots, key):
    """The slot of a pair, or the free one where it belongs: slots hold rows of pairs, -1 is free."""
    at = home(U(key), len(slots))
    while slots[at] >= 0 and pairs[slots[at], KEY] != key:
        at = (at + 1) & (len(slots) - 1)
    return at


@part
def count_pair(pairs, slots, links, used, left, right, times, cell):
    """A pair occurs `times` more often, at this cell too."""
    key = np.int64(left) << 32 | right
    at = pair_at(pairs, slots, key)
    link = used[CHAINED]
    used[CHAINED] += 1
    links[link, CELL] = cell
    links[link, NEXT] = -1
    if slots[at] < 0:
        slots[at] = used[PAIRS]
        used[PAIRS] += 1
        pair = pairs[slots[at]]
        pair[KEY], pair[COUNT], pair[FIRST], pair[LINKS] = key, 0, link, 0
    else:
        pair = pairs[slots[at]]
        links[pair[LAST], NEXT] = link
    pair[LAST] = link
    pair[COUNT] += times
    pair[LINKS] += 1


@kernel
def place_pairs(pairs, slots, used):
    """Fill the slots, which are all free, with the pairs that there are."""
    for k in range(used[PAIRS]):
        slots[pair_at(pairs, slots, pairs[k, KEY])] = k


@part
def compare(raw, tokens, a, b):
    """Above 0 where the bytes of token a are greater than those of b, below 0 where they are less."""
    for k in range(min(tokens[a, LENGTH], tokens[b, LENGTH])):
        difference = np.int64(raw[tokens[a, START] + k]) - np.int64(raw[tokens[b, START] + k])
        if difference:
            return difference
    return tokens[a, LENGTH] - tokens[b, LENGTH]


@part
def comes_first(heap, i, j, raw, tokens, pairs):
    """Whether entry i of the heap is merged before entry j: the more frequent, of equals the greater pair."""
    if heap[i, 0] != heap[j, 0]:
        return heap[i, 0] > heap[j, 0]
    one, other = pairs[heap[i, 1], KEY], pairs[heap[j, 1], KEY]
    order = compare(raw, tokens, one >> 32, other >> 32)
    return order > 0 or (order == 0 and compare(raw, tokens, one & 0xFFFFFFFF, other & 0xFFFFFFFF) > 0)


@part
def swap(heap, i, j):
    heap[i, 0], heap[i, 1], heap[j, 0], heap[j, 1] = heap[j, 0], heap[j, 1], heap[i, 0], heap[i, 1]


@part
def push_pair(heap, used, pair, raw, tokens, pairs):
    i = used[HEAP]
    used[HEAP] += 1
    heap[i, 0], heap[i, 1] = pairs[pair, COUNT], pair
    while i and comes_first(heap, i, (i - 1) // 2, raw, tokens, pairs):
        swap(heap, i, (i - 1) // 2)
        i = (i - 1) // 2


@part
def settle_first(heap, used, raw, tokens, pairs):
    """The first entry sinks to where it belongs."""
    i = 0
    while 2 * i + 1 < used[HEAP]:
        child = 2 * i + 1
        if child + 1 < used[HEAP] and comes_first(heap, child + 1, child, raw, tokens, pairs):
            child += 1
        if not comes_first(heap, child, i, raw, tokens, pairs):
            break
        swap(heap, i, child)
        i = child


@kernel
def first_pairs(raw, words, cells, links, tokens, used, pairs, slots, heap):
    """The cells of the words as they are before any merge, and their pairs."""
    for w in range(len(words)):
        start, stop = words[w, 0], words[w, 1]
        for i in range(start, stop):
            cells[i, TOKEN], cells[i, WORD] = raw[i], w
            cells[i, BEFORE], cells[i, AFTER] = i - 1 if i > start else -1, i + 1 if i + 1 < stop else -1
            if i + 1 < stop:
                count_pair(pairs, slots, links, used, raw[i], raw[i + 1], words[w, 2], i)
    for k in range(used[PAIRS]):
        push_pair(heap, used, k, raw, tokens, pairs)


@kernel
def join_pairs(raw, words, cells, links, tokens, merges, used, pairs, slots, heap, limit):
    """Merge until there are `limit` tokens or no pair is left; 0, or how much room there must be for pairs to go on."""
    while used[TOKENS] < limit and used[HEAP]:
        pair = heap[0, 1]
        if heap[0, 0] != pairs[pair, COUNT]:
            heap[0, 0] = pairs[pair, COUNT]
            settle_first(heap, used, raw, tokens, pairs)
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
        link = pairs[pair, FIRST]
        while link >= 0:  # in the order of cells, for in aaa the left pair is joined
            i, link = links[link, CELL], links[link, NEXT]
            j = cells[i, AFTER]
            if cells[i, TOKEN] != left or j < 0 or cells[j, TOKEN] != right:
                continue  # joined to another neighbour by an earlier merge
            tokens[new, START] = i
            times, h, k = words[cells[i, WORD], 2], cells[i, BEFORE], cells[j, AFTER]
            cells[i, TOKEN], cells[j, TOKEN], cells[i, AFTER] = new, -1, k
            if h >= 0:
                pairs[slots[pair_at(pairs, slots, np.int64(cells[h, TOKEN]) << 32 | left)], COUNT] -= times
                count_pair(pairs, slots, links, used, cells[h, TOKEN], new, times, h)
            if k >= 0:
                cells[k, BEFORE] = i
                pairs[slots[pair_at(pairs, slots, right << 32 | cells[k, TOKEN])], COUNT] -= times
                count_pair(pairs, slots, links, used, new, cells[k, TOKEN], times, i)
        pairs[pair, COUNT] = 0
        for k in range(first, used[PAIRS]):
            if pairs[k, COUNT]:
                push_pair(heap, used, k, raw, tokens, pairs)
    return 0
