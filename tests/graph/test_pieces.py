import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import helper

from onnx_ocs.graph.model import Model, graphs
from onnx_ocs.graph.pieces import Pieces, with_constants

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '

GRAPHS = {
    "chain": "g (float[2,3] x) => (float[2,3] y) { a = Relu(x) b = Neg(a) y = Exp(b) }",
    "residual": "g (float[2,3] x) => (float[2,3] y) { a = Relu(x) b = Neg(a) c = Exp(b) y = Add(a, c) }",
    "two inputs": "g (float[2,3] x, float[2,3] z) => (float[2,3] y) { a = Relu(x) b = Neg(a) y = Add(b, z) }",
    "constants": """g (float[2,3] x) => (float[2,3] y)
        <float[3] w = {1, 2, 3}> { c = Constant <value_float = 2.0> () a = Mul(x, c) b = Add(a, w) y = Mul(b, c) }""",
    "shapes": """g (float[2,3] x) => (float[6] y)
        { s = Shape(x) p = ReduceProd <keepdims = 1> (s) a = Neg(x) y = Reshape(a, p) }""",
    "a result on the way": "g (float[2,3] x) => (float[2,3] a, float[2,3] y) { a = Relu(x) b = Neg(x) y = Exp(b) }",
    "nothing behind": "g (float[2,3] x) => (float[2,3] a, float[2,3] y) { a = Relu(x) y = Neg(x) }",
    "body": """g (float[2,3] x, bool c) => (float[2,3] y) { a = Relu(x) b = Neg(x)
        y = If (c) <then_branch = t () => (float[2,3] u) { u = Add(a, b) },
                    else_branch = e () => (float[2,3] v) { v = Identity(b) }> }""",
    "dropped outputs": "g (float[4,3] x) => (float[2,3] y) { a, b = Split(x) c = Neg(a) y = Exp(c) }",
}


def run(model, feed, names):
    whole = model.whole()
    session = ort.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}
    found = session.run(None, {name: value for name, value in feed.items() if name in wanted})
    return dict(zip([output.name for output in whole.graph.output], found, strict=True))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("stride", [1, 2])
def test_pieces_compute_what_the_whole_does(name, stride, rng):
    proto = onnx.parser.parse_model(HEAD + GRAPHS[name])
    feed = {
        value.name: np.array(True)
        if value.type.tensor_type.elem_type == onnx.TensorProto.BOOL
        else rng.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype(np.float32)
        for value in proto.graph.input
    }
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = dict(zip([output.name for output in proto.graph.output], session.run(None, feed), strict=True))
    pieces = Pieces(Model.load(proto), ["y"])
    assert pieces.ordered
    cut, left, found = 0, dict(feed), {}
    while cut < len(pieces.nodes):
        after = min(cut + stride, len(pieces.nodes))
        types = {name: helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype) for name, value in left.items()}
        made = run(pieces.between(cut, after, types, pieces.nodes[cut:after]), left, None)
        found |= made
        left = {name: value for name, value in (left | made).items() if name in pieces.live(after)}
        assert set(left) == set(pieces.live(after))
        cut = after
    np.testing.assert_array_equal(found["y"], wanted["y"])
    assert not left


def test_places_and_reach():
    proto = onnx.parser.parse_model(HEAD + GRAPHS["constants"])
    pieces = Pieces(Model.load(proto), ["y"])
    assert [pieces.place(name) for name in ("a", "b", "y", "x", "c", "w", "nowhere")] == [
        0,
        1,
        2,
        None,
        None,
        None,
        None,
    ]
    assert pieces.reaches("x", 0)
    assert not pieces.reaches("a", 0)
    assert pieces.reaches("a", 1)
    assert not pieces.reaches("w", 3)


def test_a_node_with_other_constants_and_a_sum(rng):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    made = with_constants(node, {1: "v"}, "b")
    values = {name: rng.standard_normal((3, 3)).astype(np.float32) for name in "xvb"}
    inputs = [helper.make_tensor_value_info(name, 1, [3, 3]) for name in "xvb"]
    graph = helper.make_graph(made, "g", inputs, [helper.make_tensor_value_info("y", 1, [3, 3])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (found,) = ort.InferenceSession(model.SerializeToString()).run(None, values)
    np.testing.assert_allclose(found, values["x"] @ values["v"] + values["b"], rtol=0, atol=1e-5)
    assert list(node.input) == ["x", "w"]
    assert list(node.output) == ["y"]


def test_every_node_is_seen():
    proto = onnx.parser.parse_model(HEAD + GRAPHS["body"])
    assert sorted(node.op_type for graph in graphs(proto.graph) for node in graph.node) == [
        "Add",
        "Identity",
        "If",
        "Neg",
        "Relu",
    ]


def test_only_what_the_tensors_take_is_run():
    text = """g (float[2,3] x) => (float[2,3] y, float[2,3] z)
        { a = Relu(x) s = Shape(a) z = Neg(a) b = Exp(a) y = Neg(b) }"""
    pieces = Pieces(Model.load(onnx.parser.parse_model(HEAD + text)), ["b"])
    assert [node.op_type for node in pieces.nodes] == ["Relu", "Exp"]
    assert pieces.live(1) == ["a"]
    assert pieces.live(2) == []
    assert pieces.place("z") is None


def test_nodes_out_of_order_are_noticed():
    proto = onnx.parser.parse_model(HEAD + GRAPHS["chain"])
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert not Pieces(Model.load(proto), ["y"]).ordered
