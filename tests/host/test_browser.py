"""The workflows in the real frontend, in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from demo.workflows import screenshots
from launch.client import ComfyClient
from launch.host import Host
from tests.host.test_workflows import STEMS, read, specifications

pytestmark = pytest.mark.browser
CONVERT = "async () => (await window.app.graphToPrompt()).output"
BYPASS = "type => window.app.graph._nodes.filter(n => n.type === type).forEach(n => { n.mode = 4; })"
COUNT = "() => window.app.graph._nodes.find(n => n.title === 'Prompt').widgets.find(w => w.name === 'tokens').value"
UNKNOWN = "() => window.app.graph._nodes.map(n => n.type).filter(type => !(type in window.LiteGraph.registered_node_types))"


@pytest.fixture(scope="module")
def browser() -> None:
    """Skips where the browser can't be had."""
    pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if screenshots.find_browser() is None:
        pytest.skip("no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def page(browser: None, server: Host) -> Iterator[Any]:
    """The frontend, loaded."""
    with screenshots.frontend(server.url) as view:
        yield view


def stripped(graph: dict[str, Any]) -> dict[str, Any]:
    """An API graph without titles, numbers as floats, so that 1 and 1.0 are equal."""
    return {
        number: {
            "class_type": node["class_type"],
            "inputs": {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in node["inputs"].items()},
        }
        for number, node in graph.items()
    }


def with_defaults(graph: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """An API graph with the optional widgets that it leaves out, which the frontend always writes."""
    filled = {}
    for number, node in graph.items():
        optional = specifications(object_info[node["class_type"]]).items()
        defaults = {name: options["default"] for name, (_, options, required) in optional if not required and "default" in options}
        filled[number] = {**node, "inputs": {**defaults, **node["inputs"]}}
    return filled


@pytest.fixture(scope="module")
def object_info(server: Host) -> dict[str, Any]:
    """The host's description of its nodes."""
    return server.client.get_json("/object_info")


@pytest.mark.parametrize("stem", STEMS)
def test_the_frontend_turns_each_workflow_into_its_api_graph(page: Any, object_info: dict[str, Any], stem: str) -> None:
    page.evaluate(screenshots.LOAD, read(f"{stem}.json"))
    assert stripped(page.evaluate(CONVERT)) == stripped(with_defaults(read(f"api/{stem}.json"), object_info))


def test_bypassing_kv_compression_leaves_the_graph_without_it(page: Any, object_info: dict[str, Any]) -> None:
    """As Ctrl+B does: what it was given goes to those it gave to."""
    page.evaluate(screenshots.LOAD, read("sigma-2k-kv.json"))
    page.evaluate(BYPASS, "PixArtKVCompress")
    expected = with_defaults(read("api/sigma-2k-kv.json"), object_info)
    patch = next(number for number, node in expected.items() if node["class_type"] == "PixArtKVCompress")
    model = expected.pop(patch)["inputs"]["model"]
    for node in expected.values():
        node["inputs"] = {name: model if value == [patch, 0] else value for name, value in node["inputs"].items()}
    assert stripped(page.evaluate(CONVERT)) == stripped(expected)


def test_every_node_is_known_to_the_frontend(page: Any) -> None:
    for stem in STEMS:
        page.evaluate(screenshots.LOAD, read(f"{stem}.json"))
        assert page.evaluate(UNKNOWN) == []


def test_the_demo_graph_is_queued_by_a_click(page: Any, server: Host, client: ComfyClient, object_info: dict[str, Any]) -> None:
    graph = read("demo.json")
    fresh = screenshots.fresh_page(page.context.browser, server.url)
    fresh.evaluate(screenshots.LOAD, graph)
    run = screenshots.click_run(fresh, client)
    assert run["status"]["status_str"] == "success"
    assert any(shown.get("images") for shown in run["outputs"].values())
    assert len(screenshots.screenshot(fresh, graph)) > 20_000
    assert any(character.isdigit() for character in fresh.evaluate(COUNT))
    expected = with_defaults(read("api/demo.json"), object_info)
    assert stripped(fresh.evaluate(CONVERT)) == stripped(expected)  # what is shown is not queued
