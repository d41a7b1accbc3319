"""What layers and copies of channels cost on one runtime, for one sample; free dimensions count as one."""

import math
from dataclasses import dataclass

import numpy as np

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Layer
from onnx_ocs.graph.streams import Stream, is_depthwise
from onnx_ocs.numerics.cost import DEPTHWISE, DEPTHWISE_TAIL, NODE, POOL_TAIL, TAIL, Cost, Rates, columns


@dataclass(frozen=True)
class Prices:
    """By the shapes that the graph tells."""

    editor: Editor
    rates: Rates

    def layer(self, layer: Layer) -> Cost:
        """What a layer costs as it is: its products, its weight read, and its output written."""
        values = math.prod(size or 1 for size in self.editor.shapes.get(layer.node.outputs[0].name, ())[1:])
        moved = (math.prod(layer.weight.shape) + values * self.rates.itemsize) / 2
        return Cost(bytes=moved + self._node(layer), macs=self._products(layer))

    def wider(self, layer: Layer, extra: int) -> Cost:
        """What a layer costs more that reads ``extra`` more channels."""
        share = extra / layer.channels
        return Cost(bytes=share * math.prod(layer.weight.shape) / 2, macs=share * self._products(layer))

    def gather(self, layer: Layer, extra: int) -> Cost:
        """All data of a layer is moved, with ``extra`` more channels."""
        values = self._positions(layer.data.name, layer.data_axis) * (layer.channels + extra)
        return Cost(bytes=self.rates.moves * (values * self.rates.itemsize + self._node(layer)))

    def fold(self, stream: Stream, extra: int) -> Cost:
        """Each maker computes its share of ``extra`` copies, in whole blocks, and each operator moves them."""
        multiple, sizes = self.rates.multiple, np.bincount(stream.parts)
        grown = np.ceil(np.ceil(sizes * (1 + extra / stream.channels)) / multiple) * multiple
        more = (grown / sizes)[stream.parts]
        made = Cost()
        for layer in (*stream.makers, *stream.depthwise):
            ids = stream.ids[layer.node.outputs[0].name]
            outputs, after = len(ids), round(more[ids].sum())
            added = columns(after, self.rates.block, multiple) - columns(outputs, self.rates.block, multiple)
            macs = self._products(layer) * added / outputs
            weight = math.prod(layer.weight.shape) * (after / outputs - 1) / 2
            tail = self._tail(outputs, after, DEPTHWISE_TAIL if is_depthwise(layer) else TAIL)
            made += Cost(bytes=weight + tail * self._applied(layer), macs=macs)
        for node, passage in stream.passages:
            name = node.outputs[0].name
            channels, after = len(stream.ids[name]), round(more[stream.ids[name]].sum())
            tail = self._tail(channels, after, POOL_TAIL) if node.op in ("MaxPool", "AveragePool") else 0.0
            moved = (after - channels) * self.rates.itemsize
            made += Cost(bytes=self._positions(name, passage.output) * (moved + tail))
        return made

    def knows(self, layer: Layer) -> bool:
        """Whether the sizes of the data and the output of a layer are known, but for the number of samples."""
        shapes = [self.editor.shapes.get(tensor.name, (None,) * 2) for tensor in (layer.data, layer.node.outputs[0])]
        return all(None not in shape[1:] for shape in shapes)

    def _node(self, layer: Layer) -> float:
        """What a node costs by itself, which is nothing where the data is counted for one position only."""
        return NODE if self.knows(layer) else 0.0

    def _tail(self, before: int, after: int, tail: float) -> float:
        """What copies cost at each position where they fill no block, and the channels before them did."""
        return tail if before % self.rates.block == 0 and after % self.rates.block else 0.0

    def _positions(self, tensor: str, axis: int) -> int:
        """Values of each channel of a tensor whose channels lie on ``axis``, counted from the end."""
        shape = self.editor.shapes.get(tensor, ())
        return math.prod(size or 1 for place, size in enumerate(shape) if place and place - len(shape) != axis)

    def _products(self, layer: Layer) -> float:
        """Multiply-accumulates of a layer, in those of a layer that uses its data more than once."""
        return (DEPTHWISE if is_depthwise(layer) else 1.0) * math.prod(layer.weight.shape) * self._applied(layer)

    def _applied(self, layer: Layer) -> int:
        """Positions at which a layer applies its whole weight: a ConvTranspose at those of its data."""
        tensor = layer.data if layer.node.op == "ConvTranspose" else layer.node.outputs[0]
        shape = self.editor.shapes.get(tensor.name, ())
        inner = layer.node.op in ("Gemm", "MatMul")
        return math.prod(size or 1 for size in (shape[1:-1] if inner else shape[2:]))
