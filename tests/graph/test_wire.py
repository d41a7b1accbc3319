"""The walk over protobuf's wire format: what is not replaced keeps its bytes, and no bytes crash it."""

import contextlib

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_ocs.graph import wire
from onnx_ocs.graph.model import tensors

TEXT = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
g (float[2,3] x, bool c) => (float[2,3] y) <float[3] w = {1, 2, 3}, int64[2] n = {4, 5}> {
  t = Add (x, w)
  y = If (c) <
    then_branch = yes () => (float[2,3] p) { p = Mul(t, w) },
    else_branch = no () => (float[2,3] q) <float[3] k = {4, 5, 6}> { q = local.f(t) }>
}
<domain: "local", opset_import: ["" : 21]>
f (a) => (b) { k = Constant <value = float[1] {2}> () b = Mul(a, k) }"""


def model():
    made = onnx.parser.parse_model(TEXT)
    made.training_info.add().algorithm.CopyFrom(made.graph)
    sparse = made.graph.sparse_initializer.add(dims=[9])
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(2, np.float32), "s"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.arange(2), "i"))
    return made


def data():
    return memoryview(model().SerializeToString(deterministic=True))


def joined(chunks):
    return b"".join(wire.buffers(chunks))


def same(tensor):
    return [tensor]


def test_no_replacement_gives_the_source_itself():
    source = data()
    assert wire.rewrite(source, lambda tensor: None) == [source]


def test_the_same_in_place_of_each_tensor_gives_the_same_bytes():
    assert joined(wire.rewrite(data(), same)) == data()


def test_every_tensor_of_the_model_is_visited_once():
    seen = []
    wire.rewrite(data(), lambda tensor: seen.append(onnx.TensorProto.FromString(tensor).name))
    assert sorted(seen) == sorted(tensor.name for tensor in tensors(model()) if tensor.data_type)
    assert len(seen) == 9


@given(st.lists(st.integers(0, 300), min_size=9, max_size=9), st.booleans())
@settings(max_examples=40, deadline=None)
def test_lengths_are_right_whatever_the_new_size(sizes, lazy):
    left = iter(sizes)

    def longer(tensor):
        size = next(left)
        tail = onnx.TensorProto(doc_string="d" * size).SerializeToString()
        return [tensor, wire.Lazy(len(tail), lambda: tail) if lazy else memoryview(tail)]

    chunks = wire.rewrite(data(), longer)
    after = joined(chunks)
    assert wire.size(chunks) == len(after)
    docs = [len(t.doc_string) for t in tensors(onnx.ModelProto.FromString(after)) if t.data_type]
    assert sorted(docs) == sorted(sizes)


arrays = st.builds(
    lambda name, size: onnx.numpy_helper.from_array(np.zeros(size, np.uint8), name),
    st.text(max_size=5),
    st.integers(0, 300),
)
attributes = st.builds(lambda name, value: onnx.helper.make_attribute(name, value), st.text("ab", min_size=1), arrays)


def node(attribute):
    return onnx.NodeProto(op_type="Any", attribute=attribute)


leaves = st.builds(
    lambda nodes, constants: onnx.GraphProto(node=nodes, initializer=constants),
    st.lists(st.builds(node, st.lists(attributes, max_size=2)), max_size=2),
    st.lists(arrays, max_size=2),
)
graphs = st.recursive(
    leaves,
    lambda inner: st.builds(
        lambda bodies, constants: onnx.GraphProto(
            node=[node([onnx.helper.make_attribute("body", body)]) for body in bodies], initializer=constants
        ),
        st.lists(inner, max_size=3),
        st.lists(arrays, max_size=2),
    ),
    max_leaves=6,
)


@given(graphs)
@settings(max_examples=60, deadline=None)
def test_any_model_is_reproduced(graph):
    source = onnx.ModelProto(ir_version=10, graph=graph).SerializeToString(deterministic=True)
    assert joined(wire.rewrite(memoryview(source), same)) == source


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_raise_nothing_but_malformed(content):
    with contextlib.suppress(wire.Malformed):
        assert joined(wire.rewrite(memoryview(content), lambda tensor: None)) == content


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_a_damaged_model_raises_nothing_but_malformed(damages):
    content = bytearray(data())
    for position, value in damages:
        content[position % len(content)] = value
    with contextlib.suppress(wire.Malformed):
        assert joined(wire.rewrite(memoryview(bytes(content)), lambda tensor: None)) == content


def nested(levels):
    """A graph in a node of a graph in a node, and so on."""
    content = b""
    for number in [7, *[1, 5, 6] * levels][::-1]:  # model to graph; to node, to attribute, to graph
        content = bytes(wire.tag(number, len(content))) + content
    return content


def test_nesting_is_limited():
    assert joined(wire.rewrite(memoryview(nested(5)), same)) == nested(5)
    for levels in (40, 5000):
        with pytest.raises(wire.Malformed, match="deep"):
            wire.rewrite(memoryview(nested(levels)), same)


@pytest.mark.parametrize(
    "content",
    [
        b"\x3a",  # a key without its length
        b"\x3a\x05abc",  # longer than what follows
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a length of 2 ** 64 - 1
        b"\x3a" + b"\xff" * 11,  # a number that does not end
        b"\x3b\x3c",  # a group
        b"\x39abc",  # eight bytes, of which three are there
        b"\x3dabc",  # four
        b"\x02\x00",  # field 0
        b"\x3f",  # wire type 7
    ],
)
def test_malformed_bytes_are_told(content):
    with pytest.raises(wire.Malformed):
        list(wire.fields(memoryview(content)))


@given(st.lists(st.tuples(st.integers(1, 2**29 - 1), st.binary(max_size=200)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_fields_are_those_that_were_written(written):
    content = b"".join(bytes(wire.tag(number, len(body))) + body for number, body in written)
    found = [(field.number, content[field.body : field.stop]) for field in wire.fields(memoryview(content))]
    assert found == written


def test_payloads_are_told_from_other_fields():
    tensor = onnx.numpy_helper.from_array(np.ones(3, np.float32), "w")
    found = [field for field in wire.fields(memoryview(tensor.SerializeToString())) if field.is_payload]
    assert [field.number for field in found] == [wire.RAW_DATA]
