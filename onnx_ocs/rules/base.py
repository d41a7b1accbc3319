"""Rules and what they find. A new rule is one more function registered by :func:`rule`."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import onnx_graphsurgeon as gs

from onnx_ocs.graph.layers import Place
from onnx_ocs.graph.quantized import MatrixNode, Quantizer, Wiring
from onnx_ocs.rules.kernels import Kernels
from onnx_ocs.targets.base import Target

Severity = Literal["error", "warning", "note"]
"""``error``: the runtime refuses the model or computes something else. ``warning``: it runs, but slowly, in float, or
wrongly on some machines. ``note``: worth knowing; nothing has to be mended."""


@dataclass(frozen=True)
class Finding:
    """One place where a model breaks a rule of a target."""

    rule: str
    severity: Severity
    node: str  # its name, behind the path of its graph; that of its first output where it has none; empty for the model
    op: str
    problem: str
    remedy: str


@dataclass(frozen=True, eq=False)
class Problem:
    """What a rule says of one node."""

    place: Place | None  # none for the whole model
    problem: str
    remedy: str
    severity: Severity | None = None  # where it is not that of the rule


@dataclass(eq=False)
class View:
    """What rules look at."""

    wiring: Wiring
    target: Target
    kernels: Kernels | None = None  # what onnxruntime made of the nodes, where it was asked
    refused: str | None = None  # why onnxruntime does not load the model, where it was asked
    explained: set[int] = field(default_factory=set)  # ids of nodes whose float kernel a rule has explained

    @property
    def quantizes_data(self) -> bool:
        """Whether any data is quantized, or weights alone."""
        return any(found.quantizes and not found.constant for found in self.wiring.quantizers)

    @property
    def quantizes_weights(self) -> bool:
        """Whether any constant is quantized, or data alone."""
        return any(found.constant for found in self.wiring.quantizers)

    @functools.cached_property
    def quantizers(self) -> list[Quantizer]:
        """Those of the model but for each DequantizeLinear that says what the QuantizeLinear before it says."""
        return [found for found in self.wiring.quantizers if not self._repeats(found)]

    def _repeats(self, found: Quantizer) -> bool:
        maker = None if found.quantizes else self.wiring.origin(found)[0]
        if maker is None:
            return False
        before = self.wiring.quantizer(maker)
        same = (before.data_type, before.axis, before.explicit) == (found.data_type, found.axis, found.explicit)
        return same and before.same_grid(found)

    @property
    def quantized_layers(self) -> Iterator[MatrixNode]:
        """Layers of which an operand is quantized."""
        yield from (layer for layer in self.wiring.layers if layer.data.quantized or layer.weight.quantized)

    def nodes(self, ops: frozenset[str] | set[str]) -> Iterator[Place]:
        """The nodes of the types ``ops`` of the standard domain."""
        yield from (p for p in self.wiring.places if p.node.op in ops and p.node.domain in (None, "", "ai.onnx"))


Check = Callable[[View], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """A rule: what it looks for, and how grave a violation is."""

    name: str
    severity: Severity
    check: Check
    explains: bool = False  # a violation makes a node float, so that a kernel on integers refutes it

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (self.check.__doc__ or "").strip().split("\n")[0]


RULES: dict[str, Rule] = {}
"""In the order in which they are checked."""


def rule(name: str, severity: Severity, explains: bool = False) -> Callable[[Check], Check]:
    """Register a rule under the name by which targets list it and users ignore it."""

    def register(check: Check) -> Check:
        RULES[name] = Rule(name, severity, check, explains)
        return check

    return register


def op_of(node: gs.Node) -> str:
    return str(node.op) if node.domain in (None, "", "ai.onnx") else f"{node.domain}::{node.op}"
