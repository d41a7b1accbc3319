"""OpenVINO: it reads the pairs as FakeQuantize and moves the scales through the graph by itself."""

from onnx_ocs.targets.base import VALID, Target

TARGET = Target(
    name="openvino",
    summary="OpenVINO: UINT8 data at the inputs of layers and of Add",
    unsigned=True,
    skips=frozenset({"Add"}),
    containers=frozenset({8, 4}),  # INT2 is refused
    integer_containers=frozenset({8, 4}),
    block_containers=frozenset({8, 4}),
    whole_blocks=True,  # its frontend refuses a rest
    gathers_integers=True,
    multiples=(4,),
    float_multiples=(16,),
    plain=frozenset({"Gemm"}),  # with alpha it computes something else from UINT8
    adds_pairs=True,
    block=16,
    rules=(*VALID, "int2", "int4-odd", "gemm-alpha"),
)
