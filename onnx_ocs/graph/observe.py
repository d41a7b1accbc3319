"""A copy of a model whose outputs are what is to be known of its inner tensors: extremes, means, and some values.

The reductions run inside onnxruntime, next to the tensors, so that none of these leaves it whole.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnx_ocs.graph.editor import CONSTANTS_ARE_NOT_INPUTS
from onnx_ocs.graph.model import Model

START = "onnx_ocs.start"
"""The input that says at which position the taken values begin; it counts modulo the steps."""

COUNT = "onnx_ocs.count"
"""The input that says how many samples are in a batch."""

ENOUGH = 1024
"""Values of a sample that are taken at least, if it has so many."""

LAST = np.iinfo(np.int64).max

LOW, HIGH, MEAN = "onnx_ocs.low", "onnx_ocs.high", "onnx_ocs.mean"
"""The outputs that hold these figures of the channels of all tensors behind each other; ``LOW`` of those tensors
whose minimum is looked for (:meth:`Observed.reductions`), and missing if there are none."""

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
    nonnegative: bool = False  # by the graph, whatever the samples

    @property
    def key(self) -> str:
        """Names the tensor and the axis."""
        return f"{self.name} {self.axis}"

    def reductions(self, stride: int) -> dict[str, str]:
        """Operators and outputs of the figures that are of all values; the minimum of a tensor that the graph keeps
        from being negative is looked for only where all values are taken, and is 0 else.
        """
        left_out = {"ReduceMin"} if self.nonnegative and stride > 1 else set()
        return {op: figure for op, figure in REDUCTIONS.items() if op not in left_out}

    @property
    def over(self) -> list[int]:
        """The axes on which values are left out, from the end: those behind the channels, or all before them."""
        return list(range(self.axis + 1, 0)) if self.axis < -1 else [-2]

    @cached_property
    def sizes(self) -> list[int] | None:
        """Of these axes, where they are known; None where they are free, and where the channels are last."""
        if self.shape is None or self.axis == -1:
            return None
        behind = self.shape[self.axis + 1 :]
        return None if None in behind else [size for size in behind if size is not None]

    @property
    def is_flat(self) -> bool:
        """Whether it is (N, C): all its values are taken."""
        return self.axis == -1 and self.shape is not None and len(self.shape) == 2

    def steps(self, stride: int) -> list[int]:
        """On each of these axes, positions from one taken value to the next: together about ``stride``, and less where
        a sample has few values."""
        if self.is_flat:
            return [1]
        left = stride
        if self.sizes is not None:
            left = max(1, min(stride, self.channels * math.prod(self.sizes) // ENOUGH))
        made: list[int] = []
        for rest in range(len(self.over), 0, -1):
            step = round(left ** (1 / rest))
            step = step if self.sizes is None else min(step, self.sizes[len(made)])
            made.append(max(1, step))
            left = max(1, round(left / made[-1]))
        return made


def taken(index: int) -> str:
    """The output with the taken values of the tensor ``index``."""
    return f"onnx_ocs.observed.{index}.taken"


def size(index: int) -> str:
    """The output with the number of all its values; it is there only where taken values and known sizes do not tell."""
    return f"onnx_ocs.observed.{index}.size"


def observing(model: Model, tensors: list[Observed], stride: int) -> Model:
    """The model that computes figures of ``tensors`` in place of its own outputs.

    Taken values are those of the tensor at every so many positions (:meth:`Observed.steps`), from :data:`START` on.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.output[:]
    proto.ir_version = max(proto.ir_version, CONSTANTS_ARE_NOT_INPUTS)
    build = _Builder(proto.graph, model.opset())
    for index, tensor in enumerate(tensors):
        build.observe(index, tensor, stride)
    build.join()
    for name in (START, COUNT):
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, [1]))
    return model.sharing(proto)


class _Builder:
    """Adds nodes and constants under names of its own."""

    def __init__(self, graph: onnx.GraphProto, opset: int) -> None:
        self._graph = graph
        self._by_input = opset >= AXES_ARE_INPUTS
        self._figures: dict[str, list[str]] = {}

    def constant(self, name: str, values: list[int]) -> str:
        name = f"onnx_ocs.{name}"
        self._graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def observe(self, index: int, tensor: Observed, stride: int) -> None:
        name = f"observed.{index}"
        values = tensor.name
        if tensor.data_type != TensorProto.FLOAT:
            values = self._node("Cast", [values], f"onnx_ocs.{name}.float", to=TensorProto.FLOAT)
        steps = tensor.steps(stride)
        whole = max(steps) == 1
        over = [0]
        if tensor.axis == -1:  # (rows, C)
            rows = taken(index) if whole else f"onnx_ocs.{name}.rows"
            values = self._node("Reshape", [values, self.constant(f"{name}.shape", [-1, tensor.channels])], rows)
        else:
            assert tensor.shape is not None
            rank = len(tensor.shape)
            over = [place for place in range(rank) if place != rank + tensor.axis]
        for op, figure in tensor.reductions(stride).items():
            self._reduce(op, values, over, f"{figure}.{index}")
            self._figures.setdefault(figure, []).append(f"{figure}.{index}")
        if not whole:
            axes, by = self.constant(f"{name}.axes", tensor.over), self.constant(f"{name}.steps", steps)
            if tensor.sizes is None:
                by = self._fewer(values, axes, by, len(tensor.over), stride, index)
            start = self._node("Mod", [START, by], f"onnx_ocs.{name}.from")
            ends = self.constant(f"{name}.ends", [LAST] * len(tensor.over))
            self._node("Slice", [values, start, ends, axes, by], taken(index))
        elif tensor.axis < -1:
            self._node("Identity", [values], taken(index))
        self._output(taken(index))
        if not whole and tensor.sizes is None:
            self._output(size(index), TensorProto.INT64)

    def _fewer(self, values: str, axes: str, by: str, rank: int, stride: int, index: int) -> str:
        """The steps of a tensor whose sizes are free, on so many axes: shorter as far as a sample has few values.

        Together they leave out as many values at most as :meth:`Observed.steps` does, the same share on each axis.
        """
        name, number = f"observed.{index}", self._node("Size", [values], size(index))
        least = self._node("Mul", [COUNT, self.constant(f"{name}.enough", [ENOUGH])], f"onnx_ocs.{name}.least")
        share = self._node("Div", [number, least], f"onnx_ocs.{name}.share")
        left = self._node("Min", [share, self.constant(f"{name}.stride", [stride])], f"onnx_ocs.{name}.left")
        if rank > 1:
            root = helper.make_tensor(f"onnx_ocs.{name}.root", TensorProto.FLOAT, [1], [1 / rank])
            self._graph.initializer.append(root)
            real = self._node("Cast", [left], f"onnx_ocs.{name}.real", to=TensorProto.FLOAT)
            side = self._node("Pow", [real, root.name], f"onnx_ocs.{name}.side")
            left = self._node("Cast", [side], f"onnx_ocs.{name}.each", to=TensorProto.INT64)
        shape = self._node("Shape", [values], f"onnx_ocs.{name}.sizes")
        lengths = self._node("Gather", [shape, axes], f"onnx_ocs.{name}.lengths")
        by = self._node("Min", [by, left, lengths], f"onnx_ocs.{name}.fewer")
        return self._node("Max", [by, self.constant(f"{name}.one", [1])], f"onnx_ocs.{name}.by")

    def join(self) -> None:
        """The figures of all tensors behind each other."""
        for figure, names in self._figures.items():
            self._output(self._node("Concat", names, figure, axis=0))

    def _output(self, name: str, data_type: int = TensorProto.FLOAT) -> None:
        self._graph.output.append(helper.make_tensor_value_info(name, data_type, None))

    def _reduce(self, op: str, values: str, axes: list[int], output: str) -> None:
        if self._by_input:
            self._node(op, [values, self.constant(f"{output}.axes", axes)], output, keepdims=0)
        else:
            self._node(op, [values], output, axes=axes, keepdims=0)

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output
