"""What one step of the defaults adds, over several draws of samples: ``python benchmarks/gains.py [--of STEP]``.

Steps are ``splitting``, ratio 0.05 against 0 under the default rounding, and ``propagation``, weights that make up for
the errors of the layers before theirs against weights that do not. Weights of 4 and 3 bits with float activations, with
samples and without. Each draw chooses other samples to calibrate on out of all that there are, and measures on those
that are left; without samples it makes up others (``--seed``). Two Markdown tables: of each network, and of their mean,
what the step adds to the agreement with the float model (points) and to the divergence of the outputs (times 1000), as
the mean over the draws with its standard error.

Exit status 1 where, on the mean of the networks, the step lowers the agreement or raises the divergence.
"""

import argparse
import logging
import sys
from dataclasses import replace
from typing import Any

import numpy as np
from accuracy import head, row, scores
from networks import Network, add_options, compare, networks, outputs
from numpy.typing import NDArray

STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "splitting": ({"ratio": 0}, {"ratio": 0.05}),
    "propagation": ({"ratio": 0.05, "error_propagation": False}, {"ratio": 0.05}),
}
"""Options without a step and with it."""


def drawn(network: Network, number: int) -> Network:
    """With other samples to calibrate on; of the others the first view alone, without labels."""
    rng, count = np.random.default_rng(number), len(network.calibration)
    first = network.images[: len(network.images) // network.views]
    everything = np.unique(np.concatenate([network.calibration, first]), axis=0)
    calibration, images = np.split(everything[rng.permutation(len(everything))], [count])
    return replace(network, calibration=calibration, images=images, labels=np.zeros(0, np.int64), views=1)


def gains(network: Network, step: str, widths: list[int], draws: int, samples: bool) -> NDArray[np.float64]:
    """(widths, draws, 2): points of agreement, and divergence times 1000."""
    made = np.zeros((len(widths), draws, 2))
    for number in range(draws):
        here = drawn(network, number)
        options: dict[str, Any] = {"calibrate": True} if samples else {"seed": number}
        reference = outputs(here.model, here.images)
        for place, bits in enumerate(widths):
            found = [scores(here, bits, {**given, **options}) for given in STEPS[step]]
            before, after = (compare(reference, each, here.labels) for each in found)
            made[place, number] = after.agreement - before.agreement, after.divergence - before.divergence
    return made


def told(values: NDArray[np.float64]) -> str:
    """(draws, 2): the mean of each column with its standard error."""
    errors = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return " / ".join(f"{mean:+.2f} ± {error:.2f}" for mean, error in zip(values.mean(axis=0), errors, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ("resnet20", "squeezenet", "kws", "mobilenet", "vit"))
    parser.add_argument("--of", choices=STEPS, default="splitting", help="the step")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--draws", type=int, default=5, help="two at least")
    arguments = parser.parse_args()
    if arguments.draws < 2:
        parser.error("two draws at least, for an error of their mean")
    logging.disable(logging.WARNING)
    everything = list(networks(arguments))
    broken = 0
    for samples in (False, True):
        print(f"\n{'With' if samples else 'Without'} samples, {arguments.draws} draws:\n")
        head(f"{arguments.of}, agreement / divergence", arguments.bits)
        found = {
            network.name: gains(network, arguments.of, arguments.bits, arguments.draws, samples)
            for network in everything
        }
        found["mean"] = np.mean(list(found.values()), axis=0)
        for name, widths in found.items():
            row(name, [told(values) for values in widths])
        means = [values.mean(axis=0) for values in found["mean"]]
        broken += sum(agreement < 0 or divergence > 0 for agreement, divergence in means)
    print(f"\n{broken} promises broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
