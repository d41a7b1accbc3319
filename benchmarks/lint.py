"""What the lint says of models that others write: ``python benchmarks/lint.py``.

ResNet-20 and SqueezeNet 1.1 as onnxruntime's ``quantize_static`` writes them and as onnx-ocs does for each target; with
``--modelopt PYTHON`` also as nvidia-modelopt does, run by that interpreter, in an environment of its own (it is large,
and no dependency of this project). Exit status 1 where a promise is broken: the lint of TensorRT passes on models of
nvidia-modelopt and on those that are written for TensorRT, and finds errors in UINT8 ones; that of onnxruntime names
each quantized layer that did not become an integer kernel.
"""

import argparse
import logging
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from networks import Network, add_options, networks
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from peers import Images

from onnx_ocs import lint, quantize

MODELOPT = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize

source, samples, target, mode, method = sys.argv[1:]
with np.load(samples) as data:
    feed = dict(data)
quantize(
    source, quantize_mode=mode, calibration_data=feed, calibration_method=method, calibration_eps=["cpu"],
    output_path=target,
)
"""

MODES = {"int8": "max", "int4": "rtn_dq"}
"""What nvidia-modelopt is asked for, and how it calibrates."""


def written(network: Network, folder: Path, count: int, modelopt: str | None) -> Iterator[tuple[str, Path]]:
    """The models, one after the other."""
    for name, kind, options in (
        ("quantize_static, UINT8", QuantType.QUInt8, {}),
        ("quantize_static, INT8", QuantType.QInt8, {"ActivationSymmetric": True, "QuantizeBias": False}),
    ):
        target = folder / "static.onnx"
        quantize_static(
            network.model,
            target,
            Images(network, count),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=kind,
            weight_type=QuantType.QInt8,
            extra_options=options,
        )
        yield name, target
    for name in ("generic", "tensorrt", "ort", "openvino"):
        target = folder / f"{name}.onnx"
        quantize(network.model, target, target=name, calibrate=network.calibration[:count], verify=False)
        yield f"onnx-ocs, {name}", target
    if modelopt is None:
        return
    samples = folder / "samples.npz"
    source = shutil.copy(network.model, folder / "source.onnx")  # it writes into its source
    input_name = onnx.load(network.model, load_external_data=False).graph.input[0].name
    np.savez(samples, **{input_name: network.calibration[:count]})
    for mode, method in MODES.items():
        target = folder / f"{mode}.onnx"
        command = [modelopt, "-c", MODELOPT, str(source), str(samples), str(target), mode, method]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode or not target.exists():
            print(f"nvidia-modelopt fails ({mode}): {ended.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            continue
        yield f"nvidia-modelopt, {mode}", target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--count", type=int, default=32, help="calibration images")
    parser.add_argument("--modelopt", metavar="PYTHON", help="the interpreter of an environment with nvidia-modelopt")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    print("| network | model | TensorRT | onnxruntime | integer kernels |\n|---|---|---|---|---|")
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        for network in networks(arguments):
            for name, path in written(network, Path(folder), arguments.count, arguments.modelopt):
                strict, ort = lint(path, target="tensorrt"), lint(path, target="ort")
                cells = []
                for outcome in (strict, ort):
                    counts = Counter(found.rule for found in outcome.findings if found.severity != "note")
                    told = ", ".join(f"{rule} {count}" for rule, count in counts.items())
                    cells.append(told or "passes")
                on_integers = sum(kernel.on_integers for kernel in ort.kernels)
                print(
                    f"| {network.name} | {name} | {' | '.join(cells)} | {on_integers} of {len(ort.kernels)} |",
                    flush=True,
                )
                named = {found.node for found in ort.findings}
                broken += any(not kernel.on_integers and kernel.node not in named for kernel in ort.kernels)
                if "modelopt" in name or name in ("onnx-ocs, tensorrt", "onnx-ocs, generic"):
                    broken += not strict.passed
                if "UINT8" in name:
                    broken += not strict.count("error")
    print(f"\n{broken} promises broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
