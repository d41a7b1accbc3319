"""How each layer's weights are rounded, and whether its bias makes up for what that does to the mean."""

from dataclasses import dataclass, replace
from typing import ClassVar

from onnx_ocs.graph.biases import bias_of
from onnx_ocs.numerics.assumed import fits
from onnx_ocs.passes.base import Work
from onnx_ocs.passes.plans import LayerPlan


@dataclass(frozen=True)
class ChooseRounding:
    """The rounding that was asked for; where it needs the data of the layer and there is none, one that does not."""

    name: ClassVar[str] = "choose-rounding"

    rounding: str = "nearest"
    correct: bool = False

    def apply(self, work: Work) -> list[LayerPlan]:
        return [plan if plan.declined else self._visit(work, plan) for plan in work.plans]

    def _visit(self, work: Work, plan: LayerPlan) -> LayerPlan:
        rounding, reason = plan.given.get("round", self.rounding), None
        moments = work.moments(plan)
        if rounding == "hessian" and (moments is None or moments.second is None):
            rounding, reason = "compensated", "nothing is known of its data"
        if rounding == "assumed" and not fits(plan.expanded, plan.kernel):
            rounding, reason = "compensated", "its kernels are too large for matrices of their positions"
        corrected = self.correct and work.mean(plan) is not None and bias_of(work.editor, plan.layer) is not None
        return replace(plan, rounding=rounding, rounding_reason=reason, corrected=corrected)
