"""`qk_norm`, an option of the reference's training code: exact beside diffusers' model with the norms put behind its projections."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart.checkpoints import convert_file, load_transformer
from pixart.controlnet import ControlNetConfig, PixArtControlNet
from pixart.errors import InputError
from tests.support.checkpoint_factory import diffusers_config, original_keys, reference_model

CONFIG = diffusers_config(depth=3)
INPUTS = (torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([999.0, 30.0]),
          torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)))  # fmt: skip


def norms() -> dict[str, Tensor]:
    order = torch.Generator().manual_seed(3)
    names = [f"blocks.{i}.attn.{part}_norm.{leaf}" for i in range(3) for part in "qk" for leaf in ("weight", "bias")]
    return {name: torch.randn(144, generator=order) * 0.5 + (1 if name.endswith("weight") else 0) for name in names}


def original() -> dict[str, Tensor]:
    """Under the reference's names."""
    return {**original_keys(reference_model(CONFIG).state_dict(), 3, 300), **norms()}


def expected() -> Tensor:
    """LayerNorm over the whole width (eps 1e-5, torch's own) of queries and keys, before they are cut into heads."""
    model, given = reference_model(CONFIG), norms()
    for index, block in enumerate(model.transformer_blocks):
        for part in "qk":
            weight, bias = (given[f"blocks.{index}.attn.{part}_norm.{leaf}"] for leaf in ("weight", "bias"))
            layer = getattr(block.attn1, f"to_{part}")
            layer.register_forward_hook(lambda _, __, out, w=weight, b=bias: F.layer_norm(out, (144,), w, b, 1e-5))
    latent, timestep, context = INPUTS
    model.pos_embed.interpolation_scale = CONFIG["sample_size"] / 2 / 32
    with torch.no_grad():
        return model(latent, encoder_hidden_states=context, timestep=timestep,
                     added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample  # fmt: skip


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"state_dict": original()}, tmp_path / "epoch_1.pth")
    return tmp_path / "epoch_1.pth"


def test_exact_beside_diffusers(file: Path) -> None:
    model = load_transformer(file)
    assert model.config.qk_norm and "qk_norm" in " ".join(model.detection.reasons)
    with torch.no_grad():
        assert relative(model(*INPUTS), expected()) < 1e-5
        plain = {key: value for key, value in original().items() if "_norm" not in key}
        save_file(plain, file.with_suffix(".safetensors"))
        assert relative(load_transformer(file.with_suffix(".safetensors"))(*INPUTS), expected()) > 1e-2


def test_there_and_back_through_diffusers_names(file: Path, tmp_path: Path) -> None:
    there = convert_file(file, tmp_path / "d.safetensors", to="diffusers")
    back = load_file(convert_file(there, tmp_path / "o.safetensors", to="original"))
    assert all(torch.equal(back[key], value) for key, value in original().items())


def test_a_controlnet_without_the_norms_is_no_copy_of_it(file: Path) -> None:
    model = load_transformer(file)
    with pytest.raises(InputError, match="does not normalize queries and keys"):
        PixArtControlNet(ControlNetConfig(144, 1, 2, 576), device="meta").check_fits(model.config)
    PixArtControlNet(ControlNetConfig(144, 1, 2, 576, qk_norm=True), device="meta").check_fits(model.config)


def test_a_part_of_the_norms_is_an_error(tmp_path: Path) -> None:
    weights = original()
    del weights["blocks.1.attn.k_norm.bias"]
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="missing blocks.1.attn.k_norm.bias"):
        load_transformer(tmp_path / "m.safetensors")
