"""Files of prompts: text (one a line), csv (names in the first line) or jsonl (one object a line) -> the pictures to draw."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bins import MAX_SIDE, check_size
from ..errors import InputError
from ..pipeline import MAX_STEPS

SUFFIXES = (".txt", ".csv", ".jsonl")
LARGEST_SEED = 2**64 - 1
MAX_IMAGES = 10_000
SHOWN = 5  # problems of a file that are named


@dataclass(frozen=True)
class Picture:
    """One picture to draw. width, height: wanted pixels."""

    file: str  # its name in the output folder
    row: int  # of the prompts file, from 1
    prompt: str
    negative: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is used."""
        return self.guidance > 1


@dataclass(frozen=True)
class Defaults:
    """What rows that don't say get. seed: of the first picture, the next get the next numbers."""

    negative: str = ""
    seed: int = 0
    width: int = 1024
    height: int = 1024
    steps: int = 20
    guidance: float = 4.5
    images: int = 1


FIELDS = ("prompt", "negative", "seed", "width", "height", "steps", "guidance", "images")


def read_pictures(path: Path, defaults: Defaults) -> list[Picture]:
    """All pictures of a file, in its order; raises InputError naming every row that can't be drawn."""
    rows, problems = [], []
    for line, values in _rows(path):
        try:
            rows.append((line, _checked(values, defaults)))
        except InputError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        more = f" And {len(problems) - SHOWN} more." if len(problems) > SHOWN else ""
        raise InputError(f"{path}: " + " ".join(problems[:SHOWN]) + more)
    if not rows:
        raise InputError(f"{path} holds no prompt; expected one per line, or a csv or jsonl with the field prompt.")
    return list(_pictures(rows, defaults.seed))


def _pictures(rows: list[tuple[int, dict[str, Any]]], seed: int) -> Iterator[Picture]:
    digits = max(5, len(str(len(rows))))
    count = 0
    for number, (_, values) in enumerate(rows, start=1):
        images, own = values.pop("images"), values.pop("seed")
        for copy in range(images):
            name = f"{number:0{digits}}.png" if images == 1 else f"{number:0{digits}}-{copy + 1}.png"
            chosen = (seed + count if own is None else own + copy) % (LARGEST_SEED + 1)
            yield Picture(file=name, row=number, seed=chosen, **values)
            count += 1


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Line numbers and values as they stand in the file, or what is wrong with the line."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--prompts is {path}; expected a file that ends in {', '.join(SUFFIXES)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as UTF-8 text ({error}).") from None
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, text)
        return
    # Not splitlines(): it also breaks at form feeds and other signs that may stand in a prompt
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _json_row(line) if path.suffix.lower() == ".jsonl" else {"prompt": line.strip()}


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        for values in reader:
            if any(value.strip() for value in values):
                yield reader.line_num, _named(header, values)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not csv ({error}); put texts with commas or quotes in double quotes.") from None


def _check_header(path: Path, header: list[str]) -> None:
    strangers = [name for name in header if name not in FIELDS]
    if strangers or "prompt" not in header or len(set(header)) != len(header):
        raise InputError(
            f"{path} begins with {', '.join(map(repr, header)) or 'nothing'}; expected the names of its columns: prompt, and any of "
            f"{', '.join(FIELDS[1:])}."
        )


def _named(header: list[str], values: list[str]) -> Mapping[str, Any] | str:
    if len(values) != len(header):
        return f"{len(values)} values for {len(header)} columns; put texts with commas in double quotes."
    return {name: value for name, value in zip(header, values) if name == "prompt" or value.strip()}


def _json_row(line: str) -> Mapping[str, Any] | str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})."
    if isinstance(found, str):
        return {"prompt": found}
    return found if isinstance(found, dict) else f"a {type(found).__name__}; expected an object or a string."


def _checked(values: Mapping[str, Any] | str, defaults: Defaults) -> dict[str, Any]:
    """A row's values with the defaults filled in; raises InputError for what can't be drawn."""
    if isinstance(values, str):
        raise InputError(values)
    strangers = sorted(name for name in values if name not in FIELDS)
    if strangers:
        raise InputError(f"unknown field {', '.join(map(repr, strangers))}; expected {', '.join(FIELDS)}.")
    given = {name: value for name, value in values.items() if value is not None}
    found: dict[str, Any] = {name: given.get(name, getattr(defaults, name, None)) for name in FIELDS}
    found["seed"] = given.get("seed")
    for name in ("prompt", "negative"):
        if not isinstance(found[name], str):
            raise InputError(f"{name} is {found[name]!r}; expected a text.")
        if not _is_unicode(found[name]):
            raise InputError(f"{name} is {found[name][:60]!a}, which holds half of a character; write it whole.")
    found["prompt"], found["negative"] = found["prompt"].strip(), found["negative"].strip()
    if not found["prompt"]:
        raise InputError("the prompt is empty.")
    if found["seed"] is not None:
        found["seed"] = _whole("seed", found["seed"], 0, LARGEST_SEED)
    found["steps"] = _whole("steps", found["steps"], 1, MAX_STEPS)
    found["images"] = _whole("images", found["images"], 1, MAX_IMAGES)
    found["guidance"] = _number("guidance", found["guidance"], 0, 1e4)
    found["width"], found["height"] = check_size(*(_whole(side, found[side], 1, MAX_SIDE) for side in ("width", "height")))
    return found


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell halves of a surrogate pair, which no file can hold
        return False
    return True


def _whole(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
        raise InputError(f"{name} is {value!r}; expected a whole number, {low} to {high}.")
    return number


def _number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None or not low <= number < high:
        raise InputError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}.")
    return number


def without_place(picture: Picture) -> Picture:
    """The picture alone, wherever its row stands and whatever it is called."""
    return replace(picture, file="", row=0)
