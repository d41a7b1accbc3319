"""The lint as a whole: the function, the command line, and models that other tools write."""

import json
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from quantized import int4, qdq_model

from onnx_ocs import UnsupportedModel, lint, quantize
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.quantized import Wiring
from onnx_ocs.rules.base import RULES
from onnx_ocs.targets import TARGETS
from onnx_ocs.targets.base import VALID

CLEAN = """g (float[1,16,6,6] x) => (float[1,32,4,4] y) {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    wd = DequantizeLinear <axis=0> (w, ws, wz)
    c = Conv(d, wd, b)
    y = Relu(c) }"""


@pytest.fixture
def command(command):
    """Run ``onnx-ocs lint`` in this process: exit status, standard output, standard error."""
    return lambda *arguments: command("lint", *arguments)


@pytest.fixture
def clean(tmp_path):
    path = tmp_path / "clean.onnx"
    onnx.save(qdq_model(CLEAN), path)
    return path


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.onnx"
    onnx.save(qdq_model(CLEAN, s=np.float32(0), z=np.int8(1)), path)
    return path


def test_every_rule_says_what_it_looks_for_and_some_target_uses_it():
    assert all(rule.summary for rule in RULES.values())
    assert set(RULES) == {name for target in TARGETS.values() for name in target.rules}


def test_every_rule_is_documented(models):
    text = (models.parent / "docs" / "lint.md").read_text()
    assert [name for name in RULES if f"`{name}`" not in text] == []


def test_a_clean_model_ends_in_status_0(command, clean):
    status, out, err = command("--target", "tensorrt", clean)
    assert (status, err) == (0, "")
    assert out == "passed for tensorrt: no violations\n"
    assert command("--target", "tensorrt", clean, "-q") == (0, "", "")


def test_violations_end_in_status_1_and_are_told(command, broken, tmp_path):
    target, report = tmp_path / "found.json", tmp_path / "found.xml"
    status, out, err = command("--target", "tensorrt", broken, "--json", target, "--junit", report)
    assert status == 1
    assert err == f"onnx-ocs: {broken}: failed for tensorrt: 2 errors\n"
    for told in ("error", "symmetric", "scale-positive", "q ", "QuantizeLinear", "quantize symmetrically"):
        assert told in out
    found = json.loads(target.read_text())
    assert found["passed"] is False
    assert [(each["rule"], each["severity"], each["node"], each["op"]) for each in found["findings"]] == [
        ("scale-positive", "error", "q", "QuantizeLinear"),
        ("symmetric", "error", "q", "QuantizeLinear"),
    ]
    assert all(each["problem"] and each["remedy"] for each in found["findings"])
    suite = ElementTree.parse(report).getroot()
    assert (suite.get("tests"), suite.get("failures")) == (str(len(TARGETS["tensorrt"].rules)), "2")
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == [f"{broken}: scale-positive", f"{broken}: symmetric"]


def test_kernels_are_told_of_onnxruntime(command, clean, tmp_path):
    target = tmp_path / "found.json"
    status, out, _ = command("--target", "ort", clean, "-v", "--json", target)
    assert status == 1
    assert "0 of 1 quantized layers compute on integers" in out
    (kernel,) = json.loads(target.read_text())["kernels"]
    assert (kernel["node"], kernel["op"], kernel["on_integers"]) == ("c", "Conv", False)
    assert kernel["kernel"] in out


def test_rules_can_be_ignored(command, broken):
    assert command("--target", "tensorrt", broken, "--ignore", "symmetric,scale-positive")[0] == 0
    assert command("--target", "tensorrt", broken, "--ignore", "symmetric", "--ignore", "scale-positive")[0] == 0
    status, out, _ = command("--target", "tensorrt", broken, "--ignore", "symmetric")
    assert status == 1
    assert "1 error\n" in out


def test_errors_alone_can_be_asked_for(command, clean):
    assert command("--target", "ort", "--no-run", clean)[0] == 1
    assert command("--target", "ort", "--no-run", "--errors-only", clean)[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--target"]),
        (["--target", "tpu"], ["invalid choice", "tensorrt", "ort", "openvino", "generic"]),
        (["--target", "ort", "--ignore", "nonsense"], ["'nonsense'", "saturation"]),
        (["--target", "ort", "--timeout", "0"], ["must be above 0"]),
    ],
)
def test_wrong_usage_ends_in_status_2(command, clean, options, words):
    status, out, err = command(*options, clean)
    assert (status, out) == (2, "")
    assert all(word in err for word in words)


def test_a_report_never_takes_the_place_of_the_model(command, clean):
    before = clean.read_bytes()
    assert command("--target", "ort", clean, "--json", clean)[0] == 2
    assert clean.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"no model\n" * 40])
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_no_model_ends_in_status_3(command, tmp_path, content, target):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    status, out, err = command("--target", target, path)
    assert (status, out) == (3, "")
    assert err.startswith(f"onnx-ocs: {path}: ")
    assert err.count("\n") == 1


def test_the_function_judges_a_proto_and_leaves_it_as_it_is():
    model = qdq_model(CLEAN)
    before = model.SerializeToString()
    outcome = lint(model, target="ort")
    assert not outcome.passed
    assert outcome.count("warning") == len(outcome.findings)
    assert model.SerializeToString() == before
    with pytest.raises(ValueError, match="target must be one of"):
        lint(model, target="tpu")
    with pytest.raises(UnsupportedModel):
        lint("missing.onnx", target="ort")


def test_a_refusal_of_the_runtime_names_the_model_and_the_node(tmp_path):
    path = tmp_path / "m.onnx"
    model = qdq_model("g (float[4,16] x) => (float[4,16] y) { y = Unheard(x) }")
    model.graph.node[0].name = "odd one"
    onnx.save(model, path)
    (found,) = lint(path, target="ort").findings
    assert (found.rule, found.severity) == ("loads", "error")
    assert str(path) in found.problem or "odd one" in found.problem
    assert "#" not in found.problem


def test_a_cycle_of_nodes_is_no_endless_work():
    model = qdq_model("g (float[4,16] x) => (float[4,16] y) { y = Relu(x) }")
    model.graph.node.extend(
        [
            onnx.helper.make_node("Identity", ["b"], ["a"]),
            onnx.helper.make_node("Identity", ["a"], ["b"]),
            onnx.helper.make_node("QuantizeLinear", ["a", "b", "a"], ["q"]),
            onnx.helper.make_node("DequantizeLinear", ["q", "b"], ["d"]),
        ]
    )
    for target in TARGETS:
        lint(model, target=target, run=False)


OPENVINO = {
    "int2": (
        "wd",
        "g (float[4,16] x) => (float[4,4] y) { wd = DequantizeLinear(w, s) y = MatMul(x, wd) }",
        {"w": onnx.helper.make_tensor("w", onnx.TensorProto.INT2, [16, 4], b"\x05" * 16, raw=True)},
    ),
    "int4-odd": (
        "y",
        "g (float[4,15] x) => (float[4,8] y) { wd = DequantizeLinear(w, s) y = Gemm <transB=1> (x, wd) }",
        {"w": int4(np.ones((8, 15)))},
    ),
    "gemm-alpha": (
        "y",
        """g (float[4,16] x) => (float[4,8] y) {
        q = QuantizeLinear(x, s, h)
        d = DequantizeLinear(q, s, h)
        wd = DequantizeLinear(w, s, z)
        y = Gemm <transB=1, alpha=0.5> (d, wd) }""",
        {"w": np.ones((8, 16), np.int8)},
    ),
}


@pytest.mark.parametrize("rule", OPENVINO)
def test_a_rule_of_openvino_finds_its_violation_and_no_other_rule_does(rule):
    node, text, constants = OPENVINO[rule]
    tensor = constants["w"] if isinstance(constants["w"], onnx.TensorProto) else None
    model = qdq_model(text, 25, **({"w": np.zeros(1)} if tensor is not None else constants))
    if tensor is not None:
        next(held for held in model.graph.initializer if held.name == "w").CopyFrom(tensor)
    assert [(found.rule, found.node) for found in lint(model, target="openvino").findings] == [(rule, node)]
    assert lint(model, target="generic").findings == []


def test_a_rule_is_planted_for_everything_that_openvino_gets_wrong():
    assert set(OPENVINO) == set(TARGETS["openvino"].rules) - set(VALID)


def test_blocks_that_do_not_fit_are_found():
    model = qdq_model(
        """g (float[4,32] x) => (float[4,8] y) {
        wd = DequantizeLinear <axis=0, block_size=16> (w, ws)
        y = MatMul(x, wd) }""",
        w=int4(np.ones((32, 8))),
        ws=np.ones((3, 8), np.float32),
    )
    assert [(f.rule, f.node) for f in lint(model, target="generic").findings] == [("scale-shape", "wd")]


def test_operands_are_found_behind_nodes_that_arrange():
    model = qdq_model(
        """g (float[4,16] x) => (float[4,32] y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        h = Cast <to=10> (d)
        wd = DequantizeLinear <axis=0> (v, ws, wz)
        wt = Transpose <perm=[1,0]> (wd)
        wh = Cast <to=10> (wt)
        o = MatMul(h, wh)
        y = Cast <to=1> (o) }"""
    )
    (layer,) = Wiring(Model.load(model)).layers
    assert layer.data.dequantizer.node.outputs[0].name == "d"
    assert layer.weight.dequantizer.node.outputs[0].name == "wd"
    assert [node.op for node in layer.weight.through] == ["Cast", "Transpose"]
    assert layer.has_weight
    assert lint(model, target="tensorrt").findings == []


class Batches(CalibrationDataReader):
    def __init__(self, name, images):
        self.left = [{name: image[None]} for image in images]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """The small ResNet, quantized by onnxruntime: UINT8 as it does by itself, and INT8 as TensorRT asks."""
    folder = tmp_path_factory.mktemp("peers")
    return lambda models: _peers(models, folder)


def _peers(models, folder):
    images = np.load(models / "digits_test.npz")["image"][:8]
    paths = {}
    for name, kind, options in (
        ("uint8", QuantType.QUInt8, {}),
        ("int8", QuantType.QInt8, {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}),
    ):
        paths[name] = folder / f"{name}.onnx"
        quantize_static(
            models / "digits_resnet.onnx",
            paths[name],
            Batches("image", images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=kind,
            weight_type=QuantType.QInt8,
            extra_options=options,
        )
    return paths


@pytest.mark.filterwarnings("ignore")
def test_models_of_onnxruntime(models, peers):
    paths = peers(models)
    refused = lint(paths["uint8"], target="tensorrt")
    assert {found.rule for found in refused.findings if found.severity == "error"} == {
        "type",
        "symmetric",
        "bias-float",
    }
    taken = lint(paths["uint8"], target="ort")
    assert {found.rule for found in taken.findings} <= {"saturation", "partly"}
    assert all(layer.on_integers for layer in taken.kernels)
    assert lint(paths["int8"], target="tensorrt", errors_only=True).passed
    slow = lint(paths["int8"], target="ort")
    assert {"int8-data", "relu"} & {found.rule for found in slow.findings}
    explained = {found.node for found in slow.findings}
    assert all(layer.on_integers or layer.node in explained for layer in slow.kernels)


@pytest.mark.parametrize("options", [{}, {"bits": 6}, {"per_channel": False}, {"act_bits": 5}], ids=str)
def test_tensorrt_takes_what_the_tool_writes(models, options):
    images = np.load(models / "digits_test.npz")["image"][:32]
    model = quantize(models / "digits_resnet.onnx", calibrate=images, verify=False, **options).model
    assert lint(model, target="tensorrt").passed
    assert lint(model, target="generic").findings == []
    assert lint(model, target="openvino").findings == []


GEMM = """g (float[4,64] x) => (float[4,16] y) {{
    q = QuantizeLinear(x, s, h)
    {clip}
    d = DequantizeLinear({read}, s, h)
    wd = DequantizeLinear(m, s, z)
    y = MatMul(d, wd) }}"""


@pytest.mark.parametrize(
    ("largest", "clip", "saturates"),
    [(127, "", True), (65, "", True), (63, "", False), (127, "k = Clip(q, low, high)", False)],
    ids=["8 bits", "a bit above 7", "7 bits", "8 bits, 7 bits of data"],
)
def test_saturation_is_found_by_the_weights_and_the_range_of_the_data(largest, clip, saturates, rng):
    weights = rng.integers(-largest, largest + 1, (64, 16)).astype(np.int8)
    weights[4:6, 3] = largest
    model = qdq_model(
        GEMM.format(clip=clip, read="k" if clip else "q"), m=weights, low=np.uint8(64), high=np.uint8(129)
    )
    outcome = lint(model, target="ort")
    assert [layer.kernel for layer in outcome.kernels] == ["MatMulIntegerToFloat"]
    assert [found.rule for found in outcome.findings] == ["saturation"] * saturates
    if largest == 65:
        assert "1 of 16 outputs" in outcome.findings[0].problem
        assert "33150" in outcome.findings[0].problem


@pytest.mark.assets
@pytest.mark.parametrize("name", ["cifar10_resnet20_bn", "imagenet_squeezenet1.1", "kws_dscnn", "ad01_autoencoder_bn"])
def test_weights_alone_pass_every_target(assets, name):
    model = quantize(assets / "models" / f"{name}.onnx", bits=8, round="nearest", verify=False).model
    for target in TARGETS:
        outcome = lint(model, target=target, run=False)
        assert outcome.passed, outcome.findings
