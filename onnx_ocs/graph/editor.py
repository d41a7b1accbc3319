"""The few edits that passes make, on an onnx-graphsurgeon graph that is patched back into the source's proto.

onnx-graphsurgeon is the editor: it holds the links between nodes and builds and exports what is new. What no edit
touched keeps the bytes of the source, because :meth:`Editor.commit` rewrites only the graphs that were edited, and in
them only the nodes and constants that are new, rewired, or gone. (An export by onnx-graphsurgeon 0.6.1 alone drops
metadata, documentation, denotations and several kinds of attributes.)
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_ocs.graph.model import Model, graphs, opset_of

G_LOGGER.severity = G_LOGGER.CRITICAL  # what it would say, the report says

CONSTANTS_ARE_NOT_INPUTS = 4
"""The first IR version whose initializers need not be listed as graph inputs."""


@dataclass(eq=False)
class Scope:
    """One graph of a model: the main graph, a body of If / Loop / Scan, or a model-local function."""

    graph: gs.Graph | gs.Function
    proto: onnx.GraphProto | onnx.FunctionProto
    path: str  # for messages and names; empty for the main graph
    opset: int
    parent: "Scope | None" = None
    owner: gs.Node | None = None  # the node of ``parent`` that this graph is a body of
    sources: dict[int, tuple[gs.Node, onnx.NodeProto]] = field(default_factory=dict)  # by id of the node
    added: list[onnx.TensorProto] = field(default_factory=list)  # constants
    dropped: set[str] = field(default_factory=set)  # constants of the source that nothing reads any more

    @property
    def is_function(self) -> bool:
        return isinstance(self.graph, gs.Function)

    @property
    def constants(self) -> list[onnx.TensorProto]:
        """The initializers of the source."""
        return [] if isinstance(self.proto, onnx.FunctionProto) else list(self.proto.initializer)

    def holds(self, tensor: gs.Tensor) -> bool:
        """Whether this very graph has ``tensor`` as an initializer, also an added one, or makes it by a node of the
        source."""
        if isinstance(tensor, gs.Constant):
            return any(held.name == tensor.name for held in (*self.constants, *self.added))
        return any(id(node) in self.sources for node in tensor.inputs)

    @property
    def hides_outer_names(self) -> bool:
        """Whether a constant here has the name of an outer value, which onnx-graphsurgeon 0.6.1 takes for the same."""
        here = {tensor.name for tensor in self.constants}
        outer = self.parent
        while outer is not None:
            if not here.isdisjoint(_names(outer.proto)):
                return True
            outer = outer.parent
        return False

    def within(self, home: "Scope", node: gs.Node) -> gs.Node:
        """The node of ``home`` that holds ``node`` of this graph, however deeply; ``node`` itself if at home."""
        scope = self
        while scope is not home:
            assert scope.owner is not None
            assert scope.parent is not None
            node, scope = scope.owner, scope.parent
        return node


class Editor:
    """Owner of every new node, constant and name."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model.proto)
        self.scopes: list[Scope] = []
        self.lost_inputs: list[str] = []  # inputs whose default value was a weight that is gone
        self._names: set[str] = set()
        self._made: dict[tuple[Any, ...], Any] = {}  # what layers share, by what they asked for
        graph = gs.import_onnx(self.proto)
        self._enter(Scope(graph, self.proto.graph, "", model.opset()))
        for function, proto in zip(graph.functions, self.proto.functions, strict=True):
            opset = opset_of(proto.opset_import) if proto.opset_import else model.opset()
            self._enter(Scope(function, proto, f"{proto.domain}::{proto.name}/", opset))
        self._results = {name for scope in self.scopes for name in _results(scope.proto)}

    @property
    def ranks(self) -> dict[str, int]:
        """The number of dimensions of each value of the source for which shape inference finds it."""
        return {name: len(shape) for name, shape in self.shapes.items()}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The dimensions of each value of the source for which shape inference finds their number; none if free."""
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model.proto)
        except Exception:  # of several kinds, by where in the C++ code it fails
            inferred = self.model.proto
        return {
            value.name: tuple(
                dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim
            )
            for graph in graphs(inferred.graph)
            for value in (*graph.input, *graph.output, *graph.value_info)
            if value.type.tensor_type.HasField("shape")
        }

    def _enter(self, scope: Scope) -> None:
        self.scopes.append(scope)
        self._names |= _names(scope.proto)
        for node, source in zip(scope.graph.nodes, scope.proto.node, strict=True):
            self._names.add(source.name)
            scope.sources[id(node)] = (node, source)
            for attribute in source.attribute:
                inner = node.attrs.get(attribute.name)
                if isinstance(inner, gs.Graph):
                    path = f"{scope.path}{source.name or source.op_type}/{attribute.name}/"
                    self._enter(Scope(inner, attribute.g, path, scope.opset, scope, node))

    def unique(self, name: str) -> str:
        """``name``, or ``name`` with a number where it is taken."""
        candidate, number = name, 0
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate

    def constant(
        self, scope: Scope, name: str, values: NDArray[Any] | None = None, *, tensor: onnx.TensorProto | None = None
    ) -> gs.Tensor:
        """A new constant in ``scope``: ``values``, or a finished ``tensor`` (made by ``Model.tensor``), renamed."""
        name = self.unique(name)
        if tensor is None:
            assert values is not None
            kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            tensor = self.model.tensor(name, kind, values.shape, np.ascontiguousarray(values).tobytes())
        tensor.name = name
        if scope.is_function:  # which has no initializers
            output = gs.Variable(name)
            value = gs.Constant("", _Finished(tensor))
            scope.graph.nodes.insert(
                0, gs.Node("Constant", self.unique(f"{name}_Constant"), {"value": value}, [], [output])
            )
            return output
        scope.added.append(tensor)
        return gs.Constant(name, _Finished(tensor))

    def node(
        self, scope: Scope, op: str, inputs: list[gs.Tensor], name: str, before: gs.Node | None, **attributes: Any
    ) -> gs.Variable:
        """A new node in ``scope`` ahead of the node ``before``, or behind all; its output."""
        output = gs.Variable(self.unique(name))
        made = gs.Node(op, name=self.unique(f"{name}_{op}"), attrs=attributes, inputs=inputs, outputs=[output])
        nodes = scope.graph.nodes
        nodes.insert(next((i for i, node in enumerate(nodes) if node is before), len(nodes)), made)
        return output

    def once(self, scope: Scope, make: Callable[[], Any], *asked: Any) -> Any:
        """What ``make`` makes; the same again for all layers of one graph that ask for the same."""
        key = (id(scope), *asked)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def gather(
        self,
        scope: Scope,
        data: gs.Tensor,
        source: NDArray[np.int64],
        axis: int,
        before: gs.Node,
        gain: NDArray[np.floating] | None = None,
        offset: NDArray[np.floating] | None = None,
    ) -> gs.Variable:
        """``data`` with its channels ``source`` along ``axis``, each multiplied by its ``gain`` and then moved by its
        ``offset`` if these are given.

        Layers of one graph that ask for the same channels of the same tensor share the nodes.

        Args:
            data: (..., C, ...), channels along ``axis``, which is counted from the end.
            source: (C + k,), which channel each expanded channel copies.
            gain, offset: (C + k,), in the type of ``data``.
        """

        def make() -> gs.Variable:
            indices = self.constant(scope, f"{data.name}.channels", source)
            made = self.node(scope, "Gather", [data, indices], f"{data.name}.split", before, axis=axis)
            for op, name, values in (("Mul", "gain", gain), ("Add", "offset", offset)):
                if values is not None:
                    shaped = values.reshape(-1, *[1] * (-1 - axis))
                    factor = self.constant(scope, f"{data.name}.{name}", shaped)
                    made = self.node(scope, op, [made, factor], f"{data.name}.{op.lower()}", before)
            return made

        parts = (b"" if values is None else values.tobytes() for values in (gain, offset))
        return self.once(scope, make, "gather", data.name, axis, source.tobytes(), *parts)

    def intercept(self, tensor: gs.Tensor) -> gs.Variable:
        """A new value that the maker of ``tensor`` makes in its place, so that another node can make ``tensor``."""
        (maker,) = tensor.inputs
        maker.name = maker.name or tensor.name
        value = gs.Variable(self.unique(f"{tensor.name}.float"))
        maker.outputs[[out is tensor for out in maker.outputs].index(True)] = value
        return value

    def set_number(self, scope: Scope, node: gs.Node, name: str, value: float) -> None:
        """Give an attribute of a node of the source another value of its type."""
        node.attrs[name] = value
        source = scope.sources[id(node)][1]
        (attribute,) = [item for item in source.attribute if item.name == name]
        if attribute.type == onnx.AttributeProto.FLOAT:
            attribute.f = value
        else:
            attribute.i = int(value)

    def drop_attribute(self, scope: Scope, node: gs.Node, name: str) -> None:
        """Take an attribute from a node of the source."""
        del node.attrs[name]
        _keep(scope.sources[id(node)][1].attribute, lambda attribute: attribute.name != name)

    def forget_shapes(self, scope: Scope, names: set[str]) -> None:
        """Leave the shapes of these values to inference, since they are no longer those of the source."""
        _keep(scope.proto.value_info, lambda value: value.name not in names)

    def after(self, scope: Scope, node: gs.Node) -> gs.Node | None:
        """The node that stands behind ``node``; none if it is the last."""
        nodes = scope.graph.nodes
        at = next(i for i, other in enumerate(nodes) if other is node) + 1
        return nodes[at] if at < len(nodes) else None

    def cast(self, scope: Scope, data: gs.Tensor, held: int, wanted: int, before: gs.Node | None) -> gs.Tensor:
        """``data`` of element type ``held`` as ``wanted``."""
        if held == wanted:
            return data
        return self.node(scope, "Cast", [data], f"{data.name}.cast", before, to=wanted)

    def rewire(self, node: gs.Node, index: int, tensor: gs.Tensor) -> None:
        """Let input ``index`` of ``node``, its next one perhaps, read ``tensor``; what nothing reads any more goes."""
        if index == len(node.inputs):
            node.inputs.append(tensor)
            return
        old = node.inputs[index]
        node.inputs[index] = tensor
        self._drop(old)

    def is_result(self, tensor: gs.Tensor) -> bool:
        """Whether ``tensor`` is an output of its graph."""
        return tensor.name in self._results

    def bypass(self, scope: Scope, maker: gs.Node, node: gs.Node) -> None:
        """Let ``maker`` make the output of ``node``, the only one that is read, and remove ``node``.

        A node without a name gets that of the output it made so far, by which it is known.
        """
        maker.name = maker.name or maker.outputs[0].name
        (output,) = [tensor for tensor in node.outputs if tensor.name and (tensor.outputs or self.is_result(tensor))]
        inputs = list(node.inputs)
        node.inputs.clear()
        node.outputs.clear()
        maker.outputs[0] = output
        scope.graph.nodes[:] = [other for other in scope.graph.nodes if other is not node]
        for tensor in inputs:
            self._drop(tensor)

    def _drop(self, tensor: gs.Tensor) -> None:
        """Remove the constant, or the node that makes ``tensor``, if nothing reads it; and so on upwards."""
        if tensor.outputs or tensor.name in self._results or not tensor.name:
            return
        if isinstance(tensor, gs.Constant):
            for scope in self.scopes:
                before = len(scope.added)
                scope.added = [made for made in scope.added if made.name != tensor.name]
                if len(scope.added) == before and tensor.name in {t.name for t in scope.constants}:
                    scope.dropped.add(tensor.name)
            return
        for node in list(tensor.inputs):
            if any(out.outputs or out.name in self._results for out in node.outputs):
                continue
            scope = next(scope for scope in self.scopes if any(other is node for other in scope.graph.nodes))
            scope.graph.nodes[:] = [other for other in scope.graph.nodes if other is not node]
            inputs = list(node.inputs)
            node.inputs.clear()
            for source in inputs:
                self._drop(source)

    def raise_ir(self, version: int) -> None:
        """Let the model be of IR ``version`` at least."""
        self.proto.ir_version = max(self.proto.ir_version, version)

    def commit(self) -> None:
        """Put the edits into the model's proto; without edits it stays as it was, byte by byte."""
        grown = any(scope.added for scope in self.scopes)
        if self.proto.ir_version >= CONSTANTS_ARE_NOT_INPUTS:
            gone = self.scopes[0].dropped
            self.lost_inputs += [value.name for value in self.proto.graph.input if value.name in gone]
        for scope in self.scopes:
            _patch(scope)
        if grown and self.proto.ir_version < CONSTANTS_ARE_NOT_INPUTS:
            # below IR 4 every constant is listed as an input and is one all the same
            self.proto.ir_version = CONSTANTS_ARE_NOT_INPUTS
            names = {tensor.name for tensor in self.proto.graph.initializer}
            _keep(self.proto.graph.input, lambda value: value.name not in names)
        self.model.proto = self.proto


def _patch(scope: Scope) -> None:
    """Write the nodes and constants of ``scope`` into its proto, where they differ."""
    proto, nodes = scope.proto, scope.graph.nodes
    before = {name for node in proto.node for name in node.output}
    wanted = {id(node) for node in nodes}
    for index, key in reversed(list(enumerate(scope.sources))):
        if key not in wanted:
            del proto.node[index]
    for index, node in enumerate(nodes):
        if id(node) not in scope.sources:
            proto.node.insert(index, OnnxExporter.export_node(node))
    for node, source in zip(nodes, proto.node, strict=True):
        if node.name != source.name:
            source.name = node.name
        for tensors, names in ((node.inputs, source.input), (node.outputs, source.output)):
            if [tensor.name for tensor in tensors] != list(names):
                names[:] = [tensor.name for tensor in tensors]
    gone = before - {name for node in proto.node for name in node.output}
    _keep(proto.value_info, lambda value: value.name not in gone)
    scope.sources = {id(node): (node, source) for node, source in zip(nodes, proto.node, strict=True)}
    if isinstance(proto, onnx.GraphProto):
        _keep(proto.initializer, lambda tensor: tensor.name not in scope.dropped)
        _keep(proto.input, lambda value: value.name not in scope.dropped)
        _keep(proto.value_info, lambda value: value.name not in scope.dropped)
        proto.initializer.extend(scope.added)
    scope.added.clear()
    scope.dropped.clear()


def _keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    """Reduce a repeated field to the items that are wanted."""
    for index in reversed(range(len(items))):
        if not wanted(items[index]):
            del items[index]


def _results(proto: onnx.GraphProto | onnx.FunctionProto) -> Iterator[str]:
    for output in proto.output:
        yield output if isinstance(output, str) else output.name


def _names(proto: onnx.GraphProto | onnx.FunctionProto) -> set[str]:
    """The names of all values of one graph."""
    made = {name for node in proto.node for name in node.output}
    if isinstance(proto, onnx.FunctionProto):
        return made | set(proto.input)
    constants = {tensor.name for tensor in proto.initializer} | {
        sparse.values.name for sparse in proto.sparse_initializer
    }
    return made | constants | {value.name for value in proto.input}


class _Finished(LazyValues):  # type: ignore[misc]
    """The values of a constant whose proto is finished, 4-bit types included."""

    def __init__(self, tensor: onnx.TensorProto) -> None:
        self.tensor = tensor
        self.shape = list(tensor.dims)
        self.dtype = tensor.data_type
