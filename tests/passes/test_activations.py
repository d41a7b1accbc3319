"""Activations of every operator row, static and by batch, through onnxruntime with optimizations on and off."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import operators
import pytest
from operators import HEAD, ROWS, UNSPLIT, row_model, with_weights

from onnx_ocs import lint, quantize, split

INSIDE = {"Loop body", "Scan body", "function"}
"""Rows whose data is made inside of a body or function, where calibration does not see it."""

GROUPED = {"Conv grouped", "ConvTranspose grouped"}

OPTIONS = {
    "static": {},
    "static split": {"act_ratio": 0.3},
    "static naive split": {"act_ratio": 0.3, "split": "naive"},
    "unsigned": {"act_unsigned": True},
    "ort": {"target": "ort"},
    "ort split": {"target": "ort", "act_ratio": 0.3},
    "tensorrt": {"target": "tensorrt"},
    "openvino": {"target": "openvino"},
    "by batch": {"act_split": "dynamic"},
    "by batch split": {"act_split": "dynamic", "act_ratio": 0.3},
    "by batch naive split": {"act_split": "dynamic", "act_ratio": 0.3, "split": "naive"},
}


PLAIN = {"round": "nearest", "bias_correction": False}
"""The samples are for activations alone; test_roundings.py has the same rows with weights rounded by them."""


def feed(model, seed=1):
    """Random values for each input, the first channel larger than the others."""
    made = operators.feed(model, seed)
    for values in made.values():
        if values.dtype.kind == "f" and values.ndim > 1:
            values[:, 0] *= 3
    return made


def run(model, inputs, optimize=True):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, inputs)


def sqnr(wanted, found):
    noise = np.square(np.asarray(found, np.float64) - wanted).sum()
    return 10 * np.log10(np.square(np.asarray(wanted, np.float64)).sum() / max(noise, 1e-30))


def quantized(model, **options):
    calibrate = {} if "act_split" in options else {"calibrate": [feed(model, seed) for seed in range(4)]}
    common = {"first": "same", "act_clip": "none", "act_bits": 8, "verify": False, **PLAIN}
    return quantize(model, **calibrate, **{**common, **options})


CASES = {
    f"{name}-{bits}": (options, bits)
    for name, options in OPTIONS.items()
    for bits in ([7] if "target" in options else [None, 7])
}


@pytest.mark.parametrize(("options", "bits"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ROWS)
def test_eight_bit_data_keeps_the_outputs(name, options, bits):
    """Weights of 7 bits, which saturate on no CPU; the first channel is beyond 8 bits of the other channels."""
    model = row_model(name)
    result = quantized(model, bits=bits, ratio=0.2, **options)
    (row, *_) = result.report["layers"]
    if name in INSIDE and "act_split" not in options:
        assert row["act_bits"] is None
        assert "inside of a body or function" in row["act_reason"]
        return
    assert row["act_bits"] == 8
    splits = "act_ratio" in options and name not in UNSPLIT and not (name in GROUPED and "act_split" in options)
    assert bool(row["act_extra"]) == splits
    inputs = feed(model)
    wanted, found, plain = run(model, inputs), run(result.model, inputs), run(result.model, inputs, optimize=False)
    for before, after, unoptimized in zip(wanted, found, plain, strict=True):
        assert sqnr(before, after) > 25
        assert sqnr(unoptimized, after) > min(sqnr(before, after) + 10, 100)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ROWS)
def test_what_is_written_for_tensorrt_passes_its_lint(name, bits):
    result = quantized(row_model(name), target="tensorrt", bits=bits, ratio=0.2)
    outcome = lint(result.model, target="tensorrt")
    assert not [found for found in outcome.findings if found.severity == "error"]


@pytest.mark.parametrize(("split_by", "how"), [("static", "qa"), ("static", "naive"), ("dynamic", "qa")])
@pytest.mark.parametrize("name", ROWS)
def test_splitting_data_alone_keeps_the_function(name, how, split_by):
    """The model before it is quantized, as verification sees it."""
    model = row_model(name)
    result = quantize(
        model,
        bits=7,
        ratio=0.2,
        act_bits=8,
        act_ratio=0.3,
        act_split=split_by,
        split=how,
        first="same",
        **PLAIN,
        **({"calibrate": [feed(model)]} if split_by == "static" else {}),
    )
    found = result.report["verification"]
    assert ("split" in found) == (name not in UNSPLIT)
    if "split" in found:
        assert found["split"]["max_rel_error"] < (5e-3 if "float16" in ROWS[name] else 5e-6)


def test_float_models_get_static_splits_of_data():
    model = row_model("Conv 2-D")
    result = split(model, ratio=0, act_ratio=0.3, first="same", calibrate=[feed(model)])
    ops = [node.op_type for node in result.model.graph.node]
    assert ops == ["Gather", "Mul", "Add", "Conv"]
    (row,) = result.report["layers"]
    assert row["act_source"] == [*range(8), *row["act_source"][8:]]
    assert row["act_source"][8:][0] == 0  # the channel made larger
    np.testing.assert_allclose(run(result.model, feed(model))[0], run(model, feed(model))[0], atol=1e-4)


GRID = "g (float[N,6] x, float[6,6] w) => (float[N,6] y) { y = MatMul(x, w) }"


def identity_model():
    """A layer that passes its data on, so that the output shows the grid of the data."""
    model = onnx.parser.parse_model(f"{HEAD} {GRID}")
    model.graph.input.pop()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(6, dtype=np.float32), "w"))
    return model


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("clip", ["none", "0.5"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_grid_of_the_data_is_as_narrow_as_asked(bits, clip, unsigned, rng):
    values = np.abs(rng.standard_normal((64, 6))).astype(np.float32)
    options = {"bits": None, "act_bits": bits, "act_clip": clip, "act_unsigned": unsigned, "first": "same"}
    result = quantize(identity_model(), calibrate=values, min_sqnr=-5, **options)
    (row,) = result.report["layers"]
    levels = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
    threshold = values.max() * (0.5 if clip == "0.5" else 1)
    assert row["act_threshold"] == pytest.approx(threshold, rel=1e-6)
    wide = np.concatenate([values, -values]) * 2
    found = run(result.model, {"x": wide})[0] / np.float32(threshold / levels)
    low = 0 if unsigned else -128 if bits == 8 else -levels
    np.testing.assert_allclose(found, np.clip(np.round(wide / np.float32(threshold / levels)), low, levels), atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("extra", [0.25, 0.5, 1])
def test_quantization_aware_copies_of_data_sum_to_the_nearest_point(bits, extra, rng):
    """Equation 8 for data: with the offsets two copies of a channel carry what the whole channel would."""
    values = rng.standard_normal((256, 6)).astype(np.float32)
    options = {"bits": None, "act_bits": bits, "act_ratio": extra, "first": "same", "act_clip": "none"}
    result = quantize(identity_model(), calibrate=values, min_sqnr=-5, **options)
    (row,) = result.report["layers"]
    step = row["act_threshold"] / (2 ** (bits - 1) - 1)
    found = run(result.model, {"x": values})[0] / step
    copies = np.bincount(row["act_source"], minlength=6)
    assert copies.sum() == 6 + np.ceil(extra * 6)
    limit = copies * (2 ** (bits - 1) - 1)
    inside = np.abs(values / step) < limit
    wanted = np.floor(values / step + 0.5)
    near_tie = np.abs(values / step + 0.5 - np.round(values / step + 0.5)) < 1e-3
    np.testing.assert_allclose(found[inside & ~near_tie], wanted[inside & ~near_tie], atol=1e-3)


@pytest.mark.parametrize("extra", [0.25, 0.5, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_by_batch_the_graph_splits_as_a_greedy_oracle_would(extra, batch, rng):
    values = rng.standard_normal((batch, 6)).astype(np.float32) * [1, 9, 2, 5, 1, 1]
    values = values.astype(np.float32)
    options = {"bits": None, "act_bits": 5, "act_ratio": extra, "act_split": "dynamic", "first": "same"}
    result = quantize(identity_model(), verify=False, **options)
    peaks, copies = np.abs(values).max(axis=0), np.ones(6, int)
    for _ in range(int(np.ceil(extra * 6))):
        copies[np.argmax(peaks / copies)] += 1
    step = (peaks / copies).max() / 15
    found = run(result.model, {"x": values})[0] / step
    ideal = values / step
    near_tie = np.abs(ideal + 0.5 - np.round(ideal + 0.5)) < 1e-3
    np.testing.assert_allclose(found[~near_tie], np.floor(ideal + 0.5)[~near_tie], atol=1e-3)


@pytest.mark.parametrize("extra", [0, 0.5])
def test_by_batch_a_batch_of_zeros_gives_zeros(extra):
    options = {"bits": None, "act_bits": 5, "act_ratio": extra, "act_split": "dynamic", "first": "same"}
    result = quantize(identity_model(), verify=False, **options)
    np.testing.assert_array_equal(run(result.model, {"x": np.zeros((3, 6), np.float32)})[0], 0)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 18, 21])
@pytest.mark.parametrize("split_by", ["static", "dynamic"])
def test_the_opset_is_raised_as_far_as_quantized_data_needs_it(opset, split_by):
    text = "g (float[N,8,H,W] x, float[6,8,3,3] w) => (float[N,6,A,B] y) { y = Conv(x, w) }"
    model = with_weights(onnx.parser.parse_model(f'<ir_version: 4, opset_import: ["" : {opset}]> {text}'))
    batch = np.random.default_rng(0).standard_normal((2, 8, 5, 5)).astype(np.float32)
    calibrate = {"calibrate": batch} if split_by == "static" else {}
    result = quantize(model, bits=8, act_bits=6, act_ratio=0.1, act_split=split_by, first="same", **calibrate)
    assert result.model.opset_import[0].version == max(13, opset)
    onnx.checker.check_model(result.model, full_check=True)
    for size in ((1, 4), (5, 9)):  # symbolic sizes still hold
        sample = np.random.default_rng(1).standard_normal((size[0], 8, size[1], 6)).astype(np.float32)
        assert sqnr(run(model, {"x": sample})[0], run(result.model, {"x": sample})[0]) > 15


def test_layers_that_read_the_same_data_share_its_nodes():
    result = quantized(row_model("two layers of one tensor"), bits=None)
    ops = [node.op_type for node in result.model.graph.node]
    assert ops.count("QuantizeLinear") == 1


@pytest.mark.parametrize("clip", ["mse", "aciq", "kl", "sawb", "percentile:99.9", "sigma:4", "0.9", "none"])
@pytest.mark.parametrize("act_ratio", [0, 0.2])
@pytest.mark.parametrize("ratio", [0, 0.2])
def test_splitting_and_clipping_go_together(clip, ratio, act_ratio):
    model = row_model("Conv 2-D")
    options = {"bits": 7, "clip": "mse", "act_clip": clip, "ratio": ratio, "act_ratio": act_ratio, "first": "same"}
    result = quantize(model, act_bits=6, min_sqnr=10, calibrate=[feed(model, s) for s in range(4)], **options)
    (row,) = result.report["layers"]
    assert (row["extra"], row["act_extra"]) == (2 if ratio else 0, 2 if act_ratio else 0)
    assert row["status"] == ("split" if ratio or act_ratio else "quantized")
    total = 8 + row["extra"] + row["act_extra"]
    assert result.report["overhead"] == {"weights": total / 8, "activations": total / 8}
    assert 0 < row["act_threshold"] <= max(np.abs(feed(model, seed)["x"]).max() for seed in range(4))
