"""One layer's weight: its channels' peaks, its thresholds, and its integers, whatever the order of its axes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.clip import thresholds
from onnx_ocs.numerics.compare import decibels
from onnx_ocs.numerics.grid import CHUNK, Grid, nearest, pieces
from onnx_ocs.numerics.histogram import histogram
from onnx_ocs.numerics.rounding import ROUNDINGS, Factor, Rows
from onnx_ocs.numerics.split import (
    Picks,
    SplitPlan,
    along,
    deal,
    expand,
    joined,
    joint_blocks,
    picks_per_row,
    picks_per_tensor,
    plan_splits,
    recombine,
)

FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Of the largest share, that are tried as the threshold with the least error of the output."""

NARROWER = (0.05, 0.025)
"""How far on either side of the best so far it is looked for next."""

MOST_REFITTED = 2.0
"""Times that a step grows or shrinks at most where it is refitted; outputs that are next to nothing ask for more."""

WIDE = 2**22
"""Weights that are rounded at a time where that is more work than to read them (32 MB for each array of them)."""

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


def widened_limits(plans: tuple[SplitPlan, ...], axes: Axes, levels: int) -> NDArray[np.int64]:
    """(groups, I), the largest integer of each input channel of each group."""
    limits = np.stack([plan.widening * levels for plan in plans])
    if axes.groups_on_input:
        return limits.reshape(axes.groups, -1)
    return np.broadcast_to(limits, (axes.groups, limits.shape[1]))


@dataclass(frozen=True, eq=False)
class Task:
    """How a weight is rounded, and what that rests on."""

    rounding: str = "nearest"
    factors: tuple[Factor, ...] = ()  # of the data of each group, for ``hessian``


NEAREST = Task()


def split_integers(
    weight: NDArray[Any],
    plans: tuple[SplitPlan, ...],
    axes: Axes,
    step: NDArray[np.float32],
    bits: int,
    aware: bool,
    task: Task = NEAREST,
) -> tuple[NDArray[np.int8], float]:
    """The integers of each copy on the grid, and the signal-to-noise ratio of the weight they stand for, in dB.

    Quantization-aware splitting rounds the weight on the widened range of its channel, by any rounding, and deals the
    integer out to the copies (Equation 8); naive splitting rounds each share by itself, to nearest.
    """
    grid = Grid(bits)
    wide = shaped_step(step, axes, weight.ndim, plans)
    energy = [0.0, 0.0]

    def naive_part(plan: SplitPlan, part: NDArray[Any], steps: NDArray[np.float32]) -> NDArray[np.int8]:
        shares = expand(part.astype(np.float64), plan, axes.input)
        steps = steps.take(plan.source, axes.input) if axes.block is not None else steps
        rounded = np.clip(nearest(shares, steps), -grid.levels, grid.levels)
        whole = recombine(rounded * steps, plan, axes.input)
        energy[0] += float(np.sum(np.square(part, dtype=np.float64)))
        energy[1] += float(np.sum(np.square(whole - part)))
        return rounded.astype(np.int8)

    def aware_part(plan: SplitPlan, part: NDArray[Any], steps: NDArray[np.float32]) -> NDArray[np.int8]:
        limit = along(plan.widening * grid.levels, axes.input, part.ndim)
        return deal(_round(part, steps, limit, energy), plan, axes.input).astype(np.int8)

    if not aware:
        integers = by_group(naive_part, plans, axes, weight, wide)
    elif task.rounding == "nearest":
        integers = by_group(aware_part, plans, axes, weight, wide)
    else:
        whole = _rounded(weight, wide, widened_limits(plans, axes, grid.levels), axes, task)
        for piece in pieces(whole):
            values = weight[piece].astype(np.float64)
            energy[0] += _energy(values)
            values -= whole[piece] * (wide[piece] if wide.shape[0] > 1 else wide)
            energy[1] += _energy(values)
        integers = by_group(lambda plan, part: deal(part, plan, axes.input).astype(np.int8), plans, axes, whole)
    return integers, decibels(*energy)


def _rounded(
    weight: NDArray[Any], wide: NDArray[np.float32], limits: NDArray[np.int64], axes: Axes, task: Task
) -> NDArray[Any]:
    """Integers within the limits by a rounding that looks at whole rows."""
    rows, steps = grouped(weight, axes), grouped(np.broadcast_to(wide, weight.shape), axes)
    if not task.factors and (limits == limits[0]).all():  # nothing tells the groups apart
        rows, steps = (part.reshape(1, -1, *part.shape[2:]) for part in (rows, steps))
    made = np.empty(rows.shape, np.int16 if limits.max() < 2**15 else np.int64)
    inner = rows.shape[2] * rows.shape[3]
    chunk = max(1, (WIDE if task.factors else CHUNK) // inner)
    for group in range(len(rows)):
        factor = task.factors[group] if task.factors else None
        for start in range(0, rows.shape[1], chunk):
            some = slice(start, start + chunk)
            part = rows[group, some].astype(np.float64)
            asked = Rows(part, steps[group, some], limits[group][:, None], factor)
            made[group, some] = ROUNDINGS[task.rounding](asked)
    return np.ascontiguousarray(ungrouped(made, axes, weight.shape))


def least_error_threshold(
    weight: NDArray[Any],
    plans: tuple[SplitPlan, ...],
    axes: Axes,
    threshold: NDArray[np.float64],
    bits: int,
    task: Task,
) -> NDArray[np.float64]:
    """The fraction of ``threshold``, for all or for each output, with the least squared error of the output.

    Of some fractions far apart first, then of those about the best. The error is ``e' H e`` with the second moments H
    of the data, of the very integers that ``task`` makes.
    """
    grid = Grid(bits)
    limits = widened_limits(plans, axes, grid.levels)
    best, least = np.ones(threshold.shape), np.full(threshold.shape, np.inf)

    def attempt(fractions: NDArray[np.float64]) -> None:
        nonlocal best, least
        wide = shaped_step(grid.step(threshold * fractions), axes, weight.ndim, plans)
        error = _rounded(weight, wide, limits, axes, task) * wide.astype(np.float64) - weight
        costs = _costs(error, axes, task.factors)
        cost = by_output(costs, axes, len(threshold)).sum(axis=1) if threshold.ndim else costs.sum()
        best = np.where(cost < least, fractions, best)
        least = np.minimum(least, cost)

    for fraction in FRACTIONS:
        attempt(np.full(threshold.shape, fraction))
    for distance in NARROWER:
        middle = best
        for side in (-distance, distance):
            attempt(np.minimum(middle + side, 1))
    return threshold * best


def weight_sqnr(
    weight: NDArray[Any], integers: NDArray[Any], plans: tuple[SplitPlan, ...], axes: Axes, step: NDArray[np.float32]
) -> float:
    """The signal-to-noise ratio in dB of the weight that the integers of the copies stand for."""
    whole = by_group(lambda plan, part: recombine(part, plan, axes.input), plans, axes, integers)
    error = whole * shaped_step(step, axes, weight.ndim, plans).astype(np.float64) - weight
    return decibels(_energy(weight.astype(np.float64)), _energy(error))


def _costs(error: NDArray[np.float64], axes: Axes, factors: tuple[Factor, ...]) -> NDArray[np.float64]:
    """(groups, rows), ``e' H e`` of each."""
    rows = grouped(error, axes)
    return np.stack([factor.cost(part.reshape(len(part), -1)) for factor, part in zip(factors, rows, strict=True)])


def refitted_step(
    weight: NDArray[Any],
    integers: NDArray[Any],
    plans: tuple[SplitPlan, ...],
    axes: Axes,
    step: NDArray[np.float32],
    factors: tuple[Factor, ...],
) -> NDArray[np.float32]:
    """The step, or that of each output, with which the outputs have the energy of those of the float weight.

    Integers with the least error leave a part of the output out, the more the fewer the bits are, and layer by layer
    the signal shrinks. So each step is multiplied by ``sqrt(w' H w / q' H q)``, with the second moments H of the data;
    Banner et al. (NeurIPS 2019, arXiv:1810.05723, Section 3.3) keep the variance of the weights in the same way.

    Args:
        integers: of the copies, on steps that are no blocks.
        factors: of the data of each group.
    """
    assert axes.block is None
    whole = by_group(lambda plan, part: recombine(part, plan, axes.input), plans, axes, integers)
    wanted = _costs(weight.astype(np.float64), axes, factors)
    found = _costs(whole * shaped_step(step, axes, weight.ndim, plans).astype(np.float64), axes, factors)
    if step.ndim:
        wanted, found = (by_output(part, axes, len(step)).sum(axis=1) for part in (wanted, found))
    else:
        wanted, found = wanted.sum(keepdims=True), found.sum(keepdims=True)
    gain = np.ones(found.shape)
    np.divide(wanted, found, out=gain, where=found > 0)
    gain = np.clip(np.sqrt(gain), 1 / MOST_REFITTED, MOST_REFITTED)
    return (step * gain.reshape(step.shape)).astype(np.float32)


def mean_shift(
    weight: NDArray[Any],
    integers: NDArray[Any],
    plans: tuple[SplitPlan, ...],
    axes: Axes,
    step: NDArray[np.float32],
    mean: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(outputs,), what the outputs lose on average by quantization: ``(w - step * q) E x``.

    Nagel et al., arXiv:1906.04721, Section 4.2. The outputs are those of all groups behind each other.

    Args:
        integers: of the copies.
        mean: (groups, n), E x of the data of each group.
    """
    wide = shaped_step(step, axes, weight.ndim, plans)
    whole = by_group(lambda plan, part: recombine(part, plan, axes.input), plans, axes, integers)
    rows = grouped(weight - whole * wide, axes)
    return np.stack([part.reshape(len(part), -1) @ middle for part, middle in zip(rows, mean, strict=True)]).reshape(-1)


def _round(
    weight: NDArray[Any], step: NDArray[np.float32], limit: NDArray[np.int64], energy: list[float]
) -> NDArray[Any]:
    """Nearest integers within ±limit; adds the energies of the weight and of the error to ``energy``."""
    out = np.empty(weight.shape, np.int16 if limit.max() < 2**15 else np.int64)
    for piece in pieces(weight):
        values = weight[piece].astype(np.float64)
        here = step[piece] if step.shape[0] > 1 else step
        bound = limit[piece] if limit.shape[0] > 1 else limit
        rounded = nearest(values, here)
        np.clip(rounded, -bound, bound, out=rounded)
        out[piece] = rounded
        energy[0] += _energy(values)
        rounded *= here
        rounded -= values
        energy[1] += _energy(rounded)
    return out


def _energy(values: NDArray[np.float64]) -> float:
    """The sum of the squares; not by BLAS, whose threads cost more than so short a sum where the cores are shared."""
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat))


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
