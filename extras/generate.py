"""Stories from a grammar, to train on without a network: one seed gives the same stories everywhere.

    python extras/stories.py --show 3 --seed 0

The grammar is `plots.txt`: names, phrases and plots, with the notation explained at its top. To add a plot, add a
section there. Section 1 composes a story, 2 draws its characters, 3 reads the grammar.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

GRAMMAR = Path(__file__).with_name("plots.txt")
PRONOUNS = {"he": ("he", "him", "his", "himself"), "she": ("she", "her", "her", "herself")}
ONE_PARAGRAPH = 0.1  # share of the stories that are one paragraph

Uniform = Callable[[], float]  # returns a random number in [0, 1)


# == 1  a story =======================================================================================================


def generate(seed: int, split: str = "train") -> Iterator[str]:
    """Yield stories without end. No story is in both splits: a hash of its text decides where it belongs."""
    if split not in ("train", "valid"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'valid'")
    uniform = random.Random(f"{seed} {split}").random
    grammar = read_grammar(GRAMMAR)
    plots = list(grammar.plots.values())
    while True:
        story = compose_story(uniform, pick(uniform, plots), grammar.cast)
        if is_validation(story) == (split == "valid"):
            yield story


def is_validation(story: str) -> bool:
    """True for one story in eight."""
    return hash_story(story)[0] % 8 == 0


def hash_story(story: str) -> bytes:
    return hashlib.blake2b(story.encode(), digest_size=8).digest()


def compose_story(uniform: Uniform, plot: Plot, cast: dict[str, list[str]]) -> str:
    words = draw_cast(uniform, cast, plot.animals)
    for rows in plot.tables:
        words.update(pick(uniform, rows))
    strings: list[str] = []
    expand(uniform, plot.text, strings)
    story = "".join(strings)
    while "{" in story:  # a word may contain words
        story = story.format_map(words)
    while "  " in story:  # left by empty alternatives
        story = story.replace("  ", " ")
    story = story.replace(" \n", "\n").replace("\n ", "\n").strip()
    if uniform() < ONE_PARAGRAPH:
        story = story.replace("\n", " ")
    return ARTICLE.sub(" an ", story)


# Not before "one-eyed", "once", "unicorn", "useful". The literal " a " makes this ten times as fast as \b does.
ARTICLE = re.compile(r" a (?=[aei]|o(?!ne\b|nce\b)|u(?!ni|s))")


def expand(uniform: Uniform, parts: list, strings: list[str]) -> None:
    """Append the text of `parts` to `strings`, with one alternative drawn for each choice."""
    for part in parts:
        if type(part) is str:
            strings.append(part)
        else:
            expand(uniform, pick(uniform, part), strings)


def pick(uniform: Uniform, items):
    return items[int(uniform() * len(items))]


# == 2  its characters ================================================================================================


class Words(dict):
    """The words of one story. {Word} is derived from {word}."""

    def __missing__(self, key):
        if not key[0].isupper():
            raise ValueError(f"{{{key}}} is not a word of the cast or a column of the plot's tables")
        word = self[key[0].lower() + key[1:]].format_map(self)
        self[key] = word = word[0].upper() + word[1:]
        return word


def draw_cast(uniform: Uniform, cast: dict[str, list[str]], animals: bool) -> Words:
    """Draw the main character, a friend and a parent, with pronouns that agree. plots.txt lists the words."""
    animal = animals and uniform() < 0.25
    name, kind, sex = hero = draw_character(uniform, cast, animal)
    friend, friend_kind, friend_sex = draw_character(uniform, cast, animal, hero)
    parent, parent_sex = pick(uniform, cast["parents"]).split()
    words = Words(name=name, kind=kind, parent=parent, friend=friend, small=pick(uniform, cast["small"]))
    words["newfriend"] = f"{friend} the {friend_kind}" if animal else friend
    words["home"] = pick(uniform, cast["animal homes" if animal else "homes"])
    words["hobby"] = pick(uniform, cast["animal hobbies" if animal else "hobbies"])
    if uniform() < 0.5:
        helper_sex, words["helper"], words["hname"] = parent_sex, "{his} {parent}", "{Parent}"
    else:
        helper_sex, words["helper"], words["hname"] = friend_sex, "{his} friend {newfriend}", "{friend}"
    for prefix, whose in (("", sex), ("f", friend_sex), ("p", parent_sex), ("h", helper_sex)):
        words.update(zip((prefix + word for word in PRONOUNS["he"]), PRONOUNS[whose], strict=True))
    return words


def draw_character(uniform: Uniform, cast: dict[str, list[str]], animal: bool, other: tuple | None = None):
    """(name, kind, pronoun) of a child or an animal whose name, and kind if an animal, differ from those of `other`."""
    while True:
        sex = pick(uniform, ("she", "he"))
        name = pick(uniform, cast[f"{sex} animal" if animal else sex])
        kind = pick(uniform, cast["animals"]) if animal else {"she": "girl", "he": "boy"}[sex]
        if other is None or (name != other[0] and not (animal and kind == other[1])):
            return name, kind, sex


# == 3  the grammar ===================================================================================================


class Plot(NamedTuple):
    tables: list[list[dict[str, str]]]  # rows: column -> cell; one row of each table is drawn
    text: list  # see `parse`
    animals: bool  # True if the main character may be an animal


class Grammar(NamedTuple):
    cast: dict[str, list[str]]
    plots: dict[str, Plot]


def grammar_version() -> str:
    """A hash that changes with any name, phrase or plot."""
    return hashlib.blake2b(repr(read_grammar(GRAMMAR)).encode(), digest_size=8).hexdigest()


@functools.cache
def read_grammar(path: Path) -> Grammar:
    """Raises ValueError, which names the section, where the notation is broken."""
    lines = path.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    cast, phrases, plots = {}, {}, {}
    for section in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        try:
            if title == "cast":
                cast = {name: value.split(", ") for name, value in entries(body)}
            elif title == "phrases":
                for name, value in entries(body):
                    phrases[name] = parse(f"[{value}]", phrases)
            elif title.startswith("plot: "):
                name = title.removeprefix("plot: ").removesuffix(CHILDREN)
                plots[name] = parse_plot(body, phrases, not title.endswith(CHILDREN))
            else:
                raise ValueError("expected the title 'cast', 'phrases' or 'plot: NAME'")
        except ValueError as error:
            raise ValueError(f"{path}, section {title!r}: {error}") from None
    return Grammar(cast, plots)


CHILDREN = " (children only)"  # at the end of a plot's title


def parse_plot(body: str, phrases: dict[str, list], animals: bool) -> Plot:
    *tables, (title, text) = [part.split("\n", 1) for part in re.split(r"^-- ", body, flags=re.MULTILINE)[1:]]
    if title != "text":
        raise ValueError(f"the last part is {title!r}; expected '-- text'")
    tables = [parse_table(title.removeprefix("table: ").split(" | "), items(rows)) for title, rows in tables]
    return Plot(tables, parse("\n".join(items(text)), phrases), animals)


def parse_table(columns: list[str], rows: list[str]) -> list[dict[str, str]]:
    cells = [row.split(" | ") for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"the row {' | '.join(row)!r} has {len(row)} cells; expected {len(columns)}")
    return [dict(zip(columns, row)) for row in cells]


def parse(text: str, phrases: dict[str, list]) -> list:
    """A list of strings and choices; a choice is a tuple of such lists, its alternatives."""
    stack = [[[]]]  # for each open bracket, its alternatives so far
    for token in re.split(r"([\[\]|]|<[^>]*>)", text):
        if token == "[":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        elif token == "]" and len(stack) > 1:
            choice = tuple(stack.pop())
            stack[-1][-1].append(choice)
        elif token == "]":
            raise ValueError("a ] without its [")
        elif token.startswith("<"):
            if token[1:-1] not in phrases:
                raise ValueError(f"{token} is not a phrase; there are {', '.join(phrases)}")
            stack[-1][-1] += phrases[token[1:-1]]
        elif token:
            stack[-1][-1].append(token)
    if len(stack) > 1:
        raise ValueError("a [ without its ]")
    if len(stack[0]) > 1:
        raise ValueError("a | outside brackets")
    return stack[0][0]


def entries(text: str) -> list[list[str]]:
    """[name, value] for each "name: value"; indented lines continue the value."""
    found = [" ".join(entry.split()) for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE)]
    found = [entry.split(": ", 1) for entry in found if entry]
    for entry in found:
        if len(entry) < 2:
            raise ValueError(f"expected 'name: value', got {entry[0]!r}")
    return found


def items(text: str) -> list[str]:
    """The rows of a table or the paragraphs of a plot: each begins with a dash and may span lines."""
    return [" ".join(item.split()) for item in re.split(r"^- ", text, flags=re.MULTILINE)[1:]]
