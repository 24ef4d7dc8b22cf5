"""One step of each method and objective: the loss and every gradient are those of diffusers' transformer and the formulas."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from pixart.checkpoints import load_transformer
from pixart.errors import ConfigError
from tests.support import kv_reference, tiny_control
from tests.support import training_reference as reference
from tests.support.one_step import (
    TIMESTEPS,
    NoSource,
    Start,
    assert_losses,
    diffusers_gradients,
    expected_step,
    predicted,
    randomize,
    start,
    step,
)


@pytest.mark.parametrize("micro", [False, True])
def test_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: bool) -> None:
    begun = start(tmp_path, monkeypatch, micro)
    network, losses = step(begun, begun.recipe(tmp_path))
    assert_losses(losses, expected_step(begun, predicted(begun, begun.model)))
    reference.assert_gradients(reference.gradients(network.named_parameters()), diffusers_gradients(begun.model))


def test_weights_of_timesteps_and_of_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = start(tmp_path, monkeypatch)
    objective = {"name": "denoise", "min_snr": 5, "max_loss_weight": 20, "variance_weight": 0.3}
    _, losses = step(begun, begun.recipe(tmp_path, objective=objective))
    errors, bounds = expected_step(begun, predicted(begun, begun.model))
    ratio = (reference.SIGNAL / (1 - reference.SIGNAL))[TIMESTEPS]
    weight = (1 / reference.SIGNAL[TIMESTEPS]).clamp(max=20) * torch.minimum(ratio, torch.tensor(5.0)) / ratio
    assert_losses(losses, (errors * weight, bounds * 0.3))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("micro", [False, True])
def test_controlnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int, micro: bool) -> None:
    begun = start(tmp_path, monkeypatch, micro)
    hint = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    begun.batch = replace(begun.batch, hint=hint)
    control = tiny_control.reference_control(hidden=72, depth=depth)

    def prepare(network: nn.Module) -> None:
        for index in range(depth):  # a ControlNet begins as a copy
            assert torch.equal(network.controlnet.controlnet[index].copied_block.attn.qkv.weight, network.base.blocks[index].attn.qkv.weight)
        network.controlnet.load_state_dict(tiny_control.original_keys(control))

    network, losses = step(begun, begun.recipe(tmp_path, method={"name": "controlnet", "blocks": depth}), prepare)
    control.requires_grad_(True)
    monkeypatch.setattr(begun.model, "forward", lambda latent, encoder_hidden_states, timestep, encoder_attention_mask, added_cond_kwargs, return_dict: (
        tiny_control.reference_forward.__wrapped__(begun.model, [(control, hint, 1.0)], latent, timestep, encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)[0],
    ))  # fmt: skip
    assert_losses(losses, expected_step(begun, predicted(begun, begun.model)))
    for block in control.controlnet_blocks:
        for value in block.parameters():
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
    with torch.no_grad():
        for value in control.parameters():
            value.copy_(value.grad)
    expected = {f"controlnet.{name}": value for name, value in tiny_control.original_keys(control).items()}
    reference.assert_gradients(reference.gradients(network.named_parameters()), expected)
    assert all(value.grad is None for value in network.base.parameters())


def compressed_reference(begun: Start, network: nn.Module, blocks: dict[int, int]) -> dict[int, dict[str, Tensor]]:
    """Gives diffusers' model the compression of ours; returns its own weights, which require gradients."""
    weights = {}
    for block, ratio in blocks.items():
        attention = network.blocks[block].attn
        own = {name: getattr(getattr(attention, name.split(".")[0]), name.split(".")[1]).detach().clone().requires_grad_()
               for name in ("sr.weight", "sr.bias", "norm.weight", "norm.bias")}  # fmt: skip
        weights[block] = own
        layer = begun.model.transformer_blocks[block].attn1
        with torch.no_grad():  # the beginning scales the queries
            layer.to_q.weight.copy_(attention.qkv.weight[:72])
            layer.to_q.bias.copy_(attention.qkv.bias[:72])

        def merge(k: Tensor, v: Tensor, ratio: int = ratio, own: dict[str, Tensor] = own):
            return *(kv_reference.shrink(x, (4, 4), ratio, "conv", own) for x in (k, v)), 0.0

        layer.set_processor(kv_reference.LoopAttention(merge))
    return weights


@pytest.mark.parametrize("objective", ["denoise", "imitate"])
def test_kv_compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    begun = start(tmp_path, monkeypatch)
    plain = predicted(begun, begun.model).detach()  # of the uncompressed model
    chosen = {"name": "imitate", "imitate_weight": 2.0, "denoise_weight": 0.5} if objective == "imitate" else "denoise"
    network, losses = step(begun, begun.recipe(tmp_path, method={"name": "kv", "blocks": [[0, 2], [2, 4]]}, objective=chosen))
    weights = compressed_reference(begun, network, {0: 2, 2: 4})
    prediction = predicted(begun, begun.model)
    errors, bounds = reference.losses(prediction, begun.batch.latent, begun.noise, TIMESTEPS)
    if objective == "imitate":
        apart = (prediction - plain).double().square().mean((1, 2, 3))
        torch.testing.assert_close(losses["imitate_loss"].double(), 2 * apart, rtol=1e-5, atol=1e-5)
        assert float(apart.detach().max()) > 1e-3
        errors, bounds = errors / 2, bounds / 2
        (2 * apart + errors + bounds).mean().backward()
    else:
        (errors + bounds).mean().backward()
    assert_losses(losses, (errors, bounds))
    expected = diffusers_gradients(begun.model)
    for block, own in weights.items():
        expected |= {f"blocks.{block}.attn.{name}": value.grad for name, value in own.items()}
    reference.assert_gradients(reference.gradients(network.named_parameters()), expected)


@pytest.mark.parametrize("method", ["full", {"name": "lora", "rank": 2}])
def test_only_the_prior_is_imitated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    """Its rows have the difference from the first weights, weighted by the timestep; the others the usual losses."""
    begun = start(tmp_path, monkeypatch)
    begun.batch = replace(begun.batch, prior=torch.tensor([True, False, True, False]))
    chosen = {"name": "imitate", "imitate_weight": 3.0, "prior_only": True, "max_loss_weight": 20}
    recipe = begun.recipe(tmp_path, method=method, objective=chosen)
    objective, source = recipe.objective.make(), NoSource(begun.batch)
    network = recipe.method.make(recipe).build(source, torch.device("cpu"))
    objective.wrap(network, source)
    if method == "full":  # its own numbers, a little changed
        for number, value in enumerate(network.parameters()):
            value.data += 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
    else:
        randomize(network)
    conditions = {"context": begun.batch.context, "context_mask": begun.batch.mask}
    losses = objective.losses(recipe.objective.settings, network, conditions, begun.batch, begun.draws)
    sum(losses.values()).mean().backward()
    found = reference.gradients(network.named_parameters())
    network.zero_grad()
    prediction, first = predicted_by(network, begun), predicted_by(load_transformer(begun.path), begun).detach()
    weight = (1 / reference.SIGNAL[TIMESTEPS]).clamp(max=20)
    (noise, variance), (first_noise, first_variance) = prediction.chunk(2, dim=1), first.chunk(2, dim=1)
    apart = ((noise - first_noise).square().mean((1, 2, 3)) * weight + (variance - first_variance).square().mean((1, 2, 3))) / 2
    errors, bounds = reference.losses(prediction, begun.batch.latent, begun.noise, TIMESTEPS)
    prior = begun.batch.prior
    expected = {"imitate_loss": 3 * apart * prior, "noise_loss": errors * weight * ~prior, "variance_loss": bounds * ~prior}
    assert set(losses) == set(expected) and float(apart[prior].detach().min()) > 1e-4
    for name, wanted in expected.items():
        torch.testing.assert_close(losses[name].double(), wanted.double(), rtol=1e-5, atol=1e-5)
    sum(expected.values()).mean().backward()
    reference.assert_gradients(found, reference.gradients(network.named_parameters()))


def predicted_by(network: nn.Module, begun: Start) -> Tensor:
    """Of the step's noisy latents."""
    noisy = reference.noisy(begun.batch.latent, begun.noise, TIMESTEPS).float()
    return network(noisy, TIMESTEPS, context=begun.batch.context, context_mask=begun.batch.mask).float()


def test_a_prior_that_no_source_has_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = start(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="prior_only is true, but no picture shows what to keep, or all that do were left out. Set source.prior_data"):
        step(begun, begun.recipe(tmp_path, objective={"name": "imitate", "prior_only": True}))
    with pytest.raises(ConfigError, match="denoise_weight is 0.5; with prior_only the other pictures teach at weight 1"):
        begun.recipe(tmp_path, objective={"name": "imitate", "prior_only": True, "denoise_weight": 0.5})


@pytest.mark.parametrize("method", ["full", {"name": "lora", "rank": 2}])
def test_a_network_imitates_itself_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    begun = start(tmp_path, monkeypatch)
    _, losses = step(begun, begun.recipe(tmp_path, method=method, objective="imitate"))
    assert list(losses) == ["imitate_loss"] and float(losses["imitate_loss"].detach().abs().max()) == 0
    changed = begun.recipe(tmp_path, method=method, objective="imitate")
    objective = changed.objective.make()
    network = changed.method.make(changed).build(NoSource(begun.batch), torch.device("cpu"))
    objective.wrap(network, NoSource(begun.batch))
    randomize(network)
    conditions = {"context": begun.batch.context, "context_mask": begun.batch.mask}
    moved = objective.losses(changed.objective.settings, network, conditions, begun.batch, begun.draws)["imitate_loss"]
    with torch.no_grad():
        noisy = reference.noisy(begun.batch.latent, begun.noise, TIMESTEPS).float()
        apart = network(noisy, TIMESTEPS, **conditions) - load_transformer(begun.path)(noisy, TIMESTEPS, **conditions)
    torch.testing.assert_close(moved, apart.square().mean((1, 2, 3)))
    assert float(moved.detach().min()) > 1e-4
