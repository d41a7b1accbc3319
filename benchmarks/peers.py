"""Other quantizers, which the benchmarks compare with: onnxruntime's own here, others in environments of their own."""

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from networks import Network
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

WIDTHS = {
    getattr(onnx.TensorProto, f"{sign}INT{bits}"): bits
    for sign in ("", "U")
    for bits in (2, 4, 8, 16)
    if hasattr(onnx.TensorProto, f"{sign}INT{bits}")
}

FLOAT = 32
"""The width of float weights."""


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


class NotPossible(Exception):
    """A peer makes nothing of a network at this width, in its own words."""


@dataclass
class Quantizer:
    """``quantize_static`` for each output channel."""

    name: str = "onnxruntime quantize_static"
    versions: str = ""  # of what is not installed here, once it has answered

    def quantize(self, network: Network, bits: int, data: bool, folder: Path) -> Path | NDArray[np.float32]:
        """The model that it makes, of its own accord with 8-bit data, or the scores of its simulation."""
        if f"QInt{bits}" not in QuantType.__members__:
            raise NotPossible(f"QuantType has only {', '.join(QuantType.__members__)}")
        target = folder / "static.onnx"
        kept = {} if data else {"QDQKeepRemovableActivations": True}  # Relu, which Q/DQ of UINT8 stand for
        weights = QuantType[f"QInt{bits}"]
        quantized_statically(network, target, per_channel=True, weight_type=weights, extra_options=kept)
        return target


@dataclass
class Apart(Quantizer):
    """A peer in an environment of its own, by ``quantize_by.py``."""

    python: str = ""
    peer: str = ""
    method: str = ""

    @classmethod
    def named(cls, option: str) -> "Apart":
        """From ``NAME=PYTHON`` or ``NAME:METHOD=PYTHON``."""
        name, _, python = option.partition("=")
        peer, _, method = name.partition(":")
        if not python:
            raise ValueError(f"{option!r} is not NAME=PYTHON")
        return cls(name=f"{peer}, {method}" if method else peer, python=python, peer=peer, method=method)

    def quantize(self, network: Network, bits: int, data: bool, folder: Path) -> Path | NDArray[np.float32]:
        paths = {"samples": folder / "samples.npy", "images": folder / "images.npy"}
        np.save(paths["samples"], network.calibration)
        np.save(paths["images"], network.images)
        request, answer = folder / "request.json", folder / "answer.json"
        asked = {"peer": self.peer, "method": self.method, "model": network.model, "bits": bits, "data": data, **paths}
        request.write_text(json.dumps(asked, default=str))
        script = Path(__file__).with_name("quantize_by.py")
        command = [self.python, "-I", str(script), str(request), str(answer)]  # tensorrt is not that beside the script
        ended = subprocess.run(command, capture_output=True, text=True)
        if not answer.exists():
            raise NotPossible((ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1])
        given = json.loads(answer.read_text())
        self.versions = ", ".join(f"{package} {version}" for package, version in given["versions"].items())
        if "reason" in given:
            raise NotPossible(given["reason"])
        return np.load(given["scores"]) if "scores" in given else Path(given["model"])


def shortened(message: str, most: int = 160) -> str:
    """A message as a cell of a table: one line, no bars, not too long."""
    text = " ".join(message.split()).replace("|", "/")
    text = re.sub(r"\[ONNXRuntimeError\].* was false\. ", "", text)  # onnxruntime says where in its source first
    return text if len(text) <= most else f"{text[:most].rsplit(' ', 1)[0]} ..."


def widths(path: Path) -> list[int]:
    """Of the constant weights of each Conv, ConvTranspose, Gemm and MatMul, in bits."""
    graph = onnx.load(path).graph
    types = {constant.name: constant.data_type for constant in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}

    def width(name: str) -> int | None:
        """None where the tensor is no constant."""
        if name in types:
            return WIDTHS.get(types[name], FLOAT)
        node = makers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            return FLOAT
        if node.op_type == "QuantizeLinear":
            return width(node.input[0]) and width(node.input[2])
        if node.op_type in ("DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity"):
            return width(node.input[0])
        return None

    found = (width(node.input[1]) for node in graph.node if node.op_type in WEIGHTED)
    return [bits for bits in found if bits is not None]


def data_pairs(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, str]]:
    """Each DequantizeLinear at data, and the tensor in front of its QuantizeLinear."""
    constants = {constant.name for constant in model.graph.initializer}
    rounded = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    }
    readers = (node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in rounded)
    return [(node, rounded[node.input[0]]) for node in readers]


def free_data(path: Path) -> None:
    """Take QuantizeLinear and DequantizeLinear at data out of a model: its weights and biases stay as they are."""
    model = onnx.load(path)
    for node, source in data_pairs(model):
        node.CopyFrom(onnx.helper.make_node("Identity", [source], node.output))
    onnx.save(model, path)
