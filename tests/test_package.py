"""The package as users get it."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

PROBE = """
import onnx_ocs, sys
from pathlib import Path
folder = Path(onnx_ocs.__file__).parent
assert folder.is_relative_to(sys.argv[1]), folder
assert (folder / "py.typed").exists()
print(onnx_ocs.__version__)
"""
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")


APART = {"graph": ("numerics", "passes"), "numerics": ("graph", "passes"), "passes": ("passes",)}


@pytest.mark.parametrize("room", APART)
def test_rooms_that_are_to_know_nothing_of_each_other_do_not(room):
    """As CONTRIBUTING.md has it."""
    for file in (ROOT / "onnx_ocs" / room).glob("*.py"):
        imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        known = {f"{node.module}." for node in imports} - {"onnx_ocs.passes.base."}
        assert not [name for name in known for other in APART[room] if name.startswith(f"onnx_ocs.{other}.")], file


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_built_installs_and_runs(kind, tmp_path):
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=LEFT_OUT)
    build = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", tmp_path / "made", source]
    subprocess.run(build, check=True, capture_output=True)
    (made,) = (tmp_path / "made").iterdir()
    if kind == "wheel":
        with zipfile.ZipFile(made) as archive:
            names = archive.namelist()
        assert any(name.endswith("LICENSE") for name in names)
        assert not any(name.startswith(("tests", "benchmarks", "models")) for name in names)
    target = tmp_path / "installed"
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, made], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    run = {"check": True, "capture_output": True, "text": True, "env": environment, "cwd": tmp_path}
    version = subprocess.run([sys.executable, "-c", PROBE, target], **run).stdout.strip()
    command = [sys.executable, target / "bin" / "onnx-ocs"]
    assert subprocess.run([*command, "--version"], **run).stdout == f"onnx-ocs {version}\n"
    subprocess.run([*command, ROOT / "models" / "digits_mlp.onnx", tmp_path / "out.onnx", "-q"], **run)
    assert (tmp_path / "out.onnx").exists()
