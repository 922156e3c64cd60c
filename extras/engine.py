"""What extras/serve.py computes: stories and attention, a token of each active request in turn, on one thread.

One thread, because the kernels are started by one at a time, and because it makes the order of work plain. A request is
a generator; `Engine` advances each active one by a token, so that several stream at once and a cancelled one ends at
its next token.
"""

import asyncio
import codecs
import collections
import contextlib
import math
import threading
from typing import NamedTuple

import numpy as np

import bpe
import sample
import tinygpt
from extras import api
from extras.api import Refused

STREAMS = 4  # requests that are computed in turn; each has a cache and a packed copy of the weights
QUEUE = 16  # requests that wait for one of them to end
RETRY_SECONDS = 5  # what a refused client is told to wait

# == 1  a story, token by token ========================================================================================


class Drawn(NamedTuple):
    """A token of a story: where its text begins in the story, its log-probability, [(id, log-probability)] of the
    likeliest tokens and of itself."""

    token: int
    offset: int
    logprob: float = None
    top: list = ()


def token_text(tokenizer, token):
    """A token as OpenAI writes it: its text, or its bytes where they are not whole characters."""
    data = tokenizer.vocab[token]
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def log_softmax(logits):
    """logits (V,) -> log-probabilities (V,) float64: the model's own, before any filter."""
    logits = logits.astype(np.float64)
    logits -= logits.max()
    return logits - math.log(np.exp(logits).sum())


def likeliest(logprobs, count, banned, token):
    """[(id, log-probability)] of the `count` likeliest tokens that may be drawn, and of `token` if it is not one."""
    allowed = logprobs.copy()
    allowed[banned] = -math.inf
    ids = np.argpartition(-allowed, count)[:count] if count < len(allowed) else np.arange(len(allowed))
    ids = sorted(ids.tolist(), key=lambda i: (-allowed[i], i))
    return [(i, float(logprobs[i])) for i in ids + [token] * (token not in ids)]


def generate_tokens(decoding, model, ids, seed, request, drawn):
    """Yield (text, [Drawn], finish) of a story that follows `ids`, as in `sample.generate_story`: text is held back
    while it may become a character or a stop text, and so are the tokens that begin in it. finish is None but in the
    last: "stop" or "length". `drawn` gets all tokens."""
    (_, cfg, tokenizer), latest, held, length, sent = model, [], [], 0, 0
    banned = sample.never_drawn(cfg, tokenizer)

    def watch(token, logits):
        logprobs = log_softmax(logits)
        latest[:] = float(logprobs[token]), likeliest(logprobs, request.logprobs, banned, token)

    def pieces():
        nonlocal length
        decoder, previous = codecs.getincrementaldecoder("utf-8")("replace"), ids[-1]
        decoder.decode(tokenizer.decode_bytes(ids))  # ids may end inside a character
        watching = None if request.logprobs is None else watch
        filters = request.filters | {"banned": banned}
        for i in sample.generate(decoding, ids, seed, tokenizer.end, request.max_tokens, watching, **filters):
            token = Drawn(i, length, *latest)
            drawn.append(token)
            held.append(token)
            piece = decoder.decode(tokenizer.decode_bytes([i], previous))
            length, previous = length + len(piece), i
            yield piece
        rest = decoder.decode(b"", True)
        length += len(rest)
        yield rest

    for piece in sample.cut_at(request.stops, pieces()):
        sent += len(piece)
        ready = [token for token in held if token.offset < sent]
        del held[: len(ready)]
        yield piece, ready, None
    stopped = length > sent  # by a stop text
    finish = "stop" if stopped or len(drawn) < request.max_tokens else "length"
    yield "", [] if stopped else held, finish


def logprobs_object(tokens, request, tokenizer):
    """What OpenAI's `logprobs` says of these tokens; with `return_token_ids` the ids, too."""
    names = [[token_text(tokenizer, i) for i, _ in token.top] for token in tokens]
    found = {
        "tokens": [token_text(tokenizer, token.token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(zip(row, (value for _, value in token.top))) for row, token in zip(names, tokens)],
        "text_offset": [token.offset for token in tokens],
    }
    return found | ({"top_token_ids": [[i for i, _ in token.top] for token in tokens]} if request.ids else {})


def complete(engine, request):
    """Yield the chunks of all choices of a `Completion`, one after the other, then its usage."""
    (_, cfg, tokenizer), index, completion_tokens = engine.model, 0, 0
    prompts = [encode_prompt(prompt, cfg, tokenizer) for prompt in request.prompts]
    for ids in prompts:
        for seed in range(request.seed, request.seed + request.n):
            more = {"prompt_token_ids": ids, "prompt_tokens": [token_text(tokenizer, i) for i in ids]}
            drawn = []
            with engine.decoding() as decoding:
                for text, tokens, finish in generate_tokens(decoding, engine.model, ids, seed, request, drawn):
                    chunk = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
                    if request.logprobs is not None:
                        chunk["logprobs"] = logprobs_object(tokens, request, tokenizer)
                    if request.ids:
                        chunk |= more | {"token_ids": [token.token for token in tokens]}
                    yield chunk
                    more = {}  # the prompt, with the first chunk alone
            index, completion_tokens = index + 1, completion_tokens + len(drawn)
    yield api.usage(sum(map(len, prompts)), completion_tokens)


def encode_prompt(prompt, cfg, tokenizer):
    """A text or token ids of a request -> ids, the end of a story first."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    ids = ids if ids[:1] == [tokenizer.end] else [tokenizer.end, *ids]
    return api.check_ids("prompt", ids, cfg, tokenizer.vocab_size)


def attend(engine, ids, layer, head):
    """Yield the attention probabilities of the specification: row t has those of token t for tokens 0 .. t."""
    p, cfg, _ = engine.model
    _, caches = tinygpt.forward(p, np.array([ids]), cfg, tinygpt.OPS["numpy"])
    _, (*_, (_, _, _, probabilities, _, _), _), _ = caches[1 + 2 * layer]  # of `attention_layer_forward`
    rows = probabilities[0, head].astype(np.float64).round(4).tolist()  # (T, T)
    yield {"layer": layer, "head": head, "attention": [row[: t + 1] for t, row in enumerate(rows)]}


# == 2  the thread that computes =======================================================================================


class Job:
    """A request on its way through the engine: a generator of events, and the event loop that takes them."""

    def __init__(self, work, loop):
        self.work, self.loop, self.events, self.cancelled = work, loop, asyncio.Queue(), False

    def put(self, event):
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Engine(threading.Thread):
    """Computes a token of each active job in turn; others wait, at most `queue` of them."""

    def __init__(self, model, ops, streams=STREAMS, queue=QUEUE):
        super().__init__(daemon=True, name="engine")
        self.model, self.ops, self.streams, self.queue = model, ops, streams, queue
        self.waiting, self.active, self.free, self.closed = collections.deque(), [], [], False
        self.changed = threading.Condition()

    def submit(self, job):
        with self.changed:
            if len(self.waiting) >= self.queue:
                raise busy(f"{self.queue} requests are waiting")
            self.waiting.append(job)
            self.changed.notify()

    def cancel(self, job):
        with self.changed:
            job.cancelled = True
            with contextlib.suppress(ValueError):
                self.waiting.remove(job)

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify()

    def run(self):
        self.warm_up()
        while self.admit():
            self.active = [job for job in self.active if self.advance(job)]

    def warm_up(self):
        """Compile what a request needs before the first one does."""
        for logprobs in ("null", "1"):
            body = b'{"max_tokens": 3, "prompt": "One day", "logprobs": %s}' % logprobs.encode()
            with contextlib.suppress(Exception):  # told to the requests that follow
                collections.deque(complete(self, api.parse_completion(body, None)), 0)

    def admit(self):
        """Let waiting jobs begin; wait for one if there is none. False when the engine is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.active or self.waiting)
            while self.waiting and len(self.active) < self.streams:
                self.active.append(self.waiting.popleft())
            return not self.closed

    def advance(self, job):
        """Compute the next event of a job. False at its end."""
        if job.cancelled:
            job.work.close()
            return False
        try:
            job.put(next(job.work))
            return True
        except StopIteration:
            job.put(None)
        except Refused as refusal:
            job.put(refusal)
        except Exception as error:
            bpe.note(f"a request failed: {type(error).__name__}: {bpe.error_line(error)}")
            known = isinstance(error, (ValueError, MemoryError))
            job.put(Refused(500, bpe.error_line(error) or "out of memory" if known else "internal error"))
        return False

    @contextlib.contextmanager
    def decoding(self):
        """A `Decoding` without text; those of earlier requests are used again."""
        p, cfg, _ = self.model
        decoding = self.free.pop() if self.free else sample.Decoding(p, cfg, self.ops)
        decoding.window = []
        try:
            yield decoding
        finally:
            self.free.append(decoding)


def busy(why):
    return Refused(503, f"{why}; try again later", headers={"Retry-After": RETRY_SECONDS})
