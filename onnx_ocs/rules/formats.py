"""What the ONNX standard asks of QuantizeLinear and DequantizeLinear, and each runtime of their types and scales."""

from collections.abc import Iterator

import numpy as np
import onnx

from onnx_ocs.graph.model import PACKED
from onnx_ocs.graph.quantized import Quantizer, integer_limits
from onnx_ocs.rules.base import Problem, View, rule

SINCE = {
    "FLOAT8E4M3FN": 19,
    "FLOAT8E4M3FNUZ": 19,
    "FLOAT8E5M2": 19,
    "FLOAT8E5M2FNUZ": 19,
    "INT4": 21,
    "UINT4": 21,
    "INT16": 21,
    "UINT16": 21,
    "FLOAT4E2M1": 23,
    "INT2": 25,
    "UINT2": 25,
}
"""The first opset of each type; of the others 10."""

AXIS_SINCE, BLOCK_SINCE = 13, 21


@rule("opset", "error")
def opset(view: View) -> Iterator[Problem]:
    """Types, axes and blocks that the opset of the model does not have (ONNX operators, "Changelog").

    One scale for each channel came with opset 13, FLOAT8 with 19, 4 and 16 bits and blocks with 21, 2 bits with 25.
    Below, the file is no valid model, whatever the runtime makes of it. The operators of the domain com.microsoft have
    no such limits.
    """
    for found in view.quantizers:
        now = found.place.scope.opset
        if found.node.domain == "com.microsoft":
            continue
        needs = [(SINCE.get(found.type_name, 10), f"{found.type_name} integers")]
        needs += [(AXIS_SINCE, "a scale for each index of an axis")] if found.per_axis or found.axis is not None else []
        needs += [(BLOCK_SINCE, "blocks")] if found.is_blocked else []
        since, what = max(needs)
        if since > now:
            yield Problem(
                found.place, f"{what} need opset {since}; this is opset {now}", "raise the opset of the model"
            )


@rule("scale-shape", "error")
def scale_shape(view: View) -> Iterator[Problem]:
    """As many scales as the axis has indices, and as many zero points as scales (ONNX operators, QuantizeLinear)."""
    for found in view.quantizers:
        if found.scale is None:
            continue
        remedy = "write one scale, or one for each index of the axis, and zero points of the same shape"
        zero = found.zero_point
        if found.explicit and zero is not None and zero.size != found.scale.size:
            yield Problem(found.place, f"it has {found.scale.size} scales and {zero.size} zero points", remedy)
            continue
        shape = view.wiring.shape(found.node.inputs[0])
        if shape is None or found.scale.size == 1:
            continue
        axis = found.axis_of(len(shape))
        if not 0 <= axis < len(shape):
            yield Problem(found.place, f"axis {found.axis} lies outside of {len(shape)} dimensions", remedy)
            continue
        length = shape[axis]
        if length is None:
            continue
        if not found.is_blocked and found.scale.size != length:
            yield Problem(found.place, f"it has {found.scale.size} scales for {length} indices of axis {axis}", remedy)
        if found.is_blocked and not _blocks_fit(found, shape, axis, length):
            shown = f"{found.block_size} along axis {axis} of {list(shape)}"
            yield Problem(
                found.place, f"its scales {list(found.scale.shape)} do not fit blocks of {shown}", "write one for each"
            )


def _blocks_fit(found: Quantizer, shape: tuple[int | None, ...], axis: int, length: int) -> bool:
    assert found.scale is not None
    if found.block_size <= 0 or found.scale.ndim != len(shape):
        return False
    wanted = [-(-length // found.block_size) if at == axis else size for at, size in enumerate(shape)]
    return all(size is None or size == held for size, held in zip(wanted, found.scale.shape, strict=True))


@rule("scale-positive", "error")
def scale_positive(view: View) -> Iterator[Problem]:
    """Scales are finite and above 0 (onnx-tensorrt: "Scale coefficients must all be positive").

    ONNX does not say so, but dividing by such a scale gives no numbers that mean anything.
    """
    for found in view.quantizers:
        if found.scale is None:
            continue
        values = np.asarray(found.scale, np.float64)
        if bad := int(np.count_nonzero(~(np.isfinite(values) & (values > 0)))):
            yield Problem(
                found.place,
                f"{bad} of {values.size} scales {'is' if bad == 1 else 'are'} not finite and above 0",
                "give a channel of zeros any positive scale",
            )


@rule("int2", "error")
def int2(view: View) -> Iterator[Problem]:
    """No integers of 2 bits (OpenVINO 2026.4 on CPUs: "Unsupported type"; docs/openvino.md)."""
    for found in view.quantizers:
        if found.type_name in ("INT2", "UINT2"):
            yield Problem(found.place, f"OpenVINO refuses {found.type_name}", "store them as INT4 or INT8")


@rule("int4-odd", "error")
def int4_odd(view: View) -> Iterator[Problem]:
    """No INT4 weight of a Gemm with transB and an odd last dimension (wrong in OpenVINO 2026.4; docs/openvino.md)."""
    for layer in view.wiring.layers:
        found, node = layer.weight.dequantizer, layer.node
        if node.op != "Gemm" or not node.attrs.get("transB") or found is None or found.data_type not in PACKED:
            continue
        shape = view.wiring.shape(found.node.inputs[0])
        if shape and shape[-1] is not None and shape[-1] % 2:
            yield Problem(
                layer.place,
                f"its {found.type_name} weight has rows of {shape[-1]}, which OpenVINO reads wrongly",
                "store it as INT8 (--container int8), or make the number even",
            )


@rule("gemm-alpha", "warning")
def gemm_alpha(view: View) -> Iterator[Problem]:
    """A Gemm of UINT8 data has alpha = 1 (with another, OpenVINO 2026.4 can give values of 1e7; docs/openvino.md)."""
    for layer in view.quantized_layers:
        data, alpha = layer.data.dequantizer, layer.node.attrs.get("alpha", 1.0)
        if layer.node.op != "Gemm" or not isinstance(alpha, float) or alpha == 1 or data is None:
            continue
        if data.type_name == "UINT8" and layer.has_weight and layer.weight.quantized:
            yield Problem(
                layer.place,
                f"alpha is {alpha:g} and its data is UINT8, which OpenVINO can compute wrongly",
                "multiply the weight by alpha, and set alpha to 1",
            )


def is_symmetric(found: Quantizer) -> bool:
    """Whether every zero point is known to be zero."""
    return found.zero_point is not None and not np.any(np.asarray(found.zero_point, np.float32))


def lowest(found: Quantizer) -> int:
    """The least integer of the type."""
    return integer_limits(found.data_type or onnx.TensorProto.UINT8)[0]
