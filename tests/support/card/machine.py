"""What torch says of the card: `torch.cuda`, attention, generators. It can't be taken back in a process."""
from __future__ import annotations

import contextlib
import types
from functools import cache
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from tests.support.card.tensors import CardTensor, Mode, held, names_card, record, used_bytes

NAME = "Pretended card"
TOTAL = 24 * 2**30
CAPABILITY = (8, 9)  # computes in bf16 and fp8


class _Stream:
    """A stream or an event: everything is done at once, so that there is nothing to wait for."""

    def __init__(self, *args: Any, **options: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, *args: Any) -> _Stream:
        return self

    def record(self, *args: Any) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> bool:
        return False

    def as_context(self, other: Any) -> _Stream:
        return self


@cache
def install() -> None:
    """Puts the card into this process; before a host is imported."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    # A tensor subclass loses its kind in inference mode
    torch.inference_mode = lambda mode=True: torch.no_grad() if not callable(mode) else torch.no_grad()(mode)
    real_check = torch._has_compatible_shallow_copy_type
    torch._has_compatible_shallow_copy_type = (
        lambda a, b: not isinstance(a, CardTensor) and not isinstance(b, CardTensor) and real_check(a, b)
    )
    torch.Tensor.pin_memory = lambda self, *args, **options: self
    _generators()
    _attention()
    _cuda()
    Mode().__enter__()


def _generators() -> None:
    real = torch.Generator

    class Generator(real):  # type: ignore[misc, valid-type]
        """A card's generator draws on the CPU."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return real.__new__(cls, device="cpu" if names_card(device) else device)

    torch.Generator = Generator


def _attention() -> None:
    real = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
        given = [each for each in (query, key, value, attn_mask) if isinstance(each, Tensor)]
        on_card = [each for each in given if isinstance(each, CardTensor)]
        if not on_card:
            return real(query, key, value, attn_mask, *rest, **options)
        if len(on_card) < len(given):
            raise RuntimeError("Expected all tensors to be on the same device (scaled_dot_product_attention)")
        if len({each.dtype for each in (query, key, value)}) > 1:
            raise RuntimeError(f"Expected query, key, and value to have the same dtype: {query.dtype} {key.dtype} {value.dtype}")
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
            raise RuntimeError(f"invalid dtype for bias - should match query's dtype ({attn_mask.dtype}, {query.dtype})")
        return CardTensor(real(held(query), held(key), held(value), held(attn_mask), *rest, **options))

    F.scaled_dot_product_attention = attention


def _cuda() -> None:
    properties = types.SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=TOTAL, multi_processor_count=128
    )
    statistics = {"active_bytes.all.current": 0, "reserved_bytes.all.current": 0}
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties, "get_device_name": NAME,
        "get_device_capability": CAPABILITY, "is_bf16_supported": True, "memory_stats": statistics, "get_allocator_backend": "native",
        "set_device": None, "empty_cache": None, "ipc_collect": None, "reset_peak_memory_stats": None, "_lazy_init": None,
        "cudart": types.SimpleNamespace(cudaHostRegister=lambda *args: 1, cudaHostUnregister=lambda *args: 1),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    torch.cuda.mem_get_info = lambda *args, **options: (max(0, TOTAL - used_bytes()), TOTAL)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):  # peaks are not kept
        setattr(torch.cuda, name, lambda *args, **options: used_bytes())
    torch.cuda.get_rng_state = lambda *args, **options: torch.get_rng_state()
    torch.cuda.synchronize = lambda *args, **options: record("wait", "synchronize")
    torch.cuda.current_stream = lambda *args, **options: _Stream()
    torch.cuda.stream = torch.cuda.device = lambda *args, **options: contextlib.nullcontext()
    torch.cuda.Stream = torch.cuda.Event = _Stream
