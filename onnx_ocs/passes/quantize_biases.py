"""Put INT32 and a DequantizeLinear in place of a float bias, where an integer kernel takes no other."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Layer, Place, Weight
from onnx_ocs.graph.qdq import dequantize
from onnx_ocs.passes.base import LayerPlan, Work

LARGEST = np.iinfo(np.int32).max


@dataclass(frozen=True)
class QuantizeBiases:
    """A bias on the grid of the products it is added to: the step of the data times that of the weight.

    That grid is finer than the sums need, so nothing is lost; a bias that it does not reach, as beside weights that
    are nearly zero, stays float.
    """

    name: ClassVar[str] = "quantize-biases"

    ops: frozenset[str] = frozenset()

    def apply(self, work: Work) -> list[LayerPlan]:
        for plan in work.plans:
            if plan.layer.node.op in self.ops and not plan.declined:
                self._visit(work, plan)
        return work.plans

    def _visit(self, work: Work, plan: LayerPlan) -> None:
        layer, edit, data = plan.layer, work.editor, plan.activation
        if data is None or data.step is None or plan.step is None or layer.weight.data_type != onnx.TensorProto.FLOAT:
            return
        if (found := self._bias(edit, layer)) is None:
            return
        node, index, bias = found
        assert layer.output_axis is not None
        outputs = layer.weight.shape[layer.output_axis] if plan.outputs is None else len(plan.outputs)
        values = bias.read(edit.model).astype(np.float64)
        if values.size not in (1, outputs):
            return
        step = (data.step.astype(np.float64) * plan.step).astype(np.float32)
        with np.errstate(divide="ignore", over="ignore"):
            integers = np.floor(np.broadcast_to(values.reshape(-1), outputs) / step.astype(np.float64) + 0.5)
        if not (np.abs(integers) <= LARGEST).all():
            return
        made = integers.astype(np.int32)
        tensor = edit.model.tensor(bias.tensor.name, onnx.TensorProto.INT32, made.shape, made.tobytes())
        edit.rewire(node, index, dequantize(edit, layer.scope, tensor, step, 0, layer.weight.data_type, node))

    def _bias(self, edit: Editor, layer: Layer) -> tuple[gs.Node, int, Weight] | None:
        """The node that adds the bias of ``layer``, by which of its inputs, and the bias."""
        node = layer.node
        if node.op != "MatMul":
            found = Place(node, layer.scope, edit).weight(2) if len(node.inputs) > 2 and node.inputs[2].name else None
            plain = all(node.attrs.get(factor, 1.0) == 1.0 for factor in ("alpha", "beta"))
            return (node, 2, found) if isinstance(found, Weight) and plain else None
        output = node.outputs[0]
        if len(output.outputs) != 1 or edit.is_result(output) or edit.ranks.get(output.name) != 2:
            return None
        added = output.outputs[0]
        if added.op != "Add" or layer.weight_input != 1 or all(added is not other for other in layer.scope.graph.nodes):
            return None
        index = 1 if added.inputs[0] is output else 0
        found = Place(added, layer.scope, edit).weight(index)
        return (added, index, found) if isinstance(found, Weight) else None
