"""Put QuantizeLinear and DequantizeLinear in front of each layer's data."""

from dataclasses import dataclass
from typing import ClassVar

from onnx_ocs.passes.base import LayerPlan, Work


@dataclass(frozen=True)
class QuantizeActivations:
    """The pair stands directly at the layer, behind its Gather, where every runtime looks for it."""

    name: ClassVar[str] = "quantize-activations"

    def apply(self, work: Work) -> list[LayerPlan]:
        for plan in work.plans:
            if plan.activation is not None and not plan.declined:
                self._visit(work, plan)
        return work.plans

    def _visit(self, work: Work, plan: LayerPlan) -> None:
        layer, data = plan.layer, plan.activation
        assert data is not None
        step = data.step_of_batch if data.step is None else data.step
        assert step is not None
        read = work.editor.quantized(layer.scope, layer.data, step, data.limits, layer.weight.data_type, layer.node)
        work.editor.rewire(layer.node, layer.data_input, read)
