"""Values of menus and numbers that come from anywhere: API clients, other packs' workflows, links. Not every host checks them."""
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


def check_number(name: str, value: Any, lowest: float, highest: float, whole: bool = False) -> float:
    """The value as float, or int if it is to be whole; raises InputError for anything outside lowest..highest, NaN included."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not lowest <= number <= highest or whole and number != int(number):
        raise InputError(f"{name} is {value!r}; expected a {'whole ' if whole else ''}number from {lowest:g} to {highest:g}.")
    return int(number) if whole else number


def choice_problem(name: str, value: Any, options: Iterable[str]) -> bool | str:
    """For `validate_inputs`: True, or what is wrong. None is a linked input, which is known only when it runs."""
    try:
        return value is None or bool(check_choice(name, value, options))
    except InputError as error:
        return str(error)
