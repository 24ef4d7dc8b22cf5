"""An independent checker: reads objects, places and relations back from a picture, without any network.

It shares no drawing code with the generator. A picture's background is the median of its frame; objects
are connected regions of a palette colour; a shape is the outline that overlaps best with the region.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from .scenes import BACKGROUNDS, COLORS, NEW_SHAPE, SHAPES, Scene, signed_distance

UNKNOWN = "unknown"
_COLOR_TOLERANCE = 0.33  # farthest that a colour may lie from its palette entry, in RGB
_SMALLEST = 0.012  # of the short side squared; a third of the smallest object drawn
_LEAST_OVERLAP = 0.70  # between a region and the outline it is taken for
_LARGEST_STRETCH = 1.45  # of a bounding box, against the outline's own proportions
_LEAST_OVERLAP_OF_BAR = 0.85  # as a wide ellipse has 0.79
_BAR_STRETCH = 2.36  # width over height of the one shape that isn't as high as wide
_SIZE_LIMITS = (0.175, 0.235)
# Area of each shape over the square of the radius that sizes speak of.
_AREA_OF_RADIUS = {"circle": 3.14, "square": 3.24, "triangle": 2.12, "diamond": 2.42, "cross": 2.36, NEW_SHAPE: 2.86}
_GRID = 48


@dataclass(frozen=True)
class FoundObject:
    """What was seen: names or "unknown", centroid in fractions, box (x0, y0, x1, y1) and area in pixels."""

    color: str
    shape: str
    size: str
    center_x: float
    center_y: float
    box: tuple[int, int, int, int]
    area: int
    region: np.ndarray = field(compare=False)  # (height, width), true where it is; holes filled


@dataclass(frozen=True)
class Reading:
    """A picture's background and its objects, largest first."""

    background: str
    objects: tuple[FoundObject, ...]
    width: int
    height: int


@dataclass(frozen=True)
class Verdict:
    """Which parts of a scene a picture shows; a part the caption left open counts as shown."""

    count: bool
    color: bool
    shape: bool
    place: bool
    relation: bool
    size: bool
    background: bool
    reading: Reading
    found: tuple[FoundObject, ...] = ()  # in the order of the scene's objects; empty if there are too few

    @property
    def correct(self) -> bool:
        """Right number of objects, each of the right colour and shape, at the right place or relation."""
        return self.count and self.color and self.shape and self.place and self.relation


def read_picture(picture: np.ndarray) -> Reading:
    """Find background and objects in a picture (H, W, 3), uint8 or float in [0, 1]."""
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture has shape {picture.shape}; expected (height, width, 3)")
    pixels = picture.astype(np.float32) / (255 if picture.dtype == np.uint8 else 1)
    height, width = pixels.shape[:2]
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                            pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    background = np.median(frame, 0)
    regions = _find_regions(pixels, background)
    objects = [_describe(pixels, region) for region in regions]
    objects.sort(key=lambda o: -o.area)
    return Reading(_nearest(background, BACKGROUNDS), tuple(objects), width, height)


def _nearest(color: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> str:
    distances = {name: float(np.linalg.norm(color - np.array(value))) for name, value in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < _COLOR_TOLERANCE else UNKNOWN


def _find_regions(pixels: np.ndarray, background: np.ndarray) -> list[np.ndarray]:
    """Masks (H, W) of connected regions of one palette colour, rims of mixed colours removed."""
    palette = [np.array(c, np.float32) for c in COLORS.values() if np.linalg.norm(np.array(c) - background) > 0.2]
    centers = np.stack([background, *palette]).astype(np.float32)
    distances = np.linalg.norm(pixels[:, :, None] - centers, axis=3)
    nearest = np.where(distances.min(2) < 0.42, distances.argmin(2), -1)
    short = min(pixels.shape[:2])
    thickness = max(1, short // 80)
    regions = []
    for index in range(1, len(centers)):
        cores = ndimage.binary_opening(nearest == index, iterations=thickness)
        labels, count = ndimage.label(cores)
        for label in range(1, count + 1):
            core = labels == label
            filled = ndimage.binary_fill_holes(core)
            if core.sum() >= _SMALLEST * short**2 and core.sum() >= 0.5 * filled.sum():
                regions.append(_refine(pixels, core, filled, thickness))
    return [region for region in regions if region.sum() >= _SMALLEST * short**2]


def _refine(pixels: np.ndarray, core: np.ndarray, filled: np.ndarray, thickness: int) -> np.ndarray:
    """Move a region's border to where the colour is halfway between the region and what surrounds it."""
    reach = thickness + 3
    near = ndimage.binary_dilation(filled, iterations=reach)
    ring = ndimage.binary_dilation(near, iterations=3) & ~near
    if not ring.any():
        return filled
    inside, outside = np.median(pixels[core], 0), np.median(pixels[ring], 0)
    axis = inside - outside
    share = (pixels - outside) @ axis / max(float(axis @ axis), 1e-6)
    mask = ndimage.binary_fill_holes(near & ((share > 0.5) | ndimage.binary_erosion(filled, iterations=reach)))
    labels, count = ndimage.label(mask)
    if count <= 1:
        return mask
    sizes = ndimage.sum_labels(mask, labels, range(1, count + 1))
    return labels == 1 + int(np.argmax(sizes))


def _describe(pixels: np.ndarray, region: np.ndarray) -> FoundObject:
    height, width = region.shape
    rows, columns = np.nonzero(region)
    x0, y0, x1, y1 = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
    shape = _classify_shape(region[y0:y1, x0:x1])
    area = int(region.sum())
    radius = float(np.sqrt(area / _AREA_OF_RADIUS.get(shape, 3.0))) / min(width, height)
    size = "small" if radius < _SIZE_LIMITS[0] else "medium" if radius < _SIZE_LIMITS[1] else "large"
    color = _nearest(np.median(pixels[region], 0), COLORS)  # an object inside covers less than half of this one
    center_x, center_y = (columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height
    return FoundObject(color, shape, size, float(center_x), float(center_y), (x0, y0, x1, y1), area, region)


def _outlines() -> dict[str, np.ndarray]:
    """Each shape filling its bounding box, as (_GRID, _GRID) masks."""
    axis = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    x, y = np.abs(axis)[None, :], axis[:, None]
    masks = {
        "circle": x**2 + y**2 < 1,
        "square": np.ones((_GRID, _GRID), bool),
        "triangle": x < (y + 1) / 2,
        "diamond": x + np.abs(y) < 1,
        "cross": (x < 0.36) | (np.abs(y) < 0.36),
    }
    return {name: masks[name] for name in SHAPES}


def _classify_shape(cropped: np.ndarray) -> str:
    """The outline with the largest intersection over union, after stretching the region to the grid."""
    height, width = cropped.shape
    if _BAR_STRETCH / _LARGEST_STRETCH <= width / height <= _BAR_STRETCH * _LARGEST_STRETCH:
        return NEW_SHAPE if cropped.mean() >= _LEAST_OVERLAP_OF_BAR else UNKNOWN
    if max(height, width) > _LARGEST_STRETCH * min(height, width):
        return UNKNOWN
    rows = ((np.arange(_GRID) + 0.5) * height / _GRID).astype(int)
    columns = ((np.arange(_GRID) + 0.5) * width / _GRID).astype(int)
    grid = cropped[rows][:, columns]
    overlaps = {name: float((grid & mask).sum() / (grid | mask).sum()) for name, mask in _outlines().items()}
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= _LEAST_OVERLAP else UNKNOWN


def overlap_with_ideal(found: FoundObject, shape: str) -> float:
    """Intersection over union of what was found with the ideal shape of the same area around the same centroid."""
    rows, columns = np.nonzero(found.region)
    y, x = (np.arange(length, dtype=np.float32) for length in found.region.shape)
    radius, center_x, center_y = np.float32(np.sqrt(found.area / _AREA_OF_RADIUS[shape])), columns.mean(), rows.mean()
    for _ in range(2):  # a triangle's centroid isn't its middle: drawn once, then moved
        ideal = signed_distance(shape, (x - np.float32(center_x))[None], (y - np.float32(center_y))[:, None], radius) < 0
        ideal_rows, ideal_columns = np.nonzero(ideal)
        center_x, center_y = center_x + columns.mean() - ideal_columns.mean(), center_y + rows.mean() - ideal_rows.mean()
    return float((ideal & found.region).sum() / (ideal | found.region).sum())


def read_place(center_x: float, center_y: float) -> str:
    """Name the third of the picture, in both directions, that a centre lies in."""
    column = "left" if center_x < 0.43 else "right" if center_x > 0.57 else ""
    row = "top" if center_y < 0.43 else "bottom" if center_y > 0.57 else ""
    return f"{row} {column}".strip() or "center"


def relation_holds(relation: str, first: FoundObject, second: FoundObject, width: int, height: int) -> bool:
    """Whether `first` stands in the relation to `second`, mainly along the relation's own axis."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = first.box, second.box
    if relation == "inside":
        slack = 0.02 * min(width, height)
        within = ax0 >= bx0 - slack and ay0 >= by0 - slack and ax1 <= bx1 + slack and ay1 <= by1 + slack
        return within and first.area < second.area
    dx, dy = (second.center_x - first.center_x) * width, (second.center_y - first.center_y) * height
    overlap = 0.05 * min(width, height)  # boxes may just touch
    if relation in ("left of", "right of"):
        gap = bx0 - ax1 if relation == "left of" else ax0 - bx1
        return abs(dx) > abs(dy) and gap > -overlap
    if relation in ("above", "below"):
        gap = by0 - ay1 if relation == "above" else ay0 - by1
        return abs(dy) > abs(dx) and gap > -overlap
    raise ValueError(f"relation is {relation!r}; expected left of, right of, above, below or inside")


def check(scene: Scene, picture: np.ndarray, stated: Collection[str] | None = None) -> Verdict:
    """Compare a picture (H, W, 3) with a scene; `stated` limits place, size and background to what was said."""
    reading = read_picture(picture)
    said = {"place1", "size1", "size2", "background"} if stated is None else stated
    background = "background" not in said or reading.background == scene.background
    count = len(reading.objects) == len(scene.objects)
    pairing = _pair_up(scene, reading)
    if pairing is None:
        return Verdict(False, False, False, False, False, False, background, reading)
    pairs = list(zip(scene.objects, pairing))
    place = True
    if scene.relation is None and "place1" in said and scene.place is not None:
        place = read_place(pairing[0].center_x, pairing[0].center_y) == scene.place
    return Verdict(
        count=count,
        color=all(wanted.color == found.color for wanted, found in pairs),
        shape=all(wanted.shape == found.shape for wanted, found in pairs),
        place=place,
        relation=_relation_shown(scene, pairing, reading),
        size=all(f"size{i}" not in said or wanted.size == found.size for i, (wanted, found) in enumerate(pairs, 1)),
        background=background,
        reading=reading,
        found=pairing,
    )


def _relation_shown(scene: Scene, pairing: tuple[FoundObject, ...], reading: Reading) -> bool:
    return scene.relation is None or relation_holds(scene.relation, *pairing, reading.width, reading.height)


def _pair_up(scene: Scene, reading: Reading) -> tuple[FoundObject, ...] | None:
    """The found objects in the wanted order: by colour and shape, among twins by the relation."""
    wanted, found = scene.objects, reading.objects
    if len(found) < len(wanted):
        return None
    if len(wanted) == 1:
        return found[:1]

    def agreement(order: tuple[FoundObject, ...]) -> tuple[int, bool]:
        same = sum((w.color == f.color) + (w.shape == f.shape) for w, f in zip(wanted, order))
        return same, _relation_shown(scene, order, reading)

    return max([(found[0], found[1]), (found[1], found[0])], key=agreement)
