"""Histograms of the magnitudes in each row of an array: all that the clip methods look at."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 2048
"""As in Migacz's entropy calibration: 16 to a step of the 8-bit grid that reaches to the peak. Few values are no reason
for fewer: how well a step is resolved does not depend on how many values lie around it."""

CHUNK = 2**18
"""Values worked on at a time, so that temporaries (8 MB at most) stay near the cache."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Magnitudes of each row, counted on an even partition of [0, the row's peak].

    Bin ``j`` holds the magnitudes in ``[j, j + 1) * peak / bins``, the last one the peak as well. The moments are those
    of the values themselves. A row of zeros has peak 0 and all its values in bin 0.
    """

    counts: NDArray[np.float64]  # (rows, bins)
    peak: NDArray[np.float64]  # (rows,), the largest magnitude
    mean: NDArray[np.float64]  # (rows,), E|x|
    square: NDArray[np.float64]  # (rows,), E x²; 0 or infinite where float64 cannot hold it

    @property
    def bins(self) -> int:
        """Bins of each row."""
        return int(self.counts.shape[1])

    @property
    def number(self) -> NDArray[np.float64]:
        """(rows,), values counted."""
        return self.counts.sum(axis=1)

    @property
    def centers(self) -> NDArray[np.float64]:
        """(bins,), the middle of each bin as a fraction of the peak."""
        return (np.arange(self.bins) + 0.5) / self.bins

    @property
    def deviation(self) -> NDArray[np.float64]:
        """(rows,), the standard deviation about zero, sqrt(E x²); from the bins where E x² is beyond float64."""
        held = (self.square > np.finfo(np.float64).tiny) & (self.square < np.inf)
        binned = self.peak * np.sqrt(self.counts @ np.square(self.centers) / np.maximum(self.number, 1))
        return np.where(held, np.sqrt(np.where(held, self.square, 1)), binned)

    def select(self, rows: NDArray[Any]) -> "Histogram":
        """The histograms of some rows, by their indices or a mask."""
        return Histogram(self.counts[rows], self.peak[rows], self.mean[rows], self.square[rows])


def histogram(values: NDArray[Any], bins: int = BINS) -> Histogram:
    """Count the magnitudes of each row.

    Args:
        values: (rows, n), finite; any float type.
        bins: parts of [0, peak].

    Raises:
        ValueError: a value is infinite or not a number.
    """
    rows, length = values.shape
    out = Histogram(np.zeros((rows, bins)), np.zeros(rows), np.zeros(rows), np.zeros(rows))
    if length == 0:
        return out
    height = max(1, CHUNK // max(length, bins))
    for start in range(0, rows, height):
        _count(values[start : start + height], out.select(slice(start, start + height)))
    return out


def _count(values: NDArray[Any], out: Histogram) -> None:
    """Fill in ``out``, the views of some rows."""
    rows, length = values.shape
    bins = out.bins
    magnitude = np.abs(values.astype(np.float64))
    out.peak[:] = magnitude.max(axis=1)
    if not np.isfinite(out.peak).all():
        raise ValueError("values must be finite to be counted")
    out.mean[:] = magnitude.sum(axis=1) / length
    with np.errstate(over="ignore", under="ignore"):
        out.square[:] = np.vecdot(magnitude, magnitude) / length
    magnitude /= np.where(out.peak > 0, out.peak, 1)[:, None]
    magnitude *= bins
    index = magnitude.astype(np.intp)
    index += (np.arange(rows) * (bins + 1))[:, None]
    counts = np.bincount(index.reshape(-1), minlength=rows * (bins + 1)).reshape(rows, bins + 1)
    out.counts[:] = counts[:, :bins]
    out.counts[:, -1] += counts[:, bins]  # the peak itself
