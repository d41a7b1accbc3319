"""Clip methods: where a row of values is cut off before it is spread over the grid.

Each method is one registered function from the histograms of some rows to a threshold for each. Zhao et al. (ICML
2019, arXiv:1901.09504, Sections 4.1 to 4.3) compare ``mse``, ``aciq`` and ``kl`` with splitting.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.grid import Grid
from onnx_ocs.numerics.histogram import Histogram

Thresholds = NDArray[np.float64]  # (rows,)
Method = Callable[[Histogram, int, float], Thresholds]  # histograms, bits, parameter

CANDIDATES = 100
"""``mse`` and ``kl`` try this many even parts of the peak."""

ROWS = 16
"""Rows that ``kl`` works on at a time, so that its temporaries stay in the cache."""

PART = 1e-4
"""Of a count, that ``kl`` moves into each empty bin."""


@dataclass(frozen=True)
class ClipMethod:
    """A method, and the parameter it takes behind a colon."""

    choose: Method
    parameter: str = ""  # the letter it has in the help; empty where there is none
    highest: float = math.inf  # of the parameter, which is above 0
    skips_zeros: bool = False  # values that are exactly zero, which every grid holds, are no part of its density


CLIP_METHODS: dict[str, ClipMethod] = {}


def clip_method(
    name: str, parameter: str = "", highest: float = math.inf, skips_zeros: bool = False
) -> Callable[[Method], Method]:
    """Register a method under the name that users choose."""

    def register(function: Method) -> Method:
        CLIP_METHODS[name] = ClipMethod(function, parameter, highest, skips_zeros)
        return function

    return register


def clip_names() -> list[str]:
    """The forms that :func:`parse_clip` takes."""
    return [f"{name}:{method.parameter}" if method.parameter else name for name, method in CLIP_METHODS.items()] + [
        "a fraction in (0, 1]"
    ]


def parse_clip(text: str) -> tuple[ClipMethod, float]:
    """The method that ``text`` names, and its parameter (0 where it takes none).

    Raises:
        ValueError: there is no such method, or its parameter is out of range; the message names the valid choices.
    """
    name, colon, value = text.partition(":")
    if not colon and re.match(r"[-+.\d]", text):
        return ClipMethod(_fraction), _number(text, text, 1.0)
    if name not in CLIP_METHODS or bool(colon) != bool(CLIP_METHODS[name].parameter):
        raise ValueError(f"clip must be one of {', '.join(clip_names())}, not {text!r}")
    method = CLIP_METHODS[name]
    return method, _number(text, value, method.highest) if colon else 0.0


def _number(text: str, value: str, highest: float) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"clip {text!r}: {value!r} is not a number; choose {', '.join(clip_names())}") from None
    if not (0 < number <= highest and math.isfinite(number)):
        most = f" and at most {highest:g}" if math.isfinite(highest) else ""
        raise ValueError(f"clip {text!r}: the number must be above 0{most}")
    return number


def thresholds(seen: Histogram, clip: str, bits: int) -> Thresholds:
    """(rows,), the threshold of each row by the method ``clip``: in (0, peak], and 0 for a row of zeros.

    Raises:
        ValueError: ``clip`` is no method.
    """
    method, parameter = parse_clip(clip)
    counted = seen.without_zeros() if method.skips_zeros else seen
    with np.errstate(over="ignore", under="ignore"):  # what lies beyond float64 is beyond the bounds as well
        chosen = method.choose(counted, bits, parameter)
    return np.clip(chosen, np.minimum(seen.peak, np.finfo(np.float64).smallest_subnormal), seen.peak)


@clip_method("none")
def largest(seen: Histogram, bits: int, parameter: float) -> Thresholds:
    """The largest magnitude: nothing is clipped."""
    return seen.peak


@clip_method("mse")
def least_squares(seen: Histogram, bits: int, parameter: float) -> Thresholds:
    """The threshold with the least mean squared error (Sung et al., arXiv:1511.06488; Shin et al., 2016).

    Candidates are the hundredths of the peak. Relative to the peak the error of a value depends on its bin alone, so
    the errors of all rows are one product of the counts with a table. A value stands for the middle of its bin, whose
    width is a sixteenth of the step of 8 bits.
    """
    parts = np.arange(1, CANDIDATES + 1) / CANDIDATES
    errors = seen.counts @ _squared_errors(parts, seen.centers, Grid(bits).levels).T
    return seen.peak * parts[errors.argmin(axis=1)]


def _squared_errors(parts: NDArray[np.float64], values: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    """(candidates, values): the squared error of each value under each threshold."""
    step = (parts / levels)[:, None]
    rounded = np.minimum(np.floor(values / step + 0.5), levels) * step
    return np.square(values - rounded)


@clip_method("aciq", skips_zeros=True)
def analytic(seen: Histogram, bits: int, parameter: float) -> Thresholds:
    """The least expected error under the nearer of two densities (Banner et al., arXiv:1810.05723), for 2^b - 1 points.

    With the step ``T / Q`` the error is the tail beyond T and ``T² / (12 Q²)`` of rounding. Laplace with the scale
    ``b = E|x|``: ``2 b² exp(-T/b) + T² / (12 Q²)``, least at ``T = b W(12 Q²)``. Gauss with ``s² = E x²``:
    ``(s² + T²) erfc(T / (s √2)) - √(2/π) T s exp(-T² / 2 s²) + T² / (12 Q²)``. The nearer density is the one with the
    larger likelihood.
    """
    levels = Grid(bits).levels
    deviation = seen.deviation
    with np.errstate(divide="ignore"):
        is_laplace = np.log(2 * seen.mean) + 1 < np.log(deviation) + (math.log(2 * math.pi) + 1) / 2
    return np.where(is_laplace, seen.mean * laplace_factor(levels), deviation * gauss_factor(levels))


@functools.cache
def laplace_factor(levels: int) -> float:
    """``W(12 Q²)`` with Lambert's W, by Newton's method."""
    goal = 12.0 * levels**2
    root = math.log(goal)
    for _ in range(50):
        root -= (root * math.exp(root) - goal) / ((root + 1) * math.exp(root))
    return root


@functools.cache
def gauss_factor(levels: int) -> float:
    """The best T / s: where ``4 (φ(k) - k Φ(-k)) = k / (6 Q²)``, the derivative of the error, by bisection."""
    low, high = 0.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        tail = math.exp(-(middle**2) / 2) / math.sqrt(2 * math.pi) - middle * math.erfc(middle / math.sqrt(2)) / 2
        low, high = (middle, high) if 4 * tail > middle / (6 * levels**2) else (low, middle)
    return low


@clip_method("kl", skips_zeros=True)
def least_divergence(seen: Histogram, bits: int, parameter: float) -> Thresholds:
    """The least divergence of the clipped histogram from its merged one (Migacz, GTC 2017).

    For each candidate the counts beyond it fall into its last bin; the distribution is compared with its own counts
    merged into ``Q + 1`` even parts and spread again over the bins that are not empty. Empty bins get a ten-thousandth
    of a count from the others, as MXNet does, so that the divergence is finite. Candidates are even parts of the peak
    with at least ``Q + 1`` bins.
    """
    parts = Grid(bits).levels + 1
    lengths = np.unique(seen.bins * np.arange(1, CANDIDATES + 1) // CANDIDATES)
    lengths = lengths[lengths >= parts]
    best = np.empty(len(seen.peak), np.int64)
    for start in range(0, len(best), ROWS):
        counts = seen.counts[start : start + ROWS]
        below, filled = _running(counts), _running(counts > 0)
        divergences = np.stack([_divergence(counts, below, filled, int(length), parts) for length in lengths])
        best[start : start + ROWS] = lengths[divergences.argmin(axis=0)]
    return seen.peak * (best / seen.bins)


def _running(values: NDArray[Any]) -> NDArray[np.float64]:
    """(rows, bins + 1), the sums of the bins below each edge."""
    sums = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums


def _divergence(
    counts: NDArray[np.float64], below: NDArray[np.float64], filled: NDArray[np.float64], length: int, parts: int
) -> NDArray[np.float64]:
    """(rows,), KL of the first ``length`` bins, with the rest in the last of them, from their merger into ``parts``.

    The merger is the same in all filled bins of a part, so that only ``p log p`` is summed bin by bin; the sums over
    parts are differences of the running sums ``below``, of the counts, and ``filled``, of the bins with counts.
    """
    edges = np.arange(parts + 1) * length // parts
    rest = below[:, -1] - below[:, length]
    merged, members = np.diff(below[:, edges]), np.diff(filled[:, edges])
    members[:, -1] += (counts[:, length - 1] == 0) & (rest > 0)

    number = np.maximum(members.sum(axis=1), 1)
    taken = PART * (length - number) / number
    p = counts[:, :length] - taken[:, None]
    p[:, -1] += rest
    np.maximum(p, PART, out=p)

    spread = np.where(merged > 0, members, 0)
    reached = spread.sum(axis=1)
    moved = PART * (length - reached) / np.maximum(reached, 1)
    q = np.where(merged > 0, np.maximum(merged / np.maximum(members, 1) - moved[:, None], PART), PART)

    mass = merged - members * taken[:, None]
    mass[:, -1] += rest
    cross = np.einsum("ij,ij->i", mass, np.log(q)) + (length - number) * PART * math.log(PART)
    p_sum, q_sum = p.sum(axis=1), np.einsum("ij,ij->i", spread, q) + (length - reached) * PART
    return (np.einsum("ij,ij->i", p, np.log(p)) - cross) / p_sum + np.log(q_sum / p_sum)


SAWB = {
    2: (2.531, 1.610),
    3: (6.947, 6.310),
    4: (11.817, 11.852),
    5: (16.934, 17.818),
    6: (22.197, 24.023),
    7: (27.573, 30.398),
    8: (33.014, 36.869),
    9: (38.511, 43.419),
}
"""c1 and c2 of each number of bits, for a symmetric grid of 2^b - 1 points that rounds to nearest (see ``sawb``).

An unsigned grid of b bits is one half of the symmetric one of b + 1, hence 9.
"""


@clip_method("sawb", skips_zeros=True)
def statistics_aware(seen: Histogram, bits: int, parameter: float) -> Thresholds:
    """``c1 sqrt(E x²) - c2 E|x|`` (statistics-aware weight binning; Choi et al., arXiv:1807.06964).

    As there, the coefficients are a linear fit through the best thresholds of six densities (Gauss, uniform, Laplace,
    logistic, triangle, von Mises), here for this grid; a test derives them again. Rows of few values may be flatter
    than the uniform or more peaked than the Laplace density; the fit is not followed beyond these two. Nor is it below
    the best threshold of the uniform density, ``2 Q / (Q + 1/2)`` times ``E|x|``, where the line from 4 bits on is too
    low.
    """
    first, second = SAWB[bits]
    levels = Grid(bits).levels
    shape = seen.deviation / np.where(seen.mean > 0, seen.mean, 1)
    fitted = first * np.clip(shape, math.sqrt(4 / 3), math.sqrt(2)) - second
    return seen.mean * np.maximum(fitted, 2 * levels / (levels + 0.5))


@clip_method("percentile", "P", 100)
def percentile(seen: Histogram, bits: int, parameter: float) -> Thresholds:
    """P percent of the magnitudes are at or below it (McKinstry et al., arXiv:1809.04191), to within a bin."""
    reached = np.cumsum(seen.counts, axis=1)
    wanted = seen.number * (parameter / 100)
    bins = (reached < wanted[:, None] * (1 - 1e-12)).sum(axis=1) + 1
    return seen.peak * (np.minimum(bins, seen.bins) / seen.bins)


@clip_method("sigma", "K")
def deviations(seen: Histogram, bits: int, parameter: float) -> Thresholds:
    """K standard deviations about zero."""
    return parameter * seen.deviation


def _fraction(seen: Histogram, bits: int, parameter: float) -> Thresholds:
    """A fixed share of the peak."""
    return parameter * seen.peak
