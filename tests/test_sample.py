"""sample.py: stories from a trained tiny model, what stops them, and every misuse that should end in one line."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ops_of
from helpers import TINY, invoke, own_helps, refusal, shown, trained, workshop, write_llama2c, write_stories

import bpe
import sample
import tinygpt

ROOT = Path(sample.__file__).parent
FILTERS = dict(temperature=0.8, top_k=0, top_p=0.95)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that has read some stories: its checkpoint, its parameters by name, its configuration and tokenizer."""
    with workshop(tmp_path_factory.mktemp("model")) as folder:
        trained("--data", write_stories(folder / "s.txt"), "--steps", 60, "--eval-every", 60, "--batch-size", 8)
    path = folder / "runs" / "tiny" / "last.safetensors"
    checkpoint, tokenizer = sample.load_model(path)
    cfg = checkpoint.cfg
    p = tinygpt.views(tinygpt.layout(cfg), checkpoint.parameters, cfg.layers)
    return SimpleNamespace(folder=folder, path=path, p=p, cfg=cfg, tokenizer=tokenizer)


@pytest.fixture
def place(tmp_path):
    with workshop(tmp_path):
        yield tmp_path


def told(model, *words):
    """stdout and stderr of a story that must succeed."""
    status, out, err = invoke(sample.main, "--checkpoint", model.path, *words)
    assert status == 0, err
    return out, err


def story(model, *words):
    return told(model, "--max-new-tokens", 30, *words)[0]


def made_by_hand(model, path, vocab_size=None, end=0.0):
    """A model whose logits are all 0, but `end` times the width for the end of a story."""
    cfg = tinygpt.Config(**{**vars(model.cfg), "vocab_size": vocab_size or model.cfg.vocab_size})
    flat = np.zeros(tinygpt.count_parameters(cfg)[0], np.float32)
    p = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers)
    p["norm_b"][:], p["embed_w"][model.tokenizer.end] = 1, end
    tinygpt.save_checkpoint(path, flat, cfg, model.tokenizer.to_json())
    return SimpleNamespace(path=path, tokenizer=model.tokenizer)


# == stories ===========================================================================================================


def test_greedy_is_the_same_for_every_seed(place, model):
    first = story(model, "--prompt", "Lily", "--temperature", 0)
    assert first == story(model, "--prompt", "Lily", "--temperature", 0, "--seed", 5)
    assert first == story(model, "--prompt", "Lily", "--top-k", 1, "--seed", 5)
    assert first == story(model, "--prompt", "Lily", "--temperature", 0, "--kernels", "numpy")


def test_a_seed_tells_one_story_and_another_seed_another(place, model):
    stories = [story(model, "--prompt", "Lily", "--seed", seed) for seed in range(4)]
    assert stories[2] == story(model, "--prompt", "Lily", "--seed", 2)
    assert len(set(stories)) == 4


def test_threads_do_not_change_a_story(place, model):
    assert story(model, "--seed", 1, "--threads", 1) == story(model, "--seed", 1, "--threads", 2)


@pytest.mark.parametrize("prompt", ["", "Lily found", "Zo\u00eb \u65e5\u672c \U0001f600", "  two\n\nlines ", bpe.END])
def test_what_is_printed_is_the_prompt_and_the_decoded_ids(place, model, prompt):
    ids = [model.tokenizer.end, *model.tokenizer.encode(prompt)]
    decoding = sample.Decoding(model.p, model.cfg, ops_of("fast"))
    banned = [i for name, i in model.tokenizer.specials.items() if name != bpe.END]
    new = list(sample.generate(decoding, ids, 7, model.tokenizer.end, 50, banned=banned, **FILTERS))
    out, err = told(model, "--prompt", prompt, "--seed", 7, "--max-new-tokens", 50)  # past the context of 32
    assert out == prompt + model.tokenizer.decode(new) + "\n"
    assert f"[{len(new)} tokens" in err


def test_a_story_is_printed_while_it_is_told(place, model, monkeypatch):
    pieces = []

    class Pieces(io.StringIO):
        def write(self, text):
            pieces.extend([text] if text else [])

        def flush(self):
            pieces.append(None)

    monkeypatch.setattr(sys, "stdout", Pieces())
    assert sample.main(["--checkpoint", str(model.path), "--prompt", "Lily", "--max-new-tokens", "20"]) == 0
    assert pieces[:2] == ["Lily", None]
    assert pieces.count(None) > 15


def test_a_character_of_several_tokens_is_never_printed_by_halves(place, model, monkeypatch):
    ids = model.tokenizer.encode("\u65e5\U0001f600")
    assert len(ids) > 2
    monkeypatch.setattr(sample, "generate", lambda *_, **__: iter(ids))
    assert story(model) == "\u65e5\U0001f600\n"


def test_several_stories_have_seeds_in_a_row(place, model):
    out, err = told(model, "--num-samples", 3, "--seed", 4, "--max-new-tokens", 20)
    parts = out.split("\n---\n\n")
    assert parts == [story(model, "--max-new-tokens", 20, "--seed", seed) for seed in (4, 5, 6)]
    assert [f"seed {seed}]" in err for seed in (4, 5, 6)] == [True] * 3


def test_no_new_tokens_print_the_prompt(place, model):
    assert told(model, "--prompt", "Lily", "--max-new-tokens", 0)[0] == "Lily\n"


def test_reserved_tokens_and_ids_without_a_token_are_never_printed(place, model):
    even = made_by_hand(model, place / "even.safetensors", vocab_size=model.cfg.vocab_size + 40)
    words = ["--temperature", 1, "--top-p", 1, "--num-samples", 5, "--max-new-tokens", 100]
    out, _ = told(even, *words)
    assert len(out) > 100 and "<|" not in out  # an even draw of 338 ids, 48 of them forbidden


def test_a_story_stops_at_its_end(place, model):
    ending = made_by_hand(model, place / "end.safetensors", end=9.0)
    out, err = told(ending, "--prompt", "Lily")
    assert out == "Lily\n" and "[0 tokens" in err


@pytest.mark.parametrize(
    "stops", [["d. "], ["zzz", "dog"], [" and t", "d t"], ["a"], ["zzz"], ["x", "a dog, e"]], ids=str
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_text_ends_before_the_first_stop_however_tokens_cut_it(stops, size):
    text = "a cat and dad and a dog, dear"
    pieces = list(sample.cut_at(stops, (text[i : i + size] for i in range(0, len(text), size))))
    ends = [text.index(stop) for stop in stops if stop in text]
    assert "".join(pieces) == text[: min(ends, default=len(text))]


def test_text_is_held_back_only_while_it_may_become_a_stop():
    pieces = sample.cut_at(["the end"], ["so", " the", " cat", " t", "h", "e end"])
    assert list(pieces) == ["so", " ", "the ca", "t ", "", ""]
    assert list(sample.cut_at([], ["so", " the"])) == ["so", " the", ""]


def test_a_story_stops_at_a_text_of_stop(place, model):
    whole = story(model, "--prompt", "Lily", "--stop", "no such text")
    assert whole == story(model, "--prompt", "Lily")
    stop = whole[12:15]
    assert story(model, "--prompt", "Lily", "--stop", "never", "--stop", stop) == whole[: whole.index(stop, 4)] + "\n"


def test_a_prompt_may_stand_in_a_file(place, model):
    Path("p.txt").write_text("Once upon a time,\nLily\n", encoding="utf-8")
    assert story(model, "--prompt-file", "p.txt") == story(model, "--prompt", "Once upon a time,\nLily")
    assert "none.txt" in refusal(sample.main, "sample.py", "--checkpoint", model.path, "--prompt-file", "none.txt")


def test_filters_change_a_story(place, model):
    words = ("--prompt", "Lily", "--temperature", 1.5, "--top-p", 1)
    assert len({story(model, *words, *more) for more in ((), ("--min-p", 0.3), ("--repetition-penalty", 1.5))}) == 3


def test_a_prompt_longer_than_the_context_keeps_its_end_and_says_so(place, model, monkeypatch):
    prompt = " ".join(f"{number} cats" for number in range(100))
    ids, read = [model.tokenizer.end, *model.tokenizer.encode(prompt)], []
    real = sample.generate

    def spy(decoding, ids, *rest, **filters):
        read.append(ids)
        return real(decoding, ids, *rest, **filters)

    monkeypatch.setattr(sample, "generate", spy)
    out, err = told(model, "--prompt", prompt, "--max-new-tokens", 20)
    assert out.startswith(prompt) and len(out) > len(prompt) + 1
    assert read == [ids[-model.cfg.seq_len :]]
    assert f"{len(ids)} tokens" in err and "only its end is read" in err and str(model.cfg.seq_len) in err
    assert "only its end" not in told(model, "--prompt", "Lily", "--max-new-tokens", 1)[1]
    assert read[1] == [model.tokenizer.end, *model.tokenizer.encode("Lily")]


def test_statistics_go_to_stderr(place, model):
    out, err = told(model, "--prompt", "Lily", "--max-new-tokens", 5)
    assert "tok/s" in err and "tok/s" not in out and str(model.path) in err


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("words", [("--temperature", "1e-320"), ("--temperature", "1e6"), ("--top-p", "1e-300")])
def test_extreme_filters_still_tell_a_story(place, model, words):
    text = story(model, *words)
    if words[1] != "1e6":
        assert text == story(model, "--temperature", 0)


# == which checkpoint ==================================================================================================


def test_the_newest_run_tells_the_story(place, model):
    for name, age in (("old", 300), ("new", 100), ("older", 500)):
        Path("runs", name).mkdir(parents=True)
        shutil.copy(model.path, Path("runs", name, "last.safetensors"))
        os.utime(Path("runs", name, "last.safetensors"), (time.time() - age,) * 2)
    Path("runs", "begun").mkdir()  # the newest folder, which has no checkpoint yet
    _, _, err = invoke(sample.main, "--max-new-tokens", 1)
    assert err.startswith(str(Path("runs", "new", "last.safetensors")))


def test_best_and_last_both_tell_stories(place, model):
    for name in ("best", "last"):
        model_there = SimpleNamespace(path=model.path.with_name(f"{name}.safetensors"))
        assert story(model_there, "--prompt", "Lily").startswith("Lily")


def test_the_model_in_the_box_tells_until_there_is_a_run(place, model, monkeypatch):
    monkeypatch.setattr(sample, "BOX", place / "stories.safetensors")
    shutil.copy(model.path, place / "stories.safetensors")
    _, _, err = invoke(sample.main, "--max-new-tokens", 1)
    assert err.startswith(str(place / "stories.safetensors"))
    Path("runs", "own").mkdir(parents=True)
    shutil.copy(model.path, Path("runs", "own", "last.safetensors"))
    _, _, err = invoke(sample.main, "--max-new-tokens", 1)
    assert err.startswith(str(Path("runs", "own", "last.safetensors")))


def test_without_a_checkpoint_one_line_says_what_to_type(place, monkeypatch):
    monkeypatch.setattr(sample, "BOX", place / "stories.safetensors")
    assert "python train.py" in refusal(sample.main, "sample.py")
    Path("runs", "begun").mkdir(parents=True)
    assert "python train.py" in refusal(sample.main, "sample.py", "--prompt", "Lily")


TRAINING = f"""
import sys, tinygpt, train
tinygpt.SIZES["tiny"] = tinygpt.{TINY!r}
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGTERM ends a process at once elsewhere")
def test_stories_are_told_while_training_runs_and_sigterm_saves(place, model):
    words = ["--size", "tiny", "--data", model.folder / "s.txt", "--steps", 1000000, "--threads", 1, "--save-every", 0]
    words += ["--batch-size", 4]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, *map(str, words)], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        last, deadline = Path("runs", "tiny", "last.safetensors"), time.monotonic() + 120
        while not last.exists() or tinygpt.load_checkpoint(last).metadata["step"] == "0":
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        status, out, err = invoke(sample.main, "--prompt", "Lily", "--max-new-tokens", 5)
        assert status == 0 and out.startswith("Lily") and err.startswith(str(last))
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    step = int(tinygpt.load_checkpoint(last).metadata["step"])
    assert f"stopped at update {step} of 1000000" in err and "Traceback" not in err
    assert shown(err, "to go on:")[1:3] == ["train.py", "--resume"]
    assert invoke(sample.main, *shown(err, "a story:")[2:], "--max-new-tokens", 1)[0] == 0


def test_a_console_that_lacks_a_character_gets_a_question_mark(place, model):
    words = [sys.executable, ROOT / "sample.py", "--checkpoint", model.path, "--prompt", "Zo\u00eb \u65e5\u672c"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([*words, "--max-new-tokens", "3"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("cp1252").startswith("Zo\u00eb ??")


# == bad input =========================================================================================================


def test_what_is_no_checkpoint_is_refused_by_its_name(place, model):
    whole = model.path.read_bytes()
    Path("folder").mkdir()
    cases = {
        "none.safetensors": None,
        "empty": b"",
        "few": b"1234567",
        "garbage": b"Once upon a time there was a little girl named Lily." * 50,
        "zeros": bytes(5000),
        "json": b"\x02\0\0\0\0\0\0\0{}",
        "list": b"\x02\0\0\0\0\0\0\0[]",
        "odd metadata": b"\x14\0\0\0\0\0\0\0" + b'{"__metadata__":[1]}',
        "no metadata": b"\x15\0\0\0\0\0\0\0" + b'{"__metadata__":null}',
        "longer": whole + b"\0",
        **{f"cut {n}": whole[:n] for n in (9, 100, 5000, len(whole) // 2, len(whole) - 1)},
    }
    for name, data in cases.items():
        if data is not None:
            Path(name).write_bytes(data)
        assert name in refusal(sample.main, "sample.py", "--checkpoint", name), name
    assert "folder" in refusal(sample.main, "sample.py", "--checkpoint", "folder")


@pytest.mark.parametrize("name", [bpe.END, "<|reserved_0|>"])
def test_a_special_token_in_the_prompt_is_text_and_a_line_says_so(place, model, name):
    words = ("--checkpoint", model.path, "--max-new-tokens", 1, "--kernels", "numpy")
    status, out, err = invoke(sample.main, "--prompt", f"Lily{name}", *words)
    assert status == 0 and out.startswith(f"Lily{name}")
    assert f"{name} in the prompt is read as text" in err
    assert "is read as text" not in invoke(sample.main, "--prompt", "Lily", *words)[2]


def test_a_checkpoint_of_another_program_is_refused(place, model):
    tinygpt.write_safetensors("foreign", {"w": np.zeros(3, np.float32)}, {"format": "pt"})
    assert "expected format" in refusal(sample.main, "sample.py", "--checkpoint", "foreign")


def test_a_checkpoint_whose_tokenizer_is_none_or_too_large_is_refused(place, model):
    checkpoint = tinygpt.load_checkpoint(model.path)
    tinygpt.save_checkpoint("odd", checkpoint.parameters, checkpoint.cfg, "no tokenizer")
    assert "tokenizer" in refusal(sample.main, "sample.py", "--checkpoint", "odd")
    small = made_by_hand(model, place / "small", vocab_size=model.cfg.vocab_size - 1)
    assert f"V={model.cfg.vocab_size - 1}" in refusal(sample.main, "sample.py", "--checkpoint", small.path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["embed_w", "norm_b"])
def test_a_model_with_a_weight_that_is_not_finite_is_refused(place, model, name, value):
    checkpoint = tinygpt.load_checkpoint(model.path)
    tinygpt.views(tinygpt.layout(model.cfg), checkpoint.parameters, model.cfg.layers)[name].flat[3] = value
    tinygpt.save_checkpoint("bad", checkpoint.parameters, model.cfg, checkpoint.tokenizer)
    message = refusal(sample.main, "sample.py", "--checkpoint", "bad", "--prompt", "Lily")
    assert message.startswith(f"bad: tensor {name} holds NaN or infinity")


def test_a_model_of_llama2c_with_a_weight_that_is_not_finite_is_refused(place):
    write_llama2c(place)
    data = bytearray(Path("model.bin").read_bytes())
    data[28:32] = np.float32(np.nan).tobytes()
    Path("model.bin").write_bytes(data)
    message = refusal(sample.main, "sample.py", "--checkpoint", "model.bin", "--tokenizer", "tokenizer.bin")
    assert "tensor embed_w holds NaN or infinity" in message


@pytest.mark.parametrize("merges", [[], [(b"a", b"b")]], ids=["bytes alone", "one merge"])
def test_a_tokenizer_other_than_the_checkpoints_own_is_refused(place, model, merges):
    bpe.Tokenizer.from_merges(merges).save("other.json")
    message = refusal(sample.main, "sample.py", "--checkpoint", model.path, "--tokenizer", "other.json")
    assert "other.json is another; leave out --tokenizer" in message


def test_the_checkpoints_own_tokenizer_may_be_named(place, model):
    model.tokenizer.save("same.json")
    assert story(model, "--prompt", "Lily", "--tokenizer", "same.json") == story(model, "--prompt", "Lily")


@pytest.mark.parametrize("vocab_size", [1, 264])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_by_name(place, model, vocab_size):
    cfg = tinygpt.Config(vocab_size=vocab_size, seq_len=8, width=4, layers=1, heads=1)
    tinygpt.save_checkpoint("bare", tinygpt.init_parameters(cfg, 0), cfg, "")
    bpe.Tokenizer.from_merges([]).save("bytes.json")
    message = refusal(sample.main, "sample.py", "--checkpoint", "bare", "--tokenizer", "bytes.json")
    assert f"bytes.json has 265 tokens, its model V={vocab_size}" in message
    assert "--tokenizer" in refusal(sample.main, "sample.py", "--checkpoint", "bare")


OUT_OF_RANGE = {
    "--temperature": ["-0.1", "nan", "inf", "warm"],
    "--top-k": ["-1", "1.5"],
    "--top-p": ["-0.1", "1.1", "nan", "0"],
    "--min-p": ["-0.1", "1.1", "nan"],
    "--repetition-penalty": ["0", "-1", "nan"],
    "--max-new-tokens": ["-1", "many"],
    "--num-samples": ["0", "-2"],
    "--seed": ["-1", "x"],
    "--threads": ["0", "1000000"],
    "--kernels": ["none"],
    "--no-such-flag": ["1"],
}


@pytest.mark.parametrize("flag, value", [(flag, value) for flag, values in OUT_OF_RANGE.items() for value in values])
def test_a_value_out_of_range_is_named(place, model, flag, value):
    message = refusal(sample.main, "sample.py", "--checkpoint", model.path, "--max-new-tokens=3", f"{flag}={value}")
    assert flag in message


def test_a_prompt_that_is_no_text_is_refused(place, model):
    message = refusal(sample.main, "sample.py", "--checkpoint", model.path, "--prompt", "a\udcff")
    assert "surrogate" in message


def test_every_flag_has_a_help_of_its_own():
    assert "--top-p" in own_helps(sample.make_parser())
