"""What passes work on, and what they say."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.contraction import Contraction
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Layer
from onnx_ocs.graph.observe import Observed
from onnx_ocs.graph.predicted import NOTHING, Predicted
from onnx_ocs.graph.qdq import DataGrid
from onnx_ocs.graph.streams import Ids, Stream
from onnx_ocs.numerics.assumed import Assumed
from onnx_ocs.numerics.batchnorm import clipped_normal
from onnx_ocs.numerics.cost import Cost, Room
from onnx_ocs.numerics.grid import Grid
from onnx_ocs.numerics.integers import Task
from onnx_ocs.numerics.moments import Moments
from onnx_ocs.numerics.planning import Inputs, assumed
from onnx_ocs.numerics.rounding import BY_MOMENTS, Factor, factorized
from onnx_ocs.numerics.split import SplitPlan, along, joined
from onnx_ocs.numerics.statistics import Statistics
from onnx_ocs.numerics.weights import Axes, by_group

FIRST_LAYER_CHANNELS = 4
"""A layer that reads a graph input with so few channels is a first layer: RGB, RGBA, grey, raw features."""

FIRST_LAYER_BITS = 8
"""Of first layers, under ``--first int8``."""

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


class StoredMoments(Protocol):
    """Moments that are read when they are used."""

    def load(self) -> Moments: ...


@dataclass
class Work:
    """One run: the graph that is edited and what is decided so far."""

    editor: Editor
    plans: list[LayerPlan]
    tensors: list[TensorPlan] = field(default_factory=list)
    widened: list[Widened] = field(default_factory=list)
    statistics: Mapping[str, Statistics] = field(default_factory=dict)  # of the data of layers, by Observed.key
    stored: Mapping[str, StoredMoments] = field(default_factory=dict)  # by Contraction.key
    predicted: Mapping[str, Predicted] = field(default_factory=dict)  # by tensor
    is_real: bool = True  # what statistics and moments are of, and not made up
    _task: tuple[Any, Task] | None = None

    def values(self, plan: LayerPlan) -> NDArray[Any]:
        """The weight of a layer as the source has it, once for each copy of a channel of its data and its output."""
        values = plan.layer.weight.read(self.editor.model)
        if plan.outputs is not None:
            assert plan.layer.output_axis is not None
            values = values.take(plan.outputs, plan.layer.output_axis)
            if plan.shares is not None:
                values = (values * along(plan.shares, plan.layer.output_axis, values.ndim)).astype(values.dtype)
        if plan.static_extra == plan.extra:
            return values
        axis = plan.axes.input
        return by_group(lambda split, part: part.take(split.source, axis), plan.data_splits, plan.axes, values)

    def moments(self, plan: LayerPlan) -> Moments | None:
        """Of the data that :meth:`values` are multiplied by; None where nothing was gathered."""
        found = self.stored.get(plan.contraction.key) if plan.contraction is not None else None
        if found is None or (plan.static_extra != plan.extra and (plan.stream is not None or plan.layer.groups > 1)):
            return None
        moments = found.load()
        if plan.layer.groups > 1 and plan.outputs is not None:  # of a depthwise layer whose channels are made twice
            second = None if moments.second is None else moments.second[plan.outputs]
            return Moments(moments.mean[plan.outputs], second)
        if plan.static_extra != plan.extra:
            assert plan.contraction is not None
            split = joined(list(plan.data_splits))
            return moments.expanded(split.source, split.gain, plan.contraction.inputs // plan.channels)
        return moments

    def mean(self, plan: LayerPlan) -> NDArray[np.float64] | None:
        """(groups, n), E of the data that :meth:`values` are multiplied by; None where it is not known."""
        if self.is_real and (moments := self.moments(plan)) is not None:
            return moments.mean
        known = self._known(plan)
        return None if known is None else known.mean

    def inputs(self, plan: LayerPlan) -> Inputs:
        """Mean and variance of that data; where they are not known, assumed from its sign."""
        moments, known = self.moments(plan), self._known(plan)
        if moments is not None and moments.second is not None:
            square = np.stack([second.diagonal() for second in moments.second])
            return Inputs(moments.mean, np.maximum(square - np.square(moments.mean), 0))
        if known is not None:
            return known
        axes, shape = plan.axes, self.values(plan).shape
        inputs = shape[axes.input] // (axes.groups if axes.groups_on_input else 1)
        inner = math.prod(shape) // (shape[axes.input] * shape[axes.output or 0]) if axes.kernel else 1
        sign = self.predicted.get(plan.contraction.tensor) if plan.contraction is not None else None
        return assumed(axes.groups, inputs * inner, sign is not None and sign.nonnegative)

    def _known(self, plan: LayerPlan) -> Inputs | None:
        """By the statistics of each channel, or by the graph."""
        if plan.contraction is None or (plan.static_extra != plan.extra and plan.stream is not None):
            return None
        found = self.statistics.get(plan.observed.key) if plan.observed is not None and self.is_real else None
        if found is not None:
            mean, variance = found.mean, np.maximum(found.square - np.square(found.mean), 0)
        elif (foreseen := self._foreseen(plan)) is not None:
            mean, variance = foreseen
        else:
            return None
        if plan.data_splits:
            split = joined(list(plan.data_splits))
            mean, variance = mean[split.source] * split.gain, variance[split.source] * np.square(split.gain)
        if plan.layer.groups > 1 and plan.outputs is not None:
            mean, variance = mean[plan.outputs], variance[plan.outputs]
        inner = plan.contraction.inputs * plan.layer.groups // plan.channels
        groups = plan.axes.groups
        return Inputs(*(np.repeat(values, inner).reshape(groups, -1) for values in (mean, variance)))

    def _foreseen(self, plan: LayerPlan) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """(C,) each, mean and variance by the normalizations in front of the layer."""
        assert plan.contraction is not None
        layer, tensor = plan.layer, plan.contraction.tensor
        known = self.predicted.get(tensor)
        rank = len(layer.weight.shape) if layer.node.op != "MatMul" else self.editor.ranks.get(tensor)
        if known is None or not known.parts or rank is None or layer.data_axis != 1 - rank:
            return None
        parts = [clipped_normal(part.mean, part.variance, part.low, part.high) for part in known.parts]
        mean, variance = (np.concatenate(values) for values in zip(*parts, strict=True))
        return (mean, variance) if len(mean) == plan.channels else None

    def task(self, plan: LayerPlan) -> Task:
        """How the weight of ``plan`` is rounded; the moments of the last layer asked for are kept."""
        if plan.rounding not in BY_MOMENTS:
            return Task(plan.rounding)
        of = plan.contraction.key if plan.rounding == "hessian" and plan.contraction is not None else id(plan.layer)
        key = (of, plan.corrected, plan.outputs is None, plan.static_extra - plan.extra)
        if self._task is None or self._task[0] != key:
            found = self._assumed(plan) if plan.rounding == "assumed" else self._factor(plan)
            self._task = key, Task(plan.rounding, found)
        return self._task[1]

    def _factor(self, plan: LayerPlan) -> Factor:
        """Of the second moments that were gathered."""
        moments = self.moments(plan)
        assert moments is not None
        return factorized(moments.about(plan.corrected))

    def _assumed(self, plan: LayerPlan) -> Assumed:
        """The second moments that the data of each group is taken to have, or of all where they are alike."""
        found = self.inputs(plan)
        found = found.centered if plan.corrected else found
        mean, variance = (part.reshape(len(part), -1, math.prod(plan.kernel)) for part in (found.mean, found.variance))
        if (mean == mean[0]).all() and (variance == variance[0]).all():
            mean, variance = mean[:1], variance[:1]
        return Assumed(mean, variance, plan.kernel)

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


def is_visible(editor: Editor, layer: Layer) -> bool:
    """Whether the data of a layer is a value of the main graph."""
    main, data = editor.scopes[0], layer.data
    return main.holds(data) or any(data is source for source in main.graph.inputs)


def observed(editor: Editor, layer: Layer) -> Observed | None:
    """The data of a layer as calibration observes it; None where it is not a value of the main graph."""
    if not is_visible(editor, layer):
        return None
    shape = editor.shapes.get(layer.data.name)
    if shape is None and layer.node.op in ("Conv", "ConvTranspose", "Gemm"):
        shape = (None,) * len(layer.weight.shape)
    return Observed(layer.data.name, layer.data_axis, layer.channels, shape, layer.weight.data_type)


def signed(tensor: Observed, known: Mapping[str, Predicted]) -> Observed:
    """With the sign that the graph gives it."""
    return replace(tensor, nonnegative=known.get(tensor.name, NOTHING).nonnegative)
