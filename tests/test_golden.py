"""extras/inside/golden.py: the golden files hold what every table of ops computes, and tell what is slightly wrong."""

import dataclasses
import json
import math

import make_golden
import numpy as np
import pytest
from conftest import DROPOUTS, FAMILIES, TABLES, ops_of, random_parameters, relative, tiny_config, with_mutant

import tinygpt
import train
from extras import explain
from extras.inside import golden, trace


def read_golden(path):
    tensors, metadata = tinygpt.read_safetensors(path, golden.DTYPES)
    return tensors, {name: text if name in TEXTS else json.loads(text) for name, text in metadata.items()}


TEXTS = ("format", "version", "about", "ids", "weights")
COMMITTED = {name: read_golden(make_golden.GOLDEN / f"{name}.safetensors") for name in make_golden.PORTS}
every_port = pytest.mark.parametrize("port", COMMITTED)
every_table = pytest.mark.parametrize("table", TABLES)


def distances(committed, ops, State):
    """name -> the largest relative difference from a golden file of what these ops and this state compute: outputs of
    sublayers and gradients between them, logits, nats, loss, gradients, parameters and moments after ten updates."""
    tensors, metadata = committed
    cfg, s = tinygpt.Config(**metadata["config"]), metadata["settings"]
    flat = np.concatenate([tensors[f"parameters.{t.name}"].reshape(-1) for t in tinygpt.layout(cfg)])
    p, (gradient, g) = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), tinygpt.zero_gradients(cfg, np.float64)
    batch, found = [tensors[name] for name in ("tokens", "targets", "weights")], {}

    def kept(name, op, way=None):
        def call(*arguments):
            result = op(*arguments)
            layer = next((f"layers.{i}." for i, x in enumerate(p["layers"]) if any(x is a for a in arguments)), "")
            where = layer + name
            if name == "head_loss":
                found[f"{where}.nats"], found[f"{where}.dx"] = result[1].copy(), result[2].copy()
            elif way == "forward":
                found[f"{where}.{'out' if layer else 'x'}"] = result[0].copy()
            elif layer:
                found[f"{where}.dx"] = result.copy()
            return result

        return call

    watched = {"head_loss": kept("head_loss", ops.head_loss)}
    for name in ("embed", "attention_layer", "mlp_layer"):
        ways = getattr(ops, name)._asdict().items()
        watched[name] = tinygpt.Pair(**{way: kept(name, op, way) for way, op in ways})
    watched = dataclasses.replace(ops, **watched)
    loss, _ = tinygpt.loss_and_gradients(p, *batch, g, cfg, watched)
    tinygpt.add_lookup_gradient(g)
    x = tensors[f"layers.{cfg.layers - 1}.mlp_layer.out"].reshape(-1, cfg.width)
    logits = ops.head_logits(x, p, cfg, ops).reshape(*batch[0].shape, cfg.vocab_size)
    found |= {"loss": np.array(loss), "head_loss.head.logits": logits} | golden.by_name(cfg, "gradients", gradient)
    found |= golden.updates(State(cfg, flat), ops, s, batch[0].shape[1])
    assert len(found) == 5 + 4 * cfg.layers + 3 + 4 * len(tinygpt.layout(cfg))
    return {name: relative(*(comparable(cfg, name, a) for a in (x, tensors[name]))) for name, x in found.items()}


def comparable(cfg, name, x):
    """Without the biases of keys after updates. Softmax does not depend on them: their gradient is what rounding
    leaves, and AdamW divides it by its own size."""
    if name != "after.qkv_b" or cfg.qk_norm or cfg.positions.startswith("rope"):
        return x
    first = cfg.heads * cfg.head_width
    return np.delete(x, range(first, first + cfg.kv_heads * cfg.head_width), -1)


@every_table
@every_port
def test_every_table_of_ops_computes_the_golden_numbers(port, table):
    State = golden.SpecState if table == "numpy" else train.State
    found = distances(COMMITTED[port], ops_of(table), State)
    limit = 1e-13 if table == "numpy" else 1e-12
    assert max(found.values()) < limit, {name: x for name, x in found.items() if x >= limit}


WRONG = [
    ("port_gpt2", "attention_layer_forward", "1 / math.sqrt(D)", "1.001 / math.sqrt(D)"),
    ("port_gpt2", "attention_layer_backward", "dq, dk, dv], 1", "dq, dk * (1 + 1e-9), dv], 1"),
    ("port_gpt2", "mlp_layer_forward", "cfg.norm_eps", "1.0001 * cfg.norm_eps"),
    ("port_gpt2", "embed_backward", 'g["position_w"]', "None"),
    ("port_llama", "attention_layer_forward", "cfg.rope_theta", "10001.0"),
    ("port_llama", "mlp_layer_backward", "return dy + ", "return (1 + 1e-9) * dy + "),
]


@pytest.mark.parametrize("port, name, old, new", WRONG)
def test_golden_numbers_tell_a_sublayer_that_is_slightly_wrong(port, name, old, new):
    wrong = with_mutant(tinygpt.OPS["numpy"], name, old, new)
    assert max(distances(COMMITTED[port], wrong, golden.SpecState).values()) > 1e-10


@pytest.mark.parametrize("State", [golden.SpecState, train.State])
def test_golden_parameters_tell_an_update_that_is_slightly_wrong(State, monkeypatch):
    monkeypatch.setattr(train, "ADAM_EPS", 1.1e-8)
    found = distances(COMMITTED["port_gpt2"], tinygpt.OPS["numpy"], State)
    wrong = {name.split(".")[0] for name, x in found.items() if x > 1e-10}
    assert "after" in wrong and not wrong & {"layers", "gradients", "loss", "embed", "head_loss"}


@every_port
def test_the_committed_golden_file_is_what_its_command_writes(port, tmp_path, capsys):
    assert make_golden.port(port, tmp_path / "again.safetensors") == 0
    (again, described), (tensors, metadata) = read_golden(tmp_path / "again.safetensors"), COMMITTED[port]
    assert described == metadata and list(again) == list(tensors)
    cfg = tinygpt.Config(**metadata["config"])
    for name in tensors:
        found, x = (comparable(cfg, name, a[name]) for a in (again, tensors))
        size = np.abs(x[np.isfinite(x)]).max()  # scores are -inf where a token lies ahead
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-13 * size, err_msg=name)
    assert (make_golden.GOLDEN / f"{port}.safetensors").stat().st_size < 300_000


@every_port
def test_a_golden_file_says_how_its_batches_are_made(port):
    tensors, metadata = COMMITTED[port]
    (B, T), V = tensors["tokens"].shape, metadata["config"]["vocab_size"]
    for step in (0, 3):
        i, t = np.arange(step * B, (step + 1) * B)[:, None], np.arange(T + 1)
        ids, weights = (eval(metadata[name], dict(i=i, t=t, V=V)) for name in ("ids", "weights"))
        expected = ids[:, :-1], ids[:, 1:], weights[:, :-1]
        for found, x in zip(golden.golden_batch(step, B, T, V), expected):
            assert np.array_equal(found, x)
        if step == 0:
            assert all(np.array_equal(tensors[name], x) for name, x in zip(("tokens", "targets", "weights"), expected))


def test_a_golden_file_holds_a_whole_layer_for_who_has_only_the_file():
    """As a port would: from the file's names and NumPy alone."""
    x, _ = COMMITTED["port_llama"]
    weights = {name[11:]: a for name, a in x.items() if name.startswith("parameters.")}
    inputs = ("layers.0.mlp_layer.out", "layers.1.attention_layer.out")  # of layer 1's sublayers
    at, mlp = "layers.1.attention_layer", "layers.1.mlp_layer"
    rstd = 1 / np.sqrt((x[inputs[0]] ** 2).mean(-1, keepdims=True) + 1e-5)
    B, T, C = x[inputs[0]].shape
    H, G, D = 4, 2, 4

    def heads(a, count):
        return a.reshape(B, T, count, D).transpose(0, 2, 1, 3)

    expected = {f"{at}.norm.rstd": rstd, f"{at}.n": x[inputs[0]] * rstd * weights["norm1_w"][1]}
    expected[f"{at}.qkv"] = x[f"{at}.n"] @ weights["qkv_w"][1]
    q, k, v = np.split(x[f"{at}.qkv"], [H * D, (H + G) * D], -1)
    expected |= {f"{at}.q_turn.x": heads(q, H), f"{at}.k_turn.x": heads(k, G), f"{at}.v": heads(v, G)}
    z = x[f"{at}.q_turn.x"][..., 0::2] + 1j * x[f"{at}.q_turn.x"][..., 1::2]
    z = z * np.exp(1j * np.arange(T)[:, None] * 10000.0 ** (-np.arange(D // 2) / (D // 2)))
    expected[f"{at}.q"] = np.stack([z.real, z.imag], -1).reshape(B, H, T, D)
    seen = np.arange(T)[:, None] >= np.arange(T)
    p = np.exp(x[f"{at}.q"] @ np.repeat(x[f"{at}.k"], H // G, 1).swapaxes(-1, -2) / math.sqrt(D)) * seen
    expected[f"{at}.attention.p"] = p / p.sum(-1, keepdims=True)
    expected[f"{at}.o_BHTD"] = x[f"{at}.attention.p"] @ np.repeat(x[f"{at}.v"], H // G, 1)
    expected[f"{at}.out"] = x[inputs[0]] + x[f"{at}.o"] @ weights["out_w"][1]
    expected[f"{mlp}.h"] = x[f"{mlp}.n"] @ weights["up_w"][1]
    gate, value = np.split(x[f"{mlp}.h"], 2, -1)
    expected[f"{mlp}.a"] = gate / (1 + np.exp(-gate)) * value
    expected[f"{mlp}.out"] = x[inputs[1]] + x[f"{mlp}.a"] @ weights["down_w"][1]
    expected["head_loss.head.logits"] = x["head_loss.head.n"] @ weights["embed_w"].T
    logits = x["head_loss.head.logits"]
    expected["head_loss.cross_entropy.lse"] = np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = x["head_loss.cross_entropy.lse"] - np.take_along_axis(logits, x["targets"][..., None], -1)
    expected |= {"head_loss.nats": nats[..., 0], "loss": (x["weights"] * x["head_loss.nats"]).sum()}
    expected["gradients.embed_w"] = x["head_loss.head.dlogits"].reshape(B * T, -1).T @ x["head_loss.head.n"].reshape(
        -1, C
    )
    np.add.at(expected["gradients.embed_w"], x["tokens"], x["layers.0.attention_layer.dx"])
    total = math.sqrt(sum((a * a).sum() for name, a in x.items() if name.startswith("gradients.")))
    expected["steps.norm"] = np.array([total / x["weights"].sum(), *x["steps.norm"][1:]])
    for name, a in expected.items():
        assert relative(a, x[name]) < 1e-13, name


def test_the_updates_of_a_golden_file_follow_the_equations_of_adamw():
    """The first, from the file alone; of the others, that some were clipped."""
    for x, metadata in COMMITTED.values():
        s, norms, seen, first = metadata["settings"], x["steps.norm"], 0, {}
        assert (norms > s["grad_clip"]).any() and (norms < s["grad_clip"]).any()
        mean = 1 / x["weights"].sum() * min(1, s["grad_clip"] / norms[0])
        for name in [name[11:] for name in x if name.startswith("parameters.")]:
            start, seen = x[f"parameters.{name}"], seen + x[f"parameters.{name}"].size
            decay = s["weight_decay"] if seen <= metadata["decayed"] else 0.0
            g = x[f"gradients.{name}"] * mean
            first[name] = start - x["steps.lr"][0] * (g / (np.abs(g) + s["eps"]) + decay * start)
        cfg = tinygpt.Config(**metadata["config"])
        state = golden.SpecState(cfg, np.concatenate([x[f"parameters.{name}"].reshape(-1) for name in first]))
        golden.updates(state, tinygpt.OPS["numpy"], s | {"steps": 1, "warmup_steps": 1, "lr": x["steps.lr"][0]}, 5)
        for name, a in golden.by_name(cfg, "after", state.parameters).items():
            assert relative(*(comparable(cfg, name, b) for b in (first[name[6:]], a))) < 1e-12


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_a_golden_file_has_every_array_that_a_forward_binds_to_a_name(changes):
    cfg = tiny_config(**changes | dict.fromkeys(DROPOUTS, 0.3))
    flat, p = random_parameters(cfg)
    tensors, legend = golden.golden(cfg, flat, golden.golden_settings(cfg, 2, 0), 5)
    assert set(tensors) <= set(legend) | {n for n in tensors if n.split(".")[0] not in ("embed", "layers", "head_loss")}
    batch = golden.golden_batch(0, 2, 5, cfg.vocab_size)
    x, _ = tinygpt.embed_forward(batch[0], p, cfg, tinygpt.OPS["numpy"], dropout=tinygpt.Dropout(0, 0, 0))
    assert np.array_equal(x, tensors["embed.out"])
    for i, layer in enumerate(p["layers"]):
        masks = tinygpt.Dropout(0, 0, 0, i)
        for name, op, rest in (
            ("attention_layer", tinygpt.attention_layer_forward, (i, None, masks)),
            ("mlp_layer", tinygpt.mlp_layer_forward, (i, masks)),
        ):
            calls = trace.watch(op, x, layer, cfg, tinygpt.OPS["numpy"], *rest)
            for local, a in calls[0].names.items():
                there = isinstance(a, np.ndarray) and a.dtype == np.float64 and not np.may_share_memory(a, flat)
                if there and local not in ("x", "heads"):  # a view of qkv
                    known = f"layers.{i}.{name}.{local}"
                    known = known if known in tensors else legend[known].removeprefix("is ")
                    assert np.array_equal(a, tensors[known]), known
            x = calls[0].result[0]
            assert np.array_equal(x, tensors[f"layers.{i}.{name}.out"])
    assert "layers.0.attention_layer.attention.keep" in tensors and "layers.1.mlp_layer.keep" in tensors


def test_a_golden_file_of_a_checkpoint_starts_at_its_parameters(tmp_path, capsys):
    cfg = tiny_config(positions="rope")
    flat, _ = random_parameters(cfg, dtype=np.float32)
    tinygpt.save_checkpoint(tmp_path / "model.safetensors", flat, cfg, "{}")
    out = tmp_path / "golden.safetensors"
    assert explain.main(["golden", "--checkpoint", str(tmp_path / "model.safetensors"), "--out", str(out)]) == 0
    tensors, metadata = read_golden(out)
    assert tinygpt.Config(**metadata["config"]) == cfg
    found = np.concatenate([tensors[f"parameters.{t.name}"].reshape(-1) for t in tinygpt.layout(cfg)])
    assert np.array_equal(found, flat.astype(np.float64))
    with pytest.raises(ValueError, match="format tinygpt golden|header"):  # nobody takes it for a model
        tinygpt.load_checkpoint(out)
