"""The evenly spaced, symmetric grid that a signed integer type offers (Zhao et al., arXiv:1901.09504, Section 3.3)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 2**18
"""Values worked on at a time, so that temporaries stay in the cache."""

ROUNDED_OFF, FARTHEST = 2.0, 0.05
"""Roundings of floats that a multiple of a step has seen at most, and how many steps it is off by them at most."""


@dataclass(frozen=True)
class Grid:
    """``2^bits - 1`` points at multiples of a step, from ``-levels`` to ``levels``."""

    bits: int

    @property
    def levels(self) -> int:
        """Q, the largest integer."""
        return int(2 ** (self.bits - 1) - 1)

    def step(self, threshold: NDArray[np.floating]) -> NDArray[np.float32]:
        """Δ = T / Q in the type it is stored in; positive also where the threshold is zero.

        Args:
            threshold: (rows,), at least 0.
        """
        step = (np.asarray(threshold, np.float64) / self.levels).astype(np.float32)
        return np.where(step > 0, np.maximum(step, np.finfo(np.float32).tiny), np.float32(1))


def affine(low: float, high: float, bits: int) -> tuple[NDArray[np.float32], int]:
    """The step and the zero point of ``2^bits`` points from ``low`` to ``high`` at the most, of which one is zero.

    A value ``x`` is the integer ``round(x / step) + zero_point``, from 0 to ``2^bits - 1``.
    """
    levels = 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    step = np.float32((high - low) / levels)
    if float(step) * levels > high - low:  # a runtime drops the Clip before a grid that lies within its bounds
        step = np.nextafter(step, np.float32(0))
    if step < np.finfo(np.float32).tiny:
        return np.array(1, np.float32), 0
    return np.array(step, np.float32), int(np.clip(np.floor(-low / float(step) + 0.5), 0, levels))


def common_step(rows: NDArray[Any], least: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R,), the coarsest step that all values of a row are multiples of, to their precision; NaN where there is none.

    Of half floats it finds steps with fewer than some 60 multiples, whose precision is better than :data:`FARTHEST`.

    Args:
        rows: (R, n), of a type of floats, none of them empty.
        least: (R,), the finest step that is looked for.
    """
    rows = rows if rows.dtype.kind == "f" else rows.astype(np.float32)
    epsilon, found = float(np.finfo(rows.dtype).eps), np.full(len(rows), np.nan)
    places = rows.shape[1] - 2 ** np.arange(rows.shape[1].bit_length())
    probe = np.abs(rows)
    probe.partition(places, axis=1)
    probe = probe[:, places]
    peak = probe[:, 0].astype(np.float64)
    most = np.floor(np.divide(peak, least, out=np.zeros(len(rows)), where=least > 0) * (1 + epsilon) + epsilon)
    for times in range(1, int(most.max(initial=0)) + 1):
        step, tolerance = peak / times, min(ROUNDED_OFF * epsilon * times, FARTHEST)
        likely = _multiples(probe, np.flatnonzero(np.isnan(found) & (times <= most)), step, tolerance, 1)
        fits = _multiples(rows, likely, step, tolerance, max(1, CHUNK // max(1, len(likely))))
        found[fits] = step[fits]
    return found


def _multiples(
    rows: NDArray[Any], among: NDArray[np.int64], step: NDArray[np.float64], tolerance: float, width: int
) -> NDArray[np.int64]:
    """Which of the rows ``among`` are multiples of their step, looked at ``width`` columns at a time."""
    for start in range(0, rows.shape[1], width):
        if not len(among):
            break
        scaled = rows[among, start : start + width] / step[among, None]
        among = among[(np.abs(scaled - np.rint(scaled)) <= tolerance).all(axis=1)]
    return among


def nearest(values: NDArray[np.floating], step: NDArray[np.float32]) -> NDArray[np.float64]:
    """``floor(values / step + 1/2)``, in float64 so that the quotient is that of the stored step."""
    scaled = np.divide(values, step, dtype=np.float64)
    scaled += 0.5
    return np.floor(scaled, out=scaled)


def pieces(values: NDArray[Any], axis: int = 0) -> Iterator[tuple[slice, ...]]:
    """Slices along ``axis`` that together cover ``values``, of about :data:`CHUNK` values each."""
    length = values.shape[axis]
    rows = max(1, CHUNK * length // max(1, values.size))
    for start in range(0, length, rows):
        yield (slice(None),) * axis + (slice(start, start + rows),)
