"""A T5's key names: its own, and where in a file they begin."""
from __future__ import annotations

import re
from collections.abc import Iterable

from ..checkpoints import keys as transformer_keys
from . import packed

OWN_NAMES = ("shared", "encoder")  # the first names of all that the encoder half has
QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
_OUTERMOST = re.compile(r"(?:^|\.)(?:shared|encoder|decoder|lm_head)\.")


def without_wrappers(key: str) -> str:
    """A key without the names that wrappers of modules put into it, as for a transformer."""
    return transformer_keys.without_wrappers(key, _OUTERMOST)


def has_own_name(key: str) -> bool:
    """Whether any part of a key is a name of a T5's encoder half."""
    return not set(OWN_NAMES).isdisjoint(key.split("."))


def find_prefixes(keys: Iterable[str]) -> list[str]:
    """Prefixes under which a T5 lies; empty if there is none."""
    ends = packed.spellings(QUERY)
    plain = map(without_wrappers, keys)
    found = {key.removesuffix(end): None for key in plain for end in ends if key == end or key.endswith("." + end)}
    return list(found)
