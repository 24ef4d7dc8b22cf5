"""`-k word` begins at once: files in which no test was named so the last time are not even imported.

The names of every test are kept in pytest's cache, by file. A file that changed since, or is new, is imported as ever; so is
everything where no known name has the word, or the expression says "not".
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

KEY = "pixart/names"
OPERATORS = {"and", "or"}


def words_of(expression: str) -> set[str]:
    """What a test's name must have one of; empty where that can't be told."""
    words = {word.lower() for word in re.findall(r"[^\s()]+", expression)}
    return set() if "not" in words else words - OPERATORS


def names_of(item: pytest.Item) -> Iterable[str]:
    """What pytest compares with -k."""
    for node in item.listchain():
        yield node.name
        yield from node.extra_keyword_matches
        yield from (mark.name for mark in node.own_markers)


class KnownNames:
    """A plugin of pytest; see the module."""

    def __init__(self, config: pytest.Config) -> None:
        self.root, self.cache = config.rootpath, config.cache
        self.known: dict[str, dict] = self.cache.get(KEY, {})
        words = words_of(config.option.keyword)
        self.passed_over = {name for name, entry in self.known.items() if self._is_current(name) and not self._has(entry, words)}
        if not words or self.passed_over == set(self.known):
            self.passed_over = set()
        self.parts = any("::" in argument for argument in config.args)

    def _is_current(self, name: str) -> bool:
        path = self.root / name
        return path.is_file() and self.known[name]["time"] == path.stat().st_mtime_ns

    def _has(self, entry: dict, words: set[str]) -> bool:
        return any(word in entry["names"] for word in words)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """A folder too, since its conftest may import much; None leaves it to pytest."""
        if not self.passed_over or not collection_path.is_relative_to(self.root):
            return None
        if collection_path.is_file():
            return collection_path.relative_to(self.root).as_posix() in self.passed_over or None
        inside = {path.relative_to(self.root).as_posix() for path in collection_path.rglob("test_*.py")}
        return bool(inside) and inside <= self.passed_over or None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Before -k leaves any out; not where a single test was asked for, nor in each of several processes."""
        if self.parts or getattr(config, "workerinput", {}).get("workerid", "gw0") != "gw0":
            return
        found: dict[str, set[str]] = {}
        for item in items:
            found.setdefault(item.path.relative_to(self.root).as_posix(), set()).update(names_of(item))
        times = {name: (self.root / name).stat().st_mtime_ns for name in found}
        known = {name: entry for name, entry in self.known.items() if (self.root / name).is_file()}
        new = {name: {"time": times[name], "names": "\n".join(sorted(names)).lower()} for name, names in found.items()}
        self.cache.set(KEY, known | new)
