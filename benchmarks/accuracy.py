"""Weights of few bits by every recipe, and by other quantizers: ``python benchmarks/accuracy.py [--peer NAME=PYTHON]``.

Two Markdown tables for each network, with a row for each recipe or quantizer and a column for each width: top-1,
agreement with the float model on all images, and divergence of the outputs times 1000.

**Float activations**, so that the figures are those of the weights. Without data: one maximum for each output channel
(``max``), least squared error of the weights (``mse``), the paper's recipe (``paper``: one scale per tensor, ratio
0.05, the better of no clip and mse; of a transformer the dense layers as well), and the defaults at two ratios; with
samples the defaults at the same ratios. A quantizer that cannot leave activations alone is measured with the Q/DQ pairs
of its data taken out.

**Activations of 8 bits**, as those quantizers write them, beside the defaults with samples.

onnxruntime's ``quantize_static`` always takes part. Each ``--peer`` names one more, the python of the environment that
it is installed in, and perhaps one of its methods (see quantize_by.py): ``--peer aimet-onnx:apply_seq_mse=PYTHON``. All
models run in onnxruntime, by kernels that do not saturate. Letters stand for remarks below the tables, and for why a
peer makes nothing, in its own words.

``--variants`` has rows of the defaults with other ways to place copies, and without error propagation, as well.

A last table has what splitting adds: ratio 0.05 less ratio 0, in agreement and divergence, on the mean of the networks.

``--keep FOLDER`` keeps the outputs of all cells and makes none again that lies there, so that a run that was broken off
goes on, and several runs side by side, each begun with other networks or widths, share the work.

Exit status 1 where a default loses: the lower end of the paired 95 % interval of its agreement less that of max, mse or
paper, with float activations, is below half a point at 3 bits or more.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import re
import string
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from networks import Figures, Network, add_options, compare, networks, outputs
from numpy.typing import NDArray
from peers import FLOAT, Apart, NotPossible, Quantizer, data_pairs, free_data, shortened, widths

from onnx_ocs import quantize
from onnx_ocs.graph.layers import READERS

PLAIN: dict[str, Any] = {"round": "nearest", "ratio": 0, "clip": "none"}

RECIPES: dict[str, list[dict[str, Any]]] = {
    "max": [PLAIN],
    "mse": [{**PLAIN, "clip": "mse"}],
    "paper": [{"preset": "paper", "ratio": 0.05, "first": "int8", "clip": clip} for clip in ("none", "mse")],
    "no data, ratio 0": [{"ratio": 0}],
    "no data, ratio 0.05": [{"ratio": 0.05}],
    "samples, ratio 0": [{"ratio": 0, "calibrate": True}],
    "samples, ratio 0.05": [{"ratio": 0.05, "calibrate": True}],
}
"""With float activations; of several options the better ones."""

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "no data, ratio 0.05, uniform": [{"ratio": 0.05, "allocate": "uniform"}],
    "no data, ratio 0.05, sensitivity": [{"ratio": 0.05, "allocate": "sensitivity"}],
    "no data, ratio 0.05, joint": [{"ratio": 0.05, "plan": "joint"}],
    "no data, ratio 0.05, no error propagation": [{"ratio": 0.05, "error_propagation": False}],
    "samples, ratio 0.05, uniform": [{"ratio": 0.05, "allocate": "uniform", "calibrate": True}],
    "samples, ratio 0.05, sensitivity": [{"ratio": 0.05, "allocate": "sensitivity", "calibrate": True}],
    "samples, ratio 0.05, no error propagation": [{"ratio": 0.05, "error_propagation": False, "calibrate": True}],
}
"""The defaults with single steps changed, with float activations."""

WITH_DATA: dict[str, list[dict[str, Any]]] = {
    "samples, ratio 0": [{"ratio": 0, "calibrate": True, "act_bits": 8}],
    "samples, ratio 0.05": [{"ratio": 0.05, "calibrate": True, "act_bits": 8}],
    "samples, ratio 0, target ort": [{"ratio": 0, "calibrate": True, "act_bits": 8, "target": "ort"}],
}
"""With activations of 8 bits."""

DEFAULTS = ("no data, ratio 0", "no data, ratio 0.05", "samples, ratio 0", "samples, ratio 0.05")

OTHERS = ("max", "mse", "paper")

NARROWEST = 3
"""Bits from which on a default must not lose."""

MARGIN = 0.5
"""Points that the lower end of an interval may be below zero."""

Scores = NDArray[np.float32]

Makers = dict[str, Callable[[int], "Made"]]
"""Of the rows of a table: what makes the cell of a width."""


@dataclass(frozen=True, eq=False)
class Made:
    """What a recipe or a quantizer makes of a network at one width."""

    scores: Scores | None = None  # the outputs on all images, or None where nothing came of it
    remarks: list[str] = field(default_factory=list)
    versions: str = ""  # of a peer

    def save(self, path: Path) -> None:
        """Under another name first, since other runs look here too."""
        rest = {name: value for name, value in dataclasses.asdict(self).items() if name != "scores"}
        arrays = {} if self.scores is None else {"scores": self.scores}
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, rest=np.array(json.dumps(rest)), **arrays)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Made":
        with np.load(path) as arrays:
            return cls(arrays.get("scores"), **json.loads(str(arrays["rest"])))


Cells = dict[tuple[str, int], Made]
"""Of a table: by its row and its width."""

Compared = dict[tuple[str, int], Figures]
"""Of those that came to something."""


def scores(network: Network, bits: int, options: dict[str, Any]) -> Scores:
    """The outputs of the model that a recipe makes."""
    given = dict(options)
    if given.pop("calibrate", False):
        given = {"calibrate": network.calibration, "act_bits": None} | given
    if network.dense:
        given["quantize_ops"] = tuple(READERS)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "out.onnx")
        quantize(network.model, target, bits=bits, verify=False, **given)
        return outputs(target, network.images, exact=True)


def best_scores(network: Network, bits: int, options: list[dict[str, Any]], reference: Scores) -> Made:
    """Of several options, those that agree most with the float model."""
    return Made(max((scores(network, bits, one) for one in options), key=lambda made: agreeing(reference, made).mean()))


def scores_by(peer: Quantizer, network: Network, bits: int, data: bool) -> tuple[Scores, list[str]]:
    """The outputs of what a peer makes, and remarks."""
    with tempfile.TemporaryDirectory() as folder:
        made = peer.quantize(network, bits, data, Path(folder))
        if not isinstance(made, Path):
            return made, ["simulated"]
        found = widths(made)
        narrow = sum(width <= (4 if bits <= 4 else 8) for width in found)
        if not narrow:
            left = "float" if min(found) == FLOAT else f"at {min(found)} bits or more"
            raise NotPossible(f"it leaves all {len(found)} layers {left}")
        remarks = [f"{narrow} of {len(found)} layers"] if narrow < len(found) else []
        on_integers = bool(data_pairs(onnx.load(made)))
        if data and not on_integers:
            remarks.append("float data")
        elif on_integers and not data:
            free_data(made)
            remarks.append("Q/DQ of data taken out")
        try:
            return outputs(made, network.images, exact=True), remarks
        except Exception as error:  # its classes of errors have no common base
            raise NotPossible(f"onnxruntime: {error}") from error


def made_by(peer: Quantizer, network: Network, bits: int, data: bool) -> Made:
    try:
        found, remarks = scores_by(peer, network, bits, data)
    except NotPossible as reason:
        return Made(None, [shortened(str(reason))], peer.versions)
    return Made(found, remarks, peer.versions)


class Shelf:
    """Cells that were made, perhaps by other runs, in a folder or nowhere."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def cell(self, make: Callable[[], Made], *name: object) -> Made:
        """That of this name, made where there is none yet."""
        if self._folder is None:
            return make()
        path = self._folder / (re.sub(r"[^\w.]+", "-", " ".join(map(str, name))) + ".npz")
        if not path.exists():
            make().save(path)
        return Made.load(path)


class Notes:
    """Remarks of the cells of a table, a letter for each."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def letters(self, remarks: Iterable[str]) -> str:
        return " ".join(self._letters.setdefault(each, string.ascii_letters[len(self._letters)]) for each in remarks)

    def __str__(self) -> str:
        return "; ".join(f"{letter}: {remark}" for remark, letter in self._letters.items())


def figures(found: Figures) -> str:
    """Without top-1 where there are no labels."""
    return str(found).replace("nan | ", "").replace("|", "/")


def agreeing(reference: Scores, found: Scores) -> NDArray[np.float64]:
    """(images,), 100 where the largest score is that of the float model."""
    first, second = (values.reshape(len(values), -1).argmax(axis=1) for values in (reference, found))
    return 100.0 * (first == second)


def lower_end(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Of the paired 95 % interval of the mean of ``first - second``."""
    difference = first - second
    return float(difference.mean() - 1.96 * difference.std() / np.sqrt(len(difference)))


def losses(network: Network, reference: Scores, found: Cells) -> Iterator[str]:
    """Where a default is worse than one of the others."""
    agreed = {
        cell: network.by_sample(agreeing(reference, made.scores))
        for cell, made in found.items()
        if made.scores is not None
    }
    for name, bits in found:
        for other in OTHERS if name in DEFAULTS and bits >= NARROWEST else ():
            first, second = agreed[name, bits], agreed[other, bits]
            if (low := lower_end(first, second)) < -MARGIN:
                mean = first.mean() - second.mean()
                yield f"{network.name}, {bits} bits: {name} less {other}: {mean:.2f}, from {low:.2f} on"


def gain(figures: Mapping[tuple[str, int], list[Figures]], known: str, bits: int) -> str:
    """Of splitting: what ratio 0.05 has more than 0 in agreement and in divergence, on the mean of the networks."""
    without, split = (figures[f"{known}, ratio {ratio}", bits] for ratio in ("0", "0.05"))
    pairs = list(zip(split, without, strict=True))
    agreement = np.mean([after.agreement - before.agreement for after, before in pairs])
    divergence = np.mean([after.divergence - before.divergence for after, before in pairs])
    return f"{agreement:+.2f} / {divergence:+.2f}"


def head(name: str, columns: Sequence[int]) -> None:
    row(name, [f"{bits} bits" for bits in columns])
    print("|---" * (len(columns) + 1) + "|")


def row(name: str, cells: Iterable[str]) -> None:
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def rows(network: Network, data: bool, reference: Scores, peers: Sequence[Quantizer], variants: bool) -> Makers:
    """Of one table, by their names."""

    def ours(options: list[dict[str, Any]]) -> Callable[[int], Made]:
        return lambda bits: best_scores(network, bits, options, reference)

    def theirs(peer: Quantizer) -> Callable[[int], Made]:
        return lambda bits: made_by(peer, network, bits, data)

    options = WITH_DATA if data else RECIPES | (VARIANTS if variants else {})
    recipes = {name: ours(some) for name, some in options.items()}
    return recipes | {peer.name: theirs(peer) for peer in peers}


def cells(shelf: Shelf, network: Network, data: bool, reference: Scores, arguments: argparse.Namespace) -> Cells:
    """All of one table, made or taken from the shelf."""
    kind, peers = kind_of(data), [Quantizer(), *arguments.peer]
    counts = len(network.calibration), len(network.images)
    return {
        (name, bits): shelf.cell(partial(make, bits), network.name, *counts, kind, name, bits)
        for name, make in rows(network, data, reference, peers, arguments.variants).items()
        for bits in arguments.bits
    }


def kind_of(data: bool) -> str:
    return "activations of 8 bits" if data else "float activations"


def table(title: str, float_model: Figures, found: Cells, compared: Compared, columns: Sequence[int]) -> None:
    """As Markdown, with its remarks."""
    print(f"\n**{title}**\n")
    head("top-1 / agreement / divergence", columns)
    row("float model", [figures(float_model)] * len(columns))
    notes = Notes()
    for name in dict.fromkeys(name for name, _ in found):
        told = []
        for cell in ((name, bits) for bits in columns):
            shown = figures(compared[cell]) if cell in compared else "not possible"
            told.append(f"{shown} {notes.letters(found[cell].remarks)}".strip())
        row(name, told)
    if str(notes):
        print(f"\n{notes}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ("squeezenet", "kws", "mobilenet", "vit", "resnet20"))
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 7, 6, 5, 4, 3, 2])
    parser.add_argument("--peer", type=Apart.named, action="append", default=[], metavar="NAME[:METHOD]=PYTHON")
    parser.add_argument("--variants", action="store_true", help="the defaults with single steps changed as well")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the outputs of all cells are kept")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    shelf = Shelf(arguments.keep)
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("onnx", "onnxruntime", "numpy")]
    print(f"{datetime.date.today()}; Python {platform.python_version()}, {', '.join(packages)}")
    lost: list[str] = []
    floats: dict[tuple[str, int], list[Figures]] = defaultdict(list)
    versions: dict[str, str] = {}
    for network in networks(arguments):
        reference = outputs(network.model, network.images)
        whole = compare(reference, reference, network.labels)
        for data in (False, True):
            found = cells(shelf, network, data, reference, arguments)
            compared = {
                cell: compare(reference, made.scores, network.labels)
                for cell, made in found.items()
                if made.scores is not None
            }
            table(f"{network.name}, {kind_of(data)}", whole, found, compared, arguments.bits)
            versions |= {name: made.versions for (name, _), made in found.items() if made.versions}
            if not data:
                lost += losses(network, reference, found)
                for cell, each in compared.items():
                    floats[cell].append(each)
    print()
    head("ratio 0.05 less 0, agreement / divergence", arguments.bits)
    for known in ("no data", "samples"):
        row(known, [gain(floats, known, bits) for bits in arguments.bits])
    print()
    for name, told in versions.items():
        print(f"{name}: {told}")
    print(f"\n{len(lost)} comparisons lost")
    print("\n".join(lost))
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
