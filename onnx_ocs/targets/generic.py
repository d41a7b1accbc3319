"""Every runtime: symmetric INT8 in front of each layer, and nothing that one of them refuses."""

from onnx_ocs.targets.base import Target

TARGET = Target(
    name="generic",
    summary="symmetric INT8 at the inputs of Conv, Gemm and MatMul; runs everywhere",
)
