"""From a goal to the recipe that reaches it: each trial is a transformation of its own, on the same statistics."""

import hashlib
import math
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from onnx_ocs import pipeline
from onnx_ocs.decide import decide
from onnx_ocs.errors import UnsupportedModel
from onnx_ocs.graph import files
from onnx_ocs.graph.model import Model
from onnx_ocs.numerics.planning import noise_to_signal
from onnx_ocs.numerics.weights import grouped
from onnx_ocs.recipe import Recipe
from onnx_ocs.run import Calibration, Known, Progress, Run, Source
from onnx_ocs.search import Goal, LayerCost, Search, measured, read_trials, write_front, write_trials

SAMPLES = 512
"""On which a trial is measured, of those for calibration, where no others are given."""


def reach(
    source: Source,
    target: Path | None,
    recipe: Recipe,
    inputs: Path | None,
    calibration: Calibration,
    timeout: float,
    progress: Progress,
    goal: Goal,
    given: Collection[str],
    state: Path | None = None,
    front: Path | None = None,
) -> pipeline.Outcome:
    """Search for the recipe that reaches ``goal``, and transform ``source`` by it; the report has the search as well.

    Args:
        given: options that stay as they are.
        state: a file that keeps the trials, from which a search that was broken off goes on.
        front: where to write the Pareto front: CSV, or JSON by any other name.

    Raises:
        VerificationFailed: no trial reaches the goal.
        OcsError: the model or the samples cannot be used.
    """
    with (
        files.workplace(None) as folder,
        pipeline.samples_at_hand(source, recipe, calibration, folder, timeout) as held,
    ):
        known = Known(folder / "known")
        known.folder.mkdir()
        kept = replace(held, save_stats=None)

        def report(tried: Recipe) -> dict[str, Any]:
            made = folder / "trial.onnx"
            return pipeline.transform(
                source, made, tried, inputs, kept, timeout, lambda stage: None, known, SAMPLES
            ).report

        mark = "" if state is None else _mark(source, recipe, inputs, held)
        search = Search(
            goal,
            recipe,
            frozenset(given),
            _costs(source, recipe, held, timeout, progress, known),
            lambda tried: measured(lambda: report(tried)),
            {} if state is None else read_trials(state, mark),
            progress,
            lambda trials: None if state is None else write_trials(state, mark, trials),
        )
        try:
            best = search.run()
        finally:
            if front is not None:
                write_front(front, search.front())
        # by statistics of its own, so that the recipe runs again to the same bytes
        chosen = Recipe.of(best.options, stored=recipe.plain())
        outcome = pipeline.transform(source, target, chosen, inputs, held, timeout, progress, count=SAMPLES)
    outcome.report["search"] = {
        "goal": asdict(goal),
        "trials": len(search.trials),
        "front": [asdict(trial) for trial in search.front()],
    }
    return outcome


def _costs(
    source: Source, recipe: Recipe, calibration: Calibration, timeout: float, progress: Progress, known: Known
) -> list[LayerCost]:
    """What each layer that is quantized loses by few bits, as it is predicted."""
    model = Model.load(source)
    run = Run(recipe, source, None, known.folder, None, calibration, timeout, progress, narrow=True, known=known)
    work, _ = decide(run, model)
    made = []
    for plan in work.plans:
        if not plan.declined and "bits" not in plan.given:
            values = work.values(plan)
            noise = noise_to_signal(grouped(values, plan.axes), work.inputs(plan).square, 1, not plan.per_channel)
            made.append(LayerCost(plan.layer.name, math.prod(values.shape), noise))
    if not made:
        raise UnsupportedModel(f"{model.name}: there is no layer whose bits could be chosen; see onnx-ocs inspect")
    return made


def _mark(source: Source, recipe: Recipe, inputs: Path | None, calibration: Calibration) -> str:
    """Of all that figures depend on."""
    found = hashlib.sha256(Model.load(source).digest().encode())
    found.update(repr(sorted(recipe.plain().items())).encode())
    for path in (inputs, calibration.samples, calibration.stats):
        found.update(b"|")
        if isinstance(path, Path):
            for file in [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file()):
                with file.open("rb") as opened:
                    found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()
