"""One line: in turn, with places, cancelled anywhere, never stopped by what goes wrong."""
from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("diffusers")
from PIL import Image

from pixart.app import line as line_module
from pixart.app.line import CANCELLED, DRAWN, FAILED, Line
from pixart.app.pictures import read_settings
from pixart.app.settings import Offer, Settings
from pixart.app.status import describe
from pixart.errors import InputError

OFFER = Offer("a model", 256, ((256, 256),), ("dpm++",))


def wish(prompt="star", **changes):
    return Settings(prompt, width=256, height=256, steps=3, **changes)


class SlowModel:
    """Draws grey pictures, a step at a time when `gate` lets it; prompts name what goes wrong."""

    offer = OFFER
    folders = ("/private/folder/",)

    def __init__(self):
        self.gate, self.order, self.active = threading.Semaphore(0), [], 0

    def draw(self, settings, reports):
        self.active += 1
        try:
            assert self.active == 1
            self.order.append(settings.prompt)
            reports.say("Reading the prompt")
            for number in range(settings.pictures):
                for step in range(settings.steps):
                    self.gate.acquire()
                    if settings.prompt == "bad":
                        raise InputError("/private/folder/x.safetensors: a sentence")
                    if settings.prompt == "worse":
                        raise ZeroDivisionError("private detail")
                    reports.step(number, step + 1, torch.zeros(1, 4, 2, 2))
                yield settings.for_picture(number), Image.new("RGB", (8, 8), "grey")
        finally:
            self.active -= 1


@pytest.fixture
def model():
    return SlowModel()


@pytest.fixture
def line(model, tmp_path):
    found = Line(model, tmp_path)
    yield found
    threading.Thread(target=lambda: [model.gate.release() for _ in range(2000)]).start()
    found.close()
    assert not found._thread.is_alive()


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_jobs_are_drawn_in_turn_and_hear_their_place(line, model, tmp_path):
    first, second, third = line.join(wish("one")), line.join(wish("two", pictures=2, seed=5)), line.join(wish("three"))
    until(lambda: first.progress.text == "Reading the prompt")
    assert (second.progress.ahead, third.progress.ahead) == (1, 2)
    assert "1 is before you" in describe(second, None) and "2 are before you" in describe(third, None)
    [model.gate.release() for _ in range(3)]
    until(lambda: first.outcome)
    until(lambda: third.progress.ahead == 1)
    [model.gate.release() for _ in range(9)]
    until(lambda: third.outcome)
    assert model.order == ["one", "two", "three"] and [job.outcome for job in (first, second, third)] == [DRAWN] * 3
    assert [read_settings(path)[0].seed for path in second.pictures] == [5, 6]
    assert read_settings(second.pictures[1]) == (wish("two", seed=6), "a model")
    assert "Done: 2 pictures." in describe(second, None)


def test_progress_counts_over_all_pictures(line, model):
    job = line.join(wish("one", pictures=2))
    [model.gate.release() for _ in range(4)]
    until(lambda: (job.progress.picture, job.progress.step) == (2, 1))
    shown = describe(job, lambda latents: torch.full((1, 3, 2, 2), 0.5))
    assert "Step 1 of 3, picture 2 of 2" in shown and 'max="6" value="4"' in shown and "data:image/png;base64," in shown


def test_cancelling_ends_a_job_at_its_step_and_frees_a_waiting_one_at_once(line, model):
    first, second, third = line.join(wish("one", pictures=3)), line.join(wish("two")), line.join(wish("three"))
    [model.gate.release() for _ in range(4)]
    until(lambda: len(first.pictures) == 1)
    line.leave(second)
    assert second.outcome == CANCELLED
    until(lambda: third.progress.ahead == 1)
    line.leave(first)
    line.leave(first)  # harmless
    assert first.outcome is None and "Cancelling after this step." in describe(first, None)
    [model.gate.release() for _ in range(10)]
    until(lambda: third.outcome)
    assert (first.outcome, third.outcome, model.order) == (CANCELLED, DRAWN, ["one", "three"])
    assert "Cancelled. 1 picture of 3 drawn." in describe(first, None)


def test_errors_are_sentences_and_the_line_goes_on(line, model, caplog):
    jobs = [line.join(wish(prompt)) for prompt in ("bad", "worse", "fine")]
    [model.gate.release() for _ in range(9)]
    until(lambda: jobs[2].outcome)
    assert [job.outcome for job in jobs] == [FAILED, FAILED, DRAWN]
    assert jobs[0].error == "x.safetensors: a sentence" and 'role="alert"' in describe(jobs[0], None)
    assert "ZeroDivisionError" in jobs[1].error and "private detail" not in describe(jobs[1], None)
    assert "private detail" in caplog.text  # whoever runs the page can find it


def test_a_disk_that_is_full_is_said(line, model, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "/private/folder")

    monkeypatch.setattr(line_module, "save_picture", full)
    job = line.join(wish())
    [model.gate.release() for _ in range(3)]
    until(lambda: job.outcome)
    assert job.outcome == FAILED and job.error == "A file could not be read or written: No space left on device."


def test_closing_ends_what_waits_and_what_is_drawn(model, tmp_path):
    line = Line(model, tmp_path)
    first, second = line.join(wish()), line.join(wish())
    until(lambda: first.progress.text == "Reading the prompt")
    threading.Timer(0.2, model.gate.release).start()
    line.close()
    assert (first.outcome, second.outcome) == (CANCELLED, CANCELLED) and not line._thread.is_alive()


def test_what_is_not_offered_and_a_full_line_are_refused_at_the_door(line, monkeypatch):
    with pytest.raises(InputError, match="not a size"):
        line.join(Settings("x", width=1, height=1))
    monkeypatch.setattr(line_module, "LONGEST_LINE", 2)
    jobs = [line.join(wish())]
    until(lambda: jobs[0].progress.text == "Reading the prompt")
    jobs += [line.join(wish()), line.join(wish())]
    with pytest.raises(InputError, match="2 others are waiting"):
        line.join(wish())


def test_the_words_of_strangers_are_escaped():
    job = SimpleNamespace(outcome=FAILED, error="<script>x</script>", notes=["<b>"], pictures=[], settings=wish())
    shown = describe(job, None)
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "&lt;b&gt;" in shown
