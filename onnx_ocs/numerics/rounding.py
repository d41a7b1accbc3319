"""Roundings: which integer each weight becomes, once its step and the range of its channel are known.

Splitting a channel widens its range and changes nothing else, so a rounding knows only limits. Each is one registered
function from some outputs of a layer to their integers. They differ in the error they keep small, ``e = step * q - w``:

=============  =========================================================================================================
``nearest``    ``sum e^2`` (Zhao et al., arXiv:1901.09504, Section 3.3)
``compensated``  ``sum e^2`` after the sums of ``e`` over each kernel and each output: no data (as SQuant, Guo et al.,
               ICLR 2022, arXiv:2202.07471)
``assumed``    ``e' H e`` with second moments ``H`` that data is taken to have (:mod:`onnx_ocs.numerics.assumed`)
``synthetic``  as ``hessian``, on samples that are made up, and partly on what is assumed
``hessian``    ``e' H e`` with the second moments ``H`` of the data that the weights are multiplied by: the squared
               error of the output (OBQ, arXiv:2208.11580; GPTQ, arXiv:2210.17323)
=============  =========================================================================================================
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.grid import nearest

DAMPING = 0.01
"""Of the mean of the second moments, that is added to each of their squares: samples are few, and data is noisy."""

COLUMNS = 64
"""Columns between two updates of all later ones by one product."""

SWEEPS = 2
"""Times that roundings by moments look at each weight again."""


BY_MOMENTS = {"hessian", "synthetic", "assumed"}
"""Roundings that make the error of the outputs least, as far as second moments of the data tell it."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some outputs of each group of a layer: what each is a sum of."""

    values: NDArray[np.float64]  # (G, O, I, K): groups, outputs, input channels, positions of the kernel
    step: NDArray[Any]  # broadcasts to them
    limit: NDArray[np.int64]  # (G, 1, I, 1), of the integers of each input channel
    moments: "SecondMoments | None" = None  # of the data
    sweeps: int = SWEEPS  # times that a rounding by moments looks at each weight again


class SecondMoments(Protocol):
    """H of each group, or one for all that are alike, in a form that roundings use."""

    def cost(self, error: NDArray[np.float64]) -> NDArray[np.float64]:
        """(G, O), ``e' H e`` of each row of ``error``, (G, O, n)."""
        ...


Integers = NDArray[np.float64]  # (G, O, I, K), whole numbers within the limits
Rounding = Callable[[Rows], Integers]

ROUNDINGS: dict[str, Rounding] = {}


def rounding(name: str) -> Callable[[Rounding], Rounding]:
    """Register a rounding under the name that users choose."""

    def register(function: Rounding) -> Rounding:
        ROUNDINGS[name] = function
        return function

    return register


@rounding("nearest")
def to_nearest(rows: Rows) -> Integers:
    """``floor(w / step + 1/2)``, within the limits."""
    made = nearest(rows.values, rows.step)
    return np.clip(made, -rows.limit, rows.limit, out=made)


@rounding("compensated")
def compensated(rows: Rows) -> Integers:
    """The error sums of each kernel and of each output vanish, to within half a step.

    Data behind a Relu has a mean far from zero, and neighbouring positions of it are nearly equal: errors of one kernel
    act together, and so do those of one output. From the nearest integers the fewest weights go to their other
    neighbour, those first that are nearly in the middle: in each kernel until its error sum is at most half a step,
    then one at most in each kernel, those with the largest sums first, until that of the output is.
    """
    made = np.ascontiguousarray(to_nearest(rows))
    error = np.ascontiguousarray(made - rows.values / rows.step)
    sums = error.sum(axis=3)
    limit = np.broadcast_to(rows.limit[..., 0], sums.shape).reshape(-1)
    if rows.values.shape[3] > 1:  # of one weight by itself the nearest integer is the best
        _compensate_kernels(made, error, sums, limit)
    _compensate_outputs(rows, made, error, sums, limit)
    return made


def _compensate_kernels(
    made: Integers, error: NDArray[np.float64], sums: NDArray[np.float64], limit: NDArray[np.int64]
) -> None:
    made, error = (part.reshape(-1, part.shape[3]) for part in (made, error))  # views
    total = sums.reshape(-1)
    at = np.flatnonzero(np.abs(total) > 0.5)
    left = np.ceil(np.abs(total[at]) - 0.5)  # steps that a sum has too many
    while at.size:
        sign = np.sign(total[at])
        most, place = _movable(made[at], error[at], sign, limit[at])
        moved = most > 0
        at, place, sign, left = at[moved], place[moved], sign[moved], left[moved]
        made[at, place] -= sign
        error[at, place] -= sign
        total[at] -= sign
        left -= 1
        at, left = at[left > 0], left[left > 0]


def _movable(
    made: Integers, error: NDArray[np.float64], sign: NDArray[np.float64], limit: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(kernels,), how far the weight is from its integer that goes one step against ``sign`` best, and which it is.

    Nothing above zero where none may: it would leave the range, or the two neighbours of its weight.
    """
    away = error * sign[:, None]
    away[(made * sign[:, None] <= -limit[:, None]) | (away >= 1)] = -1
    place = away.argmax(axis=1)
    return away[np.arange(len(away)), place], place


def _compensate_outputs(
    rows: Rows, made: Integers, error: NDArray[np.float64], sums: NDArray[np.float64], limit: NDArray[np.int64]
) -> None:
    inputs, kernel = made.shape[2:]
    made, error = (part.reshape(-1, inputs, kernel) for part in (made, error))
    step = np.broadcast_to(rows.step, rows.values.shape)[..., 0].reshape(-1, inputs).astype(np.float64)
    sums, limit = sums.reshape(-1, inputs), limit.reshape(-1, inputs)
    total = (sums * step).sum(axis=1)
    sign = np.sign(total)
    smallest = np.maximum(step.min(axis=1), np.finfo(np.float64).tiny)
    number = int(min(inputs, np.ceil(np.abs(total) / smallest).max(initial=0)))  # kernels of a row that may move
    if not number:
        return
    order = _largest_first(sums * sign[:, None], number)
    moves = np.take_along_axis(step, order, axis=1)
    row, rank = np.nonzero(np.cumsum(moves, axis=1) - moves / 2 < np.abs(total)[:, None])
    at = order[row, rank]
    most, place = _movable(made[row, at], error[row, at], sign[row], limit[row, at])
    moved = most > 0
    made[row[moved], at[moved], place[moved]] -= sign[row[moved]]


def _largest_first(values: NDArray[np.float64], number: int) -> NDArray[np.int64]:
    """(O, number), where the largest values of each row are; equal ones in their order."""
    if number < values.shape[1]:
        some = np.sort(np.argpartition(values, -number, axis=1)[:, -number:], axis=1)
    else:
        some = np.broadcast_to(np.arange(number), values.shape)
    order = np.argsort(-np.take_along_axis(values, some, axis=1), axis=1, kind="stable")
    return np.asarray(np.take_along_axis(some, order, axis=1))


@dataclass(frozen=True, eq=False)
class Factor:
    """``e' H e = |R' e|^2`` of each group, with its inputs in the order in which they are rounded."""

    order: NDArray[np.int64]  # (G, n)
    moments: NDArray[np.float64]  # (G, n, n), H, damped
    upper: NDArray[np.float64]  # (G, n, n), R, triangular

    def cost(self, error: NDArray[np.float64]) -> NDArray[np.float64]:
        """(G, O), ``e' H e`` of each row of ``error``, (G, O, n) in the order of the source."""
        made = self.ordered(error) @ self.upper
        return np.square(made, out=made).sum(axis=2)

    def ordered(self, rows: NDArray[Any]) -> NDArray[Any]:
        """(G, O, n), in the order of the factor."""
        return np.take_along_axis(rows, self.order[:, None], axis=2)


def factorized(moments: NDArray[np.float64], damping: float = DAMPING) -> Factor:
    """The triangular factors of H, each damped by a share of its mean; the largest second moments come first.

    Inputs that are always zero are rounded as if they had no correlation with others.

    Args:
        moments: (G, n, n), H, finite; of rank below n where there are few samples.
    """
    found = Factor(np.empty(moments.shape[:2], np.int64), np.empty_like(moments), np.empty_like(moments))
    for group, second in enumerate(moments):
        diagonal = second.diagonal()
        order = np.argsort(-diagonal, kind="stable")
        damped = found.moments[group]
        damped[...] = second[np.ix_(order, order)]
        mean = diagonal.mean()
        share = damping * mean if mean > 0 else 1.0
        while True:
            damped[np.diag_indices_from(damped)] += share
            try:
                lower = np.linalg.cholesky(damped[::-1, ::-1])
                break
            except np.linalg.LinAlgError:  # rounding has left it with negative eigenvalues
                share *= 10
        found.order[group], found.upper[group] = order, lower[::-1, ::-1]
    return found


@rounding("synthetic")
@rounding("hessian")
def error_propagating(rows: Rows) -> Integers:
    """One input after the other is rounded, and what is wrong with it is made up for by those that follow.

    With the factor R, ``e' H e`` is the sum of the squares of ``(R' e)[j] = R[j, j] e[j] + sum_{i < j} R[i, j] e[i]``,
    and the j-th of these is made as small as the grid allows by the choice of ``q[j]`` (Babai's nearest plane, which
    GPTQ is: arXiv:2210.17323, Algorithm 1). Then each weight is looked at again, in the same order, and goes where the
    error is least with all others as they are.
    """
    factor = rows.moments
    assert isinstance(factor, Factor)
    upper, corner = factor.upper, factor.upper.diagonal(axis1=1, axis2=2)[..., None]
    values, step, limit = (_by_input(part, rows.values.shape, factor) for part in (rows.values, rows.step, rows.limit))
    made, error = np.empty_like(values), np.empty_like(values)
    for start, end in _blocks(values.shape[1]):
        owed = upper[:, :start, start:end].swapaxes(1, 2) @ error[:, :start]
        for j in range(start, end):
            wanted = (values[:, j] - owed[:, j - start] / corner[:, j]) / step[:, j]
            made[:, j] = nearest_within(wanted, limit[:, j])
            error[:, j] = made[:, j] * step[:, j] - values[:, j]
            owed[:, j - start + 1 :] += upper[:, j, j + 1 : end, None] * error[:, None, j]
    for _ in range(rows.sweeps):
        _descend(made, error, step, limit, factor.moments)
    integers = np.empty((len(made), made.shape[2], made.shape[1]))
    np.put_along_axis(integers, factor.order[:, None], made.swapaxes(1, 2), axis=2)
    return integers.reshape(rows.values.shape)


def _descend(
    made: NDArray[np.float64],
    error: NDArray[np.float64],
    step: NDArray[np.float64],
    limit: NDArray[np.float64],
    moments: NDArray[np.float64],
) -> None:
    """One sweep of coordinate descent on ``e' H e``, in place: (G, n, O) all."""
    slope = moments @ error
    own = moments.diagonal(axis1=1, axis2=2)[..., None]
    for start, end in _blocks(made.shape[1]):
        before = error[:, start:end].copy()
        for j in range(start, end):
            wanted = made[:, j] - slope[:, j] / (own[:, j] * step[:, j])
            moved = nearest_within(wanted, limit[:, j]) - made[:, j]
            if moved.any():
                change = moved * step[:, j]
                made[:, j] += moved
                error[:, j] += change
                slope[:, j + 1 : end] += moments[:, j, j + 1 : end, None] * change[:, None]
        slope[:, end:] += moments[:, end:, start:end] @ (error[:, start:end] - before)


def nearest_within(wanted: NDArray[np.float64], limit: NDArray[Any]) -> NDArray[np.float64]:
    """The nearest integers of magnitude ``limit`` at most; ``wanted`` is overwritten."""
    wanted += 0.5
    np.floor(wanted, out=wanted)
    np.minimum(wanted, limit, out=wanted)
    return np.maximum(wanted, -limit, out=wanted)


def _blocks(inputs: int) -> Iterator[tuple[int, int]]:
    """Columns whose errors are passed on to all later ones by one product."""
    for start in range(0, inputs, COLUMNS):
        yield start, min(start + COLUMNS, inputs)


def _by_input(part: NDArray[Any], shape: tuple[int, ...], factor: Factor) -> NDArray[np.float64]:
    """(G, n, O), the inputs in the order of the factor; what is the same for all outputs, or all inputs, is made once.

    Args:
        part: broadcasts to ``shape``, (G, O, I, K).
    """
    groups, outputs, inputs = *shape[:2], math.prod(shape[2:])
    whole = np.broadcast_to(part, shape)
    same = [stride == 0 or size == 1 for size, stride in zip(shape, whole.strides, strict=True)]
    whole = whole[:, :1] if same[1] else whole
    made = whole[..., :1, 0] if same[2] and same[3] else factor.ordered(whole.reshape(groups, -1, inputs))
    return np.broadcast_to(np.ascontiguousarray(made.swapaxes(1, 2), np.float64), (groups, inputs, outputs))
