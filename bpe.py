"""Text <-> token ids: a byte-level byte-pair encoding, trained on your own stories.

    python bpe.py train stories.txt --vocab-size 4096 --out tokenizer.json
    python bpe.py explain accomplishment

Section 1 says what is computed: pre-tokens, and the trainer that rescans everything for each merge. 2 finds the same
merges fast, 3 turns text into ids and back, 4 is tokenizer.json, 5 reads stories, 6 keeps ids in files, 7 and 8 are
command lines. Merges are ordered pairs of byte strings; an id is a position in a vocabulary, never a byte. Used where
they are: fast/ for long texts; extras/ for JSON, tokenizers of other systems, the commands decode, explain and stats.
"""

import argparse
import codecs
import contextlib
import functools
import hashlib
import heapq
import importlib
import json
import os
import sys
import time
import zlib
from collections import Counter, defaultdict
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import regex

# == 1  pre-tokens, and the trainer as a specification =================================================================

END = "<|endoftext|>"  # follows every document; merges never cross it, nor other special tokens

# GPT-2's: English contractions, then runs of letters, of digits, of other signs, each with at most one space before
# it, then white space, which leaves its last character to the run that follows. Radford et al. 2019.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SPLIT = regex.compile(PATTERN)  # every text is the concatenation of SPLIT.findall(text)
BYTES = [bytes([b]) for b in range(256)]


def train_spec(texts, num_merges, specials=(END,)):
    """The merges, in order: the most frequent pair of neighbours, of equals the greater; join it everywhere; again.

    Pairs in a pre-token may overlap (aaa has two). Fewer merges where none is left. Sennrich 2016, arXiv:1508.07909.
    """
    words = {tuple(BYTES[b] for b in word): n for word, n in count_pretokens(texts, specials).items()}
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
        words = {tuple(join_pair(word, best)): n for word, n in words.items()}
    return merges


def count_pretokens(texts, specials=(END,)):
    """A document, documents or `pieces`, split at special tokens -> {pre-token as bytes: how often it occurs}."""
    counts, special = Counter(), regex.compile(any_of(specials))
    for text, _ in as_pieces(texts):
        for plain in special.split(text.decode("utf-8", "surrogateescape")):  # bytes that are not UTF-8 come back below
            counts.update(SPLIT.findall(plain))
    return {word.encode("utf-8", "surrogateescape"): n for word, n in counts.items()}


def any_of(names):
    """A name, or names of special tokens -> the regular expression of one of them, the longest first."""
    names = {names} if isinstance(names, str) else {*names}
    return "|".join(map(regex.escape, sorted(names - {""}, key=lambda name: (-len(name), name)))) or r"(?!)"


def join_pair(word, pair):
    """word with every occurrence of pair, from left to right, replaced by one token (which is never pair[0])."""
    out = []
    for token in word:
        if out and out[-1] == pair[0] and token == pair[1]:
            out[-1] += token
        else:
            out.append(token)
    return out


# == 2  the trainer that runs ==========================================================================================

TRAIN_LONG = 1 << 22  # bytes of text: 0.4 s in Python


def train(texts, num_merges, progress=None, specials=(END,)):
    """The merges of train_spec, of documents or `pieces`; of long texts by fast/merges.py. Calls progress(merges_done).
    Memory, and the time that a merge takes, grow with the distinct words, not the text."""
    pieces, size = read_ahead(texts, TRAIN_LONG)
    if size >= TRAIN_LONG and (merges := find_fast("merges")):
        return merges.train(pieces, num_merges, progress, specials)
    return merge_pairs(count_pretokens(pieces, specials), num_merges, progress)


def merge_pairs(words, num_merges, progress=None):
    """The merges of train_spec for {pre-token: how often it occurs}.

    `tokens` is all pre-tokens, None between them. Cell i holds a token, before[i] and after[i] are its neighbours,
    places[pair] the cells where a pair begins. One merge makes all pairs of its new token; afterwards their
    counts only fall. So the heap may hold counts that are too high: it corrects one when it comes first.
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
    merges, heap, pairs = [], [], set(counts)
    while len(merges) < num_merges:
        for pair in pairs:
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], descending(pair), pair))
        if not heap:
            break
        n, _, best = heapq.heappop(heap)
        if -n != counts[best]:
            pairs = {best}
            continue
        merges.append(best)
        (left, right), new, pairs = best, best[0] + best[1], set()
        for i in places.pop(best):  # in the order of cells: in aaa the left pair is joined
            j = after[i]
            if tokens[i] != left or tokens[j] != right:
                continue  # an earlier merge joined one of them to its other neighbour
            h, k = before[i], after[j]  # cells h i j k become h i k
            tokens[i], tokens[j], after[i], before[k] = new, None, k, i
            changed = (h, (tokens[h], left), (tokens[h], new)), (i, (right, tokens[k]), (new, tokens[k]))
            for cell, old, pair in changed:
                if None not in pair:
                    counts[old] -= times[i]
                    counts[pair] += times[i]
                    places[pair].append(cell)
                    pairs.add(pair)
        counts[best] = 0
        if progress:
            progress(len(merges))
    return merges


def descending(pair, reverse=bytes(range(255, -1, -1))):
    """A string that sorts before those of lesser pairs. U+0100, above all bytes, ends each half."""
    return "".join(token.translate(reverse).decode("latin-1") + "\u0100" for token in pair)


def read_ahead(texts, enough):
    """as_pieces(texts), and their bytes, counted until there are enough."""
    pieces, first, size = as_pieces(texts), [], 0
    while size < enough and (piece := next(pieces, None)):
        first.append(piece)
        size += len(piece[0])
    return chain(first, pieces), size


@functools.cache
def find_fast(name):
    """The module fast/NAME.py; None, with a line on stderr, where it is not here."""
    try:
        return importlib.import_module(f"fast.{name}")
    except ImportError as error:
        note(f"bpe.py: no fast/{name}.py ({error}): long texts take several times as long in plain Python")


def find_extra(name, what=None):
    """The module extras/NAME.py; where it is not here ValueError, which says `what` needs it; None if nothing does."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as error:
        if what or error.name not in ("extras", f"extras.{name}"):
            raise ValueError(f"{what or 'this'} needs extras/{name}.py, which is not here ({error})") from None


# == 3  the tokenizer ==================================================================================================

UNKNOWN_BYTE = "the text has byte 0x{:02x}, for which this vocabulary has no token"
LONG, LONG_WHEN_LOADED = 1 << 20, 1 << 11  # bytes of text: 0.3 s in Python; 0.5 ms
CACHED = 64  # characters of a pre-token whose ids are cached: longer ones seldom come again


class Tokenizer:
    """vocab[id] -> bytes; merges [(left, right)] of byte strings, earlier ones first; specials {name: id}. The
    vocabulary holds both halves and the result of every merge, and no string twice; a text with a byte that it lacks is
    refused. byte_ids: the id of each byte, in a subclass where that is not the token of this byte alone."""

    ending = END  # the special token that ends a story
    allowed_special = ()  # of calls that do not say it; tokenizer.allowed_special = "all" does what `tokenizers` does
    pretokens = SPLIT.findall  # plain text -> the parts that are encoded one by one

    def __init__(self, vocab, merges, specials, byte_ids=None):
        self.vocab, self.merges, self.specials = list(vocab), list(merges), dict(specials)
        self.vocab_size = len(self.vocab)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")  # of ids in arrays and files
        apart = {*self.specials.values(), *(byte_ids or ())}
        ids = {token: i for i, token in enumerate(self.vocab) if i not in apart}
        self._ids, self._byte_ids = ids, list(byte_ids or (ids.get(byte, -1) for byte in BYTES))  # -1: it has none
        if len(set(self.strings())) < self.vocab_size:
            raise ValueError("the vocabulary holds a token twice")
        for left, right in self.merges:
            if missing := [token for token in (left, right, left + right) if token not in ids]:
                raise ValueError(f"merge of {left!r:.60} and {right!r:.60} needs {missing[0]!r:.60}, which has no id")
        self._ranks = {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in enumerate(self.merges)}
        self._cached_ids, self._encoder, self._seen = functools.lru_cache(1 << 16)(self.word_ids), None, 0

    @classmethod
    def from_merges(cls, merges, reserve=8, specials=(END,)):
        """Ids: the bytes by value, the merges, the special tokens, all in order; some for templates and fine-tuning."""
        names = [*specials, *(f"<|reserved_{i}|>" for i in range(reserve))]
        vocab = BYTES + [left + right for left, right in merges]
        specials = {name: len(vocab) + i for i, name in enumerate(names)}
        return cls(vocab + [name.encode() for name in names], merges, specials)

    @functools.cached_property
    def end(self):
        """The id of the special token that ends a story; ValueError where there is none."""
        if self.ending not in self.specials:
            raise ValueError(f"the vocabulary has no special token {self.ending}, which ends a story")
        return self.specials[self.ending]

    def encode(self, text, allowed_special=None, disallowed_special=()):
        """str or any bytes -> list of ids. Names in allowed_special (or "all") become their ids, the longest first; one
        of disallowed_special ("all": those not allowed) is a ValueError; other names of specials are plain text."""
        return self.encode_array(text, allowed_special, disallowed_special).tolist()

    def encode_array(self, text, allowed_special=None, disallowed_special=(), threads=None):
        """The same as an array, of a long text on all cores or so many threads."""
        text = bytes_of(text)
        if disallowed_special:
            find_extra("formats", "disallowed_special").refuse_specials(self, text, allowed_special, disallowed_special)
        segments = self.segments(text, self.special_names("allowed_special", allowed_special))
        return np.concatenate([ids for ids, _, _ in self._encode(segments, len(text), threads)])

    def encode_documents(self, documents, threads=None):
        """Documents or `pieces` -> (ids, the end of each story included; stories; bytes of text), ..., in order."""
        pieces, size = read_ahead(documents, LONG)
        return self._encode(((text, self.end if ends else -1) for text, ends in pieces), size, threads)

    def encode_iterable(self, chunks, allowed_special=None, disallowed_special=()):
        """Yield the ids of encode("".join(chunks)), those of a word as soon as it cannot change any more."""
        return find_extra("formats", "encode_iterable").encode_chunks(self, chunks, allowed_special, disallowed_special)

    def compiled(self, size):
        """The encoder of fast/words.py where loading it pays, after LONG bytes in all texts so far; else None."""
        if size >= LONG_WHEN_LOADED:
            self._seen += size
            if self._encoder is None and self._seen >= LONG and (words := find_fast("words")):
                self._encoder = words.Encoder(self._byte_ids, self._ranks, self.dtype)
            return self._encoder

    def _encode(self, segments, size, threads=None):
        """What `segments` gives, of a text of so many bytes -> (ids, special tokens, bytes of plain text), ..."""
        if encoder := self.compiled(size):
            yield from ((ids, batch.stories, batch.size) for ids, batch in encoder.run(segments, threads))
            return
        for text, special in segments:
            words = self.pretokens(text.decode("utf-8", "surrogateescape"))
            ids = chain.from_iterable((self._cached_ids if len(w) <= CACHED else self.word_ids)(w) for w in words)
            yield np.array([*ids, *[special] * (special >= 0)], self.dtype), int(special >= 0), len(text)

    def segments(self, text, names):
        """Bytes -> (plain text, the id of the special token behind it; -1 at the end), ...; the longest name wins."""
        start = 0
        for match in regex.finditer(any_of(names).encode(), text) if names else ():
            yield text[start : match.start()], self.specials[match.group().decode()]
            start = match.end()
        yield text[start:], -1

    def special_names(self, what, names):
        """A name or names, "all", or None for self.allowed_special -> the set of names of special tokens."""
        names = self.allowed_special if names is None else names
        names = self.specials if names == "all" else [names] if isinstance(names, str) else names
        if unknown := [name for name in names if name not in self.specials]:
            raise ValueError(f"{what} has {unknown[0]!r}; this tokenizer has {', '.join(self.specials) or 'none'}")
        return set(names)

    def first_ids(self, word):
        """The ids of a pre-token before any merge. ValueError for a byte without one."""
        ids = [self._byte_ids[b] for b in word.encode("utf-8", "surrogateescape")]
        if -1 in ids:
            raise ValueError(UNKNOWN_BYTE.format(word.encode("utf-8", "surrogateescape")[ids.index(-1)]))
        return ids

    def word_ids(self, word):
        """One pre-token -> its ids."""
        return merge_ids(self.first_ids(word), self._ranks)

    def decode(self, ids, previous=None):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, previous).decode("utf-8", "replace")

    def decode_bytes(self, ids, previous=None):
        """Ids -> the bytes that they stand for, exactly. `previous`, the id before them, counts in a subclass alone."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token id {unknown[0]} is not in this vocabulary; expected 0 to {self.vocab_size - 1}")
        return b"".join([self.vocab[i] for i in ids])

    def decode_iterable(self, ids, previous=None):
        """Yield the text that each id completes, never half a character; at last U+FFFD where they end inside one."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self.decode_bytes([i], previous))
            previous = i
        yield decoder.decode(b"", True)

    def byte_lengths(self):
        """Bytes of text in each token, (V,): none in the end of a story."""
        return np.array([len(token) * (i != self.end) for i, token in enumerate(self.vocab)])

    def strings(self):
        """id -> its key in vocab.json: a special's name, else the characters that stand for its bytes."""
        names = {i: name for name, i in self.specials.items()}
        return [names[i] if i in names else self.string(token) for i, token in enumerate(self.vocab)]

    def string(self, token):
        return "".join([CHARACTER[b] for b in token])

    def to_json(self):
        """The text of a tokenizer.json with which `tokenizers` gives the ids of encode(text, allowed_special="all")."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        by_id = sorted(self.specials.items(), key=lambda item: item[1])
        vocab = {string: i for i, string in enumerate(self.strings())}
        merges = [[self.string(left), self.string(right)] for left, right in self.merges]
        data = JSON | {"added_tokens": [{"id": i, "content": name, **flags} for name, i in by_id]}
        data["model"] = JSON_MODEL | {"vocab": vocab, "merges": merges}
        return json.dumps(data, ensure_ascii=False, indent=0) + "\n"

    @functools.cached_property
    def hash(self):
        """sha256 of to_json(), in hex: tokenizers that are equal in it give equal ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @staticmethod
    def from_json(text):
        """The tokenizer of a tokenizer.json; ValueError where it is none, or would need what we do not have."""
        return read_own(text) or find_extra("formats", "a tokenizer that bpe.py did not write").from_json(text)

    @staticmethod
    def load(path):
        """The tokenizer in a file: a tokenizer.json, or any format of extras/formats.py; its content says which."""
        data, what = Path(path).read_bytes(), "a tokenizer that bpe.py did not write"
        try:
            return read_own(data.decode("utf-8", "replace")) or find_extra("formats", what).read(Path(path), data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path):
        """As tokenizer.json; as what the name ends in: .tiktoken, vocab.json. ValueError if that cannot hold it."""
        from tinygpt import write_aside

        other = str(path).endswith((".tiktoken", "vocab.json"))
        files = find_extra("formats", path).to_files(self, Path(path)) if other else [(path, self.to_json().encode())]
        for name, data in files:
            check_out(name)
            write_aside(name, [data])


def merge_ids(ids, ranks):
    """Join the pair of the lowest rank, of equals the leftmost, until none is left; ranks {(id, id): (rank, id)}."""
    ids, n = [*ids, None], len(ids)
    after, before = list(range(1, n + 1)), list(range(-1, n))  # a linked list, for words can be long
    heap = [(ranks[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        found, new = ranks.get((ids[i], ids[j]), (None, None)) if j < n else (None, None)
        if found != rank:
            continue  # one of the two was joined to another neighbour since
        ids[i], ids[j], after[i], before[after[j]] = new, None, after[j], i
        for k in (before[i], i):
            if k >= 0 and (pair := (ids[k], ids[after[k]])) in ranks:
                heapq.heappush(heap, (ranks[pair][0], k))
    return tuple(i for i in ids if i is not None)


# == 4  tokenizer.json, as Hugging Face `tokenizers` has it ============================================================

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
JSON = {"version": "1.0", **dict.fromkeys(("truncation", "padding", "added_tokens", "normalizer"))}
JSON |= {"pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL}  # a hash depends on the order
JSON_MODEL = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
JSON_MODEL |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}

# byte -> the character that stands for it: itself where it prints, the others in their order from U+0100 up
PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTED]
CHARACTER = [chr(b) if b in PRINTED else chr(0x100 + OTHERS.index(b)) for b in range(256)]
BYTE = {character: b for b, character in enumerate(CHARACTER)}


def read_own(text):
    """The tokenizer of a tokenizer.json that to_json wrote; None for any other text."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        data = json.loads(text)
        ids = data["model"]["vocab"]
        specials = {token["content"]: ids[token["content"]] for token in data["added_tokens"]}
        strings = sorted(ids, key=ids.get)
        vocab = [s.encode() if s in specials else bytes([BYTE[c] for c in s]) for s in strings]
        merges = [tuple(bytes([BYTE[c] for c in s]) for s in pair) for pair in data["model"]["merges"]]
        tokenizer = Tokenizer(vocab, merges, specials)
        return tokenizer if tokenizer.to_json() == text else None


# == 5  stories in files, text in memory ===============================================================================

# Wherever white space follows something else a pre-token begins: here a text may be cut and its parts looked at alone.
CUT, WIDE = r"(?<=\S)(?=\s)", rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"
CUT_BYTES, LAST_CUT = regex.compile(rb"(?<=\S)(?<!%b)(?=\s|%b)" % (WIDE, WIDE)), regex.compile("(?r)" + CUT)
LAYOUTS = 2  # one more when `pieces` reads other stories from the same file: what was made of it before is out of date
JSON_START = regex.compile(rb'\s*(\[\s*)?\{\s*"(?:[^"\\\n]|\\.){0,99}"\s*:')  # of an object or an array of objects


def pieces(paths, progress=None):
    """Yield the stories of text (split at END), JSON and folders as (piece, True where its story ends): no story has to
    fit into memory. Where one continues, a pre-token begins. Stories are stripped, empty ones dropped. Calls
    progress(bytes_done). ValueError: a file that is not UTF-8 text, is compressed, has no story, or has a bad line."""
    done = 0
    for path in text_files(paths):
        with open(path, "rb") as file:
            empty = begins = True
            for text, ends in find_reader(path)(file, path):
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
    """The files that paths name, as Path; a folder means its *.txt, *.jsonl and arrays in *.json, sorted."""
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if path.is_dir():
            documents = find_extra("documents", path if any(path.glob("*.json*")) else None)
            yield from documents.files_in(path) if documents else sorted(path.glob("*.txt"))
        elif path.is_file():
            yield path
        elif path.exists():
            raise ValueError(f"{path} is a pipe or a device, which can be read once alone; write it to a file first")
        else:
            raise FileNotFoundError(f"{path} does not exist")


def find_reader(path):
    """The function that reads the stories of a file: read_text, or one of extras/documents.py. ValueError for a file
    that is compressed; without extras/ it is refused later, as bytes that are not text, and JSON is refused here."""
    with open(path, "rb") as file:
        head = file.read(1024).removeprefix(codecs.BOM_UTF8)
    is_json = path.suffix.lower() in (".json", ".jsonl") or JSON_START.match(head)
    documents = find_extra("documents", path if is_json else None)
    return (documents and documents.reader_of(path, head)) or read_text


def read_text(file, path, size=1 << 20):
    """The texts between ENDs, as pieces. `tail`, the last characters read so far, may hold the beginning of an END."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # drops a byte order mark, keeps CRLF
    held, tail = [], ""
    while data := file.read(size):
        *ended, last = (tail + utf8(decoder.decode, data, path)).split(END)
        for text in ended:
            yield "".join(held) + text, True
            held = []
        if place := LAST_CUT.search(last):
            yield "".join(held) + last[: place.start()], False
            held, last = [], last[place.start() :]
        cut = max(0, len(last) - len(END) + 1)
        held.append(last[:cut])
        tail = last[cut:]
    yield "".join(held) + tail + utf8(decoder.decode, b"", path, True), True


def utf8(decode, data, path, *options):
    """decode(data, *options); ValueError that names the file."""
    if b"\0" in data:
        raise ValueError(f"{path} is not text: it has NUL bytes")
    try:
        return decode(data, *options)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: byte 0x{error.object[error.start]:02x} is not UTF-8") from None


def as_pieces(texts):
    """A document, documents, or `pieces` of them, str or bytes -> (bytes, True where a document ends), ..."""
    for text in [texts] if isinstance(texts, (str, bytes)) else texts:
        text, ends = text if isinstance(text, tuple) else (text, True)
        yield bytes_of(text), ends


def bytes_of(data):
    """str or any bytes -> bytes."""
    if not isinstance(data, str):
        return data if isinstance(data, bytes) else bytes(memoryview(data))
    try:
        return data.encode()
    except UnicodeEncodeError as error:
        at = f"U+{ord(data[error.start]):04X} at position {error.start}"
        raise ValueError(f"text has a lone surrogate {at}; pass bytes or replace it") from None


# == 6  token files: NAME.bin and NAME.bin.json ========================================================================

FORMAT_VERSION = 1


def write_tokens(documents, tokenizer, path, progress=None, threads=None):
    """Write the ids of documents or `pieces`, the end of each included, as raw little-endian integers; beside them, as
    JSON, what they are; return that. Calls progress(bytes of text done). Any number of threads writes equal bytes."""
    from tinygpt import write_aside

    beside = Path(f"{path}.json")
    info = {"format_version": FORMAT_VERSION, "dtype": tokenizer.dtype.name, "vocab_size": tokenizer.vocab_size}
    info |= {"tokenizer_hash": tokenizer.hash, "tokens": 0, "stories": 0, "bytes": 0, "crc32": 0}

    def description():
        return json.dumps(info, indent=1).encode() + b"\n"

    def chunks():
        for ids, stories, size in tokenizer.encode_documents(documents, threads):
            yield ids.data
            info["crc32"] = zlib.crc32(ids.data, info["crc32"])
            for key, more in (("tokens", len(ids)), ("stories", stories), ("bytes", size)):
                info[key] += more
            if progress:
                progress(info["bytes"])
        if not info["stories"]:
            raise ValueError("no stories to encode; expected at least one")
        info["crc32"] = f"{info['crc32']:08x}"
        with contextlib.suppress(FileNotFoundError):
            if beside.read_bytes() != description():  # as it is where another process wrote the same
                beside.unlink()  # never the description of an older file beside this one

    check_out(path)
    write_aside(path, chunks())
    write_aside(beside, [description()])
    return info


def read_tokens(path, tokenizer=None, check=True):
    """A token file -> (ids, mapped read-only, its description from the JSON, with a crc32). ValueError where the two do
    not belong together, or another tokenizer wrote them. check=False: do not read the content, which was checked."""

    def refuse(what):
        raise ValueError(f"{what}; encode the text again") from None

    beside = Path(f"{path}.json")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    if not beside.exists():
        refuse(f"{beside} is missing, the description of {path}")
    try:
        info = json.loads(beside.read_bytes())
        version, hash, written = info["format_version"], str(info.get("tokenizer_hash")), info.get("crc32")
        V, tokens, *_ = counts = [info.get(key) for key in ("vocab_size", "tokens", "stories", "bytes")]
    except (ValueError, KeyError, TypeError, RecursionError):
        refuse(f"{beside} does not describe a token file")
    if version != FORMAT_VERSION:
        refuse(f"{path} has format version {version!r:.20}; expected {FORMAT_VERSION}")
    if tokenizer and hash != tokenizer.hash:
        refuse(f"{path} was written with tokenizer {' '.join(hash[:12].split())}, this one is {tokenizer.hash[:12]}")
    if info.get("dtype") not in ("uint16", "uint32") or not all(type(n) is int and 0 < n < 2**48 for n in counts):
        refuse(f"{beside} does not describe a token file")
    if tokenizer and V != tokenizer.vocab_size:  # the ids are read without a look at their range
        refuse(f"{beside} says vocab_size {V}; expected {tokenizer.vocab_size}")
    dtype = np.dtype(info["dtype"]).newbyteorder("<")
    if (size := os.path.getsize(path)) != tokens * dtype.itemsize:
        refuse(f"{path} has {size} bytes; expected {tokens * dtype.itemsize} ({tokens} tokens)")
    ids = np.memmap(path, dtype, "r")
    if check or not written:  # other writers may leave it out
        info["crc32"] = f"{zlib.crc32(ids):08x}"
        if written and info["crc32"] != written:
            refuse(f"{path} is damaged: its checksum is {info['crc32']!r}, expected {f'{written!r:.20}'}")
        if (most := int(ids.max())) >= V:
            refuse(f"{path} has id {most}; expected below {V}")
    return ids, info


def check_out(path, sources=()):
    """Raise before the work is done, rather than after, where a file cannot be written or is one of those to read."""
    if not (folder := Path(path).parent).is_dir():
        raise FileNotFoundError(f"{folder} is no folder; make it before writing {path}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file to write")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable; choose another place for {path}")
    if os.path.exists(path) and any(os.path.samefile(path, source) for source in text_files(sources)):
        raise ValueError(f"{path} would be overwritten, but is one of the files to read; choose another --out")


# == 7  what every command line shares =================================================================================


class Parser(argparse.ArgumentParser):
    """A parser whose error, a text or an exception, ends the program with one line on stderr and exit status 2."""

    def __init__(self, **more):
        super().__init__(**more)  # streams that were closed are opened: else a file would get their number, and lines
        sys.stdout, sys.stderr = (s or open(os.devnull, "w", encoding="utf-8") for s in (sys.stdout, sys.stderr))
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace", newline="\n")  # ? for what a console lacks

    def error(self, message):
        self.exit(2, f"{self.prog.split()[0]}: error: {error_line(message)}\n")  # a subcommand's prog is two words


def error_line(error):
    """An exception as one line, that fits a screen: an OSError as its file and what is wrong with it."""
    named = isinstance(error, OSError) and error.filename and error.strerror
    line = f"{error.filename}: {error.strerror}" if named else str(error)
    return line if len(line) < 1000 else f"{line[:700]} ... {line[-200:]}"


def in_range(kind, low, high, open_low=False):
    """An argparse type: a number of this kind from low to high; low itself is out of range if open_low."""

    def convert(text):
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            least = f"above {low}" if open_low else f"{low} or more"
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {least}, at most {high}")
        return value

    convert.__name__ = kind.__name__
    return convert


def say(text, stream=None):
    """Print at once to stdout, or to a stream; a reader who left, or a full disk, does not end the program."""
    encoding = (stream := stream or sys.stdout).encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)  # ? for what it lacks
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def note(line):
    """Print to stderr: statistics and progress."""
    say(line, sys.stderr)


def clock(seconds):
    """Seconds -> "minutes:seconds"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress(contextlib.AbstractContextManager):
    """A bar and the time left, on a terminal; nothing where stderr is a file. Call it with what is done of `total`."""

    def __init__(self, what, total):
        self.what, self.total, self.start, self.shown = what, max(1, total), time.monotonic(), 0.0

    def __call__(self, done):
        now = time.monotonic()
        if now - self.shown > 0.1 and now - self.start > 0.5 and sys.stderr.isatty():
            share = min(1.0, done / self.total)
            left = clock(min((now - self.start) * (1 - share) / max(share, 1e-9), 359_999))
            line = f"\r{self.what} [{'#' * round(30 * share):30}] {share:4.0%}, {left} left "
            print(line, end="", file=sys.stderr, flush=True)
            self.shown = now

    def __exit__(self, *_):
        if self.shown:
            print("\r" + " " * (len(self.what) + 60) + "\r", end="", file=sys.stderr, flush=True)


# == 8  the command line ===============================================================================================

TEXT = f"text with stories that end in {END}; .jsonl or a .json array with a field `text` or `story`; or a folder"
TOOLS = ("decode", "explain", "stats")  # commands of extras/tokens.py


def run_train(args):
    V, least = args.vocab_size, 256 + 1 + args.reserve
    if V < least:
        raise ValueError(f"--vocab-size is {V}; expected at least {least} (256 bytes, {END}, {args.reserve} reserved)")
    check_out(args.out, args.files)
    size = sum(map(os.path.getsize, text_files(args.files)))
    with Progress("reading", size) as reading, Progress("merging", V - least) as merging:
        merges = train(pieces(args.files, reading), V - least, merging)
    if len(merges) < V - least:
        raise ValueError(f"--vocab-size is {V}, but this text gives {least + len(merges)}; lower it or add text")
    Tokenizer.from_merges(merges, args.reserve).save(args.out)
    note(f"{args.out}: {V} entries, {len(merges)} of them merges")


def run_encode(args):
    tokenizer = Tokenizer.load(args.tokenizer)
    for out in (args.out, args.out + ".json"):
        check_out(out, [*args.files, args.tokenizer])
    with Progress("encoding", sum(map(os.path.getsize, text_files(args.files)))) as progress:
        info = write_tokens(pieces(args.files), tokenizer, args.out, progress)
    note(f"{args.out}: {info['tokens']:,} tokens, {info['stories']:,} stories, {info['bytes']:,} bytes of text")


def make_parser():
    parser = Parser(prog="bpe.py", description="Byte-level BPE: train a tokenizer, encode stories.")
    parser.epilog = f"{', '.join(TOOLS)}: what a tokenizer does to a text (extras/tokens.py)"
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|encode|" + "|".join(TOOLS))

    def command(run, name, help):
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=run)
        made.add_argument("files", nargs="+", metavar="FILE", help=TEXT)
        return made.add_argument

    add = command(run_train, "train", "learn the merges of a tokenizer from text")
    add("--vocab-size", type=int, required=True, metavar="V", help="entries in all: bytes, merges, specials")
    add("--out", required=True, metavar="FILE", help="the tokenizer.json to write")
    add("--reserve", type=in_range(int, 0, 2**16), default=8, metavar="N", help="special tokens kept free (0 = none)")
    add = command(run_encode, "encode", "text to a token file, which train.py reads")
    add("--tokenizer", required=True, metavar="FILE", help="the tokenizer.json to encode with")
    add("--out", required=True, metavar="FILE.bin", help="token file to write, and FILE.bin.json")
    return parser


def main(argv=None):
    """Run a command and return 0; a mistake ends in one line on stderr and exit status 2."""
    argv, parser = sys.argv[1:] if argv is None else argv, make_parser()
    try:
        if argv and argv[0] in TOOLS:
            parser = find_extra("tokens", f"bpe.py {argv[0]}").make_parser()
        (args := parser.parse_args(argv)).run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read stdout has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        note("bpe.py: interrupted")
        return 130
    except (ValueError, OSError) as error:
        parser.error(error)
    return 0


if __name__ == "__main__":
    from bpe import main  # fast/ and extras/ import this file: it stands in memory once

    sys.exit(main())
