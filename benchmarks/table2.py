"""Table 2 of the paper: weights of 8 to 4 bits, activations of 8: ``python benchmarks/table2.py``.

``--preset paper`` (one scale per tensor, first and dense layers float), activations quantized to 8 bits without
clipping after calibration: clip methods of the weights without splitting, ratios of splitting without clipping, and
splitting together with the clip method that is best with it, by agreement. Figures are of the emitted models in
onnxruntime: top-1 on the images with labels, and agreement with the float model on all. Exit status 1 where the paper's
order does not show on SqueezeNet: splitting ahead of clipping at 6 and 5 bits, and both together first at 4.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from networks import Figures, Network, add_options, compare, networks, outputs, print_head, print_paper, print_row

from onnx_ocs import quantize

CLIPS = ("none", "mse", "aciq", "kl")
RATIOS = (0.01, 0.02, 0.05)
COLUMNS = [*CLIPS, *(f"OCS {ratio:g}" for ratio in RATIOS), *(f"OCS {ratio:g} + best clip" for ratio in RATIOS)]


def row(network: Network, bits: int, act_bits: int | None, stats: Path) -> dict[str, Figures]:
    """The figures of one width."""
    reference = outputs(network.model, network.images)

    def figures(clip: str, ratio: float) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "out.onnx")
            activations = {"act_bits": act_bits, "act_clip": "none", "stats": stats} if act_bits else {}
            common = {"preset": "paper", "bits": bits, "verify": False, "container": "int8"}
            quantize(network.model, target, clip=clip, ratio=ratio, **common, **activations)
            return compare(reference, outputs(target, network.images), network.labels)

    found = {clip: figures(clip, 0) for clip in CLIPS}
    found |= {f"OCS {ratio:g}": figures("none", ratio) for ratio in RATIOS}
    for ratio in RATIOS:
        both = {clip: figures(clip, ratio) for clip in CLIPS[1:]}
        best = max(both, key=lambda clip: both[clip].agreement)
        found[f"OCS {ratio:g} + best clip"] = both[best]
    return found


def broken_order(bits: int, found: dict[str, Figures]) -> bool:
    """Whether the paper's order is missing."""
    clipped = max(found[clip].agreement for clip in CLIPS)
    split = max(found[f"OCS {ratio:g}"].agreement for ratio in RATIOS)
    both = max(found[f"OCS {ratio:g} + best clip"].agreement for ratio in RATIOS)
    if bits in (5, 6):
        return split <= clipped
    return bits == 4 and both <= max(split, clipped)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 7, 6, 5, 4])
    parser.add_argument("--weights-only", action="store_true", help="leave the activations float")
    arguments = parser.parse_args()
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        for network in networks(arguments):
            stats = Path(folder, f"{network.name}.npz")
            quantize(network.model, calibrate=network.calibration, save_stats=stats, verify=False, round="nearest")
            print_head(network, "bits", COLUMNS)
            for bits in arguments.bits:
                found = row(network, bits, None if arguments.weights_only else 8, stats)
                print_row(bits, found, COLUMNS)
                broken += network.name.startswith("SqueezeNet") and broken_order(bits, found)
    print_paper("The paper, top-1", "table2_imagenet_weight_bits.csv")
    print(f"\n{broken} promises broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
