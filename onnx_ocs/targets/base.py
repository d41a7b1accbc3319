"""What a runtime wants of a model with QuantizeLinear and DequantizeLinear nodes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

VALID = ("opset", "scale-shape", "scale-positive")
"""Rules of the ONNX standard itself, which hold everywhere."""


@dataclass(frozen=True)
class Target:
    """One runtime, as plain data: passes read it to place the nodes, the lint to find violations.

    Operators are named by their types in the standard domain. Empty sets make the portable form: symmetric INT8 at the
    data of each layer and nothing else.
    """

    name: str
    summary: str  # for --help and the documentation

    unsigned: bool = False
    """Whether data is quantized to UINT8, with a zero point; 0 for data that is never negative."""

    outputs: frozenset[str] = frozenset()
    """Layers whose output is quantized as well, without which the runtime computes them as float."""

    computes: frozenset[str] = frozenset()
    """Other operators with integer kernels: all their inputs and outputs are quantized, each with its own scale."""

    moves: frozenset[str] = frozenset()
    """Operators that only move values: the output has the scale of the input."""

    only: Mapping[str, Callable[[gs.Node], bool]] = field(default_factory=dict)
    """Of some of these operators, which nodes are meant; the others have no integer kernel, or change values."""

    one_scale: frozenset[str] = frozenset()
    """Of those that compute, what has one scale for all its inputs and its output."""

    absorbed: frozenset[str] = frozenset()
    """Activation functions that vanish in the quantization behind them."""

    integer_bias: frozenset[str] = frozenset()
    """Layers whose bias has to be INT32; that of others stays float."""

    scale_axes: Mapping[str, int] = field(default_factory=dict)
    """The only axis of the weight that a layer may have one scale for each place of; elsewhere it gets one for all."""

    skips: frozenset[str] = frozenset()
    """Operators of which one input is quantized: that made first, if a layer makes the other (residual Add)."""

    containers: frozenset[int] = frozenset({8, 4, 2})
    """Bits of the integer types of weights."""

    integer_containers: frozenset[int] = frozenset({8, 4, 2})
    """Those of weights that its integer kernels take, where the data is quantized as well."""

    block_containers: frozenset[int] = frozenset({8, 4, 2})
    """Those of weights with a scale for each block, beside float data."""

    whole_blocks: bool = False
    """Whether such weights have two dimensions, blocks that are whole, and an even last dimension."""

    gathers_integers: bool = False
    """Whether copies of channels are taken from the integers, or from the floats in front of them."""

    clips_integers: bool = True
    """Whether a grid narrower than its type is held by a Clip of the integers, or by one of the floats."""

    constant_scales: bool = False
    """Whether scales that the graph computes are refused."""

    symmetric: bool = False
    """Whether unsigned data and zero points are refused."""

    multiples: tuple[int, ...] = ()
    """Numbers of channels of data of which the integer kernels want a multiple, the best first."""

    float_multiples: tuple[int, ...] = ()
    """The same of the float kernels."""

    plain: frozenset[str] = frozenset()
    """Operators that are written in another form where data is quantized (passes/write_plainly.py)."""

    adds_pairs: bool = False
    """Whether its kernels add products in pairs, in 16 bits, on some CPUs (x86 without VNNI)."""

    block: int = 1
    """Output channels that a kernel computes at once."""

    gather_moves: int = 1
    """How often a Gather of channels moves the data, with what the runtime puts around it."""

    rules: tuple[str, ...] = VALID
    """What the lint looks for, by the names of its rules, in this order."""

    def does_compute(self, node: gs.Node) -> bool:
        """Whether ``node`` is one of :attr:`computes`."""
        return node.op in self.computes and self._is_meant(node)

    def does_move(self, node: gs.Node) -> bool:
        """Whether ``node`` is one of :attr:`moves`."""
        return node.op in self.moves and self._is_meant(node)

    def _is_meant(self, node: gs.Node) -> bool:
        return node.op not in self.only or self.only[node.op](node)
