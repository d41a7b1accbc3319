"""What a graph tells of values that may be fed to it."""

import onnx_graphsurgeon as gs

from onnx_ocs.graph.editor import Editor

PASSED_ON = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Expand", "Clip"}


def table_lengths(editor: Editor) -> dict[str, int]:
    """For each graph input that indexes a constant table by Gather: the length of the shortest such table."""
    lengths = {}
    for source in editor.scopes[0].graph.inputs:
        found: list[int] = []
        _follow(source, found, depth=8)
        if found:
            lengths[source.name] = min(found)
    return lengths


def _follow(tensor: gs.Tensor, found: list[int], depth: int) -> None:
    for node in tensor.outputs if depth else ():
        if node.op in ("Gather", "GatherElements") and len(node.inputs) > 1 and node.inputs[1] is tensor:
            table = node.inputs[0]
            shape = list(table.shape or ()) if isinstance(table, gs.Constant) else []
            if shape:
                found.append(int(shape[node.attrs.get("axis", 0)]))
        elif node.op in PASSED_ON and node.inputs[0] is tensor:
            _follow(node.outputs[0], found, depth - 1)
