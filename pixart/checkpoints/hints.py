"""What lies beside weights and says more than they do: a diffusers config, or notes in the file."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import COMPRESSION_MODES, variant_names
from ..errors import CheckpointError
from ..json_files import LARGEST, is_count, is_measure, read_json, shown
from ..logs import get_logger
from ..model import PIXELS_PER_LATENT

logger = get_logger(__name__)
TRANSFORMER_CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")
FAMILY_OF_PIPELINE = {"PixArtAlphaPipeline": "alpha", "PixArtSigmaPipeline": "sigma"}
FAMILY_OF_SCALE = {0.18215: "alpha", 0.13025: "sigma"}
VAE_OF_SCALE = {0.18215: "sd1", 0.13025: "sdxl", 1.5305: "sd3", 0.3611: "flux"}
NOTE_KEY = "pixart"  # safetensors metadata, or an entry of a .pth: JSON of the fields below
_DIFFUSERS_SIZES = {"num_layers": "depth", "in_channels": "in_channels", "out_channels": "out_channels",
                    "patch_size": "patch_size", "caption_channels": "caption_channels"}  # fmt: skip


@dataclass(frozen=True)
class Hints:
    """Facts from beside the weights; None where nothing is said."""

    sizes: tuple[tuple[str, Any], ...] = ()  # of TransformerConfig, to be compared with the weights
    num_heads: int | None = None
    base_size: int | None = None
    position_range: float | None = None
    family: str | None = None
    family_reason: str = ""
    compressed_blocks: tuple[tuple[int, int], ...] = ()  # (block, ratio); modes without weights can't be seen
    compression_mode: str | None = None
    ema: bool = False  # the weights are an average over training
    vae: str | None = None  # "sd1" | "sdxl" | "sd3" | "flux"
    variant: str | None = None  # of the zoo, as it was loaded before it was saved
    where: str = "config.json"
    noted_where: str = ""  # of the variant, if that is elsewhere

    def contradictions(self, found: Mapping[str, Any]) -> list[str]:
        """Sizes that differ from the weights' own."""
        return [
            f"{self.where} says {name} {value}, the weights have {found[name]}; they don't belong together, or blocks are missing"
            for name, value in self.sizes
            if found.get(name) != value
        ]


def hints_from_config(config: Mapping[str, Any], source: str, folder: Path | None = None) -> Hints:
    """Hints of a diffusers transformer config; `folder` is the pipeline's, if there is one."""
    kind = config.get("_class_name", TRANSFORMER_CLASSES[0])
    if kind not in TRANSFORMER_CLASSES or config.get("norm_type", "ada_norm_single") != "ada_norm_single":
        raise CheckpointError(
            f"{source}: config.json describes a {kind}; expected {TRANSFORMER_CLASSES[0]}. "
            "Choose the `transformer` folder of a PixArt pipeline."
        )
    sample, patch = _count(config, "sample_size", 128, source), _count(config, "patch_size", 2, source)
    heads, head_dim = _count(config, "num_attention_heads", 16, source), _count(config, "attention_head_dim", 72, source)
    scale = config.get("interpolation_scale")
    if scale is None:
        scale = max(sample // 64, 1)  # diffusers' own default
    elif not is_measure(scale):
        raise CheckpointError(_wrong_value(source, "interpolation_scale", scale, "a number above 0"))
    stated = [(theirs, ours) for theirs, ours in _DIFFUSERS_SIZES.items() if config.get(theirs) is not None]
    sizes: list[tuple[str, Any]] = [(ours, _count(config, theirs, 0, source)) for theirs, ours in stated]
    sizes.append(("hidden_size", heads * head_dim))
    conditions = config.get("use_additional_conditions")
    if conditions is not None:
        if not isinstance(conditions, bool):  # the text "false" would count as true
            raise CheckpointError(_wrong_value(source, "use_additional_conditions", conditions, "true, false or null"))
        sizes.append(("micro_condition", conditions))
    family, reason = _family_of_pipeline(folder) if folder else (None, "")
    vae_scale = read_json(folder / "vae" / "config.json", required=False).get("scaling_factor") if folder else None
    return Hints(
        sizes=tuple(sizes), num_heads=heads, base_size=sample * PIXELS_PER_LATENT,
        position_range=(sample // patch) / scale, family=family, family_reason=reason,
        vae=VAE_OF_SCALE.get(vae_scale) if isinstance(vae_scale, float) else None, **_compression_of(config),
    )  # fmt: skip


def hints_from_note(note: str | Mapping[str, Any] | None) -> Hints:
    """Hints this project wrote into a file when it saved or converted it."""
    if isinstance(note, str):
        try:
            note = json.loads(note)
        except (ValueError, RecursionError):
            return Hints()
    if not isinstance(note, Mapping):
        return Hints()
    known = _compression_of(note)
    for name, is_valid in _NOTE_FIELDS.items():
        value = note.get(name)
        if value is not None and is_valid(value):
            known[name] = value
        elif value is not None:
            logger.warning("The note in the file says %s %.40r, which no PixArt has; it is not used.", name, value)
    if not known:
        return Hints()
    return Hints(**known, family_reason="a note in the file says so", where="a note in the file")


def with_note(config: Hints, note: Hints) -> Hints:
    """A config.json's hints, and of a note in the weights beside it what such a file has no place for."""
    if config.family not in (None, note.family):
        return replace(config, ema=note.ema)  # the pipeline around it says otherwise
    return replace(
        config, family=note.family, family_reason=config.family_reason or note.family_reason, vae=config.vae or note.vae,
        variant=note.variant, noted_where=note.where, ema=note.ema,
        compressed_blocks=config.compressed_blocks or note.compressed_blocks,
        compression_mode=config.compression_mode or note.compression_mode,
    )  # fmt: skip


def _compression_of(note: Mapping[str, Any]) -> dict[str, Any]:
    """The two fields on KV compression, of a note or a config.json; raises CheckpointError, since a guess would draw wrongly."""
    blocks, mode = note.get("compressed_blocks"), note.get("compression_mode")
    if not blocks:
        return {}
    pairs = list(blocks) if isinstance(blocks, (list, tuple)) else [blocks]
    sound = all(isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in pairs)
    sound = sound and all(block >= 0 and 2 <= ratio <= LARGEST for block, ratio in pairs) and len(dict(pairs)) == len(pairs)
    if not sound or (mode is not None and mode not in COMPRESSION_MODES):
        raise CheckpointError(
            f"The file says compressed_blocks {str(blocks)[:60]}, compression_mode {mode!r}; expected pairs [block, ratio], each "
            f"block once, and one of {', '.join(COMPRESSION_MODES)}. Convert it again, with --kv-compression."
        )
    return {"compressed_blocks": tuple(sorted((block, ratio) for block, ratio in pairs)), "compression_mode": mode}


def _count(config: Mapping[str, Any], name: str, default: int, source: str) -> int:
    """A whole number above 0 of a config.json; raises CheckpointError for anything else, null too."""
    value = config.get(name, default)
    if not is_count(value):
        raise CheckpointError(_wrong_value(source, name, value, "a whole number above 0"))
    return value


def _wrong_value(source: str, name: str, value: Any, expected: str) -> str:
    return f"{source}: config.json says {name} {shown(value)}; expected {expected}. Download it again, or choose the weight file itself."


_NOTE_FIELDS = {
    "num_heads": is_count,
    "base_size": is_count,
    "position_range": is_measure,
    "ema": lambda value: isinstance(value, bool),
    "family": lambda value: isinstance(value, str) and value in FAMILY_OF_PIPELINE.values(),
    "vae": lambda value: isinstance(value, str) and value in VAE_OF_SCALE.values(),
    "variant": lambda value: isinstance(value, str) and value in variant_names(),
}


def _family_of_pipeline(folder: Path) -> tuple[str | None, str]:
    """Family by the pipeline's class, else by its VAE's scale."""
    index = read_json(folder / "model_index.json", required=False)
    kind = index.get("_class_name")
    if isinstance(kind, str) and kind in FAMILY_OF_PIPELINE:
        return FAMILY_OF_PIPELINE[kind], f"model_index.json says {kind}"
    scale = read_json(folder / "vae" / "config.json", required=False).get("scaling_factor")
    family = FAMILY_OF_SCALE.get(scale) if isinstance(scale, float) else None
    return family, f"the folder's VAE has scaling_factor {scale}" if family else ""
