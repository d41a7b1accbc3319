"""Nodes that look at one batch and split its largest channels: standard operators of opset 13 only."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor, Scope
from onnx_ocs.graph.observe import AXES_ARE_INPUTS

COPIES = 8
"""A channel is split into so many at most."""

TINY = 2.0**-100
"""The least step, for a batch of zeros."""


def expand_by_batch(
    edit: Editor,
    scope: Scope,
    data: gs.Tensor,
    *,
    channels: int,
    axis: int,
    extra: int,
    levels: int,
    aware: bool,
    like: int,
    before: gs.Node,
) -> tuple[gs.Tensor, gs.Tensor | None, gs.Tensor]:
    """The split batch, which channel each of its channels copies, and its step: (), float32.

    Always the channel with the largest remaining magnitude gets one more copy, up to :data:`COPIES` in all. With even
    shares the copies that this gives are those of the ``extra`` largest among the quotients ``peak[c] / j``, j from 1
    on, so one TopK finds them; of equal quotients it takes those with the smaller j first, so the j of a channel have
    no gaps.

    Args:
        data: (..., C, ...), channels along ``axis``, counted from the end.
        extra: copies to add; with 0 the data comes back as it is, and no source.
        levels: Q, the largest integer of the grid.
        aware: add the offsets of quantization-aware splitting (Equation 6).
        like: the element type of ``data``.
    """

    def make() -> tuple[gs.Tensor, gs.Tensor | None, gs.Tensor]:
        build = _Builder(edit, scope, before, data.name)
        return build.expand(data, channels, axis, extra, levels, aware, like)

    return edit.once(scope, make, "by batch", data.name, axis, extra, levels, aware)


class _Builder:
    """Makes nodes of float32 and int64 vectors in front of one node."""

    def __init__(self, edit: Editor, scope: Scope, before: gs.Node, name: str) -> None:
        self._edit, self._scope, self._before = edit, scope, before
        self._name = f"{name}.batch"

    def expand(
        self, data: gs.Tensor, channels: int, axis: int, extra: int, levels: int, aware: bool, like: int
    ) -> tuple[gs.Tensor, gs.Tensor | None, gs.Tensor]:
        values = self._edit.cast(self._scope, data, like, onnx.TensorProto.FLOAT, self._before)
        peaks = self._peaks(values, channels, axis)
        if not extra:
            return data, None, self._step(peaks, levels)
        rows = min(extra, COPIES - 1)
        quotients = self._op("Div", peaks, self._floats(np.arange(1, rows + 1).reshape(-1, 1)))  # (rows, C)
        flat = self._op("Reshape", quotients, self._ints([-1]))
        picked = self._top(flat, extra)
        more = self._op("Mod", picked, self._ints([channels]))  # (k,), the channels that get a copy
        number = self._op("Add", self._op("Div", picked, self._ints([channels])), self._ints([1]))  # which copy it is
        every = self._ints(np.arange(channels))
        source = self._op("Concat", every, more, axis=0)
        hits = self._op("Equal", self._op("Unsqueeze", more, self._ints([1])), every)  # (k, C)
        added = self._op("ReduceSum", self._float(hits), self._ints([0]), keepdims=0)
        shares = self._op("Reciprocal", self._op("Add", added, self._floats(1.0)))  # (C,)
        step = self._step(self._op("Mul", peaks, shares), levels)
        gain = self._op("Gather", shares, source, axis=0)
        made = self._op("Gather", data, source, axis=axis)
        made = self._op("Mul", made, self._along(gain, axis, like))
        if aware:  # (phase + 1/2) / n - 1/2 steps, where n copies have the phases 0 to n - 1
            phase = self._op("Concat", self._floats(np.zeros(channels)), self._float(number), axis=0)
            place = self._op("Mul", self._op("Add", phase, self._floats(0.5)), gain)
            offset = self._op("Mul", self._op("Sub", place, self._floats(0.5)), step)
            made = self._op("Add", made, self._along(offset, axis, like))
        return made, source, step

    def _peaks(self, data: gs.Tensor, channels: int, axis: int) -> gs.Tensor:
        """(C,), the largest magnitude of each channel."""
        found = self._op("Abs", data)
        if axis < -1:
            found = self._max(found, list(range(axis + 1, 0)))
        return self._max(self._op("Reshape", found, self._ints([-1, channels])), [0])

    def _step(self, peaks: gs.Tensor, levels: int) -> gs.Tensor:
        largest = self._max(peaks, [0])
        return self._op("Max", self._op("Mul", largest, self._floats(1 / levels)), self._floats(TINY))

    def _max(self, values: gs.Tensor, axes: list[int]) -> gs.Tensor:
        if self._scope.opset >= AXES_ARE_INPUTS:
            return self._op("ReduceMax", values, self._ints(axes), keepdims=0)
        return self._op("ReduceMax", values, axes=axes, keepdims=0)

    def _top(self, values: gs.Tensor, count: int) -> gs.Tensor:
        """The places of the largest values."""
        picked = self._op("TopK", values, self._ints([count]))
        indices = gs.Variable(self._edit.unique(f"{self._name}.picked"))
        picked.inputs[0].outputs.append(indices)
        return indices

    def _along(self, vector: gs.Tensor, axis: int, like: int) -> gs.Tensor:
        shaped = self._op("Reshape", vector, self._ints([-1, *[1] * (-1 - axis)]))
        return self._edit.cast(self._scope, shaped, onnx.TensorProto.FLOAT, like, self._before)

    def _float(self, values: gs.Tensor) -> gs.Tensor:
        return self._op("Cast", values, to=onnx.TensorProto.FLOAT)

    def _op(self, op: str, *inputs: gs.Tensor, **attributes: Any) -> gs.Variable:
        return self._edit.node(self._scope, op, list(inputs), self._name, self._before, **attributes)

    def _ints(self, values: list[int] | NDArray[Any]) -> gs.Tensor:
        return self._edit.constant(self._scope, f"{self._name}.constant", np.array(values, np.int64))

    def _floats(self, values: float | NDArray[Any]) -> gs.Tensor:
        return self._edit.constant(self._scope, f"{self._name}.constant", np.array(values, np.float32))
