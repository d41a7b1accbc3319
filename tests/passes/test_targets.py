"""Where each target's rules put QuantizeLinear and DequantizeLinear, and what onnxruntime makes of it."""

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from operators import HEAD, with_weights

from onnx_ocs import lint, quantize
from onnx_ocs.passes.write_plainly import _scales
from onnx_ocs.targets import TARGETS

NETWORK = f"""{HEAD} g (float[N,3,16,16] x) => (float[N,10] logits, float[N,16,8,8] features) {{
    c1 = Conv <pads=[1,1,1,1]> (x, w1, b1)
    r1 = Relu (c1)
    p1 = MaxPool <kernel_shape=[2,2], strides=[2,2]> (r1)
    c2 = Conv <pads=[1,1,1,1]> (p1, w2)
    c3 = Conv (p1, w3)
    a1 = Add (c2, p1)
    r2 = Relu (a1)
    k1 = Concat <axis=1> (r2, c3)
    c4 = Conv (k1, w4, b4)
    features = Clip (c4, zero, six)
    g1 = GlobalAveragePool (features)
    f1 = Flatten (g1)
    h1 = Gemm <transB=1> (f1, w5, b5)
    h2 = Relu (h1)
    logits = Gemm (h2, w6)
}}"""
WEIGHTS = {
    "w1": (8, 3, 3, 3),
    "b1": (8,),
    "w2": (8, 8, 3, 3),
    "w3": (8, 8, 1, 1),
    "w4": (16, 16, 1, 1),
    "b4": (16,),
    "w5": (12, 16),
    "b5": (12,),
    "w6": (12, 10),
}
LAYERS = {"Conv": 4, "Gemm": 2}


def network():
    model = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(3)
    for name, shape in WEIGHTS.items():
        values = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for name, value in (("zero", 0.0), ("six", 6.0)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((32, 3, 16, 16)).astype(np.float32)


def made(images, **options):
    common = {"bits": 7, "ratio": 0.1, "first": "same", "act_clip": "none"}
    return quantize(network(), calibrate=images, **{**common, **options})


def session(model, optimized=None, optimize=True):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def integer_operators(model, folder):
    session(model, folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def makers(model):
    return {output: node for node in model.graph.node for output in node.output}


def layer_inputs(model):
    """For each layer the operators that its data comes through, up to the first that is none of quantization."""
    by_output, found = makers(model), []
    for node in model.graph.node:
        if node.op_type in LAYERS:
            chain, name = [], node.input[0]
            while name in by_output and by_output[name].op_type in (
                "QuantizeLinear",
                "DequantizeLinear",
                "Gather",
                "Clip",
            ):
                chain.append(by_output[name].op_type)
                name = by_output[name].input[0]
            found.append(chain)
    return found


def scales(model, op):
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [(values[node.input[1]], values[node.input[2]]) for node in model.graph.node if node.op_type == op]


@pytest.mark.parametrize("act_bits", [8, 6])
@pytest.mark.parametrize("target", TARGETS)
def test_the_outputs_stay(target, act_bits, images):
    result = made(images, target=target, act_bits=act_bits)
    onnx.checker.check_model(result.model, full_check=True)
    wanted = session(network()).run(None, {"x": images})
    for optimize in (True, False):
        found = session(result.model, optimize=optimize).run(None, {"x": images})
        for before, after in zip(wanted, found, strict=True):
            noise = np.square(before - after).sum() / np.square(before).sum()
            assert -10 * np.log10(noise) > (22 if act_bits == 8 else 15)


@pytest.mark.parametrize("ratio", [0, 0.1])
@pytest.mark.parametrize("act_bits", [8, 5])
def test_onnxruntime_runs_integer_kernels_only(ratio, act_bits, images, tmp_path):
    operators = integer_operators(made(images, target="ort", ratio=ratio, act_bits=act_bits).model, tmp_path)
    assert operators["QLinearConv"] == LAYERS["Conv"]
    assert operators["QGemm"] == LAYERS["Gemm"]
    assert operators["QLinearAdd"] == 1
    assert operators["QLinearConcat"] + operators["Concat"] == 1  # of equal scales: the integers are copied
    assert operators["QLinearGlobalAveragePool"] == 1
    assert operators["QuantizeLinear"] == 1
    assert not {"Relu", "Conv", "Gemm", "GlobalAveragePool"} & set(operators)


def test_a_result_in_the_middle_keeps_its_name(images):
    result = made(images, target="ort")
    assert [value.name for value in result.model.graph.output] == ["logits", "features"]
    assert makers(result.model)["features"].op_type == "DequantizeLinear"


def test_copies_are_taken_from_the_integers_of_unsigned_targets(images):
    for target in ("ort", "openvino"):
        chains = layer_inputs(made(images, target=target).model)
        assert {"Gather"} < {name for chain in chains for name in chain}
        assert all(
            chain in (["DequantizeLinear", "QuantizeLinear"], ["DequantizeLinear", "Gather", "QuantizeLinear"])
            for chain in chains
        )


@pytest.mark.parametrize("act_bits", [8, 5])
def test_tensorrt_quantizes_the_inputs_of_layers_and_the_skip_branch(act_bits, images):
    model = made(images, target="tensorrt", act_bits=act_bits).model
    by_output = makers(model)
    for chain in layer_inputs(model):
        assert chain[:2] == ["DequantizeLinear", "QuantizeLinear"]
    for _, zero_point in scales(model, "QuantizeLinear"):
        assert zero_point.dtype == np.int8
        assert zero_point == 0
    (add,) = [node for node in model.graph.node if node.op_type == "Add"]
    assert by_output[add.input[0]].op_type == "Conv"
    assert by_output[add.input[1]].op_type == "DequantizeLinear"
    (relu, *_) = [node for node in model.graph.node if node.op_type == "Relu" and node.output[0] == "r1"]
    assert by_output[relu.input[0]].op_type == "Conv"
    assert {tensor.data_type for tensor in model.graph.initializer} <= {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT8,
        onnx.TensorProto.INT64,
    }


def test_data_that_is_never_negative_has_the_zero_point_zero(images):
    model = made(images, target="ort").model
    of_x, *others = [(node.input[0], node) for node in model.graph.node if node.op_type == "QuantizeLinear"]
    points = dict(zip([of_x[0], *(name for name, _ in others)], scales(model, "QuantizeLinear"), strict=True))
    assert points["x"][1] > 0
    assert points["r1.float"][1] == points["features.float"][1] == 0
    assert points["c2.float"][1] > 0


def test_what_only_moves_values_keeps_the_scale(images):
    model = made(images, target="ort").model
    points = {node.input[0]: node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert points["r1.float"] == points["p1.float"]


@pytest.mark.parametrize("options", [{"act_split": "dynamic", "act_bits": 8}, {"act_unsigned": True}])
def test_tensorrt_refuses_what_it_cannot_read(options, images):
    with pytest.raises(ValueError, match="target tensorrt refuses"):
        quantize(network(), target="tensorrt", **options)


def test_narrow_weights_go_where_the_target_has_a_type_for_them(images):
    wanted = {"ort": "INT8", "tensorrt": "INT8", "openvino": "INT4", "generic": "INT4"}
    for target, kind in wanted.items():
        model = made(images, target=target, bits=4, min_sqnr=-30).model
        kinds = {
            onnx.TensorProto.DataType.Name(tensor.data_type)
            for tensor in model.graph.initializer
            if tensor.name.endswith(".integers")
        }
        assert kinds - {"INT32"} == {kind}


def saturating(model):
    return [finding.node for finding in lint(model, target="ort").findings if finding.rule == "saturation"]


@pytest.mark.parametrize("grain", [{"per_channel": True}, {"per_channel": False}])
@pytest.mark.parametrize("ratio", [0, 0.1])
def test_no_sum_of_two_products_leaves_16_bits(ratio, grain, images):
    """The same outputs whether onnxruntime is told to avoid such sums or not."""
    options = {"target": "ort", "bits": 8, "ratio": ratio, **grain}
    assert saturating(made(images, saturation_safe=False, **options).model)
    result = made(images, **options)
    assert not saturating(result.model)
    assert any(row["narrowed"] for row in result.report["layers"])
    wanted = session(result.model, optimize=False).run(None, {"x": images})
    for before, after in zip(wanted, session(result.model).run(None, {"x": images}), strict=True):
        assert np.square(before - after).sum() < 1e-3 * np.square(before).sum()


def test_a_depthwise_layer_that_makes_several_channels_of_each_adds_pairs_too():
    text = "g (float[N,16,8,8] x, float[32,1,3,3] w, float[8,32,1,1] w2) => (float[N,8,6,6] y)"
    model = onnx.parser.parse_model(f"{HEAD} {text} {{ c = Conv <group=16> (x, w) r = Relu(c) y = Conv(r, w2) }}")
    model = with_weights(model)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full((32, 1, 3, 3), 1 / 9, np.float32), "w"))
    x = np.random.default_rng(0).uniform(0.7, 1, (8, 16, 8, 8)).astype(np.float32)
    options = {"calibrate": x, "target": "ort", "ratio": 0, "round": "nearest"}
    assert saturating(quantize(model, saturation_safe=False, **options).model)
    assert not saturating(quantize(model, **options).model)


def test_raised_thresholds_keep_more_than_seven_bits(images):
    safe, seven = (made(images, target="ort", bits=bits, saturation_safe=bits == 8) for bits in (8, 7))
    for eight, less in zip(safe.report["layers"], seven.report["layers"], strict=True):
        assert eight["sqnr_db"] > less["sqnr_db"]


@pytest.mark.parametrize(("target", "multiple"), [("ort", 4), ("openvino", 4), ("generic", 1)])
def test_channels_are_aligned_where_the_data_is_quantized(target, multiple, images, monkeypatch):
    monkeypatch.setattr("onnx_ocs.passes.limit_costs.KEPT", 1)
    rows = made(images, target=target, max_expand=0.5).report["layers"]
    for row in rows:
        if row["extra"]:
            assert (row["channels"] + row["extra"]) % multiple == 0
            assert row["real_ratio"] == row["extra"] / row["channels"]
    assert sum(bool(row["extra"]) for row in rows) > 3


def test_alignment_is_bounded(images):
    rows = made(images, target="ort").report["layers"]
    narrow = [row for row in rows if row["channels"] == 8]
    assert narrow
    for row in narrow:
        assert row["extra"] == 0
        assert "8 channels are too few for a multiple of 4" in row["reason"]
    assert any(row["extra"] for row in rows)


SKIP = f"""{HEAD} g (float[N,8,8,8] x) => (float[N,4,8,8] y) {{
    a = Conv <pads=[1,1,1,1]> (x, w2)
    b = Add (a, x)
    c = Relu (b)
    y = Conv (c, w7)
}}"""


@pytest.mark.parametrize("ratio", [0, 0.3])
@pytest.mark.parametrize("target", TARGETS)
def test_nodes_stand_in_order_where_a_tensor_is_read_by_a_layer_and_a_sum(target, ratio):
    """onnxruntime sorts nodes by itself; others do not."""
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 8)).astype(np.float32)
    model = onnx.parser.parse_model(SKIP)
    rng = np.random.default_rng(3)
    for name, shape in (("w2", (8, 8, 3, 3)), ("w7", (4, 8, 1, 1))):
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    result = quantize(model, target=target, calibrate=x, first="same", ratio=ratio, max_expand=1)
    onnx.checker.check_model(result.model, full_check=True)


def test_a_layer_that_is_left_out_runs_as_float(images, tmp_path):
    """With data quantized on both sides of it onnxruntime would round its weight by itself."""
    model = network()
    names = {node.output[0]: node for node in model.graph.node}
    names["c4"].name = "left"
    result = quantize(model, calibrate=images, target="ort", skip="^left$", bits=7, first="same")
    operators = integer_operators(result.model, tmp_path)
    assert operators["QLinearConv"] == LAYERS["Conv"] - 1
    assert operators["Conv"] + operators["FusedConv"] == 1


def test_a_tensor_that_a_body_reads_as_well_is_quantized_for_the_others(images):
    text = f"""{HEAD} g (float[N,3,16,16] x) => (float[N,8,16,16] c, float[N,3,16,16] z) {{
        c = Conv <pads=[1,1,1,1]> (x, w1, b1)
        t = Constant <value = bool {{1}}> ()
        z = If (t) <then_branch = p () => (float[N,3,16,16] k) {{ k = Relu (x) }},
                    else_branch = q () => (float[N,3,16,16] l) {{ l = Neg (x) }}>
    }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(3)
    for name in ("w1", "b1"):
        values = rng.standard_normal(WEIGHTS[name]).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for target in TARGETS:
        result = quantize(model, calibrate=images, target=target, first="same", bits=7, min_sqnr=20)
        assert result.report["layers"][0]["act_bits"] == 8


def test_statistics_of_another_target_are_said_to_lack_tensors(images, tmp_path):
    made(images, target="generic", save_stats=tmp_path / "stats.npz")
    result = quantize(network(), target="ort", stats=tmp_path / "stats.npz", bits=7, first="same")
    assert any("statistics do not cover" in note for note in result.report["notes"])


@pytest.mark.parametrize("shape", ["N,8", "N,3,8", "16,3,8"])
def test_a_matmul_and_the_sum_behind_it_run_on_integers(shape, tmp_path):
    """Where all sizes are known, onnxruntime makes a Gemm of them."""
    text = f"""{HEAD} g (float[{shape}] x) => (float[{shape.replace("8", "4")}] y) {{
        m = MatMul (x, w)
        h = Add (m, b)
        r = Relu (h)
        n = MatMul (r, v)
        y = Add (c, n)
    }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(3)
    for name, dims in (("w", (8, 16)), ("b", (16,)), ("v", (16, 4)), ("c", (4,))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(dims).astype(np.float32), name))
    x = rng.standard_normal((*(16, 3)[: shape.count(",")], 8)).astype(np.float32)
    result = quantize(model, calibrate=x, target="ort", first="same", min_sqnr=25)
    assert lint(result.model, target="ort").findings == []
    operators = integer_operators(result.model, tmp_path)
    assert operators["QGemm"] + operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] == 2
    assert not {"MatMul", "Gemm"} & set(operators)


@pytest.mark.parametrize("act_bits", [8, 5])
def test_a_clip_in_front_of_a_narrow_grid_leaves_the_conv_an_integer_kernel(act_bits, images, tmp_path):
    text = f"""{HEAD} g (float[N,3,16,16] x) => (float[N,8,16,16] y) {{
        c = Conv <pads=[1,1,1,1]> (x, w1, b1)
        r = Clip (c, zero, six)
        y = Conv (r, w3)
    }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(
        tensor for tensor in network().graph.initializer if tensor.name in ("w1", "b1", "w3", "zero", "six")
    )
    result = quantize(model, calibrate=images, target="ort", act_bits=act_bits, first="same", min_sqnr=10)
    operators = integer_operators(result.model, tmp_path)
    assert operators["QLinearConv"] == 2


WIDE = f"""{HEAD} g (float[N,3,32,32] x) => (float[N,8,32,32] y) {{
    a = Conv <pads=[1,1,1,1]> (x, w1)
    b = Relu (a)
    c = Conv (b, w2)
    d = Relu (c)
    e = Conv <pads=[1,1,1,1]> (d, w3)
    f = Relu (e)
    h = Conv <pads=[1,1,1,1]> (f, w4)
    i = Relu (h)
    y = Conv <pads=[1,1,1,1]> (i, w5)
}}"""


def wide():
    """A narrow 1x1 layer on much data, where copies cost as much as the layer, in front of wide ones."""
    model, rng = onnx.parser.parse_model(WIDE), np.random.default_rng(0)
    shapes = {"w1": (32, 3, 3, 3), "w2": (128, 32, 1, 1), "w3": (128, 128, 3, 3), "w4": (128, 128, 3, 3)}
    for name, shape in {**shapes, "w5": (8, 128, 3, 3)}.items():
        values = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.mark.parametrize(("options", "kept"), [({}, 3), ({"ratio": 0.2}, 4), ({"align": 4}, 4), ({"align": 1}, 4)])
def test_copies_that_cost_too_much_are_left_out(options, kept, monkeypatch):
    """The least of all that would be needed, and most layers keep theirs in any case."""
    monkeypatch.setattr("onnx_ocs.passes.limit_costs.SPARED", 0.05)
    samples = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    rows = quantize(wide(), calibrate=samples, target="ort", round="nearest", verify=False, **options).report["layers"]
    assert [row["status"] for row in rows[1:]].count("split") == kept
    for row in rows[1:]:
        if row["status"] != "split":
            assert row["extra"] == 0
            assert "too much" in row["reason"]
            assert "--align 4" in row["reason"]


def test_most_layers_keep_their_copies_and_so_does_what_was_asked_for_by_name(monkeypatch):
    monkeypatch.setattr("onnx_ocs.passes.limit_costs.SPARED", 0.0)
    monkeypatch.setattr("onnx_ocs.passes.limit_costs.KEPT", 0.5)
    samples = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    options = {"calibrate": samples, "target": "ort", "round": "nearest", "verify": False, "ratio": 0.0}
    rows = quantize(wide(), **{**options, "ratio": 0.001}).report["layers"]
    assert sum(row["status"] == "split" for row in rows) == 2
    rows = quantize(wide(), **options, layer=".*:ratio=0.02").report["layers"]
    assert sum(row["status"] == "split" for row in rows) == 4


@pytest.mark.parametrize("bias", [(12, 1), (1, 20), (12, 20)])
@pytest.mark.parametrize("target", TARGETS)
def test_the_bias_of_a_gemm_with_its_weight_on_the_left_stays_float(target, bias):
    """Its outputs lie along the rows, and there is no integer kernel with a scale for each."""
    text = "(float[16,20] x) => (float[12,20] y) { y = Gemm (w, x, b) }"
    model, rng = onnx.parser.parse_model(f"{HEAD} g {text}"), np.random.default_rng(0)
    for name, shape in (("w", (12, 16)), ("b", bias)):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    samples = [{"x": rng.standard_normal((16, 20)).astype(np.float32)} for _ in range(4)]
    result = quantize(model, calibrate=samples, target=target, ratio=0.1, first="same")
    assert result.report["layers"][0]["act_bits"] == 8
    assert result.report["verification"]["quantized"]["sqnr_db"] > 30
    assert not any(tensor.data_type == onnx.TensorProto.INT32 for tensor in result.model.graph.initializer)


FORK = f"""{HEAD} g (float[N,3,32,32] x) => (float[N,8,32,32] y) {{
    a = Conv <pads=[1,1,1,1]> (x, w1)
    b = Relu (a)
    c = Conv (b, w2)
    d = Conv (b, w3)
    y = Add (c, d)
}}"""


def fork(size="32"):
    """Two layers that read one stream, and cost about as much as its copies."""
    model = onnx.parser.parse_model(FORK.replace("32,32", f"{size},{size}"))
    rng = np.random.default_rng(0)
    for name, shape in {"w1": (64, 3, 3, 3), "w2": (8, 64, 1, 1), "w3": (8, 64, 1, 1)}.items():
        values = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for node, name in zip(model.graph.node, "abcdy", strict=True):
        node.name = name
    return model


@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize(("options", "split"), [({}, 0), ({"layer": "^d$:ratio=0.02"}, 2), ({"align": 4}, 2)])
def test_layers_that_read_one_stream_keep_or_lose_their_copies_together(fold, options, split, monkeypatch):
    monkeypatch.setattr("onnx_ocs.passes.limit_costs.KEPT", 0.0)
    samples = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    result = quantize(fork(), calibrate=samples, target="ort", round="nearest", fold=fold, **options)
    rows = result.report["layers"]
    assert [row["status"] for row in rows].count("split") == split
    assert all(row["costs"] for row in rows[1:])  # of those that are left out as well


def test_nothing_is_left_out_where_sizes_are_free(monkeypatch):
    monkeypatch.setattr("onnx_ocs.passes.limit_costs.KEPT", 0.0)
    samples = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    rows = quantize(fork("S"), calibrate=samples, target="ort", round="nearest").report["layers"]
    assert [row["status"] for row in rows].count("split") == 2


def test_the_ratio_of_one_layer_is_not_that_of_others():
    samples = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    options = {"calibrate": samples, "target": "ort", "round": "nearest", "verify": False}
    _, other, named = quantize(fork(), ratio=0.0, layer="^d$:ratio=0.5", **options).report["layers"]
    assert named["status"] == "split"
    assert other["reason"] in (None, "ratio 0")


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize("attributes", ["alpha=0.5", "beta=2.0", "alpha=3.0, beta=0.5, transB=1"])
def test_factors_of_a_gemm_are_folded(attributes, target, tmp_path):
    shape = "12,8" if "transB" in attributes else "8,12"
    text = f"""{HEAD} g (float[N,8] x, float[{shape}] w, float[12] wb, float[12,4] w2) => (float[N,4] y) {{
        h = Gemm <{attributes}> (x, w, wb)
        r = Relu (h)
        y = Gemm (r, w2)
    }}"""
    model = with_weights(onnx.parser.parse_model(text))
    x = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    result = quantize(model, calibrate=x, target=target, min_sqnr=25)
    assert all(not {"alpha", "beta"} & {a.name for a in node.attribute if a.f != 1} for node in result.model.graph.node)
    assert any("written in the form" in note for note in result.report["notes"])
    if target == "ort":
        assert integer_operators(result.model, tmp_path)["QGemm"] == 2
        assert lint(result.model, target="ort").passed
    plain = quantize(model, calibrate=x, target="generic").model
    assert any(a.name in ("alpha", "beta") and a.f != 1 for node in plain.graph.node for a in node.attribute)


@pytest.mark.parametrize(
    "node",
    [
        'Resize <mode="linear"> (r, , up)',
        'Resize <mode="cubic"> (r, , up)',
        "AveragePool <kernel_shape=[2,2], dilations=[2,2]> (r)",
        'Resize <mode="nearest"> (r, , up)',
    ],
)
def test_operators_that_have_no_integer_kernel_do_not_narrow_what_they_read(node):
    """An interpolation has a range of its own, and a pool with holes runs in float."""
    text = f"""<ir_version: 9, opset_import: ["" : 19]>
    g (float[N,3,8,8] x, float[8,3,3,3] w, float[4,8,3,3] w2) => (float[N,4,A,B] y)
    <float[4] up = {{1, 1, 2, 2}}> {{ c = Conv(x, w) r = Relu(c) a = {node} y = Conv(a, w2) }}"""
    model = with_weights(onnx.parser.parse_model(text))
    x = np.random.default_rng(1).standard_normal((16, 3, 8, 8)).astype(np.float32)
    quantize(model, calibrate=x, target="ort", first="same", ratio=0, act_clip="none", min_sqnr=32)


@pytest.mark.parametrize(("options", "multiple"), [({}, 1), ({"align": "auto"}, 16), ({"align": 8}, 8)])
def test_float_kernels_have_a_multiple_of_their_own(options, multiple):
    text = "g (float[N,64,8,8] x, float[64,64,3,3] w, float[8,64,1,1] w2) => (float[N,8,A,B] y)"
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text} {{ c = Conv(x, w) r = Relu(c) y = Conv(r, w2) }}"))
    rows = quantize(model, float=True, target="ort", ratio=0.02, **options).report["layers"]
    assert [row["extra"] for row in rows] == [{1: 2, 8: 8, 16: 16}[multiple]] * 2


def test_a_depthwise_layer_whose_channels_are_made_twice_is_not_called_split():
    text = "g (float[N,16,8,8] x, float[64,16,1,1] w, float[64,1,3,3] w2, float[8,64,1,1] w3) => (float[N,8,A,B] y)"
    body = "{ c = Conv(x, w) r = Relu(c) d = Conv <group=64> (r, w2) e = Relu(d) y = Conv(e, w3) }"
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text} {body}"))
    rows = quantize(model, target="ort", ratio=0.05, fold="always", round="nearest", align=1).report["layers"]
    assert [(row["status"], row["extra"]) for row in rows] == [("split", 1), ("quantized", 0), ("split", 4)]
    assert rows[1]["widened"] == 68


@pytest.mark.parametrize(
    "node",
    [
        "Pad (r, some, , where)",
        "Resize <axes=[2,3]> (r, , up)",
        'Resize <axes=[-1,2], mode="linear"> (r, , up)',
        "Resize <axes=[2,3]> (r, , , to)",
    ],
)
def test_axes_of_a_pad_and_a_resize_are_written_out(node, tmp_path):
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
    g (float[N,3,8,8] x, float[8,3,3,3] w, float[4,8,3,3] w2) => (float[N,4,A,B] y)
    <float[2] up = {{2, 3}}, int64[2] to = {{9, 7}}, int64[4] some = {{1, 2, 0, 1}}, int64[2] where = {{-1, 2}}>
    {{ c = Conv(x, w) r = Relu(c) a = {node} y = Conv(a, w2) }}"""
    model = with_weights(onnx.parser.parse_model(text))
    x = np.random.default_rng(1).standard_normal((16, 3, 8, 8)).astype(np.float32)
    options = {"calibrate": x, "target": "ort", "first": "same", "act_clip": "none", "min_sqnr": 28}
    result = quantize(model, ratio=0.1, **options)
    assert integer_operators(result.model, tmp_path)["QLinearConv"] == 2


def test_scales_that_stand_for_sizes_give_exactly_those():
    sizes, wanted = (list(axis.reshape(-1)) for axis in np.meshgrid(range(1, 70), range(1, 70)))
    scales = _scales(sizes, np.array(wanted), exact=False)
    np.testing.assert_array_equal(np.floor(np.float32(sizes) * scales), wanted)
    assert _scales([4, None], np.array([8, 8]), exact=False) is None
    assert _scales([7, 14], np.array([31, 62]), exact=True) is None  # 31 / 7 in float32 is a little less


def test_nodes_that_are_left_out_keep_their_form():
    text = f"""{HEAD} g (float[N,8] x, float[8,8] w) => (float[N,8] y) {{
        a = Gemm <alpha=0.5> (x, w)
        b = Gemm <alpha=0.25> (a, w)
        y = Gemm <alpha=0.25> (b, w) }}"""
    x = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    model = with_weights(onnx.parser.parse_model(text))
    made = quantize(model, calibrate=x, target="ort", skip="^a$", round="nearest", ratio=0).model
    factors = [a.f for node in made.graph.node if node.op_type == "Gemm" for a in node.attribute if a.name == "alpha"]
    assert factors == [0.5, 1, 1]
    weights = [tensor for tensor in made.graph.initializer if len(tensor.dims) == 2]
    assert len(weights) == 2  # as it is, and times 0.25 for both that read it so


def test_values_of_one_name_in_two_branches_are_not_taken_for_each_other():
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[N,3,8,8] x, bool[1] c, float[8,3,3,3] w) => (float[N,8,A,B] y) <int64[2] to = {12,12}> {
        i = Relu(x)
        z = If (c) <then_branch = t () => (float[N,3,D,E] o1) {
            r = MaxPool <kernel_shape=[2,2], strides=[2,2]> (i)
            k = Resize <axes=[2,3]> (r, , , to)
            o1 = Identity(k) },
        else_branch = f () => (float[N,3,D,E] o2) {
            r = MaxPool <kernel_shape=[3,3]> (i)
            k = Resize <axes=[2,3]> (r, , , to)
            o2 = Identity(k) }>
        q = Identity(z)
        y = Conv(q, w) }"""
    model = with_weights(onnx.parser.parse_model(text))
    x = np.random.default_rng(1).standard_normal((8, 3, 8, 8)).astype(np.float32)
    made = quantize(model, calibrate={"x": x, "c": np.array([False])}, target="ort", first="same").model
    for flag in (True, False):
        assert session(made).run(None, {"x": x, "c": np.array([flag])})[0].shape == (8, 8, 10, 10)
