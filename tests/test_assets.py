"""Trained models and graphs that nobody here wrote; skipped where the folder is missing."""

import csv
import zipfile

import numpy as np
import onnxruntime as ort
import pytest

from onnx_ocs import UnsupportedModel, quantize, split
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.model import Model

pytestmark = pytest.mark.assets

MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)


def classes(model, batch):
    session = ort.InferenceSession(model.SerializeToString())
    name = session.get_inputs()[0].name
    return session.run(None, {name: batch})[0].argmax(axis=1)


@pytest.mark.parametrize(
    ("ratio", "options", "method"),
    [(0, {}, "none"), (0.1, {}, "qa"), (0.1, {"split": "naive"}, "naive"), (0.1, {"clip": "mse"}, "qa+mse")],
    ids=["none", "qa", "naive", "qa+mse"],
)
@pytest.mark.parametrize("bits", [4, 3])
def test_the_emitted_resnet_has_the_accuracy_of_an_independent_implementation(assets, bits, ratio, options, method):
    data = np.load(assets / "data" / "cifar10.npz")
    batch = (data["test_x"].astype(np.float32) / 255 - MEAN) / DEVIATION
    source = assets / "models" / "cifar10_resnet20.onnx"
    model = quantize(source, preset="paper", bits=bits, ratio=ratio, verify=False, **options).model
    found = 100 * np.mean(classes(model, batch) == data["test_y"])
    rows = csv.DictReader((assets.parent / "reference" / "resnet20_weight_only.csv").read_text().splitlines())
    key = (str(bits), ratio, method)
    wanted = next(row for row in rows if (row["weight_bits"], float(row["ratio"]), row["method"]) == key)
    assert found == pytest.approx(float(wanted["top1_846"]), abs=2 if "mse" in method else 0.6)


@pytest.mark.parametrize("name", ["ad01_autoencoder_bn", "cifar10_resnet20_bn", "kws_dscnn", "silero_vad"])
def test_every_layer_with_channels_to_choose_from_is_split(assets, name):
    report = split(assets / "models" / f"{name}.onnx", ratio=0.25).report
    assert report["verification"]["split"]["max_rel_error"] < 1e-5
    allowed = ("depthwise", "one input channel", "channels or fewer", "run time", "not covered yet")
    for row in report["layers"]:
        assert row["status"] == "split" or any(reason in row["reason"] for reason in allowed), row


def test_a_corpus_graph_that_nothing_edits_keeps_its_proto(assets, tmp_path):
    """Every ninth graph of the corpus: load, commit without edits, save."""
    with zipfile.ZipFile(assets / "corpus" / "corpus.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".onnx")][::9]
        archive.extractall(tmp_path)
    kept = 0
    for name in names:
        try:
            model = Model.load(tmp_path / name)
            model.nbytes()
        except UnsupportedModel:
            continue
        before = model.whole()
        Editor(model).commit()
        assert model.whole() == before, name
        kept += 1
    assert kept > 0.9 * len(names)
