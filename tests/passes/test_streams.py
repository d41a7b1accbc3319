"""Copies that the layers in front make: the same function, on chains of all operators that channels pass."""

import re

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnx_ocs import quantize, split
from onnx_ocs.graph.passages import RULES

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
C = 6

CHAINS = {
    **{
        op: f"m = {op} (c)"
        for op in (
            "Relu",
            "LeakyRelu",
            "Sigmoid",
            "Tanh",
            "Elu",
            "Selu",
            "Celu",
            "HardSigmoid",
            "HardSwish",
            "Softplus",
            "Softsign",
            "Erf",
            "Neg",
            "Abs",
            "Exp",
            "Floor",
            "Ceil",
            "Round",
            "Sin",
            "Cos",
            "ThresholdedRelu",
            "Identity",
            "Dropout",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "GlobalLpPool",
        )
    },
    "Sqrt": "a = Abs (c)\n m = Sqrt (a)",
    "Log": "a = Softplus (c)\n m = Log (a)",
    "Reciprocal": "a = Softplus (c)\n m = Reciprocal (a)",
    "Clip": "m = Clip (c, lowest, highest)",
    "Cast": "a = Cast <to=11> (c)\n m = Cast <to=1> (a)",
    "QuantizeLinear": "a = QuantizeLinear (c, scale, zero)\n m = DequantizeLinear (a, scale, zero)",
    "PRelu": "m = PRelu (c, column)",
    "PRelu of one slope": "m = PRelu (c, one)",
    "MaxPool": "m = MaxPool <kernel_shape=[2,2]> (c)",
    "AveragePool": "m = AveragePool <kernel_shape=[2,2], strides=[2,2]> (c)",
    "LpPool": "m = LpPool <kernel_shape=[2,2]> (c)",
    "BatchNormalization": "m = BatchNormalization (c, row, row2, row3, row4)",
    "InstanceNormalization": "m = InstanceNormalization (c, row, row2)",
    **{f"{op} of constants": f"m = {op} (c, column)" for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")},
    "Pow": "a = Abs (c)\n m = Pow (a, column)",
    "Sub from a constant": "m = Sub (column, c)",
    "Mul of a scalar": "m = Mul (c, one)",
    "Add of a picture": "m = Add (c, picture)",
    "Add of two layers": "d = Conv <pads=[1,1,1,1]> (x, w2, b2)\n m = Add (c, d)",
    "Mul by a gate": "g = GlobalAveragePool (c)\n s = Sigmoid (g)\n m = Mul (c, s)",
    "Concat": "d = Conv <pads=[1,1,1,1]> (x, w2)\n m = Concat <axis=1> (c, d)",
    "Concat from the end": "d = Conv <pads=[1,1,1,1]> (x, w2)\n m = Concat <axis=-3> (d, c)",
    "Concat of pictures": "d = Relu (c)\n m = Concat <axis=2> (c, d)",
    "Pad": "m = Pad (c, pads)",
    "Pad with ones": "m = Pad (c, pads, one_)",
    "Slice": "m = Slice (c, starts, ends, axes)",
    "Resize": 'm = Resize <mode = "nearest"> (c, none, scales)',
    "Transpose": "a = Transpose <perm=[0,2,3,1]> (c)\n b = Relu (a)\n m = Transpose <perm=[0,3,1,2]> (b)",
    "depthwise Conv": f"m = Conv <group={C}, pads=[1,1,1,1]> (c, wd, bd)",
    "residual": "r = Relu (c)\n d = Conv <pads=[1,1,1,1]> (r, w3, b2)\n s = Add (d, r)\n m = Relu (s)",
    "two in a row": "r = Relu (c)\n m = Conv <pads=[1,1,1,1]> (r, w3, b2)",
}
"""From the output ``c`` of a Conv to ``m``, which another Conv reads."""

FEATURES = {
    "Flatten": "m = Flatten (c)",
    "Flatten from the end": "m = Flatten <axis=-3> (c)",
    "Reshape": "m = Reshape (c, free)",
    "Reshape to features": "m = Reshape (c, counted)",
    "Reshape with allowzero": "m = Reshape <allowzero=1> (c, counted)",
    "Squeeze": "g = GlobalAveragePool (c)\n m = Squeeze (g, behind)",
    "ReduceMean": "m = ReduceMean <axes=[2,3], keepdims=0> (c)",
    "ReduceMax kept": "r = ReduceMax <axes=[-1,-2]> (c)\n m = Flatten (r)",
    "two dense layers": "f = Flatten (c)\n h = Gemm <transB=1> (f, wg, bg)\n m = Relu (h)",
    "MatMul and Add": "f = Flatten (c)\n h = MatMul (f, wm)\n a = Add (bg, h)\n m = Relu (a)",
}
"""To ``m``, which a Gemm reads."""

HERE = {
    "w1": (C, 3, 3, 3),
    "b1": (C,),
    "w2": (C, 3, 3, 3),
    "b2": (C,),
    "w3": (C, C, 3, 3),
    "wd": (C, 1, 3, 3),
    "bd": (C,),
    "wg": (12, C * 16),
    "wm": (C * 16, 12),
    "bg": (12,),
    "column": (C, 1, 1),
    "picture": (4, 4),
    "row": (C,),
    "row2": (C,),
    "row3": (C,),
}
CONSTANTS = {
    "row4": np.linspace(0.5, 2, C, dtype=np.float32),
    "one": np.array([0.3], np.float32),
    "one_": np.array(1, np.float32),
    "lowest": np.array(-0.5, np.float32),
    "highest": np.array(0.7, np.float32),
    "scale": np.array(0.01, np.float32),
    "zero": np.array(0, np.int8),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "starts": np.array([0, 1]),
    "ends": np.array([2, 4]),
    "axes": np.array([-1, 2]),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "none": np.zeros(0, np.float32),
    "free": np.array([0, -1]),
    "counted": np.array([-1, C * 16]),
    "behind": np.array([2, 3]),
    "w4": np.ones((3, 3, 1, 1), np.float32),
    "w5": np.ones((C, C // 2, 3, 3), np.float32),
    "first": np.array([1]),
    "five": np.array([5]),
    "channels": np.array([1]),
    "more": np.array([0, 0, 0, 0, 0, 2, 0, 0]),
    "cut": np.array([0, C * 2, 2, 4]),
}


def built(text, output="y", also="", opset=17):
    """A model of the text with the constants that it reads; weights with an outlier in each row."""
    head = HEAD.replace("17", str(opset))
    model = onnx.parser.parse_model(f"{head} g (float[2,3,4,4] x) => (float[N,M,A,B] {output}{also}) {{ {text} }}")
    rng = np.random.default_rng(5)
    read = {name for node in model.graph.node for name in node.input}
    for name, shape in HERE.items():
        values = rng.standard_normal(shape).astype(np.float32)
        values.reshape(-1)[:: max(1, values.size // 4)] *= 4
        if name in read:
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for name, values in CONSTANTS.items():
        if name in read:
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    made = {tensor.name for tensor in model.graph.initializer} | {"x", ""}
    made |= {name for node in model.graph.node for name in node.output}
    for name in sorted(read - made):  # weights of the last layers, whose shapes the chain decides
        _add_last(model, name, rng)
    return model


def _add_last(model, name, rng):
    inferred = onnx.shape_inference.infer_shapes(model)
    (node,) = [node for node in model.graph.node if name in node.input]
    (value,) = [value for value in (*inferred.graph.value_info, *inferred.graph.output) if value.name == node.input[0]]
    channels = value.type.tensor_type.shape.dim[1].dim_value
    shape = (5, channels, 1, 1) if node.op_type == "Conv" else (channels, 5)
    values = rng.standard_normal(shape).astype(np.float32)
    values[:2, :2] *= 5
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))


def conv_chain(text):
    return built(f"c = Conv <pads=[1,1,1,1]> (x, w1, b1)\n {text}\n y = Conv (m, wz)")


def dense_chain(text):
    model = built(f"c = Conv <pads=[1,1,1,1]> (x, w1, b1)\n {text}\n y = Gemm (m, wz)")
    del model.graph.output[0].type.tensor_type.shape.dim[2:]
    return model


def run(model, x):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})


def same(model, **options):
    """The split model computes what ``model`` does; its report."""
    result = split(model, **{"ratio": 0.3, "fold": "always", "first": "same", "bits": 6, "verify": False, **options})
    onnx.checker.check_model(result.model, full_check=True)
    x = np.random.default_rng(1).standard_normal((2, 3, 4, 4)).astype(np.float32)
    for before, after in zip(run(model, x), run(result.model, x), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * max(1, np.abs(before).max()))
    return result


def gathers(result):
    return sum(node.op_type == "Gather" for node in result.model.graph.node)


@pytest.mark.parametrize("how", ["qa", "naive"])
@pytest.mark.parametrize("text", CHAINS.values(), ids=CHAINS)
def test_channels_pass_every_operator(text, how):
    result = same(conv_chain(text), split=how)
    last = result.report["layers"][-1]
    assert last["copies"] == "folded", last["copies_reason"]
    assert gathers(result) == sum(row["copies"] == "gathered" for row in result.report["layers"])


@pytest.mark.parametrize("text", FEATURES.values(), ids=FEATURES)
def test_channels_become_features(text):
    result = same(dense_chain(text))
    assert result.report["layers"][-1]["copies"] == "folded"


def test_every_rule_is_tested():
    read = " ".join([*CHAINS.values(), *FEATURES.values()])
    assert {op for op in RULES if f"{op} " not in read} == {
        "Gelu",
        "Mish",
        "Upsample",
        "ReduceSum",
        "ReduceMin",
        "ReduceL1",
        "ReduceL2",
    }  # of other opsets, or the same function as one that is tested


REFUSED = {
    "is an output of the graph": ("m = Relu (c)", ", float[N,M,A,B] m"),
    "Softmax": ("m = Softmax <axis=1> (c)", ""),
    "is an input of the graph": ("a = Conv (x, w4)\n m = Add (a, x)", ""),
    "takes some of the channels": ("m = Slice (c, first, five, channels)", ""),
    "Pad adds channels": ("m = Pad (c, more)", ""),
    "another form": ("m = Reshape (c, cut)", ""),
    "reads the channels in groups": (
        "m = Relu (c)\n d = Conv <group=2, pads=[1,1,1,1]> (c, w5)",
        ", float[N,M,A,B] d",
    ),
    "makes channels in groups": ("m = Conv <group=2, pads=[1,1,1,1]> (c, w5)", ""),
    "is read inside of a body": (
        "m = Relu (c)\n t = Constant <value = bool {1}> ()\n"
        "i = If (t) <then_branch = p () => (float[N,M,A,B] k) { k = Relu (c) },"
        " else_branch = q () => (float[N,M,A,B] l) { l = Neg (c) }>",
        ", float[N,M,A,B] i",
    ),
    "reads only some of the channels": (
        "d = Conv <pads=[1,1,1,1]> (x, w2)\n m = Concat <axis=1> (c, d)\n y2 = Conv (c, wy)",
        ", float[N,M,A,B] y2",
    ),
}


@pytest.mark.parametrize(("reason", "case"), REFUSED.items(), ids=REFUSED)
def test_what_channels_do_not_pass_is_said(reason, case):
    text, also = case
    model = built(f"c = Conv <pads=[1,1,1,1]> (x, w1, b1)\n {text}\n y = Conv (m, wz)", also=also)
    rows = same(model).report["layers"]
    last = [row for row in rows if row["copies"]][-1]
    assert last["copies"] == "gathered"
    assert reason in last["copies_reason"]


def test_all_readers_of_a_tensor_split_the_same_channels():
    text = "a = Relu (c)\n d = Conv (a, wz)\n e = Conv (a, wy)\n y = Add (d, e)"
    result = same(built(f"c = Conv <pads=[1,1,1,1]> (x, w1, b1)\n {text}"))
    first, *others = [row["source"] for row in result.report["layers"] if row["copies"]]
    assert others == [first]
    assert gathers(result) == 0


def test_a_gather_is_shared_by_the_readers_of_a_tensor():
    text = "d = Conv (c, wz)\n e = Conv (c, wy)\n s = Softmax <axis=1> (c)\n y = Add (d, e)"
    result = same(built(f"c = Conv <pads=[1,1,1,1]> (x, w1, b1)\n {text}", also=", float[N,M,A,B] s"))
    assert [row["copies"] for row in result.report["layers"]] == [None, "gathered", "gathered"]
    assert gathers(result) == 1


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_layers_that_make_parts_of_the_channels_each_get_a_multiple(ratio):
    text = "d = Conv <pads=[1,1,1,1]> (x, w2)\n k = Concat <axis=1> (c, d)\n m = Relu (k)"
    result = same(conv_chain(text), ratio=ratio, align=4, max_expand=1)
    rows = result.report["layers"]
    assert rows[-1]["copies"] == "folded"
    makers = [row["widened"] or C for row in rows[:2]]
    assert sum(makers) == 2 * C + rows[-1]["extra"]
    assert sum(makers) % 4 == 0
    assert all(number in (C, 8, 12) for number in makers)
    tight = same(conv_chain(text), ratio=ratio, align=4, max_expand=0.34).report["layers"][-1]
    assert tight["extra"] <= max(4, np.ceil(ratio * 2 * C))


def test_never_keeps_every_gather():
    assert gathers(same(conv_chain("m = Relu (c)"), fold="never")) == 1


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_chains_keep_the_function(data):
    """Chains of several operators and layers, some of them read or put out in the middle as well."""
    lines, tensor = ["c = Conv <pads=[1,1,1,1]> (x, w1, b1)"], "c"
    outputs = ""
    steps = data.draw(st.lists(st.sampled_from(sorted(CHAINS)), min_size=1, max_size=4))
    for number, step in enumerate(steps):
        names = {name: f"{name}{number}_" for name in "abdgrsm"}
        text = CHAINS[step]
        for name, fresh in {**names, "c": tensor}.items():
            text = _renamed(text, name, fresh)
        if step.startswith("Concat"):
            text = text.replace("Concat <axis=1>", "Concat <axis=2>").replace("Concat <axis=-3>", "Concat <axis=-2>")
        lines.append(text)
        tensor = names["m"]
        if data.draw(st.integers(0, 4)) == 0:
            lines.append(f"o{number} = Neg ({tensor})")
            outputs += f", float[N,M,A,B] o{number}"
    try:
        model = built("\n ".join([*lines, f"y = Conv ({tensor}, wz)"]), also=outputs)
        wanted = run(model, np.random.default_rng(1).standard_normal((2, 3, 4, 4)).astype(np.float32))
    except Exception:  # sizes that do not fit
        return
    if all(np.isfinite(values).all() for values in wanted):
        same(model, ratio=data.draw(st.sampled_from([0.1, 0.4, 1])))


def _renamed(text, name, fresh):
    return re.sub(rf"(?<![\w]){name}(?![\w=])", fresh, text)


HOMOGENEOUS = [
    "Relu", "LeakyRelu", "Identity", "PRelu", "MaxPool", "AveragePool", "Pad", "Slice", "Resize", "Transpose",
    "Concat", "depthwise Conv", "Add of two layers", "Mul of a scalar", "residual", "two in a row",
]  # fmt: skip


def calibration():
    rng = np.random.default_rng(2)
    return [rng.standard_normal((2, 3, 4, 4)).astype(np.float32) for _ in range(4)]


@pytest.mark.parametrize("ratio", [0, 0.3])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_shares_of_data_pass_in_proportion(name, ratio):
    """Copies of the data that are halves of it: the layers in front make halves, and no Mul is left."""
    result = same(conv_chain(CHAINS[name]), split="naive", act_ratio=0.4, ratio=ratio, calibrate=calibration())
    last = result.report["layers"][-1]
    if name in ("residual", "two in a row"):
        return  # streams of several layers that read different tensors are gathered
    assert last["copies"] == "folded", last["copies_reason"]
    assert last["act_extra"] > 0
    assert not {"Gather", "Mul"} & {node.op_type for node in result.model.graph.node} - {CHAINS[name].split()[2]}


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("Sigmoid", "naive", "do not pass all operators"),
        ("Add of constants", "naive", "do not pass all operators"),
        ("BatchNormalization", "naive", "do not pass all operators"),
        ("Relu", "qa", "offsets, which pass no operator"),
    ],
)
def test_other_shares_of_data_are_gathered(name, how, reason):
    options = {"act_ratio": 0.4, "calibrate": calibration(), "fold_bn": False}
    last = same(conv_chain(CHAINS[name]), split=how, **options).report["layers"][-1]
    assert last["copies"] == "gathered"
    assert reason in last["copies_reason"]


@pytest.mark.parametrize("name", ["Relu", "MaxPool", "depthwise Conv"])
def test_halves_of_the_data_narrow_its_grid_where_it_is_made(name):
    """With integer kernels on both sides."""
    options = {"target": "ort", "calibrate": calibration(), "act_clip": "none", "bits": 7, "first": "same"}
    text = f"c = Conv <pads=[1,1,1,1]> (x, w1, b1)\n {CHAINS[name]}\n y = Conv (m, wz)"
    common = {**options, "split": "naive", "max_expand": 1, "verify": False}
    plain, split_ = (quantize(built(text), act_ratio=ratio, fold="always", **common) for ratio in (0, 0.4))
    before, after = (result.report["layers"][-1]["act_threshold"] for result in (plain, split_))
    assert after < before
    assert not {"Gather", "Mul"} & {node.op_type for node in split_.model.graph.node}
