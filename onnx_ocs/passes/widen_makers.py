"""Let the layers and operators in front of split layers make the copies of channels."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ocs.graph.layers import Place, Weight
from onnx_ocs.graph.streams import Ids, Stream, bias_axis
from onnx_ocs.passes.base import LayerPlan, Work


@dataclass(frozen=True)
class WidenMakers:
    """Biases, constants with a value for each channel, groups of depthwise layers, and shapes that count channels.

    Weights of the makers are those of their plans, which hold the channels twice already.
    """

    name: ClassVar[str] = "widen-makers"

    def apply(self, work: Work) -> list[LayerPlan]:
        for stream, sources in work.widened:
            self._visit(work, stream, sources)
        return work.plans

    def _visit(self, work: Work, stream: Stream, sources: dict[str, Ids]) -> None:
        edit, scope = work.editor, stream.scope
        for layer in (*stream.makers, *stream.depthwise):
            if (axis := bias_axis(layer)) is not None:
                self._repeat(work, stream, layer.node, 2, axis, sources[layer.node.outputs[0].name])
        for layer in stream.depthwise:
            edit.set_integer(scope, layer.node, "group", len(sources[layer.node.outputs[0].name]))
        for node, passage in stream.passages:
            (first, *_) = passage.inputs
            for index, axis in passage.constants.items():
                self._repeat(work, stream, node, index, axis, sources[node.inputs[first].name])
            if passage.shape is not None:
                shape = edit.constant(scope, f"{node.inputs[passage.shape].name}.flat", np.array([0, -1], np.int64))
                edit.rewire(node, passage.shape, shape)
        edit.forget_shapes(scope, set(sources))

    def _repeat(self, work: Work, stream: Stream, node: gs.Node, index: int, axis: int, source: Ids) -> None:
        """The constant input ``index`` with its values along ``axis`` for each channel in ``source``."""
        held = Place(node, stream.scope, work.editor).weight(index)
        assert isinstance(held, Weight)
        values = held.read(work.editor.model)
        if values.ndim < -axis or values.shape[axis] == 1:
            return
        made = work.editor.constant(stream.scope, f"{held.tensor.name}.wide", np.take(values, source, axis))
        work.editor.rewire(node, index, made)
