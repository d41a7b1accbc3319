"""What the graph alone says of its tensors: mean and variance of channels behind a BatchNormalization, and their sign.

A normalized channel has the mean and the deviation that its BatchNormalization gives it; it is taken as normal, and
so clipped by the activation function behind it (Nagel et al., ICCV 2019, arXiv:1906.04721, Section 4.2.1). What an
operator does with that is one function registered by :func:`follows`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Place, Refused


@dataclass(frozen=True, eq=False)
class Normalized:
    """Channels on axis 1 as a BatchNormalization leaves them, and the bounds that they were clipped to since."""

    mean: NDArray[np.float64]  # (C,)
    variance: NDArray[np.float64]  # (C,)
    low: float = -np.inf
    high: float = np.inf


@dataclass(frozen=True, eq=False)
class Predicted:
    """What is known of a tensor."""

    parts: tuple[Normalized, ...] = ()  # whose channels stand behind each other; none: nothing but the sign
    nonnegative: bool = False

    def times(self, factors: NDArray[np.float64]) -> "Predicted":
        """Of the tensor with its channels multiplied by positive factors, (C,)."""
        made, start = [], 0
        for part in self.parts:
            some = factors[start : start + len(part.mean)]
            start += len(part.mean)
            bounded = any(bound and np.isfinite(bound) for bound in (part.low, part.high))
            if bounded or len(some) < len(part.mean):
                return Predicted((), self.nonnegative)
            made.append(Normalized(part.mean * some, part.variance * np.square(some), part.low, part.high))
        return Predicted(tuple(made), self.nonnegative)


Rule = Callable[[Place, list[Predicted]], Predicted | None]
RULES: dict[str, Rule] = {}

NOTHING = Predicted()


def follows(*ops: str) -> Callable[[Rule], Rule]:
    """Register what operators of these types make of what is known of their inputs."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


def predicted(editor: Editor) -> dict[str, Predicted]:
    """What is known of the tensors of the main graph; nothing of those that are missing."""
    scope = editor.scopes[0]
    found: dict[str, Predicted] = {}
    for node in scope.graph.nodes:
        if node.op in RULES and node.domain in (None, "", "ai.onnx") and node.outputs:
            inputs = [found.get(tensor.name, NOTHING) for tensor in node.inputs]
            try:
                made = RULES[node.op](Place(node, scope, editor), inputs)
            except Refused:
                continue
            if made is not None:
                found[node.outputs[0].name] = made
    return found


@follows("BatchNormalization")
def normalization(place: Place, inputs: list[Predicted]) -> Predicted | None:
    """The shift is the mean, and the scale the deviation."""
    scale, shift = (place.values(index) for index in (1, 2))
    if scale is None or shift is None or place.integer("training_mode", 0):
        return None
    return Predicted((Normalized(shift.astype(np.float64), np.square(scale.astype(np.float64))),))


@follows("Relu")
def rectified(place: Place, inputs: list[Predicted]) -> Predicted:
    return _clipped(inputs[0], 0.0, np.inf)


@follows("Clip")
def clipped(place: Place, inputs: list[Predicted]) -> Predicted | None:
    bounds = [place.node.attrs.get("min", -np.inf), place.node.attrs.get("max", np.inf)]
    for index, tensor in enumerate(place.node.inputs[1:3]):
        if tensor.name:
            values = place.values(index + 1)
            if values is None or values.size != 1:
                return None
            bounds[index] = float(values.reshape(()))
    return _clipped(inputs[0], float(bounds[0]), float(bounds[1]))


def _clipped(known: Predicted, low: float, high: float) -> Predicted:
    parts = tuple(
        Normalized(part.mean, part.variance, max(low, part.low), min(high, part.high)) for part in known.parts
    )
    return Predicted(parts, high >= 0 and (known.nonnegative or low >= 0))


@follows("Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs", "Sqrt", "Softplus")
def never_negative(place: Place, inputs: list[Predicted]) -> Predicted:
    return Predicted((), True)


@follows("Identity", "Dropout", "Cast", "GlobalAveragePool")
def unchanged(place: Place, inputs: list[Predicted]) -> Predicted:
    """An average keeps the mean; its variance is no larger."""
    return inputs[0]


@follows("Flatten", "Reshape", "Squeeze")
def reshaped(place: Place, inputs: list[Predicted]) -> Predicted:
    """The channels stay channels where there was one position of each."""
    if not inputs[0].parts:
        return inputs[0]
    before, after = (place.editor.shapes.get(tensor.name) for tensor in (place.node.inputs[0], place.node.outputs[0]))
    channels = sum(len(part.mean) for part in inputs[0].parts)
    single = before is not None and len(before) > 1 and all(size == 1 for size in before[2:])
    kept = single and after is not None and len(after) > 1 and after[1] == channels
    return inputs[0] if kept else Predicted((), inputs[0].nonnegative)


@follows("MaxPool", "AveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "Slice", "Transpose")
def same_sign(place: Place, inputs: list[Predicted]) -> Predicted:
    return Predicted((), inputs[0].nonnegative)


@follows("Pad")
def padded(place: Place, inputs: list[Predicted]) -> Predicted | None:
    """By a constant that may be negative, or by values of the data."""
    node = place.node
    filler = np.array(node.attrs.get("value", 0.0))
    if len(node.inputs) > 2 and node.inputs[2].name:
        found = place.values(2)
        if found is None:
            return None
        filler = found
    constant = node.attrs.get("mode", "constant") == "constant"
    return Predicted((), inputs[0].nonnegative and not (constant and (filler < 0).any()))


@follows("Resize")
def resized(place: Place, inputs: list[Predicted]) -> Predicted | None:
    """Cubic interpolation goes beyond the data, and extrapolation has a value of its own."""
    attributes = place.node.attrs
    beyond = attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if attributes.get("mode", "nearest") == "cubic" or beyond:
        return None
    return Predicted((), inputs[0].nonnegative)


@follows("Concat")
def joined(place: Place, inputs: list[Predicted]) -> Predicted:
    whole = place.integer("axis", 1) == 1 and all(known.parts for known in inputs)
    parts = tuple(part for known in inputs for part in known.parts) if whole else ()
    return Predicted(parts, all(known.nonnegative for known in inputs))


@follows("Add", "Mul", "Max")
def both(place: Place, inputs: list[Predicted]) -> Predicted:
    return Predicted((), all(known.nonnegative for known in inputs))
