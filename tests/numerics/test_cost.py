"""How many channels a layer gets, and what copies cost."""

import pytest

from onnx_ocs.numerics.cost import Cost, columns, room
from onnx_ocs.numerics.split import extra_channels


@pytest.mark.parametrize("channels", [3, 16, 63, 64, 65, 511])
@pytest.mark.parametrize("ratio", [0.01, 0.02, 0.3])
@pytest.mark.parametrize("copied", [0, 1, 5])
def test_room_is_the_next_multiple_within_its_bound(channels, ratio, copied):
    found = room(extra_channels(ratio, channels), channels, copied, (32, 8, 4), 0.25)
    exact = room(extra_channels(ratio, channels), channels, copied, (), 0.25).extra
    if found.multiple > 1:
        assert (channels + copied + found.extra) % found.multiple == 0
        assert exact <= found.extra <= max(0.25 * channels, exact)
    else:
        assert found.extra in (0, exact)
        assert found.reason


def test_the_best_multiple_that_fits_is_taken():
    assert room(extra_channels(0.02, 64), 64, 0, (32, 16, 8, 4), 0.25).extra == 16
    assert room(extra_channels(0.02, 64), 64, 0, (32, 16, 8, 4), 0.5).extra == 32
    assert room(extra_channels(0.02, 64), 64, 0, (4,), 0.25).extra == 4


def test_a_narrow_layer_gets_exactly_what_was_asked_or_nothing():
    """From 8 channels the next multiple of 4 is half as many again; 9 would run twice as slow, 8 of 9 would not."""
    assert room(extra_channels(0.02, 8), 8, 0, (4,), 0.25).extra == 0
    found = room(extra_channels(0.02, 9), 9, 0, (16,), 0.25)
    assert found.extra == 1
    assert found.reason


def test_without_multiples_the_number_is_exact():
    assert room(extra_channels(0.02, 64), 64, 0, (), 0.25).extra == 2
    assert room(extra_channels(0, 64), 64, 0, (4,), 0.25).extra == 0


def test_columns_are_whole_blocks_and_a_rest_costs_more():
    assert columns(64, 16, 4) == 64
    assert columns(68, 16, 4) == 84
    assert columns(65, 16, 4) == 128
    assert columns(5, 1) == 5


def test_costs_add_up():
    total = Cost(bytes=10, macs=32) + Cost(bytes=1)
    assert total == Cost(11, 32)
    assert total.total == 13
