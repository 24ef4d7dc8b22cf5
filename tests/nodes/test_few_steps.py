"""Few-step models through the host's samplers, beside diffusers' schedulers on the same model and noise."""
from __future__ import annotations

import importlib
import logging

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler, nodes_model_advanced

import nodes as host_nodes
from launch import graph as workflow
from tests.support import host
from tests.support.demo import ROOT
from tests.support.graphs import node_of
from tests.support.host_models import captions, difference, forward, noise

errors = host.pack_module("pixart.errors")
few_steps = host.pack_module("nodes.few_steps")
k_diffusion = importlib.import_module("comfy.k_diffusion.sampling")
SHAPE = (1, 4, 8, 8)


def result(node_output):
    """First value of a node of either API generation."""
    return node_output.result if hasattr(node_output, "result") else node_output


def custom(model, sampler, sigmas, cfg=1.0, latent=None, positive=None, negative=None, seed=1):
    """The host's SamplerCustom."""
    given = {"samples": torch.zeros(SHAPE) if latent is None else latent}
    node = nodes_custom_sampler.SamplerCustom
    arguments = {"model": model, "add_noise": True, "noise_seed": seed, "cfg": cfg, "positive": positive or captions(5),
                     "negative": negative or captions(2, seed=1), "sampler": sampler, "sigmas": sigmas, "latent_image": given}  # fmt: skip
    run = getattr(node, "execute", None) or node().sample
    return result(run(**arguments))[0]["samples"]


def first_noise(seed=1):
    """What the host draws for that seed."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def predicted_noise(model, latent, timestep, positive=None):
    """The network's prediction for an input of unit variance."""
    return forward(model, latent, torch.tensor([float(timestep)]), (positive or captions(5))[0][0])


@pytest.fixture
def fixed_noise(monkeypatch):
    """The same noise for every step of the host's samplers and of diffusers' schedulers."""
    drawn = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + i)) for i in range(60)]

    def host_sampler(x, *_, **__):
        waiting = (each.to(x.device) for each in drawn)
        return lambda sigma, sigma_next: next(waiting)

    monkeypatch.setattr(k_diffusion, "default_noise_sampler", host_sampler)

    def schedulers(module):
        waiting = iter(drawn)
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(waiting))

    return schedulers


def forwards(model, monkeypatch):
    """Collects batch size and timestep of each forward."""
    seen = []
    network = model.model.diffusion_model
    original = network._denoise

    def count(x, timesteps, *rest):
        seen.append((x.shape[0], int(timesteps[0])))
        return original(x, timesteps, *rest)

    monkeypatch.setattr(network, "_denoise", count)
    return seen


def lcm_model(model):
    return nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)[0]


def diffusers_lcm(model, fixed_noise, steps):
    """diffusers' LCMScheduler on the same network and noise; its timesteps and the latent in VAE scale."""
    import diffusers.schedulers.scheduling_lcm as scheduling

    fixed_noise(scheduling)
    scheduler = scheduling.LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps, original_inference_steps=50)
    latent = first_noise()
    for timestep in scheduler.timesteps:
        latent = scheduler.step(predicted_noise(model, latent, timestep), timestep, latent, return_dict=False)[0]
    return [int(t) for t in scheduler.timesteps], latent / 0.13025


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm_equals_diffusers_with_one_forward_per_step(sigma, fixed_noise, monkeypatch, steps) -> None:
    """KSampler with sampler lcm, scheduler simple and cfg 1 on ModelSamplingDiscrete lcm."""
    timesteps, expected = diffusers_lcm(sigma, fixed_noise, steps)
    seen = forwards(sigma, monkeypatch)
    found = host_nodes.common_ksampler(
        lcm_model(sigma), 1, steps, 1.0, "lcm", "simple", captions(5), captions(2, seed=1), {"samples": torch.zeros(SHAPE)}
    )[0]["samples"]
    assert seen == [(1, timestep) for timestep in timesteps]
    assert difference(found, expected) < 1e-3


def test_lcm_by_a_list_of_timesteps(sigma, fixed_noise) -> None:
    """Flash samples as LCM does."""
    timesteps, expected = diffusers_lcm(sigma, fixed_noise, 4)
    model = lcm_model(sigma)
    sigmas = few_steps.PixArtTimesteps.execute(model, ", ".join(map(str, timesteps))).result[0]
    assert timesteps == [999, 759, 499, 259] and len(sigmas) == 5
    assert difference(custom(model, comfy.samplers.ksampler("lcm"), sigmas), expected) < 1e-3


def test_timesteps_are_the_models(sigma, monkeypatch) -> None:
    sigmas = few_steps.PixArtTimesteps.execute(sigma, "999 400 20").result[0]
    table = sigma.get_model_object("model_sampling").sigmas
    torch.testing.assert_close(sigmas, torch.stack([table[999], table[400], table[20], torch.tensor(0.0)]))
    seen = forwards(sigma, monkeypatch)
    custom(sigma, comfy.samplers.ksampler("euler"), sigmas)
    assert [timestep for _, timestep in seen] == [999, 400, 20]


def test_the_optimized_schedule_goes_through_its_timesteps(sigma, monkeypatch) -> None:
    """Between whole timesteps too; the list isn't used."""
    sigmas = few_steps.PixArtTimesteps.execute(sigma, "not read", "optimized", 8).result[0]
    wanted = host.pack_module("pixart.schedules").optimized_timesteps(8)
    assert len(sigmas) == 9 and sigmas[-1] == 0
    seen = forwards(sigma, monkeypatch)
    custom(sigma, comfy.samplers.ksampler("dpmpp_2m"), sigmas)
    assert [timestep for _, timestep in seen] == pytest.approx(wanted, abs=0.5)


@pytest.mark.parametrize("schedule, steps, text", [("optimized", 3, "4 to 16"), ("optimized", 17, "4 to 16"), ("gits", 8, "list, optimized")])
def test_bad_schedules_are_refused(sigma, schedule, steps, text) -> None:
    with pytest.raises(errors.InputError, match=text):
        few_steps.PixArtTimesteps.execute(sigma, "999", schedule, steps)


def test_one_step_equals_diffusers(sigma, monkeypatch) -> None:
    """The DMD branch of diffusers' pipeline: DDPM's x0 from unit noise at timestep 400."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(timesteps=[400])
    unit = first_noise()
    expected = scheduler.step(predicted_noise(sigma, unit, 400), 400, unit).pred_original_sample / 0.13025
    seen = forwards(sigma, monkeypatch)
    sampler, sigmas = few_steps.PixArtOneStep.execute(sigma, 400).result
    assert float(sigmas[0]) == pytest.approx(2.041, abs=1e-3) and float(sigmas[1]) == 0
    assert difference(custom(sigma, sampler, sigmas), expected) < 1e-4
    assert seen == [(1, 400)]
    plain = custom(sigma, comfy.samplers.ksampler("euler"), sigmas)
    assert difference(plain, expected) > 1e-2  # the host alone would begin with noise that is too weak


def test_one_step_at_the_end_of_the_schedule(sigma) -> None:
    """There the host's own scaling is the same."""
    sampler, sigmas = few_steps.PixArtOneStep.execute(sigma, 999).result
    assert difference(custom(sigma, sampler, sigmas), custom(sigma, comfy.samplers.ksampler("euler"), sigmas)) < 1e-4


def test_one_step_from_a_picture(sigma) -> None:
    """A latent that isn't empty is noised to the timestep, as for any other sampler."""
    sampler, sigmas = few_steps.PixArtOneStep.execute(sigma, 400).result
    start = noise(seed=3)
    euler = custom(sigma, comfy.samplers.ksampler("euler"), sigmas, latent=start)
    assert difference(custom(sigma, sampler, sigmas, latent=start), euler) < 1e-4


def test_many_step_models_and_guidance_warn(sigma, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        sampler, sigmas = few_steps.PixArtOneStep.execute(sigma, 400).result
    assert any("many steps" in message and "DMD" in message for message in caplog.messages)
    caplog.clear()
    patched = sigma.clone()
    patched.add_patches({"diffusion_model.blocks.0.mlp.fc2.bias": (torch.zeros(144),)}, 1.0)
    with caplog.at_level(logging.WARNING):
        few_steps.PixArtOneStep.execute(patched, 400)  # a LoRA may have made it one
        custom(sigma, sampler, sigmas)
    assert not any("many steps" in message or "cfg" in message for message in caplog.messages)
    with caplog.at_level(logging.WARNING):
        custom(sigma, sampler, sigmas, cfg=4.5)
    assert any("set cfg to 1 (it is 4.5)" in message for message in caplog.messages)


def test_bad_timesteps_are_refused(sigma) -> None:
    with pytest.raises(errors.InputError, match="400 after 200"):
        few_steps.PixArtTimesteps.execute(sigma, "200, 400")


def sa_sampler(model):
    """The host's SamplerSASolver as the workflow sets it: the paper's orders, and its interval of noise."""
    settings = node_of(workflow.load(ROOT / "workflows/api/sa-solver.json"), "SamplerSASolver")
    node = nodes_custom_sampler.SamplerSASolver
    run = getattr(node, "execute", None) or node().get_sampler
    return result(run(**{**settings, "model": model}))[0]


def sa_steps(model):
    """The workflow's 25 steps: sigmas, and for each the paper's tau of the step that arrives there (t from 1 to 0.001)."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "sgm_uniform", 25)
    return sigmas, [float(0.2 <= 1 - i * 0.999 / 25 <= 0.8) for i in range(26)]


def diffusers_sa_solver(model, sigmas, taus):
    """The latent before each step of diffusers' SASolverScheduler. It asks for tau where a step departs: given is that of its arrival.

    To the last latent the host predicts with order 1, and diffusers, as the reference, with order 2: set to 1 here.
    """
    import diffusers.schedulers.scheduling_sasolver as scheduling

    timesteps = [int(model.get_model_object("model_sampling").timestep(sigma)) for sigma in sigmas[:-1]]
    scheduler = scheduling.SASolverScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", predictor_order=2, corrector_order=2,
        tau_func=lambda t: taus[timesteps.index(int(t)) + 1],
    )  # fmt: skip
    scheduler.set_timesteps(len(timesteps))
    scheduler.sigmas[:-1], scheduler.timesteps = sigmas[:-1], torch.tensor(timesteps)
    latent, latents = first_noise(), []
    for number, timestep in enumerate(scheduler.timesteps, start=2):
        if number == len(timesteps):
            scheduler.register_to_config(predictor_order=1)
        latents.append(latent)
        latent = scheduler.step(predicted_noise(model, latent, timestep), timestep, latent, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("tau", [0.0, 1.0, None])
def test_sa_solver_equals_diffusers(sigma, fixed_noise, monkeypatch, tau) -> None:
    """The network sees the same latent at all of the workflow's steps: with tau 0 or 1 everywhere, and where the paper switches it."""
    import diffusers.schedulers.scheduling_sasolver as scheduling

    fixed_noise(scheduling)
    sigmas, taus = sa_steps(sigma)
    expected = diffusers_sa_solver(sigma, sigmas, taus if tau is None else [tau] * len(taus))
    seen, original = [], sigma.model.diffusion_model._denoise

    def look(x, *rest):
        seen.append(x.clone())
        return original(x, *rest)

    monkeypatch.setattr(sigma.model.diffusion_model, "_denoise", look)
    # The host draws noise only where tau isn't 0: the n-th step's, whatever was drawn before.
    monkeypatch.setattr(k_diffusion, "default_noise_sampler", lambda x, *_, **__: lambda *_: first_noise(99 + len(seen)).to(x.device))
    solver = sa_sampler(sigma)
    if tau is not None:
        solver.extra_options["tau_func"] = lambda s: tau
    custom(sigma, solver, sigmas)
    assert len(seen) == len(expected) == 25
    assert max(difference(ours, theirs) for ours, theirs in zip(seen, expected)) < 2e-3


def test_sa_solver_is_noisy_where_the_paper_says(sigma) -> None:
    """tau is 1 for the steps that arrive at 0.2 <= t <= 0.8, of 25 that fall evenly from 1 to 0.001."""
    sigmas, taus = sa_steps(sigma)
    tau = sa_sampler(sigma).extra_options["tau_func"]
    assert len(sigmas) == 26 and [tau(s) for s in sigmas[:-1]] == taus[:-1] and 0 < sum(taus) < 25
    sampling = sigma.get_model_object("model_sampling")
    for i, s in enumerate(sigmas[:-1]):
        assert int(sampling.timestep(s)) == pytest.approx(1000 * (1 - i * 0.999 / 25) - 1, abs=0.51)
