"""Full-width zoo entries through the host's MODEL, beside diffusers' PixArtTransformer2DModel on the same weights.

The quick run takes one file format and one size an entry; PIXART_SWEEP=1 takes every bin (2K: five).
"""
from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support import fidelity, host, host_models
from tests.support.checkpoint_factory import FORMATS, tiny_weights, write
from tests.support.host_models import difference, forward

SWEEP = bool(os.environ.get("PIXART_SWEEP"))
SMALL_FORMATS = [kind for kind in FORMATS if kind != "pth-ema"]  # the node takes the plain weights of a .pth


def host_model(case: fidelity.Case, kind: str, folder: Path):
    """The case's weights as MODEL, through a file."""
    path = write(kind, folder, case.config, case.diffusers, case.original)
    return host_models.load_model(path, variant=case.variant.name, weight_dtype="fp32")


def error(case: fidelity.Case, model, height: int, width: int) -> float:
    """Relative error of the predicted noise at a size in pixels."""
    latent, timestep, context, mask = fidelity.make_inputs(case, height, width)
    expected = fidelity.expected_output(case, height, width)[:, :4]
    return difference(forward(model, latent, timestep.float(), context, context_mask=mask), expected)


@pytest.mark.parametrize("name", fidelity.FULL_SIZE)
def test_noise_equals_diffusers(name: str, tmp_path: Path) -> None:
    case = fidelity.make_case(name, depth=1)
    kind = SMALL_FORMATS[fidelity.FULL_SIZE.index(name) % len(SMALL_FORMATS)]
    model = host_model(case, kind, tmp_path)
    bins = fidelity.bins_of(name)
    large = case.variant.base_size > 1024
    if SWEEP:
        chosen = fidelity.spread(bins, 5 if large else len(bins))
    else:  # small enough for two cores; the positions depend on rows and columns alone
        chosen = [(128, 320)]
    errors = {size: error(case, model, *size) for size in chosen}
    assert max(errors.values()) <= fidelity.LIMIT, errors


def test_bf16_is_as_exact_as_the_core(tmp_path: Path) -> None:
    """Twelve narrow blocks; the host's layers and attention must not undo the fp32 residual stream."""
    config, diffusers, original = tiny_weights(depth=12, captions=host_models.CAPTIONS)
    path = write("safetensors", tmp_path, config, diffusers, original)
    core = host.pack_module("pixart.checkpoints.load")
    latent, step, states = host_models.noise(32, 32), torch.tensor([400.0]), host_models.captions(9)[0][0]
    half = [tensor.to(torch.bfloat16) for tensor in (latent, states)]
    expected = core.load_transformer(path)(latent, step, states)[:, :4].detach()
    plain = core.load_transformer(path, dtype=torch.bfloat16)(half[0], step, half[1])[:, :4].detach()
    found = forward(host_models.load_model(path, weight_dtype="bf16"), half[0], step, half[1])
    assert difference(found.float(), expected) <= 1.2 * difference(plain.float(), expected)
