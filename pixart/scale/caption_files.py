"""A folder's pictures and the texts that belong to them: a file beside each, or a field of metadata.jsonl."""
from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError
from ..training.data.folder import visible_files
from ..training.data.item import PICTURES
from .book import FOLDER, locked, write_text

METADATA, NAME_FIELD = "metadata.jsonl", "file_name"


def picture_names(folder: Path) -> list[str]:
    """Pictures below a folder, as paths from it with /, sorted; raises InputError for none."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with pictures.")
    found = [path.relative_to(folder).as_posix() for path in visible_files(folder) if path.suffix.lower() in PICTURES]
    if not found:
        raise InputError(f"{folder} holds no picture; expected files that end in {', '.join(PICTURES)}, in it or in its folders.")
    strange = [os.fsencode(name) for name in found if os.fsencode(name).decode(errors="replace") != name]
    if strange:
        raise InputError(f"{len(strange)} pictures in {folder} have names that are not UTF-8, such as {strange[0]!r}; rename them.")
    return sorted(found)


class Texts(Protocol):
    """Where the texts of pictures are."""

    def get(self, name: str) -> tuple[str, ...]:
        """The texts of a picture, () if it has none."""

    def put(self, found: Mapping[str, Sequence[str]]) -> None:
        """Keeps texts by picture; raises OSError."""


class TextFiles:
    """`name.txt` beside `name.png`, a text in each line."""

    def __init__(self, folder: Path, suffix: str, names: Sequence[str] = ()) -> None:
        self.folder, self.suffix = folder, suffix
        shared = [file for file, count in Counter(map(self._path, names)).items() if count > 1]
        if shared:
            raise InputError(f"Several pictures of one name share {shared[0]}; rename them, or keep the texts in a field: --to FIELD.")

    def get(self, name: str) -> tuple[str, ...]:
        """Lines that aren't empty."""
        try:
            text = self._path(name).read_text(encoding="utf-8-sig", errors="replace")
        except FileNotFoundError:
            return ()
        return tuple(line.strip() for line in text.split("\n") if line.strip())

    def put(self, found: Mapping[str, Sequence[str]]) -> None:
        """One file each."""
        for name, texts in found.items():
            lines = "".join(f"{text}\n" for text in texts)
            write_text(self._path(name), lines)

    def _path(self, name: str) -> Path:
        return (self.folder / name).with_suffix(self.suffix)


class Field:
    """A field of metadata.jsonl, as Hugging Face's imagefolder has it; a list if there are several texts."""

    def __init__(self, folder: Path, field: str) -> None:
        self.path, self.field = folder / METADATA, field
        if (folder / "metadata.csv").exists():
            raise InputError(f"{folder} has a metadata.csv; captions go to {METADATA}, and a folder can have one of both. Convert it.")
        self._rows: list[dict[str, Any]] = self._read()
        self._by_name = {row[NAME_FIELD]: row for row in self._rows}

    def get(self, name: str) -> tuple[str, ...]:
        """The field's texts that aren't empty."""
        value = self._by_name.get(name, {}).get(self.field)
        texts = value if isinstance(value, list) else [value]
        return tuple(_whole(text).strip() for text in texts if isinstance(text, str) and text.strip())

    def put(self, found: Mapping[str, Sequence[str]]) -> None:
        """Rewrites the file; other fields and rows stay as they are."""
        with locked(self.path.parent / FOLDER / "metadata.lock"):
            rows = self._read()  # anew: another run may have written it
            known = {row[NAME_FIELD]: row for row in rows}
            for name, texts in found.items():
                if name not in known:
                    known[name] = {NAME_FIELD: name}
                    rows.append(known[name])
                known[name][self.field] = texts[0] if len(texts) == 1 else list(texts)
            if found:
                write_text(self.path, "".join(map(_line, rows)))
            self._rows, self._by_name = rows, known

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is not UTF-8 text ({error}).") from None
        rows = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.path}, line {number}: not JSON ({error}).") from None
            if not isinstance(row, dict) or not isinstance(row.get(NAME_FIELD), str):
                raise InputError(f"{self.path}, line {number}: expected an object with a {NAME_FIELD}.")
            rows.append(row)
        return rows


def _line(row: Mapping[str, Any]) -> str:
    """A row of the file; halves of characters, which JSON can spell and UTF-8 can't hold, stay spelt."""
    text = json.dumps(row, ensure_ascii=False)
    return f"{text if _whole(text) == text else json.dumps(row)}\n"


def _whole(text: str) -> str:
    """The text with ? for halves of characters."""
    return text.encode(errors="replace").decode()


def texts_at(folder: Path, place: str, names: Sequence[str] = ()) -> Texts:
    """`.txt` and other endings are files beside the pictures, any other word is a field of metadata.jsonl; raises InputError."""
    if place.startswith("."):
        if Path(f"x{place}").suffix != place or place.lower() in PICTURES or "/" in place:
            raise InputError(f"{place!r} is not the ending of a text file; expected one like .txt, or the name of a field.")
        return TextFiles(folder, place, names)
    if not place or place == NAME_FIELD:
        raise InputError(f"{place!r} can't hold captions; expected the name of a field, or an ending like .txt.")
    return Field(folder, place)
