"""What is kept of a tensor while samples pass: sums, extremes and counts, never the values.

Histograms grow with the values: their parts divide ``[0, reach)``, where ``reach`` is a power of two, and when a larger
magnitude comes, neighbouring parts are joined until it fits. So histograms do not depend on the order of the batches.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.histogram import Histogram
from onnx_ocs.numerics.split import SplitPlan

PARTS = 4096
"""Of the histogram of a whole tensor; at least half of them lie below the largest magnitude, 16 to a step of 8 bits."""

ROOM = 2**18
"""Counts at most in the histograms of all channels of one tensor (1 MB)."""

OUTLIERS = 0.99
"""Values beyond this quantile of a tensor's magnitudes count as outliers (Zhao et al., Section 5.3)."""


GROWN = 1.05
"""The 99th percentile is looked up again when so many times the values have been seen."""

ENOUGH = 2**21
"""Values of all tensors that wait at most (8 MB, or one batch) before they are folded in."""

TOGETHER = 2**17
"""Values of one tensor that are counted at a time, so that they stay in the cache, or those of one batch."""

SMALLEST = 2.0**-100
"""The least reach, so that the scale of the parts is a float32 as well."""


def channel_parts(channels: int) -> int:
    """Parts of the histogram of each channel: a power of two, fewer where there are many channels."""
    return int(min(PARTS // 2, max(16, 2 ** int(math.log2(ROOM / max(1, channels))))))


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was seen of one tensor with C channels.

    ``low``, ``high`` and ``mean`` are of all values, the others of the values that were taken into the histograms.
    """

    low: NDArray[np.float64]  # (C,)
    high: NDArray[np.float64]  # (C,)
    mean: NDArray[np.float64]  # (C,)
    square: NDArray[np.float64]  # (C,), E x²
    outliers: NDArray[np.int64]  # (C,), values beyond the tensor's 99th percentile
    reach: float  # the histograms cover the magnitudes in [0, reach)
    counts: NDArray[np.int64]  # (PARTS,), of the whole tensor
    channel_counts: NDArray[np.uint32]  # (C, parts), of a sample of each channel
    zeros: int  # of those counted in ``counts``, how many are exactly zero
    values: int  # in the whole tensor, over all samples
    samples: int

    @property
    def channels(self) -> int:
        """C."""
        return len(self.low)

    @property
    def is_nonnegative(self) -> bool:
        """Whether no value is below zero."""
        return bool(self.low.min() >= 0)

    @property
    def peaks(self) -> NDArray[np.float64]:
        """(C,), the largest magnitude of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def histogram(self, plan: SplitPlan | None = None) -> Histogram:
        """One row: the magnitudes of the tensor, after splitting its channels by ``plan`` if there is one.

        A split channel leaves the counts of the tensor, and each of its copies enters with its values times its gain.
        Where it lay is known to within a part of its own histogram. The parts are taken to end at the exact peak, which
        moves them by less than one in two thousand.
        """
        counts = self.counts.astype(np.float64)
        if plan is not None and plan.extra:
            counts = self._split_counts(counts, plan)
        width = self.reach / PARTS
        number = max(1, math.ceil(self.peak(plan) / width)) if width else 1
        counts = np.append(counts[: number - 1], counts[number - 1 :].sum())
        centers, total = (np.arange(number) + 0.5) * width, max(counts.sum(), 1)
        return Histogram(
            counts[None],
            np.array([self.peak(plan)]),
            np.array([counts @ centers / total]),
            np.array([counts @ np.square(centers) / total]),
            np.array([min(float(self.zeros), counts[0])]),
        )

    def lowest(self, plan: SplitPlan | None = None) -> float:
        """The least value, after splitting by ``plan``."""
        return float(self.low.min() if plan is None else (self.low[plan.source] * plan.gain).min())

    def highest(self, plan: SplitPlan | None = None) -> float:
        """The largest value, after splitting by ``plan``."""
        return float(self.high.max() if plan is None else (self.high[plan.source] * plan.gain).max())

    def peak(self, plan: SplitPlan | None = None) -> float:
        """The largest magnitude, after splitting by ``plan``."""
        if plan is None:
            return float(self.peaks.max())
        return float((self.peaks[plan.source] * plan.gain).max())

    def _split_counts(self, counts: NDArray[np.float64], plan: SplitPlan) -> NDArray[np.float64]:
        """The counts of the tensor with those of its split channels moved to where their copies lie.

        In each part of the channels' histograms a channel has the share of the tensor's counts that it has of the
        sampled ones; where none was sampled that of the nearest parts.
        """
        parts = self.channel_counts.shape[1]
        total = self.channel_counts.sum(axis=0, dtype=np.float64)
        known = np.flatnonzero(total)
        if not len(known):  # zeros only
            return counts
        copies = np.bincount(plan.source, minlength=self.channels)
        moved = {}
        for channel in np.flatnonzero(copies > 1).tolist():
            share = np.interp(np.arange(parts), known, self.channel_counts[channel, known] / total[known])
            moved[channel] = counts * np.repeat(share, PARTS // parts)
        made = counts - sum(moved.values())
        for channel, gain in zip(plan.source.tolist(), plan.gain, strict=True):
            if channel in moved:
                places = ((np.arange(PARTS) + 0.5) * gain).astype(np.int64)
                made += np.bincount(places, moved[channel], PARTS)
        return np.maximum(made, 0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As arrays, to be stored."""
        return {item.name: np.asarray(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def of(cls, arrays: dict[str, NDArray[Any]]) -> "Statistics":
        """From :meth:`arrays`.

        Raises:
            KeyError: one is missing.
            ValueError: they do not fit together.
        """
        if len({len(arrays[name]) for name in ("low", "high", "mean", "square", "channel_counts")}) > 1:
            raise ValueError("arrays of different lengths")
        plain: dict[str, Any] = {name: arrays[name].item() for name in ("reach", "zeros", "values", "samples")}
        return cls(**{item.name: plain.get(item.name, arrays[item.name]) for item in fields(cls)})


class Recorder:
    """Statistics of some tensors under way; what is the same for all of them is done for all of them at once."""

    def __init__(self, channels: Sequence[int]) -> None:
        ends = np.cumsum([0, *channels])
        self._slices = [slice(start, stop) for start, stop in itertools.pairwise(ends.tolist())]
        self._channels = np.array(channels)
        self._low, self._high = np.full(ends[-1], np.inf), np.full(ends[-1], -np.inf)
        self._sum = np.zeros(ends[-1])
        self._last: tuple[int, ...] = ()  # values of each tensor in the last batch
        self._weights = np.empty(0)  # of each of their channels
        self._tallies = [_Tally(number) for number in channels]
        self._values = np.zeros(len(channels), np.int64)
        self._samples = 0
        self._waiting = 0  # values that are not folded in yet

    def add(
        self,
        low: NDArray[np.float32],
        high: NDArray[np.float32],
        mean: NDArray[np.float32],
        values: Sequence[int],
        taken: Sequence[NDArray[np.float32]],
        thin: int = 1,
        samples: int = 1,
    ) -> None:
        """Fold in one batch.

        Args:
            low, high, mean: the channels of all tensors behind each other, of all their values; finite.
            values: how many there are in each whole tensor.
            taken: (outer, C, inner) of each tensor, the values that go into the histograms.
            thin: of those, every ``thin``-th along the inner axis goes into the histograms of the channels.
        """
        np.minimum(self._low, low, out=self._low)
        np.maximum(self._high, high, out=self._high)
        if tuple(values) != self._last:
            self._last = tuple(values)
            self._weights = np.repeat(np.divide(values, self._channels), self._channels)
        self._sum += mean * self._weights
        self._values += values
        self._samples += samples
        for tally, some in zip(self._tallies, taken, strict=True):
            tally.add(some, thin)
            self._waiting += some.size
        if self._waiting >= ENOUGH:
            self._fold()

    def _fold(self) -> None:
        for tally, here in zip(self._tallies, self._slices, strict=True):
            tally.fold(self._low[here], self._high[here])
        self._waiting = 0

    def finish(self) -> list[Statistics]:
        """What was seen of each tensor.

        Raises:
            ValueError: nothing was added of one of them.
        """
        self._fold()
        made = []
        for tally, here, values in zip(self._tallies, self._slices, self._values.tolist(), strict=True):
            if not values:
                raise ValueError("no values were seen")
            low, high = self._low[here], self._high[here]
            mean = self._sum[here] * (tally.channels / values)
            made.append(tally.statistics(low, high, mean, values, self._samples))
        return made


class _Tally:
    """The histograms of one tensor. Values wait until there are enough of them to be worth the calls."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._square = np.zeros(channels)
        self._outliers = np.zeros(channels, np.int64)
        self._counts = np.zeros(PARTS, np.int64)
        self._parts = channel_parts(channels)
        self._channel_counts = np.zeros(channels * self._parts, np.uint32)
        self._shift = (PARTS // self._parts).bit_length() - 1
        self._starts = (np.arange(channels, dtype=np.int32) * np.int32(self._parts)).reshape(-1, 1)
        self._reach = self._edge_reach = 0.0
        self._edge = self._edge_counted = 0
        self._zeros = 0
        self._counted = 0  # values of each channel in the histogram of the tensor
        self._waiting: list[NDArray[np.float32]] = []
        self._thin = 1

    def add(self, taken: NDArray[np.float32], thin: int) -> None:
        """Let values wait until :meth:`fold`."""
        self._waiting.append(taken)
        self._thin = thin

    def fold(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        """Count what waits; ``low`` and ``high`` are those of all values so far."""
        self._reach_to(max(float(high.max()), -float(low.min())))
        self._waiting.sort(key=_inner)
        for _, group in itertools.groupby(self._waiting, _inner):
            for some in _portions(group):
                self._count(some)
        self._waiting.clear()

    def _count(self, taken: NDArray[np.float32]) -> None:
        outer, channels, inner = taken.shape
        self._counted += outer * inner
        self._square += np.einsum("ijk,ijk->j", taken, taken)
        self._zeros += int(np.count_nonzero(taken == 0))
        if not self._reach:
            self._counts[0] += taken.size
            return
        magnitudes = np.abs(taken)
        magnitudes *= np.float32(PARTS / self._reach)  # a power of two, so that nothing is rounded
        places = magnitudes.astype(np.int32)
        flat = places.reshape(-1)
        self._counts += np.bincount(flat, minlength=PARTS)
        beyond = np.flatnonzero(flat >= self._quantile())
        self._outliers += np.bincount(beyond // inner % channels, minlength=channels)
        some = places[:, :, :: self._thin] >> self._shift
        some += self._starts
        np.add.at(self._channel_counts, some.reshape(-1), np.uint32(1))

    def _quantile(self) -> int:
        """The first part beyond the 99th percentile of what was seen, which moves little once much was seen."""
        if self._reach != self._edge_reach or self._counted > GROWN * self._edge_counted:
            below = np.cumsum(self._counts)
            self._edge = int(np.searchsorted(below, OUTLIERS * below[-1])) + 1
            self._edge_reach, self._edge_counted = self._reach, self._counted
        return self._edge

    def _reach_to(self, peak: float) -> None:
        """Join parts until the histograms reach beyond ``peak``."""
        if peak == 0 or peak < self._reach:
            return
        reach = max(SMALLEST, math.ldexp(1.0, math.frexp(peak)[1]))  # the next power of two above
        if self._reach:
            factor = int(min(reach / self._reach, PARTS))
            self._counts = _joined(self._counts[None], factor)[0]
            self._channel_counts = _joined(self._channel_counts.reshape(-1, self._parts), factor).reshape(-1)
        else:  # zeros only so far; they lie in the first part of each channel
            self._channel_counts[:: self._parts] += np.uint32(self._counts[0] // (self.channels * self._thin))
        self._reach = reach

    def statistics(
        self, low: NDArray[np.float64], high: NDArray[np.float64], mean: NDArray[np.float64], values: int, samples: int
    ) -> Statistics:
        return Statistics(
            low,
            high,
            mean,
            self._square / max(1, self._counted),
            self._outliers,
            self._reach,
            self._counts,
            self._channel_counts.reshape(-1, self._parts),
            self._zeros,
            values,
            samples,
        )


def _inner(taken: NDArray[np.float32]) -> int:
    return int(taken.shape[2])


def _portions(group: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Arrays joined along their first axis, as many as have :data:`TOGETHER` values, or one with more."""
    parts: list[NDArray[np.float32]] = []
    for taken in group:
        if parts and sum(part.size for part in parts) + taken.size > TOGETHER:
            yield np.concatenate(parts)
            parts = []
        parts.append(taken)
    yield np.concatenate(parts) if len(parts) > 1 else parts[0]


def _joined(counts: NDArray[Any], factor: int) -> NDArray[Any]:
    """(rows, parts) with each ``factor`` neighbours joined into one, and empty parts behind them."""
    rows, parts = counts.shape
    factor = min(factor, parts)
    joined = counts.reshape(rows, parts // factor, factor).sum(axis=2, dtype=counts.dtype)
    return np.concatenate([joined, np.zeros((rows, parts - parts // factor), counts.dtype)], axis=1)
