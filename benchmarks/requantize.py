"""Job 2, splitting ahead of another quantizer: ``python benchmarks/requantize.py``.

onnxruntime's ``quantize_static`` (8 bits, per tensor, 8-bit activations, MinMax calibration) runs on each source and on
its ``--float --per-tensor`` version; then weights alone are rounded per tensor by a plain maximum at 5 and 4 bits.
Figures are agreement with the float model's top-1 on real images. Exit status 1 where splitting loses more than 0.3
points at 8 bits, or does not win at 5 and 4.
"""

import io
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from common import assets
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from table1 import DEVIATION, MEAN, classes, images

from onnx_ocs import split

RATIO = 0.05


class Reader(CalibrationDataReader):
    """Some images, one batch after the other."""

    def __init__(self, name: str, batch: NDArray[np.float32]) -> None:
        self._batches: Iterator[dict[str, NDArray[np.float32]]] = ({name: part} for part in np.array_split(batch, 8))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)


def imagenet() -> NDArray[np.float32]:
    """The sample images as SqueezeNet takes them."""
    mean, deviation = (np.array(values, np.float32).reshape(3, 1, 1) for values in (MEAN, DEVIATION))
    found = []
    with zipfile.ZipFile(assets() / "data" / "imagenet_400.zip") as archive:
        for name in sorted(item for item in archive.namelist() if item.endswith(".jpg")):
            pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"), np.float32)
            found.append((pixels.transpose(2, 0, 1) / 255 - mean) / deviation)
    return np.stack(found).astype(np.float32)


def static(source: Path, target: Path, samples: NDArray[np.float32]) -> None:
    """onnxruntime's quantizer as its documentation runs it."""
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    name = onnx.load(prepared).graph.input[0].name
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(prepared), str(target), Reader(name, samples), QuantFormat.QDQ, per_channel=False, **kinds)


def rounded(source: Path, target: Path, bits: int) -> None:
    """Weights of two or more dimensions on a grid that reaches to their largest magnitude."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim >= 2 and values.dtype == np.float32:
            step = np.abs(values).max() / (2 ** (bits - 1) - 1)
            tensor.CopyFrom(onnx.numpy_helper.from_array((np.floor(values / step + 0.5) * step), tensor.name))
    onnx.save(model, target)


def main() -> int:
    cifar, _ = images()
    large = imagenet()
    cases = {
        "cifar10_resnet20": (cifar, cifar[-512:]),
        "imagenet_squeezenet1.1": (large, large[::8]),
    }
    broken = 0
    print(f"agreement with float, ratio {RATIO}\n\n| model | quantizer | source | split |\n|---|---|---|---|")
    for name, (batch, samples) in cases.items():
        source = assets() / "models" / f"{name}.onnx"
        wanted = classes(source, batch)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "out.onnx")

            def agreement(target: Path = target, batch: NDArray[np.float32] = batch, wanted=wanted) -> float:
                return 100 * float(np.mean(classes(target, batch) == wanted))

            for bits in (8, 5, 4):
                ready = Path(folder, f"split{bits}.onnx")
                split(source, ready, ratio=RATIO, bits=bits, per_channel=False)
                figures = []
                for model in (source, ready):
                    static(model, target, samples) if bits == 8 else rounded(model, target, bits)
                    figures.append(agreement())
                broken += figures[1] < figures[0] - 0.3 if bits == 8 else figures[1] <= figures[0]
                kind = "quantize_static, 8 bits" if bits == 8 else f"weights at {bits} bits by the maximum"
                print(f"| {name} | {kind} | {figures[0]:.2f} | {figures[1]:.2f} |", flush=True)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
