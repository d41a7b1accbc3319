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

from onnx_ocs.numerics.moments import Moments
from onnx_ocs.numerics.planning import Inputs
from onnx_ocs.numerics.rounding import DAMPING, Integers, Rows, nearest_within, rounding

CORRELATION = 0.6
"""Of neighbouring positions along each axis; of 0.3 to 0.9 it is the best on the networks of benchmarks/accuracy.py."""

MEAN = 2.0
"""Times the mean that data has: samples differ in brightness, which all channels share as they share their mean."""

SHARE = 0.3
"""Of what is assumed in the second moments of made-up pictures; from 0.1 to 0.4 it makes little difference."""

SHARE_OF_NOISE = 0.6
"""The same of other made-up samples, which have less in common with real ones."""

EVEN = 0.95
"""The largest mean of a channel, in its root mean square, where made-up samples say that it is nearly constant."""

LARGEST = 2**23
"""Values of the kernels' matrices at most (64 MB for each of the two that are kept)."""


@dataclass(frozen=True, eq=False)
class Assumed:
    """``e' H e`` for the H of C channels with K positions each, in G groups, or in one for all that are alike.

    Args:
        mean, variance: (G, C, K), of the inputs.
        kernel: the sizes whose product is K.
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    kernel: tuple[int, ...] = ()

    @cached_property
    def shared(self) -> NDArray[np.float64]:
        """(G, C, K), m."""
        return self.mean * MEAN

    @cached_property
    def local(self) -> NDArray[np.float64]:
        """(G, C, K, K), the damped blocks of H without m m'."""
        deviation = np.sqrt(self.variance)
        blocks = _correlation(self.kernel) * deviation[..., :, None] * deviation[..., None, :]
        whole = (self.variance + np.square(self.shared)).mean(axis=(1, 2))
        damping = np.where(whole > 0, DAMPING * whole, 1.0)
        return blocks + np.eye(blocks.shape[-1]) * damping[:, None, None, None]

    @cached_property
    def ties(self) -> NDArray[np.float64]:
        """(G, C), what is left of m m' among channels up to each, once those behind it make up for it as they can."""
        each = np.einsum("gck,gck->gc", self.shared, np.linalg.solve(self.local, self.shared[..., None])[..., 0])
        behind = np.cumsum(each[:, ::-1], axis=1)[:, -2::-1]
        return 1 / (1 + np.append(behind, np.zeros((len(each), 1)), axis=1))

    @cached_property
    def upper(self) -> NDArray[np.float64]:
        """(G, C, K, K), R of each channel once those behind it make up for it: R R' = local + tie m m'."""
        m = self.shared
        tied = self.local + self.ties[..., None, None] * m[..., :, None] * m[..., None, :]
        return np.asarray(np.linalg.cholesky(tied[..., ::-1, ::-1])[..., ::-1, ::-1], np.float64)

    @cached_property
    def pull(self) -> NDArray[np.float64]:
        """(G, C, K), the error that each input had better have for one of ``m' e`` in the channels before."""
        m = self.shared * self.ties[..., None]
        tied = self.local + m[..., :, None] * self.shared[..., None, :]
        return np.asarray(-np.linalg.solve(tied, m[..., None])[..., 0], np.float64)

    def cost(self, error: NDArray[np.float64]) -> NDArray[np.float64]:
        """(G, O), ``e' H e`` of each row of ``error``, (G, O, C * K)."""
        shaped = error.reshape(*error.shape[:2], *self.mean.shape[1:])
        own = (np.einsum("gock,gckj->gocj", shaped, self.local) * shaped).sum(axis=(2, 3))
        common = np.einsum("gock,gck->go", shaped, self.shared)
        return np.asarray(own + np.square(common))


def fits(channels: int, kernel: Sequence[int]) -> bool:
    """Whether the matrices of so many channels are small enough."""
    return channels * math.prod(kernel) ** 2 <= LARGEST


def tempered(moments: Moments, known: Inputs | None, kernel: Sequence[int], assumed: float) -> Moments:
    """Second moments of made-up samples, less sure of themselves: those of real data may be other ones.

    A share of them is what is assumed of the data, with channels that are alike in their mean square, so that what no
    made-up sample excites counts all the same. What is known of means and variances goes before what the samples say.

    Args:
        moments: (G, n) and (G, n, n), with the ``prod(kernel)`` inputs of each channel side by side.
        known: of the same inputs, by BatchNormalization or statistics of real data.
        assumed: the share of what is.
    """
    mean, second, positions = moments.mean, moments.second, math.prod(kernel)
    assert second is not None
    variance = np.maximum(np.stack([part.diagonal() for part in second]) - np.square(mean), 0)
    blended = second - mean[:, :, None] * mean[:, None, :]
    if known is None:
        likely = _alike(mean, variance, positions)
    else:
        alive = variance > 1e-6 * variance.mean(axis=1, keepdims=True)
        gain = np.sqrt(np.divide(known.variance, variance, out=np.zeros_like(variance), where=alive))
        blended *= gain[:, :, None] * gain[:, None, :]
        likely, mean = known, known.mean
    blended *= 1 - assumed
    for share, middle in ((1 - assumed, mean), (assumed, likely.mean)):
        blended += share * middle[:, :, None] * middle[:, None, :]
    deviation = np.sqrt(likely.variance).reshape(len(mean), -1, positions)
    local = _correlation(kernel) * deviation[..., :, None] * deviation[..., None, :]
    channel = np.arange(deviation.shape[1])
    for part, blocks in zip(blended, local, strict=True):
        part.reshape(len(channel), positions, len(channel), positions)[channel, :, channel] += assumed * blocks
    return Moments((1 - assumed) * mean + assumed * likely.mean, blended)


def _alike(mean: NDArray[np.float64], variance: NDArray[np.float64], positions: int) -> Inputs:
    """(G, n) each, with the same mean square for all channels, and the share that the mean has of that of each."""
    shaped = mean.reshape(len(mean), -1, positions)
    square = (variance + np.square(mean)).reshape(shaped.shape).mean(axis=2, keepdims=True)
    typical = np.sqrt(square.mean(axis=1, keepdims=True))
    typical[typical == 0] = 1
    share = shaped.mean(axis=2, keepdims=True) / np.maximum(np.sqrt(square), 1e-3 * typical)
    share = np.broadcast_to(np.clip(share, -EVEN, EVEN), shaped.shape)
    made = typical * share, np.square(typical) * (1 - np.square(share))
    return Inputs(*(part.reshape(mean.shape) for part in made))


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
    moments = rows.moments
    assert isinstance(moments, Assumed)
    values = np.ascontiguousarray(rows.values.transpose(2, 3, 0, 1))  # (C, K, G, O)
    step = np.ascontiguousarray(np.broadcast_to(rows.step, rows.values.shape).transpose(2, 3, 0, 1), np.float64)
    limits = rows.limit[:, :, :, 0].transpose(2, 0, 1)  # (C, G, 1)
    uppers = moments.upper.transpose(1, 2, 3, 0)  # (C, K, K, G)
    pulls, shared = (part.transpose(1, 2, 0)[..., None] for part in (moments.pull, moments.shared))  # (C, K, G, 1)
    made, error = np.empty_like(values), np.empty_like(values)
    common = np.zeros(values.shape[2:])  # (G, O), m' e
    for channel, (limit, upper, here) in enumerate(zip(limits, uppers, error, strict=True)):
        goal = pulls[channel] * common
        for k in range(len(here)):
            wanted = values[channel, k] + goal[k]
            if k:
                wanted -= ((upper[:k, k] / upper[k, k])[..., None] * (here[:k] - goal[:k])).sum(axis=0)
            made[channel, k] = nearest_within(wanted / step[channel, k], limit)
            here[k] = made[channel, k] * step[channel, k] - values[channel, k]
        common += (shared[channel] * here).sum(axis=0)
    for _ in range(rows.sweeps):
        _descend(made, error, step, limits, moments, common)
    return np.ascontiguousarray(made.transpose(2, 3, 0, 1))


def _descend(
    made: NDArray[np.float64],
    error: NDArray[np.float64],
    step: NDArray[np.float64],
    limits: NDArray[np.int64],
    moments: Assumed,
    common: NDArray[np.float64],
) -> None:
    """One sweep of coordinate descent on ``e' H e``, in place: (C, K, G, O) all, and (G, O), ``m' e``."""
    for channel, limit in enumerate(limits):
        local = moments.local[:, channel].transpose(1, 2, 0)[..., None]  # (K, K, G, 1)
        mean = moments.shared[:, channel].T[..., None]  # (K, G, 1)
        whole = local + mean[:, None] * mean
        slope = (moments.local[:, channel] @ error[channel].swapaxes(0, 1)).swapaxes(0, 1) + mean * common
        for k in range(len(mean)):
            here, width = made[channel, k], step[channel, k]
            moved = np.clip(here - np.floor(slope[k] / (whole[k, k] * width) + 0.5), -limit, limit) - here
            if moved.any():
                change = moved * width
                here += moved
                error[channel, k] += change
                common += mean[k] * change
                slope += whole[:, k] * change
