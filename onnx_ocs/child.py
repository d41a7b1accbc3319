"""Work with onnxruntime in a process of its own: a model that nobody here made may crash it or never return."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx_ocs.errors import BadSamples, OcsError, RuntimeFailed, UnsupportedModel

TIMEOUT = 1800.0
"""Seconds that a child may take if nothing else is said."""

Report = Callable[[str], None]
"""The child says what it is at, so that a crash has a place."""


def call(
    module: str, request: dict[str, Any], timeout: float = TIMEOUT, without: str = "--no-verify does without it"
) -> dict[str, Any]:
    """The answer of ``python -m module`` to ``request``; both are plain data.

    Args:
        without: what to do where it crashes.

    Raises:
        OcsError: what the child raised.
        RuntimeFailed: it crashed or ran out of time.
    """
    with tempfile.TemporaryDirectory(prefix="onnx-ocs-") as folder:
        asked, answered, where = (Path(folder, name) for name in ("request.json", "answer.json", "stage"))
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", module, str(asked), str(answered), str(where)]
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise RuntimeFailed(
                f"{_stage(where)}: onnxruntime did not end within {timeout:.0f} s; give fewer or smaller samples, or "
                "more time (--verify-timeout; --timeout of check and lint)"
            ) from None
        if not answered.exists():
            raise RuntimeFailed(f"{_stage(where)}: onnxruntime crashed ({_cause(ended)}); {without}")
        answer: dict[str, Any] = json.loads(answered.read_text())
    if "error" in answer:
        kinds = {kind.__name__: kind for kind in (BadSamples, RuntimeFailed, UnsupportedModel)}
        raise kinds[answer["error"]](answer["message"])
    return answer


def serve(work: Callable[[dict[str, Any], Report], dict[str, Any]]) -> None:
    """The child: do ``work`` on the request and write the answer."""
    asked, answered, where = (Path(argument) for argument in sys.argv[1:4])
    _limit_memory()
    try:
        answer = work(json.loads(asked.read_text()), lambda stage: _write(where, stage))
    except OcsError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    answered.write_text(json.dumps(answer))


def _write(where: Path, stage: str) -> None:
    where.write_text(stage)


def _limit_memory() -> None:
    """At most the memory of the machine, so that a runaway ends this process and no other."""
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _stage(where: Path) -> str:
    return where.read_text() if where.exists() else "verification"


def _cause(ended: subprocess.CompletedProcess[bytes]) -> str:
    if ended.returncode < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-ended.returncode).name
    lines = ended.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"exit status {ended.returncode}"
