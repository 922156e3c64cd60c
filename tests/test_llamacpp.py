"""extras/llamacpp.py: llama.cpp, transformers and the reader of `gguf` find our weights, logits, tokens and text."""

import json
from collections import Counter

import numpy as np
import pytest
import regex
from conftest import relative
from helpers import STORIES, TOK512

import bpe
import sample
import tinygpt
from extras import convert, formats, llama2c, llamacpp
from extras.recipes import LLAMA

TOKENIZER = bpe.Tokenizer.from_merges(bpe.train(STORIES * 3, 60))
SHAPE = dict(vocab_size=TOKENIZER.vocab_size, seq_len=64, width=64, layers=2, heads=4, hidden=96)
QWEN3 = LLAMA | dict(qk_norm=True, head_width=24)
GPT2 = dict(seq_len=40, position_rows=48, hidden=72)
HALF = dict(positions="rope-half")
SAVED = {
    "llama": LLAMA | dict(kv_heads=2), "llama, untied": LLAMA | dict(tied=False, rope_theta=100.0, norm_eps=1e-3),
    "llama, pairs D/2 apart": LLAMA | HALF | dict(kv_heads=1, vocab_size=TOKENIZER.vocab_size + 3),
    "llama with biases": LLAMA | dict(qkv_bias=True, up_bias=True, down_bias=True),
    "llama with all biases, pairs D/2 apart": LLAMA | dict.fromkeys([*llamacpp.BIASES], True) | HALF,
    "qwen3": QWEN3 | dict(positions="rope-half", heads=5),
    "qwen3, pairs of neighbours": QWEN3 | dict(kv_heads=2, head_width=16),
    "qwen3, norm after the embedding": QWEN3 | dict(embedding_norm=True),
    "gpt2": GPT2, "gpt2, untied": GPT2 | dict(tied=False),
}  # fmt: skip
# Relative to the largest log-probability. GPT-2: llama.cpp looks its GELU up in a table of float16.
LIMITS = {"float32": 3e-6, "float16": 5e-3, "q8_0": 0.15}
PARTS = [i for i, token in enumerate(TOKENIZER.vocab) if not token.isascii()]  # llama.cpp's server joins them to others
PROMPT = [TOKENIZER.end, *TOKENIZER.encode("Lily found a ball")]


def model_of(fields):
    cfg = tinygpt.Config(**SHAPE | fields)
    noise = np.random.default_rng(0).standard_normal(tinygpt.count_parameters(cfg)[0])
    return cfg, (tinygpt.init_parameters(cfg, 0) + 0.2 * noise).astype(np.float32)


def convert_model(folder, fields, *more):
    """convert.py --to gguf of a random model -> (its Config, parameters, the .gguf file)."""
    (cfg, flat), source, out = model_of(fields), folder / "ours.safetensors", folder / "theirs.gguf"
    tinygpt.save_checkpoint(source, flat, cfg, TOKENIZER.to_json())
    assert convert.main(["--to", "gguf", str(source), str(out), *more]) == 0
    return cfg, flat, out


def log_probabilities(cfg, flat, ids):
    """(T, V), float64."""
    p, ops = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), tinygpt.OPS["numpy"]
    x = ops.head_logits(tinygpt.forward(p, np.array([ids]), cfg, ops)[0][0], p, cfg, ops).astype(np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def greedy(cfg, flat, ids, count, tokenizer=TOKENIZER, parts=PARTS):
    decoding = sample.Decoding(tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), cfg, tinygpt.OPS["numpy"])
    banned = [*sample.never_drawn(cfg, tokenizer), *parts]
    return list(sample.generate(decoding, ids, 0, tokenizer.end, count, temperature=0, banned=banned))


# -- llama.cpp itself


def llama_cpp(path, parts=PARTS):
    """A function (prompt, count, V) -> greedy ids without `parts`, log-probabilities (count, V) at their places."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), 64, 1, 0
    params.warmup, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = False, 1, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def complete(prompt, count, V):
        request = {"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": V, "cache_prompt": False}
        request["logit_bias"] = [[i, False] for i in parts]
        answer = server.handle_completions(request)
        rows = (answer if isinstance(answer, dict) else json.loads(answer))["choices"][0]["logprobs"]["content"]
        found = np.full((len(rows), V), np.nan)
        for row, x in zip(rows, found):
            x[[token["id"] for token in row["top_logprobs"]]] = [token["logprob"] for token in row["top_logprobs"]]
        return [row["id"] for row in rows], found

    return complete


@pytest.mark.parametrize("dtype", llamacpp.DTYPES)
@pytest.mark.parametrize("name", SAVED)
def test_llama_cpp_computes_our_logits_and_tells_our_text(name, dtype, tmp_path):
    cfg, flat, out = convert_model(tmp_path, SAVED[name], "--dtype", dtype)
    ids, theirs = llama_cpp(out)(PROMPT, 12, cfg.vocab_size)
    ours = log_probabilities(cfg, flat, [*PROMPT, *ids])[len(PROMPT) - 1 :][: len(ids)]
    assert relative(theirs, ours) < max(LIMITS[dtype], 1e-3 * name.startswith("gpt2"))
    if dtype == "float32":
        assert [i for i in ids if i != TOKENIZER.end] == greedy(cfg, flat, PROMPT, 12)


def test_llama_cpp_never_samples_the_ids_that_we_do_not(tmp_path):
    cfg, flat = model_of(LLAMA | dict(tied=False, vocab_size=TOKENIZER.vocab_size + 3))
    p, banned = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), sample.never_drawn(cfg, TOKENIZER)
    p["head_w"][banned] = (
        3 * p["head_w"][log_probabilities(cfg, flat, PROMPT)[-1].argmax()]
    )  # the likeliest, were they not banned
    llamacpp.save(tmp_path / "a.gguf", cfg, flat, TOKENIZER)
    ids, theirs = llama_cpp(tmp_path / "a.gguf")(PROMPT, 6, cfg.vocab_size)
    assert theirs[0].argmax() in banned
    assert [i for i in ids if i != TOKENIZER.end] == greedy(cfg, flat, PROMPT, 6)


@pytest.mark.parametrize("text", [*STORIES, "  a \n\n b\t", "Lily's 12 balls"])
def test_llama_cpp_encodes_a_prompt_as_we_do(text, tmp_path):
    cfg, _, out = convert_model(tmp_path, SAVED["llama"])
    complete, ids = llama_cpp(out), [TOKENIZER.end, *TOKENIZER.encode(text)][:60]
    text = TOKENIZER.decode(ids[1:])
    assert np.array_equal(complete(text, 1, cfg.vocab_size)[1], complete(ids, 1, cfg.vocab_size)[1])


def test_llama_cpp_splits_a_prompt_by_gpt4s_pattern(tmp_path):
    texts = ["don't DON'T I'LL go", "1234567 balls.\n\n  He ran", "x \n ", "(t)[u]\tv", *STORIES]
    counts = Counter(word.encode() for text in texts * 2 for word in regex.findall(formats.CL100K_JSON, text))
    plain = bpe.Tokenizer.from_merges(bpe.merge_pairs(counts, 200))
    tokenizer = formats.PatternTokenizer(plain.vocab, plain.merges, plain.specials, formats.CL100K_JSON)
    cfg, flat = model_of(LLAMA | dict(vocab_size=tokenizer.vocab_size))
    llamacpp.save(tmp_path / "a.gguf", cfg, flat, tokenizer)
    complete = llama_cpp(tmp_path / "a.gguf")
    for text in texts:
        ids = [tokenizer.end, *tokenizer.encode(text)][:60]
        text = tokenizer.decode(ids[1:])
        assert tokenizer.encode(text) == ids[1:]
        assert np.array_equal(complete(text, 1, cfg.vocab_size)[1], complete(ids, 1, cfg.vocab_size)[1]), text
    other = formats.PatternTokenizer(plain.vocab, plain.merges, plain.specials, formats.CL100K)
    with pytest.raises(ValueError, match="llama.cpp has no name for the split pattern"):
        llamacpp.save(tmp_path / "b.gguf", cfg, flat, other)


SPACED_TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  a  b",
    "\n\nx",
    "\u65e5 caf\u00e9",
    *STORIES,
]


def test_llama_cpp_tells_the_text_of_a_model_of_llama2c(tmp_path):
    """Its tokenizer has scores, some of them equal, and no pre-tokens."""
    tokenizer = bpe.Tokenizer.load(TOK512)
    cfg, flat = model_of(LLAMA | dict(vocab_size=tokenizer.vocab_size + 2))
    llama2c.write_model(tmp_path / "model.bin", cfg, flat)
    out = tmp_path / "a.gguf"
    assert convert.main(["--to", "gguf", str(tmp_path / "model.bin"), str(out), "--tokenizer", str(TOK512)]) == 0
    complete = llama_cpp(out, parts := [i for i, token in enumerate(tokenizer.vocab) if not token.isascii()])
    for text in SPACED_TEXTS:
        ids = [tokenizer.end, *tokenizer.encode(text)][:50]
        text = tokenizer.decode(ids[1:]) if len(ids) == 50 else text
        if tokenizer.encode(text) == ids[1:]:
            found, theirs = complete(text, 8, cfg.vocab_size)
            assert np.array_equal(theirs, complete(ids, 8, cfg.vocab_size)[1]), text
            ours = log_probabilities(cfg, flat, [*ids, *found])[len(ids) - 1 :][: len(found)]
            assert relative(theirs, ours) < LIMITS["float32"]
            assert [i for i in found if i != tokenizer.end] == greedy(cfg, flat, ids, 8, tokenizer, parts)


def test_a_tokenizer_whose_joins_llama_cpp_would_not_make_is_refused():
    tokenizer = bpe.Tokenizer.load(TOK512)
    args = tokenizer.specials, tokenizer._byte_ids
    fewer = formats.SpacedTokenizer(tokenizer.vocab, tokenizer.merges[1:], *args)
    with pytest.raises(ValueError, match="are not joined here, but by llama.cpp"):
        llamacpp.scores_of(fewer)
    part = formats.SpacedTokenizer([*tokenizer.vocab, b"\xe6\x97"], tokenizer.merges, *args)
    with pytest.raises(ValueError, match="is a part of a character, which llama.cpp does not have"):
        llamacpp.scores_of(part)


# -- the reader of `gguf`


@pytest.mark.parametrize("dtype", llamacpp.DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_reader_of_gguf_finds_our_weights(name, dtype, tmp_path):
    theirs = pytest.importorskip("gguf")
    cfg, flat, out = convert_model(tmp_path, SAVED[name], "--dtype", dtype)
    reader = theirs.GGUFReader(out)
    tensors = {t.name: t for t in reader.tensors}
    w = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers)
    down = w["layers"][1]["down_w"].T
    found = tensors["blk.1.ffn_down.weight"]
    exact = theirs.GGMLQuantizationType.F32 if dtype == "float32" else theirs.GGMLQuantizationType.F16
    quantized = dtype == "q8_0" and cfg.hidden % 32 == 0  # 72 columns are no whole number of blocks
    assert found.tensor_type == (theirs.GGMLQuantizationType.Q8_0 if quantized else exact)
    if quantized:
        assert found.data.tobytes() == theirs.quants.quantize(down, theirs.GGMLQuantizationType.Q8_0).tobytes()
    else:
        assert np.array_equal(found.data, down.astype(found.data.dtype))
    assert np.array_equal(tensors["output_norm.weight"].data, w["norm_w"])
    assert reader.get_field("tokenizer.ggml.tokens").contents() == TOKENIZER.strings()
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == TOKENIZER.end


# -- transformers


READABLE = {  # its reader takes GPT-2 with 1024 positions, Qwen3 with heads of 128 alone
    "llama": SAVED["llama"], "llama, pairs D/2 apart": SAVED["llama, pairs D/2 apart"],
    "qwen3": QWEN3 | dict(heads=2, head_width=128), "gpt2": dict(position_rows=1024, hidden=256),
}  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_transformers_opens_a_gguf_file(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for needed in ("gguf", "accelerate"):
        pytest.importorskip(needed)
    cfg, flat, out = convert_model(tmp_path, READABLE[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=out.name)
    with torch.no_grad():
        theirs = torch.log_softmax(model.eval()(torch.tensor([PROMPT])).logits[0].double(), -1).numpy()
    assert relative(theirs, log_probabilities(cfg, flat, PROMPT)) < 1e-5
    for text in STORIES:
        assert [i for i in tokenizer(text).input_ids if i != TOKENIZER.end] == TOKENIZER.encode(text)


# -- what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(mlp="relu2"), "no architecture for this model; gpt2 differs in mlp=relu2 \\(expected gelu-tanh\\)"),
        (dict(positions="alibi"), "gpt2 differs in positions=alibi \\(expected learned\\)"),
        (dict(head_bias=True), "gpt2 differs in head_bias=True \\(expected False\\)"),
        (dict(attention_scale=False), "gpt2 differs in attention_scale=False \\(expected True\\)"),
        (QWEN3 | dict(qkv_bias=True), "llama differs in qk_norm=True \\(expected False\\)"),
        (LLAMA | dict(window=4), "llama differs in window=4 \\(expected 0\\)"),
        (dict(positions="rope", qk_norm=True), "positions=rope \\(expected learned\\)"),
        (dict(kv_heads=2), "gpt2 differs in kv_heads=2 \\(expected 4\\)"),
    ],
)
def test_a_model_that_llama_cpp_does_not_compute_is_refused_by_what_differs(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        llamacpp.save(tmp_path / "a.gguf", *model_of(fields), TOKENIZER)
    assert not [*tmp_path.iterdir()]


def test_weights_beyond_float16_are_refused(tmp_path):
    cfg, flat = model_of(LLAMA)
    flat[7] = 1e5
    with pytest.raises(ValueError, match="a number is 1e\\+05, beyond float16; write --dtype float32"):
        llamacpp.save(tmp_path / "a.gguf", cfg, flat, TOKENIZER, "float16")
    llamacpp.save(tmp_path / "a.gguf", cfg, flat, TOKENIZER, "q8_0")  # its scale is 787


def test_halves_are_rounded_away_from_zero_as_the_format_does():
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = 127, 0.5, -0.5, 1.5, 2.4999
    assert llamacpp.quantized(x)[0, 2:].tolist()[:6] == [127, 1, -1, 2, 2, 0]
    assert not llamacpp.quantized(np.zeros((2, 64), np.float32)).any()


def test_a_mistake_of_the_command_is_one_line(tmp_path, capsys):
    out = convert_model(tmp_path, LLAMA)[2]
    source = tmp_path / "ours.safetensors"
    capsys.readouterr()
    for words, message in [
        (["--to", "gguf", source, out], "theirs.gguf exists; name another"),
        (["--to", "gguf", source, tmp_path], "exists; name another"),
        (["--to", "gguf", source, tmp_path / "a", "--dtype", "q4"], "invalid choice: 'q4'"),
        (
            ["--to", "hf", source, tmp_path / "a", "--dtype", "q8_0"],
            "--dtype q8_0: expected float32, float16, bfloat16",
        ),
        (["--to", "llama2c", source, tmp_path / "a", "--dtype", "float16"], "expected none with this direction"),
        (["--to", "gguf", source, tmp_path / "a", "--dtype", "bfloat16"], "expected float32, float16, q8_0"),
    ]:
        with pytest.raises(SystemExit) as left:
            convert.main([str(word) for word in words])
        err = capsys.readouterr().err
        assert left.value.code == 2 and message in err and err.count("\n") == 1, err
