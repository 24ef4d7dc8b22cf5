"""The consistency decoder through the host's VAE nodes."""
from __future__ import annotations

import nodes as host_nodes
import pytest
import torch

from tests.support import host
from tests.support.tiny_consistency import tiny_decoder, write_decoder

errors = host.pack_module("pixart.errors")


@pytest.fixture
def vae(models):
    """The node's output."""
    write_decoder(models / "vae" / "consistency")
    return host.pack_module("nodes.vae").PixArtConsistencyDecoder.execute("consistency").result[0]


def latent(rows: int = 4, columns: int = 6) -> torch.Tensor:
    """Samples as a sampler hands them out: in VAE scale."""
    return torch.randn(1, 4, rows, columns, generator=torch.Generator().manual_seed(2)) / 0.18215


def test_decode_and_encode(vae) -> None:
    picture = host_nodes.VAEDecode().decode(vae, {"samples": latent()})[0]
    expected = tiny_decoder().decode(latent(), generator=torch.Generator().manual_seed(0)).sample / 2 + 0.5
    torch.testing.assert_close(picture, expected.clamp(0, 1).movedim(1, -1))
    again = host_nodes.VAEEncode().encode(vae, torch.nn.functional.pad(picture, (0, 0, 0, 3, 0, 5)))[0]["samples"]
    assert again.shape == (1, 4, 4, 6)


def test_tiled_decoding_of_one_tile_is_the_same(vae) -> None:
    whole = host_nodes.VAEDecode().decode(vae, {"samples": latent(8, 8)})[0]
    tiled = host_nodes.VAEDecodeTiled().decode(vae, {"samples": latent(8, 8)}, 64, 16)[0]
    torch.testing.assert_close(tiled, whole, rtol=1e-3, atol=1e-3)
    many = host_nodes.VAEDecodeTiled().decode(vae, {"samples": latent(12, 20)}, 64, 16)[0]
    assert many.shape == (1, 96, 160, 3) and torch.isfinite(many).all()


def test_names_outside_the_folder_are_refused(models) -> None:
    with pytest.raises(errors.CheckpointError, match="not in the folder vae"):
        host.pack_module("nodes.vae").PixArtConsistencyDecoder.execute("../x")
