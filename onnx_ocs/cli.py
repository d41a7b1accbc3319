"""The command line: arguments to a recipe, results to stdout, errors to one line and an exit status.

The options are those of :mod:`onnx_ocs.parsers`.
"""

import argparse
import logging
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

from onnx_ocs import api, junit, tables
from onnx_ocs.errors import OcsError, RuntimeFailed, VerificationFailed
from onnx_ocs.graph import files
from onnx_ocs.parsers import check_parser, inspect_parser, lint_parser, transform_parser
from onnx_ocs.recipe import Recipe
from onnx_ocs.search import Goal
from onnx_ocs.targets import TARGETS

DONE, FAILED, USAGE, UNUSABLE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is returned."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "check": (check_parser, _check),
        "inspect": (inspect_parser, _inspect),
        "lint": (lint_parser, _lint),
    }
    make, act = commands.get(arguments[0] if arguments else "", (transform_parser, _transform))
    parser = make()
    options = parser.parse_args(arguments[1:] if make is not transform_parser else arguments)
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


def _keep_apart(parser: argparse.ArgumentParser, read: dict[str, Path | None], written: dict[str, Path | None]) -> None:
    try:
        files.keep_apart(read, written)
    except ValueError as error:
        parser.error(str(error))


def _transform(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    given = dict(vars(options))
    source, target = given.pop("source"), given.pop("destination")
    quiet, verbose = given.pop("quiet"), given.pop("verbose")
    report, timeout = given.pop("report"), given.pop("verify_timeout")
    samples = {name: given.pop(name, None) for name in ("inputs", "calibrate", "stats", "save_stats")}
    goal, kept = _goal(given, parser), {name: given.pop(name) for name in ("search_state", "front")}
    read = {"--recipe": given["recipe"]} | {f"--{name}": samples[name] for name in ("inputs", "calibrate", "stats")}
    _keep_apart(parser, read, {"OUT": target})
    _keep_apart(
        parser,
        {"IN": source, "OUT": target, **read},
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
        paths = {**samples, **kept, "report": report}
        result = api.quantize(source, target, **paths, goal=goal, timeout=timeout, progress=progress, **given)
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
