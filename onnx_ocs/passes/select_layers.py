"""Which layers are worked on at all."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnx_ocs.errors import UnsupportedModel
from onnx_ocs.graph.layers import Layer
from onnx_ocs.numerics.weights import largest
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan, is_first


@dataclass(frozen=True)
class SelectLayers:
    """Leave out what the user leaves out, and weights that no grid can hold."""

    name: ClassVar[str] = "select-layers"

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    quantize_ops: tuple[str, ...] = ()  # all if empty
    first: str = "int8"
    overrides: Sequence[tuple[str, Mapping[str, Any]]] = ()  # of layers whose names match; later ones hold

    def apply(self, work: Work) -> list[LayerPlan]:
        return [self._visit(work, plan) for plan in work.plans]

    def _visit(self, work: Work, plan: LayerPlan) -> LayerPlan:
        layer = plan.layer
        given: dict[str, Any] = {}
        for pattern, some in self.overrides:
            given |= some if re.search(pattern, layer.name) else {}
        plan = replace(plan, given=given)
        if (reason := self._left_out(layer)) is not None:
            return replace(plan, declined=True, reason=reason)
        if "bits" in given and given["bits"] is None:
            return replace(plan, declined=True, reason="left float by --layer")
        if self.first == "float" and "bits" not in given and is_first(plan):
            return replace(plan, declined=True, reason="a first layer, left float (--first float)")
        peak = largest(work.values(plan))
        if not np.isfinite(peak):
            raise UnsupportedModel(
                f"{work.editor.model.name}: the weight {layer.weight.tensor.name!r} of node {layer.name!r} holds NaN "
                "or infinite values; repair it, or leave the node out with --skip"
            )
        if peak > np.finfo(np.float32).max:
            return replace(plan, declined=True, reason="its weights are beyond the range of float32 scales")
        return plan

    def _left_out(self, layer: Layer) -> str | None:
        if self.quantize_ops and layer.node.op not in self.quantize_ops:
            return f"{layer.node.op} is not among the operators to quantize"
        if self.only and not any(re.search(pattern, layer.name) for pattern in self.only):
            return "not selected by --only"
        if any(re.search(pattern, layer.name) for pattern in self.skip):
            return "left out by --skip"
        return None
