"""Statistics gathered batch by batch are those of all values at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_ocs.numerics.clip import thresholds
from onnx_ocs.numerics.split import plan_splits
from onnx_ocs.numerics.statistics import PARTS, Recorder, Statistics, channel_parts


def record(batches, thin=1):
    """The statistics of one tensor, from batches of (outer, C, inner)."""
    recorder = Recorder([batches[0].shape[1]])
    for values in batches:
        low, high, mean = (f(values, axis=(0, 2)) for f in (np.min, np.max, np.mean))
        recorder.add(low, high, mean, [values.size], [values], thin, len(values))
    (found,) = recorder.finish()
    return found


def batches_of(seed, number, channels, inner, spread):
    rng = np.random.default_rng(seed)
    scale = (10.0 ** rng.uniform(-spread, spread, (number, 1, channels, 1))).astype(np.float32)
    return list((rng.standard_normal((number, 3, channels, inner)).astype(np.float32)) * scale)


def equal(first: Statistics, second: Statistics):
    """Whether two are the same but for the order in which floats were summed, and what counts as an outlier."""
    for name, values in first.arrays().items():
        if name in ("mean", "square"):
            size = first.peaks ** (2 if name == "square" else 1)
            assert (np.abs(values - second.arrays()[name]) <= 1e-5 * size).all()
        elif name != "outliers":
            np.testing.assert_array_equal(values, second.arrays()[name])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 5), st.integers(1, 200), st.sampled_from([0, 1, 4]))
def test_they_are_those_of_all_values_in_any_order_and_partition(seed, number, channels, inner, spread):
    batches = batches_of(seed, number, channels, inner, spread)
    whole = np.concatenate(batches).astype(np.float64)
    found = record(batches)
    np.testing.assert_array_equal(found.low, whole.min(axis=(0, 2)))
    np.testing.assert_array_equal(found.high, whole.max(axis=(0, 2)))
    np.testing.assert_allclose(found.mean, whole.mean(axis=(0, 2)), rtol=1e-4, atol=1e-5 * np.abs(whole).max())
    np.testing.assert_allclose(found.square, np.square(whole).mean(axis=(0, 2)), rtol=1e-4)
    assert found.values == whole.size
    assert found.samples == 3 * number
    assert found.reach > np.abs(whole).max() >= found.reach / 2
    counts, _ = np.histogram(np.abs(whole), PARTS, (0, found.reach))
    np.testing.assert_array_equal(found.counts, counts)
    for channel in range(channels):
        counts, _ = np.histogram(np.abs(whole[:, channel]), channel_parts(channels), (0, found.reach))
        np.testing.assert_array_equal(found.channel_counts[channel], counts)
    equal(found, record(batches[::-1]))
    equal(found, record([np.concatenate(batches)]))


def test_parts_are_joined_exactly_when_the_values_grow():
    """Every power of two once: the last one decides the width of all parts."""
    batches = [np.full((1, 1, 4), 2.0**power, np.float32) for power in range(-20, 21)]
    found = record(batches)
    counts, _ = np.histogram(np.repeat(2.0 ** np.arange(-20, 21), 4), PARTS, (0, found.reach))
    np.testing.assert_array_equal(found.counts, counts)


def test_channels_with_outliers_are_found():
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((8, 16, 50)).astype(np.float32) for _ in range(20)]
    for values in batches:
        values[:, 5] *= 6
        values[:, 11] *= 3
    found = record(batches)
    assert np.argsort(-found.outliers)[:2].tolist() == [5, 11]
    whole = np.abs(np.concatenate(batches))
    beyond = np.count_nonzero(whole > np.quantile(whole, 0.99), axis=(0, 2))
    np.testing.assert_allclose(found.outliers, beyond, atol=0.1 * beyond.max())


@pytest.mark.parametrize("zeros_first", [True, False])
def test_zeros_are_counted_whenever_they_come(zeros_first):
    batches = [np.zeros((2, 3, 4), np.float32), np.ones((2, 3, 4), np.float32)]
    found = record(batches if zeros_first else batches[::-1])
    assert found.counts[0] == 24
    assert found.counts.sum() == 48
    assert (found.channel_counts.sum(axis=1) == 16).all()


def test_a_tensor_of_zeros_has_a_threshold_of_zero():
    found = record([np.zeros((2, 3, 4), np.float32)])
    assert found.peak() == 0
    assert thresholds(found.histogram(), "mse", 8)[0] == 0


@pytest.mark.parametrize("clip", ["none", "mse", "aciq", "kl", "sawb", "percentile:99.9", "sigma:3", "0.7"])
@pytest.mark.parametrize("copies", [[1, 1, 1, 1], [1, 3, 1, 1], [2, 2, 1, 4]])
@pytest.mark.parametrize("thin", [1, 4])
def test_thresholds_of_split_data_are_those_of_the_copies(clip, copies, thin):
    """The histogram of a split is derived; that of the copies themselves is the truth."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((40, 4, 500)).astype(np.float32) * np.array([1, 5, 1, 2], np.float32)[:, None]
    plan = plan_splits(np.array(copies))
    shares = values[:, plan.source] * plan.gain.astype(np.float32)[:, None]
    derived, true = record([values], thin).histogram(plan), record([shares]).histogram()
    assert derived.peak == pytest.approx(true.peak, rel=1e-6)
    found, wanted = (thresholds(seen, clip, 6)[0] for seen in (derived, true))
    assert found == pytest.approx(wanted, rel=0.05 if clip in ("kl", "mse", "sawb") else 0.01)


def test_they_survive_storage():
    found = record([np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)])
    equal(found, Statistics.of(found.arrays()))
    with pytest.raises(KeyError):
        Statistics.of({})


def test_nothing_seen_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        Recorder([3]).finish()


@pytest.mark.parametrize("channels", [1, 64, 1000, 10**6])
def test_histograms_of_channels_take_bounded_memory(channels):
    parts = channel_parts(channels)
    assert PARTS % parts == 0
    assert channels * parts <= max(2**18, 16 * channels)
