"""From a source to a target: load, find layers, decide, split, quantize, verify, save, report."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from onnx_ocs import verify
from onnx_ocs._version import __version__
from onnx_ocs.errors import RuntimeFailed, UnsupportedModel, VerificationFailed
from onnx_ocs.graph import files
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.hints import table_lengths
from onnx_ocs.graph.layers import Declined, Layer, find_layers
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.opset import CannotRaise, raise_opset
from onnx_ocs.numerics.weights import range_of, recombination_error
from onnx_ocs.passes.base import LayerPlan, Pass, Work
from onnx_ocs.passes.choose_grid import ChooseGrid
from onnx_ocs.passes.choose_steps import ChooseSteps
from onnx_ocs.passes.plan_splits import PlanSplits
from onnx_ocs.passes.quantize_weights import QuantizeWeights
from onnx_ocs.passes.select_layers import SelectLayers
from onnx_ocs.passes.split_weights import SplitWeights
from onnx_ocs.recipe import Recipe
from onnx_ocs.report import layer_rows, overhead, stage_summary

LOW_SQNR = 10.0
"""Below this many dB the report says that the result may be of little use."""

Source = str | Path | onnx.ModelProto
Progress = Callable[[str], None]

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


@dataclass
class Run:
    """One transformation under way."""

    recipe: Recipe
    source: Source
    target: Path | None
    folder: Path  # for files on the way
    inputs: Path | None
    timeout: float
    progress: Progress
    narrow: bool  # whether INT4 and INT2 may be used
    raised: bool = False  # whether the opset was
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        self.progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    inputs: Path | None = None,
    timeout: float = verify.TIMEOUT,
    progress: Progress = lambda stage: None,
) -> Outcome:
    """Split and quantize ``source`` by ``recipe``, verify the result, and write it to ``target``.

    Raises:
        OcsError: the model or the samples cannot be used, or the result is not what it has to be; nothing is written.
    """
    with files.workplace(target) as folder:
        run = Run(recipe, source, target, folder, inputs, timeout, progress, narrow=recipe.container == "auto")
        try:
            return _transform(run)
        except (RuntimeFailed, VerificationFailed) as error:
            if not (run.narrow and run.raised):
                raise
            failure = error
        run.narrow, run.raised = False, False
        why = str(failure).removesuffix("; nothing was written")
        run.notes[:] = [f"INT8 is kept, since the model with a narrower type did not pass: {why}"]
        return _transform(run)


def _transform(run: Run) -> Outcome:
    recipe = run.recipe
    with run.timed("load"):
        model = Model.load(run.source)
        size = model.nbytes()
        _check_structure(run, model)
    if recipe.bits is None and not recipe.float:
        run.notes.append("nothing to do: weights stay float (--bits none), so the model is copied as it is")
        return _finish(run, model, Work(Editor(model), []), [], size)
    with run.timed("plan"):
        work, declined = _decide(run, model)
    if all(plan.declined or (recipe.float and not plan.extra) for plan in work.plans):
        run.notes.append("nothing to do: the model is copied as it is")
        return _finish(run, Model.load(run.source), work, declined, size)
    aware = recipe.split == "qa"
    stages: dict[str, Path] = {}
    with run.timed("split"):
        work.plans = SplitWeights(aware=aware and recipe.bits is not None).apply(work)
        work.editor.commit()
        if recipe.verify and not recipe.float and (run.raised or any(plan.extra for plan in work.plans)):
            stages["split"] = run.folder / "split.onnx"
            model.save(stages["split"])
    if not recipe.float:
        with run.timed("quantize"):
            work.plans = QuantizeWeights(aware=aware).apply(work)
            work.editor.commit()
    for name in work.editor.lost_inputs:
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


def _check_structure(run: Run, model: Model) -> None:
    """Refuse what neither the checker nor onnxruntime accepts; what one of them accepts is transformed."""
    try:
        onnx.checker.check_model(model.bare())
    except (onnx.checker.ValidationError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        if not verify.loads(_reference(run, model)):
            raise UnsupportedModel(
                f"{model.name}: neither onnx's checker ({reason}) nor onnxruntime accepts it; repair or export it again"
            ) from None


def _decide(run: Run, model: Model) -> tuple[Work, list[Declined]]:
    """All decisions, as data; the model's opset is raised first where the integers need it."""
    recipe = run.recipe
    select = SelectLayers(recipe.only, recipe.skip, recipe.quantize_ops, recipe.first)
    grid = ChooseGrid(recipe.bits or 8, recipe.per_channel, recipe.first, run.narrow, stored=not recipe.float)
    work, declined = _found(model, select)
    if not recipe.float and _raise_opset(run, model, work, grid):
        work, declined = _found(model, select)
    steps: list[Pass] = [grid, PlanSplits(recipe.ratio, recipe.split_policy), ChooseSteps(recipe.clip)]
    for step in steps:
        work.plans = step.apply(work)
    return work, declined


def _found(model: Model, select: SelectLayers) -> tuple[Work, list[Declined]]:
    found = find_layers(editor := Editor(model))
    work = Work(editor, [LayerPlan(layer) for layer in found if isinstance(layer, Layer)])
    work.plans = select.apply(work)
    return work, [item for item in found if isinstance(item, Declined)]


def _raise_opset(run: Run, model: Model, work: Work, grid: ChooseGrid) -> bool:
    """Raise the opset as far as the layers need it and onnx's converter can; whether it was raised."""
    wanted = [plan for plan in work.plans if not plan.declined and not plan.layer.weight.home.is_function]
    now = model.opset()
    for target in sorted({opset for plan in wanted for opset in grid.opsets(plan) if opset > now}, reverse=True):
        try:
            raise_opset(model, target)
        except CannotRaise as reason:
            run.notes.append(f"the opset stays {now}, though {target} is wanted: onnx's converter fails ({reason})")
            continue
        run.notes.append(f"the opset was raised from {now} to {target}, which the integers need")
        run.raised = True
        return True
    return False


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
    request = verify.Request(
        str(_reference(run, Model.load(run.source))),
        {stage: str(path) for stage, path in stages.items()},
        samples=str(run.inputs) if run.inputs else None,
        count=-1 if run.inputs else verify.GENERATED,
        seed=recipe.seed,
        bounds=table_lengths(work.editor),
    )
    comparison = verify.compare(request, run.timeout)
    if not comparison.deterministic:
        _prove(run, model, work)
        run.notes.append(
            "the source's outputs differ from run to run; verified by proof (the copies of each weight sum to it) and "
            "structure (onnxruntime loads and runs the result) only"
        )
    found: dict[str, Any] = {
        "samples": comparison.samples,
        "generated": comparison.generated,
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
            raise VerificationFailed(f"the {stage} model does not pass: {reason}; nothing was written")
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


def _prove(run: Run, model: Model, work: Work) -> None:
    """Show for each layer that the copies of its weight sum to it."""
    tolerance = run.recipe.tolerance or _tolerance(work)
    for plan in work.plans:
        if plan.extra and not plan.declined:
            error = recombination_error(plan.layer.weight.read(model), plan.splits, plan.axes, plan.step)
            if error > tolerance:
                raise VerificationFailed(
                    f"the copies of the weight of {plan.layer.name!r} do not sum to it (error {error:.2g}); "
                    "nothing was written"
                )


def _reference(run: Run, model: Model) -> Path:
    """A file with the source, which onnxruntime can read."""
    if isinstance(run.source, onnx.ModelProto):
        path = run.folder / "source.onnx"
        if not path.exists():
            model.save(path)
        return path
    return Path(run.source)


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
        "layers": layer_rows(work.plans, declined),
        "overhead": overhead(work.plans),
        "size": {"before": size, "after": after},
        "verification": verified,
        "seconds": {name: round(value, 4) for name, value in run.seconds.items()},
    }
    return Outcome(report, run.target, whole)


def survey(source: Source, recipe: Recipe) -> list[dict[str, Any]]:
    """The decisions for each layer, with what they rest on; the model is not touched."""
    model = Model.load(source)
    run = Run(replace(recipe, float=True), source, None, Path(), None, 0.0, lambda stage: None, narrow=False)
    work, declined = _decide(run, model)
    rows = layer_rows(work.plans, declined)
    for row, plan in zip(rows, work.plans, strict=False):
        if not plan.declined:
            row["outlier"], row["range"] = range_of(work.values(plan), plan.splits, plan.axes)
    return rows
