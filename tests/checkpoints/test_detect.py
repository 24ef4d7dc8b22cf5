"""What is decided about a state dict, why, and what is refused."""
from __future__ import annotations

import json

import pytest
import torch

from pixart.checkpoints import Hints, prepare
from pixart.config import TransformerConfig, get_variant
from pixart.errors import CheckpointError, ConfigError
from pixart.model import PixArtTransformer
from tests.support.checkpoint_factory import stored_positions, tiny_weights


def meta_weights(**changes):
    """Native tensors without storage, so that full-size models cost nothing."""
    return PixArtTransformer(TransformerConfig(**changes), device="meta").state_dict()


def found(tensors, variant="auto", **options):
    return prepare(tensors, source="file", variant=variant, **options).detection


@pytest.mark.parametrize(
    "changes, variant, vae, scale, tokens",
    [
        ({"max_tokens": 120}, "alpha-512", "sd1", 0.18215, 120),
        ({"max_tokens": 120, "micro_condition": True}, "alpha-1024", "sd1", 0.18215, 120),
        ({"micro_condition": True, "null_caption": False}, "alpha-1024", "sd1", 0.18215, 120),
        ({"max_tokens": 300}, "sigma-1024", "sdxl", 0.13025, 300),
        ({"null_caption": False}, "sigma-1024", "sdxl", 0.13025, 300),
        ({"depth": 42}, "sigma-900m", "sdxl", 0.13025, 300),
        ({"depth": 42, "null_caption": False}, "sigma-900m", "sdxl", 0.13025, 300),
    ],
)
def test_auto(changes, variant, vae, scale, tokens):
    d = found(meta_weights(**changes))
    assert (d.variant, d.vae, d.latent_scale, d.max_tokens) == (variant, vae, scale, tokens)
    assert d.family == variant.split("-")[0]
    assert d.config == TransformerConfig(**{**changes, "max_tokens": tokens})
    assert d.config.num_heads == 16 and d.config.position_range == 32
    assert d.reasons


def test_demo_shape_is_the_demo():
    d = found(PixArtTransformer(get_variant("demo").transformer, device="meta").state_dict())
    assert (d.variant, d.vae, d.base_size, d.config) == ("demo", "demo", 256, get_variant("demo").transformer)


def test_absent_null_caption_is_said_to_leave_the_family_open():
    d = found(meta_weights(null_caption=False))
    assert not d.family_known and "(assumed)" in d.describe()
    assert any("can't be told apart" in reason for reason in d.reasons)
    assert found(meta_weights()).family_known


@pytest.mark.parametrize("variant", ["alpha-256", "alpha-512", "sigma-256", "sigma-512", "sigma-2k"])
def test_explicit_variant_decides_what_weights_leave_open(variant):
    d, want = found(meta_weights(null_caption=False), variant), get_variant(variant)
    assert (d.variant, d.family, d.base_size, d.max_tokens) == (variant, want.family, want.base_size, want.max_tokens)
    assert d.config.position_range == want.transformer.position_range
    assert any(variant in reason for reason in d.reasons)


@pytest.mark.parametrize(
    "changes, variant, word",
    [
        ({}, "alpha-1024", "csize_embedder"),
        ({"micro_condition": True, "max_tokens": 120}, "alpha-512", "csize_embedder"),
        ({"max_tokens": 120}, "sigma-512", "120 rows"),
        ({"max_tokens": 300}, "alpha-512", "300 rows"),
        ({"depth": 28}, "sigma-900m", "28 blocks"),
        ({"depth": 42}, "sigma-1024", "42 blocks"),
        ({}, "demo", "216"),
    ],
)
def test_contradicting_variant_is_refused(changes, variant, word):
    with pytest.raises(CheckpointError, match=word) as caught:
        found(meta_weights(**changes), variant)
    assert "file" in str(caught.value) and "auto" in str(caught.value)


def test_unknown_variant_lists_the_zoo():
    with pytest.raises(ConfigError, match="sigma-2k"):
        found(meta_weights(), "sigma-9000")


def test_fewer_blocks_than_the_variant_are_fine():
    d = found(meta_weights(depth=2), "sigma-2k")
    assert d.config.depth == 2 and any("depth is 2" in reason for reason in d.reasons)


@pytest.mark.parametrize("hidden, heads", [(72, 1), (144, 2), (360, 5)])
def test_small_models(hidden, heads):
    config = TransformerConfig(
        hidden_size=hidden, depth=3, num_heads=heads, mlp_hidden=3 * hidden, caption_channels=48, max_tokens=77, out_channels=4
    )
    d = found(PixArtTransformer(config, device="meta").state_dict())
    assert d.config == config
    assert any("77 rows" in reason for reason in d.reasons)


def test_heads_that_are_not_72_wide_need_a_config():
    config = TransformerConfig(hidden_size=128, depth=1, num_heads=4, mlp_hidden=512, caption_channels=32)
    tensors = PixArtTransformer(config, device="meta").state_dict()
    with pytest.raises(CheckpointError, match="128 is not a multiple of 72.*config.json"):
        found(tensors)
    assert found(tensors, hints=Hints(num_heads=4)).config == config


def test_kv_compression_blocks_and_ratios():
    compressed = ((1, 2), (3, 4))
    d = found(meta_weights(depth=4, compressed_blocks=compressed))
    assert d.config.compressed_blocks == compressed
    assert "block 1: 2x2, block 3: 4x4" in d.describe()
    assert any("KV compression" in reason for reason in d.reasons)


@pytest.mark.parametrize(
    "rows, variant, base", [(16, "sigma-256", 256), (32, "sigma-512", 512), (64, "sigma-1024", 1024), (128, "sigma-2k", 2048)]
)
def test_stored_positions_hint_at_sigmas_base_size(rows, variant, base):
    tensors = {**meta_weights(depth=1), "pos_embed": stored_positions(rows, 1152, 32)}
    d = found(tensors)
    assert (d.variant, d.base_size, d.config.position_range) == (variant, base, 32)
    assert any("hint" in reason for reason in d.reasons)


@pytest.mark.parametrize(
    "rows, span, variant", [(16, 16, "alpha-256"), (16, 32, "alpha-512"), (32, 32, "alpha-512"), (64, 32, "alpha-512")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_alpha_256_needs_a_table_that_counts_to_16(rows, span, variant, dtype):
    tensors = {**meta_weights(depth=1, max_tokens=120), "pos_embed": stored_positions(rows, 1152, span).to(dtype)}
    d = found(tensors)
    assert d.variant == variant
    assert d.config.position_range == get_variant(variant).transformer.position_range


def test_a_table_of_noise_changes_nothing_but_the_size_hint():
    tensors = {**meta_weights(depth=1, max_tokens=120), "pos_embed": torch.randn(1, 256, 1152)}
    assert found(tensors).variant == "alpha-512"


@pytest.mark.parametrize("shape", [(1, 10, 1152), (1, 0, 1152), (256,), (1, 256, 8)])
def test_odd_tables_are_ignored(shape):
    assert found({**meta_weights(depth=1), "pos_embed": torch.zeros(shape)}).base_size is None


def test_dtype_is_that_of_most_weights_and_not_of_the_table():
    _, _, original = tiny_weights(dtype=torch.float16)
    assert found({**original, "pos_embed": torch.zeros(1, 16384, 144)}).dtype == "float16"


def test_report_is_plain_json_and_readable_text():
    d = found({f"model.{key}": value for key, value in meta_weights().items()})
    values = json.loads(json.dumps(d.to_dict()))
    assert values["config"]["depth"] == 28 and values["prefix"] == "model." and values["format"] == "original"
    text = d.describe()
    for word in ("PixArt-Sigma", "300", "SDXL", "model.", "why:", "M parameters"):
        assert word in text


def test_absurd_block_number_is_refused_quickly():
    tensors = meta_weights(depth=1)
    tensors["blocks.99999999.attn.proj.bias"] = torch.zeros(1152)
    with pytest.raises(CheckpointError, match="99999999"):
        found(tensors)
