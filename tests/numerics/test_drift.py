import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from onnx_ocs.numerics import drift
from onnx_ocs.numerics.drift import DriftRecorder, making_up


def recorded(exact, found, cuts=()):
    recorder = DriftRecorder(*exact.shape[1:])
    for first, second in zip(np.split(exact, cuts), np.split(found, cuts), strict=True):
        recorder.add(first, second)
    return recorder.finish()


def test_batches_fold_into_the_drift_of_all_rows(rng):
    exact = (rng.standard_normal((60, 3, 4)) + 5).astype(np.float32)
    found = (0.8 * exact + 0.1 * rng.standard_normal((60, 3, 4))).astype(np.float32)
    drifted = recorded(exact, found, [7, 7, 31])
    for group in range(3):
        x, y = (part[:, group].astype(np.float64) for part in (exact, found))
        np.testing.assert_allclose(drifted.found.mean[group], y.mean(axis=0), rtol=0, atol=1e-5)
        np.testing.assert_allclose(drifted.found.about(False)[group], y.T @ y / 60, rtol=0, atol=1e-4)
        np.testing.assert_allclose(drifted.lost[group], (x - y).mean(axis=0), rtol=0, atol=1e-5)
        np.testing.assert_allclose(drifted.about(False)[group], (x - y).T @ y / 60, rtol=0, atol=1e-4)
        centered = (x - y).T @ (y - y.mean(axis=0)) / 60
        np.testing.assert_allclose(drifted.about(True)[group], centered, rtol=0, atol=1e-4)
    some = drifted.taken(np.array([2, 0, 2]))
    np.testing.assert_array_equal(some.cross, drifted.cross[[2, 0, 2]])
    np.testing.assert_array_equal(some.found.about(True), drifted.found.about(True)[[2, 0, 2]])


def test_rows_that_have_little_to_do_with_each_other_have_no_drift(rng):
    exact, other = (rng.standard_normal((60, 2, 4)).astype(np.float32) for _ in range(2))
    assert DriftRecorder(1, 2).finish() is None
    assert recorded(exact, other) is None
    assert recorded(exact, np.full_like(exact, np.nan)) is None
    assert recorded(exact, exact[::-1]) is None
    assert recorded(exact, exact + 0.3 * other) is not None
    assert recorded(0 * exact, 0 * exact) is not None
    assert recorded(exact[:8], exact[:8]) is not None
    assert recorded(exact[:7], exact[:7]) is None  # of 4 inputs


def test_rows_wait_until_they_are_enough(rng, monkeypatch):
    """No product is made of fewer; those that waited count like all others."""
    exact, found = (rng.standard_normal((20, 1, 4)).astype(np.float32) for _ in range(2))
    found = exact + 0.1 * found
    recorder, folded = DriftRecorder(1, 4), []
    monkeypatch.setattr(recorder, "_fold", lambda exact, found: folded.append(len(found)))
    for rows, wanted in (3, []), (4, []), (1, [3, 4, 1]), (2, [3, 4, 1, 2]):
        recorder.add(exact[:rows], found[:rows])
        assert folded == wanted
    some, whole = recorded(exact, found, [3, 7, 8]), recorded(exact, found)
    np.testing.assert_allclose(some.cross, whole.cross, rtol=0, atol=1e-6)
    np.testing.assert_allclose(some.found.second, whole.found.second, rtol=0, atol=1e-6)


def test_the_drift_of_large_values_is_finite(rng):
    exact = (1e20 * rng.standard_normal((64, 1, 6))).astype(np.float32)
    drifted = recorded(exact, (1.1 * exact).astype(np.float32))
    np.testing.assert_allclose(drifted.cross[0], -0.11 * np.cov(exact[:, 0].T.astype(np.float64), bias=True), rtol=1e-3)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4))
def test_making_up_is_the_regression_of_the_outputs_on_the_drifted_data(seed, inputs, groups, outputs):
    """Without damping, and with moments of the drifted data itself, it is what least squares finds."""
    rng = np.random.default_rng(seed)
    exact = rng.standard_normal((200, groups, inputs))
    found = exact @ (np.eye(inputs) + 0.3 * rng.standard_normal((inputs, inputs))) + 0.1 * rng.standard_normal(
        exact.shape
    )
    rows = rng.standard_normal((groups, outputs, inputs))
    cross = np.einsum("rgi,rgj->gij", exact - found, found) / 200
    second = np.einsum("rgi,rgj->gij", found, found) / 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "DAMPING", 0)
        made = making_up(rows, cross, second)
    for group in range(groups):
        wanted = np.linalg.lstsq(found[:, group], exact[:, group] @ rows[group].T, rcond=None)[0].T
        np.testing.assert_allclose(made[group], wanted, rtol=0, atol=1e-5 * np.linalg.cond(second[group]))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_making_up_is_safe_for_dead_inputs_and_any_scale(scale, rng):
    exact = scale * rng.standard_normal((30, 1, 40))
    exact[:, :, 5:9] = 0
    found = exact * 0.5
    cross, second = (np.einsum("rgi,rgj->gij", part, found) / 30 for part in (exact - found, found))
    rows = rng.standard_normal((1, 3, 40))
    made = making_up(rows, cross, second)
    assert np.isfinite(made).all()
    np.testing.assert_array_equal(made[:, :, 5:9], rows[:, :, 5:9])
    error = [np.square(exact @ rows[0].T - found @ part.T).mean() for part in (rows[0], made[0])]
    assert error[1] < 0.5 * error[0]


def test_without_drift_weights_stay_as_they_are(rng):
    exact = rng.standard_normal((30, 2, 5)).astype(np.float32)
    rows = rng.standard_normal((2, 3, 5))
    second = np.einsum("rgi,rgj->gij", exact, exact) / 30
    np.testing.assert_array_equal(making_up(rows, recorded(exact, exact).about(False), second), rows)
