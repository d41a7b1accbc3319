"""Weights that make up for the errors of the layers before theirs, through whole models."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from operators import with_weights

from onnx_ocs import propagation, quantize
from onnx_ocs.graph.contraction import Contraction
from onnx_ocs.graph.model import Model
from onnx_ocs.numerics.drift import DAMPING, Drift
from onnx_ocs.numerics.stored import load_arrays

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '

DENSE = """g (float[16,8] x, float[8,12] w, float[12,6] w2) => (float[16,6] y)
    { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w2) }"""

NETWORKS = {
    "dense": DENSE,
    "convolutions": """g (float[4,3,9,9] x, float[8,3,3,3] w, float[8] wb, float[8,8,3,3] w2, float[8] wb2,
        float[6,8,1,1] w3) => (float[4,6,9,9] y)
        { a = Conv <pads = [1,1,1,1]> (x, w, wb) b = Relu(a) c = Conv <pads = [1,1,1,1]> (b, w2, wb2) d = Relu(c)
          e = Add(b, d) y = Conv(e, w3) }""",
    "depthwise": """g (float[4,3,9,9] x, float[8,3,3,3] w, float[8,1,3,3] w2, float[6,8,1,1] w3) => (float[4,6,7,7] y)
        { a = Conv <pads = [1,1,1,1]> (x, w) b = Relu(a) c = Conv <group = 8> (b, w2) d = Relu(c) y = Conv(d, w3) }""",
    "two readers": """g (float[16,8] x, float[8,12] w, float[12,6] w2, float[12,6] w3) => (float[16,6] y, float[16,6] z)
        { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w2) z = MatMul(b, w3) }""",
    "transposed": """g (float[4,6,5,5] x, float[6,8,3,3] w, float[8,4,3,3] w2) => (float[4,4,9,9] y)
        { a = ConvTranspose(x, w) b = Relu(a) y = ConvTranspose <group = 1> (b, w2) }""",
    "gemm": """g (float[16,8] x, float[12,8] w, float[12] wb, float[12,6] w2, float[6] wb2) => (float[16,6] y)
        { a = Gemm <transB = 1> (x, w, wb) b = Relu(a) y = Gemm (b, w2, wb2) }""",
    "left operand": """g (float[16,8] x, float[12,16] w, float[8,6] w2) => (float[12,6] y)
        { a = MatMul(w, x) b = Relu(a) y = MatMul(b, w2) }""",
}

NOISE = """g (float[16,8] x, float[8,12] w, float[12,6] w2) => (float[16,6] y)
    { a = MatMul(x, w) n = RandomNormalLike <scale = 0.1> (a) b = Add(a, n) y = MatMul(b, w2) }"""

SEQUENCE = """g (float[16,8] x, float[8,12] w, float[12,6] w2, float[12,6] w3) => (float[16,6] y)
    { a = MatMul(x, w) s = SequenceConstruct(a, a) b = Relu(a) m = MatMul(b, w2) i = Constant <value_int = 0> ()
      c = SequenceAt(s, i) d = Neg(c) e = MatMul(d, w3) y = Add(m, e) }"""

ALONE = "g (float[16,8] x, float[8,4] w) => (float[16,4] y) { y = MatMul(x, w) }"

SELECTED = """g (float[4,20,16] x, float[16,24] w, float[24,1] w2, float[24,24] w3, float[24,8] w4) => (float[4,8] y)
    { a = MatMul(x, w) b = Relu(a) s = MatMul(b, w2) k = Constant <value_ints = [10]> () v, i = TopK <axis = 1> (s, k)
      h = Constant <value_ints = [1,1,24]> () j = Expand(i, h) c = GatherElements <axis = 1> (b, j)
      d = MatMul(c, w3) e = Relu(d) f = ReduceMean <axes = [1], keepdims = 0> (e) y = MatMul(f, w4) }"""

COMPRESSED = """g (float[16,16] x, float[16,24] w, float[24,8] w2, float[8,8] w3) => (float[8] y)
    { a = MatMul(x, w) b = Relu(a) m = ReduceMax <axes = [1], keepdims = 0> (b) t = Constant <value_float = 9.0> ()
      k = Greater(m, t) c = Compress <axis = 0> (b, k) d = MatMul(c, w2) e = Relu(d) f = MatMul(e, w3)
      y = ReduceSum <keepdims = 0> (f) }"""

LABELS = """g (float[16,8] x, float[8,12] w, float[12,6] w2) => (float[16,6] y, string[16] z)
    { a = MatMul(x, w) i = ArgMax <axis = 1, keepdims = 0> (a)
      l = Constant <value_strings = ["a","b","c","d","e","f","g","h","i","j","k","l"]> ()
      s = Gather(l, i) b = Relu(a) y = MatMul(b, w2) z = Identity(s) }"""

SHARED = """g (float[16,8] x, float[8,8] w) => (float[16,8] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }"""


def model_of(text, seed=0):
    return with_weights(onnx.parser.parse_model(HEAD + text), seed)


def samples_of(model, number=8, seed=1):
    """Correlated data: whole batches of the input, one behind the other."""
    rng = np.random.default_rng(seed)
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    values = rng.standard_normal([number * shape[0], *shape[1:]])
    return (values + rng.standard_normal([len(values), *[1] * (len(shape) - 1)])).astype(np.float32)


def outputs(model, inputs):
    size = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"x": part}) for part in np.split(inputs, len(inputs) // size)]
    return np.concatenate([np.concatenate([each.reshape(-1) for each in part]) for part in parts]).astype(np.float64)


def made(model, inputs, **options):
    given = {"bits": 3, "ratio": 0, "act_bits": None, "verify": False, "calibrate": inputs}
    return quantize(model, **given | options)


def constants(model):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def read(found, name):
    """A weight as a quantized model has it."""
    return found[f"{name}.integers"].astype(np.float64) * found[f"{name}.scale"]


@pytest.mark.parametrize("options", [{}, {"ratio": 0.2, "bias_correction": False}, {"bits": 4, "per_channel": False}])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_of_the_outputs_is_less(name, options):
    errors = []
    for seed in range(3):
        model = model_of(NETWORKS[name], seed)
        inputs = samples_of(model, 16)
        wanted = outputs(model, inputs)
        found = (made(model, inputs, error_propagation=on, **options).model for on in (False, True))
        errors.append([np.square(outputs(each, inputs) - wanted).mean() for each in found])
    without, with_it = np.mean(errors, axis=0)
    assert with_it < without


def test_the_second_layer_is_rounded_as_one_that_makes_up_on_the_data_it_is_left():
    """The integers are those of a layer alone, on what the first one leaves, whose weight is what regression wants."""
    model = model_of(DENSE)
    inputs = samples_of(model)
    options = {"bias_correction": False, "bits": 4}
    found = constants(made(model, inputs, **options).model)
    held = constants(model)
    exact, drifted = (np.maximum(inputs.astype(np.float64) @ part, 0) for part in (held["w"], read(found, "w")))
    cross, second = ((part.T @ drifted) / len(inputs) for part in (exact - drifted, drifted))
    damped = second + DAMPING * second.diagonal().mean() * np.eye(len(second))
    wanted = held["w2"] + np.linalg.solve(damped, cross.T @ held["w2"])
    alone = onnx.parser.parse_model(
        HEAD + "g (float[16,12] x, float[12,6] w2) => (float[16,6] y) { y = MatMul(x, w2) }"
    )
    alone.graph.initializer.append(onnx.numpy_helper.from_array(wanted.astype(np.float32), "w2"))
    del alone.graph.input[1:]
    again = constants(made(alone, drifted.astype(np.float32), **options).model)
    np.testing.assert_allclose(read(found, "w2"), read(again, "w2"), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("text", [NOISE, SHARED, ALONE])
def test_where_nothing_can_be_made_up_for_the_weights_are_those_without(text):
    """Two runs of a noisy graph differ anyway; a weight that two layers read stands in front of both."""
    model = model_of(text)
    inputs = samples_of(model)
    with_it, without = (constants(made(model, inputs, error_propagation=on).model) for on in (True, False))
    assert with_it.keys() == without.keys()
    for name, values in with_it.items():
        np.testing.assert_array_equal(values, without[name])


@pytest.mark.parametrize(("text", "most"), [(SELECTED, 1.2), (COMPRESSED, None)])
def test_rows_of_different_things_are_not_taken_for_errors(text, most):
    """Where an operator selects data by its values, row by row of the two models are not the same."""
    errors = []
    for seed in range(3):
        model = model_of(text, seed)
        inputs = samples_of(model, 16)
        results = [made(model, inputs, error_propagation=on) for on in (False, True)]
        assert not any("make up for" in note for note in results[1].report["notes"])
        if most is not None:
            wanted = outputs(model, inputs)
            errors.append([np.square(outputs(each.model, inputs) - wanted).mean() for each in results])
    if most is not None:
        without, with_it = np.mean(errors, axis=0)
        assert with_it < most * without


def test_what_is_of_no_number_beside_the_layers_does_not_matter():
    model = model_of(LABELS)
    inputs = samples_of(model)
    first, second = (made(model, inputs, error_propagation=on) for on in (False, True))
    assert not any("make up for" in note for note in second.report["notes"])
    assert first.model.SerializeToString() != second.model.SerializeToString()


def test_nodes_out_of_order_are_told():
    model = model_of(DENSE)
    inputs = samples_of(model)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert any("not in their order" in note for note in made(model, inputs).report["notes"])


@pytest.mark.parametrize(
    ("node", "noisy"),
    [
        ("b = Relu(a)", False),
        ("b = Dropout(a)", False),
        ("r = Constant <value_float = 0.5> () b = Dropout(a, r)", False),
        ("r = Constant <value_float = 0.5> () t = Cast <to = 9> (r) b = Dropout(a, r, t)", True),
        ("b = RandomUniformLike(a)", True),
        ("b = Bernoulli(a)", True),
    ],
)
def test_noise_is_known(node, noisy):
    model = onnx.parser.parse_model(HEAD + f"g (float[4] a) => (float[4] y) {{ {node} y = Neg(b) }}")
    assert propagation.is_noisy(Model.load(model)) == noisy


def test_what_cannot_be_cut_is_left_with_a_note():
    model = model_of(SEQUENCE)
    inputs = samples_of(model)
    result = made(model, inputs, verify=True)
    assert any("do not make up for" in note and "no tensor of numbers" in note for note in result.report["notes"])
    assert result.report["verification"]["quantized"]["passed"]


@pytest.mark.parametrize(
    "options", [{"target": "ort"}, {"target": "ort", "fold": "always"}, {"target": "tensorrt"}, {"act_ratio": 0.2}]
)
@pytest.mark.parametrize("name", ["convolutions", "depthwise", "gemm"])
def test_it_composes_with_quantized_data_and_copies(name, options):
    model = model_of(NETWORKS[name])
    inputs = samples_of(model, 16)
    result = made(model, inputs, bits=4, ratio=0.2, verify=True, act_bits=8, **options)
    assert result.report["verification"]["quantized"]["passed"]
    assert not any("make up for" in note for note in result.report["notes"])


def test_two_runs_are_equal_and_one_layer_may_stay_float():
    model = model_of(NETWORKS["convolutions"])
    inputs = samples_of(model)
    name = made(model, inputs).report["layers"][1]["name"]
    for layer in ([], [f"{name}:bits=none"], [f"{name}:round=nearest"]):
        first, second = (made(model, inputs, layer=layer).model.SerializeToString() for _ in range(2))
        assert first == second


def piece(folder, samples, bodies, tensor="y", inputs=(), before=None, batches=0):
    """What a piece of the float model, and of the one that follows it, answers; what it leaves is in the folder."""
    folder.mkdir()
    paths = [str(folder / name) for name in ("exact.onnx", "follower.onnx")]
    for path, body in zip(paths, bodies, strict=True):
        onnx.save(onnx.parser.parse_model(HEAD + "g " + body), path)
    layer = Contraction(tensor, -1, 4, 1, onnx.TensorProto.FLOAT)
    before = None if before is None else str(before)
    request = propagation.Request(
        *paths, "model", list(inputs), [tensor], [vars(layer)], before, batches, str(folder), str(samples), None, 4
    )
    return propagation.observe(request, lambda stage: None)


@pytest.fixture
def samples(tmp_path, rng):
    np.save(tmp_path / "samples.npy", rng.standard_normal((12, 4)).astype(np.float32))
    return tmp_path / "samples.npy"


def test_samples_that_leave_too_much_are_left_out(tmp_path, monkeypatch, samples):
    monkeypatch.setattr(propagation, "ROOM", 4 * 4 * 4 + 1)
    answer = piece(tmp_path / "piece", samples, ["(float[N,4] x) => (float[N,4] y) { y = Relu(x) }"] * 2)
    assert answer == {"types": {"y": onnx.TensorProto.FLOAT}, "batches": 2}
    for place in range(2):
        with (tmp_path / "piece" / f"left.{place}").open("rb") as file:
            assert [part.shape for part in load_arrays(file, 2)] == [(4, 4), (4, 4)]
            assert not file.read()
    assert not Drift.load(tmp_path / "piece" / "drift.0").lost.any()


def test_an_error_of_one_piece_arrives_behind_the_next_one(tmp_path, samples):
    first, second = tmp_path / "first", tmp_path / "second"
    text = "(float[N,4] x) => (float[N,4] y) <float[1] c = {{{}}}> {{ y = Mul(x, c) }}"
    batches = piece(first, samples, [text.format(1), text.format(1.25)])["batches"]
    after = ["(float[N,4] y) => (float[N,4] z) { z = Neg(y) }"] * 2
    assert piece(second, samples, after, "z", ["y"], first, batches)["batches"] == batches == 3
    np.testing.assert_allclose(Drift.load(second / "drift.0").lost[0], 0.25 * np.load(samples).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_data_of_another_shape_in_one_batch_has_no_drift(tmp_path, order, rng):
    """Two batches would be enough."""
    values = rng.random((12, 4)).astype(np.float32)
    values[8:] *= -1
    np.save(tmp_path / "samples.npy", values[order])
    body = """(float[N,4] x) => (float[M,4] y) <int64 first = {{0}}, float[1] least = {{{}}}> {{
        a = Gather <axis = 1> (x, first)
        b = Greater (a, least)
        y = Compress <axis = 0> (x, b)
    }}"""
    for follower, known in (("-3", True), ("0", False)):
        folder = tmp_path / follower
        piece(folder, tmp_path / "samples.npy", [body.format("-2"), body.format(follower)])
        assert (folder / "drift.0").exists() == known
