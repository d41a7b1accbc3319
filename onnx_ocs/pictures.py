"""What a graph tells of the pictures that it takes: on which axis their colours are, and which values they have.

The nodes that prepare an input make values about 0 of it, so that their constants are those of the data. A
BatchNormalization says which mean and variance it has met: in front of all layers those of the prepared data, behind
the first Conv those of its outputs, from which those of its data follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.batchnorm import Foldable, find_foldable
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.hints import table_lengths
from onnx_ocs.graph.layers import Place
from onnx_ocs.graph.samples import is_mask
from onnx_ocs.numerics.natural import fit_colours
from onnx_ocs.synthetic import Picture

KINDS = (np.float32, np.float16, np.float64, np.uint8)
"""Types that pictures have."""

CHANNELS = (1, 3)
"""Of what is taken for a picture: its colours."""

SMALLEST = 8
"""Rows and columns that a picture has at least."""

LONGEST = 16
"""Times that one side of a picture is the other at most; what is longer is several series in time."""

USUAL = 224
"""Rows and columns where they are free, or more."""

WHITE = np.iinfo(np.uint8).max
"""The largest value of a picture of bytes."""

LEAST_SPREAD, MOST_SPREAD = 0.25, 0.6
"""Deviations of the values of photographs, in their means; constants that say otherwise do not tell the deviation."""


def picture_axis(shape: Sequence[int | None]) -> int | None:
    """The axis of the colours, 1 or 3, of an input that looks like pictures; None for others.

    They have three colours, with sides that may be free, None; or one, and sides that are known. Spectrograms count as
    such: their values, too, are flat in regions that have edges.
    """
    for axis in (1, 3) if len(shape) == 4 else ():
        colours, sides = shape[axis], [size for place, size in enumerate(shape) if place not in (0, axis)]
        known = [size for size in sides if size is not None]
        enough = len(known) == len(sides) or colours != 1
        smallest, largest = min(known, default=SMALLEST), max(known, default=SMALLEST)
        if colours in CHANNELS and enough and smallest >= SMALLEST and largest <= LONGEST * smallest:
            return axis
    return None


def takes_pictures(editor: Editor) -> bool:
    """Whether a graph input looks like pictures."""
    return bool(_inputs(editor))


def pictures(editor: Editor) -> dict[str, Picture]:
    """Of the graph inputs that look like pictures; where nothing tells of their values, mean 0 and deviation 1."""
    found = _inputs(editor)
    layers = {id(each.layer.node): each for each in find_foldable(editor)} if found else {}
    return {tensor.name: _Way(editor, layers, tensor, axis).picture() for tensor, axis in found}


def _inputs(editor: Editor) -> list[tuple[gs.Tensor, int]]:
    """Those, and the axis of their colours; bytes that are a mask, or that index a table, are none."""
    found = []
    for tensor in editor.scopes[0].graph.inputs:
        axis = picture_axis(editor.shapes.get(tensor.name, ())) if tensor.dtype in KINDS else None
        bytewise = axis is not None and tensor.dtype == np.uint8
        other = bytewise and (is_mask(tensor.name) or tensor.name in table_lengths(editor))
        if axis is not None and not other:
            found.append((tensor, axis))
    return found


@dataclass
class _Way:
    """That of a picture x through the graph, as far as it makes ``factor * x + summand`` of it."""

    editor: Editor
    layers: dict[int, Foldable]  # by their nodes
    source: gs.Tensor
    first: int  # axis of the colours
    axis: int = field(init=False)  # where they are now
    factor: NDArray[np.float64] = field(init=False)  # (C,)
    summand: NDArray[np.float64] = field(init=False)  # (C,)

    def __post_init__(self) -> None:
        channels = self.shape[self.first]
        assert channels is not None
        self.axis, self.factor, self.summand = self.first, np.ones(channels), np.zeros(channels)

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of the source."""
        return self.editor.shapes[self.source.name]

    def picture(self) -> Picture:
        tensor = self.source
        with np.errstate(all="ignore"):
            while (place := self._reader(tensor)) is not None:
                met = self._met(place)
                if met is not None and (told := self._before(*met)) is not None:
                    return told
                if not self._step(place, next(i for i, each in enumerate(place.node.inputs) if each is tensor)):
                    break
                tensor = place.node.outputs[0]
            return self._by_constants()

    def _reader(self, tensor: gs.Tensor) -> Place | None:
        """The one node that reads the values of a tensor."""
        readers, scope = [node for node in tensor.outputs if node.op != "Shape"], self.editor.scopes[0]
        if len(readers) != 1 or readers[0].domain not in (None, "", "ai.onnx"):
            return None
        inside = not any(node is readers[0] for node in scope.graph.nodes)  # of the body of an If, say
        return None if inside else Place(readers[0], scope, self.editor)

    def _met(self, place: Place) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Mean and variance of what a node reads, by a BatchNormalization that this is, or that stands behind it."""
        node = place.node
        if self.axis != 1:
            return None
        if node.op == "BatchNormalization" and not node.attrs.get("training_mode", 0):
            mean, variance = (place.values(index) for index in (3, 4))
            return None if mean is None or variance is None else (mean.astype(np.float64), variance.astype(np.float64))
        found = self.layers.get(id(node))
        if found is None or node.op != "Conv" or found.layer.groups != 1:
            return None
        weight = found.layer.weight.read(self.editor.model).astype(np.float64)
        _, _, mean, variance = (values.astype(np.float64) for values in found.parameters)
        bias = 0.0 if found.bias is None else found.bias.astype(np.float64)
        dilations = tuple(node.attrs.get("dilations", (1, 1)))
        if weight.ndim != 4 or len(dilations) != 2 or min(dilations) < 1:
            return None
        rows, columns = (
            min(size or USUAL, USUAL) for place, size in enumerate(self.shape) if place not in (0, self.first)
        )
        return fit_colours(weight, mean - bias, variance, dilations, (rows, columns))

    def _before(self, mean: NDArray[np.float64], variance: NDArray[np.float64]) -> Picture | None:
        """The picture whose prepared values have these."""
        if mean.shape != self.factor.shape or variance.shape != self.factor.shape:
            return None
        return self._sound((mean - self.summand) / self.factor, np.sqrt(variance) / np.abs(self.factor))

    def _step(self, place: Place, index: int) -> bool:
        """Through a node, whose input ``index`` this is; False: what it makes is not known."""
        node = place.node
        if node.op in ("Identity", "Cast", "Pad", "Dropout"):
            return index == 0
        if node.op == "Transpose":
            self.axis = list(node.attrs.get("perm", (3, 2, 1, 0))).index(self.axis)
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
        if values is None or values.ndim > 4 or values.size not in (1, self.factor.size):
            return None
        shape = (1,) * (4 - values.ndim) + values.shape
        if any(size != 1 for axis, size in enumerate(shape) if axis != self.axis):
            return None
        return np.broadcast_to(values.reshape(-1).astype(np.float64), self.factor.shape)

    def _by_constants(self) -> Picture:
        """What is taken out is the mean; what it is divided by then is the deviation, if that of a picture can be so.

        Where nothing is taken out, pictures go from 0 to what becomes 1, or white.
        """
        scale, mean = 1 / np.abs(self.factor), -self.summand / self.factor
        bytewise = self.source.dtype == np.uint8
        white = WHITE * np.ones_like(scale) if bytewise else scale
        if (mean > LEAST_SPREAD / 2 * scale).all() and not (bytewise and (mean > WHITE).any()):
            fits = (scale >= LEAST_SPREAD * mean) & (scale <= MOST_SPREAD * mean)
            told = self._sound(mean, np.where(fits, scale, mean / 2))
        elif bytewise or (self.factor != 1).any():
            told = self._sound(white / 2, white / 4)
        else:
            told = None
        return told or Picture(self.first, np.zeros(scale.shape), np.ones(scale.shape))

    def _sound(self, mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> Picture | None:
        sound = np.isfinite(mean) & np.isfinite(deviation) & (deviation > 0)
        return Picture(self.first, mean, deviation) if sound.all() else None
