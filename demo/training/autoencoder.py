"""The demo's autoencoder in TAESD layout: an encoder built by hand and a trained decoder.

The encoder is exact: it takes the mean colour of every 8x8 block and maps it by a fixed affine map to
four latent channels of mean 0 and variance 1 over random scenes. So training needs no encoder at all.
`python -m demo.training.autoencoder --steps N --out FILE` trains the decoder and writes the file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, autocast, nn
from torch.nn import Conv2d
from tqdm import tqdm

from .. import RESULTS, WEIGHTS
from ..data.scenes import render, sample_scene

VAE_SCALE = 0.13025
WIDTH = 64
TRAIN_SIZES = ((256, 256), (304, 208), (208, 304), (352, 176), (176, 352), (128, 512), (512, 128))
VAE_FILE = WEIGHTS["vae"]
# Partly whitened colour statistics of 6,000 scenes, seen along the four axes of a tetrahedron: rows of
# equal weight, |latent| <= 2.5 on scenes and <= 3.2 on any colour, before the decoder's tanh(x / 3) * 3.
LATENT_MATRIX: tuple[tuple[float, float, float], ...] = (
    (-1.741, 3.031, 1.405),
    (3.931, -1.703, -0.753),
    (-1.501, 1.719, -2.726),
    (-0.403, -3.386, 2.176),
)
LATENT_BIAS: tuple[float, float, float, float] = (-1.243, -0.761, 1.155, 0.825)


def latents_from_rgb(mean_rgb: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Map block means (..., 3) in [0, 1] to model latents (..., 4), channels last, numpy or torch."""
    if isinstance(mean_rgb, Tensor):
        matrix, bias = mean_rgb.new_tensor(LATENT_MATRIX), mean_rgb.new_tensor(LATENT_BIAS)
    else:
        matrix, bias = np.asarray(LATENT_MATRIX, mean_rgb.dtype), np.asarray(LATENT_BIAS, mean_rgb.dtype)
    return mean_rgb @ matrix.T + bias


class Clamp(nn.Module):
    """Soft limit of latents to (-3, 3)."""

    def forward(self, latents: Tensor) -> Tensor:
        """Squash any shape elementwise."""
        return torch.tanh(latents / 3) * 3


class Block(nn.Module):
    """Three 3x3 convolutions added to their input, at one width."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        convolutions = [Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        self.fuse = nn.ReLU()

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return self.fuse(self.conv(hidden) + hidden)


def _make_encoder() -> nn.Sequential:
    layers: list[nn.Module] = [Conv2d(3, WIDTH, 3, padding=1), Block()]
    for _ in range(3):
        layers += [Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2, bias=False), Block(), Block(), Block()]
    return nn.Sequential(*layers, Conv2d(WIDTH, 4, 3, padding=1))


def _make_decoder() -> nn.Sequential:
    layers: list[nn.Module] = [Clamp(), Conv2d(4, WIDTH, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [Block(), Block(), Block(), nn.Upsample(scale_factor=2)]
        layers += [Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(), Conv2d(WIDTH, 3, 3, padding=1))


@torch.no_grad()
def build_encoder() -> nn.Sequential:
    """The exact encoder: pictures (B, 3, H, W) in [0, 1] to model latents (B, 4, H/8, W/8)."""
    encoder = _make_encoder()
    for parameter in encoder.parameters():
        parameter.zero_()  # blocks become identities, since what passes through them is never negative
    for channel in range(3):
        encoder[0].weight[channel, channel, 1, 1] = 1
        for layer in encoder:
            if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
                layer.weight[channel, channel, 1:, 1:] = 0.25  # the mean of a 2x2 block
    encoder[-1].weight[:, :3, 1, 1] = torch.tensor(LATENT_MATRIX)
    encoder[-1].bias.copy_(torch.tensor(LATENT_BIAS))
    return encoder


def build_decoder(seed: int = 0) -> nn.Sequential:
    """An untrained decoder: model latents (B, 4, h, w) to pictures (B, 3, 8h, 8w) in [0, 1]."""
    torch.manual_seed(seed)
    decoder = _make_decoder()
    for layer in decoder:
        if isinstance(layer, Block):
            nn.init.zeros_(layer.conv[-1].weight)  # blocks begin as identities, which trains fast
            nn.init.zeros_(layer.conv[-1].bias)
    nn.init.constant_(decoder[-1].bias, 0.5)
    return decoder


def save_autoencoder(decoder: nn.Sequential, path: Path) -> None:
    """Write encoder and decoder as safetensors in the layout of the host's VAELoader.

    fp16; of the encoder fp8 where that is the same numbers: all but its last layer are 0, 1/4 and 1. Half its bytes.
    """
    tensors = {f"taesd_encoder.{key}": _smallest(value) for key, value in build_encoder().state_dict().items()}
    tensors |= {f"taesd_decoder.{key}": value.half() for key, value in decoder.state_dict().items()}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    tensors |= {"vae_scale": torch.tensor(VAE_SCALE), "vae_shift": torch.tensor(0.0)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def _smallest(tensor: Tensor) -> Tensor:
    """As fp8 if nothing is lost by it, else as fp16."""
    rounded = tensor.to(torch.float8_e4m3fn)
    return rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor.half()


def load_decoder(path: Path = VAE_FILE) -> nn.Sequential:
    """The trained decoder of a file written by save_autoencoder, in fp32 and eval mode."""
    tensors, prefix = load_file(path), "taesd_decoder."
    decoder = _make_decoder()
    decoder.load_state_dict({k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)})
    return decoder.eval()


def sample_crops(rng: np.random.Generator, count: int, size: int) -> Tensor:
    """Random crops (count, 3, size, size) in [0, 1]: mostly edges of scenes, some noise and gradients."""
    crops = np.empty((count, size, size, 3), np.float32)
    for crop in crops:
        crop[:] = _texture(rng, size) if rng.random() < 0.12 else _scene_crop(rng, size)
    return torch.from_numpy(crops).permute(0, 3, 1, 2)


def _scene_crop(rng: np.random.Generator, size: int) -> np.ndarray:
    width, height = TRAIN_SIZES[int(rng.integers(len(TRAIN_SIZES)))]
    scene = sample_scene(rng)
    obj = scene.objects[int(rng.integers(len(scene.objects)))]
    angle, reach = rng.uniform(0, 2 * np.pi), obj.radius * min(width, height)
    x = obj.center_x * width + np.cos(angle) * reach - rng.uniform(0, size)
    y = obj.center_y * height + np.sin(angle) * reach - rng.uniform(0, size)
    left = int(np.clip(x, 0, width - size)) // 8 * 8
    top = int(np.clip(y, 0, height - size)) // 8 * 8
    return render(scene, width, height)[top : top + size, left : left + size]


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Coloured patches or a smooth gradient, so that pictures other than scenes decode sensibly."""
    cells = int(rng.integers(1, 7))
    coarse = torch.from_numpy(rng.random((1, 3, cells, cells), np.float32))
    if rng.random() < 0.5:
        fine = F.interpolate(coarse, size=(size, size), mode="nearest")
    else:
        fine = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return fine[0].permute(1, 2, 0).numpy()


def encode(pictures: Tensor) -> Tensor:
    """What the encoder computes, by pooling: (B, 3, H, W) in [0, 1] to (B, 4, H/8, W/8)."""
    means = F.avg_pool2d(pictures, 8).permute(0, 2, 3, 1)
    return latents_from_rgb(means).permute(0, 3, 1, 2)


def reconstruction_loss(decoded: Tensor, pictures: Tensor, weights: Tensor | None = None) -> Tensor:
    """L1 on colours plus half of L1 on the differences of neighbours, which keeps edges crisp.

    weights: (B, 1, H, W) of pixels; without, all count alike. Two neighbours weigh as the lesser of them.
    """
    error = decoded - pictures
    shares = torch.ones_like(error[:, :1]) if weights is None else weights / weights.mean()
    across = (error.diff(dim=-1).abs() * torch.minimum(shares[..., 1:], shares[..., :-1])).mean()
    down = (error.diff(dim=-2).abs() * torch.minimum(shares[..., 1:, :], shares[..., :-1, :])).mean()
    return (error.abs() * shares).mean() + 0.5 * (across + down)


def train(steps: int, out: Path, state: Path, seed: int = 0, batch: int = 8, learning_rate: float = 2e-3) -> None:
    """Train the decoder for `steps` in all, resuming from `state` if it exists, and write `out`."""
    decoder = build_decoder(seed).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    first, curve = 0, []
    if state.exists():
        saved = torch.load(state, weights_only=True)
        decoder.load_state_dict(saved["decoder"])
        optimizer.load_state_dict(saved["optimizer"])
        first, curve = saved["step"], saved["curve"]
    rng = np.random.default_rng((seed, first))
    recent: list[float] = []
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 100, 0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
        size = (64, 64, 96)[step % 3]
        loss = _train_step(decoder, optimizer, rng, max(1, batch * 64 * 64 // size**2), size)
        recent.append(loss)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            curve.append([step + 1, round(float(np.mean(recent)), 5)])
            bar.set_postfix(loss=curve[-1][1])
            recent = []
            save_state(state, {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "curve": curve})
            save_autoencoder(decoder, out)
    curve_file = RESULTS / "autoencoder-curve.json"
    curve_file.parent.mkdir(parents=True, exist_ok=True)
    curve_file.write_text(json.dumps({"seed": seed, "batch": batch, "steps_and_loss": curve}))


def _train_step(
    decoder: nn.Module, optimizer: torch.optim.Optimizer, rng: np.random.Generator, count: int, size: int
) -> float:
    pictures = sample_crops(rng, count, size)
    latents = encode(pictures)
    sigma = torch.from_numpy(rng.uniform(0, 0.1, (count, 1, 1, 1)).astype(np.float32))
    latents = latents + sigma * torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
    with autocast("cpu", torch.bfloat16):
        decoded = decoder(latents.to(memory_format=torch.channels_last))
    return descend(decoder, optimizer, reconstruction_loss(decoded.float(), pictures))


def descend(decoder: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One step of the decoder down a loss; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def save_state(path: Path, content: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(content, part)
    part.replace(path)


@torch.no_grad()
def measure_psnr(decoder: nn.Module, count: int = 40, seed: int = 1) -> float:
    """Mean PSNR in dB of held-out scenes at 256x256, encoded and decoded."""
    rng, values = np.random.default_rng(seed), []
    for _ in range(count):
        picture = torch.from_numpy(render(sample_scene(rng, "heldout"), 256, 256)).permute(2, 0, 1)[None]
        error = (decoder(encode(picture)).clamp(0, 1) - picture).pow(2).mean()
        values.append(-10 * float(torch.log10(error + 1e-10)))
    return float(np.mean(values))


def main(arguments: list[str] | None = None) -> None:
    """Command line: train the decoder, or repack the file, then measure it."""
    parser = argparse.ArgumentParser(prog="python -m demo.training.autoencoder", description=main.__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=VAE_FILE)
    parser.add_argument("--state", type=Path, default=Path("runs/demo-vae.pt"), help="checkpoint to resume from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repack", action="store_true", help="write --out anew with the decoder it holds, without training")
    chosen = parser.parse_args(arguments)
    started = time.monotonic()
    if chosen.repack:
        save_autoencoder(load_decoder(chosen.out), chosen.out)
    else:
        train(chosen.steps, chosen.out, chosen.state, chosen.seed)
    psnr, seconds = measure_psnr(load_decoder(chosen.out)), time.monotonic() - started
    size = chosen.out.stat().st_size / 1e6
    tqdm.write(f"{chosen.out}: {size:.2f} MB, {psnr:.2f} dB on held-out scenes after {seconds:.0f} s")


if __name__ == "__main__":
    main()
