"""From noise to a latent: DPM-Solver++ of diffusers, guidance in one forward a step."""
from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import caption_lengths, one_token_of
from .errors import InputError, UnsupportedError
from .guidance import PerturbedGuidance
from .kv_compress import KVCompression, check_together, listed
from .model import PixArtTransformer
from .one_step import OneStepScheduler
from .sampling_note import SamplingNote
from .text.encoder import TextEmbeddings

Callback = Callable[[int, int, Tensor], Any]
Generators = torch.Generator | list[torch.Generator] | None
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # of training (PixArt's diffusion/iddpm.py)


def make_scheduler(note: SamplingNote | None = None) -> Any:
    """diffusers' DPM-Solver++ 2M with PixArt's linear betas, as the released pipelines configure it; or what a distilled model needs."""
    if note is not None and note.method == "dmd":
        return OneStepScheduler(note.timestep, BETAS)
    try:
        from diffusers import DPMSolverMultistepScheduler, LCMScheduler
    except ImportError as error:
        raise UnsupportedError(f"Sampling needs the diffusers library ({error}): `pip install diffusers`.") from None
    return DPMSolverMultistepScheduler(**BETAS) if note is None else LCMScheduler(**BETAS)


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


def initial_noise(shape: tuple[int, int, int, int], seed: int | Sequence[int] | None = None) -> Tensor:
    """Unit noise (B, C, h, w), fp32, from one seed for the batch or one a picture.

    Drawn on the CPU, so that a seed means the same picture on every device. Raises InputError.
    """
    return draw_noise(shape, make_generators(shape[0], seed))


def make_generators(count: int, seed: int | Sequence[int] | None) -> Generators:
    """Of all of a picture's noise: one for the batch, or one a picture; None without a seed. Raises InputError."""
    if seed is None or not isinstance(seed, Sequence):
        return _generator(seed)
    if len(seed) != count:
        raise InputError(f"{len(seed)} seeds for {count} pictures; expected one seed, or one for each.")
    return [_generator(one) for one in seed]


def draw_noise(shape: tuple[int, int, int, int], generators: Generators) -> Tensor:
    """Unit noise (B, C, h, w), fp32, on the CPU; the next call draws other noise."""
    if isinstance(generators, list):
        return torch.cat([torch.randn((1, *shape[1:]), generator=each) for each in generators])
    return torch.randn(shape, generator=generators)


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
    generators: Generators = None,
) -> Tensor:
    """Latents (B, C, h, w), fp32, from unit noise of that shape.

    context: B prompts; with guidance 2B, the negative ones first. size: (1, 2), height and width in
    pixels, for micro-conditioned models. callback(step, timestep, latents): False ends sampling.
    kv_compression: approximations, each in its part of sampling. perturbed: one more forward a step, of the prompts.
    generators: of `make_generators`, for schedulers that add noise in every step, such as LCM's.
    Raises UnsupportedError if the numbers overflow.
    """
    from tqdm.auto import tqdm

    kv_compression = listed(kv_compression)
    check_together(kv_compression, transformer.config)
    weakening = {} if perturbed is None else perturbed.wrappers(transformer.config.depth)
    scheduler.set_timesteps(steps, device=noise.device)
    moments = scheduler.timesteps.tolist()
    latents = noise * scheduler.init_noise_sigma
    rows = context.states.shape[0]
    dtype = context.states.dtype
    # What no step changes: a mask that hides nothing would cost faster attention kernels.
    lengths, longest = caption_lengths(context.mask), context.mask.shape[1]
    mask = None if all(length == longest for length in lengths) else context.mask
    one_token = one_token_of(lengths, longest)
    positions = transformer.positions_of(noise)
    size = None if size is None else size.expand(rows, 2)
    advance = stepping(scheduler, generators)
    for index, timestep in enumerate(tqdm(scheduler.timesteps, disable=not progress)):
        inputs = scheduler.scale_model_input(latents, timestep)
        inputs = inputs if guidance is None else torch.cat([inputs, inputs])
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
        latents = advance(predicted, timestep, latents)
        if callback is not None and callback(index, int(timestep), latents) is False:
            break
    if not torch.isfinite(latents).all():
        raise UnsupportedError(f"Sampling in {dtype} gave NaN or infinite values; use bfloat16 or float32.")
    return latents


def stepping(scheduler: Any, generators: Generators) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """step(predicted noise, timestep, latents) -> the next latents; what the scheduler draws by chance is of `generators`."""
    drawing = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    return lambda predicted, timestep, latents: scheduler.step(predicted, timestep, latents, return_dict=False, **drawing)[0]


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
