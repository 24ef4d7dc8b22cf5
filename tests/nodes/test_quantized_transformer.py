"""A transformer that `python -m pixart quantize --precision fp8` wrote, through PixArt Model Loader and UNETLoader's loader."""
from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers import Size, Workload
from tests.support import host
from tests.support.checkpoint_factory import stored_positions
from tests.support.host_models import captions, difference, load_model, sample

pytestmark = pytest.mark.skipif(host.on_card(), reason="a card may multiply in fp8, with rounding of its own")
quantize = host.pack_module("pixart.checkpoints.quantize")
# Hosts without formats of single layers keep every linear layer of such a file in fp8, also biases and what has no scale
EXACT = 1e-5 if hasattr(comfy.utils, "convert_old_quants") else 0.1


def restored(path: Path, folder: Path) -> Path:
    """The same numbers in fp32."""
    state = load_file(path)
    state.pop("scaled_fp8")
    scales = {key: state.pop(key) for key in list(state) if key.endswith(".scale_weight")}
    for key, scale in scales.items():
        name = key.replace(".scale_weight", ".weight")
        state[name] = state[name].float() * scale
    save_file(state, folder / "restored.safetensors")
    return folder / "restored.safetensors"


def pictures(*models) -> list[torch.Tensor]:
    return [sample(model, captions(5), captions(2, seed=1), steps=2) for model in models]


def test_the_packs_loader_is_exact_to_fp8s_rounding(sigma, sigma_file: Path, tmp_path: Path) -> None:
    path = quantize.quantize_transformer(sigma_file, tmp_path / "small.safetensors")
    model = load_model(path)
    assert model.model.detection.variant == sigma.model.detection.variant
    found, exact, plain = pictures(model, load_model(restored(path, tmp_path)), sigma)
    assert difference(found, exact) < EXACT and 1e-3 < difference(found, plain) < 0.2


def test_comfyuis_own_loader_reads_it(tmp_path: Path) -> None:
    """At XL's width, the only one that it knows."""
    work = Workload(Size(512, 1), torch.float32, "cpu")
    save_file({**work.weights, "pos_embed": stored_positions(32, 1152, 32)}, tmp_path / "m.safetensors")
    path = quantize.quantize_transformer(tmp_path / "m.safetensors", tmp_path / "small.safetensors", "sigma-512")
    assert path.stat().st_size < 0.65 * (tmp_path / "m.safetensors").stat().st_size
    given = [[[caption, {}]] for caption in work.captions]
    latent = torch.zeros(1, 4, 64, 64)
    load = comfy.sd.load_diffusion_model
    found, exact = (sample(load(str(each)), *given, latent, steps=1) for each in (path, restored(path, tmp_path)))
    assert difference(found, exact) < 10 * EXACT
