"""Second moments that data is taken to have where there is none, and weights rounded by them.

Neighbouring positions of a kernel see nearly the same, channels have a mean in common, and nothing else is known: with
the deviations D and the mean m of the inputs, H = D (I x S) D + m m', where S falls by :data:`CORRELATION` from one
position to the next. The blocks of the channels are tied together by m alone, so that what
:func:`~onnx_ocs.numerics.rounding.error_propagating` does with a factor of H takes a few products for each weight, and
no matrix larger than a kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.rounding import DAMPING, SWEEPS, Integers, Rows, rounding

CORRELATION = 0.6
"""Of neighbouring positions along each axis; of 0.3 to 0.9 it is the best on the networks of benchmarks/accuracy.py."""

MEAN = 2.0
"""Times the mean that data has: samples differ in brightness, which all channels share as they share their mean."""

LARGEST = 2**23
"""Values of the kernels' matrices at most (64 MB for each of the two that are kept)."""


@dataclass(frozen=True, eq=False)
class Assumed:
    """``e' H e`` for the H of C channels with K positions each.

    Args:
        mean, variance: (C, K), of the inputs.
        kernel: the sizes whose product is K.
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    kernel: tuple[int, ...] = ()

    @cached_property
    def shared(self) -> NDArray[np.float64]:
        """(C, K), m."""
        return self.mean * MEAN

    @cached_property
    def local(self) -> NDArray[np.float64]:
        """(C, K, K), the damped blocks of H without m m'."""
        deviation = np.sqrt(self.variance)
        blocks = _correlation(self.kernel) * deviation[:, :, None] * deviation[:, None, :]
        whole = float((self.variance + np.square(self.shared)).mean())
        return blocks + np.eye(blocks.shape[1]) * (DAMPING * whole if whole > 0 else 1.0)

    @cached_property
    def ties(self) -> NDArray[np.float64]:
        """(C,), what is left of m m' among channels up to each, once those behind it make up for it as they can."""
        each = np.einsum("ck,ck->c", self.shared, np.linalg.solve(self.local, self.shared[:, :, None])[:, :, 0])
        return 1 / (1 + np.append(np.cumsum(each[::-1])[::-1][1:], 0.0))

    @cached_property
    def upper(self) -> NDArray[np.float64]:
        """(C, K, K), R of each channel once those behind it make up for it: R R' = local + tie m m'."""
        m = self.shared
        tied = self.local + self.ties[:, None, None] * m[:, :, None] * m[:, None, :]
        return np.asarray(np.linalg.cholesky(tied[:, ::-1, ::-1])[:, ::-1, ::-1], np.float64)

    @cached_property
    def pull(self) -> NDArray[np.float64]:
        """(C, K), the error that each input had better have for one of ``m' e`` in the channels before."""
        m = self.shared * self.ties[:, None]
        tied = self.local + m[:, :, None] * self.shared[:, None, :]
        return np.asarray(-np.linalg.solve(tied, m[:, :, None])[:, :, 0], np.float64)

    def cost(self, error: NDArray[np.float64]) -> NDArray[np.float64]:
        """(O,), ``e' H e`` of each row of ``error``, (O, C * K)."""
        shaped = error.reshape(len(error), *self.mean.shape)
        own = (np.einsum("ock,ckj->ocj", shaped, self.local) * shaped).sum(axis=(1, 2))
        return np.asarray(own + np.square(error @ self.shared.reshape(-1)))


def fits(channels: int, kernel: Sequence[int]) -> bool:
    """Whether the matrices of so many channels are small enough."""
    return channels * math.prod(kernel) ** 2 <= LARGEST


def _correlation(kernel: Sequence[int]) -> NDArray[np.float64]:
    """(K, K), S: the product over the axes."""
    made = np.ones((1, 1))
    for size in kernel:
        place = np.arange(size)
        made = np.kron(made, CORRELATION ** np.abs(place[:, None] - place))
    return made


@rounding("assumed")
def by_assumed_moments(rows: Rows) -> Integers:
    """As ``hessian``, with the moments that data is taken to have: one input after the other, then each once more."""
    moments = rows.factor
    assert isinstance(moments, Assumed)
    values = np.ascontiguousarray(rows.values.transpose(1, 2, 0))  # (C, K, O)
    step = np.ascontiguousarray(np.broadcast_to(rows.step, rows.values.shape).transpose(1, 2, 0), np.float64)
    made, error = np.empty_like(values), np.empty_like(values)
    common = np.zeros(values.shape[2])  # m' e
    for channel, limit in enumerate(rows.limit[:, 0].tolist()):
        upper, here = moments.upper[channel], error[channel]
        goal = np.outer(moments.pull[channel], common)
        for k in range(len(here)):
            wanted = values[channel, k] + goal[k]
            if k:
                wanted -= (upper[:k, k] / upper[k, k]) @ (here[:k] - goal[:k])
            made[channel, k] = np.clip(np.floor(wanted / step[channel, k] + 0.5), -limit, limit)
            here[k] = made[channel, k] * step[channel, k] - values[channel, k]
        common += moments.shared[channel] @ here
    for _ in range(SWEEPS):
        _descend(made, error, step, rows.limit, moments, common)
    return np.ascontiguousarray(made.transpose(2, 0, 1))


def _descend(
    made: NDArray[np.float64],
    error: NDArray[np.float64],
    step: NDArray[np.float64],
    limits: NDArray[np.int64],
    moments: Assumed,
    common: NDArray[np.float64],
) -> None:
    """One sweep of coordinate descent on ``e' H e``, in place: (C, K, O) all, and (O,), ``m' e``."""
    for channel, limit in enumerate(limits[:, 0].tolist()):
        local, mean = moments.local[channel], moments.shared[channel]
        slope = local @ error[channel] + np.outer(mean, common)
        for k, curvature in enumerate(local.diagonal() + np.square(mean)):
            here, width = made[channel, k], step[channel, k]
            moved = np.clip(here - np.floor(slope[k] / (curvature * width) + 0.5), -limit, limit) - here
            if moved.any():
                change = moved * width
                here += moved
                error[channel, k] += change
                common += mean[k] * change
                slope += np.outer(local[:, k] + mean * mean[k], change)
