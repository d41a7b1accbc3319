"""Splitting on arrays: exact dealing, shares that sum to one, and the greedy choice against a plain one."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_ocs.numerics.split import (
    POLICIES,
    copies_per_row,
    copies_per_tensor,
    deal,
    expand,
    extra_channels,
    joined,
    plan_splits,
    recombine,
)

copies = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("number", range(1, 7))
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_integer_is_dealt_out_exactly_and_each_part_fits(bits, number, policy):
    levels = 2 ** (bits - 1) - 1
    plan = plan_splits(np.array([number]), policy)
    limit = int(plan.widening[0]) * levels
    integers = np.arange(-limit, limit + 1)[None]
    parts = deal(integers, plan, 0)
    np.testing.assert_array_equal(parts.sum(axis=0), integers[0])
    assert np.abs(parts).max() <= levels


@pytest.mark.parametrize("number", range(1, 7))
@pytest.mark.parametrize("policy", POLICIES)
def test_rounding_the_shares_is_dealing_out_the_rounded_weight(number, policy):
    """Equation 8: the rounded quantization-aware shares are the parts of the rounded weight."""
    plan = plan_splits(np.array([number]), policy)
    weight = np.arange(-400, 401) / 16 + 1 / 64  # never on the border between two integers
    shares = expand(weight[None], plan, 0, np.array(1.0))
    np.testing.assert_array_equal(np.floor(shares + 0.5), deal(np.floor(weight[None] + 0.5).astype(np.int64), plan, 0))


@given(copies, st.sampled_from(sorted(POLICIES)))
def test_shares_of_a_channel_sum_to_one_and_offsets_to_nothing(numbers, policy):
    plan = plan_splits(np.array(numbers), policy)
    assert plan.channels == len(numbers)
    assert plan.extra == sum(numbers) - len(numbers)
    np.testing.assert_array_equal(plan.source[: len(numbers)], np.arange(len(numbers)))
    for channel in range(len(numbers)):
        pieces = [
            (int(d), int(a)) for s, d, a in zip(plan.source, plan.denominator, plan.phase, strict=True) if s == channel
        ]
        assert len(pieces) == numbers[channel]
        assert sum(Fraction(1, d) for d, _ in pieces) == 1
        assert sum((Fraction(a) + Fraction(1, 2) - Fraction(d, 2)) / d for d, a in pieces) == 0
        assert plan.widening[channel] == min(d for d, _ in pieces)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_copies_recombine_to_the_weight_along_any_axis(axis, dtype, rng):
    weight = rng.standard_normal((5, 5, 2, 5)).astype(dtype)
    plan = plan_splits(np.array([1, 2, 3, 1, 5]))
    shares = expand(weight, plan, axis, np.full((5, 1, 1, 1) if axis else (1, 1, 1, 1), 0.25))
    assert shares.dtype == dtype
    assert shares.shape[axis] == 12
    np.testing.assert_allclose(recombine(shares, plan, axis), weight, rtol=0, atol=8 * np.finfo(dtype).eps)
    integers = rng.integers(-100, 100, weight.shape)
    np.testing.assert_array_equal(recombine(deal(integers, plan, axis), plan, axis), integers)


def shares_after(peaks, numbers, policy):
    """(…, C), what each channel's largest magnitude is after splitting, by the policy's pieces."""
    largest = [max(Fraction(1, d) for d, _ in POLICIES[policy](int(n))) for n in numbers]
    return peaks * np.array([float(share) for share in largest])


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6), st.integers(0, 8), st.sampled_from(sorted(POLICIES)))
def test_the_greedy_choice_always_takes_the_largest(values, extra, policy):
    peaks = np.array(values, np.float64)
    wanted = np.ones(len(peaks), int)
    for _ in range(extra):
        wanted[np.argmax(shares_after(peaks, wanted, policy))] += 1
    np.testing.assert_array_equal(copies_per_tensor(peaks, extra, policy), wanted)


@given(st.lists(st.integers(1, 100), min_size=2, max_size=4), st.integers(0, 4))
def test_no_other_choice_of_even_copies_has_a_smaller_range(values, extra):
    peaks = np.array(values, np.float64)
    found = (peaks / copies_per_tensor(peaks, extra)).max()
    every = [n for n in product(range(1, extra + 2), repeat=len(peaks)) if sum(n) == extra + len(peaks)]
    assert found <= min((peaks / np.array(n)).max() for n in every) + 1e-12


@given(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6), st.integers(0, 6), st.sampled_from(sorted(POLICIES))
)
def test_the_greedy_choice_per_row_lowers_the_squared_thresholds_most(seed, outputs, channels, extra, policy):
    peaks = np.random.default_rng(seed).random((outputs, channels)) ** 3
    wanted = np.ones(channels, int)
    for _ in range(extra):
        before = np.square(shares_after(peaks, wanted, policy).max(axis=1)).sum()
        trials = wanted + np.eye(channels, dtype=int)
        gains = [before - np.square(shares_after(peaks, n, policy).max(axis=1)).sum() for n in trials]
        fallback = int(np.argmax(shares_after(peaks, wanted, policy).max(axis=0)))
        wanted[int(np.argmax(gains)) if max(gains) > 0 else fallback] += 1
    found = copies_per_row(peaks, extra, policy)
    assert found.sum() == wanted.sum()
    ours, theirs = (np.square(shares_after(peaks, n, policy).max(axis=1)).sum() for n in (found, wanted))
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_row_whose_peak_stands_twice_is_split_all_the_same():
    np.testing.assert_array_equal(copies_per_row(np.array([[4.0, 4.0, 1.0]]), 2), [2, 2, 1])


@pytest.mark.parametrize(
    ("ratio", "channels", "extra"), [(0, 64, 0), (0.02, 64, 2), (0.07, 100, 7), (1, 3, 3), (1e-9, 5, 1)]
)
def test_the_number_of_extra_channels_is_the_exact_ceiling(ratio, channels, extra):
    assert extra_channels(ratio, channels) == extra


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_out_of_range_is_an_error(ratio):
    with pytest.raises(ValueError, match="ratio must be from 0 to 1"):
        extra_channels(ratio, 4)


def test_the_plan_of_groups_keeps_each_group_together():
    plan = joined([plan_splits(np.array([2, 1])), plan_splits(np.array([1, 3]))])
    np.testing.assert_array_equal(plan.source, [0, 1, 0, 2, 3, 3, 3])
