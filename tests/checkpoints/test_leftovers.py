"""A whole PixArt beside keys of something else is loaded without them; what may be a part of it, or is missing, stays an error."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pixart.checkpoints import prepare_file
from pixart.checkpoints.load import load_transformer
from pixart.errors import CheckpointError
from tests.support.checkpoint_factory import tiny_weights

_, DIFFUSERS, ORIGINAL = tiny_weights()
SMALL = torch.zeros(3, 3)
LORA = "lora_unet_blocks_0_attn_qkv.lora_down.weight"
OTHERS = {
    "an all-in-one's T5": {"t5xxl.transformer.shared.weight": SMALL},
    "its T5 in packed numbers": {"t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.SCB": SMALL},
    "its T5 in scaled fp8": {"t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.tensor(1.0)},
    "CLIP": {"clip_l.transformer.text_model.embeddings.x": SMALL, "text_projection.weight": SMALL},
    "an average": {f"ema_model.{key}": value * 2 for key, value in ORIGINAL.items()},
    "a teacher in the other layout": {f"teacher.{key}": value * 2 for key, value in DIFFUSERS.items()},
    "half of another": {f"draft.{key}": value * 2 for key, value in ORIGINAL.items() if "blocks.1" not in key and "t_block" not in key},
    "what aligns features": {"projectors.0.0.weight": SMALL, "projectors.0.0.bias": SMALL},
    "counters": {"iteration": torch.tensor(4), "num_timesteps": torch.tensor(1000)},
    "another model's ControlNet": {"control_model.input_hint_block.0.weight": SMALL},
    "a LoRA": {LORA: SMALL},
    "an SDXL": {"unet.input_blocks.0.0.weight": SMALL, "unet.middle_block.0.bias": SMALL},
    "a Sana": {"sana.transformer_blocks.0.ff.conv_inverted.weight": SMALL, "sana.caption_projection.linear_1.weight": SMALL},
}


def check(path: Path, *names: str) -> None:
    """Every weight is the PixArt's, and the names are listed."""
    prepared = prepare_file(path)
    assert set(prepared.state_dict) == set(ORIGINAL)
    assert all(torch.equal(prepared.state_dict[key], value) for key, value in ORIGINAL.items())
    (said,) = [reason for reason in prepared.detection.reasons if "left out" in reason]
    assert all(name in said for name in names), said


def prefixed(prefix: str, weights: dict[str, Tensor] = ORIGINAL) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_what_stands_beside_it_is_left_out_and_listed(tmp_path: Path, kind: str, prefix: str, layout: str) -> None:
    weights = {"original": ORIGINAL, "diffusers": {**DIFFUSERS, "caption_projection.y_embedding": ORIGINAL["y_embedder.y_embedding"]}}
    save_file({key: v.clone() for key, v in {**OTHERS[kind], **prefixed(prefix, weights[layout])}.items()}, tmp_path / "m.safetensors")
    check(tmp_path / "m.safetensors", *{key.split(".")[0] for key in OTHERS[kind]})


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model."])
def test_strangers_under_its_prefix(tmp_path: Path, prefix: str) -> None:
    strangers = {"num_timesteps": torch.tensor(1000), "projectors.0.weight": SMALL, "blocks.0.attn.qkv._extra_state": torch.zeros(3)}
    save_file(prefixed(prefix, {**ORIGINAL, **strangers}), tmp_path / "m.safetensors")
    check(tmp_path / "m.safetensors", "num_timesteps", "projectors.", "_extra_state")


def test_one_pixart_and_a_controlnet_for_another_model(tmp_path: Path) -> None:
    save_file({**prefixed("transformer."), "controlnet.controlnet_blocks.0.weight": SMALL}, tmp_path / "m.safetensors")
    check(tmp_path / "m.safetensors", "controlnet.")


def test_entries_of_a_pickle_that_are_no_tensors(tmp_path: Path) -> None:
    torch.save({**ORIGINAL, "iteration": torch.tensor(4), "classes": ["a", "b"], "comment": "hello"}, tmp_path / "m.pth")
    check(tmp_path / "m.pth", "iteration", "classes", "comment")


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    save_file({**prefixed("model."), **{f"lora_unet_{i}.lora_up.weight": torch.zeros(1) for i in range(50)}}, tmp_path / "m.safetensors")
    check(tmp_path / "m.safetensors", "lora_unet_0.", "and 30 more")


WRONG = {  # changes of a whole PixArt -> what the error says
    "a slip in a name": ({"blocks.0.attn.qkv.weight2": SMALL}, "unknown key blocks.0.attn.qkv.weight2"),
    "a slip in a part's name": ({"x_embeder.proj.weight": SMALL}, "unknown key x_embeder.proj.weight"),
    "one block more": ({"blocks.2.attn.proj.bias": torch.zeros(144)}, "missing blocks.2.attn.qkv.weight"),
    "another condition": ({"guidance_embedder.mlp.0.weight": SMALL}, "unknown key guidance_embedder.mlp.0.weight"),
    "another norm": ({"caption_norm.weight": SMALL}, "unknown key caption_norm.weight"),
    "an adapter's parts inside": ({"blocks.0.attn.qkv.lora_A.weight": SMALL, "blocks.0.attn.qkv.lora_B.weight": SMALL}, "a LoRA"),
    "a ControlNet that has all layers": ({"controlnet_blocks.0.weight": SMALL}, "a ControlNet for another model"),
    "a PixArt ControlNet": ({"controlnet.0.copied_block.attn.qkv.weight": SMALL}, "a PixArt ControlNet"),
    "no numbers where a weight should be": ({"blocks.0.attn.qkv.weight": "text"}, "1 entries are not tensors"),
    "packed weights": ({"blocks.0.attn.qkv.SCB": SMALL}, "quantized by bitsandbytes"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_may_be_a_part_of_it_stays_an_error(tmp_path: Path, kind: str, prefix: str) -> None:
    change, message = WRONG[kind]
    torch.save(prefixed(prefix, {**ORIGINAL, **change}), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=message):
        load_transformer(tmp_path / "m.pth")


@pytest.mark.parametrize("other", ["model.", "student."])
def test_two_whole_ones_are_refused(tmp_path: Path, other: str) -> None:
    save_file({**ORIGINAL, **prefixed(other, {key: value * 2 for key, value in ORIGINAL.items()})}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=f"several transformers, under no prefix, '{other}'"):
        load_transformer(tmp_path / "m.safetensors")


@pytest.mark.parametrize("kind, named", [("a LoRA", "LoRA"), ("another model's ControlNet", "ControlNet"), ("counters", "missing t_block")])
def test_a_part_of_a_pixart_is_called_what_the_rest_is(tmp_path: Path, kind: str, named: str) -> None:
    save_file({**{key: v for key, v in ORIGINAL.items() if "t_block" not in key}, **OTHERS[kind]}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=named):
        load_transformer(tmp_path / "m.safetensors")


def test_what_is_missing_may_have_another_name(tmp_path: Path) -> None:
    save_file({key.replace("t_block.", "time_mod."): value for key, value in ORIGINAL.items()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)missing t_block\.1\.weight.*unknown key time_mod\."):
        load_transformer(tmp_path / "m.safetensors")
