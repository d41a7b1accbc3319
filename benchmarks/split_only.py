"""Splitting alone, on every model: ``python benchmarks/split_only.py``.

``--float --ratio 0.25`` on each model of the project and of the assets: how many layers are split, why others are not,
and the largest error relative to an output's peak on generated samples. Exit status 1 where a layer that is not
depthwise and has more than 4 input channels is not split, or the error of a float32 model reaches 1e-5.
"""

import sys

from common import ROOT, assets

from onnx_ocs import OcsError, split

ALLOWED = ("depthwise", "one input channel", "channels or fewer", "run time", "not covered yet")
"""Reasons for which a layer need not be split: it has no channels to choose from, or no constant weight."""


def main() -> int:
    broken = 0
    models = [*sorted((ROOT / "models").glob("*.onnx")), *sorted((assets() / "models").glob("*.onnx"))]
    print("| model | layers split | not split | largest relative error |\n|---|---|---|---|")
    for path in models:
        try:
            report = split(path, ratio=0.25).report
        except OcsError as error:
            print(f"| {path.name} | {error} | | |")
            broken += 1
            continue
        rest = [row for row in report["layers"] if row["status"] != "split"]
        wrong = [row for row in rest if not any(reason in row["reason"] for reason in ALLOWED)]
        found = report["verification"]
        error = found["split"]["max_rel_error"] if found and "split" in found else 0.0
        broken += bool(wrong) or error >= 1e-5
        reasons = "; ".join(sorted({row["reason"] for row in rest}))
        print(
            f"| {path.name} | {len(report['layers']) - len(rest)} | {len(rest)}: {reasons} | {error:.1e} |", flush=True
        )
        for row in wrong:
            print(f"BROKEN: {path.name}: {row['name']} is not split: {row['reason']}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
