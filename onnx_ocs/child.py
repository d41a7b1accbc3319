"""Work with onnxruntime in a process of its own: a model that nobody here made may crash it or never return.

Such processes are forks of a server, which the first call starts and which ends with its caller: it has loaded
onnxruntime, and never runs a model itself. So each of them is there at once. Where forks are not to be trusted (macOS)
each is started by itself.
"""

import atexit
import contextlib
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx_ocs.errors import BadSamples, OcsError, RuntimeFailed, UnsupportedModel
from onnx_ocs.graph.files import workplace

TIMEOUT = 1800.0
"""Seconds that a child may take if nothing else is said."""

PATIENCE = 2.0
"""Seconds that an end may take which was asked for."""

FORKS = sys.platform == "linux"

_SILENT: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)

MODULES = ("calibrate", "moments", "optimized", "propagation", "synthetic", "verify")
"""Those with work for a child, of this package."""

Report = Callable[[str], None]
"""The child says what it is at, so that a crash has a place."""

ASKED, ANSWERED, STAGE, ERRORS = "request.json", "answer.json", "stage", "errors"
"""Files in the folder that a call and its child share."""


def call(
    module: str, request: dict[str, Any], timeout: float = TIMEOUT, without: str = "--no-verify does without it"
) -> dict[str, Any]:
    """What ``answer(request, report)`` of ``module`` says in a child; both are plain data.

    Args:
        without: what to do where it crashes.

    Raises:
        OcsError: what the child raised.
        RuntimeFailed: it crashed or ran out of time.
    """
    with workplace(None) as folder:
        asked = {"module": module, "request": request}
        asked |= {"path": [str(entry) for entry in sys.path], "environment": dict(os.environ)}
        (folder / ASKED).write_text(json.dumps(asked))
        try:
            status = _forked(folder, timeout) if FORKS else _started(folder, timeout)
        except TimeoutError:
            raise RuntimeFailed(
                f"{_stage(folder)}: onnxruntime did not end within {timeout:.0f} s; give fewer or smaller samples, or "
                "more time (--verify-timeout; --timeout of check and lint)"
            ) from None
        if not (folder / ANSWERED).exists():
            raise RuntimeFailed(f"{_stage(folder)}: onnxruntime crashed ({_cause(folder, status)}); {without}")
        answer: dict[str, Any] = json.loads((folder / ANSWERED).read_text())
    if "error" in answer:
        kinds = {kind.__name__: kind for kind in (BadSamples, RuntimeFailed, UnsupportedModel)}
        raise kinds[answer["error"]](answer["message"])
    return answer


def _stage(folder: Path) -> str:
    return _read(folder / STAGE) or "verification"


def _cause(folder: Path, status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-status).name
    lines = _read(folder / ERRORS).strip().splitlines()
    return lines[-1][:200] if lines else f"exit status {status}"


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _started(folder: Path, timeout: float) -> int:
    """The exit status of a child that is started by itself.

    Raises:
        TimeoutError: it took too long, and was ended.
    """
    command = [sys.executable, "-m", "onnx_ocs.child", str(folder)]
    with (folder / ERRORS).open("wb") as errors:
        try:
            return subprocess.run(command, timeout=_bounded(timeout), **_SILENT | {"stderr": errors}).returncode
        except subprocess.TimeoutExpired:
            raise TimeoutError from None


def _forked(folder: Path, timeout: float) -> int:
    """The exit status of a child that is a fork of the server.

    Raises:
        TimeoutError: it took too long, and was ended.
    """
    server = _Server.of_this_process()
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine:
        with its:
            server.ask(folder, its)
        mine.settimeout(_bounded(timeout))
        try:
            said = mine.recv(64)
        except BaseException:  # an interrupt as well
            mine.shutdown(socket.SHUT_WR)  # which ends the child
            mine.settimeout(PATIENCE)
            try:
                mine.recv(64)
            except OSError:
                server.end()
            raise
    if not said and not (folder / ERRORS).exists():  # the server itself is gone
        (folder / ERRORS).write_bytes(server.errors())
    return int(said or 1)


def _bounded(timeout: float) -> float:
    """As the system takes it: at most three weeks, and not nothing at all."""
    return min(max(timeout, 0.001), 2e6)


class _Server:
    """A process that has loaded what children need, and forks them."""

    _lock = threading.Lock()
    _running: "_Server | None" = None

    @classmethod
    def of_this_process(cls) -> "_Server":
        """The one that runs, or a new one: a fork of the caller has its own."""
        with cls._lock:
            running = cls._running
            if running is None or running._owner != os.getpid() or running._process.poll() is not None:
                cls._running = None  # whatever becomes of the next one
                if running is not None:
                    running._close()
                running = cls._running = cls()
            return running

    @classmethod
    def renew_lock(cls) -> None:
        """In a fork of the caller, which may have been made while another thread held it."""
        cls._lock = threading.Lock()

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = os.fdopen(os.memfd_create("errors"), "rb")
        with its:
            command = [sys.executable, "-m", "onnx_ocs.child", str(its.fileno())]
            # in a session of its own, so that an interrupt of the terminal goes to the caller alone
            self._process = subprocess.Popen(
                command, pass_fds=[its.fileno()], start_new_session=True, **_SILENT | {"stderr": self._errors}
            )
        atexit.register(self._finish)

    def ask(self, folder: Path, line: socket.socket) -> None:
        """Have the request of ``folder`` answered; the exit status is said on ``line``, whose end ends the child."""
        files = [line.fileno()]
        with contextlib.suppress(OSError):  # the current directory may be one that may not be searched
            files.append(os.open(".", os.O_PATH))
        with contextlib.suppress(OSError):  # the server is gone, and so will be the line
            socket.send_fds(self._control, [os.fsencode(folder)], files)
        for file in files[1:]:
            os.close(file)

    def errors(self) -> bytes:
        """What it complained of."""
        return b"" if self._errors.closed else os.pread(self._errors.fileno(), 2**16, 0)

    def end(self) -> None:
        """At once, with all children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _finish(self) -> None:
        """At the end of the caller; what children used is told to who waits for this process."""
        if self._owner == os.getpid():
            self._control.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a thread is left that waits for a child
                self._process.wait(PATIENCE)

    def _close(self) -> None:
        atexit.unregister(self._finish)
        self._control.close()
        self._errors.close()


os.register_at_fork(after_in_child=_Server.renew_lock)


def _serve(control: socket.socket) -> None:
    """The server: for each request, a process that watches over the child, where the caller is."""
    for module in MODULES:
        importlib.import_module(f"onnx_ocs.{module}")
    signal.signal(signal.SIGCHLD, lambda *_: _wait(os.WNOHANG))
    while True:
        folder, files, *_ = socket.recv_fds(control, 8192, 2)
        if not folder:
            break
        line, *here = files
        if not os.fork():
            control.close()
            for directory in here:
                with contextlib.suppress(OSError):
                    os.fchdir(directory)
            _watch(Path(os.fsdecode(folder)), socket.socket(fileno=line))
            os._exit(0)
        for file in files:
            os.close(file)
    _wait()


def _wait(options: int = 0) -> None:
    """For all processes that have ended, or will: what they used is told to who waits for this one."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def _watch(folder: Path, line: socket.socket) -> None:
    """Fork the child, end it where the caller has hung up, and say how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    held, holds = os.pipe()
    child = os.fork()
    if not child:
        line.close()
        _work(folder)
    os.close(holds)  # the child has it alone, until its end
    watched: list[Any] = [held, line]
    if held not in select.select(watched, [], [])[0]:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        line.send(str(status).encode())


def _work(folder: Path) -> None:
    """The child: answer the request in ``folder``, and end."""
    status = 1
    try:
        null, errors = os.open(os.devnull, os.O_RDWR), os.open(folder / ERRORS, os.O_WRONLY | os.O_CREAT)
        for number, file in enumerate((null, null, errors)):
            os.dup2(file, number)
        asked = json.loads((folder / ASKED).read_text())
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.path[:] = asked["path"]
        _limit_memory()
        try:
            work = importlib.import_module(asked["module"]).answer
            answer = work(asked["request"], lambda stage: _write(folder / STAGE, stage))
        except OcsError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        (folder / ANSWERED).write_text(json.dumps(answer))
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _write(where: Path, stage: str) -> None:
    where.write_text(stage)


def _limit_memory() -> None:
    """At most the memory of the machine, so that a runaway ends this process and no other."""
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        _serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        _work(Path(sys.argv[1]))
