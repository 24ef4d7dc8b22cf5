"""quickstart.py as a user runs it, with the network cut off: the environment must be complete by now."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from launch import checkout, environment
from launch import host as launch
from tests.support.demo import ROOT

NOWHERE = "http://127.0.0.1:9"
OFFLINE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "PIP_INDEX_URL", "PIP_PROXY"), NOWHERE)
PROMPT = "a red circle above a blue square"


@pytest.fixture(autouse=True)
def installed() -> None:
    """Skips where quickstart.py would have to install first."""
    profiles = (environment.host_profile(checkout.find_comfyui(ROOT)), environment.standalone_profile())
    if not all(environment.Environment(ROOT / ".venv").is_ready(profile) for profile in profiles):
        pytest.skip("the environment was not made by quickstart.py --test")


def start(*arguments: str) -> subprocess.Popen[str]:
    """quickstart.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "quickstart.py", *arguments], cwd=ROOT, env=os.environ | OFFLINE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("way", [(), ("--standalone",)], ids=["comfyui", "standalone"])
def test_prompt_to_picture(tmp_path: Path, way: tuple[str, ...]) -> None:
    target = tmp_path / "picture.png"
    running = start(PROMPT, "--steps", "2", "--width", "300", "--height", "200", "--cpu", "--output", str(target), *way)
    out, err = running.communicate(timeout=500)
    assert running.returncode == 0, err
    assert out.strip().split("\n")[-1] == str(target)
    with Image.open(target) as image:
        assert image.width > image.height


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_serve_answers_on_loopback_until_it_is_ended(tmp_path: Path) -> None:
    port = launch.free_port()
    running = start(PROMPT, "--steps", "1", "--cpu", "--output", str(tmp_path / "p.png"), "--serve", "--port", str(port))
    try:
        assert running.stdout is not None
        lines = []
        while not any(f"http://127.0.0.1:{port}" in line for line in lines):
            line = running.stdout.readline()
            assert line, running.stderr.read() if running.stderr else ""
            lines.append(line)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert b"<html" in opener.open(f"http://127.0.0.1:{port}/", timeout=30).read().lower()
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=60)
        assert running.returncode == 128 + signal.SIGTERM
        time.sleep(0.5)
        with pytest.raises(OSError):
            opener.open(f"http://127.0.0.1:{port}/", timeout=5)
    finally:
        running.kill()
        running.wait()
