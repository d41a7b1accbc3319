"""The grid: steps, rounding, and pieces that cover an array."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnx_ocs.numerics.grid import CHUNK, Grid, common_step, nearest, pieces
from onnx_ocs.numerics.integers import exact_threshold
from onnx_ocs.numerics.weights import Axes


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


@given(
    arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.integers(-254, 254)),
    st.floats(2**-20, 2**20, width=32),
)
def test_the_common_step_is_the_coarsest_that_divides_all_values(integers, step):
    rows = integers.astype(np.float32) * np.float32(step)
    found = common_step(rows, np.full(len(rows), step * (1 - 1e-6)))
    divisors = np.gcd.reduce(np.abs(integers), axis=1)
    np.testing.assert_array_equal(np.isnan(found), divisors == 0)
    np.testing.assert_allclose(found[divisors > 0], step * divisors[divisors > 0], rtol=1e-6)


def test_a_step_is_not_found_where_values_lie_off_the_grid_or_it_would_be_too_fine(rng):
    on = (rng.integers(-100, 100, (4, 50)) * 0.01).astype(np.float32)
    on[:, 0], on[:, 1] = 1.0, 0.01
    off = on.copy()
    off[:, 17] += np.float32(0.001)
    least = np.full(4, 0.0099)
    assert not np.isnan(common_step(on, least)).any()
    assert np.isnan(common_step(off, least)).all()
    assert np.isnan(common_step(on, least * 1.02)).all()
    assert np.isnan(common_step(rng.standard_normal((4, 50)).astype(np.float32), least)).all()


@pytest.mark.parametrize(
    ("kind", "step"), [(np.float16, 0.3), (np.float32, 0.3), (np.float64, 0.3), (ml_dtypes.bfloat16, 0.25)]
)
def test_a_step_is_found_to_the_precision_of_the_values(kind, step, rng):
    integers = rng.integers(-7, 7, (3, 30), endpoint=True)
    integers[:, 0], integers[:, 1] = 7, 1
    values = integers.astype(kind) * kind(step)
    np.testing.assert_allclose(common_step(values, np.full(3, step * 0.98)), step, rtol=1e-2)


def test_a_step_is_found_among_weights_that_are_mostly_zero_and_clipped(rng):
    integers = rng.integers(-300, 300, (5, 4000)) * (rng.random((5, 4000)) < 0.05)
    on = np.clip(integers, -100, 100).astype(np.float32) * np.float32(0.01)
    on[:, 3], on[:, 4] = 1.0, 0.01
    least = np.full(5, 0.0099)
    np.testing.assert_allclose(common_step(on, least), 0.01, rtol=1e-6)
    on[2, 17] = 0.0234
    np.testing.assert_array_equal(np.isnan(common_step(on, least)), [False, False, True, False, False])


@given(
    arrays.arrays(np.int64, (3, 30), elements=st.integers(-20, 20)), st.integers(6, 8), st.floats(1, 1.9), st.booleans()
)
def test_an_exact_threshold_clips_nothing_and_is_near_the_largest_share(integers, bits, room, per_channel):
    weight = integers.astype(np.float32) * np.float32(0.37)
    largest = np.abs(weight).max(axis=1) * room if per_channel else np.abs(weight).max() * room
    found = exact_threshold(weight, Axes(input=1, output=0), np.asarray(largest, np.float64), bits)
    assert found.shape == np.shape(largest)
    for row, threshold, least in zip(
        weight.reshape(found.size, -1), found.reshape(-1), np.reshape(largest, -1), strict=True
    ):
        assert not row.any() or room > 1.5 or not np.isnan(threshold)
        if not np.isnan(threshold):
            quotients = row / (threshold / Grid(bits).levels)
            np.testing.assert_allclose(quotients, np.rint(quotients), atol=1e-3)
            assert least * (1 - 1e-6) <= threshold < 2 * least
