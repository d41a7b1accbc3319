"""What quantized layers in front do to the data of a layer, and the weights that make up for it.

Where the float model has x, the model with the layers in front quantized has y. If outputs are to stay those of the
float model, ``E |W x - V y|^2`` is to be least, which it is for ``V = W + W E[(x - y) y'] E[y y']^-1``: these are the
weights to round in place of W (QEP, Arai and Ichikawa, arXiv:2504.09629; GPTAQ, Li et al., arXiv:2504.02692, has the
same aim). The inverse is damped by much more than rounding needs: samples are few, and the weights are many.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.moments import ROWS

DAMPING = 0.3
"""Of the mean of the second moments; of 0.01 to 1 it is about the best on the networks of benchmarks/accuracy.py."""


DAMPING_MADE_UP, BELIEVED = 1.0, 0.4
"""The same for made-up samples, and what share of what errors do to them is taken to be done to real ones."""

MOST = 0.5
"""Of the variance of y, that x - y has at most: beyond it rows may be of different things, by a TopK, say."""


@dataclass(frozen=True, eq=False)
class Drift:
    """Of the n inputs of each group of a layer: x in the float model, y where the layers in front are quantized."""

    mean: NDArray[np.float64]  # (groups, n), E y
    lost: NDArray[np.float64]  # (groups, n), E[x - y]
    cross: NDArray[np.float64]  # (groups, n, n), the covariance of x - y and y

    def about(self, centered: bool) -> NDArray[np.float64]:
        """(groups, n, n), E[(x - y) y']; ``centered``: what is left of it once the bias makes up for the means."""
        return self.cross if centered else self.cross + self.lost[:, :, None] * self.mean[:, None, :]

    def taken(self, groups: NDArray[np.int64]) -> "Drift":
        """Of these groups."""
        return Drift(self.mean[groups], self.lost[groups], self.cross[groups])


class DriftRecorder:
    """Sums over all rows of x and y, in float64; products are made in float32, of values less about their mean."""

    def __init__(self, groups: int, inputs: int) -> None:
        self.is_comparable = True  # row by row
        self._lost, self._sum = np.zeros((groups, inputs)), np.zeros((groups, inputs))
        self._energy = np.zeros(2)  # of x - y, and of y about its middle
        self._products = np.zeros((groups, inputs, inputs))
        self._middle: NDArray[np.float32] | None = None  # (groups, n), the mean of the first rows of y
        self._rows = 0

    def add(self, exact: NDArray[Any], found: NDArray[Any]) -> None:
        """(rows, groups, n) each, x and y; they may be views, of which parts are copied one after the other."""
        step = max(1, ROWS // max(1, math.prod(exact.shape[1:])))
        for start in range(0, len(exact), step):
            some = np.array(found[start : start + step], np.float32, order="C")
            lost = np.array(exact[start : start + step], np.float32, order="C") - some
            if self._middle is None:
                self._middle = some.mean(axis=0, dtype=np.float64).astype(np.float32)
            some -= self._middle
            self._lost += lost.sum(axis=0, dtype=np.float64)
            self._sum += some.sum(axis=0, dtype=np.float64)
            self._products += lost.transpose(1, 2, 0) @ some.transpose(1, 0, 2)
            self._energy += [np.square(part).sum(dtype=np.float64) for part in (lost, some)]
            self._rows += len(some)

    def finish(self) -> Drift | None:
        """Of all rows so far; None where there are none, or where x and y have little to do with each other."""
        if not self._rows or self._middle is None or not self.is_comparable:
            return None
        of_means = [np.square(part).sum() / self._rows for part in (self._lost, self._sum)]
        spread = self._energy - of_means  # times the rows
        if not max(spread[0], 0) <= MOST * max(spread[1], 0) < np.inf:
            return None
        lost, away = self._lost / self._rows, self._sum / self._rows
        cross = self._products / self._rows - lost[:, :, None] * away[:, None, :]
        return Drift(away + self._middle, lost, cross)


def making_up(
    rows: NDArray[np.float64], cross: NDArray[np.float64], second: NDArray[np.float64], made_up: bool = False
) -> NDArray[np.float64]:
    """The weights V that make up for what the layers in front do.

    Args:
        rows: (G, O, n), W.
        cross: (G, n, n), E[(x - y) y'], or the covariance.
        second: (G, n, n), E[x x'], or the covariance; that of y is taken to be the same.
        made_up: the samples are.
    """
    mean = second.diagonal(axis1=1, axis2=2).mean(axis=1)
    damping = np.where(mean > 0, (DAMPING_MADE_UP if made_up else DAMPING) * mean, 1.0)
    damped = second + damping[:, None, None] * np.eye(second.shape[1])
    change = np.linalg.solve(damped, (rows @ cross).swapaxes(1, 2)).swapaxes(1, 2)
    return np.asarray(rows + (BELIEVED * change if made_up else change))
