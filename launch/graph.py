"""Setting a prompt, a seed and the like in workflow files, found by the title of their node."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import LaunchError

SETTINGS = {
    "prompt": ("Prompt", "text"),
    "negative": ("Negative prompt", "text"),
    "seed": ("Sampler", "seed"),
    "steps": ("Sampler", "steps"),
    "cfg": ("Sampler", "cfg"),
    "width": ("Size", "width"),
    "height": ("Size", "height"),
}


def load(path: Path) -> dict[str, Any]:
    """A workflow file, UI or API format."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchError(f"the workflow {path} can't be read ({error}). Restore it with git checkout -- workflows") from None


def configure(graph: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Write settings (names of SETTINGS) into an API graph."""
    for name, value in settings.items():
        title, key = SETTINGS[name]
        found = [node for node in graph.values() if node.get("_meta", {}).get("title") == title]
        if len(found) != 1 or key not in found[0]["inputs"]:
            raise LaunchError(f"the workflow has {len(found)} nodes titled {title!r} with an input {key!r}, one is needed to set {name}.")
        found[0]["inputs"][key] = value


def configured_workflow(workflow: Mapping[str, Any], graph: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a UI workflow whose widgets show the values of the API graph with the same node ids."""
    result = copy.deepcopy(dict(workflow))
    for node in result["nodes"]:
        inputs = graph.get(str(node["id"]), {}).get("inputs", {})
        position = 0
        for slot in node.get("inputs", []):
            if "widget" not in slot:
                continue
            if slot["name"] in inputs and not isinstance(inputs[slot["name"]], list):
                node["widgets_values"][position] = inputs[slot["name"]]
            position += 2 if slot["name"] in ("seed", "noise_seed") else 1  # the seed has a control beside it
    return result
