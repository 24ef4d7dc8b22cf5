"""Every zoo entry against diffusers' PixArtTransformer2DModel: through each file format, and at its bins.

The quick run measures a sample of the bins, from 512 px up in a narrower network. PIXART_SWEEP=1 measures all (2K: five) at full
width, and `python -m tests.support.fidelity` writes them down.
"""
from __future__ import annotations

import os
import shutil

import pytest
import torch

from pixart.bins import base_sizes, bin_table
from pixart.checkpoints import load_transformer
from pixart.config import get_variant, variant_names
from pixart.embeddings import position_table
from pixart.errors import CheckpointError
from tests.support.checkpoint_factory import FORMATS
from tests.support.fidelity import FULL_SIZE, LIMIT, bins_of, expected_output, in_memory, load_through, make_case, relative_error, spread

pytest.importorskip("diffusers")
SWEEP = bool(os.environ.get("PIXART_SWEEP"))
QUICK_BINS = {256: 4, 512: 2, 1024: 1, 2048: 1}
NARROW = 288  # of large pictures; at full width, which test_every_format has, one of 2K takes most of a minute
NAMELESS = {"alpha-1024", "sigma-1024", "demo"}  # what "auto" finds in weights without y_embedding
REVEALED = NAMELESS | {"alpha-512"}
CONFIGURED = NAMELESS | {"alpha-256", "sigma-256", "sigma-512", "sigma-2k"}  # and with diffusers' config.json


@pytest.mark.parametrize("name", variant_names())
def test_every_format(tmp_path, name):
    """A block or more, a size that is no square, batch 3, captions of 1, 37 and 64 tokens."""
    case = make_case(name, depth={"demo": 8, "sigma-1024": 2}.get(name, 1))
    height, width = 128, 208
    expected = expected_output(case, height, width)
    for kind in FORMATS:
        configured = "folder" in kind or "shards" in kind
        told = name in (CONFIGURED if configured else NAMELESS if kind == "diffusers-file" else REVEALED)
        model = load_through(case, kind, tmp_path / kind, "auto" if told else name)
        found, want = model.config, case.variant.transformer
        assert model.detection.variant == name, (kind, model.detection.describe())
        assert (found.position_range, found.num_heads) == (want.position_range, want.num_heads), kind
        assert relative_error(case, model, height, width, expected=expected) <= LIMIT, kind
        del model
        shutil.rmtree(tmp_path / kind)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_bins(name):
    base = get_variant(name).base_size
    case = make_case(name, hidden=NARROW if base > 256 and not SWEEP else None)
    model = in_memory(case)
    bins = bins_of(name)
    if SWEEP:
        chosen = spread(bins, 5 if base > 1024 else len(bins))
    elif QUICK_BINS[base] > 1:
        chosen = spread(bins, QUICK_BINS[base])
    else:  # another bin for each entry of the size
        chosen = [bins[FULL_SIZE.index(name) * 7 % len(bins)]]
    batch = 3 if SWEEP or base < 1024 else 1  # a batch of three 2K latents takes a minute
    errors = {size: relative_error(case, model, *size, batch=batch) for size in chosen}
    assert len(errors) == len(set(chosen)) > 0
    assert max(errors.values()) <= LIMIT, {size: error for size, error in errors.items() if error > LIMIT}


@pytest.mark.parametrize("base", base_sizes())
@pytest.mark.parametrize("span", [16, 32])
def test_positions_of_all_bins(base, span):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    side = base // 16
    bins = bin_table(base).values()
    for height, width in bins if base <= 1024 else spread(list(bins), 5):
        rows, columns = height // 16, width // 16
        expected = get_2d_sincos_pos_embed(
            144, (rows, columns), base_size=side, interpolation_scale=side / span, output_type="pt"
        )
        assert (position_table(rows, columns, 144, span) - expected).abs().max() < 1e-5, (height, width)


def test_the_comparison_can_fail():
    """A position range of 16 where 32 was meant, or one changed weight, is far beyond the limit."""
    case = make_case("sigma-256")
    model = in_memory(case)
    assert relative_error(case, model, 256, 256) <= LIMIT
    assert relative_error(case, in_memory(make_case("alpha-256")), 256, 256) > 100 * LIMIT
    weight = model.blocks[0].cross_attn.proj.weight
    model.blocks[0].cross_attn.proj.weight = torch.nn.Parameter(weight * 1.001, requires_grad=False)
    assert relative_error(case, model, 256, 256) > LIMIT


def test_format_weights_are_checked_before_use(tmp_path):
    """A full-width file with one bad number is refused, not sampled from."""
    case = make_case("sigma-256")
    broken = dict(case.original)
    broken["blocks.0.attn.qkv.weight"] = broken["blocks.0.attn.qkv.weight"].clone().index_fill_(0, torch.tensor([5]), float("nan"))
    torch.save({"state_dict": broken}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="blocks.0.attn.qkv.weight has 1152 NaN"):
        load_transformer(tmp_path / "bad.pth")
