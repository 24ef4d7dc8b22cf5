"""The host's model classes for PixArt, with the core's transformer inside."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.supported_models
import torch
from torch import Tensor

from ...pixart.bins import MAX_SIDE, Bin, base_sizes, nearest_bin
from ...pixart.checkpoints.detect import Detection
from ...pixart.checkpoints.notes import NOTE_TENSOR, saving_note
from ...pixart.config import TransformerConfig, get_variant, variant_names
from ...pixart.errors import InputError, TextEncoderError
from ...pixart.logs import get_logger
from ...pixart.model import PIXELS_PER_LATENT
from .compiled import any_size
from .conds import CaptionStates, PicturePositions, caption_mask
from .dtypes import computing_dtype
from .silent_nodes import silent_warnings
from .transformer import HostTransformer
from .vae_hint import refiner_warning, vae_warning

log = get_logger(__name__)
FAR_AREA, FAR_RATIO = 1.6, 1.5  # factors from the nearest bin beyond which pictures visibly suffer
RESIDUALS = "pixart_residuals"  # name of the count among a conditioning's shapes
_FIELDS = {field.name for field in fields(TransformerConfig)}


def build_transformer(*, dtype: Any = None, device: Any = None, operations: Any = None, **sizes: Any) -> HostTransformer:
    """What the host calls with `unet_config`; `sizes` are the fields of TransformerConfig and the host's labels."""
    config = TransformerConfig(**{name: value for name, value in sizes.items() if name in _FIELDS})
    return HostTransformer(config, operations=operations, dtype=dtype, device=device)


class PixArtModel(comfy.model_base.PixArt):
    """Subclass of the host's PixArt, by which LoRA key maps recognise the family."""

    def __init__(self, model_config: Any, model_type=comfy.model_base.ModelType.EPS, device: Any = None) -> None:
        # The parent names its own transformer, so its parent is called.
        comfy.model_base.BaseModel.__init__(self, model_config, model_type, device=device, unet_model=build_transformer)
        self.detection: Detection = model_config.detection
        self._warned: set[str] = set()

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Captions with their mask, positions, and for alpha-1024 the picture's size, (height, width) in pixels.

        All on the sampling device: the host asks once for a run, but would copy them there in every step.
        """
        out = comfy.model_base.BaseModel.extra_conds(self, **kwargs)
        device = kwargs.get("device")
        states = self._captions(kwargs.get("cross_attn")).to(device=device)
        out["c_crossattn"] = CaptionStates(states)
        out["context_mask"] = caption_mask(states, kwargs.get("attention_mask"))
        height, width = _picture_size(kwargs["noise"])
        self._check_grid(kwargs["noise"])
        out["positions"] = PicturePositions(self.diffusion_model.positions_of(kwargs["noise"]))
        self._check_size(width, height)
        self._warn_once(vae_warning(self.detection.vae))
        self._warn_once(refiner_warning(self.detection.family))
        for text in silent_warnings():
            self._warn_once(text)
        wanted = (kwargs.get("height") or height, kwargs.get("width") or width)
        if self.diffusion_model.config.micro_condition:
            # int, which the host doesn't cast: bf16 rounds 1400 to 1408
            out["size"] = comfy.conds.CONDRegular(torch.tensor([wanted], dtype=torch.int32, device=device))
        elif wanted != (height, width):
            self._warn_once(
                "This PixArt has no size conditioning (only alpha-1024 has it): width and height of the conditioning are not "
                "used. Set the picture's size on the latent."
            )
        return out

    def _apply_model(self, *args: Any, **kwargs: Any) -> Tensor:
        """The host's prediction; TorchCompileModel has replaced the network by then."""
        with any_size(self.diffusion_model, getattr(self.current_patcher, "model_options", {})):
            return super()._apply_model(*args, **kwargs)

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        """For `memory_required`: how many residuals a PixArt ControlNet on this conditioning holds at once."""
        out = super().extra_conds_shapes(**kwargs)
        held = getattr(kwargs.get("control"), "residuals_held", None)
        return out if held is None else {**out, RESIDUALS: [held()]}

    def memory_required(self, input_shape: Sequence[int], cond_shapes: Mapping[str, Any] = MappingProxyType({})) -> float:
        """Bytes for a prediction on latents of `input_shape`: the host's estimate, and a ControlNet's residuals beside it."""
        held = max((count for (count,) in cond_shapes.get(RESIDUALS, ())), default=0)
        patch, width = self.diffusion_model.patch_size, self.diffusion_model.config.hidden_size
        tokens = math.prod(-(-side // patch) for side in input_shape[2:])
        residuals = held * input_shape[0] * tokens * width * management.dtype_size(computing_dtype(self))
        return super().memory_required(input_shape, cond_shapes=cond_shapes) + residuals

    def _captions(self, states: Tensor | None) -> Tensor:
        expected = self.diffusion_model.config.caption_channels
        if states is None:
            raise InputError("This conditioning holds no text; connect PixArtTextEncode or CLIPTextEncode with a T5.")
        if states.ndim != 3 or states.shape[-1] != expected:
            raise TextEncoderError(
                f"The conditioning has shape {tuple(states.shape)}, but this PixArt model reads T5 states of width "
                f"{expected}: expected (batch, tokens, {expected}). "
                + ("Load T5-v1.1-XXL" if expected == 4096 else f"Load the T5 of width {expected} that belongs to it")
                + " with PixArtT5Loader, or CLIPLoader with type pixart; CLIP-L and CLIP-G don't fit."
            )
        return states

    def _check_grid(self, noise: Tensor) -> None:
        """Raises InputError, before the first step, for a picture of which trained compression leaves nothing."""
        patch = self.diffusion_model.patch_size
        self.diffusion_model.check_grid(tuple(-(-side // patch) for side in noise.shape[-2:]))

    def _check_size(self, width: int, height: int) -> None:
        """One warning per model for sizes far from those it was trained at."""
        base, family = self.detection.base_size, self.detection.family
        if base in base_sizes():
            bases, trained = [base], f"this model was trained at (base {base})"
        else:
            bases = _bases_of(family)
            shown = ", ".join(map(str, bases))
            trained = f"any PixArt of family {family} was trained at (bases {shown}; this file doesn't say which is its own)"
        bins = [nearest_bin(each, min(width, MAX_SIDE), min(height, MAX_SIDE)) for each in bases]
        if all(_is_far(width, height, fit) for fit in bins):
            fit = min(bins, key=lambda fit: abs(math.log(width * height / (fit.width * fit.height))))
            self._warn_once(
                f"{width}x{height} is far from the sizes {trained}: expect repeated or "
                f"broken content. The nearest is {fit.width}x{fit.height}; PixArtResolution makes such latents.",
            )

    def _warn_once(self, text: str | None) -> None:
        """Logs a text, if there is one, the first time this model meets it."""
        if text and text not in self._warned:
            self._warned.add(text)
            log.warning("PixArt: %s", text)


def _picture_size(noise: Tensor) -> tuple[int, int]:
    """(height, width) in pixels; raises InputError for the latents of videos, which have a fifth dimension."""
    if noise.ndim != 4:
        raise InputError(
            f"The latent has shape {tuple(noise.shape)}; expected (batch, channels, height/8, width/8), of pictures. Use "
            "PixArtResolution or EmptyLatentImage."
        )
    height, width = noise.shape[-2:]
    return height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT


def _bases_of(family: str) -> list[int]:
    """Base sizes, in pixels, that models of a family were released for."""
    return sorted({variant.base_size for variant in map(get_variant, variant_names()) if variant.family == family})


def _is_far(width: int, height: int, fit: Bin) -> bool:
    area = (width * height) / (fit.width * fit.height)
    ratio = (height / width) / fit.ratio
    return not 1 / FAR_AREA <= area <= FAR_AREA or not 1 / FAR_RATIO <= ratio <= FAR_RATIO


WIDE_FORMATS = {"sd3": comfy.latent_formats.SD3, "flux": comfy.latent_formats.Flux}  # of 16 channels


class _Supported:
    """Builds PixArtModel; mixed into the host's configuration of each family."""

    detection: Detection

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called by ModelSave and CheckpointSave: what the weights alone don't tell is kept in a note among them."""
        note = saving_note(state_dict, self.detection)
        return super().process_unet_state_dict_for_saving({**state_dict, **({NOTE_TENSOR: note} if note is not None else {})})

    def get_model(self, state_dict: dict[str, Tensor], prefix: str = "", device: Any = None) -> PixArtModel:
        """Called by the loader; the weights come later."""
        return PixArtModel(self, device=device).eval()


class SupportedSigma(_Supported, comfy.supported_models.PixArtSigma):
    """Sigma: latents of the SDXL VAE."""


class SupportedAlpha(_Supported, comfy.supported_models.PixArtAlpha):
    """alpha: latents of the SD1 VAE."""


def model_config(detection: Detection) -> SupportedSigma | SupportedAlpha:
    """The host's model configuration for what was detected.

    `unet_config` holds plain values: the host's key maps read depth and hidden_size there.
    """
    supported = SupportedAlpha if detection.family == "alpha" else SupportedSigma
    config = supported({**supported.unet_config, **detection.config.to_dict()})
    config.detection = detection
    if detection.vae in WIDE_FORMATS:
        config.latent_format = WIDE_FORMATS[detection.vae]()
    if config.latent_format.scale_factor != detection.latent_scale:
        raise InputError(
            f"{detection.variant}: latent scale {detection.latent_scale} differs from the host's "
            f"{config.latent_format.scale_factor} for {detection.family}; this host can't run it."
        )
    return config
