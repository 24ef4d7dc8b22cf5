"""The evaluation counts right: with pictures drawn by the generator in place of a model."""

import json
from pathlib import Path

import numpy as np
import pytest

from demo.data.reader import check
from demo.data.scenes import is_heldout, render, single_scene
from demo.evaluation import prompts as evaluation
from demo.evaluation.contact_sheet import Entry, make_contact_sheet
from demo.evaluation.prompts import Run, format_report, make_questions, measure, plan_runs, wilson_interval


class _Oracle:
    """A sampler that draws every prompt as its scene, except for each third one, which it leaves white."""

    def __init__(self, run: Run, seed: int) -> None:
        self.scenes = {}
        for objects in (1, 2):
            for question in make_questions(run, objects, seed):
                self.scenes[question.caption.text] = question.scene
        self.calls: list[tuple[int, float]] = []
        self.drawn = 0

    def __call__(self, prompts: list[str], width: int, height: int, guidance: float, seeds: list[int]) -> np.ndarray:
        assert len(set(seeds)) == len(prompts)
        self.calls.append((len(prompts), guidance))
        pictures = []
        for prompt in prompts:
            self.drawn += 1
            blank = np.ones((height, width, 3), np.float32)
            pictures.append(blank if self.drawn % 3 == 0 else render(self.scenes[prompt], width, height))
        return np.stack(pictures)


def test_measure_counts_right_and_wrong_pictures() -> None:
    run = Run("heldout", 12, width=208, height=304)
    oracle = _Oracle(run, seed=3)
    figures, entries, wrong = measure(oracle, run, seed=3, batch=5)
    assert figures["one_object"]["pictures"] == figures["two_objects"]["pictures"] == 12
    assert figures["one_object"]["correct"] == figures["two_objects"]["correct"] == pytest.approx(8 / 12, abs=1e-3)
    assert wrong["two_objects"]["correct"] < 0.1
    assert [entry.correct for entry in entries[:6]] == [True, True, False] * 2
    assert oracle.calls == [(5, 4.5), (5, 4.5), (2, 4.5)] * 2


def test_outlines_are_measured_by_shape_and_what_is_missing_has_none() -> None:
    rng = np.random.default_rng(0)
    circle, square = (single_scene(rng, "red", shape, "large", "center") for shape in ("circle", "square"))
    pictures = [render(circle, 256, 256), render(square, 256, 256)]
    drawn = evaluation.outlines([circle, square], [check(circle, pictures[0]), check(square, pictures[1])])
    assert drawn["circle"] > 0.97 and drawn["square"] > 0.97 and drawn["all"] == pytest.approx((drawn["circle"] + drawn["square"]) / 2, abs=1e-4)
    other = evaluation.outlines([circle], [check(circle, pictures[1])])["circle"]
    assert other == pytest.approx(np.pi / 4, abs=0.06)  # less than of a square in its box
    assert evaluation.outlines([circle], [check(circle, np.ones((256, 256, 3)))]) == {"all": 0, "circle": 0}


def test_questions_are_held_out_state_the_place_and_repeat() -> None:
    run = Run("heldout", 30)
    for objects in (1, 2):
        questions = make_questions(run, objects, seed=0)
        assert questions == make_questions(run, objects, seed=0)
        assert all(is_heldout(q.scene) and len(q.scene.objects) == objects for q in questions)
    assert all("place1" in q.caption.stated for q in make_questions(run, 1, seed=0))


def test_runs_cover_the_report() -> None:
    runs = {run.name: run for run in plan_runs(200, 4.5)}
    assert runs["heldout"].count == 200 and runs["cfg1"].guidance == 1 and not runs["untrained"].trained
    assert runs["seen"].split == "train"
    assert sum("x" in name for name in runs) == 5


def test_wilson_interval_against_published_values() -> None:
    assert wilson_interval(0, 10) == (0.0, 0.2775)  # Newcombe 1998 gives 0.2775 for 0 of 10
    low, high = wilson_interval(81, 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


def test_evaluate_keeps_earlier_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        dtype = "torch.float32"

    runs = [Run("heldout", 2), Run("256x256", 2)]
    monkeypatch.setattr(evaluation, "make_sampler", lambda pipeline, steps: _Oracle(runs[0], 0))
    (tmp_path / "evaluation.json").write_text(json.dumps({"runs": {}}))
    for run in runs:
        report = evaluation.evaluate(Fake(), [run], tmp_path)  # type: ignore[arg-type]
    assert list(report["runs"]) == ["heldout", "wrong prompt", "256x256"]
    assert (tmp_path / "contact-sheet.png").stat().st_size > 1000
    assert "| heldout | 256x256 | 4.5 | 100.0% of 2 | 50.0% of 2 |" in format_report(report)


def test_contact_sheet_frames_verdicts() -> None:
    picture = np.zeros((128, 512, 3), np.uint8)
    sheet = np.asarray(make_contact_sheet([Entry(picture, "a long prompt " * 9, True), Entry(picture, "b", False)], 2))
    green, red = (sheet == (38, 150, 70)).all(2), (sheet == (200, 40, 40)).all(2)
    assert green.any() and red.any()
    assert np.nonzero(green)[1].max() < np.nonzero(red)[1].min()
    with pytest.raises(ValueError, match="at least one"):
        make_contact_sheet([])
