"""The command line, in process; one run through `python -m`."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")
from PIL import Image
from safetensors.torch import load_file, save_file

import pixart
from pixart import cli
from pixart.samplers import OneStep
from pixart.sampling_note import dmd_note, note_metadata
from tests.support.tiny_pipeline import make_parts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("pipeline")).folder


def test_generate_from_a_pipeline_folder(folder, tmp_path, capsys):
    out = tmp_path / "new" / "red.png"
    run = ["generate", "--prompt", "a red circle", "--steps", "1", "--width", "120", "--height", "64"]
    assert cli.main([*run, "--transformer", str(folder), "--seed", "3", "--output", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as first:
        assert first.size == (120, 64)
        first_bytes = first.tobytes()
    expected = pixart.Pipeline.from_files(folder, folder, folder)("a red circle", steps=1, width=120, height=64, seed=3, progress=False)
    assert expected[0].tobytes() == first_bytes


def test_generate_with_another_sampler_takes_the_steps_it_is_made_for(folder, tmp_path, capsys):
    out = tmp_path / "one.png"
    run = ["generate", "--prompt", "a red circle", "--width", "120", "--height", "64", "--transformer", str(folder), "--seed", "3"]
    assert cli.main([*run, "--sampler", "one-step", "--output", str(out)]) == 0
    capsys.readouterr()
    given = {"sampler": "one-step", "steps": 1, "guidance": 1, "width": 120, "height": 64, "seed": 3, "progress": False}
    expected = pixart.Pipeline.from_files(folder, folder, folder)("a red circle", **given)
    with Image.open(out) as picture:
        assert picture.tobytes() == expected[0].tobytes()
    assert cli.main([*run, "--sampler", "one-step", "--steps", "4"]) == 2
    assert "expected 1 step" in capsys.readouterr().err


def test_generate_heeds_what_a_distilled_file_says(folder, tmp_path, capsys):
    source = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    distilled = tmp_path / "one.safetensors"
    save_file(source, distilled, note_metadata(dmd_note(600)))
    out = tmp_path / "one.png"
    parts = ["--transformer", str(distilled), "--text-encoder", str(folder), "--vae", str(folder), "--variant", "sigma-256"]
    assert cli.main(["generate", "--prompt", "red", "--width", "64", "--height", "64", "--seed", "3", "--output", str(out), *parts]) == 0
    capsys.readouterr()
    given = {"sampler": OneStep(600), "steps": 1, "guidance": 1, "width": 64, "height": 64, "seed": 3, "progress": False}
    expected = pixart.Pipeline.from_files(distilled, folder, folder, variant="sigma-256")("red", **given)
    with Image.open(out) as picture:
        assert picture.tobytes() == expected[0].tobytes()


def test_generate_several_numbers_the_files_and_takes_parts_one_by_one(folder, tmp_path, capsys):
    out = tmp_path / "x.png"
    parts = ["--transformer", folder / "transformer", "--text-encoder", folder / "text_encoder", "--vae", folder / "vae"]
    run = ["generate", "--prompt", "red", "blue", "--images", "2", "--steps", "1", "--cfg", "1", "--dtype", "bf16"]
    assert cli.main([*run, *map(str, parts), "--output", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"x-{n}.png") for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--width", "0"], "width is 0"),
        (["--steps", "0"], "steps is 0"),
        (["--output", "picture.xyz"], "--output is picture.xyz; expected a name ending in .png"),
        (["--device", "nonsense"], "--device is 'nonsense'"),
        (["--vae", "absent"], "absent does not exist"),
        (["--variant", "sigma-1024", "--text-encoder", "absent"], "absent does not exist"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(folder, capsys, options, message):
    assert cli.main(["generate", "--prompt", "red", "--transformer", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_missing_parts_and_missing_demo_are_named(folder, tmp_path, capsys, monkeypatch):
    assert cli.main(["generate", "--prompt", "red", "--transformer", str(folder / "transformer")]) == 2
    assert "--text-encoder is needed" in capsys.readouterr().err
    monkeypatch.setattr(cli, "DEMO_FILES", {name: tmp_path / name for name in cli.DEMO_FILES})
    assert cli.main(["generate", "--prompt", "red"]) == 2
    assert "the demo model is not here" in capsys.readouterr().err


@pytest.mark.skipif(not cli.DEMO_FILES["transformer"].is_file(), reason="the demo model is not in this checkout")
def test_the_demo_model_is_the_default(tmp_path, capsys):
    out = tmp_path / "demo.png"
    assert cli.main(["generate", "--prompt", "a red circle", "--steps", "2", "--output", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.size == (256, 256)


def test_interrupt_leaves_no_traceback(folder, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pixart.pipeline.denoise", interrupted)
    assert cli.main(["generate", "--prompt", "red", "--transformer", str(folder)]) == 130


def test_inspect_prints_the_report_as_text_and_json(folder, capsys):
    file = str(folder / "transformer")
    assert cli.main(["inspect", file]) == 0
    text = capsys.readouterr().out
    assert text == pixart.load_transformer(file).detection.describe() + "\n"
    assert cli.main(["inspect", file, "--json", "--variant", "sigma-512"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["variant"] == "sigma-512" and report["config"]["hidden_size"] == 72


def test_convert_there_and_back_is_lossless(folder, tmp_path, capsys):
    source = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    native, back = tmp_path / "native.safetensors", tmp_path / "back.safetensors"
    assert cli.main(["convert", str(folder / "transformer"), str(native), "--to", "original"]) == 0
    assert capsys.readouterr().out == f"{native}\n"
    assert cli.main(["convert", str(native), str(back), "--to", "diffusers"]) == 0
    first, last = load_file(source), load_file(back)
    assert "blocks.0.attn.qkv.weight" in load_file(native)
    assert all(torch.equal(last[key], value) for key, value in first.items())


def test_foreign_file_is_explained(tmp_path, capsys):
    save_file({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2)}, tmp_path / "clip.safetensors")
    assert cli.main(["inspect", str(tmp_path / "clip.safetensors")]) == 2
    assert "clip.safetensors" in capsys.readouterr().err


def test_train_calls_the_run(tmp_path, capsys, monkeypatch):
    loop = pytest.importorskip("pixart.training.run")
    calls = []
    monkeypatch.setattr(loop, "train", lambda *given, **options: calls.append((given, options)) or "model.safetensors")
    assert cli.main(["train", "recipe.json", "--set", "seed=1", "--output", "o.safetensors", "--overwrite", "--stop-after", "5"]) == 0
    assert calls == [
        ((Path("recipe.json"), ["seed=1", 'output="o.safetensors"']), {"overwrite": True, "accept_changes": False, "stop_after": 5.0})
    ]


def test_train_without_accelerate_says_what_to_install():
    code = "import sys; sys.modules['accelerate'] = None; from pixart import cli; sys.exit(cli.main(['train', 'recipe.json']))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "accelerate" in run.stderr and "pip install" in run.stderr and run.stderr.count("\n") == 1


def test_train_outside_the_repository_says_where_to_run(tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "pixart").symlink_to(ROOT / "pixart")
    recipe = json.loads((ROOT / "configs/train/demo.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**recipe, "run_dir": str(tmp_path / "run"), "output": str(tmp_path / "o.safetensors")}))
    code = "import sys; sys.path.remove(sys.argv[1]) if sys.argv[1] in sys.path else None\n"
    code += "from pixart import cli; sys.exit(cli.main(['train', 'r.json']))"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 2 and "repository's root" in done.stderr and "Traceback" not in done.stderr


def test_module_runs_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "pixart", "inspect", str(tmp_path / "absent.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2 and "absent.safetensors" in done.stderr and "Traceback" not in done.stderr


def test_version_and_lazy_exports():
    assert pixart.__version__ == "0.1.0"
    assert set(pixart.__all__) >= {"load_transformer", "load_text_encoder", "Pipeline", "nearest_bin"}
    assert pixart.nearest_bin(256, 100, 100)[:2] == (256, 256)
    with pytest.raises(AttributeError, match="nothing"):
        pixart.nothing  # noqa: B018
    code = "import sys, pixart; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)
