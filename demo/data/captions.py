"""Captions of the demo's scenes: what is said varies, and what is left unsaid is free."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from .scenes import BACKGROUNDS, COLORS, PLACES, PLAIN_BACKGROUNDS, RELATIONS, SHAPES, SIZES, Scene, SceneObject

ATTRIBUTE_CLASSES: dict[str, tuple[str, ...]] = {
    "background": ("unspecified", *BACKGROUNDS),
    "n_objects": ("unspecified", "one", "two"),
    "color1": ("unspecified", *COLORS),
    "shape1": ("unspecified", *SHAPES),
    "size1": ("unspecified", *SIZES),
    "place1": ("unspecified", *PLACES),
    "color2": ("unspecified", *COLORS),
    "shape2": ("unspecified", *SHAPES),
    "size2": ("unspecified", *SIZES),
    "relation": ("unspecified", *RELATIONS),
}
_ALWAYS = ("n_objects", "color1", "shape1")
_OPENINGS = ("a picture of", "an image of", "a picture showing", "a drawing of", "there is", "we see", "a simple picture of")
_SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "medium sized"), "large": ("large", "big")}
_PLACE_WORDS = {
    "center": ("in the center", "in the middle", "at the center"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "in", "inside of"),
}


@dataclass(frozen=True)
class Caption:
    """A text and the attributes (keys of ATTRIBUTE_CLASSES) that it states."""

    text: str
    stated: frozenset[str]


def attributes(scene: Scene, stated: Collection[str] | None = None) -> dict[str, int]:
    """Class index of every attribute; 0 where the scene has none or `stated` leaves it out."""
    values: dict[str, str | None] = {
        "background": scene.background,
        "n_objects": ("one", "two")[len(scene.objects) - 1],
        "place1": scene.place,
        "relation": scene.relation,
    }
    for number, obj in enumerate(scene.objects, 1):
        values |= {f"color{number}": obj.color, f"shape{number}": obj.shape, f"size{number}": obj.size}
    kept = ATTRIBUTE_CLASSES if stated is None else stated
    return {
        name: classes.index(values[name]) if name in kept and values.get(name) else 0
        for name, classes in ATTRIBUTE_CLASSES.items()
    }


def caption(scene: Scene, rng: np.random.Generator, state: Collection[str] = ()) -> Caption:
    """Describe the scene in random wording; the attributes in `state` are never left out."""
    stated = set(_ALWAYS)
    say_size = rng.random() < 0.45
    phrases = []
    for number, obj in enumerate(scene.objects, 1):
        sized = f"size{number}" in state or (say_size and rng.random() < 0.8)
        if sized:
            stated.add(f"size{number}")
        phrases.append(_object_phrase(rng, obj, sized))
    if scene.relation is not None:
        stated |= {"color2", "shape2", "relation"}
        link = str(rng.choice(_RELATION_WORDS[scene.relation]))
        subject = f"{phrases[0]} {'is ' if rng.random() < 0.12 else ''}{link} {phrases[1]}"
    else:
        subject = phrases[0]
        if scene.place is not None and ("place1" in state or rng.random() < 0.65):
            stated.add("place1")
            subject += f" {_place_phrase(rng, scene.place)}"
    if "background" in state or rng.random() < 0.6:
        stated.add("background")
        subject += _background_phrase(rng, scene.background)
    return Caption(_open(rng, subject), frozenset(stated))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _object_phrase(rng: np.random.Generator, obj: SceneObject, sized: bool) -> str:
    words = f"{rng.choice(_SIZE_WORDS[obj.size])} {obj.color} {obj.shape}" if sized else f"{obj.color} {obj.shape}"
    return f"{_article(words)} {words}"


def _corner(place: str) -> str:
    return f"in the {place}"


def _place_phrase(rng: np.random.Generator, place: str) -> str:
    if " " in place:
        return _corner(place) + (" corner" if rng.random() < 0.5 else "")
    return str(rng.choice(_PLACE_WORDS[place]))


def _background_phrase(rng: np.random.Generator, background: str) -> str:
    plain = "plain " if background in PLAIN_BACKGROUNDS and rng.random() < 0.25 else ""
    forms = (f" on a {plain}{background} background", f", {plain}{background} background", f" on {plain}{background}")
    return forms[int(rng.choice(3, p=(0.6, 0.25, 0.15)))]


def _open(rng: np.random.Generator, subject: str) -> str:
    chance = rng.random()
    if chance < 0.15:  # the bare style of a tag: no leading article
        return subject.split(" ", 1)[1]
    if chance < 0.40:
        return f"{rng.choice(_OPENINGS)} {subject}"
    return subject
