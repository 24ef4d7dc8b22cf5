"""From noise to a latent: schedulers of diffusers, guidance in one forward a step."""
from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .attention import caption_lengths, one_token_of
from .errors import InputError, UnsupportedError
from .guidance import PerturbedGuidance
from .kv_compress import KVCompression, check_together, listed
from .model import PixArtTransformer
from .text.encoder import TextEmbeddings
from .timesteps import LAST_TIMESTEP

Callback = Callable[[int, int, Tensor], Any]
Preview = Callable[[int, Tensor], Any]
Source = torch.Generator | list[torch.Generator | None] | None  # of noise: one for a batch, or one a picture; None is torch's own
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # of training (PixArt's diffusion/iddpm.py)


def make_scheduler() -> Any:
    """diffusers' DPM-Solver++ 2M with PixArt's linear betas, as the released pipelines configure it."""
    return from_diffusers("DPMSolverMultistepScheduler")


def from_diffusers(name: str, **settings: Any) -> Any:
    """One of diffusers' schedulers on PixArt's betas; raises UnsupportedError where diffusers is missing."""
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedError(f"Sampling needs the diffusers library ({error}): `pip install diffusers`.") from None
    return getattr(diffusers, name)(**BETAS, **settings)


def check_scheduler(scheduler: Any) -> None:
    """Raises InputError for one of diffusers' schedulers that would draw another picture in silence."""
    kind = scheduler.config.get("prediction_type")
    if kind != "epsilon":
        raise InputError(f"The scheduler's prediction_type is {kind!r}; PixArt predicts noise and needs 'epsilon'.")
    found = {name: scheduler.config.get(name, value) for name, value in BETAS.items()}
    if found != BETAS or scheduler.config.get("trained_betas") is not None:
        shown, wanted = (", ".join(f"{name}={value!r}" for name, value in values.items()) for values in (found, BETAS))
        other = "trained_betas" if found == BETAS else shown
        name = type(scheduler).__name__
        raise InputError(
            f"The scheduler has {other}; PixArt was trained with others: {name}.from_config(its config, {wanted}, trained_betas=None)."
        )


def sources_of(seed: int | Sequence[int] | None, pictures: int) -> Source:
    """Where all noise of a run comes from: one seed for the batch, or one a picture. Raises InputError.

    On the CPU, so that a seed means the same picture on every device.
    """
    if seed is None or not isinstance(seed, Sequence):
        return _generator(seed)
    if len(seed) != pictures:
        raise InputError(f"{len(seed)} seeds for {pictures} pictures; expected one seed, or one for each.")
    return [_generator(one) for one in seed]


def initial_noise(shape: tuple[int, int, int, int], source: Source = None) -> Tensor:
    """Unit noise (B, C, h, w), fp32, on the CPU."""
    if isinstance(source, list):
        return torch.cat([torch.randn((1, *shape[1:]), generator=one) for one in source])
    return torch.randn(shape, generator=source)


def clean_estimate(noised: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """The latents x0 (B, C, h, w) that are left of noised ones without `noise`: equation 4 of DDPM (arXiv:2006.11239), solved for x0.

    noised: with variance 1 in all, as the model sees them.
    """
    kept = _kept_signal()[timestep]
    return (noised - (1 - kept) ** 0.5 * noise) / kept**0.5


@cache
def _kept_signal() -> list[float]:
    """alpha bar of every timestep: the picture's share of the variance."""
    betas = torch.linspace(BETAS["beta_start"], BETAS["beta_end"], LAST_TIMESTEP + 1, dtype=torch.float64)
    return torch.cumprod(1 - betas, 0).tolist()


def denoise(
    transformer: PixArtTransformer,
    noise: Tensor,
    context: TextEmbeddings,
    scheduler: Any,
    *,
    steps: int,
    guidance: float | None = None,
    size: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    kv_compression: KVCompression | Sequence[KVCompression] | None = (),
    perturbed: PerturbedGuidance | None = None,
    source: Source = None,
    preview: Preview | None = None,
    timesteps: Sequence[int] | None = None,
) -> Tensor:
    """Latents (B, C, h, w), fp32, from unit noise of that shape.

    context: B prompts; with guidance 2B, the negative ones first. size: (1, 2), height and width in
    pixels, for micro-conditioned models. callback(step, timestep, latents): False ends sampling.
    kv_compression: approximations, each in its part of sampling. perturbed: one more forward a step, of the prompts.
    source: of the noise that some schedulers add in every step. preview(step, latents): what the picture would be by now.
    timesteps: falling, `steps` of them, instead of the scheduler's own.
    Raises UnsupportedError if the numbers overflow.
    """
    from tqdm.auto import tqdm

    kv_compression = listed(kv_compression)
    check_together(kv_compression, transformer.config)
    weakening = {} if perturbed is None else perturbed.wrappers(transformer.config.depth)
    _set_timesteps(scheduler, steps, timesteps, noise.device)
    moments = scheduler.timesteps.tolist()
    own_noise = noise_of_steps(scheduler, source)
    latents = noise * scheduler.init_noise_sigma
    rows = context.states.shape[0]
    dtype = context.states.dtype
    # What no step changes: a mask that hides nothing would cost faster attention kernels.
    lengths, longest = caption_lengths(context.mask), context.mask.shape[1]
    mask = None if all(length == longest for length in lengths) else context.mask
    one_token = one_token_of(lengths, longest)
    positions = transformer.positions_of(noise)
    size = None if size is None else size.expand(rows, 2)
    for index, timestep in enumerate(tqdm(scheduler.timesteps, disable=not progress)):
        noised = scheduler.scale_model_input(latents, timestep)
        inputs = noised if guidance is None else torch.cat([noised, noised])
        active = [one for one in kv_compression if one.active_at(moments[index])]
        given = (inputs.to(dtype), timestep.expand(rows), context.states, mask, size)
        predicted = _noise_of(transformer(*given, kv_compression=active, positions=positions, one_token=one_token), latents)
        positive = predicted[-len(latents) :]
        if guidance is not None:
            negative = predicted[: len(latents)]
            predicted = negative + guidance * (positive - negative)
        if perturbed is not None and perturbed.active_at(moments[index]):
            prompts = [None if part is None else part[-len(latents) :] for part in given]
            weakened = transformer(*prompts, kv_compression=active, block_wrappers=weakening, positions=positions)
            predicted = predicted + perturbed.scale * (positive - _noise_of(weakened, latents))
        if preview is not None:
            preview(index, clean_estimate(noised, predicted, int(moments[index])))
        latents = scheduler.step(predicted, timestep, latents, **own_noise, return_dict=False)[0]
        if callback is not None and callback(index, int(timestep), latents) is False:
            break
    if not torch.isfinite(latents).all():
        raise UnsupportedError(f"Sampling in {dtype} gave NaN or infinite values; use bfloat16 or float32.")
    return latents


def noise_of_steps(scheduler: Any, source: Source) -> dict[str, Source]:
    """What a scheduler's step takes beside the latents: where the noise comes from, if it adds any."""
    return {"generator": source} if "generator" in inspect.signature(scheduler.step).parameters else {}


def _set_timesteps(scheduler: Any, steps: int, timesteps: Sequence[int] | None, device: torch.device) -> None:
    """Raises InputError for chosen timesteps that the scheduler can't take."""
    if timesteps is None:
        scheduler.set_timesteps(steps, device=device)
    elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(timesteps), device=device)
    else:
        raise InputError(f"{type(scheduler).__name__} takes no timesteps of another schedule; use the usual one, or the sampler dpm++.")


def _noise_of(output: Tensor, latents: Tensor) -> Tensor:
    """The first channels, in fp32; the others are the learned variance."""
    return output[:, : latents.shape[1]].float()


def _generator(seed: int | None) -> torch.Generator | None:
    if seed is None:
        return None
    try:
        return torch.Generator().manual_seed(operator.index(seed))
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"seed is {seed!r}; expected a whole number, 0 to {2**64 - 1}.") from None
