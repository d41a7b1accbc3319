"""Ranges evened out across layers: the same function, and less noise where a weight has one scale."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_ocs import quantize
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import find_layers
from onnx_ocs.graph.model import Model
from onnx_ocs.numerics.equalize import MOST, equalizing
from onnx_ocs.passes.equalize_layers import EqualizeLayers

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'

CHAINS = {
    "Conv, Relu, Conv": """g (float[2,4,6,6] x, float[8,4,3,3] w, float[8] wb, float[5,8,3,3] v) => (float[2,5,A,B] y) {
        a = Conv(x, w, wb)
        r = Relu(a)
        y = Conv(r, v) }""",
    "pooling, and two readers": """g (float[2,4,6,6] x, float[8,4,1,1] w, float[8] wb, float[5,8,1,1] v,
            float[3,8,3,3] u) => (float[2,5,A,B] y, float[2,3,C,D] z) {
        a = Conv(x, w, wb)
        r = LeakyRelu(a)
        p = MaxPool <kernel_shape=[2,2]> (r)
        y = Conv(p, v)
        z = Conv(r, u) }""",
    "a depthwise layer between": """g (float[2,4,6,6] x, float[8,4,1,1] w, float[8] wb, float[8,1,3,3] d, float[8] db,
            float[5,8,1,1] v) => (float[2,5,A,B] y) {
        a = Conv(x, w, wb)
        r = Relu(a)
        b = Conv <group=8> (r, d, db)
        s = Relu(b)
        y = Conv(s, v) }""",
    "two makers that meet": """g (float[2,4,6,6] x, float[8,4,1,1] w, float[8,4,1,1] v, float[8] vb, float[5,8,1,1] u)
            => (float[2,5,A,B] y) {
        a = Conv(x, w)
        b = Conv(x, v, vb)
        c = Add(a, b)
        r = Relu(c)
        y = Conv(r, u) }""",
    "Concat, then dense": """g (float[3,6] x, float[6,8] w, float[8] wb, float[4,6] v, float[5,12] u)
            => (float[3,5] y) {
        a = Gemm(x, w, wb)
        b = Gemm <transB=1> (x, v)
        c = Concat <axis=1> (a, b)
        r = Relu(c)
        y = Gemm <transB=1> (r, u) }""",
}

KEPT = {
    "what does not scale": """g (float[2,4,6,6] x, float[8,4,1,1] w, float[5,8,1,1] v) => (float[2,5,A,B] y) {
        a = Conv(x, w)
        r = Sigmoid(a)
        y = Conv(r, v) }""",
    "an output of the graph": """g (float[2,4,6,6] x, float[8,4,1,1] w, float[5,8,1,1] v)
            => (float[2,5,A,B] y, float[2,8,A,B] r) {
        a = Conv(x, w)
        r = Relu(a)
        y = Conv(r, v) }""",
}


def made(text, rng):
    model = onnx.parser.parse_model(f"{HEAD} {text}")
    for value in list(model.graph.input)[1:]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values *= 4.0 ** rng.standard_normal((shape[0], *[1] * (len(shape) - 1)))
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), value.name))
        model.graph.input.remove(value)
    return model


def run(model):
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})


@pytest.mark.parametrize("name", CHAINS)
def test_the_function_stays_and_the_ranges_are_even(name, rng):
    source = made(CHAINS[name], rng)
    model = Model.load(source)
    editor = Editor(model)
    changed = EqualizeLayers().apply(editor, find_layers(editor))
    assert changed
    editor.commit()
    for before, after in zip(run(source), run(model.whole()), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    editor = Editor(model)
    assert not EqualizeLayers().apply(editor, find_layers(editor))  # nothing is left to even out


@pytest.mark.parametrize("name", KEPT)
def test_what_no_factor_passes_is_left_alone(name, rng):
    editor = Editor(Model.load(made(KEPT[name], rng)))
    assert not EqualizeLayers().apply(editor, find_layers(editor))


@pytest.mark.parametrize("name", CHAINS)
def test_weights_with_one_scale_lose_less(name):
    options = {"bits": 8, "ratio": 0, "per_channel": False, "round": "nearest", "first": "same", "verify": False}
    noise = {False: 0.0, True: 0.0}
    for seed in range(6):
        source = made(CHAINS[name], np.random.default_rng(seed))
        wanted = run(source)
        for equalize in noise:
            found = run(quantize(source, equalize=equalize, **options).model)
            pairs = zip(found, wanted, strict=True)
            noise[equalize] += float(sum(np.square(a - b).sum() / np.square(b).sum() for a, b in pairs))
    assert noise[True] < 0.9 * noise[False]


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=6))
def test_factors_are_powers_of_two_that_bring_ranges_together(pairs):
    ranges, read = np.array(pairs).T
    factors = equalizing(ranges, read)
    np.testing.assert_array_equal(np.exp2(np.round(np.log2(factors))), factors)
    assert ((factors >= 1 / MOST) & (factors <= MOST)).all()
    known = (ranges > 0) & (read > 0)
    assert (factors[~known] == 1).all()
    inner = known & (factors > 1 / MOST) & (factors < MOST)
    after = (ranges[inner] / factors[inner]) / (read[inner] * factors[inner])
    assert ((after >= 0.49) & (after <= 2.01)).all()
