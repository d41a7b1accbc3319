"""Noise that looks to a network as images do: neighbouring values are nearly equal, and so are the colours of one."""

import numpy as np
from numpy.typing import NDArray

SHARED = 0.9
"""Of the variance of a channel, that all channels of an image have in common."""

SPREAD = 0.5
"""Deviation of the brightness and, in octaves, of the contrast from image to image."""


def natural_images(count: int, channels: int, sizes: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """(count, channels, *sizes), random phases under amplitudes that fall as one over the frequency.

    The power of natural images falls with the square of the spatial frequency (Field, J. Opt. Soc. Am. A 4, 1987). All
    images together have mean zero and variance one, as what networks are trained on has after its normalization.
    """
    rows, columns = (np.fft.fftfreq(size) for size in sizes)
    frequency = np.hypot(rows[:, None], columns[None])
    frequency[0, 0] = np.inf  # the brightness is chosen below
    white = rng.standard_normal((count, channels + 1, *sizes))
    made = np.fft.ifft2(np.fft.fft2(white) / np.where(frequency > 0, frequency, np.inf)).real
    made /= np.maximum(made.std(axis=(2, 3), keepdims=True), np.finfo(np.float64).tiny)
    images = np.sqrt(SHARED) * made[:, -1:] + np.sqrt(1 - SHARED) * made[:, :-1]
    contrast = 2.0 ** (SPREAD * rng.standard_normal((count, 1, 1, 1)))
    brightness = SPREAD * rng.standard_normal((count, 1, 1, 1))
    return np.asarray((images * contrast + brightness) / np.sqrt(np.mean(contrast**2) + SPREAD**2))
