"""Samples made of nothing but the inputs of a model: images of fallen leaves, others as verification has them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_ocs import child
from onnx_ocs.errors import BadSamples
from onnx_ocs.graph.samples import Feed, Guess, Input, generate
from onnx_ocs.graph.session import Session
from onnx_ocs.numerics.natural import natural_images
from onnx_ocs.verify import working_guess

COUNT = 32
"""Samples that convolutions are rounded by, and the least that are made where no number is given."""

MOST = 512
"""Samples that are made then at most, for layers that see one position of each."""

VALUES = 2**22
"""Of all samples that are made then, as far as these bounds allow: 512 of 32 x 32 pixels, 32 of 224 x 224."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An input that takes pictures: the axis of their C colours, and mean and deviation of the values of each."""

    axis: int
    mean: NDArray[np.float64]  # (C,)
    deviation: NDArray[np.float64]  # (C,)


@dataclass(frozen=True)
class Request:
    """What to make."""

    model: str  # path
    name: str  # of the user's model, for messages
    folder: str  # of the samples
    count: int | None
    seed: int
    bounds: dict[str, int]  # of integers that index a table
    pictures: dict[str, tuple[int, list[float], list[float]]]  # axis of the colours; mean and deviation of each


def make_samples(
    model: Path,
    name: str,
    folder: Path,
    count: int | None,
    seed: int,
    bounds: dict[str, int],
    pictures: Mapping[str, Picture],
    timeout: float = child.TIMEOUT,
) -> Path:
    """A new folder with ``count`` samples that the model runs on; None: as many as to round weights by.

    Raises:
        BadSamples: it runs on none that could be thought of.
        RuntimeFailed: it crashed or ran out of time.
    """
    folder.mkdir()
    known = {name: (each.axis, each.mean.tolist(), each.deviation.tolist()) for name, each in pictures.items()}
    request = Request(str(model), name, str(folder), count, seed, bounds, known)
    child.call("onnx_ocs.synthetic", asdict(request), timeout, "samples of your own (--calibrate) do without it")
    return folder


def make(request: Request, say: child.Report) -> dict[str, Any]:
    """Write the samples; this is what the child does."""
    say(f"loading {request.name} for synthetic samples")
    session = Session(Path(request.model))
    guess, finite, _ = working_guess(
        session, lambda guess: _feed(session.inputs, guess, request, np.random.default_rng(request.seed))
    )
    if guess is None or not finite:
        raise BadSamples(
            f"{request.name}: no synthetic samples were found that it runs on with finite outputs; give real ones "
            "(--calibrate)"
        )
    one = generate(session.inputs, guess, request.bounds, np.random.default_rng(request.seed))
    size = sum(values.size for values in one.values())
    count = request.count or min(max(VALUES // max(size, 1), COUNT), MOST)
    rng, made = np.random.default_rng(request.seed), 0
    while made < count:
        feed = _feed(session.inputs, guess, request, rng)
        np.savez(Path(request.folder, f"{made:08}.npz"), **feed)  # type: ignore[arg-type]
        made += max(1, min((len(values) for values in feed.values() if values.ndim), default=1))
    return {"samples": made}


def _feed(inputs: list[Input], guess: Guess, request: Request, rng: np.random.Generator) -> Feed:
    feed = generate(inputs, guess, request.bounds, rng)
    for name, (axis, *told) in request.pictures.items() if not guess.positive else ():
        kind, (count, channels, *sides) = feed[name].dtype, np.moveaxis(feed[name], axis, 1).shape
        images = np.moveaxis(natural_images(count, channels, (sides[0], sides[1]), rng), 1, axis)
        mean, deviation = (np.expand_dims(each, tuple(range(1, 4 - axis))) for each in told)
        images = mean + images * deviation
        if kind == np.uint8:
            images = np.clip(np.rint(images), 0, np.iinfo(kind).max)
        feed[name] = images.astype(kind)
    return feed


def answer(asked: dict[str, Any], say: child.Report) -> dict[str, Any]:
    """What the child does."""
    return make(Request(**asked), say)
