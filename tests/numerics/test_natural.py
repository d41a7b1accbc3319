import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from onnx_ocs.numerics import natural
from onnx_ocs.numerics.natural import natural_images


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.integers(0, 20))
def test_the_last_leaf_within_whose_radius_a_pixel_is_lies_on_the_others(seed, rows, columns, leaves):
    rng = np.random.default_rng(seed)
    middles, radii = rng.random((leaves, 2)) * (rows, columns), rng.random(leaves) * 6
    wanted = np.zeros((rows, columns), int)
    for row, column in np.ndindex(rows, columns):
        for leaf in range(leaves):
            if (row - middles[leaf, 0]) ** 2 + (column - middles[leaf, 1]) ** 2 < radii[leaf] ** 2:
                wanted[row, column] = leaf + 1
    np.testing.assert_array_equal(natural._highest(middles, radii, (rows, columns)), wanted)


@pytest.mark.parametrize("sizes", [(24, 24), (40, 9), (3, 48)])
def test_pixels_have_the_colour_of_their_leaf(sizes, monkeypatch):
    places, highest = [], natural._highest

    def seen(*given):
        places.append(highest(*given))
        return places[-1]

    monkeypatch.setattr(natural, "_highest", seen)
    images = natural_images(2, 3, sizes, np.random.default_rng(1))
    assert images.shape == (2, 3, *sizes)
    assert abs(images.mean()) < 1e-12
    assert images.std() == pytest.approx(1)
    for image, place in zip(images, places, strict=True):
        colours = {number: image[:, place == number] for number in np.unique(place)}
        assert all((colour == colour[:, :1]).all() for colour in colours.values())
        assert len({tuple(colour[:, 0]) for colour in colours.values()}) == len(colours)
