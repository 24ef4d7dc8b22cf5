"""Captioned scenes of one or two coloured shapes, for training and judging the demo model."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.10),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.98, 0.88, 0.08),
    "purple": (0.58, 0.12, 0.72),
    "orange": (1.00, 0.50, 0.02),
    "cyan": (0.10, 0.84, 0.90),
}
PLAIN_BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.97, 0.97, 0.97),
    "black": (0.03, 0.03, 0.03),
    "gray": (0.50, 0.50, 0.50),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    **PLAIN_BACKGROUNDS,
    "pink": (1.00, 0.72, 0.80),
    "brown": (0.42, 0.26, 0.12),
    "navy": (0.05, 0.08, 0.32),
    "blue": COLORS["blue"],
    "green": COLORS["green"],
    "yellow": COLORS["yellow"],
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross")
NEW_SHAPE = "bar"  # which the demo never saw; `demo.evaluation.new_shape` teaches it
# Radius as a fraction of the short side: the smallest spans four tokens of a 256 px picture.
SIZES: dict[str, float] = {"small": 0.15, "medium": 0.205, "large": 0.27}
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below", "inside")
OPPOSITE: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES: tuple[str, ...] = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)

Split = Literal["train", "heldout"]
_SIZE_PAIRS = (("small", "small"), ("small", "medium"), ("medium", "small"), ("medium", "medium"),
               ("small", "large"), ("large", "small"))
_CONTAINERS = ("circle", "square", "triangle", "diamond")  # the arms of a cross are too thin to hold anything
_INNER_RADIUS, CONTAINER_RADIUS = 0.14, 0.35
_HELDOUT_PERCENT = 10
# Reach from the centre to the left, right, top and bottom edge, in radii; areas are alike across shapes.
_SQUARE, _DIAMOND, _CROSS, _CROSS_ARM = 0.90, 1.10, 1.00, 0.36
_TRIANGLE_HALF_BASE, _TRIANGLE_UP, _TRIANGLE_DOWN = 1.08, 1.307, 0.653
_BAR_ACROSS, _BAR_DOWN = 1.30, 0.55
REACH: dict[str, tuple[float, float, float, float]] = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (_SQUARE,) * 4,
    "triangle": (_TRIANGLE_HALF_BASE, _TRIANGLE_HALF_BASE, _TRIANGLE_UP, _TRIANGLE_DOWN),
    "diamond": (_DIAMOND,) * 4,
    "cross": (_CROSS,) * 4,
    NEW_SHAPE: (_BAR_ACROSS, _BAR_ACROSS, _BAR_DOWN, _BAR_DOWN),
}
# Corners (x, y) around the centre, in radii, y downwards.
_SIGNS = ((1, 1), (1, -1), (-1, 1), (-1, -1))
CORNERS: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": tuple((_SQUARE * x, _SQUARE * y) for x, y in _SIGNS),
    "triangle": ((0.0, -_TRIANGLE_UP), (_TRIANGLE_HALF_BASE, _TRIANGLE_DOWN), (-_TRIANGLE_HALF_BASE, _TRIANGLE_DOWN)),
    "diamond": ((_DIAMOND, 0.0), (-_DIAMOND, 0.0), (0.0, _DIAMOND), (0.0, -_DIAMOND)),
    "cross": tuple((a * x, b * y) for x, y in _SIGNS for a, b in ((_CROSS, _CROSS_ARM), (_CROSS_ARM, _CROSS), (_CROSS_ARM, _CROSS_ARM))),
    NEW_SHAPE: tuple((_BAR_ACROSS * x, _BAR_DOWN * y) for x, y in _SIGNS),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape: centre as fractions of width and height, radius as a fraction of the short side."""

    color: str
    shape: str
    size: str
    center_x: float
    center_y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One object at a place, or two whose first is `relation` the second, on a background."""

    objects: tuple[SceneObject, ...]
    relation: str | None
    background: str
    place: str | None = None


def is_heldout(scene: Scene) -> bool:
    """Whether the scene's whole combination is kept out of training; a relation counts with its opposite."""
    first = scene.objects[0]
    if scene.relation is None:
        parts = [first.color, first.shape, str(scene.place)]
    else:
        second, relation = scene.objects[1], scene.relation
        if relation in ("right of", "below"):  # "a below b" says the same as "b above a"
            first, second, relation = second, first, OPPOSITE[relation]
        parts = [first.color, first.shape, relation, second.color, second.shape]
    return zlib.crc32("|".join(["pixart-demo", *parts]).encode()) % 100 < _HELDOUT_PERCENT


def sample_scene(rng: np.random.Generator, split: Split = "train", objects: int | None = None) -> Scene:
    """Draw a scene of the split with one or two objects (None: either, two more often)."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'heldout'")
    if objects not in (None, 1, 2):
        raise ValueError(f"objects is {objects!r}; expected 1, 2 or None")
    while True:
        two = rng.random() < 0.55 if objects is None else objects == 2
        scene = _sample_pair(rng) if two else _sample_single(rng)
        if is_heldout(scene) == (split == "heldout"):
            return scene


def _pick(rng: np.random.Generator, options: tuple | list) -> str:
    return options[int(rng.integers(len(options)))]


def _sample_background(rng: np.random.Generator, used: tuple[str, ...]) -> str:
    if rng.random() < 0.5:
        return _pick(rng, list(PLAIN_BACKGROUNDS))
    # Navy under blue and brown under orange would be hard to tell apart in a small picture.
    clash = {"navy": "blue", "pink": "none", "brown": "none"}
    return _pick(rng, [b for b in BACKGROUNDS if b not in used and clash.get(b) not in used])


def _sample_single(rng: np.random.Generator) -> Scene:
    color, shape, size, place = (_pick(rng, list(o)) for o in (COLORS, SHAPES, SIZES, PLACES))
    return single_scene(rng, color, shape, size, place)


def single_scene(rng: np.random.Generator, color: str, shape: str, size: str, place: str) -> Scene:
    """One object at a place, with what is left open drawn by chance."""
    radius = SIZES[size] * rng.uniform(0.96, 1.04)
    left, right, up, down = (reach * radius + 0.02 for reach in REACH[shape])
    column = 0 if "left" in place else 2 if "right" in place else 1
    row = 0 if "top" in place else 2 if "bottom" in place else 1
    center = (_coordinate(rng, column, left, right), _coordinate(rng, row, up, down))
    obj = SceneObject(color, shape, size, *center, radius)
    return Scene((obj,), None, _sample_background(rng, (color,)), place)


def _coordinate(rng: np.random.Generator, third: int, before: float, after: float) -> float:
    """A centre in the first, middle or last third whose reach stays inside a square picture."""
    if third == 1:
        return float(np.clip(rng.uniform(0.47, 0.53), before, 1 - after))
    reach = before if third == 0 else after
    offset = max(reach, min(0.30, rng.uniform(0.20, 0.27)))
    return offset if third == 0 else 1 - offset


def _sample_pair(rng: np.random.Generator) -> Scene:
    relation = _pick(rng, RELATIONS)
    shapes = [_pick(rng, SHAPES), _pick(rng, _CONTAINERS if relation == "inside" else SHAPES)]
    colors = [_pick(rng, list(COLORS)), _pick(rng, list(COLORS))]
    if relation == "inside":
        colors[1] = _pick(rng, [c for c in COLORS if c != colors[0]])
        objects = _place_inside(rng, colors, shapes)
    else:
        objects = _place_beside(rng, colors, shapes, relation)
    return Scene(objects, relation, _sample_background(rng, tuple(colors)))


def _place_inside(rng: np.random.Generator, colors: list[str], shapes: list[str]) -> tuple[SceneObject, SceneObject]:
    radius = CONTAINER_RADIUS * rng.uniform(0.97, 1.03)
    left, right, up, down = (reach * radius + 0.02 for reach in REACH[shapes[1]])
    x, y = rng.uniform(left, 1 - right), rng.uniform(up, 1 - down)
    inner = SceneObject(colors[0], shapes[0], "small", x, y, _INNER_RADIUS * rng.uniform(0.97, 1.03))
    return inner, SceneObject(colors[1], shapes[1], "large", x, y, radius)


def _place_beside(
    rng: np.random.Generator, colors: list[str], shapes: list[str], relation: str
) -> tuple[SceneObject, SceneObject]:
    """Line two objects up along the relation's axis so that they fit a square, hence every ratio."""
    sizes = _SIZE_PAIRS[int(rng.integers(len(_SIZE_PAIRS)))]
    radii = np.array([SIZES[s] for s in sizes]) * rng.uniform(0.96, 1.04)
    along = 0 if relation in ("left of", "right of") else 1
    order = (0, 1) if relation in ("left of", "above") else (1, 0)
    before = np.array([REACH[s][2 * along] for s in shapes]) * radii
    after = np.array([REACH[s][2 * along + 1] for s in shapes]) * radii
    shrink = min(1.0, 0.88 / float((before + after).sum()))
    before, after, radii = before * shrink, after * shrink, radii * shrink
    slack = 1.0 - float((before + after).sum()) - 0.09
    shares = rng.dirichlet((2.0, 2.0, 2.0)) * slack + np.array([0.015, 0.06, 0.015])
    first, second = order
    position = np.empty(2)
    position[first] = shares[0] + before[first]
    position[second] = position[first] + after[first] + shares[1] + before[second]
    middle = rng.uniform(0.38, 0.62)
    across = np.clip(middle + rng.uniform(-0.025, 0.025, 2), 0.38, 0.62)
    centers = np.stack((position, across) if along == 0 else (across, position), axis=1)
    made = [
        SceneObject(colors[i], shapes[i], sizes[i], float(centers[i, 0]), float(centers[i, 1]), float(radii[i]))
        for i in (0, 1)
    ]
    return made[0], made[1]


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the shape's edge around the origin, negative inside, y downwards."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    ax, ay = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(ax, ay) - _SQUARE * radius
    if shape == "diamond":
        return (ax + ay - _DIAMOND * radius) * np.float32(0.70710678)
    if shape == "cross":
        arm, reach = _CROSS_ARM * radius, _CROSS * radius
        return np.minimum(np.maximum(ax - reach, ay - arm), np.maximum(ax - arm, ay - reach))
    if shape == NEW_SHAPE:
        return np.maximum(ax - _BAR_ACROSS * radius, ay - _BAR_DOWN * radius)
    if shape == "triangle":
        height = _TRIANGLE_UP + _TRIANGLE_DOWN
        length = float(np.hypot(height, _TRIANGLE_HALF_BASE))
        side = (height * ax - _TRIANGLE_HALF_BASE * (y + _TRIANGLE_UP * radius)) / np.float32(length)
        return np.maximum(side, y - _TRIANGLE_DOWN * radius)
    raise ValueError(f"shape is {shape!r}; expected one of {', '.join(SHAPES)}")


def render(scene: Scene, width: int, height: int) -> np.ndarray:
    """Draw the scene as float32 (height, width, 3) in [0, 1] with edges one pixel soft."""
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for obj in reversed(scene.objects):  # the first object lies inside, hence in front of, the second
        _draw(picture, obj)
    return picture


def _draw(picture: np.ndarray, obj: SceneObject) -> None:
    height, width = picture.shape[:2]
    radius = obj.radius * min(width, height)
    cx, cy = obj.center_x * width, obj.center_y * height
    left, right, up, down = (reach * radius + 1 for reach in REACH[obj.shape])
    x0, x1 = max(int(cx - left), 0), min(int(cx + right) + 1, width)
    y0, y1 = max(int(cy - up), 0), min(int(cy + down) + 1, height)
    if x0 >= x1 or y0 >= y1:
        return
    x = np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5 - cx)
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - cy)
    coverage = np.clip(0.5 - signed_distance(obj.shape, x, y, np.float32(radius)), 0, 1)[..., None]
    region = picture[y0:y1, x0:x1]
    region += coverage * (np.array(COLORS[obj.color], np.float32) - region)
