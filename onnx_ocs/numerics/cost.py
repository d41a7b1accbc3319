"""What copies of channels cost at run time: a model of bytes moved and of products, to choose by and not to time by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MACS_PER_BYTE = 16.0
"""Products of an integer kernel in the time in which one byte is moved (read and written once), on a CPU with VNNI;
about half as many without."""

NODE = 20_000.0
"""Bytes moved in the time that one more node takes by itself."""

DEPTHWISE = 8.0
"""Products of other layers in the time of one of a depthwise layer, whose data is used once."""

UNALIGNED = 1.0
"""What a layer whose channels are no multiple of what its kernel wants costs more, as a share of its products."""

ALIGNED_REST, REST = 1.25, 4.0
"""Blocks of output channels in the time that a kernel takes for those that fill none: a multiple of what it wants, or
another number."""

TAIL, POOL_TAIL, DEPTHWISE_TAIL = 16.0, 128.0, 512.0
"""Bytes moved in the time that channels which fill no block add at each position of an output, by the kind of layer."""


@dataclass(frozen=True)
class Cost:
    """Of one way to give layers their copies, for one sample."""

    bytes: float = 0.0  # read and written
    macs: float = 0.0  # multiply-accumulates

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.macs + other.macs)

    @property
    def total(self) -> float:
        """In bytes."""
        return self.bytes + self.macs / MACS_PER_BYTE


@dataclass(frozen=True)
class Rates:
    """How a runtime moves and computes channels."""

    itemsize: int = 4  # bytes of a value as it is gathered
    moves: int = 1  # how often a Gather moves the data, with what the runtime puts around it
    block: int = 1  # output channels that a kernel computes at once
    multiple: int = 1  # of output channels that it wants at least


def columns(outputs: int, block: int, multiple: int = 1) -> float:
    """The channels that take as long where a kernel computes ``block`` at once and wants a multiple of ``multiple``."""
    whole, rest = divmod(outputs, block)
    more = 0.0
    if rest:
        more = ALIGNED_REST if multiple > 1 and rest % multiple == 0 else REST
    return (whole + more) * block


@dataclass(frozen=True)
class Room:
    """How many channels a layer gets, and why not as many as asked."""

    extra: int
    multiple: int = 1  # that the channels make
    reason: str | None = None


def room(exact: int, channels: int, copied: int, multiples: Sequence[int], most: float) -> Room:
    """``exact`` channels more, and what is missing to the next multiple.

    Where that would add more than the share ``most`` of the channels, the next smaller multiple is tried. Where none is
    small enough the layer gets exactly what was asked if it is estimated to cost less than that share on top, in
    products, with the slower kernel that it then runs on; else it gets nothing.

    Args:
        exact: copies that are asked for.
        channels: C, of the source.
        copied: channels that splitting the data adds already.
        multiples: wanted of the number of channels, the best first.
    """
    if not exact or not multiples or tuple(multiples) == (1,):
        return Room(exact)
    held = channels + copied
    for multiple in multiples:
        extra = math.ceil((held + exact) / multiple) * multiple - held
        if extra <= max(most * channels, exact):
            return Room(extra, multiple)
    wanted = multiples[-1]
    aligned_before = held % wanted == 0
    grown = (held + exact) * (1 + UNALIGNED) / (held * (1 if aligned_before else 1 + UNALIGNED)) - 1
    if grown <= most:
        return Room(exact, 1, f"{channels} channels are too few for a multiple of {wanted} (--max-expand): exact")
    return Room(0, 1, f"{channels} channels are too few for a multiple of {wanted} (--max-expand)")
