"""The threshold of each layer's weights, and so the step of its grid."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.graph.streams import is_depthwise
from onnx_ocs.numerics.drift import Drift
from onnx_ocs.numerics.grid import Grid
from onnx_ocs.numerics.integers import Task, exact_threshold, least_error_threshold, rounded, split_integers
from onnx_ocs.numerics.rounding import BY_MOMENTS
from onnx_ocs.numerics.saturation import kernel_order, row_sums, widened
from onnx_ocs.numerics.weights import choose_threshold
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan

ROUNDS = 8
"""Times that a threshold is raised a little, before it is raised to where nothing can saturate."""

PAIRED = {"Conv", "Gemm", "MatMul"}
"""Layers whose products are added in pairs, if they are not depthwise and the weight is the right operand."""


@dataclass(frozen=True)
class ChooseSteps:
    """A threshold by clip method over the split weights, for each layer or each of its output channels.

    ``safe``: raised where sums of two products could leave 16 bits, by as much as is needed, so that no row has less
    than the precision of 7 bits.
    """

    name: ClassVar[str] = "choose-steps"

    clip: str = "none"  # auto: a grid that weights lie on, the least error of the outputs by moments, else none
    safe: bool = False
    aware: bool = True

    def apply(self, work: Work) -> list[LayerPlan]:
        chosen: dict[Any, LayerPlan] = {}
        readers = Counter(plan.layer.weight.key for plan in work.plans)
        return [
            plan if plan.declined else self._visit(work, plan, chosen, readers[plan.layer.weight.key] == 1)
            for plan in work.plans
        ]

    def _visit(self, work: Work, plan: LayerPlan, chosen: dict[Any, LayerPlan], alone: bool) -> LayerPlan:
        """``alone``: no other layer reads the weight."""
        most = self._most(plan)
        key = (*plan.key, most)
        drift = work.drift(plan) if alone else None
        if key not in chosen:
            chosen[key] = self._chosen(work, plan, drift, most)
        same = chosen[key]
        plan = replace(plan, threshold=same.threshold, step=same.step, narrowed=same.narrowed, rounded=same.rounded)
        return plan if work.follower is None else work.followed(plan, drift)

    def _chosen(self, work: Work, plan: LayerPlan, drift: Drift | None, most: int | None) -> LayerPlan:
        bits = plan.bits
        assert bits is not None
        weight = work.values(plan)
        wanted = weight if drift is None else work.making_up(plan, weight, drift)
        threshold = self._threshold(work, plan, weight, wanted, drift)
        raised = threshold if most is None else self._raised(plan, wanted, threshold, most, work.task(plan, drift))
        step, narrowed = Grid(bits).step(raised), int(np.count_nonzero(raised > threshold))
        plan = replace(plan, threshold=raised, step=step, narrowed=narrowed)
        if work.follower is None:
            return plan
        made = rounded(weight, wanted, plan.splits, plan.axes, step, bits, self.aware, work.task(plan, drift))
        return replace(plan, rounded=made)

    def _threshold(
        self, work: Work, plan: LayerPlan, weight: NDArray[Any], wanted: NDArray[Any], drift: Drift | None
    ) -> NDArray[np.float64]:
        assert plan.bits is not None
        clip, by_moments = plan.given.get("clip", self.clip), plan.rounding in BY_MOMENTS
        if clip != "auto":
            return choose_threshold(wanted, plan.splits, plan.axes, plan.per_channel, clip, plan.bits)
        largest = choose_threshold(wanted, plan.splits, plan.axes, plan.per_channel, "none", plan.bits)
        known = largest if by_moments or plan.planned is None else plan.planned
        if plan.block is not None:
            return known
        exact = np.full(largest.shape, np.nan)
        if self.aware:
            exact = exact_threshold(weight, plan.axes, largest, plan.bits)
        if not by_moments:
            return np.where(exact > 0, exact, known)
        return least_error_threshold(wanted, plan.splits, plan.axes, largest, plan.bits, work.task(plan, drift), exact)

    def _most(self, plan: LayerPlan) -> int | None:
        """The largest integer of the layer's data, if its kernel adds products in pairs; it shifts signed ones."""
        layer, data = plan.layer, plan.activation
        if not self.safe or data is None or is_depthwise(layer) or layer.output_axis is None:
            return None
        most = data.limits[1] if data.unsigned else data.limits[1] + 128
        return most if layer.node.op in PAIRED and layer.weight_input == 1 else None

    def _raised(
        self, plan: LayerPlan, weight: NDArray[Any], threshold: NDArray[np.float64], most: int, task: Task
    ) -> NDArray[np.float64]:
        assert plan.bits is not None
        assert plan.axes.output is not None
        grid, least = Grid(plan.bits), threshold
        for _ in range(ROUNDS):
            step = grid.step(threshold)
            integers, _ = split_integers(weight, plan.splits, plan.axes, step, plan.bits, self.aware, task)
            sums = row_sums(kernel_order(integers, plan.axes.input, plan.axes.output), 0, most)
            if not sums.saturates.any():
                return threshold
            threshold = widened(threshold, sums)
        return np.where(threshold > least, least * 2, least)
