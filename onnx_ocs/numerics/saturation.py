"""Where two products overflow 16 bits in the integer kernels of x86 CPUs without VNNI.

There onnxruntime (MLAS: QgemmU8S8KernelAvx2, ConvSymKernelAvx2) multiplies unsigned data by signed weights with
``vpmaddubsw``, which adds each two neighbouring products ``a[2i] w[2i] + a[2i+1] w[2i+1]`` in 16 bits and saturates,
in silence. The integers are the stored ones, before any zero point is taken off. Signed data, unsigned weights and
depthwise convolutions go through other instructions, which do not saturate.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOWEST, HIGHEST = -(2**15), 2**15 - 1

SMALLEST = 1.004
"""By which a threshold is raised at least: about half a step of 8 bits at its end."""

BLOCK = 2**22
"""Weights that are looked at in one go."""


def kernel_order(weights: NDArray[Any], input_axis: int, output_axis: int) -> NDArray[Any]:
    """(rows, K), a row for each output, in the order in which kernels pair the weights: the input channels next to each
    other, kernel positions (or the other axes) outside. For a Conv, (M, C / group, *kernel), that is the order of
    channels-last data, which QLinearConv computes in whatever the layout of the model."""
    channels_last = np.moveaxis(weights, (output_axis, input_axis), (0, -1))
    return channels_last.reshape(weights.shape[output_axis], -1)


@dataclass(frozen=True, eq=False)
class PairSums:
    """The least and the largest sum that each pair of neighbours of a row can reach. An odd K is filled with a zero."""

    lowest: NDArray[np.int32]  # (rows, pairs)
    highest: NDArray[np.int32]  # (rows, pairs)

    @property
    def saturates(self) -> NDArray[np.bool_]:
        """(rows, pairs), whether the sum can leave 16 bits."""
        return (self.lowest < LOWEST) | (self.highest > HIGHEST)

    @property
    def worst(self) -> NDArray[np.int32]:
        """(rows,), the largest magnitude of a sum."""
        return np.maximum(-self.lowest, self.highest).max(axis=1, initial=0)


def pair_sums(
    weights: NDArray[np.integer], low: int | NDArray[np.integer], high: int | NDArray[np.integer]
) -> PairSums:
    """What the pairs of ``weights``, (rows, K) in kernel order, can add up to on data from ``low`` to ``high``.

    Args:
        low, high: the range of the stored integers of the data, one for all or (K,).
    """
    wide = weights.astype(np.int32)
    ends = wide * np.asarray(low, np.int32), wide * np.asarray(high, np.int32)
    return PairSums(_added(np.minimum(*ends)), _added(np.maximum(*ends)))


def _added(products: NDArray[np.int32]) -> NDArray[np.int32]:
    even = np.pad(products, ((0, 0), (0, products.shape[1] % 2)))
    return even[:, ::2] + even[:, 1::2]


@dataclass(frozen=True, eq=False)
class RowSums:
    """What :func:`pair_sums` says of whole rows."""

    saturates: NDArray[np.bool_]  # (rows,), whether any pair can
    worst: NDArray[np.int32]  # (rows,), the largest magnitude of a sum


def widened(threshold: NDArray[np.float64], sums: RowSums) -> NDArray[np.float64]:
    """Thresholds on which the worst sums are about as large as they may be.

    Args:
        threshold: () for all rows, or (rows,) for each.
    """
    by = np.where(sums.saturates, np.maximum(sums.worst / HIGHEST, SMALLEST), 1.0)
    return threshold * (by.max() if threshold.ndim == 0 else by)


def row_sums(weights: NDArray[np.integer], low: int | NDArray[np.integer], high: int | NDArray[np.integer]) -> RowSums:
    """As :func:`pair_sums`, for each row, some rows at a time."""
    saturates, worst = np.zeros(len(weights), np.bool_), np.zeros(len(weights), np.int32)
    step = max(1, BLOCK // max(1, weights.shape[1]))
    for start in range(0, len(weights), step):
        rows = slice(start, start + step)
        sums = pair_sums(weights[rows], low, high)
        saturates[rows], worst[rows] = sums.saturates.any(axis=1), sums.worst
    return RowSums(saturates, worst)
