"""T5 states of texts and latents of pictures, computed into the cache. Each is one function over a list of work."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import Variant
from ...errors import ConfigError, DataError
from ...text.encoder import load_text_encoder, open_weights
from ...vae import load_vae
from .cache import MEAN, STATES, STD, Cache
from .hints import Hints
from .item import Content
from .picture import fitted, read_picture, to_tensor
from .stored import PIXELS

TEXT, LATENT, HINT = "text", "latent", "hint"  # kinds of the cache
TEXTS_AT_ONCE, AHEAD = 16, 8


class Text(NamedTuple):
    """A text whose T5 states are missing."""

    key: str
    text: str


class Picture(NamedTuple):
    """A picture in one bin, with the keys of what is missing of it, "" for nothing."""

    number: int  # the caller's
    content: Content
    size: tuple[int, int]  # of the bin, height and width
    base_size: int
    latent: str
    hint: str = ""
    own_hint: Content | None = None


@dataclass(frozen=True)
class TextStates:
    """States of the real tokens alone: a caption of 20 tokens takes a fifteenth of one padded to 300."""

    cache: Cache
    encoder: str
    precision: str | None
    variant: Variant

    def check(self) -> None:
        """Raises PixArtError unless the place holds a T5 that the model reads; only names and sizes of its weights are read."""
        width = int(open_weights(self.encoder, None, self.precision)[0].config["d_model"])
        wanted = self.variant.transformer.caption_channels
        if width != wanted:
            raise ConfigError(f"The text encoder {self.encoder} is {width} wide; {self.variant.name} reads captions {wanted} wide.")

    def open(self, device: torch.device) -> Callable[[Sequence[Text]], Iterator[str]]:
        """Loads T5; the function yields the key of each text when it is in the cache."""
        self.check()
        encoder = load_text_encoder(self.encoder, device=device, precision=self.precision)

        def encode(work: Sequence[Text]) -> Iterator[str]:
            work = sorted(work, key=lambda each: len(each.text))  # neighbours in length share a batch: little of it is padding
            for start in range(0, len(work), TEXTS_AT_ONCE):
                part = work[start : start + TEXTS_AT_ONCE]
                found = encoder.encode([each.text for each in part], self.variant.max_tokens)
                for each, states, mask in zip(part, found.states, found.mask):
                    if not states[mask].isfinite().all():
                        raise DataError(f"T5 gives NaN for the caption {each.text!r:.80}; change source.text_precision.")
                    self.cache.save(TEXT, each.key, {STATES: states[mask]})
                    yield each.key

        return encode


@dataclass(frozen=True)
class Latents:
    """Mean and std of the VAE, and of hints the mean."""

    cache: Cache
    vae: str
    variant: Variant
    hints: Hints | None

    def open(self, device: torch.device) -> Callable[[Sequence[Picture]], Iterator[tuple[int, str]]]:
        """Loads the VAE; the function yields each picture's number and what is wrong with it, "" when it is in the cache."""
        vae = load_vae(self.vae, self.variant.latent_scale, device=device, latent_shift=self.variant.latent_shift)
        channels = self.variant.transformer.in_channels
        if (vae.latent_channels, vae.pixels_per_latent) != (channels, PIXELS):
            raise ConfigError(
                f"The VAE {self.vae} has {vae.latent_channels} channels, a latent for each {vae.pixels_per_latent} pixels; "
                f"{self.variant.name} needs {channels} and {PIXELS}."
            )
        hint = self.hints.open(device) if self.hints else None

        def encode(work: Sequence[Picture]) -> Iterator[tuple[int, str]]:
            for each, (picture, shown, problem) in zip(work, _ahead(work)):
                try:
                    if problem:
                        raise DataError(problem)
                    if each.latent:
                        mean, std = vae.distribution(picture[None])
                        self._keep(LATENT, each.latent, {MEAN: mean[0]} if std is None else {MEAN: mean[0], STD: std[0]})
                    if each.hint:
                        self._keep(HINT, each.hint, {MEAN: vae.encode(hint(shown)[None])[0]})
                    yield each.number, ""
                except DataError as error:
                    yield each.number, str(error)

        return encode

    def _keep(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        if not all(value.isfinite().all() for value in tensors.values()):
            raise DataError("its latent has NaN or infinite values")
        self.cache.save(kind, key, tensors)


def _ahead(work: Sequence[Picture]) -> Iterator[tuple[Tensor | None, Tensor | None, str]]:
    """Pictures of the work, read by threads while others are encoded."""
    with ThreadPoolExecutor(max(1, min(AHEAD, cpu_count() or 1))) as pool:
        waiting: deque = deque()
        try:
            for each in work:
                waiting.append(pool.submit(_read, each))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


def _read(work: Picture) -> tuple[Tensor | None, Tensor | None, str]:
    """A picture as its bin wants it, what the hint is made of, and what is wrong."""
    try:
        picture = _fit(work.content, work)
        return picture, _fit(work.own_hint, work) if work.own_hint else picture, ""
    except (OSError, DataError) as error:
        return None, None, str(error)


def _fit(content: Content, work: Picture) -> Tensor:
    return to_tensor(fitted(read_picture(content.read()), *work.size, work.base_size))
