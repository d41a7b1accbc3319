"""A scale for each block of input channels, through onnxruntime and past the lint."""

import json

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime as ort
import pytest
from operators import HEAD, ROWS, feed, row_model, with_weights

from onnx_ocs import lint, quantize
from onnx_ocs.cli import main
from onnx_ocs.graph.integers import TYPES

BLOCKED = [name for name in ROWS if "Conv" not in name and name not in ("function", "MatMul vector")]
MLP = f"""{HEAD} g (float[4,64] x) => (float[4,10] y) {{
    a = MatMul (x, w1)
    b = Tanh (a)
    c = Gemm <transB=1> (b, w2, wb2)
    d = Tanh (c)
    y = Gemm (d, w3, wb3)
}}"""
SHAPES = {"w1": (64, 96), "w2": (40, 96), "wb2": (40,), "w3": (40, 10), "wb3": (10,)}


def mlp():
    model = onnx.parser.parse_model(MLP)
    for name, shape in SHAPES.items():
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return with_weights(model)


def run(model, optimize=True, optimized=None):
    """The outputs, with the float data of a MatMulNBits left float."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed(model))


def made(model, block, **options):
    return quantize(model, block=block, **{"first": "same", "verify": False, **options})


def all_nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g)


def dequantizers(model):
    """Each DequantizeLinear of integers in blocks: block size, axis, integers, scales."""
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in all_nodes(model.graph):
        attributes = {item.name: item.i for item in node.attribute}
        if "block_size" in attributes:
            integers, scale, zero = (held[name] for name in node.input)
            assert list(zero.dims) == list(scale.dims)
            yield (
                attributes["block_size"],
                attributes["axis"],
                integers,
                onnx.numpy_helper.to_array(scale).astype(np.float64),
            )


@pytest.mark.parametrize("split", ["qa", "naive"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("block", [2, 3, 16])
@pytest.mark.parametrize("name", BLOCKED)
def test_the_model_computes_what_its_integers_and_scales_say(name, block, bits, split):
    """With and without onnxruntime's optimizations, and as near to the source as the steps allow."""
    model = row_model(name)
    result = made(model, block, bits=bits, ratio=0.3, split=split)
    onnx.checker.check_model(result.model)
    assert {(row["granularity"], row["block"]) for row in result.report["layers"]} == {("block", block)}
    plain, fast = run(result.model, optimize=False), run(result.model)
    tolerance = 5e-3 if "float16" in ROWS[name] else 1e-5
    for one, other in zip(plain, fast, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * max(1, np.abs(one).max()))
    for size, axis, integers, scale in dequantizers(result.model):
        assert (size, scale.shape[axis]) == (block, -(-integers.dims[axis] // block))
        assert np.abs(onnx.numpy_helper.to_array(integers).astype(int)).max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [8, 6, 4, 3])
@pytest.mark.parametrize("ratio", [0, 0.2, 1])
@pytest.mark.parametrize("block", [2, 4, 16])
@pytest.mark.parametrize("name", ["MatMul", "MatMul weight on the left", "Gemm", "Gemm scaled"])
def test_copies_sum_to_the_nearest_point_of_their_block(name, block, ratio, bits):
    model = row_model(name)
    result = made(model, block, bits=bits, ratio=ratio, round="nearest")
    (row,), ((_, axis, integers, scale),) = result.report["layers"], dequantizers(result.model)
    weight = onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "w")).astype(np.float64)
    weight = weight.T if name == "Gemm scaled" else weight  # stored as MatMulNBits wants it
    source = np.array(row["source"] or range(weight.shape[axis]))
    parts = np.moveaxis(onnx.numpy_helper.to_array(integers).astype(int), axis, 0)
    steps = np.moveaxis(scale, axis, 0)[np.arange(len(source)) // block]
    for channel, values in enumerate(np.moveaxis(weight, axis, 0)):
        held = np.flatnonzero(source == channel)
        np.testing.assert_array_equal(steps[held], np.broadcast_to(steps[held[0]], steps[held].shape))
        np.testing.assert_array_equal(parts[held].sum(axis=0), np.floor(values / steps[held[0]] + 0.5))
    assert row["sqnr_db"] > 6 * bits - 12


@pytest.mark.parametrize("target", ["generic", "ort"])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_runs_matmul_and_gemm_as_matmulnbits(bits, target, tmp_path):
    result = made(mlp(), 32, bits=bits, ratio=0.05, target=target)
    assert [row["status"] for row in result.report["layers"]] == ["split"] * 3
    run(result.model, optimized=tmp_path / "optimized.onnx")
    found = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert found.count("MatMulNBits") == 3
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(found)


def test_blocks_are_more_accurate_than_a_scale_for_each_output():
    channel, block = (quantize(mlp(), bits=4, block=size, ratio=0) for size in (None, 16))
    gain = [a["sqnr_db"] - b["sqnr_db"] for a, b in zip(block.report["layers"], channel.report["layers"], strict=True)]
    assert min(gain) > 1.5
    quality = [result.report["verification"]["quantized"]["sqnr_db"] for result in (channel, block)]
    assert quality[1] > quality[0] + 1.5


@pytest.mark.parametrize(
    ("bits", "types"), [(2, {"INT2", "INT4"}), (3, {"INT4"}), (4, {"INT4"}), (5, {"INT8"}), (8, {"INT8"})]
)
def test_the_smallest_type_that_onnxruntime_runs(bits, types):
    """2 bits of ten outputs go into INT4: onnxruntime 1.32 computes something else from INT2."""
    result = made(mlp(), 16, bits=bits, ratio=0)
    found = {onnx.TensorProto.DataType.Name(tensor.data_type) for _, _, tensor, _ in dequantizers(result.model)}
    assert found == types
    for one, other in zip(run(result.model), run(result.model, optimize=False), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_two_bits_per_channel_go_where_onnxruntime_reads_them_rightly():
    result = quantize(mlp(), bits=2, ratio=0, first="same", verify=False)
    assert [row["storage"] for row in result.report["layers"]] == [2, 2, 4]
    for one, other in zip(run(result.model), run(result.model, optimize=False), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_tensorrt_lint_passes(calibrated, bits):
    samples = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32) if calibrated else None
    result = made(mlp(), 8, bits=bits, ratio=0.1, target="tensorrt", calibrate=samples)
    assert [found for found in lint(result.model, "tensorrt").findings if found.severity != "note"] == []
    blocks = [8, 8, 8] if bits <= 4 else [None] * 3
    assert [row["block"] for row in result.report["layers"]] == blocks
    for _, axis, tensor, _ in dequantizers(result.model):
        assert tensor.data_type == TYPES[4]
        assert tensor.dims[axis] % 8 == 0
    if bits > 4:
        assert {row["block_reason"] for row in result.report["layers"]} == {
            "target tensorrt allows blocks of at most 4 bits"
        }
    tolerance = 1e-5 if bits <= 4 or not calibrated else 0.05  # kernels on integers may round the other way
    for one, other in zip(run(result.model), run(result.model, optimize=False), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize(
    ("shape", "block", "reason"),
    [
        ((64, 7), 16, "takes blocks with an even last dimension, and not 7"),
        ((40, 8), 16, "takes whole blocks: 40 channels do not make blocks of 16"),
        ((2, 64, 8), 16, "takes blocks of weights with two dimensions, and not with 3"),
    ],
)
def test_what_tensorrt_refuses_goes_into_int8_with_a_scale_for_each_output(shape, block, reason):
    text = f"g (float[2,3,{shape[-2]}] x, float{list(shape)} w) => (float[2,3,{shape[-1]}] y) {{ y = MatMul (x, w) }}"
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))
    result = made(model, block, bits=4, target="tensorrt")
    (row,) = result.report["layers"]
    assert (row["granularity"], row["storage"], row["block"]) == ("channel", 8, None)
    assert row["block_reason"] == f"target tensorrt {reason}"
    assert lint(result.model, "tensorrt").passed
    assert made(model, block, bits=4).report["layers"][0]["block"] == block


def test_other_layers_keep_a_scale_for_each_output_and_it_is_said():
    result = made(row_model("Conv 2-D"), 4, bits=4)
    (row,) = result.report["layers"]
    assert (row["granularity"], row["block_reason"]) == ("channel", "blocks are for MatMul and Gemm, and not for Conv")
    assert "no weight has a scale for each block (--block)" in result.report["notes"]


def test_a_vector_has_one_scale():
    (row,) = made(row_model("MatMul vector"), 4, bits=4).report["layers"]
    assert (row["granularity"], row["block_reason"]) == ("tensor", "its weight is a vector, which has one output")


def test_layers_of_functions_of_an_old_opset_are_declined_with_the_reason():
    (row,) = made(row_model("function"), 4, bits=4).report["layers"]
    assert row["block_reason"] == "its graph stays at opset 17, and blocks need 21"


@pytest.mark.parametrize("target", ["generic", "ort", "tensorrt", "openvino"])
@pytest.mark.parametrize("bits", [4, 8])
def test_beside_blocks_the_data_stays_float(bits, target):
    """INT8 blocks, for which onnxruntime 1.32 fails beside quantized data, give way to quantized data."""
    samples = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    result = quantize(mlp(), calibrate=samples, bits=bits, block=8, target=target, first="same")
    for row in result.report["layers"]:
        assert row["block"] == (8 if bits == 4 else None)
        assert row["act_bits"] == (None if bits == 4 else 8)
        assert row["act_reason"] == ("weights in blocks are for float data" if bits == 4 else None) or bits == 8
    assert any(node.op_type == "QuantizeLinear" for node in result.model.graph.node) == (bits == 8)
    assert result.report["verification"]["quantized"]["sqnr_db"] > 6


def test_blocks_behind_an_integer_convolution_read_its_output():
    text = """g (float[N,3,8,8] x, float[8,3,3,3] w1, float[32,6] w2) => (float[N,6] y) {
        c = Conv <strides=[2,2]> (x, w1)
        r = Relu (c)
        p = GlobalAveragePool (r)
        q = Concat <axis=1> (p, p, p, p)
        f = Flatten (q)
        y = MatMul (f, w2) }"""
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))
    images = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    result = quantize(model, calibrate=images, bits=4, block=16, target="ort", container="auto", ratio=0.1)
    assert [(row["op"], row["block"]) for row in result.report["layers"]] == [("Conv", None), ("MatMul", 16)]
    assert result.report["verification"]["quantized"]["sqnr_db"] > 10


def test_a_stored_recipe_gives_the_same_bytes():
    first = made(mlp(), 16, bits=4)
    again = quantize(mlp(), recipe=first.report)
    assert first.report["recipe"]["block"] == 16
    assert again.model.SerializeToString() == first.model.SerializeToString()


def test_a_float_model_takes_the_steps_of_its_blocks():
    result = quantize(mlp(), bits=4, block=16, ratio=0.1, float=True)
    assert result.report["verification"]["split"]["max_rel_error"] < 1e-5
    assert [row["block"] for row in result.report["layers"]] == [16] * 3
    assert not list(dequantizers(result.model))


def test_a_larger_container_holds_the_same_integers():
    narrow, wide = (made(mlp(), 16, bits=4, container=container) for container in ("auto", "int8"))
    assert {tensor.data_type for _, _, tensor, _ in dequantizers(wide.model)} == {TYPES[8]}
    for one, other in zip(dequantizers(narrow.model), dequantizers(wide.model), strict=True):
        np.testing.assert_array_equal(
            onnx.numpy_helper.to_array(one[2]).astype(np.int8), onnx.numpy_helper.to_array(other[2])
        )
        np.testing.assert_array_equal(one[3], other[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "1"], "block must be a whole number of at least 2 input channels, not 1"),
        (["--block", "-8"], "block must be a whole number of at least 2"),
        (["--block", "x"], "'x' is not a number of input channels"),
        (["--block", "2.5"], "'2.5' is not a number of input channels"),
        (["--block", "16", "--bits", "none"], "with bits none they stay float"),
    ],
)
def test_wrong_values_are_wrong_usage(arguments, message, tmp_path, capsys):
    onnx.save(mlp(), tmp_path / "in.onnx")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("value", [True, 16.0, "16", 0])
def test_wrong_values_of_a_recipe_are_refused(value):
    with pytest.raises(ValueError, match="block must be a whole number"):
        made(mlp(), value)


def test_the_command_line_writes_blocks_and_its_recipe_runs_again(tmp_path):
    onnx.save(mlp(), tmp_path / "in.onnx")
    source, out, again = (str(tmp_path / f"{name}.onnx") for name in ("in", "out", "again"))
    report = str(tmp_path / "report.json")
    assert main([source, out, "--block", "16", "--bits", "4", "--first", "same", "--report", report, "-q"]) == 0
    assert [row["block"] for row in json.loads((tmp_path / "report.json").read_text())["layers"]] == [16] * 3
    assert main([source, again, "--recipe", report, "-q"]) == 0
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    assert main([source, again, "--recipe", report, "--block", "none", "-q"]) == 0
    assert not list(dequantizers(onnx.load(again)))


def test_the_paper_has_float_dense_layers_and_so_no_blocks():
    result = quantize(mlp(), preset="paper", block=16, verify=False)
    assert {row["status"] for row in result.report["layers"]} == {"declined"}


@pytest.mark.parametrize("target", ["generic", "ort", "tensorrt", "openvino"])
@pytest.mark.parametrize("bits", [2, 4])
def test_folding_leaves_the_outputs_of_blocks_as_many_as_they_were(bits, target):
    """Where an odd number of them would break a rule of TensorRT, or what onnxruntime makes of 2 bits."""
    text = """g (float[4,32] x, float[32,16] w1, float[16,6] w2) => (float[4,6] y) {
        a = MatMul (x, w1)
        b = Relu (a)
        y = MatMul (b, w2) }"""
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))
    for block in (16, 32, None):
        result = made(model, block, bits=bits, ratio=0.02, fold="always", target=target)
        if block == 32 and target in ("tensorrt", "openvino"):
            assert [row["block"] for row in result.report["layers"]] == [32, None]
        assert all(finding.severity == "note" for finding in lint(result.model, target).findings) or target == "ort"
        for one, other in zip(run(result.model), run(result.model, optimize=False), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
