"""Table 4 of the paper: Oracle OCS on activations of 6 bits: ``python benchmarks/table4.py``.

Weights stay float. The graph itself finds the largest channels of each batch, splits them and chooses the scale of the
batch (``--act-split dynamic``); beside it stand the scale of each batch without splitting, and static scales with and
without clipping. Figures are of the emitted models in onnxruntime: top-1 on the images with labels, agreement with the
float model and Kullback-Leibler divergence (nats times 1000) on all. Exit status 1 where a promise is broken: at most
0.85 times the divergence of the scale of each batch at batch 1, 8 and 128; on ResNet-20 half of static clipping at
batch 1.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from networks import Network, add_options, compare, networks, outputs, paper

from onnx_ocs import quantize

MOST = 0.85
CHECKED = (1, 8, 128)


def measure(network: Network, arguments: argparse.Namespace) -> int:
    """Print the rows of one network; how many promises it breaks."""
    reference = outputs(network.model, network.images)
    common = {"bits": None, "act_bits": arguments.act_bits, "verify": False}
    found = {}
    with tempfile.TemporaryDirectory() as folder:

        def row(name: str, batch: int, **options: object) -> float:
            target = Path(folder, "out.onnx")
            if (name, 0) not in found:
                quantize(network.model, target, **common, **options)
                found[name, 0] = target.read_bytes()
            figures = compare(reference, outputs(found[name, 0], network.images, batch), network.labels)
            print(f"| {network.name} | {name} | {batch} | {figures} |", flush=True)
            return figures.divergence

        static = {"calibrate": network.calibration}
        row("static, no clipping", 64, act_clip="none", **static)
        clipped = row("static, mse", 64, act_clip="mse", **static)
        dynamic = {"act_split": "dynamic"}
        broken = 0
        for batch in arguments.batches:
            plain = row("scale of each batch", batch, **dynamic)
            split = row(f"and Oracle OCS {arguments.ratio:g}", batch, act_ratio=arguments.ratio, **dynamic)
            broken += batch in CHECKED and split > MOST * plain
            broken += batch == 1 and network.name == "ResNet-20" and split > clipped / 2
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--act-bits", type=int, default=6)
    parser.add_argument("--ratio", type=float, default=0.02)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 32, 128])
    arguments = parser.parse_args()
    print("| network | activations | batch | top-1 | agreement | KL x 1000 |\n|---|---|---|---|---|---|")
    broken = sum(measure(network, arguments) for network in networks(arguments))
    print("\nThe paper, top-1 at 6 bits, ratio 0.02:\n\n| batch | ResNet-50 | Inception-V3 |\n|---|---|---|")
    for line in paper("table4_oracle_ocs_6bit_activations.csv"):
        print(f"| {line['batch_size']} | {line['resnet50_top1']} | {line['inception_v3_top1']} |")
    print(f"\n{broken} promises broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
