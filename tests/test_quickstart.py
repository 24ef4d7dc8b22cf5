"""quickstart.py with pip and ComfyUI replaced: what it prints, writes, queues and returns."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import quickstart
from launch import host
from tests.support.launch import ROOT, make_comfyui


@pytest.fixture
def fake_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """quickstart.py with its work folder in tmp_path, this interpreter, the fake ComfyUI and weights that exist."""
    monkeypatch.setenv("COMFYUI_PATH", str(make_comfyui(tmp_path / "ComfyUI")))
    monkeypatch.setattr(quickstart, "WORK", tmp_path / "work")
    monkeypatch.setattr(quickstart, "install", lambda profile: Path(sys.executable))
    monkeypatch.setattr(quickstart, "check_weights", lambda fast=False: None)
    monkeypatch.setattr(host, "accelerator", lambda python: "cpu")
    return tmp_path


def test_the_last_line_is_the_path_of_the_picture(fake_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = fake_world / "new" / "picture.png"
    assert quickstart.main(["a blue cross", "--seed", "7", "--width", "300", "--output", str(target)]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[-1] == str(target)
    assert "browser" in lines[-2]
    assert target.read_bytes() == b"\x89PNG fake"
    body = json.loads((fake_world / "work/base/queued.json").read_text())
    texts = [node["inputs"]["text"] for node in body["prompt"].values() if node["class_type"] == "PixArtTextEncode"]
    assert sorted(texts) == ["", "a blue cross"]
    sampler = next(node for node in body["prompt"].values() if node["class_type"] == "KSampler")
    assert sampler["inputs"]["seed"] == 7
    shown = body["extra_data"]["extra_pnginfo"]["workflow"]
    widgets = [node["widgets_values"] for node in shown["nodes"] if node["type"] in ("PixArtTextEncode", "PixArtResolution")]
    assert any("a blue cross" in values for values in widgets)
    assert any(300 in values for values in widgets)


def test_fast_queues_the_distilled_demo_in_four_steps(fake_world: Path) -> None:
    assert quickstart.main(["a blue cross", "--fast", "--output", str(fake_world / "x.png")]) == 0
    body = json.loads((fake_world / "work/base/queued.json").read_text())
    sampler = next(node["inputs"] for node in body["prompt"].values() if node["class_type"] == "KSampler")
    assert (sampler["steps"], sampler["cfg"], sampler["sampler_name"]) == (4, 1.0, "lcm")
    assert {node["class_type"] for node in body["prompt"].values()} >= {"PixArtLoraLoader", "ModelSamplingDiscrete"}
    assert (fake_world / "work/base/user/default/workflows/lcm-demo.json").is_file()


def test_steps_and_cfg_of_ones_own_stay_with_fast() -> None:
    given = quickstart.parse(["x", "--fast", "--steps", "2"])
    assert (given.steps, given.cfg) == (2, 1.0)
    given = quickstart.parse(["x"])
    assert (given.steps, given.cfg) == (12, 4.5)


def test_fast_alone_gives_the_lora(fake_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command, **_: commands.append(command) or 0)
    assert quickstart.main(["x", "--fast", "--standalone", "--output", str(fake_world / "x.png")]) == 0
    assert {f"--lora={quickstart.DISTILLED['lcm']}", "--steps=4", "--cfg=1.0"} <= set(commands[0])


@pytest.mark.parametrize("fast", [False, True])
def test_the_lora_is_needed_for_fast_alone(fast: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quickstart, "DISTILLED", {"lcm": ROOT / "demo/weights/absent.safetensors"})
    monkeypatch.setattr(quickstart, "draw_in_comfyui", lambda given: Path("drawn.png"))
    assert quickstart.main(["x", *(["--fast"] if fast else [])]) == int(fast)
    assert ("absent.safetensors" in capsys.readouterr().err) == fast


@pytest.mark.parametrize(
    ("how", "message"), [("FAKE_REFUSES", "bad graph; node 4 (X): m: d"), ("FAKE_CRASHES", "HTTP status 500, 500 Internal Server Error")]
)
def test_a_refused_graph_is_one_line_and_exit_status_1(
    fake_world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    monkeypatch.setenv(how, "1")
    assert quickstart.main(["x", "--output", str(fake_world / "x.png")]) == 1
    assert message in capsys.readouterr().err
    assert not (fake_world / "x.png").exists()


def test_a_host_that_dies_while_drawing_shows_its_log(
    fake_world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIES", "1")
    assert quickstart.main(["x", "--output", str(fake_world / "x.png")]) == 1
    assert "stopped answering" in (err := capsys.readouterr().err) and "Killed: out of memory" in err


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--port", "99999", "1 to 65535"), ("--port", "0", "1 to 65535"), ("--output", "x.jpg", ".png"), ("--output", ".", ".png")],
)
def test_what_can_not_be_is_refused_before_anything_is_installed(
    option: str, value: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        quickstart.main(["x", option, value])
    assert left.value.code == 2
    assert repr(value) in (err := capsys.readouterr().err) and named in err


@pytest.mark.parametrize("way", [(), ("--standalone",)])
def test_a_place_that_can_not_be_written_is_one_line(
    fake_world: Path, capsys: pytest.CaptureFixture[str], way: tuple[str, ...]
) -> None:
    (fake_world / "file").touch()
    assert quickstart.main(["x", "--output", str(fake_world / "file/x.png"), *way]) == 1
    assert "must be writable" in (err := capsys.readouterr().err) and str(fake_world / "file") in err


def test_a_prompt_may_begin_with_a_dash(fake_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command, **_: commands.append(command) or 0)
    assert quickstart.main(["--standalone", "--output", str(fake_world / "x.png"), "--", "-5 stars"]) == 0
    assert commands[0][-2:] == ["--", "-5 stars"]


def test_missing_demo_models_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "WEIGHTS", {"vae": ROOT / "demo/weights/absent.safetensors"})
    assert quickstart.main(["x"]) == 1
    assert "demo/weights/absent.safetensors" in capsys.readouterr().err


def test_the_test_run_passes_arguments_and_exit_status_through(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(quickstart, "install", lambda profile: Path("python"))
    monkeypatch.setattr(quickstart, "browser_installed", contextlib.nullcontext)
    monkeypatch.setattr(subprocess, "call", lambda command, **_: calls.append(command) or 5)
    assert quickstart.main(["--test", "-k", "bins", "-x"]) == 5
    assert calls == [["python", "-m", "pytest", "-k", "bins", "-x"]]


def test_pictures_do_not_overwrite_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    given = quickstart.parse(["A Red/../Circle!"])
    first = quickstart.output_path(given)
    first.touch()
    assert first == tmp_path / "output" / "a-red-circle-0.png"
    assert quickstart.output_path(given) != first
