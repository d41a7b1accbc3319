"""What x86 CPUs without VNNI make of quantized models: ``python benchmarks/saturation.py``.

There onnxruntime's integer kernels add each two products in 16 bits, and saturate in silence. Each model runs on real
samples by kernels that saturate; its outputs are compared with those of the same model without saturation (SQNR), and
with those of the float model (agreement). Where this CPU saturates, it runs them as they are, and the session entry
``session.x64quantprecision`` = 1 gives the outputs without saturation. Where it does not, as with VNNI, the benchmark
runs itself under valgrind, which hides VNNI, on fewer samples, and its own outputs are those without saturation.

Exit status 1 where a model that is written not to saturate does (SQNR below 60 dB).
"""

import argparse
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from networks import Network, add_options, networks, outputs, saturates
from numpy.typing import NDArray
from peers import quantized_statically

from onnx_ocs import lint, quantize
from onnx_ocs.numerics.compare import decibels
from onnx_ocs.recipe import Recipe

STATIC: dict[str, dict[str, Any]] = {
    "quantize_static": {},
    "quantize_static, reduce_range": {"reduce_range": True},
}

OURS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8, "ratio": 0, "saturation_safe": False},
    "8 bits, ratio 0.02": {"bits": 8, "ratio": 0.02, "saturation_safe": False},
    "7 bits, the first layer 8": {"bits": 7, "ratio": 0, "saturation_safe": False},
    "7 bits": {"bits": 7, "ratio": 0, "first": "same", "saturation_safe": False},
    "7 bits, ratio 0.02": {"bits": 7, "ratio": 0.02, "first": "same", "saturation_safe": False},
    "saturation-safe": {"bits": 8, "ratio": 0, "saturation_safe": True},
    "saturation-safe, ratio 0.02": {"bits": 8, "ratio": 0.02, "saturation_safe": True},
}
"""Options of onnx-ocs; without those that it does not have, if they are off."""

SAFE = {"7 bits", "7 bits, ratio 0.02", "saturation-safe", "saturation-safe, ratio 0.02"}
"""Models that cannot saturate."""

LEAST = 60
"""dB of SQNR to the same model without saturation: kernels differ in the rounding of a few values."""

NATIVELY = {"resnet20": 1000, "squeezenet": 100, "kws": 800}
IN_VALGRIND = {"resnet20": 32, "squeezenet": 4, "kws": 64}
"""Samples to measure on."""

VALGRIND = ("valgrind", "--tool=none", "--quiet", "--error-limit=no")


@dataclass(frozen=True)
class Quantized:
    """A model to measure."""

    name: str
    path: Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, tuple(NATIVELY))
    parser.add_argument("--count", type=int, help="samples to measure on")
    parser.add_argument("--valgrind", action="store_true", help="also where this CPU itself saturates")
    parser.add_argument("--run", type=Path, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return _run(*arguments.run)
    logging.disable(logging.WARNING)
    natively = saturates()
    hidden = arguments.valgrind or not natively
    cpu = f"{platform.machine()}, {'with' if has_vnni() else 'without'} VNNI"
    print(f"onnxruntime {ort.__version__}: its integer kernels {'' if natively else 'do not '}saturate here ({cpu})")
    print(f"measured {'under valgrind' if hidden else 'natively'}")
    if hidden and shutil.which(VALGRIND[0]) is None:
        print("valgrind is not installed: nothing to measure")
        return 2
    known = {item.name for item in fields(Recipe)}
    for name, options in OURS.items():
        if missing := _missing(options, known):
            print(f"left out: {name}: this version has no option {missing[0]}")
    print("\nSQNR in dB to the same model without saturation; agreement with float in percent, and without saturation")
    columns = ("network", "model", "can saturate", "SQNR", "agreement", "without saturation")
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    broken = []
    for network, count in _subjects(arguments, hidden):
        with tempfile.TemporaryDirectory() as folder:
            models = list(_written(network, Path(folder), known))
            broken += _measure(network, network.images[:count], models, Path(folder), natively, hidden)
    print()
    for reason in broken:
        print(f"broken: {reason}")
    print(f"{len(broken)} promises broken")
    return int(bool(broken))


def has_vnni() -> bool:
    """Whether this CPU says so, where Linux shows it."""
    shown = Path("/proc/cpuinfo")
    return shown.exists() and any(flag in shown.read_text().split() for flag in ("avx512_vnni", "avx_vnni"))


def _subjects(arguments: argparse.Namespace, hidden: bool) -> Iterator[tuple[Network, int]]:
    """The networks, and how many samples of each to measure on."""
    counts = IN_VALGRIND if hidden else NATIVELY
    names = arguments.network if arguments.model is None else [""]
    for name, network in zip(names, networks(arguments), strict=True):
        yield network, arguments.count or counts.get(name, min(counts.values()))


def _missing(options: dict[str, Any], known: set[str]) -> list[str]:
    """Options that are asked for and that there are not."""
    return [name for name, value in options.items() if name not in known and value is not False]


def _written(network: Network, folder: Path, known: set[str]) -> Iterator[Quantized]:
    for number, (name, options) in enumerate(STATIC.items()):
        path = folder / f"static{number}.onnx"
        quantized_statically(network, path, per_channel=True, **options)
        yield Quantized(name, path)
    seen = folder / "seen.npz"
    for number, (name, options) in enumerate(OURS.items()):
        if _missing(options, known):
            continue
        path = folder / f"ours{number}.onnx"
        samples = {"stats": seen} if seen.exists() else {"calibrate": network.calibration, "save_stats": seen}
        chosen = {key: value for key, value in options.items() if key in known}
        quantize(network.model, path, target="ort", verify=False, **samples, **chosen)
        yield Quantized(name, path)


def _measure(
    network: Network,
    images: NDArray[np.float32],
    models: Sequence[Quantized],
    folder: Path,
    natively: bool,
    hidden: bool,
) -> list[str]:
    """A row for each model; which of them saturate that should not."""
    given, found = folder / "images.npy", folder / "found.npz"
    np.save(given, images)
    command = [sys.executable, __file__, "--run", given, found, *(model.path for model in models)]
    ended = subprocess.run([*(VALGRIND if hidden else ()), *map(str, command)], capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"the models do not run: {ended.stderr.strip()[-500:]}")
    float_classes = outputs(network.model, images).reshape(len(images), -1).argmax(axis=1)

    def agreement(scores: NDArray[np.float32]) -> float:
        return 100 * float(np.mean(scores.reshape(len(images), -1).argmax(axis=1) == float_classes))

    broken = []
    with np.load(found) as scores:
        for model in models:
            saturated, right = scores[model.path.stem], outputs(model.path, images, exact=natively)
            wanted = right.astype(np.float64)
            sqnr = decibels(float(np.square(wanted).sum()), float(np.square(saturated - wanted).sum()))
            outcome = lint(model.path, target="ort")
            layers = sum(finding.rule == "saturation" for finding in outcome.findings)
            cells = f"{layers} of {len(outcome.kernels)} layers | {sqnr:.1f}"
            print(
                f"| {network.name} | {model.name} | {cells} | {agreement(saturated):.2f} | {agreement(right):.2f} |",
                flush=True,
            )
            if model.name in SAFE and sqnr < LEAST:
                broken.append(f"{network.name}, {model.name}: {sqnr:.1f} dB (at least {LEAST})")
    return broken


def _run(given: Path, found: Path, *models: Path) -> int:
    """The part that runs where kernels saturate: the outputs of the models on the samples in a file."""
    if not saturates():
        print("the kernels do not saturate here", file=sys.stderr)
        return 1
    images = np.load(given)
    np.savez(found, **{model.stem: outputs(model, images, batch=16) for model in models})
    return 0


if __name__ == "__main__":
    sys.exit(main())
