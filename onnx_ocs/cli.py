"""The command line: arguments to a recipe, results to stdout, errors to one line and an exit status."""

import argparse
import logging
import math
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from onnx_ocs import api, junit
from onnx_ocs._version import __version__
from onnx_ocs.errors import OcsError, RuntimeFailed, VerificationFailed
from onnx_ocs.numerics.clip import clip_names
from onnx_ocs.recipe import BITS, CHOICES, PRESETS, Recipe
from onnx_ocs.verify import TIMEOUT

DONE, FAILED, USAGE, UNUSABLE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is returned."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"check": (_check_parser, _check), "inspect": (_inspect_parser, _inspect)}
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


def _complain(error: object, status: int) -> int:
    print(f"onnx-ocs: {' '.join(str(error).split())}", file=sys.stderr)
    return status


# --- transform -------------------------------------------------------------------------------------------------------


def _transform_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onnx-ocs",
        usage="\n       ".join(
            f"onnx-ocs {form} [options]" for form in ("IN OUT", "check REF CANDIDATE", "inspect MODEL")
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
    parser.add_argument("--target", choices=CHOICES["target"], help="whose rules the Q/DQ nodes follow")
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
    parser.add_argument("--no-verify", action="store_true", help="write the result without running it")
    parser.add_argument(
        "--verify-timeout", type=_positive, metavar="S", default=TIMEOUT, help="seconds for verification"
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
        help=f"threshold of the weights: {', '.join(clip_names())} ({defaults.clip})".replace("%", "%%"),
    )
    grain = parser.add_mutually_exclusive_group()
    grain.add_argument(
        "--per-channel", action="store_true", dest="per_channel", help="a scale per output channel (default)"
    )
    grain.add_argument("--per-tensor", action="store_false", dest="per_channel", help="a scale per weight")
    parser.add_argument("--split", choices=CHOICES["split"], help=f"how a channel is split ({defaults.split})")
    parser.add_argument(
        "--split-policy", choices=CHOICES["split_policy"], help=f"repeated splits ({defaults.split_policy})"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default=None, help="paper: as Zhao et al. ran it")
    parser.add_argument("--only", action="append", metavar="REGEX", help="only the nodes of these names; repeatable")
    parser.add_argument("--skip", action="append", metavar="REGEX", help="not the nodes of these names; repeatable")
    parser.add_argument("--quantize-ops", type=_words, metavar="OP,...", help="only these operators (Conv,Gemm,...)")
    parser.add_argument(
        "--first",
        choices=CHOICES["first"],
        help=f"layers that read a graph input of 4 channels or fewer ({defaults.first})",
    )


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
    inputs = given.pop("inputs", None)
    _keep_apart(
        parser, {"IN": source, "OUT": target, "--inputs": inputs, "--recipe": given["recipe"]}, {"--report": report}
    )
    recipe = _resolve(given, parser)
    with _progress(quiet) as progress:
        result = api.quantize(
            source, target, recipe=recipe, inputs=inputs, report=report, timeout=timeout, progress=progress
        )
    if not quiet:
        _print_result(source, target, result.report, verbose)
    return DONE


def _resolve(given: dict[str, Any], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The recipe of the options that were given; options that make none are wrong usage."""
    try:
        return api.resolve(given, given.pop("preset"), given.pop("recipe", None)).plain()
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


def _print_result(source: Path, target: Path, report: dict[str, Any], verbose: bool) -> None:
    console = _console()
    if verbose:
        console.print(_layer_table(report["layers"]))
    table = Table(show_header=False, box=None, pad_edge=False)
    for status in ("split", "quantized", "declined"):
        rows = [row for row in report["layers"] if row["status"] == status]
        if rows:
            table.add_row(f"layers {status}", _reasons(rows))
    size, overhead = report["size"], report["overhead"]
    table.add_row(
        "size", f"{_bytes(size['before'])} -> {_bytes(size['after'])} ({size['after'] / max(1, size['before']):.1%})"
    )
    if overhead["weights"] > 1:
        table.add_row("overhead", f"weights x{overhead['weights']:.3f}, channels x{overhead['activations']:.3f}")
    for name, value in _verified(report["verification"]):
        table.add_row(name, value)
    for note in report["notes"]:
        table.add_row("note", note)
    table.add_row("written", str(target))
    console.print(table)


def _reasons(rows: list[dict[str, Any]]) -> str:
    """How many, and for which reasons."""
    counts = Counter(row["reason"] for row in rows if row["reason"])
    why = "; ".join(f"{reason} ({count})" if len(rows) > 1 else reason for reason, count in counts.most_common())
    return f"{len(rows)}" + (f": {why}" if why else "")


def _verified(verification: dict[str, Any] | None) -> list[tuple[str, str]]:
    if verification is None:
        return [("verified", "no")]
    kind = f"on {verification['samples']} {'generated' if verification['generated'] else 'given'} samples"
    rows = []
    if "split" in verification:
        error = verification["split"]["max_rel_error"]
        rows.append(("split model", f"equal to the source within {error or 0:.1e} of each output's peak, {kind}"))
    if "quantized" in verification:
        found = verification["quantized"]
        parts = [f"{found[name]:{form}} {unit}" for name, form, unit in _FIGURES if found.get(name) is not None]
        rows.append(("quantized model", f"{', '.join(parts)}, {kind}"))
        if "accuracy" in found:
            before, after, samples = (found["accuracy"][name] for name in ("reference", "candidate", "samples"))
            figures = f"{before:.2%} before, {after:.2%} after, on {samples} labels"
            rows.append(("top-1 accuracy", figures))
    return rows


_FIGURES = (("sqnr_db", ".1f", "dB SQNR"), ("top1_agreement", ".2%", "top-1 agreement"), ("kl_divergence", ".2g", "KL"))


def _layer_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "op", "status", "channels", "bits", "SQNR dB", "reason"):
        table.add_column(name, justify="right" if name in ("channels", "bits", "SQNR dB") else "left", overflow="fold")
    for row in rows:
        channels = "" if row["channels"] is None else f"{row['channels']}+{row['extra']}"
        sqnr = "" if row.get("sqnr_db") is None else f"{row['sqnr_db']:.1f}"
        table.add_row(
            row["name"], row["op"], row["status"], channels, str(row.get("bits") or ""), sqnr, row["reason"] or ""
        )
    return table


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=160)


def _bytes(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


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
        api.write_json(options.json, {**data, "deterministic": outcome.deterministic, "outputs": outcome.outputs})
    if options.junit:
        junit.write(options.junit, str(options.candidate), outcome)
    if not options.quiet:
        _print_check(outcome)
    if not outcome.passed:
        return _complain(f"{options.candidate}: {outcome.reason}", FAILED)
    return DONE


def _print_check(outcome: api.CheckOutcome) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("output", "max error", "of peak", "SQNR dB", "top-1 agreement", "KL"):
        table.add_column(name, justify="left" if name == "output" else "right", overflow="fold")
    forms = (
        ("max_abs_error", ".3g"),
        ("max_rel_error", ".2e"),
        ("sqnr_db", ".1f"),
        ("top1_agreement", ".2%"),
        ("kl_divergence", ".2g"),
    )
    for output in outcome.outputs:
        table.add_row(output["output"], *(format(output[n], f) if output[n] is not None else "" for n, f in forms))
    console = _console()
    if outcome.outputs:
        console.print(table)
    kind = "generated" if outcome.generated else "given"
    console.print(f"{'passed' if outcome.passed else 'failed'} on {outcome.samples} {kind} samples")
    if not outcome.deterministic:
        console.print("the outputs of the reference differ from run to run")


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
        _print_survey(rows)
    return DONE


def _print_survey(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "op", "channels", "outlier", "range after", "would be", "reason"):
        table.add_column(
            name, justify="right" if name in ("channels", "outlier", "range after") else "left", overflow="fold"
        )
    for row in rows:
        known = row["status"] != "declined"
        table.add_row(
            row["name"],
            row["op"],
            f"{row['channels']}+{row['extra']}" if known else "",
            f"{row['outlier']:.1f} sd" if known else "",
            f"{row['range']:.0%}" if known else "",
            row["status"],
            row["reason"] or "",
        )
    console = _console()
    console.print(table if rows else "no layers with weights")
