"""The functions of the package: quantize, split, check, inspect, lint."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from onnx_ocs import child, pipeline, verify
from onnx_ocs.errors import RuntimeFailed
from onnx_ocs.graph import files
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.hints import table_lengths
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.samples import Samples
from onnx_ocs.reach import reach
from onnx_ocs.recipe import PRESETS, Recipe, stored_recipe
from onnx_ocs.rules import LayerKernel, find_violations
from onnx_ocs.rules.base import Finding
from onnx_ocs.run import Calibration, Source, on_disk
from onnx_ocs.search import Goal
from onnx_ocs.targets import TARGETS


@dataclass(frozen=True)
class Result:
    """A transformation that passed."""

    report: dict[str, Any]
    """What was done, under the names of the report file."""

    path: Path | None
    """Where the model was written."""

    _whole: onnx.ModelProto | None = field(default=None, repr=False)

    @property
    def model(self) -> onnx.ModelProto:
        """The new model, with its weights."""
        if self._whole is not None:
            return self._whole
        assert self.path is not None
        return onnx.load(self.path)


def quantize(
    source: Source,
    destination: str | Path | None = None,
    *,
    preset: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    inputs: str | Path | None = None,
    calibrate: Samples | None = None,
    stats: str | Path | None = None,
    save_stats: str | Path | None = None,
    report: str | Path | None = None,
    goal: Goal | None = None,
    search_state: str | Path | None = None,
    front: str | Path | None = None,
    timeout: float = child.TIMEOUT,
    progress: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> Result:
    """Split the outlier channels of a model, quantize its weights, verify the result and write it.

    Args:
        source: a path or a proto, which is not modified.
        destination: where to write; without it the model is only returned.
        preset: ``paper``.
        recipe: a stored recipe or report (a path or its content) whose options hold where nothing else is said.
        inputs: samples to verify on; without it some of those for calibration, or seeded random ones.
        calibrate: samples that the scales of activations are chosen by, which have 8 bits then if nothing else is said:
            a file or folder, arrays, or an iterable of arrays (of dicts by input name, where there are several inputs).
            An iterable goes through a temporary file, so that it is read only once, and never held whole.
        stats: statistics that an earlier run saved, in place of samples.
        save_stats: where to save those of this run.
        report: where to write the report as JSON.
        goal: what the result must reach; bits, ratio, clip, rounding and the like that do are searched for, except for
            those given here.
        search_state: a file that keeps the trials of the search, which goes on from there.
        front: where to write the Pareto front of the trials, as CSV or (by any other name) JSON.
        timeout: seconds that the verification may take.
        progress: called with the name of each stage.
        options: those of the command line with ``_`` for ``-`` (see :class:`onnx_ocs.recipe.Recipe`).

    Raises:
        OcsError: the model or the samples cannot be used, or the result does not pass; nothing is written.
        ValueError: an option is out of its range.
    """
    if calibrate is not None and stats is not None:
        raise ValueError("stats takes the place of calibrate; give one of them")
    calibration = Calibration(calibrate, _path(stats), _path(save_stats))
    chosen = resolve(options, preset, recipe, calibration.given, calibrate is not None)
    if chosen.synthetic is not None and calibration.given:
        raise ValueError("synthetic samples are for want of real ones; leave synthetic out, or calibrate and stats")
    if save_stats is not None and (calibrate is None or not chosen.calibrates):
        raise ValueError("save-stats keeps what calibration sees, and with these options there is none")
    if goal is None and (search_state is not None or front is not None):
        raise ValueError("search-state and front are of the search for a goal; give one (--target-agreement, ...)")
    read = {"recipe": recipe, "inputs": inputs, "calibrate": calibrate, "stats": stats}
    beside = {"report": report, "save_stats": save_stats, "search_state": search_state, "front": front}
    files.keep_apart(read, {"destination": destination})
    files.keep_apart({"source": source, "destination": destination, **read}, beside)
    for path in beside.values():
        if path is not None:
            with files.workplace(Path(path)):
                pass  # it can be written, so that no model is written without it
    asked = source, _path(destination), chosen, _path(inputs), calibration, timeout, progress
    if goal is None:
        outcome = pipeline.transform(*asked)
    else:
        check_searched(chosen)
        kept = {**PRESETS.get(preset or "", {}), **options}
        outcome = reach(*asked, goal, kept, _path(search_state), _path(front))
    if report is not None:
        write_json(Path(report), outcome.report)
    return Result(outcome.report, outcome.path, outcome.model)


def check_searched(recipe: Recipe) -> None:
    """Refuse options under which no goal can be searched for.

    Raises:
        ValueError: why not.
    """
    if recipe.float or recipe.bits is None:
        raise ValueError("a goal is searched for by the bits of weights, which stay float with these options")
    if not recipe.verify:
        raise ValueError("a goal is reached by what verification measures; leave no-verify out")


def split(source: Source, destination: str | Path | None = None, **options: Any) -> Result:
    """As :func:`quantize`, but the model stays float: the same function with a narrower range of weights."""
    return quantize(source, destination, **{**options, "float": True})


def resolve(
    options: Mapping[str, Any],
    preset: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    calibrated: bool = False,
    sampled: bool | None = None,
) -> Recipe:
    """The recipe of some explicit options; ``per_tensor``, ``no_verify`` and the like are understood as on the command
    line. With calibration activations have 8 bits, and with samples weights are rounded by ``hessian``, if nothing else
    is said; ``sampled`` is None where there may be some.

    Raises:
        ValueError: an option is unknown or out of its range.
        BadRecipe: ``recipe`` is a file without a recipe.
    """
    given = dict(options)
    for negative, positive in (("per_tensor", "per_channel"), ("no_verify", "verify"), ("no_fold_bn", "fold_bn")):
        if negative in given:
            given[positive] = not given.pop(negative)
    for name in ("bits", "act_bits", "block"):
        if given.get(name) == "none":
            given[name] = None
    stored = stored_recipe(Path(recipe)) if isinstance(recipe, str | Path) else recipe
    if stored is not None and isinstance(stored.get("recipe"), dict):
        stored = stored["recipe"]
    made_up = {**(stored or {}), **given}.get("synthetic") is not None
    calibrated = calibrated or made_up
    if calibrated and (stored or {}).get("act_bits") is None:
        given.setdefault("act_bits", 8)
    decided = {**(stored or {}), **(PRESETS.get(preset or "", {})), **given}
    if decided.get("round", "auto") == "auto":
        quantized = not decided.get("float", False) and decided.get("bits", 8) is not None
        naive = decided.get("split") == "naive"
        given["round"] = "nearest" if naive else "hessian" if sampled and quantized else "auto"
    made = Recipe.of(given, preset, stored)
    if made.needs_moments and sampled is False and not made_up:
        raise ValueError("round hessian needs samples (--calibrate); --round compensated does without")
    if made.calibrates and not calibrated:
        raise ValueError("act-bits needs samples: give --calibrate or --stats, or scale by batch (--act-split dynamic)")
    return made


@dataclass(frozen=True)
class CheckOutcome:
    """How a candidate compares with its reference."""

    passed: bool
    reason: str | None  # why not
    outputs: list[dict[str, Any]]  # of each output: errors, SQNR, agreement, KL divergence
    samples: int
    generated: bool
    deterministic: bool
    saturated_db: float | None = None  # where onnxruntime's kernels saturate on this CPU: the least SQNR by default


def check(
    reference: Source,
    candidate: Source,
    inputs: str | Path | None = None,
    samples: int | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    seed: int = 0,
    timeout: float = child.TIMEOUT,
) -> CheckOutcome:
    """Compare the outputs of two models on the same samples.

    Args:
        inputs: samples; seeded random ones without it.
        samples: how many; all of ``inputs``, or 8 random ones, if not given.
        atol, rtol: every value of an output must be within ``atol + rtol * |reference|``.
        min_sqnr: of every output, in dB; 0 if no criterion is given at all.
        min_agreement: share of equal top-1 classes (of equal values, for integer outputs), from 0 to 1.

    Raises:
        OcsError: a model or the samples cannot be used.
    """
    with files.workplace(None) as folder:
        first, second = Model.load(reference), Model.load(candidate)
        request = verify.Request(
            str(on_disk(reference, first, folder / "reference.onnx")),
            {"candidate": str(on_disk(candidate, second, folder / "candidate.onnx"))},
            samples=None if inputs is None else str(inputs),
            count=samples if samples is not None else verify.GENERATED if inputs is None else -1,
            seed=seed,
            bounds=table_lengths(Editor(first)),
            integers=["candidate"] if _runs_on_integers(second) else [],
            atol=atol or 0.0,
            rtol=rtol or 0.0,
        )
        try:
            comparison = verify.compare(request, timeout)
        except RuntimeFailed as error:
            return CheckOutcome(False, str(error), [], 0, inputs is None, True)
    strict = atol is not None or rtol is not None
    lowest = min_sqnr if min_sqnr is not None else None if strict or min_agreement is not None else 0.0
    reason = verify.judge_check(comparison, strict, lowest, min_agreement)
    outputs = comparison.stages["candidate"]
    return CheckOutcome(
        reason is None,
        reason,
        outputs,
        comparison.samples,
        comparison.generated,
        comparison.deterministic,
        comparison.saturated.get("candidate"),
    )


def inspect(
    source: Source,
    *,
    preset: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """What :func:`quantize` would do with each layer under the same options, and why not more; nothing is written.

    Each row is that of the report, with ``outlier`` (the largest magnitude in standard deviations of the weights) and
    ``range`` (the largest share after splitting relative to the largest weight) for layers that are not declined.
    """
    return pipeline.survey(source, resolve(options, preset, recipe, calibrated=True))


@dataclass(frozen=True)
class LintOutcome:
    """Where a model breaks the rules of a target."""

    passed: bool  # nothing worse than a note
    findings: list[Finding]
    kernels: list[LayerKernel]  # what onnxruntime made of each quantized layer, for targets that it runs

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)


def lint(
    source: Source,
    target: str,
    *,
    ignore: Iterable[str] = (),
    errors_only: bool = False,
    run: bool = True,
    timeout: float = child.TIMEOUT,
) -> LintOutcome:
    """Look for what a runtime refuses, computes wrongly, or leaves float in a quantized model (QDQ format) of any tool.

    Args:
        target: ``generic``, ``ort``, ``tensorrt`` or ``openvino``.
        ignore: rules to leave out.
        errors_only: look for errors alone, not for what is slow or wrong on some machines only.
        run: whether onnxruntime is asked which kernels it chooses, for ``ort``.
        timeout: seconds that it may take.

    Raises:
        OcsError: the model cannot be used.
        ValueError: there is no such target or rule.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, not {target!r}")
    rules, ignored = TARGETS[target].rules, set(ignore)
    if unknown := sorted(ignored.difference(rules)):
        raise ValueError(f"target {target} has the rules {', '.join(rules)}, not {unknown[0]!r}")
    model = Model.load(source)
    with files.workplace(None) as folder:
        chosen = [name for name in rules if name not in ignored]
        findings, kernels = find_violations(model, TARGETS[target], chosen, folder if run else None, timeout)
    if errors_only:
        findings = [finding for finding in findings if finding.severity == "error"]
    return LintOutcome(all(finding.severity == "note" for finding in findings), findings, kernels)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as JSON, whole or not at all.

    Raises:
        CannotWrite: there is no such folder, or it may not be written.
    """
    files.write(path, [memoryview((json.dumps(data, indent=1) + "\n").encode())])


def _runs_on_integers(model: Model) -> bool:
    """Whether activations are quantized anywhere."""
    return any(node.op == "QuantizeLinear" for scope in Editor(model).scopes for node in scope.graph.nodes)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
