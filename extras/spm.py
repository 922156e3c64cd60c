"""Tokenizers of SentencePiece: its .model file, of BPE type.

    python bpe.py explain accomplishment --tokenizer tokenizer.model

The file is a protobuf message: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
Those models are read whose text is not changed before it is split: the identity normaliser, a space put before the
text, bytes for characters without a piece. Anything else is refused by its name. Read in order: 1 protobuf, 2 models.
"""

import struct

import regex

from extras.formats import BLANK_MARK, LONGEST, from_scores

# == 1  protobuf =======================================================================================================

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # kinds of values


def fields_of(data):
    """The fields of a message, [(number, value)]: numbers of varints, bytes of the others. ValueError if it is cut."""
    if not isinstance(data, bytes):
        raise ValueError("a damaged .model file: a number where a message is expected")
    found, at = [], 0
    while at < len(data):
        tag, at = varint(data, at)
        kind, size = tag & 7, {FIXED64: 8, FIXED32: 4}.get(tag & 7, 0)
        if kind == VARINT:
            value, at = varint(data, at)
        elif kind in (FIXED64, BYTES, FIXED32):
            size, at = varint(data, at) if kind == BYTES else (size, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"a damaged .model file: a field of kind {kind}")
        if at > len(data):
            raise ValueError("a damaged .model file: it is cut short")
        found.append((tag >> 3, value))
    return found


def varint(data, at):
    """The number that begins at a byte, 7 bits in each byte, the lowest first -> (number, where it ends)."""
    value = 0
    for place in range(10):
        if at + place >= len(data):
            break
        value |= (data[at + place] & 127) << 7 * place
        if data[at + place] < 128:
            return value, at + place + 1
    raise ValueError("a damaged .model file: it is cut short")


# == 2  the model ======================================================================================================

PIECES, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5  # fields of the message
KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user-defined", 5: "unused", 6: "byte"}
TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
EXPECTED = {  # of the trainer and of the normaliser: field -> (name, value where it is absent, the one that is read)
    TRAINER: {24: ("treat_whitespace_as_suffix", 0, 0), 35: ("byte_fallback", 0, 1)},
    NORMALIZER: {
        3: ("add_dummy_prefix", 1, 1),
        4: ("remove_extra_whitespaces", 1, 0),
        5: ("escape_whitespaces", 1, 1),
    },
}
START = regex.compile(rb"(?s)\n(.)\n(.)")  # a piece of up to 127 bytes, in it its string


def is_model(data):
    """True for a file that begins as a .model does: a piece, its string, its score."""
    match = START.match(data)
    return bool(match) and match[2] < match[1] and data[4 + match[2][0] :][:1] == b"\x15"


def from_model(data):
    """The tokenizer of a .model file; ValueError for one that would give other ids here."""
    message = fields_of(data)
    parts = {
        number: dict(fields_of(value)) for number, value in message if number in (TRAINER, NORMALIZER, DENORMALIZER)
    }
    if (kind := parts.get(TRAINER, {}).get(3, 1)) != 2:
        raise ValueError(f"model_type is {TYPES.get(kind, kind)!s:.40}; expected bpe")
    for part, name in ((NORMALIZER, "normalizer"), (DENORMALIZER, "denormalizer")):
        if parts.get(part, {}).get(2):  # precompiled_charsmap
            given = parts[part].get(1, b"")
            given = given.decode("utf-8", "replace") if isinstance(given, bytes) else given
            raise ValueError(f"the {name} is {given!r:.40}, which has rules; expected identity")
    for part, expected in EXPECTED.items():
        for number, (name, default, known) in expected.items():
            if (value := parts.get(part, {}).get(number, default)) != known:
                raise ValueError(f"{name} is {str(bool(value)).lower()}; expected {str(bool(known)).lower()}")
    return from_pieces([read_piece(value) for number, value in message if number == PIECES])


def read_piece(data):
    """(string, score, kind) of a piece."""
    try:
        found = dict(fields_of(data))
        string, (score,) = found[1].decode(), struct.unpack("<f", found.get(2, bytes(4)))
    except (KeyError, UnicodeDecodeError, AttributeError, TypeError, struct.error):
        raise ValueError("a damaged .model file: a piece without a string or with a wrong score") from None
    if len(string.encode()) > LONGEST:  # finding the merges that make it takes size^2
        raise ValueError(f"piece {string!r:.40} has {len(string.encode()):,} bytes; expected at most {LONGEST}")
    return string, score, KINDS.get(found.get(3, 1))


def from_pieces(pieces):
    """[(string, score, kind)], in the order of ids -> the tokenizer."""
    if odd := [piece for piece in pieces if piece[2] not in ("normal", "unknown", "control", "byte")]:
        raise ValueError(f"piece {odd[0][0]!r:.40} is {odd[0][2]}; expected normal, control and byte pieces alone")
    of_byte = {string: i for i, (string, _, kind) in enumerate(pieces) if kind == "byte"}
    names = [f"<0x{b:02X}>" for b in range(256)]
    if missing := [name for name in names if name not in of_byte]:
        raise ValueError(f"the vocabulary has no byte {missing[0]}; expected <0x00> to <0xFF>")
    specials = {string: i for i, (string, _, kind) in enumerate(pieces) if kind in ("unknown", "control")}
    vocab = [string.encode() if i in specials.values() else text_of(string) for i, (string, _, _) in enumerate(pieces)]
    byte_ids = [of_byte[name] for name in names]
    for b, i in enumerate(byte_ids):
        vocab[i] = bytes([b])
    return from_scores(vocab, [score for _, score, _ in pieces], specials, byte_ids)


def text_of(string):
    """The bytes of text that a piece stands for."""
    return string.replace(BLANK_MARK, " ").encode()
