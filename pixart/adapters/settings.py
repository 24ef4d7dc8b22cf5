"""What PEFT writes beside an adapter's weights: its alpha, which the tensors don't tell."""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .names import TEXT, TRANSFORMER
from .rotation import Rotation

CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # of diffusers, in a safetensors header
KINDS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
# Beginnings of init_lora_weights, which change the base model's own weights too; and settings that no tensor tells of.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
UNTOLD = (
    "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config", "trainable_token_indices",
)  # fmt: skip
_COMPONENTS = {TRANSFORMER: ("transformer.", "unet."), TEXT: ("text_encoder.",)}
MOST_TERMS = 100
SERIES_SINCE = (0, 18)  # the version of PEFT whose terms are those of `rotation`
_NO_PATTERN = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class Settings:
    """alpha and rank of a PEFT adapter, for all layers and for some."""

    alpha: float | None
    rank: int | None
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False  # arXiv:2312.03732: alpha / sqrt(rank)
    dora: bool = False  # every layer has a magnitude
    rotation: Rotation = Rotation()  # of OFT

    def scale(self, module: str, rank: int | None) -> float:
        """alpha / rank for a layer; `rank` is that of its matrices, None if they don't tell."""
        rank = rank or _of_layer(self.ranks, module, self.rank)
        alpha = _of_layer(self.alphas, module, self.alpha)
        if not rank or alpha is None:
            return 1.0
        return alpha / (sqrt(rank) if self.rank_stabilized else rank)


def settings_from_config(config: Mapping[str, Any], source: str) -> Settings:
    """Settings of an adapter_config.json. Raises UnsupportedError for methods that only PEFT itself can run."""
    kind, start = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    if kind not in KINDS:
        raise UnsupportedError(f"{source}: a PEFT adapter of type {kind}; expected one of {', '.join(KINDS)}. Merge it with PEFT instead.")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UnsupportedError(
            f"{source}: init_lora_weights is {start!r}: such an adapter changes the base model's own weights too. Save it from "
            "PEFT as a plain LoRA (path_initial_model_for_weight_conversion) and load that."
        )
    if _flag(config, "fan_in_fan_out", source):
        raise UnsupportedError(f"{source}: fan_in_fan_out is true: its matrices are transposed. Merge it with PEFT instead.")
    untold = [f"{name} is {config[name]!r}" for name in UNTOLD if config.get(name)]
    if untold:
        raise UnsupportedError(f"{source}: {', '.join(untold)}: only PEFT itself can run that. Merge it with PEFT instead.")
    return Settings(
        alpha=_number(config, "lora_alpha" if kind == "LORA" else "alpha", source),
        rank=None if kind in ("OFT", "BOFT", "IA3") else _rank(config, "r", source),
        alphas=_patterns(config, "alpha_pattern", source, _number),
        ranks=_patterns(config, "rank_pattern", source, _rank),
        rank_stabilized=_flag(config, "use_rslora", source),
        dora=_flag(config, "use_dora", source),
        rotation=_rotation(config, source) if kind == "OFT" else Rotation(),
    )


def _rotation(config: Mapping[str, Any], source: str) -> Rotation:
    """How PEFT's OFT makes rotations, with PEFT's defaults."""
    series, bounded = _flag({"use_cayley_neumann": True, **config}, "use_cayley_neumann", source), _flag(config, "coft", source)
    terms, radius = _number(config, "num_cayley_neumann_terms", source), _number(config, "eps", source)
    terms = 5 if terms is None else terms
    version = tuple(map(int, re.findall(r"\d+", str(config.get("peft_version")))[:2]))
    if "oft_block_size" not in config or series and version < SERIES_SINCE:
        raise UnsupportedError(f"{source}: OFT of a PEFT before 0.18, which computed it differently. Merge it with that PEFT.")
    if series and not 1 <= terms <= MOST_TERMS:
        raise CheckpointError(f"{source}: num_cayley_neumann_terms is {terms!r}; expected 1 to {MOST_TERMS}.")
    return Rotation(None, int(terms) if series else None, (6e-5 if radius is None else float(radius)) if bounded else None)


def settings_from_metadata(text: str | None, source: str) -> dict[str, Settings]:
    """TRANSFORMER and TEXT -> settings, from the JSON of diffusers in a file's header, with or without the component's name."""
    try:
        values = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        values = {}
    if not isinstance(values, Mapping):
        return {}
    found = {}
    for model, prefixes in _COMPONENTS.items():
        for prefix in prefixes:
            config = {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}
            if config:
                found[model] = settings_from_config(config, source)
    if not found and not values.keys().isdisjoint(("peft_type", "r", "lora_alpha")):  # an adapter_config.json as it is
        found = dict.fromkeys(_COMPONENTS, settings_from_config(values, source))
    return found


def _number(config: Mapping[str, Any], name: str, source: str) -> Any:
    value = config.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9):
        raise CheckpointError(f"{source}: {name} is {value!r}; expected a number.")
    return value


def _rank(config: Mapping[str, Any], name: str, source: str) -> Any:
    value = _number(config, name, source)
    if value is not None and value <= 0:
        raise CheckpointError(f"{source}: {name} is {value!r}; expected a rank of at least 1. Download the adapter again.")
    return value


def _flag(config: Mapping[str, Any], name: str, source: str) -> bool:
    """The text "false" would count as true."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{source}: {name} is {value!r}; expected true or false.")
    return bool(value)


def _patterns(config: Mapping[str, Any], name: str, source: str, read: Callable[..., Any]) -> dict[str, float]:
    """Layer name -> number. PEFT reads the names as regular expressions, this only as names: the file is untrusted."""
    found = {}
    patterns = config.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{source}: {name} is a {type(patterns).__name__}; expected an object of layer names and numbers.")
    for pattern in patterns:
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not _NO_PATTERN.fullmatch(plain):
            raise UnsupportedError(f"{source}: {name} has the pattern {pattern!r}; expected names of layers. Merge it with PEFT instead.")
        found[plain] = read(patterns, pattern, source)
    return found


def _of_layer(patterns: Mapping[str, float], module: str, default: float | None) -> float | None:
    return next((value for name, value in patterns.items() if module == name or module.endswith(f".{name}")), default)
