"""A raised opset computes the same and loses nothing, or is refused and changes nothing."""

import numpy as np
import onnx
import onnx.checker
import onnx.parser
import onnxruntime as ort
import pytest

from onnx_ocs.graph.model import Model
from onnx_ocs.graph.opset import CannotRaise, raise_opset

HEAD = '<ir_version: {ir}, opset_import: ["" : {opset}]>'

ROWS = {
    "Softmax": "g (float[2,3,4] x) => (float[2,3,4] y) { [n] y = Softmax(x) }",
    "Softmax of an axis": "g (float[2,3,4] x) => (float[2,3,4] y) { [n] y = Softmax <axis = 2> (x) }",
    "LogSoftmax": "g (float[2,3,4] x) => (float[2,3,4] y) { [n] y = LogSoftmax <axis = 1> (x) }",
    "Squeeze": "g (float[2,1,4] x) => (float[2,4] y) { [n] y = Squeeze <axes = [1]> (x) }",
    "Unsqueeze": "g (float[2,3] x) => (float[1,2,1,3] y) { [n] y = Unsqueeze <axes = [0, 2]> (x) }",
    "two of one kind": """g (float[2,1,3] x) => (float[2,3,1] y) {
        [n] s = Squeeze <axes = [1]> (x) [m] y = Unsqueeze <axes = [2]> (s) }""",
    "BatchNormalization": """g (float[2,3,4] x) => (float[2,3,4] y)
        <float[3] a = {1, 2, 3}, float[3] b = {0, 1, 2}, float[3] c = {1, 1, 2}, float[3] d = {1, 2, 4}> {
        [n] y = BatchNormalization(x, a, b, c, d) }""",
    "Dropout": "g (float[2,3] x) => (float[2,3] y) { [n] d = Dropout <ratio = 0.5> (x) y = Relu(d) }",
    "ReduceSum": "g (float[2,3,4] x) => (float[2,4] y) { [n] y = ReduceSum <axes = [1], keepdims = 0> (x) }",
    "MatMul": """g (float[2,3] x) => (float[2,2] y) <float[3,2] w = {1, 2, 3, 4, 5, 6}> {
        [n] t = MatMul(x, w) [m] y = Relu(t) }""",
    "Conv": "g (float[1,1,4] x) => (float[1,1,3] y) <float[1,1,2] w = {1, -1}> { [n] y = Conv(x, w) }",
}


def model_of(row, opset=9, ir=4):
    model = onnx.parser.parse_model(f"{HEAD.format(ir=ir, opset=opset)} {ROWS[row]}")
    model.doc_string, model.graph.doc_string = "the model", "the graph"
    model.metadata_props.add(key="author", value="me")
    model.graph.metadata_props.add(key="of", value="graph")
    for node in model.graph.node:
        node.doc_string = f"about {node.output[0]}"
        node.metadata_props.add(key="of", value=node.output[0])
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = f"value {value.name}"
    if ir < 4:
        for tensor in model.graph.initializer:
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return model


def raised(source, target):
    model = Model.load(source)
    raise_opset(model, target)
    made = model.whole()
    onnx.checker.check_model(made, full_check=True)
    return made


def run(model, x):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def sample(model, rng):
    return rng.standard_normal([dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim], np.float32)


@pytest.mark.parametrize("target", [13, 21])
@pytest.mark.parametrize("opset", [9, 11])
@pytest.mark.parametrize("row", ROWS)
def test_raising_keeps_the_outputs(row, opset, target, rng):
    source = model_of(row, opset)
    after = raised(source, target)
    assert [item.version for item in after.opset_import] == [target]
    x = sample(source, rng)
    for wanted, found in zip(run(source, x), run(after, x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_raising_keeps_what_is_told_of_models_and_values(row):
    source = model_of(row)
    after = raised(source, 13)
    assert (after.doc_string, after.graph.doc_string) == ("the model", "the graph")
    assert after.metadata_props == source.metadata_props
    assert after.graph.metadata_props == source.graph.metadata_props
    assert after.graph.input == source.graph.input
    assert after.graph.output == source.graph.output
    assert [t for t in after.graph.initializer if t in source.graph.initializer] == list(source.graph.initializer)


@pytest.mark.parametrize("row", [row for row in ROWS if "Softmax" not in row])
def test_raising_keeps_names_and_what_is_told_of_nodes(row):
    source = model_of(row)
    after = {node.output[0]: node for node in raised(source, 13).graph.node}
    for node in source.graph.node:
        made = after[node.output[0]]
        assert (made.name, made.doc_string) == (node.name, node.doc_string)
        assert made.metadata_props == node.metadata_props


@pytest.mark.parametrize("target", [13, 21])
@pytest.mark.parametrize("row", ["MatMul", "Conv"])
def test_nodes_that_mean_the_same_keep_their_bytes(row, target):
    source = model_of(row)
    after = raised(source, target)
    assert after.graph == source.graph


@pytest.mark.parametrize("target", [13, 21])
@pytest.mark.parametrize("row", ROWS)
def test_names_of_nodes_and_values_stay_unique(row, target):
    after = raised(model_of(row), target)
    names = [node.name for node in after.graph.node if node.name]
    made = [out for node in after.graph.node for out in node.output] + [t.name for t in after.graph.initializer]
    assert len(set(names)) == len(names)
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("row", ["BatchNormalization", "MatMul", "Squeeze"])
def test_constants_of_an_old_model_leave_its_inputs(row, rng):
    source = model_of(row, ir=3)
    after = raised(source, 13)
    assert after.ir_version >= 4
    assert [value.name for value in after.graph.input] == ["x"]
    x = sample(source, rng)
    np.testing.assert_allclose(run(after, x)[0], run(source, x)[0], rtol=0, atol=1e-6)


def test_the_given_proto_is_not_modified():
    source = model_of("Squeeze")
    before = source.SerializeToString(deterministic=True)
    raised(source, 21)
    assert source.SerializeToString(deterministic=True) == before


def test_large_weights_are_kept_without_being_read(rng):
    source = model_of("MatMul")
    values = rng.standard_normal((3, 2000)).astype(np.float32)
    source.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    source.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2000
    assert raised(source, 21).graph == source.graph


def test_other_domains_and_functions_keep_their_versions():
    source = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 11, "local" : 4]>
    g (float[2,1,3] x) => (float[2,3] y) { s = Squeeze <axes = [1]> (x) y = local.f(s) }
    <domain: "local", opset_import: ["" : 11]>
    f (a) => (b) { b = Relu(a) }""")
    model = Model.load(source)
    raise_opset(model, 13)
    made = model.whole()
    assert {item.domain: item.version for item in made.opset_import} == {"": 13, "local": 4}
    assert made.functions == source.functions


REFUSED = {
    "an unknown operator": "g (float[2,3] x) => (float[2,3] y) { y = NoSuchOperator(x) }",
    "an unknown operator behind one that is raised": """g (float[2,1,3] x) => (float[2,3] y) {
        s = Squeeze <axes = [1]> (x) y = NoSuchOperator(s) }""",
}


@pytest.mark.parametrize("target", [13, 21])
@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_raised_is_refused_and_left_as_it_was(row, target):
    source = onnx.parser.parse_model(f"{HEAD.format(ir=4, opset=9)} {REFUSED[row]}")
    model = Model.load(source)
    with pytest.raises(CannotRaise, match="NoSuch") as caught:
        raise_opset(model, target)
    assert "\n" not in str(caught.value)
    assert model.proto == source


@pytest.mark.parametrize("target", [13, 21])
def test_upsample_becomes_resize(target):
    source = onnx.parser.parse_model(
        f"""{HEAD.format(ir=4, opset=9)} g (float[1,1,2,2] x) => (float[1,1,4,4] y) <float[4] s = {{1, 1, 2, 2}}> {{
        y = Upsample(x, s) }}"""
    )
    after = raised(source, target)
    assert [node.op_type for node in after.graph.node][-1] == "Resize"
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(run(after, x)[0], run(source, x)[0])
