"""config.json of a VAE: a field of the wrong kind is named with what was found and expected; unusual right values are taken."""
import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from pixart.errors import CheckpointError
from pixart.vae import load_vae
from tests.support.tiny_vae import SDXL, tiny_kl, tiny_taesd


def changed(folder, model, changes):
    """Writes a VAE's folder with other values in its config.json."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


KL, TINY = "AutoencoderKL", "AutoencoderTiny"
NO_VAES = [  # class, what config.json says, and the words on it
    (KL, {"scaling_factor": "0.18"}, 'scaling_factor is "0.18"; expected a number above 0, or null'),
    (KL, {"scaling_factor": float("nan")}, "scaling_factor is NaN; expected a number above 0"),
    (KL, {"scaling_factor": 10**400}, "scaling_factor is 1000"),
    (KL, {"shift_factor": [1]}, r"shift_factor is \[1\]; expected a number, or null"),
    (KL, {"latent_channels": None}, "latent_channels is null; expected a whole number above 0"),
    (KL, {"latent_channels": 4.5}, "latent_channels is 4.5"),
    (KL, {"latent_channels": True}, "latent_channels is true"),
    (KL, {"in_channels": -3}, "in_channels is -3"),
    (KL, {"block_out_channels": "x"}, 'block_out_channels is "x"; expected a list, 1 to 64 long, each a whole number above 0'),
    (KL, {"block_out_channels": [32, None, 64, 64]}, r"block_out_channels is \[32, null, 64, 64\]"),
    (KL, {"block_out_channels": []}, r"block_out_channels is \[\]"),
    (KL, {"block_out_channels": [32] * 5}, "block_out_channels 5, down_block_types 4, up_block_types 4; expected the same"),
    (KL, {"down_block_types": [3] * 4}, "down_block_types is .*each a text"),
    (KL, {"up_block_types": ["NoBlock"] * 4}, "NoBlock"),
    (KL, {"layers_per_block": 10**6}, "layers_per_block is 1000000; expected a whole number from 1 to 64"),
    (KL, {"norm_num_groups": "32"}, 'norm_num_groups is "32"'),
    (KL, {"norm_num_groups": 7}, r"num_channels \(32\) must be divisible by num_groups \(7\)"),
    (KL, {"act_fn": 5}, "act_fn is 5; expected a text"),
    (KL, {"sample_size": {}}, "sample_size is {}"),
    (KL, {"use_quant_conv": "false"}, 'use_quant_conv is "false"; expected true or false'),
    (KL, {"latents_mean": [0, "x"]}, "latents_mean is .*or null"),
    (KL, {"in_channels": None, "act_fn": []}, r"in_channels is null; .*; act_fn is \[\]"),
    (TINY, {"scaling_factor": "1"}, 'scaling_factor is "1"'),
    (TINY, {"scaling_factor": 0}, "scaling_factor is 0"),
    (TINY, {"upsample_fn": "big"}, 'upsample_fn is "big"; expected one of nearest'),
    (TINY, {"num_encoder_blocks": [1, 3]}, "encoder_block_out_channels 4, num_encoder_blocks 2"),
    (TINY, {"num_decoder_blocks": [3, 3, 3, 10**6]}, "num_decoder_blocks is "),
    (TINY, {"decoder_block_out_channels": 8}, "decoder_block_out_channels is 8"),
    (TINY, {"latent_magnitude": None}, "latent_magnitude is null"),
    (TINY, {"latent_shift": "x"}, 'latent_shift is "x"; expected a number'),
]


@pytest.mark.parametrize("name, changes, said", NO_VAES)
def test_a_config_that_no_vae_can_have(tmp_path, name, changes, said):
    folder = changed(tmp_path / "vae", tiny_kl() if name == KL else tiny_taesd(), changes)
    for path in (folder, tmp_path):
        with pytest.raises(CheckpointError, match=f"config.json: no {name} can be built from it .*{said}") as caught:
            load_vae(path, SDXL)
        assert str(caught.value).startswith(str(folder / "config.json")) and "Download the VAE again" in str(caught.value)


UNUSUAL = [
    (KL, {"scaling_factor": None}), (KL, {"scaling_factor": 1}), (KL, {"sample_size": [256, 256]}), (KL, {"shift_factor": 0.1}),
    (KL, {"latents_mean": [0, 0.5, 0, 0]}), (KL, {"of a later version": {"a": 1}}), (KL, {"_diffusers_version": None}),
    (TINY, {"scaling_factor": None}), (TINY, {"upsample_fn": "bilinear"}), (TINY, {"latent_magnitude": 2.5}),
    (TINY, {"block_out_channels": 5}),
]  # fmt: skip


@pytest.mark.parametrize("name, changes", UNUSUAL)
def test_unusual_values_in_a_config_are_taken(tmp_path, name, changes):
    vae = load_vae(changed(tmp_path, tiny_kl() if name == KL else tiny_taesd(), changes), SDXL)
    assert vae.factor == (1 / SDXL if name == KL else 1) and vae.decode(torch.randn(1, 4, 2, 2)).shape == (1, 3, 16, 16)


def test_a_tiny_autoencoders_own_scale_counts(tmp_path):
    assert load_vae(changed(tmp_path, tiny_taesd(), {"scaling_factor": 0.5}), SDXL).factor == 2


def test_shapes_that_no_vae_has_name_the_file(tmp_path):
    tensors = {key: value.contiguous() for key, value in tiny_kl().state_dict().items()}
    tensors["encoder.down_blocks.2.resnets.0.conv1.weight"] = torch.zeros(33, 32, 3, 3)
    save_file(tensors, tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match=r"v.safetensors: no AutoencoderKL can be built from it .*Download the VAE again\."):
        load_vae(tmp_path / "v.safetensors", SDXL)
