"""extras/data.py: what the command line names becomes token files, once; a run that goes on has its tokens still."""

import dataclasses
import json
import os
import shutil
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    PLAIN,
    RECIPE,
    SETTINGS,
    TINY,
    WORDS,
    interrupt_at,
    invoke,
    model_bytes,
    read_log,
    refusal,
    replace_in_place,
    trained,
    write_stories,
)

import bpe
import tinygpt
import train
from extras import data, documents, stories


def prepare(*words, seq_len=TINY.seq_len):
    args = train.make_parser().parse_args([str(word) for word in words])
    return data.prepare_data(args, dataclasses.replace(SETTINGS, kernels="numpy"), TINY.changed(seq_len=seq_len), None)


def test_tokens_decode_to_the_stories_and_count_their_bytes(place, text):
    made = prepare("--data", text)
    told = [story.strip() for story in text.read_text("utf-8").split(bpe.END) if story.strip()]
    tokens = np.concatenate([made.train, made.valid])
    assert made.tokenizer.decode(tokens).split(bpe.END) == [*told, ""]
    assert train.count_bytes(tokens, made.tokenizer) == sum(len(story.encode()) for story in told)


@pytest.mark.parametrize("count", [49, 50, 100, 149])
def test_hold_out_takes_two_percent_of_the_stories_whole(tokenizer, count):
    told = [tokenizer.encode(story) + [tokenizer.end] for story in islice(stories.generate(1), count)]
    tokens = np.concatenate(told)
    kept, held = data.hold_out(tokens, tokenizer.end)
    assert np.array_equal(np.concatenate([kept, held]), tokens)
    assert kept[-1] == held[-1] == tokenizer.end
    assert np.count_nonzero(held == tokenizer.end) == max(1, round(count / 50))


def test_hold_out_cuts_one_document_by_bytes(tokenizer):
    story = " ".join(islice(stories.generate(1), 30))
    tokens = np.array([*tokenizer.encode(story), tokenizer.end])
    kept, held = data.hold_out(tokens, tokenizer.end)
    assert np.array_equal(np.concatenate([kept, held]), tokens)
    longest = max(map(len, tokenizer.vocab))
    assert abs(train.count_bytes(kept, tokenizer) - 0.98 * len(story.encode())) <= longest


def joined_stories(tokenizer, sizes):
    """Tokens of stories of these numbers of words, each with its end."""
    return np.concatenate([[*tokenizer.encode(" ".join(WORDS[:size])), tokenizer.end] for size in sizes])


def held_share(tokens, tokenizer):
    """What hold_out takes: (share of the bytes, stories that end in it, whether it cuts inside a story)."""
    kept, held = data.hold_out(tokens, tokenizer.end)
    assert np.array_equal(np.concatenate([kept, held]), tokens)
    share = train.count_bytes(held, tokenizer) / train.count_bytes(tokens, tokenizer)
    return share, np.count_nonzero(held == tokenizer.end), kept[-1] != tokenizer.end


@pytest.mark.parametrize("sizes", [[200, 200], [3000, 200, 300], [20] * 9 + [3000], [100] * 5, [10] * 40 + [1000]])
def test_hold_out_cuts_inside_a_story_where_whole_ones_would_be_too_much(tokenizer, sizes):
    share, stories, inside = held_share(joined_stories(tokenizer, sizes), tokenizer)
    assert 0.01 < share < 0.025 and stories == 1 and inside


@pytest.mark.parametrize(
    "sizes, whole",  # the end of a story that is nearest to 98% of the text
    [([100] * 20, 1), ([400] * 10 + [20, 40, 20], 3), ([100] * 100 + [1, 1], 4), ([60] * 30 + [3] * 14, 14)],
)
def test_hold_out_prefers_whole_stories_of_about_two_percent(tokenizer, sizes, whole):
    share, stories, inside = held_share(joined_stories(tokenizer, sizes), tokenizer)
    assert 0.01 <= share <= 0.05 and stories == whole and not inside


def token_files():
    return {path: path.stat().st_mtime_ns for path in Path("data", "tokens").rglob("*") if path.is_file()}


def test_a_second_run_takes_the_encoded_text_as_it_is(place, text):
    first, files = prepare("--data", text, "--val-data", text), token_files()
    second = prepare("--data", text, "--val-data", text)
    assert files and token_files() == files
    assert np.array_equal(first.train, second.train) and np.array_equal(first.valid, second.valid)


def test_a_text_that_changed_is_encoded_again(place):
    path = write_stories(place / "s.txt", seed=1)
    before = prepare("--data", path)
    write_stories(path, seed=2)
    after = prepare("--data", path)
    tokens = np.concatenate([after.train, after.valid])
    assert after.tokenizer.decode(tokens).startswith(next(stories.generate(2)))
    assert not after.tokenizer.decode(tokens).startswith(before.tokenizer.decode(before.train[:50]))


def reordered(path):
    """The stories of a text file in reverse order: as many bytes."""
    end = f"\n{bpe.END}\n"
    told = path.read_text("utf-8").split(end)[:-1]
    return "".join(story + end for story in reversed(told)).encode()


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("what", ["train", "valid"])
def test_a_text_replaced_with_its_size_and_mtime_is_encoded_again(place, monkeypatch, what, windows):
    monkeypatch.setattr(data, "CTIME_IS_CREATION", windows)
    paths = {"train": write_stories(place / "t.txt", seed=1), "valid": write_stories(place / "v.txt", seed=2)}
    words = ["--data", paths["train"], "--val-data", paths["valid"]]
    before = prepare(*words)
    told = before.tokenizer.decode(getattr(before, what)).split(bpe.END)[:-1]
    replace_in_place(paths[what], reordered(paths[what]))
    after = prepare(*words)
    assert after.tokenizer.decode(getattr(after, what)).split(bpe.END)[:-1] == told[::-1]


def test_a_text_replaced_by_renaming_a_file_of_the_same_size_and_mtime_is_encoded_again(place):
    path, other = write_stories(place / "t.txt"), place / "other.txt"
    other.write_bytes(reordered(path))
    shutil.copystat(path, other)
    before = prepare("--data", path)
    other.replace(path)
    after = prepare("--data", path)
    assert not np.array_equal(after.train, before.train)


def test_a_tokenizer_file_replaced_with_its_size_and_mtime_encodes_the_text_again(place, text, tokenizer):
    tokenizer.save("t.json")
    merges = tokenizer.merges
    bpe.Tokenizer.from_merges([merges[1], merges[0], *merges[2:]]).save("other.json")
    before = prepare("--data", text, "--tokenizer", "t.json")
    replace_in_place("t.json", Path("other.json").read_bytes())
    after = prepare("--data", text, "--tokenizer", "t.json")
    assert not np.array_equal(after.train, before.train)
    assert after.tokenizer.decode(after.train) == before.tokenizer.decode(before.train)


@pytest.mark.parametrize("left", [0, 101, -2])
def test_an_encoded_text_that_was_cut_short_is_made_again(place, text, left):
    whole = np.array(prepare("--data", text).train)
    (path,) = Path("data", "tokens").rglob("train.bin")
    path.write_bytes(path.read_bytes()[:left])
    assert np.array_equal(prepare("--data", text).train, whole)


def test_an_encoded_text_without_its_description_is_made_again(place, text):
    whole = np.array(prepare("--data", text).train)
    (path,) = Path("data", "tokens").rglob("train.bin.json")
    path.unlink()
    assert np.array_equal(prepare("--data", text).train, whole)


def test_token_files_of_a_tokenizer_train_as_their_text_does(place, text, tokenizer):
    tokenizer.save(place / "t.json")
    bpe.write_tokens(documents.documents([text]), tokenizer, place / "t.bin")
    trained("--data", text, "--tokenizer", "t.json", "--steps", 2)
    trained("--data", "t.bin", "--tokenizer", "t.json", "--steps", 2)
    assert model_bytes() == model_bytes("runs/tiny-2")


def test_several_files_and_folders_are_one_text(place):
    (place / "books").mkdir()
    one, two = write_stories(place / "books" / "a.txt", 1), write_stories(place / "books" / "b.txt", 2)
    both, folder = prepare("--data", one, two), prepare("--data", place / "books")
    assert np.array_equal(both.train, folder.train) and np.array_equal(both.valid, folder.valid)


@pytest.mark.parametrize("letter, count", [("a", 5), ("\u65e5", 2)])
def test_the_text_of_a_tokenizer_is_limited_in_bytes(letter, count):
    taken = list(data.first_bytes(iter([(10 * letter, True)] * 9), 45))
    assert taken == [((10 * letter).encode(), True)] * count


def test_a_vocabulary_that_comes_from_the_size_is_an_upper_bound(place):
    (place / "s.txt").write_text("the cat sat. " * 40, encoding="utf-8")
    out, err = trained("--data", "s.txt", "--steps", 1)
    cfg = tinygpt.load_checkpoint("runs/tiny/last.safetensors").cfg
    assert 265 <= cfg.vocab_size < TINY.vocab_size
    assert f"the vocabulary has {cfg.vocab_size}" in err


def test_without_data_it_trains_on_generated_stories_and_says_so(place, monkeypatch):
    real, asked = stories.write_generated, []
    monkeypatch.setattr(stories, "write_generated", lambda folder, size: asked.append(size) or real(folder, 50_000))
    monkeypatch.setattr(stories, "VALID_BYTES", 5000)
    out, err = trained("--steps", 1)
    assert sum("continuing with generated stories" in line for line in err.splitlines()) == 1
    assert read_log()[0]["settings"]["data"].startswith("generated stories")
    assert asked[0] >= RECIPE[1] * TINY.seq_len


# == a run that goes on ================================================================================================


def write_token_files(text, tokenizer):
    """a.bin, b.bin and v.bin, which can be encoded again in another order of their stories: as many tokens."""
    tokenizer.save("t.json")
    told = list(documents.documents([text]))
    for name, part in (("a", told[:30]), ("b", told[30:]), ("v", told[:20])):
        bpe.write_tokens(part, tokenizer, f"{name}.bin")
        bpe.write_tokens(part[::-1], tokenizer, f"{name}-reversed.bin")


def exchange(name, other, restore):
    """Exchange two token files and their descriptions; restore: each name keeps its mtime."""
    for end in (".bin", ".bin.json"):
        one, two, stats = Path(name + end), Path(other + end), [os.stat(n + end) for n in (name, other)]
        shutil.move(one, "aside"), shutil.move(two, one), shutil.move("aside", two)
        for path, status in zip((one, two), stats if restore else ()):
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


TOKEN_RUN = ("--data", "a.bin", "b.bin", "--val-data", "v.bin", "--tokenizer", "t.json")


@pytest.fixture
def stopped_on_tokens(place, text, tokenizer):
    """A run in runs/tiny on a.bin and b.bin, validated on v.bin, that was stopped after two updates."""
    write_token_files(text, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(train.main, "--size", "tiny", *TOKEN_RUN, *PLAIN)[0] == 130
    return Path("runs", "tiny")


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("name", ["a", "b", "v"])
def test_resume_refuses_token_files_replaced_by_others_of_as_many_tokens(stopped_on_tokens, name, restore):
    was, now = (json.loads(Path(f"{n}.bin.json").read_text())["crc32"] for n in (name, f"{name}-reversed"))
    exchange(name, f"{name}-reversed", restore)
    message = refusal(train.main, "train.py", "--resume")
    assert f"{name}.bin has changed since the run began" in message
    assert f"checksum is '{now}', expected '{was}'" in message and "restore it or start another run" in message
    exchange(name, f"{name}-reversed", restore)
    assert invoke(train.main, "--resume")[0] == 0


def test_resume_refuses_token_files_that_changed_places(stopped_on_tokens):
    exchange("a", "b", restore=False)
    assert "a.bin has changed since the run began" in refusal(train.main, "train.py", "--resume")


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("described", [True, False])
def test_resume_refuses_tokens_replaced_with_their_size_and_mtime(
    place, text, tokenizer, monkeypatch, described, windows
):
    """Also where another program wrote them, without a checksum in the description."""
    monkeypatch.setattr(data, "CTIME_IS_CREATION", windows)
    write_token_files(text, tokenizer)
    for path in () if described else Path().glob("*.bin.json"):
        info = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({name: value for name, value in info.items() if name != "crc32"}), "utf-8")
    interrupt_at(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    assert invoke(train.main, "--size", "tiny", *TOKEN_RUN, *PLAIN)[0] == 130
    replace_in_place("b.bin", Path("b-reversed.bin").read_bytes())
    message = refusal(train.main, "train.py", "--resume")
    assert ("b.bin is damaged" if described else "b.bin has changed since the run began") in message


def test_token_files_are_read_again_only_where_their_state_has_changed(place, text, tokenizer, monkeypatch):
    write_token_files(text, tokenizer)
    real, checked = bpe.read_tokens, []

    def recorded(path, tokenizer=None, check=True):
        checked.append((path, check))
        return real(path, tokenizer, check)

    def read(known):
        checked.clear()
        return data.read_data(tokenizer, [["a.bin", "b.bin"], ["v.bin"]], "", known)

    monkeypatch.setattr(bpe, "read_tokens", recorded)
    first = read(None)
    assert checked == [("a.bin", True), ("b.bin", True), ("v.bin", True)]
    second = read(first.checksums)
    assert checked == [("a.bin", False), ("b.bin", False), ("v.bin", False)]
    assert np.array_equal(first.train, second.train) and second.checksums == first.checksums
    os.utime("b.bin", ns=(1, 1))
    third = read(second.checksums)
    assert checked == [("a.bin", False), ("b.bin", True), ("v.bin", False)]
    read(third.checksums)
    assert checked == [("a.bin", False), ("b.bin", False), ("v.bin", False)]


def test_resume_goes_on_with_token_files_that_were_copied_back(stopped_on_tokens):
    for path in [*Path().glob("?.bin"), *Path().glob("?.bin.json")]:
        path.write_bytes(path.read_bytes())
    assert invoke(train.main, "--resume")[0] == 0
    trained(*TOKEN_RUN, *PLAIN)
    assert model_bytes() == model_bytes("runs/tiny-2")


def test_resume_needs_neither_the_tokenizer_file_nor_the_first_model(place, text, tokenizer, finished):
    tokenizer.save("t.json")
    shutil.copy(finished.folder / "best.safetensors", "first.safetensors")
    for begun in (["--size", "tiny", "--tokenizer", "t.json"], ["--init-from", "first.safetensors"]):
        words = [*begun, "--data", text, *PLAIN]
        assert invoke(train.main, *words, "--out", "whole")[0] == 0
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
            assert invoke(train.main, *words, "--out", "run")[0] == 130
        Path(begun[-1]).write_bytes(b"another file")
        assert invoke(train.main, "--resume", "--out", "run")[0] == 0
        assert model_bytes("run") == model_bytes("whole")
        shutil.rmtree("run"), shutil.rmtree("whole")


def test_resume_without_checksums_refuses_another_number_of_tokens(stopped_on_tokens):
    """As a run has it that an older version began."""
    path = stopped_on_tokens / "last.safetensors"
    c = tinygpt.load_checkpoint(path)
    s = json.loads(c.metadata["settings"])
    s = {name: value for name, value in s.items() if name != "checksums"} | {"train_tokens": s["train_tokens"] + 1}
    tinygpt.save_checkpoint(path, c.parameters, c.cfg, c.tokenizer, c.extra, c.metadata | {"settings": json.dumps(s)})
    message = refusal(train.main, "train.py", "--resume")
    assert f"{s['train_tokens'] - 1:,} training tokens, expected {s['train_tokens']:,}" in message
