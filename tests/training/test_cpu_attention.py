"""Kept probabilities against exact attention and torch's fused kernel, and what training on a CPU keeps and gives back."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pixart.attention import torch_attention
from pixart.cpu import bf16_instructions
from pixart.layers import PixArtBlock
from pixart.training import cpu_attention, heap
from pixart.training.blocks import wrap_blocks
from pixart.training.cpu_attention import cpu_training_attention, dense_attention, keeping_attention, keeping_attention_of_one
from pixart.training.loop import Loop
from pixart.training.recipe import load_recipe

NEEDED = hasattr(torch.backends.mkldnn, "matmul") and bool(bf16_instructions())
only_with_bf16 = pytest.mark.skipif(not NEEDED, reason="this CPU or torch has no products of bf16 that come out in fp32")


def results(attention, q, k, v, gradient):
    """Output and gradients of q, k and v."""
    leaves = [value.clone().requires_grad_() for value in (q, k, v)]
    out = attention(*leaves, heads=5)
    return [out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]


@only_with_bf16
@pytest.mark.parametrize("autocast", [False, True])
def test_kept_probabilities_are_as_near_to_exact_attention_as_the_fused_kernel(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    """Scores of up to 16, which in bf16 would be off by 0.03."""
    monkeypatch.setattr(cpu_attention, "DENSE_SCORES", 0)
    torch.manual_seed(0)
    q, k, v, gradient = (torch.randn(2, 96, 5 * 8).mul(scale).bfloat16() for scale in (2, 2, 1, 1))
    exact = results(torch_attention, *(value.double() for value in (q, k, v)), gradient)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused, kept, scores_in_bf16 = (results(each, q, k, v, gradient) for each in (torch_attention, keeping_attention, dense_attention))
    assert kept[0].grad_fn is not None and torch.backends.mkldnn.matmul.fp32_precision != "bf16"
    for expected, near, found in zip(exact, fused, kept):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 1.5 * (near - expected).norm()
    assert (scores_in_bf16[0] - exact[0]).norm() > 2 * (kept[0] - exact[0]).norm()


@only_with_bf16
def test_only_medium_bf16_in_training_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def keeps(
        tokens: int, dtype: torch.dtype = torch.bfloat16, mask: torch.Tensor | None = None, trained: bool = True, pictures: int = 1,
        attention: Callable[..., torch.Tensor] = keeping_attention,
    ) -> bool:  # fmt: skip
        q = torch.randn(pictures, tokens, 40, dtype=dtype, requires_grad=trained)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value.shape) or value, lambda value: value):
            attention(q, q, q, heads=5, mask=mask)
        return (5 * pictures, tokens, tokens) in [tuple(shape) for shape in saved]

    monkeypatch.setattr(cpu_attention, "DENSE_SCORES", 32**2)
    monkeypatch.setattr(cpu_attention, "KEPT_SCORES", 64**2)
    assert keeps(64)
    assert not keeps(65)
    assert not keeps(64, torch.float32)
    assert not keeps(64, mask=torch.ones(1, 64, dtype=torch.bool))
    assert not keeps(64, trained=False)
    assert keeps(64, pictures=2)
    assert keeps(64, attention=keeping_attention_of_one) and not keeps(64, pictures=2, attention=keeping_attention_of_one)


def test_each_second_block_keeps_them_or_all_that_are_checkpointed_or_trained() -> None:
    def chosen(attention, trained: bool = False, **how: bool) -> list[bool | str]:
        blocks = nn.ModuleList(PixArtBlock(16, 2, 32, attention, nn) for _ in range(4)).requires_grad_(trained)
        wrap_blocks(blocks, **how)
        names = {keeping_attention: True, keeping_attention_of_one: "of one"}
        return [names.get(block.attn.attention, False) for block in blocks]

    assert chosen(cpu_training_attention, compiled=False, checkpointed=False) == [True, False, True, False]
    assert chosen(cpu_training_attention, compiled=False, checkpointed=True) == [True] * 4
    assert chosen(cpu_training_attention, trained=True, compiled=False, checkpointed=False) == [True, "of one"] * 2
    assert chosen(cpu_training_attention, compiled=True, checkpointed=True) == [False] * 4
    assert chosen(torch_attention, compiled=False, checkpointed=True) == [False] * 4  # on a card


def test_freed_memory_goes_back_if_the_recipe_says_so(recipe_path: Callable[..., Path]) -> None:
    for wanted in (True, False):
        loop = Loop(load_recipe(recipe_path(trim_memory=wanted)))
        assert [bool(block._forward_hooks) for block in loop.network.blocks] == [wanted and heap._libc() is not None] * len(loop.network.blocks)
        loop._train_step()


GAPS = """
import torch
from pixart.training.heap import Heap
heap = Heap.of_this_process()
assert heap is not None
pieces = [torch.ones(2**16) for _ in range(4096)]  # 256 KiB each, 1 GiB, of which every second one is freed
del pieces[::2]
from pixart.training.heap import _own_memory
before = _own_memory()
heap.trim()
freed = before - _own_memory()
assert 400 * 2**20 < freed < 600 * 2**20, freed
heap.trim()
assert all(bool((piece == 1).all()) for piece in pieces)
"""


class Tuples(nn.Module):
    """As T5's blocks, whose first output goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x), None


def test_memory_goes_back_in_both_passes_of_blocks_that_return_tuples_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Counting(heap.Heap):
        def __init__(self) -> None:
            pass

        def trim(self) -> None:
            calls.append(1)

    monkeypatch.setattr(heap.Heap, "of_this_process", classmethod(lambda cls: Counting()))
    for block, each in ((Tuples(), 2), (nn.Linear(4, 4), 2), (nn.Linear(4, 4).requires_grad_(False), 1)):
        calls.clear()
        heap.give_back_freed_memory([block])
        out = block(torch.zeros(2, 4))
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.sum().backward()
        assert len(calls) == each


@pytest.mark.skipif(heap._libc() is None, reason="of glibc from 2.33 on")
def test_gaps_in_the_heap_go_back_to_the_system() -> None:
    found = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, env={"MALLOC_MMAP_THRESHOLD_": str(2**25)})
    assert found.returncode == 0, found.stderr
