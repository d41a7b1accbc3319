"""The command line: exit status, one clear line for what goes wrong, and what is written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from operators import row_model


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.onnx"
    onnx.save(row_model("Conv 2-D"), path)
    return path


def one_line(text):
    return text.count("\n") == 1 and text.startswith("onnx-ocs: ")


def test_the_main_job(command, models, tmp_path):
    target, report = tmp_path / "out.onnx", tmp_path / "report.json"
    samples = models / "digits_test.npz"
    status, out, err = command(
        models / "digits_resnet.onnx", target, "--bits", 6, "--ratio", 0.02, "--inputs", samples, "--report", report
    )
    assert (status, err) == (0, "")
    assert "layers split" in out
    assert "top-1 accuracy" in out
    told = json.loads(report.read_text())
    assert told["verification"]["quantized"]["accuracy"]["candidate"] > 0.98
    assert told["verification"]["split"]["max_rel_error"] < 1e-6
    assert target.stat().st_size < 0.4 * (models / "digits_resnet.onnx").stat().st_size
    assert {row["status"] for row in told["layers"]} == {"split", "quantized"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "report.json"]


def test_quiet_says_nothing_and_verbose_names_each_layer(command, source, tmp_path):
    assert command(source, tmp_path / "out.onnx", "-q") == (0, "", "")
    _, out, _ = command(source, tmp_path / "out.onnx", "-v", "--first", "same")
    assert re.search(r"^y +Conv +split +8\+1 +8 ", out, re.MULTILINE)


def test_the_target_may_be_the_source(command, source):
    before = source.read_bytes()
    assert command(source, source, "--bits", 8, "-q")[0] == 0
    assert source.read_bytes() != before
    onnx.checker.check_model(onnx.load(source))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "9"], ["bits must be none or one of 2, 3"]),
        (["--bits", "six"], ["'six' is not a number of bits"]),
        (["--ratio", "-1"], ["ratio must be from 0 to 1, not -1"]),
        (["--ratio", "nan"], ["ratio must be from 0 to 1"]),
        (["--clip", "mode"], ["clip must be one of", "mse", "aciq", "percentile:P"]),
        (["--clip", "percentile:101"], ["above 0 and at most 100"]),
        (["--split", "mode"], ["qa", "naive"]),
        (["--split-policy", "mode"], ["even", "halving"]),
        (["--first", "mode"], ["float", "int8", "same"]),
        (["--only", "("], ["not a regular expression"]),
        (["--tolerance", "0"], ["tolerance must be positive"]),
        (["--frobnicate"], ["unrecognized arguments"]),
        (["--min-sqnr", "nan"], ["must be finite"]),
        (["--verify-timeout", "0"], ["must be above 0"]),
        (["--seed", "-1"], ["seed must be"]),
        (["--quantize-ops", "Conv,Foo"], ["Conv, ConvTranspose, Gemm, MatMul", "'Foo'"]),
    ],
    ids=str,
)
def test_wrong_usage_names_the_valid_choices(command, source, tmp_path, options, words):
    status, out, err = command(source, tmp_path / "out.onnx", *options)
    assert (status, out) == (2, "")
    assert all(word in err for word in words), err
    assert not (tmp_path / "out.onnx").exists()


def bad_models(folder):
    """Files that are no usable models, by what is wrong with them."""
    good = row_model("Conv 2-D")
    data = good.SerializeToString()
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "text.onnx").write_text("this is not a model\n" * 50)
    (folder / "cut.onnx").write_bytes(data[: len(data) // 2])
    broken = row_model("Conv 2-D")
    broken.graph.node[0].op_type = "Convolve"
    onnx.save(broken, folder / "operator.onnx")
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        model = row_model("Conv 2-D")
        weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
        weight[1, 2, 0, 0] = value
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
        onnx.save(model, folder / f"{name}.onnx")
    for name, location in (("leaves", "../secret.bin"), ("absolute", "/etc/passwd"), ("gone", "gone.bin")):
        model = row_model("Conv 2-D")
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "No such file"),
        ("empty", "empty"),
        ("text", "not an ONNX model"),
        ("cut", "cut short"),
        ("operator", "neither onnx's checker"),
        ("nan", "'w' of node 'y' holds NaN"),
        ("infinite", "'w' of node 'y' holds NaN or infinite"),
        ("leaves", "outside of the model's folder"),
        ("absolute", "outside of the model's folder"),
        ("gone", "missing"),
    ],
)
def test_an_unusable_model_is_one_clear_line(command, tmp_path, name, words):
    bad_models(tmp_path)
    before = sorted(tmp_path.iterdir())
    status, out, err = command(tmp_path / f"{name}.onnx", tmp_path / "out.onnx")
    assert (status, out) == (3, "")
    assert one_line(err), err
    assert words in err
    assert f"{name}.onnx" in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": np.zeros((2, 8, 5, 5), np.float32)}, "no array for input 'x'"),
        ({"x": np.zeros((2, 7, 5, 5), np.float32)}, "takes shape [2, 8, 5, 5], not [2, 7, 5, 5]"),
        ({"x": np.zeros((2, 8, 5, 5))}, "takes float32, not float64"),
        ({"x": np.zeros((0, 8, 5, 5), np.float32)}, "no samples"),
        (b"no archive", "cannot be read"),
        (None, "no such file"),
    ],
    ids=str,
)
def test_unusable_samples_are_one_clear_line(command, source, tmp_path, arrays, words):
    samples = tmp_path / "samples.npz"
    if isinstance(arrays, bytes):
        samples.write_bytes(arrays)
    elif arrays is not None:
        np.savez(samples, **arrays)
    status, _, err = command(source, tmp_path / "out.onnx", "--inputs", samples)
    assert status == 3
    assert one_line(err), err
    assert words in err
    assert not (tmp_path / "out.onnx").exists()


def test_an_unwritable_target_is_one_clear_line(command, source, tmp_path):
    for target in (tmp_path / "no" / "folder.onnx", tmp_path, source / "below.onnx"):
        status, _, err = command(source, target)
        assert status == 3
        assert one_line(err), err
        assert "cannot be written" in err


def test_no_report_takes_the_place_of_a_model(command, source, tmp_path):
    target, before = tmp_path / "out.onnx", source.read_bytes()
    for report in (source, target):
        status, _, err = command(source, target, "--report", report)
        assert status == 2
        assert "the same file" in err
    for option in ("--json", "--junit"):
        assert command("check", source, source, option, source)[0] == 2
    assert command("inspect", source, "--json", source)[0] == 2
    assert command(source, target, "--report", tmp_path / "no" / "report.json")[0] == 3
    assert source.read_bytes() == before
    assert not target.exists()


def test_a_target_that_is_a_link_stays_one(command, source, tmp_path):
    (tmp_path / "real.onnx").write_bytes(b"old")
    link = tmp_path / "link.onnx"
    link.symlink_to("real.onnx")
    for option in ("--no-verify", "--seed=1"):
        assert command(source, link, option, "-q")[0] == 0
        assert link.is_symlink()
        onnx.checker.check_model(onnx.load(tmp_path / "real.onnx"))


@pytest.mark.parametrize("option", ["--atol=nan", "--atol=-1", "--min-sqnr=nan", "--timeout=0", "--seed=-1"])
def test_a_check_with_a_gate_that_cannot_hold_is_wrong_usage(command, source, option):
    assert command("check", source, source, option)[0] == 2


@pytest.mark.parametrize("option", ['"min_sqnr": "x"', '"only": 5', '"verify": "no"', '"ratio": null', '"bits": 4.5'])
def test_a_recipe_of_wrong_types_is_one_clear_line(command, source, tmp_path, option):
    (tmp_path / "recipe.json").write_text(f"{{{option}}}")
    status, _, err = command(source, tmp_path / "out.onnx", "--recipe", tmp_path / "recipe.json")
    assert status == 3
    assert one_line(err), err
    assert "internal" not in err


def test_what_does_not_pass_is_not_written(command, source, tmp_path):
    status, out, err = command(source, tmp_path / "out.onnx", "--bits", 2, "--first", "same", "--min-sqnr", 60)
    assert (status, out) == (1, "")
    assert one_line(err), err
    assert "signal-to-noise ratio" in err
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_with_nothing_to_do_is_copied_and_said_so(command, source, tmp_path):
    for options in (["--bits", "none"], ["--skip", "y"]):
        status, out, _ = command(source, tmp_path / "out.onnx", *options)
        assert status == 0
        assert "nothing to do" in out
        assert onnx.load(tmp_path / "out.onnx") == onnx.load(source)


def test_the_recipe_of_a_report_gives_the_same_bytes(command, models, tmp_path):
    source, report = models / "digits_resnet.onnx", tmp_path / "report.json"
    first, again, threads = (tmp_path / name / "out.onnx" for name in ("first", "again", "threads"))
    for path in (first, again, threads):
        path.parent.mkdir()
    options = ["--bits", 4, "--ratio", 0.1, "--clip", "kl", "--per-tensor", "--skip", "stem"]
    assert command(source, first, *options, "--report", report, "-q")[0] == 0
    assert command(source, again, "--recipe", report, "-q")[0] == 0
    assert first.read_bytes() == again.read_bytes()
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    ran = subprocess.run(
        [sys.executable, "-m", "onnx_ocs", source, threads, "--recipe", report, "-q"], env=environment, check=False
    )
    assert ran.returncode == 0
    assert first.read_bytes() == threads.read_bytes()
    stored = {item.key: item.value for item in onnx.load(first).metadata_props}
    assert json.loads(stored["onnx_ocs.recipe"]) == json.loads(report.read_text())["recipe"]
    over = tmp_path / "over.onnx"
    assert command(source, over, "--recipe", report, "--bits", 8, "-q")[0] == 0
    assert over.stat().st_size > 1.5 * first.stat().st_size


@pytest.mark.parametrize(
    "content", ["", "[]", '{"recipe": 1}', '{"recipe": {"bits": 99}}', '{"recipe": {"colour": 1}}']
)
def test_a_file_that_holds_no_recipe_is_one_clear_line(command, source, tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    status, _, err = command(source, tmp_path / "out.onnx", "--recipe", tmp_path / "recipe.json")
    assert status == 3
    assert one_line(err), err
    assert "recipe.json" in err


def test_external_data_goes_beside_the_model_and_comes_from_there(command, models, tmp_path):
    first, second = tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"
    for path in (first, second):
        path.parent.mkdir()
    assert command(models / "digits_resnet.onnx", first, "--float", "--external-data", "-q")[0] == 0
    assert len(list(first.parent.glob("*.data"))) == 1
    assert command(first, second, "--bits", 8, "--ratio", 0, "--round", "nearest", "-q")[0] == 0
    assert [path.name for path in second.parent.iterdir()] == ["model.onnx"]
    assert command(first, first, "--bits", 8, "--round", "nearest", "--external-data", "-q")[0] == 0
    assert command("check", models / "digits_resnet.onnx", first, "--min-sqnr", 25, "-q")[0] == 0


def test_check_passes_and_fails_with_reports_for_ci(command, models, tmp_path):
    source, candidate = models / "digits_resnet.onnx", tmp_path / "out.onnx"
    assert command(source, candidate, "--bits", 5, "--round", "nearest", "-q")[0] == 0
    junit, figures = tmp_path / "report.xml", tmp_path / "figures.json"
    files = ["--inputs", models / "digits_test.npz", "--junit", junit, "--json", figures]
    status, out, _ = command("check", source, candidate, "--min-sqnr", 10, "--min-agreement", 0.9, *files)
    assert status == 0
    assert "passed on 597 given samples" in out
    suite = ElementTree.parse(junit).getroot()
    assert (suite.tag, suite.get("tests"), suite.get("failures")) == ("testsuite", "1", "0")
    assert json.loads(figures.read_text())["passed"]
    status, out, err = command("check", source, candidate, "--atol", 1e-6, *files)
    assert status == 1
    assert "failed" in out
    assert one_line(err)
    assert ElementTree.parse(junit).getroot().get("failures") == "1"
    assert not json.loads(figures.read_text())["passed"]
    assert command("check", source, source, "--atol", 0, "--rtol", 0, "-q")[0] == 0


def test_check_tells_unusable_from_failed(command, models, tmp_path):
    source = models / "digits_resnet.onnx"
    bad_models(tmp_path)
    assert command("check", source, models / "digits_mlp.onnx", "-q")[0] in (0, 1)
    assert command("check", source, tmp_path / "text.onnx")[0] == 3
    assert command("check", tmp_path / "missing.onnx", source)[0] == 3
    assert command("check", source, source, "--samples", 0)[0] == 2
    status, _, err = command("check", source, tmp_path / "operator.onnx")
    assert status == 1
    assert "refuses" in err


def test_inspect_tells_what_would_be_done(command, models, tmp_path):
    rows = tmp_path / "rows.json"
    status, out, _ = command("inspect", models / "digits_resnet.onnx", "--bits", 4, "--ratio", 0.1, "--json", rows)
    assert status == 0
    assert "block1.conv1" in out
    told = json.loads(rows.read_text())
    assert sum(row["status"] == "split" for row in told) == 13
    assert all(0 < row["range"] <= 1 < row["outlier"] for row in told)
    assert command("inspect", tmp_path / "missing.onnx")[0] == 3


def test_help_and_version(command):
    for arguments in (["--help"], ["check", "--help"], ["inspect", "--help"], ["--version"]):
        status, out, _ = command(*arguments)
        assert status == 0
        assert "onnx-ocs" in out
    assert command()[0] == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_its_status_and_nothing_left(models, tmp_path, number, status):
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-m", "onnx_ocs", models / "digits_resnet.onnx", folder / "out.onnx", "-q"]
    command += ["--synthetic", "2000"]  # so that it is still at it

    def hear() -> None:
        """What a shell runs in the background ignores SIGINT, and so would what it starts."""
        signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear)
    while process.poll() is None and not list(folder.iterdir()):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert list(folder.iterdir()) == []


def test_a_model_of_this_folder_works_by_its_bare_name(models, tmp_path, monkeypatch, command):
    shutil.copy(models / "digits_mlp.onnx", tmp_path / "in.onnx")
    monkeypatch.chdir(tmp_path)
    assert command("in.onnx", "out.onnx", "-q")[0] == 0
