"""One transformation under way: what was asked, and what is known of it so far."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from onnx_ocs import calibrate
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.hints import table_lengths
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.samples import Samples
from onnx_ocs.moments import Stored
from onnx_ocs.pictures import pictures
from onnx_ocs.recipe import Recipe
from onnx_ocs.synthetic import make_samples

Source = str | Path | onnx.ModelProto
Progress = Callable[[str], None]


def on_disk(source: Source, model: Model, path: Path) -> Path:
    """A file that onnxruntime can read: that of ``source``, or of a proto, loaded as ``model``, one at ``path``."""
    if not isinstance(source, onnx.ModelProto):
        return Path(source)
    if not path.exists():
        model.save(path)
    return path


def made_up(source: Source, folder: Path, here: Path, count: int | None, seed: int, timeout: float) -> Path:
    """``here``, with ``count`` samples for ``source``, or as many as to round by; ``folder``: for files on the way.

    Raises:
        BadSamples: the model runs on none that could be thought of.
        RuntimeFailed: it crashed or ran out of time.
    """
    model = Model.load(source)
    path, editor = on_disk(source, model, folder / "source.onnx"), Editor(model)
    bounds = table_lengths(editor)
    return make_samples(path, model.name, here, count, seed, bounds, pictures(editor), timeout)


@dataclass(frozen=True)
class Calibration:
    """Where the statistics of activations come from."""

    samples: Samples | None = None
    stats: Path | None = None  # a file of statistics to read
    save_stats: Path | None = None  # where to write them
    synthetic: bool = False  # the samples are made up

    @property
    def given(self) -> bool:
        """Whether there is a source of statistics."""
        return self.samples is not None or self.stats is not None


@dataclass
class Known:
    """What samples tell of a model, for several runs on both."""

    folder: Path  # where moments are kept
    seen: calibrate.Seen | None = None
    moments: dict[str, Stored] | None = None
    made: Path | None = None  # samples to round weights by
    unmade: str | None = None  # why there are none
    synthetic: dict[str, Stored] = field(default_factory=dict)  # moments of these


@dataclass
class Run:
    """One transformation under way."""

    recipe: Recipe
    source: Source
    target: Path | None
    folder: Path  # for files on the way
    inputs: Path | None
    calibration: Calibration
    timeout: float
    progress: Progress
    narrow: bool  # whether INT4 and INT2 may be used
    known: Known
    count: int = 0  # samples of those for calibration that the result is verified on
    raised: bool = False  # whether the opset was
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    folded: int = 0  # BatchNormalization nodes
    equalized: bool = False
    lost: list[str] = field(default_factory=list)  # inputs whose default value was a weight that is gone
    plain: int = 0  # nodes that were written in another form
    inside: float = 0.0  # seconds of the stages within the present one, which count as theirs

    @property
    def observes(self) -> bool:
        """Whether statistics of activations are needed: for their scales, or for what biases make up for."""
        return self.recipe.calibrates or (self.recipe.corrects and self.calibration.stats is not None)

    @property
    def gathers(self) -> bool:
        """Whether moments of the data of layers are: to round weights, or for what biases make up for."""
        corrects = self.recipe.corrects and not self.calibration.synthetic
        return (self.recipe.needs_moments or corrects) and self.calibration.samples is not None

    def samples_made_up(self) -> Path:
        """Samples that are made up, those of calibration, or others, as many as to round by.

        Raises:
            BadSamples: the model runs on none that could be thought of.
            RuntimeFailed: it crashed or ran out of time.
        """
        samples, known = self.calibration.samples, self.known
        if self.calibration.synthetic and isinstance(samples, Path):
            return samples
        if known.made is None:
            known.made = made_up(self.source, self.folder, known.folder / "made", None, self.recipe.seed, self.timeout)
        return known.made

    def mark(self, model: Model) -> str:
        """By which statistics of the source are known again: ranges are others once they were evened out."""
        return model.digest() + (" equalized" if self.recipe.equalize else "")

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        self.progress(name)
        start, outer, self.inside = time.perf_counter(), self.inside, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self.inside
            self.inside = outer + spent
