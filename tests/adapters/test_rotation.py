"""OFT, BOFT, whole weights, tables and biases against the formulas, row by row, and against what the host computes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart.adapters import fit_adapter, load_adapter, merge_layers, parameter_shapes
from pixart.checkpoints import load_transformer
from tests.support import checkpoint_factory


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return checkpoint_factory.write("safetensors", tmp_path_factory.mktemp("model"), *checkpoint_factory.tiny_weights(depth=2))


def merged(file, tensors: dict[str, Tensor], folder, strength: float = 1.0) -> dict:
    model = load_transformer(file)
    save_file(tensors, folder / "a.safetensors")
    fit = fit_adapter(load_adapter(folder / "a.safetensors"), parameter_shapes(model))
    assert not fit.left
    merge_layers(model, fit.layers, strength)
    return {**model.state_dict(), "describe": fit.describe()}


def orthogonal(block: Tensor, constraint: float, of: Tensor) -> Tensor:
    """Cayley's transform by solving, of a skew-symmetric matrix; `of`: all blocks, whose norm is constrained."""
    whole = of - of.transpose(-1, -2)
    scale = min(1.0, constraint / float(whole.norm())) if constraint else 1.0
    skew, eye = scale * (block - block.T), torch.eye(len(block))
    return torch.linalg.solve((eye - skew).T, (eye + skew).T).T


@pytest.mark.parametrize("constraint", [0.0, 0.5])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_oft_turns_blocks_of_rows(file, tmp_path, constraint: float, rescale: bool, strength: float) -> None:
    order = torch.Generator().manual_seed(0)
    blocks, factors = torch.randn(6, 24, 24, generator=order) * 0.1, torch.rand(144, 1, generator=order) + 0.5
    tensors = {"lycoris_blocks_0_attn_proj.oft_blocks": blocks, "lycoris_blocks_0_attn_proj.alpha": torch.tensor(constraint / 144)}
    tensors |= {"lycoris_blocks_0_attn_proj.rescale": factors} if rescale else {}  # LyCORIS stores the bound for each row
    weight = load_file(file)["blocks.0.attn.proj.weight"]
    rows = [orthogonal(block, constraint, blocks).T @ part for block, part in zip(blocks, weight.chunk(6))]
    turned = torch.cat(rows) * (factors if rescale else 1)
    found = merged(file, tensors, tmp_path, strength)
    torch.testing.assert_close(found["blocks.0.attn.proj.weight"], weight + strength * (turned - weight), atol=1e-4, rtol=1e-4)
    assert "OFT" in found["describe"]
    if not rescale:
        assert torch.allclose(turned.norm(dim=0), weight.norm(dim=0), rtol=1e-4)  # a rotation keeps lengths


def test_boft_turns_butterflies_of_rows(file, tmp_path) -> None:
    """Two factors: of neighbours, then of rows that lie half a block further apart."""
    order = torch.Generator().manual_seed(1)
    blocks = torch.randn(2, 36, 4, 4, generator=order) * 0.2
    weight = load_file(file)["blocks.0.attn.proj.weight"]
    expected, turns = weight.clone(), [[orthogonal(b, 0, b) for b in level] for level in blocks]
    for level, reach in ((0, 2), (1, 4)):
        result = torch.empty_like(expected)
        for start in range(0, 144, 2 * reach):
            for lane in range(reach // 2):  # rows of one block: pairs from either half
                rows = _rows(start, lane, reach)
                block = turns[level][(start // 2 // reach) * (reach // 2) + lane]
                result[rows] = block @ expected[rows]
        expected = result
    found = merged(file, {"lycoris_blocks_0_attn_proj.oft_blocks": blocks, "lycoris_blocks_0_attn_proj.alpha": torch.tensor(0.0)}, tmp_path)
    torch.testing.assert_close(found["blocks.0.attn.proj.weight"], expected, atol=1e-4, rtol=1e-4)
    assert "BOFT" in found["describe"]


def _rows(start: int, lane: int, reach: int) -> list[int]:
    """Rows that one block of 4 turns: two neighbours in the interleaved order of two stretches of `reach` rows."""
    interleaved = [start + half * reach + j for j in range(reach) for half in (0, 1)]
    return interleaved[4 * lane : 4 * lane + 4]


def test_a_fused_weights_piece_is_turned_alone(file, tmp_path) -> None:
    blocks = torch.randn(6, 24, 24, generator=torch.Generator().manual_seed(2)) * 0.1
    found = merged(file, {"transformer.transformer_blocks.1.attn1.to_k.oft_blocks": blocks}, tmp_path)["blocks.1.attn.qkv.weight"]
    before = load_file(file)["blocks.1.attn.qkv.weight"]
    assert torch.equal(found[:144], before[:144]) and torch.equal(found[288:], before[288:])
    assert not torch.equal(found[144:288], before[144:288])


def test_whole_weights_biases_and_tables(file, tmp_path) -> None:
    """As modules_to_save, bias "all" and full differences write them."""
    before = load_file(file)
    matrices = {"base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 144),
                "base_model.model.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(144, 2)}  # fmt: skip
    new = {
        "base_model.model.proj_out.modules_to_save.default.weight": ("final_layer.linear.weight", slice(None)),
        "base_model.model.transformer_blocks.0.attn1.to_v.base_layer.bias": ("blocks.0.attn.qkv.bias", slice(288, 432)),
        "base_model.model.scale_shift_table": ("final_layer.scale_shift_table", slice(None)),
        "base_model.model.transformer_blocks.1.scale_shift_table": ("blocks.1.scale_shift_table", slice(None)),
    }
    tensors = {key: before[name][rows] + 0.5 for key, (name, rows) in new.items()}
    tensors["diffusion_model.blocks.0.scale_shift_table.diff"] = torch.full((6, 144), 0.25)
    tensors["diffusion_model.y_embedder.y_embedding.diff"] = torch.full((300, 32), 0.25)
    found = merged(file, {**matrices, **tensors}, tmp_path, strength=0.5)
    for name, rows in new.values():
        torch.testing.assert_close(found[name][rows], before[name][rows] + 0.25)
    torch.testing.assert_close(found["blocks.0.scale_shift_table"], before["blocks.0.scale_shift_table"] + 0.125)
    torch.testing.assert_close(found["y_embedder.y_embedding"], before["y_embedder.y_embedding"] + 0.125)
    assert torch.equal(found["blocks.0.attn.qkv.bias"][:288], before["blocks.0.attn.qkv.bias"][:288])
