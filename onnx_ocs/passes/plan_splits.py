"""Which input channels of each layer are split, and into how many copies."""

from dataclasses import dataclass, replace
from typing import ClassVar

from onnx_ocs.numerics.weights import channel_peaks, choose_splits, no_split
from onnx_ocs.passes.base import FIRST_LAYER_CHANNELS, LayerPlan, Work, is_first


@dataclass(frozen=True)
class PlanSplits:
    """``ceil(ratio * C)`` more channels for each layer, one at a time (Zhao et al., Sections 3.2, 3.4)."""

    name: ClassVar[str] = "plan-splits"

    ratio: float = 0.02
    policy: str = "even"

    def apply(self, work: Work) -> list[LayerPlan]:
        return [plan if plan.declined else self._visit(work, plan) for plan in work.plans]

    def _visit(self, work: Work, plan: LayerPlan) -> LayerPlan:
        weight, axes = work.values(plan), plan.axes
        peaks = channel_peaks(weight, axes)
        reason = self._unsplit(plan, peaks.shape[2], bool(peaks.any()))
        if reason is not None:
            return replace(plan, reason=reason, splits=no_split(weight, axes))
        splits = choose_splits(peaks, self.ratio, plan.per_channel, self.policy, axes.groups_on_input)
        return replace(plan, splits=splits)

    def _unsplit(self, plan: LayerPlan, inputs: int, any_weight: bool) -> str | None:
        """Why the layer is not split; None if it is."""
        if self.ratio == 0:
            return "ratio 0"
        if is_first(plan):
            return f"reads a graph input with {FIRST_LAYER_CHANNELS} channels or fewer"
        if inputs == 1:
            return "depthwise: one input channel per group" if plan.layer.groups > 1 else "one input channel"
        if not any_weight:
            return "all its weights are zero"
        return None
