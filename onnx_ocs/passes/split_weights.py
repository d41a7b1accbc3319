"""Split the planned channels: a Gather in front of the layer, and a float weight with the copies."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ocs.graph.model import numpy_type
from onnx_ocs.graph.wire import Lazy
from onnx_ocs.numerics.split import joined
from onnx_ocs.numerics.weights import split_floats
from onnx_ocs.passes.base import LayerPlan, Work


@dataclass(frozen=True)
class SplitWeights:
    """The same function of the same inputs, with narrower weights; no quantization yet."""

    name: ClassVar[str] = "split-weights"

    aware: bool = True  # quantization-aware shares (Equation 6), or plain ones

    def apply(self, work: Work) -> list[LayerPlan]:
        made: dict[Any, gs.Tensor] = {}
        for plan in work.plans:
            if plan.extra and not plan.declined:
                self._visit(work, plan, made)
        return work.plans

    def _visit(self, work: Work, plan: LayerPlan, made: dict[Any, gs.Tensor]) -> None:
        layer, edit = plan.layer, work.editor
        source = joined(list(plan.splits)).source
        gathered = edit.gather(layer.scope, layer.data, source, layer.data_axis, layer.node)
        edit.rewire(layer.node, layer.data_input, gathered)
        if plan.key not in made:
            made[plan.key] = edit.constant(
                layer.weight.home, f"{layer.weight.tensor.name}.split", tensor=self._tensor(work, plan)
            )
        edit.rewire(layer.node, layer.weight_input, made[plan.key])

    def _tensor(self, work: Work, plan: LayerPlan) -> Any:
        """The split weight, made when it is written: nobody reads it if integers take its place."""
        shape = list(plan.layer.weight.shape)
        shape[plan.layer.input_axis] += sum(split.extra for split in plan.splits) // len(plan.splits)
        itemsize = numpy_type(plan.layer.weight.data_type).itemsize
        step = plan.step if self.aware else None

        def make() -> memoryview:
            shares = np.ascontiguousarray(split_floats(work.values(plan), plan.splits, plan.axes, step))
            return shares.reshape(-1).view(np.uint8).data

        lazy = Lazy(int(np.prod(shape)) * itemsize, make)
        return work.editor.model.tensor("", plan.layer.weight.data_type, tuple(shape), lazy)
