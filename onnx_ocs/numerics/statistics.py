"""What is kept of a tensor while samples pass: sums, extremes and counts, never the values.

Histograms grow with the values: their parts divide ``[0, reach)``, where ``reach`` is a power of two, and when a larger
magnitude comes, neighbouring parts are joined until it fits. So the counts do not depend on the order of the batches.
"""

import math
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
        Where it lay is known to within a part of its own histogram. The peak of the row is that of the last part that
        holds a value; the exact one is :meth:`peak`.
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
            np.array([number * width]),
            np.array([counts @ centers / total]),
            np.array([counts @ np.square(centers) / total]),
        )

    def peak(self, plan: SplitPlan | None = None) -> float:
        """The largest magnitude, after splitting by ``plan``."""
        if plan is None:
            return float(self.peaks.max())
        return float((self.peaks[plan.source] * plan.gain).max())

    def _split_counts(self, counts: NDArray[np.float64], plan: SplitPlan) -> NDArray[np.float64]:
        """The counts of the tensor with those of its split channels moved to where their copies lie."""
        scale = counts.sum() / max(1, self.channel_counts.sum(dtype=np.int64))
        copies = np.bincount(plan.source, minlength=self.channels)
        wide = PARTS // self.channel_counts.shape[1]
        fine = {c: np.repeat(self.channel_counts[c] * (scale / wide), wide) for c in np.flatnonzero(copies > 1)}
        for row in fine.values():
            counts -= row
        np.maximum(counts, 0, out=counts)
        for channel, gain in zip(plan.source, plan.gain, strict=True):
            if channel in fine:
                places = ((np.arange(PARTS) + 0.5) * gain).astype(np.int64)
                counts += np.bincount(places, fine[channel], PARTS)
        return counts

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As arrays, to be stored."""
        return {item.name: np.asarray(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def of(cls, arrays: dict[str, NDArray[Any]]) -> "Statistics":
        """From :meth:`arrays`.

        Raises:
            KeyError: one is missing.
        """
        plain: dict[str, Any] = {name: arrays[name].item() for name in ("reach", "values", "samples")}
        return cls(**{item.name: plain.get(item.name, arrays[item.name]) for item in fields(cls)})


class Recorder:
    """Statistics of one tensor under way."""

    def __init__(self, channels: int) -> None:
        self._low, self._high = np.full(channels, np.inf), np.full(channels, -np.inf)
        self._sum, self._square = np.zeros(channels), np.zeros(channels)
        self._outliers = np.zeros(channels, np.int64)
        self._counts = np.zeros(PARTS, np.int64)
        self._parts = channel_parts(channels)
        self._channel_counts = np.zeros(channels * self._parts, np.uint32)
        self._starts = (np.arange(channels) * self._parts).astype(np.int64)
        self._reach = 0.0
        self._values = self._counted = self._samples = 0

    def add(
        self,
        low: NDArray[np.floating],
        high: NDArray[np.floating],
        mean: NDArray[np.floating],
        values: int,
        taken: NDArray[np.float32],
        thin: int = 1,
        samples: int = 1,
    ) -> None:
        """Fold in one batch.

        Args:
            low, high, mean: (C,), of all values of each channel; finite.
            values: how many there are in the whole tensor.
            taken: (outer, C, inner), the values that go into the histograms.
            thin: of those, every ``thin``-th along the inner axis goes into the histograms of the channels.
        """
        np.minimum(self._low, low, out=self._low)
        np.maximum(self._high, high, out=self._high)
        self._sum += mean.astype(np.float64) * (values / len(self._sum))
        self._values += values
        self._samples += samples
        self._reach_to(float(max(high.max(), -low.min())))
        outer, _, inner = taken.shape
        self._counted += outer * inner
        self._square += np.einsum("ijk,ijk->j", taken, taken, dtype=np.float64)
        if not self._reach:
            self._counts[0] += taken.size
            return
        magnitudes = np.abs(taken)
        places = (magnitudes * np.float32(PARTS / self._reach)).astype(np.int32)
        np.minimum(places, PARTS - 1, out=places)
        self._counts += np.bincount(places.reshape(-1), minlength=PARTS)
        below = np.cumsum(self._counts)
        edge = int(np.searchsorted(below, OUTLIERS * below[-1])) + 1
        self._outliers += np.count_nonzero(places >= edge, axis=(0, 2))
        some = places[:, :, ::thin] // (PARTS // self._parts) + self._starts[:, None]
        np.add.at(self._channel_counts, some.reshape(-1), np.uint32(1))

    def _reach_to(self, peak: float) -> None:
        """Join parts until the histograms reach beyond ``peak``."""
        if peak == 0 or peak < self._reach:
            return
        reach = math.ldexp(1.0, math.frexp(peak)[1])  # the next power of two above
        if self._reach:
            factor = int(min(reach / self._reach, PARTS))
            self._counts = _joined(self._counts[None], factor)[0]
            self._channel_counts = _joined(self._channel_counts.reshape(-1, self._parts), factor).reshape(-1)
        else:  # zeros only so far; they lie in the first part of each channel
            self._channel_counts[:: self._parts] += np.uint32(self._counts[0] // len(self._sum))
        self._reach = reach

    def finish(self) -> Statistics:
        """What was seen.

        Raises:
            ValueError: nothing was added.
        """
        if not self._counted:
            raise ValueError("no values were seen")
        return Statistics(
            self._low,
            self._high,
            self._sum * (len(self._sum) / self._values),
            self._square / self._counted,
            self._outliers,
            self._reach,
            self._counts,
            self._channel_counts.reshape(-1, self._parts),
            self._values,
            self._samples,
        )


def _joined(counts: NDArray[Any], factor: int) -> NDArray[Any]:
    """(rows, parts) with each ``factor`` neighbours joined into one, and empty parts behind them."""
    rows, parts = counts.shape
    factor = min(factor, parts)
    joined = counts.reshape(rows, parts // factor, factor).sum(axis=2, dtype=counts.dtype)
    return np.concatenate([joined, np.zeros((rows, parts - parts // factor), counts.dtype)], axis=1)
