"""What was done, as the plain data that the report file and the table show."""

import math
from collections.abc import Iterable
from typing import Any

from onnx_ocs.graph.layers import Declined
from onnx_ocs.numerics.split import joined
from onnx_ocs.passes.base import LayerPlan
from onnx_ocs.verify import Comparison


def layer_rows(plans: Iterable[LayerPlan], declined: Iterable[Declined]) -> list[dict[str, Any]]:
    """One row for each layer."""
    rows = [
        _declined_row(plan.layer.name, plan.layer.node.op, plan.reason) if plan.declined else _row(plan)
        for plan in plans
    ]
    return rows + [_declined_row(item.name, item.node.op, item.reason) for item in declined]


def _row(plan: LayerPlan) -> dict[str, Any]:
    assert plan.threshold is not None
    return {
        "name": plan.layer.name,
        "op": plan.layer.node.op,
        "status": "split" if plan.extra else "quantized",
        "reason": plan.reason,
        "channels": plan.channels,
        "extra": plan.extra,
        "source": joined(list(plan.splits)).source.tolist() if plan.extra else None,
        "bits": plan.bits,
        "storage": plan.storage,
        "granularity": "channel" if plan.per_channel else "tensor",
        "threshold": [float(value) for value in plan.threshold.reshape(-1)],
        "sqnr_db": plan.sqnr_db,
    }


def _declined_row(name: str, op: str, reason: str | None) -> dict[str, Any]:
    return {
        "name": name,
        "op": op,
        "status": "declined",
        "reason": reason,
        "channels": None,
        "extra": 0,
        "source": None,
    }


def overhead(plans: Iterable[LayerPlan]) -> dict[str, float]:
    """Weights and input channels after splitting relative to before, over all layers that are not declined."""
    before = after = channels = expanded = 0
    for plan in plans:
        if plan.declined:
            continue
        size = math.prod(plan.layer.weight.shape)
        before += size
        after += size * (plan.channels + plan.extra) // plan.channels
        channels += plan.channels
        expanded += plan.channels + plan.extra
    return {
        "weights": after / before if before else 1.0,
        "activations": expanded / channels if channels else 1.0,
    }


def stage_summary(comparison: Comparison, stage: str) -> dict[str, Any]:
    """The worst figures of all outputs of one stage, and those of each."""
    outputs = comparison.stages[stage]

    def worst(name: str, choose: Any) -> float | None:
        return choose((output[name] for output in outputs if output.get(name) is not None), default=None)

    summary = {
        "max_abs_error": worst("max_abs_error", max),
        "max_rel_error": worst("max_rel_error", max),
        "sqnr_db": worst("sqnr_db", min),
        "top1_agreement": worst("top1_agreement", min),
        "kl_divergence": worst("kl_divergence", max),
        "outputs": outputs,
    }
    accuracy = next((output["accuracy"] for output in outputs if "accuracy" in output), None)
    return summary | ({"accuracy": accuracy} if accuracy else {})
