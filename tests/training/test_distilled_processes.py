"""Distillation in two gloo processes: the weights of one, by DDP and by FSDP2, the trained companion's too."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from pixart.training.loop import Loop
from pixart.training.recipe import load_recipe
from pixart.training.run import train
from pixart.training.state import newest_state, stored_tensors

ROOT = Path(__file__).resolve().parents[2]
DMD = {"name": "dmd", "fake_updates": 2}
KINDS = {
    "dmd-ddp": (DMD, "full", {"stages.0.accumulation": 2}),
    "dmd-fsdp": (DMD, "full", {"shard": True}),
    "dmd-lora-ddp": (DMD, {"name": "lora", "rank": 2}, {}),
    "dmd-lora-fsdp": (DMD, {"name": "lora", "rank": 2}, {"shard": True}),
    "lcm-fsdp": ({"name": "lcm", "guidance": 3}, "full", {"shard": True, "checkpoint_blocks": True}),
}


def changes_of(folder: Path, kind: str, base: Path, more: dict) -> list[str]:
    objective, method, _ = KINDS[kind]
    values = {"objective": objective, "method": method, "initialize": str(base), **more}
    values |= {"run_dir": str(folder), "output": f"{folder}.safetensors"}
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


@pytest.fixture
def launched(recipe_path, tmp_path: Path) -> tuple[Path, Path]:
    """The recipe and the weights that are distilled, after all runs of two processes."""
    base = train(recipe_path(steps=2, run_dir=str(tmp_path / "base"), output=str(tmp_path / "base.safetensors")))
    recipe = recipe_path(steps=2, warmup_steps=0, caption_dropout=0.0)
    runs = [(str(recipe), changes_of(tmp_path / kind, kind, base, KINDS[kind][2]), None) for kind in KINDS]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    script = [str(ROOT / "tests/support/two_processes.py"), str(tmp_path / "runs.json")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe, base


def test_two_processes_distil_as_one_does(launched: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, base = launched
    for kind in KINDS:
        alone = Loop(load_recipe(recipe, changes_of(tmp_path / f"{kind}-alone", kind, base, {})))
        alone.run()
        resumed = Loop(load_recipe(recipe, changes_of(tmp_path / kind, kind, base, {})))
        resumed.resume(newest_state(tmp_path / kind), accept_changes=True)
        left, right = alone._tensors(), resumed._tensors()
        assert left.keys() == right.keys() == stored_tensors(newest_state(tmp_path / kind)).keys()
        compared = [name for name in left if ".network." in name or name.startswith(("network.", "objective."))]
        assert any(name.startswith("companion.fake.") for name in compared) == kind.startswith("dmd")
        for name in compared:
            torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-5, msg=partial("{} {}: {}".format, kind, name))
