"""The forward process and the loss against diffusers' scheduler and torch's distributions."""
import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from pixart.training.diffusion import (
    NoiseSchedule,
    binned_likelihood,
    gaussian_divergence,
    logit_normal_timesteps,
    noise_loss,
    uniform_timesteps,
    variance_loss,
)

SCHEDULE = NoiseSchedule()
REFERENCE = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type="fixed_small", clip_sample=False)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latent, noise = torch.randn(2, 4, 4, 4, 6, generator=generator).unbind(0)
    return latent, noise, torch.tensor([0, 3, 400, 999])


def test_added_noise_equals_diffusers():
    latent, noise, timestep = batch()
    torch.testing.assert_close(SCHEDULE.add_noise(latent, noise, timestep), REFERENCE.add_noise(latent, noise, timestep))


@pytest.mark.parametrize("timestep", [1, 10, 500, 999])
def test_posterior_equals_diffusers_step(timestep):
    latent, noise, _ = batch()
    predicted = noise + 0.3 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(4))
    noisy = SCHEDULE.add_noise(latent, noise, torch.full((4,), timestep))
    REFERENCE.set_timesteps(1000)

    def mean(eps):  # without what the scheduler draws: the same both times
        return REFERENCE.step(eps, timestep, noisy, generator=torch.Generator().manual_seed(5)).prev_sample

    moved = SCHEDULE.mean_from_noise[timestep] * (predicted - noise)
    torch.testing.assert_close(mean(noise) - mean(predicted), moved, atol=1e-4 * float(moved.abs().max()) + 1e-6 * float(noisy.abs().max()), rtol=1e-3)
    assert SCHEDULE.log_posterior[timestep].exp().item() == pytest.approx(REFERENCE._get_variance(timestep).item(), rel=1e-3)


def test_divergence_equals_torch():
    generator = torch.Generator().manual_seed(1)
    mean1, mean2, log1, log2 = torch.randn(4, 50, generator=generator).unbind(0)
    expected = kl_divergence(Normal(mean1, (0.5 * log1).exp()), Normal(mean2, (0.5 * log2).exp()))
    torch.testing.assert_close(gaussian_divergence(mean1, log1, mean2, log2), expected, atol=1e-5, rtol=1e-4)


def test_perfect_prediction_has_no_loss_but_the_first_steps_likelihood():
    latent, noise, timestep = batch()
    lowest_variance = torch.full_like(noise, -1.0)  # the posterior's own
    loss = variance_loss(SCHEDULE, noise, lowest_variance, latent, noise, timestep)
    torch.testing.assert_close(loss[1:], torch.zeros(3), atol=1e-5, rtol=0)
    half_bin = Normal(0.0, 1.0).cdf((1 / 255) * (-0.5 * SCHEDULE.log_posterior[0]).exp())
    inside, outside = -(2 * half_bin - 1).log2(), -half_bin.log2()  # of a bin with two ends, and of the outermost ones
    expected = torch.where(latent[0].abs() > 0.999, outside, inside).mean()
    torch.testing.assert_close(loss[0], expected, atol=1e-3, rtol=1e-3)
    assert not noise_loss(SCHEDULE, noise, noise, timestep).any()


@pytest.mark.parametrize("value", [-3.0, -0.9991, -0.5, 0.0, 0.7, 0.9989, 2.5])
@pytest.mark.parametrize("mean", [-1.2, 0.0, 0.31])
@pytest.mark.parametrize("deviation", [0.004, 0.05, 1.0])
def test_the_first_steps_likelihood_is_the_references(value, mean, deviation):
    """Improved diffusion's discretized_gaussian_log_likelihood for one number, in double precision."""

    def share(x):
        return 0.5 * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    above, below = share((value - mean + 1 / 255) / deviation), share((value - mean - 1 / 255) / deviation)
    expected = above if value < -0.999 else 1 - below if value > 0.999 else above - below
    numbers = (torch.tensor([each], dtype=torch.float64) for each in (value, value - mean, math.log(deviation)))
    assert binned_likelihood(*numbers).item() == pytest.approx(math.log(max(expected, 1e-12)), rel=1e-6)


def test_variance_loss_does_not_move_the_noise():
    latent, noise, timestep = batch()
    prediction = torch.randn(4, 8, 4, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    predicted, fraction = prediction.chunk(2, dim=1)
    variance_loss(SCHEDULE, predicted.detach(), fraction, latent, noise, timestep).sum().backward()
    assert prediction.grad[:, :4].abs().max() == 0
    assert prediction.grad[:, 4:].abs().max() > 0


def test_plain_loss_is_the_mean_square_and_the_weight_is_velocitys():
    latent, noise, _ = batch()
    timestep = torch.full((4,), 300)
    predicted = noise + 0.1 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(3))
    plain = noise_loss(SCHEDULE, predicted, noise, timestep, max_weight=1.0).mean()
    torch.testing.assert_close(plain, (predicted - noise).square().mean())
    weighted = noise_loss(SCHEDULE, predicted, noise, timestep, max_weight=1e9).mean()
    noisy, signal = SCHEDULE.add_noise(latent, noise, timestep), SCHEDULE.alphas_cumprod[300]

    def velocity(eps):  # v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0, x0 implied by eps
        return signal.sqrt() * eps - (1 - signal).sqrt() * (noisy - (1 - signal).sqrt() * eps) / signal.sqrt()

    torch.testing.assert_close(weighted, (velocity(predicted) - velocity(noise)).square().mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("timestep", [1, 200, 600, 990])
def test_min_snr_is_the_papers_weight(timestep):
    """Equation 5 of arXiv:2303.09556 for noise: diffusers' scripts compute it as min(snr, gamma) / snr."""
    _, noise, _ = batch()
    t = torch.full((4,), timestep)
    ratio = float(REFERENCE.alphas_cumprod[timestep] / (1 - REFERENCE.alphas_cumprod[timestep]))
    plain = noise_loss(SCHEDULE, torch.zeros_like(noise), noise, t)
    torch.testing.assert_close(noise_loss(SCHEDULE, torch.zeros_like(noise), noise, t, min_snr=5.0), plain * min(ratio, 5.0) / ratio)


def test_timesteps_are_where_they_were_asked():
    drawn = logit_normal_timesteps(torch.randn(20000, generator=torch.Generator().manual_seed(0)), mean=0.5, std=0.5)
    assert drawn.min() >= 0 and drawn.max() <= 999
    assert abs(drawn.float().median().item() - 1000 * torch.sigmoid(torch.tensor(0.5)).item()) < 10
    assert uniform_timesteps(torch.tensor([0.0, 0.5, 0.9999])).tolist() == [0, 500, 999]
