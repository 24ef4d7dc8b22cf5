"""The rules that pyproject.toml chooses hold everywhere."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_ruff_has_nothing_to_say() -> None:
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sources_print_on_a_windows_console() -> None:
    """Windows consoles of many countries can't print it: alpha, Sigma and delta are written out."""
    files = [file for folder in ("nodes", "pixart", "demo", "launch", "benchmarks", "tests") for file in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "__init__.py", ROOT / "quickstart.py"]
    foreign = [(str(file.relative_to(ROOT)), text) for file in files if (text := _not_in_cp1252(file.read_text(encoding="utf-8")))]
    assert foreign == []


def _not_in_cp1252(text: str) -> str:
    return "".join(sorted({char for char in text if char != "\n" and not char.encode("cp1252", "ignore")}))
