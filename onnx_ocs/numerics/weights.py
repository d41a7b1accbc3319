"""One layer's weight: its channels' peaks, its splits and its thresholds, whatever the order of its axes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.clip import thresholds
from onnx_ocs.numerics.grid import pieces
from onnx_ocs.numerics.histogram import histogram
from onnx_ocs.numerics.split import (
    Picks,
    SplitPlan,
    along,
    expand,
    joined,
    joint_blocks,
    picks_per_row,
    picks_per_tensor,
    plan_splits,
    recombine,
)

BLOCKS = 2**10
"""Blocks whose thresholds are chosen at a time, so that their histograms take 16 MB."""


@dataclass(frozen=True)
class Axes:
    """Where the channels of a weight lie, and how many of its input channels share a scale: all of them, or ``block``.

    With groups one of the two axes holds the channels of all groups, one behind the other: the output axis (Conv),
    or the input axis if ``groups_on_input`` (ConvTranspose).
    """

    input: int
    output: int | None
    groups: int = 1
    groups_on_input: bool = False
    block: int | None = None
    kernel: bool = False  # an output is a sum over all other axes as well (Conv); else they are as many outputs


def channel_peaks(weight: NDArray[Any], axes: Axes) -> NDArray[np.floating]:
    """(groups, outputs, inputs): the largest magnitude of each pair of channels; NaN and infinite values show.

    In float32, or float64 where the weight is, which hold each magnitude exactly.
    """
    kind = np.float64 if weight.dtype == np.float64 else np.float32
    order = [axes.input] if axes.output is None else [axes.output, axes.input]
    first, *rest = np.moveaxis(weight, order, range(-len(order), 0)).reshape(
        -1, *(weight.shape[axis] for axis in order)
    )
    peaks = np.abs(first).astype(kind, copy=False)
    for values in rest:
        np.maximum(peaks, np.abs(values), out=peaks)
    peaks = peaks.reshape(-1, weight.shape[axes.input])
    if axes.groups_on_input:
        return np.ascontiguousarray(peaks.reshape(len(peaks), axes.groups, -1).swapaxes(0, 1))
    return peaks.reshape(axes.groups, -1, peaks.shape[1])


def largest(weight: NDArray[Any]) -> float:
    """The largest magnitude; NaN or infinite where a value is."""
    return float(np.maximum(weight.max(), -weight.min()))


def picks_of(peaks: NDArray[np.floating], extra: int, per_channel: bool, policy: str) -> Picks:
    """``extra`` copies for a layer or a group of it, by the peaks (O, C) of its channels."""
    if per_channel:
        return picks_per_row(peaks, extra, policy)
    return picks_per_tensor(peaks.max(axis=0), extra, policy)


def group_plans(copies: Sequence[NDArray[np.int64]], policy: str, groups_on_input: bool) -> tuple[SplitPlan, ...]:
    """A plan for each group by how often its channels stand.

    Groups along the input axis share one plan over all their channels.
    """
    plans = [plan_splits(group, policy) for group in copies]
    return (joined(plans),) if groups_on_input else tuple(plans)


def no_split(weight: NDArray[Any], axes: Axes) -> tuple[SplitPlan, ...]:
    """The plan that leaves every channel as it is."""
    return (plan_splits(np.ones(weight.shape[axes.input], np.int64)),)


def by_group(
    function: Callable[..., NDArray[Any]], plans: tuple[SplitPlan, ...], axes: Axes, *arrays: NDArray[Any]
) -> NDArray[Any]:
    """``function(plan, *parts)`` of each group, joined again; arrays are cut along the output axis if they have it."""
    if len(plans) == 1:
        return function(plans[0], *arrays)
    assert axes.output is not None
    cut = [
        np.split(array, len(plans), axes.output) if array.shape[axes.output] > 1 else [array] * len(plans)
        for array in arrays
    ]
    return np.concatenate([function(plan, *parts) for plan, *parts in zip(plans, *cut, strict=True)], axes.output)


def choose_threshold(
    weight: NDArray[Any],
    plans: tuple[SplitPlan, ...],
    axes: Axes,
    per_channel: bool,
    clip: str,
    bits: int,
) -> NDArray[np.float64]:
    """T by the clip method ``clip`` over the shares of the split weight: (), or (outputs,) with a scale for each.

    In blocks it is of the shape of the split weight, with a block for each ``axes.block`` input channels.
    """
    if axes.block is not None:
        return _block_thresholds(weight, plans[0], axes.input, axes.block, clip, bits)
    output = axes.output if per_channel else None
    if clip == "none":
        return _largest_shares(channel_peaks(weight, axes), plans, axes, output is not None)
    shares = by_group(lambda plan, part: expand(part, plan, axes.input), plans, axes, weight)
    rows = shares.reshape(1, -1) if output is None else np.moveaxis(shares, output, 0).reshape(shares.shape[output], -1)
    found = thresholds(histogram(rows), clip, bits)
    return found[0] if output is None else found


def _block_thresholds(
    weight: NDArray[Any], plan: SplitPlan, axis: int, block: int, clip: str, bits: int
) -> NDArray[np.float64]:
    """T of each block along ``axis``; blocks that hold copies of one channel have the largest of theirs together."""
    shares = np.moveaxis(expand(weight, plan, axis), axis, -1)
    length = shares.shape[-1]
    found = np.empty((*shares.shape[:-1], -(-length // block)))
    if clip == "none":
        found[...] = np.maximum.reduceat(np.abs(shares), range(0, length, block), axis=-1)
    else:
        whole = length // block * block
        rows = shares[..., :whole].reshape(-1, block)
        made = [thresholds(histogram(rows[at : at + BLOCKS]), clip, bits) for at in range(0, len(rows), BLOCKS)]
        if whole:
            found[..., : whole // block] = np.concatenate(made).reshape(*shares.shape[:-1], -1)
        if whole < length:
            rest = shares[..., whole:].reshape(-1, length - whole)
            found[..., -1] = thresholds(histogram(rest), clip, bits).reshape(shares.shape[:-1])
    label = joint_blocks(plan, block)
    for first in np.flatnonzero(np.bincount(label) > 1):
        found[..., label == first] = found[..., label == first].max(axis=-1, keepdims=True)
    return np.moveaxis(found, -1, axis)


def _largest_shares(
    peaks: NDArray[np.floating], plans: tuple[SplitPlan, ...], axes: Axes, per_channel: bool
) -> NDArray[np.float64]:
    widening = np.concatenate([plan.widening for plan in plans]).reshape(-1, 1, peaks.shape[2])
    shares = np.empty(peaks.shape[:2])
    for piece in pieces(peaks, axis=1):
        shares[piece] = (peaks[piece] / widening).max(axis=2)
    if not per_channel:
        return shares.max()
    return shares.max(axis=0) if axes.groups_on_input else shares.reshape(-1)


def shaped_step(step: NDArray[np.float32], axes: Axes, ndim: int, plans: tuple[SplitPlan, ...]) -> NDArray[np.float32]:
    """One step, or one for each output channel, in the shape that broadcasts to the weight.

    Of blocks the steps stand at the channels of the source: all copies of one have the same.
    """
    if axes.block is not None:
        (plan,) = plans
        block = np.empty(plan.channels, np.int64)
        block[plan.source] = np.arange(len(plan.source)) // axes.block
        return step.take(block, axes.input)
    if step.ndim == 0:
        return step.reshape((1,) * ndim)
    assert axes.output is not None
    return along(step, axes.output, ndim)


def split_floats(
    weight: NDArray[Any], plans: tuple[SplitPlan, ...], axes: Axes, step: NDArray[np.float32] | None
) -> NDArray[Any]:
    """The weight with its split channels; with the offsets of quantization-aware splitting if there is a ``step``."""
    if step is None:
        return by_group(lambda plan, part: expand(part, plan, axes.input), plans, axes, weight)
    wide = shaped_step(step, axes, weight.ndim, plans)
    return by_group(lambda plan, part, steps: expand(part, plan, axes.input, steps), plans, axes, weight, wide)


def grouped(values: NDArray[Any], axes: Axes) -> NDArray[Any]:
    """(groups, O, I, K): the rows of each group, by input channel and position of the kernel."""
    if axes.output is None:
        return np.moveaxis(values, axes.input, -1).reshape(1, -1, values.shape[axes.input], 1)
    moved = np.moveaxis(values, (axes.output, axes.input), (0, 1))
    outputs, inputs = moved.shape[:2]
    rows: NDArray[Any] = moved.reshape(outputs, inputs, -1)
    if axes.groups_on_input:
        rows = rows.reshape(outputs, axes.groups, -1, rows.shape[2]).swapaxes(0, 1)
    else:
        rows = rows.reshape(axes.groups, -1, inputs, rows.shape[2])
    if axes.kernel:
        return rows
    return rows.swapaxes(2, 3).reshape(axes.groups, -1, rows.shape[2], 1)


def ungrouped(rows: NDArray[Any], axes: Axes, shape: tuple[int, ...]) -> NDArray[Any]:
    """What :func:`grouped` made rows of, in its own shape."""
    if axes.output is None:
        others = [size for axis, size in enumerate(shape) if axis != axes.input]
        return np.moveaxis(rows.reshape(*others, shape[axes.input]), -1, axes.input)
    outputs, inputs = shape[axes.output], shape[axes.input]
    others = [size for axis, size in enumerate(shape) if axis not in (axes.output, axes.input)]
    inner = int(np.prod(others))
    per_group = outputs if axes.groups_on_input else outputs // axes.groups
    if not axes.kernel:
        rows = rows.reshape(axes.groups, per_group, inner, -1).swapaxes(2, 3)
    if axes.groups_on_input:
        rows = rows.swapaxes(0, 1)
    whole = rows.reshape(outputs, inputs, *others)
    return np.moveaxis(whole, (0, 1), (axes.output, axes.input))


def by_output(values: NDArray[Any], axes: Axes, outputs: int) -> NDArray[Any]:
    """(outputs, n), what belongs to each output channel of the figures (groups, O) of the rows of :func:`grouped`."""
    if axes.groups_on_input:
        values = values.reshape(axes.groups, outputs, -1).swapaxes(0, 1)
    return values.reshape(outputs, -1)


def recombination_error(
    weight: NDArray[Any], plans: tuple[SplitPlan, ...], axes: Axes, step: NDArray[np.float32] | None
) -> float:
    """The largest difference between the weight and the sum of its copies, relative to its largest magnitude."""
    shares = split_floats(weight, plans, axes, step)
    whole = by_group(lambda plan, part: recombine(part, plan, axes.input), plans, axes, shares)
    return float(np.abs(whole - weight).max() / max(np.abs(weight.astype(np.float64)).max(), np.finfo(np.float64).tiny))


def range_of(weight: NDArray[Any], plans: tuple[SplitPlan, ...], axes: Axes) -> tuple[float, float]:
    """The largest magnitude in standard deviations about zero, and what splitting leaves of it as a share."""
    peaks = channel_peaks(weight, axes)
    peak = float(peaks.max())
    if peak == 0:
        return 0.0, 1.0
    deviation = float(np.sqrt(np.mean(np.square(weight, dtype=np.float64))))
    return peak / deviation, float(_largest_shares(peaks, plans, axes, False)) / peak
