"""A picture of the page of `python -m pixart app`, taken while it draws: `python -m demo.workflows.page` writes demo/results/page.jpg."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import torch
from PIL import Image

from launch.errors import LaunchError
from launch.host import free_port
from pixart.app import server

from .. import LORAS, RESULTS, WEIGHTS
from .screenshots import FLAGS, find_browser

TARGET = RESULTS / "page.jpg"
PROMPTS = (
    ("a red circle above a blue square", 1),
    ("a yellow circle left of a green triangle", 4),
    ("a purple diamond inside an orange square", 7),  # the one that is being drawn
)
SIZE = {"width": 1200, "height": 860}
SHOWN = "count => document.querySelectorAll('#pixart-gallery img').length >= count"
STEP = "step => Number(document.querySelector('#pixart-status progress')?.value) >= step"
SEEN = 6  # steps after which the preview shows what is meant


def shoot(url: str) -> bytes:
    """PNG of the page with pictures of all prompts but the last, which is being drawn."""
    from playwright.sync_api import sync_playwright

    binary = find_browser()
    if binary is None:
        raise LaunchError("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as engine:
        page = engine.chromium.launch(executable_path=binary, args=FLAGS).new_page(viewport=SIZE)
        page.goto(url)
        page.wait_for_function("() => Number(document.querySelector('#pixart-seed input')?.value) > 0")
        *earlier, last = PROMPTS
        for count, (prompt, seed) in enumerate(earlier, 1):
            page.fill("#pixart-prompt textarea", prompt)
            page.fill("#pixart-seed input", str(seed))
            page.click("#pixart-draw")
            page.wait_for_function(SHOWN, arg=count, timeout=60_000)
        page.fill("#pixart-prompt textarea", last[0])
        page.fill("#pixart-seed input", str(last[1]))
        page.click("#pixart-draw")
        page.wait_for_function(STEP, arg=SEEN, timeout=60_000)
        return page.screenshot()


def main() -> None:
    """Serves the demo model for the picture alone, on one thread: else it has drawn before the page shows a step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder = server.prepare(Path(work))
        from pixart.app.line import Line
        from pixart.app.model import Model, Places

        places = Places(WEIGHTS["diffusion_models"], WEIGHTS["text_encoders"], WEIGHTS["vae"], loras=LORAS)
        with server.serving(Line(Model(places), folder), folder, server.Address(port=free_port())) as url:
            picture = Image.open(io.BytesIO(shoot(url))).convert("RGB")
    picture.save(TARGET, quality=80, optimize=True)


if __name__ == "__main__":
    main()
