"""Multiply the weight and the bias of a Gemm by its factors."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Layer, Place, Weight


@dataclass(frozen=True)
class FoldFactors:
    """The same products and sums with alpha and beta at 1, which integer kernels want.

    A factor of what is computed at run time stays.
    """

    name: ClassVar[str] = "fold-factors"

    def apply(self, editor: Editor, layers: list[Layer]) -> int:
        """How many factors were folded."""
        return sum(self._visit(editor, layer) for layer in layers if layer.node.op == "Gemm")

    def _visit(self, edit: Editor, layer: Layer) -> int:
        folded = 0
        for name, index in (("alpha", layer.weight_input), ("beta", 2)):
            factor = layer.node.attrs.get(name, 1.0)
            if not isinstance(factor, float) or factor == 1 or len(layer.node.inputs) <= index:
                continue
            held = Place(layer.node, layer.scope, edit).weight(index)
            if not isinstance(held, Weight):
                continue
            values = held.read(edit.model)
            with np.errstate(over="ignore"):
                scaled = (values.astype(np.float64) * factor).astype(values.dtype)
            if not np.isfinite(scaled).all():
                continue
            tensor = edit.model.tensor(held.tensor.name, held.data_type, scaled.shape, scaled.tobytes())
            edit.rewire(layer.node, index, edit.constant(layer.scope, f"{held.tensor.name}.{name}", tensor=tensor))
            edit.set_number(layer.scope, layer.node, name, 1.0)
            folded += 1
        return folded
