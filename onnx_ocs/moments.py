"""Second moments of the data of layers, gathered while onnxruntime runs the samples in a process of its own.

The data leaves onnxruntime whole, batch by batch, and is folded into sums. The sums of one layer are as large as the
square of what an output of it is a sum over; where those of all layers are too many, the samples run again for the
next ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from onnx_ocs import child
from onnx_ocs.calibrate import BATCH, not_finite
from onnx_ocs.errors import BadSamples, RuntimeFailed, UnsupportedModel
from onnx_ocs.graph.contraction import Contraction
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.samples import Batch, read_samples
from onnx_ocs.graph.session import Session, run_samples
from onnx_ocs.numerics.moments import MomentRecorder, Moments, Window, rows_of

LARGEST = 8192
"""Inputs of an output at most: their moments take half a gigabyte, and their factor a minute."""

ROOM = 2**28
"""Bytes that the sums of the layers of one run over the samples take at most."""


@dataclass(frozen=True)
class Request:
    """What to gather."""

    model: str  # path of the model whose outputs are the data
    name: str  # of the user's model, for messages
    layers: list[dict[str, Any]]  # Contraction
    samples: str  # path
    folder: str  # of the moments
    first: int  # number of the first layer
    second: bool
    limit: int | None
    batch: int


def gather(
    model: Model,
    layers: Sequence[Contraction],
    samples: Path,
    folder: Path,
    limit: int | None = None,
    batch: int = BATCH,
    second: bool = True,
    timeout: float = child.TIMEOUT,
    without: str = "--round compensated does without it",
) -> dict[str, "Stored"]:
    """The moments of the data of ``layers`` over ``samples``, by :attr:`Contraction.key`; they stay on disk.

    Layers with more than :data:`LARGEST` inputs to an output are left out of the second ones.

    Args:
        second: or only the first moments.
        without: what to do where it crashes.

    Raises:
        BadSamples: they do not fit the model, or lead to values that are not finite.
        UnsupportedModel: onnxruntime refuses the model.
        RuntimeFailed: it crashed or ran out of time.
    """
    wanted = list({layer.key: layer for layer in layers if not second or layer.inputs <= LARGEST}.values())
    first = 0
    for part in _parts(wanted) if second else [wanted]:
        path = folder / "exposing.onnx"
        _exposing(model, part).save(path)
        asked = [asdict(layer) for layer in part]
        request = Request(str(path), model.name, asked, str(samples), str(folder), first, second, limit, batch)
        child.call("onnx_ocs.moments", asdict(request), timeout, without)
        path.unlink()
        first += len(part)
    return {layer.key: Stored(folder, number) for number, layer in enumerate(wanted)}


@dataclass(frozen=True)
class Stored:
    """Moments on disk."""

    folder: Path
    number: int

    def path(self, figure: str) -> Path:
        return self.folder / f"moments.{self.number}.{figure}.npy"

    def load(self) -> Moments:
        """The moments; the second ones are read when they are used."""
        second = self.path("second")
        return Moments(np.load(self.path("mean")), np.load(second, mmap_mode="r") if second.exists() else None)


def _parts(layers: Sequence[Contraction]) -> list[list[Contraction]]:
    """The layers whose sums are held at a time."""
    parts: list[list[Contraction]] = []
    held = ROOM
    for layer in layers:
        size = 8 * layer.groups * layer.inputs**2
        if held + size > ROOM:
            parts.append([])
            held = 0
        parts[-1].append(layer)
        held += size
    return parts


def _exposing(model: Model, layers: Sequence[Contraction]) -> Model:
    """The model whose outputs are the data of the layers, as float32."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.output[:]
    kinds = {layer.tensor: layer.data_type for layer in layers}
    for name, kind in kinds.items():
        to: dict[str, Any] = {} if kind == onnx.TensorProto.FLOAT else {"to": int(onnx.TensorProto.FLOAT)}
        proto.graph.node.append(helper.make_node("Cast" if to else "Identity", [name], [_exposed(name)], **to))
        proto.graph.output.append(helper.make_tensor_value_info(_exposed(name), onnx.TensorProto.FLOAT, None))
    return model.sharing(proto)


def _exposed(name: str) -> str:
    return f"onnx_ocs.exposed.{name}"


def observe(request: Request, say: child.Report) -> dict[str, Any]:
    """Run all samples, fold each batch in, and write the moments; this is what the child does."""
    say(f"loading {request.name} for second moments")
    ort.set_seed(0)  # of nodes that are random
    layers = [Contraction(**layer) for layer in request.layers]
    try:
        session = Session(Path(request.model))
    except RuntimeFailed as error:
        raise UnsupportedModel(
            f"{request.name}: onnxruntime cannot load it to gather second moments ({error}); --round compensated needs "
            "none"
        ) from None
    recorders = [MomentRecorder(layer.groups, layer.inputs, request.second) for layer in layers]

    def broken(batch: Batch) -> str | None:
        found = run_samples(session, batch.feed, request.name)
        return next((layer.tensor for layer in layers if not _is_finite(found[_exposed(layer.tensor)])), None)

    samples = 0
    for batch in read_samples(Path(request.samples), session.inputs, request.batch, request.limit):
        say(f"gathering second moments of {request.name}")
        found = run_samples(session, batch.feed, request.name)
        for layer, recorder in zip(layers, recorders, strict=True):
            values, window = found[_exposed(layer.tensor)], window_of(layer.window)
            if not _is_finite(values):
                raise BadSamples(f"{request.samples}: {not_finite(batch, samples, broken, request.name)}")
            times = 1
            if window is not None and not request.second and len(values):  # the mean has the mean of the patches
                times, values = len(values), values.mean(axis=0, keepdims=True)
            recorder.add(rows_of(values, layer.axis, layer.groups, window), times)
        samples += batch.count
        found.clear()  # before the next batch is made
    for number, (layer, recorder) in enumerate(zip(layers, recorders, strict=True), request.first):
        stored = Stored(Path(request.folder), number)
        try:
            made = recorder.finish()
        except ValueError:
            raise BadSamples(
                f"{request.samples}: tensor {layer.tensor!r} is empty on these samples; give others"
            ) from None
        np.save(stored.path("mean"), made.mean)
        if made.second is not None:
            np.save(stored.path("second"), made.second)
    return {}


def _is_finite(values: NDArray[np.float32]) -> bool:
    return math.isfinite(float(values.sum(dtype=np.float64)))


def window_of(plain: Mapping[str, Any] | None) -> Window | None:
    """Of :attr:`Contraction.window`."""
    if plain is None:
        return None
    figures = {name: tuple(value) for name, value in plain.items() if name != "auto_pad"}
    return Window(**figures, auto_pad=plain["auto_pad"])


def answer(asked: dict[str, Any], say: child.Report) -> dict[str, Any]:
    """What the child does."""
    return observe(Request(**asked), say)
