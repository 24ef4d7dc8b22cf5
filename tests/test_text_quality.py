"""benchmarks.text_quality: its bookkeeping, and the demo's T5 in each precision; drawing is demo.evaluation.prompts's, tested there."""
from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import text_quality
from benchmarks.text_quality import ALL, FP32
from demo import WEIGHTS
from pixart import Pipeline

CHOSEN = {"count": 2, "steps": 1, "size": 128, "cfg": 4.5, "seed": 0, "dtype": "fp32", "device": "cpu", "batch": 4, "note": "a note"}


def test_report_compares_with_fp32_and_goes_on(tmp_path, monkeypatch) -> None:
    drawn = []

    def measured(pipeline, precision, chosen):
        drawn.append(precision)
        kinds = {kind: {"correct": 0.5, "pictures": 2} for kind in text_quality.KINDS.values()}
        row = {"alignment": 0.5, "interval": (0.25, 0.75), "seconds": 1.0, **kinds}
        # channels last in shape only, as the VAE's pictures lie in memory
        pictures = np.arange(48, dtype=np.uint8).reshape(4, 3, 2, 2).transpose(0, 2, 3, 1)
        return row, pictures if precision == FP32 else pictures + np.uint8(51)

    monkeypatch.setattr(text_quality, "measure_precision", measured)
    chosen = Namespace(out=tmp_path, **CHOSEN)
    text_quality.run(str, [FP32, "int8"], chosen)
    text_quality.run(str, ALL, chosen)
    assert drawn == [FP32, "int8", "bf16", "nf4", "fp4", "fp8_e4m3fn"]
    results = json.loads((tmp_path / "text_quality.json").read_text())["results"]
    assert (results[FP32]["difference"], results["nf4"]["difference"]) == (0, 0.2)
    table = (tmp_path / "text_quality.md").read_text()
    assert "| int8 | 50.0% (25% to 75%) | 50% | 50% | 0.2000 |" in table and "a note" in table
    assert {file.name for file in tmp_path.iterdir()} == {"text_quality.json", "text_quality.md"}
    chosen.steps = 3  # another measurement
    text_quality.run(str, [FP32], chosen)
    assert drawn[6:] == [FP32]


def test_quantized_encoder_draws_nearly_the_same() -> None:
    pytest.importorskip("bitsandbytes")
    drawing = Pipeline.from_files(WEIGHTS["diffusion_models"], None, WEIGHTS["vae"], variant="demo")
    chosen = Namespace(**{**CHOSEN, "count": 1})
    found = {}
    for precision in (FP32, "int8", "nf4"):
        pipeline = text_quality.with_text_encoder(drawing, precision)
        assert pipeline.transformer is drawing.transformer and pipeline.text_encoder.precision in (precision, "float32")
        row, found[precision] = text_quality.measure_precision(pipeline, precision, chosen)
        assert found[precision].shape == (2, 128, 128, 3) and row["one_object"]["pictures"] == 1
    apart = [np.abs(found[name].astype(int) - found[FP32]).mean() for name in ("int8", "nf4")]
    assert 0 < apart[0] < apart[1] < 20
