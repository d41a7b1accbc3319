"""A copy of a model whose outputs are what is to be known of its inner tensors: extremes, means, and some values.

The reductions run inside onnxruntime, next to the tensors, so that none of these leaves it whole.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnx_ocs.graph.model import Model

START = "onnx_ocs.start"
"""The input that says at which position the taken values begin, below the stride."""

ENOUGH = 1024
"""Values of a sample that are taken at least, if it has so many."""

LAST = np.iinfo(np.int64).max

LOW, HIGH, MEAN = "onnx_ocs.low", "onnx_ocs.high", "onnx_ocs.mean"
"""The outputs that hold these figures of the channels of all tensors behind each other."""

REDUCTIONS = {"ReduceMin": LOW, "ReduceMax": HIGH, "ReduceMean": MEAN}

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
    shape: tuple[int | None, ...] | None = None  # its rank is known wherever the channels are not last
    data_type: int = TensorProto.FLOAT

    @property
    def key(self) -> str:
        """Names the tensor and the axis."""
        return f"{self.name} {self.axis}"

    @property
    def inner(self) -> int | None:
        """Positions of each channel within a sample, where they are known: the size of the axes behind the channels."""
        behind = (self.shape or (None,))[self.axis + 1 :] if self.axis < -1 else (None,)
        return None if None in behind else math.prod(behind)  # type: ignore[arg-type]

    def step(self, stride: int) -> int:
        """Positions from one taken value to the next: fewer than ``stride`` where a sample has few values."""
        if self.axis == -1:
            return 1 if self.shape is not None and len(self.shape) == 2 else stride
        if self.inner is None:
            return stride
        return max(1, min(stride, self.channels * self.inner // ENOUGH, self.inner))


def taken(index: int) -> str:
    """The output with the taken values of the tensor ``index``."""
    return f"onnx_ocs.observed.{index}.taken"


def size(index: int) -> str:
    """The output with the number of all its values; it is there only where the taken ones do not tell."""
    return f"onnx_ocs.observed.{index}.size"


def observing(model: Model, tensors: list[Observed], stride: int) -> Model:
    """The model that computes figures of ``tensors`` in place of its own outputs.

    Taken values are (outer, C, inner) or, where the channels are last, (outer, C): every :meth:`Observed.step`-th
    position from :data:`START` on.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.output[:]
    build = _Builder(proto.graph, model.opset())
    build.constant("last", [LAST])
    for index, tensor in enumerate(tensors):
        build.observe(index, tensor, stride)
    build.join(len(tensors))
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
        name = f"observed.{index}"
        values = tensor.name
        if tensor.data_type != TensorProto.FLOAT:
            values = self._node("Cast", [values], f"onnx_ocs.{name}.float", to=TensorProto.FLOAT)
        if tensor.axis == -1:
            shape, axis, over = [-1, tensor.channels], 0, [0]
        else:
            assert tensor.shape is not None
            rank = len(tensor.shape)
            shape, axis = [0] * (rank + tensor.axis + 1) + [-1], -1
            over = [place for place in range(rank) if place != rank + tensor.axis]
        step = tensor.step(stride)
        whole = step == 1
        rows = taken(index) if whole else f"onnx_ocs.{name}.rows"
        self._node("Reshape", [values, self.constant(f"{name}.shape", shape)], rows)
        for op, figure in REDUCTIONS.items():
            self._reduce(op, rows if tensor.axis == -1 else values, over, f"{figure}.{index}")
        if not whole:
            axes = self.constant(f"{name}.axis", [axis])
            by = self.constant(f"{name}.step", [step])
            length = by if tensor.inner is not None else self._length(rows, axes, name)
            start = self._node("Mod", [START, length], f"onnx_ocs.{name}.from")
            self._node("Slice", [rows, start, "onnx_ocs.last", axes, by], taken(index))
        self._output(taken(index))
        if not whole and tensor.inner is None:
            self._output(self._node("Size", [values], size(index)), TensorProto.INT64)

    def join(self, number: int) -> None:
        """The figures of all tensors behind each other."""
        for figure in REDUCTIONS.values():
            self._output(self._node("Concat", [f"{figure}.{index}" for index in range(number)], figure, axis=0))

    def _output(self, name: str, data_type: int = TensorProto.FLOAT) -> None:
        self._graph.output.append(helper.make_tensor_value_info(name, data_type, None))

    def _length(self, rows: str, axes: str, name: str) -> str:
        """The length of an axis, which may be shorter than a step."""
        shape = self._node("Shape", [rows], f"onnx_ocs.{name}.sizes")
        return self._node("Gather", [shape, axes], f"onnx_ocs.{name}.length")

    def _reduce(self, op: str, values: str, axes: list[int], output: str) -> None:
        if self._by_input:
            self._node(op, [values, self.constant(f"{output}.axes", axes)], output, keepdims=0)
        else:
            self._node(op, [values], output, axes=axes, keepdims=0)

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output
