"""Table 1 of the paper on the trained ResNet-20: ``python benchmarks/table1.py``.

Weights only, ``--preset paper``, on CIFAR-10: bits x ratio x {naive, qa} x {none, mse}. Every figure is that of the
emitted model run by onnxruntime: top-1 on the 846 test images, and agreement with the float model's top-1 on all 5,506
images. Beside it stand the figures of an independent implementation (``reference/resnet20_weight_only.csv``) and those
of the paper's own ResNet-20. Exit status 1 where a figure is further from the independent ones than it may be:
0.5 points of agreement and 0.6 of top-1, or 2 points with ``mse``, whose candidates may differ.
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
from common import assets
from numpy.typing import NDArray

from onnx_ocs import quantize

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
METHODS = {
    "none": {"split": "qa", "clip": "none"},
    "mse": {"split": "qa", "clip": "mse"},
    "naive": {"split": "naive", "clip": "none"},
    "qa": {"split": "qa", "clip": "none"},
    "naive+mse": {"split": "naive", "clip": "mse"},
    "qa+mse": {"split": "qa", "clip": "mse"},
}
UNSPLIT = ("none", "mse")


def images() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All images as the model takes them, those of the test set first, and the labels of these."""
    data = np.load(assets() / "data" / "cifar10.npz")
    pixels = np.concatenate([data["test_x"], data["train_x"]]).astype(np.float32) / 255
    mean, deviation = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels - mean) / deviation, data["test_y"].astype(np.int64)


def classes(model: Path, batch: NDArray[np.float32]) -> NDArray[np.int64]:
    """The class with the largest score of each image."""
    session = ort.InferenceSession(str(model))
    name = session.get_inputs()[0].name
    parts = np.array_split(batch, max(1, len(batch) // 256))
    return np.concatenate([session.run(None, {name: part})[0].argmax(axis=1) for part in parts])


def reference(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((assets().parent / "reference" / name).open()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[6, 5, 4, 3])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.2])
    arguments = parser.parse_args()
    model = assets() / "models" / "cifar10_resnet20.onnx"
    independent = {
        (row["weight_bits"], float(row["ratio"]), row["method"]): (float(row["top1_846"]), float(row["agreement_5506"]))
        for row in reference("resnet20_weight_only.csv")
    }
    paper = {
        (row["weight_bits"], float(row["ratio"]), method): row[f"{method}_top1"]
        for row in reference("table1_resnet20_cifar10_qa_vs_naive.csv")
        for method in ("qa", "naive")
    }
    batch, label = images()
    wanted = classes(model, batch)
    print(f"float model: top-1 {np.mean(wanted[: len(label)] == label):.2%}\n")
    print("| bits | ratio | method | top-1 | agreement | independent: top-1 | agreement | paper: top-1 |")
    print("|---|---|---|---|---|---|---|---|")
    far = 0
    for bits in arguments.bits:
        for ratio in [0.0, *arguments.ratios]:
            for method, options in METHODS.items():
                if (ratio == 0) != (method in UNSPLIT):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    target = Path(folder, "out.onnx")
                    quantize(model, target, preset="paper", bits=bits, ratio=ratio, verify=False, **options)
                    found = classes(target, batch)
                top1 = 100 * float(np.mean(found[: len(label)] == label))
                agreement = 100 * float(np.mean(found == wanted))
                key = (str(bits), ratio, method)
                other = independent.get(key)
                if other:
                    within = (2.0, 2.0) if "mse" in method else (0.6, 0.5)
                    far += abs(top1 - other[0]) > within[0] or abs(agreement - other[1]) > within[1]
                beside = f"{other[0]:.2f} | {other[1]:.2f}" if other else " | "
                own = f"{bits} | {ratio:g} | {method} | {top1:.2f} | {agreement:.2f}"
                print(f"| {own} | {beside} | {paper.get(key, '')} |", flush=True)
    print(f"\n{far} figures further from the independent ones than they may be")
    return int(bool(far))


if __name__ == "__main__":
    sys.exit(main())
