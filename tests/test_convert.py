"""extras/convert.py: models of `transformers` with random weights give the same logits as ours; what is refused."""

import json
import os
import pickle
import sys

import numpy as np
import pytest
from conftest import TABLES, ops_of, random_parameters, relative, tiny_config
from helpers import CONFIGS, OF_ALL, TOK512, refusal, transformers_files

import bpe
import sample
import tinygpt
from extras import convert
from extras.formats import SpacedTokenizer
from extras.recipes import LLAMA
from extras.tensors import TABLES as NAMES
from extras.tensors import files_of_tensors, fold_embedding_norm, parameters_from, tensors_from

# == 1  the same logits ================================================================================================

SMALL = dict(vocab_size=53, bos_token_id=1, eos_token_id=1, pad_token_id=1)
MODELS = {  # family -> (configurations of transformers, limit): parts of theirs but for GPT-2's run in float32
    "GPT2": (
        [
            dict(n_positions=24, n_embd=24, n_layer=2, n_head=3, **more)
            for more in (
                {}, dict(scale_attn_weights=False, n_inner=28), dict(tie_word_embeddings=False, layer_norm_epsilon=0.1),
                dict(activation_function="relu2", reorder_and_upcast_attn=True), dict(activation_function="swish"),
                dict(activation_function="gelu_fast"), dict(activation_function="gelu_python"),
            )
        ],
        1e-10,
    ),
    "GPTNeo": (
        [
            dict(
                max_position_embeddings=24, hidden_size=24, num_layers=4, num_heads=3, window_size=4,
                attention_types=[[["global", "local"], 2]],
            ),
            dict(
                max_position_embeddings=24, hidden_size=24, num_layers=3, num_heads=3, intermediate_size=28,
                attention_types=[[["global"], 3]], tie_word_embeddings=False,
            ),
        ],
        1e-5,
    ),
    "Llama": (
        [
            dict(
                hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6,
                num_key_value_heads=groups, max_position_embeddings=24, tie_word_embeddings=tied, attention_bias=bias,
                mlp_bias=bias, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            )
            for groups, tied, bias in ((2, False, True), (6, True, False))
        ],
        1e-5,
    ),
    "Qwen3": (
        [
            dict(
                hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6, head_dim=head,
                num_key_value_heads=groups, max_position_embeddings=24, tie_word_embeddings=tied, attention_bias=bias,
                rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            )
            for groups, tied, bias, head in ((2, False, True, 8), (6, True, False, 4))
        ],
        1e-5,
    ),
    "Bloom": ([dict(hidden_size=24, n_layer=2, n_head=heads) for heads in (2, 6)], 1e-5),
}  # fmt: skip
CASES = [(family, shape, limit) for family, (shapes, limit) in MODELS.items() for shape in shapes]


def random_model(family, shape):
    """A model of transformers in float64, its weights away from what they start with."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**SMALL, **shape)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + head)(config).double().eval()
    with torch.no_grad():
        for x in model.parameters():
            x += 0.2 * torch.randn_like(x)
    return model


def our_logits(parameters, cfg, tokens, table):
    p = tinygpt.views(tinygpt.layout(cfg), parameters, cfg.layers)
    x, _ = tinygpt.forward(p, tokens, cfg, ops_of(table))
    return np.stack([ops_of(table).head_logits(row, p, cfg, ops_of(table)) for row in x])


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("family, shape, limit", CASES)
def test_logits_are_those_of_transformers(family, shape, limit, table):
    torch, model = pytest.importorskip("torch"), random_model(family, shape)
    tensors = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    parameters, cfg = convert.from_transformers(json.loads(model.config.to_json_string(use_diff=False)), tensors)
    tokens = np.random.default_rng(0).integers(0, 53, (2, 17))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert relative(our_logits(parameters, cfg, tokens, table), theirs) < limit


# == 2  what is read, and what is refused in one line ==================================================================


def load(files, config=None):
    """The flat parameters of these files, config.json another one."""
    name = "config.json" if config is None else "other.json"
    if config is not None:
        (files / name).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    tensors = convert.read_tensors([files / "model.safetensors"])
    return convert.from_transformers(convert.read_config(files / name), tensors)


@pytest.fixture(params=CONFIGS)
def files(request, tmp_path):
    for name, data in transformers_files(request.param).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_config_is_read_as_other_programs_write_it(files):
    parameters, cfg = load(files)
    data = (files / "config.json").read_bytes()
    quoted = {name: str(x) if type(x) in (int, float) else x for name, x in json.loads(data).items()}
    for other in (
        b"\xef\xbb\xbf" + data,
        json.dumps(json.loads(data), indent=1).replace("\n", "\r\n").encode(),
        quoted,
    ):
        found, same = load(files, other)
        assert same == cfg and np.array_equal(found, parameters)


def test_a_config_that_cannot_be_read_is_refused_in_one_line(files):
    config = json.loads((files / "config.json").read_bytes())
    layers = next(name for name in ("n_layer", "num_layers", "num_hidden_layers") if name in config)
    for other, message in [
        ([config], "config.json is a list; expected an object"),
        (3, "config.json is a int; expected an object"),
        (b"", "other.json is not JSON"),
        (b"{" + b'"a":[' * 100_000, "other.json is not JSON"),
        (b"\xff{}", "other.json is not text: byte 0xff is not UTF-8"),
        (json.dumps(config).encode("utf-16"), "other.json is not text"),
        ({name: x for name, x in config.items() if name != layers}, f"config.json has no field {layers}"),
        (config | {layers: "two"}, f"{layers} is 'two'; expected a positive int"),
        (config | {layers: "2.5"}, f"{layers} is '2.5'; expected a positive int"),
        (config | {layers: "9" * 5000}, f"{layers} is '999"),
        (config | {"vocab_size": "-3"}, "vocab_size is -3; expected a positive int"),
        (config | {"vocab_size": [11]}, r"vocab_size is \[11\]; expected a positive int"),
        (config | {"vocab_size": "nan"}, "vocab_size is 'nan'; expected a positive int"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load(files, other)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_every_field_of_a_config_may_be_missing_without_a_traceback(files):
    config = json.loads((files / "config.json").read_bytes())
    for name in config:
        for more in ({}, {name: None}, {name: {}}, {name: "x"}):
            try:
                load(files, {key: x for key, x in config.items() if key != name} | more)
            except ValueError as error:
                assert len(str(error)) > 20 and "\n" not in str(error)


@pytest.mark.parametrize(
    "types",
    [
        [[["global"], 10**12]],
        [[[], 10**12]],
        [[["global"], 10**12], [["local"], -(10**12)]],
        [[["global"], -(10**30)]],
        [[[], 10**30]],
    ],
)
def test_layers_without_end_are_refused_at_once(types, tmp_path):
    for name, data in transformers_files("gpt_neo").items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="config.json: .*attention_types"):
        load(tmp_path, json.loads((tmp_path / "config.json").read_bytes()) | {"attention_types": types})


# -- pickles


def saved_by_torch(folder, family):
    """A folder with config.json and the same tensors as pytorch_model.bin -> the .safetensors file."""
    torch = pytest.importorskip("torch")
    for name, data in transformers_files(family).items():
        (folder / name).write_bytes(data)
    tensors = convert.read_tensors([folder / "model.safetensors"])
    as_torch = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    torch.save(as_torch, folder / "pytorch_model.bin")
    return (folder / "model.safetensors").rename(folder / "apart")


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("family", ["gpt_neo", "llama"])
def test_a_pickle_of_tensors_is_read_as_the_same_model(family, tmp_path):
    apart = saved_by_torch(tmp_path, family)
    files = files_of_tensors(tmp_path)
    assert [path.name for path in files] == ["pytorch_model.bin"]
    config = convert.read_config(tmp_path / "config.json")
    found, cfg = convert.from_transformers(config, convert.read_tensors(files))
    apart.rename(tmp_path / "model.safetensors")
    assert files_of_tensors(tmp_path) == [tmp_path / "model.safetensors"]  # these are taken where both are there
    expected, same = load(tmp_path)
    assert cfg == same and found.tobytes() == expected.tobytes()


def test_bfloat16_in_a_pickle_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.tensor([1.0, 2.5], dtype=torch.bfloat16)}, tmp_path / "pytorch_model.bin")
    assert convert.read_tensors([tmp_path / "pytorch_model.bin"])["a"].tolist() == [1, 2.5]


def test_nothing_in_a_hostile_pickle_is_executed(tmp_path):
    torch = pytest.importorskip("torch")
    for number, content in enumerate([Hostile(tmp_path / "done"), {"a": Hostile(tmp_path / "done")}]):
        torch.save(content, tmp_path / "pytorch_model.bin")
        (tmp_path / f"plain-{number}.bin").write_bytes(pickle.dumps(content, 2))
        for name in ("pytorch_model.bin", f"plain-{number}.bin"):
            with pytest.raises(ValueError, match=f"{name} is not a file of tensors alone: torch.load refuses it"):
                convert.read_tensors([tmp_path / name])
    assert not (tmp_path / "done").exists()
    pickle.loads(pickle.dumps(content))  # it would have done it
    assert (tmp_path / "done").exists()


def test_a_pickle_that_is_no_dictionary_of_tensors_is_refused_in_one_line(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    for content, message in [
        ({"state": {"a": torch.ones(2)}}, "'state' is a dict; expected {name: tensor}"),
        ({3: torch.ones(2)}, "3 is a Tensor; expected {name: tensor}"),
        ([torch.ones(2)], "'the whole' is a list; expected {name: tensor}"),
    ]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            convert.read_tensors([path])
    data = path.read_bytes()
    for cut in (b"", b"\x80", data[: len(data) // 2]):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match="is not a file of tensors alone"):
            convert.read_tensors([path])
    path.write_bytes(data)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ValueError, match="PyTorch 2.5.1\\+cpu may execute it: expected 2.6 or newer"):
        convert.read_tensors([path])


def test_without_torch_a_pickle_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle; convert it to .safetensors, or pip install"):
        convert.read_tensors([tmp_path / "pytorch_model.bin"])  # which is not even there
    with pytest.raises(ValueError, match="no .safetensors file and no pytorch_model.bin"):
        convert.read_tensors([])


# == 3  to transformers ================================================================================================

TOKENIZER = bpe.Tokenizer.from_merges([(b"a", b"b"), (b"c", b"d"), (b"ab", b"cd")])
SHAPE = dict(vocab_size=TOKENIZER.vocab_size + 3, seq_len=24, width=24, layers=3, heads=6, hidden=28)
BIASES = dict.fromkeys(("qkv_bias", "out_bias", "up_bias", "down_bias"), True)
HALF, QWEN = LLAMA | dict(positions="rope-half"), LLAMA | dict(qk_norm=True, head_width=8)
EXPORTED = {  # name -> (class of transformers, our fields, whether the same bytes come back)
    "gpt2": ("GPT2LMHeadModel", dict(mlp="relu2", attention_scale=False), True),
    "gpt2, short window": ("GPT2LMHeadModel", dict(position_rows=30, tied=False), True),
    "gpt neo": ("GPTNeoForCausalLM", dict(attention_scale=False, qkv_bias=False, window=4, mlp="gelu"), True),
    "llama": ("LlamaForCausalLM", HALF | dict(kv_heads=2, norm_eps=1e-3), True),
    "llama, pairs of neighbours": ("LlamaForCausalLM", LLAMA | dict(kv_heads=2, tied=False), False),
    "qwen3": ("Qwen3ForCausalLM", QWEN | dict(positions="rope-half", rope_theta=100.0), True),
    "qwen3, pairs of neighbours": ("Qwen3ForCausalLM", QWEN | dict(kv_heads=3), False),
    "qwen3, norm after the embedding": ("Qwen3ForCausalLM", QWEN | dict(embedding_norm=True), False),
    "llama with biases": (
        "LlamaForCausalLM",
        LLAMA | dict.fromkeys(("qkv_bias", "out_bias", "down_bias"), True),
        False,
    ),
}
EXPORTED["llama with biases"][1]["up_bias"] = True


def model_of(fields):
    cfg = tinygpt.Config(**SHAPE | fields)
    flat = tinygpt.init_parameters(cfg, 0) + 0.2 * np.random.default_rng(0).standard_normal(
        tinygpt.count_parameters(cfg)[0]
    )
    return cfg, flat.astype(np.float32)


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_loads_what_is_exported_and_tells_the_same(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    expected, fields, same_bytes = EXPORTED[name]
    (cfg, flat), source, out = model_of(fields), tmp_path / "ours.safetensors", tmp_path / "theirs"
    tinygpt.save_checkpoint(source, flat, cfg, TOKENIZER.to_json())
    assert convert.main(["--to", "hf", str(source), str(out)]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == expected and tokenizer.eos_token == bpe.END
    text = "Lily abcd ab, the cab\n\u65e5"
    ids = [TOKENIZER.end, *TOKENIZER.encode(text)][:20]
    assert tokenizer(text).input_ids == TOKENIZER.encode(text) and tokenizer.decode(TOKENIZER.encode(text)) == text
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :].tolist()
    assert relative(our_logits(flat, cfg, np.array([ids]), "numpy"), theirs) < 1e-5
    decoding = sample.Decoding(tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), cfg, tinygpt.OPS["numpy"])
    banned = sample.never_drawn(cfg, TOKENIZER)
    ours = list(sample.generate(decoding, ids, 0, TOKENIZER.end, 4, temperature=0, banned=banned))
    assert [i for i in greedy if i != TOKENIZER.end] == ours
    assert convert.main(["--from", "hf", str(out), str(tmp_path / "back.safetensors")]) == 0
    back = tinygpt.load_checkpoint(tmp_path / "back.safetensors")
    assert (back.parameters.tobytes() == flat.tobytes()) == same_bytes
    assert relative(our_logits(back.parameters, back.cfg, np.array([ids]), "numpy"), theirs) < 1e-5


def test_heads_need_not_divide_the_width():
    cfg = tinygpt.Config(**SHAPE | QWEN | dict(heads=5, positions="rope-half"))
    assert convert.fitting_family(cfg)[0] == "qwen3"


def test_a_tokenizer_of_sentencepiece_goes_with_its_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    llama = bpe.Tokenizer.load(TOK512)
    spaced = SpacedTokenizer(llama.vocab, llama.merges, llama.specials, llama._byte_ids)  # no two merges of one rank
    (cfg, flat), source, out = model_of(HALF | dict(vocab_size=512)), tmp_path / "m.safetensors", tmp_path / "out"
    tinygpt.save_checkpoint(source, flat, cfg, spaced.to_json())
    assert convert.main(["--to", "hf", str(source), str(out)]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == 512 and tokenizer.eos_token == "<s>" and model.generation_config.eos_token_id == spaced.end
    for text in ("Lily found a ball.", "  a  b", "caf\u00e9"):
        assert tokenizer(text).input_ids == spaced.encode(text) and tokenizer.decode(spaced.encode(text)) == text
    assert convert.main(["--from", "hf", str(out), str(tmp_path / "back.safetensors")]) == 0
    assert bpe.Tokenizer.from_json(tinygpt.load_checkpoint(tmp_path / "back.safetensors").tokenizer).hash == spaced.hash


@pytest.mark.parametrize("family", [family for family in CONFIGS])
def test_tensors_of_other_systems_come_back_as_the_same_bytes(family):
    cfg = tinygpt.Config(vocab_size=11, tied=False, **convert.FAMILIES[family](OF_ALL | CONFIGS[family])[0])
    flat = np.random.default_rng(0).standard_normal(tinygpt.count_parameters(cfg)[0], np.float32)
    theirs = tensors_from(cfg, flat, NAMES[family]) | {"extra": flat[:3]}
    found, left = parameters_from(cfg, theirs, NAMES[family])
    assert found.tobytes() == flat.tobytes() and left == ["extra"]


def test_the_names_of_cs336_are_a_table():
    cfg, flat = model_of(LLAMA | dict(tied=False))
    theirs = tensors_from(cfg, flat, NAMES["cs336"])
    assert theirs["layers.2.attn.k_proj.weight"].shape == (24, 24) and "layers.0.ffn.w2.weight" in theirs
    assert parameters_from(cfg, theirs, NAMES["cs336"])[0].tobytes() == flat.tobytes()


def test_a_norm_after_the_embedding_folds_exactly():
    cfg, flat = model_of(QWEN | dict(embedding_norm=True))
    without, folded = fold_embedding_norm(cfg, flat)
    tokens = np.arange(20)[None]
    assert not without.embedding_norm and not without.tied
    ours, theirs = (our_logits(x, c, tokens, "numpy") for x, c in ((flat, cfg), (folded, without)))
    assert np.array_equal(ours, theirs)
    with pytest.raises(ValueError, match="positions=learned"):
        fold_embedding_norm(*model_of(dict(embedding_norm=True)))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(positions="rope"),
            "no class for this model; GPT2LMHeadModel differs in positions=rope \\(expected learned\\)",
        ),
        (dict(heads=5, head_width=6), "LlamaForCausalLM differs in norm=layernorm"),
        (
            dict(heads=5, head_width=5, qk_norm=True),
            "no class for this model; positions=rope-half turns pairs, but head_width=5 is odd",
        ),
        (LLAMA | dict(qkv_bias=True), "LlamaForCausalLM differs in out_bias=False \\(expected True\\)"),
        (dict(window=4), "GPT2LMHeadModel differs in window=4 \\(expected 0\\)"),
        (dict(head_bias=True), "GPT2LMHeadModel differs in head_bias=True"),
        (dict(final_norm=False), "GPT2LMHeadModel differs in final_norm=False"),
    ],
)
def test_a_model_that_transformers_has_no_class_for_is_refused_by_what_differs(fields, message):
    with pytest.raises(ValueError, match=message):
        convert.fitting_family(model_of(fields)[0])


def test_a_mistake_of_the_command_is_one_line(tmp_path, capsys):
    (cfg, flat), source = model_of({}), tmp_path / "m.safetensors"
    tinygpt.save_checkpoint(source, flat, cfg, TOKENIZER.to_json())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for words, message in [
        (["--to", "hf", source, tmp_path / "full"], "full exists and is not an empty folder"),
        (["--to", "hf", source, source], "exists and is not an empty folder"),
        (["--to", "hf", source], "expected SOURCE and one file or folder to write: OUT or --out"),
        (["--to", "hf", source, "a", "--out", "b"], "expected SOURCE and one file or folder to write: OUT or --out"),
        (["--to", "hf", tmp_path / "none", "a"], "No such file"),
        (["--to", "hf", tmp_path / "full", "a"], "No such file"),
        (["--to", "gif", source, "a"], "invalid choice: 'gif'"),
        (["--from", "hf:a/b"], "expected one file or folder to write: OUT or --out"),
        (["--from", "hf:a/b", source, "a"], "expected one file or folder to write: OUT or --out"),
        (["--from", "hf:a", "a"], "'hf:a'; expected hf, or hf:OWNER/REPO"),
        (["--from", "hf:../b", "a"], "'hf:../b'; expected hf, or hf:OWNER/REPO"),
    ]:
        with pytest.raises(SystemExit) as left:
            convert.main([str(word) for word in words])
        err = capsys.readouterr().err
        assert left.value.code == 2 and message in err and err.count("\n") == 1, err


# -- smaller checkpoints


def test_a_checkpoint_in_bfloat16_is_half_as_large_and_reads_back_as_rounded(tmp_path):
    cfg = tiny_config(vocab_size=300)
    flat, tokenizer = random_parameters(cfg, dtype=np.float32)[0], bpe.Tokenizer.from_merges([])
    tinygpt.save_checkpoint(tmp_path / "m.safetensors", flat, cfg, tokenizer.to_json())
    words = ["--to", "checkpoint", str(tmp_path / "m.safetensors"), str(tmp_path / "half.safetensors")]
    assert convert.main([*words, "--dtype", "bfloat16", "--about", "who wrote the stories"]) == 0
    found = tinygpt.load_checkpoint(tmp_path / "half.safetensors")
    bits = (flat.view(np.uint32) + 0x7FFF + (flat.view(np.uint32) >> 16 & 1)) & np.uint32(0xFFFF0000)
    assert found.parameters.tobytes() == bits.astype(np.uint32).tobytes() and found.parameters.dtype == np.float32
    assert found.cfg == cfg and found.metadata["about"] == "who wrote the stories"
    assert bpe.Tokenizer.from_json(found.tokenizer).hash == tokenizer.hash
    sizes = [(tmp_path / name).stat().st_size for name in ("m.safetensors", "half.safetensors")]
    assert sizes[0] - sizes[1] > 2 * flat.size - 300
    assert "exists" in refusal(convert.main, "convert.py", *words)
