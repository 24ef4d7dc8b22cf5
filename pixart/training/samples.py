"""Pictures that a run draws as it goes: a contact sheet of the same prompts from the same noise."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ..config import get_variant
from ..samplers import sampler_for
from ..sampling import initial_noise, noise_of_steps, sources_of
from ..sampling_note import SamplingNote
from .batch import Batch, Source
from .buckets import bucket_sizes
from .draws import Draws
from .methods import Method
from .precision import autocast
from .recipe import Recipe

CELL, MARGIN, CAPTION = 256, 8, 34  # pixels: longest side of a picture on the sheet, between them, below each
DRAWS_STAGE = 2**31 - 2  # hinted samples are of pictures that no stage of a recipe draws


@dataclass(frozen=True)
class Shown:
    """One picture to draw. context: (2, M, C'), the negative prompt first; mask: (2, M); size: height and width in pixels."""

    title: str
    context: Tensor
    mask: Tensor
    size: tuple[int, int]
    hint: Tensor | None = None  # (1, C, H, W)


class Sampler:
    """Draws the samples of a recipe with whatever weights the network has."""

    def __init__(self, recipe: Recipe, method: Method, source: Source, note: SamplingNote | None = None) -> None:
        """note: how the model in training is sampled, if it is distilled to few steps."""
        self.recipe, self.samples, self.method, self.source = recipe, recipe.samples, method, source
        self.sampler = sampler_for(note)
        self.steps = self.sampler.steps if recipe.samples.steps is None else recipe.samples.steps
        self.guidance = self.sampler.guidance if recipe.samples.guidance is None else recipe.samples.guidance
        self.channels = get_variant(recipe.variant).transformer.in_channels

    def sheet(self, network: nn.Module, stage: int, device: torch.device) -> Image.Image:
        """All samples at the stage's base size, on one picture."""
        shown = self._hinted(stage) if getattr(self.recipe.source.settings, "hints", None) else self._prompted(stage)
        latents = [self.draw(network, one, self.samples.seed + number, device) for number, one in enumerate(shown)]
        pictures = [self.source.decode(latent.cpu())[0] for latent in latents]
        return contact_sheet(pictures, [one.title for one in shown])

    @torch.no_grad()
    def draw(self, network: nn.Module, shown: Shown, seed: int, device: torch.device) -> Tensor:
        """(1, C, H, W), fp32, with guidance; of DPM-Solver++ 2M unless the model is distilled."""
        height, width = shown.size
        scheduler, noise = self.sampler.scheduler(), sources_of(seed, 1)
        scheduler.set_timesteps(self.steps)
        latent = initial_noise((1, self.channels, height // 8, width // 8), noise).to(device) * scheduler.init_noise_sigma
        own_noise = noise_of_steps(scheduler, noise)
        hint = None if shown.hint is None else shown.hint.expand(2, -1, -1, -1)
        sides = torch.tensor([[height, width]], dtype=torch.float32).expand(2, 2)
        batch = Batch(latent.expand(2, -1, -1, -1), shown.context, shown.mask, sides, torch.ones(2), 2.0, hint=hint).to(device)
        conditions = self.method.conditions(network, batch)
        for timestep in scheduler.timesteps:
            with autocast(self.recipe.precision, device):
                predicted = network(latent.expand(2, -1, -1, -1), timestep.to(device).expand(2), **conditions)
            negative, positive = predicted[:, : self.channels].float().chunk(2)
            guided = negative + self.guidance * (positive - negative)
            latent = scheduler.step(guided, timestep, latent, **own_noise, return_dict=False)[0]
        return latent

    def _prompted(self, stage: int) -> list[Shown]:
        """The recipe's prompts, each at the bin nearest to its ratio."""
        sizes = bucket_sizes(get_variant(self.recipe.variant).base_size, self.recipe.stages[stage].base_size)
        shown = []
        for number, prompt in enumerate(self.samples.prompts):
            ratio = self.samples.ratios[number % len(self.samples.ratios)]
            size = min(sizes, key=lambda size: abs(math.log(size[0] / size[1] / ratio)))
            context, mask = self.source.encode([self.samples.negative, prompt])
            shown.append(Shown(prompt, context.float(), mask, size))
        return shown

    def _hinted(self, stage: int) -> list[Shown]:
        """As many pictures of the source as there are prompts, held-out ones if it has any: a hint belongs to its own caption."""
        settings, at, count = self.recipe.part_at("source", stage).settings, self.recipe.stages[stage], len(self.samples.prompts)
        batches = self.source.validation(settings, at, range(count))
        batches = batches or [self.source.batch(settings, at, Draws(self.recipe.seed, DRAWS_STAGE, 0, range(at.batch_size)))]
        places = [(batch, row) for batch in batches for row in range(len(batch.latent)) if batch.weight[row] > 0]
        return [self._of(batch, row) for batch, row in places[:count]]

    def _of(self, batch: Batch, row: int) -> Shown:
        """One picture of a batch, beside the empty caption."""
        context, mask = _stacked(self.source.null_context, batch.context[row][batch.mask[row]])
        height, width = (side * 8 for side in batch.latent.shape[2:])
        title = batch.captions[row] if batch.captions else f"hint {row + 1}"
        return Shown(title, context, mask, (height, width), batch.hint[row : row + 1])


def _stacked(*captions: Tensor) -> tuple[Tensor, Tensor]:
    """Captions (M, C') as one batch (B, M, C') and its mask."""
    lengths = torch.tensor([len(caption) for caption in captions])
    states = nn.utils.rnn.pad_sequence([caption.float() for caption in captions], batch_first=True)
    return states, torch.arange(states.shape[1]) < lengths[:, None]


def contact_sheet(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Pictures in rows, each with its title below, cut to two lines."""
    columns = min(4, math.ceil(math.sqrt(len(pictures))))
    rows = math.ceil(len(pictures) / columns)
    step, line = CELL + MARGIN, CELL + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * step + MARGIN, rows * line + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        small = picture.convert("RGB")
        small.thumbnail((CELL, CELL))
        x, y = MARGIN + number % columns * step, MARGIN + number // columns * line
        sheet.paste(small, (x + (CELL - small.width) // 2, y + (CELL - small.height) // 2))
        draw.multiline_text((x, y + CELL + 4), _two_lines(title, draw, font), fill="black", font=font, spacing=2)
    return sheet


def _two_lines(text: str, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """As many words as fit below a picture; letters that the font may lack become question marks."""
    lines, words = [""], text.encode("latin-1", "replace").decode("latin-1").split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= CELL or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == 2:
            lines[-1] += " ..."
            break
        else:
            lines.append(word)
    return "\n".join(lines)
