import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from onnx_ocs.numerics import natural
from onnx_ocs.numerics.natural import natural_images


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.integers(0, 20))
def test_a_leaf_covers_the_pixels_within_its_radius(seed, rows, columns, leaves):
    rng = np.random.default_rng(seed)
    middles, radii = rng.random((leaves, 2)) * (rows, columns), rng.random(leaves) * 6
    found = list(zip(*(part.tolist() for part in natural._covered(middles, radii, (rows, columns))), strict=True))
    assert found == [
        (leaf, row, column)
        for leaf in range(leaves)
        for row in range(rows)
        for column in range(columns)
        if (row - middles[leaf, 0]) ** 2 + (column - middles[leaf, 1]) ** 2 < radii[leaf] ** 2
    ]


@pytest.mark.parametrize("sizes", [(24, 24), (40, 9), (3, 48)])
def test_later_leaves_lie_on_earlier_ones_however_many_are_looked_at_together(sizes, monkeypatch):
    whole = natural_images(2, 3, sizes, np.random.default_rng(1))
    assert whole.shape == (2, 3, *sizes)
    assert abs(whole.mean()) < 1e-12
    assert whole.std() == pytest.approx(1)
    monkeypatch.setattr(natural, "PAIRS", 1)
    np.testing.assert_array_equal(natural_images(2, 3, sizes, np.random.default_rng(1)), whole)
