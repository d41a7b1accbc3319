"""Where the models and data of the benchmarks are, and how a command is measured."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def assets() -> Path:
    """The folder of models and data beside the project, or that of ``ONNX_OCS_ASSETS``."""
    folder = Path(os.environ.get("ONNX_OCS_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.exists():
        sys.exit(f"{folder}: no assets there; set ONNX_OCS_ASSETS to their folder")
    return folder


@dataclass(frozen=True)
class Measured:
    """One process from start to end."""

    status: int
    seconds: float
    peak_bytes: int
    output: str
    errors: str


def measure(command: list[str], timeout: float | None = None) -> Measured:
    """Run ``command`` and measure the process with all of its children.

    Python keeps the bytecode of the modules, as it does for an installed package.
    """
    probe = (
        "import resource, subprocess, sys, time\n"
        "start = time.perf_counter()\n"
        "status = subprocess.call(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "print(f'\\n@ {status} {time.perf_counter() - start} {used}', file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    try:
        ended = subprocess.run(
            [sys.executable, "-c", probe, *command], capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return Measured(124, float(timeout or 0), 0, "", "timed out")
    errors, _, line = ended.stderr.rpartition("\n@ ")
    status, seconds, kilobytes = line.split()
    return Measured(int(status), float(seconds), int(kilobytes) * 1024, ended.stdout, errors.strip())


def onnx_ocs(*arguments: object) -> list[str]:
    """The command line of the tool in this environment."""
    return [sys.executable, "-m", "onnx_ocs", *map(str, arguments)]
