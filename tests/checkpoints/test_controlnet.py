"""ControlNet files in every layout, and files that are none."""
import pytest
import torch
from safetensors.torch import save_file

from pixart.checkpoints.controlnet import load_controlnet, prepare_controlnet
from pixart.checkpoints.load import load_transformer
from pixart.errors import CheckpointError
from tests.support.checkpoint_factory import tiny_weights
from tests.support.tiny_control import original_keys, reference_control


@pytest.fixture(scope="module")
def adapter():
    return reference_control(depth=3)


def layouts(adapter):
    """Name -> state dict, as trainers write them."""
    native, diffusers = original_keys(adapter), dict(adapter.state_dict())
    _, base_diffusers, base_native = tiny_weights()
    yield "reference", {**{f"base_model.{key}": value for key, value in base_native.items()}, **native}
    yield "without the base", native
    yield "in DDP", {f"module.{key}": value for key, value in native.items()}
    yield "diffusers and SimpleTuner", diffusers
    joint = {f"transformer.{key}": value for key, value in base_diffusers.items()}
    yield "reference, after the bare base", {**base_native, **native}
    yield "reference, before the bare base", {**native, **base_native}
    yield "diffusers, before the bare base in DDP", {f"module.{key}": value for key, value in {**diffusers, **base_diffusers}.items()}
    yield "diffusers with the base", {**joint, **{f"controlnet.{key}": value for key, value in diffusers.items()}}


def test_every_layout_is_the_same_controlnet(adapter):
    native = original_keys(adapter)
    for name, state in layouts(adapter):
        prepared = prepare_controlnet(state, name)
        assert prepared.config.depth == 3 and prepared.config.hidden_size == 144 and prepared.config.num_heads == 2
        assert set(prepared.state_dict) == set(native), name
        assert all(torch.equal(prepared.state_dict[key], native[key]) for key in native), name
        assert ("base model" in prepared.describe()) == ("base" in name and "without" not in name or name == "reference")


@pytest.mark.parametrize("depth", [1, 13])
def test_the_number_of_blocks_is_the_files(depth):
    assert prepare_controlnet(original_keys(reference_control(72, depth)), "test").config.depth == depth


@pytest.mark.parametrize("kind", ["pth", "safetensors", "folder"])
def test_files(adapter, tmp_path, kind):
    native = original_keys(adapter)
    path = tmp_path / f"control.{kind}"
    if kind == "pth":
        torch.save({"state_dict": native, "epoch": 1}, path)
    elif kind == "safetensors":
        save_file(native, path)
    else:
        path.mkdir()
        save_file(dict(adapter.state_dict()), path / "diffusion_pytorch_model.safetensors")
        (path / "config.json").write_text('{"_class_name": "PixArtSigmaControlNetAdapterModel", "num_layers": 3}')
    model = load_controlnet(path, dtype=torch.float16)
    assert torch.equal(model.controlnet[2].after_proj.weight, native["controlnet.2.after_proj.weight"].half())


def damaged(adapter):
    """What is wrong with a file, and what the error names."""
    native, diffusers = original_keys(adapter), dict(adapter.state_dict())
    yield {k: v for k, v in native.items() if "1.copied_block.attn.qkv" not in k}, r"missing controlnet.1.copied_block.attn.qkv.weight"
    yield {k: v for k, v in diffusers.items() if "2.transformer_block.attn1.to_k.bias" not in k}, r"missing .*blocks\.2\.attn1\.to_k\.bias"
    yield {k: v for k, v in native.items() if "before_proj" not in k}, "missing controlnet.0.before_proj"
    yield {**native, "controlnet.1.copied_block.extra": torch.zeros(1)}, "unknown key controlnet.1.copied_block.extra"
    yield {**native, "lora_A.weight": torch.zeros(1)}, "unknown key lora_A"
    yield {**native, "controlnet.1.after_proj.bias": torch.zeros(72)}, r"\(72,\), expected \(144,\)"
    yield {**native, "controlnet.1.after_proj.bias": torch.full((144,), float("nan"))}, "NaN"
    yield {f"controlnet.0.after_proj.{k}": torch.zeros(100, 100) for k in ("weight", "bias")}, "width 100.*multiple of 72"
    yield {"controlnet.9999.after_proj.weight": torch.zeros(72, 72)}, "10000 blocks"
    yield tiny_weights()[2], "PixArt transformer; load it with PixArtModelLoader"
    yield {"down_blocks.0.x": torch.zeros(1), "mid_block.x": torch.zeros(1), "time_embedding.x": torch.zeros(1)}, "Stable Diffusion"
    yield {"a": torch.zeros(1)}, "no ControlNet blocks of PixArt among its 1 keys"


def test_files_that_are_no_whole_controlnet(adapter):
    for state, message in damaged(adapter):
        with pytest.raises(CheckpointError, match=message):
            prepare_controlnet(state, "given.pth")


def test_a_controlnet_is_no_transformer(adapter, tmp_path):
    save_file(original_keys(adapter), tmp_path / "control.safetensors")
    with pytest.raises(CheckpointError, match="ControlNet|PixArt layers"):
        load_transformer(tmp_path / "control.safetensors")


def test_no_code_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"state_dict": {"controlnet.0.after_proj.weight": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load_controlnet(tmp_path / "evil.pth")
