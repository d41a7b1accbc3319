"""Train the small models beside this file on scikit-learn's digits and write them as ONNX: ``python models/train.py``.

Needs ``pip install -e .[train]``; takes a few minutes on two cores. The graphs are built node by node with
``onnx.helper``, so that the files depend on the weights alone. Every file is compared with the trained network on the
held-out digits before it is kept.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

SEED = 20260
HELD_OUT = 597
OPSET, IR = 17, 8
Array = NDArray[np.float32]


def digits() -> tuple[Array, NDArray[np.int64], Array, NDArray[np.int64]]:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,): to train on, and held out."""
    image, label = load_digits(return_X_y=True)
    image = (image / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train, test, train_label, test_label = train_test_split(
        image, label.astype(np.int64), test_size=HELD_OUT, random_state=SEED, stratify=label
    )
    return train, train_label, test, test_label


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        self.norm = nn.BatchNorm2d(outputs) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.norm1(self.conv1(x)))
        aside = x if self.shortcut is None or self.norm is None else self.norm(self.shortcut(x))
        return functional.relu(self.norm2(self.conv2(inner)) + aside)


class ResNet(nn.Module):
    """A stem, five residual blocks of 16, 16, 32, 32 and 48 channels, and one dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        shapes = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 2)]
        self.blocks = nn.ModuleList(Block(*shape) for shape in shapes)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(dim=(2, 3)))


class Dense(nn.Module):
    """Three dense layers of 64, 96, 64 and 10 units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 10)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


def train(model: nn.Module, image: Array, label: NDArray[np.int64], epochs: int, rate: float) -> nn.Module:
    """Stochastic gradient descent with momentum on images shifted by a pixel at random."""
    images, labels = torch.from_numpy(image), torch.from_numpy(label)
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * -(-len(images) // 64))
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            across, down = torch.randint(-1, 2, (2,), generator=generator).tolist()
            shifted = functional.pad(images[batch], (1, 1, 1, 1))[:, :, 1 + down : 9 + down, 1 + across : 9 + across]
            loss = functional.cross_entropy(model(shifted), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


class Graph:
    """An ONNX graph in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, values: torch.Tensor | Array) -> str:
        held = values.detach().numpy() if isinstance(values, torch.Tensor) else values
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(held, np.float32), name))
        return name

    def node(self, op: str, name: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"{name}.out"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name, **attributes))
        return output

    def conv(self, name: str, x: str, layer: nn.Conv2d, norm: nn.BatchNorm2d, folded: bool) -> str:
        """A convolution and its normalization: as two nodes, or folded into one."""
        pads, weight = [layer.padding[0]] * 4, layer.weight
        shape = {"kernel_shape": list(layer.kernel_size), "strides": list(layer.stride), "pads": pads}
        if not folded:
            x = self.node("Conv", name, x, self.weight(f"{name}.weight", weight), **shape)
            held = {"scale": norm.weight, "bias": norm.bias, "mean": norm.running_mean, "var": norm.running_var}
            names = [self.weight(f"{name}.norm.{key}", value) for key, value in held.items()]
            return self.node("BatchNormalization", f"{name}.norm", x, *names, epsilon=norm.eps)
        gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        bias = norm.bias.double() - norm.running_mean.double() * gain
        folded_weight = self.weight(f"{name}.weight", (weight.double() * gain[:, None, None, None]).float())
        return self.node("Conv", name, x, folded_weight, self.weight(f"{name}.bias", bias.float()), **shape)

    def model(self, name: str) -> onnx.ModelProto:
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])
        graph = helper.make_graph(self.nodes, name, [image], [logits], self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
        made.producer_name = "onnx-ocs models/train.py"
        onnx.checker.check_model(made, full_check=True)
        return made


def resnet_graph(model: ResNet, folded: bool) -> onnx.ModelProto:
    """The trained network, its BatchNormalization folded into the convolutions or not."""
    graph = Graph()
    x = graph.node("Relu", "stem.relu", graph.conv("stem", "image", model.stem, model.norm, folded))
    for number, block in enumerate(model.blocks, 1):
        name, aside = f"block{number}", x
        inner = graph.node("Relu", f"{name}.relu1", graph.conv(f"{name}.conv1", x, block.conv1, block.norm1, folded))
        inner = graph.conv(f"{name}.conv2", inner, block.conv2, block.norm2, folded)
        if block.shortcut is not None:
            aside = graph.conv(f"{name}.shortcut", x, block.shortcut, block.norm, folded)
        x = graph.node("Relu", f"{name}.relu2", graph.node("Add", f"{name}.add", inner, aside))
    x = graph.node("Flatten", "flatten", graph.node("GlobalAveragePool", "pool", x))
    weight, bias = graph.weight("fc.weight", model.fc.weight), graph.weight("fc.bias", model.fc.bias)
    graph.node("Gemm", "fc", x, weight, bias, output="logits", transB=1)
    return graph.model("digits_resnet")


def dense_graph(model: Dense) -> onnx.ModelProto:
    """The trained network: two Gemm, and a MatMul with an Add, as exporters write dense layers."""
    graph = Graph()
    x = graph.node("Flatten", "flatten", "image")
    for number, layer in enumerate(model.layers[:-1], 1):
        name = f"fc{number}"
        weight, bias = graph.weight(f"{name}.weight", layer.weight), graph.weight(f"{name}.bias", layer.bias)
        x = graph.node("Relu", f"{name}.relu", graph.node("Gemm", name, x, weight, bias, transB=1))
    last = model.layers[-1]
    product = graph.node("MatMul", "fc3", x, graph.weight("fc3.weight", last.weight.T))
    graph.node("Add", "fc3.add", product, graph.weight("fc3.bias", last.bias), output="logits")
    return graph.model("digits_mlp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().out
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    image, label, test, test_label = digits()
    np.savez_compressed(folder / "digits_test.npz", image=test, label=test_label)
    torch.manual_seed(SEED)
    resnet = train(ResNet(), image, label, epochs=40, rate=0.1)
    dense = train(Dense(), image, label, epochs=120, rate=0.1)
    made = {
        "digits_resnet.onnx": (resnet_graph(resnet, folded=True), resnet),
        "digits_resnet_bn.onnx": (resnet_graph(resnet, folded=False), resnet),
        "digits_mlp.onnx": (dense_graph(dense), dense),
    }
    for name, (model, network) in made.items():
        data = model.SerializeToString(deterministic=True)
        (logits,) = ort.InferenceSession(data).run(None, {"image": test})
        with torch.no_grad():
            wanted = network(torch.from_numpy(test)).numpy()
        error = np.abs(logits - wanted).max() / np.abs(wanted).max()
        assert error < 1e-5, f"{name} differs from the trained network by {error}"
        accuracy = (logits.argmax(axis=1) == test_label).mean()
        (folder / name).write_bytes(data)
        print(f"{name:24}{len(data):>9,} bytes  accuracy {accuracy:.2%} of {len(test)}  differs by {error:.1e}")


if __name__ == "__main__":
    main()
