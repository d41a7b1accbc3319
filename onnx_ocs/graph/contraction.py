"""What data the weights of a layer are multiplied by: which tensor, and how the layer moves over it."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from onnx_ocs.graph.layers import Layer


@dataclass(frozen=True)
class Contraction:
    """A tensor of the main graph as the rows that each output is a product of; plain data."""

    tensor: str
    axis: int  # of the channels, from the end
    channels: int
    groups: int
    data_type: int
    window: dict[str, Any] | None = None  # of a Conv: kernel, strides, dilations, pads, auto_pad

    @property
    def inputs(self) -> int:
        """n, that each output of a group is a sum over."""
        inner = 1
        for size in self.window["kernel"] if self.window else ():
            inner *= size
        return self.channels // self.groups * inner

    @property
    def key(self) -> str:
        """Equal for two layers that are products of the same rows."""
        return json.dumps(asdict(self), sort_keys=True)


def contraction(layer: Layer) -> Contraction | None:
    """How ``layer`` meets its data; None where its attributes are not numbers of its own."""
    node = layer.node
    window = None
    if layer.kernel:
        kernel = layer.weight.shape[2:]
        plain = {
            "kernel": list(kernel),
            "strides": node.attrs.get("strides", [1] * len(kernel)),
            "dilations": node.attrs.get("dilations", [1] * len(kernel)),
            "pads": node.attrs.get("pads", [0] * (2 * len(kernel))),
            "auto_pad": node.attrs.get("auto_pad", "NOTSET"),
        }
        if not all(isinstance(value, list | str) for value in plain.values()):
            return None
        window = plain
    name = layer.data.name
    return Contraction(name, layer.data_axis, layer.channels, layer.groups, layer.weight.data_type, window)
