"""extras/api.py: every field of a request, its limits and what is said of a mistake; the pieces of an answer."""

import json

import pytest
from helpers import TINY

from extras import api

DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BROKEN = [  # a body, and what is said of it
    (b"", "expected a JSON object, got something else"),
    (b"[1, 2]", "got a list of 2"),
    (b"null", "got null"),
    (b'{"prompt": "\xff"}', "got something else"),
    (b'{"prompt": "a"', "got something else"),
    (b'{"temperature": NaN}', "NaN is not JSON"),
    (b'{"temperature": -Infinity}', "-Infinity is not JSON"),
    (b'{"seed": 1' + b"0" * 5000 + b"}", "got something else"),
    (DEEP, "nested too deeply"),
    (b'{"stream_options": {"include_usage": 1}}', "stream_options.include_usage: expected true or false, got 1"),
    (b'{"no_such": 1}', "no_such: expected one of model, prompt, "),
    (b'{"\\ud800": 1}', "\\ud800: expected one of"),
]
WRONG = [  # field, value, and what is said of it
    ("prompt", 1, "a text, a list of token ids"),
    ("prompt", [1, "a"], "a text, a list of token ids"),
    ("prompt", [True], "a text, a list of token ids"),
    ("prompt", ["a"] * 17, "at most 16 prompts, got a list of 17"),
    ("prompt", "\ud800", "expected text, got half of a surrogate pair"),
    ("max_tokens", "5", 'an integer from 0 to 4096, got "5"'),
    ("max_tokens", True, "an integer from 0 to 4096, got true"),
    ("max_tokens", 5.0, "got 5.0"),
    ("max_tokens", 4097, "got 4097"),
    ("max_tokens", 10**4000, "got 1000"),
    ("temperature", -0.1, "a number from 0 to 1e+06, got -0.1"),
    ("temperature", 10**400, "a number from 0 to 1e+06, got 1000"),
    ("temperature", [], "got a list of 0"),
    ("top_k", 0.5, "an integer from 0"),
    ("top_p", 0, "a number above 0, at most 1, got 0"),
    ("min_p", 2, "a number from 0 to 1, got 2"),
    ("repetition_penalty", 0, "a number above 0"),
    ("seed", -1, "an integer from 0"),
    ("n", 0, "an integer from 1 to 16, got 0"),
    ("logprobs", 21, "an integer from 0 to 20, got 21"),
    ("stop", [], None),
    ("stop", ["a"] * 5, "at most 4 texts, got a list of 5"),
    ("stop", "", 'texts that are not empty, got ""'),
    ("stop", [1], "text of at most 1000 characters, got 1"),
    ("stop", "a" * 1001, "text of at most 1000 characters"),
    ("stream", "yes", 'true or false, got "yes"'),
    ("stream_options", 1, "an object"),
    ("stream_options", {"more": 1}, "an object"),
    ("user", {}, "text of at most 1000 characters, got an object"),
    ("echo", True, "expected false, as this server has no echo, got true"),
    ("best_of", 2, "expected 1, as this server has no best_of, got 2"),
    ("logit_bias", {"5": 1}, "has no logit_bias, got an object"),
    ("presence_penalty", 0.5, "has no presence_penalty"),
    ("suffix", "end", "has no suffix"),
]


def refused(body, parse=api.parse_completion, known="tiny"):
    with pytest.raises(api.Refused) as caught:
        parse(body, known)
    return caught.value


@pytest.mark.parametrize("body, said", BROKEN, ids=range(len(BROKEN)))
def test_a_body_that_is_no_request_is_refused_with_the_reason(body, said):
    refusal = refused(body)
    assert refusal.status == 400 and said in str(refusal) and len(str(refusal)) < 700


@pytest.mark.parametrize("field, value, said", WRONG, ids=range(len(WRONG)))
def test_a_wrong_value_is_refused_with_its_field_what_was_expected_and_what_was_given(field, value, said):
    body = json.dumps({field: value}).encode()
    if said is None:
        assert api.parse_completion(body, "tiny").stops == value
        return
    refusal = refused(body)
    assert refusal.status == 400 and refusal.param == field and str(refusal).startswith(f"{field}: expected ")
    assert said in str(refusal) and len(str(refusal)) < 200
    assert refusal.body()["error"] == {
        "message": str(refusal),
        "type": "invalid_request_error",
        "param": field,
        "code": refusal.code,
    }


def test_every_field_is_tried_with_a_wrong_value():
    assert set(api.CHECKS) == {field for field, _, _ in WRONG} | {"model", "return_token_ids", "frequency_penalty"}


def test_without_fields_the_defaults_of_sample_hold():
    request = api.parse_completion(b"{}", "tiny")
    default = api.sample.make_parser().parse_args([])
    assert request.prompts == [""] and request.max_tokens == default.max_new_tokens and request.logprobs is None
    assert request.filters == {name: getattr(default, name) for name in api.sample.FILTERS}
    assert request.seed != api.parse_completion(b"{}", "tiny").seed
    nothing = dict.fromkeys(api.CHECKS)
    assert api.parse_completion(json.dumps(nothing).encode(), "tiny").filters == request.filters


def test_prompts_are_texts_or_ids_one_or_several():
    for given, found in [("a", ["a"]), ([5, 6], [[5, 6]]), (["a", "b"], ["a", "b"]), ([[5], [6]], [[5], [6]])]:
        assert api.parse_completion(json.dumps({"prompt": given}).encode(), "tiny").prompts == found
    assert "at most 16 choices" in str(refused(json.dumps({"prompt": ["a", "b"], "n": 9}).encode()))


def test_another_model_is_404():
    refusal = refused(b'{"model": "gpt-9"}')
    assert refusal.status == 404 and refusal.code == "model_not_found" and "expected tiny" in str(refusal)


def test_a_request_for_attention_names_tokens_a_layer_and_a_head():
    assert api.parse_attention(b'{"tokens": [1, 2], "layer": 1, "head": 2}', TINY) == ([1, 2], 1, 2)
    for body in (b"{}", b'{"tokens": []}', b'{"tokens": "a"}', b'{"tokens": [[1], [2]]}', b'{"tokens": [300]}'):
        assert refused(body, api.parse_attention, TINY).param == "tokens"
    assert refused(json.dumps({"tokens": [1] * 33}).encode(), api.parse_attention, TINY).status == 400
    assert refused(b'{"tokens": [1], "layer": 2}', api.parse_attention, TINY).param == "layer"
    assert refused(b'{"tokens": [1], "head": 3}', api.parse_attention, TINY).param == "head"


def test_chunks_are_joined_to_choices_in_order():
    def chunk(index, text, tokens, finish=None):
        return {"index": index, "text": text, "logprobs": tokens and {"tokens": tokens}, "finish_reason": finish}

    chunks = [chunk(0, "a", ["a"]), chunk(0, "b", ["b", "c"], "stop"), chunk(1, "d", ["d"], "length")]
    assert api.merge_chunks(chunks) == [
        chunk(0, "ab", ["a", "b", "c"], "stop"),
        chunk(1, "d", ["d"], "length"),
    ]
