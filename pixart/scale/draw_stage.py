"""Pictures from encoded prompts: those of one size, number of steps and guidance share batches."""
from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..bins import nearest_bin
from ..errors import CheckpointError, InputError, TextEncoderError
from ..training.data.marks import mark_of
from ..training.write import replace_file
from .encode_stage import EncodeStage
from .graph import Graph, GraphModels, picture_graph
from .prompt_rows import Picture, without_place
from .stage import Chunk, Row, cut, grouped

GRAPH_TEXT, SETTINGS_TEXT, ROW_TEXT = "prompt", "pixart", "pixart-row"  # in a PNG: ComfyUI's, the web page's, and our own
DRAWN, FAILED = "drawn", "failed"


@dataclass(frozen=True)
class DrawSettings:
    """All that decides a picture, beside its row."""

    transformer: Path
    vae: Path
    variant: str = "auto"
    ema: bool = False
    dtype: str | None = None  # torch's name
    sampler: str = "dpm++"
    schedule: str = "usual"
    batch: int = 4
    weights: str = ""  # identity of the files
    graph: GraphModels = GraphModels("", "", "")
    own_graph: str = ""  # names the graph that ComfyUI draws by, if it isn't the plain one

    @property
    def decisive(self) -> dict[str, Any]:
        """What results depend on: not where the files lie."""
        return {name: value for name, value in asdict(self).items() if name not in ("transformer", "vae", "graph", "batch")}


class DrawStage:
    """See `stage.Stage`; the items are pictures to draw."""

    name, unit = "pictures", "pictures"

    def __init__(self, prompts: EncodeStage, settings: DrawSettings, pictures: Iterable[Picture]) -> None:
        self.place, self.prompts, self.settings = prompts.place, prompts, settings
        # The prompts' settings apart: both have fields of one name, such as the weights
        self._decisive = {**settings.decisive, "text": prompts.settings.decisive, "use_bins": settings.graph.use_bins}
        groups = grouped(pictures, self._group)
        self.chunks: list[Chunk] = [chunk for group in groups.values() for chunk in cut(group, settings.batch, self._decisive)]

    def key_of(self, picture: Picture) -> str:
        """Names all that decides a picture."""
        return mark_of(asdict(without_place(picture)), self._decisive)

    def drawn_size(self, picture: Picture) -> tuple[int, int]:
        """(width, height) in pixels, before the picture is cropped to what was wanted."""
        if not self.settings.graph.use_bins:
            return picture.width, picture.height
        size = nearest_bin(self.settings.graph.base_size, picture.width, picture.height)
        return size.width, size.height

    def open(self, device: str) -> DrawWorker:
        """Models are loaded at the first picture that isn't there."""
        return DrawWorker(self, device)

    def row(self, picture: Picture, status: str, **others: Any) -> Row:
        """A line of the index."""
        return {"file": picture.file, "status": status, "drawn_size": list(self.drawn_size(picture)), **_settings(picture), **others}

    def failed(self, item: Picture, error: str) -> Row:
        """A line of the index."""
        return self.row(item, FAILED, error=error)

    def publish(self, chunk: Chunk, rows: list[Row]) -> None:
        """The worker has written the pictures."""

    def is_whole(self, chunk: Chunk, rows: list[Row]) -> bool:
        """Whether the pictures are there."""
        return all("error" in row or (self.place / row["file"]).is_file() for row in rows)

    def _group(self, picture: Picture) -> tuple[Any, ...]:
        return (*self.drawn_size(picture), picture.steps, picture.guidance)


class DrawWorker:
    """Transformer and VAE on one device; T5 isn't there."""

    def __init__(self, stage: DrawStage, device: str) -> None:
        self.stage, self.device = stage, device
        self._pipe: Any = None

    def prepare(self, items: Sequence[Picture]) -> None:
        """Loads the models if there is something to draw."""
        if self._missing(items):
            _ = self.pipe

    def work(self, items: Sequence[Picture]) -> list[Row]:
        """Draws the whole batch if a picture of it is missing, and writes the missing ones."""
        missing = self._missing(items)
        texts = {item.prompt: self._embeddings(item.prompt) for item in items}
        if missing:
            for item, image in zip(items, self._draw(items, texts), strict=True):
                if item in missing:
                    save_picture(self.stage, item, image)
        return [self.stage.row(item, DRAWN, **_tokens(texts[item.prompt])) for item in items]

    @property
    def pipe(self) -> Any:
        """Loaded at the first use."""
        if self._pipe is None:
            import torch

            from ..pipeline import Pipeline

            settings = self.stage.settings
            dtype = getattr(torch, settings.dtype) if settings.dtype else None
            places = {"transformer": settings.transformer, "vae": settings.vae}
            self._pipe = Pipeline.from_files(**places, variant=settings.variant, dtype=dtype, device=self.device, ema=settings.ema)
        return self._pipe

    def _missing(self, items: Sequence[Picture]) -> list[Picture]:
        return [item for item in items if not (self.stage.place / item.file).is_file()]

    def _embeddings(self, prompt: str) -> Any:
        try:
            return self.stage.prompts.load(prompt)
        except (InputError, CheckpointError, TextEncoderError) as error:
            raise InputError(f"the prompt's T5 states: {error}") from None

    def _draw(self, items: Sequence[Picture], texts: dict[str, Any]) -> list[Any]:
        """PIL pictures of the wanted sizes."""
        from ..canvas import choose_canvas, crop_to_wanted
        from ..output import to_output
        from ..text.embeddings import concatenate_all

        first, settings = items[0], self.stage.settings
        use_bins = settings.graph.use_bins
        negative = concatenate_all([self._embeddings(item.negative) for item in items]) if first.guided else None
        latents = self.pipe(
            prompt_embeds=concatenate_all([texts[item.prompt] for item in items]), negative_prompt_embeds=negative,
            sampler=settings.sampler, schedule=settings.schedule, steps=first.steps, guidance=first.guidance, width=first.width,
            height=first.height, use_bins=use_bins, seed=[item.seed for item in items], output="latent", progress=False,
        )  # fmt: skip
        vae, images = self.pipe.vae, []
        for item, latent in zip(items, latents.split(1), strict=True):
            canvas = choose_canvas(item.width, item.height, self.pipe.base_size, use_bins, vae.pixels_per_latent)
            images += to_output(crop_to_wanted(vae.decode(latent), canvas).clamp(0, 1), "pil")
        return images


def save_picture(stage: DrawStage, picture: Picture, image: Any, graph: Graph | None = None) -> None:
    """A PNG with its settings and its graph inside, the plain one unless one is given; it appears whole or not at all. Raises OSError."""
    from PIL.PngImagePlugin import PngInfo

    settings = stage.settings
    told = {name: value for name, value in _settings(picture).items() if name != "row"} | {"sampler": settings.sampler}
    graph = graph or picture_graph(picture, settings.graph, settings.sampler, settings.schedule)
    row = {"key": stage.key_of(picture), "row": picture.row, "schedule": settings.schedule, "models": asdict(settings.graph)}
    texts = PngInfo()
    if graph is not None:
        texts.add_text(GRAPH_TEXT, json.dumps(graph))
    texts.add_text(SETTINGS_TEXT, json.dumps({**told, "model": settings.graph.transformer, "version": __version__}))
    texts.add_text(ROW_TEXT, json.dumps(row))
    replace_file(stage.place / picture.file, lambda partial: image.save(partial, format="PNG", pnginfo=texts))


def key_in(path: Path) -> str | None:
    """The key that a PNG of ours carries; None for any other file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            found = json.loads(image.info[ROW_TEXT])
    except Exception:  # Pillow has many errors for files that are no pictures
        return None
    return found.get("key") if isinstance(found, dict) else None


def _settings(picture: Picture) -> dict[str, Any]:
    return {name: value for name, value in asdict(picture).items() if name != "file"}


def _tokens(embeddings: Any) -> dict[str, Any]:
    """How long a prompt was, and what was cut."""
    found = {"tokens": embeddings.token_counts[0]} if embeddings.token_counts else {}
    if any(embeddings.truncated):
        found["cut"] = embeddings.truncated[0]
    return found
