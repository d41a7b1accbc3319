"""Which input channels of each layer's weight are split, and into how many copies."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.numerics.cost import Room, room
from onnx_ocs.numerics.split import (
    SplitPlan,
    arranged,
    copies_per_block,
    copies_per_row,
    copies_per_tensor,
    in_blocks,
    plan_splits,
)
from onnx_ocs.numerics.weights import channel_peaks, choose_splits, no_split
from onnx_ocs.passes.base import LayerPlan, Work, unsplit
from onnx_ocs.passes.plan_streams import groups_of


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
        open_ = [place for place, plan in enumerate(plans) if not plan.declined and plan.reason is None]
        for group in groups_of([plans[place] for place in open_], self.shared):
            places = [open_[at] for at in group]
            for place, plan in zip(places, self._visit(work, [plans[place] for place in places]), strict=True):
                plans[place] = plan
        return self._widened(work, plans)

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
        if not chosen.extra:
            return [replace(plan, reason=chosen.reason, room=chosen, stream=None) for plan in plans]
        if len(plans) == 1 and stream is None and block is None:
            peaks = channel_peaks(work.values(first), first.axes)
            splits = choose_splits(peaks, chosen.extra, first.per_channel, self.policy, first.axes.groups_on_input)
            return [replace(first, splits=splits, room=chosen)]
        copies = self._copies(work, plans, channels, chosen.extra, block)
        if stream is None:
            split = plan_splits(copies, self.policy)
            split = split if block is None else in_blocks(split, block)
            return [replace(plan, splits=(split,), room=chosen) for plan in plans]
        work.widened.append((stream, stream.sources(copies)))
        return [replace(plan, splits=(self._arranged(work, plan, copies),), room=chosen) for plan in plans]

    def _room(self, channels: int, copied: int, block: int | None) -> Room:
        if block is None or not self.whole_blocks:
            return room(self.ratio, channels, copied, self.multiples, self.most)
        chosen = room(self.ratio, channels, copied, (block,), self.most)
        if (channels + chosen.extra) % block == 0:
            return chosen
        return Room(0, 1, f"a block of {block} copies is too many for {channels} channels (--max-expand)")

    def _arranged(self, work: Work, plan: LayerPlan, copies: NDArray[np.int64]) -> SplitPlan:
        stream, sources = work.widened[-1]
        name = plan.layer.data.name
        return arranged(plan_splits(copies[stream.ids[name]], self.policy), sources[name])

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
        if plan.stream is None:
            return peaks.astype(np.float64)
        rows = np.zeros((channels, len(peaks)))
        np.maximum.at(rows, plan.stream.ids[plan.layer.data.name], peaks.T)
        return rows.T

    def _widened(self, work: Work, plans: list[LayerPlan]) -> list[LayerPlan]:
        """The plans of the layers that make channels twice."""
        outputs = {
            id(layer.node): sources[layer.node.outputs[0].name]
            for stream, sources in work.widened
            for layer in (*stream.makers, *stream.depthwise)
        }
        made = []
        for plan in plans:
            source = outputs.get(id(plan.layer.node))
            made.append(plan if source is None or plan.declined else replace(plan, outputs=source))
        return made
