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
        image += _colours(1, channels, rng)[0]
        share = rng.random(LEAVES)
        radii = ((1 - share) / SMALLEST**2 + share / LARGEST**2) ** -0.5 * min(sizes)
        middles, colours = rng.random((LEAVES, 2)) * sizes, _colours(LEAVES, channels, rng)
        first = np.maximum(0, (middles - radii[:, None]).astype(int)).tolist()
        after = ((middles + radii[:, None]).astype(int) + 2).tolist()
        for place, (middle, most) in enumerate(zip(middles.tolist(), np.square(radii).tolist(), strict=True)):
            (top, left), (bottom, right) = first[place], after[place]
            up, aside = rows[top:bottom] - middle[0], columns[left:right].T - middle[1]
            np.copyto(image[:, top:bottom, left:right], colours[place], where=up * up + aside * aside < most)
    made -= made.mean()
    return made / max(made.std(), np.finfo(np.float64).tiny)


def _colours(count: int, channels: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(count, channels, 1, 1)."""
    drawn = rng.standard_normal((count, channels + 1, 1, 1))
    return np.asarray(np.sqrt(SHARED) * drawn[:, -1:] + np.sqrt(1 - SHARED) * drawn[:, :-1])
