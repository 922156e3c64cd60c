"""extras/modeling_tinygpt.py: a folder of `--to hf` that has its own class: our logits, our text, and back."""

import json

import numpy as np
import pytest
from conftest import COMBINATIONS, random_parameters, relative

import bpe
import sample
import tinygpt
from extras import convert
from extras.tensors import differences

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

TOKENIZER = bpe.Tokenizer.from_merges([(b"a", b"b"), (b"c", b"d"), (b"ab", b"cd")])
SMALL = dict(vocab_size=TOKENIZER.vocab_size + 3, seq_len=24, width=24, layers=3, heads=6, hidden=28)
OWN = dict(positions="rope", qk_norm=True, embedding_norm=True)  # of our sizes
VARIANTS = {
    "our sizes": OWN,
    "alibi, untied, bias of the head": dict(positions="alibi", tied=False, head_bias=True, kv_heads=3, window=4),
    "learned positions, norm after the embedding": dict(embedding_norm=True, position_rows=30, norm_bias=False),
    "no positions, no final norm": dict(
        positions="none", final_norm=False, norm="rmsnorm", mlp="relu2", out_bias=False
    ),
    "gate with LayerNorm": dict(positions="rope-half", mlp="swiglu", norm_gain=False, mlp_dropout=0.1, init="gpt2"),
}


def exported(folder, cfg, flat):
    """The folder that convert.py writes for these parameters."""
    source, out = folder / "ours.safetensors", folder / "theirs"
    tinygpt.save_checkpoint(source, flat, cfg, TOKENIZER.to_json())
    assert convert.main(["--to", "hf", str(source), str(out)]) == 0
    return out


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def our_logits(cfg, flat, tokens):
    """tokens (B, T) -> (B, T, V)."""
    p, ops = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), tinygpt.OPS["numpy"]
    x, _ = tinygpt.forward(p, tokens, cfg, ops)
    return np.stack([ops.head_logits(row, p, cfg, ops) for row in x])


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_tells_our_text_and_gives_the_model_back(name, tmp_path, capsys):
    cfg = tinygpt.Config(**SMALL | VARIANTS[name])
    flat = random_parameters(cfg, dtype=np.float32)[0]
    out = exported(tmp_path, cfg, flat)
    assert "the folder has a class of its own: load it with trust_remote_code=True" in capsys.readouterr().err
    model = load(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "TinyGPTForCausalLM"
    ids = [TOKENIZER.end, *TOKENIZER.encode("Lily abcd ab")]
    assert [TOKENIZER.end, *tokenizer("Lily abcd ab").input_ids] == ids
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert relative(our_logits(cfg, flat, np.array([ids])), theirs) < 1e-5
    decoding = sample.Decoding(tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), cfg, tinygpt.OPS["numpy"])
    banned = sample.never_drawn(cfg, TOKENIZER)
    ours = list(sample.generate(decoding, ids, 0, TOKENIZER.end, 8, temperature=0, banned=banned))
    assert [i for i in greedy if i != TOKENIZER.end] == ours
    model.save_pretrained(tmp_path / "again")  # as transformers writes it
    (tmp_path / "again" / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes())
    for folder in (out, tmp_path / "again"):
        assert convert.main(["--from", "hf", str(folder), str(tmp_path / "back.safetensors")]) == 0
        back = tinygpt.load_checkpoint(tmp_path / "back.safetensors")
        assert back.cfg == cfg and back.parameters.tobytes() == flat.tobytes()


def test_every_combination_of_switches_has_our_logits(tmp_path):
    """Each with each, in float64; the rows of a batch of several lengths, padded on the left, too."""
    worst = 0
    for number, cfg in enumerate(COMBINATIONS):
        flat, _ = random_parameters(cfg)
        config, tensors = convert.own_config(cfg), convert.tensors_from(cfg, flat, convert.own_table(cfg))
        folder = tmp_path / str(number)
        convert.write_own_class(folder)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).double().eval()
        named = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()}
        model.load_state_dict(named)  # all of them, by name and shape
        tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, cfg.seq_len))
        with torch.no_grad():
            theirs = model(torch.from_numpy(tokens)).logits.numpy()
        worst = max(worst, relative(theirs, our_logits(cfg, flat, tokens)))
    assert worst < 1e-10


def test_prompts_padded_on_the_left_give_what_they_give_alone(tmp_path):
    for name, fields in VARIANTS.items():
        cfg = tinygpt.Config(**SMALL | fields)
        flat = random_parameters(cfg, dtype=np.float32)[0]
        (tmp_path / name).mkdir()
        model = load(exported(tmp_path / name, cfg, flat))
        long, short = [TOKENIZER.end, 5, 9, 70, 71, 3], [TOKENIZER.end, 8, 100]
        padded = torch.tensor([long, [TOKENIZER.end] * 3 + short])
        mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
        together = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
        alone = model.generate(torch.tensor([short]), max_new_tokens=6, do_sample=False)
        found, expected = together[1, 6:].tolist(), alone[0, 3:].tolist()
        assert found[: len(expected)] == expected, name


def test_a_loss_and_its_gradient_are_those_of_ours(tmp_path):
    cfg = tinygpt.Config(**SMALL | OWN)
    flat = random_parameters(cfg, dtype=np.float32)[0]
    model = load(exported(tmp_path, cfg, flat))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9))
    loss = model(torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss
    loss.backward()
    g = tinygpt.zero_gradients(cfg)[1]
    p, weights = tinygpt.views(tinygpt.layout(cfg), flat, cfg.layers), np.full((2, 8), 1 / 16, np.float32)
    batch = tokens[:, :-1], tokens[:, 1:], weights
    ours, _ = tinygpt.loss_and_gradients(p, *batch, g, cfg, tinygpt.OPS["numpy"])
    tinygpt.add_lookup_gradient(g)
    assert relative(loss.item(), ours) < 1e-5
    assert relative(model.embed_w.grad, g["embed_w"]) < 1e-4
    assert relative(model.layers[1].qkv_w.grad, g["layers"][1]["qkv_w"]) < 1e-4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("qk_norm"), "config.json has no field qk_norm, which a model of tinygpt has"),
        (lambda c: c.update(heads=5), "config.json: heads=5 cannot share kv_heads=6"),
        (lambda c: c.update(mlp="tanh"), "config.json: mlp is 'tanh'; expected one of"),
        (lambda c: c.update(window=[]), r"config.json: window is \[\]; expected"),
        (lambda c: c.update(layers=2), "tensor 'layers.2.[a-z0-9_]*': not part of the model"),
        (lambda c: c.update(layers=4), "tensor layers.3.[a-z0-9_]* is missing"),
        (lambda c: c.update(vocab_size=99), "does not give embed_w; expected"),
        (lambda c: c.update(quantization_config={}), "quantization_config is {}; expected none"),
    ],
)
def test_a_folder_that_says_something_else_is_refused(change, message, tmp_path):
    cfg = tinygpt.Config(**SMALL | OWN)
    out = exported(tmp_path, cfg, random_parameters(cfg, dtype=np.float32)[0])
    config = json.loads((out / "config.json").read_bytes())
    change(config)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        convert.from_transformers(config, convert.read_tensors([out / "model.safetensors"]))


def test_1m_record_is_such_a_model_and_the_sizes_of_this_project_have_a_class_there():
    size = tinygpt.find_size("1m-record")
    with pytest.raises(ValueError, match="transformers has no class for this model"):
        convert.fitting_family(size.changed(embedding_norm=False, tied=False))
    assert not differences(size, size)
    for size in tinygpt.SIZES.values():
        assert convert.fitting_family(size.changed(embedding_norm=False, tied=False))[0] == "qwen3"


def test_the_class_is_short():
    path = convert.Path(convert.__file__).with_name("modeling_tinygpt.py")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150
