"""Streams of channels: tensors that hold the same channels, from the layers that make them to those that read them.

Where every reader of a stream can take a channel twice, its makers can make it twice, and no copy is needed at run time
(as Net2WiderNet widens a layer: Chen et al., ICLR 2016, arXiv:1511.05641). What an operator does with channels is one
function registered by :func:`carries`; it says where they come in and go out, and which of its constants have a value
for each of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor, Scope
from onnx_ocs.graph.layers import READERS, Layer, Place, Refused, Weight

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Passage:
    """How channels pass one node. Axes are counted from the end."""

    inputs: Mapping[int, int]  # input -> axis of its channels
    output: int  # axis of the channels of the first output
    joined: bool = False  # the inputs' channels stand behind each other, or else they are the same channels
    block: int = 1  # positions of the output for each channel of the input, one behind the other
    constants: Mapping[int, int] = field(default_factory=dict)  # input -> axis of the constant that holds channels
    shape: int | None = None  # the input that holds the shape of the output, which becomes "all that remains"
    homogeneous: bool = False  # a positive factor of a channel passes on to the output


@dataclass(frozen=True, eq=False)
class Stream:
    """Tensors of one graph that hold the same channels."""

    scope: Scope
    ids: Mapping[str, Ids]  # tensor -> which channel of the stream each of its channels is
    channels: int
    makers: tuple[Layer, ...]  # whose output channels they are
    readers: tuple[Layer, ...]  # whose data they are
    depthwise: tuple[Layer, ...]  # which carry each channel by itself
    passages: tuple[tuple[gs.Node, Passage], ...]  # of all nodes between, in the order of the graph
    homogeneous: bool  # whether a positive factor of a channel passes from the makers to the readers

    def sources(self, copies: NDArray[np.int64]) -> dict[str, Ids]:
        """Of each tensor, which of its channels each channel copies once channel ``c`` of the stream has ``copies[c]``.

        Raises:
            Refused: two tensors that meet would hold their copies in different orders.
        """
        made: dict[str, Ids] = {}
        for layer in self.makers:
            name = layer.node.outputs[0].name
            made[name] = np.repeat(np.arange(len(self.ids[name])), copies[self.ids[name]])
        for node, passage in self.passages:
            parts = [made[node.inputs[index].name] for index in passage.inputs]
            if passage.joined:
                starts = np.cumsum([0, *(len(self.ids[node.inputs[index].name]) for index in passage.inputs)])
                whole = np.concatenate([part + start for part, start in zip(parts, starts, strict=False)])
            else:
                whole = parts[0]
                if any(not np.array_equal(part, whole) for part in parts):
                    raise Refused(f"{node.op} {node.name!r} reads the copies in different orders")
            made[node.outputs[0].name] = (whole[:, None] * passage.block + np.arange(passage.block)).reshape(-1)
        return made


@dataclass(frozen=True, eq=False)
class Crossing:
    """A node that a stream reaches, at the input or the output with the channels on ``axis``."""

    node: gs.Node
    place: Place
    axis: int
    input: int | None  # where it comes in; None if it is followed upwards, from the first output

    def shape(self, index: int) -> tuple[int | None, ...]:
        """The dimensions of an input; none if free."""
        return self._shape(self.node.inputs[index])

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        return self._shape(self.node.outputs[0])

    def _shape(self, tensor: gs.Tensor) -> tuple[int | None, ...]:
        found = self.place.editor.shapes.get(tensor.name)
        if found is None:
            raise Refused(f"the shape of {tensor.name!r} is not known")
        return found

    def constant(self, index: int) -> NDArray[Any]:
        """The values of a constant input."""
        if index >= len(self.node.inputs):
            raise Refused(f"{self.node.op} has no input {index}")
        tensor = self.node.inputs[index]
        weight = self.place.values(index)
        if weight is None:
            raise Refused(f"{tensor.name!r} is decided at run time")
        return weight

    def is_constant(self, index: int) -> bool:
        return isinstance(self.place.weight(index), Weight)


Rule = Callable[[Crossing], Passage]
RULES: dict[str, Rule] = {}


def carries(*ops: str) -> Callable[[Rule], Rule]:
    """Register how channels pass operators of these types; the function raises Refused where they do not."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


@carries("Sigmoid", "Tanh", "Elu", "Selu", "Celu", "HardSigmoid", "HardSwish", "Softplus", "Softsign", "Erf", "Gelu")
@carries("Mish", "Exp", "Log", "Neg", "Abs", "Sqrt", "Reciprocal", "Floor", "Ceil", "Round", "Sin", "Cos", "Clip")
@carries("QuantizeLinear", "DequantizeLinear", "Cast")
def each_value(at: Crossing) -> Passage:
    """Each value by itself: the channels stay where they are."""
    if at.node.op in ("QuantizeLinear", "DequantizeLinear") and at.constant(1).size > 1:
        raise Refused(f"{at.node.op} has a scale for each channel")
    return Passage({0: at.axis}, at.axis)


@carries("Relu", "LeakyRelu", "ThresholdedRelu", "Identity", "Dropout")
def each_value_in_proportion(at: Crossing) -> Passage:
    """As above; ``f(g x) = g f(x)`` for ``g > 0`` (but not for ThresholdedRelu, whose threshold stays)."""
    if any(out.outputs for out in at.node.outputs[1:]):
        raise Refused(f"{at.node.op} makes a mask that is read")
    return Passage({0: at.axis}, at.axis, homogeneous=at.node.op != "ThresholdedRelu")


@carries("PRelu")
def prelu(at: Crossing) -> Passage:
    """A slope for each channel, or one for all."""
    return Passage({0: at.axis}, at.axis, constants=_per_channel(at, 1), homogeneous=True)


@carries("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool")
def pooling(at: Crossing) -> Passage:
    """(N, C, *spatial): channels on axis 1 are pooled each by itself."""
    rank = len(at.shape(0))
    if at.axis != 1 - rank:
        raise Refused(f"{at.node.op} pools along the channels")
    if any(out.outputs for out in at.node.outputs[1:]):
        raise Refused(f"{at.node.op} makes indices that are read")
    return Passage({0: at.axis}, at.axis, homogeneous=True)


@carries("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow")
def two_values(at: Crossing) -> Passage:
    """Operands broadcast from the end; each has the same channels, or one value for all of them."""
    inputs: dict[int, int] = {}
    constants: dict[int, int] = {}
    for index, tensor in enumerate(at.node.inputs):
        if at.is_constant(index):
            constants |= _per_channel(at, index)
            continue
        if index == at.input:
            inputs[index] = at.axis
            continue
        shape = at.shape(index)
        if len(shape) < -at.axis or shape[at.axis] == 1:
            continue
        if shape[at.axis] is None:
            raise Refused(f"the channels of {tensor.name!r} are not counted")
        inputs[index] = at.axis
    if not inputs:
        raise Refused(f"{at.node.op} {at.node.name!r} makes its channels of single values")
    both = len(inputs) == len(at.node.inputs)
    keeps = (at.node.op in ("Add", "Sub", "Max", "Min") and both) or (
        at.node.op in ("Mul", "Div") and list(inputs) == [0]
    )
    return Passage(inputs, at.axis, constants=constants, homogeneous=keeps)


@carries("BatchNormalization", "InstanceNormalization")
def normalization(at: Crossing) -> Passage:
    """(N, C, *spatial): a scale and a shift for each channel."""
    if at.axis != 1 - len(at.shape(0)) or any(out.outputs for out in at.node.outputs[1:]):
        raise Refused(f"{at.node.op} normalizes something else than these channels")
    constants = range(1, len(at.node.inputs))
    if not all(at.is_constant(index) for index in constants):
        raise Refused(f"{at.node.op} has parameters that are computed at run time")
    return Passage({0: at.axis}, at.axis, constants=dict.fromkeys(constants, -1))


@carries("Concat")
def concat(at: Crossing) -> Passage:
    """Channels behind each other, or other axes behind each other with the same channels."""
    rank, axis = len(at.shape(0)), int(at.node.attrs["axis"])
    along = axis - rank if axis >= 0 else axis
    inputs = dict.fromkeys(range(len(at.node.inputs)), at.axis)
    if any(at.is_constant(index) for index in inputs):
        raise Refused("Concat joins a constant")
    return Passage(inputs, at.axis, joined=along == at.axis, homogeneous=True)


@carries("Pad")
def pad(at: Crossing) -> Passage:
    """Not along the channels; a border that is not zero does not grow with its channel."""
    rank, pads = len(at.shape(0)), at.constant(1).reshape(2, -1)
    axes = at.constant(3).tolist() if len(at.node.inputs) > 3 and at.node.inputs[3].name else list(range(rank))
    padded = {int(axis) % rank for axis, before, behind in zip(axes, *pads, strict=True) if before or behind}
    if at.axis % rank in padded:
        raise Refused("Pad adds channels")
    filled = at.node.attrs.get("mode", "constant") == "constant" and len(at.node.inputs) > 2 and at.node.inputs[2].name
    return Passage({0: at.axis}, at.axis, homogeneous=not filled)


@carries("Slice")
def slices(at: Crossing) -> Passage:
    """Not along the channels."""
    rank = len(at.shape(0))
    count = len(at.constant(1))
    axes = at.constant(3).tolist() if len(at.node.inputs) > 3 and at.node.inputs[3].name else list(range(count))
    if at.axis % rank in {int(axis) % rank for axis in axes}:
        raise Refused("Slice takes some of the channels")
    return Passage({0: at.axis}, at.axis, homogeneous=True)


@carries("Resize", "Upsample")
def resize(at: Crossing) -> Passage:
    """By factors, of which that of the channels is 1."""
    rank, index = len(at.shape(0)), 2 if at.node.op == "Resize" else 1
    if "axes" in at.node.attrs or len(at.node.inputs) <= index or not at.node.inputs[index].name:
        raise Refused(f"{at.node.op} is given the sizes of its output")
    factors = at.constant(index)
    if len(factors) != rank or factors[at.axis] != 1:
        raise Refused(f"{at.node.op} changes the number of channels")
    linear = at.node.attrs.get("mode", "nearest") in ("nearest", "linear")
    return Passage({0: at.axis}, at.axis, homogeneous=linear)


@carries("Transpose")
def transpose(at: Crossing) -> Passage:
    """The channels move to another axis."""
    rank = len(at.shape(0))
    order = list(at.node.attrs.get("perm", range(rank)[::-1]))
    if at.input is None:
        return Passage({0: order[at.axis] - rank}, at.axis, homogeneous=True)
    return Passage({0: at.axis}, order.index(at.axis % rank) - rank, homogeneous=True)


@carries("Flatten")
def flatten(at: Crossing) -> Passage:
    """(N, C, *spatial) to (N, C * spatial): as many features of each channel as it has positions."""
    shape = at.shape(0)
    axis = int(at.node.attrs.get("axis", 1))
    if (axis if axis >= 0 else axis + len(shape)) != 1:
        raise Refused("Flatten keeps more than the first axis")
    return _flat(at, shape)


@carries("Reshape")
def reshape(at: Crossing) -> Passage:
    """As Flatten; any other form loses track of the channels."""
    shape, wanted = at.shape(0), at.constant(1).tolist()
    features = None if None in shape[1:] else int(np.prod([size for size in shape[1:] if size is not None]))
    first = {0, -1, shape[0]} if shape[0] is not None else {0, -1}
    if len(shape) < 2 or len(wanted) != 2 or wanted[0] not in first or wanted[1] not in (-1, features):
        raise Refused("Reshape to another form than a row of features for each sample")
    if wanted[0] == 0 and at.node.attrs.get("allowzero", 0):
        raise Refused("Reshape to a size of zero")
    return _flat(at, shape, None if wanted == [0, -1] else 1)


@carries("Squeeze")
def squeeze(at: Crossing) -> Passage:
    """Axes of one value behind the channels go."""
    return _fewer(at, at.shape(0), at.constant(1).tolist())


@carries("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2")
def reduction(at: Crossing) -> Passage:
    """Over other axes than that of the channels."""
    shape = at.shape(0)
    axes = at.node.attrs.get("axes")
    if axes is None:
        axes = at.constant(1).tolist()
    return _fewer(at, shape, axes, bool(at.node.attrs.get("keepdims", 1)))


def _fewer(at: Crossing, shape: tuple[int | None, ...], axes: list[int], kept: bool = False) -> Passage:
    """Without ``axes``, which are counted from the front or the end."""
    rank = len(shape)
    gone = {int(axis) % rank for axis in axes}
    places = [axis for axis in range(rank) if kept or axis not in gone]
    came = places[at.axis] if at.input is None else at.axis % rank
    if came in gone:
        raise Refused(f"{at.node.op} is over the channels")
    return Passage({0: came - rank}, places.index(came) - len(places), homogeneous=True)


def _flat(at: Crossing, shape: tuple[int | None, ...], given: int | None = None) -> Passage:
    rank = len(shape)
    if at.input is not None and at.axis != 1 - rank:
        raise Refused(f"{at.node.op} mixes the channels with what is in front of them")
    behind = [size for size in shape[2:] if size is not None]
    if len(behind) < rank - 2:
        raise Refused(f"{at.node.op} makes features of positions that are not counted")
    return Passage({0: 1 - rank}, -1, block=int(np.prod(behind)), shape=given, homogeneous=True)


def _per_channel(at: Crossing, index: int) -> dict[int, int]:
    """The constant input ``index`` if it has a value for each channel; nothing if it has one for all."""
    found = at.place.weight(index)
    if not isinstance(found, Weight):
        raise Refused(f"{at.node.inputs[index].name!r} is computed at run time")
    if len(found.shape) < -at.axis or found.shape[at.axis] == 1:
        return {}
    return {index: at.axis}


def output_axis(layer: Layer) -> int:
    """Where the channels lie that a layer makes, from the end.

    Raises:
        Refused: it makes none that can be made twice.
    """
    if layer.groups > 1:
        raise Refused(f"{layer.node.op} {layer.name!r} makes channels in groups")
    if layer.output_axis is None:
        raise Refused(f"{layer.node.op} {layer.name!r} makes no channels")
    if layer.node.op in ("Conv", "ConvTranspose"):
        return layer.data_axis
    return -1 if layer.weight_input == 1 else -2


def bias_axis(layer: Layer) -> int | None:
    """Where the channels lie in the bias that ``layer`` adds, from the end; None if it adds none."""
    node = layer.node
    if node.op not in ("Conv", "ConvTranspose", "Gemm") or len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    return output_axis(layer) if node.op == "Gemm" else -1  # (M,)


def is_depthwise(layer: Layer) -> bool:
    """Whether a Conv carries each channel by itself."""
    shape = layer.weight.shape
    return layer.node.op == "Conv" and layer.groups == layer.channels == shape[0] and shape[1] == 1


def stream_of(editor: Editor, layer: Layer, layers: Mapping[int, Layer]) -> Stream | str:
    """The stream that the data of ``layer`` is part of, or why its channels cannot be made twice.

    Args:
        layers: those that may be edited, by the id of their nodes.
    """
    try:
        return _Flood(editor, layer.scope, layers).follow(layer.data, layer.data_axis, layer.channels)
    except Refused as reason:
        return str(reason)


class _Flood:
    """Follows channels from one tensor over all that is connected with it."""

    def __init__(self, editor: Editor, scope: Scope, layers: Mapping[int, Layer]) -> None:
        self._editor, self._scope, self._layers = editor, scope, layers
        self._order = {id(node): place for place, node in enumerate(scope.graph.nodes)}
        self._parent: list[int] = []
        self._ids: dict[str, Ids] = {}
        self._axes: dict[str, int] = {}
        self._waiting: list[gs.Tensor] = []
        self._makers: dict[int, Layer] = {}
        self._readers: dict[int, Layer] = {}
        self._passages: dict[int, tuple[gs.Node, Passage]] = {}
        self._depthwise: dict[int, Layer] = {}

    def follow(self, tensor: gs.Tensor, axis: int, channels: int) -> Stream:
        self._reach(tensor, axis, self._fresh(channels))
        while self._waiting:
            self._leave(self._waiting.pop())
        roots = {name: np.array([self._root(i) for i in ids.tolist()]) for name, ids in self._ids.items()}
        known = np.unique(np.concatenate(list(roots.values())))
        ids = {name: np.searchsorted(known, found) for name, found in roots.items()}
        for reader in self._readers.values():
            if len(np.unique(ids[reader.data.name])) < len(known):
                raise Refused(f"{reader.node.op} {reader.name!r} reads only some of the channels")
        passages = tuple(sorted(self._passages.values(), key=lambda item: self._order[id(item[0])]))
        stream = Stream(
            self._scope,
            ids,
            len(known),
            tuple(self._makers.values()),
            tuple(self._readers.values()),
            tuple(self._depthwise.values()),
            passages,
            all(passage.homogeneous for _, passage in passages),
        )
        stream.sources(np.full(len(known), 2))
        return stream

    def _reach(self, tensor: gs.Tensor, axis: int, ids: Ids) -> None:
        """The channels of ``tensor`` are ``ids``."""
        name = tensor.name
        if name not in self._ids:
            self._ids[name], self._axes[name] = ids, axis
            self._waiting.append(tensor)
            return
        if self._axes[name] != axis or len(self._ids[name]) != len(ids):
            raise Refused(f"the channels of {name!r} are read along different axes")
        for one, other in zip(self._ids[name].tolist(), ids.tolist(), strict=True):
            self._parent[self._root(one)] = self._root(other)

    def _leave(self, tensor: gs.Tensor) -> None:
        """Go on to the maker of ``tensor`` and to all that reads it."""
        name = tensor.name
        if self._editor.is_result(tensor):
            raise Refused(f"{name!r} is an output of the graph")
        if len(tensor.inputs) != 1:
            raise Refused(f"{name!r} is an input of the graph" if not tensor.inputs else f"{name!r} has several makers")
        for node in [tensor.inputs[0], *tensor.outputs]:
            if id(node) not in self._order:
                raise Refused(f"{name!r} is read inside of a body")
        self._enter(tensor.inputs[0], None, tensor)
        for node in tensor.outputs:
            for index, read in enumerate(node.inputs):
                if read is tensor:
                    self._enter(node, index, tensor)

    def _enter(self, node: gs.Node, index: int | None, tensor: gs.Tensor) -> None:
        if id(node) in self._passages:
            return
        axis, layer = self._axes[tensor.name], self._layers.get(id(node))
        if layer is not None and is_depthwise(layer):
            self._add(layer)
            self._depthwise[id(node)] = layer
            self._pass(node, Passage({0: layer.data_axis}, layer.data_axis, homogeneous=True))
        elif layer is not None and index is None:
            if output_axis(layer) != axis:
                raise Refused(f"the channels of {tensor.name!r} are not those that {node.op} {layer.name!r} makes")
            self._add(layer)
            self._makers[id(node)] = layer
        elif layer is not None:
            if index != layer.data_input or axis != layer.data_axis or layer.groups > 1:
                raise Refused(f"{node.op} {layer.name!r} reads the channels in groups or along another axis")
            self._readers[id(node)] = layer
        elif node.op in READERS:
            raise Refused(f"{node.op} {node.name!r} is left as it is")
        elif node.op in RULES and node.domain in (None, "", "ai.onnx"):
            crossing = Crossing(node, Place(node, self._scope, self._editor), axis, index)
            passage = RULES[node.op](crossing)
            if index is not None and index not in passage.inputs:
                raise Refused(f"{node.op} {node.name!r} does not read {tensor.name!r} as channels")
            self._pass(node, passage)
        else:
            raise Refused(f"{node.op} {node.name!r} is no operator that channels are known to pass")

    def _add(self, layer: Layer) -> None:
        """Make sure that the bias of ``layer`` can be made twice."""
        if bias_axis(layer) is not None and not isinstance(
            Place(layer.node, self._scope, self._editor).weight(2), Weight
        ):
            raise Refused(f"the bias of {layer.node.op} {layer.name!r} is computed at run time")

    def _pass(self, node: gs.Node, passage: Passage) -> None:
        """Reach the other tensors of a node."""
        self._passages[id(node)] = (node, passage)
        out = node.outputs[0]
        parts = []
        for index, axis in passage.inputs.items():
            tensor = node.inputs[index]
            if tensor.name not in self._ids:
                self._reach(tensor, axis, self._fresh(self._count(tensor, axis, out, passage)))
            parts.append(self._ids[tensor.name])
            if self._axes[tensor.name] != axis:
                raise Refused(f"the channels of {tensor.name!r} are read along different axes")
        if passage.joined:
            whole = np.concatenate(parts)
        else:
            whole = parts[0]
            for index, axis in list(passage.inputs.items())[1:]:
                self._reach(node.inputs[index], axis, whole)
        self._reach(out, passage.output, np.repeat(whole, passage.block))

    def _count(self, tensor: gs.Tensor, axis: int, out: gs.Tensor, passage: Passage) -> int:
        """The number of channels of ``tensor``."""
        shape = self._editor.shapes.get(tensor.name)
        if shape is not None and len(shape) >= -axis and (size := shape[axis]) is not None:
            return size
        known = [self._ids[node.name] for node in (out,) if node.name in self._ids]
        if passage.joined or not known or len(known[0]) % passage.block:
            raise Refused(f"the channels of {tensor.name!r} are not counted")
        return len(known[0]) // passage.block

    def _fresh(self, number: int) -> Ids:
        start = len(self._parent)
        self._parent.extend(range(start, start + number))
        return np.arange(start, start + number)

    def _root(self, one: int) -> int:
        while self._parent[one] != one:
            self._parent[one] = self._parent[self._parent[one]]
            one = self._parent[one]
        return one
