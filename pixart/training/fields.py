"""Dataclasses from JSON: unknown and missing fields, and values of the wrong type, are refused by name."""
from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..config import from_fields
from ..errors import ConfigError


def typed(kind: type, values: Any, source: str) -> Any:
    """An instance of the dataclass `kind`; lists become tuples. Raises ConfigError naming `source` and the field."""
    values = {key: frozen(value) for key, value in values.items()} if isinstance(values, Mapping) else values
    made = from_fields(kind, values, source)
    hints = get_type_hints(kind)
    for name in values:
        if not fits(getattr(made, name), hints[name]):
            raise ConfigError(f"{source}: {name} is {values[name]!r}; expected {_words(hints[name])}.")
    return made


def frozen(value: Any) -> Any:
    """Lists as tuples, all the way down, so that settings can be compared and hashed."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type; whole numbers are numbers, booleans are not."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Any:
        return True
    return isinstance(value, origin or hint)


def _words(hint: Any) -> str:
    """A type as a user would say it."""
    plain = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if hint in plain:
        return plain[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if origin is tuple and inner[1:] == (...,):
        return f"a list, each {_words(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_words, inner))}]"
    return "an object"
