"""The part of the page that says how far a job is, as HTML. All text in it is escaped: prompts and names of files are strangers' words."""
from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image
from torch import Tensor

from ..preview import LatentPreview
from .line import CANCELLED, FAILED, Job

PREVIEW_SIDE = 384  # pixels on the page, of the longer side


def message(text: str, kind: str = "said") -> str:
    """One sentence; kind: said, done or failed, for its looks and for screen readers."""
    role = "alert" if kind == "failed" else "status"
    return f'<div class="pixart-{kind}" role="{role}" aria-live="polite">{escape(text)}</div>'


def describe(job: Job, preview: LatentPreview) -> str:
    """Of a job that waits, is drawn, or has ended."""
    notes = "".join(f'<p class="pixart-note">{escape(note)}</p>' for note in job.notes)
    if job.outcome is not None:
        return _ending(job) + notes
    progress, settings = job.progress, job.settings
    if job.is_cancelled:  # a step of a large model takes long
        return message("Cancelling after this step.") + notes
    if progress.ahead:
        before = "1 is before you" if progress.ahead == 1 else f"{progress.ahead} are before you"
        return message(f"Waiting in line: {before}.")
    if not progress.step:
        return message(f"{progress.text} ...") + notes
    which = f", picture {progress.picture} of {settings.pictures}" if settings.pictures > 1 else ""
    done = (progress.picture - 1) * settings.steps + progress.step
    bar = f'<progress max="{settings.pictures * settings.steps}" value="{done}" aria-label="Progress"></progress>'
    shown = "" if progress.foreseen is None else _preview(preview(progress.foreseen))
    return message(f"Step {progress.step} of {settings.steps}{which}") + bar + shown + notes


def _ending(job: Job) -> str:
    count = len(job.pictures)
    drawn = f"{count} picture{'' if count == 1 else 's'}"
    if job.outcome == FAILED:
        return message(job.error, "failed")
    if job.outcome == CANCELLED:
        return message(f"Cancelled. {drawn} of {job.settings.pictures} drawn." if count else "Cancelled.", "done")
    return message(f"Done: {drawn}.", "done")


def _preview(pictures: Tensor) -> str:
    """The first of pictures (B, 3, h, w) in 0..1, inside the page itself: no file is written for it."""
    values = (pictures[0].movedim(0, -1) * 255).round().byte().numpy()
    image = Image.fromarray(values)
    scale = PREVIEW_SIDE / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img class="pixart-preview" alt="Preview" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
