"""extras/generate.py: generated stories as an editor would read them, and the notation of the grammar."""

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from extras import generate as module
from extras.generate import GRAMMAR, generate, is_validation, read_grammar

ROOT = Path(__file__).resolve().parents[1]


def compose(uniform, plot):
    return module.compose_story(uniform, plot, read_grammar(GRAMMAR).cast)


# == 1  stories =======================================================================================================


@pytest.fixture(scope="module")
def many():
    return list(itertools.islice(generate(7), 10_000))


def test_the_same_seed_gives_the_same_stories():
    first, again, other = (list(itertools.islice(generate(seed), 200)) for seed in (3, 3, 4))
    assert first == again and not set(first) & set(other)


def test_stories_do_not_depend_on_the_hash_seed_of_python():
    code = "from extras.generate import *; print(next(generate(5)), grammar_version())"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and printed != {b""}


def test_train_and_validation_share_no_story(many):
    valid = set(itertools.islice(generate(7, "valid"), 1_250))
    assert len(valid) > 1_248 and not valid & set(many)
    assert not any(map(is_validation, many)) and all(map(is_validation, valid))


def test_hardly_any_story_comes_twice(many):
    assert len(set(many)) >= len(many) - 2


def test_every_plot_occurs(monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "compose_story", lambda _, plot, cast: drawn.append(plot) or f"Story {len(drawn)}.")
    list(itertools.islice(generate(0), 500))
    plots = read_grammar(GRAMMAR).plots.values()
    assert len(plots) >= 8 and all(plot in drawn for plot in plots)


def test_every_row_of_every_table_makes_good_stories():
    uniform = random.Random(1).random
    for plot in read_grammar(GRAMMAR).plots.values():
        for place, table in enumerate(plot.tables):
            for row in table:
                tables = [[row] if other == place else plot.tables[other] for other in range(len(plot.tables))]
                for _ in range(6):
                    story = compose(uniform, plot._replace(tables=tables))
                    assert mistakes(story) == [], story


def test_common_beginnings_are_common(many):
    assert sum(story.startswith("Once upon a time, there was a ") for story in many) > len(many) / 4
    assert sum("named Lily." in story for story in many) > len(many) / 100
    assert sum("One day, Lily found a" in story for story in many) > len(many) / 1000


def test_stories_are_as_long_as_stories(many):
    words = sorted(len(story.split()) for story in many)
    assert words[0] >= 90 and words[-1] <= 260 and words[len(words) * 9 // 10] <= 220
    assert {story.count("\n") + 1 for story in many} >= {1, 7, 8, 9, 10}


def mistakes(story):
    """The names of the rules that a story breaks."""
    spoken = story.replace("\n", " ")
    sounds = re.findall(r"\b([Aa]n?) (\w+)", spoken)
    rules = {
        "placeholder": re.search(r"[{}<>\[\]|_]", story),
        "doubled word": re.search(r"\b(?!had\b|la\b)(\w+) \1\b", spoken, re.IGNORECASE),
        "spaces": re.search(r"  | [.,!?;]|^\s|\s$|\n\n| \n|\n ", story),
        "full stop": re.search(r'[.,!?]{2}|[.!?,]"[.,]|[a-z]"(?: |$)(?=[A-Z]|$)', spoken.replace('"la, la, la"', "")),
        "capital": re.search(r'(?:^|\n|[.!?] )"?[a-z]|said, "[a-z]', story),
        "after speech": re.search(r',"(?! [a-zA-Z])', spoken)
        or re.search(r'[.]" (?:said|asked|cried|she|he) ', spoken),
        "quotes": story.count('"') % 2 or any(line.count('"') % 2 for line in story.split("\n")),
        "end": not re.search(r'[.!?]"?$', story),
        "a or an": any((article.lower() == "an") != vowel_sound(word) for article, word in sounds),
        "ascii": not story.isascii(),
        "I": re.search(r"\bi\b", story),
    }
    return [name for name, broken in rules.items() if broken]


def vowel_sound(word):
    return word[0].lower() in "aeiou" and not re.match(r"(?i)one\b|once\b|uni|use", word)


def test_an_editor_finds_no_mistake(many):
    for story in many[:3000]:
        assert mistakes(story) == [], story


@pytest.mark.parametrize(
    "story, name",
    [
        ("Lily had a apple.", "a or an"),
        ("Lily had an kite.", "a or an"),
        ("Lily saw the the sea.", "doubled word"),
        ("Lily saw {thing}.", "placeholder"),
        ("Lily sat down. she slept.", "capital"),
        ('"Look!" said Lily. "the sea."', "capital"),
        ("Lily slept..", "full stop"),
        ('Lily said, "Yes!".', "full stop"),
        ('"Yes." said Lily.', "after speech"),
        ('"Yes, said Lily.', "quotes"),
        ("Lily  slept.", "spaces"),
        ("Lily slept", "end"),
    ],
)
def test_the_editor_finds_these_mistakes(story, name):
    assert name in mistakes(story)


def test_pronouns_agree_with_the_characters():
    """With a cast of one sex, no word of the other sex may occur."""
    uniform = random.Random(2).random
    words = {"he": r"\b(he|him|his|himself|boy|dad|grandpa)\b", "she": r"\b(she|her|hers|herself|girl|mom|grandma)\b"}
    others = (
        r"(?i)\b(Mrs?|Miss|Captain|farmer|baker|keeper|man|lady|fireman|gardener|guard|mother|king|queen|dentist|"
        r"doctor)\b"
    )
    checked = {"he": 0, "she": 0}
    for _ in range(80):
        for plot in read_grammar(GRAMMAR).plots.values():
            sexes = []
            story = compose_with(uniform, plot, sexes)
            if len(set(sexes)) == 1 and not re.search(others, story):
                checked[sexes[0]] += 1
                other = words["she" if sexes[0] == "he" else "he"]
                if "dog" not in story:  # the dog next door is "he" in any story
                    assert not re.search(other, story, re.IGNORECASE), story
    assert min(checked.values()) > 50


def compose_with(uniform, plot, sexes):
    """A story, and the pronouns of its main character, friend and parent."""
    real = module.draw_cast

    def draw_cast(*args):
        words = real(*args)
        sexes.extend(words[key] for key in ("he", "fhe", "phe"))
        return words

    module.draw_cast = draw_cast
    try:
        return compose(uniform, plot)
    finally:
        module.draw_cast = real


def test_main_character_and_friend_differ():
    uniform = random.Random(3).random
    for _ in range(3000):
        words = module.draw_cast(uniform, read_grammar(GRAMMAR).cast, True)
        assert words["name"] != words["friend"]
        assert words["kind"] in ("girl", "boy") or words["newfriend"] != f"{words['friend']} the {words['kind']}"


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="expected 'train' or 'valid'"):
        next(generate(0, "test"))


# == 2  the grammar ===================================================================================================

SMALL = """# a comment
== cast
she: Lily
he: Tim
she animal: Fern
he animal: Pip
animals: owl, cat
parents: mom she
small: little
homes: a house
animal homes: a wood
hobbies: sing,
  dance
animal hobbies: hop

== phrases
smiled: smiled|laughed

== plot: a toy (children only)
-- table: toy | look
- ball | red
- apple | green, and
  big
-- text
- {name} had a {toy}.
- It was {look}. {He} <smiled>[ to {himself}|].
"""


def test_the_notation_means_what_plots_txt_says(tmp_path, monkeypatch):
    path = tmp_path / "small.txt"
    path.write_text(SMALL, encoding="utf-8")
    monkeypatch.setattr(module, "GRAMMAR", path)
    grammar = read_grammar(path)
    assert grammar.cast["hobbies"] == ["sing", "dance"] and grammar.cast["parents"] == ["mom she"]
    (plot,) = grammar.plots.values()
    assert plot.tables == [[{"toy": "ball", "look": "red"}, {"toy": "apple", "look": "green, and big"}]]
    assert not plot.animals
    expected = {
        f"{name} had {thing}.{gap}It was {look}. {he} {verb}{end}."
        for thing, look in (("a ball", "red"), ("an apple", "green, and big"))
        for name, he, himself in (("Lily", "She", "herself"), ("Tim", "He", "himself"))
        for verb in ("smiled", "laughed")
        for end in (f" to {himself}", "")
        for gap in ("\n", " ")
    }
    assert set(itertools.islice(generate(0), 2000)) == {story for story in expected if not is_validation(story)}


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[ to {himself}|]", "[ to {himself}|", "section 'plot: a toy (children only)': a [ without its ]"),
        ("[ to {himself}|]", " to {himself}]", "a ] without its ["),
        ("[ to {himself}|]", " to | {himself}", "a | outside brackets"),
        ("<smiled>", "<smield>", "<smield> is not a phrase; there are smiled"),
        ("- ball | red", "- ball", "the row 'ball' has 1 cells; expected 2"),
        ("-- text\n", "-- story\n", "the last part is 'story'; expected '-- text'"),
        ("he: Tim", "he Tim", "section 'cast': expected 'name: value', got 'he Tim'"),
        ("== plot: ", "== story: ", "expected the title 'cast', 'phrases' or 'plot: NAME'"),
        ("a {toy}", "a {tyo}", "{tyo} is not a word of the cast or a column of the plot's tables"),
    ],
)
def test_a_mistake_in_the_grammar_is_named(tmp_path, monkeypatch, old, new, message):
    path = tmp_path / "small.txt"
    path.write_text(SMALL.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(module, "GRAMMAR", path)
    with pytest.raises(ValueError, match=re.escape(message)):
        next(generate(0))


def test_the_version_changes_with_the_grammar_and_not_with_its_comments(tmp_path, monkeypatch):
    versions = set()
    for number, text in enumerate((SMALL, SMALL.replace("a comment", "another"), SMALL.replace("red", "blue"))):
        path = tmp_path / f"{number}.txt"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(module, "GRAMMAR", path)
        versions.add(module.grammar_version())
    assert len(versions) == 2
