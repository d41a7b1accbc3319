"""Which tensors are quantized where they are made, so that whole chains of operators run on integers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from onnx_ocs.graph.editor import Editor, Scope
from onnx_ocs.graph.layers import Place, Weight
from onnx_ocs.graph.observe import Observed
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan, Reader, TensorPlan
from onnx_ocs.targets.base import Target


@dataclass(frozen=True)
class PlaceTensors:
    """The data of each layer, and what integer kernels before and behind it read and write, as the target has it.

    An operator other than a layer runs on integers if one of its inputs comes from an integer kernel and an integer
    kernel reads its output: between float operators it would gain nothing and lose accuracy. Only the main graph's
    float32 tensors are placed, since calibration sees no others.
    """

    name: ClassVar[str] = "place-tensors"

    target: Target
    bits: int | None = 8  # of the data of layers

    def apply(self, work: Work) -> list[LayerPlan]:
        if self.target.outputs or self.target.skips:
            work.tensors = _Placement(self, work).tensors()
        return work.plans


class _Groups:
    """Names that belong together."""

    def __init__(self) -> None:
        self._of: dict[str, list[str]] = {}

    def join(self, first: str, second: str) -> None:
        one, other = (self._of.setdefault(name, [name]) for name in (first, second))
        if one is not other:
            one += other
            self._of |= dict.fromkeys(other, one)

    def name(self, one: str) -> str:
        """Equal for names that belong together."""
        return min(self._of.get(one, [one]))


class _Placement:
    """The tensors of one graph under way."""

    def __init__(self, options: PlaceTensors, work: Work) -> None:
        self._target, self._bits = options.target, options.bits
        self._editor: Editor = work.editor
        self._main: Scope = work.editor.scopes[0]
        self._plans = {id(plan.layer.node): plan for plan in work.plans if self._takes_part(plan)}
        self._float: set[str] = {
            plan.layer.data.name for plan in self._plans.values() if plan.data_splits and plan.stream is None
        }  # is split in front of a layer, so that it must not be rounded before
        if self._target.outputs:  # or else the runtime quantizes the weight of a layer that was left float by itself
            self._float |= {
                plan.layer.data.name for plan in work.plans if plan.declined and plan.layer.scope is self._main
            }
        self._float |= {  # between quantized tensors the runtime would take a kernel that does something else
            node.inputs[0].name
            for node in self._main.graph.nodes
            if node.op in self._target.computes and not self._target.does_compute(node)
        }
        self._tensors: dict[str, gs.Tensor] = {}
        self._readers: dict[str, list[Reader]] = {}
        self._made: set[str] = set()  # by integer kernels
        self._together, self._better = _Groups(), _Groups()
        self._absorbed: dict[str, str] = {}

    def _takes_part(self, plan: LayerPlan) -> bool:
        return (
            not plan.declined
            and plan.float_data is None
            and plan.layer.scope is self._main
            and plan.layer.weight.data_type == onnx.TensorProto.FLOAT
            and plan.observed is not None
        )

    def tensors(self) -> list[TensorPlan]:
        nodes = list(self._main.graph.nodes)
        for node in nodes:
            if (plan := self._plans.get(id(node))) is not None:
                if plan.layer.data.name not in self._float:
                    self._want(plan.layer.data)
                if node.op in self._target.outputs:
                    self._make(self._end(node.outputs[0]))
        for node in self._active(nodes):
            for index in self._places(node):
                self._want(node.inputs[index], (node, index))
            out = self._end(node.outputs[0])
            self._make(out)
            for index in self._places(node):
                if self._target.does_move(node):
                    self._together.join(node.inputs[index].name, out.name)
                if self._keeps_scale(node):
                    self._better.join(node.inputs[index].name, out.name)
        order = {id(node): place for place, node in enumerate(nodes)}
        for node in nodes:
            if node.op in self._target.skips and (place := self._skip(node, order)) is not None:
                self._want(node.inputs[place], (node, place))
        found = {plan.observed.name: plan.observed for plan in self._plans.values() if plan.observed is not None}
        return [
            TensorPlan(
                tensor,
                found.get(name, Observed(name, -1, 1)),
                name in self._made,
                tuple(self._readers.get(name, ())),
                self._together.name(name),
                self._better.name(name),
                self._absorbed.get(name),
                self._is_moved(tensor),
            )
            for name, tensor in self._tensors.items()
        ]

    def _skip(self, node: gs.Node, order: dict[int, int]) -> int | None:
        """Of a sum of two values the one that was there first, if a layer makes the other, which then adds it."""
        places = [Place(node, self._main, self._editor).weight(index) for index in range(len(node.inputs))]
        if len(places) != 2 or any(isinstance(found, Weight) for found in places):
            return None
        at = [order.get(id(tensor.inputs[0]), -1) if tensor.inputs else -1 for tensor in node.inputs]
        last = at.index(max(at))
        if at[last] < 0 or id(node.inputs[last].inputs[0]) not in self._plans:
            return None
        return None if node.inputs[1 - last].name in self._float else 1 - last

    def _is_moved(self, tensor: gs.Tensor) -> bool:
        """Whether all that reads a tensor moves its values into others of the same scale."""
        if self._editor.is_result(tensor) or not tensor.outputs:
            return False
        return all(
            self._keeps_scale(node) and any(reader is node for reader, _ in self._readers.get(tensor.name, ()))
            for node in tensor.outputs
        )

    def _keeps_scale(self, node: gs.Node) -> bool:
        """Whether the output of ``node`` has the scale of its inputs, or had better have."""
        return self._target.does_move(node) or node.op in self._target.one_scale

    def _active(self, nodes: list[gs.Node]) -> list[gs.Node]:
        """The other operators that run on integers, in the order of the graph."""
        made, forward = set(self._made), []
        for node in nodes:
            if self._has_kernel(node) and any(node.inputs[index].name in made for index in self._places(node)):
                out = self._end(node.outputs[0])
                if out.name not in self._float:
                    made.add(out.name)
                    forward.append(node)
        wanted, kept = set(self._tensors) - self._made | self._read_by_layers(), []
        for node in reversed(forward):
            if self._end(node.outputs[0]).name in wanted:
                kept.append(node)
                wanted.update(node.inputs[index].name for index in self._places(node))
        return kept[::-1]

    def _read_by_layers(self) -> set[str]:
        return {plan.layer.data.name for plan in self._plans.values()} - self._float

    def _has_kernel(self, node: gs.Node) -> bool:
        target = self._target
        if id(node) in self._plans or node.domain not in (None, "", "ai.onnx"):
            return False
        if not (target.does_compute(node) or target.does_move(node)) or len(node.outputs) != 1:
            return False
        return all(
            not isinstance(Place(node, self._main, self._editor).weight(index), Weight)
            and node.inputs[index].name not in self._float
            for index in self._places(node)
        )

    def _places(self, node: gs.Node) -> Iterator[int]:
        """The inputs of a node that hold data."""
        return iter(range(len(node.inputs)) if node.op in self._target.computes else range(1))

    def _end(self, tensor: gs.Tensor) -> gs.Tensor:
        """What is quantized in place of ``tensor``: behind an activation function that vanishes in the quantization."""
        while len(tensor.outputs) == 1 and not self._editor.is_result(tensor) and self._is_absorbed(tensor.outputs[0]):
            name = tensor.outputs[0].op
            tensor = tensor.outputs[0].outputs[0]
            self._absorbed[tensor.name] = name
        return tensor

    def _is_absorbed(self, node: gs.Node) -> bool:
        if node.op not in self._target.absorbed or node.domain not in (None, "", "ai.onnx"):
            return False
        read = any(plan.layer.data is node.outputs[0] for plan in self._plans.values())
        if node.op == "Clip" and read and self._bits != 8:  # the integer type goes on beyond its bounds
            return False
        place = Place(node, self._main, self._editor)
        return all(isinstance(place.weight(index), Weight) for index in range(1, len(node.inputs)))

    def _want(self, tensor: gs.Tensor, reader: Reader | None = None) -> None:
        self._tensors[tensor.name] = tensor
        if reader is not None:
            self._readers.setdefault(tensor.name, []).append(reader)

    def _make(self, tensor: gs.Tensor) -> None:
        if tensor.name not in self._float:
            self._tensors[tensor.name] = tensor
            self._made.add(tensor.name)
