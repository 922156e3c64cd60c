"""extras/engine.py: stories and attention against sample.py and the specification; who computes when."""

import asyncio
import json
import math
import re

import numpy as np
import pytest
from helpers import TINY

import bpe
import sample
import tinygpt
from extras import api, engine, show
from extras.api import Refused


@pytest.fixture(scope="module")
def model():
    """A model of random weights, large enough for the tokens that follow to differ, and a tokenizer of bytes."""
    tokenizer = bpe.Tokenizer.from_merges([(b"c", b"a"), (b"ca", b"t")])
    flat = tinygpt.init_parameters(TINY, 1) * np.float32(3)
    return tinygpt.views(tinygpt.layout(TINY), flat, TINY.layers), TINY, tokenizer


@pytest.fixture(scope="module")
def machine(model):
    return engine.Engine(model, tinygpt.find_ops())


def request(**fields):
    return api.parse_completion(json.dumps({"seed": 3, "max_tokens": 40} | fields).encode(), "tiny")


def choices(machine, **fields):
    *chunks, _ = engine.complete(machine, request(**fields))
    return api.merge_chunks(chunks)


def told(machine, prompt, seed=3, stops=(), **options):
    wanted = request()
    words = dict(seed=seed, max_new_tokens=40, stops=stops) | wanted.filters | options
    return "".join(sample.generate_story(machine.model, machine.ops, prompt, **words))


def test_a_story_is_that_of_sample_py_whatever_went_before(machine):
    for seed in (3, 4, 3):
        assert choices(machine, prompt="cat", seed=seed)[0]["text"] == told(machine, "cat", seed)
    assert len(machine.free) == 1  # one cache, used again


def test_choices_have_seeds_that_follow_each_other(machine):
    found = choices(machine, prompt=["cat", "ca"], n=2)
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]
    expected = [told(machine, prompt, seed) for prompt in ("cat", "ca") for seed in (3, 4)]
    assert [choice["text"] for choice in found] == expected


def test_a_story_ends_before_its_stop_text_and_has_the_tokens_before_it(machine):
    whole = choices(machine, prompt="cat", logprobs=0, return_token_ids=True)[0]
    assert whole["text"] == told(machine, "cat") and len(whole["token_ids"]) == 40
    stop = whole["text"][9:12]
    cut = choices(machine, prompt="cat", logprobs=0, return_token_ids=True, stop=stop)[0]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)] == told(machine, "cat", stops=[stop])
    assert cut["finish_reason"] == "stop" and whole["finish_reason"] == "length"
    count = len(cut["token_ids"])
    assert cut["token_ids"] == whole["token_ids"][:count]
    assert cut["logprobs"]["text_offset"] == whole["logprobs"]["text_offset"][:count]
    assert max(cut["logprobs"]["text_offset"]) < len(cut["text"]) <= whole["logprobs"]["text_offset"][count]


def test_text_and_tokens_are_held_back_until_characters_are_whole(machine, monkeypatch):
    euro = list("a\u20acb\u20ac".encode()[:-1])  # its last character lacks a byte
    monkeypatch.setattr(sample, "generate", lambda *words, **filters: iter(euro))
    *chunks, _ = engine.complete(machine, request(return_token_ids=True, max_tokens=len(euro)))
    assert [chunk["text"] for chunk in chunks if chunk["text"]] == ["a", "\u20ac", "b", "\ufffd"]
    assert [chunk["token_ids"] for chunk in chunks if chunk["text"]] == [euro[:1], euro[1:4], euro[4:5], euro[5:]]
    assert chunks[-1]["finish_reason"] == "length"


def test_a_prompt_of_ids_may_end_inside_a_character(machine, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *words, **filters: iter([0x82, 0xAC, 0x41]))
    assert choices(machine, prompt=[0x61, 0xE2])[0]["text"] == "\u20acA"


def test_log_probabilities_are_the_models_own_and_alternatives_the_likeliest(machine):
    p, cfg, tokenizer = machine.model
    found = choices(machine, prompt="cat", logprobs=4, return_token_ids=True)[0]
    ids, logprobs = [*found["prompt_token_ids"], *found["token_ids"]][: cfg.seq_len], found["logprobs"]
    assert found["prompt_tokens"] == ["<|endoftext|>", "cat"] and ids[0] == tokenizer.end
    logits = tinygpt.logits(p, np.array([ids]), cfg, tinygpt.OPS["numpy"])[0]
    banned = sample.never_drawn(cfg, tokenizer)
    for t in range(1, len(ids) - 1):
        values = [show.log_probability(logits[t], i) for i in range(cfg.vocab_size)]
        order = [i for i in sorted(range(cfg.vocab_size), key=lambda i: -values[i]) if i not in banned]  # noqa: B023
        top, token = logprobs["top_token_ids"][t - 1], ids[t + 1]
        assert top == order[:4] + [token] * (token not in order[:4])
        assert logprobs["token_logprobs"][t - 1] == pytest.approx(values[token], abs=1e-4)
        row = logprobs["top_logprobs"][t - 1]
        assert list(row) == [engine.token_text(tokenizer, i) for i in top]
        assert list(row.values()) == pytest.approx([values[i] for i in top], abs=1e-4)


def test_tokens_are_written_as_text_by_name_or_as_bytes(machine):
    tokenizer = machine.model[2]
    texts = [engine.token_text(tokenizer, i) for i in (65, 0xE2, 257, tokenizer.end)]
    assert texts == ["A", "bytes:\\xe2", "cat", "<|endoftext|>"]


def test_usage_counts_tokens_of_prompts_and_choices(machine):
    *_, counts = engine.complete(machine, request(prompt=["cat", [1, 2]], n=2, max_tokens=5))
    assert counts == api.usage(2 + 3, 4 * 5)
    *chunks, counts = engine.complete(machine, request(max_tokens=0))
    assert counts == api.usage(1, 0) and chunks[-1]["finish_reason"] == "length"


def test_a_prompt_is_read_whole_or_refused(machine):
    for prompt in ("a" * 32, [1] * 32):
        with pytest.raises(Refused, match="at most seq_len=32 tokens.*got 33") as caught:
            choices(machine, prompt=prompt)
        assert caught.value.param == "prompt" and caught.value.code == "context_length_exceeded"
    assert choices(machine, prompt="a" * 31)[0]["text"] == told(machine, "a" * 31)
    with pytest.raises(Refused, match="prompt: expected token ids from 0 to 266, got 267"):
        choices(machine, prompt=[267])


def test_attention_is_that_of_the_specification(machine):
    p, cfg, _ = machine.model
    ids = [5, 9, 200, 7]
    (found,) = engine.attend(machine, ids, 1, 2)
    assert found["layer"] == 1 and found["head"] == 2
    ops = tinygpt.OPS["numpy"]
    x, _ = tinygpt.embed_forward(np.array([ids]), p, cfg, ops)
    x, _ = tinygpt.attention_layer_forward(x, p["layers"][0], cfg, ops)
    x, _ = tinygpt.mlp_layer_forward(x, p["layers"][0], cfg, ops)
    layer = p["layers"][1]
    n, _ = tinygpt.layernorm_forward(x, layer["norm1_w"], layer["norm1_b"], cfg.norm_eps)
    qkv = (n @ layer["qkv_w"] + layer["qkv_b"])[0].reshape(4, 3, cfg.heads, cfg.head_width)
    scores = qkv[:, 0, 2] @ qkv[:, 1, 2].T / math.sqrt(cfg.head_width)
    expected = tinygpt.softmax(np.where(np.tri(4) > 0, scores, -math.inf))
    for t, row in enumerate(found["attention"]):
        assert row == pytest.approx(expected[t, : t + 1].tolist(), abs=1e-4)


class Loop:
    """An event loop that does at once what another thread asks for."""

    call_soon_threadsafe = staticmethod(lambda function, *words: function(*words))


def events(job):
    return [job.events.get_nowait() for _ in range(job.events.qsize())]


def test_active_requests_take_turns_and_others_wait_up_to_a_limit(model):
    machine = engine.Engine(model, tinygpt.find_ops(), streams=2, queue=1)
    jobs = [engine.Job(iter(range(count)), Loop) for count in (3, 5, 2)]
    for job in jobs[:1]:
        machine.submit(job)
    with pytest.raises(Refused, match="1 requests are waiting") as caught:
        machine.submit(jobs[1])
    assert caught.value.status == 503 and caught.value.headers == {"Retry-After": engine.RETRY_SECONDS}
    for job in jobs[1:]:
        assert machine.admit()
        machine.submit(job)
    seen = []
    for _ in range(7):
        assert machine.admit()
        machine.active = [job for job in machine.active if machine.advance(job)]
        seen.append([events(job) for job in jobs])
    assert seen[0] == [[0], [0], []] and seen[2] == [[2], [2], []]
    assert seen[3] == [[None], [3], []] and seen[4] == [[], [4], [0]]
    assert seen[6] == [[], [], [None]] and not machine.active


def test_a_cancelled_request_ends_at_its_next_token_and_frees_its_cache(model):
    machine = engine.Engine(model, tinygpt.find_ops(), streams=1)
    running, waiting = (engine.Job(engine.complete(machine, request()), Loop) for _ in range(2))
    machine.submit(running)
    machine.submit(waiting)
    machine.admit()
    assert machine.advance(running) and not machine.free
    machine.cancel(waiting)
    assert not machine.waiting
    machine.cancel(running)
    assert not machine.advance(running) and len(machine.free) == 1


def test_a_request_that_fails_is_told_and_the_others_go_on(machine, capsys):
    def broken(error):
        yield 1
        raise error

    for error, status, said in [
        (Refused(400, "no"), 400, "no"),
        (ValueError("logits are not finite"), 500, "logits are not finite"),
        (KeyError("x"), 500, "internal error"),
        (MemoryError(), 500, "out of memory"),
    ]:
        job = engine.Job(broken(error), Loop)
        assert machine.advance(job) and not machine.advance(job)
        first, refusal = events(job)
        assert first == 1 and refusal.status == status and str(refusal) == said
    assert len(re.findall("a request failed", capsys.readouterr().err)) == 3


def test_a_loop_that_has_ended_does_not_end_the_engine():
    loop = asyncio.new_event_loop()
    loop.close()
    engine.Job(iter(()), loop).put(1)
