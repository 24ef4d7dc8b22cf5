"""`--on ray`: Ray Data hands chunks to workers on any machine, and to others when a worker dies. The work is the same."""
from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError, PixArtError, UnsupportedError
from .book import FOLDER, Book, write_text
from .drive import Opened, progress
from .stage import Stage
from .where import Where, threads, worker_count

INSTALL = "`pip install \".[scale]\"` in the repository"
OBJECT_STORE = 100 * 2**20  # bytes; only numbers of chunks go through it
BLOCKS = 1000  # at most; a worker takes one block of chunks after the other
PATIENCE = 10.0  # seconds for a cluster's address to answer
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # of gRPC, which Ray speaks
SETTINGS = 4  # kind of the frame that it is answered with


def run_on_ray(stages: Sequence[Stage], chosen: Where) -> None:
    """Does the stages on a cluster, one after the other. Raises PixArtError or OSError."""
    joined = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if chosen.address is None or joined:
        _run_here(stages, chosen)
        return
    _check_address(chosen.address)
    problem = apart(_run_here, stages, chosen)
    if problem is None:
        problem = f"Ray ended its process; is the cluster at {chosen.address} still there? What was done stays done; run the command again."
    if problem:
        raise UnsupportedError(problem)


def apart(function: Callable[..., None], *arguments: Any) -> str | None:
    """Calls it in a process of its own, since Ray ends the process whose cluster goes away; "" or the error, None if that happened."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_apart, args=(sender, function, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join()


def _apart(sender: Any, function: Callable[..., None], *arguments: Any) -> None:
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # no work goes on for a command that was killed
    try:
        function(*arguments)
    except (PixArtError, OSError) as error:
        sender.send(str(error))
    except KeyboardInterrupt:
        return
    else:
        sender.send("")


def _run_here(stages: Sequence[Stage], chosen: Where) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UnsupportedError(f"--on ray needs Ray ({error}): {INSTALL}.") from None
    started = not ray.is_initialized()
    if started:
        connect(ray, chosen)
    _quieten(ray)
    if chosen.device == "auto":
        chosen = replace(chosen, device="cuda" if ray.cluster_resources().get("GPU") else "cpu")
    try:
        for stage in stages:
            _run(ray, stage, chosen)
    except ray.exceptions.RayError as error:
        raise UnsupportedError(f"Ray gave up ({_first_line(error)}). What was done stays done; run the command again.") from None
    finally:
        if started:
            ray.shutdown()


class RayWorker:
    """What Ray keeps on a machine: the models of one stage."""

    def __init__(self, stage: Stage, chosen: Where, token: str) -> None:
        self.stage, self.chosen = stage, chosen
        self.problem = _problem_of_place(stage, token)
        # Ray shows each worker the one card that it may use
        self.opened = Opened(stage, "cuda" if chosen.device.startswith("cuda") else chosen.device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Numbers of chunks -> the same, and for each what ended the run, or ""."""
        return {"chunk": batch["chunk"], "error": [self.problem or self._finish(int(number)) for number in batch["chunk"]]}

    def _finish(self, number: int) -> str:
        try:
            with threads(self.chosen):
                self.opened.finish(self.stage.chunks[number], wait=True)
        except (PixArtError, OSError) as error:
            self.problem = str(error)
        return self.problem


def _run(ray: Any, stage: Stage, chosen: Where) -> None:
    book = Book(stage)
    left = [number for number, chunk in enumerate(stage.chunks) if not book.is_done(chunk)]
    if not left:
        return
    token = uuid.uuid4().hex
    write_text(_token_file(stage, token), token)
    count = min(_ray_workers(ray, chosen), len(left))
    resources = {"num_cpus": chosen.threads, "num_gpus": 1 if chosen.device.startswith("cuda") else 0}
    data = ray.data.from_items([{"chunk": number} for number in left], override_num_blocks=min(len(left), BLOCKS)).map_batches(
        RayWorker, fn_constructor_args=(stage, chosen, token), batch_size=1, batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=count), **resources,
    )  # fmt: skip
    try:
        with progress(stage, shown=True) as show:
            for row in data.iter_rows():
                if row["error"]:
                    raise UnsupportedError(row["error"])
                show()
    finally:
        _token_file(stage, token).unlink(missing_ok=True)
    missing = sum(not book.is_done(stage.chunks[number]) for number in left)
    if missing:
        raise UnsupportedError(f"{missing} batches were done, but their files are not in {stage.place}. Run the command again.")


def connect(ray: Any, chosen: Where) -> None:
    """Joins the cluster of `--address`, or starts one of this machine alone. Raises UnsupportedError."""
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if chosen.address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # else any other program of this machine comes before the workers
        cores = worker_count(chosen) * chosen.threads
        ray.init(address="local", num_cpus=cores, object_store_memory=OBJECT_STORE, **quiet)
    else:
        _check_address(chosen.address)
        try:
            ray.init(address=chosen.address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise UnsupportedError(_no_cluster(chosen.address, error)) from None


def _quieten(ray: Any) -> None:
    """Our own bar and errors suffice."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def _check_address(address: str) -> None:
    """Ray itself waits minutes for a cluster that isn't there, and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return  # "auto", or a name that Ray knows
    try:
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(GREETING)
            answer = connection.recv(9)
        if answer[3:4] != bytes([SETTINGS]):
            raise ValueError("what listens there is not Ray")
    except (OSError, ValueError, OverflowError) as error:
        raise UnsupportedError(_no_cluster(address, error)) from None


def _no_cluster(address: str, error: Exception) -> str:
    return (
        f"No Ray cluster answers at {address} ({_first_line(error)}). Start one with `ray start --head`, correct --address, or leave it "
        "out: then one is started on this machine."
    )


def _ray_workers(ray: Any, chosen: Where) -> int:
    """As many as were asked for and the cluster has room for."""
    cluster = ray.cluster_resources()
    cards = chosen.device.startswith("cuda")
    room = int(cluster.get("GPU", 0)) if cards else int(cluster.get("CPU", 0) // chosen.threads)
    if room < 1:
        raise UnsupportedError(f"The Ray cluster has no {'card' if cards else f'machine with {chosen.threads} cores'}; it has {cluster}.")
    return min(chosen.workers or room, room)


def _token_file(stage: Stage, token: str) -> Any:
    return stage.place / FOLDER / f"ray-{token}"


def _problem_of_place(stage: Stage, token: str) -> str:
    """A cluster whose machines don't see the folder would write to folders of their own."""
    if _token_file(stage, token).is_file():
        return ""
    return str(
        InputError(f"{stage.place} is not the same folder on every machine of the cluster; choose one that all of them share.")
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
