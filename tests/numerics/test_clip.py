"""Clip methods against raw values, dense integration and plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_ocs.numerics.clip import (
    CLIP_METHODS,
    SAWB,
    clip_names,
    gauss_factor,
    laplace_factor,
    parse_clip,
    thresholds,
)
from onnx_ocs.numerics.histogram import BINS, Histogram, histogram

ALL = [*(name for name, method in CLIP_METHODS.items() if not method.parameter), "percentile:99", "sigma:2.5", "0.7"]


def rows_of(rng, rows=4, length=4000):
    values = rng.standard_normal((rows, length))
    values[1] = rng.laplace(size=length)
    values[2] = rng.random(length)
    return values


def squared_error(values, threshold, levels):
    step = threshold / levels
    return float(np.sum(np.square(values - np.clip(np.floor(values / step + 0.5), -levels, levels) * step)))


@pytest.mark.parametrize("clip", ALL)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_thresholds_lie_above_zero_and_at_most_at_the_peak(clip, bits, rng):
    values = np.concatenate([rows_of(rng), np.zeros((1, 4000)), np.full((1, 4000), -3.0), np.eye(1, 4000)])
    found = thresholds(histogram(values), clip, bits)
    peaks = np.abs(values).max(axis=1)
    assert (found <= peaks).all()
    assert ((found > 0) == (peaks > 0)).all()


@pytest.mark.parametrize("clip", ALL)
@pytest.mark.parametrize("bits", [3, 8])
def test_thresholds_scale_with_the_values_and_see_neither_sign_nor_order(clip, bits, rng):
    values = rows_of(rng)
    found = thresholds(histogram(values), clip, bits)
    np.testing.assert_allclose(thresholds(histogram(values * 2.0**-7), clip, bits), found * 2.0**-7, rtol=1e-9)
    np.testing.assert_allclose(thresholds(histogram(-values[:, ::-1]), clip, bits), found, rtol=1e-9)
    single = [thresholds(histogram(row[None]), clip, bits)[0] for row in values]
    np.testing.assert_allclose(single, found, rtol=1e-9)


@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_is_within_a_percent_of_the_best_threshold(bits, rng):
    levels = 2 ** (bits - 1) - 1
    values = rows_of(rng)
    found = thresholds(histogram(values), "mse", bits)
    for row, threshold in zip(values, found, strict=True):
        every = np.abs(row).max() * np.linspace(0.01, 1, 100)
        best = min(squared_error(row, other, levels) for other in every)
        assert squared_error(row, threshold, levels) <= 1.01 * best


@pytest.mark.parametrize("bits", range(2, 9))
def test_aciq_factors_have_the_least_integrated_error(bits):
    """Tails by numerical integration of the densities, rounding as ``step² / 12``."""
    levels = 2 ** (bits - 1) - 1
    x = np.linspace(0, 60, 600_001)
    densities = {laplace_factor: np.exp(-x), gauss_factor: 2 * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)}
    for factor, density in densities.items():

        def error(threshold, density=density):
            tail = np.sum(np.square(np.maximum(x - threshold, 0)) * density) * (x[1] - x[0])
            return tail + threshold**2 / (12 * levels**2)

        best = factor(levels)
        assert error(best) < error(best * 1.01)
        assert error(best) < error(best / 1.01)


def test_aciq_takes_the_nearer_density(rng):
    values = np.stack([rng.laplace(size=100_000), rng.standard_normal(100_000)])
    found = thresholds(histogram(values), "aciq", 4)
    np.testing.assert_allclose(found, [laplace_factor(7), gauss_factor(7)], rtol=0.02)


def plain_divergence(counts, length, parts):
    """Migacz's divergence with MXNet's smoothing, one bin at a time."""
    p = list(counts[:length])
    p[-1] += sum(counts[length:])
    q = [0.0] * length
    for part in range(parts):
        start, stop = part * length // parts, (part + 1) * length // parts
        filled = [i for i in range(start, stop) if p[i] > 0]
        for i in filled:
            q[i] = sum(counts[start:stop]) / len(filled)

    def smoothed(values):
        empty = sum(value <= 0 for value in values)
        taken = 1e-4 * empty / max(1, length - empty)
        smooth = [max(value - taken, 1e-4) if value > 0 else 1e-4 for value in values]
        return [value / sum(smooth) for value in smooth]

    return sum(a * np.log(a / b) for a, b in zip(smoothed(p), smoothed(q), strict=True))


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_kl_has_the_least_divergence_of_its_candidates(bits, rng):
    bins, parts = 256, 2 ** (bits - 1)
    seen = histogram(rows_of(rng, rows=3, length=3000), bins)
    found = thresholds(seen, "kl", bits) / seen.peak * bins
    lengths = sorted({bins * i // 100 for i in range(1, 101) if bins * i // 100 >= parts})
    for row in range(3):
        divergences = {length: plain_divergence(seen.counts[row], length, parts) for length in lengths}
        assert divergences[round(found[row])] == pytest.approx(min(divergences.values()), rel=1e-9)


def test_the_coefficients_of_sawb_are_a_fit_through_six_densities():
    def at(limit):
        return (np.arange(20_000) + 0.5) / 20_000 * limit

    densities = [
        (at(8), lambda x: np.exp(-(x**2) / 2)),
        (at(1), np.ones_like),
        (at(25), lambda x: np.exp(-x)),
        (at(30), lambda x: np.exp(-x) / (1 + np.exp(-x)) ** 2),
        (at(1), lambda x: 1 - x),
        (at(np.pi), lambda x: np.exp(np.cos(x))),
    ]
    for bits, wanted in SAWB.items():
        levels, points = 2 ** (bits - 1) - 1, []
        for x, density in densities:
            p = density(x) / density(x).sum()

            def error(threshold, x=x, p=p, levels=levels):
                step = threshold / levels
                return p @ np.square(x - np.minimum(np.floor(x / step + 0.5), levels) * step)

            every = np.linspace(0.02, 1, 99) * x[-1]
            for _ in range(3):
                best = min(every, key=error)
                every = np.linspace(best - (every[1] - every[0]), min(best + (every[1] - every[0]), x[-1]), 50)
            points.append((np.sqrt(p @ x**2) / (p @ x), best / (p @ x)))
        first, second = np.polyfit(*zip(*points, strict=True), 1)
        np.testing.assert_allclose([first, -second], wanted, rtol=0.005)


@given(st.floats(0.1, 100), st.integers(0, 1000))
def test_so_many_percent_are_at_or_below_the_percentile(percent, seed):
    values = np.random.default_rng(seed).standard_normal((1, 500))
    found = thresholds(histogram(values), f"percentile:{percent}", 8)[0]
    magnitudes, width = np.abs(values[0]), np.abs(values).max() / BINS
    assert np.mean(magnitudes <= found + width) >= percent / 100 - 1e-9
    assert np.mean(magnitudes <= found - width) <= percent / 100


def test_sigma_and_fractions_are_what_they_say(rng):
    seen = histogram(rows_of(rng))
    deviation = np.sqrt(np.mean(np.square(rows_of(np.random.default_rng(0))), axis=1))
    np.testing.assert_allclose(thresholds(seen, "sigma:1.5", 4), np.minimum(1.5 * deviation, seen.peak), rtol=1e-9)
    np.testing.assert_array_equal(thresholds(seen, "0.25", 4), seen.peak * 0.25)
    np.testing.assert_array_equal(thresholds(seen, "none", 4), seen.peak)


@pytest.mark.parametrize(
    "text", ["", "most", "mse:3", "sigma", "sigma:", "sigma:x", "sigma:0", "percentile:101", "0", "1.5", "-1"]
)
def test_what_is_no_method_names_the_choices(text):
    with pytest.raises(ValueError, match="clip") as caught:
        parse_clip(text)
    assert "must be" in str(caught.value) or "choose" in str(caught.value)
    assert "percentile:P" in clip_names()


def test_histograms_count_each_value_once(rng):
    values = np.concatenate([rows_of(rng), np.zeros((1, 4000))]).astype(np.float32)
    seen = histogram(values, 64)
    for row, counts, peak in zip(values, seen.counts, seen.peak, strict=True):
        wanted, _ = np.histogram(np.abs(row.astype(np.float64)), 64, (0, peak or 1))
        np.testing.assert_allclose(counts, wanted, atol=2)  # values on an edge may fall to either side
        assert counts.sum() == len(row)
    np.testing.assert_allclose(seen.mean, np.abs(values).mean(axis=1, dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(seen.square, np.square(values, dtype=np.float64).mean(axis=1), rtol=1e-9)
    assert isinstance(seen, Histogram)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_histograms_are_of_finite_values(value):
    with pytest.raises(ValueError, match="finite"):
        histogram(np.array([[1.0, value]]))
