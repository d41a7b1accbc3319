"""Cross-layer equalization: factors that even out the ranges of channels (Nagel et al., arXiv:1906.04721, Section 4.1).

Where a positive factor of a channel passes from the layers that make it to those that read it, the makers' weights may
be divided by it and the readers' multiplied: the function stays.
"""

import numpy as np
from numpy.typing import NDArray

MOST = 64.0
"""A factor is at most this, and at least its inverse, so that channels that are nearly zero stay what they are."""


def equalizing(made: NDArray[np.floating], read: NDArray[np.floating]) -> NDArray[np.float64]:
    """(C,), ``s = sqrt(made / read)``: what the readers are multiplied by (Equation 11); 1 where a range is zero.

    Powers of two, so that no weight is rounded.

    Args:
        made, read: (C,), the ranges of each channel in the makers and in the readers.
    """
    factors = np.ones(len(made))
    known = (made > 0) & (read > 0)
    octaves = np.log2(made[known].astype(np.float64)) - np.log2(read[known].astype(np.float64))
    factors[known] = np.exp2(np.round(np.clip(octaves / 2, -np.log2(MOST), np.log2(MOST))))
    return factors
