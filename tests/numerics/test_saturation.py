"""Pairs of products in 16 bits: against brute force, and against onnxruntime's kernels on this CPU."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from onnx_ocs.numerics import saturation
from onnx_ocs.numerics.saturation import kernel_order, pair_sums, row_sums

CPU = Path("/proc/cpuinfo")
FLAGS = set(CPU.read_text().split()) if CPU.exists() else set()
without_vnni = pytest.mark.skipif(
    "avx2" not in FLAGS or bool(FLAGS & {"avx_vnni", "avx512_vnni", "amx_int8"}),
    reason="the kernels of this CPU do not saturate",
)


@pytest.mark.parametrize("length", [1, 2, 5, 6])
@pytest.mark.parametrize(("low", "high"), [(0, 255), (3, 90), (0, 0)])
def test_the_extremes_are_those_of_all_data(length, low, high, rng):
    weights = rng.integers(-128, 128, (4, length)).astype(np.int8)
    sums = pair_sums(weights, low, high)
    padded = np.pad(weights.astype(int), ((0, 0), (0, length % 2))).reshape(4, -1, 2)
    reached = [padded @ np.array(ends) for ends in itertools.product((low, high), repeat=2)]
    np.testing.assert_array_equal(sums.lowest, np.min(reached, axis=0))
    np.testing.assert_array_equal(sums.highest, np.max(reached, axis=0))
    np.testing.assert_array_equal(sums.worst, np.abs(reached).max(axis=(0, 2)))


def test_each_entry_may_have_a_range_of_its_own():
    sums = pair_sums(np.array([[2, 3, -1]]), np.array([0, 1, 5]), np.array([10, 1, 7]))
    np.testing.assert_array_equal(sums.lowest, [[3, -7]])
    np.testing.assert_array_equal(sums.highest, [[23, -5]])


@pytest.mark.parametrize(
    ("weights", "high", "saturates"),
    [
        ([127, 1], 255, False),  # 32640
        ([127, 2], 255, True),  # 32895
        ([63, 63], 255, False),  # 7 bits
        ([-64, -64], 255, False),  # 8 bits of which one is spared
        ([-65, -64], 255, True),
        ([127, -127], 255, False),  # never of one sign
        ([127, 127], 129, False),  # 32766
        ([127, 127], 130, True),
        ([0, 127, 127, 0], 255, False),  # neighbours, but not a pair
        ([127], 255, False),
    ],
)
def test_the_limits_of_16_bits(weights, high, saturates):
    rows = np.array([weights], np.int8)
    assert row_sums(rows, 0, high).saturates.tolist() == [saturates]
    assert pair_sums(rows, 0, high).saturates.any() == saturates


def test_rows_are_looked_at_some_at_a_time(monkeypatch, rng):
    weights = rng.integers(-128, 128, (7, 10)).astype(np.int8)
    whole = row_sums(weights, 0, 255)
    monkeypatch.setattr(saturation, "BLOCK", 20)
    parts = row_sums(weights, 0, 255)
    np.testing.assert_array_equal(parts.saturates, whole.saturates)
    np.testing.assert_array_equal(parts.worst, whole.worst)
    assert row_sums(weights[:0], 0, 255).worst.shape == (0,)


def test_the_order_of_a_convolution_has_channels_innermost():
    weights = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert kernel_order(weights, 1, 0)[1].tolist() == [12, 16, 20, 13, 17, 21, 14, 18, 22, 15, 19, 23]
    assert kernel_order(np.arange(6).reshape(2, 3), 0, 1).tolist() == [[0, 3], [1, 4], [2, 5]]


def saturated(data, weights):
    """(positions, rows), what the kernels of the CPU make of (positions, K) times (rows, K)."""
    odd = data.shape[1] % 2
    data, weights = (np.pad(each.astype(np.int64), ((0, 0), (0, odd))) for each in (data, weights))
    products = data[:, None, :] * weights[None]
    return np.clip(products[..., ::2] + products[..., 1::2], saturation.LOWEST, saturation.HIGHEST).sum(axis=-1)


def run(text, **feeds):
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>' + text)
    constants = {name: feeds.pop(name) for name in ("w", "zero") if name in feeds}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in constants.items())
    return ort.InferenceSession(model.SerializeToString()).run(None, feeds)[0]


def weights_and_data(rng, shape, data_shape):
    weights = rng.choice(np.array([-127, 127, 90, 30], np.int8), shape)
    return weights, rng.integers(150, 256, data_shape).astype(np.uint8)


@without_vnni
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [3, 4, 16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_pair_what_the_order_says(kernel, channels, groups, rng):
    weights, data = weights_and_data(rng, (4 * groups, channels, kernel, kernel), (1, channels * groups, 5, 5))
    size = 6 - kernel
    text = f"""g (uint8[1,{channels * groups},5,5] x) => (uint8[1,{4 * groups},{size},{size}] y)
        <float s = {{1}}, float o = {{1024}}, uint8 a = {{0}}, int8 b = {{0}}, uint8 h = {{128}}> {{
        y = QLinearConv <group={groups}> (x, s, a, w, s, b, o, h) }}"""
    found = run(text, x=data, w=weights)
    windows = np.lib.stride_tricks.sliding_window_view(data[0], (kernel, kernel), (1, 2))  # C, size, size, k, k
    rows = kernel_order(weights, 1, 0)
    sums = []
    for group in range(groups):
        held = windows[group * channels : (group + 1) * channels]
        columns = held.transpose(1, 2, 3, 4, 0).reshape(size * size, -1)
        sums.append(saturated(columns, rows[4 * group : 4 * group + 4]))
    expected = np.clip(np.rint(np.concatenate(sums, axis=1) / 1024) + 128, 0, 255)
    np.testing.assert_array_equal(found[0].reshape(4 * groups, -1).T, expected)
    assert (row_sums(rows, 0, 255).saturates).any()


@without_vnni
@pytest.mark.parametrize("positions", [1, 6])
@pytest.mark.parametrize("length", [7, 32, 400])
def test_products_of_matrices_pair_along_their_sum(length, positions, rng):
    weights, data = weights_and_data(rng, (length, 8), (positions, length))
    text = f"""g (uint8[{positions},{length}] x) => (int32[{positions},8] y) <uint8 a = {{0}}> {{
        y = MatMulInteger(x, w, a) }}"""
    np.testing.assert_array_equal(run(text, x=data, w=weights), saturated(data, kernel_order(weights, 0, 1)))


@without_vnni
def test_depthwise_convolutions_and_signed_data_do_not_saturate(rng):
    weights, data = weights_and_data(rng, (8, 1, 3, 3), (1, 8, 3, 3))
    text = """g (uint8[1,8,3,3] x) => (uint8[1,8,1,1] y)
        <float s = {1}, float o = {2048}, uint8 a = {0}, int8 b = {0}, uint8 h = {128}> {
        y = QLinearConv <group=8> (x, s, a, w, s, b, o, h) }"""
    exact = (data[0].astype(int) * weights[:, 0]).sum(axis=(1, 2))
    np.testing.assert_array_equal(
        run(text, x=data, w=weights).reshape(-1), np.clip(np.rint(exact / 2048) + 128, 0, 255)
    )
    weights, data = weights_and_data(rng, (32, 8), (4, 32))
    signed = (data // 2).astype(np.int8)
    text = "g (int8[4,32] x) => (int32[4,8] y) <int8 a = {0}> { y = MatMulInteger(x, w, a) }"
    np.testing.assert_array_equal(run(text, x=signed, w=weights), signed.astype(int) @ weights.astype(int))
