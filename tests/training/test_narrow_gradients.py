"""Gradients that stay in 16 bits until the step: the same steps in less memory."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from pixart.training import linear, narrow_gradients
from pixart.training.loop import Loop
from pixart.training.narrow_gradients import NarrowGradients
from pixart.training.recipe import load_recipe
from pixart.training.run import train
from pixart.training.trained import Trained

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="needs torch 2.10")
STAGE = {"base_size": 64, "steps": 4, "batch_size": 4, "learning_rate": 2e-3}
LARGE = 72 * 72  # of the tiny model: every matrix of a block but the caption's projections


@pytest.fixture
def recipe(recipe_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """bf16, with weights that count as large, cast two or three at a time."""
    monkeypatch.setattr(linear, "SMALLEST", LARGE)
    monkeypatch.setattr(narrow_gradients, "MOST_AT_ONCE", 3 * LARGE)
    return recipe_path(stages=[STAGE], precision="bf16", clip_norm=0.01)


def after_three(recipe: Path, *changes: str) -> Loop:
    """A loop after three steps."""
    loop = Loop(load_recipe(recipe, changes))
    for _ in range(3):
        loop._train_step()
        loop.step += 1
    return loop


@pytest.mark.parametrize("checkpointed", ["true", "false"])
@pytest.mark.parametrize(("optimizer", "clip", "tolerance"), [("adamw", "0", 0), ("muon", "0", 0), ("adamw", "0.01", 1e-6), ("muon", "0.01", 1e-5)])
def test_steps_are_those_of_whole_gradients(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, checkpointed: str, optimizer: str, clip: str, tolerance: float
) -> None:
    changes = [f"optimizer={optimizer}", f"clip_norm={clip}", f"checkpoint_blocks={checkpointed}"]
    narrow = after_three(recipe, *changes)
    assert narrow.trained.narrow is not None
    monkeypatch.setattr(NarrowGradients, "suit", staticmethod(lambda *_: False))
    whole = after_three(recipe, *changes)
    assert whole.trained.narrow is None
    torch.testing.assert_close(narrow._tensors(), whole._tensors(), atol=tolerance, rtol=100 * tolerance)


def test_large_gradients_are_16_bits_until_a_few_at_a_time_are_stepped_with(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(load_recipe(recipe, []))
    large = {id(weight) for weight in linear.large_weights(loop.method.blocks(loop.network))}
    assert len(large) >= 10
    clip, seen, norms = Trained.clip, [], []

    def look(trained: Trained) -> torch.Tensor:
        gradients = {id(value): value.grad.clone() for value in loop.network.parameters() if value.grad is not None}
        assert {key for key, gradient in gradients.items() if gradient.dtype == torch.bfloat16} == large
        expected = torch.stack([gradient.float().norm() for gradient in gradients.values()]).norm()
        norms.append((float(clip(trained)), float(expected)))
        return torch.tensor(norms[-1][0])

    monkeypatch.setattr(Trained, "clip", look)
    optimizer = loop.optimizers[0]
    optimizer.register_step_pre_hook(lambda *_: seen.append([value.numel() for value in loop.network.parameters() if value.grad is not None and id(value) in large]))
    loop._train_step()
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-3)
    assert sum(map(len, seen)) == len(large) and max(len(each) for each in seen) > 1
    assert all(len(each) <= 1 or sum(each) <= 3 * LARGE for each in seen)
    assert all(value.grad is None for value in loop.network.parameters())


def test_gradients_that_are_not_finite_leave_everything_as_it_was(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = after_three(recipe)
    before = {name: value.clone() for name, value in loop._tensors().items()}
    monkeypatch.setattr(NarrowGradients, "clip", lambda *_: torch.tensor(float("nan")))
    loop._train_step()
    torch.testing.assert_close(loop._tensors(), before, atol=0, rtol=0)
    assert all(value.grad is None for value in loop.network.parameters())


@pytest.mark.parametrize("change", ["stages.0.accumulation=2", "precision=fp32", "compile_blocks=true", "optimizer=prodigy", "optimizer=came"])
def test_where_sums_or_other_parameters_matter_gradients_stay_whole(recipe: Path, change: str) -> None:
    assert NarrowGradients.suit(load_recipe(recipe, []), 1)
    assert not NarrowGradients.suit(load_recipe(recipe, []), 2)
    assert not NarrowGradients.suit(load_recipe(recipe, [change]), 1)


def test_gradients_that_are_sums_of_two_forwards_stay_whole(recipe: Path) -> None:
    one = load_recipe(recipe, ['objective={"name": "dmd"}'])
    two = load_recipe(recipe, ['objective={"name": "dmd", "pairs": "folder", "pair_loss": "l2"}'])
    assert NarrowGradients.suit(one, 1) and not NarrowGradients.suit(two, 1)


def test_a_single_process_of_torchrun_keeps_them_whole(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "prepare", lambda self, model: nn.Sequential(model))  # as its DDP is around the network
    loop = Loop(load_recipe(recipe, []))
    assert loop.accelerator.num_processes == 1 and loop.trained.narrow is None


def test_clipping_where_every_gradient_is_narrow() -> None:
    weight = nn.Parameter(torch.zeros(4, 8))
    narrow = NarrowGradients([weight])
    weight.grad = torch.full((4, 8), 3.0, dtype=torch.bfloat16)
    norm = narrow.clip([weight], 0.5)
    assert float(norm) == pytest.approx(3 * 32**0.5, rel=1e-2)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    narrow.step([optimizer])
    assert float(weight.detach().norm()) == pytest.approx(0.5, rel=1e-2) and weight.grad is None


@pytest.mark.parametrize("changes", [[], ['method={"name": "lora", "rank": 72, "targets": "attention+mlp"}']])
def test_a_dry_run_counts_them(recipe: Path, tmp_path: Path, changes: list[str]) -> None:
    base = train(recipe, ["stages.0.steps=1", f"run_dir={tmp_path / 'base'}", f"output={tmp_path / 'base.safetensors'}"])
    loop = Loop(load_recipe(recipe, [*changes, f"initialize={base}"]))
    loop.trained.step = lambda *_: None  # gradients stay
    loop._train_step()
    trained = [value for value in loop.network.parameters() if value.requires_grad]
    held = sum(value.grad.nbytes for value in trained if value.grad is not None)
    counted = NarrowGradients.gradient_bytes([value for value in trained if value.grad is not None], loop.method.blocks(loop.network), loop.recipe, 1)
    assert counted == held
    assert changes or held < sum(value.nbytes for value in trained)
