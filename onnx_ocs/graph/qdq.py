"""QuantizeLinear and DequantizeLinear nodes, for data and for weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor, Scope
from onnx_ocs.graph.model import stored_size


@dataclass(frozen=True, eq=False)
class DataGrid:
    """The points that data is rounded to: ``step * (q - zero_point)`` for the integers ``q`` within ``limits``."""

    step: NDArray[np.float32] | gs.Tensor  # (), a constant or a value of the graph
    limits: tuple[int, int]  # INT8, or UINT8 where they say that no integer is negative
    zero_point: int = 0
    float_clip: bool = False  # limits that are narrower than the type are held before the rounding

    @property
    def kind(self) -> type[np.integer[Any]]:
        """The type of the integers."""
        return np.uint8 if self.limits[0] == 0 else np.int8

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal grids."""
        step = self.step.name if isinstance(self.step, gs.Tensor) else self.step.tobytes()
        return step, self.limits, self.zero_point, self.float_clip


def quantized(
    edit: Editor, scope: Scope, data: gs.Tensor, grid: DataGrid, like: int, before: gs.Node | None
) -> gs.Variable:
    """``data`` rounded to the points of ``grid`` by QuantizeLinear and DequantizeLinear.

    Args:
        like: the element type of ``data``.
    """
    return to_floats(edit, scope, to_integers(edit, scope, data, grid, like, before), grid, like, before)


def to_integers(
    edit: Editor, scope: Scope, data: gs.Tensor, grid: DataGrid, like: int, before: gs.Node | None
) -> gs.Variable:
    """``data`` as integers on ``grid``; limits that are narrower than the type are held by a Clip of the integers.

    Layers that ask for the same share the nodes, here and in :func:`to_floats`.
    """

    def make() -> gs.Variable:
        name, (low, high) = data.name, grid.limits
        values = edit.cast(scope, data, like, onnx.TensorProto.FLOAT, before)
        narrow = high < np.iinfo(grid.kind).max
        if narrow and grid.float_clip:
            assert isinstance(grid.step, np.ndarray)
            ends = [np.array((limit - grid.zero_point) * grid.step, np.float32) for limit in (low, high)]
            values = _clip(edit, scope, values, ends, name, before)
        made = edit.node(
            scope, "QuantizeLinear", [values, *_scale(edit, scope, name, grid)], f"{name}.quantized", before
        )
        if narrow and not grid.float_clip:
            made = _clip(edit, scope, made, [np.array(limit, grid.kind) for limit in (low, high)], name, before)
        return made

    return edit.once(scope, make, "integers", data.name, grid.key)


def to_floats(
    edit: Editor, scope: Scope, integers: gs.Tensor, grid: DataGrid, like: int, before: gs.Node | None
) -> gs.Variable:
    """The values that ``integers`` on ``grid`` stand for, in the element type ``like``."""

    def make() -> gs.Variable:
        name = integers.name
        made = edit.node(
            scope, "DequantizeLinear", [integers, *_scale(edit, scope, name, grid)], f"{name}.dequantized", before
        )
        return edit.cast(scope, made, onnx.TensorProto.FLOAT, like, before)

    return edit.once(scope, make, "floats", integers.name, grid.key, like)


def dequantize(
    edit: Editor,
    scope: Scope,
    integers: onnx.TensorProto,
    step: NDArray[np.float32],
    axis: int,
    like: int,
    before: gs.Node,
    block: int | None = None,
) -> gs.Variable:
    """A constant of integers and the DequantizeLinear that reads it, in the element type ``like``.

    Args:
        step: () for one scale, (n,) for one along ``axis``; as many dimensions as ``integers`` for one for each
            ``block`` along it.
    """
    name = integers.name
    zeros = edit.model.tensor("", integers.data_type, step.shape, bytes(_bytes_of(integers.data_type, step.size)))
    inputs = [
        edit.constant(scope, f"{name}.integers", tensor=integers),
        edit.constant(scope, f"{name}.scale", step),
        edit.constant(scope, f"{name}.zero_point", tensor=zeros),
    ]
    attributes = {"axis": axis} if step.ndim else {}
    attributes |= {"block_size": block} if block is not None else {}
    output = edit.node(scope, "DequantizeLinear", inputs, f"{name}.dequantized", before, **attributes)
    return edit.cast(scope, output, onnx.TensorProto.FLOAT, like, before)


def _clip(
    edit: Editor, scope: Scope, data: gs.Tensor, ends: list[NDArray[Any]], name: str, before: gs.Node | None
) -> gs.Variable:
    limits = [edit.constant(scope, f"{name}.limit", end) for end in ends]
    return edit.node(scope, "Clip", [data, *limits], f"{name}.clipped", before)


def _scale(edit: Editor, scope: Scope, name: str, grid: DataGrid) -> list[gs.Tensor]:
    """The scale and the zero point of ``grid``; all nodes on it share them."""

    def make() -> list[gs.Tensor]:
        step = grid.step
        scale = step if isinstance(step, gs.Tensor) else edit.constant(scope, f"{name}.scale", step)
        return [scale, edit.constant(scope, f"{name}.zero_point", np.array(grid.zero_point, grid.kind))]

    return edit.once(scope, make, "scale", grid.key)


def _bytes_of(data_type: int, size: int) -> int:
    """Bytes of ``size`` packed zeros of ``data_type``."""
    return stored_size(onnx.TensorProto(data_type=data_type, dims=[size]))
