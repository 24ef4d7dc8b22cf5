"""The forward process and the loss: noise prediction with a learned variance.

Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), equations 9 to 16, with
PixArt's linear betas, as the reference trains (diffusion/model/gaussian_diffusion.py).
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02
HALF_BIN, OUTERMOST = 1 / 255, 0.999  # of the 256 values of a picture in -1..1
LEAST_PROBABILITY = 1e-12


class NoiseSchedule:
    """Per-timestep constants of the forward process, fp32 tensors of 1000."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        betas = torch.linspace(BETA_START, BETA_END, STEPS, dtype=torch.float64)
        alphas_cumprod = (1 - betas).cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior = betas * (1 - previous) / (1 - alphas_cumprod)
        posterior[0] = posterior[1]  # zero at t = 0, where its logarithm is needed all the same
        self.alphas_cumprod = alphas_cumprod.float().to(device)
        self.log_beta = betas.log().float().to(device)
        self.log_posterior = posterior.log().float().to(device)
        # How far the mean of q(x_{t-1} | x_t, x_0), equation 11, moves with the noise that x_0 is computed from
        self.mean_from_noise = (betas * previous.sqrt() / (1 - alphas_cumprod).sqrt() / alphas_cumprod.sqrt()).float().to(device)

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """q(x_t | x_0), equation 9; timestep: (B,) integers."""
        signal = _spread(self.alphas_cumprod, timestep)
        return signal.sqrt() * latent + (1 - signal).sqrt() * noise

    def predicted_latent(self, noisy: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_0 from x_t and a noise prediction."""
        signal = _spread(self.alphas_cumprod, timestep)
        return (noisy - (1 - signal).sqrt() * noise) / signal.sqrt()


def _spread(table: Tensor, timestep: Tensor) -> Tensor:
    return table[timestep][:, None, None, None]


def uniform_timesteps(uniform: Tensor) -> Tensor:
    """(B,) integers in 0..999, each as likely; uniform: (B,) in [0, 1)."""
    return (uniform * STEPS).long().clamp(0, STEPS - 1)


def logit_normal_timesteps(normal: Tensor, mean: float, std: float) -> Tensor:
    """(B,) integers in 0..999: 1000 * sigmoid(mean + std * normal), as Stable Diffusion 3 draws them."""
    return (torch.sigmoid(mean + std * normal) * STEPS).long().clamp(0, STEPS - 1)


def noise_loss(
    schedule: NoiseSchedule, predicted: Tensor, noise: Tensor, timestep: Tensor, max_weight: float = 1.0, min_snr: float | None = None
) -> Tensor:
    """(B,): squared error of the noise, weighted by the timestep: 1 by default, as the reference does.

    max_weight: the weight is min(1/alpha_bar, this). 1/alpha_bar makes it the loss of velocity, which small runs need to
    learn composition. min_snr: the weight is min(SNR, this) / SNR ("Efficient Diffusion Training via Min-SNR Weighting
    Strategy", Hang and others, 2023, for noise prediction), times the former.
    """
    signal = schedule.alphas_cumprod[timestep]
    weight = (1 / signal).clamp(max=max_weight)
    if min_snr is not None:
        ratio = signal / (1 - signal)
        weight = weight * ratio.clamp(max=min_snr) / ratio
    return (predicted - noise).square().mean(dim=(1, 2, 3)) * weight


def variance_loss(
    schedule: NoiseSchedule, predicted_noise: Tensor, fraction: Tensor, latent: Tensor, noise: Tensor, timestep: Tensor
) -> Tensor:
    """The variational bound's term at each timestep, (B,), in bits per dimension; at t = 0 the likelihood of a picture's values."""
    low, high = _spread(schedule.log_posterior, timestep), _spread(schedule.log_beta, timestep)
    weight = (fraction + 1) / 2  # equation 15, with the network's output meant for -1..1
    log_variance = weight * high + (1 - weight) * low
    # The true mean less the predicted one. x_t is the same in both, so that only the noise differs; fp32 would lose it in their difference
    shift = _spread(schedule.mean_from_noise, timestep) * (predicted_noise - noise)
    divergence = gaussian_divergence(shift, low, torch.zeros_like(shift), log_variance)
    likelihood = binned_likelihood(latent, shift, 0.5 * log_variance)  # at t = 0 the true mean is the latent itself
    first = (timestep == 0)[:, None, None, None]
    return torch.where(first, -likelihood, divergence).mean(dim=(1, 2, 3)) / math.log(2)


def gaussian_divergence(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1) || N(mean2)) per element, in nats."""
    ratio = (log_variance1 - log_variance2).exp()
    shift = (mean1 - mean2).square() * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + shift)


def binned_likelihood(latent: Tensor, centred: Tensor, log_deviation: Tensor) -> Tensor:
    """Logarithm of a normal distribution's share in the bin of each value, as if latents were pictures of 8 bits in -1..1.

    centred: the latent less the distribution's mean. Latents aren't pictures, but the reference measures them so at t = 0
    (discretized_gaussian_log_likelihood), and so were all released models trained.
    """
    narrow, distance = (-log_deviation).exp(), centred.abs()  # both sides are alike, and fp32 is exact in the lower tail alone
    inside = _normal_share(narrow * (HALF_BIN - distance)) - _normal_share(narrow * (-HALF_BIN - distance))
    lowest, highest = _normal_share(narrow * (centred + HALF_BIN)), _normal_share(narrow * (HALF_BIN - centred))  # bins without end
    share = torch.where(latent < -OUTERMOST, lowest, torch.where(latent > OUTERMOST, highest, inside))
    return share.clamp(min=LEAST_PROBABILITY).log()


def _normal_share(value: Tensor) -> Tensor:
    """Of the standard normal distribution below a value, by the approximation of GELU: (1 + tanh) / 2 is a sigmoid."""
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))
