"""Split the planned channels: a Gather in front of the layer, and a float weight with the copies."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.model import numpy_type
from onnx_ocs.graph.wire import Lazy
from onnx_ocs.numerics.split import joined
from onnx_ocs.numerics.weights import split_floats
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan


@dataclass(frozen=True)
class SplitChannels:
    """The same function of the same inputs, with a narrower range; no quantization yet.

    Copies that split the weight read the same data and hold shares of the weight. Copies that split the data (Equation
    4) hold shares of it and read the same weight: Gather, Mul, and Add for the offsets of quantization-aware splitting.
    """

    name: ClassVar[str] = "split-channels"

    aware: bool = True  # quantization-aware shares of weights (Equation 6), or plain ones
    aware_data: bool = True  # the same of data

    def apply(self, work: Work) -> list[LayerPlan]:
        made: dict[Any, gs.Tensor] = {}
        return [self._visit(work, plan, made) if self._changes(plan) else plan for plan in work.plans]

    def _changes(self, plan: LayerPlan) -> bool:
        return not plan.declined and (plan.static_extra > 0 or plan.outputs is not None)

    def _visit(self, work: Work, plan: LayerPlan, made: dict[Any, gs.Tensor]) -> LayerPlan:
        layer, edit = plan.layer, work.editor
        if plan.static_extra and plan.stream is None:
            plan = self._copy(work, plan)
        if plan.key not in made:
            made[plan.key] = edit.constant(
                layer.weight.home, f"{layer.weight.tensor.name}.split", tensor=self._tensor(work, plan)
            )
        edit.rewire(layer.node, layer.weight_input, made[plan.key])
        return plan

    def _copy(self, work: Work, plan: LayerPlan) -> LayerPlan:
        """Put a Gather in front of a layer."""
        layer, edit, data = plan.layer, work.editor, plan.layer.data
        kind = numpy_type(layer.weight.data_type)
        source, gain, offset = self._data(plan)
        shares = (None if part is None else part.astype(kind) for part in (gain, offset))
        gathered = edit.gather(layer.scope, data, source, layer.data_axis, layer.node, *shares)
        edit.rewire(layer.node, layer.data_input, gathered)
        return plan if gain is not None else replace(plan, gathered=(data, source))

    def _data(self, plan: LayerPlan) -> tuple[NDArray[np.int64], NDArray[Any] | None, NDArray[Any] | None]:
        """Which channel of the source each channel of the data copies, its share, and what is added to it."""
        parts = 1 if plan.layer.groups_on_input else plan.layer.groups
        copies = joined(list(plan.splits) * (parts // len(plan.splits))).source
        if plan.static_extra == plan.extra:
            return copies, None, None
        split = joined(list(plan.data_splits))
        offset = None
        if self.aware_data:
            assert plan.activation is not None
            assert plan.activation.step is not None
            offset = (split.offset * plan.activation.step)[copies]
        return split.source[copies], split.gain[copies], offset

    def _tensor(self, work: Work, plan: LayerPlan) -> Any:
        """The split weight, made when it is written: nobody reads it if integers take its place."""
        shape = list(plan.layer.weight.shape)
        if plan.outputs is not None:
            assert plan.layer.output_axis is not None
            shape[plan.layer.output_axis] = len(plan.outputs)
        shape[plan.layer.input_axis] += plan.static_extra // (1 if plan.layer.groups_on_input else plan.layer.groups)
        itemsize = numpy_type(plan.layer.weight.data_type).itemsize
        step = plan.step if self.aware else None

        def make() -> memoryview:
            shares = np.ascontiguousarray(split_floats(work.values(plan), plan.splits, plan.axes, step))
            return shares.reshape(-1).view(np.uint8).data

        lazy = Lazy(int(np.prod(shape)) * itemsize, make)
        return work.editor.model.tensor("", plan.layer.weight.data_type, tuple(shape), lazy)
