"""What the graph says of its tensors, against samples of what it says."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from onnx_ocs import quantize
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.predicted import predicted
from onnx_ocs.numerics.batchnorm import clipped_normal

NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,8,8] x, float[6,3,3,3] w, float[6] s, float[6] b, float[6] m, float[6] v, float[5,6,3,3] u, float[4,11] t)
    => (float[N,4] y)
<float[2] f = {0, -1}, float top = {6}, float bottom = {0}> {
    c = Conv <pads=[1,1,1,1]> (x, w)
    n = BatchNormalization(c, s, b, m, v)
    r = Relu(n)
    k = Clip(n, bottom, top)
    d = Conv <pads=[1,1,1,1]> (r, u)
    e = Sigmoid(d)
    p = MaxPool <kernel_shape=[2,2]> (r)
    j = Concat <axis=1> (k, e)
    g = GlobalAveragePool(j)
    h = Flatten(g)
    q = GlobalAveragePool(r)
    l = Flatten(q)
    y = Gemm <transB=1> (h, t) }"""


@pytest.fixture
def model(rng):
    made = onnx.parser.parse_model(NETWORK)
    for value in list(made.graph.input)[1:]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape).astype(np.float32)
        values = np.abs(values) + 0.5 if value.name in "sv" else values
        made.graph.initializer.append(onnx.numpy_helper.from_array(values, value.name))
        made.graph.input.remove(value)
    return made


@pytest.mark.parametrize("bounds", [(0, np.inf), (0, 6), (-1, 1), (-np.inf, np.inf), (-np.inf, 1)])
def test_the_moments_of_a_clipped_normal_variable(bounds, rng):
    mean, variance = np.array([-1.0, 0.0, 2.0, 5.0, -20.0]), np.array([1.0, 4.0, 0.5, 2.0, 1.0])
    values = np.clip(mean + np.sqrt(variance) * rng.standard_normal((200000, 5)), *bounds)
    first, second = clipped_normal(mean, variance, *bounds)
    np.testing.assert_allclose(first, values.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(second, values.var(axis=0), atol=0.06)


def test_normalized_channels_are_followed_as_far_as_they_are_known(model):
    found = predicted(Editor(Model.load(model)))
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_allclose(found["n"].parts[0].mean, held["b"])
    np.testing.assert_allclose(found["n"].parts[0].variance, held["s"] ** 2)
    assert (found["r"].parts[0].low, found["r"].parts[0].high) == (0, np.inf)
    assert (found["k"].parts[0].low, found["k"].parts[0].high) == (0, 6)
    assert {name: known.nonnegative for name, known in found.items()} == {
        "n": False, "r": True, "k": True, "e": True, "p": True, "j": True, "g": True, "h": True, "q": True, "l": True,
    }  # fmt: skip
    assert {name for name, known in found.items() if known.parts} == {"n", "r", "k", "q", "l"}


def test_biases_make_up_for_a_mean_that_no_sample_shows(rng):
    """Data that is what the normalization says: without samples the mean of the outputs is kept."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,16] x, float[16] s, float[16] b, float[16] m, float[16] v, float[16,8] w) => (float[N,8] y) {
            n = BatchNormalization <epsilon = 0.0> (x, s, b, m, v)
            r = Relu(n)
            y = Gemm(r, w) }"""
    )
    values = {"m": np.zeros(16), "v": np.ones(16), "s": rng.random(16) + 0.5, "b": rng.standard_normal(16)}
    values["w"] = rng.standard_normal((16, 8)) ** 3
    del model.graph.input[1:]
    for name, some in values.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(some.astype(np.float32), name))
    import onnxruntime as ort

    x = {"x": rng.standard_normal((50000, 16)).astype(np.float32)}
    outputs = {}
    for correct in (True, False):
        options = {"bits": 4, "ratio": 0, "round": "nearest", "bias_correction": correct, "verify": False}
        result = quantize(model, **options)
        outputs[correct] = ort.InferenceSession(result.model.SerializeToString()).run(None, x)[0]
        assert result.report["layers"][0]["bias_corrected"] is correct
    wanted = ort.InferenceSession(model.SerializeToString()).run(None, x)[0]
    wrong = {correct: np.abs((found - wanted).mean(axis=0)).max() for correct, found in outputs.items()}
    assert wrong[True] < 0.02 * np.abs(wanted).max()
    assert wrong[True] < 0.1 * wrong[False]


SIGNS = {
    "y = Pad (r, pads)": True,
    "y = Pad (r, pads, above)": True,
    "y = Pad (r, pads, below)": False,
    'y = Pad <mode = "reflect"> (r, pads)': True,
    "y = Resize (r, none, scales)": True,
    'y = Resize <mode = "linear"> (r, none, scales)': True,
    'y = Resize <mode = "cubic"> (r, none, scales)': False,
    "y = Clip (r, below, above)": True,
    "y = Clip (r, , below)": False,
    "y = Clip (x, above)": True,
    "y = Add (r, x)": False,
}


@pytest.mark.parametrize(("node", "nonnegative"), SIGNS.items(), ids=SIGNS)
def test_the_sign_is_that_of_every_value(node, nonnegative, rng):
    head = '<ir_version: 8, opset_import: ["" : 17]> g (float[1,2,4,4] x) => (float[N,C,A,B] y)'
    made = onnx.parser.parse_model(f"{head} {{ r = Relu (x)\n {node} }}")
    arrays = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "above": np.float32(0.5),
        "below": np.float32(-0.5),
        "none": np.zeros(0, np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    for name, values in arrays.items():
        if any(name in other.input for other in made.graph.node):
            made.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    found = predicted(Editor(Model.load(made)))
    assert ("y" in found and found["y"].nonnegative) == nonnegative
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (values,) = session.run(None, {"x": rng.standard_normal((1, 2, 4, 4)).astype(np.float32)})
    assert (values.min() >= 0) == nonnegative
