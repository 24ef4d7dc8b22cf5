"""The table of few steps: its rows, going on where it stopped, its plot."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from demo import WEIGHTS
from demo.evaluation import steps as evaluate_steps
from demo.evaluation.steps import PLAIN, Row, evaluate, format_report, is_adapter, load_pipeline, main, plan_rows, plot, timed
from pixart.errors import InputError
from pixart.sampling_note import LCM, note_metadata


def lora_file(path: Path, metadata: dict[str, str]) -> Path:
    """A LoRA that changes nothing."""
    pair = {"lora_down": torch.randn(2, 216), "lora_up": torch.zeros(216, 2)}
    save_file({f"diffusion_model.blocks.0.attn.proj.{name}.weight": value for name, value in pair.items()}, path, metadata=metadata)
    return path


def test_every_number_of_steps_stands_beside_the_same_without_distillation() -> None:
    rows = plan_rows((1, 2, 4, 8), ("lcm", "dmd"))
    assert rows[0] == Row(PLAIN, 20, 4.5) and {row.steps for row in rows if row.model == PLAIN} == {1, 2, 4, 8, 12, 20}
    assert [row.steps for row in rows if row.model == "lcm"] == [1, 2, 4, 8]
    assert [(row.steps, row.guidance) for row in rows if row.model == "dmd"] == [(1, 1.0)]
    assert len({row.name for row in rows}) == len(rows) and len(plan_rows((12,), ())) == 2


def test_rows_are_kept_and_measured_again_only_for_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure_row(pipeline: object, row: Row, *_: object) -> dict:
        measured.append(row.name)
        figures = {"pictures": 2, "correct": 0.5, "interval": [0.3, 0.7]}
        return {"one_object": figures, "two_objects": figures, "seconds": 0.1 * row.steps}

    monkeypatch.setattr(evaluate_steps, "measure_row", measure_row)
    monkeypatch.setattr(evaluate_steps, "load_pipeline", lambda *_: None)
    lora, out = lora_file(tmp_path / "lcm.safetensors", note_metadata(LCM)), tmp_path / "few.json"
    settings = ({"lcm": lora}, WEIGHTS["diffusion_models"], (4,), out)
    evaluate(*settings, 2, 0, 2, torch.float32)
    assert len(measured) == 4
    evaluate(*settings, 2, 0, 2, torch.float32)
    assert len(measured) == 4
    lora_file(lora, note_metadata(LCM))
    report = evaluate(*settings, 2, 0, 2, torch.float32)
    assert measured[4:] == ["lcm, 4 steps, cfg 1"]
    with pytest.raises(InputError, match="was measured with count 2 instead of 3"):
        evaluate(*settings, 3, 0, 2, torch.float32)
    table = format_report(report).splitlines()
    assert table[2].startswith("| not distilled | 20 | 4.5 | 50.0% | 50.0% | 2.00 |") and len(table) == 6
    plot(report, tmp_path / "few.png")
    assert (tmp_path / "few.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(out.read_text()) == report


def test_a_lora_is_put_into_the_demo_and_must_say_how_it_is_sampled(tmp_path: Path) -> None:
    lora = lora_file(tmp_path / "lcm.safetensors", note_metadata(LCM))
    assert is_adapter(lora) and not is_adapter(WEIGHTS["diffusion_models"])
    assert load_pipeline(WEIGHTS["diffusion_models"], lora, torch.float32).note == LCM
    with pytest.raises(InputError, match="doesn't say how it is sampled"):
        load_pipeline(WEIGHTS["diffusion_models"], lora_file(tmp_path / "style.safetensors", {}), torch.float32)


def test_seconds_are_those_of_sampling() -> None:
    sampler, spent = timed(lambda *_: np.zeros((1, 8, 8, 3)))
    sampler(["x"], 8, 8, 1.0, [0])
    sampler(["x"], 8, 8, 1.0, [0])
    assert len(spent) == 2 and all(0 <= seconds < 1 for seconds in spent)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--lcm", str(tmp_path / "absent.safetensors"), "--dmd", "none"])
    assert "absent.safetensors; configs/train/demo-lcm-lora.json" in capsys.readouterr().err
