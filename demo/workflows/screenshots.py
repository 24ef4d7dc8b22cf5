"""The frontend in headless Chromium, and pictures of workflows taken there: `python -m demo.workflows.screenshots [STEM ...]` writes
workflows/*.jpg.

Workflows of the demo models show the graph after a run; the others, whose weights are not here, before one.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from launch import checkout, host
from launch.client import ComfyClient
from launch.environment import BROWSERS
from launch.errors import LaunchError

from .. import DISTILLED

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
READY = "() => window.app && window.app.graph && window.app.vueAppReady"
LOAD = "async graph => { await window.app.loadGraphData(graph); }"
FRAME = """([scale, x, y]) => {
    const view = window.app.canvas.ds;
    view.scale = scale; view.offset[0] = x; view.offset[1] = y;
    window.app.canvas.setDirty(true, true);
}"""
# Banners, messages, bars: all but the canvas and the text fields that lie on it
ONLY_THE_GRAPH = """() => {
    const canvas = window.app.canvas.canvas;
    window.app.canvas.show_info = false;
    for (const each of document.querySelectorAll("body *"))
        if (!each.contains(canvas) && !each.closest(".dom-widget") && !each.querySelector(".dom-widget")) each.style.visibility = "hidden";
    const place = canvas.getBoundingClientRect();
    return [place.left, place.top];
}"""
# Messages at the upper right, e.g. that a newer frontend exists, lie over the Run button
CLOSE_MESSAGES = "() => document.querySelectorAll('.p-toast button').forEach(each => each.click())"
RUN_BUTTON = "[data-testid='queue-button'], .comfyui-queue-button button"
PICTURE_WIDTH = 1600
PATIENCE = 300_000  # milliseconds; the page loads hundreds of scripts from a host that may be busy
WITH_WEIGHTS = (
    "demo", "img2img", "inpaint", "batch", "controlnet-demo", "lora-stack", "pag", "regional-prompts", "sa-solver", "lcm-demo", "dmd-demo",
)  # fmt: skip
NEEDED = {f"{kind}-demo": path for kind, path in DISTILLED.items()}  # made by training


def find_browser() -> str | None:
    """Path of a Chromium on this machine."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def frontend(url: str, width: int = 1920, height: int = 1080) -> Iterator[Page]:
    """The host's page in a new browser, ready to load graphs."""
    from playwright.sync_api import sync_playwright

    binary = find_browser()
    if binary is None:
        raise LaunchError("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=binary, args=FLAGS)
        try:
            yield fresh_page(browser, url, width, height)
        finally:
            browser.close()


def fresh_page(browser: Browser, url: str, width: int = 1920, height: int = 1080) -> Page:
    """A page that remembers nothing: the frontend would open the graphs of the last visit, some time after READY."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.wait_for_function(READY)
    return page


def click_run(page: Page, client: ComfyClient, seconds: float = 300) -> dict[str, Any]:
    """Click the Run button; the history entry of the run it starts, once that is over."""
    before = set(client.get_json("/history"))
    page.evaluate(CLOSE_MESSAGES)
    page.locator(RUN_BUTTON).first.click()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for number, run in client.get_json("/history").items():
            if number not in before and run.get("status", {}).get("status_str"):
                return run
        time.sleep(0.3)
    raise LaunchError(f"no run finished within {seconds:.0f} s of the click")


def screenshot(page: Page, graph: dict[str, Any], width: int = 2400) -> bytes:
    """PNG of the graph alone, without the frontend around it."""
    margin, title, edges = 30, 40, 300  # pixels around the graph, a node's title in its units, room for the frontend's bars
    left, top = (min(node["pos"][axis] for node in graph["nodes"]) for axis in (0, 1))
    right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in graph["nodes"]) for axis in (0, 1))
    scale = (width - 2 * margin) / (right - left)
    height = round((bottom - top + title) * scale) + 2 * margin
    page.set_viewport_size({"width": width + edges, "height": height + edges})
    page.wait_for_timeout(500)
    x, y = page.evaluate(ONLY_THE_GRAPH)
    page.evaluate(FRAME, [scale, margin / scale - left, margin / scale + title - top])
    page.wait_for_timeout(1500)
    return page.screenshot(clip={"x": x, "y": y, "width": width, "height": height})


def draw(server: host.Host, file: Path) -> None:
    """Write the .jpg beside a workflow."""
    graph = json.loads(file.read_text(encoding="utf-8"))
    with frontend(server.url, 2400, 1200) as page:
        page.evaluate(LOAD, graph)
        if file.stem in WITH_WEIGHTS and NEEDED.get(file.stem, file).is_file():
            click_run(page, server.client)
        image = Image.open(io.BytesIO(screenshot(page, graph))).convert("RGB")
    height = round(image.height * PICTURE_WIDTH / image.width)
    image.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS).save(file.with_suffix(".jpg"), quality=85)


def stand_ins(folder: Path, file: Path) -> None:
    """Empty files named as the weights of a workflow, so that the frontend shows no errors for them."""
    for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
        for model in node["properties"].get("models", []):
            target = folder / "models" / model["directory"] / model["name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()


def main() -> None:
    """Write a picture beside every workflow, or beside those named as arguments."""
    wanted = sys.argv[1:]
    python = Path(sys.executable)
    comfyui = checkout.find_comfyui(ROOT) or checkout.pypi_comfyui(python, ROOT / ".quickstart")
    files = [file for file in sorted((ROOT / "workflows").glob("*.json")) if not wanted or file.stem in wanted]
    with tempfile.TemporaryDirectory() as folder:
        base = checkout.BaseDirectory(Path(folder))
        base.prepare(ROOT, {}, (ROOT / "demo/inputs").glob("*.png"))
        for file in files:
            stand_ins(base.folder, file)
        with host.Host(python, comfyui, base.folder, cpu=True) as server:
            for file in files:
                draw(server, file)


if __name__ == "__main__":
    main()
