"""What lies beside weights and says more than they do: a diffusers config, or notes in the file."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

TRANSFORMER_CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")
FAMILY_OF_PIPELINE = {"PixArtAlphaPipeline": "alpha", "PixArtSigmaPipeline": "sigma"}
FAMILY_OF_SCALE = {0.18215: "alpha", 0.13025: "sigma"}
NOTE_KEY = "pixart"  # safetensors metadata, or an entry of a .pth: JSON of the fields below
PIXELS_PER_LATENT = 8
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
    where: str = "config.json"

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
    sample, patch = config.get("sample_size", 128), config.get("patch_size", 2)
    heads, head_dim = config.get("num_attention_heads", 16), config.get("attention_head_dim", 72)
    scale = config.get("interpolation_scale") or max(sample // 64, 1)  # diffusers' own default
    sizes = [(ours, config[theirs]) for theirs, ours in _DIFFUSERS_SIZES.items() if config.get(theirs) is not None]
    sizes.append(("hidden_size", heads * head_dim))
    if config.get("use_additional_conditions") is not None:
        sizes.append(("micro_condition", bool(config["use_additional_conditions"])))
    family, reason = _family_of_pipeline(folder) if folder else (None, "")
    return Hints(
        sizes=tuple(sizes), num_heads=heads, base_size=sample * PIXELS_PER_LATENT,
        position_range=(sample // patch) / scale, family=family, family_reason=reason,
    )  # fmt: skip


def hints_from_note(note: str | Mapping[str, Any] | None) -> Hints:
    """Hints this project wrote into a file when it saved or converted it."""
    if isinstance(note, str):
        try:
            note = json.loads(note)
        except ValueError:
            return Hints()
    if not isinstance(note, Mapping):
        return Hints()
    known = {name: note[name] for name in ("num_heads", "base_size", "position_range", "family") if note.get(name)}
    return Hints(**known, family_reason="a note in the file says so", where="a note in the file")


def _family_of_pipeline(folder: Path) -> tuple[str | None, str]:
    """Family by the pipeline's class, else by its VAE's scale."""
    index = read_json(folder / "model_index.json", required=False)
    kind = index.get("_class_name")
    if kind in FAMILY_OF_PIPELINE:
        return FAMILY_OF_PIPELINE[kind], f"model_index.json says {kind}"
    scale = read_json(folder / "vae" / "config.json", required=False).get("scaling_factor")
    family = FAMILY_OF_SCALE.get(scale)
    return family, f"the folder's VAE has scaling_factor {scale}" if family else ""


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON object; an absent file is {} unless required. Raises CheckpointError."""
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path}: no such file; expected a JSON file of a diffusers folder.")
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}; expected a JSON object.")
    return values
