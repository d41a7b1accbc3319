"""What passes work on, and what they know of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Layer
from onnx_ocs.graph.observe import Observed
from onnx_ocs.graph.predicted import NOTHING, Predicted
from onnx_ocs.numerics.assumed import SHARE, Assumed, tempered
from onnx_ocs.numerics.batchnorm import clipped_normal
from onnx_ocs.numerics.drift import Drift, making_up
from onnx_ocs.numerics.integers import Rounded, Task, mean_output, mean_shift, read_weight
from onnx_ocs.numerics.moments import Moments
from onnx_ocs.numerics.planning import Inputs, assumed
from onnx_ocs.numerics.rounding import BY_MOMENTS, Factor, factorized
from onnx_ocs.numerics.split import along, joined, recombine
from onnx_ocs.numerics.statistics import Statistics
from onnx_ocs.numerics.weights import by_group, grouped, ungrouped
from onnx_ocs.plans import LayerPlan, TensorPlan, Widened

GATHERED = {"hessian", "synthetic"}
"""Roundings by second moments that samples tell."""


class StoredMoments(Protocol):
    """Moments that are read when they are used."""

    def load(self) -> Moments: ...


class Follower(Protocol):
    """The drift of the data of layers, which are asked for in their order, by what each makes."""

    def drift(self, output: str) -> Drift | None: ...

    def follow(
        self, output: str, weight_input: int, weight: NDArray[Any], data_type: int, added: NDArray[Any] | None
    ) -> None: ...


@dataclass
class Work:
    """One run: the graph that is edited and what is decided so far."""

    editor: Editor
    plans: list[LayerPlan]
    tensors: list[TensorPlan] = field(default_factory=list)
    widened: list[Widened] = field(default_factory=list)
    statistics: Mapping[str, Statistics] = field(default_factory=dict)  # of the data of layers, by Observed.key
    stored: Mapping[str, StoredMoments] = field(default_factory=dict)  # by Contraction.key
    synthetic: Mapping[str, StoredMoments] = field(default_factory=dict)  # of made-up samples, to round weights by
    share: float = SHARE  # of what is assumed, in those
    follower: Follower | None = None  # where errors are followed through the layers
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

    def moments(self, plan: LayerPlan, synthetic: bool = False) -> Moments | None:
        """Of the data that :meth:`values` are multiplied by; None where nothing was gathered."""
        among = self.synthetic if synthetic else self.stored
        found = among.get(plan.contraction.key) if plan.contraction is not None else None
        if found is None or (plan.static_extra != plan.extra and (plan.stream is not None or plan.layer.groups > 1)):
            return None
        moments = found.load()
        if plan.layer.groups > 1 and plan.outputs is not None:  # of a depthwise layer whose channels are made twice
            return moments.taken(plan.outputs)
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

    def task(self, plan: LayerPlan, drift: Drift | None = None) -> Task:
        """How the weight of ``plan`` is rounded: by the moments of its data, as the layers in front have left it where
        their ``drift`` is known. Those of the last layer asked for are kept."""
        if plan.rounding not in BY_MOMENTS:
            return Task(plan.rounding)
        of = id(plan.layer) if plan.rounding == "assumed" or plan.contraction is None else plan.contraction.key
        key = (plan.rounding, of, plan.corrected, plan.outputs is None, plan.static_extra - plan.extra, drift is None)
        if self._task is None or self._task[0] != key:
            found = self._assumed(plan) if plan.rounding == "assumed" else self._factor(plan, drift)
            self._task = key, Task(plan.rounding, found)
        return self._task[1]

    def _factor(self, plan: LayerPlan, drift: Drift | None) -> Factor:
        """Of the second moments that were gathered."""
        synthetic = plan.rounding == "synthetic"
        moments = self.moments(plan, synthetic) if drift is None else drift.found
        assert moments is not None
        if synthetic:
            moments = tempered(moments, self._known(plan), plan.kernel, self.share)
        return factorized(moments.about(plan.corrected))

    def _assumed(self, plan: LayerPlan) -> Assumed:
        """The second moments that the data of each group is taken to have, or of all where they are alike."""
        found = self.inputs(plan)
        found = found.centered if plan.corrected else found
        mean, variance = (part.reshape(len(part), -1, math.prod(plan.kernel)) for part in (found.mean, found.variance))
        if (mean == mean[0]).all() and (variance == variance[0]).all():
            mean, variance = mean[:1], variance[:1]
        return Assumed(mean, variance, plan.kernel)

    def drift(self, plan: LayerPlan) -> Drift | None:
        """What the layers in front do to the data that :meth:`values` are multiplied by; None where nothing tells.

        Layers are asked for in their order, each once it is known how those before it are rounded.
        """
        if self.follower is None or plan.rounding not in GATHERED:
            return None
        found = self.follower.drift(plan.layer.node.outputs[0].name)
        foreign = plan.rounding == "synthetic" and self._known(plan) is not None  # what is known is of real data
        if found is None or foreign or plan.static_extra != plan.extra:
            return None
        return found.taken(plan.outputs) if plan.layer.groups > 1 and plan.outputs is not None else found

    def making_up(self, plan: LayerPlan, weight: NDArray[Any], drift: Drift) -> NDArray[np.float64]:
        """The weight that makes up for the drift of its data."""
        cross, second = drift.about(plan.corrected), drift.found.about(plan.corrected)
        rows = grouped(weight.astype(np.float64), plan.axes)
        made = making_up(rows.reshape(*rows.shape[:2], -1), cross, second, plan.rounding == "synthetic")
        return ungrouped(made.reshape(rows.shape), plan.axes, weight.shape)

    def shift(self, plan: LayerPlan, made: Rounded, drift: Drift | None = None) -> NDArray[np.float64]:
        """(outputs,), what the bias of a layer makes up for: the mean of what its weight loses, and its data."""
        mean = self.mean(plan)
        assert mean is not None
        shift = mean_shift(self.values(plan), made.integers, plan.splits, plan.axes, made.step, mean)
        if drift is not None and plan.rounding == "hessian" and self.is_real:
            read = read_weight(made.integers, plan.splits, plan.axes, made.step)
            shift += mean_output(read, plan.axes, drift.lost)
        return shift

    def followed(self, plan: LayerPlan, drift: Drift | None) -> LayerPlan:
        """The plan, with the shift of its bias, once those behind it are told how it is rounded.

        Layers whose channels are shares of others are taken to be as the float model has them.
        """
        assert self.follower is not None
        assert plan.rounded is not None
        made, layer, axes = plan.rounded, plan.layer, plan.axes
        plan = replace(plan, shift=self.shift(plan, made, drift)) if plan.corrected else plan
        if plan.contraction is None or plan.shares is not None or len(plan.data_splits) > 1:
            return plan
        weight, added = read_weight(made.integers, plan.splits, axes, made.step), plan.shift
        if plan.data_splits:
            (split,) = plan.data_splits
            weight = recombine(weight * along(split.gain, axes.input, weight.ndim), split, axes.input)
        if plan.outputs is not None:
            assert layer.output_axis is not None
            first = np.unique(plan.outputs, return_index=True)[1]
            weight = weight.take(first, layer.output_axis)
            added = None if added is None else added[first]
        if added is not None and layer.kernel:
            added = along(added, 0, weight.ndim - 1)
        output, kind = layer.node.outputs[0].name, layer.weight.data_type
        self.follower.follow(output, layer.weight_input, weight, kind, added)
        return plan

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
