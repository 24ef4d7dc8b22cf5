"""Outlines of scenes and their latents."""
import numpy as np
import pytest

from demo.data.dataset import edge_grid
from demo.data.edges import edge_map
from demo.data.scenes import Scene, SceneObject

SQUARE = Scene((SceneObject("red", "square", "medium", 0.5, 0.5, 0.25),), None, "white", "center")


def test_a_square_has_the_outline_of_a_square():
    edges = edge_map(SQUARE, 128, 128)
    rows, columns = np.nonzero(edges)
    side = 2 * 0.9 * 0.25 * 128
    for found in (rows, columns):
        assert found.max() - found.min() == pytest.approx(side, abs=2)
    assert edges.sum() == pytest.approx(4 * side, rel=0.05)  # one pixel wide
    assert edges[64, 64] == edges[2, 2] == 0


@pytest.mark.parametrize("line", [2, 3])
def test_wider_lines(line):
    thin, wide = edge_map(SQUARE, 128, 128), edge_map(SQUARE, 128, 128, line)
    assert (wide >= thin).all() and wide.sum() == pytest.approx(line * thin.sum(), rel=0.06)


def test_latents_are_brighter_on_the_outline():
    grid = edge_grid(SQUARE, 128, 128, 1)
    assert grid.shape == (16, 16, 4) and grid.dtype == np.float32
    dark = grid[8, 8]
    np.testing.assert_allclose(grid[0, 0], dark)
    assert np.abs(grid - dark).max() > 0.1
