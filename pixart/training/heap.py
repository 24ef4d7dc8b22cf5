"""On Linux: what blocks have freed goes back to the system.

The C library would keep the gaps, and make its heap larger for what is too large for them.
"""
from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

MOST_FREE = 2**28  # bytes; training XL/2 on a CPU else keeps 1.5 GB of gaps beside 3 GB in use


def give_back_freed_memory(blocks: Iterable[nn.Module]) -> None:
    """After a block's forward and before its backward pass, when the process has become larger than it ever needed to be."""
    heap = Heap.of_this_process()
    if heap is not None:
        for block in blocks:
            block.register_forward_hook(heap.trim_behind)


@cache
def _libc() -> ctypes.CDLL | None:
    """glibc; None where there is none, or one before 2.33."""
    try:
        found = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
        if found is not None:
            found.mallinfo2.restype = _Usage
        return found
    except (OSError, AttributeError):
        return None


class Heap:
    """glibc's. `other` is memory of the process that isn't the heap's: of libraries, Python and threads."""

    def __init__(self) -> None:
        _libc().malloc_trim(0)
        self.other = _own_memory() - self._used()
        self.most_used = 0

    @classmethod
    def of_this_process(cls) -> Heap | None:
        """None where nothing is known of the heap."""
        return cls() if _libc() else None

    def trim_behind(self, block: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        """A forward hook: trims after the block, and in the backward pass before it. T5's blocks return a tuple."""
        self.trim()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.trim())

    def trim(self) -> None:
        """Gives free pages back, unless this much was in use before: then they are wanted again soon, and to get them anew takes time."""
        self.most_used = max(self.most_used, self._used())
        if _own_memory() - self.other > self.most_used + MOST_FREE:
            _libc().malloc_trim(0)

    def _used(self) -> int:
        usage = _libc().mallinfo2()
        return usage.uordblks + usage.hblkhd


class _Usage(ctypes.Structure):
    """mallinfo2 of malloc.h: `uordblks` is allocated inside the heap, `hblkhd` beside it."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


def _own_memory() -> int:
    """Resident bytes of this process that are no file's."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
