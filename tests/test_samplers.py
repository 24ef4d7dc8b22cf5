"""Samplers by name against diffusers' pipeline with the same scheduler, and one step against its formula."""
from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from pixart import Pipeline
from pixart.cli import SAMPLER_NAMES
from pixart.errors import InputError
from pixart.samplers import LCM, SAMPLERS, DPMSolver, OneStep, SASolver, find_sampler
from pixart.sampling_note import LCM as CONSISTENCY_NOTE
from pixart.sampling_note import dmd_note
from pixart.schedules import optimized_timesteps
from tests.support.tiny_pipeline import make_parts, padded_embeddings

BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
PROMPT = "a red circle above a blue square"
THEIRS = {
    "dpm++": (DPMSolver(), 4, 4.5, lambda: diffusers.DPMSolverMultistepScheduler(**BETAS)),
    "sa-solver": (SASolver(), 5, 3.0, lambda: diffusers.SASolverScheduler(**BETAS)),
    "sa-solver of its own": (
        SASolver(predictor_order=3, corrector_order=1, eta=0.5, first=700, last=300), 5, 3.0,
        lambda: diffusers.SASolverScheduler(**BETAS, predictor_order=3, corrector_order=1, tau_func=lambda t: 0.5 if 300 <= t <= 700 else 0),
    ),
    "lcm": (LCM(), 4, 1.0, lambda: diffusers.LCMScheduler(**BETAS)),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("sigma"))


@pytest.fixture(scope="module")
def pipe(parts):
    return Pipeline.from_files(transformer=parts.folder, text_encoder=parts.folder, vae=parts.folder)


@pytest.mark.parametrize("case", THEIRS)
def test_latents_equal_those_of_diffusers_noise_included(parts, pipe, case):
    sampler, steps, guidance, scheduler = THEIRS[case]
    theirs = diffusers.PixArtSigmaPipeline(None, None, parts.vae, parts.transformer, scheduler())
    theirs.set_progress_bar_config(disable=True)
    states, mask = padded_embeddings(parts.t5, [PROMPT], 300)
    empty, empty_mask = padded_embeddings(parts.t5, [""], 300)
    expected = theirs(
        prompt_embeds=states, prompt_attention_mask=mask, negative_prompt=None, negative_prompt_embeds=empty,
        negative_prompt_attention_mask=empty_mask, num_inference_steps=steps, guidance_scale=guidance, width=256, height=256,
        generator=torch.Generator().manual_seed(11), output_type="latent",
    ).images  # fmt: skip
    found = pipe(PROMPT, steps=steps, guidance=guidance, sampler=sampler, seed=11, output="latent", progress=False)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_lcm_in_four_steps_is_at_its_timesteps(pipe):
    seen = []
    pipe("star", steps=4, guidance=1, sampler="lcm", output="latent", progress=False, callback=lambda i, t, x: seen.append(t))
    assert seen == [999, 759, 499, 259]


def test_one_step_is_the_formula(pipe):
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    embeds = pipe.encode("star")
    found = pipe(prompt_embeds=embeds, latents=noise, steps=1, guidance=1, sampler="one-step", output="latent", progress=False)
    predicted = pipe.transformer(noise.to(pipe.dtype), torch.tensor([400]), embeds.states.to(pipe.dtype), None)[:, :4].float()
    kept = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)[400]
    expected = (noise - (1 - kept).sqrt() * predicted) / kept.sqrt()
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    other = pipe(prompt_embeds=embeds, latents=noise, steps=1, guidance=1, sampler=OneStep(timestep=600), output="latent", progress=False)
    assert not torch.allclose(found, other)


@pytest.mark.parametrize("name", ["sa-solver", "lcm"])
def test_noise_within_comes_from_the_seed_and_from_each_pictures_own(pipe, name):
    given = {"sampler": name, "steps": 3, "guidance": 1, "output": "latent", "progress": False}
    first = pipe("star", seed=[5, 6], images_per_prompt=2, **given)
    torch.manual_seed(99)
    assert torch.equal(first, pipe("star", seed=[5, 6], images_per_prompt=2, **given))
    alone = pipe("star", seed=[6], **given)
    assert float((first[1:] - alone).norm() / alone.norm()) < 1e-4
    assert not torch.allclose(first[:1], alone)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"sampler": "euler"}, "sampler is 'euler'; expected dpm\\+\\+, sa-solver, lcm, one-step"),
        ({"sampler": "one-step", "steps": 4}, "one-step was given 4 steps; expected 1 step"),
        ({"sampler": "lcm", "steps": 51}, "lcm was given 51 steps; expected 1 to 50 steps, usually 4"),
    ],
)
def test_what_a_sampler_cannot_do_is_said_before_anything_is_drawn(pipe, monkeypatch, given, message):
    monkeypatch.setattr(pipe, "encode", None)
    with pytest.raises(InputError, match=message):
        pipe("star", **given)


@pytest.mark.parametrize("settings", [{"predictor_order": 0}, {"corrector_order": 9}, {"eta": -1}, {"eta": float("nan")}, {"first": 100, "last": 200}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        SASolver(**settings)
    with pytest.raises(InputError, match="timestep"):
        OneStep(timestep=0)


def test_guidance_where_none_was_trained_is_said(pipe, caplog):
    pipe("star", steps=1, sampler="lcm", output="latent", progress=False)
    assert "without guidance; give guidance=1 (it is 4.5)" in caplog.text


def test_the_optimized_schedule_is_diffusers_solver_at_its_timesteps(parts, pipe):
    """And the default sampler takes it as the named one does."""
    theirs = diffusers.DPMSolverMultistepScheduler(**BETAS)
    timesteps = [round(each) for each in optimized_timesteps(6)]
    seen = []
    settings = {"steps": 6, "width": 256, "height": 256, "use_bins": False, "output": "latent", "progress": False, "seed": 3}
    found = pipe(PROMPT, schedule="optimized", callback=lambda step, timestep, latents: seen.append(timestep), **settings)
    assert seen == timesteps
    torch.testing.assert_close(pipe(PROMPT, schedule="optimized", sampler="dpm++", **settings), found)
    theirs.set_timesteps(timesteps=timesteps)
    usual = pipe(PROMPT, **settings)
    assert not torch.allclose(usual, found)
    chosen = Pipeline(pipe.transformer, pipe.text_encoder, pipe.vae, base_size=pipe.base_size, scheduler=Fixed(theirs, timesteps))
    torch.testing.assert_close(chosen(PROMPT, **settings), found)


class Fixed:
    """diffusers' scheduler, which is told its timesteps by whoever made it."""

    def __init__(self, scheduler, timesteps):
        self.scheduler, self.chosen = scheduler, timesteps

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def set_timesteps(self, steps, device=None):
        self.scheduler.set_timesteps(timesteps=self.chosen, device=device)


@pytest.mark.parametrize("given, message", [
    ({"schedule": "optimized", "steps": 20}, "4 to 16"),
    ({"schedule": "optimized", "sampler": "lcm", "steps": 4, "guidance": 1}, "not lcm"),
    ({"schedule": "karras"}, "usual or optimized"),
])
def test_schedules_that_do_not_fit_are_refused(pipe, given, message):
    with pytest.raises(InputError, match=message):
        pipe(PROMPT, width=256, height=256, use_bins=False, **given)


def test_a_scheduler_that_takes_no_timesteps_is_named(pipe):
    chosen = Pipeline(pipe.transformer, pipe.text_encoder, pipe.vae, scheduler=diffusers.PNDMScheduler(**BETAS))
    with pytest.raises(InputError, match="PNDMScheduler takes no timesteps"):
        chosen(PROMPT, schedule="optimized", steps=8, width=256, height=256, use_bins=False)


def test_a_name_has_the_settings_that_the_weights_ask_for():
    assert find_sampler("one-step", dmd_note(600)) == OneStep(600)
    assert find_sampler("one-step") == find_sampler("one-step", CONSISTENCY_NOTE) == OneStep(400)
    assert find_sampler(OneStep(300), dmd_note(600)) == OneStep(300) and find_sampler("dpm++", dmd_note(600)) == DPMSolver()


def test_names_find_samplers():
    assert SAMPLER_NAMES == (*SAMPLERS,)
    assert [find_sampler(name).name for name in SAMPLERS] == [*SAMPLERS]
