"""An adapter against a model: what fits, what doesn't and why, in one line."""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import PurePath

from ..errors import CheckpointError
from .foreign import looks_like, method_of
from .layer import Layer, magnitude_axis
from .load import Adapter
from .names import TEXT, TRANSFORMER

Shapes = Mapping[str, tuple[int, ...]]  # parameter name -> shape
NO_TEXT_ENCODER, NO_LAYER = "for T5, and no text encoder is given", "for layers that this model doesn't have, or keeps quantized"


@dataclass(frozen=True)
class Fit:
    """The layers that a model takes, and the keys that are left."""

    source: str
    layers: tuple[Layer, ...]  # of the transformer
    text_layers: tuple[Layer, ...]  # of T5
    total: int
    left: Mapping[str, str]  # key -> why it is not applied

    def describe(self) -> str:
        """One line: how many keys are applied, of what, and which are not."""
        used = [*self.layers, *self.text_layers]
        kinds = sorted({layer.algorithm for layer in used})
        ranks = sorted({layer.rank for layer in used if layer.rank})
        rank = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
        text = f" and {len(self.text_layers)} of T5" if self.text_layers else ""
        applied = f"{self.total - len(self.left)} of {self.total} keys applied ({len(self.layers)} layers{text}, {', '.join(kinds)}{rank})"
        return f"{PurePath(self.source).name}: {applied}{describe_left(self.left)}"


def describe_left(left: Mapping[str, str]) -> str:
    """"; not applied: ..." with every key, those of several blocks as one; "" if there are none."""
    reasons: dict[str, dict[str, int]] = {}
    for key, reason in left.items():
        patterns = reasons.setdefault(reason, {})
        pattern = re.sub(r"((?:^|[._])(?:blocks?|layers))([._])\d+", r"\1\2*", key)
        patterns[pattern] = patterns.get(pattern, 0) + 1
    parts = [
        f"{sum(patterns.values())} {reason}: " + ", ".join(f"{p} ({n} times)" if n > 1 else p for p, n in patterns.items())
        for reason, patterns in reasons.items()
    ]
    return "; not applied: " + "; ".join(parts) if parts else ""


def fit_adapter(adapter: Adapter, transformer: Shapes, text_encoder: Shapes | None = None) -> Fit:
    """Chooses the layers that a model has.

    transformer, text_encoder: native parameter names (T5: those of transformers) -> shapes; None without T5.
    Raises CheckpointError unless all of it can be applied: a part of an adapter would be another one. Only layers of T5 are left
    where no text encoder is given.
    """
    left, fitting, problems = dict(adapter.left), {TRANSFORMER: [], TEXT: []}, []
    for layer in adapter.layers:
        shapes = transformer if layer.place.model == TRANSFORMER else text_encoder
        reason = NO_TEXT_ENCODER if shapes is None else NO_LAYER if not _has(layer, shapes) else ""
        if reason:
            left.update(dict.fromkeys(layer.keys, reason))
            continue
        problems += _mismatches(layer, shapes)
        fitting[layer.place.model].append(layer)
    name = PurePath(adapter.source).name
    if problems:
        raise CheckpointError(
            f"{name}: made for another model, {len(problems)} layer(s) have another size than this model's. LTX-Video and Sana "
            "share layer names with PixArt. Choose a LoRA that was trained on this model:\n  " + "\n  ".join(problems[:5])
        )
    if not fitting[TRANSFORMER] and not fitting[TEXT]:
        only_text = any(layer.place.model == TEXT for layer in adapter.layers)
        found = "all of it is for T5, and no text encoder is given" if only_text else looks_like([*adapter.left, *left])
        raise CheckpointError(
            f"{name}: none of its {adapter.total} keys fit this PixArt model; {found}. "
            + ("Connect a CLIP, or choose" if only_text else "Choose") + " a LoRA that was trained on PixArt."
        )  # fmt: skip
    refused = {key: reason for key, reason in left.items() if reason != NO_TEXT_ENCODER}
    if refused:
        raise CheckpointError(
            f"{name}: {len(refused)} of its {adapter.total} keys{method_of([*refused])} can't be applied, and the rest would be another "
            f"adapter{describe_left(refused)}. Choose one that was trained on this model, or merge it with the program that trained it."
        )
    return Fit(adapter.source, tuple(fitting[TRANSFORMER]), tuple(fitting[TEXT]), adapter.total, left)


def _has(layer: Layer, shapes: Shapes) -> bool:
    wanted = [layer.place.weight] * layer.has_weight
    wanted += [f"{layer.place.module}.bias"] * (layer.of_bias() is not None)
    return all(key in shapes for key in wanted)


def _mismatches(layer: Layer, shapes: Shapes) -> list[str]:
    """Sizes that differ from the model's own, for the piece of the weight that the layer changes."""
    place, problems = layer.place, []
    if layer.has_weight:
        rows, *others = shapes[place.weight]
        expected, found = (rows // place.parts, prod(others)), layer.shape()
        found = (found[0], expected[1] if found[1] is None else found[1])
        if found != expected:
            problems.append(f"{layer.keys[0]} changes {found[0]} x {found[1]} numbers, the weight has {expected[0]} x {expected[1]}")
        if layer.is_dora:
            try:
                magnitude_axis(layer.tensors["dora_scale"], (expected[0], *others))
            except ValueError as error:
                problems.append(f"{layer.keys[0]}: {error}")
    bias = layer.of_bias()
    size = 0 if bias is None else bias.shape()[0]
    if bias is not None and size * place.parts != prod(shapes[f"{place.module}.bias"]):
        problems.append(f"{layer.keys[0]}: {size} numbers for a bias of {prod(shapes[f'{place.module}.bias']) // place.parts}")
    return problems
