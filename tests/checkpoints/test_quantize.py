"""A transformer in scaled fp8: each weight within fp8's rounding, all else bit for bit, and what it is stays known."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pixart.checkpoints import load_transformer
from pixart.checkpoints.quantize import MATRICES, quantize_matrix, quantize_transformer
from pixart.cli import main
from pixart.errors import CheckpointError
from tests.support.checkpoint_factory import FORMATS, tiny_weights, write


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_quantized_to_the_same(tmp_path, kind):
    source = write(kind, tmp_path / "in", *tiny_weights())
    before = load_transformer(source, ema=kind == "pth-ema").state_dict()
    after = load_file(quantize_transformer(source, tmp_path / "out.safetensors", ema=kind == "pth-ema"))
    assert after.pop("scaled_fp8").numel() == 0 and after.pop("pos_embed").shape == (1, 64 * 64, 144)
    matrices = {key for key in before if MATRICES.fullmatch(key)}
    assert len(matrices) == 7 * 2
    for key, weight in before.items():
        if key not in matrices:
            assert torch.equal(after.pop(key), weight), key
            continue
        found, scale = after.pop(key), after.pop(key.replace(".weight", ".scale_weight"))
        assert found.dtype == torch.float8_e4m3fn and scale.shape == () and scale.dtype == torch.float32
        restored = found.float() * scale
        # e4m3: 3 bits of mantissa, so half of 1/8 of the number; below 2^-6 of its scale the spacing stays 2^-9
        assert bool(((restored - weight).abs() <= weight.abs() / 16 + scale * 2**-10).all()), key
        assert restored.abs().max() == pytest.approx(float(weight.abs().max()), rel=1e-6)
    assert after == {}


@pytest.mark.parametrize(("variant", "side"), [("alpha-512", 32), ("alpha-256", 16), ("sigma-2k", 128), ("auto", 64)])
def test_positions_are_of_the_models_size(tmp_path, variant, side):
    """By which ComfyUI's own loader knows it."""
    source = write("safetensors", tmp_path, *tiny_weights(null_rows=None))
    written = quantize_transformer(source, tmp_path / "out.safetensors", variant)
    assert load_file(written)["pos_embed"].shape[1] == side**2


def test_a_matrix_of_zeros_stays_one():
    found, scale = quantize_matrix(torch.zeros(3, 4))
    assert not found.float().any() and scale > 0 and bool(torch.isfinite(scale))


def test_on_the_command_line(tmp_path, capsys):
    source = write("safetensors", tmp_path, *tiny_weights())
    assert main(["quantize", str(source), str(tmp_path / "small.safetensors"), "--precision", "fp8"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "small.safetensors")
    again = ["quantize", str(tmp_path / "small.safetensors"), str(tmp_path / "x.safetensors"), "--precision", "fp8"]
    assert main(again) == 2 and not (tmp_path / "x.safetensors").exists()
    said = capsys.readouterr().err
    assert "small.safetensors" in said and said.count("scaled quantization is not supported here") == 1 and " more: scaled" in said
    assert main(["quantize", str(source), str(tmp_path / "t5"), "--precision", "int8"]) == 2
    assert "T5" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("folder", "ends in .safetensors"), ("model.safetensors", "the source itself")])
def test_destinations(tmp_path, name, message):
    source = write("safetensors", tmp_path, *tiny_weights())
    assert source.name == "model.safetensors"
    with pytest.raises(CheckpointError, match=message):
        quantize_transformer(source, tmp_path / name)
