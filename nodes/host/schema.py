"""Node schemas across host versions."""
from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

_KNOWN = {field.name for field in fields(io.Schema)}


def schema(**values: Any) -> io.Schema:
    """An `io.Schema` without the arguments that this host doesn't know yet (0.3.64 lacks search_aliases)."""
    return io.Schema(**{name: value for name, value in values.items() if name in _KNOWN})
