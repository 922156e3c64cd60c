"""extras/tokens.py: what `python bpe.py stats` and `python bpe.py explain` print."""

import pytest
from helpers import STORIES, TOK512, run_main, write

import bpe
from extras.tokens import merge_steps

END = bpe.END


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.Tokenizer.from_merges(bpe.train(STORIES, 120))


@pytest.fixture(scope="module")
def llama():
    return bpe.Tokenizer.load(TOK512)


def test_stats_count_what_they_say(tmp_path, capsys):
    path, out = write(tmp_path / "s.txt", f"abab{END}ab"), tmp_path / "t.json"
    assert run_main(["train", str(path), "--vocab-size", "261", "--reserve", "2", "--out", str(out)]) == 0
    assert run_main(["stats", str(path), "--tokenizer", str(out)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["text", "6", "bytes,", "2", "stories"] and lines[1][:2] == ["tokens", "4"]
    assert lines[2] == ["bytes", "per", "token", "1.500"] and lines[3] == ["unused", "258", "of", "261", "entries"]
    assert lines[5] == ["4", "257", "1", "'abab'"] and lines[6] == ["2", "256", "1", "'ab'"]


def test_explain_shows_the_merges_in_their_order(gpt2, llama, tmp_path, capsys):
    for each, text in [(gpt2, "antidisestablishmentarianism"), (gpt2, "aaaaaaa"), (llama, "Once"), (gpt2, "\u65e5")]:
        (word,) = each.pretokens(text)
        steps = list(merge_steps(each, word))
        assert steps[0][0] is None and b"".join(steps[0][1]) == word.encode()
        for (_, before), (number, after) in zip(steps, steps[1:]):
            k = next(k for k, token in enumerate(after) if token != before[k])
            assert before[k : k + 2] == list(each.merges[number]) or each is llama
            assert after == [*before[:k], before[k] + before[k + 1], *before[k + 2 :]]
        assert steps[-1][1] == [each.vocab[i] for i in each.encode(text)]
    gpt2.save(tmp_path / "t.json")
    assert run_main(["explain", "It's", "--tokenizer", str(tmp_path / "t.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "t.json") and lines[1].split() == ["bytes", "I", "|", "t"]
    assert lines[-1].split() == ["ids", str(gpt2.encode("It's")[-1])]


def test_explain_takes_the_tokenizer_here_or_the_newest_of_training(gpt2, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(["explain", "a"]) == 2
    assert "name one with --tokenizer FILE" in capsys.readouterr().err
    (tmp_path / "data" / "tokens" / "x").mkdir(parents=True)
    tokenizer.save(tmp_path / "data" / "tokens" / "x" / "tokenizer.json")
    assert run_main(["explain", "a"]) == 0 and "x" in capsys.readouterr().out.splitlines()[0]
    gpt2.save("tokenizer.json")
    assert run_main(["explain", "a"]) == 0 and capsys.readouterr().out.startswith("tokenizer.json\n")
