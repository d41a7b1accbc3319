"""What all tests share."""

import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
ASSETS = Path(os.environ.get("ONNX_OCS_ASSETS", ROOT.parent / "shared" / "assets"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the folder of models and data the tests that need it are skipped, visibly."""
    if not ASSETS.exists():
        for item in items:
            if "assets" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"no models and data at {ASSETS}; set ONNX_OCS_ASSETS"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def assets() -> Path:
    return ASSETS


@pytest.fixture
def models() -> Path:
    """The small models that come with the project."""
    return ROOT / "models"
