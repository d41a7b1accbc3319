"""Write nodes in the form that kernels on integers, and what moves nodes around them, know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Place, Weight


@dataclass(frozen=True)
class WritePlainly:
    """The same functions without attributes that a runtime gets wrong; what is decided at run time stays as it is.

    It works on an editor, before layers are found.
    """

    name: ClassVar[str] = "write-plainly"

    ops: frozenset[str] = frozenset()  # of FORMS
    kept: frozenset[str] = frozenset()  # nodes that are left as they are, by name

    def apply(self, editor: Editor) -> int:
        """How many nodes were written in another form."""
        return sum(
            FORMS[node.op](Place(node, scope, editor))
            for scope in editor.scopes
            for node in list(scope.graph.nodes)
            if node.op in self.ops and node.domain in (None, "", "ai.onnx") and node.name not in self.kept
        )


def _without_factors(place: Place) -> bool:
    """A Gemm whose weight and bias are multiplied by alpha and beta."""
    node, changed = place.node, False
    constants = [index for index in (1, 0) if isinstance(place.weight(index), Weight)][:1]
    for name, indices in (("alpha", constants), ("beta", [2] if len(node.inputs) > 2 else [])):
        factor = node.attrs.get(name, 1.0)
        held = place.weight(indices[0]) if indices else None
        if not isinstance(factor, float) or factor == 1 or not isinstance(held, Weight):
            continue
        values = held.read(place.model)
        with np.errstate(over="ignore"):
            scaled = (values.astype(np.float64) * factor).astype(values.dtype)
        if np.isfinite(scaled).all():
            tensor = place.model.tensor(held.tensor.name, held.data_type, scaled.shape, scaled.tobytes())
            made = place.editor.constant(place.scope, f"{held.tensor.name}.{name}", tensor=tensor)
            place.editor.rewire(node, indices[0], made)
            place.editor.set_number(place.scope, node, name, 1.0)
            changed = True
    return changed


def _with_all_pads(place: Place) -> bool:
    """A Pad of some axes with pads for each."""
    node, rank = place.node, place.editor.ranks.get(place.node.inputs[0].name)
    if len(node.inputs) < 4 or not node.inputs[3].name or rank is None:
        return False
    pads, axes = place.values(1), place.values(3)
    if pads is None or axes is None:
        return False
    whole = np.zeros((2, rank), np.int64)
    whole[:, axes] = pads.reshape(2, -1)
    place.editor.rewire(node, 1, place.editor.constant(place.scope, f"{node.outputs[0].name}.pads", whole.reshape(-1)))
    place.editor.rewire(node, 3, gs.Variable.empty())
    return True


def _with_all_sizes(place: Place) -> bool:
    """A Resize of some axes with scales or sizes for each."""
    node, data = place.node, place.node.inputs[0].name
    shape, axes = place.editor.shapes.get(data), node.attrs.get("axes")
    special = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if axes is None or shape is None or special or node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return False
    sized = len(node.inputs) > 3 and bool(node.inputs[3].name)
    given = place.values(3 if sized else 2)
    if given is None or (sized and any(shape[axis] is None for axis in axes)):
        return False
    whole = np.ones(len(shape), np.float32)
    whole[list(axes)] = [_scale(shape[axis], size) for axis, size in zip(axes, given, strict=True)] if sized else given
    place.editor.rewire(node, 2, place.editor.constant(place.scope, f"{node.outputs[0].name}.scales", whole))
    if sized:
        place.editor.rewire(node, 3, gs.Variable.empty())
    place.editor.drop_attribute(place.scope, node, "axes")
    return True


def _scale(size: int, wanted: int) -> np.float32:
    """What ``size`` is multiplied by, in float32, so that the whole part is what is wanted."""
    scale = np.float32(wanted / size)
    return scale if np.floor(scale * np.float32(size)) >= wanted else np.nextafter(scale, np.float32(np.inf))


FORMS: dict[str, Callable[[Place], bool]] = {
    "Gemm": _without_factors,
    "Pad": _with_all_pads,
    "Resize": _with_all_sizes,
}
"""What is done with a node, by its operator; whether it was changed."""
