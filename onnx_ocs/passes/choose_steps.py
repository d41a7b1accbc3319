"""The threshold of each layer's weights, and so the step of its grid."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from onnx_ocs.numerics.grid import Grid
from onnx_ocs.numerics.weights import choose_threshold
from onnx_ocs.passes.base import LayerPlan, Work


@dataclass(frozen=True)
class ChooseSteps:
    """A threshold by clip method over the split weights, for each layer or each of its output channels."""

    name: ClassVar[str] = "choose-steps"

    clip: str = "none"

    def apply(self, work: Work) -> list[LayerPlan]:
        chosen: dict[Any, LayerPlan] = {}
        return [plan if plan.declined else self._visit(work, plan, chosen) for plan in work.plans]

    def _visit(self, work: Work, plan: LayerPlan, chosen: dict[Any, LayerPlan]) -> LayerPlan:
        if plan.key not in chosen:
            assert plan.bits is not None
            threshold = choose_threshold(
                work.values(plan), plan.splits, plan.axes, plan.per_channel, self.clip, plan.bits
            )
            chosen[plan.key] = replace(plan, threshold=threshold, step=Grid(plan.bits).step(threshold))
        same = chosen[plan.key]
        return replace(plan, threshold=same.threshold, step=same.step)
