"""Joint planning against an objective written out plainly, and the budget of all layers against all ways of it."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_ocs.numerics.planning import (
    OCTAVES,
    OCTAVES_TOGETHER,
    TRIED,
    Joint,
    allocated,
    assumed,
    noise_to_signal,
    picks_together,
)
from onnx_ocs.numerics.split import divisor

LEVELS = 7
IDS = np.array([0, 1, 2, 2, 1, 0])  # two input channels are each channel that copies are chosen for


def plain(rows, mean, variance, copies, together, policy):
    """The least objective over the thresholds that are tried, and these thresholds."""
    peaks = np.abs(rows).max(axis=(1, 2))
    peaks = np.full_like(peaks, peaks.max()) if together else peaks
    widening = np.array([divisor(number, policy) for number in copies])[IDS][None, :, None]
    costs, tried = [], []
    for at in TRIED:
        threshold = peaks * 2.0 ** (-(OCTAVES_TOGETHER if together else OCTAVES) * at)
        over = np.sign(rows) * np.maximum(np.abs(rows) - widening * threshold[:, None, None], 0)
        noise = threshold**2 / (12 * LEVELS**2) * (variance + mean**2).sum()
        own = (variance.reshape(rows.shape[1:]) * over**2).sum(axis=(1, 2))
        costs.append(noise + own + (mean.reshape(rows.shape[1:]) * over).sum(axis=(1, 2)) ** 2)
        tried.append(threshold)
    costs, tried = np.array(costs), np.array(tried)
    if together:
        best = costs.sum(axis=1).argmin()
        return costs.sum(axis=1)[best], tried[best]
    best = costs.argmin(axis=0)
    rows = np.arange(len(best))
    return costs[best, rows].sum(), tried[best, rows]


@pytest.fixture
def parts(rng):
    rows = rng.standard_normal((5, 6, 2)) ** 3
    return rows, rng.random(12), rng.random(12) + 0.1


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("policy", ["even", "halving"])
@pytest.mark.parametrize("copies", [(1, 1, 1), (2, 1, 3), (4, 2, 1)])
def test_the_objective_and_its_gains_are_the_plain_ones(parts, together, policy, copies):
    joint = Joint(*parts, LEVELS, together, IDS, 3, policy)
    joint.give(np.array(copies))
    least, thresholds = plain(*parts, copies, together, policy)
    assert joint.left == pytest.approx(least, rel=1e-9)
    np.testing.assert_allclose(joint.thresholds, thresholds, rtol=1e-12)
    more = [tuple(number + (at == channel) for at, number in enumerate(copies)) for channel in range(3)]
    gains = [least - plain(*parts, some, together, policy)[0] for some in more]
    np.testing.assert_allclose(joint.gains(np.arange(3)), gains, atol=1e-9 * least)


@pytest.mark.parametrize("together", [False, True])
def test_each_copy_goes_where_it_saves_most(parts, together):
    picks = picks_together([Joint(*parts, LEVELS, together, IDS, 3)], 5)
    copies = np.ones(3, np.int64)
    start = plain(*parts, copies, together, "even")[0]
    for number, channel in enumerate(picks.order.tolist()):
        before = plain(*parts, copies, together, "even")[0]
        gains = [before - plain(*parts, copies + row, together, "even")[0] for row in np.eye(3, dtype=int)]
        assert gains[channel] >= max(*gains, 0) - 1e-9 * start
        copies[channel] += 1
        assert picks.left[number + 1] == pytest.approx(plain(*parts, copies, together, "even")[0] / start)
    np.testing.assert_array_equal(picks.copies(), copies)


def test_fewer_copies_are_the_first_of_more(rng):
    rows, known = rng.standard_normal((8, 40, 3)) ** 3, assumed(1, 120, True)

    def joint():
        return Joint(rows, known.mean[0], known.variance[0], LEVELS, False, np.arange(40), 40)

    few, many = picks_together([joint()], 6), picks_together([joint()], 17)
    np.testing.assert_array_equal(few.order, many.order[:6])
    np.testing.assert_array_equal(few.copies(), many.copies(6))


def test_clipping_costs_more_where_inputs_have_one_sign(rng):
    """Errors of clipping all have the sign of their weight, and add up with inputs of one sign."""
    rows = np.abs(rng.standard_normal((4, 64, 1)))
    thresholds = []
    for nonnegative in (False, True):
        known = assumed(1, 64, nonnegative)
        joint = Joint(rows, known.mean[0], known.variance[0], 3, False, np.arange(64), 64)
        thresholds.append(joint.thresholds)
    assert (thresholds[0] < thresholds[1]).all()


def test_noise_to_signal_is_that_of_rounding(rng):
    rows = rng.standard_normal((1, 6, 300, 1))
    square = rng.random((1, 300))
    thresholds = np.abs(rows).max(axis=2)[0, :, 0]
    data = rng.standard_normal((20000, 300)) * np.sqrt(square[0])
    step = thresholds[:, None] / LEVELS
    error = np.round(rows[0, :, :, 0] / step) * step - rows[0, :, :, 0]
    measured = np.square(data @ error.T).sum() / np.square(data @ rows[0, :, :, 0].T).sum()
    assert noise_to_signal(rows, square, LEVELS, False) == pytest.approx(measured, rel=0.15)


curves = st.lists(
    st.tuples(st.lists(st.floats(0.01, 1), min_size=1, max_size=3), st.sampled_from([1.0, 2.0, 3.0])),
    min_size=1,
    max_size=4,
)


@given(curves, st.integers(0, 12))
def test_the_budget_is_kept_and_spent_where_it_saves_most(layers, budget):
    """Of convex curves the greedy choice is the best of its own cost."""
    left = [np.concatenate([[0], -np.cumsum(sorted(saved, reverse=True))]) + 10 for saved, _ in layers]
    costs = [cost for _, cost in layers]
    chosen = allocated(left, costs, budget)
    spent = float(np.dot(chosen, costs))
    assert spent <= budget + 1e-9
    reached = sum(curve[number] for curve, number in zip(left, chosen, strict=True))
    for other in product(*(range(len(curve)) for curve in left)):
        if np.dot(other, costs) <= spent:
            most = max(np.diff(curve, prepend=curve[0] + 1).min() for curve in left)
            found = sum(curve[number] for curve, number in zip(left, other, strict=True))
            assert found >= reached - abs(most) * max(costs) - 1e-9
    if all(cost == 1 for cost in costs):  # then it is the best of all
        best = min(
            sum(curve[number] for curve, number in zip(left, other, strict=True))
            for other in product(*(range(len(curve)) for curve in left))
            if sum(other) <= budget
        )
        assert reached == pytest.approx(best)


def test_a_layer_that_gains_late_is_seen():
    """Nothing is saved by one copy, and much by two."""
    assert allocated([np.array([5.0, 5.0, 1.0]), np.array([5.0, 4.0, 3.5])], [1, 1], 2) == [2, 0]
    assert allocated([np.array([5.0, 5.0, 1.0]), np.array([5.0, 4.0, 3.5])], [1, 1], 1) == [0, 1]
