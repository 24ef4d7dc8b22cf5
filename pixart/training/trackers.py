"""tensorboard, wandb and trackio, through accelerate, beside the log that every run has."""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..errors import ConfigError


def check_trackers(names: Iterable[str]) -> None:
    """Raises ConfigError for one that isn't installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"trackers has {name!r}, which is not installed; `pip install {name}`, or leave it out.")


class Trackers:
    """Those that the recipe names; with none, every call does nothing."""

    def __init__(self, accelerator: Accelerator, recipe: Mapping[str, Any]) -> None:
        self.accelerator = accelerator
        if accelerator.log_with:
            accelerator.init_trackers("pixart", config={name: json.dumps(value) for name, value in recipe.items()})

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step."""
        self.accelerator.log(dict(values), step=step)

    def picture(self, step: int, picture: Image.Image) -> None:
        """The contact sheet."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images") and tracker.name == "tensorboard":
                tracker.log_images({"samples": np.asarray(picture).transpose(2, 0, 1)[None]}, step=step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"samples": [picture]}, step=step)

    def close(self) -> None:
        """What they hold back is written."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
