"""Which kernels onnxruntime chose for the nodes of a model: its own optimized model, read back.

Every node gets a name of its own before onnxruntime sees it. A fused kernel keeps the name of the node it was made of,
or holds it in a longer one, also where a function was unfolded or a layout changed; so a kernel is known by its name.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.errors import RuntimeFailed
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.model import Model, graphs
from onnx_ocs.numerics.saturation import RowSums, kernel_order, row_sums
from onnx_ocs.optimized import optimize

INTEGER = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearMatMul",
    }
)
"""Kernels on integers beside those whose names begin with QLinear."""

FLOAT = frozenset({"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
"""What a layer is where it stays float."""

MARK = "onnx_ocs#{}#"

PAIRED = {
    "QLinearConv": (0, 3, 2),
    "QLinearMatMul": (0, 3, 2),
    "QGemm": (0, 3, 2),
    "MatMulInteger": (0, 1, 2),
    "MatMulIntegerToFloat": (0, 1, 4),
    "DynamicQuantizeMatMul": (0, 1, None),
}
"""Kernels that add pairs of products in 16 bits, and their inputs for data, weight, and zero point of the data."""

KEEPING = frozenset({"Transpose", "Reshape", "Flatten", "MaxPool", "NhwcMaxPool", "Gather", "Slice", "Squeeze"})
"""Nodes on integers that keep their range."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A node of the optimized model."""

    node: onnx.NodeProto

    @property
    def op(self) -> str:
        return self.node.op_type

    @property
    def on_integers(self) -> bool:
        return self.op.startswith("QLinear") or self.op in INTEGER


@dataclass(eq=False)
class Kernels:
    """What became of each node, by the id of the node in the source."""

    model: Model
    by_node: dict[int, list[Kernel]]
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    makers: dict[str, onnx.NodeProto] = field(default_factory=dict)

    def of(self, node: object) -> Kernel | None:
        """The kernel that computes what ``node`` did; the float one where a function became several that differ."""
        found = self.by_node.get(id(node), [])
        chosen = [kernel for kernel in found if kernel.op in FLOAT] or [k for k in found if k.on_integers] or found
        return chosen[0] if chosen else None

    def pairs(self, kernel: Kernel) -> RowSums | None:
        """What the pairs of products of ``kernel`` can add up to, for each output; none where none are added."""
        if kernel.op not in PAIRED:
            return None
        node = kernel.node
        data, weight, zero = PAIRED[kernel.op]
        tensor = self.constants.get(_at(node, weight))
        if tensor is None or tensor.data_type != onnx.TensorProto.INT8:
            return None
        zero_point = self.constants.get(_at(node, zero)) if zero is not None else None
        if zero_point is not None and zero_point.data_type != onnx.TensorProto.UINT8:
            return None
        rows = _rows(node, self.model.read(tensor))
        return None if rows is None else row_sums(rows, *self._range(_at(node, data), zero_point))

    def _range(self, name: str, zero_point: onnx.TensorProto | None) -> tuple[int, int]:
        """The range of the stored integers of ``name``: that of UINT8, or of a Clip; what pads them is their zero."""
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in KEEPING:
            maker = self.makers.get(maker.input[0])
        if maker is None or maker.op_type != "Clip":
            return 0, 255
        ends = [self.constants.get(_at(maker, index)) for index in (1, 2)]
        low, high = (d if e is None else int(self.model.read(e)) for e, d in zip(ends, (0, 255), strict=True))
        zero = int(self.model.read(zero_point).reshape(-1)[0]) if zero_point is not None else low
        return min(low, zero), max(high, zero)


def choose_kernels(editor: Editor, folder: Path, timeout: float) -> Kernels:
    """Let onnxruntime optimize the model of ``editor``, whose names are changed on the way and not given back.

    Raises:
        RuntimeFailed: it refuses the model, crashed, or ran out of time.
    """
    marked: list[gs.Node] = []
    names: list[str] = []
    for scope in editor.scopes:
        for node, proto in scope.sources.values():
            names.append(proto.name)
            proto.name = MARK.format(len(marked))
            marked.append(node)
    mark = re.compile(MARK.format(r"(\d+)"))
    source, target = folder / "marked.onnx", folder / "optimized.onnx"
    editor.model.sharing(editor.proto).save(source)
    try:
        optimize(source, target, timeout)
    except RuntimeFailed as error:
        told = str(error).replace(str(source), editor.model.name)
        raise RuntimeFailed(mark.sub(lambda found: names[int(found[1])], told)) from None
    model = Model.load(target)
    kernels = Kernels(model, {})
    for graph in graphs(model.proto.graph):
        kernels.constants |= {tensor.name: tensor for tensor in graph.initializer}
        for proto in graph.node:
            kernels.makers |= dict.fromkeys(proto.output, proto)
            for number in mark.findall(proto.name):
                kernels.by_node.setdefault(id(marked[int(number)]), []).append(Kernel(proto))
    return kernels


def _rows(node: onnx.NodeProto, weight: NDArray[Any]) -> NDArray[Any] | None:
    """(outputs, K), the weight in the order of the kernel; none for a depthwise convolution, which adds no pairs."""
    if node.op_type == "QLinearConv":
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        return None if weight.shape[:2] == (groups, 1) else kernel_order(weight, 1, 0)
    if weight.ndim < 2:
        return weight.reshape(1, -1)
    if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
        return weight
    return weight.swapaxes(-1, -2).reshape(-1, weight.shape[-2])


def _at(node: onnx.NodeProto, index: int | None) -> str:
    return node.input[index] if index is not None and index < len(node.input) else ""
