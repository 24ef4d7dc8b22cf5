"""The demo's scenes and captions: geometry, held-out combinations, vocabulary."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from demo.data.captions import ATTRIBUTE_CLASSES, attributes, caption
from demo.data.scenes import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    is_heldout,
    render,
    sample_scene,
)

BIN_SIZES = ((256, 256), (512, 128), (128, 512), (352, 176), (208, 304))
# Half-planes and discs written from the shapes' geometry, independent of the distance functions.
AREAS = {"circle": np.pi, "square": 1.8**2, "triangle": 1.08 * 1.96, "diamond": 2 * 1.1**2, "cross": 4 * 0.72 - 0.72**2}


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_covers_its_analytic_area(shape: str) -> None:
    scene = Scene((SceneObject("red", shape, "large", 0.5, 0.55, 0.3),), None, "black", "center")
    coverage = (render(scene, 256, 256)[..., 0] - BACKGROUNDS["black"][0]) / (COLORS["red"][0] - BACKGROUNDS["black"][0])
    assert coverage.sum() / (0.3 * 256) ** 2 == pytest.approx(AREAS[shape], rel=0.01)


def test_circle_stays_round_in_every_ratio() -> None:
    scene = Scene((SceneObject("red", "circle", "large", 0.5, 0.5, 0.3),), None, "white", "center")
    for width, height in BIN_SIZES:
        mask = np.abs(render(scene, width, height) - BACKGROUNDS["white"]).max(2) > 0.4
        assert abs(int(mask.any(0).sum()) - int(mask.any(1).sum())) <= 1
        assert mask.any(0).sum() == pytest.approx(0.6 * min(width, height), abs=2)


def test_objects_lie_inside_the_picture_and_apart() -> None:
    rng = np.random.default_rng(0)
    for index in range(300):
        scene = sample_scene(rng)
        for width, height in BIN_SIZES:
            picture = render(scene, width, height)
            frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert np.abs(frame - BACKGROUNDS[scene.background]).max() < 1e-6, (index, scene)


def test_heldout_combinations_are_a_tenth_and_leave_every_part_in_training() -> None:
    singles = [
        Scene((SceneObject(c, s, "small", 0.5, 0.5, 0.15),), None, "white", p)
        for c, s, p in itertools.product(COLORS, SHAPES, PLACES)
    ]
    held = [s for s in singles if is_heldout(s)]
    assert 0.05 < len(held) / len(singles) < 0.15
    kept = Counter(
        part for s in singles if not is_heldout(s) for part in (s.objects[0].color, s.objects[0].shape, s.place)
    )
    assert set(kept) == {*COLORS, *SHAPES, *PLACES}


def test_heldout_ignores_which_object_is_named_first() -> None:
    a, b = SceneObject("red", "circle", "small", 0.5, 0.2, 0.15), SceneObject("blue", "square", "small", 0.5, 0.8, 0.15)
    for relation, opposite in (("above", "below"), ("left of", "right of")):
        assert is_heldout(Scene((a, b), relation, "white")) == is_heldout(Scene((b, a), opposite, "gray"))


def test_splits_hold_what_they_name_and_training_has_every_part() -> None:
    rng = np.random.default_rng(1)
    seen = Counter()
    for split in ("train", "heldout"):
        for _ in range(1500):
            scene = sample_scene(rng, split)
            assert is_heldout(scene) == (split == "heldout")
            seen.update(f"{split} {o.color}" for o in scene.objects)
            seen.update([f"{split} {scene.relation}", f"{split} {scene.background}"])
            seen.update(f"{split} {o.shape}" for o in scene.objects)
    for name in (*COLORS, *SHAPES, *RELATIONS, *BACKGROUNDS):
        assert seen[f"train {name}"] > 20


def test_caption_states_what_it_says() -> None:
    rng = np.random.default_rng(2)
    words: Counter = Counter()
    lengths = set()
    for _ in range(2000):
        scene = sample_scene(rng)
        made = caption(scene, rng)
        words.update(made.text.replace(",", "").split())
        lengths.add(len(made.text.split()))
        assert made.text == made.text.lower()
        for number, obj in enumerate(scene.objects, 1):
            assert f"{obj.color} {obj.shape}" in made.text
            named = any(w in made.text for w in ("small", "little", "medium", "large", "big"))
            assert f"size{number}" not in made.stated or named
        wordings = (f"on {scene.background}", f" {scene.background} background", f"plain {scene.background}")
        assert ("background" in made.stated) == any(words in made.text for words in wordings)
        values = attributes(scene, made.stated)
        assert {name for name, value in values.items() if value} == made.stated & {n for n, v in attributes(scene).items() if v}
    assert len(words) < 90 and max(lengths) - min(lengths) > 10


def test_quickstart_wording_occurs_in_training() -> None:
    rng = np.random.default_rng(3)
    texts = {caption(sample_scene(rng), rng).text.split(" on ")[0] for _ in range(4000)}
    assert any(t.startswith("a ") and " above a " in t and len(t.split()) == 7 for t in texts)


def test_forced_attributes_are_stated() -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        scene = sample_scene(rng, objects=1)
        assert {"place1", "background"} <= caption(scene, rng, state=("place1", "background")).stated


def test_attribute_indices_match_their_classes() -> None:
    scene = Scene(
        (SceneObject("red", "circle", "small", 0.5, 0.2, 0.15), SceneObject("blue", "square", "large", 0.5, 0.7, 0.27)),
        "above", "gray",
    )
    names = {key: ATTRIBUTE_CLASSES[key][index] for key, index in attributes(scene).items()}
    assert names == {
        "background": "gray", "n_objects": "two", "color1": "red", "shape1": "circle", "size1": "small",
        "place1": "unspecified", "color2": "blue", "shape2": "square", "size2": "large", "relation": "above",
    }


def test_sampling_is_reproducible_and_rendering_fast() -> None:
    scenes = [sample_scene(np.random.default_rng(6)) for _ in range(2)]
    assert scenes[0] == scenes[1]
    best = min(_seconds(scenes[0]) for _ in range(20))
    assert best < 0.02  # 1 ms on an idle core; the margin is for busy machines


def _seconds(scene: Scene) -> float:
    started = time.perf_counter()
    render(scene, 256, 256)
    return time.perf_counter() - started


def test_unknown_arguments_are_refused() -> None:
    rng = np.random.default_rng(7)
    with pytest.raises(ValueError, match="'test'"):
        sample_scene(rng, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3"):
        sample_scene(rng, objects=3)
    assert min(SIZES.values()) >= 0.13
