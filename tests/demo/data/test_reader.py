"""The checker reads rendered scenes back, forgives soft edges and is not fooled."""

import numpy as np
import pytest
from scipy import ndimage

from demo.data.reader import check, read_picture, read_place
from demo.data.scenes import Scene, SceneObject, render, sample_scene

BIN_SIZES = ((256, 256), (512, 128), (128, 512), (352, 176), (208, 304))


def _scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, "heldout" if i % 3 == 0 else "train", 1 + i % 2) for i in range(count)]


@pytest.mark.parametrize(("width", "height"), BIN_SIZES)
def test_rendered_scenes_are_read_back(width: int, height: int) -> None:
    verdicts = [check(s, (render(s, width, height) * 255).round().astype(np.uint8)) for s in _scenes(30, width)]
    assert np.mean([v.correct and v.background for v in verdicts]) == 1
    assert np.mean([v.size for v in verdicts]) >= 0.96


def test_wrong_prompts_fail() -> None:
    scenes = _scenes(62, 1)
    assert np.mean([check(other, render(s, 256, 256)).correct for s, other in zip(scenes, scenes[2:])]) < 0.05


@pytest.mark.parametrize(("width", "height"), BIN_SIZES[:1] + BIN_SIZES[3:])
def test_soft_shifted_and_noisy_pictures_mostly_pass(width: int, height: int) -> None:
    rng = np.random.default_rng(2)

    def spoil(picture: np.ndarray) -> np.ndarray:
        soft = ndimage.gaussian_filter(picture, (2.5, 2.5, 0)) + rng.normal(0, 0.04, 3) + rng.normal(0, 0.03, picture.shape)
        return np.clip(soft, 0, 1)

    assert np.mean([check(s, spoil(render(s, width, height))).correct for s in _scenes(24, 3)]) >= 0.9


def test_noise_and_flat_pictures_fail() -> None:
    rng = np.random.default_rng(4)
    for scene in _scenes(10, 5):
        assert not check(scene, rng.random((256, 256, 3))).correct
        smooth = ndimage.gaussian_filter(rng.random((256, 256, 3)), (12, 12, 0))
        assert not check(scene, (smooth - smooth.min()) / np.ptp(smooth)).correct
        assert not check(scene, np.full((256, 256, 3), rng.random())).correct


def _pair(relation: str, first: tuple[str, str], second: tuple[str, str]) -> Scene:
    spots = {"left of": ((0.25, 0.5), (0.75, 0.5)), "above": ((0.5, 0.25), (0.5, 0.75))}[relation]
    objects = [SceneObject(c, s, "small", *spot, 0.15) for (c, s), spot in zip((first, second), spots)]
    return Scene((objects[0], objects[1]), relation, "white")


def test_each_part_of_the_verdict_can_fail_alone() -> None:
    shown = render(_pair("left of", ("red", "circle"), ("blue", "square")), 256, 256)
    swapped = check(_pair("left of", ("blue", "square"), ("red", "circle")), shown)
    assert swapped.color and swapped.shape and not swapped.relation and not swapped.correct
    other_axis = check(_pair("above", ("red", "circle"), ("blue", "square")), shown)
    assert not other_axis.relation
    color = check(_pair("left of", ("red", "circle"), ("green", "square")), shown)
    assert color.shape and not color.color and not color.correct
    bound_wrongly = check(_pair("left of", ("red", "square"), ("blue", "circle")), shown)
    assert not bound_wrongly.correct
    single = Scene((SceneObject("red", "circle", "small", 0.25, 0.5, 0.15),), None, "white", "left")
    extra = check(single, shown)
    assert not extra.count and not extra.correct


def test_place_counts_only_when_stated() -> None:
    shown = Scene((SceneObject("red", "circle", "small", 0.25, 0.25, 0.15),), None, "white", "top left")
    asked = Scene(shown.objects, None, "white", "right")
    picture = render(shown, 256, 256)
    assert not check(asked, picture, stated={"place1"}).correct
    assert check(asked, picture, stated=set()).correct
    assert (read_place(0.5, 0.5), read_place(0.2, 0.5), read_place(0.8, 0.9)) == ("center", "left", "bottom right")


def test_reading_names_what_it_sees() -> None:
    scene = Scene((SceneObject("cyan", "triangle", "large", 0.5, 0.6, 0.27),), None, "navy", "center")
    reading = read_picture(render(scene, 208, 304))
    (found,) = reading.objects
    assert (reading.background, found.color, found.shape, found.size) == ("navy", "cyan", "triangle", "large")
    assert found.center_y == pytest.approx(0.6, abs=0.01)
    with pytest.raises(ValueError, match=r"\(256, 256\)"):
        read_picture(np.zeros((256, 256)))
