"""Where the bias of a layer is, or can be."""

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Layer, Place, Weight


@dataclass(frozen=True, eq=False)
class Bias:
    """The node that adds a bias, by which of its inputs, and the constant that it is; none: the input is free."""

    node: gs.Node
    index: int
    held: Weight | None


def bias_of(editor: Editor, layer: Layer) -> Bias | None:
    """The bias of a Conv or a Gemm, or of the Add behind a MatMul; None where there is no place for one.

    The bias is added to the products as it is: with the factors of a Gemm there is no such bias.
    """
    node = layer.node
    if node.op == "MatMul":
        return _added(editor, layer)
    if node.op not in ("Conv", "Gemm") or any(node.attrs.get(factor, 1.0) != 1.0 for factor in ("alpha", "beta")):
        return None
    if layer.weight_input != 1:
        return None
    if len(node.inputs) <= 2 or not node.inputs[2].name:
        return Bias(node, 2, None)
    found = Place(node, layer.scope, editor).weight(2)
    return Bias(node, 2, found) if isinstance(found, Weight) else None


def makes_gemm(editor: Editor, data: gs.Tensor) -> bool:
    """Whether onnxruntime makes a Gemm of a MatMul of this data, a matrix and a bias: if it can flatten the data."""
    return editor.ranks.get(data.name) == 2 or None not in editor.shapes.get(data.name, (None,))


def _added(editor: Editor, layer: Layer) -> Bias | None:
    output = layer.node.outputs[0]
    if len(output.outputs) != 1 or editor.is_result(output) or layer.weight_input != 1 or layer.output_axis is None:
        return None
    added = output.outputs[0]
    if added.op != "Add" or all(added is not other for other in layer.scope.graph.nodes):
        return None
    index = 1 if added.inputs[0] is output else 0
    found = Place(added, layer.scope, editor).weight(index)
    return Bias(added, index, found) if isinstance(found, Weight) else None
