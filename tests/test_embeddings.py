"""Positions and sinusoids against diffusers'."""
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps, get_2d_sincos_pos_embed

from pixart import embeddings
from pixart.embeddings import add_positions, axis_positions, position_table, sinusoid
from tests.support.devices import OnlyOn


@pytest.mark.parametrize("rows, columns", [(16, 16), (8, 32), (64, 64), (37, 21)])
@pytest.mark.parametrize("position_range", [16.0, 32.0])
def test_positions_equal_diffusers(rows, columns, position_range):
    # base_size / interpolation_scale is the range that coordinates run to
    expected = get_2d_sincos_pos_embed(1152, (rows, columns), base_size=64, interpolation_scale=64 / position_range, output_type="np")
    got = position_table(rows, columns, 1152, position_range)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, atol=3e-5)


def test_positions_by_axis_are_the_table_in_two_parts():
    tokens = torch.randn(2, 6 * 5, 72)
    assert torch.equal(add_positions(tokens, axis_positions(6, 5, 72, 32.0)), tokens + position_table(6, 5, 72, 32.0))


def test_positions_do_not_depend_on_resolution():
    """Token (i, j) of a grid stands where token (2i, 2j) of the doubled grid stands."""
    coarse = position_table(16, 24, 72, 32.0).reshape(16, 24, 72)
    fine = position_table(32, 48, 72, 32.0).reshape(32, 48, 72)
    torch.testing.assert_close(coarse, fine[::2, ::2])


def test_positions_are_made_on_their_device():
    """A copy from the CPU would make a GPU wait at every step, and is illegal in a CUDA graph."""
    with OnlyOn("meta"):
        assert position_table(4, 6, 72, 32.0, device="meta").shape == (24, 72)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_positions_can_be_captured_in_a_cuda_graph():
    position_table(4, 6, 72, 32.0, device="cuda")  # first use may allocate
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = position_table(4, 6, 72, 32.0, device="cuda")
    graph.replay()
    torch.testing.assert_close(table.cpu(), position_table(4, 6, 72, 32.0), atol=1e-5, rtol=0)


def test_devices_without_fp64_get_nearly_the_same_positions(monkeypatch):
    assert "mps" not in embeddings.DEVICES_WITH_FP64
    expected = position_table(64, 64, 1152, 32.0)
    monkeypatch.setattr(embeddings, "DEVICES_WITH_FP64", ())
    torch.testing.assert_close(position_table(64, 64, 1152, 32.0), expected, atol=2e-5, rtol=0)


def test_sinusoid_equals_diffusers():
    timesteps = torch.tensor([0.0, 1.0, 437.0, 999.0, 12.5])
    expected = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(timesteps)
    torch.testing.assert_close(sinusoid(timesteps), expected, atol=1e-4, rtol=0)


def test_sinusoid_of_half_precision_timesteps_is_computed_in_fp32():
    assert torch.equal(sinusoid(torch.tensor([437.0], dtype=torch.float16)), sinusoid(torch.tensor([437.0])))
