"""Style presets: words around a prompt."""
from __future__ import annotations

from typing import NamedTuple

PLACE = "{prompt}"


class Style(NamedTuple):
    """prompt: with PLACE where the user's goes; negative: joins the user's own."""

    prompt: str
    negative: str = ""


NO_STYLE = "none"
STYLES: dict[str, Style] = {
    NO_STYLE: Style(PLACE),
    "photograph": Style("a photograph of {prompt}, natural light, fine detail, 35 mm lens", "drawing, painting, render, blurry"),
    "film still": Style("a still from a feature film, {prompt}, wide shot, soft grain, muted colours", "drawing, text, watermark"),
    "watercolour": Style("{prompt}, watercolour on rough paper, loose washes, white left bare", "photograph, sharp outlines"),
    "oil painting": Style("an oil painting of {prompt}, thick visible brush strokes, warm varnish", "photograph, flat colours"),
    "pencil drawing": Style("a pencil drawing of {prompt}, hatched shadows, grey on cream paper", "colour, photograph"),
    "ink and flat colour": Style("{prompt}, comic panel, confident ink lines, flat colours", "photograph, soft shading"),
    "woodcut": Style("a woodcut print of {prompt}, carved lines, two inks on plain paper", "photograph, gradients"),
    "pixel art": Style("{prompt} as pixel art, few colours, hard edges, 16-bit game", "photograph, smooth gradients, blurry"),
    "clay model": Style("{prompt} modelled in clay, finger marks, small studio set, soft lamp", "drawing, flat colours"),
    "isometric": Style("{prompt}, isometric view, small diorama on a plain background", "perspective distortion, clutter"),
}


def styled(prompt: str, negative: str, style: str) -> tuple[str, str]:
    """(prompt, negative prompt) as the model gets them; `style` is a key of STYLES."""
    chosen = STYLES[style]
    parts = [part for part in (negative.strip(), chosen.negative) if part]
    return chosen.prompt.replace(PLACE, prompt.strip()), ", ".join(parts)
