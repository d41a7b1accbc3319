"""Which input channels of each layer's weight are split, and into how many copies."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.graph.streams import Stream
from onnx_ocs.numerics.cost import Room, room
from onnx_ocs.numerics.split import (
    SplitPlan,
    arranged,
    copies_per_block,
    copies_per_row,
    copies_per_tensor,
    in_blocks,
    joined,
    matching,
    plan_splits,
)
from onnx_ocs.numerics.weights import channel_peaks, choose_splits, no_split
from onnx_ocs.passes.base import LayerPlan, Widened, Work, unsplit


@dataclass(frozen=True)
class PlanSplits:
    """``ceil(ratio * C)`` more channels for each layer, one at a time (Zhao et al., Sections 3.2, 3.4).

    With ``multiples`` the number of channels is rounded up to one of them, by real splits. Layers of one stream, and
    with ``shared`` those that read one tensor, split the same channels: each counts by the share of its own range.
    """

    name: ClassVar[str] = "plan-splits"

    ratio: float = 0.02
    policy: str = "even"
    stored: bool = True  # weights that stay float are not split for their own sake
    multiples: tuple[int, ...] = ()  # of channels, the best first
    most: float = 0.25  # of the channels, that the multiples may add
    shared: bool = False
    whole_blocks: bool = False  # copies are as many as fill whole blocks

    def apply(self, work: Work) -> list[LayerPlan]:
        plans = [plan if plan.declined else self._unsplit(work, plan) for plan in work.plans]
        open_ = [place for place, plan in enumerate(plans) if not plan.declined and self._is_open(plan)]
        for group in _groups([plans[place] for place in open_], self.shared):
            places = [open_[at] for at in group]
            for place, plan in zip(places, self._visit(work, [plans[place] for place in places]), strict=True):
                plans[place] = plan
        return self._widened(work, plans)

    def _is_open(self, plan: LayerPlan) -> bool:
        """Whether channels are split, or at least those of its data where it is made."""
        return plan.reason is None or (plan.stream is not None and bool(plan.data_splits))

    def _unsplit(self, work: Work, plan: LayerPlan) -> LayerPlan:
        weight = work.values(plan)
        reason = unsplit(plan, self.ratio) if self.stored else "its weights stay float (--bits none)"
        if reason is None and plan.stream is None and not channel_peaks(weight, plan.axes).any():
            reason = "all its weights are zero"
        return replace(plan, reason=reason, splits=no_split(weight, plan.axes))

    def _visit(self, work: Work, plans: list[LayerPlan]) -> list[LayerPlan]:
        first = plans[0]
        stream, layer = first.stream, first.layer
        channels = stream.channels if stream else layer.channels // layer.groups
        copied = 0 if first.activation is None else first.activation.extra // layer.groups
        block = next((plan.block for plan in plans if plan.block is not None), None)
        chosen = self._room(channels, copied, block)
        if not chosen.extra and not (stream and first.data_splits):
            return [replace(plan, reason=chosen.reason, room=chosen, stream=None) for plan in plans]
        if len(plans) == 1 and stream is None and block is None:
            peaks = channel_peaks(work.values(first), first.axes)
            splits = choose_splits(peaks, chosen.extra, first.per_channel, self.policy, first.axes.groups_on_input)
            return [replace(first, splits=splits, room=chosen)]
        if stream is not None and first.data_splits:
            return self._shared_out(work, plans, stream, chosen)
        copies = self._copies(work, plans, channels, chosen.extra, block)
        if stream is None:
            split = plan_splits(copies, self.policy)
            split = split if block is None else in_blocks(split, block)
            return [replace(plan, splits=(split,), room=chosen) for plan in plans]
        work.widened.append(Widened(stream, stream.sources(copies)))
        return [replace(plan, splits=(self._arranged(work, plan, copies),), room=chosen) for plan in plans]

    def _shared_out(self, work: Work, plans: list[LayerPlan], stream: Stream, chosen: Room) -> list[LayerPlan]:
        """Copies that are shares of the data, which all ``plans`` read, and of them again copies for the weights."""
        name, data = plans[0].layer.data.name, joined(list(plans[0].data_splits))
        ids = stream.ids[name]
        copies = self._copies(work, plans, len(data.source), chosen.extra, None)
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

    def _room(self, channels: int, copied: int, block: int | None) -> Room:
        if block is None or not self.whole_blocks:
            return room(self.ratio, channels, copied, self.multiples, self.most)
        chosen = room(self.ratio, channels, copied, (block,), self.most)
        if (channels + chosen.extra) % block == 0:
            return chosen
        return Room(0, 1, f"a block of {block} copies is too many for {channels} channels (--max-expand)")

    def _arranged(self, work: Work, plan: LayerPlan, copies: NDArray[np.int64]) -> SplitPlan:
        widened, name = work.widened[-1], plan.layer.data.name
        return arranged(plan_splits(copies[widened.stream.ids[name]], self.policy), widened.sources[name])

    def _copies(
        self, work: Work, plans: list[LayerPlan], channels: int, extra: int, block: int | None
    ) -> NDArray[np.int64]:
        """How often each channel is to stand, for several layers that read it."""
        rows = [self._rows(work, plan, channels) for plan in plans]
        if len(rows) > 1:
            rows = [peaks / max(np.sqrt(np.square(peaks.max(axis=1)).sum()), np.finfo(float).tiny) for peaks in rows]
        joint = np.concatenate(rows)
        if block is not None:
            return copies_per_block(joint, extra, block, self.policy)
        if any(plan.per_channel for plan in plans):
            return copies_per_row(joint, extra, self.policy)
        return copies_per_tensor(joint.max(axis=0), extra, self.policy)

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
