"""What all tests share."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tests run side by side, where threads wait for each other long

import numpy as np
import pytest

from onnx_ocs.cli import main

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


@pytest.fixture
def command(capsys):
    """Run the command line in this process: exit status, standard output, standard error."""

    def run(*arguments):
        before = signal.getsignal(signal.SIGTERM)
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        finally:
            signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
