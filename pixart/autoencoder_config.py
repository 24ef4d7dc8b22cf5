"""config.json of diffusers' autoencoders: every field of the kind that the class takes, or one error that names them all."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .checkpoints.content import first_line, is_out_of_memory, reading_error
from .errors import CheckpointError
from .json_files import is_count, is_measure, is_number, shown

MOST_REPEATS = 64  # layers of a block, blocks of a stage, stages: far above any VAE's
UPSAMPLING = ("nearest", "nearest-exact", "bilinear", "bicubic")
SAME_LENGTH = ("{}block_out_channels", "{}down_block_types", "{}up_block_types", "num_{}blocks")  # of each side


class Kind(NamedTuple):
    """What a field may be."""

    is_valid: Callable[[Any], bool]
    expected: str


def _list_of(kind: Kind) -> Kind:
    def is_valid(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and 0 < len(value) <= MOST_REPEATS and all(map(kind.is_valid, value))

    return Kind(is_valid, f"a list, 1 to {MOST_REPEATS} long, each {kind.expected}")


def _or_null(kind: Kind) -> Kind:
    return Kind(lambda value: value is None or kind.is_valid(value), f"{kind.expected}, or null")


COUNT, NUMBER = Kind(is_count, "a whole number above 0"), Kind(is_number, "a number")
MEASURE = Kind(is_measure, "a number above 0")
REPEATS = Kind(lambda value: is_count(value) and value <= MOST_REPEATS, f"a whole number from 1 to {MOST_REPEATS}")
SPECIAL = {  # those whose default value doesn't tell all
    "scaling_factor": _or_null(MEASURE),
    "shift_factor": _or_null(NUMBER),
    "latents_mean": _or_null(_list_of(NUMBER)),
    "latents_std": _or_null(_list_of(NUMBER)),
    "latent_magnitude": MEASURE,
    "sample_size": Kind(lambda value: is_count(value) or _list_of(COUNT).is_valid(value), f"{COUNT.expected}, or a list of such"),
    "upsample_fn": Kind(lambda value: value in UPSAMPLING, f"one of {', '.join(UPSAMPLING)}"),
    "decoder_downsample_padding": Kind(lambda value: type(value) is int and value == 0 or is_count(value), "a whole number from 0"),
    "decoder_norm_eps": Kind(lambda value: is_number(value) and 0 < value < 1, "a number between 0 and 1"),
    "num_encoder_blocks": _list_of(REPEATS),
    "num_decoder_blocks": _list_of(REPEATS),
    **dict.fromkeys(("layers_per_block", "encoder_layers_per_block", "decoder_layers_per_block"), REPEATS),
}


def build_autoencoder(kind: type, config: Mapping[str, Any], source: Path, title: str, remedy: str) -> nn.Module:
    """The diffusers class `kind`, called `title` in messages, as `config` says; raises CheckpointError naming `source`.

    A scaling_factor of null says nothing: the class's own is taken.
    """
    reason = "; ".join(_wrong_fields(kind, config))
    if not reason:
        try:
            return kind.from_config({name: value for name, value in config.items() if name != "scaling_factor" or value is not None})
        except Exception as error:  # diffusers builds whatever the config says, and raises nearly anything
            if is_out_of_memory(error):
                raise reading_error(source, error) from error
            reason = first_line(error)
    raise CheckpointError(f"{source}: no {title} can be built from it ({reason}). {remedy}")


def _wrong_fields(kind: type, config: Mapping[str, Any]) -> list[str]:
    """What is wrong with each field; those that the class doesn't know are passed over, as diffusers does."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items() if name != "self"}
    wrong = []
    for name in (name for name in defaults if name in config):
        wanted = SPECIAL.get(name) or _kind_of(defaults[name])
        if wanted and not wanted.is_valid(config[name]):
            wrong.append(f"{name} is {shown(config[name])}; expected {wanted.expected}")
    return wrong or _uneven({name: config.get(name, default) for name, default in defaults.items()})


def _kind_of(default: Any) -> Kind | None:
    """Whatever the default value is."""
    if isinstance(default, bool):
        return Kind(lambda value: isinstance(value, bool), "true or false")
    if isinstance(default, str):
        return Kind(lambda value: isinstance(value, str), "a text")
    if isinstance(default, int):
        return COUNT
    if isinstance(default, float):
        return NUMBER
    return _list_of(_kind_of(default[0])) if isinstance(default, (tuple, list)) and default else None


def _uneven(fields: Mapping[str, Any]) -> list[str]:
    """Lists with one entry for each stage that differ in length; diffusers would leave stages out."""
    wrong = []
    for side in ("", "encoder_", "decoder_"):
        lengths = {name: len(fields[name]) for name in (name.format(side) for name in SAME_LENGTH) if name in fields}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            wrong.append(f"the lengths are {found}; expected the same, one entry for each stage")
    return wrong
