"""Which layers get no copies, since those would cost more than a model can spare."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from onnx_ocs.graph.prices import Prices
from onnx_ocs.numerics.cost import Cost, Rates
from onnx_ocs.passes.base import LayerPlan, Work

SPARED = 0.07
"""The share of a model's cost that its copies may add, or twice the ratio if that is more."""

KEPT = 0.6
"""The share of the layers that get their copies whatever these cost."""


@dataclass(frozen=True)
class LimitCosts:
    """Copies that cost most for each layer that reads them are left out, until the rest costs a small share of all.

    Most layers keep theirs: of a small network, all of whose layers are narrow, the cheapest.
    """

    name: ClassVar[str] = "limit-costs"

    ratio: float = 0.02
    rates: Rates = field(default_factory=Rates)

    def apply(self, work: Work) -> list[LayerPlan]:
        prices = Prices(work.editor, self.rates)
        whole = sum((prices.layer(plan.layer) for plan in work.plans), Cost()).total
        groups: dict[Any, list[LayerPlan]] = {}
        for plan in work.plans:
            if plan.costs is not None and not plan.data_splits and "ratio" not in plan.given:
                key = id(plan.stream) if plan.stream is not None else (plan.layer.data.name, plan.layer.data_axis)
                groups.setdefault(key, []).append(plan)
        costs = {key: self._cost(plans) for key, plans in groups.items()}
        left, most = sum(costs.values()), max(SPARED, 2 * self.ratio) * whole
        kept = number = sum(len(plans) for plans in groups.values())
        refused: dict[int, str] = {}
        for key in sorted(costs, key=lambda key: costs[key] / len(groups[key]), reverse=True):
            if left <= most or kept - len(groups[key]) < KEPT * number:
                break
            left, kept = left - costs[key], kept - len(groups[key])
            share, multiple = costs[key] / whole, self.rates.multiple
            reason = f"copies would cost too much of the model's time ({share:.1%}; --align {multiple} makes them)"
            refused |= {id(plan.layer): reason for plan in groups[key]}
        return [
            replace(plan, reason=refused[id(plan.layer)], stream=None) if id(plan.layer) in refused else plan
            for plan in work.plans
        ]

    def _cost(self, plans: list[LayerPlan]) -> float:
        """Of the copies themselves, and of reading them."""
        first = plans[0]
        assert first.costs is not None
        made = first.costs["gather" if first.stream is None else "fold"]
        return sum((plan.costs["reading"] for plan in plans if plan.costs), made).total
