"""The grid and the bookkeeping of benchmarks.kv_quality; drawing is demo.evaluation.prompts's, tested there."""
from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import kv_pictures, kv_quality
from benchmarks.kv_quality import EXACT, Setting, settings, share_of_attention
from demo import WEIGHTS
from pixart.config import get_variant
from pixart.kv_compress import KVCompression, check_together
from pixart.training.recipe import load_recipe
from tests.support.demo import ROOT

DEMO = get_variant("demo").transformer


def test_every_setting_fits_the_demo_and_has_a_name_of_its_own() -> None:
    wanted = list(settings())
    assert wanted[0].name == EXACT and not wanted[0].compression
    assert len({one.name for one in wanted}) == len(wanted) > 20
    for one in wanted:
        check_together(one.compression, DEMO)
        assert (share_of_attention(one, DEMO) < 1) == bool(one.compression)


def test_settings_are_chosen_by_name_or_by_a_part_of_it() -> None:
    def names(*texts: str) -> list[str]:
        return [one.name for one in kv_quality.choose(list(settings()), texts)]

    assert names("mean 2, last half") == [EXACT, "mean 2, last half"]
    assert names("keys x 1.3", "stride 4, all") == [EXACT, "stride 4, all", "mean 2, all, keys x 1.3", "mean 2, last half, keys x 1.3"]


def test_share_of_attention() -> None:
    def share(*compression: KVCompression) -> float:
        return share_of_attention(Setting("x", "x", compression), DEMO)

    assert share(KVCompression(2, end_percent=1.0)) == 0.25
    assert share(KVCompression(2, first_block=4, end_percent=1.0), KVCompression(4, last_block=3, end_percent=1.0)) == pytest.approx((0.25 + 1 / 16) / 2)
    assert share(KVCompression(2)) == pytest.approx(0.625)
    trained = SimpleNamespace(compressed_blocks=((6, 2), (7, 2)), depth=8)
    assert share_of_attention(Setting("x", "x"), trained) == pytest.approx(1 - 2 * 0.75 / 8)


def test_a_recipe_without_compression_adds_its_result_alone(tmp_path) -> None:
    recipe = load_recipe(ROOT / "configs/train/demo-kv-control.json").to_dict()
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"output": str(tmp_path / "none.safetensors")}))
    assert not list(kv_quality.trained_settings(tmp_path / "recipe.json"))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"output": str(WEIGHTS["diffusion_models"])}))
    (found,) = kv_quality.trained_settings(tmp_path / "recipe.json")
    assert found.name == "uncompressed, trained further" and not found.compression and share_of_attention(found, DEMO) == 1
    half = tmp_path / "half.safetensors"
    save_file(load_file(WEIGHTS["diffusion_models"]), half, metadata={"step": "250"})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"output": str(half)}))
    (found,) = kv_quality.trained_settings(tmp_path / "recipe.json")
    assert found.name == "uncompressed, trained further, 250 of 600 steps"


def test_sides_of_a_picture() -> None:
    assert kv_quality.sides("256") == (256, 256) and kv_quality.sides("272x240") == (272, 240)
    odd = {one.name for one in settings("272x240")} - {one.name for one in settings()}
    assert odd == {"mean 2, all, edges as whole cells", "mean 2, last half, edges as whole cells"}


def test_report_compares_with_the_uncompressed_and_goes_on(tmp_path, monkeypatch) -> None:
    drawn = []

    def measured(pipeline, setting, chosen):
        drawn.append(setting.name)
        row = {
            "name": setting.name, "group": setting.group, "share_of_attention": 0.5, "alignment": 0.5,
            "right": "1000" if setting.compression else "1101",
        }  # fmt: skip
        return row, torch.full((2, 4, 2, 2), 2.0 + bool(setting.compression))

    weights = {"all": "one"}
    monkeypatch.setattr(kv_quality, "measure_setting", measured)
    monkeypatch.setattr(kv_quality, "fingerprint", lambda transformer: weights["all"])
    pipeline = SimpleNamespace(transformer=None)
    chosen = Namespace(out=tmp_path, count=1, steps=2, size="256", cfg=4.5, seed=0, dtype="float32", device="cpu")
    wanted = [Setting(EXACT, EXACT), Setting("mean", "mean", (KVCompression(2),))]
    kv_quality.run(pipeline, wanted, chosen)
    results = json.loads((tmp_path / "kv_quality.json").read_text())["results"]
    assert (results[EXACT]["latent_mse"], results["mean"]["latent_mse"], results["mean"]["latent_error"]) == (0, 1, 0.5)
    assert results[EXACT]["difference"] == 0 and results["mean"]["difference"] == -0.5
    assert (tmp_path / "kv_quality.png").stat().st_size > 1000
    assert "| mean | 50% | 50.0% | -50.0 ± 56.6 | 0.500 |" in (tmp_path / "kv_quality.md").read_text()
    kv_quality.run(pipeline, [*wanted, Setting("new", "new", (KVCompression(2),))], chosen)
    assert drawn == [EXACT, "mean", EXACT, "new"]
    drawn_again = {"right": "0101"}
    monkeypatch.setattr(kv_quality, "measure_setting", lambda *given: (measured(*given)[0] | drawn_again, measured(*given)[1]))
    kv_quality.run(pipeline, [wanted[0]], chosen)  # by code that draws a little otherwise
    results = json.loads((tmp_path / "kv_quality.json").read_text())["results"]
    assert results["mean"]["right"] == "1000" and results["mean"]["difference"] == -0.25
    monkeypatch.setattr(kv_quality, "measure_setting", measured)
    drawn.clear()
    weights["all"] = "other"  # than those measured
    kv_quality.run(pipeline, wanted, chosen)
    assert drawn == [EXACT, "mean"]
    chosen.steps = 3  # another measurement leaves this one alone
    with pytest.raises(SystemExit, match="choose another folder"):
        kv_quality.run(pipeline, wanted, chosen)


def test_fingerprint_knows_weights_and_their_compression() -> None:
    from pixart.model import PixArtTransformer

    config = replace(DEMO, depth=1, hidden_size=48, num_heads=4)
    model = PixArtTransformer(config)
    before = kv_quality.fingerprint(model)
    assert kv_quality.fingerprint(model) == before
    with torch.no_grad():
        next(model.parameters()).add_(1)
    changed = kv_quality.fingerprint(model)
    model.config = replace(config, compressed_blocks=((0, 2),))
    assert len({before, changed, kv_quality.fingerprint(model)}) == 3


def test_paired_difference_has_its_interval() -> None:
    assert kv_quality.paired_difference("1010", "1010") == (0, 0)
    mean, half = kv_quality.paired_difference("10" * 50, "11" * 50)
    assert mean == -0.5 and half == pytest.approx(1.96 * 0.5 / 100**0.5, rel=0.01)


def test_pictures_stand_in_a_column_for_each_setting(tmp_path, monkeypatch, capsys) -> None:
    sheets = []
    make = kv_pictures.make_contact_sheet

    def noted(entries, columns):
        sheets.append((entries, columns))
        return make(entries, columns)

    monkeypatch.setattr(kv_pictures, "make_contact_sheet", noted)
    kv_pictures.main(["--count", "1", "--steps", "2", "--settings", EXACT, "mean 4, all", "--out", str(tmp_path)])
    entries, columns = sheets[0]
    assert columns == 2 and [entry.prompt for entry in entries] == [EXACT, "mean 4, all", "", ""]
    assert (entries[0].picture != entries[1].picture).any() and (tmp_path / "kv_pictures.png").is_file()
    with pytest.raises(SystemExit):
        kv_pictures.main(["--settings", "mean 9"])
    assert "unknown settings" in capsys.readouterr().err
