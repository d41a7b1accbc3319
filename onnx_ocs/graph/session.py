"""onnxruntime: load a model, run it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnx_ocs.errors import BadSamples, RuntimeFailed
from onnx_ocs.graph.samples import Feed, Input

SILENT = 4


FLOAT_LAYOUT = "NchwcTransformer"
"""The optimizer that arranges float convolutions in blocks of channels, under new names."""


class Session:
    """A model loaded by onnxruntime's CPU provider.

    Args:
        optimized: where to write what onnxruntime makes of the model, with its weights in a file beside it.

    Raises:
        RuntimeFailed: it refuses the model.
    """

    def __init__(self, path: Path, optimize: bool = True, optimized: Path | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = SILENT
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # beside numpy's threads
        left_out: list[str] = []
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            weights = "session.optimized_model_external_initializers"
            options.add_session_config_entry(f"{weights}_file_name", f"{optimized.name}.data")
            options.add_session_config_entry(f"{weights}_min_size_in_bytes", "1024")
            left_out = [FLOAT_LAYOUT]
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
            )
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise RuntimeFailed(first_line(error)) from None
        self.inputs = [Input(item.name, item.type, _shape(item.shape)) for item in self._session.get_inputs()]
        self.outputs = [item.name for item in self._session.get_outputs()]

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """The outputs that are tensors; those of a sequence as ``name[i]``.

        Raises:
            RuntimeFailed: the model fails on these samples.
        """
        try:
            values = self._session.run(None, {name: np.asarray(value) for name, value in feed.items()})
        except Exception as error:
            raise RuntimeFailed(first_line(error)) from None
        found: dict[str, NDArray[Any]] = {}
        for name, value in zip(self.outputs, values, strict=True):
            items = {name: value} if not isinstance(value, list) else {f"{name}[{i}]": v for i, v in enumerate(value)}
            found |= {key: np.asarray(item) for key, item in items.items() if isinstance(item, np.ndarray | np.generic)}
        return found


def run_samples(session: Session, feed: Feed, name: str) -> dict[str, NDArray[Any]]:
    """The outputs of the model ``name`` on samples of the user.

    Raises:
        BadSamples: it fails on them.
    """
    try:
        return session.run(feed)
    except RuntimeFailed as error:
        raise BadSamples(f"{name}: the model fails on these samples ({error}); check them") from None


def first_line(error: Exception) -> str:
    """The first line of a message of onnxruntime, without its prefix."""
    text = str(error).strip().split("\n")[0]
    return text.removeprefix("[ONNXRuntimeError] : ").strip()[:300]


def _shape(shape: list[Any]) -> tuple[int | str | None, ...]:
    return tuple(size if isinstance(size, int | str) else None for size in shape)
