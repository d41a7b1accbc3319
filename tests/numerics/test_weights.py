"""A layer's weight: peaks, thresholds and integers against loops."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_ocs.numerics.grid import CHUNK, Grid
from onnx_ocs.numerics.integers import Task, refitted_step, split_integers
from onnx_ocs.numerics.rounding import factorized
from onnx_ocs.numerics.split import expand, extra_channels, in_blocks, picks_per_block, plan_splits, recombine
from onnx_ocs.numerics.weights import (
    Axes,
    by_group,
    by_output,
    channel_peaks,
    choose_threshold,
    group_plans,
    grouped,
    no_split,
    picks_of,
    recombination_error,
    shaped_step,
    split_floats,
)


def choose_splits(peaks, extra, per_channel, policy, groups_on_input=False):
    """Plans that give each group ``extra`` copies."""
    copies = [picks_of(group, extra, per_channel, policy).copies() for group in peaks]
    return group_plans(copies, policy, groups_on_input)


SHAPES = {
    "Conv": ((6, 8, 3, 3), Axes(1, 0)),
    "Conv grouped": ((6, 4, 3), Axes(1, 0, 3)),
    "Conv depthwise": ((6, 1, 3), Axes(1, 0, 6)),
    "ConvTranspose": ((8, 6, 2), Axes(0, 1)),
    "ConvTranspose grouped": ((8, 3, 2), Axes(0, 1, 2, True)),
    "MatMul": ((8, 6), Axes(0, 1)),
    "MatMul batched": ((2, 8, 6), Axes(1, 2)),
    "vector": ((8,), Axes(0, None)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_peaks_are_the_largest_magnitudes(name, dtype, rng):
    shape, axes = SHAPES[name]
    weight = rng.standard_normal(shape).astype(dtype)
    peaks = channel_peaks(weight, axes)
    wanted = np.zeros((1 if axes.output is None else shape[axes.output], shape[axes.input]))
    for index in np.ndindex(shape):
        row = 0 if axes.output is None else index[axes.output]
        wanted[row, index[axes.input]] = max(wanted[row, index[axes.input]], abs(float(weight[index])))
    if axes.groups_on_input:
        wanted = np.stack(np.split(wanted, axes.groups, axis=1))
    else:
        wanted = wanted.reshape(axes.groups, -1, wanted.shape[1])
    np.testing.assert_array_equal(peaks, wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_show_in_the_peaks(value):
    weight = np.ones((3, 4, 2), np.float32)
    weight[1, 2, 1] = value
    peaks = channel_peaks(weight, Axes(1, 0))
    assert not np.isfinite(peaks[0, 1, 2])
    assert np.isfinite(peaks).sum() == 11


@pytest.mark.parametrize("name", [name for name in SHAPES if "depthwise" not in name])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("policy", ["even", "halving"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_copies_sum_to_the_nearest_integer(name, per_channel, policy, bits, rng):
    shape, axes = SHAPES[name]
    weight = (rng.standard_normal(shape) ** 3).astype(np.float32)
    per_channel = per_channel and axes.output is not None
    peaks = channel_peaks(weight, axes)
    per_group = extra_channels(0.5, peaks.shape[2])
    plans = choose_splits(peaks, per_group, per_channel, policy, axes.groups_on_input)
    assert sum(plan.extra for plan in plans) == per_group * axes.groups
    threshold = choose_threshold(weight, plans, axes, per_channel, "none", bits)
    shares = split_floats(weight, plans, axes, None)
    others = tuple(axis for axis in range(weight.ndim) if not per_channel or axis != axes.output)
    np.testing.assert_allclose(threshold, np.abs(shares).max(axis=others), rtol=1e-6)
    step = Grid(bits).step(threshold)
    integers, _ = split_integers(weight, plans, axes, step, bits, aware=True)
    assert np.abs(integers.astype(int)).max() <= Grid(bits).levels
    wide = step.astype(np.float64)
    if per_channel:
        wide = wide.reshape([-1 if axis == axes.output else 1 for axis in range(weight.ndim)])
    wanted = np.floor(weight.astype(np.float64) / wide + 0.5)
    cut = len(plans) if not axes.groups_on_input else 1
    for plan, parts, whole in zip(
        plans, np.split(integers, cut, axes.output or 0), np.split(wanted, cut, axes.output or 0), strict=True
    ):
        total = np.zeros_like(whole)
        np.add.at(np.moveaxis(total, axes.input, 0), plan.source, np.moveaxis(parts.astype(float), axes.input, 0))
        np.testing.assert_array_equal(total, whole)
    assert recombination_error(weight, plans, axes, step) < 1e-6


@pytest.mark.parametrize("aware", [True, False])
def test_a_large_weight_is_worked_on_in_pieces_to_the_same_integers(aware, rng):
    weight = rng.standard_normal((40, CHUNK // 20)).astype(np.float32)
    axes = Axes(1, 0)
    plans = choose_splits(channel_peaks(weight, axes), extra_channels(0.001, weight.shape[1]), True, "even")
    step = Grid(5).step(choose_threshold(weight, plans, axes, True, "none", 5))
    integers, sqnr = split_integers(weight, plans, axes, step, 5, aware)
    rows = [split_integers(weight[i : i + 1], plans, axes, step[i : i + 1], 5, aware)[0] for i in range(40)]
    np.testing.assert_array_equal(integers, np.concatenate(rows))
    assert 20 < sqnr < 40


def test_zero_rows_get_a_positive_step_and_zero_integers():
    weight = np.zeros((3, 4), np.float32)
    weight[1] = 1
    axes = Axes(1, 0)
    plans = choose_splits(channel_peaks(weight, axes), 2, True, "even")
    step = Grid(4).step(choose_threshold(weight, plans, axes, True, "none", 4))
    assert (step > 0).all()
    integers, _ = split_integers(weight, plans, axes, step, 4, True)
    assert not integers[[0, 2]].any()


def test_naive_shares_are_rounded_one_by_one():
    weight = np.array([[3.0, 1.0]], np.float32)
    plans = choose_splits(channel_peaks(weight, Axes(1, 0)), 1, False, "even")
    integers, _ = split_integers(weight, plans, Axes(1, 0), np.float32(1), 3, aware=False)
    np.testing.assert_array_equal(integers, [[2, 1, 2]])  # 1.5 and 1.5, each rounded up
    exact, _ = split_integers(weight, plans, Axes(1, 0), np.float32(1), 3, aware=True)
    np.testing.assert_array_equal(exact, [[1, 1, 2]])


BLOCKED = {"columns": ((13, 5), Axes(0, 1)), "rows": ((5, 13), Axes(1, 0)), "batched": ((2, 13, 3), Axes(1, 2))}
BLOCKED |= {"vector": ((13,), Axes(0, None))}


@settings(deadline=None)
@given(
    st.sampled_from(sorted(BLOCKED)),
    st.integers(2, 20),
    st.integers(0, 13),
    st.sampled_from(["even", "halving"]),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_blocks_against_loops(name, block, extra, policy, bits, ordered, seed):
    """Each integer times the step of its block: the copies of a channel sum to the nearest point of their grid."""
    shape, axes = BLOCKED[name]
    axes = replace(axes, block=block)
    weight = (np.random.default_rng(seed).standard_normal(shape) ** 3).astype(np.float32)
    (peaks,) = channel_peaks(weight, axes)
    plan = plan_splits(picks_per_block(peaks, extra, block, policy).copies(), policy)
    plan = in_blocks(plan, block) if ordered else plan
    threshold = choose_threshold(weight, (plan,), axes, True, "none", bits)
    step = Grid(bits).step(threshold)
    integers, _ = split_integers(weight, (plan,), axes, step, bits, aware=True)
    places = np.arange(len(plan.source)) // block
    assert step.shape == tuple(-(-(13 + extra) // block) if at == axes.input else n for at, n in enumerate(shape))
    assert np.abs(integers.astype(int)).max() <= Grid(bits).levels
    steps = np.moveaxis(step.take(places, axes.input), axes.input, 0).astype(np.float64)
    shares = np.abs(np.moveaxis(expand(weight, plan, axes.input), axes.input, 0))
    assert (shares <= steps * Grid(bits).levels * (1 + 1e-6)).all()
    parts, whole = np.moveaxis(integers, axes.input, 0), np.moveaxis(weight, axes.input, 0).astype(np.float64)
    for channel in range(13):
        held = np.flatnonzero(plan.source == channel)
        assert (steps[held] == steps[held[0]]).all()
        wanted = np.floor(whole[channel] / steps[held[0]] + 0.5)
        np.testing.assert_array_equal(parts[held].astype(int).sum(axis=0), wanted)
    assert recombination_error(weight, (plan,), axes, step) < 1e-6


@pytest.mark.parametrize("clip", ["none", "mse", "aciq", "kl", "sawb", "percentile:90", "sigma:2", "0.7"])
def test_the_threshold_of_a_block_is_that_of_its_values_alone(clip, rng):
    weight = rng.standard_normal((23, 4)).astype(np.float32)
    plan = no_split(weight, Axes(0, 1))
    found = choose_threshold(weight, plan, Axes(0, 1, block=8), True, clip, 4)
    for at in range(3):
        part = weight[8 * at : 8 * at + 8]
        alone = choose_threshold(part, no_split(part, Axes(0, 1)), Axes(0, 1), True, clip, 4)
        np.testing.assert_allclose(found[at], alone, rtol=1e-12)


def test_naive_shares_in_blocks_are_rounded_by_the_step_of_their_block():
    weight = np.array([[3.0], [1.0], [0.2], [0.1]], np.float32)
    plan = in_blocks(plan_splits(np.array([2, 1, 1, 1])), 2)
    axes = Axes(0, 1, block=2)
    step = Grid(3).step(choose_threshold(weight, (plan,), axes, True, "none", 3))
    np.testing.assert_allclose(step[:, 0], [0.5, 1 / 3, 0.1 / 3], rtol=1e-6)
    integers, _ = split_integers(weight, (plan,), axes, step, 3, aware=False)
    np.testing.assert_array_equal(integers[:, 0], [3, 3, 3, 1, 3])


REFITTED = {
    "Conv": ((6, 4, 3, 2), Axes(1, 0, kernel=True), 24),
    "Conv grouped": ((6, 4, 3), Axes(1, 0, 3, kernel=True), 12),
    "ConvTranspose grouped": ((6, 4, 3), Axes(0, 1, 2, True), 3),
    "Gemm": ((5, 4), Axes(0, 1), 5),
    "MatMul batched": ((2, 3, 5, 4), Axes(2, 3), 5),
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", REFITTED)
def test_refitted_steps_give_outputs_the_energy_of_the_float_ones(name, per_channel, rng):
    shape, axes, inputs = REFITTED[name]
    weight = rng.standard_normal(shape).astype(np.float32)
    peaks = channel_peaks(weight, axes)
    plans = choose_splits(peaks, 1, per_channel, "even", axes.groups_on_input)
    data = rng.standard_normal((axes.groups, 40, inputs))
    moments = factorized(data.swapaxes(1, 2) @ data / 40, damping=1e-9)
    threshold = choose_threshold(weight, plans, axes, per_channel, "none", 3)
    step = Grid(3).step(threshold * 0.7)
    integers, _ = split_integers(weight, plans, axes, step, 3, True, Task("hessian", moments))
    refitted = refitted_step(weight, integers, plans, axes, step, moments)
    assert refitted.shape == step.shape
    assert refitted.dtype == np.float32

    def energy(values):
        outputs = [
            np.square(rows.reshape(len(rows), -1) @ part.T).mean(axis=1)
            for rows, part in zip(grouped(values, axes), data, strict=True)
        ]
        return by_output(np.stack(outputs), axes, refitted.size).sum(axis=1) if per_channel else np.sum(outputs)

    whole = by_group(lambda plan, part: recombine(part, plan, axes.input), plans, axes, integers)
    found = energy(whole * shaped_step(refitted, axes, weight.ndim, plans).astype(np.float64))
    np.testing.assert_allclose(found, energy(weight.astype(np.float64)), rtol=1e-4)
    assert not np.allclose(refitted, step)


def test_refitted_steps_are_bounded_and_leave_what_has_no_output(rng):
    weight = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 4.0]], np.float32)
    plans, axes = (plan_splits(np.ones(2, np.int64)),), Axes(1, 0)
    moments = factorized(np.diag([1.0, 1e-9])[None], damping=1e-9)
    integers = np.array([[1, 0], [0, 0], [0, 1]], np.int8)  # the last one has lost nearly all of its output
    refitted = refitted_step(weight, integers, plans, axes, np.float32([0.5, 0.5, 0.5]), moments)
    np.testing.assert_allclose(refitted, [1.0, 0.5, 1.0])
