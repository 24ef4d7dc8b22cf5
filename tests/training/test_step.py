"""What an update computes: accumulation, checkpointing, compiling and precision change rounding alone; optimizers are their libraries'."""
from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import autocast, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import Linear

from pixart.attention import torch_attention
from pixart.errors import ConfigError, UnsupportedError
from pixart.layers import BlockInputs, PixArtBlock
from pixart.training.adapters import Adaptation, add_adapters
from pixart.training.blocks import wrap_blocks
from pixart.training.linear import add_adapters_in_place, cast_weights_anew
from pixart.training.loop import MAX_SKIPPED, Loop
from pixart.training.optimizers import make_optimizers
from pixart.training.recipe import load_recipe
from pixart.training.run import train
from pixart.training.state import newest_state
from pixart.training.teacher import without_adapters
from tests.support.tiny_training import recipe_values

STAGE = {"base_size": 64, "steps": 3, "batch_size": 8, "learning_rate": 2e-3}


def trained(recipe: Path, *changes: str) -> Loop:
    """A run of three steps."""
    loop = Loop(load_recipe(recipe, changes))
    for _ in range(3):
        loop._train_step()
        loop.step += 1
    return loop


def assert_near(left: Loop, right: Loop, **tolerance: float) -> None:
    torch.testing.assert_close(dict(right.network.state_dict()), dict(left.network.state_dict()), **tolerance)


def test_accumulation_and_checkpointing_change_rounding_alone(recipe_path: Callable[..., Path]) -> None:
    recipe = recipe_path(stages=[STAGE], caption_dropout=0.3, clip_norm=0.01)
    whole = trained(recipe)
    for changes in (["stages.0.accumulation=8"], ["checkpoint_blocks=true"], ["stages.0.accumulation=2", "checkpoint_blocks=true"]):
        assert_near(whole, trained(recipe, *changes), atol=2e-6, rtol=1e-4)


def test_checkpointed_blocks_keep_their_inputs_alone(recipe_path: Callable[..., Path]) -> None:
    def kept(*changes: str) -> int:
        loop, sizes = Loop(load_recipe(recipe_path(stages=[STAGE]), changes)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda value: sizes.append(value.nbytes) or value, lambda value: value):
            loop.network(torch.zeros(8, 4, 8, 8), torch.zeros(8), torch.zeros(8, 2, 8))
        return sum(sizes)

    assert kept("checkpoint_blocks=true") < 0.3 * kept()


@pytest.mark.parametrize(("trained", "calls"), [("attn", 1), ("mlp.fc1", 1), ("mlp.fc2", 2), ("scale_shift_table", 2), ("modulation", 2)])
def test_a_last_layer_that_is_not_trained_is_computed_once(trained: str, calls: int) -> None:
    """Gradients stay as they are without checkpointing, to the last bit."""
    torch.manual_seed(0)
    plain = PixArtBlock(32, 2, 64, torch_attention, nn)
    for name, value in plain.named_parameters():
        value.data.normal_(std=0.2)
        value.requires_grad_(name.startswith(trained))
    ours = copy.deepcopy(plain)
    wrap_blocks([ours], compiled=False, checkpointed=True)
    seen, found = [], []
    ours.mlp.fc2.register_forward_hook(lambda *_: seen.append(1))
    hidden, context, modulation = torch.randn(2, 16, 32), torch.randn(2, 5, 32), torch.randn(2, 6, 32)
    for block in (plain, ours):
        given = [hidden.clone().requires_grad_(), context, modulation.clone().requires_grad_(trained == "modulation")]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda value, kept=kept: kept.append(value) or value, lambda value: value):
            out = block(BlockInputs(given[0], given[1], None, given[2], (4, 4)))
        wide = [value for value in kept if value.shape[-2:] == (16, 64)]  # what the last layer sees
        assert bool(wide) == (block is plain)
        out.square().sum().backward()
        found.append([out.detach(), *(value.grad for value in (given[0], given[2], *block.parameters()))])
    for expected, value in zip(*found, strict=True):
        assert (expected is None) == (value is None) and (value is None or torch.equal(value, expected))
    assert len(seen) == calls


def test_a_last_layer_in_another_dtype_leaves_no_copy_behind() -> None:
    block = PixArtBlock(32, 2, 64, torch_attention, nn).requires_grad_(False)
    block.attn.qkv.requires_grad_(True)
    wrap_blocks([block], compiled=False, checkpointed=True)
    kept, own = [], {value.data_ptr() for value in block.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value), autocast("cpu", torch.bfloat16):
        block(BlockInputs(torch.randn(1, 16, 32), torch.randn(1, 5, 32).bfloat16(), None, torch.randn(1, 6, 32), (4, 4)))
    shapes = [sorted(value.shape) for value in kept if value.data_ptr() not in own]
    assert shapes and sorted(block.mlp.fc2.weight.shape) not in shapes  # a layer keeps its weight turned


def test_weights_cast_anew_give_autocasts_gradients_and_keep_no_copy() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(Linear(256, 512), torch.nn.GELU(), Linear(512, 256, bias=False))
    ours = copy.deepcopy(plain)
    cast_weights_anew(ours)
    x, gradients, kept = torch.randn(3, 40, 256), [], []
    for model in (plain, ours):
        inside, sizes = x.clone().requires_grad_(), {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda value, sizes=sizes: sizes.update({value.data_ptr(): value.nbytes}) or value, lambda value: value)
        with hooks, autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = model(inside)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        own = {value.data_ptr() for value in model.parameters()}
        kept.append(sum(size for place, size in sizes.items() if place not in own))
        gradients.append([inside.grad, *(value.grad for value in model.parameters())])
    for expected, found in zip(*gradients):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=1e-2 * float(expected.abs().max()), rtol=1e-2)
    assert kept[1] <= kept[0] - 2 * 2 * 256 * 512
    torch.testing.assert_close(ours(x), plain(x))  # without autocast


def adapted(kind: str = "lora", dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Two layers with adapters whose matrices aren't zero any more."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(Linear(24, 40), torch.nn.GELU(), Linear(40, 24, bias=False)).to(dtype)
    add_adapters(model, Adaptation(kind, 4, 8.0, dropout=dropout), ["0", "2"])
    for value in model.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.2)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_inside_the_product_gives_pefts_gradients(dtype: torch.dtype) -> None:
    plain, ours = adapted(dtype=dtype), adapted(dtype=dtype)
    add_adapters_in_place(ours)
    x, found = torch.randn(3, 5, 24), []
    for model in (plain, ours):
        inside = x.clone().requires_grad_()
        with autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = model(inside)
        out.float().square().sum().backward()
        found.append([out.detach(), inside.grad, *(value.grad for value in model.parameters() if value.requires_grad)])
    assert "forward" in ours[0].__dict__ and "forward" not in plain[0].__dict__
    with autocast("cpu", torch.bfloat16):
        assert ours(x[0, 0]).add_(1).shape == (24,)  # without rows, and changed in place, as peft's own allow
    for expected, value in zip(*found):
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


def test_a_lora_inside_the_product_equals_the_formula() -> None:
    from pixart.training.linear import _ProductWithLora

    torch.manual_seed(0)
    x, weight, bias, down, up = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 6), (5, 6), (5,), (2, 6), (5, 2)))
    trained = [value.requires_grad_() for value in (x, down, up)]
    torch.testing.assert_close(_ProductWithLora.apply(x, weight, bias, down, up, 0.7), x @ (weight + 0.7 * up @ down).T + bias)
    assert torch.autograd.gradcheck(lambda x, down, up: _ProductWithLora.apply(x, weight, bias, down, up, 0.7), trained)


def test_only_a_plain_lora_goes_inside_and_it_can_be_turned_off() -> None:
    for kind, dropout in (("dora", 0.0), ("loha", 0.0), ("lokr", 0.0), ("lora", 0.1)):
        model = adapted(kind, dropout)
        add_adapters_in_place(model)
        assert "forward" not in model[0].__dict__, kind
    model, x = adapted(), torch.randn(3, 24)
    before = model(x)
    add_adapters_in_place(model)
    torch.testing.assert_close(model(x), before)  # without autocast
    with autocast("cpu", torch.bfloat16), without_adapters(model):
        assert torch.equal(model[0](x), model[0].base_layer(x))


def test_compiled_blocks_change_rounding_alone(recipe_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward graphs are traced and split as for a compiler, and run without its kernels, which take a minute to make."""
    graphs: list = []
    backend = lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    recipe = recipe_path(stages=[STAGE])
    assert_near(trained(recipe), trained(recipe, "compile_blocks=true", "checkpoint_blocks=true"), atol=2e-6, rtol=1e-4)
    assert graphs


def test_a_step_of_adamw_is_torchs_on_the_clipped_mean_gradient(recipe_path: Callable[..., Path]) -> None:
    """One update written out: losses of all pictures, clip, AdamW, average."""
    recipe = recipe_path(stages=[STAGE], clip_norm=0.01, weight_decay=0.1, epsilon=1e-6, betas=[0.8, 0.95], warmup_steps=0)
    loop, by_hand = Loop(load_recipe(recipe)), Loop(load_recipe(recipe))
    values = loop._train_step()
    settings, stage = by_hand.recipe.objective.settings, by_hand.recipe.stages[0]
    from pixart.training.draws import Draws

    draws = Draws(0, 0, 0, range(8))
    batch = by_hand.source.batch(by_hand.recipe.source.settings, stage, draws)
    losses = by_hand.objective.losses(settings, by_hand.network, by_hand.method.conditions(by_hand.network, batch), batch, draws)
    loss = sum(each.mean() for each in losses.values())
    parameters = [value for value in by_hand.network.parameters() if value.requires_grad]
    before = [value.detach().clone() for value in parameters]
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.cat([each.flatten() for each in gradients]).norm()
    assert (values["loss"], values["grad_norm"]) == (pytest.approx(loss.item(), rel=1e-5), pytest.approx(norm.item(), rel=1e-5))
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient * 0.01 / norm
    optimizer.step()
    assert_near(by_hand, loop, atol=1e-6, rtol=1e-4)
    for name, old, new in zip(by_hand.average.values, before, parameters):
        torch.testing.assert_close(loop.average.values[name], 0.9 * old + 0.1 * new, atol=1e-6, rtol=1e-4)


def test_fp16_scales_the_loss_and_its_state_is_kept(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_path(stages=[{**STAGE, "steps": 6}], precision="fp16")
    loop = Loop(load_recipe(recipe))
    loop.scaler.load_state_dict({**loop.scaler.state_dict(), "scale": 2.0**40})  # overflows, so that it must come down
    before = {name: value.clone() for name, value in loop.network.state_dict().items()}
    loop._train_step()
    assert loop.scaler.get_scale() == 2.0**39 and loop._skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in loop.network.state_dict().items())
    loop.save()
    resumed = Loop(load_recipe(recipe))
    resumed.resume(newest_state(tmp_path / "run"))
    assert resumed.scaler.get_scale() == 2.0**39 and resumed._skipped == 1
    near, exact = trained(recipe), trained(recipe, "precision=fp32")
    assert_near(exact, near, atol=8e-3, rtol=0.05)  # AdamW's first steps are signs: two products near zero may differ


def test_no_average_is_the_parameters_themselves(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    loop = Loop(load_recipe(recipe_path(stages=[STAGE], ema_decay=0.0)))
    loop.run()
    name, value = next(iter(loop.average.values.items()))
    assert value.data_ptr() == dict(loop.network.named_parameters())[name].data_ptr()
    assert not [name for name in loop._tensors() if name.startswith("average.")]
    resumed = Loop(load_recipe(recipe_path(stages=[STAGE], ema_decay=0.0)))
    resumed.resume(newest_state(tmp_path / "run"))
    assert_near(loop, resumed, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "expected", "kept"),
    [("adamw", "torch.optim", {"exp_avg"}), ("adamw8bit", "bitsandbytes", {"state1"}), ("came", "pytorch_optimizer", {"exp_avg_res_row"}),
     ("prodigy", "pytorch_optimizer", {"p0"}), ("muon", "torch.optim", {"momentum_buffer"})],
)  # fmt: skip
def test_optimizers_are_those_of_their_libraries(recipe_path: Callable[..., Path], name: str, expected: str, kept: set[str]) -> None:
    loop = trained(recipe_path(stages=[STAGE], optimizer=name, betas=[0.9, 0.999]))
    assert all(type(optimizer).__module__.startswith(("torch.optim", expected)) for optimizer in loop.optimizers)
    assert kept <= set(loop.optimizers[0].state[next(p for p in loop.optimizers[0].param_groups[0]["params"] if p.ndim == 2)])
    if name == "came":
        assert loop.optimizers[0].param_groups[0]["betas"] == (0.9, 0.999, 0.9999)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"optimizer": "came", "epsilon": 1e-8}, "'came' has two of its own"), ({"betas": [0.9, 0.99, 0.999]}, "only came has a third"),
     ({"optimizer": "prodigy", "missing": "pytorch_optimizer"}, "needs the Python package pytorch-optimizer.*pip install"),
     ({"optimizer": "adamw8bit", "missing": "bitsandbytes"}, "needs the Python package bitsandbytes.*choose 'adamw'")],
)  # fmt: skip
def test_optimizers_that_can_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str) -> None:
    missing = changes.pop("missing", None)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    from pixart.training.recipe import make_recipe

    recipe = make_recipe(recipe_values(tmp_path, **changes), "r")
    with pytest.raises(ConfigError, match=message):
        make_optimizers(Linear(2, 2), [], recipe)
    with pytest.raises(ConfigError, match="trains nothing"):
        make_optimizers(Linear(2, 2).requires_grad_(False), [], make_recipe(recipe_values(tmp_path), "r"))


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_good_state(
    recipe_path: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from pixart.training.sources import scenes
    from tests.support.tiny_training import TwoPictures

    class Broken(TwoPictures):
        def batch(self, settings, stage, draws):
            made = super().batch(settings, stage, draws)
            return replace(made, latent=made.latent * float("nan")) if draws.batch >= 2 else made

    recipe = recipe_path(steps=60, save_every=1, log_every=2)
    monkeypatch.setattr(scenes, "Part", Broken)
    with pytest.raises(UnsupportedError, match=rf"{MAX_SKIPPED + 1} steps in a row before step 22 had gradients that are not finite.*last good state"):
        train(recipe)
    state = newest_state(tmp_path / "run")
    assert state.name == "00000022"
    monkeypatch.setattr(scenes, "Part", TwoPictures)
    train(recipe, ["stages.0.learning_rate=0.001"], accept_changes=True, stop_after=0)
    assert newest_state(tmp_path / "run").name == "00000023"
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in rows for value in row.values()) and "loss" in rows[0]
    assert [row["skipped"] for row in rows if "skipped" in row] == [2] * 10 and "loss" not in rows[2]
