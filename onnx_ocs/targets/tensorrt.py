"""NVIDIA TensorRT, explicit quantization: symmetric INT8 at the inputs of layers, and INT4 in blocks.

Sources: the parser of onnx-tensorrt (onnxOpImporters.cpp) and the developer guide, "Working with Quantized Types".
"""

from onnx_ocs.targets.base import VALID, Target

TARGET = Target(
    name="tensorrt",
    summary="NVIDIA TensorRT: symmetric INT8 at the inputs of layers and at the skip branch of a residual Add",
    skips=frozenset({"Add"}),
    containers=frozenset({8}),  # INT4 in blocks only
    integer_containers=frozenset({8}),
    scale_axes={"Conv": 0, "ConvTranspose": 1},
    block_containers=frozenset({4}),
    whole_blocks=True,
    clips_integers=False,
    constant_scales=True,
    symmetric=True,
    multiples=(32, 16, 8, 4),
    block=32,
    rules=(
        *VALID,
        "operators",
        "type",
        "bias-float",
        "symmetric",
        "constant-scale",
        "int4-blocks",
        "data-per-tensor",
        "axis",
        "both-operands",
        "before-activation",
        "residual",
        "concat-scale",
        "batch-normalization",
        "exporter-leaves-float",
    ),
)
