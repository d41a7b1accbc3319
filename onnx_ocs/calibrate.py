"""Statistics of inner tensors, gathered while onnxruntime runs the samples in a process of its own.

Each batch is folded into sums, extremes and histograms as it passes (:mod:`onnx_ocs.numerics.statistics`); memory does
not grow with the number of samples. One pass over the samples: the percentile beyond which values count as outliers is
that of all values seen so far. With a stride above 1 the histograms take every stride-th position (more of tensors
that have few), from a seeded start that differs from batch to batch; extremes and means are of all values always. Where
the graph itself keeps a tensor from being negative (behind a Relu), its minimum is then given as 0 and not looked for.
"""

import contextlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_ocs import child
from onnx_ocs.errors import BadSamples, RuntimeFailed, UnsupportedModel
from onnx_ocs.graph import files
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.observe import COUNT, HIGH, LOW, MEAN, START, Observed, observing, size, taken
from onnx_ocs.graph.samples import Batch, Feed, read_samples
from onnx_ocs.graph.session import Session, run_samples
from onnx_ocs.numerics.statistics import Recorder, Statistics

STRIDE = 61
"""About one value in so many is taken; of an image it is every eighth row and every eighth column."""

THIN = 4
"""Every so many of the taken values of a row also go into the histogram of their channel."""

BATCH = 8
"""Samples that run at a time."""

FORMAT = 1
"""Of the file of statistics."""

Seen = Mapping[str, Statistics]  # by Observed.key


@dataclass(frozen=True)
class Request:
    """What to observe."""

    model: str  # path of the observing model
    name: str  # of the user's model, for messages
    tensors: list[dict[str, Any]]  # Observed
    samples: str  # path
    target: str  # path of the statistics
    limit: int | None
    batch: int
    stride: int
    seed: int


def calibrate(
    model: Model,
    tensors: list[Observed],
    samples: Path,
    folder: Path,
    limit: int | None = None,
    batch: int = BATCH,
    stride: int = STRIDE,
    seed: int = 0,
    timeout: float = child.TIMEOUT,
) -> Seen:
    """The statistics of ``tensors`` over ``samples``.

    Args:
        folder: for files on the way.
        limit: samples to read at most.

    Raises:
        BadSamples: they do not fit the model, or lead to values that are not finite.
        UnsupportedModel: onnxruntime refuses the model.
        RuntimeFailed: it crashed or ran out of time.
    """
    if not tensors:
        return {}
    path, target = folder / "observing.onnx", folder / "statistics.npz"
    observing(model, tensors, stride).save(path)
    asked = [asdict(tensor) for tensor in tensors]
    request = Request(str(path), model.name, asked, str(samples), str(target), limit, batch, stride, seed)
    child.call("onnx_ocs.calibrate", asdict(request), timeout)
    path.unlink()
    return load(target)


def arranged(seen: Seen, digest: str) -> dict[str, NDArray[Any]]:
    """The arrays that a file of statistics holds; ``digest`` is that of the model."""
    named = {f"{index}.{name}": a for index, one in enumerate(seen.values()) for name, a in one.arrays().items()}
    return {"head": np.array(json.dumps({"format": FORMAT, "model": digest, "tensors": list(seen)})), **named}


def save(path: Path, seen: Seen, digest: str) -> None:
    """Write a file of statistics, whole or not at all.

    Raises:
        CannotWrite: there is no such folder, or it may not be written.
    """
    made = io.BytesIO()
    np.savez_compressed(made, **arranged(seen, digest))  # type: ignore[arg-type]
    files.write(path, [made.getbuffer()])


def load(path: Path, digest: str | None = None) -> Seen:
    """Read what :func:`save` wrote.

    Raises:
        BadSamples: the file is none of statistics, or of another model than that with ``digest``.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            head = json.loads(str(stored["head"]))
            if digest is not None and head["model"] != digest:
                raise BadSamples(f"{path}: statistics of another model; calibrate this one with --calibrate")
            if head["format"] != FORMAT:
                raise BadSamples(f"{path}: statistics of another version of onnx-ocs; calibrate again")
            arrays: list[dict[str, NDArray[Any]]] = [{} for _ in head["tensors"]]
            for name in stored.files:
                if name != "head":
                    index, _, figure = name.partition(".")
                    arrays[int(index)][figure] = stored[name]
            return {key: Statistics.of(one) for key, one in zip(head["tensors"], arrays, strict=True)}
    except OSError as error:
        reason = error.strerror or error
        raise BadSamples(f"{path}: cannot be read ({reason}); check the path of the statistics") from None
    except (ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise BadSamples(f"{path}: holds no statistics ({error}); make them with --save-stats") from None


def observe(request: Request, say: child.Report) -> dict[str, Any]:
    """Run all samples, fold each batch in, and write the statistics; this is what the child does."""
    say(f"loading {request.name} for calibration")
    tensors = [Observed(**tensor) for tensor in request.tensors]
    try:
        session = Session(Path(request.model))
    except RuntimeFailed as error:
        raise UnsupportedModel(
            f"{request.name}: onnxruntime cannot load it for calibration ({error}); leave --calibrate out, and its "
            "activations stay float"
        ) from None
    inputs = [item for item in session.inputs if item.name not in (START, COUNT)]
    recorder = Recorder([tensor.channels for tensor in tensors])
    owners = np.repeat(np.arange(len(tensors)), [tensor.channels for tensor in tensors])  # of each channel
    has_low = np.array([LOW in tensor.reductions(request.stride).values() for tensor in tensors])[owners]
    low = np.zeros(len(has_low), np.float32)
    thin = THIN * STRIDE if request.stride == 1 else THIN
    rng = np.random.default_rng(request.seed)

    def broken(batch: Batch) -> str | None:
        places = owners[~np.isfinite(_run(session, batch, 0, request)[MEAN])]
        return tensors[places[0]].name if places.size else None

    samples = 0
    for batch in read_samples(Path(request.samples), inputs, request.batch, request.limit):
        if samples == 0:
            say(f"calibrating {request.name}")
        found = _run(session, batch, int(rng.integers(0, 2**31)), request)
        if not np.isfinite(found[MEAN]).all():
            raise BadSamples(f"{request.samples}: {not_finite(batch, samples, broken, request.name)}")
        values, seen = zip(*(_taken(found, index, tensor) for index, tensor in enumerate(tensors)), strict=True)
        low[has_low] = found.get(LOW, 0)
        recorder.add(low, found[HIGH], found[MEAN], values, seen, thin, batch.count)
        samples += batch.count
    if not samples:
        raise BadSamples(f"{request.samples}: there are no samples in it, or fewer than the model takes at once")
    try:
        made = recorder.finish()
    except ValueError as error:
        raise BadSamples(f"{request.samples}: a tensor is empty on these samples ({error}); give others") from None
    stored = {tensor.key: one for tensor, one in zip(tensors, made, strict=True)}
    np.savez(request.target, **arranged(stored, ""))  # type: ignore[arg-type]
    return {"samples": samples}


def _taken(found: Feed, index: int, tensor: Observed) -> tuple[int, NDArray[np.float32]]:
    """How many values a tensor has, and those that were taken as (outer, C, inner)."""
    values = found[taken(index)]
    inner = math.prod(values.shape[tensor.axis + 1 :]) if tensor.axis < -1 else 1
    whole = inner if tensor.sizes is None else math.prod(tensor.sizes)
    number = found.get(size(index), values.size // max(1, inner) * whole)
    return int(number), values.reshape(-1, tensor.channels, inner)


def _run(session: Session, batch: Batch, start: int, request: Request) -> dict[str, NDArray[Any]]:
    count = max([batch.count, *(len(values) for values in batch.feed.values() if values.ndim)])  # a feed holds many too
    numbers = {START: np.array([start], np.int64), COUNT: np.array([count], np.int64)}
    return run_samples(session, {**batch.feed, **numbers}, request.name)


def not_finite(batch: Batch, first: int, broken: Callable[[Batch], str | None], model: str) -> str:
    """What is wrong with ``batch``, whose first sample is the one of that number.

    Args:
        broken: the tensor of a batch that has values which are not finite.
    """
    where, tensor = f"samples {first} to {first + batch.count - 1}", broken(batch)
    for number, one in enumerate(_singly(batch)):
        with contextlib.suppress(BadSamples):  # where the model takes whole batches only
            if (found := broken(one)) is not None:
                where, tensor = f"sample {first + number}", found
                break
    return (
        f"NaN, infinite, or overflowing values in tensor {tensor!r} of {model} on {where} (counted from 0); leave such "
        "samples out, or the layer with --skip"
    )


def _singly(batch: Batch) -> list[Batch]:
    """Each sample of a batch by itself, where the first axis of every input counts them."""
    feed = batch.feed
    if any(values.ndim == 0 or len(values) != batch.count for values in feed.values()):
        return []
    return [Batch({name: values[i : i + 1] for name, values in feed.items()}) for i in range(batch.count)]


def answer(asked: dict[str, Any], say: child.Report) -> dict[str, Any]:
    """What the child does."""
    return observe(Request(**asked), say)
