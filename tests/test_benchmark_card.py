"""benchmarks.card: one stage's failure is that stage's alone, and the report says what became of each; nothing is timed here."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import card, card_report, compiled, forward, pipeline
from benchmarks.card import Stage
from tests.support import host

WRITE = "import sys, pathlib; place = pathlib.Path(sys.argv[-1]); place.joinpath('a.json').write_text('{\"device\": \"A card\"}'); "
CHILD = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
SCRIPTS = {
    "good": WRITE + "place.joinpath('a.md').write_text('# Title\\n\\n| 1 |\\n')",
    "raises": WRITE + "raise RuntimeError('out of | memory')",
    "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": WRITE + "place.joinpath('b.json').write_text('{\"half'); " + CHILD,
    "says nothing": "pass",
    "last": WRITE,
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """Stages that run SCRIPTS in place of benchmarks."""
    monkeypatch.setattr(card, "command", lambda stage, place, dry_run: [sys.executable, "-c", SCRIPTS[stage.name], str(place)])
    return [Stage(name, f"shows {name}", 2 if name == "hangs" else 60, "", "") for name in SCRIPTS]


def sleepers() -> set[str]:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return {line.split()[0] for line in listed if line.split()[1:] == ["sleep", "600"]}


def test_every_stage_has_its_turn_whatever_becomes_of_the_others(scripts, tmp_path: Path) -> None:
    before = sleepers()
    report = card.run(scripts, card.parse(["--dry-run", "--out", str(tmp_path)]))
    found = {stage["name"]: stage for stage in report["stages"]}
    assert {name: stage["state"] for name, stage in found.items()} == {
        "good": "done", "raises": "failed", "dies": "failed", "hangs": "cut off", "says nothing": "failed", "last": "done",
    }  # fmt: skip
    assert "exit status 1: RuntimeError: out of | memory" in found["raises"]["error"] and "-9: it said nothing" in found["dies"]["error"]
    assert found["hangs"]["error"] == "not done after 8 s" and found["says nothing"]["error"] == "it wrote no results"
    assert found["raises"]["results"] == found["hangs"]["results"] == {"a": {"device": "A card"}}  # what was there stays; halves don't
    assert sleepers() == before  # what a stage started ended with it
    assert json.loads((tmp_path / "card-dry-run.json").read_text(encoding="utf-8")) == report
    text = (tmp_path / "card-dry-run.md").read_text(encoding="utf-8")
    assert text.startswith("# A card\n") and "dry run" in text and "## good: a\n\nTitle\n\n| 1 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "shows " in line]
    assert len(rows) == len(SCRIPTS) and all(row.count("|") == 6 for row in rows) and "out of / memory" in rows[1]


def test_what_finds_no_time_is_said(scripts, tmp_path: Path) -> None:
    chosen = card.parse(["--dry-run", "--budget", "21", "--out", str(tmp_path)])
    hangs, last = scripts[3], scripts[5]
    report = card.run([hangs, last], chosen)
    assert [stage["state"] for stage in report["stages"]] == ["cut off", "not begun"]
    assert report["stages"][1]["error"].endswith("of 21 s were left") and report["seconds"] < 21


def test_a_stage_that_cannot_be_started_is_no_end(scripts, tmp_path: Path, monkeypatch) -> None:
    real = card.command
    monkeypatch.setattr(card, "command", lambda stage, *given: ["/no/such/program"] if stage.name == "good" else real(stage, *given))
    report = card.run([scripts[0], scripts[5]], card.parse(["--dry-run", "--out", str(tmp_path)]))
    assert [stage["state"] for stage in report["stages"]] == ["failed", "done"] and "/no/such/program" in report["stages"][0]["error"]
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="file"):
        card.run(scripts, card.parse(["--dry-run", "--out", str(tmp_path / "file")]))


def test_a_run_that_is_stopped_leaves_its_report(tmp_path: Path) -> None:
    """By SIGTERM, as schedulers do it; with a stage that had written something."""
    script = (
        "import sys\nfrom benchmarks import card\nfrom tests.test_benchmark_card import SCRIPTS\n"
        "card.command = lambda stage, place, dry_run: [sys.executable, '-c', SCRIPTS['hangs'], str(place)]\n"
        f"card.main(['--dry-run', '--only', 'step', 't5', '--out', {str(tmp_path)!r}])"
    )
    before = sleepers()
    process = subprocess.Popen([sys.executable, "-c", script], cwd=host.PACK_ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not sleepers() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) != 0
    stages = json.loads((tmp_path / "card-dry-run.json").read_text(encoding="utf-8"))["stages"]
    assert [(stage["state"], stage["results"]) for stage in stages] == [("cut off", {"a": {"device": "A card"}}), ("not begun", {})]
    assert stages[0]["error"] == "stopped from outside" and sleepers() == before


def test_the_dry_run_draws_on_the_pretended_card(tmp_path: Path) -> None:
    """The largest size's stage in small: the pipeline with KV compression, its time and memory. The others differ in what they call."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COMFYUI_PATH": str(host.host_path())}
    command = [sys.executable, "-m", "benchmarks", "card", "--dry-run", "--only", "4096", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=host.PACK_ROOT, env=environment, capture_output=True, text=True, timeout=400)
    report = json.loads((tmp_path / "card-dry-run.json").read_text(encoding="utf-8"))
    (stage,) = report["stages"]
    assert done.returncode == 0, (stage["error"], done.stderr[-2000:])
    (found,) = stage["results"].values()
    assert found["device"] == card_report.device(report) == "Pretended card" and found["steps"] == 2
    size = found["sizes"][0]
    figures = {goal.name: card_report.reached(goal, report)[0] for goal in card_report.GOALS if goal.stage == "4096"}
    assert len(figures) == 2 and not any("measured" in figure for figure in figures.values())
    assert set(size["seconds"]) == {"core 28:4"} and size["peak_mib"]["core 28:4"] > 50  # one block's weights in bf16


def test_without_a_card_nothing_is_measured(capsys, monkeypatch) -> None:
    monkeypatch.setattr(card.torch.cuda, "is_available", lambda: False)
    wrongs = (([], "torch finds no CUDA card here; --dry-run"), (["--dry-run", "--budget", "5"], "expected at least 20 seconds"))
    for options, message in wrongs:
        with pytest.raises(SystemExit):
            card.parse(options)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_stages_options_are_those_of_their_benchmarks(dry_run: bool, tmp_path: Path) -> None:
    parsers = {"forward": forward.parse, "pipeline": pipeline.parse, "compiled": compiled.parse}
    seen = {stage.name: parsers[name](options) for stage in card.STAGES if (name := stage.options.split()[0]) in parsers
            for options in [stage.arguments(dry_run, tmp_path)[1:]]}  # fmt: skip
    assert seen["step"].px == ([64] if dry_run else [512, 1024]) and seen["step"].device == "cuda"
    assert seen["4096"].no_plain and seen["4096"].peers == [] and seen["kv-pag"].pag
    every = [stage.arguments(dry_run, tmp_path) for stage in card.STAGES]
    assert {options[options.index("--work") + 1] for options in every if "--work" in options} == {str(tmp_path)}
    assert max(stage.limit for stage in card.STAGES) < card.BUDGET and card.BUDGET <= 480


def figures(seconds: float) -> dict:
    return {"median": seconds, "spread": 0.0, "all": [seconds]}


def test_goals_are_read_from_what_the_stages_wrote() -> None:
    step = {"device": "A card", "matmul_rate": 8e14, "sizes": [
        {"pixels": 1024, "flops": 1.2e13, "seconds": {"ours": figures(0.02)}, "ratio": {"diffusers": 0.8}, "peak_mib": {"ours": 187.4}},
    ]}  # fmt: skip
    large = {"sizes": [{"pixels": 4096, "seconds": {"core 28:4": figures(9.0)}, "peak_mib": {"core 28:4": 4096.0}}]}
    text = {"results": [{"who": "pixart", "precision": "nf4", "found": {"resident_gib": 0.7, "encode": {"300": {"seconds": 0.01}}}},
                        {"who": "pixart", "precision": "int8", "found": {"error": "no"}}]}  # fmt: skip
    runs = [{"model": name, "graphs": graphs, "seconds": 1.0, "seconds_without": 2.0, "first_seconds": 61.2}
            for name, graphs in (("ours", 1), ("ours", 0), ("ours pag", 2), ("ours pag", 1))]  # fmt: skip
    stages = {"step": step, "lcm": None, "4096": large, "t5": text, "compiled": {"runs": runs}}
    report = {"dry_run": False, "stages": [
        {"name": name, "state": "done" if found else "cut off", "results": {"x": found} if found else {}} for name, found in stages.items()
    ]}  # fmt: skip
    reached = {goal.name: card_report.reached(goal, report) for goal in card_report.GOALS}
    assert reached["a step at 1024 px, share of the rate of matrix products"] == ("75%", "yes")
    assert reached["diffusers' time beside ours at 1024 px"] == ("1.25 x", "no")
    assert reached["ours beside ComfyUI's own at 1024 px"] == ("not measured: done", "")  # a peer that failed
    assert reached["four steps to the picture at 1024 px, s"] == ("not measured: cut off", "")
    assert reached["four steps to the picture at 1024 px, compiled, s"] == ("not asked for", "")
    assert reached["4096 px in 20 steps, R = 4, s"] == ("9.0", "yes") and reached["its memory with the weights, GiB"] == ("4.00", "yes")
    assert reached["T5 in nf4: GiB"] == ("0.700", "") and reached["T5 in int8: GiB"] == ("not measured: done", "")
    assert reached["TorchCompileModel: graphs made for the second size and prompt"] == ("1", "no")
    assert reached["a step behind it beside one without"] == ("0.50", "")
