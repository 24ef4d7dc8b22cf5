"""Schedulers made for Stable Diffusion are named in the log, and runs that may begin late aren't."""
from __future__ import annotations

import logging

import comfy.samplers
import pytest
import torch

import nodes as host_nodes
from tests.support import host
from tests.support.host_models import captions, noise, sample

levels = host.pack_module("nodes.host.noise_levels")
few_steps = host.pack_module("nodes.few_steps")
HIGHEST = 157.4
SD_KARRAS = torch.tensor([14.61, 6.0, 2.0, 0.5, 0.03, 0.0])
EMPTY, PICTURE = torch.zeros(1, 4, 8, 8), noise()


@pytest.mark.parametrize(
    ("sigmas", "latent", "warned"),
    [(SD_KARRAS, EMPTY, True), (SD_KARRAS, None, True), (SD_KARRAS, PICTURE, False), (torch.tensor([157.4, 9.0, 0.0]), EMPTY, False),
     (torch.tensor([97.0, 9.0, 1.0, 0.0]), EMPTY, False), (torch.tensor([2.04, 0.0]), EMPTY, False), (torch.tensor([0.0]), EMPTY, False)],
)  # fmt: skip
def test_when_it_warns(sigmas, latent, warned: bool) -> None:
    text = levels.noise_warning(sigmas, latent, HIGHEST)
    assert bool(text) is warned
    if text:
        assert "14.61" in text and "Set sigma_max" in text and "157.4" in text


def custom(model, sigmas, latent=EMPTY, sampler="euler"):
    """Through SamplerCustom's function."""
    import comfy.sample

    chosen = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    return comfy.sample.sample_custom(model, noise(), 1.0, chosen, sigmas, captions(4), captions(1), latent, seed=1)


def test_once_for_a_run(sigma, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        custom(sigma, SD_KARRAS)
        assert sum("noise level 14.61" in message for message in caplog.messages) == 1
        caplog.clear()
        custom(sigma.clone(), SD_KARRAS, PICTURE)
        custom(sigma, torch.tensor([157.4, 30.0, 5.0, 0.0]))
        step, sigmas = few_steps.PixArtOneStep.execute(sigma, 400).result
        custom(sigma, sigmas, sampler=step)
    assert "noise level" not in caplog.text


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_no_scheduler_of_ksampler_is_blamed(sigma, scheduler: str) -> None:
    sampling = sigma.get_model_object("model_sampling")
    for steps in (8, 20, 50):
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
        assert levels.noise_warning(sigmas, EMPTY, float(sampling.sigma_max)) is None


def test_second_stages_and_img2img(sigma, caplog) -> None:
    first = sample(sigma, captions(4), captions(1), steps=4, last_step=2)
    with caplog.at_level(logging.WARNING):
        sample(sigma, captions(4), captions(1), first, steps=4, denoise=0.5)
        latent = {"samples": first}
        host_nodes.KSamplerAdvanced().sample(
            sigma, "disable", 1, 4, 1.0, "euler", "normal", captions(4), captions(1), latent, 2, 4, "disable"
        )
    assert "noise level" not in caplog.text
