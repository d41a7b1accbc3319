"""Which layers' data is quantized, and which of its channels are split."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from onnx_ocs.graph.observe import OPSET
from onnx_ocs.numerics.split import SplitPlan, extra_channels, joined, plan_splits
from onnx_ocs.numerics.statistics import Statistics
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import FIRST_LAYER_BITS, ActivationPlan, LayerPlan, is_first, unsplit

UNCOVERED = "the statistics do not cover the data"


@dataclass(frozen=True)
class PlanActivations:
    """``ceil(ratio * C)`` channels of each layer's data are split in two (Zhao et al., Sections 3.4, 5.3).

    Static: those with the most values beyond the 99th percentile of the tensor's magnitudes in calibration; of equal
    ones that with the larger peak. By batch: those with the largest magnitudes, which the graph finds itself.
    """

    name: ClassVar[str] = "plan-activations"

    bits: int | None = 8
    ratio: float = 0.0
    by_batch: bool = False
    unsigned: bool = False  # where no value is negative
    shifted: bool = False  # unsigned everywhere, with a zero point
    first: str = "int8"

    def apply(self, work: Work) -> list[LayerPlan]:
        if self.bits is None:
            return work.plans
        return [plan if plan.declined else self._visit(work, plan) for plan in work.plans]

    def _visit(self, work: Work, plan: LayerPlan) -> LayerPlan:
        if plan.float_data is not None:
            return plan
        scope = plan.layer.scope
        if scope.opset < OPSET:
            return replace(plan, float_data=f"its graph stays at opset {scope.opset}, and quantized data needs {OPSET}")
        assert self.bits is not None
        bits = FIRST_LAYER_BITS if self.first == "int8" and is_first(plan) else self.bits
        reason = unsplit(plan, self.ratio)
        groups = plan.layer.groups
        if self.by_batch:
            if reason is None and groups > 1:
                reason = "grouped: its channels are not split by batch"
            extra = 0 if reason else extra_channels(self.ratio, plan.channels)
            return replace(plan, activation=ActivationPlan(bits, by_batch=extra, reason=reason))
        if plan.observed is None:
            return replace(plan, float_data="its data is made inside of a body or function, where it is not observed")
        seen = work.statistics.get(plan.observed.key)
        if seen is None:
            return replace(plan, float_data=UNCOVERED)
        unsigned = self.shifted or (self.unsigned and seen.is_nonnegative)
        splits = () if reason else self._splits(seen, plan)
        return replace(plan, activation=ActivationPlan(bits, unsigned, splits, reason=reason))

    def _splits(self, seen: Statistics, plan: LayerPlan) -> tuple[SplitPlan, ...]:
        groups = plan.layer.groups
        extra = extra_channels(self.ratio, plan.channels // groups)
        plans = []
        for outliers, peaks in zip(np.split(seen.outliers, groups), np.split(seen.peaks, groups), strict=True):
            order = np.lexsort((-peaks, -outliers))
            copies = np.ones(len(order), np.int64)
            copies[order[:extra]] = 2
            plans.append(plan_splits(copies, "even"))
        return (joined(plans),) if plan.layer.groups_on_input else tuple(plans)
