"""Several workers: the same files as one gives, to the byte, and nothing lost when one is killed."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image

from demo import WEIGHTS
from demo.data.captions import caption
from demo.data.scenes import render, sample_scene
from pixart import cli
from pixart.errors import UnsupportedError
from pixart.scale import on_ray
from pixart.scale.where import RAY, TORCHRUN, Where, run
from tests.support.counted_stage import CountedStage
from tests.support.tiny_vlm import save_vlm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def own_tests_first() -> Iterator[None]:
    """New processes import `tests.support` by name; a host that other tests put first on sys.path has a `tests` of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with two workers of one core each."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    on_ray.connect(ray, Where(RAY, 2))
    yield
    ray.shutdown()


def make_pictures(folder: Path, count: int = 6) -> None:
    """Scenes of the demo, with captions as text."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    for number in range(count):
        scene = sample_scene(rng)
        Image.fromarray((render(scene, 64, 64) * 255).astype(np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.alt").write_text(caption(scene, rng).text, encoding="utf-8")


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob(pattern))}
    assert found
    return found


def command(*arguments: object) -> None:
    assert cli.main([str(value) for value in arguments]) == 0


def test_captions_by_a_cluster_are_those_of_one_process(cluster: None, tmp_path: Path) -> None:
    model = save_vlm(tmp_path / "model")
    for place, where in (("a", ["--on", "local"]), ("b", ["--on", RAY])):
        make_pictures(tmp_path / place)
        options = ["--batch-size", 2, "--max-tokens", 6, "--alt-text", ".alt", "--temperature", 1, "--device", "cpu"]
        command("caption", tmp_path / place, "--model", model, *options, *where)
    assert files(tmp_path / "a", "*.txt") == files(tmp_path / "b", "*.txt")


def test_features_by_a_cluster_are_those_of_one_process(cluster: None, tmp_path: Path) -> None:
    make_pictures(tmp_path / "data", 20)
    for path in (tmp_path / "data").glob("*.alt"):
        path.rename(path.with_suffix(".txt"))
    recipe = {
        "variant": "demo", "method": "full", "objective": "denoise", "output": "o", "run_dir": str(tmp_path / "run"), "source": "pictures",
        "stages": [{"base_size": 64, "steps": 1, "batch_size": 2, "learning_rate": 1.0}],
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    places = ["--data", tmp_path / "data", "--text-encoder", WEIGHTS["text_encoders"], "--vae", WEIGHTS["vae"]]
    for on in ("local", RAY):
        command("extract", tmp_path / "recipe.json", *places, "--cache", tmp_path / on, "--on", on, "--device", "cpu")
    assert files(tmp_path / "local", "*.safetensors") == files(tmp_path / RAY, "*.safetensors")


@pytest.mark.parametrize("on", [RAY, TORCHRUN])
def test_pictures_by_two_workers_are_those_of_one_process(request: pytest.FixtureRequest, tmp_path: Path, on: str) -> None:
    workers = ["--workers", "2"]
    if on == RAY:
        request.getfixturevalue("cluster")
    (tmp_path / "prompts.csv").write_text("prompt,seed\na red circle,1\na blue square,2\na green ring,3\n", encoding="utf-8")
    options = ["--prompts", tmp_path / "prompts.csv", "--steps", 2, "--batch-size", 2, "--device", "cpu"]
    command("generate", *options, "--output", tmp_path / "one")
    command("generate", *options, "--output", tmp_path / "two", "--on", on, *workers)
    for pattern in ("*.png", "index.jsonl"):
        assert files(tmp_path / "one", pattern) == files(tmp_path / "two", pattern)


def test_a_killed_worker_of_a_cluster_loses_nothing_and_a_full_disk_ends_the_run(cluster: None, tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 8, 1, {3: "kill"})
    run([stage], Where(RAY, 2))
    assert stage.files() == set(range(8)) and stage.worked() == list(range(8)) and (tmp_path / "kill-3").exists()
    (tmp_path / "full").mkdir()
    full = CountedStage(tmp_path / "full", 4, 1, {2: "disk"})
    with pytest.raises(UnsupportedError, match="No space left on device"):
        run([full], Where(RAY, 1))
    assert full.files() < {0, 1, 2, 3} and 2 not in full.files()


def test_a_killed_process_of_torchrun_loses_nothing(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 8, 2, {5: "kill"})
    run([stage], Where(TORCHRUN, 2))
    assert stage.files() == set(range(8)) and (tmp_path / "kill-5").exists()
    assert [number for number in range(8) if stage.worked().count(number) > 2] == []
