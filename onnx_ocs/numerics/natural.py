"""Pictures of nothing that look to a network as images do: flat regions of all sizes, and edges where they overlap.

Leaves that fall on each other, with radii whose density falls with the third power, have the statistics of natural
images at all scales (Lee, Mumford and Huang, Int. J. Computer Vision 41, 2001): the power of a frequency falls with its
square, as in noise that is shaped so, but unlike such noise they have edges, which is what networks look for.
"""

import numpy as np
from numpy.typing import NDArray

LEAVES = 300
"""Of an image."""

SMALLEST, LARGEST = 0.045, 0.35
"""Radii, in sides of the image."""

SHARED = 0.9
"""Of the variance of a channel, that all channels of a leaf have in common."""


def natural_images(count: int, channels: int, sizes: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """(count, channels, *sizes); all together have mean 0 and variance 1, as images have it after normalization."""
    made = np.zeros((count, channels, *sizes))
    rows, columns = (np.arange(size)[:, None] for size in sizes)
    for image in made:
        image += _colour(channels, rng)
        share = rng.random(LEAVES)
        radii = ((1 - share) / SMALLEST**2 + share / LARGEST**2) ** -0.5 * min(sizes)
        for radius, middle in zip(radii.tolist(), (rng.random((LEAVES, 2)) * sizes).tolist(), strict=True):
            top, left = (max(0, int(at - radius)) for at in middle)
            here = slice(top, int(middle[0] + radius) + 2), slice(left, int(middle[1] + radius) + 2)
            inside = (rows[here[0]] - middle[0]) ** 2 + (columns[here[1]].T - middle[1]) ** 2 < radius**2
            image[:, *here][:, inside] = _colour(channels, rng)[:, 0]
    made -= made.mean()
    return made / max(made.std(), np.finfo(np.float64).tiny)


def _colour(channels: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(channels, 1, 1)."""
    own = rng.standard_normal((channels, 1, 1))
    return np.asarray(np.sqrt(SHARED) * rng.standard_normal() + np.sqrt(1 - SHARED) * own)
