"""The consistency decoder beside diffusers' own, tiny."""
import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.consistency import load_consistency_decoder
from pixart.errors import CheckpointError, InputError, UnsupportedError
from tests.support.tiny_consistency import tiny_decoder, write_decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("decoder"))


def latents(batch=1):
    return torch.randn(batch, 4, 4, 6, generator=torch.Generator().manual_seed(2))


def test_decoding_equals_diffusers(folder):
    expected = tiny_decoder().decode(latents(), generator=torch.Generator().manual_seed(0)).sample / 2 + 0.5
    found = load_consistency_decoder(folder).decode(latents())
    assert found.shape == (1, 3, 32, 48)
    torch.testing.assert_close(found, expected.clamp(0, 1))
    assert found.std() > 0.01


def test_a_picture_is_the_same_in_any_batch_and_for_any_run(folder):
    vae = load_consistency_decoder(folder)
    both = vae.decode(latents(2))
    torch.testing.assert_close(both[1:], vae.decode(latents(2)[1:]))
    assert not torch.equal(vae.decode(latents(), seed=1), vae.decode(latents()))


def test_encoding_equals_diffusers(folder):
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(4))
    expected = tiny_decoder().encode(image * 2 - 1).latent_dist.mean
    torch.testing.assert_close(load_consistency_decoder(folder).encode(image), expected)


def test_latents_of_another_vae(folder):
    with pytest.raises(InputError, match=r"\(1, 16, 4, 4\).*alpha"):
        load_consistency_decoder(folder).decode(torch.zeros(1, 16, 4, 4))


def test_other_weights_are_refused(folder, tmp_path):
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="not the consistency decoder.*openai/consistency-decoder"):
        load_consistency_decoder(tmp_path / "vae.safetensors")
    broken = write_decoder(tmp_path / "broken", leave_out="encoder.conv_in.bias")
    with pytest.raises(CheckpointError, match="missing encoder.conv_in.bias"):
        load_consistency_decoder(broken)
    config = json.loads((broken / "config.json").read_text()) | {"_class_name": "AutoencoderKL"}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names AutoencoderKL"):
        load_consistency_decoder(broken)


@pytest.mark.parametrize("config", [{"encoder_block_out_channels": [7]}, {"latent_channels": "4"}, {"encoder_down_block_types": [3]}])
def test_a_config_that_nothing_can_be_built_from(tmp_path, config):
    folder = write_decoder(tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(CheckpointError, match="config.json: no consistency decoder can be built from it.*openai/consistency-decoder"):
        load_consistency_decoder(folder)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"latent_channels": "4"}, 'latent_channels is "4"; expected a whole number above 0'),
        ({"scaling_factor": "0.18215"}, "scaling_factor is .*; expected a number above 0"),
        ({"encoder_double_z": "false"}, "encoder_double_z is .*; expected true or false"),
        ({"encoder_layers_per_block": 10**6}, "encoder_layers_per_block is 1000000; expected a whole number from 1 to 64"),
        ({"decoder_norm_eps": None}, "decoder_norm_eps is null"),
        ({"decoder_downsample_padding": "1"}, "decoder_downsample_padding is"),
        ({"encoder_block_out_channels": [32]}, "encoder_block_out_channels 1, encoder_down_block_types 4"),
        ({"decoder_up_block_types": [None] * 4}, "decoder_up_block_types is .*each a text"),
    ],
)
def test_a_wrong_field_of_the_config_is_named(tmp_path, config, said):
    file = write_decoder(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(CheckpointError, match=f"config.json: no consistency decoder can be built from it .*{said}"):
        load_consistency_decoder(tmp_path)


def test_a_config_without_a_scale_means_the_usual_one(tmp_path, folder):
    file = write_decoder(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": None}))
    assert torch.equal(load_consistency_decoder(tmp_path).decode(latents()), load_consistency_decoder(folder).decode(latents()))


def test_a_lack_of_memory_is_no_fault_of_the_config(folder, monkeypatch):
    from diffusers import ConsistencyDecoderVAE

    def fail(config):
        raise MemoryError

    monkeypatch.setattr(ConsistencyDecoderVAE, "from_config", fail)
    with pytest.raises(CheckpointError, match="not enough memory.*not at fault"):
        load_consistency_decoder(folder)


DAMAGED = {  # more entries of the state dict, and what the error says
    "no tensor": ({"epoch": "three"}, r"1 entries are not tensors \(epoch\)"),
    "no name": ({7: torch.zeros(1)}, r"1 entries are not tensors \(7\)"),
    "NaN": ({"encoder.conv_out.bias": torch.full((8,), torch.nan)}, "encoder.conv_out.bias has 8 NaN or infinite values of 8"),
    "integers": ({"encoder.conv_out.bias": torch.zeros(8, dtype=torch.int64)}, "encoder.conv_out.bias holds torch.int64"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights_are_named(tmp_path, case):
    changes, message = DAMAGED[case]
    folder = write_decoder(tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    torch.save({**load_file(file), **changes}, folder / "diffusion_pytorch_model.bin")
    file.unlink()
    with pytest.raises(CheckpointError, match=message):
        load_consistency_decoder(folder)


def test_without_diffusers_the_error_names_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UnsupportedError, match="pip install diffusers"):
        importlib.import_module("pixart.consistency").load_consistency_decoder(folder)


def test_openais_own_program_is_named(tmp_path):
    """decoder.pt of openai/consistencydecoder: compiled code, which is not run."""

    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.save(torch.jit.script(Program()), str(tmp_path / "decoder.pt"))
    with pytest.raises(CheckpointError, match="compiled program.*diffusers form"):
        load_consistency_decoder(tmp_path / "decoder.pt")
    torch.save({"decoder.weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="not the consistency decoder"):
        load_consistency_decoder(tmp_path / "weights.pt")
