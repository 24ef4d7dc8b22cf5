"""The figures of `benchmarks scale`: how rates are taken from logs, and the estimate on paper."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
from benchmarks import scale, scale_paper
from benchmarks.scale_paper import CARD, Part, counted, estimate, paper_lines, stage_flops, timed
from benchmarks.scale_stages import stages

FACTS = {"cpu": "A CPU", "cores": 2, "memory_gib": 23.5, "python": "3.11", "torch": "2.11"}
PARTS = {name: Part(1e12, 10.0, 0.5) for name in ("T5", "captions", "VAE encode", "VAE decode", "transformer")}


def log(worker: int, *ends: float) -> list[dict]:
    return [{"worker": worker, "begin": end - 1, "end": end, "items": 2} for end in ends]


def test_a_rate_counts_only_while_all_workers_are_at_work() -> None:
    assert scale.steady_rate(log(1, 1, 2, 3, 4), 1) == pytest.approx(6 / 3)
    both = log(1, 5, 6, 7, 8) + log(2, 6, 7, 8, 20)  # from 6, when the second is warm, to 8, when the first is done
    assert scale.steady_rate(both, 2) == pytest.approx(8 / 2)
    for rows, workers in ((log(1, 1), 1), (log(1, 1, 2), 2), (log(1, 1, 2) + log(2, 5, 6), 2)):
        with pytest.raises(RuntimeError, match="give more --items"):
            scale.steady_rate(rows, workers)


def test_every_stage_runs_and_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("benchmarks.scale_stages.TEXTS_A_PICTURE", 12)
    monkeypatch.setattr("pixart.scale.extract_stage.PICTURES_AT_ONCE", 2)
    monkeypatch.setattr("benchmarks.scale_stages.PICTURES_A_DRAWN", 1)
    for name, make in stages(4, 1).items():
        assert scale.rate([make], "local", 1) > 0, name


def test_operations_are_counted_and_set_beside_the_machines_rate() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    assert counted(lambda: a @ b) == 2 * 8 * 16 * 4
    part = timed(lambda: a @ b, rate=1e9)
    assert part.share == pytest.approx(part.flops / part.seconds / 1e9)


def test_the_estimate_follows_from_operations_share_and_rates() -> None:
    found, flops = estimate(PARTS), stage_flops(PARTS)
    encode = next(row for row in found["prepared"]["stages"] if row["stage"] == "VAE encode")
    assert flops["VAE encode"] == pytest.approx(1e12 * (1024 / 256) ** 2)
    assert encode["seconds_here"] == pytest.approx(flops["VAE encode"] / 1e11)
    assert encode["card_days"] == pytest.approx(33e6 * flops["VAE encode"] / (312e12 * 0.5) / 86400)
    assert found["prepared"]["largest"] == "captions" and found["drawn"]["largest"] == "transformer"
    assert found["drawn"]["card_days"] == pytest.approx(sum(row["card_days"] for row in found["drawn"]["stages"]))
    captions = found["prepared"]["stages"][0]
    assert captions["seconds_on_card"] >= scale_paper.TOKENS * 2 * scale_paper.LANGUAGE / (CARD.gbs * 1e9) / scale_paper.WRITTEN_TOGETHER
    lines = paper_lines(found)
    assert "The largest cost: captions." in "\n".join(lines) and "The largest cost: transformer." in "\n".join(lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_the_report_has_a_table_for_each_part(tmp_path: Path) -> None:
    rows = [{"stage": "T5", "on": on, "workers": workers, "rate": 10.0 * workers, "all": []} for on, workers in scale.CASES]
    ray = {"local": {"seconds_an_item": 1.0, "seconds_to_begin": 0.1}, "ray": {"seconds_an_item": 1.05, "seconds_to_begin": 9.0}}
    text = scale.markdown({"machine": FACTS, "note": "", "rates": rows, "ray": {**ray, "overhead": 0.05}, "paper": estimate(PARTS)})
    assert "| T5 | 10.00 | 10.00 | 20.00 (2.00 x) | 10.00 | 20.00 (2.00 x) |" in text
    assert "Overhead of Ray: 5.0%" in text and "## On paper" in text
    assert json.dumps(scale.rounded_more({"a": [1.23456, 2]})) == '{"a": [1.235, 2]}'


def test_a_part_measured_alone_is_added_to_what_the_same_machine_measured_before(tmp_path: Path) -> None:
    kept, facts = tmp_path / "scale.json", {"machine": {"cores": 2, "memory_gib": 23.5}, "note": "quiet"}
    assert scale.begun(kept, facts) == facts
    kept.write_text(json.dumps({**facts, "note": "before", "rates": [1], "ray": {"overhead": 0.5}}), encoding="utf-8")
    assert scale.begun(kept, facts) == {**facts, "rates": [1], "ray": {"overhead": 0.5}}
    other = {**facts, "machine": {"cores": 64, "memory_gib": 23.5}}
    assert scale.begun(kept, other) == other
