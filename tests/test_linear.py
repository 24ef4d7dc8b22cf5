"""One kernel for product, bias and GELU: the same numbers, and only where the layer does nothing else."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixart import linear
from pixart.attention import torch_attention
from pixart.config import TransformerConfig
from pixart.layers import BlockInputs, PixArtBlock
from pixart.linear import torch_linear
from pixart.model import PixArtTransformer

KERNEL = linear._kernel()
BF16 = pytest.mark.skipif(KERNEL is None, reason="this CPU has no bf16 instructions, or torch no such kernel")


def layer_and_input(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(72, 288).to(dtype), torch.randn(2, 30, 72).to(dtype)


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernel, or a stand-in on other CPUs, was asked for."""
    seen: list[str] = []

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, what: str, *more: object) -> torch.Tensor:
        seen.append(what)
        return KERNEL(x, weight, bias, what, *more) if KERNEL else F.linear(x, weight, bias)

    monkeypatch.setattr(linear, "_kernel", lambda: noted)
    return seen


@BF16
@pytest.mark.parametrize("gelu", [True, False])
@torch.no_grad()
def test_the_kernel_is_as_near_to_exact_as_separate_operations_or_nearer(uses: list[str], gelu: bool) -> None:
    layer, x = layer_and_input()
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    apart = layer(x)
    if gelu:
        exact, apart = F.gelu(exact, approximate="tanh"), F.gelu(apart, approximate="tanh")
    found = torch_linear(layer, x, gelu=gelu)
    assert found.shape == (2, 30, 288) and uses == ["gelu" if gelu else "none"]
    errors = [((each.double() - exact).norm() / exact.norm()).item() for each in (found, apart)]
    assert errors[0] < 2e-3 and errors[0] <= errors[1] * 1.01


@BF16
@torch.no_grad()
def test_every_linear_layer_of_a_block_takes_it(uses: list[str]) -> None:
    block = PixArtBlock(72, 1, 144, torch_attention, nn, dtype=torch.bfloat16)
    for value in block.parameters():
        value.normal_(std=0.1)
    context = torch.randn(2, 5, 72).bfloat16()
    inputs = BlockInputs(torch.randn(2, 16, 72), context, torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 6, 72), (4, 4))
    found = block(inputs)
    assert sorted(uses) == ["gelu", *["none"] * 6]
    wanted = block.float()(BlockInputs(inputs.hidden, context.float(), inputs.context_mask, inputs.modulation, (4, 4)))
    assert len(uses) == 7  # not in fp32
    assert (found - wanted).norm() / wanted.norm() < 0.02


def test_a_plain_layer_is_not_called(uses: list[str]) -> None:
    """Also under autocast, as in a run's samples, and in inference mode, as in pipelines."""
    layer, x = layer_and_input()
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with torch.no_grad(), context:
            torch_linear(layer, x)
    assert uses == ["none"] * 3


@BF16
def test_the_kernel_is_tried_wherever_it_is_asked_for_first() -> None:
    linear._kernel.cache_clear()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.no_grad():
        assert linear._kernel() is not None


@pytest.mark.parametrize("name", ["sve_bf16", "bf16", ""])
def test_there_is_none_on_arm_or_without_instructions(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """oneDNN has no fast kernel for plain weights on Arm."""
    monkeypatch.setattr(linear, "bf16_instructions", lambda: name)
    assert linear._kernel.__wrapped__() is None


def test_a_graph_holds_the_layers_themselves(uses: list[str]) -> None:
    layer, x = layer_and_input()
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(lambda given: torch_linear(layer, given, gelu=True), backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        found = compiled(x)
        assert torch.equal(found, F.gelu(layer(x), approximate="tanh"))
    assert uses == [] and len(graphs) == 1


@pytest.mark.parametrize("case", [
    "gradients", "fp32", "weight in fp32", "hook", "hook before", "replaced forward",
    "no bias", "subclass", "turned weight", "turned input", "empty",
])  # fmt: skip
def test_other_layers_are_called(uses: list[str], case: str) -> None:
    layer, x = layer_and_input(torch.float32 if case == "fp32" else torch.bfloat16)
    called: list[int] = []
    if case == "weight in fp32":
        layer.float()
    elif case == "hook":
        layer.register_forward_hook(lambda *_: called.append(1))
    elif case == "hook before":
        layer.register_forward_pre_hook(lambda *_: called.append(1) and None)
    elif case == "replaced forward":
        layer.forward = lambda given: called.append(1) or F.linear(given, layer.weight) * 2
    elif case == "no bias":
        layer = nn.Linear(72, 288, bias=False).bfloat16()
    elif case == "subclass":
        layer.__class__ = type("Adapted", (nn.Linear,), {"forward": lambda self, x: called.append(1) or F.linear(x, self.weight)})
    elif case == "turned weight":
        layer.weight = nn.Parameter(layer.weight.data.t().contiguous().t())
    elif case == "turned input":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif case == "empty":
        x = x[:0]
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", torch.bfloat16, enabled=case == "weight in fp32"):
        found = torch_linear(layer, x)
        wanted = layer(x)
    assert uses == [] and torch.equal(found, wanted)
    assert len(called) == (2 if case in ("hook", "hook before", "replaced forward", "subclass") else 0)


@BF16
def test_a_model_learns_through_its_layers() -> None:
    """Gradients come through torch's own operations, whatever drew before."""
    config = TransformerConfig(hidden_size=72, depth=1, num_heads=1, mlp_hidden=144, caption_channels=16, max_tokens=5)
    model = PixArtTransformer(config, dtype=torch.bfloat16)
    for value in model.parameters():
        value.data.normal_(std=0.1)
    names = ("attn.qkv", "mlp.fc1", "mlp.fc2", "cross_attn.q_linear")
    given = torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([5.0]), torch.randn(1, 5, 16).bfloat16()
    with torch.no_grad():
        drawn = model(*given)
    learnt = model(*given)
    assert (drawn - learnt).float().norm() / drawn.float().norm() < 0.02
    learnt.float().square().sum().backward()
    assert all(model.blocks[0].get_submodule(name).weight.grad.abs().sum() > 0 for name in names)
