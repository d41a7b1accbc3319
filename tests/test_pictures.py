"""What graphs tell of the pictures they take, on graphs that prepare them in every way, and behind a first Conv."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from onnx_ocs import quantize
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.model import Model
from onnx_ocs.numerics.natural import fit_colours, natural_images
from onnx_ocs.pictures import picture_axis, pictures
from onnx_ocs.synthetic import make_samples


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((None, 3, None, None), 1),
        ((1, 224, 224, 3), 3),
        ((1, 1, 28, 28), 1),
        ((1, 1, None, None), None),  # may be a mask
        ((1, 1, 49, 10), 1),  # a spectrogram
        ((1, 96, 64, 1), 3),
        ((1, 1, 8, 4000), None),
        ((1, 3, 4, 16), None),
        ((None, 64), None),
        ((None, 4, None, 64), None),  # heads of attention
    ],
)
def test_pictures_have_three_colours_or_sides_that_are_known(shape, axis):
    assert picture_axis(shape) == axis


CONSTANTS = """float[3,1,1] mean = {100.0, 120.0, 130.0}, float[1,3,1,1] deviation = {50.0, 60.0, 70.0},
    float[3] means = {100.0, 120.0, 130.0}, float[3] ones = {1.0, 1.0, 1.0}, float[3] none = {0.0, 0.0, 0.0},
    float[3] variances = {2500.0, 3600.0, 4900.0}, float byte = {255.0}, float half = {127.5}, float one = {1.0},
    float tiny = {0.000001},
    float[3,1,1] zero = {0.0, 1.0, 1.0}, int64[8] channel = {0, 1, 0, 0, 0, 1, 0, 0},
    float[16,1] rows = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}"""

PREPARED = {
    "mean and deviation": ("float[N,3,16,16]", "s = Sub(x, mean) y = Div(s, deviation)", [100, 120, 130], [50, 60, 70]),
    "to -1 to 1": ("float[N,3,16,16]", "s = Div(x, half) y = Sub(s, one)", [127.5] * 3, [63.75] * 3),
    "the mean alone": ("float[N,3,16,16]", "y = Sub(x, mean)", [100, 120, 130], [50, 60, 65]),
    "the mean less the data": ("float[N,3,16,16]", "y = Sub(mean, x)", [100, 120, 130], [50, 60, 65]),
    "a factor alone": ("float[N,3,16,16]", "y = Div(x, byte)", [127.5] * 3, [63.75] * 3),
    "a factor, and next to nothing": (
        "float[N,3,16,16]",
        "s = Div(x, byte) y = Add(s, tiny)",
        [127.5] * 3,
        [63.75] * 3,
    ),
    "bytes": ("uint8[N,3,16,16]", "y = Cast <to = 1> (x)", [127.5] * 3, [63.75] * 3),
    "bytes from 1 on": ("uint8[N,3,16,16]", "c = Cast <to = 1> (x) y = Add(c, one)", [127.5] * 3, [63.75] * 3),
    "bytes to 0 to 1": ("uint8[N,3,16,16]", "c = Cast <to = 1> (x) y = Div(c, byte)", [127.5] * 3, [63.75] * 3),
    "colours last": (
        "uint8[N,16,16,3]",
        "c = Cast <to = 1> (x) s = Sub(c, means) y = Transpose <perm = [0, 3, 1, 2]> (s)",
        [100, 120, 130],
        [50, 60, 65],
    ),
    "turned first": (
        "float[N,16,16,3]",
        "t = Transpose <perm = [0, 3, 1, 2]> (x) s = Sub(t, mean) y = Div(s, deviation)",
        [100, 120, 130],
        [50, 60, 70],
    ),
    "a normalization": (
        "float[N,3,16,16]",
        "y = BatchNormalization(x, ones, none, means, variances)",
        [100, 120, 130],
        [50, 60, 70],
    ),
    "a normalization behind a factor": (
        "float[N,3,16,16]",
        "s = Mul(x, byte) y = BatchNormalization(s, ones, none, means, variances)",
        np.array([100, 120, 130]) / 255,
        np.array([50, 60, 70]) / 255,
    ),
}


def graph(kind, body):
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g ({kind} x) => (float[N,A,B,C] y) <{CONSTANTS}> {{ {body} }}"""
    )


@pytest.mark.parametrize(("kind", "body", "mean", "deviation"), PREPARED.values(), ids=PREPARED)
def test_the_constants_that_prepare_a_picture_are_those_of_its_colours(kind, body, mean, deviation):
    told = pictures(Editor(Model.load(graph(kind, body))))["x"]
    np.testing.assert_allclose(told.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(told.deviation, deviation, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("float[N,3,16,16]", "y = Relu(x)"),
        ("float[N,3,16,16]", "y = Add(x, mean)"),
        ("float[N,3,16,16]", "y = Sub(x, rows)"),
        ("float[N,3,16,16]", "y = Add(x, x)"),
        ("float[N,3,16,16]", "s = Sub(x, mean) y = Mul(s, zero)"),
        ("float[N,3,16,16]", "s = Sub(x, mean) r = Sub(x, half) y = Add(s, r)"),
        ("float[N,1,16,16]", "y = Sub(x, mean)"),
        ("float[N,1,16,16]", "p = Pad(x, channel) y = Sub(p, mean)"),
    ],
)
def test_where_nothing_tells_values_are_about_0(kind, body):
    told = pictures(Editor(Model.load(graph(kind, body))))["x"]
    assert (told.mean == 0).all()
    assert (told.deviation == 1).all()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("float[N,4,16,16]", "y = Sub(x, half)"),
        ("int32[N,3,16,16]", "c = Cast <to = 1> (x) y = Sub(c, half)"),
        ("uint8[N,1,16,16]", "c = Cast <to = 7> (x) y = Gather(means, c)"),
        ("uint8[N,1,16,16]", "mask = Identity(x) y = Cast <to = 1> (mask)"),
    ],
)
def test_others_are_no_pictures(kind, body):
    model = graph(kind, body)
    if "mask" in body:
        model.graph.input[0].name = model.graph.node[0].input[0] = "attention_mask"
    assert pictures(Editor(Model.load(model))) == {}


def photographs(mean, deviation, seed, count=64, size=32):
    images = natural_images(count, 3, (size, size), np.random.default_rng(seed))
    return (images * deviation + np.reshape(mean, (3, 1, 1))).astype(np.float32)


@pytest.mark.parametrize("attributes", ["strides = [2, 2]", "dilations = [2, 1]", "pads = [1, 1, 1, 1]"])
@pytest.mark.parametrize(("mean", "deviation"), [((0, 0, 0), 1), ((0.5, 0.4, 0.3), 0.2), ((120, 115, 100), 60)])
def test_a_normalization_behind_the_first_layer_tells_them(mean, deviation, attributes, rng):
    weight = rng.normal(0.05, 0.3, (24, 3, 3, 3)).astype(np.float32)
    bias = rng.normal(0, 1, 24).astype(np.float32)
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3,32,32] x) => (float[N,A,B,C] y) {{ c = Conv <{}> (x, w, b) {} }}"""
    plain = onnx.parser.parse_model(text.format(attributes, "y = Identity(c)"))
    normal = onnx.parser.parse_model(text.format(attributes, "y = BatchNormalization(c, one, zero, mean, variance)"))
    for model in (plain, normal):
        for name, values in (("w", weight), ("b", bias)):
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    session = ort.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
    (met,) = session.run(None, {"x": photographs(mean, deviation, seed=5)})
    statistics = {"mean": met.mean(axis=(0, 2, 3)), "variance": met.var(axis=(0, 2, 3))}
    for name, values in (statistics | {"one": np.ones(24), "zero": np.zeros(24)}).items():
        normal.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    told = pictures(Editor(Model.load(normal)))["x"]
    np.testing.assert_allclose(told.deviation, deviation, rtol=0.15)
    np.testing.assert_allclose(told.mean, mean, atol=0.25 * deviation)


def test_statistics_that_are_no_numbers_tell_nothing():
    model = graph("float[N,3,16,16]", "y = BatchNormalization(x, ones, none, means, variances)")
    for name, value in (("means", np.nan), ("variances", -1.0), ("variances", np.inf)):
        broken = onnx.ModelProto.FromString(model.SerializeToString())
        for each in broken.graph.initializer:
            if each.name == name:
                each.CopyFrom(onnx.numpy_helper.from_array(np.full(3, value, np.float32), name))
        told = pictures(Editor(Model.load(broken)))["x"]
        assert (told.mean == 0).all()
        assert (told.deviation == 1).all()


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [("dilations = [1]", (3, 3, 3, 3)), ("dilations = [0, 1]", (3, 3, 3, 3)), ("group = 1", (3, 3, 3))],
)
def test_a_layer_that_no_runtime_takes_tells_nothing(attributes, shape):
    body = f"c = Conv <{attributes}> (x, w) y = BatchNormalization(c, ones, none, means, variances)"
    model = graph("float[N,3,16,16]", body)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), "w"))
    told = pictures(Editor(Model.load(model)))["x"]
    assert (told.mean == 0).all()
    assert (told.deviation == 1).all()


def test_a_dead_output_and_kernels_without_a_sum_tell_no_mean(rng):
    weight = rng.normal(0.05, 0.3, (24, 3, 3, 3))
    images = photographs((120, 115, 100), 60, seed=5).astype(np.float64)
    rows = sliding_window_view(images, (3, 3), axis=(2, 3)).transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)

    def fitted(kernels, factors=1.0):
        met = rows @ kernels.reshape(24, 27).T
        return fit_colours(kernels, met.mean(axis=0), met.var(axis=0) * factors, (1, 1), (32, 32))

    dead, factors = weight.copy(), np.ones(24)
    dead[3], factors[3] = 1e-12 * dead[3], 1e-20
    mean, variance = fitted(dead, factors)
    np.testing.assert_allclose(mean, (120, 115, 100), atol=15)
    np.testing.assert_allclose(np.sqrt(variance), 60, rtol=0.15)
    flat = (weight - weight.mean(axis=(2, 3), keepdims=True)).astype(np.float32).astype(np.float64)
    assert (np.abs(fitted(flat)[0]) < 60).all()
    assert fit_colours(weight, np.zeros(24), np.zeros(24), (1, 1), (32, 32)) is None
    assert fit_colours(rng.normal(size=(4, 3, 40, 40)), np.zeros(4), np.ones(4), (1, 1), (224, 224)) is None


@pytest.fixture
def prepared(models):
    """The digits network on pixels around 128, of either type, and without what prepares them."""
    plain = onnx.load(models / "digits_resnet.onnx")
    (source,) = plain.graph.input

    def make(kind):
        model = onnx.ModelProto.FromString(plain.SerializeToString())
        for node in model.graph.node:
            node.input[:] = ["normal" if name == source.name else name for name in node.input]
        steps = [("Cast", source.name, "number"), ("Sub", "middle", "moved"), ("Div", "spread", "normal")]
        for index, (op, given, output) in enumerate(steps):
            inputs = [steps[index - 1][2], given] if index else [given]
            attributes = {} if index else {"to": onnx.TensorProto.FLOAT}
            model.graph.node.insert(index, onnx.helper.make_node(op, inputs, [output], **attributes))
        model.graph.input[0].type.tensor_type.elem_type = kind
        for name, value in (("middle", 128.0), ("spread", 32.0)):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
        return model

    return plain, make


def test_preparing_pictures_in_the_graph_changes_no_weight(prepared):
    """Made-up pictures are those that the layers saw before."""
    plain, make = prepared
    first, second = (
        {
            each.name: onnx.numpy_helper.to_array(each).astype(int)
            for each in quantize(model, bits=5, ratio=0, error_propagation=False, verify=False).model.graph.initializer
            if each.data_type == onnx.TensorProto.INT8
        }
        for model in (plain, make(onnx.TensorProto.FLOAT))
    )
    assert first
    assert first.keys() == second.keys()
    assert np.mean(np.concatenate([(first[name] == second[name]).reshape(-1) for name in first])) > 0.98


def test_bytes_are_pictures_too(prepared, tmp_path):
    onnx.save(prepared[1](onnx.TensorProto.UINT8), path := tmp_path / "bytes.onnx")
    folder = make_samples(path, "bytes", tmp_path / "made", 32, 0, {}, pictures(Editor(Model.load(path))))
    made = np.concatenate([np.load(file)["image"] for file in sorted(folder.iterdir())])
    assert made.dtype == np.uint8
    assert made.mean() == pytest.approx(128, abs=4)
    assert made.std() == pytest.approx(32, abs=3)


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "mean", "deviation"),
    [("vww_mobilenetv1_0.25_96_bn", (0.35, 0.5), (0.18, 0.3)), ("cifar10_resnet20_bn", (-0.3, 0.1), (0.9, 1.25))],
)
def test_trained_networks_tell_what_they_were_trained_on(name, mean, deviation, assets):
    """Photographs from 0 to 1, and CIFAR-10 less the mean of ImageNet, in its deviations."""
    (told,) = pictures(Editor(Model.load(assets / "models" / f"{name}.onnx"))).values()
    assert all(mean[0] < value < mean[1] for value in told.mean)
    assert all(deviation[0] < value < deviation[1] for value in told.deviation)
