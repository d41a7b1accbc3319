"""What TensorRT makes of the models, without a GPU: ``python benchmarks/tensorrt.py``.

Needs NVIDIA's Python package ``tensorrt_rtx`` (TensorRT for RTX), which builds engines on any x86-64 machine; it runs
none of them here. Two tables: what it makes of each construct that ``onnx-ocs lint --target tensorrt`` has a rule for,
and of the models that onnx-ocs writes: in how many of an engine's convolutions and matrix products the data is INT8 or
float, and how many kernels the engine has. Each model is built in a process of its own, since the parser can crash.

Exit status 1 where a promise is broken: each model for ``--target tensorrt`` becomes an engine, and no layer of it
works on floats whose data is quantized. (TensorRT can compute several layers that read the same data at once.)
"""

import argparse
import json
import logging
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from common import ROOT, measure
from networks import MAKERS, Network

from onnx_ocs import lint, quantize
from onnx_ocs.graph.layers import READERS

CLEAN: dict[str, dict[str, Any]] = {
    "W8 A8, ratio 0": {"ratio": 0},
    "W8 A8, ratio 0.02": {"ratio": 0.02},
    "W8 A8, ratio 0.05": {"ratio": 0.05},
    "W6 A8, ratio 0.05": {"ratio": 0.05, "bits": 6},
    "W4 A8, ratio 0.05": {"ratio": 0.05, "bits": 4},
    "W6 A6, ratio 0.05": {"ratio": 0.05, "bits": 6, "act_bits": 6},
    "W8 A8, 5 % of activations split": {"act_ratio": 0.05},
}
"""For ``--target tensorrt``."""

OTHERS: dict[str, dict[str, Any]] = {
    "W8, ratio 0.05": {"target": "tensorrt", "ratio": 0.05, "act_bits": None},
    "W4 in blocks of 16": {"target": "tensorrt", "bits": 4, "block": 16, "act_bits": None},
    "W8 A8, ratio 0.05, target generic": {"target": "generic", "ratio": 0.05},
}

SAMPLES = {"resnet20": 64, "squeezenet": 16, "kws": 64, "mobilenet": 64, "vit": 64}
"""Names of networks, and the samples of a batch."""

PRODUCTS = ("correlation", "deconv", "gemm", "runtime_fusion")
"""Kernels of TensorRT that are convolutions or matrix products."""

SECONDS = 300
"""After which a build counts as hanging."""


def build(path: Path) -> dict[str, Any]:
    """Of one model: the kernels of its engine, by kind and by the type of their data; or why there is none."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity, message))

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(path.read_bytes()):
        return {"refused": "; ".join(parser.get_error(at).desc() for at in range(parser.num_errors))}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # tells the kernels
    if builder.build_serialized_network(network, config) is None:
        return {"refused": "; ".join(text for severity, text in log.lines if severity <= trt.ILogger.Severity.ERROR)}
    found: Counter[str] = Counter()
    for line in "\n".join(text for _, text in log.lines).splitlines():
        if line.startswith("Name: ") and (kind := re.search(r"LayerType: (\w+)", line)):
            data = re.search(r"Datatype: (\w+)", line)
            found[f"{kind[1]} {data[1] if data else ''}"] += kind[1] not in ("signal", "wait")
    return dict(found)


def in_child(path: Path) -> dict[str, Any]:
    """:func:`build` in a process of its own."""
    ended = measure([sys.executable, __file__, "--build", str(path)], SECONDS)
    if ended.status == 124:
        return {"refused": f"no answer within {SECONDS} s"}
    if ended.status < 0:
        return {"refused": f"TensorRT ends the process (signal {-ended.status})"}
    if ended.status:
        sys.exit(ended.errors)
    return dict(json.loads(ended.output.splitlines()[-1]))


def on(answer: dict[str, Any], data: str) -> int:
    """Convolutions and matrix products on data of a type."""
    return sum(answer.get(f"{kind} {data}", 0) for kind in PRODUCTS)


def cells(answer: dict[str, Any]) -> str:
    if "refused" in answer:
        reason = " ".join(answer["refused"].split()).replace("|", "/")
        return f"refused: {reason[:150]} | | "
    return f"{on(answer, 'Int8')} | {on(answer, 'Float')} | {sum(answer.values())}"


def constructs() -> Iterator[tuple[str, onnx.ModelProto]]:
    """The models of the lint's tests: some that are clean, and for each rule one against it."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "rules")]
    import test_tensorrt

    yield from test_tensorrt.CLEAN.items()
    yield from ((f"against `{rule}`", model) for rule, (_, model) in test_tensorrt.VIOLATIONS.items())


def print_constructs(path: Path) -> None:
    print("| construct | lint | on INT8 | on floats | kernels |\n|---|---|---|---|---|")
    for name, model in constructs():
        onnx.save(model, path)
        severities = [found.severity for found in lint(path, target="tensorrt").findings]
        said = next((word for word in ("error", "warning", "note") if word in severities), "passes")
        print(f"| {name} | {said} | {cells(in_child(path))} |", flush=True)


def print_models(network: Network, count: int, path: Path) -> int:
    """How many promises are broken."""
    broken = 0
    for name, options in {**CLEAN, **OTHERS}.items():
        given = {"target": "tensorrt", "calibrate": network.calibration, "verify": False} | options
        result = quantize(network.model, **given)
        model = result.model
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = count  # as TensorRT takes it without a profile
        onnx.save(model, path)
        answer = in_child(path)
        quantized = sum(layer.get("bits") is not None for layer in result.report["layers"])
        others = sum(node.op_type in READERS for node in model.graph.node) - quantized
        if given["target"] == "tensorrt":
            broken += "refused" in answer or (name in CLEAN and on(answer, "Float") > others)
        print(f"| {network.name} | {name} | {quantized} | {cells(answer)} |", flush=True)
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(SAMPLES), nargs="+", default=list(SAMPLES))
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        print(json.dumps(build(arguments.build)))
        return 0
    import tensorrt_rtx

    logging.disable(logging.WARNING)
    print(f"TensorRT for RTX, Python package {tensorrt_rtx.__version__}\n")
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        print_constructs(path)
        print("\n| network | model | quantized layers | on INT8 | on floats | kernels |\n|---|---|---|---|---|---|")
        for name in arguments.network:
            broken += print_models(MAKERS[name](64), SAMPLES[name], path)
    print(f"\n{broken} promises broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
