"""An adapter against a model: what fits, what doesn't and why, in one line."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import PurePath

import torch

from ..errors import CheckpointError
from .foreign import looks_like
from .layer import Layer
from .load import NOTHING, Adapter
from .matrices import is_nothing
from .names import TEXT, TRANSFORMER

Shapes = Mapping[str, tuple[int, ...]]  # parameter name -> shape
META = torch.device("meta")  # sizes alone
NO_TEXT_ENCODER, NO_LAYER = "for T5, and no text encoder is given", "for layers that this model doesn't have, or keeps quantized"


@dataclass(frozen=True)
class Fit:
    """The layers of an adapter, all of which the model takes, and keys without which nothing is lost, or that were to be left out."""

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


def fit_adapter(adapter: Adapter, transformer: Shapes, text_encoder: Shapes | None = None, leave_text: bool = False) -> Fit:
    """Fits every layer to a model.

    transformer, text_encoder: native parameter names (T5: those of transformers) -> shapes; None without T5.
    leave_text: leave out what is for T5, where none is given.
    Raises CheckpointError, with the list of what can't be applied, unless all of the adapter can be: a part of it would be
    another picture than the one it was trained for.
    """
    left, unfit, fitting, problems = dict(adapter.left), dict(adapter.unfit), {TRANSFORMER: [], TEXT: []}, []
    for layer in adapter.layers:
        shapes = transformer if layer.place.model == TRANSFORMER else text_encoder
        if shapes is None:
            (left if leave_text else unfit).update(dict.fromkeys(layer.keys, NO_TEXT_ENCODER))
        elif not _has(layer, shapes):
            nothing = is_nothing(layer.tensors)
            (left if nothing else unfit).update(dict.fromkeys(layer.keys, NOTHING if nothing else NO_LAYER))
        else:
            problems += _mismatches(layer, shapes)
            fitting[layer.place.model].append(layer)
    name = PurePath(adapter.source).name
    if problems:
        raise CheckpointError(
            f"{name}: made for another model, {len(problems)} layer(s) differ in size from this model's. LTX-Video and Sana "
            "share layer names with PixArt. Choose a LoRA that was trained on this model:\n  " + "\n  ".join(problems[:5])
        )
    if not fitting[TRANSFORMER] and not fitting[TEXT]:
        raise CheckpointError(_nothing_fits(adapter, [*unfit, *left]))
    if unfit:
        advice = "choose an adapter that was trained on this model, or merge it with the program that trained it"
        if set(unfit.values()) == {NO_TEXT_ENCODER}:
            advice = (
                "give a text encoder (connect a CLIP), or leave that part out: strength_clip 0 in ComfyUI, text_strength=0 in Python, "
                "--leave-text of `merge`"
            )
        raise CheckpointError(f"{name}: {len(unfit)} of {adapter.total} keys can't be applied, so none was; {advice}{describe_left(unfit)}")
    return Fit(adapter.source, tuple(fitting[TRANSFORMER]), tuple(fitting[TEXT]), adapter.total, left)


def _nothing_fits(adapter: Adapter, keys: list[str]) -> str:
    only_text = any(layer.place.model == TEXT for layer in adapter.layers)
    found = "all of it is for T5, and no text encoder is given" if only_text else looks_like(keys)
    return (
        f"{PurePath(adapter.source).name}: none of its {adapter.total} keys fit this PixArt model; {found}. "
        + ("Connect a CLIP, or choose" if only_text else "Choose") + " a LoRA that was trained on PixArt."
    )  # fmt: skip


def _has(layer: Layer, shapes: Shapes) -> bool:
    place = layer.place
    return (not layer.has_weight or place.weight in shapes) and (not layer.has_bias or place.bias in shapes)


def _mismatches(layer: Layer, shapes: Shapes) -> list[str]:
    """Sizes that differ from the model's own, for the piece of the weight that the layer changes."""
    place, key = layer.place, layer.keys[0]
    piece = _piece(shapes.get(place.weight), place.parts)
    if layer.has_weight:
        found = layer.shape() if layer.is_matrices else None
        expected = (piece[0], prod(piece[1:]))
        if found not in (None, expected):
            return [f"{key} changes {found[0]} x {found[1]} numbers, the weight has {expected[0]} x {expected[1]}"]
        if "whole" in layer.tensors and tuple(layer.tensors["whole"].shape) != piece:
            return [f"{key} has {_by(layer.tensors['whole'].shape)} numbers, the weight has {_by(piece)}"]
        if "reshape_weight" in layer.tensors and tuple(layer.tensors["reshape_weight"].int().tolist()) != tuple(piece):
            return [f"{key} makes the weight {_by(layer.tensors['reshape_weight'].int().tolist())} large, it has {_by(piece)}"]
        try:
            layer.on(META).change(torch.empty(piece, device=META))
        except (RuntimeError, IndexError, KeyError) as error:
            return [f"{key}: {str(error).splitlines()[0]}{' is missing' if isinstance(error, KeyError) else ''}"]
    bias = _piece(shapes.get(place.bias), place.parts)
    if layer.has_bias and prod(bias) != layer.bias_size:
        return [f"{key}: {layer.bias_size} numbers for a bias of {prod(bias)}"]
    return []


def _piece(shape: tuple[int, ...] | None, parts: int) -> tuple[int, ...]:
    return (shape[0] // parts, *shape[1:]) if shape else ()


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
