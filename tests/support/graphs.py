"""Reading and changing API graphs in tests."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from launch.client import ComfyClient, Graph


def node_of(graph: Graph, kind: str) -> dict[str, Any]:
    """Inputs of the only node of a class."""
    found = [node["inputs"] for node in graph.values() if node["class_type"] == kind]
    assert len(found) == 1, f"{len(found)} nodes of class {kind}"
    return found[0]


def id_of(graph: Graph, kind: str) -> str:
    """Id of the only node of a class."""
    found = [number for number, node in graph.items() if node["class_type"] == kind]
    assert len(found) == 1, f"{len(found)} nodes of class {kind}"
    return found[0]


def insert(graph: Graph, kind: str, **inputs: Any) -> str:
    """Add a node and return its id."""
    number = str(max(map(int, graph)) + 1)
    graph[number] = {"class_type": kind, "inputs": inputs}
    return number


def pictures(client: ComfyClient, graph: Graph) -> list[np.ndarray]:
    """Queue a graph; every saved picture as float (H, W, 3) in [0, 1], in the order of node ids."""
    outputs = client.run(graph)
    entries = [image for number in sorted(outputs, key=int) for image in outputs[number].get("images", [])]
    return [np.asarray(Image.open(io.BytesIO(client.image(entry))).convert("RGB"), np.float32) / 255 for entry in entries]


def picture(client: ComfyClient, graph: Graph) -> np.ndarray:
    """The only picture of a graph."""
    found = pictures(client, graph)
    assert len(found) == 1
    return found[0]
