"""Captions of pictures by a vision-language model: from the picture alone, or with the text that it came with."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from ..training.data.picture import read_picture
from .book import Book
from .caption_files import Field, Texts, texts_at
from .stage import Chunk, Row, cut

if TYPE_CHECKING:
    from PIL.Image import Image

    from .vision import VisionModel

ALONE = (
    "Describe this picture in one paragraph, for someone who has to paint it: what there is and how many of it, where each thing is, "
    "colours, light, viewpoint and style. Write only what can be seen."
)
WITH_TEXT = (
    'This picture was found with the text "{alt}". Describe the picture in one paragraph, for someone who has to paint it. Use names and '
    "facts of the text where the picture bears them out, and leave out the rest."
)
ALT = "{alt}"


@dataclass(frozen=True)
class CaptionSettings:
    """All that decides a caption, beside the picture."""

    model: str
    weights: str = ""  # identity of a local model's files
    dtype: str | None = None
    prompt: str | None = None  # the user's own; may hold {alt}
    alt_text: str | None = None  # where the texts are that pictures came with
    to: str = ".txt"
    temperature: float = 0.2
    max_tokens: int = 256
    count: int = 1  # captions a picture
    max_side: int = 1024  # pixels; larger pictures are shrunk
    seed: int = 0
    batch: int = 8
    overwrite: bool = False

    @property
    def decisive(self) -> dict[str, object]:
        """What results depend on: a model with known files may lie anywhere."""
        return {**asdict(self), "model": self.weights or self.model}


class CaptionStage:
    """See `stage.Stage`; the items are names of pictures."""

    name, unit = "captions", "pictures"

    def __init__(self, folder: Path, settings: CaptionSettings, names: Sequence[str]) -> None:
        self.place, self.settings = folder.absolute(), settings
        texts_at(self.place, settings.to, names)  # a wrong place is told before anything is loaded
        self.chunks: list[Chunk] = cut(names, settings.batch, settings.decisive)

    @property
    def texts(self) -> Texts:
        """Where captions go."""
        return texts_at(self.place, self.settings.to)

    def open(self, device: str) -> CaptionWorker:
        """The model is loaded at the first picture without a caption."""
        return CaptionWorker(self, device)

    def failed(self, item: str, error: str) -> Row:
        """A picture without caption."""
        return {"file": item, "error": error}

    def publish(self, chunk: Chunk, rows: list[Row]) -> None:
        """Files appear at once; fields when all is done, since they share one file."""
        if self._to_files:
            texts = self.texts
            texts.put({row["file"]: row["captions"] for row in rows if "captions" in row and not self._has(texts, row)})

    def is_whole(self, chunk: Chunk, rows: list[Row]) -> bool:
        """Whether the captions are where they should be."""
        if not self._to_files:
            return True
        texts = self.texts
        return all("error" in row or self._has(texts, row) for row in rows)

    @property
    def _to_files(self) -> bool:
        return self.settings.to.startswith(".")

    def collect(self) -> list[Row]:
        """Puts the captions into their field if that is where they go; the rows of all chunks that are done."""
        book = Book(self)
        rows = [row for chunk in self.chunks for row in book.record(chunk) or ()]
        texts = self.texts
        if isinstance(texts, Field):
            new = {row["file"]: row["captions"] for row in rows if "captions" in row}
            texts.put({name: found for name, found in new.items() if self.settings.overwrite or not texts.get(name)})
        return rows

    def _has(self, texts: Texts, row: Row) -> bool:
        found = texts.get(row["file"])
        return found == tuple(row["captions"]) if self.settings.overwrite and "captions" in row else bool(found)


class CaptionWorker:
    """A model on one device."""

    def __init__(self, stage: CaptionStage, device: str) -> None:
        self.stage, self.device = stage, device
        self.texts = stage.texts
        self.alt = texts_at(stage.place, stage.settings.alt_text) if stage.settings.alt_text else None
        self._model: VisionModel | None = None

    def prepare(self, items: Sequence[str]) -> None:
        """Loads the model if there is something to caption."""
        if len(self._kept(items)) < len(items):
            _ = self.model

    def work(self, items: Sequence[str]) -> list[Row]:
        """Captions of those that have none."""
        rows = {name: {"file": name, "kept": True} for name in self._kept(items)}
        rows.update((row["file"], row) for row in self.caption([name for name in items if name not in rows]))
        return [rows[name] for name in items]

    def caption(self, names: Sequence[str]) -> list[Row]:
        """Captions whether there are some or not; writes nothing."""
        rows: dict[str, Row] = {}
        pictures: dict[str, Image] = {}
        for name in names:
            try:
                pictures[name] = self._read(name)
            except (DataError, OSError) as error:
                rows[name] = self.stage.failed(name, f"{name}: {error}")
        if pictures:
            rows.update((row["file"], row) for row in self._answers(pictures))
        return [rows[name] for name in names]

    @property
    def model(self) -> VisionModel:
        """Loaded at the first use."""
        if self._model is None:
            from .vision import VisionModel

            self._model = VisionModel(self.stage.settings.model, self.device, self.stage.settings.dtype)
        return self._model

    def question(self, name: str) -> str:
        """What is asked about a picture."""
        settings = self.stage.settings
        alt = " ".join(self.alt.get(name)) if self.alt else ""
        asked = settings.prompt or (WITH_TEXT if alt else ALONE)
        return asked.replace(ALT, alt)

    def _kept(self, items: Sequence[str]) -> list[str]:
        return [] if self.stage.settings.overwrite else [name for name in items if self.texts.get(name)]

    def _read(self, name: str) -> Image:
        picture = read_picture((self.stage.place / name).read_bytes())
        side = self.stage.settings.max_side
        picture.thumbnail((side, side))
        return picture

    def _answers(self, pictures: dict[str, Image]) -> list[Row]:
        settings, names = self.stage.settings, list(pictures)
        questions = [self.question(name) for name in names]
        found: list[list[str]] = [[] for _ in names]
        for number in range(settings.count):
            seed = f"{settings.seed} {number} {names}"
            answers = self.model.answer(list(pictures.values()), questions, settings.max_tokens, settings.temperature, seed)
            for texts, answer in zip(found, answers, strict=True):
                texts += [answer] if answer and answer not in texts else []
        empty = "the model's answer is empty"
        return [
            {"file": name, "captions": texts} if texts else self.stage.failed(name, f"{name}: {empty}")
            for name, texts in zip(names, found)
        ]
