"""Made-up samples: their statistics, their seed, and what a model that is calibrated on them says."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_ocs import quantize
from onnx_ocs.numerics.natural import natural_images


def test_pictures_have_the_spectrum_and_the_edges_of_natural_images():
    images = natural_images(24, 3, (64, 64), np.random.default_rng(0))
    assert images.shape == (24, 3, 64, 64)
    assert images.mean() == pytest.approx(0, abs=1e-9)
    assert images.std() == pytest.approx(1)
    power = np.mean(np.abs(np.fft.fft2(images)) ** 2, axis=(0, 1))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    band = (frequency > 0.03) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert -2.8 < slope < -1.6  # two, and more where the smallest leaves end
    steps = np.diff(images, axis=3)
    kurtosis = np.mean(steps**4) / np.mean(steps**2) ** 2
    assert kurtosis > 6  # flat regions and edges; 3 for noise of any spectrum
    colours = np.corrcoef(images[:, 0].reshape(-1), images[:, 1].reshape(-1))[0, 1]
    assert 0.8 < colours < 0.97


def test_the_seed_makes_the_pictures():
    first, again, other = (natural_images(2, 1, (16, 20), np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_model_is_calibrated_on_them_and_the_report_says_so(command, models, tmp_path):
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    options = ["--synthetic", "16", "--report", report]
    status, shown, _ = command(models / "digits_resnet.onnx", out, *options)
    assert status == 0
    assert "synthetic" in shown
    found = json.loads(report.read_text())
    assert found["recipe"]["synthetic"] == 16
    assert any("16 synthetic samples" in note for note in found["notes"])
    assert found["verification"]["generated"] is True
    assert {row["act_bits"] for row in found["layers"]} == {8}
    assert {row["round"] for row in found["layers"]} == {"synthetic"}
    assert not any(row["bias_corrected"] for row in found["layers"])
    again = tmp_path / "again.onnx"
    assert command(models / "digits_resnet.onnx", again, "--recipe", report, "-q")[0] == 0
    assert again.read_bytes() == out.read_bytes()


def test_they_are_made_of_the_types_and_shapes_of_the_inputs():
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,12,12,3] image, int64[N] which, float[10,27] table, float[27,4] w) => (float[N,4] y)
        <int64[2] shape = {-1, 432}, int64[1] start = {0}, int64[1] stop = {27}, int64[1] axis = {1}> {
            f = Reshape(image, shape)
            c = Slice(f, start, stop, axis)
            e = Gather(table, which)
            s = Add(c, e)
            y = MatMul(s, w) }"""
    )
    rng = np.random.default_rng(0)
    for name, size in (("table", (10, 27)), ("w", (27, 4))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.random(size).astype(np.float32), name))
    del model.graph.input[2:]
    report = quantize(model, synthetic=8).report
    (row,) = report["layers"]
    assert row["act_bits"] == 8


@pytest.mark.parametrize("more", [{"calibrate": np.zeros((1, 1, 8, 8), np.float32)}, {"synthetic": 0}])
def test_they_are_for_want_of_real_ones(more, models):
    with pytest.raises(ValueError, match="synthetic"):
        quantize(models / "digits_resnet.onnx", **{"synthetic": 4, **more})
