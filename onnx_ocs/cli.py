"""The command line: arguments to a recipe, results to stdout, errors to one line and an exit status."""

import argparse
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from onnx_ocs import api, junit, search, tables
from onnx_ocs._version import __version__
from onnx_ocs.child import TIMEOUT
from onnx_ocs.errors import OcsError, RuntimeFailed, VerificationFailed
from onnx_ocs.numerics.clip import clip_names
from onnx_ocs.recipe import BITS, CHOICES, OVERRIDES, PRESETS, Recipe
from onnx_ocs.search import Goal
from onnx_ocs.targets import TARGETS

DONE, FAILED, USAGE, UNUSABLE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is returned."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "check": (_check_parser, _check),
        "inspect": (_inspect_parser, _inspect),
        "lint": (_lint_parser, _lint),
    }
    make, act = commands.get(arguments[0] if arguments else "", (_transform_parser, _transform))
    parser = make()
    options = parser.parse_args(arguments[1:] if make is not _transform_parser else arguments)
    logging.basicConfig(format="%(message)s", level=logging.DEBUG if options.verbose else logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return act(options, parser)
    except (VerificationFailed, RuntimeFailed) as error:
        return _complain(error, FAILED)
    except OcsError as error:
        return _complain(error, UNUSABLE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except MemoryError:
        return _complain("there is not enough memory for this model; close other programs", UNUSABLE)
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        return _complain(f"internal error ({type(error).__name__}: {error}); please report it with -v", UNUSABLE)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(TERMINATED)


def _show(*items: Table | str) -> None:
    """Print to stdout: as wide as the terminal, or wide enough for a table where there is none."""
    console = Console(highlight=False, markup=False)
    for item in items:
        (console if console.is_terminal else Console(highlight=False, markup=False, width=160)).print(item)


def _complain(error: object, status: int) -> int:
    print(f"onnx-ocs: {' '.join(str(error).split())}", file=sys.stderr)
    return status


# --- transform -------------------------------------------------------------------------------------------------------


def _transform_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onnx-ocs",
        usage="\n       ".join(
            f"onnx-ocs {form} [options]"
            for form in ("IN OUT", "check REF CANDIDATE", "inspect MODEL", "lint --target T MODEL")
        ),
        description="Split the outlier channels of a trained ONNX model and quantize its weights, without retraining.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("source", metavar="IN", type=Path, help="the trained float model")
    parser.add_argument("destination", metavar="OUT", type=Path, help="where the new model goes; may be IN")
    _add_recipe(parser)
    parser.add_argument("--float", action="store_true", help="split only; no quantization nodes")
    parser.add_argument(
        "--container", choices=CHOICES["container"], help="integer types: the smallest that fits, or int8"
    )
    parser.add_argument(
        "--external-data", action="store_true", help="weights into a file beside OUT (always from 2 GB on)"
    )
    parser.add_argument(
        "--inputs", type=Path, metavar="PATH", help="samples to verify on (.npz, .npy, a folder, ONNX test data)"
    )
    parser.add_argument(
        "--tolerance", type=_finite, metavar="X", help="of the split model, relative to each output's peak"
    )
    parser.add_argument("--min-sqnr", type=_finite, metavar="DB", help="what the quantized outputs must exceed")
    parser.add_argument(
        "--equalize",
        action=argparse.BooleanOptionalAction,
        help="even out the ranges of channels across layers before all else (off)",
    )
    parser.add_argument("--no-fold-bn", action="store_true", help="leave BatchNormalization nodes as they are")
    _add_target(parser)
    _add_activations(parser)
    _add_goal(parser)
    parser.add_argument("--no-verify", action="store_true", help="write the result without running it")
    parser.add_argument(
        "--verify-timeout",
        type=_positive,
        metavar="S",
        default=TIMEOUT,
        help="for calibration and for verification each",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the generated samples")
    parser.add_argument("--report", type=Path, metavar="FILE.json", default=None, help="write what was done")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE.json", default=None, help="run the recipe of a report again"
    )
    _add_common(parser)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Options that decide what is done with each layer; absent unless given, so that a preset or recipe can hold."""
    defaults = Recipe()
    parser.add_argument(
        "--bits", type=_bits, metavar="B", help=f"weight bits, {BITS[0]} to {BITS[-1]}, or none ({defaults.bits})"
    )
    parser.add_argument(
        "--ratio", type=float, metavar="R", help=f"extra channels, as a share, 0 to 1 ({defaults.ratio})"
    )
    parser.add_argument(
        "--clip",
        metavar="M",
        help=(
            f"threshold of the weights: {', '.join(clip_names())}, or auto: with --round hessian the least error of "
            f"the output, else none ({defaults.clip})"
        ).replace("%", "%%"),
    )
    parser.add_argument(
        "--round",
        choices=CHOICES["round"],
        help="nearest; compensated: error sums of kernels and outputs vanish; hessian: the least error of the output "
        "on the samples (hessian with --calibrate, else compensated)",
    )
    parser.add_argument(
        "--bias-correction",
        action=argparse.BooleanOptionalAction,
        help="biases make up for the mean error of the outputs, where samples tell it (on)",
    )
    grain = parser.add_mutually_exclusive_group()
    grain.add_argument(
        "--per-channel", action="store_true", dest="per_channel", help="a scale per output channel (default)"
    )
    grain.add_argument("--per-tensor", action="store_false", dest="per_channel", help="a scale per weight")
    parser.add_argument(
        "--block",
        type=_block,
        metavar="N",
        help="weights of MatMul and Gemm: a scale for each N input channels and each output channel, or none (none)",
    )
    _add_splitting(parser)
    parser.add_argument("--preset", choices=tuple(PRESETS), default=None, help="paper: as Zhao et al. ran it")
    parser.add_argument("--only", action="append", metavar="REGEX", help="only the nodes of these names; repeatable")
    parser.add_argument("--skip", action="append", metavar="REGEX", help="not the nodes of these names; repeatable")
    parser.add_argument("--quantize-ops", type=_words, metavar="OP,...", help="only these operators (Conv,Gemm,...)")
    parser.add_argument(
        "--first",
        choices=CHOICES["first"],
        help=f"layers that read a graph input of 4 channels or fewer ({defaults.first})",
    )


def _add_splitting(parser: argparse.ArgumentParser) -> None:
    """Options of where copies go, and of single layers."""
    defaults = Recipe()
    parser.add_argument("--split", choices=CHOICES["split"], help=f"how a channel is split ({defaults.split})")
    parser.add_argument(
        "--split-policy", choices=CHOICES["split_policy"], help=f"repeated splits ({defaults.split_policy})"
    )
    parser.add_argument(
        "--plan",
        choices=CHOICES["plan"],
        help="magnitude: the channels with the largest weights are split, and thresholds follow; joint: copies and "
        f"thresholds together, by what each saves of the objective ({defaults.plan})",
    )
    parser.add_argument(
        "--objective",
        choices=CHOICES["objective"],
        help=f"of --plan joint: the squared error of the outputs, or of the weights ({defaults.objective})",
    )
    parser.add_argument(
        "--allocate",
        choices=CHOICES["allocate"],
        help="uniform: the same ratio for each layer; knapsack, sensitivity: as many bytes where they lower the range, "
        f"or the error of the outputs, most ({defaults.allocate})",
    )
    parser.add_argument(
        "--layer",
        action="append",
        metavar="REGEX:NAME=VALUE,...",
        help=f"options of the nodes of these names: {', '.join(OVERRIDES)}; repeatable, later ones hold",
    )


def _add_target(parser: argparse.ArgumentParser) -> None:
    """Options of the runtime that the model is for."""
    defaults = Recipe()
    group = parser.add_argument_group("the runtime")
    group.add_argument("--target", choices=CHOICES["target"], help="whose rules the Q/DQ nodes follow")
    group.add_argument(
        "--fold",
        nargs="?",
        choices=CHOICES["fold"],
        const="always",
        help="let the layers in front make the copies of channels (auto: where it pays on the target)",
    )
    group.add_argument(
        "--align",
        type=_multiple,
        metavar="N",
        help="channels after splitting are a multiple of N; auto: of what the target's integer kernels want (auto)",
    )
    group.add_argument(
        "--max-expand",
        type=_magnitude,
        metavar="X",
        help=f"share of its channels that alignment may add to a layer ({defaults.max_expand})",
    )
    group.add_argument(
        "--saturation-safe",
        action=argparse.BooleanOptionalAction,
        help="no sum of two products leaves 16 bits, in which x86 without VNNI adds them (on for ort and openvino)",
    )


def _add_activations(parser: argparse.ArgumentParser) -> None:
    """Options of the data of layers; absent unless given, as those of the weights."""
    defaults = Recipe()
    group = parser.add_argument_group("activations (float without --calibrate, --stats or --act-bits)")
    group.add_argument(
        "--calibrate", type=Path, metavar="PATH", help="samples to choose their scales by (as for --inputs)"
    )
    group.add_argument(
        "--synthetic",
        type=int,
        metavar="N",
        help="for want of samples, choose them by N made-up ones: pictures with the statistics of natural images where "
        "an input looks like one",
    )
    group.add_argument("--calibration-samples", type=int, metavar="N", help="how many of them (all)")
    group.add_argument("--batch", type=int, metavar="N", help=f"samples that run at a time ({defaults.batch})")
    group.add_argument(
        "--calibration-stride",
        type=int,
        metavar="N",
        help=f"positions from one counted value to the next; 1 counts all ({defaults.calibration_stride})",
    )
    group.add_argument("--save-stats", type=Path, metavar="FILE.npz", default=None, help="keep what calibration saw")
    group.add_argument("--stats", type=Path, metavar="FILE.npz", default=None, help="use that in place of samples")
    group.add_argument(
        "--act-bits", type=_bits, metavar="B", help=f"{BITS[0]} to {BITS[-1]}, or none (8 with samples, else none)"
    )
    group.add_argument("--act-clip", metavar="M", help=f"threshold of activations, as --clip ({defaults.act_clip})")
    group.add_argument(
        "--act-ratio",
        type=float,
        metavar="R",
        help=f"share of channels to split, 0 to 1 ({defaults.act_ratio:g})",
    )
    group.add_argument(
        "--act-split",
        choices=CHOICES["act_split"],
        help="static: by calibration; dynamic: scales and splits of each batch, found by the graph (static)",
    )
    group.add_argument(
        "--act-unsigned",
        action="store_true",
        help="a grid from 0 on (UINT8) where calibration saw no negative value; TensorRT refuses it",
    )


def _add_goal(parser: argparse.ArgumentParser) -> None:
    """A goal, and what bounds the search for it."""
    group = parser.add_argument_group(
        "a goal in place of settings (bits, ratio, clip and plan are searched for where they are not given)"
    )
    group.add_argument(
        "--target-agreement", type=float, metavar="F", default=None, help="share of equal top-1 classes, 0 to 1"
    )
    group.add_argument("--target-sqnr", type=_finite, metavar="DB", default=None, help="of the worst output")
    group.add_argument(
        "--max-size-ratio",
        type=_positive,
        metavar="X",
        default=None,
        help="of the bytes of the model; alone: the best model within them, else the smallest that reaches the goal",
    )
    group.add_argument(
        "--search-bits",
        type=_words,
        metavar="B,...",
        default=None,
        help=f"widths to choose from ({','.join(map(str, search.BITS))}: the widest of each integer type)",
    )
    group.add_argument(
        "--budget", type=int, metavar="N", default=None, help=f"trials at most, each a whole run ({search.BUDGET})"
    )
    group.add_argument(
        "--search-state",
        type=Path,
        metavar="FILE.json",
        default=None,
        help="keeps the trials, to go on from",
    )
    group.add_argument(
        "--front", type=Path, metavar="FILE", default=None, help="write the Pareto front of the trials (.csv, or JSON)"
    )


def _goal(given: dict[str, Any], parser: argparse.ArgumentParser) -> Goal | None:
    """What the options of a goal say; they are taken out."""
    names = {"target_agreement": "agreement", "target_sqnr": "sqnr", "max_size_ratio": "size_ratio"}
    asked = {field: given.pop(name) for name, field in names.items()}
    bits, budget = given.pop("search_bits"), given.pop("budget")
    bounds: dict[str, Any] = {} if budget is None else {"budget": budget}
    try:
        bounds |= {} if bits is None else {"bits": tuple(int(width) for width in bits)}
        if any(value is not None for value in asked.values()):
            return Goal(**asked, **bounds)
    except ValueError as error:
        parser.error(str(error))
    if bounds:
        parser.error("--budget and --search-bits bound the search for a goal; give one (--target-agreement, ...)")
    return None


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", default=False, help="no table, no progress")
    parser.add_argument("-v", "--verbose", action="store_true", default=False, help="a row for each layer")
    parser.add_argument("--version", action="version", version=f"onnx-ocs {__version__}")


def _bits(text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bits") from None


def _block(text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of input channels") from None


def _multiple(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number") from None


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, not {text}")
    return value


def _magnitude(text: str) -> float:
    if (value := _finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def _positive(text: str) -> float:
    if (value := _finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _keep_apart(parser: argparse.ArgumentParser, read: dict[str, Path | None], written: dict[str, Path | None]) -> None:
    """No file that is written beside the result may take the place of another one."""
    seen = {path.resolve(): name for name, path in read.items() if path is not None}
    for name, path in written.items():
        if path is not None and (other := seen.setdefault(path.resolve(), name)) != name:
            parser.error(f"{name} and {other} are the same file, {path}; give {name} a name of its own")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _transform(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    given = dict(vars(options))
    source, target = given.pop("source"), given.pop("destination")
    quiet, verbose = given.pop("quiet"), given.pop("verbose")
    report, timeout = given.pop("report"), given.pop("verify_timeout")
    samples = {name: given.pop(name, None) for name in ("inputs", "calibrate", "stats", "save_stats")}
    goal, kept = _goal(given, parser), {name: given.pop(name) for name in ("search_state", "front")}
    read = {f"--{name}": samples[name] for name in ("inputs", "calibrate", "stats")}
    _keep_apart(
        parser,
        {"IN": source, "OUT": target, "--recipe": given["recipe"], **read},
        {
            "--report": report,
            "--save-stats": samples["save_stats"],
            "--search-state": kept["search_state"],
            "--front": kept["front"],
        },
    )
    if samples["calibrate"] is not None and samples["stats"] is not None:
        parser.error("--stats takes the place of --calibrate; give one of them")
    if samples["save_stats"] is not None and samples["calibrate"] is None:
        parser.error("--save-stats keeps what --calibrate sees; give samples")
    calibrated = samples["calibrate"] is not None or samples["stats"] is not None
    if goal is not None and "bits" in given:
        parser.error("a goal chooses the bits; give --search-bits in place of --bits")
    if goal is None and any(kept.values()):
        parser.error("--search-state and --front are of the search for a goal; give one (--target-agreement, ...)")
    recipe = _resolve(dict(given), parser, calibrated, samples["calibrate"] is not None)
    if goal is not None:
        try:
            api.check_searched(Recipe.of(recipe))
        except ValueError as error:
            parser.error(str(error))
    if samples["save_stats"] is not None and not Recipe.of(recipe).calibrates:
        parser.error("--save-stats keeps what calibration sees, and with these options there is none")
    with _progress(quiet) as progress:
        files = {**samples, **kept, "report": report}
        result = api.quantize(source, target, **files, goal=goal, timeout=timeout, progress=progress, **given)
    if not quiet:
        if goal is not None:
            _show(tables.front(result.report["search"]), "")
        _show(*([tables.layers(result.report["layers"])] if verbose else []), tables.result(result.report, target))
    return DONE


def _resolve(
    given: dict[str, Any], parser: argparse.ArgumentParser, calibrated: bool = False, sampled: bool = False
) -> dict[str, Any]:
    """The recipe of the options that were given; options that make none are wrong usage."""
    try:
        return api.resolve(given, given.pop("preset"), given.pop("recipe", None), calibrated, sampled).plain()
    except ValueError as error:
        parser.error(str(error))


class _progress:
    """A line on stderr that says what is going on, if someone is there to read it."""

    def __init__(self, quiet: bool) -> None:
        console = Console(stderr=True)
        shown = console.is_terminal and not quiet
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not shown)

    def __enter__(self) -> Callable[[str], None]:
        self._progress.start()
        task = self._progress.add_task("start", total=None)
        return lambda stage: self._progress.update(task, description=stage)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


# --- check -----------------------------------------------------------------------------------------------------------


def _check_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onnx-ocs check", description="Compare the outputs of two models; exit status 0 if they pass, 1 if not."
    )
    parser.add_argument("reference", metavar="REF", type=Path)
    parser.add_argument("candidate", metavar="CANDIDATE", type=Path)
    parser.add_argument(
        "--inputs", type=Path, metavar="PATH", help="samples (.npz, .npy, a folder, ONNX test data); else random"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="how many (all given ones, or 8 random ones)")
    parser.add_argument(
        "--atol", type=_magnitude, help="largest absolute error; with --rtol: atol + rtol * |reference|"
    )
    parser.add_argument("--rtol", type=_magnitude, help="largest error relative to each value")
    parser.add_argument("--min-sqnr", type=_finite, metavar="DB", help="of each output (0 if nothing else is asked)")
    parser.add_argument("--min-agreement", type=float, metavar="F", help="share of equal top-1 classes, 0 to 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write a test report for CI")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random samples")
    parser.add_argument("--timeout", type=_positive, default=TIMEOUT, metavar="S")
    _add_common(parser)
    return parser


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    read = {"REF": options.reference, "CANDIDATE": options.candidate, "--inputs": options.inputs}
    _keep_apart(parser, read, {"--json": options.json, "--junit": options.junit})
    if options.seed < 0:
        parser.error(f"seed must be a whole number of at least 0, not {options.seed}")
    if options.samples is not None and options.samples < 1:
        parser.error(f"samples must be at least 1, not {options.samples}")
    if options.min_agreement is not None and not 0 <= options.min_agreement <= 1:
        parser.error(f"min-agreement must be from 0 to 1, not {options.min_agreement}")
    criteria = {name: getattr(options, name) for name in ("atol", "rtol", "min_sqnr", "min_agreement")}
    with _progress(options.quiet) as progress:
        progress("compare")
        outcome = api.check(
            options.reference,
            options.candidate,
            inputs=options.inputs,
            samples=options.samples,
            seed=options.seed,
            timeout=options.timeout,
            **criteria,
        )
    if options.json:
        data = {"passed": outcome.passed, "reason": outcome.reason, "criteria": criteria, "samples": outcome.samples}
        known = {name: getattr(outcome, name) for name in ("deterministic", "saturated_db", "outputs")}
        api.write_json(options.json, {**data, **known})
    if options.junit:
        junit.write(options.junit, str(options.candidate), outcome)
    if not options.quiet:
        _show(*([tables.check(outcome)] if outcome.outputs else []), *tables.verdict(outcome))
    if not outcome.passed:
        return _complain(f"{options.candidate}: {outcome.reason}", FAILED)
    return DONE


# --- inspect ---------------------------------------------------------------------------------------------------------


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onnx-ocs inspect",
        description="What would be done with each layer under the given options, and why not more.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("source", metavar="MODEL", type=Path)
    _add_recipe(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", default=None, help="write the rows")
    _add_common(parser)
    return parser


def _inspect(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    given = dict(vars(options))
    source, file, quiet = given.pop("source"), given.pop("json"), given.pop("quiet")
    _keep_apart(parser, {"MODEL": source, "--recipe": given.get("recipe")}, {"--json": file})
    given.pop("verbose")
    rows = api.inspect(source, recipe=_resolve(given, parser))
    if file is not None:
        api.write_json(file, rows)
    if not quiet:
        _show(tables.survey(rows) if rows else "no layers with weights")
    return DONE


# --- lint ------------------------------------------------------------------------------------------------------------


def _lint_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onnx-ocs lint",
        description="Where a quantized model (QDQ format, of any tool) breaks the rules of a runtime; exit status 0 if "
        "there is nothing worse than a note, 1 if there is.",
    )
    parser.add_argument("source", metavar="MODEL", type=Path)
    parser.add_argument("--target", required=True, choices=tuple(TARGETS), help="the runtime")
    parser.add_argument(
        "--ignore", type=_words, action="extend", default=[], metavar="RULE,...", help="leave rules out; repeatable"
    )
    parser.add_argument("--errors-only", action="store_true", help="no warnings and notes, only errors")
    parser.add_argument(
        "--no-run", action="store_false", dest="run", help="do not ask onnxruntime which kernels it chooses (ort)"
    )
    parser.add_argument("--timeout", type=_positive, default=TIMEOUT, metavar="S", help="that onnxruntime may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write a test report for CI, one case for each rule")
    _add_common(parser)
    return parser


def _lint(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _keep_apart(parser, {"MODEL": options.source}, {"--json": options.json, "--junit": options.junit})
    chosen = {name: getattr(options, name) for name in ("target", "ignore", "errors_only", "run", "timeout")}
    with _progress(options.quiet) as progress:
        progress("lint")
        try:
            outcome = api.lint(options.source, **chosen)
        except ValueError as error:
            parser.error(str(error))
    judgement = tables.judgement(outcome, options.target)
    if options.json:
        api.write_json(options.json, {"model": str(options.source), "target": options.target, **asdict(outcome)})
    if options.junit:
        rules = [name for name in TARGETS[options.target].rules if name not in options.ignore]
        junit.write_lint(options.junit, str(options.source), outcome, rules)
    if not options.quiet:
        if options.verbose and outcome.kernels:
            _show(tables.kernels(outcome), "")
        if outcome.findings:
            _show(tables.findings(outcome), "", tables.remedies(outcome), "")
        _show(judgement)
    return DONE if outcome.passed else _complain(f"{options.source}: {judgement}", FAILED)
