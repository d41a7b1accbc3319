"""The model that onnxruntime makes of a model, written by a process of its own."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx_ocs import child
from onnx_ocs.graph.session import Session


@dataclass(frozen=True)
class Request:
    """What to optimize, and where to."""

    source: str
    target: str


def optimize(source: Path, target: Path, timeout: float = child.TIMEOUT) -> None:
    """Let onnxruntime optimize the model ``source`` fully for this CPU, and write the result to ``target``.

    Raises:
        RuntimeFailed: it refuses the model, crashed, or ran out of time.
    """
    asked = asdict(Request(str(source), str(target)))
    child.call("onnx_ocs.optimized", asked, timeout, without="--no-run does without it")


def _optimize(request: Request, say: child.Report) -> dict[str, Any]:
    say("loading the model")
    Session(Path(request.source), optimized=Path(request.target))
    return {}


def answer(asked: dict[str, Any], say: child.Report) -> dict[str, Any]:
    """What the child does."""
    return _optimize(Request(**asked), say)
