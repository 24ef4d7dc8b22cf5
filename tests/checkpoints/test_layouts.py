"""Files of merges, trainers and all-in-one packs, and folders with more than one set of weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pixart.adapters import load_adapter
from pixart.checkpoints import load_transformer, prepare_file
from pixart.checkpoints.shards import weight_files
from pixart.errors import CheckpointError
from tests.support.checkpoint_factory import tiny_weights

CONFIG, DIFFUSERS, ORIGINAL = tiny_weights()
NAME = "diffusion_pytorch_model"


def same(path: Path, expected: dict[str, Tensor] = ORIGINAL, **options) -> tuple[str, ...]:
    """Loads a file, compares its weights, and returns why it was read so."""
    prepared = prepare_file(path, **options)
    found = {key: value.float() for key, value in prepared.state_dict.items()}
    for key, value in expected.items():
        if key in found:
            torch.testing.assert_close(found[key], value.float(), atol=1e-2, rtol=1e-2)
    assert "t_block.1.weight" in found
    return prepared.detection.reasons


def others(scale: float) -> dict[str, Tensor]:
    return {key: value * scale for key, value in ORIGINAL.items()}


LEFTOVERS = {
    "betas": torch.zeros(9), "alphas_cumprod": torch.zeros(9), "sqrt_one_minus_alphas_cumprod": torch.zeros(9),
    "posterior_mean_coef1": torch.zeros(9), "denoiser.sigmas": torch.zeros(9), "model_ema.decay": torch.tensor(0.9),
    "first_stage_model.decoder.conv_in.weight": torch.zeros(4, 4), "text_encoders.t5xxl.transformer.shared.weight": torch.zeros(4, 4),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model."])
def test_what_merge_tools_leave_is_left_out_and_listed(tmp_path: Path, prefix: str) -> None:
    save_file({**{prefix + key: value for key, value in ORIGINAL.items()}, **LEFTOVERS}, tmp_path / "m.safetensors")
    (said,) = [reason for reason in same(tmp_path / "m.safetensors") if "left out" in reason]
    assert all(name in said for name in ("betas", "denoiser.", "first_stage_model.", "text_encoders."))


def test_an_unknown_part_without_a_prefix_may_belong_to_the_model(tmp_path: Path) -> None:
    save_file({**ORIGINAL, "guidance_embedder.mlp.0.weight": torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="unknown key guidance_embedder"):
        load_transformer(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "name", ["ema", "ema_state_dict", "params_ema", "state_dict_ema", "generator", "student", "model_state_dict", "net", "unet_model"]
)
def test_weights_under_one_name(tmp_path: Path, name: str) -> None:
    torch.save({name: ORIGINAL, "step": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}}}, tmp_path / "t.pt")
    reasons = same(tmp_path / "t.pt")
    assert ("ema" not in name) or any(f"only {name} is in the file" in reason for reason in reasons)
    assert prepare_file(tmp_path / "t.pt").detection.ema == ("ema" in name)


@pytest.mark.parametrize("second", ["teacher", "ema", "fake_unet", "real_score", "critic", "optimizer_copy"])
def test_a_second_model_in_the_file_is_not_chosen_but_told(tmp_path: Path, second: str) -> None:
    torch.save({second: others(2.0), "generator": ORIGINAL}, tmp_path / "t.pt")
    assert any(second in reason for reason in same(tmp_path / "t.pt"))


def test_weights_within_weights_and_a_lightning_checkpoint(tmp_path: Path) -> None:
    lightning = {f"model.{key}": value for key, value in ORIGINAL.items()}
    torch.save({"state_dict": lightning, "epoch": 1, "pytorch-lightning_version": "2.0", "callbacks": {"a": {"b": 1}}}, tmp_path / "l.ckpt")
    same(tmp_path / "l.ckpt")
    torch.save({"module": {"generator": ORIGINAL}, "ds_version": "0.9"}, tmp_path / "mp_rank_00_model_states.pt")
    same(tmp_path / "mp_rank_00_model_states.pt")


def test_ema_is_taken_when_asked_for(tmp_path: Path) -> None:
    torch.save({"model": ORIGINAL, "params_ema": others(2.0)}, tmp_path / "t.pt")
    same(tmp_path / "t.pt")
    same(tmp_path / "t.pt", others(2.0), ema=True)


def test_two_whole_models_of_equal_standing_are_refused(tmp_path: Path) -> None:
    both = {f"first.{key}": value for key, value in ORIGINAL.items()} | {f"second.{key}": value for key, value in ORIGINAL.items()}
    save_file({key: value.clone() for key, value in both.items()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="several transformers, under 'first.', 'second.'"):
        load_transformer(tmp_path / "m.safetensors")


@pytest.mark.parametrize("prefixes", [("model.", "model_ema."), ("student.", "teacher."), ("generator.", "fake_score.")])
def test_a_second_model_beside_it_under_a_prefix_is_left_out(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    both = {prefixes[0] + key: value for key, value in ORIGINAL.items()} | {prefixes[1] + key: value for key, value in others(2.0).items()}
    save_file(both, tmp_path / "m.safetensors")
    assert any(prefixes[1].partition(".")[0] in reason for reason in same(tmp_path / "m.safetensors"))


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module", "_fsdp_wrapped_module._orig_mod"]
)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_wrappers_anywhere_in_a_name(tmp_path: Path, wrapper: str, layout: str) -> None:
    def wrapped(key: str) -> str:
        return re.sub(r"^((?:transformer_)?blocks\.\d+)\.", rf"\1.{wrapper}.", key).replace("t_block.1", f"t_block.{wrapper}.1")

    weights = {"original": ORIGINAL, "diffusers": DIFFUSERS}[layout]
    save_file({f"model.{wrapped(key)}": value for key, value in weights.items()}, tmp_path / "m.safetensors")
    same(tmp_path / "m.safetensors")
    part = f"transformer_blocks.0.{wrapper}.attn1.to_q"
    save_file({f"{part}.lora_A.weight": torch.ones(4, 144), f"{part}.lora_B.weight": torch.ones(144, 4)}, tmp_path / "l.safetensors")
    (layer,) = load_adapter(tmp_path / "l.safetensors").layers
    assert layer.place.module == "blocks.0.attn.qkv"


def test_a_weight_that_lies_there_twice_is_refused(tmp_path: Path) -> None:
    save_file({**ORIGINAL, "blocks.0._orig_mod.attn.proj.bias": torch.zeros(144)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="differ only in wrappers"):
        load_transformer(tmp_path / "m.safetensors")


def test_mixed_dtypes_of_one_fused_weight(tmp_path: Path) -> None:
    mixed = {key: value.bfloat16() if "to_q" in key else value for key, value in DIFFUSERS.items()}
    save_file(mixed, tmp_path / "m.safetensors")
    same(tmp_path / "m.safetensors")


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "PixArtTransformer2DModel", **CONFIG}))
        return tmp_path

    @staticmethod
    def shards(folder: Path, pattern: str, index: str, scale: float = 1.0, write: bool = True) -> None:
        """Two shards of the weights; `{}` of the pattern becomes 00001-of-00002."""
        keys, where = sorted(DIFFUSERS), {}
        for number in range(2):
            name, part = pattern.format(f"{number + 1:05}-of-00002"), {key: DIFFUSERS[key] * scale for key in keys[number::2]}
            if write:
                (save_file if name.endswith("safetensors") else torch.save)(part, folder / name)
            where |= dict.fromkeys(part, name)
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))

    @pytest.mark.parametrize("pattern, index", [
        (NAME + "-{}.safetensors", NAME + ".safetensors.index.json"), (NAME + ".fp16-{}.safetensors", NAME + ".safetensors.index.fp16.json"),
        (NAME + "-{}.bin", NAME + ".bin.index.json"), ("model-{}.safetensors", "model.safetensors.index.json"),
        ("pytorch_model-{}.bin", "pytorch_model.bin.index.json"),
    ])  # fmt: skip
    def test_any_index(self, folder: Path, pattern: str, index: str) -> None:
        self.shards(folder, pattern, index)
        same(folder)
        same(folder / index)

    def test_full_precision_before_a_variant(self, folder: Path) -> None:
        self.shards(folder, NAME + "-{}.safetensors", NAME + ".safetensors.index.json")
        self.shards(folder, NAME + ".fp16-{}.safetensors", NAME + ".safetensors.index.fp16.json", scale=2.0)
        assert any(f"{NAME}.safetensors.index.json is used; the folder also holds" in reason for reason in same(folder))

    @pytest.mark.parametrize("left", [NAME + ".bin.index.json", NAME + ".safetensors.fp16.index.json"])
    def test_an_index_without_its_shards_is_a_leftover(self, folder: Path, left: str) -> None:
        self.shards(folder, NAME + "-{}.bin", left, write=False)
        save_file(DIFFUSERS, folder / f"{NAME}.safetensors")
        same(folder)

    def test_variants_of_one_file(self, folder: Path) -> None:
        for variant, scale in (("", 1.0), (".fp16", 2.0), (".non_ema", 3.0)):
            save_file({key: value * scale for key, value in DIFFUSERS.items()}, folder / f"{NAME}{variant}.safetensors")
        torch.save(DIFFUSERS, folder / f"{NAME}.bin")
        assert any(".fp16" in reason and ".non_ema" in reason for reason in same(folder))
        assert weight_files(folder)[0] == [folder / f"{NAME}.safetensors"]

    def test_states_of_a_trainer_are_no_weights(self, folder: Path) -> None:
        save_file(DIFFUSERS, folder / "model.safetensors")
        for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "scaler.pt", "training_args.bin"):
            torch.save({"state": torch.zeros(2)}, folder / name)
        same(folder)

    def test_two_that_are_alike_are_named(self, folder: Path) -> None:
        for name in ("a.safetensors", "b.safetensors"):
            save_file(DIFFUSERS, folder / name)
        with pytest.raises(CheckpointError, match="found a.safetensors, b.safetensors; expected one"):
            load_transformer(folder)
