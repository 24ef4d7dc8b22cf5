"""T5 of all prompts, once each, before the transformer is loaded."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..text.batch import one_prompt
from ..text.captions import prepare
from ..text.embeddings import TextEmbeddings
from ..text.prompt_file import load_prompts, save_prompts
from ..training.data.marks import mark_of
from .book import FOLDER
from .graph import model_name
from .stage import Chunk, Row, cut, identity

BATCH = 16  # prompts; of equal length as far as possible


@dataclass(frozen=True)
class TextSettings:
    """All that decides what T5 makes of a prompt."""

    text_encoder: Path
    tokenizer: Path | None = None
    precision: str | None = None
    dtype: str | None = None  # torch's name
    max_tokens: int = 300
    clean_caption: bool = False
    weights: str = ""  # identity of the files

    @classmethod
    def of(cls, text_encoder: Path, tokenizer: Path | None = None, **others: Any) -> TextSettings:
        """With the files' identity filled in; the name of a model that only ComfyUI's machines have."""
        weights = f"{identity(text_encoder) or model_name(text_encoder)}-{identity(tokenizer)}"
        return cls(text_encoder.absolute(), tokenizer.absolute() if tokenizer else None, weights=weights, **others)

    @property
    def decisive(self) -> dict[str, Any]:
        """What results depend on: not where the files lie."""
        return {name: value for name, value in asdict(self).items() if name not in ("text_encoder", "tokenizer")}


class EncodeStage:
    """See `stage.Stage`; the items are prompts."""

    name, unit = "prompts", "prompts"

    def __init__(self, place: Path, settings: TextSettings, prompts: Iterable[str]) -> None:
        self.place, self.settings = place.absolute(), settings
        # Neighbours in length share a batch, so that little of it is padding
        self.chunks: list[Chunk] = cut(sorted(set(prompts), key=lambda text: (len(text), text)), BATCH, settings.decisive)

    def file_of(self, prompt: str) -> Path:
        """Where a prompt's states are kept."""
        key = mark_of(prompt, self.settings.decisive)
        return self.folder / key[:2] / f"{key}.safetensors"

    @property
    def folder(self) -> Path:
        """Of the states of all prompts that were ever encoded for these pictures."""
        return self.place / FOLDER / self.name / "states"

    def kept_bytes(self) -> int:
        """What they take of the disk: about 0.5 MB a prompt by T5-XXL."""
        return sum(file.stat().st_size for file in self.folder.rglob("*.safetensors"))

    def load(self, prompt: str) -> TextEmbeddings:
        """States of a prompt; raises InputError."""
        return load_prompts(self.file_of(prompt)).embeddings

    def open(self, device: str) -> EncodeWorker:
        """Loads T5."""
        return EncodeWorker(self, device)

    def failed(self, item: str, error: str) -> Row:
        """The pictures of this prompt will fail for want of its states."""
        return {"prompt": item, "error": error}

    def publish(self, chunk: Chunk, rows: list[Row]) -> None:
        """The worker has written the files."""

    def is_whole(self, chunk: Chunk, rows: list[Row]) -> bool:
        """Whether the files are there."""
        return all("error" in row or self.file_of(row["prompt"]).is_file() for row in rows)


class EncodeWorker:
    """T5 on one device."""

    def __init__(self, stage: EncodeStage, device: str) -> None:
        import torch

        from ..text.encoder import load_text_encoder

        settings = stage.settings
        dtype = getattr(torch, settings.dtype) if settings.dtype else None
        self.stage = stage
        self.encoder = load_text_encoder(settings.text_encoder, settings.tokenizer, dtype, device, settings.precision)

    def prepare(self, items: Sequence[str]) -> None:
        """T5 is loaded."""

    def work(self, items: Sequence[str]) -> list[Row]:
        """One file a prompt."""
        settings = self.stage.settings
        found = self.encoder.encode([prepare(item, settings.clean_caption) for item in items], settings.max_tokens)
        if not found.states.isfinite().all():
            raise InputError("T5 gave NaN or infinite values; choose another --dtype.")
        for number, item in enumerate(items):
            kept = {"max_tokens": settings.max_tokens, "clean_caption": settings.clean_caption, "lower_case": True}
            save_prompts(self.stage.file_of(item), one_prompt(found, number), (item,), self.encoder.fingerprint, **kept)
        return [{"prompt": item} for item in items]
