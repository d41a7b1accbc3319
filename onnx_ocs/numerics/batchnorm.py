"""BatchNormalization in inference as a factor and a summand of each channel (Ioffe and Szegedy, arXiv:1502.03167)."""

import math
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


def clipped_normal(
    mean: NDArray[np.float64], variance: NDArray[np.float64], low: float, high: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of ``clip(x, low, high)`` with normal x (Nagel et al., arXiv:1906.04721, Appendix C).

    Args:
        mean, variance: (C,), of x.
    """
    deviation = np.sqrt(np.maximum(variance, np.finfo(np.float64).tiny))
    density_low, below = _normal((low - mean) / deviation)
    density_high, within = _normal((high - mean) / deviation)
    inside, above = within - below, 1 - within
    bottom, top = (bound if np.isfinite(bound) else 0.0 for bound in (low, high))
    first = bottom * below + top * above + mean * inside - deviation * (density_high - density_low)
    second = bottom**2 * below + top**2 * above + (np.square(mean) + variance) * inside
    second -= deviation * ((top + mean) * density_high - (bottom + mean) * density_low)
    return first, np.maximum(second - np.square(first), 0)


def _normal(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The density of the normal distribution, and the share below."""
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in values.tolist()])
    return np.exp(-np.square(values) / 2) / math.sqrt(2 * math.pi), below
