"""Even out the ranges of channels across layers, before anything is split."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Layer, Place, Weight
from onnx_ocs.graph.streams import Stream, bias_axis, stream_of
from onnx_ocs.numerics.equalize import equalizing
from onnx_ocs.numerics.split import along
from onnx_ocs.numerics.weights import Axes, channel_peaks

SWEEPS = 8
"""Over all streams, since a layer reads one and makes another."""


@dataclass(frozen=True)
class EqualizeLayers:
    """Divide the channels that layers make by factors, and multiply the weights of those that read them.

    Through streams that positive factors pass: Relu, PRelu, pooling, Concat, Add of two streams, depthwise layers. It
    stands before layers are found for good, so it works on an editor. It returns, of each tensor whose channels have
    changed, by what they were multiplied.
    """

    name: ClassVar[str] = "equalize-layers"

    def apply(self, editor: Editor, layers: Sequence[Layer]) -> dict[str, NDArray[np.float64]]:
        readers = Counter(layer.weight.key for layer in layers)
        held = {id(layer.node): layer for layer in layers if readers[layer.weight.key] == 1}
        streams: list[Stream] = []
        seen: set[int] = set()
        for layer in layers:
            if id(layer.node) in held and id(layer.node) not in seen:
                stream = stream_of(editor, layer, held)
                if isinstance(stream, Stream):
                    seen |= {id(reader.node) for reader in stream.readers}
                    if stream.homogeneous and stream.makers:
                        streams.append(stream)
        factors = self._factors(editor, streams)
        changed: dict[str, NDArray[np.float64]] = {}
        for stream, some in zip(streams, factors, strict=True):
            if (some != 1).any():
                self._scale(editor, stream, some)
                changed |= {name: 1 / some[ids] for name, ids in stream.ids.items()}
        return changed

    def _factors(self, editor: Editor, streams: list[Stream]) -> list[NDArray[np.float64]]:
        """Of the channels of each stream, until they stay."""
        factors = [np.ones(stream.channels) for stream in streams]
        peaks: dict[int, NDArray[np.float64]] = {}
        for stream in streams:
            for layer in (*stream.makers, *stream.readers):
                if id(layer.node) not in peaks:
                    axes = Axes(layer.input_axis, layer.output_axis, kernel=layer.kernel)
                    peaks[id(layer.node)] = channel_peaks(layer.weight.read(editor.model), axes)[0].astype(np.float64)
        for _ in range(SWEEPS):
            before = [some.copy() for some in factors]
            for stream, some in zip(streams, factors, strict=True):
                made, read = np.zeros(stream.channels), np.zeros(stream.channels)
                for layer in stream.makers:
                    ids = stream.ids[layer.node.outputs[0].name]
                    np.maximum.at(made, ids, peaks[id(layer.node)].max(axis=1))
                for layer in stream.readers:
                    np.maximum.at(read, stream.ids[layer.data.name], peaks[id(layer.node)].max(axis=0))
                step = equalizing(made, read)
                some *= step
                for layer in stream.makers:
                    peaks[id(layer.node)] /= step[stream.ids[layer.node.outputs[0].name]][:, None]
                for layer in stream.readers:
                    peaks[id(layer.node)] *= step[stream.ids[layer.data.name]]
            if all(np.array_equal(old, new) for old, new in zip(before, factors, strict=True)):
                break
        return factors

    def _scale(self, edit: Editor, stream: Stream, factors: NDArray[np.float64]) -> None:
        for layer in stream.makers:
            some = 1 / factors[stream.ids[layer.node.outputs[0].name]]
            assert layer.output_axis is not None
            self._times(edit, stream, layer, layer.weight_input, layer.output_axis, some)
        for layer in (*stream.makers, *stream.depthwise):
            if (axis := bias_axis(layer)) is not None:
                self._times(edit, stream, layer, 2, axis, 1 / factors[stream.ids[layer.node.outputs[0].name]])
        for layer in stream.readers:
            some = factors[stream.ids[layer.data.name]]
            self._times(edit, stream, layer, layer.weight_input, layer.input_axis, some)

    def _times(
        self, edit: Editor, stream: Stream, layer: Layer, index: int, axis: int, factors: NDArray[np.float64]
    ) -> None:
        """The constant input ``index`` with its values along ``axis`` times ``factors``."""
        held = Place(layer.node, stream.scope, edit).weight(index)
        assert isinstance(held, Weight)
        values = held.read(edit.model)
        if values.ndim < -axis:  # one value for all channels
            values = values.reshape((1,) * (-axis - values.ndim) + values.shape)
        scaled = (values * along(factors, axis, values.ndim)).astype(values.dtype)
        edit.rewire(layer.node, index, edit.constant(stream.scope, f"{held.tensor.name}.even", scaled))
