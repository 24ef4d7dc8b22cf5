"""The key table against a second, hand-written mapping, in both directions."""
from __future__ import annotations

import pytest
import torch

from pixart.checkpoints.keys import find_prefixes, is_known_prefix, key_layout, native_target, to_diffusers, to_native
from pixart.errors import CheckpointError
from tests.support.checkpoint_factory import PREFIXES, tiny_weights


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_both_directions_are_bit_equal(micro, dtype):
    _, diffusers, original = tiny_weights(micro, null_rows=None, dtype=torch.float32)
    cast = lambda tensors: {key: value.to(dtype) for key, value in tensors.items()}
    diffusers, original = cast(diffusers), cast(original)
    for found, expected in ((to_native(diffusers), original), (to_diffusers(original), diffusers)):
        assert set(found) == set(expected)
        for key in expected:
            assert found[key].dtype == dtype
            assert torch.equal(found[key].view(torch.uint8), expected[key].view(torch.uint8)), key


def test_null_caption_survives_the_round_trip():
    _, _, original = tiny_weights(null_rows=300)
    back = to_native(to_diffusers(original))
    assert torch.equal(back["y_embedder.y_embedding"], original["y_embedder.y_embedding"])


def test_kv_compression_layers_have_names():
    _, _, original = tiny_weights()
    original["blocks.1.attn.sr.weight"] = torch.randn(144, 1, 2, 2)
    original["blocks.1.attn.norm.weight"] = torch.randn(144)
    assert set(to_native(to_diffusers(original))) == set(original)


def test_target_names_the_piece_of_a_fused_weight():
    assert native_target("transformer_blocks.7.attn1.to_v.weight") == ("blocks.7.attn.qkv.weight", 2, 3)
    assert native_target("transformer_blocks.0.attn2.to_k.bias") == ("blocks.0.cross_attn.kv_linear.bias", 0, 2)
    assert native_target("proj_out.weight") == ("final_layer.linear.weight", 0, 1)
    assert native_target("blocks.0.attn.qkv.weight") is None
    assert native_target("transformer_blocks.0.attn3.to_q.weight") is None


def test_layout():
    _, diffusers, original = tiny_weights()
    assert key_layout(diffusers) == "diffusers"
    assert key_layout(original) == "original"


@pytest.mark.parametrize("outer", ("", *PREFIXES))
@pytest.mark.parametrize("inner", ("", *PREFIXES, "_orig_mod."))
def test_prefixes_alone_and_nested(outer, inner):
    for tensors in tiny_weights()[1:]:
        prefixes = find_prefixes(f"{outer}{inner}{key}" for key in tensors)
        assert prefixes == [outer + inner]
        assert is_known_prefix(prefixes[0])


def test_unknown_prefix_is_found_but_not_known():
    assert find_prefixes(f"net.student.{key}" for key in tiny_weights()[2]) == ["net.student."]
    assert not is_known_prefix("net.student.")


def test_sdxl_has_no_pixart_prefix():
    keys = ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", "down_blocks.1.attentions.0.proj_out.weight"]
    assert find_prefixes(keys) == []


def test_missing_part_is_named():
    _, diffusers, _ = tiny_weights()
    del diffusers["transformer_blocks.1.attn1.to_k.bias"]
    with pytest.raises(CheckpointError, match=r"missing transformer_blocks\.1\.attn1\.to_k\.bias"):
        to_native(diffusers)


def test_every_unknown_key_is_named():
    _, diffusers, original = tiny_weights()
    with pytest.raises(CheckpointError, match="(?s)banana.*cherry"):
        to_native({**diffusers, "banana": torch.zeros(1), "cherry": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="banana"):
        to_diffusers({**original, "banana": torch.zeros(1)})


@pytest.mark.parametrize("dtypes, joined", [
    ((torch.float16, torch.float32), torch.float32), ((torch.float16, torch.bfloat16), torch.float32),
    ((torch.float8_e4m3fn, torch.bfloat16), torch.bfloat16), ((torch.float8_e4m3fn, torch.float8_e5m2), torch.bfloat16),
])  # fmt: skip
def test_parts_of_different_dtype_are_joined_in_one_that_holds_both(dtypes, joined):
    _, diffusers, _ = tiny_weights()
    names = [f"transformer_blocks.0.attn1.to_{part}.weight" for part in "qkv"]
    for name, dtype in zip(names, (dtypes[0], dtypes[1], dtypes[1])):
        diffusers[name] = diffusers[name].to(dtype)
    found = to_native(diffusers)["blocks.0.attn.qkv.weight"]
    assert found.dtype == joined and torch.equal(found.float(), torch.cat([diffusers[name].float() for name in names]))


def test_a_part_of_whole_numbers_is_refused():
    _, diffusers, _ = tiny_weights()
    diffusers["transformer_blocks.0.attn1.to_q.weight"] = diffusers["transformer_blocks.0.attn1.to_q.weight"].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.weight.*int8"):
        to_native(diffusers)