"""Every operator row under every recipe, through onnxruntime."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from operators import ROWS, UNSPLIT, feed, row_model, with_weights

from onnx_ocs import quantize, split
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import find_layers
from onnx_ocs.graph.model import Model
from onnx_ocs.numerics.clip import CLIP_METHODS

PLAIN = [name for name, method in CLIP_METHODS.items() if not method.parameter]


def run(model, inputs):
    """The outputs, with float activations: by default onnxruntime rounds those of a MatMulNBits to 8 bits."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(model.SerializeToString(), options).run(None, inputs)


def constants(model):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("ratio", [0.02, 0.3, 1])
@pytest.mark.parametrize(
    "options", [{}, {"split": "naive"}, {"split_policy": "halving", "per_channel": False}], ids=str
)
@pytest.mark.parametrize("name", ROWS)
def test_splitting_keeps_the_outputs(name, options, ratio):
    model = row_model(name)
    result = split(model, ratio=ratio, first="same", verify=False, **options)
    wanted, found = run(model, feed(model)), run(result.model, feed(model))
    tolerance = 5e-3 if name == "float16" else 1e-5
    for before, after in zip(wanted, found, strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=tolerance * np.abs(before).max())
    statuses = {row["status"] for row in result.report["layers"]}
    assert statuses == ({"quantized"} if name in UNSPLIT else {"split"})


def nodes(graph):
    """All nodes of a graph and of the bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


def on_the_grid(model, report, bits):
    """The float model whose weights are ``floor(w / step + 1/2) * step``, by the thresholds of a report."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    by_output = {node.output[0]: node for node in nodes(made.graph)}
    held = Model.load(model)
    for number, (layer, row) in enumerate(zip(find_layers(Editor(held)), report["layers"], strict=True)):
        weight = layer.weight.read(held)
        step = (np.array(row["threshold"]) / (2 ** (bits - 1) - 1)).astype(np.float32).astype(np.float64)
        shape = [1] * weight.ndim
        if row["granularity"] == "channel":
            shape[layer.output_axis] = -1
        step = step.reshape(shape)
        values = (np.floor(weight / step + 0.5) * step).astype(weight.dtype)
        made.graph.initializer.append(onnx.numpy_helper.from_array(values, f"grid{number}"))
        by_output[layer.node.outputs[0].name].input[layer.weight_input] = f"grid{number}"
    return made


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
@pytest.mark.parametrize("ratio", [0, 0.3])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", [name for name in ROWS if name != "function"])
def test_the_quantized_model_equals_a_float_model_on_the_grid(name, per_channel, ratio, bits):
    model = row_model(name)
    options = {"ratio": ratio, "per_channel": per_channel, "first": "same", "verify": False, "container": "int8"}
    result = quantize(model, round="nearest", bits=bits, **options)
    wanted, found = run(on_the_grid(model, result.report, bits), feed(model)), run(result.model, feed(model))
    tolerance = 5e-3 if "float16" in ROWS[name] else 1e-5
    for before, after in zip(wanted, found, strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=tolerance * max(1, np.abs(before).max()))


def test_layers_in_functions_are_split_and_quantized():
    model = row_model("function")
    result = quantize(model, bits=8, ratio=0.3, first="same")
    assert [row["status"] for row in result.report["layers"]] == ["split"]
    np.testing.assert_allclose(run(result.model, feed(model))[0], run(model, feed(model))[0], atol=0.3)


@pytest.mark.parametrize("name", ["Conv 2-D", "Conv grouped", "Gemm scaled", "MatMul", "MatMul weight on the left"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("ratio", [0, 0.2, 1])
def test_copies_sum_to_the_nearest_point_with_the_emitted_step(name, bits, ratio):
    model = row_model(name)
    result = quantize(model, round="nearest", bits=bits, ratio=ratio, per_channel=False, first="same", verify=False)
    (row,) = (row for row in result.report["layers"])
    held = constants(result.model)
    integers = next(v for k, v in held.items() if k.endswith("integers")).astype(np.int64)
    step = next(v for k, v in held.items() if k.endswith("scale")).astype(np.float64)
    weight = constants(model)["w"].astype(np.float64)
    axis = {"MatMul": 0}.get(name, 1)
    groups = 2 if name == "Conv grouped" else 1
    wanted = np.floor(weight / step + 0.5)
    source = np.array(row["source"] if row["source"] else range(weight.shape[axis] * groups))
    cut = np.split(source, groups)
    for group, (part, whole) in enumerate(zip(np.split(integers, groups, 0), np.split(wanted, groups, 0), strict=True)):
        total = np.zeros_like(whole)
        np.add.at(np.moveaxis(total, axis, 0), cut[group] - group * weight.shape[axis], np.moveaxis(part, axis, 0))
        np.testing.assert_array_equal(total, whole)
    assert np.abs(integers).max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize(
    "clip", [*(n for n, m in CLIP_METHODS.items() if not m.parameter), "percentile:99", "sigma:3", "0.8"]
)
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_clip_method_quantizes(clip, per_channel):
    model = row_model("Conv 2-D")
    options = {"bits": 6, "clip": clip, "per_channel": per_channel, "first": "same", "round": "nearest"}
    result = quantize(model, **options, min_sqnr=5)
    peak = np.abs(constants(model)["w"]).max()
    (row,) = result.report["layers"]
    assert all(0 < threshold <= peak for threshold in row["threshold"])


def test_layers_that_read_one_tensor_with_one_plan_share_the_gather():
    result = split(row_model("two layers of one tensor"), ratio=0.2, first="same")
    assert [node.op_type for node in result.model.graph.node].count("Gather") == 1


def test_a_shared_weight_is_stored_once_and_split_for_each_side():
    once = quantize(row_model("two layers of one tensor"), ratio=0.2, first="same")
    assert sum(name.endswith("integers") for name in constants(once.model)) == 1
    twice = quantize(row_model("one weight on two sides"), ratio=0.2, first="same")
    assert sum("integers" in name for name in constants(twice.model)) == 2
    assert "w" not in constants(twice.model)


def test_a_weight_that_is_also_an_output_stays():
    model = row_model("weight is an output")
    after = quantize(model, ratio=0.2, first="same").model
    np.testing.assert_array_equal(constants(after)["w"], constants(model)["w"])


def test_a_weight_that_is_also_an_input_becomes_a_constant_and_is_said_so():
    model = row_model("MatMul")
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [8, 6]))
    result = quantize(model, ratio=0.2, first="same")
    assert [value.name for value in result.model.graph.input] == ["x"]
    assert any("'w' was a weight that callers could replace" in note for note in result.report["notes"])


@pytest.mark.parametrize("zero", ["all", "channel"])
def test_zero_weights_get_positive_scales(zero):
    model = row_model("Conv 2-D")
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[slice(None) if zero == "all" else 2] = 0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    result = quantize(model, bits=4, first="same")
    assert (next(v for k, v in constants(result.model).items() if k.endswith("scale")) > 0).all()
    (row,) = result.report["layers"]
    assert row["reason"] == ("all its weights are zero" if zero == "all" else None)


@pytest.mark.parametrize("bits", [None, 8])
def test_quantized_weights_are_left_alone_and_said_so(bits):
    first = quantize(row_model("Conv 2-D"), first="same").model
    result = quantize(first, bits=bits, first="same")
    assert result.model.graph == first.graph
    if bits:
        assert [row["reason"] for row in result.report["layers"]] == ["already quantized"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21, 25])
def test_the_opset_is_raised_only_where_the_integers_need_it(opset, bits):
    text = "g (float[2,8,5,5] x, float[6,8,3,3] w) => (float[2,6,A,B] y) { y = Conv(x, w) }"
    model = with_weights(onnx.parser.parse_model(f'<ir_version: 4, opset_import: ["" : {opset}]> {text}'))
    needed = {2: 25, 3: 21, 4: 21, 8: 13}[bits]
    after = quantize(model, bits=bits, first="same", round="nearest").model
    assert after.opset_import[0].version == max(opset, needed)
    kept = quantize(model, bits=bits, first="same", round="nearest", container="int8").model
    assert kept.opset_import[0].version == max(opset, 13)
    alone = quantize(model, bits=bits, first="same", round="nearest", container="int8", per_channel=False).model
    assert alone.opset_import[0].version == max(opset, 10)
    assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in alone.graph.initializer}
