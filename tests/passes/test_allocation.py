"""Plans, allocations and options of single layers, through whole models."""

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from operators import ROWS, feed, row_model

from onnx_ocs import quantize
from onnx_ocs.passes.plan_splits import ALLOCATIONS


def run(model, inputs):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, inputs)


def sqnr(wanted, found):
    noise = sum(float(np.square(a.astype(float) - b).sum()) for a, b in zip(wanted, found, strict=True))
    return 10 * np.log10(sum(float(np.square(a.astype(float)).sum()) for a in wanted) / noise)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "options",
    [
        {"plan": "joint"},
        {"plan": "joint", "objective": "weight"},
        {"plan": "joint", "allocate": "sensitivity", "per_channel": False},
        {"allocate": "knapsack", "split_policy": "halving"},
        {"allocate": "sensitivity", "fold": "always"},
        {"plan": "joint", "fold": "always", "round": "compensated"},
    ],
    ids=str,
)
def test_every_row_computes_what_its_source_does(name, options):
    model = row_model(name)
    result = quantize(model, bits=8, ratio=0.3, first="same", verify=False, **options)
    wanted, found = run(model, feed(model)), run(result.model, feed(model))
    assert sqnr(wanted, found) > (24 if options.get("per_channel", True) else 20)
    for row in result.report["layers"]:
        assert row["status"] != "declined"
        assert np.isfinite(row["threshold"]).all()


def two_layers(heavy, rng):
    """Two dense layers, of which the first or the second has outliers."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4,40] x, float[40,40] v, float[40,40] w) => (float[4,40] y) {
            a = MatMul(x, v)
            r = Relu(a)
            y = MatMul(r, w) }"""
    )
    del model.graph.input[1:]
    for place, name in enumerate("vw"):
        values = rng.standard_normal((40, 40)).astype(np.float32)
        if place == heavy:
            values[:6, :8] *= 12
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.mark.parametrize("heavy", [0, 1])
@pytest.mark.parametrize("allocation", ["knapsack", "sensitivity"])
def test_copies_go_to_the_layer_with_outliers_at_the_same_size(heavy, allocation, rng):
    model = two_layers(heavy, rng)
    options = {"bits": 4, "ratio": 0.1, "round": "compensated", "verify": False}
    made = {name: quantize(model, allocate=name, **options) for name in ("uniform", allocation)}
    uniform, found = ([row["extra"] for row in made[name].report["layers"]] for name in ("uniform", allocation))
    assert uniform == [4, 4]
    assert sum(found) <= 8
    assert found[heavy] > found[1 - heavy]
    x = {"x": rng.standard_normal((4, 40)).astype(np.float32)}
    quality = [sqnr(run(model, x), run(made[name].model, x)) for name in ("uniform", allocation)]
    assert quality[1] > quality[0]


def two_convolutions(heavy, rng):
    """Two convolutions, of which the first or the second has outliers, and a dense layer."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4,40,6,6] x, float[40,40,3,3] v, float[40,40,3,3] w, float[40,40] u) => (float[4,40] y) {
            a = Conv <pads=[1,1,1,1]> (x, v)
            r = Relu(a)
            b = Conv <pads=[1,1,1,1]> (r, w)
            p = GlobalAveragePool(b)
            f = Flatten(p)
            y = MatMul(f, u) }"""
    )
    del model.graph.input[1:]
    for place, name in enumerate("vwu"):
        values = rng.standard_normal((40, 40, 3, 3) if name != "u" else (40, 40)).astype(np.float32)
        if place == heavy:
            values[:8, :6] *= 12
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.mark.parametrize("heavy", [0, 1])
def test_by_default_half_of_the_copies_of_convolutions_of_few_bits_go_where_they_save_most(heavy, rng):
    model = two_convolutions(heavy, rng)

    def extras(**options):
        rows = quantize(model, ratio=0.1, round="compensated", verify=False, **options).report["layers"]
        return [row["extra"] for row in rows]

    found = extras(bits=5)
    assert found[heavy] == 6
    assert found[1 - heavy] == 2
    assert found[2] == 4  # a dense layer keeps its share
    assert extras(bits=6) == [4, 4, 4]
    assert extras(bits=4, layer=(f"{quantize(model, verify=False).report['layers'][0]['name']}$:ratio=0.1",)) == [4] * 3
    samples = {"x": rng.standard_normal((4, 40, 6, 6)).astype(np.float32)}
    assert extras(bits=4, calibrate=samples, target="ort") == extras(
        bits=4, calibrate=samples, target="ort", allocate="uniform"
    )


@pytest.mark.parametrize("options", [{}, {"split": "naive", "fold": "always"}, {"target": "ort"}], ids=str)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_joint_plan_goes_with_channels_of_data_that_are_split(allocation, options, rng):
    model = two_convolutions(0, rng)
    x = {"x": rng.standard_normal((8, 40, 6, 6)).astype(np.float32)}
    whole = {"bits": 5, "ratio": 0.1, "act_ratio": 0.05, "plan": "joint", "allocate": allocation, "calibrate": x}
    result = quantize(model, verify=False, **whole, **options)
    first = {"x": x["x"][:4]}
    assert sqnr(run(model, first), run(result.model, first)) > 15
    assert sum(row["extra"] for row in result.report["layers"]) > 0


@pytest.mark.parametrize("heavy", [0, 1])
@pytest.mark.parametrize("fold", ["always", "never"])
def test_copies_that_go_elsewhere_take_no_more_bytes(heavy, fold, rng):
    """Those in the weights that make a channel twice count too."""
    model = two_convolutions(heavy, rng)
    options = {"bits": 4, "ratio": 0.1, "round": "nearest", "fold": fold, "verify": False}
    sizes = [quantize(model, allocate=name, **options).model.ByteSize() for name in ("uniform", "sensitivity")]
    assert sizes[1] < 1.01 * sizes[0]  # indices and scales aside


def test_a_layer_that_gets_no_copies_says_why(rng):
    model = two_layers(0, rng)
    rows = quantize(model, bits=4, ratio=0.05, allocate="sensitivity", verify=False).report["layers"]
    left = [row for row in rows if row["extra"] == 0]
    assert all("--allocate sensitivity" in row["reason"] for row in left)


def test_the_joint_plan_clips_what_no_copy_reaches(rng):
    """With one scale and few bits, a lone outlier in each of many channels is clipped."""
    model = two_layers(0, rng)
    for initializer in model.graph.initializer:
        values = onnx.numpy_helper.to_array(initializer).copy()
        values[rng.integers(0, 40, 3), rng.integers(0, 40, 3)] = 15
        initializer.CopyFrom(onnx.numpy_helper.from_array(values, initializer.name))
    options = {"bits": 4, "ratio": 0.05, "per_channel": False, "verify": False, "round": "nearest"}
    found = {
        plan: [row["threshold"][0] for row in quantize(model, plan=plan, **options).report["layers"]]
        for plan in ("magnitude", "joint")
    }
    assert all(joint < most for joint, most in zip(found["joint"], found["magnitude"], strict=True))


def test_options_of_single_layers_hold_for_those_whose_names_match(rng):
    model = two_layers(0, rng)
    for node, name in zip([model.graph.node[0], model.graph.node[2]], ("first", "second"), strict=True):
        node.name = name
    layers = ("f.*t$:bits=8,ratio=0", "second:bits=3,ratio=0.3,round=nearest,clip=mse", "nothing:bits=2")
    first, second = quantize(model, bits=4, ratio=0.1, layer=layers, verify=False).report["layers"]
    assert (first["bits"], first["extra"], first["round"]) == (8, 0, "synthetic")
    assert (second["bits"], second["extra"], second["round"]) == (3, 12, "nearest")
    plain = quantize(model, bits=3, ratio=0.3, round="nearest", verify=False).report["layers"][1]
    assert np.mean(second["threshold"]) < np.mean(plain["threshold"])
    (first, second) = quantize(model, bits=4, layer="first:bits=none", verify=False).report["layers"]
    assert first["status"] == "declined"
    assert "--layer" in first["reason"]
    assert second["bits"] == 4


def test_a_first_layer_keeps_its_bits_unless_it_is_named():
    model = row_model("Conv 1-D")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    weight = model.graph.initializer[0]
    values = onnx.numpy_helper.to_array(weight)[:, :3]
    weight.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), weight.name))
    (row,) = quantize(model, bits=4, verify=False).report["layers"]
    assert row["bits"] == 8
    (row,) = quantize(model, bits=4, layer=".*:bits=5", verify=False).report["layers"]
    assert row["bits"] == 5


@pytest.mark.parametrize(
    "text",
    ["no colon", "x:bits", "x:bits=9", "x:bits=a", "x:ratio=2", "x:clip=best", "x:round=up", "x:size=3", "(:bits=4"],
)
def test_a_layer_option_that_cannot_be_read_is_wrong_usage(text, command, models, tmp_path):
    status, _, complaint = command(models / "digits_mlp.onnx", tmp_path / "out.onnx", "--layer", text)
    assert status == 2
    assert "layer" in complaint or "regular expression" in complaint
