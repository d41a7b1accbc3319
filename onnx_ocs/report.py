"""What was done, as the plain data that the report file and the table show."""

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from onnx_ocs.graph.layers import Declined
from onnx_ocs.numerics.split import joined
from onnx_ocs.numerics.statistics import Statistics
from onnx_ocs.plans import LayerPlan
from onnx_ocs.verify import Comparison


def layer_rows(plans: Iterable[LayerPlan], declined: Iterable[Declined], is_float: bool) -> list[dict[str, Any]]:
    """One row for each layer; ``is_float``: the model is split only."""
    rows = [
        _declined_row(plan.layer.name, plan.layer.node.op, plan.reason) if plan.declined else _row(plan, is_float)
        for plan in plans
    ]
    return rows + [_declined_row(item.name, item.node.op, item.reason) for item in declined]


def _row(plan: LayerPlan, is_float: bool) -> dict[str, Any]:
    return {
        "name": plan.layer.name,
        "op": plan.layer.node.op,
        "status": "split" if plan.extra or (plan.activation and plan.activation.extra) else "quantized",
        "reason": plan.reason,
        "channels": plan.channels,
        "extra": plan.extra,
        "source": joined(list(plan.splits)).source.tolist() if plan.extra else None,
        **_copies(plan),
        "bits": plan.bits,
        "storage": plan.storage,
        "granularity": "block" if plan.block is not None else "channel" if plan.per_channel else "tensor",
        "block": plan.block,
        "block_reason": plan.block_reason,
        "threshold": _threshold(plan),
        "narrowed": plan.narrowed,
        "round": plan.rounding,
        "round_reason": plan.rounding_reason,
        "bias_corrected": plan.shift is not None,
        "sqnr_db": plan.sqnr_db,
        **_activation(plan, is_float),
    }


def _threshold(plan: LayerPlan) -> list[float] | None:
    """One, or that of each output channel; of blocks the largest."""
    threshold = plan.threshold
    if threshold is None:
        return None
    if plan.block is not None:
        inner = [axis for axis in range(threshold.ndim) if axis != plan.layer.output_axis]
        threshold = threshold.max(axis=tuple(inner))
    return [float(value) for value in threshold.reshape(-1)]


def _copies(plan: LayerPlan) -> dict[str, Any]:
    """How many channels were asked for and how many there are, and who makes them."""
    widened = None if plan.outputs is None else len(plan.outputs)
    costs = {name: {"bytes": cost.bytes, "macs": cost.macs} for name, cost in (plan.costs or {}).items()}
    if not plan.static_extra:
        return {"copies": None, "costs": costs or None, "widened": widened}
    return {
        "copies": "gathered" if plan.stream is None else "folded",
        "copies_reason": plan.copied,
        "costs": costs or None,
        "real_ratio": plan.static_extra / plan.channels,
        "multiple": plan.room.multiple if plan.room else 1,
        "align_reason": plan.room.reason if plan.room else None,
        "widened": widened,
    }


def _activation(plan: LayerPlan, is_float: bool) -> dict[str, Any]:
    """What was done with the data of a layer."""
    data = plan.activation
    if data is None:
        return {"act_bits": None, "act_reason": plan.float_data, "act_extra": 0}
    split = joined(list(data.splits)) if data.splits else None
    return {
        "act_bits": None if is_float else data.bits,
        "act_reason": data.reason,
        "act_extra": data.extra,
        "act_source": split.source.tolist() if split is not None and split.extra else None,
        "act_scale": "static" if data.by_batch is None else "batch",
        "act_unsigned": data.unsigned,
        "act_threshold": data.threshold,
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


def overhead(plans: Iterable[LayerPlan], seen: Mapping[str, Statistics]) -> dict[str, float]:
    """Weights and data after splitting relative to before, over all layers that are not declined.

    As in Table 5 of Zhao et al. The data of a layer counts by its values per sample where calibration counted them for
    all layers, else by its channels.
    """
    kept = [plan for plan in plans if not plan.declined]
    weights = [math.prod(plan.layer.weight.shape) for plan in kept]
    found = [seen.get(plan.observed.key) if plan.observed else None for plan in kept]
    counted = [one.values / one.samples for one in found if one is not None]
    data = counted if len(counted) == len(kept) else [plan.channels for plan in kept]
    growth = [plan.expanded / plan.channels for plan in kept]
    return {
        name: sum(map(operator.mul, sizes, growth)) / sum(sizes) if kept else 1.0
        for name, sizes in (("weights", weights), ("activations", data))
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
