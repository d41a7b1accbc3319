"""Put integers and a DequantizeLinear in place of each float weight."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from onnx_ocs.graph.integers import TYPES, packed
from onnx_ocs.graph.qdq import dequantize
from onnx_ocs.numerics.weights import split_integers
from onnx_ocs.passes.base import LayerPlan, Work


@dataclass(frozen=True)
class QuantizeWeights:
    """Round to the grid and deal the integers out to the copies; layers that read the same weight share the result."""

    name: ClassVar[str] = "quantize-weights"

    aware: bool = True

    def apply(self, work: Work) -> list[LayerPlan]:
        made: dict[Any, tuple[gs.Variable, float]] = {}
        readers = work.readers()
        return [plan if plan.declined else self._visit(work, plan, made, readers[plan.key]) for plan in work.plans]

    def _visit(
        self, work: Work, plan: LayerPlan, made: dict[Any, tuple[gs.Variable, float]], readers: int
    ) -> LayerPlan:
        layer, edit = plan.layer, work.editor
        if plan.key not in made:
            made[plan.key] = self._dequantized(work, plan, readers)
        read, sqnr = made[plan.key]
        edit.rewire(*(plan.reader or (layer.node, layer.weight_input)), read)
        if plan.turned:
            edit.set_integer(layer.scope, layer.node, "transB", 0)
        return replace(plan, sqnr_db=sqnr)

    def _dequantized(self, work: Work, plan: LayerPlan, readers: int) -> tuple[gs.Variable, float]:
        layer, edit = plan.layer, work.editor
        assert plan.step is not None
        assert plan.bits is not None
        integers, sqnr = split_integers(work.values(plan), plan.splits, plan.axes, plan.step, plan.bits, self.aware)
        step = plan.step
        if plan.turned:
            integers, step = integers.T, step.T
        name, width = layer.weight.tensor.name, plan.storage
        tensor = edit.model.tensor(name, TYPES[width], integers.shape, packed(integers, width))
        home = layer.weight.home
        reader = plan.reader[0] if plan.reader else layer.node
        before = layer.scope.within(home, reader) if readers == 1 else home.graph.nodes[0]
        axis = (layer.output_axis or 0) if plan.block is None else layer.input_axis
        axis = 1 - axis if plan.turned else axis
        return dequantize(edit, home, tensor, step, axis, layer.weight.data_type, before, plan.block), sqnr
