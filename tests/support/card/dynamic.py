"""Dynamic VRAM on the pretended card: comfy-aimdo's native parts, in Python; then what the host's main.py does."""
from __future__ import annotations

import ctypes
import importlib
import mmap
import os
from typing import Any

import torch
from torch import Tensor


class _Reserve:
    """Address space for a model's weights, handed out piece by piece."""

    def __init__(self, size: int, device: Any) -> None:
        self.buffer = torch.zeros(int(size), dtype=torch.uint8, device="cuda")
        self.offset = self.loaded = 0

    def alloc(self, count: int) -> tuple:
        self.offset = (self.offset + 511) & ~511
        start, self.offset = self.offset, self.offset + count
        return self, start, count

    def view(self, start: int, count: int) -> Tensor:
        return self.buffer[start : start + count]

    def prioritize(self, *args: Any) -> None: ...
    deprioritize = prioritize

    def loaded_size(self) -> int:
        return self.loaded

    def free_memory(self, size: int) -> int:
        return 0


class _Buffer:
    """A buffer on the card that grows, for weights that stay outside."""

    def __init__(self, *args: Any) -> None:
        self.data = torch.zeros(0, dtype=torch.uint8, device="cuda")

    def size(self) -> int:
        return self.data.numel()

    def get(self, count: int, offset: int = 0) -> tuple:
        if self.data.numel() < offset + count:
            self.data = torch.zeros(offset + count, dtype=torch.uint8, device="cuda")
        return self, offset, count

    def view(self, start: int, count: int) -> Tensor:
        return self.data[start : start + count]


class _HostBuffer:
    def __init__(self, *args: Any) -> None:
        self.size = 0

    def truncate(self, *args: Any, **options: Any) -> None: ...


class _Mapping:
    """A file in memory, read only as the real one: who writes into a weight of the file dies."""

    def __init__(self, path: str) -> None:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.address), ctypes.c_size_t(size), 1) != 0:
            raise OSError(f"{path} can't be made read only")

    def get(self) -> int:
        return self.address

    def get_file_handle(self) -> None:
        return None

    def bounce(self) -> None: ...


def enable(resident: bool) -> None:
    """Turns dynamic VRAM on. resident: the card takes weights; otherwise each is streamed at its use."""
    names = ("host_buffer", "model_mmap", "model_vbar", "torch", "vram_buffer")
    aimdo = {name: importlib.import_module(f"comfy_aimdo.{name}") for name in names}
    reserves = aimdo["model_vbar"]
    reserves.ModelVBAR = _Reserve
    reserves.vbar_fault = lambda allocation: (ctypes.c_uint32 * 2)(1, 1) if resident else None
    reserves.vbar_unpin = lambda allocation: None
    reserves.vbars_analyze = lambda *args: 0
    aimdo["torch"].aimdo_to_tensor = lambda allocation, device: allocation[0].view(*allocation[1:])
    aimdo["vram_buffer"].VRAMBuffer = _Buffer
    aimdo["host_buffer"].HostBuffer = _HostBuffer
    aimdo["model_mmap"].ModelMMAP = _Mapping
    importlib.import_module("comfy.cli_args").args.disable_pinned_memory = True
    patcher = importlib.import_module("comfy.model_patcher")
    _move_parameters_whole(patcher)
    patcher.CoreModelPatcher = patcher.ModelPatcherDynamic
    importlib.import_module("comfy.memory_management").aimdo_enabled = True


def _move_parameters_whole(patcher: Any) -> None:
    """`parameter.data = parameter.data.to(device)` can't turn a CPU tensor into the card's kind: parameters are replaced."""
    real = patcher.ModelPatcher._load_list

    def load_list(self: Any, for_dynamic: bool = False, default_device: Any = None) -> Any:
        for _, module in self.model.named_modules() if default_device is not None else ():
            own = dict(module.named_parameters(recurse=False))
            if own and any(name not in own for name, _ in module.named_parameters()):
                for name, parameter in own.items():
                    dtype = getattr(module, f"{name}_comfy_model_dtype", None)
                    moved = parameter.data.to(device=default_device, dtype=dtype)
                    setattr(module, name, torch.nn.Parameter(moved, requires_grad=False))
        return real(self, for_dynamic, None)

    patcher.ModelPatcher._load_list = load_list
