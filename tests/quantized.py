"""Small quantized models as ONNX text, with constants beside them."""

import ml_dtypes
import numpy as np
import onnx
import onnx.parser

HEAD = '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'

CONSTANTS = {
    "s": np.float32(0.02),  # scales
    "t": np.float32(0.03),
    "z": np.int8(0),  # zero points
    "u": np.uint8(0),
    "h": np.uint8(128),
    "w": np.arange(32 * 16 * 9).reshape(32, 16, 3, 3).astype(np.int64) % 121 - 60,  # at most 60: no pair saturates
    "v": np.arange(32 * 16).reshape(32, 16) % 121 - 60,
    "ws": np.full(32, 0.01, np.float32),
    "wz": np.zeros(32, np.int8),
    "b": np.zeros(32, np.float32),
}
CONSTANTS["w"], CONSTANTS["v"] = CONSTANTS["w"].astype(np.int8), CONSTANTS["v"].astype(np.int8)


def int4(values):
    """``values`` in the type of numpy that onnx stores as INT4."""
    return np.asarray(values).astype(ml_dtypes.int4)


def qdq_model(text, opset=21, **constants):
    """The graph of ``text``; names that nothing makes are constants: those given, else those above."""
    model = onnx.parser.parse_model(HEAD.format(opset=opset) + text)
    nodes = list(_nodes(model.graph))
    made = {value.name for value in model.graph.input} | {name for node in nodes for name in node.output}
    read = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
    known = {**CONSTANTS, **constants}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(known[name]), name) for name in read)
    return model


def _nodes(graph):
    """The nodes of a graph and of the bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)
