"""The whole model, its loss and all its gradients against PyTorch, which differentiates by itself: the families that
others published and every combination of switches. No dropout: PyTorch draws other masks."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import COMBINATIONS, FAMILIES, TABLES, ops_of, random_batch, random_parameters, relative, tiny_config

import tinygpt
import train

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402


def of_layer(p, name, layer):
    """A tensor of one layer, of the model if layer is None; None if the model has none."""
    return None if name not in p else p[name] if layer is None else p[name][layer]


def normalised(x, p, name, cfg, layer=None):
    w, b = (of_layer(p, f"{name}_{kind}", layer) for kind in "wb")
    if cfg["norm"] == "layernorm":
        return F.layer_norm(x, (x.shape[-1],), w, b, cfg["norm_eps"])
    return F.rms_norm(x, (x.shape[-1],), w, cfg["norm_eps"])


def rotated(x, cfg):
    """x (B, T, heads, D). Neighbours as complex numbers, as in Llama's code; halves as in that of GPT-NeoX."""
    T, D = x.shape[1], x.shape[3]
    angles = torch.outer(torch.arange(T), 1 / cfg["rope_theta"] ** (torch.arange(0, D, 2, dtype=x.dtype) / D))
    if cfg["positions"] == "rope":
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D/2)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], D // 2, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)
    angles = torch.cat([angles, angles], -1)[:, None]  # (T, 1, D)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def slopes(H):
    """As in the code of the ALiBi paper."""
    if H & (H - 1) == 0:
        start = 2 ** (-(2 ** -(math.log2(H) - 3)))
        return [start ** (i + 1) for i in range(H)]
    n = 2 ** math.floor(math.log2(H))
    return slopes(n) + slopes(2 * n)[0::2][: H - n]


def attended(n, p, cfg, i):
    """n (B, T, C) -> what attention adds in layer i, without its output matrix, (B, T, H D)."""
    (B, T, _), (H, G, D) = n.shape, (cfg["heads"], cfg["kv_heads"], cfg["head_width"])
    qkv = F.linear(n, p["qkv_w"][i].T, of_layer(p, "qkv_b", i))
    q, k, v = (part.view(B, T, -1, D) for part in qkv.split([H * D, G * D, G * D], -1))
    if cfg["qk_norm"]:
        q, k = (F.rms_norm(x, (D,), p[name][i], cfg["norm_eps"]) for x, name in ((q, "q_norm_w"), (k, "k_norm_w")))
    if cfg["positions"].startswith("rope"):
        q, k = rotated(q, cfg), rotated(k, cfg)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    window = cfg["window"] if i % 2 and cfg["window"] else T
    bias = torch.zeros(H, T, T, dtype=n.dtype)
    if cfg["positions"] == "alibi":
        bias = bias - torch.tensor(slopes(H), dtype=n.dtype)[:, None, None] * distance
    bias = bias.masked_fill((distance < 0) | (distance >= window), -math.inf)
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(H // G, 1) for x in (k, v))
    scale = None if cfg["attention_scale"] else 1.0  # None: 1 / sqrt(D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).reshape(B, T, H * D)


def activated(h, cfg):
    if cfg["mlp"] == "swiglu":
        gate, value = h.chunk(2, -1)
        return F.silu(gate) * value
    if cfg["mlp"] == "relu2":
        return F.relu(h).square()
    return F.silu(h) if cfg["mlp"] == "silu" else F.gelu(h, approximate="tanh" if "tanh" in cfg["mlp"] else "none")


def torch_model(p, tokens, targets, weights, cfg):
    """(loss, nats, logits) by PyTorch's own functions, from a dictionary of parameters named as in `layout` and one of
    the fields of Config."""
    x = F.embedding(tokens, p["embed_w"])
    if cfg["positions"] == "learned":
        x = x + p["position_w"][: tokens.shape[1]]
    if cfg["embedding_norm"]:
        x = normalised(x, p, "embed_norm", cfg)
    for i in range(cfg["layers"]):
        o = attended(normalised(x, p, "norm1", cfg, i), p, cfg, i)
        x = x + F.linear(o, p["out_w"][i].T, of_layer(p, "out_b", i))
        h = F.linear(normalised(x, p, "norm2", cfg, i), p["up_w"][i].T, of_layer(p, "up_b", i))
        x = x + F.linear(activated(h, cfg), p["down_w"][i].T, of_layer(p, "down_b", i))
    if cfg["final_norm"]:
        x = normalised(x, p, "norm", cfg)
    logits = F.linear(x, p["embed_w" if cfg["tied"] else "head_w"], p.get("head_b"))  # (B, T, V)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(tokens.shape)
    return (weights * nats).sum(), nats, logits


LONGER = dict(seq_len=101, width=24, heads=4, hidden=259, vocab_size=70, position_rows=120, layers=3)
MODELS = {name: tiny_config(**changes) for name, changes in FAMILIES.items()}
MODELS |= {
    "one head": tiny_config(heads=1, vocab_size=13, norm_eps=1e-3),
    "longer": tiny_config(**LONGER),
    "longer llama": tiny_config(**FAMILIES["llama"] | LONGER | dict(kv_heads=2, head_width=8, rope_theta=100.0)),
    "longer gpt-neo": tiny_config(**FAMILIES["gpt-neo"] | LONGER | dict(window=50)),
}
MODELS |= {f"combination {i}": cfg for i, cfg in enumerate(COMBINATIONS)}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_loss_and_gradients_are_those_of_pytorch(cfg, table):
    flat, p = random_parameters(cfg, seed=5)
    tokens, targets, weights = random_batch(cfg, 2, cfg.seq_len, seed=6)
    gradient, g = tinygpt.zero_gradients(cfg, np.float64)
    loss, nats = tinygpt.loss_and_gradients(p, tokens, targets, weights, g, cfg, ops_of(table))
    tinygpt.add_lookup_gradient(g)
    x, _ = tinygpt.forward(p, tokens, cfg, ops_of(table))
    logits = ops_of(table).head_logits(x.reshape(-1, cfg.width), p, cfg, ops_of(table))

    part = {t.name: slice(t.offset, t.offset + math.prod(t.shape)) for t in tinygpt.layout(cfg)}
    named = {t.name: torch.tensor(flat[part[t.name]].reshape(t.shape)) for t in tinygpt.layout(cfg)}
    leaves = {name: x.requires_grad_() for name, x in named.items()}
    batch = (torch.tensor(a) for a in (tokens, targets, weights))
    torch_loss, torch_nats, torch_logits = torch_model(leaves, *batch, dataclasses.asdict(cfg))
    torch_loss.backward()
    assert relative(loss, torch_loss.item()) < 1e-10
    assert relative(nats, torch_nats.detach().numpy()) < 1e-10
    assert relative(logits, torch_logits.detach().numpy().reshape(logits.shape)) < 1e-10
    for name, leaf in leaves.items():
        assert relative(gradient[part[name]], leaf.grad.numpy().reshape(-1)) < 1e-10, name


@pytest.mark.parametrize("warmup, steps", [(4, 15), (1, 9)])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_is_that_of_pytorchs_schedulers(schedule, warmup, steps):
    """Warm-up begins at lr / W, not 0, and reaches lr at update W - 1; update W has lr again; the last has min_lr."""
    lr, min_lr = 0.4, 0.1
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, max(1, warmup - 1))
    if schedule == "cosine":
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 1 - warmup, min_lr)
    else:
        fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, min_lr / lr, steps - 1 - warmup)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    s = train.Settings(lr=lr, min_lr=min_lr, warmup_steps=warmup, steps=steps, schedule=schedule)
    assert [train.learning_rate(step, s) for step in range(steps)] == pytest.approx(expected, rel=1e-12)
