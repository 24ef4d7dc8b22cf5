"""T5 files of trainers, wrappers and all-in-one packs: the same weights whatever stands around them."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pixart.errors import TextEncoderError
from pixart.text.weights import T5Weights, read_t5
from tests.support.tiny_text import tiny_t5

pytest.importorskip("transformers")
PLAIN = {key: value.clone() for key, value in tiny_t5().state_dict().items() if key != "encoder.embed_tokens.weight"}
TOKENIZER = torch.arange(9, dtype=torch.uint8)
SMALL = torch.zeros(3)


def prefixed(prefix: str, weights: dict[str, Tensor] = PLAIN) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def check(path: Path) -> T5Weights:
    """Every weight is as it was, and nothing else is there."""
    found = read_t5(path)
    assert set(found.tensors) == set(PLAIN)
    assert all(torch.equal(found.tensors[key], value) for key, value in PLAIN.items())
    return found


@pytest.mark.parametrize(
    "prefix",
    [
        "", "model.", "module.", "_orig_mod.", "encoder.", "text_model.", "t5.", "te.", "t5xxl.", "transformer.", "text_encoder.",
        "text_encoder_3.", "transformer.module.", "t5xxl.transformer.", "text_encoder.transformer.", "cond_stage_model.transformer.",
        "text_encoders.t5xxl.transformer.", "conditioner.embedders.0.transformer.", "ema.",
    ],
)  # fmt: skip
def test_any_prefix_alone_and_in_an_all_in_one(tmp_path: Path, prefix: str) -> None:
    save_file(prefixed(prefix), tmp_path / "t5.safetensors")
    check(tmp_path / "t5.safetensors")
    others = {"model.diffusion_model.blocks.0.attn.qkv.weight": SMALL, "vae.decoder.conv_in.weight": SMALL.clone(), "betas": torch.ones(3)}
    save_file({**prefixed(prefix), **others}, tmp_path / "all.safetensors")
    assert set(others) <= set(check(tmp_path / "all.safetensors").ignored)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"])
@pytest.mark.parametrize("where", ["encoder.", "encoder.block.1.", "encoder.block.0.layer.0."])
def test_wrappers_inside_names(tmp_path: Path, wrapper: str, where: str) -> None:
    save_file({key.replace(where, f"{where}{wrapper}."): value for key, value in PLAIN.items()}, tmp_path / "t5.safetensors")
    check(tmp_path / "t5.safetensors")


@pytest.mark.parametrize("name", ["model", "module", "state_dict", "text_encoder", "model_state_dict", "ema"])
def test_containers_of_trainers(tmp_path: Path, name: str) -> None:
    torch.save({name: PLAIN, "epoch": 3, "spiece_model": TOKENIZER, "optimizer": {"state": {0: {"exp_avg": SMALL}}}}, tmp_path / "t.pth")
    assert check(tmp_path / "t.pth").sentencepiece == bytes(range(9))


def test_a_container_with_an_average_and_another_model(tmp_path: Path) -> None:
    average = {key: value * 2 for key, value in PLAIN.items()}
    torch.save({"ema": average, "transformer": {"blocks.0.attn.qkv.weight": SMALL}, "text_encoder": PLAIN}, tmp_path / "t.pth")
    check(tmp_path / "t.pth")


def test_counters_and_heads_are_left_out(tmp_path: Path) -> None:
    torch.save({**PLAIN, "epoch": 3, "lr": 0.1, "comment": "hello", "classes": ["a"]}, tmp_path / "t.pth")
    check(tmp_path / "t.pth")
    others = {"step": torch.tensor(3), "text_projection.weight": SMALL, "encoder.block.0._extra_state": SMALL.clone()}
    save_file({**PLAIN, **others}, tmp_path / "t.safetensors")
    assert set(check(tmp_path / "t.safetensors").ignored) == set(others)


def test_each_model_in_a_file_has_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    other = {"text_encoders.gemma.spiece_model": TOKENIZER.flip(0), "text_encoders.zeta.spiece_model": TOKENIZER.flip(0)}
    own = {"text_encoders.t5xxl.spiece_model": TOKENIZER}
    save_file({**prefixed("text_encoders.t5xxl.transformer."), **other, **own}, tmp_path / "t.safetensors")
    assert check(tmp_path / "t.safetensors").sentencepiece == bytes(range(9))


def test_an_average_is_not_taken_and_two_alike_are_refused(tmp_path: Path) -> None:
    twice = {key: value * 2 for key, value in PLAIN.items()}
    save_file({**prefixed("t5.ema.", twice), **prefixed("t5.model.")}, tmp_path / "e.safetensors")
    check(tmp_path / "e.safetensors")
    save_file({**prefixed("first.", twice), **prefixed("second.")}, tmp_path / "two.safetensors")
    with pytest.raises(TextEncoderError, match="several T5 encoders, under 'first.', 'second.'"):
        read_t5(tmp_path / "two.safetensors")


Q = "encoder.block.0.layer.0.SelfAttention.q"
WRONG = {
    "an adapter's part": ({**PLAIN, f"{Q}.lora_A.weight": SMALL}, f"unknown {Q}.lora_A.weight"),
    "a slip": ({**PLAIN, f"{Q}.weight2": SMALL}, f"unknown {Q}.weight2"),
    "a weight twice": ({**PLAIN, Q.replace("0.layer", "0._orig_mod.layer") + ".weight": SMALL}, "differ only in wrappers"),
    "a part": ({key: value for key, value in prefixed("model.").items() if "block.1.layer.0" not in key}, "missing encoder.block.1"),
    "no embedding": ({key: value for key, value in PLAIN.items() if key != "shared.weight"}, "without shared.weight"),
    "llama.cpp's names": ({re.sub("^encoder.block", "enc.blk", key): value for key, value in PLAIN.items()}, "is not a T5 encoder"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_refusals_that_stay(tmp_path: Path, kind: str) -> None:
    state, message = WRONG[kind]
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "t5.safetensors")
    with pytest.raises(TextEncoderError, match=re.escape(message)):
        read_t5(tmp_path / "t5.safetensors")


def test_a_text_among_the_weights(tmp_path: Path) -> None:
    torch.save({"model": {**PLAIN, "encoder.final_layer_norm.weight": ["a"]}}, tmp_path / "t.pth")
    with pytest.raises(TextEncoderError, match="encoder.final_layer_norm.weight is not a tensor"):
        read_t5(tmp_path / "t.pth")
