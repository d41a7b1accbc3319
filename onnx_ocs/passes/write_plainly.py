"""Write nodes in the form that kernels on integers, and what moves nodes around them, know."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.layers import Place, Weight, name_of


@dataclass(frozen=True)
class WritePlainly:
    """The same functions without attributes that a runtime gets wrong; what is decided at run time stays as it is.

    It works on an editor, before layers are found.
    """

    name: ClassVar[str] = "write-plainly"

    ops: frozenset[str] = frozenset()  # of FORMS
    kept: frozenset[str] = frozenset()  # nodes that are left as they are, by the names of their layers

    def apply(self, editor: Editor) -> int:
        """How many nodes were written in another form."""
        return sum(
            FORMS[place.node.op](place)
            for scope in editor.scopes
            for place in [Place(node, scope, editor) for node in scope.graph.nodes if node.op in self.ops]
            if place.node.domain in (None, "", "ai.onnx") and name_of(place) not in self.kept
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
        made = place.editor.once(place.scope, partial(_times, place, held, factor, name), held.key, name, factor)
        if made is not None:
            place.editor.rewire(node, indices[0], made)
            place.editor.set_number(place.scope, node, name, 1.0)
            changed = True
    return changed


def _times(place: Place, held: Weight, factor: float, name: str) -> gs.Tensor | None:
    """A constant times a factor; None where that is beyond its type."""
    values = held.read(place.model)
    with np.errstate(over="ignore"):
        scaled = (values.astype(np.float64) * factor).astype(values.dtype)
    if not np.isfinite(scaled).all():
        return None
    tensor = place.model.tensor(held.tensor.name, held.data_type, scaled.shape, scaled.tobytes())
    return place.editor.constant(place.scope, f"{held.tensor.name}.{name}", tensor=tensor)


def _with_all_pads(place: Place) -> bool:
    """A Pad of some axes with pads for each."""
    node, shape = place.node, _shape(place)
    if len(node.inputs) < 4 or not node.inputs[3].name or shape is None:
        return False
    pads, axes = place.values(1), place.values(3)
    if pads is None or axes is None:
        return False
    whole = np.zeros((2, len(shape)), np.int64)
    whole[:, axes] = pads.reshape(2, -1)
    place.editor.rewire(node, 1, place.editor.constant(place.scope, f"{node.outputs[0].name}.pads", whole.reshape(-1)))
    place.editor.rewire(node, 3, gs.Variable.empty())
    return True


def _with_all_sizes(place: Place) -> bool:
    """A Resize of some axes with scales for each."""
    node, shape, axes = place.node, _shape(place), place.node.attrs.get("axes")
    special = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if not isinstance(axes, list) or shape is None or special or node.attrs.get("keep_aspect_ratio_policy"):
        return False
    sized = len(node.inputs) > 3 and bool(node.inputs[3].name)
    given = place.values(3 if sized else 2)
    if given is None:
        return False
    if sized:
        given = _scales([shape[axis] for axis in axes], given, node.attrs.get("mode", "nearest") == "nearest")
    if given is None:
        return False
    whole = np.ones(len(shape), np.float32)
    whole[axes] = given
    edit = place.editor
    edit.rewire(node, 2, edit.constant(place.scope, f"{node.outputs[0].name}.scales", whole))
    for index in range(1, len(node.inputs), 2):  # what is cut out, which does not count, and the sizes
        edit.rewire(node, index, gs.Variable.empty())
    edit.drop_attribute(place.scope, node, "axes")
    return True


def _scales(sizes: list[int | None], wanted: NDArray[Any], exact: bool) -> NDArray[np.float32] | None:
    """What sizes are multiplied by, so that the whole parts are what is wanted; None where they are not known.

    Args:
        exact: without a scale that is a little more than the ratio: it would move the nearest value.
    """
    if None in sizes:
        return None
    before = np.array(sizes, np.float32)
    scales = np.asarray(wanted / before, np.float32)
    short = np.floor(scales * before) < wanted
    if exact and short.any():
        return None
    return np.where(short, np.nextafter(scales, np.float32(np.inf)), scales)


def _shape(place: Place) -> tuple[int | None, ...] | None:
    """That of the first input, where there are no bodies or functions, whose values may have the same name."""
    edit = place.editor
    return edit.shapes.get(place.node.inputs[0].name) if len(edit.scopes) == 1 else None


FORMS: dict[str, Callable[[Place], bool]] = {
    "Gemm": _without_factors,
    "Pad": _with_all_pads,
    "Resize": _with_all_sizes,
}
"""What is done with a node, by its operator; whether it was changed."""
