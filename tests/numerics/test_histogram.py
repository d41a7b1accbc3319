"""Histograms: every value is counted once, however the rows are cut, and the moments are those of the values."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_ocs.numerics.histogram import BINS, CHUNK, histogram

whole = st.lists(st.lists(st.integers(-64, 64), min_size=5, max_size=5), min_size=1, max_size=4)


def counted(row, bins):
    """Counts of one row, in exact arithmetic."""
    peak, counts = max(abs(value) for value in row), [0] * bins
    for value in row:
        place = math.floor(Fraction(abs(value)) * bins / Fraction(peak)) if peak else 0
        counts[min(place, bins - 1)] += 1
    return counts


@given(whole, st.sampled_from([1, 2, 16, 64]))
def test_each_value_falls_into_the_bin_it_lies_in(values, bins):
    # Peaks of a power of two: the quotients are exact, so that no value on an edge may fall to either side.
    rows = np.array([[64, *row] for row in values], np.float64)
    seen = histogram(rows, bins)
    np.testing.assert_array_equal(seen.counts, [counted(row.tolist(), bins) for row in rows.astype(int)])
    np.testing.assert_array_equal(seen.peak, 64)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_counts_are_those_of_numpy(dtype, rng):
    values = rng.standard_normal((5, 3000)).astype(dtype)
    seen = histogram(values)
    for row, counts, peak in zip(np.abs(values.astype(np.float64)), seen.counts, seen.peak, strict=True):
        wanted, _ = np.histogram(row / peak, BINS, (0, 1))
        np.testing.assert_array_equal(counts, wanted)
        assert peak == row.max()
    np.testing.assert_array_equal(seen.number, 3000)


@pytest.mark.parametrize("shape", [(3, 2 * CHUNK + 5), (CHUNK // BINS * 2 + 3, 7), (1, CHUNK), (5, CHUNK + 1)])
def test_long_rows_and_many_rows_count_as_each_part_by_itself(shape, rng):
    # Multiples of 1/64 whose peak is 1: places and sums of squares are exact in any order.
    values = rng.integers(-64, 65, shape) / 64
    values[:, 0] = 1
    seen = histogram(values)
    for row, counts in zip(np.abs(values), seen.counts, strict=True):
        wanted = np.bincount(np.minimum((row * BINS).astype(int), BINS - 1), minlength=BINS)
        np.testing.assert_array_equal(counts, wanted)
    np.testing.assert_allclose(seen.mean, np.abs(values).mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(seen.square, np.square(values).mean(axis=1), rtol=1e-12)


@given(whole)
def test_moments_are_those_of_the_values(values):
    seen = histogram(np.array(values, np.float64))
    for row, mean, square, deviation in zip(values, seen.mean, seen.square, seen.deviation, strict=True):
        assert mean == pytest.approx(sum(map(abs, row)) / 5, rel=1e-14)
        assert square == pytest.approx(sum(value**2 for value in row) / 5, rel=1e-14)
        assert deviation == pytest.approx(math.sqrt(sum(value**2 for value in row) / 5), rel=1e-14)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_deviation_holds_where_the_squares_do_not(scale, rng):
    values = rng.standard_normal((2, 4000))
    seen = histogram(values * scale)
    deviation = np.sqrt(np.mean(np.square(values), axis=1)) * scale
    np.testing.assert_allclose(seen.deviation, deviation, rtol=1e-4)  # from the bins
    np.testing.assert_allclose(seen.mean, np.abs(values).mean(axis=1) * scale, rtol=1e-12)


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
def test_a_power_of_two_and_the_signs_leave_the_counts(scale, rng):
    values = rng.standard_normal((3, 500))
    wanted, seen = histogram(values), histogram(-values * scale)
    np.testing.assert_array_equal(seen.counts, wanted.counts)
    np.testing.assert_array_equal(seen.peak, wanted.peak * scale)


def test_rows_of_zeros_are_in_the_first_bin():
    seen = histogram(np.array([[0.0, -0.0, 0.0], [0.0, 2.0, 0.0]]), 4)
    np.testing.assert_array_equal(seen.counts, [[3, 0, 0, 0], [2, 0, 0, 1]])
    np.testing.assert_array_equal(seen.peak, [0, 2])
    np.testing.assert_array_equal(seen.deviation, [0, math.sqrt(4 / 3)])


def test_rows_of_no_values_are_empty():
    seen = histogram(np.zeros((2, 0)))
    assert not seen.counts.any()
    assert not seen.deviation.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, CHUNK + 3])
def test_a_value_that_is_not_finite_is_an_error(value, place):
    values = np.ones((2, CHUNK + 5), np.float32)
    values[1, place] = value
    with pytest.raises(ValueError, match="finite"):
        histogram(values)
