"""extras/judge.py: each figure against its definition, on stories where one can see it."""

import numpy as np
import pytest
from conftest import random_parameters, tiny_config
from helpers import refusal

import bpe
import tinygpt
from extras import judge

TEXT = ["The cat saw a red ball. It was happy.", "Tom and Lily ran to the big tree, and Lily laughed."]


@pytest.mark.parametrize(
    "story, closes", [('"Hi," he said.', True), ('"Hi, he said.', False), ("\u201cHi\u201d", True), ("\u201cHi", False)]
)
def test_quotes_close_where_each_has_its_partner(story, closes):
    assert judge.closes_quotes(story) is closes and judge.closes_quotes("Hi.") is None


def test_a_name_stays_if_it_comes_again_in_the_second_half():
    assert judge.keeps_names("One day Lily ran. She saw a ball. Then Lily went home.") is True
    assert judge.keeps_names("One day Lily ran. She saw a ball. Then Tom went home.") is False
    assert judge.keeps_names("The cat ran. The dog ran. Then it went home.") is None  # capitals begin sentences


def test_distinct_words_are_counted_among_the_first_hundred():
    assert judge.distinct_share("a b " * 50) == 0.02
    assert judge.distinct_share(" ".join(f"{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(100)) + " aa aa") == 1
    assert judge.distinct_share("a b") is None


def test_unknown_words_are_those_that_the_training_text_lacks():
    training = judge.TrainingText(TEXT)
    assert training.unknown("The CAT saw a zebra.") == 0.2
    assert training.unknown("...") is None


def by_definition(story, texts):
    words, others = judge.words_of(story), [judge.words_of(text) for text in texts]
    runs = {tuple(other[i:j]) for other in others for i in range(len(other)) for j in range(i + 1, len(other) + 1)}
    return max(
        (j - i for i in range(len(words)) for j in range(i + 1, len(words) + 1) if tuple(words[i:j]) in runs), default=0
    )


def test_the_longest_copy_is_the_longest_run_of_words_that_stands_in_one_story():
    training, rng = judge.TrainingText(TEXT), np.random.default_rng(0)
    words = [word for text in TEXT for word in judge.words_of(text)]
    stories = [" ".join(rng.choice([*words, "zebra"], 30)) for _ in range(30)]
    stories += ["a red ball it was happy tom and lily", "big tree and lily laughed", "zebra", "", "laughed", *TEXT]
    for story in stories:
        assert training.longest_copy(story) == by_definition(story, TEXT), story
    assert training.longest_copy("a red ball it was happy tom and lily") == 6  # not across stories


def test_the_command_judges_models_beside_real_stories(place, capsys):
    cfg = tiny_config(vocab_size=265)
    parameters, tokenizer = random_parameters(cfg, dtype=np.float32)[0], bpe.Tokenizer.from_merges([])
    tinygpt.save_checkpoint("m.safetensors", parameters, cfg, tokenizer.to_json())
    for name in ("train.txt", "valid.txt"):
        (place / name).write_text("\n<|endoftext|>\n".join(TEXT), encoding="utf-8")
    words = ["m.safetensors", "--data", "valid.txt", "--train-data", "train.txt", "--num-samples", "2"]
    assert judge.main([*words, "--max-new-tokens", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["real", "stories", "m.safetensors"]
    rows = {line[:22].strip(): line[22:].split() for line in lines[1:]}
    assert rows["end, %"][0] == "100.0" and rows["stories"] == ["2.0", "2.0"]
    assert rows["longest copy, words"][0] == rows["words in a story"][0] == "10.0"  # the text is its own copy
    assert "No such file" in refusal(judge.main, "judge.py", "none", "--data", "none.txt", "--train-data", "train.txt")
