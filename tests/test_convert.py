"""extras/convert.py: models of `transformers` with random weights give the same logits as ours; what is refused."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import relative

import bpe
import tinygpt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "extras"))

import convert

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
    x, _ = tinygpt.forward(p, tokens, cfg, tinygpt.OPS[table])
    return np.stack([tinygpt.OPS[table].head_logits(row, p, cfg, tinygpt.OPS[table]) for row in x])


@pytest.mark.parametrize("table", tinygpt.OPS)
@pytest.mark.parametrize("family, shape, limit", CASES)
def test_logits_are_those_of_transformers(family, shape, limit, table):
    torch, model = pytest.importorskip("torch"), random_model(family, shape)
    tensors = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    parameters, cfg = convert.from_transformers(json.loads(model.config.to_json_string(use_diff=False)), tensors)
    tokens = np.random.default_rng(0).integers(0, 53, (2, 17))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert relative(our_logits(parameters, cfg, tokens, table), theirs) < limit


# == 2  tensors ========================================================================================================

CONFIG = dict(model_type="gpt2", vocab_size=261, n_positions=6, n_embd=12, n_layer=2, n_head=3, n_inner=7)
CONFIG |= dict(layer_norm_epsilon=1e-3, activation_function="gelu_new")


def random_tensors():
    """The tensors of a GPT-2 of this shape, in float32."""
    V, T, C, F, rng = 261, 6, 12, 7, np.random.default_rng(0)
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    parts = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "ln_2": (C,), "mlp.c_fc": (C, F)}
    for layer in range(2):
        for name, shape in (parts | {"mlp.c_proj": (F, C)}).items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[-1:]}
    return {f"transformer.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_model(folder, config=CONFIG, tensors=None, dtypes=tinygpt.DTYPES):
    """A folder as transformers saves it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    tokenizer = bpe.Tokenizer([*(bytes([b]) for b in range(256)), bpe.END.encode()], [], {bpe.END: 256})
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    tinygpt.write_safetensors(folder / "model.safetensors", tensors or random_tensors(), {}, dtypes)
    return folder


def refusal(capsys, folder, out):
    """The one line with which a conversion ends that writes nothing."""
    before = out.read_bytes() if out.exists() else None
    with pytest.raises(SystemExit) as leave:
        convert.main([str(folder), "--out", str(out)])
    assert leave.value.code == 2 and (out.read_bytes() if out.exists() else None) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert.py: error: ")
    return line.removeprefix("convert.py: error: ")


def test_a_gpt2_is_converted_as_its_configuration_says(tmp_path):
    head = {"lm_head.weight": random_tensors()["transformer.wte.weight"] + 1}
    for more, added, expected in (
        ({}, {}, dict(attention_scale=True, tied=True)),
        ({"scale_attn_weights": False, "n_ctx": 6, "attn_pdrop": 0.1}, {}, dict(attention_scale=False, tied=True)),
        ({"tie_word_embeddings": False}, head, dict(tied=False)),
        ({}, head, dict(tied=False)),  # as in transformers, which then warns that the configuration is wrong
        ({}, {"lm_head.weight": random_tensors()["transformer.wte.weight"]}, dict(tied=True)),
    ):
        folder, out = (
            write_model(tmp_path / "gpt2", CONFIG | more, random_tensors() | added),
            tmp_path / "m.safetensors",
        )
        assert convert.main([str(folder), "--out", str(out)]) == 0
        found = tinygpt.load_checkpoint(out)
        p = tinygpt.views(tinygpt.layout(found.cfg), found.parameters, 2)
        shape = dict(vocab_size=261, seq_len=6, width=12, layers=2, heads=3, hidden=7, norm_eps=1e-3)
        assert found.cfg == tinygpt.Config(**shape | expected)
        assert np.array_equal(p["embed_w"], random_tensors()["transformer.wte.weight"])
        assert np.array_equal(p["layers"][1]["up_w"], random_tensors()["transformer.h.1.mlp.c_fc.weight"])
        assert expected["tied"] or np.array_equal(p["head_w"], head["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["F16", "F32", "BOOL", "U8", "I64", "BF16"])
def test_masks_are_skipped_whatever_their_dtype(tmp_path, dtype):
    mask = np.zeros((1, 1, 6, 6), convert.DTYPES[dtype])
    masks = {"transformer.h.0.attn.bias": mask, "h.1.attn.masked_bias": mask[0, 0, 0, 0]}
    folder = write_model(tmp_path / "gpt2", tensors=random_tensors() | masks, dtypes=convert.DTYPES)
    assert convert.main([str(folder), "--out", str(tmp_path / "m.safetensors")]) == 0


@pytest.mark.parametrize("name", [
    "transformer.h.2.ln_1.weight", "transformer.h.0.crossattention.c_attn.weight", "score.weight", "lm_head.bias",
    "transformer.h.0.attn.c_attn.lora_A.weight", "wte.weight", "h.2.attn.bias",
])  # fmt: skip
def test_a_tensor_that_nothing_reads_is_refused_by_name(tmp_path, capsys, name):
    tensors = random_tensors() | {name: np.ones(12, np.float32)}
    assert f"tensor {name}: not part of" in refusal(
        capsys, write_model(tmp_path / "m", tensors=tensors), tmp_path / "x"
    )


@pytest.mark.parametrize("dtype, value, said", [
    ("F32", np.nan, "has a NaN"),
    ("F32", -np.inf, "has a NaN, an infinity"),
    ("F16", np.inf, "has a NaN, an infinity"),
    ("F64", 1e300, "a number beyond float32"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_proj.bias"])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, capsys, dtype, value, said, name):
    tensors = random_tensors()
    tensors[name] = tensors[name].astype(convert.DTYPES[dtype])
    tensors[name].flat[-1] = value
    folder = write_model(tmp_path / "m", tensors=tensors, dtypes=convert.DTYPES)
    line = refusal(capsys, folder, tmp_path / "x")
    assert f"tensor {name} " in line and said in line


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "U16"])
def test_a_weight_of_a_dtype_that_needs_a_scale_is_refused_by_name(tmp_path, capsys, dtype):
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors = random_tensors() | {name: np.zeros((12, 7), convert.DTYPES[dtype])}
    folder = write_model(tmp_path / "m", tensors=tensors, dtypes=convert.DTYPES)
    assert f"tensor {name} has dtype {dtype}; expected F16, BF16" in refusal(capsys, folder, tmp_path / "x")


def test_bfloat16_becomes_float32_exactly():
    values = np.array([1.0, -2.5, 3e38, 1e-40], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16).view(convert.DTYPES["BF16"])
    assert np.array_equal(convert.read_weight("x", bits), (values.view(np.uint32) >> 16 << 16).view(np.float32))


@pytest.mark.parametrize("name, shape", [
    ("transformer.wte.weight", (260, 12)),
    ("transformer.wpe.weight", (7, 12)),
    ("transformer.h.1.attn.c_proj.bias", ()),
    ("lm_head.weight", (262, 12)),
])  # fmt: skip
def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path, capsys, name, shape):
    folder = write_model(tmp_path / "m", tensors=random_tensors() | {name: np.ones(shape, np.float32)})
    line = refusal(capsys, folder, tmp_path / "x")
    assert f"tensor {name.removeprefix('transformer.')} {shape} does not give" in line


def test_a_missing_tensor_and_one_that_two_files_have_are_refused(tmp_path, capsys):
    tensors = random_tensors()
    bias = tensors.pop("transformer.h.1.ln_2.bias")
    folder = write_model(tmp_path / "m", tensors=tensors)
    assert "tensor h.1.ln_2.bias is missing" in refusal(capsys, folder, tmp_path / "x")
    for name in ("a", "b"):
        tinygpt.write_safetensors(folder / f"{name}.safetensors", {"transformer.h.1.ln_2.bias": bias}, {})
    assert "tensor transformer.h.1.ln_2.bias is in b.safetensors and in another file" in refusal(
        capsys, folder, tmp_path / "x"
    )


LLAMA = dict(model_type="llama", vocab_size=31, max_position_embeddings=5, hidden_size=12, intermediate_size=7)
LLAMA |= dict(num_hidden_layers=1, num_attention_heads=3, rms_norm_eps=1e-5, rope_theta=100.0)


def llama_tensors():
    V, C, F, layer = 31, 12, 7, "model.layers.0."
    shapes = {"model.embed_tokens.weight": (V, C), "lm_head.weight": (V, C), "model.norm.weight": (C,)}
    shapes |= {f"{layer}{name}_layernorm.weight": (C,) for name in ("input", "post_attention")}
    shapes |= {f"{layer}self_attn.{x}_proj.weight": (C, C) for x in "qkvo"}
    shapes |= {f"{layer}mlp.{x}_proj.weight": (F, C) for x in ("gate", "up")} | {f"{layer}mlp.down_proj.weight": (C, F)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def test_a_llama_has_frequencies_that_are_derived_and_no_bias_that_is_not_read():
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float64)}
    _, cfg = convert.from_transformers(LLAMA, llama_tensors() | frequencies)
    assert cfg.rope_theta == 100.0 and not cfg.tied
    bias = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ValueError, match=f"tensor {bias}: not part of the llama model"):
        convert.from_transformers(LLAMA, llama_tensors() | {bias: np.ones(12, np.float32)})


def test_a_head_that_is_not_tied_and_is_not_there_is_refused():
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match="tensor lm_head.weight is missing"):
        convert.from_transformers(LLAMA, tensors)
    with pytest.raises(ValueError, match="tensor lm_head.weight is missing"):
        convert.from_transformers(CONFIG | {"tie_word_embeddings": False}, random_tensors())


# == 3  fields of config.json ==========================================================================================

NEO = dict(model_type="gpt_neo", vocab_size=31, max_position_embeddings=5, hidden_size=12, num_layers=2, num_heads=3)
NEO |= dict(layer_norm_epsilon=1e-5, activation_function="gelu_new", window_size=3)
NEO |= dict(attention_types=[[["global", "local"], 1]])
BLOOM = dict(model_type="bloom", vocab_size=31, hidden_size=12, n_layer=1, n_head=3, layer_norm_epsilon=1e-5)


@pytest.mark.parametrize("config, name, value", [
    (CONFIG, "scale_attn_by_inverse_layer_idx", True),
    (CONFIG, "add_cross_attention", True),
    (CONFIG, "activation_function", "relu"),
    (CONFIG, "quantization_config", {"bits": 4}),
    (CONFIG, "is_causal", False),
    (CONFIG, "is_encoder_decoder", True),
    (CONFIG, "pruned_heads", {"0": [1]}),
    (CONFIG, "auto_map", {"AutoModelForCausalLM": "own.Model"}),
    (CONFIG, "hidden_size", 24),
    (CONFIG, "max_position_embeddings", 7),
    (CONFIG, "n_inner", 0),
    (CONFIG, "n_embd", "12"),
    (CONFIG, "n_head", True),
    (CONFIG, "n_layer", 2.0),
    (CONFIG, "vocab_size", -261),
    (CONFIG, "layer_norm_epsilon", "1e-5"),
    (CONFIG, "scale_attn_weights", "false"),
    (CONFIG, "tie_word_embeddings", None),
    (CONFIG, "model_type", ["gpt2"]),
    (CONFIG, "activation_function", {}),
    (NEO, "attention_types", [[["global", "local"], 2]]),
    (NEO, "attention_types", [[["local", "global"], 1]]),
    (NEO, "attention_types", [[["global", "axial"], 1]]),
    (NEO, "attention_types", [["global", "local"], 1]),
    (NEO, "attention_types", [[["global"], "2"]]),
    (NEO, "attention_layers", ["global", "global"]),
    (NEO, "window_size", 0),
    (NEO, "tie_word_embeddings", "no"),
    (LLAMA, "hidden_act", "gelu"),
    (LLAMA, "rope_scaling", {"type": "linear", "factor": 2.0}),
    (LLAMA, "rope_scaling", {"rope_type": "default", "factor": 2.0}),
    (LLAMA, "rope_parameters", {"full_attention": {"rope_type": "default"}}),
    (LLAMA, "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    (LLAMA, "partial_rotary_factor", 0.5),
    (LLAMA, "num_key_value_heads", 0),
    (LLAMA, "attention_bias", "no"),
    (LLAMA, "rope_theta", "100"),
    (BLOOM, "apply_residual_connection_post_layernorm", True),
    (BLOOM, "n_embed", 24),
    (BLOOM, "num_attention_heads", 6),
    (BLOOM, "n_head", "3"),
])  # fmt: skip
def test_a_field_that_is_not_carried_out_is_refused_by_name_with_its_value(tmp_path, capsys, config, name, value):
    folder = write_model(tmp_path / "m", config | {name: value})
    line = refusal(capsys, folder, tmp_path / "x")
    assert "config.json: " in line and name in line and repr(value) in line


def test_two_bases_of_the_rotations_are_refused():
    for theta in (10000.0, 1):
        with pytest.raises(ValueError, match=f"rope_theta is 100.0 but rope_parameters.rope_theta is {theta}"):
            convert.from_transformers(LLAMA | {"rope_parameters": {"rope_theta": theta}}, llama_tensors())


@pytest.mark.parametrize("config", [CONFIG, NEO, LLAMA, BLOOM])
def test_each_field_that_has_no_default_is_asked_for_by_name(tmp_path, capsys, config):
    optional = {"n_inner", "rope_theta", "attention_layers"}
    for name in config.keys() - optional:
        line = refusal(capsys, write_model(tmp_path / "m", {n: config[n] for n in config if n != name}), tmp_path / "x")
        assert f"config.json has no field {name}" in line or f" or {name}" in line


@pytest.mark.parametrize("text, said", [
    ("[1, 2]", "config.json is a list; expected an object"),
    ('"gpt2"', "config.json is a str; expected an object"),
    ("null", "config.json is a NoneType"),
    ("{", "Expecting property name"),
    ("[" * 100_000, "recursion"),
    ('{"model_type": "mamba"}', "it is a mamba model; expected one of gpt2, gpt_neo, llama, bloom"),
    ("{}", "config.json has no field model_type"),
])  # fmt: skip
def test_a_configuration_that_is_none_ends_in_one_line(tmp_path, capsys, text, said):
    assert said in refusal(capsys, write_model(tmp_path / "m", text), tmp_path / "x")


# == 4  command line ===================================================================================================


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_out_may_not_be_a_file_that_is_read(tmp_path, capsys, monkeypatch, name):
    folder = write_model(tmp_path / "m")
    monkeypatch.chdir(folder)
    outs = [folder / name, Path(name)]
    if os.name == "posix":
        (tmp_path / "link").symlink_to(folder / name)
        outs.append(tmp_path / "link")
    for out in outs:
        assert f"--out {out} is a file of the model" in refusal(capsys, folder, out)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    tensors = random_tensors()
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:250]
    folder = write_model(tmp_path / "m", CONFIG | {"vocab_size": 250}, tensors)
    assert "tokenizer.json has 257 tokens; expected at most V=250" in refusal(capsys, folder, tmp_path / "x")


def test_a_folder_without_tensors_or_tokenizer_is_refused(tmp_path, capsys):
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "there is no .safetensors file" in refusal(capsys, folder, tmp_path / "x")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: No such file" in refusal(capsys, folder, tmp_path / "x")
