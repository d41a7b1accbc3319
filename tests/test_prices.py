"""What layers cost, against a count of what each output value is a sum of."""

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Layer, find_layers
from onnx_ocs.graph.model import Model
from onnx_ocs.numerics.cost import DEPTHWISE, NODE, Rates
from onnx_ocs.prices import Prices

# node, shape of the data, shape of the weight, shape of the output, products for one sample
ROWS = {
    "Conv": ("Conv <strides=[2,2]> (x, w)", "N,4,9,9", "6,4,3,3", "N,6,4,4", 6 * 4 * 4 * 4 * 9),
    "Conv grouped": ("Conv <group=2> (x, w)", "N,4,9,9", "6,2,3,3", "N,6,7,7", 6 * 7 * 7 * 2 * 9),
    "Conv depthwise": ("Conv <group=4> (x, w)", "N,4,9,9", "4,1,3,3", "N,4,7,7", DEPTHWISE * 4 * 7 * 7 * 9),
    "ConvTranspose": ("ConvTranspose <strides=[2,2]> (x, w)", "N,4,5,5", "4,6,2,2", "N,6,10,10", 5 * 5 * 4 * 6 * 4),
    "ConvTranspose grouped": (
        "ConvTranspose <group=2, strides=[2,2]> (x, w)", "N,4,5,5", "4,3,2,2", "N,6,10,10", 5 * 5 * 4 * 3 * 4),
    "Gemm": ("Gemm(x, w)", "N,4", "4,6", "N,6", 4 * 6),
    "MatMul": ("MatMul(x, w)", "N,3,4", "4,6", "N,3,6", 3 * 4 * 6),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_layer_costs_its_products_and_what_it_reads_and_writes(name):
    node, data, weight, output, products = ROWS[name]
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[{data}] x, float[{weight}] w) => (float[{output}] y)'
    made = onnx.parser.parse_model(f"{text} {{ y = {node} }}")
    shape = [int(size) for size in weight.split(",")]
    made.graph.input.pop()
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), "w"))
    editor = Editor(Model.load(made))
    (layer,) = find_layers(editor)
    assert isinstance(layer, Layer)
    cost = Prices(editor, Rates(itemsize=1)).layer(layer)
    written = np.prod([int(size) for size in output.split(",")[1:]])
    assert cost.macs == products
    assert cost.bytes == (np.prod(shape) + written) / 2 + NODE
