"""The result of a check or a lint as a JUnit test report, which CI services show."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from onnx_ocs.graph import files

if TYPE_CHECKING:
    from onnx_ocs.api import CheckOutcome, LintOutcome


def write(path: Path, name: str, outcome: "CheckOutcome") -> None:
    """Write one test case for the comparison, with the figures of each output as its output.

    Raises:
        CannotWrite: the file cannot be written.
    """
    suite = ElementTree.Element(
        "testsuite", name="onnx-ocs check", tests="1", failures=str(int(not outcome.passed)), errors="0", skipped="0"
    )
    case = ElementTree.SubElement(suite, "testcase", classname="onnx-ocs.check", name=name)
    if not outcome.passed:
        failure = ElementTree.SubElement(case, "failure", message=_printable(outcome.reason or ""))
        failure.text = _printable(outcome.reason or "")
    lines = [", ".join(f"{key}={value}" for key, value in output.items()) for output in outcome.outputs]
    ElementTree.SubElement(case, "system-out").text = _printable("\n".join(lines))
    _save(path, suite)


def write_lint(path: Path, name: str, outcome: "LintOutcome", rules: Iterable[str]) -> None:
    """Write one test case for each rule, with what it found.

    Raises:
        CannotWrite: the file cannot be written.
    """
    found = {rule: [finding for finding in outcome.findings if finding.rule == rule] for rule in rules}
    failed = {rule: [finding for finding in each if finding.severity != "note"] for rule, each in found.items()}
    failures = sum(bool(each) for each in failed.values())
    suite = ElementTree.Element(
        "testsuite", name="onnx-ocs lint", tests=str(len(found)), failures=str(failures), errors="0", skipped="0"
    )
    for rule, each in found.items():
        case = ElementTree.SubElement(suite, "testcase", classname="onnx-ocs.lint", name=f"{name}: {rule}")
        lines = [f"{one.severity}: {one.node} ({one.op}): {one.problem}; {one.remedy}" for one in each]
        if failed[rule]:
            failure = ElementTree.SubElement(case, "failure", message=_printable(f"{len(each)} findings"))
            failure.text = _printable("\n".join(lines))
        elif lines:
            ElementTree.SubElement(case, "system-out").text = _printable("\n".join(lines))
    _save(path, suite)


def _save(path: Path, suite: ElementTree.Element) -> None:
    text = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    files.write(path, [memoryview(text)])


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(char for char in text if char in "\t\n" or ord(char) >= 32)
