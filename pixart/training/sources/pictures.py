"""Pictures and captions from files in any common layout; their features are computed once and kept."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...config import get_variant
from ...errors import ConfigError
from ...logs import get_logger
from ...vae import decode_pictures
from ..batch import Batch
from ..data.album import Album, Entry
from ..data.features import TEXT
from ..data.folder import LAYOUT
from ..data.item import Caption, Listing
from ..data.marks import mark_of
from ..data.order import Plan
from ..data.places import read_place
from ..data.report import describe, oddities
from ..data.settings import Settings, Shape
from ..data.spread import is_first, spread
from ..draws import Draws
from ..recipe import Recipe, Stage

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

__all__ = ["Part", "Settings"]
logger = get_logger(__name__)

PER_STAGE = ("buckets", "picture_size", "sample_latents", "prior_weight")  # what the stages of a recipe may have others of
WHOLE_RUN = tuple(each.name for each in fields(Settings) if each.name not in PER_STAGE)


class Part:
    """See `batch.Source`."""

    feature_count = 0
    settled = True
    _said = False  # whether `prepare` has told of oddities; a source may look at its pictures again

    def __init__(self, settings: Settings, recipe: Recipe) -> None:
        self.settings, self.variant, self.run_dir = settings, get_variant(recipe.variant), recipe.run_dir
        self.null_context: Tensor | None = None
        check(settings)
        stages = [(stage, recipe.part_at("source", number).settings) for number, stage in enumerate(recipe.stages)]
        shapes = [_shape(stage, own) for stage, own in stages]
        self.album = Album(self.listing(), settings, self.variant, cache_of(settings, recipe), shapes)
        self.has_prior = any(entry.item.prior for entry in self.album.entries)
        self.held_out = self._choose_held_out()
        self._plans: dict[tuple[Shape, int], tuple[Plan, list[int]]] = {}
        self._held: list[int] | None = None  # numbers of the entries that are held out

    @property
    def expects_prior(self) -> bool:
        """Whether some pictures show what is to be kept."""
        return self.has_prior

    def listing(self) -> Listing:
        """What the data set's files tell."""
        if not self.settings.data:
            raise ConfigError("source.data is not set: give --data, the place of the pictures.")
        if not self.settings.prior_data:
            return self._read(self.settings.data)
        check_apart(self.settings.data, self.settings.prior_data, "source.prior_data")
        return with_prior(self._read(self.settings.data), self._read(self.settings.prior_data))

    def _read(self, place: str) -> Listing:
        found = read_place(place, self.variant.family, self.settings.captions)
        if found.layout.startswith(LAYOUT):  # all pictures below it are read
            check_outside(place, self.run_dir)
        return found

    def _choose_held_out(self) -> frozenset[str]:
        """Marks of the pictures that are only for validation: by chance, but always the same of the same pictures."""
        marks = sorted({entry.mark for entry in self.album.entries}, key=lambda mark: mark_of("validation", mark))
        count = round(self.settings.validation * len(marks))
        if self.settings.validation and not 0 < (count := max(1, count)) < len(marks):
            raise ConfigError(f"source.validation would hold {count} of {len(marks)} pictures out; set it to 0, or give more pictures.")
        return frozenset(marks[:count])

    # -- before training -------------------------------------------------------------------------

    def report(self) -> list[str]:
        """Pictures by bin, what is wrong with which, and what there is to compute."""
        self.album.check_encoders()
        lines = describe(self.album, [entry for entry in self.album.entries if entry.mark in self.held_out])
        return [line.encode("utf-8", "backslashreplace").decode() for line in lines]  # names of files may be no text

    def check(self) -> None:
        """Raises DataError for more broken pictures than a run bears."""
        self.album.check_broken()

    def prepare(self, prompts: Sequence[str], accelerator: Accelerator, over: Callable[..., list[Any]] = spread) -> None:
        """Fills the cache; raises DataError for too many broken pictures. over: of `Album.compute`."""
        lacking = [name for name in ("text_encoder", "vae") if not getattr(self.settings, name)]
        if prompts and lacking:  # now, and not at the first sample
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in lacking)
            raise ConfigError(f"Pictures of the prompt {prompts[0]!r:.80} can't be drawn without {flags}; give it, or no samples.")
        if not self._said and is_first():
            for line in oddities(self.album):
                logger.warning("%s", line)
        self._said = True
        self.album.check_encoders()  # T5 may compute for hours before the VAE is opened
        self.album.compute([*prompts, ""], accelerator.device, over)
        if is_first():
            self.album.memory.save()
        accelerator.wait_for_everyone()
        self._plans.clear()
        self._held = None
        if self.settings.text_encoder:
            self.null_context = self.album.states(Caption(""))

    def contents(self) -> list[str]:
        """Name, bytes and captions of each picture; and first the encoders' files, on which all features depend."""
        encoders = [f"source.text_encoder {self.album.text_mark} -", f"source.vae {self.album.vae_mark} -"]
        lines = [f"{each.item.name} {each.mark}{each.hint} {_captions_mark(each)}" for each in self.album.looked_at]
        return [line.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n") for line in (*encoders, *lines)]

    # -- batches ---------------------------------------------------------------------------------

    def batch(self, settings: Settings, stage: Stage, draws: Draws) -> Batch:
        """Pictures of one bin."""
        shape = _shape(stage, settings)
        plan, order = self._plan(shape, stage.batch_size)
        picks, weights = plan.rows(draws)
        entries = [self.album.entries[order[pick]] for pick in picks]
        weights = [weight * entry.item.weight for weight, entry in zip(weights, entries)]
        size = self.album.bins[shape][order[picks[0]]]
        mine = slice(draws.rows.start, draws.rows.stop)
        captions = [_draw(entry.captions, draws.of_row(row, "caption")) for row, entry in zip(draws.rows, entries[mine])]
        noise = draws.normal("latent", self._latent_shape(size)) if settings.sample_latents else None
        made = self._assemble(settings, shape, size, entries[mine], captions, weights, mine, noise)
        if made.prior is None or settings.prior_weight == 1:
            return made
        # The total stays, so that a batch of one feels the weight too
        return replace(made, weight=torch.where(made.prior, settings.prior_weight * made.weight, made.weight))

    def validation(self, settings: Settings, stage: Stage, rows: range) -> list[Batch]:
        """Held-out pictures in the order of names, those of one bin together; each with its first caption and the latent's mean."""
        shape = _shape(stage, settings)
        if self._held is None:
            self._held = [number for number, entry in enumerate(self.album.entries) if entry.mark in self.held_out]
        bins: dict[tuple[int, int], list[Entry]] = {}
        for number in (self._held[row] for row in rows if row < len(self._held)):
            bins.setdefault(self.album.bins[shape][number], []).append(self.album.entries[number])
        batches = []
        for size, entries in bins.items():
            for start in range(0, len(entries), stage.batch_size):
                part = entries[start : start + stage.batch_size]
                captions = [entry.captions[0] for entry in part]
                batches.append(self._assemble(settings, shape, size, part, captions, [1.0] * len(part), slice(None), None))
        return batches

    def _assemble(
        self, settings: Settings, shape: Shape, size: tuple[int, int], entries: list[Entry], captions: list[Caption],
        weights: list[float], mine: slice, noise: Tensor | None,
    ) -> Batch:  # fmt: skip
        """weights: of all processes' rows; mine: those of this one, which the rest is of."""
        latents = []
        for row, entry in enumerate(entries):
            mean, std = self.album.latent(entry, shape, size)
            latents.append(mean if std is None or noise is None else mean + std * noise[row])
        context, mask = padded([self.album.states(caption) for caption in captions])
        told = [entry.size if settings.picture_size else size for entry in entries]
        return Batch(
            latent=torch.stack(latents),
            context=context,
            mask=mask,
            size=torch.tensor(told, dtype=torch.float32),
            weight=torch.tensor(weights[mine]),
            total=float(sum(weights)),
            hint=torch.stack([self.album.hint(entry, shape, size) for entry in entries]) if self.album.hints else None,
            captions=tuple(caption.text for caption in captions),
            prior=torch.tensor([entry.item.prior for entry in entries]) if self.has_prior else None,
        )

    def _plan(self, shape: Shape, batch_size: int) -> tuple[Plan, list[int]]:
        """The order of a stage's batches, and the entry that each of its numbers means."""
        key = (shape, batch_size)
        if key not in self._plans:
            entries, bins = self.album.entries, self.album.bins[shape]
            order = [i for i, entry in enumerate(entries) if entry.mark not in self.held_out for _ in range(entry.item.repeats)]
            numbers = {size: number for number, size in enumerate(dict.fromkeys(bins))}
            self._plans[key] = Plan([numbers[bins[i]] for i in order], batch_size), order
        return self._plans[key]

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return self.variant.transformer.in_channels, size[0] // 8, size[1] // 8

    # -- prompts and pictures --------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, M, C') and mask (B, M); raises DataError for a prompt that was not prepared."""
        texts = [self.album.prepared(prompt) for prompt in prompts]
        missing = [text for text in texts if not self.album.cache.has(TEXT, self.album.text_key(text))]
        if missing:
            raise ConfigError(f"The prompt {missing[0]!r:.80} has no T5 states; give --text-encoder, and the prompt before training.")
        return padded([self.album.states(Caption(text)) for text in texts])

    def decode(self, latents: Tensor) -> list[Image]:
        """Pictures of latents (B, C, H, W)."""
        if not self.settings.vae:
            raise ConfigError("source.vae is not set, so latents can't be shown: give --vae.")
        return decode_pictures(self.settings.vae, self.variant, latents)


def cache_of(settings: Settings, recipe: Recipe) -> Path:
    """The folder of features: what was asked for, or one beside the run's folder, which its neighbours use too."""
    if not settings.cache and not recipe.run_dir:
        raise ConfigError("No place for the features: give --cache, or --output, beside which they are kept.")
    return Path(settings.cache) if settings.cache else Path(recipe.run_dir).parent / "cache"


def check_apart(data: str, prior: str | Path, name: str) -> None:
    """Raises ConfigError where a picture would be both learnt and kept. name: of the setting that says where `prior` is."""
    first, second = Path(data).resolve(), Path(prior).resolve()
    if first == second or first in second.parents or second in first.parents:
        raise ConfigError(
            f"source.data is {data} and {name} {prior}, and one holds the other; expected two places with other pictures each."
        )


def check_outside(data: str, run_dir: str | None) -> None:
    """Raises ConfigError where a run would train on its own samples."""
    folder = Path(data).resolve()
    if run_dir and folder in (Path(run_dir).resolve(), *Path(run_dir).resolve().parents):
        raise ConfigError(
            f"The run's folder {run_dir} lies in {data}, whose pictures are trained, so that its own samples would be too. Give an "
            "--output (or run_dir) outside."
        )


def with_prior(data: Listing, prior: Listing) -> Listing:
    """Both together; the prior's pictures are called by their place too, since names may be the same."""
    kept = (replace(item, name=f"prior/{item.name}", inside=item.inside and f"prior/{item.inside}", prior=True) for item in prior.items)
    items = [*data.items, *kept]
    broken = data.broken | {f"prior/{name}": why for name, why in prior.broken.items()}
    left_out = {why: data.left_out.get(why, 0) + prior.left_out.get(why, 0) for why in [*data.left_out, *prior.left_out]}
    return Listing(f"{data.layout}, and {len(prior.items)} of the prior: {prior.layout}", items, broken, left_out)


def _captions_mark(entry: Entry) -> str:
    """Of texts and weights, wherever their states lie."""
    captions = [(each.text, each.weight, each.states and each.states.name) for each in entry.captions]
    return mark_of(entry.item.repeats, captions, *["prior"] * entry.item.prior)


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have."""
    if not 0 <= settings.validation < 1:
        raise ConfigError(f"source.validation is {settings.validation}; expected a share from 0 to below 1.")
    weights = (settings.captions or {"text": 1}).values()
    if not all(isinstance(weight, int | float) and 0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"source.captions is {settings.captions}; expected fields with weights above 0, like {{\"prompt\": 1}}.")
    if not 0 <= settings.prior_weight < float("inf"):
        raise ConfigError(f"source.prior_weight is {settings.prior_weight}; expected a number of 0 or more.")
    if settings.canny[0] < 0 or not 0 <= settings.canny[1] <= settings.canny[2]:
        raise ConfigError(f"source.canny is {list(settings.canny)}; expected [blur, lower, upper], like [1.0, 0.1, 0.2].")


def padded(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(T, C') each -> (B, M, C') with zeros behind, and the mask (B, M) of what is real."""
    lengths = torch.tensor([len(each) for each in states])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.nn.utils.rnn.pad_sequence(states, batch_first=True), mask


def _draw(captions: tuple[Caption, ...], rng: np.random.Generator) -> Caption:
    """One, each as often as its weight says."""
    weights = np.array([caption.weight for caption in captions])
    return captions[int(rng.choice(len(captions), p=weights / weights.sum()))] if len(captions) > 1 else captions[0]


def _shape(stage: Stage, settings: Settings) -> Shape:
    return Shape(stage.base_size, not settings.buckets)
