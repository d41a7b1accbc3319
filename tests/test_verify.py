"""Verification in a process of its own: what passes, what fails, and what happens to the process."""

import os
import signal
import sys

import numpy as np
import onnx
import onnx.parser
import pytest
from operators import HEAD, row_model, with_weights

from onnx_ocs import RuntimeFailed, UnsupportedModel, VerificationFailed, check, child, quantize, split
from onnx_ocs.passes.split_channels import SplitChannels


def model_of(text):
    return with_weights(onnx.parser.parse_model(f"{HEAD} {text}"))


def instead(monkeypatch, code):
    """Let the child process be another program."""
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    original = child.subprocess.run

    def run(command, **options):
        return original([sys.executable, "-c", code], **options)

    monkeypatch.setattr(child.subprocess, "run", run)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (f"kill -{int(signal.SIGSEGV)} $$", "SIGSEGV"),
        ("echo trouble >&2; exit 3", "trouble"),
        ("sleep 30", "within 1 s"),
    ],
)
def test_a_crash_or_a_runaway_of_the_runtime_is_a_clear_error(monkeypatch, tmp_path, code, words):
    instead(monkeypatch, code)
    with pytest.raises(RuntimeFailed, match=words):
        quantize(row_model("Conv 2-D"), tmp_path / "out.onnx", timeout=1)
    assert list(tmp_path.iterdir()) == []


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
