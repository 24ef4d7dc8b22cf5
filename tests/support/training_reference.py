"""One training step computed without this project's training code: the loss written out in double precision, diffusers' transformer."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SIGNAL = torch.cumprod(1 - BETAS, 0)
BEFORE = torch.cat([torch.ones(1, dtype=torch.float64), SIGNAL[:-1]])
POSTERIOR = BETAS * (1 - BEFORE) / (1 - SIGNAL)  # variance of q(x_{t-1} | x_t, x_0)


def noisy(latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """x_t in double precision."""
    return torch.stack([SIGNAL[t] ** 0.5 * x.double() + (1 - SIGNAL[t]) ** 0.5 * e.double() for x, e, t in zip(latent, noise, timestep)])


def losses(prediction: Tensor, latent: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(mean squared error of the noise, variational bound in bits), (B,) each; equations of arXiv:2102.09672, one picture at a time."""
    errors, bounds = [], []
    for output, x, e, t in zip(prediction.double(), latent.double(), noise.double(), timestep.tolist()):
        predicted, fraction = output[:4], (output[4:] + 1) / 2
        errors.append((predicted - e).square().mean())
        x_t = SIGNAL[t] ** 0.5 * x + (1 - SIGNAL[t]) ** 0.5 * e
        low = POSTERIOR[max(t, 1)].log()
        log_variance = fraction * BETAS[t].log() + (1 - fraction) * low
        start = (x_t - (1 - SIGNAL[t]) ** 0.5 * predicted.detach()) / SIGNAL[t] ** 0.5
        a, b = BETAS[t] * BEFORE[t] ** 0.5 / (1 - SIGNAL[t]), (1 - BEFORE[t]) * (1 - BETAS[t]) ** 0.5 / (1 - SIGNAL[t])
        mean, true_mean = a * start + b * x_t, a * x + b * x_t
        if t == 0:
            nats = -_likelihood(x, mean, log_variance / 2)
        else:
            ratio = (low - log_variance).exp()
            nats = 0.5 * (log_variance - low - 1 + ratio + (true_mean - mean) ** 2 / log_variance.exp())
        bounds.append(nats.mean() / math.log(2))
    return torch.stack(errors), torch.stack(bounds)


def _likelihood(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    def share(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    above = share((x - mean + 1 / 255) / log_deviation.exp())
    below = share((x - mean - 1 / 255) / log_deviation.exp())
    floor = torch.tensor(1e-12, dtype=x.dtype)
    inner = torch.log(torch.maximum(above - below, floor))
    return torch.where(x < -0.999, torch.log(torch.maximum(above, floor)), torch.where(x > 0.999, torch.log(torch.maximum(1 - below, floor)), inner))


def predict(model: nn.Module, latent: Tensor, timestep: Tensor, context: Tensor, mask: Tensor, size: Tensor | None = None) -> Tensor:
    """diffusers' transformer, with gradients."""
    added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if size is not None:
        added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    return model(
        latent, encoder_hidden_states=context, timestep=timestep, encoder_attention_mask=mask.to(latent.dtype), added_cond_kwargs=added,
        return_dict=False,
    )[0]  # fmt: skip


def gradients(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Of the parameters that have one; zeros where backward didn't come."""
    return {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in named if value.requires_grad}


def assert_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Each within `tolerance` of the largest number of its kind; both have the same names."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:6]
    for name, value in expected.items():
        limit = tolerance * max(float(value.abs().max()), 1e-2)
        error = float((found[name].double() - value.double()).abs().max())
        assert error <= limit, f"{name}: {error:.2e} of {float(value.abs().max()):.2e}"
    assert any(bool(value.any()) for value in expected.values())
