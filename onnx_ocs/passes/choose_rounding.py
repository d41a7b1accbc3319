"""How each layer's weights are rounded, and whether its bias makes up for what that does to the mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from onnx_ocs.graph.biases import bias_of
from onnx_ocs.numerics.assumed import fits
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import DENSE, NARROW, LayerPlan

SMALL = 2e9
"""Products of a rounding of all weights by second moments up to which ``auto`` does so with more bits as well."""

LARGE = 2e11
"""Products beyond which it is never by made-up samples: four times those of ResNet-50, which takes minutes."""


@dataclass(frozen=True)
class ChooseRounding:
    """The rounding that was asked for; where it needs the data of the layer and there is none, one that does not.

    ``auto`` is of those one without samples. Where bits are few, or the model is small: ``synthetic`` if the model
    takes pictures, which can be made up, or with few bits for dense layers, of whose data nothing can be assumed; else
    ``assumed``, which knows feature maps. Elsewhere ``compensated``, which takes least time.
    """

    name: ClassVar[str] = "choose-rounding"

    rounding: str = "nearest"
    correct: bool = False
    bits: int | None = None  # of most layers
    pictures: bool = False  # the model takes some

    def apply(self, work: Work) -> list[LayerPlan]:
        products = _products(work.plans)
        return [plan if plan.declined else self._visit(work, plan, products) for plan in work.plans]

    def asked(self, plans: Sequence[LayerPlan]) -> list[str]:
        """What each layer is rounded by where all is known that this needs."""
        products = _products(plans)
        return [self._asked(plan, products) for plan in plans]

    def _asked(self, plan: LayerPlan, products: float) -> str:
        rounding: str = plan.given.get("round", self.rounding)
        if rounding != "auto":
            return rounding
        narrow = products <= LARGE and self._is_narrow(plan)
        if (self.pictures and (narrow or products <= SMALL)) or (narrow and plan.layer.node.op in DENSE):
            return "synthetic"
        return self._without_samples(plan, products)

    def _without_samples(self, plan: LayerPlan, products: float) -> str:
        return "assumed" if self._is_narrow(plan) or products <= SMALL else "compensated"

    def _is_narrow(self, plan: LayerPlan) -> bool:
        return any(bits is not None and bits <= NARROW for bits in (self.bits, plan.given.get("bits")))

    def _visit(self, work: Work, plan: LayerPlan, products: float) -> LayerPlan:
        rounding, reason = self._asked(plan, products), None
        if rounding in ("hessian", "synthetic"):
            moments = work.moments(plan, rounding == "synthetic")
            if moments is None or moments.second is None:
                rounding, reason = self._without_samples(plan, products), "nothing is known of its data"
        if rounding == "assumed" and not fits(plan.expanded, plan.kernel):
            rounding, reason = "compensated", "its kernels are too large for matrices of their positions"
        corrected = self.correct and work.mean(plan) is not None and bias_of(work.editor, plan.layer) is not None
        return replace(plan, rounding=rounding, rounding_reason=reason, corrected=corrected)


def _products(plans: Sequence[LayerPlan]) -> float:
    """Of rounding all weights once by second moments; each changes the error that all others of its output meet."""
    made = 0
    for plan in plans:
        shape, output = plan.layer.weight.shape, plan.layer.output_axis
        if not plan.declined:
            inputs = math.prod(shape) // (1 if output is None else shape[output])
            made += math.prod(shape) * (inputs if plan.contraction is None else plan.contraction.inputs)
    return float(made)
