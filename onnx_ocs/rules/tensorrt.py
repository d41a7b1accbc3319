"""TensorRT, explicit quantization.

Sources: "parser" is onnx-tensorrt (onnxOpImporters.cpp, QuantDequantLinearHelper; docs/operators.md), "guide" NVIDIA's
developer guide ("Working with Quantized Types", "Explicit Quantization") with the placement rules of its TensorFlow
toolkit, "exporter" what nvidia-modelopt 0.47 leaves float (onnx/quantization/graph_utils.py). What TensorRT for RTX
1.7.1 builds of a model against each rule is in docs/lint.md (benchmarks/tensorrt.py); it takes Clip and Gather on INT8.
"""

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnx_ocs.graph.quantized import DEQUANTIZE, MATRIX, QUANTIZE, MatrixNode, Quantizer, maker_of
from onnx_ocs.rules.base import Problem, View, rule
from onnx_ocs.rules.formats import is_symmetric

TYPES = frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"})
FOUR_BITS = frozenset({"INT4", "FLOAT4E2M1"})
BEHIND = frozenset({"BatchNormalization", "Relu", "Clip", "LeakyRelu"})
"""What TensorRT fuses into the layer before it."""

REFUSED = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
    }
)
NARROW = 16
"""Channels below which the exporter looks closer."""


@rule("operators", "error")
def operators(view: View) -> Iterator[Problem]:
    """No operators on integers: QLinearConv, MatMulInteger and their like (parser: operators.md)."""
    for place in view.wiring.places:
        op = place.node.op
        if op in REFUSED or (op.startswith("QLinear") and place.node.domain == "com.microsoft"):
            yield Problem(
                place,
                f"TensorRT's parser has no {op}",
                "write QuantizeLinear and DequantizeLinear around the float operator (the QDQ format)",
            )


@rule("bias-float", "error")
def bias_float(view: View) -> Iterator[Problem]:
    """Biases stay float: an INT32 DequantizeLinear is refused (onnx-tensorrt#850)."""
    for found in view.quantizers:
        if found.type_name == "INT32":
            yield Problem(
                found.place,
                "TensorRT dequantizes no INT32, in which this bias is stored",
                "leave the bias float (onnxruntime's quantize_static: QuantizeBias=False)",
            )


@rule("type", "error")
def integer_type(view: View) -> Iterator[Problem]:
    """INT8, FP8 or INT4 alone: no UINT8 and no other type (parser: "TensorRT only allows FP8, INT8, INT4 ...")."""
    for found in view.quantizers:
        if found.data_type is None or found.type_name in TYPES | {"INT32"}:
            continue
        told = "" if found.explicit or not found.quantizes else ", which a missing zero point means in ONNX"
        yield Problem(
            found.place, f"it is of {found.type_name}{told}; TensorRT takes INT8, FP8 and INT4", "quantize to INT8"
        )


@rule("symmetric", "error")
def symmetric(view: View) -> Iterator[Problem]:
    """Every zero point is 0 (parser: "Non-zero zero point is not supported")."""
    for found in view.quantizers:
        if found.type_name != "INT32" and not is_symmetric(found):
            what = "computed at run time" if found.zero_point is None else "not 0"
            yield Problem(found.place, f"its zero point is {what}", "quantize symmetrically")


@rule("constant-scale", "error")
def constant_scale(view: View) -> Iterator[Problem]:
    """Scales are constants of the graph (guide)."""
    for found in view.quantizers:
        if found.scale is None:
            yield Problem(
                found.place, "its scale is computed at run time", "calibrate, and write the scale as a constant"
            )


@rule("int4-blocks", "error")
def int4_blocks(view: View) -> Iterator[Problem]:
    """INT4 for weights alone, in blocks, with an even last dimension (guide; parser: "4-bit quantization ...").

    And blocks for INT4 alone.
    """
    for found in view.quantizers:
        if found.type_name == "INT8" and found.is_blocked:
            yield Problem(
                found.place, "INT8 has a scale for each block", "use one scale for each output, or store it as INT4"
            )
        if found.type_name != "INT4":
            continue
        if not found.constant:
            yield Problem(found.place, "data is quantized to INT4", "quantize data to INT8; INT4 is for weights")
        elif not found.is_blocked:
            yield Problem(
                found.place,
                "an INT4 weight has no scale for each block",
                "store it as INT8 (--container int8), or in blocks (block_size, opset 21)",
            )
        elif (shape := view.wiring.shape(found.node.inputs[0])) and shape[-1] is not None and shape[-1] % 2:
            yield Problem(
                found.place, f"its last dimension, {shape[-1]}, is odd", "make it even, or store the weight as INT8"
            )


@rule("data-per-tensor", "error")
def data_per_tensor(view: View) -> Iterator[Problem]:
    """One scale for data; scales for each index of an axis are for weights (guide)."""
    for found in view.quantizers:
        if found.per_axis and not found.constant:
            yield Problem(found.place, f"data has {found.scales} scales", "quantize data with one scale")


@rule("axis", "error")
def axis(view: View) -> Iterator[Problem]:
    """The scales of a weight lie along its outputs, and ``axis`` is written (parser: number of output channels).

    0 for Conv, 1 for ConvTranspose. Older parsers have no default for ``axis``, and that of ONNX, 1, is the wrong one
    for Conv.
    """
    for layer in view.wiring.layers:
        found = layer.weight.dequantizer
        if found is None or not found.constant or layer.output_axis is None:
            continue
        for each in _chain(view, found):
            if not each.per_axis or any(node.op not in ("Cast", "Identity") for node in layer.weight.through):
                continue
            shape = view.wiring.shape(each.node.inputs[0])
            if each.axis is None or (shape is not None and each.axis_of(len(shape)) != layer.output_axis):
                written = "not written" if each.axis is None else str(each.axis)
                yield Problem(
                    each.place,
                    f"its axis is {written}; the outputs of this {layer.node.op} weight are axis {layer.output_axis}",
                    f"write axis = {layer.output_axis}",
                )


def _chain(view: View, found: Quantizer) -> Iterator[Quantizer]:
    """The DequantizeLinear of a weight, and the QuantizeLinear before it if there is one."""
    yield found
    maker, _ = view.wiring.origin(found)
    if maker is not None:
        yield view.wiring.quantizer(maker)


@rule("before-activation", "warning")
def before_activation(view: View) -> Iterator[Problem]:
    """Nothing is quantized between a layer and the BatchNormalization or activation behind it (guide)."""
    for found in view.quantizers:
        maker = maker_of(found.node.inputs[0])
        if not found.quantizes or maker is None or maker.op not in MATRIX:
            continue
        behind = [
            reader
            for dequantizer in found.node.outputs[0].outputs
            if dequantizer.op == DEQUANTIZE
            for reader in dequantizer.outputs[0].outputs
            if reader.op in BEHIND
        ]
        if behind:
            yield Problem(
                found.place,
                f"it stands between {maker.op} {maker.name!r} and {behind[0].op} {behind[0].name!r}, which would fuse",
                f"quantize the output of the {behind[0].op} instead",
            )


@rule("residual", "warning")
def residual(view: View) -> Iterator[Problem]:
    """Of a residual Add the skip branch alone is quantized: the layer of the other then fuses with the Add (guide)."""
    for place in view.nodes({"Add"}):
        inputs = place.node.inputs
        if len(inputs) != 2 or any(view.wiring.is_constant(tensor) for tensor in inputs):
            continue
        quantized = [_made_by_layer(view, tensor, place.node) for tensor in inputs]
        floats = [maker is not None and maker.op in MATRIX for maker in (maker_of(tensor) for tensor in inputs)]
        pairs = [_is_dequantized(tensor) for tensor in inputs]
        for side in (0, 1):
            layer = quantized[side]
            if layer is not None and (pairs[1 - side] or not floats[1 - side]):
                both = "both branches are quantized" if pairs[1 - side] else "the other branch is float"
                yield Problem(
                    place,
                    f"the output of {layer.op} {layer.name!r} is quantized for it alone, and {both}",
                    f"leave the output of {layer.name!r} float and quantize the skip branch",
                )
                break


def _is_dequantized(tensor: gs.Tensor) -> bool:
    maker = maker_of(tensor)
    return maker is not None and maker.op == DEQUANTIZE


def _made_by_layer(view: View, tensor: gs.Tensor, reader: gs.Node) -> gs.Node | None:
    """The layer whose output is quantized and dequantized to ``tensor`` for ``reader`` alone."""
    node: gs.Node | None = reader
    for op in (DEQUANTIZE, QUANTIZE):
        maker = maker_of(tensor)
        if maker is None or maker.op != op or view.wiring.sole_reader(tensor) is not node:
            return None
        tensor, node = maker.inputs[0], maker
    maker = maker_of(tensor)
    if maker is not None and maker.op == "BatchNormalization":
        maker = maker_of(maker.inputs[0])
    alone = view.wiring.sole_reader(tensor) is node
    return maker if alone and maker is not None and maker.op in MATRIX else None


@rule("concat-scale", "warning")
def concat_scale(view: View) -> Iterator[Problem]:
    """The quantized inputs of a Concat have one scale (exporter: concat elimination; guide)."""
    for place in view.nodes({"Concat"}):
        makers = [maker for maker in map(maker_of, place.node.inputs) if maker is not None and maker.op == DEQUANTIZE]
        found = [view.wiring.quantizer(maker) for maker in makers]
        if any(not each.same_grid(found[0]) for each in found[1:]):
            yield Problem(
                place,
                f"its {len(found)} quantized inputs have different scales, so that they are quantized once more",
                "give all of them the scale of the output, or leave them float",
            )


@rule("batch-normalization", "warning")
def batch_normalization(view: View) -> Iterator[Problem]:
    """BatchNormalization is folded into the layer before it is quantized.

    Scales are then those of the weights that run (guide: Q/DQ stands around the fused layer).
    """
    for layer in view.wiring.layers:
        if not (layer.weight.quantized and layer.has_weight):
            continue
        reader = view.wiring.sole_reader(layer.output)
        if reader is not None and reader.op == "BatchNormalization" and not reader.attrs.get("training_mode", 0):
            yield Problem(
                view.wiring.place(reader),
                f"it follows {layer.node.op} {layer.node.name!r}, whose weight is quantized already",
                "fold it into the float layer and quantize again (onnx-ocs does by default)",
            )


@rule("exporter-leaves-float", "note")
def exporter_leaves_float(view: View) -> Iterator[Problem]:
    """Quantized layers that NVIDIA's own exporter leaves float, because kernels on integers do not pay (exporter)."""
    for layer in view.wiring.layers:
        if layer.data.quantized and layer.weight.quantized and (why := _narrow(view, layer)):
            yield Problem(layer.place, f"{why}; nvidia-modelopt leaves such a layer float", "time it both ways")


def _narrow(view: View, layer: MatrixNode) -> str:
    """Why the exporter would leave ``layer`` float; empty if it would not."""
    shape, node = view.wiring.shape(layer.weight.tensor), layer.node
    if shape is None or None in shape or len(shape) < 2 or not layer.has_weight:
        return ""
    sizes = [size or 0 for size in shape]
    if node.op in ("Gemm", "MatMul"):
        small = [size for size in sizes[-2:] if size < NARROW]
        return f"its weight is {sizes[-2]} by {sizes[-1]}" if small else ""
    if node.op != "Conv" or min(sizes[:2]) >= NARROW:
        return ""
    outputs, inputs, *kernel = sizes
    groups = node.attrs.get("group", 1)
    if groups == 1:
        first = _reads_graph_input(view, layer)
        even = outputs % 8 == 0 or inputs % 8 == 0
        fits = even and (first or max(outputs, inputs) >= NARROW) and len(set(kernel)) == 1
        return "" if fits else f"it has {inputs} input and {outputs} output channels"
    fits = outputs % 8 == 0 and min(kernel) >= 3
    return "" if fits else f"it is grouped, with {outputs} output channels and a kernel of {'x'.join(map(str, kernel))}"


def _reads_graph_input(view: View, layer: MatrixNode) -> bool:
    found = layer.data.dequantizer
    source = view.wiring.origin(found)[0] if found is not None else None
    return source is not None and maker_of(source.inputs[0]) is None
