"""What is done with each layer: raise the opset, fold, calibrate, and let the deciding passes run in their order."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnx_ocs import calibrate, moments
from onnx_ocs.errors import OcsError
from onnx_ocs.graph.contraction import Contraction, contraction
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Declined, Layer, find_layers
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.observe import OPSET
from onnx_ocs.graph.opset import CannotRaise, raise_opset
from onnx_ocs.graph.predicted import predicted
from onnx_ocs.numerics.assumed import SHARE, SHARE_OF_NOISE
from onnx_ocs.numerics.cost import Rates
from onnx_ocs.passes.base import Pass, Work, is_visible, observed, signed
from onnx_ocs.passes.choose_activation_steps import ChooseActivationSteps
from onnx_ocs.passes.choose_grid import ChooseGrid
from onnx_ocs.passes.choose_rounding import ChooseRounding
from onnx_ocs.passes.choose_steps import ChooseSteps
from onnx_ocs.passes.equalize_layers import EqualizeLayers
from onnx_ocs.passes.fold_batch_normalization import FoldBatchNormalization
from onnx_ocs.passes.limit_costs import LimitCosts
from onnx_ocs.passes.place_tensors import PlaceTensors
from onnx_ocs.passes.plan_activations import UNCOVERED, PlanActivations
from onnx_ocs.passes.plan_blocks import PlanBlocks
from onnx_ocs.passes.plan_splits import PlanSplits
from onnx_ocs.passes.plan_streams import PlanStreams
from onnx_ocs.passes.select_layers import SelectLayers
from onnx_ocs.passes.write_plainly import WritePlainly
from onnx_ocs.pictures import takes_pictures
from onnx_ocs.plans import LayerPlan
from onnx_ocs.propagation import Propagation, is_noisy
from onnx_ocs.recipe import Recipe
from onnx_ocs.run import Run
from onnx_ocs.synthetic import COUNT

MADE_UP = "weights were rounded by synthetic samples; real ones (--calibrate) do better"

FOLLOWED = 4 * COUNT
"""Made-up samples, if they are so many, that errors are followed on where most layers are convolutions."""

OTHERWISE = "--round assumed does without it"

NOT_EVEN = "no ranges could be evened out across layers (--equalize)"


def decide(run: Run, model: Model) -> tuple[Work, list[Declined]]:
    """All decisions, as data; before them the opset is raised where it must be, and normalizations are folded."""
    recipe = run.recipe
    select = SelectLayers(recipe.only, recipe.skip, recipe.quantize_ops, recipe.first, recipe.overrides)
    stored = recipe.bits is not None and not recipe.float
    blocks = _blocks(run)
    grid = ChooseGrid(
        recipe.bits or 8,
        recipe.per_channel,
        recipe.first,
        _containers(run),
        blocks.containers,
        recipe.rules.scale_axes,
        stored,
    )
    work, declined = _found(run, model, select, blocks)
    if _raise_opset(run, model, work, grid, blocks):
        work, declined = _found(run, model, select, blocks)
    foreseen = predicted(work.editor)
    if recipe.fold_bn and _fold(run, model, work):
        work, declined = _found(run, model, select, blocks)
    if recipe.on_integers and recipe.rules.plain and _plain(run, model, work):
        work, declined = _found(run, model, select, blocks)
    if recipe.equalize and (factors := _equalize(run, model, work)):
        work, declined = _found(run, model, select, blocks)
        foreseen |= {name: foreseen[name].times(some) for name, some in factors.items() if name in foreseen}
    work.predicted, work.is_real = foreseen, not run.calibration.synthetic
    work.statistics = _statistics(run, model, work) if run.observes else {}
    work.stored = _moments(run, model, work) if run.gathers else {}
    rounding = rounding_of(recipe, work.editor)
    work.synthetic = _synthetic_moments(run, model, work, rounding)
    work.share = SHARE if rounding.pictures else SHARE_OF_NOISE
    if missing := sum(tensor.observed.key not in work.statistics for tensor in work.tensors):
        run.notes.append(
            f"the statistics do not cover {missing} tensors that target {recipe.target} quantizes, so that the layers "
            f"around them may not run on integers; calibrate again with --target {recipe.target}"
        )
    follower = work.follower = _follower(run, model, work, rounding.pictures)
    for step in _steps(recipe, grid, rounding, bool(work.tensors)):
        work.plans = step.apply(work)
    if follower is not None:
        follower.close()
        if follower.failure is not None:
            run.notes.append(f"weights do not make up for the errors of layers before them: {follower.failure}")
    if blocks.block is not None and not any(plan.block for plan in work.plans):
        run.notes.append("no weight has a scale for each block (--block)")
    if uncovered := sum(plan.float_data == UNCOVERED for plan in work.plans):
        run.notes.append(
            f"{UNCOVERED} of {uncovered} layers, which stays float; calibrate again without --only and --skip"
        )
    return work, declined


def _steps(recipe: Recipe, grid: ChooseGrid, rounding: ChooseRounding, placed: bool) -> list[Pass]:
    """The deciding passes, in their order; ``placed``: some tensors are quantized where they are made."""
    dynamic = recipe.act_split == "dynamic"
    acts = recipe.act_bits if not recipe.float or recipe.act_ratio else None
    weights = recipe.bits is not None or recipe.float
    limits, rates = (recipe.multiples, recipe.max_expand), _rates(recipe)
    streams = PlanStreams(recipe.ratio, recipe.act_ratio, recipe.folds, recipe.split == "qa", *limits, rates)
    return [
        PlanActivations(acts, recipe.act_ratio, dynamic, recipe.act_unsigned, recipe.rules.unsigned, recipe.first),
        *([grid] if weights else []),
        *([streams] if weights else []),
        *([LimitCosts(recipe.ratio, rates)] if weights and recipe.spares else []),
        *([PlaceTensors(recipe.rules, recipe.act_bits)] if placed else []),
        ChooseActivationSteps(recipe.act_clip, recipe.rules.unsigned),
        *([rounding] if weights else []),
        PlanSplits(
            recipe.ratio,
            recipe.split_policy,
            weights,
            *limits,
            shared=recipe.target != "generic" or recipe.folds != "never",
            whole_blocks=recipe.rules.whole_blocks,
            objective=recipe.objective if recipe.plan == "joint" else None,
            allocation=recipe.allocation,
        ),
        *([ChooseSteps(recipe.clip, recipe.safe, recipe.split == "qa")] if weights else []),
    ]


def rounding_of(recipe: Recipe, editor: Editor) -> ChooseRounding:
    """How weights are rounded; those that stay float are not, and have the threshold of the nearest integers."""
    name = "nearest" if recipe.float else recipe.round
    return ChooseRounding(name, recipe.bias_correction, recipe.bits, takes_pictures(editor))


def _rates(recipe: Recipe) -> Rates:
    """What copies cost on the runtime that the recipe is for."""
    rules = recipe.rules
    integers = recipe.on_integers and rules.gathers_integers
    return Rates(1 if integers else 4, rules.gather_moves, rules.block, min(recipe.multiples, default=1))


def _containers(run: Run) -> frozenset[int]:
    """Bits of the integer types that weights may have."""
    rules = run.recipe.rules
    allowed = rules.containers & rules.integer_containers if run.recipe.act_bits is not None else rules.containers
    return allowed if run.narrow else frozenset({8})


def _blocks(run: Run) -> PlanBlocks:
    """Whose weights have a scale for each block."""
    recipe, rules = run.recipe, run.recipe.rules
    where, containers = f"target {recipe.target}", rules.block_containers
    if recipe.act_bits is not None and 8 in containers:
        where, containers = f"{where} with quantized activations", containers - {8}
    if recipe.container == "int8":
        where, containers = f"{where} with --container int8", containers & {8}
    narrow = run.narrow or recipe.container == "int8" or recipe.float
    block = recipe.block if narrow else None
    return PlanBlocks(block, recipe.bits or 8, recipe.first, containers, rules.whole_blocks, not recipe.float, where)


def _statistics(run: Run, model: Model, work: Work) -> calibrate.Seen:
    """What calibration sees of the data of the selected layers, or what a file of statistics says."""
    recipe, given = run.recipe, run.calibration
    if run.known.seen is None and given.stats is not None:
        run.known.seen = calibrate.load(given.stats, run.mark(Model.load(run.source)))
    if run.known.seen is None and model.opset() >= OPSET:
        layers = [plan.observed for plan in work.plans if plan.observed and not plan.declined]
        found = layers + [plan.observed for plan in work.tensors]
        tensors = [signed(tensor, work.predicted) for tensor in {tensor.key: tensor for tensor in found}.values()]
        assert isinstance(given.samples, Path)
        with run.timed("calibrate"):
            run.known.seen = calibrate.calibrate(
                model,
                tensors,
                given.samples,
                run.known.folder,
                recipe.calibration_samples,
                recipe.batch,
                recipe.calibration_stride,
                recipe.seed,
                run.timeout,
            )
    return run.known.seen or {}


def _moments(run: Run, model: Model, work: Work) -> dict[str, moments.Stored]:
    """Moments of the data of the selected layers."""
    recipe, samples = run.recipe, run.calibration.samples
    layers = [plan.contraction for plan in work.plans if plan.contraction and plan.observed and not plan.declined]
    if not isinstance(samples, Path) or not layers:
        return {}
    if run.known.moments is None:
        with run.timed("calibrate"):
            run.known.moments = moments.gather(
                model,
                layers,
                samples,
                run.known.folder,
                recipe.calibration_samples,
                recipe.batch,
                recipe.needs_moments,
                run.timeout,
            )
    return run.known.moments


def _synthetic_moments(run: Run, model: Model, work: Work, rounding: ChooseRounding) -> dict[str, moments.Stored]:
    """Those of the data of layers that are to be rounded by made-up samples; without them it is assumed."""
    recipe, known = run.recipe, run.known
    if recipe.bits is None or recipe.float:
        return {}
    asked = zip(work.plans, rounding.asked(work.plans), strict=True)
    found = [plan.contraction for plan, name in asked if name == "synthetic" and not plan.declined]
    wanted = {layer.key: layer for layer in found if layer is not None and layer.inputs <= moments.LARGEST}
    missing = [layer for key, layer in wanted.items() if key not in known.synthetic]
    if missing and known.unmade is None:
        try:
            with run.timed("calibrate"):
                known.synthetic |= _gathered(run, model, missing)
        except OcsError as error:
            known.unmade = str(error).replace(str(known.folder), "made-up samples")
    if missing and known.unmade is not None:
        run.notes.append(
            f"no samples could be made up to round weights by, so that they are rounded without: {known.unmade}"
        )
        return {}
    if wanted:
        run.notes.append(MADE_UP)
    return {key: known.synthetic[key] for key in wanted}


def _gathered(run: Run, model: Model, layers: Sequence[Contraction]) -> dict[str, moments.Stored]:
    """Convolutions see many positions of each sample; layers that see one take more samples, where these are small."""
    dense = [layer for layer in layers if layer.window is None]
    convolutions = [layer for layer in layers if layer.window is not None]
    samples = run.samples_made_up()
    made: dict[str, moments.Stored] = {}
    for some, limit in ((convolutions, COUNT), (dense, None)):
        folder = Path(tempfile.mkdtemp(dir=run.known.folder))
        made |= moments.gather(
            model, some, samples, folder, limit, run.recipe.batch, timeout=run.timeout, without=OTHERWISE
        )
    return made


def _follower(run: Run, model: Model, work: Work, pictures: bool) -> Propagation | None:
    """Where errors are followed through the layers: where some are rounded by samples.

    What errors do to made-up samples is what they do to real ones where these are ``pictures`` and no layer is grouped:
    the few weights of a depthwise kernel would make up for what only made-up samples meet.
    """
    recipe, active = run.recipe, [plan for plan in work.plans if not plan.declined]
    layers = {
        plan.layer.node.outputs[0].name: plan.contraction
        for plan in active
        if plan.contraction is not None and plan.contraction.inputs <= moments.LARGEST
    }
    real = bool(work.stored) and recipe.needs_moments
    alike = bool(work.synthetic) and pictures and all(plan.layer.groups == 1 for plan in active)
    if not recipe.error_propagation or not (real or alike) or len(layers) < 2 or is_noisy(model):
        return None
    samples, limit = run.calibration.samples, recipe.calibration_samples
    if not real:
        dense = sum(layer.window is None for layer in layers.values()) > len(layers) / 2
        samples, limit = run.samples_made_up(), None if dense else FOLLOWED
    assert isinstance(samples, Path)
    folder = Path(tempfile.mkdtemp(dir=run.folder))
    return Propagation(model, layers, samples, folder, limit, recipe.batch, run.timeout)


def _fold(run: Run, model: Model, work: Work) -> int:
    """Fold BatchNormalization nodes into the layers before them that are worked on; how many."""
    folded, kept = 0, frozenset(plan.layer.name for plan in work.plans if plan.declined)
    while here := FoldBatchNormalization(kept).apply(editor := Editor(model)):
        editor.commit()
        run.lost += editor.lost_inputs
        folded += here
    if folded:
        run.folded = folded
        run.notes.append(f"{folded} BatchNormalization {'node was' if folded == 1 else 'nodes were'} folded")
    return folded


def _plain(run: Run, model: Model, work: Work) -> int:
    """Write nodes in the form that the target knows, but for layers that are left as they are; how many."""
    kept = frozenset(plan.layer.name for plan in work.plans if plan.declined)
    changed = WritePlainly(run.recipe.rules.plain, kept).apply(editor := Editor(model))
    if changed:
        editor.commit()
        run.lost += editor.lost_inputs
        run.plain = changed
        run.notes.append(f"nodes that were written in the form that {run.recipe.target} computes: {changed}")
    return changed


def _equalize(run: Run, model: Model, work: Work) -> dict[str, NDArray[np.float64]]:
    """Even out the ranges of channels across the layers that are worked on."""
    factors = EqualizeLayers().apply(work.editor, [plan.layer for plan in work.plans if not plan.declined])
    if factors:
        work.editor.commit()
        run.equalized = True
    run.notes.append("the ranges of channels were evened out across layers" if factors else NOT_EVEN)
    return factors


def _found(run: Run, model: Model, select: SelectLayers, blocks: PlanBlocks) -> tuple[Work, list[Declined]]:
    found = find_layers(editor := Editor(model))
    layers = [item for item in found if isinstance(item, Layer)]
    observe = run.recipe.calibrates
    seen = run.observes or run.gathers
    work = Work(editor, [_plan(editor, layer, seen) for layer in layers])
    work.plans = select.apply(work)
    work.plans = blocks.apply(work)
    if observe and not run.recipe.float and run.recipe.bits is not None:
        work.plans = PlaceTensors(run.recipe.rules, run.recipe.act_bits).apply(work)
    return work, [item for item in found if isinstance(item, Declined)]


def _plan(editor: Editor, layer: Layer, seen: bool) -> LayerPlan:
    """A plan with nothing decided; ``seen``: samples will run."""
    if not is_visible(editor, layer):
        return LayerPlan(layer)
    return LayerPlan(layer, observed(editor, layer) if seen else None, contraction(layer))


def _raise_opset(run: Run, model: Model, work: Work, grid: ChooseGrid, blocks: PlanBlocks) -> bool:
    """Raise the opset as far as the layers need it and onnx's converter can; whether it was raised."""
    plans = [plan for plan in work.plans if not plan.declined and not plan.layer.weight.home.is_function]
    wanted = [blocks.wanted(plan) for plan in plans]
    now, least = model.opset(), OPSET if run.recipe.act_bits is not None else 0
    needed = {max(opset, least) for plan in wanted for opset in (grid.opsets(plan) if grid.stored else [0])}
    for target in sorted((opset for opset in needed if opset > now), reverse=True):
        try:
            raise_opset(model, target)
        except CannotRaise as reason:
            run.notes.append(f"the opset stays {now}, though {target} is wanted: onnx's converter fails ({reason})")
            continue
        run.notes.append(f"the opset was raised from {now} to {target}, which the quantized model needs")
        run.raised = True
        return True
    return False
