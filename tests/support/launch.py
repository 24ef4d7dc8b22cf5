"""A folder that quickstart.py takes for a ComfyUI."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make_comfyui(folder: Path) -> Path:
    """A folder that passes for a ComfyUI checkout and behaves like one in the queue."""
    (folder / "comfy").mkdir(parents=True)
    shutil.copyfile(ROOT / "tests/support/fake_comfyui.py", folder / "main.py")
    for name in ("nodes.py", "server.py", "comfy/sd.py", "requirements.txt"):
        (folder / name).touch()
    return folder
