"""The API of extras/serve.py: what a request may say, its limits, its errors, and the objects that answer it.

Requests and answers have the shape of OpenAI's completions, so that its clients work unchanged. docs/serve.md lists
the fields. Every mistake in a request is a `Refused` that names the field, what was expected and what was given.
"""

import json
import secrets
import time
from dataclasses import dataclass

import sample

MAX_BODY = 1 << 18  # bytes of a request's body
MAX_TOKENS = 4096  # of a choice
MAX_CHOICES = 16  # of a request: its prompts times n
MAX_STOPS = 4
MAX_LOGPROBS = 20
MAX_TEXT = 1000  # characters of a stop text or a name

# == 1  errors =========================================================================================================

TYPES = {401: "authentication_error", 403: "permission_error", 500: "server_error", 503: "server_error"}
TYPES |= {504: "server_error"}


class Refused(Exception):
    """A request that is answered with an error: its HTTP status, message, the field at fault, a code, headers."""

    def __init__(self, status, message, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers)

    def body(self):
        """The error as OpenAI's clients read it."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def describe(value):
    """What was given, in a few words."""
    if isinstance(value, (list, dict)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def wrong(name, expected, value, code=None):
    return Refused(400, f"{name}: expected {expected}, got {describe(value)}", name, code)


# == 2  fields =========================================================================================================


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def parse_object(body):
    """Bytes -> the JSON object in them."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except RecursionError:
        raise Refused(400, "body: expected a JSON object, got one that is nested too deeply") from None
    except ValueError as error:  # of UTF-8, of JSON, an integer of thousands of digits
        raise Refused(400, f"body: expected a JSON object, got something else: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise Refused(400, f"body: expected a JSON object, got {describe(found)}")
    return found


def number(kind, low, high, open_low=False):
    """A check of a field: a number of this kind from low to high; low itself is out of range if open_low."""
    start = f"above {low:g}, at most" if open_low else f"from {low:g} to"
    expected = f"{'an integer' if kind is int else 'a number'} {start} {high if kind is int else format(high, 'g')}"

    def check(name, value):
        allowed = int if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
            raise wrong(name, expected, value)
        if open_low and value == low:
            raise wrong(name, expected, value)
        return kind(value)

    return check


def text(name, value, most=MAX_TEXT):
    """A check of a field: text of whole characters."""
    if not isinstance(value, str) or len(value) > most:
        raise wrong(name, f"text of at most {most} characters", value)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Refused(400, f"{name}: expected text, got half of a surrogate pair", name)
    return value


def boolean(name, value):
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def stops(name, value):
    """A check of a field: a text or a list of them, none empty."""
    found = value if isinstance(value, list) else [value]
    if len(found) > MAX_STOPS:
        raise wrong(name, f"at most {MAX_STOPS} texts", value)
    for stop in found:
        if not text(name, stop):
            raise wrong(name, "texts that are not empty", stop)
    return found


def is_ids(value):
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def prompts(name, value):
    """A check of a field: a text, a list of token ids, or a list of either -> list of texts and lists of ids."""
    found = [value] if isinstance(value, str) or is_ids(value) else value
    if not isinstance(found, list) or not all(isinstance(prompt, str) or is_ids(prompt) for prompt in found):
        raise wrong(name, "a text, a list of token ids, or a list of texts or of lists of token ids", value)
    if len(found) > MAX_CHOICES:
        raise wrong(name, f"at most {MAX_CHOICES} prompts", value)
    return [text(name, prompt, MAX_BODY) if isinstance(prompt, str) else prompt for prompt in found]


def stream_options(name, value):
    if not isinstance(value, dict) or set(value) - {"include_usage"}:
        raise wrong(name, 'an object with "include_usage" alone', value)
    return boolean(f"{name}.include_usage", value.get("include_usage", False))


def only(*neutral):
    """A check of a field of OpenAI's that does nothing here: its neutral values."""

    def check(name, value):
        if not any(type(value) is type(known) and value == known for known in neutral):
            expected = " or ".join(json.dumps(known) for known in neutral)
            raise wrong(name, f"{expected}, as this server has no {name}", value, "unsupported")

    return check


CHECKS = {  # of a completion: name -> check(name, value) -> value
    "model": text,
    "prompt": prompts,
    "max_tokens": number(int, 0, MAX_TOKENS),
    "temperature": number(float, 0, 1e6),
    "top_k": number(int, 0, 2**31),
    "top_p": number(float, 0, 1, open_low=True),
    "min_p": number(float, 0, 1),
    "repetition_penalty": number(float, 0, 1e6, open_low=True),
    "seed": number(int, 0, 2**62),
    "n": number(int, 1, MAX_CHOICES),
    "logprobs": number(int, 0, MAX_LOGPROBS),
    "stop": stops,
    "stream": boolean,
    "stream_options": stream_options,
    "return_token_ids": boolean,
    "user": text,
    "echo": only(False),
    "best_of": only(1),
    "suffix": only(""),
    "presence_penalty": only(0, 0.0),
    "frequency_penalty": only(0, 0.0),
    "logit_bias": only({}),
}


def check_fields(found, checks):
    """{name: what its check makes of it} of an object's fields; null is a field left out."""
    if unknown := [name for name in found if name not in checks]:
        name = unknown[0][:40].encode("ascii", "backslashreplace").decode()
        raise Refused(400, f"{name}: expected one of {', '.join(checks)}, got an unknown field", name)
    return {name: checks[name](name, value) for name, value in found.items() if value is not None}


# == 3  requests =======================================================================================================


@dataclass(frozen=True)
class Completion:
    """A request for stories; `filters` and `seed` as in sample.py, whose defaults hold."""

    prompts: list
    max_tokens: int
    filters: dict
    seed: int
    n: int = 1
    logprobs: int = None
    stops: tuple = ()
    stream: bool = False
    usage: bool = False  # a last chunk of a stream with the counts
    ids: bool = False  # token ids, too


def check_model(found, name):
    if found.get("model", name) != name:
        message = f"model: expected {name}, the one that is served, got {describe(found['model'])}"
        raise Refused(404, message, "model", "model_not_found")


def parse_completion(body, model):
    """Bytes of a request to the model of this name -> `Completion`."""
    found = check_fields(parse_object(body), CHECKS)
    check_model(found, model)
    default = sample.make_parser().parse_args([])
    asked, n = found.get("prompt", [""]), found.get("n", 1)
    if len(asked) * n > MAX_CHOICES:
        raise wrong("n", f"at most {MAX_CHOICES} choices, prompts times n", len(asked) * n)
    return Completion(
        prompts=asked,
        max_tokens=found.get("max_tokens", default.max_new_tokens),
        filters={name: found.get(name, getattr(default, name)) for name in sample.FILTERS},
        seed=found.get("seed", secrets.randbelow(2**31)),
        n=n,
        logprobs=found.get("logprobs"),
        stops=found.get("stop", ()),
        stream=found.get("stream", False),
        usage=found.get("stream_options", False),
        ids=found.get("return_token_ids", False),
    )


def parse_attention(body, cfg):
    """Bytes of a request -> token ids, layer, head."""
    layer, head = number(int, 0, cfg.layers - 1), number(int, 0, cfg.heads - 1)
    found = check_fields(parse_object(body), {"tokens": prompts, "layer": layer, "head": head})
    ids = found.get("tokens", [])
    if len(ids) != 1 or isinstance(ids[0], str) or not ids[0]:
        raise Refused(400, "tokens: expected a list of token ids, at least one", "tokens")
    return check_ids("tokens", ids[0], cfg), found.get("layer", 0), found.get("head", 0)


def check_ids(name, ids, cfg, vocab_size=None):
    """Token ids of a request, if the model has them and its context is long enough."""
    V = vocab_size or cfg.vocab_size
    if bad := [i for i in ids if not 0 <= i < V]:
        raise wrong(name, f"token ids from 0 to {V - 1}", bad[0])
    if len(ids) > cfg.seq_len:
        message = f"{name}: expected at most seq_len={cfg.seq_len} tokens, with the first that begins a story"
        raise Refused(400, f"{message}, got {len(ids)}", name, "context_length_exceeded")
    return ids


# == 4  answers ========================================================================================================


def header(model, request):
    """What every object of one answer begins with."""
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
    return head | {"model": model, "seed": request.seed}


def usage(prompt_tokens, completion_tokens):
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def merge_chunks(chunks):
    """The chunks of a stream -> its choices, in order: texts and lists joined, of other values the last."""
    choices = {}
    for chunk in chunks:
        whole = choices.setdefault(chunk["index"], {})
        for name, value in chunk.items():
            if isinstance(whole.get(name), dict):
                whole[name] = {key: whole[name][key] + more for key, more in value.items()}
            else:
                whole[name] = whole[name] + value if isinstance(whole.get(name), (str, list)) else value
    return [choices[index] for index in sorted(choices)]
