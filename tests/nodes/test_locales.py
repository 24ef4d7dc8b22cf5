"""Every language has every node, input and tooltip, and nothing else."""
from __future__ import annotations

import asyncio
import json
import re

import pytest

from tests.support import host

LOCALES = host.PACK_ROOT / "locales"
LANGUAGES = ("ar", "es", "fr", "ja", "ko", "ru", "tr", "zh", "zh-TW")  # that ComfyUI's frontend offers beside English
# What must stay as it is typed: names of files, nodes and menu values, commands, numbers
FIXED = re.compile(r"pip install [\w ]*\w|models/\w+|output/prompts|input/prompts|\b\w+\.(?:pth|json|safetensors)\b|PixArt\w+Loader\b|\b\d+(?:\.\d+)?\b")


def english() -> dict[str, dict]:
    """The nodes' own words, in the locales' form."""

    def entry(name: str, tooltip: str | None) -> dict[str, str]:
        return {"name": name} | ({"tooltip": tooltip} if tooltip else {})

    extension = asyncio.run(host.load_pack().comfy_entrypoint())
    found = {}
    for node in asyncio.run(extension.get_node_list()):
        schema = node.define_schema()
        words = {
            "display_name": schema.display_name, "description": schema.description,
            "inputs": {each.id: entry(each.id, each.tooltip) for each in schema.inputs},
            "outputs": {str(i): entry(each.display_name or each.io_type, each.tooltip) for i, each in enumerate(schema.outputs)},
        }  # fmt: skip
        found[schema.node_id] = {key: value for key, value in words.items() if value}
    return found


def leaves(tree: dict, path: str = "") -> dict[str, str]:
    out = {}
    for key, value in tree.items():
        out |= leaves(value, f"{path}/{key}") if isinstance(value, dict) else {f"{path}/{key}": value}
    return out


def read(language: str) -> dict[str, dict]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_all_languages_of_the_frontend_are_there() -> None:
    assert sorted(path.name for path in LOCALES.iterdir()) == sorted(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_complete_and_nothing_else(language: str) -> None:
    theirs, ours = leaves(english()), leaves(read(language))
    assert sorted(ours) == sorted(theirs)
    assert [key for key, text in ours.items() if not text.strip()] == []
    sentences = [key for key in theirs if key.endswith(("tooltip", "description"))]
    assert [key for key in sentences if ours[key] == theirs[key]] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_typed_is_not_translated(language: str) -> None:
    theirs, ours = leaves(english()), leaves(read(language))
    missing = {
        key: lost for key, text in theirs.items() if key.endswith(("tooltip", "description"))
        if (lost := [word for word in FIXED.findall(text) if word not in ours[key]])
    }  # fmt: skip
    assert missing == {}
