"""Whether runtimes compute what the model says: ``python benchmarks/runtimes.py``.

The outputs of quantized models in onnxruntime with optimizations, and in OpenVINO with and without its low-precision
kernels, against those of onnxruntime without optimizations, in dB; beside them the distance of the quantized model from
the float one. Exit status 1 where optimizations change more than a tenth (10 dB less than) of what quantization does,
for portable models whose weights are quantized: float weights behind quantized activations onnxruntime 1.32 quantizes
itself, and with a target whole chains are computed on integers, where each kernel may round to the other neighbour.
Rows without saturating sums show what 8-bit kernels of x86 CPUs without VNNI do to the others.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from networks import add_options, networks, outputs
from numpy.typing import NDArray

from onnx_ocs import quantize
from onnx_ocs.numerics.compare import decibels

OPTIONS: dict[str, dict[str, Any]] = {
    "W8 A8": {},
    "W8 A8, one scale per tensor": {"per_channel": False},
    "W7 A8": {"bits": 7},
    "W8 A8, no sum that saturates": {"saturation_safe": True},
    "W8 A8, target ort": {"target": "ort"},
    "W8 A8, target openvino": {"target": "openvino"},
    "W8 A8, target openvino, sums may saturate": {"target": "openvino", "saturation_safe": False},
    "W8 A8 unsigned": {"act_unsigned": True},
    "W6 A6": {"bits": 6, "act_bits": 6},
    "W8 A8, 5 % of activations split": {"act_ratio": 0.05},
    "W8 A6, scales of each batch, 2 % split": {"act_bits": 6, "act_split": "dynamic", "act_ratio": 0.02},
    "float weights, A8": {"bits": None},
    "float weights, A4": {"bits": None, "act_bits": 4},
}


def openvino(path: Path, images: NDArray[np.float32], batch: int, low_precision: bool) -> NDArray[np.float32]:
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({} if low_precision else {"LP_TRANSFORMS_MODE": "NO"})
    core = ov.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    return np.concatenate([compiled(part)[0] for part in parts])


def distance(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    first, second = wanted.astype(np.float64), found.astype(np.float64)
    return decibels(float(np.square(first).sum()), float(np.square(second - first).sum()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--count", type=int, default=64, help="images")
    arguments = parser.parse_args()
    print("SQNR in dB, against the model in onnxruntime without optimizations but for the first column\n")
    print(
        "| network | model | float | onnxruntime | OpenVINO | OpenVINO, no low precision |\n|---|---|---|---|---|---|"
    )
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "out.onnx")
        for network in networks(arguments):
            images = network.images[: arguments.count]
            reference = outputs(network.model, images)
            for name, options in OPTIONS.items():
                batch = 16
                given = {} if "act_split" in options else {"calibrate": network.calibration}
                quantize(network.model, target, verify=False, **given, **options)
                plain = outputs(target, images, batch, optimize=False)
                quantization = distance(reference, plain)
                cells = [distance(plain, outputs(target, images, batch))]
                with contextlib.suppress(ModuleNotFoundError):
                    cells += [distance(plain, openvino(target, images, batch, low)) for low in (True, False)]
                shown = " | ".join(f"{cell:.1f}" for cell in (quantization, *cells))
                print(f"| {network.name} | {name} | {shown} |", flush=True)
                portable = options.get("bits", 8) is not None and "target" not in options
                broken += portable and cells[0] < quantization + 10
    print(f"\n{broken} promises broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
