"""BatchNormalization nodes that can be folded into the layer before them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor, Scope
from onnx_ocs.graph.layers import Layer, Place, Weight, find_layers

SINCE = 9
"""The opset from which the operator normalizes channels in all its forms."""


@dataclass(frozen=True, eq=False)
class Foldable:
    """A layer, the node that adds its bias, and the normalization of the sum."""

    layer: Layer
    bias_node: gs.Node | None  # the layer itself, an Add behind it, or none if there is no such node
    bias_input: int
    bias: NDArray[Any] | None
    bias_factor: float  # the bias is multiplied by this (beta of Gemm)
    node: gs.Node  # the BatchNormalization
    parameters: tuple[NDArray[Any], ...]  # scale, B, mean, variance; (M,) each
    epsilon: float


def find_foldable(editor: Editor) -> Iterator[Foldable]:
    """Each BatchNormalization in inference whose input is that of no one else and comes from a layer."""
    layers = {id(item.node): item for item in find_layers(editor) if isinstance(item, Layer)}
    for scope in editor.scopes:
        if scope.opset < SINCE:
            continue
        for node in list(scope.graph.nodes):
            if node.op == "BatchNormalization" and node.domain in (None, "", "ai.onnx"):
                found = _foldable(editor, scope, node, layers)
                if found is not None:
                    yield found


def _foldable(editor: Editor, scope: Scope, node: gs.Node, layers: dict[int, Layer]) -> Foldable | None:
    if node.attrs.get("training_mode", 0) or any(
        out.outputs or (out.name and editor.is_result(out)) for out in node.outputs[1:]
    ):
        return None
    place = Place(node, scope, editor)
    constants = [place.weight(index) for index in range(1, 5)]
    read = tuple(weight.read(editor.model) for weight in constants if isinstance(weight, Weight))
    maker = _only_maker(editor, node.inputs[0], node)
    if maker is None or len(read) < 4:
        return None
    bias_node, bias_input, bias = maker, 2, None
    if maker.op == "Add":
        found = _added(editor, scope, maker)
        if found is None:
            return None
        maker, bias_input, bias = found
    if id(maker) not in layers:
        return None
    layer = layers[id(maker)]
    if maker.op == "MatMul":
        if editor.ranks.get(node.inputs[0].name) != 2:
            return None
        at = bias_node if bias_node is not maker else None
        factor = 1.0
    else:
        if bias_node is not maker:
            return None
        at = maker
        factor = float(maker.attrs.get("beta", 1.0))
        if len(maker.inputs) > 2 and maker.inputs[2].name:
            held = Place(maker, scope, editor).weight(2)
            if not isinstance(held, Weight):
                return None
            bias = held.read(editor.model)
    channels = len(read[0])
    fits = bias is None or not bias.ndim or bias.shape[-1] in (1, channels)
    if factor == 0 or not fits or not _matches(layer, channels):
        return None
    return Foldable(layer, at, bias_input, bias, factor, node, read, float(node.attrs.get("epsilon", 1e-5)))


def _matches(layer: Layer, channels: int) -> bool:
    """Whether the channels of the layer's output lie on axis 1, and are so many."""
    if layer.output_axis is None or (layer.node.op in ("Gemm", "MatMul") and layer.weight_input != 1):
        return False
    held = layer.weight.shape[layer.output_axis]
    return channels == (held * layer.groups if layer.groups_on_input else held)


def _only_maker(editor: Editor, tensor: gs.Tensor, reader: gs.Node) -> gs.Node | None:
    """The node that makes ``tensor`` for ``reader`` alone."""
    readers = list(tensor.outputs)
    if editor.is_result(tensor) or len(readers) != 1 or readers[0] is not reader or not tensor.inputs:
        return None
    return tensor.inputs[0]


def _added(editor: Editor, scope: Scope, node: gs.Node) -> tuple[gs.Node, int, NDArray[Any]] | None:
    """The MatMul whose output ``node`` adds a constant to, the input of the constant, and its values."""
    place = Place(node, scope, editor)
    for index in (0, 1):
        weight = place.weight(index)
        if isinstance(weight, Weight):
            maker = _only_maker(editor, node.inputs[1 - index], node)
            if maker is not None and maker.op == "MatMul" and len(weight.shape) <= 2:
                return maker, index, weight.read(editor.model)
    return None
