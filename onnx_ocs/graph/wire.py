"""The tensors inside a serialized model, without loading them: a walk over protobuf's wire format.

A model is a tree of length-prefixed messages. :func:`rewrite` walks down to each ``TensorProto``, lets a function
replace its bytes, and fixes the lengths on the way up. Loading replaces payloads by references, saving puts payloads
back; neither holds more than the references in memory. Field numbers are those of ``onnx.proto``.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

RAW_DATA, FLOAT_DATA, DOUBLE_DATA = 9, 4, 10
"""Fields of ``TensorProto`` whose bytes are the values themselves, little-endian."""

EXTERNAL_DATA = 13
"""The field of ``TensorProto`` that says where its values are."""

Buffer = memoryview


@dataclass(frozen=True)
class Lazy:
    """``nbytes`` bytes that are made when they are written, so that no one holds them before or after."""

    nbytes: int
    make: Callable[[], bytes | bytearray | memoryview]


Chunk = Buffer | Lazy
Chunks = list[Chunk]
Replace = Callable[[Buffer], Chunks | None]  # None: leave this tensor as it is

DEEPEST = 100
"""Levels of nesting, as in protobuf itself."""


@dataclass(frozen=True)
class Message:
    """Which fields of a message lead to tensors."""

    children: dict[int, "Message"] = field(default_factory=dict)


TENSOR = Message()
SPARSE = Message({1: TENSOR, 2: TENSOR})
GRAPH, NODE, ATTRIBUTE = Message(), Message(), Message()
GRAPH.children.update({1: NODE, 5: TENSOR, 15: SPARSE})
NODE.children.update({5: ATTRIBUTE})
ATTRIBUTE.children.update({5: TENSOR, 6: GRAPH, 10: TENSOR, 11: GRAPH, 22: SPARSE, 23: SPARSE})
FUNCTION = Message({7: NODE, 11: ATTRIBUTE})
TRAINING = Message({1: GRAPH, 2: GRAPH})
MODEL = Message({7: GRAPH, 20: TRAINING, 25: FUNCTION})


class Malformed(ValueError):
    """The bytes are not a protobuf message."""


@dataclass(frozen=True)
class Field:
    """One field of a message: ``data[start:stop]`` with its key, ``data[body:stop]`` without key and length."""

    number: int
    kind: int
    start: int
    body: int
    stop: int

    @property
    def is_payload(self) -> bool:
        """Of a tensor: whether the field holds its values as they are in memory."""
        return self.kind == BYTES and self.number in (RAW_DATA, FLOAT_DATA, DOUBLE_DATA)


def fields(data: Buffer) -> Iterator[Field]:
    """The fields of the message ``data`` in order.

    Raises:
        Malformed: a field runs past the end, or its kind is unknown.
    """
    position, end = 0, len(data)
    while position < end:
        start = position
        key, position = _varint(data, position)
        kind = key & 7
        body = position
        if kind == VARINT:
            _, position = _varint(data, position)
        elif kind == FIXED64:
            position += 8
        elif kind == FIXED32:
            position += 4
        elif kind == BYTES:
            length, body = _varint(data, position)
            position = body + length
        else:
            raise Malformed(f"wire type {kind} at byte {start}")
        if position > end or key < 8:
            raise Malformed(f"field {key >> 3} at byte {start} runs past the end")
        yield Field(key >> 3, kind, start, body, position)


def rewrite(data: Buffer, replace: Replace) -> Chunks:
    """The model with each tensor in it given to ``replace``, as pieces to be written one after the other.

    Whatever is not replaced keeps its bytes: pieces of the source are views, not copies.

    Raises:
        Malformed: ``data`` is not a model.
    """
    return _rewrite(data, replace, MODEL, DEEPEST) or [data]


def _rewrite(data: Buffer, replace: Replace, message: Message, depth: int) -> Chunks | None:
    """As :func:`rewrite`, for any message; None where nothing in it was replaced."""
    if message is TENSOR:
        return replace(data)
    if not depth:
        raise Malformed("messages are nested too deeply")
    chunks: Chunks = []
    kept = 0
    for item in fields(data):
        child = message.children.get(item.number)
        if child is None or item.kind != BYTES:
            continue
        inside = _rewrite(data[item.body : item.stop], replace, child, depth - 1)
        if inside is None:
            continue
        chunks += [data[kept : item.start], tag(item.number, size(inside)), *inside]
        kept = item.stop
    return [*chunks, data[kept:]] if chunks else None


def tag(number: int, length: int) -> Buffer:
    """Key and length of a length-prefixed field."""
    return memoryview(_encode(number << 3 | BYTES) + _encode(length))


def size(chunks: Chunks) -> int:
    """Bytes in all."""
    return sum(chunk.nbytes for chunk in chunks)


def buffers(chunks: Iterable[Chunk]) -> Iterator[Buffer]:
    """The bytes of the chunks; those of lazy ones are made now."""
    for chunk in chunks:
        yield memoryview(chunk.make()) if isinstance(chunk, Lazy) else chunk


def _varint(data: Buffer, position: int) -> tuple[int, int]:
    value = shift = 0
    end = len(data)
    while True:
        if position >= end or shift > 63:
            raise Malformed(f"a number runs past the end at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
