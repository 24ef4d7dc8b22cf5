"""`python -m pixart` on consoles that aren't UTF-8, as Windows has them where output is piped."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo/weights/diffusion_models/pixart-demo-transformer.safetensors"


@pytest.mark.parametrize(("encoding", "arguments"), [
    ("cp1252", ["inspect", str(DEMO)]), ("ascii", ["inspect", "--json", str(DEMO)]), ("cp932", ["encode", "-h"]), ("ascii", ["encode", "-h"]),
])
def test_everything_is_printed_on_any_code_page(encoding: str, arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pixart", *arguments], cwd=ROOT, capture_output=True, timeout=120,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.decode(encoding).strip() and b"Traceback" not in run.stderr
