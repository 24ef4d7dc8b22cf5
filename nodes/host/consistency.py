"""The consistency decoder behind the methods that the host's VAE nodes call."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...pixart.consistency import ConsistencyVae, load_consistency_decoder
from ...pixart.logs import get_logger

log = get_logger(__name__)
TILES = (64, 32)  # sides in latents to try, one after the other, where the card has no room for a whole picture
VALUES_PER_PIXEL = 6000  # of activations: the widest stage has 320 channels at full size; 7000 have been seen at the peak


def load_decoder(path: str) -> ConsistencyDecoder:
    """A VAE from a diffusers folder or file."""
    device = management.vae_device()
    dtype = management.vae_dtype(device, [torch.float16, torch.float32])
    return ConsistencyDecoder(load_consistency_decoder(path, dtype), device)


class ConsistencyDecoder:
    """What the host's nodes for encoding and decoding need of a VAE; loaded and unloaded like any other model."""

    def __init__(self, vae: ConsistencyVae, device: Any) -> None:
        self.vae = vae
        self.device = device
        self.output_device = management.intermediate_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            torch.nn.ModuleList([vae.module]),  # the patcher sets `device`, which diffusers' classes don't let be set
            load_device=device,
            offload_device=management.vae_offload_device(),
        )

    def decode(self, samples: Tensor, **_: Any) -> Tensor:
        """Latents (B, 4, h, w) -> IMAGE (B, H, W, 3); in tiles where memory runs out, as the host's VAE does."""

        def whole() -> Tensor:
            self._load(samples.shape[-2] * samples.shape[-1])
            return self.vae.decode(samples).movedim(1, -1).to(self.output_device)

        return _or_in_tiles("decoding", whole, lambda tile: self.decode_tiled(samples, tile, tile, tile // 4))

    def decode_tiled(self, samples: Tensor, tile_x: int = 64, tile_y: int = 64, overlap: int = 16, **_: Any) -> Tensor:
        """The same in overlapping tiles of so many latents; `decode` where one tile is enough."""
        self._load(tile_x * tile_y)
        pictures = comfy.utils.tiled_scale(
            samples, self.vae.decode, tile_x=tile_x, tile_y=tile_y, overlap=overlap, out_channels=3,
            upscale_amount=self.spacial_compression_decode(), output_device=self.output_device,
        )  # fmt: skip
        return pictures.movedim(1, -1)

    def encode(self, pixel_samples: Tensor, **_: Any) -> Tensor:
        """IMAGE (B, H, W, C) -> latents (B, 4, H/8, W/8) of its middle, where the sides don't divide by 8; in tiles as `decode`."""

        def whole() -> Tensor:
            pixels = self._cropped(pixel_samples)
            self._load(pixels.shape[-2] * pixels.shape[-1] // self.downscale_ratio**2)
            return self.vae.encode(pixels).to(self.output_device)

        side = self.downscale_ratio
        return _or_in_tiles("encoding", whole, lambda tile: self.encode_tiled(pixel_samples, tile * side, tile * side, tile * side // 4))

    def encode_tiled(self, pixel_samples: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64, **_: Any) -> Tensor:
        """The same in overlapping tiles of so many pixels; `encode` where one tile is enough."""
        self._load(tile_x * tile_y // self.downscale_ratio**2)
        return comfy.utils.tiled_scale(
            self._cropped(pixel_samples), self.vae.encode, tile_x=tile_x, tile_y=tile_y, overlap=overlap,
            out_channels=self.vae.module.config.latent_channels, upscale_amount=1 / self.downscale_ratio, output_device=self.output_device,
        )  # fmt: skip

    @property
    def downscale_ratio(self) -> int:
        """Pixels per latent, where VAEEncodeForInpaint of older hosts looks for it."""
        return self.vae.pixels_per_latent

    def spacial_compression_decode(self) -> int:
        """Pixels per latent; the spelling is the host's."""
        return self.vae.pixels_per_latent

    def spacial_compression_encode(self) -> int:
        """As for decoding."""
        return self.vae.pixels_per_latent

    def temporal_compression_decode(self) -> None:
        """No video."""
        return None

    def get_sd(self) -> dict[str, Tensor]:
        """For VAESave."""
        return self.vae.module.state_dict()

    def throw_exception_if_invalid(self) -> None:
        """A loaded decoder is a whole one."""

    def _cropped(self, pixels: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, 3, h, w), sides cut to whole latents from the middle, as the host's VAE does: masks are cut so too."""
        for axis in (1, 2):
            side = pixels.shape[axis]
            rest = side % self.downscale_ratio
            pixels = pixels.narrow(axis, rest // 2, side - rest)
        return pixels[..., :3].movedim(-1, 1)

    def _load(self, latents: int) -> None:
        """Makes room for so many latents, and brings in all weights: the host can't fetch those of diffusers' layers one by one."""
        size = next(self.vae.module.parameters()).element_size()
        needed = latents * self.vae.pixels_per_latent**2 * VALUES_PER_PIXEL * size
        management.load_models_gpu([self.patcher], memory_required=needed, force_full_load=True)
        if any(parameter.device.type != self.device.type for parameter in self.vae.module.parameters()):
            self.patcher.load(self.device, full_load=True)  # with --novram the host loads in part, whatever it is asked


def _or_in_tiles(what: str, whole: Callable[[], Tensor], in_tiles: Callable[[int], Tensor]) -> Tensor:
    """`whole`; where the device's memory runs out, `in_tiles` of the largest side in latents that fits."""
    try:
        return whole()
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
    # Out of the except block, so that the error no longer holds what filled the memory.
    log.warning("PixArt consistency decoder: not enough memory for %s the whole picture, continuing in tiles.", what)
    management.soft_empty_cache()
    *larger, smallest = TILES
    for tile in larger:
        try:
            return in_tiles(tile)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
        management.soft_empty_cache()
    return in_tiles(smallest)


def _is_out_of_memory(error: Exception) -> bool:
    host_says = getattr(management, "is_oom", None)  # newer hosts know more kinds
    return host_says(error) if host_says else isinstance(error, management.OOM_EXCEPTION)
