"""Weights rounded by second moments that data is assumed to have, against the same with the whole matrix."""

import numpy as np
import pytest

from onnx_ocs.numerics.assumed import CORRELATION, MEAN, Assumed, fits
from onnx_ocs.numerics.rounding import DAMPING, ROUNDINGS, Factor, Rows


def assumed(rng, channels, kernel, equal):
    size = int(np.prod(kernel))
    shape = (1, 1) if equal else (channels, size)
    mean, variance = rng.uniform(0.2, 1, shape), rng.uniform(0.5, 2, shape)
    return Assumed(*(np.broadcast_to(part, (channels, size)).copy() for part in (mean, variance)), kernel)


def matrix(moments):
    """H, written out."""
    mean, deviation = moments.mean.reshape(-1) * MEAN, np.sqrt(moments.variance).reshape(-1)
    places = np.indices(moments.kernel).reshape(len(moments.kernel), moments.mean.shape[1])
    away = np.abs(places[:, :, None] - places[:, None]).sum(axis=0)
    whole = np.kron(np.eye(len(moments.mean)), CORRELATION**away) * np.outer(deviation, deviation)
    whole += np.outer(mean, mean)
    return whole + np.eye(len(whole)) * DAMPING * whole.diagonal().mean()


def factor(moments):
    """As for ``hessian``, in the order of the source."""
    whole = matrix(moments)
    lower = np.linalg.cholesky(whole[::-1, ::-1])
    return Factor(np.arange(len(whole)), whole, np.ascontiguousarray(lower[::-1, ::-1]))


CASES = [(1, (3, 3)), (7, ()), (5, (3, 3)), (4, (5,)), (3, (1, 2, 2))]


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(("channels", "kernel"), CASES)
def test_the_integers_are_those_by_the_whole_matrix(channels, kernel, equal, rng):
    moments = assumed(rng, channels, kernel, equal)
    values = rng.standard_normal((6, channels, moments.mean.shape[1]))
    step = rng.uniform(0.3, 0.6, (6, 1, 1))
    limit = rng.integers(2, 7, (channels, 1))
    found = ROUNDINGS["assumed"](Rows(values, step, limit, moments))
    wanted = ROUNDINGS["hessian"](Rows(values, step, limit, factor(moments)))
    np.testing.assert_array_equal(found, wanted)
    assert (np.abs(found) <= limit).all()


@pytest.mark.parametrize(("channels", "kernel"), CASES)
def test_the_cost_is_that_of_the_whole_matrix(channels, kernel, rng):
    moments = assumed(rng, channels, kernel, False)
    error = rng.standard_normal((4, moments.mean.size))
    wanted = np.einsum("oi,ij,oj->o", error, matrix(moments), error)
    np.testing.assert_allclose(moments.cost(error), wanted, rtol=1e-9)


def test_data_that_is_always_zero_is_rounded_to_nearest(rng):
    moments = Assumed(np.zeros((4, 9)), np.zeros((4, 9)), (3, 3))
    rows = Rows(rng.standard_normal((5, 4, 9)), np.full((1, 1, 1), 0.3), np.full((4, 1), 7), moments)
    np.testing.assert_array_equal(ROUNDINGS["assumed"](rows), ROUNDINGS["nearest"](rows))


def test_sums_of_errors_are_smaller_than_by_nearest(rng):
    """Those of each output, which the mean multiplies, and of each kernel, whose positions see nearly the same."""
    moments = assumed(rng, 32, (3, 3), True)
    rows = Rows(rng.standard_normal((16, 32, 9)), np.full((1, 1, 1), 0.5), np.full((32, 1), 7), moments)
    sums = {}
    for name in ("assumed", "nearest"):
        error = ROUNDINGS[name](rows) * rows.step - rows.values
        sums[name] = np.square(error.sum(axis=2)).mean(), np.square(error.sum(axis=(1, 2))).mean()
    assert sums["assumed"][0] < 0.5 * sums["nearest"][0]
    assert sums["assumed"][1] < 0.05 * sums["nearest"][1]


def test_only_small_matrices_are_made():
    assert fits(512, (3, 3))
    assert fits(2**23, ())
    assert not fits(512, (1024,))
