"""On how many bits each layer goes, with how many scales, and in which integer type."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from onnx_ocs.graph.integers import BLOCKS_SINCE, PER_CHANNEL_SINCE, TWO_BIT_COLUMNS, TYPES, narrowest, needed_opset
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan, weight_bits


@dataclass(frozen=True)
class ChooseGrid:
    """Bits, granularity and storage of the integers; a layer whose graph's opset cannot store them is declined."""

    name: ClassVar[str] = "choose-grid"

    bits: int = 8
    per_channel: bool = True
    first: str = "int8"
    containers: frozenset[int] = frozenset(TYPES)  # bits of the integer types that there may be
    block_containers: frozenset[int] = frozenset(TYPES)  # of those with a scale for each block
    scale_axes: Mapping[str, int] = field(default_factory=dict)  # where a runtime takes no other for a scale each
    stored: bool = True  # or the weights stay float, and only the step counts

    def apply(self, work: Work) -> list[LayerPlan]:
        return [plan if plan.declined else self._visit(work, plan) for plan in work.plans]

    def opsets(self, plan: LayerPlan) -> set[int]:
        """What the layer needs its graph's opset to be: for its smallest type, and for INT8."""
        widths = (self._width(plan), 8)
        if plan.block is not None:
            return {max(needed_opset(width, True), BLOCKS_SINCE) for width in widths}
        return {needed_opset(width, self._per_channel(plan)) for width in widths}

    def _visit(self, work: Work, plan: LayerPlan) -> LayerPlan:
        opset, per_channel = plan.layer.weight.home.opset, self._per_channel(plan)
        plan = replace(plan, bits=self._bits(plan), per_channel=per_channel, storage=self._width(plan))
        if not self.stored or opset >= max(self.opsets(plan)):
            return plan
        if plan.block is not None:  # 2 bits, in a graph whose opset stays below that of their type
            return replace(plan, storage=narrowest(4, self.block_containers))
        if opset >= min(self.opsets(plan)):
            return replace(plan, storage=8)
        what = (
            f"a scale per output channel needs opset {PER_CHANNEL_SINCE}; --per-tensor needs 10"
            if per_channel
            else "DequantizeLinear needs opset 10"
        )
        return replace(plan, declined=True, reason=f"its graph stays at opset {opset} and {what}")

    def _bits(self, plan: LayerPlan) -> int:
        return weight_bits(plan, self.bits, self.first)

    def _width(self, plan: LayerPlan) -> int:
        containers = self.containers if plan.block is None else self.block_containers
        return narrowest(max(self._bits(plan), 3 if _is_garbled(plan) else 0), containers)

    def _per_channel(self, plan: LayerPlan) -> bool:
        layer = plan.layer
        if not self.per_channel or layer.output_axis is None or _is_refused(plan):
            return False
        return self.scale_axes.get(layer.node.op, layer.output_axis) == layer.output_axis


def _is_garbled(plan: LayerPlan) -> bool:
    """Whether onnxruntime 1.32 computes something else from 2 bits: it packs the outputs of four rows into bytes."""
    layer = plan.layer
    if layer.node.op not in ("MatMul", "Gemm") or layer.output_axis is None:
        return False
    return layer.weight.shape[layer.output_axis] % TWO_BIT_COLUMNS > 0


def _is_refused(plan: LayerPlan) -> bool:
    """Whether onnxruntime 1.32 fails on a scale per channel: it takes an integer kernel that knows none such."""
    layer = plan.layer
    if layer.node.op != "MatMul" or plan.activation is None:
        return False
    return layer.weight_input == 0 or len(layer.weight.shape) > 2
