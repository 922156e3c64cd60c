"""What a model's stories are like, beside real stories: figures that need no other model.

    python extras/judge.py stories.safetensors --data tinystories-valid.txt --train-data tinystories-train.txt

Told without a prompt, from consecutive seeds. Of each story: whether it ends, whether its quotes close, whether a name
of its first half comes again in its second, distinct words among its first hundred, words that the training text does
not have, and the longest run of words that stands in the training text as well. Read from the top.
"""

import sys
from pathlib import Path

import numpy as np
import regex

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import sample
import tinygpt

WORD = regex.compile(r"\p{L}+(?:'\p{L}+)?")
NAME = regex.compile(r"(?<=\p{Ll},? )\p{Lu}\p{Ll}+")  # a capital inside a sentence
DISTINCT_OF = 100  # words

# == 1  one story ======================================================================================================


def words_of(story):
    return WORD.findall(story.lower())


def closes_quotes(story):
    """True if every quotation mark has its partner; None for a story without."""
    straight, left, right = (story.count(mark) for mark in '"\u201c\u201d')
    return straight % 2 == 0 and left == right if straight + left + right else None


def keeps_names(story):
    """True if a name of the first half comes again in the second; None for a story whose first half has none."""
    names = set(NAME.findall(story[: len(story) // 2]))
    return any(name in story[len(story) // 2 :] for name in names) if names else None


def distinct_share(story):
    """Distinct words among the first DISTINCT_OF, as a share; None for a shorter story."""
    words = words_of(story)[:DISTINCT_OF]
    return len(set(words)) / DISTINCT_OF if len(words) == DISTINCT_OF else None


class TrainingText:
    """Words of a text by number, in order, and where each pair of words stands."""

    def __init__(self, stories):
        words = [word for story in stories for word in (*words_of(story), "")]  # "" is between stories
        self.numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
        self.text = np.array([self.numbers[word] for word in words], np.int64)
        self.pairs = self.text[:-1] * len(self.numbers) + self.text[1:]
        self.order = np.argsort(self.pairs, kind="stable")
        self.sorted = self.pairs[self.order]

    def unknown(self, story):
        """Share of a story's words that the text does not have; None for a story without words."""
        words = words_of(story)
        return sum(word not in self.numbers for word in words) / len(words) if words else None

    def longest_copy(self, story):
        """Words in the longest run of a story that stands in the text."""
        ids = [self.numbers.get(word, -1) for word in words_of(story)]
        longest = int(any(i >= 0 for i in ids))
        for start in range(len(ids) - 1):
            if ids[start] < 0 or ids[start + 1] < 0:
                continue
            pair = ids[start] * len(self.numbers) + ids[start + 1]
            places = self.order[slice(*np.searchsorted(self.sorted, [pair, pair + 1]))]
            length = 2
            while len(places):
                longest = max(longest, length)
                places = places[places + length < len(self.text)]
                if start + length == len(ids):
                    break
                places = places[self.text[places + length] == ids[start + length]]
                length += 1
        return longest


# == 2  many stories ===================================================================================================


def judge(stories, ended, training):
    """Stories and whether each ended -> {figure: value}; NaN where no story has it."""

    def mean(values):
        values = [value for value in values if value is not None]
        return float(np.mean(values)) if values else np.nan

    return {
        "stories": len(stories),
        "words in a story": mean(len(words_of(story)) for story in stories),
        "end, %": 100 * mean(ended),
        "quotes close, %": 100 * mean(map(closes_quotes, stories)),
        "names stay, %": 100 * mean(map(keeps_names, stories)),
        f"distinct of {DISTINCT_OF} words": 100 * mean(map(distinct_share, stories)),
        "unknown words, %": 100 * mean(map(training.unknown, stories)),
        "longest copy, words": mean(map(training.longest_copy, stories)),
    }


def tell(path, tokenizer_path, count, options):
    """Stories of a checkpoint, from seeds 0 .. count - 1 -> (texts, whether each ended)."""
    model, stories, ended = sample.open_model(path, tokenizer_path, ""), [], []
    with bpe.Progress(f"stories of {path}", count) as progress:
        for seed in range(count):
            drawn = []
            stories.append("".join(sample.generate_story(model, prompt="", seed=seed, drawn=drawn, **options)))
            ended.append(len(drawn) < options["max_new_tokens"])
            progress(seed + 1)
    return stories, ended


def make_parser():
    parser = bpe.Parser(prog="judge.py", description="Judge the stories of models, beside real ones.")
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help=".safetensors files of train.py, .bin of llama2.c",
    )
    add("--data", metavar="FILE", required=True, help="real stories to stand beside them: text")
    add("--train-data", metavar="FILE", required=True, help="the training text: known words, what may be copied")
    add("--tokenizer", type=Path, metavar="FILE", help="of a checkpoint that holds none, as llama2.c's")
    add(
        "--num-samples",
        type=bpe.in_range(int, 1, 10**6),
        default=100,
        metavar="N",
        help="stories (default %(default)s)",
    )
    temperature = bpe.in_range(float, 0, 1e6)
    add("--temperature", type=temperature, default=0.8, help="as sample.py has it (default %(default)s)")
    add("--max-new-tokens", type=bpe.in_range(int, 1, 2**31), default=400, metavar="N", help="(default %(default)s)")
    return parser


def read_stories(path):
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return [story for part in file.read().split(bpe.END) if (story := part.strip())]


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        real, training = read_stories(args.data), TrainingText(read_stories(args.train_data))
        options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": 0.95}
        options["ops"] = tinygpt.find_ops()
        real = real[: args.num_samples]
        columns = {"real stories": judge(real, [True] * len(real), training)}
        for path in args.checkpoints:
            tokenizer = args.tokenizer if path.suffix == ".bin" else None
            columns[str(path)] = judge(*tell(path, tokenizer, args.num_samples, options), training)
    except (OSError, ValueError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        return 130
    width = max(22, *(len(name) + 2 for name in columns))
    bpe.say(" " * 22 + "".join(f"{name:>{width}}" for name in columns))
    for figure in next(iter(columns.values())):
        bpe.say(f"{figure:22}" + "".join(f"{column[figure]:{width}.1f}" for column in columns.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
