"""Weights rounded by second moments that data is assumed to have, against the same with the whole matrix."""

import numpy as np
import pytest

from onnx_ocs.numerics.assumed import CORRELATION, MEAN, Assumed, fits, tempered
from onnx_ocs.numerics.moments import Moments
from onnx_ocs.numerics.planning import Inputs
from onnx_ocs.numerics.rounding import DAMPING, ROUNDINGS, Factor, Rows


def assumed(rng, groups, channels, kernel, equal):
    size = int(np.prod(kernel))
    shape = (groups, 1, 1) if equal else (groups, channels, size)
    mean, variance = rng.uniform(0.2, 1, shape), rng.uniform(0.5, 2, shape)
    return Assumed(*(np.broadcast_to(part, (groups, channels, size)).copy() for part in (mean, variance)), kernel)


def matrices(moments):
    """H of each group, written out."""
    places = np.indices(moments.kernel).reshape(len(moments.kernel), moments.mean.shape[2])
    away = np.abs(places[:, :, None] - places[:, None]).sum(axis=0)
    made = []
    for mean, variance in zip(moments.mean, moments.variance, strict=True):
        deviation, middle = np.sqrt(variance).reshape(-1), mean.reshape(-1) * MEAN
        whole = np.kron(np.eye(len(mean)), CORRELATION**away) * np.outer(deviation, deviation)
        whole += np.outer(middle, middle)
        made.append(whole + np.eye(len(whole)) * DAMPING * whole.diagonal().mean())
    return np.stack(made)


def factor(moments):
    """As for ``hessian``, in the order of the source."""
    whole = matrices(moments)
    lower = np.linalg.cholesky(whole[:, ::-1, ::-1])
    order = np.broadcast_to(np.arange(whole.shape[1]), whole.shape[:2])
    return Factor(order, whole, np.ascontiguousarray(lower[:, ::-1, ::-1]))


CASES = [(1, (3, 3)), (7, ()), (5, (3, 3)), (4, (5,)), (3, (1, 2, 2))]


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("channels", "kernel"), CASES)
def test_the_integers_are_those_by_the_whole_matrix(channels, kernel, groups, equal, rng):
    moments = assumed(rng, groups, channels, kernel, equal)
    values = rng.standard_normal((groups, 6, channels, moments.mean.shape[2]))
    step = rng.uniform(0.3, 0.6, (groups, 6, 1, 1))
    limit = rng.integers(2, 7, (groups, 1, channels, 1))
    found = ROUNDINGS["assumed"](Rows(values, step, limit, moments))
    wanted = ROUNDINGS["hessian"](Rows(values, step, limit, factor(moments)))
    np.testing.assert_array_equal(found, wanted)
    assert (np.abs(found) <= limit).all()


@pytest.mark.parametrize("name", ["assumed", "hessian"])
def test_each_group_is_rounded_by_itself_and_one_matrix_serves_groups_that_are_alike(name, rng):
    apart = assumed(rng, 4, 3, (3, 3), False)
    alike = Assumed(apart.mean[:1], apart.variance[:1], apart.kernel)
    values, step = rng.standard_normal((4, 2, 3, 9)), np.full((1, 1, 1, 1), 0.4)
    limit = rng.integers(2, 7, (4, 1, 3, 1))
    for moments in (apart, alike):
        by = moments if name == "assumed" else factor(moments)
        found = ROUNDINGS[name](Rows(values, step, limit, by))
        cost = by.cost((found * step - values).reshape(4, 2, -1))
        for group in range(4):
            one = Assumed(*(part[group % len(part)][None] for part in (moments.mean, moments.variance)), moments.kernel)
            one = one if name == "assumed" else factor(one)
            some = slice(group, group + 1)
            alone = ROUNDINGS[name](Rows(values[some], step, limit[some], one))
            np.testing.assert_array_equal(found[some], alone)
            np.testing.assert_allclose(cost[some], one.cost((alone * step - values[some]).reshape(1, 2, -1)))


@pytest.mark.parametrize(("channels", "kernel"), CASES)
def test_the_cost_is_that_of_the_whole_matrix(channels, kernel, rng):
    moments = assumed(rng, 2, channels, kernel, False)
    error = rng.standard_normal((2, 4, moments.mean[0].size))
    wanted = np.einsum("goi,gij,goj->go", error, matrices(moments), error)
    np.testing.assert_allclose(moments.cost(error), wanted, rtol=1e-9)


def test_data_that_is_always_zero_is_rounded_to_nearest(rng):
    """In one group of two; the other is rounded as if it were alone."""
    mean, variance = rng.uniform(0.5, 1, (2, 2, 4, 9)) * [[[0]], [[1]]]
    values, step, limit = rng.standard_normal((2, 5, 4, 9)), np.full((1, 1, 1, 1), 0.3), np.full((2, 1, 4, 1), 7)
    rows = Rows(values, step, limit, Assumed(mean, variance, (3, 3)))
    found, nearest = ROUNDINGS["assumed"](rows), ROUNDINGS["nearest"](rows)
    np.testing.assert_array_equal(found[0], nearest[0])
    assert (found[1] != nearest[1]).any()


def test_sums_of_errors_are_smaller_than_by_nearest(rng):
    """Those of each output, which the mean multiplies, and of each kernel, whose positions see nearly the same."""
    moments = assumed(rng, 1, 32, (3, 3), True)
    values = rng.standard_normal((1, 16, 32, 9))
    rows = Rows(values, np.full((1, 1, 1, 1), 0.5), np.full((1, 1, 32, 1), 7), moments)
    sums = {}
    for name in ("assumed", "nearest"):
        error = ROUNDINGS[name](rows) * rows.step - rows.values
        sums[name] = np.square(error.sum(axis=3)).mean(), np.square(error.sum(axis=(2, 3))).mean()
    assert sums["assumed"][0] < 0.5 * sums["nearest"][0]
    assert sums["assumed"][1] < 0.05 * sums["nearest"][1]


def test_only_small_matrices_are_made():
    assert fits(512, (3, 3))
    assert fits(2**23, ())
    assert not fits(512, (1024,))


def gathered(rng, groups, channels, kernel):
    """Moments of few samples, in which the first channel is dead."""
    size = int(np.prod(kernel))
    data = np.maximum(rng.standard_normal((groups, 6, channels, size)) + 0.3, 0)
    data[:, :, 0] = 0
    rows = data.reshape(groups, 6, channels * size)
    return Moments(rows.mean(axis=1), np.einsum("gri,grj->gij", rows, rows) / 6)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("channels", "kernel"), CASES[1:])
def test_tempered_moments_let_no_channel_go_and_keep_the_whole(channels, kernel, groups, rng):
    made, size = gathered(rng, groups, channels, kernel), int(np.prod(kernel))
    found = tempered(made, None, kernel, 0.3)
    before, after = (np.stack([part.diagonal() for part in moments.second]) for moments in (made, found))
    np.testing.assert_allclose(after.sum(axis=1), before.sum(axis=1))
    np.testing.assert_allclose(after[:, :size], 0.3 * before.mean(axis=1, keepdims=True) * np.ones(size))
    assert np.linalg.eigvalsh(found.second).min() > 0
    assert np.linalg.eigvalsh(found.about(True)).min() > -1e-9
    for place in np.ndindex(size, size):  # positions of the dead channel have only what is assumed
        away = sum(abs(a - b) for a, b in zip(*(np.unravel_index(at, kernel or (1,)) for at in place), strict=True))
        share = found.second[:, place[0], place[1]] / found.second[:, 0, 0]
        np.testing.assert_allclose(share, CORRELATION**away)


@pytest.mark.parametrize(("channels", "kernel"), CASES)
def test_tempered_moments_have_the_means_and_variances_that_are_known(channels, kernel, rng):
    made, size = gathered(rng, 2, channels, kernel), int(np.prod(kernel))
    known = Inputs(rng.standard_normal((2, channels * size)), rng.uniform(0.5, 2, (2, channels * size)))
    found = tempered(made, known, kernel, 0.3)
    np.testing.assert_allclose(found.mean, known.mean)
    centered = found.about(True)
    alive = np.stack([part.diagonal() for part in made.second]) - np.square(made.mean) > 1e-3
    diagonal = np.stack([part.diagonal() for part in centered])
    np.testing.assert_allclose(diagonal[alive], known.variance[alive])
    np.testing.assert_allclose(diagonal[:, :size], 0.3 * known.variance[:, :size])
    assert np.linalg.eigvalsh(centered).min() > -1e-9


def test_samples_that_are_all_zero_tell_nothing():
    nothing = Moments(np.zeros((1, 4)), np.zeros((1, 4, 4)))
    np.testing.assert_allclose(tempered(nothing, None, (), 0.3).second[0], 0.3 * np.eye(4))
    known = Inputs(np.ones((1, 4)), np.full((1, 4), 9.0))
    np.testing.assert_allclose(tempered(nothing, known, (), 0.3).about(True)[0], 0.3 * 9 * np.eye(4))
