"""Integers in the layout of ONNX."""

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from onnx_ocs.graph.integers import PER_CHANNEL_SINCE, TYPES, narrowest, needed_opset, packed


def unpacked(raw, width, shape):
    """As onnx reads them."""
    tensor = onnx.TensorProto(data_type=TYPES[width], dims=shape, raw_data=raw)
    return onnx.numpy_helper.to_array(tensor).astype(np.int8)


@pytest.mark.parametrize("width", TYPES)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (4,), (5,), (7,), (8,), (63,), (3, 5), (2, 3, 3)], ids=str)
def test_packed_integers_are_read_back_by_onnx(width, shape, rng):
    integers = rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), shape, np.int8)
    integers = np.asarray(integers, np.int8)
    raw = packed(integers, width)
    assert len(raw) == -(-integers.size * width // 8)
    np.testing.assert_array_equal(unpacked(raw, width, shape), integers)


@pytest.mark.parametrize("width", TYPES)
def test_every_value_survives(width):
    integers = np.arange(-(2 ** (width - 1)), 2 ** (width - 1)).astype(np.int8)
    np.testing.assert_array_equal(unpacked(packed(integers, width), width, integers.shape), integers)


@pytest.mark.parametrize("width", TYPES)
def test_packing_is_that_of_onnx(width, rng):
    integers = rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), 37, np.int8)
    kind = onnx.helper.tensor_dtype_to_np_dtype(TYPES[width])
    assert packed(integers, width) == onnx.numpy_helper.from_array(integers.astype(kind)).raw_data


@pytest.mark.parametrize("width", TYPES)
def test_integers_that_are_not_contiguous_are_packed_in_their_order(width, rng):
    integers = rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), (5, 6), np.int8)
    for view in (integers.T, integers[:, ::2], integers[::-1]):
        assert packed(view, width) == packed(view.copy(), width)
        np.testing.assert_array_equal(unpacked(packed(view, width), width, view.shape), view)


def test_nothing_packs_to_nothing():
    assert [packed(np.zeros((0, 3), np.int8), width) for width in TYPES] == [b""] * len(TYPES)


@pytest.mark.parametrize(("bits", "width"), [(2, 2), (3, 4), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8)])
def test_the_narrowest_type_holds_the_bits(bits, width):
    assert narrowest(bits) == width


@pytest.mark.parametrize("width", TYPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_needed_opset_takes_the_type_and_the_one_before_does_not(width, per_channel):
    needed = needed_opset(width, per_channel)
    assert accepted(width, needed, per_channel)
    assert not accepted(width, needed - 1, per_channel)


def accepted(width, opset, per_channel):
    """Whether the specification of this opset has DequantizeLinear for the type, and with an axis if one is needed."""
    try:
        schema = onnx.defs.get_schema("DequantizeLinear", opset)
    except onnx.defs.SchemaError:
        return False
    name = f"tensor({onnx.TensorProto.DataType.Name(TYPES[width]).lower()})"
    return name in schema.type_constraints[0].allowed_type_strs and (not per_channel or "axis" in schema.attributes)


def test_scales_of_channels_came_with_an_axis():
    assert "axis" in onnx.defs.get_schema("DequantizeLinear", PER_CHANNEL_SINCE).attributes
    assert "axis" not in onnx.defs.get_schema("DequantizeLinear", PER_CHANNEL_SINCE - 1).attributes
