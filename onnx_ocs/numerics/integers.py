"""Weights as integers: how they are rounded, under which threshold, and on which step they are read."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.compare import decibels
from onnx_ocs.numerics.grid import CHUNK, Grid, common_step, nearest, pieces
from onnx_ocs.numerics.rounding import ROUNDINGS, SWEEPS, Rows, SecondMoments
from onnx_ocs.numerics.split import SplitPlan, along, deal, expand, recombine
from onnx_ocs.numerics.weights import Axes, by_group, by_output, grouped, shaped_step, ungrouped

FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Of the largest share, that are tried as the threshold with the least error of the output."""

LEAST_ASSUMED = 0.8
"""Of these, where the data is assumed: the largest weights may meet more than that."""

NARROWER = (0.05, 0.025)
"""How far on either side of the best so far it is looked for next."""

TRIAL_SWEEPS = 0
"""Of the roundings that thresholds are compared by."""

MOST_REFITTED = 2.0
"""Times that a step grows or shrinks at most where it is refitted; outputs that are next to nothing ask for more."""

WIDE = 2**22
"""Weights that are rounded at a time where that is more work than to read them (32 MB for each array of them)."""


@dataclass(frozen=True, eq=False)
class Task:
    """How a weight is rounded, and what that rests on."""

    rounding: str = "nearest"
    moments: SecondMoments | None = None  # of the data, for ``hessian``, ``synthetic`` and ``assumed``


NEAREST = Task()


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight as integers."""

    integers: NDArray[np.int8]  # of the copies
    step: NDArray[np.float32]  # on which they are read
    sqnr_db: float  # of the weight that they stand for


def rounded(
    weight: NDArray[Any],
    wanted: NDArray[Any],
    plans: tuple[SplitPlan, ...],
    axes: Axes,
    step: NDArray[np.float32],
    bits: int,
    aware: bool,
    task: Task = NEAREST,
) -> Rounded:
    """The integers of ``wanted``, which stands for ``weight``, and the step that becomes of theirs."""
    integers, sqnr = split_integers(wanted, plans, axes, step, bits, aware, task)
    refits = task.moments is not None and axes.block is None
    if refits:
        assert task.moments is not None
        step = refitted_step(wanted, integers, plans, axes, step, task.moments)
    if refits or wanted is not weight:
        sqnr = weight_sqnr(weight, integers, plans, axes, step)
    return Rounded(integers, step, sqnr)


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


def least_error_threshold(
    weight: NDArray[Any],
    plans: tuple[SplitPlan, ...],
    axes: Axes,
    threshold: NDArray[np.float64],
    bits: int,
    task: Task,
    exact: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The fraction of ``threshold``, for all or for each output, with the least squared error of the output.

    Of some fractions far apart first, then of those about the best. The error is ``e' H e`` with the second moments H
    of the data, of the very integers that ``task`` makes.

    Args:
        exact: thresholds that are tried as well, or NaN, by :func:`exact_threshold`.
    """
    moments, grid = task.moments, Grid(bits)
    assert moments is not None
    limits = widened_limits(plans, axes, grid.levels)
    best, least = np.ones(threshold.shape), np.full(threshold.shape, np.inf)

    def attempt(fractions: NDArray[np.float64]) -> None:
        nonlocal best, least
        wide = shaped_step(grid.step(threshold * fractions), axes, weight.ndim, plans)
        error = _rounded(weight, wide, limits, axes, task, TRIAL_SWEEPS) * wide.astype(np.float64) - weight
        cost = _costs(error, axes, moments, threshold.shape)
        best = np.where(cost < least, fractions, best)
        least = np.minimum(least, cost)

    for fraction in FRACTIONS:
        if task.rounding != "assumed" or fraction >= LEAST_ASSUMED:
            attempt(np.full(threshold.shape, fraction))
    for distance in NARROWER:
        middle = best
        for side in (-distance, distance):
            attempt(np.minimum(middle + side, 1))
    if (exact > 0).any():
        attempt(np.divide(exact, threshold, out=np.ones(threshold.shape), where=exact > 0))
    return threshold * best


def exact_threshold(weight: NDArray[Any], axes: Axes, largest: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """The least threshold under which no weight is rounded, in the shape of ``largest``; NaN where there is none.

    So it is where weights are multiples of a step already: they were integers once, or trained to be.

    Args:
        largest: the largest shares of the split weight, for all or for each output, below which it would be clipped.
    """
    levels = Grid(bits).levels
    rows = grouped(weight, axes)
    rows = by_output(rows.reshape(*rows.shape[:2], -1), axes, *largest.shape) if largest.shape else rows.reshape(1, -1)
    least = largest.reshape(-1) / levels
    step = common_step(rows, least)
    parts = np.floor(np.divide(step, least, out=np.ones(step.shape), where=least > 0) * (1 + np.finfo(np.float32).eps))
    return np.asarray(step / np.maximum(parts, 1) * levels).reshape(largest.shape)


def refitted_step(
    weight: NDArray[Any],
    integers: NDArray[Any],
    plans: tuple[SplitPlan, ...],
    axes: Axes,
    step: NDArray[np.float32],
    moments: SecondMoments,
) -> NDArray[np.float32]:
    """The step, or that of each output, with which the outputs have the energy of those of the float weight.

    Integers with the least error leave a part of the output out, the more the fewer the bits are, and layer by layer
    the signal shrinks. So each step is multiplied by ``sqrt(w' H w / q' H q)``, with the second moments H of the data;
    Banner et al. (NeurIPS 2019, arXiv:1810.05723, Section 3.3) keep the variance of the weights in the same way.

    Args:
        integers: of the copies, on steps that are no blocks.
        moments: of the data.
    """
    assert axes.block is None
    whole = _recombined(integers, plans, axes)
    wanted = _costs(weight.astype(np.float64), axes, moments, step.shape)
    found = _costs(whole * shaped_step(step, axes, weight.ndim, plans).astype(np.float64), axes, moments, step.shape)
    gain = np.ones(step.shape)
    np.divide(wanted, found, out=gain, where=found > 0)
    gain = np.clip(np.sqrt(gain), 1 / MOST_REFITTED, MOST_REFITTED)
    return np.asarray(step * gain, np.float32)


def read_weight(
    integers: NDArray[Any], plans: tuple[SplitPlan, ...], axes: Axes, step: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The weight that the integers of the copies stand for."""
    whole = _recombined(integers, plans, axes)
    return np.asarray(whole * shaped_step(step, axes, whole.ndim, plans), np.float64)


def weight_sqnr(
    weight: NDArray[Any], integers: NDArray[Any], plans: tuple[SplitPlan, ...], axes: Axes, step: NDArray[np.float32]
) -> float:
    """The signal-to-noise ratio in dB of the weight that the integers of the copies stand for."""
    error = read_weight(integers, plans, axes, step) - weight
    return decibels(_energy(weight.astype(np.float64)), _energy(error))


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
    return mean_output(weight - read_weight(integers, plans, axes, step), axes, mean)


def mean_output(weight: NDArray[Any], axes: Axes, mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """(outputs,), ``w E x`` for the data of each group, (groups, n); the outputs of all groups behind each other."""
    rows = grouped(weight, axes)
    return np.stack([part.reshape(len(part), -1) @ middle for part, middle in zip(rows, mean, strict=True)]).reshape(-1)


def widened_limits(plans: tuple[SplitPlan, ...], axes: Axes, levels: int) -> NDArray[np.int64]:
    """(groups, I), the largest integer of each input channel of each group."""
    limits = np.stack([plan.widening * levels for plan in plans])
    if axes.groups_on_input:
        return limits.reshape(axes.groups, -1)
    return np.broadcast_to(limits, (axes.groups, limits.shape[1]))


def _rounded(
    weight: NDArray[Any],
    wide: NDArray[np.float32],
    limits: NDArray[np.int64],
    axes: Axes,
    task: Task,
    sweeps: int = SWEEPS,
) -> NDArray[Any]:
    """Integers within the limits by a rounding that looks at whole rows."""
    rows, steps = grouped(weight, axes), grouped(np.broadcast_to(wide, weight.shape), axes)
    limit = limits[:, None, :, None]
    made = np.empty(rows.shape, np.int16 if limits.max() < 2**15 else np.int64)
    chunk = max(1, (CHUNK if task.moments is None else WIDE) * rows.shape[1] // rows.size)
    for start in range(0, rows.shape[1], chunk):
        some = slice(start, start + chunk)
        asked = Rows(rows[:, some].astype(np.float64), steps[:, some], limit, task.moments, sweeps)
        made[:, some] = ROUNDINGS[task.rounding](asked)
    return np.ascontiguousarray(ungrouped(made, axes, weight.shape))


def _costs(
    error: NDArray[np.float64], axes: Axes, moments: SecondMoments, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """``e' H e`` in the shape of a step: of all outputs together, (), or of each, (outputs,)."""
    rows = grouped(error, axes)
    costs = moments.cost(rows.reshape(*rows.shape[:2], -1))
    return by_output(costs, axes, *shape).sum(axis=1) if shape else np.asarray(costs.sum())


def _recombined(integers: NDArray[Any], plans: tuple[SplitPlan, ...], axes: Axes) -> NDArray[Any]:
    """What the integers of the copies sum to."""
    return by_group(lambda plan, part: recombine(part, plan, axes.input), plans, axes, integers)


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
