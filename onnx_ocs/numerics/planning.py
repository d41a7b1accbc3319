"""Copies and thresholds chosen together, by what each copy saves of a stated objective; and a budget for all layers.

The objective is what rounding and clipping add to the squared outputs of a layer. Of the n weights of an output with
threshold T on a grid of Q levels, where weight i has ``d_i`` times the range and its input the mean ``m_i`` and the
variance ``v_i``::

    T^2 / (12 Q^2) sum_i (v_i + m_i^2)  +  sum_i v_i c_i^2  +  (sum_i m_i c_i)^2
    c_i = sign(w_i) max(|w_i| - d_i T, 0)

Rounding errors are independent of each other, and those of clipping are not: they all have the sign of their weight, so
that with inputs of one sign they add up. With ``v = 1`` and ``m = 0`` it is the squared error of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.split import Picks, divisor

OBJECTIVES = ("output", "weight")
"""What the joint plan makes least: the squared error of the outputs, or of the weights."""

TRIED = np.linspace(0, 1, 13)
"""Thresholds that are tried, by how far they are, in octaves, from the largest weight to the least one tried."""

OCTAVES, OCTAVES_TOGETHER = 1.0, 3.0
"""From the largest weight to the least threshold: of each output, and of all of them together."""

CANDIDATES = 64
"""Channels whose gains are looked up before each copy; those of all channels are from time to time."""

RECTIFIED = 0.5 / np.pi / (0.5 - 0.5 / np.pi)
"""The squared mean of a rectified normal variable in its variances: what is assumed of data that is never negative."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known, or assumed, of the n values that the weights of each group of outputs are multiplied by."""

    mean: NDArray[np.float64]  # (groups, n)
    variance: NDArray[np.float64]  # (groups, n)

    @property
    def square(self) -> NDArray[np.float64]:
        """(groups, n), E x^2."""
        return self.variance + np.square(self.mean)

    @property
    def centered(self) -> "Inputs":
        """Where the bias makes up for the mean of the error."""
        return Inputs(np.zeros_like(self.mean), self.variance)


def assumed(groups: int, inputs: int, nonnegative: bool) -> Inputs:
    """Of data of which nothing is known but its sign: rectified normal values, or normal ones about zero."""
    mean = np.full((groups, inputs), np.sqrt(RECTIFIED) if nonnegative else 0.0)
    return Inputs(mean, np.ones((groups, inputs)))


class Joint:
    """Some outputs of a layer under way to their copies: what each threshold would cost with the copies so far.

    Args:
        rows: (O, I, K), weights of the outputs by input channel and position of the kernel.
        mean, variance: (I * K,), of the inputs.
        levels: Q.
        together: all outputs have one threshold.
        ids: (I,), which of the channels that copies are chosen for each input channel is.
        channels: how many of those there are.
    """

    def __init__(
        self,
        rows: NDArray[np.floating],
        mean: NDArray[np.float64],
        variance: NDArray[np.float64],
        levels: int,
        together: bool,
        ids: NDArray[np.int64],
        channels: int,
        policy: str = "even",
    ) -> None:
        magnitudes = np.abs(rows.astype(np.float64))
        peaks = magnitudes.max(axis=(1, 2))
        peaks = np.full_like(peaks, peaks.max()) if together else peaks
        octaves = OCTAVES_TOGETHER if together else OCTAVES
        self._together, self._policy = together, policy
        self._tried = peaks[:, None] * 2.0 ** (-octaves * TRIED)  # (O, T)
        self._noise = np.square(self._tried) * ((variance + np.square(mean)).sum() / (12 * levels**2))
        self._peaks = np.zeros(channels)
        np.maximum.at(self._peaks, ids, magnitudes.max(axis=(0, 2)))
        self.copies = np.ones(channels, np.int64)
        row, held, place = np.nonzero(magnitudes > self._tried[:, -1, None, None])  # only these can be clipped
        order = np.lexsort((row, ids[held]))
        row, held, place = row[order], held[order], place[order]
        self._row, self._channel = row, ids[held]
        self._magnitude = magnitudes[row, held, place]
        self._variance = variance.reshape(rows.shape[1:])[held, place]
        self._mean = mean.reshape(rows.shape[1:])[held, place] * np.sign(rows[row, held, place])
        self._own, self._sum = np.zeros_like(self._tried), np.zeros_like(self._tried)
        self._change(slice(None), np.zeros_like(self._magnitude), np.ones_like(self._magnitude))

    @property
    def shares(self) -> NDArray[np.float64]:
        """(channels,), the largest share of a weight of each."""
        return self._peaks / self._divisors(self.copies)

    @property
    def left(self) -> float:
        """The objective with the best thresholds."""
        return float(self._costs().min(axis=1).sum())

    @property
    def thresholds(self) -> NDArray[np.float64]:
        """(O,), the best ones."""
        best = np.broadcast_to(self._costs().argmin(axis=1), len(self._tried))
        return np.take_along_axis(self._tried, best[:, None], axis=1)[:, 0]

    def gains(self, channels: NDArray[np.int64]) -> NDArray[np.float64]:
        """(channels,), what a copy more of each of some channels saves; zero for all others."""
        asked = np.zeros(len(self.copies), bool)
        asked[channels] = True
        some = np.flatnonzero(asked[self._channel])
        saved = np.zeros(len(self.copies))
        if not some.size:
            return saved
        row, channel = self._row[some], self._channel[some]
        starts = np.flatnonzero(np.append(True, (row[1:] != row[:-1]) | (channel[1:] != channel[:-1])))
        held = self._divisors(self.copies[channel]), self._divisors(self.copies[channel] + 1)
        own, added = self._moved(some, *held, starts)
        row, channel = row[starts], channel[starts]
        before = self._noise[row] + self._own[row] + np.square(self._sum[row])
        after = self._noise[row] + self._own[row] + own + np.square(self._sum[row] + added)
        if self._together:
            change = np.zeros((len(saved), len(TRIED)))
            np.add.at(change, channel, after - before)
            total = self._costs()
            return np.asarray(total.min() - (total + change).min(axis=1))
        np.add.at(saved, channel, before.min(axis=1) - after.min(axis=1))
        return saved

    def split(self, channel: int) -> None:
        """Give a channel a copy more."""
        some = slice(*np.searchsorted(self._channel, [channel, channel + 1]).tolist())
        held = self._divisors(self.copies[channel : channel + 1])
        self.copies[channel] += 1
        self._change(some, held, self._divisors(self.copies[channel : channel + 1]))

    def give(self, copies: NDArray[np.int64]) -> None:
        """Let channel ``c`` stand ``copies[c]`` times."""
        held = self._divisors(self.copies)[self._channel], self._divisors(copies)[self._channel]
        self.copies = copies.copy()
        self._change(slice(None), *held)

    def _change(self, some: slice, before: NDArray[np.float64], after: NDArray[np.float64]) -> None:
        own, added = self._moved(some, before, after)
        np.add.at(self._own, self._row[some], own)
        np.add.at(self._sum, self._row[some], added)

    def _moved(
        self,
        some: slice | NDArray[np.int64],
        before: NDArray[np.float64],
        after: NDArray[np.float64],
        starts: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(entries, T): how ``sum v c^2`` and ``sum m c`` change when channels get another range, 0 for unclipped.

        Args:
            starts: where entries begin that are summed; each by itself without it.
        """
        limit, magnitude = self._tried[self._row[some]], self._magnitude[some][:, None]
        own, added = np.zeros_like(limit), np.zeros_like(limit)
        for sign, divisor_ in ((-1.0, before), (1.0, after)):
            if divisor_.any():
                over = np.maximum(magnitude - divisor_[:, None] * limit, 0)
                own += sign * self._variance[some][:, None] * np.square(over)
                added += sign * self._mean[some][:, None] * over
        if starts is None:
            return own, added
        return np.add.reduceat(own, starts), np.add.reduceat(added, starts)

    def _costs(self) -> NDArray[np.float64]:
        """(O, T), or (1, T) of all outputs together."""
        costs: NDArray[np.float64] = self._noise + self._own + np.square(self._sum)
        return costs.sum(axis=0, keepdims=True) if self._together else costs

    def _divisors(self, copies: NDArray[np.int64]) -> NDArray[np.float64]:
        if self._policy == "even":
            return copies.astype(np.float64)
        return np.array([float(divisor(number, self._policy)) for number in copies.tolist()])


def picks_together(parts: Sequence[Joint], extra: int) -> Picks:
    """Copies of channels that all ``parts`` read, each part by the share that a copy saves of its own objective.

    Where no copy saves anything, those of the channel with the largest remaining weight.

    Args:
        extra: copies to add.
    """
    channels = len(parts[0].copies)
    weights = [1 / part.left if part.left > 0 else 0.0 for part in parts]

    def total() -> float:
        return sum(weight * part.left for weight, part in zip(weights, parts, strict=True))

    order: list[int] = []
    left = [total()]
    candidates, due = np.arange(channels), 0
    for number in range(extra):
        if number >= due:
            candidates, due = np.arange(channels), number + 1 + number // 2
        gains = np.sum([weight * part.gains(candidates) for weight, part in zip(weights, parts, strict=True)], axis=0)
        channel = int(gains.argmax())
        if not gains[channel] > 0:
            channel = int(np.max([part.shares for part in parts], axis=0).argmax())
        candidates = np.argsort(-gains, kind="stable")[:CANDIDATES]
        for part in parts:
            part.split(channel)
        order.append(channel)
        left.append(total())
    return Picks(channels, np.array(order, np.int64), np.array(left))


def noise_to_signal(rows: NDArray[np.floating], square: NDArray[np.float64], levels: int, together: bool) -> float:
    """What rounding adds to the squared outputs without any copy, relative to them; inputs count as uncorrelated.

    Args:
        rows: (groups, O, I, K).
        square: (groups, I * K), E x^2 of the inputs.
        levels: Q.
        together: all outputs have one threshold.
    """
    weights = rows.reshape(*rows.shape[:2], -1).astype(np.float64)
    thresholds = np.abs(weights).max(axis=2, initial=0.0)
    thresholds = np.full_like(thresholds, thresholds.max(initial=0.0)) if together else thresholds
    signal = float(np.einsum("goi,goi,gi->", weights, weights, square))
    noise = float((np.square(thresholds).sum(axis=1) * square.sum(axis=1)).sum()) / (12 * levels**2)
    return noise / signal if signal > 0 else 0.0


def allocated(left: Sequence[NDArray[np.float64]], costs: Sequence[float], budget: float) -> list[int]:
    """How many copies each layer gets so that the sum of what is left is least within a budget: a knapsack.

    Greedy by what a cost saves: each time the layer whose next copies, as many as save most for what they cost, save
    most. This is exact for the convex hulls of ``left``, except for the last copies, which must fit (Zhao et al.,
    Section 3.4, propose a knapsack with the reduction of the range as its reward, and memory as its cost).

    Args:
        left: for each layer what is left with 0, 1, 2, ... copies.
        costs: of each copy.
        budget: of all copies together.
    """
    chosen = [0] * len(left)

    def best(layer: int) -> tuple[float, int]:
        """The most that a cost saves from here on, and by how many copies."""
        here, most = left[layer][chosen[layer] :], int((budget + 1e-9) // costs[layer])
        ahead = here[1 : most + 1]
        if not len(ahead):
            return 0.0, 0
        rates = (here[0] - ahead) / (np.arange(1, len(ahead) + 1) * costs[layer])
        at = int(rates.argmax())
        return float(rates[at]), at + 1

    while True:
        found = [best(layer) for layer in range(len(left))]
        layer = max(range(len(left)), key=lambda at: found[at][0], default=-1)
        if layer < 0 or found[layer][0] <= 0:
            return chosen
        chosen[layer] += found[layer][1]
        budget -= found[layer][1] * costs[layer]
