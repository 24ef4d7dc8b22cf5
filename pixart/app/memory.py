"""Whether T5 and the transformer have room beside each other."""
from __future__ import annotations

import gc

import torch
from torch import nn

GIB = 2**30
# Of drawing at 1024 px, beside the weights. The VAE's decoder takes most: 1.7 GiB in bf16 (benchmarks/results/graph_memory-cpu.md),
# twice that in fp32; the rest is a margin for other programs.
DRAWING = 5 * GIB


def free_bytes(device: torch.device) -> int:
    """What is left on a device; of main memory, what the system could give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # comes with accelerate

    return psutil.virtual_memory().available


def bytes_of(module: nn.Module) -> int:
    """Of all weights."""
    return sum(each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers()))


def needed_for_drawing(base_size: int) -> int:
    """Bytes beside the weights for a picture of a model's base size."""
    return int(DRAWING * (base_size / 1024) ** 2)


def give_back() -> None:
    """Frees what nothing refers to any longer, on every device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
