"""From an API graph to the UI format of ComfyUI's frontend (schema 0.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COLUMN_WIDTH = 420
ROW_HEIGHTS = {
    "PixArtTextEncode": 260, "PixArtResolution": 260, "KSampler": 320, "SaveImage": 360, "LoadImage": 380, "VAEDecodeTiled": 240,
    "KSamplerAdvanced": 400, "SamplerCustom": 320, "ControlNetApplyAdvanced": 280, "SamplerSASolver": 340, "CLIPTextEncodeSDXLRefiner": 300,
    "VAEEncodeTiled": 240, "PixArtKVCompress": 320,
}  # fmt: skip
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass(frozen=True)
class Placement:
    """Where a node stands, and the models its missing-files dialog offers."""

    column: int
    row: int
    models: list[dict[str, str]] = field(default_factory=list)


def to_ui(graph: Mapping[str, Any], object_info: Mapping[str, Any], places: Mapping[str, Placement], note: str) -> dict[str, Any]:
    """The UI workflow of an API graph: same ids and titles, a note beside the loaders."""
    links: list[list[Any]] = []
    nodes = []
    for order, (number, node) in enumerate(graph.items()):
        info = object_info[node["class_type"]]
        inputs, values = _inputs(int(number), node, info, graph, object_info, links)
        properties: dict[str, Any] = {"Node name for S&R": node["class_type"]}
        if places[number].models:
            properties["models"] = places[number].models
        nodes.append({
            "id": int(number), "type": node["class_type"], "title": node["_meta"]["title"],
            "pos": _position(places, number, graph), "size": [360, _height(node["class_type"]) - 60], "flags": {}, "order": order,
            "mode": 0, "inputs": inputs, "outputs": _outputs(info), "properties": properties, "widgets_values": values,
        })  # fmt: skip
    for number, source, slot, *_ in links:
        nodes[source - 1]["outputs"][slot]["links"].append(number)
    nodes.append(_note(len(nodes) + 1, note))
    return {
        "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links,
        "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def _inputs(
    number: int, node: Mapping[str, Any], info: Mapping[str, Any], graph: Mapping[str, Any],
    object_info: Mapping[str, Any], links: list[list[Any]],
) -> tuple[list[dict[str, Any]], list[Any]]:  # fmt: skip
    """The input slots and widget values of a node; appends its incoming links."""
    slots: list[dict[str, Any]] = []
    values: list[Any] = []
    described = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    for name, spec in described.items():
        kind = "COMBO" if isinstance(spec[0], list) else spec[0]
        options = spec[1] if len(spec) > 1 else {}
        given = node["inputs"].get(name)
        slot: dict[str, Any] = {"name": name, "type": kind, "link": None}
        if isinstance(given, list):
            source, output = int(given[0]), given[1]
            links.append([len(links) + 1, source, output, number, len(slots), _output_type(graph[given[0]], output, object_info)])
            slot["link"] = len(links)
        if kind in WIDGET_TYPES and not options.get("forceInput"):
            slot["widget"] = {"name": name}
            values += _widget_values(given, options)
        slots.append(slot)
    return slots, values


def _widget_values(given: Any, options: Mapping[str, Any]) -> list[Any]:
    """What the frontend stores for one input: its value and the widget it adds beside it."""
    value = options.get("default") if given is None or isinstance(given, list) else given
    if options.get("control_after_generate"):
        return [value, "fixed"]
    return [value, "image"] if options.get("image_upload") else [value]


def _output_type(source: Mapping[str, Any], output: int, object_info: Mapping[str, Any]) -> str:
    return object_info[source["class_type"]]["output"][output]


def _outputs(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = info.get("output_name") or info["output"]
    return [{"name": name, "type": kind, "links": []} for name, kind in zip(names, info["output"], strict=True)]


def _height(kind: str) -> int:
    return ROW_HEIGHTS.get(kind, 190)


def _position(places: Mapping[str, Placement], number: str, graph: Mapping[str, Any]) -> list[int]:
    """Below every node of the same column that stands in an earlier row."""
    here = places[number]
    above = [n for n, place in places.items() if place.column == here.column and place.row < here.row]
    return [here.column * COLUMN_WIDTH, sum(_height(graph[n]["class_type"]) for n in above)]


def _note(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number, "type": "Note", "title": "Where the weights belong", "pos": [-480, 0], "size": [440, 340], "flags": {},
        "order": 0, "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text],
    }  # fmt: skip
