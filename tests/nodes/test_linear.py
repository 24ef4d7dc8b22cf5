"""The host's linear layers: through one kernel as they are, called where anything is on top of them."""
from __future__ import annotations

import comfy.model_management
import comfy.ops
import pytest
import torch

from tests.support import host
from tests.support.host_models import captions, difference, load_model, sample, write_model

core = host.pack_module("pixart.linear")
host_linear = host.pack_module("nodes.host.linear").host_linear
pytestmark = [
    pytest.mark.skipif(core._kernel() is None, reason="this CPU has no bf16 instructions, or torch no such kernel"),
    pytest.mark.skipif(host.on_pretended_card(), reason="the kernel is for CPUs"),
]


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernel was asked for."""
    kernel, seen = core._kernel(), []

    def noted(x, weight, bias, what, *more):
        seen.append(what)
        return kernel(x, weight, bias, what, *more)

    monkeypatch.setattr(core, "_kernel", lambda: noted)
    return seen


def test_a_16_bit_model_is_drawn_by_it_and_near_the_fp32_picture(tmp_path, uses: list[str]) -> None:
    path = write_model(tmp_path, depth=2)
    model = load_model(path, weight_dtype="bf16")
    model.set_model_compute_dtype(torch.bfloat16)
    prompts = captions(5), captions(2, seed=1)
    found = sample(model, *prompts, steps=2)
    assert uses.count("gelu") == 2 * 2 and len(uses) >= 7 * 4
    uses.clear()
    exact = sample(load_model(path, weight_dtype="fp32"), *prompts, steps=2)
    assert not uses and difference(found, exact) < 0.05


@pytest.mark.parametrize("ops", ["disable_weight_init", "manual_cast"])
@torch.no_grad()
def test_what_is_on_top_of_a_layer_is_called(uses: list[str], ops: str) -> None:
    layer = getattr(comfy.ops, ops).Linear(16, 32, dtype=torch.bfloat16)
    for value in layer.parameters():
        value.normal_()
    x = torch.randn(3, 16).bfloat16()
    plain = host_linear(layer, x)
    assert uses == ["none"] and torch.allclose(plain, layer(x), atol=0.1, rtol=0.02)
    layer.weight_function = [lambda weight: weight * 2]
    assert torch.equal(host_linear(layer, x), layer(x)) and len(uses) == 1
    layer.weight_function, layer.bias_function = [], [lambda bias: bias + 1]
    assert torch.equal(host_linear(layer, x), layer(x)) and len(uses) == 1


@torch.no_grad()
def test_layers_of_another_format_are_called(uses: list[str]) -> None:
    class Unpacked(comfy.ops.manual_cast.Linear):
        """As packs for GGUF files have them."""

        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(input), 32)

    assert not host_linear(Unpacked(16, 32, dtype=torch.bfloat16), torch.randn(3, 16).bfloat16()).any() and not uses


@pytest.mark.skipif(not hasattr(comfy.ops, "run_every_op"), reason="this host doesn't look for Cancel in layers")
@torch.no_grad()
def test_cancel_stops_within_a_step(uses: list[str]) -> None:
    layer, x = comfy.ops.manual_cast.Linear(16, 32, dtype=torch.bfloat16), torch.randn(3, 16).bfloat16()
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        host_linear(layer, x)
    assert not uses
