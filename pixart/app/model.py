"""The one loaded model behind the page: T5 beside it or released, prompts kept, a LoRA put on and taken off."""
from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..adapters import fit_adapter, load_adapter, parameter_shapes
from ..adapters.merge import restore_weights, weights_of
from ..bins import bin_table
from ..config import get_variant
from ..errors import InputError, PixArtError
from ..logs import get_logger
from ..pipeline import Pipeline
from ..preview import fit_preview
from ..samplers import LCM, DPMSolver, OneStep, SASolver, sampler_for
from ..sampling_note import SamplingNote, read_note
from ..text.embeddings import TextEmbeddings
from ..text.encoder import TextEncoder, load_text_encoder
from ..timesteps import seems_few_step
from .memory import bytes_of, free_bytes, give_back, needed_for_drawing
from .settings import NO_LORA, Offer, Settings
from .styles import styled

logger = get_logger(__name__)

KEEP, RELEASE, AUTO = "keep", "release", "auto"  # T5, while the transformer draws
ONE_STEP_NAMES = r"dmd|one[-_ ]?step|(?<!\d)1[-_ ]?step"
LORA_SUFFIXES = (".safetensors", ".pt", ".bin")
KEPT_PROMPTS = 64


@dataclass(frozen=True)
class Places:
    """Files and choices, as the command line gives them. loras: a folder; few_steps: what the transformer was distilled for."""

    transformer: Path
    text_encoder: Path
    vae: Path
    tokenizer: Path | None = None
    loras: Path | None = None
    variant: str = "auto"
    ema: bool = False
    dtype: torch.dtype | None = None
    device: str = "cpu"
    t5_precision: str | None = None
    t5: str = AUTO
    few_steps: str = AUTO


@dataclass(frozen=True)
class Reports:
    """Where drawing says how far it is. step(picture, step, latents foreseen) may raise to end it."""

    say: Callable[[str], None]
    note: Callable[[str], None]
    step: Callable[[int, int, Tensor], None]


class Model:
    """Loads everything once; `draw` is for one caller at a time. Raises PixArtError or OSError saying what to do."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._prompts: OrderedDict[tuple[str, Lora | None], TextEmbeddings] = OrderedDict()
        self._loras_of_text: dict[tuple[Path, int], bool] = {}
        encoder = self._load_encoder()
        found = Pipeline.from_files(
            places.transformer, None, places.vae, variant=places.variant, dtype=places.dtype, device=places.device, ema=places.ema
        )
        self.pipe = Pipeline(found.transformer, encoder, found.vae, base_size=found.base_size, max_tokens=found.max_tokens)
        self.pipe.note = self._own_note = found.note
        self._plain = weights_of(self.pipe.transformer)  # names, no copies
        self._plain_text = weights_of(encoder.model)
        self._worn: Lora | None = None
        self.short_of_memory = self._is_short(encoder.model)
        self.preview = fit_preview(self.pipe.vae)
        self.offer = _offer_of(self.pipe, places)
        self.folders = _folders_of(places)
        self._release_if_short()

    def draw(self, settings: Settings, reports: Reports) -> Iterator[tuple[Settings, Image.Image]]:
        """The pictures one by one, each with the settings that draw it alone. Raises PixArtError, and what `reports.step` raises."""
        settings.check(self.offer)
        lora = self._lora_of(settings)
        self._check_few_steps(settings)
        positive, negative = styled(settings.prompt, settings.negative, settings.style)
        texts = [positive, *([negative] if settings.guidance > 1 else [])]
        reports.say("Reading the prompt")
        embeddings = self._encode(texts, lora, reports)
        for number in range(settings.pictures):
            one = settings.for_picture(number)
            yield one, self._draw_one(one, embeddings, number, reports)

    def _draw_one(self, settings: Settings, embeddings: list[TextEmbeddings], number: int, reports: Reports) -> Image.Image:
        return self.pipe(
            prompt_embeds=embeddings[0],
            negative_prompt_embeds=embeddings[1] if len(embeddings) > 1 else None,
            sampler=settings.chosen_sampler() if settings.sampler == SASolver.name else settings.sampler,  # a name heeds the file's note
            steps=settings.steps,
            guidance=settings.guidance,
            width=settings.width,
            height=settings.height,
            seed=settings.seed,
            progress=False,
            preview=lambda step, latents: reports.step(number, step + 1, latents),
        )[0]

    def _check_few_steps(self, settings: Settings) -> None:
        """Weights for many steps make a grey blur in few: that is said before it is drawn."""
        made_for = {_few_step_sampler(self.pipe, self.places)}
        if settings.lora != NO_LORA:
            made_for.add(_sampler_of_lora(self.places.loras / settings.lora))
        if settings.sampler in (LCM.name, OneStep.name) and settings.sampler not in made_for:
            raise InputError(
                f"The sampler {settings.sampler} needs weights that were distilled for it: choose such a LoRA, or {DPMSolver.name}."
            )

    # Prompts and T5

    def _encode(self, texts: list[str], lora: Lora | None, reports: Reports) -> list[TextEmbeddings]:
        """Embeddings on the CPU, kept for the next time; puts the LoRA on, T5's part too where a prompt is new."""
        key = lora if lora is not None and lora.changes_text else None
        absent = [text for text in texts if (text, key) not in self._prompts]
        with self._apart() if absent else nullcontext():
            if absent:
                self._load_encoder_again(reports)
            self._wear(lora, bool(absent), reports)
            for text in absent:
                self._prompts[text, key] = self.pipe.encode(text).to("cpu")
        self.pipe.transformer.to(self.places.device)  # what a LoRA had replaced may have stayed elsewhere
        for text in texts:
            self._prompts.move_to_end((text, key))
        found = [self._prompts[text, key] for text in texts]
        while len(self._prompts) > KEPT_PROMPTS:
            self._prompts.popitem(last=False)
        for part in found:
            if part.truncated and part.truncated[0]:
                reports.note(f"The prompt is too long; the model doesn't see: {part.truncated[0]}")
        return found

    def _load_encoder(self) -> TextEncoder:
        places = self.places
        return load_text_encoder(places.text_encoder, places.tokenizer, places.dtype, places.device, places.t5_precision)

    def _load_encoder_again(self, reports: Reports) -> None:
        """Where it had been released."""
        if self.pipe.text_encoder is None:
            reports.say("Loading T5")
            self.pipe.text_encoder = self._load_encoder()
            self._plain_text = weights_of(self.pipe.text_encoder.model)

    def _release_if_short(self) -> None:
        if self.short_of_memory and self.pipe.text_encoder is not None:
            self.pipe.text_encoder, self._plain_text = None, {}
            give_back()

    def _is_short(self, encoder: nn.Module) -> bool:
        if self.places.t5 != AUTO:
            return self.places.t5 == RELEASE
        free, needed = free_bytes(self.pipe.device), needed_for_drawing(self.pipe.base_size)
        logger.info("%.1f GiB free beside T5 of %.1f, drawing needs %.1f", *(each / 2**30 for each in (free, bytes_of(encoder), needed)))
        return free < needed

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """On a card without room for both, the transformer and the VAE wait in main memory while T5 is there."""
        together = not self.short_of_memory or self.pipe.device.type == "cpu"
        parts = [] if together else [self.pipe.transformer, self.pipe.vae.module]
        for part in parts:
            part.to("cpu")
        if parts:
            give_back()
        try:
            yield
        finally:
            self._release_if_short()
            for part in parts:
                part.to(self.places.device)

    # LoRA

    def _lora_of(self, settings: Settings) -> Lora | None:
        if settings.lora == NO_LORA or settings.strength == 0:
            return None
        path = self.places.loras / settings.lora
        written = path.stat().st_mtime_ns
        if (path, written) not in self._loras_of_text:
            self._loras_of_text[path, written] = _changes_text(path, self.pipe.transformer)
        return Lora(path, written, settings.strength, self._loras_of_text[path, written])

    def _wear(self, lora: Lora | None, with_text: bool, reports: Reports) -> None:
        """The plain weights, then this LoRA on them; T5's only where it is there and needed. Errors leave the plain weights."""
        text_needs_it = with_text and lora is not None and lora.changes_text
        if lora == self._worn and not text_needs_it:
            return
        restore_weights(self.pipe.transformer, self._plain)
        if self.pipe.text_encoder is not None:
            restore_weights(self.pipe.text_encoder.model, self._plain_text)
        self._worn, self.pipe.note = None, self._own_note
        if lora is not None:
            reports.say(f"Applying {lora.path.name}")
            reports.note(self.pipe.load_lora(lora.path, lora.strength, lora.strength if text_needs_it else 0.0))
            self._worn = lora


@dataclass(frozen=True)
class Lora:
    """One adapter to wear. changes_text: whether T5 is another with it."""

    path: Path
    written: int  # when, so that a new file of the same name counts as another
    strength: float
    changes_text: bool


def _changes_text(path: Path, transformer: nn.Module) -> bool:
    """Whether an adapter has layers for T5 as well; raises CheckpointError for one that doesn't fit."""
    adapter = load_adapter(path)
    with_text = fit_adapter(adapter, parameter_shapes(transformer), None, leave_text=True)
    return len(with_text.layers) < len(adapter.layers)


def _offer_of(pipe: Pipeline, places: Places) -> Offer:
    detection = pipe.transformer.detection
    few = _few_step_sampler(pipe, places)
    loras = _loras_in(places.loras)
    of_loras = {_sampler_of_lora(places.loras / name) for name in loras}
    # What the weights were made for comes first, and is the default
    samplers = [*filter(None, [few]), DPMSolver.name, SASolver.name, *sorted(of_loras - {None, few})]
    sizes = tuple((width, height) for height, width in bin_table(pipe.base_size).values())
    title = f"{get_variant(detection.variant).title} ({Path(detection.source).name})"
    return Offer(title, pipe.base_size, sizes, tuple(samplers), loras)


def _few_step_sampler(pipe: Pipeline, places: Places) -> str | None:
    """What the transformer was distilled for, as told or as its file says; None for many steps."""
    if places.few_steps != AUTO:
        return None if places.few_steps == "no" else places.few_steps
    return _sampler_named(read_note(places.transformer), Path(pipe.transformer.detection.source).parts[-3:])


def _sampler_of_lora(path: Path) -> str | None:
    return _sampler_named(read_note(path), [path.name])


def _sampler_named(note: SamplingNote | None, names: Sequence[str]) -> str | None:
    """A file's note is sure; the names of file and folders are all that others have."""
    if note is not None:
        return sampler_for(note).name
    if any(re.search(ONE_STEP_NAMES, name.lower()) for name in names):
        return OneStep.name
    return LCM.name if any(map(seems_few_step, names)) else None


def _loras_in(folder: Path | None) -> tuple[str, ...]:
    if folder is None:
        return ()
    if not folder.is_dir():
        raise InputError(f"--loras is {folder}, which is not a folder; give the one with your LoRA files.")
    return tuple(sorted(
        each.name for each in folder.iterdir() if each.suffix in LORA_SUFFIXES or (each / "adapter_config.json").is_file()
    ))  # fmt: skip


def _folders_of(places: Places) -> tuple[str, ...]:
    """Where the files lie, as sentences name it, the longest first."""
    files = [each.parent for each in (places.transformer, places.text_encoder, places.vae, places.tokenizer) if each is not None]
    given = [*files, *([places.loras] if places.loras is not None else [])]
    return tuple(sorted({f"{each}{os.sep}" for each in (*given, *(each.resolve() for each in given)) if each.name}, key=len, reverse=True))


def explain(error: BaseException, folders: Sequence[str] = ()) -> str:
    """One sentence for the page, without these folders of this machine; what nobody foresaw goes to the log with its traceback."""
    if isinstance(error, (PixArtError, ImportError)):
        text = str(error)
        for folder in folders:
            text = text.replace(folder, "")
        return text
    if isinstance(error, OSError):  # whose own text names folders as well
        logger.error("%s", error)
        return f"A file could not be read or written: {error.strerror or type(error).__name__}."
    if isinstance(error, torch.cuda.OutOfMemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return "The device ran out of memory; draw a smaller picture, or start the page with --t5 release or --t5-precision nf4."
    logger.log(logging.ERROR, "Drawing failed", exc_info=error)
    return f"Drawing failed with an unexpected error, a {type(error).__name__}; the log of the page has the rest."
