"""The threshold of each layer's data, and so the step of its grid."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnx_ocs.numerics.clip import thresholds
from onnx_ocs.numerics.grid import Grid
from onnx_ocs.numerics.split import joined
from onnx_ocs.numerics.statistics import Statistics
from onnx_ocs.passes.base import ActivationPlan, LayerPlan, Work


@dataclass(frozen=True)
class ChooseActivationSteps:
    """A threshold by clip method over the data as calibration saw it, after its split."""

    name: ClassVar[str] = "choose-activation-steps"

    clip: str = "mse"

    def apply(self, work: Work) -> list[LayerPlan]:
        chosen: dict[Any, float] = {}
        return [self._visit(work, plan, chosen) for plan in work.plans]

    def _visit(self, work: Work, plan: LayerPlan, chosen: dict[Any, float]) -> LayerPlan:
        data = plan.activation
        if plan.declined or data is None or data.by_batch is not None:
            return plan
        assert plan.observed is not None
        tensor = plan.observed.key
        key = (tensor, data.bits, data.unsigned, *(split.denominator.tobytes() for split in data.splits))
        if key not in chosen:
            chosen[key] = self._threshold(work.statistics[tensor], data)
        grid = self._grid(data)
        step = grid.step(np.asarray(chosen[key]))
        return replace(plan, activation=replace(data, threshold=chosen[key], step=step))

    def _threshold(self, seen: Statistics, data: ActivationPlan) -> float:
        split = joined(list(data.splits)) if data.splits else None
        return float(thresholds(seen.histogram(split), self.clip, self._grid(data).bits)[0])

    def _grid(self, data: ActivationPlan) -> Grid:
        """The symmetric grid with the same points from 0 on."""
        return Grid(data.bits + 1 if data.unsigned else data.bits)
