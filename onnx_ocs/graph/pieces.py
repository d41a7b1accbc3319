"""A graph cut into pieces that run one after the other, each on what those before it have left."""

from collections.abc import Iterable, Iterator, Mapping

import onnx
from onnx import helper

from onnx_ocs.graph.model import Model, bodies


class Pieces:
    """The nodes of the main graph that some tensors take, in their order; constants go where they are read.

    A cut is the number of nodes before it.

    Args:
        outputs: the tensors.
    """

    def __init__(self, model: Model, outputs: Iterable[str]) -> None:
        graph = model.proto.graph
        self._model = model
        self._held = {name: node for node in graph.node if node.op_type == "Constant" for name in node.output}
        self.nodes, self.ordered = _taken(graph, set(outputs))
        constants = {tensor.name for tensor in graph.initializer} | set(self._held)
        constants |= {tensor.values.name for tensor in graph.sparse_initializer}
        self._made = {value.name: 0 for value in graph.input if value.name not in constants}
        self._made |= {name: place + 1 for place, node in enumerate(self.nodes) for name in node.output if name}
        self._last = {name: place for place, node in enumerate(self.nodes) for name in _read(node)}

    def place(self, output: str) -> int | None:
        """The cut in front of the node that makes a tensor; None where none of the main graph does."""
        made = self._made.get(output, 0)
        return made - 1 if made else None

    def reaches(self, tensor: str, cut: int) -> bool:
        """Whether a tensor is there, and not a constant, once the nodes before a cut have run."""
        return tensor in self._made and self._made[tensor] <= cut

    def live(self, cut: int) -> list[str]:
        """The tensors that nodes behind a cut read and none of them makes."""
        return [name for name, made in self._made.items() if made <= cut <= self._last.get(name, -1)]

    def between(
        self,
        first: int,
        last: int,
        types: Mapping[str, int],
        nodes: Iterable[onnx.NodeProto],
        constants: Iterable[onnx.TensorProto] = (),
    ) -> Model:
        """A model of ``nodes``, which stand for those between two cuts; its outputs are what they leave.

        Args:
            types: element types of what is live in front of them; in front of all they are those of the source.
            constants: that the nodes read besides those of the source.
        """
        source = self._model.proto
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        graph = proto.graph
        for name in ("node", "initializer", "input", "output", "value_info"):
            graph.ClearField(name)
        run = list(nodes)
        read = {name for node in run for name in _read(node)}
        graph.node.extend(node for node in source.graph.node if node.op_type == "Constant" and read & set(node.output))
        graph.node.extend(run)
        graph.initializer.extend(tensor for tensor in source.graph.initializer if tensor.name in read)
        graph.initializer.extend(constants)
        if first:
            graph.input.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in types.items())
        else:
            graph.input.extend(value for value in source.graph.input if value.name in self._made)
        made = [name for name in self.live(last) if self._made[name] > first] or run[-1].output[:1]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
        return self._model.sharing(proto)


def _taken(graph: onnx.GraphProto, outputs: set[str]) -> tuple[list[onnx.NodeProto], bool]:
    """The nodes but for constants that tensors take, and whether each stands behind those that make what it reads."""
    kept: list[onnx.NodeProto] = []
    ordered, behind = True, set[str]()
    for node in reversed(graph.node):
        behind.update(name for name in node.output if name)
        ordered = ordered and behind.isdisjoint(_read(node))
        if not outputs.isdisjoint(node.output):
            outputs.update(_read(node))
            if node.op_type != "Constant":
                kept.append(node)
    return kept[::-1], ordered


def with_constants(node: onnx.NodeProto, inputs: dict[int, str], added: str | None) -> list[onnx.NodeProto]:
    """The node with other constants for some of its inputs, and one that is added to its output."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    for index, name in inputs.items():
        made.input[index] = name
    if added is None:
        return [made]
    bare = f"onnx_ocs.bare.{node.output[0]}"
    made.output[0] = bare
    return [made, helper.make_node("Add", [bare, added], [node.output[0]])]


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, and those that bodies in it use, of which some may be their own."""
    yield from node.input
    for body in bodies(node):
        for inner in body.node:
            yield from _read(inner)
        yield from (value.name for value in body.output)
