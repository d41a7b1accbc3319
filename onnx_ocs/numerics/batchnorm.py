"""BatchNormalization in inference as a factor and a summand of each channel (Ioffe and Szegedy, arXiv:1502.03167)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.split import along


@dataclass(frozen=True, eq=False)
class Affine:
    """``factor * x + summand`` for each of M channels."""

    factor: NDArray[np.float64]  # (M,)
    summand: NDArray[np.float64]  # (M,)


def affine(parameters: tuple[NDArray[Any], ...], epsilon: float) -> Affine:
    """``scale * (x - mean) / sqrt(variance + epsilon) + shift``; ``parameters`` in the operator's order, (M,) each."""
    scale, shift, mean, variance = (values.astype(np.float64) for values in parameters)
    with np.errstate(invalid="ignore", divide="ignore"):  # what comes of it is not finite, and shows
        factor = scale / np.sqrt(variance + epsilon)
        return Affine(factor, shift - mean * factor)


def scaled(weight: NDArray[Any], factor: NDArray[np.float64], axis: int, groups: int = 1) -> NDArray[Any]:
    """``weight`` with its output channels along ``axis`` multiplied by ``factor``.

    Args:
        factor: (M,) for all output channels. With ``groups`` above 1 the groups stand behind each other along axis 0,
            the input axis, and ``axis`` holds the M / groups output channels of each (ConvTranspose).
    """
    if groups == 1:
        return np.asarray((weight * along(factor, axis, weight.ndim)).astype(weight.dtype))
    parts = zip(np.split(weight, groups), np.split(factor, groups), strict=True)
    return np.concatenate([scaled(part, some, axis) for part, some in parts])
