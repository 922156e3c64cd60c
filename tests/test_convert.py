"""extras/convert.py: models of `transformers` with random weights give the same logits as ours; what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TABLES, ops_of, relative
from helpers import CONFIGS, transformers_files

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
