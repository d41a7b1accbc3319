"""The integer types of ONNX, and what reads them."""

from collections.abc import Collection

import numpy as np
import onnx
from numpy.typing import NDArray

TYPES = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4, 2: onnx.TensorProto.INT2}
"""Signed types by their width in bits."""

SINCE = {8: 10, 4: 21, 2: 25}
"""The first opset in which DequantizeLinear takes each."""

PER_CHANNEL_SINCE = 13
"""The first opset in which DequantizeLinear takes one scale for each channel."""

BLOCKS_SINCE = 21
"""The first opset in which DequantizeLinear takes one scale for each block along an axis."""

TWO_BIT_COLUMNS = 4
"""onnxruntime 1.32 computes MatMulNBits of 2 bits wrongly where the outputs are no multiple of this."""


def narrowest(bits: int, among: Collection[int] = tuple(TYPES)) -> int:
    """The width of the smallest type that holds ``bits`` bits."""
    return next(width for width in sorted(among) if width >= bits)


def needed_opset(width: int, per_channel: bool) -> int:
    """The first opset that dequantizes a type of this width."""
    return max(SINCE[width], PER_CHANNEL_SINCE if per_channel else 0)


def packed(integers: NDArray[np.int8], width: int) -> bytes:
    """The raw data of ``integers`` in a type of ``width`` bits: the first of those that share a byte is the lowest."""
    flat = np.ascontiguousarray(integers).reshape(-1)
    if width == 8:
        return flat.tobytes()
    per_byte = 8 // width
    lanes = np.zeros(-(-flat.size // per_byte) * per_byte, np.uint8)
    lanes[: flat.size] = flat.view(np.uint8) & (2**width - 1)
    lanes = lanes.reshape(-1, per_byte) << np.arange(0, 8, width, dtype=np.uint8)
    return np.bitwise_or.reduce(lanes, axis=1).astype(np.uint8).tobytes()
