"""Serve stories: a page to play with, and the API of OpenAI's completions.

    python extras/serve.py
    python extras/serve.py --checkpoint runs/1m/last.safetensors --port 8000 --api-key KEY

Two threads: an event loop that speaks HTTP, and an `Engine` that computes everything, a token of each active request in
turn. A connection carries one request and is closed after its answer. docs/serve.md has the API, its limits and their
errors. Read api.py (what a request may say), engine.py (what is computed), then this file: HTTP.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import sys
import threading
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import sample
import tinygpt
from extras import api
from extras.api import Refused
from extras.engine import Engine, Job, attend, busy, complete

CONNECTIONS = 256
HEAD_BYTES = 1 << 14  # of a request's line and headers
READ_SECONDS = 10  # to send a request, all of it
WRITE_SECONDS = 10  # to take what was written
REQUEST_SECONDS = 120  # from a request to the end of its answer

# == 1  HTTP ===========================================================================================================

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found"}
REASONS |= {405: "Method Not Allowed", 408: "Request Timeout", 411: "Length Required", 413: "Content Too Large"}
REASONS |= {431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable"}
REASONS |= {504: "Gateway Timeout"}
ONCE = {"host", "origin", "authorization", "content-length", "transfer-encoding"}  # headers that are acted on
FOLDER = Path(__file__).resolve().parent / "page"
PAGE = {  # path of a request -> file of the page, its type: no other file is ever opened
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SAFE = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Request(NamedTuple):
    method: str
    path: str
    headers: dict
    body: bytes


def head_of(status, kind, more):
    """The bytes of an answer before its body."""
    headers = {"Content-Type": kind, "Connection": "close", "Cache-Control": "no-store"} | SAFE | more
    lines = [f"HTTP/1.1 {status} {REASONS[status]}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def dump(value):
    return json.dumps(value, separators=(",", ":")).encode()


def parse_head(data):
    """The bytes of a request line and headers -> method, path, headers with lower-case names."""
    line, *rest = data.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words, headers = line.split(" "), {}
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise Refused(400, "request line: expected METHOD PATH HTTP/1.1")
    for name, colon, value in (field.partition(":") for field in rest):
        if not colon or not name or name != name.strip() or name.lower() in headers.keys() & ONCE:
            raise Refused(400, f"headers: expected NAME: VALUE, once of {', '.join(sorted(ONCE))}")
        headers[name.lower()] = value.strip()
    return words[0], words[1].partition("?")[0], headers


class Server:
    """Speaks HTTP for an `Engine`. `run` serves until `stop` is set; `ready` is set when `port` is known."""

    def __init__(self, engine, name, host="127.0.0.1", port=8000, api_key=None):
        self.engine, self.name, self.host, self.port, self.api_key = engine, name, host, port, api_key
        self.connections, self.ready = 0, threading.Event()
        self.page = {path: ((FOLDER / file).read_bytes(), kind) for path, (file, kind) in PAGE.items()}
        self.routes = {("GET", path): self.send_page for path in PAGE}
        self.routes |= {("GET", "/v1/models"): self.models, ("GET", f"/v1/models/{name}"): self.models}
        self.routes |= {("POST", "/v1/completions"): self.completions, ("POST", "/v1/chat/completions"): self.chat}
        self.routes |= {("GET", "/api/model"): self.describe, ("POST", "/api/attention"): self.attention}

    async def run(self):
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self.connect, self.host, self.port, limit=HEAD_BYTES)
        try:
            self.port = server.sockets[0].getsockname()[1]
            self.ready.set()
            bpe.note(f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}  (Ctrl-C ends it)")
            await self.stop.wait()
        finally:
            server.close()  # and no wait for open connections: `asyncio.run` ends them

    async def connect(self, reader, writer):
        """Answer the one request of a connection, whatever comes."""
        self.connections += 1
        writer.transport.set_write_buffer_limits(0)  # `drain` waits until all is sent
        try:
            try:
                if self.connections > CONNECTIONS:
                    raise busy(f"{CONNECTIONS} connections are open")
                request = await asyncio.wait_for(self.read(reader, writer), READ_SECONDS)
            except asyncio.TimeoutError:
                raise Refused(408, f"request: expected all of it within {READ_SECONDS} s") from None
            except asyncio.LimitOverrunError:
                raise Refused(431, f"headers: expected at most {HEAD_BYTES} bytes") from None
            await self.answer(request, reader, writer)
        except Refused as refusal:
            with contextlib.suppress(OSError):
                await self.send(writer, refusal.status, dump(refusal.body()), **refusal.headers)
                await self.linger(reader, writer)
        except (OSError, asyncio.IncompleteReadError):  # the client has gone, or is too slow to take the answer
            pass
        except Exception as error:
            bpe.note(f"a connection failed: {type(error).__name__}: {bpe.error_line(error)}")
        finally:
            self.connections -= 1
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def read(self, reader, writer):
        method, path, headers = parse_head(await reader.readuntil(b"\r\n\r\n"))
        self.check_source(headers)
        public = (method, path) in self.routes and path in PAGE
        if self.api_key and not public:
            given, wanted = headers.get("authorization", ""), f"Bearer {self.api_key}"
            if not hmac.compare_digest(given.encode("latin-1"), wanted.encode("utf-8")):
                message = "Authorization: expected Bearer and the key of --api-key"
                raise Refused(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if (method, path) not in self.routes:
            if allowed := [verb for verb, known in self.routes if known == path]:
                raise Refused(405, f"method: expected {allowed[0]}", headers={"Allow": ", ".join(allowed)})
            raise Refused(404, "path: expected one of docs/serve.md")
        length = headers.get("content-length", "0" if method == "GET" else "")
        if "transfer-encoding" in headers or not length:
            raise Refused(411, "Content-Length: expected the bytes of the body, in no Transfer-Encoding")
        if not (length.isascii() and length.isdigit()):
            raise Refused(400, "Content-Length: expected a number of bytes")
        if len(length) > 9 or int(length) > api.MAX_BODY:
            raise Refused(413, f"body: expected at most {api.MAX_BODY} bytes")
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(method, path, headers, await reader.readexactly(int(length)))

    def check_source(self, headers):
        """Refuse pages of other sites: by Host, which a name that was rebound to this address gives away, and by
        Origin, which a browser adds to what a page sends."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() not in ("localhost", self.host.lower()) and not is_address(name.strip("[]")):
            raise Refused(403, "Host: expected localhost, an address or the name of --host")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            raise Refused(403, f"Origin: expected http://{host} or none")

    async def send(self, writer, status, body, kind="application/json", **headers):
        writer.write(head_of(status, kind, {"Content-Length": len(body)} | headers) + body)
        await self.drain(writer)

    async def drain(self, writer):
        try:
            await asyncio.wait_for(writer.drain(), WRITE_SECONDS)
        except asyncio.TimeoutError:
            raise ConnectionAbortedError("the client does not read its answer") from None

    async def linger(self, reader, writer):
        """Read on for a second: a connection that is closed before its input was read loses its answer."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            writer.write_eof()
            await asyncio.wait_for(end_of(reader), 1)

    # -- routes

    async def answer(self, request, reader, writer):
        found = await self.routes[request.method, request.path](request, reader, writer)
        if found is not None:
            await self.send(writer, 200, dump(found))

    async def send_page(self, request, _, writer):
        body, kind = self.page[request.path]
        await self.send(writer, 200, body, kind)

    async def models(self, request, *_):
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [model]} if request.path == "/v1/models" else model

    async def describe(self, *_):
        """What the page needs: the shape of the model, the defaults, the limits."""
        cfg, default = self.engine.model[1], sample.make_parser().parse_args([])
        shape = {name: getattr(cfg, name) for name in ("layers", "heads", "seq_len", "vocab_size")}
        shape |= {"parameters": tinygpt.count_parameters(cfg)[0], "end": self.engine.model[2].end}
        filters = {name: getattr(default, name) for name in sample.FILTERS} | {"max_tokens": default.max_new_tokens}
        return {"model": self.name, "limits": {"max_tokens": api.MAX_TOKENS}} | shape | {"defaults": filters}

    async def chat(self, *_):
        raise Refused(400, f"{self.name} has no chat template; use /v1/completions", "model", "no_chat_template")

    async def attention(self, request, reader, _):
        words = api.parse_attention(request.body, self.engine.model[1])
        (found,) = [event async for event in self.events(attend(self.engine, *words), reader)]
        return found

    async def completions(self, request, reader, writer):
        wanted = api.parse_completion(request.body, self.name)
        head, events = api.header(self.name, wanted), self.events(complete(self.engine, wanted), reader)
        if not wanted.stream:
            *chunks, usage = [event async for event in events]
            return head | {"choices": api.merge_chunks(chunks), "usage": usage}
        await self.send_stream(writer, head, events, wanted.usage)

    async def send_stream(self, writer, head, events, counts):
        """Server-sent events: a chunk for each event, at last [DONE]. An error after the first is one more event."""
        begun = False
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    if not begun:
                        writer.write(head_of(200, "text/event-stream", {}))
                        begun = True
                    if "index" in event:
                        chunk = head | {"choices": [event]} | ({"usage": None} if counts else {})
                    else:
                        chunk = head | {"choices": [], "usage": event}
                    if "index" in event or counts:
                        writer.write(b"data: " + dump(chunk) + b"\n\n")
                        await self.drain(writer)
            writer.write(b"data: [DONE]\n\n")
        except Refused as refusal:
            if not begun:
                raise
            writer.write(b"data: " + dump(refusal.body()) + b"\n\n")
        await self.drain(writer)

    async def events(self, work, reader):
        """Yield what a job on the engine yields. Its place is free again when it ends, when the client has gone, and
        when its time is over."""
        job = Job(work, self.loop)
        self.engine.submit(job)
        waiting, gone = asyncio.ensure_future(job.events.get()), asyncio.ensure_future(end_of(reader))
        end = self.loop.time() + REQUEST_SECONDS
        try:
            while (left := end - self.loop.time()) > 0:
                done, _ = await asyncio.wait({waiting, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if gone in done:
                    raise ConnectionResetError
                if waiting not in done:
                    break
                event, waiting = waiting.result(), asyncio.ensure_future(job.events.get())
                if event is None:
                    return
                if isinstance(event, Refused):
                    raise event
                yield event
            raise Refused(504, f"request: not done within {REQUEST_SECONDS} s; ask for fewer tokens")
        finally:
            waiting.cancel()
            gone.cancel()
            self.engine.cancel(job)


async def end_of(reader):
    """Read and forget until the client has gone."""
    with contextlib.suppress(OSError):
        while await reader.read(1 << 16):
            pass


def is_address(name):
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


# == 2  command line ===================================================================================================


def make_parser():
    parser = bpe.Parser(prog="serve.py", description="Serve stories: a page, and the API of OpenAI's completions.")
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="a .safetensors, a .bin of llama2.c (default the newest run's)")
    add("--tokenizer", type=Path, metavar="FILE", help="of a checkpoint that holds none, as llama2.c's")
    add("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default %(default)s: this machine)")
    port = bpe.in_range(int, 0, 65535)
    add("--port", type=port, default=8000, metavar="N", help="port to listen on, 0 any (default %(default)s)")
    add("--api-key", metavar="KEY", help="what a request must bear: Authorization: Bearer KEY (default none)")
    add("--kernels", choices=tinygpt.KERNELS, help="table of ops (default the fastest that is here)")
    add("--threads", type=bpe.in_range(int, 1, 1024), metavar="N", help="to compute with (default all cores)")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        ops = tinygpt.find_ops(args.kernels)
        if args.threads:
            tinygpt.set_threads(args.threads)
        if not (path := args.checkpoint or next(iter(sample.newest_checkpoint()), None)):
            raise ValueError("no checkpoint in runs/; train a model first: python train.py --size 1m")
        engine = Engine(sample.open_model(path, args.tokenizer, ""), ops)
        if args.host not in ("127.0.0.1", "localhost", "::1") and not args.api_key:
            bpe.note(f"--host {args.host} without --api-key: everyone who reaches this machine can use it")
        engine.start()
        asyncio.run(Server(engine, model_name(path), args.host, args.port, args.api_key).run())
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, MemoryError) as error:
        parser.error(error)
    return 0


def model_name(path):
    """runs/1m/last.safetensors is 1m; another file by its own name."""
    return path.resolve().parent.name if path.stem in ("last", "best") else path.stem


if __name__ == "__main__":
    sys.exit(main())
