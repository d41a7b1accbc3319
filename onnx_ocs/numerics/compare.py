"""How far the outputs of one model are from those of another, folded in batch by batch."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOTHING = 1e-25
"""By how much an output may differ whose reference is all zero: what is left of sums that cancel."""

EXACT_DB = 200.0
"""Stands for equal outputs, whose signal-to-noise ratio has no number; its negative for noise without a signal."""


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two energies, within ±:data:`EXACT_DB`."""
    if noise == 0:
        return EXACT_DB
    if signal == 0 or not math.isfinite(noise):
        return -EXACT_DB
    return float(np.clip(10 * (math.log10(signal) - math.log10(noise)), -EXACT_DB, EXACT_DB))


@dataclass
class Difference:
    """The difference of one output over all batches seen so far."""

    name: str
    values: int = 0
    unequal: int = 0  # values that differ, of outputs that are not floats
    nonfinite: int = 0  # values that are finite in the reference alone, or the other way round
    peak: float = 0.0  # largest magnitude of the reference
    max_abs_error: float = 0.0
    beyond: int = 0  # values beyond atol + rtol * |reference|
    signal: float = 0.0
    noise: float = 0.0
    rows: int = 0  # that look like scores of classes
    agreeing: int = 0
    divergence: float = 0.0  # sum of KL(reference || candidate) over the rows, in nats
    correct: list[int] = field(
        default_factory=lambda: [0, 0]
    )  # rows whose label has the largest score: reference, candidate
    labelled: int = 0
    is_float: bool = True

    def add(
        self,
        reference: NDArray[Any],
        candidate: NDArray[Any],
        labels: NDArray[np.integer] | None = None,
        atol: float = 0.0,
        rtol: float = 0.0,
    ) -> None:
        """Fold in one batch.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != candidate.shape:
            raise ValueError(f"output {self.name!r} has shape {candidate.shape} instead of {reference.shape}")
        self.values += reference.size
        if not is_float(reference):
            self.is_float = False
            self.unequal += int(np.count_nonzero(reference != candidate))
            return
        first, second = reference.astype(np.float64), candidate.astype(np.float64)
        finite = np.isfinite(first)
        both = finite & np.isfinite(second)
        same = both | (first == second) | (np.isnan(first) & np.isnan(second))
        self.nonfinite += int(np.count_nonzero(~same))
        first, second = np.where(both, first, 0.0), np.where(both, second, 0.0)
        error = np.abs(second - first)
        magnitude = np.abs(first)
        self.peak = max(self.peak, float(magnitude.max(initial=0.0)))
        self.max_abs_error = max(self.max_abs_error, float(error.max(initial=0.0)))
        self.beyond += int(np.count_nonzero(error > atol + rtol * magnitude))
        self.signal += float(np.sum(magnitude**2))
        self.noise += float(np.sum(error**2))
        if looks_like_classes(reference):
            self._add_classes(first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1]), labels)

    def _add_classes(
        self, first: NDArray[np.float64], second: NDArray[np.float64], labels: NDArray[np.integer] | None
    ) -> None:
        best, other = first.argmax(axis=1), second.argmax(axis=1)
        self.rows += len(first)
        self.agreeing += int(np.count_nonzero(best == other))
        self.divergence += float(np.sum(divergence(first, second)))
        if labels is not None and len(labels) == len(first):
            self.labelled += len(labels)
            self.correct[0] += int(np.count_nonzero(best == labels))
            self.correct[1] += int(np.count_nonzero(other == labels))

    @property
    def max_rel_error(self) -> float:
        """The largest error relative to the largest magnitude of the reference."""
        if self.max_abs_error == 0:
            return 0.0
        if not self.peak and self.max_abs_error < NOTHING:
            return 0.0
        return self.max_abs_error / self.peak if self.peak else math.inf

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-quantization-noise ratio; None where the output is not of floats."""
        return decibels(self.signal, self.noise) if self.is_float else None

    @property
    def agreement(self) -> float | None:
        """Share of the rows whose largest score is in the same place; of other outputs than floats, of equal values."""
        if not self.is_float:
            return 1 - self.unequal / self.values if self.values else None
        return self.agreeing / self.rows if self.rows else None

    def summary(self) -> dict[str, Any]:
        """The figures of this output as plain data."""
        rounded: dict[str, Any] = {
            "output": self.name,
            "max_abs_error": self.max_abs_error if self.is_float else None,
            "max_rel_error": self.max_rel_error if self.is_float and math.isfinite(self.max_rel_error) else None,
            "beyond_tolerance": self.beyond if self.is_float else self.unequal,
            "nonfinite": self.nonfinite,
            "sqnr_db": self.sqnr_db,
            "top1_agreement": self.agreement,
            "kl_divergence": self.divergence / self.rows if self.rows else None,
        }
        if self.labelled:
            rounded["accuracy"] = {
                "reference": self.correct[0] / self.labelled,
                "candidate": self.correct[1] / self.labelled,
                "samples": self.labelled,
            }
        return rounded


def is_float(values: NDArray[Any]) -> bool:
    """Whether an array is of floats, bfloat16 included."""
    return values.dtype.kind == "f" or values.dtype.name == "bfloat16"


def looks_like_classes(values: NDArray[Any]) -> bool:
    """(N, classes) or (N, T, classes) with at least two classes."""
    return values.ndim in (2, 3) and values.shape[-1] >= 2 and values.size > 0


def divergence(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows,), KL(p || q) in nats of the distributions that two arrays (rows, classes) of scores stand for."""
    log_p, log_q = _log_probabilities(reference), _log_probabilities(candidate)
    return np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=1), 0.0)


def _log_probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of the softmax; of the rows themselves where they are probabilities already."""
    if (scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        return np.log(np.maximum(scores, 1e-12))
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True)))
