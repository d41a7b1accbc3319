"""A model in, a model out: the skeleton as a proto, the payloads where they are until someone reads them.

``Model.proto`` is the source's ``ModelProto`` whose large payloads are replaced by a reference (an entry
``onnx_ocs.blob`` among the external data, which never reaches a file). The bytes stay in the memory-mapped source,
are read one tensor at a time, and are copied to the target one tensor at a time: peak memory follows the largest
tensor, not the model. Everything but the payloads is ordinary protobuf, so nothing that the source holds is lost.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from onnx_ocs.errors import UnsupportedModel
from onnx_ocs.graph import files, wire

BLOB = "onnx_ocs.blob"
SMALL = 1024
"""Payloads below this many bytes stay in the skeleton, where shape inference and the converter can read them."""

EMBED_LIMIT = 2**31 - 2**20
"""A protobuf message holds at most 2 GiB; beyond this the weights go into a file of their own."""


@dataclass(frozen=True)
class Blob:
    """The payload of one tensor: a view of a memory-mapped file or of a buffer, or the recipe to make it."""

    payload: wire.Chunk
    field: int = wire.RAW_DATA  # the field of TensorProto that the payload belongs to
    source: wire.Buffer | None = None  # the whole TensorProto in the source, payload and all


class Model:
    """A model whose large payloads stay outside of ``proto``."""

    def __init__(self, name: str, folder: Path | None) -> None:
        self.name = name  # for messages
        self.proto = onnx.ModelProto()
        self._blobs: list[Blob] = []
        self._external = files.ExternalData(name, folder)
        self._spool = files.Spool()

    @classmethod
    def load(cls, source: Path | str | onnx.ModelProto) -> "Model":
        """Read a model; the payloads of its weights are read when they are needed.

        Raises:
            UnsupportedModel: the file is missing, empty, cut short, or not a model; external data is missing,
                too short, or outside of the model's folder.
        """
        if isinstance(source, onnx.ModelProto):
            model, data = cls("the given model", None), memoryview(source.SerializeToString())
        else:
            model, data = cls(str(source), files.real(source).parent), files.map_file(Path(source))
        try:
            model.proto.ParseFromString(b"".join(wire.buffers(wire.rewrite(data, model._detach))))
        except (wire.Malformed, DecodeError) as error:
            raise UnsupportedModel(f"{model.name}: not an ONNX model, or cut short ({error}); check the file") from None
        if not (model.proto.HasField("graph") and (model.proto.opset_import or model.proto.ir_version)):
            raise UnsupportedModel(f"{model.name}: not an ONNX model: it holds no graph; check the file")
        return model

    def sharing(self, proto: onnx.ModelProto) -> "Model":
        """A model of ``proto``, whose tensors refer to the payloads of this one."""
        made = copy.copy(self)
        made.proto = proto
        return made

    def opset(self) -> int:
        """Version of the standard operators; 1 where the model names none."""
        return opset_of(self.proto.opset_import)

    def read(self, tensor: onnx.TensorProto) -> NDArray[Any]:
        """The values of ``tensor``: a read-only view of the source where its bytes are the values."""
        if (blob := self._blob(tensor)) is None:
            return onnx.numpy_helper.to_array(tensor)
        (payload,) = wire.buffers([blob.payload])
        if tensor.data_type in PACKED:
            whole = onnx.TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=bytes(payload))
            return onnx.numpy_helper.to_array(whole)
        return np.frombuffer(payload, numpy_type(tensor.data_type)).reshape(tuple(tensor.dims))

    def tensor(self, name: str, data_type: int, shape: tuple[int, ...], payload: bytes | wire.Lazy) -> onnx.TensorProto:
        """A new constant; ``payload`` is its raw data."""
        made = onnx.TensorProto(name=name, data_type=data_type, dims=shape)
        if isinstance(payload, wire.Lazy):
            self._refer(made, Blob(payload))
        elif len(payload) < SMALL:
            made.raw_data = payload
        else:
            self._refer(made, Blob(self._spool.keep(payload)))
        return made

    def digest(self) -> str:
        """The SHA-256 of the serialized model with its weights, by which it is known again."""
        found = hashlib.sha256()
        for buffer in wire.buffers(self.chunks()):
            found.update(buffer)
        return found.hexdigest()

    def nbytes(self) -> int:
        """Bytes of the serialized model with its weights."""
        return wire.size(self.chunks())

    def chunks(self) -> wire.Chunks:
        """The serialized model with its weights inside, as pieces to be written one after the other."""
        return wire.rewrite(self._skeleton(), self._embed)

    def whole(self) -> onnx.ModelProto:
        """The model as one proto with its weights inside."""
        return onnx.ModelProto.FromString(b"".join(wire.buffers(self.chunks())))

    def bare(self) -> onnx.ModelProto:
        """The skeleton with empty tensors in place of large payloads: all that a structural check needs."""

        def empty(data: wire.Buffer) -> wire.Chunks | None:
            tensor = onnx.TensorProto.FromString(data)
            if self._blob(tensor) is None:
                return None
            return [
                memoryview(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]).SerializeToString())
            ]

        return onnx.ModelProto.FromString(b"".join(wire.buffers(wire.rewrite(self._skeleton(), empty))))

    def save(self, path: Path, external: bool = False) -> None:
        """Write the model, whole or not at all; its weights into a file beside it if ``external`` or beyond 2 GiB.

        Raises:
            CannotWrite: the target cannot be written; what stood there before is untouched.
        """
        if external or self.nbytes() > EMBED_LIMIT:
            self._save_external(path)
        else:
            files.write(path, self.chunks())

    def _save_external(self, path: Path) -> None:
        """The weights first, under a name made of their content, so that no other write can disturb them."""
        placed: dict[str, tuple[int, int]] = {}  # blob -> offset, length

        def place() -> Iterator[wire.Chunk]:
            position = 0
            for key, blob in self._referenced():
                if key not in placed:
                    padding = bytes(-position % files.ALIGNMENT)
                    yield memoryview(padding)
                    yield blob.payload
                    placed[key] = position + len(padding), blob.payload.nbytes
                    position += len(padding) + blob.payload.nbytes

        def locate(data: wire.Buffer) -> wire.Chunks | None:
            tensor = onnx.TensorProto.FromString(data)
            if self._blob(tensor) is None:
                return None
            offset, length = placed[_reference(tensor)]
            del tensor.external_data[:]
            for key, value in (("location", name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            return [memoryview(tensor.SerializeToString(deterministic=True))]

        name = files.write_data(path, place())
        files.write(path, wire.rewrite(self._skeleton(), locate))

    def _skeleton(self) -> wire.Buffer:
        return memoryview(self.proto.SerializeToString(deterministic=True))

    def _referenced(self) -> Iterator[tuple[str, Blob]]:
        for tensor in tensors(self.proto):
            if (blob := self._blob(tensor)) is not None:
                yield _reference(tensor), blob

    def _blob(self, tensor: onnx.TensorProto) -> Blob | None:
        if tensor.data_location != onnx.TensorProto.EXTERNAL or not (key := _reference(tensor)):
            return None
        return self._blobs[int(key)]

    def _refer(self, tensor: onnx.TensorProto, blob: Blob) -> None:
        """Let ``blob`` stand for the payload of ``tensor``."""
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        tensor.external_data.add(key=BLOB, value=str(len(self._blobs)))
        self._blobs.append(blob)

    def _detach(self, data: wire.Buffer) -> wire.Chunks | None:
        """A tensor of the source with a reference in place of its payload; None where it is small."""
        parts = list(wire.fields(data))
        payload = next((item for item in parts if item.is_payload and item.stop - item.body >= SMALL), None)
        if payload is None and data.nbytes >= 4 * SMALL and all(item.number != wire.EXTERNAL_DATA for item in parts):
            return None  # values in a field of numbers, which only protobuf can read
        head = data[: payload.start].tobytes() + data[payload.stop :].tobytes() if payload else data.tobytes()
        tensor = onnx.TensorProto.FromString(head)
        if payload is not None:
            blob = Blob(data[payload.body : payload.stop], payload.number, data)
            expected = self._stored_size(tensor)
            if blob.payload.nbytes != expected:
                raise UnsupportedModel(
                    f"{self.name}: tensor {tensor.name!r} has {blob.payload.nbytes} bytes where its shape "
                    f"{list(tensor.dims)} needs {expected}; export the model again"
                )
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            found = self._external.find(tensor, self._stored_size(tensor))
            blob = Blob(found)
            if found.nbytes < SMALL:
                tensor.ClearField("data_location")
                tensor.ClearField("external_data")
                (payload_bytes,) = wire.buffers([found])
                tensor.raw_data = bytes(payload_bytes)
                return [memoryview(tensor.SerializeToString())]
        else:
            return None
        self._refer(tensor, blob)
        return [memoryview(tensor.SerializeToString())]

    def _stored_size(self, tensor: onnx.TensorProto) -> int:
        try:
            return stored_size(tensor)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{self.name}: {error} (tensor {tensor.name!r})") from None

    def _embed(self, data: wire.Buffer) -> wire.Chunks | None:
        """A tensor of the skeleton with its payload inside."""
        tensor = onnx.TensorProto.FromString(data)
        if (blob := self._blob(tensor)) is None:
            return None
        if blob.source is not None:
            return [blob.source]
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        head = memoryview(tensor.SerializeToString(deterministic=True))
        return [head, wire.tag(blob.field, blob.payload.nbytes), blob.payload]


PACKED = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1} | {
    getattr(onnx.TensorProto, name) for name in ("INT2", "UINT2") if hasattr(onnx.TensorProto, name)
}
"""Types of which several share a byte."""


def numpy_type(data_type: int) -> np.dtype[Any]:
    """The numpy type of an ONNX element type, little-endian (bfloat16 and its like by ml_dtypes)."""
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type))
    except (KeyError, TypeError):
        raise UnsupportedModel(f"a tensor is of the unknown element type {data_type}; export the model again") from None


def count(dims: Iterable[int]) -> int:
    """Number of elements of a tensor of this shape."""
    total = 1
    for dim in dims:
        total *= dim
    return total


def stored_size(tensor: onnx.TensorProto) -> int:
    """Bytes of the raw data of ``tensor``."""
    if tensor.data_type not in PACKED:
        return count(tensor.dims) * numpy_type(tensor.data_type).itemsize
    bits = 2 if onnx.TensorProto.DataType.Name(tensor.data_type) in ("INT2", "UINT2") else 4
    return (count(tensor.dims) * bits + 7) // 8


def opset_of(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    """Version of the standard operators among ``imports``; 1 where they are not named."""
    return next((item.version for item in imports if item.domain in ("", "ai.onnx")), 1)


def tensors(message: onnx.ModelProto | onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """All tensors below ``message``: initializers, attributes, subgraphs, functions."""
    if isinstance(message, onnx.ModelProto):
        yield from tensors(message.graph)
        for function in message.functions:
            yield from tensors(function)
        for training in message.training_info:
            yield from tensors(training.initialization)
            yield from tensors(training.algorithm)
        return
    if isinstance(message, onnx.GraphProto):
        yield from message.initializer
        for sparse in message.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    attributes = [attribute for node in message.node for attribute in node.attribute]
    if isinstance(message, onnx.FunctionProto):
        attributes += message.attribute_proto
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        if attribute.HasField("g"):
            yield from tensors(attribute.g)
        for graph in attribute.graphs:
            yield from tensors(graph)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds: of If, Loop, Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs(body: onnx.GraphProto | onnx.FunctionProto) -> Iterator[Any]:
    """``body`` and all bodies in it."""
    yield body
    for node in body.node:
        for inner in bodies(node):
            yield from graphs(inner)


def _reference(tensor: onnx.TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == BLOB), "")
