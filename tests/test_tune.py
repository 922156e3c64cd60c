"""extras/tune.py: conversations to token files and masks, what counts in the loss, requests from stories, the score."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import SETTINGS, TINY, interrupt_at, invoke, model_bytes, refusal, trained, workshop, write_stories

import bpe
import sample
import tinygpt
import train
from extras import convert, data, tune

WORDS = [(b"t", b"h"), (b"th", b"e")]
TOKENIZER = bpe.Tokenizer.from_merges(WORDS)
TEMPLATE = tune.choose_template(TOKENIZER)
END, T = TOKENIZER.end, 24


def chat(*texts, system=None):
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write_lines(path, *examples):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in examples), encoding="utf-8")
    return path


EXAMPLES = [chat("hi", "the cat"), chat("a", "b", "c", "the end"), chat("go", "ok", system="be kind")]


@pytest.fixture
def rows(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", *({"messages": messages} for messages in EXAMPLES))
    ids, masks, bad = tune.make_rows(path, T, TEMPLATE, TOKENIZER)
    assert not bad
    return ids, masks > 0


def model(vocab_size=TOKENIZER.vocab_size, seq_len=T):
    cfg = TINY.changed(vocab_size=vocab_size, seq_len=seq_len, position_rows=seq_len)
    return cfg, tinygpt.init_parameters(cfg, 0, np.float64)


@pytest.fixture(scope="module")
def base(text, tmp_path_factory):
    """A model of stories, barely trained."""
    with workshop(tmp_path_factory.mktemp("base")) as folder:
        trained("--data", text, "--steps", 4)
    return folder / "runs" / "tiny" / "best.safetensors"


@pytest.fixture
def conversations(place):
    lines = [{"messages": chat(f"say {i}", f"it is {i}")} for i in range(40)]
    return write_lines(place / "data.jsonl", *lines)


def test_the_template_is_markers_text_and_the_end_after_answers():
    special = TOKENIZER.specials
    ids, counted = tune.encode_messages(chat(" hi\n", "the", "x", "y", system="s"), TEMPLATE, TOKENIZER)
    system, user, assistant = (special[f"<|reserved_{i}|>"] for i in range(3))
    e = TOKENIZER.encode
    parts = [
        [system, *e("s")],
        [user, *e("hi")],
        [assistant, *e("the"), END],
        [user, *e("x")],
        [assistant, *e("y"), END],
    ]
    assert ids == sum(parts, [])
    answers = [[False, *[kind == 2] * (len(part) - 1)] for part, kind in zip(parts, (0, 1, 2, 1, 2))]
    assert counted == sum(answers, [])


def test_a_marker_in_a_text_is_text():
    ids, _ = tune.encode_messages(chat("<|reserved_2|><|endoftext|>", "no"), TEMPLATE, TOKENIZER)
    assert sum(i in TOKENIZER.specials.values() for i in ids) == 3


def test_an_answer_is_drawn_from_what_it_follows_in_training():
    ids, counted = tune.encode_messages(chat("hi", "the cat"), TEMPLATE, TOKENIZER)
    assert tune.prompt_ids(chat("hi"), TEMPLATE, TOKENIZER) == [END, *ids[: counted.index(True)]]


def test_a_row_is_one_conversation_and_its_padding_does_not_count(rows):
    ids, masks = rows
    for row, mask, messages in zip(ids, masks, EXAMPLES):
        expected, counted = tune.encode_messages(messages, TEMPLATE, TOKENIZER)
        assert row.tolist() == expected + [END] * (T - len(expected))
        assert mask.tolist() == counted + [False] * (T - len(expected))


def test_every_window_of_a_masked_text_is_a_row(rows):
    ids, masks = rows
    batches = train.Batches(ids.reshape(-1), T, END, 1, masks.reshape(-1))
    assert batches.per_epoch == len(ids)
    for epoch in range(3):
        inputs, targets, weights = batches.get(epoch * len(ids), len(ids))
        assert sorted(map(bytes, targets)) == sorted(map(bytes, ids.astype(np.int64)))
        order = [next(i for i, row in enumerate(ids) if np.array_equal(row, found)) for found in targets]
        assert np.array_equal(weights, masks[order]) and weights.dtype == np.float32
        assert np.array_equal(inputs[:, 1:], targets[:, :-1]) and (inputs[:, 0] == END).all()


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_targets_of_the_user_and_padding_have_no_gradient(rows, kernels):
    """Another target there changes not a bit of the gradient; another target of the assistant does."""
    cfg, parameters = model()
    ids, masks = rows
    inputs, targets, weights = train.Batches(ids.reshape(-1), T, END, 0, masks.reshape(-1)).get(0, len(ids))

    def gradient(targets):
        p = tinygpt.views(tinygpt.layout(cfg), parameters, cfg.layers)
        buffer, grads = tinygpt.zero_gradients(cfg, np.float64)
        loss, _ = tinygpt.loss_and_gradients(p, inputs, targets, weights, grads, cfg, tinygpt.find_ops(kernels))
        return loss, buffer.tobytes()

    first = gradient(targets)
    assert gradient(np.where(weights == 0, (targets + 5) % 256, targets)) == first
    answer = np.argwhere(weights > 0)[-1]
    other = targets.copy()
    other[tuple(answer)] = 7
    assert gradient(other) != first


def test_the_mask_is_weighted_by_token_across_micro_batches(rows):
    """Micro-batches of one row, of unequal counts, make the update of one batch; the loss is the mean over targets."""
    ids, masks = rows
    cfg, parameters = model()
    batch = train.Batches(ids.reshape(-1), T, END, 0, masks.reshape(-1)).get(0, 3)
    assert len(set(batch[2].sum(1))) > 1
    found = []
    for micro in (1, 3):
        s = train.replace(SETTINGS, batch_size=3, micro_batch_size=micro, kernels="numpy")
        state = train.State(cfg, parameters.copy())
        loss, norm, _ = train.update(state, batch, tinygpt.OPS["numpy"], s)
        found.append((loss, norm, state.m.copy()))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-12)
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-12, atol=1e-12 * np.abs(found[1][2]).max())
    p = tinygpt.views(tinygpt.layout(cfg), parameters, cfg.layers)
    _, nats = tinygpt.loss_and_gradients(p, *batch, None, cfg, tinygpt.OPS["numpy"])
    assert found[0][0] == pytest.approx(float(nats[batch[2] > 0].mean()), rel=1e-12)


def test_evaluation_is_of_the_targets_that_count(rows):
    cfg, parameters = model()
    p, (ids, masks) = tinygpt.views(tinygpt.layout(cfg), parameters, cfg.layers), rows
    nats = train.score(p, cfg, ids.reshape(-1), END, tinygpt.OPS["numpy"])
    found = train.evaluate(p, cfg, ids.reshape(-1), END, tinygpt.OPS["numpy"], 2 * T, mask=masks.reshape(-1))
    assert found == pytest.approx(nats[: 2 * T][masks[:2].reshape(-1)].mean(), rel=1e-12)


BAD = {
    "{": "no JSON",
    '["messages"]': "expected",
    '{"messages": []}': "expected",
    '{"messages": [5]}': "message 1 is no object",
    '{"messages": [{"role": "user", "content": " "}]}': "message 1 is empty",
    json.dumps({"messages": chat("question")}): "its roles are user; expected",
    json.dumps({"messages": chat("a", "b")[::-1]}): "its roles are assistant, user",
    json.dumps({"messages": chat("long " * T, "b")}): f"does not fit T={T}",
    json.dumps({"messages": [{"role": "robot", "content": "a"}, *chat("a", "b")]}): "robot",
    '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}': "surrogate",
}


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_is_left_out_has_its_number_and_reason(tmp_path, line):
    path = write_lines(tmp_path / "d.jsonl", {"messages": chat("a", "b")}, line, {"messages": chat("c", "d")})
    ids, _, bad = tune.make_rows(path, T, TEMPLATE, TOKENIZER)
    assert len(ids) == 2 and list(bad) == [2] and BAD[line] in bad[2]


def test_sft_counts_and_names_what_it_leaves_out(place, base, conversations):
    with open(conversations, "a", encoding="utf-8") as file:
        file.write("{\n" + json.dumps({"messages": chat("many " * 40, "x")}) + "\n")
    status, out, err = invoke(tune.main, "sft", conversations, "--init-from", base)
    assert status == 0, err
    assert "left out 2 of 42 lines: 1 do not fit T=32, 1 are bad" in err and "lines left out: 41, 42" in err
    assert "line 41: left out: no JSON" in err and "40 conversations in rows of 32" in out
    write_lines(conversations, "{")
    assert "no conversation to train on; line 1" in refusal(
        tune.main, "tune.py", "sft", conversations, "--init-from", base
    )


def tuned(base, *words, status=0):
    found, out, err = invoke(train.main, "--init-from", base, "--data", "data.bin", *words)
    assert found == status, err
    return err


def test_a_tuned_model_keeps_its_template_and_is_exported_with_it(place, base, conversations):
    assert invoke(tune.main, "sft", conversations, "--init-from", base)[0] == 0
    tuned(base, "--steps", 2, "--out", "chat")
    for name in ("last", "best"):
        checkpoint, tokenizer = sample.load_model(f"chat/{name}.safetensors")
        assert tune.read_template("", checkpoint, tokenizer) == tune.choose_template(tokenizer)
    jinja = tune.jinja_template(tune.choose_template(tokenizer))
    assert invoke(convert.main, "--to", "hf", "chat", "hf")[0] == 0
    assert json.loads(Path("hf/tokenizer_config.json").read_text("utf-8"))["chat_template"] == jinja
    assert invoke(convert.main, "--to", "gguf", "chat", "a.gguf")[0] == 0
    assert b"tokenizer.chat_template" in Path("a.gguf").read_bytes() and jinja.encode() in Path("a.gguf").read_bytes()


def test_the_exported_template_makes_the_same_ids():
    jinja2 = pytest.importorskip("jinja2")
    messages = chat("hi ", "the", " more", system="be kind")
    made = jinja2.Template(tune.jinja_template(TEMPLATE))
    words = {"bos_token": bpe.END, "eos_token": bpe.END, "messages": messages}
    assert TOKENIZER.encode(made.render(**words, add_generation_prompt=True), "all") == tune.prompt_ids(
        messages, TEMPLATE, TOKENIZER
    )
    whole = [*messages, *chat("", "an answer")[1:]]
    expected = [END, *tune.encode_messages(whole, TEMPLATE, TOKENIZER)[0]]
    assert TOKENIZER.encode(made.render(**words | {"messages": whole}), "all") == expected


def test_a_tuning_run_is_stopped_and_goes_on_to_the_same_bytes(place, base, conversations, monkeypatch):
    assert invoke(tune.main, "sft", conversations, "--init-from", base)[0] == 0
    words = ("--steps", 6, "--micro-batch-size", 2)
    tuned(base, *words, "--out", "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: train.signal.raise_signal(train.signal.SIGINT))
        tuned(base, *words, "--out", "cut", status=130)
    status, _, err = invoke(train.main, "--resume", "--out", "cut")
    assert status == 0, err
    assert model_bytes("cut") == model_bytes("whole")


def test_validation_rows_are_held_out_whole(place, base, conversations):
    assert invoke(tune.main, "sft", conversations, "--init-from", base)[0] == 0
    tokenizer = sample.load_model(base)[1]
    known = data.read_data(tokenizer, [["data.bin"], []], "")
    assert len(known.valid) == 32 == len(known.masks[1]) and len(known.train) == len(known.masks[0]) == 39 * 32


def break_mask(how):
    name, info = Path("data.bin.mask"), json.loads(Path("data.bin.json").read_bytes())
    if how == "missing":
        return name.unlink()
    mask = bytearray(name.read_bytes())
    if how == "changed":
        mask[0] ^= 1
    elif how == "short":
        del mask[-1]
    elif how == "a row without a target":
        mask[:32] = bytes(32)
    name.write_bytes(mask)
    if how == "a row without a target":
        info["mask"]["crc32"] = f"{bpe.zlib.crc32(mask):08x}"
    if how == "no mask's JSON":
        info["mask"] = [5]
    Path("data.bin.json").write_text(json.dumps(info), encoding="utf-8")


@pytest.mark.parametrize("how", ["missing", "changed", "short", "a row without a target", "no mask's JSON"])
def test_a_damaged_mask_is_refused_in_one_line(place, base, conversations, how):
    assert invoke(tune.main, "sft", conversations, "--init-from", base)[0] == 0
    break_mask(how)
    assert "data.bin" in refusal(train.main, "train.py", "--init-from", base, "--data", "data.bin", "--steps", 1)


def test_files_of_two_kinds_and_other_windows_are_refused(place, base, conversations, text):
    assert invoke(tune.main, "sft", conversations, "--init-from", base)[0] == 0
    bpe.write_tokens(bpe.pieces([text]), sample.load_model(base)[1], "plain.bin")
    words = ["--init-from", base, "--steps", 1, "--data"]
    assert "differ in their masks" in refusal(train.main, "train.py", *words, "data.bin", "plain.bin")
    assert "give --seq-len 32" in refusal(train.main, "train.py", *words, "data.bin", "--seq-len", 16)


def test_a_tokenizer_without_reserved_tokens_has_no_template():
    with pytest.raises(ValueError, match="needs 3 reserved special tokens, the tokenizer has 2"):
        tune.choose_template(bpe.Tokenizer.from_merges(WORDS, 2))


def test_requests_are_of_the_story_that_answers_them(place):
    stories = write_stories(place / "s.txt", count=150)
    assert invoke(tune.main, "make", stories, "a.jsonl")[0] == 0
    examples, kinds = [example for _, example in tune.read_lines("a.jsonl")], set()
    whole = set(tune.read_stories(stories))
    for example in examples:
        texts = [message["content"] for message in tune.check_messages(example)]
        kinds.add(example["kind"])
        if example["kind"] == "words":
            assert tune.share_used(example["words"], texts[1]) == 1 and texts[1] in whole
            assert all(word in texts[0] for word in example["words"])
        elif example["kind"] == "begins":
            assert texts[1].startswith(texts[0].removeprefix("Write a story that begins with: "))
        elif example["kind"] == "next":
            assert re.sub(r"\s", "", texts[1] + texts[3]) in {re.sub(r"\s", "", story) for story in whole}
        else:
            assert texts[2] == "Who is the story about?" and texts[3].split()[-1][:-1] in texts[1]
    assert kinds == set(tune.KINDS)
    assert invoke(tune.main, "make", stories, "b.jsonl")[0] == 0
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()


def test_the_share_of_words_is_of_whole_words_in_any_case():
    assert tune.share_used(["cat", "box", "happy", "sun"], "A Cat. Boxes! Happy, unhappy") == 0.5


def test_score_tells_a_model_before_and_after(place, base, conversations):
    lines = [{"messages": chat("words a, b", "a b"), "words": ["a", "b"]}] * 3
    requests = write_lines(place / "r.jsonl", *lines)
    words = ("score", base, requests, "--kernels", "numpy", "--count", 2)
    status, out, err = invoke(tune.main, *words)
    assert status == 0 and "2 requests, asked in plain text" in out and "asked words used" in out, err
    assert "asks for no words" in refusal(tune.main, "tune.py", "score", base, conversations)


def test_an_answer_stays_within_the_window():
    cfg, parameters = model()
    whole = tinygpt.views(tinygpt.layout(cfg), parameters.astype(np.float32), cfg.layers), cfg, TOKENIZER
    with pytest.raises(ValueError, match="shorten it"):
        "".join(tune.answer(whole, TEMPLATE, chat("x" * T), 0, tinygpt.OPS["numpy"]))
    assert "".join(tune.answer(whole, TEMPLATE, chat("x"), 0, tinygpt.OPS["numpy"]))
