"""Training-free KV compression as a patch of the host's MODEL."""
from __future__ import annotations

from typing import Any

import comfy.model_base
from comfy.patcher_extension import WrappersMP

from ...pixart.errors import InputError
from ...pixart.kv_compress import KVCompression, check_together
from ...pixart.logs import get_logger
from ...pixart.timesteps import LAST_TIMESTEP
from .supported import PixArtModel
from .transformer import KV_COMPRESSION

log = get_logger(__name__)
NODE = "PixArtKVCompress"
SIGMAS = 3  # place of sigmas among those of outer_sample


class CompressWhileActive:
    """Wrapper of `apply_model`: names the compressions to the network in the steps in which they hold.

    The step is looked at here, outside of what torch.compile traces, once for all of them and only if it matters:
    reading sigma waits for the GPU.
    """

    def __init__(self, compressions: tuple[KVCompression, ...]) -> None:
        self.compressions = compressions

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """args: x, sigma, and more; what the host doesn't know by name it hands to the network."""
        active = self._active(executor.class_obj.model_sampling, args[1])
        return executor(*args, **kwargs, **({KV_COMPRESSION: active} if active else {}))

    def _active(self, sampling: Any, sigma: Any) -> tuple[KVCompression, ...]:
        if all(one.always for one in self.compressions):
            return self.compressions
        timestep = float(sampling.timestep(sigma[:1]))
        return tuple(one for one in self.compressions if one.active_at(timestep))


class WarnOfIdleness:
    """Wrapper of `outer_sample`: says when no step of a run lies in the parts of the noise schedule that are compressed."""

    def __init__(self, compressions: tuple[KVCompression, ...]) -> None:
        self.compressions = compressions

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """args: noise, latent_image, sampler, sigmas, and more."""
        if any(one.always for one in self.compressions):
            return executor(*args, **kwargs)
        sampling = executor.class_obj.model_patcher.get_model_object("model_sampling")
        timesteps = [float(timestep) for timestep in sampling.timestep(args[SIGMAS][:-1]).tolist()]  # a GPU is waited for once
        if timesteps and not any(one.active_at(timestep) for one in self.compressions for timestep in timesteps):
            log.warning("%s: nothing is compressed %s", NODE, self._reason(timesteps))
        return executor(*args, **kwargs)

    def _reason(self, timesteps: list[float]) -> str:
        parts = " and ".join(f"from start_percent {one.start_percent:g} to end_percent {one.end_percent:g}" for one in self.compressions)
        first, last = (1 - timestep / LAST_TIMESTEP for timestep in (timesteps[0], timesteps[-1]))
        if all(one.end_percent <= first for one in self.compressions):
            advice = "A second pass begins late: set end_percent to 1 for it."
        elif all(one.start_percent > last for one in self.compressions):
            advice = "It ends early: set start_percent to 0 for it."
        else:
            advice = "Choose a range that contains one of its steps."
        return f"{parts}: this run's steps lie from {first:.2f} to {last:.2f} of the noise schedule. {advice}"


def compress_model(model: Any, compression: KVCompression) -> Any:
    """A clone of a ModelPatcher with the compression added; raises InputError for models and blocks that can't have it."""
    if not isinstance(model.model, PixArtModel):
        raise InputError(f"{NODE}: {_stranger(model.model)}")
    present = [one for wrapper in model.get_wrappers(WrappersMP.APPLY_MODEL, NODE) for one in wrapper.compressions]
    try:
        check_together([*present, compression], model.get_model_object("diffusion_model").config)
    except InputError as error:
        raise InputError(f"{NODE}: {error}") from error
    patched = model.clone()
    together = (*present, compression)
    for kind, wrapper in ((WrappersMP.APPLY_MODEL, CompressWhileActive(together)), (WrappersMP.OUTER_SAMPLE, WarnOfIdleness(together))):
        patched.remove_wrappers_with_key(kind, NODE)
        patched.add_wrapper_with_key(kind, NODE, wrapper)
    return patched


def _stranger(model: Any) -> str:
    if isinstance(model, comfy.model_base.PixArt):
        return (
            "this PixArt was loaded by ComfyUI's own loader, whose attention can't be patched; "
            "expected a MODEL of PixArtModelLoader. Load the same file with that node."
        )
    return f"this model is a {type(model).__name__}; expected a PixArt, from PixArtModelLoader. Remove the node for other models."
