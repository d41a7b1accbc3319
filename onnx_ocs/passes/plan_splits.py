"""Which input channels of each layer's weight are split, and into how many copies."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.graph.layers import Layer
from onnx_ocs.graph.streams import Stream
from onnx_ocs.numerics.cost import Room, room
from onnx_ocs.numerics.grid import Grid
from onnx_ocs.numerics.planning import Inputs, Joint, allocated, noise_to_signal, picks_together
from onnx_ocs.numerics.rounding import BY_MOMENTS
from onnx_ocs.numerics.split import (
    Picks,
    SplitPlan,
    arranged,
    extra_channels,
    filled,
    in_blocks,
    joined,
    matching,
    picks_per_block,
    plan_splits,
)
from onnx_ocs.numerics.weights import by_output, channel_peaks, group_plans, grouped, no_split, picks_of
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import DENSE, NARROW, LayerPlan, Widened, ratio_of, unsplit

ALLOCATIONS = ("auto", "uniform", "knapsack", "sensitivity")
"""Which layers get copies: each the same share, or those where they lower the range or the error of outputs most.

``auto`` is ``uniform``, but with :data:`NARROW` bits or fewer convolutions keep half of their copies, rounded down, and
the others go by ``sensitivity``.
"""

MOST = 4
"""Times as many copies as ``uniform`` gives it, that a layer gets at most by another allocation."""


@dataclass(frozen=True)
class PlanSplits:
    """``ceil(ratio * C)`` more channels for each layer, one at a time (Zhao et al., Sections 3.2, 3.4).

    With ``multiples`` the number of channels is rounded up to one of them, by real splits. Layers of one stream, and
    with ``shared`` those that read one tensor, split the same channels: each counts by the share of its own range, or
    of its own objective.
    """

    name: ClassVar[str] = "plan-splits"

    ratio: float = 0.02
    policy: str = "even"
    stored: bool = True  # weights that stay float are not split for their own sake
    multiples: tuple[int, ...] = ()  # of channels, the best first
    most: float = 0.25  # of the channels, that the multiples may add
    shared: bool = False
    whole_blocks: bool = False  # copies are as many as fill whole blocks
    objective: str | None = None  # of planning.OBJECTIVES, for thresholds chosen with the splits; none: by magnitude
    allocation: str = "auto"  # of ALLOCATIONS

    def apply(self, work: Work) -> list[LayerPlan]:
        plans = [plan if plan.declined else self._unsplit(work, plan) for plan in work.plans]
        open_ = [place for place, plan in enumerate(plans) if not plan.declined and self._is_open(plan)]
        groups = [[open_[at] for at in group] for group in _groups([plans[place] for place in open_], self.shared)]
        chosen = [_Choice.of([plans[place] for place in places], self.ratio) for places in groups]
        chosen = self._allocated(work, chosen)
        for places, choice in zip(groups, chosen, strict=True):
            for place, plan in zip(places, self._visit(work, choice), strict=True):
                plans[place] = plan
        plans = self._widened(work, plans)
        return plans if self.objective is None else [self._planned(work, plan) for plan in plans]

    def _is_open(self, plan: LayerPlan) -> bool:
        """Whether channels are split, or at least those of its data where it is made."""
        return plan.reason is None or (plan.stream is not None and bool(plan.data_splits))

    def _unsplit(self, work: Work, plan: LayerPlan) -> LayerPlan:
        weight = work.values(plan)
        reason = plan.reason or unsplit(plan, ratio_of(plan, self.ratio))
        reason = reason if self.stored else "its weights stay float (--bits none)"
        if reason is None and plan.stream is None and not channel_peaks(weight, plan.axes).any():
            reason = "all its weights are zero"
        return replace(plan, reason=reason, splits=no_split(weight, plan.axes))

    def _allocated(self, work: Work, chosen: list["_Choice"]) -> list["_Choice"]:
        """As many copies in all as by one ratio for all layers, or nearly, but elsewhere."""
        free = [choice for choice in chosen if choice.extra and self._is_free(choice)]
        least = [choice.extra // 2 if self.allocation == "auto" else 0 for choice in free]
        curves = [self._left(work, choice)[some:] for choice, some in zip(free, least, strict=True)]
        storage = {id(plan.layer.node): plan.storage for plan in work.plans if not plan.declined}
        costs = [choice.bytes(storage) for choice in free]
        budget = sum((choice.extra - some) * cost for choice, some, cost in zip(free, least, costs, strict=True))
        more = allocated(curves, costs, budget)
        extras = {id(choice): some + added for choice, some, added in zip(free, least, more, strict=True)}
        return [replace(choice, extra=extras.get(id(choice), choice.extra)) for choice in chosen]

    def _is_free(self, choice: "_Choice") -> bool:
        """Whether copies of these layers may go to others, and those of others to them."""
        if any("ratio" in plan.given for plan in choice.plans):
            return False
        if self.allocation == "auto":
            return all(plan.layer.node.op not in DENSE and (plan.bits or 8) <= NARROW for plan in choice.plans)
        return self.allocation != "uniform"

    def _left(self, work: Work, choice: "_Choice") -> NDArray[np.float64]:
        """What 0, 1, 2, ... copies leave of the reward of an allocation."""
        picks = self._picks(work, choice, min(choice.channels, MOST * choice.extra))
        left: NDArray[np.float64] = np.sum([each.left for each in picks], axis=0)
        left /= max(sum(each.left[0] for each in picks), 1e-300)
        if self.allocation == "knapsack":
            return len(choice.plans) * np.sqrt(left)
        return sum(self._noise(work, plan) for plan in choice.plans) * left

    def _noise(self, work: Work, plan: LayerPlan) -> float:
        assert plan.bits is not None
        rows = grouped(work.values(plan), plan.axes)
        return noise_to_signal(rows, self._inputs(work, plan).square, Grid(plan.bits).levels, not plan.per_channel)

    def _inputs(self, work: Work, plan: LayerPlan) -> Inputs:
        found = work.inputs(plan)
        if self.objective == "weight":
            return Inputs(np.zeros_like(found.mean), np.ones_like(found.variance))
        return found.centered if plan.corrected else found

    def _visit(self, work: Work, choice: "_Choice") -> list[LayerPlan]:
        plans, first, stream, block = choice.plans, choice.first, choice.first.stream, choice.block
        chosen = self._room(choice)
        if not chosen.extra and not (stream and first.data_splits):
            reason = chosen.reason if choice.extra else f"copies save more elsewhere (--allocate {self.allocation})"
            return [replace(plan, reason=reason, room=chosen, stream=None) for plan in plans]
        if stream is not None and first.data_splits:
            return self._shared_out(work, choice, stream, chosen)
        parts = 1 if stream is None else int(stream.parts.max()) + 1
        more = 2 * min(self.multiples, default=0) * parts if parts > 1 else 0
        picks = self._picks(work, choice, chosen.extra + more)
        copies = [each.copies(chosen.extra) for each in picks]
        if stream is not None and more and (wide := self._filled(picks[0], choice, stream)) is not None:
            copies, chosen = [wide], Room(int(wide.sum()) - len(wide), min(self.multiples))
        if stream is None:
            splits = group_plans(copies, self.policy, first.axes.groups_on_input)
            splits = splits if block is None else (in_blocks(splits[0], block),)
            return [replace(plan, splits=splits, room=chosen) for plan in plans]
        work.widened.append(Widened(stream, stream.sources(copies[0])))
        return [replace(plan, splits=(self._arranged(work, plan, copies[0]),), room=chosen) for plan in plans]

    def _filled(self, picks: Picks, choice: "_Choice", stream: Stream) -> NDArray[np.int64] | None:
        """Copies with which each layer that makes them has the multiple of channels; None if those are too many."""
        multiple = min(self.multiples)
        copies = filled(picks, choice.extra, stream.parts, multiple)
        whole = int(copies.sum())
        fits = whole - choice.channels <= max(self.most * choice.channels, choice.extra)
        return copies if fits and whole % multiple == 0 else None

    def _shared_out(self, work: Work, choice: "_Choice", stream: Stream, chosen: Room) -> list[LayerPlan]:
        """Copies that are shares of the data, which all plans read, and of them again copies for the weights."""
        plans = choice.plans
        name, data = plans[0].layer.data.name, joined(list(plans[0].data_splits))
        ids = stream.ids[name]
        copies = self._magnitudes(work, choice, len(data.source), chosen.extra).copies()
        split = plan_splits(copies, self.policy)
        whole = np.zeros(stream.channels, np.int64)
        np.add.at(whole, ids[data.source[split.source]], 1)
        sources = stream.sources(whole)
        order = matching(data.source[split.source], sources[name])
        made = SplitPlan(split.source[order], split.denominator[order], split.phase[order])
        gain = data.gain[made.source]
        gains = {}
        for layer in (*stream.makers, *stream.depthwise):
            tensor = layer.node.outputs[0].name
            held, wanted = ids[sources[name]], stream.ids[tensor][sources[tensor]]
            here = np.flatnonzero(np.isin(held, wanted))  # a maker of some of the channels
            gains[tensor] = gain[here[matching(held[here], wanted)]]
        work.widened.append(Widened(stream, sources, gains))
        return [replace(plan, splits=(made,), room=chosen) for plan in plans]

    def _room(self, choice: "_Choice") -> Room:
        channels, copied, block = choice.channels, choice.copied, choice.block
        if block is None or not self.whole_blocks:
            return room(choice.extra, channels, copied, self.multiples, self.most)
        chosen = room(choice.extra, channels, copied, (block,), self.most)
        if (channels + chosen.extra) % block == 0:
            return chosen
        return Room(0, 1, f"a block of {block} copies is too many for {channels} channels (--max-expand)")

    def _arranged(self, work: Work, plan: LayerPlan, copies: NDArray[np.int64]) -> SplitPlan:
        widened, name = work.widened[-1], plan.layer.data.name
        return arranged(plan_splits(copies[widened.stream.ids[name]], self.policy), widened.sources[name])

    def _picks(self, work: Work, choice: "_Choice", extra: int) -> list[Picks]:
        """Which channel gets a copy more, one after the other; for each group of a layer with groups."""
        plans, first, block = choice.plans, choice.first, choice.block
        if self.objective is not None and block is None:
            costs = [self._costs(work, plan, choice) for plan in plans]
            return [picks_together(parts, extra) for parts in zip(*costs, strict=True)]
        if len(plans) == 1 and first.stream is None and block is None:
            peaks = channel_peaks(work.values(first), first.axes)
            return [picks_of(group, extra, first.per_channel, self.policy) for group in peaks]
        return [self._magnitudes(work, choice, choice.channels, extra)]

    def _costs(self, work: Work, plan: LayerPlan, choice: "_Choice | None" = None) -> list[Joint]:
        """For each group of a layer what its thresholds cost; its channels are those of a choice, or its own."""
        assert plan.bits is not None
        inputs, levels, together = self._inputs(work, plan), Grid(plan.bits).levels, not plan.per_channel
        groups = grouped(work.values(plan), plan.axes)
        channels = groups.shape[2]
        ids = np.arange(channels)
        if choice is not None and plan.stream is not None and not plan.data_splits:
            ids, channels = plan.stream.ids[plan.layer.data.name], choice.channels
        return [
            Joint(rows, mean, variance, levels, together, ids, channels, self.policy)
            for rows, mean, variance in zip(groups, inputs.mean, inputs.variance, strict=True)
        ]

    def _planned(self, work: Work, plan: LayerPlan) -> LayerPlan:
        """With the threshold of each output, or of all, that goes with the copies; some roundings find their own."""
        if plan.declined or plan.block is not None or plan.bits is None or plan.rounding in BY_MOMENTS:
            return plan
        groups = plan.axes.groups
        if plan.axes.groups_on_input:
            copies = np.split(np.bincount(plan.splits[0].source), groups)
        else:
            copies = [np.bincount(split.source) for split in plan.splits] * (groups // len(plan.splits))
        parts = self._costs(work, plan)
        for part, some in zip(parts, copies, strict=True):
            part.give(some)
        found = np.stack([part.thresholds for part in parts])
        if not plan.per_channel:
            return replace(plan, planned=found.max())
        assert plan.axes.output is not None
        outputs = plan.layer.weight.shape[plan.axes.output] if plan.outputs is None else len(plan.outputs)
        return replace(plan, planned=by_output(found, plan.axes, outputs).max(axis=1))

    def _magnitudes(self, work: Work, choice: "_Choice", channels: int, extra: int) -> Picks:
        """By the largest weights of several layers that read the same channels."""
        plans = choice.plans
        rows = [self._rows(work, plan, channels) for plan in plans]
        if len(rows) > 1:
            rows = [peaks / max(np.sqrt(np.square(peaks.max(axis=1)).sum()), np.finfo(float).tiny) for peaks in rows]
        joint = np.concatenate(rows)
        if choice.block is not None:
            return picks_per_block(joint, extra, choice.block, self.policy)
        return picks_of(joint, extra, any(plan.per_channel for plan in plans), self.policy)

    def _rows(self, work: Work, plan: LayerPlan, channels: int) -> NDArray[np.float64]:
        """The peaks of each scale of a layer in each channel of the stream or tensor."""
        (peaks,) = channel_peaks(work.values(plan), plan.axes)
        if not plan.per_channel and plan.block is None:
            peaks = peaks.max(axis=0, keepdims=True)
        if plan.stream is None or plan.data_splits:
            return peaks.astype(np.float64)
        rows = np.zeros((channels, len(peaks)))
        np.maximum.at(rows, plan.stream.ids[plan.layer.data.name], peaks.T)
        return rows.T

    def _widened(self, work: Work, plans: list[LayerPlan]) -> list[LayerPlan]:
        """The plans of the layers that make channels twice."""
        found: dict[int, tuple[NDArray[np.int64], NDArray[np.float64] | None]] = {}
        for wide in work.widened:
            for layer in wide.stream.makers:
                found[id(layer.node)] = wide.sources[layer.node.outputs[0].name], wide.gain(layer)
            for layer in wide.stream.depthwise:  # the share is that of its data already
                found[id(layer.node)] = wide.sources[layer.node.outputs[0].name], None
        made = []
        for plan in plans:
            outputs, shares = found.get(id(plan.layer.node), (None, None))
            made.append(plan if outputs is None else replace(plan, outputs=outputs, shares=shares))
        return made


def _size(layer: Layer, storage: int) -> float:
    """Bytes of a weight in integers of ``storage`` bits."""
    return math.prod(layer.weight.shape) * storage / 8


def _groups(plans: list[LayerPlan], shared: bool) -> Iterator[list[int]]:
    """The places of plans whose channels are chosen together: of one stream, or of one tensor."""
    groups: dict[Any, list[int]] = {}
    for place, plan in enumerate(plans):
        layer = plan.layer
        key: Any = ("alone", place)
        if plan.stream is not None:
            key = ("stream", id(plan.stream))
        elif shared and layer.groups == 1 and not plan.data_splits:
            key = ("tensor", id(layer.scope), layer.data.name, layer.data_axis)
        groups.setdefault(key, []).append(place)
    yield from groups.values()


@dataclass(frozen=True, eq=False)
class _Choice:
    """Layers whose channels are chosen together, and how many copies they are to get."""

    plans: list[LayerPlan]
    channels: int  # to choose from: of the stream, or of each group
    copied: int  # that splitting the data adds already
    extra: int

    @classmethod
    def of(cls, plans: list[LayerPlan], ratio: float) -> "_Choice":
        """With the same share of their channels as all layers have."""
        first = plans[0]
        stream, groups = first.stream, first.layer.groups
        channels = stream.channels if stream else first.layer.channels // groups
        copied = 0 if first.activation is None else first.activation.extra // groups
        extra = extra_channels(max(ratio_of(plan, ratio) for plan in plans), channels)
        return cls(plans, channels, copied, extra)

    def bytes(self, storage: Mapping[int, int]) -> float:
        """Of a copy of a channel: in the weights that read it, and in those that make it once more.

        Args:
            storage: bits of a weight by the id of its node; float32 elsewhere.
        """
        read = sum(_size(plan.layer, plan.storage) for plan in self.plans) / self.channels
        if (stream := self.first.stream) is None:
            return read
        makers = (*stream.makers, *stream.depthwise)
        return read + sum(_size(layer, storage.get(id(layer.node), 32)) for layer in makers) / stream.channels

    @property
    def first(self) -> LayerPlan:
        return self.plans[0]

    @property
    def block(self) -> int | None:
        return next((plan.block for plan in self.plans if plan.block is not None), None)
