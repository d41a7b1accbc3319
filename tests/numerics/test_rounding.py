import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_ocs.numerics.assumed import Assumed
from onnx_ocs.numerics.rounding import ROUNDINGS, Rows, factorized

NARROWEST = 1e-9
"""Room for the rounding of sums of floats."""


def rows_of(seed, groups, outputs, inputs, kernel, limit, spread=1.0):
    """Random weights of which some lie beyond the limits, and the moments of random data that is never negative."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((groups, outputs, inputs, kernel)) * spread
    data = np.maximum(rng.standard_normal((groups, 20, inputs * kernel)) + 0.5, 0)
    step = rng.uniform(0.5, 1.5, (groups, outputs, 1, 1)).astype(np.float32)
    limits = rng.integers(1, limit + 1, (groups, 1, inputs, 1))
    return Rows(values, step, limits, factorized(data.swapaxes(1, 2) @ data / 20))


SHAPES = {
    "seed": st.integers(0, 999),
    "groups": st.integers(1, 3),
    "outputs": st.integers(1, 5),
    "inputs": st.integers(1, 6),
    "kernel": st.integers(1, 9),
    "limit": st.integers(1, 9),
    "spread": st.sampled_from([0.0, 0.1, 1.0, 6.0]),
}


@pytest.mark.parametrize("name", ROUNDINGS)
@given(**SHAPES)
@settings(max_examples=60, deadline=None)
def test_every_rounding_gives_whole_numbers_within_the_limits(name, **shape):
    rows = rows_of(**shape)
    if name == "assumed":
        ones = np.ones((1, *rows.values.shape[2:]))
        rows = replace(rows, moments=Assumed(ones, ones, rows.values.shape[3:]))
    made = ROUNDINGS[name](rows)
    assert made.shape == rows.values.shape
    np.testing.assert_array_equal(made, np.floor(made))
    assert (np.abs(made) <= rows.limit).all()


@given(**SHAPES)
@settings(max_examples=100, deadline=None)
def test_compensated_keeps_to_the_two_neighbours_and_lets_the_sums_vanish(**shape):
    rows = rows_of(**{**shape, "limit": 9})
    inside = np.abs(rows.values / rows.step) <= rows.limit - 1
    made = ROUNDINGS["compensated"](rows)
    error = made - rows.values / rows.step
    assert (np.abs(error[inside]) < 1 + NARROWEST).all()
    whole = error[inside.all(axis=(2, 3))]  # the outputs where nothing is clipped
    assert (np.abs(whole.sum(axis=(1, 2))) <= 0.5 + NARROWEST).all()
    assert (np.abs(whole.sum(axis=2)) <= 1.5 + NARROWEST).all()


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_where_the_weights_lie_in_memory_does_not_matter(name, order):
    """Those of a ConvTranspose lie by input channel first."""
    rows = rows_of(0, 2, 3, 4, 5, 9)
    if name == "assumed":
        rows = replace(rows, moments=Assumed(np.ones((1, 4, 5)), np.ones((1, 4, 5)), (5,)))
    turned = np.ascontiguousarray(rows.values.transpose(order)).transpose(np.argsort(order))
    np.testing.assert_array_equal(ROUNDINGS[name](replace(rows, values=turned)), ROUNDINGS[name](rows))


def test_compensated_moves_the_weight_nearest_to_the_middle():
    values = np.array([[[[0.3, 0.45, 0.4]]]])  # nearest are zeros, and their sum is off by 1.15
    made = ROUNDINGS["compensated"](Rows(values, np.ones((1, 1, 1, 1)), np.array([[[[7]]]])))
    np.testing.assert_array_equal(made, [[[[0, 1, 0]]]])


def test_compensated_weighs_by_the_step_of_each_block():
    values = np.array([[[[0.4], [0.4], [0.4], [4.4]]]])
    step = np.array([[[[1.0], [1.0], [1.0], [10.0]]]])  # 4.4 is 0.44 of a step of ten
    made = ROUNDINGS["compensated"](Rows(values, step, np.full((1, 1, 4, 1), 7)))
    assert abs((made * step - values).sum()) <= 5  # half a step of the largest
    np.testing.assert_array_equal(made[0, 0, :, 0], [0, 0, 0, 1])


def test_hessian_is_near_the_best_of_all_integers():
    """It is no search: on single rows others may be better, and on all together it is far ahead of nearest."""
    total = {"best": 0.0, "hessian": 0.0, "nearest": 0.0}
    for seed in range(40):
        rows = rows_of(seed, 1, 1, 5, 1, 2)
        every = np.array(list(itertools.product(*(range(-int(n), int(n) + 1) for n in rows.limit.flat))), float)
        best = rows.moments.cost(every[None] * rows.step[0, 0, 0] - rows.values[0, 0, :, 0]).min()
        total["best"] += best
        for name in ("hessian", "nearest"):
            error = ROUNDINGS[name](rows) * rows.step - rows.values
            cost = rows.moments.cost(error.reshape(1, 1, -1))[0, 0]
            assert cost >= best * (1 - 1e-12)
            total[name] += cost
    assert total["hessian"] < 1.15 * total["best"]
    assert total["hessian"] < 0.8 * total["nearest"]


def test_hessian_is_nearest_where_inputs_are_not_correlated():
    rows = rows_of(1, 2, 4, 5, 3, 4)
    alone = replace(rows, moments=factorized(np.stack([np.diag(np.arange(15.0)), np.diag(np.arange(15.0)[::-1])])))
    np.testing.assert_array_equal(ROUNDINGS["hessian"](alone), ROUNDINGS["nearest"](rows))


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_few_samples_and_dead_inputs_are_no_trouble(samples):
    data = np.maximum(np.random.default_rng(0).standard_normal((samples, 12)), 0)
    data[:, :4] = 0
    factor = factorized((data.T @ data)[None])
    assert np.isfinite(factor.upper).all()
    np.testing.assert_allclose(factor.upper[0] @ factor.upper[0].T, factor.moments[0], rtol=1e-10, atol=1e-12)
    values = np.random.default_rng(1).standard_normal((1, 2, 12, 1))
    made = ROUNDINGS["hessian"](Rows(values, np.full((1, 1, 1, 1), 0.1), np.full((1, 1, 12, 1), 127), factor))
    np.testing.assert_array_equal(made[:, :, :4], np.floor(values[:, :, :4] / 0.1 + 0.5))


def test_moments_that_rounding_has_left_with_negative_eigenvalues_are_damped_further():
    data = np.random.default_rng(0).standard_normal((12, 3))
    broken = data @ data.T - 0.5 * np.eye(12)
    factor = factorized(np.stack([broken, np.eye(12)]))
    np.testing.assert_allclose(factor.upper @ factor.upper.swapaxes(1, 2), factor.moments, rtol=1e-10, atol=1e-12)
    order, *_ = factor.order
    added = factor.moments[0] - broken[np.ix_(order, order)]
    np.testing.assert_allclose(added, added[0, 0] * np.eye(12), atol=1e-12)
    np.testing.assert_allclose(factor.moments[1], 1.01 * np.eye(12))  # the other group is damped as always


def test_the_factor_gives_the_squared_error_of_the_output():
    rng = np.random.default_rng(2)
    data, error = rng.standard_normal((2, 50, 7)), rng.standard_normal((2, 3, 7))
    factor = factorized(data.swapaxes(1, 2) @ data / 50, damping=1e-9)
    wanted = np.square(error @ data.swapaxes(1, 2)).mean(axis=2)
    np.testing.assert_allclose(factor.cost(error), wanted, rtol=1e-6)
