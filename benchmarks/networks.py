"""The networks that the tables are made of: a model, images to calibrate on, and other images to measure on.

Without options they are those of the assets: ResNet-20 on CIFAR-10 and SqueezeNet 1.1 on ImageNet samples. The
networks of the paper are measured by the same commands where someone has them as ONNX files, with a folder of images
in the layout of ImageNet's validation set (one folder for each class, in the order of the classes):

    --model resnet50.onnx --images imagenet/val [--size 224] [--limit 2000]
"""

import argparse
import csv
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnxruntime as ort
from common import assets
from numpy.typing import NDArray

from onnx_ocs.numerics.compare import Difference

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SHIFTS = (0, -2, 2, -1, 1)
"""Frames by which words are moved."""

CUTS = ((0, 0, 224, 224), (0, 0, 192, 192), (32, 0, 224, 192), (0, 32, 192, 224), (32, 32, 224, 224))
"""Of a photo: the whole, and all but a seventh of each side, from each corner."""

SIDE = 96
"""Of the images that MobileNet takes."""

BILINEAR = 2
"""Pillow's number of this filter."""

Change = Callable[[Any], Any]
"""What is made of a picture, Pillow's Image: another, or an array of one or several."""


@dataclass(frozen=True, eq=False)
class Network:
    """One trained model and its images, as it takes them."""

    name: str
    model: Path
    calibration: NDArray[np.float32]
    images: NDArray[np.float32]  # those of the first view, those of the second ...
    labels: NDArray[np.int64]  # of the first of ``images``
    classes: bool = True  # whether the outputs are scores, of which the largest means something
    dense: bool = False  # nearly all weights are those of dense layers, which the paper's preset leaves float
    views: int = 1  # of each sample: other cuts, or shifts

    def by_sample(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(samples,), the mean of the views of each, which are not independent; of values of all images."""
        return np.asarray(values.reshape(self.views, -1).mean(axis=0))


@dataclass(frozen=True)
class Figures:
    """How a model compares with the float one; percents, and nats times 1000."""

    top1: float
    agreement: float
    divergence: float

    def __str__(self) -> str:
        return f"{self.top1:.2f} | {self.agreement:.2f} | {self.divergence:.2f}"


def add_options(parser: argparse.ArgumentParser, names: Sequence[str] = ("resnet20", "squeezenet")) -> None:
    parser.add_argument("--network", choices=names, nargs="+", default=list(names))
    parser.add_argument("--model", type=Path, help="an ONNX file to measure in place of those")
    parser.add_argument("--images", type=Path, help="its images: a folder with a folder for each class")
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--limit", type=int, default=2000, help="images to measure on")
    parser.add_argument("--calibrate", type=int, default=512, help="images to calibrate on (64 of the small sample)")


def networks(arguments: argparse.Namespace) -> Iterator[Network]:
    """The networks that the options name."""
    if arguments.model is not None:
        yield _from_folder(arguments)
        return
    for name in arguments.network:
        yield MAKERS[name](arguments.calibrate)


def outputs(
    model: Path | bytes, images: NDArray[np.float32], batch: int = 64, optimize: bool = True, exact: bool = False
) -> NDArray[np.float32]:
    """The scores of all images, ``batch`` at a time, by onnxruntime; ``exact``: by kernels that do not saturate."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model if isinstance(model, bytes) else str(model), options)
    name = session.get_inputs()[0].name
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    return np.concatenate([session.run(None, {name: part})[0] for part in parts])


def saturates() -> bool:
    """Whether onnxruntime's kernels for UINT8 data and INT8 weights saturate on this CPU."""
    data = np.full((1, 32), 255, np.uint8)
    weight = onnx.numpy_helper.from_array(np.full((32, 1), 127, np.int8), "w")
    node = onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, data.shape)
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, (1, 1))
    graph = onnx.helper.make_graph([node], "g", [x], [y], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool(session.run(None, {"x": data})[0].item() != 32 * 255 * 127)


def compare(reference: NDArray[np.float32], found: NDArray[np.float32], labels: NDArray[np.int64]) -> Figures:
    """Top-1 on the images with labels, agreement and divergence on all of them."""
    difference = Difference("scores")
    difference.add(reference.reshape(len(reference), -1), found.reshape(len(found), -1))
    summary = difference.summary()
    right = found.reshape(len(found), -1)[: len(labels)].argmax(axis=1) == labels
    top1 = float(right.mean()) if len(labels) else math.nan
    return Figures(100 * top1, 100 * summary["top1_agreement"], 1000 * summary["kl_divergence"])


def paper(name: str) -> list[dict[str, str]]:
    """The rows of one of the paper's tables."""
    return list(csv.DictReader((assets().parent / "reference" / name).open()))


def print_head(network: Network, first: str, columns: Sequence[str]) -> None:
    """The head of a table of one network, whose rows are those of :func:`print_row`."""
    print(f"\n{network.name}: top-1 / agreement, in percent\n\n| {first} | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")


def print_row(first: object, found: Mapping[str, Figures], columns: Sequence[str]) -> None:
    cells = [f"{found[name].top1:.1f} / {found[name].agreement:.1f}" for name in columns]
    print(f"| {first} | {' | '.join(cells)} |", flush=True)


def print_paper(title: str, name: str) -> None:
    """One of the paper's tables as it is."""
    lines = paper(name)
    names = list(lines[0])
    print(f"\n{title}:\n\n| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for line in lines:
        print(f"| {' | '.join(line.values())} |")


def _resnet20(calibrate: int) -> Network:
    data = np.load(assets() / "data" / "cifar10.npz")
    test, train = (_normalized(data[name].astype(np.float32) / 255) for name in ("test_x", "train_x"))
    model = assets() / "models" / "cifar10_resnet20.onnx"
    images = np.concatenate([test, train])
    return Network("ResNet-20", model, train[:calibrate], images, data["test_y"].astype(np.int64))


def _squeezenet(calibrate: int) -> Network:
    names, images = _photos()
    images, apart = _normalized(images), _for_calibration(len(names))
    labels = np.array([int(Path(name).stem[:4]) for name in names])
    model = assets() / "models" / "imagenet_squeezenet1.1.onnx"
    return Network("SqueezeNet 1.1", model, images[apart][:calibrate], images[~apart], labels[~apart])


def _keywords(calibrate: int) -> Network:
    """Features of spoken words, and the network of depthwise convolutions that tells them apart.

    It is measured on each word as it is, and as if it had begun up to two frames earlier or later.
    """
    data = np.load(assets() / "data" / "kws01_1000_float.npz")
    cut = min(calibrate, 200)
    words, frames = data["x"][cut:], np.arange(data["x"].shape[2])
    shifted = [words.take(np.clip(frames + late, 0, frames[-1]), axis=2) for late in SHIFTS]
    labels = np.tile(data["y"][cut:].astype(np.int64), len(SHIFTS))
    model = assets() / "models" / "kws_dscnn.onnx"
    return Network("DS-CNN", model, data["x"][:cut], np.concatenate(shifted), labels, views=len(SHIFTS))


def _mobilenet(calibrate: int) -> Network:
    """It tells whether there is a person in a photo: in those of SqueezeNet, in five cuts each, without labels.

    It calls nearly all images of CIFAR-10 empty, so that a constant would agree with it on these.
    """
    photos, model = _photos(_cuts)[1], assets() / "models" / "vww_mobilenetv1_0.25_96_bn.onnx"
    apart, labels = _for_calibration(len(photos)), np.zeros(0, np.int64)
    images = np.concatenate(list(photos[~apart].swapaxes(0, 1)))
    return Network("MobileNet 0.25", model, photos[apart, 0][:calibrate], images, labels, views=len(CUTS))


def _transformer(calibrate: int) -> Network:
    """A vision transformer on the images of CIFAR-10, on which it is right six times in ten."""
    data = np.load(assets() / "data" / "cifar10.npz")
    normal = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    test, train = (_normalized(data[name].astype(np.float32) / 255, *normal) for name in ("test_x", "train_x"))
    model = assets() / "models" / "cifar10_vit_ibp_3_3_8.onnx"
    images = np.concatenate([test, train[calibrate:]])
    return Network("ViT", model, train[:calibrate], images, data["test_y"].astype(np.int64), dense=True)


def _autoencoder(calibrate: int) -> Network:
    """Ten dense layers on random values, for want of data."""
    values = np.random.default_rng(0).standard_normal((calibrate + 1000, 640), np.float32)
    model = assets() / "models" / "ad01_autoencoder_bn.onnx"
    return Network("MLP", model, values[:calibrate], values[calibrate:], np.zeros(0, np.int64), classes=False)


def _photos(changed: Change = np.asarray) -> tuple[list[str], NDArray[np.float32]]:
    """400 of ImageNet, in the order of their classes: names, and images from 0 to 1."""
    with zipfile.ZipFile(assets() / "data" / "imagenet_400.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        return names, _decoded((archive.open(name) for name in names), changed)


def _for_calibration(count: int) -> NDArray[np.bool_]:
    """Which 64 of so many photos are, spread over the classes."""
    chosen = np.arange(count) * 64 // count
    return np.append(True, chosen[1:] != chosen[:-1])


def _from_folder(arguments: argparse.Namespace) -> Network:
    if arguments.images is None:
        raise SystemExit("--model needs --images")
    folders = sorted(folder for folder in arguments.images.iterdir() if folder.is_dir())
    files = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    order = np.random.default_rng(0).permutation(len(files))[: arguments.limit + arguments.calibrate]
    pictures = (files[i][0].open("rb") for i in order)
    images = _normalized(_decoded(pictures, partial(_centre, arguments.size)))
    labels = np.array([files[i][1] for i in order])
    cut = arguments.calibrate
    return Network(arguments.model.stem, arguments.model, images[:cut], images[cut:], labels[cut:])


def _decoded(files: Iterable[IO[bytes]], changed: Change) -> NDArray[np.float32]:
    """(N, 3, rows, columns), RGB from 0 to 1; (N, several, 3, rows, columns) where several are made of each."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise SystemExit("this needs Pillow: pip install -e '.[benchmarks]'") from None
    made = []
    for file in files:
        with file, Image.open(file) as image:
            made.append(np.moveaxis(np.asarray(changed(image.convert("RGB"))), -1, -3))
    return np.stack(made).astype(np.float32) / 255


def _centre(size: int, picture: Any) -> Any:
    """The shorter side 8/7 of ``size``, the centre cut out."""
    scale = size * 8 / 7 / min(picture.size)
    picture = picture.resize([round(side * scale) for side in picture.size], BILINEAR)
    left, top = ((side - size) // 2 for side in picture.size)
    return picture.crop((left, top, left + size, top + size))


def _cuts(picture: Any) -> NDArray[np.uint8]:
    return np.stack([np.asarray(picture.resize((SIDE, SIDE), BILINEAR, box)) for box in CUTS])


def _normalized(
    images: NDArray[np.float32], mean: Sequence[float] = MEAN, deviation: Sequence[float] = DEVIATION
) -> NDArray[np.float32]:
    middle, spread = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (mean, deviation))
    return (images - middle) / spread


MAKERS: dict[str, Callable[[int], Network]] = {
    "resnet20": _resnet20,
    "squeezenet": _squeezenet,
    "kws": _keywords,
    "mobilenet": _mobilenet,
    "vit": _transformer,
    "mlp": _autoencoder,
}
"""The networks of the assets, by the names of ``--network``; they take the number of images to calibrate on."""
