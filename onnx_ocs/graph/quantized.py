"""What QuantizeLinear and DequantizeLinear nodes say, and which operands of layers they stand in front of."""

import functools
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Place, tensor_of
from onnx_ocs.graph.model import Model

STANDARD = (None, "", "ai.onnx")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

ARRANGING = frozenset({"Identity", "Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten"})
"""Nodes that may stand between a DequantizeLinear and the layer that it is for."""

MOVING = ARRANGING - {"Cast"} | {"Clip", "Gather", "Slice", "MaxPool", "Pad", "Concat", "Resize", "Split"}
"""Nodes that may stand on integers, whose type they keep."""

MATRIX = {"Conv": 0, "ConvTranspose": 1, "Gemm": None, "MatMul": None}
"""Layers with weights, and the axis of the outputs in the weight where no attribute decides it."""


@dataclass(frozen=True, eq=False)
class Quantizer:
    """One QuantizeLinear or DequantizeLinear node."""

    place: Place
    scale: NDArray[Any] | None  # none where it is computed at run time
    zero_point: NDArray[Any] | None  # zero where it is left out; none where it is computed at run time
    explicit: bool  # whether the zero point is written
    data_type: int | None  # of the integers; none where it cannot be told
    axis: int | None  # as written
    block_size: int
    constant: bool  # whether it works on constants alone

    @property
    def node(self) -> gs.Node:
        return self.place.node

    @property
    def quantizes(self) -> bool:
        return self.node.op == QUANTIZE

    @property
    def scales(self) -> int:
        """How many scales there are; 1 where they are computed at run time."""
        return 1 if self.scale is None else int(self.scale.size)

    @property
    def is_blocked(self) -> bool:
        return self.block_size > 0 or (self.scale is not None and self.scale.ndim > 1)

    @property
    def per_axis(self) -> bool:
        """Whether there is a scale for each index of an axis."""
        return self.scales > 1 and not self.is_blocked

    def axis_of(self, rank: int) -> int:
        """The axis of the scales in a tensor of ``rank`` dimensions."""
        axis = 1 if self.axis is None else self.axis
        return axis + rank if axis < 0 else axis

    @property
    def type_name(self) -> str:
        return "an unknown type" if self.data_type is None else onnx.TensorProto.DataType.Name(self.data_type)

    def same_grid(self, other: "Quantizer") -> bool:
        """Whether both have the same scale and zero point, known before the model runs."""
        if self.scale is None or other.scale is None or self.zero_point is None or other.zero_point is None:
            return self.node.inputs[1:3] == other.node.inputs[1:3]
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)

    def range(self) -> tuple[float, float]:
        """The least and the largest value that the integers of its type stand for, with one scale."""
        assert self.scale is not None
        assert self.zero_point is not None
        low, high = integer_limits(self.data_type or onnx.TensorProto.UINT8)
        scale, zero = float(self.scale.reshape(-1)[0]), int(self.zero_point.reshape(-1)[0])
        return (low - zero) * scale, (high - zero) * scale


@dataclass(frozen=True, eq=False)
class Operand:
    """What feeds one input of a layer."""

    tensor: gs.Tensor
    dequantizer: Quantizer | None  # the nearest one, behind nodes that only arrange
    through: tuple[gs.Node, ...]  # those nodes, from the layer upwards
    constant: bool  # whether it is made of constants alone

    @property
    def quantized(self) -> bool:
        return self.dequantizer is not None


@dataclass(frozen=True, eq=False)
class MatrixNode:
    """A Conv, ConvTranspose, Gemm or MatMul and its operands."""

    place: Place
    data: Operand
    weight: Operand  # the second operand where neither is constant
    weight_input: int
    output_axis: int | None  # of the outputs in the weight as the layer reads it; none where its rank is not known
    bias: Operand | None

    @property
    def node(self) -> gs.Node:
        return self.place.node

    @property
    def output(self) -> gs.Tensor:
        return self.node.outputs[0]

    @property
    def has_weight(self) -> bool:
        return self.weight.constant


class Wiring:
    """A model read for its quantizers and the layers between them; nothing is edited."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.editor = Editor(model)
        self.places = [Place(node, scope, self.editor) for scope in self.editor.scopes for node in scope.graph.nodes]
        self._by_node = {id(place.node): place for place in self.places}
        self._read: dict[int, Quantizer] = {}

    @functools.cached_property
    def quantizers(self) -> list[Quantizer]:
        return [self.quantizer(place.node) for place in self.places if is_quantizer(place.node)]

    @functools.cached_property
    def layers(self) -> list[MatrixNode]:
        """Every Conv, ConvTranspose, Gemm and MatMul, bodies and functions included."""
        return [self._layer(place) for place in self.places if _is_matrix(place.node)]

    def place(self, node: gs.Node) -> Place:
        return self._by_node[id(node)]

    def quantizer(self, node: gs.Node) -> Quantizer:
        """What a QuantizeLinear or DequantizeLinear says."""
        if id(node) not in self._read:
            self._read[id(node)] = self._quantizer(node)
        return self._read[id(node)]

    def _quantizer(self, node: gs.Node) -> Quantizer:
        zero = _input(node, 2)
        written = node.attrs.get("axis")
        return Quantizer(
            self.place(node),
            self.value(_input(node, 1)),
            np.zeros((), np.int64) if zero is None else self.value(zero),
            zero is not None,
            self._data_type(node),
            written if isinstance(written, int) else None,
            _number(node, "block_size"),
            self.is_constant(node.inputs[0]),
        )

    def operand(self, tensor: gs.Tensor) -> Operand:
        """What feeds ``tensor``."""
        through, top = climb(tensor, ARRANGING)
        maker = maker_of(top)
        if maker is not None and is_quantizer(maker) and maker.op == DEQUANTIZE:
            found = self.quantizer(maker)
            return Operand(tensor, found, tuple(through), found.constant)
        return Operand(tensor, None, tuple(through), self.is_constant(tensor))

    def is_constant(self, tensor: gs.Tensor) -> bool:
        """Whether ``tensor`` is a constant, or made of one by nodes that arrange or quantize it."""
        _, top = climb(tensor, MOVING | {"Cast", QUANTIZE, DEQUANTIZE})
        return tensor_of(top) is not None or isinstance(top, gs.Constant)

    def value(self, tensor: gs.Tensor | None) -> NDArray[Any] | None:
        """The values of a constant, or of one behind Identity nodes; none where they are computed at run time."""
        if tensor is None:
            return None
        proto = tensor_of(climb(tensor, {"Identity"})[1])
        return None if proto is None else self.model.read(proto)

    def shape(self, tensor: gs.Tensor) -> tuple[int | None, ...] | None:
        """The dimensions of ``tensor`` where they are known."""
        _, top = climb(tensor, {QUANTIZE, DEQUANTIZE, "Cast", "Identity"})
        proto = tensor_of(top)
        return self.editor.shapes.get(tensor.name) if proto is None else tuple(proto.dims)

    def is_output(self, tensor: gs.Tensor) -> bool:
        return self.editor.is_result(tensor)

    def sole_reader(self, tensor: gs.Tensor) -> gs.Node | None:
        """The node that alone reads ``tensor``, which is no output of its graph."""
        readers = list(tensor.outputs)
        return readers[0] if len(readers) == 1 and not self.is_output(tensor) else None

    def origin(self, dequantizer: Quantizer) -> tuple[gs.Node | None, list[gs.Node]]:
        """The QuantizeLinear that makes the integers of ``dequantizer``, and the nodes between the two."""
        between, top = climb(dequantizer.node.inputs[0], MOVING)
        maker = maker_of(top)
        return (maker if maker is not None and maker.op == QUANTIZE else None), between

    def _data_type(self, node: gs.Node) -> int | None:
        if (zero := _input(node, 2)) is not None and (proto := tensor_of(zero)) is not None:
            return int(proto.data_type)
        if node.op == QUANTIZE:
            return _number(node, "output_dtype") or int(onnx.TensorProto.UINT8)
        return self._element_type(node.inputs[0])

    def _element_type(self, tensor: gs.Tensor) -> int | None:
        _, top = climb(tensor, MOVING)
        if (proto := tensor_of(top)) is not None:
            return int(proto.data_type)
        maker = maker_of(top)
        if maker is not None:
            return self._data_type(maker) if maker.op == QUANTIZE else None
        return _onnx_type(getattr(top, "dtype", None))

    def _layer(self, place: Place) -> MatrixNode:
        node = place.node
        operands = [self.operand(tensor) for tensor in node.inputs[:2]]
        left = node.op in ("Gemm", "MatMul") and operands[0].constant and not operands[1].constant
        index = 0 if left else 1
        bias = _input(node, 2)
        return MatrixNode(
            place,
            operands[1 - index],
            operands[index],
            index,
            self._output_axis(node, index, operands[index]),
            None if bias is None else self.operand(bias),
        )

    def _output_axis(self, node: gs.Node, index: int, weight: Operand) -> int | None:
        if node.op == "Gemm":
            transposed = bool(_number(node, "transB" if index else "transA"))
            return int(bool(index) != transposed)
        if node.op == "MatMul":
            shape = self.shape(weight.tensor)
            return None if shape is None or len(shape) < 2 else len(shape) - (1 if index else 2)
        return MATRIX[node.op]


def is_quantizer(node: gs.Node) -> bool:
    return (
        node.op in (QUANTIZE, DEQUANTIZE)
        and node.domain in (*STANDARD, "com.microsoft")
        and len(node.inputs) > 1
        and bool(node.outputs)
    )


def maker_of(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes ``tensor``."""
    return tensor.inputs[0] if tensor.inputs else None


def climb(tensor: gs.Tensor, ops: Container[str]) -> tuple[list[gs.Node], gs.Tensor]:
    """Upwards along first inputs through nodes of the types ``ops``: the nodes, and the tensor above them."""
    passed: list[gs.Node] = []
    seen: set[int] = set()
    while (maker := maker_of(tensor)) is not None and maker.op in ops and maker.inputs and id(maker) not in seen:
        seen.add(id(maker))
        passed.append(maker)
        tensor = maker.inputs[0]
    return passed, tensor


def integer_limits(data_type: int) -> tuple[int, int]:
    """The least and the largest integer of an ONNX type such as INT8 or UINT4."""
    name = onnx.TensorProto.DataType.Name(data_type)
    bits = int("".join(char for char in name if char.isdigit()) or 8)
    return (0, 2**bits - 1) if name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _is_matrix(node: gs.Node) -> bool:
    return node.op in MATRIX and node.domain in STANDARD and len(node.inputs) > 1 and bool(node.outputs)


def _input(node: gs.Node, index: int) -> gs.Tensor | None:
    """Input ``index`` of ``node``; none where it is left out."""
    given = index < len(node.inputs) and bool(node.inputs[index].name or isinstance(node.inputs[index], gs.Constant))
    return node.inputs[index] if given else None


def _number(node: gs.Node, attribute: str) -> int:
    """An integer attribute; 0 where it is left out or set by the caller of a function."""
    value = node.attrs.get(attribute, 0)
    return value if isinstance(value, int) else 0


def _onnx_type(kind: Any) -> int | None:
    """The element type that onnx-graphsurgeon gives a tensor, which is of numpy where numpy has it."""
    if kind is None or isinstance(kind, int):
        return kind
    try:
        return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    except (TypeError, KeyError, ValueError):
        return None
