"""Edits of a graph: what they add is valid, what they leave unread goes, all else keeps its bytes."""

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.parser
import onnx.reference
import onnxruntime as ort
import pytest

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.integers import TYPES, packed
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.qdq import dequantize

TENSOR = onnx.TensorProto
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
PLAIN = f"{HEAD} g (float[2,3,4] x) => (float[2,3,4] y) {{ [last] y = Relu(x) }}"

BODIES = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
g (float[2,3] x, bool c) => (float[2,3] y) <float[3] w = {1, 2, 3}> {
  [first] t = Add (x, w)
  [choice] y = If (c) <
    then_branch = yes () => (float[2,3] p) { [inside] p = Mul(t, w) },
    else_branch = no () => (float[2,3] q) <float[3] k = {4, 5, 6}> { r = local.f(t) [below] q = Sub(r, k) }>
}
<domain: "local", opset_import: ["" : 21]>
f (a) => (b) { k = Constant <value = float[1] {2}> () s = Mul(a, k) [deep] b = Relu(s) }"""


def editor_of(text):
    return Editor(Model.load(onnx.parser.parse_model(text)))


def node_of(editor, name):
    """The scope and the node of this name."""
    return next((scope, node) for scope in editor.scopes for node in scope.graph.nodes if node.name == name)


def committed(editor):
    """The model with the edits, which the checker takes, with shapes that agree."""
    editor.commit()
    made = editor.model.whole()
    onnx.checker.check_model(made, full_check=True)
    return made


def run(model, *inputs):
    if isinstance(model, str):
        model = onnx.parser.parse_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {item.name: value for item, value in zip(session.get_inputs(), inputs, strict=True)})


def constants(graph):
    return [tensor.name for tensor in graph.initializer]


def operators(graph):
    return [node.op_type for node in graph.node]


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["x", "c", "w", "t", "p", "k", "q", "a", "s", "b", "first", "inside", "deep"])
def test_a_name_of_any_value_or_node_of_the_model_is_taken(taken):
    editor = editor_of(BODIES)
    assert editor.unique(taken) == f"{taken}_1"
    assert editor.unique(taken) == f"{taken}_2"


def test_names_are_never_given_twice():
    editor = editor_of(PLAIN)
    names = [editor.unique(name) for name in ["n", "n_1", "n", "n_1", "n", "n_1_1", ""] * 3]
    assert len(set(names)) == len(names)
    assert names[0] == "n"


# -- gather ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, -2, -3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("scaled", [False, True])
def test_gathered_channels_are_copies_times_their_gain(axis, dtype, scaled, rng):
    kind = {np.float32: "float", np.float16: "float16", np.float64: "double"}[dtype]
    editor = editor_of(f"{HEAD} g ({kind}[2,3,4] x) => ({kind}[A,B,C] y) {{ [last] y = Identity(x) }}")
    scope, last = node_of(editor, "last")
    x = rng.standard_normal((2, 3, 4)).astype(dtype)
    channels = np.array([1, 0, 1, 1])
    gain = np.array([0.5, 1, 0.25, 0.25], dtype) if scaled else None
    made = editor.gather(scope, last.inputs[0], channels, axis, last, gain)
    editor.rewire(last, 0, made)
    after = committed(editor)
    assert operators(after.graph) == ["Gather", *["Mul"] * scaled, "Identity"]
    wanted = x.take(channels, axis)
    if gain is not None:
        wanted = wanted * gain.reshape([-1 if dim == axis else 1 for dim in (-3, -2, -1)])
    (found,) = run(after, x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted)


def test_layers_that_ask_for_the_same_share_the_nodes():
    editor = editor_of(f"{HEAD} g (float[3,4] x) => (float[3,4] y, float[3,4] z) {{ [a] y = Relu(x) [b] z = Neg(x) }}")
    scope, first = node_of(editor, "a")
    _, second = node_of(editor, "b")
    x, channels, gain = first.inputs[0], np.array([0, 1, 1]), np.array([1, 0.5, 0.5], np.float32)
    plain = editor.gather(scope, x, channels, -1, first)
    assert editor.gather(scope, x, channels.copy(), -1, second) is plain
    scaled = editor.gather(scope, x, channels, -1, first, gain)
    assert editor.gather(scope, x, channels, -1, second, gain.copy()) is scaled
    others = [
        editor.gather(scope, x, channels, -2, first),
        editor.gather(scope, x, np.array([0, 1, 2]), -1, first),
        editor.gather(scope, x, channels, -1, first, gain[::-1].copy()),
    ]
    assert len({id(tensor) for tensor in (plain, scaled, *others)}) == 5


def test_graphs_do_not_share_the_nodes():
    editor = editor_of(BODIES)
    outer, first = node_of(editor, "first")
    inner, inside = node_of(editor, "inside")
    x, channels = first.outputs[0], np.array([0, 1, 2])
    assert editor.gather(outer, x, channels, -1, first) is not editor.gather(inner, x, channels, -1, inside)


# -- what nothing reads any more --------------------------------------------------------------------------------------

CHAIN = """{head} g (float[2,3] x) => ({outputs}) <float[3,2] w = {{1, 2, 3, 4, 5, 6}}> {{
  t = Transpose(w) i = Identity(t) [last] y = Add(x, i) {more} }}"""


def cut(more="", outputs="float[2,3] y"):
    """A chain of nodes behind a constant, after its reader reads something else."""
    editor = editor_of(CHAIN.format(head=HEAD, outputs=outputs, more=more))
    scope, last = node_of(editor, "last")
    editor.rewire(last, 1, editor.constant(scope, "new", np.ones((2, 3), np.float32)))
    return committed(editor)


def test_what_nothing_reads_goes_up_to_the_constant():
    after = cut()
    assert operators(after.graph) == ["Add"]
    assert constants(after.graph) == ["new"]
    np.testing.assert_array_equal(run(after, np.zeros((2, 3), np.float32))[0], np.ones((2, 3)))


@pytest.mark.parametrize(
    ("more", "outputs", "kept", "weights"),
    [
        ("z = Neg(i)", "float[2,3] y, float[2,3] z", ["Transpose", "Identity", "Add", "Neg"], ["w", "new"]),
        ("z = Neg(t)", "float[2,3] y, float[2,3] z", ["Transpose", "Add", "Neg"], ["w", "new"]),
        ("z = Neg(w)", "float[2,3] y, float[3,2] z", ["Add", "Neg"], ["w", "new"]),
        ("", "float[2,3] y, float[2,3] i", ["Transpose", "Identity", "Add"], ["w", "new"]),
        ("", "float[2,3] y, float[2,3] t", ["Transpose", "Add"], ["w", "new"]),
        ("", "float[2,3] y, float[3,2] w", ["Add"], ["w", "new"]),
    ],
    ids=["i read", "t read", "w read", "i an output", "t an output", "w an output"],
)
def test_what_something_still_reads_stays(more, outputs, kept, weights):
    after = cut(more, outputs)
    assert operators(after.graph) == kept
    assert constants(after.graph) == weights


@pytest.mark.parametrize("read", ["i", "t", "w"])
def test_what_a_body_reads_stays(read):
    after = cut(f"""c = Constant <value = bool {{1}}> ()
    z = If (c) <then_branch = yes () => (float[A,B] p) {{ p = Neg({read}) }},
                else_branch = no () => (float[A,B] q) {{ q = Neg({read}) }}>""")
    kept = {"i": ["Transpose", "Identity"], "t": ["Transpose"], "w": []}[read]
    assert operators(after.graph) == [*kept, "Add", "Constant", "If"]
    assert constants(after.graph) == ["w", "new"]


def test_what_only_one_branch_reads_stays():
    more = """c = Constant <value = bool {1}> ()
    z = If (c) <then_branch = yes () => (float[2,3] p) { p = Identity(x) },
                 else_branch = no () => (float[2,3] q) { q = Neg(i) }>"""
    after = cut(more, "float[2,3] y, float[2,3] z")
    assert operators(after.graph) == ["Transpose", "Identity", "Add", "Constant", "If"]


def test_what_was_made_in_vain_leaves_no_constant():
    editor = editor_of(PLAIN)
    scope, last = node_of(editor, "last")
    x = last.inputs[0]
    editor.rewire(last, 0, editor.gather(scope, x, np.arange(4), -1, last, np.ones(4, np.float32)))
    editor.rewire(last, 0, x)
    before = onnx.parser.parse_model(PLAIN)
    assert committed(editor) == before


def test_a_node_with_two_outputs_stays_while_one_is_read():
    editor = editor_of(
        f"""{HEAD} g (float[4] x) => (float[2] y, float[2] z) {{
        a, b = Split <num_outputs = 2> (x) [m] y = Neg(a) z = Neg(b) }}"""
    )
    scope, node = node_of(editor, "m")
    editor.rewire(node, 0, editor.constant(scope, "new", np.ones(2, np.float32)))
    after = committed(editor)
    assert operators(after.graph) == ["Split", "Neg", "Neg"]


def test_a_value_read_twice_by_one_node_stays_until_both_are_rewired():
    editor = editor_of(f"{HEAD} g (float[4] x) => (float[4] y) {{ a = Neg(x) [m] y = Add(a, a) }}")
    scope, node = node_of(editor, "m")
    new = editor.constant(scope, "new", np.ones(4, np.float32))
    editor.rewire(node, 0, new)
    assert [other.op for other in scope.graph.nodes] == ["Neg", "Add"]
    editor.rewire(node, 1, new)
    assert operators(committed(editor).graph) == ["Add"]


def test_shapes_told_of_a_value_that_is_gone_go_with_it():
    text = CHAIN.format(head=HEAD, outputs="float[2,3] y", more="").replace(
        "<float[3,2] w", "<float[2,3] t, float[3,2] w"
    )
    editor = editor_of(text)
    scope, last = node_of(editor, "last")
    assert [value.name for value in editor.model.proto.graph.value_info] == ["t"]
    editor.rewire(last, 1, editor.constant(scope, "new", np.ones((2, 3), np.float32)))
    assert not committed(editor).graph.value_info


# -- commit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [PLAIN, BODIES], ids=["plain", "bodies and functions"])
def test_a_commit_without_edits_changes_no_byte(text):
    editor = editor_of(text)
    before = editor.model.proto.SerializeToString(deterministic=True)
    editor.commit()
    assert editor.model.proto.SerializeToString(deterministic=True) == before
    Editor(editor.model).commit()
    assert editor.model.proto.SerializeToString(deterministic=True) == before


def test_edits_do_not_reach_the_model_before_the_commit():
    editor = editor_of(BODIES)
    before = editor.model.whole()
    scope, node = node_of(editor, "inside")
    editor.rewire(node, 1, editor.constant(scope, "new", np.ones(3, np.float32)))
    editor.raise_ir(11)
    assert editor.model.whole() == before
    editor.commit()
    assert editor.model.whole() != before


def test_the_ir_version_is_only_raised():
    editor = editor_of(PLAIN)
    editor.raise_ir(9)
    assert committed(editor).ir_version == 10
    editor.raise_ir(12)
    editor.commit()
    assert editor.model.proto.ir_version == 12


@pytest.mark.parametrize("name", ["first", "inside", "below", "deep"])
@pytest.mark.parametrize("condition", [True, False])
def test_an_edit_at_any_level_gives_a_valid_model(name, condition, rng):
    """Each node's first input is doubled: its channels are gathered as they are, with a gain of two."""
    doubled = {
        "first": ("t = Add (x, w)", "d = Add(x, x) t = Add (d, w)"),
        "inside": ("p = Mul(t, w)", "d = Add(t, t) p = Mul(d, w)"),
        "below": ("q = Sub(r, k)", "d = Add(r, r) q = Sub(d, k)"),
        "deep": ("b = Relu(s)", "d = Add(s, s) b = Relu(d)"),
    }
    wanted = BODIES.replace(f"[{name}] {doubled[name][0]}", doubled[name][1])
    assert wanted != BODIES
    editor = editor_of(BODIES)
    scope, node = node_of(editor, name)
    made = editor.gather(scope, node.inputs[0], np.arange(3), -1, node, np.full(3, 2, np.float32))
    editor.rewire(node, 0, made)
    x = rng.integers(-4, 4, (2, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        run(committed(editor), x, np.array(condition))[0], run(wanted, x, np.array(condition))[0]
    )


@pytest.mark.parametrize("name", ["first", "inside", "below", "deep"])
def test_an_edit_changes_nothing_elsewhere(name):
    before = onnx.parser.parse_model(BODIES)
    editor = editor_of(BODIES)
    scope, node = node_of(editor, name)
    made = editor.gather(scope, node.inputs[0], np.arange(3), -1, node)
    editor.rewire(node, 0, made)
    after = committed(editor)
    found, wanted = levels(after), levels(before)
    assert [at for at in wanted if found[at] != wanted[at]] == [name]


def levels(model):
    """The parts of BODIES by the name of a node in each, without what is nested in them."""
    main = onnx.GraphProto()
    main.CopyFrom(model.graph)
    choice = next(node for node in main.node if node.name == "choice")
    bodies = [attribute.g.SerializeToString() for attribute in choice.attribute]
    choice.ClearField("attribute")
    return dict(
        zip(
            ["first", "inside", "below", "deep"],
            [main.SerializeToString(), *bodies, model.functions[0].SerializeToString()],
            strict=True,
        )
    )


def test_a_constant_of_an_outer_graph_may_be_read_inside():
    editor = editor_of(BODIES)
    outer, _ = node_of(editor, "first")
    _, inside = node_of(editor, "inside")
    editor.rewire(inside, 1, editor.constant(outer, "new", np.array([5, 6, 7], np.float32)))
    after = committed(editor)
    assert constants(after.graph) == ["w", "new"]
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(run(after, x, np.array(True))[0], (x + np.array([1, 2, 3])) * [5, 6, 7])


def test_a_large_constant_reaches_body_and_function(rng):
    editor = editor_of(BODIES)
    values = rng.standard_normal((500, 1, 3)).astype(np.float32)
    for name in ("inside", "deep"):
        scope, node = node_of(editor, name)
        table = editor.constant(scope, "table", values)
        last = editor.node(scope, "ReduceMax", [table], "most", node, keepdims=0, noop_with_empty_axes=0)
        editor.rewire(node, 0, editor.node(scope, "Mul", [node.inputs[0], last], "times", node))
    after = committed(editor)
    x = np.ones((2, 3), np.float32)
    shifted = x + np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(run(after, x, np.array(True))[0], shifted * values.max() * np.float32([1, 2, 3]))
    np.testing.assert_array_equal(run(after, x, np.array(False))[0], shifted * 2 * values.max() - np.float32([4, 5, 6]))


def test_new_names_are_unique_in_the_whole_model():
    editor = editor_of(BODIES)
    for name in ("first", "inside", "below", "deep"):
        scope, node = node_of(editor, name)
        made = editor.gather(scope, node.inputs[0], np.arange(3), -1, node, np.ones(3, np.float32))
        editor.rewire(node, 0, made)
    after = committed(editor)
    graphs = [after.graph, *(a.g for node in after.graph.node for a in node.attribute if a.HasField("g"))]
    nodes = [node for graph in (*graphs, after.functions[0]) for node in graph.node]
    names = [node.name for node in nodes if node.name]
    values = [out for node in nodes for out in node.output] + [t.name for graph in graphs for t in graph.initializer]
    assert len(set(names)) == len(names)
    assert sorted(value for value in set(values) if values.count(value) > 1) == ["k"]  # twice in the source


@pytest.mark.parametrize("opset", [9, 13])
def test_new_constants_of_an_old_model_are_not_inputs(opset):
    editor = editor_of(
        f"""<ir_version: 3, opset_import: ["" : {opset}]>
        g (float[2,3] x, float[3] w) => (float[2,3] y) <float[3] w = {{1, 2, 3}}> {{ [last] y = Add(x, w) }}"""
    )
    scope, last = node_of(editor, "last")
    editor.rewire(last, 0, editor.gather(scope, last.inputs[0], np.array([2, 1, 0]), -1, last))
    after = committed(editor)
    assert after.ir_version == 4
    assert [value.name for value in after.graph.input] == ["x"]
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(run(after, x)[0], x[:, ::-1] + [1, 2, 3])


def test_an_old_model_that_loses_its_weight_loses_the_input_too():
    editor = editor_of(
        """<ir_version: 3, opset_import: ["" : 9]>
        g (float[3] x, float[3] w) => (float[3] y) <float[3] w = {1, 2, 3}> { [last] y = Add(x, w) }"""
    )
    _, last = node_of(editor, "last")
    editor.rewire(last, 1, last.inputs[0])
    after = committed(editor)
    assert (after.ir_version, [value.name for value in after.graph.input], constants(after.graph)) == (3, ["x"], [])


# -- constants and integers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", TYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("name", ["first", "inside", "deep"])
def test_dequantized_constants_are_steps_times_integers(width, axis, name, rng):
    integers = rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), (2, 3), np.int8)
    step = np.array(0.5, np.float32) if axis is None else np.float32([0.5, 0.25, 2])[: integers.shape[axis]]
    text = BODIES if width > 2 else BODIES.replace('"" : 21', '"" : 25').replace("ir_version: 10", "ir_version: 13")
    editor = editor_of(text)
    scope, node = node_of(editor, name)
    tensor = editor.model.tensor("weight", TYPES[width], (2, 3), packed(integers, width))
    made = dequantize(editor, scope, tensor, step, axis or 0, TENSOR.FLOAT, node)
    editor.rewire(node, 0, made)
    after = committed(editor)
    weight = integers * (step if axis is None else step[:, None] if axis == 0 else step)
    zeros = np.zeros((2, 3), np.float32)
    wanted = {
        "first": (weight + np.float32([1, 2, 3])) * np.float32([1, 2, 3]),
        "inside": weight * np.float32([1, 2, 3]),
        "deep": np.maximum(weight, 0) - np.float32([4, 5, 6]),
    }
    (found,) = onnx.reference.ReferenceEvaluator(after).run(None, {"x": zeros, "c": np.array(name != "deep")})
    np.testing.assert_array_equal(found, wanted[name])
    np.testing.assert_array_equal(run(after, zeros, np.array(name != "deep"))[0], wanted[name])


def test_dequantized_constants_are_cast_to_the_type_of_the_layer():
    editor = editor_of(f"{HEAD} g (float16[3] x) => (float16[3] y) {{ [last] y = Add(x, x) }}")
    scope, last = node_of(editor, "last")
    integers = editor.model.tensor("weight", TENSOR.INT8, (3,), bytes([1, 2, 255]))
    editor.rewire(last, 1, dequantize(editor, scope, integers, np.array(0.5, np.float32), 0, TENSOR.FLOAT16, last))
    after = committed(editor)
    assert operators(after.graph) == ["DequantizeLinear", "Cast", "Add"]
    np.testing.assert_array_equal(run(after, np.zeros(3, np.float16))[0], np.float16([0.5, 1, -0.5]))


def test_ranks_of_values_are_those_of_shape_inference():
    editor = editor_of(f"{HEAD} g (float[2,3,4] x) => (float[A] y) {{ s = Shape(x) f = Flatten(x) y = ReduceMax(f) }}")
    assert {name: editor.ranks[name] for name in "xsf"} == {"x": 3, "s": 1, "f": 2}


def test_bodies_know_their_owner_and_path():
    editor = editor_of(BODIES)
    inner, inside = node_of(editor, "inside")
    main, choice = node_of(editor, "choice")
    assert [scope.path for scope in editor.scopes] == ["", "choice/then_branch/", "choice/else_branch/", "local::f/"]
    assert inner.parent is main
    assert inner.within(main, inside) is choice
    assert main.within(main, choice) is choice
    assert [scope.is_function for scope in editor.scopes] == [False, False, False, True]
