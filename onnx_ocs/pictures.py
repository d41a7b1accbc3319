"""What a graph tells of the pictures that it takes: on which axis their colours are, and which values they have.

The nodes that prepare an input make values with mean 0 and variance 1 of it, as a rule, so that their constants are
those of the data. A BatchNormalization says which mean and variance it has met: in front of all layers those of the
prepared data, behind the first Conv those of its outputs, from which those of its data follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.batchnorm import Foldable, find_foldable
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Place
from onnx_ocs.numerics.natural import fit_colours

KINDS = (np.float32, np.float16, np.float64, np.uint8)
"""Types that pictures have."""

CHANNELS = (1, 3)
"""Of what is taken for a picture: its colours."""

SMALLEST = 8
"""Rows and columns that a picture has at least."""

UNLIKE = 2
"""Times that one side of a picture without colours is the other at most; spectrograms are longer, as a rule."""

USUAL = 224
"""Rows and columns where they are free, or more."""

WHITE = 255
"""The largest value of a picture of bytes."""


@dataclass(frozen=True, eq=False)
class Colours:
    """Mean and deviation of the values of a picture, for each of its C channels."""

    mean: NDArray[np.float64]  # (C,)
    deviation: NDArray[np.float64]  # (C,)


def picture_axis(shape: Sequence[int | None]) -> int | None:
    """The axis of the colours, 1 or 3, of an input that looks like pictures; None for others.

    They have three colours, with sides that may be free, None; or one, and sides that are known and not too unlike.
    """
    for axis in (1, 3) if len(shape) == 4 else ():
        colours, sides = shape[axis], [size for place, size in enumerate(shape) if place not in (0, axis)]
        known = [size for size in sides if size is not None]
        alike = len(known) == 2 and max(known) <= UNLIKE * min(known)
        if colours in CHANNELS and min(known, default=SMALLEST) >= SMALLEST and (colours > 1 or alike):
            return axis
    return None


def takes_pictures(editor: Editor, tensor: gs.Tensor) -> bool:
    """Whether a graph input looks like pictures."""
    return tensor.dtype in KINDS and picture_axis(editor.shapes.get(tensor.name, ())) is not None


def told_colours(editor: Editor) -> dict[str, Colours]:
    """Those of the graph inputs that take pictures, where the graph tells them or their type does."""
    pictures = [tensor for tensor in editor.scopes[0].graph.inputs if takes_pictures(editor, tensor)]
    behind = {id(found.layer.node): found for found in find_foldable(editor)} if pictures else {}
    found = {tensor.name: _told(editor, tensor, behind) for tensor in pictures}
    return {name: colours for name, colours in found.items() if colours is not None}


@dataclass
class _Prepared:
    """Where the way of a picture through a graph has come to: ``factor * x + summand`` of the picture x."""

    axis: int  # of the colours
    channels: int
    factor: NDArray[np.float64] = field(init=False)  # (C,)
    summand: NDArray[np.float64] = field(init=False)  # (C,)

    def __post_init__(self) -> None:
        self.factor, self.summand = np.ones(self.channels), np.zeros(self.channels)

    def source(self, mean: NDArray[np.float64] | float, variance: NDArray[np.float64] | float) -> Colours | None:
        """The colours of the picture that has these now."""
        if np.size(mean) not in (1, self.channels):
            return None
        with np.errstate(all="ignore"):
            found = Colours((mean - self.summand) / self.factor, np.sqrt(variance) / np.abs(self.factor))
            sound = np.isfinite(found.mean) & np.isfinite(found.deviation) & (found.deviation > 0)
        return found if sound.all() else None

    def step(self, place: Place, index: int) -> bool:
        """Through a node, whose input ``index`` this is; False: what it makes is not known."""
        node = place.node
        if node.op in ("Identity", "Cast", "Pad", "Dropout"):
            return index == 0
        if node.op == "Transpose":
            order = list(node.attrs.get("perm", (3, 2, 1, 0)))
            self.axis = order.index(self.axis)
            return True
        if node.op not in ("Add", "Sub", "Mul", "Div"):
            return False
        given = self._of_colours(place.values(1 - index))
        if given is None or (node.op == "Div" and (index == 1 or not given.all())):
            return False
        if node.op in ("Mul", "Div"):
            scale = given if node.op == "Mul" else 1 / given
            self.factor, self.summand = self.factor * scale, self.summand * scale
        elif node.op == "Sub" and index == 1:
            self.factor, self.summand = -self.factor, given - self.summand
        else:
            self.summand = self.summand + (given if node.op == "Add" else -given)
        return True

    def _of_colours(self, values: NDArray[Any] | None) -> NDArray[np.float64] | None:
        """(C,), of a constant that has one value for each colour, or one for all."""
        if values is None or values.ndim > 4:
            return None
        shape = (1,) * (4 - values.ndim) + values.shape
        if any(size != 1 for axis, size in enumerate(shape) if axis != self.axis):
            return None
        return np.broadcast_to(values.reshape(-1).astype(np.float64), (self.channels,))


def _told(editor: Editor, tensor: gs.Tensor, behind: dict[int, Foldable]) -> Colours | None:
    shape = editor.shapes[tensor.name]
    axis = picture_axis(shape)
    assert axis is not None
    channels = shape[axis]
    assert channels is not None
    rows, columns = (min(size or USUAL, USUAL) for place, size in enumerate(shape) if place not in (0, axis))
    prepared, bytewise = _Prepared(axis, channels), tensor.dtype == np.uint8
    scope = editor.scopes[0]
    while True:
        readers = [node for node in tensor.outputs if node.op != "Shape"]
        if len(readers) != 1 or readers[0].domain not in (None, "", "ai.onnx"):
            break
        place = Place(readers[0], scope, editor)
        if place.node.op == "BatchNormalization" and prepared.axis == 1:
            mean, variance = (place.values(index) for index in (3, 4))
            if mean is not None and variance is not None and not place.node.attrs.get("training_mode", 0):
                return prepared.source(mean.astype(np.float64), variance.astype(np.float64))
        found = behind.get(id(place.node)) if prepared.axis == 1 else None
        if found and (fitted := _behind_layer(editor, found, (rows, columns))):
            return prepared.source(*fitted)
        if not prepared.step(place, next(i for i, each in enumerate(place.node.inputs) if each is tensor)):
            break
        tensor = place.node.outputs[0]
    if prepared.summand.any():
        return prepared.source(0.0, 1.0)
    if bytewise or (prepared.factor != 1).any():  # nothing but a scale: from 0 to 1
        white = WHITE * prepared.factor if bytewise else 1.0
        return prepared.source(white / 2, np.square(white / 4))
    return None


def _behind_layer(editor: Editor, found: Foldable, sizes: tuple[int, int]) -> tuple[NDArray[np.float64], float] | None:
    """Mean and variance of the data of a Conv with a BatchNormalization behind it."""
    layer = found.layer
    if layer.node.op != "Conv" or layer.groups != 1:
        return None
    weight = layer.weight.read(editor.model).astype(np.float64)
    _, _, mean, variance = (values.astype(np.float64) for values in found.parameters)
    bias = 0.0 if found.bias is None else found.bias.astype(np.float64)
    dilations = tuple(layer.node.attrs.get("dilations", (1, 1)))
    return fit_colours(weight, mean - bias, variance, dilations, sizes)
