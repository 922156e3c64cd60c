"""Where stories come from: TinyStories by download, or stories generated here when there is no network.

    python extras/stories.py --show 3 --seed 0          prints three generated stories
    python extras/stories.py --download 50 --out data   fetches the first 50 MB of TinyStories into data/

Read section 1 for what a caller gets, section 2 for the download; `generate.py` composes the generated stories from
`plots.txt`. TinyStories: Eldan & Li 2023, arXiv:2305.07759, CDLA-Sharing-1.0.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import http.client
import json
import math
import os
import queue
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
from extras.generate import generate, grammar_version, hash_story

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
    made = {"generator": grammar_version(), "seed": seed}

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
            bpe.write_aside(source.train, chunks(seed, "train", num_bytes))
            bpe.write_aside(source.valid, chunks(seed, "valid", VALID_BYTES))
            bpe.write_aside(note, [json.dumps({**made, "bytes": sizes()}).encode()])
    return source


def chunks(seed: int, split: str, least: int) -> Iterator[bytes]:
    """A file of a split, story by story, each once: at least `least` bytes."""
    written, seen = 0, set()
    for story in generate(seed, split):
        if (key := hash_story(story)) not in seen:
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
            while not bpe.lock_file(file):
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
    bpe.write_aside(note_of(first), [noted(keep, crc)])
    bpe.write_aside(note_of(part), [noted(keep, crc)])
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


# == 3  the command line ==============================================================================================


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
