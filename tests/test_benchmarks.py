"""The helpers of benchmarks.full_size; nothing is timed here."""
from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path

import pytest

from benchmarks import full_size, report
from pixart.checkpoints import inspect_file
from pixart.config import TransformerConfig

STAGE = {"seconds": 3.14159, "cpu_seconds": 1.0, "peak_gib": 4.0, "private_gib": 2.5}
FOUND = {"load": STAGE, "step": STAGE, "before_gib": 0.7, "weights_gib": 2.28, "kept_in": "float32", "computed_in": "bfloat16"}
ROW = report.Result("sigma-512", "pth", "PixArtModelLoader", 1.2, FOUND)
FAILED = report.Result("sigma-900m", "pth", "UNETLoader", 1.2, {"error": "RuntimeError: a | b"})
SETTINGS = {"pixels": 512, "cfg": 4.5, "tokens": (120, 9), "sampler": "euler", "weight_dtype": "default"}
FACTS = {
    "cpu": "A CPU", "cores": 2, "threads": 1, "memory_gib": 23.5, "python": "3.11", "torch": "2.11", "safetensors": "0.8",
    "comfyui": "0.3.75", "nice": 5, "note": "Shared.",
}  # fmt: skip


@pytest.fixture
def tiny_variant(monkeypatch: pytest.MonkeyPatch):
    """Stands for the full-size one, so that files are written in a moment."""
    sizes = TransformerConfig(hidden_size=144, depth=2, num_heads=2, mlp_hidden=576, caption_channels=32)
    variant = type("Tiny", (), {"transformer": sizes})
    monkeypatch.setattr(full_size, "get_variant", lambda name: variant)
    full_size.random_weights.cache_clear()
    yield
    full_size.random_weights.cache_clear()


@pytest.mark.parametrize("kind", dict.fromkeys(case.format for case in full_size.CASES))
def test_each_format_is_written_where_the_menu_finds_it(tiny_variant, tmp_path: Path, kind: str) -> None:
    name = full_size.write_file(tmp_path, "sigma-512", kind)
    found = inspect_file(tmp_path / name, "auto")
    assert (found.config.hidden_size, found.config.depth, found.dtype) == (144, 2, "float16")
    assert (tmp_path / name).is_dir() == (kind in full_size.FOLDER_FORMATS)


def test_every_row_of_the_table_has_every_column() -> None:
    lines = [line for line in report.markdown([ROW, FAILED], FACTS, SETTINGS).splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "| 3.1 (1.0) | 4.00 (2.50) | 3.1 (1.0) | 4.00 (2.50) |" in lines[2] and "fails: RuntimeError: a / b" in lines[3]


def test_results_are_written_as_table_and_json(tmp_path: Path) -> None:
    report.write_results(tmp_path, [ROW, FAILED], FACTS, SETTINGS)
    stored = json.loads((tmp_path / "full_size.json").read_text(encoding="utf-8"))
    assert stored["results"][0]["found"]["load"]["seconds"] == 3.14 and stored["machine"] == FACTS
    assert (tmp_path / "full_size.md").read_text(encoding="utf-8").startswith("# Full-size files")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peak_counts_memory_that_was_given_back() -> None:
    size = 64 * 2**20
    with full_size.watched() as figures, mmap.mmap(-1, size) as block:  # given back for certain, which the allocator may not do
        block.write(b"1" * size)
    grown = figures["peak_gib"] - full_size.memory()["rss"] / full_size.GIB
    assert grown > 0.9 * size / full_size.GIB


def test_a_failing_case_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size.sys, "executable", "/bin/false")
    assert "error" in full_size.run_child(tmp_path, "x", full_size.CASES[0], "default")
