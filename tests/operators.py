"""The operator rows that every pass is tested on: one small graph each, as ONNX text.

A graph input whose name begins with ``w`` becomes a constant of random values with outliers in a few channels.
"""

import numpy as np
import onnx
import onnx.parser

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'

ROWS = {
    "Conv 1-D": "g (float[2,8,9] x, float[6,8,3] w, float[6] wb) => (float[2,6,N] y) { y = Conv(x, w, wb) }",
    "Conv 2-D": "g (float[2,8,5,5] x, float[6,8,3,3] w) => (float[2,6,A,B] y) { y = Conv <pads=[1,1,1,1]> (x, w) }",
    "Conv 3-D": "g (float[1,8,4,4,4] x, float[5,8,2,2,2] w) => (float[1,5,A,B,C] y) { y = Conv(x, w) }",
    "Conv grouped": "g (float[2,12,5,5] x, float[6,6,3,3] w) => (float[2,6,A,B] y) { y = Conv <group=2> (x, w) }",
    "Conv depthwise": "g (float[2,8,5,5] x, float[8,1,3,3] w) => (float[2,8,A,B] y) { y = Conv <group=8> (x, w) }",
    "ConvTranspose": "g (float[2,8,5,5] x, float[8,6,3,3] w) => (float[2,6,A,B] y) { y = ConvTranspose(x, w) }",
    "ConvTranspose grouped": """g (float[2,12,5,5] x, float[12,3,3,3] w) => (float[2,6,A,B] y) {
        y = ConvTranspose <group=2> (x, w) }""",
    "ConvTranspose depthwise": """g (float[2,8,5,5] x, float[8,1,3,3] w) => (float[2,8,A,B] y) {
        y = ConvTranspose <group=8> (x, w) }""",
    "Gemm": "g (float[3,8] x, float[8,6] w, float[6] wb) => (float[3,6] y) { y = Gemm(x, w, wb) }",
    "Gemm scaled": """g (float[3,8] x, float[6,8] w, float[6] wb) => (float[3,6] y) {
        y = Gemm <transB=1, alpha=0.5, beta=2.0> (x, w, wb) }""",
    "Gemm transA": "g (float[8,3] x, float[8,6] w) => (float[3,6] y) { y = Gemm <transA=1> (x, w) }",
    "Gemm weight on the left": "g (float[8,3] x, float[6,8] w) => (float[6,3] y) { y = Gemm(w, x) }",
    "Gemm both transposed": """g (float[3,8] x, float[8,6] w) => (float[6,3] y) {
        y = Gemm <transA=1, transB=1> (w, x) }""",
    "MatMul": "g (float[2,3,8] x, float[8,6] w) => (float[2,3,6] y) { y = MatMul(x, w) }",
    "MatMul weight on the left": "g (float[2,8,3] x, float[6,8] w) => (float[2,6,3] y) { y = MatMul(w, x) }",
    "MatMul batched": "g (float[2,3,8] x, float[2,8,6] w) => (float[2,3,6] y) { y = MatMul(x, w) }",
    "MatMul vector": "g (float[3,8] x, float[8] w) => (float[3] y) { y = MatMul(x, w) }",
    "through Identity, Transpose and Reshape": """g (float[3,8] x, float[2,3,8] w) => (float[3,6] y) {
        s = Constant <value_ints=[6, 8]> ()
        i = Identity(w)
        r = Reshape(i, s)
        t = Transpose(r)
        y = MatMul(x, t) }""",
    "two layers of one tensor": """g (float[3,8] x, float[8,6] w) => (float[3,6] y, float[3,6] z) {
        y = MatMul(x, w)
        z = Gemm(x, w) }""",
    "one weight on two sides": """g (float[8,8] x, float[8,8] w) => (float[8,8] y) {
        a = MatMul(x, w)
        y = MatMul(w, a) }""",
    "weight is an output": """g (float[3,8] x, float[8,6] w) => (float[3,6] y, float[8,6] v) {
        y = MatMul(x, w)
        v = Identity(w) }""",
    "If body": """g (float[3,8] x, bool[1] c, float[8,6] w) => (float[3,6] y) {
        y = If (c) <then_branch = t () => (float[3,6] a) { a = MatMul(x, w) },
                    else_branch = e () => (float[3,6] b) { n = Neg(x)
                                                           b = MatMul(n, w) }> }""",
    "Loop body": """g (float[3,8] x, float[8,8] w) => (float[3,8] y) {
        n = Constant <value = int64 {3}> ()
        k = Constant <value = bool {1}> ()
        y = Loop (n, k, x) <body = b (int64 i, bool go, float[3,8] h) => (bool on, float[3,8] h2) {
            on = Identity(go)
            m = MatMul(h, w)
            h2 = Tanh(m) }> }""",
    "Scan body": """g (float[8] x, float[4,8] xs, float[8,8] w) => (float[8] y, float[4,8] ys) {
        y, ys = Scan <num_scan_inputs=1, body = b (float[8] h, float[8] v) => (float[8] h2, float[8] o) {
            m = MatMul(v, w)
            s = Add(h, m)
            h2 = Tanh(s)
            o = Identity(h2) }> (x, xs) }""",
    "float64": "g (double[3,8] x, double[8,6] w) => (double[3,6] y) { y = MatMul(x, w) }",
    "float16": "g (float16[3,8] x, float16[8,6] w) => (float16[3,6] y) { y = MatMul(x, w) }",
    "Cast": """g (float[3,8] x, float16[8,6] w) => (float[3,6] y) {
        v = Cast <to=1> (w)
        y = MatMul(x, v) }""",
    "function": """g (float[3,8] x, float[8,6] w) => (float[3,6] y) { y = local.layer(x) }
        <domain: "local", opset_import: ["" : 17]>
        layer (x) => (y) {
            w = Constant <value = float[8,2] {1.0,-2.0,3.0,0.5,0.1,0.2,9.0,0.3,0.4,-0.6,0.7,0.8,0.9,1.1,1.2,-1.3}> ()
            y = MatMul(x, w) }""",
}
UNSPLIT = {"Conv depthwise", "ConvTranspose depthwise"}
"""Rows whose layer cannot be split."""


def row_model(name: str, seed: int = 0, head: str = HEAD) -> onnx.ModelProto:
    """The model of a row."""
    text = ROWS[name]
    if "local." in text:
        head = head.replace('["" :', '["local" : 1, "" :')
        text = text.replace("float[8,6] w) => (float[3,6] y)", "float[8,2] unused) => (float[3,2] y)")
    return with_weights(onnx.parser.parse_model(f"{head} {text}"), seed)


def with_weights(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Turn the inputs whose names begin with ``w`` into constants."""
    rng = np.random.default_rng(seed)
    for value in [value for value in model.graph.input if value.name.startswith("w")]:
        kind = value.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        values = rng.standard_normal(shape)
        values *= np.where(rng.random(shape) < 0.1, 4, 1)
        held = values.astype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        model.graph.initializer.append(onnx.numpy_helper.from_array(held, value.name))
        model.graph.input.remove(value)
    return model


def feed(model, seed=1):
    """Random values for each input."""
    rng = np.random.default_rng(seed)
    made = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        made[value.name] = np.ones(shape, bool) if dtype.kind == "b" else rng.standard_normal(shape).astype(dtype)
    return made
