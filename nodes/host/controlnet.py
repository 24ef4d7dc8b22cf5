"""A PixArt ControlNet as the host's CONTROL_NET: residuals for the model's blocks, computed beside its forward."""
from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.latent_formats
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
from torch import Tensor

from ...pixart.bins import resize_and_crop
from ...pixart.checkpoints.controlnet import prepare_controlnet
from ...pixart.checkpoints.read import read_tensors
from ...pixart.controlnet import PixArtControlNet
from ...pixart.errors import InputError
from ...pixart.logs import get_logger
from ...pixart.model import PIXELS_PER_LATENT
from .attention import host_attention
from .dtypes import computing_dtype, control_dtype
from .linear import host_linear
from .transformer import IDENTITY_BLOCKS, SKIPPED_BLOCKS, HostTransformer

log = get_logger(__name__)
CROPPED_RATIO = 1.05  # from here on cutting a hint to the picture's shape is worth a warning


def load_control(path: str) -> PixArtControl:
    """A CONTROL_NET from a file or diffusers folder; raises CheckpointError for anything but a whole PixArt ControlNet."""
    raw = read_tensors(Path(path))
    prepared = prepare_controlnet(raw.state_dict, raw.source)
    log.info("PixArt ControlNet: %s", prepared.describe())
    # manual_cast: weights kept in another dtype than the model computes in are cast to it at use.
    model = PixArtControlNet(prepared.config, operations=comfy.ops.manual_cast, attention=host_attention, linear=host_linear, device="meta")
    model.load_state_dict(_stored(prepared.state_dict), strict=True, assign=True)
    model.requires_grad_(False).eval()
    return PixArtControl(model, management.get_torch_device(), raw.source)


def _stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the dtype that the host keeps ControlNets in; no longer mapped to the file, so that it can be replaced.

    Of a file in fp8, what was left in 16 bits stays so.
    """
    supported = list(comfy.supported_models.PixArtSigma.supported_inference_dtypes)
    stored = comfy.utils.weight_dtype(tensors)
    dtype = control_dtype(management.unet_dtype(model_params=-1, supported_dtypes=supported, weight_dtype=stored), stored)
    whole = dtype if dtype.itemsize > 1 or dtype != stored else None
    return {key: tensor.to(whole or tensor.dtype, copy=True) for key, tensor in tensors.items()}


class PixArtControl(comfy.controlnet.ControlNet):
    """Applied by ControlNetApplyAdvanced: strength, range, chaining and batches are the host's.

    The ControlNet reads the model's own embeddings and first block, so it follows LoRA and any size.
    """

    def __init__(self, control_model: PixArtControlNet | None, load_device: Any, source: str) -> None:
        # Any latent format but None makes the host keep the VAE; the one used is the model's, see `_encode`.
        super().__init__(
            control_model, load_device=load_device, latent_format=comfy.latent_formats.LatentFormat(), extra_conds=[]
        )
        self.source = source
        # Of the running sampler. Weak, since the host keeps conditionings, and no `cleanup` follows a run that failed or was stopped.
        self._running: weakref.ref[Any] | None = None
        self._hints: dict[tuple[int, int], Tensor] = {}  # latent size -> encoded hint on the card, kept for one run

    def copy(self) -> PixArtControl:
        """For each node that applies it; weights are shared."""
        other = PixArtControl(None, self.load_device, self.source)
        other.control_model = self.control_model
        other.control_model_wrapped = self.control_model_wrapped
        self.copy_to(other)
        return other

    def deepclone_multigpu(self, load_device: Any, autoregister: bool = False) -> PixArtControl:
        """A copy with weights of its own for another device (hosts that sample on several)."""
        other = self.copy()
        other.control_model = copy.deepcopy(self.control_model)
        other.load_device = load_device
        other.control_model_wrapped = comfy.model_patcher.ModelPatcher(
            other.control_model, load_device=load_device, offload_device=management.unet_offload_device()
        )
        if autoregister:
            self.multigpu_clones[load_device] = other
        return other

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Checks that model and ControlNet belong together, before the first step."""
        self._forget()  # a run that failed or was stopped isn't cleaned up by the host
        super().pre_run(model, percent_to_timestep_function)
        self.model_sampling_current = None  # the host's strong reference; it is asked of the model
        network = _network_of(model)
        if not isinstance(network, HostTransformer):
            raise InputError(
                f"The ControlNet {self.source} is for PixArt models loaded by PixArtModelLoader, this one is a "
                f"{type(network).__name__}; load the model with PixArtModelLoader or choose its own ControlNet."
            )
        self.control_model.check_fits(network.config)
        self._running = weakref.ref(model)

    def cleanup(self) -> None:
        """Nothing of a run outlives it."""
        self._forget()
        super().cleanup()

    def _forget(self) -> None:
        self._running = None
        self._hints = {}

    @property
    def _model(self) -> Any:
        """The host's model in the running sampler."""
        return self._running()

    @property
    def _base(self) -> HostTransformer:
        """The transformer in it."""
        return _network_of(self._model)

    def residuals_held(self) -> int:
        """How many residuals, each as large as the model's hidden state, lie in memory at once: for the host's estimate."""
        before, most = self.previous_controlnet, self.control_model.config.depth
        if before is None:
            return most
        while before is not None:
            most = max(most, before.control_model.config.depth if isinstance(before, PixArtControl) else 0)
            before = before.previous_controlnet
        return 3 * most  # those before it, its own, and their sums

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int, transformer_options: dict[str, Any]
    ) -> dict[str, list[Tensor | None]] | None:
        """{"input": residuals} for the model's forward, joined with those of the ControlNets before this one."""
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        if not self._is_on(t):
            return previous
        residuals = self._residuals(x_noisy, t, cond, batched_number, transformer_options)
        return self.control_merge({"input": residuals}, previous, output_dtype=None)

    def _is_on(self, t: Tensor) -> bool:
        """Whether the noise level t (B,) lies in the chosen range; the card is asked, and waited for, only where there is one."""
        start, end = self.timestep_percent_range
        if start <= 0.0 and end >= 1.0 or self.timestep_range is None:
            return True
        highest, lowest = self.timestep_range
        return lowest <= float(t[0]) <= highest

    def _residuals(self, x_noisy, t, cond, batched_number, transformer_options) -> list[Tensor]:
        base, sampling = self._base, self._model.model_sampling
        dtype = computing_dtype(self._model)

        def placed(tensor: Tensor) -> Tensor:
            return tensor.to(device=x_noisy.device, dtype=dtype)

        positions = cond.get("positions")
        mask, size = (None if cond.get(name) is None else cond[name].to(x_noisy.device) for name in ("context_mask", "size"))
        inputs = base.first_block(
            placed(sampling.calculate_input(t, x_noisy)), sampling.timestep(t).float(), placed(cond["c_crossattn"]),
            mask, size, positions, cond.get(IDENTITY_BLOCKS, ()), cond.get(SKIPPED_BLOCKS, ()), transformer_options,
        )  # fmt: skip
        own_text = cond.get("crossattn_controlnet")  # from CLIPTextEncodeControlnet
        if own_text is not None:
            text = base.y_embedder(placed(self._checked_text(own_text)))
            inputs = replace(inputs, context=text, context_mask=None, one_token=None)
        hint = placed(self._hint(x_noisy, batched_number))
        return self.control_model(inputs, base.embed_latent(hint, base.fitting(positions, hint)))

    def _checked_text(self, states: Tensor) -> Tensor:
        expected = self._base.config.caption_channels
        if states.shape[-1] != expected:
            raise InputError(
                f"The text for the ControlNet is {states.shape[-1]} wide; expected T5 states of width {expected}. "
                "Encode it with the T5 of the model, or leave out the node that sets it."
            )
        return states

    def _hint(self, x_noisy: Tensor, batched_number: int) -> Tensor:
        """The hint's latent for this batch, (B, C, h, w), in the model's scale."""
        size = (x_noisy.shape[-2], x_noisy.shape[-1])
        if size not in self._hints:
            self._hints[size] = self._encode(*size).to(x_noisy.device)
        hint = comfy.controlnet.broadcast_image_to(self._hints[size], x_noisy.shape[0], batched_number)
        return hint.expand(x_noisy.shape[0], -1, -1, -1)

    def _encode(self, rows: int, columns: int) -> Tensor:
        """Scales and crops the picture to the latent's size, encodes it, and applies the model's latent scale."""
        if self.vae is None:
            raise InputError(
                "A PixArt ControlNet reads its hint as a latent: connect the model's VAE to `vae` of ControlNetApplyAdvanced."
            )
        height, width = rows * PIXELS_PER_LATENT, columns * PIXELS_PER_LATENT
        image = self.cond_hint_original
        image = image.repeat(1, 3, 1, 1) if image.shape[1] == 1 else image[:, :3]
        self._warn_if_cropped(image, width, height)
        others = management.loaded_models(only_currently_used=True)
        latent = self.vae.encode(resize_and_crop(image, width, height).movedim(1, -1))
        management.load_models_gpu(others)
        expected = (self._base.config.in_channels, rows, columns)
        if tuple(latent.shape[1:]) != expected:
            raise InputError(
                f"The VAE turned the ControlNet's hint into a latent of shape {tuple(latent.shape[1:])}; expected {expected}. "
                "Connect the model's own VAE to `vae` of ControlNetApplyAdvanced."
            )
        return self._model.latent_format.process_in(latent)

    def _warn_if_cropped(self, image: Tensor, width: int, height: int) -> None:
        ratio = (image.shape[-1] / image.shape[-2]) / (width / height)
        if not 1 / CROPPED_RATIO < ratio < CROPPED_RATIO:
            log.warning(
                "PixArt: the ControlNet's hint is %dx%d, the picture %dx%d: the hint was scaled and its centre used, the "
                "rest is cut off. PixArtCropToSize brings it to the picture's size.",
                image.shape[-1], image.shape[-2], width, height,
            )  # fmt: skip


def _network_of(model: Any) -> Any:
    """The transformer in the host's model, also within torch.compile's wrapper."""
    return getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)
