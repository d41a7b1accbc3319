"""Operators that multiply a constant weight by data: where the weight is, and which axes hold its channels.

A new operator is one more function registered by :func:`reads`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnx_ocs.graph.editor import Editor, Scope
from onnx_ocs.graph.model import Model, numpy_type

FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}


@dataclass(frozen=True)
class Arranged:
    """One node that a weight passes through."""

    op: str
    argument: tuple[int, ...]  # the permutation, the shape, or the element type


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant and the nodes between it and the layer that reads it."""

    tensor: onnx.TensorProto
    home: Scope  # the graph that holds the constant
    through: tuple[Arranged, ...]  # in the order they are applied
    data_type: int  # as the layer reads it
    shape: tuple[int, ...]  # as the layer reads it

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two layers that read the same values."""
        return (id(self.home), self.tensor.name, self.through)

    def read(self, model: Model, cast: bool = True) -> NDArray[Any]:
        """The values as the layer reads them; a view of the source where no node changes them."""
        values = model.read(self.tensor)
        for step in self.through:
            if cast or step.op != "Cast":
                values = THROUGH[step.op].apply(values, step.argument)
        return values


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight of one node, and where its data comes in."""

    node: gs.Node
    scope: Scope
    name: str
    weight: Weight
    weight_input: int
    data_input: int
    data_axis: int  # of the channels, from the end
    input_axis: int  # of the weight: (C / groups) or, with ``groups_on_input``, (C)
    output_axis: int | None  # of the weight; none for a vector
    groups: int = 1
    groups_on_input: bool = False  # the groups stand behind each other along the input axis, not the output axis
    kernel: bool = False  # an output is a sum over the other axes of the weight as well

    @property
    def channels(self) -> int:
        """Channels of the data in the source."""
        held = self.weight.shape[self.input_axis]
        return held if self.groups_on_input else held * self.groups

    @property
    def data(self) -> gs.Tensor:
        return self.node.inputs[self.data_input]


@dataclass(frozen=True, eq=False)
class Declined:
    """A node that is left as it is, and why."""

    node: gs.Node
    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Place:
    """A node and the graph it stands in."""

    node: gs.Node
    scope: Scope
    editor: Editor

    @property
    def model(self) -> Model:
        return self.editor.model

    def weight(self, index: int) -> Weight | str:
        """The constant behind input ``index``, or why there is none."""
        return constant_behind(self.node.inputs[index], self)

    def values(self, index: int) -> NDArray[Any] | None:
        """The values of input ``index`` if it is a constant of any type."""
        proto = tensor_of(self.node.inputs[index])
        return None if proto is None else self.model.read(proto)

    def integer(self, attribute: str, default: int) -> int:
        value = self.node.attrs.get(attribute, default)
        if isinstance(value, gs.Node.AttributeRef):
            raise Refused(f"attribute {attribute!r} is set by the caller of the function")
        return int(value)


class Refused(Exception):
    """The reason why a node is declined."""


Read = Callable[[Place], Layer]
READERS: dict[str, Read] = {}
OTHERS: dict[str, str] = {
    "LSTM": "recurrent layers are not covered yet",
    "GRU": "recurrent layers are not covered yet",
    "RNN": "recurrent layers are not covered yet",
    "QLinearConv": "already quantized",
    "QLinearMatMul": "already quantized",
    "ConvInteger": "already quantized",
    "MatMulInteger": "already quantized",
    "MatMulNBits": "already quantized",
}
"""Operators with weights that are left alone, and why."""


def reads(op: str) -> Callable[[Read], Read]:
    """Register what is known of an operator of the standard domain."""

    def register(function: Read) -> Read:
        READERS[op] = function
        return function

    return register


def find_layers(editor: Editor) -> list[Layer | Declined]:
    """Every layer of the model in the order of its nodes, bodies and functions included."""
    found: list[Layer | Declined] = []
    for scope in editor.scopes:
        for node in scope.graph.nodes:
            if (layer := read_node(Place(node, scope, editor))) is not None:
                found.append(layer)
    return found


def read_node(place: Place) -> Layer | Declined | None:
    """What ``place`` is: a layer, one that is declined, or no layer at all."""
    node = place.node
    if node.op in OTHERS:
        return Declined(node, name_of(place), OTHERS[node.op])
    if node.domain not in (None, "", "ai.onnx"):
        if any(word in node.op for word in ("Conv", "MatMul", "Gemm", "Attention")):
            return Declined(node, name_of(place), f"operator {node.domain}::{node.op} is not covered")
        return None
    if node.op not in READERS:
        return None
    try:
        if place.scope.hides_outer_names:
            raise Refused("its graph reuses the name of an outer constant; rename it")
        return READERS[node.op](place)
    except Refused as reason:
        return Declined(node, name_of(place), str(reason))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        return Declined(node, name_of(place), f"its weight or attributes cannot be read ({error})")


def name_of(place: Place) -> str:
    """The node's name, or its first output where it has none, behind the path of its graph."""
    node = place.node
    return place.scope.path + (node.name or next((out.name for out in node.outputs if out.name), node.op))


@reads("Conv")
def conv(place: Place) -> Layer:
    """data (N, C, *spatial), weight (M, C / group, *kernel)."""
    weight, groups = _weight(place, 1, at_least=3), place.integer("group", 1)
    axes = {"data_axis": 1 - len(weight.shape), "input_axis": 1, "output_axis": 0}
    return _layer(place, weight, 1, 0, **axes, groups=groups, kernel=place.node.op == "Conv")


@reads("ConvTranspose")
def conv_transpose(place: Place) -> Layer:
    """data (N, C, *spatial), weight (C, M / group, *kernel); depthwise it is that of a Conv."""
    weight, groups = _weight(place, 1, at_least=3), place.integer("group", 1)
    if weight.shape[:2] == (groups, 1):
        return conv(place)
    axes = {"data_axis": 1 - len(weight.shape), "input_axis": 0, "output_axis": 1}
    return _layer(place, weight, 1, 0, **axes, groups=groups, groups_on_input=groups > 1)


@reads("Gemm")
def gemm(place: Place) -> Layer:
    """alpha * A' B' + beta * C: A (M, K) or, transposed, (K, M); B (K, N) or (N, K). The weight may be either."""
    transposed = [place.integer("transA", 0), place.integer("transB", 0)]
    contracted = [0 if transposed[0] else 1, 1 if transposed[1] else 0]
    side, weight = _weight_side(place, at_least=2)
    axis, across = contracted[side], contracted[1 - side] - 2
    return _layer(place, weight, side, 1 - side, data_axis=across, input_axis=axis, output_axis=1 - axis)


@reads("MatMul")
def matmul(place: Place) -> Layer:
    """(..., M, K) times (..., K, N), as numpy.matmul: the weight may be on either side, batched, or a vector."""
    side, weight = _weight_side(place, at_least=1)
    rank = len(weight.shape)
    if side == 1:
        axis, other = (rank - 2, rank - 1) if rank > 1 else (0, None)
        return _layer(place, weight, 1, 0, data_axis=-1, input_axis=axis, output_axis=other)
    data_rank = place.editor.ranks.get(place.node.inputs[1].name)
    if data_rank is None:
        raise Refused("the weight is on the left and the rank of the data is not known; run shape inference first")
    other = rank - 2 if rank > 1 else None
    return _layer(place, weight, 0, 1, data_axis=-2 if data_rank > 1 else -1, input_axis=rank - 1, output_axis=other)


def _weight_side(place: Place, at_least: int) -> tuple[int, Weight]:
    """Which of the two operands is the weight."""
    found = [place.weight(0), place.weight(1)]
    constant = [side for side in (0, 1) if isinstance(found[side], Weight)]
    if len(constant) == 2:
        raise Refused("both operands are constants; fold them first")
    if not constant:
        known = [str(why) for why in found if not any(words in str(why) for words in ("run time", "input of the"))]
        raise Refused(known[0] if known else "it multiplies two values that are computed at run time")
    return constant[0], _weight(place, constant[0], at_least)


def _weight(place: Place, index: int, at_least: int) -> Weight:
    """The weight at input ``index`` if it is one that can be split and quantized."""
    weight = place.weight(index)
    if isinstance(weight, str):
        raise Refused(weight)
    if len(weight.shape) < at_least:
        raise Refused(f"its weight has {len(weight.shape)} dimensions where {at_least} are needed")
    if 0 in weight.shape:
        raise Refused("its weight is empty")
    return weight


def _layer(place: Place, weight: Weight, weight_input: int, data_input: int, **axes: Any) -> Layer:
    groups = axes.get("groups", 1)
    held = weight.shape[axes["input_axis" if axes.get("groups_on_input") else "output_axis"] or 0]
    if groups < 1 or (groups > 1 and held % groups):
        raise Refused(f"{held} channels do not make {groups} groups")
    if isinstance(place.weight(data_input), Weight):
        raise Refused("both operands are constants; fold them first")
    return Layer(place.node, place.scope, name_of(place), weight, weight_input, data_input, **axes)


def constant_behind(tensor: gs.Tensor, place: Place) -> Weight | str:
    """The constant that ``tensor`` is, or is made of by nodes that only arrange it; else why there is none."""
    through: list[Arranged] = []
    while (source := tensor_of(tensor)) is None:
        if isinstance(tensor, gs.Constant):
            return "its weight is a constant of no tensor"
        if not tensor.inputs:
            return f"its weight is an input of the {'function' if place.scope.is_function else 'graph'}"
        node = tensor.inputs[0]
        if node.op == "DequantizeLinear":
            return "already quantized"
        if node.op not in THROUGH or node.domain not in (None, "", "ai.onnx"):
            return "its weight is computed at run time"
        argument = THROUGH[node.op].argument(node, place.model)
        if argument is None:
            return f"its weight goes through a {node.op} that is decided at run time"
        through.insert(0, Arranged(node.op, argument))
        tensor = node.inputs[0]
    home: Scope | None = place.scope
    while home is not None and not home.holds(tensor):
        home = home.parent
    if home is None:
        return "its weight is computed at run time"
    kinds = [source.data_type, *(step.argument[0] for step in through if step.op == "Cast")]
    if not FLOATS.issuperset(kinds):
        return f"its weight is of type {onnx.TensorProto.DataType.Name(source.data_type)}"
    weight = Weight(source, home, tuple(through), kinds[-1], ())
    return replace(weight, shape=weight.read(place.model, cast=False).shape)


SHORT = (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32), ("value_floats", np.float32))
"""Attributes of a Constant node that hold its value, and the types they have."""


def tensor_of(tensor: gs.Tensor) -> onnx.TensorProto | None:
    """The proto of an initializer or of the value of a Constant node, under the name it is read by."""
    values = tensor._values if isinstance(tensor, gs.Constant) else None
    if values is None and tensor.inputs and tensor.inputs[0].op == "Constant":
        attributes = tensor.inputs[0].attrs
        for key, kind in SHORT:
            if key in attributes:
                return onnx.numpy_helper.from_array(np.array(attributes[key], kind), tensor.name)
        value = attributes.get("value")
        values = value._values if isinstance(value, gs.Constant) else None
    if not isinstance(values, LazyValues) or isinstance(values, SparseValues):
        return None
    proto = onnx.TensorProto()
    proto.CopyFrom(values.tensor)
    proto.name = tensor.name
    return proto


@dataclass(frozen=True)
class _Arranger:
    """What is known of an operator that only arranges values."""

    argument: Callable[[gs.Node, Model], tuple[int, ...] | None]  # none where it is decided at run time
    apply: Callable[[NDArray[Any], tuple[int, ...]], NDArray[Any]]


def _permutation(node: gs.Node, model: Model) -> tuple[int, ...]:
    return tuple(node.attrs.get("perm", ()))


def _shape(node: gs.Node, model: Model) -> tuple[int, ...] | None:
    """The sizes asked for: 0 copies a size, unless ``allowzero`` says that it is one."""
    if "shape" in node.attrs:  # before opset 5
        return tuple(node.attrs["shape"])
    if len(node.inputs) < 2 or (proto := tensor_of(node.inputs[1])) is None or node.attrs.get("allowzero", 0):
        return None
    return tuple(model.read(proto).tolist())


def _reshaped(values: NDArray[Any], wanted: tuple[int, ...]) -> NDArray[Any]:
    return values.reshape([values.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)])


THROUGH = {
    "Identity": _Arranger(lambda node, model: (), lambda values, _: values),
    "Transpose": _Arranger(_permutation, lambda values, axes: values.transpose(axes or None)),
    "Reshape": _Arranger(_shape, _reshaped),
    "Cast": _Arranger(lambda node, model: (int(node.attrs["to"]),), lambda v, kind: v.astype(numpy_type(kind[0]))),
}
"""Nodes that a weight may pass through on its way to a layer, and what they do to it."""
