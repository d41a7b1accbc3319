"""Calibration: which samples it takes, what it refuses, and that the same samples give the same thresholds."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from operators import HEAD, with_weights

from onnx_ocs import BadSamples, VerificationFailed, quantize
from onnx_ocs.calibrate import load
from onnx_ocs.cli import main
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.observe import COUNT, START, Observed, observing, taken

CNN = """g (float[N,3,H,W] x) => (float[N,6,A,B] y) {
    a = Conv <pads=[1,1,1,1]> (x, w1)
    b = Relu(a)
    y = Conv <pads=[1,1,1,1]> (b, w2) }"""


def cnn():
    model = onnx.parser.parse_model(f"{HEAD} {CNN}")
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (8, 3, 3, 3)), ("w2", (6, 8, 3, 3))):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    return model


def images(number=24, size=20, seed=0):
    return np.random.default_rng(seed).standard_normal((number, 3, size, size)).astype(np.float32)


def thresholds(result):
    return [row["act_threshold"] for row in result.report["layers"]]


def calibrated(samples, model=None, **options):
    return thresholds(quantize(model or cnn(), calibrate=samples, verify=False, **options))


def test_every_kind_of_samples_gives_the_same_thresholds(tmp_path):
    batch = images()
    np.savez(tmp_path / "a.npz", x=batch)
    np.save(tmp_path / "a.npy", batch)
    (tmp_path / "folder").mkdir()
    for start in range(0, 24, 8):
        np.savez(tmp_path / "folder" / f"{start:02}.npz", x=batch[start : start + 8])
    for start in range(0, 24, 8):
        data = tmp_path / "onnx" / f"test_data_set_{start:02}"
        data.mkdir(parents=True)
        (data / "input_0.pb").write_bytes(onnx.numpy_helper.from_array(batch[start : start + 8]).SerializeToString())
    wanted = calibrated(tmp_path / "a.npz")
    assert all(threshold > 0 for threshold in wanted)
    parts = [batch[start : start + 8] for start in range(0, 24, 8)]
    kinds = [
        tmp_path / "a.npy",
        tmp_path / "folder",
        tmp_path / "onnx",
        batch,
        {"x": batch},
        parts,
        iter(parts),
        ({"x": part} for part in parts),
    ]
    for samples in kinds:
        assert calibrated(samples) == wanted


def test_the_largest_magnitudes_are_those_of_all_values():
    """Whatever the stride: the outlier stands where no sampled position is."""
    batch = images()
    batch[3, 1, 7, 5] = 50
    (first, _) = calibrated(batch, act_clip="none")
    assert first == 50


def test_a_stride_of_one_counts_all_values_and_a_larger_one_nearly_as_well():
    batch = images(16, 64)
    every, some = (calibrated(batch, calibration_stride=stride) for stride in (1, 31))
    np.testing.assert_allclose(some, every, rtol=0.15)
    assert some != every


@pytest.mark.parametrize("stride", [1, 31])
def test_extremes_and_means_are_those_of_all_values(tmp_path, stride):
    """But a minimum that the graph bounds by 0 is looked for only where all values are counted."""
    batch, model = images(), cnn()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.linspace(-40, 40, 8).astype(np.float32), "shift"))
    model.graph.node[0].input.append("shift")  # so that some channels are never 0, and some always
    quantize(model, calibrate=batch, verify=False, calibration_stride=stride, save_stats=tmp_path / "s.npz")
    first, second = load(tmp_path / "s.npz").values()
    model.graph.output.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inner = session.run(["b"], {"x": batch})[0]
    assert inner.min(axis=(0, 2, 3)).max() > 1
    for seen, values in ((first, batch), (second, inner)):
        np.testing.assert_allclose(seen.high, values.max(axis=(0, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(seen.mean, values.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-4)
        low = values.min(axis=(0, 2, 3)) if stride == 1 or values is batch else np.zeros(len(seen.low))
        np.testing.assert_allclose(seen.low, low, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_free_sizes_and_the_batch_leave_as_many_values_to_count(batch):
    """Small samples are counted whole, however many of them run at a time: one value in 61 of these would be few."""
    samples = images(64, size=12) * np.linspace(0.3, 3, 3, dtype=np.float32)[:, None, None]
    every = calibrated(samples, calibration_stride=1)
    np.testing.assert_allclose(calibrated(samples, batch=batch), every, rtol=0.05)


@pytest.mark.parametrize(("rank", "least"), [(3, 61 * 1024), (4, 61 * 1024), (5, 61 * 1024)])
def test_free_sizes_are_counted_as_thinly_as_known_ones(rank, least):
    """Where a sample has values enough, about one in 61 is taken, on all axes together."""
    sides = round((2 * least / 4) ** (1 / (rank - 2)))
    letters = ",".join("HWD"[: rank - 2])
    text = (
        f"g (float[N,4,{letters}] x, float[4,4{',1' * (rank - 2)}] w) => (float[N,4,{letters}] y) {{ y = Conv(x, w) }}"
    )
    model = Model.load(with_weights(onnx.parser.parse_model(f"{HEAD} {text}")))
    tensor = Observed("x", 1 - rank, 4, (None, 4, *(None,) * (rank - 2)))
    session = ort.InferenceSession(observing(model, [tensor], 61).proto.SerializeToString())
    for count in (1, 3):
        feed = {
            START: np.array([5]),
            COUNT: np.array([count]),
            "x": np.zeros((count, 4, *(sides,) * (rank - 2)), np.float32),
        }
        (values,) = session.run([taken(0)], feed)
        share = feed["x"].size / values.size
        assert 61 / 3 < share < 61 * 1.5
        assert values.size >= 1024 * count


def test_an_iterable_is_read_no_further_than_asked():
    read = []

    def endless():
        for seed in itertools.count():
            read.append(seed)
            yield images(2, seed=seed)

    few = calibrated(endless(), calibration_samples=6)
    assert len(read) <= 6
    assert few == calibrated(np.concatenate([images(2, seed=seed) for seed in range(3)]), batch=2)


def test_the_number_of_samples_and_the_batch_are_options(tmp_path):
    batch = images()
    np.save(tmp_path / "a.npy", batch)
    assert calibrated(tmp_path / "a.npy", calibration_samples=8) == calibrated(batch[:8])
    one, all_at_once = (calibrated(batch, batch=size, calibration_stride=1) for size in (1, 24))
    assert one == all_at_once


def test_several_inputs_and_dynamic_shapes():
    text = """g (float[N,4] p, float[N,M] q, float[4,5] w, float[6,5] wq) => (float[N,5] y) {
        s = Constant <value_ints=[6]> ()
        a = MatMul(p, w)
        b = MatMul(q, wq)
        y = Add(a, b) }"""
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))
    rng = np.random.default_rng(0)
    samples = {"p": rng.random((9, 4), np.float32), "q": 2 * rng.random((9, 6), np.float32)}
    first, second = calibrated(samples, model, act_clip="none")
    assert first == samples["p"].max()
    assert second == samples["q"].max()


@pytest.mark.parametrize("options", [{}, {"act_bits": None}, {"round": "nearest", "act_bits": None}])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_sample(tmp_path, value, options):
    batch = images()
    batch[13, 1, 7, 5] = value
    np.save(tmp_path / "a.npy", batch)
    with pytest.raises(BadSamples, match=r"tensor 'x' of .* on sample 13 \(counted from 0\)"):
        quantize(cnn(), tmp_path / "out.onnx", calibrate=tmp_path / "a.npy", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]


def test_a_value_that_becomes_infinite_inside_is_named(tmp_path):
    model = cnn()
    model.graph.node[1].op_type = "Exp"
    batch = images()
    batch[5] = 100
    with pytest.raises(BadSamples, match=r"tensor 'b' of .* on sample 5 "):
        quantize(model, calibrate=batch)


def test_values_whose_sums_overflow_are_told_as_that():
    with pytest.raises(BadSamples, match="overflowing values in tensor 'x'"):
        quantize(cnn(), calibrate=np.abs(images()) * np.float32(1e37))


def test_statistics_are_saved_and_used_again(tmp_path):
    stats = tmp_path / "stats.npz"
    options = {"act_bits": 6, "act_ratio": 0.2, "round": "compensated", "bias_correction": False}
    first = quantize(cnn(), tmp_path / "a.onnx", calibrate=images(), save_stats=stats, verify=False, **options)
    second = quantize(cnn(), tmp_path / "b.onnx", stats=stats, verify=False, **options)
    assert thresholds(first) == thresholds(second)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    other = cnn()
    weight = onnx.numpy_helper.to_array(other.graph.initializer[0]) * 2
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w1"))
    with pytest.raises(BadSamples, match="statistics of another model"):
        quantize(other, stats=stats)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_file_without_statistics_is_refused(tmp_path, content):
    (tmp_path / "stats.npz").write_bytes(content)
    with pytest.raises(BadSamples, match=r"stats\.npz"):
        quantize(cnn(), stats=tmp_path / "stats.npz")
    with pytest.raises(BadSamples, match=r"missing\.npz: cannot be read"):
        quantize(cnn(), stats=tmp_path / "missing.npz")


def test_statistics_whose_arrays_do_not_fit_together_are_refused(tmp_path):
    quantize(cnn(), calibrate=images(), save_stats=tmp_path / "stats.npz", verify=False, round="nearest")
    with np.load(tmp_path / "stats.npz") as stored:
        arrays = dict(stored)
    arrays["0.low"] = arrays["0.low"][:-1]
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(BadSamples, match="holds no statistics"):
        quantize(cnn(), stats=tmp_path / "stats.npz")


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({"z": images()}, "the given samples.*no array for input 'x'"),
        (images().astype(np.float64), "takes float32, not float64"),
        (images()[:, :2], "takes shape"),
        ([], "the given samples are none"),
        (images().astype(">f4"), "not float32 of the other byte order"),
        ([3], "sample 0 is a int"),
        (images(0), "no samples"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path, samples, words):
    with pytest.raises(BadSamples, match=words):
        quantize(cnn(), tmp_path / "out.onnx", calibrate=samples)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_verified_on_the_samples_it_was_calibrated_by():
    found = quantize(cnn(), calibrate=images(100)).report["verification"]
    assert (found["samples"], found["generated"]) == (64, False)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_same_samples_give_the_same_bytes_whatever_the_number_of_threads(tmp_path, threads):
    np.savez(tmp_path / "a.npz", x=images())
    onnx.save(cnn(), tmp_path / "in.onnx")
    command = [sys.executable, "-m", "onnx_ocs", "in.onnx", "out.onnx", "--calibrate", "a.npz", "--no-verify", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    cores = os.sched_getaffinity(0)
    try:
        if threads == "1":
            os.sched_setaffinity(0, {min(cores)})
        subprocess.run(command, cwd=tmp_path, check=True, env=environment)
    finally:
        os.sched_setaffinity(0, cores)
    here = quantize(tmp_path / "in.onnx", tmp_path / "here.onnx", calibrate=tmp_path / "a.npz", verify=False)
    assert here.path is not None
    assert (tmp_path / "out.onnx").read_bytes() == here.path.read_bytes()


def test_memory_does_not_grow_with_the_samples(tmp_path):
    """64 and 512 samples of 120 KB: the process that observes holds a batch at a time."""

    def peak(number):
        np.save(tmp_path / "a.npy", images(number, 100))
        code = "from onnx_ocs import quantize; quantize('in.onnx', calibrate='a.npy', verify=False)"
        probe = (
            "import resource, subprocess, sys\n"
            "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        onnx.save(cnn(), tmp_path / "in.onnx")
        command = [sys.executable, "-c", probe, code]
        return int(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout)

    assert peak(512) < 1.15 * peak(64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--act-bits", "8"], "act-bits needs samples"),
        (["--act-bits", "9", "--calibrate", "a.npz"], "act-bits must be none or one of 2, 3"),
        (["--act-bits", "8", "--act-clip", "best", "--calibrate", "a.npz"], "clip must be one of"),
        (["--act-ratio", "-1", "--calibrate", "a.npz"], "act-ratio must be from 0 to 1"),
        (["--act-split", "sometimes"], "invalid choice: 'sometimes'"),
        (["--act-split", "dynamic"], "activations stay float without act-bits"),
        (["--act-split", "dynamic", "--act-bits", "6", "--float"], "a float model has none"),
        (["--calibrate", "a.npz", "--batch", "0"], "batch must be a whole number of at least 1"),
        (["--calibrate", "a.npz", "--calibration-samples", "-3"], "calibration-samples must be"),
        (["--calibrate", "a.npz", "--stats", "b.npz"], "give one of them"),
        (["--save-stats", "b.npz"], "give samples"),
        (["--calibrate", "a.npz", "--act-bits", "none", "--save-stats", "b.npz"], "with these options there is none"),
        (["--calibrate", "a.npz", "--save-stats", "a.npz"], "are the same file"),
        (["--calibrate", "out.onnx"], "are the same file"),
        (["--act-clip", "best", "--act-bits", "8", "--calibrate", "a.npz"], "act-clip must be one of"),
        (["--quantize-ops", "Conv,Relu"], "quantize-ops must be among"),
    ],
)
def test_wrong_usage_is_told_with_the_valid_choices(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    onnx.save(cnn(), "in.onnx")
    with pytest.raises(SystemExit) as ended:
        main(["in.onnx", "out.onnx", *arguments])
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"save_stats": "in.onnx"}, "save_stats and source"),
        ({"save_stats": "out.onnx"}, "save_stats and destination"),
        ({"report": "a.npy"}, "report and calibrate"),
        ({"destination": "a.npy"}, "destination and calibrate"),
        ({"destination": "i.npz", "inputs": "i.npz"}, "destination and inputs"),
        ({"calibrate": ".", "destination": None, "report": "r.json"}, "report, r.json, is in the folder of calibrate"),
    ],
)
def test_no_file_that_is_read_or_written_is_overwritten(tmp_path, monkeypatch, options, names):
    monkeypatch.chdir(tmp_path)
    onnx.save(cnn(), "in.onnx")
    np.save("a.npy", images())
    np.savez("i.npz", x=images())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"^{names}"):
        quantize("in.onnx", **{"destination": "out.onnx", "calibrate": "a.npy", **options})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    quantize("in.onnx", "in.onnx", calibrate="a.npy", round="nearest")  # the model itself may be replaced


@pytest.mark.parametrize("path", ["missing.npz", "text.npz"])
def test_unusable_samples_end_with_status_3(tmp_path, capsys, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    onnx.save(cnn(), "in.onnx")
    (tmp_path / "text.npz").write_text("no archive")
    assert main(["in.onnx", "out.onnx", "--calibrate", path]) == 3
    assert path in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.onnx", "text.npz"]


def test_the_recipe_of_a_report_runs_again_to_the_same_bytes(tmp_path, capsys):
    source, report, samples = tmp_path / "in.onnx", tmp_path / "r.json", tmp_path / "a.npy"
    onnx.save(cnn(), source)
    np.save(samples, images())
    options = ["--act-bits", "5", "--act-clip", "aciq", "--act-ratio", "0.1", "--bits", "6", "-q"]
    common = ["--calibrate", str(samples)]
    assert main([str(source), str(tmp_path / "a.onnx"), *options, *common, "--report", str(report)]) == 0
    assert main([str(source), str(tmp_path / "b.onnx"), "--recipe", str(report), *common, "-q"]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    recipe = json.loads(report.read_text())["recipe"]
    assert (recipe["act_bits"], recipe["act_clip"], recipe["act_ratio"]) == (5, "aciq", 0.1)


def test_the_table_tells_what_became_of_the_data(tmp_path, capsys):
    onnx.save(cnn(), tmp_path / "in.onnx")
    np.save(tmp_path / "a.npy", images())
    assert main([str(tmp_path / "in.onnx"), str(tmp_path / "o.onnx"), "--calibrate", str(tmp_path / "a.npy")]) == 0
    shown = capsys.readouterr().out
    assert "activations" in shown
    assert "2 of 2 on 8 bits" in shown


def test_only_the_asked_operators_are_quantized():
    text = """g (float[N,6] x, float[6,5] w1, float[5,4] w2) => (float[N,4] y) {
        a = Gemm(x, w1)
        y = MatMul(a, w2) }"""
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))
    batch = np.random.default_rng(0).random((8, 6), np.float32)
    report = quantize(model, calibrate=batch, quantize_ops=("Gemm",), verify=False).report
    assert [(row["op"], row["status"] != "declined") for row in report["layers"]] == [("Gemm", True), ("MatMul", False)]


def tokens_model():
    """Channels last, and no size known but theirs."""
    text = "g (float[N,T,8] x, float[8,6] w) => (float[N,T,6] y) { y = MatMul(x, w) }"
    return with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))


@pytest.mark.parametrize("number", [4, 64])
def test_few_tokens_are_all_counted(number):
    batch = np.random.default_rng(0).standard_normal((number, 4, 8)).astype(np.float32)
    (some,), (every,) = (calibrated(batch, tokens_model(), calibration_stride=stride) for stride in (31, 1))
    assert some == pytest.approx(every, rel=0.05)


def test_an_output_that_is_all_zero_passes_with_channels_split_by_batch():
    model = cnn()
    model.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(np.zeros((6, 8, 3, 3), np.float32), "w2"))
    quantize(model, act_bits=8, act_split="dynamic", act_ratio=0.1)
    text = "g (float[N,8,H,W] x, float[16,8,3,3] w) => (float[N,16,A,B] y) <float z = {0}>"
    zero = with_weights(onnx.parser.parse_model(f"{HEAD} {text} {{ q = Mul(x, z) y = Conv(q, w) }}"))
    quantize(zero, act_bits=8, act_split="dynamic", act_ratio=0.1)


def test_data_that_is_zero_on_all_samples_can_be_split_and_clipped():
    result = quantize(cnn(), calibrate=np.zeros((4, 3, 8, 8), np.float32), act_ratio=0.3, verify=False)
    assert thresholds(result) == [0, 0]


@pytest.mark.parametrize("bits", [2, 7, 8])
@pytest.mark.parametrize("clip", ["mse", "aciq", "kl", "sawb"])
def test_unsigned_grids_take_every_clip_method(clip, bits):
    result = quantize(cnn(), calibrate=images(), act_unsigned=True, act_clip=clip, act_bits=bits, min_sqnr=-10)
    assert [row["act_unsigned"] for row in result.report["layers"]] == [False, True]


def test_a_gemm_whose_data_has_no_known_rank_is_calibrated():
    text = """g (float[K,3] x, int64[R] s, float[8,6] w) => (float[A,B] y) {
        r = Reshape(x, s)
        y = Gemm <transA=1> (r, w) }"""
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))
    batch = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    (found,) = calibrated([{"x": batch, "s": np.array([8, 3])}], model, act_clip="none")
    assert found == np.abs(batch).max()


def test_statistics_are_not_kept_where_the_result_does_not_pass(tmp_path):
    with pytest.raises(VerificationFailed):
        quantize(cnn(), tmp_path / "out.onnx", calibrate=images(), save_stats=tmp_path / "s.npz", min_sqnr=190)
    assert list(tmp_path.iterdir()) == []


def test_samples_and_statistics_together_are_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        quantize(cnn(), calibrate=images(), stats=tmp_path / "s.npz")
    with pytest.raises(BadSamples, match="not a int"):
        quantize(cnn(), calibrate=5)


def test_samples_that_are_not_used_are_told():
    result = quantize(
        cnn(), calibrate=images(), act_bits=6, act_split="dynamic", round="nearest", bias_correction=False
    )
    assert any("none were gathered or used" in note for note in result.report["notes"])


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"act_clip": "kl", "act_unsigned": True}, "--act-clip, --act-unsigned"),
        (
            {"calibration_samples": 5, "batch": 3, "calibration_stride": 2},
            "--calibration-stride, --calibration-samples, --batch",
        ),
        ({"act_bits": 8, "act_split": "dynamic", "act_unsigned": True}, "--act-unsigned"),
        ({"calibrate": images(), "act_clip": "kl", "calibration_stride": 2}, None),
    ],
)
def test_options_that_do_nothing_are_told(options, idle):
    notes = quantize(cnn(), verify=False, round="nearest", **options).report["notes"]
    found = [note for note in notes if note.startswith("without effect here: ")]
    assert found == ([] if idle is None else [f"without effect here: {idle}"])


def test_a_recipe_for_weights_gets_eight_bit_activations_with_samples():
    recipe = quantize(cnn(), bits=6, verify=False).report["recipe"]
    assert recipe["act_bits"] is None
    report = quantize(cnn(), recipe=recipe, calibrate=images(), verify=False).report
    assert (report["recipe"]["bits"], report["recipe"]["act_bits"]) == (6, 8)
    kept = quantize(cnn(), recipe=recipe, calibrate=images(), act_bits=None, verify=False).report
    assert kept["recipe"]["act_bits"] is None


def test_a_split_float_model_claims_no_quantized_activations():
    report = quantize(cnn(), float=True, act_ratio=0.2, calibrate=images(), first="same").report
    assert [(row["act_bits"], row["act_extra"]) for row in report["layers"]] == [(None, 0), (None, 2)]
    assert "calibrate" not in quantize(cnn(), float=True, calibrate=images()).report["seconds"]


def test_layers_that_statistics_do_not_cover_are_told(tmp_path):
    quantize(cnn(), calibrate=images(), save_stats=tmp_path / "s.npz", only="^y$", verify=False)
    report = quantize(cnn(), stats=tmp_path / "s.npz", verify=False).report
    assert any("do not cover the data of 1 layers" in note for note in report["notes"])


def test_other_arrays_beside_the_samples_do_not_matter(tmp_path):
    np.savez(tmp_path / "a.npz", x=images(), label=np.zeros(3, np.int64), names=np.array(["a", None], object))
    assert calibrated(tmp_path / "a.npz") == calibrated(images())


@pytest.mark.parametrize(("option", "kept"), [({"skip": "^a$"}, "a"), ({"only": "^y$"}, "a")])
def test_a_layer_without_a_name_is_known_by_the_same_name_after_folding(option, kept):
    text = """g (float[N,3,H,W] x, float[6,3,3,3] w1, float[6] ws, float[6] wt, float[6] wm,
        float[6] v, float[4,6,3,3] w2)
        => (float[N,4,A,B] y) {
        a = Conv(x, w1)
        b = BatchNormalization(a, ws, wt, wm, v)
        y = Conv(b, w2) }"""
    model = with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(6, np.float32), "v"))
    model.graph.input.remove(next(value for value in model.graph.input if value.name == "v"))
    result = quantize(model, calibrate=images(), verify=False, **option)
    status = {row["name"]: row["status"] for row in result.report["layers"]}
    assert status[kept] == "declined"
    assert status["y"] != "declined"
    assert "BatchNormalization" in {node.op_type for node in result.model.graph.node}
    both = quantize(model, calibrate=images(), verify=False)
    assert {row["name"] for row in both.report["layers"]} == {"a", "y"}
    assert all(row["act_bits"] == 8 for row in both.report["layers"])
