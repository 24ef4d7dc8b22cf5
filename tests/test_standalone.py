"""The core without ComfyUI: every module imports, and its own tests pass, where no host can be imported."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/test_model.py", "tests/test_config.py", "tests/checkpoints/test_detect.py")
HOST_MODULES = ("comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes")
BLOCK = """
import importlib, pkgutil, sys

class WithoutHost:
    'A finder that knows no module of the host, as if none were installed.'
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        absent = first.startswith("comfy") or first in ("folder_paths", "nodes")
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(WithoutHost, sys.meta_path)
"""
IMPORT_ALL = """
import pixart
names = [module.name for module in pkgutil.walk_packages(pixart.__path__, "pixart.")]
for name in names:
    importlib.import_module(name)
print(*names)
"""


def run(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", BLOCK + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, env={**os.environ, **environment})


def test_the_host_is_really_out_of_reach(tmp_path):
    for name in HOST_MODULES:
        (tmp_path / f"{name}.py").touch()
    look = f"from importlib.util import find_spec; print([name for name in {HOST_MODULES} if find_spec(name)])"
    assert run(look, PYTHONPATH=str(tmp_path)).stdout == "[]\n"


def test_every_module_of_the_core_imports():
    done = run(IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    expected = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "pixart").rglob("*.py")}
    assert set(done.stdout.split()) == {name.removesuffix(".__init__") for name in expected} - {"pixart"}


def test_the_cores_own_tests_pass():
    done = run("import pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", "-p", "no:cacheprovider", *TESTS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "[100%]" in done.stdout
