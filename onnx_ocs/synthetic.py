"""Samples made of nothing but the inputs of a model: images of fallen leaves, others as verification has them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_ocs import child
from onnx_ocs.errors import BadSamples
from onnx_ocs.graph.samples import Feed, Guess, Input, generate
from onnx_ocs.graph.session import Session
from onnx_ocs.numerics.natural import natural_images
from onnx_ocs.verify import working_guess

COLOURS = (1, 3, 4)
"""Channels of what is taken for an image."""

SMALLEST = 8
"""Rows and columns that an image has at least."""


@dataclass(frozen=True)
class Request:
    """What to make."""

    model: str  # path
    name: str  # of the user's model, for messages
    folder: str  # of the samples
    count: int
    seed: int
    bounds: dict[str, int]  # of integers that index a table


def make_samples(
    model: Path, name: str, folder: Path, count: int, seed: int, bounds: dict[str, int], timeout: float = child.TIMEOUT
) -> Path:
    """A new folder with ``count`` samples that the model runs on.

    Raises:
        BadSamples: it runs on none that could be thought of.
        RuntimeFailed: it crashed or ran out of time.
    """
    folder.mkdir()
    request = Request(str(model), name, str(folder), count, seed, bounds)
    child.call("onnx_ocs.synthetic", asdict(request), timeout)
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
    rng = np.random.default_rng(request.seed)
    made = 0
    while made < request.count:
        feed = _feed(session.inputs, guess, request, rng)
        np.savez(Path(request.folder, f"{made:08}.npz"), **feed)  # type: ignore[arg-type]
        made += max(1, min((len(values) for values in feed.values() if values.ndim), default=1))
    return {"samples": made}


def _feed(inputs: list[Input], guess: Guess, request: Request, rng: np.random.Generator) -> Feed:
    feed = generate(inputs, guess, request.bounds, rng)
    for name, values in feed.items():
        if values.dtype.kind != "f" or values.ndim != 4 or guess.positive:
            continue
        last = values.shape[1] not in COLOURS
        channels, *sizes = (values.shape[3], *values.shape[1:3]) if last else values.shape[1:]
        if channels in COLOURS and min(sizes) >= SMALLEST:
            images = natural_images(len(values), channels, (sizes[0], sizes[1]), rng)
            feed[name] = (np.moveaxis(images, 1, -1) if last else images).astype(values.dtype)
    return feed


if __name__ == "__main__":
    child.serve(lambda asked, say: make(Request(**asked), say))
