"""States and recipes that a run can't go on with: each is a sentence that names what is wrong, and nothing is lost."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.errors import CheckpointError, ConfigError, PixArtError
from pixart.training.loop import Loop
from pixart.training.recipe import load_recipe
from pixart.training.run import train
from pixart.training.sources import scenes
from pixart.training.state import newest_state
from tests.support.tiny_training import TwoPictures

ROOT = Path(__file__).resolve().parents[2]


def state_of(folder: Path) -> Path:
    found = newest_state(folder / "run")
    assert found is not None
    return found


def cut(folder: Path) -> None:
    file = next(state_of(folder).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:2000])


def of_another_model(folder: Path) -> None:
    save_file({"network.blocks.0.attn.qkv.weight": torch.zeros(2)}, next(state_of(folder).glob("*.safetensors")))


def without_optimizer(folder: Path) -> None:
    file = next(state_of(folder).glob("*.safetensors"))
    tensors = load_file(file)
    # torch's own format keeps where each tensor lies in the file's metadata
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: value for name, value in tensors.items() if not name.startswith("network.blocks.1")}, file, metadata)


def half_written(folder: Path) -> None:
    (state_of(folder) / "info.json").write_text('{"step": 1, "rec')


def without_step(folder: Path) -> None:
    info = state_of(folder) / "info.json"
    info.write_text(json.dumps({name: value for name, value in json.loads(info.read_text()).items() if name != "step"}))


def with_files_gone(folder: Path) -> None:
    for file in state_of(folder).glob("*.safetensors"):
        file.unlink()


def no_object(folder: Path) -> None:
    (state_of(folder) / "info.json").write_text("[1, 2]")


def swapped_output(folder: Path) -> None:
    shutil.rmtree(folder / "run")


BAD = {
    "a file that was cut": (cut, [], CheckpointError, "is damaged.*--overwrite"),
    "weights of another model": (of_another_model, [], CheckpointError, "belongs to another model"),
    "tensors that are missing": (without_optimizer, [], CheckpointError, r"belongs to another model: found network.blocks.1.*missing"),
    "info that was half written": (half_written, [], CheckpointError, "info.json is damaged.*--overwrite"),
    "info without a step": (without_step, [], CheckpointError, "info.json is damaged.*step"),
    "info that is a list": (no_object, [], CheckpointError, "info.json is damaged"),
    "files that are gone": (with_files_gone, [], CheckpointError, "belongs to another model|is damaged"),
    "an output without its run": (swapped_output, [], ConfigError, "out.safetensors exists.*no saved state.*--overwrite"),
    "another seed": (None, ["seed=9"], ConfigError, "seed: 0 -> 9.*--accept-changes"),
    "another optimizer": (None, ["optimizer=came"], ConfigError, 'optimizer: "adamw" -> "came"'),
    "another method": (None, ["method.name=kv", "method.blocks=[[1,2]]"], ConfigError, "method.name"),
}


@pytest.mark.parametrize("case", BAD)
def test_states_that_can_not_go_on_are_named(recipe_path: Callable[..., Path], tmp_path: Path, case: str) -> None:
    damage, changes, kind, message = BAD[case]
    recipe = recipe_path(steps=4)
    out = train(recipe, stop_after=0)
    before = out.read_bytes()
    if damage is not None:
        damage(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        train(recipe, changes)
    assert "\n" not in str(caught.value) and isinstance(caught.value, PixArtError)
    assert out.read_bytes() == before
    train(recipe, overwrite=True, stop_after=0)  # as the sentence says
    assert state_of(tmp_path).name == "00000001"


def test_a_state_of_another_optimizer_goes_on_when_told(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_path(steps=3)
    train(recipe, stop_after=0)
    train(recipe, ["optimizer=muon"], accept_changes=True)
    assert state_of(tmp_path).name == "00000003"


def test_another_runs_output_is_not_overwritten(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    other = train(recipe_path(steps=1, run_dir=str(tmp_path / "other"), output=str(tmp_path / "other.safetensors")))
    recipe = recipe_path(steps=3)
    train(recipe, stop_after=0)
    with pytest.raises(ConfigError, match="other.safetensors exists"):
        train(recipe, [f"output={other}"])
    assert train(recipe, [f"output={tmp_path / 'new.safetensors'}"]).is_file()


def test_overwriting_leaves_nothing_of_the_former_run(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_path(steps=3, log_every=1)
    train(recipe)
    with pytest.raises(ConfigError, match="learning_rate"):  # what fails to begin removes nothing
        train(recipe, ["stages.0.learning_rate=-1"], overwrite=True)
    assert state_of(tmp_path).name == "00000003"
    train(recipe, overwrite=True, stop_after=0)
    assert [folder.name for folder in (tmp_path / "run/states").iterdir()] == ["00000001"]
    assert [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()] == [1]


def test_the_same_step_is_written_again_beside_the_old_state(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_path(steps=2)
    train(recipe)
    for name in ("00000002-again", "00000002"):
        train(recipe)
        assert [folder.name for folder in (tmp_path / "run/states").iterdir()] == [name]


def test_pictures_that_vanish_come_or_change_are_named(recipe_path: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept(TwoPictures):
        lines = ["a b.png 1 x", "c.png 2 x", "d.png 3 x"]

        def contents(self) -> list[str]:
            return self.lines

    monkeypatch.setattr(scenes, "Part", Kept)
    recipe = recipe_path(steps=6)
    train(recipe, stop_after=0)
    train(recipe, stop_after=0)
    Kept.lines = ["c.png 2 x", "d.png 3 other", "e.png 4 x"]
    with pytest.raises(ConfigError, match="gone a b.png; new e.png; changed d.png.*--accept-changes"):
        train(recipe)
    train(recipe, accept_changes=True, stop_after=0)
    train(recipe, stop_after=0)  # those are its pictures now
    assert state_of(tmp_path).name == "00000004"


def test_the_log_of_steps_after_the_last_state_is_made_again(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_path(steps=3, log_every=1)
    train(recipe, stop_after=0)
    with (tmp_path / "run/log.jsonl").open("a") as log:
        log.write('{"step": 2, "loss": 1}\n{"step": 3, "lo')  # of a killed run
    train(recipe)
    assert [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes of the support module have: sums over pixels are split among threads, and round as they are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_kills_at_any_moment_end_with_the_weights_of_an_unbroken_run(one_thread: None, recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_path(steps=40, save_every=3)
    whole = load_file(train(recipe, [f"run_dir={tmp_path / 'whole'}", f"output={tmp_path / 'whole.safetensors'}"]))
    (tmp_path / "runs.json").write_text(json.dumps([[str(recipe), [], None]]))
    command = [sys.executable, str(ROOT / "tests/support/two_processes.py"), str(tmp_path / "runs.json")]
    killed = 0
    for wait in (0.0, 0.05, 0.13):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = newest_state(tmp_path / "run")
        limit = time.monotonic() + 120
        while process.poll() is None and newest_state(tmp_path / "run") == began and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        killed += process.wait() == -9
    assert killed
    left = newest_state(tmp_path / "run")
    assert left is not None and int(left.name[:8]) > 0
    found = load_file(train(recipe))
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_run_by_hand_can_be_resumed_from_python(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path(steps=2))
    Loop(recipe).run(stop_after=0)
    loop = Loop(recipe)
    loop.resume(state_of(tmp_path))
    assert loop.step == 1


def test_a_run_of_a_former_version_goes_on_without_the_fields_that_it_did_not_have(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_path(steps=4, save_every=1)
    train(recipe, stop_after=0)
    path = state_of(tmp_path) / "info.json"
    info = json.loads(path.read_text())
    for part, name in ((info["recipe"], "trim_memory"), (info["recipe"], "dropped_mask"), (info["recipe"]["source"], "hints"), (info["recipe"]["objective"], "min_snr")):
        del part[name]
    path.write_text(json.dumps(info))
    train(recipe, stop_after=0)
    assert state_of(tmp_path).name == "00000002"
    with pytest.raises(ConfigError, match='trained with another recipe: dropped_mask: "empty" -> "caption"'):
        train(recipe, ["dropped_mask=caption"])
