"""Captions from whatever a data set keeps them in: text files, fields of a table."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import DataError
from .item import Caption

USUAL_FIELDS = ("text", "caption", "prompt")  # the first that a table has, unless the recipe names others


def captions_of_file(path: Path) -> tuple[Caption, ...]:
    """One caption a line, each as likely; raises DataError for what is not UTF-8."""
    try:
        return captions_of_text(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"its captions in {path.name} can't be read as UTF-8 text ({error})") from None


def captions_of_text(text: str) -> tuple[Caption, ...]:
    """One caption a line."""
    return tuple(Caption(line.strip()) for line in text.split("\n") if line.strip())


def captions_of_row(row: Mapping[str, Any], fields: Mapping[str, float] | None) -> tuple[Caption, ...]:
    """The captions in a row's fields, each a text or a list of texts that share its weight; empty ones are left out."""
    if fields is None:
        fields = dict.fromkeys([name for name in USUAL_FIELDS if row.get(name)][:1], 1.0)
    found = []
    for name, weight in fields.items():
        value = row.get(name)
        texts = value if isinstance(value, list | tuple) else [] if value is None else [value]
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise DataError(f"its field {name} holds {wrong!r:.60}, which is not text")
        texts = [text.strip() for text in texts if text.strip()]
        found += [Caption(text, weight / len(texts)) for text in texts]
    return tuple(found)


def check_fields(fields: Mapping[str, float] | None, known: set[str], place: Path) -> None:
    """Raises DataError for caption fields that a whole table lacks."""
    missing = sorted(set(fields or ()) - known)
    if missing:
        raise DataError(f"{place} has no field {', '.join(missing)} for captions; it has {', '.join(sorted(known)) or 'none'}.")
