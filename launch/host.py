"""Starting a ComfyUI and always stopping it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterable, Iterator
from pathlib import Path

from .checkout import PACK
from .client import ComfyClient
from .errors import LaunchError

PROBE_NODE = "PixArtModelLoader"
# How long idle threads spin before they sleep. GNU's default is ten times slower where others compute too; to sleep at once
# takes 1.7 times as long as this where nobody does (a step of the demo on two cores: 54 against 31 ms).
SPIN_BRIEFLY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}  # GNU's heeds the second, others the first


def environment() -> dict[str, str]:
    """Variables of processes that draw: offline, and with threads that spin briefly unless the user has chosen."""
    chosen = os.environ.keys() & SPIN_BRIEFLY.keys()
    return {**({} if chosen else SPIN_BRIEFLY), **os.environ, "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accelerator(python: Path) -> str:
    """The device torch in that environment would compute on: cuda, mps, xpu ... or cpu."""
    if _only_for_nvidia(python) and not _has_nvidia_driver():
        return "cpu"  # told without importing torch, which takes two seconds
    code = "import torch; a = torch.accelerator; print(a.current_accelerator().type if a.is_available() else 'cpu')"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else "cpu"


def _only_for_nvidia(python: Path) -> bool:
    """Whether that environment's torch computes on NVIDIA's cards or the CPU; other builds say so in their version, e.g. 2.9+rocm6.4."""
    if sys.platform not in {"linux", "win32"}:
        return False
    environment = python.absolute().parents[1]
    for place in ("lib/python*/site-packages", "Lib/site-packages"):
        for found in environment.glob(f"{place}/torch-*.dist-info"):
            build = found.name.removesuffix(".dist-info").partition("+")[2]
            return not build or build.startswith(("cpu", "cu"))
    return False


def _has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


class Host:
    """A running ComfyUI; leaving the `with` block stops it, whatever happened inside."""

    def __init__(
        self, python: Path, comfyui: Path, base: Path, *, cpu: bool, port: int | None = None,
        log: Path | None = None, options: Iterable[str] = (), start_timeout: float = 300,
    ) -> None:
        self.python, self.comfyui, self.base, self.cpu = python, comfyui, base, cpu
        self.port = port
        self.log = log or base / "host.log"
        self.options = tuple(options)
        self.start_timeout = start_timeout
        self.process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def url(self) -> str:
        """Where the host listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> ComfyClient:
        """A new client of this host."""
        return ComfyClient(self.url)

    def __enter__(self) -> Host:
        chosen = self.port is not None
        if chosen and not _is_free(self.port):
            raise LaunchError(f"port {self.port} is in use. Choose another with --port, or leave --port out.")
        try:
            for _ in range(3):
                self.port = self.port if chosen else free_port()
                self._start()
                if self._wait_until_ready():
                    return self
                self.stop()
                if chosen or "address already in use" not in self.log_tail(60).lower():
                    break
            raise LaunchError(self._why_not())
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def command(self) -> list[str]:
        """The host's command line."""
        scratch = self._scratch.name if self._scratch else tempfile.gettempdir()
        return [
            str(self.python), str(self.comfyui / "main.py"),
            "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(self.base), "--temp-directory", scratch,
            # The default database lies inside the host's folder, and newer hosts lock it
            "--database-url", f"sqlite:///{Path(scratch) / 'comfyui.db'}",
            "--disable-auto-launch", "--disable-api-nodes",
            "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK,
            *(["--cpu"] if self.cpu else []), *self.options,
        ]  # fmt: skip

    def _start(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="pixart-host-", ignore_cleanup_errors=True)
        environ = dict(environment(), PYTHONUNBUFFERED="1")
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environ.pop(name, None)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                cwd=self.base, env=environ, **_detached(),
            )  # fmt: skip

    def _wait_until_ready(self) -> bool:
        """True once the host answers with this pack loaded, False if it ended or took too long."""
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                return False
            with contextlib.suppress(OSError, urllib.error.URLError, ValueError):
                return PROBE_NODE in self.client.get_json(f"/object_info/{PROBE_NODE}")
            time.sleep(0.1)
        return False

    def log_tail(self, lines: int = 25) -> str:
        """The end of the host's log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        return ""

    def _why_not(self) -> str:
        """What the log says about a failed start, and what to do about it."""
        text = self.log_tail(400)
        if match := re.search(r"(?:ModuleNotFoundError|ImportError): .*", text):
            remedy = f"{match.group(0)}. The environment does not fit this ComfyUI: delete .venv and run again."
        elif PACK in text and "IMPORT FAILED" in text:
            remedy = "this pack did not import in that ComfyUI; the log names the reason. Update ComfyUI (0.3.64 or later)."
        elif "out of memory" in text.lower():
            remedy = "the GPU is full. Close other programs or add --cpu."
        else:
            remedy = f"see the whole log in {self.log}; another ComfyUI can be tried with COMFYUI_PATH."
        return f"ComfyUI in {self.comfyui} did not start. The end of its log:\n{self.log_tail()}\n\nWhat to do: {remedy}"

    def stop(self) -> None:
        """End the host and everything it started; harmless when it is not running."""
        process, self.process = self.process, None
        try:
            if process is not None:
                _end(process)
        finally:
            if self._scratch is not None:
                self._scratch.cleanup()
                self._scratch = None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _detached() -> dict[str, object]:
    """Popen arguments: own process group, and on Linux death of the parent ends the child too."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        death_signal = 1  # PR_SET_PDEATHSIG
        return {"start_new_session": True, "preexec_fn": lambda: libc.prctl(death_signal, signal.SIGTERM)}
    return {"start_new_session": True}


def _end(process: subprocess.Popen[bytes], patience: float = 10) -> None:
    """Terminate a process group, then kill what is left."""
    for name in ("SIGTERM", "SIGKILL"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "nt":
                process.terminate()
            else:
                os.killpg(process.pid, getattr(signal, name))
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that `with` blocks clean up."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), leave) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)

