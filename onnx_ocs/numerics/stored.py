"""Arrays on disk for another process, behind each other in one file: without the checksums of ``.npz``, which take as
long as reading and writing."""

from collections.abc import Iterable
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray


def save_arrays(file: IO[bytes], arrays: Iterable[NDArray[Any]]) -> None:
    """Write them behind what the file has."""
    for array in arrays:
        np.save(file, array, allow_pickle=False)


def load_arrays(file: IO[bytes], number: int) -> list[NDArray[Any]]:
    """The next ``number`` arrays of the file."""
    return [np.load(file, allow_pickle=False) for _ in range(number)]
