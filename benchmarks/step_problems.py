"""What `benchmarks steps` solves: the demo's held-out prompts, and mixtures of Gaussians whose exact denoiser needs no weights.

Both go through the host's own samplers, as a MODEL.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from demo import WEIGHTS
from demo.data.reader import check
from demo.evaluation.prompts import KINDS, Question, Run, make_questions
from pixart import Pipeline
from pixart.sampling import initial_noise, sources_of
from tests.support import host

CFG = 4.5
BATCH = 16
VISIBLE, VISIBLE_SHARE = 0.2, 0.01  # a picture changed visibly if this share of its pixels changed by over a fifth of the range


@dataclass(frozen=True)
class Way:
    """How to sample. sigmas: (steps + 1,), falling to 0; patch: makes a MODEL that samples otherwise, such as a cache."""

    sampler: Any
    sigmas: Tensor
    patch: Callable[[Any, Any], Any] | None = None


class Problem(Protocol):
    """Latents (or pictures) that many steps converge to."""

    name: str
    model: Any  # the host's MODEL

    def solve(self, way: Way) -> tuple[Tensor, float]:
        """Results (N, ...) in fp32, and forward passes of one prediction with guidance for each of them."""

    def figures(self, found: Tensor, converged: Tensor) -> dict[str, float]:
        """What is told of results beside the converged ones; "db" is the median of the pictures' ratios of signal to error."""


def load_demo(weights: Path, dtype: str) -> Any:
    """The demo's transformer as MODEL."""
    host.load_pack()
    return host.pack_module("nodes.host.loader").load_model(str(weights), "demo", dtype)


def run_host(model: Any, way: Way, noise: Tensor, positive: list, negative: list) -> Tensor:
    """Latents in the model's space, by the host's sampling; noise: (B, C, h, w), unit variance."""
    sampling = importlib.import_module("comfy.sample")
    patched = model if way.patch is None else way.patch(model, way.sigmas)
    with torch.inference_mode():
        found = sampling.sample_custom(
            patched, noise, CFG, way.sampler, way.sigmas, positive, negative, torch.zeros_like(noise), disable_pbar=True, seed=0
        )
        return model.model.process_latent_in(found).float().clone()


class DemoPictures:
    """`count` held-out prompts of each kind at 256 px, from one noise each; in fp32 by default, as rounding adds to distances."""

    name = "demo"

    def __init__(self, count: int, seed: int = 0, weights: Path = WEIGHTS["diffusion_models"], dtype: str = "fp32") -> None:
        self.model = load_demo(weights, dtype)
        self.pipe = Pipeline.from_files(WEIGHTS["diffusion_models"], WEIGHTS["text_encoders"], WEIGHTS["vae"], variant="demo")
        run = Run("steps", count)
        self.questions: list[Question] = [each for kind in KINDS for each in make_questions(run, kind, seed)]
        self.seeds = [seed * 100_000 + number for number in range(len(self.questions))]

    def solve(self, way: Way) -> tuple[Tensor, float]:
        """Pictures (N, 3, H, W) in 0..1."""
        latents, passes = self._latents(way)
        decoded = [self.pipe.vae.decode(part).clamp(0, 1).float() for part in latents.split(BATCH)]
        return torch.cat(decoded), passes / len(self.questions)

    def latents_of(self, way: Way) -> Tensor:
        """Latents (N, 4, H / 8, W / 8) in the model's space."""
        return self._latents(way)[0]

    def _latents(self, way: Way) -> tuple[Tensor, float]:
        passes, latents = 0.0, []
        for start in range(0, len(self.questions), BATCH):
            rows = self.questions[start : start + BATCH]
            encoded = self.pipe.encode([row.caption.text for row in rows])
            empty = self.pipe.encode([""])
            positive = [[encoded.states, {"attention_mask": encoded.mask}]]
            noise = initial_noise((len(rows), 4, 32, 32), sources_of(self.seeds[start : start + len(rows)], len(rows)))
            with Counter(self.model) as counter:
                latents.append(run_host(self.model, way, noise, positive, [[empty.states, {}]]))
            passes += counter.rows / 2
        return torch.cat(latents), passes

    def figures(self, found: Tensor, converged: Tensor) -> dict[str, float]:
        """PSNR, LPIPS where its weights are at hand, the share changed visibly, and what the reader says."""
        error = (found - converged).square().flatten(1).mean(1).clamp_min(1e-12)
        changed = ((found - converged).abs().amax(1) > VISIBLE).float().flatten(1).mean(1) > VISIBLE_SHARE
        pictures = (found.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        verdicts = [check(q.scene, picture, q.caption.stated).correct for q, picture in zip(self.questions, pictures, strict=True)]
        return {
            "db": float((-10 * error.log10()).median()), "changed": float(changed.float().mean()), "right": float(np.mean(verdicts)),
            **lpips(found, converged),
        }  # fmt: skip


class Counter:
    """Rows that a MODEL's network computed, inside a `with`; the host's EasyCache calls the network, and leaves out its blocks."""

    def __init__(self, model: Any) -> None:
        self.computed, self.rows = model.model.diffusion_model.blocks[0].attn, 0

    def __enter__(self) -> Counter:
        self.hook = self.computed.register_forward_pre_hook(self._count)
        return self

    def _count(self, _: Any, inputs: Sequence[Any]) -> None:
        self.rows += len(inputs[0])

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def lpips(found: Tensor, converged: Tensor) -> dict[str, float]:
    """LPIPS by torchmetrics (Zhang and others, 2018), if AlexNet's weights lie in torch's hub folder; nothing is downloaded."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(folder.glob("alexnet-*.pth")):
        return {}
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance

    parts = zip(found.split(BATCH), converged.split(BATCH), strict=True)
    total = sum(float(distance(one, other, "alex", reduction="sum", normalize=True)) for one, other in parts)
    return {"lpips": total / len(found)}


class Mixture:
    """Gaussians in latents (4, side, side) under PixArt's noise, with a spectrum that falls as pictures' do.

    The prompt chooses an eighth of the components. In the basis of the spectrum the covariance of each is diagonal, so that the
    denoiser is exact: the mean of the components' Wiener filters, weighed by how probable each is at this noise.
    """

    def __init__(self, model: Any, side: int, components: int, falling: float, within: float, *, count: int = 16, seed: int = 0) -> None:
        self.name = f"mixture of {components} in {4 * side * side} dimensions"
        self.model, self.side = model, side
        generator = torch.Generator().manual_seed(seed)
        axis = torch.arange(side, dtype=torch.float64)
        spectrum = (1 + axis[:, None].square() + axis[None].square()).pow(-falling / 2).expand(4, -1, -1).flatten()
        spectrum = spectrum / spectrum.mean()  # latents of unit variance, as PixArt's are about
        self.means = torch.randn(components, len(spectrum), generator=generator, dtype=torch.float64) * (spectrum * (1 - within)).sqrt()
        self.variance = spectrum * within
        self.asked = max(1, components // 8)
        self.noise = torch.randn(count, 4, side, side, generator=generator)

    def denoised(self, x: Tensor, sigma: float, asked: bool) -> Tensor:
        """(B, D) expectation of the clean latent; asked: of the prompt's components alone."""
        means = self.means[: self.asked] if asked else self.means
        spread = self.variance + sigma**2
        scaled, centres = x / spread.sqrt(), means / spread.sqrt()
        weights = (-0.5 * torch.cdist(scaled, centres).square()).softmax(-1)
        mean = weights @ means
        return mean + (x - mean) * self.variance / spread

    def solve(self, way: Way) -> tuple[Tensor, float]:
        """Latents (N, D)."""
        rows = 0

        def exact(_: Any, given: dict[str, Any]) -> Tensor:
            nonlocal rows
            rows += len(given["input"])
            parts = zip(given["input"].chunk(len(given["cond_or_uncond"])), given["cond_or_uncond"], strict=True)
            sigma = float(given["timestep"][0])
            return torch.cat([self.denoised(x.flatten(1).double(), sigma, kind == 0).view_as(x).to(x) for x, kind in parts])

        channels = self.model.model.diffusion_model.config.caption_channels
        text = [[torch.zeros(1, 1, channels), {}]]
        model = self.model.clone()
        model.set_model_unet_function_wrapper(exact)
        found = run_host(model, way, self.noise, text, text)
        return found.flatten(1), rows / 2 / len(self.noise)

    def figures(self, found: Tensor, converged: Tensor) -> dict[str, float]:
        """The same ratio; the signal is the latents' own variance."""
        error = (found - converged).square().mean(1).clamp_min(1e-12)
        return {"db": float((10 * (converged.var(1) / error).log10()).median())}


def mixtures(model: Any) -> list[Mixture]:
    """Several dimensions, spectra and numbers of components."""
    return [Mixture(model, 8, 64, 2.0, 0.1), Mixture(model, 16, 64, 2.0, 0.05, seed=1), Mixture(model, 32, 256, 2.0, 0.03, seed=2)]
