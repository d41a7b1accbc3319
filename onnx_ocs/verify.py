"""Whether one model computes what another does, measured by onnxruntime in a process of its own.

A model that nobody here made may crash the runtime or never return; in a child process that is one clear error.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnx_ocs import child
from onnx_ocs.errors import BadSamples, OcsError, RuntimeFailed, UnsupportedModel
from onnx_ocs.graph.samples import GUESSES, Batch, Feed, Guess, Input, generate, read_samples
from onnx_ocs.graph.session import Session, run_samples
from onnx_ocs.numerics.compare import Difference, is_float

GENERATED = 8
"""Samples that are generated where none are given."""

SATURATED = 3.0
"""dB that a model may lose on onnxruntime's integer kernels before it is judged without them."""

NOISE_MARGIN = 4.0
"""A split model may differ by this many times what onnxruntime's own optimizations change in the source."""


@dataclass(frozen=True)
class Request:
    """What to compare."""

    reference: str  # path
    candidates: dict[str, str]  # stage -> path
    samples: str | None = None  # path; none generates them
    count: int = 8
    seed: int = 0
    bounds: dict[str, int] = field(default_factory=dict)  # of generated integers that index a table
    integers: list[str] = field(default_factory=list)  # stages that may run on integer kernels
    atol: float = 0.0
    rtol: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """What was found."""

    stages: dict[str, list[dict[str, Any]]]  # stage -> summary of each output (numerics.compare.Difference)
    noise: dict[str, float]  # output -> relative change by onnxruntime's optimizations, of the reference itself
    samples: int
    generated: bool
    deterministic: bool
    inputs: dict[str, list[int]]  # shapes of the first batch
    saturated: dict[str, float] = field(default_factory=dict)  # stage -> the least SQNR (dB) of its outputs by default


def compare(request: Request, timeout: float = child.TIMEOUT) -> Comparison:
    """Run the models on the same samples in a child process.

    Raises:
        UnsupportedModel: onnxruntime refuses the reference, or cannot run it.
        RuntimeFailed: a candidate is refused, or the runtime crashed or ran out of time.
        BadSamples: the samples do not fit.
    """
    return Comparison(**child.call("onnx_ocs.verify", asdict(request), timeout))


def loads(path: Path) -> bool:
    """Whether onnxruntime accepts the model."""
    try:
        compare(Request(str(path), {}, count=0))
    except OcsError:
        return False
    return True


def judge_split(comparison: Comparison, tolerance: float, stage: str = "split") -> str | None:
    """Why the split model is not the source's equal within float rounding; None if it is."""
    for output in comparison.stages[stage]:
        name = output["output"]
        if output["nonfinite"]:
            return f"output {name!r} has values that are not finite where the source's are"
        allowed = max(tolerance, NOISE_MARGIN * comparison.noise.get(name, 0.0))
        if output["max_abs_error"] is None:
            if output["top1_agreement"] is not None and 1 - output["top1_agreement"] > allowed:
                return f"output {name!r} is equal in {output['top1_agreement']:.2%} of its values only"
        elif output["max_rel_error"] is None or output["max_rel_error"] > allowed:
            error = output["max_rel_error"] if output["max_rel_error"] is not None else math.inf
            return f"output {name!r} differs by {error:.2g} of its largest magnitude, more than {allowed:.2g}"
    return None


def judge_quantized(comparison: Comparison, min_sqnr: float, stage: str = "quantized") -> str | None:
    """Why the quantized model is of no use; None if it is."""
    for output in comparison.stages[stage]:
        name = output["output"]
        if output["nonfinite"]:
            return f"output {name!r} has values that are not finite where the source's are"
        if output["sqnr_db"] is not None and output["max_rel_error"] is not None and output["sqnr_db"] <= min_sqnr:
            return (
                f"output {name!r} has a signal-to-noise ratio of {output['sqnr_db']:.1f} dB, not above {min_sqnr:g} dB"
            )
    return None


def judge_check(
    comparison: Comparison,
    strict: bool,
    min_sqnr: float | None,
    min_agreement: float | None,
    stage: str = "candidate",
) -> str | None:
    """Why the candidate does not pass the given criteria; None if it does."""
    for output in comparison.stages[stage]:
        name, agreement = output["output"], output["top1_agreement"]
        if strict and output["beyond_tolerance"]:
            return f"output {name!r} has {output['beyond_tolerance']} values beyond the tolerance"
        if min_agreement is not None and agreement is not None and agreement < min_agreement:
            return f"output {name!r} agrees in {agreement:.2%}, less than {min_agreement:.2%}"
    return judge_quantized(comparison, min_sqnr if min_sqnr is not None else -math.inf, stage)


def _compare(request: Request, say: child.Report) -> Comparison:
    say(f"loading {request.reference}")
    try:
        reference = Session(Path(request.reference))
    except RuntimeFailed as error:
        raise UnsupportedModel(
            f"{request.reference}: onnxruntime cannot load it ({error}); --no-verify transforms it unverified"
        ) from None
    candidates = {}
    for stage, path in request.candidates.items():
        say(f"loading the {stage} model")
        try:
            candidates[stage] = Session(Path(path))
        except RuntimeFailed as error:
            raise RuntimeFailed(f"onnxruntime refuses the {stage} model ({error})") from None
        if candidates[stage].outputs != reference.outputs:
            raise RuntimeFailed(f"the {stage} model has outputs {candidates[stage].outputs}, not {reference.outputs}")
    found: dict[str, dict[str, Difference]] = {stage: {} for stage in candidates}
    meant: dict[str, dict[str, Difference]] = {}  # without optimizations, and so without integer kernels
    plain: dict[str, Session] = {}
    noise: dict[str, float] = {}
    deterministic, samples, shapes = True, 0, {}
    for number, batch in enumerate(_batches(request, reference, say)):
        say(f"running {request.reference}")
        outputs = run_samples(reference, batch.feed, request.reference)
        if number == 0:
            shapes = {name: list(values.shape) for name, values in batch.feed.items()}
            deterministic, noise = _own_noise(request, reference, batch, outputs)
        for stage, session in candidates.items():
            say(f"running the {stage} model")
            _add(found[stage], stage, session, outputs, batch, request)
            if stage in request.integers:
                if number == 0:
                    plain[stage] = Session(Path(request.candidates[stage]), optimize=False)
                _add(meant.setdefault(stage, {}), stage, plain[stage], outputs, batch, request)
        samples += batch.count
    if not samples and request.count:
        raise BadSamples(f"{request.samples}: there are no samples in it, or fewer than the model takes at once")
    saturated = {}
    for stage, differences in meant.items():
        if (by_default := _least(found[stage])) < _least(differences) - SATURATED:
            saturated[stage], found[stage] = by_default, differences
    stages = {stage: [difference.summary() for difference in by_name.values()] for stage, by_name in found.items()}
    return Comparison(stages, noise, samples, request.samples is None, deterministic, shapes, saturated)


def _add(
    found: dict[str, Difference],
    stage: str,
    session: Session,
    outputs: dict[str, Any],
    batch: Batch,
    request: Request,
) -> None:
    """Fold in how the outputs of a candidate on one batch differ from those of the reference."""
    try:
        results = session.run(batch.feed)
    except RuntimeFailed as error:
        raise RuntimeFailed(f"the {stage} model fails where the source runs ({error})") from None
    for name, values in outputs.items():
        difference = found.setdefault(name, Difference(name))
        try:
            difference.add(values, results[name], batch.labels, request.atol, request.rtol)
        except (ValueError, KeyError) as error:
            raise RuntimeFailed(f"the {stage} model: {error}") from None


def _least(found: dict[str, Difference]) -> float:
    """The least SQNR of all outputs, in dB."""
    return min((one.sqnr_db for one in found.values() if one.sqnr_db is not None), default=0.0)


def _batches(request: Request, reference: Session, say: child.Report) -> Iterator[Batch]:
    if request.count == 0:
        return
    if request.samples is not None:
        limit = request.count if request.count > 0 else None
        yield from read_samples(Path(request.samples), reference.inputs, limit=limit)
        return
    say(f"running {request.reference} on generated samples")
    guess = _working_guess(request, reference)
    rng = np.random.default_rng(request.seed)
    made, free = 0, _free_batch(reference.inputs)
    while made < request.count:
        feed = generate(reference.inputs, guess, request.bounds, rng)
        count = max([1, *(values.shape[0] for values in feed.values() if values.ndim)] if free else [1])
        yield Batch(feed, count=count)
        made += count


def _free_batch(inputs: list[Input]) -> bool:
    return all(item.shape and not isinstance(item.shape[0], int) for item in inputs)


def _working_guess(request: Request, reference: Session) -> Guess:
    """How generated samples are chosen: with finite outputs if there is a way."""

    def make(guess: Guess) -> Feed:
        return generate(reference.inputs, guess, request.bounds, np.random.default_rng(request.seed))

    guess, _, failure = working_guess(reference, make)
    if guess is None:
        raise UnsupportedModel(
            f"{request.reference}: onnxruntime cannot run it on generated samples ({failure}); "
            "give real ones with --inputs, or --no-verify"
        )
    return guess


def working_guess(session: Session, make: Callable[[Guess], Feed]) -> tuple[Guess | None, bool, str]:
    """The first way of choosing shapes and values on which a model runs, one with finite outputs if there is such.

    Returns the way, whether the outputs are finite, and why the first way that failed did.
    """
    working, failure = None, ""
    for guess in GUESSES:
        feed = make(guess)
        if sum(values.nbytes for values in feed.values()) > 2**28:
            continue
        try:
            outputs = session.run(feed)
        except RuntimeFailed as error:
            failure = failure or str(error)
            continue
        working = working or guess
        if all(np.isfinite(v.astype(np.float64)).all() for v in outputs.values() if is_float(v)):
            return guess, True, failure
    return working, False, failure


def _own_noise(
    request: Request, reference: Session, batch: Batch, outputs: dict[str, Any]
) -> tuple[bool, dict[str, float]]:
    """Whether the reference gives the same outputs twice, and what onnxruntime's optimizations change in them."""
    again = _relative(outputs, run_samples(reference, batch.feed, request.reference))
    deterministic = max(again.values(), default=0.0) < 1e-6
    try:
        plain = Session(Path(request.reference), optimize=False).run(batch.feed)
    except RuntimeFailed:
        return deterministic, {}
    return deterministic, _relative(outputs, plain)


def _relative(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """Of each output the largest error relative to the peak; the share of unequal values where it is not of floats."""
    changes = {}
    for name, values in first.items():
        difference = Difference(name)
        if name not in second or values.shape != second[name].shape:
            changes[name] = 1.0
            continue
        difference.add(values, second[name])
        changes[name] = min(1.0, difference.max_rel_error) if difference.is_float else 1 - (difference.agreement or 1.0)
        changes[name] = 1.0 if difference.nonfinite else changes[name]
    return changes


def answer(asked: dict[str, Any], say: child.Report) -> dict[str, Any]:
    """What the child does."""
    return asdict(_compare(Request(**asked), say))
