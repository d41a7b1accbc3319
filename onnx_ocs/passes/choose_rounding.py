"""How each layer's weights are rounded, and whether its bias makes up for what that does to the mean."""

from dataclasses import dataclass, replace
from typing import ClassVar

from onnx_ocs.graph.biases import bias_of
from onnx_ocs.numerics.assumed import fits
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan

FEW = 5
"""Bits up to which ``auto`` rounds by assumed second moments: that takes longer than ``compensated``, and with more
bits it gains little."""


@dataclass(frozen=True)
class ChooseRounding:
    """The rounding that was asked for; where it needs the data of the layer and there is none, one that does not.

    ``auto`` is of those the one without samples: ``assumed`` where the layer or the rest of the model has few bits,
    else ``compensated``.
    """

    name: ClassVar[str] = "choose-rounding"

    rounding: str = "nearest"
    correct: bool = False
    bits: int | None = None  # of most layers

    def apply(self, work: Work) -> list[LayerPlan]:
        return [plan if plan.declined else self._visit(work, plan) for plan in work.plans]

    def _visit(self, work: Work, plan: LayerPlan) -> LayerPlan:
        rounding, reason = plan.given.get("round", self.rounding), None
        moments = work.moments(plan)
        if rounding == "hessian" and (moments is None or moments.second is None):
            rounding, reason = "auto", "nothing is known of its data"
        if rounding == "auto":
            few = any(bits is not None and bits <= FEW for bits in (self.bits, plan.bits))
            rounding = "assumed" if few else "compensated"
        if rounding == "assumed" and not fits(plan.expanded, plan.kernel):
            rounding, reason = "compensated", "its kernels are too large for matrices of their positions"
        corrected = self.correct and work.mean(plan) is not None and bias_of(work.editor, plan.layer) is not None
        return replace(plan, rounding=rounding, rounding_reason=reason, corrected=corrected)
