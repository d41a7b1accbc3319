"""Put integers and a DequantizeLinear in place of each float weight."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.integers import TYPES, packed
from onnx_ocs.graph.qdq import dequantize
from onnx_ocs.numerics.weights import mean_shift, split_integers
from onnx_ocs.passes.base import LayerPlan, Work


@dataclass(frozen=True)
class QuantizeWeights:
    """Round to the grid and deal the integers out to the copies; layers that read the same weight share the result."""

    name: ClassVar[str] = "quantize-weights"

    aware: bool = True

    def apply(self, work: Work) -> list[LayerPlan]:
        made: dict[Any, tuple[gs.Variable, float, NDArray[Any]]] = {}
        readers = work.readers()
        return [plan if plan.declined else self._visit(work, plan, made, readers[plan.key]) for plan in work.plans]

    def _visit(
        self, work: Work, plan: LayerPlan, made: dict[Any, tuple[gs.Variable, float, NDArray[Any]]], readers: int
    ) -> LayerPlan:
        layer, edit = plan.layer, work.editor
        if plan.key not in made:
            made[plan.key] = self._dequantized(work, plan, readers)
        read, sqnr, integers = made[plan.key]
        if readers == 1:
            del made[plan.key]
        edit.rewire(*(plan.reader or (layer.node, layer.weight_input)), read)
        if plan.turned:
            edit.set_integer(layer.scope, layer.node, "transB", 0)
        return replace(plan, sqnr_db=sqnr, shift=self._shift(work, plan, integers) if plan.corrected else None)

    def _shift(self, work: Work, plan: LayerPlan, integers: NDArray[Any]) -> NDArray[np.float64]:
        mean = work.mean(plan)
        assert mean is not None
        assert plan.step is not None
        return mean_shift(work.values(plan), integers, plan.splits, plan.axes, plan.step, mean)

    def _dequantized(self, work: Work, plan: LayerPlan, readers: int) -> tuple[gs.Variable, float, NDArray[Any]]:
        layer, edit = plan.layer, work.editor
        assert plan.step is not None
        assert plan.bits is not None
        integers, sqnr = split_integers(
            work.values(plan), plan.splits, plan.axes, plan.step, plan.bits, self.aware, work.task(plan)
        )
        stored, step = integers, plan.step
        if plan.turned:
            stored, step = integers.T, step.T
        name, width = layer.weight.tensor.name, plan.storage
        tensor = edit.model.tensor(name, TYPES[width], stored.shape, packed(stored, width))
        home = layer.weight.home
        reader = plan.reader[0] if plan.reader else layer.node
        before = layer.scope.within(home, reader) if readers == 1 else home.graph.nodes[0]
        axis = (layer.output_axis or 0) if plan.block is None else layer.input_axis
        axis = 1 - axis if plan.turned else axis
        read = dequantize(edit, home, tensor, step, axis, layer.weight.data_type, before, plan.block)
        return read, sqnr, integers
