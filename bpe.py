"""Text <-> token ids: a byte-level byte-pair encoding, trained on your own stories.

    python bpe.py train stories.txt --vocab-size 4096 --out tokenizer.json
    python bpe.py explain accomplishment

Read sections 1 and 2 to know what is computed: documents, pre-tokens, and the trainer that rescans everything for
each merge. Section 3 computes the same merges fast, 4 turns text into ids and back, 5 reads and writes tokenizers, 6
keeps ids in files and reads stories in JSON, 7 does to long texts in Numba what 1 and 4 do to short ones, 8 is the
command line. Merges are ordered pairs of byte strings; an id is a position in a vocabulary, never a byte.
"""

import argparse
import base64
import codecs
import contextlib
import functools
import hashlib
import heapq
import importlib
import json
import os
import shlex
import struct
import sys
import time
import zlib
from collections import Counter, defaultdict
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import regex

# == 1  documents and pre-tokens ===================================================================================

END = "<|endoftext|>"  # stands after every document; merges never cross it

# GPT-2's: English contractions, then runs of letters, of digits, of other signs, each with at most one space before
# it, then white space, which leaves its last character to the run that follows. Radford et al. 2019.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SPLIT = regex.compile(PATTERN)  # every text is the concatenation of SPLIT.findall(text)


def reserved(n):
    """The names of n specials that no text contains, kept for templates and fine-tuning."""
    return [f"<|reserved_{i}|>" for i in range(n)]


def documents(paths, progress=None):
    """Yield the stories of text files (split at END), of JSON (a value a line, or one array; a value is a string or an
    object with a field "text" or "story"), and of folders of these.

    Stories are stripped, empty ones dropped; a text without END is one document. Calls progress(bytes_done) after a
    story. ValueError: a file that is not UTF-8 text, is compressed, has no story, or has a bad line.
    """
    held = []
    for piece, ends in pieces(paths, progress):
        held.append(piece)
        if ends:
            yield "".join(held)
            held = []


def pieces(paths, progress=None):
    """The same stories as (piece, whether its story ends there): no story has to fit into memory. Where one goes on, a
    pre-token begins."""
    done = 0
    for path in text_files(paths):
        with open(path, "rb") as file:
            empty = begins = True
            for text, ends in _reader(file, path)(file, path):
                text = text.strip() if begins else text.rstrip() if ends else text
                if text or not begins:
                    empty = False
                    yield text, ends
                    if progress:
                        progress(done + file.tell())
                begins = ends or (begins and not text)
            done += file.tell()
        if empty:
            raise ValueError(f"{path} is empty: expected at least one story")


def text_files(paths):
    """The files that paths name, as Path; a folder stands for its *.txt, *.jsonl and arrays in *.json, sorted.
    ValueError for a file that is compressed by its name, and for a folder without text."""
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file())
            texts = [p for p in inside if p.suffix.lower() in (".txt", ".jsonl") or _is_json_array(p)]
            if not texts:
                for p in inside:
                    _refuse_packed(p)
                raise ValueError(f"{path} is a folder without .txt or .jsonl files, or .json files that hold an array")
            yield from texts
        elif path.exists():
            _refuse_packed(path)
            yield path
        else:
            raise FileNotFoundError(f"{path} does not exist")


def _utf8(decode, data, path, *final):
    if b"\0" in data:
        raise ValueError(f"{path} is not text: it has NUL bytes")
    try:
        return decode(data, *final)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: byte 0x{error.object[error.start]:02x} is not UTF-8") from None


# Wherever white space follows something else a pre-token begins: here a text may be cut and its parts looked at alone.
CUT = r"(?<=[!-~])(?=[ \n])"
CUT_BYTES = regex.compile(CUT.encode())
LAST_CUT = regex.compile("(?r)" + CUT)  # (?r) searches from the end


def _txt_texts(file, path, size=1 << 20):
    """The texts between ENDs, as pieces. `tail`, the last characters read so far, may hold the beginning of an END."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # drops a byte order mark, keeps CRLF
    held, tail = [], ""
    while data := file.read(size):
        *ended, last = (tail + _utf8(decoder.decode, data, path)).split(END)
        for text in ended:
            yield "".join(held) + text, True
            held = []
        if place := LAST_CUT.search(last):
            yield "".join(held) + last[: place.start()], False
            held, last = [], last[place.start() :]
        cut = max(0, len(last) - len(END) + 1)
        held.append(last[:cut])
        tail = last[cut:]
    yield "".join(held) + tail + _utf8(decoder.decode, b"", path, True), True


def _text(data):
    """str or bytes -> str, where a byte that is not UTF-8 becomes a lone surrogate, so that nothing is lost."""
    if isinstance(data, str):
        utf8_of(data)
        return data
    return codecs.decode(data, "utf-8", "surrogateescape")


def utf8_of(data):
    """str or bytes -> bytes."""
    if not isinstance(data, str):
        return data if isinstance(data, bytes) else bytes(memoryview(data))
    try:
        return data.encode()
    except UnicodeEncodeError as error:
        i = error.start
        raise ValueError(
            f"text has a lone surrogate U+{ord(data[i]):04X} at position {i}; pass bytes or replace it"
        ) from None


def count_pretokens(texts):
    """Documents (str or bytes) -> {pre-token as bytes: how often it occurs}, in order of first occurrence."""
    counts = Counter()
    for text, _ in as_pieces(texts):
        for story in _text(text).split(END):
            counts.update(SPLIT.findall(story))
    return {word.encode("utf-8", "surrogateescape"): n for word, n in counts.items()}


# == 2  the trainer as a specification =============================================================================


def train_spec(texts, num_merges):
    """The merges, in order: the most frequent pair of neighbours, of equals the greater; join it everywhere; again.

    Pairs are counted inside pre-tokens and may overlap (aaa has two). Fewer merges where no pair is left.
    Sennrich et al. 2016, arXiv:1508.07909.
    """
    words = {tuple(bytes([b]) for b in word): n for word, n in count_pretokens(texts).items()}
    merges = []
    while len(merges) < num_merges:
        counts = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                counts[pair] += n
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = {tuple(_joined(word, best, best[0] + best[1])): n for word, n in words.items()}
    return merges


def _joined(word, pair, new):
    """word with every occurrence of pair, from left to right, replaced by new (which is never pair[0] itself)."""
    out = []
    for token in word:
        if out and out[-1] == pair[0] and token == pair[1]:
            out[-1] = new
        else:
            out.append(token)
    return out


# == 3  the trainer that runs ======================================================================================


def train(texts, num_merges, progress=None):
    """The merges of train_spec, of documents or `pieces`. Calls progress(merges_done).

    Below TRAIN_LONG bytes in plain Python at once; above, fast/merges.py where it is here. Memory, and the time that
    a merge takes, grow with the distinct words, not with the text.
    """
    first, pieces, size = read_ahead(as_pieces(texts), TRAIN_LONG)
    if size >= TRAIN_LONG and (merges := find_fast("merges")):
        return merges.train(chain(first, pieces), num_merges, progress)
    return merge_pairs(count_pretokens(chain(first, pieces)), num_merges, progress)


def merge_pairs(words, num_merges, progress=None):
    """The merges of train_spec for {pre-token: how often it occurs}.

    The pre-tokens stand one behind the other, None between them. Cell i holds a token, its neighbours are before[i]
    and after[i], and places[pair] lists the cells where a pair begins. A merge makes all pairs of its new token, so
    afterwards a count only falls: a heap may hold counts that are too high, and corrects one when it comes first.
    """
    tokens, times = [None], [0]
    for word, n in words.items():
        tokens += [*(BYTES[b] for b in word), None]
        times += [n] * (len(word) + 1)
    before, after = list(range(-1, len(tokens) - 1)), list(range(1, len(tokens) + 1))
    counts, places = Counter(), defaultdict(list)
    for i, pair in enumerate(pairwise(tokens)):
        if None not in pair:
            counts[pair] += times[i]
            places[pair].append(i)
    heap = [(-n, _descending(pair), pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < num_merges:
        n, key, best = heapq.heappop(heap)
        if -n != counts[best]:
            if counts[best]:
                heapq.heappush(heap, (-counts[best], key, best))
            continue
        merges.append(best)
        (left, right), new, made = best, best[0] + best[1], set()
        for i in places.pop(best):  # in the order of cells: in aaa the left pair is joined
            j = after[i]
            if tokens[i] != left or tokens[j] != right:
                continue  # joined to another neighbour by an earlier merge
            h, k = before[i], after[j]  # cells h i j k become h i k
            tokens[i], tokens[j], after[i], before[k] = new, None, k, i
            for cell, old, pair in (
                (h, (tokens[h], left), (tokens[h], new)),
                (i, (right, tokens[k]), (new, tokens[k])),
            ):
                if None not in pair:
                    counts[old] -= times[i]
                    counts[pair] += times[i]
                    places[pair].append(cell)
                    made.add(pair)
        counts[best] = 0
        for pair in made:
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], _descending(pair), pair))
        if progress:
            progress(len(merges))
    return merges


TRAIN_LONG = 1 << 22  # bytes of text: 0.4 s in Python


def read_ahead(pieces, size):
    """`pieces` -> (a list of the first, with `size` bytes or more if there are; an iterator over the rest; bytes)."""
    pieces, first, seen = iter(pieces), [], 0
    for piece in pieces:
        first.append(piece)
        seen += len(piece[0])
        if seen >= size:
            break
    return first, pieces, seen


@functools.cache
def find_fast(name):
    """The module fast/NAME.py; None, with a line on stderr, where it is not here."""
    try:
        return importlib.import_module(f"fast.{name}")
    except ImportError as error:
        _note(f"bpe.py: fast/{name}.py is not here ({error}): long texts take several times as long in plain Python")
        return None


def _descending(pair):
    """A string that sorts before that of every lesser pair: bytes turned round, U+0100 ends each of the two."""
    return "".join(token.translate(REVERSED).decode("latin-1") + "\u0100" for token in pair)


BYTES = [bytes([b]) for b in range(256)]
REVERSED = bytes(range(255, -1, -1))


# == 4  the tokenizer ==============================================================================================


def _byte_alphabet():
    """byte -> the character that stands for it in tokenizer.json: itself where it prints, else one from U+0100 up."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in prints]
    return [chr(b) if b in prints else chr(0x100 + others.index(b)) for b in range(256)]


CHARACTER = _byte_alphabet()
BYTE = {character: b for b, character in enumerate(CHARACTER)}


class Tokenizer:
    """vocab[id] -> bytes; merges [(left, right)] of byte strings, earlier ones first; specials {name: id}.

    The vocabulary holds every byte, every merge's parts and result, END, and no string twice. With byte_ids, the id of
    each byte, it is one of SentencePiece as llama2.c has it: a text is given a space to begin with, merges join
    characters and go across words, and a character without an id is its bytes; <s> stands between stories. With ranks,
    of each merge, those of one rank are one: the leftmost is the first.
    """

    def __init__(self, vocab, merges, specials, byte_ids=None, ranks=None):
        self.vocab, self.merges, self.specials = list(vocab), list(merges), dict(specials)
        self.spaced = byte_ids is not None
        end = BOS if self.spaced else END
        if end not in self.specials:
            raise ValueError(f"the vocabulary has no special token {end}, which ends a story")
        if "" in self.specials:
            raise ValueError("a special token is empty")
        self._byte_ids = list(byte_ids or ())
        apart = {*self.specials.values(), *self._byte_ids}
        ids = {token: i for i, token in enumerate(self.vocab) if i not in apart}
        if len(set(self.strings())) < len(self.vocab) or len(ids) + len(apart) < len(self.vocab):
            raise ValueError("the vocabulary holds a token twice")
        if not self.spaced:
            missing = [b for b in range(256) if bytes([b]) not in ids]
            if missing:
                raise ValueError(f"the vocabulary has no token for byte 0x{missing[0]:02x}; expected all 256")
            self._byte_ids = [ids[bytes([b])] for b in range(256)]
        for left, right in self.merges:
            for token in (left, right, left + right):
                if token not in ids:
                    raise ValueError(f"the merge of {left!r} and {right!r} needs {token!r}, which has no id")
        self.end = self.specials[end]
        self._ids, self._split = ids, SPLIT
        self.tied, ranks = ranks is not None, ranks or range(len(self.merges))
        self._ranks = {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in zip(ranks, self.merges)}
        if self.spaced:
            # A token has one rank however it is made, or the leftmost of two joins would not be the first. Merges do
            # not cross the beginning of a word unless a token does.
            first = {new: rank for rank, new in reversed(self._ranks.values())}
            self._ranks = {pair: (first[new], new) for pair, (_, new) in self._ranks.items()}
            crossing = any(regex.search(rb"[^ ] ", token) for token in ids)
            self._split = regex.compile(r"(?s).+" if crossing else r" *[^ ]+| +")
        self._cache = _Cache(self.word_ids)
        self._encoder, self._seen, self._hash = None, 0, None

    @classmethod
    def from_merges(cls, merges, reserve=8):
        """Ids 0-255 are the bytes in order of value, then the merges in order, then END, then the reserved specials."""
        vocab = [bytes([b]) for b in range(256)] + [left + right for left, right in merges]
        names = [END, *reserved(reserve)]
        specials = {name: len(vocab) + i for i, name in enumerate(names)}
        return cls(vocab + [name.encode() for name in names], merges, specials)

    @property
    def vocab_size(self):
        return len(self.vocab)

    @property
    def dtype(self):
        """Of ids in arrays and files."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def hash(self):
        """sha256 of to_json(), in hex: what is equal in it gives equal ids."""
        if self._hash is None:
            self._hash = hashlib.sha256(self.to_json().encode()).hexdigest()
        return self._hash

    # -- text to ids

    def encode(self, text, allowed_special=(), disallowed_special=()):
        """str or any bytes -> list of ids. Names in allowed_special (a set, or "all") become their ids, longest first;
        one of disallowed_special ("all": those not allowed) is a ValueError; other names of specials are plain text."""
        if self.takes_kernels(len(text)):
            return self._encode_long(text, allowed_special, disallowed_special).tolist()
        return self._encode(_text(text), *self._names(allowed_special, disallowed_special))

    def encode_array(self, text, allowed_special=(), disallowed_special=(), threads=None):
        """The same as an array, of a long text on all cores or so many threads."""
        if self.takes_kernels(len(text)):
            return self._encode_long(text, allowed_special, disallowed_special, threads)
        return np.array(self._encode(_text(text), *self._names(allowed_special, disallowed_special)), self.dtype)

    def _encode_long(self, text, allowed_special, disallowed_special, threads=None):
        segments = self._segments(utf8_of(text), *self._names(allowed_special, disallowed_special))
        return np.concatenate([ids for ids, _ in self.kernels().run(segments, threads)])

    def encode_iterable(self, chunks, allowed_special=(), disallowed_special=()):
        """Yield the ids of encode("".join(chunks)), holding back what a later chunk can still change."""
        names, refused = self._names(allowed_special, disallowed_special)
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        held, new, size, place = "", [], 0, 0
        for chunk in chunks:
            new.append(decoder.decode(utf8_of(chunk) if isinstance(chunk, str) else chunk))
            size += len(new[-1])
            if size > len(held) and not self.spaced:
                # once it has doubled, or a long word in small chunks would be read again for each of them
                text = "".join([held, *new])
                ids, held = self._settled(text, names, refused, place)
                new, size, place = [], 0, place + len(text) - len(held)
                yield from ids
        yield from self._encode("".join([held, *new, decoder.decode(b"", True)]), names, refused, place)

    def takes_kernels(self, size):
        """Whether section 7 encodes a text of this size sooner: what was encoded until now counts as long as it is not
        loaded, which takes as long as Python takes for LONG bytes, when it has been compiled before."""
        if self.spaced or size < LONG_WHEN_LOADED:
            return False
        self._seen += size
        return self._encoder is not None or (self._seen >= LONG and find_fast("words") is not None)

    def kernels(self):
        """The encoder of fast/words.py."""
        if self._encoder is None:
            from fast import words

            self._encoder = words.Encoder(self._byte_ids, self._ranks, self.dtype)
        return self._encoder

    def _names(self, allowed, refused):
        """(the names to look for in text, longest first; those of them that are an error)."""
        found = []
        for what, names in (("allowed_special", allowed), ("disallowed_special", refused)):
            if names == "all":
                names = self.specials
            elif isinstance(names, str):
                raise ValueError(f'{what}={names!r}: expected "all" or a set of names')
            for name in names:
                if name not in self.specials:
                    raise ValueError(f"{what} has {name!r}; this tokenizer has {', '.join(self.specials)}")
            found.append(set(names))
        allowed, refused = found
        return sorted(allowed | refused, key=lambda name: (-len(name), name)), refused - allowed

    def _special(self, name, refused, place):
        if name in refused:
            raise ValueError(
                f"text has the special token {name} at position {place}; name it in allowed_special to have its id, "
                "leave it out of disallowed_special to have it as text"
            )
        return self.specials[name]

    def _encode(self, text, names=(), refused=(), place=0):
        ids, start = [], 0
        for match in _finder(names).finditer(text) if names else ():
            ids += self._plain(text[start : match.start()])
            ids.append(self._special(match.group(), refused, place + match.start()))
            start = match.end()
        return ids + self._plain(text[start:] if start else text)

    def _segments(self, data, names, refused):
        """Bytes -> (plain text, the id that follows it or -1)."""
        start = 0
        for match in _finder([name.encode() for name in names]).finditer(data) if names else ():
            place = len(_text(data[: match.start()])) if refused else None
            yield data[start : match.start()], self._special(match.group().decode(), refused, place)
            start = match.end()
        yield data[start:] if start else data, -1

    def pretokens(self, text):
        """Plain text in the parts that are encoded one by one."""
        return self._split.findall(" " + text if self.spaced and text else text)

    def _plain(self, text):
        return self._words(self.pretokens(text))

    def _words(self, words):
        return list(chain.from_iterable(map(self._cache.__getitem__, words)))

    def _settled(self, text, names, refused, place):
        """The beginning of a text of unknown continuation -> (ids that nothing can change, the rest of the text)."""
        ids, start, longest = [], 0, len(names[0]) if names else 0
        while True:
            # `stop`: from here on the text may be the beginning of a special token
            stop = len(text)
            for i in range(max(start, stop - longest + 1), stop):
                if any(len(name) > len(text) - i and name.startswith(text[i:]) for name in names):
                    stop = i
                    break
            match = _finder(names).search(text, start) if names else None
            if not match or match.start() >= stop:
                break
            ids += self._encode(text[start : match.end()], names, refused, place + start)
            start = match.end()
        # The end of a pre-token is certain once two more characters are known: one shows that a run is over and how
        # much white space it leaves, and after an apostrophe two decide between 'll and a mere apostrophe.
        words, known = SPLIT.findall(text[start:stop]), 0
        while words and known < 2:
            known += len(words.pop())
        return ids + self._words(words), text[start + sum(map(len, words)) :]

    def word_ids(self, word):
        """One pre-token -> its ids."""
        return merge_ids(self._first_ids(word), self._ranks)

    def _first_ids(self, word):
        """A pre-token before any merge: its bytes, or characters."""
        ids = []
        for character in word if self.spaced else [word]:
            token = character.encode("utf-8", "surrogateescape")
            known = self.spaced and self._ids.get(token)
            ids += [known] if known else [self._byte_ids[b] for b in token]
        return ids

    def steps(self, word):
        """A pre-token on the way to its ids: (None, its byte strings), then (a merge's number, the same after it)."""
        ids, best = self._first_ids(word), (None, None)
        while True:
            yield best[0], [self.vocab[i] for i in ids]
            found = [(self._ranks[pair], k) for k, pair in enumerate(pairwise(ids)) if pair in self._ranks]
            if not found:
                return
            best, k = min(found)
            ids[k : k + 2] = [best[1]]

    # -- ids to text

    def decode_bytes(self, ids, previous=None):
        """Ids -> the bytes that they stand for, exactly. `previous` is the id before them, None at the beginning."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < len(self.vocab):
            bad = next(i for i in ids if not 0 <= i < len(self.vocab))
            raise ValueError(f"token id {bad} is not in this vocabulary; expected 0 to {len(self.vocab) - 1}")
        tokens = [self.vocab[i] for i in ids]
        if self.spaced:
            first = {None, *self.specials.values()}  # after these the space is not the text's own
            tokens = [t.removeprefix(b" ") if p in first else t for p, t in zip([previous, *ids], tokens)]
        return b"".join(tokens)

    def decode(self, ids, previous=None):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, previous).decode("utf-8", "replace")

    # -- files: section 5

    def strings(self):
        """id -> its key in vocab.json: a special's name; else a character for each byte, or as SentencePiece has it."""
        names = {i: name for name, i in self.specials.items()}
        if self.spaced:
            names |= {i: f"<0x{b:02X}>" for b, i in enumerate(self._byte_ids)}
        string = _marked if self.spaced else _characters
        return [names[i] if i in names else string(token) for i, token in enumerate(self.vocab)]

    def to_json(self):
        """The text of a tokenizer.json with which `tokenizers` gives the ids of encode(text, allowed_special="all")."""
        return to_json(self)

    @staticmethod
    def from_json(text):
        """The tokenizer of a tokenizer.json; ValueError where it is none, or would need what this file does not do."""
        return from_json(text)

    def save(self, path):
        """As a rank file where the name ends in .tiktoken, as vocab.json with merges.txt beside it where it ends in
        vocab.json, else as tokenizer.json. ValueError where the file would not give this tokenizer again."""
        save(self, path)

    @staticmethod
    def load(path):
        """The tokenizer in a file of any format of section 5, whose content says which."""
        return load(path)


def merge_ids(ids, ranks):
    """Join the pair of the lowest rank, of equals the leftmost, until none is left; ranks {(id, id): (rank, id)}."""
    ids, n = list(ids), len(ids)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))  # a linked list, for words can be long
    heap = [(ranks[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        found, new = ranks.get((ids[i], ids[j]), (None, None)) if j < n else (None, None)
        if found != rank:
            continue  # one of the two was joined to another neighbour since
        ids[i], ids[j] = new, None
        after[i] = after[j]
        if after[j] < n:
            before[after[j]] = i
        for k in (before[i], i):
            pair = (ids[k], ids[after[k]]) if k >= 0 and after[k] < n else None
            if pair in ranks:
                heapq.heappush(heap, (ranks[pair][0], k))
    return tuple(i for i in ids if i is not None)


LONG, LONG_WHEN_LOADED = 1 << 20, 1 << 11  # characters or bytes of text: 0.3 s in Python; 0.5 ms


def _finder(names):
    """A pattern that finds names, all str or all bytes; the regex package remembers it."""
    return regex.compile((b"|" if isinstance(names[0], bytes) else "|").join(map(regex.escape, names)))


class _Cache(dict):
    """pre-token -> its ids, as a tuple; worked out when first asked for, emptied when full."""

    def __init__(self, merge, entries=1 << 17, longest=64):
        self.merge, self.entries, self.longest = merge, entries, longest

    def __missing__(self, word):
        ids = self.merge(word)
        if len(word) <= self.longest:
            if len(self) >= self.entries:
                self.clear()
            self[word] = ids
        return ids


class Decoder:
    """Ids to text one at a time: what push and finish return, joined, is decode of all ids (previous: see there)."""

    def __init__(self, tokenizer, previous=None):
        self._tokenizer, self._previous = tokenizer, previous
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id):
        """The text that this id completes; never half a character."""
        data, self._previous = self._tokenizer.decode_bytes([token_id], self._previous), token_id
        return self._decoder.decode(data)

    def finish(self):
        """The rest: U+FFFD where the ids ended inside a character. The decoder is then at a beginning."""
        self._previous = None
        return self._decoder.decode(b"", True)


# == 5  tokenizers in files ========================================================================================
#
# tokenizer.json of Hugging Face `tokenizers`, the only one that holds everything; GPT-2's vocab.json with merges.txt;
# tiktoken's ranks, a line "base64 id" for each token; llama2.c's tokenizer.bin, which is only read. Of byte-level
# tokenizers only those are read whose texts GPT-2's PATTERN splits: section 7 knows no other.

BOS, UNKNOWN, EOS = "<s>", "<unk>", "</s>"  # of SentencePiece, as Llama has it; llama2.c puts <s> between stories
BLANK_MARK = "\u2581"  # stands for a space in SentencePiece's files, not in llama2.c's
SPACED = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": BLANK_MARK},
            {"type": "Replace", "pattern": {"String": " "}, "content": BLANK_MARK},
        ],
    },
    "pre_tokenizer": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": BLANK_MARK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = {"normalizer": None, "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}

# What `tokenizers` applies that we do not have; any other value would give other ids than ours.
NEUTRAL = {
    "model.type": ["BPE", None],
    "post_processor.type": ["ByteLevel", None],
    "truncation": [None],
    "padding": [None],
    "model.dropout": [None, 0.0],
    "model.continuing_subword_prefix": ["", None],
    "model.end_of_word_suffix": ["", None],
    "model.ignore_merges": [False, None],
}
NEUTRAL_PLAIN = NEUTRAL | {
    "pre_tokenizer.type": ["ByteLevel"],
    "pre_tokenizer.add_prefix_space": [False],
    "pre_tokenizer.use_regex": [True, None],
    "normalizer": [None],
}
NEUTRAL_SPACED = NEUTRAL | {name: [value] for name, value in SPACED.items() if name != "decoder"}


def to_json(tokenizer):
    """The text of a tokenizer.json with which `tokenizers` gives the ids of encode(text, allowed_special="all")."""
    if tokenizer.tied:
        raise ValueError("a tokenizer.json cannot hold merges of one rank, which tokenizer.bin of llama2.c has")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    by_id = sorted(tokenizer.specials.items(), key=lambda item: item[1])
    spaced = tokenizer.spaced
    string = _marked if spaced else _characters
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in by_id],
        **(SPACED if spaced else PLAIN),
        "post_processor": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN if spaced else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": spaced,
            "byte_fallback": spaced,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(tokenizer.strings())},
            "merges": [[string(left), string(right)] for left, right in tokenizer.merges],
        },
    }
    # the order of the keys is part of a tokenizer's hash
    order = ["version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"]
    return json.dumps({key: data[key] for key in [*order, "decoder", "model"]}, ensure_ascii=False, indent=0) + "\n"


def from_json(text):
    """The tokenizer of a tokenizer.json; ValueError where it is none, or would need what this file does not do."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"not a tokenizer: expected {EXPECTED}") from None
    if not _setting(data, "model.vocab"):
        raise ValueError("not a tokenizer: the JSON has no model with a vocabulary")
    spaced = _setting(data, "model.byte_fallback") is True
    for name, neutral in (NEUTRAL_SPACED if spaced else NEUTRAL_PLAIN).items():
        if (value := _setting(data, name)) not in neutral:
            kind = "byte-level BPE with GPT-2's split pattern, and that of llama2.c, are read"
            raise ValueError(f"{name} is {value!r:.60}; expected {json.dumps(neutral[0])}: only {kind}")
    try:
        strings, added = data["model"]["vocab"], data.get("added_tokens") or []
        specials = {token["content"]: token["id"] for token in added}
        for flag in ("single_word", "lstrip", "rstrip"):
            if any(token.get(flag) for token in added):
                raise ValueError(f"a special token has {flag} set; expected false: only plain matches are read")
        if any(strings.get(name, i) != i for name, i in specials.items()):
            raise ValueError("a special token has two ids")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"]["merges"]]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a damaged tokenizer.json: a merge is not a pair")
        strings = _in_order({**strings, **specials})
        if not spaced:
            return _byte_level(strings, pairs, specials)
        byte_ids = [strings.index(f"<0x{b:02X}>") for b in range(256)]
        vocab = [name.replace(BLANK_MARK, " ").encode() for name in strings]
        for b, i in enumerate(byte_ids):
            vocab[i] = bytes([b])
        merges = [tuple(name.replace(BLANK_MARK, " ").encode() for name in pair) for pair in pairs]
        return Tokenizer(vocab, merges, specials, byte_ids)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a damaged tokenizer.json: {type(error).__name__} {error}") from None


def _byte_level(strings, pairs, specials):
    vocab = [s.encode() if s in specials else _bytes(s) for s in strings]
    return Tokenizer(vocab, [(_bytes(left), _bytes(right)) for left, right in pairs], specials)


def _in_order(ids):
    """{string: id} -> the strings, in the order of their ids."""
    strings = {i: string for string, i in ids.items()}
    if len(strings) < len(ids):
        raise ValueError("two tokens have the same id")
    gap = next((i for i in range(len(strings)) if i not in strings), None)
    if gap is not None:
        raise ValueError(f"the vocabulary has no token of id {gap}; expected 0 to {len(strings) - 1}")
    return [strings[i] for i in range(len(strings))]


def to_vocab_and_merges(tokenizer):
    """(the text of a vocab.json, that of a merges.txt)."""
    vocab = {name: i for i, name in enumerate(tokenizer.strings())}
    merges = "".join(f"{_characters(left)} {_characters(right)}\n" for left, right in tokenizer.merges)
    return json.dumps(vocab, ensure_ascii=False), "#version: 0.2\n" + merges


def from_vocab_and_merges(vocab, merges):
    """An entry that is neither a byte nor what a merge makes is a special token: the two files say no more of it.
    ValueError where another split pattern than GPT-2's made them."""
    vocab = json.loads(vocab)
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    pairs = [line.split(" ") for line in lines]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"merges.txt has a line {next(' '.join(p) for p in pairs if len(p) != 2)!r}; expected two tokens"
        )
    made = {*CHARACTER, *(left + right for left, right in pairs)}
    _check_pattern(_bytes(left + right) for left, right in pairs)
    return _byte_level(_in_order(vocab), pairs, {name: i for name, i in vocab.items() if name not in made})


def to_ranks(tokenizer):
    """The bytes of a rank file: every token but the specials, whose ids no such file holds."""
    plain = [(i, token) for i, token in enumerate(tokenizer.vocab) if i not in tokenizer.specials.values()]
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in plain)


def from_ranks(data):
    """A token's rank is its id and the place of its merge: of the two parts that lower ranks join its bytes to. END
    gets the first id behind them, as it has in GPT-2's. ValueError where another split pattern made the tokens."""
    try:
        lines = [line.split() for line in data.splitlines() if line]
        ids = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise ValueError("a damaged rank file: expected lines of a token in base64 and its rank") from None
    vocab = _in_order(ids)
    _check_pattern(vocab)
    byte_ids = {token[0]: i for i, token in enumerate(vocab) if len(token) == 1}
    ranks, merges = {}, []
    for i, token in enumerate(vocab):
        if len(token) > 1:
            parts = merge_ids([byte_ids[b] for b in token], ranks) if byte_ids.keys() >= set(token) else ()
            if len(parts) != 2:
                raise ValueError(f"{token!r} is not made of two tokens of lower rank: no merge gives it")
            ranks[parts] = (i, i)
            merges.append((vocab[parts[0]], vocab[parts[1]]))
    return Tokenizer([*vocab, END.encode()], merges, {END: len(vocab)})


def from_llama2c(data):
    """int32 longest token, then of each token float32 score, int32 bytes, bytes. 0 is unknown, 1 ends a story, 3 to 258
    are bytes. Any two tokens may be joined to a third, the highest score first; of equals the leftmost."""
    tokens, scores, at = [], [], 4
    while at + 8 <= len(data):
        score, size = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + max(size, 0)])
        scores.append(score)
        at += 8 + max(size, 0)
    if at != len(data) or len(tokens) < 259 or tokens[3:259] != [b"<0x%02X>" % b for b in range(256)]:
        raise ValueError("a damaged tokenizer.bin: expected scores and tokens, 3 to 258 of them <0x00> to <0xFF>")
    ids = {token: i for i, token in enumerate(tokens) if i >= 259}
    made = {
        token: [(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in ids and token[k:] in ids]
        for token in ids
    }
    made = {token: pairs for token, pairs in made.items() if pairs}
    merges = list(chain.from_iterable(made[token] for token in sorted(made, key=lambda token: -scores[ids[token]])))
    of_score = {score: rank for rank, score in enumerate(sorted({scores[ids[token]] for token in made}, reverse=True))}
    ranks = [of_score[scores[ids[a + b]]] for a, b in merges] if len(of_score) < len(made) else None
    specials = {UNKNOWN: 0, BOS: 1, EOS: 2}
    vocab = [*(name.encode() for name in specials), *(bytes([b]) for b in range(256)), *tokens[259:]]
    return Tokenizer(vocab, merges, specials, range(3, 259), ranks)


# A token that merges made inside a pre-token: a part of a run is a run itself; parts of 'll, 've and 're are not.
MADE_BY_PATTERN = regex.compile(rf"{PATTERN}|'[lvr]")


def _check_pattern(tokens):
    """ValueError if GPT-2's pattern would cut one of these tokens, in bytes: then merges of another one made them.

    Rank files, and vocab.json with merges.txt, do not name their pattern. gpt2, r50k_base and p50k_base have GPT-2's.
    """
    for token in tokens:
        try:
            text = token.decode()
        except UnicodeDecodeError:  # part of a character
            continue
        if not MADE_BY_PATTERN.fullmatch(text):
            cut = f"token {text!r:.60} is cut by GPT-2's split pattern, so the file is of another (cl100k_base has one)"
            raise ValueError(f"{cut}; take a vocabulary of GPT-2's pattern, or train one: python bpe.py train")


EXPECTED = "tokenizer.json, vocab.json beside merges.txt, a rank file of tiktoken, or tokenizer.bin of llama2.c"


VOCAB = regex.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*[0-9]')  # an object whose first value is a number
RANKS = regex.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


def load(path):
    """The tokenizer in a file, whose content says of which format it is."""
    path = Path(path)
    data = path.read_bytes()
    try:
        if VOCAB.match(data):
            return from_vocab_and_merges(data, _beside(path, "vocab.json", "merges.txt").read_text("utf-8"))
        if path.name.endswith("merges.txt"):
            return from_vocab_and_merges(_beside(path, "merges.txt", "vocab.json").read_text("utf-8"), data.decode())
        if RANKS.match(data):
            return from_ranks(data)
        if len(data) > 12 and 0 < struct.unpack_from("<i", data)[0] < 1 << 16 and data[12:17] == b"<unk>":
            return from_llama2c(data)
        return from_json(data.decode("utf-8", "replace"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save(tokenizer, path):
    """As a rank file where the name ends in .tiktoken, as vocab.json and merges.txt beside it where it ends in
    vocab.json, else as tokenizer.json. ValueError where a file would not give the same tokenizer again."""
    from tinygpt import write_aside

    path = Path(path)
    files = {path: tokenizer.to_json()}
    if path.name.endswith(".tiktoken"):
        files = {path: to_ranks(tokenizer)}
        _check_same(tokenizer, path, from_ranks, *files.values())
    elif path.name.endswith("vocab.json"):
        files = dict(zip((path, _beside(path, "vocab.json", "merges.txt")), to_vocab_and_merges(tokenizer)))
        _check_same(tokenizer, path, from_vocab_and_merges, *files.values())
    for name, data in files.items():
        _check_out(name)
        write_aside(name, [data.encode() if isinstance(data, str) else data])


def _beside(path, name, other):
    """The path of merges.txt for that of vocab.json, of gpt2-merges.txt for gpt2-vocab.json."""
    if not path.name.endswith(name):
        raise ValueError(f"not a tokenizer: a vocabulary without merges; expected a {name} beside its {other}")
    return path.with_name(path.name.removesuffix(name) + other)


def _check_same(tokenizer, path, read, *data):
    """ValueError that says what is lost where `data` does not give the same tokenizer again."""
    lost = None
    if tokenizer.spaced:
        lost = "that characters without an id are bytes and a text begins with a space"
    else:
        try:
            again = read(*data)
        except ValueError as error:
            lost = f"it ({error})"
        else:
            names = [name for name, i in tokenizer.specials.items() if again.specials.get(name) != i]
            if names:
                lost = f"the special tokens {', '.join(names)}"
            elif again.to_json() != tokenizer.to_json():
                lost = "merges in an order that is not that of their ids"
    if lost:
        raise ValueError(f"{path} cannot hold {lost}; save a tokenizer.json")


def _setting(data, dotted):
    """data["a"]["b"] for "a.b", None where it is absent."""
    for key in dotted.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _characters(token):
    return "".join([CHARACTER[b] for b in token])


def _bytes(string):
    try:
        return bytes([BYTE[character] for character in string])
    except KeyError as error:
        raise ValueError(f"token {string!r} is not byte-level: it has {error.args[0]!r}") from None


def _marked(token):
    return token.decode("utf-8", "replace").replace(" ", BLANK_MARK)


# == 6  token files: NAME.bin and NAME.bin.json ====================================================================

FORMAT_VERSION = 1


def write_tokens(documents, tokenizer, path, progress=None, threads=None):
    """Write the ids of each document, or of `pieces` of them, and the end's, as raw little-endian integers, and beside
    it what they are, as JSON. Returns that. Calls progress(bytes of text done). On all cores by default; the bytes
    written are the same with any number of threads.
    """
    from tinygpt import write_aside

    path = os.fspath(path)
    info = {"format_version": FORMAT_VERSION, "dtype": tokenizer.dtype.name, "vocab_size": tokenizer.vocab_size}
    info |= {"tokenizer_hash": tokenizer.hash, "tokens": 0, "stories": 0, "bytes": 0}

    def chunks():
        crc = 0
        for ids, stories, size in _encoded(documents, tokenizer, threads):
            yield ids.data
            crc = zlib.crc32(ids.data, crc)
            info["tokens"] += len(ids)
            info["stories"] += stories
            info["bytes"] += size
            if progress:
                progress(info["bytes"])
        if not info["stories"]:
            raise ValueError("no stories to encode; expected at least one")
        info["crc32"] = f"{crc:08x}"
        with contextlib.suppress(FileNotFoundError):
            if Path(path + ".json").read_bytes() != described():  # as it is where another process wrote the same
                os.remove(path + ".json")  # never the description of an older file beside this one

    def described():
        return json.dumps(info, indent=1).encode() + b"\n"

    _check_out(path)
    write_aside(path, chunks())
    write_aside(path + ".json", [described()])
    return info


def read_tokens(path, tokenizer=None, check=True):
    """A token file -> (ids, mapped read-only, its description from the JSON; crc32 is computed if missing). ValueError
    where the two do not belong together, or where it was written with another tokenizer. check=False does not read the
    content: for a file that has not changed since it was checked."""
    path = os.fspath(path)
    try:
        info = json.loads(Path(path + ".json").read_bytes())
        version = info["format_version"]
    except FileNotFoundError:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist") from None
        raise ValueError(f"{path}.json is missing, which says what {path} holds; encode the text again") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path}.json does not describe a token file; encode the text again") from None
    if version != FORMAT_VERSION:
        got = f"format version {version!r:.20}"
        raise ValueError(f"{path} has {got}; expected {FORMAT_VERSION}; update this program or encode the text again")
    if tokenizer and info.get("tokenizer_hash") != tokenizer.hash:
        got, want = " ".join(str(info.get("tokenizer_hash")).split())[:12], tokenizer.hash[:12]
        raise ValueError(f"{path} was written with tokenizer {got}, this one is {want}; encode the text again")
    if info.get("dtype") not in ("uint16", "uint32") or not all(
        type(info.get(key)) is int and 0 < info[key] < 2**48 for key in ("vocab_size", "tokens", "stories", "bytes")
    ):
        raise ValueError(f"{path}.json does not describe a token file; encode the text again")
    dtype = np.dtype(info["dtype"]).newbyteorder("<")
    size = os.path.getsize(path)
    if size != info["tokens"] * dtype.itemsize:
        want = info["tokens"] * dtype.itemsize
        raise ValueError(f"{path} has {size} bytes; expected {want} ({info['tokens']} tokens); encode the text again")
    if tokenizer and info["vocab_size"] != tokenizer.vocab_size:  # the ids are read without a look at their range
        got, want = info["vocab_size"], tokenizer.vocab_size
        raise ValueError(f"{path}.json says vocab_size {got}; expected {want}; encode the text again")
    ids, written = np.memmap(path, dtype, "r"), info.get("crc32")  # other writers may leave it out
    if written and not check:
        return ids, info
    info["crc32"] = f"{zlib.crc32(ids):08x}"
    if written and info["crc32"] != written:
        found, want = info["crc32"], f"{written!r:.20}"
        raise ValueError(f"{path} is damaged: its checksum is {found!r}, expected {want}; encode the text again")
    if (most := int(ids.max())) >= info["vocab_size"]:
        raise ValueError(f"{path} has id {most}; expected below {info['vocab_size']}; encode the text again")
    return ids, info


def _encoded(documents, tokenizer, threads=None):
    """Yield (ids, stories, bytes of text) for some documents after the other, in order."""
    pieces = as_pieces(documents, tokenizer.spaced)  # a spaced tokenizer's text cannot be cut
    first, pieces, size = read_ahead(pieces, LONG)
    segments = ((text, tokenizer.end if ends else -1) for text, ends in chain(first, pieces))
    if not tokenizer.takes_kernels(size):
        for text, end in segments:
            ids = tokenizer._encode(_text(text)) + [end] * (end >= 0)
            yield np.array(ids, tokenizer.dtype), int(end >= 0), len(text)
        return
    for ids, batch in tokenizer.kernels().run(segments, threads):
        yield ids, batch.stories, batch.size


def _check_out(path):
    """Raise OSError before the work is done, rather than after, where a file cannot be written."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; make it before writing {path}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file to write")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable; choose another place for {path}")


# -- text in other layouts: JSON, which is read, and compressed files, which are refused

LAYOUTS = 2  # one more when `pieces` reads other stories from the same file: what was made of it before is out of date
STORY = 'a string, {"text": "a story"} or {"story": "a story"}'
JSON_MOST = 1 << 30  # bytes of an array, which has to fit into memory several times
JSON_START = regex.compile(rb'\s*(\[\s*)?\{\s*"(?:[^"\\\n]|\\.){0,99}"\s*:')  # of an object or an array of objects


def _reader(file, path):
    """The function that reads the stories of an open file; its first bytes decide, and its name where they do not."""
    head = file.peek(1024)[:1024].removeprefix(codecs.BOM_UTF8)
    _refuse_packed(path, head)
    suffix, start = path.suffix.lower(), JSON_START.match(head)
    if (start and start[1]) or (suffix == ".json" and head.lstrip().startswith(b"[")):
        return _json_texts
    return _jsonl_texts if start or suffix in (".json", ".jsonl") else _txt_texts


def _is_json_array(path):
    if path.suffix.lower() != ".json":
        return False
    with open(path, "rb") as file:
        return file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _jsonl_texts(file, path):
    for number, line in enumerate(file, 1):
        line = _utf8(codecs.decode, line, path, "utf-8-sig" if number == 1 else "utf-8")
        if line.strip():
            try:
                text = _story_of(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {number}: expected {STORY}, got {line.strip()[:60]!r}") from None
            yield from ((story, True) for story in text.split(END))


def _json_texts(file, path):
    if (size := os.path.getsize(path)) > JSON_MOST:
        raise ValueError(f"{path} is a JSON array of {size:,} bytes, above {JSON_MOST:,}; write it as .jsonl")
    text = _utf8(codecs.decode, file.read(), path, "utf-8-sig")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} begins like a JSON array but is none: {error}") from None
    for number, value in enumerate(values, 1):
        try:
            text = _story_of(value)
        except (ValueError, TypeError):
            raise ValueError(f"{path}, item {number}: expected {STORY}, got {json.dumps(value)[:60]!r}") from None
        yield from ((story, True) for story in text.split(END))


def _story_of(value):
    """The text in a value of JSON; TypeError or ValueError if there is none."""
    if isinstance(value, dict):
        value = value.get("text", value.get("story"))
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # UnicodeEncodeError: an escaped half of a surrogate pair
    return value


TO_JSONL = "import pandas, sys; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)"
PACKED = [  # suffixes; first bytes and where they stand; what the unpacked file ends in; the command that unpacks it
    ((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"), b"ustar", 257, "", "tar -xf {file}"),
    ((".gz",), b"\x1f\x8b", 0, "", "gunzip -c {file} > {out}"),
    ((".bz2",), b"BZh", 0, "", "bunzip2 -c {file} > {out}"),
    ((".xz",), b"\xfd7zXZ\0", 0, "", "xz -dc {file} > {out}"),
    ((".zst",), b"\x28\xb5\x2f\xfd", 0, "", "zstd -dc {file} > {out}"),
    ((".zip",), b"PK\3\4", 0, "", "unzip {file}"),
    ((".parquet",), b"PAR1", 0, ".jsonl", f'python -c "{TO_JSONL}" {{file}} {{out}}'),
]


def _refuse_packed(path, head=b""):
    """ValueError, with the command that helps, for a file that is compressed by its name or its first bytes."""
    for suffixes, magic, place, ending, command in PACKED:
        suffix = next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)
        if suffix or head[place:].startswith(magic):
            out = str(path)[: -len(suffix)] + ending if suffix else f"{path}{ending or '.txt'}"
            command = command.format(file=shlex.quote(str(path)), out=shlex.quote(out))
            raise ValueError(f"{path} is not text but {suffixes[0]} data; unpack it first: {command}")


def as_pieces(texts, whole=False):
    """A document, documents, or `pieces` of them -> (bytes, whether the document ends there); whole: documents."""
    held = []
    for text in [texts] if isinstance(texts, (str, bytes)) else texts:
        text, ends = text if isinstance(text, tuple) else (text, True)
        held.append(utf8_of(text))
        if ends or not whole:
            yield b"".join(held), ends
            held = []


# == 8  command line ===============================================================================================


class _Bar:
    """Shows progress and the time left on stderr where that is a terminal; with it closes, the line is empty again."""

    def __init__(self, what, total):
        self.what, self.total, self.start = what, max(total, 1), time.monotonic()
        self.next = self.start + 0.2

    def __call__(self, done):
        now = time.monotonic()
        if sys.stderr.isatty() and now >= self.next:
            self.next = now + 0.1
            share = min(max(done / self.total, 1e-9), 1)
            left = int(min((now - self.start) * (1 / share - 1), 359_999))
            line = f"{self.what} [{'#' * int(30 * share):30}] {share:4.0%}, {left // 60}:{left % 60:02} left "
            print("\r" + line, end="", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if sys.stderr.isatty():
            print("\r" + " " * (len(self.what) + 60), end="\r", file=sys.stderr, flush=True)


def _size(paths):
    return sum(path.stat().st_size for path in text_files(paths))


def _note(line):
    print(line, file=sys.stderr)


def _check_names(files, *outs):
    """What is written can be written, and is none of what is read."""
    for out in outs:
        _check_out(out)
        if os.path.exists(out) and any(os.path.samefile(out, path) for path in text_files(files)):
            raise ValueError(f"{out} would be overwritten, but is one of the files to read; choose another --out")


def _train(args):
    least = 256 + 1 + args.reserve
    if args.reserve < 0:
        raise ValueError(f"--reserve is {args.reserve}; expected 0 or more")
    if args.vocab_size < least:
        parts = f"256 bytes, {END}, {args.reserve} reserved"
        raise ValueError(f"--vocab-size is {args.vocab_size}; expected at least {least} ({parts})")
    _check_names(args.files, args.out)
    with _Bar("reading", _size(args.files)) as reading, _Bar("merging", args.vocab_size - least) as merging:
        merges = train(pieces(args.files, reading), args.vocab_size - least, merging)
    most = least + len(merges)
    if most < args.vocab_size:
        raise ValueError(f"--vocab-size is {args.vocab_size}, but this text gives {most}; lower it or add text")
    tokenizer = Tokenizer.from_merges(merges, args.reserve)
    tokenizer.save(args.out)
    _note(f"{args.out}: {tokenizer.vocab_size} entries, {len(merges)} of them merges")


def _encode(args):
    tokenizer = Tokenizer.load(args.tokenizer)
    _check_names([*args.files, args.tokenizer], args.out, args.out + ".json")
    with _Bar("encoding", _size(args.files)) as bar:
        info = write_tokens(pieces(args.files), tokenizer, args.out, bar)
    _note(f"{args.out}: {info['tokens']:,} tokens, {info['stories']:,} stories, {info['bytes']:,} bytes of text")


def _decode(args):
    tokenizer = Tokenizer.load(args.tokenizer)
    ids, _ = read_tokens(args.file, tokenizer)
    start = 0
    for stop in [*np.flatnonzero(ids == tokenizer.end).tolist(), len(ids)]:
        if start < len(ids):
            print(tokenizer.decode(ids[start:stop]), END, sep="\n")
        start = stop + 1


def _stats(args):
    tokenizer = Tokenizer.load(args.tokenizer)
    uses, stories, size = np.zeros(tokenizer.vocab_size, np.int64), 0, 0
    with _Bar("encoding", _size(args.files)) as bar:
        for ids, more_stories, more_bytes in _encoded(pieces(args.files), tokenizer):
            uses += np.bincount(ids, minlength=len(uses))
            stories, size = stories + more_stories, size + more_bytes
            bar(size)
    tokens, unused = int(uses.sum()), int((uses == 0).sum())
    print(f"text             {size:,} bytes, {stories:,} stories")
    print(f"tokens           {tokens:,} (one {END} for each story included)")
    print(f"bytes per token  {size / tokens:.3f}")
    print(f"unused           {unused:,} of {tokenizer.vocab_size:,} entries")
    print("longest tokens   bytes    id     uses  text")
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.specials.values()]
    for i in sorted(plain, key=lambda i: (-len(tokenizer.vocab[i]), i))[:10]:
        print(f"{len(tokenizer.vocab[i]):22} {i:5} {uses[i]:8,}  {tokenizer.decode([i])!r}")


def _explain(args):
    path = args.tokenizer or _newest_tokenizer()
    tokenizer = Tokenizer.load(path)
    print(path)
    for word in tokenizer.pretokens(args.text):
        for number, tokens in tokenizer.steps(word):
            label = f"merge {number + 1:,}" if number is not None else "characters" if tokenizer.spaced else "bytes"
            print(f"{label:>14}  {' | '.join(token.decode('utf-8', 'backslashreplace') for token in tokens)}")
        print(f"{'ids':>14}  {' '.join(map(str, tokenizer.word_ids(word)))}")


def _newest_tokenizer():
    """tokenizer.json in this folder, or the last one that train.py made for its data."""
    found = [*Path().glob("tokenizer.json"), *Path("data", "tokens").glob("*/tokenizer.json")]
    if not found:
        raise ValueError("there is no tokenizer.json here and none in data/tokens; name one with --tokenizer FILE")
    return min(found, key=lambda path: (path.parent != Path(), -path.stat().st_mtime))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def _parser():
    parser = _Parser(prog="bpe.py", description="Byte-level BPE: train a tokenizer, encode stories, decode them again.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|encode|decode|stats|explain")
    text = f"text with stories that end in {END}; .jsonl or a .json array with a field `text` or `story`; or a folder"

    command = commands.add_parser("train", help="learn the merges of a tokenizer from text")
    command.set_defaults(run=_train)
    command.add_argument("files", nargs="+", metavar="FILE", help=text)
    command.add_argument(
        "--vocab-size", type=int, required=True, metavar="V", help="entries in all: bytes, merges, specials"
    )
    command.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json to write")
    command.add_argument(
        "--reserve", type=int, default=8, metavar="N", help="special tokens kept free for templates (0 = none)"
    )

    command = commands.add_parser("encode", help="text to a token file, which train.py reads")
    command.set_defaults(run=_encode)
    command.add_argument("files", nargs="+", metavar="FILE", help=text)
    command.add_argument("--tokenizer", required=True, metavar="FILE", help="the tokenizer.json to encode with")
    command.add_argument("--out", required=True, metavar="FILE.bin", help="token file to write, and FILE.bin.json")

    command = commands.add_parser("decode", help="a token file back to text, on stdout")
    command.set_defaults(run=_decode)
    command.add_argument("file", metavar="FILE.bin", help="token file to read")
    command.add_argument(
        "--tokenizer", required=True, metavar="FILE", help="the tokenizer.json that it was encoded with"
    )

    command = commands.add_parser("explain", help="the merges that make the tokens of a word, in their order")
    command.set_defaults(run=_explain)
    command.add_argument("text", metavar="WORD", help="a word, or any text: each of its words in turn")
    command.add_argument(
        "--tokenizer", metavar="FILE", help="default: tokenizer.json here, else the newest of train.py"
    )

    command = commands.add_parser("stats", help="bytes per token, unused entries and longest tokens on a text")
    command.set_defaults(run=_stats)
    command.add_argument("files", nargs="+", metavar="FILE", help=text)
    command.add_argument("--tokenizer", required=True, metavar="FILE", help="the tokenizer.json to measure")
    return parser


def main(argv=None):
    """Run a command; 0 when it is done, 2 with one line on stderr when what was asked for is not possible."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", newline="\n")  # a console that lacks a character shows ? for it
    try:
        args = _parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read stdout has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _note("bpe.py: interrupted")
        return 130
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.filename is not None
        _note(f"bpe.py: error: {f'{error.filename}: {error.strerror}' if named else error}")
        return 2
    return 0


if __name__ == "__main__":
    from bpe import main  # fast/words.py imports this file: it stands in memory once

    sys.exit(main())
