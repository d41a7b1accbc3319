"""Files: memory-mapped in, replaced whole or not at all."""

import contextlib
import hashlib
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import onnx

from onnx_ocs.errors import CannotWrite, UnsupportedModel
from onnx_ocs.graph.wire import Chunk, Lazy, buffers

ALIGNMENT = 64
"""Of a tensor in a file of external data, so that a runtime can map it."""

IN_MEMORY = 2**27
"""New payloads beyond this many bytes wait for the save in a temporary file."""

PIECE = 2**24


def real(path: str | Path) -> Path:
    """With links followed; those in a circle stay."""
    return Path(os.path.realpath(path))


def map_file(path: Path) -> memoryview:
    """The bytes of a file, read when they are touched.

    Raises:
        UnsupportedModel: there is no such file, or it is empty.
    """
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UnsupportedModel(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise UnsupportedModel(f"{path}: the file is empty; check how it was made") from None


def keep_apart(read: Mapping[str, object], written: Mapping[str, object]) -> None:
    """No file that is written may take the place of one that is read, or of another one that is written.

    Args:
        read, written: by the names that messages give them; what is no path does not matter.

    Raises:
        ValueError: two are the same file, or one that is written is in a folder that is read.
    """
    first, then = (
        {name: real(path) for name, path in paths.items() if isinstance(path, str | Path)} for paths in (read, written)
    )
    seen = {path: name for name, path in first.items()}
    for name, path in then.items():
        folder = next((other for other, place in first.items() if place.is_dir() and path.is_relative_to(place)), None)
        if folder is not None:
            raise ValueError(
                f"{name}, {written[name]}, is in the folder of {folder}, which is read; write it elsewhere"
            )
        if (other := seen.setdefault(path, name)) != name:
            raise ValueError(f"{name} and {other} are the same file, {written[name]}; give {name} a name of its own")


class ExternalData:
    """The files beside a model that hold its payloads; they are read, not mapped, so that no page of them stays."""

    def __init__(self, model: str, folder: Path | None) -> None:
        self._model = model
        self._folder = folder
        self._files: dict[Path, OpenFile] = {}

    def find(self, tensor: onnx.TensorProto, size: int) -> Chunk:
        """The payload of ``tensor``, ``size`` bytes.

        Raises:
            UnsupportedModel: its file is missing, too short, or not inside of the model's folder.
        """
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        where = f"{self._model}: the external data of tensor {tensor.name!r}"
        if self._folder is None:
            raise UnsupportedModel(f"{where} has no folder to be looked up in; give the path of the model instead")
        path = self._folder / location
        if not location or Path(location).is_absolute() or not _inside(path, self._folder):
            raise UnsupportedModel(
                f"{where} is at {location!r}, outside of the model's folder; move the file beside the model"
            )
        if not path.is_file():
            raise UnsupportedModel(f"{where} is in {location!r}, which is missing; put the file beside the model")
        try:
            start = int(entries.get("offset") or 0)
            length = int(entries.get("length") or size)
        except ValueError:
            raise UnsupportedModel(
                f"{where} has an offset or length that is no number; export the model again"
            ) from None
        if size == 0:
            return memoryview(b"")
        if path not in self._files:
            try:
                self._files[path] = OpenFile(os.open(path, os.O_RDONLY))
            except OSError as error:
                raise UnsupportedModel(f"{path}: cannot be read ({error.strerror}); check the file") from None
        file = self._files[path]
        held = file.size()
        if start < 0 or length != size or start + size > held:
            raise UnsupportedModel(
                f"{where} is {length} bytes at {start} of {location!r}; its shape needs {size} and the file has "
                f"{held}; copy the file again"
            )
        return Lazy(size, lambda: file.read(start, size))


def _inside(path: Path, folder: Path) -> bool:
    """Whether ``path``, its links followed, lies in ``folder``."""
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, ValueError, RuntimeError):  # a name that is too long, holds a zero byte, or links to itself
        return False


class Spool:
    """Payloads on their way to a file: in memory while they are few, then in an unnamed temporary file."""

    def __init__(self) -> None:
        self._held = 0
        self._file: OpenFile | None = None

    def keep(self, payload: bytes) -> Chunk:
        """The same bytes, wherever they are now."""
        self._held += len(payload)
        if self._held <= IN_MEMORY:
            return memoryview(payload)
        if self._file is None:
            with tempfile.TemporaryFile() as unnamed:
                self._file = OpenFile(os.dup(unnamed.fileno()))
        file, start, size = self._file, self._file.append(payload), len(payload)
        return Lazy(size, lambda: file.read(start, size))


class OpenFile:
    """A file that is read at any place; it stays whole when another takes its name."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __del__(self) -> None:
        os.close(self._handle)

    def size(self) -> int:
        return os.fstat(self._handle).st_size

    def append(self, payload: bytes) -> int:
        """Write at the end; where it starts."""
        start = os.lseek(self._handle, 0, os.SEEK_END)
        rest = memoryview(payload)
        while rest:
            rest = rest[os.write(self._handle, rest) :]
        return start

    def read(self, start: int, size: int) -> bytearray:
        """``size`` bytes from ``start`` on."""
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            got = os.preadv(self._handle, [rest], start + size - len(rest))
            if not got:
                raise UnsupportedModel("a file of external data was cut short while it was read; run again")
            rest = rest[got:]
        return data


def write(path: Path, chunks: Iterable[Chunk]) -> None:
    """Put ``chunks`` in place of ``path``: at any instant either the old file is there or the new one.

    Raises:
        CannotWrite: the folder is missing or full, or the target is not a file that may be replaced.
    """
    with _beside(path) as (file, put):
        for chunk in _pieces(chunks):
            file.write(chunk)
        put(path)


def write_data(path: Path, chunks: Iterable[Chunk]) -> str:
    """Put ``chunks`` beside the model ``path``, in a file named by their content; its name is returned."""
    digest = hashlib.sha256()
    with _beside(path) as (file, put):
        for chunk in _pieces(chunks):
            file.write(chunk)
            digest.update(chunk)
        target = path.with_name(f"{path.stem}.{digest.hexdigest()[:16]}.data")
        put(target)
    return target.name


@contextlib.contextmanager
def workplace(target: Path | None) -> Iterator[Path]:
    """A folder for files on the way: beside ``target``, so that what is made there can be moved to it in one step.

    Raises:
        CannotWrite: nothing can be written there.
    """
    folder = Path()
    try:
        try:
            if target is not None and target.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            parent = real(target).parent if target else Path(tempfile.gettempdir())
            folder = parent / f".onnx-ocs-{secrets.token_hex(8)}"  # known before it is there: no interrupt leaves it
            folder.mkdir(0o700)
        except OSError as error:
            folder = Path() if isinstance(error, FileExistsError) else folder  # that of somebody else
            where, other = (target, "another target") if target else ("a temporary folder", "another one (TMPDIR)")
            raise CannotWrite(f"{where}: cannot be written ({error.strerror or error}); choose {other}") from None
        yield folder
    finally:
        if folder.name:
            shutil.rmtree(folder, ignore_errors=True)


def publish(result: Path, target: Path) -> None:
    """Move a model that was written to a :func:`workplace`, and its weights before it, to ``target``.

    Raises:
        CannotWrite: it cannot be replaced.
    """
    target = target.resolve()
    try:
        for data in result.parent.iterdir():
            if data.suffix == ".data":
                data.replace(target.with_name(data.name))
        mode = _mode(target)
        result.chmod(mode)
        result.replace(target)
        _flush_folder(target.parent)
    except OSError as error:
        raise CannotWrite(f"{target}: cannot be written ({error.strerror or error}); choose another target") from None


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[tuple[IO[bytes], Callable[[Path], None]]]:
    """A temporary file in the folder of ``path``, and the function that flushes it and gives it its name."""
    temporary = Path()
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:

            def put(target: Path) -> None:
                file.flush()
                os.fchmod(file.fileno(), _mode(target))
                os.fsync(file.fileno())
                temporary.replace(target)
                _flush_folder(target.parent)

            yield file, put
    except OSError as error:
        raise CannotWrite(f"{path}: cannot be written ({error.strerror or error}); choose another target") from None
    finally:
        if temporary.name:
            temporary.unlink(missing_ok=True)


def _mode(target: Path) -> int:
    """The permissions of a file that stands there, else those that a new file would get."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _pieces(chunks: Iterable[Chunk]) -> Iterator[memoryview]:
    """Small pieces joined, large ones cut, so that writing neither crawls nor holds a large copy."""
    small = bytearray()
    for chunk in buffers(chunks):
        if chunk.nbytes < 2**16:
            small += chunk
            if len(small) < 2**20:
                continue
        if small:
            yield memoryview(bytes(small))
            small.clear()
        if chunk.nbytes >= 2**16:
            yield from (chunk[start : start + PIECE] for start in range(0, chunk.nbytes, PIECE))
    if small:
        yield memoryview(bytes(small))
