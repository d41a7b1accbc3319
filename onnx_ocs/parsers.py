"""The options of each command, and what their values may be."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from onnx_ocs import search
from onnx_ocs._version import __version__
from onnx_ocs.child import TIMEOUT
from onnx_ocs.numerics.clip import clip_names
from onnx_ocs.recipe import BITS, CHOICES, DEFAULTS, OVERRIDES, PRESETS
from onnx_ocs.targets import TARGETS


def transform_parser() -> argparse.ArgumentParser:
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


def check_parser() -> argparse.ArgumentParser:
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


def inspect_parser() -> argparse.ArgumentParser:
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


def lint_parser() -> argparse.ArgumentParser:
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


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Options that decide what is done with each layer; absent unless given, so that a preset or recipe can hold."""
    parser.add_argument(
        "--bits",
        type=_number_or_none("bits"),
        metavar="B",
        help=f"weight bits, {BITS[0]} to {BITS[-1]}, or none ({DEFAULTS.bits})",
    )
    parser.add_argument(
        "--ratio", type=float, metavar="R", help=f"extra channels, as a share, 0 to 1 ({DEFAULTS.ratio})"
    )
    parser.add_argument(
        "--clip",
        metavar="M",
        help=(
            f"threshold of the weights: {', '.join(clip_names())}, or auto: with --round hessian, synthetic or assumed "
            f"the least error of the output, else none, or the grid that weights lie on ({DEFAULTS.clip})"
        ).replace("%", "%%"),
    )
    parser.add_argument(
        "--round",
        choices=CHOICES["round"],
        help="nearest; compensated: error sums of kernels and outputs vanish; hessian: the least error of the output "
        "on the samples; synthetic: on made-up ones; assumed: on data as it mostly is; auto: hessian with --calibrate, "
        "else one of the two before for few bits or a small model, and compensated, which is fastest, for others "
        f"({DEFAULTS.round})",
    )
    parser.add_argument(
        "--bias-correction",
        action=argparse.BooleanOptionalAction,
        help="biases make up for the mean error of the outputs, where samples tell it (on)",
    )
    parser.add_argument(
        "--error-propagation",
        action=argparse.BooleanOptionalAction,
        help="weights that are rounded by samples make up for the errors of the layers before theirs (on)",
    )
    grain = parser.add_mutually_exclusive_group()
    grain.add_argument(
        "--per-channel", action="store_true", dest="per_channel", help="a scale per output channel (default)"
    )
    grain.add_argument("--per-tensor", action="store_false", dest="per_channel", help="a scale per weight")
    parser.add_argument(
        "--block",
        type=_number_or_none("input channels"),
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
        help=f"layers that read a graph input of 4 channels or fewer ({DEFAULTS.first})",
    )


def _add_splitting(parser: argparse.ArgumentParser) -> None:
    """Options of where copies go, and of single layers."""
    parser.add_argument("--split", choices=CHOICES["split"], help=f"how a channel is split ({DEFAULTS.split})")
    parser.add_argument(
        "--split-policy", choices=CHOICES["split_policy"], help=f"repeated splits ({DEFAULTS.split_policy})"
    )
    parser.add_argument(
        "--plan",
        choices=CHOICES["plan"],
        help="magnitude: the channels with the largest weights are split, and thresholds follow; joint: copies and "
        f"thresholds together, by what each saves of the objective ({DEFAULTS.plan})",
    )
    parser.add_argument(
        "--objective",
        choices=CHOICES["objective"],
        help=f"of --plan joint: the squared error of the outputs, or of the weights ({DEFAULTS.objective})",
    )
    parser.add_argument(
        "--allocate",
        choices=CHOICES["allocate"],
        help="uniform: the same ratio for each layer; knapsack, sensitivity: as many bytes where they lower the range, "
        "or the error of the outputs, most; auto: uniform, but half of the copies of convolutions of 5 bits or fewer "
        f"by sensitivity ({DEFAULTS.allocate})",
    )
    parser.add_argument(
        "--layer",
        action="append",
        metavar="REGEX:NAME=VALUE,...",
        help=f"options of the nodes of these names: {', '.join(OVERRIDES)}; repeatable, later ones hold",
    )


def _add_target(parser: argparse.ArgumentParser) -> None:
    """Options of the runtime that the model is for."""
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
        help="channels after splitting are a multiple of N; auto: of what the target's kernels want (auto where the "
        "data is quantized, else 1)",
    )
    group.add_argument(
        "--max-expand",
        type=_magnitude,
        metavar="X",
        help=f"share of its channels that alignment may add to a layer ({DEFAULTS.max_expand})",
    )
    group.add_argument(
        "--saturation-safe",
        action=argparse.BooleanOptionalAction,
        help="no sum of two products leaves 16 bits, in which x86 without VNNI adds them (on for ort and openvino)",
    )


def _add_activations(parser: argparse.ArgumentParser) -> None:
    """Options of the data of layers; absent unless given, as those of the weights."""
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
    group.add_argument("--batch", type=int, metavar="N", help=f"samples that run at a time ({DEFAULTS.batch})")
    group.add_argument(
        "--calibration-stride",
        type=int,
        metavar="N",
        help=f"positions from one counted value to the next; 1 counts all ({DEFAULTS.calibration_stride})",
    )
    group.add_argument("--save-stats", type=Path, metavar="FILE.npz", default=None, help="keep what calibration saw")
    group.add_argument("--stats", type=Path, metavar="FILE.npz", default=None, help="use that in place of samples")
    group.add_argument(
        "--act-bits",
        type=_number_or_none("bits"),
        metavar="B",
        help=f"{BITS[0]} to {BITS[-1]}, or none (8 with samples, else none)",
    )
    group.add_argument("--act-clip", metavar="M", help=f"threshold of activations, as --clip ({DEFAULTS.act_clip})")
    group.add_argument(
        "--act-ratio",
        type=float,
        metavar="R",
        help=f"share of channels to split, 0 to 1 ({DEFAULTS.act_ratio:g})",
    )
    group.add_argument(
        "--act-split",
        choices=CHOICES["act_split"],
        help="static: by calibration; dynamic: scales and splits of each batch, found by the graph (static)",
    )
    group.add_argument(
        "--act-unsigned",
        action="store_true",
        help="a grid from 0 on (UINT8) where calibration saw no negative value; not for TensorRT",
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


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", default=False, help="no table, no progress")
    parser.add_argument("-v", "--verbose", action="store_true", default=False, help="a row for each layer")
    parser.add_argument("--version", action="version", version=f"onnx-ocs {__version__}")


def _number_or_none(what: str) -> Callable[[str], int | None]:
    """Reads a number of ``what``, or none."""

    def read(text: str) -> int | None:
        try:
            return None if text == "none" else int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}") from None

    return read


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


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
