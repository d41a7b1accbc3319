"""Raise the version of the standard operators: onnx's converter, with what it loses put back."""

import onnx
from onnx import version_converter

from onnx_ocs.graph.model import Model, opset_of


class CannotRaise(Exception):
    """Why onnx's converter cannot raise this model."""


def raise_opset(model: Model, target: int) -> None:
    """Let ``model`` use version ``target`` of the standard operators.

    Nodes that mean the same in both versions keep the bytes of the source; others are those of onnx's converter under
    their old name and with their old metadata. Functions keep their own versions.

    Raises:
        CannotRaise: the converter refuses, or its result does not match the source node by node.
    """
    source = model.proto
    try:
        converted = version_converter.convert_version(_convertible(source), target)
    except Exception as error:  # ConvertError, RuntimeError and others, by where in the C++ code it fails
        raise CannotRaise(str(error).strip().split("\n")[0][:200]) from None
    raised = onnx.ModelProto()
    raised.CopyFrom(source)
    _graft(raised.graph, converted.graph)
    for item in raised.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = target
    if not any(item.domain in ("", "ai.onnx") for item in raised.opset_import):
        raised.opset_import.add(domain="", version=target)
    raised.ir_version = max(
        raised.ir_version, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", target)])
    )
    if source.ir_version < 4 <= raised.ir_version:
        listed = {tensor.name for tensor in raised.graph.initializer}
        kept = [value for value in raised.graph.input if value.name not in listed]
        del raised.graph.input[:]
        raised.graph.input.extend(kept)
    assert opset_of(raised.opset_import) == target
    model.proto = raised


def _convertible(source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which the converter finds all that it looks for."""
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    listed = {value.name for value in copy.graph.input}
    for tensor in copy.graph.initializer:
        if tensor.name not in listed:  # it looks for constants among the inputs where the IR version is below 4
            copy.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    known = {item.domain for item in copy.opset_import}
    for domain in sorted({node.domain for node in copy.graph.node} - known - {"", "ai.onnx"}):
        copy.opset_import.add(domain=domain, version=1)
    del copy.functions[:]
    return copy


def _graft(graph: onnx.GraphProto, converted: onnx.GraphProto) -> None:
    """Put the converter's nodes and new constants into ``graph``; what it left alone stays the source's."""
    sources = {name: node for node in graph.node for name in node.output if name}
    named = {(node.name, node.op_type): node for node in graph.node if node.name}
    nodes = []
    for node in converted.node:
        old = next((sources[name] for name in node.output if name in sources), None)
        if old is None or old.op_type != node.op_type:  # the last of several nodes that take the place of one
            old = named.get((node.name, node.op_type))
        if old is not None and _same(old, node):
            nodes.append(old)
            continue
        made = onnx.NodeProto()
        made.CopyFrom(node)
        if old is not None:
            made.name, made.doc_string = old.name, old.doc_string
            del made.metadata_props[:]
            made.metadata_props.extend(old.metadata_props)
        nodes.append(made)
    made_here = {name for node in nodes for name in node.output}
    missing = {name for name in sources if name not in made_here}
    wanted = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    if missing & wanted:
        raise CannotRaise(f"the converter lost the value {min(missing & wanted)!r}")
    held = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for tensor in converted.initializer if tensor.name not in held)
    del graph.node[:]
    graph.node.extend(nodes)


def _same(old: onnx.NodeProto, new: onnx.NodeProto) -> bool:
    """Whether the converter left a node as it was, apart from what it loses."""
    if (old.op_type, list(old.input), list(old.output)) != (new.op_type, list(new.input), list(new.output)):
        return False
    before = {attribute.name: attribute for attribute in old.attribute}
    after = {attribute.name: attribute for attribute in new.attribute}
    return before.keys() == after.keys() and all(_equal(before[name], after[name]) for name in before)


def _equal(old: onnx.AttributeProto, new: onnx.AttributeProto) -> bool:
    if old.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        return [node.op_type for node in old.g.node] == [node.op_type for node in new.g.node] and all(
            _same(a, b) for a, b in zip(old.g.node, new.g.node, strict=False)
        )
    first, second = onnx.AttributeProto(), onnx.AttributeProto()
    first.CopyFrom(old)
    second.CopyFrom(new)
    first.doc_string = second.doc_string = ""
    return bool(first == second)
