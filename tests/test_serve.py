"""extras/serve.py over sockets of this machine: stories, streams, each limit and its error, clients that go away."""

import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, TINY, invoke, refusal, serving

import bpe
import sample
import tinygpt
from extras import api, serve

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def model():
    tokenizer = bpe.Tokenizer.from_merges([(b"c", b"a"), (b"ca", b"t")])
    flat = tinygpt.init_parameters(TINY, 1) * tinygpt.np.float32(3)
    return tinygpt.views(tinygpt.layout(TINY), flat, TINY.layers), TINY, tokenizer


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as running:
        yield running


@pytest.fixture
def endless(monkeypatch):
    """Stories without an end, a token every 5 ms -> how many are being told."""
    told = []

    def complete(engine, request):
        told.append(request)
        try:
            while True:
                time.sleep(0.005)
                yield {"index": 0, "text": "a", "logprobs": None, "finish_reason": None}
        finally:
            told.remove(request)

    monkeypatch.setattr(serve, "complete", complete)
    return told


def call(server, method="POST", path=PATH, body=None, **headers):
    """One request -> status, headers, body as an object (a page: as bytes)."""
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        found = json.loads(data) if answer.getheader("Content-Type") == "application/json" else data
        return answer.status, dict(answer.getheaders()), found
    finally:
        connection.close()


def complete(server, **fields):
    status, _, found = call(server, body={"seed": 3, "max_tokens": 40, "prompt": "cat"} | fields)
    assert status == 200, found
    return found


def error(answer):
    return answer[0], answer[2]["error"]["message"]


def exchange(server, data, finish=False):
    """Send these bytes -> all that comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data)
        if finish:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while more := connection.recv(1 << 16):
            received += more
    return received


def post(body, *headers):
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def stream(server, **fields):
    """The events of a stream, each as its text."""
    body = {"seed": 3, "max_tokens": 40, "prompt": "cat", "stream": True} | fields
    _, headers, data = call(server, body=body)
    assert headers["Content-Type"] == "text/event-stream"
    events = data.decode().split("\n\n")
    assert events.pop() == "" and all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


def told(model, seed=3, **more):
    default = sample.make_parser().parse_args([])
    words = {name: getattr(default, name) for name in sample.FILTERS} | dict(seed=seed, max_new_tokens=40) | more
    return "".join(sample.generate_story(model, tinygpt.find_ops(), "cat", **words))


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("still not so after 10 s")


# -- stories


def test_a_seed_tells_the_story_of_sample_py(server, model):
    found = complete(server)
    assert found["choices"] == [{"index": 0, "text": told(model), "logprobs": None, "finish_reason": "length"}]
    assert found["object"] == "text_completion" and found["model"] == "tiny" and found["seed"] == 3
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 40, "total_tokens": 42}
    assert complete(server, temperature=0, top_k=5)["choices"][0]["text"] == told(model, temperature=0)


def test_a_stream_is_the_same_story_and_its_counts(server, model):
    *events, last = stream(server)
    assert last == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == told(model) and len(chunks) > 5
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]} and "usage" not in chunks[0]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    *events, counts, _ = stream(server, stream_options={"include_usage": True})
    assert json.loads(counts)["choices"] == [] and json.loads(counts)["usage"]["total_tokens"] == 42
    assert all(json.loads(event)["usage"] is None for event in events)


def test_the_model_is_named_and_described(server):
    _, _, found = call(server, "GET", "/v1/models")
    assert [model["id"] for model in found["data"]] == ["tiny"]
    assert call(server, "GET", "/v1/models/tiny")[2] == found["data"][0]
    _, _, shape = call(server, "GET", "/api/model")
    assert shape["layers"] == TINY.layers and shape["heads"] == TINY.heads and shape["defaults"]["top_p"] == 0.95


def test_attention_is_served(server):
    status, _, found = call(server, path="/api/attention", body={"tokens": [1, 2, 3], "layer": 1, "head": 2})
    assert status == 200 and [len(row) for row in found["attention"]] == [1, 2, 3]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in found["attention"])


def test_the_page_is_served_with_no_other_file(server):
    for path, (file, kind) in serve.PAGE.items():
        status, headers, body = call(server, "GET", path)
        assert status == 200 and headers["Content-Type"] == kind and body == (serve.FOLDER / file).read_bytes()
        assert "default-src 'none'" in headers["Content-Security-Policy"]
    for path in ("/serve.py", "/../serve.py", "/%2e%2e/serve.py", "//etc/passwd", "/page/index.html", "/style.css/"):
        assert call(server, "GET", path)[0] == 404


# -- errors


@pytest.mark.parametrize(
    "method, path, body, status, said",
    [
        ("POST", PATH, b"{", 400, "body: expected a JSON object"),
        ("POST", PATH, b'{"temperature": Infinity}', 400, "Infinity is not JSON"),
        ("POST", PATH, b"[" * 100_000, 400, "nested too deeply"),
        ("POST", PATH, b'{"max_tokens": 1.5}', 400, "max_tokens: expected an integer from 0 to 4096, got 1.5"),
        ("POST", PATH, b'{"model": "other"}', 404, "model: expected tiny"),
        ("POST", PATH, json.dumps({"prompt": "a" * 40}).encode(), 400, "at most seq_len=32 tokens"),
        ("POST", PATH, json.dumps({"prompt": "a" * 40, "stream": True}).encode(), 400, "at most seq_len=32 tokens"),
        ("POST", PATH, json.dumps({"prompt": [9999]}).encode(), 400, "prompt: expected token ids from 0 to 266"),
        ("POST", "/v1/chat/completions", b"{}", 400, "tiny has no chat template"),
        ("POST", "/api/attention", b'{"tokens": [1], "layer": 7}', 400, "layer: expected an integer from 0 to 1"),
        ("GET", PATH, None, 405, "method: expected POST"),
        ("DELETE", "/v1/models", None, 405, "method: expected GET"),
        ("GET", "/v1/engines", None, 404, "path: "),
        ("GET", "/v1/models/other", None, 404, "path: "),
        ("POST", PATH, b" " * (api.MAX_BODY + 1), 413, f"at most {api.MAX_BODY} bytes"),
    ],
)
def test_a_mistake_is_answered_in_openais_shape(server, method, path, body, status, said):
    answer = call(server, method, path, body)
    assert error(answer)[0] == status and said in error(answer)[1]
    assert set(answer[2]["error"]) == {"message", "type", "param", "code"}
    assert ("Allow" in answer[1]) == (status == 405)


@pytest.mark.parametrize(
    "data, status",
    [
        (b"\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/2\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: a\r\nAccept: b\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * serve.HEAD_BYTES + b"\r\n\r\n", 431),
        (b"A" * 4 * serve.HEAD_BYTES, 431),
        (post(b"").replace(b"Content-Length: 0\r\n", b""), 411),
        (post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"), 411),
        (post(b"").replace(b"Content-Length: 0", b"Content-Length: -1"), 400),
        (post(b"").replace(b"Content-Length: 0", b"Content-Length: 1_0"), 400),
        (post(b"").replace(b"Content-Length: 0", b"Content-Length: " + b"9" * 5000), 413),
    ],
)
def test_a_head_is_answered_however_broken(server, data, status):
    assert exchange(server, data).startswith(f"HTTP/1.1 {status} ".encode())


def test_a_client_is_told_to_go_on_with_its_body(server):
    data = exchange(server, post(b'{"max_tokens": 0}', "Expect: 100-continue"))
    assert data.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_other_hosts_and_origins_are_refused(server):
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil.example"):
        assert error(call(server, "GET", "/v1/models", Host=host))[0] == 403
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1:1", "[::1]:8000", "192.168.1.5:8000", "LOCALHOST"):
        assert call(server, "GET", "/v1/models", Host=host)[0] == 200
    for origin in ("http://evil.example", "null", "http://localhost:1", ""):
        status, said = error(call(server, body={}, Host="localhost:8000", Origin=origin))
        assert status == 403 and "expected http://localhost:8000" in said
    assert call(server, body={"max_tokens": 0}, Host="localhost:8000", Origin="http://localhost:8000")[0] == 200


def test_a_key_is_asked_for_but_not_by_the_page(model):
    with serving(model, api_key="s\u00e9same") as server:
        assert call(server, "GET", "/")[0] == 200
        for key in (None, "Bearer", "Bearer wrong", "s\u00e9same", "Basic s\u00e9same"):
            headers = {"Authorization": key.encode()} if key else {}
            for method, path in (("GET", "/v1/models"), ("POST", PATH), ("GET", "/api/model"), ("GET", "/other")):
                answer = call(server, method, path, **headers)
                assert answer[0] == 401 and answer[2]["error"]["code"] == "invalid_api_key"
        assert call(server, "GET", "/v1/models", Authorization="Bearer s\u00e9same".encode())[0] == 200


# -- clients that are slow, go away or are many


def test_a_slow_sender_is_told_that_its_time_is_over(server, monkeypatch):
    monkeypatch.setattr(serve, "READ_SECONDS", 0.2)
    for data in (b"", b"POST ", post(b"{}")[:-1]):
        assert exchange(server, data).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_leaves_early_gets_nothing(server):
    for data in (b"", b"POST ", post(b"{}")[:-1]):
        assert exchange(server, data, finish=True) == b""
    wait_until(lambda: server.connections == 0)


def test_a_client_that_goes_away_frees_its_place(model, endless):
    with serving(model, streams=1, queue=1) as server:
        clients = []
        for body in (b'{"stream": true}', b"{}"):  # one is told a story, one waits
            clients.append(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            clients[-1].sendall(post(body))
            wait_until(lambda: server.engine.active and len(server.engine.waiting) == len(clients) - 1)  # noqa: B023
        assert b"text/event-stream" in clients[0].recv(1 << 16)
        status, headers, _ = call(server, body={})
        assert status == 503 and headers["Retry-After"] == "5"
        clients[1].close()
        wait_until(lambda: not server.engine.waiting)
        clients[0].close()
        wait_until(lambda: not server.engine.active and not endless and server.connections == 0)


def test_a_request_has_so_much_time(server, endless, monkeypatch):
    monkeypatch.setattr(serve, "REQUEST_SECONDS", 0.2)
    status, said = error(call(server, body={}))
    assert status == 504 and "not done within 0.2 s" in said
    events = stream(server)
    assert len(events) > 2 and json.loads(events[-1])["error"]["type"] == "server_error"
    wait_until(lambda: not endless)


def test_a_client_that_does_not_read_is_given_up(server, endless, monkeypatch):
    monkeypatch.setattr(serve, "WRITE_SECONDS", 0.2)
    monkeypatch.setattr(serve, "dump", lambda value: b"a" * 1_000_000)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(post(b'{"stream": true}'))
        wait_until(lambda: endless)
        wait_until(lambda: not endless and server.connections == 0)


def test_a_hundred_idle_connections_do_not_stop_it(server, model):
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(100)]
    try:
        assert complete(server)["choices"][0]["text"] == told(model)
    finally:
        for connection in idle:
            connection.close()


def test_connections_beyond_the_limit_are_told_so(server, monkeypatch):
    wait_until(lambda: server.connections == 0)
    monkeypatch.setattr(serve, "CONNECTIONS", 3)
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(3)]
    wait_until(lambda: server.connections == 3)
    assert error(call(server, "GET", "/v1/models")) == (503, "3 connections are open; try again later")
    for connection in idle:
        connection.close()
    wait_until(lambda: server.connections == 0)
    assert call(server, "GET", "/v1/models")[0] == 200


def test_several_streams_at_once_each_tell_their_own_story(server, model):
    found, seeds = {}, range(12)

    def listen(seed):
        *events, last = stream(server, seed=seed)
        found[seed] = "".join(json.loads(event)["choices"][0]["text"] for event in events)

    threads = [threading.Thread(target=listen, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {seed: told(model, seed) for seed in seeds}
    assert len(server.engine.free) <= server.engine.streams + 1


def random_value(rng, depth=0):
    """A random value of JSON, or of what Python writes as if it were."""
    choices = [None, True, -1, 0, 1, 3, 2.5, 1e308, 10**30, float("nan"), "", "cat", "\ud800", "\u20ac", [1, 2], ["a"]]
    if depth < 3 and rng.random() < 0.3:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and rng.random() < 0.2:
        return {str(rng.choice(choices)): random_value(rng, depth + 1)}
    return rng.choice(choices)


def random_request(rng):
    """The bytes of a request with a random body and a head that is changed at random."""
    names = [*api.CHECKS, "tokens", "layer", "head", "x"]
    found = {name: random_value(rng) for name in rng.sample(names, rng.randrange(4))}
    body = json.dumps({"max_tokens": 2} | found).encode()
    body = body if rng.random() < 0.8 else bytes(rng.randrange(256) for _ in range(rng.randrange(60)))
    data = bytearray(post(body))
    path = rng.choice([PATH, "/v1/chat/completions", "/api/attention", "/", "/v1/models"])
    data = data.replace(PATH.encode(), path.encode(), 1)
    for _ in range(rng.choice([0, 0, 1, 5])):
        where = rng.randrange(len(data))
        data[where : where + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
    return bytes(data)


def test_random_requests_are_answered_and_it_stays_up(server, model, capsys, monkeypatch):
    monkeypatch.setattr(serve, "READ_SECONDS", 0.2)  # of a head or body that ends too early
    rng, statuses = random.Random(5), set()
    for _ in range(400):
        answer = exchange(server, random_request(rng), finish=rng.random() < 0.05)
        statuses.add(answer[9:12])
        assert not answer or answer.startswith(b"HTTP/1.1 "), answer
    assert {b"200", b"400", b"403"} <= statuses and b"500" not in statuses
    assert complete(server)["choices"][0]["text"] == told(model)
    assert "failed" not in capsys.readouterr().err


# -- clients of OpenAI, the command line


def test_the_openai_package_works_unchanged(server, model):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0)
    assert [found.id for found in client.models.list()] == ["tiny"]
    words = dict(model="tiny", prompt="cat", max_tokens=40, seed=3)
    found = client.completions.create(**words, n=2, logprobs=2, stop=["\n\n"], temperature=0.8, top_p=0.95, user="me")
    assert [choice.index for choice in found.choices] == [0, 1] and found.usage.prompt_tokens == 2
    assert found.choices[0].text == told(model, stops=["\n\n"])
    logprobs = found.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    chunks = list(client.completions.create(**words, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == told(model)
    assert chunks[-1].usage.completion_tokens == 40
    with pytest.raises(openai.BadRequestError, match="temperature: expected a number") as caught:
        client.completions.create(**words | {"temperature": -1})
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="expected tiny"):
        client.completions.create(**words | {"model": "other"})
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])


def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "BOX", tmp_path / "none.safetensors")
    assert "no checkpoint in runs/" in refusal(serve.main, "serve.py")
    assert "none.safetensors" in refusal(serve.main, "serve.py", "--checkpoint", "none.safetensors")
    assert "out of range" in invoke(serve.main, "--port", 70000)[2]


def test_without_a_run_it_serves_the_model_in_the_box(tmp_path):
    words = [sys.executable, ROOT / "extras" / "serve.py", "--port", "0", "--kernels", "numpy"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, cwd=tmp_path, text=True) as process:
        try:
            port = int([process.stderr.readline() for _ in range(2)][1].split("  ")[0].rsplit(":", 1)[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/v1/models")
            assert json.loads(connection.getresponse().read())["data"][0]["id"] == "stories"
        finally:
            process.kill()


def test_it_starts_from_a_checkpoint_and_names_it_by_its_run(tmp_path, model):
    path = tmp_path / "mine" / "last.safetensors"
    path.parent.mkdir()
    flat = tinygpt.init_parameters(TINY, 1)
    tinygpt.save_checkpoint(path, flat, TINY, model[2].to_json())
    words = [sys.executable, ROOT / "extras" / "serve.py", "--checkpoint", path, "--port", "0", "--kernels", "numpy"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, cwd=tmp_path, text=True) as process:
        try:
            lines = [process.stderr.readline() for _ in range(2)]
            port = int(lines[1].split("  ")[0].rsplit(":", 1)[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/v1/models")
            assert json.loads(connection.getresponse().read())["data"][0]["id"] == "mine"
            connection.close()
            with socket.create_server(("127.0.0.1", 0)) as taken:
                busy = [*words[:-3], str(taken.getsockname()[1]), *words[-2:]]
                done = subprocess.run(busy, capture_output=True, cwd=tmp_path, text=True, timeout=120)
            assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("serve.py: error: ")
            with socket.create_connection(("127.0.0.1", port), timeout=60):  # open: the end does not wait for it
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 130
        finally:
            process.kill()
