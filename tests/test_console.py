"""`python -m pixart` on consoles that aren't UTF-8, as Windows has them where output is piped."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pixart.logs import get_logger

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo/weights/diffusion_models/pixart-demo-transformer.safetensors"


@pytest.mark.parametrize(
    ("encoding", "arguments"),
    [
        ("cp1252", ["inspect", str(DEMO)]),
        ("ascii", ["inspect", "--json", str(DEMO)]),
        ("cp932", ["encode", "-h"]),
        ("ascii", ["encode", "-h"]),
    ],
)
def test_everything_is_printed_on_any_code_page(encoding: str, arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pixart", *arguments],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.decode(encoding).strip() and b"Traceback" not in run.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii"])
def test_logs_lose_nothing_and_print_no_traceback(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files and words of prompts may be in any script."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stderr", stream)
    logger, handler = get_logger("pixart.console_test"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        logger.warning("read %s, cut: %s", "/models/\u0442\u0435\u0441\u0442.safetensors", "a \U0001f642 \u732b")
    finally:
        logger.removeHandler(handler)
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert "Logging error" not in text and text.count("\n") == 1 and ".safetensors, cut: a " in text
    assert "\u732b" in text or "\\u732b" in text


def test_sources_name_the_family_in_ascii() -> None:
    """What they log and raise is printed on consoles that have no Greek letters."""
    sources = [
        path for folder in ("pixart", "nodes", "configs") for path in (ROOT / folder).rglob("*.[pj]*") if path.suffix in (".py", ".json")
    ]
    assert len(sources) > 50
    assert not [path.name for path in sources if re.search("[\u0370-\u03ff]", path.read_text(encoding="utf-8"))]
