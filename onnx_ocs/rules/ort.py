"""onnxruntime on CPUs: what keeps a node from an integer kernel.

Sources: onnxruntime's optimizers (core/optimizer/qdq_transformer: qdq_selectors.cc, relu_quantizelinear.cc,
clip_quantizelinear.cc, qdq_s8_to_u8.cc), and its optimized models, which the tests look at for each rule. A rule that
"explains" is checked against the optimized model where there is one: it is silent about nodes that became kernels on
integers.
"""

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ocs.graph.biases import makes_gemm
from onnx_ocs.graph.quantized import DEQUANTIZE, QUANTIZE, MatrixNode, Quantizer, maker_of
from onnx_ocs.rules.base import Problem, View, rule
from onnx_ocs.rules.formats import lowest

ACTIVATIONS = frozenset({"Relu", "Clip"})


@rule("written-zero-point", "warning")
def written_zero_point(view: View) -> Iterator[Problem]:
    """The zero point of INT8 is written even where it is 0 (onnxruntime#28491; without it ONNX means UINT8)."""
    for found in view.quantizers:
        if found.type_name == "INT8" and not found.explicit:
            yield Problem(
                found.place, "it has no zero point, which onnxruntime's optimizers take for UINT8", "write it"
            )


@rule("both-operands", "warning", explains=True)
def both_operands(view: View) -> Iterator[Problem]:
    """A layer computes on integers where its data and its weight are quantized.

    Where no data is quantized at all, weights alone are, on purpose, and the other way round: that is a note. INT4 and
    FP4 weights are meant to stand beside float data.
    """
    for layer in view.quantized_layers:
        found = layer.weight.dequantizer or layer.data.dequantizer
        if (layer.data.quantized and layer.weight.quantized) or (found and found.type_name in ("INT4", "FLOAT4E2M1")):
            continue
        if layer.has_weight and layer.weight.quantized:
            yield Problem(
                layer.place,
                "its weight is quantized and its data is float, so that it computes in float",
                "quantize its data (--calibrate), or leave the layer float",
                None if view.quantizes_data else "note",
            )
        else:
            yield Problem(
                layer.place,
                "one of its operands is quantized and the other is float, so that it computes in float",
                "quantize both, or neither",
                None if view.quantizes_weights else "note",
            )


@rule("relu", "warning", explains=True)
def relu(view: View) -> Iterator[Problem]:
    """A Relu vanishes where the zero point behind it is the least integer (relu_quantizelinear.cc).

    With any other, such as 0 for INT8, the Relu stays and the layer before it is float.
    """
    yield from _kept_activations(view, "Relu")


@rule("clip", "warning", explains=True)
def clip(view: View) -> Iterator[Problem]:
    """A Clip vanishes where the quantization behind it holds no value outside of it (clip_quantizelinear.cc)."""
    yield from _kept_activations(view, "Clip")


def _kept_activations(view: View, op: str) -> Iterator[Problem]:
    for layer in _candidates(view):
        reader = view.wiring.sole_reader(layer.output)
        if reader is None or reader.op != op:
            continue
        quantizer = view.wiring.sole_reader(reader.outputs[0])
        if quantizer is None or quantizer.op != QUANTIZE or _vanishes(view, reader, quantizer):
            continue
        found = view.wiring.quantizer(quantizer)
        yield Problem(
            layer.place,
            f"{op} {reader.name!r} behind it stays: the {found.type_name} behind that holds values beyond its range",
            f"quantize to UINT8 with a zero point of {max(0, lowest(found))}"
            if op == "Relu"
            else "choose the scale and zero point behind it by its range",
        )


def _vanishes(view: View, activation: gs.Node, quantizer: gs.Node) -> bool:
    """Whether ``quantizer`` holds no value that ``activation`` would change."""
    found = view.wiring.quantizer(quantizer)
    if found.scale is None or found.zero_point is None or found.scales > 1 or not found.explicit:
        return False
    if activation.op == "Relu":
        return bool(np.all(np.asarray(found.zero_point) == lowest(found)))
    ends = [activation.attrs.get(name) for name in ("min", "max")]
    for index, tensor in enumerate(activation.inputs[1:3]):
        if tensor.name:
            value = view.wiring.value(tensor)
            if value is None:
                return False
            ends[index] = float(value.reshape(-1)[0])
    low, high = found.range()
    slack = float(np.finfo(np.float32).eps)
    return (ends[0] is None or ends[0] - low <= slack) and (ends[1] is None or high - ends[1] <= slack)


@rule("int8-data", "warning", explains=True)
def int8_data(view: View) -> Iterator[Problem]:
    """INT8 data goes straight from Q to one DQ with one reader (qdq_s8_to_u8.cc: only such pairs become UINT8).

    On x86 the kernels take UINT8, and input and output of a layer are of one type.
    """
    for layer in _candidates(view):
        if id(layer.node) in view.explained:
            continue
        pairs = [("data", layer.data.dequantizer)]
        if (behind := _quantizer_behind(view, layer.output)) is not None:
            readers = (reader for reader in behind.outputs[0].outputs if reader.op == DEQUANTIZE)
            pairs += [("output", view.wiring.quantizer(reader)) for reader in readers]
        for which, found in pairs:
            if found is not None and found.type_name == "INT8" and (why := _held_back(view, found)):
                yield Problem(layer.place, f"its {which} is INT8 and {why}", "quantize to UINT8")
                break


def _quantizer_behind(view: View, tensor: gs.Tensor) -> gs.Node | None:
    """The QuantizeLinear that alone reads ``tensor``, an activation between them or not."""
    reader = view.wiring.sole_reader(tensor)
    if reader is not None and reader.op in ACTIVATIONS:
        reader = view.wiring.sole_reader(reader.outputs[0])
    return reader if reader is not None and reader.op == QUANTIZE else None


def _held_back(view: View, found: Quantizer) -> str:
    """Why the INT8 pair that ends with ``found`` does not become UINT8; empty if it does."""
    maker, between = view.wiring.origin(found)
    if maker is None:
        return ""
    if between:
        return f"passes {between[-1].op} {between[-1].name!r} between QuantizeLinear and DequantizeLinear"
    readers = len(maker.outputs[0].outputs) * len(found.node.outputs[0].outputs)
    return f"has {readers} readers" if readers > 1 else ""


@rule("output", "warning", explains=True)
def output(view: View) -> Iterator[Problem]:
    """The output of a Conv is quantized too, and read by QuantizeLinear alone (ConvNodeGroupSelector).

    Gemm and MatMul may write float, but not through a Relu or Clip with one reader: that has to be a QuantizeLinear
    (NodeGroupSelector::GetQDQSelection).
    """
    for layer in _candidates(view):
        tensor = layer.output
        reader = view.wiring.sole_reader(tensor)
        if reader is not None and reader.op in ACTIVATIONS:
            tensor = reader.outputs[0]
            needed = view.wiring.sole_reader(tensor) is not None or layer.node.op in view.target.outputs
        else:
            needed = layer.node.op in view.target.outputs
        if needed and _quantizer_behind(view, layer.output) is None:
            why = "is an output of the graph" if view.wiring.is_output(tensor) else f"is read by {_told(tensor)}"
            through = (
                f"behind {reader.op} {reader.name!r} " if reader is not None and tensor is not layer.output else ""
            )
            yield Problem(
                layer.place,
                f"its output {through}{why}, not by a QuantizeLinear alone",
                "quantize the output, and let every reader read it through DequantizeLinear",
            )


def _told(tensor: gs.Tensor) -> str:
    ops = sorted({reader.op for reader in tensor.outputs})
    return " and ".join(ops) if ops else "nothing"


@rule("gemm", "warning", explains=True)
def gemm(view: View) -> Iterator[Problem]:
    """A Gemm has an INT32 bias or none, and beta = 1 (GemmNodeGroupSelector).

    A MatMul with an Add of a constant behind it is made a Gemm first, if its data has two dimensions or all of them are
    known (matmul_add_fusion.cc).
    """
    remedy = "store the bias as INT32 with the scale of data times weight, behind DequantizeLinear"
    for layer in _candidates(view):
        bias = layer.bias
        if layer.node.op == "MatMul" and (added := _added(view, layer)) is not None:
            yield Problem(layer.place, f"it makes a Gemm with Add {added.name!r}, whose bias is float", remedy)
        if layer.node.op != "Gemm" or bias is None:
            continue
        if (beta := layer.node.attrs.get("beta", 1.0)) != 1.0:
            yield Problem(layer.place, f"beta is {beta:g}", "multiply the bias by beta, and set beta to 1")
        elif bias.dequantizer is None or bias.dequantizer.type_name != "INT32":
            yield Problem(layer.place, "its bias is float, with which a Gemm stays float (a Conv does not)", remedy)


def _added(view: View, layer: MatrixNode) -> gs.Node | None:
    """The Add of a float constant that onnxruntime takes into a Gemm with the MatMul ``layer``."""
    added = _bias_behind(view, layer)
    if added is None or layer.output_axis is None or not makes_gemm(view.wiring.editor, layer.data.tensor):
        return None
    (bias,) = (view.wiring.operand(tensor) for tensor in added.inputs if tensor is not layer.output)
    return None if bias.quantized else added


def _bias_behind(view: View, layer: MatrixNode) -> gs.Node | None:
    """The Add of a constant that alone reads the MatMul ``layer``."""
    reader = view.wiring.sole_reader(layer.output) if layer.node.op == "MatMul" else None
    if reader is None or reader.op != "Add" or len(reader.inputs) != 2:
        return None
    others = [tensor for tensor in reader.inputs if tensor is not layer.output]
    return reader if len(others) == 1 and view.wiring.operand(others[0]).constant else None


@rule("four-bit-weight", "note", explains=True)
def four_bit_weight(view: View) -> Iterator[Problem]:
    """A Gemm or MatMul of float data and a 4-bit weight becomes MatMulNBits (DQMatMulNodeGroupSelector).

    The weight is (K, N), the second operand, with one scale, one for each of the N outputs, or blocks of 16, 32, 64 ...
    along K; a Gemm has no transA, no transB, alpha and beta 1.
    """
    for layer in view.quantized_layers:
        found, node = layer.weight.dequantizer, layer.node
        if found is None or layer.data.quantized or found.type_name not in ("INT4", "UINT4"):
            continue
        set_ = [name for name in ("transA", "transB") if node.attrs.get(name, 0)]
        set_ += [name for name in ("alpha", "beta") if node.op == "Gemm" and node.attrs.get(name, 1.0) != 1.0]
        blocks = found.block_size
        if node.op not in ("Gemm", "MatMul"):
            yield Problem(layer.place, "onnxruntime has no kernel for 4-bit weights of it", "store them as INT8")
        elif set_ or layer.weight.through or layer.weight_input == 0:
            why = f"{set_[0]} is set" if set_ else "its weight is transposed, or the first operand"
            yield Problem(layer.place, f"{why}, and onnxruntime dequantizes it", "store the weight as (K, N)")
        elif found.is_blocked and (found.axis != 0 or blocks < 16 or blocks & (blocks - 1)):
            yield Problem(
                layer.place,
                f"its blocks are {blocks} along axis {found.axis}",
                "use blocks of 16, 32, 64 or more along axis 0",
            )


@rule("conv-transpose", "warning", explains=True)
def conv_transpose(view: View) -> Iterator[Problem]:
    """ConvTranspose has no integer kernel (qdq_selectors.cc has no selector for it)."""
    for layer in view.quantized_layers:
        if layer.node.op == "ConvTranspose":
            yield Problem(layer.place, "onnxruntime has no integer kernel for it", "leave its data float")


@rule("partly", "warning", explains=True)
def partly(view: View) -> Iterator[Problem]:
    """Add, Mul, Concat, pooling and activations compute on integers where all inputs and the output are quantized.

    At the end of a model a float output is worth more than a kernel on integers: that is a note.
    """
    biases = {id(added) for layer in _candidates(view) if (added := _bias_behind(view, layer)) is not None}
    for place in view.nodes(view.target.computes):
        node = place.node
        if id(node) in biases or not view.target.does_compute(node):  # the first is a part of the layer
            continue
        given = [tensor for tensor in node.inputs if tensor.name]
        dequantized = [(maker := maker_of(tensor)) is not None and maker.op == DEQUANTIZE for tensor in given]
        quantized = _quantizer_behind(view, node.outputs[0]) is not None
        if not any(dequantized) or (all(dequantized) and quantized):
            continue
        left = [f"input {index}" for index, known in enumerate(dequantized) if not known]
        last = not left and _ends(view, node.outputs[0])
        left += [] if quantized else ["the output"]
        yield Problem(
            place,
            f"{' and '.join(left)} {'is' if len(left) == 1 else 'are'} float",
            "quantize all of them, or none",
            "note" if last else None,
        )


def _ends(view: View, tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is an output of the model, but for nodes that only move it."""
    while not view.wiring.is_output(tensor):
        reader = view.wiring.sole_reader(tensor)
        if reader is None or not view.target.does_move(reader):
            return False
        tensor = reader.outputs[0]
    return True


@rule("moved-scale", "warning")
def moved_scale(view: View) -> Iterator[Problem]:
    """MaxPool, Reshape and other moves keep the scale, so that the pairs vanish (DropQDQNodeGroupSelector)."""
    for place in view.nodes(view.target.moves):
        if not view.target.does_move(place.node):
            continue
        before, behind = maker_of(place.node.inputs[0]), view.wiring.sole_reader(place.node.outputs[0])
        if before is None or before.op != DEQUANTIZE or behind is None or behind.op != QUANTIZE:
            continue
        first, second = view.wiring.quantizer(before), view.wiring.quantizer(behind)
        if not first.constant and not (first.same_grid(second) and first.data_type == second.data_type):
            yield Problem(
                place,
                "it only moves values, and the scale, zero point or type before it differs from the one behind",
                "write those of its input behind it as well",
            )


@rule("gather-place", "warning")
def gather_place(view: View) -> Iterator[Problem]:
    """A Gather that repeats channels works on the integers, between Q and DQ (measured: docs/onnxruntime.md)."""
    for layer in view.quantized_layers:
        found = layer.data.dequantizer
        if found is None:
            gather = maker_of(layer.data.tensor)
            above = maker_of(gather.inputs[0]) if gather is not None and gather.op == "Gather" else None
            where = "behind DequantizeLinear" if above is not None and above.op == DEQUANTIZE else ""
        else:
            maker, _ = view.wiring.origin(found)
            gather = maker_of(maker.inputs[0]) if maker is not None else None
            where = "on float data, before QuantizeLinear"
            if gather is not None and gather.op == "Gather":
                above = maker_of(gather.inputs[0])
                where = "" if above is not None and above.op == DEQUANTIZE else where
        if where and gather is not None and gather.op == "Gather" and _repeats(view, gather):
            yield Problem(
                view.wiring.place(gather),
                f"it copies channels for {layer.node.op} {layer.node.name!r} {where}",
                "move it between QuantizeLinear and DequantizeLinear, on UINT8",
            )


def _repeats(view: View, gather: gs.Node) -> bool:
    """Whether a Gather takes known channels of data."""
    indices = view.wiring.value(gather.inputs[1])
    return indices is not None and indices.ndim == 1 and not view.wiring.is_constant(gather.inputs[0])


def _candidates(view: View) -> Iterator[MatrixNode]:
    """Layers that have integer kernels and of which both operands are quantized."""
    for layer in view.quantized_layers:
        if layer.data.quantized and layer.weight.quantized and layer.node.op != "ConvTranspose":
            yield layer
