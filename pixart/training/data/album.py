"""The pictures of a run: looked at, put into bins, with their features in the cache."""
from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config import Variant
from ...errors import ConfigError, DataError
from ...logs import get_logger
from ...text.captions import prepare
from ..buckets import bins_at, nearest_bins
from .cache import MEAN, STATES, STD, Cache
from .features import HINT, LATENT, TEXT, Latents, Picture, Text, TextStates
from .hints import Hints
from .item import Caption, File, Item, Listing, StoredLatent
from .look import Memory, Seen
from .marks import mark_of, model_mark
from .picture import LANCZOS_FROM
from .settings import Settings, Shape
from .spread import is_first, same_everywhere, spread
from .stored import check_latent, read_latent, read_states

logger = get_logger(__name__)

PREPARATION = 1  # of pictures; another number when `picture.py` makes other pixels of the same bytes
ALLOWED, NAMED = 0.01, 10  # share of broken pictures that a run bears; how many of them a message names


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture that takes part."""

    item: Item
    captions: tuple[Caption, ...]  # as T5 is given them
    mark: str  # of its bytes
    size: tuple[int, int]  # height and width
    hint: str = ""  # a mark of the user's own hint's bytes


class Album:
    """See the module. `shapes`: of all stages; nothing is computed or written before `prepare`."""

    def __init__(self, listing: Listing, settings: Settings, variant: Variant, cache: Path, shapes: Iterable[Shape]) -> None:
        self.listing = replace(listing, left_out=dict(listing.left_out))
        self.settings, self.variant = settings, variant
        self.shapes = list(dict.fromkeys(shapes))
        self.cache, self.memory = Cache(cache), Memory(cache)
        self.hints = Hints(settings.hints, settings.hed, settings.canny) if settings.hints else None
        self.broken = dict(listing.broken)
        self.text_mark = self._mark("text_encoder", ("text_encoder", "tokenizer"))
        self.vae_mark = self._mark("vae", ("vae",))
        self.entries = self._looked_at()
        self._check_needs()
        self.looked_at = tuple(self.entries)  # those that break later, while they are encoded, too
        self.bins = {shape: self._bins(shape) for shape in self.shapes}

    def _mark(self, name: str, parts: tuple[str, ...]) -> str:
        place = getattr(self.settings, name)
        if place and not Path(place).exists():
            raise ConfigError(f"source.{name} is {place}, which does not exist; give the path of a file or folder.")
        return model_mark(place, parts) if place else ""

    # -- which pictures take part ----------------------------------------------------------------

    def _looked_at(self) -> list[Entry]:
        """Every picture that can be used; what is wrong with the others goes into `broken`."""
        items = self.listing.items
        opened = [item for item in items if self.hints or item.size is None or not self._all_stored(item)]
        hints = self._own_hints(items)
        contents = [item.content for item in opened]
        seen = dict(zip([*contents, *hints.values()], self.memory.look([*contents, *hints.values()])))
        entries = []
        for item in items:
            try:
                entry = self._entry(item, seen.get(item.content), seen.get(hints.get(item.name)))
            except DataError as error:
                self.broken[item.name] = str(error)
                continue
            if self.settings.skip_small and any(is_small(entry.size, self._nearest(shape, [entry.size])[0]) for shape in self.shapes):
                self.listing.leave_out("smaller than their bin")
            else:
                entries.append(entry)
        return entries

    def _own_hints(self, items: Sequence[Item]) -> dict[str, File]:
        """The user's hints, by the name of their picture; a picture without one is told later, by name."""
        found = {}
        for item in items if self.hints else ():
            with suppress(DataError):
                found[item.name] = self.hints.own(item)
        return {name: file for name, file in found.items() if file is not None}

    def _all_stored(self, item: Item) -> bool:
        return all((path := self.stored(item, shape)) is not None and path.is_file() for shape in self.shapes)

    def _entry(self, item: Item, seen: Seen | None, hint: Seen | None) -> Entry:
        if seen is not None and seen.problem:
            raise DataError(seen.problem)
        if self.hints and self.hints.own(item) and hint is not None and hint.problem:
            raise DataError(f"its hint can't be used: {hint.problem}")
        if seen is None:  # its latents are all there, and so is what the data set says of it
            size, mark = item.size, mark_of(item.name, [self.stored(item, shape).stat().st_size for shape in self.shapes])
        else:
            size, mark = (seen.height, seen.width), seen.content
        for shape in self.shapes:
            if (path := self.stored(item, shape)) is not None and path.is_file():
                check_latent(path, self.variant, self._nearest(shape, [size])[0])
        return Entry(item, self._captions(item), mark, size, hint.content if hint else "")

    def stored(self, item: Item, shape: Shape) -> Path | None:
        """Where the reference's tools would have written the latent, if the layout is theirs."""
        found: StoredLatent | None = item.square if shape.squares else item.binned
        return found.path(shape.base_size) if found else None

    def _captions(self, item: Item) -> tuple[Caption, ...]:
        captions = item.captions or (Caption(self.settings.default_caption or ""),)
        return tuple(caption._replace(text=self.prepared(caption.text)) for caption in captions)

    def prepared(self, text: str) -> str:
        """A caption or prompt as T5 is given it."""
        return prepare(text, self.settings.clean_captions, self.settings.lower_case)

    def _bins(self, shape: Shape) -> list[tuple[int, int]]:
        """(height, width) of each entry's bin."""
        return self._nearest(shape, [entry.size for entry in self.entries])

    def _nearest(self, shape: Shape, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        heights, widths = np.array(sizes, dtype=np.float64).reshape(-1, 2).T
        return nearest_bins(heights, widths, bins_at(self.variant.base_size, *shape))

    def _check_needs(self) -> None:
        """Raises ConfigError or DataError for what no run can do."""
        if not self.entries:
            raise DataError(f"No picture can be used: {self.broken_words() or self.listing.left_out}.")
        if not any(caption.text or caption.states for entry in self.entries for caption in entry.captions):
            raise DataError(
                "No picture has a caption; expected name.txt beside name.png, a field text, caption or prompt in the metadata "
                "(source.captions names others), or source.default_caption for all."
            )
        if not self.settings.text_encoder and any(caption.states is None for entry in self.entries for caption in entry.captions):
            raise ConfigError("source.text_encoder is not set, and not every caption has stored features: give --text-encoder.")
        if not self.settings.vae and (self.hints or not all(self._all_stored(entry.item) for entry in self.entries)):
            raise ConfigError("source.vae is not set, and not every picture has stored latents: give --vae.")

    # -- features --------------------------------------------------------------------------------

    def text_key(self, text: str) -> str:
        """Names the states of a prepared text."""
        return mark_of(TEXT, text, self.text_mark, self.settings.text_precision, self.variant.max_tokens)

    def picture_key(self, kind: str, mark: str, shape: Shape, size: tuple[int, int]) -> str:
        """Names a latent: kind, bytes, VAE, the model's space, and all that makes other pixels."""
        space = (self.vae_mark, self.variant.latent_scale, self.variant.latent_shift)
        return mark_of(kind, mark, space, size, shape.base_size >= LANCZOS_FROM, PREPARATION)

    def hint_key(self, entry: Entry, shape: Shape, size: tuple[int, int]) -> str:
        """Names the latent of a hint."""
        return self.picture_key(HINT, mark_of(entry.mark, self.hints.mark, entry.hint), shape, size)

    def missing_texts(self, prompts: Iterable[str] = ()) -> list[Text]:
        """Those that are not in the cache: of captions, and of prompts."""
        texts = [self.prepared(prompt) for prompt in prompts]
        texts += [caption.text for entry in self.entries for caption in entry.captions if caption.states is None]
        return [Text(key, text) for text in dict.fromkeys(texts) if not self.cache.has(TEXT, key := self.text_key(text))]

    def missing_pictures(self) -> list[Picture]:
        """Those whose latent or hint is not in the cache, each once."""
        found: dict[tuple[str, str], Picture] = {}
        for shape in self.shapes:
            for number, (entry, size) in enumerate(zip(self.entries, self.bins[shape])):
                path = self.stored(entry.item, shape)
                latent = "" if path is not None and path.is_file() else self.picture_key(LATENT, entry.mark, shape, size)
                hint = self.hint_key(entry, shape, size) if self.hints else ""
                keys = (self._unless_there(LATENT, latent), self._unless_there(HINT, hint))
                if any(keys):
                    own = self.hints.own(entry.item) if self.hints else None
                    found.setdefault(keys, Picture(number, entry.item.content, size, shape.base_size, *keys, own))
        return list(found.values())

    def _unless_there(self, kind: str, key: str) -> str:
        return "" if not key or self.cache.has(kind, key) else key

    def compute(self, prompts: Sequence[str], device: torch.device, over: Callable[..., list[Any]] = spread) -> None:
        """Fills the cache: T5 first, then the VAE, never both in memory. over: applies one function to all of the work."""
        texts = same_everywhere(self.missing_texts(prompts) if self.settings.text_encoder else [])
        if texts:
            over(self._text_states(), texts, "captions", device)
            release(device)
        pictures = same_everywhere(self.missing_pictures())
        if pictures:
            done = over(self._latents(), pictures, "pictures", device)
            self._drop({number: problem for number, problem in done if problem})
            release(device)
        self._say_broken()

    def check_encoders(self) -> None:
        """Raises PixArtError where what was given as T5, VAE or HED is something else, or of another size than the model reads."""
        if self.settings.text_encoder:
            self._text_states().check()
        if self.settings.vae:
            self._latents().open(torch.device("cpu"))

    def _text_states(self) -> TextStates:
        return TextStates(self.cache, self.settings.text_encoder, self.settings.text_precision, self.variant)

    def _latents(self) -> Latents:
        return Latents(self.cache, self.settings.vae, self.variant, self.hints)

    def _drop(self, problems: dict[int, str]) -> None:
        """Pictures that broke while they were read in full leave the run."""
        if not problems:
            return
        # The same bytes under another name are as broken
        marks = {self.entries[number].mark: problem for number, problem in problems.items()}
        self.broken.update({entry.item.name: marks[entry.mark] for entry in self.entries if entry.mark in marks})
        self.entries = [entry for entry in self.entries if entry.mark not in marks]
        self.bins = {shape: self._bins(shape) for shape in self.shapes}

    def _say_broken(self) -> None:
        """Names what is skipped; raises DataError if it is too much."""
        if self.broken and is_first():
            logger.warning("%s They are left out.", self.broken_words())
        self.check_broken()

    def check_broken(self) -> None:
        """Raises DataError for more broken pictures than a run bears."""
        if not self.entries or (self.too_broken and not self.settings.allow_broken):
            raise DataError(f"{self.broken_words()} Mend or remove them, or set source.allow_broken to go on without them.")

    @property
    def too_broken(self) -> bool:
        """More than a run bears."""
        return len(self.broken) > ALLOWED * (len(self.broken) + len(self.entries))

    def broken_words(self) -> str:
        """What is wrong with which pictures, "" if none is broken."""
        if not self.broken:
            return ""
        named = [f"{name}: {problem}" for name, problem in list(self.broken.items())[:NAMED]]
        more = [f"and {len(self.broken) - NAMED} more"] if len(self.broken) > NAMED else []
        return f"{len(self.broken)} of {len(self.broken) + len(self.entries)} pictures are broken. {'; '.join([*named, *more])}."

    # -- reading features ------------------------------------------------------------------------

    def states(self, caption: Caption) -> Tensor:
        """(T, C') of a prepared caption."""
        if caption.states is not None:
            return read_states(caption.states, self.variant.transformer.caption_channels)
        return self.cache.load(TEXT, self.text_key(caption.text))[STATES]

    def latent(self, entry: Entry, shape: Shape, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Mean and std (C, H, W); None for a VAE that has but one latent of a picture."""
        path = self.stored(entry.item, shape)
        if path is not None and path.is_file():
            return read_latent(path, self.variant, size)
        found = self.cache.load(LATENT, self.picture_key(LATENT, entry.mark, shape, size))
        return found[MEAN], found.get(STD)

    def hint(self, entry: Entry, shape: Shape, size: tuple[int, int]) -> Tensor:
        """(C, H, W)."""
        return self.cache.load(HINT, self.hint_key(entry, shape, size))[MEAN]


def is_small(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Whether a picture has to be enlarged to cover its bin."""
    return size[0] < wanted[0] or size[1] < wanted[1]


def release(device: torch.device) -> None:
    """A model that nothing holds any more leaves the memory before the next comes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
