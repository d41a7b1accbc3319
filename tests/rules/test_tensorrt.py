"""Each rule of TensorRT finds its violation, planted in a model that is clean without it, and nothing else."""

import numpy as np
import onnx
import pytest
from quantized import int4, qdq_model

from onnx_ocs import lint
from onnx_ocs.targets import TARGETS

RESIDUAL = """g (float[1,16,6,6] x) => (float[1,32,6,6] y) {{
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    wd = DequantizeLinear <axis=0> (w, ws, wz)
    c = Conv <pads=[1,1,1,1]> (d, wd, b)
    r = Relu(c)
    rq = QuantizeLinear(r, t, z)
    rd = DequantizeLinear(rq, t, z)
    vd = DequantizeLinear <axis=0> (k, ws, wz)
    e = Conv <pads=[1,1,1,1]> (rd, vd, b)
    {branch}
    y = Relu(a) }}"""
SQUARE = (np.arange(32 * 32 * 9).reshape(32, 32, 3, 3) % 121 - 60).astype(np.int8)

CONV = """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {{
    q = QuantizeLinear{attributes} (x, {scale}, {zero})
    d = DequantizeLinear{attributes} (q, {scale}, {zero})
    wd = DequantizeLinear <axis=0> (w, ws, wz)
    c = Conv(d, wd, b)
    y = Relu(c) }}"""


def conv(scale="s", zero="z", attributes="", **constants):
    return qdq_model(CONV.format(scale=scale, zero=zero, attributes=attributes), **constants)


GEMM = """g (float[4,16] x) => (float[4,32] y) {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    wd = DequantizeLinear <axis=0> (v, ws, wz)
    y = Gemm <transB=1> (d, wd, b) }"""

CONCAT = """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {{
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    p = Relu(x)
    pq = QuantizeLinear(p, {scale}, z)
    pd = DequantizeLinear(pq, {scale}, z)
    j = Concat <axis=1> (d, pd)
    jq = QuantizeLinear(j, s, z)
    jd = DequantizeLinear(jq, s, z)
    wd = DequantizeLinear <axis=0> (k, ws, wz)
    y = Conv(jd, wd) }}"""

CLEAN = {
    "Conv and Relu": conv(),
    "Gemm": qdq_model(GEMM),
    "residual Add, skip branch quantized": qdq_model(RESIDUAL.format(branch="a = Add(e, rd)"), k=SQUARE),
    "residual Add, float": qdq_model(RESIDUAL.format(branch="a = Add(e, r)"), k=SQUARE),
    "Concat": qdq_model(CONCAT.format(scale="s"), k=SQUARE),
    "INT4 in blocks": qdq_model(
        """g (float[4,32] x) => (float[4,8] y) {
        wd = DequantizeLinear <axis=0, block_size=16> (w, ws)
        y = MatMul(x, wd) }""",
        w=int4(np.ones((32, 8))),
        ws=np.ones((2, 8), np.float32),
    ),
    "weights alone": qdq_model(
        """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
        wd = DequantizeLinear <axis=0> (w, ws, wz)
        y = Conv(x, wd, b) }"""
    ),
    "float weights behind Q and DQ": qdq_model(
        """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        wq = QuantizeLinear <axis=0> (f, ws, wz)
        wd = DequantizeLinear <axis=0> (wq, ws, wz)
        y = Conv(d, wd, b) }""",
        f=np.ones((32, 16, 3, 3), np.float32),
    ),
    "ConvTranspose": qdq_model(
        """g (float[1,32,4,4] x) => (float[1,16,6,6] y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        wd = DequantizeLinear <axis=1> (w, cs, cz)
        y = ConvTranspose(d, wd) }""",
        cs=np.full(16, 0.01, np.float32),
        cz=np.zeros(16, np.int8),
    ),
    "Gather of INT8": qdq_model(
        """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
        q = QuantizeLinear(x, s, z)
        g = Gather <axis=1> (q, at)
        d = DequantizeLinear(g, s, z)
        wd = DequantizeLinear <axis=0> (k, ws, wz)
        y = Conv(d, wd, b) }""",
        at=np.arange(32) // 2,
        k=SQUARE,
    ),
    "Clip of INT8": qdq_model(
        """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
        q = QuantizeLinear(x, s, z)
        c = Clip(q, least, most)
        d = DequantizeLinear(c, s, z)
        wd = DequantizeLinear <axis=0> (w, ws, wz)
        y = Conv(d, wd, b) }""",
        least=np.int8(-31),
        most=np.int8(31),
    ),
    "Clip of floats in front of Q": qdq_model(
        """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
        c = Clip(x, least, most)
        q = QuantizeLinear(c, s, z)
        d = DequantizeLinear(q, s, z)
        wd = DequantizeLinear <axis=0> (w, ws, wz)
        y = Conv(d, wd, b) }""",
        least=np.float32(-0.62),
        most=np.float32(0.62),
    ),
    "nothing quantized": qdq_model("g (float[4,16] x) => (float[4,16] y) { y = Relu(x) }"),
}

VIOLATIONS = {  # rule -> the node, and a model
    "opset": (
        "wd",
        qdq_model(
            """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            wd = DequantizeLinear <axis=0> (w, ws, wz)
            y = Conv(d, wd, b) }""",
            opset=12,
        ),
    ),
    "scale-shape": ("wd", conv(ws=np.full(31, 0.01, np.float32), wz=np.zeros(31, np.int8))),
    "scale-positive": ("wd", conv(ws=np.where(np.arange(32) == 7, 0, 0.01).astype(np.float32))),
    "operators": (
        "y",
        qdq_model(
            """g (int8[1,16,6,6] x) => (int8[1,32,4,4] y) {
            y = QLinearConv(x, s, z, w, ws, wz, s, z) }"""
        ),
    ),
    "type": ("q", conv(zero="u")),
    "bias-float": (
        "bd",
        qdq_model(
            """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            wd = DequantizeLinear <axis=0> (w, ws, wz)
            bd = DequantizeLinear <axis=0> (i, ws, iz)
            y = Conv(d, wd, bd) }""",
            i=np.zeros(32, np.int32),
            iz=np.zeros(32, np.int32),
        ),
    ),
    "symmetric": ("q", conv(zero="n", n=np.int8(3))),
    "constant-scale": (
        "q",
        qdq_model(
            """g (float[1,16,6,6] x, float step) => (float[1,32,4,4] y) {
            q = QuantizeLinear(x, step, z)
            d = DequantizeLinear(q, step, z)
            wd = DequantizeLinear <axis=0> (w, ws, wz)
            y = Conv(d, wd, b) }"""
        ),
    ),
    "int4-blocks": (
        "wd",
        qdq_model(
            """g (float[4,32] x) => (float[4,32] y) {
            wd = DequantizeLinear <axis=1> (w, ws)
            y = MatMul(x, wd) }""",
            w=int4(np.ones((32, 32))),
        ),
    ),
    "data-per-tensor": (
        "q",
        conv("cs", "cz", " <axis=1>", cs=np.linspace(0.01, 0.02, 16, dtype=np.float32), cz=np.zeros(16, np.int8)),
    ),
    "axis": (
        "wd",
        qdq_model(
            """g (float[1,32,6,6] x) => (float[1,32,4,4] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            wd = DequantizeLinear <axis=1> (k, ws, wz)
            y = Conv(d, wd, b) }""",
            k=SQUARE,
        ),
    ),
    "both-operands": (
        "e",
        qdq_model(
            """g (float[1,16,8,8] x) => (float[1,32,4,4] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            wd = DequantizeLinear <axis=0> (w, ws, wz)
            c = Conv(d, wd, b)
            r = Relu(c)
            kd = DequantizeLinear <axis=0> (k, ws, wz)
            e = Conv(r, kd, b)
            y = Relu(e) }""",
            k=SQUARE,
        ),
    ),
    "before-activation": (
        "cq",
        qdq_model(
            """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            wd = DequantizeLinear <axis=0> (w, ws, wz)
            c = Conv(d, wd, b)
            cq = QuantizeLinear(c, s, z)
            cd = DequantizeLinear(cq, s, z)
            y = Relu(cd) }"""
        ),
    ),
    "residual": (
        "a",
        qdq_model(
            RESIDUAL.format(branch="eq = QuantizeLinear(e, s, z) ed = DequantizeLinear(eq, s, z) a = Add(ed, rd)"),
            k=SQUARE,
        ),
    ),
    "concat-scale": ("j", qdq_model(CONCAT.format(scale="t"), k=SQUARE)),
    "batch-normalization": (
        "n",
        qdq_model(
            """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            wd = DequantizeLinear <axis=0> (w, ws, wz)
            c = Conv(d, wd)
            n = BatchNormalization(c, ws, b, b, ws)
            y = Relu(n) }"""
        ),
    ),
    "exporter-leaves-float": (
        "y",
        qdq_model(
            """g (float[1,32,6,6] x) => (float[1,32,6,6] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            wd = DequantizeLinear <axis=0> (k, ws, wz)
            y = Conv <group=32> (d, wd, b) }""",
            k=SQUARE[:, :1, :1, :1],
        ),
    ),
}


@pytest.mark.parametrize("model", CLEAN.values(), ids=CLEAN)
def test_a_clean_model_passes(model):
    onnx.checker.check_model(model, full_check=True)
    outcome = lint(model, target="tensorrt")
    assert outcome.passed
    assert [found for found in outcome.findings if found.severity != "note"] == []


def test_a_violation_is_planted_for_every_rule():
    assert set(VIOLATIONS) == set(TARGETS["tensorrt"].rules)


@pytest.mark.parametrize("rule", VIOLATIONS)
def test_a_rule_finds_its_violation_and_no_other_rule_does(rule):
    node, model = VIOLATIONS[rule]
    outcome = lint(model, target="tensorrt")
    assert {(found.rule, found.node) for found in outcome.findings} == {(rule, node)}
    assert outcome.passed == (outcome.findings[0].severity == "note")
    assert all(found.problem and found.remedy for found in outcome.findings)


@pytest.mark.parametrize(
    ("rule", "node", "model"),
    [
        ("type", "q", conv(zero="")),  # UINT8 by the standard
        ("type", "q", conv(zero="n", n=np.int16(0))),
        ("scale-positive", "q", conv(scale="n", n=np.float32(np.inf))),
        ("scale-positive", "q", conv(scale="n", n=np.float32(-0.1))),
        ("scale-shape", "wd", conv(wz=np.zeros((), np.int8))),
        (
            "axis",
            "wd",
            qdq_model(
                CONV.replace("<axis=0> ", "").format(scale="s", zero="z", attributes=""),
                ws=np.full(16, 0.01, np.float32),
                wz=np.zeros(16, np.int8),
            ),
        ),
        (
            "int4-blocks",
            "wd",
            qdq_model(
                """g (float[4,32] x) => (float[4,7] y) {
                wd = DequantizeLinear <axis=0, block_size=16> (w, ws)
                y = MatMul(x, wd) }""",
                w=int4(np.ones((32, 7))),
                ws=np.ones((2, 7), np.float32),
            ),
        ),
        ("int4-blocks", "q", conv(zero="n", n=int4(0))),
        (
            "int4-blocks",
            "wd",
            qdq_model(
                """g (float[4,32] x) => (float[4,8] y) {
                wd = DequantizeLinear <axis=0, block_size=16> (w, ws)
                y = MatMul(x, wd) }""",
                w=np.ones((32, 8), np.int8),
                ws=np.ones((2, 8), np.float32),
            ),
        ),
        (
            "residual",
            "a",
            qdq_model(
                RESIDUAL.format(branch="eq = QuantizeLinear(e, s, z) ed = DequantizeLinear(eq, s, z) a = Add(ed, r)"),
                k=SQUARE,
            ),
        ),
        (
            "operators",
            "y",
            qdq_model("g (int8[4,16] x) => (int32[4,32] y) { y = MatMulInteger(x, m) }", m=np.ones((16, 32), np.int8)),
        ),
    ],
)
def test_other_forms_of_a_violation_are_found(rule, node, model):
    outcome = lint(model, target="tensorrt")
    assert not outcome.passed
    assert (rule, node) in {(found.rule, found.node) for found in outcome.findings}


@pytest.mark.parametrize("kind", ["value_float = 0.5", "value_floats = [0.5]"])
def test_a_scale_may_be_a_constant_in_short(kind):
    text = CONV.format(scale="k", zero="z", attributes="").replace(
        "{", f"{{ k0 = Constant <{kind}> () k = Identity(k0)", 1
    )
    findings = lint(qdq_model(text), target="tensorrt").findings
    assert not [found for found in findings if found.rule == "constant-scale"]


def test_two_shortcuts_of_layers_may_meet_in_an_add():
    """One of them is the skip branch, quantized; the other fuses."""
    branch = (
        "f = Conv <pads=[1,1,1,1]> (d, wd) fq = QuantizeLinear(f, t, z) fd = DequantizeLinear(fq, t, z) a = Add(e, fd)"
    )
    assert lint(qdq_model(RESIDUAL.format(branch=branch), k=SQUARE), target="tensorrt").findings == []
