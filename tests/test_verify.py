"""Verification in a process of its own: what passes, what fails, and what happens to the process."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from operators import HEAD, row_model, with_weights

from onnx_ocs import RuntimeFailed, UnsupportedModel, VerificationFailed, check, child, quantize, split
from onnx_ocs.passes.split_channels import SplitChannels


def model_of(text):
    return with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))


ECHO = "def answer(asked, say):\n    return asked\n"


@pytest.fixture
def work(monkeypatch, tmp_path_factory):
    """Let children import a module ``work`` of this text."""

    def write(text):
        folder = tmp_path_factory.mktemp("modules")
        Path(folder, "work.py").write_text(text)
        monkeypatch.syspath_prepend(folder)

    return write


TROUBLES = {
    "a crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "an end": ("os._exit(3)", "exit status 3"),
    "last words": ("os.write(2, b'trouble'); os._exit(3)", "trouble"),
    "an error": ("raise ValueError('trouble')", "ValueError: trouble"),
    "no end": ("time.sleep(60)", "within 1 s"),
}


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize(("code", "words"), TROUBLES.values(), ids=TROUBLES)
def test_a_crash_or_a_runaway_of_the_runtime_is_a_clear_error(monkeypatch, tmp_path, work, code, words, forks):
    work(f"import os, signal, time\n\n\ndef answer(asked, say):\n    say('here')\n    {code}\n")
    monkeypatch.setattr(child, "FORKS", forks)
    original = child.call
    monkeypatch.setattr(child, "call", lambda module, *rest: original("work", *rest))
    with pytest.raises(RuntimeFailed, match=f"here: .*{words}"):
        quantize(row_model("Conv 2-D"), tmp_path / "out.onnx", timeout=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("forks", [True, False])
def test_children_work_where_and_as_their_caller_does(monkeypatch, tmp_path, work, forks):
    work("import os\n\n\ndef answer(asked, say):\n    return {**asked, 'at': os.getcwd(), 'of': os.environ['OF']}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF", "ours")
    monkeypatch.setattr(child, "FORKS", forks)
    assert child.call("work", {"asked": 1}) == {"asked": 1, "at": str(tmp_path), "of": "ours"}


def test_children_of_several_threads_run_at_a_time(tmp_path, work):
    """Each waits for the other."""
    work(
        "import os, time\n\n\ndef answer(asked, say):\n"
        "    open(asked['mine'], 'w').close()\n"
        "    while not os.path.exists(asked['other']):\n        time.sleep(0.01)\n    return {}\n"
    )
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    with ThreadPoolExecutor() as threads:
        pairs = ((names[0], names[1]), (names[1], names[0]))
        found = [threads.submit(child.call, "work", {"mine": one, "other": two}, 60) for one, two in pairs]
    assert [each.result() for each in found] == [{}, {}]


def test_a_fork_of_a_caller_has_children_of_its_own(work):
    work(ECHO)
    assert child.call("work", {"number": 1}) == {"number": 1}
    forked = os.fork()
    if not forked:
        os._exit(child.call("work", {"number": 42})["number"])
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 42
    assert child.call("work", {"number": 2}) == {"number": 2}


def test_children_work_where_nothing_is_left(monkeypatch, tmp_path, work):
    """In a folder that was deleted."""
    work(ECHO)
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert child.call("work", {"number": 1}) == {"number": 1}


def test_a_server_that_does_not_answer_is_ended(monkeypatch, work):
    work(ECHO)
    monkeypatch.setattr(child, "PATIENCE", 0.1)
    child.call("work", {})
    server = child._Server.of_this_process()
    os.kill(server._process.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeFailed, match="within 1 s"):
        child.call("work", {}, 1)
    server._process.wait(10)
    assert child.call("work", {"number": 1}) == {"number": 1}


def test_a_server_that_cannot_start_says_why(monkeypatch, tmp_path):
    Path(tmp_path, "onnxruntime.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.setattr(child._Server, "_running", None)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeFailed, match=r"onnxruntime crashed \(RuntimeError: not this one\)"):
        child.call("onnx_ocs.verify", {})


@pytest.mark.parametrize("timeout", [5e6, 1e300])
def test_no_timeout_is_too_long(timeout, models, tmp_path, command):
    status, _, complaint = command(models / "digits_mlp.onnx", tmp_path / "out.onnx", "--verify-timeout", timeout)
    assert (status, complaint) == (0, "")


def test_an_interrupted_call_leaves_no_child_behind(tmp_path):
    """And the server ends with its caller."""
    code = (
        "import os, signal, sys, threading, time\n"
        "from onnx_ocs import child\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # where it is ignored, as in the background\n"
        "pid = sys.argv[1] + '/pid'\n"
        "def interrupt():\n"
        "    while not os.path.exists(pid):\n"
        "        time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=interrupt).start()\n"
        "child.call('sleeps', {'pid': pid})\n"
    )
    text = (
        "import os, time\n\n\ndef answer(asked, say):\n"
        "    with open(asked['pid'] + '.new', 'w') as file:\n"
        "        file.write(f'{os.getpid()} {os.getppid()}')\n"
        "    os.rename(asked['pid'] + '.new', asked['pid'])\n"
        "    time.sleep(60)\n"
    )
    Path(tmp_path, "sleeps.py").write_text(text)
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=50)
    assert "KeyboardInterrupt" in ran.stderr
    for number in Path(tmp_path, "pid").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(number), 0)


def test_a_wrong_split_never_passes(monkeypatch, tmp_path):
    """A surgery bug shows in the tight comparison of the split model, whatever the bits."""
    original = SplitChannels._tensor

    def wrong(self, work, plan):
        tensor = original(self, work, plan)
        return work.editor.model.tensor("", tensor.data_type, tuple(tensor.dims), bytes(4 * int(np.prod(tensor.dims))))

    monkeypatch.setattr(SplitChannels, "_tensor", wrong)
    with pytest.raises(VerificationFailed, match="the split model does not pass"):
        quantize(row_model("Conv 2-D"), tmp_path / "out.onnx", bits=2, first="same")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_differ_from_run_to_run_are_verified_by_proof(tmp_path):
    noisy = model_of(
        """g (float[2,8] x, float[8,6] w) => (float[2,6] y) {
        n = RandomNormalLike(x)
        s = Add(x, n)
        y = MatMul(s, w) }"""
    )
    report = quantize(noisy, tmp_path / "out.onnx", bits=8, ratio=0.3).report
    assert not report["verification"]["deterministic"]
    assert any("differ from run to run" in note for note in report["notes"])


def test_inputs_are_made_from_names_types_and_shapes():
    several = model_of(
        """g (int64[N,T] tokens, bool[N] mask, float16[N,4] h, float[10,8] wt, float[8,6] w)
            => (float[N,T,6] y, float16[N,4] z) {
        e = Gather(wt, tokens)
        y = MatMul(e, w)
        m = Cast <to=10> (mask)
        a = Constant <value_ints=[1]> ()
        u = Unsqueeze(m, a)
        z = Mul(h, u) }"""
    )
    report = quantize(several, bits=8, ratio=0.3, first="same").report
    assert report["verification"]["generated"]
    assert report["verification"]["quantized"]["sqnr_db"] > 20


def test_values_that_are_not_finite_where_the_sources_are_fail():
    outcome = check(
        model_of("g (float[2] x) => (float[2] y) { y = Abs(x) }"),
        model_of("g (float[2] x) => (float[2] y) { n = Neg(x) a = Abs(n) b = Neg(a) y = Log(b) }"),
    )
    assert not outcome.passed
    assert "not finite" in outcome.reason


def test_a_model_that_the_runtime_cannot_load_is_transformed_only_without_verification(tmp_path):
    custom = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[2,8] x, float[8,6] w) => (float[2,6] y) { a = MatMul(x, w) y = own.Magic(a) }"""
    )
    custom = with_weights(custom)
    with pytest.raises(UnsupportedModel, match="--no-verify"):
        quantize(custom, tmp_path / "out.onnx")
    report = quantize(custom, tmp_path / "out.onnx", verify=False, ratio=0.2, first="same").report
    assert [row["status"] for row in report["layers"]] == ["split"]


def test_the_given_proto_is_never_modified():
    model = row_model("If body")
    before = model.SerializeToString(deterministic=True)
    quantize(model, ratio=0.3)
    split(model, ratio=0.3)
    check(model, model)
    assert model.SerializeToString(deterministic=True) == before


def test_half_precision_passes_within_its_own_rounding():
    report = split(row_model("float16"), ratio=1, first="same").report
    assert report["verification"]["split"]["max_rel_error"] < report["verification"]["split"]["tolerance"] == 2e-2


def test_the_environment_is_no_part_of_the_result(tmp_path):
    os.environ["ORT_DISABLE_ALL"] = "1"
    try:
        first = quantize(row_model("Conv 2-D"), seed=3).model.SerializeToString(deterministic=True)
    finally:
        del os.environ["ORT_DISABLE_ALL"]
    assert quantize(row_model("Conv 2-D"), seed=3).model.SerializeToString(deterministic=True) == first
