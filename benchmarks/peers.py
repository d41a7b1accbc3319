"""onnxruntime's own quantizer, which the benchmarks compare with."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from networks import Network
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Images(CalibrationDataReader):
    """Calibration images, one at a time."""

    def __init__(self, network: Network, count: int | None = None) -> None:
        name = onnx.load(network.model, load_external_data=False).graph.input[0].name
        self._left: Iterator[dict[str, np.ndarray]] = ({name: image[None]} for image in network.calibration[:count])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def quantized_statically(network: Network, target: Path, count: int | None = None, **options: Any) -> None:
    """Write what ``quantize_static`` makes of the network for CPUs: Q/DQ, UINT8 data, INT8 weights.

    The source is prepared as its documentation says (shapes, BatchNormalization); without symbolic shape inference,
    which needs another package and finds no more here.
    """
    source = target.with_suffix(".prepared.onnx")
    quant_pre_process(network.model, source, skip_symbolic_shape=True)
    settings = {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "calibrate_method": CalibrationMethod.MinMax,
    }
    with contextlib.redirect_stdout(None):  # it prints what it does
        quantize_static(source, target, Images(network, count), **(settings | options))
    source.unlink()
