"""The page in headless Chromium: draw, watch, cancel, wait in line; narrow, by keyboard alone, asking nothing of other machines."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.data.reader import read_picture, relation_holds
from demo.workflows import screenshots
from pixart.app.pictures import read_settings
from tests.support.page import Server

pytestmark = pytest.mark.browser
PROMPT, SEED = "a red circle above a blue square", 4
STATUS = "#pixart-status"
SECONDS = 120_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, or a skip where it can't be had."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    binary = screenshots.find_browser()
    if binary is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as engine:
        found = engine.chromium.launch(executable_path=binary, args=screenshots.FLAGS)
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the page as another visitor each time; fails for errors in the page and requests to other machines."""
    contexts, wrong = [], []

    def open_page(width: int = 1280, height: int = 900) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith((server.url, "data:", "blob:")) else wrong.append(request.url))
        page.goto(server.url)
        wait_until_ready(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def wait_until_ready(page: Any) -> None:
    """Until the form is there, with the seed that each visit begins with."""
    page.wait_for_function("() => Number(document.querySelector('#pixart-seed input')?.value) > 0")


def settle(page: Any, text: str) -> str:
    """Waits until the status holds `text`, and returns it."""
    page.wait_for_function("text => document.querySelector('#pixart-status').innerText.includes(text)", arg=text, timeout=SECONDS)
    return page.inner_text(STATUS)


def fill(page: Any, prompt: str = PROMPT, seed: int = SEED, pictures: int | None = None) -> None:
    page.fill("#pixart-prompt textarea", prompt)
    page.fill("#pixart-seed input", str(seed))
    if pictures is not None:
        page.get_by_label("number input for Pictures").fill(str(pictures))
        page.keyboard.press("Tab")


def download(page: Any, folder: Path, number: int = 0) -> Path:
    """The picture behind a link of the list of downloads."""
    with page.expect_download() as waiting:
        page.locator("a[download$='.png']").nth(number).click()
    path = folder / f"{number}.png"
    waiting.value.save_as(path)
    return path


def test_a_prompt_is_typed_drawn_and_read_back(visit, tmp_path):
    page = visit()
    fill(page)
    page.click("#pixart-draw")
    settle(page, "Step ")
    page.wait_for_selector("#pixart-status progress")
    bar = page.locator("#pixart-status progress")
    assert int(bar.get_attribute("max")) == 20 and int(bar.get_attribute("value")) >= 1
    preview = page.locator("img.pixart-preview")
    preview.wait_for()
    assert preview.evaluate("image => image.naturalWidth") == 32
    assert "Done: 1 picture." in settle(page, "Done")
    page.wait_for_function("() => [...document.querySelectorAll('#pixart-gallery img')].some(each => each.naturalWidth === 256)")
    picture = download(page, tmp_path)
    settings, model = read_settings(picture)
    assert (settings.prompt, settings.seed, settings.steps, settings.pictures) == (PROMPT, SEED, 20, 1)
    assert "pixart-demo-transformer" in model
    reading = read_picture(np.asarray(Image.open(picture).convert("RGB")))
    above, below = sorted(reading.objects, key=lambda found: found.center_y)
    assert (above.color, below.color, below.shape) == ("red", "blue", "square")
    assert relation_holds("above", above, below, reading.width, reading.height)


def test_a_picture_dropped_on_the_page_fills_the_form_again(visit, tmp_path):
    page = visit()
    fill(page, "a green star, small", 12)
    page.get_by_label("Style").click()
    page.get_by_role("option", name="woodcut").click()
    page.get_by_role("button", name="Sampling").click()
    page.get_by_label("Sampler").click()
    page.get_by_role("option", name="SA-Solver").click()
    page.wait_for_function("() => document.querySelector('input[aria-label=\"number input for Steps\"]').value === '25'")
    page.get_by_label("number input for Steps").fill("3")
    page.get_by_label("Wished width").fill("1000")
    page.get_by_label("Wished height").fill("250")
    page.keyboard.press("Tab")
    page.wait_for_function("() => [...document.querySelectorAll('input')].some(each => each.value === '512 x 128')")
    page.click("#pixart-draw")
    settle(page, "Done")
    picture = download(page, tmp_path)
    with Image.open(picture) as drawn:
        assert drawn.size == (512, 128)
    page.reload()
    wait_until_ready(page)
    page.get_by_role("button", name="Settings from a picture").click()
    page.set_input_files("#pixart-dropped input[type=file]", picture)
    assert "are in the form" in settle(page, "settings of that picture")
    assert page.input_value("#pixart-prompt textarea") == "a green star, small"
    assert page.input_value("#pixart-seed input") == "12"
    assert page.input_value("input[aria-label='Style']") == "woodcut"
    page.click("#pixart-draw")
    settle(page, "Done")
    again = download(page, tmp_path, 0)
    assert Image.open(again).tobytes() == Image.open(picture).tobytes()
    wrong = tmp_path / "foreign.png"
    Image.new("RGB", (8, 8)).save(wrong)
    page.get_by_role("button", name="Clear").first.click()
    page.set_input_files("#pixart-dropped input[type=file]", wrong)
    assert "no settings inside" in settle(page, "This picture")


def test_two_visitors_wait_their_turn_and_cancel(visit, server):
    first, second = visit(), visit()
    before = len([*server.output.glob("*.png")])
    fill(first, pictures=8)
    fill(second, "a blue star", 3)
    first.click("#pixart-draw")
    settle(first, "Step ")
    second.click("#pixart-draw")
    assert settle(second, "Waiting in line").strip() == "Waiting in line: 1 is before you."
    first.click("#pixart-cancel")
    assert settle(first, "Cancelled")
    settle(second, "Step ")
    settle(second, "Done: 1 picture.")
    assert len([*server.output.glob("*.png")]) - before < 8 and not [*server.output.glob("*.partial")]
    first.click("#pixart-draw")  # and the page is ready again
    settle(first, "Step ")
    first.click("#pixart-cancel")
    settle(first, "Cancelled")


def test_a_visitor_who_leaves_makes_room_for_the_next(visit, server):
    first, second = visit(), visit()
    before = len([*server.output.glob("*.png")])
    fill(first, pictures=8)
    first.click("#pixart-draw")
    settle(first, "Step ")
    first.close()
    fill(second, "a blue star", 3)
    second.click("#pixart-draw")
    settle(second, "Done: 1 picture.")
    assert len([*server.output.glob("*.png")]) - before < 8 + 1


def test_each_form_begins_with_a_seed_that_no_server_is_asked_for(visit):
    """An answer that comes late would write over what was typed meanwhile."""
    page, asked, seeds = visit(), [], set()
    page.on("request", lambda request: asked.append(request.url) if "queue/join" in request.url else None)
    for renew in (page.reload, page.reload, lambda: page.click("#pixart-reseed")):
        before = page.input_value("#pixart-seed input")
        renew()
        # An empty field, then 0, stand there until the page has drawn its seed.
        page.wait_for_function("before => ![before, '', '0'].includes(document.querySelector('#pixart-seed input')?.value)", arg=before)
        seeds.add(page.input_value("#pixart-seed input"))
    assert len(seeds) == 3 and all(0 <= int(seed) < 2**32 for seed in seeds) and asked == []


def test_an_error_is_a_sentence(visit, server):
    page = visit()
    page.click("#pixart-draw")
    assert settle(page, "prompt").strip() == "The prompt is empty; write what the picture should show."
    assert page.locator(f"{STATUS} [role=alert]").count() == 1
    fill(page, "<img src=x onerror=alert(1)>" * 400)
    page.click("#pixart-draw")
    found = settle(page, "characters").strip()  # a busy page adds a line break now and then
    assert re.fullmatch(r"prompt is 1120[01] characters; expected text of at most 10000 characters\.", found), found
    fill(page, seed=99999999999)
    page.click("#pixart-draw")
    assert settle(page, "seed").strip() == "seed is 99999999999; expected a whole number from 0 to 4294967295."
    page.get_by_label("Wished width").fill("99999")
    page.keyboard.press("Tab")
    page.get_by_text("width is 99999; expected 1 to 16384 pixels.").wait_for()
    assert "Traceback" not in page.inner_text("body") + server.log.read_text(encoding="utf-8")


def test_by_keyboard_alone(visit):
    """The prompt has the focus; Enter draws, Tab leads to Draw, Cancel and the settings, each with a visible focus."""
    page = visit()
    page.keyboard.type("a red circle")
    page.keyboard.press("Enter")
    settle(page, "Step ")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pixart-draw"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pixart-cancel"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    page.keyboard.press("Enter")
    settle(page, "Cancelled")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || '').trim()"))
    for name in ("Style", "Size (trained)", "New seed", "Sampling", "LoRA", "Settings from a picture"):
        assert any(name in each for each in reached), (name, reached)


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_narrow_screen_nothing_is_cut_and_the_picture_is_near_the_button(visit, width):
    page = visit(width, 740)
    fill(page)
    page.click("#pixart-draw")
    settle(page, "Step ")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    button, status = (page.locator(name).bounding_box() for name in ("#pixart-draw", STATUS))
    assert 0 <= status["y"] - (button["y"] + button["height"]) < 100  # before the settings, not after them
    page.click("#pixart-cancel")
    settle(page, "Cancelled")
    for name in ("#pixart-draw", "#pixart-cancel", "#pixart-prompt", "#pixart-seed"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
