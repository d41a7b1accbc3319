"""Weights of few bits by every recipe, and by other quantizers: ``python benchmarks/accuracy.py [--peer NAME=PYTHON]``.

Two Markdown tables for each network, with a row for each recipe or quantizer and a column for each width: top-1,
agreement with the float model on all images, and divergence of the outputs times 1000.

**Float activations**, so that the figures are those of the weights. Without data: one maximum for each output channel
(``max``), least squared error of the weights (``mse``), the paper's recipe (``paper``: one scale per tensor, ratio
0.05, the better of no clip and mse; of a transformer the dense layers as well), and the defaults at two ratios; with
samples the defaults at the same ratios. A quantizer that cannot leave activations alone is measured with the Q/DQ pairs
of its data taken out.

**Activations of 8 bits**, as those quantizers write them, beside the defaults with samples.

onnxruntime's ``quantize_static`` always takes part. Each ``--peer`` names one more, the python of the environment that
it is installed in, and perhaps one of its methods (see quantize_by.py): ``--peer aimet-onnx:apply_seq_mse=PYTHON``. All
models run in onnxruntime, by kernels that do not saturate. What a peer refuses stands in its cell in its own words.

A last table has what splitting adds: ratio 0.05 less ratio 0, in agreement and divergence, on the mean of the networks.

Exit status 1 where a default loses: the lower end of the paired 95 % interval of its agreement less that of max, mse or
paper, with float activations, is below half a point at 3 bits or more.
"""

import argparse
import datetime
import importlib.metadata
import logging
import platform
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from networks import Figures, Network, add_options, compare, networks, outputs
from numpy.typing import NDArray
from peers import FLOAT, Apart, NotPossible, Quantizer, data_pairs, free_data, shortened, widths

from onnx_ocs import quantize
from onnx_ocs.graph.layers import READERS

PLAIN: dict[str, Any] = {"round": "nearest", "ratio": 0, "clip": "none"}

RECIPES: dict[str, list[dict[str, Any]]] = {
    "max": [PLAIN],
    "mse": [{**PLAIN, "clip": "mse"}],
    "paper": [{"preset": "paper", "ratio": 0.05, "first": "int8", "clip": clip} for clip in ("none", "mse")],
    "no data, ratio 0": [{"ratio": 0}],
    "no data, ratio 0.05": [{"ratio": 0.05}],
    "samples, ratio 0": [{"ratio": 0, "calibrate": True}],
    "samples, ratio 0.05": [{"ratio": 0.05, "calibrate": True}],
    "no data, ratio 0.05, uniform": [{"ratio": 0.05, "allocate": "uniform"}],
    "no data, ratio 0.05, sensitivity": [{"ratio": 0.05, "allocate": "sensitivity"}],
    "no data, ratio 0.05, joint": [{"ratio": 0.05, "plan": "joint"}],
    "samples, ratio 0.05, uniform": [{"ratio": 0.05, "allocate": "uniform", "calibrate": True}],
    "samples, ratio 0.05, sensitivity": [{"ratio": 0.05, "allocate": "sensitivity", "calibrate": True}],
}
"""With float activations; of several options the better ones."""

WITH_DATA: dict[str, list[dict[str, Any]]] = {
    "samples, ratio 0": [{"ratio": 0, "calibrate": True, "act_bits": 8}],
    "samples, ratio 0.05": [{"ratio": 0.05, "calibrate": True, "act_bits": 8}],
    "samples, ratio 0, target ort": [{"ratio": 0, "calibrate": True, "act_bits": 8, "target": "ort"}],
}
"""With activations of 8 bits."""

DEFAULTS = ("no data, ratio 0", "no data, ratio 0.05", "samples, ratio 0", "samples, ratio 0.05")

OTHERS = ("max", "mse", "paper")

NARROWEST = 3
"""Bits from which on a default must not lose."""

MARGIN = 0.5
"""Points that the lower end of an interval may be below zero."""

Scores = NDArray[np.float32]


def scores(network: Network, bits: int, options: dict[str, Any]) -> Scores:
    """The outputs of the model that a recipe makes."""
    given = dict(options)
    if given.pop("calibrate", False):
        given = {"calibrate": network.calibration, "act_bits": None} | given
    if network.dense:
        given["quantize_ops"] = tuple(READERS)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "out.onnx")
        quantize(network.model, target, bits=bits, verify=False, **given)
        return outputs(target, network.images, exact=True)


def scores_by(peer: Quantizer, network: Network, bits: int, data: bool) -> tuple[Scores, list[str]]:
    """The outputs of what a peer makes, and remarks."""
    with tempfile.TemporaryDirectory() as folder:
        made = peer.quantize(network, bits, data, Path(folder))
        if not isinstance(made, Path):
            return made, ["simulated"]
        found = widths(made)
        narrow = sum(width <= (4 if bits <= 4 else 8) for width in found)
        if not narrow:
            left = "float" if min(found) == FLOAT else f"at {min(found)} bits or more"
            raise NotPossible(f"it leaves all {len(found)} layers {left}")
        remarks = [f"{narrow} of {len(found)} layers"] if narrow < len(found) else []
        on_integers = bool(data_pairs(onnx.load(made)))
        if data and not on_integers:
            remarks.append("float data")
        elif on_integers and not data:
            free_data(made)
            remarks.append("Q/DQ of data taken out")
        try:
            return outputs(made, network.images, exact=True), remarks
        except Exception as error:  # its classes of errors have no common base
            raise NotPossible(f"onnxruntime: {error}") from error


def cell_by(peer: Quantizer, network: Network, bits: int, data: bool, reference: Scores) -> str:
    """The figures of a peer, or its own words for why there are none."""
    try:
        found, remarks = scores_by(peer, network, bits, data)
    except NotPossible as reason:
        return f"not possible: {shortened(str(reason))}"
    return ", ".join([figures(network, reference, found), *remarks])


def figures(network: Network, reference: Scores, found: Scores) -> str:
    return str(compare(reference, found, network.labels)).replace("|", "/")


def agreeing(reference: Scores, found: Scores) -> NDArray[np.float64]:
    """(images,), 100 where the largest score is that of the float model."""
    first, second = (values.reshape(len(values), -1).argmax(axis=1) for values in (reference, found))
    return 100.0 * (first == second)


def lower_end(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Of the paired 95 % interval of the mean of ``first - second``."""
    difference = first - second
    return float(difference.mean() - 1.96 * difference.std() / np.sqrt(len(difference)))


def losses(network: Network, reference: Scores, found: dict[tuple[str, int], Scores]) -> Iterator[str]:
    """Where a default is worse than one of the others."""
    for (name, bits), ours in found.items():
        for other in OTHERS if name in DEFAULTS and bits >= NARROWEST else ():
            first, second = agreeing(reference, ours), agreeing(reference, found[other, bits])
            if (low := lower_end(first, second)) < -MARGIN:
                mean = first.mean() - second.mean()
                yield f"{network.name}, {bits} bits: {name} less {other}: {mean:.2f}, from {low:.2f} on"


def gain(figures: Mapping[tuple[str, int], list[Figures]], known: str, bits: int) -> str:
    """Of splitting: what ratio 0.05 has more than 0 in agreement and in divergence, on the mean of the networks."""
    without, split = (figures[f"{known}, ratio {ratio}", bits] for ratio in ("0", "0.05"))
    pairs = list(zip(split, without, strict=True))
    agreement = np.mean([after.agreement - before.agreement for after, before in pairs])
    divergence = np.mean([after.divergence - before.divergence for after, before in pairs])
    return f"{agreement:+.2f} / {divergence:+.2f}"


def head(name: str, columns: Sequence[int]) -> None:
    row(name, [f"{bits} bits" for bits in columns])
    print("|---" * (len(columns) + 1) + "|")


def row(name: str, cells: Iterable[str]) -> None:
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ("resnet20", "squeezenet", "kws", "mobilenet", "vit"))
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 7, 6, 5, 4, 3, 2])
    parser.add_argument("--peer", type=Apart.named, action="append", default=[], metavar="NAME[:METHOD]=PYTHON")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    peers = [Quantizer(), *arguments.peer]
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("onnx", "onnxruntime", "numpy")]
    print(f"{datetime.date.today()}; Python {platform.python_version()}, {', '.join(packages)}")
    lost: list[str] = []
    defaults: dict[tuple[str, int], list[Figures]] = defaultdict(list)
    for network in networks(arguments):
        reference = outputs(network.model, network.images)
        for data, recipes in ((False, RECIPES), (True, WITH_DATA)):
            print(f"\n{network.name}, {'activations of 8 bits' if data else 'float activations'}:\n")
            head("top-1 / agreement / divergence", arguments.bits)
            row("float model", [figures(network, reference, reference)] * len(arguments.bits))
            found: dict[tuple[str, int], Scores] = {}
            for name, options in recipes.items():
                for bits in arguments.bits:
                    tried = [scores(network, bits, one) for one in options]
                    found[name, bits] = max(tried, key=lambda one: agreeing(reference, one).mean())
                row(f"onnx-ocs, {name}", [figures(network, reference, found[name, bits]) for bits in arguments.bits])
            for peer in peers:
                row(peer.name, [cell_by(peer, network, bits, data, reference) for bits in arguments.bits])
            if not data:
                lost += losses(network, reference, found)
                for (name, bits), ours in found.items():
                    defaults[name, bits].append(compare(reference, ours, network.labels))
    print()
    head("ratio 0.05 less 0, agreement / divergence", arguments.bits)
    for known in ("no data", "samples"):
        row(known, [gain(defaults, known, bits) for bits in arguments.bits])
    print()
    for peer in arguments.peer:
        print(f"{peer.name}: {peer.versions}")
    print(f"\n{len(lost)} comparisons lost")
    print("\n".join(lost))
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
