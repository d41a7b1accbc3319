"""Outlier channel splitting on plain arrays (Zhao et al., ICML 2019, arXiv:1901.09504).

Splitting a channel is nothing but a wider integer range for it: with ``q = floor(w / Δ + 1/2)`` a copy with the share
``1 / d`` and the phase ``a`` holds ``floor((q + a) / d)``, and by Hermite's identity (Equation 8) the copies of a
channel sum to ``q``. So any rounding method may choose any integer up to ``levels / largest share``, and dealing it
out to the copies is exact.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pieces = list[tuple[int, int]]  # (denominator, phase) of each copy of one channel
Policy = Callable[[int], Pieces]

POLICIES: dict[str, Policy] = {}


def policy(name: str) -> Callable[[Policy], Policy]:
    """Register how a channel becomes n copies."""

    def register(function: Policy) -> Policy:
        POLICIES[name] = function
        return function

    return register


@policy("even")
def even(copies: int) -> Pieces:
    """Equal shares: ``1 / n`` each."""
    return [(copies, phase) for phase in range(copies)]


@policy("halving")
def halving(copies: int) -> Pieces:
    """The largest piece is halved again, as in the paper: 1/2 and 1/2; 1/4, 1/4 and 1/2; four times 1/4; ..."""
    made: Pieces = [(1, 0)]
    while len(made) < copies:
        at = min(range(len(made)), key=lambda i: made[i][0])
        denominator, phase = made[at]
        made[at : at + 1] = [(2 * denominator, phase), (2 * denominator, phase + denominator)]
    return made


def divisor(copies: int, policy: str) -> int:
    """What the largest magnitude of a channel is divided by when it has this many copies."""
    return copies if policy == "even" else 2 ** (copies.bit_length() - 1)


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """How C channels become C + k.

    Expanded channel ``j`` copies channel ``source[j]`` and carries the share ``1 / denominator[j]`` of it; of the
    integers on a grid it carries ``floor((q + phase[j]) / denominator[j])``. The shares of one channel's copies sum
    to 1 and their integers to ``q``, so a layer that is linear in its channels computes the same output.
    """

    source: NDArray[np.int64]  # (C + k,)
    denominator: NDArray[np.int64]  # (C + k,)
    phase: NDArray[np.int64]  # (C + k,)

    @property
    def channels(self) -> int:
        """C."""
        return int(self.source.max()) + 1 if self.source.size else 0

    @property
    def extra(self) -> int:
        """k."""
        return len(self.source) - self.channels

    @property
    def gain(self) -> NDArray[np.float64]:
        """(C + k,), the share of each copy."""
        return 1 / self.denominator

    @property
    def offset(self) -> NDArray[np.float64]:
        """(C + k,), what quantization-aware splitting adds to each share, in steps (Equation 6 for two copies)."""
        return (self.phase + 0.5 - self.denominator / 2) / self.denominator

    @property
    def widening(self) -> NDArray[np.int64]:
        """(C,), by how much the integer range of each channel grows: 1 / the largest share of its copies."""
        narrowest = np.full(self.channels, np.iinfo(np.int64).max)
        np.minimum.at(narrowest, self.source, self.denominator)
        return narrowest


def plan_splits(copies: NDArray[np.int64], policy: str = "even") -> SplitPlan:
    """The plan that gives channel ``c`` ``copies[c]`` copies: one in its own place, the others behind all channels.

    Args:
        copies: (C,), at least 1 each.
    """
    first, more = [], []
    for channel, number in enumerate(copies.tolist()):
        pieces = [(channel, *piece) for piece in POLICIES[policy](number)]
        first.append(pieces[0])
        more += pieces[1:]
    table = np.array(first + more, np.int64).reshape(-1, 3)
    return SplitPlan(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())


def joined(plans: list[SplitPlan]) -> SplitPlan:
    """The plan of a grouped layer: the expanded channels of each group stand together."""
    starts = np.cumsum([0] + [plan.channels for plan in plans])
    return SplitPlan(
        np.concatenate([plan.source + start for plan, start in zip(plans, starts[:-1], strict=True)]),
        np.concatenate([plan.denominator for plan in plans]),
        np.concatenate([plan.phase for plan in plans]),
    )


def matching(held: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order that makes ``wanted`` of ``held``, which has the same values; equal ones stay in their order."""
    order = np.empty(len(wanted), np.int64)
    order[np.argsort(wanted, kind="stable")] = np.argsort(held, kind="stable")
    return order


def arranged(plan: SplitPlan, source: NDArray[np.int64]) -> SplitPlan:
    """``plan`` with its copies in another order, in which they are those of the channels ``source``."""
    place = matching(plan.source, source)
    return SplitPlan(plan.source[place], plan.denominator[place], plan.phase[place])


def in_blocks(plan: SplitPlan, block: int) -> SplitPlan:
    """``plan`` in an order in which the copies of a channel stand together in one block of ``block``.

    A block has a scale of its own, and the integers of a channel can be dealt out exactly (Equation 8) only among
    copies with one scale. So channels with the most copies choose their places first, as near as possible to where they
    would stand in the order of the source, and single channels fill the rest; nothing is padded. Copies for which no
    block has room (more of them than a block holds, or too few single channels to fill it up) stand in neighbouring
    blocks, which then need one scale together (:func:`joint_blocks`).
    """
    copies = np.bincount(plan.source, minlength=plan.channels)
    length = len(plan.source)
    free = np.full(-(-length // block), block)
    free[-1] -= len(free) * block - length
    home = (np.cumsum(copies) - copies) // block
    members: list[list[int]] = [[] for _ in free]
    rest = np.ones(plan.channels, bool)
    for channel in sorted(np.flatnonzero(copies > 1).tolist(), key=lambda at: -copies[at]):
        fitting = np.flatnonzero(free >= copies[channel])
        if fitting.size:
            at = fitting[np.abs(fitting - home[channel]).argmin()]
            free[at] -= copies[channel]
            members[at].append(channel)
            rest[channel] = False
    left = np.repeat(np.arange(plan.channels), copies * rest)
    parts = np.split(left, np.cumsum(free)[:-1])
    placed = [np.repeat(held, copies[held]) for held in (np.array(sorted(each), np.int64) for each in members)]
    return arranged(plan, np.concatenate([part for pair in zip(placed, parts, strict=True) for part in pair]))


def joint_blocks(plan: SplitPlan, block: int) -> NDArray[np.int64]:
    """(blocks,), for each block the first of those that need one scale with it, since copies of a channel link them."""
    places = np.arange(len(plan.source)) // block
    first = np.full(plan.channels, len(places))
    np.minimum.at(first, plan.source, places)
    label = np.arange(-(-len(places) // block))
    for place, other in {*zip(places.tolist(), first[plan.source].tolist(), strict=True)}:
        if label[place] != label[other]:
            one, both = sorted((label[place], label[other]))
            label[label == both] = one
    return label


def extra_channels(ratio: float, channels: int) -> int:
    """``ceil(ratio * channels)``, by the decimal digits of ``ratio`` (0.07 * 100 is 7, not 7.000000000000001)."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be from 0 to 1, not {ratio}")
    return math.ceil(Fraction(str(ratio)) * channels)


@dataclass(frozen=True, eq=False)
class Picks:
    """Which channel gets a copy more, one after the other, and what is left of the objective after each.

    The choice is greedy: fewer copies are the first ones of it.
    """

    of: int  # C, channels to choose from
    order: NDArray[np.int64]  # (extra,)
    left: NDArray[np.float64]  # (extra + 1,), from that without any copy on

    def copies(self, extra: int | None = None) -> NDArray[np.int64]:
        """(C,), how often each channel stands with the first ``extra`` copies, or with all."""
        return 1 + np.bincount(self.order[:extra], minlength=self.of)


def filled(picks: Picks, exact: int, part: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """(C,), how often each channel stands with the first ``exact`` copies, and those later ones that fill its part.

    Args:
        part: (C,), which part each channel is of; with copies, the channels of a part make a multiple of ``multiple``.
    """
    copies = picks.copies(exact)
    held = np.bincount(part)
    grown = np.bincount(part, copies)
    missing = np.where(grown > held, -grown % multiple, 0).astype(np.int64)
    for channel in [*picks.order[exact:].tolist(), *np.tile(np.arange(picks.of), multiple).tolist()]:
        if missing[part[channel]]:
            missing[part[channel]] -= 1
            copies[channel] += 1
    return copies


def _picked(of: int, order: list[int], left: list[float]) -> Picks:
    return Picks(of, np.array(order, np.int64), np.array(left))


def picks_per_tensor(peaks: NDArray[np.floating], extra: int, policy: str = "even") -> Picks:
    """The copies that make the largest share of all least: always one of the channel with the largest.

    What is left is the square of the largest share.

    Args:
        peaks: (C,), the largest magnitude of each channel.
        extra: copies to add.
    """
    copies = np.ones(len(peaks), np.int64)
    heap = [(-float(peak), channel) for channel, peak in enumerate(peaks)]
    heapq.heapify(heap)
    order: list[int] = []
    left = [heap[0][0] ** 2]
    for _ in range(extra):
        channel = heap[0][1]
        copies[channel] += 1
        heapq.heapreplace(heap, (-float(peaks[channel]) / divisor(int(copies[channel]), policy), channel))
        order.append(channel)
        left.append(heap[0][0] ** 2)
    return _picked(len(peaks), order, left)


def picks_per_row(peaks: NDArray[np.floating], extra: int, policy: str = "even") -> Picks:
    """As :func:`picks_per_tensor` where each output channel has its own threshold.

    One at a time to the channel whose split lowers the sum of the squared thresholds most; where no split lowers it
    (each row's peak stands in two channels), to the channel with the largest remaining magnitude. What is left is that
    sum.

    Args:
        peaks: (O, C), the largest magnitude of each output and input channel.
        extra: copies to add.
    """
    outputs, channels = peaks.shape
    copies = np.ones(channels, np.int64)
    largest = peaks.max(axis=0)
    divisors = _divisors(policy, extra + 1).astype(peaks.dtype)
    shares = peaks.copy()
    rows = np.arange(outputs)
    top, first, second = _leaders(shares)
    order: list[int] = []
    left = [float(np.square(first, dtype=np.float64).sum())]
    for _ in range(extra):
        then = peaks[rows, top] / divisors[copies[top]]
        lowered = np.square(first, dtype=np.float64) - np.square(np.maximum(then, second), dtype=np.float64)
        gain = np.bincount(top, lowered, minlength=channels)
        channel = int(np.argmax(gain))
        if not gain[channel] > 0:
            channel = int(np.argmax(largest / divisors[copies - 1]))
        stale = (top == channel) | (shares[:, channel] >= second)
        copies[channel] += 1
        shares[:, channel] = peaks[:, channel] / divisors[copies[channel] - 1]
        top[stale], first[stale], second[stale] = _leaders(shares[stale])
        order.append(channel)
        left.append(float(np.square(first, dtype=np.float64).sum()))
    return _picked(channels, order, left)


def picks_per_block(peaks: NDArray[np.floating], extra: int, block: int, policy: str = "even") -> Picks:
    """As :func:`picks_per_row` where each output channel has a threshold for each ``block`` input channels.

    The thresholds of one block do not depend on the others, so the best split of each block competes with those of the
    other blocks. Blocks are those before the split; the copies move their borders a little.
    """
    outputs, channels = peaks.shape
    copies = np.ones(channels, np.int64)
    largest = peaks.max(axis=0)
    divisors = _divisors(policy, extra + 2).astype(peaks.dtype)

    def best(start: int) -> tuple[float, int]:
        """The most that a split in the block from ``start`` on lowers its squared thresholds, and of which channel."""
        here = slice(start, start + block)
        top, first, second = _leaders(peaks[:, here] / divisors[copies[here] - 1])
        then = peaks[np.arange(outputs), start + top] / divisors[copies[start + top]]
        lowered = np.square(first, dtype=np.float64) - np.square(np.maximum(then, second), dtype=np.float64)
        gain = np.bincount(top, lowered)
        return -float(gain.max()), start + int(gain.argmax())

    starts = range(0, channels, block)
    heap = [best(start) for start in starts] if extra else []
    heapq.heapify(heap)
    order: list[int] = []
    left = [float(np.square(np.maximum.reduceat(peaks, starts, axis=1), dtype=np.float64).sum())]
    for _ in range(extra):
        gain, channel = heap[0]
        left.append(left[-1] + min(gain, 0.0))
        if gain < 0:
            copies[channel] += 1
            heapq.heapreplace(heap, best(channel // block * block))
        else:
            channel = int(np.argmax(largest / divisors[copies - 1]))
            copies[channel] += 1
            start = channel // block * block
            heap = [best(start) if other // block * block == start else (low, other) for low, other in heap]
            heapq.heapify(heap)
        order.append(channel)
    return _picked(channels, order, left)


def _divisors(policy: str, most: int) -> NDArray[np.int64]:
    """(most,), for n copies from 1 on, what the largest magnitude is divided by with n copies: entry n - 1."""
    return np.array([divisor(number, policy) for number in range(1, most + 1)])


def _leaders(shares: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """Of each row the channel with the largest share, that share, and the next; ``shares`` come back unchanged."""
    rows = np.arange(len(shares))
    top = shares.argmax(axis=1)
    first = shares[rows, top]
    if shares.shape[1] == 1:
        return top, first, np.zeros_like(first)
    shares[rows, top] = -1
    second = shares.max(axis=1)
    shares[rows, top] = first
    return top, first, second


def expand(values: NDArray[Any], plan: SplitPlan, axis: int, step: NDArray[np.floating] | None = None) -> NDArray[Any]:
    """The shares of each copy along ``axis``: (..., C, ...) becomes (..., C + k, ...).

    Args:
        values: weights.
        step: of the grid, in a shape that broadcasts to ``values``: adds the offsets of quantization-aware splitting,
            which sum to 0; none for naive splitting. Along ``axis`` it may differ, since copies share their channel's.
    """
    axis %= values.ndim
    out = values.take(plan.source, axis)
    split = np.flatnonzero(plan.denominator > 1)
    there = (slice(None),) * axis + (split,)
    share = values.take(plan.source[split], axis).astype(np.float64) * along(plan.gain[split], axis, values.ndim)
    if step is not None:
        here = step.take(plan.source[split], axis) if step.ndim and step.shape[axis] > 1 else step
        share += along(plan.offset[split], axis, values.ndim) * here
    out[there] = share.astype(values.dtype)
    return out


def deal(integers: NDArray[Any], plan: SplitPlan, axis: int) -> NDArray[Any]:
    """Each copy's part of the integers of its channel: ``floor((q + phase) / denominator)``, exactly (Equation 8)."""
    axis %= integers.ndim
    out = integers.take(plan.source, axis)
    split = np.flatnonzero(plan.denominator > 1)
    there = (slice(None),) * axis + (split,)
    whole = integers.take(plan.source[split], axis).astype(np.int64)
    out[there] = (whole + along(plan.phase[split], axis, whole.ndim)) // along(
        plan.denominator[split], axis, whole.ndim
    )
    return out


def recombine(copies: NDArray[Any], plan: SplitPlan, axis: int) -> NDArray[np.float64]:
    """The sum of the copies of each channel: (..., C + k, ...) becomes (..., C, ...)."""
    shape = list(copies.shape)
    shape[axis] = plan.channels
    whole = np.zeros(shape)
    np.add.at(np.moveaxis(whole, axis, 0), plan.source, np.moveaxis(copies.astype(np.float64), axis, 0))
    return whole


def along(values: NDArray[Any], axis: int, ndim: int) -> NDArray[Any]:
    """A vector in the shape that broadcasts along ``axis`` of an array of ``ndim`` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
