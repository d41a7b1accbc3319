"""Table 5 of the paper: what splitting costs in size: ``python benchmarks/table5.py``.

Weights and activations (the values that layers read) after splitting the weights relative to before, as the tool
reports them, on the shapes of ResNet-50 and on the networks of the other tables; and the size of the emitted file,
weights of 8 bits, relative to the same file without splitting.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from networks import Network, add_options, networks, paper
from speed import resnet50

from onnx_ocs import quantize

RATIOS = (0.01, 0.02, 0.05, 0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    arguments = parser.parse_args()
    print("| network | ratio | relative weight size | relative activation size | relative file size |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        shapes = Path(folder, "resnet50.onnx")
        resnet50(shapes)
        noise = np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)
        made = Network("ResNet-50 shapes", shapes, noise, noise, np.zeros(0, np.int64))
        for network in [made, *networks(arguments)]:
            stats, target = Path(folder, f"{network.name}.npz"), Path(folder, "out.onnx")
            common = {"verify": False, "bits": 8, "first": "same"}
            quantize(network.model, target, calibrate=network.calibration[:8], save_stats=stats, ratio=0, **common)
            unsplit = target.stat().st_size
            for ratio in RATIOS:
                report = quantize(network.model, target, stats=stats, ratio=ratio, **common).report
                figures = (report["overhead"]["weights"], report["overhead"]["activations"])
                size = target.stat().st_size / unsplit
                print(f"| {network.name} | {ratio:g} | {figures[0]:.3f} | {figures[1]:.3f} | {size:.3f} |", flush=True)
    print("\nThe paper, ResNet-50:\n\n| ratio | relative weight size | relative activation size |\n|---|---|---|")
    for line in paper("table5_resnet50_overhead.csv"):
        print(f"| {' | '.join(line.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
