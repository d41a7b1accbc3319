"""Let the graph split the data of each batch by itself: Oracle OCS (Zhao et al., Section 5.3)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from onnx_ocs.graph.batchwise import expand_by_batch
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan


@dataclass(frozen=True)
class SplitByBatch:
    """The channels with the largest magnitudes of the batch, and the step that the split batch needs.

    In the paper an oracle tells which these are, since a plain framework cannot know before it has chosen its scales;
    here reductions and a TopK in front of the layer find them, and the weight is gathered by the same indices.
    """

    name: ClassVar[str] = "split-by-batch"

    aware: bool = True

    def apply(self, work: Work) -> list[LayerPlan]:
        return [self._visit(work, plan) for plan in work.plans]

    def _visit(self, work: Work, plan: LayerPlan) -> LayerPlan:
        data, layer, edit = plan.activation, plan.layer, work.editor
        if plan.declined or data is None or data.by_batch is None:
            return plan
        expanded, source, step = expand_by_batch(
            edit,
            layer.scope,
            layer.data,
            channels=plan.channels + plan.extra,
            axis=layer.data_axis,
            extra=data.by_batch,
            levels=data.limits[1],
            aware=self.aware,
            like=layer.weight.data_type,
            before=layer.node,
        )
        reader = None
        if source is not None:
            edit.rewire(layer.node, layer.data_input, expanded)
            weight = layer.node.inputs[layer.weight_input]
            name = f"{layer.weight.tensor.name}.by_batch"
            gathered = edit.node(layer.scope, "Gather", [weight, source], name, layer.node, axis=layer.input_axis)
            edit.rewire(layer.node, layer.weight_input, gathered)
            reader = gathered.inputs[0], 0
        return replace(plan, activation=replace(data, step_of_batch=step), reader=reader)
