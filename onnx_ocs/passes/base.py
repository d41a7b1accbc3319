"""What passes work on, and what they say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Layer
from onnx_ocs.numerics.split import SplitPlan
from onnx_ocs.numerics.weights import Axes

FIRST_LAYER_CHANNELS = 4
"""A layer that reads a graph input with so few channels is a first layer: RGB, RGBA, grey, raw features."""

ARRANGING = {"Identity", "Cast", "Transpose", "Pad", "Add", "Sub", "Mul", "Div", "BatchNormalization"}
"""Operators that prepare an input, and pass its channels on."""


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What was decided for one layer. Deciding fills it, editing reads it, the report prints it."""

    layer: Layer
    reason: str | None = None  # why the layer is not split, or is left as it is
    declined: bool = False  # left as it is
    splits: tuple[SplitPlan, ...] = ()  # one, or one for each group
    bits: int | None = None
    per_channel: bool = False
    storage: int = 8  # bits of the integer type
    threshold: NDArray[np.float64] | None = None  # () or (outputs,)
    step: NDArray[np.float32] | None = None  # () or (outputs,)
    sqnr_db: float | None = None  # of the weight that was written

    @property
    def axes(self) -> Axes:
        layer = self.layer
        return Axes(layer.input_axis, layer.output_axis, layer.groups, layer.groups_on_input)

    @property
    def extra(self) -> int:
        """Channels added to the layer's data."""
        return sum(split.extra for split in self.splits)

    @property
    def channels(self) -> int:
        """Channels of the layer's data in the source."""
        layer = self.layer
        held = layer.weight.shape[layer.input_axis]
        return held if layer.groups_on_input else held * layer.groups

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two layers whose new weights are the same."""
        splits = tuple((s.source.tobytes(), s.denominator.tobytes(), s.phase.tobytes()) for s in self.splits)
        step = b"" if self.step is None else self.step.tobytes()
        return (self.layer.weight.key, self.axes, splits, self.bits, self.per_channel, step)


@dataclass
class Work:
    """One run: the graph that is edited and what is decided so far."""

    editor: Editor
    plans: list[LayerPlan]
    notes: list[str] = field(default_factory=list)  # for the report

    def values(self, plan: LayerPlan) -> NDArray[Any]:
        """The weight of a layer as the source has it."""
        return plan.layer.weight.read(self.editor.model)

    def readers(self) -> Mapping[tuple[Any, ...], int]:
        """How many layers will read each new weight."""
        counts: dict[tuple[Any, ...], int] = {}
        for plan in self.plans:
            counts[plan.key] = counts.get(plan.key, 0) + 1
        return counts


class Pass(Protocol):
    """One decision, or one edit. The fields of a pass are its options."""

    name: ClassVar[str]

    def apply(self, work: Work) -> list[LayerPlan]:
        """The plans after this pass; without anything to do they are those before it."""
        ...


def is_first(plan: LayerPlan) -> bool:
    """Whether the layer reads an input of the main graph with so few channels."""
    if plan.channels > FIRST_LAYER_CHANNELS or plan.layer.scope.path:
        return False
    tensor = plan.layer.data
    while tensor.inputs and tensor.inputs[0].op in ARRANGING:
        running = [source for source in tensor.inputs[0].inputs if not isinstance(source, gs.Constant)]
        if not running:
            return False
        tensor = running[0]
    return any(tensor is source for source in plan.layer.scope.graph.inputs)
