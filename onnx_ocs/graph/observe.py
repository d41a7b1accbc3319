"""A copy of a model whose outputs are what is to be known of its inner tensors: extremes, means, and some values.

The reductions run inside onnxruntime, next to the tensors, so that none of these leaves it whole.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnx_ocs.graph.model import Model

START = "onnx_ocs.start"
"""The input that says at which position the taken values begin; any whole number."""

LAST = np.iinfo(np.int64).max

FIGURES = ("low", "high", "mean", "size", "taken")
"""What comes out for each tensor, in this order."""

OPSET = 13
"""The least opset of a model that is observed."""

AXES_ARE_INPUTS = 18
"""The opset from which reductions take their axes as an input."""


@dataclass(frozen=True)
class Observed:
    """A tensor of the main graph and where its channels lie."""

    name: str
    axis: int  # from the end
    channels: int
    rank: int | None = None  # known wherever the channels are not last
    data_type: int = TensorProto.FLOAT

    @property
    def key(self) -> str:
        """Names the tensor and the axis."""
        return f"{self.name} {self.axis}"


def outputs(index: int) -> list[str]:
    """The outputs that tell of the tensor ``index``."""
    return [f"onnx_ocs.observed.{index}.{figure}" for figure in FIGURES]


def observing(model: Model, tensors: list[Observed], stride: int) -> Model:
    """The model that computes :data:`FIGURES` of ``tensors`` in place of its own outputs.

    ``low``, ``high`` and ``mean`` are (..., C) with the channels last, ``size`` is the number of values, and ``taken``
    is (outer, C, inner) or, where the channels are last, (outer, C): every ``stride``-th position.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.output[:]
    build = _Builder(proto.graph, model.opset())
    build.constant("step", [stride])
    build.constant("last", [LAST])
    for index, tensor in enumerate(tensors):
        build.observe(index, tensor, stride)
    proto.graph.input.append(helper.make_tensor_value_info(START, TensorProto.INT64, [1]))
    return model.sharing(proto)


class _Builder:
    """Adds nodes and constants under names of its own."""

    def __init__(self, graph: onnx.GraphProto, opset: int) -> None:
        self._graph = graph
        self._by_input = opset >= AXES_ARE_INPUTS

    def constant(self, name: str, values: list[int]) -> str:
        name = f"onnx_ocs.{name}"
        self._graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def observe(self, index: int, tensor: Observed, stride: int) -> None:
        low, high, mean, size, taken = outputs(index)
        name = f"observed.{index}"
        values = tensor.name
        if tensor.data_type != TensorProto.FLOAT:
            values = self._node("Cast", [values], f"onnx_ocs.{name}.float", to=TensorProto.FLOAT)
        if tensor.axis == -1:
            shape, axis = [-1, tensor.channels], 0
        else:
            assert tensor.rank is not None
            shape, axis = [0] * (tensor.rank + tensor.axis + 1) + [-1], -1
        rows = self._node("Reshape", [values, self.constant(f"{name}.shape", shape)], f"onnx_ocs.{name}.rows")
        for op, output in (("ReduceMin", low), ("ReduceMax", high), ("ReduceMean", mean)):
            self._reduce(op, rows, axis, output)
        self._node("Size", [rows], size)
        if stride == 1 or (tensor.axis == -1 and tensor.rank == 2):
            self._node("Identity", [rows], taken)
        else:
            self._slice(rows, axis, name, taken)
        for output, kind in zip(outputs(index), (1, 1, 1, TensorProto.INT64, 1), strict=True):
            self._graph.output.append(helper.make_tensor_value_info(output, kind, None))

    def _slice(self, rows: str, axis: int, name: str, output: str) -> None:
        """Every ``step``-th position along ``axis``, from :data:`START` on, wrapped where there are fewer."""
        axes = self.constant(f"{name}.axis", [axis])
        shape = self._node("Shape", [rows], f"onnx_ocs.{name}.sizes")
        length = self._node("Gather", [shape, axes], f"onnx_ocs.{name}.length")
        start = self._node("Mod", [START, length], f"onnx_ocs.{name}.from")
        self._node("Slice", [rows, start, "onnx_ocs.last", axes, "onnx_ocs.step"], output)

    def _reduce(self, op: str, rows: str, axis: int, output: str) -> None:
        if self._by_input:
            axes = self.constant(f"{output}.axes", [axis])
            self._node(op, [rows, axes], output, keepdims=0)
        else:
            self._node(op, [rows], output, axes=[axis], keepdims=0)

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output
