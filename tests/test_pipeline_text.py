"""Prompts of the pipeline: T5 in any precision, cleaning, and prompt files."""
import sys

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from pixart import Pipeline, load_prompts, save_prompts
from pixart.errors import InputError, TextEncoderError
from pixart.text.quantize import QuantizedLinear
from tests.support.tiny_pipeline import CAPTION_WIDTH, make_parts
from tests.support.tiny_text import save_t5_folder, tiny_t5

FAST = {"steps": 2, "progress": False, "output": "latent", "width": 64, "height": 64, "seed": 3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("sigma"))


@pytest.fixture(scope="module")
def pipe(parts):
    return Pipeline.from_files(parts.folder, parts.folder)


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp4", "fp8_e4m3fn"])
def test_every_precision_draws(parts, pipe, precision):
    if precision != "fp8_e4m3fn":
        pytest.importorskip("bitsandbytes")
    small = Pipeline.from_files(parts.folder, parts.folder, text_precision=precision)
    assert any(isinstance(module, QuantizedLinear) for module in small.text_encoder.model.modules())
    found, expected = small("a red circle", **FAST), pipe("a red circle", **FAST)
    assert torch.isfinite(found).all() and not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.5


def test_missing_bitsandbytes_is_named_and_the_rest_works(parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TextEncoderError, match="pip install bitsandbytes"):
        Pipeline.from_files(parts.folder, parts.folder, text_precision="nf4")


def test_cleaning(pipe):
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    found = pipe("<b>A red</b> circle https://example.com", clean_caption=True, **FAST)
    assert torch.equal(found, pipe("a red circle", **FAST))


def test_prompt_file(pipe, tmp_path):
    """By path, as a string too; no T5 is needed then."""
    positive = save_prompts(tmp_path / "p.safetensors", pipe.encode("a red circle"), ("a red circle",))
    negative = save_prompts(tmp_path / "n.safetensors", pipe.encode(""))
    without = Pipeline(pipe.transformer, base_size=pipe.base_size)
    found = without(prompt_embeds=positive, negative_prompt_embeds=str(negative), **FAST)
    assert torch.equal(found, pipe("a red circle", **FAST))


def test_saved_by_the_pipeline(pipe, tmp_path):
    """With all that tells it from others, and read by the same names that write."""
    path = pipe.save_prompt(tmp_path / "new" / "p.safetensors", "A Red circle", max_tokens=4)
    found = load_prompts(path)
    assert found.prompts == ("A Red circle",) and found.encoder == pipe.text_encoder.fingerprint
    assert found.settings == {"max_tokens": 4, "lower_case": True, "clean_caption": False}
    negative = pipe.save_prompt(tmp_path / "n.safetensors", "")
    expected = pipe("A Red circle", **FAST)
    full = pipe.save_prompt(tmp_path / "full.safetensors", "A Red circle")
    assert torch.equal(pipe(prompt_embeds=full, negative_prompt_embeds=negative, **FAST), expected)
    assert load_prompts(pipe.save_prompt(tmp_path / "two.safetensors", ["star", "a star"])).prompts == ("star", "a star")
    again = save_prompts(tmp_path / "again.safetensors", found.embeddings, found.prompts, found.encoder, **found.settings)
    back = load_prompts(again)
    assert torch.equal(back.embeddings.states, found.embeddings.states) and back.encoder == found.encoder
    with pytest.raises(InputError, match="no text encoder"):
        Pipeline(pipe.transformer).save_prompt(tmp_path / "none.safetensors", "star")
    assert not (tmp_path / "none.safetensors").exists()


def test_prompt_file_of_another_width_is_named(pipe, tmp_path):
    from pixart import load_text_encoder

    other = load_text_encoder(save_t5_folder(tiny_t5(width=2 * CAPTION_WIDTH), tmp_path / "t5"))
    path = save_prompts(tmp_path / "wide.safetensors", other.encode(["red"]), ("red",), other.fingerprint)
    with pytest.raises(InputError, match="wide.safetensors was made by an encoder 64 wide .*t5-64x2.* 32 wide"):
        pipe(prompt_embeds=path, **FAST)


def test_size_in_a_prompt_file_reaches_a_model_that_is_told_sizes(tmp_path):
    parts = make_parts(tmp_path / "alpha", micro=True, scale=0.18215)
    pipe = Pipeline.from_files(parts.folder, parts.folder, variant="alpha-1024")
    embeddings = pipe.encode("a red circle")
    plain = pipe(prompt_embeds=embeddings, use_bins=False, **FAST)
    for size, same in (((64, 64), True), ((900, 300), False)):
        path = save_prompts(tmp_path / "p.safetensors", type(embeddings)(embeddings.states, embeddings.mask, size=size))
        assert torch.allclose(pipe(prompt_embeds=path, use_bins=False, **FAST), plain, atol=1e-5) is same
