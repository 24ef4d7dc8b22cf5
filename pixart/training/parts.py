"""A recipe's named parts: what is trained (methods), what a step computes (objectives), where pictures come from (sources).

Each part is one module of the package of its kind, named as the recipe names it, with a dataclass `Settings` and a class
`Part` that is made from them. A function `check(settings)`, if it is there, raises ConfigError for values that no run can
have. A new part is a new file; nothing lists it. A recipe can only name what lies there.
"""
from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from ..errors import ConfigError
from .fields import typed

KINDS = {"method": "methods", "objective": "objectives", "source": "sources"}


@dataclass(frozen=True)
class Chosen:
    """A part by name, with its settings; `make` builds it."""

    kind: str
    name: str
    settings: Any

    def make(self, *arguments: Any) -> Any:
        """The part itself."""
        return part_module(self.kind, self.name).Part(self.settings, *arguments)

    def changed(self, values: Mapping[str, Any], source: str) -> Chosen:
        """The same part with some settings replaced; raises ConfigError by name."""
        if not values:
            return self
        fixed = [name for name in getattr(part_module(self.kind, self.name), "WHOLE_RUN", ()) if name in values]
        if fixed:
            raise ConfigError(f"{source}: {', '.join(fixed)} can't differ from stage to stage; set it in the recipe's {self.kind}.")
        given = {name: getattr(self.settings, name) for name in self.settings.__dataclass_fields__}
        return _chosen(self.kind, self.name, {**given, **values}, source)


def part_names(kind: str) -> list[str]:
    """Every part of a kind."""
    package = import_module(f"{__package__}.{KINDS[kind]}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def part_module(kind: str, name: str) -> ModuleType:
    """The module of a part; raises ConfigError with the list of names for any other."""
    if name not in part_names(kind):
        raise ConfigError(f"Unknown {kind} {name!r}; expected one of {', '.join(part_names(kind))}.")
    return import_module(f"{__package__}.{KINDS[kind]}.{name}")


def choose(kind: str, values: Any, source: str) -> Chosen:
    """A part from a recipe's value: its name, or an object with `name` and settings."""
    if isinstance(values, str):
        values = {"name": values}
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise ConfigError(f"{source}: {kind} is {values!r}; expected a name, or an object with a name and settings.")
    return _chosen(kind, values["name"], {key: value for key, value in values.items() if key != "name"}, source)


def _chosen(kind: str, name: str, values: Mapping[str, Any], source: str) -> Chosen:
    module, where = part_module(kind, name), f"{source}, {kind} {name}"
    settings = typed(module.Settings, values, where)
    if hasattr(module, "check"):
        try:
            module.check(settings)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return Chosen(kind, name, settings)
