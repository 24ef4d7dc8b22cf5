"""What a recipe may say of pictures from files."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Settings:
    """Of pictures from files. Paths that a shipped recipe leaves null come from the command line."""

    data: str | None = None  # any layout of `places`
    text_encoder: str | None = None  # T5; not needed where every caption has its features
    vae: str | None = None  # not needed where every picture has its latents
    cache: str | None = None  # folder of features, which runs may share; null: "cache" beside the run's folder
    captions: dict[str, float] | None = None  # fields of a table with captions, and how often each is drawn
    default_caption: str | None = None  # of pictures that have none
    clean_captions: bool = False  # by the reference's rules
    lower_case: bool = True  # as the pipelines prepare prompts
    text_precision: str | None = None  # int8, nf4, fp4 or fp8_e4m3fn for T5's linear layers
    buckets: bool = True  # the nearest of the base size's 40 bins; false: the middle square
    skip_small: bool = False  # leave out what would have to be enlarged
    picture_size: bool = True  # alpha-1024 is told the picture's own size, as in its training; false: the bin's
    sample_latents: bool = True  # draw each latent anew from the VAE's mean and std; false: the mean
    hints: str | None = None  # "hed", "canny" or a folder with a picture for each, for a ControlNet
    hed: str | None = None  # ControlNetHED.pth
    canny: tuple[float, float, float] = (1.0, 0.1, 0.2)  # blur in pixels, thresholds of the gradient
    prior_data: str | None = None  # captioned pictures of what the model is to draw as before, in any layout; see objective "imitate"
    prior_weight: float = 1.0  # of their loss
    validation: float = 0.0  # share of the pictures that is held out
    allow_broken: bool = False  # go on although more than one picture in a hundred can't be read


class Shape(NamedTuple):
    """How pictures become latents in a stage."""

    base_size: int
    squares: bool
