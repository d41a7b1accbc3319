"""Run the tool on every graph of the corpus and tally how each ends: ``python benchmarks/corpus.py``.

Each graph is quantized with ``--bits 8`` by the command line, as a user would; what is written goes through
``onnx-ocs check --min-sqnr 20`` against its source. The tally names every reason, counts the weights that were
quantized, and fails (exit status 1) where a promise is broken.
"""

import argparse
import csv
import json
import re
import sys
import tempfile
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import assets, measure, onnx_ocs

SAMPLES = """
import sys
from pathlib import Path
import numpy as np
from onnx_ocs.errors import RuntimeFailed
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.hints import table_lengths
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.samples import GUESSES, generate
from onnx_ocs.graph.session import Session
session, bounds = Session(Path(sys.argv[1])), table_lengths(Editor(Model.load(sys.argv[1])))
def works(guess):
    feed = generate(session.inputs, guess, bounds, np.random.default_rng(0))
    if sum(values.nbytes for values in feed.values()) > 2**28:
        return False
    try:
        outputs = session.run(feed)
    except RuntimeFailed:
        return False
    return all(np.isfinite(v).all() for v in outputs.values() if v.dtype.kind == "f")
guess = next(filter(works, GUESSES))
for seed in range(8):
    feed = generate(session.inputs, guess, bounds, np.random.default_rng(seed))
    np.savez(Path(sys.argv[2], f"{seed}.npz"), **feed)
"""
"""Eight batches of random samples, by the shapes on which the graph runs."""

WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")


@dataclass(frozen=True)
class Ending:
    """How one graph ended."""

    path: str
    status: int
    line: str  # what the tool said
    checked: int | None = None  # exit status of check
    check_line: str = ""
    quantized: int = 0
    declined: Counter[str] = field(default_factory=Counter)  # constant weights left float, by reason
    data: Counter[str] = field(default_factory=Counter)  # of layers with quantized weights, what their data is


def run_one(graph: Path, name: str, options: list[str], calibrated: bool) -> Ending:
    """Quantize one graph, and check the result."""
    with tempfile.TemporaryDirectory() as folder:
        target, report, samples = Path(folder, "out.onnx"), Path(folder, "report.json"), Path(folder, "samples")
        given: list[str] = []
        if calibrated:
            samples.mkdir()
            measure([sys.executable, "-c", SAMPLES, str(graph), str(samples)], timeout=300)
            options = [*options, "--calibrate", str(samples), "--min-sqnr", "20"]
            given = ["--inputs", str(samples)]
        done = measure(onnx_ocs(graph, target, "--bits", 8, "--report", report, *options), timeout=300)
        line = done.errors.splitlines()[-1] if done.errors else ""
        if done.status or not target.exists():
            return Ending(name, done.status, line)
        layers = [row for row in json.loads(report.read_text())["layers"] if row["op"] in WEIGHTED]
        quantized = sum(row["status"] != "declined" for row in layers)
        data = Counter(_data(row) for row in layers if row["status"] != "declined") if calibrated else Counter()
        declined = Counter(row["reason"] for row in layers if row["status"] == "declined" and _constant(row["reason"]))
        checked = measure(onnx_ocs("check", graph, target, "--min-sqnr", 20, *given), timeout=300)
        check_line = checked.errors.splitlines()[-1] if checked.errors else ""
        return Ending(name, done.status, line, checked.status, check_line, quantized, declined, data)


def _data(row: dict[str, Any]) -> str:
    """What was done with the data of a layer."""
    return "quantized" if row["act_bits"] else f"float: {row['act_reason']}"


def _constant(reason: str) -> bool:
    """Whether a declined layer has a constant float weight at all."""
    others = ("computed at run time", "input of the", "already quantized", "is empty", "of type")
    return not any(text in reason for text in others)


def general(text: str) -> str:
    """A message without the names and numbers of one graph, so that equal causes count together."""
    text = re.sub(r"^onnx-ocs: \S+: ", "", text)
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"'[^']*'", "'…'", text))[:110]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weighted", action="store_true", help="only graphs with constant weights")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--match", default="", help="only graphs whose path matches this pattern")
    parser.add_argument("--calibrated", action="store_true", help="quantize the data as well, by random samples")
    parser.add_argument("--csv", type=Path, help="write how each graph ended")
    arguments, options = parser.parse_known_args()
    corpus = assets() / "corpus"
    rows = {row["path"]: row for row in csv.DictReader((corpus / "index.csv").open())}
    weighted = {path for path, row in rows.items() if any(row[op] for op in WEIGHTED)}
    names = [name for name in rows if re.search(arguments.match, name) and (not arguments.weighted or name in weighted)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        zipfile.ZipFile(corpus / "corpus.zip").extractall(folder)
        endings = list(pool.map(lambda name: run_one(Path(folder, name), name, options, arguments.calibrated), names))
    return tally(endings, {path for path in weighted if rows[path]["ort_run"] == "1"}, arguments.csv)


def tally(endings: list[Ending], running: set[str], file: Path | None) -> int:
    """Print the figures; 1 if a promise is broken."""
    print(f"{len(endings)} graphs; exit status: {dict(sorted(Counter(e.status for e in endings).items()))}")
    for (status, text), number in Counter((e.status, general(e.line)) for e in endings if e.status).most_common():
        print(f"  {number:4d} x exit {status}: {text}")
    written = [ending for ending in endings if ending.status == 0]
    print(f"check of what was written: {dict(sorted(Counter(str(e.checked) for e in written).items()))}")
    for ending in written:
        if ending.checked:
            print(f"  {ending.path}: exit {ending.checked}: {ending.check_line}")
    counted = [ending for ending in endings if ending.path in running]
    kept = [ending for ending in counted if ending.status == 0]
    quantized, left = sum(e.quantized for e in kept), sum((e.declined for e in kept), Counter[str]())
    weights = quantized + left.total()
    print(
        f"graphs with constant weights that run: {len(counted)}, "
        f"written: {len(kept)} ({len(kept) / max(1, len(counted)):.1%})"
    )
    print(f"constant weights in those: {weights}, quantized: {quantized} ({quantized / max(1, weights):.1%})")
    for what, number in sum((e.data for e in kept), Counter[str]()).most_common():
        print(f"  {number:4d} x data {what}")
    for reason, number in left.most_common():
        print(f"  {number:4d} x left float: {reason}")
    for ending in counted:
        if ending.status:
            print(f"  not written: {ending.path}: {ending.line}")
    if file:
        with file.open("w", newline="") as out:
            table = csv.writer(out)
            table.writerow(["path", "status", "line", "checked", "check_line", "quantized", "left"])
            table.writerows(
                [e.path, e.status, e.line, e.checked, e.check_line, e.quantized, e.declined.total()] for e in endings
            )
    odd = [ending for ending in endings if ending.status not in (0, 1, 3) or "internal error" in ending.line]
    for ending in odd:
        print(f"BROKEN: {ending.path}: exit {ending.status}: {ending.line}")
    refused = [ending for ending in written if ending.checked and ending.path in running]
    enough = len(kept) >= 0.9 * len(counted) and quantized >= 0.95 * weights
    return int(bool(odd or refused or not enough))


if __name__ == "__main__":
    sys.exit(main())
