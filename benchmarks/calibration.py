"""Time and memory of calibration beside plain inference: ``python benchmarks/calibration.py``.

Each figure is a process of its own that reads the same images from the same file. ``plain`` runs the float model on
them; ``ours`` is the calibration process of the tool; the others are onnxruntime's calibrators. Exit status 1 where a
promise is broken: for SqueezeNet 1.5 times the time of plain inference with sampled histograms and 3 times with all
values; the same peak memory (within 10 %) for 64 and 256 images; 1 GB for the shapes of ResNet-50. The times of
networks as small as ResNet-20 are printed and not promised: there each reduction costs as much as a layer.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from common import measure
from networks import add_options, networks
from speed import resnet50

from onnx_ocs import calibrate
from onnx_ocs.calibrate import STRIDE
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Layer, find_layers
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.observe import observing
from onnx_ocs.graph.predicted import predicted
from onnx_ocs.passes.base import observed, signed

PLAIN = """
import sys
from pathlib import Path
from onnx_ocs.graph.samples import read_samples
from onnx_ocs.graph.session import Session
session = Session(Path(sys.argv[1]))
for batch in read_samples(Path(sys.argv[2]), session.inputs, int(sys.argv[3]), int(sys.argv[4])):
    session.run(batch.feed)
"""

SAMPLED, ALL = f"ours, every {STRIDE}st value", "ours, all values"
QUARTER = f"{SAMPLED}, a quarter of the images"
PROMISED = "SqueezeNet"
OURS = [sys.executable, "-m", "onnx_ocs.calibrate"]

THEIRS = """
import sys, tempfile
from pathlib import Path
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator
from onnx_ocs.graph.samples import read_samples
from onnx_ocs.graph.session import Session
class Reader(CalibrationDataReader):
    def __init__(self):
        inputs = Session(Path(sys.argv[1])).inputs
        self.batches = read_samples(Path(sys.argv[2]), inputs, int(sys.argv[3]), int(sys.argv[4]))
    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else batch.feed
with tempfile.TemporaryDirectory() as folder:
    method = getattr(CalibrationMethod, sys.argv[5])
    ops = ["Conv", "Gemm", "MatMul"]
    made = create_calibrator(sys.argv[1], ops, augmented_model_path=folder + "/a.onnx", calibrate_method=method)
    made.collect_data(Reader())
    made.compute_data()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many counts")
    parser.add_argument("--count", type=int, default=256, help="images")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ours-only", action="store_true", help="without onnxruntime's calibrators")
    arguments = parser.parse_args()
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        for network in networks(arguments):
            samples = Path(folder, "samples.npz")
            images = np.concatenate([network.images, network.calibration])
            while len(images) < arguments.count:
                images = np.concatenate([images, images])
            np.savez(samples, **{_input_name(network.model): images[: arguments.count]})
            for batch in arguments.batches:
                broken += _compare(network.name, network.model, samples, batch, arguments)
        if not arguments.ours_only:
            broken += _large(Path(folder))
    print(f"\n{broken} promises broken")
    return int(bool(broken))


def _compare(name: str, model: Path, samples: Path, batch: int, arguments: argparse.Namespace) -> int:
    count = arguments.count
    kinds = {
        "plain": _plain(model, samples, batch, count),
        SAMPLED: _ours(model, samples, batch, count, STRIDE),
        ALL: _ours(model, samples, batch, count, 1),
        QUARTER: _ours(model, samples, batch, count // 4, STRIDE),
    }
    runs = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind, command in kinds.items():
            runs[kind].append(measure(command))
    if not arguments.ours_only:
        for method in ("MinMax", "Entropy"):  # once: it takes minutes
            kinds[f"onnxruntime, {method}"] = command = _theirs(model, samples, batch, count, method)
            runs[f"onnxruntime, {method}"] = [measure(command)]
    assert all(run.status == 0 for made in runs.values() for run in made)
    print(f"\n{name}, {arguments.count} images, batch {batch}")
    base = np.median([run.seconds for run in runs["plain"]])
    ratio = {kind: float(np.median([run.seconds for run in made]) / base) for kind, made in runs.items()}
    peak = {kind: max(run.peak_bytes for run in made) / 1e6 for kind, made in runs.items()}
    for kind in kinds:
        print(f"{kind:50}{ratio[kind]:6.2f} x the time {peak[kind]:7.0f} MB", flush=True)
    flat = peak[SAMPLED] <= 1.1 * peak[QUARTER]
    slow = (ratio[SAMPLED] > 1.5) + (ratio[ALL] > 3) if name.startswith(PROMISED) else 0
    return slow + (not flat)


def _large(folder: Path) -> int:
    """64 images through the shapes of ResNet-50."""
    model, samples = folder / "resnet50.onnx", folder / "images.npz"
    resnet50(model)
    np.savez(samples, image=np.random.default_rng(0).standard_normal((64, 3, 224, 224), np.float32))
    print("\nResNet-50 shapes, 64 images, batch 8")
    run = measure(_ours(model, samples, 8, 64, STRIDE))
    assert run.status == 0, run.errors
    print(f"{SAMPLED:50}{run.seconds:6.1f} s {run.peak_bytes / 1e6:7.0f} MB")
    for method in ("MinMax", "Entropy"):
        theirs = measure(_theirs(model, samples, 8, 64, method))
        assert theirs.status == 0, theirs.errors
        print(f"{f'onnxruntime, {method}':50}{theirs.seconds:6.1f} s {theirs.peak_bytes / 1e6:7.0f} MB", flush=True)
    return int(run.peak_bytes > 1e9)


def _ours(model: Path, samples: Path, batch: int, count: int, stride: int) -> list[str]:
    """The command that calibrates ``model``, as the tool gives it."""
    held = Model.load(model)
    editor = Editor(held)
    found = [observed(editor, layer) for layer in find_layers(editor) if isinstance(layer, Layer)]
    signs = predicted(editor)
    tensors = [signed(one, signs) for one in {one.key: one for one in found if one is not None}.values()]
    folder = samples.parent
    path, request = folder / f"observing{stride}.onnx", folder / f"request{batch}.{count}.{stride}.json"
    observing(held, tensors, stride).save(path)
    asked = [asdict(one) for one in tensors], str(samples), str(folder / "seen.npz"), count, batch, stride, 0
    request.write_text(json.dumps(asdict(calibrate.Request(str(path), str(model), *asked))))
    return [*OURS, str(request), str(folder / "answer.json"), str(folder / "stage")]


def _plain(model: Path, samples: Path, batch: int, count: int) -> list[str]:
    return [sys.executable, "-c", PLAIN, str(model), str(samples), str(batch), str(count)]


def _theirs(model: Path, samples: Path, batch: int, count: int, method: str) -> list[str]:
    return [sys.executable, "-c", THEIRS, str(model), str(samples), str(batch), str(count), method]


def _input_name(model: Path) -> str:
    import onnxruntime as ort

    return ort.InferenceSession(str(model)).get_inputs()[0].name


if __name__ == "__main__":
    sys.exit(main())
