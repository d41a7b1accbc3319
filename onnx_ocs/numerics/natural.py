"""Pictures of nothing that look to a network as images do: flat regions of all sizes, and edges where they overlap.

Leaves that fall on each other, with radii whose density falls with the third power, have the statistics of natural
images at all scales (Lee, Mumford and Huang, Int. J. Computer Vision 41, 2001): the power of a frequency falls with its
square, as in noise that is shaped so, but unlike such noise they have edges, which is what networks look for.
"""

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.moments import Window, rows_of

LEAVES, MOST_LEAVES = 300, 4800
"""Of a square image, and at most of one that is longer, which has as many more."""

SMALLEST, LARGEST = 0.045, 0.35
"""Radii, in sides of the image."""

SHARED = 0.9
"""Of the variance of a channel, that all channels of a leaf have in common."""

FITTED = 16
"""Images that tell how much the outputs of a layer vary."""

LARGEST_KERNEL = 32
"""Rows or columns of the kernels that tell of the pictures before them; larger ones see more than a part of these."""

RIDGE = 0.003
"""Of the sum of all squared weights, in deviations of their outputs: how much 0 is preferred as a mean."""

UNUSUAL = 100
"""Times that the variance of an output is what most outputs make expect, or a part of it, where it tells nothing."""


def natural_images(count: int, channels: int, sizes: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """(count, channels, *sizes); all together have mean 0 and variance 1, as images have it after normalization."""
    made, leaves = np.empty((count, channels, *sizes)), min(LEAVES * max(sizes) // min(sizes), MOST_LEAVES)
    for image in made:
        ground = _colours(1, channels, rng)
        share = rng.random(leaves)
        radii = ((1 - share) / SMALLEST**2 + share / LARGEST**2) ** -0.5 * min(sizes)
        middles = rng.random((leaves, 2)) * sizes
        colours = np.concatenate([ground, _colours(leaves, channels, rng)])
        image[...] = np.moveaxis(colours[_highest(middles, radii, sizes)], -1, 0)
    made -= made.mean()
    return made / max(made.std(), np.finfo(np.float64).tiny)


def _highest(middles: NDArray[np.float64], radii: NDArray[np.float64], sizes: tuple[int, int]) -> NDArray[np.int64]:
    """(rows, columns), which of the leaves lies on the others at each pixel, the last; from 1 on, 0 where none does."""
    up, aside = (np.square(np.arange(size) - middle[:, None]) for size, middle in zip(sizes, middles.T, strict=True))
    most = np.square(radii).tolist()
    first = np.maximum(0, (middles - radii[:, None]).astype(np.int64)).tolist()
    after = ((middles + radii[:, None]).astype(np.int64) + 1).tolist()
    highest = np.zeros(sizes, np.int64)
    for leaf, ((top, left), (bottom, right)) in enumerate(zip(first, after, strict=True)):
        covered = up[leaf, top:bottom, None] + aside[leaf, left:right] < most[leaf]
        highest[top:bottom, left:right][covered] = leaf + 1
    return highest


def _colours(count: int, channels: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(count, channels)."""
    drawn = rng.standard_normal((count, channels + 1))
    return np.asarray(np.sqrt(SHARED) * drawn[:, -1:] + np.sqrt(1 - SHARED) * drawn[:, :-1])


def fit_colours(
    weight: NDArray[np.float64],
    mean: NDArray[np.float64],
    variance: NDArray[np.float64],
    dilations: tuple[int, ...],
    sizes: tuple[int, int],
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Means and variances, (C,) each, of pictures on which a convolution has outputs with these means and variances.

    The mean of an output is the sum of the means of the colours, each times the sum of its kernel, solved for by least
    squares in deviations of the outputs. The variance, one for all colours, is that which has the outputs of made-up
    pictures vary as much, by the median over the outputs; outputs that are far from it, dead ones say, are left out.
    None where kernels are too large for that, or no output varies.

    Args:
        weight: (M, C, rows, columns).
        mean, variance: (M,), without the bias.
        sizes: rows and columns of the pictures.
    """
    spans = [(size - 1) * each + 1 for size, each in zip(weight.shape[2:], dilations, strict=True)]
    if max(spans) > min(LARGEST_KERNEL, *sizes):
        return None
    images = natural_images(FITTED, weight.shape[1], sizes, np.random.default_rng(0))
    apart = max(1, min(sizes) // 16)
    rows = rows_of(images, 1, 1, Window(weight.shape[2:], (apart, apart), dilations, (0, 0, 0, 0)))[:, 0]
    flat = weight.reshape(len(weight), -1)
    unit = (rows @ flat.T).var(axis=0)
    ratio = variance / unit
    alive = np.isfinite(ratio) & (ratio > 0) & np.isfinite(mean)
    if not alive.any():
        return None
    usual = float(np.median(ratio[alive]))
    alive &= (ratio > usual / UNUSUAL) & (ratio < usual * UNUSUAL)
    deviations = np.sqrt(variance[alive])
    sums, wanted = weight.sum(axis=(2, 3))[alive] / deviations[:, None], mean[alive] / deviations
    flat = flat[alive] / deviations[:, None]
    second = sums.T @ sums + RIDGE * np.square(flat).sum() * np.eye(weight.shape[1])
    return np.linalg.solve(second, sums.T @ wanted), np.full(weight.shape[1], usual)
