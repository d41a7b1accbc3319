"""ONNX Runtime on CPUs: a node becomes an integer kernel when all its inputs and its output are quantized."""

import onnx_graphsurgeon as gs

from onnx_ocs.targets.base import VALID, Target


def _is_dense(pool: gs.Node) -> bool:
    """Whether its window has no holes, which its integer kernel does not know."""
    dilations = pool.attrs.get("dilations", ())  # in a function perhaps what its caller says
    return isinstance(dilations, list | tuple) and all(step == 1 for step in dilations)


def _is_nearest(resize: gs.Node) -> bool:
    """Whether it takes values as they are; any other mode makes new ones."""
    return bool(resize.attrs.get("mode", "nearest") == "nearest")


TARGET = Target(
    name="ort",
    summary="ONNX Runtime on CPUs: UINT8 data, and integer kernels wherever it has them",
    unsigned=True,
    outputs=frozenset({"Conv"}),  # Gemm and MatMul write float where no integer kernel reads them
    computes=frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax"}),
    only={"AveragePool": _is_dense, "Resize": _is_nearest},
    one_scale=frozenset({"Concat"}),  # which copies then; and what is rounded twice would be no finer
    moves=frozenset(
        {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Resize"}
    ),
    absorbed=frozenset({"Relu", "Clip"}),
    integer_bias=frozenset({"Gemm", "MatMul"}),  # which becomes a Gemm with the Add behind it
    integer_containers=frozenset({8}),  # others stay behind a DequantizeLinear
    gathers_integers=True,
    multiples=(4,),
    float_multiples=(16,),
    plain=frozenset({"Gemm", "Pad", "Resize"}),  # the last two with axes fail where channels come to lie last
    adds_pairs=True,
    block=16,
    gather_moves=3,  # its kernels have channels last, so that it is transposed before and after
    rules=(
        *VALID,
        "loads",
        "written-zero-point",
        "both-operands",
        "relu",
        "clip",
        "int8-data",
        "output",
        "gemm",
        "four-bit-weight",
        "conv-transpose",
        "partly",
        "moved-scale",
        "gather-place",
        "float-kernel",  # behind those that say why
        "saturation",
    ),
)
