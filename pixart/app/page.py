"""The page: a prompt, a button, settings for those who want them, and what was drawn."""
from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..bins import nearest_bin
from ..errors import PixArtError
from ..samplers import SAMPLERS, SASolver
from .line import Job, Line
from .pictures import read_settings
from .settings import LIMITS, MOST_PICTURES, NO_LORA, Offer, Settings
from .status import describe, message
from .styles import NO_STYLE, STYLES

MOST_SHOWN = 60
PAUSE = 0.15  # seconds between two looks at a job
HELLO = "Write what the picture should show, then press Enter."
# 0 to LARGEST_SEED. In the browser: a server's answer would come late and write over what was typed meanwhile.
NEW_SEED = "() => crypto.getRandomValues(new Uint32Array(1))[0]"
SA_FIELDS = ("predictor_order", "corrector_order", "eta")
CSS = """
.pixart-said, .pixart-done, .pixart-failed { font-size: 1.05em; padding: .5em 0; overflow-wrap: anywhere }
.pixart-failed { color: #b42318; font-weight: 600 } .dark .pixart-failed { color: #fda29b }
.pixart-note { opacity: .85; margin: .3em 0; overflow-wrap: anywhere }
.pixart-preview { max-width: 100%; height: auto; margin-top: .5em; border-radius: 6px }
#pixart-gallery .grid-wrap { max-height: none; height: auto }
@media (min-width: 800px) {
  #pixart-grid { display: grid; grid-template: "wish drawn" auto "settings drawn" 1fr / 1fr 1fr; align-items: start }
  #pixart-wish { grid-area: wish } #pixart-drawn { grid-area: drawn } #pixart-settings { grid-area: settings }
}
#pixart-status progress { width: 100%; height: 1em }
.gradio-container button:focus-visible, .gradio-container textarea:focus-visible, .gradio-container input:focus-visible
{ outline: 3px solid #2970ff !important; outline-offset: 1px }
"""
SYSTEM_FONTS = ("system-ui", "sans-serif")  # Gradio's own come from a server of fonts
MONOSPACE = ("ui-monospace", "monospace")


def theme() -> gr.Theme:
    """Gradio's default in fonts that every machine has."""
    return gr.themes.Default(font=SYSTEM_FONTS, font_mono=MONOSPACE)


def build_page(line: Line) -> gr.Blocks:
    """All of the page; `server.serve` shows it."""
    return _Page(line).blocks


class _Page:
    """Components by the field of Settings that they hold, and the functions that join them."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.jobs: dict[str, Job] = {}  # by visitor
        offer = line.model.offer
        with gr.Blocks(title="PixArt", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            gr.Markdown(f"# PixArt\n{offer.title}")
            with gr.Column(elem_id="pixart-grid"):
                with gr.Column(elem_id="pixart-wish"):
                    self.form = self._build_wish()
                with gr.Column(elem_id="pixart-drawn"):
                    self.status = gr.HTML(message(HELLO), elem_id="pixart-status")
                    self.gallery = gr.Gallery(
                        label="Pictures", columns=2, object_fit="contain", height="auto", interactive=False,
                        buttons=["download", "fullscreen"], elem_id="pixart-gallery",
                    )  # fmt: skip
                    self.files = gr.File(label="Download, settings inside", file_count="multiple", interactive=False, visible=False)
                with gr.Column(elem_id="pixart-settings"):
                    self.form |= self._build_settings(offer)
            self.drawn = gr.State([])  # paths of this visitor's pictures, the newest first
            self._join()

    def _build_wish(self) -> dict[str, gr.components.Component]:
        prompt = gr.Textbox(
            label="Prompt", placeholder="a red circle above a blue square", lines=1, max_lines=6, autofocus=True, elem_id="pixart-prompt"
        )
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", min_width=120, elem_id="pixart-draw")
            self.cancel = gr.Button("Cancel", variant="stop", min_width=120, elem_id="pixart-cancel")
        return {"prompt": prompt}

    def _build_settings(self, offer: Offer) -> dict[str, gr.components.Component]:
        sampler = SAMPLERS[offer.samplers[0]]
        form: dict[str, Any] = {"style": gr.Dropdown([*STYLES], value=NO_STYLE, label="Style")}
        form["negative"] = gr.Textbox(label="Negative prompt", info="What the picture should not show", lines=1, max_lines=4)
        form |= self._build_size(offer)
        with gr.Row():
            # Without limits: Gradio would name neither the field nor what it expects, `Settings` does
            form["seed"] = gr.Number(label="Seed", precision=0, min_width=160, elem_id="pixart-seed")
            self.reseed = gr.Button("New seed", min_width=120, elem_id="pixart-reseed")
            form["pictures"] = gr.Slider(1, MOST_PICTURES, value=1, step=1, label="Pictures", min_width=200)
        with gr.Accordion("Sampling", open=False):
            titles = [(SAMPLERS[name].title, name) for name in offer.samplers]
            form["sampler"] = gr.Dropdown(titles, value=sampler.name, label="Sampler")
            form["steps"] = gr.Slider(*LIMITS["steps"], value=sampler.steps, step=1, label="Steps")
            form["guidance"] = gr.Slider(*LIMITS["guidance"], value=sampler.guidance, step=0.1, label="Guidance", info="1 or less: off")
            with gr.Group(visible=sampler is SASolver) as self.sa_group:
                usual = SASolver()
                for name, label in zip(SA_FIELDS, ("SA-Solver: predictor order", "SA-Solver: corrector order", "SA-Solver: noise")):
                    form[name] = gr.Slider(*LIMITS[name], value=getattr(usual, name), step=0.05 if name == "eta" else 1, label=label)
        with gr.Accordion("LoRA", open=False, visible=bool(offer.loras)):
            form["lora"] = gr.Dropdown([NO_LORA, *offer.loras], value=NO_LORA, label="LoRA")
            form["strength"] = gr.Slider(*LIMITS["strength"], value=1, step=0.05, label="Strength")
        with gr.Accordion("Settings from a picture", open=False):
            self.dropped = gr.File(label="Drop a picture that this page has drawn", file_types=[".png"], elem_id="pixart-dropped")
        return form

    def _build_size(self, offer: Offer) -> dict[str, gr.components.Component]:
        """The trained sizes, and the two sides of a wished one, which chooses the nearest of them."""
        start = _nearest(offer, offer.base_size, offer.base_size)
        with gr.Row():
            size = gr.Dropdown([*map(_size_text, offer.sizes)], value=start, label="Size (trained)", min_width=140)
            self.wished = [
                gr.Number(offer.base_size, label=f"Wished {side}", precision=0, min_width=100) for side in ("width", "height")
            ]
        return {"size": size}

    def _join(self) -> None:
        """Events. All run at once: the one line that counts is the model's."""
        free = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        outputs = [self.status, self.gallery, self.files, self.drawn]
        form = [*self.form.values()]
        gr.on([self.draw.click, self.form["prompt"].submit], self._draw, [self.drawn, *form], outputs, **free)
        self.cancel.click(self._cancel, None, None, **free)
        gr.on([self.reseed.click, self.blocks.load], None, None, self.form["seed"], js=NEW_SEED, **free)
        self.form["sampler"].input(_of_sampler, self.form["sampler"], [self.form["steps"], self.form["guidance"], self.sa_group], **free)
        gr.on([each.change for each in self.wished], self._choose_size, self.wished, self.form["size"], **free)
        self.dropped.upload(self._refill, self.dropped, [self.status, self.sa_group, *form], **free)
        self.blocks.unload(self._cancel)

    async def _draw(self, request: gr.Request, drawn: list[str], *values: Any) -> AsyncIterator[list[Any]]:
        """Joins the line and tells of the job until it ends; a visitor who goes away takes it along."""
        visitor = str(request.session_hash)
        earlier = self.jobs.get(visitor)
        if earlier is not None and earlier.outcome is None:
            yield [gr.skip()] * 4
            return
        try:
            job = self.line.join(self._settings(values))
        except PixArtError as error:
            yield [message(str(error), "failed"), gr.skip(), gr.skip(), gr.skip()]
            return
        self.jobs[visitor] = job
        try:
            shown, count = "", 0
            while True:
                ended, pictures = job.outcome is not None, [*map(str, job.pictures)]  # in this order: the last picture is not missed
                text = describe(job, self.line.model.preview)
                if text != shown or len(pictures) != count:
                    rest = [gr.skip()] * 3 if len(pictures) == count else _shown([*reversed(pictures), *drawn])
                    shown, count = text, len(pictures)
                    yield [text, *rest]
                if ended:
                    return
                await asyncio.sleep(PAUSE)
        finally:
            self.line.leave(job)
            if self.jobs.get(visitor) is job:
                del self.jobs[visitor]

    def _cancel(self, request: gr.Request) -> None:
        job = self.jobs.get(str(request.session_hash))
        if job is not None:
            self.line.leave(job)

    def _settings(self, values: tuple[Any, ...]) -> Settings:
        """What the form holds. Raises InputError."""
        given = dict(zip(self.form, values))
        sides = re.fullmatch(r"(\d{1,5}) x (\d{1,5})", str(given.pop("size")))
        width, height = map(int, sides.groups()) if sides else (0, 0)  # 0 is refused as any other size would be
        return Settings.of({**given, "width": width, "height": height})

    def _choose_size(self, width: float | None, height: float | None) -> Any:
        """The trained size nearest to the wished one, once both sides are there."""
        if width is None or height is None:
            return gr.skip()
        try:
            return _nearest(self.line.model.offer, int(width), int(height))
        except PixArtError as error:
            gr.Warning(escape(str(error)), title="Wished size")
            return gr.skip()

    def _refill(self, path: str | None) -> list[Any]:
        """The form as it was when a dropped picture was drawn; a size or choice that this model lacks stays, and is named."""
        unchanged = [gr.skip()] * (len(self.form) + 1)
        try:
            settings, model = read_settings(Path(str(path)))
        except PixArtError as error:
            return [message(str(error), "failed"), *unchanged]
        offer = self.line.model.offer
        given = {name: getattr(settings, name) for name in self.form if name != "size"}
        given["size"] = _size_text((settings.width, settings.height))
        choices = {"style": STYLES, "sampler": offer.samplers, "lora": (NO_LORA, *offer.loras), "size": [*map(_size_text, offer.sizes)]}
        absent = [f"{name} {given[name][:60]}" for name, known in choices.items() if given[name] not in known]
        values = [gr.skip() if name in choices and given[name] not in choices[name] else given[name] for name in self.form]
        said = "The settings of that picture are in the form."
        if model != offer.title:
            said += f" It was drawn by another model, {model[:100] or 'unnamed'}."
        if absent:
            said += f" This page lacks: {', '.join(absent)}."
        return [message(said, "done"), gr.update(visible=settings.sampler == SASolver.name), *values]


def _shown(paths: list[str]) -> list[Any]:
    """Of gallery, downloads and state: the newest, without those that somebody has deleted since."""
    paths = [path for path in paths[:MOST_SHOWN] if Path(path).is_file()]
    return [paths, gr.update(value=paths, visible=True), paths]


def _of_sampler(name: str) -> list[Any]:
    """The steps and guidance a sampler is made for, and whether its settings show."""
    kind = SAMPLERS.get(name)
    return [gr.skip()] * 3 if kind is None else [kind.steps, kind.guidance, gr.update(visible=kind is SASolver)]


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _nearest(offer: Offer, width: int, height: int) -> str:
    found = nearest_bin(offer.base_size, width, height)
    return _size_text((found.width, found.height))
