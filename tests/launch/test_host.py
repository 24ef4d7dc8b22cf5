"""Finding, starting and always stopping a ComfyUI, with a stand-in for it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import checkout, host
from launch.errors import LaunchError
from tests.support.launch import ROOT, make_comfyui

posix_only = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def test_the_order_in_which_a_comfyui_is_found(tmp_path: Path) -> None:
    around = make_comfyui(tmp_path / "around")
    pack = around / "custom_nodes" / "pack"
    standard = make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
    named = make_comfyui(tmp_path / "named")
    home = tmp_path / "home"
    assert checkout.find_comfyui(pack, {"COMFYUI_PATH": str(named)}, home) == named
    assert checkout.find_comfyui(pack, {}, home) == around
    assert checkout.find_comfyui(tmp_path / "elsewhere", {}, home) == standard
    assert checkout.find_comfyui(tmp_path / "elsewhere", {}, tmp_path) is None


def test_a_wrong_comfyui_path_is_an_error_not_a_fallback(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="no ComfyUI is there"):
        checkout.find_comfyui(tmp_path, {"COMFYUI_PATH": str(tmp_path)}, tmp_path)


def test_a_copy_of_the_host_is_whole_or_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_comfyui(tmp_path / "package" / "_comfyui")
    answer = subprocess.CompletedProcess([], 0, f"1.2.3\n{tmp_path / 'package'}\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    work = tmp_path / "work"

    def stopped(source: Path, target: Path, **_: object) -> None:
        shutil.copyfile(source / "main.py", target.with_name("main.py"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copytree", stopped)
        checkout.pypi_comfyui(Path(sys.executable), work)
    assert list(work.iterdir()) == []
    copy = checkout.pypi_comfyui(Path(sys.executable), work)
    assert checkout.is_comfyui(copy) and list((copy / "__pycache__").glob("main.*.pyc"))  # or every start would compile it
    assert [path.name for path in work.iterdir()] == ["ComfyUI-1.2.3"]


@pytest.mark.parametrize(
    "build, driver, asked",
    [("2.9.0", False, False), ("2.9.0", True, True), ("2.9.0+cpu", False, False), ("2.9.0+cu130", False, False),
     ("2.9.0+rocm6.4", False, True), ("2.9.0+xpu", False, True), (None, False, True)],
)  # fmt: skip
def test_torch_is_asked_for_the_device_where_its_build_does_not_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str | None, driver: bool, asked: bool
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(host, "_has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "xpu\n", ""))
    packages = tmp_path / ".venv/lib/python3.12/site-packages"
    packages.mkdir(parents=True)
    if build:
        (packages / f"torch-{build}.dist-info").mkdir()
    assert host.accelerator(tmp_path / ".venv/bin/python") == ("xpu" if asked else "cpu")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A prepared base directory with one model linked in."""
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"weights")
    folder = tmp_path / "base"
    checkout.BaseDirectory(folder).prepare(ROOT, {"vae": [model]})
    return folder


def test_the_base_directory_shows_pack_models_and_workflows(base: Path) -> None:
    assert (base / "custom_nodes" / checkout.PACK / "quickstart.py").samefile(ROOT / "quickstart.py")
    assert (base / "models/vae/m.safetensors").read_bytes() == b"weights"
    assert (base / "user/default/workflows/demo.json").is_file()


def test_preparing_twice_replaces_links_that_point_elsewhere(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "m.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"newer")
    checkout.BaseDirectory(base).prepare(ROOT, {"vae": [other]})
    assert (base / "models/vae/m.safetensors").read_bytes() == b"newer"


def is_alive(process: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds: float = 15) -> bool:
    """Poll `condition` for a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def make_host(tmp_path: Path, base: Path, **options: object) -> host.Host:
    return host.Host(Path(sys.executable), make_comfyui(tmp_path / "ComfyUI"), base, cpu=True, **options)


def test_the_host_listens_on_loopback_only_and_is_stopped_after_an_exception(tmp_path: Path, base: Path) -> None:
    server = make_host(tmp_path, base)
    with pytest.raises(RuntimeError, match="inside"), server:
        process = server.process
        command = server.command()
        assert command[command.index("--listen") + 1] == "127.0.0.1"
        assert "--cpu" in command
        raise RuntimeError("inside")
    assert process is not None and process.poll() is not None


def test_a_host_that_fails_shows_its_log_and_a_remedy(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.raises(LaunchError, match=r"No module named 'torchsde'(?s:.*)delete .venv"), make_host(tmp_path, base):
        pass


def test_a_host_that_never_answers_is_stopped(tmp_path: Path, base: Path) -> None:
    server = make_host(tmp_path, base, start_timeout=1)
    (server.comfyui / "main.py").write_text("import time\ntime.sleep(100)\n")
    with pytest.raises(LaunchError, match="did not start"), server:
        pass
    assert server.process is None


def test_a_port_in_use_is_named(tmp_path: Path, base: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} is in use"), make_host(tmp_path, base, port=port):
            pass


KEEPER = """
import signal, sys, time
from pathlib import Path
from launch import host
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
with host.signals_raise(), host.Host(Path(sys.executable), Path(sys.argv[1]), Path(sys.argv[2]), cpu=True):
    print("up", flush=True)
    time.sleep(100)
"""


@posix_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_quickstart_ends_its_host(tmp_path: Path, base: Path, number: signal.Signals) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a child that its parent was killed")
    comfyui = make_comfyui(tmp_path / "ComfyUI")
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(comfyui), str(base)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert keeper.stdout is not None and keeper.stdout.readline() == b"up\n"
        server = int((base / "pid").read_text())
        assert is_alive(server)
        keeper.send_signal(number)
        keeper.wait(20)
        assert wait_until(lambda: not is_alive(server))
    finally:
        keeper.kill()
        keeper.stdout.close()
