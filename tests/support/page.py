"""The page of `python -m pixart app` as a process of its own, with the demo model."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from launch.host import free_port
from tests.support.demo import ROOT

PATIENCE = 400  # seconds for the start; torch and Gradio are slow to import on a busy machine


class Server(NamedTuple):
    """Where the page is, its folder of pictures, and what it printed."""

    url: str
    output: Path
    log: Path
    process: subprocess.Popen


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Server]:
    """The page on a free port; leaving stops it as Ctrl-C would."""
    port = free_port()
    server = Server(f"http://127.0.0.1:{port}", folder / "output", folder / "page.log", None)
    command = [sys.executable, "-m", "pixart", "app", "--port", str(port), "--output", str(server.output), "--device", "cpu", *options]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with server.log.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environ)
    try:
        _wait_for(server, process)
        yield server._replace(process=process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(server: Server, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, server.log.read_text(encoding="utf-8")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
                assert answer.read() == b'{"status": "ok"}'
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"no page after {PATIENCE} s: {server.log.read_text(encoding='utf-8')}")
