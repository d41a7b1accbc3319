"""Trained models and graphs that nobody here wrote; skipped where the folder is missing."""

import csv
import zipfile

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnx_ocs import UnsupportedModel, quantize, split
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.model import Model
from onnx_ocs.numerics.compare import Difference

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


@pytest.mark.parametrize(
    "name",
    [
        "ad01_autoencoder_bn",
        "cifar10_resnet20",
        "cifar10_resnet20_bn",
        "cifar10_vit_ibp_3_3_8",
        "imagenet_squeezenet1.1",
        "kws_dscnn",
        "silero_vad",
        "vww_mobilenetv1_0.25_96_bn",
    ],
)
def test_folded_and_gathered_copies_give_the_outputs_of_the_source(assets, name):
    for fold in ("always", "never"):
        for fold_bn in (True, False):
            report = split(assets / "models" / f"{name}.onnx", ratio=0.1, fold=fold, fold_bn=fold_bn).report
            assert report["verification"]["split"]["max_rel_error"] < 1e-5
            copies = {row["copies"] for row in report["layers"] if row.get("copies")}
            assert copies <= ({"gathered"} if fold == "never" else {"gathered", "folded"})


@pytest.mark.parametrize(("name", "size"), [("cifar10_resnet20", 32), ("imagenet_squeezenet1.1", 224)])
def test_most_layers_are_split_for_onnxruntime_and_all_run_on_integers(assets, name, size, tmp_path):
    images = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    source, target = assets / "models" / f"{name}.onnx", tmp_path / "out.onnx"
    given = {"target": "ort", "ratio": 0.02, "calibrate": images, "round": "nearest", "verify": False}
    rows = quantize(source, target, **given).report["layers"]
    assert sum(row["status"] == "split" for row in rows) > 0.5 * len(rows)
    for row in rows:
        if row["extra"]:
            assert (row["channels"] + row["extra"]) % 4 == 0
            assert row["extra"] <= 0.25 * row["channels"]
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert not {"Conv", "FusedConv", "Gemm"} & set(found)
    assert found.count("QLinearConv") + found.count("QGemm") == len(rows)


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


def cifar10(assets, part):
    return (np.load(assets / "data" / "cifar10.npz")[f"{part}_x"].astype(np.float32) / 255 - MEAN) / DEVIATION


def scores(model, images, batch):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model if isinstance(model, str) else model.SerializeToString(), options)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: images[i : i + batch]})[0] for i in range(0, len(images), batch)])


def divergence(reference, found):
    difference = Difference("scores")
    difference.add(reference, found)
    return difference.summary()["kl_divergence"]


def test_eight_bit_weights_and_activations_lose_next_to_nothing(assets):
    source = assets / "models" / "cifar10_resnet20.onnx"
    model = quantize(source, bits=8, calibrate=cifar10(assets, "train")[:128], verify=False).model
    images, labels = cifar10(assets, "test"), np.load(assets / "data" / "cifar10.npz")["test_y"]
    reference, found = (scores(which, images, 128).argmax(axis=1) for which in (str(source), model))
    assert np.mean(found == labels) > np.mean(reference == labels) - 0.005
    assert np.mean(found == reference) > 0.985


def test_clipped_activations_hold_out_longer_and_static_splitting_helps_little(assets):
    """The order of Table 3 of the paper at 4 bits, on the test images."""
    source, images = assets / "models" / "cifar10_resnet20.onnx", cifar10(assets, "test")
    reference = scores(str(source), images, 128).argmax(axis=1)
    found = {}
    for name, options in {"none": {}, "mse": {"act_clip": "mse"}, "split": {"act_ratio": 0.02}}.items():
        options = {"act_clip": "none", **options, "bits": None, "act_bits": 4}
        model = quantize(source, calibrate=cifar10(assets, "train")[:256], verify=False, **options).model
        found[name] = np.mean(scores(model, images, 128).argmax(axis=1) == reference)
    assert found["mse"] > 0.92
    assert found["none"] < 0.85
    assert abs(found["split"] - found["none"]) < 0.03


@pytest.mark.parametrize("batch", [1, 8])
def test_oracle_splitting_beats_the_scale_of_each_batch(assets, batch):
    source, images = assets / "models" / "cifar10_resnet20.onnx", cifar10(assets, "test")[:400]
    reference = scores(str(source), images, 128)
    options = {"bits": None, "act_bits": 6, "act_split": "dynamic", "verify": False}
    plain, split = (quantize(source, act_ratio=ratio, **options).model for ratio in (0, 0.02))
    assert divergence(reference, scores(split, images, batch)) < divergence(reference, scores(plain, images, batch))
