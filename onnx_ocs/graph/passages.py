"""How channels pass operators that are no layers: where they come in, where they go out, and what holds one value each.

What an operator does with channels is one function registered by :func:`carries`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.layers import Place, Refused, Weight


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
class Crossing:
    """A node that a stream reaches, at the input or the output with the channels on ``axis``."""

    node: gs.Node
    place: Place
    axis: int
    input: int | None  # where it comes in; None if it is followed upwards, from the first output

    def shape(self, index: int) -> tuple[int | None, ...]:
        """The dimensions of an input; none if free."""
        tensor = self.node.inputs[index]
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
    if not axes:
        raise Refused(f"{at.node.op} may be over all axes")
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
