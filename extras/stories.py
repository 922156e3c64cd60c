"""Text to train on: TinyStories by download, or generated stories where there is no network.

    python extras/stories.py --show 3 --seed 0          print three generated stories
    python extras/stories.py --download 50 --out data   download the first 50 MB of TinyStories into data/

Read section 1 for what a caller gets, 2 for the files that a download leaves, 3 for the connection. `generate.py`
composes the generated stories from `plots.txt`. TinyStories: Eldan & Li 2023, arXiv:2305.07759, CDLA-Sharing-1.0.
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
import tinygpt
from extras import locks
from extras.generate import generate, grammar_version, hash_story

END = bpe.END
MIB = 1 << 20
MAX_GENERATED = 200 * MIB  # the grammar rarely composes a new story after that
VALID_BYTES = 400_000  # generated validation text


# == 1  choosing the text =============================================================================================


class Source(NamedTuple):
    train: Path
    valid: Path
    name: str  # for the log and the checkpoint


def get(folder: str | Path, num_bytes: int) -> Source:
    """Text files in `folder`, with at least `num_bytes` to train on where there is that much.

    Files that are there already, else TinyStories by download, else generated stories. A failed download prints one
    line on stderr. HF_HUB_OFFLINE=1 prevents downloads; HF_ENDPOINT replaces the address of Hugging Face.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remote = TRAIN
    try:
        train = fetch(TRAIN, folder, num_bytes)
        remote = VALID
        valid = fetch(VALID, folder, VALID.size)
    except (DownloadError, OSError) as error:
        print(
            f"stories: no TinyStories: {error} ({remote.url()}); continuing with generated stories; "
            f"to use a copy, put it at {folder / remote.name}",
            file=sys.stderr,
        )
        return write_generated(folder, num_bytes)
    whole = train.name == TRAIN.name
    return Source(train, valid, "TinyStoriesV2" if whole else f"TinyStoriesV2 (first {mib(file_size(train))} MiB)")


def write_generated(folder: str | Path, num_bytes: int, seed: int = 0) -> Source:
    """Write generated stories in the layout of TinyStories, unless long enough files of this grammar are there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = min(num_bytes, MAX_GENERATED)
    source = Source(folder / "generated-train.txt", folder / "generated-valid.txt", f"generated stories, seed {seed}")
    note = folder / "generated.json"

    def expected_note():
        sizes = [file_size(source.train), file_size(source.valid)]
        return {"generator": grammar_version(), "seed": seed, "bytes": sizes}

    def is_current():
        try:
            return json.loads(note.read_bytes()) == expected_note() and file_size(source.train) >= num_bytes
        except (OSError, ValueError, RecursionError):
            return False

    if is_current():
        return source
    with folder_lock(source.train):
        if not is_current():  # another process may have written them while this one waited
            note.unlink(missing_ok=True)  # first: a killed process must not leave a note beside mixed files
            tinygpt.write_aside(source.train, encode_stories(seed, "train", num_bytes))
            tinygpt.write_aside(source.valid, encode_stories(seed, "valid", VALID_BYTES))
            tinygpt.write_aside(note, [json.dumps(expected_note()).encode()])
    return source


def encode_stories(seed: int, split: str, num_bytes: int) -> Iterator[bytes]:
    """Yield distinct stories as they stand in a file, until they have at least `num_bytes`."""
    written, seen = 0, set()
    for story in generate(seed, split):
        if (key := hash_story(story)) not in seen:
            seen.add(key)
            chunk = f"{story}\n{END}\n".encode()
            written += len(chunk)
            yield chunk
        if written >= num_bytes:
            return


@contextlib.contextmanager
def folder_lock(path: Path):
    """Lock the folder of `path`; other processes wait, with one line on stderr. A killed process leaves no lock."""
    with open(path.with_name("stories.lock"), "ab") as file:
        try:
            waiting = False
            while not locks.lock_file(file):
                if not waiting:
                    print(f"stories: another process is writing {path}; waiting ...", file=sys.stderr)
                waiting = True
                time.sleep(0.1)
        except OSError as error:  # some network file systems have no locks
            line = f"stories: cannot lock {path.parent} ({error.strerror}); do not start a second download there"
            print(line, file=sys.stderr)
        yield


def file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def mib(num_bytes: int, rounding=round) -> int:
    return rounding(num_bytes / MIB)


# == 2  the files of a download =======================================================================================
#
# NAME               the whole file
# NAME.first-BYTES   a prefix of the file that ends with a story
# NAME.part          a download under way; only the process that holds the lock touches it
#
# The first two never change, so a run can read them while another process downloads more. Beside a prefix and a part
# lies NAME....crc32, a note with the number of bytes received and their CRC-32.

RETRIES = 2  # after a cut connection, each PAUSE_SECONDS later
PAUSE_SECONDS = 1
MAX_STORY = 1 << 16  # bytes; a part is cut at its last whole story


class Remote(NamedTuple):
    name: str
    size: int
    expected: str  # digest, in hex

    def url(self):
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/datasets/roneneldan/TinyStories/resolve/main/{self.name}"

    def digest(self):
        """A hash of no bytes yet."""
        return hashlib.sha256()


TRAIN = Remote(
    "TinyStoriesV2-GPT4-train.txt", 2_227_753_162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"
)
VALID = Remote(
    "TinyStoriesV2-GPT4-valid.txt", 22_502_601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"
)


class DownloadError(Exception):
    """The reason, in words for the user, why there is no file."""


class ConnectionCut(DownloadError):
    """The connection was lost; the bytes received are kept, and another request may get the rest."""


def fetch(remote: Remote, folder: Path, num_bytes: int) -> Path:
    """The whole file, or a prefix of at least `num_bytes` that ends with a story, from `folder` or the network."""
    path = find_local(remote, folder, num_bytes)
    if path is None:
        with folder_lock(folder / remote.name):
            path = find_local(remote, folder, num_bytes) or download(remote, folder, num_bytes)
    return path


def find_local(remote: Remote, folder: Path, num_bytes: int) -> Path | None:
    """The whole file if it is in `folder`, else the shortest undamaged prefix that has `num_bytes`."""
    if (path := folder / remote.name).exists():
        return path
    for prefix in list_prefixes(remote, folder):
        if file_size(prefix) >= num_bytes and check_note(prefix)[0] == file_size(prefix):
            return prefix
    return None


def list_prefixes(remote: Remote, folder: Path) -> list[Path]:
    """The prefixes of the file in `folder`, shortest first."""
    found = [path for path in folder.iterdir() if re.fullmatch(re.escape(remote.name) + r"\.first-\d+", path.name)]
    return sorted(found, key=file_size)


def note_path(path: Path) -> Path:
    return path.with_name(path.name + ".crc32")


def format_note(have: int, crc: int) -> bytes:
    return f"{have:>15} {crc:08x}\n".encode()  # of constant length, because it is overwritten in place


def check_note(path: Path) -> tuple[int, int]:
    """(bytes received, their CRC-32) as the note says; (0, 0) if the file does not begin with those bytes."""
    try:
        have, crc = note_path(path).read_bytes().split()
        have, crc = int(have), int(crc, 16)
        if file_size(path) >= have and checksum(path, have) == crc:
            return have, crc
    except (OSError, ValueError):
        pass
    return 0, 0


def checksum(path: Path, num_bytes: int) -> int:
    """CRC-32 of the first `num_bytes`."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(min(MIB, num_bytes)):
            crc, num_bytes = zlib.crc32(block, crc), num_bytes - len(block)
    return crc


def download(remote: Remote, folder: Path, num_bytes: int) -> Path:
    """`fetch` for the process that holds the lock: extend the part as far as needed, then rename it."""
    path, part = folder / remote.name, folder / (remote.name + ".part")
    have, crc = check_note(part)
    if have != remote.size and not (num_bytes <= have < remote.size and last_story_end(part, have) >= num_bytes):
        have = extend_part(remote, part, have, crc, num_bytes)
    if have < remote.size:
        return publish_prefix(remote, part, last_story_end(part, have))
    with open(part, "r+b") as file:
        os.fsync(file.fileno())
    if found := wrong_digest(remote, part):
        for wrong in [part, *list_prefixes(remote, folder)]:  # the part was extended from a prefix
            delete_with_note(wrong)
        name = remote.digest().name
        raise DownloadError(f"wrong contents: {name} is {found[:12]}..., expected {remote.expected[:12]}...")
    os.replace(part, path)
    note_path(part).unlink()
    remove_old_prefixes(remote, folder)
    return path


def wrong_digest(remote: Remote, path: Path) -> str:
    """The digest of a file in hex; "" if it is the one expected."""
    digest = remote.digest()
    with open(path, "rb") as file:
        while block := file.read(MIB):
            digest.update(block)
    return "" if digest.hexdigest() == remote.expected else digest.hexdigest()


def extend_part(remote: Remote, part: Path, have: int, crc: int, num_bytes: int) -> int:
    """Extend `part`, whose first `have` bytes have the CRC-32 `crc`, until it holds `num_bytes` of whole stories.

    Returns the number of bytes in the part. A prefix that has more bytes than the part replaces it first.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise DownloadError("HF_HUB_OFFLINE is set")
    target = min(remote.size, mib(num_bytes + MAX_STORY, math.ceil) * MIB)
    missing, free = target - file_size(part), shutil.disk_usage(part.parent).free
    if free < missing:
        raise DownloadError(f"the disk is full: {mib(missing)} MiB are needed and {mib(free)} MiB are free")
    if have > remote.size:
        have, crc = 0, 0  # the part belongs to another file
    for prefix in reversed(list_prefixes(remote, part.parent)):
        if file_size(prefix) > have and check_note(prefix)[0] == file_size(prefix):
            shutil.copyfile(prefix, part)
            note_path(part).write_bytes(note_path(prefix).read_bytes())
            have, crc = check_note(part)
            break
    cuts = 0
    while have < target:
        before, cut = have, None
        try:
            receive_range(remote, part, have, crc, target)
        except ConnectionCut as error:
            cuts, cut = cuts + 1, error
        have, crc = check_note(part)
        if cut and (cuts > RETRIES or have <= before):  # no retry after a connection that brought nothing
            raise cut
        if cut:
            time.sleep(PAUSE_SECONDS)
        elif have < target:
            raise DownloadError(f"{part} lost the bytes written to it; another process or the disk changed it")
    return have


def publish_prefix(remote: Remote, part: Path, keep: int) -> Path:
    """Rename the first `keep` bytes of the part to a prefix. A process killed between any two lines loses nothing."""
    prefix, crc = part.with_name(f"{remote.name}.first-{keep}"), checksum(part, keep)
    tinygpt.write_aside(note_path(prefix), [format_note(keep, crc)])
    tinygpt.write_aside(note_path(part), [format_note(keep, crc)])
    os.truncate(part, keep)
    os.replace(part, prefix)
    note_path(part).unlink()
    remove_old_prefixes(remote, part.parent, prefix)
    return prefix


def remove_old_prefixes(remote: Remote, folder: Path, keep: Path | None = None) -> None:
    """Remove prefixes other than `keep` that are a day old. A run may still be reading younger ones."""
    for prefix in list_prefixes(remote, folder):
        if prefix != keep and time.time() - prefix.stat().st_mtime > 86_400:
            with contextlib.suppress(OSError):
                delete_with_note(prefix)


def delete_with_note(path: Path) -> None:
    path.unlink(missing_ok=True)
    note_path(path).unlink(missing_ok=True)


def last_story_end(part: Path, have: int) -> int:
    """The offset at which the last whole story of the first `have` bytes ends."""
    marker = END.encode()
    with open(part, "rb") as file:
        file.seek(start := max(0, have - MAX_STORY))
        tail = file.read(have - start)
    return start + tail.rfind(marker) + len(marker) if marker in tail else have


# == 3  the connection ================================================================================================

CONNECT_SECONDS = 5  # for each address of the server
OPEN_SECONDS = 12  # name look-up, connections, redirections and the first byte together
STALL_SECONDS = 15  # without a byte


def receive_range(remote: Remote, part: Path, have: int, crc: int, target: int) -> None:
    """Append bytes [have, target) of the file to the first `have` of `part`, whose CRC-32 is `crc`.

    Updates the note after each block. Starts over if the server ignores ranges.
    """
    ranged = have > 0 or target < remote.size
    with open_url(remote.url(), {"Range": f"bytes={have}-{target - 1}"} if ranged else {}) as response:
        if response.status != 206:
            have, crc = 0, 0
        block = read_block(response, min(MIB, target - have))
        check_response(response, remote, have, block)
        bar = ProgressBar(remote.name, have, target)
        try:
            mode = "r+b" if have else "wb"
            with open(part, mode) as file, open(note_path(part), mode) as note:
                file.truncate(have)  # bytes that the note does not cover may be wrong
                file.seek(have)
                while block:
                    if os.fstat(file.fileno()).st_size != have:
                        raise DownloadError(f"another process is writing {part}; try again when it has finished")
                    file.write(block)
                    file.flush()
                    have, crc = have + len(block), zlib.crc32(block, crc)
                    note.seek(0)
                    note.write(format_note(have, crc))
                    note.flush()
                    bar.show(have)
                    block = read_block(response, min(MIB, target - have))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DownloadError("the disk is full" if full else f"cannot write {part}: {error.strerror}") from error
        finally:
            bar.close()
    if have < target:
        raise ConnectionCut(f"the connection was cut after {have:,} of {target:,} bytes; the next call resumes there")


def check_response(response, remote: Remote, have: int, block: bytes) -> None:
    """Raise DownloadError unless `response`, which starts with `block`, is the file from byte `have` on."""
    headers = response.headers
    total = headers.get("Content-Length")
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
        if not found or int(found[1]) != have:
            raise DownloadError("the server sent a different range than requested")
        total = found[2]
    if (encoding := headers.get("Content-Encoding", "identity")) != "identity":
        raise DownloadError(f"the server sent the file encoded as {encoding}, which was not requested")
    page = block.lstrip()[:9].lower().startswith((b"<!doctype", b"<html"))
    if page or "html" in headers.get("Content-Type", ""):
        raise DownloadError("the server sent a web page instead of the file; check for a login page or a filter")
    if not str(total).isdecimal():
        raise DownloadError("the server did not send the size of the file")
    if int(total) != remote.size:
        raise DownloadError(f"wrong size: the server has {int(total):,} bytes, expected {remote.size:,}")


def read_block(response, size: int) -> bytes:
    """Up to `size` bytes, as soon as there are any; b"" at the end."""
    try:
        return response.read1(size) if size else b""
    except TimeoutError as error:
        raise ConnectionCut(f"the server sent nothing for {STALL_SECONDS} s; the next call resumes") from error
    except http.client.IncompleteRead as error:
        return error.partial
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionCut(
            f"the connection was cut ({error or type(error).__name__}); the next call resumes"
        ) from error


def open_url(url: str, headers: dict[str, str]):
    """Open the URL in a thread, because a name look-up has no time-out, and return the response."""
    answer: queue.Queue = queue.Queue()

    def work():
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "stories.py", **headers})
            answer.put(urllib.request.build_opener(Http, Https).open(request, timeout=CONNECT_SECONDS))
        except Exception as error:  # raised again in the caller's thread
            answer.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        response = answer.get(timeout=OPEN_SECONDS)
    except queue.Empty:
        raise DownloadError(f"no answer within {OPEN_SECONDS} s") from None
    if isinstance(response, Exception):
        raise DownloadError(describe_error(response)) from response
    return response


def with_stall_timeout(connection):
    """A subclass of the connection class that waits STALL_SECONDS for data once it is connected."""

    class Connection(connection):
        def connect(self):
            super().connect()
            self.sock.settimeout(STALL_SECONDS)

    return Connection


class Http(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(with_stall_timeout(http.client.HTTPConnection), request)


class Https(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(with_stall_timeout(http.client.HTTPSConnection), request)


def describe_error(error: Exception) -> str:
    """Why a connection failed, in words for the user."""
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


class ProgressBar:
    """A bar on stderr if that is a terminal, else one line every ten seconds."""

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


# == 4  the command line ==============================================================================================


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if --download ended with generated stories, 2 after a user's mistake."""
    parser = Parser(prog="stories.py", description="Text to train on: TinyStories, or generated stories.")
    parser.add_argument("--show", type=int, metavar="N", help="print N generated stories")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stories of --show (default %(default)s)")
    parser.add_argument("--download", type=float, metavar="MB", help="download this many MB (10^6 bytes) to train on")
    parser.add_argument("--out", default="data", metavar="FOLDER", help="folder of the download (default %(default)s)")
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
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"stories.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstories.py: stopped; the same command resumes the download", file=sys.stderr)
        return 130
    print(f"{source.name}: {source.train} {source.valid}")
    return 1 if source.name.startswith("generated") else 0


if __name__ == "__main__":
    sys.exit(main())
