"""One peer quantizes one model, in an environment of its own: ``PYTHON benchmarks/quantize_by.py REQUEST ANSWER``.

``accuracy.py --peer NAME=PYTHON`` runs it with the python of that environment, which needs the peer and nothing of this
project. The request (JSON) says which peer and which of its methods ("" is its default), the model, the bits of the
weights, whether data is quantized to 8 bits as well, and where the samples and the images to measure on lie (.npy).
The answer (JSON) has the versions, and the path of the model, or that of the scores where there is only a simulation,
or else the peer's own words for why not.
"""

import contextlib
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked of a peer."""

    peer: str
    method: str
    model: str
    bits: int  # of weights
    data: bool  # whether activations are quantized to 8 bits
    samples: NDArray[np.float32]
    images: NDArray[np.float32]
    folder: Path  # where the result goes

    @property
    def loaded(self) -> onnx.ModelProto:
        return onnx.load(self.model)

    def feeds(self, batch: int) -> list[dict[str, NDArray[np.float32]]]:
        """The samples by the name of the input, ``batch`` at a time."""
        name = self.loaded.graph.input[0].name
        return [{name: self.samples[start : start + batch]} for start in range(0, len(self.samples), batch)]


Quantize = Callable[[Request], onnx.ModelProto | NDArray[np.float32]]

PEERS: dict[str, Quantize] = {}
"""By the name of the package."""


def peer(name: str) -> Callable[[Quantize], Quantize]:
    def register(quantize: Quantize) -> Quantize:
        PEERS[name] = quantize
        return quantize

    return register


@peer("nncf")
def by_nncf(request: Request) -> onnx.ModelProto:
    """Weights only by ``compress_weights``, one scale for each output channel; with data by ``quantize``.

    Methods are those of ``compress_weights``: awq, scale_estimation, gptq.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    if request.data:
        feeds = request.feeds(1)
        weights = QuantizationParameters(num_bits=request.bits)
        advanced = AdvancedQuantizationParameters(weights_quantization_params=weights)
        return nncf.quantize(request.loaded, nncf.Dataset(feeds), subset_size=len(feeds), advanced_parameters=advanced)
    settings: dict[str, Any] = {"mode": nncf.CompressWeightsMode(f"int{request.bits}_asym")}
    model = request.loaded
    if request.bits < 8:  # with 8 it refuses these
        settings |= {"all_layers": True, "ratio": 1.0, "group_size": -1}
        model = onnx.version_converter.convert_version(model, 21)  # the first with INT4, which it does not raise itself
    if request.method:
        settings |= {request.method: True, "dataset": nncf.Dataset(request.feeds(1))}
    return with_vectors(nncf.compress_weights(model, **settings))


def with_vectors(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with scales and zero points of one dimension, as ONNX wants them.

    nncf 3.4.0 writes those of a Conv as (M, 1, 1), and onnxruntime refuses the model.
    """
    read = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.input[1:]}
    for constant in model.graph.initializer:
        if constant.name in read and len(constant.dims) == 3 and constant.dims[1:] == [1, 1]:
            del constant.dims[1:]
    return model


@peer("nvidia-modelopt")
def by_modelopt(request: Request) -> onnx.ModelProto:
    """It has modes in place of bits: "int8" for weights and data, "int4" for weights in blocks.

    Methods are those of ``calibration_method``: max, entropy, rtn_dq, awq_clip, ...
    """
    from modelopt.onnx.quantization import quantize

    target = request.folder / "modelopt.onnx"
    [feed] = request.feeds(len(request.samples))
    source = shutil.copy(request.model, str(request.folder / "source.onnx"))  # it writes beside its source, and into it
    quantize(
        source,
        quantize_mode=f"int{request.bits}",
        calibration_data=feed,
        calibration_method=request.method or None,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(target),
    )
    return onnx.load(target)


@peer("aimet-onnx")
def by_aimet(request: Request) -> onnx.ModelProto | NDArray[np.float32]:
    """A scale for each output channel; the scores of its simulation for widths that it cannot export.

    Methods are functions of the package: apply_seq_mse, apply_adaround.
    """
    import aimet_onnx
    from aimet_onnx.common import quantsim_config

    settings = Path(quantsim_config.__file__).with_name("default_config_per_channel.json")
    sim = aimet_onnx.QuantizationSimModel(
        request.loaded, param_type=aimet_onnx.qtype.int(request.bits), activation_type="int8", config_file=str(settings)
    )
    if not request.data:
        for name in sim.activation_names:
            sim.qc_quantize_op_dict[name].enabled = False
    feeds = request.feeds(32)
    if request.method:
        getattr(aimet_onnx, request.method)(sim, feeds)
    sim.compute_encodings(feeds)
    try:
        return sim.to_onnx_qdq()
    except RuntimeError:
        name = request.loaded.graph.input[0].name
        parts = np.array_split(request.images, -(-len(request.images) // 64))
        return np.concatenate([sim.session.run(None, {name: part})[0] for part in parts])


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main() -> int:
    asked, answered = map(Path, sys.argv[1:])
    given: dict[str, Any] = json.loads(asked.read_text())
    arrays = {name: np.load(given.pop(name)) for name in ("samples", "images")}
    request = Request(**given, **arrays, folder=answered.parent)
    answer: dict[str, Any] = {"versions": versions(request.peer, "onnx", "onnxruntime", "onnxruntime-gpu", "torch")}
    try:
        made = PEERS[request.peer](request)
    except Exception as error:  # whatever it says is what the table says
        answer["reason"] = f"{type(error).__name__}: {error}"
    else:
        if isinstance(made, onnx.ModelProto):
            answer["model"] = str(answered.with_suffix(".onnx"))
            onnx.save(made, answer["model"])
        else:
            answer["scores"] = str(answered.with_suffix(".npy"))
            np.save(answer["scores"], made)
    answered.write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
