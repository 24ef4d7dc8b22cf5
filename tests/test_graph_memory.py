"""benchmarks.graph_memory: stages in the real host on tiny files, and its report."""
from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import graph_memory
from benchmarks.graph_report import write_graph_report
from tests.support import host_models, tiny_text

pytest.importorskip("bitsandbytes")


def test_stages_in_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the VAE, which the host has in one size only."""
    tiny_text.save_t5_folder(tiny_text.tiny_t5(), graph_memory.t5_folder(tmp_path, 2))
    host_models.write_model(tmp_path / "made").replace(graph_memory.transformer_file(tmp_path))
    decoded = []
    monkeypatch.setattr(graph_memory, "decode", lambda path, latent, dtype, stages: decoded.append(latent["samples"]))
    chosen = Namespace(layers=2, px=64, dtype="bf16", device="cpu")
    found = graph_memory.measure(tmp_path, "nf4", chosen)
    assert list(found["stages"]) == ["T5: load", "T5: encode", "transformer: load", "transformer: one step"]
    assert all(0 < found["before_gib"] * 0.5 < one["peak_gib"] for one in found["stages"].values())
    assert decoded[0].shape == (1, 4, 8, 8) and torch.isfinite(decoded[0]).all()


def test_report(tmp_path: Path) -> None:
    def one(highest: float) -> dict:
        return {"before_gib": 0.5, "stages": {"T5: load": {"peak_gib": 2.0}, "VAE: decode": {"peak_gib": highest}}}

    settings = {"dtype": "bf16", "px": 1024, "layers": 24, "device": "cpu"}
    found = {"int8": one(7.4), "nf4": one(6.9), "fp4": {"error": "no memory"}}
    write_graph_report(tmp_path / "new" / "graph.json", found, settings, "a note")
    table = (tmp_path / "new" / "graph.md").read_text()
    assert "| T5: load | 2.00 | 2.00 |" in table and "fp4 fails: no memory" in table and "a note" in table
    assert "**7.40** (7.95 GB, within 8 GB) | **6.90** (7.41 GB, ABOVE 7 GB) |" in table
    assert json.loads((tmp_path / "new" / "graph.json").read_text())["results"]["nf4"]["stages"]["VAE: decode"]["peak_gib"] == 6.9


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def run_child(place, precision, chosen):
        done.append(precision)
        return {"error": "no"} if len(done) == 1 else {"before_gib": 0.5, "stages": {"T5: load": {"peak_gib": 2.0}}}

    monkeypatch.setattr(graph_memory, "run_child", run_child)
    monkeypatch.setattr(graph_memory, "write_files", lambda place, layers: None)
    command = ["--out", str(tmp_path), "--work", str(tmp_path)]
    for _ in range(2):
        graph_memory.main(command)
    assert done == ["int8", "nf4", "int8"]
    graph_memory.main([*command, "--px", "512"])
    assert done[3:] == ["int8", "nf4"]


def test_decoder_is_sdxl_s() -> None:
    """Names and shapes of the released file: 248 tensors, 83.65M numbers."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        weights = diffusers.AutoencoderKL(**graph_memory.SDXL_VAE).state_dict()
    assert (len(weights), sum(value.numel() for value in weights.values())) == (248, 83_653_863)
