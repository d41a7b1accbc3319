"""What quantized layers in front do to the data of a layer, and the weights that make up for it.

Where the float model has x, the model with the layers in front quantized has y. If outputs are to stay those of the
float model, ``E |W x - V y|^2`` is to be least, which it is for ``V = W + W E[(x - y) y'] E[y y']^-1``: these are the
weights to round in place of W (QEP, Arai and Ichikawa, arXiv:2504.09629; GPTAQ, Li et al., arXiv:2504.02692, has the
same aim). The inverse is damped by much more than rounding needs: samples are few, and the weights are many.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.moments import MomentRecorder, Moments, add_products, slices
from onnx_ocs.numerics.stored import load_arrays, save_arrays

DAMPING, DAMPING_MADE_UP = 0.3, 1.0
"""Of the mean of the second moments, for samples and for made-up ones, which are not quite what the data is."""

FEWEST = 2
"""Rows for each input of an output; of fewer the second moments are noise that weights would be fitted to."""

MOST = 0.5
"""Of the variance of y, that x - y has at most: beyond it rows may be of different things, by a TopK, say."""


@dataclass(frozen=True, eq=False)
class Drift:
    """Of the n inputs of each group of a layer: x in the float model, y where the layers in front are quantized."""

    found: Moments  # of y
    lost: NDArray[np.float64]  # (groups, n), E[x - y]
    cross: NDArray[np.float64]  # (groups, n, n), the covariance of x - y and y

    def about(self, centered: bool) -> NDArray[np.float64]:
        """(groups, n, n), E[(x - y) y']; ``centered``: what is left of it once the bias makes up for the means."""
        return self.cross if centered else self.cross + self.lost[:, :, None] * self.found.mean[:, None, :]

    def taken(self, groups: NDArray[np.int64]) -> "Drift":
        """Of these groups."""
        return Drift(self.found.taken(groups), self.lost[groups], self.cross[groups])

    def save(self, path: Path) -> None:
        assert self.found.second is not None
        with path.open("wb") as file:
            save_arrays(file, [self.found.mean, self.found.second, self.lost, self.cross])

    @classmethod
    def load(cls, path: Path) -> "Drift":
        with path.open("rb") as file:
            mean, second, lost, cross = load_arrays(file, 4)
        return cls(Moments(mean, second), lost, cross)


class DriftRecorder:
    """Sums over all rows of x and y, in float64; products are made in float32, of values less about their mean.

    Rows are held until they are enough for there to be a drift: a layer with few costs no products.
    """

    def __init__(self, groups: int, inputs: int) -> None:
        self.is_comparable = True  # row by row
        self._found = MomentRecorder(groups, inputs)
        self._lost, self._away = np.zeros((groups, inputs)), np.zeros((groups, inputs))
        self._energy = 0.0  # of x - y
        self._products = np.zeros((groups, inputs, inputs))
        self._rows = 0
        self._held: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def add(self, exact: NDArray[Any], found: NDArray[Any]) -> None:
        """(rows, groups, n) each, x and y; they may be views, of which parts are copied one after the other."""
        self._held.append((exact, found))
        self._rows += len(found)
        while self._is_enough and self._held:
            self._fold(*self._held.pop(0))

    @property
    def _is_enough(self) -> bool:
        return self._rows >= FEWEST * self._lost.shape[1]

    def _fold(self, exact: NDArray[Any], found: NDArray[Any]) -> None:
        for part in slices(found):
            some = self._found.fold(found[part])
            lost = np.subtract(exact[part], found[part], order="C", dtype=np.float32, casting="same_kind")
            self._lost += lost.sum(axis=0, dtype=np.float64)
            self._away += some.sum(axis=0, dtype=np.float64)
            add_products(self._products, lost, some)
            self._energy += float(np.einsum("rgi,rgi->", lost, lost, dtype=np.float64))

    def finish(self) -> Drift | None:
        """Of all rows so far; None where there are few, or where x and y have little to do with each other."""
        if not self._rows or not self._is_enough or not self.is_comparable:
            return None
        found, lost = self._found.finish(), self._lost / self._rows
        assert found.second is not None
        spread = float(np.einsum("gii->", found.second) - np.square(found.mean).sum())
        if not max(self._energy / self._rows - np.square(lost).sum(), 0) <= MOST * max(spread, 0) < np.inf:
            return None
        cross = self._products / self._rows - lost[:, :, None] * (self._away / self._rows)[:, None, :]
        return Drift(found, lost, cross)


def making_up(
    rows: NDArray[np.float64], cross: NDArray[np.float64], second: NDArray[np.float64], made_up: bool = False
) -> NDArray[np.float64]:
    """The weights V that make up for what the layers in front do.

    Args:
        rows: (G, O, n), W.
        cross: (G, n, n), E[(x - y) y'], or the covariance.
        second: (G, n, n), E[y y'], or the covariance.
        made_up: the samples are.
    """
    mean = second.diagonal(axis1=1, axis2=2).mean(axis=1)
    damping = np.where(mean > 0, (DAMPING_MADE_UP if made_up else DAMPING) * mean, 1.0)
    damped = second + damping[:, None, None] * np.eye(second.shape[1])
    return np.asarray(rows + np.linalg.solve(damped, (rows @ cross).swapaxes(1, 2)).swapaxes(1, 2))
