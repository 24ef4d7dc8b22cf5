"""Where the demo's scenes put their objects: on the grid of tokens, one spot for each wording and size.

A free scene may put a circle "on the left" anywhere in the left third. A model of six million weights
learns outlines many times sooner when it does not have to find out first where they lie.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .scenes import CONTAINER_RADIUS, OPPOSITE, REACH, SHAPES, SIZES, Scene, SceneObject

TOKEN_PIXELS = 16
_INNER_SHARE = 0.46  # of the radius around it, at most: a square's corners stay inside a triangle
FEATURES_PER_OBJECT = 3 + len(SHAPES)
FEATURE_COUNT = 2 * FEATURES_PER_OBJECT
_NEAR = 1.6  # radii around a centre within which a token is an object's
# Tokens; the autoencoder loses smaller outlines. In the narrowest pictures, eight tokens across, small objects are thus medium
_LEAST_RADIUS = {"small": 1.5, "medium": 2.0, "large": 2.5}
_LEAST_CONTAINER, _LEAST_ACROSS = 3.5, 8  # around one of them, in pictures so wide
_MARGIN = 0.1  # tokens between an object and the frame
_GAP, _LEAST_GAP = 1.7, 1.2  # tokens that two objects, and two of the smallest, leave free in all; half a token stays between them


def arrange(scene: Scene, width: int, height: int) -> Scene:
    """The scene at this size in pixels, with centres and radii of whole half-tokens (8 pixels); the smallest diamonds lie a quarter off."""
    across, down = width / TOKEN_PIXELS, height / TOKEN_PIXELS
    short = min(across, down)
    if scene.relation is None:
        placed = [_single(scene, across, down)]
    elif scene.relation == "inside":
        placed = _nested(scene, across, down)
    else:
        placed = _pair(scene, across, down)
    objects = tuple(
        replace(obj, center_x=(x + _aside(obj, radius)) / across, center_y=(y + _aside(obj, radius)) / down, radius=radius / short)
        for obj, (x, y, radius) in zip(scene.objects, placed, strict=True)
    )
    return replace(scene, objects=objects)


def _aside(obj: SceneObject, radius: float) -> float:
    """How far right and down the centre moves: the smallest diamonds have tips in the middle of a latent cell.

    Between two cells the autoencoder rounds a tip off, and such a diamond looks like a circle.
    """
    return 0.25 if obj.shape == "diamond" and radius <= _LEAST_RADIUS["small"] else 0.0


def _radius(size: str, short: float) -> float:
    return _half(max(SIZES[size] * short, _LEAST_RADIUS[size]))


def _half(value: float) -> float:
    return math.floor(2 * value + 0.5) / 2


def _up(value: float) -> float:
    return math.ceil(2 * value) / 2


def _single(scene: Scene, across: float, down: float) -> tuple[float, float, float]:
    """Centre and radius in tokens: a quarter into the picture, or as near to the frame as the object fits."""
    obj, place = scene.objects[0], str(scene.place)
    radius = _radius(obj.size, min(across, down))
    left, right, top, bottom = (_up(reach * radius + _MARGIN) for reach in REACH[obj.shape])

    def along(length: float, first: bool, last: bool, before: float, after: float) -> float:
        if first:
            return max(before, _half(length / 4))
        return length - max(after, _half(length / 4)) if last else length / 2

    x = along(across, "left" in place, "right" in place, left, right)
    return x, along(down, "top" in place, "bottom" in place, top, bottom), radius


def _nested(scene: Scene, across: float, down: float) -> list[tuple[float, float, float]]:
    """The first object in the middle of the second, which lies in the middle of the picture, or as near as it fits."""
    short = min(across, down)
    outer = max(_half(CONTAINER_RADIUS * short), _LEAST_CONTAINER if short >= _LEAST_ACROSS else 0)
    inner = min(_radius("small", short), math.floor(_INNER_SHARE * 2 * outer) / 2)
    left, right, top, bottom = (_up(reach * outer + _MARGIN) for reach in REACH[scene.objects[1].shape])
    x, y = min(max(across / 2, left), across - right), min(max(down / 2, top), down - bottom)
    return [(x, y, radius) for radius in (inner, outer)]


def _pair(scene: Scene, across: float, down: float) -> list[tuple[float, float, float]]:
    """Two objects in a row along the relation's axis, shrunk until they leave a gap."""
    sideways = scene.relation in ("left of", "right of")
    length, other = (across, down) if sideways else (down, across)
    swapped = OPPOSITE[str(scene.relation)] in ("left of", "above")
    first, second = scene.objects[::-1] if swapped else scene.objects
    radii = [_radius(obj.size, min(across, down)) for obj in (first, second)]
    while True:
        before, after = _extent(first, radii[0], sideways), _extent(second, radii[1], sideways)
        free = length - sum(before) - sum(after)
        if free >= (_LEAST_GAP if max(radii) <= _LEAST_RADIUS["small"] else _GAP) or max(radii) <= 0.5:
            break
        radii[radii.index(max(radii))] -= 0.5
    inward = max(0, math.floor((free - _GAP) / 2)) / 2  # wide pictures: not at the very ends
    start = _up(before[0] + _MARGIN) + inward
    end = length - _up(after[1] + _MARGIN) - inward
    spots = [(start, other / 2), (end, other / 2)]
    placed = [(x, y, radius) if sideways else (y, x, radius) for (x, y), radius in zip(spots, radii)]
    return placed[::-1] if swapped else placed


def _extent(obj: SceneObject, radius: float, sideways: bool) -> tuple[float, float]:
    reach = REACH[obj.shape][:2] if sideways else REACH[obj.shape][2:]
    return reach[0] * radius, reach[1] * radius


def token_features(scene: Scene, width: int, height: int) -> np.ndarray:
    """What every token, (rows * columns, FEATURE_COUNT), should know of an arranged scene.

    For the first and the second object: whether it is near, and if so its shape (one-hot) and the
    token's offset from its centre, in radii.
    """
    rows, columns = height // TOKEN_PIXELS, width // TOKEN_PIXELS
    features = np.zeros((rows, columns, FEATURE_COUNT), np.float32)
    for number, obj in enumerate(scene.objects):
        radius = obj.radius * min(rows, columns)
        dx = (np.arange(columns, dtype=np.float32)[None, :] + 0.5 - obj.center_x * columns) / radius
        dy = (np.arange(rows, dtype=np.float32)[:, None] + 0.5 - obj.center_y * rows) / radius
        near = (np.abs(dx) < _NEAR) & (np.abs(dy) < _NEAR)
        start = number * FEATURES_PER_OBJECT
        features[..., start] = near
        features[..., start + 1] = near * dx
        features[..., start + 2] = near * dy
        features[..., start + 3 + SHAPES.index(obj.shape)] = near
    return features.reshape(rows * columns, FEATURE_COUNT)
