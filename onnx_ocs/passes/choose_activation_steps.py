"""The threshold of each layer's data, and so the step of its grid."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnx_ocs.graph.qdq import DataGrid
from onnx_ocs.numerics.clip import thresholds
from onnx_ocs.numerics.grid import Grid, affine
from onnx_ocs.numerics.split import SplitPlan, joined
from onnx_ocs.numerics.statistics import Statistics
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import ActivationPlan, LayerPlan, TensorPlan

CARRIED_BITS = 8
"""Of tensors that no layer reads: sums on their way to an activation function, and the like."""


@dataclass(frozen=True)
class ChooseActivationSteps:
    """A threshold by clip method over the data as calibration saw it, after its split."""

    name: ClassVar[str] = "choose-activation-steps"

    clip: str = "mse"
    shifted: bool = False  # tensors that several operators read are on a grid with a zero point

    def apply(self, work: Work) -> list[LayerPlan]:
        work.tensors = self._tensors(work)
        placed = {plan.tensor.name: plan for plan in work.tensors}
        chosen: dict[Any, tuple[float, float]] = {}
        return [self._visit(work, plan, placed, chosen) for plan in work.plans]

    def _tensors(self, work: Work) -> list[TensorPlan]:
        """Each tensor on the grid that all it shares one with need together."""
        bits = {plan.layer.data.name: plan.activation.bits for plan in work.plans if plan.activation is not None}
        splits = {
            plan.layer.data.name: joined(list(plan.data_splits))
            for plan in work.plans
            if plan.data_splits and plan.stream is not None
        }  # which the tensor has where it is made
        seen = work.statistics
        placed = [plan for plan in work.tensors if plan.observed.key in seen]
        made: dict[str, DataGrid] = {}
        for members in _grouped(placed, lambda plan: plan.better):
            width = {
                plan.tensor.name: min(bits.get(other.tensor.name, CARRIED_BITS) for other in group)
                for group in _grouped(members, lambda plan: plan.together)
                for plan in group
            }
            keys = {plan.tensor.name: plan.observed.key for plan in members}
            ends = {
                name: self._range(seen[key], splits.get(name), width[name], self.shifted) for name, key in keys.items()
            }
            groups = [members] if _fits(members, ends) else list(_grouped(members, lambda plan: plan.together))
            for group in groups:
                low, high = _spanned([plan for plan in group if not plan.moved] or group, ends)
                narrowest = min(width[plan.tensor.name] for plan in group)
                grid = self._grid(ActivationPlan(narrowest, unsigned=self.shifted), low, high)
                made |= dict.fromkeys((plan.tensor.name for plan in group), grid)
        return [replace(plan, grid=made[plan.tensor.name]) for plan in placed]

    def _visit(
        self, work: Work, plan: LayerPlan, placed: dict[str, TensorPlan], chosen: dict[Any, tuple[float, float]]
    ) -> LayerPlan:
        data = plan.activation
        if plan.declined or data is None or data.by_batch is not None:
            return plan
        assert plan.observed is not None
        if plan.layer.data.name in placed:
            return replace(plan, activation=self._placed(data, placed[plan.layer.data.name]))
        key = (plan.observed.key, data.bits, data.unsigned, *(split.denominator.tobytes() for split in data.splits))
        split = joined(list(data.splits)) if data.splits else None
        if key not in chosen:
            chosen[key] = self._range(work.statistics[plan.observed.key], split, data.bits, data.unsigned)
        low, high = chosen[key]
        grid = self._grid(data, low, high)
        assert isinstance(grid.step, np.ndarray)
        made = replace(data, threshold=max(-low, high), step=grid.step, zero_point=grid.zero_point)
        return replace(plan, activation=made)

    def _placed(self, data: ActivationPlan, tensor: TensorPlan) -> ActivationPlan:
        """The data of a layer that reads a tensor with a grid of its own."""
        grid = tensor.grid
        assert grid is not None
        assert isinstance(grid.step, np.ndarray)
        threshold = float(max(grid.zero_point, grid.limits[1] - grid.zero_point) * grid.step)
        return replace(data, unsigned=self.shifted, step=grid.step, zero_point=grid.zero_point, threshold=threshold)

    def _grid(self, data: ActivationPlan, low: float, high: float) -> DataGrid:
        if data.unsigned:
            step, zero_point = affine(low, high, data.bits)
            return DataGrid(step, data.limits, zero_point)
        return DataGrid(Grid(data.bits).step(np.asarray(max(-low, high))), data.limits)

    def _range(self, seen: Statistics, split: SplitPlan | None, bits: int, affine: bool) -> tuple[float, float]:
        """The ends of the grid: the threshold on both sides, or less on the side where nothing lies as far out.

        Of data that is never negative all points lie above zero: those of a symmetric grid of one bit more.
        """
        one_sided = affine and seen.is_nonnegative
        threshold = float(thresholds(seen.histogram(split), self.clip, bits + 1 if one_sided else bits)[0])
        low, high = (seen.lowest(split), seen.highest(split)) if affine else (-threshold, threshold)
        return max(low, -threshold), min(high, threshold)


Ends = tuple[float, float]


def _grouped(plans: list[TensorPlan], key: Callable[[TensorPlan], str]) -> Iterable[list[TensorPlan]]:
    groups: dict[str, list[TensorPlan]] = {}
    for plan in plans:
        groups.setdefault(key(plan), []).append(plan)
    return groups.values()


def _spanned(plans: list[TensorPlan], ends: Mapping[str, Ends]) -> Ends:
    lows, highs = zip(*(ends[plan.tensor.name] for plan in plans), strict=True)
    return min(lows), max(highs)


def _fits(plans: list[TensorPlan], ends: Mapping[str, Ends]) -> bool:
    """Whether one grid for all leaves the activation functions out of work that vanish in it: that of a Relu begins at
    zero, that of a Clip lies within its bounds."""
    low, high = _spanned([plan for plan in plans if not plan.moved] or plans, ends)
    for plan in plans:
        if plan.absorbs == "Relu" and low < 0:
            return False
        if plan.absorbs == "Clip" and (low < ends[plan.tensor.name][0] or high > ends[plan.tensor.name][1]):
            return False
    return True
