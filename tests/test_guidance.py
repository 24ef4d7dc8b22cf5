"""Perturbed-attention and skip-layer guidance of the pipeline, against diffusers and by definition."""
import copy

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from pixart import PerturbedGuidance, Pipeline
from pixart.errors import InputError
from pixart.guidance import SKIPPED_BLOCKS
from pixart.sampling import denoise
from tests.support.tiny_pipeline import make_parts, padded_embeddings

PROMPTS = ["a red circle above a blue square", "small star"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("sigma"))


@pytest.fixture(scope="module")
def pipe(parts):
    return Pipeline.from_files(transformer=parts.folder, text_encoder=parts.folder)


class Predictions:
    """A scheduler whose latents are the last prediction: what guidance made of the forwards."""

    init_noise_sigma = 1.0

    def set_timesteps(self, steps, device):
        self.timesteps = torch.linspace(999, 0, steps).long()

    def scale_model_input(self, latents, timestep):
        return latents

    def step(self, predicted, timestep, latents, return_dict):
        return (predicted,)


@pytest.mark.parametrize("guidance", [4.5, 1.0])
@pytest.mark.parametrize("blocks", ["1", "0-1"])
def test_latents_equal_diffusers_pag_pipeline(parts, pipe, guidance, blocks):
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    layers = ["blocks.1"] if blocks == "1" else ["blocks.0", "blocks.1"]
    theirs = diffusers.PixArtSigmaPAGPipeline(None, None, None, copy.deepcopy(parts.transformer), scheduler, pag_applied_layers=layers)
    theirs.set_progress_bar_config(disable=True)
    states, mask = padded_embeddings(parts.t5, PROMPTS, 300)
    empty, empty_mask = padded_embeddings(parts.t5, ["", ""], 300)
    negative = {"negative_prompt_embeds": empty, "negative_prompt_attention_mask": empty_mask} if guidance > 1 else {}
    latents = torch.randn(2, 4, 16, 24, generator=torch.manual_seed(5))
    expected = theirs(
        prompt_embeds=states, prompt_attention_mask=mask, negative_prompt=None, **negative, guidance_scale=guidance, pag_scale=2.5,
        num_inference_steps=3, latents=latents, width=192, height=128, use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip
    run = {"steps": 3, "guidance": guidance, "latents": latents, "output": "latent", "progress": False}
    found = pipe(PROMPTS, perturbed=PerturbedGuidance(blocks, 2.5), **run)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((pipe(PROMPTS, **run) - expected).norm() / expected.norm()) > 1e-2


def test_skipped_blocks_are_those_of_a_model_without_them(pipe):
    model, context = pipe.transformer, pipe.encode("red")
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1))
    without = copy.deepcopy(model)
    del without.blocks[1]
    with torch.no_grad():
        full, weakened = (
            network(noise, torch.tensor([999]), context.states, context.mask)[:, :4] for network in (model, without)
        )
        found = denoise(model, noise, context, Predictions(), steps=1, perturbed=PerturbedGuidance("1", 3.0, SKIPPED_BLOCKS))
    assert float((full - weakened).norm() / full.norm()) > 1e-3
    torch.testing.assert_close(found, full + 3.0 * (full - weakened))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 8), ({"end_percent": 0.5}, 6), ({"start_percent": 0.6}, 6), ({"scale": 0.0}, 4), ({"start_percent": 0.99, "end_percent": 1.0}, 5)],
)
def test_a_step_within_the_range_costs_one_more_forward(pipe, options, expected):
    """Timesteps 999, 666, 333 and 0."""
    calls = []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        with torch.no_grad():
            given = PerturbedGuidance("1", **options)
            denoise(pipe.transformer, torch.randn(1, 4, 8, 8), pipe.encode("red"), Predictions(), steps=4, perturbed=given)
    finally:
        hook.remove()
    assert len(calls) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "2"}, "'2'.*from 0 to 1"),
        ({"blocks": ""}, "empty"),
        ({"kind": "sag"}, "kind is 'sag'"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "first below the second"),
    ],
)
def test_bad_input_is_named(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe("red", steps=1, output="latent", progress=False, perturbed=PerturbedGuidance(**{"blocks": "1", **options}))
