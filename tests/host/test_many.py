"""`generate --on comfy` through a real queue, and the graph that pictures of `generate --prompts` carry."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from launch.host import Host
from pixart import cli


def test_a_real_host_draws_nearly_what_this_process_draws(server: Host, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,seed,width,height\na red circle,1,256,256\na blue square,2,300,200\n", encoding="utf-8")
    usual = ["generate", "--prompts", str(tmp_path / "prompts.csv"), "--device", "cpu", "--steps", "20"]
    assert cli.main([*usual, "--output", str(tmp_path / "here")]) == 0
    assert cli.main([*usual, "--output", str(tmp_path / "there"), "--on", "comfy", "--hosts", server.url]) == 0
    for name, size in (("00001.png", (256, 256)), ("00002.png", (300, 200))):
        with Image.open(tmp_path / "here" / name) as here, Image.open(tmp_path / "there" / name) as there:
            assert here.size == there.size == size
            assert json.loads(here.info["prompt"]) == json.loads(there.info["prompt"])
            difference = np.abs(np.asarray(here, float) - np.asarray(there.convert("RGB"), float)).mean()
            other = np.abs(np.asarray(here, float) - np.asarray(there.convert("RGB"), float)[:, ::-1]).mean()
        assert difference < 12 and difference < other / 2, (name, difference, other)
