"""Outlines of scenes: what the demo's ControlNet is shown, white on black, as Canny draws them from the picture."""

from __future__ import annotations

import numpy as np

from .scenes import BACKGROUNDS, COLORS, Scene, render


def edge_map(scene: Scene, width: int, height: int, line: int = 1) -> np.ndarray:
    """float32 (height, width), 1 on lines `line` pixels wide where the colour changes."""
    colors = np.array([BACKGROUNDS[scene.background], *(COLORS[obj.color] for obj in scene.objects)], np.float32)
    picture = render(scene, width, height)
    # The nearest colour of the scene: soft edges, one pixel wide, fall to one side or the other.
    labels = ((picture[:, :, None] - colors) ** 2).sum(-1).argmin(-1)
    edges = np.zeros((height, width), bool)
    edges[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edges[:-1] |= labels[1:] != labels[:-1]
    for step in range(1, line):
        grown = edges.copy()
        axis_shift = -1 if step % 2 else 1  # to one side, then to the other, so that the line stays in place
        for axis in (0, 1):
            grown |= _shifted(edges, axis, axis_shift)
        edges = grown
    return edges.astype(np.float32)


def _shifted(edges: np.ndarray, axis: int, by: int) -> np.ndarray:
    """Moved by one pixel, without coming in again on the other side."""
    moved = np.roll(edges, by, axis)
    rim = [slice(None), slice(None)]
    rim[axis] = 0 if by > 0 else -1
    moved[tuple(rim)] = False
    return moved
