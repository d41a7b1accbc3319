"""What was found, as tables for a terminal."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from onnx_ocs.search import describe

if TYPE_CHECKING:
    from onnx_ocs.api import CheckOutcome, LintOutcome


def result(report: dict[str, Any], target: Path) -> Table:
    """What was done, in a few lines."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for status in ("split", "quantized", "declined"):
        rows = [row for row in report["layers"] if row["status"] == status]
        if rows:
            table.add_row(f"layers {status}", _reasons(rows))
    if data := _activations(report["layers"]):
        table.add_row("activations", data)
    if copies := _copies(report["layers"]):
        table.add_row("copies", copies)
    size, overhead = report["size"], report["overhead"]
    table.add_row(
        "size", f"{_bytes(size['before'])} -> {_bytes(size['after'])} ({size['after'] / max(1, size['before']):.1%})"
    )
    if overhead["weights"] > 1:
        table.add_row("overhead", f"weights x{overhead['weights']:.3f}, activations x{overhead['activations']:.3f}")
    for name, value in _verified(report["verification"]):
        table.add_row(name, value)
    for note in report["notes"]:
        table.add_row("note", note)
    table.add_row("written", str(target))
    return table


def _reasons(rows: list[dict[str, Any]]) -> str:
    """How many, and for which reasons."""
    counts = Counter(row["reason"] for row in rows if row["reason"])
    why = "; ".join(f"{reason} ({count})" if len(rows) > 1 else reason for reason, count in counts.most_common())
    return f"{len(rows)}" + (f": {why}" if why else "")


def _copies(rows: list[dict[str, Any]]) -> str:
    """Who makes the copies of channels; empty where there is nothing but one Gather for each layer."""
    folded = sum(row.get("copies") == "folded" for row in rows)
    aligned = Counter(row["multiple"] for row in rows if row.get("copies") and row["multiple"] > 1)
    parts = []
    if folded:
        gathered = sum(row.get("copies") == "gathered" for row in rows)
        parts.append(f"of {folded} layers made by those in front of them, of {gathered} by a Gather")
    parts += [f"{count} layers have a multiple of {multiple} channels" for multiple, count in sorted(aligned.items())]
    return "; ".join(parts)


def _activations(rows: list[dict[str, Any]]) -> str:
    """What became of the data of the layers; empty where it stays float everywhere."""
    rows = [row for row in rows if row["status"] != "declined"]
    bits = Counter(row["act_bits"] for row in rows if row["act_bits"] is not None)
    if not bits:
        return ""
    parts = [f"{count} of {len(rows)} on {width} bits" for width, count in sorted(bits.items())]
    if split := sum(row["act_extra"] > 0 for row in rows):
        parts.append(f"{split} split")
    if any(row.get("act_scale") == "batch" for row in rows):
        parts.append("scales of each batch")
    left = Counter(row["act_reason"] for row in rows if row["act_bits"] is None)
    return ", ".join(parts) + "".join(f"; {count} float: {reason}" for reason, count in left.most_common())


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


def front(found: dict[str, Any]) -> Table:
    """The trials of a search that no other beats in size and quality."""
    table = Table(box=None, pad_edge=False)
    for name in ("size", "of the source", "SQNR dB", "agreement", "KL", "options"):
        table.add_column(name, justify="left" if name == "options" else "right", overflow="fold")
    for trial in found["front"]:
        agreement, divergence = trial["agreement"], trial["kl_divergence"]
        table.add_row(
            _bytes(trial["size"]),
            f"{trial['size_ratio']:.1%}",
            "" if trial["sqnr_db"] is None else f"{trial['sqnr_db']:.1f}",
            "" if agreement is None else f"{agreement:.2%}",
            "" if divergence is None else f"{divergence:.2g}",
            describe(trial["options"]),
        )
    return table


def layers(rows: list[dict[str, Any]]) -> Table:
    """A row for each layer."""
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "op", "status", "channels", "bits", "SQNR dB", "copies", "reason"):
        table.add_column(name, justify="right" if name in ("channels", "bits", "SQNR dB") else "left", overflow="fold")
    for row in rows:
        channels = "" if row["channels"] is None else f"{row['channels']}+{row['extra']}"
        sqnr = "" if row.get("sqnr_db") is None else f"{row['sqnr_db']:.1f}"
        table.add_row(
            row["name"],
            row["op"],
            row["status"],
            channels,
            str(row.get("bits") or ""),
            sqnr,
            _made(row),
            _why(row),
        )
    return table


def _why(row: dict[str, Any]) -> str:
    """Why a layer is not split, or not as asked, or not without a Gather."""
    return "; ".join(row[name] for name in ("reason", "align_reason", "copies_reason") if row.get(name))


def _made(row: dict[str, Any]) -> str:
    """Who makes the copies of a layer, with the estimated cost of both ways in bytes moved and products."""
    costs = [
        f"{name}: {figures['bytes']:.3g} B" + (f" + {figures['macs']:.3g} MAC" if figures["macs"] else "")
        for name, figures in (row.get("costs") or {}).items()
    ]
    return " ".join([row.get("copies") or "", f"({'; '.join(costs)})" if costs else ""]).strip()


def _bytes(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def check(outcome: "CheckOutcome") -> Table:
    """A row for each output."""
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
    return table


def verdict(outcome: "CheckOutcome") -> list[str]:
    """Whether it passed, and what to know of it."""
    kind = "generated" if outcome.generated else "given"
    lines = [f"{'passed' if outcome.passed else 'failed'} on {outcome.samples} {kind} samples"]
    if not outcome.deterministic:
        lines.append("the outputs of the reference differ from run to run")
    if outcome.saturated_db is not None:
        lines.append(
            f"onnxruntime's integer kernels saturate on this CPU: {outcome.saturated_db:.1f} dB SQNR by default; the "
            "figures are those without them (session.x64quantprecision = 1 avoids it)"
        )
    return lines


def survey(rows: list[dict[str, Any]]) -> Table:
    """What would be done with each layer."""
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
    return table


def findings(outcome: "LintOutcome") -> Table:
    """A row for each finding, the gravest first."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "rule", "node", "op", "what is wrong"):
        table.add_column(name, overflow="fold")
    grave = {"error": 0, "warning": 1, "note": 2}
    for found in sorted(outcome.findings, key=lambda found: grave[found.severity]):
        table.add_row(found.severity, found.rule, found.node or "(the model)", found.op, found.problem)
    return table


def remedies(outcome: "LintOutcome") -> Table:
    """What to do, a row for each rule and remedy."""
    table = Table(box=None, pad_edge=False)
    for name in ("rule", "what to do"):
        table.add_column(name, overflow="fold")
    for rule, remedy in dict.fromkeys((found.rule, found.remedy) for found in outcome.findings):
        table.add_row(rule, remedy)
    return table


def kernels(outcome: "LintOutcome") -> Table:
    """What onnxruntime made of each quantized layer."""
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "op", "kernel", ""):
        table.add_column(name, overflow="fold")
    for layer in outcome.kernels:
        table.add_row(layer.node, layer.op, layer.kernel, "integers" if layer.on_integers else "float")
    return table


def judgement(outcome: "LintOutcome", target: str) -> str:
    """How many findings there are, and how many layers compute on integers."""
    counts = [(outcome.count(severity), severity) for severity in ("error", "warning", "note")]
    told = ", ".join(f"{count} {severity}{'s' if count > 1 else ''}" for count, severity in counts if count)
    line = f"{'passed' if outcome.passed else 'failed'} for {target}: {told or 'no violations'}"
    if outcome.kernels:
        line += f"; {sum(layer.on_integers for layer in outcome.kernels)} of {len(outcome.kernels)} quantized layers "
        line += "compute on integers"
    return line
