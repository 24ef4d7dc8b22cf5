"""benchmarks.compiled: graphs are counted run by run, beside the MODEL without the node; nothing is timed here."""
from __future__ import annotations

import json

import pytest

from benchmarks import compiled
from tests.support import host


@pytest.mark.skipif(host.on_pretended_card(), reason="torch.compile doesn't know the pretended card")
def test_graphs_are_counted_for_each_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "choose_host", lambda *_: None)  # which runs already, and not with torch's attention
    few = ["--px", "64", "--blocks", "1", "--dtype", "fp32", "--steps", "2", "--backend", "eager", "--out", str(tmp_path)]
    compiled.main(few)
    report = json.loads((tmp_path / "compiled-cpu-fp32.json").read_text(encoding="utf-8"))
    runs = report["runs"]
    assert [(run["size"], run["tokens"], run["graphs"]) for run in runs] == [("64x64", 60, 1), ("80x64", 20, 0)]
    assert all(run["difference"] < 1e-4 and not run["breaks"] and run["seconds"] > 0 for run in runs)
    rows = [line for line in (tmp_path / "compiled-cpu-fp32.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1 and "| ours | 64x64 | 60 | 1 |" in rows[2]


def test_breaks_are_shown(capsys) -> None:
    run = {"model": "ours", "size": "64x64", "tokens": 60, "graphs": 2, "breaks": 1, "first_seconds": 61.5, "seconds": 0.5,
           "seconds_without": 1.0, "difference": 1e-3}  # fmt: skip
    facts = {"cpu": "A CPU", "threads": 2, "torch": "2.11", "comfyui": "0.3.75", "diffusers": "0.40"}
    chosen = {"steps": 4, "backend": "inductor", "blocks": 28, "dtype": "bf16", "device": "cpu", "note": ""}
    text = compiled.markdown({"runs": [run], "machine": facts, **chosen})
    assert "| 2 (1 breaks) | 61.50 | 0.500 | 1.000 | 0.50 | 1e-03 |\n" in text and "MiB" not in text
    with pytest.raises(SystemExit):
        compiled.parse(["--steps", "1"])  # the first compiles, the second is timed
    assert "a whole number from 2" in capsys.readouterr().err
