"""Where stories come from: TinyStories by download, or stories generated here when there is no network.

    python stories.py --show 3 --seed 0          prints three generated stories
    python stories.py --download 50 --out data   fetches the first 50 MB of TinyStories into data/

Read section 1 for what a caller gets, section 2 for the download; then 3 (how a story is drawn), 4 (the words) and 5
(the plots). To add a plot, add an entry to PLOTS: its name, its tables and its text. TinyStories: Eldan & Li 2023,
arXiv:2305.07759, CDLA-Sharing-1.0. Everything in sections 4 and 5 was written for this file.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import http.client
import json
import math
import os
import queue
import random
import re
import shutil
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import bpe
import tinygpt

END = bpe.END
MIB = 1 << 20


# == 1  what a caller gets ============================================================================================


class Source(NamedTuple):
    train: Path
    valid: Path
    name: str  # which stories these are, for the log and the checkpoint


def get(folder: str | Path, num_bytes: int) -> Source:
    """Stories in `folder`, at least `num_bytes` to train on where there is that much.

    What lies there already, else TinyStories by download, else generated stories; a download that fails says why in one
    line on stderr. HF_HUB_OFFLINE=1 never downloads, HF_ENDPOINT replaces the address of Hugging Face.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = TRAIN
    try:
        train = fetch(TRAIN, folder, num_bytes)
        file = VALID
        valid = fetch(VALID, folder, VALID.size)
    except (DownloadError, OSError) as error:
        print(
            f"stories: no TinyStories: {error} ({file.url()}); a copy can be put at {folder / file.name}; "
            "going on with generated stories",
            file=sys.stderr,
        )
        return write_generated(folder, num_bytes)
    whole = train.name == TRAIN.name
    return Source(train, valid, "TinyStoriesV2" if whole else f"TinyStoriesV2 (first {mib(size(train))} MiB)")


def write_generated(folder: str | Path, num_bytes: int, seed: int = 0) -> Source:
    """Generated stories as files in the layout of TinyStories; files of this generator that are long enough stay."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = min(num_bytes, GENERATED_MOST)
    source = Source(folder / "generated-train.txt", folder / "generated-valid.txt", f"generated stories, seed {seed}")
    note = folder / "generated.json"
    made = {"generator": generator_version(), "seed": seed}

    def sizes():
        return [size(source.train), size(source.valid)]

    def fits():
        try:
            return json.loads(note.read_bytes()) == {**made, "bytes": sizes()} and size(source.train) >= num_bytes
        except (OSError, ValueError):
            return False

    if fits():
        return source
    with alone(source.train):
        if not fits():  # else another process has made them meanwhile
            note.unlink(missing_ok=True)  # until both files are in place again nothing vouches for them
            tinygpt.write_aside(source.train, chunks(seed, "train", num_bytes))
            tinygpt.write_aside(source.valid, chunks(seed, "valid", VALID_BYTES))
            tinygpt.write_aside(note, [json.dumps({**made, "bytes": sizes()}).encode()])
    return source


def chunks(seed: int, split: str, least: int) -> Iterator[bytes]:
    """A file of a split, story by story, each once: at least `least` bytes."""
    written, seen = 0, set()
    for story in generate(seed, split):
        if (key := digest(story)) not in seen:
            seen.add(key)
            chunk = f"{story}\n{END}\n".encode()
            written += len(chunk)
            yield chunk
        if written >= least:
            return


@contextlib.contextmanager
def alone(path: Path):
    """Only one process at a time makes files in the folder of `path`. The others say so once and wait; the lock ends
    with its process, however that ends."""
    with open(path.with_name("stories.lock"), "ab") as file:
        try:
            waits = False
            while not tinygpt.lock_file(file):
                if not waits:
                    print(f"stories: another process is making {path}; waiting for it ...", file=sys.stderr)
                waits = True
                time.sleep(0.1)
        except OSError as error:  # some network file systems have no locks
            line = f"stories: {path.parent} cannot be locked ({error.strerror}): start no second download there"
            print(line, file=sys.stderr)
        yield


GENERATED_MOST = 200 * MIB  # a small grammar has nothing new to say after that
VALID_BYTES = 400_000


# == 2  the download ==================================================================================================

CONNECT_SECONDS = 5  # for one address of the server
OPEN_SECONDS = 12  # names, connections, redirections and the first byte together
STALL_SECONDS = 15  # without a byte
RETRIES = 2  # after a connection that was cut, each PAUSE_SECONDS later
PAUSE_SECONDS = 1
MARGIN = 1 << 16  # a part is cut at its last whole story; no story is as long as this


class Remote(NamedTuple):
    name: str
    size: int
    sha256: str

    def url(self):
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/datasets/roneneldan/TinyStories/resolve/main/{self.name}"


TRAIN = Remote(
    "TinyStoriesV2-GPT4-train.txt", 2_227_753_162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"
)
VALID = Remote(
    "TinyStoriesV2-GPT4-valid.txt", 22_502_601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"
)


class DownloadError(Exception):
    """Says in plain words why there is no file."""


class Cut(DownloadError):
    """The connection broke off: what came is kept, and asking for the rest may help."""


# NAME.part is a download under way and belongs to the process that holds the lock. What is handed out is NAME, the
# whole file, or NAME.first-BYTES, which ends with a story: neither changes any more, so that a run may read it while
# another fetches more. Beside a part and a beginning stands a note: how many bytes were received, and their CRC-32.


def fetch(remote: Remote, folder: Path, num_bytes: int) -> Path:
    """The file, whole or a beginning of at least `num_bytes` that ends with a story; from `folder` or the network."""
    path = present(remote, folder, num_bytes)
    if path is None:
        with alone(folder / remote.name):
            path = present(remote, folder, num_bytes) or download(remote, folder, num_bytes)
    return path


def present(remote: Remote, folder: Path, num_bytes: int) -> Path | None:
    """The file, or the shortest beginning with num_bytes, if one lies there and is as it was received."""
    if (path := folder / remote.name).exists():
        return path
    for first in beginnings(remote, folder):
        if size(first) >= num_bytes and received(first)[0] == size(first):
            return first
    return None


def beginnings(remote: Remote, folder: Path) -> list[Path]:
    """The beginnings of the file that lie in `folder`, the shortest first."""
    found = [path for path in folder.iterdir() if re.fullmatch(re.escape(remote.name) + r"\.first-\d+", path.name)]
    return sorted(found, key=size)


def note_of(path: Path) -> Path:
    return path.with_name(path.name + ".crc32")


def noted(have: int, crc: int) -> bytes:
    return f"{have:>15} {crc:08x}\n".encode()  # of one length: a part's note is written over


def received(path: Path) -> tuple[int, int]:
    """(bytes that were received, their CRC-32) as its note has them; (0, 0) if the file does not begin with them."""
    try:
        have, crc = note_of(path).read_bytes().split()
        have, crc = int(have), int(crc, 16)
        if size(path) >= have and checksum(path, have) == crc:
            return have, crc
    except (OSError, ValueError):
        pass
    return 0, 0


def checksum(path: Path, num_bytes: int) -> int:
    """CRC-32 of the first num_bytes."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(min(MIB, num_bytes)):
            crc, num_bytes = zlib.crc32(block, crc), num_bytes - len(block)
    return crc


def download(remote: Remote, folder: Path, num_bytes: int) -> Path:
    """As `fetch`, for the one process that holds the lock: completes the part as far as needed and hands it out."""
    path, part = folder / remote.name, folder / (remote.name + ".part")
    have, crc = received(part)
    if have != remote.size and not (num_bytes <= have < remote.size and end_of_last_story(part, have) >= num_bytes):
        have = complete(remote, part, have, crc, num_bytes)
    if have < remote.size:
        return hand_out(remote, part, end_of_last_story(part, have))
    sha256 = hashlib.sha256()
    with open(part, "r+b") as file:
        os.fsync(file.fileno())
        while block := file.read(MIB):
            sha256.update(block)
    if sha256.hexdigest() != remote.sha256:
        for wrong in [part, *beginnings(remote, folder)]:  # they are what it began with
            discard(wrong)
        raise DownloadError(f"wrong contents: its sha256 is {sha256.hexdigest()[:12]}..., not {remote.sha256[:12]}...")
    os.replace(part, path)
    note_of(part).unlink()
    remove_old(remote, folder)
    return path


def complete(remote: Remote, part: Path, have: int, crc: int, num_bytes: int) -> int:
    """Appends to the first `have` bytes of `part`, whose CRC-32 is `crc`, until num_bytes remain when it is cut at its
    last story. Returns the number of bytes before that cut."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise DownloadError("HF_HUB_OFFLINE is set")
    target = min(remote.size, mib(num_bytes + MARGIN, math.ceil) * MIB)
    missing, free = target - size(part), shutil.disk_usage(part.parent).free
    if free < missing:
        raise DownloadError(f"the disk is full: {mib(missing)} MiB are needed and {mib(free)} MiB are free")
    if have > remote.size:
        have, crc = 0, 0  # of another file
    for first in reversed(beginnings(remote, part.parent)):
        if size(first) > have and received(first)[0] == size(first):
            shutil.copyfile(first, part)
            note_of(part).write_bytes(note_of(first).read_bytes())
            have, crc = received(part)
            break
    tries = 0
    while have < target:
        before, cut = have, None
        try:
            receive(remote, part, have, crc, target)
        except Cut as error:
            tries, cut = tries + 1, error
        have, crc = received(part)
        if cut and (tries > RETRIES or have <= before):  # a connection that brought nothing is not asked again
            raise cut
        if cut:
            time.sleep(PAUSE_SECONDS)
        elif have < target:
            raise DownloadError(f"{part} is not what was written to it: another process or the disk has changed it")
    return have


def hand_out(remote: Remote, part: Path, keep: int) -> Path:
    """The first `keep` bytes of the part under the name of a beginning. The order is one that may end anywhere."""
    first, crc = part.with_name(f"{remote.name}.first-{keep}"), checksum(part, keep)
    tinygpt.write_aside(note_of(first), [noted(keep, crc)])
    tinygpt.write_aside(note_of(part), [noted(keep, crc)])
    os.truncate(part, keep)
    os.replace(part, first)
    note_of(part).unlink()
    remove_old(remote, part.parent, first)
    return first


def remove_old(remote: Remote, folder: Path, but: Path | None = None) -> None:
    """Removes beginnings that something longer has replaced, unless they are of today: a run may be reading them."""
    for first in beginnings(remote, folder):
        if first != but and time.time() - first.stat().st_mtime > 86_400:
            with contextlib.suppress(OSError):
                discard(first)


def discard(path: Path) -> None:
    """Removes a part or a beginning, and its note."""
    path.unlink(missing_ok=True)
    note_of(path).unlink(missing_ok=True)


def receive(remote: Remote, part: Path, have: int, crc: int, target: int) -> None:
    """Appends bytes [have, target) of the file to the first `have` of `part`, whose CRC-32 is `crc`, and keeps the
    note. Starts over where the server does not take ranges."""
    ranged = have > 0 or target < remote.size
    with connect(remote.url(), {"Range": f"bytes={have}-{target - 1}"} if ranged else {}) as response:
        if response.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not found or int(found[1]) != have:
                raise DownloadError("the server sent another range than was asked for")
            total = int(found[2])
        else:
            have, crc, total = 0, 0, response.headers.get("Content-Length")
        if (coded := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise DownloadError(f"the server sent the file encoded as {coded}, which was not asked for")
        first = read(response, min(MIB, target - have))
        page = first.lstrip()[:9].lower().startswith((b"<!doctype", b"<html"))
        if page or "html" in response.headers.get("Content-Type", ""):
            raise DownloadError("a web page came instead of the file; a login page or a filter may be in between")
        if not str(total).isdecimal():
            raise DownloadError("the server does not say how large the file is")
        if int(total) != remote.size:
            raise DownloadError(f"wrong size: the server has {int(total):,} bytes, not {remote.size:,}")
        bar = Bar(remote.name, have, target)
        try:
            mode = "r+b" if have else "wb"
            with open(part, mode) as file, open(note_of(part), mode) as note:
                file.truncate(have)  # what came after the note was written is not known to be right
                file.seek(have)
                block = first
                while block:
                    if os.fstat(file.fileno()).st_size != have:
                        raise DownloadError(f"another process writes {part}; try again when it has ended")
                    file.write(block)
                    file.flush()
                    have, crc = have + len(block), zlib.crc32(block, crc)
                    note.seek(0)
                    note.write(noted(have, crc))
                    note.flush()
                    bar.show(have)
                    block = read(response, min(MIB, target - have))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DownloadError(
                "the disk is full" if full else f"{part} cannot be written: {error.strerror}"
            ) from error
        finally:
            bar.close()
    if have < target:
        raise Cut(f"the connection was cut after {have:,} of {target:,} bytes; the next call goes on from there")


def read(response, size: int) -> bytes:
    """Up to `size` bytes, as they come; none at the end."""
    try:
        return response.read1(size) if size else b""
    except TimeoutError as error:
        raise Cut(f"the server sent nothing for {STALL_SECONDS} s; what came is kept, to go on from there") from error
    except http.client.IncompleteRead as error:
        return error.partial
    except (OSError, http.client.HTTPException) as error:
        raise Cut(f"the connection was cut ({error or type(error).__name__}); what came is kept") from error


def connect(url: str, headers: dict[str, str]):
    """The opened response. A thread opens it: looking up a name has no time-out of its own."""
    answer: queue.Queue = queue.Queue()

    def work():
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "stories.py", **headers})
            answer.put(urllib.request.build_opener(Http, Https).open(request, timeout=CONNECT_SECONDS))
        except Exception as error:  # handed to the caller's thread, which names it
            answer.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        response = answer.get(timeout=OPEN_SECONDS)
    except queue.Empty:
        raise DownloadError(f"no answer within {OPEN_SECONDS} s") from None
    if isinstance(response, Exception):
        raise DownloadError(reason(response)) from response
    return response


def patient(connection):
    """The same connection class, with the longer time-out once it is connected."""

    class Patient(connection):
        def connect(self):
            super().connect()
            self.sock.settimeout(STALL_SECONDS)

    return Patient


class Http(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(patient(http.client.HTTPConnection), request)


class Https(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(patient(http.client.HTTPSConnection), request)


def reason(error: Exception) -> str:
    """Why a connection failed, in plain words."""
    if isinstance(error, urllib.error.HTTPError):
        return " ".join(f"the server answered {error.code} {error.reason}".split())
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, socket.gaierror):
        return "the name of the server cannot be resolved; there may be no network"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not trusted: {error.verify_message}"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused"
    if isinstance(error, TimeoutError):
        return f"no connection within {CONNECT_SECONDS} s"
    return " ".join(f"the connection failed: {error or type(error).__name__}".split())


def end_of_last_story(part: Path, have: int) -> int:
    """Where the last whole story of the first `have` bytes ends, from where a later download goes on."""
    marker = END.encode()
    with open(part, "rb") as file:
        file.seek(start := max(0, have - MARGIN))
        tail = file.read(have - start)
    return start + tail.rfind(marker) + len(marker) if marker in tail else have


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def mib(num_bytes: int, rounding=round) -> int:
    return rounding(num_bytes / MIB)


class Bar:
    """A bar on stderr where that is a terminal, else a line every ten seconds."""

    def __init__(self, name, have, total):
        self.name, self.begin, self.total = name, have, total
        self.terminal = sys.stderr.isatty()
        self.start = self.last = time.monotonic()
        self.drawn = False

    def show(self, have):
        now = time.monotonic()
        if now - self.last < (0.1 if self.terminal else 10) and not (self.terminal and have == self.total):
            return
        self.last, self.drawn = now, True
        rate = max(have - self.begin, 1) / max(now - self.start, 1e-9)
        left = round((self.total - have) / rate)
        text = (
            f"{have / 1e6:.1f} of {self.total / 1e6:.1f} MB | {rate / 1e6:.1f} MB/s | {left // 60}:{left % 60:02} left"
        )
        if self.terminal:
            filled = 24 * have // self.total
            print(f"\r{self.name} [{'#' * filled}{'.' * (24 - filled)}] {text}  ", end="", file=sys.stderr, flush=True)
        else:
            print(f"{self.name}: {text}", file=sys.stderr)

    def close(self):
        if self.terminal and self.drawn:
            print(file=sys.stderr)


# == 3  how a story is drawn ==========================================================================================
#
# A text of sections 4 and 5 is written so:   [one|another|]   one of these, chosen anew at each place (nested at will)
#                                             <rule>           the text of that name in RULES, chosen likewise
#                                             {word}           from the cast or from the row drawn of each table
#                                             {Word}           the same, with a capital
# A row of a table and a paragraph of a plot begin with a dash. "an" is never written: "a" becomes it where a vowel
# follows.


def generate(seed: int, split: str = "train") -> Iterator[str]:
    """Stories without end, the same for the same seed. No story is in both splits: a hash of its text decides."""
    if split not in ("train", "valid"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'valid'")
    random_ = random.Random(f"{seed} {split}").random
    plots = list(compiled().values())
    while True:
        story = tell(random_, *pick(random_, plots))
        if is_valid(story) == (split == "valid"):
            yield story


def is_valid(story: str) -> bool:
    return digest(story)[0] % 8 == 0


def digest(story: str) -> bytes:
    return hashlib.blake2b(story.encode(), digest_size=8).digest()


def generator_version() -> str:
    """Changes when a word or a plot does."""
    return hashlib.blake2b(repr((CAST, RULES, PLOTS)).encode(), digest_size=8).hexdigest()


class Plot(NamedTuple):
    tables: tuple  # one row of each is drawn
    text: str
    animals: bool = True  # may the hero be an animal?


class Words(dict):
    """The words of one story; {Word} is made from {word}."""

    def __missing__(self, key):
        if not key[0].isupper():
            raise KeyError(key)
        word = self[key[0].lower() + key[1:]].format_map(self)
        self[key] = word = word[0].upper() + word[1:]
        return word


def table(columns: str, rows: str) -> list[dict[str, str]]:
    """Rows as dictionaries, column -> cell; a bar stands between the cells of a row."""
    names = columns.split()
    return [dict(zip(names, row.split(" | "), strict=True)) for row in items(rows)]


def items(text: str) -> list[str]:
    """The rows of a table, the paragraphs of a plot: each begins with a dash and may go on over several lines."""
    return [" ".join(item.split()) for item in re.split(r"^ *- ", text, flags=re.MULTILINE)[1:]]


def parse(text: str) -> list:
    """A text as a list of strings and choices; a choice is a tuple of such lists."""
    stack = [[[]]]  # for each open bracket its alternatives so far
    for token in re.split(r"([\[\]|]|<[^>]*>)", text):
        if token == "[":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        elif token == "]":
            choice = tuple(stack.pop())
            stack[-1][-1].append(choice)
        elif token.startswith("<"):
            stack[-1][-1] += parse(RULES[token[1:-1]])
        elif token:
            stack[-1][-1].append(token)
    ((parts,),) = stack  # fails here: a bracket is open, or a bar stands outside of brackets
    return parts


@functools.cache
def compiled() -> dict[str, tuple[Plot, list]]:
    """Plots with their text parsed."""
    return {name: (plot, parse("\n".join(items(plot.text)))) for name, plot in PLOTS.items()}


def tell(random_, plot: Plot, parts: list) -> str:
    """One story of this plot."""
    words = cast(random_, plot.animals)
    for rows in plot.tables:
        words.update(pick(random_, rows))
    chosen: list[str] = []
    choose(random_, parts, chosen)
    story = "".join(chosen)
    while "{" in story:  # a cell may hold words, too
        story = story.format_map(words)
    while "  " in story:  # around choices of nothing
        story = story.replace("  ", " ")
    story = story.replace(" \n", "\n").replace("\n ", "\n").strip()
    if random_() < 0.1:
        story = story.replace("\n", " ")
    return ARTICLE.sub(" an ", story)


def choose(random_, parts: list, chosen: list[str]) -> None:
    for part in parts:
        if type(part) is str:
            chosen.append(part)
        else:
            choose(random_, pick(random_, part), chosen)


# not before "one-eyed", "unicorn", "useful"; a literal beginning makes the search ten times as fast as \b does
ARTICLE = re.compile(r" a (?=[aei]|o(?!ne\b|nce\b)|u(?!ni|s))")


def cast(random_, animals: bool) -> Words:
    """Hero, friend, parent and helper with pronouns that agree: {he him his himself}, the friend's {fhe fhim fhis}, the
    parent's {phe phim phis}, the helper's {hhe hhim hhis}. The helper {hname} is either the parent or the friend.
    {newfriend} and {helper} are for the first mention, {friend}, {Parent} and {hname} for later ones."""
    animal = animals and random_() < 0.25
    name, kind, sex = hero = somebody(random_, animal)
    friend, friend_kind, friend_sex = somebody(random_, animal, hero)
    parent, parent_sex = pick(random_, CAST["parents"])
    words = Words(name=name, kind=kind, parent=parent, friend=friend, small=pick(random_, CAST["small"]))
    words["newfriend"] = f"{friend} the {friend_kind}" if animal else friend
    words["home"] = pick(random_, CAST["animal homes" if animal else "homes"])
    words["hobby"] = pick(random_, CAST["animal hobbies" if animal else "hobbies"])
    if random_() < 0.5:
        helper_sex, words["helper"], words["hname"] = parent_sex, "{his} {parent}", "{Parent}"
    else:
        helper_sex, words["helper"], words["hname"] = friend_sex, "{his} friend {newfriend}", "{friend}"
    for prefix, whose in (("", sex), ("f", friend_sex), ("p", parent_sex), ("h", helper_sex)):
        words.update(zip((prefix + word for word in PRONOUNS["he"]), PRONOUNS[whose], strict=True))
    return words


def somebody(random_, animal: bool, other: tuple | None = None) -> tuple[str, str, str]:
    """Name, kind and pronoun of a child or an animal; a second animal is of another kind, and names differ."""
    while True:
        sex = pick(random_, ("she", "he"))
        name = pick(random_, CAST[f"{sex} animal" if animal else sex])
        kind = pick(random_, CAST["animals"]) if animal else {"she": "girl", "he": "boy"}[sex]
        if other is None or (name != other[0] and not (animal and kind == other[1])):
            return name, kind, sex


def pick(random_, rows):
    return rows[int(random_() * len(rows))]


# == 4  the words =====================================================================================================

PRONOUNS = {"he": ("he", "him", "his", "himself"), "she": ("she", "her", "her", "herself")}

CAST = {
    "she": (
        "Lily, Lily, Lily, Lily, Mia, Mia, Anna, Anna, Sue, Lucy, Emma, Sara, Amy, Zoe, Ella, Rosie, Nora, "
        "Ruby, Molly, Jane, Kate, Hana, Maya, Tara, Polly, Ida, Leila"
    ).split(", "),
    "he": (
        "Tim, Tim, Tim, Ben, Ben, Tom, Tom, Max, Max, Sam, Leo, Jack, Finn, Noah, Omar, Luke, Theo, Joe, "
        "Billy, Adam, Owen, Ravi, Hugo, Peter, Danny, Nick, Eli"
    ).split(", "),
    "she animal": "Hazel, Clover, Willow, Fern, Poppy, Dot, Pearl, Tansy, Bella, Daisy".split(", "),
    "he animal": "Pip, Biscuit, Bramble, Toffee, Button, Chip, Rusty, Barley, Bobby, Fuzz".split(", "),
    "animals": (
        "rabbit, bear, fox, squirrel, mouse, duck, cat, dog, hedgehog, frog, badger, mole, beaver, otter, pig, lamb"
    ).split(", "),
    "parents": [("mom", "she"), ("mom", "she"), ("dad", "he"), ("dad", "he"), ("grandma", "she"), ("grandpa", "he")],
    "small": "little, little, little, little, little, young, cheerful, curious, lively".split(", "),
    "homes": (
        "a small town, a yellow house on a hill, a house by the sea, a village near the woods, a busy city, a "
        "tall house with a red door, a little house next to a park, a cottage with a crooked chimney"
    ).split(", "),
    "animal homes": (
        "a green valley, a quiet wood, a sunny meadow, the middle of a big forest, a mossy garden, the reeds "
        "beside a lake"
    ).split(", "),
    "hobbies": (
        "sing songs, paint pictures, run in the grass, look at picture books, dance in the kitchen, build "
        "tall towers, play outside, hop on one foot, count the stars, collect smooth stones, tell jokes, make "
        "up games, feed the ducks, water the flowers, listen to stories, play with {his} friends"
    ).split(", "),
    "animal hobbies": (
        "run in the tall grass, roll down the hill, splash in puddles, listen to the wind, sing songs, "
        "collect smooth stones, nap in the sun, chase falling leaves, play with {his} friends, tell jokes"
    ).split(", "),
}

RULES = {
    "opening": "[Once upon a time, there was|Once upon a time, there was|Once upon a time, there was|There once was]"
    " a {small} {kind} named {name}. [{He} lived in {home}.|{He} and {his} {parent} lived in {home}."
    "|{He} loved to {hobby}.|{He} liked to {hobby}.|]"
    "|Once upon a time, in {home}, there lived a {small} {kind} [named|called] {name}. [{He} loved to {hobby}.|]"
    "|{name} was a {small} {kind} who [loved|liked] to {hobby}.",
    "day": "One day|One day|One day|One day|One morning|One afternoon|One Saturday",
    "sad": "sad|very sad|so sad|upset|unhappy",
    "happy": "happy|very happy|so happy|full of joy|very glad",
    "smiled": "smiled|nodded|smiled a big smile|nodded and smiled",
    "kindly": "kindly|gently|softly|in a warm voice",
    "hug": "gave {him} a [big|warm|long] hug",
    "thanks": "Thank you|Thank you so much|Oh, thank you",
    "close": "|||The end.",
    "bed": "That night, {name} [fell asleep with a smile|went to bed tired and happy|lay in bed and smiled].",
}
RULES = {name: f"[{text}]" for name, text in RULES.items()}

TOYS = table(
    "toy look use",
    """
    - teddy bear | soft brown    | hugged it at bedtime
    - ball       | big red       | bounced it up and down the path
    - doll       | small rag     | sang to it and brushed its hair
    - car        | shiny blue    | raced it around the room
    - train      | green wooden  | pulled it along on a string
    - drum       | little tin    | played a marching song on it
    - blanket    | fluffy yellow | wrapped it around {his} shoulders like a cape
    - scarf      | warm striped  | wore it from breakfast to bedtime
    - hat        | funny purple  | wore it with a feather on top
    - whistle    | bright orange | played a little tune on it
    - book       | old animal    | looked at all the pictures in it
    - boat       | tiny white    | sailed it in the bathtub
    - horse      | brown wooden  | made it gallop over the cushions
    - bell       | small golden  | rang it to say good morning
    - puppet     | silly green   | made it talk in a squeaky voice
    - yo-yo      | round pink    | practiced a new trick with it
    """,
)
SPOTS = table(
    "spot why",
    """
    - under the bed                | It had slipped down while {he} was asleep.
    - behind the sofa              | It had fallen down when {he} was jumping on the cushions.
    - in the laundry basket        | {He} had dropped it in by mistake, together with the towels.
    - under a pile of leaves       | {He} had put it down there to look at a beetle.
    - at the bottom of the toy box | It had been there all along, under the blocks.
    - behind the flower pots       | {He} had put it down there to smell the roses.
    - next to the bread basket     | {He} had put it down there when {he} ate {his} toast.
    - under the apple tree         | {He} had left it there when it was time for lunch.
    - in {his} backpack            | {He} had packed it for a walk and forgotten all about it.
    - on the window sill           | {He} had put it there to look at the moon.
    """,
)
FOUND = table(
    "thing look where owner oname ohe ohim ohis need thanks",
    """
    - key | shiny silver | under a bench | Mrs. Bell, who worked in the library | Mrs. Bell | she | her | her |
      Without it I cannot open the library | let {name} be the first to choose a book
    - ring | thin gold | in the grass | Mrs. Park, who lived next door | Mrs. Park | she | her | her | My husband gave
      it to me long ago | picked the best flowers in her garden for {name}
    - purse | small red | at the bus stop | Miss Green, the music teacher | Miss Green | she | her | her | All my bus
      money is in it | taught {name} a merry song
    - watch | old silver | next to the fountain | Mr. Reed, the baker | Mr. Reed | he | him | his | It tells me when
      the bread is done | gave {name} a warm bun with raisins
    - umbrella | striped | on the swings | Mr. Hill, who brought the mail | Mr. Hill | he | him | his | Without it all
      the letters get wet | let {name} ring the bell of his bicycle
    - whistle | bright yellow | near the pond | Mr. Stone, who trained the football team | Mr. Stone | he | him | his
      | I cannot start the game without it | let {name} blow it to start the game
    - hat | wide straw | on a fence post | Mr. Fields, the farmer | Mr. Fields | he | him | his | The sun is hot on my
      bald head | took {name} for a ride on his tractor
    - paintbrush | long thin | on the bridge | Miss Rose, the painter | Miss Rose | she | her | her | I paint all my
      little birds with it | painted a picture of {name} with a bluebird
    - notebook | small green | under an oak tree | Mrs. Lane, who wrote songs | Mrs. Lane | she | her | her | My
      newest song is in it | put the name {name} into the song
    - button | big blue | on the path | Captain Moss, who had a ship | Captain Moss | he | him | his | My coat has
      been open in the wind all day | told {name} about a whale as long as a street
    """,
)
FINDS = table(
    "thing look where guess wrong clue truth end",
    """
    - egg | speckled | in the grass | a very smooth stone | It was warm | There was a crack in the egg, and something
      went peep inside | It was the egg of a duck! The mother duck came and sat down on it | Soon five little ducks
      swam on the pond
    - key | rusty | in the garden | the key to the front door | It did not fit | {Parent} remembered the old chest in
      the attic | It was the key to the chest! Inside were costumes and a silver crown | They played king and queen
      until bedtime
    - bottle | green | by the water | an empty bottle | There was a roll of paper inside | The paper was covered with
      neat little words | It was a letter! A child on an island was looking for a friend | {name} wrote back and got a
      new friend far away
    - map | torn | in an old coat | a treasure map | There was no cross on it | There was a tiny picture of the pear
      tree | It was the map that {Parent} had made as a child! Under the pear tree was a tin full of marbles | They
      played marbles all evening
    - feather | long golden | on the stairs | the feather of a magic bird | There was ink on its tip | {Parent} began
      to laugh | It was an old pen! {Parent} showed {him} how to write with it | {name} wrote {his} name in curly
      letters
    - shell | white | in the sandbox | an empty shell | It had moved a little | Two tiny horns came out | It was the
      house of a snail! They put it on a leaf, and the snail began to eat | {name} came back each day to see how it
      was
    - box | heavy tin | under the stairs | a box full of gold | It went clack-clack | {Parent} turned a little handle
      on the side | It was a music box! It played a slow, sweet song | They danced around the room, hand in hand
    - glove | tiny red | in the snow | the glove of an elf | There was a name inside | {Parent} put on {phis} glasses
      and read the name | It belonged to the baby next door! They brought it back at once | The baby laughed and waved
      with the glove
    """,
)
TREATS = table(
    "treat look lost how back",
    """
    - apple    | shiny red    | pear     | cut it in two            | some nuts
    - cookie   | big round    | cracker  | broke it in two          | a plum
    - bun      | warm sweet   | roll     | pulled it in two         | some grapes
    - orange   | fat juicy    | banana   | split it into two halves | a carrot
    - muffin   | blueberry    | biscuit  | cut it in two            | some cherries
    - sandwich | cheese       | bagel    | tore it in two           | a peach
    - pancake  | golden       | waffle   | tore it in two           | some strawberries
    - pie      | little apple | tart     | cut it down the middle   | some jam toast
    - pretzel  | soft         | bagel    | broke it in two          | some raisins
    - melon    | small green  | cucumber | cut it in two            | a bunch of grapes
    """,
)
QUARRELS = table(
    "thing where claim idea together",
    """
    - red wagon | in the yard | ride in it | One of us can pull and one can ride | {name} pulled and {friend} rode,
      and then they changed places
    - swing | under the big tree | go first | One of us can push and one can fly | {name} pushed and {friend} flew up
      high, and then they changed places
    - drum | on the porch | play it | One of us can drum and one can dance | {name} drummed and {friend} danced, and
      then they changed places
    - big paintbrush | in a jar of water | paint with it | We can paint one picture together | {name} painted a yellow
      sun, and {friend} painted a silver moon beside it
    - empty box | behind the house | have it | It can be a ship for two | {name} was the captain, {friend} was the
      sailor, and the rug was the sea
    - jump rope | on a hook | jump with it | We can tie it to the fence and take turns | {name} turned the rope while
      {friend} jumped ten times, and then {name} jumped ten times, too
    - picture book | on the grass | turn the pages | We can sit side by side | {name} turned one page, and {friend}
      turned the next
    - shovel | in the sandbox | dig with it | One of us can dig and one can build | {name} dug a deep hole, and
      {friend} made a castle with the sand
    - toy crown | in an old chest | wear it | We can make one more, and then both of us have one | they made a second
      crown from leaves, and both of them ruled the garden
    - sled | at the top of the hill | sit in front | There is room for two if we sit close | they went down the hill
      together, laughing all the way
    - tent | on the lawn | choose the game | It can be a shop first and a cave later | {friend} sold pebbles in the
      shop, and {name} growled in the cave
    """,
)
BREAKS = table(
    "thing look accident broken mend after",
    """
    - vase | blue | {name} kicked a ball in the living room. The ball flew across the room and hit the {thing} | It
      lay on the floor in three pieces | they glued the pieces together, one by one | Only a thin line showed, like a
      little smile
    - cup | favorite | {name} danced around the table with a broom. The broom hit the {thing} | The handle had come
      off | they glued the handle back on and let it dry | It held hot tea just as well as before
    - birdhouse | painted | {name} threw a pine cone as high as {he} could. It came down on the {thing} | The roof had
      cracked and slid off | they nailed on a new roof | Two sparrows moved in that very week
    - scarf | long green | {name} put on the {thing} and ran around the house. It caught on a nail | There was a big
      hole in the middle | they sewed a patch over the hole, in the shape of a star | Everybody said that the star was
      the best part
    - book | old cooking | {name} turned the pages of the {thing} much too fast. There was a loud rip | A whole page
      had come out | they put the page back with clear tape | The pancakes on that page were as good as ever
    - flower pot | clay | {name} rode {his} scooter much too close to the {thing}. It fell over | It had cracked, and
      the earth was all over the path | they planted the flower in a new pot and watered it well | The next week, the
      flower had a new bud
    - lamp | reading | {name} had a pillow fight with the cat. A pillow knocked over the {thing} | The shade was bent
      | they bent the shade back and tied a ribbon around it | The ribbon made a soft pink light
    - picture frame | wooden | {name} was jumping on the bed so hard that the wall shook. Down came the {thing} | One
      corner had come apart | they put the corner together with a small nail | The picture hung straight again
    - garden chair | white | {name} stood on the back of the {thing} to reach a plum. There was a crack | One leg had
      come off | they screwed the leg on and painted it | Now the chair was stronger than before
    - kite | paper | {name} flew the {thing} too close to a tree. A branch poked right through it | There was a hole
      as big as a fist | they pasted a round piece of red paper over the hole | Now it looked like a kite with a red
      nose
    - snow globe | glass | {name} shook the {thing} as hard as {he} could. It slipped out of {his} hands | The glass
      was fine, but the little house inside had come loose | they opened the bottom and glued the house back | The
      snow fell on the little roof again
    """,
)
FEARS = table(
    "fear scene sign advice brave after",
    """
    - the dark | It was bedtime, and the light was off. A tall shape stood in the corner | {His} heart beat fast | Let
      us find out what it really is | held {hhis} hand and turned on the light. The tall shape was only a coat on a
      hook! {name} had to laugh | After that, {he} said good night to the coat every evening
    - thunder | In the evening, dark clouds came, and there was a loud boom | {He} hid under {his} blanket | Let us
      count from the flash to the boom. If the number grows, the storm is going away | came out and counted. First
      they got to three, then to six, then to ten. The storm was going away | From then on, {he} counted whenever
      there was a storm
    - deep water | There was a trip to the lake, and everybody jumped in | {He} stood at the edge and did not move |
      Just put in your toes first | put in {his} toes, and then {his} knees. Soon {he} was splashing about like a fish
      | {name} did not want to come out again until the sun went down
    - high slides | At the playground, there was a new slide, and it was as high as a house | {His} knees shook at the
      bottom of the ladder | Look only at the next step | climbed up one step, and then one more, until {he} was at
      the top. Then {he} let go. Whoosh | {name} went down the slide ten more times
    - the dog next door | On the way to the park, a huge dog barked at the fence | {He} hid behind {hhim} | Hold out
      your hand and let him smell it | held out {his} hand. The huge dog smelled it, wagged his tail, and licked every
      finger | After that, {he} stopped to pat the dog every day
    - the cellar | There was a strange scratching sound down in the cellar | {He} stopped at the top of the stairs |
      Let us take a lamp and go slowly | took the lamp and went down step by step. Behind a box sat a tiny mouse with
      a walnut. It was more afraid than {he} was | {name} left a bit of cheese on the bottom step
    - the dentist | It was time to go to the dentist | {He} held on to the chair with both hands | Close your eyes and
      think of your favorite song | opened {his} mouth and hummed in {his} head. Before the song was over, the dentist
      was done | {name} got a sticker with a smiling tooth on it
    - singing alone | There was a show in the town hall, and it was {his} turn to sing | No sound came out of {his}
      mouth | Look at me and sing only for me | looked at {hhim} and began to sing. The song grew louder and louder,
      and at the end everybody clapped | {name} sang the song all the way home
    - the long bridge | On a walk, they came to a bridge. It hung over the river and swung in the wind | {He} would
      not take one step | Hold the rope and look at the other side | held the rope and looked at the other side. Step
      by step, {he} walked across | On the way back, {he} was the first to cross
    - bees | There was a bee on the flower right next to {him} | {He} wanted to run away | Stand still and watch what
      it does | stood still and watched. The bee filled its little yellow pockets and flew off. It did not even look
      at {him} | In spring, {he} planted flowers just for the bees
    """,
)
STRAYS = table(
    "animal size trouble plan work thanks",
    """
    - bird | little brown | It had fallen out of its nest and could not fly yet | We need the ladder | {Parent} held
      the ladder, and {name} put the bird back into its nest | Every morning after that, the bird sang at {his} window
    - kitten | tiny gray | It had climbed up a tree and did not dare to come down | We need a basket and a rope | They
      pulled the basket up over a branch. The kitten jumped in, and they let it down | The kitten purred and rubbed
      its head on {his} leg
    - duckling | fluffy yellow | It had lost its mother | We must listen for its mother | They listened until they
      heard a quack behind the reeds. {name} carried the duckling there | The mother duck quacked loudly, and it
      sounded like a thank-you
    - hedgehog | small | It had rolled into a net and could not get out | We need the scissors | {Parent} cut the
      strings, one after the other, while {name} held the lamp | The hedgehog came back each evening to say hello
    - turtle | old green | It lay on its back and kicked its legs | We must turn it over gently | They turned the
      turtle over and carried it to the pond | The turtle looked back once and seemed to wink
    - puppy | thin white | It had a thorn in its paw | I will hold it, and you can pull out the thorn | {name} took a
      deep breath and pulled, and out came the thorn | The puppy wagged its tail so hard that it fell over
    - frog | round green | It sat at the bottom of a deep bucket and could not get out | We only have to tip the
      bucket | They tipped the bucket slowly, and the frog hopped out into the wet grass | That night, it sang its
      best song in the garden
    - lamb | white | Its wool was caught in the fence | We must open the wire a little | {Parent} bent the wire, and
      {name} pulled the wool free, bit by bit | The lamb jumped high into the air and ran to its mother
    - butterfly | blue | Its wings were wet, and it could not fly | It needs a dry place in the sun | {name} let it
      climb on a leaf and carried the leaf into the sun. They waited until the wings were dry | Then the butterfly
      danced around {his} head and flew away
    - owl | sleepy gray | It had flown into the barn and could not find the way out | We must open the big doors and
      be very quiet | They opened the doors wide and hid behind the hay. After a while, the owl flew out | At night
      they heard it call from the wood
    - seal | baby | It lay on the sand far away from the water | We must keep it wet and call for help | {Parent}
      called the seal doctor, and {name} poured water over its back until she came | When the seal was back in the
      waves, it lifted its nose and barked
    """,
)
LESSONS = table(
    "rule tempt deed result rescue lesson",
    """
    - Do not eat the cookies before dinner | The cookies smelled so sweet | {He} ate one cookie, and then one more,
      until the plate was empty | Soon {his} tummy hurt, and {he} could not eat {his} dinner at all | made {him} a cup
      of mint tea | one cookie after dinner is better than ten before it
    - Stay close to me at the market | There was a man with a dancing puppet | {He} followed the puppet around one
      corner and then around the next | When {he} looked up, {he} did not know where {he} was | came running and took
      {his} hand | it is easy to get lost and better to stay close
    - Wear your boots in the snow | {His} new shoes were so pretty | {He} hid the boots and ran outside in {his} new
      shoes | Soon the shoes were wet, and {his} toes were as cold as ice | put {his} feet into a tub of warm water |
      pretty shoes are for dry days
    - Do not pick the berries yet | They looked so round and fat | {He} picked a whole handful and put them all into
      {his} mouth | They were so sour that {his} eyes filled with tears | brought {him} a glass of cold water | good
      things need time to get ripe
    - Close the gate behind you | A butterfly was flying down the lane | {He} ran after it and left the gate wide open
      | When {he} came back, the hens were all over the garden, and the lettuce was gone | helped {him} catch the
      hens, one by one | a small thing like a gate can matter very much
    - Go to sleep now | The new book was so exciting | {He} read under the blanket until late at night | At the picnic
      the next day, {he} fell asleep and did not see the clowns at all | told {him} about all their tricks | a good
      night of sleep makes a good day
    - Put your blocks away | It was much more fun to start another game | {He} left the blocks all over the floor |
      Later, {he} stepped on one in the dark and fell down with a bump | put a cool cloth on {his} knee | it is good
      to put things away in time
    - Do not touch the wet paint | The red door looked so smooth and shiny | {He} put one finger on it, and then {his}
      whole hand | Now the door had a hand on it, and so did {his} best shirt | washed {his} hand and gave {him} a
      brush to paint the door again | it is wise to wait until paint is dry
    - Do not run with your ice cream | {He} wanted to show it to {his} friends at once | {He} ran across the square as
      fast as {he} could | {He} tripped, and the ice cream landed on a dog's head | dried {his} tears and wiped the
      dog clean | a slow walk can be the fastest way
    - Do not open the oven door | The bread inside was growing so nicely | {He} opened the door to have a look, just
      once | The bread sank down and was as flat as a plate | mixed new dough with {him} | some things grow best when
      nobody disturbs them
    """,
)
GIFTS = table(
    "gift need first then mishap save done",
    """
    - cake | flour, eggs and sugar | mixed the dough in a big bowl | baked it until it was golden | A corner of the
      cake broke off | covered the corner with strawberries | a cake with strawberries and one candle
    - card | paper, glue and crayons | folded the paper | drew a big heart on it | A drop of blue paint fell on the
      heart | turned the drop into a bluebird | a card with a heart and a bluebird
    - necklace | beads and a string | put the beads in a row | threaded them on the string | The string slipped, and
      the beads rolled everywhere | found every bead and tied a better knot | a necklace in all the colors of the
      rainbow
    - flower crown | daisies and long grass | picked the daisies | wove them together | The crown came out much too
      big | made it into two crowns | a crown of daisies, and a small one to match
    - vegetable soup | carrots, peas and a big pot | washed the carrots | stirred until the soup was thick | There was
      too much salt in it | put in two potatoes and some milk | a pot of soup that smelled wonderful
    - lantern | paper and a little light | cut stars out of the paper | glued the paper into a tube | The paper tore
      on one side | put a paper moon over the tear | a lantern that threw stars on the walls
    - bird feeder | wood, nails and seeds | sawed the wood | nailed the pieces together | One side was shorter than
      the other | made the roof slope, like on a real house | a bird feeder with a sloping roof
    - puppet show | old socks and buttons | sewed buttons on the socks for eyes | thought of a funny story | One
      puppet lost an eye | made the puppet into a brave pirate | a puppet show with a one-eyed pirate
    - song | a drum and a bell | found the right words | practiced it again and again | They forgot the last line |
      sang "la, la, la" in place of it | a song with a very merry end
    - pillow | cloth, wool and thread | cut the cloth | filled it with soft wool | One seam was not straight at all |
      sewed a green leaf over it | a soft pillow with a green leaf
    """,
)
PLANS = table(
    "plan pack weather instead play",
    """
    - have a picnic in the meadow | a basket of sandwiches | Big gray clouds had come, and it was raining | We can
      have the picnic on the floor | They spread the blanket on the floor, and the toys were the guests
    - fly a kite on the hill | the kite and a long string | There was no wind at all, and not one leaf moved | We can
      make our own wind | They ran around with paper streamers until everything fluttered
    - build a snowman | a carrot and an old hat | The sun had come out, and the snow had turned to mud | We can build
      one with pillows | They piled up three pillows and gave them a carrot nose and a hat
    - go to the beach | towels and a bucket | A storm was blowing in from the sea, and the waves were too high | We
      can make a beach right here | A blue sheet was the sea, and they caught paper fish with a spoon
    - sail a boat on the pond | the boat with the white sail | It had been so cold in the night that the pond was all
      ice | We can sail it in the tub | They filled the tub and blew into the sail until the boat flew along
    - sleep in a tent in the garden | the tent and a flashlight | The wind blew so hard that the tent would not stand
      | We can make a tent with chairs | They hung a blanket over four chairs and told stories inside
    - look at the stars | a warm blanket and some cocoa | A thick fog had come up, and it hid the whole sky | We can
      make our own stars | They poked holes into a box and put a lamp inside, and there were stars on every wall
    - pick apples | a ladder and two baskets | Hail was falling, as big as peas | We still have the apples from last
      week | They baked the apples with honey, and the whole house smelled sweet
    - play football in the park | the ball and a whistle | A snowstorm had come, and nobody could see as far as the
      gate | We can play with a balloon | They kicked a red balloon up and down the hall, and it was a tie
    - have a race around the lake | water and two caps | It was so hot that even the ducks stayed in the shade | We
      can have a slow race | They raced two snails along a cool wall, and the slower one got the prize
    """,
)
VISITS = table(
    "place going first second mishap mended gift",
    """
    - farm | to the farm | a mother pig with nine piglets | a cow with long eyelashes | A goat came up from behind and
      ate the ribbon on {his} hat | The farmer gave {him} a piece of string in place of the ribbon | a fresh brown egg
    - zoo | to the zoo | a giraffe with a purple tongue | a sleeping lion | A monkey reached through the bars and took
      {his} banana | The keeper laughed and gave {him} another one | a striped feather
    - beach | to the beach | a crab that walked sideways | a ship far away | A wave came and carried away one of {his}
      shoes | The next wave brought the shoe back, with a tiny fish in it, and they let the fish go | a pink shell
    - library | to the library | a shelf that went up to the ceiling | a lady who read in a very deep voice | {He}
      sneezed so loudly that all the people looked up | Somebody whispered, "Bless you," and everybody laughed quietly
      | a book about whales
    - fire station | to the fire station | a long red truck | a row of yellow helmets | {He} leaned on a button, and
      the siren began to howl | "Now we know that it works," said a fireman, and he turned it off | a paper helmet
    - bakery | to the bakery | bread as long as an arm | a tower of cream puffs | {He} bumped into a sack, and a cloud
      of flour came down on {his} head | The baker brushed off the flour and said that {he} looked like a real baker
      now | a warm roll
    - lighthouse | to the lighthouse | stairs that went round and round | a lamp as big as a door | The wind at the
      top blew {his} cap right off | A gull picked up the cap and dropped it at the door, as if to say hello | a
      picture of a ship
    - train station | to the train station | an old black engine | a man with a golden whistle | The engine puffed,
      and {his} nose was covered with soot | The man with the whistle cleaned it with a big checked cloth | a real
      ticket with a hole in it
    - museum | to the museum | the bones of a dinosaur | a stone that glowed in the dark | {He} looked at so many
      things that {he} lost {his} left glove | A guard had found it next to the dinosaur's big toe | a small round
      stone
    - orchard | to the orchard | trees full of red apples | a ladder that touched the sky | An apple fell down and
      landed right on {his} head | The gardener cut up that very apple, and it was the sweetest of them all | a bag of
      apples
    """,
)
SKILLS = table(
    "skill first second tip success",
    """
    - ride a bike | The bike tipped over, and {he} landed in the soft grass | {He} rolled for a moment, and then {he}
      ran into a bush | Look ahead and not at your feet | {He} looked ahead, and the bike rolled down the path all by
      itself
    - whistle | Only air came out of {his} mouth | There was a sound like a leaking balloon | Make your lips small, as
      if you had a berry between them | {He} made {his} lips small and blew, and a clear, high note came out
    - swim | {He} got water in {his} nose | {He} kicked so hard that everybody got wet, but {he} stayed in the same
      place | Kick slowly, like a frog | {He} kicked slowly, and all at once the water carried {him}
    - jump rope | The rope got caught on {his} feet | {He} jumped too late, and the rope landed on {his} nose | Say a
      rhyme and jump at every beat | {He} said a rhyme and jumped, and the rope went around seven times
    - skate | {His} feet went to the left and to the right, and {he} sat down with a bump | {He} went backward and
      could not stop | Bend your knees and lean a bit forward | {He} bent {his} knees and slid over the ice, all the
      way to the other side
    - juggle | All three balls fell on the floor | One ball flew out of the window | Start with one ball and take
      another when it feels easy | {He} started with one, then took two, then three, and for a moment all of them were
      in the air
    - climb a rope | {He} hung there like a wet sock | {He} got a little higher and slid down again | Hold the rope
      with your feet, too | {He} held on with {his} feet, pushed {himself} up, and touched the top
    - bake bread | The bread came out as hard as a stone | The bread was soft, but it was burned on top | Let the
      dough rest longer, and listen for the bell | {He} let the dough rest and listened for the bell, and the bread
      was brown and soft
    - draw a horse | It looked like a table with ears | It looked more like a big dog | Look at a real horse before
      you draw | {He} looked at the pony in the field for a long time, and then the horse on the paper almost galloped
      away
    - play the flute | It squeaked like a mouse | The sound was so loud that the cat ran away | Blow as softly as you
      blow on hot soup | {He} blew softly, and a sweet, round note filled the room
    - do a handstand | {He} fell over like a tree | {His} legs went up, and at once they came down again | Lean your
      feet against the wall at first | {He} leaned on the wall, then moved away from it, and stood there while they
      counted to five
    """,
)
GAMES = table(
    "game need role fun",
    """
    - hide-and-seek | We need somebody who can count to a hundred | counted all the way to a hundred and found
      everybody | Then it was {fhis} turn to hide, and {fhe} hid so well that they had to call {fhim} for lunch
    - pirates | We need a brave captain | found an old map, and it led to a box of shells | Their ship was a log, and
      no wave could sink it
    - tag | We need a fast runner | ran as fast as the wind | They ran around the big tree until nobody could run any
      more
    - music | We need somebody for the pots and pans | played the pots and pans with two spoons | The birds stopped
      singing to listen
    - store | We need somebody who sells things | sold leaves and acorns for pebbles | At the end, everybody was rich
      in acorns
    - explorers | We need somebody with sharp eyes | was the first to see the footprints in the mud | The footprints
      led them to a family of ducks
    - circus | We need a clown | walked with big steps and fell over nothing at all | Everybody laughed until their
      sides hurt
    - tea party | We need somebody who tells stories | told a story about a mouse on the moon | They drank so much
      pretend tea that they pretended to float
    - builders | We need somebody who is careful | put the last stick on top, and nothing fell down | Their little
      house even had a door
    - trains | We need a driver | said "choo-choo" louder than anybody | The train went over the hill, around the
      pond, and home again
    """,
)
SEEDS = table(
    "plant place sign pest help end",
    """
    - sunflower | next to the fence | a thick green stem | The wind bent it to one side | tied it to a stick | It was
      taller than {name} and turned its face to the sun
    - pumpkin | behind the shed | a pair of round leaves | A snail nibbled at the leaves | carried the snail to the
      far end of the garden | It was so big that they had to roll it home
    - bean | in a pot on the shelf | a tiny green hook | It did not get enough sun | moved the pot to a sunny window |
      It climbed all the way up to the curtain rod
    - strawberry plant | in an old bucket | a small white flower | The birds wanted the first berries | hung up a
      shiny ribbon to keep the birds away | There were ten red berries, and each was sweeter than the last
    - tomato plant | beside the door | two soft leaves | The sun was hot, and the leaves hung down | gave it water
      every morning | The first tomato was small and round and as red as a ball
    - poppy | under the window | a green tip no bigger than a pin | A mole dug right beside it | put a ring of stones
      around it | It opened one morning and was as red as a fire truck
    - carrot | in a row of soft earth | a tuft of green as fine as feathers | The weeds grew faster than anything else
      | pulled out the weeds, one by one | It was long and orange, and it crunched
    - pea plant | along the garden wall | a curly green thread | A deer came to nibble at it | put a small fence
      around it | When {he} opened the first pod, eight round peas sat in a row
    """,
)

# == 5  the plots =====================================================================================================

PLOTS = {
    "lost and found": Plot(
        (TOYS, SPOTS),
        """
        - <opening> {He} had a {look} {toy}. [Every day, {he} {use}.|{He} loved it, and each day {he} {use}.|It was
          {his} favorite thing in the world. Every day, {he} {use}.]
        - <day>, {name} [could not find|wanted to play, but {he} could not find] {his} {toy}. {He} looked [in the
          kitchen| behind the curtains|under the table]. {He} looked [on the stairs|in the closet|behind the door].
          [It was not there.| It was not there, and it was not anywhere.|No {toy}!] {name} was <sad>.
        - "[Where is my {toy}?|Oh no! My {toy} is gone!|I have lost my {toy},]" {he} said to {helper}.
        - "[Do not worry, {name},|Don't cry,]" said {hname}. "[We will look for it together.|I will help you.] [Where
          did you play last?|What did you do this morning?|Let us think.]"
        - [{name} thought hard.|{name} closed {his} eyes and thought.|They looked high and low.] [Then {he} had an
          idea.| "I think I know!" {he} said.] {He} looked {spot}. [There was the {toy}!|And what did {he} see? The
          {look} {toy}!] {why}
        - [{name} jumped for joy.|{name} was <happy>.|{name} hugged {his} {toy} and laughed.] "<thanks>, {hname}!"
          {he} said. [{hname} laughed, too.|"I knew that we would find it," said {hname}.|]
        - [From that day on, {name} put {his} {toy} in the same place every evening.|{name} learned that it helps to
          stop and think when something is lost.|{name} learned that two can look better than one.|<bed> The {toy} was
          right next to {him}.] <close>
        """,
    ),
    "an honest finder": Plot(
        (FOUND,),
        """
        - <opening>
        - <day>, {name} found a {look} {thing} {where}. [{He} picked it up.|{He} picked it up and looked at it from
          all sides.|It was so nice that {he} had to pick it up.] "[What a nice {thing}!|I wish I could keep this
          {thing},|Look at that!]" {he} said.
        - [{name} wanted to take it home. But then {he} began to think.|{name} wanted to keep it. But it did not feel
          right.] [Somebody must be looking for it.|Somebody must be sad without it.] {He} [went home and showed it to
          {his} {parent}|ran to {his} {parent} and held it up].
        - "[What do you think we should do?|Who may have lost it?]" asked {Parent}.
        - "[I do not know who lost it. But I want to find out,|We should give it back,]" said {name}. {Parent}
          <smiled>.
        - They asked [at the shop, and they asked at the school|all the neighbors|one person after another]. At last
          they came to {owner}. {Ohe} was walking up and down and looking at the ground. {Ohe} looked worried.
        - "[Excuse me, is this your {thing}?|Did you lose this {thing}?]" asked {name}.
        - "[My {thing}!|Yes, that is my {thing}!]" said {oname}. "[Where did you find it?|I have looked for it all
          day!] {need}. <thanks>, {name}!" {Ohe} was <happy>, and {ohe} {thanks}.
        - [{name} was proud.|{name} felt warm inside.|{name} was <happy>, too.] [{He} had no {thing} now, but {he} had
          a new friend.|{He} learned that giving back what you find feels better than keeping it.|"You did the right
          thing," said {Parent}, and {phe} <hug>.] <close>
        """,
        animals=False,
    ),
    "a strange find": Plot(
        (FINDS,),
        """
        - <opening>
        - <day>, {name} found a {look} {thing} {where}. [{He} had never seen one like it.|{He} turned it around and
          around.|"What is this?" {he} said.] "[Maybe it is|I think it is|It must be] {guess}," {he} [thought|said to
          {himself}]. But then {he} looked more closely. {wrong}. [How strange!|That was odd.]
        - {He} [ran to|went to find] {his} {parent}. "[Look what I found!|{Parent}, look at this {thing}!]" {he} said.
          "[Do you know what it is?|What can it be?]"
        - "[Hmm, let me see,|That is a riddle,|How interesting,]" said {Parent}. "[Let us find out together.|Let us
          have a good look.]" They [sat down side by side|bent over it] and looked. {clue}.
        - "[Oh! Now I know!|I see it now!|Can it be?]" said {name}. {truth}.
        - "[What a surprise!|I did not think of that!]" said {name}. "[I am so glad that I found it.|I am glad that we
          looked so closely.]" {name} was <happy>.
        - {end}. [{name} learned that it is good to look twice.|{name} learned that a small thing can hold a big
          surprise.|"I wonder what I will find tomorrow," said {name}.] <close>
        """,
        animals=False,
    ),
    "wanting and sharing": Plot(
        (TREATS,),
        """
        - <opening>
        - <day>, {his} {parent} gave {him} a {look} {treat}. [It smelled wonderful.|It looked so good!|{name} had
          waited for it all morning.] "<thanks>, {Parent}!" said {name}. {He} took it outside and sat down [under a
          tree|on a bench|on the steps| in the sun]. [{He} wanted to eat it all by {himself}.|{He} wanted to eat every
          bit of it.]
        - Then {he} saw {his} friend {newfriend}. {friend} looked <sad>. "[What is wrong?|Why are you so sad,
          {friend}?]" asked {name}.
        - "[I had a {lost}, but it fell in the mud,|A goose ate my {lost},|I dropped my {lost} in the pond,]" said
          {friend}. "[Now I have nothing to eat.|And I am so hungry.]"
        - {name} looked at {his} {treat}. [It was not very big.|{He} was hungry, too.|{He} wanted to say nothing and
          eat it fast.] But then {he} looked at {friend} again. [{friend} had tears in {fhis} eyes.|{friend} tried to
          smile, but {fhe} could not.] {name} took the {treat} and {how}.
        - "[Here, this half is for you,|You can have half of it,|Let us share,]" said {name}.
        - "[For me? <thanks>!|<thanks>, {name}!]" said {friend}. They sat side by side and ate. [It was the best
          {treat} in the world.|{name} thought that half a {treat} with a friend tasted better than a whole one.|They
          talked and laughed until the last bit was gone.]
        - [The next day, {friend} came with {back}. "Half of it is for you!" {fhe} said.|The next day, {friend}
          brought {back}, and they shared again.|] [{name} learned that sharing makes two people happy.|From then on,
          they always shared.|They were <happy> to have each other.] <close>
        """,
    ),
    "a quarrel and making up": Plot(
        (QUARRELS,),
        """
        - <opening> {His} best friend was {newfriend}. [They played together every day.|They did everything together.]
        - <day>, they found a {thing} {where}. "[I saw it first!|It is mine! I saw it first!]" said {name}. "I want to
          {claim}!"
        - "No, I want to {claim}!" said {friend}. [Both of them held on to it.|Neither of them wanted to give in.|
          {name} would not let go, and {friend} would not let go, either.]
        - [They shouted at each other.|They said things that were not nice.] "[Then I will not play with you any
          more!|You are not my friend any more!]" said {name}. [{friend} stamped {fhis} foot and walked away.|{friend}
          turned around and went home.]
        - Now {name} was alone. [It was quiet. It was too quiet.|It was not much fun.|{He} sat down, and time went by
          very slowly.] {He} felt <sad>. [{His} {parent} sat down next to {him}. "What is the matter?" asked {Parent}.
          {name} told {phim} everything. "What would make it better?" asked {Parent}. {name} knew.|{He} thought of all
          the games that they had played. {He} missed {friend}.]
        - [{He} ran to look for {friend}.|So {he} got up and went to {friend}.] {friend} was [sitting behind a
          bush|sitting all alone], and {fhe} looked [sad|unhappy], too. "I am sorry that I [shouted|was mean]," said
          {name}.
        - "I am sorry, too," said {friend}. "I have an idea. {idea}!"
        - "[That is a great idea!|Yes! Let us do that!]" said {name}. So {together}. [It was much more fun than
          before.|They laughed so much that they got the hiccups.|They played until it was time for supper.]
        - [{name} learned that a friend is worth more than a {thing}.|They still quarreled sometimes, but they always
          made up soon.|After that, they were even better friends than before.|They both learned that saying sorry can
          mend a lot.] <close>
        """,
    ),
    "a mishap and repair": Plot(
        (BREAKS,),
        """
        - <opening> {His} {parent} had a {look} {thing}. [{Parent} liked it very much.|{Parent} had had it for many
          years.|It was a present from an old friend.]
        - <day>, {accident}. [Oh no!|What a fright!] {broken}.
        - {name} was <sad>. [{He} wanted to run away and hide.|"Maybe nobody will see it," {he} thought.|{He} thought,
          "I could say that it was the wind."] But [{he} knew that it was not right|{his}
          tummy felt funny when {he} thought of that]. So {he} went to {his} {parent}.
        - "[{Parent}, it is about your {thing}. It was me,|I did something bad, {Parent}. Please look at your
          {thing},]" {he} said [very quietly|with tears in {his} eyes|in a small voice]. "I am so sorry."
        - {Parent} [looked at the {thing}|took a deep breath|was quiet for a moment]. Then {phe} <hug>. "[I am a
          little sad about the {thing}. But I am glad that you told me the truth|Thank you for telling me. That was
          brave]," {phe} said. "[Let us see if we can fix it.|Do you want to help me fix it?]"
        - {name} <smiled>. They got what they needed, and {mend}. [It took all afternoon.|They had to be very
          careful.|It was not easy, but they did not give up.] At last it was done. {after}.
        - "[I like it even more now,|It is almost better than before,]" said {Parent}, "because [we fixed it
          together|now it has a story]."
        - [{name} learned that it is best to tell the truth.|{name} was <happy>. {He} was more careful from that day
          on.|{name} learned that many things can be mended if you tell the truth.] <close>
        """,
        animals=False,
    ),
    "a fear overcome": Plot(
        (FEARS,),
        """
        - <opening> [{name} was not afraid of much, but {he} was afraid of {fear}.|There was only one thing that
          {name} did not like, and that was {fear}.|{name} was very much afraid of {fear}.]
        - One day, {name} [was with {helper}|spent the day with {helper}]. {scene}. {sign}. "[I can't do it,|I am
          scared,|I want to go home,]" {he} said.
        - {hname} [sat down next to {him}|put an arm around {him}|took {his} hand]. {Hhe} did not laugh. "[I used to
          be afraid of {fear}, too,|Everybody is afraid of something,|It is all right to be afraid,]" {hname} said
          <kindly>. "{advice}. [I will stay with you.|I am right here.]"
        - {name} [took a deep breath|swallowed hard|thought about it for a while]. "All right," {he} said. "[I will
          try.|But you must stay close.]" {He} {brave}!
        - "[I did it!|Look at me! I did it!]" {name} [cried|shouted]. "[It was not so bad at all!|I am not scared any
          more!]"
        - "[I knew that you could,|I am so proud of you,|You were very brave,]" said {hname}.
        - {after}. [{name} learned that being brave means trying even when you are afraid.|And whenever {he} was
          afraid of something, {he} remembered that day.|{name} felt as tall as a tree.|] <close>
        """,
        animals=False,
    ),
    "helping an animal": Plot(
        (STRAYS,),
        """
        - <opening>
        - <day>, {name} [found a {size} {animal}.|found a {size} {animal}.|[was playing outside|went for a walk with
          {his} {parent}|was on {his} way home]. [Suddenly, {he} heard a small sound.|All at once {he} stopped. What
          was that?] {He} looked around and found a {size} {animal}.] {trouble}.
        - "[Oh, you poor {animal}!|Poor little thing!]" said {name}. "[Don't be afraid.|I will help you.]" The
          {animal} looked at {him} with big, round eyes.
        - {name} called {his} {parent}. "[Please come fast!|Look, {Parent}!] [This {animal} needs help!|We have to
          help this {animal}!]"
        - {Parent} came and knelt down. "[You are right,|Good that you called me,]" {phe} said. "{plan}. [Can you help
          me?|You can help me, but we must be gentle.]"
        - "Yes, I can," said {name}. [{He} was very careful.|{He} moved slowly and spoke softly.|] {work}. ["Well
          done," said {Parent}.|]
        - [The {animal} was safe.|Now everything was fine again.] "Goodbye, little {animal}!" said {name}. {thanks}.
        - [{name} was <happy>.|{name} waved and felt <happy>.] "[You have a kind heart,|Even somebody small can be a
          big help,]" said {Parent}. [{name} learned that it is good to stop and help.|And {name} never forgot {his}
          new friend.|<bed>] <close>
        """,
        animals=False,
    ),
    "a rule and a lesson": Plot(
        (LESSONS,),
        """
        - <opening>
        - <day>, {his} {parent} said, "{rule}, {name}." "[Yes, {Parent},|All right, {Parent},|I will remember,]" said
          {name}.
        - [But it was hard.|But soon {he} forgot all about it.|But then something happened.] {tempt}. "[Just this
          once,|Nobody will know,|It will be all right,]" {he} thought. {deed}.
        - [Oh dear!|That was not a good idea.|But that was a mistake.] {result}. {name} began to cry. "[{Parent}!
          Please help me!|I am sorry, {Parent}!|Oh, I wish I had listened!]" {he} [called|sobbed].
        - {Parent} [came at once|heard {him}|was not far away]. {Phe} {rescue}. [{Phe} was not angry.|{Phe} did not
          shout.] "Do you know now why I said that?" {phe} asked.
        - "Yes," said {name}. "[I did not listen. I am sorry.|I should have listened to you. I am sorry.]"
        - "[We all make mistakes,|I did the same thing when I was small,]" said {Parent}, and {phe} <hug>. "[Next time
          you will know better.|The important thing is to learn from it.]"
        - [{name} learned that {lesson}.|From that day on, {name} knew that {lesson}.|And {name} never forgot that
          {lesson}.] <close>
        """,
        animals=False,
    ),
    "making a surprise": Plot(
        (GIFTS,),
        """
        - <opening>
        - [<day>, {name} remembered that it was {his} {parent}'s birthday.|<day>, {his} {parent} was very tired and a
          little sad.| {His} {parent} had been away for a week, and today {phe} was coming home.] {name} wanted to
          [make {phim} happy|do something nice for {phim}].
        - {He} went to {his} friend {newfriend}. "[Will you help me?|I need your help.] I want to make a {gift} for my
          {parent}," {he} said. "But it is a secret!"
        - "[I love secrets!|What fun!|I will not tell anybody!]" said {friend}. "What do we need?"
        - They [looked for|got] {need}. First they {first}. [{name} hummed a song.|{friend} made a funny face, and
          {name} had to laugh.|They had to be very quiet.] Then they {then}. But [oh no!|then something went wrong.]
          {mishap}.
        - "[What can we do now?|Now it is spoiled!]" said {name}. {He} was <sad>.
        - "[Wait, I have an idea,|We can still save it,]" said {friend}. So they {save}. [It looked as if it had
          always been meant that way.|Now it was even better than before.|They looked at each other and laughed.]
        - [When {Parent} came in, they both shouted, "Surprise!"|{name} put {his} hands over {Parent}'s eyes. "One,
          two, three, surprise!"] And there it was: {done}.
        - "[Is that for me?|Did you make that for me?]" asked {Parent}. {Phe} [laughed with joy|had to wipe away a
          happy tear|looked and looked]. "[It is the best {gift} in the world.|I have never had such a fine {gift}.]
          <thanks>, both of you!"
        - [{name} was <happy>. Making somebody happy was the best part.|{name} learned that the best presents are made
          with love.|{name} and {friend} had learned that a mistake can turn into something good.|And {name} and
          {friend} were already planning the next surprise.] <close>
        """,
    ),
    "weather spoils a plan": Plot(
        (PLANS,),
        """
        - <opening>
        - [One day|One Sunday|One day], {name} and {his} friend {newfriend} wanted to {plan}. [They had talked about
          it all week.|They could hardly wait.] They got out {pack}, and {name} put on {his} shoes. "[This will be the
          best day ever!|I am so excited!]" said {friend}.
        - But when they opened the door, [they stopped|their smiles were gone]. {weather}. "[Oh no!|That is not
          fair!|Not today!]" said {name}. "Now we can't {plan}."
        - They sat down by the window and waited. [They waited and waited.|{friend} sighed, and {name} sighed, too.]
          But it did not get any better. They were <sad>.
        - [{His} {parent} saw their long faces.|Then {his} {parent} came in.] "[We can't change the weather,|The
          weather does what it wants,]" said {Parent}, "but we can change the plan. [Any ideas?|What can we do at
          home?]"
        - {name} looked around the room and [thought|scratched {his} head]. Then {his} eyes grew big. "[I know!|I have
          it!] {instead}!" {he} said.
        - "[Yes!|That is a great idea!]" cried {friend}. {play}. [{Parent} joined in, too.|{Parent} made some cocoa
          for all of them.|They laughed and laughed.]
        - "[This is even better,|I am almost glad about the weather,]" said {name}. [They learned that a good day does
          not need good weather.|{name} learned that when one plan fails, you can make a new one.|"Can we do it again
          tomorrow?" asked {friend}.|] <close>
        """,
    ),
    "a visit": Plot(
        (VISITS,),
        """
        - <opening>
        - <day>, {his} {parent} said, "[Put on your shoes, {name}.|I have a surprise for you, {name}.] We are going
          {going}!" {name} [jumped up and down|clapped {his} hands|ran to the door at once]. {He} had never been
          {going} before.
        - [They took the bus, and {name} looked out of the window all the way.|They walked there hand in hand.|It was
          a long way, but {name} did not mind.] [At the {place}, there was so much to see.|The {place} was bigger than
          {he} had thought.] {name} saw {first}. Then {he} saw {second}. "[Look, {Parent}!|Look at that!|Did you see
          that?]" {he} [called|said] again and again.
        - Then something [funny|unexpected|strange] happened. {mishap}. "Oh!" said {name}. [{He} did not know if {he}
          should laugh or cry.|{His} face turned red.|{He} was <sad> for a moment.]
        - [But all was well.|But it was not so bad.|"Don't worry," said {Parent}.] {mended}. Then {name} laughed, and
          {Parent} laughed, too.
        - When it was time to go home, {name} got {gift}. {He} held it [tightly|in both hands] all the way. "[What did
          you like best?|What was the best part?]" asked {Parent}.
        - "[All of it!|The part that went wrong!|Being there with you,]" said {name}. [{Parent} <smiled>.|{Parent}
          <hug>.] [<bed>|{name} told everybody about the {place}.|At home, {name} put it next to {his} bed, so that
          {he} would always remember.] <close>
        """,
        animals=False,
    ),
    "learning something": Plot(
        (SKILLS,),
        """
        - <opening> [More than anything, {he} wanted to {skill}.|There was one thing that {he} really wanted to learn.
          {He} wanted to {skill}.]
        - <day>, {name} [tried it for the first time.|said, "Today I will {skill}!"] [But it was not easy.|It looked
          easy, but it was not.] {first}. {He} tried again. {second}. "[I will never learn it!|It is too hard for
          me!|I give up!]" said {name}. {He} [sat down and crossed {his} arms|was <sad>|felt like crying].
        - {Helper} had seen it all. "[It took me a long time, too,|Nobody can do it right away,|You are closer than
          you think,]" said {hname}. "[Try this.|May I tell you a secret?] {tip}."
        - {name} [was not sure|wiped {his} nose|thought about it]. Then {he} got up. [{He} tried it that day, and the
          next day, and the day after that.|{He} practiced every day for a week.] [Each time it went a little
          better.|Some days it went well, and some days it did not.]
        - And then [one morning|at last], it worked! {success}! "[I can do it!|Did you see that?|Look, look!]" {he}
          [cried|shouted].
        - {hname} [clapped and cheered|danced around {him}|threw {hhis} hat into the air]. "[You did not give up!|I
          knew that you could do it!]"
        - [{name} was <happy>.|{name} was proud of {himself}.] [{He} learned that you get better when you keep
          trying.|{He} learned that it is all right to fail if you try again.|And soon {he} was helping somebody else
          to learn it.] <close>
        """,
    ),
    "a new friend": Plot(
        (GAMES,),
        """
        - <opening>
        - <day>, {name} was playing [in the meadow|in the park|by the old oak tree] with some friends. [{He} saw
          somebody standing all alone.|A little way off, somebody stood all alone and watched them.] It was
          {newfriend}, who was new there. {friend} [looked at {fhis} feet|seemed shy|did not say a word].
        - "[Who is that?|Why is {fhe} just standing there?]" asked one of the others. "[Let us go on with our
          game.|Never mind, let us play.]"
        - But {name} [remembered how it felt to be alone|thought that {friend} looked lonely]. {He} walked over.
          "Hello, I am {name}," {he} said. "[What is your name?|Who are you?]"
        - "I am {friend}," said {friend} [very quietly|in a tiny voice]. "[I don't know anybody here.|We just moved
          here.]"
        - "[Now you know me!|Well, you know me now!] We are playing {game}," said {name}. "{need}. [Would you like to
          play?|Do you want to join us?]"
        - {friend} [looked up and smiled|nodded slowly]. [At first {fhe} was shy, but not for long.|And it turned out
          that {fhe} was very good at it.] {friend} {role}. {fun}. "[You are good at this!|I am glad that you came!]"
          said {name}.
        - When it was time to go home, {friend} asked, "[Can I come back tomorrow?|Will you be here tomorrow?]"
        - "[Of course!|Yes, and the day after that, too!]" said {name}. [{He} learned that one kind word can make a
          friend.|From then on, {name} and {friend} played together every day.|{friend} was not alone any more, and
          {name} had a new friend.] <close>
        """,
    ),
    "waiting for a seed": Plot(
        (SEEDS,),
        """
        - <opening>
        - <day>, {his} {parent} gave {him} a [tiny|small] seed. "What is it?" asked {name}. "[That is a secret.|You
          will see.] [Plant it and take good care of it,|Give it earth, water and time,]" said {Parent}.
        - {name} planted the seed {place}. {He} gave it some water and sat down to wait. [Nothing happened.|{He}
          looked and looked, but nothing happened.] The next day, there was still nothing. "[It does not work,|Maybe
          it is asleep,|I think it is broken,]" said {name}.
        - "[Good things take time,|It is busy under the ground,]" said {Parent} <kindly>. "[You can't pull it up by
          its hair.|Wait a little longer.]"
        - So {name} waited. {He} watered it [every morning|each day] and [sang to it|told it stories|said good night
          to it]. And then, one day, there was {sign}! "[It is growing!|{Parent}, come and look!]" {he} cried.
        - But [then there was trouble|it was not over yet]. {pest}. {name} was <sad>, but {he} did not give up. {He}
          {help}. [That helped.|After that, it grew and grew.]
        - The weeks [|and months ]went by, and at last {he} knew what it was. It was a {plant}! {end}. "[You took such
          good care of it,|You were so patient,]" said {Parent}.
        - [{name} learned that some things are worth waiting for.|{name} proudly showed it to everybody.|{name} kept
          one seed for the next year.] <close>
        """,
    ),
}


# == 6  the command line ==============================================================================================


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="stories.py", description="Stories to train on: TinyStories, or generated ones.")
    parser.add_argument("--show", type=int, metavar="N", help="print N generated stories")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stories that --show prints")
    parser.add_argument(
        "--download", type=float, metavar="MB", help="fetch this many MB (millions of bytes) to train on"
    )
    parser.add_argument("--out", default="data", metavar="FOLDER", help="where downloaded stories go")
    try:
        args = parser.parse_args(argv)
        if args.show is None and args.download is None:
            raise ValueError("nothing to do; try --show 3 or --download 50")
        if args.show is not None and args.show < 1:
            raise ValueError(f"--show is {args.show}; expected at least 1")
        if args.download is not None and not 0 < args.download < math.inf:
            raise ValueError(f"--download is {args.download:g}; expected a number of MB above 0")
        for _, story in zip(range(args.show or 0), generate(args.seed), strict=False):
            print(f"{story}\n{END}")
        sys.stdout.flush()
        if args.download is None:
            return 0
        source = get(args.out, math.ceil(args.download * 1e6))
    except BrokenPipeError:  # whoever read stdout has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"stories.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstories.py: stopped; what came is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    print(f"{source.name}: {source.train} {source.valid}")
    return 1 if source.name.startswith("generated") else 0


if __name__ == "__main__":
    sys.exit(main())
