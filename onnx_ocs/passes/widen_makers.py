"""Let the layers and operators in front of split layers make the copies of channels."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.layers import Place, Weight
from onnx_ocs.graph.streams import Ids, Stream, bias_axis
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan, Widened


@dataclass(frozen=True)
class WidenMakers:
    """Biases, constants with a value for each channel, groups of depthwise layers, and shapes that count channels.

    Weights of the makers are those of their plans, which hold the channels twice already.
    """

    name: ClassVar[str] = "widen-makers"

    def apply(self, work: Work) -> list[LayerPlan]:
        for wide in work.widened:
            self._visit(work, wide)
        return work.plans

    def _visit(self, work: Work, wide: Widened) -> None:
        stream, sources = wide.stream, wide.sources
        edit, scope = work.editor, stream.scope
        for layer in (*stream.makers, *stream.depthwise):
            if (axis := bias_axis(layer)) is not None:
                source = sources[layer.node.outputs[0].name]
                self._repeat(work, stream, layer.node, 2, axis, source, wide.gain(layer))
        for layer in stream.depthwise:
            edit.set_number(scope, layer.node, "group", len(sources[layer.node.outputs[0].name]))
        for node, passage in stream.passages:
            (first, *_) = passage.inputs
            for index, axis in passage.constants.items():
                self._repeat(work, stream, node, index, axis, sources[node.inputs[first].name])
            if passage.shape is not None:
                shape = edit.constant(scope, f"{node.inputs[passage.shape].name}.flat", np.array([0, -1], np.int64))
                edit.rewire(node, passage.shape, shape)
                if node.attrs.get("allowzero", 0):  # under which 0 is a size, and not that of the input
                    edit.set_number(scope, node, "allowzero", 0)
        edit.forget_shapes(scope, set(sources))

    def _repeat(
        self,
        work: Work,
        stream: Stream,
        node: gs.Node,
        index: int,
        axis: int,
        source: Ids,
        gain: NDArray[np.float64] | None = None,
    ) -> None:
        """The constant input ``index`` with its value for each channel of ``source`` on ``axis``, times ``gain``."""
        held = Place(node, stream.scope, work.editor).weight(index)
        assert isinstance(held, Weight)
        values = held.read(work.editor.model)
        if values.ndim >= -axis and values.shape[axis] > 1:
            values = np.take(values, source, axis)
        elif gain is None:
            return
        if gain is not None:
            values = (values * gain.reshape(-1, *[1] * (-1 - axis))).astype(values.dtype)
        made = work.editor.constant(stream.scope, f"{held.tensor.name}.wide", values)
        work.editor.rewire(node, index, made)
