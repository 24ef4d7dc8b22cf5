"""Training-free KV compression against loops of plain maths, alone and in the whole model beside diffusers."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pixart.attention import torch_attention
from pixart.checkpoints.keys import to_native
from pixart.config import TransformerConfig
from pixart.errors import InputError
from pixart.kv_compress import KVCompression, check_together, compress_keys_values, listed, plan_blocks
from pixart.model import PixArtTransformer
from pixart.sampling import denoise
from pixart.text.encoder import TextEmbeddings
from pixart.training.cpu_attention import dense_attention
from tests.support.checkpoint_factory import diffusers_config, reference_model
from tests.support.kv_reference import LoopAttention, predict

CONFIG = TransformerConfig(hidden_size=144, depth=3, num_heads=2, mlp_hidden=576, caption_channels=32, null_caption=False)
GRIDS = [(4, 6), (5, 7), (1, 9), (3, 3)]


def cells_of(tokens, grid, ratio):
    """Lists of the tokens of each cell, (B, n, D), row by row."""
    image = tokens.reshape(len(tokens), *grid, -1)
    return [
        image[:, i : i + ratio, j : j + ratio].flatten(1, 2) for i in range(0, grid[0], ratio) for j in range(0, grid[1], ratio)
    ]


def merge_by_hand(k, v, grid, ratio, method):
    """Merged keys and values, and log of the share of a whole cell's tokens, (cells,)."""
    pick = (lambda cell: cell.mean(1)) if method == "mean" else (lambda cell: cell[:, 0])
    keys, values = (torch.stack([pick(cell) for cell in cells_of(x, grid, ratio)], dim=1) for x in (k, v))
    sizes = torch.tensor([cell.shape[1] for cell in cells_of(k, grid, ratio)])
    return keys, values, (sizes / ratio**2).log()


@pytest.mark.parametrize("method", ["mean", "stride"])
@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_merging_equals_loops(grid, ratio, method):
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, grid[0] * grid[1], 12)
    keys, values, bias = compress_keys_values(k, v, grid, 3, KVCompression(ratio, method))
    expected_keys, expected_values, shares = merge_by_hand(k, v, grid, ratio, method)
    torch.testing.assert_close(keys, expected_keys)
    torch.testing.assert_close(values, expected_values)
    if grid[0] % ratio or grid[1] % ratio:
        torch.testing.assert_close(bias, shares.expand(2, -1))
        assert compress_keys_values(k, v, grid, 3, KVCompression(ratio, method, size_bias=False))[2] is None
    else:
        assert bias is None


@pytest.mark.parametrize("attention", [torch_attention, dense_attention])
@pytest.mark.parametrize("method", ["mean", "stride"])
@pytest.mark.parametrize("grid", GRIDS)
def test_exact_where_a_cells_tokens_are_equal(grid, method, attention):
    """Then nothing is lost, and cells cut by the edge must weigh less: attention is that of all tokens."""
    torch.manual_seed(0)
    rows, columns = torch.arange(grid[0]) // 2, torch.arange(grid[1]) // 2
    drawn = torch.randn(2, 2, 99, 12)
    k, v = drawn[:, :, (rows[:, None] * (columns.max() + 1) + columns).flatten()]
    q = torch.randn(2, grid[0] * grid[1], 12)
    keys, values, bias = compress_keys_values(k, v, grid, 3, KVCompression(2, method))
    assert keys.shape[1] < k.shape[1]
    torch.testing.assert_close(attention(q, keys, values, heads=3, mask=bias), attention(q, k, v, heads=3), atol=1e-5, rtol=1e-5)


def test_length_and_scale_of_merged_keys():
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 36, 12)
    k = k + 1  # so that no cell's keys cancel out
    kept, values, _ = compress_keys_values(k, v, (6, 6), 3, KVCompression(2, keep_length=True))
    plain, same, _ = compress_keys_values(k, v, (6, 6), 3, KVCompression(2))
    lengths = [cell.reshape(1, -1, 3, 4).norm(dim=-1).mean(1) for cell in cells_of(k, (6, 6), 2)]
    torch.testing.assert_close(kept.reshape(1, 9, 3, 4).norm(dim=-1), torch.stack(lengths, dim=1))
    direction = torch.nn.functional.cosine_similarity(kept.reshape(9, 3, 4), plain.reshape(9, 3, 4), dim=-1)
    torch.testing.assert_close(direction, torch.ones(9, 3))
    torch.testing.assert_close(values, same)
    scaled = compress_keys_values(k, v, (6, 6), 3, KVCompression(2, key_scale=1.5))
    torch.testing.assert_close(scaled[0], 1.5 * plain)
    torch.testing.assert_close(scaled[1], same)


def test_keys_that_cancel_out_stay_finite():
    k = torch.tensor([1.0, -1, -1, 1])[None, :, None].expand(1, 4, 12)
    keys = compress_keys_values(k, k, (2, 2), 3, KVCompression(2, keep_length=True))[0]
    assert keys.abs().max() == 0


@pytest.fixture(scope="module")
def theirs():
    return reference_model(diffusers_config(depth=3))


@pytest.fixture(scope="module")
def ours(theirs):
    model = PixArtTransformer(CONFIG)
    model.load_state_dict(to_native(theirs.state_dict()))
    return model.eval().requires_grad_(False)


def inputs(rows, columns):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 4, 2 * rows, 2 * columns, generator=generator)
    context = torch.randn(2, 5, 32, generator=generator)
    return latent, torch.tensor([999, 30]), context, torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


def run(model, grid, *compression):
    latent, timestep, context, mask = inputs(*grid)
    return model(latent, timestep.float(), context, mask, kv_compression=compression)


@pytest.mark.parametrize("grid", [(6, 8), (5, 7)])
def test_whole_model_beside_diffusers(ours, grid):
    """Block 0 by 4, blocks 1 and 2 by 2; diffusers' model with the same merging in its attention."""
    reference = reference_model(diffusers_config(depth=3))
    for block, (ratio, method) in {0: (4, "stride"), 1: (2, "mean"), 2: (2, "mean")}.items():

        def merge(k, v, ratio=ratio, method=method):
            return merge_by_hand(k, v, grid, ratio, method)

        reference.transformer_blocks[block].attn1.set_processor(LoopAttention(merge))
    expected = predict(reference, *inputs(*grid))
    found = run(ours, grid, KVCompression(2, first_block=1), KVCompression(4, "stride", last_block=0))
    assert (found - expected).norm() / expected.norm() < 1e-5
    plain = run(ours, grid)
    assert (plain - expected).norm() / expected.norm() > 1e-3
    assert torch.equal(plain, run(ours, grid))  # nothing stays behind


def test_pictures_below_min_tokens_are_left_alone(ours):
    plain = run(ours, (6, 8))
    assert torch.equal(run(ours, (6, 8), KVCompression(2, min_tokens=49)), plain)
    assert not torch.equal(run(ours, (6, 8), KVCompression(2, min_tokens=48)), plain)


def test_half_precision(ours):
    model = PixArtTransformer(CONFIG).to(torch.bfloat16)
    model.load_state_dict(ours.state_dict())
    latent, timestep, context, mask = inputs(5, 7)
    compression = [KVCompression(2, keep_length=True)]
    with torch.no_grad():
        found = model(latent.bfloat16(), timestep.float(), context.bfloat16(), mask, kv_compression=compression)
    expected = run(ours, (5, 7), *compression)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 3e-2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratio": 1}, "ratio is 1; expected 2 to 8"),
        ({"ratio": 9}, "ratio is 9"),
        ({"ratio": 2.5}, "ratio is 2.5; expected a whole number"),
        ({"ratio": "2"}, "ratio is '2'; expected a whole number"),
        ({"first_block": 1.0}, "first_block is 1.0; expected a whole number"),
        ({"last_block": None}, "last_block is None; expected a whole number"),
        ({"end_percent": "1"}, "end_percent is '1'; expected a number"),
        ({"start_percent": float("nan")}, "start_percent is nan; expected 0 to below 1"),
        ({"method": "median"}, "method is 'median'; expected one of mean, stride"),
        ({"start_percent": 0.6, "end_percent": 0.4}, "end_percent is 0.4; expected more than start_percent 0.6"),
        ({"start_percent": 1.0}, "start_percent is 1.0; expected 0 to below 1"),
        ({"end_percent": True}, "end_percent is True; expected a number"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "more than start_percent"),
        ({"start_percent": -0.1}, "start_percent is -0.1; expected 0 to below 1"),
        ({"end_percent": 1.5}, "end_percent is 1.5; expected 0 to 1"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"key_scale": 0}, "key_scale is 0"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(InputError, match=message):
        KVCompression(**values)


def test_numbers_of_numpy_are_numbers():
    found = KVCompression(np.int64(4), end_percent=np.float32(0.5))
    assert (found.ratio, found.end_percent) == (4, 0.5) and type(found.ratio) is int


@pytest.mark.parametrize("stranger", ["mean", {"ratio": 2}, [2], 5])
def test_strangers_instead_of_a_compression(ours, stranger):
    text, latent = TextEmbeddings(torch.zeros(1, 2, 32), torch.ones(1, 2)), torch.zeros(1, 4, 4, 4)
    calls = (
        lambda: ours(latent, torch.zeros(1), text.states, kv_compression=stranger),
        lambda: denoise(ours, latent, text, None, steps=1, kv_compression=stranger),
    )
    for call in calls:
        with pytest.raises(InputError, match="kv_compression is .*; expected a KVCompression, like"):
            call()


def test_one_several_or_none():
    one = KVCompression()
    assert (listed(None), listed(one), listed([one, one])) == ((), (one,), (one, one))


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        (KVCompression(first_block=3), "first_block is 3; expected 0 to 2: this model has blocks 0 to 2"),
        (KVCompression(first_block=-1), "first_block is -1"),
        (KVCompression(last_block=3), r"last_block is 3; expected 0 \(first_block\) to 2, or -1"),
        (KVCompression(first_block=2, last_block=1), r"last_block is 1; expected 2 \(first_block\) to 2"),
    ],
)
def test_blocks_outside_the_model(ours, compression, message):
    for call in (lambda: check_together([compression], CONFIG), lambda: run(ours, (2, 2), compression)):
        with pytest.raises(InputError, match=message):
            call()


def test_a_block_is_compressed_once_at_a_time():
    early, late = KVCompression(2, end_percent=0.5), KVCompression(4, start_percent=0.5, end_percent=1.0)
    check_together([early, late], CONFIG)
    check_together([KVCompression(last_block=1), KVCompression(4, first_block=2)], CONFIG)
    with pytest.raises(InputError, match=r"block\(s\) 1-2 are compressed already \(by 4, from 0.5 to 1 of sampling\)"):
        check_together([early, late, KVCompression(2, first_block=1, start_percent=0.6, end_percent=0.9)], CONFIG)
    with pytest.raises(InputError, match="block 0 is compressed already"):
        plan_blocks([early, late], CONFIG, 16)


def test_blocks_that_were_trained_so_are_refused():
    config = replace(CONFIG, compressed_blocks=((1, 2), (2, 2)))
    check_together([KVCompression(last_block=0)], config)
    with pytest.raises(InputError, match=r"block\(s\) 1-2 of 0-2 are compressed already.*Expected blocks among 0\."):
        check_together([KVCompression()], config)
    with pytest.raises(InputError, match="block 1 is compressed already"):
        plan_blocks([KVCompression()], config, 16)


def test_parts_of_sampling_neither_overlap_nor_leave_gaps():
    parts = [KVCompression(end_percent=0.3), KVCompression(start_percent=0.3, end_percent=0.8), KVCompression(start_percent=0.8, end_percent=1.0)]
    for timestep in range(1000):
        assert sum(part.active_at(timestep) for part in parts) == 1
        assert KVCompression(end_percent=1.0).active_at(timestep)
    assert parts[0].active_at(999) and parts[0].active_at(700) and not parts[0].active_at(699)
    assert parts[2].active_at(0) and not parts[2].active_at(200)


def test_sampler_compresses_in_its_part_of_sampling():
    """Which steps, through the sampler and a transformer that only takes notes."""
    seen = []

    def transformer(latent, timestep, *_, kv_compression, **__):
        seen.append((int(timestep[0]), [one.ratio for one in kv_compression]))
        return torch.zeros(len(latent), 8, *latent.shape[2:])

    class Scheduler:
        init_noise_sigma = 1.0

        def set_timesteps(self, steps, device):
            self.timesteps = torch.tensor([999, 700, 400, 100])

        def scale_model_input(self, latents, timestep):
            return latents

        def step(self, predicted, timestep, latents, return_dict):
            return (latents,)

    methods = {"config": CONFIG, "__call__": staticmethod(transformer), "positions_of": lambda self, latent: None}
    recording = type("Recorder", (), methods)()
    text = TextEmbeddings(torch.zeros(1, 2, 32), torch.ones(1, 2))
    wanted = [KVCompression(2, end_percent=0.5), KVCompression(4, start_percent=0.8, end_percent=1.0)]
    denoise(recording, torch.zeros(1, 4, 4, 4), text, Scheduler(), steps=4, kv_compression=wanted)
    assert seen == [(999, [2]), (700, [2]), (400, []), (100, [4])]
    with pytest.raises(InputError, match="compressed already"):
        denoise(recording, torch.zeros(1, 4, 4, 4), text, Scheduler(), steps=4, kv_compression=[KVCompression(), KVCompression()])
