"""What a ControlNet is shown of a picture: HED's soft edges, Canny's lines, or a picture of the user's own."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError, UnsupportedError
from .folder import inside
from .item import PICTURES, File, Item
from .marks import file_mark, mark_of

HED, CANNY = "hed", "canny"


@dataclass(frozen=True)
class Hints:
    """Which hints a run has."""

    kind: str  # "hed", "canny" or a folder
    hed: str | None  # ControlNetHED.pth
    canny: tuple[float, float, float]  # blur in pixels, lower and upper threshold of the gradient, of grey in 0..1

    def __post_init__(self) -> None:
        if self.kind == HED and (not self.hed or not Path(self.hed).is_file()):
            raise ConfigError(
                f"Hints by HED need its weights, but source.hed is {self.hed!r}; give ControlNetHED.pth of PixArt-alpha/PixArt-alpha."
            )
        if self.kind not in (HED, CANNY) and not Path(self.kind).is_dir():
            raise ConfigError(f"source.hints is {self.kind!r}; expected {HED!r}, {CANNY!r}, or a folder with a hint for each picture.")

    def own(self, item: Item) -> File | None:
        """The user's hint for a picture: of its name in the folder, in any format; None where hints are computed.

        Raises DataError if it is not there.
        """
        if self.kind in (HED, CANNY):
            return None
        path = inside(Path(self.kind), item.inside or item.name, "its shard")
        found = next((file for suffix in PICTURES for file in (path.with_suffix(suffix),) if file.is_file()), None)
        if found is None:
            raise DataError(f"it has no hint in {self.kind}; expected {path.with_suffix('.png').relative_to(self.kind)} or another format")
        return File(found)

    @cached_property
    def mark(self) -> str:
        """Names how hints are made."""
        if self.kind == HED:
            return mark_of(HED, file_mark(Path(self.hed)))
        return mark_of(CANNY, self.canny) if self.kind == CANNY else "own"

    def open(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function from a picture (3, H, W) in 0..1, the user's own hint if there is one, to the hint (3, H, W) in 0..1."""
        if self.kind == HED:
            from ...hed import load_hed

            network = load_hed(self.hed).to(device)
            return lambda picture: network(picture[None].to(device))[0].expand(3, -1, -1)
        return self._canny if self.kind == CANNY else lambda picture: picture

    def _canny(self, picture: Tensor) -> Tensor:
        try:
            from skimage.feature import canny
        except ImportError as error:
            raise UnsupportedError(f"Canny needs scikit-image ({error}): `pip install scikit-image`.") from None
        blur, low, high = self.canny
        grey = picture.movedim(0, -1).numpy() @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
        lines = canny(grey, sigma=blur, low_threshold=low, high_threshold=high)
        return torch.from_numpy(lines.astype(np.float32)).expand(3, -1, -1)
