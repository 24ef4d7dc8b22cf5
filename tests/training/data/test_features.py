"""The cache: nothing is computed twice, nothing stale is used, what is killed goes on."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo import WEIGHTS
from pixart.errors import ConfigError, DataError
from pixart.text.encoder import load_text_encoder
from pixart.training.data import features, look, spread
from pixart.training.data.cache import Cache
from pixart.training.data.features import Latents, TextStates
from pixart.vae import load_vae
from tests.support.data_sets import batches, folder, picture, prepared
from tests.support.tiny_text import save_t5_file, tiny_t5
from tests.support.tiny_vae import tiny_kl

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def counted(monkeypatch):
    """Loads of encoders, in order."""
    loads: list[str] = []
    for job, name in ((TextStates, "T5"), (Latents, "VAE")):
        opened = job.open
        monkeypatch.setattr(job, "open", lambda self, device, opened=opened, name=name: (loads.append(name), opened(self, device))[1])
    return loads


def work_of(source) -> tuple[int, int]:
    return len(source.album.missing_texts([""])), len(source.album.missing_pictures())


def test_features_are_computed_once_and_t5_comes_first(tmp_path, source_of, counted):
    folder(tmp_path / "data", [(64, 64), (96, 64)])
    prepared(source_of())
    assert counted == ["VAE", "T5", "VAE"]  # the VAE is looked at first, as T5 may compute for hours
    prepared(source_of())
    assert counted == ["VAE", "T5", "VAE", "VAE"]
    files = [path.relative_to(tmp_path / "cache").parts[0] for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert sorted(files) == ["latent", "latent", "text", "text", "text"]  # two captions, and the empty one


def test_t5_is_gone_when_the_vae_comes(tmp_path, source_of, monkeypatch):
    loaded = []

    def alone(load, name):
        def loader(*given, **named):
            assert not any(each() for each in loaded)
            made = load(*given, **named)
            loaded.append(weakref.ref(getattr(made, name)))
            return made

        return loader

    monkeypatch.setattr(features, "load_text_encoder", alone(load_text_encoder, "model"))
    monkeypatch.setattr(features, "load_vae", alone(load_vae, "module"))
    folder(tmp_path / "data", [(64, 64)])
    prepared(source_of())
    assert len(loaded) == 3  # the VAE, to see that it is one; T5; the VAE


def test_only_real_tokens_are_kept_and_in_half_the_bytes(tmp_path, source_of):
    folder(tmp_path / "data", [(64, 64), (64, 64)])
    (tmp_path / "data/p1.txt").write_text("a large red circle above a small blue square")
    prepared(source_of())
    stored = [load_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    encoder = load_text_encoder(WEIGHTS["text_encoders"])
    counts = [encoder.encode([text]).token_counts[0] for text in ("", "a red circle 0", "a large red circle above a small blue square")]
    assert sorted(each["states"].shape[0] for each in stored if "states" in each) == counts
    assert {value.dtype for each in stored for value in each.values()} == {torch.float16}


def test_a_change_of_picture_caption_encoder_or_preparation_is_noticed(tmp_path, source_of):
    folder(tmp_path / "data", [(64, 64), (96, 64)])
    prepared(source_of())
    assert work_of(source_of()) == (0, 0)
    picture(64, 64, 9).save(tmp_path / "data/p0.png")
    assert work_of(source_of()) == (0, 1)
    (tmp_path / "data/p1.txt").write_text("another")
    assert work_of(source_of()) == (1, 1)
    assert work_of(source_of(buckets=False)) == (1, 2)
    assert work_of(source_of(stages=[{"base_size": 128, "steps": 1, "batch_size": 1, "learning_rate": 1.0}])) == (1, 2)
    assert work_of(source_of(text_precision="int8"))[0] == 3
    assert work_of(source_of(hints="canny")) == (1, 2)
    other = tmp_path / "t5.safetensors"
    weights = load_file(WEIGHTS["text_encoders"])
    save_file({**weights, "encoder.final_layer_norm.weight": weights["encoder.final_layer_norm.weight"] * 2}, other)
    assert work_of(source_of(text_encoder=str(other)))[0] == 3
    tiny_kl().save_pretrained(tmp_path / "vae")
    assert work_of(source_of(vae=str(tmp_path / "vae")))[1] == 2


def test_moved_data_and_encoders_keep_their_features(tmp_path, source_of):
    folder(tmp_path / "data", [(64, 64), (96, 64)])
    prepared(source_of())
    shutil.move(tmp_path / "data", tmp_path / "moved")
    shutil.copy(WEIGHTS["vae"], tmp_path / "copy.safetensors")
    assert work_of(source_of(data=str(tmp_path / "moved"), vae=str(tmp_path / "copy.safetensors"))) == (0, 0)


def test_the_spread_of_a_latent_is_kept_and_drawn_from(tmp_path, recipe_of):
    folder(tmp_path / "data", [(64, 64)])
    tiny_kl().save_pretrained(tmp_path / "vae")
    mean, drawn = (recipe_of(vae=str(tmp_path / "vae"), sample_latents=sampled) for sampled in (False, True))
    source = prepared(mean.source.make(mean))
    stored = load_file(next((tmp_path / "cache/latent").rglob("*.safetensors")))
    assert stored["mean"].shape == stored["std"].shape == (4, 8, 8)
    rows = batches(source, mean, 1)[0].latent
    assert torch.equal(rows, stored["mean"].float().expand(4, -1, -1, -1))
    noise = (batches(prepared(drawn.source.make(drawn)), drawn, 1)[0].latent - rows) / stored["std"].float()
    assert 0.9 < noise.std() < 1.1 and not torch.equal(noise[0], noise[1])


def test_pictures_are_looked_at_once(tmp_path, source_of, monkeypatch):
    folder(tmp_path / "data", [(64, 64), (96, 64)])
    (tmp_path / "data/bad.png").write_bytes(b"no")
    prepared(source_of(allow_broken=True))
    monkeypatch.setattr(look, "picture_size", lambda data: 1 / 0)
    again = source_of(allow_broken=True)
    assert list(again.album.broken) == ["bad.png"] and len(again.album.entries) == 2
    lines = (tmp_path / "cache/pictures.jsonl").read_text().splitlines()
    (tmp_path / "cache/pictures.jsonl").write_text("\n".join(["{damaged", *lines[1:]]))
    monkeypatch.undo()
    assert list(source_of(allow_broken=True).album.broken) == ["bad.png"]


def test_a_kill_loses_nothing_that_was_computed(tmp_path, source_of):
    """Killed after three pictures of five, while a fourth is written."""
    folder(tmp_path / "data", [(64, 64)] * 5)
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pixart.training.data import cache
from tests.support.data_sets import prepared
from pixart.training.recipe import make_recipe
saved, done = cache.save_file, []
def save(tensors, path):
    saved(tensors, path)
    if "mean" in tensors:
        done.append(path)
    if len(done) == 4:
        os.kill(os.getpid(), 9)
cache.save_file = save
recipe = make_recipe({{"variant": "demo", "method": "full", "objective": "denoise", "output": "o", "run_dir": "r",
    "source": {{"name": "pictures", "data": {str(tmp_path / "data")!r}, "text_encoder": {str(WEIGHTS["text_encoders"])!r},
    "vae": {str(WEIGHTS["vae"])!r}, "cache": {str(tmp_path / "cache")!r}}},
    "stages": [{{"base_size": 64, "steps": 1, "batch_size": 1, "learning_rate": 1.0}}]}}, "test")
prepared(recipe.source.make(recipe))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=300, capture_output=True).returncode == -9
    assert work_of(source_of()) == (0, 2)
    prepared(source_of())
    assert work_of(source_of()) == (0, 0)


def test_a_full_disk_and_a_damaged_feature_are_sentences(tmp_path, recipe_of, monkeypatch):
    folder(tmp_path / "data", [(64, 64)])
    recipe = recipe_of()
    source = prepared(recipe.source.make(recipe))
    file = next((tmp_path / "cache/latent").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=f"{file.name} can't be read.*Remove it"):
        batches(source, recipe, 1)
    file.unlink()
    with pytest.raises(DataError, match="can't be read"):
        batches(source, recipe, 1)

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pixart.training.data.cache.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        prepared(recipe.source.make(recipe))
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_large_numbers_are_kept_in_fp32(tmp_path):
    cache = Cache(tmp_path)
    cache.save("text", "ab", {"small": torch.tensor([1.5]), "large": torch.tensor([1e6]), "short": torch.tensor([1.0], dtype=torch.bfloat16)})
    stored = load_file(cache.path("text", "ab"))
    assert [stored[name].dtype for name in ("small", "large", "short")] == [torch.float16, torch.float32, torch.bfloat16]
    assert cache.load("text", "ab")["large"].item() == 1e6


def test_encoders_of_another_model_are_refused(tmp_path, source_of):
    folder(tmp_path / "data", [(64, 64)])
    narrow = save_t5_file(tiny_t5(32), tmp_path / "t5.safetensors")
    with pytest.raises(ConfigError, match="is 32 wide; demo reads captions 128 wide"):
        prepared(source_of(text_encoder=str(narrow)))
    import diffusers

    shallow = diffusers.AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    shallow.save_pretrained(tmp_path / "vae")
    with pytest.raises(ConfigError, match="has 4 channels, a latent for each 2 pixels; demo needs 4 and 8"):
        prepared(source_of(vae=str(tmp_path / "vae")))


def test_a_picture_that_breaks_late_leaves_the_run(tmp_path, recipe_of, monkeypatch):
    """It vanishes between the first look and the reading; so does its copy under another name."""
    folder(tmp_path / "data", [(64, 64)] * 4)
    shutil.copy(tmp_path / "data/p1.png", tmp_path / "data/q.png")
    recipe = recipe_of(allow_broken=True)
    source = recipe.source.make(recipe)
    (tmp_path / "data/p1.png").unlink()
    prepared(source)
    assert sorted(source.album.broken) == ["p1.png", "q.png"] and "No such file" in source.album.broken["p1.png"]
    assert {caption for batch in batches(source, recipe, 5) for caption in batch.captions} == {f"a red circle {n}" for n in (0, 2, 3)}


def test_processes_share_the_list_of_the_first(monkeypatch):
    """Another that looks later may find that the first has begun: its own list would be shorter."""
    monkeypatch.setattr(spread.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(spread.dist, "broadcast_object_list", lambda lists: lists.__setitem__(0, ["a", "b", "c"]))
    assert spread.same_everywhere(["c"]) == ["a", "b", "c"]
    monkeypatch.undo()
    assert spread.same_everywhere(("a",)) == ["a"]


def test_two_processes_share_the_work(tmp_path, source_of):
    folder(tmp_path / "data", [(64, 64), (96, 64), (64, 96), (64, 64), (64, 64)])
    (tmp_path / "data/bad.jpg").write_bytes(b"no")
    code = tmp_path / "job.py"
    code.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pixart.cli import main
sys.exit(main(sys.argv[1:]))
""")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({
        "variant": "demo", "method": "full", "objective": "denoise", "output": "o", "run_dir": str(tmp_path / "run"),
        "source": {"name": "pictures", "allow_broken": True},
        "stages": [{"base_size": 64, "steps": 1, "batch_size": 2, "learning_rate": 1.0}],
    }))  # fmt: skip
    given = ["extract", str(recipe), "--data", str(tmp_path / "data"), "--text-encoder", str(WEIGHTS["text_encoders"]), "--vae", str(WEIGHTS["vae"]), "--cache", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(code), *given]
    done = subprocess.run(command, timeout=300, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path / "cache")) == 1
    assert done.stderr.count("1 of 6 pictures are broken. bad.jpg") == 1
    source = source_of(allow_broken=True)
    assert work_of(source) == (0, 0) and source.album.memory.new is False
