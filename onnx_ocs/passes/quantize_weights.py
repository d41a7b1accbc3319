"""Put integers and a DequantizeLinear in place of each float weight."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from onnx_ocs.graph.integers import TYPES, packed
from onnx_ocs.graph.qdq import dequantize
from onnx_ocs.numerics.integers import Rounded, rounded
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan


@dataclass(frozen=True)
class QuantizeWeights:
    """Round to the grid and deal the integers out to the copies; layers that read the same weight share the result."""

    name: ClassVar[str] = "quantize-weights"

    aware: bool = True

    def apply(self, work: Work) -> list[LayerPlan]:
        made: dict[Any, _Written] = {}
        readers = work.readers()
        return [plan if plan.declined else self._visit(work, plan, made, readers[plan.key]) for plan in work.plans]

    def _visit(self, work: Work, plan: LayerPlan, made: dict[Any, "_Written"], readers: int) -> LayerPlan:
        layer, edit, key = plan.layer, work.editor, plan.key
        if key not in made:
            made[key] = self._written(work, plan, readers)
        written = made[key]
        if readers == 1:
            del made[key]
        edit.rewire(*(plan.reader or (layer.node, layer.weight_input)), written.read)
        if plan.turned:
            edit.set_number(layer.scope, layer.node, "transB", 0)
        assert plan.threshold is not None
        assert plan.step is not None
        step = written.rounded.step
        threshold, sqnr = plan.threshold * (step / plan.step), written.rounded.sqnr_db
        plan = replace(plan, threshold=threshold, step=step, sqnr_db=sqnr, rounded=None)
        if not plan.corrected or plan.shift is not None:
            return plan
        return replace(plan, shift=work.shift(plan, written.rounded))

    def _written(self, work: Work, plan: LayerPlan, readers: int) -> "_Written":
        layer, edit, axes = plan.layer, work.editor, plan.axes
        assert plan.step is not None
        assert plan.bits is not None
        made = plan.rounded
        if made is None:
            weight = work.values(plan)
            made = rounded(weight, weight, plan.splits, axes, plan.step, plan.bits, self.aware, work.task(plan))
        stored, steps = (made.integers.T, made.step.T) if plan.turned else (made.integers, made.step)
        name, width = layer.weight.tensor.name, plan.storage
        tensor = edit.model.tensor(name, TYPES[width], stored.shape, packed(stored, width))
        home = layer.weight.home
        reader = plan.reader[0] if plan.reader else layer.node
        before = layer.scope.within(home, reader) if readers == 1 else home.graph.nodes[0]
        axis = (layer.output_axis or 0) if plan.block is None else layer.input_axis
        axis = 1 - axis if plan.turned else axis
        read = dequantize(edit, home, tensor, steps, axis, layer.weight.data_type, before, plan.block)
        return _Written(read, made)


@dataclass(frozen=True, eq=False)
class _Written:
    """A weight as it now is in the graph."""

    read: gs.Variable
    rounded: Rounded
