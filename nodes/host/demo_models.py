"""The demo models of this pack among the host's own, without a copy."""
from __future__ import annotations

from pathlib import Path

import folder_paths

WEIGHTS = Path(__file__).resolve().parents[2] / "demo" / "weights"


def offer_demo_models() -> None:
    """Adds demo/weights/<folder> to the places where the host looks for models of that folder."""
    for folder in sorted(path for path in WEIGHTS.iterdir() if path.is_dir()) if WEIGHTS.is_dir() else ():
        folder_paths.add_model_folder_path(folder.name, str(folder))
