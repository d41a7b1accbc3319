"""Every option that decides what a transformation does, as plain data that can be stored and run again."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from onnx_ocs.calibrate import BATCH, STRIDE
from onnx_ocs.errors import BadRecipe
from onnx_ocs.graph.layers import READERS
from onnx_ocs.numerics.clip import parse_clip
from onnx_ocs.numerics.planning import OBJECTIVES
from onnx_ocs.numerics.rounding import ROUNDINGS
from onnx_ocs.numerics.split import POLICIES
from onnx_ocs.passes.plan_splits import ALLOCATIONS
from onnx_ocs.targets import TARGETS
from onnx_ocs.targets.base import Target

Number = float

CHOICES: dict[str, tuple[str, ...]] = {
    "split": ("qa", "naive"),
    "split_policy": tuple(POLICIES),
    "plan": ("magnitude", "joint"),
    "objective": OBJECTIVES,
    "allocate": ALLOCATIONS,
    "round": ("auto", *ROUNDINGS),
    "first": ("float", "int8", "same"),
    "act_split": ("static", "dynamic"),
    "container": ("auto", "int8"),
    "fold": ("auto", "always", "never"),
    "target": tuple(TARGETS),
}

BITS = (2, 3, 4, 5, 6, 7, 8)

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "per_channel": False,
        "split": "qa",
        "split_policy": "halving",
        "clip": "none",
        "plan": "magnitude",
        "allocate": "uniform",
        "round": "nearest",
        "bias_correction": False,
        "error_propagation": False,
        "first": "float",
        "quantize_ops": ("Conv", "ConvTranspose"),
        "fold": "never",
        "align": 1,
        "saturation_safe": False,
    }
}
"""Zhao et al. as they ran it: one scale per tensor, the first layer and the dense layers float."""


@dataclass(frozen=True)
class Recipe:
    """The options of one run under the names of the command line, with ``_`` for ``-``.

    It holds neither paths nor verbosity: the same recipe on the same model gives the same bytes.

    Raises:
        ValueError: an option is out of its range; the message names the valid choices.
    """

    bits: int | None = 8
    ratio: Number = 0.02
    clip: str = "auto"
    round: str = "auto"
    bias_correction: bool = True
    error_propagation: bool = True
    per_channel: bool = True
    block: int | None = None
    split: str = "qa"
    split_policy: str = "even"
    plan: str = "magnitude"
    objective: str = "output"
    allocate: str = "auto"
    layer: tuple[str, ...] = ()
    float: bool = False
    act_bits: int | None = None
    act_clip: str = "mse"
    act_ratio: Number = 0.0
    act_split: str = "static"
    act_unsigned: bool = False
    calibration_samples: int | None = None
    batch: int = BATCH
    calibration_stride: int = STRIDE
    synthetic: int | None = None
    fold_bn: bool = True
    equalize: bool = False
    fold: str = "auto"
    align: int | str | None = None
    max_expand: Number = 0.25
    saturation_safe: bool | None = None
    first: str = "int8"
    quantize_ops: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    container: str = "auto"
    target: str = "generic"
    external_data: bool = False
    verify: bool = True
    tolerance: Number | None = None
    min_sqnr: Number = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_types()
        self._check_ranges()
        self._check_together()

    def _check_texts(self) -> None:
        for name in ("quantize_ops", "only", "skip", "layer"):
            value = getattr(self, name)
            if not isinstance(value, str | list | tuple) or not all(isinstance(text, str) for text in value):
                raise ValueError(f"{name} must be a text or a list of texts, not {value!r}")
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("clip", "act_clip"):
            object.__setattr__(self, name, str(getattr(self, name)))
            if (name, getattr(self, name)) != ("clip", "auto"):
                try:
                    parse_clip(getattr(self, name))
                except ValueError as error:
                    raise ValueError(str(error).replace("clip", _option(name), 1)) from None
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{_option(name)} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for pattern in (*self.only, *self.skip, *(pattern for pattern, _ in self.overrides)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
        unknown = sorted(set(self.quantize_ops) - set(READERS))
        if unknown:
            raise ValueError(f"quantize-ops must be among {', '.join(READERS)}, not {unknown[0]!r}")

    def _check_types(self) -> None:
        for item in fields(self):
            value, kind = getattr(self, item.name), type(item.default)
            if isinstance(item.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{item.name} must be true or false, not {value!r}")
            if kind is Number and (isinstance(value, bool) or not isinstance(value, int | Number)):
                raise ValueError(f"{item.name} must be a number, not {value!r}")
        if self.saturation_safe is not None and not isinstance(self.saturation_safe, bool):
            raise ValueError(f"saturation-safe must be true or false, not {self.saturation_safe!r}")

    def _check_ranges(self) -> None:
        if not math.isfinite(self.min_sqnr):
            raise ValueError(f"min_sqnr must be finite, not {self.min_sqnr}")
        for name in ("bits", "act_bits"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value not in BITS):
                raise ValueError(f"{_option(name)} must be none or one of {', '.join(map(str, BITS))}, not {value}")
        for name in ("ratio", "act_ratio", "max_expand"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{_option(name)} must be from 0 to 1, not {getattr(self, name)}")
        for name in ("synthetic", "calibration_samples", "batch", "calibration_stride"):
            value = getattr(self, name)
            if value is not None and not _is_whole(value, 1):
                raise ValueError(f"{_option(name)} must be a whole number of at least 1, not {value}")
        if self.block is not None and not _is_whole(self.block, 2):
            raise ValueError(f"block must be a whole number of at least 2 input channels, not {self.block!r}")
        if self.align not in (None, "auto") and not _is_whole(self.align, 1):
            raise ValueError(f"align must be auto or a whole number of at least 1, not {self.align!r}")
        if self.tolerance is not None and not (isinstance(self.tolerance, int | Number) and self.tolerance > 0):
            raise ValueError(f"tolerance must be positive, not {self.tolerance}")
        if not _is_whole(self.seed, 0):
            raise ValueError(f"seed must be a whole number of at least 0, not {self.seed}")

    def _check_together(self) -> None:
        if self.block is not None and self.bits is None and not self.float:
            raise ValueError("block gives weights a scale for each block, and with bits none they stay float")
        if self.split == "naive" and self.round != "nearest":
            raise ValueError(f"split naive rounds each share by itself, to nearest; round {self.round} needs split qa")
        if self.act_bits is None and (self.act_split == "dynamic" or self.act_ratio):
            raise ValueError("activations stay float without act-bits, which act-split and act-ratio need")
        if self.float and self.act_split == "dynamic":
            raise ValueError("act-split dynamic chooses channels for the scales of a batch; a float model has none")
        if self.act_split == "dynamic" and self.rules.constant_scales:
            raise ValueError(f"act-split dynamic computes scales in the graph, which target {self.target} refuses")
        if self.act_unsigned and self.rules.symmetric:
            raise ValueError(f"target {self.target} refuses unsigned data; leave act-unsigned out")

    @property
    def overrides(self) -> list[tuple[str, dict[str, Any]]]:
        """``layer`` as patterns and the options of the layers whose names match.

        Raises:
            ValueError: a text is none such.
        """
        return [_override(text) for text in self.layer]

    @property
    def calibrates(self) -> bool:
        """Whether samples are needed to choose the scales of activations."""
        return self.act_bits is not None and self.act_split == "static" and (not self.float or self.act_ratio > 0)

    @property
    def needs_moments(self) -> bool:
        """Whether samples are needed to round the weights."""
        asked = {self.round, *(given.get("round") for _, given in self.overrides)}
        return "hessian" in asked and self.bits is not None and not self.float

    def idle(self, sampled: bool) -> list[str]:
        """Options that are not as by default, and do nothing with these others.

        Args:
            sampled: there are samples.
        """
        names = [] if self.calibrates else ["act_clip", "act_unsigned", "calibration_stride"]
        names += [] if sampled else ["calibration_samples", "batch", "calibration_stride"]
        return [_option(name) for name in dict.fromkeys(names) if getattr(self, name) != getattr(DEFAULTS, name)]

    @property
    def corrects(self) -> bool:
        """Whether biases make up for the mean error of the outputs, where it is known."""
        return self.bias_correction and self.bits is not None and not self.float

    @property
    def multiples(self) -> tuple[int, ...]:
        """Of the numbers of channels after splitting, the best first; none where the exact number is kept."""
        if isinstance(self.align, int):
            return (self.align,) if self.align > 1 else ()
        if self.on_integers:
            return self.rules.multiples
        return self.rules.float_multiples if self.align == "auto" else ()

    @property
    def spares(self) -> bool:
        """Whether layers whose copies cost most get none."""
        return not isinstance(self.align, int) and self.on_integers and bool(self.multiples)

    @property
    def allocation(self) -> str:
        """Which layers get copies; where the time that these take is bounded, each the share it was reckoned with."""
        return "uniform" if self.allocate == "auto" and self.spares else self.allocate

    @property
    def on_integers(self) -> bool:
        """Whether layers compute on integers where the runtime has kernels for them."""
        return self.act_bits is not None and not self.float

    @property
    def folds(self) -> str:
        """When channels are made twice; without a runtime in mind there is no telling where it pays."""
        return "never" if self.fold == "auto" and self.target == "generic" else self.fold

    @property
    def safe(self) -> bool:
        """Whether sums of two products must not leave 16 bits."""
        return self.rules.adds_pairs if self.saturation_safe is None else self.saturation_safe

    @property
    def rules(self) -> Target:
        """The rules of the target."""
        return TARGETS[self.target]

    @classmethod
    def of(
        cls, options: Mapping[str, Any], preset: str | None = None, stored: Mapping[str, Any] | None = None
    ) -> "Recipe":
        """Explicit ``options`` over a ``preset`` over a ``stored`` recipe over the defaults."""
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
        unknown = set(options) - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(f"unknown option {min(unknown)!r}; there are {', '.join(i.name for i in fields(cls))}")
        return cls(**{**(stored or {}), **(PRESETS[preset] if preset else {}), **options})

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _override(text: str) -> tuple[str, dict[str, Any]]:
    """``REGEX:bits=8,ratio=0`` as the pattern and the options of the layers that it matches."""
    pattern, colon, rest = text.rpartition(":")
    given: dict[str, Any] = {}
    for part in rest.split(","):
        name, equals, value = part.strip().partition("=")
        if not colon or not equals or name not in OVERRIDES:
            raise ValueError(f"layer must be REGEX:NAME=VALUE,... with {', '.join(OVERRIDES)}, not {text!r}")
        try:
            given[name] = OVERRIDES[name](value)
        except ValueError:
            raise ValueError(f"{value!r} is no {name} for a layer, in {text!r}") from None
    return pattern, given


def _one_of(value: Any, allowed: Sequence[Any]) -> Any:
    if value not in allowed:
        raise ValueError(value)
    return value


def _share(text: str) -> Number:
    value = Number(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def _clip_method(text: str) -> str:
    if text != "auto":
        parse_clip(text)
    return text


OVERRIDES: dict[str, Callable[[str], Any]] = {
    "bits": lambda text: None if text == "none" else _one_of(int(text), BITS),
    "ratio": _share,
    "clip": _clip_method,
    "round": lambda text: _one_of(text, tuple(ROUNDINGS)),
}
"""Options that a layer can have of its own, and how their values are read."""


def _option(name: str) -> str:
    """As the command line has it."""
    return name.replace("_", "-")


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


DEFAULTS = Recipe()
"""What holds where nothing is said."""


def stored_recipe(path: Path) -> dict[str, Any]:
    """The options in a recipe file, or in a report, which holds one.

    Raises:
        BadRecipe: the file cannot be read, or holds no recipe.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise BadRecipe(f"{path}: cannot be read ({error.strerror}); check the path of the recipe") from None
    except ValueError as error:
        raise BadRecipe(f"{path}: not JSON ({error}); give a report or recipe written by onnx-ocs") from None
    recipe = data.get("recipe", data) if isinstance(data, dict) else None
    if not isinstance(recipe, dict):
        raise BadRecipe(f"{path}: holds no recipe; give a report or recipe written by onnx-ocs")
    try:
        Recipe.of(recipe)
    except (ValueError, TypeError) as error:
        raise BadRecipe(f"{path}: {error}") from None
    return recipe
