"""Each rule of onnxruntime finds its violation, planted in a model whose layers are integer kernels without it."""

import numpy as np
import onnx
import pytest
from quantized import int4, qdq_model

from onnx_ocs import lint
from onnx_ocs.graph import files
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.quantized import Wiring
from onnx_ocs.rules.base import View
from onnx_ocs.rules.kernels import choose_kernels
from onnx_ocs.targets import TARGETS

CONV = """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {{
    q = QuantizeLinear(x, s, {zero})
    d = DequantizeLinear(q, s, {zero})
    wd = DequantizeLinear <axis=0> (w, ws, wz)
    c = Conv(d, wd, b)
    {behind}
    y = DequantizeLinear(rq, t, {last}) }}"""
RELU = "r = Relu(c) rq = QuantizeLinear(r, t, {})"


def conv(behind=None, zero="h", last="u", **constants):
    return qdq_model(CONV.format(behind=behind or RELU.format("u"), zero=zero, last=last), **constants)


GEMM = """g (float[4,16] x) => (float[4,32] y) {{
    q = QuantizeLinear(x, s, h)
    d = DequantizeLinear(q, s, h)
    wd = DequantizeLinear <axis={axis}> (v, ws, wz)
    id = DequantizeLinear <axis=0> (i, ws, iz)
    y = Gemm <{attributes}> (d, wd, {bias}) }}"""


def gemm(attributes="transB=1", bias="id", axis=0, **constants):
    text = GEMM.format(attributes=attributes, bias=bias, axis=axis)
    if bias != "id":
        text = text.replace("id = DequantizeLinear <axis=0> (i, ws, iz)", "")
    biases = {"i": np.zeros(32, np.int32), "iz": np.zeros(32, np.int32)}
    return qdq_model(text, **biases, **constants)


FLOAT_RELU = """g (float[4,32] x) => (float[4,16] y) {
    q = QuantizeLinear(x, s, h)
    d = DequantizeLinear(q, s, h)
    wd = DequantizeLinear(v, s, z)
    m = MatMul(d, wd)
    r = Relu(m)
    y = Neg(r) }"""

ADD = """g (float[1,16,6,6] x, float[1,16,6,6] x2) => (float[1,16,6,6] y) {{
    q = QuantizeLinear(x, s, h)
    d = DequantizeLinear(q, s, h)
    q2 = QuantizeLinear(x2, t, h)
    d2 = DequantizeLinear(q2, t, h)
    a = Add(d, {other})
    aq = QuantizeLinear(a, t, h)
    y = DequantizeLinear(aq, t, h) }}"""

POOL = """g (float[1,16,6,6] x) => (float[1,16,3,3] y) {{
    q = QuantizeLinear(x, s, h)
    d = DequantizeLinear(q, s, h)
    p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (d)
    pq = QuantizeLinear(p, {scale}, h)
    y = DequantizeLinear(pq, {scale}, h) }}"""

GATHER = """g (float[1,14,6,6] x) => (float[1,32,4,4] y) {{
    {front}
    wd = DequantizeLinear <axis=0> (w, ws, wz)
    c = Conv(d, wd, b)
    cq = QuantizeLinear(c, t, h)
    y = DequantizeLinear(cq, t, h) }}"""
CHANNELS = np.array([*range(14), 3, 5])

BLOCKS = """g (float[4,32] x) => (float[4,32] y) {{
    wd = DequantizeLinear <axis=0, block_size=16> (w, ws)
    y = Gemm {attributes}(x, wd) }}"""


def blocks(attributes=""):
    return qdq_model(BLOCKS.format(attributes=attributes), w=int4(np.ones((32, 32))), ws=np.ones((2, 32), np.float32))


CLEAN = {
    "Conv and Relu": (conv(), ["QLinearConv"]),
    "Conv and Clip": (
        conv("r = Clip(c, low, high) rq = QuantizeLinear(r, t, u)", low=np.float32(0), high=np.float32(9)),
        ["QLinearConv"],
    ),
    "Conv with nothing behind": (conv("rq = QuantizeLinear(c, t, u)"), ["QLinearConv"]),
    "Conv of INT8 pairs": (conv("rq = QuantizeLinear(c, t, z)", zero="z", last="z"), ["QLinearConv"]),
    "Gemm": (gemm(), ["QGemm"]),
    "MatMul": (
        qdq_model(
            """g (float[2,4,32] x) => (float[2,4,16] y) {
            q = QuantizeLinear(x, s, h)
            d = DequantizeLinear(q, s, h)
            vd = DequantizeLinear <axis=1> (v, cs, cz)
            y = MatMul(d, vd) }""",
            cs=np.full(16, 0.01, np.float32),
            cz=np.zeros(16, np.int8),
        ),
        ["MatMulIntegerToFloat"],
    ),
    "two quantized operands": (
        qdq_model(
            """g (float[2,4,8] x, float[2,8,4] x2) => (float[2,4,4] y) {
            q = QuantizeLinear(x, s, h)
            d = DequantizeLinear(q, s, h)
            q2 = QuantizeLinear(x2, t, h)
            d2 = DequantizeLinear(q2, t, h)
            m = MatMul(d, d2)
            mq = QuantizeLinear(m, t, h)
            y = DequantizeLinear(mq, t, h) }"""
        ),
        ["QLinearMatMul"],
    ),
    "MatMul with a Relu that is an output": (
        qdq_model(FLOAT_RELU.replace("float[4,16] y)", "float[4,16] y, float[4,16] r)")),
        ["MatMulIntegerToFloat"],
    ),
    "Add": (qdq_model(ADD.format(other="d2")), []),
    "MaxPool": (qdq_model(POOL.format(scale="s")), []),
    "Gather of integers": (
        qdq_model(
            GATHER.format(
                front="q = QuantizeLinear(x, s, h) k = Gather <axis=1> (q, at) d = DequantizeLinear(k, s, h)"
            ),
            at=CHANNELS,
        ),
        ["QLinearConv"],
    ),
    "4-bit weight in blocks": (blocks(), ["MatMulNBits"]),
    "nothing quantized": (qdq_model("g (float[4,16] x) => (float[4,16] y) { y = Relu(x) }"), []),
}

VIOLATIONS = {  # rule -> the node, and a model
    "opset": ("wd", None),
    "scale-shape": ("wd", None),
    "scale-positive": ("wd", conv(ws=np.where(np.arange(32) == 7, 0, 0.01).astype(np.float32))),
    "loads": ("", qdq_model("g (float[4,16] x) => (float[4,16] y) { y = Unheard(x) }")),
    "written-zero-point": (
        "wd",
        qdq_model(
            CONV.replace("(w, ws, wz)", "(w, ws)").format(behind=RELU.format("u"), zero="h", last="u"),
        ),
    ),
    "both-operands": (
        "e",
        qdq_model(
            """g (float[1,16,6,6] x) => (float[1,32,4,4] y, float[1,32,4,4] e) {
            q = QuantizeLinear(x, s, h)
            d = DequantizeLinear(q, s, h)
            wd = DequantizeLinear <axis=0> (w, ws, wz)
            c = Conv(d, wd, b)
            cq = QuantizeLinear(c, t, h)
            y = DequantizeLinear(cq, t, h)
            e = Conv(x, wd, b) }"""
        ),
    ),
    "relu": ("c", conv(RELU.format("h"), last="h")),
    "clip": (
        "c",
        conv("r = Clip(c, low, high) rq = QuantizeLinear(r, t, u)", low=np.float32(0), high=np.float32(6)),
    ),
    "int8-data": (
        "c",
        qdq_model(
            """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
            q = QuantizeLinear(x, s, z)
            n = Clip(q, low, high)
            d = DequantizeLinear(n, s, z)
            wd = DequantizeLinear <axis=0> (w, ws, wz)
            c = Conv(d, wd, b)
            cq = QuantizeLinear(c, t, z)
            y = DequantizeLinear(cq, t, z) }""",
            low=np.int8(-31),
            high=np.int8(31),
        ),
    ),
    "output": (
        "c",
        qdq_model(
            """g (float[1,16,6,6] x) => (float[1,32,4,4] c) {
            q = QuantizeLinear(x, s, h)
            d = DequantizeLinear(q, s, h)
            wd = DequantizeLinear <axis=0> (w, ws, wz)
            c = Conv(d, wd, b) }"""
        ),
    ),
    "gemm": ("y", gemm(bias="b")),
    "four-bit-weight": ("y", blocks("<transB=1> ")),
    "conv-transpose": (
        "c",
        qdq_model(
            """g (float[1,32,4,4] x) => (float[1,16,6,6] y) {
            q = QuantizeLinear(x, s, h)
            d = DequantizeLinear(q, s, h)
            wd = DequantizeLinear(w, s, z)
            c = ConvTranspose(d, wd)
            cq = QuantizeLinear(c, t, h)
            y = DequantizeLinear(cq, t, h) }"""
        ),
    ),
    "partly": ("a", qdq_model(ADD.format(other="x2"))),
    "moved-scale": ("p", qdq_model(POOL.format(scale="t"))),
    "gather-place": (
        "k",
        qdq_model(
            GATHER.format(
                front="k = Gather <axis=1> (x, at) q = QuantizeLinear(k, s, h) d = DequantizeLinear(q, s, h)"
            ),
            at=CHANNELS,
        ),
    ),
    "float-kernel": (
        "c",
        conv(w=np.ones((32, 16, 3, 3), np.int16), wz=np.zeros(32, np.int16)),
    ),
    "saturation": ("c", conv(w=np.full((32, 16, 3, 3), 65, np.int8))),
}
VIOLATIONS["opset"] = (
    "wd",
    qdq_model(
        "g (float[4,16] x) => (float[4,8] y) { wd = DequantizeLinear(w, s) y = MatMul(x, wd) }",
        19,
        w=int4(np.ones((16, 8))),
    ),
)
VIOLATIONS["scale-shape"] = ("wd", conv(ws=np.full(31, 0.01, np.float32), wz=np.zeros(31, np.int8)))
ALSO_REFUSED = {"opset", "scale-shape"}
"""Models that onnxruntime refuses for the same reason."""


@pytest.mark.parametrize(("model", "kernels"), CLEAN.values(), ids=CLEAN)
def test_a_clean_model_passes_and_its_layers_are_integer_kernels(model, kernels):
    onnx.checker.check_model(model, full_check=True)
    outcome = lint(model, target="ort")
    assert outcome.findings == []
    assert [layer.kernel for layer in outcome.kernels] == kernels
    assert all(layer.on_integers for layer in outcome.kernels)


def test_a_violation_is_planted_for_every_rule():
    assert set(VIOLATIONS) == set(TARGETS["ort"].rules)


@pytest.mark.parametrize("rule", VIOLATIONS)
def test_a_rule_finds_its_violation_and_no_other_rule_does(rule):
    node, model = VIOLATIONS[rule]
    outcome = lint(model, target="ort", ignore=["loads"] if rule in ALSO_REFUSED else [])
    assert {(found.rule, found.node) for found in outcome.findings} == {(rule, node)}
    assert outcome.passed == (outcome.findings[0].severity == "note")
    assert all(found.problem and found.remedy for found in outcome.findings)


@pytest.mark.parametrize("rule", ["both-operands", "relu", "clip", "int8-data", "output", "gemm", "four-bit-weight"])
def test_a_rule_says_which_float_kernel_it_explains(rule):
    _, model = VIOLATIONS[rule]
    outcome = lint(model, target="ort")
    assert [layer.kernel for layer in outcome.kernels if not layer.on_integers]
    assert all("onnxruntime: " in found.problem for found in outcome.findings)
    assert {found.rule for found in lint(model, target="ort", ignore=[rule]).findings} == {"float-kernel"}


@pytest.mark.parametrize("rule", [name for name in VIOLATIONS if name not in ("loads", "float-kernel", "saturation")])
def test_rules_work_where_onnxruntime_is_not_asked(rule):
    node, model = VIOLATIONS[rule]
    outcome = lint(model, target="ort", run=False)
    assert (rule, node) in {(found.rule, found.node) for found in outcome.findings}
    assert outcome.kernels == []


@pytest.mark.parametrize(
    ("rule", "model"),
    [
        ("gemm", gemm("transB=1, beta=0.5")),
        ("relu", conv(RELU.format("z"), zero="z", last="z")),
        (
            "int8-data",  # the pair has two readers
            qdq_model(
                CONV.replace("float[1,32,4,4] y", "float[1,32,4,4] y, float[1,16,6,6] e")
                .replace("c = Conv", "e = Relu(d) c = Conv")
                .format(behind="rq = QuantizeLinear(c, t, z)", zero="z", last="z")
            ),
        ),
        (
            "gather-place",
            qdq_model(
                GATHER.format(
                    front="q = QuantizeLinear(x, s, h) e = DequantizeLinear(q, s, h) d = Gather <axis=1> (e, at)"
                ),
                at=CHANNELS,
            ),
        ),
        (
            "gemm",  # which a MatMul and an Add become
            qdq_model(
                """g (float[4,32] x) => (float[4,16] y) {
                q = QuantizeLinear(x, s, h)
                d = DequantizeLinear(q, s, h)
                wd = DequantizeLinear(v, s, z)
                m = MatMul(d, wd)
                y = Add(m, bias) }""",
                bias=np.ones(16, np.float32),
            ),
        ),
        ("output", qdq_model(FLOAT_RELU)),
        (
            "partly",  # the output
            qdq_model(
                """g (float[1,16,6,6] x) => (float[1,16,6,6] y) {
                q = QuantizeLinear(x, s, h)
                d = DequantizeLinear(q, s, h)
                a = Sigmoid(d)
                y = Neg(a) }"""
            ),
        ),
    ],
)
def test_other_forms_of_a_violation_are_found(rule, model):
    assert rule in {found.rule for found in lint(model, target="ort").findings}


def test_a_rule_is_silent_where_the_runtime_refutes_it():
    """onnxruntime quantizes a float weight behind quantized data by itself."""
    text = CONV.replace("wd = DequantizeLinear <axis=0> (w, ws, wz)", "").replace("wd", "f")
    model = qdq_model(text.format(behind=RELU.format("u"), zero="h", last="u"), f=np.ones((32, 16, 3, 3), np.float32))
    assert [found.rule for found in lint(model, target="ort", run=False).findings] == ["both-operands"]
    outcome = lint(model, target="ort", ignore=["saturation"])
    assert [layer.kernel for layer in outcome.kernels] == ["QLinearConv"]
    assert outcome.findings == []


def test_names_need_not_differ():
    model = conv()
    for node in model.graph.node:
        node.name = "same"
    assert [layer.kernel for layer in lint(model, target="ort").kernels] == ["QLinearConv"]


def test_the_last_node_may_write_float():
    model = qdq_model(
        """g (float[1,16,6,6] x) => (float[1,16] y) {
        q = QuantizeLinear(x, s, h)
        d = DequantizeLinear(q, s, h)
        p = GlobalAveragePool(d)
        y = Flatten(p) }"""
    )
    outcome = lint(model, target="ort")
    assert outcome.passed
    assert [(found.rule, found.node, found.severity) for found in outcome.findings] == [("partly", "p", "note")]


def test_weights_alone_are_a_choice_and_noted():
    model = qdq_model(
        """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
        wd = DequantizeLinear <axis=0> (w, ws, wz)
        y = Conv(x, wd, b) }"""
    )
    outcome = lint(model, target="ort")
    assert outcome.passed
    assert [(found.rule, found.severity) for found in outcome.findings] == [("both-operands", "note")]


BODY = """g (float[1,16,6,6] x, bool c) => (float[1,32,4,4] y) {
    q = QuantizeLinear(x, s, h)
    d = DequantizeLinear(q, s, h)
    wd = DequantizeLinear <axis=0> (w, ws, wz)
    y = If (c) <then_branch = t () => (float[1,32,4,4] a) { a = Conv(d, wd, b) },
                else_branch = e () => (float[1,32,4,4] m) { n = Neg(d)
                                                            m = Conv(n, wd, b) }> }"""


def test_layers_in_bodies_are_judged():
    found = lint(qdq_model(BODY), target="ort").findings
    assert {("output", "If/then_branch/a"), ("both-operands", "If/else_branch/m")} <= {(f.rule, f.node) for f in found}


FUNCTION = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
g (float[4,64] x) => (float[4,16] y, float[4,16] y2)
<float s = {0.02}, uint8 h = {128}, int8 z = {0}> {
    q = QuantizeLinear(x, s, h)
    d = DequantizeLinear(q, s, h)
    wd = DequantizeLinear(m, s, z)
    y = local.dense(d, wd)
    y2 = local.dense(d, f) }
<domain: "local", opset_import: ["" : 21]>
dense (a, b) => (c) {
    i = Identity(b)
    c = MatMul(a, i) }"""


def test_kernels_of_a_function_are_known_where_it_is_called():
    """Its body is not judged, because what is quantized is decided where it is called; it does no harm either."""
    model = onnx.parser.parse_model(FUNCTION)
    for name, kind in (("m", np.int8), ("f", np.float32)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((64, 16), kind), name))
    view = View(Wiring(Model.load(model)), TARGETS["ort"])
    with files.workplace(None) as folder:
        kernels = choose_kernels(view.wiring.editor, folder, 60)
    (product,) = (place.node for place in view.wiring.places if place.node.op == "MatMul")
    assert len(kernels.by_node[id(product)]) == 2
    assert lint(model, target="ort").passed
