"""extras/stories.py: the download against a server on this machine, and files of generated stories."""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from extras import generate, locks, stories

MIB = 1 << 20


def corpus(num_bytes, word):
    """Exactly `num_bytes` of stories in the data set's layout, cut anywhere."""
    lines = (f"Story {i} tells of a {word}.\n{stories.END}\n" for i in itertools.count())
    text, size = [], 0
    while size < num_bytes:
        text.append(next(lines))
        size += len(text[-1])
    return "".join(text)[:num_bytes].encode()


TRAIN_BYTES = corpus(2 * MIB + 12_345, "fox")
VALID_BYTES = corpus(200_001, "hen")


def range_of(wanted, total):
    return f"bytes {wanted[len('bytes=') :]}/{total}"


class Handler(BaseHTTPRequestHandler):
    """Serves the two files; `server.mode` names what goes wrong."""

    def do_GET(self):
        server = self.server
        name = self.path.rsplit("/", 1)[-1]
        wanted = self.headers.get("Range")
        server.requests.append((name, wanted))
        body = server.files[name]
        if server.mode == "missing":
            return self.send_error(404)
        if server.mode in ("page", "disguised page"):
            page = b"<!DOCTYPE html><html><body>Please log in</body></html>"
            kind = "text/html; charset=utf-8" if server.mode == "page" else "text/plain"
            return self.reply(200, page, {"Content-Type": kind})
        if server.mode == "page at the range" and wanted:
            return self.reply(206, b"<html>Log in again</html>", {"Content-Range": range_of(wanted, len(body))})
        if server.mode == "redirect for ever":
            self.send_response(302)
            self.send_header("Location", self.path)
            return self.end_headers()
        if server.mode == "no range left" and wanted:
            return self.send_error(416)
        if server.mode == "no HTTP":
            self.wfile.write(b"220 mail.example.org ESMTP\r\n\r\n")
            return None
        if server.mode == "compressed":
            return self.reply(200, gzip.compress(body), {"Content-Encoding": "gzip"})
        if server.mode in ("no size", "a size of letters", "a negative size"):
            size = {"a size of letters": "many", "a negative size": -1}.get(server.mode)
            return self.reply(200, body, {"Content-Length": size})
        if server.mode == "short ranges" and wanted:
            first = int(wanted[len("bytes=") :].split("-")[0])
            wanted = f"bytes={first}-{min(first + 400_000, len(body)) - 1}"
        if server.mode == "other total" and wanted:
            return self.reply(206, body, {"Content-Range": range_of(wanted, 10**15)})
        if server.mode == "redirect" and "moved" not in self.path:
            self.send_response(302)
            self.send_header("Location", f"/moved/{name}")
            return self.end_headers()
        if server.mode == "other size":
            body = body[:-7]
        if server.mode == "other contents":
            body = b"X" + body[1:]
        if wanted is None or server.mode == "no ranges":
            return self.reply(200, body, {})
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
        first += server.mode == "other range"
        self.reply(206, body[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(body)}"})

    def reply(self, status, body, headers):
        self.send_response(status)
        for key, value in {"Content-Type": "text/plain", "Content-Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        if self.server.mode == "stall":
            self.wfile.write(body[:1000])
            self.wfile.flush()
            return self.server.released.wait(20)
        self.server.sent += len(body)  # before writing: the client may finish before this thread runs again
        with contextlib.suppress(OSError):  # some tests make the client close the connection early
            if self.server.mode == "slow":
                for start in range(0, len(body), 50_000):
                    self.wfile.write(body[start : start + 50_000])
                    time.sleep(0.02)
            else:
                self.wfile.write(body if cut is None else body[:cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.mode, server.cuts, server.requests, server.sent = "", [], [], 0
    server.released = threading.Event()
    server.files = {stories.TRAIN.name: TRAIN_BYTES, stories.VALID.name: VALID_BYTES}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for remote, body in (("TRAIN", TRAIN_BYTES), ("VALID", VALID_BYTES)):
        sha256 = hashlib.sha256(body).hexdigest()
        monkeypatch.setattr(stories, remote, getattr(stories, remote)._replace(size=len(body), expected=sha256))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


PROCESS = """
import sys
from extras import stories
for name, size, sha256 in (sys.argv[3:6], sys.argv[6:9]):
    setattr(stories, name, getattr(stories, name)._replace(size=int(size), expected=sha256))
source = stories.get(sys.argv[1], int(sys.argv[2]))
print(source.name, source.train, sep="\\n")
"""


def start(folder, num_bytes):
    """Start a process that calls get() with the files of this process's server."""
    words = [sys.executable, "-c", PROCESS, folder, num_bytes]
    for name in ("TRAIN", "VALID"):
        words += [name, getattr(stories, name).size, getattr(stories, name).expected]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*map(str, words)], cwd=Path(stories.__file__).parents[1], **pipes)


def finish(process):
    """Wait for a process that must succeed -> (name, path of the training stories, stderr)."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    name, path = out.splitlines()
    return name, Path(path), err


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def put_part(folder, data):
    """Write the files of a download that was interrupted after these bytes."""
    part = folder / (stories.TRAIN.name + ".part")
    part.write_bytes(data)
    stories.note_path(part).write_bytes(stories.format_note(len(data), zlib.crc32(data)))
    return part


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in (
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(stories, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(stories, "VALID_BYTES", 30_000)


def fails(folder, capsys, reason, name=stories.TRAIN.name, num_bytes=100_000):
    """Check that get() prints one line (reason, URL, path for a copy) and returns generated stories."""
    source = stories.get(folder, num_bytes)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n"), err
    for part in (reason, "/datasets/roneneldan/TinyStories/resolve/main/" + name, str(folder / name), "generated"):
        assert part in err
    assert source.name == "generated stories, seed 0"
    assert source.train.stat().st_size >= num_bytes
    assert source.valid.stat().st_size >= stories.VALID_BYTES
    return source


# == 1  choosing the text =============================================================================================


def test_whole_files_are_downloaded_and_checked(server, tmp_path, capsys):
    source = stories.get(tmp_path, 10**9)
    assert source.train.read_bytes() == TRAIN_BYTES and source.valid.read_bytes() == VALID_BYTES
    assert source.name == "TinyStoriesV2" and source.train == tmp_path / "TinyStoriesV2-GPT4-train.txt"
    assert [wanted for _, wanted in server.requests] == [None, None]
    assert not list(tmp_path.glob("*.part")) and capsys.readouterr().err == ""


def test_a_small_request_downloads_a_prefix(server, tmp_path):
    source = stories.get(tmp_path, 900_000)
    assert server.requests[0] == (stories.TRAIN.name, f"bytes=0-{MIB - 1}")
    assert server.sent == MIB + len(VALID_BYTES)
    text = source.train.read_bytes()
    assert text.endswith(stories.END.encode()) and TRAIN_BYTES.startswith(text)
    assert 900_000 <= len(text) < MIB and source.name == "TinyStoriesV2 (first 1 MiB)"


@pytest.mark.parametrize("num_bytes", [MIB - 1, MIB, MIB + 1])
def test_the_prefix_has_at_least_the_requested_bytes(server, tmp_path, num_bytes):
    assert stories.get(tmp_path, num_bytes).train.stat().st_size >= num_bytes


def test_a_later_call_for_more_resumes_where_the_first_ended(server, tmp_path):
    small = stories.get(tmp_path, 900_000).train
    have = small.stat().st_size
    server.requests.clear()
    large = stories.get(tmp_path, 1_500_000)
    assert server.requests == [(stories.TRAIN.name, f"bytes={have}-{2 * MIB - 1}")]
    assert large.train.stat().st_size >= 1_500_000 and TRAIN_BYTES.startswith(large.train.read_bytes())
    whole = stories.get(tmp_path, 10**9)
    assert whole.train.read_bytes() == TRAIN_BYTES


def test_existing_files_are_used_without_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stories, "open_url", lambda *_: pytest.fail("used the network"))
    (tmp_path / stories.TRAIN.name).write_text("Mine.")
    (tmp_path / stories.VALID.name).write_text("Mine, too.")
    source = stories.get(tmp_path, 10**9)
    assert source.train.read_text() == "Mine." and source.valid.read_text() == "Mine, too."
    assert source.name == "TinyStoriesV2" and capsys.readouterr().err == ""


def test_a_part_that_is_large_enough_is_used_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    part = put_part(tmp_path, TRAIN_BYTES[:MIB])
    (tmp_path / stories.VALID.name).write_text("Mine.")
    text = stories.get(tmp_path, 1_000_000).train.read_bytes()
    assert TRAIN_BYTES.startswith(text) and text.endswith(stories.END.encode()) and not part.exists()
    assert stories.get(tmp_path, 1_000_000).train.read_bytes() == text
    assert stories.get(tmp_path, 1_100_000).name.startswith("generated")  # negative control: not enough


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_means_no_connection(server, tmp_path, capsys, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    fails(tmp_path, capsys, "HF_HUB_OFFLINE is set")
    assert server.requests == []


def test_offline_zero_means_online(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert stories.get(tmp_path, 1000).name.startswith("TinyStoriesV2")


def test_an_installed_package_named_extras_does_not_hide_ours(tmp_path):
    (tmp_path / "extras").mkdir()
    (tmp_path / "extras" / "__init__.py").write_text("")
    command = [sys.executable, "-c", "from extras import stories"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run(command, env=environment, cwd=Path(stories.__file__).parents[1], check=True)


# == 2  the download ==================================================================================================


def test_a_cut_connection_is_resumed_within_the_call(server, tmp_path, capsys):
    server.cuts = [500_000, 300_000]
    source = stories.get(tmp_path, 10**9)
    assert [wanted for _, wanted in server.requests[:3]] == [None] + [
        f"bytes={have}-{len(TRAIN_BYTES) - 1}" for have in (500_000, 800_000)
    ]
    assert source.train.read_bytes() == TRAIN_BYTES and capsys.readouterr().err == ""


def test_a_connection_cut_repeatedly_keeps_the_bytes_received(server, tmp_path, capsys):
    server.cuts = [300_000, 200_000, 100_000]
    fails(tmp_path, capsys, "the connection was cut after 600,000 of")
    server.requests.clear()
    source = stories.get(tmp_path, 10**9)
    assert server.requests[0] == (stories.TRAIN.name, f"bytes=600000-{len(TRAIN_BYTES) - 1}")
    assert source.train.read_bytes() == TRAIN_BYTES


def test_a_server_without_ranges_starts_over(server, tmp_path):
    put_part(tmp_path, b"something else" * 1000)
    server.mode = "no ranges"
    source = stories.get(tmp_path, 900_000)
    assert server.requests[0][1] == f"bytes=14000-{MIB - 1}"
    assert TRAIN_BYTES.startswith(source.train.read_bytes()) and source.train.stat().st_size <= MIB


def test_a_part_of_another_file_fails_the_hash_and_is_deleted(server, tmp_path, capsys):
    part = put_part(tmp_path, b"something else" * 1000)
    fails(tmp_path, capsys, "wrong contents", num_bytes=len(TRAIN_BYTES))
    assert not part.exists()
    assert stories.get(tmp_path, 10**9).train.read_bytes() == TRAIN_BYTES


def test_a_prefix_of_another_file_fails_the_hash_and_is_deleted(server, tmp_path, capsys):
    server.mode = "other contents"
    assert stories.get(tmp_path, 900_000).name.startswith("generated")  # its validation stories are wrong
    assert stories.list_prefixes(stories.TRAIN, tmp_path)
    server.mode = ""
    capsys.readouterr()
    fails(tmp_path, capsys, "wrong contents", num_bytes=len(TRAIN_BYTES))
    assert not list(tmp_path.glob("Tiny*"))
    assert stories.get(tmp_path, 10**9).train.read_bytes() == TRAIN_BYTES


def test_redirections_keep_the_range(server, tmp_path):
    server.mode = "redirect"
    assert stories.get(tmp_path, 900_000).name == "TinyStoriesV2 (first 1 MiB)"
    assert server.requests[1] == (stories.TRAIN.name, f"bytes=0-{MIB - 1}")


@pytest.mark.parametrize(
    "mode, reason",
    [
        ("missing", "the server answered 404"),
        ("page", "a web page instead of the file"),
        ("disguised page", "a web page instead of the file"),
        ("other size", "wrong size"),
        ("other range", "a different range than requested"),
        ("other total", "wrong size: the server has 1,000,000,000,000,000 bytes"),
        ("redirect for ever", "the server answered 302"),
        ("no range left", "the server answered 416"),
        ("no HTTP", "the connection failed: "),
        ("compressed", "encoded as gzip"),
        ("no size", "did not send the size"),
        ("a size of letters", "did not send the size"),
        ("a negative size", "did not send the size"),
    ],
)
def test_a_wrong_answer_is_one_line_and_generated_stories(server, tmp_path, capsys, mode, reason):
    server.mode = mode
    fails(tmp_path, capsys, reason)
    assert not list(tmp_path.glob("*.part"))


def test_a_wrong_hash_is_one_line_and_generated_stories(server, tmp_path, capsys):
    server.mode = "other contents"
    fails(tmp_path, capsys, "wrong contents: sha256", num_bytes=len(TRAIN_BYTES))
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / stories.TRAIN.name).exists()


def test_wrong_validation_stories_are_named(server, tmp_path, capsys):
    server.mode = "other contents"  # a partial training file has no hash to fail
    fails(tmp_path, capsys, "wrong contents", name=stories.VALID.name)


def test_a_page_in_the_middle_of_a_download_leaves_the_part_unchanged(server, tmp_path, capsys):
    part, server.mode = put_part(tmp_path, TRAIN_BYTES[:5000]), "page at the range"
    fails(tmp_path, capsys, "a web page instead of the file")
    assert part.read_bytes() == TRAIN_BYTES[:5000]
    server.mode = ""
    assert stories.get(tmp_path, 10**9).train.read_bytes() == TRAIN_BYTES


def test_the_rest_of_a_range_that_came_short_is_requested(server, tmp_path):
    server.mode = "short ranges"
    assert TRAIN_BYTES.startswith(stories.get(tmp_path, 900_000).train.read_bytes())
    starts = [int(wanted[len("bytes=") :].split("-")[0]) for _, wanted in server.requests if wanted]
    assert starts[:3] == [0, 400_000, 800_000]


def test_a_stall_ends_and_keeps_the_bytes_received(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stories, "STALL_SECONDS", 0.2)
    server.mode = "stall"
    fails(tmp_path, capsys, "the server sent nothing for 0.2 s")
    assert (tmp_path / (stories.TRAIN.name + ".part")).stat().st_size >= 1000


def test_a_refused_connection_is_one_line(tmp_path, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    fails(tmp_path, capsys, "the connection was refused")


def test_a_name_that_does_not_resolve_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    monkeypatch.setattr(stories, "OPEN_SECONDS", 8)
    source = stories.get(tmp_path, 1000)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and source.name.startswith("generated")
    assert "cannot be resolved" in err or "no answer within 8 s" in err  # the resolver may be slower than we wait


def test_a_server_that_never_answers_ends_in_one_line(tmp_path, capsys, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(stories, "OPEN_SECONDS", 0.3)
        fails(tmp_path, capsys, "no answer within 0.3 s")


# -- several processes, killed processes


def test_processes_that_start_at_once_download_once_and_get_the_same_stories(server, tmp_path):
    server.mode = "slow"
    found = [finish(process) for process in [start(tmp_path, 900_000) for _ in range(3)]]
    assert len({path for _, path, _ in found}) == 1 and server.sent == MIB + len(VALID_BYTES)
    assert {name for name, _, _ in found} == {"TinyStoriesV2 (first 1 MiB)"}
    assert TRAIN_BYTES.startswith(found[0][1].read_bytes())
    assert sum("another process is writing" in err for _, _, err in found) >= 1


def test_processes_that_need_different_amounts_all_get_true_stories(server, tmp_path):
    server.mode = "slow"
    for process, num_bytes in [(start(tmp_path, num_bytes), num_bytes) for num_bytes in (900_000, 1_500_000, 10**9)]:
        name, path, _ = finish(process)
        assert name.startswith("TinyStoriesV2") and TRAIN_BYTES.startswith(path.read_bytes())
        assert path.stat().st_size >= min(num_bytes, len(TRAIN_BYTES))


def test_a_waiting_process_says_so_in_one_line_and_then_uses_the_files(server, tmp_path):
    with open(tmp_path / "stories.lock", "ab") as lock:
        assert locks.lock_file(lock)
        waiting = start(tmp_path, 900_000)
        line = waiting.stderr.readline()
        path = tmp_path / stories.TRAIN.name
        assert line == f"stories: another process is writing {path}; waiting ...\n" and not server.requests
        path.write_bytes(TRAIN_BYTES)
        (tmp_path / stories.VALID.name).write_bytes(VALID_BYTES)
    assert finish(waiting) == ("TinyStoriesV2", path, "") and not server.requests


def test_a_killed_download_is_resumed_and_leaves_no_lock(server, tmp_path, capsys):
    server.mode, part = "slow", tmp_path / (stories.TRAIN.name + ".part")
    process = start(tmp_path, 10**9)
    wait_for(lambda: stories.file_size(part) > 400_000)
    process.kill()
    process.communicate()
    server.mode, have = "", stories.check_note(part)[0]
    server.requests.clear()
    assert stories.get(tmp_path, 10**9).train.read_bytes() == TRAIN_BYTES and capsys.readouterr().err == ""
    assert have > 300_000 and server.requests[0][1] == f"bytes={have}-{len(TRAIN_BYTES) - 1}"


def test_bytes_that_the_note_does_not_cover_are_downloaded_again(server, tmp_path):
    part = put_part(tmp_path, TRAIN_BYTES[:500_000])
    with open(part, "ab") as file:
        file.write(TRAIN_BYTES[:500_000])  # the same stories twice
    text = stories.get(tmp_path, 900_000).train.read_bytes()
    assert server.requests[0][1] == f"bytes=500000-{MIB - 1}" and TRAIN_BYTES.startswith(text)


@pytest.mark.parametrize("damage", ["no note", "other bytes", "fewer bytes", "an empty note"])
def test_a_damaged_part_is_downloaded_again(server, tmp_path, damage):
    part = put_part(tmp_path, TRAIN_BYTES[:500_000] * 2 if damage == "no note" else TRAIN_BYTES[:MIB])
    if damage == "no note":  # written by an earlier version, possibly by two processes
        stories.note_path(part).unlink()
    if damage == "other bytes":
        part.write_bytes(b"X" + TRAIN_BYTES[1:MIB])
    if damage == "fewer bytes":
        os.truncate(part, MIB - 1)
    if damage == "an empty note":
        stories.note_path(part).write_bytes(b"")
    text = stories.get(tmp_path, 900_000).train.read_bytes()
    assert server.requests[0][1] == f"bytes=0-{MIB - 1}" and TRAIN_BYTES.startswith(text)


@pytest.mark.parametrize("damaged", [lambda text: b"X" + text[1:], lambda text: text[:-1], lambda text: text + b"X"])
def test_a_prefix_is_checked_before_it_is_used_again(server, tmp_path, damaged):
    first = stories.get(tmp_path, 900_000).train
    text = first.read_bytes()
    first.write_bytes(damaged(text))
    assert stories.get(tmp_path, 900_000).train.read_bytes() == text
    first.write_bytes(damaged(text))
    assert TRAIN_BYTES.startswith(stories.get(tmp_path, 1_500_000).train.read_bytes())


@pytest.mark.parametrize("num_bytes", [1_500_000, 10**9])
def test_a_prefix_does_not_change_while_more_is_downloaded(server, tmp_path, num_bytes):
    first = stories.get(tmp_path, 900_000).train
    before, modified = first.read_bytes(), first.stat().st_mtime_ns
    assert stories.get(tmp_path, num_bytes).train != first
    assert first.read_bytes() == before and first.stat().st_mtime_ns == modified
    os.utime(first, (1, 1))  # a day old: no run reads it any more
    (tmp_path / stories.TRAIN.name).unlink(missing_ok=True)
    stories.get(tmp_path, 10**9)
    assert not first.exists() and not stories.note_path(first).exists()


def test_a_second_writer_of_a_part_is_detected_at_the_next_block(server, tmp_path, capsys, monkeypatch):
    """As on a file system without locks."""
    part, read, added = tmp_path / (stories.TRAIN.name + ".part"), stories.read_block, []

    def meddle(response, size):
        block = read(response, min(size, 100_000))
        if stories.file_size(part) >= 300_000 and not added:
            with open(part, "ab") as file:
                added.append(file.write(block))
        return block

    monkeypatch.setattr(stories, "read_block", meddle)
    fails(tmp_path, capsys, "another process is writing")
    monkeypatch.setattr(stories, "read_block", read)
    assert TRAIN_BYTES.startswith(stories.get(tmp_path, 900_000).train.read_bytes())


def no_locks(_):
    raise OSError(stories.errno.ENOLCK, "No locks available")


def test_without_locks_one_line_says_so_and_the_download_continues(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "lock_file", no_locks)
    assert stories.get(tmp_path, 900_000).name.startswith("TinyStoriesV2")
    assert f"cannot lock {tmp_path} (No locks available)" in capsys.readouterr().err.splitlines()[0]


def test_existing_files_are_used_without_a_lock(server, tmp_path, monkeypatch):
    """The user may have no permission to write there."""
    stories.get(tmp_path, 900_000)
    stories.write_generated(tmp_path, 10_000)
    monkeypatch.setattr(stories, "folder_lock", lambda _: pytest.fail("took the lock"))
    assert stories.get(tmp_path, 900_000).name == "TinyStoriesV2 (first 1 MiB)"
    assert stories.write_generated(tmp_path, 10_000).train.exists()


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_only_a_trusted_certificate_is_accepted(server, tmp_path, capsys, monkeypatch):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    make += ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # the client closes the connection if it does not trust the certificate
    monkeypatch.setenv("HF_ENDPOINT", f"https://localhost:{server.server_address[1]}")
    fails(tmp_path, capsys, "the server's certificate is not trusted")
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    assert stories.get(tmp_path, 1000).name == "TinyStoriesV2 (first 1 MiB)"


def test_a_full_disk_is_one_line(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stories.shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    fails(tmp_path, capsys, "the disk is full")
    assert server.requests == []


def test_a_disk_that_fills_up_is_one_line(server, tmp_path, capsys, monkeypatch):
    class Full(stories.ProgressBar):
        def show(self, have):
            raise OSError(stories.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stories, "ProgressBar", Full)
    fails(tmp_path, capsys, "the disk is full")


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = stories.ProgressBar("file", 0, 2_000_000)
    bar.show(2_000_000)
    bar.close()
    err = capsys.readouterr().err
    assert err.startswith("\rfile [########################] 2.0 of 2.0 MB | ") and "MB/s | 0:00 left" in err


# == 3  generated files ===============================================================================================


def test_generated_files_have_the_layout_of_the_data_set(tmp_path):
    source = stories.write_generated(tmp_path, 100_000)
    text = source.train.read_bytes().decode("ascii")
    found = text.split(f"\n{stories.END}\n")
    assert found.pop() == "" and len(found) == len(set(found)) and len(text) >= 100_000
    assert found == list(dict.fromkeys(itertools.islice(stories.generate(0), len(found))))
    assert not set(found) & set(source.valid.read_text().split(f"\n{stories.END}\n")[:-1])
    assert not list(tmp_path.glob("*.tmp"))


def test_generated_files_are_reused_while_they_are_current(tmp_path, monkeypatch):
    source = stories.write_generated(tmp_path, 100_000)
    before = source.train.read_bytes()

    def untouched(num_bytes, seed=0):
        os.utime(source.train, (1, 1))
        stories.write_generated(tmp_path, num_bytes, seed)
        return source.train.stat().st_mtime == 1

    assert untouched(100_000) and untouched(50_000)
    assert not untouched(150_000) and source.train.read_bytes().startswith(before)
    assert not untouched(1000, seed=1)
    source.train.write_bytes(before[:-5])  # truncated
    assert not untouched(1000, seed=1)
    grammar = tmp_path / "plots.txt"
    grammar.write_text(generate.GRAMMAR.read_text("utf-8").replace("Lily, ", "Zora, "), "utf-8")
    monkeypatch.setattr(generate, "GRAMMAR", grammar)
    assert not untouched(1000, seed=1)
    (tmp_path / "generated.json").write_text("{")
    assert not untouched(1000, seed=1)
    assert json.loads((tmp_path / "generated.json").read_text())["seed"] == 1


def test_processes_that_generate_at_once_write_whole_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sizes = (400_000, 3_000_000, 3_000_000, 500_000)
    for process, num_bytes in [(start(tmp_path, num_bytes), num_bytes) for num_bytes in sizes]:
        name, path, _ = finish(process)
        assert name == "generated stories, seed 0" and path.stat().st_size >= num_bytes
    made = list(itertools.islice(stories.generate(0), 20_000))
    assert path.read_bytes().decode().split(f"\n{stories.END}\n")[:-1] == list(dict.fromkeys(made))[: count(path)]
    monkeypatch.setattr(stories, "generate", lambda *_: pytest.fail("generated again"))
    stories.write_generated(tmp_path, 3_000_000)
    files = ["generated-train.txt", "generated-valid.txt", "generated.json", "stories.lock"]
    assert sorted(os.listdir(tmp_path)) == files


def count(path):
    return path.read_bytes().count(stories.END.encode())


def test_two_writers_of_generated_stories_never_write_to_one_file(tmp_path, monkeypatch):
    """Even without locks: each writes to a file of its own and renames it when it is whole."""
    monkeypatch.setattr(locks, "lock_file", no_locks)
    real, inner = stories.generate, []

    def generate(seed, split="train"):
        for i, story in enumerate(real(seed, split)):
            if i == 50 and not inner:
                inner.append(True)
                stories.write_generated(tmp_path, 60_000)
            yield story

    monkeypatch.setattr(stories, "generate", generate)
    source = stories.write_generated(tmp_path, 60_000)
    found = source.train.read_text().split(f"\n{stories.END}\n")[:-1]
    assert found == list(itertools.islice(real(0), len(found))) and source.train.stat().st_size >= 60_000
    assert sorted(os.listdir(tmp_path))[:3] == ["generated-train.txt", "generated-valid.txt", "generated.json"]


# == 4  the command line ==============================================================================================


def test_show_prints_stories(capsys):
    assert stories.main(["--show", "3", "--seed", "9"]) == 0
    found = capsys.readouterr().out.split(f"\n{stories.END}\n")
    assert found == [*itertools.islice(stories.generate(9), 3), ""]


def test_download_names_the_files(server, tmp_path, capsys):
    assert stories.main(["--download", "0.5", "--out", str(tmp_path)]) == 0
    assert "TinyStoriesV2 (first 1 MiB): " in capsys.readouterr().out
    server.mode = "missing"
    assert stories.main(["--download", "2", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    "argv", [[], ["--show", "0"], ["--show", "x"], ["--download", "-1"], ["--download", "nan"], ["--nonsense"]]
)
def test_a_mistake_is_one_line_and_status_2(argv, capsys):
    assert stories.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("stories.py: error: ") and err.count("\n") == 1


def test_an_unwritable_folder_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert stories.main(["--download", "1", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("stories.py: error: ")


def test_a_reader_that_closes_the_pipe_causes_no_error(tmp_path):
    words = [sys.executable, stories.__file__, "--show", "20000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)
