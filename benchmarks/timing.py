"""Timing that a busy machine disturbs least: contenders take turns, and are compared within each turn."""
from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """On Linux: freed memory stays with the process.

    glibc returns it depending on what lies above it in the heap; whose turn it is would then pay a million page faults a
    step, up to a third of its time, and another contender none.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; each returns its own. The order is reversed each time."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            seconds[name].append(contenders[name]())
    return seconds


def summarise(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, and half of the distance between the quartiles."""
    low, high = (float(np.percentile(seconds, q)) for q in (25, 75))
    return {"median": statistics.median(seconds), "spread": (high - low) / 2, "all": list(seconds)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of our time over theirs, turn by turn: what slows one turn slows both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def exponent(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """The power p of time = c * tokens^p that fits best."""
    return float(np.polyfit(np.log(tokens), np.log(seconds), 1)[0])
