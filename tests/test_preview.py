"""Previews of latents: near the decoder's own picture, and foreseen from the first steps on."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from pixart import Pipeline
from pixart.preview import fit_preview
from pixart.sampling import make_scheduler
from tests.support.demo import DEMO

pytestmark = pytest.mark.skipif(not DEMO["vae"].is_file(), reason="the demo model is not in this checkout")


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_files(DEMO["diffusion_models"], DEMO["text_encoders"], DEMO["vae"])


def likeness(found, expected):
    """Correlation of two pictures, 1 for equal ones."""
    return float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1])


def test_previews_look_like_the_picture_and_ever_more_so(pipe):
    show, seen = fit_preview(pipe.vae), []
    picture = pipe("a red circle above a blue square", steps=8, seed=1, output="pt", progress=False, preview=lambda i, x: seen.append((i, show(x))))
    assert [index for index, _ in seen] == list(range(8))
    assert seen[-1][1].shape == (1, 3, 32, 32)
    expected = F.adaptive_avg_pool2d(picture, 32)
    found = [likeness(small, expected) for _, small in seen]
    assert found[-1] > 0.95 and found[3] > 0.8 and found[-1] > found[0]
    other = pipe("a green star at the top left", steps=8, seed=2, output="pt", progress=False)
    assert likeness(seen[-1][1], F.adaptive_avg_pool2d(other, 32)) < 0.8


def test_the_last_preview_is_of_the_noise_that_the_model_saw(pipe):
    """x0 written out: (x - sqrt(1 - a) eps) / sqrt(a), with diffusers' own alphas."""
    seen, scheduler = {}, make_scheduler()
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    embeds = pipe.encode("a red circle")
    pipe(prompt_embeds=embeds, latents=noise, steps=2, guidance=1, output="latent", progress=False, preview=lambda i, x: seen.setdefault(i, x))
    scheduler.set_timesteps(2)
    timestep = int(scheduler.timesteps[0])
    dtype = pipe.dtype
    with torch.inference_mode():  # as pipelines draw; with gradients 16 bits round a little differently
        predicted = pipe.transformer(noise.to(dtype), torch.tensor([timestep]), embeds.states.to(dtype), None)[:, :4].float()
    kept = scheduler.alphas_cumprod[timestep]
    torch.testing.assert_close(seen[0], (noise - (1 - kept).sqrt() * predicted) / kept.sqrt(), rtol=1e-3, atol=1e-3 * float(kept) ** -0.5)
