"""Instruction tuning: conversations -> a token file and its mask, on which train.py tunes a model of stories.

    python extras/tune.py make stories.txt data.jsonl                              # requests, made from stories
    python extras/tune.py sft data.jsonl --init-from runs/1m/best.safetensors      # data.bin, .bin.json, .bin.mask
    python train.py --init-from runs/1m/best.safetensors --data data.bin --out runs/chat
    python extras/tune.py score runs/chat/best.safetensors requests.jsonl          # share of the asked words in stories
    python sample.py --chat --checkpoint runs/chat/best.safetensors

Read in order: 1 the template, 2 conversations to rows, 3 requests from stories, 4 the score, 5 command line.
"""

import json
import random
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import sample
import tinygpt
from bpe import in_range, note

# == 1  the template ===================================================================================================
#
# A message is the marker of its role and its text. An answer ends with the token that ends a story; the model also
# reads that token before the conversation. Text is encoded as text: a marker's name in it is no marker.
#
#   <|endoftext|> [system] Be kind. [user] Tell me a story. [assistant] Once upon a time ... <|endoftext|> [user] ...


class Template(NamedTuple):
    """The special token that begins a message of each role."""

    system: str
    user: str
    assistant: str


def choose_template(tokenizer):
    """The first three reserved special tokens of a tokenizer. ValueError if it has fewer."""
    free = [name for name in tokenizer.specials if name != tokenizer.ending]
    if len(free) < 3:
        advice = "train a tokenizer with python bpe.py train --reserve 8"
        raise ValueError(f"a template needs 3 reserved special tokens, the tokenizer has {len(free)}; {advice}")
    return Template(*free[:3])


def read_template(path, checkpoint, tokenizer):
    """The template of a checkpoint. ValueError if it has none or one that its tokenizer does not know."""
    text = checkpoint.metadata.get("chat_template")
    if not text:
        raise ValueError(f"{path} has no chat template: it tells stories; tune it first (docs/tuning.md)")
    try:
        template = Template(**json.loads(text))
        if not all(tokenizer.specials[name] != tokenizer.end for name in template):
            raise ValueError("the end of a story is no marker")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: its chat template does not fit its tokenizer ({error!r:.80})") from None
    return template


def encode_messages(messages, template, tokenizer):
    """Checked messages -> ids, and for each whether it counts in the loss: the assistant's text and its end do."""
    ids, counted = [], []
    for message in messages:
        answer = message["role"] == "assistant"
        text = tokenizer.encode(message["content"].strip()) + [tokenizer.end] * answer
        ids += [tokenizer.specials[getattr(template, message["role"])], *text]
        counted += [False, *[answer] * len(text)]
    return ids, counted


def prompt_ids(messages, template, tokenizer):
    """Messages -> the ids that the assistant's answer follows."""
    ids, _ = encode_messages(messages, template, tokenizer)
    return [tokenizer.end, *ids, tokenizer.specials[template.assistant]]


def jinja_template(template):
    """The template in the language that transformers and llama.cpp read."""
    markers = json.dumps(template._asdict()).replace('"', "'")
    end = "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    body = f"{{{{ markers[message['role']] }}}}{{{{ message['content'] | trim }}}}{end}"
    begin = f"{{% set markers = {markers} %}}{{{{ bos_token }}}}"
    last = f"{{% if add_generation_prompt %}}{{{{ '{template.assistant}' }}}}{{% endif %}}"
    return f"{begin}{{% for message in messages %}}{body}{{% endfor %}}{last}"


# == 2  conversations to rows ==========================================================================================

SHOWN = 5  # lines that are named one by one


def check_messages(example):
    """The messages of a line: a system message or none, then user and assistant in turns, the assistant last.
    ValueError if they are others."""
    messages = example.get("messages") if isinstance(example, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected {"messages": [{"role": ..., "content": ...}, ...]}')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {i + 1} is no object with a text `content`")
        if not message["content"].strip():
            raise ValueError(f"message {i + 1} is empty")
    roles = [message.get("role") for message in messages]
    turns = roles[roles[0] == "system" :]
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"its roles are {', '.join(map(str, roles))!s:.80}; expected user and assistant in turns")
    return messages


def read_lines(path):
    """Yield (line number, example) of a .jsonl; the ValueError in its place where a line is no JSON."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, ValueError(f"no JSON: {error!s:.60}")


def make_rows(path, T, template, tokenizer):
    """The conversations of a .jsonl -> ids (rows, T), counted (rows, T), {line: why it is left out}.

    A row is one conversation, padded on the right with the end of a story, which does not count.
    """
    rows, masks, bad = [], [], {}
    for number, example in read_lines(path):
        try:
            if isinstance(example, ValueError):
                raise example
            ids, counted = encode_messages(check_messages(example), template, tokenizer)
            if len(ids) > T:
                raise ValueError(f"it has {len(ids)} tokens and does not fit T={T}")
        except ValueError as error:
            bad[number] = str(error)
            continue
        rows.append(np.array(ids + [tokenizer.end] * (T - len(ids)), tokenizer.dtype))
        masks.append(np.array(counted + [False] * (T - len(ids)), np.uint8))
    if not rows:
        first = next((f"line {number}: {reason}" for number, reason in bad.items()), "it is empty")
        raise ValueError(f"{path} has no conversation to train on; {first}")
    return np.stack(rows), np.stack(masks), bad


def write_rows(path, rows, masks, template, tokenizer):
    """Write a token file, its description and its mask."""
    data, mask = rows.astype(rows.dtype.newbyteorder("<")).tobytes(), masks.tobytes()
    info = {"format_version": bpe.FORMAT_VERSION, "dtype": rows.dtype.name, "vocab_size": tokenizer.vocab_size}
    info |= {"tokenizer_hash": tokenizer.hash, "tokens": rows.size, "stories": len(rows)}
    info |= {"bytes": int(tokenizer.byte_lengths()[rows].sum()), "crc32": f"{zlib.crc32(data):08x}"}
    info |= {"mask": {"row": rows.shape[1], "crc32": f"{zlib.crc32(mask):08x}"}}
    info |= {"chat_template": json.dumps(template._asdict())}
    for name, content in ((path, data), (f"{path}.mask", mask), (f"{path}.json", json.dumps(info, indent=1).encode())):
        tinygpt.write_aside(Path(name), [content])


def sft(args):
    """Make the token file, its mask and its description; say what is left out and how to train."""
    out = args.out or args.data.with_suffix(".bin")
    if out.suffix != ".bin":
        raise ValueError(f"--out {out} is no token file; expected a name that ends in .bin")
    bpe.check_out(out)
    checkpoint, tokenizer = sample.load_model(args.init_from)
    T, template = args.seq_len or checkpoint.cfg.seq_len, choose_template(tokenizer)
    if checkpoint.metadata.get("chat_template"):
        template = read_template(args.init_from, checkpoint, tokenizer)
    rows, masks, bad = make_rows(args.data, T, template, tokenizer)
    write_rows(out, rows, masks, template, tokenizer)
    for number, reason in list(bad.items())[:SHOWN]:
        note(f"{args.data}, line {number}: left out: {reason}")
    if bad:
        unfit, count = sum("does not fit" in reason for reason in bad.values()), len(bad) + len(rows)
        note(f"left out {len(bad)} of {count} lines: {unfit} do not fit T={T}, {len(bad) - unfit} are bad")
        note(f"lines left out: {', '.join(map(str, bad))}")
    tokens = masks.size - int(masks[:, ::-1].argmax(1).sum())  # behind the last that counts there is padding
    print(f"{out}: {len(rows)} conversations in rows of {T}, {masks.sum():,} of {tokens:,} tokens count in the loss")
    more = ["--seq-len", T] if args.seq_len else []
    words = ["train.py", "--init-from", args.init_from, "--data", out, *more]
    print("to train:  python " + " ".join(map(str, words)))


# == 3  requests from stories ==========================================================================================

NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+")  # a capital inside a sentence
WORD = re.compile(r"(?<![\w'])[a-z]{3,}(?![\w'])")
SENTENCE = re.compile(r".+?[.!?]+[\"']?(?=\s|$)", re.DOTALL)
ASKED = 3  # words in a request
COMMON, RARE = 0.1, 0.002  # a word is asked for if it is in fewer, and in more, of the stories
NO_NAMES = {"Mom", "Dad", "Mommy", "Daddy", "Mama", "Papa", "Mum", "Mummy", "The", "They", "She", "But", "And", "You"}


def read_stories(path, progress=None):
    """Yield the stories of a text."""
    parts = []
    for text, ends in bpe.pieces([path], progress):
        parts.append(bpe.bytes_of(text))
        if ends:
            yield b"".join(parts).decode()
            parts = []
    if parts:
        yield b"".join(parts).decode()


def hero_of(story):
    """The name that occurs most often inside sentences, twice or more; None without one."""
    names = Counter(name for name in NAME.findall(story) if name not in NO_NAMES)
    name, count = next(iter(names.most_common(1)), (None, 0))
    return name if count > 1 else None


def conversation(*texts, **more):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]} | more


def ask_words(story, common, draw):
    words = sorted({word for word in WORD.findall(story) if word in common})
    if len(words) < ASKED:
        return None
    asked = draw.sample(words, ASKED)
    return conversation(f"Write a story with the words {', '.join(asked)}.", story, kind="words", words=asked)


def ask_beginning(story, common, draw):
    first = SENTENCE.match(story)
    return first and conversation(f"Write a story that begins with: {first[0]}", story, kind="begins")


def ask_next(story, common, draw):
    sentences = [match.end() for match in SENTENCE.finditer(story)]
    if len(sentences) < 4:
        return None
    cut = sentences[len(sentences) // 2]
    question, (first, rest) = "Write the beginning of a story.", (story[:cut], story[cut:].strip())
    return rest and conversation(question, first, "What happens next?", rest, kind="next")


def ask_hero(story, common, draw):
    if not (hero := hero_of(story)):
        return None
    request = ask_words(story, common, draw) or conversation("Write a story.", story)
    turns = [message["content"] for message in request["messages"]]
    return conversation(*turns, "Who is the story about?", f"The story is about {hero}.", kind="who")


KINDS = {"words": ask_words, "begins": ask_beginning, "next": ask_next, "who": ask_hero}
WEIGHTS = (4, 1, 1, 1)  # of the kinds, for a story


def make(args):
    """Write a conversation for each story that gives one."""
    bpe.check_out(args.out, [args.stories])
    stories = list(read_stories(args.stories))
    uses = Counter(word for story in stories for word in set(WORD.findall(story)))
    least, most = RARE * len(stories), max(2, COMMON * len(stories))
    common = {word for word, count in uses.items() if least <= count <= most}
    draw, made = random.Random(args.seed), Counter()
    draw.shuffle(stories)
    kinds = args.kinds or list(KINDS)
    weights = [WEIGHTS[list(KINDS).index(kind)] for kind in kinds]
    lines = []
    for story in stories:
        kind = draw.choices(kinds, weights)[0]
        if len(lines) < (args.count or len(stories)) and (example := KINDS[kind](story, common, draw)):
            made[kind] += 1
            lines.append(json.dumps(example, ensure_ascii=False) + "\n")
    if not lines:
        raise ValueError(f"{args.stories}: none of its {len(stories)} stories gives a request; name a longer text")
    tinygpt.write_aside(args.out, [line.encode() for line in lines])
    print(f"{args.out}: {len(lines)} conversations, " + ", ".join(f"{made[kind]} {kind}" for kind in kinds))


# == 4  the score ======================================================================================================


def share_used(words, text):
    """Share of the words that a text has as whole words, whatever their case."""
    found = set(re.findall(r"[a-z']+", text.lower()))
    return sum(word.lower() in found for word in words) / len(words)


def answer(model, template, messages, seed, ops, limit=None, **filters):
    """Yield the text that each new token adds to the assistant's answer; up to `limit` tokens, and to the end of the
    window. Without a template the model reads the last message as plain text."""
    p, cfg, tokenizer = model
    plain = [tokenizer.end, *tokenizer.encode(messages[-1]["content"])]
    ids = prompt_ids(messages, template, tokenizer) if template else plain
    if (room := cfg.seq_len - len(ids)) < 1:
        raise ValueError(f"the conversation has {len(ids)} tokens, the context {cfg.seq_len}; shorten it")
    decoding, banned = sample.Decoding(p, cfg, ops), sample.never_drawn(cfg, tokenizer)
    new = sample.generate(decoding, ids, seed, tokenizer.end, min(room, limit or room), banned=banned, **filters)
    yield from tokenizer.decode_iterable(new, ids[-1])


def read_requests(path, count):
    """[(user's message, words)] of the first `count` lines of a .jsonl that ask for words. ValueError without any."""
    found = []
    for _, example in read_lines(path):
        words = example.get("words") if isinstance(example, dict) else None
        if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
            found.append((check_messages(example)[0], words))
    if not found:
        raise ValueError(f"{path} asks for no words; make it with python extras/tune.py make")
    return found[:count]


def score(args):
    """Show the share of the asked words that the stories of a model use. Chance: the words of another request."""
    checkpoint, tokenizer = sample.load_model(args.model)
    template = None
    if checkpoint.metadata.get("chat_template"):
        template = read_template(args.model, checkpoint, tokenizer)
    cfg, requests = checkpoint.cfg, read_requests(args.data, args.count)
    model = tinygpt.views(tinygpt.layout(cfg), checkpoint.parameters, cfg.layers), cfg, tokenizer
    filters, ops, shares = {"temperature": args.temperature, "top_p": args.top_p}, tinygpt.find_ops(args.kernels), []
    with bpe.Progress("stories", len(requests)) as progress:
        for i, (message, words) in enumerate(requests):
            story = "".join(answer(model, template, [message], args.seed + i, ops, **filters))
            others = requests[(i + 1) % len(requests)][1]
            shares.append((share_used(words, story), share_used(words, story) == 1, share_used(others, story)))
            progress(i + 1)
    used, whole, chance = np.mean(shares, 0)
    how = "" if template else ", asked in plain text: it has no template"
    print(f"{args.model}: {len(requests)} requests{how}")
    print(f"asked words used   {used:.1%} (words of another request: {chance:.1%})")
    print(f"stories with all   {whole:.1%}")


# == 5  command line ===================================================================================================


def make_parser():
    parser = bpe.Parser(prog="tune.py", description="Conversations for train.py, and a score of what it learned.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="make|sft|score")

    def command(run, name, help):
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=run)
        return made.add_argument

    count, seed = in_range(int, 1, 2**31), in_range(int, 0, 2**62)
    add = command(make, "make", "conversations from stories, one for each story that gives one")
    add("stories", type=Path, metavar="STORIES", help=bpe.TEXT)
    add("out", type=Path, metavar="OUT.jsonl", help="file to write")
    add("--kinds", nargs="+", choices=KINDS, help="kinds of requests (default all)")
    add("--count", type=count, metavar="N", help="conversations at most (default no limit)")
    add("--seed", type=seed, default=0, help="of the stories' order and of what is asked (default %(default)s)")
    add = command(sft, "sft", "the token file and the mask of conversations")
    add("data", type=Path, metavar="DATA.jsonl", help='lines of {"messages": [{"role": ..., "content": ...}, ...]}')
    add("--init-from", required=True, type=Path, metavar="CHECKPOINT", help="the model that will be tuned")
    add("--out", type=Path, metavar="FILE.bin", help="file to write (default DATA.bin)")
    add("--seq-len", type=count, metavar="T", help="tokens in a row (default the model's)")
    add = command(score, "score", "the share of asked words that a model's stories use")
    add("model", type=Path, metavar="MODEL", help="a checkpoint")
    add("data", type=Path, metavar="DATA.jsonl", help="requests with `words`, as `make` writes them")
    add("--count", type=count, default=200, metavar="N", help="requests at most (default %(default)s)")
    add("--temperature", type=in_range(float, 0, 1e6), default=0.8, help="0 is greedy (default %(default)s)")
    add("--top-p", type=in_range(float, 0, 1, True), default=0.95, help="1 is off (default %(default)s)")
    add("--seed", type=seed, default=0, help="of the first story (default %(default)s)")
    add("--kernels", choices=tinygpt.KERNELS, help="table of ops (default the fastest that is here)")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, MemoryError) as error:
        parser.error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
