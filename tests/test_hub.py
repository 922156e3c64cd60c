"""extras/hub.py: models come from a hub on this machine, are checked, and are converted."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from helpers import transformers_files

import bpe
import tinygpt
from extras import convert, hub, stories

TOKENIZER = bpe.Tokenizer([b"a", b"b", b"ab", b"<|endoftext|>"], [(b"a", b"b")], {"<|endoftext|>": 3})
COMMIT = "c0ffee" * 6 + "abcd"


class Handler(BaseHTTPRequestHandler):
    """The list of files of OWNER/REPO, and the files, of one commit alone."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        if self.path == "/api/models/owner/repo?blobs=true":
            return self.reply(200, server.listing if server.listing is not None else listing(server.files))
        name = self.path.removeprefix(f"/owner/repo/resolve/{COMMIT}/")
        if name not in server.files:
            return self.send_error(404)
        body, wanted = server.changed.get(name, server.files[name]), self.headers.get("Range")
        if not wanted:
            return self.reply(200, body)
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
        self.reply(206, body[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(body)}"})

    def reply(self, status, body, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts and "safetensors" in self.path else None
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *args):
        pass


def listing(files):
    """What the hub says of these files: those of tensors are hashed by SHA-256, small ones as Git does it."""
    entries = []
    for name, data in files.items():
        entry = {
            "rfilename": name,
            "size": len(data),
            "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        }
        if "model" in name:
            entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        entries.append(entry)
    return json.dumps({"id": "owner/repo", "sha": COMMIT, "siblings": entries}).encode()


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files = transformers_files("gpt_neo") | {"tokenizer.json": TOKENIZER.to_json().encode()}
    server.files |= {"README.md": b"# a model", "onnx/model.onnx": b"x", "training_args.bin": b"x", "vocab.json": b"{}"}
    server.requests, server.cuts, server.changed, server.listing = [], [], {}, None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setattr(stories, "PAUSE_SECONDS", 0)
    yield server
    server.shutdown()
    server.server_close()


def fetch(folder):
    return convert.main(["--from", "hf:owner/repo", str(folder / "model.safetensors")])


def refusal(folder, capsys):
    """The line of a command that must fail."""
    with pytest.raises(SystemExit) as left:
        fetch(folder)
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1, err
    return err


def test_a_model_of_the_hub_becomes_a_checkpoint(server, tmp_path):
    assert fetch(tmp_path) == 0
    found = tinygpt.load_checkpoint(tmp_path / "model.safetensors")
    folder = tmp_path / "owner--repo"
    config = convert.read_config(folder / "config.json")
    expected, cfg = convert.from_transformers(config, convert.read_tensors([folder / "model.safetensors"]))
    assert found.cfg == cfg and np.array_equal(found.parameters, expected)
    assert bpe.Tokenizer.from_json(found.tokenizer).hash == TOKENIZER.hash
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == server.files[name]
    asked = [path.rsplit("/", 1)[-1] for path, _ in server.requests[1:]]
    assert asked == ["config.json", "model.safetensors", "tokenizer.json"]  # and no others


def test_files_that_are_there_are_checked_and_not_fetched_again(server, tmp_path, capsys):
    fetch(tmp_path)
    del server.requests[:]
    assert fetch(tmp_path) == 0 and len(server.requests) == 1
    (tmp_path / "owner--repo" / "config.json").write_bytes(b"{}")
    capsys.readouterr()
    assert "config.json is not the file that the hub has; remove it" in refusal(tmp_path, capsys)


def test_a_download_that_is_cut_resumes(server, tmp_path, capsys):
    server.cuts = [500]
    assert fetch(tmp_path) == 0  # within the call
    size = len(server.files["model.safetensors"])
    assert [r for path, r in server.requests if "safetensors" in path] == [None, f"bytes=500-{size - 1}"]
    server.cuts = [700, 0]
    other = tmp_path / "other"
    other.mkdir()
    capsys.readouterr()
    assert "the connection was cut after 700 of" in refusal(other, capsys)
    assert fetch(other) == 0
    assert server.requests[-2][1] == f"bytes=700-{size - 1}"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_other_contents_than_the_hub_lists_are_refused(name, server, tmp_path, capsys):
    data = server.files[name]
    server.changed[name] = data[:-1] + bytes([data[-1] ^ 1])
    kind = "sha1" if name == "config.json" else "sha256"
    assert f"wrong contents: {kind} is " in refusal(tmp_path, capsys)
    assert not (tmp_path / "owner--repo" / name).exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda server: server.files.pop("config.json"), "the repository has no config.json: expected config.json"),
        (lambda server: server.files.pop("model.safetensors"), "has no file of tensors: expected model"),
        (
            lambda server: [server.files.pop(x) for x in ("tokenizer.json", "vocab.json")],
            "has no tokenizer: expected",
        ),
        (lambda server: setattr(server, "listing", b"<html>"), "the hub's list of files is not one (JSONDecodeError)"),
        (lambda server: setattr(server, "listing", b"[]"), "the hub's list of files is not one (TypeError)"),
        (lambda server: setattr(server, "listing", b'{"sha": "a"}'), "the hub's list of files is not one (KeyError)"),
        (
            lambda server: setattr(server, "listing", listing(server.files).replace(b'"size": ', b'"size": -')),
            "the hub's list of files has no size and hash of config.json",
        ),
    ],
)
def test_a_repository_that_lacks_something_is_one_line(change, message, server, tmp_path, capsys):
    change(server)
    assert message in refusal(tmp_path, capsys)
    assert not (tmp_path / "owner--repo").exists()


def test_a_pickle_is_fetched_where_there_are_no_safetensors():
    names = ["config.json", "pytorch_model.bin", "merges.txt", "vocab.json", "model.bin", "a/model.safetensors"]
    assert hub.choose(names) == ["config.json", "pytorch_model.bin", "merges.txt", "vocab.json"]
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"]
    assert hub.choose([*names, "pytorch_model.bin"]) == names


def test_no_connection_is_one_line(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "hf:owner/repo is not fetched: the connection was refused" in refusal(tmp_path, capsys)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "hf:owner/repo is not fetched: HF_HUB_OFFLINE is set" in refusal(tmp_path, capsys)
    assert not server.requests
