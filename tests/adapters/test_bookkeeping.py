"""What trainers leave in an adapter file beside its matrices: counters are told and left out, what may count is refused."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.adapters import load_adapter, merge_file
from pixart.checkpoints import load_transformer
from pixart.errors import CheckpointError
from tests.support import adapter_factory, checkpoint_factory

NOTES = "notes of the training, which no picture depends on"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return checkpoint_factory.write("safetensors", tmp_path_factory.mktemp("model"), *checkpoint_factory.tiny_weights(depth=2))


@pytest.fixture
def sample(file):
    return adapter_factory.make("onetrainer", load_file(file))


def save(tensors, folder):
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors"


def assert_equal(model, expected):
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value.float(), expected[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("number", [torch.tensor(3), torch.ones(1), torch.tensor(True)], ids=["integer", "float", "bool"])
@pytest.mark.parametrize("name", ["global_step", "iteration", "epoch", "logit_scale", "model_ema.num_updates", "version", "optimizer.step"])
def test_a_counter_is_told_and_left_out(name, number, sample, file, tmp_path):
    model = load_transformer(file)
    fit = merge_file(save({**sample.tensors, name: number}, tmp_path), 1.0, model, None)
    assert_equal(model, sample.merged(load_file(file), 1.0))
    assert f"{len(sample.tensors)} of {len(sample.tensors) + 1} keys applied" in fit.describe()
    assert fit.describe().endswith(f"; not applied: 1 {NOTES}: {name}")


def test_states_of_modules_may_be_of_any_size(sample, file, tmp_path):
    model = load_transformer(file)
    states = {"_extra_state": torch.ones(8, dtype=torch.uint8), "transformer.blocks.0.attn.qkv._extra_state": torch.ones(2, 3)}
    fit = merge_file(save({**sample.tensors, **states}, tmp_path), 1.0, model, None)
    assert_equal(model, sample.merged(load_file(file), 1.0))
    assert fit.left == dict.fromkeys(states, NOTES)


def test_a_pickle_may_hold_plain_ones(sample, file, tmp_path):
    model = load_transformer(file)
    torch.save({**sample.tensors, "global_step": 3, "epoch": torch.tensor(2), "_extra_state": b"x"}, tmp_path / "style.pt")
    merge_file(tmp_path / "style.pt", 1.0, model, None)
    assert_equal(model, sample.merged(load_file(file), 1.0))


MEANT = {
    "network_alpha": (torch.ones(1), "of no supported kind"),
    "transformer.lora_strength": (torch.tensor(2.0), "of no supported kind"),
    "scaled_fp8": (torch.ones(1), "of no supported kind"),
    "transformer.proj_out": (torch.ones(1), "of no supported kind"),
    "lora_unet_blocks_0_attn_gate": (torch.ones(1), "of no supported kind"),
    "blocks.0.attn.gate": (torch.ones(1), "of no supported kind"),
    "transformer.hra_u": (torch.ones(1), "of HRA, which is not supported"),
    "global_step": (torch.ones(2, 2), "of no supported kind"),
    "something": (torch.ones(2), "of no supported kind"),
}


@pytest.mark.parametrize("name", MEANT)
def test_what_may_count_is_refused(name, sample, file, tmp_path):
    value, reason = MEANT[name]
    model = load_transformer(file)
    with pytest.raises(CheckpointError, match=rf"1 of {len(sample.tensors) + 1} keys can't be applied.*not applied: 1 {reason}"):
        merge_file(save({**sample.tensors, name: value}, tmp_path), 1.0, model, None)
    assert_equal(model, load_file(file))


def test_counters_alone_are_no_lora(tmp_path):
    with pytest.raises(CheckpointError, match="not a LoRA"):
        load_adapter(save({"global_step": torch.tensor(3), "logit_scale": torch.ones(1)}, tmp_path))
