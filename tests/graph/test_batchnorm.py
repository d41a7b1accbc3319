"""Which BatchNormalization nodes are folded, and that the function stays."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from operators import HEAD, with_weights

from onnx_ocs import quantize
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.model import Model
from onnx_ocs.passes.fold_batch_normalization import FoldBatchNormalization

BN = "BatchNormalization <epsilon=0.01>"
PARAMETERS = "float[6] ws, float[6] wt, float[6] wm, float[6] wv"

FOLDED = {
    "Conv": f"""g (float[2,8,5,5] x, float[6,8,3,3] w, {PARAMETERS}) => (float[2,6,A,B] y) {{
        a = Conv(x, w)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "Conv with bias": f"""g (float[2,8,5,5] x, float[6,8,3,3] w, float[6] wb, {PARAMETERS}) => (float[2,6,A,B] y) {{
        a = Conv(x, w, wb)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "Conv grouped": f"""g (float[2,8,5,5] x, float[6,4,3,3] w, {PARAMETERS}) => (float[2,6,A,B] y) {{
        a = Conv<group=2>(x, w)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "Conv depthwise": f"""g (float[2,6,5,5] x, float[6,1,3,3] w, {PARAMETERS}) => (float[2,6,A,B] y) {{
        a = Conv<group=6>(x, w)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "ConvTranspose": f"""g (float[2,8,5,5] x, float[8,6,3,3] w, {PARAMETERS}) => (float[2,6,A,B] y) {{
        a = ConvTranspose(x, w)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "ConvTranspose grouped": f"""g (float[2,8,5,5] x, float[8,3,3,3] w, {PARAMETERS}) => (float[2,6,A,B] y) {{
        a = ConvTranspose<group=2>(x, w)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "Gemm": f"""g (float[3,8] x, float[6,8] w, float[6] wb, {PARAMETERS}) => (float[3,6] y) {{
        a = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, wb)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "Gemm without bias": f"""g (float[3,8] x, float[8,6] w, {PARAMETERS}) => (float[3,6] y) {{
        a = Gemm(x, w)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "MatMul": f"""g (float[3,8] x, float[8,6] w, {PARAMETERS}) => (float[3,6] y) {{
        a = MatMul(x, w)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "MatMul and Add": f"""g (float[3,8] x, float[8,6] w, float[6] wb, {PARAMETERS}) => (float[3,6] y) {{
        a = MatMul(x, w)
        b = Add(wb, a)
        y = {BN}(b, ws, wt, wm, wv) }}""",
    "twice": f"""g (float[2,8,5,5] x, float[6,8,3,3] w, {PARAMETERS}) => (float[2,6,A,B] y) {{
        a = Conv(x, w)
        b = {BN}(a, ws, wt, wm, wv)
        y = {BN}(b, wt, ws, wm, wv) }}""",
    "one weight of two": f"""g (float[2,8,5,5] x, float[6,8,3,3] w, {PARAMETERS})
        => (float[2,6,A,B] y, float[2,6,A,B] z) {{
        a = Conv(x, w)
        y = {BN}(a, ws, wt, wm, wv)
        b = Conv(x, w)
        z = {BN}(b, wt, ws, wm, wv) }}""",
    "read by others": f"""g (float[2,8,5,5] x, float[6,8,3,3] w, {PARAMETERS})
        => (float[2,6,A,B] y, float[2,6,A,B] z) {{
        a = Conv(x, w)
        b = {BN}(a, ws, wt, wm, wv)
        y = Relu(b)
        z = Neg(b) }}""",
}

KEPT = {
    "no layer before it": f"""g (float[2,6,5,5] x, {PARAMETERS}) => (float[2,6,A,B] y) {{
        y = {BN}(x, ws, wt, wm, wv) }}""",
    "its input is read by another": f"""g (float[2,8,5,5] x, float[6,8,3,3] w, {PARAMETERS})
        => (float[2,6,A,B] y, float[2,6,A,B] z) {{
        a = Conv(x, w)
        y = {BN}(a, ws, wt, wm, wv)
        z = Neg(a) }}""",
    "its input is an output": f"""g (float[2,8,5,5] x, float[6,8,3,3] w, {PARAMETERS})
        => (float[2,6,A,B] y, float[2,6,A,B] a) {{
        a = Conv(x, w)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "a parameter is an input": """g (float[2,8,5,5] x, float[6,8,3,3] w, float[6] s,
        float[6] wt, float[6] wm, float[6] wv)
        => (float[2,6,A,B] y) {
        a = Conv(x, w)
        y = BatchNormalization(a, s, wt, wm, wv) }""",
    "its channels are rows": f"""g (float[8,6] x, float[4,8] w, {PARAMETERS}) => (float[4,6] y) {{
        a = Gemm(w, x)
        y = {BN}(a, ws, wt, wm, wv) }}""",
    "three dimensions": """g (float[2,6,8] x, float[8,5] w, float[6] ws, float[6] wt, float[6] wm, float[6] wv)
        => (float[2,6,5] y) {
        a = MatMul(x, w)
        y = BatchNormalization(a, ws, wt, wm, wv) }""",
}


def model_of(text):
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))
    for tensor in model.graph.initializer:
        if tensor.name == "wv":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.abs(onnx.numpy_helper.to_array(tensor)) + 0.1, "wv"))
    return model


def run(model, seed=1):
    rng = np.random.default_rng(seed)
    inputs = {
        value.name: rng.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype(np.float32)
        for value in model.graph.input
    }
    return ort.InferenceSession(model.SerializeToString()).run(None, inputs)


def folded(model):
    held = Model.load(model)
    number = 0
    while here := FoldBatchNormalization().apply(editor := Editor(held)):
        editor.commit()
        number += here
    return held.whole(), number


@pytest.mark.parametrize("text", FOLDED.values(), ids=FOLDED)
def test_it_is_folded_into_the_layer_before_it(text):
    model = model_of(text)
    after, number = folded(model)
    assert number == text.count("BatchNormalization")
    assert "BatchNormalization" not in {node.op_type for node in after.graph.node}
    onnx.checker.check_model(after, full_check=True)
    for wanted, found in zip(run(model), run(after), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())
    assert not {"ws", "wm", "wv"} & {tensor.name for tensor in after.graph.initializer}


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT)
def test_it_stays_where_folding_would_change_the_function(text):
    model = model_of(text)
    after, number = folded(model)
    assert number == 0
    assert after == model


def test_scales_are_those_of_the_folded_weights_unless_it_is_not_wanted():
    model = model_of(FOLDED["Conv"])
    plain = {"ratio": 0, "first": "same", "round": "nearest"}
    result = quantize(model, **plain)
    weight, scale, variance = (
        next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)
        for name in ("w", "ws", "wv")
    )
    factor = scale / np.sqrt(variance + 0.01)
    (row,) = result.report["layers"]
    np.testing.assert_allclose(row["threshold"], np.abs(weight).max(axis=(1, 2, 3)) * np.abs(factor), rtol=1e-5)
    assert any("1 BatchNormalization node was folded" in note for note in result.report["notes"])
    kept = quantize(model, **plain, no_fold_bn=True)
    np.testing.assert_allclose(kept.report["layers"][0]["threshold"], np.abs(weight).max(axis=(1, 2, 3)), rtol=1e-5)


def test_a_zero_factor_gives_zero_weights_with_a_positive_scale():
    model = model_of(FOLDED["Conv"])
    for tensor in model.graph.initializer:
        if tensor.name == "ws":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 1, 1, 1, 1, 1], np.float32), "ws"))
    result = quantize(model, ratio=0.2, first="same")
    assert result.report["verification"]["quantized"]["sqnr_db"] > 30


def test_what_float16_cannot_hold_stays_unfolded():
    text = FOLDED["Conv"].replace("float[", "float16[")
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))
    large = {"ws": 60000.0, "wv": 0.0001}
    for tensor in model.graph.initializer:
        if tensor.name in large:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(6, large[tensor.name], np.float16), tensor.name))
    assert folded(model)[1] == 0
