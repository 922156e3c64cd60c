"""Write the small files in tests/golden, from what other implementations compute. Not run by the tests.

    python tests/make_golden.py gpt2_bpe vocab.json merges.txt      (needs `tokenizers`; GPT-2's two published files)
    python tests/make_golden.py tiny_model                          (needs `torch`)
    python tests/make_golden.py tiny_llama                          (the same)
    python tests/make_golden.py port_gpt2                           (nothing: of our own specification)
    python tests/make_golden.py port_llama                          (the same)
    python tests/make_golden.py box                                 (nothing: of stories.safetensors)

Each function below writes tests/golden/NAME.json; its arguments are those of the command line. A port_NAME.safetensors
is written by extras/explain.py.
"""

import json
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
PORTS = {"port_gpt2": ["--size", "gpt2", "--scaled-down"], "port_llama": ["--size", "260k", "--scaled-down"]}

# Chosen for what they exercise: contractions, case, runs of white space, digits, signs, accents, other scripts, emoji,
# zero-width and control characters, things that look like special tokens.
GPT2_TEXTS = [
    "",
    "a",
    " ",
    "\n",
    "Once upon a time, there was a little girl named Lily.",
    "She said, \"I can't find my doll!\" and they'll look, we've looked, he'd look, I'm sure you're right, it's so.",
    "IT'S CAN'T I'LL 'tis ''s 's'S don''t x'sy 'v 'r 'l 'll'll",
    "two  spaces   three    four",
    "trailing   ",
    "   leading",
    "tabs\t\tand\n\n\nlines \n \n  end\r\n\r\n",
    "\u00a0no-break\u00a0 \u00a0space\u3000wide \u2003em",
    "1 12 123 1234 3.14159 1,000,000 2nd x86_64 \u00bd \u2163 \u0664\u0665",
    "!? ... --- (a) [b] {c} <d> @home #tag $5 50% a&b *x* ~/.cfg C:\\dir",
    "def f(x):\n    return x ** 2  # square\n",
    "na\u00efve caf\u00e9 \u00fcber \u00c5ngstr\u00f6m \u0141\u00f3d\u017a \u00df cafe\u0301",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u4f60\u597d\uff0c\u4e16\u754c",
    "\ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f\U0001f44d\U0001f3fd",
    "zero\u200bwidth\ufeff \x00 \x07 \x1f \x7f \x85 \u2028",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa hahahahahaha =================",
    "antidisestablishmentarianism supercalifragilisticexpialidocious",
    "<|endoftext|>",
    "A story.<|endoftext|>  Another  <|endoftext|><|endoftext|>\n",
    "<|endoftext <|endoftext|> |endoftext|>",
]


def gpt2_bpe(vocab_json, merges_txt):
    """GPT-2's ids of GPT2_TEXTS, and as much of its vocabulary as these ids are made of, with its first 200 merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = json.loads(Path(vocab_json).read_text(encoding="utf-8"))
    lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])

    def ids(text, special):
        tokenizer.encode_special_tokens = not special
        return tokenizer.encode(text).ids

    texts = [{"text": text, "plain": ids(text, False), "special": ids(text, True)} for text in GPT2_TEXTS]
    parts = {left + right: (left, right) for left, right in merges}
    needed = set(merges[:200])
    token = {i: string for string, i in vocab.items()}
    todo = [token[i] for row in texts for i in row["plain"]]
    while todo:
        pair = parts.get(todo.pop())
        if pair and pair not in needed:
            needed.add(pair)
            todo += pair
    # the parts of the first merges are results of earlier ones, so every part has an id here
    merges = [pair for pair in merges if pair in needed]
    singles = [string for string in vocab if len(string) == 1]
    strings = sorted([*singles, *(left + right for left, right in merges), "<|endoftext|>"], key=vocab.get)
    return {"vocab": {string: vocab[string] for string in strings}, "merges": merges, "texts": texts}


T, V, F = 5, 11, 7
GPT2 = dict(norm="layernorm", norm_eps=1e-5, embedding_norm=False, final_norm=True, qk_norm=False)
GPT2 |= dict(positions="learned", attention_scale=True, window=0, mlp="gelu-tanh", tied=True)
LLAMA = dict(norm="rmsnorm", positions="rope", rope_theta=100.0, mlp="swiglu", tied=False)
LLAMA |= dict(qkv_bias=False, out_bias=False, up_bias=False, down_bias=False)


def tiny_model():
    C, P, L = 6, 8, 3
    config = dict(vocab_size=V, seq_len=T, width=C, layers=L, heads=3, kv_heads=3, head_width=2, hidden=F)
    shapes = dict(embed_w=(V, C), position_w=(P, C), qkv_w=(L, C, 3 * C), out_w=(L, C, C), up_w=(L, C, F))
    shapes |= dict(down_w=(L, F, C), norm1_w=(L, C), norm1_b=(L, C), qkv_b=(L, 3 * C), out_b=(L, C))
    shapes |= dict(norm2_w=(L, C), norm2_b=(L, C), up_b=(L, F), down_b=(L, C), norm_w=(C,), norm_b=(C,))
    return run_torch(config | GPT2 | dict(position_rows=P), shapes)


def tiny_llama():
    C, H, G, D, L = 6, 4, 2, 4, 2
    config = dict(vocab_size=V, seq_len=T, width=C, layers=L, heads=H, kv_heads=G, head_width=D, hidden=F)
    shapes = dict(embed_w=(V, C), head_w=(V, C), qkv_w=(L, C, D * (H + 2 * G)), out_w=(L, H * D, C))
    shapes |= dict(up_w=(L, C, 2 * F), down_w=(L, F, C), norm1_w=(L, C), norm2_w=(L, C), norm_w=(C,))
    return run_torch(config | GPT2 | LLAMA, shapes)


def run_torch(config, shapes):
    """What PyTorch makes in float64 of a tiny model whose parameters, in the order of these names, are
    scale * sin(1), scale * sin(2), ... Nothing of tinygpt.py is used."""
    import torch
    from test_torch import torch_model

    scale, first, parameters = 0.3, 1, {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        values = scale * torch.sin(torch.arange(first, first + count, dtype=torch.float64))
        parameters[name] = values.reshape(shape).requires_grad_()
        first += count
    tokens = torch.tensor([[3, 1, 3, 0, 10], [1, 1, 7, 2, 9]])
    targets = torch.tensor([[1, 3, 0, 10, 4], [1, 7, 2, 9, 8]])
    weights = torch.tensor([[1.0, 0.5, 0.0, 2.0, 1.0], [0.25, 1.0, 3.0, 0.0, 1.5]], dtype=torch.float64)
    loss, nats, logits = torch_model(parameters, tokens, targets, weights, config)
    loss.backward()
    outputs = {"loss": loss.item(), "nats": nats.tolist(), "logits": logits.tolist()}
    gradients = {name: p.grad.flatten().tolist() for name, p in parameters.items()}
    inputs = {"config": config, "scale": scale}
    inputs |= {"tokens": tokens.tolist(), "targets": targets.tolist(), "weights": weights.tolist()}
    return inputs | outputs | {"gradients": gradients}


def port(name, path):
    """Every number of a tiny model's forward, backward and ten updates, for a port in another language."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "extras"))
    import explain

    return explain.main(["golden", *PORTS[name], "--out", str(path)])


def box():
    """{prompt: greedy text} of stories.safetensors, by the specification."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import sample
    import tinygpt

    model = sample.open_model(Path(tinygpt.__file__).with_name("stories.safetensors"), None, "")
    options = {"seed": 0, "max_new_tokens": 60, "temperature": 0}
    tell = sample.generate_story
    prompts = ("", "Lily found", "One day, a little bear")
    return {prompt: "".join(tell(model, tinygpt.OPS["numpy"], prompt, **options)) for prompt in prompts}


GOLDENS = {"gpt2_bpe": gpt2_bpe, "tiny_model": tiny_model, "tiny_llama": tiny_llama, "box": box}


def main(argv):
    if argv and argv[0] in PORTS:
        return port(argv[0], GOLDEN / f"{argv[0]}.safetensors")
    if not argv or argv[0] not in GOLDENS:
        sys.exit(f"usage: make_golden.py {'|'.join([*GOLDENS, *PORTS])} FILE...\n{__doc__}")
    path = GOLDEN / f"{argv[0]}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(GOLDENS[argv[0]](*argv[1:]), ensure_ascii=True, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
