"""Which precision a CPU gets when nobody chose one."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixart import Pipeline, cpu
from tests.support.checkpoint_factory import tiny_weights, write


@pytest.fixture(autouse=True)
def unknown():
    """Each test asks anew."""
    cpu.bf16_instructions.cache_clear()
    yield
    cpu.bf16_instructions.cache_clear()


def machine(monkeypatch, **capabilities: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize("name", cpu.BF16_INSTRUCTIONS)
def test_instructions_for_bf16_are_used(monkeypatch, name: str) -> None:
    machine(monkeypatch, avx2=True, **{name: True})
    assert cpu.bf16_instructions() == name
    assert cpu.fastest_dtype(torch.float16) == cpu.fastest_dtype(torch.bfloat16) == torch.bfloat16
    assert cpu.fastest_dtype(torch.float32) == torch.float32


def test_without_them_nothing_is_narrowed(monkeypatch) -> None:
    machine(monkeypatch, avx2=True, avx512_f=True, avx512_bf16=False)
    assert cpu.bf16_instructions() == ""
    assert cpu.fastest_dtype(torch.float16) == torch.float32
    assert cpu.fastest_dtype(torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize(("question", "name"), [("_is_avx512_bf16_supported", "avx512_bf16"), ("_is_amx_tile_supported", "amx_bf16")])
def test_older_torch_is_asked_in_its_own_way(monkeypatch, question: str, name: str) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for each in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, each, lambda each=each: each == question, raising=False)
    assert cpu.bf16_instructions() == name


@pytest.mark.parametrize(("fast", "stored", "expected"), [
    (True, torch.float16, torch.bfloat16), (True, torch.bfloat16, torch.bfloat16), (True, torch.float32, torch.float32),
    (False, torch.float16, torch.float32), (False, torch.float32, torch.float32),
])  # fmt: skip
def test_a_pipeline_follows(monkeypatch, tmp_path: Path, fast: bool, stored: torch.dtype, expected: torch.dtype) -> None:
    machine(monkeypatch, avx512_bf16=fast)
    config, *layouts = tiny_weights()
    path = write("safetensors", tmp_path, config, *({key: value.to(stored) for key, value in each.items()} for each in layouts))
    assert Pipeline.from_files(path).dtype == expected
    assert Pipeline.from_files(path, dtype=torch.float32).dtype == torch.float32
