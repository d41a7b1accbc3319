"""How the data of each layer drifts where the layers in front of it are quantized.

The float model and the one whose layers become quantized, one after the other, run side by side in pieces: up to the
next layer that is not decided yet, on what the pieces before have left on disk. So no node runs twice on a sample.
"""

import contextlib
import itertools
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from onnx_ocs import child
from onnx_ocs.errors import OcsError, RuntimeFailed
from onnx_ocs.graph.contraction import Contraction
from onnx_ocs.graph.model import Model, graphs, numpy_type
from onnx_ocs.graph.pieces import Pieces, with_constants
from onnx_ocs.graph.samples import Feed, read_samples
from onnx_ocs.graph.session import Session, run_samples
from onnx_ocs.moments import window_of
from onnx_ocs.numerics.drift import Drift, DriftRecorder
from onnx_ocs.numerics.moments import rows_of
from onnx_ocs.numerics.stored import load_arrays, save_arrays

WITHOUT = "--no-error-propagation does without it"

NOISY = {"Bernoulli", "Multinomial"}
"""Operators that do something else in each run, besides Random...; what differs by them is no error."""

ROWS = 32
"""Positions of the data of a convolution that are looked at in each batch at most, in inputs of an output."""

LEAST = 8
"""Samples of a batch that are looked at all the same."""

ROOM = 2**29
"""Bytes of the values that a piece of each model leaves to the next one, about; what goes beyond, later pieces miss."""


@dataclass(frozen=True)
class Request:
    """One piece to run."""

    exact: str  # path of the float piece
    follower: str  # of the same with quantized layers
    name: str  # of the user's model, for messages
    inputs: list[str]  # what the piece before has left
    outputs: list[str]  # what is left behind it
    layers: list[dict[str, Any]]  # Contraction, of those whose data is among that
    before: str | None  # folder of what the piece before has left
    batches: int  # of it
    after: str  # folder for what this one leaves
    samples: str
    limit: int | None
    batch: int


@dataclass(frozen=True, eq=False)
class Followed:
    """A layer as it is quantized."""

    weight_input: int
    weight: onnx.TensorProto
    added: onnx.TensorProto | None  # to its output, by its bias


@dataclass(frozen=True)
class Left:
    """What a piece has left for the next one."""

    folder: Path
    types: dict[str, int]  # of tensors
    batches: int


class Propagation:
    """The drift of the data of some layers, one after the other.

    Args:
        model: with all layers as floats.
        layers: by the tensor that each makes.
        samples: path.
        limit: samples at most.
    """

    def __init__(
        self,
        model: Model,
        layers: Mapping[str, Contraction],
        samples: Path,
        folder: Path,
        limit: int | None,
        batch: int,
        timeout: float,
    ) -> None:
        self._model, self._samples, self._folder = model, samples, folder
        self._limit, self._batch, self._timeout = limit, batch, timeout
        self._pieces, self._layers = Pieces(model, layers), layers
        places = {output: self._pieces.place(output) for output in layers}
        self._places = {output: place for output, place in places.items() if place is not None}
        self._followed: dict[str, Followed] = {}
        self._found: dict[str, Path] = {}  # of layers whose drift is known
        self._cut, self._number = 0, itertools.count()
        self._left: Left | None = None  # what is live at the cut
        self.failure = None if self._pieces.ordered else "the nodes of the graph are not in their order"
        """Why there is no more to find out."""

    def drift(self, output: str) -> Drift | None:
        """Of the data of the layer that makes ``output``; None where it is not known. Once for each, in their order."""
        place = self._places.get(output, -1)
        if self.failure is None and (self._followed or self._left) and place >= self._cut and output not in self._found:
            try:
                self._advance(place)
            except OcsError as error:
                self.failure = str(error).replace(str(self._folder), "samples")
        path = self._found.pop(output, None)
        if path is None or not path.exists():
            return None
        found = Drift.load(path)
        if path not in self._found.values():
            path.unlink()
        return found

    def follow(
        self, output: str, weight_input: int, weight: NDArray[Any], data_type: int, added: NDArray[Any] | None
    ) -> None:
        """From here on the layer that makes ``output`` has this weight, and this is added to its output."""
        if self.failure is None and self._places.get(output, -1) >= self._cut:
            self._followed[output] = Followed(
                weight_input,
                self._constant(f"onnx_ocs.weight.{output}", weight, data_type),
                None if added is None else self._constant(f"onnx_ocs.added.{output}", added, data_type),
            )

    def close(self) -> None:
        """Take away what lies on disk."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _constant(self, name: str, values: NDArray[Any], data_type: int) -> onnx.TensorProto:
        made = np.ascontiguousarray(values, numpy_type(data_type))
        return self._model.tensor(name, data_type, made.shape, made.tobytes())

    def _advance(self, cut: int) -> None:
        """Run up to a cut, and gather the drift of all layers whose data is there."""
        folder = self._folder / f"piece.{next(self._number)}"
        folder.mkdir(parents=True)
        before, types = self._left, self._left.types if self._left else {}
        exact, follower = self._written(cut, types, folder)
        here = {
            output: layer
            for output, layer in self._layers.items()
            if self._places.get(output, -1) >= cut
            and output not in self._found
            and self._pieces.reaches(layer.tensor, cut)
        }
        distinct = {layer.key: layer for layer in here.values()}
        request = Request(
            str(exact),
            str(follower),
            self._model.name,
            list(types),
            self._pieces.live(cut),
            [asdict(layer) for layer in distinct.values()],
            str(before.folder) if before else None,
            before.batches if before else 0,
            str(folder),
            str(self._samples),
            self._limit,
            self._batch,
        )
        answer = child.call("onnx_ocs.propagation", asdict(request), self._timeout, WITHOUT)
        exact.unlink()
        follower.unlink()
        for file in before.folder.glob("left.*") if before else ():
            file.unlink()
        places = {key: folder / f"drift.{number}" for number, key in enumerate(distinct)}
        self._found |= {output: places[layer.key] for output, layer in here.items()}
        self._cut, self._left = cut, Left(folder, answer["types"], answer["batches"])

    def _written(self, cut: int, types: Mapping[str, int], folder: Path) -> tuple[Path, Path]:
        """The next piece of both models, on what is live in front of it."""
        nodes = self._pieces.nodes[self._cut : cut]
        quantized: list[onnx.NodeProto] = []
        constants: list[onnx.TensorProto] = []
        for node in nodes:
            layer = self._followed.pop(node.output[0], None)
            if layer is None:
                quantized.append(node)
                continue
            added = None if layer.added is None else layer.added.name
            quantized += with_constants(node, {layer.weight_input: layer.weight.name}, added)
            constants += [tensor for tensor in (layer.weight, layer.added) if tensor is not None]
        exact, follower = folder / "exact.onnx", folder / "follower.onnx"
        self._pieces.between(self._cut, cut, types, nodes).save(exact)
        self._pieces.between(self._cut, cut, types, quantized, constants).save(follower)
        return exact, follower


def is_noisy(model: Model) -> bool:
    """Whether two runs on the same data may differ; Dropout does nothing unless an input says that it is training."""
    every = [graph for body in (model.proto.graph, *model.proto.functions) for graph in graphs(body)]
    nodes = [node for graph in every for node in graph.node]
    training = any(node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] for node in nodes)
    return training or any(node.op_type in NOISY or node.op_type.startswith("Random") for node in nodes)


def observe(request: Request, say: child.Report) -> dict[str, Any]:
    """Run all samples, write what is left of each batch, and the drift of layers; this is what the child does."""
    say(f"following errors through the layers of {request.name}")
    layers = [Contraction(**layer) for layer in request.layers]
    recorders = [DriftRecorder(layer.groups, layer.inputs) for layer in layers]
    sessions = [Session(Path(path)) for path in (request.exact, request.follower)]
    size, types, batches = 0, {}, 0
    with _opened(request.after, "wb") as files:
        for feeds in _feeds(request, sessions[0]):
            left = [
                feed | run_samples(session, {item.name: feed[item.name] for item in session.inputs}, request.name)
                for session, feed in zip(sessions, feeds, strict=True)
            ]
            for layer, recorder in zip(layers, recorders, strict=True):
                _record(recorder, layer, [values[layer.tensor] for values in left])
            for file, values in zip(files, left, strict=True):
                save_arrays(file, (_tensor(values, name) for name in request.outputs))
            types = {name: int(helper.np_dtype_to_tensor_dtype(left[0][name].dtype)) for name in request.outputs}
            batches += 1
            size += sum(left[0][name].nbytes for name in request.outputs)
            if size > ROOM:
                break
    for number, recorder in enumerate(recorders):
        if (made := recorder.finish()) is not None:
            made.save(Path(request.after, f"drift.{number}"))
    return {"types": types, "batches": batches}


@contextlib.contextmanager
def _opened(folder: str, mode: str) -> Iterator[list[IO[bytes]]]:
    """The files of what a piece of each model leaves."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Path(folder, f"left.{place}").open(mode)) for place in range(2)]


def _record(recorder: DriftRecorder, layer: Contraction, pair: list[NDArray[Any]]) -> None:
    """Fold in a batch of the data of a layer, in both models."""
    window = window_of(layer.window)
    if window is not None:
        pair = [values[: _enough(layer, values)] for values in pair]
    recorder.is_comparable &= pair[0].shape == pair[1].shape  # else an operator has selected other data
    if recorder.is_comparable:
        recorder.add(*(rows_of(values, layer.axis, layer.groups, window) for values in pair))


def _enough(layer: Contraction, values: NDArray[Any]) -> int:
    """Samples of a batch that have as many positions as the drift of a convolution needs."""
    positions = math.prod(values.shape[2:])
    return max(LEAST, -(-ROWS * layer.inputs // max(positions, 1)))


def _feeds(request: Request, exact: Session) -> Iterator[tuple[Feed, Feed]]:
    """What the pieces of both models run on, a batch after the other."""
    if request.before is None:
        for batch in read_samples(Path(request.samples), exact.inputs, request.batch, request.limit):
            yield batch.feed, batch.feed
        return
    with _opened(request.before, "rb") as files:
        for _ in range(request.batches):
            first, second = (
                dict(zip(request.inputs, load_arrays(file, len(request.inputs)), strict=True)) for file in files
            )
            yield first, second


def _tensor(values: Feed, name: str) -> NDArray[Any]:
    """What is left under a name.

    Raises:
        RuntimeFailed: it cannot be kept.
    """
    found = values.get(name)
    if found is None or found.dtype.hasobject:
        raise RuntimeFailed(f"{name!r} is no tensor of numbers")
    return found


def answer(asked: dict[str, Any], say: child.Report) -> dict[str, Any]:
    """What the child does."""
    return observe(Request(**asked), say)
