"""From a source to a target: load, find layers, decide, split, quantize, verify, save, report."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from onnx_ocs import calibrate, verify
from onnx_ocs._version import __version__
from onnx_ocs.decide import decide, rounding_of
from onnx_ocs.errors import BadSamples, RuntimeFailed, UnsupportedModel, VerificationFailed
from onnx_ocs.graph import files
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.hints import table_lengths
from onnx_ocs.graph.layers import Declined
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.samples import stored
from onnx_ocs.numerics.weights import range_of, recombination_error
from onnx_ocs.passes.base import Work
from onnx_ocs.passes.correct_biases import CorrectBiases
from onnx_ocs.passes.quantize_activations import QuantizeActivations
from onnx_ocs.passes.quantize_biases import QuantizeBiases
from onnx_ocs.passes.quantize_weights import QuantizeWeights
from onnx_ocs.passes.split_by_batch import SplitByBatch
from onnx_ocs.passes.split_channels import SplitChannels
from onnx_ocs.passes.widen_makers import WidenMakers
from onnx_ocs.plans import LayerPlan
from onnx_ocs.recipe import Recipe
from onnx_ocs.report import layer_rows, overhead, stage_summary
from onnx_ocs.run import Calibration, Known, Progress, Run, Source, made_up, on_disk

CALIBRATED = 64
"""Samples of those for calibration that the result is verified on, where no others are given."""

LOW_SQNR = 10.0
"""Below this many dB the report says that the result may be of little use."""

SATURATES = (
    "on this CPU onnxruntime's 8-bit integer kernels saturate: {:.1f} dB SQNR by default; the figures are those "
    "without them; the session's configuration entry session.x64quantprecision = 1, or weights of 7 bits, avoid it"
)

SYNTHETIC = "calibrated on {} synthetic samples (--synthetic): ranges of real data may differ"

TOLERANCES: dict[int, float] = {
    onnx.TensorProto.DOUBLE: 1e-4,  # outputs are mostly float32 all the same
    onnx.TensorProto.FLOAT: 1e-4,
    onnx.TensorProto.FLOAT16: 2e-2,
    onnx.TensorProto.BFLOAT16: 1.3e-1,
}
"""How far a split model may be from its source, relative to the largest magnitude of an output.

About 16 units in the last place of the 16-bit types: each half of a weight is rounded by itself, by half a unit, and
so is each sum of activations; some layers of this leave errors of several units. Float32 has room to spare.
"""


@dataclass(frozen=True)
class Outcome:
    """What one transformation came to."""

    report: dict[str, Any]
    path: Path | None  # of the model that was written
    model: onnx.ModelProto | None  # where there is no path


def transform(
    source: Source,
    target: Path | None,
    recipe: Recipe,
    inputs: Path | None,
    calibration: Calibration,
    timeout: float,
    progress: Progress,
    known: Known | None = None,
    count: int = CALIBRATED,
) -> Outcome:
    """Split and quantize ``source`` by ``recipe``, verify the result, and write it to ``target``.

    Args:
        known: what earlier runs on the same source and samples found out, and where this one leaves it.
        count: samples of those for calibration that the result is verified on, where there are no ``inputs``.

    Raises:
        OcsError: the model or the samples cannot be used, or the result is not what it has to be; nothing is written.
    """
    with files.workplace(target) as folder, samples_at_hand(source, recipe, calibration, folder, timeout) as held:
        known, narrow = known or Known(folder), recipe.container == "auto"
        return _attempt(Run(recipe, source, target, folder, inputs, held, timeout, progress, narrow, known, count))


@contextlib.contextmanager
def samples_at_hand(
    source: Source, recipe: Recipe, calibration: Calibration, folder: Path, timeout: float
) -> Iterator[Calibration]:
    """The calibration with its samples as files: those that were given, or those that are made up."""
    here = folder / "samples"
    try:
        if calibration.samples is not None:
            calibration = replace(calibration, samples=stored(calibration.samples, here, recipe.calibration_samples))
        elif recipe.synthetic is not None and calibration.stats is None:
            made = made_up(source, folder, here, recipe.synthetic, recipe.seed, timeout)
            calibration = replace(calibration, samples=made, synthetic=True)
        yield calibration
    except BadSamples as error:  # of arrays, whose files nobody but this run knows
        raise BadSamples(str(error).replace(str(here), "the given samples")) from None


def _attempt(run: Run) -> Outcome:
    """With the narrowest integers first, and with INT8 if the result does not pass."""
    if run.calibration.synthetic:
        run.notes.append(SYNTHETIC.format(run.recipe.synthetic))
    if run.calibration.given and not (run.observes or run.gathers):
        run.notes.append("no statistics of activations are needed with these options; none were gathered or used")
    if idle := run.recipe.idle(run.calibration.samples is not None):
        run.notes.append(f"without effect here: {', '.join(f'--{name}' for name in idle)}")
    try:
        return _saving_stats(run, _transform(run))
    except (RuntimeFailed, VerificationFailed) as error:
        if not (run.narrow and run.raised):
            raise
        failure = error
    run.narrow, run.raised = False, False
    why = str(failure).removesuffix("; nothing was written")
    run.notes[:] = [f"INT8 is kept, since the model with a narrower type did not pass: {why}"]
    return _saving_stats(run, _transform(run))


def _saving_stats(run: Run, outcome: Outcome) -> Outcome:
    """Keep what calibration saw, if asked, now that the result has passed."""
    if run.calibration.save_stats is not None:
        calibrate.save(run.calibration.save_stats, run.known.seen or {}, run.mark(Model.load(run.source)))
    return outcome


def _transform(run: Run) -> Outcome:
    recipe = run.recipe
    with run.timed("load"):
        model = Model.load(run.source)
        size = model.nbytes()
        _check_structure(run, model)
    if recipe.bits is None and recipe.act_bits is None and not recipe.float:
        run.notes.append("nothing to do: weights stay float (--bits none), so the model is copied as it is")
        return _finish(run, model, Work(Editor(model), []), [], size)
    with run.timed("plan"):
        work, declined = decide(run, model)
    if not any(_changes(run, plan) for plan in work.plans):
        run.notes[:] = ["nothing to do: the model is copied as it is"]
        return _finish(run, Model.load(run.source), work, declined, size)
    aware = recipe.split == "qa"
    stages: dict[str, Path] = {}
    with run.timed("split"):
        work.plans = WidenMakers().apply(work)
        work.plans = SplitChannels(aware=aware and recipe.bits is not None, aware_data=aware).apply(work)
        work.plans = SplitByBatch(aware=aware).apply(work)
        work.editor.commit()
        edited = run.raised or run.folded or run.plain or run.equalized
        changed = edited or any(plan.expanded > plan.channels for plan in work.plans)
        if recipe.verify and not recipe.float and changed:
            stages["split"] = run.folder / "split.onnx"
            model.save(stages["split"])
    if not recipe.float:
        with run.timed("quantize"):
            if recipe.bits is not None:
                work.plans = QuantizeWeights(aware=aware).apply(work)
                work.plans = CorrectBiases().apply(work)
            work.plans = QuantizeBiases(recipe.rules.integer_bias).apply(work)
            work.plans = QuantizeActivations(recipe.rules.gathers_integers, recipe.rules.clips_integers).apply(work)
            work.editor.commit()
    for name in (*run.lost, *work.editor.lost_inputs):
        run.notes.append(
            f"{name!r} was a weight that callers could replace; now it is a constant, and no input any more"
        )
    _sign(model, recipe)
    if not recipe.verify:
        return _finish(run, model, work, declined, size)
    result = run.folder / (run.target.name if run.target else "result.onnx")
    with run.timed("save"):
        model.save(result, recipe.external_data)
    stages["split" if recipe.float else "quantized"] = result
    with run.timed("verify"):
        verified = _verify(run, model, work, stages)
    return _finish(run, model, work, declined, size, verified, result)


def _changes(run: Run, plan: LayerPlan) -> bool:
    """Whether anything is done to a layer."""
    quantized = not run.recipe.float and (run.recipe.bits is not None or plan.activation is not None)
    return not plan.declined and (quantized or plan.expanded > plan.channels)


def _check_structure(run: Run, model: Model) -> None:
    """Refuse what neither the checker nor onnxruntime accepts; what one of them accepts is transformed."""
    try:
        onnx.checker.check_model(model.bare())
    except (onnx.checker.ValidationError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        if not verify.loads(on_disk(run.source, model, run.folder / "source.onnx")):
            raise UnsupportedModel(
                f"{model.name}: neither onnx's checker ({reason}) nor onnxruntime accepts it; repair or export it again"
            ) from None


def _sign(model: Model, recipe: Recipe) -> None:
    """Leave the recipe in the model."""
    added = {"onnx_ocs.recipe": json.dumps(recipe.plain(), sort_keys=True), "onnx_ocs.version": __version__}
    kept = [item for item in model.proto.metadata_props if item.key not in added]
    del model.proto.metadata_props[:]
    model.proto.metadata_props.extend(kept)
    for key, value in added.items():
        model.proto.metadata_props.add(key=key, value=value)


def _verify(run: Run, model: Model, work: Work, stages: dict[str, Path]) -> dict[str, Any]:
    """The ``verification`` of the report.

    Raises:
        VerificationFailed: a stage is not what it has to be.
    """
    recipe = run.recipe
    samples = run.inputs or run.calibration.samples
    request = verify.Request(
        str(on_disk(run.source, Model.load(run.source), run.folder / "source.onnx")),
        {stage: str(path) for stage, path in stages.items()},
        samples=str(samples) if samples else None,
        count=-1 if run.inputs else run.count if samples else verify.GENERATED,
        seed=recipe.seed,
        bounds=table_lengths(work.editor),
        integers=["quantized"] if recipe.act_bits is not None else [],
    )
    comparison = verify.compare(request, run.timeout)
    if "quantized" in comparison.saturated:
        run.notes.append(SATURATES.format(comparison.saturated["quantized"]))
    if not comparison.deterministic:
        _prove(run, work)
        run.notes.append(
            "the source's outputs differ from run to run; verified by proof (the copies of each weight sum to it) and "
            "structure (onnxruntime loads and runs the result) only"
        )
    found: dict[str, Any] = {
        "samples": comparison.samples,
        "generated": comparison.generated or (run.calibration.synthetic and not run.inputs),
        "deterministic": comparison.deterministic,
    }
    tolerance = recipe.tolerance or _tolerance(work)
    for stage in stages:
        reason = None
        if comparison.deterministic and stage == "split":
            reason = verify.judge_split(comparison, tolerance)
        elif comparison.deterministic:
            reason = verify.judge_quantized(comparison, recipe.min_sqnr)
        if reason is not None:
            advice = "; the inputs were generated, real ones (--inputs) may show another result"
            advice = advice if comparison.generated and recipe.act_bits is not None else ""
            raise VerificationFailed(f"the {stage} model does not pass: {reason}{advice}; nothing was written")
        found[stage] = {**stage_summary(comparison, stage), "passed": True}
        lowest = found[stage]["sqnr_db"]
        if stage == "quantized" and comparison.deterministic and lowest is not None and lowest < LOW_SQNR:
            advice = "more bits or a larger ratio, or real samples (--inputs)" if comparison.generated else "more bits"
            run.notes.append(f"an output has less than {LOW_SQNR:g} dB SQNR; {advice} may show a better one")
    if "split" in found:
        found["split"]["tolerance"] = tolerance
    return found


def _tolerance(work: Work) -> float:
    kinds = {plan.layer.weight.data_type for plan in work.plans if not plan.declined}
    return max((TOLERANCES[kind] for kind in kinds), default=TOLERANCES[onnx.TensorProto.FLOAT])


def _prove(run: Run, work: Work) -> None:
    """Show for each layer that the copies of its weight sum to it."""
    tolerance = run.recipe.tolerance or _tolerance(work)
    for plan in work.plans:
        if plan.extra and not plan.declined:
            error = recombination_error(work.values(plan), plan.splits, plan.axes, plan.step)
            if error > tolerance:
                raise VerificationFailed(
                    f"the copies of the weight of {plan.layer.name!r} do not sum to it (error {error:.2g}); "
                    "nothing was written"
                )


def _finish(
    run: Run,
    model: Model,
    work: Work,
    declined: list[Declined],
    size: int,
    verified: dict[str, Any] | None = None,
    result: Path | None = None,
) -> Outcome:
    """Put the result in its place, and say what was done."""
    with run.timed("save"):
        after = model.nbytes()
        whole = model.whole() if run.target is None else None
        if run.target is not None and result is not None:
            files.publish(result, run.target)
        elif run.target is not None:
            model.save(run.target.resolve(), run.recipe.external_data)
    report = {
        "tool": "onnx-ocs",
        "version": __version__,
        "recipe": run.recipe.plain(),
        "notes": run.notes,
        "layers": layer_rows(work.plans, declined, run.recipe.float),
        "overhead": overhead(work.plans, work.statistics),
        "size": {"before": size, "after": after},
        "verification": verified,
        "seconds": {name: round(value, 4) for name, value in run.seconds.items()},
    }
    return Outcome(report, run.target, whole)


def survey(source: Source, recipe: Recipe) -> list[dict[str, Any]]:
    """The decisions for each layer, with what they rest on; the model is not touched."""
    model = Model.load(source)
    weights_only = replace(recipe, float=True, act_bits=None, act_ratio=0.0, act_split="static")
    known = Known(Path())
    run = Run(weights_only, source, None, Path(), None, Calibration(), 0.0, lambda stage: None, False, known)
    work, declined = decide(run, model)
    rows = layer_rows(work.plans, declined, True)
    asked = rounding_of(recipe, work.editor).asked(work.plans)
    for row, plan, rounding in zip(rows, work.plans, asked, strict=False):
        row["round"] = rounding
        if not plan.declined:
            row["outlier"], row["range"] = range_of(work.values(plan), plan.splits, plan.axes)
    return rows
