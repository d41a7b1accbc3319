"""Time and memory on large models, as ratios in one run: ``python benchmarks/speed.py``.

A 100 MB model of ResNet-50's shapes with random weights goes through ``onnx.load`` + ``onnx.save`` and through the
tool, each as a whole process; a 4 GB model with external data goes through the tool. Exit status 1 where a promise is
broken: 3 times the time of load and save (10 times with ``--clip mse``), 3 times the size of the file in memory, and
1 GB of memory for the large model. Rounding by error sums takes at most 5 times as long as to the nearest integers, by
assumed data at most one minute on two cores, by made-up samples, the default without data at 4 bits, at most 5, and by
64 samples at most 10 minutes, or one for SqueezeNet of the assets.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from common import assets, measure, onnx_ocs
from onnx import TensorProto, helper

COPY = "import onnx, sys; onnx.save(onnx.load(sys.argv[1]), sys.argv[2])"


def resnet50(path: Path) -> None:
    """The shapes of ResNet-50 (He et al., arXiv:1512.03385), BatchNormalization folded, random weights."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def conv(name: str, x: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> str:
        values = rng.standard_normal((outputs, inputs, kernel, kernel), np.float32) / np.sqrt(inputs * kernel**2)
        weights.append(onnx.numpy_helper.from_array(values.astype(np.float32), f"{name}.weight"))
        weights.append(onnx.numpy_helper.from_array(np.zeros(outputs, np.float32), f"{name}.bias"))
        pads = [kernel // 2] * 4
        inputs_of = [x, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Conv", inputs_of, [f"{name}.out"], name, strides=[stride] * 2, pads=pads))
        return f"{name}.out"

    def node(op: str, name: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, list(inputs), [f"{name}.out"], name, **attributes))
        return f"{name}.out"

    x = node("Relu", "stem.relu", conv("stem", "image", 3, 64, 7, 2))
    x = node("MaxPool", "stem.pool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    inputs = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            name, stride = f"stage{stage}.{block}", 2 if stage and not block else 1
            inner = node("Relu", f"{name}.relu1", conv(f"{name}.conv1", x, inputs, width, 1))
            inner = node("Relu", f"{name}.relu2", conv(f"{name}.conv2", inner, width, width, 3, stride))
            inner = conv(f"{name}.conv3", inner, width, 4 * width, 1)
            aside = x if block else conv(f"{name}.shortcut", x, inputs, 4 * width, 1, stride)
            x = node("Relu", f"{name}.relu3", node("Add", f"{name}.add", inner, aside))
            inputs = 4 * width
    x = node("Flatten", "flatten", node("GlobalAveragePool", "pool", x))
    weights.append(onnx.numpy_helper.from_array(rng.standard_normal((1000, 2048), np.float32) / 45, "fc.weight"))
    nodes.append(helper.make_node("Gemm", [x, "fc.weight"], ["logits"], "fc", transB=1))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 224, 224])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])
    graph = helper.make_graph(nodes, "resnet50", [image], [logits], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def dense(path: Path, layers: int, width: int) -> None:
    """Dense layers with their weights in a file beside the model, written one at a time."""
    rng = np.random.default_rng(0)
    nodes, weights, size = [], [], 4 * width * width
    values = (rng.standard_normal((width, width), np.float32) / np.sqrt(width)).astype(np.float32)
    with path.with_suffix(".data").open("wb") as data:
        for layer in range(layers):
            np.roll(values, 977 * layer).tofile(data)
            tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[width, width])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", path.stem + ".data"), ("offset", layer * size), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            weights.append(tensor)
            output = "y" if layer == layers - 1 else f"x{layer + 1}"
            nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [output], f"dense{layer}"))
    first = helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["N", width])
    last = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", width])
    graph = helper.make_graph(nodes, "dense", [first], [last], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many runs counts")
    parser.add_argument("--gigabytes", type=float, default=4, help="of the model with external data; 0 leaves it out")
    parser.add_argument("--images", type=int, default=64, help="for rounding by samples; 0 leaves it out")
    arguments = parser.parse_args()
    broken = 0

    def tell(name: str, value: float, most: float, unit: str = "x") -> None:
        nonlocal broken
        broken += value > most
        print(f"{name:64}{value:8.2f} {unit} (at most {most:g})", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "resnet50.onnx"), Path(folder, "out.onnx")
        resnet50(source)
        size = source.stat().st_size
        print(f"ResNet-50 shapes, {size / 1e6:.0f} MB, fastest of {arguments.rounds}")
        commands = {"onnx.load + onnx.save": [sys.executable, "-c", COPY, str(source), str(target)]}
        for clip in ("none", "mse"):
            options = ("--bits", 6, "--per-channel", "--clip", clip, "--no-verify", "-q")
            commands[f"--bits 6 --per-channel --clip {clip}"] = onnx_ocs(source, target, *options)
        runs = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                runs[name].append(measure(command))
                assert runs[name][-1].status == 0, runs[name][-1].errors
        base, *ours = (min(run.seconds for run in made) for made in runs.values())
        peaks = [max(run.peak_bytes for run in made) for made in runs.values()]
        print(f"onnx.load + onnx.save takes {base:.2f} s and {peaks[0] / size:.2f} times the file in memory")
        for name, seconds, peak, most in zip(list(commands)[1:], ours, peaks[1:], (3, 10), strict=True):
            tell(f"{name}: time", seconds / base, most)
            tell(f"{name}: memory, in files", peak / size, 3)
        rounded = {
            name: min(_seconds(source, target, "--bits", 4, "--round", name) for _ in range(arguments.rounds))
            for name in ("nearest", "compensated")
        }
        tell("--bits 4 --round compensated, times nearest", rounded["compensated"] / rounded["nearest"], 5)
        tell("--bits 4 --round assumed", _seconds(source, target, "--bits", 4, "--round", "assumed"), 60, "s")
        tell("--bits 4", _seconds(source, target, "--bits", 4), 300, "s")
        if arguments.images:
            images = Path(folder, "images.npy")
            np.save(images, np.random.default_rng(0).standard_normal((arguments.images, 3, 224, 224), np.float32))
            tell(f"--round hessian, {arguments.images} images", _with_samples(source, images, target), 600, "s")
            squeezenet = assets() / "models" / "imagenet_squeezenet1.1.onnx"
            name = f"SqueezeNet, --round hessian, {arguments.images} images"
            tell(name, _with_samples(squeezenet, images, target), 60, "s")
        if arguments.gigabytes:
            width = 4096
            source = Path(folder, "dense.onnx")
            dense(source, round(arguments.gigabytes * 2**30 / (4 * width * width)), width)
            for options in (("--clip", "none"), ("--clip", "mse"), ("--float",)):
                run = measure(onnx_ocs(source, target, "--bits", 6, *options, "--no-verify", "-q"))
                assert run.status == 0, run.errors
                name = f"{arguments.gigabytes:g} GB external, --bits 6 {' '.join(options)}: memory"
                tell(name, run.peak_bytes / 1e9, 1, "GB")
    return int(bool(broken))


def _with_samples(source: Path, images: Path, target: Path) -> float:
    """Seconds of a run that calibrates on images and rounds weights of 4 bits by them."""
    return _seconds(source, target, "--bits", 4, "--act-bits", "none", "--round", "hessian", "--calibrate", images)


def _seconds(source: Path, target: Path, *options: object) -> float:
    """Seconds of a run that does not verify."""
    run = measure(onnx_ocs(source, target, *options, "--no-verify", "-q"))
    assert run.status == 0, run.errors
    return run.seconds


if __name__ == "__main__":
    sys.exit(main())
