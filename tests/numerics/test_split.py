"""Splitting on arrays: exact dealing, shares that sum to one, and the greedy choice against a plain one."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_ocs.numerics.split import (
    POLICIES,
    deal,
    divisor,
    expand,
    extra_channels,
    filled,
    in_blocks,
    joined,
    joint_blocks,
    picks_per_block,
    picks_per_row,
    picks_per_tensor,
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
    np.testing.assert_array_equal(picks_per_tensor(peaks, extra, policy).copies(), wanted)


@given(st.lists(st.integers(1, 100), min_size=2, max_size=4), st.integers(0, 4))
def test_no_other_choice_of_even_copies_has_a_smaller_range(values, extra):
    peaks = np.array(values, np.float64)
    found = (peaks / picks_per_tensor(peaks, extra).copies()).max()
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
    found = picks_per_row(peaks, extra, policy).copies()
    assert found.sum() == wanted.sum()
    ours, theirs = (np.square(shares_after(peaks, n, policy).max(axis=1)).sum() for n in (found, wanted))
    assert ours == pytest.approx(theirs, rel=1e-9)


@given(st.data(), st.integers(0, 12), st.integers(1, 5))
def test_parts_with_copies_are_filled_to_a_multiple_and_others_stay(data, exact, multiple):
    part = np.array(data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=12)))
    part = np.unique(part, return_inverse=True)[1]
    peaks = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(part), max_size=len(part))), np.float64)
    more = data.draw(st.integers(0, 20))  # whether enough picks are offered or not
    picks = picks_per_tensor(peaks, exact + more)
    asked, copies = picks.copies(exact), filled(picks, exact, part, multiple)
    assert (copies >= asked).all()
    for here in range(part.max() + 1):
        held, grown = (part == here).sum(), copies[part == here].sum()
        if asked[part == here].sum() == held:
            assert grown == held
        else:
            assert grown % multiple == 0
            assert grown < asked[part == here].sum() + multiple


def test_a_row_whose_peak_stands_twice_is_split_all_the_same():
    np.testing.assert_array_equal(picks_per_row(np.array([[4.0, 4.0, 1.0]]), 2).copies(), [2, 2, 1])


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


@st.composite
def plans(draw):
    copies = np.array(draw(st.lists(st.integers(1, 5), min_size=1, max_size=40)))
    return plan_splits(copies, draw(st.sampled_from(sorted(POLICIES)))), copies


@given(plans(), st.integers(2, 9))
def test_the_order_in_blocks_keeps_the_plan(made, block):
    plan, copies = made
    ordered = in_blocks(plan, block)
    pieces = sorted(zip(plan.source, plan.denominator, plan.phase, strict=True))
    assert sorted(zip(ordered.source, ordered.denominator, ordered.phase, strict=True)) == pieces
    values = np.arange(len(copies)) * 7 - 20
    whole = np.zeros(len(copies), np.int64)
    np.add.at(whole, ordered.source, deal(values, ordered, 0))
    np.testing.assert_array_equal(whole, values)


@given(plans(), st.integers(2, 9))
def test_joint_blocks_are_those_that_copies_of_a_channel_link(made, block):
    plan, copies = made
    for order in (plan, in_blocks(plan, block)):
        label = joint_blocks(order, block)
        places = np.arange(len(order.source)) // block
        linked = {at: {at} for at in range(len(label))}
        for channel in range(len(copies)):
            together = set().union(*(linked[at] for at in places[order.source == channel]))
            for at in together:
                linked[at] = together
        assert [min(linked[at]) for at in range(len(label))] == label.tolist()


@given(st.lists(st.integers(1, 2), min_size=1, max_size=60), st.sampled_from([2, 4, 8]))
def test_pairs_of_copies_never_leave_an_even_block(copies, block):
    plan = in_blocks(plan_splits(np.array(copies)), block)
    label = joint_blocks(plan, block)
    assert label.tolist() == list(range(len(label)))


@given(st.integers(0, 10), st.integers(2, 5), st.sampled_from(sorted(POLICIES)), st.integers(0, 2**32 - 1))
def test_the_next_split_is_that_which_lowers_the_thresholds_of_its_block_most(extra, block, policy, seed):
    peaks = np.random.default_rng(seed).random((3, 9))
    copies = np.ones(9, np.int64)

    def total(held):
        shares = peaks / np.array([divisor(int(number), policy) for number in held])
        return sum(np.square(shares[:, at : at + block].max(axis=1)).sum() for at in range(0, 9, block))

    for _ in range(extra):
        after = [total(copies + (np.arange(9) == channel)) for channel in range(9)]
        best = int(np.argmin(after))
        if after[best] == total(copies):
            best = int(np.argmax(peaks.max(axis=0) / [divisor(int(number), policy) for number in copies]))
        copies[best] += 1
    found = picks_per_block(peaks, extra, block, policy).copies()
    assert found.sum() == 9 + extra
    np.testing.assert_allclose(total(found), total(copies), rtol=1e-12)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_one_block_of_all_channels_is_a_scale_for_each_output(policy, rng):
    peaks = rng.random((4, 11))
    np.testing.assert_array_equal(
        picks_per_block(peaks, 7, 11, policy).copies(), picks_per_row(peaks, 7, policy).copies()
    )
