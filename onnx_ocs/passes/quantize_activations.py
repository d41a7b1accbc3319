"""Put QuantizeLinear and DequantizeLinear where tensors are made, or in front of each layer's data."""

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.qdq import DataGrid, quantized, to_floats, to_integers
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan, TensorPlan

FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True, eq=False)
class _Placed:
    """A tensor that is quantized where it is made."""

    integers: gs.Variable
    grid: DataGrid
    first: gs.Node | None  # ahead of which the values stand for all that reads them; none if all reads them already

    def read(self, edit: Editor) -> gs.Variable:
        """What the integers stand for."""
        return to_floats(edit, edit.scopes[0], self.integers, self.grid, FLOAT, self.first)


@dataclass(frozen=True)
class QuantizeActivations:
    """A tensor that an integer kernel makes is quantized there, for all that read it.

    Copies of channels are taken from the integers. Where a layer's data is quantized for it alone the pair stands
    directly at the layer, behind its Gather, where every runtime looks for it.
    """

    name: ClassVar[str] = "quantize-activations"

    gathers_integers: bool = False
    clips_integers: bool = True

    def apply(self, work: Work) -> list[LayerPlan]:
        placed = {plan.tensor.name: self._place(work, plan) for plan in work.tensors}
        for plan in work.plans:
            if plan.activation is None or plan.declined:
                continue
            data = plan.gathered[0] if plan.gathered else plan.layer.data
            if data.name in placed and (self.gathers_integers or not plan.gathered):
                self._read(work, plan, placed[data.name])
            else:
                self._visit(work, plan)
        return work.plans

    def _place(self, work: Work, plan: TensorPlan) -> _Placed:
        """The integers of a tensor; what reads the quantized tensor, other than layers, reads it from here on."""
        edit, tensor = work.editor, plan.tensor
        main, grid = edit.scopes[0], plan.grid
        assert grid is not None
        grid = replace(grid, float_clip=not self.clips_integers)
        if not plan.made:
            nodes = {id(node): place for place, node in enumerate(main.graph.nodes)}
            here = [node for node in tensor.outputs if id(node) in nodes]  # others are in bodies, and stay as they are
            first = min(here, key=lambda node: nodes[id(node)])
            made = _Placed(to_integers(edit, main, tensor, grid, FLOAT, first), grid, first)
            for node, index in plan.readers:
                edit.rewire(node, index, made.read(edit))
            return made
        behind = edit.after(main, tensor.inputs[0])
        integers = to_integers(edit, main, edit.intercept(tensor), grid, FLOAT, behind)
        read = to_floats(edit, main, integers, grid, FLOAT, behind)
        read.inputs[0].outputs[0] = tensor
        return _Placed(integers, grid, None)

    def _read(self, work: Work, plan: LayerPlan, placed: _Placed) -> None:
        """Let a layer read a tensor that is quantized already, by way of its Gather if it has one."""
        edit, layer = work.editor, plan.layer
        if plan.gathered is not None:
            copies = edit.gather(layer.scope, placed.integers, plan.gathered[1], layer.data_axis, layer.node)
            read = to_floats(edit, layer.scope, copies, placed.grid, FLOAT, layer.node)
            edit.rewire(layer.node, layer.data_input, read)
        elif placed.first is not None:
            edit.rewire(layer.node, layer.data_input, placed.read(edit))

    def _visit(self, work: Work, plan: LayerPlan) -> None:
        layer, data = plan.layer, plan.activation
        assert data is not None
        step = data.step_of_batch if data.step is None else data.step
        assert step is not None
        grid = DataGrid(step, data.limits, data.zero_point, not self.clips_integers)
        read = quantized(work.editor, layer.scope, layer.data, grid, layer.weight.data_type, layer.node)
        work.editor.rewire(layer.node, layer.data_input, read)
