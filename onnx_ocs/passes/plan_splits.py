"""Which input channels of each layer's weight are split, and into how many copies."""

from dataclasses import dataclass, replace
from typing import ClassVar

from onnx_ocs.numerics.split import extra_channels
from onnx_ocs.numerics.weights import channel_peaks, choose_splits, no_split
from onnx_ocs.passes.base import LayerPlan, Work, unsplit


@dataclass(frozen=True)
class PlanSplits:
    """``ceil(ratio * C)`` more channels for each layer, one at a time (Zhao et al., Sections 3.2, 3.4)."""

    name: ClassVar[str] = "plan-splits"

    ratio: float = 0.02
    policy: str = "even"
    stored: bool = True  # weights that stay float are not split for their own sake

    def apply(self, work: Work) -> list[LayerPlan]:
        return [plan if plan.declined else self._visit(work, plan) for plan in work.plans]

    def _visit(self, work: Work, plan: LayerPlan) -> LayerPlan:
        weight, axes = work.values(plan), plan.axes
        reason = unsplit(plan, self.ratio) if self.stored else "its weights stay float (--bits none)"
        if reason is None:
            peaks = channel_peaks(weight, axes)
            reason = None if peaks.any() else "all its weights are zero"
        if reason is not None:
            return replace(plan, reason=reason, splits=no_split(weight, axes))
        extra = extra_channels(self.ratio, plan.channels // plan.layer.groups)
        return replace(plan, splits=choose_splits(peaks, extra, plan.per_channel, self.policy, axes.groups_on_input))
