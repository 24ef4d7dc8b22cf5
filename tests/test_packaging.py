"""What the registry, pip and a bare machine read: pyproject, requirements, licence, the CI script."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = [ROOT / "quickstart.py", *sorted((ROOT / "launch").glob("*.py"))]
NEEDS_TORCH = {"standalone.py"}
IMPORTED_AS = {"PIL": "pillow", "bs4": "beautifulsoup4", "skimage": "scikit-image", "sklearn": "scikit-learn"}
BROUGHT_BY = {"numpy": "diffusers", "tokenizers": "transformers", "psutil": "accelerate", "starlette": "gradio", "filelock": "torch"}  # packages that one of ours depends on
FORBIDDEN = {("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("os", "system")}


def listed(path: Path) -> set[str]:
    """Package names in a requirements file, included files too."""
    names: set[str] = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r"):
            names |= listed(path.parent / line[2:].strip())
        elif line:
            names.add(re.split(r"[<>=~! \[]", line)[0].lower())
    return names


@pytest.fixture(scope="module")
def project() -> dict:
    """pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_hold_nothing_that_comfyui_installs() -> None:
    assert not listed(ROOT / "requirements.txt") & listed(ROOT / "launch/requirements/comfyui.txt")


def test_registry_fields(project: dict) -> None:
    assert "comfyui" not in project["project"]["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert project["project"]["license-files"] == ["LICENSE"]
    assert project["tool"]["comfy"]["DisplayName"]
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").count("Apache License") >= 1


def test_all_weights_together_stay_within_20_mb() -> None:
    """Transformer, T5, autoencoder, LoRA and ControlNet of the demo; without the fp8 encoder they would not."""
    sizes = {path.name: path.stat().st_size for path in (ROOT / "demo/weights").rglob("*.safetensors")}
    assert len(sizes) >= 5 and sum(sizes.values()) <= 20e6, sizes


def test_version_is_said_once_and_the_same(project: dict) -> None:
    import pixart

    assert pixart.__version__ == project["project"]["version"]


def test_every_package_of_the_core_is_installed(project: dict) -> None:
    found = {str(path.parent.relative_to(ROOT)).replace(os.sep, ".") for path in (ROOT / "pixart").rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == found | {"pixart.configs"}


def test_extras_and_requirement_files_name_the_same_packages(project: dict) -> None:
    extras = {name: {re.split(r"[<>=\[]", item)[0] for item in items} for name, items in project["project"]["optional-dependencies"].items()}
    assert extras["pipeline"] == listed(ROOT / "launch/requirements/pipeline.txt") - {"torchvision", "torchaudio"}
    assert extras["test"] == listed(ROOT / "tests/requirements.txt")


def imported(path: Path) -> set[str]:
    """Packages, as pip calls them, that a file imports and Python doesn't bring."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) and node.level == 0 else set()
    strangers = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    return {IMPORTED_AS.get(name, name) for name in strangers}


def test_the_core_imports_nothing_that_its_extras_leave_out(project: dict) -> None:
    """On a machine with the extras alone, without ComfyUI's packages."""
    extras = project["project"]["optional-dependencies"]
    given = {re.split(r"[<>=\[]", item)[0] for name in ("pipeline", "quantize", "captions", "training", "app", "scale", "score") for item in extras[name]}
    used = {name for path in (ROOT / "pixart").rglob("*.py") for name in imported(path)}
    assert {BROUGHT_BY.get(name, name) for name in used} <= given


def test_the_demo_imports_nothing_that_the_test_environment_leaves_out(project: dict) -> None:
    extras = project["project"]["optional-dependencies"]
    given = {re.split(r"[<>=\[]", item)[0] for name in ("pipeline", "test") for item in extras[name]}
    used = {name for path in (ROOT / "demo").rglob("*.py") for name in imported(path)} - {"pixart", "launch"}
    assert {BROUGHT_BY.get(name, name) for name in used} <= given


@pytest.mark.parametrize("path", [p for p in LAUNCH if p.name not in NEEDS_TORCH], ids=lambda p: p.name)
def test_quickstart_needs_the_standard_library_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names | {"demo", "launch"}, f"{path.name} imports {name}"


def test_ci_runs_exactly_the_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ['exec "${PYTHON:-python3}" quickstart.py --test']


@pytest.mark.parametrize("folder", ["pixart", "nodes"])
def test_registry_rules(folder: str) -> None:
    """No eval, exec, subprocess or unsafe unpickling in what users install."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in FORBIDDEN, f"{path}: {node.value.id}.{node.attr}"
            if isinstance(node, ast.keyword) and node.arg == "weights_only":
                assert getattr(node.value, "value", None) is True, path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert "subprocess" not in {n.split(".")[0] for n in names}, path
