"""The grid: steps, rounding, and pieces that cover an array."""

import numpy as np
import pytest

from onnx_ocs.numerics.grid import CHUNK, Grid, nearest, pieces


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_grid_is_symmetric_and_its_threshold_is_its_last_point(bits):
    grid = Grid(bits)
    assert 2 * grid.levels + 1 == 2**bits - 1
    assert grid.step(np.array([3.0]))[0] * grid.levels == pytest.approx(3, rel=1e-6)


def test_steps_are_positive_whatever_the_threshold():
    steps = Grid(8).step(np.array([0.0, 1e-45, 1e-300, 1.0]))
    assert steps.dtype == np.float32
    assert (steps >= np.finfo(np.float32).tiny).all()
    assert np.isfinite(steps).all()


def test_halves_are_rounded_up_as_in_the_paper():
    values = np.array([-1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    np.testing.assert_array_equal(nearest(values, np.float32(1)), [-1, 0, 1, 2, 3])


@pytest.mark.parametrize("shape", [(3, CHUNK), (1, 5), (2 * CHUNK, 2), (0, 4)])
def test_pieces_cover_an_array_once(shape):
    seen = np.zeros(shape, np.int8)
    for piece in pieces(seen):
        seen[piece] += 1
    assert (seen == 1).all()
