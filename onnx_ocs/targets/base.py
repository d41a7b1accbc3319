"""What a runtime wants of a model with QuantizeLinear and DequantizeLinear nodes."""

from dataclasses import dataclass

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

    one_scale: frozenset[str] = frozenset()
    """Operators whose inputs and output have one scale together."""

    absorbed: frozenset[str] = frozenset()
    """Activation functions that vanish in the quantization behind them."""

    skips: frozenset[str] = frozenset()
    """Operators of which only the inputs that no layer makes are quantized (a residual Add)."""

    containers: frozenset[int] = frozenset({8, 4, 2})
    """Bits of the integer types of weights."""

    channel_multiple: int = 1
    """The number of channels of data of which the integer kernels want a multiple."""

    rules: tuple[str, ...] = VALID
    """What the lint looks for, by the names of its rules, in this order."""
