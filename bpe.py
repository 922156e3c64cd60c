"""Text <-> token ids: a byte-level byte-pair encoding, trained on your own stories.

    python bpe.py train stories.txt --vocab-size 4096 --out tokenizer.json

Read sections 1 and 2 to know what is computed: documents, pre-tokens, and the trainer that rescans everything for
each merge. Section 3 computes the same merges fast, 4 turns text into ids and back, 5 keeps ids in files, 6 is the
command line. Merges are ordered pairs of byte strings; an id is a position in a vocabulary, never a byte.
"""

import argparse
import codecs
import contextlib
import hashlib
import heapq
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice, pairwise
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
    """Yield the stories of text files (split at END), .jsonl files (field "text") and folders of both.

    Stories are stripped, empty ones dropped; a text without END is one document. Reads in pieces and calls
    progress(bytes_done) after a story. ValueError: a file that is not UTF-8 text, has no story, or has a bad line.
    """
    done = 0
    for path in text_files(paths):
        with open(path, "rb") as file:
            empty = True
            texts = _jsonl_texts if path.suffix.lower() == ".jsonl" else _txt_texts
            for text in texts(file, path):
                if story := text.strip():
                    empty = False
                    yield story
                    if progress:
                        progress(done + file.tell())
            done += file.tell()
        if empty:
            raise ValueError(f"{path} is empty: expected at least one story")


def text_files(paths):
    """The files that paths name, as Path; a folder stands for its *.txt and *.jsonl, sorted."""
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in (".txt", ".jsonl") and p.is_file())
            if not inside:
                raise ValueError(f"{path} is a folder without .txt or .jsonl files")
            yield from inside
        elif path.exists():
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


def _txt_texts(file, path, size=1 << 20):
    """The texts between ENDs. `tail`, the last characters read so far, may hold the beginning of an END."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # drops a byte order mark, keeps CRLF
    pieces, tail = [], ""
    while data := file.read(size):
        *ended, last = (tail + _utf8(decoder.decode, data, path)).split(END)
        for text in ended:
            yield "".join(pieces) + text
            pieces = []
        cut = max(0, len(last) - len(END) + 1)
        pieces.append(last[:cut])
        tail = last[cut:]
    yield "".join(pieces) + tail + _utf8(decoder.decode, b"", path, True)


def _jsonl_texts(file, path):
    for number, line in enumerate(file, 1):
        line = _utf8(codecs.decode, line, path, "utf-8-sig" if number == 1 else "utf-8")
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # refuses what is no string, and an escaped half of a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f'{path}, line {number}: expected {{"text": "a story"}}, got {line.strip()[:60]!r}'
            ) from None
        yield from text.split(END)


def _text(data):
    """str or bytes -> str, where a byte that is not UTF-8 becomes a lone surrogate, so that nothing is lost."""
    if not isinstance(data, str):
        return codecs.decode(data, "utf-8", "surrogateescape")
    try:
        data.encode()
    except UnicodeEncodeError as error:
        i = error.start
        raise ValueError(
            f"text has a lone surrogate U+{ord(data[i]):04X} at position {i}; pass bytes or replace it"
        ) from None
    return data


def count_pretokens(texts):
    """Documents (str or bytes) -> {pre-token as bytes: how often it occurs}, in order of first occurrence."""
    counts = Counter()
    for text in [texts] if isinstance(texts, (str, bytes)) else texts:
        for part in _text(text).split(END):
            counts.update(SPLIT.findall(part))
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
    """The merges of train_spec, by keeping the count of every pair, the words it occurs in, and a heap of pairs.

    Calls progress(merges_done). A merge costs time in the words that contain its pair, not in the text.
    """
    counted = count_pretokens(texts)
    words, freq = [list(word) for word in counted], list(counted.values())
    tokens = [bytes([b]) for b in range(256)]  # id, here, -> bytes
    keys = [_descending(token) for token in tokens]
    counts, where = defaultdict(int), defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += freq[w]
            where[pair].add(w)  # stays when the word loses the pair: joining it there then changes nothing
    heap = [(-n, keys[a], keys[b], (a, b)) for (a, b), n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < num_merges:
        n, _, _, pair = heapq.heappop(heap)
        if counts.get(pair) != -n:
            continue  # the count has changed since, and was pushed again when it did
        # A byte string becomes a token in one merge only: what was joined inside it never depends on its neighbours.
        new = len(tokens)
        left, right = (tokens[i] for i in pair)
        merges.append((left, right))
        tokens.append(left + right)
        keys.append(_descending(left + right))
        changes = defaultdict(int)
        for w in where.pop(pair):
            before = words[w]
            after = words[w] = _joined(before, pair, new)
            if len(after) < len(before):
                for p in pairwise(before):
                    changes[p] -= freq[w]
                for p in pairwise(after):
                    changes[p] += freq[w]
                    if new in p:
                        where[p].add(w)
        for (a, b), change in changes.items():
            if change:
                counts[a, b] += change
                if counts[a, b]:
                    heapq.heappush(heap, (-counts[a, b], keys[a], keys[b], (a, b)))
                else:
                    del counts[a, b]
        if progress:
            progress(len(merges))
    return merges


def _descending(token, inverted=bytes(range(255, -1, -1))):
    """A key that sorts byte strings in falling order, for heapq pops the smallest: ab before a before Z."""
    return token.translate(inverted).decode("latin-1") + "\u0100"  # the end of a string sorts after every byte


# == 4  the tokenizer ==============================================================================================


def _byte_alphabet():
    """byte -> the character that stands for it in tokenizer.json: itself where it prints, else one from U+0100 up."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in prints]
    return [chr(b) if b in prints else chr(0x100 + others.index(b)) for b in range(256)]


CHARACTER = _byte_alphabet()
BYTE = {character: b for b, character in enumerate(CHARACTER)}

# What `tokenizers` applies that we do not have; any other value would give other ids than ours.
NEUTRAL = {
    "model.type": ["BPE", None],
    "pre_tokenizer.type": ["ByteLevel"],
    "pre_tokenizer.add_prefix_space": [False],
    "pre_tokenizer.use_regex": [True, None],
    "post_processor.type": ["ByteLevel", None],
    "normalizer": [None],
    "truncation": [None],
    "padding": [None],
    "model.dropout": [None, 0.0],
    "model.continuing_subword_prefix": ["", None],
    "model.end_of_word_suffix": ["", None],
    "model.byte_fallback": [False, None],
    "model.ignore_merges": [False, None],
}


class Tokenizer:
    """vocab[id] -> bytes; merges [(left, right)] of byte strings, earlier ones first; specials {name: id}.

    The vocabulary holds every byte, every merge's parts and result, END, and no string twice.
    """

    def __init__(self, vocab, merges, specials):
        self.vocab, self.merges, self.specials = list(vocab), list(merges), dict(specials)
        if END not in self.specials:
            raise ValueError(f"the vocabulary has no special token {END}, which ends a story")
        if "" in self.specials:
            raise ValueError("a special token is empty")
        special_ids = set(self.specials.values())
        ids = {token: i for i, token in enumerate(self.vocab) if i not in special_ids}
        if len(set(self._strings())) < len(self.vocab) or len(ids) + len(special_ids) < len(self.vocab):
            raise ValueError("the vocabulary holds a token twice")
        missing = [b for b in range(256) if bytes([b]) not in ids]
        if missing:
            raise ValueError(f"the vocabulary has no token for byte 0x{missing[0]:02x}; expected all 256")
        for left, right in self.merges:
            for token in (left, right, left + right):
                if token not in ids:
                    raise ValueError(f"the merge of {left!r} and {right!r} needs {token!r}, which has no id")
        self.end = self.specials[END]
        self._byte_ids = [ids[bytes([b])] for b in range(256)]
        self._ranks = {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in enumerate(self.merges)}
        self._cache = _Cache(self._merge)
        self._hash = None

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
    def hash(self):
        """sha256 of to_json(), in hex: what is equal in it gives equal ids."""
        if self._hash is None:
            self._hash = hashlib.sha256(self.to_json().encode()).hexdigest()
        return self._hash

    # -- text to ids

    def encode(self, text, allowed_special=()):
        """str or any bytes -> list of ids. Names in allowed_special (a set, or "all") become their ids, longest first;
        whatever else looks like a special token is plain text."""
        return self._encode(_text(text), self._allowed(allowed_special))

    def encode_iterable(self, chunks, allowed_special=()):
        """Yield the ids of encode("".join(chunks)), holding back what a later chunk can still change."""
        names = self._allowed(allowed_special)
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        held, new, size = "", [], 0
        for chunk in chunks:
            new.append(decoder.decode(_text(chunk).encode() if isinstance(chunk, str) else chunk))
            size += len(new[-1])
            if size > len(held):  # else a long word in small chunks would be read again for each of them
                ids, held = self._settled("".join([held, *new]), names)
                new, size = [], 0
                yield from ids
        yield from self._encode("".join([held, *new, decoder.decode(b"", True)]), names)

    def _allowed(self, names):
        """The names to look for in text, longest first."""
        if names == "all":
            names = self.specials
        elif isinstance(names, str):
            raise ValueError(f'allowed_special={names!r}: expected "all" or a set of names')
        names = sorted(names, key=len, reverse=True)
        for name in names:
            if name not in self.specials:
                raise ValueError(f"allowed_special has {name!r}; this tokenizer has {', '.join(self.specials)}")
        return names

    def _encode(self, text, names):
        ids, start = [], 0
        if names:
            for match in _finder(names).finditer(text):
                ids += self._plain(SPLIT.findall(text[start : match.start()]))
                ids.append(self.specials[match.group()])
                start = match.end()
        return ids + self._plain(SPLIT.findall(text[start:] if start else text))

    def _plain(self, words):
        return list(chain.from_iterable(map(self._cache.__getitem__, words)))

    def _settled(self, text, names):
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
            ids += self._encode(text[start : match.end()], names)
            start = match.end()
        # The end of a pre-token is certain once two more characters are known: one shows that a run is over and how
        # much white space it leaves, and after an apostrophe two decide between 'll and a mere apostrophe.
        words, known = SPLIT.findall(text[start:stop]), 0
        while words and known < 2:
            known += len(words.pop())
        return ids + self._plain(words), text[start + sum(map(len, words)) :]

    def _merge(self, word):
        """One pre-token -> its ids: join the pair of the earliest merge, of equals the leftmost, until none is left."""
        ids = [self._byte_ids[b] for b in word.encode("utf-8", "surrogateescape")]
        n = len(ids)
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))  # a linked list, for words can be long
        ranks = self._ranks
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

    # -- ids to text

    def decode_bytes(self, ids):
        """Ids -> the bytes that they stand for, exactly."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < len(self.vocab):
            bad = next(i for i in ids if not 0 <= i < len(self.vocab))
            raise ValueError(f"token id {bad} is not in this vocabulary; expected 0 to {len(self.vocab) - 1}")
        return b"".join([self.vocab[i] for i in ids])

    def decode(self, ids):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    # -- tokenizer.json, the format of Hugging Face tokenizers

    def _strings(self):
        """id -> its key in tokenizer.json: a special's name, or one character for each byte."""
        names = {i: name for name, i in self.specials.items()}
        return [names[i] if i in names else _characters(token) for i, token in enumerate(self.vocab)]

    def to_json(self):
        """The text of a tokenizer.json with which `tokenizers` gives the ids of encode(text, allowed_special="all")."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        by_id = sorted(self.specials.items(), key=lambda item: item[1])
        data = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": name, **flags} for name, i in by_id],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {string: i for i, string in enumerate(self._strings())},
                "merges": [[_characters(left), _characters(right)] for left, right in self.merges],
            },
        }
        return json.dumps(data, ensure_ascii=False, indent=0) + "\n"

    @classmethod
    def from_json(cls, text):
        """The tokenizer of a tokenizer.json; ValueError where it is none, or would need what this file does not do."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("not a tokenizer: expected the JSON of a tokenizer.json") from None
        if not _setting(data, "model.vocab"):
            raise ValueError("not a tokenizer: the JSON has no model with a vocabulary")
        for name, neutral in NEUTRAL.items():
            if (value := _setting(data, name)) not in neutral:
                raise ValueError(f"{name} is {value!r}; expected {json.dumps(neutral[0])}: only byte-level BPE is read")
        try:
            strings, added = data["model"]["vocab"], data.get("added_tokens") or []
            specials = {token["content"]: token["id"] for token in added}
            for flag in ("single_word", "lstrip", "rstrip"):
                if any(token.get(flag) for token in added):
                    raise ValueError(f"a special token has {flag} set; expected false: only plain matches are read")
            if any(strings.get(name, i) != i for name, i in specials.items()):
                raise ValueError("a special token has two ids")
            if len(set({**strings, **specials}.values())) < len({**strings, **specials}):
                raise ValueError("two tokens have the same id")
            strings = {i: string for string, i in {**strings, **specials}.items()}
            gap = next((i for i in range(len(strings)) if i not in strings), None)
            if gap is not None:
                raise ValueError(f"the vocabulary has no token of id {gap}; expected 0 to {len(strings) - 1}")
            vocab = [s.encode() if s in specials else _bytes(s) for s in map(strings.get, range(len(strings)))]
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"]["merges"]]
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError("a damaged tokenizer.json: a merge is not a pair")
            return cls(vocab, [(_bytes(left), _bytes(right)) for left, right in pairs], specials)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a damaged tokenizer.json: {type(error).__name__} {error}") from None

    def save(self, path):
        with _aside(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path):
        data = Path(path).read_bytes()
        try:
            return cls.from_json(data.decode("utf-8", "replace"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


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


def _finder(names):
    return regex.compile("|".join(map(regex.escape, names)))  # the regex package remembers it


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
    """Ids to text one at a time: what push and finish return, joined, is decode of all ids."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id):
        """The text that this id completes; never half a character."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self):
        """The rest: U+FFFD where the ids ended inside a character. The decoder is then as new."""
        return self._decoder.decode(b"", True)


# == 5  token files: NAME.bin and NAME.bin.json ====================================================================

FORMAT_VERSION = 1


def write_tokens(documents, tokenizer, path, progress=None, processes=None):
    """Write each document's ids and END's id as raw little-endian integers, and beside it what they are, as JSON.

    Returns what it wrote there. Calls progress(bytes of text done). On all cores by default, in this process where
    the text is small or processes is 1; the bytes written are the same.
    """
    path, dtype = os.fspath(path), _dtype(tokenizer)
    info = {"format_version": FORMAT_VERSION, "dtype": dtype.name, "vocab_size": tokenizer.vocab_size}
    info |= {"tokenizer_hash": tokenizer.hash, "tokens": 0, "stories": 0, "bytes": 0}
    with _aside(path) as file:
        for ids, stories, size in _encoded(documents, tokenizer, processes):
            file.write(ids)
            info["tokens"] += len(ids) // dtype.itemsize
            info["stories"] += stories
            info["bytes"] += size
            if progress:
                progress(info["bytes"])
        if not info["stories"]:
            raise ValueError("no stories to encode; expected at least one")
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + ".json")  # never the description of an older file beside this one
    with _aside(path + ".json") as file:
        file.write(json.dumps(info, indent=1).encode() + b"\n")
    return info


def read_tokens(path, tokenizer=None):
    """A token file -> (ids, mapped read-only, what its JSON says). ValueError where the two do not belong together,
    or where it was written with another tokenizer."""
    path = os.fspath(path)
    try:
        info = json.loads(Path(path + ".json").read_bytes())
        version = info["format_version"]
    except FileNotFoundError:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist") from None
        raise ValueError(f"{path}.json is missing, which says what {path} holds; encode the text again") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}.json does not describe a token file; encode the text again") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}; expected {FORMAT_VERSION}; encode the text again")
    if tokenizer and info.get("tokenizer_hash") != tokenizer.hash:
        got, want = str(info.get("tokenizer_hash"))[:12], tokenizer.hash[:12]
        raise ValueError(f"{path} was written with tokenizer {got}, this one is {want}; encode the text again")
    if info.get("dtype") not in ("uint16", "uint32") or not all(
        isinstance(info.get(key), int) and info[key] > 0 for key in ("vocab_size", "tokens", "stories", "bytes")
    ):
        raise ValueError(f"{path}.json does not describe a token file; encode the text again")
    dtype = np.dtype(info["dtype"]).newbyteorder("<")
    size = os.path.getsize(path)
    if size != info["tokens"] * dtype.itemsize:
        want = info["tokens"] * dtype.itemsize
        raise ValueError(f"{path} has {size} bytes; expected {want} ({info['tokens']} tokens); encode the text again")
    ids = np.memmap(path, dtype, "r")
    if (most := int(ids.max())) >= info["vocab_size"]:
        raise ValueError(f"{path} has id {most}; expected below {info['vocab_size']}; encode the text again")
    return ids, info


def _dtype(tokenizer):
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _encoded(documents, tokenizer, processes=None):
    """Yield (ids as raw bytes, stories, bytes of text) for one batch of documents after the other, in order."""
    batches = _batches(documents)
    first = list(islice(batches, 8))  # starting processes takes as long as encoding some of these here
    if processes is None:
        processes = _cores() if len(first) == 8 else 1
    if processes == 1:
        yield from (_encode_batch(batch, tokenizer) for batch in chain(first, batches))
        return
    # spawn, because fork does not exist everywhere; an executor, because it notices a process that dies
    with ProcessPoolExecutor(
        min(processes, 61), multiprocessing.get_context("spawn"), _start_process, (tokenizer.to_json(),)
    ) as pool:
        waiting = deque()
        for batch in chain(first, batches):
            waiting.append(pool.submit(_encode_batch, batch))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(documents, size=1 << 20):
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_process(tokenizer_json):
    global _process_tokenizer  # of a process that _encoded started, nowhere else
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    _process_tokenizer = Tokenizer.from_json(tokenizer_json)


def _encode_batch(batch, tokenizer=None):
    tokenizer = tokenizer or _process_tokenizer
    ids, size = [], 0
    for document in batch:
        ids += tokenizer.encode(document)
        ids.append(tokenizer.end)
        size += len(document.encode() if isinstance(document, str) else document)
    return np.array(ids, _dtype(tokenizer)).tobytes(), len(batch), size


def _check_out(path):
    """Raise OSError before the work is done, rather than after, where a file cannot be written."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; make it before writing {path}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file to write")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable; choose another place for {path}")


@contextlib.contextmanager
def _aside(path):
    """A binary file that takes the name path only when it is whole and on the disk."""
    _check_out(path)
    aside = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise


# == 6  command line ===============================================================================================


class _Bar:
    """Shows progress on stderr where that is a terminal; with it closes, the line is empty again."""

    def __init__(self, what, total):
        self.what, self.total, self.next = what, max(total, 1), time.monotonic() + 0.2

    def __call__(self, done):
        if sys.stderr.isatty() and time.monotonic() >= self.next:
            self.next = time.monotonic() + 0.1
            share = min(done / self.total, 1)
            print(f"\r{self.what} [{'#' * int(30 * share):30}] {share:4.0%}", end="", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if sys.stderr.isatty():
            print("\r" + " " * (len(self.what) + 40), end="\r", file=sys.stderr, flush=True)


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
        merges = train(documents(args.files, reading), args.vocab_size - least, merging)
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
        info = write_tokens(documents(args.files), tokenizer, args.out, bar)
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
        for ids, more_stories, more_bytes in _encoded(documents(args.files), tokenizer):
            uses += np.bincount(np.frombuffer(ids, _dtype(tokenizer)), minlength=len(uses))
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


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def _parser():
    parser = _Parser(prog="bpe.py", description="Byte-level BPE: train a tokenizer, encode stories, decode them again.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|encode|decode|stats")
    text = "text file with stories that end in " + END + ", .jsonl file with a field `text`, or a folder of them"

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
    sys.exit(main())
