"""Which keys of a file are its transformer: found under their prefix, with all that is something else's left out and named."""
from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, PixArtError
from .foreign import PIXART_CONTROLNET, Foreign, is_pixart_controlnet, name_foreign, name_quantized
from .keys import OWN_NAMES, diffusers_sources, find_prefixes, has_every_part, native_target, without_wrappers
from .notes import NOTE_TENSOR
from .read import LAST_NAMES

SCALED_FP8 = "scaled_fp8"  # says that weights have scales; it stands beside them
QUANTIZATION_SUFFIXES = (
    SCALED_FP8, ".scale_weight", ".scale_input", ".weight_scale", ".weight_scale_2", ".input_scale", ".comfy_quant",
)  # fmt: skip
STATE_OF_WRAPPER = "_extra_state"  # what layers of other libraries save beside their weights, such as TransformerEngine's
# Last words of parts that may belong to the model: one that we don't know would draw differently.
PARTS = ("embedder", "embed", "embedding", "block", "blocks", "layer", "layers", "norm", "adaln", "caption", "convs")
LISTED = 20  # names in a message
SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")


def take_transformer(state_dict: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], str, list[str]]:
    """Tensors under the transformer's prefix, that prefix, and the names of what is left out; CheckpointError if there is none."""
    loose = {key for key, value in state_dict.items() if not isinstance(value, Tensor) and isinstance(key, str) and not _is_own(key)}
    state_dict = plain_keys({key: value for key, value in state_dict.items() if key not in loose}, source)
    keys = list(state_dict)
    if is_pixart_controlnet(keys):
        raise _refusal(PIXART_CONTROLNET, source)
    prefixes = find_prefixes(keys)
    if not prefixes:
        raise _no_transformer(keys, source)
    prefix = _prefix_of_transformer(prefixes, keys, source)
    inside, outside = {}, list(loose)
    for key, tensor in state_dict.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and _belongs(name):
            inside[name] = tensor
        else:
            outside.append(name if key.startswith(prefix) else key)
    quantized = name_quantized(inside)
    if quantized:
        raise CheckpointError(f"{source}: this holds {quantized.kind}: {quantized.advice}.")
    foreign = name_foreign(inside if has_every_part(inside) else keys, has_pixart_layers=True)
    if foreign:
        raise _refusal(foreign, source)
    return inside, prefix, sorted({_listed(key) for key in outside})


def plain_keys(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors by names without those of wrappers; raises CheckpointError if two become one, or something is no tensor."""
    require_tensors(state_dict, source)
    plain = {without_wrappers(key): tensor for key, tensor in state_dict.items()}
    if len(plain) < len(state_dict):
        twice = sorted({key for key in state_dict if without_wrappers(key) != key and without_wrappers(key) in state_dict})
        raise CheckpointError(f"{source}: keys that differ only in wrappers ({', '.join(twice[:4])}); expected each weight once.")
    return plain


def require_tensors(state_dict: Mapping[Any, Any], source: str) -> None:
    """Raises CheckpointError unless every key is a name and every value a tensor; a pickle may hold anything else."""
    others = [str(key) for key, value in state_dict.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if others:
        shown = ", ".join(others[:10])
        raise CheckpointError(f"{source}: {len(others)} entries are not tensors ({shown}); expected a state dict of tensors.")


def choose_prefix(count: Mapping[str, int], source: str, kind: str, error: type[PixArtError] = CheckpointError) -> str:
    """The prefix with most keys, by how many each has: not an average, teacher or critic beside the model itself.

    kind: what lies there, for the message of `error`, which is raised if two are alike.
    """

    def is_second(prefix: str) -> bool:
        return "ema" in prefix or any(part.startswith(LAST_NAMES) for part in prefix.split("."))

    first = [prefix for prefix in count if not is_second(prefix)] or list(count)
    most = max(count[prefix] for prefix in first)
    largest = [prefix for prefix in first if count[prefix] == most]
    if len(largest) > 1:
        shown = ", ".join(repr(prefix) if prefix else "no prefix" for prefix in largest)
        raise error(f"{source}: holds several {kind}, under {shown}; expected one. Save the one to use by itself.")
    return largest[0]


def is_state_of_wrapper(key: str) -> bool:
    """Whether it is what a layer of another library saves beside its weights."""
    return STATE_OF_WRAPPER in key.split(".")


def some_names(names: list[str]) -> str:
    """As many as a line can hold."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def shard_advice(source: str) -> str:
    """For a file that is only a part of a model; "" for others."""
    return " This is one of several shards: choose their folder instead." if SHARD.search(source) else ""


def _prefix_of_transformer(prefixes: list[str], keys: list[str], source: str) -> str:
    """A whole one comes before parts of another."""
    under = {prefix: [key[len(prefix) :] for key in keys if key.startswith(prefix)] for prefix in prefixes}
    whole = [prefix for prefix in prefixes if has_every_part(under[prefix])] or prefixes
    known = {prefix: sum(bool(diffusers_sources(key) or native_target(key)) for key in under[prefix]) for prefix in whole}
    return choose_prefix(known, source, "transformers")


def _belongs(name: str) -> bool:
    """Whether a key without prefix is the transformer's, going by its first name: one of its own, or one much like them."""
    head = name.partition(".")[0]
    if is_state_of_wrapper(name):
        return False
    if head in OWN_NAMES or head in (NOTE_TENSOR, SCALED_FP8) or head.rpartition("_")[2] in PARTS:
        return True
    return bool(get_close_matches(head, OWN_NAMES, 1, cutoff=0.8))  # a slip of a tool or a hand


def _is_own(key: str) -> bool:
    """Whether any part of a key is a name of PixArt's own."""
    return not OWN_NAMES.isdisjoint(key.split("."))


def _listed(key: str) -> str:
    """What a key that is left out is listed under: its first name, with those of a table in full."""
    head, dot, _ = key.partition(".")
    return STATE_OF_WRAPPER if is_state_of_wrapper(key) else head + dot


def _no_transformer(keys: list[str], source: str) -> CheckpointError:
    quantized = name_quantized(keys)
    if quantized:
        return CheckpointError(f"{source}: this holds {quantized.kind}: {quantized.advice}.")
    foreign = name_foreign(keys, has_pixart_layers=False)
    if foreign:
        return _refusal(foreign, source)
    shown = ", ".join(keys[:5]) or "none"
    return CheckpointError(
        f"{source}: no PixArt layers among its {len(keys)} keys (first: {shown}); expected a PixArt transformer "
        "with its own or diffusers' key names (t_block.1.weight, or adaln_single.linear.weight)." + shard_advice(source)
    )


def _refusal(foreign: Foreign, source: str) -> CheckpointError:
    return CheckpointError(f"{source}: this is {foreign.kind}; expected a PixArt transformer. To use it, {foreign.advice}.")
