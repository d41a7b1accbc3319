"""The figures of a comparison against their definitions."""

import numpy as np
import pytest

from onnx_ocs.numerics.compare import EXACT_DB, Difference, decibels, divergence


def test_decibels():
    assert decibels(100, 1) == pytest.approx(20)
    assert decibels(1, 0) == EXACT_DB
    assert decibels(0, 1) == -EXACT_DB
    assert decibels(1, float("nan")) == -EXACT_DB


def test_batches_fold_to_what_all_at_once_gives(rng):
    first = rng.standard_normal((10, 5)).astype(np.float32)
    second = first + rng.standard_normal((10, 5)).astype(np.float32) * 0.3
    labels = rng.integers(0, 5, 10)
    whole, parts = Difference("y"), Difference("y")
    whole.add(first, second, labels)
    for start in range(0, 10, 3):
        parts.add(first[start : start + 3], second[start : start + 3], labels[start : start + 3])
    for name, value in whole.summary().items():
        assert parts.summary()[name] == (value if isinstance(value, str | dict) else pytest.approx(value)), name
    assert whole.agreement == np.mean(first.argmax(axis=1) == second.argmax(axis=1))
    assert whole.summary()["accuracy"]["candidate"] == np.mean(second.argmax(axis=1) == labels)
    error = second.astype(np.float64) - first
    assert whole.sqnr_db == pytest.approx(10 * np.log10(np.sum(first.astype(np.float64) ** 2) / np.sum(error**2)))


def test_values_that_are_finite_on_one_side_only_are_counted():
    difference = Difference("y")
    difference.add(np.array([1.0, np.nan, np.inf, 2.0]), np.array([np.nan, np.nan, -np.inf, 2.0]))
    assert difference.nonfinite == 2
    same = Difference("y")
    same.add(np.array([np.inf, -np.inf, np.nan]), np.array([np.inf, -np.inf, np.nan]))
    assert same.nonfinite == 0


def test_values_beyond_the_tolerance_are_counted():
    difference = Difference("y")
    difference.add(np.array([1.0, 10.0, 100.0]), np.array([1.05, 10.5, 105.0]), atol=0.1, rtol=0.01)
    assert difference.beyond == 2


def test_integers_agree_by_the_share_of_equal_values():
    difference = Difference("y")
    difference.add(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]))
    assert difference.agreement == 0.75
    assert difference.sqnr_db is None


def test_other_shapes_are_an_error():
    with pytest.raises(ValueError, match="shape"):
        Difference("y").add(np.zeros(3), np.zeros(4))


def test_divergence_is_that_of_the_softmax_or_of_probabilities(rng):
    first, second = rng.standard_normal((2, 3, 4))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (first, second))
    wanted = np.sum(p * np.log(p / q), axis=1)
    np.testing.assert_allclose(divergence(first, second), wanted)
    np.testing.assert_allclose(divergence(p, q), wanted)
