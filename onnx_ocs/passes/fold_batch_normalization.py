"""Fold each BatchNormalization into the weight and bias before it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.batchnorm import Foldable, find_foldable
from onnx_ocs.graph.editor import Editor
from onnx_ocs.numerics.batchnorm import affine, scaled


@dataclass(frozen=True)
class FoldBatchNormalization:
    """The same function with fewer nodes; scales chosen afterwards are those of the weights that will run.

    It stands before layers are found, so it works on an editor and returns how many nodes it folded. One at most for
    each layer: where normalizations follow each other, another run takes the next.
    """

    name: ClassVar[str] = "fold-batch-normalization"

    kept: frozenset[str] = frozenset()  # layers that are left as they are, by name

    def apply(self, editor: Editor) -> int:
        folded: set[int] = set()
        for found in find_foldable(editor):
            layer = found.layer
            if id(layer.node) not in folded and layer.name not in self.kept and self._visit(editor, found):
                folded.add(id(layer.node))
        return len(folded)

    def _visit(self, edit: Editor, found: Foldable) -> bool:
        layer, node = found.layer, found.node
        scope = layer.scope
        values = layer.weight.read(edit.model)
        normal = affine(found.parameters, found.epsilon)
        if not (np.isfinite(normal.factor).all() and np.isfinite(normal.summand).all()):
            return False
        assert layer.output_axis is not None
        shift = normal.summand / found.bias_factor
        bias = shift if found.bias is None else found.bias * normal.factor + shift
        with np.errstate(over="ignore"):
            weight = scaled(values, normal.factor, layer.output_axis, layer.groups if layer.groups_on_input else 1)
            bias = bias.astype(values.dtype)
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            return False  # beyond what their type can hold
        edit.rewire(layer.node, layer.weight_input, self._constant(edit, found, layer.weight.tensor.name, weight))
        added = self._constant(edit, found, f"{layer.name}.bias", bias)
        if found.bias_node is None:
            made = edit.node(scope, "Add", [node.inputs[0], added], f"{layer.name}.biased", node)
            edit.bypass(scope, made.inputs[0], node)
        else:
            edit.rewire(found.bias_node, found.bias_input, added)
            edit.bypass(scope, found.bias_node, node)
        return True

    def _constant(self, edit: Editor, found: Foldable, name: str, values: NDArray[Any]) -> gs.Tensor:
        tensor = edit.model.tensor(name, found.layer.weight.data_type, values.shape, values.tobytes())
        return edit.constant(found.layer.scope, f"{name}.folded", tensor=tensor)
