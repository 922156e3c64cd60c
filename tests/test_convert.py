"""extras/convert.py: models of `transformers` with random weights give the same logits as ours; what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TABLES, ops_of, relative

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


# == 2  tensors =================================================================================================
