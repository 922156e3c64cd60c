"""Text, token files or nothing -> the tokenizer and the token files that train.py trains on.

    python train.py --data stories.txt more.jsonl --val-data valid.txt

Text is encoded once and kept in data/tokens, under a key of what it depends on; a run that goes on finds its tokens as
they were. train.py finds this file when it is there; alone, it encodes a text anew for each run.
"""

import hashlib
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np

import bpe
import train
from extras import plan, warmup

TOKENIZER_BYTES = 1 << 26  # of text that a tokenizer is trained on, at most


def prepare_data(args, draft, cfg, steps, tokenizer=None):
    """`train.Data` of what the command line names, with `tokenizer` if there is one already; `draft`: the settings so
    far. Compiles kernels meanwhile. ValueError or OSError if something is missing, no text, too short, or of another
    tokenizer."""
    if args.tokenizer and args.vocab_size:
        raise ValueError("--tokenizer brings its own vocabulary; leave out --vocab-size")
    compilers = warmup.compile_ahead(cfg, draft.kernels)
    vocab_size = args.vocab_size or cfg.vocab_size
    key = (args.tokenizer, vocab_size) if tokenizer is None else (None, tokenizer.hash)
    if tokenizer is None and args.tokenizer:
        tokenizer = bpe.Tokenizer.load(args.tokenizer)
    sources, valid_sources, name = args.data, args.val_data or [], " ".join(args.data or ())
    if not sources:
        sources, valid_sources, name = find_stories(args, cfg, draft.batch_size, steps)
    folder = Path("data", "tokens", cache_key(sources, *key))
    if tokenizer is None:
        if are_token_files(sources):
            raise ValueError("--data names a token file; say which tokenizer made it with --tokenizer FILE")
        tokenizer = find_tokenizer(sources, folder, vocab_size, must_fit=args.vocab_size is not None)
    files = [encode(sources, tokenizer, folder / "train.bin"), []]
    if valid_sources:
        key = cache_key(valid_sources, None, tokenizer.hash)
        files[1] = encode(valid_sources, tokenizer, folder / f"valid-{key}.bin")
    data = read_data(tokenizer, files, name)
    check_rows(files, cfg.seq_len)
    for process in compilers:
        process.wait()
    return data


def find_stories(args, cfg, batch_size, steps):
    """Training and validation files, and their name, where the command line names no data."""
    from extras import stories  # which takes a while to import, for the network

    if steps:
        tokens = steps * batch_size * cfg.seq_len
    else:  # as many as fit the time at 60% of the machine's peak: fewer are read
        seconds = 60 * (args.minutes or 5) if not args.epochs else 300
        tokens = 0.6 * seconds * plan.measure_peak() / plan.flops_per_token(cfg)
    size = 2**24 * math.ceil(4.2 * tokens / 2**24)  # some 4 bytes a token; in steps, so that it seldom changes
    source = stories.get(Path("data"), size)
    return [str(source.train)], [str(source.valid)], source.name


def find_tokenizer(sources, folder, vocab_size, must_fit):
    """The tokenizer of these texts, kept in `folder`: vocab_size entries, or fewer where the text gives fewer and that
    need not be an error."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = bpe.Tokenizer.load(path)
    except (OSError, ValueError):
        with bpe.Progress("learning the tokenizer", min(total_bytes(sources), TOKENIZER_BYTES)) as progress:
            pieces = first_bytes(bpe.pieces(sources, progress), TOKENIZER_BYTES)
            tokenizer = train.train_tokenizer(pieces, vocab_size)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    if tokenizer.vocab_size < vocab_size:
        line = f"the text gives {tokenizer.vocab_size} tokens, fewer than {vocab_size}"
        if must_fit:
            raise ValueError(f"--vocab-size {vocab_size}: {line}; try --vocab-size {tokenizer.vocab_size}")
        bpe.note(f"{line}: the vocabulary has {tokenizer.vocab_size}")
    return tokenizer


def first_bytes(pieces, limit):
    """Pieces of text -> the first, as bytes, until there are `limit` bytes or more."""
    while limit > 0 and (piece := next(pieces, None)):
        text = bpe.bytes_of(piece[0])
        limit -= len(text)
        yield text, piece[1]


def total_bytes(sources):
    return sum(path.stat().st_size for path in bpe.text_files(sources))


def are_token_files(paths):
    """True if all are token files. ValueError for a mixture with text."""
    bins = [str(path).endswith(".bin") for path in paths]
    if any(bins) and not all(bins):
        text = paths[bins.index(False)]
        raise ValueError(f"{text} is text beside token files; encode it first: python bpe.py encode")
    return all(bins)


def encode(sources, tokenizer, path):
    """The token files of these sources: themselves, or one made of their text if it is not there or not whole."""
    if are_token_files(sources):
        return [str(source) for source in sources]
    try:
        bpe.read_tokens(path, tokenizer)
    except (OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with bpe.Progress("encoding", total_bytes(sources)) as progress:
            bpe.write_tokens(bpe.pieces(sources, progress), tokenizer, path)
    return [str(path)]


def cache_key(sources, tokenizer_path, detail):
    """A name for what is made of these files: changes when one of them does."""
    parts = [bpe.PATTERN, bpe.LAYOUTS, train.RESERVED, detail]
    for path in [*bpe.text_files(sources), *([Path(tokenizer_path)] if tokenizer_path else [])]:
        parts += [str(path.resolve()), *file_state(path)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


CTIME_IS_CREATION = os.name == "nt"


def file_state(path):
    """[size, mtime, ctime]: equal only if the file has not been written or replaced in between.

    cp -p, tar and rsync restore mtime, but nothing can set ctime, the time of the last change to the inode. Windows has
    the time of creation in its place: there it is the CRC-32 of the content.
    """
    status = os.stat(path)
    changed = zlib.crc32(Path(path).read_bytes()) if CTIME_IS_CREATION else status.st_ctime_ns
    return [status.st_size, status.st_mtime_ns, changed]


def read_data(tokenizer, files, name, checksums=None):
    """`train.Data` of token files. ValueError or OSError if one is missing, damaged, of another tokenizer, or no longer
    has its checksum."""
    checksums = dict(checksums or {})
    parts = [[read_known(path, tokenizer, checksums) for path in paths] for paths in files]
    training, valid = (part[0] if len(part) == 1 else part and np.concatenate(part) for part in parts)
    masks, metadata = [read_masks(paths, checksums) for paths in files], {}
    for info in map(read_info, files[0]):
        metadata |= {key: info[key] for key in KEPT if type(info.get(key)) is str}
    if not files[1] and masks[0] is not None:
        T = mask_info(files[0][0])["row"]
        cut = len(training) - T * max(1, round(train.HELD_OUT * len(training) / T))  # between two rows
        training, valid, masks = training[:cut], training[cut:], (masks[0][:cut], masks[0][cut:])
    elif not files[1]:
        training, valid = hold_out(training, tokenizer.end)
    return train.Data(tokenizer, training, valid, name, files, checksums, tuple(masks), metadata)


KEPT = ("chat_template",)  # of what the description of a token file says, in every checkpoint


def read_info(path):
    """The description of a token file that `bpe.read_tokens` has accepted."""
    return json.loads(Path(f"{path}.json").read_bytes())


def mask_info(path):
    """{"row": T, "crc32": ...} of a token file with a mask, else None. ValueError if its JSON says something else."""
    info = read_info(path).get("mask")
    if info is not None and not (isinstance(info, dict) and type(info.get("row")) is int and 0 < info["row"] < 2**31):
        raise ValueError(f"{path}.json does not describe a mask; make both files again")
    return info


def read_masks(paths, checksums):
    """The masks of these token files as one, (M,) bool; None if they have none. Updates `checksums`, as `read_known`.

    NAME.bin.mask has a byte for each token, 1 where it counts as a target, else 0. NAME.bin.json describes it:
    {"mask": {"row": T, "crc32": ...}}; each row of T tokens, an example, has a target that counts. ValueError for a
    mask that is damaged, has changed, or is missing beside some of the files.
    """
    infos = [mask_info(path) for path in paths]
    if not any(infos):
        return None
    parts = []
    for path, info in zip(paths, infos):
        if not info or not infos[0] or info["row"] != infos[0]["row"]:
            raise ValueError(f"{path} and {paths[0]} differ in their masks or rows; train on files of one kind")
        name, T, count = f"{path}.mask", info["row"], len(bpe.read_tokens(path, check=False)[0])
        mask = np.fromfile(name, np.uint8)
        crc32 = f"{zlib.crc32(mask):08x}"
        if len(mask) != count or crc32 != info.get("crc32") or crc32 != checksums.setdefault(name, [crc32])[0]:
            raise ValueError(f"{name} is damaged or has changed since the run began; make both files again")
        if count % T or (mask > 1).any() or not mask.reshape(-1, T).any(1).all():
            raise ValueError(f"{name}: expected rows of T={T}, each of 0 and 1 with a 1; make both files again")
        parts.append(mask > 0)
    return np.concatenate(parts)


def check_rows(files, T):
    """ValueError if the rows of token files with a mask are not as long as the windows of the run, T."""
    for path in [*files[0], *files[1]]:
        if (mask := mask_info(path)) and mask["row"] != T:
            found = f"{path} has rows of {mask['row']} tokens, the run has windows of T={T}"
            raise ValueError(f"{found}; give --seq-len {mask['row']}, or make the file for T={T}")


LEAST_HELD_OUT, MOST_HELD_OUT = 0.01, 0.05  # shares of the text, beside train.HELD_OUT


def hold_out(tokens, end):
    """tokens (M,) -> (training, validation): the last 2% of the stories if they are 1% to 5% of the tokens. Otherwise
    cut where the story nearest to 98% of the tokens ends, within these limits; inside a story if none ends there."""
    stops = np.flatnonzero(tokens == end) + 1  # of each story, the token after it
    M, held = len(tokens), len(tokens) - stops  # tokens that a cut there holds out
    fair = np.flatnonzero((LEAST_HELD_OUT * M <= held) & (held <= MOST_HELD_OUT * M))
    usual = len(stops) - 1 - max(1, round(train.HELD_OUT * len(stops)))
    cut = round((1 - train.HELD_OUT) * M)
    if len(fair):
        cut = stops[usual if usual in fair else fair[np.abs(held[fair] - train.HELD_OUT * M).argmin()]]
    return tokens[:cut], tokens[cut:]


def read_known(path, tokenizer, checksums):
    """The ids of a token file, (M,). Updates `checksums`, those of `train.Data`: path -> [crc32, file_state of it,
    file_state of its JSON]. The content is read only if a state has changed. ValueError if it no longer has its crc32.
    """
    expected, *seen = checksums.get(path, [None])
    state = [file_state(name) for name in (path, f"{path}.json") if os.path.exists(name)]
    ids, info = bpe.read_tokens(path, tokenizer, check=state != seen)
    if expected not in (None, info["crc32"]):
        found = f"its checksum is {info['crc32']!r}, expected {expected!r:.20}"
        raise ValueError(f"{path} has changed since the run began: {found}; restore it or start another run")
    checksums[path] = [info["crc32"], *state]
    return ids
