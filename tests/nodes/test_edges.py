"""PixArtHED as a node: picture in, edge map out."""
from __future__ import annotations

import comfy.model_management as management
import pytest
import torch

from tests.support import host
from tests.test_hed import expected_edges, random_weights

errors = host.pack_module("pixart.errors")


def test_edges_of_a_batch(models) -> None:
    torch.save(random_weights(), models / "controlnet" / "ControlNetHED.pth")
    image = torch.rand(2, 32, 40, 3, generator=torch.Generator().manual_seed(1))
    found = host.pack_module("nodes.controlnet").PixArtHED.execute(image, "ControlNetHED.pth").result[0]
    assert found.shape == (2, 32, 40, 3)
    expected = expected_edges(random_weights(), image.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(found, expected.expand(-1, -1, -1, 3), rtol=1e-4, atol=1e-5)


def test_memory_is_asked_for(models, monkeypatch) -> None:
    """One picture at a time, whatever the batch."""
    torch.save(random_weights(), models / "controlnet" / "ControlNetHED.pth")
    asked = []
    original = management.load_models_gpu
    monkeypatch.setattr(management, "load_models_gpu", lambda models, **options: (asked.append(options), original(models, **options))[1])
    host.pack_module("nodes.controlnet").PixArtHED.execute(torch.zeros(3, 48, 64, 3), "ControlNetHED.pth")
    assert 48 * 64 * 64 * 3 * 4 < asked[0]["memory_required"] < 48 * 64 * 2000


def test_names_outside_the_folder_are_refused(models) -> None:
    with pytest.raises(errors.CheckpointError, match="not in the folder controlnet"):
        host.pack_module("nodes.controlnet").PixArtHED.execute(torch.zeros(1, 32, 32, 3), "../x.pth")
