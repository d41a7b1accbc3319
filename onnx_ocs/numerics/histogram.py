"""Histograms of the magnitudes in each row of an array: all that the clip methods look at."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 2048
"""As in Migacz's entropy calibration: 16 to a step of the 8-bit grid that reaches to the peak. Few values are no reason
for fewer: how well a step is resolved does not depend on how many values lie around it."""

CHUNK = 2**15
"""Values worked on at a time, so that temporaries (256 KB each) stay in the cache."""


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
    zeros: NDArray[np.float64] | None = None  # (rows,), how many values in bin 0 are exactly zero, if it was counted

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
        """(rows,), the standard deviation about zero, sqrt(E x²); from the bins where float64 cannot hold E x²."""
        held = (self.square >= np.finfo(np.float64).tiny) & (self.square < np.inf)
        found = np.sqrt(np.where(held, self.square, 0))
        rest = self.select(~held)
        found[~held] = rest.peak * np.sqrt(rest.counts @ np.square(rest.centers) / np.maximum(rest.number, 1))
        return found

    def without_zeros(self) -> "Histogram":
        """The values that are not zero: what a density may be fitted to where a Relu has put many values on zero."""
        if self.zeros is None or not self.zeros.any():
            return self
        counts = self.counts.copy()
        counts[:, 0] -= self.zeros
        left = self.number / np.maximum(counts.sum(axis=1), 1)
        return Histogram(counts, self.peak, self.mean * left, self.square * left)

    def select(self, rows: NDArray[np.bool]) -> "Histogram":
        """The histograms of the rows where the mask ``rows`` is set."""
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
    found = Histogram(np.zeros((rows, bins)), np.zeros(rows), np.zeros(rows), np.zeros(rows))
    if length == 0:
        return found
    height = max(1, CHUNK // max(length, bins))
    for start in range(0, rows, height):
        here = slice(start, start + height)
        block = values[here]
        peak = np.maximum(block.max(axis=1).astype(np.float64), -block.min(axis=1).astype(np.float64))
        if not np.isfinite(peak).all():
            raise ValueError(f"values must be finite; rows {start} to {start + len(block) - 1} hold one that is not")
        found.peak[here] = peak
        for first in range(0, length, CHUNK):
            magnitude = np.abs(block[:, first : first + CHUNK].astype(np.float64))
            # Divided before they are summed, so that no sum overflows; einsum and not BLAS, whose threads cost more
            # than so short a product.
            found.mean[here] += (magnitude / length).sum(axis=1)
            with np.errstate(over="ignore", under="ignore"):
                found.square[here] += np.einsum("ij,ij->i", magnitude, magnitude) / length
            found.counts[here] += _count(magnitude / np.where(peak > 0, peak, 1)[:, None], bins)
    return found


def _count(fractions: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """(rows, bins): how many of each row's ``fractions`` in [0, 1] fall into each bin."""
    rows = len(fractions)
    places = (fractions * bins).astype(np.int64)
    places += (np.arange(rows) * (bins + 1))[:, None]
    counts = np.bincount(places.reshape(-1), minlength=rows * (bins + 1)).reshape(rows, bins + 1)
    counts[:, -2] += counts[:, -1]  # the peak itself
    return counts[:, :-1]
