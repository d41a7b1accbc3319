"""Which layers get no copies, since those would cost more than a model can spare."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from onnx_ocs.numerics.cost import Cost, Rates
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan
from onnx_ocs.prices import Prices

SPARED = 0.07
"""The share of a model's cost that its copies may add, or twice the ratio if that is more."""

KEPT = 0.6
"""The share of the layers that get their copies whatever these cost."""


@dataclass(frozen=True)
class LimitCosts:
    """Copies that cost most for each layer that reads them are left out, until the rest costs a small share of all.

    Most layers keep theirs: of a small network, all of whose layers are narrow, the cheapest. Where sizes are free
    nothing is left out.
    """

    name: ClassVar[str] = "limit-costs"

    ratio: float = 0.02
    rates: Rates = field(default_factory=Rates)

    def apply(self, work: Work) -> list[LayerPlan]:
        prices = Prices(work.editor, self.rates)
        groups: dict[Any, list[LayerPlan]] = {}
        for plan in work.plans:
            groups.setdefault(_key(plan), []).append(plan)
        costs = {key: self._cost(plans) for key, plans in groups.items() if self._may_lose(plans)}
        if not all(prices.knows(plan.layer) for key in costs for plan in groups[key]):
            return work.plans
        whole = sum((prices.layer(plan.layer) for plan in work.plans), Cost()).total
        left, most = sum(costs.values()), max(SPARED, 2 * self.ratio) * whole
        kept = number = sum(len(groups[key]) for key in costs)
        refused: dict[Any, str] = {}
        for key in sorted(costs, key=lambda key: costs[key] / len(groups[key]), reverse=True):
            if left > most and kept - len(groups[key]) >= KEPT * number:
                left, kept = left - costs[key], kept - len(groups[key])
                remedy = f"{costs[key] / whole:.1%}; --align {self.rates.multiple} makes them"
                refused[key] = f"copies would cost too much of the model's time ({remedy})"
        return [
            replace(plan, reason=refused[_key(plan)], stream=None) if _key(plan) in refused else plan
            for plan in work.plans
        ]

    def _may_lose(self, plans: list[LayerPlan]) -> bool:
        """Whether there are copies of weights, and none that were asked for by name or that the data has anyway."""
        named = any(plan.data_splits or "ratio" in plan.given for plan in plans)
        return not named and any(plan.costs is not None for plan in plans)

    def _cost(self, plans: list[LayerPlan]) -> float:
        """Of the copies themselves, and of reading them."""
        known = [plan.costs for plan in plans if plan.costs is not None]
        made = known[0]["gather" if plans[0].stream is None else "fold"]
        return sum((costs["reading"] for costs in known), made).total


def _key(plan: LayerPlan) -> Any:
    """Equal for layers that have their copies together: those of one stream, or of one tensor."""
    layer = plan.layer
    if plan.stream is not None:
        return id(plan.stream)
    return id(layer) if layer.groups > 1 else (id(layer.scope), layer.data.name, layer.data_axis)
