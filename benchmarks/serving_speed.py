"""How many streams a running extras/serve.py holds, at what rate and with what wait.

    python extras/serve.py
    python benchmarks/serving_speed.py --streams 1 4 20

Clients on this machine share its cores with the server: the rates are a lower bound.
"""

import http.client
import json
import socket
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe


def listen(args, seed, logprobs, found):
    """Appends (status, tokens, seconds to the first event, seconds to the last) of a stream to `found`."""
    connection = http.client.HTTPConnection("127.0.0.1", args.port, timeout=300)
    fields = {"prompt": "Once upon a time", "max_tokens": args.max_tokens, "seed": seed, "stream": True}
    fields |= {"stream_options": {"include_usage": True}, "logprobs": logprobs}
    start, first, tokens = time.perf_counter(), None, 0
    connection.request("POST", "/v1/completions", json.dumps(fields))
    answer = connection.getresponse()
    for line in answer:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            usage = json.loads(line.removeprefix(b"data: ")).get("usage")
            tokens = usage["completion_tokens"] if usage else tokens
    connection.close()
    found.append((answer.status, tokens, first, time.perf_counter() - start))


def measure(args, streams, logprobs):
    """Start so many streams at once and print a row of the table."""
    found, start = [], time.perf_counter()
    threads = [threading.Thread(target=listen, args=(args, seed, logprobs, found)) for seed in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    held = [row for row in found if row[0] == 200]
    wait = statistics.median(row[2] for row in held) if held else 0
    rate = sum(row[1] for row in held) / seconds
    longest = max(row[3] for row in found)
    print(f"| {streams} | {logprobs} | {len(held)} | {rate:,.0f} | {wait:.2f} | {longest:.2f} |", flush=True)


def main(argv=None):
    parser = bpe.Parser(prog="serving_speed.py", description="Streams of a running server, side by side.")
    count = bpe.in_range(int, 1, 4096)
    parser.add_argument("--port", type=bpe.in_range(int, 1, 65535), default=8000, help="of the server (default 8000)")
    parser.add_argument("--streams", type=count, nargs="+", default=[1, 4, 20], help="at once (default 1 4 20)")
    parser.add_argument("--max-tokens", type=count, default=200, help="of a stream (default 200)")
    args = parser.parse_args(argv)
    try:
        socket.create_connection(("127.0.0.1", args.port), timeout=10).close()
    except OSError as error:
        parser.error(f"no server on port {args.port} ({error}); start one: python extras/serve.py")
    print("| streams | logprobs | held | tokens/s in all | first token, median s | longest s |")
    print("|---|---|---|---|---|---|")
    for logprobs in (None, 10):
        for streams in args.streams:
            measure(args, streams, logprobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
