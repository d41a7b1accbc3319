"""Which layers get their copies from the layers before them, and which from a Gather."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from onnx_ocs.graph.layers import Layer
from onnx_ocs.graph.streams import Stream, stream_of
from onnx_ocs.numerics.cost import DEPTHWISE, Cost, columns, room
from onnx_ocs.numerics.split import extra_channels
from onnx_ocs.passes.base import LayerPlan, Work, ratio_of, unsplit


@dataclass(frozen=True)
class PlanStreams:
    """Where all that reads a stream of channels is a layer that can take a channel twice, its makers may make it twice.

    ``auto`` chooses by cost (:mod:`onnx_ocs.numerics.cost`): a Gather moves the whole data; a channel that is made
    twice is computed twice, in all layers that make the stream and all operators that it passes.
    """

    name: ClassVar[str] = "plan-streams"

    ratio: float = 0.02
    fold: str = "auto"
    aware: bool = True  # copies of data are moved by offsets
    multiples: tuple[int, ...] = ()  # of channels, the best first
    most: float = 0.25  # of the channels, that the multiples may add
    itemsize: int = 4  # bytes of a value as it is gathered
    moves: int = 1  # how often a Gather moves the data, with what the runtime puts around it
    block: int = 1  # output channels that a kernel computes at once

    def apply(self, work: Work) -> list[LayerPlan]:
        if self.fold == "never" or not self.ratio:
            return work.plans
        nodes = [id(plan.layer.node) for plan in work.plans]
        layers = {
            id(plan.layer.node): plan.layer
            for plan in work.plans
            if self._may_widen(plan) and nodes.count(id(plan.layer.node)) == 1
        }
        splittable = {id(plan.layer.node) for plan in work.plans if self._may_split(plan)}
        found: dict[int, LayerPlan] = {}
        for plan in work.plans:
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
            together = [other for other in work.plans if id(other.layer.node) in readers]
            refused = self._refused(together, stream)
            chosen = self._choice(work, stream) if refused is None else {"copied": refused}
            found |= {id(other.layer.node): replace(other, **chosen) for other in together}
        return [found.get(id(plan.layer.node), plan) for plan in work.plans]

    def _may_split(self, plan: LayerPlan) -> bool:
        return not plan.declined and plan.block is None and unsplit(plan, ratio_of(plan, self.ratio)) is None

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

    def _choice(self, work: Work, stream: Stream) -> dict[str, Any]:
        """What the plans of all readers of a stream say of it."""
        exact = extra_channels(self.ratio, stream.channels)
        extra = room(exact, stream.channels, 0, self.multiples, self.most).extra
        gather, fold = self._gather(work, stream, extra), self._fold(work, stream, extra)
        costs = {"gather": gather, "fold": fold}
        if self.fold == "auto" and fold.total >= gather.total:
            return {"copied": "a Gather is estimated to cost less", "costs": costs}
        return {"stream": stream, "costs": costs}

    def _gather(self, work: Work, stream: Stream, extra: int) -> Cost:
        """Each tensor that a reader reads is moved."""
        tensors = {layer.data.name: layer for layer in stream.readers}
        return sum((self._moved(work, name, layer, extra) for name, layer in tensors.items()), Cost())

    def _moved(self, work: Work, name: str, layer: Layer, extra: int) -> Cost:
        values = _positions(work, name, layer.data_axis) * (layer.channels + extra)
        return Cost(bytes=float(values * self.itemsize * self.moves))

    def _fold(self, work: Work, stream: Stream, extra: int) -> Cost:
        """Each maker computes its share of the copies, in whole blocks, and each operator moves them."""
        share = extra / stream.channels
        made = Cost()
        for layer in (*stream.makers, *stream.depthwise):
            outputs = len(stream.ids[layer.node.outputs[0].name])
            before, after = (columns(number, self.block) for number in (outputs, math.ceil(outputs * (1 + share))))
            weight = DEPTHWISE if layer.groups > 1 else 1.0
            made += Cost(macs=weight * _products(work, layer) * (after - before) / outputs)
        for node, passage in stream.passages:
            name = node.outputs[0].name
            values = _positions(work, name, passage.output) * len(stream.ids[name])
            made += Cost(bytes=share * values * self.itemsize)
        return made


def _positions(work: Work, name: str, axis: int) -> int:
    """Values of each channel in one sample, as far as the shape is known."""
    shape = work.editor.shapes.get(name, ())
    return math.prod(size or 1 for place, size in enumerate(shape) if place and place - len(shape) != axis)


def _products(work: Work, layer: Layer) -> int:
    """Multiply-accumulates of one sample."""
    out = work.editor.shapes.get(layer.node.outputs[0].name, ())
    inner = layer.node.op in ("Gemm", "MatMul")
    positions = math.prod(size or 1 for size in (out[1:-1] if inner else out[2:]))
    return math.prod(layer.weight.shape) * positions
