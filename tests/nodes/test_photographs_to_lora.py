"""Photographs to a LoRA at XL/2's width: features, training, going on, samples, and the file in the host's own loader."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

for needed in ("diffusers", "peft", "skimage"):
    pytest.importorskip(needed)
from safetensors import safe_open
from safetensors.torch import save_file

import nodes as host_nodes
from pixart import cli, load_text_encoder, load_transformer
from pixart.config import get_variant
from tests.support import tiny_text
from tests.support.data_sets import real_photographs
from tests.support.fidelity import make_case
from tests.support.host_models import difference, forward, load_model
from tests.support.tiny_methods import use_variant
from tests.support.tiny_vae import tiny_kl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """A base of two of the 28 blocks, a T5 as wide as XXL, and a VAE; all random."""
    folder = tmp_path / "given"
    folder.mkdir()
    base = folder / "base.safetensors"
    save_file({name: value.half().contiguous() for name, value in make_case("sigma-512", depth=2).original.items()}, base)
    t5 = tiny_text.save_t5_file(tiny_text.tiny_t5(width=4096, layers=1, feed_forward=64), folder / "t5.safetensors")
    tiny_kl().save_pretrained(folder / "vae")
    return {"data": real_photographs(folder / "data"), "transformer": base, "text-encoder": t5, "vae": folder / "vae"}


def recipe_of(folder: Path, steps: int) -> Path:
    """The shipped recipe, shorter and at half the side, with samples."""
    path = folder / "recipe.json"
    path.write_text(json.dumps({
        "extends": str(ROOT / "configs/train/sigma-512-lora.json"), "precision": "fp32", "ema_decay": 0.0, "warmup_steps": 0,
        "run_dir": str(folder / "run"), "save_every": 1, "log_every": 1,
        "samples": {"prompts": ["a red circle"], "every": 2, "steps": 2},
        "stages": [{"base_size": 256, "steps": steps, "batch_size": 1, "learning_rate": 0.01}],
    }), encoding="utf-8")  # fmt: skip
    return path


def test_photographs_become_a_lora_that_the_host_opens(
    tmp_path: Path, places: dict[str, Path], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = get_variant("sigma-512")
    use_variant(monkeypatch, replace(variant, transformer=replace(variant.transformer, depth=2)))
    files = [part for name, place in places.items() for part in (f"--{name}", str(place))]
    output = models / "loras/photographs.safetensors"
    cache = ["--set", f"source.cache={json.dumps(str(tmp_path / 'cache'))}"]
    features = [part for name in ("data", "text-encoder", "vae") for part in (f"--{name}", str(places[name]))]
    assert cli.main(["extract", str(recipe_of(tmp_path, 1)), *features, "--cache", str(tmp_path / "cache")]) == 0
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) > 0
    for steps in (1, 2):
        command = ["train", str(recipe_of(tmp_path, steps)), *files, *cache, "--output", str(output), "--accept-changes"]
        assert cli.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "noise_loss" in row] == [1, 2]
    with Image.open(tmp_path / "run/samples/00000002.png") as sheet:
        assert min(sheet.size) >= 256
    with safe_open(output, "pt") as file:
        assert {"modelspec.title", "modelspec.architecture"} <= set(file.metadata())

    base = load_model(places["transformer"], "sigma-512", weight_dtype="fp32")
    taught = host_nodes.LoraLoaderModelOnly().load_lora_model_only(base, output.name, 1.0)[0]
    own = load_transformer(places["transformer"], "sigma-512")
    given = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    context = load_text_encoder(places["text-encoder"]).encode(["a picture of chelsea"]).states.float()
    with torch.no_grad():
        plain = own.float()(*given, context)[:, :4]
    assert difference(forward(base, *given, context), plain) < 1e-4
    taught.patch_model(device_to=torch.device("cpu"))
    try:
        found = forward(taught, *given, context)
    finally:
        taught.unpatch_model()
    assert difference(found, plain) > 1e-3 and bool(torch.isfinite(found).all())
