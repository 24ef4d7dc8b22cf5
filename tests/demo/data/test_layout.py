"""Arranged scenes: on the grid, inside the picture, apart, readable; and what tokens should know of them."""

import numpy as np
import pytest
import torch

from demo.data.layout import FEATURE_COUNT, FEATURES_PER_OBJECT, arrange, token_features
from demo.data.reader import check
from demo.data.scenes import BACKGROUNDS, REACH, SHAPES, Scene, SceneObject, render, sample_scene
from demo.training.autoencoder import encode, load_decoder
from pixart.bins import bin_table

BINS = sorted(bin_table(256).values())


@pytest.mark.parametrize("height, width", BINS[::3])
def test_every_scene_fits_its_bin_and_is_read_back(height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    for _ in range(12):
        scene = arrange(sample_scene(rng), width, height)
        picture = render(scene, width, height)
        frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert np.abs(frame - BACKGROUNDS[scene.background]).max() < 1e-6
        assert check(scene, picture).correct, scene


def test_centres_and_radii_are_half_tokens() -> None:
    rng = np.random.default_rng(0)
    for height, width in BINS[::6]:
        scene = arrange(sample_scene(rng), width, height)
        for obj in scene.objects:
            aside = 4 if obj.shape == "diamond" and obj.radius * min(width, height) <= 24 else 0
            centre = [obj.center_x * width - aside, obj.center_y * height - aside]
            halves = np.array([*centre, obj.radius * min(width, height)]) / 8
            assert halves == pytest.approx(halves.round(), abs=1e-6)


@pytest.mark.parametrize("height, width", [(512, 128), (128, 512), (144, 432), (176, 352)])
def test_nothing_is_smaller_than_what_the_autoencoder_keeps(height: int, width: int) -> None:
    """Squares are the narrowest, 2.7 tokens across; in pairs and inside others too. Pairs stay half a token apart, less rounding."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = arrange(sample_scene(rng, objects=2), width, height)
        reaches = [[reach * obj.radius * min(width, height) for reach in REACH[obj.shape]] for obj in scene.objects]
        for obj, (left, right, up, down) in zip(scene.objects, reaches, strict=True):
            assert min(left + right, up + down) > 2.5 * 16, obj
        if scene.relation != "inside":
            boxes = [
                (obj.center_x * width - left, obj.center_y * height - up, obj.center_x * width + right, obj.center_y * height + down)
                for obj, (left, right, up, down) in zip(scene.objects, reaches, strict=True)
            ]
            gaps = [second[axis] - first[axis + 2] for axis in (0, 1) for first, second in (boxes, boxes[::-1])]
            assert max(gaps) > 7, scene


@pytest.mark.parametrize("height, width", [(64, 256), (112, 144), (128, 128), (256, 64)])
def test_pairs_and_containers_fit_small_pictures(height: int, width: int) -> None:
    """Pairs along their axis at least: the first stage of training has half the size, where larger pictures' least radii have no room."""
    rng = np.random.default_rng(0)
    for scene in (arrange(sample_scene(rng, objects=2), width, height) for _ in range(200)):
        for obj in scene.objects:
            left, right, up, down = (reach * obj.radius * min(width, height) for reach in REACH[obj.shape])
            if scene.relation not in ("above", "below"):
                assert left <= obj.center_x * width <= width - right, scene
            if scene.relation not in ("left of", "right of"):
                assert up <= obj.center_y * height <= height - down, scene


@pytest.mark.parametrize("place", ["left", "center", "bottom"])
def test_the_smallest_diamonds_keep_their_tips_in_the_autoencoder(place: str) -> None:
    """On the grid of half-tokens, where other shapes lie, they would be read as circles."""
    scene = Scene((SceneObject("red", "diamond", "small", 0.5, 0.5, 0.15),), None, "white", place)
    for width, height in ((352, 176), (128, 512)):
        picture = torch.from_numpy(render(arrange(scene, width, height), width, height)).permute(2, 0, 1)[None]
        with torch.no_grad():
            decoded = load_decoder()(encode(picture))[0].permute(1, 2, 0).clamp(0, 1).numpy()
        assert check(scene, (decoded * 255).round().astype(np.uint8)).correct


def test_same_wording_and_size_is_the_same_spot_and_the_scene_given_is_left_alone() -> None:
    def single(x: float) -> Scene:
        return Scene((SceneObject("red", "cross", "large", x, 0.2, 0.26),), None, "white", "top left")

    scenes = [single(0.21), single(0.27)]
    assert arrange(scenes[0], 256, 256) == arrange(scenes[1], 256, 256)
    assert scenes[0].objects[0].center_x == 0.21


def test_features_say_which_object_a_token_belongs_to() -> None:
    objects = SceneObject("red", "circle", "large", 0.25, 0.5, 0.25), SceneObject("blue", "cross", "small", 0.75, 0.5, 0.125)
    features = token_features(Scene(objects, "left of", "white"), 256, 256).reshape(16, 16, FEATURE_COUNT)
    assert FEATURE_COUNT == 2 * FEATURES_PER_OBJECT
    first, second = features[..., :FEATURES_PER_OBJECT], features[..., FEATURES_PER_OBJECT:]
    # Token (row 8, column 5) has its middle 1.5 tokens right of and 0.5 below the circle's centre, whose radius is 4.
    assert first[8, 5, :3] == pytest.approx((1, 1.5 / 4, 0.5 / 4))
    assert first[8, 5, 3:].argmax() == SHAPES.index("circle") and first[8, 5, 3:].sum() == 1
    assert not second[8, 5].any() and second[8, 12, 3 + SHAPES.index("cross")] == 1
    assert not features[0, 0].any()


def test_features_of_a_lone_object_leave_the_second_empty() -> None:
    scene = arrange(sample_scene(np.random.default_rng(3), objects=1), 208, 304)
    features = token_features(scene, 208, 304)
    assert features.shape == (13 * 19, FEATURE_COUNT)
    assert features[:, :FEATURES_PER_OBJECT].any() and not features[:, FEATURES_PER_OBJECT:].any()
