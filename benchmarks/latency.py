"""What the models cost and keep in onnxruntime and OpenVINO: ``python benchmarks/latency.py``.

The float model, onnxruntime's own ``quantize_static`` with several settings, and onnx-ocs at W8A8 for ``--target ort``:
without splitting, and at ratios of 0.01, 0.02 and 0.05 with copies as ``--fold auto`` decides, made by the layers in
front (``always``), gathered (``never``), all of them whatever they cost, and gathered without alignment. Where OpenVINO
is installed, the float model and ``--target openvino`` in it too.

All models of a network are in memory together. In each round each of them has its turn, in an order of its own: one run
that does not count, and then as many as fill a few milliseconds, of which the fastest does, since another process may
come in between. Times are medians over the rounds; ratios are medians of the ratios within each round. The model
without splitting has two turns, and what the second is of the first says how much of a ratio is noise. One sample at a
time, with one thread and with two. Beside the time stand the integer kernels in onnxruntime's own optimized model, and
SQNR and agreement with the float model on other samples than those for calibration; where the kernels of this CPU
saturate, also without that ("exact": ``session.x64quantprecision`` = 1).

Exit status 1 where a promise is broken, with one thread:

- W8A8 without splitting takes at most 1.05 times as long as the fastest model of ``quantize_static``,
- every Conv, Gemm and MatMul for ``--target ort`` is an integer kernel,
- without splitting the agreement is at least the best of ``quantize_static``, less 0.5 points or two samples,
- ``--ratio 0.02`` takes at most 1.10 times as long as no splitting, on SqueezeNet and the shapes of ResNet-50.
"""

import argparse
import hashlib
import importlib.util
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from networks import MAKERS, Network, add_options, networks, outputs, saturates
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod
from peers import quantized_statically
from speed import resnet50

from onnx_ocs import quantize
from onnx_ocs.numerics.compare import decibels
from onnx_ocs.optimized import optimize
from onnx_ocs.rules.kernels import FLOAT, INTEGER

STATIC: dict[str, dict[str, Any]] = {
    "per channel, MinMax": {"per_channel": True},
    "per tensor, MinMax": {"per_channel": False},
    "per channel, Percentile": {"per_channel": True, "calibrate_method": CalibrationMethod.Percentile},
}
"""Settings of ``quantize_static``."""

KEPT = 32
"""Images for ``Percentile``, which holds every value that it has seen."""

COPIES: dict[str, dict[str, Any]] = {
    "": {},
    ", made twice": {"fold": "always"},
    ", gathered": {"fold": "never"},
    ", all copies": {"align": 4},
    ", gathered, unaligned": {"fold": "never", "align": 1},
}
"""Where copies of channels come from, and what they are aligned to; with an alignment none are left out for their cost.
"""

RATIOS = (0.01, 0.02, 0.05)
ALIGNED_AT = (0.02,)
"""Ratios at which an alignment is given."""

BY_ORT, BY_OCS, BY_OPENVINO = "quantize_static", "onnx-ocs", "OpenVINO"
PLAIN, SPLIT = f"{BY_OCS}, ratio 0", f"{BY_OCS}, ratio 0.02"
AGAIN = f"{PLAIN}, again"

FLAT = {"ResNet-50 shapes", "SqueezeNet 1.1"}
"""Networks for which splitting is promised to cost next to nothing."""

TURN = 0.005
"""Seconds that a turn of a model takes at least."""


@dataclass(frozen=True)
class Candidate:
    """A model to measure."""

    name: str
    path: Path
    runtime: str = "onnxruntime"
    weights: float = 1.0  # times those of the source


@dataclass(frozen=True)
class Quality:
    """How near the outputs are to those of the float model."""

    sqnr: float
    agreement: float | None  # percent; none where the outputs are no classes

    def __str__(self) -> str:
        return f"{self.sqnr:.1f} | {'' if self.agreement is None else f'{self.agreement:.2f}'}"


@dataclass(frozen=True, eq=False)
class Measured:
    """What was found out about a candidate."""

    candidate: Candidate
    seconds: dict[int, NDArray[np.float64]]  # by threads: of each round
    quality: Quality
    exact: Quality | None  # without kernels that saturate
    integers: tuple[int, int] | None  # integer kernels, and all Conv, Gemm and MatMul


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ("resnet20", "squeezenet", "resnet50", "mobilenet", "kws", "mlp"))
    parser.add_argument("--rounds", type=int, default=40, help="at most")
    parser.add_argument("--seconds", type=float, default=30, help="after which no further round begins, but for 10")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--count", type=int, default=500, help="samples that SQNR and agreement are of")
    parser.add_argument("--no-openvino", action="store_true", help="leave OpenVINO out")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with_openvino = not arguments.no_openvino and importlib.util.find_spec("openvino") is not None
    saturating = saturates()
    print(f"onnxruntime {ort.__version__}; its integer kernels {'' if saturating else 'do not '}saturate on this CPU")
    if not with_openvino:
        print("without OpenVINO" if arguments.no_openvino else "OpenVINO is not installed and left out")
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, network in enumerate(_subjects(arguments, Path(scratch))):
            folder = Path(scratch, str(number))
            folder.mkdir()
            started = time.perf_counter()
            found = measure(network, folder, arguments, saturating, with_openvino)
            print_table(network, found, arguments.threads, saturating)
            count = min(arguments.count, len(network.images))
            broken += judge(network, found, min(arguments.threads), count)
            print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    print()
    for reason in broken:
        print(f"broken: {reason}")
    print(f"{len(broken)} promises broken")
    return int(bool(broken))


def _subjects(arguments: argparse.Namespace, folder: Path) -> Iterator[Network]:
    """The networks that the options name; each is made when it is its turn."""
    if arguments.model is not None:
        yield from networks(arguments)
        return
    for name in arguments.network:
        yield MAKERS[name](arguments.calibrate) if name in MAKERS else _resnet50(folder)


def _resnet50(folder: Path) -> Network:
    """Random weights on random images: only its time means something."""
    model = folder / "resnet50.onnx"
    resnet50(model)
    images = np.random.default_rng(0).standard_normal((24, 3, 224, 224), np.float32)
    return Network("ResNet-50 shapes", model, images[:8], images[8:], np.zeros(0, np.int64), classes=False)


def measure(
    network: Network, folder: Path, arguments: argparse.Namespace, saturating: bool, with_openvino: bool
) -> list[Measured]:
    candidates = [*_for_onnxruntime(network, folder)]
    if with_openvino:
        candidates += _for_openvino(network, folder)
    first = _firsts(candidates)  # models that are the same are measured once
    apart = [candidate for candidate in candidates if first[candidate.name] == candidate.name]
    seconds: dict[str, dict[int, NDArray[np.float64]]] = {name: {} for name in (*first.values(), AGAIN)}
    for threads in arguments.threads:
        runs = {candidate.name: _runner(candidate, network, threads) for candidate in apart}
        runs[AGAIN] = runs[PLAIN]
        for name, times in interleaved(runs, arguments.rounds, arguments.seconds).items():
            seconds[name][threads] = times
        del runs  # before those with other threads are made
    images = network.images[: arguments.count]
    reference = outputs(network.model, images)
    quality, exact, integers = {}, {}, {}
    for candidate in apart:
        own = candidate.runtime == "onnxruntime"
        found = outputs(candidate.path, images) if own else _in_openvino(candidate, images)
        quality[candidate.name] = _quality(network, reference, found)
        if own and saturating:
            exact[candidate.name] = _quality(network, reference, outputs(candidate.path, images, exact=True))
        if own:
            integers[candidate.name] = count_kernels(candidate.path)
    made = []
    for candidate in candidates:
        name = first[candidate.name]
        made.append(Measured(candidate, seconds[name], quality[name], exact.get(name), integers.get(name)))
        if candidate.name == PLAIN:
            made.append(replace(made[-1], candidate=replace(candidate, name=AGAIN), seconds=seconds[AGAIN]))
    return made


def _for_onnxruntime(network: Network, folder: Path) -> Iterator[Candidate]:
    yield Candidate("float", network.model)
    for number, (name, options) in enumerate(STATIC.items()):
        if "calibrate_method" in options and not network.classes:
            continue  # a percentile of random values has nothing to say
        target = folder / f"static{number}.onnx"
        quantized_statically(network, target, KEPT if "calibrate_method" in options else None, **options)
        yield Candidate(f"{BY_ORT}, {name}", target)
    settings: dict[str, dict[str, Any]] = {PLAIN: {"ratio": 0}}
    for ratio in RATIOS:
        for copies, options in COPIES.items():
            if "align" not in options or ratio in ALIGNED_AT:
                settings[f"{BY_OCS}, ratio {ratio}{copies}"] = {"ratio": ratio, **options}
    yield from _ours(network, folder, "ort", "onnxruntime", settings)


def _for_openvino(network: Network, folder: Path) -> Iterator[Candidate]:
    yield Candidate(f"{BY_OPENVINO}: float", network.model, BY_OPENVINO)
    settings = {f"{BY_OPENVINO}: {BY_OCS}, ratio {ratio}": {"ratio": ratio} for ratio in (0, *RATIOS)}
    yield from _ours(network, folder, "openvino", BY_OPENVINO, settings)


def _ours(
    network: Network, folder: Path, target: str, runtime: str, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[Candidate]:
    """Models by onnx-ocs, which calibrates once."""
    seen = folder / f"{target}.npz"
    rounding = {} if network.classes else {"round": "compensated"}  # of random weights only the time is looked at
    for number, (name, options) in enumerate(settings.items()):
        path = folder / f"{target}{number}.onnx"
        samples = {"stats": seen} if seen.exists() else {"calibrate": network.calibration, "save_stats": seen}
        result = quantize(network.model, path, target=target, verify=False, **rounding, **samples, **options)
        yield Candidate(name, path, runtime, result.report["overhead"]["weights"])


def _firsts(candidates: Sequence[Candidate]) -> dict[str, str]:
    """For each candidate the first one with the same graph in the same runtime."""
    seen: dict[tuple[str, str], str] = {}
    found = {}
    for candidate in candidates:
        graph = onnx.load(candidate.path).graph.SerializeToString(deterministic=True)
        key = candidate.runtime, hashlib.sha256(graph).hexdigest()
        found[candidate.name] = seen.setdefault(key, candidate.name)
    return found


def _runner(candidate: Candidate, network: Network, threads: int) -> Callable[[], object]:
    """What runs a model once, on one sample."""
    sample = network.images[:1]
    if candidate.runtime == BY_OPENVINO:
        request = _compiled(candidate.path, sample, threads).create_infer_request()
        return lambda: request.infer([sample])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # the next model needs the cores
    session = ort.InferenceSession(str(candidate.path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: sample})


def _compiled(path: Path, sample: NDArray[np.float32], threads: int) -> Any:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    model.reshape(list(sample.shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    return core.compile_model(model, "CPU", settings)


def _in_openvino(candidate: Candidate, images: NDArray[np.float32]) -> NDArray[np.float32]:
    compiled = _compiled(candidate.path, images[:1], 2)
    return np.concatenate([compiled(image[None])[0].copy() for image in images])


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, most: float) -> dict[str, NDArray[np.float64]]:
    """Seconds of one run of each model in each round; of 10 rounds at least if ``most`` seconds are over."""
    order = np.random.default_rng(0)
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 10 and time.perf_counter() - started > most:
            break
        for name in order.permutation(names):
            runs[name]()  # the caches hold another model
            times[name].append(_fastest_run(runs[name]))
    return {name: np.array(taken) for name, taken in times.items()}


def _fastest_run(run: Callable[[], object]) -> float:
    """Seconds of the fastest of two runs, or of those that fill a turn."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < TURN:
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return min(taken)


def count_kernels(path: Path) -> tuple[int, int]:
    """The integer kernels among what became of Conv, Gemm and MatMul, and their number, in the optimized model."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "optimized.onnx")
        optimize(path, target)
        ops = [node.op_type for node in onnx.load(target, load_external_data=False).graph.node]
    integers = sum(op in INTEGER or op == "QLinearConv" for op in ops)
    return integers, integers + sum(op in FLOAT for op in ops)


def _quality(network: Network, reference: NDArray[np.float32], found: NDArray[np.float32]) -> Quality:
    wanted = reference.astype(np.float64)
    sqnr = decibels(float(np.square(wanted).sum()), float(np.square(found - wanted).sum()))
    if not network.classes:
        return Quality(sqnr, None)
    same = reference.reshape(len(reference), -1).argmax(axis=1) == found.reshape(len(found), -1).argmax(axis=1)
    return Quality(sqnr, 100 * float(same.mean()))


def ratio(found: Measured, base: Measured, threads: int) -> float:
    """The median over the rounds of how much longer ``found`` takes."""
    return float(np.median(found.seconds[threads] / base.seconds[threads]))


def print_table(network: Network, found: Sequence[Measured], threads: Sequence[int], saturating: bool) -> None:
    by_name = {one.candidate.name: one for one in found}
    fastest = _fastest(found, min(threads))
    print(f"\n{network.name}: fastest of {BY_ORT}: {fastest.candidate.name.removeprefix(f'{BY_ORT}, ')}\n")
    columns = ["model", "weights", "on integers"]
    for count in threads:
        columns += [f"ms, threads {count}", "x float", "x ratio 0"]
    columns += ["SQNR", "agreement", *(["SQNR exact", "agreement exact"] if saturating else [])]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for one in found:
        openvino = one.candidate.runtime == BY_OPENVINO
        prefix = f"{BY_OPENVINO}: " if openvino else ""
        cells = [one.candidate.name, f"{one.candidate.weights:.3f}"]
        cells.append("" if one.integers is None else "{} of {}".format(*one.integers))
        for count in threads:
            cells.append(f"{1000 * np.median(one.seconds[count]):.3f}")
            cells += [f"{ratio(one, by_name[base], count):.2f}" for base in (f"{prefix}float", f"{prefix}{PLAIN}")]
        cells.append(str(one.quality))
        if saturating:
            cells.append(" | " if one.exact is None else str(one.exact))
        print(f"| {' | '.join(cells)} |", flush=True)


def _fastest(found: Sequence[Measured], threads: int) -> Measured:
    theirs = [one for one in found if one.candidate.name.startswith(BY_ORT)]
    return min(theirs, key=lambda one: float(np.median(one.seconds[threads])))


def judge(network: Network, found: Sequence[Measured], threads: int, count: int) -> list[str]:
    """The promises that are broken, and by how much."""
    by_name = {one.candidate.name: one for one in found}
    plain, fastest = by_name[PLAIN], _fastest(found, threads)
    theirs = [one for one in found if one.candidate.name.startswith(BY_ORT)]
    broken = []
    if (taken := ratio(plain, fastest, threads)) > 1.05:
        broken.append(f"{PLAIN}: {taken:.2f} times the time of {fastest.candidate.name} (at most 1.05)")
    for one in found:
        if one.candidate.name.startswith(BY_OCS) and one.integers is not None and one.integers[0] < one.integers[1]:
            broken.append(f"{one.candidate.name}: {one.integers[0]} of {one.integers[1]} on integers")
    for way, quality in (("", lambda one: one.quality), (" without saturation", lambda one: one.exact)):
        if not network.classes or quality(plain) is None:
            continue
        best = max(theirs, key=lambda one: quality(one).agreement)
        ours, most, allowed = quality(plain).agreement, quality(best).agreement, max(0.5, 200 / count)
        if ours < most - allowed:
            others = f"{best.candidate.name}: {most:.2f} (at most {allowed:.2f} less)"
            broken.append(f"{PLAIN}: agreement {ours:.2f}{way}, {others}")
    if network.name in FLAT and (taken := ratio(by_name[SPLIT], plain, threads)) > 1.10:
        broken.append(f"{SPLIT}: {taken:.2f} times the time without splitting (at most 1.10)")
    return [f"{network.name}: {reason}" for reason in broken]


if __name__ == "__main__":
    sys.exit(main())
