"""The model behind the page against the plain pipeline: prompts kept, T5 released, a LoRA put on and taken off exactly."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from pixart import Pipeline
from pixart.app import model as model_module
from pixart.app.model import KEEP, RELEASE, Model, Places, Reports, explain
from pixart.app.settings import Settings
from pixart.errors import CheckpointError, InputError
from pixart.samplers import OneStep
from pixart.sampling_note import dmd_note, note_metadata
from tests.support import adapter_factory
from tests.support.checkpoint_factory import original_keys
from tests.support.tiny_pipeline import make_parts

T5_LAYER = "lora_te_encoder_block_1_layer_0_SelfAttention_o"
WISH = Settings("a red circle", steps=2, width=256, height=256, seed=3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def loras(parts, tmp_path_factory):
    """style: transformer alone; text: T5 as well; lcm: named as for few steps; broken: no adapter."""
    folder = tmp_path_factory.mktemp("loras")
    sample = adapter_factory.make("onetrainer", original_keys(parts.transformer.state_dict(), 2))
    text = {f"{T5_LAYER}.lora_up.weight": torch.randn(32, 2), f"{T5_LAYER}.lora_down.weight": torch.randn(2, 32)}
    save_file(sample.tensors, folder / "style.safetensors")
    save_file(sample.tensors, folder / "style-lcm.safetensors")
    save_file({**sample.tensors, **text}, folder / "text.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "broken.safetensors")
    (folder / "notes.txt").write_text("not a LoRA")
    return folder


def places(parts, loras=None, **changes):
    return Places(parts.folder, parts.folder, parts.folder, loras=loras, dtype=torch.float32, **changes)


@pytest.fixture(scope="module")
def model(parts, loras):
    return Model(places(parts, loras, t5=KEEP))


@pytest.fixture(scope="module")
def plain(parts):
    return Pipeline.from_files(parts.folder, parts.folder, parts.folder, dtype=torch.float32)


class Heard:
    """Reports, remembered."""

    def __init__(self, stop_at=None):
        self.said, self.notes, self.steps = [], [], []
        self.stop_at = stop_at

    def reports(self):
        return Reports(self.said.append, self.notes.append, self.step)

    def step(self, picture, step, latents):
        self.steps.append((picture, step))
        assert latents.shape[1] == 4
        if self.steps[-1] == self.stop_at:
            raise KeyError("stop")


def draw(model, settings, heard=None):
    return [np.asarray(picture) for _, picture in model.draw(settings, (heard or Heard()).reports())]


def by_pipeline(pipe, settings, prompt=None, negative=None):
    return np.asarray(pipe(
        prompt or settings.prompt, negative or settings.negative, steps=settings.steps, guidance=settings.guidance, width=settings.width,
        height=settings.height, seed=settings.seed, sampler=settings.chosen_sampler(), progress=False,
    )[0])  # fmt: skip


def test_pictures_are_those_of_the_pipeline_each_from_its_own_seed(model, plain):
    heard = Heard()
    found = draw(model, replace(WISH, pictures=2, negative="tree", style="woodcut"), heard)
    assert heard.steps == [(0, 1), (0, 2), (1, 1), (1, 2)]
    prompt, negative = model_module.styled(WISH.prompt, "tree", "woodcut")
    for number, picture in enumerate(found):
        np.testing.assert_allclose(picture.astype(int), by_pipeline(plain, replace(WISH, seed=3 + number), prompt, negative).astype(int), atol=1)


def test_samplers_and_sizes_reach_the_pipeline(model, plain):
    wish = replace(WISH, width=512, height=128, sampler="sa-solver", eta=0.5, predictor_order=1, steps=3, guidance=1)
    found = draw(model, wish)[0]
    assert found.shape == (128, 512, 3)
    np.testing.assert_allclose(found.astype(int), by_pipeline(plain, wish).astype(int), atol=1)
    assert not np.array_equal(found, draw(model, replace(wish, eta=0.0))[0])


def test_a_prompt_is_read_once(model, monkeypatch):
    first = draw(model, replace(WISH, prompt="once"))
    monkeypatch.setattr(model.pipe, "encode", None)
    assert np.array_equal(first, draw(model, replace(WISH, prompt="once")))
    with pytest.raises(TypeError):
        draw(model, replace(WISH, prompt="twice"))


def test_old_prompts_make_room(model, monkeypatch):
    monkeypatch.setattr(model_module, "KEPT_PROMPTS", 3)
    for prompt in ("a", "b", "c", "d"):
        draw(model, replace(WISH, prompt=prompt, steps=1))
    assert [text for text, _ in model._prompts] == ["c", "d", ""]


def test_a_lora_is_put_on_and_taken_off_exactly(model, parts, loras):
    before = {name: value.clone() for name, value in model.pipe.transformer.state_dict().items()}
    bare = draw(model, WISH)
    other = Pipeline.from_files(parts.folder, parts.folder, parts.folder, dtype=torch.float32)
    other.load_lora(loras / "text.safetensors", 0.7)
    wish = replace(WISH, lora="text.safetensors", strength=0.7)
    heard = Heard()
    found = draw(model, wish, heard)
    assert "1 of T5" in heard.notes[0]
    np.testing.assert_allclose(found[0].astype(int), by_pipeline(other, wish).astype(int), atol=1)
    assert np.array_equal(found, draw(model, wish))  # worn already
    assert not np.array_equal(found, draw(model, replace(wish, strength=0.3)))
    draw(model, replace(wish, lora="style.safetensors"))
    assert np.array_equal(bare, draw(model, WISH))
    assert all(torch.equal(value, before[name]) for name, value in model.pipe.transformer.state_dict().items())


def test_a_lora_that_does_not_fit_is_named_and_changes_nothing(model, loras):
    bare = draw(model, WISH)
    draw(model, replace(WISH, lora="style.safetensors"))
    with pytest.raises(CheckpointError, match="broken.safetensors") as caught:
        draw(model, replace(WISH, lora="broken.safetensors"))
    assert str(loras) in str(caught.value)
    assert explain(caught.value, model.folders).startswith("broken.safetensors:")  # visitors need no folders of this machine
    assert np.array_equal(bare, draw(model, WISH))


def test_a_new_file_of_the_same_name_is_another_lora(parts, loras, tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_bytes((loras / "style.safetensors").read_bytes())
    model = Model(places(parts, tmp_path))
    wish = replace(WISH, lora=path.name)
    first = draw(model, wish)
    sample = adapter_factory.make("onetrainer", original_keys(parts.transformer.state_dict(), 2))
    save_file({name: value * 3 if "up" in name else value for name, value in sample.tensors.items()}, path)
    assert not np.array_equal(first, draw(model, wish))


def test_t5_is_released_where_memory_is_short_and_loaded_again_for_a_new_prompt(parts, loras, model):
    short = Model(places(parts, loras, t5=RELEASE))
    assert short.pipe.text_encoder is None and short.short_of_memory
    seen = []

    class Watch(Heard):
        def step(self, picture, step, latents):
            seen.append(short.pipe.text_encoder)

    heard = Watch()
    for wish in (WISH, replace(WISH, lora="text.safetensors"), replace(WISH, prompt="a blue star", lora="style.safetensors"), WISH):
        assert np.array_equal(draw(short, wish, heard), draw(model, wish))
    assert seen and all(encoder is None for encoder in seen)
    assert heard.said.count("Loading T5") == 3  # the last prompt was known


def test_memory_decides_by_itself(parts, monkeypatch):
    monkeypatch.setattr(model_module, "free_bytes", lambda device: 10)
    assert Model(places(parts)).pipe.text_encoder is None
    monkeypatch.setattr(model_module, "free_bytes", lambda device: 2**40)
    assert Model(places(parts)).pipe.text_encoder is not None


def test_the_offer_is_what_the_model_can_do(model):
    offer = model.offer
    assert offer.base_size == 256 and (256, 256) in offer.sizes and (512, 128) in offer.sizes and len(offer.sizes) == 40
    assert offer.loras == ("broken.safetensors", "style-lcm.safetensors", "style.safetensors", "text.safetensors")
    assert offer.samplers == ("dpm++", "sa-solver", "lcm")


def test_few_steps_where_the_weights_are_such(model, parts, loras, tmp_path):
    with pytest.raises(InputError, match="needs weights that were distilled"):
        draw(model, replace(WISH, sampler="lcm"))
    assert draw(model, replace(WISH, sampler="lcm", guidance=1, lora="style-lcm.safetensors"))[0].shape == (256, 256, 3)
    assert Model(places(parts, few_steps="one-step")).offer.samplers[0] == "one-step"
    assert Model(places(parts, few_steps="no")).offer.samplers == ("dpm++", "sa-solver")
    named = tmp_path / "PixArt-Alpha-DMD-XL-2-512x512"
    named.symlink_to(parts.folder / "transformer", target_is_directory=True)
    distilled = Model(replace(places(parts), transformer=named))
    assert distilled.offer.samplers == ("one-step", "dpm++", "sa-solver")
    assert draw(distilled, replace(WISH, sampler="one-step", steps=1, guidance=1))[0].shape == (256, 256, 3)
    with pytest.raises(InputError, match="expected 1 step"):
        draw(distilled, replace(WISH, sampler="one-step", steps=2))


def test_what_a_file_says_of_its_sampling_is_heeded_and_forgotten_with_it(model, parts, tmp_path):
    """Notes of training: a LoRA for one step from timestep 600, and then the plain weights again."""
    sample = adapter_factory.make("onetrainer", original_keys(parts.transformer.state_dict(), 2))
    save_file(sample.tensors, tmp_path / "quick.safetensors", note_metadata(dmd_note(600)))
    noted = Model(places(parts, tmp_path))
    assert noted.offer.samplers == ("dpm++", "sa-solver", "one-step")
    wish = replace(WISH, sampler="one-step", steps=1, guidance=1, lora="quick.safetensors")
    other = Pipeline.from_files(parts.folder, parts.folder, parts.folder, dtype=torch.float32)
    other.load_lora(tmp_path / "quick.safetensors")
    expected = other(WISH.prompt, steps=1, guidance=1, seed=3, sampler=OneStep(600), width=256, height=256, progress=False)[0]
    np.testing.assert_allclose(draw(noted, wish)[0].astype(int), np.asarray(expected).astype(int), atol=1)
    with pytest.raises(InputError, match="needs weights that were distilled"):
        draw(noted, replace(wish, lora="none"))
    assert np.array_equal(draw(noted, WISH), draw(model, WISH)) and noted.pipe.note is None


def test_words_beyond_the_limit_are_named(model):
    heard = Heard()
    draw(model, replace(WISH, prompt="star " * 400, steps=1), heard)
    assert heard.notes[-1].startswith("The prompt is too long; the model doesn't see: ")


def test_drawing_ends_where_it_is_told_to_and_can_go_on(model):
    heard = Heard(stop_at=(0, 1))
    with pytest.raises(KeyError):
        draw(model, WISH, heard)
    assert heard.steps == [(0, 1)] and draw(model, WISH)[0].shape == (256, 256, 3)


def test_a_folder_that_is_none_is_named(parts, tmp_path):
    with pytest.raises(InputError, match="--loras is"):
        Model(places(parts, Path(tmp_path / "absent")))
