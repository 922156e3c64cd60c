"""extras/tensors.py: floats of 16 bits in .safetensors files, as torch and safetensors have them; files as objects."""

import io

import numpy as np
import pytest

import bpe
import tinygpt
from extras import convert, tensors
from extras.recipes import LLAMA

TOKENIZER = bpe.Tokenizer.from_merges([(b"a", b"b")])
RANDOM = np.random.default_rng(0).standard_normal((7, 11)).astype(np.float32)
HALVES = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 0, -0.0, 2**-24, 2**-140], np.float32)


@pytest.mark.parametrize("dtype", tensors.SAVED)
def test_numbers_are_rounded_as_torch_rounds_them(dtype, tmp_path):
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    ours = {"a": RANDOM, "b": HALVES}
    path = tmp_path / "x.safetensors"
    tensors.write_safetensors(path, {name: tensors.narrowed(x, dtype) for name, x in ours.items()}, {"who": "we"})
    theirs = safetensors.load_file(path)
    for name, x in ours.items():
        expected = torch.from_numpy(x).to(getattr(torch, dtype))
        assert theirs[name].dtype == expected.dtype and torch.equal(theirs[name], expected)
    safetensors.save_file(theirs, path)
    for name, x in tensors.read_tensors([path]).items():
        assert np.array_equal(tensors.read_weight(name, x), theirs[name].float().numpy())


@pytest.mark.parametrize("dtype, most", [("float16", 65504.0), ("bfloat16", 3.3895314e38)])
def test_a_number_beyond_the_range_is_refused(dtype, most):
    assert tensors.narrowed(np.float32([most, -most]), dtype).shape == (2,)
    with pytest.raises(ValueError, match=f"beyond {dtype}; write --dtype float32"):
        tensors.narrowed(np.float32([1, -most * 1.003]), dtype)


def test_file_objects_hold_the_same_bytes_as_files(tmp_path):
    arrays = {"a": tensors.narrowed(RANDOM, "bfloat16"), "b": RANDOM}
    memory = io.BytesIO()
    tensors.write_safetensors(memory, arrays, {"who": "we"})
    tensors.write_safetensors(tmp_path / "x", arrays, {"who": "we"})
    assert memory.getvalue() == (tmp_path / "x").read_bytes()
    with open(tmp_path / "x", "rb") as file:
        for source in (io.BytesIO(memory.getvalue()), file, tmp_path / "x"):
            found, metadata = tensors.read_safetensors(source)
            assert metadata == {"who": "we"} and all(np.array_equal(found[name], x) for name, x in arrays.items())
    with pytest.raises(ValueError, match="cut short"):
        tensors.read_safetensors(io.BytesIO(memory.getvalue()[:5]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fields", [LLAMA, {}, dict(positions="rope", qk_norm=True)])
def test_a_folder_of_16_bits_is_loaded_by_transformers_and_read_again(dtype, fields, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shape = dict(vocab_size=TOKENIZER.vocab_size, seq_len=16, width=24, layers=2, heads=6, hidden=28)
    cfg = tinygpt.Config(**shape | fields)
    flat, source, out = tinygpt.init_parameters(cfg, 0), tmp_path / "ours.safetensors", tmp_path / "theirs"
    tinygpt.save_checkpoint(source, flat, cfg, TOKENIZER.to_json())
    assert convert.main(["--to", "hf", str(source), str(out), "--dtype", dtype]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto", trust_remote_code=True)
    assert model.dtype == getattr(torch, dtype)
    assert convert.main(["--from", "hf", str(out), str(tmp_path / "back.safetensors")]) == 0
    back = tinygpt.load_checkpoint(tmp_path / "back.safetensors").parameters
    rounded = torch.from_numpy(flat).to(getattr(torch, dtype)).float().numpy()
    assert sorted(back.tolist()) == sorted(rounded.tolist())  # pairs of neighbours change places in Llama's
    assert back.dtype == np.float32
