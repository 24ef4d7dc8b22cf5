"""Pipeline.load_lora: the picture of weights merged by hand, in transformer and T5; errors change nothing."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from pixart import Pipeline
from pixart.errors import CheckpointError, InputError
from tests.support import adapter_factory
from tests.support.checkpoint_factory import original_keys
from tests.support.tiny_pipeline import make_parts

T5_LAYER = "encoder.block.1.layer.0.SelfAttention.o"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def pipe(parts):
    return Pipeline.from_files(transformer=parts.folder, text_encoder=parts.folder)


def draw(pipe):
    latents = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(5))
    return pipe("a red circle", latents=latents, steps=2, use_bins=False, output="latent", progress=False)


def test_pictures_and_weights_are_those_of_a_merge_by_hand(parts, pipe, tmp_path):
    stored = parts.folder / "transformer/diffusion_pytorch_model.safetensors"
    weights, plain = original_keys(parts.transformer.state_dict(), 2), draw(pipe)
    sample = adapter_factory.make("onetrainer", weights)
    up, down = torch.randn(32, 2), torch.randn(2, 32)
    flat = "lora_te_" + T5_LAYER.replace(".", "_")
    text = {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down, f"{flat}.alpha": torch.tensor(1.0)}
    save_file({**sample.tensors, **text}, tmp_path / "style.safetensors")
    line = pipe.load_lora(tmp_path / "style.safetensors", 0.3)
    assert line == "style.safetensors: 39 of 39 keys applied (12 layers and 1 of T5, LoRA, rank 2 to 4)"
    for key, value in sample.merged(weights, 0.3).items():
        torch.testing.assert_close(pipe.transformer.get_parameter(key).data, value, rtol=1e-5, atol=1e-6)
    expected = parts.t5.get_parameter(f"{T5_LAYER}.weight") + 0.3 * 0.5 * up @ down
    torch.testing.assert_close(pipe.text_encoder.model.get_parameter(f"{T5_LAYER}.weight").data, expected.detach())
    changed = draw(pipe)
    assert float((changed - plain).norm() / plain.norm()) > 1e-3
    on_disk = original_keys(load_file(stored), 2)
    assert all(torch.equal(on_disk[key], value) for key, value in weights.items())
    pipe.load_lora(tmp_path / "style.safetensors", -0.3)
    assert float((draw(pipe) - plain).norm() / plain.norm()) < 1e-4


def test_without_text_encoder_its_part_is_left_out_only_on_request(parts, tmp_path, caplog):
    pipe = Pipeline.from_files(transformer=parts.folder)
    weights = original_keys(parts.transformer.state_dict(), 2)
    sample = adapter_factory.make("peft", weights)
    flat = "lora_te_" + T5_LAYER.replace(".", "_")
    text = {f"{flat}.lora_up.weight": torch.randn(32, 2), f"{flat}.lora_down.weight": torch.randn(2, 32)}
    save_file({**sample.tensors, **text}, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match="2 of 26 keys can't be applied, so none was; give a text encoder .* text_strength"):
        pipe.load_lora(str(tmp_path / "style.safetensors"))
    assert all(torch.equal(pipe.transformer.get_parameter(change.key), weights[change.key]) for change in sample.changes)
    line = pipe.load_lora(str(tmp_path / "style.safetensors"), text_strength=0)
    assert "24 of 26 keys applied (12 layers, LoRA, rank 4); not applied: 2 for T5, and no text encoder is given" in line
    assert line in caplog.text


def test_t5_has_a_strength_of_its_own(parts, pipe, tmp_path):
    up, down = torch.randn(32, 2), torch.randn(2, 32)
    sample = adapter_factory.make("peft", original_keys(parts.transformer.state_dict(), 2))
    text = {f"text_encoder.{T5_LAYER}.lora_B.weight": up, f"text_encoder.{T5_LAYER}.lora_A.weight": down}
    save_file({**sample.tensors, **text}, tmp_path / "style.safetensors")
    before = pipe.text_encoder.model.get_parameter(f"{T5_LAYER}.weight").detach().clone()
    pipe.load_lora(tmp_path / "style.safetensors", 0.7, text_strength=0)
    assert torch.equal(pipe.text_encoder.model.get_parameter(f"{T5_LAYER}.weight"), before)
    pipe.load_lora(tmp_path / "style.safetensors", 0, text_strength=2)
    torch.testing.assert_close(pipe.text_encoder.model.get_parameter(f"{T5_LAYER}.weight").data, before + 2 * up @ down)


def test_errors_change_nothing(pipe, tmp_path):
    before = draw(pipe)
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.randn(2)}, tmp_path / "sd.safetensors")
    with pytest.raises(CheckpointError, match="Stable Diffusion"):
        pipe.load_lora(tmp_path / "sd.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        pipe.load_lora(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="strength is nan"):
        pipe.load_lora(tmp_path / "sd.safetensors", float("nan"))
    assert torch.equal(draw(pipe), before)
