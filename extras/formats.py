"""Tokenizers of other systems: files of Hugging Face, GPT-2, tiktoken, llama2.c, and calls that only some others have.

    python bpe.py train stories.txt --vocab-size 4096 --out vocab.json          # and merges.txt beside it
    python bpe.py explain accomplishment --tokenizer stories260K/tok512.bin

bpe.py finds this file for a tokenizer that is not a tokenizer.json that it wrote itself. Section 1 has tokenizers of
other kinds, 2 reads tokenizer.json of others, 3 vocab.json with merges.txt, 4 rank files of tiktoken, 5 tokenizer.bin
of llama2.c; 6 chooses one of them, or the .model of spm.py. Byte-level tokenizers are those of GPT-2's split pattern
and of GPT-4's. Section 7 has calls of Tokenizer that need no file: special tokens that are an error, a text in chunks.
"""

import base64
import codecs
import json
import struct
from itertools import chain

import regex

from bpe import BYTE, CHARACTER, CUT_BYTES, END, PATTERN, Tokenizer, as_pieces, bytes_of, merge_ids, utf8
from extras.documents import whole

# == 1  tokenizers of other kinds: SentencePiece's, as llama2.c has them; GPT-4's split pattern ========================

BOS, UNKNOWN, EOS = "<s>", "<unk>", "</s>"  # llama2.c puts <s> between stories
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


class SpacedTokenizer(Tokenizer):
    """A text is given a space to begin with, merges join characters and go across words, and a character without an id
    is its bytes, whose ids are byte_ids. With ranks, one for each merge, those of one rank are one: leftmost first."""

    ending = BOS

    def __init__(self, vocab, merges, specials, byte_ids, ranks=None):
        super().__init__(vocab, merges, specials, byte_ids)
        self.tied = ranks is not None
        # A token has one rank however it is made, or the leftmost of two merges would not be the first.
        ranks = ranks or range(len(self.merges))
        pairs = {(self._ids[a], self._ids[b]): (rank, self._ids[a + b]) for rank, (a, b) in zip(ranks, self.merges)}
        first = {new: rank for rank, new in reversed(pairs.values())}
        self._ranks = {pair: (first[new], new) for pair, (_, new) in pairs.items()}
        # Merges do not cross the beginning of a word unless a token does.
        crossing = any(regex.search(rb"[^ ] ", token) for token in self._ids)
        self._split = regex.compile(r"(?s).+" if crossing else r" *[^ ]+| +")
        if crossing:  # a whole text is hardly seen again
            self._cached_ids = self.word_ids

    def pretokens(self, text):
        return self._split.findall(" " + text if text else text)

    def first_ids(self, word):
        ids = []
        for character in word:
            token = character.encode("utf-8", "surrogateescape")
            known = self._ids.get(token)
            ids += [known] if known else [self._byte_ids[b] for b in token]
        return ids

    def compiled(self, size):
        """None: fast/words.py knows no other pre-tokens than those of PATTERN."""

    def encode_documents(self, documents, threads=None):
        """A text cannot be cut, so that pieces are joined."""
        return super().encode_documents(whole(as_pieces(documents)), threads)

    def decode_bytes(self, ids, previous=None):
        """Ids -> bytes, without the space that a text is given to begin with: `previous` is the id before them, None at
        the beginning."""
        ids, first = list(ids), {None, *self.specials.values()}
        super().decode_bytes(ids)  # refuses an unknown id
        pairs = zip([previous, *ids], ids)
        return b"".join([self.vocab[i].removeprefix(b" " if before in first else b"") for before, i in pairs])

    def byte_lengths(self):
        """Bytes of text in each token, (V,): the end of a story takes back the space that its beginning was given."""
        lengths = super().byte_lengths()
        lengths[self.end] = -1
        return lengths

    def strings(self):
        names = {i: name for name, i in self.specials.items()}
        names |= {i: f"<0x{b:02X}>" for b, i in enumerate(self._byte_ids)}
        return [names[i] if i in names else self.string(token) for i, token in enumerate(self.vocab)]

    def string(self, token):
        return token.decode("utf-8", "surrogateescape").replace(" ", BLANK_MARK)

    def to_json(self):
        if self.tied:
            raise ValueError("a tokenizer.json cannot hold merges of one rank, which tokenizer.bin of llama2.c has")
        if cut := [token for token in self._ids if not token.decode("utf-8", "ignore").encode() == token]:
            raise ValueError(f"a tokenizer.json cannot hold token {cut[0]!r:.60}: it has a part of a character")
        data = json.loads(super().to_json()) | SPACED
        data["model"] |= {"unk_token": UNKNOWN, "fuse_unk": True, "byte_fallback": True}
        return json.dumps(data, ensure_ascii=False, indent=0) + "\n"


# GPT-4's cl100k_base: at most three digits; letters with one sign before them; signs with the line ends behind them.
# tiktoken's keeps white space at the end of a text whole; in files of Hugging Face a part ends with the last line.
PARTS = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
CL100K = rf"""'(?i:[sdmt]|ll|ve|re)|{PARTS}|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s"""
CL100K_JSON = rf"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|{PARTS}|\s*[\r\n]+|\s+(?!\S)|\s+"""


class PatternTokenizer(Tokenizer):
    """A byte-level tokenizer whose texts another pattern than GPT-2's splits."""

    def __init__(self, vocab, merges, specials, pattern):
        super().__init__(vocab, merges, specials)
        self.pattern, self.pretokens = pattern, regex.compile(pattern).findall

    def compiled(self, size):
        """None: fast/words.py knows no other pre-tokens than those of PATTERN."""

    def encode_documents(self, documents, threads=None):
        """A pre-token may go across a cut, so that pieces are joined."""
        return super().encode_documents(whole(as_pieces(documents)), threads)

    def to_json(self):
        data = json.loads(super().to_json())
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        plain = data["pre_tokenizer"] | {"use_regex": False}
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, plain]}
        return json.dumps(data, ensure_ascii=False, indent=0) + "\n"


def with_pattern(vocab, merges, specials, pattern):
    """A byte-level tokenizer; `pattern` None is GPT-2's."""
    return PatternTokenizer(vocab, merges, specials, pattern) if pattern else Tokenizer(vocab, merges, specials)


# == 2  tokenizer.json of Hugging Face `tokenizers` ====================================================================

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


DIGITS = regex.compile(r"[0-9]{1,18}")


def from_json(text):
    """The tokenizer of a tokenizer.json; ValueError where it is none, or would need what this file does not do."""
    try:
        data = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise ValueError(f"not a tokenizer: expected {EXPECTED}") from None
    if not setting(data, "model.vocab"):
        raise ValueError("not a tokenizer: the JSON has no model with a vocabulary")
    spaced = setting(data, "model.byte_fallback") is True
    if pattern := pattern_in(data.get("pre_tokenizer")):
        data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False}  # as GPT-2's, but for the pattern
    for name, neutral in (NEUTRAL_SPACED if spaced else NEUTRAL_PLAIN).items():
        if (value := setting(data, name)) not in neutral:
            kind = "byte-level BPE with GPT-2's split pattern, and that of llama2.c, are read"
            raise ValueError(f"{name} is {value!r:.60}; expected {json.dumps(neutral[0])}: only {kind}")
    try:
        strings, added = read_ids(data["model"]["vocab"]), data.get("added_tokens") or []
        specials = read_ids({token["content"]: token["id"] for token in added})
        for flag in ("single_word", "lstrip", "rstrip"):
            if any(token.get(flag) for token in added):
                raise ValueError(f"a special token has {flag} set; expected false: only plain matches are read")
        if any(strings.get(name, i) != i for name, i in specials.items()):
            raise ValueError("a special token has two ids")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"]["merges"]]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a damaged tokenizer.json: a merge is not a pair")
        strings = sort_strings({**strings, **specials})
        if not spaced:
            return byte_level(strings, pairs, specials, pattern)
        if missing := {f"<0x{b:02X}>" for b in range(256)} - {*strings}:
            raise ValueError(f"the vocabulary has no {min(missing)}; expected <0x00> to <0xFF>")
        byte_ids = [strings.index(f"<0x{b:02X}>") for b in range(256)]
        vocab = [name.replace(BLANK_MARK, " ").encode() for name in strings]
        for b, i in enumerate(byte_ids):
            vocab[i] = bytes([b])
        merges = [tuple(name.replace(BLANK_MARK, " ").encode() for name in pair) for pair in pairs]
        return SpacedTokenizer(vocab, merges, specials, byte_ids)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a damaged tokenizer.json: {type(error).__name__} {error!s:.80}") from None


def pattern_in(pre_tokenizer):
    """CL100K or CL100K_JSON if a tokenizer.json splits texts by it, else None."""
    parts = setting(pre_tokenizer, "pretokenizers")
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, dict) for part in parts):
        return None
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    for pattern in (CL100K, CL100K_JSON):
        for behaviour, invert in (("Isolated", False), ("Removed", True)):  # each a part; what is between parts goes
            expected = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behaviour, "invert": invert}
            if parts[0] == expected and parts[1] | {"trim_offsets": True} == byte_level:
                return pattern


def byte_level(strings, pairs, specials, pattern=None):
    vocab = [s.encode() if s in specials else token_of(s) for s in strings]
    return with_pattern(vocab, [(token_of(left), token_of(right)) for left, right in pairs], specials, pattern)


def read_ids(ids):
    """{string: id, as a number or in digits} -> {string: number}."""
    for string, i in ids.items():
        if type(string) is not str or not (type(i) is int or (type(i) is str and DIGITS.fullmatch(i))):
            raise ValueError(f"token {string!r:.60} has id {i!r:.60}; expected a string and a whole number")
    return {string: int(i) for string, i in ids.items()}


def sort_strings(ids):
    """{string: id} -> the strings, in the order of their ids."""
    strings = {i: string for string, i in ids.items()}
    if len(strings) < len(ids):
        raise ValueError("two tokens have the same id")
    gap = next((i for i in range(len(strings)) if i not in strings), None)
    if gap is not None:
        raise ValueError(f"the vocabulary has no token of id {gap}; expected 0 to {len(strings) - 1}")
    return [strings[i] for i in range(len(strings))]


def setting(data, dotted):
    """data["a"]["b"] for "a.b", None where it is absent."""
    for key in dotted.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


def token_of(string):
    try:
        return bytes([BYTE[character] for character in string])
    except KeyError as error:
        raise ValueError(f"token {string!r:.60} is not byte-level: it has {error.args[0]!r}") from None


# == 3  vocab.json and merges.txt of GPT-2 =============================================================================


def to_vocab_and_merges(tokenizer):
    """(the text of a vocab.json, that of a merges.txt)."""
    vocab = {name: i for i, name in enumerate(tokenizer.strings())}
    merges = "".join(f"{tokenizer.string(left)} {tokenizer.string(right)}\n" for left, right in tokenizer.merges)
    return json.dumps(vocab, ensure_ascii=False), "#version: 0.2\n" + merges


def from_vocab_and_merges(vocab, merges):
    """An entry that is neither a byte nor what a merge makes is a special token: the two files say no more of it.
    ValueError where another split pattern than GPT-2's made them."""
    try:
        vocab = read_ids(json.loads(vocab))
    except (json.JSONDecodeError, AttributeError, RecursionError) as error:
        raise ValueError(f"vocab.json is not an object of tokens and ids: {error!s:.80}") from None
    lines = [line.removesuffix("\r") for line in merges.split("\n")]
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if odd := [" ".join(pair) for pair in pairs if len(pair) != 2]:
        raise ValueError(f"merges.txt has a line {odd[0]!r:.60}; expected two tokens")
    made = {*CHARACTER, *(left + right for left, right in pairs)}
    pattern = find_pattern([token_of(left + right) for left, right in pairs])
    return byte_level(sort_strings(vocab), pairs, {name: i for name, i in vocab.items() if name not in made}, pattern)


# A token that merges made inside a pre-token: a part of a run is a run itself; parts of 'll, 've and 're are not.
MADE_BY_PATTERN = regex.compile(rf"{PATTERN}|'[lvr]")
SPLIT_CL100K = regex.compile(CL100K)


def find_pattern(tokens):
    """None if GPT-2's pattern cuts none of these tokens, in bytes; CL100K if that one does not. ValueError if both cut
    one: merges of another pattern made them.

    Rank files, and vocab.json with merges.txt, do not name their pattern. gpt2, r50k_base and p50k_base have GPT-2's.
    """
    if not (cut := first_cut(tokens, MADE_BY_PATTERN.fullmatch)):
        return None
    if not first_cut(tokens, lambda text: SPLIT_CL100K.match(text).end() == len(text)):
        return CL100K
    cut = f"token {cut!r:.60} is cut by GPT-2's split pattern, and others by GPT-4's, so the file is of another"
    raise ValueError(f"{cut}; take a vocabulary of one of these patterns, or train one: python bpe.py train")


def first_cut(tokens, is_whole):
    """The first of the tokens that are text for which `is_whole` is false; None if there is none."""
    for token in tokens:
        try:
            text = token.decode()
        except UnicodeDecodeError:  # part of a character
            continue
        if not is_whole(text):
            return text


# == 4  rank files of tiktoken: a line "base64 id" for each token ======================================================


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
    vocab = sort_strings(ids)
    pattern = find_pattern(vocab)
    byte_ids = {token[0]: i for i, token in enumerate(vocab) if len(token) == 1}
    ranks, merges = {}, []
    for i, token in enumerate(vocab):
        if len(token) > 1:
            parts = merge_ids([byte_ids[b] for b in token], ranks) if byte_ids.keys() >= set(token) else ()
            if len(parts) != 2:
                raise ValueError(f"{token!r:.60} is not made of two tokens of lower rank: no merge gives it")
            ranks[parts] = (i, i)
            merges.append((vocab[parts[0]], vocab[parts[1]]))
    return with_pattern([*vocab, END.encode()], merges, {END: len(vocab)}, pattern)


# == 5  tokenizer.bin of llama2.c ======================================================================================


LONGEST = 512  # bytes of a token


def from_llama2c(data):
    """int32 longest token, then of each token float32 score, int32 bytes, bytes. 0 is unknown, 1 ends a story, 3 to 258
    are bytes. Any two tokens may be joined to a third, the highest score first; of equals the leftmost."""
    tokens, scores, at = [], [], 4
    while at + 8 <= len(data):
        score, size = struct.unpack_from("<fi", data, at)
        if size > LONGEST:  # finding the merges that make it takes size^2
            raise ValueError(f"a tokenizer.bin with a token of {size:,} bytes; expected at most {LONGEST}")
        tokens.append(data[at + 8 : at + 8 + max(size, 0)])
        scores.append(score)
        at += 8 + max(size, 0)
    if at != len(data) or len(tokens) < 259 or tokens[3:259] != [b"<0x%02X>" % b for b in range(256)]:
        raise ValueError("a damaged tokenizer.bin: expected scores and tokens, 3 to 258 of them <0x00> to <0xFF>")
    specials = {UNKNOWN: 0, BOS: 1, EOS: 2}
    vocab = [*(name.encode() for name in specials), *(bytes([b]) for b in range(256)), *tokens[259:]]
    return from_scores(vocab, scores, specials, range(3, 259))


def from_scores(vocab, scores, specials, byte_ids):
    """The tokenizer in which any two tokens may be joined to a third, that of the highest score first."""
    apart = {*specials.values(), *byte_ids}
    ids = {token: i for i, token in enumerate(vocab) if i not in apart}
    made = {
        token: [(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in ids and token[k:] in ids]
        for token in ids
    }
    made = {token: pairs for token, pairs in made.items() if pairs}
    merges = list(chain.from_iterable(made[token] for token in sorted(made, key=lambda token: -scores[ids[token]])))
    of_score = {score: rank for rank, score in enumerate(sorted({scores[ids[token]] for token in made}, reverse=True))}
    ranks = [of_score[scores[ids[a + b]]] for a, b in merges] if len(of_score) < len(made) else None
    return SpacedTokenizer(vocab, merges, specials, byte_ids, ranks)


# == 6  which of them ==================================================================================================

EXPECTED = "tokenizer.json, vocab.json beside merges.txt, a rank file of tiktoken, tokenizer.bin of llama2.c"
EXPECTED += ", or a .model of SentencePiece"


VOCAB = regex.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*(?:[0-9]|"[0-9]+")')  # an object, first in it a number
RANKS = regex.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


def read(path, data):
    """The tokenizer in the content of a file, which says of which format it is; ValueError where it is none."""
    data = data.removeprefix(codecs.BOM_UTF8)
    other = None
    if VOCAB.match(data):
        other = beside(path, "vocab.json", "merges.txt")
    elif path.name.endswith("merges.txt"):
        other = beside(path, "merges.txt", "vocab.json")
    if other:
        texts = [utf8(codecs.decode, x, p.name, "utf-8-sig") for p, x in ((path, data), (other, other.read_bytes()))]
        return from_vocab_and_merges(*(texts if other.name.endswith("merges.txt") else texts[::-1]))
    if RANKS.match(data):
        return from_ranks(data)
    if len(data) > 12 and 0 < struct.unpack_from("<i", data)[0] < 1 << 16 and data[12:17] == b"<unk>":
        return from_llama2c(data)
    from extras import spm

    if spm.is_model(data):
        return spm.from_model(data)
    return from_json(data.decode("utf-8", "replace"))


def to_files(tokenizer, path):
    """(path, content) of each file: ranks where the name ends in .tiktoken, else vocab.json and merges.txt beside it.
    ValueError where they would not give the same tokenizer again."""
    if path.name.endswith(".tiktoken"):
        ranks = to_ranks(tokenizer)
        check_same(tokenizer, path, from_ranks, ranks)
        return [(path, ranks)]
    files = to_vocab_and_merges(tokenizer)
    check_same(tokenizer, path, from_vocab_and_merges, *files)
    paths = path, beside(path, "vocab.json", "merges.txt")
    return [(name, text.encode()) for name, text in zip(paths, files)]


def beside(path, name, other):
    """The path of merges.txt for that of vocab.json, of gpt2-merges.txt for gpt2-vocab.json."""
    if not path.name.endswith(name):
        raise ValueError(f"not a tokenizer: a vocabulary without merges; expected a {name} beside its {other}")
    return path.with_name(path.name.removesuffix(name) + other)


def check_same(tokenizer, path, read, *data):
    """ValueError that says what is lost where `data` does not give the same tokenizer again."""
    lost = None
    if isinstance(tokenizer, SpacedTokenizer):
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


# == 7  calls that only some others have ===============================================================================

LAST_CUT_BYTES = regex.compile(b"(?r)" + CUT_BYTES.pattern)


def refuse_specials(tokenizer, text, allowed, disallowed, place=0):
    """ValueError if the text has a special token that is disallowed and not allowed, as in tiktoken. Return the number
    of characters up to the end of the text, `place` of them before it."""
    allowed = tokenizer.special_names("allowed_special", allowed)
    disallowed = tokenizer.special_names("disallowed_special", disallowed)
    names = {tokenizer.specials[name]: name for name in allowed | disallowed}
    for plain, special in tokenizer.segments(text, allowed | disallowed):
        name, place = names.get(special, ""), place + len(plain.decode("utf-8", "surrogateescape"))
        if name in disallowed - allowed:
            use = "name it in allowed_special to have its id, leave it out of disallowed_special to have it as text"
            raise ValueError(f"text has the special token {name} at position {place}; {use}")
        place += len(name)
    return place


def encode_chunks(tokenizer, chunks, allowed, disallowed):
    """Yield the ids of tokenizer.encode("".join(chunks)): at white space, those of all before it, now certain; at the
    end if they may change still, or one of the special tokens to look for has white space inside."""
    allowed = tokenizer.special_names("allowed_special", allowed)
    disallowed = tokenizer.special_names("disallowed_special", disallowed)
    waits = isinstance(tokenizer, (SpacedTokenizer, PatternTokenizer)) or any(
        regex.search(r"\s", name) for name in allowed | disallowed
    )
    held, place = bytearray(), 0

    def encode(text):
        nonlocal place
        place = refuse_specials(tokenizer, text, allowed, disallowed, place) if disallowed else place
        return tokenizer.encode(text, allowed)

    for chunk in chunks:
        seen = len(held)
        held += bytes_of(chunk)
        if not waits and (cut := LAST_CUT_BYTES.search(held, max(0, seen - 4))):
            yield from encode(held[: cut.start()])
            del held[: cut.start()]
    yield from encode(held)
