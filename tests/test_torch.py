"""The whole model, its loss and all its gradients against PyTorch, which differentiates by itself."""

import math

import numpy as np
import pytest
from conftest import random_batch, random_parameters, relative, tiny_config

import tinygpt

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402


def torch_model(p, tokens, targets, weights, cfg):
    """(loss, nats, logits) by PyTorch's own functions, from a dictionary of parameters named as in `layout`."""
    B, T = tokens.shape
    H, C = cfg["heads"], cfg["width"]
    x = F.embedding(tokens, p["embed_w"]) + p["position_w"][:T]
    for i in range(cfg["layers"]):
        n = F.layer_norm(x, (C,), p["norm1_w"][i], p["norm1_b"][i], cfg["norm_eps"])
        q, k, v = F.linear(n, p["qkv_w"][i].T, p["qkv_b"][i]).split(C, dim=2)
        q, k, v = (heads.view(B, T, H, C // H).transpose(1, 2) for heads in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + F.linear(o, p["out_w"][i].T, p["out_b"][i])
        n = F.layer_norm(x, (C,), p["norm2_w"][i], p["norm2_b"][i], cfg["norm_eps"])
        a = F.gelu(F.linear(n, p["up_w"][i].T, p["up_b"][i]), approximate="tanh")
        x = x + F.linear(a, p["down_w"][i].T, p["down_b"][i])
    logits = F.linear(F.layer_norm(x, (C,), p["norm_w"], p["norm_b"], cfg["norm_eps"]), p["embed_w"])  # (B, T, V)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T)
    return (weights * nats).sum(), nats, logits


@pytest.mark.parametrize("table", tinygpt.OPS)
@pytest.mark.parametrize(
    "cfg",
    [
        tiny_config(),
        tiny_config(heads=1, vocab_size=13, norm_eps=1e-3),
        tiny_config(seq_len=101, width=24, heads=4, hidden=259, vocab_size=70, position_rows=120, layers=3),
    ],
    ids=["tiny", "one head", "longer"],
)
def test_loss_and_gradients_are_those_of_pytorch(cfg, table):
    flat, p = random_parameters(cfg, seed=5)
    tokens, targets, weights = random_batch(cfg, 2, cfg.seq_len, seed=6)
    gradient, g = tinygpt.zero_gradients(cfg, np.float64)
    loss, nats = tinygpt.loss_and_gradients(p, tokens, targets, weights, g, cfg, tinygpt.OPS[table])
    tinygpt.join_tied(g)
    x, _ = tinygpt.forward(p, tokens, cfg, tinygpt.OPS[table])
    logits = tinygpt.OPS[table]["head_logits"](x.reshape(-1, cfg.width), p, cfg)

    part = {t.name: slice(t.offset, t.offset + math.prod(t.shape)) for t in tinygpt.layout(cfg)}
    named = {t.name: torch.tensor(flat[part[t.name]].reshape(t.shape)) for t in tinygpt.layout(cfg)}
    leaves = {name: x.requires_grad_() for name, x in named.items()}
    batch = (torch.tensor(a) for a in (tokens, targets, weights))
    torch_loss, torch_nats, torch_logits = torch_model(leaves, *batch, vars(cfg))
    torch_loss.backward()
    assert relative(loss, torch_loss.item()) < 1e-10
    assert relative(nats, torch_nats.detach().numpy()) < 1e-10
    assert relative(logits, torch_logits.detach().numpy().reshape(logits.shape)) < 1e-10
    for name, leaf in leaves.items():
        assert relative(gradient[part[name]], leaf.grad.numpy().reshape(-1)) < 1e-10, name
