"""Menu values that come from anywhere: API clients, other packs' workflows, links. Not every host checks them."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...pixart.errors import InputError


def check_choice(name: str, value: Any, options: Iterable[str]) -> str:
    """The value, if it is one of a menu's (a number may stand for its text); raises InputError listing all of them."""
    options = list(options)
    text = value if isinstance(value, str) else str(value) if isinstance(value, int) else ""
    if text not in options:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(options)}.")
    return text


def choice_problem(name: str, value: Any, options: Iterable[str]) -> bool | str:
    """For `validate_inputs`: True, or what is wrong. None is a linked input, which is known only when it runs."""
    try:
        return value is None or bool(check_choice(name, value, options))
    except InputError as error:
        return str(error)
