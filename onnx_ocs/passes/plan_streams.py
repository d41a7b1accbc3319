"""Which layers get their copies from the layers before them, and which from a Gather."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from onnx_ocs.graph.streams import Stream, stream_of
from onnx_ocs.numerics.cost import Cost, Rates, room
from onnx_ocs.numerics.split import extra_channels
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan, ratio_of, unsplit
from onnx_ocs.prices import Prices


@dataclass(frozen=True)
class PlanStreams:
    """Where all that reads a stream of channels is a layer that can take a channel twice, its makers may make it twice.

    ``auto`` chooses by cost (:mod:`onnx_ocs.numerics.cost`): a Gather moves the whole data; a channel that is made
    twice is computed twice, in all layers that make the stream and all operators that it passes.
    """

    name: ClassVar[str] = "plan-streams"

    ratio: float = 0.02  # of the weights
    act_ratio: float = 0.0  # of the data
    fold: str = "auto"
    aware: bool = True  # copies of data are moved by offsets
    multiples: tuple[int, ...] = ()  # of channels, the best first
    most: float = 0.25  # of the channels, that the multiples may add
    rates: Rates = field(default_factory=Rates)

    def apply(self, work: Work) -> list[LayerPlan]:
        prices = Prices(work.editor, self.rates)
        plans = [self._priced(prices, plan) if self._may_split(plan) else plan for plan in work.plans]
        return plans if self.fold == "never" else self._with_streams(work, prices, plans)

    def _priced(self, prices: Prices, plan: LayerPlan) -> LayerPlan:
        """With what copies of its own cost, and reading them."""
        groups = plan.layer.groups
        extra = groups * self._extra(plan.channels // groups, ratio_of(plan, self.ratio))
        if not extra or plan.data_splits:
            return plan
        costs = {"gather": prices.gather(plan.layer, extra), "reading": prices.wider(plan.layer, extra)}
        return replace(plan, costs=costs)

    def _extra(self, channels: int, ratio: float) -> int:
        return room(extra_channels(ratio, channels), channels, 0, self.multiples, self.most).extra

    def _with_streams(self, work: Work, prices: Prices, plans: list[LayerPlan]) -> list[LayerPlan]:
        nodes = [id(plan.layer.node) for plan in plans]
        layers = {
            id(plan.layer.node): plan.layer
            for plan in plans
            if self._may_widen(plan) and nodes.count(id(plan.layer.node)) == 1
        }
        splittable = {id(plan.layer.node) for plan in plans if self._may_split(plan)}
        found: dict[int, LayerPlan] = {}
        for plan in plans:
            key = id(plan.layer.node)
            if key not in splittable or key not in layers or key in found:
                continue
            stream = stream_of(work.editor, plan.layer, layers)
            if isinstance(stream, Stream):
                stream = self._usable(stream, splittable)
            if isinstance(stream, str):
                found[key] = replace(plan, copied=stream)
                continue
            readers = {id(layer.node) for layer in stream.readers}
            together = [other for other in plans if id(other.layer.node) in readers]
            refused = self._refused(together, stream)
            if refused is not None:
                found |= {id(other.layer.node): replace(other, copied=refused) for other in together}
                continue
            costs = self._costs(prices, stream, max(self._ratio(other) for other in together))
            gathers = self.fold == "auto" and costs["fold"].total >= costs["gathers"].total
            chosen: dict[str, Any] = {"copied": "a Gather is estimated to cost less"} if gathers else {"stream": stream}
            for other in together:
                known = other.costs and {**other.costs, **costs}
                found[id(other.layer.node)] = replace(other, costs=known, **chosen)
        return [found.get(id(plan.layer.node), plan) for plan in plans]

    def _may_split(self, plan: LayerPlan) -> bool:
        return not plan.declined and plan.block is None and unsplit(plan, self._ratio(plan)) is None

    def _ratio(self, plan: LayerPlan) -> float:
        return max(ratio_of(plan, self.ratio), self.act_ratio)

    def _may_widen(self, plan: LayerPlan) -> bool:
        """Not where the type or the blocks of the weight were chosen by the number of its outputs."""
        two_bits = plan.storage == 2 and plan.layer.node.op in ("MatMul", "Gemm")
        return not plan.declined and plan.block is None and not two_bits

    def _usable(self, stream: Stream, splittable: set[int]) -> Stream | str:
        for reader in stream.readers:
            if id(reader.node) not in splittable:
                return f"{reader.node.op} {reader.name!r} reads the same channels and is not split"
        return stream

    def _refused(self, plans: list[LayerPlan], stream: Stream) -> str | None:
        """Why copies that are shares of the data cannot be made where the data is made."""
        if not any(plan.data_splits for plan in plans):
            return None
        if self.aware:
            return "copies of its data are moved by offsets, which pass no operator (--split naive has none)"
        if not stream.homogeneous:
            return "shares of its data do not pass all operators in front of it"
        name = plans[0].layer.data.name
        if any(plan.layer.data.name != name or not plan.data_splits for plan in plans):
            return "the layers of its stream read different tensors, with splits of their own"
        if len(stream.ids[name]) != stream.channels:
            return "its features are several of each channel"
        return None

    def _costs(self, prices: Prices, stream: Stream, ratio: float) -> dict[str, Cost]:
        """Of both ways, for all readers of a stream together."""
        extra = self._extra(stream.channels, ratio)
        tensors = {layer.data.name: layer for layer in stream.readers}
        gathers = sum((prices.gather(layer, extra) for layer in tensors.values()), Cost())
        return {"gathers": gathers, "fold": prices.fold(stream, extra)}
