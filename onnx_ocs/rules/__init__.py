"""Where a quantized model (QDQ format, of any tool) breaks the rules of a runtime."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from onnx_ocs.errors import RuntimeFailed
from onnx_ocs.graph.layers import name_of
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.quantized import Wiring
from onnx_ocs.rules import formats, ort, runtime, tensorrt  # noqa: F401 - they register their rules
from onnx_ocs.rules.base import RULES, Finding, Problem, Rule, View, op_of
from onnx_ocs.rules.kernels import choose_kernels
from onnx_ocs.targets.base import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerKernel:
    """What onnxruntime made of a quantized layer."""

    node: str
    op: str
    kernel: str
    on_integers: bool


def find_violations(
    model: Model, target: Target, rules: Iterable[str], folder: Path | None, timeout: float
) -> tuple[list[Finding], list[LayerKernel]]:
    """What ``model`` breaks of the ``rules`` of ``target``, in their order, and the kernels of its quantized layers.

    Args:
        folder: where onnxruntime may write its optimized model; without it the model is only read.
    """
    chosen = [RULES[name] for name in target.rules if name in set(rules)]
    view = View(Wiring(model), target)
    findings = []
    if folder is not None and RULES["loads"] in chosen:
        try:
            view.kernels = choose_kernels(view.wiring.editor, folder, timeout)
        except RuntimeFailed as error:
            view.refused = str(error)
    for rule in chosen:
        for problem in rule.check(view):
            if (told := _judged(view, rule, problem)) is not None:
                findings.append(told)
    log.debug("%s: %d findings by %d rules", model.name, len(findings), len(chosen))
    return findings, _kernels(view)


def _judged(view: View, rule: Rule, problem: Problem) -> Finding | None:
    """What is reported of ``problem``; nothing where a rule explains a float kernel and the kernel is on integers."""
    place, told = problem.place, problem.problem
    if place is None:
        return Finding(rule.name, problem.severity or rule.severity, "", "", told, problem.remedy)
    if rule.explains and view.kernels is not None:
        kernel = view.kernels.of(place.node)
        if kernel is not None and kernel.on_integers:
            return None
        told += f" (onnxruntime: {kernel.op})" if kernel is not None else ""
    if rule.explains:
        view.explained.add(id(place.node))
    severity = problem.severity or rule.severity
    return Finding(rule.name, severity, name_of(place), op_of(place.node), told, problem.remedy)


def _kernels(view: View) -> list[LayerKernel]:
    if view.kernels is None:
        return []
    found = ((layer, view.kernels.of(layer.node)) for layer in view.quantized_layers)
    return [
        LayerKernel(name_of(layer.place), layer.node.op, kernel.op, kernel.on_integers)
        for layer, kernel in found
        if kernel is not None
    ]
