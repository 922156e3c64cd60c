"""sample.py --chat: a conversation in the terminal."""

import numpy as np
import pytest
from helpers import TINY, invoke, refusal

import bpe
import sample
import tinygpt
from extras import chat, tune

TOKENIZER = bpe.Tokenizer.from_merges([(b"a", b"b")])
TEMPLATE = tune.choose_template(TOKENIZER)


@pytest.fixture
def talk(place, monkeypatch):
    """talk(*lines) -> status, stdout, stderr; an exception among the lines is raised at the prompt."""
    cfg = TINY.changed(vocab_size=TOKENIZER.vocab_size)
    template = {"chat_template": tune.json.dumps(TEMPLATE._asdict())}
    model = (tinygpt.init_parameters(cfg, 0), cfg, TOKENIZER.to_json())
    tinygpt.save_checkpoint("chat.safetensors", *model, None, template)
    tinygpt.save_checkpoint("plain.safetensors", *model)

    def talk(*lines, words=()):
        left = list(lines)

        def read(prompt):
            line = left.pop(0) if left else EOFError()
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        flags = ["--chat", "--checkpoint", "chat.safetensors", "--kernels", "numpy", *words]
        return invoke(sample.main, *flags)

    return talk


@pytest.fixture
def heard(monkeypatch):
    """The messages that each answer follows; the answers are "one", "two", ..."""
    found, answers = [], iter(("one", "two", "three", "four"))

    def answer(model, template, messages, *_, **__):
        found.append([message["content"] for message in messages])
        yield next(answers)

    monkeypatch.setattr(chat, "answer", answer)
    return found


def test_a_model_answers(talk):
    status, out, err = talk("hi", "/quit", words=["--max-new-tokens", 5])
    assert status == 0 and out.strip(), err


def test_the_conversation_is_remembered_until_reset(talk, heard):
    status, out, _ = talk("a", "b", "/reset", "c")
    assert status == 0 and out == "one\ntwo\nthree\n"
    assert heard == [["a"], ["a", "one", "b"], ["c"]]


def test_the_oldest_turns_leave_when_the_context_is_full(talk, heard):
    talk("first", "second", "third")
    assert heard[-1] == ["second", "two", "third"] or heard[-1] == ["third"]
    for messages in heard:
        made = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
        assert len(tune.prompt_ids(made, TEMPLATE, TOKENIZER)) <= TINY.seq_len // 2


def test_a_message_that_does_not_fit_is_not_answered_and_forgets_nothing(talk, heard):
    status, _, err = talk("a", "x" * 40, "b")
    assert status == 0 and "the message has" in err
    assert heard == [["a"], ["a", "one", "b"]]


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, monkeypatch):
    said = []

    def answer(model, template, messages, *_, **__):
        said.append([message["content"] for message in messages])
        yield "begun"
        if len(said) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "answer", answer)
    status, out, err = talk("a", KeyboardInterrupt(), "b")
    assert status == 0 and out == "begun\nbegun\n" and "[stopped]" in err and "/quit leaves" in err
    assert said == [["a"], ["a", "begun", "b"]]


def test_a_checkpoint_without_a_template_is_refused_in_one_line(talk):
    words = ["--chat", "--checkpoint", "plain.safetensors", "--kernels", "numpy"]
    assert "plain.safetensors has no chat template" in refusal(sample.main, "sample.py", *words)
    two = ["--chat", "--checkpoint", "chat.safetensors", "--checkpoint", "plain.safetensors"]
    assert "name one --checkpoint" in refusal(sample.main, "sample.py", *two)


@pytest.mark.parametrize("text", ["5", "{", '{"user": "x"}', '{"system": "a", "user": "b", "assistant": "c"}'])
def test_a_template_that_does_not_fit_the_tokenizer_is_refused(place, text):
    checkpoint = tinygpt.Checkpoint(np.empty(0), TINY, "", {}, {"chat_template": text})
    with pytest.raises(ValueError, match="chat template does not fit"):
        tune.read_template("m", checkpoint, TOKENIZER)
