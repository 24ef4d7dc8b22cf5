"""The attention functions against loops of plain maths, and KV compression against its definition."""
import pytest
import torch
import torch.nn as nn

from pixart.attention import CrossAttention, SelfAttention, caption_lengths, one_token_of, torch_attention
from pixart.training.cpu_attention import dense_attention


def slow_attention(q, k, v, heads, mask=None):
    """Softmax attention, one batch entry and head at a time."""
    out = torch.zeros_like(q)
    width = q.shape[-1] // heads
    for b in range(q.shape[0]):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[b, :, part] @ k[b, :, part].T / width**0.5
            if mask is not None:
                scores = scores + mask[b] if mask.is_floating_point() else scores.masked_fill(mask[b] == 0, -torch.inf)
            out[b, :, part] = scores.softmax(-1) @ v[b, :, part]
    return out


@pytest.mark.parametrize("function", [torch_attention, dense_attention])
def test_float_masks_are_added_to_the_scores(function):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    bias = torch.randn(2, 7)
    torch.testing.assert_close(function(q, k, v, heads=3, mask=bias), slow_attention(q, k, v, 3, bias))


@pytest.mark.parametrize("function", [torch_attention, dense_attention])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_plain_maths(function, masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1]]) if masked else None
    torch.testing.assert_close(function(q, k, v, heads=3, mask=mask), slow_attention(q, k, v, 3, mask))


def test_compressed_keys_and_values_follow_the_paper():
    """K and V: depthwise R x R convolution with stride R over the grid, then LayerNorm; rests are floored away."""
    torch.manual_seed(0)
    rows, columns, width, ratio = 5, 7, 12, 2
    layer = SelfAttention(width, 3, torch_attention, nn, ratio=ratio)
    hidden = torch.randn(2, rows * columns, width)
    q, k, v = layer.qkv(hidden).split(width, dim=-1)

    def compress(tokens):
        grid = tokens.reshape(2, rows, columns, width)
        cells = []
        for i in range(rows // ratio):
            for j in range(columns // ratio):
                window = grid[:, i * ratio : (i + 1) * ratio, j * ratio : (j + 1) * ratio]
                kernel = layer.sr.weight[:, 0].permute(1, 2, 0)  # (R, R, width)
                cells.append((window * kernel).sum((1, 2)) + layer.sr.bias)
        return layer.norm(torch.stack(cells, dim=1))

    expected = layer.proj(slow_attention(q, compress(k), compress(v), 3))
    torch.testing.assert_close(layer(hidden, (rows, columns)), expected)


def test_lengths_of_captions_whose_tokens_come_first():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1]])
    assert caption_lengths(mask) == caption_lengths(mask.bool()) == caption_lengths(7.0 * mask) == (3, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((1, 6), (0, 1, False)), ((6, 1), (1, 2, False)), ((4, 1), (1, 2, True)), ((1, 1), (0, 2, False)), ((6, 1, 1, 3), (1, 3, True)),
        ((0, 1), (1, 2, True)), ((1, 6, 1), None), ((6, 4), None), ((), None),
    ],
)  # fmt: skip
def test_captions_of_one_token_are_spared_where_they_stand_together(lengths, expected):
    assert one_token_of(lengths, 6) == expected


@pytest.mark.parametrize("lengths", [(1, 6), (6, 1), (1, 1), (1, 1, 4, 6), (5, 6, 1, 1, 1), (2, 1, 6)])
def test_captions_of_one_token_need_no_queries(lengths):
    """As with a mask alone, where the attention function sees only the other rows, and a mask only where they have padding."""
    torch.manual_seed(0)
    seen = []

    def counting(q, k, v, **given):
        seen.append((len(q), given["mask"] is not None))
        return torch_attention(q, k, v, **given)

    layer = CrossAttention(12, 3, counting, nn)
    hidden, context = torch.randn(len(lengths), 5, 12), torch.randn(len(lengths), 6, 12)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    expected = layer(hidden, context, mask)
    assert seen.pop() == (len(lengths), True)
    torch.testing.assert_close(layer(hidden, context, mask, one_token=one_token_of(lengths, 6)), expected)
    calls = {(1, 6): [(1, False)], (6, 1): [(1, False)], (1, 1): [], (1, 1, 4, 6): [(2, True)], (5, 6, 1, 1, 1): [(2, True)]}
    assert seen == calls.get(lengths, [(1, True), (1, True)])
