"""The workflows in the real frontend, in headless Chromium."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.launch.client import ComfyClient
from demo.launch.host import Host
from quickstart import BROWSERS
from tests.host.test_workflows import STEMS, read

pytestmark = pytest.mark.browser
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LOAD = "async graph => { await window.app.loadGraphData(graph); }"
UNKNOWN = "() => window.app.graph._nodes.map(n => n.type).filter(type => !(type in window.LiteGraph.registered_node_types))"
CONVERT = "async () => (await window.app.graphToPrompt()).output"


def open_frontend(view: Any, server: Host) -> None:
    """Load the page and wait until graphs can be loaded."""
    view.goto(server.url)
    view.wait_for_function("() => window.app && window.app.graph && window.app.vueAppReady", timeout=120_000)


@pytest.fixture(scope="module")
def page(server: Host) -> Iterator[Any]:
    """The frontend, loaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=binary, args=FLAGS)
        view = browser.new_page(viewport={"width": 1920, "height": 1080})
        open_frontend(view, server)
        yield view
        browser.close()


def stripped(graph: dict[str, Any]) -> dict[str, Any]:
    """An API graph without titles, numbers as floats, so that 1 and 1.0 are equal."""
    return {
        number: {
            "class_type": node["class_type"],
            "inputs": {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in node["inputs"].items()},
        }
        for number, node in graph.items()
    }


@pytest.mark.parametrize("stem", STEMS)
def test_the_frontend_turns_each_workflow_into_its_api_graph(page: Any, stem: str) -> None:
    page.evaluate(LOAD, read(f"{stem}.json"))
    assert stripped(page.evaluate(CONVERT)) == stripped(read(f"api/{stem}.json"))


def test_every_node_is_known_to_the_frontend(page: Any) -> None:
    for stem in STEMS:
        page.evaluate(LOAD, read(f"{stem}.json"))
        assert page.evaluate(UNKNOWN) == []


def test_the_demo_graph_is_queued_by_a_click(server: Host, page: Any, client: ComfyClient, tmp_path: Path) -> None:
    open_frontend(page, server)  # no dialogs left from other graphs
    graph = read("demo.json")
    page.evaluate(LOAD, graph)
    before = set(client.get_json("/history"))
    page.locator("[data-testid='queue-button'], .comfyui-queue-button button").first.click()
    run = next_run(client, before)
    assert run["status"]["status_str"] == "success"
    assert any(shown.get("images") for shown in run["outputs"].values())
    page.evaluate("() => window.app.canvas.fitViewToSelectionAnimated?.() ?? window.app.canvas.setDirty(true, true)")
    page.wait_for_timeout(2000)
    screenshot = Path(os.environ.get("PIXART_SCREENSHOT", tmp_path / "demo.png"))
    page.screenshot(path=str(screenshot))
    assert screenshot.stat().st_size > 20_000


def next_run(client: ComfyClient, before: set[str], seconds: float = 300) -> dict[str, Any]:
    """The history entry of the first run that is not in `before`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for number, run in client.get_json("/history").items():
            if number not in before and run.get("status", {}).get("status_str"):
                return run
        time.sleep(0.3)
    raise AssertionError("the click queued nothing, or it did not finish")
