"""Weights of few bits by every recipe: ``python benchmarks/accuracy.py``.

Activations stay float, so that the figures are those of the weights. Without data: one maximum for each output channel
(``max``), least squared error of the weights (``mse``), the paper's recipe (``paper``: one scale per tensor, ratio
0.05, the better of no clip and mse), and the defaults at two ratios; with samples the defaults at the same ratios.
Agreement with the float model on all images, and divergence of the outputs times 1000.

Exit status 1 where a default loses: the lower end of the paired 95 % interval of its agreement less that of max, mse or
paper is below half a point at 3 bits or more.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from networks import Network, add_options, compare, networks, outputs
from numpy.typing import NDArray

from onnx_ocs import quantize

PLAIN: dict[str, Any] = {"round": "nearest", "ratio": 0, "clip": "none"}

RECIPES: dict[str, list[dict[str, Any]]] = {
    "max": [PLAIN],
    "mse": [{**PLAIN, "clip": "mse"}],
    "paper": [{"preset": "paper", "ratio": 0.05, "first": "int8", "clip": clip} for clip in ("none", "mse")],
    "no data, ratio 0": [{"ratio": 0}],
    "no data, ratio 0.05": [{"ratio": 0.05}],
    "samples, ratio 0": [{"ratio": 0, "calibrate": True}],
    "samples, ratio 0.05": [{"ratio": 0.05, "calibrate": True}],
}

OTHERS = ("max", "mse", "paper")

NARROWEST = 3
"""Bits from which on a default must not lose."""

MARGIN = 0.5
"""Points that the lower end of an interval may be below zero."""


def scores(network: Network, bits: int, options: dict[str, Any]) -> NDArray[np.float32]:
    """The outputs of the model that a recipe makes."""
    given = dict(options)
    if given.pop("calibrate", False):
        given |= {"calibrate": network.calibration, "act_bits": None}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "out.onnx")
        quantize(network.model, target, bits=bits, verify=False, **given)
        return outputs(target, network.images)


def agreeing(reference: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """(images,), 100 where the largest score is that of the float model."""
    first, second = (values.reshape(len(values), -1).argmax(axis=1) for values in (reference, found))
    return 100.0 * (first == second)


def lower_end(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Of the paired 95 % interval of the mean of ``first - second``."""
    difference = first - second
    return float(difference.mean() - 1.96 * difference.std() / np.sqrt(len(difference)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ("resnet20", "squeezenet", "kws", "mobilenet"))
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 7, 6, 5, 4, 3, 2])
    arguments = parser.parse_args()
    lost = []
    for network in networks(arguments):
        reference = outputs(network.model, network.images)
        labels = network.labels
        print(
            f"\n{network.name}: top-1 | agreement | divergence; float {compare(reference, reference, labels).top1:.2f}"
        )
        print("bits | " + " | ".join(RECIPES), flush=True)
        for bits in arguments.bits:
            found = {}
            for name, options in RECIPES.items():
                tried = [scores(network, bits, one) for one in options]
                found[name] = max(tried, key=lambda one: agreeing(reference, one).mean())
            cells = [str(compare(reference, one, labels)) for one in found.values()]
            print(f"{bits} | " + " | ".join(cell.replace(" | ", " ") for cell in cells), flush=True)
            for name in RECIPES:
                for other in OTHERS if name not in OTHERS and bits >= NARROWEST else ():
                    ours, theirs = (agreeing(reference, found[one]) for one in (name, other))
                    if (low := lower_end(ours, theirs)) < -MARGIN:
                        mean = ours.mean() - theirs.mean()
                        lost.append(f"{network.name}, {bits} bits: {name} less {other}: {mean:.2f}, from {low:.2f} on")
    print(f"\n{len(lost)} comparisons lost")
    print("\n".join(lost))
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
