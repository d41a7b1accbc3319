"""What is decided: for each layer, for its data, and for tensors that are quantized where they are made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.contraction import Contraction
from onnx_ocs.graph.layers import Layer
from onnx_ocs.graph.observe import Observed
from onnx_ocs.graph.qdq import DataGrid
from onnx_ocs.graph.streams import Ids, Stream
from onnx_ocs.numerics.cost import Cost, Room
from onnx_ocs.numerics.grid import Grid
from onnx_ocs.numerics.integers import Rounded
from onnx_ocs.numerics.split import SplitPlan
from onnx_ocs.numerics.weights import Axes

FIRST_LAYER_CHANNELS = 4
"""A layer that reads a graph input with so few channels is a first layer: RGB, RGBA, grey, raw features."""

FIRST_LAYER_BITS = 8
"""Of first layers, under ``--first int8``."""

NARROW = 5
"""Bits that count as few: up to here accuracy goes before the time of a run, and before that of the model."""

DENSE = {"Gemm", "MatMul"}
"""Layers of whose data nothing can be assumed."""

ARRANGING = {"Identity", "Cast", "Transpose", "Pad", "Add", "Sub", "Mul", "Div", "BatchNormalization"}
"""Operators that prepare an input, and pass its channels on."""


Reader = tuple[gs.Node, int]
"""A node and which of its inputs."""


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """A tensor that is quantized where it is made, and not only in front of one layer."""

    tensor: gs.Tensor
    observed: Observed
    made: bool  # by an integer kernel, so that all that read it read the quantized one
    readers: tuple[Reader, ...]  # of the quantized tensor, besides layers, where float ones may read it as well
    together: str  # equal for tensors that must have one scale
    better: str  # equal for tensors that had better have one
    absorbs: str | None = None  # the activation function that vanishes in it, if the grid ends where the function does
    moved: bool = False  # only operators that move its values read it, so that its own range does not matter
    grid: DataGrid | None = None


@dataclass(frozen=True, eq=False)
class ActivationPlan:
    """What was decided for the data of one layer."""

    bits: int
    unsigned: bool = False  # a grid from 0 on, for data that is never negative
    splits: tuple[SplitPlan, ...] = ()  # one, or one for each group; none where nothing is split
    by_batch: int | None = None  # channels that the graph itself splits for each batch; none: the plan is static
    threshold: float | None = None
    step: NDArray[np.float32] | None = None  # ()
    zero_point: int = 0
    step_of_batch: gs.Tensor | None = None  # the value of the graph that is the step instead
    reason: str | None = None  # why no channel is split

    @property
    def extra(self) -> int:
        """Channels added to the data."""
        return self.by_batch or sum(split.extra for split in self.splits)

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer of the grid; 8 bits have the whole type."""
        if self.unsigned:
            return 0, 2**self.bits - 1
        levels = Grid(self.bits).levels
        return (-levels, levels) if self.bits < 8 else (-128, 127)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What was decided for one layer. Deciding fills it, editing reads it, the report prints it."""

    layer: Layer
    observed: Observed | None = None  # its data, where calibration can see it
    contraction: Contraction | None = None  # how its weights meet its data, where that is a value of the main graph
    given: Mapping[str, Any] = field(default_factory=dict)  # options that hold for this layer
    reason: str | None = None  # why the layer is not split, or is left as it is
    declined: bool = False  # left as it is
    splits: tuple[SplitPlan, ...] = ()  # of the weight; one, or one for each group
    bits: int | None = None
    per_channel: bool = False
    block: int | None = None  # input channels that have a scale for each output channel; none: all of them
    turned: bool = False  # the weight is stored with its two axes exchanged, and the layer reads it so
    block_reason: str | None = None  # why there are no blocks
    storage: int = 8  # bits of the integer type
    planned: NDArray[np.float64] | None = None  # () or (outputs,), the threshold that was chosen with the splits
    threshold: NDArray[np.float64] | None = None  # () or (outputs,); in blocks as Axes has it
    step: NDArray[np.float32] | None = None  # of the same shape
    rounded: Rounded | None = None  # the weight, where it is known before the graph is edited
    narrowed: int = 0  # thresholds that were raised, so that no sum of two products saturates
    rounding: str = "nearest"
    rounding_reason: str | None = None  # why it is not the one that was asked for
    corrected: bool = False  # its bias makes up for the mean of its error
    shift: NDArray[np.float64] | None = None  # (outputs,), by how much
    sqnr_db: float | None = None  # of the weight that was written
    activation: ActivationPlan | None = None
    float_data: str | None = None  # why the data stays float
    room: Room | None = None  # how many channels it gets
    stream: Stream | None = None  # whose makers make the copies
    copied: str | None = None  # why a Gather makes them
    costs: Mapping[str, Cost] | None = None  # of a Gather of its data, of reading it, and of both ways of its stream
    outputs: NDArray[np.int64] | None = None  # which of its output channels each is, where some are made twice
    shares: NDArray[np.float64] | None = None  # of these, that it makes
    reader: Reader | None = None  # the input that the weight is read by, where it is not the layer's
    gathered: tuple[gs.Tensor, NDArray[np.int64]] | None = None  # what its data is copies of, and of which channels

    @property
    def axes(self) -> Axes:
        layer = self.layer
        groups = layer.groups if self.outputs is None or layer.groups == 1 else len(self.outputs)
        return Axes(layer.input_axis, layer.output_axis, groups, layer.groups_on_input, self.block, layer.kernel)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of the kernel over which each output is a sum; none where it is of channels alone."""
        return self.layer.weight.shape[2:] if self.layer.kernel else ()

    @property
    def extra(self) -> int:
        """Channels added to the layer's data by splitting the weight."""
        return sum(split.extra for split in self.splits)

    @property
    def channels(self) -> int:
        """Channels of the layer's data in the source."""
        return self.layer.channels

    @property
    def expanded(self) -> int:
        """Channels of the layer's data after all splits."""
        if self.layer.groups > 1 and self.outputs is not None:  # each carries one
            return len(self.outputs)
        return self.channels + self.extra + (self.activation.extra if self.activation else 0)

    @property
    def static_extra(self) -> int:
        """Channels added to the layer's data ahead of the graph's run."""
        return self.extra + sum(split.extra for split in self.data_splits)

    @property
    def data_splits(self) -> tuple[SplitPlan, ...]:
        """How the data is split ahead of the graph's run; one, or one for each group."""
        return self.activation.splits if self.activation else ()

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two layers whose new weights are the same."""
        splits = tuple(
            (s.source.tobytes(), s.denominator.tobytes(), s.phase.tobytes()) for s in (*self.data_splits, *self.splits)
        )
        step = b"" if self.step is None else self.step.tobytes()
        outputs = tuple(b"" if part is None else part.tobytes() for part in (self.outputs, self.shares))
        return (self.layer.weight.key, self.axes, self.turned, outputs, splits, self.bits, self.per_channel, step)


@dataclass(frozen=True, eq=False)
class Widened:
    """A stream with its copies: which channel each is, and what share of it."""

    stream: Stream
    sources: Mapping[str, Ids]  # Stream.sources
    gains: Mapping[str, NDArray[np.float64]] | None = None  # of each tensor that a layer makes; none: whole channels

    def gain(self, layer: Layer) -> NDArray[np.float64] | None:
        """The shares of the channels that ``layer`` makes."""
        return None if self.gains is None else self.gains[layer.node.outputs[0].name]


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


def weight_bits(plan: LayerPlan, bits: int, first: str) -> int:
    """The bits of a layer's weight, where others have ``bits``."""
    return int(plan.given.get("bits", FIRST_LAYER_BITS if first == "int8" and is_first(plan) else bits))


def ratio_of(plan: LayerPlan, ratio: float) -> float:
    """The ratio of a layer's weight, where others have ``ratio``."""
    return float(plan.given.get("ratio", ratio))


def unsplit(plan: LayerPlan, ratio: float) -> str | None:
    """Why the channels of a layer are not split, whatever they hold; None if they may be."""
    if ratio == 0:
        return "ratio 0"
    if is_first(plan):
        return f"reads a graph input with {FIRST_LAYER_CHANNELS} channels or fewer"
    if plan.channels == plan.layer.groups:
        return "depthwise: one input channel per group" if plan.layer.groups > 1 else "one input channel"
    return None
