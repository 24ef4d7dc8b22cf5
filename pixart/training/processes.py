"""The processes of a run, through accelerate: how many there are, and how they stop together."""
from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from ..errors import ConfigError
from .recipe import Recipe
from .trackers import check_trackers


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Of this process; precision is the loop's own."""
    check_trackers(recipe.trackers)
    gradients = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(
        cpu=not torch.cuda.is_available(), log_with=list(recipe.trackers) or None, project_dir=recipe.run_dir,
        mixed_precision="no", kwargs_handlers=[gradients],
    )  # fmt: skip


def check_batches(recipe: Recipe, processes: int) -> None:
    """Raises ConfigError for a stage whose batch the processes can't share evenly."""
    for number, stage in enumerate(recipe.stages):
        if stage.batch_size % (processes * stage.accumulation):
            parts = f" in {stage.accumulation} parts each" if stage.accumulation > 1 else ""
            raise ConfigError(
                f"Stage {number}: a batch of {stage.batch_size} doesn't divide among {processes} processes{parts}; change batch_size."
            )
    if recipe.shard and processes == 1:
        raise ConfigError("shard shares the weights among processes, and this is one; start with torchrun, or choose shard false.")


def agreed(flag: bool, accelerator: Accelerator) -> bool:
    """True in every process once any says so; all must leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    votes = torch.tensor([float(flag)], device=accelerator.device)
    return accelerator.reduce(votes, reduction="sum").item() > 0


@contextmanager
def stopped_by_signals(handler: Callable[..., None]) -> Iterator[None]:
    """Ctrl-C and termination end a run after its step, so that what was learned is kept whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
