"""Which nodes are layers, where their weights are and along which axes the channels lie; what is declined, and why.

A graph input whose name begins with ``w`` becomes a constant of random values.
"""

import ml_dtypes
import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.parser
import onnxruntime as ort
import pytest

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Declined, Layer, find_layers
from onnx_ocs.graph.model import Model

TENSOR = onnx.TensorProto
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'

# text of the graph: channels of the data, input channels of the weight in one group, output channels, groups
ROWS = {
    "Conv 1-D": ("g (float[2,8,9] x, float[6,8,3] w) => (float y) { y = Conv(x, w) }", 8, 8, 6, 1),
    "Conv 2-D": ("g (float[2,8,5,5] x, float[6,8,3,3] w) => (float y) { y = Conv(x, w) }", 8, 8, 6, 1),
    "Conv 3-D": ("g (float[1,8,4,4,4] x, float[5,8,2,2,2] w) => (float y) { y = Conv(x, w) }", 8, 8, 5, 1),
    "Conv grouped": ("g (float[1,12,5,5] x, float[6,4,3,3] w) => (float y) { y = Conv <group=3> (x, w) }", 12, 4, 6, 3),
    "Conv depthwise": ("g (float[1,8,5,5] x, float[8,1,3,3] w) => (float y) { y = Conv <group=8> (x, w) }", 8, 1, 8, 8),
    "Conv depthwise, twice": (
        "g (float[1,4,5,5] x, float[8,1,3,3] w) => (float y) { y = Conv <group=4> (x, w) }", 4, 1, 8, 4),
    "ConvTranspose": ("g (float[1,8,5,5] x, float[8,6,3,3] w) => (float y) { y = ConvTranspose(x, w) }", 8, 8, 6, 1),
    "ConvTranspose 1-D": ("g (float[1,8,5] x, float[8,6,3] w) => (float y) { y = ConvTranspose(x, w) }", 8, 8, 6, 1),
    "Gemm": ("g (float[3,8] x, float[8,6] w) => (float y) { y = Gemm(x, w) }", 8, 8, 6, 1),
    "Gemm transA": ("g (float[8,3] x, float[8,6] w) => (float y) { y = Gemm <transA=1> (x, w) }", 8, 8, 6, 1),
    "Gemm transB": ("g (float[3,8] x, float[6,8] w) => (float y) { y = Gemm <transB=1> (x, w) }", 8, 8, 6, 1),
    "Gemm both": ("g (float[8,3] x, float[6,8] w) => (float y) { y = Gemm <transA=1, transB=1> (x, w) }", 8, 8, 6, 1),
    "Gemm left": ("g (float[8,3] x, float[6,8] w) => (float y) { y = Gemm(w, x) }", 8, 8, 6, 1),
    "Gemm left transA": ("g (float[8,3] x, float[8,6] w) => (float y) { y = Gemm <transA=1> (w, x) }", 8, 8, 6, 1),
    "Gemm left transB": ("g (float[3,8] x, float[6,8] w) => (float y) { y = Gemm <transB=1> (w, x) }", 8, 8, 6, 1),
    "Gemm left both": (
        "g (float[3,8] x, float[8,6] w) => (float y) { y = Gemm <transA=1, transB=1> (w, x) }", 8, 8, 6, 1),
    "MatMul": ("g (float[2,3,8] x, float[8,6] w) => (float y) { y = MatMul(x, w) }", 8, 8, 6, 1),
    "MatMul batched": ("g (float[2,3,8] x, float[2,8,6] w) => (float y) { y = MatMul(x, w) }", 8, 8, 6, 1),
    "MatMul left": ("g (float[2,8,3] x, float[6,8] w) => (float y) { y = MatMul(w, x) }", 8, 8, 6, 1),
    "MatMul left batched": ("g (float[2,8,3] x, float[2,6,8] w) => (float y) { y = MatMul(w, x) }", 8, 8, 6, 1),
    "MatMul vector": ("g (float[3,8] x, float[8] w) => (float y) { y = MatMul(x, w) }", 8, 8, None, 1),
    "MatMul vector left": ("g (float[8,3] x, float[8] w) => (float y) { y = MatMul(w, x) }", 8, 8, None, 1),
    "MatMul of a vector": ("g (float[8] x, float[8,6] w) => (float y) { y = MatMul(x, w) }", 8, 8, 6, 1),
    "MatMul left of a vector": ("g (float[8] x, float[6,8] w) => (float y) { y = MatMul(w, x) }", 8, 8, 6, 1),
    "MatMul of two vectors": ("g (float[8] x, float[8] w) => (float y) { y = MatMul(x, w) }", 8, 8, None, 1),
}  # fmt: skip

CONSTANTS = {
    "Constant node": """(float[3,8] x) => (float y) {
        w = Constant <value = float[8,2] {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}> ()
        y = MatMul(x, w) }""",
    "Identity": "(float[3,8] x, float[8,6] w) => (float y) { i = Identity(w) y = MatMul(x, i) }",
    "Transpose": "(float[3,8] x, float[6,8] w) => (float y) { i = Transpose(w) y = MatMul(x, i) }",
    "Transpose of three": """(float[3,8] x, float[6,5,8] w) => (float y) {
        i = Transpose <perm = [1, 2, 0]> (w) y = MatMul(x, i) }""",
    "Reshape": """(float[3,8] x, float[2,4,6] w) => (float y) {
        s = Constant <value_ints = [8, -1]> () i = Reshape(w, s) y = MatMul(x, i) }""",
    "Reshape that copies": """(float[3,8] x, float[8,2,3] w) => (float y) {
        s = Constant <value_ints = [0, 6]> () i = Reshape(w, s) y = MatMul(x, i) }""",
    "Reshape to an initializer": """(float[3,8] x, float[2,4,6] w) => (float y) <int64[2] s = {8, 6}> {
        i = Reshape(w, s) y = MatMul(x, i) }""",
    "Cast": "(float[3,8] x, float16[8,6] w) => (float y) { i = Cast <to = 1> (w) y = MatMul(x, i) }",
    "all of them": """(double[3,8] x, float[2,3,8] w) => (double y) {
        s = Constant <value_ints = [6, 8]> () i = Identity(w) r = Reshape(i, s) t = Transpose(r)
        c = Cast <to = 11> (t) y = MatMul(x, c) }""",
}  # fmt: skip


def with_weights(text, outer=HEAD):
    """The model of a graph's text; the inputs that begin with ``w`` are constants."""
    model = onnx.parser.parse_model(f"{outer} {text if text.startswith('g ') else 'g ' + text}")
    rng = np.random.default_rng(0)
    for value in [value for value in model.graph.input if value.name.startswith("w")]:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        values = (rng.standard_normal([dim.dim_value for dim in kind.shape.dim]) * 4).astype(dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, value.name))
        model.graph.input.remove(value)
    return model


def found(model):
    editor = Editor(Model.load(model))
    return editor, find_layers(editor)


def layer_of(model):
    editor, layers = found(model)
    (layer,) = layers
    assert isinstance(layer, Layer), layer.reason
    return editor, layer


def reason(text, outer=HEAD):
    model = text if isinstance(text, onnx.ModelProto) else with_weights(text, outer)
    _, layers = found(model)
    (layer,) = layers
    assert isinstance(layer, Declined)
    return layer.reason


def run(model, feed):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


@pytest.mark.parametrize("row", ROWS)
def test_the_axes_hold_as_many_channels_as_the_operator_says(row):
    text, channels, inputs, outputs, groups = ROWS[row]
    model = with_weights(text)
    editor, layer = layer_of(model)
    shape = layer.weight.read(editor.model).shape
    data = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert layer.data_axis < 0
    assert data[layer.data_axis] == channels
    assert shape[layer.input_axis] == inputs
    assert layer.output_axis is None if outputs is None else shape[layer.output_axis] == outputs
    assert (layer.groups, layer.groups_on_input) == (groups, False)
    assert layer.data.name == "x"
    assert layer.node.inputs[layer.weight_input].name == "w"


GROUPED = {
    "ConvTranspose grouped": (
        "g (float[1,12,5,5] x, float[12,3,3,3] w) => (float y) { y = ConvTranspose<group=2>(x, w) }", 12, 12, 3),
    "ConvTranspose in pairs": (
        "g (float[1,8,5,5] x, float[8,1,3,3] w) => (float y) { y = ConvTranspose<group=4>(x, w) }", 8, 8, 1),
}  # fmt: skip


@pytest.mark.parametrize("row", GROUPED)
def test_groups_of_a_transposed_convolution_lie_along_its_input_axis(row):
    text, channels, inputs, outputs = GROUPED[row]
    _, layer = layer_of(with_weights(text))
    assert layer.groups_on_input
    assert layer.weight.shape[layer.input_axis] == inputs == channels
    assert layer.weight.shape[layer.output_axis] == outputs


def test_a_depthwise_transposed_convolution_is_as_a_convolution():
    _, layer = layer_of(
        with_weights("g (float[1,8,5,5] x, float[8,1,3,3] w) => (float y) { y = ConvTranspose<group=8>(x, w) }")
    )
    assert (layer.groups, layer.groups_on_input, layer.input_axis, layer.output_axis) == (8, False, 1, 0)


def group_of(layer, channel, channels):
    """Entries of the weight that meet this channel of the data: index along the input axis, outputs."""
    size = channels // layer.groups
    group, within = divmod(channel, size)
    if layer.groups_on_input:
        return channel, slice(None)
    held = 1 if layer.output_axis is None else layer.weight.shape[layer.output_axis] // layer.groups
    return within, slice(group * held, (group + 1) * held) if layer.groups > 1 else slice(None)


@pytest.mark.parametrize("row", [*ROWS, *GROUPED])
def test_a_channel_of_the_data_meets_just_the_weights_along_the_axes(row):
    """With one channel of the weight at zero, that channel of the data makes no difference; any other does."""
    model = with_weights({**ROWS, **GROUPED}[row][0])
    editor, layer = layer_of(model)
    rng = np.random.default_rng(1)
    x = rng.standard_normal([dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim])
    x = x.astype(np.float32)
    channels = x.shape[layer.data_axis]
    for channel in (0, channels - 1):
        weight = layer.weight.read(editor.model).copy()
        index = [slice(None)] * weight.ndim
        along, outputs = group_of(layer, channel, channels)
        if layer.output_axis is not None:
            index[layer.output_axis] = outputs
        index[layer.input_axis] = along
        assert weight[tuple(index)].any()
        weight[tuple(index)] = 0
        emptied = onnx.ModelProto()
        emptied.CopyFrom(model)
        emptied.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
        before = run(emptied, {"x": x})
        for other in range(channels):
            changed = x.copy()
            position = [slice(None)] * x.ndim
            position[layer.data_axis] = other
            changed[tuple(position)] += 1
            assert np.array_equal(run(emptied, {"x": changed}), before) == (other == channel)


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_weight_is_read_as_the_layer_reads_it(name):
    model = with_weights(CONSTANTS[name])
    editor, layer = layer_of(model)
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    read_by = next(node for node in model.graph.node if node.op_type == "MatMul").input[1]
    seen.graph.output.add(name=read_by)
    (_, wanted) = ort.InferenceSession(seen.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": np.zeros((3, 8), np.float64 if name == "all of them" else np.float32)}
    )
    values = layer.weight.read(editor.model)
    assert values.dtype == wanted.dtype
    assert layer.weight.shape == wanted.shape
    assert layer.weight.shape[layer.input_axis] == 8
    np.testing.assert_array_equal(values, wanted)


def test_a_weight_that_nothing_changes_is_not_copied():
    editor, layer = layer_of(
        with_weights("(float[3,80] x, float[60,80] w) => (float y) { i = Transpose(w) y = MatMul(x, i) }")
    )
    assert not layer.weight.read(editor.model).flags.owndata


def test_a_weight_before_its_cast_is_in_the_type_it_is_kept_in():
    editor, layer = layer_of(with_weights(CONSTANTS["Cast"]))
    assert layer.weight.read(editor.model, cast=False).dtype == np.float16
    assert layer.weight.read(editor.model).dtype == np.float32
    assert layer.weight.data_type == TENSOR.FLOAT


@pytest.mark.parametrize("kind", ["float", "float16", "bfloat16", "double"])
def test_weights_of_all_floating_types_are_read(kind):
    model = with_weights(f"g ({kind}[3,8] x, {kind}[8,600] w) => ({kind} y) {{ y = MatMul(x, w) }}")
    editor, layer = layer_of(model)
    dtype = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "double": np.float64}[kind]
    values = layer.weight.read(editor.model)
    assert values.dtype == dtype
    assert onnx.helper.np_dtype_to_tensor_dtype(values.dtype) == layer.weight.data_type
    np.testing.assert_array_equal(values, onnx.numpy_helper.to_array(model.graph.initializer[0]))


def test_two_layers_of_one_weight_have_one_key():
    _, (first, second, third) = found(
        with_weights("""(float[3,6] x, float[6,6] w) => (float y, float z, float u) {
            [a] y = MatMul(x, w) [b] z = Gemm(x, w) t = Transpose(w) [c] u = MatMul(x, t) }""")
    )
    assert first.weight.key == second.weight.key
    assert first.weight.key != third.weight.key
    assert [layer.name for layer in (first, second, third)] == ["a", "b", "c"]


def test_a_layer_without_a_name_is_called_by_its_output():
    _, layer = layer_of(with_weights("(float[3,6] x, float[6,6] w) => (float y) { y = MatMul(x, w) }"))
    assert layer.name == "y"


BODY = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
g (float[2,3] x, bool c) => (float[2,3] y) <float[3,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}> {
  [choice] z = If (c) <
    then_branch = yes () => (float[2,3] p) { [outer] p = MatMul(x, w) },
    else_branch = no () => (float[2,3] q) <float[3,3] k = {1, 2, 3, 4, 5, 6, 7, 8, 9}> { [own] q = MatMul(x, k) }>
  n = Constant <value = int64 {2}> ()
  [loop] y = Loop (n, c, z) <body = around (int64 i, bool go, float[2,3] s) => (bool go2, float[2,3] s2) {
    go2 = Identity(go)
    [turn] t = MatMul(s, w)
    [used] s2 = local.f(t) }>
}
<domain: "local", opset_import: ["" : 21]>
f (a) => (b) {
  k = Constant <value = float[3,3] {1, 2, 3, 4, 5, 6, 7, 8, 9}> ()
  [within] b = MatMul(a, k) }"""


def test_layers_in_bodies_and_functions_are_found_with_the_home_of_their_weight():
    model = onnx.parser.parse_model(BODY)
    onnx.checker.check_model(model)
    editor, layers = found(model)
    assert {layer.name: (layer.scope.path, layer.weight.home.path) for layer in layers} == {
        "choice/then_branch/outer": ("choice/then_branch/", ""),
        "choice/else_branch/own": ("choice/else_branch/", "choice/else_branch/"),
        "loop/body/turn": ("loop/body/", ""),
        "local::f/within": ("local::f/", "local::f/"),
    }
    for layer in layers:
        np.testing.assert_array_equal(layer.weight.read(editor.model), np.arange(1, 10).reshape(3, 3))


DECLINED = {
    "computed": ("(float[3,8] x, float[8,6] w) => (float y) { v = Neg(w) y = Conv(x, v) }", "run time"),
    "computed, MatMul": ("(float[3,8] x, float[8,6] w) => (float y) { v = Neg(w) y = MatMul(x, v) }", "run time"),
    "two values": ("(float[3,8] x, float[8,6] v) => (float y) { y = MatMul(x, v) }", "run time"),
    "two values, Gemm": ("(float[3,8] x, float[8,6] v) => (float y) { y = Gemm(x, v) }", "run time"),
    "graph input": ("(float[2,8,9] x, float[6,8,3] v) => (float y) { y = Conv(x, v) }", "input of the graph"),
    "DequantizeLinear": (
        """(float[2,8,9] x, float[6,8,3] w, float ws) => (float y) { q = QuantizeLinear(w, ws)
        d = DequantizeLinear(q, ws) y = Conv(x, d) }""",
        "already quantized",
    ),
    "DequantizeLinear, MatMul": (
        """(float[2,8] x, int8[8,6] w, float ws) => (float y) { d = DequantizeLinear(w, ws) y = MatMul(x, d) }""",
        "already quantized",
    ),
    "DequantizeLinear, transposed": (
        """(float[2,8] x, int8[6,8] w, float ws) => (float y) { d = DequantizeLinear(w, ws) t = Transpose(d)
        y = MatMul(x, t) }""",
        "already quantized",
    ),
    "MatMulInteger": ("(int8[2,8] x, int8[8,6] w) => (int32 y) { y = MatMulInteger(x, w) }", "already quantized"),
    "LSTM": (
        "(float[1,2,8] x, float[1,16,8] w, float[1,16,4] wr) => (float y) { y = LSTM<hidden_size=4>(x, w, wr) }",
        "recurrent",
    ),
    "GRU": (
        "(float[1,2,8] x, float[1,12,8] w, float[1,12,4] wr) => (float y) { y = GRU<hidden_size=4>(x, w, wr) }",
        "recurrent",
    ),
    "two constants": ("(float[3,8] w, float[8,6] w2) => (float y) { y = MatMul(w, w2) }", "constants"),
    "two constants, Gemm": ("(float[3,8] w, float[8,6] w2) => (float y) { y = Gemm(w, w2) }", "constants"),
    "two constants, Conv": ("(float[2,8,9] w, float[6,8,3] w2) => (float y) { y = Conv(w, w2) }", "constants"),
    "integers": ("(int32[2,8,9] x, int32[6,8,3] w) => (int32 y) { y = Conv(x, w) }", "type INT32"),
    "integers cast": (
        "(float[2,8,9] x, int8[6,8,3] w) => (float y) { i = Cast <to = 1> (w) y = Conv(x, i) }",
        "type INT8",
    ),
    "shape at run time": (
        "(float[3,8] x, float[2,4,6] w, int64[2] s) => (float y) { i = Reshape(w, s) y = Gemm(x, i) }",
        "run time",
    ),
    "empty": ("(float[3,0] x, float[0,6] w) => (float y) { y = MatMul(x, w) }", "empty"),
    "too few dimensions": ("(float[2,8] x, float[8,8] w) => (float y) { y = Conv(x, w) }", "dimensions"),
    "a scalar": ("(float[2,8] x, float w) => (float y) { y = MatMul(x, w) }", "dimensions"),
    "groups that do not divide": (
        "(float[2,8,9] x, float[5,4,3] w) => (float y) { y = Conv <group=2> (x, w) }",
        "5 channels do not make 2 groups",
    ),
    "no group": ("(float[2,8,9] x, float[5,8,3] w) => (float y) { y = Conv <group=0> (x, w) }", "groups"),
    "a reshape that does not fit": (
        "(float[3,8] x, float[2,4,6] w) => (float y) <int64[2] s = {7, 7}> { i = Reshape(w, s) y = MatMul(x, i) }",
        "cannot be read",
    ),
    "rank not known": ("(float x, float[6,8] w) => (float y) { s = Unknown(x) y = MatMul(w, s) }", "rank"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_no_plain_layer_is_declined_with_the_reason(name):
    text, why = DECLINED[name]
    assert why in reason(text)


@pytest.mark.parametrize("op", ["QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulNBits", "RNN"])
def test_operators_of_weights_that_are_not_covered_are_declined(op):
    assert reason(f"(float[3,8] x, float[8,6] w) => (float y) {{ y = {op}(x, w) }}")


@pytest.mark.parametrize("op", ["FusedConv", "FusedMatMul", "Gemm", "MultiHeadAttention"])
def test_operators_of_other_domains_are_declined_by_name(op):
    outer = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
    why = reason(f"(float[3,8] x, float[8,6] w) => (float y) {{ y = com.microsoft.{op}(x, w) }}", outer)
    assert f"com.microsoft::{op}" in why


def test_a_matrix_of_the_user_domain_with_the_name_of_an_operator_is_no_layer():
    outer = '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>'
    assert found(with_weights("(float[3,8] x, float[8,6] w) => (float y) { y = mine.Mix(x, w) }", outer))[1] == []


def test_nodes_without_weights_are_no_layers():
    assert found(with_weights("(float[3,8] x, float[8] w) => (float y) { a = Add(x, w) y = Relu(a) }"))[1] == []


def test_a_weight_of_a_function_is_declined_where_the_caller_gives_it():
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
    g (float[2,3,9] x) => (float y) <float[3,3,1] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}> { y = local.f<groups = 1>(x, w) }
    <domain: "local", opset_import: ["" : 21]>
    f (a, b) => (c) { c = Conv(a, b) }""")
    assert "input of the function" in reason(model)


def test_an_attribute_that_the_caller_sets_is_declined():
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
    g (float[2,3,9] x) => (float y) { y = local.f<groups = 1>(x) }
    <domain: "local", opset_import: ["" : 21]>
    f <groups> (a) => (c) {
      k = Constant <value = float[3,3,1] {1, 2, 3, 4, 5, 6, 7, 8, 9}> ()
      c = Conv <group: int = @groups> (a, k) }""")
    assert "caller" in reason(model)


def test_a_constant_of_a_body_that_hides_an_outer_one_is_declined():
    model = onnx.parser.parse_model(BODY.replace("float[3,3] k = {1", "float[3,3] w = {1").replace("(x, k)", "(x, w)"))
    _, layers = found(model)
    reasons = {layer.name: layer.reason for layer in layers if isinstance(layer, Declined)}
    assert list(reasons) == ["choice/else_branch/own"]
    assert "reuses the name" in reasons["choice/else_branch/own"]


def test_an_old_models_weight_listed_as_input_is_a_weight():
    model = onnx.parser.parse_model("""<ir_version: 3, opset_import: ["" : 9]>
    g (float[2,3] x, float[3,3] w) => (float[2,3] y) <float[3,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}> {
      y = MatMul(x, w) }""")
    editor, layer = layer_of(model)
    np.testing.assert_array_equal(layer.weight.read(editor.model), np.arange(1, 10).reshape(3, 3))
