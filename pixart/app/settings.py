"""What the form holds, checked against what the model offers, and as text inside a picture."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import InputError
from ..samplers import SAMPLERS, Sampler, SASolver
from .styles import NO_STYLE, STYLES

LONGEST_PROMPT = 10_000  # characters; a T5 of 300 tokens reads far less
LARGEST_SEED = 2**32 - 1
MOST_PICTURES = 8
NO_LORA = "none"
LIMITS = {  # name -> least, most
    "width": (1, 16384), "height": (1, 16384), "steps": (1, 100), "guidance": (0, 20), "predictor_order": (1, 4),
    "corrector_order": (0, 4), "eta": (0, 2), "seed": (0, LARGEST_SEED), "pictures": (1, MOST_PICTURES), "strength": (-4, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """What one loaded model can be asked for. Sizes are (width, height) in pixels, samplers names, the first the default."""

    title: str
    base_size: int
    sizes: tuple[tuple[int, int], ...]
    samplers: tuple[str, ...]
    loras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """One wish: `pictures` pictures, the first from `seed`, each further one from the next."""

    prompt: str
    negative: str = ""
    style: str = NO_STYLE
    width: int = 1024
    height: int = 1024
    steps: int = 20
    guidance: float = 4.5
    sampler: str = "dpm++"
    predictor_order: int = 2
    corrector_order: int = 2
    eta: float = 1.0
    seed: int = 0
    pictures: int = 1
    lora: str = NO_LORA
    strength: float = 1.0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """From untrusted values by field name; raises InputError for a missing prompt, wrong kinds and numbers out of range."""
        known = {field.name: field.type for field in fields(cls)}
        unknown = sorted(map(repr, set(values) - set(known)))
        if unknown:
            raise InputError(f"Settings: {', '.join(unknown)[:200]} is none of {', '.join(known)}.")
        if "prompt" not in values:
            raise InputError("Settings: the prompt is missing.")
        return cls(**{name: _checked(name, known[name], value) for name, value in values.items()})

    def check(self, offer: Offer) -> None:
        """Raises InputError for a choice that this model doesn't have."""
        if not self.prompt.strip():
            raise InputError("The prompt is empty; write what the picture should show.")
        choices = {"style": (*STYLES,), "sampler": offer.samplers, "lora": (NO_LORA, *offer.loras)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)[:100]!r}; this page has {', '.join(known)}.")
        if (self.width, self.height) not in offer.sizes:
            raise InputError(f"{self.width} x {self.height} is not a size this model was trained at; choose one from the list.")
        self.chosen_sampler().check(self.steps, 1)

    def chosen_sampler(self) -> Sampler:
        """With its own settings, where it has some."""
        if self.sampler == SASolver.name:
            return SASolver(self.predictor_order, self.corrector_order, self.eta)
        return SAMPLERS[self.sampler]()

    def for_picture(self, number: int) -> Settings:
        """Those that draw the picture of that number alone, counted from 0."""
        return replace(self, seed=(self.seed + number) % (LARGEST_SEED + 1), pictures=1)

    def to_text(self, **others: str) -> str:
        """JSON for a picture's metadata; others: facts beside the settings."""
        return json.dumps({**asdict(self), **others}, ensure_ascii=False)


def from_text(text: str) -> tuple[Settings, str]:
    """(settings, the model's name) from a picture's metadata; raises InputError for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError("The settings inside this picture are damaged; expected those that this page writes.")
    model = values.pop("model", "")
    values.pop("version", None)
    return Settings.of(values), model if isinstance(model, str) and _is_writable(model) else ""


def _is_writable(text: str) -> bool:
    """Whether it is text to the end: JSON can name half of a character, which neither a page nor a file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(name: str, kind: str, value: Any) -> Any:
    if kind == "str":
        if not isinstance(value, str) or len(value) > LONGEST_PROMPT:
            found = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
            raise InputError(f"{name} is {found}; expected text of at most {LONGEST_PROMPT} characters.")
        if not _is_writable(value):
            raise InputError(f"{name} holds half a character, which can't be written down; delete it, or write it again.")
        return value
    least, most = LIMITS[name]
    whole = kind == "int"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most or (whole and value != int(value)):
        shown = repr(value)[:50]
        raise InputError(f"{name} is {shown}; expected a {'whole ' if whole else ''}number from {least} to {most}.")
    return int(value) if whole else float(value)
