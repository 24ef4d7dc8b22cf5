"""`--on local | torchrun | ray`: the same stages by one process, by one a card, or by a cluster's."""
from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..device import check_device
from ..errors import InputError

if TYPE_CHECKING:
    from .stage import Stage

LOCAL, TORCHRUN, RAY = "local", "torchrun", "ray"


@dataclass(frozen=True)
class Where:
    """The command's choice. workers: None means one a card, or as many as there are cores."""

    on: str = LOCAL
    workers: int | None = None
    threads: int = 1  # of each worker's torch, on a CPU
    device: str = "cpu"
    address: str | None = None  # of a Ray cluster


def add_where_options(parser: argparse.ArgumentParser, *others: str) -> None:
    """`--on` and what belongs to it. others: more places that this command knows."""
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--on", choices=(LOCAL, TORCHRUN, RAY, *others), default=LOCAL,
        help="local: this process (default). torchrun: one process per GPU of this machine, or of several if torchrun started this "
        "command there. ray: a Ray cluster (`pip install \".[scale]\"`). The results are the same. All machines "
        "need this package, and the same paths to the models and folders",
    )  # fmt: skip
    group.add_argument("--workers", type=_count, metavar="N", help="for torchrun and ray (default: one per GPU, else one per core)")
    group.add_argument(
        "--threads", type=_count, default=1, metavar="N",
        help="of each worker on a CPU (default: 1). The same number gives bit-identical results",
    )  # fmt: skip
    group.add_argument("--address", help="of a running Ray cluster, e.g. auto or 10.0.0.5:6379 (default: start one here)")


def where(given: argparse.Namespace) -> Where:
    """What was chosen; raises InputError for options that contradict each other, UnsupportedError for a device that isn't there."""
    if given.on != RAY and given.address:
        raise InputError(f"--address is for a Ray cluster, but --on is {given.on}; add --on ray.")
    if given.on == LOCAL and given.workers not in (None, 1):
        raise InputError(f"--workers is {given.workers}, but --on local is one process; add --on torchrun or --on ray.")
    remote = given.on == RAY and given.address is not None  # this machine may have no card while the cluster's do
    device = given.device if remote else check_device(given.device)
    return Where(given.on, given.workers, given.threads, device, given.address)


def run(stages: Sequence[Stage], chosen: Where) -> None:
    """Does all chunks of the stages in their order. Raises PixArtError or OSError; what was done stays done."""
    for stage in stages:
        stage.place.mkdir(parents=True, exist_ok=True)
    if chosen.on == RAY:
        from .on_ray import run_on_ray

        run_on_ray(stages, chosen)
    elif chosen.on == TORCHRUN:
        from .on_torchrun import run_on_torchrun

        run_on_torchrun(stages, chosen)
    else:
        from .drive import drive

        with threads(chosen):
            drive(stages, chosen.device)


def leads() -> bool:
    """Whether this process is the one that prepares and reports; the others that torchrun started only work."""
    return os.environ.get("RANK", "0") == "0"


def worker_count(chosen: Where) -> int:
    """Workers on this machine."""
    if chosen.workers:
        return chosen.workers
    import torch

    if chosen.device.startswith("cuda"):
        return 1 if ":" in chosen.device else torch.cuda.device_count()  # a card that was named is the only one
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // chosen.threads, 1)


@contextlib.contextmanager
def threads(chosen: Where) -> Iterator[None]:
    """torch computes with the chosen number of threads; on a CPU another number may round otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(chosen.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number above 0")
    return int(text)
