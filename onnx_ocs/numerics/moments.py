"""First and second moments of the data that the weights of a layer are multiplied by, folded in batch by batch."""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = 2**22
"""Values of patches that are made at a time (16 MB)."""

LARGEST = 1e16
"""The magnitude up to which products in float32, and sums of them, stay finite."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Of the n inputs of each group of a layer: E x and E x x'."""

    mean: NDArray[np.float64]  # (groups, n)
    second: NDArray[np.float64] | None  # (groups, n, n)

    def taken(self, groups: NDArray[np.int64]) -> "Moments":
        """Of these groups."""
        return Moments(self.mean[groups], None if self.second is None else self.second[groups])

    def about(self, centered: bool) -> NDArray[np.float64]:
        """(groups, n, n), E x x'; ``centered``: what is left of it once the bias makes up for the mean."""
        assert self.second is not None
        return self.second - self.mean[:, :, None] * self.mean[:, None, :] if centered else self.second

    def expanded(self, source: NDArray[np.int64], gain: NDArray[np.float64], kernel: int) -> "Moments":
        """Of data whose channels are copies of those of this, times ``gain``; one group.

        Args:
            kernel: inputs of each channel, which stand together.
        """
        place = (source[:, None] * kernel + np.arange(kernel)).reshape(-1)
        share = np.repeat(gain, kernel)
        mean = self.mean[:, place] * share
        if self.second is None:
            return Moments(mean, None)
        return Moments(mean, self.second[:, place][:, :, place] * np.outer(share, share))


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its data; the fields are one for each spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]  # at the begins, then at the ends
    auto_pad: str = "NOTSET"

    def padding(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        """How many zeros stand before and behind data of these sizes."""
        rank = len(self.kernel)
        if self.auto_pad == "NOTSET":
            return list(zip(self.pads[:rank], self.pads[rank:], strict=True))
        if self.auto_pad == "VALID":
            return [(0, 0)] * rank
        made = []
        for size, kernel, stride, dilation in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            less, more = total // 2, total - total // 2
            made.append((less, more) if self.auto_pad == "SAME_UPPER" else (more, less))
        return made


def patches(values: NDArray[Any], window: Window) -> NDArray[Any]:
    """(N, C, *sizes) becomes a view (N, *positions, C, *kernel): what the weights of each output are multiplied by."""
    pads = window.padding(values.shape[2:])
    if any(map(any, pads)):
        values = np.pad(values, [(0, 0), (0, 0), *pads])
    rank = len(window.kernel)
    spans = [(kernel - 1) * dilation + 1 for kernel, dilation in zip(window.kernel, window.dilations, strict=True)]
    every = np.lib.stride_tricks.sliding_window_view(values, spans, axis=tuple(range(2, 2 + rank)))
    places = [slice(None, None, stride) for stride in window.strides]
    within = [slice(None, None, dilation) for dilation in window.dilations]
    taken = every[(slice(None), slice(None), *places, *within)]
    return np.moveaxis(taken, 1, 1 + rank)


def rows_of(values: NDArray[Any], axis: int, groups: int, window: Window | None) -> NDArray[Any]:
    """(rows, groups, n): what the weights of each group of outputs are multiplied by.

    Args:
        values: the data of a layer, with its channels on ``axis``.
        window: of a convolution; without one each position of the data is a row by itself.
    """
    if window is None:
        last = np.moveaxis(values, axis, -1)
        return last.reshape(-1, groups, last.shape[-1] // groups)
    made = patches(values, window)
    channels, inner = values.shape[1], math.prod(window.kernel)
    return made.reshape(math.prod(made.shape[: 1 + len(window.kernel)]), groups, channels // groups * inner)


def slices(rows: NDArray[Any]) -> Iterator[slice]:
    """Of (rows, groups, n): parts that are few enough to be copied at once."""
    step = max(1, ROWS // max(1, math.prod(rows.shape[1:])))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _roomy(values: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
    """The same in float64 where float32 could not hold products of them."""
    large = max(float(values.max(initial=0)), -float(values.min(initial=0))) > LARGEST
    return values.astype(np.float64) if large else values


class _Room(threading.local):
    """Memory that products are made in: new memory for each takes longer to come than a product takes."""

    def __init__(self) -> None:
        self.values = np.empty(0, np.float32)


_ROOM = _Room()


def add_products(sums: NDArray[np.float64], left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
    """Add ``left' right`` of each group to ``sums``, (groups, n, n), for rows of both, (rows, groups, n).

    Products are made in float32, or in float64 of values whose products float32 cannot hold.
    """
    wide = _roomy(left)
    first, second = wide.transpose(1, 2, 0), (wide if left is right else _roomy(right)).transpose(1, 0, 2)
    if first.dtype == second.dtype == np.float32:
        if _ROOM.values.size < sums.size:
            _ROOM.values = np.empty(sums.size, np.float32)
        sums += np.matmul(first, second, out=_ROOM.values[: sums.size].reshape(sums.shape))
    else:
        sums += first @ second


class MomentRecorder:
    """Sums of x and of x x' over all rows, in float64.

    Products are made of values less about their mean: where the mean is large beside the spread, what is left of x x'
    without it would drown in rounding otherwise.
    """

    def __init__(self, groups: int, inputs: int, second: bool = True) -> None:
        self._sum = np.zeros((groups, inputs))
        self._products = np.zeros((groups, inputs, inputs)) if second else None
        self._middle: NDArray[np.float32] | None = None  # (groups, n), the mean of the first rows
        self._rows = 0

    def add(self, rows: NDArray[Any], times: int = 1) -> None:
        """(rows, groups, n): fold some rows in; they may be a view, of which parts are copied one after the other.

        Args:
            times: how often each row counts, where only the mean is asked for.
        """
        assert times == 1 or self._products is None
        for part in slices(rows):
            self.fold(rows[part], times)

    def fold(self, rows: NDArray[Any], times: int = 1) -> NDArray[np.float32]:
        """Fold in rows that are few enough to be copied at once; that copy, about 0 where products are made of it."""
        part = np.array(rows, np.float32, order="C")
        total = part.sum(axis=0, dtype=np.float64)
        self._sum += times * total
        if self._products is not None and len(part):
            if self._middle is None:
                self._middle = (total / len(part)).astype(np.float32)
            part -= self._middle
            add_products(self._products, part, part)
        self._rows += times * len(part)
        return part

    def finish(self) -> Moments:
        """The moments of all rows so far.

        Raises:
            ValueError: nothing was added.
        """
        if not self._rows:
            raise ValueError("no values were seen")
        mean = self._sum / self._rows
        if self._products is None or self._middle is None:
            return Moments(mean, None)
        away = (mean - self._middle)[:, :, None]
        second = self._products / self._rows - away * away.transpose(0, 2, 1)
        return Moments(mean, second + mean[:, :, None] * mean[:, None, :])
