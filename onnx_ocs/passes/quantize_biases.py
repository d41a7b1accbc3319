"""Put INT32 and a DequantizeLinear in place of a float bias, where an integer kernel takes no other."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from onnx_ocs.graph.biases import bias_of, makes_gemm
from onnx_ocs.graph.qdq import dequantize
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan

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
        if layer.node.op == "MatMul" and not (len(layer.weight.shape) == 2 and makes_gemm(edit, layer.data)):
            return
        found = bias_of(edit, layer)
        if found is None or found.held is None:
            return
        node, index, bias = found.node, found.index, found.held
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
