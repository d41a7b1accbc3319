"""Low-precision ONNX models without retraining, by outlier channel splitting (Zhao et al., ICML 2019)."""

from typing import TYPE_CHECKING, Any

from onnx_ocs._version import __version__
from onnx_ocs.errors import (
    BadRecipe,
    BadSamples,
    CannotWrite,
    OcsError,
    RuntimeFailed,
    UnsupportedModel,
    VerificationFailed,
)

if TYPE_CHECKING:
    from onnx_ocs.api import CheckOutcome, LintOutcome, Result, check, inspect, lint, quantize, split

__all__ = [
    "BadRecipe",
    "BadSamples",
    "CannotWrite",
    "CheckOutcome",
    "LintOutcome",
    "OcsError",
    "Result",
    "RuntimeFailed",
    "UnsupportedModel",
    "VerificationFailed",
    "__version__",
    "check",
    "inspect",
    "lint",
    "quantize",
    "split",
]


def __getattr__(name: str) -> Any:
    """Import the public functions when they are first used: the process that verifies needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from onnx_ocs import api

    return getattr(api, name)
