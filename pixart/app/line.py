"""One line for everybody: jobs are drawn one after the other, and each hears how many are before it."""
from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from ..logs import get_logger
from .model import Model, Reports, explain
from .pictures import save_picture
from .settings import Settings

logger = get_logger(__name__)
LONGEST_LINE = 50
DRAWN, CANCELLED, FAILED = "drawn", "cancelled", "failed"


@dataclass(frozen=True)
class Progress:
    """Where a job is. ahead: jobs before it; step: of `steps`, of picture number `picture` (from 1); foreseen: its latents."""

    text: str = ""
    ahead: int = 0
    picture: int = 0
    step: int = 0
    foreseen: Tensor | None = None


class Cancelled(Exception):
    """Ends drawing from within."""


class Job:
    """A wish on its way. Everything here may be read at any time; the line alone writes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.progress = Progress("Waiting")
        self.pictures: list[Path] = []
        self.notes: list[str] = []
        self.outcome: str | None = None  # DRAWN, CANCELLED, FAILED
        self.error = ""
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends it at the next step; harmless afterwards."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody wants it to end."""
        return self._cancelled.is_set()

    def reports(self) -> Reports:
        """For `Model.draw`; each of them ends a cancelled job."""

        def tell(progress: Progress) -> None:
            if self.is_cancelled:
                raise Cancelled
            self.progress = progress

        return Reports(
            say=lambda text: tell(Progress(text)),
            note=self.notes.append,
            step=lambda picture, step, foreseen: tell(Progress("Drawing", 0, picture + 1, step, foreseen)),
        )


class Line:
    """Draws with one model in one thread and writes pictures to one folder."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="pixart-line", daemon=True)
        self._thread.start()

    def join(self, settings: Settings) -> Job:
        """The last in the line. Raises InputError for settings that can't be drawn, and for a line that is full."""
        settings.check(self.model.offer)
        job = Job(settings)
        with self._changed:
            if len(self._waiting) >= LONGEST_LINE:
                raise InputError(f"{LONGEST_LINE} others are waiting already; try again later.")
            self._waiting.append(job)
            self._number()
            self._changed.notify_all()
        return job

    def leave(self, job: Job) -> None:
        """Cancels a job, at once if it is still waiting."""
        job.cancel()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.outcome = CANCELLED
                self._number()

    def close(self, patience: float = 30) -> None:
        """Cancels all, and waits for the step at hand."""
        for job in [*self._waiting]:
            self.leave(job)
        with self._changed:
            self._open = False
            if self._current is not None:
                self._current.cancel()
            self._changed.notify_all()
        self._thread.join(patience)

    def _number(self) -> None:
        drawing = int(self._current is not None)
        for index, job in enumerate(self._waiting):
            job.progress = Progress("Waiting", ahead=index + drawing)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._open:
                    return
                job = self._current = self._waiting.popleft()
                job.progress = Progress("Starting")
                self._number()
            job.outcome = self._finish(job)
            with self._changed:
                self._current = None
                self._number()

    def _finish(self, job: Job) -> str:
        """Draws a job to its end, whichever that is: nothing may stop the line."""
        try:
            if job.is_cancelled:
                return CANCELLED
            for settings, picture in self.model.draw(job.settings, job.reports()):
                job.pictures.append(save_picture(self.folder, picture, settings, self.model.offer.title))
                if job.is_cancelled and len(job.pictures) < job.settings.pictures:
                    return CANCELLED
            return DRAWN
        except Cancelled:
            return CANCELLED
        except Exception as error:  # whatever it is, the next in line goes on, and the page says it
            job.error = explain(error, self.model.folders)
            logger.log(logging.INFO, "A job failed: %s", job.error)
            return FAILED
