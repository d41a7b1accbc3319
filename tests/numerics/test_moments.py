import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from onnx_ocs.numerics.moments import MomentRecorder, Window, add_products, rows_of
from onnx_ocs.numerics.weights import Axes, grouped, ungrouped

WINDOWS = {
    "plain": ((5, 6), "", Window((3, 2), (1, 1), (1, 1), (0, 0, 0, 0)), 1),
    "padded": ((5, 6), "pads=[1,0,2,1]", Window((3, 2), (1, 1), (1, 1), (1, 0, 2, 1)), 1),
    "strided": ((7, 6), "strides=[2,3]", Window((3, 2), (2, 3), (1, 1), (0, 0, 0, 0)), 1),
    "dilated": ((7, 6), "dilations=[2,3]", Window((3, 2), (1, 1), (2, 3), (0, 0, 0, 0)), 1),
    "grouped": ((5, 6), "group=2", Window((3, 2), (1, 1), (1, 1), (0, 0, 0, 0)), 2),
    "depthwise": ((5, 6), "group=4", Window((3, 2), (1, 1), (1, 1), (0, 0, 0, 0)), 4),
    "same upper": ((5, 6), 'auto_pad="SAME_UPPER", strides=[2,2]', Window((3, 2), (2, 2), (1, 1), (), "SAME_UPPER"), 1),
    "same lower": ((5, 6), 'auto_pad="SAME_LOWER", strides=[2,1]', Window((3, 2), (2, 1), (1, 1), (), "SAME_LOWER"), 1),
    "valid": ((5, 6), 'auto_pad="VALID"', Window((3, 2), (1, 1), (1, 1), (), "VALID"), 1),
    "one axis": ((9,), "pads=[1,2], strides=[2]", Window((3,), (2,), (1,), (1, 2)), 1),
    "three axes": ((4, 5, 3), "pads=[1,0,0,0,1,0]", Window((2, 2, 3), (1, 1, 1), (1, 1, 1), (1, 0, 0, 0, 1, 0)), 2),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_rows_times_weights_are_what_onnxruntime_computes(name, rng):
    sizes, attributes, window, groups = WINDOWS[name]
    attributes = attributes if "group" in attributes else ", ".join(filter(None, [attributes, f"group={groups}"]))
    x = rng.standard_normal((2, 4, *sizes)).astype(np.float32)
    w = rng.standard_normal((8, 4 // groups, *window.kernel)).astype(np.float32)
    kinds = f"float[{','.join(map(str, x.shape))}] x, float[{','.join(map(str, w.shape))}] w"
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({kinds}) => (float[] y) {{ y = Conv <{attributes}> (x, w) }}'
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    session = ort.InferenceSession(model.SerializeToString())
    (wanted,) = session.run(None, {"x": x, "w": w})
    rows = rows_of(x, -1 - len(sizes), groups, window)
    weights = grouped(w, Axes(1, 0, groups, kernel=True)).reshape(groups, 8 // groups, -1)
    found = np.einsum("rgn,gon->rgo", rows, weights).reshape(2, -1, 8)
    np.testing.assert_allclose(found, wanted.reshape(2, 8, -1).swapaxes(1, 2), rtol=0, atol=1e-4)


def test_batches_fold_into_the_moments_of_all_rows(rng):
    rows = rng.standard_normal((50, 3, 4)).astype(np.float32)
    recorder = MomentRecorder(3, 4)
    for part in np.split(rows, [7, 7, 30]):
        recorder.add(part)
    moments = recorder.finish()
    for group in range(3):
        here = rows[:, group].astype(np.float64)
        np.testing.assert_allclose(moments.mean[group], here.mean(axis=0), rtol=0, atol=1e-6)
        np.testing.assert_allclose(moments.about(False)[group], here.T @ here / 50, rtol=0, atol=1e-5)
        np.testing.assert_allclose(moments.about(True)[group], np.cov(here.T, bias=True), rtol=0, atol=1e-5)


def test_patches_of_the_mean_of_some_samples_have_the_mean_of_their_patches(rng):
    window = Window((3, 2), (2, 1), (1, 2), (1, 0, 1, 2))
    data = rng.standard_normal((5, 4, 7, 6)).astype(np.float32)
    whole, folded = (MomentRecorder(2, 12, second=False) for _ in range(2))
    for part in np.split(data, [3]):
        whole.add(rows_of(part, -3, 2, window))
        folded.add(rows_of(part.mean(axis=0, keepdims=True), -3, 2, window), len(part))
    np.testing.assert_allclose(folded.finish().mean, whole.finish().mean, rtol=0, atol=1e-6)


def test_a_mean_that_is_large_beside_the_spread_leaves_the_spread_exact(rng):
    """In float32 the products are off by more than all that is left of them without the mean."""
    spread = rng.standard_normal((300, 6)) * [1e-3, 1e-2, 1, 1, 1, 0]
    rows = (1000 + spread).astype(np.float32)
    recorder = MomentRecorder(1, 6)
    for part in np.split(rows.reshape(300, 1, 6), 3):
        recorder.add(part)
    found = recorder.finish().about(True)[0]
    np.testing.assert_allclose(found, np.cov(rows.T.astype(np.float64), bias=True), rtol=1e-3, atol=1e-8)
    assert np.linalg.eigvalsh(found).min() > -1e-8


def test_products_beyond_float32_are_finite(rng):
    rows = (rng.standard_normal((20, 2, 3)) * 1e25).astype(np.float32)
    recorder = MomentRecorder(2, 3)
    recorder.add(rows)
    here = rows[:, 1].astype(np.float64)
    np.testing.assert_allclose(recorder.finish().second[1], here.T @ here / 20, rtol=1e-6)


def test_copies_of_channels_have_shares_of_their_moments(rng):
    data = rng.standard_normal((40, 3, 2))
    source, gain = np.array([0, 1, 2, 1]), np.array([1, 0.25, 1, 0.75])

    def of(rows):
        recorder = MomentRecorder(1, rows[0].size)
        recorder.add(rows.reshape(len(rows), 1, -1))
        return recorder.finish()

    wanted, found = of(data[:, source] * gain[:, None]), of(data).expanded(source, gain, 2)
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.second, wanted.second, rtol=0, atol=1e-5)


AXES = {
    "Conv": ((6, 4, 3, 2), Axes(1, 0, kernel=True)),
    "Conv grouped": ((6, 4, 3), Axes(1, 0, 3, kernel=True)),
    "ConvTranspose grouped": ((6, 4, 3), Axes(0, 1, 2, True)),
    "Gemm": ((5, 4), Axes(0, 1)),
    "MatMul batched": ((2, 3, 5, 4), Axes(2, 3)),
    "vector": ((5,), Axes(0, None)),
    "batched vector": ((3, 5), Axes(1, None)),
}


@pytest.mark.parametrize("name", AXES)
def test_rows_come_back_in_the_shape_of_the_weight(name, rng):
    shape, axes = AXES[name]
    weight = rng.standard_normal(shape)
    rows = grouped(weight, axes)
    assert rows.shape[0] == axes.groups
    assert rows.shape[2] == shape[axes.input] // (axes.groups if axes.groups_on_input else 1)
    np.testing.assert_array_equal(ungrouped(rows, axes, shape), weight)


@pytest.mark.parametrize(("left", "right"), [(1e15, 1e30), (1e30, 1e15), (1e20, 1e20), (1e15, 1e15)])
def test_products_of_large_and_huge_values_are_finite(left, right):
    first, second = (np.full((3, 1, 2), value, np.float32) for value in (left, right))
    sums = np.ones((1, 2, 2))
    add_products(sums, first, second)
    np.testing.assert_allclose(sums, 3 * left * right, rtol=1e-6)


def test_products_of_different_sizes_share_their_room(rng):
    for inputs in (3, 7, 2, 7):
        first, second = (rng.standard_normal((5, 2, inputs)).astype(np.float32) for _ in range(2))
        sums = np.ones((2, inputs, inputs))
        add_products(sums, first, second)
        np.testing.assert_allclose(sums - 1, np.einsum("rgi,rgj->gij", first, second), rtol=0, atol=1e-5)
