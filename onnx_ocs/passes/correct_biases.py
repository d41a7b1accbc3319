"""Let biases make up for what quantized weights do to the mean of the outputs."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnx_ocs.graph.biases import bias_of
from onnx_ocs.graph.model import numpy_type
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan


@dataclass(frozen=True)
class CorrectBiases:
    """``b + E[(w - w') x]`` with the weights w' that were written (Nagel et al., arXiv:1906.04721, Section 4.2).

    A Conv or Gemm without a bias gets one, which all runtimes take as part of the layer; a MatMul needs an Add behind.
    """

    name: ClassVar[str] = "correct-biases"

    def apply(self, work: Work) -> list[LayerPlan]:
        for plan in work.plans:
            if not plan.declined and plan.shift is not None and np.isfinite(plan.shift).all() and plan.shift.any():
                self._visit(work, plan)
        return work.plans

    def _visit(self, work: Work, plan: LayerPlan) -> None:
        layer, edit = plan.layer, work.editor
        found = bias_of(edit, layer)
        assert found is not None
        assert plan.shift is not None
        kind = numpy_type(layer.weight.data_type)
        held = np.zeros(1) if found.held is None else found.held.read(edit.model)
        with np.errstate(over="ignore"):
            values = (held.astype(np.float64) + plan.shift).astype(kind)
        if not np.isfinite(values.astype(np.float64)).all():
            return
        name = f"{layer.name}.bias" if found.held is None else found.held.tensor.name
        tensor = edit.model.tensor(name, layer.weight.data_type, values.shape, np.ascontiguousarray(values).tobytes())
        edit.rewire(found.node, found.index, edit.constant(layer.scope, f"{name}.corrected", tensor=tensor))
