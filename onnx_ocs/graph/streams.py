"""Streams of channels: tensors that hold the same channels, from the layers that make them to those that read them.

Where every reader of a stream can take a channel twice, its makers can make it twice, and no copy is needed at run time
(as Net2WiderNet widens a layer: Chen et al., ICLR 2016, arXiv:1511.05641).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor, Scope
from onnx_ocs.graph.layers import READERS, Layer, Place, Refused, Weight
from onnx_ocs.graph.passages import RULES, Crossing, Passage

Ids = NDArray[np.int64]


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

    @cached_property
    def parts(self) -> NDArray[np.int64]:
        """(channels,), a number that is the same for channels that the same layers make, counted from 0."""
        made = np.zeros((len(self.makers), self.channels), bool)
        for row, layer in enumerate(self.makers):
            made[row, self.ids[layer.node.outputs[0].name]] = True
        return np.unique(made, axis=1, return_inverse=True)[1].reshape(-1)

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
        known = self._ids.get(out.name)
        if passage.joined or known is None or len(known) % passage.block:
            raise Refused(f"the channels of {tensor.name!r} are not counted")
        return len(known) // passage.block

    def _fresh(self, number: int) -> Ids:
        start = len(self._parent)
        self._parent.extend(range(start, start + number))
        return np.arange(start, start + number)

    def _root(self, one: int) -> int:
        while self._parent[one] != one:
            self._parent[one] = self._parent[self._parent[one]]
            one = self._parent[one]
        return one
