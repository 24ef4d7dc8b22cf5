"""`--on torchrun`: one process a card. torchrun starts a dead one again; each looks for work by itself."""
from __future__ import annotations

import os
import uuid
from collections.abc import Sequence

from ..errors import PixArtError, UnsupportedError
from .drive import drive
from .stage import Stage
from .where import Where, threads, worker_count

RESTARTS = 3


def run_on_torchrun(stages: Sequence[Stage], chosen: Where) -> None:
    """Takes part as one of torchrun's processes, or starts them on this machine; raises PixArtError or OSError."""
    if "RANK" in os.environ:
        _take_part(stages, chosen)
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = worker_count(chosen)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=RESTARTS, monitor_interval=0.5,
    )  # fmt: skip
    try:
        found = elastic_launch(config, _worker)(stages, chosen)
    except ChildFailedError as error:
        raise UnsupportedError(
            f"A worker ended {RESTARTS + 1} times by itself ({error.get_first_failure()[1].message.splitlines()[0][:200]}). "
            "What was done stays done; run the command again, with fewer --workers if memory was short."
        ) from None
    except SignalException:  # Ctrl-C, which torchrun passes on to its processes
        raise KeyboardInterrupt from None
    errors = [text for text in found.values() if text]
    if errors:
        raise UnsupportedError(errors[0])


def _worker(stages: Sequence[Stage], chosen: Where) -> str:
    """One process; what a user can mend is given back, so that it isn't tried again."""
    try:
        _take_part(stages, chosen)
    except (PixArtError, OSError) as error:
        return str(error)
    return ""


def _take_part(stages: Sequence[Stage], chosen: Where) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = f"cuda:{os.environ['LOCAL_RANK']}" if chosen.device == "cuda" else chosen.device
    with threads(chosen):
        drive(stages, device, rank, world, shown=rank == 0)
