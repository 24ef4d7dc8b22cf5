"""The training benchmark: both contenders make real steps of the same size, and the report says what was measured."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train, train_peers
from benchmarks.train_peers import OURS, PLAIN, Case, make_step

ROOT = Path(__file__).resolve().parents[1]

CASE = Case("lora", "bf16", "adamw", 64, 2, 1, True, "cpu")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_both_contenders_train_the_same_number_of_pictures(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    trained = {}
    adamw = torch.optim.AdamW

    class Watched(adamw):
        def step(self, closure=None):
            before = [value.detach().clone() for group in self.param_groups for value in group["params"]]
            out = super().step(closure)
            now = [value for group in self.param_groups for value in group["params"]]
            trained[name] = (sum(value.numel() for value in now), sum(bool((a != b).any()) for a, b in zip(before, now)))
            return out

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    small = train_peers.get_variant("sigma-512")
    from dataclasses import replace

    config = replace(small.transformer, hidden_size=144, num_heads=2, mlp_hidden=576, caption_channels=32, max_tokens=4)
    variant = replace(small, transformer=config)
    for module in (train_peers, train_peers.full):
        monkeypatch.setattr(module, "get_variant", lambda name: variant)
    monkeypatch.setattr("benchmarks.peers.get_variant", lambda name: variant)
    for name in (OURS, PLAIN):
        step = make_step(name, replace(CASE, method=method))
        assert step() > 0 and step() > 0
    ours, plain = trained[OURS], trained[PLAIN]
    assert ours[1] > 0 and plain[1] > 0
    if method == "full":  # ours learns the same layers; diffusers' has no parameters beside them
        assert ours[0] == plain[0]


def test_the_report_is_a_table_of_rates_and_peaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Quick:
        def __init__(self, name: str, case: Case, what: str) -> None:
            self.name = name

        def step(self) -> float:
            return 0.5 if self.name == OURS else 0.75

        def peaks(self) -> tuple[float, float]:
            return (1.5, 2.0) if self.name == OURS else (3.0, 4.0)

        def close(self) -> None:
            pass

    monkeypatch.setattr(train, "Child", Quick)
    train.main(["--px", "512", "--optimizers", "adamw,came", "--methods", "lora", "--checkpointing", "off", "--out", str(tmp_path)])
    table = (tmp_path / "train-cpu.md").read_text().splitlines()
    assert table[2] == "| lora | bf16 | adamw | 512 | 1 | 28 | off | off | 2 | 1.33 | 1.50 | 1.50 | 3.00 | 0.50 |"
    assert "came" in table[3] and len(json.loads((tmp_path / "train-cpu.json").read_text())["cases"]) == 2


def test_rate_and_memory_measured_in_two_runs_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"rate": {"seconds": {OURS: [0.5, 0.6], PLAIN: [1.0, 1.1]}}, "memory": {"gib": {OURS: 1.5, PLAIN: 3.0}}}
    monkeypatch.setattr(train, "measure", lambda case, chosen: measured[chosen.only])
    options = ["--methods", "lora", "--checkpointing", "off", "--out", str(tmp_path), "--only"]
    train.main([*options, "rate"])
    train.main([*options, "memory"])
    train.main([*options, "memory", "--px", "1024"])
    rows = [line for line in (tmp_path / "train-cpu.md").read_text().splitlines() if line.startswith("| lora")]
    assert rows == [
        "| lora | bf16 | adamw | 512 | 1 | 28 | off | off | 1.82 | 0.952 | 1.91 | 1.50 | 3.00 | 0.50 |",
        "| lora | bf16 | adamw | 1024 | 1 | 28 | off | off |  |  |  | 1.50 | 3.00 | 0.50 |",
    ]
    assert "at least 2 steps" in (tmp_path / "train-cpu.md").read_text()
    report = json.loads((tmp_path / "train-cpu.json").read_text())
    (tmp_path / "train-cpu.json").write_text(json.dumps(report | {"machine": {"cpu": "another"}}))
    with pytest.raises(SystemExit, match="figures of another machine"):
        train.main([*options, "rate"])


def test_options_that_are_none(capsys: pytest.CaptureFixture) -> None:
    for option in (["--methods", "dora"], ["--optimizers", "sgd"], ["--batch", "0"], ["--px", "500"]):
        with pytest.raises(SystemExit):
            train.main(option)
    assert "expected" in capsys.readouterr().err


def test_a_childs_peak_is_that_of_its_steps() -> None:
    """In a process of its own: what others have freed may be used again without a new peak."""
    code = (
        "import torch; from benchmarks import train; train.forget_peak('cpu'); before = train.peak_bytes('cpu'); "
        "made = torch.ones(64 << 20, dtype=torch.uint8); print(train.peak_bytes('cpu') - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout.split()[-1]) >= 60 << 20
