"""Without samples: pictures that are made up, and what a graph tells of them: ``python benchmarks/synthetic.py``.

SqueezeNet 1.1 as it is, and taking pixels from 0 to 255 that the graph prepares. Weights of 5 and 4 bits without data,
which made-up pictures round, and weights and activations of 8 bits, calibrated on 64 samples: images, made-up pictures
with the colours that the graph tells (``--synthetic 64``), made-up pictures with mean 0 and variance 1 whatever it
tells, and white noise. Ratio 0, ``--target ort``. Top-1 / agreement with the float model / divergence times 1000, on
336 images.

Exit status 1 where preparing pixels in the graph costs more than half a point of agreement.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from accuracy import figures, row
from networks import DEVIATION, MAKERS, MEAN, Figures, Network, compare, outputs

from onnx_ocs import quantize
from onnx_ocs.numerics.natural import natural_images

COUNT = 64


def on_pixels(network: Network, path: Path) -> Network:
    """The same with inputs from 0 to 255, and the graph takes mean and deviation out."""
    model = onnx.load(network.model)
    (source,) = model.graph.input
    for node in model.graph.node:
        node.input[:] = ["prepared" if name == source.name else name for name in node.input]
    constants = {"mean": MEAN, "deviation": DEVIATION}
    arrays = {name: 255 * np.array(values, np.float32).reshape(1, 3, 1, 1) for name, values in constants.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    for index, node in enumerate([("Sub", source.name, "mean", "moved"), ("Div", "moved", "deviation", "prepared")]):
        model.graph.node.insert(index, onnx.helper.make_node(node[0], node[1:3], node[3:]))
    onnx.save(model, path)
    images, calibration = (
        pixels * arrays["deviation"] + arrays["mean"] for pixels in (network.images, network.calibration)
    )
    return dataclasses.replace(
        network, name=f"{network.name} on pixels", model=path, images=images, calibration=calibration
    )


def rows(network: Network, folder: Path) -> dict[str, Figures]:
    reference, target = outputs(network.model, network.images), folder / "out.onnx"

    def measured(**options: Any) -> Figures:
        quantize(network.model, target, ratio=0, verify=False, **options)
        return compare(reference, outputs(target, network.images, exact=True), network.labels)

    rng = np.random.default_rng(0)
    size = network.images.shape[-1]
    noise = rng.standard_normal((COUNT, 3, size, size)).astype(np.float32)
    pictures = natural_images(COUNT, 3, (size, size), rng).astype(np.float32)
    both = {"bits": 8, "act_bits": 8, "target": "ort", "round": "compensated", "bias_correction": False}
    return {
        "W5, no data": measured(bits=5),
        "W4, no data": measured(bits=4),
        "W8A8, images": measured(calibrate=network.calibration, **both),
        "W8A8, `--synthetic`": measured(synthetic=COUNT, **both),
        "W8A8, pictures of mean 0, variance 1": measured(calibrate=pictures, **both),
        "W8A8, white noise": measured(calibrate=noise, **both),
    }


def main() -> int:
    plain = MAKERS["squeezenet"](COUNT)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        networks = [plain, on_pixels(plain, folder / "pixels.onnx")]
        found = [rows(network, folder) for network in networks]
    print(f"| top-1 / agreement / divergence | {' | '.join(network.name for network in networks)} |\n|---|---|---|")
    for name in found[0]:
        row(name, [figures(each[name]) for each in found])
    lost = [name for name in list(found[0])[:4] if found[1][name].agreement < found[0][name].agreement - 0.5]
    for name in lost:
        print(f"\n{name}: worse on pixels")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
