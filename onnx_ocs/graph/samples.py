"""Samples for the inputs of a model: read from files in batches, or generated from a seed."""

import contextlib
import itertools
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx.numpy_helper
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from onnx_ocs.errors import BadSamples

Feed = dict[str, NDArray[Any]]
Samples = str | Path | NDArray[Any] | Mapping[str, NDArray[Any]] | Iterable[Any]
"""A file or folder, the arrays that an .npz or .npy would hold, or an iterable of such arrays, a few samples each."""
LABELS = ("label", "labels")
"""Arrays of these names hold the class of each sample, not an input."""

TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}


@dataclass(frozen=True)
class Input:
    """One input of a model, as onnxruntime tells it."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        if self.type not in TYPES:
            raise BadSamples(f"input {self.name!r} is of type {self.type}, for which samples are not supported")
        return np.dtype(TYPES[self.type])


@dataclass(frozen=True)
class Batch:
    """Some samples, and their classes where these are known."""

    feed: Feed
    labels: NDArray[np.integer] | None = None
    count: int = 1  # samples in it


def read_samples(path: Path, inputs: list[Input], batch: int = 32, limit: int | None = None) -> Iterator[Batch]:
    """The samples of a file or folder, at most ``limit``, in batches that the inputs accept.

    ``.npz`` has one array for each input, ``.npy`` is for models of one input; a folder holds such files, or ONNX
    test data (``input_0.pb`` ...). The first axis of an array counts the samples: it is the first axis of the input,
    or comes before it where the array has one dimension more.

    Raises:
        BadSamples: the file cannot be read, or its arrays do not fit the inputs.
    """
    left = limit
    for file in _files(path):
        for made in _batches(file, inputs, batch, left):
            yield made
            if left is not None:
                left -= made.count
                if left <= 0:
                    return


def stored(samples: Samples, folder: Path, limit: int | None = None) -> Path:
    """The path of ``samples``; arrays are written to ``folder`` first, one file after the other as they come.

    Args:
        limit: an iterable is not read beyond so many items.

    Raises:
        BadSamples: an item is neither an array nor arrays by name.
    """
    if isinstance(samples, str | Path):
        return Path(samples)
    if not isinstance(samples, Iterable):
        raise BadSamples(f"samples are a path, arrays, or an iterable of arrays, not a {type(samples).__name__}")
    folder.mkdir()
    items = [samples] if isinstance(samples, np.ndarray | Mapping) else itertools.islice(samples, limit)
    for number, item in enumerate(items):
        if isinstance(item, Mapping):
            arrays: dict[str, Any] = {name: np.asarray(values, order="C") for name, values in item.items()}
            np.savez(folder / f"{number:08}.npz", **arrays)
        elif isinstance(item, np.ndarray):
            np.save(folder / f"{number:08}.npy", np.asarray(item, order="C"))
        else:
            raise BadSamples(f"sample {number} is a {type(item).__name__}; give an array, or a dict of them by input")
    if not any(folder.iterdir()):
        raise BadSamples("the given samples are none; give at least one")
    return folder


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise BadSamples(f"{path}: no such file or folder; check the path of the samples")
    if path.is_file():
        return [path]
    found = sorted(
        {
            item.parent if item.suffix == ".pb" else item
            for item in path.rglob("*")
            if item.suffix in (".npz", ".npy", ".pb")
        }
    )
    if not found:
        raise BadSamples(f"{path}: the folder holds no .npz, .npy or .pb files")
    return found


def _batches(path: Path, inputs: list[Input], batch: int, limit: int | None) -> Iterator[Batch]:
    if path.is_dir():
        yield Batch(_test_data(path, inputs))
        return
    try:
        with _arrays(path, inputs) as arrays:
            yield from arrays.batches(batch, limit)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise BadSamples(f"{path}: cannot be read as {path.suffix or 'samples'} ({error})") from None


def _test_data(folder: Path, inputs: list[Input]) -> Feed:
    """``input_0.pb`` ... of one ONNX test-data folder."""
    feed: Feed = {}
    for index, item in enumerate(inputs):
        file = folder / f"input_{index}.pb"
        if not file.exists():
            raise BadSamples(f"{file}: missing; the model's input {item.name!r} needs it")
        try:
            values = onnx.numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))
        except (DecodeError, ValueError, TypeError) as error:
            raise BadSamples(f"{file}: not a serialized tensor ({error})") from None
        _fit(file, item, values.dtype, values.shape)
        feed[item.name] = values
    return feed


class _Stream:
    """An array in ``.npy`` format, read from its first axis on."""

    def __init__(self, file: IO[bytes]) -> None:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, fortran, self.dtype = read(file)
        if self.dtype.hasobject:
            raise ValueError("it holds Python objects")
        if fortran and len(self.shape) > 1:
            raise ValueError("it is in Fortran order; save it with numpy.ascontiguousarray")
        self._file = file

    def take(self, number: int) -> NDArray[Any]:
        """The next ``number`` entries."""
        return self._read((number, *self.shape[1:]))

    def take_all(self) -> NDArray[Any]:
        """The whole array."""
        return self._read(self.shape)

    def _read(self, shape: tuple[int, ...]) -> NDArray[Any]:
        wanted = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        data = self._file.read(wanted)
        if len(data) != wanted:
            raise ValueError("it is cut short")
        return np.frombuffer(data, self.dtype).reshape(shape)


class _arrays:
    """The arrays of one file, read side by side."""

    def __init__(self, path: Path, inputs: list[Input]) -> None:
        self._path, self._inputs = path, inputs
        self._streams: dict[str, _Stream] = {}
        self._names: list[str] = []
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "_arrays":
        with contextlib.ExitStack() as opening:
            self._enter(opening)
            self._open = opening.pop_all()
        return self

    def _enter(self, opening: contextlib.ExitStack) -> None:
        if self._path.suffix == ".npz":
            archive = opening.enter_context(zipfile.ZipFile(self._path))
            self._names = [member.removesuffix(".npy") for member in archive.namelist()]
            for name in {*(item.name for item in self._inputs), *LABELS}.intersection(self._names):
                self._streams[name] = _Stream(opening.enter_context(archive.open(f"{name}.npy")))
        elif self._path.suffix == ".npy":
            if len(self._inputs) != 1:
                raise BadSamples(
                    f"{self._path}: the model has {len(self._inputs)} inputs; give an .npz with all of them"
                )
            self._streams[self._inputs[0].name] = _Stream(opening.enter_context(self._path.open("rb")))
        else:
            raise BadSamples(f"{self._path}: samples are .npz, .npy, or a folder of them or of .pb files")

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def batches(self, batch: int, limit: int | None) -> Iterator[Batch]:
        lengths = {}
        for item in self._inputs:
            if item.name not in self._streams:
                raise BadSamples(
                    f"{self._path}: no array for input {item.name!r}; it has {', '.join(sorted(self._names)) or 'none'}"
                )
            stream = self._streams[item.name]
            stacked = len(stream.shape) == len(item.shape) + 1
            _fit(self._path, item, stream.dtype, stream.shape[1:] if stacked else stream.shape, samples=not stacked)
            lengths[item.name] = stream.shape[0] if stream.shape else 0
            fixed = item.shape[0] if item.shape else 1
            batch = 1 if stacked else fixed if isinstance(fixed, int) and fixed > 0 else batch
        if len(set(lengths.values())) > 1 and self._is_one_feed(lengths):
            yield Batch({item.name: self._streams[item.name].take_all() for item in self._inputs})
            return
        if len(set(lengths.values())) != 1:
            raise BadSamples(f"{self._path}: the inputs have different numbers of samples: {lengths}")
        (total,) = set(lengths.values())
        found = (self._streams[name] for name in LABELS if name in self._streams)
        labels = next((stream for stream in found if stream.shape[:1] == (total,)), None)
        ragged = all(not isinstance(item.shape[0], int) for item in self._inputs if item.shape)
        if limit is not None:  # one batch at least where the model takes no smaller one
            total = min(total, limit if ragged else max(limit, batch))
        for start in range(0, total, batch):
            number = min(batch, total - start)
            if number < batch and not ragged:
                break  # the model takes whole batches only
            yield self._next(number, labels)

    def _is_one_feed(self, lengths: dict[str, int]) -> bool:
        """Whether the arrays are what the model takes at once, with first axes that mean different things.

        Those with the same name of the first dimension have to agree all the same, and so have two without a name.
        """
        by_name: dict[int | str | None, set[int]] = {}
        for item in self._inputs:
            if len(self._streams[item.name].shape) != len(item.shape):
                return False
            if item.shape:
                by_name.setdefault(item.shape[0], set()).add(lengths[item.name])
        return all(len(found) == 1 for found in by_name.values())

    def _next(self, number: int, labels: _Stream | None) -> Batch:
        feed = {}
        for item in self._inputs:
            stream = self._streams[item.name]
            values = stream.take(number)
            feed[item.name] = values[0] if len(stream.shape) == len(item.shape) + 1 else values
        return Batch(feed, labels.take(number) if labels is not None and len(labels.shape) == 1 else None, number)


def _fit(path: Path, item: Input, dtype: np.dtype[Any], shape: tuple[int, ...], samples: bool = False) -> None:
    """Refuse an array that the input cannot take."""
    if dtype != item.dtype:
        order = " of the other byte order" if dtype.newbyteorder() == item.dtype else ""
        taken = f"input {item.name!r} takes {item.dtype.name}, not {dtype.name}{order}"
        raise BadSamples(f"{path}: {taken}; convert the samples (numpy.ndarray.astype)")
    fixed = item.shape[1:] if samples else item.shape
    given = shape[1:] if samples else shape
    if len(shape) != len(item.shape) or any(
        isinstance(want, int) and want != have for want, have in zip(fixed, given, strict=False)
    ):
        wanted = [size if isinstance(size, int) else "?" for size in item.shape]
        raise BadSamples(f"{path}: input {item.name!r} takes shape {wanted}, not {list(shape)}; reshape the samples")


@dataclass(frozen=True)
class Guess:
    """How free dimensions and values are chosen for generated samples."""

    batch: int  # for a first dimension that is free
    size: int  # for the others
    integers: int  # exclusive upper bound of integers that index nothing known
    positive: bool = False
    inner: bool = False  # the only free dimension of an input is that of the batch, as in (layers, N, hidden)


GUESSES = (
    Guess(2, 16, 2),
    Guess(1, 32, 2),
    Guess(1, 224, 2),
    Guess(1, 64, 2),
    Guess(1, 8, 2, positive=True),
    Guess(1, 1, 2),
    Guess(1, 1, 1),
    Guess(2, 2, 2),
    Guess(1, 128, 2),
    Guess(4, 4, 4, positive=True),
    Guess(1, 256, 2),
    Guess(1, 512, 2, positive=True),
    Guess(1, 224, 2, inner=True),
    Guess(1, 512, 2, inner=True),
)
"""Tried in this order until the model runs and its outputs are finite."""


def generate(inputs: list[Input], guess: Guess, bounds: dict[str, int], rng: np.random.Generator) -> Feed:
    """One batch of samples by names, types and shapes.

    Args:
        bounds: for inputs that index a table, the length of the table.

    Raises:
        BadSamples: an input is of a type that cannot be generated.
    """
    sizes: dict[str, int] = {}
    feed: Feed = {}
    for item in inputs:
        shape = []
        alone = sum(not isinstance(size, int) or size < 0 for size in item.shape) == 1
        for axis, size in enumerate(item.shape):
            if isinstance(size, int) and size >= 0:
                shape.append(size)
            else:
                free = guess.batch if axis == 0 or (guess.inner and alone) else guess.size
                shape.append(sizes.setdefault(size, free) if isinstance(size, str) else free)
        feed[item.name] = _values(item, tuple(shape), guess, bounds.get(item.name), rng)
    return feed


def is_mask(name: str) -> bool:
    """Whether an input says by its name that it masks others."""
    return "mask" in name.lower()


def _values(
    item: Input, shape: tuple[int, ...], guess: Guess, bound: int | None, rng: np.random.Generator
) -> NDArray[Any]:
    if item.dtype.kind == "f":
        values = rng.random(shape) if guess.positive else rng.standard_normal(shape)
        return np.asarray(values).astype(item.dtype)
    if item.dtype.kind == "b" or is_mask(item.name):
        return np.ones(shape, item.dtype)
    if item.dtype.kind == "O":
        return np.full(shape, "a", object)
    return np.asarray(rng.integers(0, max(1, bound or guess.integers), shape)).astype(item.dtype)
