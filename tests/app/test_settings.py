"""The form's values: checked, styled, and there and back through a picture."""
from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("PIL")
pytest.importorskip("torch")
from PIL import Image, PngImagePlugin

from pixart.app.pictures import KEY, read_settings, save_picture
from pixart.app.settings import Offer, Settings, from_text
from pixart.app.styles import NO_STYLE, PLACE, STYLES, styled
from pixart.errors import InputError
from pixart.samplers import SASolver

OFFER = Offer("PixArt-Sigma 256", 256, ((256, 256), (512, 128)), ("dpm++", "sa-solver"), ("style.safetensors",))
GOOD = Settings("a red circle", width=256, height=256)


def test_settings_inside_a_picture_come_back_as_they_were(tmp_path):
    written = Settings(
        'a "red" circle,\n\u4e2d\u6587', "blur", "woodcut", 512, 128, 7, 3.5, "sa-solver", 3, 1, 0.25, 2**32 - 1, 4, "style.safetensors", -0.5
    )
    path = save_picture(tmp_path, Image.new("RGB", (16, 8), "red"), written, OFFER.title)
    assert read_settings(path) == (written, OFFER.title)
    with Image.open(path) as picture:
        assert picture.size == (16, 8)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert save_picture(tmp_path, Image.new("RGB", (16, 8)), written, OFFER.title) != path


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda self, path, **_: path.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_picture(tmp_path, Image.new("RGB", (8, 8)), GOOD, "")
    assert not [*tmp_path.iterdir()]


def png(path, text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[1]", "damaged"),
        ("{}", "the prompt is missing"),
        ('{"prompt": "x", "__class__": 1}', "'__class__' is none of prompt"),
        ('{"prompt": ["x"]}', "prompt is list; expected text"),
        ('{"prompt": "x", "steps": "20"}', "steps is '20'; expected a whole number from 1 to 100"),
        ('{"prompt": "x", "steps": 1e99}', "steps is 1e\\+99"),
        ('{"prompt": "x", "guidance": NaN}', "guidance is nan"),
        ('{"prompt": "x", "seed": 1' + "0" * 400 + "}", "seed is 1000"),
        ('{"prompt": "x", "guidance": -1' + "0" * 400 + "}", "guidance is -1000"),
        ('{"prompt": "x", "guidance": -Infinity}', "guidance is -inf"),
        ('{"prompt": "x", "seed": true}', "seed is True"),
        ('{"prompt": "x", "seed": 1.5}', "seed is 1.5; expected a whole number"),
        (json.dumps({"prompt": "x" * 10_001}), "10001 characters"),
        ('{"prompt": "x \\ud800"}', "prompt holds half a character"),
    ],
)
def test_damaged_settings_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_settings(png(tmp_path / "x.png", text))


def test_a_models_name_that_no_page_can_show_is_left_out(tmp_path):
    assert read_settings(png(tmp_path / "x.png", '{"prompt": "x", "model": "a \\udfff"}'))[1] == ""


def test_files_without_settings_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "jpeg.png", format="JPEG")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:30])
    for name, message in {"plain": "no settings inside", "jpeg": "not a PNG", "text": "not a PNG", "cut": "not a PNG|no settings", "absent": "not a PNG"}.items():
        with pytest.raises(InputError, match=message):
            read_settings(tmp_path / f"{name}.png")


def test_a_text_that_unpacks_to_much_more_is_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, "x" * 30_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=info)
    assert (tmp_path / "bomb.png").stat().st_size < 1_000_000
    with pytest.raises(InputError):
        read_settings(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"style": "nonsense"}, "style is 'nonsense'; this page has none, photograph"),
        ({"sampler": "lcm"}, "sampler is 'lcm'; this page has dpm\\+\\+, sa-solver"),
        ({"lora": "../secret"}, "lora is '../secret'; this page has none, style.safetensors"),
        ({"width": 255}, "255 x 256 is not a size this model was trained at"),
    ],
)
def test_what_the_model_does_not_offer_is_refused(changes, message):
    GOOD.check(OFFER)
    with pytest.raises(InputError, match=message):
        replace(GOOD, **changes).check(OFFER)


def test_whole_numbers_of_the_browser_become_ints():
    found = Settings.of({"prompt": "x", "steps": 20.0, "guidance": 4})
    assert isinstance(found.steps, int) and isinstance(found.guidance, float)


def test_pictures_have_seeds_of_their_own_that_draw_them_alone():
    wish = replace(GOOD, seed=2**32 - 1, pictures=3)
    assert [wish.for_picture(number).seed for number in range(3)] == [2**32 - 1, 0, 1]
    assert wish.for_picture(2).pictures == 1


def test_the_sampler_gets_its_own_settings():
    assert replace(GOOD, sampler="sa-solver", predictor_order=3, corrector_order=0, eta=0.5).chosen_sampler() == SASolver(3, 0, 0.5)
    assert from_text(GOOD.to_text(model="m")) == (GOOD, "m")


def test_styles_put_words_around_the_prompt():
    assert styled(" a dog ", "cat", NO_STYLE) == ("a dog", "cat")
    prompt, negative = styled("a {prompt} {0}", "cat", "woodcut")
    assert "a woodcut print of a {prompt} {0}," in prompt and negative.startswith("cat, photograph")
    assert styled("x", "", "woodcut")[1] == STYLES["woodcut"].negative
    assert all(style.prompt.count(PLACE) == 1 and style.prompt.isascii() for style in STYLES.values()) and len(STYLES) >= 8
