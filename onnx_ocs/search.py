"""A goal in place of settings: bits of each layer and the options that reach it, found in a bounded number of trials.

Each trial is a whole transformation, measured on samples. Uniform widths come first, from the widest down; where one
does not do, other ratios, clip methods and roundings are tried with it. Between the narrowest width that does and the
widest that does not, layers go down one after the other, those first that are predicted to lose least for the bytes
that they save; how many of them may is found by bisection, and then those that follow are tried one by one. Nothing is
random, so that a search that was broken off and goes on by its file comes to the same end.
"""

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnx_ocs._version import __version__
from onnx_ocs.errors import BadRecipe, RuntimeFailed, VerificationFailed
from onnx_ocs.graph import files
from onnx_ocs.recipe import Recipe

BUDGET = 24
"""Trials, if nothing else is said."""

BITS = (8, 4, 2)
"""Widths that are tried: the widest of each integer type, since a narrower one takes as much room."""

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"ratio": 0.05, "allocate": "sensitivity"},
    {"ratio": 0.1, "allocate": "sensitivity"},
    {"ratio": 0.0},
    {"ratio": 0.05, "allocate": "sensitivity", "plan": "joint"},
    {"ratio": 0.05, "allocate": "sensitivity", "clip": "mse"},
    {"ratio": 0.05, "allocate": "sensitivity", "round": "assumed"},
)
"""What is tried with a width besides the recipe as it was given; an option that was given stays."""


@dataclass(frozen=True)
class Goal:
    """What the result must reach; the smallest that does is wanted, or the best within ``size_ratio`` alone.

    Raises:
        ValueError: there is no goal, or it is out of its range.
    """

    agreement: float | None = None  # share of equal top-1 classes of the worst output, 0 to 1
    sqnr: float | None = None  # dB of the worst output
    size_ratio: float | None = None  # of the model's bytes
    bits: tuple[int, ...] = BITS
    budget: int = BUDGET

    def __post_init__(self) -> None:
        if self.agreement is None and self.sqnr is None and self.size_ratio is None:
            raise ValueError("a goal is target-agreement, target-sqnr or max-size-ratio")
        if self.agreement is not None and not 0 <= self.agreement <= 1:
            raise ValueError(f"target-agreement must be from 0 to 1, not {self.agreement}")
        if self.size_ratio is not None and not self.size_ratio > 0:
            raise ValueError(f"max-size-ratio must be above 0, not {self.size_ratio}")
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 trial, not {self.budget}")
        if not self.bits or any(width not in range(2, 9) for width in self.bits):
            raise ValueError(f"search-bits must be among 2 to 8, not {', '.join(map(str, self.bits))}")

    @property
    def has_quality(self) -> bool:
        """Whether it asks for more than a size."""
        return self.agreement is not None or self.sqnr is not None

    def __str__(self) -> str:
        parts = [] if self.agreement is None else [f"agreement {self.agreement:g}"]
        parts += [] if self.sqnr is None else [f"{self.sqnr:g} dB SQNR"]
        return " and ".join(parts + ([] if self.size_ratio is None else [f"{self.size_ratio:g} of the size"]))


@dataclass(frozen=True)
class Trial:
    """One recipe and what it came to; no figures where its model did not pass."""

    options: dict[str, Any]  # over the recipe that was given
    size: int | None = None  # bytes
    size_ratio: float | None = None
    sqnr_db: float | None = None
    agreement: float | None = None
    kl_divergence: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class LayerCost:
    """What is known of a layer before any trial."""

    name: str
    weights: int
    noise: float  # predicted error of its outputs at one step for their range, relative to them


@dataclass
class Search:
    """The trials so far, in their order."""

    goal: Goal
    recipe: Recipe
    given: frozenset[str]  # options that stay
    layers: Sequence[LayerCost]
    measure: Callable[[Recipe], Trial]  # the figures; options are filled in here
    known: dict[str, Trial] = field(default_factory=dict)  # of an earlier search, by their options
    progress: Callable[[str], None] = lambda line: None
    kept: Callable[[Sequence[Trial]], None] = lambda trials: None  # called after each trial
    trials: list[Trial] = field(default_factory=list)

    def run(self) -> Trial:
        """The best trial that reaches the goal.

        Raises:
            VerificationFailed: none does.
        """
        with contextlib.suppress(_Spent):
            self._explore()
        reached = [trial for trial in self.trials if self.reaches(trial)]
        if not reached:
            raise VerificationFailed(f"{self.goal} was not reached in {len(self.trials)} trials; {self._nearest()}")
        return min(reached, key=self._rank)

    def reaches(self, trial: Trial) -> bool:
        """Whether it is what is wanted."""
        return self._is_good(trial) and self._is_small(trial)

    def front(self) -> list[Trial]:
        """Trials that no other beats in size and quality, the smallest first."""
        made: list[Trial] = []
        for trial in sorted((trial for trial in self.trials if trial.size is not None), key=self._by_size):
            if not made or self.quality(trial) > self.quality(made[-1]):
                made.append(trial)
        return made

    def quality(self, trial: Trial) -> tuple[float, float]:
        """What is compared: what the goal is about, then the noise."""
        sqnr = _or_least(trial.sqnr_db)
        return (sqnr, 0.0) if self.goal.agreement is None else (_or_least(trial.agreement), sqnr)

    def _explore(self) -> None:
        widths = sorted(set(self.goal.bits), reverse=True)
        wide, variant = None, dict[str, Any]()
        for width in widths:
            found = self._best_variant(width, variant)
            if self.goal.has_quality and not self._is_good(found):
                if wide is not None:
                    self._mix(wide, width, self._best(width))
                return
            variant = self._best(width)
            if not self.goal.has_quality and self._is_small(found):
                if wide is not None:
                    self._mix(wide, width, variant)
                return
            wide = width

    def _best_variant(self, width: int, first: dict[str, Any]) -> Trial:
        """The best of all variants with this width; the first that will do, if a quality is asked for."""
        best = self._try({**first, "bits": width})
        for variant in VARIANTS:
            if self.goal.has_quality and self._is_good(best):
                return best
            if not self.goal.has_quality and not self._is_small(best):
                return best
            trial = self._try({**self._free(variant), "bits": width})
            if self.quality(trial) > self.quality(best) and (self.goal.has_quality or self._is_small(trial)):
                best = trial
        return best

    def _best(self, width: int) -> dict[str, Any]:
        """The variant that was best with this width."""
        same = [trial for trial in self.trials if trial.options["bits"] == width and "layer" not in trial.options]
        small = [trial for trial in same if self._is_small(trial)] or same
        best = max(small if not self.goal.has_quality else same, key=self.quality)
        return {name: value for name, value in best.options.items() if name != "bits"}

    def _mix(self, wide: int, narrow: int, variant: dict[str, Any]) -> None:
        """As many layers as may be with the narrow width, or as must be where only the size counts."""
        order = sorted(self.layers, key=lambda layer: (layer.noise / max(1, layer.weights), layer.name))

        def mixed(lowered: Sequence[LayerCost]) -> Trial:
            names = {layer.name for layer in lowered}
            kept = [layer.name for layer in order if layer.name not in names]
            texts = tuple(f"^{re.escape(name)}$:bits={wide}" for name in sorted(kept))
            return self._try({**variant, "bits": narrow, "layer": (*self.recipe.layer, *texts)})

        def will_do(count: int) -> bool:
            trial = mixed(order[:count])
            return self._is_good(trial) if self.goal.has_quality else not self._is_small(trial)

        low, high = 0, len(order)  # with ``low`` lowered it will do, with ``high`` it will not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if will_do(middle) else (low, middle)
        if not self.goal.has_quality:
            mixed(order[: low + 1])
            return
        lowered = list(order[:low])
        for layer in order[high:]:
            if self._is_good(mixed([*lowered, layer])):
                lowered.append(layer)

    def _free(self, variant: Mapping[str, Any]) -> dict[str, Any]:
        fixed = self.given | ({"round"} if self.recipe.split == "naive" else set())  # which rounds to nearest only
        return {name: value for name, value in variant.items() if name not in fixed}

    def _try(self, options: dict[str, Any]) -> Trial:
        """The trial of ``options``, which is made once.

        Raises:
            _Spent: there were as many as there may be.
        """
        key = _key(options)
        same = next((trial for trial in self.trials if _key(trial.options) == key), None)
        if same is not None:
            return same
        if len(self.trials) >= self.goal.budget:
            raise _Spent
        self.progress(f"trial {len(self.trials) + 1} of {self.goal.budget} at most: {describe(options)}")
        if key in self.known:
            trial = self.known[key]
        else:
            found = self.measure(Recipe.of(options, stored=self.recipe.plain()))
            trial = Trial(**{**asdict(found), "options": json.loads(key)})
        self.trials.append(trial)
        self.kept(self.trials)
        return trial

    def _is_good(self, trial: Trial) -> bool:
        goal = self.goal
        return (
            trial.size is not None
            and (goal.agreement is None or _or_least(trial.agreement) >= goal.agreement)
            and (goal.sqnr is None or _or_least(trial.sqnr_db) >= goal.sqnr)
        )

    def _is_small(self, trial: Trial) -> bool:
        most = self.goal.size_ratio
        return trial.size_ratio is not None and (most is None or trial.size_ratio <= most)

    def _rank(self, trial: Trial) -> tuple[float, ...]:
        better = tuple(-value for value in self.quality(trial))
        assert trial.size is not None
        return (trial.size, *better) if self.goal.has_quality else (*better, trial.size)

    def _by_size(self, trial: Trial) -> tuple[float, ...]:
        assert trial.size is not None
        return (trial.size, *(-value for value in self.quality(trial)))

    def _nearest(self) -> str:
        whole = [trial for trial in self.trials if trial.size is not None]
        if not whole:
            return f"no model passed ({self.trials[-1].failure})" if self.trials else "there was none"
        best = max(whole, key=self.quality)
        figures = f"{_or_least(best.sqnr_db):.1f} dB SQNR, {best.size_ratio:.3f} of the size"
        if best.agreement is not None:
            figures = f"agreement {best.agreement:.4f}, {figures}"
        return f"the best has {figures}; allow more trials (--budget), other widths (--search-bits), or a lower goal"


class _Spent(Exception):
    """There were as many trials as there may be."""


def _or_least(value: float | None) -> float:
    return float("-inf") if value is None else value


def _key(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def describe(options: Mapping[str, Any]) -> str:
    """A trial's options in a few words."""
    layers = options.get("layer", ())
    parts = [f"{options['bits']} bits"]
    parts += [f"{name} {value}" for name, value in options.items() if name not in ("bits", "layer")]
    return ", ".join(parts + ([f"{len(layers)} layers wider"] if layers else []))


def read_trials(path: Path, mark: str) -> dict[str, Trial]:
    """The trials of an earlier search; none if there is no such file.

    Args:
        mark: of the model, the samples and the recipe: trials of others do not count.

    Raises:
        BadRecipe: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
        if data["mark"] != mark:
            raise BadRecipe(f"{path}: trials of another model, samples or recipe; give another file, or remove it")
        return {_key(one["options"]): Trial(**one) for one in data["trials"]}
    except OSError as error:
        raise BadRecipe(f"{path}: cannot be read ({error.strerror}); check its path") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadRecipe(f"{path}: holds no trials ({error}); give another file, or remove it") from None


def write_trials(path: Path, mark: str, trials: Sequence[Trial]) -> None:
    """Keep trials, whole or not at all."""
    data = {"tool": "onnx-ocs", "version": __version__, "mark": mark, "trials": [asdict(trial) for trial in trials]}
    files.write(path, [memoryview((json.dumps(data, indent=1) + "\n").encode())])


def write_front(path: Path, front: Sequence[Trial]) -> None:
    """The Pareto front as CSV or, by any other name, as JSON."""
    rows = [asdict(trial) for trial in front]
    if path.suffix.lower() != ".csv":
        text = json.dumps(rows, indent=1) + "\n"
    else:
        made = io.StringIO()
        writer = csv.writer(made, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_cells(trial) for trial in front)
        text = made.getvalue()
    files.write(path, [memoryview(text.encode())])


COLUMNS = ("size", "size_ratio", "sqnr_db", "agreement", "kl_divergence", "options")


def _cells(trial: Trial) -> Iterator[Any]:
    for name in COLUMNS[:-1]:
        yield getattr(trial, name)
    yield _key(trial.options)


def measured(measure: Callable[[], dict[str, Any]]) -> Trial:
    """The figures of a report; of a transformation that fails, why."""
    try:
        report = measure()
    except (VerificationFailed, RuntimeFailed) as error:
        return Trial({}, failure=str(error))
    size, found = report["size"], report["verification"]["quantized"]
    return Trial(
        {},
        size["after"],
        size["after"] / max(1, size["before"]),
        found["sqnr_db"],
        found["top1_agreement"],
        found["kl_divergence"],
    )
