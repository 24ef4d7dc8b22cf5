"""`generate --prompts` with a tiny random pipeline, through the command line in this process."""
from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")
from PIL import Image
from safetensors.torch import load_file, save_file

import pixart
from pixart import cli
from pixart.app.settings import from_text
from pixart.errors import UnsupportedError
from pixart.scale import draw_stage, encode_stage, many, on_ray
from pixart.scale.book import FOLDER
from pixart.scale.encode_stage import EncodeStage, TextSettings
from pixart.scale.graph import GraphModels, picture_graph
from pixart.scale.many import summary
from pixart.scale.prompt_rows import Picture
from tests.support.queue_host import queue_hosts
from tests.support.tiny_pipeline import make_parts

ROWS = [
    {"prompt": "a red circle", "width": 120, "height": 64, "seed": 3},
    {"prompt": "a green square on a plain background", "width": 120, "height": 64, "negative": "blue"},
    {"prompt": "a red circle", "width": 64, "height": 120, "images": 2},
    {"prompt": "a cat", "width": 120, "height": 66, "steps": 2, "guidance": 1},
]
FILES = ["00001.png", "00002.png", "00003-1.png", "00003-2.png", "00004.png"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("pipeline")).folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


def command(prompts: Path, models: Path, output: Path, *options: object) -> int:
    """Runs the command; `options` after the usual ones."""
    usual = ["generate", "--prompts", prompts, "--transformer", models, "--output", output, "--steps", 1, "--device", "cpu"]
    return cli.main([str(value) for value in (*usual, *options)])


@pytest.fixture
def generate(models: Path, prompts: Path, tmp_path: Path):
    """The command in this test's folder."""
    return lambda *options, output=tmp_path / "out": command(prompts, models, output, *options)


@pytest.fixture(scope="module")
def first_run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is done, of one run for all tests."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert command(folder / "prompts.jsonl", models, folder / "out") == 0
    return folder / "out"


@pytest.fixture
def drawn(first_run: Path, tmp_path: Path) -> dict[str, bytes]:
    """Puts that folder where this test draws; its files."""
    shutil.copytree(first_run, tmp_path / "out")
    return content(tmp_path / "out")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which workers were opened."""
    seen: list[str] = []
    for module, kind in ((encode_stage, "EncodeWorker"), (draw_stage, "DrawWorker")):
        original = getattr(module, kind)
        monkeypatch.setattr(module, kind, lambda *a, kind=kind, original=original: seen.append(kind) or original(*a))
    return seen


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def index(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()]


def picture(path: Path) -> Image.Image:
    with Image.open(path) as found:
        found.load()
        return found


def test_pictures_are_what_the_pipeline_draws_in_the_same_batches(first_run, models) -> None:
    found = {name: np.asarray(picture(first_run / name)) for name in FILES}
    pipe = pixart.Pipeline.from_files(models, models, models)
    options = {"use_bins": True, "progress": False, "output": "pil"}
    first = pipe([ROWS[0]["prompt"], ROWS[1]["prompt"]], ["", "blue"], 1, seed=[3, 1], width=120, height=64, **options)
    second = pipe(["a red circle"] * 2, steps=1, seed=[2, 3], width=64, height=120, **options)
    third = pipe("a cat", steps=2, guidance=1, seed=[4], width=120, height=66, **options)
    for name, expected in zip(FILES, [*first, *second, *third], strict=True):
        assert np.abs(found[name].astype(int) - np.asarray(expected)).max() <= 1, name  # T5's batches differ, and so their rounding
    assert found["00004.png"].shape == (66, 120, 3)


def test_the_index_and_the_pictures_tell_their_settings(first_run) -> None:
    rows = index(first_run)
    assert [row["file"] for row in rows] == FILES and {row["status"] for row in rows} == {"drawn"}
    assert rows[1] == {
        "file": "00002.png", "status": "drawn", "drawn_size": rows[0]["drawn_size"], "row": 2, "prompt": ROWS[1]["prompt"], "negative": "blue",
        "seed": 1, "width": 120, "height": 64, "steps": 1, "guidance": 4.5, "tokens": rows[1]["tokens"],
    }  # fmt: skip
    assert rows[0]["tokens"] > 1 and rows[0]["drawn_size"] != [120, 64]
    texts = picture(first_run / "00002.png").info
    settings, model = from_text(texts["pixart"])  # as the web page reads it
    assert (settings.prompt, settings.negative, settings.seed, settings.steps) == (ROWS[1]["prompt"], "blue", 1, 1)
    assert model.startswith("pipeline")  # the folder's name
    graph = json.loads(texts["prompt"])
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert kinds["KSampler"]["seed"] == 1 and kinds["PixArtCropToSize"] | {"image": 0} == {"image": 0, "width": 120, "height": 64}
    assert [node["inputs"]["text"] for node in graph.values() if node["class_type"] == "PixArtTextEncode"] == [ROWS[1]["prompt"], "blue"]


def test_another_run_draws_only_what_is_missing_to_the_same_bytes(generate, drawn, tmp_path, loads, capsys) -> None:
    (tmp_path / "out/00002.png").unlink()
    (tmp_path / "out/index.jsonl").unlink()
    assert generate() == 0
    assert content(tmp_path / "out") == drawn and loads == ["DrawWorker"]
    assert generate() == 0 and loads == ["DrawWorker"]
    assert "5 of 5 pictures are in" in capsys.readouterr().out


def test_t5_is_gone_before_the_transformer_comes(generate, tmp_path, monkeypatch) -> None:
    events, original = [], encode_stage.EncodeWorker

    class Watched(original):
        def __del__(self) -> None:
            events.append("T5 is gone")

    monkeypatch.setattr(encode_stage, "EncodeWorker", Watched)
    opened = draw_stage.DrawWorker.pipe.fget
    monkeypatch.setattr(draw_stage.DrawWorker, "pipe", property(lambda self: events.append("transformer") or opened(self)))
    assert generate("--batch-size", 1) == 0
    assert events[:2] == ["T5 is gone", "transformer"]


def test_a_run_that_was_killed_before_it_noted_a_batch_keeps_the_pictures_it_wrote(generate, drawn, tmp_path) -> None:
    for record in (tmp_path / "out" / FOLDER / "pictures").rglob("*.json"):
        record.unlink()
    stamp = (tmp_path / "out/00001.png").stat().st_mtime_ns
    assert generate() == 0
    assert content(tmp_path / "out") == drawn and (tmp_path / "out/00001.png").stat().st_mtime_ns == stamp


def test_new_rows_are_added_and_changed_ones_refused_unless_told(generate, prompts, drawn, tmp_path, capsys) -> None:
    with prompts.open("a", encoding="utf-8") as file:
        file.write('\n{"prompt": "a dog", "width": 120, "height": 64}')
    assert generate() == 0
    added = content(tmp_path / "out")
    assert {name: added[name] for name in FILES} == {name: drawn[name] for name in FILES} and "00006.png" not in added
    assert "00005.png" in added and len(index(tmp_path / "out")) == 6
    assert generate("--steps", 3) == 2
    message = capsys.readouterr().err
    assert "holds 00001.png, 00002.png, 00003-1.png and 2 more, drawn from other prompts, settings or models" in message
    assert content(tmp_path / "out") == added
    assert generate("--steps", 3, "--overwrite") == 0
    again = content(tmp_path / "out")
    assert again["00001.png"] != added["00001.png"] and again["00004.png"] == added["00004.png"]  # which names its steps itself
    assert generate() == 2


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_pictures_of_another_model_are_not_taken_for_this_ones(generate, models, drawn, tmp_path, capsys, part) -> None:
    other = shutil.copytree(models, tmp_path / "other")
    for path in (other / part).glob("*.safetensors"):
        weights = load_file(path)
        save_file({name: value + 1e-3 if value.is_floating_point() else value for name, value in weights.items()}, path, {"format": "pt"})
    assert generate(f"--{part.replace('_', '-')}", other) == 2
    assert "and 2 more, drawn from other prompts, settings or models" in capsys.readouterr().err
    assert content(tmp_path / "out") == drawn


def test_a_picture_that_other_prompts_drew_since_is_not_taken_for_the_first_ones(generate, prompts, drawn, tmp_path, capsys) -> None:
    first = prompts.read_text(encoding="utf-8")
    (tmp_path / "out/00001.png").unlink()
    prompts.write_text(first.replace("a red circle", "a cube", 1), encoding="utf-8")
    assert generate() == 0 and content(tmp_path / "out")["00001.png"] != drawn["00001.png"]
    prompts.write_text(first, encoding="utf-8")
    assert generate() == 2 and "out holds 00001.png, drawn from other prompts" in capsys.readouterr().err
    assert generate("--overwrite") == 0 and content(tmp_path / "out") == drawn


def test_the_summary_counts_what_is_there() -> None:
    rows = [{"status": status, "file": "a.png", "row": 1, "error": "no memory"} for status in ("drawn", "failed", "missing")]
    assert summary(rows, Path("out")).startswith("1 of 3 pictures are in out;")


def test_the_summary_says_where_much_of_the_disk_went(tmp_path, monkeypatch) -> None:
    encode = EncodeStage(tmp_path, TextSettings(Path("t5.safetensors")), ["a cube", "a ball"])
    for prompt, size in (("a cube", 70), ("a ball", 40)):
        encode.file_of(prompt).parent.mkdir(parents=True)
        encode.file_of(prompt).write_bytes(bytes(size))
    assert len(summary([], tmp_path, encode).splitlines()) == 1
    monkeypatch.setattr(many, "WORTH_A_WORD", 110)
    assert summary([], tmp_path, encode).splitlines()[1] == (
        f"T5 states for further pictures of these prompts take 0.0 GB in {encode.folder}; delete it when you are done."
    )


def test_a_file_that_is_no_picture_of_ours_is_never_replaced_unasked(generate, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/00002.png").write_bytes(b"mine")
    assert generate() == 2
    assert "out holds 00002.png, drawn from other" in capsys.readouterr().err
    assert content(tmp_path / "out") == {"00002.png": b"mine"}


def test_a_row_that_fails_is_tried_alone_listed_and_tried_again_by_the_next_run(generate, tmp_path, capsys, monkeypatch) -> None:
    original, calls = draw_stage.DrawWorker._draw, []

    def draw(self, items, texts):
        calls.append([item.file for item in items])
        if "00002.png" in calls[-1]:
            raise RuntimeError("CUDA out of memory")
        return original(self, items, texts)

    monkeypatch.setattr(draw_stage.DrawWorker, "_draw", draw)
    assert generate() == 2
    shown = capsys.readouterr()
    assert "failed: 00002.png, row 2: CUDA out of memory" in shown.out and "1 of 5 pictures failed" in shown.err
    assert calls[:3] == [["00001.png", "00002.png"], ["00001.png"], ["00002.png"]]
    assert [row["status"] for row in index(tmp_path / "out")] == ["drawn", "failed", "drawn", "drawn", "drawn"]
    monkeypatch.setattr(draw_stage.DrawWorker, "_draw", original)
    assert generate() == 0
    assert {row["status"] for row in index(tmp_path / "out")} == {"drawn"}


def test_a_full_disk_is_one_sentence_and_what_was_drawn_stays_listed(generate, tmp_path, capsys, monkeypatch) -> None:
    original = draw_stage.save_picture

    def save(stage, picture, image):
        if picture.file == "00003-2.png":
            raise OSError(errno.ENOSPC, "No space left on device", str(stage.place))
        original(stage, picture, image)

    monkeypatch.setattr(draw_stage, "save_picture", save)
    assert generate() == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [row["status"] for row in index(tmp_path / "out")] == ["drawn", "drawn", "missing", "missing", "missing"]
    monkeypatch.setattr(draw_stage, "save_picture", original)
    assert generate() == 0
    assert {row["status"] for row in index(tmp_path / "out")} == {"drawn"}


def test_pictures_of_the_size_asked_for(generate, tmp_path) -> None:
    assert generate("--no-bins") == 0
    assert [row["drawn_size"] for row in index(tmp_path / "out")][0] == [120, 64]
    graph = json.loads(picture(tmp_path / "out/00004.png").info["prompt"])
    assert graph["6"]["class_type"] == "EmptyLatentImage" and "10" not in graph


def test_other_samplers_have_another_graph_or_none() -> None:
    picture_of_row = Picture("a.png", 1, "a", "", 1, 256, 256, 4, 1.0)
    models = GraphModels("t", "e", "v", base_size=256)
    graph = picture_graph(picture_of_row, models, "lcm")
    assert graph["7"]["inputs"]["sampler_name"] == "lcm" and graph["7"]["inputs"]["model"] == ["11", 0]
    assert graph["11"]["class_type"] == "ModelSamplingDiscrete" and "10" not in graph
    assert picture_graph(picture_of_row, models, "one-step") is None and picture_graph(picture_of_row, models, schedule="optimized") is None


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", "red"], "Give --prompt with one or more texts, or --prompts with a file"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--workers", "2"], "--workers is 2, but --on local is one process"),
        (["--address", "auto"], "--address is for a Ray cluster, but --on is local"),
        (["--seed", "-1"], "--seed is -1; expected 0 to 18446744073709551615"),
        (["--sampler", "one-step"], "The sampler one-step was given 2 steps; expected 1 step"),
        (["--hosts", "a"], "--hosts and --graph are for --on comfy"),
        (["--text-encoder", "absent"], "absent does not exist"),
        (["--on", "ray", "--address", "127.0.0.1:9"], "No Ray cluster answers at 127.0.0.1:9"),
    ],
)
def test_what_can_not_be_is_said_before_anything_is_drawn(generate, tmp_path, capsys, options, message) -> None:
    if "ray" in options:
        pytest.importorskip("ray")
    assert generate(*options) == 2
    assert message in capsys.readouterr().err and not list((tmp_path / "out").glob("*.png"))


def test_a_width_of_nothing_is_not_the_usual_one(models, tmp_path, capsys) -> None:
    (tmp_path / "a.txt").write_text("red", encoding="utf-8")
    assert command(tmp_path / "a.txt", models, tmp_path / "out", "--width", 0) == 2
    assert "a.txt: line 1: width is 0" in capsys.readouterr().err


def test_an_address_at_which_something_else_listens_is_no_cluster() -> None:
    with queue_hosts("") as hosts, pytest.raises(UnsupportedError, match=r"No Ray cluster answers at .*what listens there is not Ray"):
        on_ray._check_address(hosts[0].address)
    with pytest.raises(UnsupportedError, match="No Ray cluster answers at 127.0.0.1:99999"):
        on_ray._check_address("127.0.0.1:99999")


def test_an_output_that_is_a_file_and_few_prompts_on_many_machines(generate, prompts, capsys) -> None:
    assert generate(output=prompts) == 2
    assert "which is a file; expected a folder" in capsys.readouterr().err
    assert cli.main(["generate", "--prompt", "red", "--on", "torchrun"]) == 2
    assert "--on torchrun is for many prompts" in capsys.readouterr().err
